"""refimpl.optim.gradients: Inf and NaN are found wherever they are, the norm is right, and unscaling comes before clipping.

u = 2^-24 is the largest relative error of one fp32 rounding.
"""

import math
from typing import Any

import numpy as np
import pytest
from arrays import U
from threadpoolctl import threadpool_limits

import refimpl.optim.layout
from refimpl.backends.base import Backend
from refimpl.backends.numpy.backend import NUMPY, SHARED
from refimpl.errors import UsageError
from refimpl.nn.models.model import Model, Parameter
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.recipes import get_recipe
from refimpl.training.non_finite import first_non_finite

ONE = np.float32(1)


def state_of(backend: Backend, recipe: str, **shapes: tuple[int, ...]) -> State:
    model = Model("toy", {}, {name: Parameter(shape, std=1.0) for name, shape in shapes.items()}, {}, None, None)
    return State(model, get_recipe(recipe).state_encodings(("m",)), backend)


def put(state: State, values: np.ndarray) -> None:
    """Gradients from the host, in the format of the state."""
    state.grads[:] = state.backend.from_host(cast(values, state.formats["grads"]))


def measured(state: State, inverse_scale: Any = ONE) -> tuple[np.ndarray, np.ndarray]:
    """`check_and_measure` with a 1/S from the host; its results on the host."""
    found, norm = check_and_measure(state, state.backend.from_host(np.asarray(inverse_scale)))
    return state.backend.to_host(found), state.backend.to_host(norm)


# ------------------------------------------------------------------------------------------------------------- found_inf

BAD = [math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_gradient_at_either_end_of_any_block_is_found(
    recipe: str, bad: float, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("BLOCK", 8), ("DEVICE_BLOCK", 16), ("GRAIN", 4)):
        monkeypatch.setattr(refimpl.optim.layout, name, size)
    state = state_of(backend, recipe, a=(5, 5), b=(10,))  # 35 elements: four blocks and a rest of three
    state.grads[:] = 0.5
    found, norm = measured(state)
    assert not found and math.isfinite(norm)
    places = sorted({0, 7, 8, 15, 16, 23, 24, 31, 32, 34, 20})
    for place in places:
        state.grads[place] = bad
        with np.errstate(invalid="ignore"):
            found, norm = measured(state)
        assert found, place
        assert not math.isfinite(norm)
        assert found.shape == () and found.dtype == bool
        state.grads[place] = 0.5
    assert not measured(state)[0]


@pytest.mark.parametrize("bad", BAD)
def test_found_in_the_real_blocks(bad: float, backend: Backend) -> None:
    block = refimpl.optim.layout.BLOCK
    state = state_of(backend, "fp16", a=(2 * block + 3,))
    for place in (0, block - 1, block, 2 * block - 1, 2 * block, 2 * block + 2):
        state.grads[place] = bad
        with np.errstate(invalid="ignore"):
            assert measured(state)[0], place
        state.grads[place] = 0


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "fp32"])
def test_the_largest_finite_gradients_are_not_infinite(recipe: str, backend: Backend) -> None:
    # a test of the sum, or of the norm, would call these an overflow: their sum or their squares leave fp32
    state = state_of(backend, recipe, a=(100,))
    state.grads[:] = FORMATS[state.formats["grads"]].max
    state.grads[::3] *= -1
    with np.errstate(over="ignore"):
        found, _ = measured(state)
    assert not found


def test_the_check_is_on_the_scaled_gradients(backend: Backend) -> None:
    # With S < 1 unscaling multiplies and may overflow; PyTorch looks before it multiplies, and so does this
    state = state_of(backend, "fp32", a=(3,))
    state.grads[:] = 1e38
    with np.errstate(over="ignore"):
        found, norm = measured(state, inverse_of(np.float32(2.0**-10)))
    assert not found and math.isinf(norm)


@pytest.mark.parametrize("bad", BAD)
def test_first_non_finite_names_the_parameter(bad: float, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refimpl.optim.layout, "BLOCK", 4)
    for recipe in ("fp16", "fp32"):
        state = state_of(backend, recipe, first=(3,), second=(5, 2), third=(1,))
        assert first_non_finite(state) is None
        for index in (13, 12, 4, 3, 2, 0):  # from the end: each is the first when it is set
            state.grads[index] = bad
            assert first_non_finite(state) == ("first" if index < 3 else "second" if index < 13 else "third")


# ------------------------------------------------------------------------------------------------------------------ norm


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("size", [1, 7, 1000, 65_536, 200_003])
def test_norm_is_right(recipe: str, size: int, backend: Backend) -> None:
    state = state_of(backend, recipe, a=(size,))
    rng = np.random.default_rng(size)
    put(state, rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 1, size))
    scale = np.float32(1000.0)  # not a power of two: unscaling rounds
    inverse = inverse_of(scale)
    found, norm = measured(state, inverse)
    exact = float(np.linalg.norm(widen(backend.to_host(state.grads), "fp64"))) / 1000.0
    # Squares are positive, so relative errors never grow in sums. A square: 1/S 1 u, unscaling 1 u, both twice by the
    # squaring, the product 1 u: 5 u. NumPy sums n values in pairs down to runs of 128 in 8 lanes: 16 + 3 additions, then
    # log2(n / 128), rounded up: of a grain, and of the sums of all grains. The root halves it all and adds 1.
    grain = refimpl.optim.layout.GRAIN
    additions = sum(19 + max(0, math.ceil(math.log2(n / 128))) for n in (grain, -(-size // grain)))
    bound = 1.001 * U * ((5 + additions) / 2 + 1)
    assert not found
    assert abs(float(norm) - exact) <= bound * exact
    assert norm.dtype == np.float32 and norm.shape == ()


def test_norm_in_fp64(backend: Backend) -> None:
    state = state_of(backend, "fp64", a=(1000,))
    put(state, np.random.default_rng(0).standard_normal(1000))
    _, norm = measured(state)
    exact = math.sqrt(math.fsum((state.grads * state.grads).tolist()))
    assert norm.dtype == np.float64
    assert abs(float(norm) - exact) <= 30 * 2.0**-53 * exact  # the count above, with u = 2^-53


def test_norm_of_zero_gradients_is_zero(backend: Backend) -> None:
    found, norm = measured(state_of(backend, "fp16", a=(100,)))
    assert not found and norm == 0


def test_norm_does_not_depend_on_threads() -> None:
    n = SHARED + 300_001  # three blocks, large enough to be shared
    state = state_of(NUMPY, "fp32", a=(n,))
    state.grads[:] = np.random.default_rng(2).standard_normal(n).astype(np.float32)
    norms = set()
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            norms.add(check_and_measure(state, ONE)[1].tobytes())
    assert len(norms) == 1


def test_norm_does_not_depend_on_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    grain = refimpl.optim.layout.GRAIN
    state = state_of(backend, "fp16", a=(40 * grain + 17,))
    put(state, np.random.default_rng(3).standard_normal(state.grads.size))
    norms = set()
    for block in (grain, 3 * grain, 16 * grain, 64 * grain):
        for name in ("BLOCK", "DEVICE_BLOCK"):
            monkeypatch.setattr(refimpl.optim.layout, name, block)
        norms.add(measured(state)[1].tobytes())
    assert len(norms) == 1
    for other in (1, 2, 32, 64):  # other grains are other orders of the sum, of which some give another norm
        monkeypatch.setattr(refimpl.optim.layout, "GRAIN", other)
        norms.add(measured(state)[1].tobytes())
    assert len(norms) > 1


def test_the_pass_writes_nothing(backend: Backend) -> None:
    state = state_of(backend, "fp16", a=(100,))
    put(state, np.linspace(-1, 1, 100))
    before = state.grads.tobytes()
    measured(state, inverse_of(np.float32(3)))
    assert state.grads.tobytes() == before


# ------------------------------------------------------------------------------------------------------------- unscaling


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**-20, 3.0, 1000.0, 1e38, 1e-30])
def test_inverse_is_the_double_quotient_rounded_once(scale: float, backend: Backend) -> None:
    inverse = inverse_of(backend.from_host(np.float32(scale)))
    assert inverse.dtype == np.float32
    assert inverse == np.float32(1.0 / float(np.float32(scale)))


def test_inverse_of_a_collapsed_scale_is_infinite(backend: Backend) -> None:
    with np.errstate(divide="ignore"):
        assert inverse_of(backend.from_host(np.float32(0))) == math.inf


# --------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize(
    ("norm", "max_norm", "expected"), [(0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (4.0, 1.0, 0.25), (1e3, 2.0, 2e-3)]
)
def test_clip_coefficient(norm: float, max_norm: float, expected: float, backend: Backend) -> None:
    coefficient = clip_coefficient(backend.from_host(np.float32(norm)), max_norm)
    # the 1e-6 in the denominator, and three roundings: sum, reciprocal, product (expected itself is exact)
    assert abs(float(coefficient) - expected) <= expected * (1e-6 / max(norm, 1) + 4 * U)
    assert coefficient <= 1


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_that_nothing_can_have_is_refused(max_norm: float) -> None:
    with pytest.raises(UsageError, match=r"max_norm is .*: it must be above 0; inf means no clipping"):
        clip_coefficient(np.float32(1), max_norm)
    assert clip_coefficient(np.float32(1), math.inf) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_clip_coefficient_is_the_formula_in_order(seed: int, backend: Backend) -> None:
    rng = np.random.default_rng(seed)
    norm, max_norm = np.float32(10.0 ** rng.uniform(-8, 8)), float(10.0 ** rng.uniform(-2, 2))
    expected = np.float32(1) / (norm + np.float32(1e-6)) * np.float32(max_norm)
    coefficient = clip_coefficient(backend.from_host(norm), max_norm)
    assert coefficient.dtype == np.float32 and float(coefficient) == min(expected, ONE)


def test_infinity_means_no_clipping(backend: Backend) -> None:
    for norm in (1e30, math.nan):
        assert clip_coefficient(backend.from_host(np.float32(norm)), math.inf) == 1.0


def test_a_clipped_gradient_has_the_norm_asked_for() -> None:
    g = np.random.default_rng(4).standard_normal(1000)
    norm = np.linalg.norm(g)
    coefficient = float(clip_coefficient(np.float32(norm), 0.5))
    assert abs(np.linalg.norm(g * coefficient) - 0.5) <= 0.5 * (1e-6 / norm + 5 * U)  # norm's rounding too


def test_clip_coefficient_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    for _ in range(300):
        x, max_norm = np.float32(10.0 ** rng.uniform(-6, 6)), float(10.0 ** rng.uniform(-2, 2))
        p = torch.nn.Parameter(torch.zeros(1))
        p.grad = torch.tensor([x])  # its norm is x, exactly but for a root of a square
        norm = torch.nn.utils.clip_grad_norm_([p], max_norm)
        assert p.grad.item() == x * clip_coefficient(np.float32(norm.item()), max_norm)


def trained_once(backend: Backend, scaled: np.ndarray, scale: float, norm_with: float | None = None) -> np.ndarray:
    """What a step of plain SGD takes away from the weights, clipped to 1 by the norm that a loss scale `norm_with` gives."""
    state = state_of(backend, "fp32", a=scaled.shape)
    put(state, scaled)
    inverse, other = (inverse_of(backend.from_host(np.float32(S))) for S in (scale, norm_with or scale))
    _, norm = check_and_measure(state, other)
    optimizer = Optimizer(SGD(momentum=0.0), Schedule(1.0, 1.0, 0, 1), backend.xp)
    optimizer.update(state, inverse, clip_coefficient(norm, 1.0), backend.from_host(np.False_))
    return -backend.to_host(state.master)


def test_unscaling_comes_before_clipping(backend: Backend) -> None:
    # a gradient of norm 0.5, below the limit of 1, with a loss scale of 1024: nothing is to be clipped
    g = np.float32([0.3, -0.4])
    right = trained_once(backend, g * 1024, 1024)
    assert np.array_equal(right, g)
    # negative control: the norm of the scaled gradients is 512, so clipping by it makes the update 512 times too small
    wrong = trained_once(backend, g * 1024, 1024, norm_with=1)
    assert np.allclose(wrong, g / 512, rtol=1e-5)  # to see that it is this mistake, not for precision
    assert np.abs(wrong - right).max() > 0.3


def test_clipped_updates_do_not_depend_on_the_scale(backend: Backend) -> None:
    rng = np.random.default_rng(6)
    g = (10 * rng.standard_normal(500)).astype(np.float32)
    results = [trained_once(backend, g * np.float32(scale), scale) for scale in (1.0, 2.0**-7, 2.0**16)]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    assert abs(np.linalg.norm(results[0].astype(np.float64)) - 1) < 1e-6 + 50 * U  # clipped to 1: the norm's bound, twice
