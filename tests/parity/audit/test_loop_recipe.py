"""What the audit says of a loop's precision: loops of known recipes come out as these, and a change as what was changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from clean_loops import CleanLoop, Run
from clean_optimizers import BitsAdamW, Masters
from torch import Tensor, nn

from refimpl.parity.audit import Audit, loop_recipe
from refimpl.parity.audit.loop_recipe import LoopRecipe
from refimpl.parity.audit.loop_rows import folded, rows_of
from refimpl.parity.pytorch import RECIPES
from refimpl.parity.pytorch_model import PyTorchTraining
from refimpl.precision.recipes import RECIPES as ALL
from refimpl.training.config import Config

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "steps": 2, "warmup": 1}


def of_twin(recipe: str, **settings: Any) -> LoopRecipe:
    """The recipe of refimpl's own training in PyTorch."""
    config = Config.of({**TINY, "recipe": recipe, **settings})
    twin = PyTorchTraining(config, config.make_model().initial_weights(np.random.default_rng(0)))
    rng = np.random.default_rng(0)
    with Audit(twin.model, twin.optimizer, scaler=twin.scaler, steps=2) as audit:
        for _ in range(2):
            tokens = rng.integers(0, config.vocab_size, (4, 16))
            twin.step(tokens, tokens)
            audit.step()
    return recipe_of(audit)


def recipe_of(audit: Audit) -> LoopRecipe:
    found = audit.recipe()
    assert audit.failures == {} and found is not None
    return found


def audit_of(run: Run, steps: int = 2) -> Audit:
    """Audit a clean loop."""
    scaler = run.scaler if run.scaler.is_enabled() else None
    audit = Audit(run.model, run.optimizer, scaler=scaler, ema=run.ema)

    @contextmanager
    def around() -> Iterator[None]:
        yield
        audit.step()

    with audit:
        run.train(around, steps)
    return audit


def of_clean(family: str, precision: str, optimizer: str, wrap: str = "", batches: str = "", extras: str = "") -> LoopRecipe:
    pytest.importorskip("transformers", reason="Hugging Face models")
    return recipe_of(audit_of(CleanLoop(family, precision, optimizer, wrap, batches, extras).make()))


# ------------------------------------------------------------------------------------------- loops of known recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_our_own_training_in_pytorch_has_its_recipe_and_nothing_else(recipe: str) -> None:
    found = of_twin(recipe)
    assert (found.nearest, found.departures, found.distance) == (recipe, (), 0.0)
    assert found.attention == "unfused"
    assert found.states.bytes_per_parameter == float(ALL[recipe].bytes_per_parameter())
    assert found.sentence == f"{recipe}: 16 bytes per parameter"
    assert found.scale.kind == ("dynamic" if "fp16" in recipe else "none")
    rows = {row.operation: row for row in found.table}
    assert {"linear.y", "linear.dx", "linear.dw", "linear.db", "attention.scores", "attention.values"} <= set(rows)
    low = recipe.removeprefix("amp-").removesuffix("-cpu")
    assert (rows["linear.dw"].inputs, rows["linear.dw"].sums, rows["linear.dw"].output) == (low, "fp32", low)
    assert rows["linear.y"].places == ("transformer.h.*.attn", "transformer.h.*.mlp", "")
    assert all(row.sums in ("fp32", "unknown", "-") for row in found.table)


@pytest.mark.parametrize("kind", ["math", "fused"])
def test_attention_by_a_kernel_is_no_departure(kind: str) -> None:
    found = of_twin("amp-bf16", attention=kind)
    assert (found.nearest, found.departures, found.attention) == ("amp-bf16", (), kind)


def test_the_other_optimizer_and_the_other_model() -> None:
    found = of_twin("fp16", model="mlp", optimizer="sgd", momentum=0.9)
    assert (found.nearest, found.departures, found.states.bytes_per_parameter) == ("fp16", (), 12.0)
    assert {state.kind for state in found.states.states} == {"weights", "grads", "master", "m"}


CLEAN = [
    (("llama", "fp32", "adamw"), "fp32", 16.0),
    (("llama", "amp-bf16", "adamw-foreach"), "amp-bf16", 16.0),
    (("gpt2", "amp-bf16", "adamw"), "amp-bf16", 16.0),
    (("bert", "amp-fp16", "adamw-fused"), "amp-fp16-cpu", 16.0),
    (("encoder", "amp-bf16", "sgd"), "amp-bf16", 12.0),
    (("resnet", "amp-fp16", "adamw", "", "accumulate", "clip"), "amp-fp16", 16.0),
    (("llama", "amp-bf16", "adamw", "checkpoint", "accumulate"), "amp-bf16", 16.0),
    (("qwen2", "bf16", "remainder"), "bf16-remainder", 14.0),
    (("llama", "bf16", "stochastic"), "bf16-sr", 12.0),
    (("encoder", "bf16", "masters"), "bf16", 16.0),
]


@pytest.mark.parametrize(("choices", "recipe", "size"), CLEAN, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_clean_loops_are_recipes_of_ours(choices: tuple[str, ...], recipe: str, size: float) -> None:
    found = of_clean(*choices)
    assert (found.nearest, found.departures, found.states.bytes_per_parameter) == (recipe, (), size), found.sentence


def test_operations_outside_our_table_are_named_as_such() -> None:
    found = of_clean("resnet", "amp-bf16", "adamw")
    rows = {row.operation: row for row in found.table}
    assert (rows["(convolution)"].inputs, rows["(convolution)"].output) == ("bf16", "bf16")
    assert "(native_batch_norm)" in rows
    assert any(line.startswith("(...)") for line in found.lines())


def test_lora_is_counted_per_trained_parameter() -> None:
    pytest.importorskip("peft", reason="LoRA")
    found = of_clean("llama", "amp-bf16", "adamw", "lora")
    assert found.sentence == "amp-bf16: 16 bytes per trained parameter"
    assert [state.format for state in found.states.of("frozen weights")] == ["fp32"]
    assert found.states.trained < found.states.of("frozen weights")[0].elements


def test_averaged_weights_are_a_state_that_no_recipe_has() -> None:
    found = of_clean("encoder", "fp32", "adamw", extras="clip schedule ema")
    assert found.sentence == "fp32: 16 bytes per parameter"
    assert [(s.format, s.elements) for s in found.states.of("EMA of the weights")] == [("fp32", found.states.trained)]


# ------------------------------------------------------------------------------------------- what differs


class LowMoments(BitsAdamW):
    """AdamW in FP32 arithmetic whose moments are stored in BF16."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in range(2))

    def moments(self, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return state["exp_avg"].float(), state["exp_avg_sq"].float()

    def store(self, state: dict[str, Any], m: Tensor, v: Tensor) -> None:
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)


def low_norm(norm: Any, x: Tensor) -> Tensor:
    """An RMS norm whose arithmetic is in BF16."""
    x = x.to(torch.bfloat16)
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return scaled * norm.weight.to(torch.bfloat16)


def changed_llama(which: str = "input_layernorm") -> Audit:
    pytest.importorskip("transformers", reason="Hugging Face models")
    run = CleanLoop("llama", "amp-bf16", "adamw", "", "", "").make()
    for name, module in run.model.named_modules():
        if name.endswith(which):
            module.forward = low_norm.__get__(module)
    run.optimizer = LowMoments(run.model.parameters())
    return audit_of(run)


def test_a_norm_and_moments_in_bf16_are_said_with_where_and_bytes() -> None:
    found = recipe_of(changed_llama())
    assert found.sentence == (
        "amp-bf16, but rmsnorm in BF16 at model.layers.*.input_layernorm, and moments in BF16: 12 bytes per parameter"
    )
    row = next(row for row in found.table if row.operation == "rmsnorm" and row.output == "bf16")
    assert row.sums == "16 bits" and row.count == 2
    data = json.loads(json.dumps(found.data(), allow_nan=False))
    assert data["differences"][0]["places"] == ["model.layers.*.input_layernorm"]


def test_one_layer_of_several_is_named_by_its_number() -> None:
    found = recipe_of(changed_llama("layers.1.input_layernorm"))
    assert found.departures[0].text == "rmsnorm in BF16 at model.layers.1.input_layernorm"


class Net(nn.Module):
    """Two linear layers with what stands between them in PyTorch's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.norm(self.embed(x)))))


def hand_made(dtype: torch.dtype, step: Any, optimizer: Any = torch.optim.AdamW, **options: Any) -> LoopRecipe:
    """The recipe of a loop by hand; step(net, batch, optimizer) makes a step."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    made = optimizer(net.parameters(), lr=1e-3)
    inner = made.optimizer if isinstance(made, Masters) else made
    with Audit(net, inner, steps=2, **options) as audit:
        for _ in range(2):
            step(net, torch.randint(50, (16, 16)), made)
            audit.step()
    return recipe_of(audit)


def plain_step(net: nn.Module, x: Tensor, optimizer: Any) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x).float().flatten(0, 1), x.flatten()).backward()
    optimizer.step()


def test_pure_bf16() -> None:
    found = hand_made(torch.bfloat16, plain_step)
    assert found.sentence == "pure-bf16: 8 bytes per parameter"
    assert next(row for row in found.table if row.operation == "linear.dw").output == "bf16"


def test_the_loss_in_16_bits_is_a_departure() -> None:
    def step(net: nn.Module, x: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()

    found = hand_made(torch.bfloat16, step)
    assert found.sentence.startswith("pure-bf16, but cross_entropy that gives BF16 at the model: 8 bytes"), found.sentence


def test_masters_by_hand() -> None:
    def step(net: nn.Module, x: Tensor, masters: Masters) -> None:
        F.cross_entropy(net(x).float().flatten(0, 1), x.flatten()).backward()
        masters.receive()
        masters.optimizer.step()
        masters.send()

    found = hand_made(torch.bfloat16, step, Masters)
    assert found.sentence == "bf16: 16 bytes per parameter"
    assert [state.encoding for state in found.states.of("master")] == ["fp32"]


def test_gradients_that_live_on_in_fp32_are_a_state() -> None:
    """As Megatron's main_grad: the gradients of two micro-batches are added in FP32, and BF16 ones are kept no longer."""
    mains: dict[Tensor, Tensor] = {}

    def step(net: nn.Module, x: Tensor, masters: Masters) -> None:
        for part in x.split(8):
            F.cross_entropy(net(part).float().flatten(0, 1), part.flatten()).backward()
            for p in net.parameters():
                mains.setdefault(p, torch.zeros_like(p, dtype=torch.float32)).add_(p.grad)
                p.grad = None
        for p, master in zip(masters.parameters, masters.copies, strict=True):
            master.grad = mains[p]
        masters.optimizer.step()
        for main in mains.values():
            main.zero_()
        masters.send()

    found = hand_made(torch.bfloat16, step, Masters)
    assert [(s.encoding, s.elements) for s in found.states.of("main_grads")] == [("fp32", found.states.trained)]
    assert "copy of the gradients in FP32" in found.sentence or found.nearest == "megatron-bf16", found.sentence


def test_micro_batches_whose_gradients_are_added_in_bf16_are_a_departure() -> None:
    def step(net: nn.Module, x: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        for part in x.split(8):
            (F.cross_entropy(net(part).float().flatten(0, 1), part.flatten()) / 2).backward()
        optimizer.step()

    found = hand_made(torch.bfloat16, step)
    assert found.sentence == "pure-bf16, but gradients of 2 micro-batches summed in BF16: 8 bytes per parameter"


SCALER = torch.amp.GradScaler("cpu", growth_interval=500, growth_factor=4.0)


def scaled_step(net: nn.Module, x: Tensor, optimizer: Any) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(net(x).float().flatten(0, 1), x.flatten())
    SCALER.scale(loss).backward()
    SCALER.step(optimizer)
    SCALER.update()


def test_the_rule_of_a_dynamic_loss_scale_is_read_off_the_scaler() -> None:
    found = hand_made(torch.float32, scaled_step, scaler=SCALER)
    assert found.nearest.startswith("amp-fp16") and found.departures == ()
    assert (found.scale.growth_factor, found.scale.backoff_factor, found.scale.growth_interval) == (4.0, 0.5, 500)
    assert found.scale.text == "dynamic, 65536: times 4 after 500 good steps in a row, times 0.5 at an overflow"


def test_fp16_without_and_with_a_constant_loss_scale() -> None:
    def step(net: nn.Module, x: Tensor, optimizer: Any, scale: float = 1.0) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(net(x).float().flatten(0, 1), x.flatten())
        (loss * scale if scale != 1 else loss).backward()
        for p in net.parameters() if scale != 1 else ():
            p.grad.div_(scale)
        optimizer.step()

    without = hand_made(torch.float32, step)
    assert without.departures[-1].text == "no loss scale" and without.nearest.startswith("amp-fp16")
    constant = hand_made(torch.float32, lambda *args: step(*args, scale=512.0))
    assert constant.departures[-1].text == "a static loss scale of 512" and constant.distance == 0.5


# ------------------------------------------------------------------------------------------- sums, words


@pytest.mark.parametrize(
    ("dtype", "change", "sums"),
    [
        (torch.bfloat16, {"equal": 0.5, "expected": 0.999, "judged": 2000}, "sums in 16 bits"),
        (torch.bfloat16, {"equal": 0.998, "expected": 0.999, "judged": 2000}, None),
        (torch.bfloat16, {"equal": 0.2, "expected": 0.999, "judged": 20}, None),
        (torch.float32, {"bits": 11.1}, "sums in TF32"),
        (torch.float32, {"bits": 8.1}, "sums in BF16"),
        (torch.float32, {"bits": 21.5}, None),
    ],
)
def test_the_precision_of_sums_is_read_off_the_verdicts(dtype: torch.dtype, change: dict[str, Any], sums: str | None) -> None:
    torch.manual_seed(0)
    net = Net().to(dtype)
    optimizer = torch.optim.AdamW(net.parameters())
    with Audit(net, optimizer, steps=1) as audit:
        plain_step(net, torch.randint(50, (16, 16)), optimizer)
        audit.step()
    view = audit._view
    assert view is not None
    for o in view.step.operations:
        if o.name.startswith("aten.addmm"):
            o.verdicts = tuple(replace(verdict, **change) for verdict in o.verdicts)
    found = loop_recipe.recipe_of(view)
    assert [d.text for d in found.departures] == ([f"linear.y that {sums} at up and down"] if sums else [])


def test_folded_names() -> None:
    among = [f"h.{i}.norm_{k}" for i in range(4) for k in (1, 2)] + ["norm"]
    assert folded(among, among) == ["h.*.norm_1", "h.*.norm_2", "norm"]
    assert folded(["h.0.norm_1", "h.3.norm_1", "norm"], among) == ["h.{0,3}.norm_1", "norm"]
    assert folded(["h.2.norm_2"], among) == ["h.2.norm_2"]
    assert folded(["a.0", "a.0"], ["a.0"]) == ["a.0"]
    assert folded(["a.0.b.0", "a.1.b.0"], ["a.0.b.0", "a.1.b.0"]) == ["a.*.b.0"]


def test_every_recipe_has_a_distance_to_every_loop_and_only_its_own_is_zero() -> None:
    found = of_twin("bf16")
    assert found.distance == 0.0 and found.also == ()
    assert len(found.lines()) > 10 and found.lines()[0] == found.sentence


def test_there_is_no_recipe_before_a_step_has_ended() -> None:
    net = Net()
    with Audit(net, torch.optim.SGD(net.parameters())) as audit:
        assert audit.recipe() is None
        net(torch.zeros(1, 1, dtype=torch.int64))
    assert audit.recipe() is None


def test_rows_leave_recomputed_operations_out() -> None:
    pytest.importorskip("transformers", reason="Hugging Face models")
    counts = []
    for wrap in ("", "checkpoint"):
        audit = audit_of(CleanLoop("llama", "amp-bf16", "adamw", wrap, "", "").make())
        assert audit._view is not None
        counts.append(sum(row.key == "linear.y" for row in rows_of(audit._view.step)))
    assert counts[0] == counts[1] == 2 * 7 + 1
