"""Tensors of folders: every bit under our names, one at a time in memory; and damaged or foreign files refused in one line.

What would turn this red: a tensor that is read before all are checked; a transpose that is left out; an entry of a header that
is used unchecked; a copy of all weights.
"""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_folders import GPT2, LLAMA, model_of, tensors_of, write
from safetensors.numpy import load_file, save_file

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.numerics.casts import cast
from refimpl.optim.state import State
from refimpl.precision.recipes import get_recipe
from refimpl.training.checkpoint_states import read_weights
from refimpl.training.huggingface import weights as weights_module
from refimpl.training.huggingface.files import map_tensors, read_folder, write_files
from refimpl.training.huggingface.weights import read_model

INDEX = "model.safetensors.index.json"


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_value_of_a_llama_in_one_file_and_in_shards(shards: int, dtype: Any, tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA, dtype)
    model, weights, notes = read_model(write(tmp_path / "m", LLAMA, tensors, shards))
    assert model.name == "llama" and notes == () and list(weights) == list(model.parameters) and len(weights) == len(tensors)
    for name, array in tensors.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], cast(array, "fp32"))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_every_value_of_a_gpt2_transposed(prefix: str, tmp_path: Path) -> None:
    tensors = tensors_of(GPT2)
    masks = {
        f"{prefix}h.{i}.attn.{name}": np.ones((1, 1, 8, 8), np.float32) for i in (0, 1) for name in ("bias", "masked_bias")
    }
    renamed = {prefix + name.removeprefix("transformer."): array for name, array in tensors.items()}
    model, weights, _ = read_model(write(tmp_path / "m", GPT2, renamed | masks))
    assert model.name == "gpt" and list(weights) == list(model.parameters)
    for name, array in tensors.items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        np.testing.assert_array_equal(weights[name], array.T if transposed else array)
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (48, 16)


def test_old_rotary_buffers_are_ignored_and_the_first_word_may_be_absent(tmp_path: Path) -> None:
    table = {**LLAMA, "tie_word_embeddings": True}
    tensors = tensors_of(table)
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    bare |= {"layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32), "rotary_emb.inv_freq": np.zeros(1, np.float32)}
    _, weights, _ = read_model(write(tmp_path / "m", table, bare))
    for name, array in tensors.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_tied_head_may_be_absent_an_equal_copy_or_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_ROWS", 7)
    table = {**LLAMA, "tie_word_embeddings": True}
    tensors = tensors_of(table)
    E = tensors["model.embed_tokens.weight"]
    without = {name: array for name, array in tensors.items() if name != "model.embed_tokens.weight"}
    for n, more in enumerate(({"lm_head.weight": E}, {})):
        _, weights, _ = read_model(write(tmp_path / str(n), table, tensors | more))
        assert len(weights) == len(tensors)
    _, weights, _ = read_model(write(tmp_path / "head", table, without | {"lm_head.weight": E}))
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], E)
    other = E.copy()
    other[-1, -1] += 1
    assert "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them" in refusal(
        write(tmp_path / "other", table, tensors | {"lm_head.weight": other})
    ) or "model.embed_tokens.weight differs from lm_head.weight" in refusal(tmp_path / "other")
    untied = {**table, "tie_word_embeddings": False}
    assert "has no lm_head.weight, and its config.json does not tie it" in refusal(write(tmp_path / "un", untied, tensors))
    _, weights, _ = read_model(write(tmp_path / "un", untied, tensors | {"lm_head.weight": other}))
    np.testing.assert_array_equal(weights["lm_head.weight"], other)


def test_memory_is_that_of_the_states_and_one_tensor(tmp_path: Path) -> None:
    table = {**LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512}
    folder = write(tmp_path / "m", table, tensors_of(table, np.float16), 3)
    largest = 4 * 128 * 512
    tracemalloc.start()
    model, weights, _ = read_weights(folder)
    state = State(model, get_recipe("bf16").state_encodings(), NUMPY)
    before = tracemalloc.get_traced_memory()[0]
    assert before < state.nbytes + largest  # nothing but the states, although all is checked
    tracemalloc.reset_peak()
    state.load_weights(weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - before <= largest + 100_000  # 100 kB: Python's own objects
    np.testing.assert_array_equal(state.views("master")["model.norm.weight"], weights["model.norm.weight"])


# -- damage ------------------------------------------------------------------------------------------------------------------


def test_a_file_cut_at_every_length_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", GPT2, tensors_of(GPT2))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for n in (0, 4, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        refusal(folder)
    file.write_bytes(whole)
    read_model(folder)


def test_a_truncated_shard_and_an_index_that_contradicts_its_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", LLAMA, tensors_of(LLAMA), 3)
    second = folder / "model-00002-of-00003.safetensors"
    whole, index = second.read_bytes(), json.loads((folder / INDEX).read_text())
    second.write_bytes(whole[:-1])
    assert f"{second} is truncated: it has {len(whole) - 1:,} bytes" in refusal(folder)
    second.unlink()
    assert f"{folder / INDEX} names {second.name} for " in refusal(folder)
    second.write_bytes(whole)

    def changed(change: Callable[[dict[str, Any]], Any]) -> str:
        table = json.loads(json.dumps(index))
        change(table["weight_map"])
        (folder / INDEX).write_text(json.dumps(table))
        return refusal(folder)

    name = "model.norm.weight"
    assert f"has a tensor {name} that {INDEX} does not name" in changed(lambda names: names.pop(name))
    assert "model.layers.7.x" in changed(lambda names: names.update({"model.layers.7.x": second.name}))
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    assert name in changed(lambda names: names.update({name: other}))
    assert "not a name in this folder" in changed(lambda names: names.update({name: "../other.safetensors"}))
    assert "not a name in this folder" in changed(lambda names: names.update({name: 3}))
    (folder / INDEX).write_text(json.dumps({"metadata": {}}))
    assert "weight_map is missing" in refusal(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "has a twice" in refusal(folder)


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", LLAMA, tensors_of(LLAMA), 2)
    first = folder / "model-00001-of-00002.safetensors"
    second = load_file(folder / "model-00002-of-00002.safetensors")
    name = next(iter(second))
    save_file(load_file(first) | {name: second[name]}, first)
    assert f"{first} has a tensor {name} that {INDEX} says is in model-00002-of-00002.safetensors" in refusal(folder)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of a safetensors file."""
    data = path.read_bytes()
    n = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:n])
    changed = change(table)
    text = (changed if isinstance(changed, str) else json.dumps(table)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[n:])


@pytest.mark.parametrize(("change", "message"), [
    (lambda entry: entry.update(dtype="F8_E4M3"), "is 'F8_E4M3', FP8: weights that are stored with scales"),
    (lambda entry: entry.update(dtype="I8"), "is 'I8', not a floating-point format; supported are F64, F32, F16, BF16"),
    (lambda entry: entry.update(dtype=["F32"]), "not a floating-point format"),
    (lambda entry: entry.update(shape=[1]), "the entry of .* is damaged"),
    (lambda entry: entry.update(shape=[-16]), "damaged"),
    (lambda entry: entry.update(shape=[16.0]), "damaged"),
    (lambda entry: entry.update(shape=[2**40, 2**40]), "damaged"),
    (lambda entry: entry.update(data_offsets=[64, 0]), "damaged"),
    (lambda entry: entry.update(data_offsets=[0]), "damaged"),
    (lambda entry: entry.update(data_offsets=[2**40, 2**40 + 64]), "is truncated"),
    (lambda entry: entry.pop("shape"), "damaged"),
    (lambda entry: entry.update(data_offsets=[0, 64]), "two of its tensors share bytes"),
])  # fmt: skip
def test_a_damaged_header_is_refused(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", GPT2, tensors_of(GPT2))
    rewritten(folder / "model.safetensors", lambda table: change(table["transformer.h.1.ln_1.bias"]) and None)
    with pytest.raises(UsageError, match=message):
        read_model(folder)


def test_headers_that_are_no_table_and_names_that_are_there_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", GPT2, tensors_of(GPT2))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    entry = '"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    for text, message in ((f"{{{entry}, {entry}}}", "has x twice"), ("[]", "not hold a JSON object"), ("{", "cannot be read"),
                          ('{"x": 3}', "the entry of x is damaged")):  # fmt: skip
        file.write_bytes(whole)
        rewritten(file, lambda table, text=text: text)
        assert message in refusal(folder)


@pytest.mark.parametrize(("name", "array", "message"), [
    ("model.layers.0.self_attn.q_proj.weight", None, "has no tensor model.layers.0.self_attn.q_proj.weight, which its config"),
    ("model.layers.2.input_layernorm.weight", np.zeros(32, np.float32), "a tensor model.layers.2.input_layernorm.weight"),
    ("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32), "q_proj.bias, which its config.json has no place for"),
    ("score.weight", np.zeros((2, 32), np.float32), "has a tensor score.weight"),
    ("model.norm.weight", np.zeros(31, np.float32), "model.norm.weight has shape (31,); by its config.json it has (32,)"),
    ("model.layers.0.mlp.down_proj.weight", np.zeros((48, 32), np.float32), "(48, 32); by its config.json it has (32, 48)"),
])  # fmt: skip
def test_missing_surplus_and_misshapen_tensors(name: str, array: np.ndarray | None, message: str, tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    tensors.pop(name, None)
    assert message in refusal(write(tmp_path / "m", LLAMA, tensors if array is None else tensors | {name: array}))


def test_a_gpt2_that_is_not_transposed_is_refused(tmp_path: Path) -> None:
    tensors = {name: array.T if array.ndim == 2 and ".h." in name else array for name, array in tensors_of(GPT2).items()}
    message = refusal(write(tmp_path / "m", GPT2, tensors))
    assert "attn.c_attn.weight has shape (48, 16); by its config.json it has (16, 48)" in message


def test_sizes_that_the_model_refuses_and_layers_without_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", LLAMA, tensors_of(LLAMA))
    for keys, message in (
        ({"num_key_value_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_hidden_layers": 2**31 - 1}, "says 2147483647 layers, but there are 21 tensors"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ):
        (folder / "config.json").write_text(json.dumps({**LLAMA, **keys}))
        assert message in refusal(folder)


def test_files_that_stand_for_others_say_what_to_do(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", LLAMA, tensors_of(LLAMA))
    file = folder / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer, not the file itself: get the file with git lfs pull" in refusal(folder)
    (folder / "config.json").unlink()
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    for path, message in (
        (folder, "has Hugging Face weights, but not the config.json that belongs to them"),
        (tmp_path / "x.gguf", "x.gguf DIR` converts it to a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            read_weights(path)


def test_a_folder_with_pickles_or_nothing_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", LLAMA, tensors_of(LLAMA))
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'echo unpickled'\ntR.")
        assert "as a pickle" in refusal(folder) and "save_pretrained" in refusal(folder)
        (folder / name).unlink()


# -- the way out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 20_000, 1])
def test_files_are_cut_in_shards_and_read_again(limit: int, tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    write_files(tmp_path, tensors, {name: array.nbytes for name, array in tensors.items()}, limit)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert (files == ["model.safetensors"]) == (limit == 10**9) and (INDEX in files) == (limit < 10**9)
    again = read_folder(tmp_path)
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array)
    if limit == 20_000:
        held = [sum(array.nbytes for array in map_tensors(tmp_path / name).values()) for name in files if name != INDEX]
        assert len(held) > 2 and max(held) <= limit
        assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == sum(held)
    shutil.rmtree(tmp_path)


def test_the_weights_of_a_model_are_read_only_views(tmp_path: Path) -> None:
    arrays = read_folder(write(tmp_path / "m", LLAMA, tensors_of(LLAMA)))
    with pytest.raises(ValueError, match="read-only"):
        arrays["model.norm.weight"][0] = 1
    assert model_of(LLAMA).n_params == sum(array.size for array in arrays.values())
