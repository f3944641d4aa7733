"""nn.rope and nn.rope_scaling: rotary position embedding, forward and backward, and its angles."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import AMP, DTYPE, LOW, array, same_bits, wide
from bounds import ours
from derivatives import Call, check_derivative, draw, forward, normal_numbers
from op_calls import COS, INF, NAN, SIN, TINY, UNIFORM, bound, rounded_once, same
from torch_cases import SPECIAL_VALUES, Case, cases_of, check, rotated, same_kind, subnormal, tensor

from refimpl.errors import UsageError
from refimpl.nn.ops import OPS
from refimpl.nn.rope_scaling import RopeScaling, angles_at, cos_and_sin, inverse_frequencies, rotation
from refimpl.numerics.casts import cast, widen
from refimpl.precision.recipes import get_recipe

r = normal_numbers()
DEFAULT = RopeScaling.parse("default")

CALLS = [Call("rope", "four heads", (r(2, 5, 24), COS, SIN)), Call("rope", "one head", (r(2, 5, 6), COS, SIN))]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def test_a_pair_is_a_complex_number_that_is_multiplied_by_the_angle() -> None:
    x = draw(2, 5, 12)
    heads = x.reshape(2, 5, 2, 2, 3)
    turned = (heads[..., 0, :] + 1j * heads[..., 1, :]) * (COS + 1j * SIN)[:, None].astype(complex)
    expected = np.stack([turned.real, turned.imag], -2).reshape(x.shape)
    np.testing.assert_allclose(forward("rope", x, COS, SIN), expected, rtol=1e-12)


def test_scores_depend_on_the_distance_of_two_positions_alone() -> None:
    cos, sin = rotation(1e4, 16, DEFAULT, 0, 40)
    q, k = (np.broadcast_to(draw(1, 1, 16, seed=seed), (1, 40, 16)) for seed in (1, 2))
    q, k = forward("rope", q, cos, sin)[0], forward("rope", k, cos, sin)[0]
    for distance in (0, 1, 17):
        scores = np.sum(q[distance:] * k[: 40 - distance], -1)
        np.testing.assert_allclose(scores, scores[0], rtol=0, atol=40 * 2**-23 * np.abs(q[0]).sum() * np.abs(k).max())


POSITIONS = (255, 1000, 8191, 32767)
LARGEST_ERRORS = {
    # what is rounded, and to which format: the largest error of cos and sin at each of POSITIONS
    "nothing": (5.9e-6, 1.7e-5, 1.4e-4, 3.9e-4),
    "bf16 cos, sin": (1.9e-3, 2.0e-3, 1.9e-3, 1.9e-3),
    "fp16 cos, sin": (2.4e-4, 2.4e-4, 2.3e-4, 4.0e-4),
    "bf16 frequencies": (0.29, 1.1, 1.8, 1.9),
    "fp16 frequencies": (2.4e-2, 9.3e-2, 0.57, 1.9),
    "bf16 angles": (0.18, 1.4, 1.9, 1.8),
    "fp16 angles": (4.7e-2, 0.15, 0.94, 1.7),
    "bf16 positions, frequencies, angles": (0.19, 1.8, 1.9, 1.8),
}


@pytest.mark.parametrize("what", LARGEST_ERRORS)
def test_what_16_bits_do_to_the_angles(what: str) -> None:
    """Heads of width 64, theta 1e5, as in SmolLM2. Recipes of 16 bits round cos and sin; a cast of the whole model rounds
    frequencies, which is wrong by radians at far positions: as for no rotation at all."""
    fmt, _, rounded = what.partition(" ")

    def maybe(x: np.ndarray, name: str) -> np.ndarray:
        return widen(cast(x, fmt), "fp32") if name in rounded else x

    inverse = maybe(inverse_frequencies(1e5, 64, DEFAULT, 1), "frequencies")
    found = []
    for position in POSITIONS:
        if "positions" in rounded:
            angles = maybe(maybe(cast(np.array([[position]]) / 1, "fp32"), "positions") * inverse, "angles")
        else:
            angles = maybe(angles_at(position, position + 1, inverse), "angles")
        exact = position * 1e5 ** (-np.arange(32) / 32)
        tables = [maybe(table[0], "cos, sin") for table in cos_and_sin(angles, 1.0)]
        found.append(max(np.abs(table - f(exact)).max() for table, f in zip(tables, (np.cos, np.sin), strict=True)))
    assert [float(f"{error:.1e}") for error in found] == list(LARGEST_ERRORS[what])


@pytest.mark.parametrize("text", [
    "default", "linear,factor=4", "dynamic,factor=2,original=2048", "llama3,factor=32,low=1,high=4,original=8192",
    "yarn,factor=4,original=32768,beta_fast=32,beta_slow=1,attention_factor=0,truncate=1",
    "dynamic,factor=2.5,original=1048576",
])  # fmt: skip
def test_the_text_of_a_scaling_is_read_and_written(text: str) -> None:
    assert str(RopeScaling.parse(text)) == text


@pytest.mark.parametrize(("text", "says"), [
    ("longrope", "unknown rope scaling 'longrope': choose one of default, linear, dynamic, llama3, yarn"),
    ("linear", "rope scaling linear lacks factor: write linear,factor=..."),
    ("linear,factor=x", "rope scaling linear,factor=x: factor is 'x', and must be a number"),
    ("linear,factor=0", "rope scaling linear,factor=0: factor must be positive and finite"),
    ("linear,factr=2", "rope scaling linear has no setting 'factr': it has factor; did you mean factor?"),
    ("default,factor=2", "rope scaling default has no setting 'factor': it has none"),
    ("dynamic", "rope scaling dynamic lacks factor and original: write dynamic,factor=...,original=..."),
])  # fmt: skip
def test_a_wrong_scaling_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        RopeScaling.parse(text)
    assert str(error.value) == says


@pytest.mark.parametrize("position", [0, 255, 8191, 32767])
def test_angles_are_those_of_fp64_but_for_the_rounding_of_the_frequency_and_of_the_angle(position: int) -> None:
    exact = position * 1e5 ** (-np.arange(32) / 32)
    cos, sin = rotation(1e5, 64, DEFAULT, position, position + 1)
    # Roundings of a relative 2^-24: the power, the reciprocal and the angle (the exponents are exact); and the result's own.
    bound = 3 * 2**-24 * exact + 2**-24
    assert (np.abs(cos[0] - np.cos(exact)) <= bound).all() and (np.abs(sin[0] - np.sin(exact)) <= bound).all()


def test_the_fast_frequencies_of_llama3_stay_and_the_slow_ones_are_divided() -> None:
    plain = inverse_frequencies(5e5, 64, DEFAULT, 1)
    scaled = inverse_frequencies(5e5, 64, RopeScaling.parse("llama3,factor=32"), 1)
    turns = 8192 * plain / (2 * np.pi)
    assert (scaled[turns > 4] == plain[turns > 4]).all() and (scaled[turns < 1] == plain[turns < 1] / 32).all()
    between = (turns >= 1) & (turns <= 4)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 32).all()


def test_dynamic_changes_nothing_up_to_the_original_length() -> None:
    scaling = RopeScaling.parse("dynamic,factor=2,original=128")
    plain = inverse_frequencies(1e4, 32, DEFAULT, 1)
    assert (inverse_frequencies(1e4, 32, scaling, 128) == plain).all()
    assert inverse_frequencies(1e4, 2, scaling, 256) == [1]
    longer = inverse_frequencies(1e4, 32, scaling, 256)
    assert longer[0] == 1 and (longer[1:] < plain[1:]).all()


def test_yarn_multiplies_cos_and_sin() -> None:
    scaling = RopeScaling.parse("yarn,factor=4,original=32768")
    cos, sin = rotation(1e6, 64, scaling, 0, 3)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * np.log(4) + 1) ** 2, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------------- roundings


def rounded_pairs(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, fmt: str) -> np.ndarray:
    """The formula with its three roundings, on exact products: those of two 16-bit values have at most 22 bits."""
    a, b = np.split(x.reshape(*x.shape[:-1], -1, 6), 2, -1)
    c, s = cos[:, None], sin[:, None]

    def rounded(z: np.ndarray) -> np.ndarray:
        return wide(rounded_once(z, fmt))

    halves = rounded(rounded(a * c) - rounded(b * s)), rounded(rounded(b * c) + rounded(a * s))
    return np.concatenate(halves, -1).reshape(x.shape)


@pytest.mark.parametrize("fmt", LOW)
def test_each_product_is_rounded_and_their_sum_once_more_to_the_bit(fmt: str) -> None:
    x, dy = array(draw(2, 5, 24), fmt), array(draw(2, 5, 24, seed=2), fmt)
    cos, sin = (wide(array(table, fmt)) for table in (COS, SIN))
    p = bound(fmt, "rope")
    y, saved = OPS["rope"].forward(x, COS, SIN, p=p)
    assert same(y, rounded_pairs(wide(x), cos, sin, fmt))
    dx, *none = OPS["rope"].backward(dy, saved, p=p)
    assert same(dx, rounded_pairs(wide(dy), cos, -sin, fmt)) and none == [None, None]
    once = wide(x) * np.tile(cos, 8)[None]  # at position 0, where the angles are 0, nothing is rounded
    assert same(y[:, 0], once[:, 0]) and same(y[:, 0], x[:, 0])


@pytest.mark.parametrize(("recipe", "low"), AMP.items())
def test_under_autocast_angles_and_results_are_in_fp32_and_gradients_in_the_format_of_x(recipe: str, low: str) -> None:
    x, dy = array(draw(2, 5, 24), low), array(draw(2, 5, 24, seed=2), "fp32")
    p = bound(recipe, "rope")
    y, saved = OPS["rope"].forward(x, COS, SIN, p=p)
    assert y.dtype == np.float32 and same(y, rounded_pairs(wide(x), wide(COS), wide(SIN), "fp32"))
    dx, *_ = OPS["rope"].backward(dy, saved, p=p)
    assert dx.dtype == DTYPE[low] and saved[0] is COS and saved[1] is SIN
    expected = rounded_pairs(wide(dy), wide(COS), -wide(SIN), low)
    # A product of two FP32 numbers is rounded to FP32 before it is rounded to 16 bits, so a few may fall the other way.
    assert (wide(dx) == expected).mean() > 0.99


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_inf_and_nan_reach_their_pair_alone(fmt: str, bad: float) -> None:
    x = array(draw(1, 5, 12), fmt)
    clean, _ = OPS["rope"].forward(x, COS, SIN, p=bound(fmt, "rope"))
    x[0, 2, 1] = bad  # position 2, head 0, the first of pair 1
    y, _ = OPS["rope"].forward(x, COS, SIN, p=bound(fmt, "rope"))
    assert not np.isfinite(wide(y[0, 2, [1, 4]])).any()
    y[0, 2, [1, 4]] = clean[0, 2, [1, 4]]
    assert same_bits(y, clean)


@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormals_are_numbers(fmt: str) -> None:
    tiny, half = TINY[fmt], (array([[0.5]], "fp32"), array([[0.5]], "fp32"))
    y, _ = OPS["rope"].forward(array([[[2 * tiny, 6 * tiny]]], fmt), *half, p=bound(fmt, "rope"))
    assert same(y, [[[-2 * tiny, 4 * tiny]]])


@pytest.mark.usefixtures("ieee")
def test_a_sum_beyond_the_largest_fp16_is_an_infinity() -> None:
    tables = array([[0.75]], "fp32"), array([[-0.75]], "fp32")
    y, _ = OPS["rope"].forward(array([[[60000.0, 60000.0]]], "fp16"), *tables, p=bound("fp16", "rope"))
    assert same(y, [[[INF, 0]]])


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormal_operands_as_pytorch(fmt: str) -> None:
    check(subnormal("rope", fmt))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_special_values_as_pytorch(fmt: str) -> None:
    values = array(SPECIAL_VALUES, fmt)
    x = np.array(np.meshgrid(values, values)).reshape(2, 1, -1).T.astype(DTYPE[fmt])  # (pairs, 1, 2): positions are examples
    cos, sin = (array([[np.float32(value)]], "fp32") for value in (0.6, 0.8))
    dy = array(np.ones(x.shape), fmt)
    with np.errstate(all="ignore"):
        y, (dx, *_) = ours(get_recipe(fmt).policy, "rope", [x, cos, sin], dy)
    leaf = tensor(x).requires_grad_(True)
    z = rotated(leaf, *(tensor(table, fmt) for table in (cos, sin)))
    z.backward(tensor(dy))
    same_kind(y, z, "y", identical=True)
    same_kind(dx, leaf.grad, "dx", identical=True)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("rope")], ids=str)
def test_forward_and_backward_agree(case: Case) -> None:
    check(case)


HF = [
    ("default", 1e5, 64, {"rope_type": "default"}),
    ("default", 1e6, 128, {"rope_type": "default"}),
    ("linear,factor=4", 1e5, 64, {"rope_type": "linear", "factor": 4.0}),
    ("llama3,factor=32", 5e5, 64, {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}),
    ("yarn,factor=4,original=32768", 1e6, 128, {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    ("dynamic,factor=2,original=128", 1e4, 64, {"rope_type": "dynamic", "factor": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "theta", "D", "parameters"), HF, ids=[case[0] for case in HF])
def test_frequencies_are_those_of_transformers(text: str, theta: float, D: int, parameters: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": theta, **parameters}
    config = transformers.LlamaConfig(
        hidden_size=2 * D, num_attention_heads=2, max_position_embeddings=128, rope_parameters=rope
    )
    kind = str(parameters["rope_type"])
    for longest in (100, 300):
        if kind == "default":
            theirs, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=longest)
        scaling = RopeScaling.parse(text)
        ours = inverse_frequencies(theta, D, scaling, longest)
        assert factor == scaling.attention_factor and ours.dtype == np.float32
        # PyTorch's FP32 powers err by up to an ulp; each further operation of a scaling rounds once more.
        np.testing.assert_array_max_ulp(ours, theirs.numpy(), maxulp=2)
