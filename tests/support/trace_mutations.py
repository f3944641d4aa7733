"""Ways to damage a trace, for a test that whatever is malformed is answered in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.numerics.casts import cast
from refimpl.numerics.formats import is_float
from refimpl.parity.trace import Trace

Mutation = Callable[[dict[str, np.ndarray], str, np.random.Generator], None]


def _set(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Mutation:
    def mutate(tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> None:
        tensors[name] = change(tensors[name].copy(), rng)

    return mutate


def _one(value: float) -> Mutation:
    """One element becomes a number; of integers the nearest that there is."""

    def change(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flat, whole = x.reshape(-1), int(np.nan_to_num(np.clip(value, -(2**40), 2**40)))
        if flat.size:
            flat[rng.integers(flat.size)] = value if is_float(x) else whole % 2 if x.dtype == bool else whole
        return x

    return _set(change)


def _rename(new: Callable[[str], str], keep: bool) -> Mutation:
    def mutate(tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> None:
        array = tensors[name] if keep else tensors.pop(name)
        tensors[new(name)] = array + 1 if keep and array.dtype != bool else array

    return mutate


def _last(name: str, change: Callable[[str], str]) -> str:
    head, _, last = name.rpartition("/")
    return f"{head}/{change(last)}"


def _remove(tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> None:
    del tensors[name]


MUTATIONS: dict[str, Mutation] = {
    "flat": _set(lambda x, rng: x.reshape(-1)),
    "a leading axis": _set(lambda x, rng: x[None]),
    "three leading axes": _set(lambda x, rng: x[None, None, None]),
    "transposed": _set(lambda x, rng: x.T),
    "a number": _set(lambda x, rng: x.reshape(-1)[:1].reshape(())),
    "one element": _set(lambda x, rng: x.reshape(-1)[:1]),
    "empty": _set(lambda x, rng: x.reshape(-1)[:0]),
    "empty rows": _set(lambda x, rng: x[:0] if x.ndim else x.reshape(1)[:0]),
    "cut": _set(lambda x, rng: x[:-1] if x.ndim and len(x) > 1 else x),
    "twice": _set(lambda x, rng: np.concatenate([x, x]) if x.ndim else np.array([x, x])),
    "int64": _set(lambda x, rng: np.array(np.nan_to_num(np.array(x, float)), np.int64)),
    "uint8": _set(lambda x, rng: np.array(np.array(np.nan_to_num(np.array(x, float)), np.int64) % 256, np.uint8)),
    "bool": _set(lambda x, rng: np.array(x != 0)),
    "fp64": _set(lambda x, rng: np.array(x, np.float64)),
    "fp32": _set(lambda x, rng: cast(np.array(x, np.float64), "fp32")),
    "bf16": _set(lambda x, rng: cast(np.array(x, np.float64), "bf16")),
    "e4m3": _set(lambda x, rng: np.zeros(x.shape, ml_dtypes.float8_e4m3fn)),
    "complex": _set(lambda x, rng: np.zeros(x.shape, np.complex64)),
    "NaN": _one(np.nan),
    "Inf": _one(np.inf),
    "minus one": _one(-1),
    "minus a hundred": _one(-100),
    "huge": _one(1e30),
    "half": _one(0.5),
    "removed": _remove,
    "another name": _rename(lambda name: name + "x", False),
    "a wrapped twin": _rename(lambda name: _last(name, lambda last: "module." + last), True),
    "a wrapped name": _rename(lambda name: _last(name, lambda last: "model._orig_mod." + last), False),
    "the first micro-batch's twin": _rename(lambda name: _last(name, lambda last: "1:" + last), True),
    "micro-batch 0": _rename(lambda name: _last(name, lambda last: "0:" + last), False),
    "micro-batch 9": _rename(lambda name: _last(name, lambda last: "9:" + last), False),
    "another step": _rename(lambda name: "7/" + name.partition("/")[2], False),
    "step 007": _rename(lambda name: "007/" + name.partition("/")[2], False),
    "a superscript step": _rename(lambda name: "²/" + name.partition("/")[2], False),
    "no step": _rename(lambda name: name.partition("/")[2], False),
    "a huge step": _rename(lambda name: f"{10**30}/" + name.partition("/")[2], False),
    "a slash at the end": _rename(lambda name: name + "/", False),
    "step 0": _rename(lambda name: "0/" + name.partition("/")[2], False),
}


def mutated(trace: Trace, kind: str, name: str, rng: np.random.Generator) -> Trace:
    """The trace with one of its tensors damaged."""
    tensors: dict[str, Any] = dict(trace.tensors)
    MUTATIONS[kind](tensors, name, rng)
    return Trace({}, tensors)
