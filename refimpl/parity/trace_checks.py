"""Checks of a trace before it is judged: names that the model has, shapes and types that fit.

An error is one line (UsageError) that names the tensor. Names of wrapped models are mapped (`nn.names.rename`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.models.model import Model
from refimpl.nn.names import rename
from refimpl.numerics.formats import FORMATS, format_of, is_float
from refimpl.parity.operations import operations_of
from refimpl.parity.trace import BATCH, BY_PARAMETER, BY_PLACE, SCALE_STATE, Trace, in_batch, key, parse_key, split_batch

STARTS = ("4.m", "4.v", "4.master", *SCALE_STATE, "4.t")
"""The points of step 0."""

_COUNTERS = (*(point for point in SCALE_STATE if point != "4.scale"), "4.t")
_NOT_NAN = ("2.loss_scale", "4.scale", "4.lr")


def checked(trace: Trace, model: Model) -> tuple[Trace, list[str]]:
    """Return the trace under the model's own names, with 0-d scalars, and notes on the names that were mapped.

    Errors: UsageError for anything malformed.
    """
    places = [op.place for op in operations_of(model)[:-1]]
    groups: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for text, array in trace.tensors.items():
        try:
            step, point, name = parse_key(text)
        except ValueError:
            raise UsageError(f"{text!r} is not a tensor of a trace: see docs/traces.md") from None
        if step == 0 and point not in STARTS:
            raise UsageError(f"{text!r}: step 0 holds initial states, which are {', '.join(STARTS)}")
        groups.setdefault((step, point), {})[name] = array
    tensors: dict[str, np.ndarray] = {}
    notes: dict[str, None] = {}
    for (step, point), arrays in groups.items():
        if point in BATCH:
            tensors[key(step, point)] = arrays[""]
            continue
        if point in BY_PARAMETER:
            arrays, said = rename(arrays, model.parameters.keys(), model.tied)
        elif point in BY_PLACE:
            arrays, said = _rename_places(arrays, places)
        else:
            arrays, said = {"": scalar(key(step, point), arrays[""])}, []
        notes |= dict.fromkeys(said)
        for name, array in arrays.items():
            _check_values(key(step, point, name), array, model.parameters[name].shape if point in BY_PARAMETER else None)
            tensors[key(step, point, name)] = array
    result = Trace(trace.config, tensors, trace.settings)
    for step in sorted({step for step, point in groups if point in BATCH}):
        check_batch(result, step, model)
    return result, list(notes)


def _rename_places(arrays: Mapping[str, np.ndarray], places: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return activations by the model's own places, and notes on the mapped names, for each micro-batch separately."""
    by_batch: dict[int, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        place, number = split_batch(name)
        if number < 1:
            raise UsageError(f"{name!r}: micro-batches are counted from 1")
        if place in by_batch.setdefault(number, {}):
            raise UsageError(f"{place!r} and '1:{place}' are the same place in the first micro-batch: keep one of them")
        by_batch[number][place] = array
    result: dict[str, np.ndarray] = {}
    notes: dict[str, None] = {}
    for number, group in by_batch.items():
        renamed, said = rename(group, places, what="operation")
        result |= {in_batch(place, number): array for place, array in renamed.items()}
        notes |= dict.fromkeys(said)
    return result, list(notes)


def scalar(name: str, array: np.ndarray) -> np.ndarray:
    """Return the number of a scalar point, of shape () or (1,), as a 0-d array. Errors: UsageError for anything else."""
    point = parse_key(name)[1]
    if array.size != 1 or (array.dtype.kind not in "fiub" and not is_float(array)):
        raise UsageError(f"{name} is {array.dtype} {array.shape}; it must be one number")
    array = array.reshape(())
    value = float(array)
    if point == "3.found_inf" and value not in (0, 1):
        raise UsageError(f"{name} is {value:g}; it must be 0 or 1")
    if point in _COUNTERS and not (0 <= value < 2**31 and value % 1 == 0):
        raise UsageError(f"{name} is {value:g}; it must be a whole number, from 0 to 2^31 - 1")
    if point in _NOT_NAN and not value >= 0:
        raise UsageError(f"{name} is {value:g}; it must be 0 or more")
    return np.asarray(np.float64(value)) if array.dtype.kind in "iub" else array


def _check_values(name: str, array: np.ndarray, shape: tuple[int, ...] | None) -> None:
    """Check a tensor's format, at least 16 bits, and its shape. Errors: UsageError."""
    if not is_float(array) or FORMATS[format_of(array)].bits < 16:
        raise UsageError(f"{name} is {array.dtype}; it must be in FP16, BF16, FP32 or FP64")
    if shape is not None and array.shape != shape:
        raise UsageError(f"{name} has the shape {array.shape} in the trace; in this model it has {shape}")
    if not array.size:
        raise UsageError(f"{name} is empty: its shape is {array.shape}")


def check_batch(trace: Trace, step: int, model: Model) -> None:
    """Check tokens and targets of a step: integers (B, T) or (n, B, T) that are tokens of the model.

    A target may also be the model's `ignore_index`. Errors: UsageError.
    """
    positions, known = model.config["block_size"], model.config["vocab_size"]
    arrays = {point: trace.get(step, point) for point in BATCH}
    for point, array in arrays.items():
        if array is None:
            continue
        name = key(step, point)
        if array.dtype.kind not in "iu" or array.ndim not in (2, 3) or not array.size:
            shapes = "integers (B, T), or (n, B, T) with n micro-batches"
            raise UsageError(f"{name} is {array.dtype} {array.shape}; it must be {shapes}")
        if array.shape[-1] > positions:
            raise UsageError(f"{name} has {array.shape[-1]} positions; this model has {positions}")
        wrong = (array < 0) | (array >= known)
        if point == "0.targets":
            wrong &= array != model.ignore_index
        if wrong.any():
            raise UsageError(f"{name} holds {array[wrong][0]}; this model knows 0 to {known - 1}")
    tokens, targets = arrays.values()
    if tokens is not None and targets is not None and tokens.shape != targets.shape:
        shapes = f"0.tokens has the shape {tokens.shape} and 0.targets {targets.shape}"
        raise UsageError(f"step {step}: {shapes}; they must be equal")
