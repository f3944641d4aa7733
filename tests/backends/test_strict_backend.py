"""The CuPy backend's own code, trained on the strict stand-in for CuPy: right numbers, few launches, no wait.

`faults(backend)` is the check: a short training is judged tensor by tensor (`judge.py`), and the third step of a model is
counted. The backend has none; each of a list of planted mistakes has the one that is expected of it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter as Counted
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from itertools import product as every
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import op_calls
import pytest
import strict_backend
from recipe_lists import MECHANISMS, others_slow
from strict_backend import PLAIN, STRICT, StrictBackend, on_host, put
from strict_cupy import Counter, WaitError, counter, xp

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.cupy import cublas, llama_ops
from refimpl.backends.cupy import ops as cupy_ops
from refimpl.backends.cupy import passes as cupy_passes
from refimpl.backends.cupy.dispatch import Fused, with_fallback
from refimpl.backends.cupy.ops import CUPY_OPS
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.ops import OPS, fan_in
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of, format_of
from refimpl.optim.gradients import check_and_measure
from refimpl.parity.judge import judge_trace
from refimpl.parity.trace import Trace, record
from refimpl.precision.context import Run
from refimpl.precision.policy import EVERY_OTHER, SAME, Policy, Precision
from refimpl.precision.recipes import RECIPES
from refimpl.precision.state_encodings import Plain, get_encoding
from refimpl.training.config import Config
from refimpl.training.setup import start

Array = Any
MODELS = ("gpt", "llama", "mlp")
KNOWN = [
    name
    for name, recipe in RECIPES.items()
    if recipe.policy.in_formats and all(isinstance(get_encoding(kept), Plain) for kept in recipe.state_encodings().values())
]
"""Recipes that a device takes; test_step.py has their names, and that the others are refused."""
JUDGED_RECIPES = [
    name for name in KNOWN if all(type(get_encoding(kept)) is Plain for kept in RECIPES[name].state_encodings().values())
]
"""Those whose states are plain numbers, which the judge knows; test_device_encodings.py has the others."""
OF_EACH_KIND = [*((recipe, "gpt") for recipe in MECHANISMS), *every(("fp16", "amp-fp16"), ("llama", "mlp"))]
"""Each mechanism in the model with nearly all operations; the others in one format and under autocast."""
TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 16, "lr": 1e-3, "warmup": 2, "steps": 5,
    "init_scale": 2.0**19, "growth_interval": 2,
}  # fmt: skip
"""The scale begins where FP16 overflows, and grows again before the end."""


def config(recipe: str, model: str = "gpt", **more: Any) -> Config:
    sizes = {key: value for key, value in TINY.items() if model != "mlp" or key != "n_head"}
    return Config.of({**sizes, "model": model, "recipe": recipe, **more})


def on(backend: Backend, run: Callable[[Config], Any], settings: Config) -> Any:
    """`run(settings)`, where what asks the configuration for a backend gets this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "make_backend", lambda self: backend)
        return run(settings)


# ------------------------------------------------------------------------------------------------------- the right numbers

JUDGED = (1, 2, 4, 5)


def some_steps(trace: Trace) -> Trace:
    """Of the other steps only what a judged one starts from, and whether they were skipped."""

    def wanted(key: str) -> bool:
        step, point = int(key.split("/")[0]), key.split("/")[1]
        return step in (0, *JUDGED) or point == "3.found_inf" or (step + 1 in JUDGED and point.startswith("4."))

    return Trace(trace.config, {key: tensor for key, tensor in trace.tensors.items() if wanted(key)})


def departures(backend: Backend, settings: Config) -> Iterator[str]:
    """What a run on the backend computes otherwise than the host does from the same values.

    Forward and backward are held to the bounds of the judge. Stages 1, 3 and 4 have one order of operations on both sides,
    so there it is the bits.
    """
    theirs = some_steps(on(backend, record, settings))
    for finding in judge_trace(settings, theirs):
        if finding.departs or (finding.point[0] != "2" and finding.identical < 1):
            yield f"{finding.where} departs"


TRAININGS = [(recipe, model) for recipe in JUDGED_RECIPES if recipe != "fp64" for model in MODELS]
"""What the judge is given; test_step.py has fp64 on both backends."""


@pytest.mark.parametrize(("recipe", "model"), others_slow(TRAININGS, plain=OF_EACH_KIND))
def test_a_training_computes_what_the_host_does(recipe: str, model: str) -> None:
    assert list(departures(STRICT, config(recipe, model))) == []


def test_a_training_without_biases_and_with_more_token_ids_does_too() -> None:
    """The kernels of layer norm and linear take no bias, and the cross-entropy rows of 300."""
    assert list(departures(STRICT, config("bf16", "gpt", bias=False, vocab_size=300))) == []


def test_a_llama_whose_eps_and_heads_are_others_does_too() -> None:
    """The kernels of norms take any eps; two groups of two heads, each normalized, biases, and more positions than a warp."""
    more = {"n_head": 4, "n_kv_head": 2, "head_dim": 6, "norm_eps": 0.01, "qk_norm": True, "qkv_bias": True, "block_size": 40}
    for recipe in ("fp32", "bf16", "amp-bf16"):
        assert list(departures(STRICT, config(recipe, "llama", **more))) == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", [name for name in KNOWN if RECIPES[name].loss_scale == "dynamic"])
def test_the_scale_and_the_skips_of_free_runs_are_the_hosts(recipe: str, model: str) -> None:
    settings = config(recipe, model)
    ours, theirs = (on(backend, record, settings) for backend in (NUMPY, STRICT))
    found, scale = ([float(theirs.tensors[f"{step}/{point}"]) for step in ours.steps] for point in ("3.found_inf", "4.scale"))
    assert found == [float(ours.tensors[f"{step}/3.found_inf"]) for step in ours.steps]
    assert scale == [float(ours.tensors[f"{step}/4.scale"]) for step in ours.steps]
    assert 0 < sum(found) < len(found) and any(a < b for a, b in pairwise(scale))  # skipped, taken, and grown again


# --------------------------------------------------------------------------------------------------------------- the costs

LAUNCHES_A_LAYER, GEMMS_A_LAYER = 45, 18  # launches with the GEMMs among them, as in test_cupy_backend.py
OF_LLAMA = 64, 27  # seven linear layers for four
UNIFORM = ("fp32", "fp16", "bf16")


def third_step(backend: Backend, recipe: str, n_layer: int, model: str = "gpt", **more: Any) -> Counter:
    """What the third step costs, its batch on the device already; a wait is an error."""
    sizes: dict[str, Any] = {"n_layer": n_layer, "n_embd": 32, "block_size": 16, "batch_size": 4, "clip": 1.0}
    training = on(backend, start, config(recipe, model, **sizes, **more))
    rng = np.random.default_rng(0)
    for _ in range(3):
        batch = tuple(backend.from_host(rng.integers(0, 256, (4, 16))) for _ in range(2))
        counter.reset()
        with counter.no_sync():
            training.step([batch])
    return dataclasses.replace(counter)


def excesses(backend: Backend, recipe: str, model: str = "gpt") -> Iterator[str]:
    """Where a step is over its budget."""
    two, three = (third_step(backend, recipe, n_layer, model) for n_layer in (2, 3))
    most, exactly = (LAUNCHES_A_LAYER, GEMMS_A_LAYER) if model == "gpt" else OF_LLAMA
    if two.h2d or two.d2h or two.syncs:
        yield f"a step copies or waits: {two}"
    gemms = three.gemms - two.gemms
    launches = three.launches - two.launches + gemms
    if gemms != exactly:
        yield f"{gemms} GEMMs a layer, not {exactly}"
    if launches > most:
        yield f"{launches} launches a layer, more than {most}"


@pytest.mark.parametrize("recipe", UNIFORM)
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_a_step_is_within_its_budget(model: str, recipe: str) -> None:
    assert list(excesses(STRICT, recipe, model)) == []


@pytest.mark.parametrize("recipe", UNIFORM)
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_without_kernels_a_step_is_far_over_its_budget(model: str, recipe: str) -> None:
    """The control: the definitions take as many GEMMs, and more than twice as many launches, in 16 bits several times."""
    (excess,) = excesses(PLAIN, recipe, model)
    most = LAUNCHES_A_LAYER if model == "gpt" else OF_LLAMA[0]
    assert excess.endswith(f"launches a layer, more than {most}")
    assert int(excess.split()[0]) > (2 if recipe == "fp32" else 5) * most


@pytest.mark.parametrize(("recipe", "model"), others_slow(every(KNOWN, MODELS), plain=OF_EACH_KIND))
def test_a_step_of_any_recipe_waits_for_nothing(recipe: str, model: str) -> None:
    """Where kernels are missing the definitions run, and they do not wait either."""
    for backend in (STRICT, PLAIN):
        costs = third_step(backend, recipe, 2, model)
        assert (costs.h2d, costs.d2h, costs.syncs) == (0, 0, 0)


@dataclass(frozen=True)
class Watched(StrictBackend):
    """The backend; `operands` counts its products by the formats of both operands."""

    operands: Counted[tuple[str, str]] = field(default_factory=Counted)

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        self.operands[format_of(a), format_of(b)] += 1
        return super().matmul(a, b, acc)

    def product(self, a: Array, b: Array, fmt: str, out: Array | None = None) -> Array:
        self.operands[format_of(a), format_of(b)] += 1
        return super().product(a, b, fmt, out)


@pytest.mark.parametrize("attention", ["unfused", "fused"])
@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("recipe", ["fp16", "bf16", "amp-fp16", "amp-bf16", "amp-bf16-cpu"])
def test_every_product_of_a_step_reads_16_bits(recipe: str, model: str, attention: str) -> None:
    """A definition that is run for want of a kernel multiplies what it cast, not copies of it in FP32."""
    backend, low = Watched("watched", xp), "fp16" if "fp16" in recipe else "bf16"
    third_step(backend, recipe, 1, model, attention=attention)
    assert set(backend.operands) == {(low, low)}


def test_products_that_are_asked_for_in_fp32_read_fp32() -> None:
    """The control."""
    backend = Watched("watched", xp)
    third_step(backend, "fp16", 1, attention="math")
    assert backend.operands["fp32", "fp32"] > 0


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "amp-fp16"])
@pytest.mark.parametrize("op", sorted(set(OPS) - set(CUPY_OPS)))
def test_an_operation_without_a_kernel_computes_what_it_does_on_the_host_and_waits_for_nothing(op: str, recipe: str) -> None:
    xs, params, static = op_calls.SHAPES[op].draw("fp16" if recipe == "fp16" else "fp32")

    def results(backend: Backend) -> list[bytes]:
        arrays = [backend.from_host(x) for x in (*xs, *params)]
        p = Run(RECIPES[recipe].policy, backend).precision(OPS[op].key, "here")
        counter.reset()
        with counter.no_sync():
            y, saved = OPS[op].forward(*arrays, p=p, **static)
            gradients = OPS[op].backward(y, saved, *arrays[len(xs) :], p=p, **static)
        assert (counter.h2d, counter.d2h, counter.syncs) == (0, 0, 0)
        return [on_host(x).tobytes() for x in (y, *gradients) if x is not None]

    assert results(STRICT) == results(REFERENCE)


def launches_of_update(backend: Backend, recipe: str) -> tuple[int, int, int]:
    """Launches of the check and the norm; of the update; of the 16-bit copy of the masters."""
    training = on(backend, start, config(recipe))
    numbers = [backend.from_host(x) for x in (np.float32(1), np.float32(1), np.False_)]
    counts = []
    for part in (
        lambda: check_and_measure(training.state, numbers[0]),
        lambda: training.optimizer.update(training.state, *numbers),
        training.state.weights_down,
    ):
        counter.reset()
        part()
        counts.append(counter.launches)
    return counts[0], counts[1], counts[2]


@pytest.mark.parametrize("recipe", UNIFORM)
def test_steps_3_and_4_are_four_launches(recipe: str) -> None:
    """Of the update, four more are of numbers: a row of the table of scalars and its rounding; t + 1, and whether it counts."""
    STRICT.kernels.launched.clear()
    measure, update, down = launches_of_update(STRICT, recipe)
    assert (measure, update - 4, down) == (2, 1, 0 if recipe == "fp32" else 1)
    assert STRICT.kernels.launched == {"gradient_norm": 1, "gradient_norm_fold": 1, "adamw": 1}
    measure, update, down = launches_of_update(PLAIN, recipe)
    assert measure > 4 and update - 4 > 15  # the control


# --------------------------------------------------------------------------------------------------------- where to fall back

LOW = Precision("fp16", "fp32", "fp16")
WIDE_RESULT = Precision("fp16", "fp32", "fp32")
EXACT = Precision("fp64", "fp64", "fp64")
PROMOTE = Precision(SAME, "fp32", SAME)
HIGH = Precision("fp32", "fp32", "fp32")


@dataclass(frozen=True)
class Case:
    """An operation on arrays of some formats and shapes, with one row for all its parts, or others for some.

    arrays: 'fp16 3 4' and the like, inputs first; integers are below 5, which is how many rows a table has.
    """

    op: str
    arrays: tuple[str, ...]
    row: Precision = LOW
    rows: Mapping[str, Precision] = field(default_factory=dict)
    static: Mapping[str, Any] = field(default_factory=dict)

    def run(self, op: Any, backend: Backend) -> tuple[Array, Array, list[Array | None]]:
        """y, what was saved, and the gradients, of this operation or of a version of it."""
        rng = np.random.default_rng(0)
        arrays = [backend.from_host(self._draw(rng, *words.split())) for words in self.arrays]
        p = Run(Policy("case", {EVERY_OTHER: self.row, **self.rows}), backend).precision(op.key, "here")
        y, saved = op.forward(*arrays, p=p, **self.static)
        dy = backend.from_host(cast(rng.standard_normal(y.shape), format_of(y)))
        params = arrays[len(arrays) - len(op.params) :] if op.params else []
        gradients = () if self.op == "fan_in" else op.backward(dy, saved, *params, p=p, **self.static)
        return y, saved, list(gradients)

    @staticmethod
    def _draw(rng: np.random.Generator, fmt: str, *shape: str) -> np.ndarray:
        sizes = [int(n) for n in shape]
        return rng.integers(0, 5, sizes, fmt) if fmt.startswith("int") else cast(rng.standard_normal(sizes), fmt)


GROUPS = {"n_head": 4, "n_kv_head": 2}
SOFTMAX = {"attention.wide_softmax": HIGH}
AUTOCAST = {"attention.scores": LOW, "attention.values": LOW, **SOFTMAX}
FUSED = {
    "add": Case("add", ("fp16 3 4", "fp16 3 4")),
    "add of FP32 under autocast": Case("add", ("fp32 3 4", "fp32 3 4"), PROMOTE),
    "fan_in": Case("fan_in", ("fp16 3 4", "fp16 3 4")),
    "gelu": Case("gelu_tanh", ("fp16 3 4",)),
    "silu": Case("silu", ("fp16 3 4",)),
    "swiglu": Case("swiglu", ("fp16 3 4", "fp16 3 4")),
    "swiglu of FP16 under autocast": Case("swiglu", ("fp16 3 4", "fp16 3 4"), PROMOTE),
    "rope": Case("rope", ("fp16 2 3 8", "fp32 3 2", "fp32 3 2")),
    "rope of FP32 under autocast": Case("rope", ("fp32 2 3 8", "fp32 3 2", "fp32 3 2"), PROMOTE),
    "llama_rmsnorm": Case("llama_rmsnorm", ("fp16 3 8", "fp16 4"), static={"eps": 0.1}),
    "llama_rmsnorm of FP32 under autocast": Case("llama_rmsnorm", ("fp32 3 4", "fp32 4"), PROMOTE),
    "grouped_attention": Case("grouped_attention", ("fp16 2 3 8", "fp16 2 3 4", "fp16 2 3 4"), rows=SOFTMAX, static=GROUPS),
    "grouped_attention, all in FP32": Case(
        "grouped_attention", ("fp32 2 3 8", "fp32 2 3 4", "fp32 2 3 4"), HIGH, static=GROUPS
    ),
    "grouped_attention under autocast": Case(
        "grouped_attention", ("fp32 2 3 8", "fp32 2 3 4", "fp16 2 3 4"), PROMOTE, AUTOCAST, GROUPS
    ),
    "layernorm": Case("layernorm", ("fp16 3 4", "fp16 4", "fp16 4")),
    "layernorm, another eps": Case("layernorm", ("fp16 3 4", "fp16 4", "fp16 4"), static={"eps": 0.1}),
    "layernorm of FP32 under autocast": Case("layernorm", ("fp32 3 4", "fp32 4", "fp32 4"), HIGH),
    "linear": Case("linear", ("fp16 3 4", "fp16 5 4", "fp16 5")),
    "linear of FP32 under autocast": Case("linear", ("fp32 3 4", "fp16 5 4", "fp16 5")),
    "attention": Case("attention", ("fp16 2 3 12",), static={"n_head": 2}),
    "embedding": Case("embedding", ("int64 2 3", "fp16 5 4")),
    "cross_entropy": Case("cross_entropy", ("fp16 3 5", "int64 3"), HIGH),
    "cross_entropy of FP32": Case("cross_entropy", ("fp32 3 5", "int64 3"), HIGH),
    "cross_entropy, some ignored": Case("cross_entropy", ("fp16 6 5", "int64 6"), HIGH, static={"ignore_index": 3}),
}
"""Where there are kernels: the controls."""

FALLBACKS = {
    "add, repeated": Case("add", ("fp16 3 4", "fp16 4")),
    "add, two formats": Case("add", ("fp32 3 4", "fp16 3 4"), PROMOTE),
    "add, a wider result": Case("add", ("fp16 3 4", "fp16 3 4"), WIDE_RESULT),
    "add, fp64": Case("add", ("fp64 3 4", "fp64 3 4"), EXACT),
    "fan_in, two formats": Case("fan_in", ("fp32 3 4", "fp16 3 4"), PROMOTE),
    "fan_in, a wider result": Case("fan_in", ("fp16 3 4", "fp16 3 4"), WIDE_RESULT),
    "fan_in, fp64": Case("fan_in", ("fp64 3 4", "fp64 3 4"), EXACT),
    "gelu, a cast operand": Case("gelu_tanh", ("fp32 3 4",)),
    "gelu, a wider result": Case("gelu_tanh", ("fp16 3 4",), WIDE_RESULT),
    "gelu, fp64": Case("gelu_tanh", ("fp64 3 4",), EXACT),
    "silu, a cast operand": Case("silu", ("fp32 3 4",)),
    "silu, a wider result": Case("silu", ("fp16 3 4",), WIDE_RESULT),
    "silu, fp64": Case("silu", ("fp64 3 4",), EXACT),
    "swiglu, two formats": Case("swiglu", ("fp16 3 4", "fp32 3 4"), PROMOTE),
    "swiglu, a cast operand": Case("swiglu", ("fp32 3 4", "fp16 3 4")),
    "swiglu, a wider result": Case("swiglu", ("fp16 3 4", "fp16 3 4"), WIDE_RESULT),
    "swiglu, fp64": Case("swiglu", ("fp64 3 4", "fp64 3 4"), EXACT),
    "rope, a cast operand": Case("rope", ("fp32 2 3 8", "fp32 3 2", "fp32 3 2")),
    "rope, angles in FP32": Case("rope", ("fp16 2 3 8", "fp32 3 2", "fp32 3 2"), PROMOTE),
    "rope, angles in FP16": Case("rope", ("fp16 2 3 8", "fp16 3 2", "fp16 3 2")),
    "rope, a wider result": Case("rope", ("fp16 2 3 8", "fp32 3 2", "fp32 3 2"), WIDE_RESULT),
    "rope, fp64": Case("rope", ("fp64 2 3 8", "fp32 3 2", "fp32 3 2"), EXACT),
    "llama_rmsnorm, a cast operand": Case("llama_rmsnorm", ("fp32 3 8", "fp16 4")),
    "llama_rmsnorm, two formats": Case("llama_rmsnorm", ("fp16 3 8", "fp32 4"), PROMOTE),
    "llama_rmsnorm, a wider result": Case("llama_rmsnorm", ("fp16 3 8", "fp16 4"), WIDE_RESULT),
    "llama_rmsnorm, fp64": Case("llama_rmsnorm", ("fp64 3 8", "fp64 4"), EXACT),
    "grouped_attention, a softmax in 16 bits": Case(
        "grouped_attention", ("fp16 2 3 8", "fp16 2 3 4", "fp16 2 3 4"), static=GROUPS
    ),
    **{
        f"grouped_attention, wider {part}": Case(
            "grouped_attention", ("fp16 2 3 8", "fp16 2 3 4", "fp16 2 3 4"),
            rows={**SOFTMAX, f"attention.{part}": WIDE_RESULT}, static=GROUPS,
        )
        for part in ("scores", "scale", "values")
    },
    "grouped_attention, more keys": Case(
        "grouped_attention", ("fp16 2 2 8", "fp16 2 3 4", "fp16 2 3 4"), rows=SOFTMAX, static=GROUPS
    ),
    "grouped_attention, two formats": Case(
        "grouped_attention", ("fp16 2 3 8", "fp16 2 3 4", "fp32 2 3 4"), PROMOTE, SOFTMAX, GROUPS
    ),
    "grouped_attention, fp64": Case("grouped_attention", ("fp64 2 3 8", "fp64 2 3 4", "fp64 2 3 4"), EXACT, static=GROUPS),
    "layernorm, a cast operand": Case("layernorm", ("fp16 3 4", "fp32 4", "fp32 4"), HIGH),
    "layernorm, a cast bias": Case("layernorm", ("fp16 3 4", "fp16 4", "fp32 4")),
    "layernorm, cast parameters": Case("layernorm", ("fp32 3 4", "fp16 4", "fp16 4"), HIGH),
    "layernorm, two formats": Case("layernorm", ("fp16 3 4", "fp32 4", "fp32 4"), PROMOTE),
    "layernorm, a wider result": Case("layernorm", ("fp16 3 4", "fp16 4", "fp16 4"), WIDE_RESULT),
    "layernorm, fp64": Case("layernorm", ("fp64 3 4", "fp64 4", "fp64 4"), EXACT),
    "linear, another bias": Case("linear", ("fp16 3 4", "fp16 5 4", "fp32 5"), PROMOTE),
    "linear, a wider result": Case("linear", ("fp16 3 4", "fp16 5 4", "fp16 5"), WIDE_RESULT),
    "linear, another dx": Case("linear", ("fp16 3 4", "fp16 5 4", "fp16 5"), rows={"linear.dx": WIDE_RESULT}),
    "linear, another dw": Case("linear", ("fp16 3 4", "fp16 5 4", "fp16 5"), rows={"linear.dw": WIDE_RESULT}),
    "linear, fp64": Case("linear", ("fp64 3 4", "fp64 5 4", "fp64 5"), EXACT),
    **{
        f"attention, wider {part}": Case(
            "attention", ("fp16 2 3 12",), rows={f"attention.{part}": WIDE_RESULT}, static={"n_head": 2}
        )
        for part in ("scores", "scale", "softmax", "values")
    },
    "attention, a softmax in FP32": Case("attention", ("fp16 2 3 12",), static={"n_head": 2}, rows={"attention.softmax": HIGH}),
    "attention, cast operands": Case("attention", ("fp32 2 3 12",), static={"n_head": 2}),
    "attention, fp64": Case("attention", ("fp64 2 3 12",), EXACT, static={"n_head": 2}),
    "embedding, short tokens": Case("embedding", ("int32 2 3", "fp16 5 4")),
    "embedding, a cast table": Case("embedding", ("int64 2 3", "fp32 5 4")),
    "embedding, a wider result": Case("embedding", ("int64 2 3", "fp16 5 4"), WIDE_RESULT),
    "embedding, fp64": Case("embedding", ("int64 2 3", "fp64 5 4"), EXACT),
    "cross_entropy, short targets": Case("cross_entropy", ("fp16 3 5", "int32 3"), HIGH),
    "cross_entropy, some ignored": Case("cross_entropy", ("fp16 6 5", "int32 6"), HIGH, static={"ignore_index": 3}),
    "cross_entropy, cast down": Case("cross_entropy", ("fp32 3 5", "int64 3"), WIDE_RESULT),
    "cross_entropy, a loss in FP16": Case("cross_entropy", ("fp16 3 5", "int64 3"), LOW),
    "cross_entropy, fp64": Case("cross_entropy", ("fp64 3 5", "int64 3"), EXACT),
}


def definition_of(case: Case) -> Any:
    return fan_in if case.op == "fan_in" else OPS[case.op]


def same_kinds(ours: Array | None, theirs: Array | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("name", FUSED)
def test_what_the_kernels_know_they_compute(name: str) -> None:
    case = FUSED[name]
    STRICT.kernels.launched.clear()
    y, saved, gradients = case.run(CUPY_OPS[case.op], STRICT)
    assert STRICT.kernels.launched and (isinstance(saved, Fused) or case.op in ("add", "fan_in"))
    expected, _, slopes = case.run(definition_of(case), NUMPY)
    assert all(map(same_kinds, (y, *gradients), (expected, *slopes)))


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_they_do_not_know_the_definition_computes(name: str) -> None:
    case = FALLBACKS[name]
    STRICT.kernels.launched.clear()
    y, saved, gradients = case.run(CUPY_OPS[case.op], STRICT)
    assert not STRICT.kernels.launched and not isinstance(saved, Fused)
    expected, _, slopes = case.run(definition_of(case), STRICT)
    for ours, theirs in zip((y, *gradients), (expected, *slopes), strict=True):
        assert same_kinds(ours, theirs) and (ours is None or ours.tobytes() == theirs.tobytes())


@pytest.mark.parametrize("targets", ["int64 4", "int64 2", "int64 3 1"])
def test_targets_of_another_shape_are_refused_before_a_kernel_reads_past_the_last_row(targets: str) -> None:
    STRICT.kernels.launched.clear()
    with pytest.raises(UsageError, match="one per row of logits"):
        Case("cross_entropy", ("fp16 3 5", targets), HIGH).run(CUPY_OPS["cross_entropy"], STRICT)
    assert not STRICT.kernels.launched


def test_every_fast_version_has_cases_of_both_kinds() -> None:
    assert {case.op for case in FUSED.values()} == {case.op for case in FALLBACKS.values()} == set(CUPY_OPS)


# --------------------------------------------------------------------------------------------- what is said of the stand-ins

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C order": lambda x: x,
    "transposed": lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
    "every other column": lambda x: np.repeat(x, 2, -1)[..., ::2],
}
SHAPES = [
    ((3, 4), (4, 2)), ((3, 4), (3, 4)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (3, 4, 5)),
    ((0, 4), (4, 2)), ((3, 0), (0, 2)), ((1, 1), (1, 1)),
]  # fmt: skip
OUTS: dict[str, Callable[[tuple[int, ...], str], np.ndarray] | None] = {
    "none": None,
    "right": lambda shape, fmt: np.ones(shape, dtype_of(fmt)),
    "another format": lambda shape, fmt: np.ones(shape, dtype_of("fp32" if fmt == "fp16" else "fp16")),
    "another shape": lambda shape, fmt: np.ones((*shape[:-1], shape[-1] + 1), dtype_of(fmt)),
    "another order": lambda shape, fmt: np.ones(shape[::-1], dtype_of(fmt)).T,
}


def outcome(product: Callable[..., Array], a: np.ndarray, b: np.ndarray, fmt: str, out: str) -> Any:
    """The error that a product raises; or the kind of its result, its GEMMs and its copies, and what it writes without one."""
    make, shape = OUTS[out], (*a.shape[:-1], b.shape[-1])
    given = None if make is None else xp.asarray(make(shape, fmt))
    counter.reset()
    try:
        y = product(xp.asarray(a), xp.asarray(b), fmt, given)
    except (TypeError, ValueError) as error:
        return type(error)
    written = None if counter.gemms else on_host(y).tobytes()
    return y.shape, y.dtype, given is not None and y is given, counter.gemms, counter.launches, written


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_the_stand_ins_product_checks_what_the_real_one_does(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cublas.product` itself, with the stand-in for CuPy, and a call of cuBLAS that is only counted."""

    def call(cupy: Any, a: Array, b: Array, out: Array, sizes: tuple[int, int, int, int]) -> None:
        assert all(cublas._layout(cublas._readable(cupy, x)) is not None for x in (a, b))
        counter.gemms += 1

    monkeypatch.setitem(sys.modules, "cupy", xp)
    monkeypatch.setattr(cublas, "_call", call)
    formats = ("fp32", "fp16", "fp64")
    outcomes = set()
    for left, right, fmt, out in every(formats, formats, formats, OUTS):
        for lay_a, lay_b in every(LAYOUTS.values(), LAYOUTS.values()):
            a, b = (lay(np.ones(shape, dtype_of(f))) for lay, shape, f in ((lay_a, shapes[0], left), (lay_b, shapes[1], right)))
            expected = outcome(cublas.product, a, b, fmt, out)
            assert outcome(STRICT.product, a, b, fmt, out) == expected, (left, right, fmt, out)
            outcomes.add(expected if isinstance(expected, type) else "done")
    assert outcomes >= {TypeError, ValueError}
    assert ("done" in outcomes) == (shapes[0][:-2] == shapes[1][:-2] and shapes[0][-1] == shapes[1][-2])


def test_what_leaves_a_device_is_a_numpy_array() -> None:
    """By CuPy's own way out on any backend with its arrays; on the host it is the array itself, not a copy."""
    x = np.arange(3.0)
    for backend in (STRICT, PLAIN):
        there = backend.from_host(x)
        counter.reset()
        back = backend.to_host(there)
        assert type(back) is np.ndarray and np.array_equal(back, x) and (counter.d2h, counter.syncs) == (1, 1)
        assert not np.shares_memory(back, on_host(there))
    assert NUMPY.to_host(x) is x


# ----------------------------------------------------------------------------------------------------------- planted mistakes


def faults(backend: Backend) -> Iterator[str]:
    """Everything that is wrong with a backend, by the checks above; what is refused on the way ends it."""
    try:
        yield from departures(backend, config("fp16"))
        yield from excesses(backend, "fp16")
    except (AssertionError, TypeError, ValueError, WaitError) as error:
        yield f"{type(error).__name__}: {error}"


def test_the_backend_has_no_faults() -> None:
    assert list(faults(STRICT)) == []


@dataclass(frozen=True)
class Broken(StrictBackend):
    """The backend with other operations, passes or products."""

    changed_ops: Mapping[str, Any] = field(default_factory=lambda: CUPY_OPS)
    changed_passes: Mapping[str, Any] = field(default_factory=lambda: cupy_passes.CUPY_PASSES)

    @property
    def ops(self) -> Mapping[str, Any]:
        return self.changed_ops

    @property
    def passes(self) -> Mapping[str, Callable[..., Any]]:
        return self.changed_passes


Plant = Callable[[pytest.MonkeyPatch], Backend]


def edited(module: ModuleType, old: str, new: str) -> Plant:
    """One place of the source of cupy_ops.py or cupy_passes.py, written otherwise."""

    def plant(patch: pytest.MonkeyPatch) -> Backend:
        assert module.__file__ is not None
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {module.__name__}"
        names: dict[str, Any] = {"__name__": module.__name__}
        exec(compile(text.replace(old, new), module.__file__, "exec"), names)
        if module is cupy_ops:
            return Broken("broken", xp, changed_ops=names["CUPY_OPS"])
        return Broken("broken", xp, changed_passes=names["CUPY_PASSES"])

    return plant


def in_place_of(kernel: Callable[..., None]) -> Plant:
    """A kernel that computes something else."""

    def plant(patch: pytest.MonkeyPatch) -> Backend:
        patch.setitem(strict_backend.DEFINITIONS, kernel.__name__.removeprefix("wrong_"), kernel)
        return STRICT

    return plant


def wrong_embedding_backward(
    fmt: str, grid: tuple[int, ...], tokens: Array, dy: Array, dw: Array, n: np.int32, C: np.int32
) -> None:
    """Of several places of one token the last one stays."""
    dw[...] = 0
    dw[tokens.reshape(n)] = dy.reshape(n, C)


def wrong_bias_backward(fmt: str, grid: tuple[int, ...], dy: Array, db: Array, rows: np.int32, C: np.int32) -> None:
    """Rows are summed in the format that they are stored in."""
    total = np.zeros(C, dy.dtype)
    for row in dy.reshape(rows, C):
        total = total + row
    put(db, total)


def wrong_cross_entropy_mean(
    fmt: str, grid: tuple[int, ...], row_loss: Array, target: Array, loss: Array, counted: Array,
    rows: np.int32, ignored: np.int64,
) -> None:  # fmt: skip
    """A sum of FP16 numbers."""
    put(counted, np.float32((target != ignored).sum()))
    put(loss, widen(cast(row_loss, "fp16").sum(dtype=np.float16)) / counted)


@dataclass(frozen=True)
class SixteenBitSums(StrictBackend):
    """Products are summed in 16 bits, eight terms at a time."""

    def product(self, a: Array, b: Array, fmt: str, out: Array | None = None) -> Array:
        y = super().product(a, b, fmt, out)
        left, right, result = (on_host(x) for x in (a, b, y))
        total = np.zeros(result.shape, left.dtype)
        with np.errstate(all="ignore"):
            for k in range(0, left.shape[-1], 8):
                more = np.matmul(widen(left[..., k : k + 8]), widen(right[..., k : k + 8, :]))
                total = cast(widen(total) + more, format_of(left))
        result[...] = widen(total, fmt)
        return y


MISTAKES: dict[str, tuple[Plant, str]] = {
    "a product without its transposition": (
        edited(cupy_ops, "product(dS.swapaxes(-1, -2), q, fmt, out=dk)", "product(dS, q, fmt, out=dk)"),
        "2.activation_grads of transformer.h.0.attn.c_attn departs",
    ),
    "the bias added twice": (
        edited(cupy_ops, "in_order(p, bc)", "in_order(p, bc + bc)"),
        "2.activations of transformer.h.0.attn.c_attn departs",
    ),
    "rounded before the bias": (
        edited(cupy_ops, "p.empty(y.shape, fmt), y", "p.empty(y.shape, fmt), widen(y.astype(bc.dtype), 'fp32')"),
        "2.activations of transformer.h.0.attn.c_attn departs",
    ),
    "the slope of attention is not scaled": (
        edited(cupy_ops, "P, dS, dS, np.int32(T), number(1 / math.sqrt(D))", "P, dS, dS, np.int32(T), number(1.0)"),
        "2.activation_grads of transformer.h.0.attn.c_attn departs",
    ),
    "layer norm keeps its result instead of its operand": (
        edited(cupy_ops, "Fused((xc, mean, rstd))", "Fused((y, mean, rstd))"),
        "2.grads of transformer.ln_f.weight departs",
    ),
    "the embedding's gradient loses duplicates": (
        in_place_of(wrong_embedding_backward), "2.grads of transformer.wte.weight departs",
    ),
    "a bias gradient summed in FP16": (in_place_of(wrong_bias_backward), "bias departs"),
    "the loss summed in FP16": (in_place_of(wrong_cross_entropy_mean), "2.loss departs"),
    "products summed in FP16": (
        lambda patch: SixteenBitSums("broken", xp), "2.activations of transformer.h.0.attn.c_attn departs",
    ),
    "the norm with another 1/S": (
        edited(cupy_passes, "grads, inverse_scale, squares", "grads, inverse_scale * inverse_scale, squares"),
        "3.norm departs",
    ),
    "an update with another 1/S": (
        edited(cupy_passes, "grads, inverse_scale, clip, scalars", "grads, clip, clip, scalars"),
        "4.m of transformer.wte.weight departs",
    ),
    "an update that ignores found_inf": (
        edited(cupy_passes, "clip, scalars, found_inf,\n", "clip, scalars, state.backend.xp.zeros_like(found_inf),\n"),
        "step 1, 4.m of transformer.wte.weight departs",
    ),
    "Inf is not looked for": (
        edited(cupy_passes, "    return found_inf, norm", "    return state.backend.xp.zeros_like(found_inf), norm"),
        "step 1, 3.found_inf departs",
    ),
    "an if on found_inf": (
        edited(cupy_passes, "    beta1, beta2 = rule.betas\n",
               "    beta1, beta2 = rule.betas\n    if found_inf:\n        return\n"),
        "WaitError: bool(), or an if on an array, waits",
    ),
    "a look at a value": (
        edited(cupy_ops, "    if bc is not None:\n", "    if bc is not None and float(bc[0]) < 1e9:\n"),
        "WaitError: float() waits",
    ),
    "a copy from the host in each step": (
        edited(cupy_passes, "starts, stops = state.decayed_edges",
               "starts, stops = state.backend.from_host(np.array(state.layout.decayed, np.int64).T.copy())"),
        "a step copies or waits: Counter(",
    ),
    "a grid that leaves out eight rows": (
        edited(cupy_ops, "layernorm_forward(by_warps(mean.size)", "layernorm_forward(by_warps(mean.size - 8)"),
        "AssertionError: a grid of (15,)",
    ),
    "a number of Python": (edited(cupy_ops, "*sizes, number(eps)", "*sizes, eps"), "packed as a double"),
    "statistics in 16 bits": (
        edited(cupy_ops, '(p.empty(target.shape, "fp32")', "(p.empty(target.shape, fmt)"),
        "TypeError: cross_entropy_forward: row_loss is an array of float32, not float16",
    ),
    "an array in another order": (
        edited(cupy_ops, "dy = format_of(x), mean.size, x.shape[-1], in_order(p, dy)",
               "dy = format_of(x), mean.size, x.shape[-1], dy.T.copy().T"),
        "TypeError: layernorm_backward: dy is an array in C order, this one is not",
    ),
    "an operation without a kernel": (
        edited(cupy_ops, '        with_fallback(OPS["gelu_tanh"], gelu_tanh_forward, gelu_tanh_backward),\n', ""),
        "launches a layer",
    ),
    "operands copied before a product": (
        edited(cupy_ops, "product(dy.T, x, fmt)", "product(in_order(p, dy.T), x, fmt)"), "48 launches a layer",
    ),
    "a product made twice": (
        edited(cupy_ops, "    product(dS, k, fmt, out=dq)\n", 2 * "    product(dS, k, fmt, out=dq)\n"), "19 GEMMs a layer",
    ),
}  # fmt: skip
"""What is done wrong, and the fault that shows it."""


OF_LLAMA_MISTAKES = {
    "one head of a group counts": (
        "sum_of_group(widen(d, stored), p, site)", "widen(d, stored)[:, :, :1].copy()",
        "2.activation_grads of model.layers.0.self_attn",
    ),
    "P in 16 bits": (
        "_backward(grid, ROWS, P, dS", "_backward(grid, ROWS, p['scores'].cast(P, 'q'), dS", "P is an array of float32",
    ),
    "heads dealt in turn to the groups": (
        "q_heads = heads.reshape(B, n_kv_head, group * T, D)",
        "q_heads = heads.reshape(B, group, n_kv_head, T, D).swapaxes(1, 2).reshape(B, n_kv_head, group * T, D)",
        "2.activations of model.layers.0.self_attn departs",
    ),
    "the slope is not scaled": (
        "P, dS, dS, np.int32(T), number(1 / math.sqrt(D))", "P, dS, dS, np.int32(T), number(1.0)", "self_attn.k_rope departs",
    ),
    "gradients turned forward": (
        "rotated(dy, cos, sin, -1.0, p)", "rotated(dy, cos, sin, 1.0, p)",
        "2.activation_grads of model.layers.0.self_attn.q_proj",
    ),
    "the eps of GPT-2": ("*sizes, number(eps)", "*sizes, number(EPS)", "2.activations of model.layers.0.input_layernorm"),
    "gate and up exchanged": (
        "in_order(p, dy), gate, up, dgate", "in_order(p, dy), up, gate, dgate", "2.activation_grads of model.layers.0.mlp",
    ),
    "a sum for a product": ('"swiglu_forward", fmt, gc, uc', '"add_forward", fmt, gc, uc', "mlp.act departs"),
}
"""What is written otherwise in llama_ops.py, and the fault that shows it."""


@pytest.mark.parametrize("name", OF_LLAMA_MISTAKES)
def test_a_mistake_in_llamas_operations_is_found(name: str) -> None:
    old, new, fault = OF_LLAMA_MISTAKES[name]
    text = Path(llama_ops.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    names: dict[str, Any] = {"__name__": llama_ops.__name__}
    exec(compile(text.replace(old, new), llama_ops.__file__, "exec"), names)
    changed = {
        op: with_fallback(OPS[op], names[f"{op}_forward"], names[f"{op}_backward"])
        for op in ("swiglu", "rope", "llama_rmsnorm", "grouped_attention")
    }
    settings = config("fp16", "llama", n_head=4, n_kv_head=2, norm_eps=0.01, init_scale=1024.0, steps=1)
    try:
        found = list(departures(Broken("broken", xp, changed_ops={**CUPY_OPS, **changed}), settings))
    except TypeError as error:
        found = [str(error)]
    assert any(fault in one for one in found), found


ONE_IN_THREE = list(MISTAKES)[::3]
"""The list above goes from operation to operation, so these are of all of them."""


@pytest.mark.parametrize("name", others_slow(MISTAKES, plain=ONE_IN_THREE))
def test_a_planted_mistake_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, fault = MISTAKES[name]
    found = []
    for one in faults(plant(monkeypatch)):
        found.append(one)
        if fault in one:
            print(one)
            return
    pytest.fail(f"not found; instead: {found}")
