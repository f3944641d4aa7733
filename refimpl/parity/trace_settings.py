"""Settings in a trace's header: a whole configuration, or some settings that another program states.

    "settings": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "lr": 3e-4, "schedule": "constant"}

The names are fields of `Config`, as in the flags of scripts/train.py. Model, recipe and data are not among them: the recipe
that a trace is judged by is that of the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from refimpl.errors import UsageError, unknown
from refimpl.training.config import LLAMA, Config

NOT_STATED = (
    "model", "recipe", "backend", "data", "tokenizer", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size",
    "bias", "activation", *LLAMA, "n_positions", "masters_from", "seed", "mistake", "eval_every", "eval_batches", "log_every",
    "sample_bytes", "keep", "log", "zero",
)  # fmt: skip
SETTINGS = tuple(f.name for f in fields(Config) if f.name not in NOT_STATED)
"""Settings that a trace can state."""

OWN_RATES = "trace"
"""The value of `schedule` in a trace whose learning rates follow no schedule of ours: they are read from 4.lr."""

FOLLOWING = {
    "lr": ("min_lr",), "schedule": ("min_lr",), "optimizer": ("momentum", "beta1", "beta2", "eps", "weight_decay"),
    "loss_scale": ("init_scale", "growth_interval", "hysteresis", "growth_factor", "backoff_factor", "scale_floor"),
}  # fmt: skip
"""Setting -> settings whose defaults depend on it; if it is stated and they are not, they take these defaults."""


def config_from(given: Mapping[str, Any]) -> Config:
    """Return the configuration that a file holds. Errors: UsageError if it is damaged."""
    try:
        return Config.of(given)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, AssertionError) as error:
        raise UsageError(f"the configuration of the trace is damaged: {error}") from error


def stated(config: Config, settings: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """Return the configuration with the settings that a trace states, and a note on what they change.

    Errors: UsageError for an unknown setting (with the nearest name), a null, or an invalid value.
    """
    for name in settings:
        if name not in SETTINGS:
            raise UsageError(unknown("setting in the trace's header:", name, SETTINGS))
        if settings[name] is None:
            raise UsageError(f"the trace's header says that setting {name} is null: give its value, or leave it out")
    if not settings:
        return config, []
    ours = asdict(config)
    for name in settings:
        for other in FOLLOWING.get(name, ()):
            ours.pop(other, None)
    changed = {name: value for name, value in settings.items() if (name, value) != ("schedule", OWN_RATES)}
    result = config_from({**{name: value for name, value in ours.items() if value is not None}, **changed})
    differing = {name: getattr(result, name) for name in settings if getattr(result, name) != getattr(config, name)}
    said = ", ".join(f"{name} {value} (not {getattr(config, name)})" for name, value in differing.items())
    return result, [f"the trace states {said}"] if said else []
