"""A strict stand-in for CuPy, on plain NumPy: it refuses what CuPy refuses or does differently, and counts what costs.

    from strict_cupy import counter, xp

    x = xp.asarray(np.ones(3, np.float32))       # the way in: a counted host-to-device copy
    counter.reset()
    with counter.no_sync():                      # a wait for the device, or a copy from it, is a WaitError here
        y = (x * 2).sum()
    xp.asnumpy(y)                                # the way out: a counted copy and wait
    assert (counter.launches, counter.syncs) == (2, 1)

There is one `xp` and one `counter`, as a process has one CuPy: a test resets what it counts. The rules, each with its tests
in test_strict_cupy.py; (+) marks where the stand-in is stricter than CuPy, to catch what tends to be a mistake:

 1. No NumPy array is mixed in, neither as an operand nor as an index (+), nor does a function of NumPy take a device array
    (+). NumPy's scalars, such as np.float32(2), are operands like any other.
 2. Reductions and indexing give arrays, 0-d ones too, never numbers of Python or NumPy.
 3. Reading a value (float, bool, if, item, tolist, repr, asnumpy ...) is a wait; an array is no integer of the host.
 4. Results whose shape depends on values (x[mask], nonzero, unique ...) wait; array_equal and allclose do not.
 5. Only names and parameters that CuPy has: no `where=`, no `initial=`, no vecdot.
 6. `out=` is a device array.
 7. Only dtypes that CuPy has, FP8 is none of them; a ufunc takes only those that it has a loop for.
 8. The float operands of an operation share one dtype, and no result is silently wider than they are (+).
 9. What bfloat16 cannot do: batched matmul, einsum, var, norm, clip, where, cumsum, sort, ...
10. No index twice in an assignment (+); no xp.random and xp.fft (+).
11. `ufunc.at`, `reduce` and `accumulate` only where CuPy has them, and `at` only for its dtypes.
12. A list as an index, and asarray of what is on the host, are counted copies.
13. Each operation counts the launches, GEMMs and copies that it costs.
14. Products and sums of 16-bit values are made in FP32 and rounded once.

Not modeled: the memory order of results; indices out of range, which CuPy wraps (IndexError here); casts of NaN or large
floats to integers; bits of NaN; flushed subnormals; the undefined order of float sums in `add.at`; streams, devices, cupyx,
kernels of one's own. Counts of what is rare (histogram, unique, ...) are rough. A name that CuPy has and the stand-in does
not know is a NotImplementedError.

Names and signatures are those of cupy_api.json, which scripts/freeze_cupy_api.py reads from an installed CuPy. What
cannot be read from there (costs, gaps) was found by running CuPy 14.2.0; test_strict_cupy.py holds it against the real one.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from paths import SUPPORT

API = json.loads((SUPPORT / "cupy_api.json").read_text(encoding="utf-8"))

BF16 = np.dtype(ml_dtypes.bfloat16)
FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
DTYPES = {np.dtype(char) for char in "?bBhHiIlLqQefdFD"} | {BF16}
WEAK_SCALARS = (bool, int, float, complex)  # numbers of Python: they take the dtype of the array beside them


class WaitError(RuntimeError):
    """The host waits for the device inside `no_sync()`."""


class PromotionError(TypeError):
    """Operands of two float formats, or a result silently wider than its operands: NumPy and CuPy differ there."""


@dataclass
class Counter:
    """What the operations so far would have cost on a device. GEMMs are not among the launches."""

    launches: int = 0
    gemms: int = 0
    h2d: int = 0  # copies from host to device
    d2h: int = 0  # copies from device to host
    d2d: int = 0  # plain copies on the device
    syncs: int = 0  # waits of the host
    _waits_allowed: bool = field(default=True, repr=False)

    def reset(self) -> None:
        """All counts to zero."""
        self.launches = self.gemms = self.h2d = self.d2h = self.d2d = self.syncs = 0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, each wait and each copy to the host is a WaitError."""
        before, self._waits_allowed = self._waits_allowed, False
        try:
            yield
        finally:
            self._waits_allowed = before

    def wait(self, reason: str) -> None:
        """Count a copy to the host and the wait for it."""
        if not self._waits_allowed:
            raise WaitError(f"{reason} waits for the device")
        self.d2h += 1
        self.syncs += 1


counter = Counter()


# ------------------------------------------------------------------------------------------------------- arrays


class Array:
    """What cupy.ndarray is to the code under test. The values are in a NumPy array that only this file touches."""

    __array_ufunc__ = None  # `np.float32(2) * x` is then left to us, and so is `numpy_array * x`, which is refused
    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # == compares values

    def __init__(self, host: Any) -> None:
        self._host = np.asarray(host)
        if self._host.dtype not in DTYPES:
            raise ValueError(f"Unsupported dtype {self._host.dtype}")

    def __getattr__(self, name: str) -> Any:
        """The methods that are functions too: `x.sum(...)` is `sum(x, ...)`, with the parameters of the method."""
        if name not in API["ndarray"]:
            raise AttributeError(f"arrays of CuPy have no {name!r}")
        if API["ndarray"][name] == "attribute" or name in METHODS_UNLIKE_FUNCTIONS or not hasattr(np, name):
            raise NotImplementedError(f"the stand-in does not model cupy.ndarray.{name}")
        return functools.partial(call, name, API["ndarray"][name], self)

    # -- what the host knows without asking the device

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: Flags(self._host.flags.c_contiguous, self._host.flags.f_contiguous))
    T = property(lambda self: Array(self._host.T))
    mT = property(lambda self: Array(self._host.mT))

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[Array]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    # -- what waits for the device. There is no __index__: `range(x)` and `a_list[x]` are TypeErrors, as in CuPy.

    def _read(self, reason: str) -> np.ndarray:
        counter.wait(reason)
        return self._host

    def _number(self, reason: str) -> Any:
        if self.ndim:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return self._read(reason)

    def __bool__(self) -> bool:
        return bool(self._read("bool(), or an if on an array,"))

    def __float__(self) -> float:
        return float(self._number("float()"))

    def __int__(self) -> int:
        return int(self._number("int()"))

    def __complex__(self) -> complex:
        return complex(self._number("complex()"))

    def __repr__(self) -> str:
        return repr(self._read("repr()"))

    def __str__(self) -> str:
        return str(self._read("str()"))

    def __format__(self, spec: str) -> str:
        return format(self._read("format()")[()], spec)

    def __reduce__(self) -> Any:
        return Array, (self._read("pickle").copy(),)

    def item(self) -> Any:
        return self._read("item()").item()

    def tolist(self) -> Any:
        return self._read("tolist()").tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self._read("tobytes()").tobytes()

    def get(self, stream: Any = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
        host = self._read("get(), or asnumpy(),").copy()
        if out is None:
            return host
        out[...] = host
        return out

    # -- what is refused: NumPy would otherwise take the array for a sequence, or call its methods

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array; xp.asnumpy(x) is the way")

    def __array_function__(self, function: Any, *args: Any) -> Any:
        raise TypeError(f"np.{function.__name__} of a device array; take it from xp")

    # -- operators; the elementwise ones are added at the end of this file

    def __matmul__(self, other: Any) -> Any:
        return call("matmul", API["functions"]["matmul"], self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return call("matmul", API["functions"]["matmul"], other, self)

    # -- methods that are no functions, or not the same

    def copy(self, order: str = "C") -> Array:
        return _launched(self._host.copy())

    def __deepcopy__(self, memo: Any) -> Array:
        return self.copy()

    def astype(self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True) -> Array:
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        with np.errstate(all="ignore"):
            return _launched(self._host.astype(dtype))

    def view(self, dtype: Any = None) -> Array:
        return Array(self._host.view(self.dtype if dtype is None else dtype))

    def reshape(self, *shape: Any, order: str = "C") -> Any:
        sizes = shape[0] if len(shape) == 1 else shape
        return call("reshape", API["functions"]["reshape"], self, sizes, order=order)

    def transpose(self, *axes: Any) -> Array:
        return Array(self._host.transpose(*axes))

    def flatten(self, order: str = "C") -> Array:
        return _launched(self._host.flatten())

    def fill(self, value: Any) -> None:
        self[...] = value

    # -- indexing

    def __getitem__(self, key: Any) -> Array:
        host_key, arrays = index(key)
        counter.launches += {0: 0, 1: 1}.get(arrays, 3)
        return Array(self._host[host_key])

    def __setitem__(self, key: Any, value: Any) -> None:
        host_key, arrays = index(key)
        if not isinstance(value, (Array, np.generic, *WEAK_SCALARS)):
            raise TypeError(f"{type(value).__name__} assigned to a device array; xp.asarray copies it there")
        if arrays:
            places = np.arange(self.size).reshape(self.shape)[host_key]
            if np.unique(places).size < places.size:
                raise ValueError("a repeated index in an assignment: which value stays is undefined")
        _count_assignment(self._host[host_key], value, arrays)
        with np.errstate(all="ignore"):
            self._host[host_key] = operand(value)


METHODS_UNLIKE_FUNCTIONS = {"sort", "partition"}  # they work in place


@dataclass(frozen=True)
class Flags:
    """The layout of an array; CuPy's flags have no `writeable`."""

    c_contiguous: bool
    f_contiguous: bool

    @property
    def forc(self) -> bool:
        return self.c_contiguous or self.f_contiguous

    def __getitem__(self, name: str) -> bool:
        return {"C_CONTIGUOUS": self.c_contiguous, "F_CONTIGUOUS": self.f_contiguous}[name]


def _launched(host: Any) -> Array:
    """The result of one kernel."""
    result = Array(host)
    counter.launches += 1
    return result


def index(key: Any) -> tuple[tuple[Any, ...], int]:
    """What NumPy is to index with, always for a view where CuPy makes one, and how many of its parts are arrays."""
    parts, arrays = list(key) if isinstance(key, tuple) else [key], 0
    for i, part in enumerate(parts):
        if isinstance(part, np.ndarray):
            raise TypeError("a NumPy array as an index; xp.asarray copies it to the device")
        if isinstance(part, list):
            part = asarray(part)  # counted
        if isinstance(part, Array):
            if part.dtype == bool:
                counter.wait("an index by a mask, whose result has a shape that depends on values,")
                counter.launches += 1
            parts[i] = part._host
            arrays += 1
    if not arrays and not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)  # NumPy then returns a 0-d view, not a number
    return tuple(parts), arrays


def _count_assignment(target: np.ndarray, value: Any, arrays: int) -> None:
    """Scatters take a launch, one more to convert the value, two more for several index arrays; zeros are set, not launched."""
    source = value._host if isinstance(value, Array) else None
    zero = source is None and not value
    if arrays:
        converted = not zero if source is None else source.dtype != target.dtype
        counter.launches += 1 + converted + 2 * (arrays > 1)
    elif source is not None and (source.dtype, source.shape) == (target.dtype, target.shape):
        if source.__array_interface__ == target.__array_interface__:
            return  # the second half of `x[i] += 1`: what is written is there already
        plain = source.flags.c_contiguous and target.flags.c_contiguous
        counter.d2d, counter.launches = counter.d2d + plain, counter.launches + (not plain)
    elif not (zero and target.flags.c_contiguous):
        counter.launches += 1


# ------------------------------------------------------------------------------------------- dtypes of operations


def is_float(dtype: np.dtype) -> bool:
    """Whether it is rounded arithmetic: complex numbers too."""
    return dtype.kind in "fc" or dtype == BF16


def dtype_of(char: str) -> np.dtype:
    """The dtype behind a letter of the table."""
    return BF16 if char == "E" else np.dtype(char)


def operand(x: Any) -> Any:
    """What NumPy computes with in the place of `x`."""
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array among device arrays; xp.asarray copies it there")
    if isinstance(x, np.generic) and x.dtype not in DTYPES:
        raise ValueError(f"Unsupported dtype {x.dtype}")
    if isinstance(x, (list, tuple)):
        return [operand(part) for part in x] if any(isinstance(part, (Array, np.ndarray)) for part in x) else x
    return x._host if isinstance(x, Array) else x


def typed(values: Iterable[Any]) -> Iterator[Any]:
    """The device arrays and NumPy scalars among some arguments, those in lists included: what has a dtype."""
    for x in values:
        if isinstance(x, (Array, np.generic)):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from typed(x)


def check_promotion(name: str, dtypes: set[np.dtype], results: Iterable[np.dtype], explicit: bool = False) -> None:
    """Float operands share one dtype, and no result is wider, unless the caller named the dtype of the result."""
    floats = {dtype for dtype in dtypes if is_float(dtype)}
    if len(floats) > 1:
        raise PromotionError(f"{name} of {' and '.join(sorted(map(str, floats)))}: cast explicitly")
    for dtype in floats:
        for result in results:
            if is_float(result) and result.itemsize > dtype.itemsize and not explicit:
                raise PromotionError(f"{name} of {dtype} gives {result}: cast explicitly")


def finished(name: str, dtypes: set[np.dtype], result: Any, out: Any, explicit: bool) -> Any:
    """NumPy's result, or several, as device arrays, 0-d ones too; written to `out` if there is one."""
    if result is None:
        return check_promotion(name, dtypes, ())
    several = isinstance(result, (tuple, list))
    hosts = [np.asarray(y) for y in (result if several else [result])]
    check_promotion(name, dtypes, [y.dtype for y in hosts], explicit)
    if out is None:
        return type(result)(Array(y) for y in hosts) if several else Array(hosts[0])
    if not isinstance(out, Array):
        raise TypeError(f"out is a {type(out).__name__}, not a device array")
    if out.shape != hosts[0].shape:
        raise ValueError(f"out has the shape {out.shape}, the result {hosts[0].shape}")
    check_promotion(name, {out.dtype, *(y.dtype for y in hosts)}, ())
    np.copyto(out._host, hosts[0], casting="same_kind")
    return out


# ------------------------------------------------------------------------------------------------------ ufuncs

# Where `ufunc.at` exists, and for which dtypes: found in the messages of CuPy's own TypeErrors.
SCATTERS = {"add": "ilqILQefd", "maximum": "ilqILQfd", "minimum": "ilqILQfd", "subtract": "iI"}
REDUCTIONS = {"add": ("sum", "cumsum"), "multiply": ("prod", "cumprod")}  # what `reduce` and `accumulate` are


class Ufunc:
    """An elementwise function: one launch; only for the dtypes that CuPy has a loop for."""

    def __init__(self, name: str) -> None:
        self.name, self.types = name, API["ufuncs"][name].split()
        inputs, outputs = self.types[0].split("->")
        self.nin, self.nout = len(inputs), len(outputs)
        self._host: Callable[..., Any] = getattr(np, name)

    def __call__(self, *args: Any, out: Any = None, dtype: Any = None) -> Any:
        if len(args) == self.nin + 1 and out is None:
            *args, out = args  # type: ignore[assignment]
        if len(args) != self.nin:
            raise TypeError(f"{self.name} takes {self.nin} operands, not {len(args)}")
        for x in args:
            if not isinstance(x, (Array, np.generic, *WEAK_SCALARS)):
                raise TypeError(f"{self.name}: unsupported type {type(x).__name__}")
        loop_results = self._check_loop(args)
        with np.errstate(all="ignore"):
            result = self._host(*map(operand, args), **({} if dtype is None else {"dtype": dtype}))
        counter.launches += 1
        dtypes, explicit = {x.dtype for x in typed(args)}, dtype is not None
        check_promotion(self.name, dtypes, loop_results, explicit)
        return finished(self.name, dtypes, result, out, explicit)

    def _check_loop(self, args: tuple[Any, ...]) -> list[np.dtype]:
        """The dtypes of the results of the first loop that the operands can be cast to safely, which CuPy would take."""
        for loop in self.types:
            loop_inputs, outputs = ([dtype_of(char) for char in chars] for chars in loop.split("->"))
            if all(isinstance(x, WEAK_SCALARS) or np.can_cast(x.dtype, t) for x, t in zip(args, loop_inputs, strict=True)):
                return outputs
        raise TypeError(f"CuPy has no loop of {self.name} for {', '.join(str(x.dtype) for x in typed(args))}")

    def at(self, a: Array, indices: Any, b: Any) -> None:
        """Add, or the like, to elements of `a` in place; an index may come more than once."""
        if self.name not in SCATTERS:
            raise NotImplementedError(f"CuPy has no {self.name}.at")
        if a.dtype.char not in SCATTERS[self.name]:
            raise TypeError(f"CuPy's {self.name}.at does not support {a.dtype}")
        check_promotion(f"{self.name}.at", {x.dtype for x in typed((a, b))}, ())
        self._host.at(a._host, index(indices)[0], operand(b))  # type: ignore[attr-defined]
        counter.launches += 1

    def reduce(self, array: Array, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return getattr(xp, self._reduction()[0])(array, axis=axis, dtype=dtype, out=out, keepdims=keepdims)

    def accumulate(self, array: Array, axis: Any = 0, dtype: Any = None, out: Any = None) -> Any:
        return getattr(xp, self._reduction()[1])(array, axis=axis, dtype=dtype, out=out)

    def reduceat(self, array: Array, indices: Any, axis: Any = 0, dtype: Any = None, out: Any = None) -> Any:
        raise NotImplementedError("reduceat: CuPy has it for add only, as differences of prefix sums, which lose small sums")

    def _reduction(self) -> tuple[str, str]:
        if self.name not in REDUCTIONS:
            raise NotImplementedError(f"CuPy has no {self.name}.reduce and {self.name}.accumulate")
        return REDUCTIONS[self.name]


# -------------------------------------------------------------------------------------------------- functions

CREATE = {"arange", "empty", "eye", "full", "identity", "indices", "linspace", "logspace", "ones", "tri", "zeros"}
ON_HOST = {"broadcast_shapes", "can_cast", "isscalar", "issubdtype", "may_share_memory", "ndim", "promote_types"}
ON_HOST |= {"result_type", "shape", "shares_memory", "size"}
JOIN = {"concatenate", "concat", "stack", "vstack", "hstack", "dstack", "column_stack"}
OF_LISTS = JOIN | {"select"}
VIEW = {"array_split", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_arrays", "broadcast_to", "diagonal", "dsplit"}
VIEW |= {"expand_dims", "flip", "fliplr", "flipud", "hsplit", "matrix_transpose", "moveaxis", "permute_dims", "rollaxis"}
VIEW |= {"split", "squeeze", "swapaxes", "transpose", "vsplit"}
VIEW_OR_COPY = {"ascontiguousarray", "ravel", "reshape"}
WAIT = {"argwhere", "bincount", "compress", "delete", "extract", "flatnonzero", "histogram", "in1d", "intersect1d", "isin"}
WAIT |= {"nanmax", "nanmin", "nonzero", "place", "putmask", "setdiff1d", "setxor1d", "trim_zeros", "union1d", "unique"}
WAIT |= {"unravel_index"}
PRODUCT = {"dot", "inner", "matmul", "tensordot", "vdot"}
SUM = {"average", "cumprod", "cumsum", "mean", "nanmean", "nanprod", "nansum", "norm", "prod", "std", "sum", "trace", "var"}
SUM |= PRODUCT | {"einsum"}
BF16_GAPS = {"argpartition", "argsort", "around", "clip", "cumprod", "cumsum", "einsum", "median", "nanstd", "nanvar", "norm"}
BF16_GAPS |= {"partition", "percentile", "quantile", "round", "sort", "std", "tril", "triu", "unique", "var", "where"}
# Parameters that only numbers of the host can be given for.
OF_HOST = {"axis", "axes", "axis1", "axis2", "decimals", "destination", "k", "kth", "M", "N", "n", "newshape", "num", "offset"}
OF_HOST |= {"pad_width", "repeats", "reps", "shape", "shift", "source", "start", "step", "stop", "indices_or_sections"}

LAUNCHES = dict.fromkeys(CREATE, 1) | dict.fromkeys(VIEW | {"empty", "zeros", "empty_like", "zeros_like"}, 0)
LAUNCHES |= {"var": 3, "std": 4, "norm": 3, "tril": 2, "triu": 2, "take_along_axis": 4, "put_along_axis": 5, "ptp": 3}
LAUNCHES |= {"allclose": 2, "array_equal": 2, "linspace": 2, "meshgrid": 2, "nan_to_num": 3, "select": 2}
LAUNCHES |= {"argwhere": 3, "flatnonzero": 3, "nonzero": 3}


def call(name: str, parameters: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of CuPy that NumPy has too. `parameters`: its signature, as tests/support/cupy_api.json has it."""
    args, kwargs, given = bound(name, parameters, args, kwargs)
    out = kwargs.pop("out", None)
    operands = list(typed((*args, *kwargs.values())))
    arrays = [x for x in operands if isinstance(x, Array)]
    dtypes = {x.dtype for x in operands}
    _check_arguments(name, args, arrays, given)
    if name in WAIT or (name == "where" and "x" not in given):
        counter.wait(f"{name}, whose result depends on values,")
    function = getattr(np.linalg if name == "norm" else np, name)
    host_args, host_kwargs = [operand(x) for x in args], {key: operand(x) for key, x in kwargs.items()}
    narrow = next((dtype for dtype in dtypes if dtype in (FP16, BF16)), None) if name in SUM else None
    explicit = given.get("dtype") is not None
    with np.errstate(all="ignore"):
        if narrow is None or explicit:
            result = function(*host_args, **host_kwargs)
        else:  # sums of 16-bit values, those of matrix products included, are made in fp32 and rounded once
            result = function(*(_widened(x) for x in host_args), **host_kwargs)
            result = result.astype(narrow) if is_float(result.dtype) else result
    if name in ON_HOST:
        return result
    if name in ("empty", "empty_like") and is_float(result.dtype):
        result[...] = np.nan  # what is read before it is written shows
    _count_call(name, args, arrays, result, given.get("axis"))
    return finished(name, dtypes, result, out, explicit)


def bound(
    name: str, parameters: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The arguments, with `out` and what follows it by keyword; and all of them by parameter, as far as they have names.

    Errors: TypeError for one that CuPy does not have, such as `where=`.
    """
    names = [p.rstrip("=") for p in parameters.split()]
    unknown = [key for key in kwargs if key not in names]
    if (unknown and "**" not in names) or ("*" not in names and len(args) > len(names)):
        raise TypeError(f"CuPy's {name}({parameters}) takes no {', '.join(unknown) or f'{len(args)} arguments'}")
    if "*" in names:
        return args, kwargs, kwargs
    given = dict(zip(names, args, strict=False)) | kwargs
    by_position = names.index("out") if "out" in names else len(names)
    return args[:by_position], dict(zip(names[by_position:], args[by_position:], strict=False)) | kwargs, given


def _check_arguments(name: str, args: tuple[Any, ...], arrays: list[Array], given: dict[str, Any]) -> None:
    """Whether there are arrays where CuPy takes them, and nowhere else."""
    if not arrays and name not in CREATE | ON_HOST:
        raise TypeError(f"{name} of no device array")
    for parameter, x in given.items():
        if parameter in OF_HOST and any(isinstance(part, Array) for part in typed([x])):
            raise TypeError(f"{name}: {parameter} is a device array; only the host's numbers can be that")
    if name not in OF_LISTS and any(isinstance(x, (list, tuple)) and any(isinstance(y, Array) for y in x) for x in args):
        raise TypeError(f"{name} of a list of device arrays; stack them")
    if name in OF_LISTS and not isinstance(args[0], (list, tuple)):
        raise TypeError(f"{name} of one array; it takes a list of them")
    if isinstance(given.get("indices"), (list, tuple)):
        raise TypeError(f"{name}: the indices are a list of the host; xp.asarray copies them to the device")
    if name == "where" and isinstance(given.get("condition"), WEAK_SCALARS):
        raise TypeError("where on a number of the host; its condition is a device array")
    of_bf16 = BF16 in {x.dtype for x in arrays}
    if of_bf16 and (name in BF16_GAPS or (name == "matmul" and max(x.ndim for x in arrays) > 2)):
        raise TypeError(f"CuPy's {name} does not support bfloat16 here")


def _widened(x: Any) -> Any:
    """16-bit floats as fp32, all else as it is."""
    return x.astype(FP32) if isinstance(x, np.ndarray) and x.dtype in (FP16, BF16) else x


def _count_call(name: str, args: tuple[Any, ...], arrays: list[Array], result: Any, axis: Any) -> None:
    """What a call that gave NumPy's `result` costs."""
    if name in PRODUCT:
        _count_product(name, arrays, result)
    elif name == "einsum":
        counter.gemms, counter.launches = counter.gemms + (len(arrays) > 1), counter.launches + 1
    elif name in VIEW_OR_COPY:
        counter.launches += not np.may_share_memory(result, arrays[0]._host)
    elif name in JOIN:
        counter.launches += len(args[0])
    elif name in ("cumsum", "cumprod"):
        counter.launches += 1 if axis is None else 2
    elif name == "mean":
        counter.launches += 1 if result.dtype == arrays[0].dtype and result.itemsize >= 4 else 2
    else:
        counter.launches += LAUNCHES.get(name, 1)


def _count_product(name: str, arrays: list[Array], y: Any) -> None:
    """A GEMM, and what CuPy launches around one that it cannot hand to cuBLAS as it is."""
    if np.asarray(y).dtype.kind in "biu" or np.size(y) == 1:
        counter.launches += 1 + sum(not x.flags.c_contiguous for x in arrays)
        return
    counter.gemms += 1
    if name == "matmul" and max(x.ndim for x in arrays) > 2:
        to_fp32_and_back = 3 if y.dtype == FP16 else 0
        copies = 0 if to_fp32_and_back else sum(not x.flags.c_contiguous for x in arrays)
        pointers_to_each = 6 if arrays[0].ndim != arrays[1].ndim else 0
        counter.launches += to_fp32_and_back + copies + pointers_to_each


def asarray(a: Any, dtype: Any = None, order: Any = None, copy: bool | None = None, blocking: bool = False) -> Array:
    """To the device: one copy, or for a single number a kernel that is given it. A device array as it is, if it can be."""
    if isinstance(a, Array):
        return a.astype(a.dtype if dtype is None else dtype, copy=bool(copy))
    host = np.array(a, dtype=dtype)
    result = Array(host)
    counter.h2d, counter.launches = counter.h2d + (host.ndim > 0), counter.launches + (host.ndim == 0)
    return result


def array(obj: Any, dtype: Any = None, copy: bool = True) -> Array:
    """As asarray, but a device array is copied."""
    return asarray(obj, dtype, copy=copy)


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:
    """To the host: a copy, and a wait for it."""
    return a.get(out=out) if isinstance(a, Array) else np.asarray(a)


# -------------------------------------------------------------------------------------------------- namespaces


class Linalg:
    """xp.linalg: the norm; the rest of CuPy's is not modeled."""

    def __getattr__(self, name: str) -> Any:
        if name != "norm":
            raise NotImplementedError(f"the stand-in does not model linalg.{name}")
        return functools.partial(call, name, API["linalg"][name])


class StrictCupy:
    """The namespace: `xp.NAME` for every name that CuPy has and the stand-in knows."""

    ndarray = Array
    linalg = Linalg()
    asarray = asanyarray = staticmethod(asarray)
    array = staticmethod(array)
    asnumpy = staticmethod(asnumpy)

    def __getattr__(self, name: str) -> Any:
        if name in ("random", "fft"):
            raise AttributeError(f"xp.{name} is refused: its numbers are not NumPy's")
        if not any(name in API[kind] for kind in ("ufuncs", "functions", "types", "constants")):
            raise AttributeError(f"CuPy has no {name!r}")
        if not hasattr(np, name):
            raise NotImplementedError(f"the stand-in does not model cupy.{name}")
        if name in API["ufuncs"]:
            return Ufunc(name)
        return functools.partial(call, name, API["functions"][name]) if name in API["functions"] else getattr(np, name)


xp = StrictCupy()


# ---------------------------------------------------------------------------------------------------- operators

BINARY = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide"}
BINARY |= {"mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
BINARY |= {"lshift": "left_shift", "rshift": "right_shift", "divmod": "divmod"}
COMPARISONS = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}


def _operator(name: str, reflected: bool = False, in_place: bool = False) -> Callable[..., Any]:
    """A method that calls the ufunc of that name."""
    ufunc = Ufunc(name)
    if in_place:
        return lambda self, other: ufunc(self, other, out=self)
    return (lambda self, other: ufunc(other, self)) if reflected else (lambda *operands: ufunc(*operands))


for _sign, _name in (BINARY | COMPARISONS | UNARY).items():
    setattr(Array, f"__{_sign}__", _operator(_name))
for _sign, _name in BINARY.items():
    setattr(Array, f"__r{_sign}__", _operator(_name, reflected=True))
    if _sign != "divmod":
        setattr(Array, f"__i{_sign}__", _operator(_name, in_place=True))
