"""Folders out and in again: every bit; transformers loads them without a warning and computes the same; runs begin with them.

What would turn this red: a size, name or transpose that transformers reads otherwise; a flag that contradicts the folder and is
taken; a master that is not the file's value.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_folders import GPT2, LLAMA, tensors_of, write

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.nn.models.registry import make_model
from refimpl.numerics.casts import cast
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.tools.commands.generate import run as generate
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import in_recipe, load_for_inference, read_weights, state_arrays
from refimpl.training.config import Config
from refimpl.training.huggingface.export import export_folder
from refimpl.training.huggingface.files import read_folder
from refimpl.training.huggingface.weights import read_model
from refimpl.training.init_from import FINE_TUNING, sizes_of
from refimpl.training.run import train

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied-biases": {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama3": {**LLAMA, "rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "linear": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {**LLAMA, "max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt2-gelu-new": {**GPT2, "activation_function": "gelu_new"},
}  # fmt: skip
TINY: dict[str, Any] = {"batch_size": 2, "steps": 2, "eval_every": 2, "eval_batches": 1, "sample_bytes": 0, "block_size": 8}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("fmt", "dtype"), [("fp32", np.float32), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_in_and_out_is_the_same_to_the_bit(name: str, fmt: str, dtype: Any, tmp_path: Path) -> None:
    tensors = tensors_of(FAMILIES[name], dtype)
    folder = write(tmp_path / "a", FAMILIES[name], tensors, 2)
    export_folder(folder, tmp_path / "b", fmt)
    again = read_folder(tmp_path / "b")
    assert again.keys() == tensors.keys()
    for key, array in tensors.items():
        assert again[key].dtype == array.dtype and again[key].tobytes() == array.tobytes(), key
    first, second = read_model(folder)[0], read_model(tmp_path / "b")[0]
    assert {**first.config, "rope_scaling": ""} == {**second.config, "rope_scaling": ""}


def saved(path: Path, model: Model, recipe: str) -> dict[str, np.ndarray]:
    """A checkpoint of fresh weights, which are returned."""
    weights = model.initial_weights(np.random.default_rng(3))
    state = State(model, get_recipe(recipe).state_encodings(), NUMPY)
    state.load_weights(weights)
    checkpoint.save(path, state_arrays(state), {"model": model.name, "sizes": dict(model.config), "recipe": recipe})
    return weights


def test_the_masters_of_a_checkpoint_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("llama", "gpt"):
        model = make_model(name, {"n_layer": 2, "n_head": 4, "n_embd": 32})
        weights = saved(tmp_path / "checkpoint", model, "fp16")
        export_folder(tmp_path / "checkpoint", tmp_path / name)
        again, found, _ = read_model(tmp_path / name)
        assert again.config == model.config
        for key, array in weights.items():
            np.testing.assert_array_equal(found[key], array)
    assert "GPT2LMHeadModel of 28 tensors in FP32, " in capsys.readouterr().out


def test_a_gpt_without_biases_gets_zeros(tmp_path: Path) -> None:
    model = make_model("gpt", {"n_layer": 1, "n_head": 4, "n_embd": 32, "bias": False})
    weights = saved(tmp_path / "checkpoint", model, "fp32")
    export_folder(tmp_path / "checkpoint", tmp_path / "hf")
    again, found, _ = read_model(tmp_path / "hf")
    assert set(found) > set(weights) and "bias" not in again.config
    for key, array in found.items():
        np.testing.assert_array_equal(array, weights.get(key, np.zeros_like(array)))


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    saved(tmp_path / "mlp", make_model("mlp", {}), "fp32")
    with pytest.raises(UsageError, match="no architecture for a model 'mlp'"):
        export_folder(tmp_path / "mlp", tmp_path / "hf")
    tensors = tensors_of(LLAMA)
    tensors["model.norm.weight"][3] = 65520
    folder = write(tmp_path / "a", LLAMA, tensors)
    with pytest.raises(UsageError, match=r"model\.norm\.weight has values above 65504, the largest of FP16"):
        export_folder(folder, tmp_path / "hf", "fp16")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UsageError, match="exists and is not empty"):
        export_folder(folder, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file: name a new folder"):
        export_folder(folder, tmp_path / "file")


# -- runs --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_text("to be or not to be, that is the question; " * 40)
    return str(tmp_path / "text")


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_run_begins_with_the_values_of_a_folder(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {**FAMILIES[name], "vocab_size": 300}
    folder = write(tmp_path / "hf", table, tensors_of(table), 2)
    still = {**TINY, "data": text, "recipe": "bf16", "lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "tokenizer": "bytes"}
    assert train(still, tmp_path / "run", False, False, folder) == 0
    arrays, header = checkpoint.load(tmp_path / "run")
    model, weights, _ = read_model(folder)
    assert header["sizes"] == dict(model.config) and header["config"]["block_size"] == 8
    for key, array in weights.items():
        np.testing.assert_array_equal(arrays[f"master.{key}"], array)
        np.testing.assert_array_equal(arrays[f"weights.{key}"], cast(array, "bf16"))
    export_folder(tmp_path / "run", tmp_path / "out")
    assert {key: array.tobytes() for key, array in read_folder(tmp_path / "out").items()} == {
        key: array.tobytes() for key, array in read_folder(folder).items()
    }
    # a run that begins with this one has its sequences and its positions
    assert train({**still, "block_size": None}, tmp_path / "next", False, False, tmp_path / "run") == 0
    config = json.loads((tmp_path / "next" / "config.json").read_text())
    assert config["block_size"] == 8 and config["n_positions"] == model.config["block_size"]
    generate(tmp_path / "hf", prompt="to be", n_tokens=3, temperature=0.0, seed=0, loss=None, tokenizer="bytes")
    capsys.readouterr()


@pytest.mark.parametrize("chain", [1, 2])
@pytest.mark.parametrize("as_file", [False, True])
def test_an_export_has_the_small_files_when_the_source_is_gone(
    chain: int, as_file: bool, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run, of a run that began with that run, and of one that replaced it in its own folder."""
    table = {**LLAMA, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": [2, 3]}
    folder = write(tmp_path / "hf", table, tensors_of(table))
    small = {
        "generation_config.json": b'{"temperature": 0.5}', "tokenizer_config.json": b'{"tokenizer_class": "X"}',
        "special_tokens_map.json": "{\"bos_token\": \"\u00e9\"}".encode(), "chat_template.jinja": b"{{ messages }}\r\n",
    }  # fmt: skip
    for name, contents in small.items():
        (folder / name).write_bytes(contents)
    given, before = {**TINY, "data": text, "tokenizer": "bytes"}, folder
    for n in range(chain):
        assert train(given, tmp_path / f"run{n}", False, False, before) == 0
        shutil.rmtree(before)
        before = tmp_path / f"run{n}"
    assert train(given, before, False, True, before) == 0  # --overwrite, from its own weights
    assert train({"steps": 3}, before, True, False, None) == 0
    (before / "tokenizer.json").write_bytes(b"{}")  # as if its tokenizer were a file, which takes the package tokenizers
    export_folder(before / checkpoint.FILE_NAME if as_file else before, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in small} == small
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 3])
    assert "note: no tokenizer.json" not in capsys.readouterr().out
    (before / "tokenizer.json").unlink()
    export_folder(before, tmp_path / "out2")
    assert f"note: no tokenizer.json was written: {before} has none" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out2").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_a_run_that_replaces_another_keeps_nothing_of_its_model(text: str, tmp_path: Path) -> None:
    table = {**LLAMA, "vocab_size": 256, "eos_token_id": 7}
    folder = write(tmp_path / "hf", table, tensors_of(table))
    assert train({**TINY, "data": text}, tmp_path / "run", False, False, folder) == 0
    assert (tmp_path / "run" / "model" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert train({**TINY, "data": text, "n_layer": 1, "n_embd": 16}, tmp_path / "run", False, True, None) == 0
    assert not (tmp_path / "run" / "model").exists()


def test_what_is_not_given_is_fit_for_fine_tuning_a_folder_and_not_for_weights_of_our_own(tmp_path: Path) -> None:
    """Steps as large as those of a fresh model would undo what the weights have learned."""
    folder = write(tmp_path / "hf", LLAMA, tensors_of(LLAMA))
    first = read_weights(folder)
    given = sizes_of(folder, first, {"steps": 7})
    assert {name: given[name] for name in FINE_TUNING} == {**FINE_TUNING, "block_size": 128}
    config = Config.of({**given, "steps": 7})
    assert (config.lr, config.steps, config.make_model().config) == (5e-5, 7, first.model.config)
    assert sizes_of(folder, first, {"block_size": 5})["block_size"] == 5
    assert "lr" not in sizes_of(folder, first._replace(block_size=64), {})


def test_the_loss_of_a_file_is_measured_in_blocks_that_fit(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {**LLAMA, "vocab_size": 256}
    folder, words = write(tmp_path / "hf", table, tensors_of(table)), Path(text).read_bytes()
    monkeypatch.setattr("refimpl.tools.commands.generate.LONGEST", 32)
    monkeypatch.setattr("refimpl.tools.commands.generate.LOGITS", 2 * 32 * 256)
    sizes = []
    whole = generate.__globals__["whole_text"]
    monkeypatch.setattr("refimpl.tools.commands.generate.whole_text", lambda *given: sizes.append(given[2]) or whole(*given))
    generate(folder, prompt="", n_tokens=0, temperature=0.0, seed=0, loss=Path(text))
    said = capsys.readouterr().out
    assert sizes == [(2, 32)] and said.endswith(", in blocks of 32 bytes\n")
    expected = mean_loss_of(folder, words, 32)
    assert abs(float(said.split(": ")[1].split()[0]) - expected) < 1e-3


@pytest.mark.parametrize("n_bytes", [2, 21, 33])
def test_a_file_shorter_than_a_block_is_one_block(n_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All tokens after the first are predicted, as by one call of transformers."""
    table = {**LLAMA, "vocab_size": 256}
    folder, words = write(tmp_path / "hf", table, tensors_of(table)), b"to be or not to be, that is the question"[:n_bytes]
    (tmp_path / "small").write_bytes(words)
    generate(folder, prompt="", n_tokens=0, temperature=0.0, seed=0, loss=tmp_path / "small")
    said = capsys.readouterr().out
    assert said.endswith(f", in blocks of {n_bytes - 1} byte{'s' if n_bytes > 2 else ''}\n")
    assert abs(float(said.split(": ")[1].split()[0]) - mean_loss_of(folder, words, n_bytes - 1)) < 1e-3
    (tmp_path / "small").write_bytes(words[:1])
    with pytest.raises(UsageError, match="small has 1 byte; this model needs at least 2, the last to be predicted"):
        generate(folder, prompt="", n_tokens=0, temperature=0.0, seed=0, loss=tmp_path / "small")


@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_the_loss_of_a_run_is_measured_in_its_own_blocks(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its positions may be more: it was trained and evaluated with sequences of --block-size."""
    more = {"n_positions": 64, "n_kv_head": 2} if model == "llama" else {"n_head": None}
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 1, "sample_bytes": 0}
    train({**sizes, "model": model, "data": text, "eval_batches": 1, **more}, tmp_path / "run", False, False, None)
    generate(tmp_path / "run", prompt="", n_tokens=0, temperature=0.0, seed=0, loss=Path(text))
    assert capsys.readouterr().out.endswith(", in blocks of 8 bytes\n")
    (tmp_path / "small").write_bytes(b"to be")
    if model == "mlp":
        with pytest.raises(UsageError, match="small has 5 bytes; this model needs at least 9"):
            generate(tmp_path / "run", prompt="", n_tokens=0, temperature=0.0, seed=0, loss=tmp_path / "small")
        return
    generate(tmp_path / "run", prompt="", n_tokens=0, temperature=0.0, seed=0, loss=tmp_path / "small")
    assert capsys.readouterr().out.endswith(", in blocks of 4 bytes\n")


def mean_loss_of(folder: Path, words: bytes, T: int) -> float:
    """The mean cross-entropy over whole blocks of T bytes, in FP64 from the logits."""
    ids = np.frombuffer(words, np.uint8)
    n = (len(ids) - 1) // T
    x, y = ids[: n * T].reshape(n, T), ids[1 : n * T + 1].reshape(n, T)
    logits = our_logits(folder, x)
    m = logits.max(-1, keepdims=True)
    logs = (logits - m) - np.log(np.exp(logits - m).sum(-1, keepdims=True))
    return float(-np.take_along_axis(logs, y[..., None].astype(int), -1).mean(dtype=np.float64))


def test_flags_that_contradict_a_folder_are_refused(text: str, tmp_path: Path) -> None:
    table = {**LLAMA, "vocab_size": 256}
    folder = write(tmp_path / "hf", table, tensors_of(table))
    for flags, message in (
        ({"n_embd": 64}, "differs in size from this run: n_embd 32 instead of 64"),
        ({"n_kv_head": 4}, "n_kv_head 2 instead of 4"),
        ({"rope_theta": 5e5}, "rope_theta 10000.0 instead of 500000.0"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-05 instead of 1e-06"),
        ({"n_positions": 64}, "block_size 128 instead of 64"),
        ({"model": "gpt"}, "is a llama, but this run's model is a gpt"),
        ({"block_size": 129}, "--block-size is 129, but the model in .* has 128 positions"),
        ({"vocab_size": 257}, "vocab_size 256 instead of 257"),
    ):
        with pytest.raises(UsageError, match=message):
            train({**TINY, "data": text, **flags}, tmp_path / "run", False, False, folder)
        assert not (tmp_path / "run").exists()


def test_a_window_shorter_than_the_block_is_refused_and_a_longer_one_has_no_effect(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {**LLAMA, "vocab_size": 256, "model_type": "mistral", "sliding_window": 16}
    folder = write(tmp_path / "hf", table, tensors_of(table))
    with pytest.raises(UsageError, match=r"--block-size is 17, but the model in .* has 16 positions"):
        train({**TINY, "data": text, "block_size": 17}, tmp_path / "run", False, False, folder)
    assert "has a sliding window of 16 tokens" in capsys.readouterr().err
    assert train({**TINY, "data": text, "block_size": None}, tmp_path / "run", False, False, folder) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["block_size"] == 16


def test_a_damaged_folder_starts_no_run(text: str, tmp_path: Path) -> None:
    table = {**LLAMA, "vocab_size": 256}
    folder = write(tmp_path / "hf", table, tensors_of(table), 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="there is no such file"):
        train({**TINY, "data": text}, tmp_path / "run", False, False, folder)
    with pytest.raises(UsageError, match="there is no such file"):
        load_for_inference(folder)
    assert not (tmp_path / "run").exists()


# -- transformers ------------------------------------------------------------------------------------------------------------


@contextmanager
def no_warnings(transformers: Any) -> Iterator[None]:
    """Fail at any record of transformers' loggers of level WARNING or above."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert records == []


def their_model(transformers: Any, folder: Path) -> Any:
    """The model of a folder in FP32, which must load without a warning and with every tensor."""
    with no_warnings(transformers):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True, dtype="float32"
        )
    assert not any(info.values()), info
    return model.eval()


def made_by_transformers(transformers: Any, table: dict[str, Any], folder: Path) -> Any:
    """Write a random model of these sizes with save_pretrained, in shards of 20 kB, and return it."""
    import torch

    torch.manual_seed(0)
    keys = {key: value for key, value in table.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(table["model_type"], **keys, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases start at ones and zeros
        parameter.data.copy_(torch.randn(parameter.shape) * (1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


TOKENS = np.random.default_rng(5).integers(0, 64, (2, 24))


def logits_of(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(TOKENS)).logits.numpy())


def our_logits(folder: Path, tokens: np.ndarray = TOKENS) -> np.ndarray:
    model, state, run = load_for_inference(folder)
    return np.asarray(model.logits(Tape(run, state.weight_views, model.tied), tokens).array)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_folders_come_in_and_go_out_with_equal_logits(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    table = FAMILIES[name] if name != "dynamic" else {**FAMILIES[name], "max_position_embeddings": 32}
    theirs = made_by_transformers(transformers, table, tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    expected = logits_of(theirs)
    # first-order bound of FP32 sums in another order: the unit roundoff times the terms that are added on the way to a logit
    C, F, H, T = 32, 48, 64, TOKENS.shape[1]
    terms = 2 * (2 * C + C + H + T + H + C + F) + 2 * C
    ours = our_logits(tmp_path / "a")
    assert np.linalg.norm(ours - expected) < terms * 2**-24 * np.linalg.norm(expected)
    export_folder(tmp_path / "a", tmp_path / "b")
    again = their_model(transformers, tmp_path / "b")
    assert np.array_equal(logits_of(again), expected)
    for (key, one), (_, other) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert np.array_equal(one.numpy(), other.numpy()), key


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_a_gpt2_in_bf16_has_transformers_bits_with_its_own_gelu(activation: str, tmp_path: Path) -> None:
    """Every rounding at the same place: what differs is a flipped rounding of a sum, of which there are few."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = made_by_transformers(transformers, {**GPT2, "activation_function": activation}, tmp_path / "a").to(torch.bfloat16)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.float().numpy()
    model, weights, _ = read_model(tmp_path / "a")

    def identical(activation: str) -> float:
        changed = make_model("gpt", {**model.config, "activation": activation})
        state, run = in_recipe(changed, weights, get_recipe("pure-bf16"))
        ours = changed.logits(Tape(run, state.weight_views, changed.tied), TOKENS).array
        return float((cast(ours, "fp32") == expected).mean())

    own = model.config.get("activation", "gelu_tanh")
    assert identical(own) > 0.99
    assert identical("gelu_new" if own == "gelu_tanh" else "gelu_tanh") < 0.8


@pytest.mark.parametrize("sizes", [
    {"name": "llama"}, {"name": "llama", "tied": False, "qk_norm": True}, {"name": "llama", "qkv_bias": True, "head_dim": 24},
    {"name": "gpt"}, {"name": "gpt", "bias": False},
])  # fmt: skip
def test_transformers_loads_a_checkpoint_of_ours_and_computes_the_same(sizes: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    given = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 64, **sizes}
    model = make_model(given.pop("name"), given)
    saved(tmp_path / "checkpoint", model, "fp32")
    export_folder(tmp_path / "checkpoint", tmp_path / "hf")
    expected = logits_of(their_model(transformers, tmp_path / "hf"))
    state = State(model, {"weights": "fp32"}, NUMPY)
    state.load_weights(model.initial_weights(np.random.default_rng(3)))
    ours = model.logits(Tape(Run(get_recipe("fp32").policy, NUMPY), state.weight_views, model.tied), TOKENS).array
    terms = 2 * (4 * 64 + 24 + 64 + 384 + 256) + 2 * 64
    assert np.linalg.norm(ours - expected) < terms * 2**-24 * np.linalg.norm(expected)


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_the_format_of_the_weights_is_the_format_of_the_loaded_model(fmt: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    export_folder(write(tmp_path / "a", LLAMA, tensors_of(LLAMA)), tmp_path / "b", fmt)
    with no_warnings(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert str(model.dtype) == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[fmt]
    assert math.prod(model.lm_head.weight.shape) == 64 * 32


def test_the_tokenizer_of_a_folder_goes_along(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    table = {**LLAMA, "eos_token_id": 3}
    folder = write(tmp_path / "a", table, tensors_of(table))
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<e>": 3}, [("a", "b")]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Digits()
    words.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "temperature": 0.5, "do_sample": True}))
    export_folder(folder, tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    model = their_model(transformers, tmp_path / "b")
    assert model.config.eos_token_id == 3 and model.generation_config.temperature == 0.5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").tokenize("aba") == ["ab", "a"]
    # without it transformers 4 takes the class of the model, whose tokens this file does not have
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
