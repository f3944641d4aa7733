"""--checkpointing full in whole runs: the same bits in every recipe, resumed as it likes, on ranks, and where a step fails."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays import same_bits
from overflow import overflow_always
from paths import SCRIPTS
from progress_bars import NoBar
from rank_runs import on_ranks
from recipe_lists import MECHANISMS, others_slow
from strict_backend import STRICT

from refimpl.errors import UsageError
from refimpl.nn.checkpointing import Block
from refimpl.precision.recipes import RECIPES
from refimpl.training.checkpoint import load
from refimpl.training.config import Config
from refimpl.training.non_finite import find_origin
from refimpl.training.run import train
from refimpl.training.run_folder import CHECKPOINT, METRICS, open_folder, prepare_folder
from refimpl.training.setup import start
from refimpl.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("without_pictures", "one_blas_thread")
SMALL: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "steps": 3, "warmup": 1, "lr": 1e-2,
}  # fmt: skip
BATCHES = [tuple(np.random.default_rng(i).integers(0, 256, (2, 4, 16))) for i in range(2)]


def trained(recipe: str, checkpointing: str, **more: Any) -> tuple[list[Any], dict[str, Any]]:
    """The results of three steps of two micro-batches, and all arrays of the run afterwards."""
    config = Config.of({**SMALL, "recipe": recipe, "checkpointing": checkpointing, "grad_accum": 2, **more})
    training = start(config)
    results = [training.step(BATCHES) for _ in range(3)]
    numbers = [(float(r.loss), float(r.grad_norm), float(r.loss_scale), bool(r.skipped)) for r in results]
    return numbers, {**training.state.buffers, **training.run.scales.arrays()}


@pytest.mark.parametrize("recipe", others_slow(RECIPES, plain=MECHANISMS))
def test_three_steps_have_the_same_bits_in_every_recipe(recipe: str) -> None:
    """Losses, norms, every state, and the scales and largest magnitudes that delayed scaling remembers."""
    (numbers, arrays), (again, others) = (trained(recipe, how) for how in ("none", "full"))
    assert repr(numbers) == repr(again) and not all(skipped for *_, skipped in numbers)
    assert arrays.keys() == others.keys()
    assert [name for name, x in arrays.items() if not same_bits(x, others[name])] == []


OF_LLAMA = ("fp32", "fp16", "amp-fp16-cpu", "fp8-delayed", "nvfp4")
"""Without rounding, with it, under autocast, and with products that remember scales or draw random bits."""


@pytest.mark.parametrize("recipe", others_slow(RECIPES, plain=OF_LLAMA))
def test_so_has_llama_with_all_that_its_family_has(recipe: str) -> None:
    """Queries and keys are normalized, rotated by arrays that are no parameters, and shared by groups of heads."""
    sizes = {"model": "llama", "n_kv_head": 1, "head_dim": 16, "qk_norm": True, "qkv_bias": True}
    (numbers, arrays), (again, others) = (trained(recipe, how, **sizes) for how in ("none", "full"))
    assert repr(numbers) == repr(again) and not all(skipped for *_, skipped in numbers)
    assert [name for name, x in arrays.items() if not same_bits(x, others[name])] == []


@pytest.mark.parametrize("more", [{"backend": "reference"}, {"attention": "fused"}, {"attention": "math"}, {"bias": False}])
def test_so_they_have_with_other_operations(more: dict[str, Any]) -> None:
    (numbers, arrays), (again, others) = (trained("amp-bf16", how, **more) for how in ("none", "full"))
    assert numbers == again and all(same_bits(x, others[name]) for name, x in arrays.items())


def test_on_a_device() -> None:
    found = []
    for how in ("none", "full"):
        training = Config.of({**SMALL, "grad_accum": 2, "checkpointing": how}).make_training(STRICT)
        training.state.load_weights(training.model.initial_weights(np.random.default_rng(0)))
        training.step([training.model.batch_on(STRICT, *batch) for batch in BATCHES])
        found.append(STRICT.to_host(training.state.master))
    assert same_bits(*found)


@pytest.mark.parametrize(
    ("stage", "recipe"), [(0, "fp16"), (1, "fp8-delayed"), (2, "amp-fp16"), (3, "bf16-sr"), (3, "fp8-delayed")]
)
def test_on_ranks_at_every_stage_of_zero(stage: int, recipe: str) -> None:
    """With as many bytes exchanged: stage 3 fetches the weights of a block once for all of its backward."""
    plain, checkpointed = (
        on_ranks(Config.of({**SMALL, "recipe": recipe, "zero": stage, "checkpointing": how}), 2)[1] for how in ("none", "full")
    )
    assert checkpointed.same_as(plain) and checkpointed.received == plain.received


SMOLLM2_135M = """
from refimpl.parity.trace import batches_of
from refimpl.tools.memory.measure import process_memory
from refimpl.training.config import Config
from refimpl.training.setup import start

sizes = dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, head_dim=64, ffn_dim=1536, vocab_size=49152, block_size=512)
config = Config.of(dict(model="llama", recipe="fp32", batch_size=2, steps=2, checkpointing="full", **sizes))
training = start(config)
for batches in batches_of(config, None):
    training.step(batches)
print(training.model.n_params, process_memory()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_model_of_the_sizes_of_smollm2_135m_trains_below_4_gb() -> None:
    """On 2 x 512 tokens, in FP32, with Adam: the resident memory of the process at its peak, 4.5 GB without checkpointing."""
    done = subprocess.run([sys.executable, "-c", SMOLLM2_135M], capture_output=True, text=True, check=True)
    n_params, peak = map(int, done.stdout.split())
    assert n_params == 134_515_008 and 16 * n_params < peak < 4e9


# ------------------------------------------------------------------------------------------------------------ runs in folders


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    return str(path)


def flags(text: str, **more: Any) -> dict[str, Any]:
    return {**SMALL, "steps": 4, "eval_batches": 1, "sample_bytes": 0, "log_every": 1, "data": text, **more}


@pytest.mark.parametrize(("recipe", "first"), [("fp16", "full"), ("fp8-delayed", "none")])
def test_a_run_goes_on_with_the_other_setting_to_the_same_bytes(
    recipe: str, first: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refimpl.training.evaluate.WHOLE_TEXT", 0)
    given, whole, parts = flags(text, recipe=recipe), tmp_path / "whole", tmp_path / "parts"
    assert train(given, whole, False, False, None) == 0
    config, _ = prepare_folder({**given, "checkpointing": first}, parts, False, False)
    trainer = Trainer(config, parts)
    open_folder(config, parts)
    assert not trainer.train(NoBar(stop_at=2)) and load(parts / CHECKPOINT)[1]["progress"]["step"] == 2
    other = "none" if first == "full" else "full"
    assert train({"checkpointing": other}, parts, True, False, None) == 0
    assert (parts / CHECKPOINT).read_bytes() == (whole / CHECKPOINT).read_bytes()
    assert f'"checkpointing": "{other}"' in (parts / "config.json").read_text()


def test_a_killed_run_goes_on_to_the_same_bytes(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with `full` is killed at some moment after its first checkpoint; what goes on does without it."""
    monkeypatch.setattr("refimpl.training.evaluate.WHOLE_TEXT", 0)
    given = flags(text, steps=20000, warmup=1, eval_every=1)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**given, "checkpointing": "full"}.items()]
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    run = subprocess.Popen([sys.executable, SCRIPTS / "train.py", *words, f"--out={folder}"], stdout=-3, stderr=-3)
    while not (folder / CHECKPOINT).exists():
        assert run.poll() is None
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    steps = load(folder / CHECKPOINT)[1]["progress"]["step"] + 2
    assert train({"steps": steps, "checkpointing": "none"}, folder, True, False, None) == 0
    # the schedule of the killed run was that of 20000 steps, so the other is stopped and planned again at the same step
    config, _ = prepare_folder(given, whole, False, False)
    trainer = Trainer(config, whole)
    open_folder(config, whole)
    assert not trainer.train(NoBar(stop_at=steps - 2))
    assert train({"steps": steps}, whole, True, False, None) == 0
    assert (folder / CHECKPOINT).read_bytes() == (whole / CHECKPOINT).read_bytes()
    assert len((folder / METRICS).read_text().splitlines()) == len((whole / METRICS).read_text().splitlines())


# --------------------------------------------------------------------------------------------------------- where a step fails


@pytest.mark.parametrize("kind", ["weight", "activation", "backward"])
def test_the_origin_of_an_infinity_is_told_as_without_checkpointing(kind: str) -> None:
    origins = []
    for how in ("none", "full"):
        training = start(Config.of({**SMALL, "grad_accum": 2, "recipe": "fp16", "checkpointing": how}))
        masters = training.state.layout.views(training.state.values(training.state.master_kind))
        if kind == "weight":
            masters["transformer.h.1.mlp.c_fc.weight"][3, 4] = math.nan
        elif kind == "activation":
            masters["transformer.h.1.mlp.c_fc.weight"][...] = 6e4 * np.sign(masters["transformer.h.1.mlp.c_fc.weight"])
        else:
            overflow_always(training)
        assert training.step(BATCHES).skipped
        origins.append(find_origin(training, BATCHES, training.loss_scale.scale))
    assert origins[0] == origins[1] and origins[0].stage == {"weight": "parameter", "activation": "forward"}.get(kind, kind)


def test_a_block_that_is_computed_otherwise_stops_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of this file: with one input changed in its last bit, each recipe's equality would be lost."""
    computed = Block._compute_again

    def spoiled(self: Block) -> None:
        self.kept = {node: np.nextafter(x, np.float16(0)) for node, x in self.kept.items()}
        computed(self)

    monkeypatch.setattr(Block, "_compute_again", spoiled)
    with pytest.raises(RuntimeError, match=r"transformer\.h\.1 has another output when recomputed"):
        trained("fp16", "full")
    monkeypatch.setattr(Block, "_sum", lambda self, x: 0)  # nor would anything but the numbers show it
    assert trained("fp16", "full")[0] != trained("fp16", "none")[0]


def test_what_is_no_checkpointing_is_refused() -> None:
    for given, message in (
        ({"checkpointing": "half"}, "unknown checkpointing 'half': choose one of none, full"),
        ({"checkpointing": "full", "model": "mlp"}, "--checkpointing is for models with blocks: the layers of the mlp"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            Config.of(given)
        assert "\n" not in str(error.value)
