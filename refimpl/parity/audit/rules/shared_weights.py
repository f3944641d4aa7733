"""Rule C5: a weight that several modules share, and a use of it that adds nothing to its gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, tensors_in
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import finding_at, flow_of
from refimpl.parity.audit.step import Step, View

PROBES: tuple[Probe, ...] = ()


@rule("C5", "tied-gradient-dropped")
def tied_gradient_dropped(view: View) -> Iterator[Finding]:
    """A weight is used by several modules, but its gradient lacks the contribution of one of them.

    Seen: a matrix with a gradient, and a module that reads it and whose results reach the loss but that contributes no gradient
    of its size in backward, while another module does. It is a note, since this is also done on purpose (the shared embedding
    of DeBERTa-v3).
    Not reported: passes without gradients, and modules of which one use contributes, as with checkpointing.
    Effect: the gradient is that of only a part of the loss: an embedding tied to the output layer learns from one of the two.
    Fix: use the parameter itself in both places, not `weight.detach()` or `weight.data`.
    Source: refimpl's known mistake of this name; arXiv:2111.09543 for the intended case.
    """
    accumulated = {o.accumulates for o in view.step.operations}
    for name, modules in _uses(view.step).items():
        silent = {module: uses for module, uses in modules.items() if not any(adds for _, adds in uses)}
        counted = all(_counts(view, o) for uses in silent.values() for o, _ in uses)
        if name in accumulated and 0 < len(silent) < len(modules) and counted:
            first = next(iter(silent.values()))[0][0]
            number = f"{name} is used by {len(modules)} modules, of which {', '.join(silent)} added nothing to its gradient"
            found = finding_at(view, first, "C5", "tied-gradient-dropped", "note", number=number,
                               effect="the weight learns from only some of its uses",
                               fix="use the parameter itself in each place, not weight.detach()")  # fmt: skip
            yield replace(found, parameters=(name,))


def _uses(step: Step) -> dict[str, dict[str, list[tuple[Operation, bool]]]]:
    """Return the operations that read each matrix in the forward pass, by module, and whether a gradient of its size came."""
    made: dict[int, set[int]] = defaultdict(set)
    for o in step.operations:
        if o.phase == "backward" and o.sequence is not None and not o.is_view:
            made[o.sequence] |= {math.prod(t.shape) for t in tensors_in(o.outputs)}
    found: dict[str, dict[str, list[tuple[Operation, bool]]]] = defaultdict(lambda: defaultdict(list))
    for o in step.operations:
        if o.phase != "forward" or o.module is None or o.is_view:
            continue
        for t in tensors_in(o.arguments):
            if t.role is not None and t.role.kind == "parameter" and len(t.shape) > 1:
                adds = o.sequence is not None and math.prod(t.shape) in made.get(o.sequence, ())
                found[t.role.name][o.module].append((o, adds))
    return found


def _counts(view: View, operation: Operation) -> bool:
    """Return whether what an operation computes goes on into the loss."""
    return operation.sequence is not None or any(o.sequence is not None for o in flow_of(view.step).readers(operation))
