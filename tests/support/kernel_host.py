"""The CUDA kernels on the CPU: the same source, compiled by g++ with NVIDIA's headers and the stand-ins of cuda_host.h.

    host = HostKernels()                      # why_not() says what it would lack
    host.launch("fp16", "add_forward", (1,), a, b, y, np.int64(n))

Arrays are NumPy's and are written in place. `c_function` computes exp, log and tanh of arrays with the C library, so that a
definition in NumPy can be computed with the very functions that the kernels call here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from paths import SUPPORT

from refimpl.backends.cupy.launch import FORMATS, Declaration, declarations, source

NEEDED = ("cuda_fp16.h", "crt/host_defines.h", "nv/target")
"""Headers, each in its own package: nvidia-cuda-runtime, nvidia-cuda-crt, and nvidia-cuda-cccl or CuPy."""


def _include_folders() -> Iterator[Path]:
    """Folders that may hold NVIDIA's headers: the packages of this interpreter, then CUDA_PATH."""
    nvidia, cupy = importlib.util.find_spec("nvidia"), importlib.util.find_spec("cupy")
    roots = [*(nvidia.submodule_search_locations or ())] if nvidia else []
    for include in sorted(path for root in roots for path in Path(root).glob("*/include")):
        yield from (include, include / "cccl")
    for root in (cupy.submodule_search_locations or ()) if cupy else ():
        yield Path(root) / "_core/include/cupy/_cccl/libcudacxx"
    if "CUDA_PATH" in os.environ:
        yield from (Path(os.environ["CUDA_PATH"]) / "include", Path(os.environ["CUDA_PATH"]) / "include" / "cccl")


@functools.cache
def include_options() -> list[str] | None:
    """-I options by which all of NEEDED are found, or None."""
    folders = [folder for folder in _include_folders() if folder.is_dir()]
    if all(any((folder / header).is_file() for folder in folders) for header in NEEDED):
        return [f"-I{folder}" for folder in folders]
    return None


def why_not() -> str | None:
    """What a host build lacks here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if include_options() is None:
        return "NVIDIA's headers are not installed: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    return None


def _launcher(kernel: Declaration) -> str:
    """C++: host_<kernel>(grid, block, reverse, ...the kernel's own arguments) -> whether all barriers were met by all."""
    typed = [f"{'STORAGE' if a.type == 'T' else a.type}{'*' * a.pointer} {a.name}" for a in kernel.arguments]
    return (
        f'extern "C" bool host_{kernel.name}(const int* of_grid, const int* of_block, bool reverse, {", ".join(typed)}) {{\n'
        f"    auto body = [=] {{ {kernel.name}({', '.join(a.name for a in kernel.arguments)}); }};\n"
        f"    return run_grid(of_grid, of_block, reverse, body);\n}}\n"
    )


class HostKernels:
    """The kernels of a source text, compiled for each format when first launched: of another text than source(), one by one."""

    def __init__(self, text: str | None = None, reverse: bool = False) -> None:
        """reverse: let blocks and threads take turns last to first, which must change nothing."""
        self.text = source() if text is None else text
        self.reverse = reverse
        self.declarations = declarations(self.text)

    def launch(self, fmt: str, name: str, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run a kernel over a grid, with the blocks that it declares. Arrays are NumPy's, in C order, of the exact types."""
        kernel = self.declarations[name]
        packed = [_pack(a, fmt, value) for a, value in zip(kernel.arguments, arguments, strict=True)]
        library = _library(self.text, fmt) if self.text == source() else _library(self.text, fmt, name)
        function = getattr(library, f"host_{name}")
        function.restype = ctypes.c_bool
        met = function(_shape(grid), _shape(kernel.block), ctypes.c_bool(self.reverse), *packed)
        assert met, f"{name}: a barrier was missed"


def _shape(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * 2)(*sizes, *[1] * (2 - len(sizes)))


def _pack(argument: Any, fmt: str, value: Any) -> Any:
    dtype = argument.dtype(fmt)
    if value is None:
        assert argument.or_null, argument
        return ctypes.c_void_p(None)
    assert value.dtype == dtype, (argument, value.dtype)
    if argument.pointer:
        assert isinstance(value, np.ndarray) and value.flags.c_contiguous, argument
        return ctypes.c_void_p(value.ctypes.data)
    assert isinstance(value, np.generic), argument
    return {"float": ctypes.c_float, "int": ctypes.c_int, "long long": ctypes.c_longlong}[argument.type](value.item())


def c_function(name: str, x: np.ndarray) -> np.ndarray:
    """expf, logf or tanhf of the C library, of every element of an fp32 array."""
    x = np.ascontiguousarray(x, np.float32)
    y = np.empty_like(x)
    function = getattr(_library(source(), "fp32"), f"each_{name}")
    function(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_longlong(x.size))
    return y


@functools.cache
def _library(text: str, fmt: str, only: str | None = None) -> ctypes.CDLL:
    """The source, compiled for one format and loaded; the file is gone at once. only: a kernel, in a quarter of the time."""
    assert fmt in FORMATS
    options = include_options()
    assert options is not None, why_not()
    kernels = declarations(text)
    launchers = "".join(_launcher(kernel) for kernel in (kernels.values() if only is None else [kernels[only]]))
    text = text.replace('extern "C" __global__', "static __global__")  # so that kernels without a launcher are not compiled
    program = f'#include "{SUPPORT / "cuda_host.h"}"\n{text}\n{launchers}'
    # A fortified longjmp refuses to jump to another stack.
    flags = ["-O2", "-U_FORTIFY_SOURCE", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", f"-DSTORAGE={fmt}"]
    with tempfile.TemporaryDirectory(prefix="refimpl-") as folder:
        library = Path(folder) / "kernels.so"
        command = ["g++", *flags, *options, "-x", "c++", "-", "-o", str(library)]
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return ctypes.CDLL(str(library))
