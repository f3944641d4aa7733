"""The CUDA kernels launched by CuPy, against their NumPy definitions: on a GPU, or on a stand-in for one.

The checks are those of kernel_cases.py. With CUPY_ON_CPU set (real CuPy on a fake device) exp, log and tanh are the C
library's; on a GPU they are CUDA's, and results that contain one are held to bounds.py. Either flushes subnormals.
CUPY_ON_CPU_REVERSE=1 lets the fake device run threads last to first: the same tests must pass.
"""

from __future__ import annotations

import os
from typing import Any

import kernel_host
import numpy as np
import pytest
from kernel_cases import CHECKS, CFunctions, Device, all_kinds, assert_same, empty
from kernel_host import c_function

from refimpl.backends.cupy.launch import FORMATS, THREADS, Kernels, elementwise_grid
from refimpl.numerics.casts import cast, widen

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
ON_CPU = os.environ.get("CUPY_ON_CPU") == "1"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("ieee"),
    pytest.mark.skipif(not cupy.cuda.is_available(), reason="CuPy is installed, but no NVIDIA GPU answers"),
]


def device(text: str | None = None) -> Device:
    """Copies each array to the device, launches with `Kernels`, and copies back."""
    kernels = Kernels(text)

    def launch(fmt: str, name: str, grid: tuple[int, ...], *arguments: Any) -> None:
        there = [cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
        getattr(kernels(fmt), name)(grid, kernels.declarations[name].block, *there)
        for x, y in zip(arguments, there, strict=True):
            if isinstance(x, np.ndarray):
                x[...] = cupy.asnumpy(y)

    functions = CFunctions(c_function) if ON_CPU and not kernel_host.why_not() else None
    return Device(launch, functions, flushes=True)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernel_computes_its_definition(check: str, fmt: str) -> None:
    CHECKS[check](device(), fmt)


def test_subnormals_are_flushed_and_nothing_else_is_lost() -> None:
    """CuPy's -ftz=true: an fp32 number below 2^-126 is zero when it is added, with its sign; so is such a sum."""
    rng = np.random.default_rng(16)
    a, b, y = all_kinds(rng, 100_000, "fp32", tiny=True), all_kinds(rng, 100_000, "fp32", tiny=True), empty(100_000, "fp32")
    a[::3] *= np.float32(1e-38)
    b[::3] *= np.float32(1e-38)

    def flushed(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)

    device().launch("fp32", "add_forward", elementwise_grid(a.size), a, b, y, np.int64(a.size))
    assert np.count_nonzero(flushed(a) != a) > 10_000
    assert_same(y, flushed(flushed(a) + flushed(b)))


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_rounding_keeps_the_subnormals_of_16_bits(fmt: str) -> None:
    """Every code passes through widen and round_to as it is, fp16's subnormals too, which are normal numbers in fp32."""
    x = np.arange(1 << 16, dtype=np.uint16).view(empty(0, fmt).dtype)
    zero, y = np.zeros_like(x), np.zeros_like(x)
    device().launch(fmt, "add_forward", elementwise_grid(x.size), x, zero, y, np.int64(x.size))
    wide = widen(x)
    normal = ~(np.abs(wide) < np.finfo(np.float32).tiny)
    assert_same(y[normal], cast(wide + np.float32(0), fmt)[normal])


def test_a_launch_with_a_python_number_is_refused() -> None:
    x = cupy.zeros(3, np.float32)
    with pytest.raises(TypeError, match=r"n is np\.int64, not int"):
        Kernels()("fp32").add_forward((1,), (THREADS,), x, x, x, 3)


@pytest.mark.skipif(os.environ.get("CUPY_ON_CPU_REVERSE") != "1", reason="needs CUPY_ON_CPU_REVERSE=1")
def test_a_missing_barrier_is_seen_when_threads_run_last_to_first() -> None:
    text = Kernels().text
    barrier = "        __syncthreads();\n        unsigned words"
    assert text.count(barrier) == 1
    with pytest.raises(AssertionError):
        CHECKS["embedding_backward"](device(text.replace(barrier, "        unsigned words")), "fp32")
