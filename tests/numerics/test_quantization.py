"""numerics.quantization: codes against torch, gfloat, ONNX, and torchao's rules rewritten in torch; scales against rules of the
sources, worked examples and shares that are derived; products against fp64, torch's scaled product and sums written out.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from refimpl.numerics.accumulators import matmul
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.philox import random_bits
from refimpl.numerics.quantization.fp8 import (
    DelayedScaling,
    quantize_blocks,
    quantize_rows,
    quantize_tensor,
    quantize_tiles,
    scale_from_amax,
)
from refimpl.numerics.quantization.mx import SCALE_RULES, quantize_mx
from refimpl.numerics.quantization.nvfp4 import quantize_nvfp4
from refimpl.numerics.quantization.products import product
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, block_amax, encode, spread
from refimpl.numerics.quantization.rotation import hadamard, random_signs, rotate, rotate_back

Array = np.ndarray
ELEMENTS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
ONE = np.ones((1,), np.float32)


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Array:
    return cast(np.random.default_rng(seed).standard_normal(shape) * std, "fp32")


def fp32(*values: float) -> Array:
    return np.array(values, np.float32)


def values_of(fmt: str) -> Array:
    """All finite values of a small format, once each, in order: fp64."""
    codes = np.arange(1 << FORMATS[fmt].bits, dtype=np.uint8)
    values = widen(from_bits(codes, fmt), "fp64")
    return np.unique(values[np.isfinite(values)])


def boundaries(fmt: str) -> Array:
    """Every value of the format, every midpoint, the fp32 neighbors of all these, and what lies beyond: fp32."""
    values = values_of(fmt)
    step = values[-1] - values[-2]
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, [values[-1] + step / 2, values[-1] + step, 1e9]])
    points = cast(np.concatenate([points, -points]), "fp32")
    return np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])


# ------------------------------------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("fmt", ELEMENTS)
def test_every_code_decodes_and_encodes_to_itself(fmt: str) -> None:
    codes = np.arange(1 << FORMATS[fmt].bits, dtype=np.uint8)
    values = widen(from_bits(codes, fmt), "fp32")
    number = np.isfinite(values)
    assert np.array_equal(encode(values, ONE, (values.size,), fmt)[number], codes[number])


@pytest.mark.parametrize("fmt", ELEMENTS)
def test_encode_is_the_nearest_value_ties_to_even(fmt: str) -> None:
    """By search: the value with the smallest distance; of two, the one with the even code."""
    x, row = boundaries(fmt), FORMATS[fmt]
    codes = np.arange(1 << row.bits, dtype=np.uint8)
    values = widen(from_bits(codes, fmt), "fp64")
    codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
    distance = np.abs(widen(x, "fp64")[:, None] - values)
    distance = np.where(np.signbit(x)[:, None] == np.signbit(values), distance, np.inf)
    order = np.lexsort((np.broadcast_to(codes & 1, distance.shape), distance), axis=-1)
    assert np.array_equal(encode(x, ONE, x.shape, fmt), codes[order[:, 0]])


@pytest.mark.parametrize("fmt", ELEMENTS)
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
def test_encode_is_gfloats(fmt: str, overflow: str) -> None:
    gfloat, formats = pytest.importorskip("gfloat"), pytest.importorskip("gfloat.formats")
    info = getattr(formats, f"format_info_ocp_{fmt}")
    x = boundaries(fmt)
    if overflow == "inf" and FORMATS[fmt].specials == "none":  # gfloat refuses to name a result; ours is the largest value
        overflow = "saturate"
        assert np.array_equal(encode(x, ONE, x.shape, fmt, "inf"), encode(x, ONE, x.shape, fmt))
    rounded = gfloat.round_ndarray(info, widen(x, "fp64"), sat=overflow == "saturate")
    expected = gfloat.encode_ndarray(info, rounded)
    number = ~np.isnan(rounded)
    ours = encode(x, ONE, x.shape, fmt, overflow)
    assert np.array_equal(ours[number], expected[number])
    assert np.isnan(widen(from_bits(ours, fmt), "fp32"))[~number].all()


def test_encode_is_torchs() -> None:
    """torch 2.13 saturates e4m3, and e5m2 overflows to infinity: two conventions in one library."""
    torch = pytest.importorskip("torch")
    for fmt, name, overflow in (("e4m3", "float8_e4m3fn", "saturate"), ("e5m2", "float8_e5m2", "inf")):
        x = np.concatenate([boundaries(fmt), fp32(np.inf, -np.inf)])
        expected = torch.from_numpy(x).to(getattr(torch, name)).view(torch.uint8).numpy()
        assert np.array_equal(encode(x, ONE, x.shape, fmt, overflow), expected)


def onnx_cases() -> Iterator[tuple[str, str, Array, Array, int, Array]]:
    """ONNX's cases of QuantizeLinear to a float format: name, format, x, scale, axis, expected values in fp32."""
    onnx = pytest.importorskip("onnx")
    case = importlib.import_module("onnx.backend.test.case.node")
    importlib.import_module("onnx.backend.test.case.node.quantizelinear")
    formats = {"FLOAT8E4M3FN": "e4m3", "FLOAT8E5M2": "e5m2", "FLOAT4E2M1": "e2m1"}
    for found in case._NodeTestCases:
        node = found.model.graph.node[0]
        target = onnx.TensorProto.DataType.Name(found.model.graph.output[0].type.tensor_type.elem_type)
        if node.op_type == "QuantizeLinear" and target in formats:
            ((x, scale, *_), (y,)) = found.data_sets[0]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            expected = onnx.numpy_helper.to_array(y) if isinstance(y, onnx.TensorProto) else y
            yield found.name, formats[target], x, np.asarray(scale), attributes.get("axis", 1), widen(expected, "fp32")


def test_onnxs_cases_of_quantizelinear() -> None:
    seen = set()
    for name, fmt, x, scale, axis, expected in onnx_cases():
        block = list(x.shape)
        if scale.ndim:
            block[axis] = 1
        factors = (1 / scale).reshape([1 if size > 1 else n for n, size in zip(x.shape, block, strict=True)])
        codes = encode(x, factors, tuple(block), fmt)
        assert np.array_equal(widen(from_bits(codes, fmt), "fp32"), expected), name
        seen.add(fmt)
    assert seen == {"e4m3", "e5m2", "e2m1"}


# ----------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("shape", "block"),
    [((6, 8), (6, 8)), ((6, 8), (1, 8)), ((6, 8), (6, 1)), ((5, 70), (1, 32)), ((70, 5), (32, 1)), ((130, 140), (128, 128)),
     ((3, 5, 33), (1, 1, 16)), ((7,), (3,)), ((4, 4), (1, 1))],
)  # fmt: skip
def test_block_amax_and_spread_are_loops_over_blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = normal(*shape)
    amax = block_amax(x, block)
    assert amax.shape == tuple(math.ceil(n / size) for n, size in zip(shape, block, strict=True))
    everywhere = np.broadcast_to(spread(amax, block, shape), shape)
    for place in np.ndindex(amax.shape):
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, block, strict=True))
        assert amax[place] == np.abs(x[part]).max()
        assert (everywhere[part] == amax[place]).all()


QUANTIZERS: dict[str, Callable[[Array], QuantizedTensor]] = {
    "tensor": lambda x: quantize_tensor(x, "e4m3"),
    "rows": lambda x: quantize_rows(x, "e4m3"),
    "tiles": lambda x: quantize_tiles(x, "e4m3"),
    "blocks": lambda x: quantize_blocks(x, "e4m3"),
    "mx": lambda x: quantize_mx(x, "e4m3"),
    "mx fp4": lambda x: quantize_mx(x, "e2m1", rule="rceil"),
    "nvfp4": quantize_nvfp4,
    "nvfp4 square": lambda x: quantize_nvfp4(x, square=True),
    "delayed": lambda x: DelayedScaling("e5m2", 4).quantize(x),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(0, 40), (40, 0), (0, 0)])
def test_empty_tensors(name: str, shape: tuple[int, int]) -> None:
    q = QUANTIZERS[name](np.zeros(shape, np.float32))
    assert q.codes.shape == q.dequantize().shape == shape
    assert math.isnan(q.bits_per_value)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zeros_stay_zeros(name: str) -> None:
    q = QUANTIZERS[name](np.zeros((20, 40), np.float32))
    assert not q.codes.any() and np.isfinite(q.scale_values()).all() and not q.dequantize().any()


@pytest.mark.parametrize("name", [n for n in QUANTIZERS if n != "delayed"])
def test_zero_padding_of_the_last_block_changes_nothing(name: str) -> None:
    x = normal(33, 135)
    padded = np.zeros((256, 256), np.float32)
    padded[:33, :135] = x
    q, p = QUANTIZERS[name](x), QUANTIZERS[name](padded)
    assert np.array_equal(q.codes, p.codes[:33, :135])
    assert np.array_equal(q.scales, p.scales[tuple(slice(n) for n in q.scales.shape)])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_sixteen_bit_tensors_are_widened_and_fp64_is_refused(name: str) -> None:
    x = cast(normal(20, 40), "bf16")
    assert np.array_equal(QUANTIZERS[name](x).codes, QUANTIZERS[name](widen(x, "fp32")).codes)
    with pytest.raises(TypeError, match="would round"):
        QUANTIZERS[name](np.zeros((20, 40)))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_transposing_dequantizes_to_the_transpose(name: str) -> None:
    q = QUANTIZERS[name](normal(20, 135))
    assert np.array_equal(q.T.dequantize(), q.dequantize().T)
    assert q.T.T.block == q.block


def test_the_ledger() -> None:
    x = normal(64, 256)
    n = x.size
    for q, packed, bits in (
        (quantize_tensor(x, "e4m3"), n + 4, 8 + 32 / n),
        (quantize_tiles(x, "e4m3"), n + 64 * 2 * 4, 8.25),
        (quantize_mx(x, "e4m3"), n + n // 32, 8.25),
        (quantize_mx(x, "e2m3"), n * 3 // 4 + n // 32, 6.25),
        (quantize_mx(x, "e2m1"), n // 2 + n // 32, 4.25),
        (quantize_nvfp4(x), n // 2 + n // 16 + 4, 4.5 + 32 / n),
    ):
        assert (q.nbytes_packed, q.bits_per_value) == (packed, bits)
        assert q.codes.dtype == np.uint8 and q.nbytes == n + packed - math.ceil(n * FORMATS[q.fmt].bits / 8)
    assert quantize_mx(normal(3, 3), "e2m1").nbytes_packed == 5 + 3  # 9 codes of half a byte


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_elements_are_the_values_of_the_codes_in_their_memory_order(fmt: str) -> None:
    codes, one = np.arange(256, dtype=np.uint8).reshape(32, 8), np.ones((1, 1), np.float32)
    q = QuantizedTensor(codes, fmt, one, "fp32", codes.shape)
    expected = widen(from_bits(codes, fmt), "fp32")
    np.testing.assert_array_equal(bits_of(q.elements()), bits_of(expected))  # NaN and -0 too
    np.testing.assert_array_equal(bits_of(q.T.elements()), bits_of(expected).T)
    assert q.elements().flags.c_contiguous and q.T.elements().flags.f_contiguous  # a BLAS may sum the other in another order
    every_other = QuantizedTensor(codes[:, ::2], fmt, one, "fp32", (32, 4))
    np.testing.assert_array_equal(every_other.elements(), expected[:, ::2])


def test_dequantize_multiplies_the_elements_by_their_scales() -> None:
    x = normal(20, 135)
    for name, quantize in QUANTIZERS.items():
        q = quantize(x)
        exact = widen(q.elements(), "fp64") * spread(widen(q.scale_values(), "fp64"), q.block, q.shape)
        exact = exact if q.tensor_scale is None else exact * widen(q.tensor_scale, "fp64")
        assert np.array_equal(q.dequantize("fp64"), exact), name
        assert np.abs(q.dequantize() - exact).max() <= 2 * 2.0**-24 * np.abs(exact).max(), name
        assert np.array_equal(bits_of(q.dequantize("bf16")), bits_of(cast(q.dequantize(), "bf16")))


# -------------------------------------------------------------------------------------------------------------- fp8 scales


def te_factor(amax: float, largest: float, power_of_two: bool, eps: float) -> float:
    """Transformer Engine's compute_scale_from_amax for one number, in Python."""
    amax = max(amax, eps) if not math.isnan(amax) else amax
    if math.isinf(amax) or amax == 0 or math.isnan(amax):
        return 1.0
    with np.errstate(over="ignore"):
        factor = float(np.float32(largest) / np.float32(amax))
    factor = min(factor, float(np.finfo(np.float32).max))
    return math.ldexp(1.0, math.frexp(factor)[1] - 1) if power_of_two else factor


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_the_factor_is_transformer_engines(fmt: str, power_of_two: bool, eps: float) -> None:
    amax = np.concatenate(
        [np.abs(normal(1000, std=100.0)), fp32(0, np.inf, np.nan, 1e-45, 1e-38, 3.4e38, 448, 449, 57344, 1e-4)]
    )
    expected = [te_factor(float(a), FORMATS[fmt].max, power_of_two, float(np.float32(eps))) for a in amax]
    assert np.array_equal(scale_from_amax(amax, fmt, power_of_two, eps), expected)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_the_largest_magnitude_becomes_the_largest_value(fmt: str) -> None:
    x = normal(40, 300)
    for q in (
        quantize_tensor(x, fmt),
        quantize_rows(x, fmt, power_of_two=False),
        quantize_tiles(x, fmt),
        quantize_blocks(x, fmt),
    ):
        assert (block_amax(q.elements(), q.block) == FORMATS[fmt].max).all()
    for q in (quantize_tensor(x, fmt, power_of_two=True), quantize_rows(x, fmt), quantize_tiles(x, fmt, power_of_two=True)):
        largest = block_amax(q.elements(), q.block)
        assert (largest > FORMATS[fmt].max / 2 * 0.9).all() and (np.frexp(q.scales)[0] == 0.5).all()


def test_shapes_of_the_fp8_schemes() -> None:
    x = normal(130, 300)
    for q, block, scales in (
        (quantize_tensor(x, "e4m3"), (130, 300), (1, 1)),
        (quantize_rows(x, "e4m3"), (1, 300), (130, 1)),
        (quantize_rows(x, "e4m3", axis=0), (130, 1), (1, 300)),
        (quantize_tiles(x, "e4m3"), (1, 128), (130, 3)),
        (quantize_tiles(x, "e4m3", axis=0), (128, 1), (2, 300)),
        (quantize_blocks(x, "e4m3"), (128, 128), (2, 3)),
    ):
        assert (q.block, q.scales.shape, q.scales.dtype) == (block, scales, np.float32)


def test_fp8_of_a_block_is_torchs_division_and_cast() -> None:
    torch = pytest.importorskip("torch")
    x = normal(256, 256)
    q = quantize_blocks(x, "e4m3")
    for i, j in np.ndindex(2, 2):
        part = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        t = torch.from_numpy(x[part].copy())
        factor = torch.tensor(448.0) / t.abs().max()
        assert np.array_equal(q.codes[part], (t * factor).to(torch.float8_e4m3fn).view(torch.uint8).numpy())
        assert q.scales[i, j] == (1 / factor).item()


def test_nan_and_infinities_under_fp32_scales() -> None:
    x = fp32(1.0, np.nan, -np.inf, 2.0)
    q = quantize_tensor(x, "e4m3")
    assert q.scales[0] == 1 and np.array_equal(q.dequantize(), fp32(1, np.nan, -448, 2), equal_nan=True)
    assert np.isnan(quantize_tensor(x, "e4m3", overflow="inf").dequantize()[2])
    assert quantize_tensor(x, "e5m2", overflow="inf").dequantize()[2] == -np.inf
    rows = quantize_rows(np.stack([x, fp32(1, 2, 3, 4)]), "e4m3")
    assert rows.scales[0, 0] == 1 and rows.dequantize()[1, 3] == 4  # the others do not see it


def test_narrow_formats_with_fp32_scales_are_refused() -> None:
    for make in (lambda: quantize_tensor(ONE, "e2m1"), lambda: DelayedScaling("e3m2")):
        with pytest.raises(ValueError, match="e4m3 or e5m2"):
            make()
    with pytest.raises(ValueError, match="not an element format"):
        encode(ONE, ONE, (1,), "bf16")


# --------------------------------------------------------------------------------------------------------- delayed scaling


def test_delayed_scaling_by_hand() -> None:
    """History 3, e4m3: [step's place, oldest, newest]."""
    s = DelayedScaling("e4m3", history_length=3)
    factors, histories = [], []
    for amax in (2.0, 8.0, 4.0, 1.0, 1.0, 1.0):
        s.quantize(fp32(-amax, amax / 2))
        s.update()
        factors.append(float(s.factor))
        histories.append(list(s.amax_history))
    assert factors == [224, 56, 56, 56, 112, 448]  # the largest of three steps, this one included
    assert histories == [[0, 0, 2], [0, 2, 8], [0, 8, 4], [0, 4, 1], [0, 1, 1], [0, 1, 1]]


def test_delayed_scaling_quantizes_with_the_factor_of_the_past() -> None:
    s = DelayedScaling("e4m3", 2)
    assert s.quantize(fp32(500.0)).dequantize()[0] == 448  # the first factor is 1
    s.update()
    assert float(s.factor) == float(np.float32(448) / np.float32(500))
    grown = s.quantize(fp32(1000.0, 250.0))
    assert grown.elements()[0] == 448 and grown.dequantize()[0] == pytest.approx(500)
    assert np.isnan(s.quantize(fp32(1000.0), overflow="inf").dequantize()[0])
    assert grown.scales.tolist() == [float(1 / s.factor)]


def test_margin_and_most_recent() -> None:
    s, recent = DelayedScaling("e5m2", 4, margin=2.0), DelayedScaling("e5m2", 4, amax_compute_algo="most_recent")
    for amax in (8.0, 2.0):
        for state in (s, recent):
            state.quantize(fp32(amax))
            state.update()
    assert float(s.factor) == 57344 / 4 / 8 and float(recent.factor) == 57344 / 2
    with pytest.raises(ValueError, match="amax_compute_algo"):
        DelayedScaling("e4m3", amax_compute_algo="mean")


def test_a_zero_or_infinite_amax_keeps_the_factor() -> None:
    s = DelayedScaling("e4m3", 2)
    for x, factor in ((0.0, 1), (2.0, 224), (np.inf, 224), (1.0, 224), (1.0, 448), (0.0, 448), (0.0, 448), (0.0, 448)):
        s.quantize(fp32(x))
        s.update()
        assert float(s.factor) == factor, x  # an infinity counts as long as the history holds it
    s.quantize(fp32(np.nan, 4.0))
    assert s.amax_history[0] == 4
    s.quantize(fp32(3.0))
    assert s.amax_history[0] == 4  # of two tensors in one step the larger
    s.update()
    assert float(s.factor) == 112
    tiny = DelayedScaling("e4m3", 1)
    tiny.quantize(fp32(1e-45))
    tiny.update()
    assert tiny.factor == np.finfo(np.float32).max


def test_delayed_scaling_goes_on_from_its_arrays() -> None:
    whole = DelayedScaling("e4m3", 5)
    for step in range(12):
        if step == 7:
            resumed = DelayedScaling("e4m3", 5, **{name: x.copy() for name, x in whole.arrays().items()})
        for s in (whole, resumed) if step >= 7 else (whole,):
            s.quantize(normal(10, seed=step))
            s.update()
    for name, x in whole.arrays().items():
        assert np.array_equal(x, resumed.arrays()[name]) and x.dtype == np.float32, name


# --------------------------------------------------------------------------------------------------------------------- MX


def to_mx(x: Array, fmt: str, rule: str) -> tuple[Array, Array]:
    """torchao's to_mx for blocks of 32 along the last axis, in torch's integers: scale codes, and x / X before the cast."""
    torch = pytest.importorskip("torch")
    row = FORMATS[fmt]
    t = torch.from_numpy(x).reshape(*x.shape[:-1], -1, 32)
    amax = t.abs().amax(-1, keepdim=True)
    top = math.frexp(row.max)[1] - 1
    if rule == "rceil":
        pattern = (amax * (1.0 / row.max)).view(torch.int32)
        biased, rest = pattern >> 23 & 0xFF, pattern & 0x7FFFFF
        code = biased + torch.where(biased == 0, rest > 0x400000, rest != 0).int()
    else:
        if rule == "even":
            amax = ((amax.view(torch.int32) + (1 << (22 - row.fraction_bits))) & ~0x7FFFFF).view(torch.float32)
        pattern = amax.view(torch.int32)
        exponent = (pattern >> 23 & 0xFF) - 127
        if rule == "ceil":
            exponent = exponent + ((pattern & 0x7FFFFF) > 0).int()
        code = (exponent - top).clamp(-127, 128) + 127
    code = torch.where(torch.isfinite(amax), code, 255)
    inverse = torch.where(code == 254, torch.tensor(2.0**-127), ((254 - code) << 23).view(torch.float32))
    return code.squeeze(-1).to(torch.uint8).numpy(), (t * inverse).reshape(x.shape).numpy()


def blocks_of_all_sizes(n: int = 3000) -> Array:
    """(n, 32): blocks of all binades of fp32, with largest magnitudes at, and beside, powers of two and format maxima."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((n, 32)) * np.exp2(rng.uniform(-145, 120, (n, 1)))
    x = cast(x, "fp32")
    edges = fp32(*(m * 2.0**e for m in (1.0, 1.5, 1.75, 1.875, 1.9375) for e in (-20, 0, 1, 100)))
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))])
    x[: edges.size] = edges[:, None] * rng.uniform(0, 1, (edges.size, 32)) // 1e-30 * 1e-30
    x[: edges.size, 0] = edges
    return x


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("fmt", ELEMENTS)
def test_mx_is_torchaos(fmt: str, rule: str) -> None:
    x = blocks_of_all_sizes()
    scales, scaled = to_mx(x, fmt, rule)
    q = quantize_mx(x, fmt, rule=rule)
    assert np.array_equal(q.scales, scales)
    assert np.array_equal(q.codes, bits_of(cast(scaled, fmt, overflow="saturate")))


@pytest.mark.parametrize("fmt", ["e4m3", "e2m1"])
def test_rceil_by_the_rounded_reciprocal_is_the_same_for_every_significand(fmt: str) -> None:
    """What quantize/mx.py says of torchao and Transformer Engine: all 2^23 amax of a binade."""
    largest = np.float32(FORMATS[fmt].max)
    amax = from_bits(np.arange(0x3F800000, 0x40000000, dtype=np.uint32), "fp32")
    m, k = np.frexp(amax * (np.float32(1) / largest))
    assert np.array_equal(SCALE_RULES["rceil"](amax, fmt), k - 1 + (m > 0.5))


@pytest.mark.parametrize("fmt", ELEMENTS)
def test_mx_floor_is_gfloats(fmt: str) -> None:
    gfloat, formats = pytest.importorskip("gfloat"), pytest.importorskip("gfloat.formats")
    info = {"e4m3": "mxfp8_e4m3", "e5m2": "mxfp8_e5m2", "e3m2": "mxfp6_e3m2", "e2m3": "mxfp6_e2m3", "e2m1": "mxfp4_e2m1"}[fmt]
    info = getattr(formats, f"format_info_{info}")
    x = normal(12, 32, std=3.0)
    x[3] = 0
    x[4, 5] = 1e-3
    expected = [gfloat.quantize_block(info, widen(block, "fp64"), gfloat.compute_scale_amax) for block in x]
    assert np.array_equal(quantize_mx(x, fmt).dequantize("fp64"), expected)


def test_mx_worked_examples() -> None:
    """amax 150, e4m3 (torchao #2035): floor 2^-1, ceil 2^0, rceil 2^-1; 300 = 150 / 2^-1 lies between 288 and 320."""
    x = np.zeros((1, 32), np.float32)
    x[0, 7] = 150
    for rule, exponent in (("floor", -1), ("ceil", 0), ("rceil", -1), ("even", -1)):
        q = quantize_mx(x, "e4m3", rule=rule)
        assert q.scales.tolist() == [[127 + exponent]] and q.scale_values()[0, 0] == 2.0**exponent
    assert quantize_mx(x, "e4m3").elements()[0, 7] == 288 and quantize_mx(x, "e4m3").dequantize()[0, 7] == 144
    # 1.9: floor saturates (1.9 * 256 = 486 > 448), rceil and ceil take the next power of two; 1.9375 rounds up, so even does
    for amax, exponents in (
        (1.9, (-8, -7, -7, -8)),
        (1.9375, (-8, -7, -7, -7)),
        (1.75, (-8, -7, -8, -8)),
        (1.0, (-8, -8, -8, -8)),
    ):
        x[0, 7] = amax
        assert [int(quantize_mx(x, "e4m3", rule=rule).scales[0, 0]) - 127 for rule in SCALE_RULES] == list(exponents), amax
    assert quantize_mx(np.full((1, 32), 1.9, np.float32), "e4m3").dequantize()[0, 0] == 448 * 2.0**-8
    with pytest.raises(KeyError):
        quantize_mx(x, "e4m3", rule="nearest")


def saturated(x: Array, fmt: str, rule: str) -> float:
    """The share of blocks whose largest magnitude is beyond the format's largest value."""
    q = quantize_mx(x, fmt, rule=rule)
    return float(np.mean(block_amax(x, q.block) / q.scale_values() > FORMATS[fmt].max))


@pytest.mark.parametrize(("fmt", "limit"), [("e4m3", 1.75), ("e5m2", 1.75), ("e3m2", 1.75), ("e2m3", 1.875), ("e2m1", 1.5)])
def test_floor_saturates_as_many_blocks_as_derived_and_the_ceilings_none(fmt: str, limit: float) -> None:
    """Under floor the largest element is s 2^emax, s the significand of amax, and it saturates where s > max / 2^emax.
    s even in [1, 2): a share of 2 - limit. amax log-uniform: log2(2 / limit). Within 4 standard errors."""
    n = 20_000
    rng = np.random.default_rng(1)
    exponents = rng.integers(-20, 20, n)
    for significands, share in ((rng.uniform(1, 2, n), 2 - limit), (np.exp2(rng.random(n)), math.log2(2 / limit))):
        amax = cast(np.ldexp(significands, exponents), "fp32")
        x = amax[:, None] * cast(rng.uniform(-1, 1, (n, 32)), "fp32")
        x[np.arange(n), rng.integers(0, 32, n)] = amax
        assert abs(saturated(x, fmt, "floor") - share) < 4 * math.sqrt(share * (1 - share) / n)
        assert saturated(x, fmt, "rceil") == saturated(x, fmt, "ceil") == 0


def test_floor_saturates_a_fifth_of_normal_blocks_more_or_less() -> None:
    """Normal values: the largest of 32 lies within some two binades, so that the share depends on the tensor's scale. Averaged
    over the scales of a binade it is the log-uniform one, log2(2 / 1.75) = 19 %."""
    shares = [saturated(normal(4000, 32, std=2 ** (i / 16)), "e4m3", "floor") for i in range(16)]
    assert np.mean(shares) == pytest.approx(math.log2(2 / 1.75), abs=0.01)
    assert max(shares) > 0.25 and min(shares) < 0.12


@pytest.mark.parametrize("rule", ["ceil", "rceil"])
def test_headroom_lost(rule: str) -> None:
    """log2(max X / amax) for e4m3 and significands s even in [1, 2), of which the mean log2 is 2 - 1 / ln 2 = 0.557.

    ceil: X is the power of two above s, 2^-7: log2(448 / 128) - log2 s, on average 1.25.
    rceil: log2(1.75 / s) up to 1.75, one more for the quarter above it: on average 0.50.
    """
    s = 1 + (np.arange(1 << 16) + 0.5) / (1 << 16)
    x = cast(s, "fp32")[:, None] * np.ones((1, 32), np.float32)
    headroom = np.log2(448 * widen(quantize_mx(x, "e4m3", rule=rule).scale_values()[:, 0], "fp64") / s)
    mean = math.log2(1.75) - (2 - 1 / math.log(2)) + {"ceil": 1.0, "rceil": 0.25}[rule]
    assert headroom.min() >= 0 and headroom.mean() == pytest.approx(mean, abs=1e-4)
    assert round(mean, 2) == {"ceil": 1.25, "rceil": 0.50}[rule]


def test_error_of_the_largest_element_of_a_block() -> None:
    """Half an ulp of e4m3 is at most 1/17 of the value: all that is lost under rceil. floor clips 512 to 448: up to 1/8."""
    s = cast(np.linspace(1, 2, 1 << 14, endpoint=False), "fp32")[:, None] * np.ones((1, 32), np.float32)
    for rule, worst in (("rceil", 1 / 17), ("ceil", 1 / 17), ("even", 1 - 1.75 / 1.9375), ("floor", 1 / 8)):
        error = np.abs(quantize_mx(s, "e4m3", rule=rule).dequantize() / s - 1)
        assert worst * 0.99 < error.max() <= worst * 1.001, rule


def test_mx_at_the_ends_of_the_range() -> None:
    x = np.zeros((5, 32), np.float32)
    x[1, 0], x[2, 0] = 1e-45, np.finfo(np.float32).max
    x[3, :2], x[4, :2] = (np.nan, 1), (np.inf, 1)
    for fmt in ELEMENTS:
        for rule in SCALE_RULES:
            q = quantize_mx(x, fmt, rule=rule)
            assert q.scales[:2, 0].tolist() == [0, 0] and q.scales[3:, 0].tolist() == [255, 255]
            assert FORMATS[fmt].specials != "none" or not q.codes[3:].any()
            values = q.dequantize("fp64")
            assert not values[0].any() and np.isnan(values[3:]).all()  # the block as a whole
            assert values[2, 0] >= 1.5 * 2.0**127  # e2m1 under floor: 6 * 2^125
    assert not np.isnan(quantize_mx(x, "e2m1").dequantize()[:3]).any()


def test_blocks_lie_along_the_axis_that_is_asked_for() -> None:
    x = normal(64, 96) * np.exp2(np.arange(64))[:, None].astype(np.float32)
    by_row, by_column = quantize_mx(x, "e4m3", axis=1), quantize_mx(x, "e4m3", axis=0)
    assert (by_row.block, by_row.scales.shape) == ((1, 32), (64, 3))
    assert quantize_mx(x[:, :7], "e4m3").block == (1, 7)
    assert (by_column.block, by_column.scales.shape) == ((32, 1), (2, 96))
    assert np.array_equal(by_column.codes, quantize_mx(np.ascontiguousarray(x.T), "e4m3").codes.T)
    # The two copies differ, so neither can be had from the other.
    assert not np.array_equal(by_row.dequantize(), by_column.dequantize())
    with pytest.raises(IndexError):
        quantize_mx(x, "e4m3", axis=2)


# ------------------------------------------------------------------------------------------------------------------ NVFP4


def te_nvfp4(x: Array) -> tuple[float, Array, Array]:
    """Transformer Engine's NVFP4 of blocks of 16 along the last axis, in torch: 1 / S_enc, codes of S_block, factors."""
    torch = pytest.importorskip("torch")
    t = torch.from_numpy(x).reshape(len(x), -1, 16)
    s_enc = torch.tensor(448.0 * 6.0) / t.abs().max()
    s_block = (t.abs().amax(-1) * (s_enc * torch.tensor(1 / 6.0))).to(torch.float8_e4m3fn)
    factors = torch.clamp(1 / (s_block.float() * (1 / s_enc)), max=torch.finfo(torch.float32).max)
    return (1 / s_enc).item(), s_block.view(torch.uint8).numpy(), factors.numpy()


def around(x: Array) -> Array:
    """Each value and three fp32 neighbors on either side: where one rounding more, or in another order, would be seen."""
    return np.concatenate([from_bits(bits_of(x) + np.uint32(i) - np.uint32(3), "fp32") for i in range(7)])


@pytest.mark.parametrize("amax", [1.0, 3.7, 0.0123, 519.3])
def test_nvfp4_is_transformer_engines_arithmetic_at_every_tie(amax: float) -> None:
    """Blocks whose scale lies at a tie of e4m3, or next to it; then elements that lie at a tie of e2m1, or next to it."""
    scales, elements = values_of("e4m3"), values_of("e2m1")
    ties = (scales[1:] + scales[:-1])[scales[1:] > 2**-6] / 2
    largest = around(cast(ties * amax / 448, "fp32"))
    x = np.zeros((largest.size + 1, 16), np.float32)
    x[:, 0] = np.append(largest, np.float32(amax))
    s_dec, codes, factors = te_nvfp4(x)
    positive = (elements[1:] + elements[:-1])[elements[1:] > 0] / 2
    near = around(cast(positive, "fp32"))
    for i in range(1, 16):
        x[:, i] = near[(np.arange(len(x)) + 5 * i) % near.size] / factors[:, 0]
    x[:, 1:] = np.minimum(x[:, 1:], x[:, :1])  # the largest of the block stays the largest
    q = quantize_nvfp4(x)
    assert q.tensor_scale == np.float32(s_dec) and np.array_equal(q.scales, codes)
    assert np.array_equal(q.codes, bits_of(cast(x * factors, "e2m1", overflow="saturate")))


def test_nvfp4_is_transformer_engines_arithmetic() -> None:
    x = normal(50, 64) * np.exp2(np.random.default_rng(1).uniform(-14, 3, (50, 1))).astype(np.float32)
    s_dec, codes, factors = te_nvfp4(x)
    q = quantize_nvfp4(x)
    assert (q.scale_fmt, q.block, q.tensor_scale) == ("e4m3", (1, 16), s_dec)
    assert np.array_equal(q.scales, codes)
    assert np.array_equal(q.codes, bits_of(cast(x * np.repeat(factors, 16, 1), "e2m1", overflow="saturate")))


def test_nvfp4_by_hand() -> None:
    """amax 2688 = 448 * 6: S_enc is 1. Blocks with amax 2688, 12 and 1: S_block 448, 2, e4m3(1/6) = 0.171875."""
    x = np.zeros((1, 48), np.float32)
    x[0, :3], x[0, 16:19], x[0, 32] = (2688, 1344, 200), (12, 2.9, -5.1), 1.0
    q = quantize_nvfp4(x)
    assert q.tensor_scale == 1 and q.scale_values().tolist() == [[448, 2, 0.171875]]
    assert q.elements()[0, :3].tolist() == [6, 3, 0.5] and q.elements()[0, 16:19].tolist() == [6, 1.5, -3]  # 1.45, -2.55
    assert q.elements()[0, 32] == 6 and q.dequantize()[0, 32] == 6 * 0.171875  # 1 / 0.171875 = 5.8


def test_nvfp4_square_blocks_are_the_same_for_both_axes() -> None:
    x = normal(40, 70)
    q = quantize_nvfp4(x, square=True)
    assert (q.block, q.scales.shape) == ((16, 16), (3, 5))
    other = quantize_nvfp4(np.ascontiguousarray(x.T), square=True)
    assert np.array_equal(q.T.codes, other.codes) and np.array_equal(q.T.scales, other.scales)
    assert not np.array_equal(quantize_nvfp4(x, axis=0).codes, quantize_nvfp4(x, axis=1).codes)


def test_nvfp4_at_the_ends() -> None:
    x = np.zeros((1, 96), np.float32)
    x[0, 0], x[0, 16], x[0, 32], x[0, 48], x[0, 64] = 1.0, 1e-8, np.nan, np.inf, 0.5
    q = quantize_nvfp4(x)
    values = q.dequantize()[0]
    assert values[0] == pytest.approx(1) and values[64] == pytest.approx(0.5, rel=0.07)
    assert not values[16:32].any() and not values[80:].any()  # too small for its scale: zero
    assert np.isnan(values[32:64]).all()
    tiny = quantize_nvfp4(fp32(*[1e-45] * 16))
    assert np.isfinite(tiny.dequantize()).all() and tiny.tensor_scale > 0


# ------------------------------------------------------------------------------------------------------------- stochastic


def test_stochastic_elements_are_unbiased_where_nearest_ones_are_not() -> None:
    """0.3 with a scale of 1, set by a 6 in each block, is 0 or 0.5; to nearest it is always 0.5."""
    x = np.full((1 << 14, 32), 0.3, np.float32)
    x[:, ::16] = 6
    small = x[0] < 1
    bits = random_bits(0, 0, 0, x.size).reshape(x.shape)
    for quantize in (lambda x, bits=None: quantize_mx(x, "e2m1", bits=bits), quantize_nvfp4):
        q = quantize(x, bits=bits)
        assert (q.elements()[:, ::16] == 6).all()
        values = q.dequantize("fp64")[:, small]
        assert np.unique(q.elements()[:, small]).tolist() == [0, 0.5]
        assert abs(values.mean() - 0.3) < 4 * 0.5 * math.sqrt(0.6 * 0.4 / values.size)
        assert quantize(x).dequantize()[:, small].mean() == pytest.approx(0.5)
    grads = normal(64, 256)
    for quantize in (quantize_tensor, quantize_rows, quantize_tiles, quantize_blocks):
        q = quantize(grads, "e5m2", bits=random_bits(0, 0, 0, grads.size).reshape(grads.shape))
        assert not np.array_equal(q.codes, quantize(grads, "e5m2").codes)
        assert np.array_equal(q.scales, quantize(grads, "e5m2").scales)


# --------------------------------------------------------------------------------------------------------------- products

PAIRS: dict[str, tuple[Callable[[Array], QuantizedTensor], Callable[[Array], QuantizedTensor]]] = {
    **{name: (QUANTIZERS[name], QUANTIZERS[name]) for name in QUANTIZERS if name != "delayed"},
    "deepseek": (QUANTIZERS["tiles"], QUANTIZERS["blocks"]),
    "tensor, rows": (QUANTIZERS["tensor"], QUANTIZERS["rows"]),
    "mx, tiles": (QUANTIZERS["mx"], QUANTIZERS["tiles"]),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("K", [300, 128, 7, 1, 0])
def test_a_product_is_that_of_the_dequantized_matrices(name: str, K: int) -> None:
    """Products of codes are exact; there are K sums, and 3 roundings for each block: gamma_(K+3) of the sum of |a||b|, fp32."""
    first, second = PAIRS[name]
    a, b = first(normal(35, K)), second(normal(21, K, seed=1)).T
    exact = a.dequantize("fp64") @ b.dequantize("fp64")
    bound = (K + 5) * 2.0**-24 * (np.abs(a.dequantize("fp64")) @ np.abs(b.dequantize("fp64")))
    result = product(a, b)
    assert result.dtype == np.float32 and result.shape == (35, 21)
    assert (np.abs(result - exact) <= bound).all()


def test_deepseeks_product_is_its_sum_over_blocks_of_128() -> None:
    x, w = normal(5, 300), normal(140, 300, seed=1)
    a, b = quantize_tiles(x, "e4m3"), quantize_blocks(w, "e4m3")
    for acc in ("fp32", "e8m13", "bf16"):
        expected = np.zeros((5, 140), np.float32)
        for i, k in enumerate(range(0, 300, 128)):
            sums = matmul(a.elements()[:, k : k + 128], b.elements()[:, k : k + 128].T, acc)
            expected += sums * a.scales[:, i, None] * np.repeat(b.scales[:, i], 128)[:140]
        assert np.array_equal(product(a, b.T, acc), expected)
    assert np.array_equal(product(a, b.T, "e8m13"), product(a, b.T, "e8m13/128"))  # a block is where it is promoted


def test_the_accumulator_of_a_product_counts() -> None:
    """One scale for the tensor: 14-bit sums run over all of K, and promotion heals them; with tiles of 128 they never do."""
    x, w = np.abs(normal(8, 4096)), np.abs(normal(8, 4096, seed=1))
    a, b = quantize_tensor(x, "e4m3"), quantize_tensor(w, "e4m3").T
    exact = a.dequantize("fp64") @ b.dequantize("fp64")

    def error(acc: str) -> float:
        return float((np.abs(product(a, b, acc) - exact) / exact).max())

    assert error("e8m13") > 0.03 and error("e8m13/128") < 0.003 and error("fp32") < 1e-6
    tiles, blocks = quantize_tiles(x, "e4m3"), quantize_blocks(w, "e4m3").T
    exact = tiles.dequantize("fp64") @ blocks.dequantize("fp64")
    assert (np.abs(product(tiles, blocks, "e8m13") - exact) / exact).max() < 0.003
    # MX has a scale every 32, but a tensor core's sum runs on over the blocks.
    mx, mw = quantize_mx(x, "e4m3"), quantize_mx(w, "e4m3").T
    exact = mx.dequantize("fp64") @ mw.dequantize("fp64")
    assert (np.abs(product(mx, mw, "e8m13") - exact) / exact).max() > 0.03


def test_a_product_is_torchs_scaled_mm() -> None:
    torch = pytest.importorskip("torch")
    x, w = normal(16, 64), normal(32, 64, seed=1)
    a, b = quantize_tensor(x, "e4m3"), quantize_tensor(w, "e4m3")

    def fp8(q: QuantizedTensor) -> object:
        return torch.from_numpy(q.codes).view(torch.float8_e4m3fn)

    theirs = torch._scaled_mm(
        fp8(a), fp8(b).t(), torch.from_numpy(a.scales), torch.from_numpy(b.scales), out_dtype=torch.float32
    ).numpy()  # fmt: skip
    bound = 70 * 2.0**-24 * (np.abs(a.dequantize("fp64")) @ np.abs(b.dequantize("fp64")).T)
    assert (np.abs(product(a, b.T) - theirs) <= bound).all()


def test_operands_that_do_not_fit_are_refused() -> None:
    x, w = normal(40, 96), normal(30, 96, seed=1)
    with pytest.raises(ValueError, match="do not match"):
        product(quantize_mx(x, "e4m3"), quantize_mx(w, "e4m3"))
    for wrong in (
        lambda y: quantize_mx(y, "e4m3", axis=0),
        lambda y: quantize_rows(y, "e4m3", axis=0),
        lambda y: quantize_nvfp4(y, axis=0),
    ):
        with pytest.raises(ValueError, match="a was quantized along the axis"):
            product(wrong(x), quantize_mx(w, "e4m3").T)
        with pytest.raises(ValueError, match="b was quantized along the axis"):
            product(quantize_mx(x, "e4m3"), wrong(w).T)
    with pytest.raises(ValueError, match="do not fit each other"):
        product(quantize_tiles(x, "e4m3", size=32), quantize_tiles(w, "e4m3", size=48).T)
    assert product(quantize_tiles(x, "e4m3", size=32), quantize_tiles(w, "e4m3", size=64).T).shape == (40, 30)


def test_the_three_products_of_a_linear_layer_quantize_along_their_own_axes() -> None:
    x, w, dy = normal(64, 96), normal(48, 96, seed=1), normal(64, 48, seed=2)

    def q(t: Array, axis: int) -> QuantizedTensor:
        return quantize_mx(t, "e4m3", axis, "rceil")

    y, dx, dw = product(q(x, 1), q(w, 1).T), product(q(dy, 1), q(w, 0)), product(q(dy, 0).T, q(x, 0))
    for ours, exact in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert np.linalg.norm(ours - exact) < 0.05 * np.linalg.norm(exact)


# --------------------------------------------------------------------------------------------------------------- Hadamard


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_the_matrix_is_orthonormal_and_its_own_inverse(n: int) -> None:
    h = hadamard(n)
    assert np.allclose(widen(h, "fp64") @ h, np.eye(n), atol=n * 2.0**-23) and np.array_equal(h, h.T)
    assert h.dtype == np.float32 and len(np.unique(np.abs(h))) == 1
    if n in (1, 16):
        assert np.array_equal(h @ h, np.eye(n))  # entries of +-1/4: exact


def test_the_matrix_is_scipys_order() -> None:
    """Sylvester's: the sign of place (i, j) is the parity of the bits that i and j share."""
    for i, j in np.ndindex(16, 16):
        assert hadamard(16)[i, j] == (-1) ** (i & j).bit_count() / 4


def test_rotating_back_and_the_product() -> None:
    signs = random_signs(3)
    assert set(signs) == {-1.0, 1.0} and np.array_equal(signs, random_signs(3)) and not np.array_equal(signs, random_signs(4))
    x, dy = normal(64, 48), normal(64, 32, seed=1)
    for axis in (0, 1):
        turned = rotate(x, signs, axis)
        assert turned.dtype == np.float32 and turned.shape == x.shape
        assert np.allclose(rotate_back(turned, signs, axis), x, atol=1e-6)
        assert np.allclose(np.linalg.norm(turned, axis=axis), np.linalg.norm(x, axis=axis))
    dw = dy.T @ x
    assert np.allclose(rotate(dy, signs, 0).T @ rotate(x, signs, 0), dw, atol=1e-4)
    # control: with signs of its own, or along another axis, an operand no longer fits the other
    assert not np.allclose(rotate(dy, random_signs(4), 0).T @ rotate(x, signs, 0), dw, atol=1)
    assert not np.allclose(rotate(dy, signs, 1).T @ rotate(x, signs, 1)[:, :48], dw, atol=1)


def test_an_outlier_is_spread_and_a_constant_needs_the_signs() -> None:
    signs = random_signs(0)
    outlier = np.zeros((1, 32), np.float32)
    outlier[0, 5] = 16
    turned = rotate(outlier, signs)
    assert (np.abs(turned[0, :16]) == 4).all() and not turned[0, 16:].any()
    ones = np.ones((1, 16), np.float32)
    assert np.abs(rotate(ones, np.ones(16, np.float32))).max() == 4  # one outlier of all the norm
    assert np.abs(rotate(ones, signs)).max() < 4
    with pytest.raises(ValueError, match="not a multiple of 16"):
        rotate(np.ones((2, 20), np.float32), signs)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(12)


def test_rotation_keeps_an_outlier_from_flushing_its_block() -> None:
    """One value of 40 in each 16 makes the block's scale 40 / 6, and what is below a quarter of that is zero: |x| < 1.67,
    90.5 % of the normal values beside it. Turned, all 16 are 10 and some, and none is below 1 / 24 of the largest."""
    x = normal(256, 64)
    x[:, 3::16] = 40

    def flushed(y: Array) -> float:
        return float(np.mean(quantize_nvfp4(y).elements() == 0))

    assert flushed(x) == pytest.approx(15 / 16 * 0.905, abs=0.01)
    assert flushed(rotate(x, random_signs(0))) < 0.01


# ---------------------------------------------------------------------------------------------------------------- controls


def test_control_a_rule_that_is_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALE_RULES, "floor", SCALE_RULES["ceil"])
    with pytest.raises(AssertionError):
        test_mx_is_torchaos("e4m3", "floor")
    with pytest.raises(AssertionError):
        test_mx_worked_examples()


def test_control_saturation_and_infinity_differ() -> None:
    x = fp32(500.0, 1.0)
    assert not np.array_equal(encode(x, ONE, (2,), "e4m3", "saturate"), encode(x, ONE, (2,), "e4m3", "inf"))
