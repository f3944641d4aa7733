"""parity.fused_optimizers: the emulated FMA against exact rational arithmetic, and the optimizers against PyTorch's bits.

FMA is defined without PyTorch: a b + c as a fraction, rounded once. The optimizers, norms and clip coefficients are
PyTorch's CPU kernels or they are nothing, so there torch is the oracle, and equality means every bit of every element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from arrays import U, bits

import refimpl.optim.layout
from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.optim.adamw import AdamW
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.parity.fused_optimizers import (
    PIECE,
    ExactAdamW,
    ExactSGD,
    adamw_step,
    clip_coefficient_like_torch,
    fma32,
    lerp32,
    norm_like_torch,
    sgd_step,
)
from refimpl.precision.recipes import RECIPES

Array = np.ndarray
INF, NAN = math.inf, math.nan
MAX, TINY = np.float32(3.4028235e38), np.float32(2.0**-149)


def f32(x: Any) -> Array:
    return np.asarray(x, np.float32)


def equal_bits(ours: Any, theirs: Any) -> bool:
    """The same bits, signs of zeros included; a NaN is a NaN."""
    ours, theirs = f32(ours), f32(theirs)
    both_nan = np.isnan(ours) & np.isnan(theirs)
    return ours.shape == theirs.shape and bool(((bits(ours) == bits(theirs)) | both_nan).all())


# ------------------------------------------------------------------------------------------------------------ the oracle


def rounded(x: Fraction) -> float:
    """The fp32 number nearest to a fraction that is not 0, ties to even: a multiple of 2^-149 or of 24 bits' last place."""
    exponent = math.frexp(x.numerator / x.denominator if abs(x) > Fraction(1, 2**900) else 2.0**-900)[1]
    while abs(x) >= Fraction(2) ** exponent:
        exponent += 1
    while abs(x) < Fraction(2) ** (exponent - 1) and exponent > -149:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - 24, -149)
    nearest = abs(round(x / unit)) * unit  # round() of a fraction goes to even
    return math.copysign(INF if nearest >= Fraction(2) ** 128 else float(nearest), x)


def fma_by_definition(a: float, b: float, c: float) -> float:
    """IEEE 754-2019, fusedMultiplyAdd."""
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c if not (math.isfinite(a) and math.isfinite(b)) else c  # of fp32 numbers: a*b is finite in fp64
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact:
        return rounded(exact)
    return a * b + c  # zeros: the product is 0 or cancels, and fp64 has the same rule for the sign


def check_fma(a: Any, b: Any, c: Any) -> int:
    """Compare all triples with the definition; how many of them the sum rounded twice would have got wrong."""
    a, b, c = (x.ravel() for x in np.broadcast_arrays(f32(a), f32(b), f32(c)))
    ours = fma32(a, b, c)
    assert ours.dtype == np.float32
    expected = f32([fma_by_definition(*map(float, triple)) for triple in zip(a, b, c, strict=True)])
    wrong = np.flatnonzero((bits(ours) != bits(expected)) & ~(np.isnan(ours) & np.isnan(expected)))
    assert not wrong.size, [(a[i], b[i], c[i], ours[i], expected[i]) for i in wrong[:3]]
    return int((bits(rounded_twice(a, b, c)) != bits(expected)).sum())


def rounded_twice(a: Array, b: Array, c: Array) -> Array:
    """The usual emulation without rounding to odd."""
    with np.errstate(all="ignore"):
        return (a.astype(np.float64) * b + c).astype(np.float32)


def random_bits(rng: np.random.Generator, n: int) -> Array:
    return rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


# ------------------------------------------------------------------------------------------------------------------ fma32


def test_oracle_rounds_as_numpy_does_from_fp64() -> None:
    """One rounding of an fp64 number is a cast: the oracle and NumPy's conversion must agree on it."""
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        x = random_bits(rng, 2000).astype(np.float64) * (1 + rng.integers(-4, 5, 2000) * 2.0**-25)
        x = x[np.isfinite(x) & (x != 0)]
        assert equal_bits([rounded(Fraction(value)) for value in x], x.astype(np.float32))


def test_fma_of_random_numbers_and_of_random_bits() -> None:
    rng = np.random.default_rng(1)
    check_fma(*rng.standard_normal((3, 5000)))
    with np.errstate(all="ignore"):
        check_fma(*(random_bits(rng, 5000) for _ in range(3)))


def test_fma_under_cancellation_is_the_error_of_the_product() -> None:
    rng = np.random.default_rng(2)
    a, b = f32(rng.standard_normal((2, 3000)))
    check_fma(a, b, -(a * b))
    near = -(a * b) * f32(1 + rng.integers(-3, 4, 3000) * 2.0**-23)
    check_fma(a, b, near)


def test_fma_where_c_is_half_way_off_and_the_product_just_misses_the_tie() -> None:
    """p = 2^-24 2^k (1 - j^2 2^-46), a hair less than half an ulp of c: fp64 cannot tell, the fraction can."""
    rng = np.random.default_rng(3)
    k, j = rng.integers(-60, 60, 4000), rng.integers(1, 363, 4000)
    c = rng.integers(2**23, 2**24, 4000) * 2.0 ** (k - 23) * rng.choice([-1, 1], 4000)
    a, b = 2.0 ** (k - 24) * (1 + j * 2.0**-23), rng.choice([-1, 1], 4000) * (1 - j * 2.0**-23)
    assert check_fma(a, b, c) > 1000  # the control: rounded twice, every other of these is wrong
    check_fma(2.0 ** (k - 24), np.sign(b), c)  # exact ties still go to even


def test_fma_where_the_product_is_a_tie_and_c_breaks_it() -> None:
    """13 x 12 bits make 25: half way between two fp32 numbers. c, however small, decides; without it the tie is even."""
    rng = np.random.default_rng(4)
    a, b = rng.integers(2**12, 2**13, 6000) | 1, rng.integers(2**11, 2**12, 6000) | 1
    c = rng.choice([-1, 1], 6000) * 2.0 ** rng.integers(-149, -30, 6000)
    assert check_fma(a, b, c) > 1000
    check_fma(a, b, 0.0)


def test_fma_where_ties_are_subnormal_and_where_they_overflow() -> None:
    rng = np.random.default_rng(5)
    j = rng.integers(1, 363, 4000)
    a, b = 2.0**-75 * (1 + j * 2.0**-23), 2.0**-75 * (1 - j * 2.0**-23)
    c = rng.integers(-(2**23), 2**23, 4000) * 2.0**-149
    assert check_fma(a, b, c) > 1000
    a, b = 2.0**52 * (1 + j[:400] * 2.0**-23), 2.0**51 * (1 - j[:400] * 2.0**-23)
    assert check_fma(a, b, MAX) == 400  # just below the tie between the largest number and infinity
    check_fma(-(2.0**52), 2.0**51, [-MAX, MAX])  # on it


def test_fma_of_special_values() -> None:
    values = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, TINY, -TINY, MAX, -MAX, 2.0**-126, 2.0**-75, 2.0**64]
    a, b, c = np.meshgrid(values, values, values)
    check_fma(a, b, c)


def test_fma_broadcasts_keeps_shape_and_takes_python_floats_as_fp32() -> None:
    x = f32([[1.0, 2.0], [3.0, 4.0]])
    assert equal_bits(fma32(0.1, x, 0.3), fma32(np.float32(0.1), x, np.float32(0.3)))
    assert fma32(x[0, 0], 1.0, x[1, 1]).shape == () and fma32(x, 1.0, x[0]).shape == (2, 2)
    assert fma32(x[:0], x[:0], 1.0).shape == (0, 2)
    assert equal_bits(fma32(x.T, 3.0, 1.0), x.T * 3 + 1)


@pytest.mark.parametrize("other", [np.float64, np.float16])
def test_fma_refuses_other_formats(other: type) -> None:
    with pytest.raises(TypeError, match="takes fp32"):
        fma32(np.ones(3, other), 1.0, 1.0)


# ------------------------------------------------------------------------------------------------------- torch as the oracle


@pytest.fixture
def torch() -> Iterator[Any]:
    """PyTorch on one thread, where its kernels have FMA."""
    module = pytest.importorskip("torch")
    if not module.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("PyTorch runs without FMA kernels here")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


class Gradients:
    """Reproducible gradients whose sizes span 7 decades, one size an element; about 1 in 1000 is 0."""

    def __init__(self, n: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.size = f32(10.0 ** self.rng.uniform(-7, 0, n))

    def next(self) -> Array:
        g = self.rng.standard_normal(self.size.size, np.float32) * self.size
        g[self.rng.integers(0, g.size, g.size // 1000)] = 0.0
        return g


Step = Callable[[Array, Array, int], None]  # (p, g, t): update p in place


def differing(torch: Any, make: Callable[[list[Any]], Any], ours: Step, n: int, steps: int, seed: int = 0) -> int:
    """Run PyTorch's optimizer and ours on the same gradients; how many parameters differ in any bit at the end."""
    rng = np.random.default_rng(seed)
    p = f32(0.02 * rng.standard_normal(n))
    leaf = torch.nn.Parameter(torch.from_numpy(p.copy()))
    optimizer, gradients = make([leaf]), Gradients(n, seed)
    for t in range(1, steps + 1):
        g = gradients.next()
        leaf.grad = torch.from_numpy(g.copy())
        optimizer.step()
        ours(p, g, t)
    assert np.isfinite(p).all()
    return int((bits(p) != bits(leaf.detach().numpy())).sum())


def adam(n: int, lr: float, amsgrad: bool = False, **options: Any) -> Step:
    m, v = np.zeros((2, n), np.float32)
    vmax = np.zeros(n, np.float32) if amsgrad else None
    return lambda p, g, t: adamw_step(p, g, m, v, lr=lr, t=t, vmax=vmax, **options)


def sgd(n: int, lr: float, **options: Any) -> Step:
    buf = np.zeros(n, np.float32) if options.get("momentum") else None
    return lambda p, g, t: sgd_step(p, g, buf, lr=lr, first=t == 1, **options)


def shipped(rule: AdamW | SGD, n: int, lr: float) -> Step:
    """A rule on one flat array, all of it decayed, as Optimizer calls it."""
    moments = [np.zeros(n, np.float32) for _ in rule.moments]

    def step(p: Array, g: Array, t: int) -> None:
        scalars = f32(rule.scalars(lr, t))
        p *= scalars[0]
        rule.update_block(p, g.copy(), moments, scalars, np)

    return step


def test_fma_is_the_processors(torch: Any) -> None:
    """torch.addcmul(c, a, b) is a fused instruction; a million triples, half of them of random bits."""
    rng = np.random.default_rng(6)
    for triple in (f32(rng.standard_normal((3, 500_000))), random_bits(rng, 1_500_000).reshape(3, -1)):
        a, b, c = triple
        theirs = torch.addcmul(*(torch.from_numpy(x.copy()) for x in (c, a, b))).numpy()
        assert equal_bits(fma32(a, b, c), theirs)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.4999, 0.5, 0.7, 1.0])
def test_lerp(torch: Any, weight: float) -> None:
    x, y = f32(np.random.default_rng(7).standard_normal((2, 20_003)))
    assert equal_bits(lerp32(x, y, weight), torch.lerp(torch.from_numpy(x), torch.from_numpy(y), weight).numpy())


# ------------------------------------------------------------------------------------------------------------- Adam, AdamW


def test_adamw_has_the_bits_of_torch_for_1000_steps_on_100_000_parameters(torch: Any) -> None:
    make = lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True)  # noqa: E731
    assert differing(torch, make, adam(100_000, lr=1e-3), 100_000, 1000) == 0


def test_adamw_with_a_tail_for_300_steps(torch: Any) -> None:
    make = lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True)  # noqa: E731
    assert differing(torch, make, adam(20_003, lr=1e-3, tail=3), 20_003, 300) == 0


@pytest.mark.parametrize("tail", range(8))
def test_adamw_with_every_tail_also_across_our_pieces(torch: Any, tail: int) -> None:
    make = lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True)  # noqa: E731
    for n in (tail or 8, 64 + tail, PIECE + tail):
        assert differing(torch, make, adam(n, lr=1e-3, tail=n % 8), n, 100, seed=n) == 0


@pytest.mark.parametrize(
    ("betas", "eps", "weight_decay", "lr"),
    [
        ((0.9, 0.95), 1e-8, 0.1, 6e-4),
        ((0.9, 0.999), 1e-3, 0.0, 1e-2),
        ((0.3, 0.9), 1e-15, 0.3, 3e-3),  # 1 - beta1 >= 0.5: lerp starts from the other end
        ((0.5, 0.5), 1e-8, 0.01, 1e-3),
        ((0.0, 0.99), 1e-6, 0.5, 0.1),
    ],
)
def test_adamw_with_other_constants(torch: Any, betas: tuple[float, float], eps: float, weight_decay: float, lr: float) -> None:
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    make = lambda ps: torch.optim.AdamW(ps, fused=True, **options)  # noqa: E731
    assert differing(torch, make, adam(4005, tail=5, **options), 4005, 300) == 0


@pytest.mark.parametrize(
    ("decoupled", "amsgrad", "maximize"), list(itertools.product([False, True], [False, True], [False, True]))
)
def test_adam_and_adamw_with_all_options(torch: Any, decoupled: bool, amsgrad: bool, maximize: bool) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": maximize}
    make = lambda ps: kind(ps, fused=True, **options)  # noqa: E731
    assert differing(torch, make, adam(4007, tail=7, decoupled=decoupled, **options), 4007, 200) == 0


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_unfused_adam_is_the_same_but_for_torchs_square_root(torch: Any, foreach: bool, decoupled: bool) -> None:
    def torch_sqrt(x: Array) -> Array:
        root: Array = torch.sqrt(torch.from_numpy(x)).numpy()
        return root

    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    make = lambda ps: kind(ps, lr=1e-3, weight_decay=0.1, foreach=foreach)  # noqa: E731
    ours = adam(4007, lr=1e-3, weight_decay=0.1, decoupled=decoupled, sqrt=torch_sqrt)
    assert differing(torch, make, ours, 4007, 200) == 0


def test_controls_plain_arithmetic_or_a_missing_tail_rule_fail_the_comparison(torch: Any) -> None:
    n, steps = 10_003, 300
    make = lambda ps: torch.optim.AdamW(ps, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)  # noqa: E731
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    assert differing(torch, make, shipped(ExactAdamW(), n, 1e-3), n, steps) == 0
    plain = differing(torch, make, shipped(AdamW(), n, 1e-3), n, steps)
    no_tail = differing(torch, make, adam(n, **options), n, steps)
    all_tail = differing(torch, make, adam(n, tail=n, **options), n, steps)
    print(f"of {n} parameters differ after {steps} steps: plain FP32 {plain}, no tail rule {no_tail}, only it {all_tail}")
    assert plain > n / 10
    assert 0 < no_tail <= 3
    assert all_tail > n / 100


# --------------------------------------------------------------------------------------------------------------------- SGD


SGD_OPTIONS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov, "maximize": maximize}
    for momentum, dampening, nesterov in [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
    for decay, maximize in itertools.product([0.0, 0.01], [False, True])
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(f"{v:g}" for v in o.values()))
def test_sgd_with_all_options_for_1000_steps(torch: Any, options: dict[str, Any]) -> None:
    n = 403
    make = lambda ps: torch.optim.SGD(ps, lr=0.01, foreach=False, **options)  # noqa: E731
    assert differing(torch, make, sgd(n, lr=0.01, **options), n, 1000) == 0


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(f"{v:g}" for v in o.values()))
def test_sgd_foreach_and_fused_with_its_tail(torch: Any, options: dict[str, Any]) -> None:
    n = 1007
    foreach = lambda ps: torch.optim.SGD(ps, lr=0.01, foreach=True, **options)  # noqa: E731
    assert differing(torch, foreach, sgd(n, lr=0.01, **options), n, 60) == 0
    fused = lambda ps: torch.optim.SGD(ps, lr=0.01, fused=True, **options)  # noqa: E731
    assert differing(torch, fused, sgd(n, lr=0.01, tail=7, **options), n, 200) == 0


def test_control_plain_sgd_fails_the_comparison(torch: Any) -> None:
    n, steps = 10_003, 300
    make = lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9)  # noqa: E731
    assert differing(torch, make, shipped(ExactSGD(), n, 0.01), n, steps) == 0
    plain = differing(torch, make, shipped(SGD(), n, 0.01), n, steps)
    print(f"of {n} parameters differ after {steps} steps: plain FP32 {plain}")
    assert plain > n / 10


def test_the_first_momentum_buffer_is_the_gradient_itself(torch: Any) -> None:
    """Not (1 - dampening) g; and not 0 momentum + g either, which would lose the sign of a zero."""
    p, g = f32([-0.0, 0.0, 1.0, -1.0]), f32([-0.0, -0.0, 0.3, 0.7])
    leaf = torch.nn.Parameter(torch.from_numpy(p.copy()))
    leaf.grad = torch.from_numpy(g.copy())
    torch.optim.SGD([leaf], lr=0.1, momentum=0.9, dampening=0.5).step()
    shipped(ExactSGD(dampening=0.5), 4, 0.1)(p, g, 1)
    assert equal_bits(p, leaf.detach().numpy())


# ------------------------------------------------------------------------------------------------------------ in Optimizer


@pytest.mark.parametrize("rule", [ExactAdamW(), ExactAdamW((0.9, 0.999), 1e-6, 0.01), ExactSGD(), ExactSGD(nesterov=True)])
def test_the_rules_drop_into_optimizer(torch: Any, rule: ExactAdamW | ExactSGD, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model across two blocks, a schedule, decay on matrices only: the bits of torch with one group a kind of tensor."""
    monkeypatch.setattr(refimpl.optim.layout, "BLOCK", 1 << 16)
    model, schedule = mlp_model(MLPConfig(n_layer=1, n_embd=32, block_size=8)), Schedule(1e-2, 1e-4, 5, 40)
    state = State(model, RECIPES["fp32"].state_encodings(rule.moments), NUMPY)
    assert state.layout.size > 1 << 16 and all((stop - start) % 8 == 0 for start, stop, _ in state.layout.slots.values())
    rng = np.random.default_rng(8)
    state.weights[...] = rng.standard_normal(state.layout.size)
    leaves = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in state.weight_views.items()}
    groups = [
        {"params": [leaves[name] for name, spec in model.parameters.items() if spec.decay == decay], "weight_decay": wd}
        for decay, wd in ((True, rule.weight_decay), (False, 0.0))
    ]
    if isinstance(rule, ExactAdamW):
        theirs = torch.optim.AdamW(groups, betas=rule.betas, eps=rule.eps, fused=True)
    else:
        theirs = torch.optim.SGD(groups, lr=1.0, momentum=rule.momentum, nesterov=rule.nesterov)
    ours, gradients = Optimizer(rule, schedule), Gradients(state.layout.size, 8)
    for t in range(40):
        state.grads[...] = gradients.next()
        for name, g in state.grad_views.items():
            leaves[name].grad = torch.from_numpy(g.copy())
        for group in theirs.param_groups:
            group["lr"] = schedule(t)
        theirs.step()
        ours.update(state, f32(1.0), 1.0, np.bool_(False))
    for name, w in state.weight_views.items():
        assert equal_bits(w, leaves[name].detach().numpy()), name


def test_arrays_that_are_not_flat_or_not_of_one_length_are_refused() -> None:
    flat, square = np.zeros(16, np.float32), np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="flat arrays"):
        adamw_step(square, square, square, square, lr=1e-3, t=1)
    with pytest.raises(ValueError, match="flat arrays"):
        sgd_step(flat, flat[:8], lr=1e-3, first=True)


# -------------------------------------------------------------------------------------------------------- norms, clipping


def test_norms(torch: Any) -> None:
    rng = np.random.default_rng(9)
    for n in [*range(130), 1000, 1003, 4096, 12_345, 65_536, 300_007]:
        for _ in range(20 if n < 130 else 3):
            x = f32(rng.standard_normal(n) * 10.0 ** rng.uniform(-4, 2, n))
            assert equal_bits(norm_like_torch(x), torch.linalg.vector_norm(torch.from_numpy(x)).numpy()), n
    x = f32(rng.standard_normal((37, 41)))
    assert equal_bits(norm_like_torch(x), torch.linalg.vector_norm(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("value", [INF, NAN, 1e30, 1e-30])
def test_norms_of_what_overflows_or_is_no_number(torch: Any, value: float) -> None:
    for n in (1, 3, 7, 8, 20, 100):
        x = np.full(n, value, np.float32)
        assert equal_bits(norm_like_torch(x), torch.linalg.vector_norm(torch.from_numpy(x)).numpy())


def test_norm_differs_from_the_true_norm_by_no_more_than_a_running_sum_may() -> None:
    """Each square is rounded once, then passes at most n/8 + 7 additions; all terms are positive, so the relative error of
    the sum is at most (n/8 + 8) u, that of the root half of it, and the root's own rounding adds u."""
    x = f32(np.random.default_rng(10).standard_normal(1_000_000))
    true = math.sqrt(float((x.astype(np.float64) ** 2).sum()))
    relative, bound = abs(float(norm_like_torch(x)) / true - 1), ((x.size / 8 + 8) / 2 + 1) * U
    print(f"norm of 1,000,000 normals: relative error {relative:.1e}, bound {bound:.1e}")
    assert relative <= bound


@pytest.mark.parametrize("max_norm", [1.0, 0.3, 1e-3, 50.0, 1e6])
def test_clipped_gradients(torch: Any, max_norm: float) -> None:
    rng = np.random.default_rng(11)
    for trial in range(100):
        shapes = [tuple(rng.integers(1, 24, rng.integers(1, 4))) for _ in range(rng.integers(1, 30))]
        grads = [f32(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1)) for shape in shapes]
        leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = torch.from_numpy(g.copy())
        total = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        norms = [norm_like_torch(g) for g in grads]
        assert equal_bits(norm_like_torch(np.array(norms)), total.numpy()), trial
        coefficient = clip_coefficient_like_torch(norms, max_norm)
        assert coefficient.dtype == np.float32
        for leaf, g in zip(leaves, grads, strict=True):
            assert equal_bits(g * coefficient, leaf.grad.numpy()), trial


# ----------------------------------------------------------------------------------- how far plain FP32 is from the exact one


def report(name: str, distance: Array, bound: Array, moved: Array) -> None:
    """Print what was measured beside what was derived, and hold one against the other, element by element."""
    assert np.isfinite(bound).all()
    print(
        f"{name}: after 1000 steps {np.mean(distance == 0):.1%} identical, largest distance {distance.max():.1e}, "
        f"relative L2 to the move {np.linalg.norm(distance) / np.linalg.norm(moved):.1e}; "
        f"bound: largest {bound.max():.1e}, closest approach {(distance / bound).max():.0%} of it"
    )
    assert (distance <= bound).all()
    assert distance.any()


def test_distance_of_plain_adamw_from_exact_adamw() -> None:
    """A running error bound, carried along in double precision: E(x) >= |x plain - x exact| for each element and step.

    An operation with the same operands gives the same bits; with operands that differ it adds at most u of its result
    in each of the two runs, 2u in all, and passes the difference of its operands on. With x the exact run's values and
    a = fp32(1 - beta1), b = fp32(beta2), c = fp32(1 - beta2), the same numbers in both runs:

        m = m + a (g - m)          E(m) = (1-a) E(m) + u (3 a |g-m| + 2 |m|)         difference 2u; product u, plain; sum 2u
        v = b v + (c g) g          E(v) = b E(v) + u (2 b v + c g g + 2 v)           b v 2u; (c g) g u, plain; c g the same
        d = sqrt(v) / q + eps      E(d) = E(v) / (sqrt(v) q) + u (4 sqrt(v) / q + 2 d)    |root x - root y| <= |x-y| / root y
        s = step m / d             E(s) = s E(m) / m + s E(d) / d + 4u |s|                step m: 2u, quotient: 2u
        w = w (1 - lr wd) - s      E(w) = (1 - lr wd) E(w) + 2u |w| (product) + E(s) + 2u |w| (difference)

    Products of errors are left out above. Every relative error here is below 12 u per step, so after T = 1000 steps these
    change a bound by a factor of at most (1 + 12 u)^T / (1 - 12 u T) < 1.01, which is multiplied in at the end.
    """
    n, lr, steps = 10_000, 1e-3, 1000
    rule, exact_rule = AdamW(), ExactAdamW()
    rng = np.random.default_rng(12)
    start = f32(0.02 * rng.standard_normal(n))
    plain, w = start.copy(), start.copy()
    moments = np.zeros((2, n), np.float32)
    m, v = np.zeros((2, n), np.float32)
    a, b, c = (float(np.float32(x)) for x in (1 - rule.betas[0], rule.betas[1], 1 - rule.betas[1]))
    E_m, E_v, E_w = np.zeros((3, n))
    gradients = Gradients(n, 12)
    for t in range(1, steps + 1):
        g = gradients.next()
        scalars = f32(rule.scalars(lr, t))
        plain *= scalars[0]
        rule.update_block(plain, g.copy(), moments, scalars, np)

        decay, step, q = map(float, scalars)
        old_m, old_v = m.astype(np.float64), v.astype(np.float64)
        w *= scalars[0]
        E_w = decay * E_w + 2 * U * abs(w)
        exact_rule.update_block(w, g.copy(), (m, v), scalars, np)
        g, M, V = g.astype(np.float64), abs(m.astype(np.float64)), v.astype(np.float64)
        E_m = (1 - a) * E_m + U * (3 * a * abs(g - old_m) + 2 * M)
        E_v = b * E_v + U * (2 * b * old_v + c * g * g + 2 * V)
        root = np.sqrt(V)
        d = root / q + rule.eps
        E_d = np.divide(E_v, root * q, out=np.zeros(n), where=V > 0) + U * (4 * root / q + 2 * d)
        E_s = step * E_m / d + step * M / d * (E_d / d + 4 * U)
        E_w += E_s + 2 * U * abs(w)
    assert v[v > 0].min() > 1e-30  # no underflow: every operation above has a relative error of at most u
    plain_64 = plain.astype(np.float64)
    report("AdamW", abs(plain_64 - w), 1.01 * E_w, plain_64 - start)


def test_distance_of_plain_sgd_from_exact_sgd() -> None:
    """As above, but simpler: fma(1, g, mu m) is a plain sum, so the momentum buffers have the same bits.

        w = w - lr m     E(w) = E(w) + u |lr m| + 2u |w|

    The product is rounded in the plain run only, the difference in both.
    """
    n, lr, steps = 10_000, 0.01, 1000
    rule, exact_rule = SGD(), ExactSGD()
    start = f32(0.02 * np.random.default_rng(13).standard_normal(n))
    plain, w = start.copy(), start.copy()
    m, exact_m = np.zeros((2, n), np.float32)
    E_w, gradients = np.zeros(n), Gradients(n, 13)
    for t in range(1, steps + 1):
        g = gradients.next()
        rule.update_block(plain, g.copy(), [m], f32(rule.scalars(lr, t)), np)
        exact_rule.update_block(w, g.copy(), [exact_m], f32(exact_rule.scalars(lr, t)), np)
        assert np.array_equal(m, exact_m)
        E_w += U * (lr * abs(m.astype(np.float64)) + 2 * abs(w.astype(np.float64)))
    plain_64 = plain.astype(np.float64)
    report("SGD", abs(plain_64 - w), 1.01 * E_w, plain_64 - start)
