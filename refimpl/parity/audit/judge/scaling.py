"""The operations of `torch.amp.GradScaler`: unscaling the gradients, and adapting the scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from refimpl.errors import UsageError
from refimpl.optim.loss_scale import DynamicLossScale
from refimpl.parity.audit.judge.again import U, is_16_bit
from refimpl.parity.audit.values import CannotJudge, Twin, Values


def unscaled(values: Values) -> Iterator[Twin]:
    """Judge `_amp_foreach_non_finite_check_and_unscale_`: g (1/S) is exact in FP64 (24 + 24 bits), and rounded once.

    A 16-bit gradient is multiplied in FP32 and rounded twice: bound u |r|. found_inf becomes 1 if any gradient has an Inf or a
    NaN, and else stays.
    """
    inverse = values.inputs["inv_scale"].double()
    found = values.inputs["found_inf"].double()
    for i, (before, after) in enumerate(zip(values.inputs["self"], values.written["self"], strict=True)):
        exact = before.double()
        found = torch.maximum(found, (~exact.isfinite()).any().double())
        exact = exact * inverse
        bound = exact.abs().nan_to_num_(0.0, 0.0, 0.0).mul_(U) if is_16_bit(after) else 0.0
        yield Twin(f"self.{i}", after, exact, bound, by="exact")
    yield Twin("found_inf", values.written["found_inf"], found, 0.0, by="exact")


def updated_scale(values: Values) -> Iterator[Twin]:
    """Judge `_amp_update_scale_` by the rule of optim/loss_scale.py, to the bit."""
    x = values.inputs
    try:
        rule = DynamicLossScale(
            float(x["self"]), x["scale_growth_factor"], x["scale_backoff_factor"], x["growth_interval"]
        )  # fmt: skip
    except UsageError as error:
        raise CannotJudge(f"a loss scale that refimpl's rule refuses: {error}") from error
    rule.good_steps = np.asarray(np.int32(int(x["growth_tracker"])))
    rule.update(np.asarray(bool(x["found_inf"] != 0)))
    after = values.written["self"]
    exact = torch.full_like(after, float(rule.scale), dtype=torch.float64)
    yield Twin("self", after, exact, 0.0, by="refimpl")


JUDGES = {
    "aten._amp_foreach_non_finite_check_and_unscale_": unscaled,
    "aten._amp_update_scale_": updated_scale,
}  # fmt: skip
