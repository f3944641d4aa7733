"""refimpl.recipes: the ten recipes as literal tables: bytes of state, loss scales, and autocast's lists row by row.

Sources of the literals: the note (16 bytes a parameter with Adam) and torch.autocast's op lists for CUDA and CPU.
"""

import pytest

from refimpl.errors import UsageError
from refimpl.formats import FORMATS
from refimpl.ops import OPS
from refimpl.policy import EVERY_OTHER, SAME, Precision
from refimpl.recipes import RECIPES, get_recipe

# name: (weights, grads, master, m, v), bytes a parameter, loss scale
STATES = {
    "fp64": (("fp64", "fp64", "", "fp64", "fp64"), 32, "none"),
    "fp32": (("fp32", "fp32", "", "fp32", "fp32"), 16, "none"),
    "fp16": (("fp16", "fp16", "fp32", "fp32", "fp32"), 16, "dynamic"),
    "bf16": (("bf16", "bf16", "fp32", "fp32", "fp32"), 16, "none"),
    "amp-fp16": (("fp32", "fp32", "", "fp32", "fp32"), 16, "dynamic"),
    "amp-bf16": (("fp32", "fp32", "", "fp32", "fp32"), 16, "none"),
    "amp-fp16-cpu": (("fp32", "fp32", "", "fp32", "fp32"), 16, "dynamic"),
    "amp-bf16-cpu": (("fp32", "fp32", "", "fp32", "fp32"), 16, "none"),
    "pure-fp16": (("fp16", "fp16", "", "fp16", "fp16"), 8, "none"),
    "pure-bf16": (("bf16", "bf16", "", "bf16", "bf16"), 8, "none"),
}

# With AdamW, SGD with momentum, plain SGD, and AdamW over several micro-batches (sums in fp32: 16-bit grads become 4 bytes)
BYTES = {
    "fp64": (32, 24, 16, 32),
    "fp32": (16, 12, 8, 16),
    "fp16": (16, 12, 8, 18),
    "bf16": (16, 12, 8, 18),
    "amp-fp16": (16, 12, 8, 16),
    "amp-bf16": (16, 12, 8, 16),
    "amp-fp16-cpu": (16, 12, 8, 16),
    "amp-bf16-cpu": (16, 12, 8, 16),
    "pure-fp16": (8, 6, 4, 10),
    "pure-bf16": (8, 6, 4, 10),
}


def test_there_are_these_recipes() -> None:
    assert list(RECIPES) == list(STATES)
    assert all(recipe.name == name and recipe.summary and recipe.source for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", STATES)
def test_state_tables(name: str) -> None:
    recipe, (formats, n_bytes, loss_scale) = RECIPES[name], STATES[name]
    kinds = ("weights", "grads", "master", "m", "v")
    assert recipe.state == dict(zip(kinds, formats, strict=True))
    assert recipe.state_formats() == {kind: fmt for kind, fmt in zip(kinds, formats, strict=True) if fmt}
    assert recipe.bytes_per_parameter() == n_bytes
    assert recipe.loss_scale == loss_scale


@pytest.mark.parametrize("name", BYTES)
def test_bytes_by_optimizer_and_accumulation(name: str) -> None:
    recipe = RECIPES[name]
    measured = tuple(
        recipe.bytes_per_parameter(moments, n) for moments, n in ((("m", "v"), 1), (("m",), 1), ((), 1), (("m", "v"), 2))
    )
    assert measured == BYTES[name]


def test_sgd_with_momentum_keeps_no_v() -> None:
    assert list(RECIPES["fp16"].state_formats(("m",))) == ["weights", "grads", "master", "m"]
    assert list(RECIPES["fp16"].state_formats(())) == ["weights", "grads", "master"]


@pytest.mark.parametrize("n", [2, 8])
def test_sums_over_micro_batches_are_kept_in_fp32_at_least(n: int) -> None:
    for name, recipe in RECIPES.items():
        alone, summed = recipe.state_formats(), recipe.state_formats(grad_accum=n)
        assert summed["grads"] == ("fp64" if name == "fp64" else "fp32")
        assert {k: f for k, f in summed.items() if k != "grads"} == {k: f for k, f in alone.items() if k != "grads"}


# --------------------------------------------------------------------------------------------------------------- policies

LOW = {"fp16": "fp16", "bf16": "bf16"}
EVERY_ROW = [
    "linear", "linear.y", "linear.dx", "linear.dw", "matmul", "attention.scores", "attention.scale", "attention.softmax",
    "attention.values", "softmax", "layernorm", "rmsnorm", "add", "relu", "silu", "gelu_tanh", "gelu_erf", "embedding",
    "cross_entropy", "fan_in", "reshape", "transpose", "split", "cast",
]  # fmt: skip

# low: the 16-bit format; fp32; as it comes: inputs and output keep what the operands have
CUDA = {
    "linear": "low", "linear.y": "low", "linear.dx": "low", "linear.dw": "low", "matmul": "low", "attention.scores": "low",
    "attention.scale": "as it comes", "attention.softmax": "fp32", "attention.values": "low", "softmax": "fp32",
    "layernorm": "fp32", "add": "as it comes", "relu": "as it comes", "silu": "as it comes", "gelu_tanh": "as it comes",
    "gelu_erf": "as it comes", "embedding": "as it comes", "cross_entropy": "fp32", "fan_in": "as it comes",
    "reshape": "as it comes", "transpose": "as it comes", "split": "as it comes", "cast": "as it comes",
}  # fmt: skip
CPU = CUDA | {"attention.softmax": "as it comes", "softmax": "as it comes", "layernorm": "as it comes"}
# rms_norm: torch 2.13's CUDA list names it (ATen/autocast_mode.h); on CPU it keeps its input's type
CPU["rmsnorm"] = "as it comes"
CUDA["rmsnorm"] = "fp32"


def meaning(kind: str, low: str) -> Precision:
    if kind == "as it comes":
        return Precision(SAME, "fp32", SAME)
    fmt = low if kind == "low" else kind
    return Precision(fmt, "fp32", fmt)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(("suffix", "table"), [("", CUDA), ("-cpu", CPU)], ids=["cuda", "cpu"])
def test_autocast_rows(low: str, suffix: str, table: dict[str, str]) -> None:
    policy = RECIPES[f"amp-{low}{suffix}"].policy
    assert policy.name == f"autocast-{'cpu' if suffix else 'cuda'}-{low}"
    for key in EVERY_ROW:
        assert policy.row(key) == meaning(table[key], low), key


def test_the_two_autocasts_differ_in_softmax_and_norms_only() -> None:
    for low in LOW:
        cuda, cpu = RECIPES[f"amp-{low}"].policy, RECIPES[f"amp-{low}-cpu"].policy
        differ = {key for key in EVERY_ROW if cuda.row(key) != cpu.row(key)}
        assert differ == {"attention.softmax", "softmax", "layernorm", "rmsnorm"}


@pytest.mark.parametrize(("name", "fmt", "acc"), [
    ("fp64", "fp64", "fp64"), ("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp32"), ("bf16", "bf16", "fp32"),
    ("pure-fp16", "fp16", "fp32"), ("pure-bf16", "bf16", "fp32"),
])  # fmt: skip
def test_uniform_policies_keep_one_format_and_the_loss_in_the_wide_one(name: str, fmt: str, acc: str) -> None:
    policy = RECIPES[name].policy
    for key in EVERY_ROW:
        expected = Precision(acc, acc, acc) if key == "cross_entropy" else Precision(fmt, acc, fmt)
        assert policy.row(key) == expected, key


def test_every_operation_is_in_the_list_above() -> None:
    assert set(OPS) | {"fan_in"} <= {key.partition(".")[0] for key in EVERY_ROW}


def test_no_policy_has_a_row_that_nothing_reads() -> None:
    # a misspelt key would fall back in silence
    for recipe in RECIPES.values():
        assert set(recipe.policy.rows) <= {*EVERY_ROW, EVERY_OTHER}, recipe.name


def test_every_named_format_exists() -> None:
    for recipe in RECIPES.values():
        for row in recipe.policy.rows.values():
            assert {row.inputs, row.acc, row.out} <= {*FORMATS, SAME}
            assert FORMATS[row.acc].bits >= 32  # rule 2: 16-bit arrays are storage, never arithmetic
        assert {fmt for fmt in recipe.state.values() if fmt} <= set(FORMATS)


# ------------------------------------------------------------------------------------------------------------------ names


def test_get_recipe_finds_by_name() -> None:
    assert get_recipe("bf16") is RECIPES["bf16"]


@pytest.mark.parametrize("name", ["fp17", "", "FP16", "amp"])
def test_an_unknown_recipe_is_an_error_that_lists_all(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        get_recipe(name)
    message = str(caught.value)
    assert message.startswith(f"unknown recipe {name!r}: choose one of fp64, fp32, fp16")
    assert all(known in message for known in RECIPES)
    assert "\n" not in message
