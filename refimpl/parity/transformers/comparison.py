"""The comparison of transformers' model of a folder with ours: from FP64, operation by operation, and over some steps.

*From FP64.* One forward and one backward pass of each, against an FP64 reference of the same weights (`distances.py`), and,
where a gradient of one is more than twice as far as that of the other, theirs with its sums in other orders (`spread.py`).

*Operation by operation.* The same pass of theirs is recorded, and each rounding of ours is computed from their own numbers
(`following.py`). At least 999 of 1000 results must be identical: the others are sums in another order, rounded the other way.
The audit has judged each of their operations too; where both have judged one, they must agree. What no 16-bit rounding makes,
and what a fused kernel for attention does, is held to the bounds of a trace: outputs, their gradients, and those of parameters,
computed from the tensors before them (`parity/judge.py`).

*Over some steps.* Both are trained on the same batches, and the first steps are judged tensor by tensor, as PyTorch's training
of our own models is (`parity/pytorch.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refimpl.errors import UsageError
from refimpl.nn.op import Op
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of
from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.operation import Operation
from refimpl.parity.findings import Finding
from refimpl.parity.judge import Judge
from refimpl.parity.other_kernels import OTHER_KERNELS
from refimpl.parity.pytorch import STAGE_STEPS, Comparison, side_by_side
from refimpl.parity.tolerances import fp64
from refimpl.parity.trace import Trace
from refimpl.parity.transformers.distances import (
    FACTOR,
    LOGITS,
    Distance,
    measure,
    middle,
    reference,
    run_pass,
)
from refimpl.parity.transformers.following import ENOUGH, Compared, replay
from refimpl.parity.transformers.kernels import cross_entropy_with, kernels_of
from refimpl.parity.transformers.ours import Batch, Ours
from refimpl.parity.transformers.recording import Recording
from refimpl.parity.transformers.spread import distances_in_other_orders, widest_ratio
from refimpl.parity.transformers.training import TransformersTraining
from refimpl.training.config import Config
from refimpl.training.progress_bar import Tick, no_tick

LARGE = 20_000_000
"""Parameters of a model whose steps are trained side by side, but not judged tensor by tensor: that takes many copies."""
MOVES = (
    "embedding", "clone", "cat", "neg", "copy_", "slice_backward", "zeros", "zeros_like", "scalar_tensor", "where", "repeat",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip
"""Operations of theirs without a counterpart: they copy, or are attention's kernel, which the steps judge by its own bound."""
SUMS_WITH_ZEROS = ("attn", "self_attn")
"""Modules in which `add` also adds the mask, where ours hides a score, and puts the halves of a head together beside zeros."""


@dataclass
class Result:
    """A comparison.

    losses: ours, theirs, FP64's. distances: of the logits, then of each gradient. spread: how many times as far from FP64 as
    another pass of theirs a gradient of theirs is by itself, None if no gradient asks for it. compared: each rounding. alone:
    results of theirs with 16 bits that none of our roundings makes, by operation. serious: the operations of theirs that the
    audit minds. findings: tensors of the pass without a 16-bit rounding, judged as a trace. kernels: what stands in place of
    our definitions in both. steps: None if there were none.
    """

    ours: Ours
    losses: tuple[float, float, float]
    distances: list[Distance]
    spread: float | None
    compared: list[Compared]
    alone: Counter[str]
    serious: list[Operation]
    findings: list[Finding]
    kernels: Mapping[str, Op]
    steps: Comparison | None = None

    @property
    def logits(self) -> Distance:
        """Return the distance of the logits."""
        return self.distances[0]

    @property
    def gradients(self) -> list[Distance]:
        """Return the distances of the gradients."""
        return self.distances[1:]

    @property
    def far(self) -> list[Distance]:
        """Return where one side is much farther from FP64 than the other: logits, the median gradient, single ones."""
        together = [each for each in (self.logits, middle(self.gradients)) if each.beyond(FACTOR)]
        return together + [each for each in self.gradients if each.beyond(FACTOR * (self.spread or 1.0))]

    @property
    def results(self) -> int:
        """Return how many 16-bit results were compared."""
        return sum(each.elements for each in self.compared if each.result is not None)

    @property
    def identical(self) -> float:
        """Return the share of them that is identical; 1 if there are none."""
        return 1 - sum(each.differ for each in self.compared) / max(1, self.results)

    @property
    def apart(self) -> list[Compared]:
        """Return the roundings whose results differ by more than sums in another order explain."""
        return [each for each in self.compared if each.departs]

    @property
    def outside(self) -> list[Finding]:
        """Return the tensors of the pass that are outside their bounds."""
        return [finding for finding in self.findings if finding.departs]

    @property
    def unseen(self) -> list[Compared]:
        """Return our roundings that transformers does not make; inside a kernel for attention nobody sees them."""
        fused = self.ours.attention == "sdpa"
        return [each for each in self.compared if each.result is None and not (fused and each.site.startswith("attention."))]

    @cached_property
    def disagreements(self) -> list[str]:
        """Return sentences on the operations that the audit and this comparison judge differently."""
        found = []
        for each in self.compared:
            verdict = each.verdict
            if verdict is not None and each.departs != is_serious(verdict.level):
                says = f"{verdict.level}: {verdict.reason}" if is_serious(verdict.level) else "right"
                own = f"{each.differ} of {each.elements} differ{f' ({each.note})' if each.note else ''}"
                found.append(f"{each.place}, {each.site}: by the comparison {own}; by the audit the operation is {says}")
        used = {each.result.operation.index for each in self.compared if each.result is not None}
        for operation in self.serious:
            if operation.index not in used:
                v = next(v for v in operation.verdicts if is_serious(v.level))
                what = f"{operation.module}, {operation.name}"
                found.append(f"{what}: by the audit {v.level}: {v.reason}; the comparison has no such result")
        return found

    @property
    def both(self) -> int:
        """Return how many operations of transformers both have judged."""
        judged = [each.result for each in self.compared if each.verdict is not None]
        return len({result.operation.index for result in judged if result is not None})

    @property
    def agrees(self) -> bool:
        """Return whether all of it is within its bounds."""
        named = [self.far, self.apart, self.unseen, self.alone, self.disagreements, self.outside]
        return not any(named) and self.identical >= ENOUGH and (self.steps is None or self.steps.agrees)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the verdict, as `--json` writes them."""
        return {
            "recipe": self.ours.config.recipe, "attention": self.ours.attention, "agrees": self.agrees,
            "losses": dict(zip(("ours", "theirs", "fp64"), self.losses, strict=True)),
            "logits": vars(self.logits), "gradients": vars(middle(self.gradients)), "far": [d.name for d in self.far],
            "spread": self.spread,
            "results_of_16_bits": self.results, "identical": self.identical,
            "apart": sorted({each.site for each in self.apart}), "unseen": sorted({each.site for each in self.unseen}),
            "alone": dict(self.alone), "outside": [finding.where for finding in self.outside],
            "operations_judged_by_both": self.both, "disagreements": self.disagreements,
            "steps": self.steps.summary() if self.steps is not None else None,
        }  # fmt: skip


def compare(folder: Path, ours: Ours, tick: Tick = no_tick) -> Result:
    """Compare the model of a folder with ours. tick: callback after each step.

    Errors: UsageError without the packages, or for what cannot be compared.
    """
    with _one_thread():
        return _compare(folder, ours, tick)


def _compare(folder: Path, ours: Ours, tick: Tick) -> Result:
    config = ours.config
    theirs = TransformersTraining(config, folder, ours.attention)
    kinds = {operation.kind for operation in theirs.operations}
    kernels = {name: op for name, op in kernels_of(config.make_recipe(), ours.attention == "sdpa").items() if name in kinds}
    batches = ours.batches()
    tokens, targets, _ = batches[0]
    recording = Recording(theirs, tokens, targets, ours.S)
    weights, policy = ours.read_weights(), config.make_recipe().policy
    distances, losses, spread = _distances(ours, theirs, weights, recording, (tokens, targets), kernels)
    if recording.log_sums is not None:
        log_sums = recording.log_sums
        kernels = {**kernels, "cross_entropy": cross_entropy_with(lambda own: widen(log_sums, format_of(own)))}
    compared = replay(theirs.ours, weights, policy, recording, (tokens, targets), ours.S, kernels)
    findings = _held_to_bounds(config, _whole(recording, weights, (tokens, targets), ours.S), kernels)
    alone = _alone(recording, compared)
    result = Result(ours, losses, distances, spread, compared, alone, recording.serious, findings, kernels)
    del recording
    if config.steps > 1:
        stages = STAGE_STEPS if theirs.ours.n_params <= LARGE else 0
        of_steps = {name: op for name, op in kernels.items() if name != "cross_entropy"}
        result.steps = side_by_side(config, ours.weights, batches, theirs, bool(stages), stages, of_steps, tick)
    return result


def _distances(
    ours: Ours, theirs: TransformersTraining, weights: Mapping[str, Any], recording: Recording, batch: Batch,
    kernels: Mapping[str, Op],
) -> tuple[list[Distance], tuple[float, float, float], float | None]:  # fmt: skip
    """Return the distances from FP64, the losses, and PyTorch's own spread.

    PyTorch's sums of exponentials over a large vocabulary err more than ours, and with them all gradients. So the pass with
    other correct kernels has errors as large as theirs are.
    """
    model, policy, backend = ours.config.make_model(), ours.config.make_recipe().policy, ours.config.make_backend()
    own = run_pass(model, weights, policy, backend, batch, ours.S)
    others = {**kernels, **(OTHER_KERNELS if ours.attention == "sdpa" else {})}
    if (errors := recording.errors_of_log_sums()) is not None:
        others["cross_entropy"] = cross_entropy_with(lambda own: own + cast(errors, format_of(own)))
    other = run_pass(model, weights, policy, backend, batch, ours.S, others) if others else own
    exact = reference(model, weights, backend, batch, ours.S)
    trace = recording.trace

    def measured(name: str, point: str, place: str, of: Any) -> Distance:
        recorded = trace.get(1, point, place)
        assert recorded is not None
        return measure(name, of(own), recorded, of(exact), of(other))

    found = [measured(LOGITS, "2.activations", "lm_head", lambda p: p.logits)]
    for name in model.parameters:
        found.append(measured(name, "2.grads", name, lambda p, name=name: p.grads[name]))
    own_spread = None
    if any(each.beyond(FACTOR) for each in found[1:]):
        own_spread = widest_ratio(distances_in_other_orders(theirs, exact.grads, batch, ours.S))
    theirs.model.zero_grad(set_to_none=True)
    return found, (own.loss, recording.loss, exact.loss), own_spread


def _whole(recording: Recording, weights: Mapping[str, Any], batch: Batch, S: float) -> Trace:
    """Return the trace of a recorded pass with what it started from."""
    trace = recording.trace
    for point, array in (("0.tokens", batch[0]), ("0.targets", batch[1]), ("2.loss_scale", S), ("2.loss", recording.loss)):
        trace.put(1, point, "", array if isinstance(array, np.ndarray) else np.float32(array))
    for name, w in weights.items():
        trace.put(1, "1.weights", name, w)
    return trace


def _held_to_bounds(config: Config, trace: Trace, kernels: Mapping[str, Op]) -> list[Finding]:
    """Judge the tensors of a pass that are not made by 16-bit roundings, each of which is compared by itself.

    A trace's bound of those would be exceeded by chance: `LARGEST` in `following.py` has the numbers.
    """
    judge, found = Judge(config, trace, kernels=kernels), []
    low = config.make_recipe().policy.row("linear.y").input("x")
    fused = {"self_attn", "attn", "q_rope", "k_rope", "v_proj", "c_attn"} if config.attention == "fused" else set[str]()
    for finding in judge.findings():
        ours = judge.ours.get(1, finding.point, finding.name)
        kernel = finding.name.rpartition(".")[2] in fused
        if ours is None or kernel or low == "fp32" or not np.array_equal(fp64(cast(ours, low)), fp64(ours), equal_nan=True):
            found.append(finding)
    return found


def _alone(recording: Recording, compared: list[Compared]) -> Counter[str]:
    """Return 16-bit results of theirs that none of our roundings makes: operation and module -> elements.

    Copies are not counted, nor what the next operation halves, which is exact: there ours rounds once, after that.
    """
    used = [each.result for each in compared if each.result is not None]
    known = {(result.operation.index, result.name) for result in used}
    halved = {result.read("self") for result in used if result.operation.arguments.get("other") == 0.5}
    alone: Counter[str] = Counter()
    for result in recording.results:
        operation = result.operation
        last = (operation.module or "").rpartition(".")[2]
        moved = result.is_a(*MOVES) or (result.is_a("add") and last in SUMS_WITH_ZEROS) or result.facts.storage in halved
        if not moved and (operation.index, result.name) not in known:
            alone[f"{operation.name} in {last or 'the model'}, {operation.phase}"] += result.values.size
    return alone


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def require_packages() -> None:
    """Check that transformers is installed. Errors: UsageError."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UsageError("transformers is not installed: pip install 'transformers==5.24.0'") from None
