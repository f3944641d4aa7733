"""nn.loss: cross-entropy, forward and backward. test_ignored_targets.py has ignored targets in models and trainings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arrays import FORMATS, LOW, U, array, wide
from bounds import cross_entropy_near, near, ours
from derivatives import Call, assert_close, check_derivative, draw, forward, normal_numbers, softmax_of
from op_calls import INF, NAN, UNIFORM, bound, run, same
from torch_cases import (
    COUNTERPARTS,
    RECIPES,
    Case,
    F,
    assert_agrees,
    cases_of,
    check,
    in_recipe,
    policy_of,
    product_format,
    same_kind,
    subnormal,
    theirs,
)

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.ops import OPS
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe

# ---------------------------------------------------------------------------------------------------------------- formula

r, TARGETS = normal_numbers(), np.array([[0, 6, 3], [3, 1, 2]])

CALLS = [
    Call("cross_entropy", "2-D", (r(4, 7), np.array([0, 6, 3, 3]))),
    Call("cross_entropy", "3-D", (r(2, 3, 7), TARGETS)),
    Call("cross_entropy", "some ignored", (r(5, 7), np.array([-100, 6, 3, -100, 3]))),
    Call("cross_entropy", "a class ignored", (r(2, 3, 7), TARGETS), static={"ignore_index": 3}),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def test_cross_entropy_is_the_mean_of_minus_the_log_of_the_target_probability() -> None:
    logits, targets = draw(2, 3, 7), np.array([[0, 6, 3], [3, 1, 2]])
    each = [-math.log(softmax_of(logits[i, j])[targets[i, j]]) for i, j in np.ndindex(2, 3)]
    assert_close(forward("cross_entropy", logits, targets), math.fsum(each) / 6)
    assert_close(forward("cross_entropy", np.zeros((5, 11)), np.arange(5)), math.log(11))


@pytest.mark.parametrize("fmt", UNIFORM)
def test_one_class_is_certain(fmt: str) -> None:
    loss, (dz, _) = run(fmt, "cross_entropy", [array([[3.0]], fmt), np.array([0])], [])
    assert loss == 0 and same(dz, [[0.0]])


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (4,), (1, 4, 1)])
def test_targets_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """(1, 1) would be broadcast, to a loss and gradients that look as if nothing were wrong."""
    with pytest.raises(UsageError, match=r"here: targets .* for logits \(1, 4, 7\): there must be one per row of logits"):
        OPS["cross_entropy"].forward(draw(1, 4, 7), np.zeros(shape, np.int64), p=bound("fp32", "cross_entropy"))


# -------------------------------------------------------------------------------------------------------------- roundings


@pytest.mark.parametrize("fmt", LOW)
def test_the_mean_of_thousands_of_rows_is_summed_in_32_bits(fmt: str) -> None:
    loss, _ = run(fmt, "cross_entropy", [array(np.zeros((4096, 2)), fmt), np.zeros(4096, np.int64)], [])
    assert float(loss) == pytest.approx(math.log(2), rel=4096 * 2.0**-24)  # gamma_n of a sum of equal terms


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("fmt", UNIFORM)
def test_large_logits(fmt: str) -> None:
    logits = array([[1e4, 0.0, -1e4], [-1e4, 1e4, 1e4]], fmt)
    largest = float(logits[0, 0])  # bf16 has no 1e4
    loss, (dz, _) = run(fmt, "cross_entropy", [logits, np.array([0, 1])], [])
    # Row 0 is certain: loss 0. Row 1 is one of two: log 2. Mean log(2)/2, in fp32: a log, an addition and a mean, 3 u.
    assert float(loss) == pytest.approx(math.log(2) / 2, rel=4 * U)
    assert same(dz, [[0, 0, 0], [0, -0.25, 0.25]])
    loss, (dz, _) = run(fmt, "cross_entropy", [logits, np.array([2, 2])], [])
    assert float(loss) == pytest.approx((2 * largest + math.log(2)) / 2, rel=4 * U)
    assert same(dz, [[0.5, 0, -0.5], [0, 0.25, -0.25]])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan(fmt: str) -> None:
    for bad in (INF, NAN):
        loss, (dz, _) = run(fmt, "cross_entropy", [array([[0, bad], [0, 0]], fmt), np.array([0, 0])], [])
        assert np.isnan(loss) and np.isnan(wide(dz[0, 1])) and same(dz[1], [-0.25, 0.25])
    loss, (dz, _) = run(fmt, "cross_entropy", [array([[0, -INF]], fmt), np.array([0])], [])
    assert loss == 0 and same(dz, [[0, 0]])
    loss, (dz, _) = run(fmt, "cross_entropy", [array([[0, -INF]], fmt), np.array([1])], [])
    assert loss == INF and same(dz, [[1, -1]])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_an_infinite_loss_scale_reaches_the_gradients(fmt: str) -> None:
    p = bound(fmt, "cross_entropy")
    _, saved = OPS["cross_entropy"].forward(array([[0, 1]], fmt), np.array([0]), p=p)
    dz, _ = OPS["cross_entropy"].backward(np.float32(INF), saved, p=p)
    assert not np.isfinite(wide(dz)).any()


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("cross_entropy")], ids=str)
def test_as_pytorch(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", FORMATS)
def test_large_logits_as_pytorch(fmt: str) -> None:
    # Standard deviation 3000: most rows are certain, the loss is in the thousands, and exp(z - largest) is 0 or near it.
    check(Case("cross_entropy", fmt, (fmt,), 3000.0))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", RECIPES)
def test_cross_entropy_of_logits_that_are_not_finite(recipe: str) -> None:
    rng, fmt = np.random.default_rng(21), product_format(recipe)
    for bad in ([math.inf], [-math.inf], [math.nan], [math.inf, -math.inf], [math.inf, math.inf], [-math.inf] * 5):
        for target in (0, 4):  # at a bad logit, and at a good one
            row = rng.standard_normal((1, 5))
            row[0, : len(bad)] = bad
            z, targets = array(row, fmt), np.array([target])
            with np.errstate(all="ignore"):
                y, (dz, _) = ours(get_recipe(recipe).policy, "cross_entropy", [z, targets], np.float32(1024))
            y_torch, (dz_torch, _) = theirs(
                in_recipe(COUNTERPARTS["cross_entropy"].torch, "cross_entropy", recipe), [z, targets], np.float32(1024)
            )
            same_kind(y, y_torch, f"loss with {bad}, target {target}")
            same_kind(dz, dz_torch, f"dlogits with {bad}, target {target}")


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
@pytest.mark.parametrize("fmt", FORMATS)
def test_cross_entropy_with_ignored_targets(fmt: str, ignore_index: int) -> None:
    rng, op = np.random.default_rng(22), OPS["cross_entropy"]
    z, targets = array(rng.standard_normal((60, 50)), fmt), rng.integers(0, 50, 60)
    targets[rng.permutation(60)[:25]] = ignore_index
    p = Run(policy_of(fmt), NUMPY).precision("cross_entropy", "loss")
    y, saved = op.forward(z, targets, p, ignore_index=ignore_index)
    dz, _ = op.backward(np.float32(1024), saved, p, ignore_index=ignore_index)
    y_torch, (dz_torch, _) = theirs(
        lambda z, t: F.cross_entropy(z.float(), t, ignore_index=ignore_index), [z, targets], np.float32(1024)
    )
    exact = cross_entropy_near(near(wide(z)), targets, near(1024.0), ignore_index)
    assert_agrees(y, wide(y_torch), exact[0], "fp32", "loss")
    assert_agrees(dz, wide(dz_torch), exact[1], fmt, "dlogits")
    assert not wide(dz)[targets == ignore_index].any()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", FORMATS)
def test_cross_entropy_ignores_as_pytorch_does_where_values_are_not_finite(fmt: str) -> None:
    """All ignored: a loss of NaN and gradients of 0. A bad row that is ignored leaves the loss finite, not its own gradient."""
    rows = array(np.random.default_rng(23).standard_normal((3, 5)), fmt)
    for bad, targets in ((0.0, [-100] * 3), (math.nan, [-100, 1, 2]), (math.inf, [-100, 1, 2]), (-math.inf, [1, -100, 2])):
        z = rows.copy()
        z[0, 2] = z[0, 2] if bad == 0 else bad
        with np.errstate(all="ignore"):
            y, (dz, _) = ours(policy_of(fmt), "cross_entropy", [z, np.array(targets)], np.float32(1024))
        y_torch, (dz_torch, _) = theirs(COUNTERPARTS["cross_entropy"].torch, [z, np.array(targets)], np.float32(1024))
        same_kind(y, y_torch, f"loss with {bad}")
        same_kind(dz, dz_torch, f"dlogits with {bad}")
        assert bad != 0 or (np.isnan(y) and not wide(dz).any())


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("op", ["cross_entropy"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_subnormal_operands_as_pytorch(op: str, fmt: str) -> None:
    check(subnormal(op, fmt))
