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


def run(names: list[str] | None) -> None:
    """Print the list, or the table of some mistakes or of all. Errors: UsageError for an unknown name."""
    if names is None:
        print(listing())
        return
    for name in names:
        if name not in MISTAKES:
            raise UsageError(unknown("mistake", name, MISTAKES))
    from refimpl.parity.mistake_table import table

    table(names or MISTAKES, lambda line: print(line, flush=True))


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    judged = "judge runs with these mistakes, or with all, which takes ten minutes"
    result.add_argument("--table", type=one_of(MISTAKES), nargs="*", metavar="NAME", help=judged)
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(parser().parse_args().table))
