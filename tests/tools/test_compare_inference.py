"""scripts/compare_recipes.py --inference: what the same weights compute under several recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import LLAMA, tensors_of, write
from script_loader import load_script

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape
from refimpl.numerics.casts import cast
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.tools.compare_recipes.inference import Computed, agreement, compare_inference, computed, continuations, rows
from refimpl.training.checkpoint_states import load_for_inference
from refimpl.training.config import Config
from refimpl.training.evaluate import TextLoss
from refimpl.training.init_from import settings_from
from refimpl.training.sampling import Choice, Writer
from refimpl.training.tokenizer import BYTES

GIVEN = {"tokenizer": "bytes", "block_size": 16, "batch_size": 2, "eval_batches": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = {**LLAMA, "vocab_size": 256}
    small = {name: 0.3 * array for name, array in tensors_of(table).items()}
    return write(tmp_path_factory.mktemp("inference") / "hf", table, small)


def of_recipe(folder: Path, name: str) -> Computed:
    settings, (_, first) = settings_from(folder, GIVEN)
    config = Config.of(settings)
    return computed(name, first, config, config.make_corpus(), np.frombuffer(b"The ", np.uint8), 6)


def test_fp32_computes_what_the_folder_computes(folder: Path) -> None:
    result = of_recipe(folder, "fp32")
    model, state, run = load_for_inference(folder)
    valid = Config.of(settings_from(folder, GIVEN)[0]).make_corpus().valid
    tape = Tape(run, state.weight_views, model.tied, record=False)
    blocks = np.array([valid[16 * i : 16 * i + 17] for i in range(4)], np.int64)
    logits = model.logits(tape, blocks[:, :-1]).array
    assert result.likeliest.tolist() == logits.argmax(-1).reshape(-1).tolist()
    z = cast(logits, "fp64")
    losses = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, blocks[:, 1:, None], -1)[..., 0]
    assert result.loss.nats_per_token == pytest.approx(losses.mean(), abs=1e-6)
    writer = Writer(model, state, run, BYTES, np.frombuffer(b"The ", np.uint8))
    assert result.text == "".join(writer.text(6, np.random.default_rng(1), Choice(0))) and len(result.continuation) == 6


def test_a_recipe_has_its_weights_and_its_policy(folder: Path) -> None:
    """Of mxfp4 the weights are BF16, and the products are those of quantized operands: each of the two is seen in the loss."""
    found = {name: of_recipe(folder, name) for name in ("fp32", "bf16", "mxfp4")}
    _, (_, first) = settings_from(folder, GIVEN)
    model, valid = first.model, Config.of(settings_from(folder, GIVEN)[0]).make_corpus().valid
    rounded = {name: cast(array, "bf16") for name, array in first.weights.items()}
    tokens = np.array([valid[16 * i : 16 * i + 16] for i in range(4)], np.int64)
    for name, result in found.items():
        weights = dict(first.weights) if name == "fp32" else rounded
        tape = Tape(Run(get_recipe(name).policy, NUMPY), weights, model.tied, record=False)
        assert result.likeliest.tolist() == model.logits(tape, tokens).array.argmax(-1).reshape(-1).tolist()
    losses = {name: result.loss.nats_per_token for name, result in found.items()}
    assert 0 < abs(losses["bf16"] - losses["fp32"]) < 0.2 * abs(losses["mxfp4"] - losses["fp32"])


def test_agreement_and_rows() -> None:
    one = Computed("fp32", TextLoss(2.0, 1.0), np.array([1, 2, 3, 4]), [5, 6, 7], "a\nb")
    other = Computed("mxfp4", TextLoss(2.5, 1.25), np.array([1, 0, 3, 4]), [5, 9, 7], "a\x1bz")
    assert agreement(one, one) == (1.0, 3) and agreement(other, one) == (0.75, 1)
    assert list(rows([one, other])) == [
        ["fp32", "2.0000", "", "1.0000", "100.0 %", "3 of 3"],
        ["mxfp4", "2.5000", "+0.5000", "1.2500", "75.0 %", "1 of 3"],
    ]
    assert list(continuations([one, other], "x\n")) == ["\n'x\\n' continues:", "  fp32   'a\\nb'", "  mxfp4  'a\\x1bz'"]


def run_script(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compare_recipes.py", *flags])
    load_script("compare_recipes").main.__globals__["run"]()


SMALL = ["--tokenizer", "bytes", "--block-size", "16", "--batch-size", "2", "--eval-batches", "1"]


def test_the_script_prints_a_table_and_texts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = tmp_path / "data.json"
    flags = ["--init-from", str(folder), "--inference", "--prompt", "To", "--tokens", "3", "--json", str(numbers), *SMALL]
    run_script(flags, monkeypatch)
    shown = capsys.readouterr().out
    names = ["fp32", "bf16", "fp16", "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4"]
    assert [line.split()[0] for line in shown.splitlines()[2:10]] == names and "'To' continues:" in shown
    assert max(map(len, shown.splitlines()[:10])) <= 80
    stored = json.loads(numbers.read_text())
    assert [row["recipe"] for row in stored] == names and stored[0]["likeliest_as_fp32"] == 1
    assert all(len(row["continuation"]) == 3 for row in stored)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inference"], "give --init-from"),
        (["--init-from", "F", "--inference", "--seeds", "2"], "leave out --seeds"),
        (["--init-from", "F", "--inference", "--out", "x.html"], "leave out"),
        (["--init-from", "F", "--inference", "--lr", "1", "--steps", "3"], "has no --lr, --steps"),
        (["--init-from", "F", "--inference", "--tokens", "-1"], "--tokens must be 0 or more"),
        (["--init-from", "F", "--inference", "--recipes", "fp17"], "unknown recipe 'fp17'"),
        (["--init-from", "F", "--prompt", "x"], "are for --inference"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=message):
        run_script(flags, monkeypatch)


def test_a_prompt_without_tokens_is_refused(folder: Path) -> None:
    given: dict[str, Any] = dict(GIVEN)
    with pytest.raises(UsageError, match="has no tokens"):
        compare_inference(given, folder, "fp32", prompt="")
