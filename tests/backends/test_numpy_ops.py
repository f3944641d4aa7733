"""The host's fast versions of operations: bit for bit what their definitions give, and used unless a monitor is set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from recipe_lists import BASIC

from refimpl.backends import base as backends
from refimpl.backends.base import NUMPY, Backend
from refimpl.nn.op import Op
from refimpl.nn.ops import OPS, gelu_tanh
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import format_of
from refimpl.precision import context
from refimpl.precision.context import Run
from refimpl.precision.recipes import RECIPES
from refimpl.tools.bench.steps import MODELS, Ours

Array = Any

SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1.0, -1.0, 11.0, 300.0, -65504.0, 3e38, np.inf, -np.inf, np.nan]
SHAPES = [(1,), (7,), (0, 4), (3, 1), (5, 14), (2, 3, 28), (40, 700)]


def drawn(shape: tuple[int, ...], fmt: str, special: bool, seed: int) -> Array:
    """Normal numbers of several sizes, with special ones among them if wanted."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.choice([0.01, 1.0, 5.0], shape)
    if special:
        x[rng.random(shape) < 0.1] = rng.choice(SPECIAL)
    return cast(x, fmt)


def stored_format(recipe: str, name: str) -> str:
    """The format in which an operation finds its input: that of the weights, but 16 bits for an activation under autocast."""
    own = RECIPES[recipe].state_encodings()["weights"]
    return RECIPES[recipe].policy.row("linear.y").out if name == "gelu_tanh" else own


def both_ways(op: Op, recipe: str, shape: tuple[int, ...], special: bool, bias: bool = True) -> list[bytes]:
    """The bytes of all that an operation returns and saves, forward and backward."""
    fmt = stored_format(recipe, op.name)
    x, dy = drawn(shape, fmt, special, 1), drawn(shape, fmt, special, 2)
    params: list[Array | None] = [drawn(shape[-1:], fmt, False, 3 + i) for i in range(len(op.params))]
    if params and not bias:
        params[-1] = None
    p = Run(RECIPES[recipe].policy, NUMPY).precision(op.name, "here")
    with np.errstate(all="ignore"):
        y, saved = op.forward(x, *params, p=p)
        results = [y, *saved, *op.backward(dy, saved, *params, p=p)]
    return [f"{format_of(a)} {a.shape}".encode() + without_payloads(a) if hasattr(a, "dtype") else b"" for a in results]


def without_payloads(x: Array) -> bytes:
    """The bytes of an array, every NaN the same: which of two NaNs a sum hands on is the processor's choice."""
    bits = x.copy()
    bits[np.isnan(x)] = np.nan
    return bytes(bits.tobytes())


@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", [name for name in BASIC if not name.endswith("-cpu")])
@pytest.mark.parametrize("name", NUMPY.ops)
def test_a_fast_version_gives_the_bits_of_its_definition(name: str, recipe: str, shape: tuple[int, ...], special: bool) -> None:
    assert both_ways(NUMPY.ops[name], recipe, shape, special) == both_ways(OPS[name], recipe, shape, special)


def test_without_a_bias_too() -> None:
    fast, definition = NUMPY.ops["layernorm"], OPS["layernorm"]
    assert both_ways(fast, "fp16", (5, 14), True, False) == both_ways(definition, "fp16", (5, 14), True, False)


@pytest.mark.parametrize("name", NUMPY.ops)
def test_in_blocks_on_threads_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = both_ways(OPS[name], "bf16", (64, 130), True)
    monkeypatch.setattr(context, "MAP_BLOCK", 512)
    monkeypatch.setattr(backends, "SHARED", 0)
    assert both_ways(NUMPY.ops[name], "bf16", (64, 130), True) == expected


def test_the_comparison_bites() -> None:
    """With another order of the same factors some last bits differ, and with a special value it shows at once."""

    def reordered(x: Array, p: context.OpPrecision) -> tuple[Array, Any]:
        y, saved = gelu_tanh.forward(x, p=p)
        return cast(cast(y, "fp64") * (1 + 2.0**-23), format_of(y)), saved

    wrong = Op("gelu_tanh", reordered, gelu_tanh.backward)
    assert both_ways(wrong, "fp32", (5, 14), False) != both_ways(gelu_tanh, "fp32", (5, 14), False)


def test_a_step_takes_the_fast_versions_and_a_monitored_one_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noting(op: Op, label: str) -> Op:
        def forward(*arrays: Any, **more: Any) -> tuple[Array, Any]:
            called.append(f"{label} {op.name}")
            return op.forward(*arrays, **more)

        return Op(op.name, forward, op.backward, op.params)

    fast_versions = {name: noting(op, "fast") for name, op in NUMPY.ops.items()}
    monkeypatch.setattr(type(NUMPY), "ops", property(lambda self: fast_versions))
    ours = Ours(MODELS["smoke"], "fp16")
    ours.step()
    assert sorted(set(called)) == ["fast gelu_tanh", "fast layernorm"]
    called.clear()
    ours.training.set_monitor(lambda site, before, after: None)
    ours.step()
    assert called == []
    ours.training.set_monitor(None)
    ours.training.run.overrides = {"gelu_tanh": noting(gelu_tanh, "override")}
    ours.step()
    assert sorted(set(called)) == ["fast layernorm", "override gelu_tanh"]


def test_fast_versions_are_operations_with_the_same_parameters_and_other_backends_need_none() -> None:
    assert {name: op.params for name, op in NUMPY.ops.items()} == {name: OPS[name].params for name in NUMPY.ops}
    assert Backend("plain", np).ops == {}
