"""What every CUDA kernel must compute, as checks over a `Device`: the host build, or CuPy. No check knows which.

A kernel is held against its NumPy definition in refimpl/nn or refimpl/optim:
  - to the bit, where there is one order of operations and no exp, log or tanh;
  - to the bit, where the device's exp, log and tanh are the C library's, against the definition computed with those;
  - otherwise within what a correct evaluation can give (bounds.py), which for 16 bits is mostly one number.
Sums have another order than NumPy's: such kernels are held to the bit against a restatement with their own tree, and within
bounds.py against the definition. NaNs are compared as such, and where sums begin with a zero, zeros without their sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, pairwise, product
from typing import Any

import numpy as np
from arrays import Array, array, wide
from bounds import (
    Near,
    cross_entropy_near,
    embedding_near,
    gamma,
    gelu_tanh_near,
    layernorm_near,
    llama_rmsnorm_near,
    near,
    possible,
    silu_near,
    softmax_of,
    softmax_slope,
    stored,
    swiglu_near,
)

from refimpl.backends.cupy.launch import COLUMNS, LANES, THREADS, WARP, WARPS, elementwise_grid
from refimpl.backends.numpy.backend import NUMPY, NumPyBackend
from refimpl.nn.models.model import Model, Parameter
from refimpl.nn.ops import OPS, fan_in
from refimpl.nn.softmax import unrounded_softmax
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of
from refimpl.optim.adamw import AdamW
from refimpl.optim.gradients import check_and_measure
from refimpl.optim.layout import GRAIN
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.state import State
from refimpl.precision.context import OpPrecision, Run
from refimpl.precision.recipes import get_recipe

EPS = np.float32(1e-5)
MANY = 1_000_003  # no multiple of anything: the last threads of the last block have nothing to do


@dataclass(frozen=True)
class Device:
    """Where kernels run. launch(fmt, kernel, grid, *arguments) takes NumPy arrays and writes its results into them."""

    launch: Callable[..., None]
    functions: Any = None  # exp, log and tanh as this device computes them, if NumPy can have them too
    flushes: bool = False  # whether fp32 numbers below the smallest normal one become zero


class CFunctions:
    """NumPy, but for exp, log and tanh, which are the C library's."""

    def __init__(self, c_function: Callable[[str, Array], Array]) -> None:
        self.c_function = c_function

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def exp(self, x: Array) -> Array:
        return self.c_function("expf", x)

    def log(self, x: Array) -> Array:
        return self.c_function("logf", x)

    def tanh(self, x: Array) -> Array:
        return self.c_function("tanhf", x)


def bound(fmt: str, op: str, functions: Any = None) -> OpPrecision:
    """The `p` of an operation in the recipe `fmt`, with exp, log and tanh from `functions`."""
    backend = NumPyBackend("functions", functions) if functions else NUMPY
    return Run(get_recipe(fmt).policy, backend).precision(op, "here")


# ------------------------------------------------------------------------------------------------------------- arrays


def empty(shape: int | tuple[int, ...], fmt: str) -> Array:
    """Memory that a kernel must fill: what it leaves out stays NaN."""
    return np.full(shape, np.nan, dtype_of(fmt))


def normal(rng: np.random.Generator, shape: int | tuple[int, ...], fmt: str, size: float = 1.0) -> Array:
    return array(rng.standard_normal(shape) * size, fmt)


def all_kinds(rng: np.random.Generator, n: int, fmt: str, tiny: bool) -> Array:
    """Half of them random codes (every size, both zeros, infinities, NaNs), half ordinary numbers, in any order.

    tiny=False: no numbers below 2^-20, so that nothing computed from a few of them vanishes where fp32 has no subnormals.
    """
    dtype = dtype_of(fmt)
    codes = np.frombuffer(rng.bytes(dtype.itemsize * (n // 2)), dtype)
    x = rng.permutation(np.concatenate([codes, normal(rng, n - n // 2, fmt)]))
    if not tiny:
        x[np.abs(widen(x)) < 2.0**-20] = 0
    return x


def assert_same(got: Array, expected: Array, zeros: bool = True) -> None:
    """The same bits, NaNs as such; zeros=False: a zero is a zero."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, (got.dtype, got.shape, expected.dtype, expected.shape)
    a, b = wide(got), wide(expected)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if zeros:
        same &= (np.signbit(a) == np.signbit(b)) | np.isnan(a)
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ, such as {a[~same][:3]}, expected {b[~same][:3]}"


def assert_possible(got: Array, exact: Near, fmt: str) -> None:
    """Each element is one that a correct evaluation can give."""
    least, greatest = possible(exact, fmt)
    inside = (least <= wide(got)) & (wide(got) <= greatest)
    assert inside.all(), f"{np.count_nonzero(~inside)} of {inside.size} are impossible, such as {wide(got)[~inside][:3]}"


def tree_sum(x: Array, width: int = THREADS) -> Array:
    """The sums of the last axis in the kernels' order: `width` threads add theirs first to last, then a tree folds them."""
    full = np.zeros((*x.shape[:-1], -(-x.shape[-1] // width) * width), x.dtype)
    full[..., : x.shape[-1]] = x
    threads = np.zeros((*x.shape[:-1], width), x.dtype)
    for start in range(0, full.shape[-1], width):
        threads = threads + full[..., start : start + width]
    while threads.shape[-1] > 1:
        half = threads.shape[-1] // 2
        threads = threads[..., :half] + threads[..., half:]
    return threads[..., 0]


# -------------------------------------------------------------------------------------------------------- elementwise


def check_add(device: Device, fmt: str) -> None:
    """add_forward is the residual addition, and fan_in; bit for bit, also of arrays that do not begin where words do."""
    rng = np.random.default_rng(1)
    for n, start in ((1, 0), (5, 0), (THREADS, 0), (THREADS + 9, 1), (MANY, 0)):
        a, b = (all_kinds(rng, n + start, fmt, tiny=not device.flushes)[start:] for _ in range(2))
        for grid in {(1,), elementwise_grid(n)}:
            y = empty(n, fmt)
            device.launch(fmt, "add_forward", grid, a, b, y, np.int64(n))
            assert_same(y, OPS["add"].forward(a, b, bound(fmt, "add"))[0])
            assert_same(y, fan_in.forward(a, b, bound(fmt, "fan_in"))[0])


def check_gelu(device: Device, fmt: str) -> None:
    """gelu_tanh, both ways: with the C library's tanh bit for bit, else each result a possible one."""
    rng = np.random.default_rng(2)
    x, dy = (all_kinds(rng, MANY, fmt, tiny=not device.flushes) for _ in range(2))
    x[:3] = dy[:3] = np.inf, -np.inf, np.nan
    y, dx, n = empty(MANY, fmt), empty(MANY, fmt), np.int64(MANY)
    device.launch(fmt, "gelu_tanh_forward", elementwise_grid(MANY), x, y, n)
    device.launch(fmt, "gelu_tanh_backward", elementwise_grid(MANY), dy, x, dx, n)

    p = bound(fmt, "gelu_tanh", device.functions)
    expected_y, saved = OPS["gelu_tanh"].forward(x, p)
    (expected_dx,) = OPS["gelu_tanh"].backward(dy, saved, p)
    special = slice(None) if device.functions else slice(0, 3)
    assert_same(y[special], expected_y[special])
    assert_same(dx[special], expected_dx[special])

    moderate = (np.abs(wide(x)) < 100) & (np.abs(wide(dy)) < 100)
    for got, exact in zip((y, dx), gelu_tanh_near(near(wide(x[moderate])), near(wide(dy[moderate]))), strict=True):
        assert_possible(got[moderate], exact, fmt)


def check_silu(device: Device, fmt: str) -> None:
    """silu and swiglu, both ways: with the C library's exp bit for bit, else each result a possible one."""
    rng = np.random.default_rng(17)
    gate, up, dy = (all_kinds(rng, MANY, fmt, tiny=not device.flushes) for _ in range(3))
    if device.flushes:
        gate[wide(gate) < -40] = -1  # a sigmoid of 2^-58 at least, so that no product with it vanishes
    gate[:3] = dy[:3] = up[:3] = np.inf, -np.inf, np.nan
    special = slice(None) if device.functions else slice(0, 3)
    moderate = np.logical_and.reduce([np.abs(wide(x)) < 80 for x in (gate, up, dy)])  # exp(-gate) is finite
    n, grid = np.int64(MANY), elementwise_grid(MANY)
    for op, operands in (("silu", (gate,)), ("swiglu", (gate, up))):
        y, gradients = empty(MANY, fmt), [empty(MANY, fmt) for _ in operands]
        device.launch(fmt, f"{op}_forward", grid, *operands, y, n)  # "silu_forward" and "swiglu_forward"
        device.launch(fmt, f"{op}_backward", grid, dy, *operands, *gradients, n)  # "silu_backward" and "swiglu_backward"
        p = bound(fmt, op, device.functions)
        expected, saved = OPS[op].forward(*operands, p)
        for one, other in zip((y, *gradients), (expected, *OPS[op].backward(dy, saved, p)), strict=True):
            assert_same(one[special], other[special])
        exact = [near(wide(x[moderate])) for x in (*operands, dy)]
        formulas = silu_near(*exact) if op == "silu" else swiglu_near(*exact, fmt)
        for one, value in zip((y, *gradients), formulas, strict=True):
            assert_possible(one[moderate], value, fmt)


def check_rope(device: Device, fmt: str) -> None:
    """Both ways, bit for bit, with infinities and NaNs among x; the angles are FP32, and the kernel rounds them."""
    rng = np.random.default_rng(18)
    for B, T, H, half in ((1, 1, 1, 1), (2, 5, 3, 3), (3, 7, 1, 64), (2, 3, 9, 32)):
        shape = (B, T, H * 2 * half)
        x = all_kinds(rng, B * T * H * 2 * half, fmt, tiny=not device.flushes).reshape(shape)
        angle = rng.uniform(0.1, 1.4, (T, half)) + rng.integers(0, 4, (T, half)) * np.pi / 2  # no product below 2^-26
        cos, sin = (array(f(angle), "fp32") for f in (np.cos, np.sin))
        p, sizes = bound(fmt, "rope"), (np.int32(T), np.int32(H), np.int32(half))
        for sign, expected in (
            (1, OPS["rope"].forward(x, cos, sin, p)[0]), (-1, OPS["rope"].backward(x, (cos, sin, fmt), p)[0])
        ):  # fmt: skip
            y = empty(shape, fmt)
            device.launch(fmt, "rope", (B * T,), x, cos, sin, y, *sizes, np.float32(sign))
            assert_same(y, expected, zeros=not device.flushes)


def some_ignored(rng: np.random.Generator, rows: int, V: int, ignore_index: int) -> Array:
    """Targets of which every third is to be ignored, but for the first."""
    target = rng.integers(0, V, rows)
    target[0], target[2::3] = (ignore_index + 1) % V, ignore_index
    return target


IGNORED = (-100, -1, 5)
"""What stands for 'no target': PyTorch's default, nanoGPT's, and a class."""


def check_cross_entropy_backward(device: Device, fmt: str) -> None:
    """dz from given statistics: bit for bit with the C library's exp, else each a possible one; a loss scale of 2^10.

    Rows whose target is ignored are 0; one whose target is no class is NaN, and no logit outside of the row is read.
    """
    rng, backward = np.random.default_rng(3), OPS["cross_entropy"].backward
    for (rows, V), ignore_index in product(((1, 1), (5, 7), (3, 1000), (200, 5003)), IGNORED):
        logits, target = normal(rng, (rows, V), fmt, 4.0), some_ignored(rng, rows, V, ignore_index)
        dloss, dz = np.float32(1024).reshape(1), empty((rows, V), fmt)
        p = bound(fmt, "cross_entropy", device.functions)
        _, saved = OPS["cross_entropy"].forward(logits, target, p, ignore_index)
        _, largest, log_sum, _, n, *_ = saved
        more = np.int32(V), np.int64(ignore_index)
        launch = ((rows,), logits, target, largest, log_sum, n.reshape(1), dloss, dz, *more)
        device.launch(fmt, "cross_entropy_backward", *launch)
        if device.functions:
            assert_same(dz, backward(dloss[0], saved, p, ignore_index)[0])
        assert_possible(dz, cross_entropy_near(near(wide(logits)), target, near(np.float64(1024)), ignore_index)[1], fmt)

    for nothing in (np.full(3, -100), np.array([V, -1, 1 << 40])):
        logits, dz = normal(rng, (3, V), fmt), empty((3, V), fmt)
        largest, log_sum, n = np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros(1, np.float32)
        more = np.int32(V), np.int64(-100)
        device.launch(fmt, "cross_entropy_backward", (3,), logits, nothing, largest, log_sum, n, dloss, dz, *more)
        assert (dz == 0).all() if nothing[0] == -100 else np.isnan(wide(dz)).all()


STARTS = ((0, 1000), (5000, 5001), (400_000, 900_001))  # decayed ranges: from the first element, of one, across blocks


def adamw_state(fmt: str, rng: np.random.Generator, tiny: bool) -> State:
    """A state in the middle of training with a gradient of every kind; decayed and other parameters take turns."""
    edges = [0, *(edge for span in STARTS for edge in span if edge), MANY]
    shapes = [(stop - start, (start, stop) in STARTS) for start, stop in pairwise(edges)]
    parameters = {f"p{i}": Parameter((n, 1) if decay else (n,), std=1.0) for i, (n, decay) in enumerate(shapes)}
    state = State(Model("flat", {}, parameters, {}, None, None), get_recipe(fmt).state_encodings(), NUMPY)
    assert state.layout.decayed == STARTS
    state.grads[...] = all_kinds(rng, MANY, fmt, tiny)
    state.master[...] = normal(rng, MANY, "fp32")
    state.buffers["m"][...] = all_kinds(rng, MANY, "fp32", tiny)
    state.buffers["v"][...] = np.abs(all_kinds(rng, MANY, "fp32", tiny))
    return state


def check_adamw(device: Device, fmt: str) -> None:
    """w, m and v after an update, bit for bit as the optimizer leaves them; and untouched where found_inf is set."""
    rng = np.random.default_rng(4)
    state, rule = adamw_state(fmt, rng, tiny=not device.flushes), AdamW()
    optimizer = Optimizer(rule, Schedule(6e-4, 6e-4, 0, 10))
    state.t = np.int64(3)
    scalars = cast(optimizer.scalars[state.t], "fp32")
    inverse_scale, clip = np.float32(2.0**-10), np.float32(0.7)
    starts, stops = (np.array(edges, np.int64) for edges in zip(*STARTS, strict=True))
    beta1, beta2 = rule.betas

    def launch(found_inf: bool, ranges: int) -> list[Array]:
        kept = [x.copy() for x in (state.master, state.buffers["m"], state.buffers["v"])]
        pointers = (state.grads, inverse_scale.reshape(1), clip.reshape(1), scalars, np.array([found_inf]), starts, stops)
        numbers = (np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2), np.float32(rule.eps), np.int64(MANY))
        device.launch(fmt, "adamw", elementwise_grid(MANY), *kept, *pointers, np.int32(ranges), *numbers)
        return kept

    before = [state.master.copy(), state.buffers["m"].copy(), state.buffers["v"].copy()]
    for got, expected in zip(launch(True, len(STARTS)), before, strict=True):
        assert_same(got, expected)

    updated, undecayed = launch(False, len(STARTS)), launch(False, 0)
    inside = np.zeros(MANY, bool)
    for start, stop in STARTS:
        inside[start:stop] = True
    assert_same(updated[0][~inside], undecayed[0][~inside])

    optimizer.update(state, inverse_scale, clip, np.False_)
    for got, expected in zip(updated, (state.master, state.buffers["m"], state.buffers["v"]), strict=True):
        assert_same(got, expected)


# ----------------------------------------------------------------------------------------------------------- reducing

SHAPES = ((1, 1), (5, 1), (5, 7), (64, 128), (3, 1000), (300, 33))


def by_warps(rows: int) -> tuple[int]:
    """The grid of a kernel that has a warp for each row."""
    return (-(-rows // WARPS),)


def layernorm_restated(x: Array, w: Array, b: Array | None, dy: Array, fmt: str) -> list[Array]:
    """y, mean, rstd, dx, dw, db of layernorm_* with the sums in the order of the kernels."""
    C = np.float32(x.shape[-1])
    z, scale, d = widen(x), widen(w), widen(dy)
    mean = (tree_sum(z, WARP) / C)[:, None]
    centered = z - mean
    rstd = 1 / np.sqrt(tree_sum(centered * centered, WARP)[:, None] / C + EPS)
    h, dh = centered * rstd, d * scale
    y = h * scale if b is None else h * scale + widen(b)
    dx = (dh - (tree_sum(dh, WARP) / C)[:, None] - h * (tree_sum(dh * h, WARP) / C)[:, None]) * rstd
    dw, db = tree_sum((d * h).T, LANES), tree_sum(d.T, LANES)
    return [cast(y, fmt), mean[:, 0], rstd[:, 0], *(cast(z, fmt) for z in (dx, dw, db))]


def layernorm_launched(device: Device, x: Array, w: Array, b: Array | None, dy: Array, fmt: str) -> list[Array]:
    rows, C = x.shape
    y, dx, dw, db = empty(x.shape, fmt), empty(x.shape, fmt), empty(C, fmt), None if b is None else empty(C, fmt)
    mean, rstd = empty(rows, "fp32"), empty(rows, "fp32")
    sizes, columns = (np.int32(rows), np.int32(C)), (-(-C // COLUMNS),)
    device.launch(fmt, "layernorm_forward", by_warps(rows), x, w, b, y, mean, rstd, *sizes, EPS)
    device.launch(fmt, "layernorm_backward", by_warps(rows), dy, x, w, mean, rstd, dx, *sizes)
    device.launch(fmt, "layernorm_weights_backward", columns, dy, x, mean, rstd, dw, db, *sizes)
    return [y, mean, rstd, dx, dw, db]


def check_layernorm(device: Device, fmt: str) -> None:
    """Both ways and the weights': bit for bit as restated, each a possible result of the definition; with b and without."""
    rng = np.random.default_rng(5)
    for rows, C in SHAPES:
        x, dy, w, b = (normal(rng, shape, fmt) for shape in ((rows, C), (rows, C), C, C))
        x += array(np.float64(3), fmt)
        for shift in (b, None):
            got, expected = layernorm_launched(device, x, w, shift, dy, fmt), layernorm_restated(x, w, shift, dy, fmt)
            for one, other in zip(got, expected, strict=True):
                if one is not None:
                    assert_same(one, other, zeros=False)
        y, _, _, dx, dw, db = layernorm_launched(device, x, w, b, dy, fmt)
        if C == 1:  # x - mean is 0, and so is all that follows from it
            assert_same(y, np.broadcast_to(b, y.shape), zeros=False)
            assert not (wide(dx).any() or wide(dw).any())
            continue
        for one, exact in zip((y, dx, dw, db), layernorm_near(*(near(wide(v)) for v in (x, w, b, dy))), strict=True):
            assert_possible(one, exact, fmt)


def check_layernorm_specials(device: Device, fmt: str) -> None:
    """An Inf or NaN spoils its own row, and its column of dw and db, as in the definition; zeros and equal rows do not."""
    rng = np.random.default_rng(6)
    x, dy, w, b = (normal(rng, shape, fmt) for shape in ((7, 50), (7, 50), 50, 50))
    x[0, 3], x[1, 4], dy[2, 5], dy[3, 6], x[4], x[5] = np.inf, np.nan, -np.inf, np.nan, 0, 1.5
    got = layernorm_launched(device, x, w, b, dy, fmt)
    for one, other in zip(got, layernorm_restated(x, w, b, dy, fmt), strict=True):
        assert_same(one, other, zeros=False)
    p = bound(fmt, "layernorm")
    y, saved = OPS["layernorm"].forward(x, w, b, p)
    for one, other in zip((got[0], *got[3:]), (y, *OPS["layernorm"].backward(dy, saved, w, b, p)), strict=True):
        assert (np.isnan(wide(one)) == np.isnan(wide(other))).all()


def llama_rmsnorm_restated(x: Array, w: Array, dy: Array, fmt: str, eps: np.float32) -> list[Array]:
    """y, rrms, dx, dw of llama_rmsnorm_* with the sums in the order of the kernels."""
    C = np.float32(x.shape[-1])
    z, scale, d = widen(x), widen(w), widen(dy)
    rrms = 1 / np.sqrt(tree_sum(z * z, WARP)[:, None] / C + eps)
    h = z * rrms
    n, dn = widen(cast(h, fmt)), widen(cast(d * scale, fmt))
    dx = (dn - h * (tree_sum(dn * h, WARP) / C)[:, None]) * rrms
    dw = tree_sum(widen(cast(d * n, fmt)).T, LANES)
    return [cast(n * scale, fmt), rrms[:, 0], cast(dx, fmt), cast(dw, fmt)]


def llama_rmsnorm_launched(device: Device, x: Array, w: Array, dy: Array, fmt: str, eps: np.float32) -> list[Array]:
    rows, C = x.shape
    y, dx, dw, rrms = empty(x.shape, fmt), empty(x.shape, fmt), empty(C, fmt), empty(rows, "fp32")
    sizes = np.int32(rows), np.int32(C)
    device.launch(fmt, "llama_rmsnorm_forward", by_warps(rows), x, w, y, rrms, *sizes, eps)
    device.launch(fmt, "llama_rmsnorm_backward", by_warps(rows), dy, x, w, rrms, dx, *sizes)
    device.launch(fmt, "llama_rmsnorm_weights_backward", (-(-C // COLUMNS),), dy, x, rrms, dw, *sizes)
    return [y, rrms, dx, dw]


def check_llama_rmsnorm(device: Device, fmt: str) -> None:
    """Both ways and the weights': bit for bit as restated, each a possible result of the definition; a large eps too."""
    rng = np.random.default_rng(19)
    for (rows, C), eps in product(SHAPES, (EPS, np.float32(0.5))):
        x, dy, w = (normal(rng, shape, fmt) for shape in ((rows, C), (rows, C), C))
        got = llama_rmsnorm_launched(device, x, w, dy, fmt, eps)
        for one, other in zip(got, llama_rmsnorm_restated(x, w, dy, fmt, eps), strict=True):
            assert_same(one, other, zeros=False)
        exact = llama_rmsnorm_near(*(near(wide(v)) for v in (x, w, dy)), fmt, fmt, float(eps))
        for one, value in zip((got[0], *got[2:]), exact, strict=True):
            assert_possible(one, value, fmt)


def check_llama_rmsnorm_specials(device: Device, fmt: str) -> None:
    """An Inf or NaN spoils its own row, and its column of dw, as in the definition; zeros do not."""
    rng = np.random.default_rng(20)
    x, dy, w = (normal(rng, shape, fmt) for shape in ((7, 50), (7, 50), 50))
    x[0, 3], x[1, 4], dy[2, 5], dy[3, 6], x[4] = np.inf, np.nan, -np.inf, np.nan, 0
    got = llama_rmsnorm_launched(device, x, w, dy, fmt, EPS)
    for one, other in zip(got, llama_rmsnorm_restated(x, w, dy, fmt, EPS), strict=True):
        assert_same(one, other, zeros=False)
    p = bound(fmt, "llama_rmsnorm")
    y, saved = OPS["llama_rmsnorm"].forward(x, w, p)
    for one, other in zip((got[0], *got[2:]), (y, *OPS["llama_rmsnorm"].backward(dy, saved, w, p)), strict=True):
        assert (np.isnan(wide(one)) == np.isnan(wide(other))).all()


def check_bias_forward(device: Device, fmt: str) -> None:
    """y is FP32 products and a bias added and rounded once, bit for bit; also in place where y is FP32."""
    rng = np.random.default_rng(15)
    for rows, C in (*SHAPES, (3, 2000)):
        products, b = (all_kinds(rng, n, kind, tiny=not device.flushes) for n, kind in ((rows * C, "fp32"), (C, fmt)))
        y, expected = empty((rows, C), fmt), cast(products.reshape(rows, C) + widen(b), fmt)
        device.launch(fmt, "bias_forward", (rows,), products, b, y, np.int32(C))
        assert_same(y, expected)
        if fmt == "fp32":
            device.launch(fmt, "bias_forward", (rows,), products, b, products, np.int32(C))
            assert_same(products, expected.reshape(-1))


def check_heads(device: Device, fmt: str) -> None:
    """Heads apart and side by side again: numbered elements, each where transpose puts it; as words, and one by one."""
    codes = np.uint32 if fmt == "fp32" else np.uint16
    for parts, B, H, positions, D in (
        (1, 1, 1, 1, 1), (3, 2, 5, 7, 11), (1, 3, 4, 2, 100), (3, 1, 1, 6, 1), (2, 4, 2, 1, 3), (3, 2, 5, 7, 16),
        (1, 2, 9, 3, 64),
    ):  # fmt: skip
        rows, width, shape = B * positions, parts * H * D, (parts, B, H, positions, D)
        for start in (0, 1):  # in an array, where its words begin, or one element later
            x, y, again = (empty(rows * width + start, fmt)[start:] for _ in range(3))
            x[...] = np.arange(rows * width).astype(codes).view(x.dtype)
            sizes = [np.int32(n) for n in (positions, parts, H, D)]
            device.launch(fmt, "split_heads", (rows,), x, y, *sizes)
            apart = x.reshape(B, positions, parts, H, D).transpose(2, 0, 3, 1, 4)
            assert (y.view(codes).reshape(shape) == np.ascontiguousarray(apart).view(codes)).all()
            device.launch(fmt, "merge_heads", (rows,), y, again, *sizes)
            assert (again.view(codes) == x.view(codes)).all()


def check_bias(device: Device, fmt: str) -> None:
    """db is the sum of the rows, by LANES lanes and their tree."""
    rng = np.random.default_rng(7)
    for rows, C in (*SHAPES, (1000, 40)):
        dy, db = normal(rng, (rows, C), fmt), empty(C, fmt)
        device.launch(fmt, "bias_backward", (-(-C // COLUMNS),), dy, db, np.int32(rows), np.int32(C))
        assert_same(db, cast(tree_sum(widen(dy).T, LANES), fmt), zeros=False)
        assert_possible(db, near(wide(dy)).sum(0), fmt)


QUERIES = ((1, 1), (2, 7), (3, 64), (1, 300))  # (heads, queries)


def check_causal_softmax(device: Device, fmt: str) -> None:
    """P and dS, also where P is written over S and dS over dP; later keys are 0."""
    check_causal_softmaxes(device, fmt, fmt, "causal_softmax_forward", "causal_softmax_backward")


def check_wide_causal_softmax(device: Device, fmt: str) -> None:
    """The same with P in FP32."""
    check_causal_softmaxes(device, fmt, "fp32", "wide_causal_softmax_forward", "wide_causal_softmax_backward")


def check_causal_softmaxes(device: Device, fmt: str, kept: str, forward: str, backward: str) -> None:
    rng = np.random.default_rng(8)
    for heads, queries in QUERIES:
        shape, scale = (heads * queries, queries), np.float32(1 / np.sqrt(6))
        S, dP, P, dS = normal(rng, shape, fmt, 3.0), normal(rng, shape, fmt), empty(shape, kept), empty(shape, fmt)
        grid, n = (heads, *by_warps(queries)), np.int32(queries)
        device.launch(fmt, forward, grid, S, P, n, scale)
        device.launch(fmt, backward, grid, P, dP, dS, n, scale)
        in_place, slope_in_place = S.copy(), dP.copy()
        device.launch(fmt, backward, grid, P, slope_in_place, slope_in_place, n, scale)
        assert_same(slope_in_place, dS)
        if kept == fmt:
            device.launch(fmt, forward, grid, in_place, in_place, n, scale)
            assert_same(in_place, P)

        seen = np.tile(np.tri(queries, dtype=bool), (heads, 1))
        scaled, probability, slope = widen(cast(widen(S) * scale, fmt)), widen(P), widen(dP)
        if device.functions:
            largest = np.where(seen, scaled, -np.inf).max(-1, keepdims=True)
            e = device.functions.exp(np.where(seen, scaled - largest, -np.inf))
            assert_same(P, cast(e / tree_sum(e, WARP)[:, None], kept))
        products = np.where(seen, slope * probability, np.float32(0))
        unscaled = widen(cast((slope - tree_sum(products, WARP)[:, None]) * probability, fmt))
        assert_same(dS, cast(np.where(seen, unscaled * scale, np.float32(0)), fmt), zeros=False)

        for row in range(len(S)):
            keys = row % queries + 1
            assert not wide(P[row, keys:]).any() and not wide(dS[row, keys:]).any()
            assert_possible(P[row, :keys], softmax_of(near(wide(scaled[row, :keys]))), kept)
            dS_row = stored(softmax_slope(near(wide(dP[row, :keys])), near(wide(P[row, :keys]))), fmt) * near(wide(scale))
            assert_possible(dS[row, :keys], dS_row, fmt)


def check_causal_softmax_specials(device: Device, fmt: str) -> None:
    """Inf and NaN among the keys that a query sees, and among those that it does not, as in the definition."""
    S, dP = (normal(np.random.default_rng(seed), (7, 7), fmt) for seed in (9, 10))
    S[2, 1], S[3, 2], S[4, 0], S[5, 6], S[6, 3] = np.inf, np.nan, -np.inf, np.nan, array(np.float64(60000), fmt)
    dP[1, 2], dP[2, 6], dP[6, 0] = np.inf, np.nan, np.inf
    P, dS = empty(S.shape, fmt), empty(S.shape, fmt)
    device.launch(fmt, "causal_softmax_forward", (1, 1), S, P, np.int32(7), np.float32(0.25))
    good = normal(np.random.default_rng(11), S.shape, fmt)  # no NaNs, which would hide what dP does
    device.launch(fmt, "causal_softmax_backward", (1, 1), good, dP, dS, np.int32(7), np.float32(0.25))
    p, seen = bound(fmt, "attention")["softmax"], np.tri(7, dtype=bool)
    scaled = widen(cast(widen(S) * np.float32(0.25), fmt))
    expected = unrounded_softmax(np.where(seen, scaled, np.float32(-np.inf)), p)
    assert (np.isnan(wide(P)) == (np.isnan(expected) & seen)).all()
    assert not wide(P)[~seen].any() and not wide(dS)[~seen].any()
    assert np.isnan(wide(P)).any(-1).tolist() == [False, False, True, True, False, False, False]
    assert (~np.isfinite(wide(dS))).any(-1).tolist() == [False] * 6 + [True]


def check_rows_beyond_the_last(device: Device, fmt: str) -> None:
    """The last block has warps without a row: they leave what lies behind the last row as it is."""
    rows, C = 5, 5  # and arrays for as many rows as a block has
    x, y, m, r = np.ones((WARPS, C), dtype_of(fmt)), empty((WARPS, C), fmt), empty(WARPS, "fp32"), empty(WARPS, "fp32")
    w, mean, sizes, scale = x[0], np.ones(WARPS, np.float32), (np.int32(rows), np.int32(C)), np.float32(1)
    for kernel, grid, arguments, results in (
        ("layernorm_forward", (1,), (x, w, None, y, m, r, *sizes, EPS), (y, m, r)),
        ("layernorm_backward", (1,), (x, x, w, mean, mean, y, *sizes), (y,)),
        ("causal_softmax_forward", (1, 1), (x, y, sizes[1], scale), (y,)),
        ("causal_softmax_backward", (1, 1), (x, x, y, sizes[1], scale), (y,)),
        ("llama_rmsnorm_forward", (1,), (x, w, y, r, *sizes, EPS), (y, r)),
        ("llama_rmsnorm_backward", (1,), (x, x, w, mean, y, *sizes), (y,)),
    ):
        y[...] = r[...] = np.nan
        device.launch(fmt, kernel, grid, *arguments)
        for result in results:
            assert np.isfinite(wide(result[:rows])).all() and np.isnan(wide(result[rows:])).all(), kernel


def check_cross_entropy_forward(device: Device, fmt: str) -> None:
    """The largest logit exactly, a loss a row, and their mean; a NaN is not passed over in the search for the largest.

    A row whose target is ignored has the loss 0; one whose target is no class, NaN.
    """
    rng = np.random.default_rng(12)
    for (rows, V), ignore_index in zip(SHAPES, cycle(IGNORED)):
        logits, target = normal(rng, (rows, V), fmt, 4.0), some_ignored(rng, rows, V, ignore_index)
        row_loss, largest, log_sum, loss, n = (empty(n, "fp32") for n in (rows, rows, rows, 1, 1))
        ignored = np.int64(ignore_index)
        device.launch(fmt, "cross_entropy_forward", (rows,), logits, target, row_loss, largest, log_sum, np.int32(V), ignored)
        device.launch(fmt, "cross_entropy_mean", (1,), row_loss, target, loss, n, np.int32(rows), ignored)
        counts = target != ignore_index
        assert n == counts.sum()
        z = widen(logits)
        assert_same(largest, z.max(-1))
        if device.functions:
            expected = device.functions.log(tree_sum(device.functions.exp(z - z.max(-1, keepdims=True))))
            assert_same(log_sum, expected)
            assert_same(row_loss, np.where(counts, expected - (z[np.arange(rows), target * counts] - largest), np.float32(0)))
        assert_possible(loss, cross_entropy_near(near(wide(z)), target, near(1.0), ignore_index)[0], "fp32")

    logits = normal(rng, (4, 300), fmt)
    logits[1, 299], logits[2, 5], logits[3, :] = np.nan, np.inf, -np.inf
    row_loss, largest, log_sum = (empty(4, "fp32") for _ in range(3))
    more = np.int32(300), np.int64(-100)
    device.launch(fmt, "cross_entropy_forward", (4,), logits, np.zeros(4, np.int64), row_loss, largest, log_sum, *more)
    assert_same(largest, widen(logits).max(-1))
    assert np.isfinite(row_loss).tolist() == [True, False, False, False]

    # Four rows of eight, so that a kernel that reads at such a target finds memory there; the last ones end a process.
    logits = normal(rng, (8, 300), fmt)
    for outside in ([300, -1, -101, 900], [1 << 32, (1 << 32) + 5, 1 << 40, -(1 << 40)]):
        device.launch(fmt, "cross_entropy_forward", (4,), logits, np.array(outside), row_loss, largest, log_sum, *more)
        assert np.isnan(row_loss).all()


def check_cross_entropy_mean(device: Device, fmt: str) -> None:
    """By the tree of one block, of the rows that count; of none it is NaN."""
    for rows in (1, 7, THREADS, 1000):
        rng = np.random.default_rng(rows)
        row_loss, target, loss, n = normal(rng, rows, "fp32"), some_ignored(rng, rows, 9, -1), *(empty(1, "fp32") for _ in "12")
        row_loss[target == -1] = 0
        device.launch(fmt, "cross_entropy_mean", (1,), row_loss, target, loss, n, np.int32(rows), np.int64(-1))
        assert n == (target != -1).sum()
        assert_same(loss, (tree_sum(row_loss) / n).reshape(1))
    device.launch(fmt, "cross_entropy_mean", (1,), np.zeros(7, np.float32), np.full(7, -1), loss, n, np.int32(7), np.int64(-1))
    assert n == 0 and np.isnan(loss)


def check_embedding(device: Device, fmt: str) -> None:
    """Sums in the order of the tokens, bit for bit; rows without a token are zero, and an Inf stays in its row."""
    rng = np.random.default_rng(13)
    for n, V, C in ((0, 3, 2), (1, 4, 1), (300, 5, 7), (1000, 50, 300)):
        tokens, dy, dw = rng.integers(0, V - 1, n), normal(rng, (n, C), fmt), empty((V, C), fmt)
        device.launch(fmt, "embedding_backward", (V, -(-C // THREADS)), tokens, dy, dw, np.int32(n), np.int32(C))
        in_order = np.zeros((V, C), np.float32)
        np.add.at(in_order, tokens, widen(dy))
        assert_same(dw, cast(in_order, fmt), zeros=False)
        if n:
            assert_possible(dw, embedding_near(tokens, near(np.zeros((V, C))), near(wide(dy)))[1], fmt)
            dy[0] = np.inf
            device.launch(fmt, "embedding_backward", (V, -(-C // THREADS)), tokens, dy, dw, np.int32(n), np.int32(C))
            assert (np.isinf(wide(dw)).all(-1) == (np.arange(V) == tokens[0])).all()


def gradient_norm_launched(device: Device, fmt: str, grads: Array, inverse_scale: Array, block: int) -> tuple[Array, Array]:
    blocks = -(-grads.size // block)
    partial, bad, norm, found_inf = empty(blocks, "fp32"), np.zeros(blocks, bool), empty(1, "fp32"), np.ones(1, bool)
    if blocks:
        sizes = np.int64(grads.size), np.int32(block)
        device.launch(fmt, "gradient_norm", (blocks,), grads, inverse_scale.reshape(1), partial, bad, *sizes)
    device.launch(fmt, "gradient_norm_fold", (1,), partial, bad, norm, found_inf, np.int32(blocks))
    return norm, found_inf


def check_gradient_norm(device: Device, fmt: str) -> None:
    """The norm of grains folded by the tree, and found_inf; against the tree, and against `check_and_measure`."""
    rng = np.random.default_rng(14)
    inverse_scale = np.float32(2.0**-7)
    for n, block in ((0, 100), (1, 100), (1000, 300), (1024, 256), (MANY, GRAIN)):
        grads = normal(rng, n, fmt, 100.0)
        norm, found_inf = gradient_norm_launched(device, fmt, grads, inverse_scale, block)
        g = widen(grads) * inverse_scale
        sums = [tree_sum(part * part) for part in (g[start : start + block] for start in range(0, n, block))]
        assert_same(norm, np.sqrt(tree_sum(np.array(sums, np.float32))).reshape(1))
        assert not found_inf[0]
        squares = near(wide(grads)) * near(wide(inverse_scale))
        exact = (squares * squares).sum(-1) if n else Near(np.float64(0))
        root = np.sqrt(exact.value)
        assert abs(wide(norm)[0] - root) <= np.sqrt(exact.value + exact.err) - root + 2.0**-24 * root

    # The longest chain of additions: a thread's own and the tree's 8, for a grain and for all grains. Both sums err by at most
    # gamma of it (all terms are positive), their roots by half.
    rtol = gamma(GRAIN // THREADS + 8 + MANY // GRAIN // THREADS + 1 + 8)
    state = adamw_state(fmt, rng, tiny=not device.flushes)
    for index, value in ((None, 0), (0, np.inf), (MANY - 1, -np.inf), (300_000, np.nan)):
        state.grads[...] = normal(rng, MANY, fmt)
        if index is not None:
            state.grads[index] = value
        norm, found_inf = gradient_norm_launched(device, fmt, state.grads, inverse_scale, GRAIN)
        expected_inf, expected = check_and_measure(state, inverse_scale)
        assert bool(found_inf[0]) == bool(expected_inf) == (index is not None)
        assert np.isclose(norm[0], expected, rtol=rtol, atol=0, equal_nan=True)
    state.grads[...] = normal(rng, MANY, fmt)
    no_inverse = np.float32(np.inf)  # of a loss scale of 0: no gradient is Inf or NaN, but every unscaled one would be
    with np.errstate(all="ignore"):
        found = gradient_norm_launched(device, fmt, state.grads, no_inverse, GRAIN)[1], check_and_measure(state, no_inverse)[0]
    assert all(map(bool, found))


ELEMENTWISE = {
    "add_forward": check_add,
    "gelu_tanh": check_gelu,
    "silu": check_silu,
    "rope": check_rope,
    "cross_entropy_backward": check_cross_entropy_backward,
    "adamw": check_adamw,
    "bias_forward": check_bias_forward,
    "heads": check_heads,
}

REDUCING = {
    "layernorm": check_layernorm,
    "layernorm_specials": check_layernorm_specials,
    "llama_rmsnorm": check_llama_rmsnorm,
    "llama_rmsnorm_specials": check_llama_rmsnorm_specials,
    "bias_backward": check_bias,
    "causal_softmax": check_causal_softmax,
    "causal_softmax_specials": check_causal_softmax_specials,
    "wide_causal_softmax": check_wide_causal_softmax,
    "rows_beyond_the_last": check_rows_beyond_the_last,
    "cross_entropy_forward": check_cross_entropy_forward,
    "cross_entropy_mean": check_cross_entropy_mean,
    "embedding_backward": check_embedding,
    "gradient_norm": check_gradient_norm,
}

CHECKS = {**ELEMENTWISE, **REDUCING}
