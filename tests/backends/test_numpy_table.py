"""The fast versions in backends/numpy/table.py against their definitions: to the bit where sums have the same order, else
within the bound of a reordered FP32 sum. A run takes them unless it has a monitor."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import bounds
import numpy as np
import pytest
from arrays import array, wide
from bounds import (
    Near,
    assert_agrees,
    attention_near,
    embedding_near,
    grouped_attention_near,
    layernorm_near,
    linear_near,
    llama_rmsnorm_near,
    near,
)
from recipe_lists import BASIC

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy import backend as numpy_backend
from refimpl.backends.numpy import blocks
from refimpl.backends.numpy.attention import QUERIES
from refimpl.backends.numpy.backend import NUMPY
from refimpl.backends.numpy.table import OPS as FAST
from refimpl.backends.numpy.threads import workers
from refimpl.errors import UsageError
from refimpl.nn.op import Op
from refimpl.nn.ops import OPS, SELECTED, fan_in, gelu_tanh
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import format_of, is_float
from refimpl.precision.context import OpPrecision, Run
from refimpl.precision.policy_variants import with_attention
from refimpl.precision.recipes import RECIPES
from refimpl.tools.bench.steps import MODELS, Ours

Array = Any

DEFINITIONS = {**OPS, **SELECTED, "fan_in": fan_in}
ELEMENTWISE = ("add", "fan_in", "relu", "silu", "swiglu", "gelu_tanh")
SAME_BITS = (*ELEMENTWISE, "rope", "cross_entropy")
PAIRS = ("add", "fan_in", "swiglu")  # of two operands of one shape
GROUPED = ("grouped_attention", "fused_grouped_attention")
REORDERED = ("linear", "attention", "fused_attention", *GROUPED, "layernorm", "llama_rmsnorm", "embedding")

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1.0, -1.0, 11.0, 300.0, -65504.0, 3e38, np.inf, -np.inf, np.nan]
SHAPES = [(1,), (7,), (0, 4), (3, 1), (5, 14), (2, 3, 28), (40, 700)]


def test_every_entry_of_the_table_is_compared_below() -> None:
    assert {*SAME_BITS, *REORDERED} == {*FAST} == {*NUMPY.ops}
    for name, op in FAST.items():
        definition = DEFINITIONS[name]
        assert (op.name, op.params, op.key) == (definition.name, definition.params, definition.key) and op != definition


def drawn(shape: tuple[int, ...], fmt: str, special: bool, seed: int) -> Array:
    """Normal numbers of several sizes, with special ones among them if wanted."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.choice([0.01, 1.0, 5.0], shape)
    if special:
        x[rng.random(shape) < 0.1] = rng.choice(SPECIAL)
    return cast(x, fmt)


def called(op: Op, backend: Backend, recipe: str, operands: list[Array], dy: Array | None = None, **static: Any) -> list[Array]:
    """All that an operation returns and saves, forward and backward, on a backend."""
    p = Run(RECIPES[recipe].policy, backend).precision(op.key, "here")
    with np.errstate(all="ignore"):
        y, saved = op.forward(*operands, p=p, **static)
        if op.name == "fan_in":
            return [y]
        dy = drawn(y.shape, format_of(y), False, 2) if dy is None else dy
        params = operands[len(operands) - len(op.params) :] if op.params else []
        kept = [x for x in (saved if isinstance(saved, tuple) else (saved,)) if hasattr(x, "dtype")]
        return [y, *kept, *(g for g in op.backward(dy, saved, *params, p=p, **static) if g is not None)]


def comparable(results: list[Array]) -> list[bytes]:
    """Format, shape and bits, every NaN the same: which of two NaNs a sum hands on is the processor's choice."""
    found = []
    for x in results:
        bits = np.array(x)
        if is_float(bits):
            bits[np.isnan(x)] = np.nan
        found.append(f"{x.dtype} {x.shape}".encode() + bits.tobytes())
    return found


def both(name: str, recipe: str, operands: list[Array], **more: Any) -> tuple[list[Array], list[Array]]:
    """The results of the fast version, and of its definition on the backend that has nothing else."""
    fast, definition = FAST[name], DEFINITIONS[name]
    return called(fast, NUMPY, recipe, operands, **more), called(definition, REFERENCE, recipe, operands, **more)


# ----------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", [name for name in BASIC if not name.endswith("-cpu")])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_version_gives_the_bits_of_its_definition(
    name: str, recipe: str, shape: tuple[int, ...], special: bool
) -> None:
    fmt = RECIPES[recipe].policy.row("linear.y").out  # of activations
    operands = [drawn(shape, fmt, special, seed) for seed in range(2 if name in PAIRS else 1)]
    fast, definition = both(name, recipe, operands)
    assert comparable(fast) == comparable(definition)


@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 7, 24), (3, 40, 128)], ids=str)
@pytest.mark.parametrize("recipe", BASIC)
def test_rope_too(recipe: str, shape: tuple[int, ...], special: bool) -> None:
    fmt = RECIPES[recipe].policy.row("linear.y").out
    cos, sin = (drawn((shape[1], 2), "fp32", special, seed) for seed in (1, 2))
    fast, definition = both("rope", recipe, [drawn(shape, fmt, special, 0), cos, sin])
    assert comparable(fast) == comparable(definition)


@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 4000), (2, 7, 24), (0, 5), (3, 50, 4000)], ids=str)
@pytest.mark.parametrize("recipe", BASIC)
def test_the_loss_too(recipe: str, shape: tuple[int, ...], special: bool) -> None:
    """In blocks of rows, of which some or all are ignored."""
    logits = drawn(shape, RECIPES[recipe].policy.row("linear.y").out, special, 0)
    dloss = cast(np.array(1024.0), "fp64" if recipe == "fp64" else "fp32")
    for ignored in (0.0, 0.4, 1.0):
        rng = np.random.default_rng(1)
        targets = np.where(rng.random(shape[:-1]) < ignored, -1, rng.integers(0, shape[-1], shape[:-1]))
        fast, definition = both("cross_entropy", recipe, [logits, targets], dy=dloss, ignore_index=-1)
        assert comparable(fast) == comparable(definition)
    for wrong in (targets[..., None], np.full(shape[:-1], shape[-1])):
        if wrong.size or wrong.shape != targets.shape:
            with pytest.raises(UsageError, match="target"):
                called(FAST["cross_entropy"], NUMPY, recipe, [logits, wrong])


def test_the_loss_makes_no_other_array_of_the_size_of_the_logits_than_their_gradient() -> None:
    """As counted by tracemalloc. A part is a block of FP32 numbers or a few; there are as many at a time as threads."""
    logits, targets = drawn((4, 256, 8000), "bf16", False, 0), np.zeros((4, 256), np.int64)
    p = Run(RECIPES["bf16"].policy, NUMPY).precision("cross_entropy", "here")
    parts = 4 * 4 * blocks.BLOCK * workers().threads
    assert parts < 4 * logits.size
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        loss, saved = FAST["cross_entropy"].forward(logits, targets, p=p)
        assert tracemalloc.get_traced_memory()[1] - before < parts
        tracemalloc.reset_peak()
        FAST["cross_entropy"].backward(loss, saved, p=p)
        assert tracemalloc.get_traced_memory()[1] - before < parts + logits.nbytes
    finally:
        tracemalloc.stop()


def test_a_broadcast_sum_too() -> None:
    fast, definition = both("add", "fp16", [drawn((3, 5, 4), "fp16", True, 0), drawn((5, 4), "fp16", True, 1)])
    assert comparable(fast) == comparable(definition)


def test_the_comparison_bites() -> None:
    """With another order of the same factors some last bits differ."""

    def reordered(x: Array, p: OpPrecision) -> tuple[Array, Any]:
        y, saved = gelu_tanh.forward(x, p=p)
        return cast(cast(y, "fp64") * (1 + 2.0**-23), format_of(y)), saved

    x = drawn((5, 14), "fp32", False, 1)
    wrong, right = (called(op, REFERENCE, "fp32", [x]) for op in (replace(gelu_tanh, forward=reordered), gelu_tanh))
    assert comparable(wrong) != comparable(right)


# ---------------------------------------------------------------------------------------------------- sums in another order


def linear_case(fmt: str, M: int, K: int, F: int) -> tuple[list[Array], Array, list[Near], dict[str, Any]]:
    rng = np.random.default_rng(5)
    x, w, b, dy = (array(rng.standard_normal(shape), fmt) for shape in ((M, K), (F, K), (F,), (M, F)))
    return [x, w, b], dy, linear_near(*(near(wide(a)) for a in (x, w, b, dy))), {}


def layernorm_case(fmt: str, M: int, C: int, eps: float = 1e-5) -> tuple[list[Array], Array, list[Near], dict[str, Any]]:
    rng = np.random.default_rng(6)
    x, w, b, dy = (array(rng.standard_normal(shape), fmt) for shape in ((M, C), (C,), (C,), (M, C)))
    return [x, w, b], dy, layernorm_near(*(near(wide(a)) for a in (x, w, b, dy)), eps=eps), {"eps": eps}


def llama_rmsnorm_case(fmt: str, M: int, C: int, eps: float = 1e-5) -> tuple[list[Array], Array, list[Near], dict[str, Any]]:
    rng = np.random.default_rng(9)
    x, w, dy = (array(rng.standard_normal(shape), fmt) for shape in ((M, C), (C,), (M, C)))
    return [x, w], dy, llama_rmsnorm_near(*(near(wide(a)) for a in (x, w, dy)), fmt, fmt, eps), {"eps": eps}


def embedding_case(fmt: str, n: int, V: int, C: int) -> tuple[list[Array], Array, list[Near], dict[str, Any]]:
    rng = np.random.default_rng(7)
    tokens, w, dy = rng.integers(0, V, n), array(rng.standard_normal((V, C)), fmt), array(rng.standard_normal((n, C)), fmt)
    return [tokens, w], dy, embedding_near(tokens, near(wide(w)), near(wide(dy))), {}


def attention_case(fmt: str, B: int, T: int) -> tuple[list[Array], Array, list[Near], dict[str, Any]]:
    rng = np.random.default_rng(8)
    C = bounds.H * bounds.D
    qkv, dO = array(rng.standard_normal((B, T, 3 * C)), fmt), array(rng.standard_normal((B, T, C)), fmt)
    return [qkv], dO, attention_near(qkv, dO, fmt), {"n_head": bounds.H}


def grouped_case(fmt: str, B: int, T: int) -> tuple[list[Array], Array, list[Near], dict[str, Any]]:
    """Two groups of two heads."""
    rng, C = np.random.default_rng(8), 2 * bounds.D
    q, k, v, dO = (array(rng.standard_normal((B, T, width)), fmt) for width in (2 * C, C, C, 2 * C))
    return [q, k, v], dO, grouped_attention_near(q, k, v, dO, fmt), {"n_head": 4, "n_kv_head": 2}


def assert_within_bounds(name: str, fmt: str, case: tuple[list[Array], Array, list[Near], dict[str, Any]]) -> None:
    operands, dy, exact, static = case
    fast, definition = both(name, fmt, operands, dy=dy, **static)
    gradients = len(exact) - 1
    pairs = zip([fast[0], *fast[-gradients:]], [definition[0], *definition[-gradients:]], exact, strict=True)
    for i, (ours, theirs, truth) in enumerate(pairs):
        assert ours.dtype == theirs.dtype
        assert_agrees(ours, theirs, truth, fmt, f"{name} {i}")


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
def test_a_version_with_reordered_sums_gives_what_a_correct_evaluation_can(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits most results are decided, and so identical; see bounds.py."""
    assert_within_bounds("linear", fmt, linear_case(fmt, 33, 64, 40))
    assert_within_bounds("layernorm", fmt, layernorm_case(fmt, 9, 96))
    assert_within_bounds("embedding", fmt, embedding_case(fmt, 200, 7, 12))
    assert_within_bounds("attention", fmt, attention_case(fmt, 3, bounds.T))
    assert_within_bounds("llama_rmsnorm", fmt, llama_rmsnorm_case(fmt, 9, 96))
    assert_within_bounds("grouped_attention", fmt, grouped_case(fmt, 3, bounds.T))


def test_so_it_is_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of products, examples, and queries, of which the last block is short."""
    monkeypatch.setattr(numpy_backend, "WHOLE", 0)
    monkeypatch.setattr(numpy_backend, "ROWS", 32)
    monkeypatch.setattr(numpy_backend, "SHARED", 0)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 9)
    T = 2 * QUERIES + 5
    monkeypatch.setattr(bounds, "CAUSAL", np.tril(np.ones((T, T), bool)))
    assert_within_bounds("linear", "fp32", linear_case("fp32", 200, 48, 24))
    assert_within_bounds("layernorm", "fp32", layernorm_case("fp32", 70, 33))
    assert_within_bounds("attention", "fp32", attention_case("fp32", 2, T))
    assert_within_bounds("llama_rmsnorm", "fp32", llama_rmsnorm_case("fp32", 70, 33))
    assert_within_bounds("grouped_attention", "fp32", grouped_case("fp32", 2, T))


def test_a_wrong_version_is_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FAST["layernorm"].forward

    def rounded_twice(x: Array, w: Array, b: Array, p: OpPrecision, eps: float) -> tuple[Array, Any]:
        y, saved = forward(x, w, None, p=p, eps=eps)
        return p.round(p.widen(y) + p.widen(b), "y", x), saved

    monkeypatch.setitem(FAST, "layernorm", replace(FAST["layernorm"], forward=rounded_twice))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="layernorm 0"):
        assert_within_bounds("layernorm", "bf16", layernorm_case("bf16", 9, 96))


# 0.5 is of the size of the mean square: the default of 1e-5 instead would be seen.
@pytest.mark.parametrize("fmt", ["fp32", "fp16"])
def test_eps_is_that_of_the_model(fmt: str) -> None:
    assert_within_bounds("layernorm", fmt, layernorm_case(fmt, 9, 96, 0.5))
    assert_within_bounds("llama_rmsnorm", fmt, llama_rmsnorm_case(fmt, 9, 96, 0.5))


# gamma(65) is 7e-15 in FP64; 1e-11 leaves room for the cancellation in dP - sum(dP P), and a missing factor is far beyond it.
@pytest.mark.parametrize("T", [1, 5, QUERIES, QUERIES + 1])
@pytest.mark.parametrize("name", ["attention", "fused_attention"])
def test_attention_in_fp64_is_that_of_its_definition(name: str, T: int) -> None:
    qkv, dO = drawn((3, T, 24), "fp64", False, 1), drawn((3, T, 8), "fp64", False, 2)
    for fast, definition in zip(*both(name, "fp64", [qkv], dy=dO, n_head=2), strict=True):
        np.testing.assert_allclose(fast, definition, rtol=1e-11, atol=1e-11)


def qkv_of_groups(T: int, fmt: str, keys: int | None = None) -> list[Array]:
    """Four heads of width 2 that share two of keys and values, of which there may be more than queries."""
    return [drawn((3, length, C), fmt, False, C) for length, C in ((T, 8), (keys or T, 4), (keys or T, 4))]


@pytest.mark.parametrize("T", [1, 5, QUERIES, QUERIES + 1])
@pytest.mark.parametrize("name", GROUPED)
def test_so_is_attention_with_groups(name: str, T: int) -> None:
    dO, sizes = drawn((3, T, 8), "fp64", False, 2), {"n_head": 4, "n_kv_head": 2}
    for keys in (T, T + QUERIES + 3):  # more keys than queries: those of a cache
        fast, definition = both(name, "fp64", qkv_of_groups(T, "fp64", keys), dy=dO, **sizes)
        for ours, theirs in zip(fast, definition, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


SAME_SHARE = 0.95
"""Of fused attention's results in 16 bits. Sums of 20 terms in two orders are gamma(19) = 1.1e-6 apart at most, half an ulp of
FP16 is 2.4e-4 to 4.9e-4 of a value: fewer than 0.5 % fall on two sides of a tie. An element of dq or dk reads up to 20 of dS,
each of which may be such a one, and a change of one ulp in one of 20 terms moves few of the results. The control shows what a
rounding that is left out does.
"""


FUSED = ("fused_attention", "fused_grouped_attention")


def fused_both_ways(op: Op, fmt: str, backend: Backend) -> list[Array]:
    """O and the gradients."""
    grouped, dO = op.name == "fused_grouped_attention", drawn((3, 20, 8), fmt, False, 2)
    operands = qkv_of_groups(20, fmt) if grouped else [drawn((3, 20, 24), fmt, False, 1)]
    sizes = {"n_head": 4, "n_kv_head": 2} if grouped else {"n_head": 2}
    p = Run(with_attention(RECIPES[fmt].policy, "fused"), backend).precision("attention", "here")
    O, saved = op.forward(*operands, p=p, **sizes)  # noqa: E741
    return [O, *op.backward(dO, saved, p=p, **sizes)]


def shares(name: str, fmt: str) -> list[float]:
    """The shares of results that are those of the definition, to the bit: of O, and of the gradients."""
    definition = fused_both_ways(DEFINITIONS[name], fmt, REFERENCE)
    found = fused_both_ways(FAST[name], fmt, NUMPY)
    assert [x.dtype for x in found] == [x.dtype for x in definition]
    return [float((wide(ours) == wide(theirs)).mean()) for ours, theirs in zip(found, definition, strict=True)]


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_rounds_where_its_definition_does(name: str, fmt: str) -> None:
    assert min(shares(name, fmt)) > SAME_SHARE


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
@pytest.mark.parametrize("operand", ["P", "dS"])
@pytest.mark.parametrize("name", FUSED)
def test_a_rounding_that_fused_attention_leaves_out_is_seen(
    name: str, operand: str, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast_operand = OpPrecision.cast

    def not_this_one(self: OpPrecision, x: Array, which: str) -> Array:
        return x if which == operand and self.run.backend is NUMPY else cast_operand(self, x, which)

    monkeypatch.setattr(OpPrecision, "cast", not_this_one)
    assert min(shares(name, fmt)) < SAME_SHARE


@pytest.mark.parametrize("name", ["linear", "layernorm", "llama_rmsnorm", "embedding"])
def test_special_values_go_where_those_of_the_definition_go(name: str) -> None:
    x, w, b = (drawn(shape, "fp16", True, i) for i, shape in enumerate(((40, 30), (20, 30), (20,))))
    operands: list[Array] = {
        "linear": [x, w, b], "layernorm": [x, w[0], x[1]], "llama_rmsnorm": [x, w[0]], "embedding": [np.arange(40) % 20, w],
    }[name]  # fmt: skip
    dy = drawn((40, 20) if name == "linear" else (40, 30), "fp16", True, 9)
    for fast, definition in zip(*both(name, "fp16", operands, dy=dy), strict=True):
        for kind in (np.isnan, np.isposinf, np.isneginf):
            assert np.array_equal(kind(wide(fast)), kind(wide(definition)))


def test_keys_that_a_block_does_not_see_are_left_out() -> None:
    """The one difference: 0 times an Inf that comes later is NaN in the definition, as in PyTorch, and left out in blocks."""
    qkv = np.ones((1, QUERIES + 1, 3), np.float32)
    qkv[0, -1, 2] = np.inf  # v of the last position
    fast, definition = both("attention", "fp32", [qkv], n_head=1)
    assert np.isnan(definition[0][0, :-1]).all() and np.isfinite(fast[0][0, :QUERIES]).all()


# ------------------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("name", ["gelu_tanh", "silu", "swiglu", "layernorm", "llama_rmsnorm", "rope", *GROUPED])
def test_in_blocks_on_threads_the_bits_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = drawn((64, 130), "bf16", True, 1), drawn((130,), "bf16", False, 2), drawn((130,), "bf16", False, 3)
    angles = [drawn((70, 2), "fp32", False, seed) for seed in (4, 5)]
    operands = {
        "swiglu": [x, drawn(x.shape, "bf16", True, 2)], "layernorm": [x, w, b], "llama_rmsnorm": [x, w],
        "rope": [drawn((3, 70, 8), "bf16", True, 1), *angles], **dict.fromkeys(GROUPED, qkv_of_groups(70, "bf16")),
    }.get(name, [x])  # fmt: skip
    sizes = {"n_head": 4, "n_kv_head": 2} if name in GROUPED else {}
    whole = comparable(called(FAST[name], NUMPY, "bf16", operands, **sizes))
    monkeypatch.setattr(blocks, "BLOCK", 512)
    monkeypatch.setattr(numpy_backend, "SHARED", 0)
    assert comparable(called(FAST[name], NUMPY, "bf16", operands, **sizes)) == whole


def noting(op: Op, label: str, names: list[str]) -> Op:
    def forward(*arrays: Any, **more: Any) -> tuple[Array, Any]:
        names.append(f"{label} {op.name}")
        return op.forward(*arrays, **more)

    return replace(op, forward=forward)


def test_a_step_takes_the_fast_versions_and_a_monitored_one_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    fast_versions = {name: noting(op, "fast", names) for name, op in NUMPY.ops.items()}
    monkeypatch.setattr(type(NUMPY), "ops", property(lambda self: fast_versions))
    ours = Ours({**MODELS["smoke"], "model": "llama"}, "fp16")
    ours.step()
    taken = {*names}
    ours = Ours(MODELS["smoke"], "fp16")
    names.clear()
    ours.step()
    taken |= {*names}
    assert taken == {f"fast {name}" for name in FAST if name not in ("relu", "silu", *FUSED)}
    names.clear()
    ours.training.set_monitor(lambda site, before, after: None)
    ours.step()
    assert names == []
    ours.training.set_monitor(None)
    ours.training.run.overrides = {"gelu_tanh": noting(gelu_tanh, "override", names)}
    ours.step()
    assert "override gelu_tanh" in names and "fast gelu_tanh" not in names


def test_the_reference_has_nothing_but_the_definitions() -> None:
    assert REFERENCE.ops == {} and REFERENCE.passes == {} and type(REFERENCE) is Backend
