"""refimpl.precision.recipes: all recipes as literal tables: storages and bytes of state, loss scales, and policies row by row.

Sources of the literals: the note (16 bytes a parameter with Adam), torch.autocast's op lists for CUDA and CPU, and the
papers and programs that the recipes name.
"""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from recipe_lists import MECHANISMS

from refimpl.backends.base import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.ops import OPS
from refimpl.numerics.accumulators import accumulator
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization.registry import SCHEMES
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.policy import EVERY_OTHER, SAME, Precision
from refimpl.precision.recipes import MASTERS_FROM, RECIPES, STATE_KINDS, Recipe, get_recipe
from refimpl.precision.state_encodings import ENCODINGS, get_encoding
from refimpl.step import forward_backward

# name: (weights, grads, main_grads, master, m, v), loss scale, what masters start from
SR, BF16_MASTERS = "bf16-stochastic", ("bf16", "bf16", "", "fp32", "fp32", "fp32")
FP16_MASTERS = ("fp16", "fp16", "", "fp32", "fp32", "fp32")
STATES = {
    "fp64": (("fp64", "fp64", "", "", "fp64", "fp64"), "none", "original"),
    "fp32": (("fp32", "fp32", "", "", "fp32", "fp32"), "none", "original"),
    "fp16": (FP16_MASTERS, "dynamic", "original"),
    "bf16": (BF16_MASTERS, "none", "original"),
    "amp-fp16": (("fp32", "fp32", "", "", "fp32", "fp32"), "dynamic", "original"),
    "amp-bf16": (("fp32", "fp32", "", "", "fp32", "fp32"), "none", "original"),
    "amp-fp16-cpu": (("fp32", "fp32", "", "", "fp32", "fp32"), "dynamic", "original"),
    "amp-bf16-cpu": (("fp32", "fp32", "", "", "fp32", "fp32"), "none", "original"),
    "pure-fp16": (("fp16", "fp16", "", "", "fp16", "fp16"), "none", "original"),
    "pure-bf16": (("bf16", "bf16", "", "", "bf16", "bf16"), "none", "original"),
    "bf16-no-master": (("bf16", "bf16", "", "", "fp32", "fp32"), "none", "original"),
    "bf16-sr": ((SR, "bf16", "", "", "fp32", "fp32"), "none", "original"),
    "bf16-kahan": (("bf16-kahan", "bf16", "", "", "bf16", "bf16"), "none", "original"),
    "bf16-remainder": (("bf16-remainder", "bf16", "", "", "fp32", "fp32"), "none", "original"),
    "bf16-moments": (("bf16", "bf16", "", "fp32", "bf16", "bf16"), "none", "original"),
    "fp16-moments": (("bf16", "bf16", "", "fp32", "fp16", "fp16"), "none", "original"),
    "adam-8bit": ((SR, "bf16", "", "", "int8-signed", "int8-unsigned"), "none", "original"),
    "adam-8bit-fp32-embeddings": (
        (SR, "bf16", "", "", "int8-signed-embeddings-fp32", "int8-unsigned-embeddings-fp32"), "none", "original",
    ),
    "adam-fp8": ((SR, "bf16", "", "", "e4m3-blocks", "e4m3-blocks"), "none", "original"),
    "megatron-bf16": (("bf16", "fp32", "", "fp32", "fp32", "fp32"), "none", "rounded"),
    "apex-o2": (("fp16", "fp16", "fp32", "fp32", "fp32", "fp32"), "dynamic", "rounded"),
    "fp8": (BF16_MASTERS, "none", "original"),
    "fp8-delayed": (BF16_MASTERS, "none", "original"),
    "fp8-e4m3": (BF16_MASTERS, "none", "original"),
    "fp8-rows": (BF16_MASTERS, "none", "original"),
    "fp8-rows-dw-bf16": (BF16_MASTERS, "none", "original"),
    "fp8-blocks": (("bf16", "fp32", "", "fp32", "bf16", "bf16"), "none", "original"),
    "mxfp8": (BF16_MASTERS, "none", "original"),
    "mxfp8-floor": (BF16_MASTERS, "none", "original"),
    "mxfp6": (BF16_MASTERS, "none", "original"),
    "mxfp4": (BF16_MASTERS, "none", "original"),
    "nvfp4": (BF16_MASTERS, "none", "original"),
    "fp8-14bit": (BF16_MASTERS, "none", "original"),
    "fp8-14bit-128": (BF16_MASTERS, "none", "original"),
    "fp16-sums": (FP16_MASTERS, "dynamic", "original"),
    "fp16-sums-64": (FP16_MASTERS, "dynamic", "original"),
}

# With AdamW, SGD with momentum, plain SGD, and AdamW over several micro-batches (sums in fp32: 16-bit grads become 4 bytes)
MASTERS = (16, 12, 8, 18)
BYTES = {
    "fp64": (32, 24, 16, 32),
    "fp32": (16, 12, 8, 16),
    "fp16": MASTERS,
    "bf16": MASTERS,
    "amp-fp16": (16, 12, 8, 16),
    "amp-bf16": (16, 12, 8, 16),
    "amp-fp16-cpu": (16, 12, 8, 16),
    "amp-bf16-cpu": (16, 12, 8, 16),
    "pure-fp16": (8, 6, 4, 10),
    "pure-bf16": (8, 6, 4, 10),
    "bf16-no-master": (12, 8, 4, 14),
    "bf16-sr": (12, 8, 4, 14),
    "bf16-kahan": (10, 8, 6, 12),  # 2 of compensation
    "bf16-remainder": (14, 10, 6, 16),  # 2 + 2 are weights and masters
    "bf16-moments": (12, 10, 8, 14),
    "fp16-moments": (12, 10, 8, 14),
    "adam-8bit": (6 + 2 / 64, 5 + 1 / 64, 4, 8 + 2 / 64),  # a scale is 4 / 256 for m, and for v
    "adam-8bit-fp32-embeddings": (6 + 2 / 64, 5 + 1 / 64, 4, 8 + 2 / 64),  # and 4 for each moment of an embedding
    "adam-fp8": (6 + 2 / 64, 5 + 1 / 64, 4, 8 + 2 / 64),
    "megatron-bf16": (18, 14, 10, 18),  # FP32 gradients already
    "apex-o2": (20, 16, 12, 18),  # sums over micro-batches are the FP32 gradients: no second copy
    "fp8": MASTERS,
    "fp8-delayed": MASTERS,
    "fp8-e4m3": MASTERS,
    "fp8-rows": MASTERS,
    "fp8-rows-dw-bf16": MASTERS,
    "fp8-blocks": (14, 12, 10, 14),
    "mxfp8": MASTERS,
    "mxfp8-floor": MASTERS,
    "mxfp6": MASTERS,
    "mxfp4": MASTERS,
    "nvfp4": MASTERS,
    "fp8-14bit": MASTERS,
    "fp8-14bit-128": MASTERS,
    "fp16-sums": MASTERS,
    "fp16-sums-64": MASTERS,
}

# What a storage keeps, in bytes a parameter, by buffer
PARTS: dict[str, dict[str, float]] = {
    "fp64": {"": 8}, "fp32": {"": 4}, "fp16": {"": 2}, "bf16": {"": 2}, "bf16-stochastic": {"": 2},
    "bf16-kahan": {"": 2, "_compensation": 2}, "bf16-remainder": {"": 2, "_remainder": 2},
    "int8-signed": {"": 1, "_scales": 1 / 64}, "int8-unsigned": {"": 1, "_scales": 1 / 64},
    "e4m3-blocks": {"": 1, "_scales": 1 / 64},
    **{f"int8-{s}-embeddings-fp32": {"": 1, "_scales": 1 / 64, "_embeddings": 4} for s in ("signed", "unsigned")},
}  # fmt: skip


def test_there_are_these_recipes() -> None:
    assert list(RECIPES) == list(STATES) == list(BYTES)
    assert all(recipe.name == name and recipe.summary and recipe.source for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", STATES)
def test_state_tables(name: str) -> None:
    recipe, (storages, loss_scale, masters_from) = RECIPES[name], STATES[name]
    kinds = ("weights", "grads", "main_grads", "master", "m", "v")
    assert recipe.state == dict(zip(kinds, storages, strict=True)) and kinds == STATE_KINDS
    assert recipe.state_encodings() == {kind: fmt for kind, fmt in zip(kinds, storages, strict=True) if fmt}
    assert recipe.loss_scale == loss_scale
    assert recipe.masters_from == masters_from and masters_from in MASTERS_FROM


@pytest.mark.parametrize("name", BYTES)
def test_bytes_by_optimizer_and_accumulation(name: str) -> None:
    recipe = RECIPES[name]
    measured = tuple(
        recipe.bytes_per_parameter(moments, n) for moments, n in ((("m", "v"), 1), (("m",), 1), ((), 1), (("m", "v"), 2))
    )
    assert measured == BYTES[name]
    assert all(isinstance(size, Fraction) for size in measured)


def test_every_storage_is_used_and_is_in_the_table_above() -> None:
    assert {storage for storages, _, _ in STATES.values() for storage in storages if storage} == set(ENCODINGS) == set(PARTS)


@pytest.mark.parametrize("name", RECIPES)
def test_buffers_are_the_parts_of_the_storages(name: str) -> None:
    expected = {
        kind + part: size
        for kind, storage in zip(STATE_KINDS, STATES[name][0], strict=True)
        if storage
        for part, size in PARTS[storage].items()
    }
    assert {buffer: part.bytes_per_parameter for buffer, part in RECIPES[name].buffers().items()} == expected


def test_sgd_with_momentum_keeps_no_v() -> None:
    assert list(RECIPES["fp16"].state_encodings(("m",))) == ["weights", "grads", "master", "m"]
    assert list(RECIPES["fp16"].state_encodings(())) == ["weights", "grads", "master"]


@pytest.mark.parametrize("n", [2, 8])
def test_sums_over_micro_batches_are_kept_in_fp32_at_least(n: int) -> None:
    for name, recipe in RECIPES.items():
        alone, summed = recipe.state_encodings(), recipe.state_encodings(grad_accum=n)
        assert summed["grads"] == ("fp64" if name == "fp64" else "fp32")
        others = {k: f for k, f in alone.items() if k not in ("grads", "main_grads")}  # the sums are the FP32 gradients
        assert {k: f for k, f in summed.items() if k != "grads"} == others


# --------------------------------------------------------------------------------------------------------------- policies

LOW = {"fp16": "fp16", "bf16": "bf16"}
EVERY_ROW = [
    "linear", "linear.y", "linear.dx", "linear.dw", "linear.db", "matmul", "attention.scores", "attention.scale",
    "attention.softmax", "attention.values", "softmax", "layernorm", "rmsnorm", "add", "relu", "silu", "gelu_tanh", "gelu_erf",
    "embedding", "cross_entropy", "fan_in", "reshape", "transpose", "split", "cast",
]  # fmt: skip

# low: the 16-bit format; fp32; as it comes: inputs and output keep what the operands have
CUDA = {
    "linear": "low", "linear.y": "low", "linear.dx": "low", "linear.dw": "low", "linear.db": "low", "matmul": "low",
    "attention.scores": "low",
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
    ("pure-fp16", "fp16", "fp32"), ("pure-bf16", "bf16", "fp32"), ("apex-o2", "fp16", "fp32"),
    *((name, "bf16", "fp32") for name in ("bf16-no-master", "bf16-sr", "bf16-kahan", "bf16-remainder", "bf16-moments",
                                          "fp16-moments", "adam-8bit", "adam-fp8", "megatron-bf16")),
])  # fmt: skip
def test_uniform_policies_keep_one_format_and_the_loss_in_the_wide_one(name: str, fmt: str, acc: str) -> None:
    policy = RECIPES[name].policy
    for key in EVERY_ROW:
        expected = Precision(acc, acc, acc) if key == "cross_entropy" else Precision(fmt, acc, fmt)
        assert policy.row(key) == expected, key


def test_every_operation_is_in_the_list_above() -> None:
    assert set(OPS) | {"fan_in"} <= {key.partition(".")[0] for key in EVERY_ROW}


# name: schemes of x and w forward, of dy and w in dx, of dy and x in dw; the accumulator
PRODUCTS = {
    "fp8": (("e4m3-tensor", "e4m3-tensor"), ("e5m2-tensor", "e4m3-tensor"), ("e5m2-tensor", "e4m3-tensor"), "fp32"),
    "fp8-delayed": (("e4m3-delayed", "e4m3-delayed"), ("e5m2-delayed", "e4m3-delayed"), ("e5m2-delayed", "e4m3-delayed"),
                    "fp32"),
    "fp8-e4m3": (("e4m3-tensor",) * 2, ("e4m3-tensor",) * 2, ("e4m3-tensor",) * 2, "fp32"),
    "fp8-rows": (("e4m3-rows",) * 2, ("e4m3-rows",) * 2, ("e4m3-rows",) * 2, "fp32"),
    "fp8-rows-dw-bf16": (("e4m3-rows",) * 2, ("e4m3-rows",) * 2, ("bf16",) * 2, "fp32"),
    "fp8-blocks": (("e4m3-1x128", "e4m3-128x128"), ("e4m3-1x128", "e4m3-128x128"), ("e4m3-1x128",) * 2, "fp32"),
    "mxfp8": (("mx-e4m3-rceil",) * 2, ("mx-e4m3-rceil",) * 2, ("mx-e4m3-rceil",) * 2, "fp32"),
    "mxfp8-floor": (("mx-e4m3-floor",) * 2, ("mx-e4m3-floor",) * 2, ("mx-e4m3-floor",) * 2, "fp32"),
    "mxfp6": (("mx-e2m3-floor",) * 2, ("mx-e3m2-floor", "mx-e2m3-floor"), ("mx-e3m2-floor", "mx-e2m3-floor"), "fp32"),
    "mxfp4": (("mx-e2m1-floor",) * 2, ("mx-e2m1-floor",) * 2, ("mx-e2m1-floor",) * 2, "fp32"),
    "nvfp4": (("nvfp4", "nvfp4-16x16"), ("nvfp4-sr", "nvfp4-16x16"), ("nvfp4-rotated-sr", "nvfp4-rotated"), "fp32"),
    "fp8-14bit": (("e4m3-tensor",) * 2, ("e4m3-tensor",) * 2, ("e4m3-tensor",) * 2, "e8m14"),
    "fp8-14bit-128": (("e4m3-tensor",) * 2, ("e4m3-tensor",) * 2, ("e4m3-tensor",) * 2, "e8m14/128"),
}  # fmt: skip
OPERANDS = {"linear.y": ("x", "w"), "linear.dx": ("dy", "w"), "linear.dw": ("dy", "x")}


@pytest.mark.parametrize("name", PRODUCTS)
def test_quantized_recipes_differ_from_bf16_in_the_products_of_linear_only(name: str) -> None:
    policy, bf16, (*schemes, acc) = RECIPES[name].policy, RECIPES["bf16"].policy, PRODUCTS[name]
    for (key, operands), pair in zip(OPERANDS.items(), schemes, strict=True):
        row = policy.row(key, "transformer.h.0.mlp.c_fc")
        assert (tuple(map(row.input, operands)), row.acc, row.out) == (pair, acc, "bf16"), key
        assert row.quantizes == any(scheme in SCHEMES for scheme in pair), key
        assert policy.row(key, "lm_head") == Precision("bf16", "fp32", "bf16"), key  # the last layer is left alone
    for key in EVERY_ROW:
        if key != "linear" and key not in OPERANDS:
            assert policy.row(key) == bf16.row(key), key
    assert not policy.in_formats


def test_all_linear_layers_but_the_last_are_quantized() -> None:
    # what delayed scaling remembers has the names of the tensors that were quantized
    layers = tuple(f"transformer.h.0.{layer}" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    recipe, tokens = RECIPES["fp8-delayed"], np.zeros((1, 4), np.int64)
    for model, expected in ((gpt_model(GPTConfig(1, 1, 4, 4)), layers), (mlp_model(MLPConfig(2, 4, 4)), ("h.0.fc", "h.1.fc"))):
        state, run = State(model, recipe.state_encodings(), NUMPY), Run(recipe.policy, NUMPY)
        state.load_weights(model.initial_weights(np.random.default_rng(0)))
        forward_backward(model, [(tokens, tokens)], state, np.float32(1), run)
        seen = {name.removesuffix(".e4m3").removesuffix(".e5m2") for name in run.scales.delayed}
        assert seen == {f"{layer}.{operand}" for layer in expected for operand in ("x", "w", "dy")}


@pytest.mark.parametrize(("name", "acc"), [("fp16-sums", "fp16"), ("fp16-sums-64", "fp16/64/fp16")])
def test_fp16_sums_differ_from_fp16_in_the_accumulator_of_linears_products_only(name: str, acc: str) -> None:
    policy, fp16 = RECIPES[name].policy, RECIPES["fp16"].policy
    for key in EVERY_ROW:
        assert policy.row(key) == (Precision("fp16", acc, "fp16") if key in OPERANDS else fp16.row(key)), key
    assert not policy.in_formats


def test_all_other_policies_know_formats_only() -> None:
    others = set(PRODUCTS) | {"fp16-sums", "fp16-sums-64"}
    assert {name for name, recipe in RECIPES.items() if not recipe.policy.in_formats} == others


def test_no_policy_has_a_row_that_nothing_reads() -> None:
    # a misspelled key would fall back in silence
    for recipe in RECIPES.values():
        assert {row.removeprefix("lm_head:") for row in recipe.policy.rows} <= {*EVERY_ROW, EVERY_OTHER}, recipe.name


def test_every_named_format_scheme_accumulator_and_storage_exists() -> None:
    for recipe in RECIPES.values():
        for key, row in recipe.policy.rows.items():
            inputs = {row.inputs} if isinstance(row.inputs, str) else set(row.inputs.values())
            assert inputs <= {*FORMATS, SAME, *SCHEMES} and row.out in {*FORMATS, SAME}
            # rule 2: 16-bit arrays are storage, never arithmetic, but for sums of products in which this is what is studied
            assert row.acc in ("fp32", "fp64") or (key in OPERANDS and accumulator(row.acc))
        assert {storage for storage in recipe.state.values() if storage} <= set(ENCODINGS)


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


def mechanisms(recipe: Recipe) -> Iterator[tuple[object, ...]]:
    """What a recipe is made of, up to the choice among formats of one width."""
    buffers = recipe.buffers()
    for kind, storage in recipe.state_encodings().items():
        yield kind, type(get_encoding(storage)), buffers[kind].bytes_per_parameter
    yield "loss scale", recipe.loss_scale
    yield "masters from", recipe.masters_from
    yield "lists", recipe.policy.name.rpartition("-")[0] if recipe.policy.name.startswith("autocast") else ""
    for row in recipe.policy.rows.values():
        yield "sums", row.acc.split("/")[0]
        for name in [row.inputs] if isinstance(row.inputs, str) else row.inputs.values():
            if name in SCHEMES:
                yield "scheme", getattr(SCHEMES[name], "func", SCHEMES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_that_stand_for_mechanisms_have_all_of_them(name: str) -> None:
    """Tests leave the others to `-m slow`: one with a storage, a scheme or sums of its own must stand there too."""
    shown = {part for known in MECHANISMS for part in mechanisms(RECIPES[known])}
    assert {*mechanisms(RECIPES[name])} <= shown


def test_a_recipe_that_stands_for_a_mechanism_cannot_be_left_out() -> None:
    """The control: without it something is missing."""
    for known in ("bf16-kahan", "bf16-remainder", "adam-8bit-fp32-embeddings", "fp8-delayed", "mxfp8", "nvfp4"):
        others = {part for other in MECHANISMS if other != known for part in mechanisms(RECIPES[other])}
        assert not {*mechanisms(RECIPES[known])} <= others, known
