"""Targets that have no part in the loss, indices out of range, and the mean over micro-batches of unequal counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_runs import SIZES
from strict_backend import STRICT

from refimpl.distributed.collectives import Comm
from refimpl.distributed.threads import run_ranks
from refimpl.errors import UsageError
from refimpl.parity.judge import judge_trace
from refimpl.parity.trace import Trace, batches_of, record
from refimpl.step import Batch, forward_backward
from refimpl.training.config import Config
from refimpl.training.data import sample_batch, sequential_batches
from refimpl.training.evaluate import mean_loss, validation_loss
from refimpl.training.setup import Training, start
from refimpl.training.trainer import Trainer

Array = Any


def config_of(**given: Any) -> Config:
    return Config.of({**SIZES, "recipe": "fp32", **given})


def batch(rows: int, ignored: float, seed: int = 0, ignore_index: int = -100) -> Batch:
    """Random bytes; of the targets a share is to be ignored."""
    rng = np.random.default_rng(seed)
    tokens, targets = (rng.integers(0, 256, (rows, 16)) for _ in range(2))
    targets[rng.random(targets.shape) < ignored] = ignore_index
    return tokens, targets


def gradients(training: Training, batches: list[Batch], S: float = 1024.0) -> tuple[float, Array]:
    """The loss of a step and d(S L)/dw, flat."""
    loss = forward_backward(training.model, batches, training.state, np.asarray(np.float32(S)), training.run)
    return float(loss), np.array(training.state.grads)


# ------------------------------------------------------------------------------------------------------ out of range

OUT_OF_RANGE = {
    "a target of V": ("targets", (1, 2), 256, "loss: target 256 at [1, 2] is out of range: it must be 0 to 255, or -100 to be"),
    "a target of -1": ("targets", (0, 0), -1, "loss: target -1 at [0, 0] is out of range"),
    "a large target": ("targets", (3, 15), 1 << 40, "at [3, 15] is out of range"),
    "a token of V": ("tokens", (0, 3), 256, "transformer.wte: token 256 at [0, 3] is out of range: it must be 0 to 255"),
    "a token of -1": ("tokens", (2, 0), -1, "transformer.wte: token -1 at [2, 0] is out of range"),
    "an ignored token": ("tokens", (2, 0), -100, "transformer.wte: token -100 at [2, 0] is out of range"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_an_index_out_of_range_is_one_clear_line(name: str) -> None:
    which, at, value, message = OUT_OF_RANGE[name]
    training, (tokens, targets) = start(config_of()), batch(4, 0.2)
    (tokens if which == "tokens" else targets)[at] = value
    with pytest.raises(UsageError) as error:
        training.step([(tokens, targets)])
    assert message in str(error.value) and "\n" not in str(error.value)
    # On a device no operation looks: the batch does not get there.
    with pytest.raises(UsageError, match="is out of range"):
        training.model.batch_on(STRICT, tokens, targets)


def test_numbers_with_a_fraction_are_no_tokens() -> None:
    training, (tokens, targets) = start(config_of()), batch(4, 0.0)
    with pytest.raises(UsageError, match="tokens are of type float32: they must be an array of integers"):
        training.step([(tokens.astype(np.float32), targets)])


def test_a_sequence_longer_than_the_positions_is_refused_on_every_backend() -> None:
    training = start(config_of())
    long = np.zeros((2, 17), np.int64)
    with pytest.raises(UsageError, match="17 tokens per sequence are too many: the model has 16 positions"):
        training.step([(long, long)])


# ------------------------------------------------------------------------------------------------------ ignored targets


@pytest.mark.parametrize("ignore_index", [-100, -1, 10])
@pytest.mark.parametrize("model", ["gpt", "mlp"])
def test_ignored_targets_are_as_if_they_were_not_there(model: str, ignore_index: int) -> None:
    """In FP64: half of the rows wholly ignored give the loss and gradients of the other half alone."""
    sizes = {"n_head": None} if model == "mlp" else {}
    training = start(config_of(model=model, recipe="fp64", ignore_index=ignore_index, **sizes))
    tokens, targets = batch(6, 0.0)
    targets[targets == ignore_index] = 11
    alone_loss, alone = gradients(training, [(tokens[::2].copy(), targets[::2].copy())])
    targets[1::2] = ignore_index
    loss, grads = gradients(training, [(tokens, targets)])
    assert loss == pytest.approx(alone_loss, rel=1e-14)
    # Sums over rows have some other zeros between them: a few roundings of FP64.
    np.testing.assert_allclose(grads, alone, rtol=1e-9, atol=1e-12 * np.abs(alone).max())


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "amp-fp16"])
def test_all_targets_ignored_is_a_loss_of_nan_and_no_gradient(recipe: str) -> None:
    training = start(config_of(recipe=recipe))
    result = training.step([batch(4, 1.1)])
    assert math.isnan(result.loss) and not result.skipped and result.grad_norm == 0


def test_the_ignored_target_is_a_choice_of_the_run() -> None:
    tokens, targets = batch(4, 0.3, ignore_index=-1)
    theirs = np.where(targets == -1, -100, targets)
    one, other = start(config_of(ignore_index=-1)), start(config_of())
    assert gradients(one, [(tokens, targets)])[0] == gradients(other, [(tokens, theirs)])[0]
    with pytest.raises(UsageError, match="-1 to be ignored"):
        gradients(one, [(tokens, theirs)])


# ---------------------------------------------------------------------------------------------- micro-batches, ranks


def joined(batches: list[Batch]) -> Batch:
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


UNEQUAL = [batch(2, 0.9, 1), batch(2, 0.0, 2), batch(2, 0.5, 3)]


def test_micro_batches_of_unequal_counts_are_one_batch() -> None:
    """In FP64, where only the order of sums differs. The mean of means is another loss, by far more."""
    training = start(config_of(recipe="fp64", grad_accum=3))
    whole_loss, whole = gradients(training, [joined(UNEQUAL)])
    loss, grads = gradients(training, UNEQUAL)
    assert loss == pytest.approx(whole_loss, rel=1e-14)
    np.testing.assert_allclose(grads, whole, rtol=1e-9, atol=1e-12 * np.abs(whole).max())
    training.model = replace(training.model, loss_mean="micro-batches")
    loss, grads = gradients(training, UNEQUAL)
    assert abs(loss - whole_loss) > 1e-3
    assert np.abs(grads - whole).max() > 0.1 * np.abs(whole).max()
    assert loss == pytest.approx(np.mean([gradients(training, [one])[0] for one in UNEQUAL]), rel=1e-14)


def test_a_micro_batch_without_a_target_adds_nothing() -> None:
    training, empty = start(config_of(grad_accum=3)), batch(2, 1.1, 4)
    alone = gradients(training, UNEQUAL[:2])
    for batches in ([empty, *UNEQUAL[:2]], [*UNEQUAL[:2], empty]):
        loss, grads = gradients(training, batches)
        assert loss == alone[0] and np.array_equal(grads, alone[1])
    assert math.isnan(gradients(training, [empty, empty])[0]) and not training.state.grads.any()
    training.model = replace(training.model, loss_mean="micro-batches")
    assert math.isnan(gradients(training, [empty, *UNEQUAL[:2]])[0])  # as PyTorch's loop, which adds the NaN


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "amp-bf16"])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_equal_counts_have_the_bits_of_a_division_by_their_number(recipe: str, ignored: float) -> None:
    """Three micro-batches and a loss scale that is no power of 2, so that S/3 rounds: dividing twice would show."""
    training = start(config_of(recipe=recipe, grad_accum=3))
    tokens, targets = batch(4, ignored)
    batches = [(np.roll(tokens, i), targets) for i in range(3)]
    tokens_mean = gradients(training, batches, 1000.1)
    training.model = replace(training.model, loss_mean="micro-batches")
    mean_of_means = gradients(training, batches, 1000.1)
    assert tokens_mean[0] == mean_of_means[0] and tokens_mean[1].tobytes() == mean_of_means[1].tobytes()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_unequal_counts_are_one_batch(ranks: int) -> None:
    """Each rank has two micro-batches; FP32 sums over ranks, hence the tolerance of a few roundings."""
    config = config_of(batch_size=ranks, grad_accum=2, zero=2)
    batches = [[batch(1, 0.3 * rank + 0.2 * i, 10 * rank + i) for i in range(2)] for rank in range(ranks)]
    whole_loss, whole = gradients(start(replace(config, zero=None)), [joined([one for mine in batches for one in mine])])

    def run(comm: Comm) -> tuple[float, Array, slice]:
        training = start(config, comm)
        loss = forward_backward(training.model, batches[comm.rank], training.state, np.asarray(np.float32(1024)), training.run)
        return float(loss), np.array(training.state.grads), training.state.share

    for loss, grads, own in run_ranks(ranks, run):
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        np.testing.assert_allclose(grads[: own.stop - own.start], whole[own], atol=2e-6 * np.abs(whole).max(), rtol=0)


def test_the_loss_of_a_text_is_the_mean_over_its_targets() -> None:
    training = start(config_of(recipe="fp64"))
    whole = gradients(training, [joined(UNEQUAL)])[0]
    empty = batch(2, 1.1, 4)
    assert mean_loss(training.model, training.state, training.run, [*UNEQUAL, empty]) == pytest.approx(whole, rel=1e-14)
    assert math.isnan(mean_loss(training.model, training.state, training.run, [empty]))


# ------------------------------------------------------------------------------------------------------------- traces


def padded_source(config: Config) -> Trace:
    """A trace of that run with every row's end to be ignored, in each micro-batch from another place on."""
    source = record(config)
    for step in source.steps:
        targets = source.tensors[f"{step}/0.targets"]
        for i, micro in enumerate(targets if targets.ndim == 3 else [targets]):
            micro[:, 3 + 6 * i :] = -100
    return source


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_padded_trace_is_recorded_and_judged(grad_accum: int) -> None:
    config = config_of(recipe="amp-fp16-cpu", batch_size=4, steps=2, grad_accum=grad_accum)
    theirs = record(config, padded_source(config))
    assert not any(finding.departs for finding in judge_trace(config, theirs))
    if grad_accum > 1:  # a loop that averages its micro-batches' means is not what this run says of itself
        wrong = record(replace(config, loss_mean="micro-batches"), theirs)
        assert any(finding.departs for finding in judge_trace(config, wrong))
        assert not any(finding.departs for finding in judge_trace(replace(config, loss_mean="micro-batches"), wrong))


# -------------------------------------------------------------------------------------------------------------- lines

TEXT = np.frombuffer(b"a line\nanother, longer line of text\nx\n\n" * 40, np.uint8)


def test_examples_of_lines_end_with_the_line_that_they_begin_in() -> None:
    """Held against Python's own split, for each block that the same generator draws whole."""
    padded_x, padded_y = sample_batch(TEXT, 64, 16, np.random.default_rng(5), -7)
    x, y = sample_batch(TEXT, 64, 16, np.random.default_rng(5))
    counts = set()
    for i in range(64):
        n = len(bytes(y[i].astype(np.uint8)).split(b"\n")[0]) + 1  # the line end is a target itself
        assert padded_y[i].tolist() == [*y[i, :n], *[-7] * (16 - n)]
        assert padded_x[i].tolist() == [*x[i, :n], *[0] * (16 - n)]
        counts.add(min(n, 16))
    assert min(counts) == 1 and max(counts) == 16
    (first_x, first_y), *_ = sequential_batches(TEXT, 4, 16, None, -7)
    assert first_y[0].tolist() == [*b" line\n", *[-7] * 10] and first_x[0].tolist() == [*b"a line", *[0] * 10]


def test_one_row_of_lines_has_tokens_of_its_own() -> None:
    """Views of one array would overlap: what marks a target as none would stand among the tokens, too."""
    tokens = np.frombuffer(b"ab\ncdefg\n" * 5, np.uint8)
    for draw in (lambda n: sample_batch(tokens, n, 8, np.random.default_rng(3), -100), lambda n: next(
        sequential_batches(tokens, n, 8, None, -100)
    )):  # fmt: skip
        (x, y), (x2, y2) = draw(1), draw(2)
        assert not np.shares_memory(x, y) and x.min() >= 0 and (y == -100).any()
        assert np.array_equal(x[0], x2[0]) and np.array_equal(y[0], y2[0])


def test_a_run_on_lines_has_micro_batches_of_unequal_counts_and_resumes_to_the_byte(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT.tobytes())
    config = config_of(data=str(text), examples="lines", grad_accum=2, batch_size=4, eval_every=2, eval_batches=1)
    (_, one), (_, other) = next(batches_of(config, None))
    model = config.make_model()
    assert model.n_targets(one) != model.n_targets(other)
    runs = [Trainer(config, tmp_path / name) for name in ("whole", "stopped")]
    for trainer in runs:
        trainer.folder.mkdir()
        for _ in range(2):
            trainer.training.step(trainer.next_batches())
            trainer.progress.step += 1
    runs[1].save()
    again = Trainer(config, runs[1].folder)
    again.restore()
    for trainer in (runs[0], again):
        trainer.training.step(trainer.next_batches())
        trainer.progress.step += 1
    assert runs[0].save().read_bytes() == again.save().read_bytes()
    losses = [validation_loss(t.training, t.config, t.corpus, True, t.stopping) for t in (again, runs[0])]
    assert losses[0] is not None and losses[0] == losses[1]
    with pytest.raises(UsageError, match="--examples lines there, blocks here"):
        Trainer(replace(config, examples="blocks"), again.folder).restore()


def test_choices_of_the_loss_are_checked() -> None:
    for given in ({"examples": "line"}, {"loss_mean": "rows"}, {"model": "mlp", "n_head": None, "examples": "lines"}):
        with pytest.raises(UsageError):
            config_of(**given)
