"""What a training run prints: its header, its end with a sample and the files that it wrote, and warnings."""

from __future__ import annotations

import importlib.util
import math

import numpy as np

from refimpl.distributed.zero import exchanged
from refimpl.errors import UsageError
from refimpl.training.console import count, printable
from refimpl.training.evaluate import TextLoss
from refimpl.training.kept_checkpoints import kept_in
from refimpl.training.metrics import WHOLE, WHOLE_BITS, read_metrics
from refimpl.training.ngrams import NgramBaselines
from refimpl.training.pictures import NO_PICTURE
from refimpl.training.plots import plot_run
from refimpl.training.run_folder import CONFIG, METRICS, PICTURE, VALIDATION
from refimpl.training.sampling import START, Writer
from refimpl.training.setup import SAMPLE, generator
from refimpl.training.trainer import Trainer

MANY_SKIPPED = 0.1
"""The share of skipped steps above which a run ends with a warning."""


def announce(trainer: Trainer, baselines: NgramBaselines) -> None:
    """Print the header: the model and the recipe, the bytes of its states, the text, and the baselines."""
    config, model, state = trainer.config, trainer.model, trainer.state
    print(f"{model.name}, {model.n_params:,} parameters, recipe {trainer.recipe.name}: {trainer.recipe.summary}")
    if trainer.fault is not None:
        print(trainer.fault.announcement)
    kinds = " + ".join(f"{kind} {buffer.nbytes / model.n_params:g}" for kind, buffer in state.buffers.items())
    rank = f" on each of {trainer.comm.size} ranks, ZeRO stage {config.zero}" if trainer.comm.size > 1 else ""
    print(f"model states: {kinds} = {state.nbytes / model.n_params:g} bytes per parameter, as measured{rank}")
    if config.grad_accum > 1 and state.formats["grads"] != trainer.recipe.state["grads"]:
        print(f"  (gradients are summed over {config.grad_accum} micro-batches in FP32)")
    if config.zero is not None and trainer.comm.size == 1:
        print("  (one rank, which stores everything; start several with mpiexec -n N python -m mpi4py scripts/train.py ...)")
    corpus = trainer.corpus
    unit = corpus.tokenizer.unit
    print(f"data: {corpus.name}, {count(len(corpus.train), unit)} to train on, {len(corpus.valid):,} to validate on")
    if unit != "byte":
        comparable = "bits per byte compare between tokenizers"
        print(f"tokenizer: {corpus.tokenizer.name}, {corpus.tokenizer.vocab_size:,} ids; {comparable}")
    if baselines.entropies:
        sampled = " (from a sample)" if baselines.sampled else ""
        print(f"baselines{sampled}: {_list_baselines(baselines)}")
    if config.steps <= config.warmup:
        within = f"--steps {config.steps} ends within the warm-up, --warmup {config.warmup}"
        print(f"note: {within}: --lr {config.lr:g} is not reached")


def _list_baselines(baselines: NgramBaselines) -> str:
    names = {1: "unigram", 2: "bigram", 3: "trigram"}
    return ", ".join(f"{names[n]} {entropy:.3f}" for n, entropy in baselines.entropies.items()) + " nats per byte"


def _compared(baselines: NgramBaselines) -> str:
    """Return what follows the loss at the end of a run: what it compares with."""
    return f"; {_list_baselines(baselines)}" if baselines.entropies else ""


def _losses(trainer: Trainer) -> str:
    """Return the losses at the end of a run: beside that before its first step, if it is known, and of the whole text."""
    rows = read_metrics(trainer.folder).evaluations
    unit, first, last = trainer.corpus.tokenizer.unit, rows[0], rows[-1]

    def described(*names: str) -> str:
        return TextLoss(*(_number(last.get(name)) for name in names)).described(unit)

    known = first["step"] == 0 and last["step"] > 0
    lines = []
    if known or WHOLE not in last:
        before = f"; before the first step {_number(first['val_loss']):.4f}" if known else ""
        lines.append(f"validation loss {described('val_loss', 'val_bits_per_byte')}{before}")
    if WHOLE in last:
        size = count(trainer.corpus.valid.size, unit)
        lines.append(f"validation loss of the whole text ({size}) {described(WHOLE, WHOLE_BITS)}")
    return "\n".join(lines)


def report(trainer: Trainer, baselines: NgramBaselines, steps: int, quiet: bool) -> None:
    """Print the end of a run: the losses, the files that were written, and a sample of the model unless `quiet`."""
    config, progress = trainer.config, trainer.progress
    counted = trainer.comm.on_host.all_reduce(np.array([trainer.exchanged / max(1, steps)]))[0] / trainer.comm.size
    if trainer.writes:
        print(f"\n{_losses(trainer)}{_compared(baselines)}")
        print(f"{progress.skipped} of {count(progress.step, 'step')} skipped, loss scale {float(trainer.loss_scale.scale):g}")
        if trainer.comm.size > 1 and steps:
            print(_exchanged(trainer, counted))
        draw(trainer, baselines)
    if config.sample_bytes and not quiet:
        _show_sample(trainer)


def _show_sample(trainer: Trainer) -> None:
    """Print a sample. Every rank computes it, since ZeRO stage 3 needs all of them; rank 0 prints it."""
    config, rng = trainer.config, generator(trainer.config.seed, SAMPLE)
    tokenizer, stopping = trainer.corpus.tokenizer, trainer.stopping
    prompt, _ = tokenizer.encode(START)
    writer = Writer(trainer.model, trainer.state, trainer.run, tokenizer, prompt if prompt.size else trainer.corpus.valid[:1])
    text = "".join(writer.text(config.sample_bytes, rng, stopping=stopping))
    print(f"\na sample of {count(writer.count, tokenizer.unit)}:\n{'-' * 60}\n{printable(text)}\n{'-' * 60}")
    if writer.why_ended and not stopping():
        print(f"({writer.why_ended})")


def draw(trainer: Trainer, baselines: NgramBaselines) -> None:
    """Plot the run, and print which files its folder has."""
    config, folder = trainer.config, trainer.folder
    if not trainer.writes:
        return
    title = f"{config.model}, recipe {config.recipe}, seed {config.seed}, {trainer.model.n_params:,} parameters"
    if config.mistake != "none":
        title += f"\nMISTAKE injected: {config.mistake}"
    try:
        picture = plot_run(folder, baselines.entropies, title, trainer.corpus.tokenizer.unit)
    except UsageError as error:  # a full disk must not hide why a run stopped
        picture = None
        print(f"no picture: {error}")
    written = [name for name in (CONFIG, METRICS, VALIDATION) if (folder / name).exists()]
    written += [path.name for path in kept_in(folder)]
    written += [PICTURE] if picture else []
    print(f"written to {folder}: {', '.join(written)}")
    if importlib.util.find_spec("matplotlib") is None:
        print(NO_PICTURE)


def warn(trainer: Trainer) -> None:
    """Print warnings, as the last lines: many skipped steps, an injected mistake."""
    progress = trainer.progress
    if progress.skipped > MANY_SKIPPED * progress.step:
        share = 100 * progress.skipped / progress.step
        steps = count(progress.step, "step")
        print(f"WARNING: {progress.skipped} of {steps} ({share:.0f} %) were skipped: they changed no weight")
    if trainer.fault is not None:
        print(trainer.fault.announcement)


def _exchanged(trainer: Trainer, counted: float) -> str:
    """Return the line with the bytes that a rank received per step, counted and as ZeRO predicts them."""
    config, model, comm = trainer.config, trainer.model, trainer.comm
    states = trainer.recipe.bytes_by_buffer(config.make_rule().moments, config.grad_accum)
    again = sum(int(np.prod(model.parameters[name].shape)) for name in set(model.tied.values()))
    predicted = float(exchanged(model.n_params, states, config.zero or 0, comm.size, again, config.grad_accum))
    return (
        f"a rank received {counted:,.0f} bytes per step from the others; ZeRO stage {config.zero} predicts {predicted:,.0f}, "
        f"{predicted / model.n_params:.2f} bytes per parameter"
    )


def _number(loss: float | None) -> float:
    """Return a loss from the log, which stores NaN as null."""
    return math.nan if loss is None else loss
