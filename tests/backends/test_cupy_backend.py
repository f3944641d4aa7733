"""The CuPy backend as a whole, with real CuPy: on a GPU, or on a CPU by a tool that says so in CUPY_ON_CPU.

Whole runs are judged step by step from their own values, by the bounds derived in refimpl/parity/tolerances.py. Launches,
copies and waits are counted where the tool counts them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import encoding_cases
import numpy as np
import pytest
from progress_bars import NoBar

import refimpl.optim.layout
from refimpl.backends.choose import get_backend
from refimpl.backends.cupy.launch import Kernels, source
from refimpl.backends.numpy.backend import NUMPY
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.compensated import merge, split
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.numerics.philox import random_bits
from refimpl.numerics.stochastic_rounding import stochastic_round
from refimpl.optim.adamw import AdamW
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.parity.judge import judge_trace
from refimpl.parity.trace import Trace, record
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.tools.bench.gpu_check import OnDevice, no_waits, speed, train_both
from refimpl.training.config import Config
from refimpl.training.setup import INIT, generator, start
from refimpl.training.trainer import Trainer

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cupy.cuda.is_available(), reason="CuPy is installed, but no device answers"),
]

Array = Any
TINY: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "lr": 1e-3, "warmup": 2, "backend": "cupy",
}  # fmt: skip
RECIPES = ("fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu", "pure-fp16", "pure-bf16")
LOW = ("fp32", "fp16", "bf16")


def on_device(x: np.ndarray) -> Array:
    return get_backend("cupy").from_host(x)


def on_host(x: Array) -> np.ndarray:
    return get_backend("cupy").to_host(x)


# ---------------------------------------------------------------------------------------------------------- products


def layouts(x: np.ndarray) -> dict[str, Callable[[], Array]]:
    """The same matrices on the device, laid out in several ways."""
    wide = np.concatenate([x, x], -1)
    return {
        "C order": lambda: on_device(x),
        "transposed": lambda: on_device(np.ascontiguousarray(x.swapaxes(-1, -2))).swapaxes(-1, -2),
        "columns of wider rows": lambda: on_device(wide)[..., : x.shape[-1]],
        "every other column": lambda: on_device(np.repeat(x, 2, -1))[..., ::2],
    }


def product_bound(a: np.ndarray, b: np.ndarray, fmt: str) -> np.ndarray:
    """Any order of an FP32 sum of K products that are rounded errs by K u sum|a b| at most; then one rounding to fmt."""
    magnitude = np.abs(a) @ np.abs(b)
    sums = a.shape[-1] * 2.0**-24 * magnitude
    return 1.01 * sums + FORMATS[fmt].eps / 2 * (magnitude + sums) + FORMATS[fmt].smallest_subnormal


@pytest.mark.parametrize("fmt", LOW)
@pytest.mark.parametrize(
    "shapes", [((7, 5), (5, 9)), ((2, 3, 4, 8), (2, 3, 8, 6)), ((3, 1, 5), (3, 5, 1)), ((1, 1), (1, 1))], ids=str
)
def test_a_product_in_every_layout(shapes: tuple[tuple[int, ...], tuple[int, ...]], fmt: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (cast(rng.standard_normal(shape), fmt) for shape in shapes)
    exact_a, exact_b = widen(a, "fp64"), widen(b, "fp64")
    backend: Any = get_backend("cupy")
    for out in {fmt, "fp32"}:
        results = []
        for left in layouts(a).values():
            for right in layouts(b).values():
                y = backend.product(left(), right(), out)
                assert format_of(y) == out
                error = np.abs(widen(on_host(y), "fp64") - exact_a @ exact_b)
                assert (error <= product_bound(exact_a, exact_b, out)).all(), (error.max(), out)
                results.append(on_host(y).tobytes())
        if "CUPY_ON_CPU" in os.environ:  # one order of the sums, whatever the layout
            assert len(set(results)) == 1


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_a_bias_is_added_before_the_one_rounding(fmt: str) -> None:
    """A linear layer on whole numbers, whose sums are exact in any order, and eighths as bias: only one result is right.

    On an H200 cuBLAS rounded the sums to 16 bits before it added a bias (beta = 1): in a layer of this size, not in one of a
    few elements.
    """
    rng = np.random.default_rng(0)
    x, w = (cast(rng.integers(-40, 41, shape).astype(np.float32), fmt) for shape in ((256, 384), (512, 384)))
    b = cast(rng.integers(-8, 9, 512).astype(np.float32) / 8, fmt)
    p = Run(get_recipe(fmt).policy, get_backend("cupy")).precision("linear", "here")
    y, _ = get_backend("cupy").ops["linear"].forward(on_device(x), on_device(w), on_device(b), p=p)
    sums = widen(x) @ widen(w).T
    right, rounded_early = cast(sums + widen(b), fmt), cast(widen(cast(sums, fmt)) + widen(b), fmt)
    assert np.array_equal(on_host(y), right)
    assert (right != rounded_early).mean() > 0.01


def test_no_product_adds_parts_of_a_sum_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuBLAS does with the setting only a GPU shows; here, that it is made before the product."""
    cublas, calls = importlib.import_module("cupy_backends.cuda.libs.cublas"), list[str]()
    for name in ("setMathMode", "gemmStridedBatchedEx"):
        real = getattr(cublas, name)

        def call(*arguments: Any, name: str = name, real: Callable[..., None] = real) -> None:
            calls.append(f"{name} {arguments[1]}" if name == "setMathMode" else name)
            real(*arguments)

        monkeypatch.setattr(cublas, name, call)
    get_backend("cupy").matmul(on_device(np.ones((4, 4), np.float16)), on_device(np.ones((4, 4), np.float16)), "fp32")
    assert calls == ["setMathMode 16", "gemmStridedBatchedEx"]


def test_products_without_elements() -> None:
    backend: Any = get_backend("cupy")
    for shapes in (((0, 4), (4, 3)), ((2, 0), (0, 3)), ((0, 2, 3), (0, 3, 2))):
        a, b = (on_device(np.ones(shape, np.float32)) for shape in shapes)
        expected = np.matmul(np.ones(shapes[0]), np.ones(shapes[1]))
        assert np.array_equal(on_host(backend.product(a, b, "fp32")), expected)


def test_products_that_make_no_sense_are_refused() -> None:
    backend: Any = get_backend("cupy")
    a, half = on_device(np.ones((2, 3), np.float32)), on_device(np.ones((3, 2), np.float16))
    with pytest.raises(TypeError, match="fp32 and fp16"):
        backend.product(a, half, "fp32")
    with pytest.raises(ValueError, match="cannot multiply"):
        backend.product(a, a, "fp32")
    with pytest.raises(ValueError, match="the result is"):
        backend.product(a, a.T, "fp32", out=on_device(np.ones((2, 2), np.float16)))
    with pytest.raises(TypeError):
        backend.product(on_device(np.ones((2, 2))), on_device(np.ones((2, 2))), "fp32")


# ------------------------------------------------------------------------------------------------------- whole runs


JUDGED = (1, 2, 3, 19, 20)


def some_steps(trace: Trace) -> Trace:
    """Of the other steps only what a judged one starts from, and whether they were skipped."""

    def wanted(key: str) -> bool:
        step, point = int(key.split("/")[0]), key.split("/")[1]
        return step in (0, *JUDGED) or point == "3.found_inf" or (step + 1 in JUDGED and point.startswith("4."))

    return Trace(trace.config, {key: tensor for key, tensor in trace.tensors.items() if wanted(key)})


@pytest.mark.parametrize(
    ("model", "recipe"), [*product(("gpt",), RECIPES), *product(("llama", "mlp"), ("fp32", "fp16", "amp-bf16"))]
)
def test_every_tensor_of_a_training_is_within_its_bound(recipe: str, model: str) -> None:
    """Twenty steps; the first and the last are judged, tensor by tensor, from the device's own values."""
    sizes = {k: v for k, v in TINY.items() if model != "mlp" or k != "n_head"}
    there = Config.of({**sizes, "model": model, "recipe": recipe, "steps": 20})
    findings = judge_trace(replace(there, backend="numpy"), some_steps(record(there)))
    assert [f.where for f in findings if f.departs] == []
    assert {f.step for f in findings if f.point == "2.grads"} == set(JUDGED)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_free_runs_stay_together(recipe: str) -> None:
    trained = train_both(recipe, 8)
    assert trained.agrees, trained.row()


def mutated(old: str, new: str) -> Kernels:
    text = source()
    assert text.count(old) >= 1, f"{old!r} is no longer in kernels.cu"
    return Kernels(text.replace(old, new))


MUTANTS = {
    "the other scale": ("dS[i] = round_to<T>(mul(widen(unscaled), scale));", "dS[i] = unscaled;"),
    "later keys are seen": ("int keys = query + 1;", "int keys = queries;"),
    "no mean": ("float z = mul(mul(sub(widen(x[i]), m), r), widen(w[i]));", "float z = mul(mul(widen(x[i]), r), widen(w[i]));"),
    "the last row is left out": ("row < rows; row += LANES", "row < rows - 1; row += LANES"),
    "never skips": ("if (*found_inf) return;", ""),
    "decays everything": ("if (in_ranges(i, decayed_start, decayed_stop, ranges))", "if (true)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_departs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Config.of({**TINY, "recipe": "fp16", "steps": 8, "init_scale": 2.0**20})
    backend = replace(get_backend("cupy"), kernels=mutated(*MUTANTS[name]))
    monkeypatch.setattr(Config, "make_backend", lambda self: backend)
    assert any(f.departs for f in judge_trace(replace(there, backend="numpy"), record(there)))


def test_two_runs_have_the_same_bits() -> None:
    def states() -> dict[str, bytes]:
        run = OnDevice({k: TINY[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}, "fp16")
        for _ in range(3):
            run.queue()
        return {kind: on_host(buffer).tobytes() for kind, buffer in run.training.state.buffers.items()}

    assert states() == states()


# ------------------------------------------------------------------------------------------- the update, or the skip


@pytest.mark.parametrize("rule", [AdamW(), SGD(), SGD(0.0)], ids=["adamw", "sgd with momentum", "sgd"])
@pytest.mark.parametrize("recipe", ["fp16", "pure-bf16", "fp32"])
def test_an_update_and_a_skipped_one(recipe: str, rule: Any) -> None:
    config = Config.of({**TINY, "recipe": recipe, "steps": 5})
    rng = np.random.default_rng(0)
    states = []
    for backend in (NUMPY, get_backend("cupy")):
        training = config.make_training(backend)
        training.state = State(training.model, get_recipe(recipe).state_encodings(rule.moments), backend)
        training.optimizer.use(rule)
        states.append(training)
    for kind, buffer in states[0].state.buffers.items():
        values = rng.standard_normal(buffer.size) * 0.1
        cast(values**2 if kind == "v" else values, format_of(buffer), out=buffer)
        states[1].state.buffers[kind][...] = on_device(buffer)
    for skip in (True, False):
        before = [{k: np.array(p.state.backend.to_host(b)) for k, b in p.state.buffers.items()} for p in states]
        for training in states:
            xp = training.state.backend.xp
            numbers = xp.asarray(np.float32(0.5)), xp.asarray(np.float32(0.25)), xp.asarray(np.bool_(skip))
            training.optimizer.update(training.state, *numbers)
        after = [{k: np.array(p.state.backend.to_host(b)) for k, b in p.state.buffers.items()} for p in states]
        for kind in after[0]:
            assert after[0][kind].tobytes() == after[1][kind].tobytes(), kind
            if skip:
                assert after[1][kind].tobytes() == before[1][kind].tobytes()
        assert [int(p.state.t) for p in states] == [0 if skip else 1] * 2


@pytest.mark.parametrize(("weights", "moments", "rule"), encoding_cases.CASES)
def test_encodings_of_two_parts_and_of_chance_keep_what_the_host_keeps(weights: str, moments: str, rule: str) -> None:
    """Eight steps, three of them skipped: every part to the bit, from the same gradients; a skip leaves every part."""
    assert encoding_cases.differences(get_backend("cupy"), weights, moments, rule) == []


@pytest.mark.parametrize("seed", [0, 7, (1 << 40) + 7, (1 << 64) - 1])
@pytest.mark.parametrize(("start", "n"), [(0, 10), (5, 1000), (1_234_567, 70_000), ((1 << 63) - 9, 8), (7, 1), (7, 0)])
def test_random_bits_are_the_hosts(start: int, n: int, seed: int) -> None:
    for step, stream in ((0, 0), (3, 1), ((1 << 32) - 1, (1 << 32) - 1)):
        there = random_bits(seed, cupy.asarray(np.int64(step)), start, n, stream, cupy)
        here = random_bits(seed, step, start, n, stream)
        assert there.dtype == here.dtype == np.uint32 and np.array_equal(on_host(there), here)
        assert n < 10 or not np.array_equal(here, random_bits(seed, step, start + 1, n, stream))  # the control


def test_rounding_by_chance_and_the_two_halves_have_the_hosts_bits() -> None:
    """All upper halves of FP32, with lower ones around the ends and the middle; NaN by chance is NaN, whatever its bits."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = from_bits((np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | lower).reshape(-1), "fp32")
    there, draw = on_device(x), random_bits(1, 2, 3, x.size)
    for ours, theirs in zip(split(x), split(there), strict=True):
        assert ours.dtype == theirs.dtype and ours.tobytes() == on_host(theirs).tobytes()
    assert on_host(merge(*split(there))).tobytes() == x.tobytes()
    ours, theirs = stochastic_round(x, "bf16", draw), on_host(stochastic_round(there, "bf16", on_device(draw)))
    number = ~np.isnan(x)
    assert np.array_equal(bits_of(ours)[number], bits_of(theirs)[number]) and np.isnan(widen(theirs)[~number]).all()


@pytest.mark.parametrize("weights", encoding_cases.WEIGHTS)
def test_results_do_not_depend_on_the_blocks_of_a_device(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for block in (1 << 24, 1000, 333):
        monkeypatch.setattr(refimpl.optim.layout, "DEVICE_BLOCK", block)
        training = encoding_cases.training_of(get_backend("cupy"), weights, "bf16", "adamw")
        list(encoding_cases.trained(training, 3))
        ends.append(encoding_cases.kept(training.state))
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("recipe", encoding_cases.RECIPES)
def test_resumed_such_a_run_ends_with_the_same_bits(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "make_backend", lambda self: get_backend("cupy"))
    whole, halves = encoding_cases.resumed(get_backend("cupy"), recipe, tmp_path)
    assert whole == halves


def test_an_overflow_is_skipped_and_the_scale_adapts_without_a_look() -> None:
    config = Config.of({**TINY, "recipe": "fp16", "steps": 8, "init_scale": 2.0**20})
    ours, theirs = record(replace(config, backend="numpy")), record(config)
    for point in ("4.scale", "3.found_inf"):
        values = [[float(t.tensors[f"{step}/{point}"]) for step in ours.steps] for t in (ours, theirs)]
        assert values[0] == values[1]
    assert 0 < sum(float(theirs.tensors[f"{step}/3.found_inf"]) for step in theirs.steps) < 8


# ------------------------------------------------------------------------------------- launches, copies, waits, memory


@pytest.fixture
def counter() -> Iterator[Any]:
    """The tool's counters. On a GPU nobody counts."""
    if "CUPY_ON_CPU" not in os.environ:
        pytest.skip("launches are counted where CuPy runs on the CPU only")
    yield importlib.import_module("cupy_on_cpu")


def counts_of_a_step(counter: Any, recipe: str, n_layer: int, model: str = "gpt") -> dict[str, int]:
    """Of the third step, its batch copied from the host."""
    training = start(Config.of({**TINY, "model": model, "recipe": recipe, "n_layer": n_layer, "steps": 5}))
    rng = np.random.default_rng(0)
    for _ in range(3):
        counter.reset()
        training.step([tuple(on_device(rng.integers(0, 256, (4, 16))) for _ in range(2))])
    return dict(counter.stats())


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("model", "gemms", "most"), [("gpt", 18, 45), ("llama", 27, 64)])
def test_the_budget_of_a_step(model: str, gemms: int, most: int, recipe: str, counter: Any) -> None:
    two, three = (counts_of_a_step(counter, recipe, n_layer, model) for n_layer in (2, 3))
    assert two["d2h"] == two["sync"] == two["malloc"] == two["free"] == 0 and two["h2d"] <= 3, two
    assert three["gemm"] - two["gemm"] == gemms
    assert three["launch"] + three["gemm"] - two["launch"] - two["gemm"] <= most


@pytest.mark.parametrize("recipe", encoding_cases.RECIPES)
def test_updates_without_a_kernel_neither_wait_nor_allocate(recipe: str, counter: Any) -> None:
    step = counts_of_a_step(counter, recipe, 2)
    assert step["d2h"] == step["sync"] == step["malloc"] == step["free"] == 0 and step["h2d"] <= 3, step


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16"])
def test_the_budget_of_steps_3_and_4(recipe: str, counter: Any) -> None:
    """Check, unscale, AdamW and the 16-bit copy: four launches at most, beside the 0-d arithmetic of 1/S, clip and t."""
    training = start(Config.of({**TINY, "recipe": recipe, "steps": 5}))
    batch = tuple(on_device(np.zeros((4, 16), np.int64)) for _ in range(2))
    counter.reset()
    training.step([batch])
    launched = counter.kernels()
    ours = [launched.get(name, 0) for name in ("gradient_norm", "gradient_norm_fold", "adamw")]
    counter.reset()
    training.state.weights_down()
    assert ours == [1, 1, 1] and counter.stats()["launch"] == (0 if recipe == "fp32" else 1)


def test_training_looks_at_the_device_for_the_log_only(counter: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 200)

    def copies(log_every: int) -> int:
        sizes = {**TINY, "data": str(text), "steps": 9, "eval_every": 100, "eval_batches": 1, "log_every": log_every}
        trainer = Trainer(Config.of({**sizes, "recipe": "fp16"}), tmp_path)
        counter.reset()
        for _ in range(9):
            trainer._one_step(trainer.next_batches())
        return int(counter.stats()["d2h"])

    assert copies(3) == copies(100) == 0


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "amp-fp16", *encoding_cases.RECIPES])
def test_a_step_waits_for_nothing(recipe: str) -> None:
    run = OnDevice({k: TINY[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")}, recipe)
    run.queue()
    with no_waits():
        run.queue()
    with pytest.raises(Exception, match="synchronization"), no_waits():
        float(run.training.loss_scale.scale)


# --------------------------------------------------------------------------------------------------- as people use it


def test_a_run_is_resumed_on_either_backend(tmp_path: Path) -> None:
    """Six steps on the device; and three there, then three from the checkpoint on the device, then on the host."""
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 200)
    sizes = {**TINY, "data": str(text), "recipe": "fp16", "eval_every": 3, "eval_batches": 1, "log_every": 2}

    def run(folder: str, stop: int, backend: str = "cupy") -> dict[str, np.ndarray]:
        (tmp_path / folder).mkdir(exist_ok=True)
        trainer = Trainer(Config.of({**sizes, "steps": 6, "backend": backend}), tmp_path / folder)
        if stop == 6 and folder != "whole":
            trainer.restore()
        while trainer.progress.step < stop:
            batches = trainer.next_batches()
            trainer._pending.append((trainer.progress.step + 1, trainer._one_step(batches), batches))
            trainer.progress.step += 1
        trainer._write_steps(NoBar())
        trainer.save()
        return {k: np.array(trainer.backend.to_host(b)) for k, b in trainer.state.buffers.items()}

    whole = run("whole", 6)
    run("device", 3)
    run("host", 3)
    again, on_the_host = run("device", 6), run("host", 6, "numpy")
    for kind in whole:
        assert whole[kind].tobytes() == again[kind].tobytes(), kind
    moved = np.linalg.norm(whole["master"])
    assert np.linalg.norm(whole["master"] - on_the_host["master"]) < 1e-3 * moved


def test_the_check_that_a_user_runs_reports() -> None:
    row = speed("smoke", "bf16", 1)
    assert row[:2] == ["smoke", "bf16"] and float(row[2]) > 0 and row[-1] == "steady"


def test_backends_live_side_by_side() -> None:
    weights = Config.of({**TINY}).make_model().initial_weights(generator(0, INIT))
    trainings = [start(Config.of({**TINY, "recipe": "fp32", "backend": name})) for name in ("numpy", "cupy")]
    for one in trainings:
        one.state.load_weights(weights)
        x, y = (one.state.backend.from_host(np.full((4, 16), fill)) for fill in (3, 4))
        one.step([(x, y)])
    apart = np.abs(on_host(trainings[1].state.master) - trainings[0].state.master).max()
    assert 0 <= apart < 1e-5 and isinstance(trainings[1].state.master, cupy.ndarray)
