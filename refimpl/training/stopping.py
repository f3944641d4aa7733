"""When a run stops because it cannot continue, and what its user can do about it.

A run stops
- at a step that is skipped without a loss scale, and at a weight that is Inf or NaN: no later step repairs it;
- at a skipped step in which a weight is Inf in 16 bits: the same copy is made at the next step. A table of embeddings, of which
  another batch may read other rows, only stops a run of which every step was skipped, at its end;
- after SKIPS_BEFORE_STOP skipped steps in a row whose losses are not finite, or that no smaller loss scale would help;
- at a loss scale that its project's rule calls exhausted, with a checkpoint, since skipped steps have changed no weight;
- at a loss scale of 0, or a subnormal one: gradients cannot be divided by it, and every step is skipped.

Any other loss that is not finite is reported where it begins, and the run continues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import TrainingStopped
from refimpl.numerics.formats import FORMATS
from refimpl.optim.loss_scalers import ProjectLossScale
from refimpl.precision.recipes import RECIPES
from refimpl.step import Batch
from refimpl.training.config import Config
from refimpl.training.non_finite import Origin, find_origin
from refimpl.training.setup import Training

SKIPS_BEFORE_STOP = 50
"""The number of steps skipped in a row that ends a run whose scale is constant, at its floor or below SMALLEST_SCALE: a smaller
scale would not help."""
SMALLEST_SCALE = 2.0**-14


class StopRules:
    """The rules above, for one run: `check_step` after each step in turn, `check_scale` after one or several.

    Both raise TrainingStopped. All ranks must call them together. A row is a step's row of the log; its batches are needed to
    find where Inf or NaN begins.
    """

    def __init__(self, config: Config, training: Training) -> None:
        self.config, self.training = config, training
        self.first_step = 1  # the first step of this process: later than 1 if the run was resumed
        self.bad_losses = 0  # steps in a row whose loss was not finite
        self._overflowed = ""  # the weight that is Inf in 16 bits, with advice, since the loss has not been finite

    def check_step(self, row: Mapping[str, Any], batches: Sequence[Batch], skipped_in_a_row: int) -> str | None:
        """Return a sentence on a loss that is not finite, at the first step of several; None after other steps."""
        self.bad_losses = 0 if math.isfinite(row["loss"]) else self.bad_losses + 1
        found = None
        unscaled_skip = row["skipped"] and self.config.loss_scale == "none"
        if self.bad_losses == 1 or unscaled_skip:
            origin = self._origin(row, batches)
            found = f"step {row['step']}: the loss is {row['loss']:g}: {self._explained(origin, row)}"
            lasting = origin.stage == "parameter" or (origin.stage == "cast" and row["skipped"] and not origin.of_rows)
            self._overflowed = self._explained(origin, row) if origin.stage == "cast" else ""
            if unscaled_skip or lasting:  # it stays, whatever the loss scale
                raise TrainingStopped(f"{found}. No weight was changed by this step" if row["skipped"] else found)
        hopeless = max(self.bad_losses, skipped_in_a_row if self._collapsed(row["loss_scale"]) else 0)
        if row["skipped"] and hopeless >= SKIPS_BEFORE_STOP:
            raise TrainingStopped(
                f"step {row['step']}: {skipped_in_a_row} steps in a row were skipped and the loss scale is "
                f"{row['loss_scale']:g}: {self._why(row, batches)}"
            )
        return found

    def check_end(self, steps: int, skipped: int) -> None:
        """Stop, with exit code 1, a run that is done but for which every step was skipped, since a weight is Inf in 16 bits."""
        if skipped == steps and self.bad_losses and self._overflowed:
            raise TrainingStopped(f"no step has changed a weight, all {steps:,} were skipped: {self._overflowed}")

    def check_scale(self, row: Mapping[str, Any], batches: Sequence[Batch], step: int, save: Callable[[], Path]) -> None:
        """Stop a run whose loss scale is exhausted or 0. row, batches: the last step's. save: write a checkpoint."""
        scale, S = self.training.loss_scale, float(self.training.loss_scale.scale)
        if isinstance(scale, ProjectLossScale) and scale.rule.stops and bool(scale.exhausted):
            path = save()
            raise TrainingStopped(
                f"by step {step}: the loss scale is {S:g}, below which {scale.rule.name} does not go: "
                f"{self._why(row, batches)}. --loss-scale dynamic has no floor; to continue with it from these weights: "
                f"--init-from {path}"
            )
        if FORMATS["fp32"].smallest_normal > S:
            raise TrainingStopped(
                f"by step {step}: the loss scale is {S:g}, and gradients cannot be divided by it: {self._why(row, batches)}"
            )

    def _collapsed(self, S: float) -> bool:
        """Return whether a loss scale S becomes no smaller, or so small that it makes no difference."""
        scale = self.training.loss_scale
        # a scaler that stops at its floor is exhausted there: check_scale
        floor = scale.rule.floor if isinstance(scale, ProjectLossScale) and not scale.rule.stops else 0.0
        return not scale.adapts or floor >= S or S < SMALLEST_SCALE or math.isinf(S)

    def _origin(self, row: Mapping[str, Any], batches: Sequence[Batch]) -> Origin:
        """Return where Inf or NaN first appears in a step, computed again on its batches with the present weights."""
        S = self.training.state.backend.from_host(np.asarray(row["loss_scale"], np.float32))
        return find_origin(self.training, batches, S)

    def _why(self, row: Mapping[str, Any], batches: Sequence[Batch]) -> str:
        return self._explained(self._origin(row, batches), row)

    def _explained(self, origin: Origin, row: Mapping[str, Any]) -> str:
        updates = int(self.training.state.t)
        return explained(origin, self.config, updates, known_since(updates, row["step"], self.first_step))


# -- advice ------------------------------------------------------------------------------------------------------------


def explained(origin: Origin, config: Config, updates: int, since: str = "") -> str:
    """Return origin and advice as sentences. updates: the number made so far. since: what `known_since` returned."""
    cause = f"{origin.text}{since if origin.stage == 'parameter' else ''}"
    return f"{cause}. {advice(origin, config, updates, since)}"


def advice(origin: Origin, config: Config, updates: int, since: str = "") -> str:
    """Return what the user can do about it."""
    not_cause = "The loss is not finite before backward begins, so the loss scale is not the cause"
    if origin.stage == "targets":
        return "Neither loss scale nor learning rate is the cause: check the targets, and --ignore-index"
    if origin.stage == "parameter":
        if since or updates == 0:
            return "Neither loss scale nor learning rate is the cause, and no step can repair it: start from other weights"
        made = "An update caused it"
        if config.mistake != "none":
            return f"{not_cause}, and no step can repair it. {made}, with --mistake {config.mistake} injected"
        return f"{not_cause}, and no step can repair it. {made}: try a smaller --lr from an earlier checkpoint"
    options = _options(config, backward=origin.stage == "backward")
    if origin.in_loss:
        grown = ["a smaller --lr if the weights have grown"] if updates else ["other weights to start from"]
        return f"{not_cause}. Try {', or '.join([*options, *grown])}"
    return f"Try {', or '.join(['a smaller --lr', *options])}"


def _options(config: Config, backward: bool) -> list[str]:
    """Return the flags that avoid the overflow: a format with a wider exponent, and in backward another loss scale."""
    options = []
    if "fp16" in config.recipe:
        other = config.recipe.replace("fp16", "bf16")
        options.append(f"--recipe {other if other in RECIPES else 'bf16'}")
    if backward and "fp16" in config.recipe and config.loss_scale == "none":
        options.append("--loss-scale dynamic, which can go below 1")
    elif backward and config.loss_scale not in ("none", None) and not config.make_loss_scale().adapts:
        options.append("a smaller --loss-scale, or dynamic")
    return options


def known_since(updates: int, step: int, first_step: int) -> str:
    """Return ' since before the first step' if the fault was seen before any update of this process, else ''."""
    if updates == 0:
        return " since before the first step"
    return f" since before step {step}, the first after the checkpoint" if step == first_step > 1 else ""

