"""The classic mistakes of a whole step: each turns a named test red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_optimizer
import test_state
import test_step

from refimpl.backends.numpy.backend import NUMPY
from refimpl.numerics.casts import cast, widen
from refimpl.optim import gradients
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.state import State


def unscale_after_clip(patch: pytest.MonkeyPatch) -> None:
    """The gradients are clipped by the norm that they have while they are still multiplied by S."""
    scale: list[Any] = []

    def inverse_of(S: Any) -> Any:
        scale[:] = [S]
        return gradients.inverse_of(S)

    patch.setattr("refimpl.step.inverse_of", inverse_of)
    patch.setattr("refimpl.step.clip_coefficient", lambda norm, most: gradients.clip_coefficient(norm * scale[0], most))


def drop_the_masters(patch: pytest.MonkeyPatch) -> None:
    """The update goes to the 16-bit weights: what it adds below their last place is lost."""
    update = Optimizer.update

    def update_weights(self: Optimizer, state: State, *arguments: Any) -> None:
        update(self, state, *arguments)
        widen(cast(state.master, state.formats["weights"]), state.master_format, out=state.master)

    patch.setattr(Optimizer, "update", update_weights)


def round_the_masters_too(patch: pytest.MonkeyPatch) -> None:
    """Weights go down, and up again: the same loss a moment later, at the beginning of the next step."""
    down = State.weights_down

    def weights_down(self: State) -> None:
        down(self)
        widen(self.weights, self.master_format, out=self.master)

    patch.setattr(State, "weights_down", weights_down)


def never_find_inf(patch: pytest.MonkeyPatch) -> None:
    def check_and_measure(state: State, inverse_scale: Any) -> tuple[Any, Any]:
        return np.False_, gradients.check_and_measure(state, inverse_scale)[1]

    patch.setattr("refimpl.step.check_and_measure", check_and_measure)


STEP_MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[Callable[..., None], tuple[Any, ...]]] = {
    unscale_after_clip: (
        test_step.test_a_power_of_two_changes_no_bit_where_nothing_overflows_or_vanishes,
        ("fp32", "mlp", NUMPY),
    ),
    drop_the_masters: (test_optimizer.test_small_updates_add_up_in_a_master_and_are_lost_without, (NUMPY,)),
    round_the_masters_too: (test_state.test_weights_down_rounds_the_masters, ("fp16",)),
    never_find_inf: (test_step.test_an_injected_inf_in_one_weight_gradient_is_enough, (NUMPY,)),
}
"""A mistake, the test that it turns red, and the arguments of that test."""


@pytest.mark.parametrize("mistake", STEP_MUTANTS, ids=lambda mistake: mistake.__name__)
def test_the_classic_mistakes_turn_a_test_red(mistake: Callable[[pytest.MonkeyPatch], None]) -> None:
    test, arguments = STEP_MUTANTS[mistake]
    test(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError):
            test(*arguments)
