"""GGUF files: every value as the package `gguf` dequantizes it, q and k rows in Hugging Face's order, the tokenizer, refusals.

What would turn this red: rows that stay permuted; an eps that keeps FP32's digits; a tokenizer that ignores `pre`; SmolLM2-135M
(-m slow) with one value that is not that of transformers' own loader.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import LLAMA, model_of, tensors_of
from paths import SCRIPTS
from real_weights import smollm2_gguf

from refimpl.errors import UsageError
from refimpl.numerics.casts import cast
from refimpl.training.huggingface.config_json import read_config
from refimpl.training.huggingface.export import convert_gguf
from refimpl.training.huggingface.gguf import read_gguf, unpermuted
from refimpl.training.huggingface.weights import read_model

THEIRS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip
TOKENS = ["<|end|>", "<|begin|>", "a", "b", "ab", "1", "2", "Ġ", "ĠĠ", "12", "abc", "c", "<user>"]
METADATA: dict[str, Any] = {
    "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "rope.freq_base": 1e5,
    "rope.dimension_count": 8, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def permuted(w: np.ndarray, n_head: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py permutes."""
    return w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    arch: str = "llama",
    pre: str | None = "smollm",
    kind: Any = None,
    add_bos: bool | None = None,
    **changes: Any,
) -> Path:
    """Write tensors under Hugging Face's names as GGUF has them. changes: of METADATA; None leaves a key out."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**METADATA, **changes}.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
                type(value)
            ]
            add(f"{arch}.{key}", value)
    if pre is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 3), 4])
        writer.add_token_merges(["a b", "Ġ Ġ", "1 2"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(0)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        writer.add_chat_template("{{ messages }}")
    for name, array in tensors.items():
        words = name.removeprefix("model.layers.").split(".", 1)
        if words[0].isdigit():
            stem, ending = words[1].rsplit(".", 1)
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(stem)
            array = array if heads is None else permuted(array, heads)
            name = f"blk.{words[0]}.{THEIRS.get(stem, stem)}.{ending}"
        else:
            stem, ending = name.rsplit(".", 1)
            name = f"{THEIRS.get(stem, stem)}.{ending}"
        if kind is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_q_and_k_rows_come_back_in_order() -> None:
    w = np.arange(48.0).reshape(16, 3)
    assert unpermuted(permuted(w, 2), 2).tolist() == w.tolist()
    assert unpermuted(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # of neighbors (2i, 2i + 1): first all firsts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_file_becomes_a_folder_with_every_value(tied: bool, bias: bool, tmp_path: Path) -> None:
    table = {**LLAMA, "rope_theta": 1e5, "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    tensors = tensors_of(table)
    file = write_gguf(tmp_path / "x.gguf", tensors)
    convert_gguf(file, tmp_path / "hf")
    model, weights, notes = read_model(tmp_path / "hf")
    assert notes == () and model.config == model_of(table).config
    assert model.config["norm_eps"] == 1e-5 and model.config["rope_theta"] == 1e5
    for name, array in tensors.items():
        np.testing.assert_array_equal(weights[name], array)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 0, None)


def test_quantized_blocks_and_16_bit_values(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tensors = tensors_of({**LLAMA, "intermediate_size": 64})
    for name in ("Q8_0", "Q4_1", "F16", "BF16"):
        kind = getattr(gguf.GGMLQuantizationType, name)
        read = read_gguf(write_gguf(tmp_path / name, tensors, kind=kind, feed_forward_length=64))
        q, down = (f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "mlp.down_proj"))
        there = gguf.dequantize(gguf.quantize(permuted(tensors[q], 4), kind), kind)
        np.testing.assert_array_equal(read.tensors[q], unpermuted(there, 4))
        np.testing.assert_array_equal(read.tensors[down], gguf.dequantize(gguf.quantize(tensors[down], kind), kind))
        assert read.tensors[down].dtype == np.float32 and not np.array_equal(read.tensors[down], tensors[down])


@pytest.mark.parametrize(("changes", "message"), [
    ({"arch": "gemma"}, "has the architecture 'gemma': only llama is converted"),
    ({"expert_count": 8}, "has 8 experts"),
    ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', not 'none' or 'linear'"),
    ({"rope.dimension_count": 4}, "llama.rope.dimension_count is 4, not 8"),
    ({"block_count": None}, "llama.block_count is None, not an integer"),
    ({"attention.head_count_kv": [2, 2]}, "llama.attention.head_count_kv is a list of 2"),
    ({"attention.head_count": 0}, "llama.attention.head_count is 0"),
])  # fmt: skip
def test_what_is_not_converted_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", tensors_of(LLAMA), **changes)
    with pytest.raises(UsageError, match=message):
        convert_gguf(file, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_linear_scaling_and_a_head_dim_of_its_own(tmp_path: Path) -> None:
    table = {**LLAMA, "head_dim": 16}
    changes = {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
        "attention.key_length": 16,
        "rope.dimension_count": 16,
    }
    convert_gguf(write_gguf(tmp_path / "x.gguf", tensors_of(table), **changes), tmp_path / "hf")
    sizes = read_config(tmp_path / "hf").sizes
    assert sizes["rope_scaling"] == "linear,factor=4.0" and sizes["head_dim"] == 16


@pytest.mark.parametrize(("factor", "theta", "D"), [(32.0, 5e5, 64), (8.0, 5e5, 128)])  # Llama-3.2-1B, Llama-3.1-8B
def test_llama3_scaling_is_read_from_its_divisors(factor: float, theta: float, D: int, tmp_path: Path) -> None:
    table = {**LLAMA, "head_dim": D}
    turns = 8192 / (2 * np.pi) * theta ** (-np.arange(0, D, 2) / D)  # over the original context; as llama.cpp's converter
    share = np.clip((turns - 1) / 3, 0, 1)
    divisors = cast(1 / ((1 - share) / factor + share), "fp32")
    changes = {"attention.key_length": D, "rope.dimension_count": D, "rope.freq_base": theta}

    def file(numbers: np.ndarray) -> Path:
        return write_gguf(tmp_path / "x.gguf", tensors_of(table) | {"rope_freqs.weight": numbers}, **changes)

    convert_gguf(file(divisors), tmp_path / "hf")
    assert read_config(tmp_path / "hf").sizes["rope_scaling"] == f"llama3,factor={factor},low=1.0,high=4.0,original=8192"
    for wrong in (divisors * np.float32(1.001), divisors[:-1], divisors[::-1].copy(), np.full(D // 2, 2, np.float32)):
        with pytest.raises(UsageError, match=r"rope_freqs\.weight that are not llama3's"):
            convert_gguf(file(wrong), tmp_path / "other")


def test_tensors_that_a_llama_lacks_are_refused(tmp_path: Path) -> None:
    for name, message in (
        ("rope_freqs", "rope_freqs.weight that are not llama3's"),
        ("v.patch", "v.patch.weight, which"),
    ):
        file = write_gguf(tmp_path / name, tensors_of(LLAMA) | {f"{name}.weight": np.zeros(4, np.float32)})
        with pytest.raises(UsageError, match=message):
            convert_gguf(file, tmp_path / "hf")
    tensors = tensors_of(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UsageError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(write_gguf(tmp_path / "missing", tensors), tmp_path / "hf")
    with pytest.raises(UsageError, match=r"model\.norm\.weight has shape \(31,\)"):
        convert_gguf(
            write_gguf(tmp_path / "s", tensors_of(LLAMA) | {"model.norm.weight": np.zeros(31, np.float32)}), tmp_path / "hf"
        )
    assert not (tmp_path / "hf").exists()


def test_damaged_files_and_folders_in_use(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", tensors_of(LLAMA))
    whole = file.read_bytes()
    for n in (0, 3, 8, 30, 300, len(whole) // 2, len(whole) - 200):
        (tmp_path / "cut").write_bytes(whole[:n])
        with pytest.raises(UsageError, match="is not a valid GGUF file") as caught:
            convert_gguf(tmp_path / "cut", tmp_path / "hf")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="there is no"):
        convert_gguf(tmp_path / "missing", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UsageError, match="exists and is not empty"):
        convert_gguf(file, tmp_path)


def test_without_the_package_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install gguf$"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "hf")


# -- the tokenizer -----------------------------------------------------------------------------------------------------------


def test_the_tokenizer_splits_digits_as_pre_says(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tensors = tensors_of({**LLAMA, "vocab_size": len(TOKENS)})
    for pre, tokens in (
        ("smollm", ["ĠĠ", "1", "2", "ab", "c", "<|end|>"]),
        ("gpt-2", ["Ġ", "Ġ", "12", "ab", "c", "<|end|>"]),
        ("llama-bpe", ["<|begin|>", "Ġ", "Ġ", "12", "abc", "<|end|>"]),
    ):
        folder = tmp_path / pre
        convert_gguf(write_gguf(tmp_path / "x.gguf", tensors, pre=pre), folder)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert tokenizer.encode("  12abc<|end|>").tokens == tokens
        assert tokenizer.decode([2, 7, 11], skip_special_tokens=False) == "a c"
        table = json.loads((folder / "tokenizer.json").read_text())
        assert [(token["id"], token["special"]) for token in table["added_tokens"]] == [(0, True), (1, True), (12, False)]
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>") and "pad_token" not in config
        assert config["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(("pre", "said", "begins"), [
    ("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False),
])  # fmt: skip
def test_a_text_begins_with_bos_where_the_file_says_so(pre: str, said: bool | None, begins: bool, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tensors = tensors_of({**LLAMA, "vocab_size": len(TOKENS)})
    convert_gguf(write_gguf(tmp_path / "x.gguf", tensors, pre=pre, add_bos=said), tmp_path / "hf")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert tokenizer.encode("ab").tokens == ["<|begin|>"] * begins + ["ab"]
    assert tokenizer.encode("ab", "c").tokens == (["<|begin|>"] * begins + ["ab"]) + (["<|begin|>"] * begins + ["c"])


def test_an_unknown_pre_is_said_and_the_weights_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_gguf(write_gguf(tmp_path / "x.gguf", tensors_of(LLAMA), pre="qwen2"), tmp_path / "hf")
    message = "note: no tokenizer.json was written: tokenizer.ggml.pre is 'qwen2', not smollm or gpt-2 or llama-bpe"
    assert message in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    convert_gguf(write_gguf(tmp_path / "x.gguf", tensors_of(LLAMA), pre=None), tmp_path / "hf2")
    assert "tokenizer.ggml.model is None" in capsys.readouterr().out


# -- real weights ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_gguf(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.slow  # 538 MB, and a minute
def test_smollm2_is_what_transformers_makes_of_it_on_all_272_tensors(smollm2: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    for name in ("torch", "accelerate", "gguf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"transformers' loader needs {name}")
    command = [sys.executable, str(SCRIPTS / "convert.py"), "gguf", str(smollm2), str(tmp_path / "hf")]
    subprocess.run(command, check=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    model, weights, _ = read_model(tmp_path / "hf")
    expected = dict(theirs.named_parameters())
    assert len(weights) == len(expected) == 272 and model.n_params == 134_515_008
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor.detach().float().numpy())
    assert model.config["norm_eps"] == 1e-5 and model.config["rope_theta"] == 1e5 and model.config["tied"]
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert tokenizer.encode("=  12").tokens == ["=", "ĠĠ", "1", "2"]  # transformers' own: Ġ Ġ 1 2
