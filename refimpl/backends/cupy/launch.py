"""The CUDA kernels: compiled at first use, and launched with every argument checked.

    kernels = Kernels()
    kernels("bf16").layernorm_forward(grid, (WARP, WARPS), x, w, b, y, mean, rstd, *sizes, np.float32(EPS))

CuPy does not check arguments: it packs a Python float as a double where a kernel reads a float, and passes any array. So each
launch is checked against the kernel's declaration, parsed from the source.
"""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.numerics.formats import dtype_of

FORMATS = ("fp32", "fp16", "bf16")
"""The storage formats that kernels are compiled for."""

THREADS = 256
WARP, WARPS = 32, 8
COLUMNS, LANES = 8, 128
"""Block sizes, named as in kernels.cu. Launches with others are refused."""

_TYPES: dict[str, np.dtype] = {
    "float": np.dtype(np.float32),
    "int": np.dtype(np.int32),
    "long long": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel. type: the C type of the number, or of the pointer's target: float, int, ... or T."""

    name: str
    type: str
    pointer: bool
    or_null: bool = False

    def dtype(self, fmt: str) -> np.dtype:
        """Return the array type of `type`, where T is the storage format `fmt`."""
        return dtype_of(fmt) if self.type == "T" else _TYPES[self.type]


@dataclass(frozen=True)
class Declaration:
    """A kernel as declared in its source: its name, the shape of its blocks, its arguments."""

    name: str
    block: tuple[int, ...]
    arguments: tuple[Argument, ...]


def source() -> str:
    """Return kernels.cu with cast.cuh inserted instead of its #include.

    CuPy's cache of compiled kernels is keyed by the source text, and would not notice a change in an included file.
    """
    folder = importlib.resources.files("refimpl.backends.cupy.kernels")
    text, header = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("kernels.cu", "cast.cuh"))
    return text.replace('#include "cast.cuh"', header.replace("#pragma once", ""))


_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(([\w *]+)\)\s+(\w+)\(([^)]*)\)')
_ARGUMENT = re.compile(r"(?:const )?(float|int|long long|bool|T)(\*?) (\w+)( /\*or null\*/)?")


def declarations(text: str) -> dict[str, Declaration]:
    """Return every kernel that a source declares, by name. Errors: ValueError for one that cannot be parsed."""
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    found = {}
    for bounds, name, arguments in _KERNEL.findall(text):
        block = tuple(constants[word] if word in constants else int(word) for word in bounds.split(" * "))
        found[name] = Declaration(name, block, tuple(_argument(name, words) for words in arguments.split(",")))
    if len(found) != text.count("__global__ void"):
        raise ValueError(f"{text.count('__global__ void')} kernels, of which only {len(found)} can be read: {', '.join(found)}")
    return found


def _argument(kernel: str, words: str) -> Argument:
    read = _ARGUMENT.fullmatch(" ".join(words.split()))
    if read is None:
        raise ValueError(f"{kernel}: cannot read the argument {words.strip()!r}")
    type_, star, name, or_null = read.groups()
    return Argument(name, type_, star == "*", or_null is not None)


def check(kernel: Declaration, fmt: str, block: Sequence[int], arguments: Sequence[Any]) -> None:
    """Check a launch against the declaration of its kernel.

    A pointer takes a device array of exactly its type in C order, or None where it may be null; a number must be exactly
    np.float32, np.int32 or np.int64. Errors: TypeError that names the kernel, the argument and what is wrong.
    """
    if tuple(block) != kernel.block:
        raise TypeError(f"{kernel.name}: its blocks have the shape {kernel.block}, not {tuple(block)}")
    if len(arguments) != len(kernel.arguments):
        raise TypeError(f"{kernel.name}: takes {len(kernel.arguments)} arguments, got {len(arguments)}")
    for argument, value in zip(kernel.arguments, arguments, strict=True):
        wrong = (_wrong_array if argument.pointer else _wrong_number)(argument, argument.dtype(fmt), value)
        if wrong:
            raise TypeError(f"{kernel.name}: {argument.name} {wrong}")


def _wrong_number(argument: Argument, dtype: np.dtype, value: Any) -> str | None:
    if type(value) is dtype.type:
        return None
    why = ", which would be packed as a double" if isinstance(value, float) else ""
    return f"is np.{dtype.name}, not {type(value).__name__}{why}"


def _wrong_array(argument: Argument, dtype: np.dtype, value: Any) -> str | None:
    if value is None:
        return None if argument.or_null else "must not be null"
    if isinstance(value, np.ndarray | np.generic) or not hasattr(value, "dtype"):
        return f"is an array on the device, not {type(value).__name__}"
    if value.dtype != dtype:
        return f"is an array of {dtype}, not {value.dtype}"
    return None if value.flags.c_contiguous else "is an array in C order, this one is not"


def number(value: float) -> np.float32:
    """Return a Python number as the float that a kernel takes."""
    return np.float32(value)


def elementwise_grid(n: int) -> tuple[int]:
    """Return a grid for n elements: one thread per element up to a million, several elements per thread beyond."""
    return (min(-(-n // THREADS), 4096),)


Launch = Callable[..., None]


class Module:
    """The kernels for one storage format, each a method: name(grid, block, *arguments)."""

    def __init__(self, fmt: str, text: str, kernels: Mapping[str, Declaration]) -> None:
        if fmt not in FORMATS:
            raise ValueError(f"no kernels for {fmt}: only for {', '.join(FORMATS)}")
        self._fmt, self._text, self._kernels = fmt, text, kernels

    @functools.cached_property
    def _compiled(self) -> Any:
        cupy = importlib.import_module("cupy")
        return cupy.RawModule(code=self._text, options=(f"-DSTORAGE={self._fmt}", "--std=c++17"))

    def __getattr__(self, name: str) -> Launch:
        """Return the launch of one kernel. A grid without blocks is not launched."""
        if name not in self._kernels:
            raise AttributeError(f"no kernel {name!r}")
        kernel, function = self._kernels[name], None

        def launch(grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any) -> None:
            nonlocal function
            check(kernel, self._fmt, block, arguments)
            if 0 in grid:
                return
            function = function or self._compiled.get_function(name)
            function(grid, block, arguments)

        self.__dict__[name] = launch  # from now on found without __getattr__
        return launch


class Kernels:
    """All kernels: `kernels(fmt)` is the `Module` for one storage format, compiled at its first launch."""

    def __init__(self, text: str | None = None) -> None:
        """text: the CUDA source; the project's own if None."""
        self.text = source() if text is None else text
        self.declarations = declarations(self.text)
        self._modules: dict[str, Module] = {}

    def __call__(self, fmt: str) -> Module:
        if fmt not in self._modules:
            self._modules[fmt] = Module(fmt, self.text, self.declarations)
        return self._modules[fmt]
