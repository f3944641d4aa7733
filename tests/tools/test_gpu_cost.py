"""The predicted cost of a step on a GPU: its sums against closed forms, and its calls against those that the real CuPy makes.

Counted is where real CuPy runs on the CPU (CUPY_ON_CPU): kernels by name, products by size, copies. The bytes of our own
kernels are those of the arrays that they are handed. Nothing here says anything of times.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from script_loader import load_script

from refimpl.backends.choose import get_backend
from refimpl.backends.cupy.launch import Kernels
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.numerics.formats import dtype_of
from refimpl.optim.layout import GRAIN
from refimpl.precision.recipes import RECIPES, get_recipe
from refimpl.tools.bench.gpu_cost import (
    BATCH,
    CLEAR,
    COPY,
    GEMM,
    GPT2,
    GPUS,
    Line,
    Prediction,
    Product,
    predict,
    show,
    step_calls,
    text,
)
from refimpl.tools.memory.tape import forward
from refimpl.training.activation_memory import gpt_activations
from refimpl.training.config import Config
from refimpl.training.setup import start

H100 = GPUS["h100"]
LOW = ("fp32", "fp16", "bf16")
SMALL = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=500)


def bf16(config: GPTConfig = GPT2, batch_size: int = 8) -> Prediction:
    return predict(config, get_recipe("bf16"), batch_size)


def of(prediction: Prediction, name: str) -> list[Line]:
    return [line for line in prediction.lines if line.name == name]


# ------------------------------------------------------------------------------------------------ sums, without CuPy


def test_flops_are_6_for_each_weight_and_token_and_12_for_attention() -> None:
    """Matrices: forward and two products backward, 2 each. Attention: 2 and 4 products of 2 T C for each token and position."""
    for config, batch in ((GPT2, 8), (SMALL, 3)):
        C, T, R = config.n_embd, config.block_size, batch * config.block_size
        layer = 6 * (12 * C * C) * R + 12 * R * T * C
        assert bf16(config, batch).flops == config.n_layer * layer + 6 * config.vocab_size * C * R


@pytest.mark.parametrize("recipe", LOW)
def test_a_layer_takes_18_products_and_at_most_45_launches(recipe: str) -> None:
    def calls(n_layer: int) -> Counter[str]:
        lines = step_calls(replace(GPT2, n_layer=n_layer), get_recipe(recipe), 8)
        return Counter(gemm=sum(x.times for x in lines if x.name == GEMM), launch=sum(x.launches for x in lines))

    layer = calls(12) - calls(11)
    assert layer["gemm"] == 18 and layer["launch"] <= 45
    assert calls(2) - calls(1) == layer  # and not a function of the depth


@pytest.mark.parametrize(("recipe", "adamw", "down", "norm", "buffer"), [("bf16", 26, 6, 2, 6), ("fp32", 28, 0, 4, 12)])
def test_bytes_a_parameter_of_steps_1_3_and_4(recipe: str, adamw: int, down: int, norm: int, buffer: int) -> None:
    """AdamW reads and writes w, m, v and reads g; the copy down is 4 + 2; the buffer is cleared, read from and written to."""
    p = predict(GPT2, get_recipe(recipe), 8)
    N = gpt_model(GPT2).n_params
    assert N == 85_056_000 + 768 * (256 + 1024)  # the layers, and both tables
    parts = {part: sum(x.nbytes for x in p.lines if x.part == part) for part in {x.part for x in p.lines}}
    assert parts["AdamW"] == adamw * N and parts.get("weights down", 0) == down * N
    assert parts["gradients to the flat buffer"] == buffer * N
    assert parts["check and norm"] == norm * N + 8 * math.ceil(N / GRAIN)  # sums of grains, written and read


def test_time_is_the_roofline_and_the_gaps() -> None:
    product = Line("", GEMM, 2, 10, product=Product(1000, 1000, 1000))
    assert product.flops == 4e9 and product.launches == 0
    assert product.seconds(H100, "bf16") == pytest.approx(4e9 / 989e12 + 2 * H100.gap)
    assert product.seconds(H100, "fp32") == pytest.approx(4e9 / 67e12 + 2 * H100.gap)
    reads = Line("", "mean", 1, 67_000_000, blocks=33)
    assert reads.seconds(H100, "bf16") == pytest.approx(20e-6 + H100.gap)
    assert reads.seconds(H100, "bf16", fair=True) == pytest.approx(80e-6 + H100.gap)  # 33 blocks on 132 multiprocessors
    assert replace(reads, blocks=500).seconds(H100, "bf16", fair=True) == reads.seconds(H100, "bf16")


def test_a_step_takes_as_long_as_the_slower_of_device_and_host() -> None:
    large, small = bf16(), bf16(SMALL, 1)
    assert large.seconds() == large.device_seconds() > large.host_seconds == large.calls * H100.host
    assert small.seconds() == small.host_seconds > small.device_seconds()
    assert large.seconds(fair=True) > large.seconds()
    assert large.utilization() == pytest.approx(large.flops / large.seconds() / 989e12)


def test_other_recipes_are_refused() -> None:
    """Under autocast attention runs by its definition; so does AdamW where the moments have 16 bits."""
    for name in set(RECIPES) - {*LOW}:
        with pytest.raises(UsageError, match="fp32, fp16, bf16"):
            step_calls(SMALL, get_recipe(name), 1)


# ------------------------------------------------------------------------------------------------ as it is printed


def test_the_script_prints_it_without_cupy_and_says_what_it_is() -> None:
    code = "import sys; sys.modules['cupy'] = None; sys.argv = ['x', '--predict', '--recipes', 'bf16,fp16']; " \
           "import runpy; runpy.run_path('scripts/gpu_check.py', run_name='__main__')"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("A PREDICTION") and done.stdout.count("tokens/s") == 4


def test_the_parts_of_the_table_sum_to_its_last_row(capsys: pytest.CaptureFixture[str]) -> None:
    p = bf16()
    assert show(["bf16"], "h100") == 0 and text(p) in capsys.readouterr().out
    rows = [line.split() for line in text(p).splitlines()]
    last = next(row for row in rows if row[:1] == ["total"])
    launches, gemms, copies, flops, nbytes, ms, fair = (float(cell.replace(",", "")) for cell in last[1:])
    assert (launches, gemms, copies) == (sum(x.launches for x in p.lines), 219, 148 + 1)
    assert launches + gemms + copies == p.calls
    assert flops == round(p.flops / 1e9) and nbytes == round(sum(x.nbytes for x in p.lines) / 1e6)
    assert (ms, fair) == tuple(round(1e3 * p.device_seconds(x), 2) for x in (False, True))


def test_the_page_shows_what_is_printed() -> None:
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    printed = [line for line in text(predict(GPT2, get_recipe("bf16"), BATCH, GPUS["h200"])).splitlines() if line]
    assert [line for line in printed if f"    {line}" not in page.splitlines()] == []


def test_flags_of_the_check_do_not_belong_to_a_prediction() -> None:
    script = load_script("gpu_check")
    with pytest.raises(UsageError, match="--steps does not apply"):
        script.run(vars(script.parser().parse_args(["--predict", "--steps", "3"])))
    with pytest.raises(UsageError, match="unknown GPU 'b200': choose one of h100, h200"):
        script.run(vars(script.parser().parse_args(["--predict", "--gpu", "b200"])))
    with pytest.raises(UsageError, match="--gpu belongs to --predict"):
        script.run(vars(script.parser().parse_args(["--gpu", "h200"])))
    with pytest.raises(UsageError, match="unknown recipe"):
        script.run(vars(script.parser().parse_args(["--predict", "--recipes", "none"])))


# ------------------------------------------------------------------------------------------------ against real CuPy

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 48, "block_size": 16, "batch_size": 3}
OTHERS = (
    {"n_layer": 1},
    {"n_layer": 3},
    {"n_head": 1},
    {"batch_size": 1},
    {"n_head": 1, "batch_size": 1},
    {"n_head": 4, "n_embd": 20},
)
CASES = [(recipe, {**TINY, **other}) for recipe in LOW for other in ({}, {"n_layer": 3})] + [
    ("bf16", {**TINY, **other}) for other in OTHERS
]


def names(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(str(size) for size in case[1].values())])


def running(recipe: str, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """A run on the CuPy backend and a batch that lies on the device already, as far as its third step."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("CuPy is installed, but no device answers")
    training = start(Config.of({**sizes, "recipe": recipe, "steps": 5, "backend": "cupy"}))
    rng = np.random.default_rng(0)
    shape = sizes["batch_size"], sizes["block_size"]
    batch = tuple(training.state.backend.from_host(rng.integers(0, 256, shape)) for _ in range(2))
    for _ in range(2):
        training.step([batch])
    return training, batch


@pytest.fixture
def counter() -> Iterator[Any]:
    """The tool's counters. On a GPU nobody counts."""
    if "CUPY_ON_CPU" not in os.environ:
        pytest.skip("calls are counted where real CuPy runs on the CPU only: CUPY_ON_CPU is not set")
    yield importlib.import_module("cupy_on_cpu")


def counted(counter: Any, recipe: str, sizes: dict[str, Any]) -> Counter[Any]:
    """The calls of a step: kernels by name, products by formats and sizes, everything else by its kind."""
    training, batch = running(recipe, sizes)
    counter.reset()
    training.step([batch])
    calls: Counter[Any] = Counter(counter.kernels())
    for g in counter.gemms():  # cuBLAS counts columns first: its m is our N
        calls[Product(g["n"], g["m"], g["k"], g["batch"]), g["a"], g["b"], g["c"], g["compute"]] += 1
    stats = counter.stats()
    assert sum(calls.values()) == stats["launch"] + stats["gemm"]
    calls.update({COPY: stats["d2d"], CLEAR: stats["memset"]})
    calls.update({kind: stats[kind] for kind in ("h2d", "d2h", "sync", "malloc", "free")})
    return +calls


def predicted(lines: Sequence[Line], fmt: str) -> Counter[Any]:
    """The same of a ledger."""
    calls: Counter[Any] = Counter()
    for line in lines:
        formats = [dtype_of(name).name for name in (fmt, fmt, line.result or fmt)]
        calls[(line.product, *formats, "32F") if line.product else line.name] += line.times
    return calls


def ledger(recipe: str, sizes: dict[str, Any]) -> list[Line]:
    return step_calls(config_of(sizes), get_recipe(recipe), sizes["batch_size"])


def config_of(sizes: dict[str, Any]) -> GPTConfig:
    return GPTConfig(**{name: size for name, size in sizes.items() if name != "batch_size"})


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=names)
def test_every_call_of_a_step_is_predicted(case: tuple[str, dict[str, Any]], counter: Any) -> None:
    recipe, sizes = case
    assert counted(counter, recipe, sizes) == predicted(ledger(recipe, sizes), recipe)


WRONG: dict[str, Callable[[list[Line]], list[Line]]] = {
    "a line is missing": lambda lines: [x for x in lines if x.part != "gelu"],
    "one copy too many": lambda lines: [replace(x, times=x.times + (x.name == COPY)) for x in lines],
    "a product the other way round": lambda lines: [
        replace(x, product=x.product and Product(x.product.N, x.product.M, *x.product[2:])) for x in lines
    ],
    "another format": lambda lines: [replace(x, name=x.name.replace("bfloat16", "float16")) for x in lines],
}


@pytest.mark.gpu
def test_a_wrong_prediction_is_found(counter: Any) -> None:
    truth, lines = counted(counter, "bf16", TINY), ledger("bf16", TINY)
    assert truth == predicted(lines, "bf16")
    for name, spoil in WRONG.items():
        assert predicted(spoil(list(lines)), "bf16") != truth, name
    for other in ({"n_layer": 3}, {"n_embd": 32}, {"block_size": 8}, {"n_head": 4}):
        assert predicted(ledger("bf16", {**TINY, **other}), "bf16") != truth, other


@pytest.mark.gpu
def test_a_backend_that_costs_more_is_found(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU without its fast version takes a launch for each operation of the formula."""
    ops = importlib.import_module("refimpl.backends.cupy.ops").CUPY_OPS
    monkeypatch.setattr("refimpl.backends.cupy.ops.CUPY_OPS", {k: op for k, op in ops.items() if k != "gelu_tanh"})
    assert counted(counter, "bf16", TINY).total() > predicted(ledger("bf16", TINY), "bf16").total() + 20


# ------------------------------------------------------------------------------------------------ bytes of our kernels

LEFT_OUT = {
    "inverse_scale", "clip", "scalars", "found_inf", "decayed_start", "decayed_stop", "partial_bad", "norm", "dloss",
    "counted", ("cross_entropy_mean", "loss"),
}  # fmt: skip
TWICE = {("adamw", "w"), ("adamw", "m"), ("adamw", "v"), ("cross_entropy_forward", "logits")}
SEEN = {("causal_softmax_forward", "S"), ("causal_softmax_backward", "P"), ("causal_softmax_backward", "dP")}


class Recorded(Kernels):
    """The kernels; of each launch it keeps the bytes that its arrays say it moves, and its number of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, fmt: str) -> Any:
        return Recording(self, super().__call__(fmt))


class Recording:
    """The kernels of one format."""

    def __init__(self, kernels: Recorded, module: Any) -> None:
        self.kernels, self.module = kernels, module

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any) -> None:
            nbytes = 0
            for argument, x in zip(self.kernels.declarations[name].arguments, arguments, strict=True):
                place = (name, argument.name)
                if not argument.pointer or place in LEFT_OUT or argument.name in LEFT_OUT:
                    continue
                queries = x.shape[-1]
                nbytes += (
                    x.nbytes * (queries + 1) // (2 * queries) if place in SEEN else x.nbytes * (2 if place in TWICE else 1)
                )
            self.kernels.seen.append((name, nbytes, math.prod(grid)))
            getattr(self.module, name)(grid, block, *arguments)

        return launch


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", LOW)
def test_bytes_and_blocks_of_our_kernels_are_those_of_their_arguments(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    recorded = Recorded()
    backend = replace(get_backend("cupy"), kernels=recorded)
    monkeypatch.setattr(Config, "make_backend", lambda self: backend)
    training, batch = running(recipe, TINY)
    recorded.seen.clear()
    training.step([batch])
    ours: Counter[Any] = Counter()
    for line in ledger(recipe, TINY):
        if line.name in recorded.declarations:
            ours[line.name, line.nbytes // line.times, line.blocks] += line.times
    of_llama = ("silu_", "swiglu_", "rope", "llama_rmsnorm_", "wide_causal_softmax_")
    assert {name for name, *_ in ours} == {name for name in recorded.declarations if not name.startswith(of_llama)}
    assert ours == Counter(recorded.seen)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", LOW)
def test_the_tape_holds_what_the_prediction_says(recipe: str) -> None:
    """What fast versions save differs from what definitions save, but not in bytes."""
    training, batch = running(recipe, TINY)
    held: dict[int, int] = {}

    def keep(saved: Any) -> None:
        if isinstance(saved, tuple | list):
            for part in saved:
                keep(part)
        elif hasattr(saved, "nbytes"):
            whole = saved if saved.base is None else saved.base
            held[whole.data.ptr] = whole.nbytes

    for entry in forward(training, batch).entries:
        keep(entry.saved)
    expected = gpt_activations(config_of(TINY), get_recipe(recipe), TINY["batch_size"], TINY["block_size"])
    assert sum(held.values()) == sum(term.nbytes for term in expected)
