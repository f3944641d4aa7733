"""The strict stand-in for CuPy: its rules, numbered as there; the mistakes that it has to find; the real CuPy beside it."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from script_loader import load_script
from strict_cupy import API, BF16, Array, PromotionError, WaitError, counter, xp

FP8 = ml_dtypes.float8_e4m3fn


def inputs(xp: Any) -> SimpleNamespace:
    """Small arrays on `xp`, by the names that the tests below use."""
    f32 = xp.asarray(np.linspace(-2, 3, 12, dtype=np.float32).reshape(3, 4))
    return SimpleNamespace(
        f32=f32,
        f64=f32.astype(np.float64),
        fp16=f32.astype(np.float16),
        bf16=f32.astype(BF16),
        other=xp.asarray(np.arange(8, dtype=np.float32).reshape(4, 2)),
        heads=xp.asarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),  # (H, T, D)
        mask=f32 > 0,
        row=f32[0],
        loss=f32.mean(),
        found_inf=xp.asarray(np.False_),
        scale=xp.asarray(np.float32(1024)),
        t=xp.asarray(np.int64(1)),
        rates=xp.asarray(np.array([0.1, 0.2, 0.3])),  # fp64, indexed by t
        numbers=xp.asarray(np.arange(12).reshape(3, 4)),
        tokens=xp.asarray(np.array([2, 0, 2, 1])),  # one of them twice
        rows=xp.asarray(np.array([2, 0])),
        columns=xp.asarray(np.array([1, 3])),
        host=np.full((3, 4), 0.5, np.float32),
    )


@pytest.fixture
def d() -> SimpleNamespace:
    """The inputs on the stand-in, all counts zero."""
    result = inputs(xp)
    counter.reset()
    return result


def counts() -> dict[str, int]:
    """What has been counted, without the zeros."""
    kinds = ("launches", "gemms", "h2d", "d2h", "d2d", "syncs")
    return {kind: getattr(counter, kind) for kind in kinds if getattr(counter, kind)}


# --------------------------------------------------------------------------------------------------- the 14 rules


@pytest.mark.parametrize(
    "mixed",
    [
        lambda d: d.f32 + d.host,
        lambda d: d.host + d.f32,
        lambda d: d.f32 * np.array(2, np.float32),
        lambda d: d.f32 @ d.host.T,
        lambda d: d.host.T @ d.f32,
        lambda d: d.f32.__iadd__(d.host),
        lambda d: d.f32.__setitem__(0, d.host[0]),
        lambda d: xp.maximum(d.f32, d.host),
        lambda d: xp.where(d.mask, d.f32, d.host),
        lambda d: xp.concatenate([d.f32, d.host]),
        lambda d: xp.sum(d.host),
        lambda d: np.exp(d.f32),
        lambda d: np.matmul(d.f32, d.other),
        lambda d: np.sum(d.f32),
        lambda d: np.concatenate([d.f32, d.f32]),
        lambda d: np.asarray(d.f32),
        lambda d: np.array([d.loss, d.loss]),
        lambda d: np.zeros((3, 4)).__setitem__(0, d.row),
        lambda d: d.f32[np.array([0, 1])],
        lambda d: d.f32[:, np.array(1)],
    ],
)
def test_rule_1_no_numpy_array_is_mixed_in(mixed: Callable[[Any], Any], d: SimpleNamespace) -> None:
    with pytest.raises(TypeError):
        mixed(d)


def test_rule_1_numpy_scalars_are_allowed(d: SimpleNamespace) -> None:
    for y in (d.f32 * np.float32(2), np.float32(2) * d.f32, xp.maximum(d.f32, np.float32(0)), np.float32(2) - d.loss):
        assert isinstance(y, Array) and y.dtype == np.float32
    assert not isinstance(d.f32, np.ndarray)


def test_rule_2_results_are_arrays_even_if_0d(d: SimpleNamespace) -> None:
    zero_d = [d.f32.sum(), d.f32.max(), d.mask.all(), d.row @ d.row, d.f32[0, 0], d.rates[d.t], -d.loss, d.loss + 1]
    zero_d += [xp.linalg.norm(d.f32), xp.count_nonzero(d.f32), xp.allclose(d.f32, d.f32), xp.array_equal(d.f32, d.f32)]
    assert all(isinstance(y, Array) and y.shape == () for y in zero_d)
    assert d.f32.sum(-1, keepdims=True).shape == (3, 1) and len(d.f32) == 3
    first, *_ = d.f32
    first[0] = 7  # the rows that iteration gives are views, and so is an element
    d.f32[1, 1][...] = 8
    assert xp.asnumpy(d.f32)[[0, 1], [0, 1]].tolist() == [7, 8]
    with pytest.raises(TypeError, match="0-d"):
        iter(d.loss)


READS: dict[str, Callable[[Any], Any]] = {
    "float": lambda d: float(d.loss),
    "int": lambda d: int(d.loss),
    "complex": lambda d: complex(d.loss),
    "bool": lambda d: bool(d.found_inf),
    "if": lambda d: 1 if d.found_inf else 2,
    "not": lambda d: not d.found_inf,
    "in": lambda d: 9.0 in d.row[:1],
    "item": lambda d: d.loss.item(),
    "tolist": lambda d: d.f32.tolist(),
    "tobytes": lambda d: d.f32.tobytes(),
    "repr": lambda d: repr(d.f32),
    "str": lambda d: str(d.f32),
    "format": lambda d: f"{d.loss:.2f}",
    "get": lambda d: d.f32.get(),
    "asnumpy": lambda d: xp.asnumpy(d.f32),
    "pickle": lambda d: pickle.dumps(d.f32),
    "math": lambda d: math.sqrt(d.scale),
    "max": lambda d: max(d.loss, d.scale),
}


@pytest.mark.parametrize("name", READS)
def test_rule_3_reads_are_counted_waits_and_refused_in_no_sync(name: str, d: SimpleNamespace) -> None:
    READS[name](d)
    assert (counter.syncs, counter.d2h) == (1, 1)
    with counter.no_sync(), pytest.raises(WaitError):
        READS[name](d)
    READS[name](d)
    assert counter.syncs == 2


def test_rule_3_no_sync_may_be_nested(d: SimpleNamespace) -> None:
    with counter.no_sync():
        with counter.no_sync():
            pass
        with pytest.raises(WaitError):
            float(d.loss)


def test_rule_3_reads_return_what_is_there(d: SimpleNamespace) -> None:
    assert float(d.scale) == 1024 and int(d.t) == 1 and not d.found_inf and d.scale.item() == 1024.0
    assert f"{d.scale:.1f}" == "1024.0" and "1024" in repr(d.scale) and d.rows.tolist() == [2, 0]
    assert np.array_equal(pickle.loads(pickle.dumps(d.f32)).get(), d.f32.get())
    with pytest.raises(TypeError):
        float(d.row)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(d.row)


@pytest.mark.parametrize(
    "use",
    [
        lambda t: range(t),
        lambda t: [1, 2][t],
        lambda t: np.zeros(t),
        lambda t: xp.zeros((t, 2)),
        lambda t: xp.zeros(t),
        lambda t: xp.arange(t),
        lambda t: xp.ones((2, 3)).sum(t),
        lambda t: xp.ones((2, 3)).reshape(t, -1),
        lambda t: xp.ones((2, 3))[:t],
    ],
)
def test_rule_3_an_array_is_no_integer_of_the_host(use: Callable[[Any], Any], d: SimpleNamespace) -> None:
    with pytest.raises(TypeError):
        use(d.t)


def test_rule_3_what_needs_no_value_does_not_wait(d: SimpleNamespace) -> None:
    with counter.no_sync():
        facts = (d.f32.shape, d.f32.dtype, d.f32.ndim, d.f32.size, d.f32.nbytes, d.f32.itemsize, d.f32.strides)
        assert facts == ((3, 4), np.float32, 2, 12, 48, 4, (16, 4))
        assert d.f32.flags.c_contiguous and d.f32.T.flags["F_CONTIGUOUS"] and not d.f32[:, :2].flags.forc
        assert xp.shape(d.f32) == (3, 4) and xp.result_type(d.f32, d.bf16) == np.float32 and xp.size(d.f32) == 12
    assert not counts()


WAITS: dict[str, Callable[[Any], Any]] = {
    "x[mask]": lambda d: d.f32[d.mask],
    "x[mask] = v": lambda d: d.f32.__setitem__(d.mask, 0),
    "x[0-d mask]": lambda d: d.f32[d.found_inf],
    "nonzero": lambda d: xp.nonzero(d.f32),
    "x.nonzero": lambda d: d.f32.nonzero(),
    "argwhere": lambda d: xp.argwhere(d.f32),
    "flatnonzero": lambda d: xp.flatnonzero(d.f32),
    "unique": lambda d: xp.unique(d.tokens),
    "where": lambda d: xp.where(d.mask),
    "bincount": lambda d: xp.bincount(d.tokens),
}


@pytest.mark.parametrize("name", WAITS)
def test_rule_4_shapes_that_depend_on_values_wait(name: str, d: SimpleNamespace) -> None:
    WAITS[name](d)
    assert counter.syncs == 1
    with counter.no_sync(), pytest.raises(WaitError):
        WAITS[name](d)


def test_rule_4_comparisons_of_whole_arrays_do_not_wait(d: SimpleNamespace) -> None:
    with counter.no_sync():
        assert isinstance(xp.array_equal(d.f32, d.f32), Array) and isinstance(xp.allclose(d.f32, d.f32), Array)


@pytest.mark.parametrize("name", ["vecdot", "spacing", "errstate", "geomspace", "insert", "bfloat16", "float8_e4m3fn"])
def test_rule_5_only_names_that_cupy_has(name: str) -> None:
    with pytest.raises(AttributeError):
        getattr(xp, name)


@pytest.mark.parametrize(
    "unknown",
    [
        lambda d: xp.sum(d.f32, where=d.mask),
        lambda d: d.f32.sum(where=d.mask),
        lambda d: d.f32.max(initial=0),
        lambda d: xp.max(d.f32, initial=0),
        lambda d: xp.exp(d.f32, where=d.mask),
        lambda d: xp.mean(d.f32, 0, None, None, True, d.mask),
        lambda d: xp.take(d.f32, d.rows, axis=0, mode="clip"),
        lambda d: xp.take(d.f32, [0, 1], axis=0),
        lambda d: d.loss.item(0),
        lambda d: xp.exp(d.f32, d.f32, d.f32),
    ],
)
def test_rule_5_only_parameters_that_cupy_has(unknown: Callable[[Any], Any], d: SimpleNamespace) -> None:
    with pytest.raises(TypeError):
        unknown(d)


def test_rule_5_attributes_of_arrays(d: SimpleNamespace) -> None:
    for name in ("setflags", "ctypes", "newbyteorder"):
        with pytest.raises(AttributeError):
            getattr(d.f32, name)
    with pytest.raises(AttributeError):
        _ = d.f32.flags.writeable


@pytest.mark.parametrize("name", ["RawKernel", "fuse", "sort_complex_of_nothing"])
def test_rule_5_what_cupy_has_and_the_stand_in_does_not_know_is_told_apart(name: str) -> None:
    with pytest.raises(NotImplementedError if name in (*API["types"], *API["functions"]) else AttributeError):
        getattr(xp, name)


def test_rule_5_array_methods_that_are_not_modeled(d: SimpleNamespace) -> None:
    for name in ("data", "sort", "dumps"):
        with pytest.raises(NotImplementedError):
            getattr(d.f32, name)


def test_rule_6_out_is_a_device_array(d: SimpleNamespace) -> None:
    on_host: list[Callable[[], Any]] = [
        lambda: xp.exp(d.f32, out=np.empty((3, 4), np.float32)),
        lambda: xp.exp(d.f32, np.empty((3, 4), np.float32)),
        lambda: d.f32.sum(0, out=np.empty(4, np.float32)),
        lambda: xp.matmul(d.f32, d.other, out=np.empty((3, 2), np.float32)),
    ]
    for refused in on_host:
        with pytest.raises(TypeError):
            refused()
    with pytest.raises(ValueError, match="shape"):
        xp.exp(d.row, out=d.f32)
    y = xp.empty_like(d.f32)
    assert xp.exp(d.f32, out=y) is y and xp.exp(d.f32, y) is y and xp.sum(d.f32, 0, None, y[0]) is not None
    assert np.array_equal(y[0].get(), d.f32.get().sum(0))
    assert xp.sum(d.f32, 1, None, y[:, :1], True).shape == (3, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda d: xp.zeros(3, FP8),
        lambda d: xp.asarray(np.zeros(3, FP8)),
        lambda d: d.f32.astype(FP8),
        lambda d: xp.asarray(np.zeros(3, np.uint8)).view(FP8),
        lambda d: d.f32.astype(object),
        lambda d: xp.asarray(["a"]),
        lambda d: d.f32.astype(np.longdouble),
        lambda d: d.f32 * FP8(2),
    ],
)
def test_rule_7_dtypes_that_cupy_does_not_have(make: Callable[[Any], Any], d: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="Unsupported dtype"):
        make(d)


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d.bf16 & d.bf16,
        lambda d: d.f32 & 1,
        lambda d: ~d.f32,
        lambda d: d.fp16 << 1,
        lambda d: xp.gcd(d.f32, d.f32),
        lambda d: xp.bitwise_count(d.bf16),
        lambda d: d.mask - d.mask,
    ],
)
def test_rule_7_ufuncs_without_a_loop(make: Callable[[Any], Any], d: SimpleNamespace) -> None:
    with pytest.raises(TypeError):
        make(d)


def test_rule_7_the_table_decides_not_numpy(d: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert xp.logical_not(d.bf16).dtype == bool  # by casting: there is a loop for fp32
    monkeypatch.setitem(API["ufuncs"], "sqrt", "e->e d->d")
    assert xp.sqrt(d.fp16).dtype == np.float16
    monkeypatch.setitem(API["ufuncs"], "sqrt", "e->e")
    with pytest.raises(TypeError, match="no loop of sqrt for float32"):
        xp.sqrt(d.f32)


@pytest.mark.parametrize(
    "silent",
    [
        lambda d: d.bf16 + d.f32,
        lambda d: d.fp16 * d.bf16,
        lambda d: d.f32 > d.f64,
        lambda d: d.f32 * np.float64(2),
        lambda d: d.f32 * d.f64.sum(),
        lambda d: d.f32 * d.numbers,
        lambda d: d.f32 * np.int32(2),
        lambda d: d.bf16 * 2.0,
        lambda d: d.bf16**0.5,
        lambda d: xp.maximum(d.bf16, 0.0),
        lambda d: d.bf16.copy().__imul__(2.0),
        lambda d: d.f32.copy().__iadd__(d.bf16),
        lambda d: d.f32.copy().__iadd__(d.f64),
        lambda d: xp.exp(d.f32, out=d.f64),
        lambda d: xp.exp(d.f64, out=d.f32),
        lambda d: xp.where(d.mask, d.f32, np.float64(0)),
        lambda d: xp.concatenate([d.f32, d.f64]),
        lambda d: xp.stack([d.f32, d.bf16]),
        lambda d: d.bf16 @ d.other,
        lambda d: xp.copyto(d.bf16, d.f32),
        lambda d: xp.divmod(d.bf16, d.bf16),
    ],
)
def test_rule_8_no_silent_promotion(silent: Callable[[Any], Any], d: SimpleNamespace) -> None:
    with pytest.raises(PromotionError):
        silent(d)


def test_rule_8_what_keeps_its_dtype_and_what_is_said_explicitly(d: SimpleNamespace) -> None:
    for y, dtype in [
        (d.f32 * 2.0, np.float32),
        (d.fp16 * 2.0, np.float16),
        (d.bf16 * 2, BF16),
        (d.bf16 / 3, BF16),
        (d.bf16**2, BF16),
        (d.bf16 > 0.5, bool),
        (d.f32 * d.mask, np.float32),
        (xp.where(d.mask, d.f32, 0.0), np.float32),
        (d.bf16.sum(dtype=np.float32), np.float32),
        (xp.sum(d.f32, 0, np.float64), np.float64),
        (d.bf16.astype(np.float32) + d.f32, np.float32),
        (d.numbers.mean(), np.float64),
    ]:
        assert y.dtype == dtype
    d.bf16[...] = d.f32  # an assignment converts, and says so
    assert d.bf16.dtype == BF16


@pytest.mark.parametrize(
    "gap",
    [
        lambda x: x[None] @ x.T[None],
        lambda x: xp.einsum("ij->i", x),
        lambda x: x.var(),
        lambda x: x.std(),
        lambda x: xp.linalg.norm(x),
        lambda x: x.clip(0, 1),
        lambda x: xp.where(x > 0, x, 0),
        lambda x: x.cumsum(),
        lambda x: x.cumprod(),
        lambda x: xp.sort(x),
        lambda x: xp.argsort(x),
        lambda x: xp.partition(x, 1),
        lambda x: xp.tril(x),
        lambda x: xp.add.accumulate(x),
        lambda x: xp.add.at(x, xp.asarray(np.array([0])), x[:1]),
    ],
)
def test_rule_9_gaps_of_bf16(gap: Callable[[Any], Any], d: SimpleNamespace) -> None:
    gap(d.f32)
    with pytest.raises(TypeError):
        gap(d.bf16)


def test_rule_10_a_repeated_index_in_an_assignment(d: SimpleNamespace) -> None:
    y = xp.zeros((3, 4), np.float32)
    for key in (d.tokens, [1, 1], (d.rows * 0, d.rows * 0), (slice(None), d.tokens)):
        with pytest.raises(ValueError, match="repeated"):
            y[key] = 1
    y[d.rows], y[d.rows, d.columns] = 1, 2
    y[d.rows] += d.f32[d.rows]
    assert np.array_equal(y.get()[1], np.zeros(4))


@pytest.mark.parametrize("name", ["random", "fft"])
def test_rule_10_random_and_fft_are_refused(name: str) -> None:
    with pytest.raises(AttributeError, match="refused"):
        getattr(xp, name)


def test_rule_11_scatters_by_the_table(d: SimpleNamespace) -> None:
    for ufunc, x, works in [
        (xp.add, d.f32, True),
        (xp.add, d.fp16, True),
        (xp.add, d.numbers, True),
        (xp.add, d.bf16, False),
        (xp.add, d.mask, False),
        (xp.maximum, d.f32, True),
        (xp.maximum, d.fp16, False),
        (xp.subtract, d.f32, False),
        (xp.subtract, d.numbers.astype(np.int32), True),
    ]:
        if works:
            ufunc.at(x, d.rows, x[:2])
        else:
            with pytest.raises(TypeError):
                ufunc.at(x, d.rows, x[:2])
    with pytest.raises(PromotionError):
        xp.add.at(d.f32, d.rows, d.f64[:2])
    with pytest.raises(NotImplementedError):
        xp.multiply.at(d.f32, d.rows, 2)
    for missing in ("reduce", "accumulate"):
        with pytest.raises(NotImplementedError):
            getattr(xp.maximum, missing)(d.f32)
    y = xp.zeros(3, np.float32)
    xp.add.at(y, d.tokens, xp.ones(4, np.float32))
    assert y.tolist() == [1, 1, 2]


def test_rule_12_copies_from_the_host_are_counted(d: SimpleNamespace) -> None:
    y = d.f32[[0, 1]]
    d.f32[[0, 1]] = y
    xp.asarray(d.host)
    xp.array([1.0, 2.0])
    assert counter.h2d == 4
    source = d.host.copy()
    x = xp.asarray(source)
    source[...] = 9  # what is on the device does not change with the host's memory
    assert x.get()[0, 0] == 0.5


COSTS: dict[str, tuple[Callable[[Any], Any], dict[str, int]]] = {
    "elementwise": (lambda d: d.f32 + 1, {"launches": 1}),
    "views": (lambda d: (d.f32.T, d.f32[0], d.f32[..., None], d.f32.swapaxes(0, 1), d.f32.reshape(-1), d.f32.view("i4")), {}),
    "more views": (lambda d: (xp.broadcast_to(d.row, (3, 4)), xp.moveaxis(d.heads, 0, 1), xp.expand_dims(d.f32, 0)), {}),
    "reshape that copies": (lambda d: d.f32.T.reshape(-1), {"launches": 1}),
    "zeros, empty": (lambda d: (xp.zeros(3), xp.empty(3), xp.zeros_like(d.f32), xp.empty_like(d.f32)), {}),
    "ones": (lambda d: xp.ones(3), {"launches": 1}),
    "asarray of a number": (lambda d: xp.asarray(np.float32(2)), {"launches": 1}),
    "asarray of an array": (lambda d: xp.asarray(d.host), {"h2d": 1}),
    "asarray of its own": (lambda d: xp.asarray(d.f32), {}),
    "copy": (lambda d: (d.f32.copy(), copy.deepcopy(d.f32), xp.array(d.f32)), {"launches": 3}),
    "astype": (lambda d: d.f32.astype("f2"), {"launches": 1}),
    "astype that changes nothing": (lambda d: d.f32.astype("f4", copy=False), {}),
    "sum": (lambda d: d.f32.sum(), {"launches": 1}),
    "mean of fp32": (lambda d: d.f32.mean(), {"launches": 1}),
    "mean of fp16": (lambda d: d.fp16.mean(), {"launches": 2}),
    "mean of bf16": (lambda d: d.bf16.mean(), {"launches": 2}),
    "var": (lambda d: d.f32.var(), {"launches": 3}),
    "std": (lambda d: d.f32.std(), {"launches": 4}),
    "norm": (lambda d: xp.linalg.norm(d.f32), {"launches": 3}),
    "stack": (lambda d: xp.stack([d.f32, d.f32, d.f32]), {"launches": 3}),
    "concatenate": (lambda d: xp.concatenate([d.f32, d.f32]), {"launches": 2}),
    "tril": (lambda d: xp.tril(d.f32), {"launches": 2}),
    "x[ints]": (lambda d: d.f32[d.rows], {"launches": 1}),
    "x[0-d]": (lambda d: d.rates[d.t], {"launches": 1}),
    "x[i, j]": (lambda d: d.f32[d.rows, d.columns], {"launches": 3}),
    "x[ints] = number": (lambda d: d.f32.__setitem__(d.rows, 1.5), {"launches": 2}),
    "x[ints] = array": (lambda d: d.f32.__setitem__(d.rows, d.row), {"launches": 1}),
    "x[i, j] = 0": (lambda d: d.f32.__setitem__((d.rows, d.columns), 0), {"launches": 3}),
    "x[...] = array": (lambda d: d.f32.__setitem__(..., d.f32[::-1]), {"launches": 1}),
    "x[...] = 0": (lambda d: d.f32.__setitem__(..., 0), {}),
    "x[0] = row": (lambda d: d.f32.__setitem__(0, d.f32[1]), {"d2d": 1}),
    "x[0] += row": (lambda d: d.f32.__setitem__(0, d.f32[0].__iadd__(d.f32[1])), {"launches": 1}),
    "take_along_axis": (lambda d: xp.take_along_axis(d.f32, d.numbers % 4, axis=1), {"launches": 5}),
    "matmul": (lambda d: d.f32 @ d.other, {"gemms": 1}),
    "matmul of fp16": (lambda d: d.fp16 @ d.fp16.T, {"gemms": 1}),
    "batched matmul": (lambda d: d.heads @ d.heads.reshape(2, 4, 3), {"gemms": 1}),
    "batched matmul of fp16": (lambda d: d.heads.astype("f2") @ d.other.astype("f2")[None], {"gemms": 1, "launches": 5}),
    "batched by one": (lambda d: d.heads @ d.other, {"gemms": 1, "launches": 6}),
    "1 x 1": (lambda d: d.f32[:1] @ d.f32[:1].T, {"launches": 1}),
    "dot of vectors": (lambda d: d.row @ d.row, {"launches": 1}),
    "of integers": (lambda d: d.numbers @ d.numbers.T, {"launches": 2}),
    "einsum": (lambda d: xp.einsum("ij,jk->ik", d.f32, d.other), {"gemms": 1, "launches": 1}),
}


@pytest.mark.parametrize("name", COSTS)
def test_rule_13_costs(name: str, d: SimpleNamespace) -> None:
    use, cost = COSTS[name]
    use(d)
    assert counts() == cost
    counter.reset()
    assert not counts()


def test_rule_14_products_and_sums_of_16_bits_are_made_in_fp32_and_rounded_once() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.dtype(np.float16), BF16):
        a, b = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in ((8, 300), (300, 8)))
        wide = a.astype(np.float32) @ b.astype(np.float32)
        x, y = xp.asarray(a), xp.asarray(b)
        for z in (x @ y, xp.matmul(x, y), xp.dot(x, y), x.dot(y), xp.tensordot(x, y, 1)):
            assert z.dtype == dtype and np.array_equal(z.get(), wide.astype(dtype))
        ones = xp.asarray(np.ones(4097, dtype))
        assert float(ones.sum()) == 4096 and ones.sum().dtype == dtype  # 4097 is no value of either; NumPy's bf16 ends at 256
        assert float(ones.mean()) == 1 and float(ones.reshape(17, 241).sum((0, 1))) == 4096
    stacked = xp.asarray(np.stack([a, a]).astype(np.float16))
    product = stacked @ stacked.swapaxes(1, 2)
    wide = stacked.get().astype(np.float32)
    assert product.dtype == np.float16 and np.array_equal(product.get(), (wide @ wide.swapaxes(1, 2)).astype(np.float16))


def test_memory_that_empty_left_unset_shows(d: SimpleNamespace) -> None:
    assert np.isnan(xp.empty((2, 2), np.float32).get()).all() and np.isnan(xp.empty_like(d.bf16).get().astype("f4")).all()


# ------------------------------------------------------------------------------------------------ planted mistakes


@dataclass(frozen=True)
class Mistake:
    """What runs on NumPy and is a mistake on CuPy, the right spelling beside it, and how the stand-in shows it.

    caught: the error that is raised inside `no_sync()`, or the count that is higher than that of the right spelling.
    """

    wrong: Callable[[Any, Any], Any]
    right: Callable[[Any, Any], Any]
    caught: type[Exception] | str


def set_at(x: Any, key: Any, value: Any) -> Any:
    """A copy of `x` after `x[key] = value`."""
    x = x.copy()
    x[key] = value
    return x


def scattered(ufunc: Any, x: Any, indices: Any, values: Any) -> Any:
    """A copy of `x` after `ufunc.at(x, indices, values)`."""
    x = x.copy()
    ufunc.at(x, indices, values)
    return x


def one_hot(xp: Any, d: Any) -> Any:
    """(V, N), fp32: row v has ones where token v stands."""
    return (xp.arange(3)[:, None] == d.tokens).astype(np.float32)


def quiet_sqrt(xp: Any, d: Any, errstate: Any) -> Any:
    """Square roots, those of negative numbers too, under an errstate."""
    with errstate(invalid="ignore"):
        return xp.sqrt(d.f32)


MISTAKES = {
    # waits of the host
    "float(loss) every step": Mistake(lambda xp, d: float(d.loss), lambda xp, d: d.loss + 0, WaitError),
    "loss.item()": Mistake(lambda xp, d: d.loss.item(), lambda xp, d: d.loss.reshape(1), WaitError),
    "x.tolist()": Mistake(lambda xp, d: d.row.tolist(), lambda xp, d: d.row.copy(), WaitError),
    "tobytes": Mistake(lambda xp, d: hash(d.f32.tobytes()), lambda xp, d: d.f32.sum(), WaitError),
    "if found_inf": Mistake(
        lambda xp, d: d.f32 if d.found_inf else d.f32 * 2, lambda xp, d: xp.where(d.found_inf, d.f32, d.f32 * 2), WaitError
    ),
    "found_inf or other": Mistake(
        lambda xp, d: d.found_inf or d.mask.all(), lambda xp, d: d.found_inf | d.mask.all(), WaitError
    ),
    "while scale": Mistake(lambda xp, d: [1 for _ in [0] if d.scale > 1], lambda xp, d: d.scale > 1, WaitError),
    "assert on values": Mistake(lambda xp, d: bool((d.f32 == d.f32).all()), lambda xp, d: (d.f32 == d.f32).all(), WaitError),
    "if array_equal": Mistake(
        lambda xp, d: 1 if xp.array_equal(d.f32, d.f32) else 0, lambda xp, d: (d.f32 == d.f32).all(), WaitError
    ),
    "print(x)": Mistake(lambda xp, d: str(d.f32), lambda xp, d: str(d.f32.shape), WaitError),
    "repr(x)": Mistake(lambda xp, d: f"{d.f32!r}", lambda xp, d: f"{d.f32.dtype!r}", WaitError),
    "a formatted loss": Mistake(lambda xp, d: f"{d.loss:.3f}", lambda xp, d: f"{d.loss.ndim}", WaitError),
    "Python's max": Mistake(lambda xp, d: max(d.loss, d.scale), lambda xp, d: xp.maximum(d.loss, d.scale), WaitError),
    "math.sqrt": Mistake(lambda xp, d: math.sqrt(d.scale), lambda xp, d: xp.sqrt(d.scale), WaitError),
    "0.0 in x": Mistake(lambda xp, d: 9.0 in d.row[:1], lambda xp, d: (d.row[:1] == 9.0).any(), WaitError),
    "x[mask]": Mistake(lambda xp, d: d.f32[d.mask].sum(), lambda xp, d: xp.where(d.mask, d.f32, 0).sum(), WaitError),
    "x[mask] = 0": Mistake(lambda xp, d: set_at(d.f32, d.mask, 0), lambda xp, d: xp.where(d.mask, 0, d.f32), WaitError),
    "flatnonzero": Mistake(lambda xp, d: xp.flatnonzero(d.mask), lambda xp, d: d.mask.sum(), WaitError),
    "1-argument where": Mistake(lambda xp, d: xp.where(d.mask), lambda xp, d: d.mask.argmax(-1), WaitError),
    "unique": Mistake(lambda xp, d: xp.unique(d.tokens), lambda xp, d: d.tokens.max(), WaitError),
    "range(t)": Mistake(lambda xp, d: range(d.t), lambda xp, d: d.t + 1, TypeError),
    "a list indexed by t": Mistake(lambda xp, d: [0.1, 0.2][d.t], lambda xp, d: d.rates[d.t], TypeError),
    # NumPy's arrays and functions
    "a NumPy array as an operand": Mistake(lambda xp, d: d.f32 + d.host, lambda xp, d: d.f32 + xp.asarray(d.host), TypeError),
    "a 0-d NumPy array": Mistake(
        lambda xp, d: d.f32 * np.array(2, np.float32), lambda xp, d: d.f32 * np.float32(2), TypeError
    ),
    "a NumPy array as an index": Mistake(
        lambda xp, d: d.f32[np.array([2, 0])], lambda xp, d: d.f32[xp.asarray(np.array([2, 0]))], TypeError
    ),
    "a NumPy array assigned": Mistake(
        lambda xp, d: set_at(d.f32, 0, d.host[0]), lambda xp, d: set_at(d.f32, 0, xp.asarray(d.host[0])), TypeError
    ),
    "np.exp": Mistake(lambda xp, d: np.exp(d.f32), lambda xp, d: xp.exp(d.f32), TypeError),
    "np.linalg.norm": Mistake(lambda xp, d: np.linalg.norm(d.f32), lambda xp, d: xp.linalg.norm(d.f32), TypeError),
    "np.asarray": Mistake(lambda xp, d: np.asarray(d.f32), lambda xp, d: xp.asarray(d.f32), TypeError),
    "out= a host array": Mistake(
        lambda xp, d: xp.exp(d.f32, out=np.empty_like(d.host)), lambda xp, d: xp.exp(d.f32, out=xp.empty_like(d.f32)), TypeError
    ),
    "a list of numbers as an array": Mistake(lambda xp, d: xp.sum([1.0, 2.0]), lambda xp, d: xp.sum(d.row), TypeError),
    "a list index": Mistake(lambda xp, d: d.f32[[2, 0]], lambda xp, d: d.f32[d.rows], "h2d"),
    # names, parameters, dtypes
    "vecdot": Mistake(lambda xp, d: xp.vecdot(d.f32, d.f32), lambda xp, d: (d.f32 * d.f32).sum(-1), AttributeError),
    "spacing": Mistake(lambda xp, d: xp.spacing(d.f32), lambda xp, d: xp.nextafter(d.f32, xp.inf) - d.f32, AttributeError),
    "xp.errstate": Mistake(
        lambda xp, d: quiet_sqrt(xp, d, xp.errstate), lambda xp, d: quiet_sqrt(xp, d, np.errstate), AttributeError
    ),
    "xp.random": Mistake(
        lambda xp, d: xp.random.default_rng(0).standard_normal(3),
        lambda xp, d: xp.asarray(np.random.default_rng(0).standard_normal(3)),
        AttributeError,
    ),
    "setflags": Mistake(lambda xp, d: d.f32.copy().setflags(write=False), lambda xp, d: d.f32.copy(), AttributeError),
    "flags.writeable": Mistake(lambda xp, d: d.f32.flags.writeable, lambda xp, d: d.f32.flags.c_contiguous, AttributeError),
    "where=": Mistake(
        lambda xp, d: xp.sum(d.f32, where=d.mask), lambda xp, d: xp.where(d.mask, d.f32, 0).sum(), TypeError
    ),
    "initial=": Mistake(lambda xp, d: xp.max(d.f32, initial=0), lambda xp, d: xp.maximum(d.f32.max(), 0), TypeError),
    "maximum.reduce": Mistake(lambda xp, d: xp.maximum.reduce(d.f32), lambda xp, d: d.f32.max(0), NotImplementedError),
    "add.reduceat": Mistake(
        lambda xp, d: xp.add.reduceat(d.other, d.rows * 0), lambda xp, d: one_hot(xp, d) @ d.other, NotImplementedError
    ),
    "fp8 arrays": Mistake(
        lambda xp, d: xp.zeros(3, ml_dtypes.float8_e5m2), lambda xp, d: xp.zeros(3, np.uint8), ValueError
    ),
    # promotion
    "np.float64 scalar": Mistake(lambda xp, d: d.f32 * np.float64(0.5), lambda xp, d: d.f32 * 0.5, PromotionError),
    "a 0-d fp64 array": Mistake(
        lambda xp, d: d.f32 * d.rates[d.t], lambda xp, d: d.f32 * d.rates[d.t].astype(np.float32), PromotionError
    ),
    "a count as a factor": Mistake(
        lambda xp, d: d.f32 / d.mask.sum(), lambda xp, d: d.f32 / d.mask.sum().astype(np.float32), PromotionError
    ),
    "bf16 + fp32": Mistake(lambda xp, d: d.bf16 + d.f32, lambda xp, d: d.bf16.astype(np.float32) + d.f32, PromotionError),
    "bf16 * 2.0": Mistake(lambda xp, d: d.bf16 * 2.0, lambda xp, d: d.bf16 * 2, PromotionError),
    "bf16 ** 0.5": Mistake(lambda xp, d: abs(d.bf16) ** 0.5, lambda xp, d: xp.sqrt(abs(d.bf16)), PromotionError),
    "fp16 @ fp32": Mistake(lambda xp, d: d.fp16 @ d.other, lambda xp, d: d.fp16.astype(np.float32) @ d.other, PromotionError),
    # gaps of 16-bit formats
    "batched matmul of bf16": Mistake(
        lambda xp, d: d.heads.astype(BF16) @ d.other.astype(BF16), lambda xp, d: d.heads @ d.other, TypeError
    ),
    "norm of bf16": Mistake(
        lambda xp, d: xp.linalg.norm(d.bf16), lambda xp, d: xp.linalg.norm(d.bf16.astype(np.float32)), TypeError
    ),
    "clip of bf16": Mistake(lambda xp, d: d.bf16.clip(0, 1), lambda xp, d: d.f32.clip(0, 1), TypeError),
    "add.at of bf16": Mistake(
        lambda xp, d: scattered(xp.add, d.bf16, d.rows, d.bf16[:2]),
        lambda xp, d: scattered(xp.add, d.f32, d.rows, d.f32[:2]),
        TypeError,
    ),
    "maximum.at of fp16": Mistake(
        lambda xp, d: scattered(xp.maximum, d.fp16, d.rows, d.fp16[:2]),
        lambda xp, d: scattered(xp.maximum, d.f32, d.rows, d.f32[:2]),
        TypeError,
    ),
    "var of bf16": Mistake(lambda xp, d: d.bf16.var(), lambda xp, d: d.bf16.astype(np.float32).var(), TypeError),
    "where of bf16": Mistake(
        lambda xp, d: xp.where(d.mask, d.bf16, d.bf16 * 2), lambda xp, d: xp.where(d.mask, d.f32, d.f32 * 2), TypeError
    ),
    "cumsum of bf16": Mistake(lambda xp, d: d.bf16.cumsum(), lambda xp, d: d.f32.cumsum(), TypeError),
    # results that are undefined, and launches by the thousand
    "a repeated index assigned": Mistake(
        lambda xp, d: set_at(d.other, d.tokens, d.other + 1), lambda xp, d: set_at(d.other, d.rows, d.other[:2] + 1), ValueError
    ),
    "Python's sum": Mistake(lambda xp, d: sum(d.f32.reshape(-1)), lambda xp, d: d.f32.reshape(-1).sum(), "launches"),
    "a loop over rows": Mistake(
        lambda xp, d: xp.stack([row / row.sum() for row in d.f32]),
        lambda xp, d: d.f32 / d.f32.sum(-1, keepdims=True),
        "launches",
    ),
}


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 26


@pytest.mark.parametrize("name", MISTAKES)
def test_the_stand_in_catches_the_mistake(name: str, d: SimpleNamespace) -> None:
    mistake = MISTAKES[name]
    with counter.no_sync():
        if not isinstance(mistake.caught, str):
            with pytest.raises(mistake.caught):
                mistake.wrong(xp, d)
            return
        mistake.right(xp, d)
        usual = getattr(counter, mistake.caught)
        counter.reset()
        mistake.wrong(xp, d)
    assert getattr(counter, mistake.caught) > usual


@pytest.mark.parametrize("name", MISTAKES)
def test_the_right_spelling_passes_on_both_and_gives_the_same(name: str, d: SimpleNamespace) -> None:
    right = MISTAKES[name].right
    with counter.no_sync():
        y = right(xp, d)
    expected = right(np, inputs(np))
    if isinstance(y, Array):
        assert y.dtype == expected.dtype and np.array_equal(y.get(), expected, equal_nan=True)
    else:
        assert y == expected


@pytest.mark.parametrize("name", MISTAKES)
def test_numpy_catches_none_of_them(name: str) -> None:
    MISTAKES[name].wrong(np, inputs(np))


# ------------------------------------------------------------------------------------------------- the real CuPy

on_cpu = pytest.mark.skipif(
    os.environ.get("CUPY_ON_CPU") != "1", reason="compares with the real CuPy, run on a CPU by a tool that sets CUPY_ON_CPU=1"
)

SAME = """
f32 + 1 | f32 * 2.0 | f32 / 3 | -f32 | abs(f32) | f32 ** 2 | f32 * np.float32(2) | np.float32(2) * f32 | f32 == f32 | ~mask
fp16 * 2.0 | fp16 / 2 | bf16 * 2 | bf16 + bf16 | bf16 / 3 | bf16 ** 2 | bf16 > 0.5 | bf16 - True | bf16 * mask | 2 / bf16
numbers / 2 | numbers + 1.5 | numbers // 5 | numbers % 5 | numbers > 5 | mask + 1 | mask & found_inf | f32 * mask | loss + 1
f32.sum() | f32.sum(0) | f32.sum((0, 1)) | f32.sum(-1, keepdims=True) | fp16.sum() | bf16.sum() | bf16.sum(dtype='f4')
f32.mean() | fp16.mean() | bf16.mean() | numbers.mean() | mask.mean() | f32.mean(-1, keepdims=True) | f32.var() | f32.std()
f32.max() | f32.max(-1, keepdims=True) | bf16.max() | f32.argmax() | mask.all() | numbers.any() | mask.sum() | f32.prod()
xp.linalg.norm(f32) | xp.linalg.norm(fp16) | f32.clip(None, 1.0) | f32.clip(0, 1) | xp.clip(fp16, 0, 1) | f32.ptp()
xp.where(mask, f32, 0.0) | xp.where(mask, 0, f32) | xp.where(found_inf, scale, loss) | xp.where(mask, fp16, 0)
xp.exp(f32) | xp.exp(fp16) | xp.tanh(bf16) | xp.exp(numbers) | xp.isfinite(bf16) | xp.maximum(f32, 0) | xp.maximum(bf16, 0)
xp.logical_not(bf16) | xp.copysign(f32, f32) | xp.square(bf16) | xp.sign(f32) | xp.exp(f32, out=xp.empty_like(f32))
f32.T | f32[0] | f32[0, 0] | f32[..., None] | f32[rows] | f32[:, rows] | f32[t] | rates[t] | f32[rows, columns] | f32[[0, 1]]
f32[mask] | f32.reshape(-1) | f32.T.reshape(-1) | f32.ravel() | f32.flatten() | f32.copy() | f32.view('i4') | bf16.view('u2')
f32.astype('f4') | f32.astype('f4', copy=False) | f32.astype('f2') | xp.ascontiguousarray(f32.T) | xp.ascontiguousarray(f32)
xp.zeros(3) | xp.ones(3, bf16.dtype) | xp.full((3,), 2.0) | xp.full((), -np.inf, 'f4') | xp.zeros_like(f32) | xp.eye(3)
xp.ones_like(f32) | xp.full_like(f32, 2) | xp.arange(5) | xp.linspace(0, 1, 5) | xp.tril(f32) | xp.triu(f32)
xp.asarray(np.float32(2)) | xp.asarray(np.array(2.0)) | xp.asarray(host) | xp.asarray([1, 2]) | xp.asarray(f32) | xp.array(f32)
xp.concatenate([f32, f32]) | xp.stack([f32, f32]) | xp.stack([loss, loss]) | xp.vstack([f32, f32]) | xp.hstack([f32, f32])
xp.broadcast_to(row, (3, 4)) | xp.expand_dims(f32, 0) | xp.moveaxis(heads, 0, 1) | xp.squeeze(f32[None]) | xp.flip(f32)
xp.take(f32, rows, axis=0) | xp.take_along_axis(f32, columns[None], axis=1) | xp.allclose(f32, f32) | xp.array_equal(f32, f32)
xp.nonzero(f32)[0] | xp.flatnonzero(f32) | xp.argwhere(f32) | f32.cumsum() | xp.repeat(f32, 2) | xp.tile(f32, 2)
f32 @ other | bf16 @ bf16.T | fp16 @ fp16.T | f32.T @ f32 | f32 @ row | row @ row | f32[:1] @ f32[:1].T | numbers @ numbers.T
heads @ heads.reshape(2, 4, 3) | heads.astype('f2') @ heads.astype('f2').reshape(2, 4, 3) | xp.dot(heads, other)
xp.tensordot(f32, other, 1) | xp.outer(row, row) | xp.vdot(row, row) | xp.matmul(f32, other, out=xp.empty((3, 2), 'f4'))
f32.__setitem__(..., 0) | f32.__setitem__(..., 1.5) | f32.__setitem__(0, f32[1]) | f32.__setitem__(..., bf16) | f32.fill(0)
f32.__setitem__(rows, 0) | f32.__setitem__(rows, 1.5) | f32.__setitem__(rows, row) | f32.__setitem__(rows, bf16[:2])
f32.__setitem__((rows, columns), 0) | f32.__setitem__((rows, columns), row[:2]) | f32.__setitem__((0, 0), 1)
float(loss) | int(t) | bool(found_inf) | loss.item() | f32.tolist() | f32.tobytes() | repr(loss) | f'{loss:.2f}' | f32.get()
xp.add.at(f32, rows, f32[:2]) | xp.maximum.at(f32, rows, f32[:2]) | xp.add.reduce(f32) | xp.add.accumulate(f32)
f32.trace() | xp.isclose(f32, f32) | f32.dot(other) | xp.sum(f32, 0, 'f8') | f32.__setitem__(0, f32[0])
xp.shape(f32) | xp.size(f32) | xp.result_type(f32, f64) | len(f32) | f32.nbytes | f32.strides | f32.flags.c_contiguous
"""

BOTH_REFUSE = """
f32 + host | host + f32 | f32 * np.array(2.0) | np.asarray(f32) | xp.exp(host) | xp.exp([1.0, 2.0]) | xp.exp(f32, out=host)
xp.where(np.array(True), f32, f32) | xp.where(True, f32, f32) | xp.stack([f32, host]) | xp.sum([1.0, 2.0])
xp.sum(f32, where=mask) | f32.setflags(write=False) | xp.vecdot(f32, f32) | len(loss) | xp.add.reduceat(bf16, rows)
xp.exp(f32, where=mask) | xp.max(f32, initial=0) | range(t) | [1, 2][t] | xp.zeros(t) | f32.reshape(t, -1) | hash(f32)
list(loss) | bool(f32) | float(f32) | round(f32) | loss.item(0) | f32.flags.writeable
xp.spacing(f32) | xp.errstate | xp.zeros(3, FP8) | xp.asarray(np.zeros(3, FP8)) | f32.astype(FP8) | f32.astype(object)
bf16 & bf16 | f32 & 1 | ~f32 | mask - mask | -mask | bf16[None] @ bf16.T[None] | bf16 @ fp16.T
xp.einsum('ij,kj->ik', bf16, bf16) | bf16.cumsum() | bf16.sort() | xp.argsort(bf16) | xp.add.accumulate(bf16)
xp.add.at(bf16, rows, bf16[:2]) | xp.maximum.at(fp16, rows, fp16[:2])
xp.subtract.at(f32, rows, f32[:2]) | xp.multiply.at(f32, rows, f32[:2])
xp.maximum.reduce(f32) | f32.__setitem__(..., host) | f32 @ f32
"""

# What CuPy computes, with a dtype or in a way that the stand-in keeps code away from.
STRICTER = {
    "bf16 * 2.0": "float32",
    "bf16 ** 0.5": "float64",
    "bf16 + f32": "float32",
    "f32 * f64": "float64",
    "f32 * np.float64(2)": "float64",
    "f32 * np.int32(2)": "float64",
    "f32 * numbers": "float64",
    "bf16.var()": "float64",
    "xp.linalg.norm(bf16)": "float64",
    "bf16.clip(0, 1)": "float32",
    "xp.where(mask, bf16, bf16)": "float32",
    "xp.tril(bf16)": "float32",
    "xp.round(bf16)": "float32",
    "np.exp(f32)": "float32",
    "np.sum(f32)": "float32",
    "f32[np.array([0, 1])]": "float32",
    "xp.add.reduceat(f32, rows)": "float32",
}


def expressions(text: str) -> list[str]:
    return [e.strip() for line in text.strip().splitlines() for e in line.split(" | ")]


@functools.cache
def real_cupy() -> tuple[Any, Any]:
    """CuPy, and the tool that runs it on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves files to be closed by themselves when it starts
        return importlib.import_module("cupy"), importlib.import_module("cupy_on_cpu")


def on_real_cupy(expression: str) -> tuple[Any, dict[str, int]]:
    """What the real CuPy makes of an expression (a result or an error), and what it counted."""
    cupy, cupy_on_cpu = real_cupy()
    names = {"xp": cupy, "np": np, "FP8": FP8, **vars(inputs(cupy))}
    cupy_on_cpu.reset()
    try:
        result: Any = eval(expression, names)
    except Exception as error:
        result = error
    stats = cupy_on_cpu.stats()
    renamed = {"launch": "launches", "gemm": "gemms", "h2d": "h2d", "d2h": "d2h", "d2d": "d2d", "sync": "syncs"}
    return result, {ours: stats[theirs] for theirs, ours in renamed.items() if stats[theirs]}


def on_stand_in(expression: str, d: SimpleNamespace) -> tuple[Any, dict[str, int]]:
    """The same for the stand-in."""
    try:
        return eval(expression, {"xp": xp, "np": np, "FP8": FP8, **vars(d)}), counts()
    except Exception as error:
        return error, counts()


def to_host(x: Any) -> np.ndarray:
    return np.asarray(x.get() if hasattr(x, "get") else x)


@on_cpu
@pytest.mark.parametrize("expression", expressions(SAME))
def test_the_same_result_and_cost_as_the_real_cupy(expression: str, d: SimpleNamespace) -> None:
    (theirs, their_counts), (ours, our_counts) = on_real_cupy(expression), on_stand_in(expression, d)
    a, b = to_host(theirs), to_host(ours)
    assert (a.dtype, a.shape) == (b.dtype, b.shape) or (a.dtype.kind == b.dtype.kind and isinstance(theirs, (str, bytes)))
    assert isinstance(ours, type(theirs)) or (isinstance(ours, Array) and type(theirs).__name__ == "ndarray")
    if a.dtype.kind in "fiub" or a.dtype == BF16:
        ulp = 2.0**-7 if a.dtype == BF16 else 2.0**-10 if a.dtype == np.float16 else 2.0**-20  # sums in another order
        assert np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=ulp, atol=ulp, equal_nan=True)
    assert our_counts == their_counts


@on_cpu
@pytest.mark.parametrize("expression", expressions(BOTH_REFUSE))
def test_what_the_real_cupy_refuses_is_refused(expression: str, d: SimpleNamespace) -> None:
    (theirs, _), (ours, _) = on_real_cupy(expression), on_stand_in(expression, d)
    assert isinstance(theirs, Exception) and isinstance(ours, Exception)
    builtin = type(theirs).__module__ == "builtins"
    assert isinstance(ours, type(theirs)) or not builtin or isinstance(ours, TypeError), (theirs, ours)


@on_cpu
@pytest.mark.parametrize("expression", STRICTER)
def test_what_only_the_stand_in_refuses(expression: str, d: SimpleNamespace) -> None:
    (theirs, _), (ours, _) = on_real_cupy(expression), on_stand_in(expression, d)
    assert theirs.dtype == STRICTER[expression] and isinstance(ours, (TypeError, NotImplementedError))


@on_cpu
def test_why_reduceat_is_refused() -> None:
    """CuPy subtracts prefix sums: a small sum behind a large one is lost."""
    cupy, _ = real_cupy()
    x, starts = np.array([1e8, 1, 1, 1], np.float32), np.array([0, 1])
    assert np.add.reduceat(x, starts).tolist() == [1e8, 3]
    assert cupy.add.reduceat(cupy.asarray(x), cupy.asarray(starts)).tolist() == [1e8, 0]


def test_the_frozen_table_is_what_the_script_reads() -> None:
    cupy = pytest.importorskip("cupy", reason="reads the names of an installed CuPy")
    if cupy.__version__ != API["version"]:
        pytest.skip(f"the table is of CuPy {API['version']}, {cupy.__version__} is installed")
    assert json.loads(json.dumps(load_script("freeze_cupy_api").frozen())) == API
