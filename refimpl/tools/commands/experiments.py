"""Run toy experiments on training in 16 bits: each answers one question in seconds, with a table and a picture.

    python scripts/experiments.py                        the list
    python scripts/experiments.py flush
    python scripts/experiments.py hundred-updates masters
    python scripts/experiments.py all --out pictures --seed 1
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.tools.experiments.registry import EXPERIMENTS, show_experiments
from refimpl.training.arguments import Parser


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}, or all")
    result.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder for the pictures (runs/experiments)")
    result.add_argument("--seed", type=int, default=0, help="seed of all random numbers (0)")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_experiments(**vars(parser().parse_args())), goes_on=True)
