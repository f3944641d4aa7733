"""Audit a PyTorch training: judge every operation, and name known mistakes with their number and fix.

    pip install torch==2.13.0
    python scripts/audit.py --demo                                 a small training with three mistakes in it
    python scripts/audit.py your_script.py --lr 1e-3               your script with its arguments, unchanged
    python scripts/audit.py --steps 2 --out runs/mine -m package.train --lr 1e-3
    python scripts/audit.py --replay runs/audit/audit.json         judge again the operations that findings rest on

docs/audit.md says how to read the report.
Exit code: that of the script if it is not 0; else 0 if nothing above a note was found, 1 if something was, and 2 if no training
was seen or the command line is wrong.
"""

from refimpl.training.cli import main as run_program

import argparse
import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError, one_line
from refimpl.tools.python_program import check_program, run_python
from refimpl.training.arguments import Parser
from refimpl.training.columns import fit
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.run_folder import numbered

OUT = Path("runs/audit")
DATA = "audit.json"


def parser() -> Parser:
    """Return the parser of the flags; what follows the script or module belongs to it."""
    result = Parser(description=__doc__, usage="audit.py [flags] SCRIPT ... | [flags] -m MODULE ...")
    add = result.add_argument
    add("--steps", type=int, default=4, metavar="N", help="how many of the first steps to audit, or 0 (default: 4)")
    add("--every", type=int, default=100, metavar="N", help="then audit one step in N (default: 100)")
    add("--out", type=Path, metavar="FOLDER", help=f"where to write the report (default: {OUT}, or the next free number)")
    add("--overwrite", action="store_true", help="replace the report in FOLDER")
    add("--demo", action="store_true", help="audit a small training with three mistakes in it")
    add("--replay", type=Path, metavar="FILE", help="judge again the operations that an audit.json, or its folder, has kept")
    add("--catalogue", action="store_true", help="print all that the audit looks for")
    add("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="audit a module instead of a script")
    result.add_quiet()
    add("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return result


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """Return the flags, with `words`: the script or module and what follows it, and `is_module`."""
    found: argparse.Namespace = parser().parse_args(words)
    found.is_module = found.module is not None
    found.words = [str(DEMO)] if found.demo else found.module if found.is_module else found.program
    return found


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say. Return the exit code. Errors: UsageError before any of the program runs."""
    alone = [f"--{name}" for name in ("catalogue", "demo", "replay") if getattr(arguments, name)]
    if len(alone) > 1:
        raise UsageError(f"{' and '.join(alone)} exclude each other: give one of them")
    if arguments.catalogue:
        need_torch()
        from refimpl.parity.audit.report.catalogue_page import catalogue

        print(catalogue(), end="")
        return 0
    for flag in ("demo", "replay"):
        if getattr(arguments, flag) and (arguments.is_module or arguments.program):
            raise UsageError(f"--{flag} takes no script")
    if arguments.replay:
        need_torch()
        return replay(arguments.replay, arguments.quiet)
    if not arguments.words:
        raise UsageError("name a script, or -m and a module, or --demo; see --help")
    if arguments.steps < 0 or arguments.every < 1:
        raise UsageError("--steps must be at least 0, and --every at least 1")
    check_program(arguments.words[0], arguments.is_module)
    need_torch()
    folder = folder_for(arguments.out, arguments.overwrite)
    from refimpl.parity.audit.program import ProgramAudit

    program = ProgramAudit(arguments.steps, arguments.every, (lambda line: None) if arguments.quiet else say)
    return audit_program(arguments.words, arguments.is_module, program, folder)


def audit_program(words: list[str], is_module: bool, program: Any, folder: Path) -> int:
    """Run a program under a `ProgramAudit` and write the report. Return the exit code."""
    from refimpl.parity.audit.finding import is_serious

    code = run_python(words[0], is_module, words[1:], program)
    if program.audit is None or not program.audit.audited:
        with suppress(OSError):
            folder.rmdir()  # where nothing else is in it
        print(f"error: no step of a training was audited: {why_not(program.audit)}", file=sys.stderr)
        return code or 2
    program.audit.report(folder)
    found = any(is_serious(finding.level) for finding in program.audit.findings.values())
    return code or int(found)


def replay(path: Path, quiet: bool = False) -> int:
    """Judge the operations once more that an audit has kept, and print the verdicts. Return the exit code."""
    from refimpl.parity.audit.finding import is_serious
    from refimpl.parity.audit.report.replay import load_audit, replay_lines, replayed

    data, tensors = load_audit(path / DATA if path.is_dir() else path)
    rests = {found["replay"]: found for found in reversed(data["findings"])}
    names = {name: f"{found['code']} {found['name']}: {found['number']}" for name, found in rests.items()}
    found_again = False
    with ProgressBar(sum(not kept["skipped"] for kept in data["replays"]), "operation", quiet=quiet, stays=False) as bar:
        for one in replayed(data, tensors):
            name, finding = one.kept["id"], rests.get(one.kept["id"])
            bar.write("\n".join(replay_lines(one, names.get(name, "the worst of its kind"))))
            bar.update()
            serious = finding is not None and is_serious(finding["level"]) and one.reproduced
            found_again = found_again or one.is_serious or serious
    for kept in data["replays"]:
        if kept["skipped"]:
            print(f"{names.get(kept['id'], 'the worst of its kind')}\n  {kept['name']} was not kept: {kept['skipped']}")
    if not data["replays"]:
        print("No finding rests on an operation, and no operation was worse than a note: nothing was kept.")
    return int(found_again)


def why_not(audit: Any) -> str:
    """Return why no step was audited."""
    if audit is None:
        return "no optimizer of torch.optim with parameters of a module made a step"
    if audit.failures:
        return str(next(iter(audit.failures)))
    return f"{audit.number} steps ended, and --steps and --every chose none of them, or each ran inside a TorchDispatchMode"


def say(line: str) -> None:
    """Print a line on standard error, where the output of the program does not get mixed up with it."""
    print(fit(one_line(f"audit: {line}", 400), sys.stderr), file=sys.stderr)


def need_torch() -> None:
    """Raise UsageError where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError("the audit needs PyTorch: pip install torch==2.13.0")


def folder_for(out: Path | None, overwrite: bool) -> Path:
    """Create the folder of the report before anything runs, and return it. Errors: UsageError if it is taken.

    Two audits that are started together get different ones: who creates a folder has it.
    """
    if out is not None and (out / DATA).exists() and not overwrite:
        raise UsageError(f"--out {out} has a report: name another folder, or --overwrite replaces it")
    for folder in [out] if out is not None else numbered(OUT):
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
        except FileExistsError:
            if out is not None:
                raise UsageError(f"--out {out} is a file: name a folder") from None
            continue
        except OSError as error:
            raise UsageError(f"{folder} cannot be created: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder} cannot be written to")
        return folder
    raise AssertionError("numbers do not end")


DEMO = Path(__file__).parents[1] / "audit_demo.py"


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(arguments_of()), goes_on=True)
