"""List the known mistakes that `--mistake` injects into a run.

    python scripts/mistakes.py
    python scripts/mistakes.py --table                             which of them the judge of traces finds and names
    python scripts/mistakes.py --table ignore-inf cast-twice       only these rows of the table
    python scripts/train.py --mistake scale-never-backs-off --init-scale 1e9 --steps 50
"""

from refimpl.training.cli import main as run_program

from refimpl.errors import UsageError, unknown
from refimpl.parity.mistakes import MISTAKES, listing
from refimpl.training.arguments import Parser, one_of
from refimpl.training.progress_bar import ProgressBar


def run(table: list[str] | None, quiet: bool = False) -> None:
    """Print the list, or the table of some mistakes (of all: []). quiet: show no progress.

    Errors: UsageError for an unknown name.
    """
    if table is None:
        print(listing())
        return
    for name in table:
        if name not in MISTAKES:
            raise UsageError(unknown("mistake", name, MISTAKES))
    from refimpl.parity import mistake_table

    names = table or [*MISTAKES]
    with ProgressBar(mistake_table.count(names), "run", quiet=quiet) as bar:
        mistake_table.table(names, bar.write, bar.update)


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    judged = "judge runs with these mistakes, or with all, which takes about three minutes"
    result.add_argument("--table", type=one_of(MISTAKES), nargs="*", metavar="NAME", help=judged)
    result.add_quiet()
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(**vars(parser().parse_args())))
