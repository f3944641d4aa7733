"""config.json: the sizes of our models, and everything that our models do not compute refused by name.

What would turn this red: a default that is not transformers'; a rope_type, window, activation or bias that is read past; a
number that is changed on the way out and in.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import UsageError
from refimpl.nn.models.registry import make_model
from refimpl.nn.rope_scaling import RopeScaling
from refimpl.training.huggingface.config_json import config_table, described, is_hugging_face, read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
SIZES: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "head_dim": 8, "ffn_dim": 48, "block_size": 128, "vocab_size": 64,
    "rope_theta": 10000.0, "rope_scaling": "default", "norm_eps": 1e-6, "qk_norm": False, "qkv_bias": False, "o_bias": False,
    "mlp_bias": False, "tied": False,
}  # fmt: skip


def sizes(**keys: Any) -> dict[str, Any]:
    return described({**LLAMA, **keys}, "F").sizes


def refusal(table: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        described(table, "F")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_sizes_of_a_llama_with_defaults() -> None:
    assert sizes() == SIZES
    without = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert described(without, "F").sizes["n_kv_head"] == 4
    assert sizes(num_key_value_heads=None)["n_kv_head"] == 4
    assert sizes(head_dim=None)["head_dim"] == 8 and sizes(head_dim=16)["head_dim"] == 16


def test_a_published_config() -> None:  # SmolLM2-135M's, as transformers 4 wrote it
    table = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "vocab_size": 49152,
    }  # fmt: skip
    assert described(table, "F").sizes == {
        "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "head_dim": 64, "ffn_dim": 1536, "block_size": 8192,
        "vocab_size": 49152, "rope_theta": 100000.0, "rope_scaling": "default", "norm_eps": 1e-05, "qk_norm": False,
        "qkv_bias": False, "o_bias": False, "mlp_bias": False, "tied": True,
    }  # fmt: skip


def test_which_biases_and_norms_a_family_has() -> None:
    def flags(**keys: Any) -> list[str]:
        return [name for name in ("qk_norm", "qkv_bias", "o_bias", "mlp_bias") if sizes(**keys)[name]]

    assert flags() == []
    assert flags(attention_bias=True) == ["qkv_bias", "o_bias"] and flags(mlp_bias=True) == ["mlp_bias"]
    assert flags(model_type="mistral", sliding_window=None) == []
    assert flags(model_type="mistral", sliding_window=None, attention_bias=True, mlp_bias=True) == []  # no keys of its class
    assert flags(model_type="qwen2") == ["qkv_bias"] and flags(model_type="qwen2", attention_bias=True) == ["qkv_bias"]
    assert flags(model_type="qwen3") == ["qk_norm"]
    assert flags(model_type="qwen3", attention_bias=True) == ["qk_norm", "qkv_bias", "o_bias"]
    assert sizes(model_type="qwen3")["head_dim"] == 128 and sizes(model_type="qwen3", head_dim=8)["head_dim"] == 8


@pytest.mark.parametrize(("keys", "theta", "scaling"), [
    ({"rope_theta": 100000}, 1e5, "default"),
    ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, "default"),
    ({"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 1e5}, 1e5, "linear,factor=4"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}, 1e5, "linear,factor=4"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}}, 1e6, "default"),
    ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0}, 5.0, "default"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1e4, "dynamic,factor=2,original=128"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}},
     1e4, "llama3,factor=32,low=1,high=4,original=8192"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
     1e4, "yarn,factor=4,original=32"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 1.25, "truncate": False}}, 1e4,
     "yarn,factor=4,original=128,beta_fast=16,attention_factor=1.25,truncate=0"),
    ({"partial_rotary_factor": 1.0}, 1e4, "default"),
])  # fmt: skip
def test_rotary_positions_in_the_layouts_of_transformers_4_and_5(keys: dict[str, Any], theta: float, scaling: str) -> None:
    found = sizes(**keys)
    assert found["rope_theta"] == theta and RopeScaling.parse(found["rope_scaling"]) == RopeScaling.parse(scaling)


@pytest.mark.parametrize(("keys", "message"), [
    ({"model_type": "gemma2"}, "F has model_type 'gemma2': the supported models are llama, mistral, qwen2, qwen3, gpt2"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"num_attention_heads": None}, "num_attention_heads is None, not an integer from 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"hidden_size": 1e30}, "hidden_size"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"hidden_act": "gelu"}, "F has hidden_act 'gelu': our llama has silu only"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ({"add_cross_attention": True}, "cross-attention"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "unknown rope_type 'longrope'"),
    ({"rope_scaling": {"rope_type": "su"}}, "unknown rope_type 'su': choose one of default, linear, dynamic, llama3, yarn"),
    ({"rope_parameters": {"rope_type": "proportional"}}, "unknown rope_type 'proportional'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing, which rope_type linear needs"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor is missing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "rope_scaling.factor is '4', not a number"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale 0.7"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_type is 3"),
    ({"rope_scaling": [1]}, "rope_scaling is a list"),
    ({"partial_rotary_factor": 0.5}, "F has partial_rotary_factor 0.5: our llama has 1"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type, such as 'full_attention'"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}, "layer_types with 'linear_attention'"),
    ({"model_type": "qwen2", "layer_types": 7}, "layer_types"),
])  # fmt: skip
def test_what_our_llama_does_not_compute_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    assert message in refusal({**LLAMA, **keys})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_a_size_that_is_missing_is_named(name: str) -> None:
    assert refusal({key: value for key, value in LLAMA.items() if key != name}) == f"F: {name} is missing"


def test_a_config_without_a_model_type_and_tables_that_are_none() -> None:
    assert refusal({}).startswith("F has no model_type")
    assert refusal({"architectures": ["LlamaForCausalLM"]}).startswith("F has no model_type")
    with pytest.raises(UsageError, match="F: it is a list of 0, not a table"):
        described([], "F")
    mistral = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"} | {"model_type": "mistral"}
    assert refusal(mistral) == "F: num_key_value_heads is missing"


def test_a_sliding_window_shortens_the_positions_and_says_so() -> None:
    for keys in (
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
        {"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
    ):
        found = described({**LLAMA, **keys}, "F")
        assert found.sizes["block_size"] == 16
        assert found.notes == ("F has a sliding window of 16 tokens: of its 128 positions the first 16 are used",)
    for keys in (
        {"sliding_window": 16},  # llama has none
        {"model_type": "mistral", "sliding_window": 128}, {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral"},  # 4096
        {"model_type": "qwen2", "sliding_window": 16},
        {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False},
        {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True},  # from layer 28 on
        {"model_type": "qwen3", "sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
        {"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
    ):  # fmt: skip
        found = described({**LLAMA, **keys}, "F")
        assert found.sizes["block_size"] == 128 and found.notes == (), keys
    long = {**LLAMA, "max_position_embeddings": 8192}
    for kind, positions in (("mistral", 4096), ("qwen2", 8192), ("llama", 8192)):  # a mistral has a window unless it is null
        assert described({**long, "model_type": kind}, "F").sizes["block_size"] == positions


def test_the_sizes_of_a_gpt2() -> None:
    found = described(GPT2, "F")
    assert found.model == "gpt"
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 32, "vocab_size": 64, "activation": "gelu_new"}
    assert found.sizes == sizes and found.notes == ()
    other = described({**GPT2, "activation_function": "gelu_pytorch_tanh", "n_inner": 64}, "F")
    assert other.sizes == {**sizes, "activation": "gelu_tanh"}
    assert "reorder_and_upcast_attn" in described({**GPT2, "reorder_and_upcast_attn": True}, "F").notes[0]


@pytest.mark.parametrize(("keys", "message"), [
    ({"activation_function": "gelu"}, "F has activation_function 'gelu'"),
    ({"n_inner": 32}, "F has n_inner 32: our gpt has 64 only"),
    ({"layer_norm_epsilon": 1e-6}, "F has layer_norm_epsilon 1e-06: our gpt has 1e-05 only"),
    ({"scale_attn_weights": False}, "scale_attn_weights False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ({"n_head": None}, "n_head is None"),
])  # fmt: skip
def test_what_our_gpt_does_not_compute_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    assert message in refusal({**GPT2, **keys})


def test_files_that_cannot_be_read_and_folders_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UsageError, match=r"there is no .*config\.json"):
        read_config(tmp_path)
    for text in ("{", "[" * 100_000, "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UsageError, match="cannot be read"):
            read_config(tmp_path)
        assert not is_hugging_face(tmp_path)
    path.write_text(json.dumps({"model": "gpt", "n_layer": 1}))  # a run of ours
    assert not is_hugging_face(tmp_path) and not is_hugging_face(tmp_path / "missing")
    path.write_text(json.dumps(LLAMA))
    assert is_hugging_face(tmp_path) and read_config(tmp_path) == read_config(path) == described(LLAMA, str(path))


@pytest.mark.parametrize("changes", [
    {}, {"tied": True}, {"qkv_bias": True}, {"qkv_bias": True, "head_dim": 16}, {"qkv_bias": True, "o_bias": True},
    {"mlp_bias": True},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True}, {"qk_norm": True}, {"qk_norm": True, "head_dim": 16},
    {"qk_norm": True, "qkv_bias": True, "o_bias": True}, {"head_dim": 16}, {"rope_theta": 5e5, "norm_eps": 1e-5},
    {"rope_scaling": "linear,factor=4.0"}, {"rope_scaling": "dynamic,factor=2.5,original=128"},
    {"rope_scaling": "llama3,factor=32.0,low=1.0,high=4.0,original=8192"},
    {"rope_scaling": "yarn,factor=4.0,original=1e6,beta_fast=16,truncate=0"},
    {"rope_scaling": "yarn,factor=4,original=32,attention_factor=1.1"},
])  # fmt: skip
def test_out_and_in_again(changes: dict[str, Any]) -> None:
    ours = {**SIZES, **changes}
    table = json.loads(json.dumps(config_table("llama", ours, "bf16")))
    again = described(table, "F")
    assert again.notes == () and table["dtype"] == table["torch_dtype"] == "bfloat16"
    assert RopeScaling.parse(again.sizes.pop("rope_scaling")) == RopeScaling.parse(ours["rope_scaling"])
    assert again.sizes == {key: value for key, value in ours.items() if key != "rope_scaling"}
    assert make_model("llama", {**ours, **again.sizes}).n_params == make_model("llama", ours).n_params


def test_the_length_that_dynamic_scaling_begins_at_is_written() -> None:
    ours = {**SIZES, "block_size": 64, "rope_scaling": "dynamic,factor=2,original=128"}
    table = config_table("llama", ours, "fp32")  # transformers takes it from max_position_embeddings
    assert (
        table["max_position_embeddings"] == 128
        and described(table, "F").sizes["rope_scaling"] == "dynamic,factor=2.0,original=128"
    )


def test_the_table_of_a_gpt_and_the_ids_of_tokens() -> None:
    ours = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 32, "vocab_size": 64}
    for more in ({}, {"activation": "gelu_new"}):
        table = config_table("gpt", ours | more, "fp32", {"eos_token_id": 5})
        found = described(table, "F")
        assert make_model("gpt", found.sizes).config == ours | more and found.notes == ()
    assert (table["bos_token_id"], table["eos_token_id"], table["pad_token_id"]) == (None, 5, None)
    assert table["architectures"] == ["GPT2LMHeadModel"] and table["dtype"] == "float32"


@pytest.mark.parametrize("changes", [
    {"qk_norm": True, "qkv_bias": True}, {"qk_norm": True, "mlp_bias": True}, {"o_bias": True},
    {"qkv_bias": True, "mlp_bias": True},
])  # fmt: skip
def test_sizes_that_no_architecture_has_are_not_exported(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Hugging Face has no llama, qwen2 or qwen3 with qk_norm"):
        config_table("llama", {**SIZES, **changes}, "fp32")
    with pytest.raises(UsageError, match="no architecture for a model 'mlp'"):
        config_table("mlp", {}, "fp32")
    with pytest.raises(UsageError, match="hidden_size 30 is a multiple of num_attention_heads 4"):
        config_table("llama", {**SIZES, "n_embd": 30}, "fp32")
