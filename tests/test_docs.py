"""What README and docs/ promise: links lead where they say, commands are ones that the scripts understand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import COMMANDS, commands, lacks, may_exit, words_of
from line_links import LINK, PAGES, corrected, wrong
from paths import ROOT
from script_loader import load_script

LINKS = [(page, *found) for page in PAGES for found in re.findall(r"\[(`[^`]+`|[^\]]+?)\]\((?!http)(.+?)\)", page.read_text())]


@pytest.mark.parametrize(("page", "text", "target"), LINKS, ids=[f"{page.name}-{target}" for page, _, target in LINKS])
def test_links_lead_somewhere(page: Path, text: str, target: str) -> None:
    path, _, heading = target.partition("#")
    assert (page.parent / path).exists(), f"{target}, for {text}"
    if heading and path.endswith(".md"):
        titles = re.findall(r"^#+ (.+)$", (page.parent / path).read_text(), re.M)
        assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_links_to_lines_show_what_stands_there() -> None:
    assert list(wrong()) == []
    assert all(len(LINK.findall(text)) == text.count("#L") for text in (page.read_text() for page in PAGES))


def test_line_numbers_are_corrected(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x[0] = f()\n    return g()\n\n\ndef h():\n    return g()\n")
    page = "[`def h()`](code.py#L2) [return g()](code.py#L5) [`x[0] = f()`](code.py#L1) [`def i()`](code.py#L3) [h](code.py)"
    better, lost = corrected(page, tmp_path)
    assert better == page.replace("`](code.py#L2)", "`](code.py#L5)").replace("g()](code.py#L5)", "g()](code.py#L6)")
    assert lost == ["[`def i()`](code.py#L3)"]


def complaint(command: str) -> str | None:
    """What a script's own parser says against a command, or None."""
    program, script, *arguments = shlex.split(command, comments=True)
    path = ROOT / script
    if program != "python" or not path.exists():
        return f"there is no {script}"
    module = load_script(path.stem)
    if not hasattr(module, "parser"):
        return None if not arguments else f"{script} takes no arguments"
    try:
        module.arguments(arguments) if hasattr(module, "arguments") else module.parser().parse_args(arguments)
    except SystemExit:
        return f"{script} does not understand {arguments}"
    return None


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_understood(page: str, command: str) -> None:
    assert complaint(command) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_copied(page: Path) -> None:
    """Each begins with python, and reads a folder that a run has written whatever model it started from."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^    [a-z_]+\.py .*", text, re.M) == []
    for script, arguments in map(words_of, commands(text)):
        assert not (script == "audit" and "train.py" in arguments), "there is no train.py of the reader's in a clone"
        if script == "train" and {"DIR", "bf16"} <= {*arguments} and "--out" not in arguments:
            assert not re.search("runs/(gpt|llama)-bf16", text)


def test_both_checkers_bite() -> None:
    assert len(COMMANDS) > 20 and len(LINKS) > 20
    assert complaint("python scripts/nothing.py") == "there is no scripts/nothing.py"
    assert "does not understand" in (complaint("python scripts/train.py --no-such-flag") or "")
    assert "takes no arguments" in (complaint("python scripts/freeze_cupy_api.py --json") or "")
    text = "    python scripts/a.py --b   a remark\nsee `python scripts/c.py`\npip install x && python scripts/d.py\n"
    assert commands(text) == ["python scripts/a.py --b", "python scripts/d.py", "python scripts/c.py"]


SLOW_OR_WRITING = ("train", "compare_pytorch", "record_vectors")
OF_TRAININGS = ("recipes.md", "speed.md", "real_models.md", "logs.md")  # whose commands take minutes, or the files of a run


@pytest.mark.slow
def test_the_commands_of_docs_run_one_after_the_other(tmp_path: Path) -> None:
    """All but those that train for minutes, each page in a folder of its own, in the order in which it gives them."""
    for page in PAGES[1:]:
        if page.name in OF_TRAININGS:
            continue
        folder = tmp_path / page.stem
        folder.mkdir()
        for command in commands(page.read_text()):
            script, arguments = words_of(command)
            alone = {"--demo", "--replay", "--catalogue"} & set(arguments)
            of_the_reader = "DIR" in arguments or (script == "audit" and not alone)
            if script in SLOW_OR_WRITING or of_the_reader or lacks(command):
                continue
            path = ROOT / "scripts" / f"{script}.py"
            done = subprocess.run([sys.executable, path, *arguments], cwd=folder, capture_output=True, text=True)
            assert done.returncode in may_exit(command), f"{page.name}: {command}\n{done.stderr}"
