"""refimpl against PyTorch: the same training side by side, and where it departs.

Two questions are asked, each with its own rule.

*Trajectories.* Both sides run freely from the same weights on the same batches. Rounding differences grow from step to
step, so what is bounded is their size relative to the distance that the weights have moved (`TRAJECTORY`): the bars are
what PyTorch shows against itself when only its instruction set or its number of threads changes, with some room.

*Stages.* Each of the first steps is taken once more by our code from PyTorch's own state, so that no earlier difference is
carried in. Every stage is then bounded by what it can do by itself:

  1 weights     the 16-bit weights are the masters rounded: equal bits
  2 loss, gradients   both sides are roundings of one true value, which an FP64 run gives. With e the smaller distance from
                it, and the other side at most half as accurate (2e), the two are within 3e of each other.
                A loss is one number, near the truth by luck at times: its e is the mean over rows of each row's
  3 unscaled    PyTorch's own scaled gradients, divided by S here: equal bits; found_inf equal
  4 m, v, master   PyTorch's own gradients through our optimizer: a few roundings of FP32 apart (`_update_bound`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.backends import NUMPY
from refimpl.cast import cast, widen
from refimpl.config import Config
from refimpl.data import load_corpus, sample_batch
from refimpl.errors import UsageError
from refimpl.formats import FORMATS
from refimpl.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.models import Model
from refimpl.policy import Run
from refimpl.recipes import get_recipe
from refimpl.state import State
from refimpl.step import through, train_step
from refimpl.tape import Sink, Tape

if TYPE_CHECKING:
    from refimpl.pytorch_twin import Twin

Array = Any
Tensors = Mapping[str, np.ndarray]

RECIPES = ("fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu")
TRAJECTORY = {"fp32": (1e-5, 1e-3), "16 bits": (5e-3, 5e-2)}
"""Bars of a 50-step trajectory: (absolute difference of a loss, relative L2 of the weights' difference to their move).

PyTorch's AVX2 build against its AVX512 build shows 4.8e-7 and 5.4e-4 in FP32, 1.3e-3 and 2.6e-2 in 16 bits.
"""
TRAJECTORY_ROWS = 256
"""Predictions a batch in those figures. Loss and gradient are means over them, and rounding errors of different rows are
independent: over fewer rows both bars are wider by the square root."""
STAGE_STEPS = 3
U = 2.0**-24


@dataclass
class Stage:
    """One tensor at one of the four steps: how it compares, and whether it is within its bound."""

    step: int
    stage: str
    name: str
    identical: float  # share of elements with equal bits
    error: float  # the size of the difference, as a multiple of the bound: above 1 departs
    elements: int

    @property
    def departs(self) -> bool:
        return not self.error <= 1


@dataclass
class Comparison:
    """All that a comparison found."""

    recipe: str
    predictions: int  # of which a step's loss is the mean
    rows: list[dict[str, Any]] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    spread: dict[str, float] = field(default_factory=dict)

    @property
    def bars(self) -> tuple[float, float]:
        loss, drift = TRAJECTORY["fp32" if self.recipe == "fp32" else "16 bits"]
        fewer_rows = math.sqrt(max(1.0, TRAJECTORY_ROWS / self.predictions))
        return loss * fewer_rows, drift * fewer_rows

    @property
    def first_departure(self) -> Stage | None:
        """The first tensor outside its bound, in the order in which a step computes."""
        return next((stage for stage in self.stages if stage.departs), None)

    def summary(self) -> dict[str, Any]:
        """The figures of the verdict, as `--json` writes them."""
        finite = [row for row in self.rows if not row["skipped"]]
        counts: dict[str, list[float]] = {}
        for stage in self.stages:
            total = counts.setdefault(stage.stage, [0.0, 0.0])
            total[0] += stage.identical * stage.elements
            total[1] += stage.elements
        return {
            "recipe": self.recipe,
            "steps": len(self.rows),
            "max_abs_loss_diff": max((abs(row["loss"] - row["loss_torch"]) for row in finite), default=0.0),
            "rel_l2_drift": self.rows[-1]["drift"],
            "scales_equal": all(row["loss_scale"] == row["loss_scale_torch"] for row in self.rows),
            "skips_equal": all(row["skipped"] == row["skipped_torch"] for row in self.rows),
            "identical_share_by_stage": {name: same / total for name, (same, total) in counts.items()},
            "torch_spread": self.spread,
        }

    @property
    def agrees(self) -> bool:
        """Whether everything is within its bound."""
        s, (loss_bar, drift_bar) = self.summary(), self.bars
        close = s["max_abs_loss_diff"] <= loss_bar and s["rel_l2_drift"] <= drift_bar
        return close and s["scales_equal"] and s["skips_equal"] and self.first_departure is None


class OverflowingState(State):
    """A state whose next backward leaves an Inf in the first parameter's gradient, when `overflow` is set."""

    overflow = False

    def gradient_sink(self, first: bool) -> Sink:
        store = super().gradient_sink(first)

        def sink(name: str, gradient: Array) -> None:
            store(name, gradient)
            if self.overflow and name == next(iter(self.layout.slots)):
                self.grad_views[name].reshape(-1)[0] = math.inf

        return sink


class Side:
    """Our run: the same parts as a training run has, without its folder."""

    def __init__(self, config: Config, weights: Tensors) -> None:
        self.config, recipe = config, get_recipe(config.recipe)
        self.model, self.rule = config.make_model(), config.make_rule()
        self.state = OverflowingState(self.model, recipe.state_formats(self.rule.moments), NUMPY)
        self.state.load_weights(weights)
        self.optimizer, self.loss_scale = config.make_optimizer(NUMPY), config.make_loss_scale(NUMPY.xp)
        self.run = Run(recipe.policy, NUMPY)
        self.max_norm = config.clip or math.inf

    def step(self, tokens: np.ndarray, targets: np.ndarray, overflow: bool) -> dict[str, Any]:
        self.state.overflow = overflow
        r = train_step(self.model, [(tokens, targets)], self.state, self.optimizer, self.loss_scale, self.run, self.max_norm)
        return {"loss": float(r.loss), "loss_scale": float(r.loss_scale), "skipped": bool(r.skipped)}

    def weights(self) -> dict[str, np.ndarray]:
        return {name: view.copy() for name, view in self.state.layout.views(self.state.master).items()}


def compare(config: Config, spread: bool = True) -> Comparison:
    """Train with refimpl and with PyTorch side by side. Errors: UsageError without torch or for another recipe."""
    if config.recipe not in RECIPES:
        raise UsageError(f"recipe {config.recipe} has no twin in PyTorch: choose one of {', '.join(RECIPES)}")
    if config.grad_accum > 1 or (config.optimizer == "sgd" and config.weight_decay):
        raise UsageError("the twin in PyTorch takes one micro-batch a step, and SGD without weight decay")
    torch = _import_torch()
    from refimpl.pytorch_twin import Twin

    weights = config.make_model().initial_weights(np.random.default_rng(config.seed))
    batches = list(_batches(config))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs = Twin(config, weights)
        result = _side_by_side(config, weights, batches, theirs)
        if spread:
            result.spread = _own_spread(config, weights, batches, theirs, torch)
    finally:
        torch.set_num_threads(threads)
    return result


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UsageError("PyTorch is not installed: pip install 'torch==2.13.0'") from None
    return torch


def _batches(config: Config) -> Any:
    """The batches, and whether to put an Inf into each one's gradients: twice, in recipes that have a loss scale."""
    assert config.block_size and config.batch_size and config.steps
    corpus, rng = load_corpus(config.data, config.block_size), np.random.default_rng(config.seed + 1)
    injected = {config.steps // 7, config.steps // 2} if config.loss_scale == "dynamic" and config.steps >= 7 else set()
    for i in range(config.steps):
        yield (*sample_batch(corpus.train, config.batch_size, config.block_size, rng), i in injected)


def _side_by_side(config: Config, weights: Tensors, batches: list[Any], theirs: Twin) -> Comparison:
    assert config.batch_size and config.block_size
    predictions = config.batch_size * (config.block_size if config.model == "gpt" else 1)
    ours, result = Side(config, weights), Comparison(config.recipe, predictions)
    for i, (tokens, targets, overflow) in enumerate(batches):
        before = _snapshot(theirs) if i < STAGE_STEPS and not overflow else None
        a, b = ours.step(tokens, targets, overflow), theirs.step(tokens, targets, overflow)
        drift = _drift(ours.weights(), theirs.weights(), weights)
        theirs_row = {f"{key}_torch": b[key] for key in a}
        result.rows.append({"step": i + 1, **a, **theirs_row, "drift": drift})
        if before is not None:
            result.stages += _stages(config, i + 1, before, theirs, b, (tokens, targets))
    return result


def _drift(a: Tensors, b: Tensors, start: Tensors) -> float:
    """|a - b| / |a - start| over all weights: the difference relative to the way that they have gone."""
    apart = math.sqrt(sum(_square(a[name], b[name]) for name in start))
    moved = math.sqrt(sum(_square(a[name], start[name]) for name in start))
    return apart / moved if moved else 0.0


def _square(a: np.ndarray, b: np.ndarray) -> float:
    difference = widen(a, "fp64") - widen(b, "fp64")
    return float((difference * difference).sum())


def _own_spread(config: Config, weights: Tensors, batches: list[Any], one: Twin, torch: Any) -> dict[str, float]:
    """The same run in PyTorch with two threads against the one with one: its own spread, for comparison."""
    from refimpl.pytorch_twin import Twin

    torch.set_num_threads(2)
    two = Twin(config, weights)
    losses = [two.step(*batch)["loss"] for batch in batches]
    torch.set_num_threads(1)
    again = Twin(config, weights)
    reference = [again.step(*batch)["loss"] for batch in batches]
    differences = [abs(x - y) for x, y in zip(losses, reference, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return {"max_abs_loss_diff": max(differences, default=0.0), "rel_l2_drift": _drift(two.weights(), one.weights(), weights)}


# -- stages: each step once more from PyTorch's state ------------------------------------------------------------------


def _snapshot(theirs: Twin) -> dict[str, Any]:
    return {"weights": theirs.weights(), "moments": theirs.moments(), "t": theirs.updates,
            "scale": float(theirs.scaler.get_scale())}  # fmt: skip


def _put_into(state: State, before: dict[str, Any]) -> None:
    """Our flat buffers take PyTorch's state from before its step."""
    state.load_weights(before["weights"])
    for kind, tensors in before["moments"].items():
        if kind in state.buffers:
            views = state.layout.views(state.buffers[kind])
            for name, tensor in tensors.items():
                views[name][...] = tensor
    state.t = np.asarray(np.int64(before["t"]))


def _stages(config: Config, step: int, before: dict[str, Any], theirs: Twin, row: dict[str, Any], batch: Any) -> list[Stage]:
    """Our step from PyTorch's state, each stage beside PyTorch's."""
    tokens, targets = batch
    side = Side(config, before["weights"])
    state = side.state
    _put_into(state, before)
    scale = np.asarray(np.float32(before["scale"]))
    found: list[Stage] = []

    def check(stage: str, name: str, ours: np.ndarray, other: np.ndarray, bound: Any) -> None:
        a, b = widen(np.asarray(ours), "fp64"), widen(np.asarray(other), "fp64")
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        distance = float(np.linalg.norm(a[~same] - b[~same]))
        error = 0.0 if same.all() else distance / bound if bound > 0 else math.inf
        found.append(Stage(step, stage, name, float(same.mean()), error, same.size))

    state.weights_down()
    for name, p in theirs.model.named_parameters():
        # After their step the 16-bit model still holds the weights of its forward; FP32 weights have moved on since.
        if before["weights"][name].dtype != state.weights.dtype:
            check("1 weights", name, state.weight_views[name], np.array(p.detach().float().numpy()), 0.0)

    with np.errstate(all="ignore"):
        loss = through(side.model, [(tokens, targets)], state, scale, side.run)
        row_error, truth = _truth(side, tokens, targets, float(scale))
    noise = 3 * row_error + 4 * U * float(loss)
    check("2 loss", "loss", np.asarray(loss), np.asarray(row["loss"]), noise)
    smallest = _smallest_of(state.formats["grads"], config)
    for name, gradient in state.grad_views.items():
        floor = smallest * math.sqrt(gradient.size)
        errors = [math.sqrt(_square(one, truth[name])) for one in (gradient, theirs.scaled_grads[name])]
        noise = 3 * min(errors) + floor + 4 * U * float(np.linalg.norm(truth[name]))
        check("2 gradients", name, gradient, theirs.scaled_grads[name], noise)

    for name, view in state.grad_views.items():
        fmt = state.formats["grads"]
        view[...] = theirs.scaled_grads[name] if fmt == "fp32" else cast(theirs.scaled_grads[name], fmt)
    inverse = inverse_of(scale)
    for name, view in state.grad_views.items():
        check("3 unscaled", name, widen(view, "fp32") * inverse, theirs.unscaled_grads[name], 0.0)
    found_inf, norm = check_and_measure(state, inverse)
    norm_error = _norm_error(state.layout.size)
    check("3 norm", "norm", np.asarray(norm), np.asarray(np.float32(row["grad_norm"])), norm_error * float(norm))

    old = {kind: buffer.copy() for kind, buffer in state.buffers.items()}
    coefficient = clip_coefficient(norm, side.max_norm)
    side.optimizer.update(state, inverse, coefficient, found_inf)
    relative = (norm_error if float(coefficient) < 1 else 0.0) + 16 * U
    for kind, tensors in (*theirs.moments().items(), ("master", theirs.weights())):
        if kind != "master" and kind not in state.buffers:
            continue
        buffer = state.master if kind == "master" else state.buffers[kind]
        start = old[kind] if kind in old else old["weights"]
        views, starts = state.layout.views(buffer), state.layout.views(start)
        for name, tensor in tensors.items():
            check(f"4 {kind}", name, views[name], tensor, _update_bound(views[name], starts[name], relative))
    return found


def _update_bound(after: np.ndarray, before: np.ndarray, relative: float) -> float:
    """How far two orders of the same FP32 operations may end apart, in L2.

    Moments and masters are old + change. The change is a chain of at most 16 operations, each within u of its result and
    none a cancelling difference but the last sum, times a clip coefficient as exact as its norm: `relative` of the change.
    Decay and the last sum round once each, within u of the value: 2 u of the value on each side.
    """
    a, b = widen(after, "fp64"), widen(before, "fp64")
    return 2 * relative * float(np.linalg.norm(a - b)) + 4 * U * (float(np.linalg.norm(a)) + float(np.linalg.norm(b)))


def _norm_error(size: int) -> float:
    """Relative error of PyTorch's norm: a running FP32 sum in 8 lanes, (n/8 + 8) u, halved by the root; plus ours."""
    return (size / 8 + 16) * U


def _smallest_of(fmt: str, config: Config) -> float:
    """What underflow in 16 bits can add or remove: the smallest subnormal of the format that gradients pass through."""
    low = config.recipe.removeprefix("amp-").removesuffix("-cpu")
    return FORMATS[low if low in ("fp16", "bf16") else fmt].smallest_subnormal


def _truth(side: Side, tokens: np.ndarray, targets: np.ndarray, scale: float) -> tuple[float, dict[str, np.ndarray]]:
    """The FP64 run from the very weights that our forward read: our mean error of a row's loss, and the scaled gradients."""
    recipe, model = get_recipe("fp64"), side.model
    exact = State(model, recipe.state_formats(()), NUMPY)
    for name, view in exact.weight_views.items():
        widen(side.state.weight_views[name], "fp64", out=view)
    run = Run(recipe.policy, NUMPY)
    through(model, [(tokens, targets)], exact, np.asarray(np.float64(scale)), run)
    row_losses = [_row_losses(model, state, r, tokens, targets) for state, r in ((side.state, side.run), (exact, run))]
    return float(np.abs(row_losses[0] - row_losses[1]).mean()), exact.grad_views


def _row_losses(model: Model, state: State, run: Run, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each row, in FP64 from the logits as they are stored."""
    logits = model.logits(Tape(run, state.weight_views, model.tied, record=False), tokens).array
    z = widen(logits.reshape(-1, logits.shape[-1]), "fp64")
    target = (targets if logits.ndim == 3 else targets[:, -1]).reshape(-1)
    top = z.max(-1)
    losses: np.ndarray = np.log(np.exp(z - top[:, None]).sum(-1)) + top - z[np.arange(target.size), target]
    return losses


# -- what a person sees -----------------------------------------------------------------------------------------------


def report(result: Comparison, every: int = 5) -> str:
    """The table, the first departure, PyTorch's own spread, and the verdict."""
    lines = [f"{'step':>5} {'loss':>11} {'loss torch':>11} {'scale':>9} {'torch':>9} {'skip':>5} {'torch':>5} {'drift':>9}"]
    for row in result.rows:
        odd = row["skipped"] or row["skipped_torch"] or row["loss_scale"] != row["loss_scale_torch"]
        if row["step"] % every == 0 or row["step"] == 1 or odd:
            lines.append(
                f"{row['step']:5} {row['loss']:11.6f} {row['loss_torch']:11.6f} {row['loss_scale']:9g} "
                f"{row['loss_scale_torch']:9g} {row['skipped']!s:>5} {row['skipped_torch']!s:>5} {row['drift']:9.2e}"
            )
    s, (loss_bar, drift_bar) = result.summary(), result.bars
    lines.append("\nidentical elements, each step taken from PyTorch's own state:")
    lines += [f"  {name:<12} {share:8.2%}" for name, share in s["identical_share_by_stage"].items()]
    worst = max(result.stages, key=lambda stage: stage.error, default=None)
    if worst:
        lines.append(f"  nearest to its bound: {worst.name} at '{worst.stage}', step {worst.step}: {worst.error:.2f} of it")
    if result.spread:
        own = result.spread
        lines.append(
            f"\nPyTorch against itself, 2 threads and 1: loss {own['max_abs_loss_diff']:.1e}, drift {own['rel_l2_drift']:.1e}"
        )
    lines.append(
        f"refimpl against PyTorch:              loss {s['max_abs_loss_diff']:.1e} (bar {loss_bar:.1g}), "
        f"drift {s['rel_l2_drift']:.1e} (bar {drift_bar:.1g})"
    )
    first = result.first_departure
    if first:
        lines.append(
            f"first departure: step {first.step}, '{first.stage}', {first.name}: {first.error:.3g} times its bound, "
            f"{first.identical:.1%} of elements identical"
        )
    same = "equal" if s["scales_equal"] and s["skips_equal"] else "NOT equal"
    lines.append(f"{'AGREES' if result.agrees else 'DEPARTS'}: {result.recipe}, {s['steps']} steps; scales and skips {same}")
    return "\n".join(lines)
