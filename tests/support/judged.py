"""Operations of PyTorch as the judge of the audit sees them, and results that are not theirs, for its tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.operation import Keep, Operation
from refimpl.parity.audit.recorder import Recorder
from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import Verdict

FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def recorded(function: Callable[[], Any]) -> list[Values]:
    """Return the operations of a function, in order. What a later one writes to, an earlier one has too."""
    seen: list[Values] = []
    observed(function, seen.append)
    return seen


def observed(function: Callable[[], Any], observe: Callable[[Values], None]) -> None:
    """Hand each operation of a function on as soon as it has run."""
    recorder = Recorder(nn.Identity(), choose=_values, observe=observe)
    with recorder:
        function()
    assert not recorder.failures, recorder.failures


def the(name: str, function: Callable[[], Any]) -> Values:
    """Return the only operation of a function that has this name, without overload: 'aten._softmax'."""
    (found,) = [values for values in recorded(function) if values.operation.name.rpartition(".")[0] == name]
    return found


def verdicts(values: Values) -> dict[str, Verdict]:
    """Return the judge's verdicts by result; all results must have one."""
    judge = Judge()
    with torch.no_grad():
        found = {verdict.result: verdict for verdict in judge(values)}
    assert not judge.unjudged, judge.unjudged
    return found


def unjudged(values: Values) -> str:
    """Return why an operation is not judged."""
    judge = Judge()
    with torch.no_grad():
        assert judge(values) == ()
    (reason,) = judge.unjudged
    return reason


def forged(values: Values, result: str, change: Callable[[Tensor], Tensor]) -> Values:
    """Return the operation as if one of its results were another one."""
    name, _, index = result.partition(".")
    old = values.output if name == "out" else values.written[name]
    new: Any = change(old) if index == "" else [change(t) if i == int(index) else t for i, t in enumerate(old)]
    assert index != "" or new.shape == old.shape
    if name == "out":
        return replace(values, output=new, twins={})
    output = None if values.output is values.written[name] else values.output
    return replace(values, output=output, written={**values.written, name: new}, twins={})


def as_if(overload: Any, args: tuple[Any, ...], output: Any) -> Values:
    """Return an operation that no kernel here has, as if it had run."""
    (values,) = recorded(lambda: torch.zeros(1) + 1)[-1:]
    names = tuple(argument.name for argument in overload._schema.arguments)
    return Values(replace(values.operation, name=str(overload), overload=overload), names, args, {}, output, {})


def moved(x: Tensor, ulps: float) -> Tensor:
    """Return x with its largest element moved by some units in the last place."""
    x = x.detach().clone()
    flat, at = x.view(-1), int(x.abs().argmax())
    spacing = torch.finfo(x.dtype).eps * 2.0 ** float(flat[at].abs().double().log2().floor())
    flat[at] += ulps * spacing
    return x


def _values(operation: Operation) -> Keep:
    return Keep.VALUES
