"""Settings from a file (`--config`): the config.json of a run, or a part of one. Flags override them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.config import MODEL_DEFAULTS, Config, Flags, check_types, resolved
from refimpl.training.run_folder import BESIDE, CONFIG, INIT_FROM
from refimpl.training.schema import check

DEPENDENT = (
    "vocab_size", "n_kv_head", "head_dim", "ffn_dim", "min_lr", "weight_decay", "loss_scale", "init_scale", "growth_interval",
    "hysteresis", "growth_factor", "backoff_factor", "scale_floor",
)  # fmt: skip
"""Settings whose defaults depend on other settings, beside those that depend on the model."""


def read_settings(path: Path) -> tuple[dict[str, Any], Path | None]:
    """Return the settings in a file, or in the config.json of a folder, and the file with the first weights that it names.

    Errors: UsageError for a file that is not a table, and for a setting that is unknown or of a wrong type.
    """
    file = path / CONFIG if path.is_dir() else path
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = "it is not JSON: give a config.json, or the folder of a run" if isinstance(error, ValueError) else error
        raise UsageError(f"--config {file} cannot be read: {what}") from error
    check(table, BESIDE, f"--config {file} is damaged")
    settings = {name: value for name, value in table.items() if name not in BESIDE.optional and value is not None}
    try:
        check_types(settings)
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error
    return settings, Path(table[INIT_FROM]) if INIT_FROM in table else None


def overridden(settings: Flags, flags: Flags) -> dict[str, Any]:
    """Return the settings of a file with those of flags in place of its own.

    A setting that the file has by default follows the flags: with --lr, the min_lr of config.json is a tenth of the new lr,
    unless it was another share of the old one.
    """
    own, model = dict(settings), settings.get("model", Config.model)
    of_model = MODEL_DEFAULTS.get(model, {}) if flags.get("model", model) != model else {}
    for name in (*DEPENDENT, *of_model):
        others = {key: value for key, value in own.items() if key != name}
        with suppress(UsageError):  # without it the settings are none: it is no default
            if name in own and resolved(others).get(name, getattr(Config, name, None)) == own[name]:
                own = others
    return {**own, **flags}
