"""The report of an audit: what it keeps, the summary, the page, the data; and that the audit never disturbs the training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import measured, needs_browser
from pages import SCRIPTS
from paths import DOCS

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import refimpl
from refimpl.errors import UsageError
from refimpl.parity.audit import Audit
from refimpl.parity.audit import session as session_module
from refimpl.parity.audit.finding import Finding, merged
from refimpl.parity.audit.judge.table import JUDGES
from refimpl.parity.audit.report.catalogue_page import catalogue
from refimpl.parity.audit.report.data import contents
from refimpl.parity.audit.report.operation_table import OperationTable
from refimpl.parity.audit.report.page import audit_page
from refimpl.parity.audit.report.terminal import summary
from refimpl.parity.audit.rules.entry import Rule
from refimpl.parity.audit.rules.table import KNOWN_MISTAKES, RULES
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Twin, Values
from refimpl.parity.audit.verdict import LEVELS
from refimpl.parity.mistakes import MISTAKES


class Loop:
    """A small network with a GradScaler; `step` is the user's step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu")

    def audit(self, **options: Any) -> Audit:
        return Audit(self.model, self.optimizer, scaler=self.scaler, **options)

    def step(self) -> None:
        loss = self.model(torch.randn(5, 8)).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def finding(code: str = "D99", level: str = "wrong", step: int = 1, module: str | None = "fc", **more: Any) -> Finding:
    words = {"number": "3 of 4 were zero", "effect": "nothing is learnt", "fix": "do not"}
    return Finding(code, "a mistake", level, step, module, "/home/me/train.py:41", **{**words, **more})


def audited(ran: int = 3, **options: Any) -> Audit:
    loop = Loop()
    with loop.audit(**options) as audit:
        for _ in range(ran):
            loop.step()
            audit.step()
    return audit


def with_rule(monkeypatch: pytest.MonkeyPatch, *findings: Finding, code: str = "D99", error: Exception | None = None) -> None:
    """Put one rule in the place of all."""

    def find(view: View) -> Iterator[Finding]:
        if error is not None:
            raise error
        yield from findings

    monkeypatch.setattr(session_module, "RULES", {code: Rule(code, "a mistake", 1, find, code.startswith("D"))})


# ----------------------------------------------------------------------------------------------------------- the session


def test_a_mistake_at_many_places_is_one_finding() -> None:
    known: dict[str, Finding] = {}
    merged(known, finding(level="note", module="a", number="first"))
    merged(known, finding(level="wrong", module="b", number="second", places=3))
    merged(known, finding(level="biased", module="a", number="third"))
    one = known["D99"]
    assert (one.level, one.number, one.places, one.modules) == ("wrong", "second", 5, ("a", "b"))


def test_a_new_finding_is_said_once_and_a_note_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_rule(monkeypatch, finding(), finding(module="other"))
    assert audited(3).findings["D99"].places == 6
    assert capsys.readouterr().err == "audit: step 1: D99 a mistake (/home/me/train.py:41): 3 of 4 were zero\n"
    with_rule(monkeypatch, finding(level="note"))
    assert audited(2).findings["D99"].level == "note" and capsys.readouterr().err == ""


def test_what_fails_in_a_rule_does_not_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rule(monkeypatch, error=ZeroDivisionError("of mine"))
    audit = audited(2)
    assert audit.number == 2 and audit.failures == {"rule D99: ZeroDivisionError: of mine": 2}
    assert {"text": "rule D99: ZeroDivisionError: of mine", "count": 2} in contents(audit)["failures"]


def test_a_loop_that_raises_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rule(monkeypatch, finding())
    loop = Loop()
    with pytest.raises(OverflowError, match="mine"), loop.audit() as audit:
        loop.model(torch.randn(5, 8))
        raise OverflowError("mine")
    assert list(audit.findings) == ["D99"] and audit.number == 0 and audit.audited == [1]
    assert "OverflowError in step 1" in "\n".join(summary(contents(audit), "page"))
    with_rule(monkeypatch, finding(code="B1"), code="B1")  # needs a whole step
    with loop.audit() as audit:
        loop.step()
    assert audit.findings == {} and audit.unended == "audit.step() was never called"


def test_a_loop_that_raises_prints_the_summary_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    loop = Loop()
    audit = loop.audit()
    with pytest.raises(OverflowError, match="mine"), audit:
        loop.step()
        audit.step()
        raise OverflowError("mine")
    out, err = capsys.readouterr()
    assert out == "" and list(tmp_path.iterdir()) == []
    assert "audit: OverflowError has ended the loop" in err and "1 of 1 steps" in err and "coverage: " in err
    assert "all of it" not in err
    assert audit.report(tmp_path / "later").exists()
    with loop.audit() as audit:
        loop.step()
        audit.step()
    assert "1 of 1 steps" not in capsys.readouterr().err  # nothing has raised

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("of the audit")

    monkeypatch.setattr(session_module, "summary", fail)
    with pytest.raises(OverflowError, match="mine"), loop.audit() as audit:
        raise OverflowError("mine")
    assert audit.failures == {"summary: ZeroDivisionError: of the audit": 1}


def verdict_of(audit: Audit) -> tuple[str, str, str]:
    """The verdict of the data, that of the summary as one line, and the text of the page."""
    data = contents(audit)
    return data["verdict"], " ".join(" ".join(summary(data, "page")).split()), " ".join(Page(audit_page(data)).text.split())


def test_a_loop_without_audit_step_is_not_called_good(monkeypatch: pytest.MonkeyPatch) -> None:
    with_rule(monkeypatch)
    loop = Loop()
    with loop.audit() as never:
        loop.step()
        loop.step()
    verdict, *said = verdict_of(never)
    first = "No audited step ended (audit.step() was never called): the rules about whole steps, A to C, were not applied."
    assert verdict == "no step ended" and all(first in text for text in said)
    assert said[0].index(first) < said[0].index("Nothing found above a note")
    with loop.audit(steps=0, every=2) as within:
        loop.step()
        within.step()
        loop.step()
    assert "No audited step ended (the audit ended within step 2)" in verdict_of(within)[1]
    verdict, *said = verdict_of(audited(2))
    assert verdict == "nothing above note" and not any("No audited step" in text for text in said)


def test_an_audit_of_nothing_is_not_called_good() -> None:
    loop = Loop()
    with loop.audit() as empty:
        pass
    for audit, why in ((loop.audit(), "no step ended"), (empty, "no step ended"), (audited(2, steps=0), "2 steps ended")):
        verdict, *said = verdict_of(audit)
        assert verdict == "nothing audited"
        assert all(f"Nothing was audited: {why}" in text and "Nothing found" not in text for text in said)


def test_wrong_use_is_one_line() -> None:
    loop = Loop()
    audit = loop.audit()
    with pytest.raises(UsageError, match="at the end of each step inside 'with Audit"):
        audit.step()
    with audit:
        with pytest.raises(UsageError, match="this audit is running already"):
            audit.__enter__()
        with pytest.raises(UsageError, match="another audit is running already"):
            loop.audit().__enter__()
        loop.step()
        audit.step()
    with pytest.raises(UsageError, match="outside of the audit"):
        audit.step()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"model": nn.Linear(2, 2).state_dict()}, "model must be"),
        ({"optimizer": "adam"}, "optimizer must be"),
        ({"optimizer": []}, "optimizer is empty"),
        ({"optimizer": torch.optim.SGD([{"params": []}])}, "optimizer has no parameters"),
        ({"scaler": 3}, "scaler must be"),
        ({"scaler": torch.amp.GradScaler}, r"the class: give the object, GradScaler\(\)"),
        ({"scheduler": 3}, "scheduler must be"),
        ({"ema": nn.Linear(2, 2).state_dict()}, "ema must be the torch.nn.Module with averaged weights, not OrderedDict"),
        ({"steps": "4"}, "steps must be a whole number of at least 0, not '4'"),
        ({"steps": -1}, "at least 0, not -1"),
        ({"every": 0}, "every must be a whole number of at least 1, not 0"),
    ],
)
def test_a_wrong_argument_is_one_line(wrong: dict[str, Any], why: str) -> None:
    loop = Loop()
    with pytest.raises(UsageError, match=rf"^Audit: [^\n]*{why}[^\n]*$"):
        Audit(**{"model": loop.model, "optimizer": loop.optimizer, **wrong})


def test_masters_outside_of_the_model_are_no_wrong_argument() -> None:
    model = nn.Linear(2, 2).bfloat16()
    Audit(model, [torch.optim.SGD([p.detach().float()]) for p in model.parameters()])


def test_outside_of_audited_steps_nothing_of_the_audit_is_there() -> None:
    loop = Loop()
    backward = torch.autograd.backward
    with loop.audit(steps=1, every=100) as audit:
        assert torch.autograd.backward is not backward
        loop.step()
        audit.step()
        assert torch.autograd.backward is backward and torch._C._len_torch_dispatch_stack() == 0
        assert not loop.optimizer._optimizer_step_pre_hooks
        for _ in range(5):
            loop.step()
            audit.step()
    assert audit.audited == [1] and audit.number == 6


def test_what_fails_in_the_judge_or_a_probe_is_said_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(values: Values) -> Any:
        raise ZeroDivisionError("of mine")

    monkeypatch.setitem(JUDGES, "aten.addmm", fail)
    monkeypatch.setattr(session_module, "PROBES", {"first": fail, "second": lambda values: 1})
    audit = audited(1)
    operations = len(audit.steps[0].operations)
    assert audit.failures["judge of aten.addmm.default: ZeroDivisionError: of mine"] == 2
    assert audit.failures["probe first: ZeroDivisionError: of mine"] == operations
    assert audit.judge.unjudged["the judge failed on aten.addmm.default: of mine"] == 5 * (16 + 4)
    assert all(operation.probed == {"second": 1} for operation in audit.steps[0].operations)


def test_a_step_that_ends_inside_a_mode_of_the_users_is_not_judged() -> None:
    loop = Loop()
    with loop.audit() as audit:
        with FlopCounterMode(display=False) as mode:
            loop.step()
            audit.step()
            assert mode.get_total_flops() > 0
            before = mode.get_total_flops()
            loop.step()
            assert mode.get_total_flops() == 2 * before
        audit.step()
        loop.step()
        audit.step()
    assert audit.audited == [3] and "inside of another TorchDispatchMode" in "".join(audit.failures)


def test_memory_does_not_grow_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MOST_BORDERS", 5)
    audit = audited(12, steps=12)
    rows = len(audit.table.rows)
    assert list(audit._borders) == [0, 9, 10, 11, 12] and len(audit.steps) == 4
    assert rows == len(audited(2).table.rows)
    monkeypatch.setattr(session_module, "MOST_OPERATIONS", 10)
    assert len(audited(1).steps[0].operations) == 10


# ------------------------------------------------------------------------------------------------------ table and coverage


def test_the_table_adds_up_and_keeps_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(values: Values) -> Iterator[Twin]:
        result: Tensor = values.output
        yield Twin("out", result, result.double() * (2.0 if values.operation.module == "2" else 1.0), 0.0)

    monkeypatch.setitem(JUDGES, "aten.addmm", half)
    data = contents(audited(3))
    row = data["operations"][0]
    assert (row["operation"], row["inputs"], row["output"]) == ("aten.addmm.default", ["fp32"] * 3, "fp32")
    assert (row["phase"], row["level"], row["results"], row["elements"]) == ("forward", "wrong", 6, 3 * 5 * (16 + 4))
    assert row["worst"]["module"] == "2" and row["worst"]["step"] in (1, 2, 3)
    assert row["correctly_rounded"] == pytest.approx(16 / 20) and row["definition"] == ["PyTorch"]
    levels = [each["level"] for each in data["operations"]]
    assert levels == sorted(levels, key=LEVELS.index)


def test_coverage_adds_up_and_says_why() -> None:
    coverage = contents(audited(2))["coverage"]
    assert coverage["judged"] + sum(each["elements"] for each in coverage["unjudged"]) == coverage["elements"]
    assert 0 < coverage["share"] <= 1


# ---------------------------------------------------------------------------------------------------- summary, page, data


def many(n: int) -> dict[str, Any]:
    """The data of an audit with n long findings."""
    audit = audited(2)
    for i in range(n):
        long = " ".join(["a very long sentence with many figures"] * 10)
        audit.findings[f"D{i:02}"] = finding(f"D{i:02}", number=long, fix=long, module="a.very.long.name" * 8)
    return contents(audit)


@pytest.mark.parametrize("n", [0, 1, 3, 5, 60])
def test_the_summary_has_at_most_40_lines_of_80_columns_and_every_code(n: int) -> None:
    lines = summary(many(n), "/a/long/path" * 12)
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert f"{n} finding" in text if n else "Nothing found above a note." in text
    assert "D00 a mistake: wrong, step 1, train.py:41" in text if n else True
    assert "coverage: " in text and "all of it: " in text
    if n == 60:
        assert "and 5" in text  # those that there was no room for


def test_bytes_per_parameter_have_at_most_four_digits() -> None:
    recipe = audited(2).recipe()
    assert recipe is not None
    thrice = replace(recipe.states, trained=3 * recipe.states.trained)
    assert replace(recipe, states=thrice).sentence.endswith(" 5.333 bytes per parameter")


class Page(HTMLParser):
    """Which elements a page has, that all are closed, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    data = many(3)
    data["findings"][0]["number"] = "<script>alert(1)</script> & 2^-24"
    text = audit_page(data)
    page = Page(text)
    assert text == audit_page(data)
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")] == ["script"] and "http" not in text
    assert SCRIPTS[0] in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["findings", "recipe", "operations", "casts", "coverage", "flags-in-force"]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{name}" for name in sections]
    assert f"Made on {data['made']['date']} with refimpl {refimpl.__version__}, Python " in page.text
    assert f"{data['made']['machine']}, by:" in page.text and data["made"]["command"] in page.text
    levels = [attrs["class"] for tag, attrs in page.tags if tag == "article"]
    assert levels[:3] == ["wrong"] * 3 and set(levels[3:]) <= {"note"}
    assert "<script>alert(1)</script> & 2-24" in page.text


@needs_browser
def test_a_browser_shows_all_of_it_on_a_desktop_and_on_a_phone(tmp_path: Path) -> None:
    text = audit_page(many(3))
    wide = text.replace("</main>", '<div style="width: 3000px">x</div></main>')
    found = measured(tmp_path, {"desktop": (text, 1280), "phone": (text, 390), "overflowing": (wide, 390)})
    assert found["overflowing"]["page"] > 3000  # so that the next line can fail
    assert found["desktop"]["page"] <= 1280 and found["phone"]["page"] <= 390
    assert max(visible for visible, _ in found["phone"]["boxes"]) <= 390


def test_every_number_of_the_page_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = audited(2)
    page = audit.report(tmp_path / "new" / "folder")
    out = capsys.readouterr().out
    assert page == tmp_path / "new" / "folder" / "audit.html" and str(page) in out.replace("\n  ", "")
    data = json.loads((page.parent / "audit.json").read_text())
    assert audit_page(data) == page.read_text() and data["refimpl-audit"] == 1
    operands = {"audit.safetensors"} if data["replays"] else set()  # square roots have a note on some processors
    assert {path.name for path in page.parent.iterdir()} == {"audit.html", "audit.json"} | operands
    audit.report(page.parent)  # replaces it


def test_each_rank_has_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = audited(1)
    audit._rank = 3
    assert audit.report(tmp_path) == tmp_path / "rank3" / "audit.html" and capsys.readouterr().out == ""


def test_a_report_that_cannot_be_written_is_one_line_after_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be created") as raised:
        audited(1).report(tmp_path / "file")
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None
    out = capsys.readouterr().out
    assert "1 of 1 steps" in out and "all of it" not in out


def test_a_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop().audit().report(tmp_path)
    out = capsys.readouterr().out
    assert "0 of 0 steps" in out and "no result in floating point was seen" in out


def test_a_compiled_model_is_audited_as_it_is_written(tmp_path: Path) -> None:
    loop = Loop()
    compiled = torch.compile(loop.model, backend="eager", fullgraph=True)
    with Audit(compiled, loop.optimizer) as audit:
        compiled(torch.randn(5, 8)).square().mean().backward()
        loop.optimizer.step()
        audit.step()
    assert audit.failures == {}
    assert "aten.gelu.default" in {operation.name for operation in audit.steps[0].operations}
    assert "without the compiler" in audit_page(contents(audit))


def test_an_empty_table_has_no_rows() -> None:
    assert OperationTable().data() == []


# ------------------------------------------------------------------------------------------------------------- catalogue


def test_known_mistakes_of_traces_and_rules_are_one_table() -> None:
    of_rules = [name for names in KNOWN_MISTAKES.values() for name in names]
    assert sorted([*of_rules, "decay-all"]) == sorted(MISTAKES) and set(KNOWN_MISTAKES) <= set(RULES)
    page = catalogue()
    assert all(f"`--mistake {name}`" in page for name in of_rules)


def test_the_catalogue_in_docs_is_that_of_the_rules() -> None:
    how = "python scripts/audit.py --catalogue > docs/audit_catalogue.md"
    assert (DOCS / "audit_catalogue.md").read_text() == catalogue(), how


def test_each_rule_has_an_entry_with_effect_and_fix() -> None:
    entries = catalogue().split("\n### ")[1:]
    assert [entry.split()[0] for entry in entries] == sorted(RULES, key=lambda code: (code[0], int(code[1:])))
    for entry in entries:
        assert "- **Effect:** " in entry and "- **Fix:** " in entry and "- **Source:** " in entry, entry


def test_every_key_of_the_data_is_documented(tmp_path: Path) -> None:
    page = (DOCS / "audit.md").read_text()

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for part in value.values() for key in keys(part)}
        return {key for part in value for key in keys(part)} if isinstance(value, list) else set()

    data = many(1)
    inner = {key for name in ("training", "findings", "recipe", "operations", "casts", "coverage") for key in keys(data[name])}
    named = set(re.findall(r"`([\w-]+)`", page))
    formats = set(data["training"]["formats"])
    assert (set(data) | inner) - formats - named == set()
