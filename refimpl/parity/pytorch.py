"""Comparison with PyTorch: the same training in refimpl and in PyTorch, side by side.

Three things are compared:

*Trajectories.* Both sides run freely from the same weights on the same batches. Rounding differences grow from step to
step, so their size relative to the distance that the weights have moved is bounded (`TRAJECTORY`). The limits are the
differences between two runs of PyTorch when only its instruction set or its number of threads changes, with some room.
They hold for smooth functions. If the input of a ReLU is within rounding of zero, two correct runs may take different
branches, and then differ by a finite amount: up to 5e-3 in FP32 between two runs of PyTorch whose hidden units are in another
order. So our ReLUs take PyTorch's branches, and where they would have taken the other one, the input must be as near to zero
as the limit of the weights (`Branches`).

*Stages.* PyTorch's first steps are recorded as a trace, and each is judged from PyTorch's own values (`judge.py`): weights,
loss, gradients, unscaled gradients, norm, moments, masters and loss scale.

*Judges.* The same first steps run under the audit, which judges each of PyTorch's operations on its own inputs; where it has
judged what the judge of the trace has, the two must agree (`audit/agreement.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.backends.choose import ON_HOST
from refimpl.errors import UsageError
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import format_of
from refimpl.optim.state import State
from refimpl.parity.findings import Finding
from refimpl.parity.judge import judge_trace
from refimpl.parity.trace import Trace
from refimpl.precision.context import OpPrecision
from refimpl.training.config import Config
from refimpl.training.data import sample_batch
from refimpl.training.memory_limits import need, require_memory
from refimpl.training.progress_bar import Tick, no_tick

if TYPE_CHECKING:
    from refimpl.parity.audit.agreement import Agreement
    from refimpl.parity.pytorch_model import PyTorchTraining

Tensors = Mapping[str, np.ndarray]

RECIPES = ("fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu")
TRAJECTORY = {"fp32": (1e-5, 1e-3), "16 bits": (1e-3, 5e-2)}
"""Limits of a 50-step trajectory: (median over its steps of the absolute loss difference, L2 norm of the weights' difference
divided by that of their change since the start).

The second is 5.4e-4 in FP32 and 2.6e-2 in 16 bits between PyTorch's AVX2 and AVX512 builds. The first is at most 1.3e-4 in
BF16 and 4.9e-5 in FP16 between two runs of refimpl that add the products of a sum in opposite orders (40 seeds each). The
maximum over steps would be less useful: in 2 of those 40 pairs in BF16 a single unusual batch makes it exceed 5e-3.
"""
TRAJECTORY_ROWS = 256
"""Predictions per batch in these figures. Loss and gradients are means over them, and rounding errors of different rows are
independent, so for fewer rows both limits are larger by the square root of the ratio."""
STAGE_STEPS = 3


@dataclass
class Comparison:
    """The results of a comparison."""

    recipe: str
    predictions: int  # per step; the loss is their mean
    rows: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    spread: dict[str, float] = field(default_factory=dict)
    branches: Branches = field(default_factory=lambda: Branches())
    agreement: Agreement | None = None  # of the judge of the trace with the audit of PyTorch's operations

    @property
    def limits(self) -> tuple[float, float]:
        """Return the limits of the loss difference and of the drift."""
        loss, drift = TRAJECTORY["fp32" if self.recipe == "fp32" else "16 bits"]
        fewer_rows = math.sqrt(max(1.0, TRAJECTORY_ROWS / self.predictions))
        return loss * fewer_rows, drift * fewer_rows

    @property
    def first_departure(self) -> Finding | None:
        """Return the finding on the first tensor outside its bound, in the order in which a step computes, or None."""
        return next((finding for finding in self.findings if finding.departs), None)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the verdict, as `--json` writes them."""
        finite = [row for row in self.rows if not row["skipped"]]
        apart = [abs(row["loss"] - row["loss_torch"]) for row in finite]
        counts: dict[str, list[float]] = {}
        for finding in self.findings:
            total = counts.setdefault(finding.point, [0.0, 0.0])
            total[0] += finding.identical * finding.elements
            total[1] += finding.elements
        return {
            "recipe": self.recipe,
            "steps": len(self.rows),
            "max_abs_loss_diff": max(apart, default=0.0),
            "median_abs_loss_diff": median(apart) if apart else 0.0,
            "rel_l2_drift": self.rows[-1]["drift"],
            "scales_equal": all(row["loss_scale"] == row["loss_scale_torch"] for row in self.rows),
            "skips_equal": all(row["skipped"] == row["skipped_torch"] for row in self.rows),
            "other_relu_branches": self.branches.other,
            "other_relu_branches_farthest_from_zero": self.branches.farthest,
            "identical_share_by_stage": {name: same / total for name, (same, total) in counts.items()},
            "torch_spread": self.spread,
            "audit": self.agreement.summary() if self.agreement is not None else None,
        }

    @property
    def agrees(self) -> bool:
        """Return whether everything is within its bound."""
        s, (loss_limit, drift_limit) = self.summary(), self.limits
        close = s["median_abs_loss_diff"] <= loss_limit and max(s["rel_l2_drift"], self.branches.farthest) <= drift_limit
        judges = self.agreement is None or not self.agreement.disagreements
        return close and s["scales_equal"] and s["skips_equal"] and self.first_departure is None and judges


class OverflowingState(State):
    """A state in which backward leaves an Inf in the first parameter's gradient while `overflow` is set."""

    overflow = False

    def accumulate_grad(self, name: str, gradient: Array) -> None:
        super().accumulate_grad(name, gradient)
        if self.overflow and name == next(iter(self.layout.slots)):
            self.grad_views[name].reshape(-1)[0] = math.inf


class Branches:
    """ReLU on PyTorch's branches: y = x where PyTorch's input was positive, else 0. Counts where ours differ."""

    def __init__(self) -> None:
        self.given: dict[str, np.ndarray] = {}
        self.other, self.all = 0, 0
        self.farthest = 0.0  # the largest |input| with another sign than PyTorch's, relative to the layer's root mean square
        self.op = Op("relu", self._forward, self._backward)

    def _forward(self, x: Array, p: OpPrecision) -> tuple[Array, Any]:
        open_ = self.given[p.place]
        z = widen(x, "fp64")
        differs = (z > 0) != open_
        self.other, self.all = self.other + int(differs.sum()), self.all + z.size
        if differs.any():
            self.farthest = max(self.farthest, float(np.abs(z[differs]).max() / np.sqrt((z * z).mean())))
        return p.round(np.where(open_, p.widen(p.cast(x, "x")), 0), "y", x), (open_, format_of(x))

    def _backward(self, dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
        open_, x_format = saved
        return (p.round_grad(np.where(open_, p.widen(dy), 0), "x", x_format),)


class RefimplRun:
    """refimpl's side: a training run without a folder, whose ReLUs take given branches."""

    def __init__(self, config: Config, weights: Tensors) -> None:
        backend = config.make_backend()
        self.training = config.make_training(backend)
        self.state = OverflowingState(self.training.model, self.training.state.formats, backend)
        self.training.state = self.state
        self.branches = Branches()
        self.training.run.overrides = {**self.training.run.overrides, "relu": self.branches.op}
        self.state.load_weights(weights)

    def step(
        self, tokens: np.ndarray, targets: np.ndarray, overflow: bool, branches: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        """Train for one step and return its figures. overflow: put an Inf into the first parameter's gradient."""
        self.state.overflow, self.branches.given = overflow, branches
        r = self.training.step([(tokens, targets)])
        figures = {"loss": r.loss, "loss_scale": r.loss_scale, "grad_norm": r.grad_norm}
        return {**{name: float(x) for name, x in figures.items()}, "skipped": bool(r.skipped)}

    def weights(self) -> dict[str, np.ndarray]:
        """Return copies of the masters by name."""
        return {name: view.copy() for name, view in self.state.layout.views(self.state.master).items()}


def steps_of(config: Config, device: str = "cpu") -> int:
    """Return how often `compare` calls `tick`: once per step, and on the CPU twice more to measure PyTorch's own spread."""
    return config.steps * (3 if device == "cpu" else 1)


def compare(
    config: Config, spread: bool = True, device: str = "cpu", audit: bool = True, tick: Tick = no_tick
) -> Comparison:
    """Train with refimpl (on the host) and with PyTorch (on `device`) side by side.

    spread: measure how far PyTorch is from itself. audit: audit its first steps. tick: callback after each step.
    On 'cuda' the amp recipes run under torch.autocast('cuda'); on the CPU the PyTorch model makes the casts of CUDA's op lists
    explicitly. Errors: UsageError without torch or that device, or for a recipe that has no PyTorch model there.
    """
    if config.model not in ("gpt", "mlp"):
        raise UsageError(f"--model {config.model} has no PyTorch model here: choose gpt or mlp, or give --hf DIR")
    if config.recipe not in RECIPES:
        raise UsageError(f"recipe {config.recipe} has no PyTorch model: choose one of {', '.join(RECIPES)}")
    if config.grad_accum > 1 or (config.optimizer == "sgd" and config.weight_decay):
        raise UsageError("the PyTorch model takes one micro-batch per step, and SGD without weight decay")
    if config.loss_scale not in ("dynamic", "none") or config.masters_from == "rounded":
        raise UsageError("the PyTorch model has a GradScaler (dynamic) or no loss scale, and masters of the original weights")
    if config.backend not in ON_HOST:
        raise UsageError(f"--backend is {config.backend}: refimpl's side runs on the host, choose {' or '.join(ON_HOST)}")
    require_memory([need(config)])
    torch = import_torch()
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}: choose cpu or cuda")
    if device == "cuda" and config.recipe.endswith("-cpu"):
        raise UsageError(f"recipe {config.recipe} has the op lists of CPU autocast: compare it with --device cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no GPU: leave --device at cpu")
    from refimpl.parity.pytorch_model import PyTorchTraining

    weights = config.make_model().initial_weights(np.random.default_rng(config.seed))
    batches = list(_batches(config))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs = PyTorchTraining(config, weights, device)
        result = side_by_side(config, weights, batches, theirs, audit, tick=tick)
        if spread and device == "cpu":
            result.spread = _own_spread(config, weights, batches, theirs, torch, tick)
    finally:
        torch.set_num_threads(threads)
    return result


def import_torch() -> Any:
    """Import and return torch. Errors: UsageError if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UsageError("PyTorch is not installed: pip install 'torch==2.13.0'") from None
    return torch


def _batches(config: Config) -> Any:
    """Yield (tokens, targets, overflow) per step; overflow, true twice if S is dynamic: put an Inf into the gradients."""
    corpus, rng = config.make_corpus(), np.random.default_rng(config.seed + 1)
    injected = {config.steps // 7, config.steps // 2} if config.loss_scale == "dynamic" and config.steps >= 7 else set()
    sizes = config.batch_size, config.block_size
    for i in range(config.steps):
        yield (*sample_batch(corpus.train, *sizes, rng, config.no_target), i in injected)


def side_by_side(
    config: Config, weights: Tensors, batches: list[Any], theirs: PyTorchTraining, audited: bool, stages: int = STAGE_STEPS,
    kernels: Mapping[str, Op] = MappingProxyType({}), tick: Tick = no_tick,
) -> Comparison:  # fmt: skip
    """Train both on the same batches (tokens, targets, overflow).

    audited: whether the first steps are. stages: how many of them are judged. kernels: operations as PyTorch's kernels compute
    them, for the judge (`Judge`). tick: callback after each step.
    """
    from refimpl.parity.audit.agreement import TwinAudit

    predictions = config.batch_size * (1 if config.model == "mlp" else config.block_size)
    ours, result, trace = RefimplRun(config, weights), Comparison(config.recipe, predictions), Trace()
    if stages:
        theirs.write_states(trace, 0)
    with TwinAudit(theirs, stages if audited else 0) as audit:
        for i, (tokens, targets, overflow) in enumerate(batches):
            b = theirs.step(tokens, targets, overflow, trace if i < stages else None)
            audit.step()
            a = ours.step(tokens, targets, overflow, theirs.branches)
            drift = _drift(ours.weights(), theirs.weights(), weights)
            theirs_row = {f"{key}_torch": b[key] for key in a}
            result.rows.append({"step": i + 1, **a, **theirs_row, "drift": drift})
            tick()
    result.findings, result.branches = judge_trace(config, trace, kernels=kernels) if stages else [], ours.branches
    result.agreement = audit.agreement(result.findings) if audited else None
    return result


def _drift(a: Tensors, b: Tensors, start: Tensors) -> float:
    """Return |a - b| / |a - start| over all weights: the difference relative to the distance that they have moved."""
    apart = math.sqrt(sum(_square(a[name], b[name]) for name in start))
    moved = math.sqrt(sum(_square(a[name], start[name]) for name in start))
    return apart / moved if moved else 0.0


def _square(a: np.ndarray, b: np.ndarray) -> float:
    difference = widen(a, "fp64") - widen(b, "fp64")
    return float((difference * difference).sum())


def _own_spread(
    config: Config, weights: Tensors, batches: list[Any], one: PyTorchTraining, torch: Any, tick: Tick
) -> dict[str, float]:
    """Return the differences between PyTorch's run with two threads and with one."""
    from refimpl.parity.pytorch_model import PyTorchTraining


    def losses_of(training: PyTorchTraining) -> Iterator[float]:
        for batch in batches:
            yield training.step(*batch)["loss"]
            tick()

    torch.set_num_threads(2)
    two = PyTorchTraining(config, weights)
    losses = list(losses_of(two))
    torch.set_num_threads(1)
    reference = list(losses_of(PyTorchTraining(config, weights)))
    differences = [abs(x - y) for x, y in zip(losses, reference, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return {"max_abs_loss_diff": max(differences, default=0.0), "rel_l2_drift": _drift(two.weights(), one.weights(), weights)}


# -- the printed report -----------------------------------------------------------------------------------------------


def report(result: Comparison, every: int = 5) -> str:
    """Return the printed report: the table, the first departure, PyTorch's own spread, and the verdict."""
    lines = [f"{'step':>5} {'loss':>11} {'loss torch':>11} {'scale':>9} {'torch':>9} {'skip':>5} {'torch':>5} {'drift':>9}"]
    for row in result.rows:
        odd = row["skipped"] or row["skipped_torch"] or row["loss_scale"] != row["loss_scale_torch"]
        if row["step"] % every == 0 or row["step"] == 1 or odd:
            lines.append(
                f"{row['step']:5} {row['loss']:11.6f} {row['loss_torch']:11.6f} {row['loss_scale']:9g} "
                f"{row['loss_scale_torch']:9g} {row['skipped']!s:>5} {row['skipped_torch']!s:>5} {row['drift']:9.2e}"
            )
    s, (loss_limit, drift_limit) = result.summary(), result.limits
    lines.append("\nidentical elements, each step replayed from PyTorch's own state:")
    lines += [f"  {name:<18} {share:8.2%}" for name, share in s["identical_share_by_stage"].items()]
    worst = max(result.findings, key=lambda f: f.error, default=None)
    if worst:
        lines.append(f"  closest to its bound: {worst.where}, at {worst.error:.2f} of it")
    if result.spread:
        own = result.spread
        lines.append(
            f"\nPyTorch against itself, 2 threads and 1: loss {own['max_abs_loss_diff']:.1e}, drift {own['rel_l2_drift']:.1e}"
        )
    lines.append(
        f"refimpl against PyTorch:              loss {s['max_abs_loss_diff']:.1e}, median of the steps "
        f"{s['median_abs_loss_diff']:.1e} (limit {loss_limit:.1g}), drift {s['rel_l2_drift']:.1e} (limit {drift_limit:.1g})"
    )
    if result.branches.all:
        lines.append(
            f"ReLUs that would have taken the other branch: {result.branches.other} of {result.branches.all}, "
            f"inputs up to {result.branches.farthest:.1e} of their layer's rms (limit {drift_limit:.1g})"
        )
    first = result.first_departure
    if first:
        lines.append(
            f"first departure: {first.where}: {first.error:.3g} times its bound, "
            f"{first.identical:.1%} of elements identical"
        )
    if result.agreement is not None:
        lines += result.agreement.lines()
    same = "equal" if s["scales_equal"] and s["skips_equal"] else "NOT equal"
    lines.append(f"{'AGREES' if result.agrees else 'DEPARTS'}: {result.recipe}, {s['steps']} steps; scales and skips {same}")
    return "\n".join(lines)
