"""numerics.quantization.registry, scaling_state, and linear layers: each product written out with the quantizers, bounds of its
error, what delayed scaling and stochastic rounding remember, the arguments of a monitor; and that all of this can fail.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from samples import sample

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.autograd import selected
from refimpl.nn.ops import OPS, quantized_linear
from refimpl.nn.quantized_linear import operand as operand_of
from refimpl.numerics.accumulators import matmul
from refimpl.numerics.bits import bits_of
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.numerics.philox import FIRST_OF_TENSORS, STREAMS, random_bits, tensor_stream
from refimpl.numerics.quantization.fp8 import DelayedScaling, quantize_blocks, quantize_rows, quantize_tensor, quantize_tiles
from refimpl.numerics.quantization.mx import quantize_mx
from refimpl.numerics.quantization.nvfp4 import quantize_nvfp4
from refimpl.numerics.quantization.products import product
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, block_amax, spread
from refimpl.numerics.quantization.registry import SCHEMES, quantize_operand, rotated_operand
from refimpl.numerics.quantization.rotation import random_signs, rotate
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.precision.context import OpPrecision, Run
from refimpl.precision.policy import EVERY_OTHER, WIDE_OPS, Policy, Precision, uniform
from refimpl.precision.policy_variants import low_products, with_sums
from refimpl.precision.recipes import RECIPES
from refimpl.step import forward_backward
from refimpl.tools.precision_report.counts import RoundingMonitor
from refimpl.training.config import Config
from refimpl.training.evaluate import mean_loss
from refimpl.training.setup import Training, start

Array = np.ndarray
PLACE = "transformer.h.0.mlp.c_fc"
SEED = 5
B, T, C, F = 2, 72, 136, 160  # more than a block of 128, but no multiple of it; 144 tokens are one of 16, so they are rotated


def normal(*shape: int, seed: int = 0, std: float = 1.0, fmt: str = "bf16") -> Array:
    """Values whose size differs from row to row and column to column, so that scales along either axis differ."""
    rng = np.random.default_rng(seed)
    spread_out = np.exp2(rng.uniform(-3, 3, (shape[0], 1)) + rng.uniform(-3, 3, (1, shape[-1])))
    x = rng.standard_normal(shape) * std
    return cast(x * spread_out if len(shape) == 2 else x, fmt)


def operands(rows: int = B * T) -> tuple[Array, Array, Array, Array]:
    """x (rows, C), w (F, C), b (F,), dy (rows, F): the last as small as gradients are."""
    return normal(rows, C), normal(F, C, seed=1, std=0.02), normal(F, seed=2), normal(rows, F, seed=3, std=1e-5)


def run_of(policy: Policy | str, monitor: Any = None, seed: int = SEED) -> Run:
    policy = RECIPES[policy].policy if isinstance(policy, str) else policy
    return Run(policy, NUMPY, monitor, scales=ScalingState(seed))


def linear(run: Run, x: Array, w: Array, b: Array, dy: Array, place: str = PLACE) -> tuple[Any, dict[str, Array]]:
    """What the operation saved, and its four results."""
    op, p = selected(OPS["linear"], run, place), run.precision("linear", place)
    y, saved = op.forward(x, w, b, p=p)
    return saved, dict(zip(("y", "dx", "dw", "db"), (y, *op.backward(dy, saved, w, b, p=p)), strict=True))


def assert_same(ours: dict[str, Array], expected: dict[str, Array]) -> None:
    """Equal formats, equal bits."""
    for name, array in expected.items():
        assert format_of(ours[name]) == format_of(array), name
        assert np.array_equal(bits_of(ours[name]), bits_of(array)), name


# -------------------------------------------------------------------------------------------------- products, spelled out

Q = Callable[[Array, int, int], Any]
"""(tensor, the axis that is summed over, which of its uses in the pass) -> QuantizedTensor."""


def tensor(fmt: str) -> Q:
    return lambda t, axis, use: quantize_tensor(t, fmt)


def mx(fmt: str, rule: str) -> Q:
    return lambda t, axis, use: quantize_mx(t, fmt, axis, rule)


def rows(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_rows(t, "e4m3", axis)


def tiles(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_tiles(t, "e4m3", axis)


def blocks(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_blocks(t, "e4m3")


def nvfp4(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_nvfp4(t, axis)


def square(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_nvfp4(t, square=True)


def bits(t: Array, use: int, name: str = f"{PLACE}.dy", passes: int = 0, seed: int = SEED) -> Array:
    return random_bits(seed, passes, use << 40, t.size, zlib.crc32(name.encode())).reshape(t.shape)


def nvfp4_sr(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_nvfp4(t, axis, bits=bits(t, use))


def turned(t: Array, axis: int) -> Array:
    return rotate(t, random_signs(SEED), axis) if t.shape[axis] % 16 == 0 else t


def rotated(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_nvfp4(turned(t, axis), axis)


def rotated_sr(t: Array, axis: int, use: int) -> QuantizedTensor:
    return quantize_nvfp4(turned(t, axis), axis, bits=bits(t, use))


FACTORS = {"x": ("e4m3", 12.5), "w": ("e4m3", 700.0), "dy": ("e5m2", 3e7)}
"""What delayed scaling remembers when the layer runs: x and w then saturate in part, dy does not."""


def delayed(operand: str) -> Q:
    fmt, factor = FACTORS[operand]
    f = np.full((1, 1), factor, np.float32)

    def quantize(t: Array, axis: int, use: int) -> QuantizedTensor:
        codes = bits_of(cast(widen(t, "fp32") * f, fmt, overflow="saturate"))
        return QuantizedTensor(codes, fmt, 1 / f, "fp32", t.shape)

    return quantize


def remember(scales: ScalingState) -> None:
    for operand, (fmt, factor) in FACTORS.items():
        state = scales.delayed_scaling(f"{PLACE}.{operand}", fmt)
        state.factor = np.full((), factor, np.float32)


# recipe: (x and w of y, dy and w of dx, dy and x of dw), accumulator
SPELLED: dict[str, tuple[tuple[Q | None, ...], str]] = {
    "fp8": ((tensor("e4m3"), tensor("e4m3"), tensor("e5m2"), tensor("e4m3"), tensor("e5m2"), tensor("e4m3")), "fp32"),
    "fp8-delayed": (tuple(delayed(name) for name in ("x", "w", "dy", "w", "dy", "x")), "fp32"),
    "fp8-e4m3": ((tensor("e4m3"),) * 6, "fp32"),
    "fp8-rows": ((rows,) * 6, "fp32"),
    "fp8-rows-dw-bf16": ((rows, rows, rows, rows, None, None), "fp32"),
    "fp8-blocks": ((tiles, blocks, tiles, blocks, tiles, tiles), "fp32"),
    "mxfp8": ((mx("e4m3", "rceil"),) * 6, "fp32"),
    "mxfp8-floor": ((mx("e4m3", "floor"),) * 6, "fp32"),
    "mxfp6": (tuple(mx(fmt, "floor") for fmt in ("e2m3", "e2m3", "e3m2", "e2m3", "e3m2", "e2m3")), "fp32"),
    "mxfp4": ((mx("e2m1", "floor"),) * 6, "fp32"),
    "nvfp4": ((nvfp4, square, nvfp4_sr, square, rotated_sr, rotated), "fp32"),
    "fp8-14bit": ((tensor("e4m3"),) * 6, "e8m14"),
    "fp8-14bit-128": ((tensor("e4m3"),) * 6, "e8m14/128"),
}


def spelled_out(name: str, x: Array, w: Array, b: Array, dy: Array) -> dict[str, Array]:
    """Each operand quantized along the axis that its own product sums over, from the BF16 tensor; db from dy as it is."""
    (x_y, w_y, dy_dx, w_dx, dy_dw, x_dw), acc = SPELLED[name]
    assert x_y and w_y and dy_dx and w_dx
    gemm = partial(NUMPY.matmul, acc="fp32")  # in the same blocks of rows: on some BLAS a row depends on those beside it
    y = product(x_y(x, 1, 0), w_y(w, 1, 0).T, acc, gemm) + widen(b, "fp32")
    dx = product(dy_dx(dy, 1, 0), w_dx(w, 0, 1), acc, gemm)
    dw = product(dy_dw(dy, 0, 1).T, x_dw(x, 0, 1), acc, gemm) if dy_dw and x_dw else gemm(dy.T, x)
    results = {"y": y, "dx": dx, "dw": dw, "db": widen(dy, "fp32").sum(0)}
    return {key: cast(array, "bf16") for key, array in results.items()}


def assert_spelled_out(name: str, rows: int = B * T) -> None:
    x, w, b, dy = operands(rows)
    run = run_of(name)
    if name == "fp8-delayed":
        remember(run.scales)
    saved, ours = linear(run, x, w, b, dy)
    assert saved[0] is x or np.array_equal(bits_of(saved[0]), bits_of(x)), "what is saved is the tensor before quantization"
    assert_same(ours, spelled_out(name, x, w, b, dy))


@pytest.mark.parametrize("name", SPELLED)
def test_a_linear_layer_is_its_three_products_spelled_out(name: str) -> None:
    assert_spelled_out(name)


@pytest.mark.parametrize("name", ["fp8-rows", "fp8-blocks", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("rows", [1, 24, 33])
def test_any_number_of_tokens_will_do(name: str, rows: int) -> None:
    """Blocks that are not full, one token, and none of them a multiple of 16: `turned` leaves these as they are."""
    assert_spelled_out(name, rows)


def test_every_recipe_that_quantizes_is_spelled_out() -> None:
    assert {name for name, recipe in RECIPES.items() if any(row.quantizes for row in recipe.policy.rows.values())} == {*SPELLED}


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4"])
def test_leading_axes_are_tokens(name: str) -> None:
    x, w, b, dy = operands()
    _, flat = linear(run_of(name), x, w, b, dy)
    _, deep = linear(run_of(name), x.reshape(B, T, C), w, b, dy.reshape(B, T, F))
    assert deep["y"].shape == (B, T, F) and deep["dx"].shape == (B, T, C)
    assert_same({key: array.reshape(flat[key].shape) for key, array in deep.items()}, flat)


@pytest.mark.parametrize("name", SPELLED)
def test_the_last_layer_is_computed_in_bf16(name: str) -> None:
    x, w, b, dy = operands()
    (_, ours), (_, bf16) = (linear(run_of(recipe), x, w, b, dy, "lm_head") for recipe in (name, "bf16"))
    assert_same(ours, bf16)
    _, inner = linear(run_of(name), x, w, b, dy, "h.0.lm_head")
    assert not np.array_equal(inner["y"], bf16["y"])  # a place is the whole name


@pytest.mark.parametrize("name", SPELLED)
def test_all_other_operations_are_those_of_bf16(name: str) -> None:
    ours, bf16 = RECIPES[name].policy, RECIPES["bf16"].policy
    parts = ("scores", "scale", "softmax", "values")
    for key in (*(op for op in OPS if op != "linear"), *(f"attention.{part}" for part in parts), "fan_in", "linear.db"):
        for place in (PLACE, "lm_head", "transformer.h.0.attn"):
            assert ours.row(key, place) == bf16.row(key, place), key
    qkv, dO = normal(2, 6, 24), normal(2, 6, 8, seed=1)
    results = []
    for policy in (name, "bf16"):
        p = run_of(policy).precision("attention", "transformer.h.0.attn")
        O, saved = OPS["attention"].forward(qkv, p=p, n_head=2)  # noqa: E741
        results.append({"O": O, "dqkv": OPS["attention"].backward(dO, saved, p=p, n_head=2)[0]})
    assert_same(*results)


def test_in_a_gpt_linear_layers_but_the_last_are_quantized_and_nothing_else() -> None:
    training, batch = small("mxfp8", model="gpt", n_head=2)
    monitor = RoundingMonitor()
    training.set_monitor(monitor)
    training.step([batch])
    sites, _ = monitor.take()
    layers = [f"transformer.h.0.{layer}" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    quantized = {f"{layer}:linear.{factor}" for layer in layers for factor in ("y.x", "y.w", "dx.dy", "dx.w", "dw.dy", "dw.x")}
    assert {site for site, counts in sites.items() if counts.fmt == "e4m3"} == quantized
    assert {counts.fmt for site, counts in sites.items() if site not in quantized} == {"bf16"}
    assert "lm_head:linear.y.y" in sites


# ----------------------------------------------------------------------------------------------------------------- bounds


def amax_of(x: Array, block: tuple[int, ...]) -> Array:
    """The largest magnitude of its block, for each element."""
    return np.broadcast_to(spread(widen(block_amax(widen(x, "fp32"), block), "fp64"), block, x.shape), x.shape)


def worst_scale(scheme: str, x: Array, axis: int) -> tuple[str, Array, Array]:
    """Element format, an upper bound of each element's scale, and how much may saturate, for a scheme and bf16 x.

    tensor, 1x128, 128x128    amax / max
    rows                      below twice that: a factor rounded down to a power of two
    rceil                     below twice that, ceil and even: below 2 amax / 2^emax; nothing saturates under rceil and ceil
    floor                     at most amax / 2^emax; x < 2^(emax + 1) scale: at most 1 - max / 2^(emax + 1) of it is cut off.
                              under even less
    nvfp4                     S_block = e4m3(amax / 6 S_enc) is off by 1/17 of S_block / S_enc, or 2^-10 / S_enc where it is
                              subnormal: then as much is cut off
    """
    kind, *rest = scheme.split("-")
    fmt = rest[0] if kind == "mx" else "e2m1" if kind == "nvfp4" else kind
    largest, emax = FORMATS[fmt].max, math.frexp(FORMATS[fmt].max)[1] - 1
    amax, nothing = amax_of(x, block_of(scheme, x.shape, axis)), np.zeros(x.shape)
    if kind == "nvfp4":
        unit = amax_of(x, x.shape) / (448 * 6)  # 1 / S_enc
        off = np.maximum(amax / 6 / 17, 2.0**-10 * unit)
        return fmt, amax / 6 + off, 6 * off
    if kind == "mx":
        cut = (1 - largest / 2.0 ** (emax + 1)) * np.abs(widen(x, "fp64"))
        scale = {"floor": amax / 2.0**emax, "rceil": 2 * amax / largest}.get(rest[1], 2 * amax / 2.0**emax)
        return fmt, scale, cut if rest[1] in ("floor", "even") else nothing
    return fmt, amax / largest * (2 if rest == ["rows"] else 1), nothing


def block_of(scheme: str, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of a block: (rows, columns), or so many along the axis."""
    name = next(name for name in ("tensor", "rows", "128x128", "1x128", "16x16", "mx", "nvfp4") if name in scheme)
    along = {"rows": 1 << 30, "1x128": 128, "mx": 32, "nvfp4": 16}.get(name, 1)
    size = {"tensor": shape, "128x128": (128, 128), "16x16": (16, 16)}.get(name, (1, along) if axis else (along, 1))
    return tuple(min(a, b) for a, b in zip(shape, size, strict=True))


def error_bound(scheme: str, x: Array, axis: int) -> Array:
    """Half an ulp of each element (a whole one where it is rounded by chance) or what saturates; 8 roundings of FP32."""
    fmt, scale, cut = worst_scale(scheme, x, axis)
    row, magnitude = FORMATS[fmt], np.abs(widen(x, "fp64"))
    ulp = np.maximum(row.eps * magnitude, row.smallest_subnormal * scale)
    return np.maximum(ulp * (1 if scheme.endswith("-sr") else 0.5), cut) * (1 + 2**-20) + 8 * 2.0**-24 * magnitude


CURRENT = sorted(scheme for scheme in SCHEMES if "delayed" not in scheme)


@pytest.mark.parametrize("scheme", CURRENT)
@pytest.mark.parametrize("axis", [0, 1])
def test_an_operands_error_is_within_the_schemes_bound(scheme: str, axis: int) -> None:
    x = normal(B * T, C)
    x[3:20, 5:40], x[7] = cast(np.float32(1e-6), "bf16"), 0  # whole blocks that are small beside the tensor, and zeros
    scales = ScalingState(SEED)
    source = widen(rotated_operand(scales, scheme, x, axis), "fp64")
    q = quantize_operand(scales, scheme, x, axis, "x")
    bound = error_bound(scheme, cast(source, "fp32"), axis)
    error = np.abs(q.dequantize("fp64") - source)
    assert (error <= bound).all()
    assert (error > 0.5 * bound)[bound > 0].any()  # and the bound is no empty one


FACTORS_OF = {  # of a recipe: the schemes of x, w; dy, w; dy, x
    "fp8": ("e4m3-tensor", "e4m3-tensor", "e5m2-tensor", "e4m3-tensor", "e5m2-tensor", "e4m3-tensor"),
    "fp8-e4m3": ("e4m3-tensor",) * 6,
    "fp8-rows": ("e4m3-rows",) * 6,
    "fp8-blocks": ("e4m3-1x128", "e4m3-128x128", "e4m3-1x128", "e4m3-128x128", "e4m3-1x128", "e4m3-1x128"),
    "mxfp8": ("mx-e4m3-rceil",) * 6,
    "mxfp8-floor": ("mx-e4m3-floor",) * 6,
    "mxfp6": ("mx-e2m3-floor", "mx-e2m3-floor", "mx-e3m2-floor", "mx-e2m3-floor", "mx-e3m2-floor", "mx-e2m3-floor"),
    "mxfp4": ("mx-e2m1-floor",) * 6,
    "nvfp4": ("nvfp4", "nvfp4-16x16", "nvfp4-sr", "nvfp4-16x16", "nvfp4-rotated-sr", "nvfp4-rotated"),
}


@pytest.mark.parametrize("name", FACTORS_OF)
def test_a_products_error_is_within_the_sum_of_its_operands_bounds(name: str) -> None:
    """|qa qb - a b| <= |a| eb + ea |b| + ea eb, and K + 8 roundings of FP32 of |qa| |qb|; then one to BF16.

    The rotation cancels: a product of rotated operands is that of the operands, but for 18 roundings of each element.
    """
    x, w, b, dy = operands()
    _, ours = linear(run_of(name), x, w, b, dy)
    scales = ScalingState(SEED)
    wide = {key: widen(array, "fp64") for key, array in (("x", x), ("w", w), ("b", b), ("dy", dy))}
    factors = {"y": ((x, 1), (w, 1)), "dx": ((dy, 1), (w, 0)), "dw": ((dy, 0), (x, 0))}
    exact = {"y": wide["x"] @ wide["w"].T + wide["b"], "dx": wide["dy"] @ wide["w"], "dw": wide["dy"].T @ wide["x"]}
    for i, (key, pair) in enumerate(factors.items()):
        sizes, errors = [], []
        for scheme, (t, axis) in zip(FACTORS_OF[name][2 * i : 2 * i + 2], pair, strict=True):
            source = rotated_operand(scales, scheme, t, axis)
            error = error_bound(scheme, cast(source, "fp32"), axis)
            if source is not t:
                error += 18 * 2.0**-24 * rotate_sizes(t, axis)
            sizes.append(np.abs(widen(source, "fp64")) if axis else np.abs(widen(source, "fp64")).T)
            errors.append(error if axis else error.T)
        (A, Bt), (ea, eb) = sizes, errors  # (M, K) and (N, K)
        bound = A @ eb.T + ea @ Bt.T + ea @ eb.T
        bound += (A.shape[1] + 8) * 2.0**-24 * (A + ea) @ (Bt + eb).T
        if key == "y":
            bound += 2.0**-24 * np.abs(wide["b"])
        bound = bound * (1 + 2.0**-8) + 2.0**-8 * np.abs(exact[key])
        assert (np.abs(widen(ours[key], "fp64") - exact[key]) <= bound).all(), key


def rotate_sizes(t: Array, axis: int) -> Array:
    """For each element of a rotated tensor, the sum of |t| / 4 over its block: what its rounding errors are relative to."""
    a = np.moveaxis(np.abs(widen(t, "fp64")), axis, -1)
    sums = a.reshape(*a.shape[:-1], -1, 16).sum(-1, keepdims=True) / 4
    return np.moveaxis(np.broadcast_to(sums, (*sums.shape[:-1], 16)).reshape(a.shape), -1, axis)


# --------------------------------------------------------------------------------------------------------- delayed scaling


def small(recipe: str, **more: Any) -> tuple[Training, tuple[Array, Array]]:
    """A run of a small MLP of one hidden layer, and a batch of random tokens."""
    sizes = {"model": "mlp", "n_layer": 1, "n_embd": 16, "block_size": 8, "batch_size": 16, "warmup": 0, "lr": 0.02}
    config = Config.of({**sizes, "recipe": recipe, "seed": SEED, **more})
    return start(config), batch_of(0)


def batch_of(seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (16, 8)), rng.integers(0, 256, (16, 8))


class Restated:
    """Transformer Engine's delayed scaling of one tensor, in Python's numbers: algorithms.md section 6.

    amax history of n places, one of them the step's: the largest of the last n steps, this one included, makes the next
    scale = (max / amax) / 2^margin, margin 0; zero or not finite, it keeps the old one.
    """

    def __init__(self, fmt: str, n: int) -> None:
        self.largest, self.factor = {"e4m3": 448.0, "e5m2": 57344.0}[fmt], 1.0
        self.window: deque[float] = deque(maxlen=n)

    def after_step(self, amax: float) -> None:
        self.window.append(amax)
        amax = max(self.window)
        if 0 < amax < math.inf:
            self.factor = float(np.float32(self.largest) / np.float32(amax))


class Watched:
    """Every largest magnitude that delayed scaling is shown, and every update, by the state's identity."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.amax: dict[int, list[float]] = {}
        self.updates: dict[int, int] = {}
        self.factors: dict[int, list[float]] = {}
        quantize, update = DelayedScaling.quantize, DelayedScaling.update

        def watched_quantize(state: DelayedScaling, x: Array) -> QuantizedTensor:
            self.amax.setdefault(id(state), []).append(float(np.abs(widen(x, "fp64")).max()))
            self.factors.setdefault(id(state), []).append(float(state.factor))
            return quantize(state, x)

        def watched_update(state: DelayedScaling) -> None:
            self.updates[id(state)] = self.updates.get(id(state), 0) + 1
            update(state)

        monkeypatch.setattr(DelayedScaling, "quantize", watched_quantize)
        monkeypatch.setattr(DelayedScaling, "update", watched_update)


NAMES = {"h.0.fc.x.e4m3": "e4m3", "h.0.fc.w.e4m3": "e4m3", "h.0.fc.dy.e5m2": "e5m2"}


def assert_follows_the_rule(monkeypatch: pytest.MonkeyPatch, micro_batches: int = 1) -> None:
    """Ten steps with a history of three; evaluation and sampling between them."""
    watched = Watched(monkeypatch)
    training, _ = small("fp8-delayed", grad_accum=micro_batches)
    scales = training.run.scales
    scales.delayed = {name: DelayedScaling(fmt, 3) for name, fmt in NAMES.items()}
    states, restated = dict(scales.delayed), {name: Restated(fmt, 3) for name, fmt in NAMES.items()}
    seen_at_once = []
    for step in range(10):
        watched.amax.clear(), watched.updates.clear(), watched.factors.clear()
        training.step([batch_of(100 * step + i) for i in range(micro_batches)])
        assert scales.delayed == states and scales.passes == step + 1  # the same objects, no other tensors
        for name, state in states.items():
            expected, amax = restated[name], watched.amax[id(state)]
            assert set(watched.factors[id(state)]) == {expected.factor}, name  # the one of past steps, in the whole pass
            assert len(amax) == 2 * micro_batches and watched.updates[id(state)] == 1
            expected.after_step(max(amax))
            assert float(state.factor) == expected.factor, name
            seen_at_once.append(max(amax) > amax[0])
        before = {name: array.copy() for name, array in scales.arrays().items()}
        mean_loss(training.model, training.state, training.run, [batch_of(7)])
        sample(training.model, training.state, training.run, 3)
        with np.errstate(all="ignore"):
            batches, frozen = [batch_of(8)] * micro_batches, training.run.frozen()
            forward_backward(training.model, batches, training.state, np.float32(1e3), frozen)
        after = scales.arrays()
        assert all(np.array_equal(before[name], after[name]) for name in before) and scales.passes == step + 1
    assert any(seen_at_once) == (micro_batches > 1)  # x, w and dy are each seen twice a micro-batch, and are the same then


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_delayed_scaling_follows_transformer_engines_rule(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_follows_the_rule(monkeypatch, micro_batches)


def test_histories_are_1024_steps_long_and_gradients_e5m2() -> None:
    training, batch = small("fp8-delayed")
    training.step([batch])
    assert {name: state.fmt for name, state in training.run.scales.delayed.items()} == NAMES
    assert {len(state.amax_history) for state in training.run.scales.delayed.values()} == {1024}


def test_evaluation_uses_what_training_remembers() -> None:
    training, batch = small("fp8-delayed")
    for _ in range(2):
        training.step([batch])
    loss = mean_loss(training.model, training.state, training.run, [batch])
    for name in ("h.0.fc.x.e4m3", "h.0.fc.w.e4m3"):
        training.run.scales.delayed[name].factor = np.full((), 1e-3, np.float32)  # all flushed to zero
    assert mean_loss(training.model, training.state, training.run, [batch]) != loss


def test_a_frozen_run_shares_all_but_what_it_would_change() -> None:
    run = run_of("nvfp4", monitor := RoundingMonitor())
    frozen = run.frozen()
    assert (frozen.policy, frozen.backend, frozen.monitor) == (run.policy, run.backend, monitor)
    assert frozen.scales.is_frozen and not run.scales.is_frozen and frozen.scales.seed == SEED
    assert frozen.precision("linear", PLACE).run is frozen
    first = frozen.scales.random_bits("dy", (8,))
    assert np.array_equal(run.scales.random_bits("dy", (8,)), first)  # drawing there has not advanced this one
    frozen.scales.after_pass()
    assert run.scales.passes == frozen.scales.passes == 0


def test_one_tensor_in_two_formats_has_two_states() -> None:
    scales, x = ScalingState(), normal(8, 32)
    found = [quantize_operand(scales, f"{fmt}-delayed", x, 1, "a.x").fmt for fmt in ("e4m3", "e5m2", "e4m3")]
    assert found == ["e4m3", "e5m2", "e4m3"]
    scales.after_pass()
    factors = {name: float(state.factor) for name, state in scales.delayed.items()}
    assert factors["a.x.e5m2"] == pytest.approx(factors["a.x.e4m3"] * 57344 / 448)


# -------------------------------------------------------------------------------------------------------------- chance


def test_two_tensors_never_draw_the_same_bits() -> None:
    """These two words have one CRC-32; without the check they would be rounded alike."""
    scales = ScalingState(SEED)
    scales.random_bits("plumless", (4,))
    scales.random_bits("plumless", (4,))
    for frozen in (scales, scales.frozen()):
        with pytest.raises(ValueError, match=r"^buckeroo and plumless would get the same random bits"):
            frozen.random_bits("buckeroo", (4,))


def test_signs_are_not_what_weights_or_tensors_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of their own; and a tensor whose CRC-32 is that of another use takes the next free one."""
    signs = random_signs(SEED, 64)
    others = [random_bits(SEED, 0, 0, 64, stream) for use, stream in STREAMS.items() if use != "signs"]
    for crc in (*STREAMS.values(), FIRST_OF_TENSORS):
        monkeypatch.setattr(zlib, "crc32", lambda _, crc=crc: crc)
        others.append(ScalingState(SEED).random_bits("a", (64,)))
        assert tensor_stream("a") not in STREAMS.values()
    assert all(not np.array_equal(np.sign(signs), np.where(bits >> 31, -1, 1)) for bits in others)


def test_stochastic_rounding_has_other_bits_for_each_site_use_pass_and_seed() -> None:
    drawn = []
    for seed in (0, 1):
        scales = ScalingState(seed)
        for passes in range(2):
            for name in ("h.0.fc.dy", "h.1.fc.dy"):
                for use in range(3):
                    got = scales.random_bits(name, (4, 50))
                    assert np.array_equal(got, bits(got, use, name, passes, seed))
                    drawn.append(got)
            scales.after_pass()
    assert len({x.tobytes() for x in drawn}) == len(drawn) == 24
    # independent ones share a bit with the chance of 1/2: of 6400 within 5 standard deviations
    agree = [int(np.bitwise_count(~(a ^ b)).sum()) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert all(abs(n - 3200) < 5 * 40 for n in agree)


def gradients(run: Run) -> dict[str, Array]:
    x, w, b, dy = operands()
    return linear(run, x, w, b, dy)[1]


def test_equal_seeds_give_equal_bits_and_other_ones_other_gradients() -> None:
    first, again, other = gradients(run_of("nvfp4")), gradients(run_of("nvfp4")), gradients(run_of("nvfp4", seed=6))
    assert_same(again, first)
    assert np.array_equal(other["y"], first["y"])  # forward rounds to nearest, and is not rotated
    assert not np.array_equal(other["dx"], first["dx"]) and not np.array_equal(other["dw"], first["dw"])
    run = run_of("nvfp4")
    gradients(run)
    second = gradients(run)  # a second micro-batch
    run.scales.after_pass()
    third = gradients(run)
    assert len({g["dx"].tobytes() for g in (first, second, third)}) == 3


def test_the_mean_of_many_stochastic_gradients_is_right() -> None:
    """E of an element is x, so that of n draws is off by an ulp / sqrt(n) at most (of a variance of 1/4 ulp^2: 5 sigma)."""
    dy, n = cast(normal(16, 32, seed=3, std=1e-5), "fp32"), 400
    scales, total = ScalingState(SEED), np.zeros((16, 32))
    for _ in range(n):
        total += quantize_operand(scales, "nvfp4-sr", dy, 1, "dy").dequantize("fp64")
    q = quantize_operand(scales, "nvfp4-sr", dy, 1, "dy")
    scale = spread(widen(q.scale_values(), "fp64") * float(q.tensor_scale), q.block, q.shape)
    inside = np.abs(dy) < 6 * scale  # the largest of a block may saturate
    ulp = np.maximum(0.5 * np.abs(dy), 0.5 * scale)
    assert (np.abs(total / n - dy) <= 5 * 0.5 * ulp / math.sqrt(n))[inside].all()
    nearest = quantize_operand(scales, "nvfp4", dy, 1, "dy").dequantize("fp64")
    assert not (np.abs(nearest - dy) <= 5 * 0.5 * ulp / math.sqrt(n))[inside].all()


def test_the_rotation_cancels() -> None:
    """dw of rotated operands is dw but for the roundings of 16 sums on either side: 18 U of the sums of sizes."""
    x, _, _, dy = operands()
    scales = ScalingState(SEED)
    dy_r, x_r = rotated_operand(scales, "nvfp4-rotated-sr", dy, 0), rotated_operand(scales, "nvfp4-rotated", x, 0)
    assert not np.allclose(dy_r, widen(dy, "fp32")) and not np.allclose(x_r, widen(x, "fp32"))
    exact = widen(dy, "fp64").T @ widen(x, "fp64")
    bound = 2 * 18 * 2.0**-24 * rotate_sizes(dy, 0).T @ rotate_sizes(x, 0)
    assert (np.abs(widen(dy_r, "fp64").T @ widen(x_r, "fp64") - exact) <= bound).all()
    # control: with the signs of another seed it does not
    strange = rotated_operand(ScalingState(SEED + 1), "nvfp4-rotated", x, 0)
    assert not (np.abs(widen(dy_r, "fp64").T @ widen(strange, "fp64") - exact) <= bound).all()


def test_what_16_does_not_divide_is_not_rotated() -> None:
    scales = ScalingState(SEED)
    for n in (1, 15, 24, 40):
        x = normal(n, 32)
        assert rotated_operand(scales, "nvfp4-rotated", x, 0) is x
    x = normal(32, 32)
    assert rotated_operand(scales, "nvfp4-rotated", x, 0) is not x and rotated_operand(scales, "nvfp4", x, 0) is x
    rotating = {scheme for scheme in SCHEMES if rotated_operand(scales, scheme, x, 0) is not x}
    assert rotating == {"nvfp4-rotated", "nvfp4-rotated-sr"}


# ---------------------------------------------------------------------------------------------------------- what is kept


def test_scales_are_kept_and_loaded() -> None:
    whole = ScalingState(SEED)
    for step in range(6):
        for fmt in ("e4m3", "e5m2"):
            quantize_operand(whole, f"{fmt}-delayed", normal(8, 32, seed=step), 1, "transformer.h.0.mlp.c_fc.x")
        whole.after_pass()
    arrays = whole.arrays()
    name = "transformer.h.0.mlp.c_fc.x"
    assert sorted(arrays) == [f"{name}.{fmt}.{key}" for fmt in ("e4m3", "e5m2") for key in ("amax_history", "factor")]
    read_only = {key: np.array(array) for key, array in arrays.items()}
    for array in read_only.values():
        array.flags.writeable = False
    resumed = ScalingState(SEED)
    resumed.load(6, read_only)
    for step in range(6, 9):
        for scales in (whole, resumed):
            quantize_operand(scales, "e4m3-delayed", normal(8, 32, seed=step), 1, name)
            drawn = scales.random_bits(name, (5,))
            scales.after_pass()
        assert scales.passes == whole.passes == step + 1
        assert np.array_equal(drawn, random_bits(SEED, step, 0, 5, zlib.crc32(name.encode())))
    for key, array in whole.arrays().items():
        assert np.array_equal(array, resumed.arrays()[key]), key


HISTORY, FACTOR = np.zeros(4, np.float32), np.ones((), np.float32)
KEPT = {"a.x.e4m3.amax_history": HISTORY, "a.x.e4m3.factor": FACTOR}


@pytest.mark.parametrize(
    "arrays",
    [
        {"factor": FACTOR},
        {"e4m3.factor": FACTOR, "e4m3.amax_history": HISTORY},  # no tensor
        {"a.x.e4m3.factor": FACTOR},  # not whole
        {**KEPT, "a.x.e4m3.more": FACTOR},
        {"a.x.e9m9.amax_history": HISTORY, "a.x.e9m9.factor": FACTOR},
        {"a.x.bf16.amax_history": HISTORY, "a.x.bf16.factor": FACTOR},
        {**KEPT, "a.x.e4m3.amax_history": np.zeros((2, 2), np.float32)},
        {**KEPT, "a.x.e4m3.amax_history": np.zeros(0, np.float32)},
        {**KEPT, "a.x.e4m3.amax_history": np.zeros(4)},
        {**KEPT, "a.x.e4m3.factor": np.ones(1, np.float32)},
        {**KEPT, "": FACTOR},
    ],
)
def test_what_scales_do_not_keep_is_refused_and_nothing_changes(arrays: dict[str, Array]) -> None:
    scales = ScalingState(SEED, passes=3)
    scales.load(3, KEPT)
    with pytest.raises(ValueError, match=r"."):
        scales.load(9, arrays)
    assert scales.passes == 3 and list(scales.delayed) == ["a.x.e4m3"]


# ---------------------------------------------------------------------------------------------------------------- monitor


def watched(policy: str, x: Array, w: Array, b: Array, dy: Array, prepare: Callable[[ScalingState], None] | None = None) -> Any:
    run = run_of(policy, monitor := RoundingMonitor())
    if prepare is not None:
        prepare(run.scales)
    _, results = linear(run, x, w, b, dy)
    sites, _ = monitor.take()
    return {site.removeprefix(f"{PLACE}:linear."): counts for site, counts in sites.items()}, results


@pytest.mark.parametrize("name", [n for n in SPELLED if n != "fp8-delayed"])
def test_a_monitor_is_told_of_every_factor_and_changes_nothing(name: str) -> None:
    sites, results = watched(name, *operands())
    assert_same(results, linear(run_of(name), *operands())[1])
    schemes = SPELLED[name][0]
    for key, quantize in zip(("y.x", "y.w", "dx.dy", "dx.w", "dw.dy", "dw.x"), schemes, strict=True):
        if quantize is None:
            assert key not in sites  # BF16 already
            continue
        x, w, _, dy = operands()
        q = quantize({"x": x, "w": w, "dy": dy}[key.partition(".")[2]], 0, 1)
        counts, row = sites[key], FORMATS[q.fmt]
        assert counts.fmt == q.fmt and counts.elements == q.codes.size and counts.zeros == counts.overflowed == 0
        assert row.max / 4 < counts.largest < {"mx": 2 ** (math.frexp(row.max)[1])}.get(name[:2], row.max * 17 / 16 + 1e-3)
        assert counts.saturated == 0 or "floor" in name or name in ("mxfp6", "mxfp4")
        assert counts.snr > 10  # in units of elements; unrotated or unscaled values would be far off


def test_saturations_and_flushes_of_a_stale_scale_are_counted() -> None:
    """Against the operands themselves: beyond 464 (the tie goes to 448) saturates; below 2^-10, its tie included, is zero."""
    x, w, b, dy = operands()
    sites, _ = watched("fp8-delayed", x, w, b, dy, remember)
    for key, operand, t in (("y.x", "x", x), ("y.w", "w", w), ("dx.dy", "dy", dy), ("dw.x", "x", x)):
        fmt, factor = FACTORS[operand]
        scaled = np.abs(widen(t, "fp32") * np.float32(factor))
        counts, smallest = sites[key], FORMATS[fmt].smallest_subnormal
        assert counts.saturated == np.count_nonzero(scaled > {"e4m3": 464, "e5m2": 61440}[fmt]), key
        assert counts.flushed == np.count_nonzero((scaled > 0) & (scaled <= smallest / 2)), key
        assert counts.overflowed == 0
    assert sites["y.x"].saturated > 0 and sites["y.w"].flushed > 0


def test_mx_floor_is_seen_to_saturate_and_rceil_is_not() -> None:
    """Of uniform significands of the largest in a block, those above 464 / 512 of the top binade."""
    floor, rceil = (watched(name, *operands())[0]["y.x"] for name in ("mxfp8-floor", "mxfp8"))
    x = operands()[0]
    magnitude = np.abs(widen(x, "fp64"))
    scale = 2.0 ** (np.floor(np.log2(amax_of(x, (1, 32)))) - 8)
    assert floor.saturated == np.count_nonzero(magnitude / scale > 464) > 0
    assert rceil.saturated == 0


def test_blocks_that_are_too_small_for_their_scale_are_flushed_and_zeros_are_exact() -> None:
    x, w, b, dy = operands(32)
    x[4], x[9] = 0, cast(np.float32(1e-9), "bf16")  # 1e-9 / 6 is below 2^-10 of the tensor's smallest scale: S_block = 0
    sites, results = watched("nvfp4", x, w, b, dy)
    counts = sites["y.x"]
    assert counts.zeros == C and counts.overflowed == counts.saturated == 0 and counts.flushed >= C
    without = x.copy()
    without[9] = 0
    assert np.array_equal(results["y"], linear(run_of("nvfp4"), without, w, b, dy)[1]["y"])  # they are zero indeed
    assert np.isfinite(counts.snr) and counts.elements == x.size


def test_a_monitor_sees_rotated_elements_rotated() -> None:
    """One outlier in each 16 tokens: unrotated, it alone is near 6 and the rest is flushed."""
    x, w, b, dy = operands()
    x[...] = cast(normal(B * T, C, fmt="fp32") * 0 + np.float32(0.01), "bf16")
    x[::16] = 40
    sites, _ = watched("nvfp4", x, w, b, dy)
    assert sites["dw.x"].share("flushed") == 0 and sites["dw.x"].largest > 3
    assert sites["y.x"].largest <= 6.375


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("alone", ["x", "w"])
def test_both_factors_are_quantized_or_none(alone: str) -> None:
    bf16 = Precision("bf16", "fp32", "bf16")
    policy = Policy("p", {EVERY_OTHER: bf16, "linear.y": Precision({alone: "e4m3-tensor"}, "fp32", "bf16")})
    x, w, b, _ = operands()
    with pytest.raises(TypeError, match=r"linear\.y: a policy quantizes both factors of a product, or none"):
        quantized_linear.forward(x, w, b, p=run_of(policy).precision("linear", "here"))


def test_a_device_that_knows_no_schemes_refuses_them() -> None:
    class Device:
        name, on_host, xp = "cupy", False, np

    for name in ("fp8", "fp16-sums"):
        with pytest.raises(UsageError, match=r"cannot run policy .*: give --backend numpy"):
            Run(RECIPES[name].policy, Device())
    Run(RECIPES["fp16"].policy, Device())


# ------------------------------------------------------------------------------------------------------------ accumulators


@pytest.mark.parametrize("acc", ["e8m14", "e8m14/128", "fp16", "fp16/64/fp16", "bf16", "tf32"])
@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_sums_of_a_linear_layer_are_those_of_its_accumulator(acc: str, fmt: str) -> None:
    """The bias comes after them in FP32, and db is no product: its sum is in FP32."""
    products = dict.fromkeys(("linear.y", "linear.dx", "linear.dw"), Precision(fmt, acc, fmt))
    policy = replace(uniform(fmt, "fp32"), rows={**uniform(fmt, "fp32").rows, **products})
    x, w, b, dy = (cast(widen(t, "fp32"), fmt) for t in operands(40))
    dy = cast(widen(dy, "fp32") * np.float32(1e4), fmt)
    _, ours = linear(run_of(policy), x, w, b, dy)
    wide = widen(b, "fp32"), widen(dy, "fp32").sum(0)
    gemm = partial(NUMPY.matmul, acc="fp32")
    products = {"y": matmul(x, w.T, acc, gemm), "dx": matmul(dy, w, acc, gemm), "dw": matmul(dy.T, x, acc, gemm)}
    results = {**products, "y": products["y"] + wide[0], "db": wide[1]}
    assert_same(ours, {key: cast(array, fmt) for key, array in results.items()})
    _, plain = linear(run_of(uniform(fmt, "fp32")), x, w, b, dy)
    assert not np.array_equal(plain["y"], ours["y"])  # it makes a difference


def test_the_recipes_of_fp16_sums() -> None:
    for name, acc in (("fp16-sums", "fp16"), ("fp16-sums-64", "fp16/64/fp16")):
        assert RECIPES[name].policy.row("linear.y", PLACE) == Precision("fp16", acc, "fp16")
        assert RECIPES[name].policy.rows == with_sums(name, acc).rows
        others = {key: row for key, row in RECIPES[name].policy.rows.items() if not key.startswith("linear.")}
        assert others == RECIPES["fp16"].policy.rows


def test_fp16_sums_stop_growing_and_chunks_of_64_go_on() -> None:
    """4096 products of 1: 2048 + 1 is a tie that goes to 2048 (Wang et al. 2018 call it swamping)."""
    x, w, b = np.ones((1, 4096), np.float16), np.ones((1, 4096), np.float16), np.zeros(1, np.float16)
    for name, total in (("fp16", 4096), ("fp16-sums", 2048), ("fp16-sums-64", 4096)):
        assert quantized_linear.forward(x, w, b, p=run_of(name).precision("linear", PLACE))[0][0, 0] == total, name


# ------------------------------------------------------------------------------------------------------------- the tables

HYBRID = ({"x": "e4m3-tensor", "w": "e4m3-tensor"}, {"dy": "e5m2-tensor", "w": "e4m3-tensor"},
          {"dy": "e5m2-tensor", "x": "e4m3-tensor"})  # fmt: skip


def one(scheme: str) -> tuple[dict[str, str], ...]:
    """The same scheme for all factors."""
    return {"x": scheme, "w": scheme}, {"dy": scheme, "w": scheme}, {"dy": scheme, "x": scheme}


# What the sources say. FP8 papers and TE's HYBRID: e4m3 forward, e5m2 for gradients. torchao: rowwise is e4m3 everywhere,
# rowwise_with_gw_hp leaves dw alone. DeepSeek-V3: e4m3, 1x128 for activations and their gradients, 128x128 for weights.
# MX (Rouhani et al.): one format; e2m3 forward, e3m2 for gradients with 6 bits. NVFP4: weights in 16x16, chance for gradients,
# the rotation for dw.
ROWS: dict[str, tuple[tuple[dict[str, str], ...], str]] = {
    "fp8": (HYBRID, "fp32"),
    "fp8-delayed": (({"x": "e4m3-delayed", "w": "e4m3-delayed"}, {"dy": "e5m2-delayed", "w": "e4m3-delayed"},
                     {"dy": "e5m2-delayed", "x": "e4m3-delayed"}), "fp32"),
    "fp8-e4m3": (one("e4m3-tensor"), "fp32"),
    "fp8-rows": (one("e4m3-rows"), "fp32"),
    "fp8-rows-dw-bf16": ((*one("e4m3-rows")[:2], {"dy": "bf16", "x": "bf16"}), "fp32"),
    "fp8-blocks": (({"x": "e4m3-1x128", "w": "e4m3-128x128"}, {"dy": "e4m3-1x128", "w": "e4m3-128x128"},
                    {"dy": "e4m3-1x128", "x": "e4m3-1x128"}), "fp32"),
    "mxfp8": (one("mx-e4m3-rceil"), "fp32"),
    "mxfp8-floor": (one("mx-e4m3-floor"), "fp32"),
    "mxfp6": (({"x": "mx-e2m3-floor", "w": "mx-e2m3-floor"}, {"dy": "mx-e3m2-floor", "w": "mx-e2m3-floor"},
               {"dy": "mx-e3m2-floor", "x": "mx-e2m3-floor"}), "fp32"),
    "mxfp4": (one("mx-e2m1-floor"), "fp32"),
    "nvfp4": (({"x": "nvfp4", "w": "nvfp4-16x16"}, {"dy": "nvfp4-sr", "w": "nvfp4-16x16"},
               {"dy": "nvfp4-rotated-sr", "x": "nvfp4-rotated"}), "fp32"),
    "fp8-14bit": (one("e4m3-tensor"), "e8m14"),
    "fp8-14bit-128": (one("e4m3-tensor"), "e8m14/128"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_as_their_sources_say(name: str) -> None:
    (y, dx, dw), acc = ROWS[name]
    bf16 = Precision("bf16", "fp32", "bf16")
    assert RECIPES[name].policy.rows == {
        "linear.y": Precision(y, acc, "bf16"), "linear.dx": Precision(dx, acc, "bf16"), "linear.dw": Precision(dw, acc, "bf16"),
        "linear.db": bf16, "lm_head:linear": bf16, EVERY_OTHER: bf16,
        **dict.fromkeys(WIDE_OPS, Precision("fp32", "fp32", "fp32")),
    }  # fmt: skip


def test_every_scheme_is_used_by_a_recipe_or_is_another_mx_rule() -> None:
    used = {scheme for (rows, _) in ROWS.values() for row in rows for scheme in row.values()} - {"bf16"}
    assert used <= set(SCHEMES)
    rules = ("floor", "ceil", "rceil", "even")
    assert set(SCHEMES) - used < {f"mx-{fmt}-{rule}" for fmt in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1") for rule in rules}


def test_no_scheme_has_a_formats_name() -> None:
    """A row's input is one or the other."""
    assert not set(SCHEMES) & {*FORMATS, "same"}


# ---------------------------------------------------------------------------------------------------------------- controls

ALONG_AN_AXIS = ["fp8-rows", "fp8-blocks", "mxfp8", "mxfp8-floor", "mxfp6", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("name", ALONG_AN_AXIS)
def test_control_the_wrong_axis_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def along_the_other(scales: ScalingState, scheme: str, x: Array, axis: int, tensor: str) -> QuantizedTensor:
        return quantize_operand(scales, scheme, x, 1 - axis, tensor)

    monkeypatch.setattr("refimpl.nn.quantized_linear.quantize_operand", along_the_other)
    with pytest.raises((AssertionError, ValueError)):
        assert_spelled_out(name)


@pytest.mark.parametrize("name", ALONG_AN_AXIS)
def test_control_a_quantized_tensor_that_is_quantized_again_for_its_other_axis_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes of keeping x quantized along C for backward, and making the copy along the tokens from it."""
    def from_the_other(scales: ScalingState, scheme: str, x: Array, axis: int, tensor: str) -> QuantizedTensor:
        if axis == 0 and tensor.endswith(".x"):
            x = quantize_operand(scales, scheme.replace("-rotated", ""), x, 1, tensor).dequantize("bf16")
        return quantize_operand(scales, scheme, x, axis, tensor)

    monkeypatch.setattr("refimpl.nn.quantized_linear.quantize_operand", from_the_other)
    with pytest.raises(AssertionError, match="dw"):
        assert_spelled_out(name)


@pytest.mark.parametrize("name", SPELLED)
def test_control_db_from_the_quantized_dy_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = OpPrecision.cast

    def quantized_first(p: OpPrecision, x: Array, name: str) -> Any:
        if p.op == "linear.db":
            return operand_of(run_of("fp8-e4m3").precision("linear", PLACE)["dx"], x, name, 1).dequantize("bf16")
        return plain(p, x, name)

    monkeypatch.setattr(OpPrecision, "cast", quantized_first)
    with pytest.raises(AssertionError, match="db"):
        assert_spelled_out(name)


def test_control_a_bias_that_is_added_after_the_rounding_is_noticed() -> None:
    x, w, b, dy = operands()
    _, ours = linear(run_of("fp8"), x, w, b, dy)
    plain = quantized_linear.forward(x, w, None, p=run_of("fp8").precision("linear", PLACE))[0]
    with pytest.raises(AssertionError):
        assert_same({"y": cast(widen(plain, "fp32") + widen(b, "fp32"), "bf16")}, {"y": ours["y"]})


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_control_scales_that_learn_from_evaluation_are_noticed(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScalingState, "frozen", lambda scales: scales)
    with pytest.raises(AssertionError):
        assert_follows_the_rule(monkeypatch, micro_batches)


def test_control_scales_that_change_within_a_step_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = DelayedScaling.quantize

    def at_once(state: DelayedScaling, x: Array) -> QuantizedTensor:
        q = quantize(state, x)
        state.update()
        return q

    monkeypatch.setattr(DelayedScaling, "quantize", at_once)
    with pytest.raises(AssertionError):
        assert_follows_the_rule(monkeypatch)


def test_control_a_last_layer_that_is_quantized_too_is_noticed() -> None:
    rows = {key: row for key, row in low_products("p", "e4m3-tensor").rows.items() if key != "lm_head:linear"}
    x, w, b, dy = operands()
    (_, ours), (_, bf16) = (linear(run_of(policy), x, w, b, dy, "lm_head") for policy in (Policy("p", rows), "bf16"))
    with pytest.raises(AssertionError):
        assert_same(ours, bf16)
