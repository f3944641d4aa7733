"""numerics.formats: the four facts of each row give every derived number, and containment agrees with the values themselves.

Derived numbers are held against np.finfo and ml_dtypes.finfo, TF32 (which no library knows) against numbers worked out by
hand, and `widens_to` against the sets of all values of all formats of 16 bits or fewer, decoded here from their bits.
"""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from refimpl.numerics.formats import FORMATS, Format, dtype_of, format_of, is_float, widens_to, widest

IN_NUMPY = [name for name in FORMATS if name in ("fp64", "fp32", "fp16")]
IN_ML_DTYPES = [name for name in FORMATS if name not in ("fp64", "fp32", "fp16", "tf32")]
SMALL = [name for name, row in FORMATS.items() if row.bits <= 16]

# The layouts again, typed from the specifications and not taken from the table under test:
# sign bits, exponent bits, fraction bits, bias, what the top exponent holds.
LAYOUTS = {
    "fp16": (1, 5, 10, 15, "inf and nan"),
    "bf16": (1, 8, 7, 127, "inf and nan"),
    "e4m3": (1, 4, 3, 7, "numbers, all ones is nan"),
    "e5m2": (1, 5, 2, 15, "inf and nan"),
    "e3m2": (1, 3, 2, 3, "numbers"),
    "e2m3": (1, 2, 3, 1, "numbers"),
    "e2m1": (1, 2, 1, 1, "numbers"),
}


def decode(name: str) -> np.ndarray:
    """The value of every code of a small format in float64, from sign, exponent and fraction."""
    if name == "e8m0":  # exponent only: 2^(code - 127), and code 255 is NaN
        return np.array([math.ldexp(1.0, code - 127) for code in range(255)] + [math.nan])
    sign_bits, exponent_bits, fraction_bits, bias, top = LAYOUTS[name]
    code = np.arange(2 ** (sign_bits + exponent_bits + fraction_bits))
    fraction = (code & (2**fraction_bits - 1)) / 2**fraction_bits
    exponent = (code >> fraction_bits) & (2**exponent_bits - 1)
    value = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    at_top = exponent == 2**exponent_bits - 1
    if top == "inf and nan":
        value[at_top] = np.where(fraction[at_top] == 0, math.inf, math.nan)
    elif top == "numbers, all ones is nan":
        value[at_top & (fraction == fraction.max())] = math.nan
    return np.where(code >> (exponent_bits + fraction_bits), -value, value)


def stored(name: str) -> np.ndarray:
    """All codes of a small format, as an array of its own type."""
    row = FORMATS[name]
    return np.arange(2**row.bits).astype(f"u{row.itemsize}").view(row.dtype)


# ------------------------------------------------------------------------------------------------------ derived numbers


@pytest.mark.parametrize("name", IN_NUMPY + IN_ML_DTYPES)
def test_every_derived_number_is_finfos(name: str) -> None:
    row = FORMATS[name]
    info = np.finfo(row.dtype) if name in IN_NUMPY else ml_dtypes.finfo(row.dtype)
    for attribute in ("max", "min", "eps", "smallest_normal", "smallest_subnormal"):
        assert getattr(row, attribute) == float(getattr(info, attribute)), attribute
    assert row.bits == info.bits
    assert row.fraction_bits == info.nmant
    # the smallest exponent of a normal number is 1, but 0 where there is no fraction and so no subnormals (e8m0)
    assert (1 if row.fraction_bits else 0) - row.bias == info.minexp
    assert math.frexp(row.max)[1] == info.maxexp
    assert row.itemsize == row.dtype.itemsize


def test_tf32_by_hand() -> None:
    row = FORMATS["tf32"]
    assert (row.bits, row.itemsize, row.dtype) == (19, 4, np.dtype(np.float32))
    assert row.eps == 2**-10
    assert row.max == (2 - 2**-10) * 2.0**127 == np.uint32(0x7F7FE000).view(np.float32)
    assert row.min == -row.max
    assert row.smallest_normal == 2.0**-126 == np.finfo(np.float32).smallest_normal
    assert row.smallest_subnormal == 2.0**-136
    assert row.has_inf


KNOWN = [
    # format   bits  max          smallest normal  smallest subnormal  eps     infinities
    ("fp32", 32, (2 - 2**-23) * 2.0**127, 2.0**-126, 2.0**-149, 2**-23, True),
    ("fp16", 16, 65504.0, 2.0**-14, 2.0**-24, 2**-10, True),
    ("bf16", 16, 255 * 2.0**120, 2.0**-126, 2.0**-133, 2**-7, True),
    ("e4m3", 8, 448.0, 2.0**-6, 2.0**-9, 2**-3, False),
    ("e5m2", 8, 57344.0, 2.0**-14, 2.0**-16, 2**-2, True),
    ("e3m2", 6, 28.0, 0.25, 0.0625, 2**-2, False),
    ("e2m3", 6, 7.5, 1.0, 0.125, 2**-3, False),
    ("e2m1", 4, 6.0, 1.0, 0.5, 2**-1, False),
    ("e8m0", 8, 2.0**127, 2.0**-127, 2.0**-127, 1.0, False),
]


@pytest.mark.parametrize(("name", "bits", "largest", "normal", "subnormal", "eps", "has_inf"), KNOWN)
def test_known_values(name: str, bits: int, largest: float, normal: float, subnormal: float, eps: float, has_inf: bool) -> None:
    row = FORMATS[name]
    assert (row.bits, row.max, row.smallest_normal, row.smallest_subnormal, row.eps, row.has_inf) == (
        bits,
        largest,
        normal,
        subnormal,
        eps,
        has_inf,
    )


def test_bf16_has_fp32s_exponents_and_a_slightly_smaller_maximum() -> None:
    # the correction to the note, which gives fp32's exponent bits to fp16
    assert FORMATS["bf16"].exponent_bits == FORMATS["fp32"].exponent_bits == 8
    assert FORMATS["fp16"].exponent_bits == 5
    assert f"{FORMATS['bf16'].max:.4e} {FORMATS['fp32'].max:.4e}" == "3.3895e+38 3.4028e+38"


@pytest.mark.parametrize("name", SMALL)
def test_largest_and_smallest_are_those_of_all_codes(name: str) -> None:
    row, values = FORMATS[name], decode(name)
    finite = values[np.isfinite(values)]
    assert row.max == finite.max() and row.min == finite.min()
    assert row.smallest_subnormal == finite[finite > 0].min()
    assert row.has_inf == bool(np.isinf(values).any())
    assert row.eps == finite[finite > 1].min() - 1.0


@pytest.mark.parametrize("name", SMALL)
def test_the_array_type_holds_the_values_that_the_layout_says(name: str) -> None:
    with np.errstate(invalid="ignore"):  # bf16 has codes for signalling NaNs
        held, expected = stored(name).astype(np.float64), decode(name)
    number = ~np.isnan(expected)
    assert np.array_equal(held[number], expected[number]) and np.isnan(held[~number]).all()
    assert np.array_equal(np.signbit(held[number]), np.signbit(expected[number]))  # both zeros


# ------------------------------------------------------------------------------------------------------- type <-> name


@pytest.mark.parametrize("name", FORMATS)
def test_format_of_undoes_dtype_of(name: str) -> None:
    x = np.zeros(3, dtype_of(name))
    assert format_of(x) == ("fp32" if name == "tf32" else name)
    assert is_float(x)
    assert FORMATS[name].name == name


@pytest.mark.parametrize("dtype", [bool, np.int32, np.int64, np.uint8, np.complex64])
def test_arrays_without_floats_are_refused(dtype: type) -> None:
    x = np.zeros(3, dtype)
    assert not is_float(x)
    with pytest.raises(TypeError, match=f"array of {np.dtype(dtype)} holds no floating-point format"):
        format_of(x)


# ------------------------------------------------------------------------------------------------- widens_to and widest


def value_set(name: str) -> set[float]:
    values = decode(name)
    return set(values[~np.isnan(values)].tolist())


VALUES = {name: value_set(name) for name in SMALL}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(SMALL, SMALL)))
def test_widens_to_is_containment_of_all_values(source: str, target: str) -> None:
    assert widens_to(source, target) == (VALUES[source] <= VALUES[target])


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ((4, 3, 7, "none", 1), (4, 3, 10, "none", 1)),  # the same but for the bias: a larger maximum
        ((4, 3, 10, "none", 1), (4, 3, 7, "none", 1)),  # and here smaller values
        ((5, 2, 15, "ieee", 1), (5, 2, 15, "none", 1)),  # infinities
        ((5, 0, 15, "none", 1), (5, 0, 15, "none", 0)),  # negative values
        ((5, 3, 15, "none", 1), (5, 2, 15, "none", 1)),  # a longer fraction
    ],
    ids=["maximum", "smallest", "infinities", "sign", "fraction"],
)
def test_each_reason_alone_forbids_widening(wide: tuple, narrow: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    # made-up formats: between the real ones two reasons always come together, so none of them alone would be missed
    # names that no other case uses: widens_to remembers its answers by name
    names = [str(facts) for facts in (wide, narrow)]
    for name, (exponent_bits, fraction_bits, bias, specials, sign_bits) in zip(names, (wide, narrow), strict=True):
        row = Format(name, exponent_bits, fraction_bits, bias, specials, np.dtype(np.uint8), sign_bits)
        monkeypatch.setitem(FORMATS, name, row)
    assert widens_to(names[0], names[0]) and widens_to(names[1], names[1])
    assert not widens_to(names[0], names[1])


@pytest.mark.parametrize("source", SMALL)
@pytest.mark.parametrize("target", ["fp64", "fp32", "tf32"])
def test_widens_to_the_large_formats(source: str, target: str) -> None:
    values = decode(source)
    held = values.astype(np.float64 if target == "fp64" else np.float32)
    contained = np.array_equal(held.astype(np.float64), values, equal_nan=True)
    if target == "tf32":
        numbers = held[np.isfinite(held)]
        contained = contained and not (numbers.view(np.uint32) & 0x1FFF).any()  # 13 fraction bits less than fp32
    assert contained and widens_to(source, target)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("fp64", "fp32", False),
        ("fp64", "fp64", True),
        ("fp32", "fp64", True),
        ("fp32", "fp32", True),
        ("fp32", "tf32", False),
        ("fp32", "fp16", False),
        ("fp32", "bf16", False),
        ("tf32", "fp32", True),
        ("tf32", "fp64", True),
        ("tf32", "fp16", False),
        ("tf32", "bf16", False),
    ],
)
def test_widens_to_from_the_large_formats(source: str, target: str, expected: bool) -> None:
    assert widens_to(source, target) is expected


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("fp16",), "fp16"),
        (("fp16", "fp16"), "fp16"),
        (("fp16", "fp32"), "fp32"),
        (("fp32", "fp16"), "fp32"),
        (("bf16", "fp32"), "fp32"),
        (("fp16", "bf16"), "fp32"),
        (("bf16", "fp16"), "fp32"),
        (("fp32", "fp64", "bf16"), "fp64"),
        (("fp16", "bf16", "fp64"), "fp64"),
        (("e4m3", "fp16"), "fp16"),
        (("e5m2", "bf16"), "bf16"),
    ],
)
def test_widest(formats: tuple[str, ...], expected: str) -> None:
    assert widest(*formats) == expected


def test_widest_holds_all_its_arguments_in_any_order() -> None:
    for trio in itertools.product(["fp64", "fp32", "fp16", "bf16", "e4m3", "e5m2"], repeat=3):
        result = widest(*trio)
        assert all(widens_to(fmt, result) for fmt in trio), (trio, result)


def test_widest_is_torch_promotion() -> None:
    torch = pytest.importorskip("torch")
    types = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for a, b in itertools.product(types, types):
        assert types[widest(a, b)] == torch.promote_types(types[a], types[b]), (a, b)
