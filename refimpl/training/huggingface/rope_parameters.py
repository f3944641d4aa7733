"""Rotary positions in config.json -> the theta and the scaling of our llama, and back.

transformers 5 writes `rope_parameters` {rope_theta, rope_type, ...}; 4 writes `rope_theta` beside `rope_scaling` {rope_type or
type, ...}. Both are read in the order of transformers 5 (modeling_rope_utils.py, convert_rope_params_to_dict), and both are
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.errors import UsageError, unknown
from refimpl.nn.rope_scaling import RopeScaling
from refimpl.training.schema import FINITE, Integer, Maybe, OneOf, Table, Text, check

_ORIGINAL = "original_max_position_embeddings"
_THETA = 10000.0
_REQUIRED: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor", "original": _ORIGINAL},
    "yarn": {"factor": "factor", "original": _ORIGINAL},
}
"""rope_type -> our name of a setting -> its key in config.json."""
_OPTIONAL = {"yarn": {name: name for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")}}
_FIXED = {"mscale": None, "mscale_all_dim": None, "partial_rotary_factor": 1}
"""Keys that are accepted with these values only: others change what is computed."""
_KINDS = Table(
    optional={
        "rope_type": Text(), "type": Text(), "rope_theta": Maybe(FINITE), "partial_rotary_factor": Maybe(FINITE),
        "truncate": Maybe(OneOf((True, False))), "mscale": Maybe(FINITE), "mscale_all_dim": Maybe(FINITE),
        _ORIGINAL: Maybe(Integer(1, 2**31 - 1)),
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), FINITE),
        **dict.fromkeys(("beta_fast", "beta_slow", "attention_factor"), Maybe(FINITE)),
    },
)  # fmt: skip


def read_rope(table: Mapping[str, Any], positions: int, where: str) -> tuple[float, str]:
    """Return (theta, scaling) of a config.json. positions: its max_position_embeddings. where: the file, for messages.

    scaling is text, such as 'default' or 'linear,factor=4.0' (nn/rope_scaling.py). Errors: UsageError for what our llama lacks.
    """
    name = "rope_scaling" if table.get("rope_scaling") else "rope_parameters"
    given = table.get(name) or {}
    nested = next((key for key, value in given.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise UsageError(f"{where} has {name} per layer type, such as {nested!r:.60}: all layers of our llama rotate alike")
    check(given, _KINDS, where, name)
    given = {"partial_rotary_factor": table.get("partial_rotary_factor"), **given}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _REQUIRED:
        raise UsageError(f"{where} has an {unknown('rope_type', kind, _REQUIRED)}")
    for key, value in _FIXED.items():
        if given.get(key) is not None and given[key] != value:
            raise UsageError(f"{where} has {key} {given[key]}: our llama has {'none' if value is None else value}")
    theta = next(value for value in (given.get("rope_theta"), table.get("rope_theta"), _THETA) if value is not None)
    if kind in ("llama3", "yarn") and given.get(_ORIGINAL) is None:  # transformers' default
        given[_ORIGINAL] = positions
    words = [kind]
    for ours, key in (_REQUIRED[kind] | _OPTIONAL.get(kind, {})).items():
        value = given.get(key)
        if value is not None:
            words.append(f"{ours}={value if key == _ORIGINAL else float(value)}")
        elif key not in _OPTIONAL.get(kind, {}):
            raise UsageError(f"{where}: {name}.{key} is missing, which rope_type {kind} needs")
    if kind == "dynamic":  # nothing changes up to this position
        words.append(f"original={positions}")
    return float(theta), ",".join(words)


def written_rope(sizes: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return max_position_embeddings, and the keys of config.json that `read_rope` reads."""
    scaling = RopeScaling.parse(sizes["rope_scaling"])
    kind, given, theta = scaling.kind, scaling.settings, sizes["rope_theta"]
    values: dict[str, Any] = {}
    for ours, key in (_REQUIRED[kind] | _OPTIONAL.get(kind, {})).items():
        if ours == "truncate":
            values[key] = bool(given[ours])
        elif given[ours]:  # an attention_factor of 0 is the formula's
            values[key] = int(given[ours]) if key == _ORIGINAL else given[ours]
    parameters = {"rope_theta": theta, "rope_type": kind, **values}
    old = None if kind == "default" else {"rope_type": kind, **values}
    # transformers takes max_position_embeddings for dynamic's original length
    positions = int(given["original"]) if kind == "dynamic" else sizes["block_size"]
    return positions, {"rope_parameters": parameters, "rope_theta": theta, "rope_scaling": old}
