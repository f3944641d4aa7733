"""What scripts/train.py does: train in a folder, and tell the person how it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refimpl.data import NgramBaselines, ngram_entropies
from refimpl.generate import sample
from refimpl.metrics import plot_run, read_metrics
from refimpl.run_folder import CHECKPOINT, CONFIG, METRICS, PICTURE, open_folder, prepare_folder
from refimpl.state_file import load_initial_weights
from refimpl.trainer import SAMPLE, Trainer, generator


def train(given: dict[str, Any], out: Path | None, resume: bool, overwrite: bool, init_from: Path | None) -> int:
    """What scripts/train.py does: train, show, write. Returns the exit code: 0, or 130 after Ctrl-C."""
    from tqdm import tqdm

    config, folder = prepare_folder(given, out, resume, overwrite)
    trainer = Trainer(config, folder)
    if resume:
        trainer.restore()
    else:
        if init_from is not None:
            load_initial_weights(init_from, trainer.model, trainer.state, rounded=config.rounds_masters)
        open_folder(config, folder)
    baselines = ngram_entropies(trainer.corpus.train, trainer.corpus.valid)
    _announce(trainer, baselines)
    done = trainer.progress.step
    with tqdm(total=config.steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1) as bar:
        finished = trainer.train(bar)
    if not finished:
        print(f"\nstopped after step {trainer.progress.step}; go on with: --resume --out {folder}")
        return 130
    _report(trainer, baselines)
    return 0


def _announce(trainer: Trainer, baselines: NgramBaselines) -> None:
    config, model, state = trainer.config, trainer.model, trainer.state
    print(f"{model.name}, {model.n_params:,} parameters, recipe {trainer.recipe.name}: {trainer.recipe.summary}")
    kinds = " + ".join(f"{kind} {buffer.nbytes / model.n_params:g}" for kind, buffer in state.buffers.items())
    print(f"model states: {kinds} = {state.nbytes / model.n_params:g} bytes a parameter, as measured")
    if config.grad_accum > 1 and state.formats["grads"] != trainer.recipe.state["grads"]:
        print(f"  (gradients are summed over {config.grad_accum} micro-batches in FP32)")
    corpus = trainer.corpus
    print(f"data: {corpus.name}, {len(corpus.train):,} bytes to train on, {len(corpus.valid):,} to validate on")
    sampled = " (from a sample)" if baselines.sampled else ""
    print(f"to beat{sampled}: {_list_baselines(baselines)}")


def _list_baselines(baselines: NgramBaselines) -> str:
    names = {1: "unigram", 2: "bigram", 3: "trigram"}
    return ", ".join(f"{names[n]} {entropy:.3f}" for n, entropy in baselines.entropies.items()) + " nats a byte"


def _report(trainer: Trainer, baselines: NgramBaselines) -> None:
    """The end of a run: where the loss stands, what the model writes, what was written."""
    config, folder = trainer.config, trainer.folder
    losses = [row["val_loss"] for row in read_metrics(folder / METRICS) if "val_loss" in row]
    print(f"\nvalidation loss {_number(losses[-1])} nats a byte; {_list_baselines(baselines)}")
    scale, progress = float(trainer.loss_scale.scale), trainer.progress
    print(f"{progress.skipped} of {progress.step} steps skipped, loss scale {scale:g}")
    text = b""
    if config.sample_bytes:
        text = sample(trainer.model, trainer.state, trainer.run, config.sample_bytes, generator(config.seed, SAMPLE))
        print(f"\na sample of {config.sample_bytes} bytes:\n{'-' * 60}\n{text.decode('utf-8', 'replace')}\n{'-' * 60}")
    title = f"{config.model}, recipe {config.recipe}, {trainer.model.n_params:,} parameters"
    picture = plot_run(folder, baselines.entropies, title)
    written = [CONFIG, METRICS, CHECKPOINT] + ([PICTURE] if picture else [])
    print(f"written to {folder}: {', '.join(written)}")


def _number(loss: float | None) -> str:
    """A loss as text; the log has null for NaN."""
    return "NaN" if loss is None else f"{loss:.4f}"
