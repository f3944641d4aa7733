"""Operations that an audit has kept, judged once more from its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refimpl.errors import UsageError
from refimpl.parity.audit import Audit
from refimpl.parity.audit import session as session_module
from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.judge.products import product
from refimpl.parity.audit.judge.table import JUDGES
from refimpl.parity.audit.operation import Operation
from refimpl.parity.audit.report import excerpts as excerpt_module
from refimpl.parity.audit.report import operands as operands_module
from refimpl.parity.audit.report.operands import CannotKeep, Operands, Packed, Unpacked, kept_of
from refimpl.parity.audit.report.replay import Replayed, load_audit, replay_lines, replayed
from refimpl.parity.audit.rules.entry import Rule
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Twin, Values
from refimpl.tools.commands.audit import replay


def wrong_bias(values: Values) -> Iterator[Twin]:
    """A judge who holds `addmm` to a bias that was added twice, and so finds fault with it."""
    bias, a, b = (values.inputs[name].double() for name in ("self", "mat1", "mat2"))
    yield Twin("out", values.output, a @ b + 2 * bias, 0.0)


def wrong_update(values: Values) -> Iterator[Twin]:
    """And one who holds `mul_` to a product that is too large."""
    target: Tensor = values.written["self"]
    yield Twin("self", target, values.inputs["self"].double() * 2, 0.0)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """The data of an audit with two kinds of wrong operations, and a rule whose finding rests on one of them."""
    monkeypatch.setitem(JUDGES, "aten.addmm", wrong_bias)
    monkeypatch.setitem(JUDGES, "aten.mul_", wrong_update)

    def find(view: View) -> Iterator[Finding]:
        first = next(operation for operation in view.step.operations if operation.name.startswith("aten.addmm"))
        yield Finding("D99", "bias", "wrong", view.step.number, "", "", "n", "e", "f", operation=first.index)

    monkeypatch.setattr(session_module, "RULES", {"D99": Rule("D99", "bias", 1, find)})
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with Audit(model, optimizer) as audit:
        for _ in range(2):
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            audit.step()
    assert audit.failures == {}
    audit.report(tmp_path)
    capsys.readouterr()
    return tmp_path / "audit.json"


def all_of(report: Path) -> list[Replayed]:
    return list(replayed(*load_audit(report)))


def test_what_was_found_is_reproduced_from_the_files(report: Path) -> None:
    data, tensors = load_audit(report)
    names = [kept["name"] for kept in data["replays"]]
    assert names[0] == "aten.addmm.default" and "aten.mul_.Tensor" in names and data["findings"][0]["replay"] == "r0"
    found = all_of(report)
    assert len(found) == len(names) and all(one.reproduced and one.same_bits and one.is_serious for one in found)
    rows = {row["operation"]: row for row in data["operations"]}
    worst = next(kept for kept in data["replays"] if kept["id"] == rows["aten.mul_.Tensor"]["replay"])
    assert worst["verdicts"][0]["ratio"] == rows["aten.mul_.Tensor"]["error_over_bound"]
    assert worst["operation"] == rows["aten.mul_.Tensor"]["worst"]["operation"]
    assert sum(tensor.numel() for tensor in tensors.values()) < 1000


def test_the_command_prints_them(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(report.parent) == 1  # the folder of the report is as good as its audit.json
    out = capsys.readouterr().out
    assert "D99 bias: n\n  addmm in step 1, forward, (the model)" in out
    assert "the worst of its kind\n  mul_.Tensor in step" in out
    assert out.count("  reproduced; PyTorch gives the same bits here") == len(all_of(report)) and "wrong: error" in out


def test_other_numbers_are_noticed(report: Path) -> None:
    file = report.with_name("audit.safetensors")
    tensors = load_file(file)
    data = json.loads(report.read_text(encoding="utf-8"))
    target = data["replays"][0]["values"]["output"]["$tensor"]
    save_file({**tensors, f"r0/{target}": tensors[f"r0/{target}"] * 3}, file)
    first, *others = all_of(report)
    assert not first.reproduced and first.same_bits is False and all(one.reproduced for one in others)
    assert "NOT REPRODUCED" in "\n".join(replay_lines(first, "D99"))
    data["replays"][0]["measured"] = {"other": "3" * 3000}
    save_file(tensors, file)
    report.write_text(json.dumps(data), encoding="utf-8")
    first = all_of(report)[0]
    assert not first.reproduced
    measured = next(line for line in replay_lines(first, "D99") if "measured" in line)
    assert measured == f"  measured by the rules, other: {'3' * 97}..."


def test_bad_files_are_one_line(report: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"refimpl-audit": 99}')
    (tmp_path / "text.json").write_text("no")
    for name, why in (("none.json", "cannot be read"), ("text.json", "it is not JSON"), ("other.json", "of version 1")):
        with pytest.raises(UsageError, match=why):
            load_audit(tmp_path / name)
    report.with_name("audit.safetensors").write_bytes(b"1234")
    with pytest.raises(UsageError, match=r"audit\.safetensors, in which the operands are"):
        load_audit(report)
    data = json.loads(report.read_text(encoding="utf-8"))
    data["replays"] = [{**data["replays"][0], "name": "aten.no_such_thing.default"}]
    with pytest.raises(UsageError, match=r"has no operation aten\.no_such_thing"):
        list(replayed(data, {}))


def test_a_file_that_lacks_something_is_one_line(report: Path) -> None:
    """As of a file that was written by hand, or of another version."""
    whole = report.read_text(encoding="utf-8")

    def refused(change: Callable[[dict[str, Any]], object], why: str) -> None:
        data = json.loads(whole)
        change(data)
        report.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(UsageError, match=why):
            replay(report)

    refused(lambda data: data.pop("findings"), "is not a complete audit.json: findings is missing")
    refused(lambda data: data.update(replays=3), "replays is not a list")
    refused(lambda data: data["findings"][0].update(level="bad"), r"findings\[0\].level is 'bad', not 'wrong' or")
    for key in json.loads(whole)["replays"][0]:
        refused(lambda data, key=key: data["replays"][0].pop(key), rf"replays\[0\].{key} is missing")
    for key in ("args", "kwargs", "output", "written"):
        refused(lambda data, key=key: data["replays"][0]["values"].pop(key), rf"replays\[0\].values.{key} is missing")
    refused(lambda data: data["replays"][0].update(id="r99"), r"audit.safetensors has no tensor r99/0")
    report.write_text(whole, encoding="utf-8")
    assert replay(report) == 1


def values_for(*args: object) -> Values:
    overload = torch.ops.aten.matmul.default
    operation = Operation(0, "aten.matmul.default", overload, {}, (), "forward", False, "", "", "", None, None, None)
    return Values(operation, ("self", "mat2"), args, {}, None, {})


def test_arguments_come_back_as_they_were() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    turned = x.permute(2, 0, 1)
    args = [turned, [x, None, 3, True, 2.5, float("-inf"), "none"], {"dtype": torch.bfloat16}, torch.channels_last]
    packed = Packed()
    data = json.loads(json.dumps(packed.pack(args)))
    y, (same, *plain), dtype, layout = Unpacked(packed.tensors).unpack(data)
    assert torch.equal(y, turned) and y.stride() == turned.stride() and torch.equal(same, x)
    assert plain == [None, 3, True, 2.5, float("-inf"), "none"]
    assert (dtype, layout) == ({"dtype": torch.bfloat16}, torch.channels_last)
    twice = Unpacked(packed.tensors).unpack(packed.pack([x, x]))
    assert twice[0] is twice[1]
    x.zero_()
    assert y.sum() > 0
    with pytest.raises(CannotKeep, match="an argument of type complex"):
        packed.pack(1j)


def test_of_a_large_operation_a_part_is_kept_that_has_the_same_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operands_module, "MOST_BYTES", 1 << 18)
    monkeypatch.setattr(excerpt_module, "ELEMENTS", 1 << 12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 500))

    def half_sums(values: Values) -> Iterator[Twin]:  # a judge whose bound is too small
        for twin in product(values, values.inputs["mat1"], values.inputs["mat2"], values.inputs["self"]):
            yield twin._replace(bound=0.0, typical=None)

    def third(values: Values) -> Iterator[Twin]:
        exact = values.inputs["self"].double() * 0.999
        yield Twin("self", values.written["self"], exact, 0.0)

    monkeypatch.setitem(JUDGES, "aten.addmm", half_sums)
    monkeypatch.setitem(JUDGES, "aten.mul_", third)
    monkeypatch.setattr(session_module, "RULES", {})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with Audit(model, optimizer) as audit:
        model(torch.randn(200, 300)).square().mean().backward()
        optimizer.step()
        audit.step()
    audit.report(tmp_path)
    data, _ = load_audit(tmp_path / "audit.json")
    found = {one.kept["name"]: one for one in all_of(tmp_path / "audit.json")}
    rows = {row["operation"]: row for row in data["operations"]}
    for name in ("aten.addmm.default", "aten.mul_.Tensor"):
        one = found[name]
        assert one.kept["excerpt"] and one.reproduced and one.is_serious
        assert one.now[0]["ratio"] == rows[name]["error_over_bound"] > 1
    sums, products = rows["aten.addmm.default"], found["aten.addmm.default"].now[0]
    assert products["elements"] == products["judged"] < sums["elements"] and found["aten.mul_.Tensor"].same_bits


def test_large_operands_are_not_kept_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1024, 1024)
    kept = kept_of(1, values_for(x, x))
    assert kept.skipped == "" and kept.bytes == 4 << 20
    kept = kept_of(1, values_for(x, x.clone(), x.clone()))
    assert kept.skipped == "its operands have 12.0 MiB, and at most 8 are kept" and kept.tensors == {}
    assert kept_of(1, values_for(x, x.to_sparse())).skipped.startswith("an argument is not a plain tensor")
    monkeypatch.setattr(operands_module, "MOST_BYTES_OF_ALL", 5 << 20)
    operands = Operands()
    for i in range(3):
        values = values_for(x)
        values.operation.index, values.operation.probed = i, {"measured": i}
        operands.see(1, values, [])
    finding = [Finding(str(i), "", "note", 1, None, "", "", "", "", operation=i) for i in range(3)]
    operands.end_step({found.code: found for found in finding}, 1)
    assert list(operands.of_findings) == ["0"]
