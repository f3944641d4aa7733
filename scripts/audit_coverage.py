"""Run the tests' clean training loops under the audit: what is found in them, and how much of their arithmetic is judged.

    python scripts/audit_coverage.py              one line per loop; exit code 1 if there is a finding or too little is judged
    python scripts/audit_coverage.py llama fsdp2  only loops with one of these words in their names
    python scripts/audit_coverage.py --reasons    and what was not judged, by reason, over all of them

The loops are those of tests/support/clean_loops.py: Hugging Face models and others, in every precision, with each optimizer.
"""

from __future__ import annotations

from refimpl.training.cli import main  # first: Ctrl-C is answered from here on

import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError, one_line
from refimpl.parity.pytorch import import_torch
from refimpl.training.arguments import Parser
from refimpl.training.columns import table
from refimpl.training.progress_bar import ProgressBar

LEAST = 0.98
"""The least share of the float elements made by arithmetic that is judged, in each loop."""


def audited(loop: Any) -> Any:
    """Return the audit of three steps of a clean loop."""
    from refimpl.parity.audit import Audit

    run = loop.make()
    audit = Audit(run.model, run.optimizer, scaler=run.scaler, scheduler=run.scheduler, ema=run.ema)

    @contextmanager
    def step() -> Iterator[None]:
        yield
        audit.step()

    with audit:
        run.train(step, steps=3)
    return audit


def serious(audit: Any) -> list[str]:
    """Return what is above a note in an audit, which should be nothing: codes of findings, operations, failures."""
    above = ("wrong", "worse than it need be", "biased")
    found = [f"{f.code} ({f.level})" for f in audit.findings.values() if f.level in above]
    found += [f"{kind.operation} {kind.output} ({row.level})" for kind, row in audit.table.rows.items() if row.level in above]
    return found + [one_line(f"failed: {text}", 200) for text in audit.failures]


def share(audit: Any) -> float:
    """Return the share of the float elements made by arithmetic that is judged."""
    every = audit.judge.judged + audit.judge.unjudged.total()
    return audit.judge.judged / every if every else 0.0


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("words", nargs="*", metavar="WORD", help="loops with one of these words in their names (default: all)")
    result.add_argument("--all", action="store_true", help="the larger set of loops, that of the slow tests")
    result.add_argument("--reasons", action="store_true", help="also print what was not judged, by reason")
    result.add_quiet()
    return result


def run() -> int:
    """Audit the loops and print the table. Return 1 if it is not as it should be."""
    flags = parser().parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import_torch()
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    try:
        loops, ranks = importlib.import_module("clean_loops"), importlib.import_module("audit_loops")
        importlib.import_module("peft")
    except ImportError as error:
        raise UsageError(f"{error}: the loops need a clone of the repository, and pip install '.[parity]'") from None
    chosen = loops.MORE_LOOPS if flags.all else loops.LOOPS
    chosen = {name: loop for name, loop in chosen.items() if not flags.words or any(w in name for w in flags.words)}
    rows, unjudged, bad = [], Counter[str](), 0
    with ranks.OneRank(), ProgressBar(len(chosen), "loop", quiet=flags.quiet) as bar:
        for name, loop in chosen.items():
            begun = time.perf_counter()
            audit = audited(loop)
            wrong, judged = serious(audit), share(audit)
            unjudged += audit.judge.unjudged
            bad += bool(wrong) or judged < LEAST
            notes = [f.code for f in audit.findings.values() if f.level == "note"]
            rows.append([name, f"{judged:.2%}", f"{time.perf_counter() - begun:.1f} s", " ".join(notes), "; ".join(wrong)])
            bar.update()
    print(table(["loop", "judged", "time", "notes", "above a note"], rows))
    if flags.reasons:
        print(table(["elements", "not judged because"], [[f"{n:,}", one_line(why, 100)] for why, n in unjudged.most_common()]))
    return int(bad > 0)


if __name__ == "__main__":
    main(run)
