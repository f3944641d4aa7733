"""tools.recipes_table and scripts/recipes.py: bits and ulps are right for every format, tables hold what the recipes hold."""

import itertools
import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
from hand_training import Training
from op_calls import SHAPES
from op_calls import run as run_op

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models import GPTConfig, LlamaConfig, MLPConfig, Model, gpt_model, llama_model, mlp_model
from refimpl.nn.ops import OPS
from refimpl.numerics.bits import bit_string
from refimpl.numerics.formats import FORMATS, digits, ulp
from refimpl.precision.policy import Policy, Precision
from refimpl.precision.policy_checks import PARTS
from refimpl.precision.recipes import RECIPES, Recipe
from refimpl.tools.recipes_table import (
    MOVES,
    applied_rows,
    recipe_text,
    recipes_data,
    recipes_text,
    rows_text,
    shared_casts,
    show_recipes,
)
from refimpl.training.console import json_text

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
    rows = {"linear.dx": Precision({"dy": "e5m2", "w": "e4m3"}, "fp32", "bf16"), "*": Precision("bf16", "fp32", "bf16")}
    policy = Policy("mixed", rows)
    recipe = Recipe("mixed", "a test", "-", policy, RECIPES["bf16"].state, "none")
    text = recipe_text(recipe)
    assert ["linear.dx", "dy: e5m2, w: e4m3", "fp32", "bf16"] in [re.split("  +", x.strip()) for x in text.splitlines()]
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


# ------------------------------------------------------------------------------------------- the row of each operation

MODELS = {
    "gpt": gpt_model(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=4, vocab_size=32)),
    "llama": llama_model(
        LlamaConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, head_dim=16, ffn_dim=32, block_size=4, vocab_size=32)
    ),
    "mlp": mlp_model(MLPConfig(n_layer=1, n_embd=16, block_size=4, vocab_size=32)),
}


NOT_LOOKED_UP = {"gpt": {"attention.wide_softmax"}, "llama": {"attention.softmax"}, "mlp": set[str]()}
"""Rows of attention that only the attention of the other model reads."""


class Lookups:
    """The keys and places that are looked up in policies from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[tuple[str, str]] = set()
        look_up = Policy.row_key

        def recorded(policy: Policy, key: str, place: str = "") -> str:
            self.seen.add((key, place))
            return look_up(policy, key, place)

        monkeypatch.setattr(Policy, "row_key", recorded)

    def names(self) -> set[tuple[str, str]]:
        """Operations and parts with their places, without what is looked up and not used.

        That is the row of an operation which has parts, and of one that computes nothing. `layernorm.y` is how the tape asks
        for the format of a parameter of an operation without parts.
        """
        found = set()
        for key, place in self.seen:
            op, _, part = key.partition(".")
            if op not in MOVES and (part or op not in PARTS):
                found.add((key if op in PARTS else op, place))
        return found


def train_one_step(model: Model, recipe: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 32, (2, 4))
    Training(NUMPY, model, recipe).step((tokens, tokens))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", ["fp16", "amp-fp16", "amp-bf16-cpu", "pure-bf16", "fp8", "nvfp4", "fp16-sums"])
def test_every_row_of_a_training_step_is_printed(recipe: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = Lookups(monkeypatch)
    train_one_step(MODELS[model], recipe)
    names = lookups.names()
    policy, printed = RECIPES[recipe].policy, {row.name: row for row in applied_rows(RECIPES[recipe])}
    for name, place in names:
        if name == "cast":
            continue
        row = printed.get(f"{place}:{name}", printed.get(name))
        assert row is not None, f"{name} at {place} is not printed"
        assert (row.precision, row.key) == (policy.row(name, place), policy.row_key(name, place)), (name, place)
    # and of an operation that ran, nothing is printed that it does not look up
    ran = {name.partition(".")[0] for name, _ in names}
    expected = {name for name, _ in names} | NOT_LOOKED_UP[model]
    assert {name for name in printed if ":" not in name and name.partition(".")[0] in ran} == expected
    casts = {place.rpartition(".")[2] for name, place in names if name == "cast"}  # 'lm_head.weight.fp16'
    assert casts == {row.precision.out for row in shared_casts(RECIPES[recipe])}


def test_steps_of_the_models_look_up_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: the records are not empty, nor is the comparison above."""
    lookups = Lookups(monkeypatch)
    for model in MODELS.values():
        train_one_step(model, "amp-fp16")
    names = {name for name, _ in lookups.names()}
    parts = {f"{op}.{part}" for op, of in PARTS.items() for part in of}
    assert names >= parts | {"layernorm", "gelu_tanh", "relu", "add", "embedding", "cross_entropy", "fan_in", "cast"}
    assert ("linear.dw", "transformer.h.0.mlp.c_fc") in lookups.names()


@pytest.mark.parametrize("op", [op for op in SHAPES if op not in (*MOVES, "cast")])
def test_the_rows_of_every_operation_are_printed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name for row in applied_rows(RECIPES["amp-fp16"]) if row.name.partition(".")[0] == OPS[op].key}
    rows -= {"attention": NOT_LOOKED_UP["gpt"], "grouped_attention": NOT_LOOKED_UP["llama"]}.get(op, set())
    lookups, (inputs, params, static) = Lookups(monkeypatch), SHAPES[op].draw("fp32")
    run_op("amp-fp16", op, inputs, params, **static)
    assert rows == {name for name, _ in lookups.names()}


@pytest.mark.parametrize("op", [*MOVES, "cast"])
def test_operations_without_a_row_do_what_no_row_says(op: str) -> None:
    inputs, params, static = SHAPES[op].draw("fp32")
    y, gradients = run_op("bf16", op, inputs, params, **static)
    assert y.dtype == (np.float16 if op == "cast" else np.float32) and gradients[0].dtype == np.float32


def test_rows_as_text() -> None:
    lines = [line.split() for line in rows_text(RECIPES["amp-fp16"]).splitlines()]
    assert ["linear.db", "fp16", "fp32", "fp16", "linear"] in lines
    assert ["attention.softmax", "fp32", "fp32", "fp32", "attention.softmax"] in lines
    assert ["attention.scale", "same", "fp32", "same", "*"] in lines
    assert ["cast", "fp32", "-", "fp16", "linear"] in lines
    lines = [line.split() for line in rows_text(RECIPES["nvfp4"]).splitlines()]
    at = lines.index(["linear.dw", "dy:", "nvfp4-rotated-sr", "fp32", "bf16", "linear.dw"])
    assert lines[at + 1] == ["x:", "nvfp4-rotated"]
    assert ["lm_head:linear.dw", "bf16", "fp32", "bf16", "lm_head:linear"] in lines
    assert "cast:" not in rows_text(RECIPES["nvfp4"]) and "cast:" in rows_text(RECIPES["amp-fp16"])


@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_every_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_recipes(name, rows=True)
    text, recipe = capsys.readouterr().out, RECIPES[name]
    assert max(map(len, text.splitlines())) <= 80
    listed = [line.split()[0] for line in text.split("\n\n")[1].splitlines()[2:] if not line.startswith(" ")]
    assert listed == [row.name for row in applied_rows(recipe)]
    ops = {name.rpartition(":")[2].partition(".")[0] for name in listed}
    assert ops | {*MOVES, "cast"} == {*(op.key for op in OPS.values()), "fan_in"}


def test_rows_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    show_recipes("nvfp4", as_json=True, rows=True)
    data = json.loads(capsys.readouterr().out)
    rows = data.pop("rows")["nvfp4"]
    assert data == recipes_data([RECIPES["nvfp4"]])
    assert rows["linear.dw"] == {**data["policies"]["nvfp4"]["linear.dw"], "key": "linear.dw"}
    assert list(rows) == [row.name for row in applied_rows(RECIPES["nvfp4"])]


def test_rows_are_those_of_one_recipe() -> None:
    with pytest.raises(UsageError, match="--rows prints the rows of one recipe: --recipe fp16 --rows"):
        show_recipes(rows=True)
