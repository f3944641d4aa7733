"""What a trace says of the run that it was made by: all of a configuration, or the settings that somebody else states.

    "settings": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "lr": 3e-4, "schedule": "constant"}

The names are the fields of `Config`, those of the flags of scripts/train.py. Model, recipe and data are not among them: by
which recipe a trace is judged is for the judge to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from refimpl.errors import UsageError, unknown
from refimpl.training.config import Config

NOT_STATED = (
    "model", "recipe", "backend", "data", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "bias",
    "masters_from", "seed", "mistake", "eval_every", "eval_batches", "log_every", "sample_bytes", "zero",
)  # fmt: skip
SETTINGS = tuple(f.name for f in fields(Config) if f.name not in NOT_STATED)
"""Settings that a trace can state."""

OWN_RATES = "trace"
"""The schedule of a trace whose learning rates nobody planned: they are what stands at 4.lr."""

FOLLOWING = {
    "lr": ("min_lr",), "schedule": ("min_lr",), "optimizer": ("momentum", "beta1", "beta2", "eps", "weight_decay"),
    "loss_scale": ("init_scale", "growth_interval", "hysteresis", "growth_factor", "backoff_factor", "scale_floor"),
}  # fmt: skip
"""Settings whose defaults depend on another one: where that is stated and they are not, they take its defaults."""


def config_from(given: Mapping[str, Any]) -> Config:
    """The configuration that a file holds. Errors: UsageError where it is none."""
    try:
        return Config.of(given)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, AssertionError) as error:
        raise UsageError(f"the configuration of the trace is damaged: {error}") from error


def stated(config: Config, settings: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """Return the configuration with what a trace states in the place of its own, and what that changes, in words.

    Errors: UsageError for a setting that there is not, showing the nearest, or that cannot be or has no value.
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
