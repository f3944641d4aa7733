"""The audit of a PyTorch training loop: every operation judged, known mistakes named.

    session.py             `Audit`, the context manager around a user's training loop
    report/                what it found, as a page, as data and for the terminal
    agreement.py           `TwinAudit`, the audit of the PyTorch training of compare_pytorch.py, beside that script's own judge
    program.py             `ProgramAudit`, the audit of a program that knows nothing of it; found.py: what trains in it
    step.py                `Step`: what is kept of one audited step; `View`: what a rule looks at
    judge/                 every operation beside the same one in FP64; verdict.py: `Verdict`, its statistics and levels
    rules/                 the catalogue of mistakes in training loops; finding.py: `Finding`, one of them found
    conversions.py         `Conversions`: what every cast did, and the room before overflow; rounding_counts.py: one tensor's
    loop_recipe.py         the loop as a recipe of refimpl's, and the nearest one; loop_rows.py: its operations' formats and
                           sums; loop_states.py: what it keeps per parameter, and its loss scale
    factors.py             the factor that gradients carry, from the scaled loss to the update
    origins.py             where Inf and NaN begin, and which loss scale would have helped
    values.py              `Values`: an operation while its tensors are alive; `Twin`: its result in FP64, with a bound
    borders.py, calls.py   what is read between two steps; calls of backward and of optimizers in a step
    recorder.py            `Recorder`, a context manager around the user's step, sees its operations from forward to optimizer;
                           `UncompiledRecorder` is the same for programs that torch.compile compiles
    operation.py           `Operation`: what is kept of one operation; `Keep`: how much of it
    place.py               where an operation was called: its phase, module and source line, from the Python frames
    nodes.py               which forward operation a node of the autograd graph belongs to, by sequence numbers
    roles.py               which tensor is what: parameter, gradient, optimizer state, buffer, EMA

The audit changes nothing: parameters, random numbers and outputs of an audited step have the bits of an
unaudited one. It needs torch.
"""

from refimpl.parity.audit.session import Audit as Audit
