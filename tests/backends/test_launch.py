"""backends.cupy.launch: what it reads of the kernels' source, and the launches that it refuses. No CuPy, no compiler."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refimpl.backends.cupy.launch import (
    COLUMNS,
    FORMATS,
    LANES,
    THREADS,
    WARP,
    WARPS,
    Argument,
    Kernels,
    Module,
    check,
    declarations,
    elementwise_grid,
    source,
)
from refimpl.numerics.formats import dtype_of


class Fake:
    """A device array, as far as a launch looks at one."""

    def __init__(self, dtype: Any, contiguous: bool = True) -> None:
        self.dtype, self.flags = np.dtype(dtype), SimpleNamespace(c_contiguous=contiguous)


def layernorm(fmt: str = "bf16") -> list[Any]:
    """Good arguments of layernorm_forward: x, w, b, y, mean, rstd, rows, C, eps."""
    arrays = [Fake(dtype_of(fmt)) for _ in range(4)] + [Fake(np.float32) for _ in range(2)]
    return [*arrays, np.int32(5), np.int32(64), np.float32(1e-5)]


KERNEL = declarations(source())["layernorm_forward"]
BLOCK = (WARP, WARPS)


def test_declarations_are_read_as_they_are_written() -> None:
    text = """
    constexpr int SIDE = 8;  // of a block
    // A comment about __global__ functions and a call(int x).
    extern "C" __global__ void __launch_bounds__(SIDE * 4)
    first(const T* x, float* y /*or null*/, long long n) {
    }
    extern "C" __global__ void __launch_bounds__(1)
    second(const long long* tokens,
           bool* found, int n, float eps) {
    }
    """
    first, second = declarations(text).values()
    assert (first.name, first.block, second.name, second.block) == ("first", (8, 4), "second", (1,))
    assert first.arguments == (Argument("x", "T", True), Argument("y", "float", True, True), Argument("n", "long long", False))
    assert [a.type for a in second.arguments] == ["long long", "bool", "int", "float"]
    assert [a.pointer for a in second.arguments] == [True, True, False, False]


@pytest.mark.parametrize(
    "text",
    [
        'extern "C" __global__ void __launch_bounds__(1)\nf(double x) {',
        'extern "C" __global__ void __launch_bounds__(1)\nf(const T** x) {',
        'extern "C" __global__ void f(int n) {',
        "__global__ void __launch_bounds__(1) f(int n) {",
    ],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="read"):
        declarations(text)


def test_the_source_is_one_text_with_the_blocks_that_launch_names() -> None:
    text = source()
    assert '#include "' not in text and "round_to" in text
    assert {kernel.block for kernel in declarations(text).values()} == {(THREADS,), (WARP, WARPS), (COLUMNS, LANES)}


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_good_launch_passes(fmt: str) -> None:
    check(KERNEL, fmt, BLOCK, layernorm(fmt))


def test_null_passes_where_the_kernel_says_so() -> None:
    arguments = layernorm()
    arguments[2] = None
    check(KERNEL, "bf16", BLOCK, arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, Fake(np.float32), "x is an array of bfloat16, not float32"),
        (0, Fake(np.float16), "x is an array of bfloat16, not float16"),
        (0, Fake(dtype_of("bf16"), contiguous=False), "x is an array in C order"),
        (0, None, "x must not be null"),
        (0, np.zeros(3, dtype_of("bf16")), "x is an array on the device, not ndarray"),
        (0, np.float32(1), "x is an array on the device, not float32"),
        (0, [1.0], "x is an array on the device, not list"),
        (4, Fake(dtype_of("bf16")), "mean is an array of float32, not bfloat16"),
        (7, 64, "C is np.int32, not int"),
        (7, np.int64(64), "C is np.int32, not int64"),
        (7, np.float32(64), "C is np.int32, not float32"),
        (8, 1e-5, "eps is np.float32, not float, which would be packed as a double"),
        (8, np.float64(1e-5), "eps is np.float32, not float64, which would be packed as a double"),
        (8, np.float16(1e-5), "eps is np.float32, not float16"),
        (8, Fake(np.float32), "eps is np.float32, not Fake"),
    ],
)
def test_a_wrong_argument_is_named(place: int, value: Any, message: str) -> None:
    arguments = layernorm()
    arguments[place] = value
    with pytest.raises(TypeError) as caught:
        check(KERNEL, "bf16", BLOCK, arguments)
    assert str(caught.value).startswith(f"layernorm_forward: {message}")


def test_too_few_and_too_many_arguments_and_another_block_are_refused() -> None:
    with pytest.raises(TypeError, match="takes 9 arguments, got 8"):
        check(KERNEL, "bf16", BLOCK, layernorm()[:-1])
    with pytest.raises(TypeError, match="takes 9 arguments, got 10"):
        check(KERNEL, "bf16", BLOCK, [*layernorm(), None])
    with pytest.raises(TypeError, match=r"blocks have the shape \(32, 8\), not \(128,\)"):
        check(KERNEL, "bf16", (128,), layernorm())


@dataclass
class FakeCupy:
    """Stands for CuPy: notes what is compiled and launched."""

    compiled: list[tuple[str, ...]] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    def RawModule(self, code: str, options: tuple[str, ...]) -> FakeCupy:
        self.compiled.append(options)
        return self

    def get_function(self, name: str) -> Any:
        return lambda grid, block, arguments: self.launched.append((name, grid, block, len(arguments)))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def test_kernels_are_compiled_at_their_first_launch_and_once_a_format(cupy: FakeCupy) -> None:
    kernels = Kernels()
    assert kernels("bf16") is kernels("bf16")
    kernels("fp16")
    assert cupy.compiled == []
    for _ in range(2):
        kernels("bf16").layernorm_forward((5,), BLOCK, *layernorm())
    kernels("fp16").layernorm_forward((7,), BLOCK, *layernorm("fp16"))
    assert [options[0] for options in cupy.compiled] == ["-DSTORAGE=bf16", "-DSTORAGE=fp16"]
    assert cupy.launched == [("layernorm_forward", grid, BLOCK, 9) for grid in ((5,), (5,), (7,))]


def test_an_empty_grid_is_checked_but_not_launched(cupy: FakeCupy) -> None:
    arrays = [Fake(np.float32) for _ in range(3)]
    Kernels()("fp32").add_forward(elementwise_grid(0), (THREADS,), *arrays, np.int64(0))
    assert cupy.launched == cupy.compiled == []
    with pytest.raises(TypeError, match=r"n is np\.int64"):
        Kernels()("fp32").add_forward((0,), (THREADS,), *arrays, 0)


def test_unknown_kernels_and_formats_are_refused() -> None:
    with pytest.raises(AttributeError, match="no kernel 'conv'"):
        Kernels()("fp32").conv  # noqa: B018
    with pytest.raises(ValueError, match="no kernels for fp64"):
        Kernels()("fp64")
    assert not hasattr(Module("fp32", source(), {}), "add_forward")


@pytest.mark.parametrize("n", [0, 1, THREADS, THREADS + 1, 1_000_003, 1 << 33])
def test_a_grid_has_a_thread_for_each_element_or_is_full(n: int) -> None:
    (blocks,) = elementwise_grid(n)
    assert blocks == 4096 or (blocks - 1) * THREADS < n <= blocks * THREADS or n == blocks == 0
