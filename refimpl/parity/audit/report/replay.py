"""Judges operations once more that an audit has kept: from audit.json and audit.safetensors, without the training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refimpl.errors import UsageError
from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.operation import Operation
from refimpl.parity.audit.report import wording
from refimpl.parity.audit.report.data import VERSION
from refimpl.parity.audit.report.files import TENSORS
from refimpl.parity.audit.report.operands import Unpacked, looked_at
from refimpl.parity.audit.roles import Roles
from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import LEVELS
from refimpl.training.schema import Integer, Maybe, OneOf, Table, Text, check

COMPARED = ("ratio", "equal", "excess", "bits", "level")
"""What of two verdicts must be the same."""
FINDING = Table({"code": Text(), "name": Text(), "number": Text(), "level": OneOf(LEVELS), "replay": Maybe(Text())})
KEPT = Table({
    "id": Text(), "step": Integer(), "operation": Integer(), "name": Text(), "phase": Text(), "module": Maybe(Text()),
    "line": Text(), "values": Table(), "measured": Table(), "excerpt": OneOf((False, True)), "skipped": Text(),
})  # fmt: skip
VALUES = Table({"kwargs": Table(), "written": Table()})
"""What of audit.json is read here; `_check` looks at the lists."""
SHOWN = 100
"""Characters that the terminal shows of what a rule has measured, which may be thousands."""


@dataclass(frozen=True)
class Replayed:
    """One operation judged once more. kept: its data. then, now: verdicts as data.

    measured: whether the rules measure the same. same_bits: whether PyTorch gives the same bits here as it did then, None where
    it cannot run the operation here.
    """

    kept: Mapping[str, Any]
    now: list[dict[str, Any]]
    measured: bool
    same_bits: bool | None

    @property
    def then(self) -> list[dict[str, Any]]:
        """The verdicts of the audit."""
        found: list[dict[str, Any]] = self.kept["verdicts"]
        return found

    @property
    def reproduced(self) -> bool:
        """Whether verdicts and measurements are those of the audit."""
        pairs = zip(self.then, self.now, strict=False)
        same = all(a.get(key) == b[key] for a, b in pairs for key in COMPARED)
        return same and len(self.then) == len(self.now) and self.measured

    @property
    def is_serious(self) -> bool:
        """Whether a verdict is above a note."""
        return any(is_serious(verdict["level"]) for verdict in self.now)


def load_audit(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the data of an audit and the tensors that it has kept. Errors: UsageError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UsageError(f"{path} cannot be read: {reason}") from error
    if not isinstance(data, dict) or data.get("refimpl-audit") != VERSION:
        raise UsageError(f"{path} is not an audit.json of version {VERSION}")
    _check(data, f"{path} is not a complete audit.json")
    file = path.with_name(TENSORS)
    if all(kept["skipped"] for kept in data["replays"]):
        return data, {}
    try:
        return data, load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file}, in which the operands are, cannot be read: {error}") from error


def _check(data: dict[str, Any], damage: str) -> None:
    """Check what a replay reads. Errors: UsageError that begins with `damage`."""
    for i, finding in enumerate(_list(data, "findings", damage)):
        check(finding, FINDING, damage, f"findings[{i}]")
    for i, kept in enumerate(_list(data, "replays", damage)):
        name = f"replays[{i}]"
        check(kept, KEPT, damage, name)
        for verdict in _list(kept, "verdicts", damage, f"{name}."):
            check(verdict, Table(), damage, f"{name}.verdicts")
        if not kept["skipped"]:
            check(kept["values"], VALUES, damage, f"{name}.values")
            _list(kept["values"], "args", damage, f"{name}.values.")
            if "output" not in kept["values"]:
                raise UsageError(f"{damage}: {name}.values.output is missing")


def _list(table: Mapping[str, Any], key: str, damage: str, where: str = "") -> list[Any]:
    found = table.get(key)
    if not isinstance(found, list):
        raise UsageError(f"{damage}: {where}{key} is {'not a list' if key in table else 'missing'}")
    return found


def replayed(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Replayed]:
    """Judge each operation that was kept with its operands."""
    for kept in data["replays"]:
        if kept["skipped"]:
            continue
        prefix = kept["id"] + "/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        values = values_of(kept, own)
        now, measured = looked_at(values)
        yield Replayed(kept, now, measured == kept["measured"], _same_bits(values))


def values_of(kept: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Values:
    """Return an operation with its tensors, as the judge saw it. Errors: UsageError for one that this PyTorch does not have."""
    overload = overload_of(kept["name"])
    try:
        whole = Unpacked(tensors).unpack(kept["values"])
    except KeyError as error:
        raise UsageError(f"{TENSORS} has no tensor {kept['id']}/{error.args[0]}: it belongs to another audit") from None
    names = tuple(argument.name for argument in overload._schema.arguments)
    roles = Roles(torch.nn.Module(), (), None)
    inputs = {**dict(zip(names, whole["args"], strict=False)), **whole["kwargs"]}
    operation = Operation(
        index=kept["operation"], name=kept["name"], overload=overload,
        arguments={name: roles.facts(value) for name, value in inputs.items()}, written=tuple(whole["written"]),
        phase=kept["phase"], recomputed=False, module=kept["module"], line=kept["line"], code_line=kept["line"], node=None,
        sequence=None, accumulates=None, outputs=roles.facts(whole["output"]),
    )  # fmt: skip
    return Values(operation, names, tuple(whole["args"]), whole["kwargs"], whole["output"], whole["written"])


def overload_of(name: str) -> Any:
    """Return PyTorch's object for an operation's name. Errors: UsageError."""
    try:
        found: Any = torch.ops
        for part in name.split("."):
            found = getattr(found, part)
        return found
    except AttributeError as error:
        raise UsageError(f"this PyTorch ({torch.__version__}) has no operation {name}") from error


def _same_bits(values: Values) -> bool | None:
    """Run the operation again on copies of its operands, and compare its results with those of then."""
    again = Values(values.operation, values.names, tuple(_copied(values.args)), _copied(values.kwargs), None, {})
    try:
        again.output = values.operation.overload(*again.args, **again.kwargs)
    except (RuntimeError, NotImplementedError):
        return None
    again.written = {name: again.inputs[name] for name in values.written}
    results = dict(again.results())
    return all(name in results and _equal(results[name], tensor) for name, tensor in values.results())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return [_copied(part) for part in value]
    return {key: _copied(part) for key, part in value.items()} if isinstance(value, dict) else value


def replay_lines(one: Replayed, finding: str) -> Iterator[str]:
    """Yield what the terminal shows of an operation judged once more. finding: what it is of."""
    kept = one.kept
    where = ", ".join(filter(None, (wording.module_of(kept["module"]), wording.place(kept["line"]))))
    yield finding
    what = "part of " * kept["excerpt"] + wording.short_name(kept["name"])
    yield f"  {what} in step {kept['step']}, {kept['phase']}{', ' * bool(where)}{where}"
    for verdict in one.now:
        numbers = f"error / bound {wording.ratio(verdict['ratio'])}, {wording.share(verdict['equal'])} correctly rounded"
        level = ": ".join(filter(None, (verdict["level"], verdict["reason"])))
        yield f"  {verdict['result']} ({verdict['dtype']}): {level}"
        yield f"    {numbers}, excess {wording.ratio(verdict['excess'])} ulp, definition of {verdict['by']}"
    for probe, text in kept["measured"].items():  # the whole text is in the file
        yield f"  measured by the rules, {probe}: {text if len(text) <= SHOWN else text[: SHOWN - 3] + '...'}"
    said = {
        True: "PyTorch gives the same bits here",
        False: "PyTorch gives other bits here",
        None: "PyTorch cannot run it here",
    }
    yield f"  {'reproduced' if one.reproduced else 'NOT REPRODUCED: the audit had other numbers'}; {said[one.same_bits]}"
