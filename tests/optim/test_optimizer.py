"""refimpl.optim.optimizer: AdamW, SGD, the schedule, and the optimizer that runs them over the flat buffers in blocks.

The formulas are restated here in double precision in their textbook form (bias-corrected moments, decay added to the
step), which is another order of operations than the code's, so agreement is up to rounding: each bound is derived where
it is used, with u = 2^-24 the largest relative error of one fp32 rounding. PyTorch is the second witness.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from arrays import U

import refimpl.optim.layout
from refimpl.backends.base import Backend
from refimpl.nn.models.model import Model, Parameter
from refimpl.numerics.casts import cast, widen
from refimpl.optim.adamw import AdamW
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import SCHEDULES, Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.recipes import get_recipe

ONE = np.float32(1)


def toy(**shapes: tuple[int, ...]) -> Model:
    """A model that is only its table of parameters."""
    return Model("toy", {}, {name: Parameter(shape, std=1.0) for name, shape in shapes.items()}, {}, None, None)


def constant(lr: float, steps: int = 2000) -> Schedule:
    return Schedule(lr, lr, 0, steps)


def start_of(backend: Backend, model: Model, recipe: str, rule: AdamW | SGD) -> State:
    """A state before training, all zeros."""
    return State(model, get_recipe(recipe).state_encodings(rule.moments), backend)


def state_of(backend: Backend, model: Model, recipe: str, rule: AdamW | SGD, rng: np.random.Generator) -> State:
    """A state in the middle of training: random masters, gradients and moments."""
    state = start_of(backend, model, recipe, rule)
    size = state.layout.size
    for kind in state.buffers:
        values = rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 1, size)
        put(state, kind, values**2 if kind == "v" else values)
    return state


def put(state: State, kind: str, values: np.ndarray) -> None:
    """Fill a buffer from the host, rounded to its format."""
    state.buffers[kind][:] = state.backend.from_host(cast(values, state.formats[kind]))


def host(state: State, kind: str) -> np.ndarray:
    """A copy of a buffer on the host."""
    return state.backend.to_host(state.master if kind == "master" else state.buffers[kind]).copy()


def update(rule: AdamW | SGD, schedule: Schedule, state: State, *arguments: Any, times: int = 1) -> Optimizer:
    """Update a state `times` times; arguments: 1/S, the clip coefficient and found_inf of the host, where they say anything."""
    optimizer = Optimizer(rule, schedule, state.backend.xp)
    given = [*arguments, *(ONE, 1.0, np.False_)[len(arguments) :]]
    for _ in range(times):
        optimizer.update(state, *(x if isinstance(x, float) else state.backend.from_host(x) for x in given))
    return optimizer


def bits_of(state: State) -> dict[str, bytes]:
    return {kind: host(state, kind).tobytes() for kind in state.buffers} | {"t": state.backend.to_host(state.t).tobytes()}


def decayed_mask(state: State) -> np.ndarray:
    """Where weight decay acts: matrices, by the shapes and not by Layout.decayed."""
    return np.concatenate([np.full(stop - start, len(shape) >= 2) for start, stop, shape in state.layout.slots.values()])


MIXED = {"a": (5, 7), "b": (11,), "c": (3, 4), "d": (2, 3, 2), "e": (1,), "f": (9, 1)}


# ------------------------------------------------------------------------------------------------------ one AdamW update


def adamw_in_double(w, g, m, v, lr, beta1, beta2, eps, decay, t):
    """Loshchilov and Hutter's algorithm 2 as printed, elementwise, in float64; decay is lr * wd, or 0."""
    w, g, m, v = (np.asarray(x, np.float64) for x in (w, g, m, v))
    m_new = beta1 * m + (1 - beta1) * g
    v_new = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m_new / (1 - beta1**t), v_new / (1 - beta2**t)
    step = lr * m_hat / (np.sqrt(v_hat) + eps)
    return w - step - decay * w, m_new, v_new, step, v_hat


@pytest.mark.parametrize("t", [1, 2, 10, 1000])
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "fp64"])
def test_adamw_is_the_formula(recipe: str, t: int, backend: Backend) -> None:
    rule, lr = AdamW((0.9, 0.95), 1e-8, 0.1), 3e-3
    state = state_of(backend, toy(**MIXED, big=(40, 50)), recipe, rule, np.random.default_rng(t))
    state.t = backend.from_host(np.asarray(t - 1))
    w, m, v = (host(state, kind) for kind in ("master", "m", "v"))
    inverse_scale, clip = np.float32(2.0**-10), np.float32(0.37)
    g = widen(host(state, "grads"), state.math_format) * inverse_scale * clip  # unscaled, then clipped
    update(rule, constant(lr), state, inverse_scale, clip)
    (beta1, beta2), decay = rule.betas, lr * rule.weight_decay * decayed_mask(state)
    w_new, m_new, v_new, step, v_hat = adamw_in_double(w, g, m, v, lr, beta1, beta2, rule.eps, decay, t)

    # Roundings on the way, u each:
    #   m: g - m, the scalar 1 - beta1, their product; then the sum.
    #   v: scalar and product for v beta2 (2); scalar and two products for (1 - beta2) g g (3); the sum: 4 u v in all.
    #   denominator: half of v's 4, sqrt 1, scalar and division 2, the scalar eps or the sum 1 each: 7.
    #   step: scalar, product, division: 3, with the denominator's 7; and m's own error.
    #   w: scalar and product of the decay 2, the difference 1.
    # The restatement in double rounds as often with u = 2^-53: nothing beside 2^-24, as much again in fp64.
    # 1.001: products of two roundings.
    u = 1.001 * (U if recipe != "fp64" else 2 * 2.0**-53)
    m_bound = u * (3 * (1 - beta1) * np.abs(g - m) + np.abs(m_new))
    v_bound = u * 4 * v_new
    denominator = np.sqrt(v_hat) + rule.eps
    step_bound = u * 10 * np.abs(step) + lr / (1 - beta1**t) * m_bound / denominator
    w_bound = u * (2 * np.abs(w) + np.abs(w_new)) + step_bound
    assert (np.abs(host(state, "m") - m_new) <= m_bound).all()
    assert (np.abs(host(state, "v") - v_new) <= v_bound).all()
    assert (np.abs(host(state, "master") - w_new) <= w_bound).all()
    assert int(state.t) == t
    assert (host(state, "master") != w).mean() > 0.9


def test_adamw_bound_can_fail(backend: Backend) -> None:
    # negative control for the test above: off by one in t is seen by most elements, even at t = 10
    rule, lr = AdamW(), 3e-3
    state = state_of(backend, toy(big=(40, 50)), "fp32", rule, np.random.default_rng(0))
    w, g, m, v = (host(state, kind) for kind in ("master", "grads", "m", "v"))
    state.t = backend.from_host(np.asarray(9))
    update(rule, constant(lr), state)
    right, wrong = (adamw_in_double(w, g, m, v, lr, 0.9, 0.95, 1e-8, lr * 0.1, t)[0] for t in (10, 9))
    distances = [np.median(np.abs(host(state, "master") - w)) for w in (wrong, right)]
    assert distances[0] > 100 * distances[1]


@pytest.mark.parametrize("t", [1, 2, 100, 1999])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.99, 1 - 1e-9)])
def test_bias_corrections_are_made_in_double(t: int, betas: tuple[float, float]) -> None:
    rule, lr = AdamW(betas, weight_decay=0.3), 0.01
    decay, step_size, root_correction = rule.scalars(lr, t)
    for beta, square_root, value in ((betas[0], False, lr / step_size), (betas[1], True, root_correction**2)):
        exact = 1 - Fraction(beta) ** t
        # beta**t is right to an ulp of itself, at most 2^-52; then a handful of roundings of 2^-53 each
        bound = 2.0**-52 / float(exact) + 8 * 2.0**-53
        assert abs(Fraction(value) - exact) <= exact * Fraction(bound), square_root
    assert decay == 1 - 0.01 * 0.3


def test_the_first_step_is_lr_even_where_beta2_is_one_in_fp32(backend: Backend) -> None:
    # m / (1 - beta1) = g and v / (1 - beta2) = g^2 at t = 1, so the step is lr sign(g); 1 - fp32(beta2) would be 0 here
    beta2 = 1 - 1e-9
    assert np.float32(beta2) == 1
    rule = AdamW((0.9, beta2), eps=0.0, weight_decay=0.0)
    state, g = start_of(backend, toy(w=(100,)), "fp32", rule), np.random.default_rng(1).standard_normal(100)
    put(state, "grads", g)
    update(rule, constant(0.25), state)
    # w was 0, m was 0: m 2 roundings and its sum exact; v 3, sqrt halves them and adds 1; 2 scalars; products 1; divisions 2
    assert np.abs(host(state, "master") + 0.25 * np.sign(g)).max() <= 0.25 * 12 * U


# --------------------------------------------------------------------------------------------------------- one SGD update


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_the_formula(recipe: str, momentum: float, backend: Backend) -> None:
    rule, lr = SGD(momentum, weight_decay=0.1), 0.05
    state = state_of(backend, toy(**MIXED, big=(40, 50)), recipe, rule, np.random.default_rng(3))
    assert ("m" in state.buffers) == (momentum > 0) and "v" not in state.buffers
    w, g = (widen(host(state, kind), "fp64") for kind in ("master", "grads"))
    m = widen(host(state, "m"), "fp64") if momentum else np.zeros_like(w)
    update(rule, constant(lr), state)
    m_new = momentum * m + g
    w_new = w * (1 - lr * 0.1 * decayed_mask(state)) - lr * m_new
    # m: scalar and product 2, sum 1; w: decay 2, the step's scalar and product 2, difference 1; the fp64 restatement as much
    u = 1.001 * (U if recipe != "fp64" else 2 * 2.0**-53)
    m_bound = u * (2 * momentum * np.abs(m) + np.abs(m_new))
    if momentum:
        assert (np.abs(host(state, "m") - m_new) <= m_bound).all()
    w_bound = u * (2 * np.abs(w) + 2 * lr * np.abs(m_new) + np.abs(w_new)) + lr * m_bound
    assert (np.abs(host(state, "master") - w_new) <= w_bound).all()


# ------------------------------------------------------------------------------------------------------- decay and blocks


@pytest.mark.parametrize("rule", [AdamW(weight_decay=0.5), SGD(weight_decay=0.5)], ids=["adamw", "sgd"])
def test_decay_acts_on_matrices_only(rule: AdamW | SGD, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1, 5, 16, 1 << 16):
        monkeypatch.setattr(refimpl.optim.layout, "BLOCK", block)
        state = start_of(backend, toy(**MIXED), "fp32", rule)
        put(state, "weights", w := np.random.default_rng(0).standard_normal(state.layout.size).astype(np.float32))
        update(rule, constant(0.1), state)  # gradients and moments are zero
        mask = decayed_mask(state)
        assert 0 < mask.sum() < mask.size
        after = host(state, "master")
        assert np.array_equal(after[~mask], w[~mask])
        assert np.array_equal(after[mask], w[mask] * np.float32(1 - 0.1 * 0.5))


@pytest.mark.parametrize("rule", [AdamW(), SGD(weight_decay=0.1)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "fp64", "pure-bf16", "apex-o2"])
def test_results_do_not_depend_on_the_block_size(
    recipe: str, rule: AdamW | SGD, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    model = toy(**MIXED, big=(40, 30))
    least = 64 if not backend.on_host else 1 if recipe == "fp32" else 7  # one element a block is slow; once is enough
    for block in (1, 7, 8, 64, 1000, 1 << 16):
        if block < least:
            continue
        monkeypatch.setattr(refimpl.optim.layout, "BLOCK", block)
        state = state_of(backend, model, recipe, rule, np.random.default_rng(9))
        update(rule, constant(1e-3), state, np.float32(0.7), np.float32(0.9), times=3)
        results.append(bits_of(state))
    assert all(result == results[0] for result in results[1:])


# -------------------------------------------------------------------------------------------------------- skipped updates


@pytest.mark.parametrize("recipe", ["fp16", "fp32", "fp64", "pure-fp16", "pure-bf16", "bf16-moments", "apex-o2"])
@pytest.mark.parametrize("rule", [AdamW(), SGD()], ids=["adamw", "sgd"])
def test_a_skipped_update_changes_no_bit(recipe: str, rule: AdamW | SGD, backend: Backend) -> None:
    state, schedule = state_of(backend, toy(**MIXED), recipe, rule, np.random.default_rng(5)), Schedule(1e-2, 1e-3, 2, 10)
    optimizer = update(rule, schedule, state)
    state.grads[3] = math.inf
    state.grads[-1] = math.nan
    before, lr = bits_of(state), float(optimizer.lr(state))
    update(rule, schedule, state, ONE, np.float32(math.nan), np.True_)
    assert bits_of(state) == before
    assert float(optimizer.lr(state)) == lr


def test_time_advances_with_real_updates_only(backend: Backend) -> None:
    rule, schedule = AdamW(), Schedule(1e-2, 1e-3, 3, 10)
    rng = np.random.default_rng(6)
    with_skips, without = (state_of(backend, toy(**MIXED), "fp16", rule, np.random.default_rng(7)) for _ in range(2))
    seen = []
    for skip in (False, True, True, False, True, False):
        g = rng.standard_normal(with_skips.layout.size)
        put(with_skips, "grads", g)
        seen.append(float(Optimizer(rule, schedule, backend.xp).lr(with_skips)))
        update(rule, schedule, with_skips, ONE, 1.0, np.bool_(skip))
        if not skip:
            put(without, "grads", g)
            update(rule, schedule, without)
        with_skips.grads[:] = without.grads
        assert bits_of(with_skips) == bits_of(without)
    assert int(with_skips.t) == 3
    assert seen == [schedule(t) for t in (0, 1, 1, 1, 2, 2)]


# --------------------------------------------------------------------------------------------------------------- schedule


def test_schedule_end_points() -> None:
    schedule = Schedule(lr=6e-4, min_lr=6e-5, warmup=100, steps=1100)
    assert schedule(0) == 6e-4 / 101
    assert schedule(49) == 6e-4 * 50 / 101
    assert schedule(99) == 6e-4 * 100 / 101
    assert schedule(100) == 6e-4  # cos 0 = 1: exactly the peak
    assert schedule(600) == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-15)  # half way: cos(pi/2) is 6e-17
    assert schedule(1100) == schedule(5000) == 6e-5  # cos pi = -1: exactly the floor, and it stays
    values = [schedule(t) for t in range(1200)]
    assert all(a < b for a, b in pairwise(values[:101]))
    assert all(a >= b for a, b in pairwise(values[100:]))


def test_schedule_without_warm_up_or_without_decay() -> None:
    assert Schedule(1.0, 0.0, 0, 10)(0) == 1.0
    assert [Schedule(0.5, 0.5, 0, 10)(t) for t in (0, 3, 10, 11)] == [0.5] * 4
    assert [Schedule(1.0, 0.0, 4, 4)(t) for t in (0, 3, 4)] == [0.2, 0.8, 1.0]  # all of it warm-up: no division by zero


def test_linear_and_constant_schedules_by_hand() -> None:
    # updates 0 to 7, two of them warm-up: thirds of 3, then from 3 down to 1 in four equal parts, and there it stays
    assert [Schedule(3.0, 1.0, 2, 6, "linear")(t) for t in range(8)] == [1.0, 2.0, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    assert [Schedule(3.0, 1.0, 2, 6, "constant")(t) for t in range(8)] == [1.0, 2.0, *6 * [3.0]]
    assert [Schedule(3.0, 1.0, 2, 6)(t) for t in (2, 4, 6)] == [3.0, 2.0, 1.0]
    assert Schedule(1.0, 0.0, 4, 4, "linear")(4) == 1.0  # all of it warm-up: no division by zero


@pytest.mark.parametrize("shape", SCHEDULES)
def test_schedules_are_pytorchs(shape: str) -> None:
    torch = pytest.importorskip("torch")
    lr, min_lr, warmup, steps = 6e-4, 1e-4, 5, 40
    schedulers = torch.optim.lr_scheduler

    def rates(of: Callable[[Any], Any], n: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler, seen = of(optimizer), []
        for _ in range(n):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    after: dict[str, Callable[[Any], Any]] = {
        "cosine": lambda o: schedulers.CosineAnnealingLR(o, steps - warmup, eta_min=min_lr),
        "linear": lambda o: schedulers.LinearLR(o, 1.0, min_lr / lr, steps - warmup),
        "constant": lambda o: schedulers.ConstantLR(o, 1.0),
    }
    theirs = rates(lambda o: schedulers.LinearLR(o, 1 / (warmup + 1), 1.0, warmup), warmup)
    theirs += rates(after[shape], steps - warmup)
    schedule = Schedule(lr, min_lr, warmup, steps, shape)
    # theirs are recurrences in double precision: at most a few roundings of 1e-16 an update
    assert [schedule(t) for t in range(steps)] == pytest.approx(theirs, rel=4 * steps * 2.0**-53)


def test_the_optimizers_tables_are_the_schedules(backend: Backend) -> None:
    rule, schedule = AdamW(), Schedule(6e-4, 6e-5, 5, 20)
    optimizer = Optimizer(rule, schedule, backend.xp)
    state = start_of(backend, toy(w=(2,)), "fp32", rule)
    for t in range(20):
        state.t = backend.from_host(np.asarray(t))
        lr = optimizer.lr(state)
        assert float(lr) == schedule(t) and lr.shape == ()
        assert tuple(backend.to_host(optimizer.scalars[t])) == rule.scalars(schedule(t), t + 1)
    assert optimizer.scalars.dtype == optimizer.learning_rates.dtype == np.float64


# -------------------------------------------------------------------------------------------------------- without masters


@pytest.mark.parametrize(
    ("step", "moves"),
    [(2.0**-10, False), (2.0**-9, False), (2.0**-9 * (1 + 2.0**-7), True), (2.0**-8, True)],
)
def test_a_bf16_weight_moves_only_by_more_than_half_an_ulp(step: float, moves: bool, backend: Backend) -> None:
    # below 1 bf16 values lie 2^-8 apart; the tie at 2^-9 goes to the even fraction, which is 1
    rule = SGD(momentum=0.0)
    pure, mastered = (start_of(backend, toy(w=(3,)), recipe, rule) for recipe in ("pure-bf16", "bf16"))
    for state in (pure, mastered):
        state.load_weights({"w": np.ones(3, np.float32)})
        state.grads[:] = 1.0
        update(rule, constant(step), state)
    assert (widen(host(pure, "weights")) == (1 - 2.0**-8 if moves else 1.0)).all()
    assert (host(mastered, "master") == np.float32(1 - step)).all()  # the master remembers what the weight cannot hold


def test_small_updates_add_up_in_a_master_and_are_lost_without(backend: Backend) -> None:
    rule = SGD(momentum=0.0)
    pure, mastered = (start_of(backend, toy(w=(1,)), recipe, rule) for recipe in ("pure-bf16", "bf16"))
    for state in (pure, mastered):
        state.load_weights({"w": np.ones(1, np.float32)})
        state.grads[:] = 1.0
        update(rule, constant(6e-4), state, times=100)
        state.weights_down()
    assert float(pure.weights[0]) == 1.0
    assert f"{float(mastered.master[0]):.7f}" == "0.9400020"  # 1 - 100 * 6e-4 but for 100 roundings; measured with PyTorch
    assert float(mastered.weights[0]) == 0.94140625  # the bf16 value nearest to it


@pytest.mark.parametrize(
    ("recipe", "lr", "share"),
    [
        ("pure-bf16", 1e-4, 0.882),
        ("pure-bf16", 3e-5, 0.303),
        ("pure-bf16", 1e-5, 0.154),
        ("pure-bf16", 1e-6, 0.019),
        ("pure-fp16", 1e-4, 1.0),
        ("pure-fp16", 3e-5, 0.998),
        ("pure-fp16", 1e-5, 0.882),
        ("pure-fp16", 1e-6, 0.154),
        ("bf16", 1e-6, 1.0),
    ],
)
def test_share_of_weights_that_one_step_moves(recipe: str, lr: float, share: float, backend: Backend) -> None:
    # N(0, 0.02) weights and a step of exactly lr; shares measured with torch casts
    n, rng, rule = 100_000, np.random.default_rng(8), SGD(momentum=0.0)
    state = start_of(backend, toy(w=(n,)), recipe, rule)
    state.load_weights({"w": (0.02 * rng.standard_normal(n)).astype(np.float32)})
    before = host(state, "master")
    put(state, "grads", rng.choice([-1.0, 1.0], n))
    update(rule, constant(lr), state)
    moved = float((host(state, "master") != before).mean())
    print(f"{recipe} lr {lr:g}: {moved:.4f} of {n} weights moved")
    # five standard deviations of a share counted on 100,000 weights, at most 5 sqrt(0.25 / n), twice (both are samples);
    # and the share is given to three digits
    assert abs(moved - share) <= 10 * math.sqrt(max(share * (1 - share), 1e-4) / n) + 0.0005


# --------------------------------------------------------------------------------------------------------------- PyTorch


def bounded_gradients(rng: np.random.Generator, size: int, steps: int) -> list[np.ndarray]:
    """Gradients with a size of their own for each parameter, over seven decades, and |g| / size in [0.5, 2]."""
    sizes = 10.0 ** rng.uniform(-5, 2, size)
    return [(sizes * rng.uniform(0.5, 2, size) * rng.choice([-1, 1], size)).astype(np.float32) for _ in range(steps)]


def run_ours(
    backend: Backend, rule: AdamW | SGD, lr: float, w: np.ndarray, gradients: list[np.ndarray]
) -> tuple[np.ndarray, float]:
    """The weights after all updates, and the largest magnitude that any had on the way."""
    state = start_of(backend, toy(matrix=(80, 100), vector=(2000,)), "fp32", rule)
    put(state, "weights", w)
    largest, optimizer = np.abs(w).max(), Optimizer(rule, constant(lr), backend.xp)
    one, good = (backend.from_host(x) for x in (ONE, np.False_))
    for g in gradients:
        put(state, "grads", g)
        optimizer.update(state, one, 1.0, good)
        largest = max(largest, np.abs(host(state, "master")).max())
    return host(state, "master"), float(largest)


def run_torch(optimizer_of: object, w: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    matrix, vector = (torch.nn.Parameter(torch.from_numpy(part.copy())) for part in (w[:8000], w[8000:]))
    optimizer = optimizer_of(torch, matrix, vector)
    for g in gradients:
        matrix.grad, vector.grad = torch.from_numpy(g[:8000]), torch.from_numpy(g[8000:])
        optimizer.step()
    return np.concatenate([matrix.detach().numpy(), vector.detach().numpy()])


def test_adamw_stays_as_near_to_torch_as_two_ways_of_rounding_allow(backend: Backend) -> None:
    steps, lr, (beta1, beta2), wd = 200, 1e-3, (0.9, 0.95), 0.1
    rng = np.random.default_rng(10)
    w, gradients = (0.02 * rng.standard_normal(10_000)).astype(np.float32), bounded_gradients(rng, 10_000, steps)

    def fused(torch, matrix, vector):
        groups = [{"params": [matrix], "weight_decay": wd}, {"params": [vector], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=1e-8, fused=True)

    theirs = run_torch(fused, w, gradients)
    ours, largest = run_ours(backend, AdamW((beta1, beta2), 1e-8, wd), lr, w, gradients)
    # torch's kernel uses fused multiply-adds for m and v: one rounding less in each. So after one step both are within a
    # few u of the exact result, and the difference of two runs grows by that much a step, while the moments forget at
    # rates beta1 and beta2. In units of u, with |g| <= 2 and sqrt(v_hat) >= 0.5 (gradients' sizes divided out):
    #   m: 2 roundings of values <= 2 and one of (1 - beta1) |g - m| <= 0.4, both sides: 2 (2 + 3 * 0.4) / (1 - beta1) = 64
    #   v: relative, 2 * 4 / (1 - beta2) = 160; its root half of that
    #   step: lr (64 / 0.5 + 2 / 0.5 * (80 + 2 * 10)) = 528 lr;  w: 2 * 3 roundings of |w| a step, forgotten by nothing
    bound = steps * U * (528 * lr + 6 * largest)
    distance = np.abs(ours - theirs).max()
    moved = np.abs(ours - w).mean()
    print(f"AdamW: identical {np.mean(ours == theirs):.4f}, largest distance {distance:.2e}, bound {bound:.2e}")
    assert distance <= bound
    assert bound < 0.05 * moved  # a bound that says something
    # negative controls: no decay, and other betas, are farther away than that
    for wrong in (AdamW((beta1, beta2), 1e-8, 0.0), AdamW((beta1, 0.96), 1e-8, wd), AdamW((0.91, beta2), 1e-8, wd)):
        assert np.abs(run_ours(backend, wrong, lr, w, gradients)[0] - theirs).max() > 2 * bound


def test_sgd_stays_as_near_to_torch_as_two_ways_of_rounding_allow(backend: Backend) -> None:
    steps, lr, momentum = 200, 1e-3, 0.9
    rng = np.random.default_rng(11)
    w = (0.02 * rng.standard_normal(10_000)).astype(np.float32)
    gradients = [np.clip(g, -2, 2) for g in bounded_gradients(rng, 10_000, steps)]
    theirs = run_torch(lambda torch, *w: torch.optim.SGD(w, lr=lr, momentum=momentum, foreach=False), w, gradients)
    ours, largest = run_ours(backend, SGD(momentum), lr, w, gradients)
    # In units of u, |m| <= 2 / (1 - momentum) = 20: a step of ours makes 2 roundings of momentum m (one of them the
    # scalar, which torch rounds alike) and one of the sum, torch's fma one; the difference is forgotten at rate momentum:
    # (3 + 2) 20 / (1 - momentum) = 1000. Then lr m: 2 roundings each; w: one each.
    bound = steps * U * (lr * (1000 + 4 * 20) + 2 * largest)
    distance = np.abs(ours - theirs).max()
    print(f"SGD: identical {np.mean(ours == theirs):.4f}, largest distance {distance:.2e}, bound {bound:.2e}")
    assert distance <= bound
    nesterov = run_torch(lambda torch, *w: torch.optim.SGD(w, lr=lr, momentum=momentum, nesterov=True), w, gradients)
    assert np.abs(ours - nesterov).max() > 2 * bound  # negative control


def test_plain_sgd_is_torchs_but_for_one_fused_product(backend: Backend) -> None:
    rng = np.random.default_rng(12)
    w, gradients = rng.standard_normal(10_000).astype(np.float32), bounded_gradients(rng, 10_000, 1)
    theirs = run_torch(lambda torch, *w: torch.optim.SGD(w, lr=0.5, foreach=False), w, gradients)
    # lr is a power of two: lr g is exact, with or without a fused multiply-add, so the one rounding left is the same
    assert np.array_equal(run_ours(backend, SGD(0.0), 0.5, w, gradients)[0], theirs)
