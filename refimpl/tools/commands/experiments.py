"""Run toy experiments on training in 16 bits: each answers one question in seconds, with a table and a picture.

    python scripts/experiments.py                        the list
    python scripts/experiments.py flush
    python scripts/experiments.py hundred-updates masters
    python scripts/experiments.py all --out pictures --seed 1
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.tools.experiments.registry import EXPERIMENTS, show_experiments
from refimpl.training.arguments import Parser, one_of


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("names", type=one_of(EXPERIMENTS), nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}, or all")
    pictures = "folder for the pictures (default: runs/experiments)"
    result.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="DIR", help=pictures)
    result.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: 0)")
    result.add_quiet()
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_experiments(**vars(parser().parse_args())), goes_on=True)
