"""Names of parameters and operations in other programs, mapped to the model's own.

Wrappers of a module add a word before its names, or in their middle where they wrap a part of the model:

    module.transformer.wte.weight                      DistributedDataParallel
    _orig_mod.transformer.wte.weight                   torch.compile
    model._orig_mod.module.transformer.wte.weight      Lightning, torch.compile and DistributedDataParallel
    transformer.h.0._orig_mod.attn.c_attn.weight       torch.compile on one block

A tied weight may have any of its names, or several with equal values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import is_float

WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "model": "Lightning",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Component of a name that is not the model's -> the wrapper that adds it."""


def unwrapped(name: str) -> str:
    """Return the name without the components of wrappers: 'module.h.0._orig_mod.attn' -> 'h.0.attn'."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def own_name(name: str, known: Collection[str], tied: Mapping[str, str] | None = None) -> str | None:
    """Return the model's own name for `name`, or None where it has no such name.

    known: the model's names. tied: further name -> the known name of the same parameter (`Model.tied`).
    """
    tied = tied or {}
    for candidate in (name, unwrapped(name)):
        if candidate in known or candidate in tied:
            return tied.get(candidate, candidate)
    return None


def nearest(name: str, known: Collection[str]) -> str:
    """Return the known name that is spelled most like `name`, for a message."""
    return get_close_matches(unwrapped(name), list(known), 1, 0.0)[0]


def rename(
    arrays: Mapping[str, np.ndarray], known: Collection[str], tied: Mapping[str, str] | None = None, what: str = "parameter"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the arrays under the model's own names, in the same order, and sentences that say what was renamed.

    Errors: UsageError for a name that the model does not have, with the nearest one, and for two names of one `what` whose
    values differ.
    """
    result: dict[str, np.ndarray] = {}
    first: dict[str, str] = {}
    notes: dict[str, None] = {}
    for name, array in arrays.items():
        own = own_name(name, known, tied)
        if own is None:
            raise UsageError(f"this model has no {what} {name!r}; the nearest name is {nearest(name, known)!r}")
        if own in result and not _same(array, result[own]):
            raise UsageError(f"{name!r} and {first[own]!r} are both the {what} {own!r}, and their values differ")
        result.setdefault(own, array)
        first.setdefault(own, name)
        notes |= dict.fromkeys(_notes(name, own, known))
    return result, list(notes)


def _notes(name: str, own: str, known: Collection[str]) -> list[str]:
    """Say how a name was changed, in the same words for all names that are changed alike."""
    notes = []
    if name not in known and unwrapped(name) != name:
        words = [part for part in name.split(".") if part in WRAPPERS]
        notes.append(f"names without {', '.join(f'{word!r} ({WRAPPERS[word]})' for word in words)}")
    if unwrapped(name) != own and name != own:
        notes.append(f"{unwrapped(name)} is tied to {own}")
    return notes


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays have equal shapes and values, in formats that may differ."""
    if a.shape != b.shape or not (is_float(a) and is_float(b)):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return np.array_equal(widen(a, "fp64"), widen(b, "fp64"), equal_nan=True)
