"""refimpl.precision.recipes: the states of each recipe and their bytes, loss scales, and policies row by row.

Sources: Micikevicius et al. 2018 and Rajbhandari et al. 2020 (16 bytes per parameter with Adam), torch.autocast's op lists
(autocast_lists.py), and the papers and programs that the recipes name.
"""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from arrays import LOW
from autocast_lists import FP32_INSIDE_ON_CUDA, FP32_ON_CPU, FP32_ON_CUDA, LOW_PRECISION
from recipe_lists import MECHANISMS

from refimpl.backends.numpy.backend import NUMPY
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

# What an encoding stores, in bytes per parameter, by buffer
PARTS: dict[str, dict[str, float]] = {
    "fp64": {"": 8}, "fp32": {"": 4}, "fp16": {"": 2}, "bf16": {"": 2}, "bf16-stochastic": {"": 2},
    "bf16-kahan": {"": 2, "_compensation": 2}, "bf16-remainder": {"": 2, "_remainder": 2},
    "int8-signed": {"": 1, "_scales": 1 / 64}, "int8-unsigned": {"": 1, "_scales": 1 / 64},
    "e4m3-blocks": {"": 1, "_scales": 1 / 64},
    **{f"int8-{s}-embeddings-fp32": {"": 1, "_scales": 1 / 64, "_embeddings": 4} for s in ("signed", "unsigned")},
}  # fmt: skip


def test_every_recipe_says_what_it_is_and_where_it_is_from() -> None:
    assert all(recipe.name == name and recipe.summary and recipe.source for name, recipe in RECIPES.items())
    assert all(tuple(recipe.state) == STATE_KINDS for recipe in RECIPES.values())
    assert "arXiv 1710.03740" in RECIPES["fp16"].source  # which does not treat BF16
    assert [name for name, recipe in RECIPES.items() if "1710.03740" in recipe.source and "bf16" in recipe.state.values()] == []
    assert "Kalamkar et al. 2019, arXiv 1905.12322" in RECIPES["bf16"].source


OWN_MASTERS = {
    "fp64", "fp32", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu", "pure-fp16", "pure-bf16", "bf16-no-master",
    "bf16-sr", "bf16-kahan", "bf16-remainder", "adam-8bit", "adam-8bit-fp32-embeddings", "adam-fp8",
}  # fmt: skip
"""The recipes that update their weights directly."""
COMPENSATED = {"bf16-sr": "stochastic", "bf16-kahan": "kahan", "bf16-remainder": "remainder"} | dict.fromkeys(
    ("adam-8bit", "adam-8bit-fp32-embeddings", "adam-fp8"), "stochastic"
)
"""How 16-bit weights without masters keep, or make up for, what their roundings lose."""
MOMENTS = {
    "fp64": ("fp64", "fp64"), "pure-fp16": ("fp16", "fp16"), "fp16-moments": ("fp16", "fp16"),
    **dict.fromkeys(("pure-bf16", "bf16-kahan", "bf16-moments", "fp8-blocks"), ("bf16", "bf16")),
    "adam-8bit": ("int8-signed", "int8-unsigned"), "adam-fp8": ("e4m3-blocks", "e4m3-blocks"),
    "adam-8bit-fp32-embeddings": ("int8-signed-embeddings-fp32", "int8-unsigned-embeddings-fp32"),
}  # fmt: skip
"""The recipes whose moments are not in FP32."""


@pytest.mark.parametrize("name", RECIPES)
def test_states_are_the_published_algorithms_but_where_a_recipe_is_about_them(name: str) -> None:
    """Weights and gradients in the format of the operations (FP32 under autocast), masters and moments in FP32."""
    recipe = RECIPES[name]
    state, uniform = recipe.state, recipe.policy.row("add").out
    fmt = "fp32" if uniform == SAME else uniform
    assert state["weights"] == (f"{fmt}-{COMPENSATED[name]}" if name in COMPENSATED else fmt)
    assert state["grads"] == ("fp32" if name in ("megatron-bf16", "fp8-blocks") else fmt)
    assert state["main_grads"] == ("fp32" if name == "apex-o2" else "")
    assert state["master"] == ("" if name in OWN_MASTERS else "fp32")
    assert (state["m"], state["v"]) == MOMENTS.get(name, ("fp32", "fp32"))
    assert recipe.state_encodings() == {kind: encoding for kind, encoding in state.items() if encoding}


def test_fp16_products_have_a_loss_scale_unless_all_is_fp16() -> None:
    fp16 = {name for name, recipe in RECIPES.items() if recipe.policy.row("matmul").out == "fp16"}
    assert {name for name, recipe in RECIPES.items() if recipe.loss_scale == "dynamic"} == fp16 - {"pure-fp16"}
    assert {recipe.loss_scale for recipe in RECIPES.values()} == {"dynamic", "none"}


def test_masters_start_from_the_original_weights_but_where_the_source_rounds_them() -> None:
    assert {name for name, recipe in RECIPES.items() if recipe.masters_from == "rounded"} == {"megatron-bf16", "apex-o2"}
    assert {recipe.masters_from for recipe in RECIPES.values()} == set(MASTERS_FROM)


# With AdamW, SGD with momentum, plain SGD, and AdamW over several micro-batches (sums in FP32: 16-bit grads become 4 bytes)
PUBLISHED = {
    "fp16": (16, 12, 8, 18),  # 2 + 2 + 4 + 4 + 4
    "amp-bf16": (16, 12, 8, 16),
    "pure-bf16": (8, 6, 4, 10),
    "bf16-kahan": (10, 8, 6, 12),  # 2 of compensation
    "bf16-remainder": (14, 10, 6, 16),  # 2 + 2 are weights and masters
    "adam-8bit": (6 + 2 / 64, 5 + 1 / 64, 4, 8 + 2 / 64),  # a scale is 4 / 256 for m, and for v
    "megatron-bf16": (18, 14, 10, 18),  # FP32 gradients already
    "apex-o2": (20, 16, 12, 18),  # sums over micro-batches are the FP32 gradients: no second copy
}


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_the_sum_of_the_parts(name: str) -> None:
    """What only embeddings have is not counted."""
    recipe, measured = RECIPES[name], []
    for moments, grad_accum in ((("m", "v"), 1), (("m",), 1), ((), 1), (("m", "v"), 2)):
        kept = recipe.state_encodings(moments, grad_accum)
        parts = {kind + part: size for kind, name in kept.items() for part, size in PARTS[name].items()}
        buffers = recipe.buffers(moments, grad_accum)
        assert {buffer: part.bytes_per_parameter for buffer, part in buffers.items()} == parts
        measured.append(recipe.bytes_per_parameter(moments, grad_accum))
        assert measured[-1] == sum(size for part, size in parts.items() if not part.endswith("_embeddings"))
    assert all(isinstance(size, Fraction) for size in measured)
    assert tuple(measured) == PUBLISHED.get(name, tuple(measured))


def test_every_encoding_is_used_and_is_in_the_table_above() -> None:
    used = {encoding for recipe in RECIPES.values() for encoding in recipe.state.values() if encoding}
    assert used == set(ENCODINGS) == set(PARTS)


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

EVERY_ROW = [
    "linear", "linear.y", "linear.dx", "linear.dw", "linear.db", "matmul", "attention.scores", "attention.scale",
    "attention.softmax", "attention.wide_softmax", "attention.values", "softmax", "rope", "layernorm", "rmsnorm",
    "llama_rmsnorm", "add", "relu", "silu", "swiglu", "gelu_tanh", "gelu_new", "gelu_erf", "embedding", "cross_entropy",
    "fan_in", "reshape", "transpose", "split", "cast",
]  # fmt: skip

PART_OF_ATTENTION = {"attention.scores": "matmul", "attention.values": "matmul", "attention.softmax": "softmax"}
WIDE_ROWS = {"cross_entropy", "attention.wide_softmax"}
"""FP32 whatever the format: the loss, and the softmax for which transformers' Llama asks by name."""


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(("suffix", "fp32_list"), [("", FP32_ON_CUDA), ("-cpu", FP32_ON_CPU)], ids=["cuda", "cpu"])
def test_autocast_rows(low: str, suffix: str, fp32_list: set[str]) -> None:
    policy = RECIPES[f"amp-{low}{suffix}"].policy
    assert policy.name == f"autocast-{'cpu' if suffix else 'cuda'}-{low}"
    for key in EVERY_ROW:
        op = PART_OF_ATTENTION.get(key, key.partition(".")[0])
        fmt = low if op in LOW_PRECISION else "fp32" if op in fp32_list or key in WIDE_ROWS else SAME
        out = "fp32" if key in FP32_INSIDE_ON_CUDA and not suffix else fmt
        assert policy.row(key) == Precision(fmt, "fp32", out), key


def test_the_two_autocasts_differ_in_softmax_and_norms_only() -> None:
    for low in LOW:
        cuda, cpu = RECIPES[f"amp-{low}"].policy, RECIPES[f"amp-{low}-cpu"].policy
        differ = {key for key in EVERY_ROW if cuda.row(key) != cpu.row(key)}
        assert differ == {"attention.softmax", "softmax", "layernorm", "rmsnorm", *FP32_INSIDE_ON_CUDA}


@pytest.mark.parametrize(("name", "fmt", "acc"), [
    ("fp64", "fp64", "fp64"), ("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp32"), ("bf16", "bf16", "fp32"),
    ("pure-fp16", "fp16", "fp32"), ("pure-bf16", "bf16", "fp32"), ("apex-o2", "fp16", "fp32"),
    *((name, "bf16", "fp32") for name in ("bf16-no-master", "bf16-sr", "bf16-kahan", "bf16-remainder", "bf16-moments",
                                          "fp16-moments", "adam-8bit", "adam-fp8", "megatron-bf16")),
])  # fmt: skip
def test_uniform_policies_keep_one_format_and_the_loss_in_the_wide_one(name: str, fmt: str, acc: str) -> None:
    policy = RECIPES[name].policy
    for key in EVERY_ROW:
        expected = Precision(acc, acc, acc) if key in WIDE_ROWS else Precision(fmt, acc, fmt)
        assert policy.row(key) == expected, key


def test_every_operation_is_in_the_list_above() -> None:
    assert {op.key for op in OPS.values()} | {"fan_in"} <= {key.partition(".")[0] for key in EVERY_ROW}


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


def test_every_named_format_scheme_accumulator_and_encoding_exists() -> None:
    for recipe in RECIPES.values():
        for key, row in recipe.policy.rows.items():
            inputs = {row.inputs} if isinstance(row.inputs, str) else set(row.inputs.values())
            assert inputs <= {*FORMATS, SAME, *SCHEMES} and row.out in {*FORMATS, SAME}
            # rule 2: 16-bit arrays are encoding, never arithmetic, but for sums of products in which this is what is studied
            assert row.acc in ("fp32", "fp64") or (key in OPERANDS and accumulator(row.acc))
        assert {encoding for encoding in recipe.state.values() if encoding} <= set(ENCODINGS)


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
    for kind, encoding in recipe.state_encodings().items():
        yield kind, type(get_encoding(encoding)), buffers[kind].bytes_per_parameter
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
    """Tests leave the others to `-m slow`: one with an encoding, a scheme or sums of its own must stand there too."""
    shown = {part for known in MECHANISMS for part in mechanisms(RECIPES[known])}
    assert {*mechanisms(RECIPES[name])} <= shown


def test_a_recipe_that_stands_for_a_mechanism_cannot_be_left_out() -> None:
    """The control: without it something is missing."""
    for known in ("bf16-kahan", "bf16-remainder", "adam-8bit-fp32-embeddings", "fp8-delayed", "mxfp8", "nvfp4"):
        others = {part for other in MECHANISMS if other != known for part in mechanisms(RECIPES[other])}
        assert not {*mechanisms(RECIPES[known])} <= others, known
