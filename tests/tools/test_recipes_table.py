"""tools.recipes_table and scripts/recipes.py: bits and ulps are right for every format, tables hold what the recipes hold."""

import itertools
import json
import math

import ml_dtypes
import numpy as np
import pytest

from refimpl.errors import UsageError
from refimpl.numerics.bits import bit_string
from refimpl.numerics.formats import FORMATS, digits, ulp
from refimpl.precision.policy import Policy, Precision
from refimpl.precision.recipes import RECIPES, Recipe
from refimpl.tools.recipes_table import recipe_text, recipes_data, recipes_text, show_recipes
from refimpl.training.console import json_text, table

SMALL = ["fp16", "bf16", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e8m0"]  # few enough values to look at each


def every_value(fmt: str) -> np.ndarray:
    row = FORMATS[fmt]
    codes = np.arange(2**row.bits, dtype=np.uint16 if row.itemsize == 2 else np.uint8)
    return codes.view(row.dtype)


@np.errstate(invalid="ignore")  # a signalling NaN is among the codes
def finite_magnitudes(fmt: str) -> list[float]:
    values = every_value(fmt)
    return sorted(set(np.abs(values[np.isfinite(values)].astype(np.float64)).tolist()))


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (1.0, np.float16, "0|01111|0000000000"),
        (-0.0, np.float16, "1|00000|0000000000"),
        (np.inf, np.float16, "0|11111|0000000000"),
        (-1.5, np.float32, "1|01111111|10000000000000000000000"),
        (1.0, np.float64, "0|01111111111|" + "0" * 52),
        (2.0**-24, np.float16, "0|00000|0000000001"),
        (3.0, ml_dtypes.bfloat16, "0|10000000|1000000"),
        (448.0, ml_dtypes.float8_e4m3fn, "0|1111|110"),
        (-6.0, ml_dtypes.float4_e2m1fn, "1|11|1"),
        (1.0, ml_dtypes.float8_e8m0fnu, "01111111"),
    ],
)
def test_bits_of_known_values(value: float, dtype: type, expected: str) -> None:
    assert bit_string(np.array(value, dtype)) == expected


@pytest.mark.parametrize("fmt", SMALL)
def test_bits_spell_every_code(fmt: str) -> None:
    row = FORMATS[fmt]
    widths = [n for n in (row.sign_bits, row.exponent_bits, row.fraction_bits) if n]
    for code, value in enumerate(every_value(fmt)):
        text = bit_string(value)
        assert [len(field) for field in text.split("|")] == widths
        assert int(text.replace("|", ""), 2) == code


@pytest.mark.parametrize("fmt", SMALL)
def test_ulp_is_the_distance_to_the_next_value(fmt: str) -> None:
    for low, high in itertools.pairwise(finite_magnitudes(fmt)):
        assert ulp(fmt, low) == high - low == ulp(fmt, -low)
        assert ulp(fmt, (low + high) / 2) == high - low


def test_ulp_of_infinity_and_nan_is_nan() -> None:
    assert math.isnan(ulp("fp16", math.inf)) and math.isnan(ulp("fp16", math.nan))


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3"])
def test_digits_tell_all_values_apart(fmt: str) -> None:
    values = finite_magnitudes(fmt)
    assert len({digits(value, fmt) for value in values}) == len(values)


def test_digits_by_format() -> None:
    assert digits(1 / 3, "fp64") == "0.33333333333333331"
    assert digits(1 / 3, "fp32") == "0.333333333"
    assert digits(1 / 3, "bf16") == "0.3333"


def test_table_aligns_and_leaves_no_trailing_blanks() -> None:
    assert table(["a", "long"], [["xyz", "1"], ["", "2"]], "  ") == "  a    long\n  ---  ----\n  xyz  1\n       2"
    assert table((), [["a", "b"], ["cc", ""]]) == "a   b\ncc"


def test_json_has_null_where_json_has_no_number() -> None:
    assert json.loads(json_text({"a": [1.5, math.nan], "b": (math.inf, True)})) == {"a": [1.5, None], "b": [None, True]}


def test_data_is_what_the_recipes_say() -> None:
    data = recipes_data(list(RECIPES.values()))
    assert set(data["recipes"]) == set(RECIPES)
    for name, recipe in RECIPES.items():
        shown = data["recipes"][name]
        assert {kind: fmt or "" for kind, fmt in shown["state"].items()} == dict(recipe.state)
        assert (shown["loss_scale"], shown["bytes_per_parameter"]) == (recipe.loss_scale, recipe.bytes_per_parameter())
        assert shown["masters_from"] == recipe.masters_from
        rows = data["policies"][shown["policy"]]
        assert set(rows) == set(recipe.policy.rows)
        for key, row in rows.items():
            assert recipe.policy.row(key) == Precision(**row)


def bytes_in_words(recipe: Recipe) -> str:
    """'16' or '6.03125': as many digits as it has."""
    size = recipe.bytes_per_parameter()
    return str(size) if size.denominator == 1 else str(float(size))


def test_text_has_a_row_for_every_recipe_and_policy() -> None:
    text = recipes_text(list(RECIPES.values()))
    lines = [line.split() for line in text.splitlines()]
    for name, recipe in RECIPES.items():
        state = [recipe.state[kind] or "-" for kind in ("weights", "grads", "main_grads", "master", "m", "v")]
        expected = [name, *state, recipe.loss_scale, bytes_in_words(recipe), *recipe.summary.split()]
        assert expected in lines
        assert text.count(f"\npolicy {recipe.policy.name}, of ") == 1
    assert "policy fp16, of fp16, pure-fp16, apex-o2\n" in text
    assert "'*' stands for every operation" in text and "'same' as inputs" in text
    assert ["*", "every", "other", "operation", "same", "fp32", "same"] in lines


TYPES = {"compensation": "bfloat16", "remainder": "uint16", "scales": "float32", "embeddings": "float32"}


@pytest.mark.parametrize("name", RECIPES)
def test_one_recipe_in_detail(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_recipes(name)
    text, recipe = capsys.readouterr().out, RECIPES[name]
    assert recipe.summary in text and recipe.source in text and recipe.loss_scale in text
    assert ("the weights are their own masters" in text) == (not recipe.state["master"])
    assert (f"masters start from: the {recipe.masters_from} weights" in text) == bool(recipe.state["master"])
    lines = [line.split() for line in text.splitlines()]
    assert ["total", bytes_in_words(recipe)] in lines
    for buffer, part in recipe.buffers().items():
        kept_as = recipe.state.get(buffer) or TYPES[buffer.rpartition("_")[2]]
        shared = [] if part.values == 1 else ["4", "for", "256"]
        shared += ["for", "embeddings", "only,", "not", "in", "the", "total"] if buffer.endswith("_embeddings") else []
        assert [buffer, kept_as, f"{float(part.bytes_per_parameter):g}", *shared] in lines, buffer
    for row, p in recipe.policy.rows.items():
        inputs = p.inputs if isinstance(p.inputs, str) else ", ".join(f"{name}: {fmt}" for name, fmt in p.inputs.items())
        assert any(line[:1] == [row] and " ".join(line).endswith(f" {inputs} {p.acc} {p.out}") for line in lines), row


def test_inputs_that_differ_by_operand_are_named() -> None:
    policy = Policy("mixed", {"linear.dx": Precision({"dy": "e5m2", "w": "e4m3"}, "fp32", "bf16")})
    recipe = Recipe("mixed", "a test", "-", policy, RECIPES["bf16"].state, "none")
    assert "linear.dx  dy: e5m2, w: e4m3  fp32  bf16" in recipe_text(recipe)
    inputs = recipes_data([recipe])["policies"]["mixed"]["linear.dx"]["inputs"]
    assert json.loads(json_text(inputs)) == {"dy": "e5m2", "w": "e4m3"}


@pytest.mark.parametrize("name", [None, "bf16"])
def test_json_is_the_data(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    show_recipes(name, as_json=True)
    recipes = list(RECIPES.values()) if name is None else [RECIPES[name]]
    assert json.loads(capsys.readouterr().out) == recipes_data(recipes)


def test_an_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(UsageError) as caught:
        show_recipes("fp17")
    assert all(name in str(caught.value) for name in RECIPES)
