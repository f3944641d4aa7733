"""Runs with a tokenizer: losses per byte, the run's own copy of it, resuming, and text that is written later."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import LLAMA, tensors_of, write
from paths import SCRIPTS
from tiny_tokenizers import END, TEXT, byte_level

from refimpl.distributed.threads import run_ranks
from refimpl.errors import UsageError
from refimpl.tools.commands.generate import run as generate
from refimpl.training import evaluate, token_cache
from refimpl.training.checkpoint import load
from refimpl.training.config import Config
from refimpl.training.data import Corpus
from refimpl.training.evaluate import TextLoss, mean_loss, text_loss, validation_batches, validation_loss, whole_text
from refimpl.training.huggingface.export import export_folder
from refimpl.training.metrics import read_metrics
from refimpl.training.ngrams import ngram_baselines
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.run import train
from refimpl.training.sampling import Choice
from refimpl.training.setup import start
from refimpl.training.tokenizer import BYTES, load_tokenizer
from refimpl.training.trainer import Trainer

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 4, "warmup": 1, "eval_every": 2,
    "eval_batches": 2, "log_every": 2, "sample_bytes": 5, "lr": 1e-2,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("without_pictures", "one_blas_thread")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20)
    return str(path)


def run(folder: Path, **flags: Any) -> int:
    return train({**TINY, **flags}, folder, False, False, None)


# --------------------------------------------------------------------------------------------------------------- losses


def corpus_with(valid: np.ndarray, lengths: np.ndarray) -> Corpus:
    return Corpus("made", valid, valid, {}, lengths)


@pytest.mark.parametrize("model", ["gpt", "mlp"])
@pytest.mark.parametrize("final", [False, True])
def test_bits_per_byte_divide_by_the_bytes_of_the_targets_that_count(model: str, final: bool) -> None:
    """nats per token * tokens / bytes / ln 2, where both are counted one by one. Each id is as long as its value says."""
    config = Config.of({**TINY, "model": model, "recipe": "fp64", "block_size": 5})
    training = start(config)
    ids = np.random.default_rng(0).integers(0, 10, 200, np.uint8)
    loss = validation_loss(training, config, corpus_with(ids, ids), final, lambda: False)
    batches = list(whole_text(ids, ids, (4, 5)) if final else validation_batches(config, corpus_with(ids, ids), 0))
    targets = np.concatenate([y[:, -1] if model == "mlp" else y.ravel() for _, y, _ in batches])
    assert loss is not None and all(np.array_equal(y, lengths) for _, y, lengths in batches)
    assert loss.nats_per_token == mean_loss(training.model, training.state, training.run, [(x, y) for x, y, _ in batches])
    # Of sums of integers, and two quotients and a product of doubles: below 4 * 2**-53.
    expected = loss.nats_per_token * len(targets) / targets.sum() / math.log(2)
    assert loss.bits_per_byte == pytest.approx(expected, rel=4 * 2.0**-53)


def test_targets_that_do_not_count_have_no_bytes() -> None:
    config = Config.of({**TINY, "recipe": "fp64", "examples": "lines"})
    training = start(config)
    ids = np.frombuffer(b"a line\nx\n" * 30, np.uint8)
    loss = validation_loss(training, config, corpus_with(ids, np.full(ids.size, 2)), True, lambda: False)
    assert loss is not None and loss.bits_per_byte == pytest.approx(loss.nats_per_token / 2 / math.log(2), rel=1e-15)
    nothing = np.full((2, 8), config.ignore_index)
    none = text_loss(training.model, training.state, training.run, iter([(nothing * 0, nothing, nothing * 0)]))
    assert math.isnan(none.nats_per_token) and math.isnan(none.bits_per_byte)


def test_of_bytes_bits_per_byte_are_nats_over_ln_2() -> None:
    config = Config.of(TINY)
    loss = validation_loss(start(config), config, config.make_corpus(), False, lambda: False)
    assert loss is not None and loss.bits_per_byte == pytest.approx(loss.nats_per_token / math.log(2), rel=1e-15)
    assert TextLoss(1.0, 1.5).described("byte") == "1.0000 nats per byte (1.5000 bits per byte)"


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_with_a_tokenizer_reports_both_losses_and_keeps_a_copy(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = byte_level(tmp_path / "t")
    assert run(tmp_path / "run", data=text, tokenizer=str(path)) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["vocab_size"] == 320 and config["tokenizer"] == str(path)
    assert config["tokenizer_sha256"] == load_tokenizer(str(path)).checksum
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == path.read_bytes()
    evaluations = read_metrics(tmp_path / "run").evaluations
    assert [row["step"] for row in evaluations] == [2, 4]
    assert all(1 < row["val_loss"] / row["val_bits_per_byte"] / math.log(2) < 4 for row in evaluations)  # bytes per token
    said = capsys.readouterr()
    assert "nats per token (" in said.out and said.out.count("bits per byte compare between tokenizers") == 1
    assert f"tokenizer: {path}, 320 ids" in said.out and "tokens to train on" in said.out and "a sample of 5 tokens" in said.out
    loss = evaluations[-1]
    whole = f"{loss['whole_text_loss']:.4f} nats per token ({loss['whole_text_bits_per_byte']:.4f} bits per byte)\n"
    assert whole in said.out and "n-gram" not in said.out


def test_the_same_model_of_equal_probabilities_has_the_bits_of_its_vocabulary(text: str, tmp_path: Path) -> None:
    """With all weights 0 each token costs ln V: ln 320 * tokens / bytes / ln 2 bits."""
    config = Config.of({**TINY, "data": text, "tokenizer": str(byte_level(tmp_path / "t"))})
    training, corpus = start(config), config.make_corpus()
    training.state.load_weights({name: np.zeros(spec.shape, np.float32) for name, spec in training.model.parameters.items()})
    loss = validation_loss(training, config, corpus, True, lambda: False)
    n = (corpus.valid.size - 1) // 8 * 8
    assert loss is not None and loss.nats_per_token == pytest.approx(math.log(320), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(math.log2(320) * n / corpus.valid_lengths[1 : n + 1].sum(), rel=1e-6)
    assert ngram_baselines(corpus).entropies == {}


def test_a_run_resumes_with_its_copy_and_refuses_another_tokenizer(text: str, tmp_path: Path) -> None:
    path, other = byte_level(tmp_path / "t"), byte_level(tmp_path / "other", 300)
    run(tmp_path / "whole", data=text, tokenizer=str(path), steps=6)
    run(tmp_path / "run", data=text, tokenizer=str(path), steps=6)
    folder = tmp_path / "run"
    path.rename(tmp_path / "moved.json")
    with pytest.raises(UsageError, match=r"the run in --out has the tokenizer .*/t/tok.*, and .*/other/tok.* is"):
        train({"tokenizer": str(other), "steps": 8}, folder, True, False, None)
    with pytest.raises(UsageError, match=r"and bytes is another: it cannot be resumed with that"):
        train({"tokenizer": "bytes", "steps": 8}, folder, True, False, None)
    assert train({"steps": 8}, folder, True, False, None) == 0
    assert train({"tokenizer": str(tmp_path / "moved.json"), "steps": 10}, folder, True, False, None) == 0
    assert json.loads((folder / "config.json").read_text())["tokenizer"] == str(tmp_path / "moved.json")
    assert train({"steps": 12}, folder, True, False, None) == 0
    assert json.loads((folder / "config.json").read_text())["tokenizer"] == str(tmp_path / "moved.json")
    (folder / "tokenizer.json").write_bytes(other.read_bytes())
    with pytest.raises(UsageError, match=r"run/tokenizer.json is another: it cannot be resumed with that"):
        train({"steps": 14}, folder, True, False, None)
    run(tmp_path / "plain", data=text)
    with pytest.raises(UsageError, match=r"has the tokenizer bytes, and .*other/tokenizer.json is another"):
        train({"tokenizer": str(other), "steps": 8}, tmp_path / "plain", True, False, None)


def test_a_resumed_run_equals_one_never_stopped(text: str, tmp_path: Path) -> None:
    path = str(byte_level(tmp_path / "t"))
    run(tmp_path / "whole", data=text, tokenizer=path, schedule="constant")
    run(tmp_path / "parts", data=text, tokenizer=path, schedule="constant", steps=2)
    assert train({"steps": 4}, tmp_path / "parts", True, False, None) == 0
    whole, parts = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "parts"))
    header = load(whole)[1]
    assert whole.read_bytes() == parts.read_bytes() and "tokenizer" not in header["config"]  # a path is no part of it
    assert header["corpus"]["tokenizer"] == load_tokenizer(path).checksum


def test_the_checkpoint_of_another_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    path, other = (str(byte_level(tmp_path / name, size)) for name, size in (("a", 320), ("b", 319)))
    run(tmp_path / "run", data=text, tokenizer=path)
    trainer = Trainer(Config.of({**TINY, "data": text, "tokenizer": other, "vocab_size": 320}), tmp_path / "run")
    with pytest.raises(UsageError, match=r"was trained with a tokenizer other than --tokenizer .*b/tokenizer.json is now"):
        trainer.load_checkpoint()


def test_one_rank_makes_the_tokens_and_the_others_read_them(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the user's own may have the tokens of this text
    config = Config.of({**TINY, "data": text, "tokenizer": str(byte_level(tmp_path / "t")), "zero": 1})
    made, tokenize = [], token_cache._tokenize
    monkeypatch.setattr(token_cache, "_tokenize", lambda *parts: (made.append(1), tokenize(*parts))[1])
    corpora = run_ranks(4, lambda comm: Trainer(config, tmp_path / "run", comm).corpus)
    assert len(made) == 1 and all(np.array_equal(corpora[0].train, corpus.train) for corpus in corpora)


def test_what_a_start_from_other_weights_has_to_beat_is_its_own_loss(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the batches of all evaluations: a model that does not change keeps it. The line comes before the first step."""
    run(tmp_path / "a", data=text, tokenizer=str(byte_level(tmp_path / "t")))
    capsys.readouterr()
    still = {**TINY, "data": text, "recipe": "fp32", "lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "eval_every": 4}
    for name, limit in (("long", 0), ("short", 2**37)):
        monkeypatch.setattr("refimpl.training.evaluate.WHOLE_TEXT", limit)
        assert train(still, tmp_path / name, False, False, tmp_path / "a") == 0
        first, last = read_metrics(tmp_path / name).evaluations
        assert (first["step"], last["step"]) == (0, 4) and first["val_loss"] == last["val_loss"]
        (said, notes), loss = capsys.readouterr(), TextLoss(first["val_loss"], first["val_bits_per_byte"]).described("token")
        assert notes.startswith(f"reading {tmp_path / 'a'}: 8,560 parameters\n")
        assert said.count(f"baseline: validation loss before the first step {loss}\n") == 1 and "baselines" not in said
        assert f"\nvalidation loss {loss}; before the first step {first['val_loss']:.4f}\n" in said
        assert said.count("validation loss of the whole text (") == (limit > 0)


def test_a_start_from_other_weights_that_is_stopped_in_its_first_evaluation_resumes(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", data=text)
    given = {**TINY, "data": text}
    assert train(given, tmp_path / "whole", False, False, tmp_path / "a") == 0
    measured = evaluate.mean_loss
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "mean_loss", lambda *all: (signal.raise_signal(signal.SIGINT), measured(*all))[1])
        assert train(given, tmp_path / "parts", False, False, tmp_path / "a") == 130
    assert "stopped after step 0 of 4; continue with: --resume" in capsys.readouterr().out
    assert train({}, tmp_path / "parts", True, False, None) == 0
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert (whole / "checkpoint.safetensors").read_bytes() == (parts / "checkpoint.safetensors").read_bytes()
    losses = [[row["val_loss"] for row in read_metrics(at).evaluations] for at in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_vocabularies_too_small_are_refused_and_larger_ones_taken(text: str, tmp_path: Path) -> None:
    path = str(byte_level(tmp_path / "t"))
    with pytest.raises(UsageError, match=r"--vocab-size is 319, but .* has 320 ids: .* or --vocab-size is too small"):
        run(tmp_path / "run", data=text, tokenizer=path, vocab_size=319)
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", data=text, tokenizer=path, vocab_size=384)
    with pytest.raises(UsageError, match=r"--examples lines is for bytes, of which one ends a line: leave --tokenizer out"):
        Config.of({**TINY, "tokenizer": path, "examples": "lines"})


def test_a_start_from_other_weights_takes_their_tokenizer(text: str, tmp_path: Path) -> None:
    path, other = byte_level(tmp_path / "t"), byte_level(tmp_path / "other", 300)
    run(tmp_path / "a", data=text, tokenizer=str(path))
    path.unlink()
    given = {"data": text, "steps": 2, "batch_size": 2, "eval_batches": 1, "sample_bytes": 0}
    assert train(given, tmp_path / "b", False, False, tmp_path / "a") == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["vocab_size"] == 320 and config["tokenizer"] == str(tmp_path / "a" / "tokenizer.json")
    assert train(given, tmp_path / "a", False, True, tmp_path / "a") == 0  # replaced by itself
    for tokenizer in (str(other), "bytes"):
        with pytest.raises(UsageError, match=r"a was trained with a tokenizer other than"):
            train({**given, "tokenizer": tokenizer}, tmp_path / "c", False, False, tmp_path / "a")


def test_a_run_that_replaces_another_leaves_no_tokenizer_of_it(text: str, tmp_path: Path) -> None:
    run(tmp_path / "run", data=text, tokenizer=str(byte_level(tmp_path / "t")))
    assert train({**TINY, "data": text}, tmp_path / "run", False, True, None) == 0
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    (tmp_path / "model").mkdir()
    byte_level(tmp_path / "model")
    with pytest.raises(UsageError, match=r"--out .*model has a tokenizer.json that belongs to no run"):
        run(tmp_path / "model", data=text)


def test_other_commands_take_a_tokenizer(text: str, tmp_path: Path) -> None:
    path = byte_level(tmp_path / "t")
    sizes = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=4"]
    for script, flags, said in (
        ("compare_recipes", ["--recipes=bf16", "--steps=4", "--no-page", "--seeds=2", "--perturbations=1"], "nats per token"),
        ("inspect_precision", ["--steps=2", "--no-page"], ""),
        ("trace", [], ""),
    ):
        verb, out = (["record"], [f"--out={tmp_path / 'trace'}"]) if script == "trace" else ([], [])
        command = [sys.executable, str(SCRIPTS / f"{script}.py"), *verb, f"--tokenizer={path}", f"--data={text}", *sizes]
        done = subprocess.run([*command, *flags, *out], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


# ----------------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer is no longer where it was."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT * 20)
    path = byte_level(folder / "t")
    run(folder / "run", data=str(folder / "text.txt"), tokenizer=str(path))
    path.unlink()
    return folder / "run"


def test_text_is_written_with_the_copy_of_the_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    generate(trained, "Köln «x", 40, 0.8, 3, None)
    first = capsys.readouterr()
    assert first.out.startswith("Köln «x") and len(first.out) > 10
    generate(trained / "checkpoint.safetensors", "Köln «x", 40, 0.8, 3, None)
    assert capsys.readouterr().out == first.out
    generate(trained, "Köln «x", 40, 0.8, 4, None)
    assert capsys.readouterr().out != first.out
    text = tmp_path / "held_back.txt"
    text.write_text(TEXT)
    generate(trained, "", 0, 0.8, 0, text)
    nats, bits, _ = (float(word) for word in capsys.readouterr().out.replace("(", "").split() if word[0].isdigit())
    assert 1 < nats / math.log(2) / bits < 4


def test_text_needs_the_tokenizer_that_the_model_was_trained_with(trained: Path, tmp_path: Path) -> None:
    other = byte_level(tmp_path / "other", 300)
    for given, said in ((str(other), "other/tokenizer.json"), ("bytes", "bytes; its own was tokenizer.json beside it")):
        with pytest.raises(UsageError, match=f"run was trained with a tokenizer other than .*{said}"):
            generate(trained, "x", 1, 0.8, 0, None, tokenizer=given)
    alone = shutil.copy(trained / "checkpoint.safetensors", tmp_path / "alone")
    with pytest.raises(UsageError, match=r"alone was trained with a tokenizer other than bytes; its own was tokenizer.json"):
        generate(Path(alone), "x", 1, 0.8, 0, None)
    copy = shutil.copy(trained / "tokenizer.json", tmp_path / "copy.json")
    generate(Path(alone), "x", 1, 0.8, 0, None, tokenizer=str(copy))
    with pytest.raises(UsageError, match=r"--prompt '' has no tokens: give a longer one"):
        generate(trained, "", 1, 0.8, 0, None)


def test_a_folder_of_hugging_face_has_its_own_tokenizer_or_needs_one(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {**LLAMA, "vocab_size": 320}
    folder = write(tmp_path / "hf", table, tensors_of(table))
    given = {"data": text, "steps": 1, "batch_size": 2, "block_size": 8, "eval_batches": 1, "sample_bytes": 3, "warmup": 1}
    message = r"there is no tokenizer.json in .*hf, whose model has 320 token ids: give its tokenizer with --tokenizer FILE, or"
    with pytest.raises(UsageError, match=message):
        train(given, tmp_path / "run", False, False, folder)
    with pytest.raises(UsageError, match=message):
        generate(folder, "x", 1, 0.8, 0, None)
    byte_level(folder)
    assert train(given, tmp_path / "run", False, False, folder) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tokenizer"] == str(folder / "tokenizer.json")
    with pytest.raises(UsageError, match=r"is not the tokenizer of .*hf, .*hf/tokenizer.json: leave it out"):
        train({**given, "tokenizer": str(byte_level(tmp_path / "other", 300))}, tmp_path / "other", False, False, folder)
    byte_level(folder, 321)
    with pytest.raises(UsageError, match=r"the vocabulary of .*hf is 320, but .* has 321 ids: it is the tokenizer of another"):
        generate(folder, "x", 1, 0.8, 0, None)
    export_folder(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "run" / "tokenizer.json").read_bytes()
    capsys.readouterr()
    generate(tmp_path / "out", "Last line", 3, 0.0, 0, None)
    assert capsys.readouterr().out.startswith("Last line")


def test_a_stray_tokenizer_is_not_that_of_a_run_on_bytes(text: str, tmp_path: Path) -> None:
    run(tmp_path / "run", data=text)
    byte_level(tmp_path / "run")
    generate(tmp_path / "run", "x", 1, 0.8, 0, None)


def test_text_ends_with_the_token_that_says_so(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its logit is made the largest by its row of the embedding, which is also that of the head."""
    from refimpl.training import checkpoint_states

    load_for_inference = checkpoint_states.load_for_inference
    model, state, context = load_for_inference(trained)
    state.weight_views["transformer.wte.weight"][load_tokenizer(str(trained)).encode(END.encode())[0]] = 0
    state.weight_views["transformer.ln_f.weight"][:] = 0
    state.weight_views["transformer.ln_f.bias"][:] = 1
    state.weight_views["transformer.wte.weight"][0] = 5
    from refimpl.training.sampling import Writer

    tokenizer = load_tokenizer(str(trained))
    writer = Writer(model, state, context, tokenizer, tokenizer.encode(b"ab")[0])
    assert "".join(writer.text(20, np.random.default_rng(0), Choice(0.0))) == ""
    assert writer.count == 1 and writer.why_ended == "the text ended with token 0, after which none follows"
    assert BYTES.ends == frozenset()


def test_text_appears_as_it_is_written(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is printed before the next token is chosen."""
    from refimpl.training.sampling import Writer

    order: list[str] = []
    logits = Writer._logits
    monkeypatch.setattr(Writer, "_logits", lambda self: (order.append("choose"), logits(self))[1])
    monkeypatch.setattr("builtins.print", lambda *words, **how: order.append("print" if how.get("flush") else "end"))
    generate(trained, "x", 3, 0.8, 0, None)
    assert order == ["print", "choose", "print", "choose", "print", "choose", "print", "print", "end"]


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_reaches_the_bars_of_tokens_steps_and_batches(
    quiet: bool, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_level(tmp_path)
    bars: list[ProgressBar] = []
    monkeypatch.setattr(ProgressBar, "__enter__", lambda bar: bars.append(bar) or bar)
    flags = {**TINY, "data": text, "tokenizer": str(tmp_path / "tokenizer.json")}
    assert train(flags, tmp_path / "r", False, False, None, quiet=quiet) == 0
    assert {(bar.what, bar.quiet) for bar in bars} == {(what, quiet) for what in ("tokenizing", "", "evaluation")}
    bars.clear()
    generate(tmp_path / "r", "", 0, 0.0, 0, Path(text), quiet=quiet)
    assert [(bar.unit, bar.quiet) for bar in bars] == [("B", quiet), ("batch", quiet)]
    assert [bar.done for bar in bars] == [bar.total for bar in bars] and bars[1].total > 1
