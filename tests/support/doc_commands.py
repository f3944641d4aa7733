"""The commands of README and docs/, for the tests that parse or run them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

from line_links import PAGES


def commands(text: str) -> list[str]:
    """Every `python scripts/...` of a page: indented lines, fenced lines, and those between backquotes."""
    lines = re.findall(r"^(?:    )?(?:.* && )?(python scripts/.+)$", text, re.M)
    return [re.split(r"  +", line)[0].strip() for line in lines] + re.findall(r"`(python scripts/[^`]+)`", text)


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands(page.read_text())})


def words_of(command: str) -> tuple[str, list[str]]:
    """The name of a script and its arguments: ("train", ["--steps", "3"])."""
    script, *arguments = shlex.split(command, comments=True)[1:]
    return Path(script).stem, arguments


def lacks(command: str) -> str:
    """What this machine lacks to run a command; '' if it lacks nothing."""
    script, arguments = words_of(command)
    if (script == "gpu_check" and "--predict" not in arguments) or "cupy" in arguments:
        return "an NVIDIA GPU"
    with_torch = script in ("audit", "compare_pytorch", "pytorch_trace") or "torch" in arguments
    needs = {"torch": with_torch, "transformers": script == "compare_pytorch" and "--hf" in arguments,
             "mpi4py": script == "bench" and "--ranks" in arguments, "gguf": "gguf" in arguments}  # fmt: skip
    return ", ".join(name for name, needed in needs.items() if needed and importlib.util.find_spec(name) is None)


def may_exit(command: str) -> tuple[int, ...]:
    """The exit codes of a command that did what it is for: 1 is also that of one that has found something."""
    script, arguments = words_of(command)
    finds = script in ("audit", "compare_pytorch") or (script == "trace" and arguments[0] == "diff")
    return (0, 1, 3) if finds else (0,)
