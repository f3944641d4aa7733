"""Follow a loss scale: what a project's rules make of a pattern of overflows, step by step.

    python scripts/loss_scale.py torch --overflows 1010100000 --init-scale 1024 --interval 3
    python scripts/loss_scale.py deepspeed --overflows 1110000101 --hysteresis 1
    python scripts/loss_scale.py --compare                       every scaler on the same overflows, as a table
    python scripts/loss_scale.py --compare --plot                the same, and a picture in loss_scale.png

Printed is the scale after each step. docs/loss_scaling.md tells how the scalers differ.
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.optim.scaler_rules import SCALERS
from refimpl.tools.loss_scale import PICTURE, show_loss_scale
from refimpl.training.arguments import Parser


def parser() -> Parser:
    """The flags of this script."""
    result = Parser(description=__doc__)
    result.add_argument("scaler", nargs="?", metavar="SCALER", help=", ".join(SCALERS))
    result.add_argument("--overflows", default="1010100000", metavar="PATTERN", help="a 1 or a 0 for each step (1010100000)")
    result.add_argument("--init-scale", type=float, default=1024.0, help="the scale before the first step (1024)")
    result.add_argument("--interval", type=int, default=3, help="good steps before it grows (3)")
    result.add_argument("--hysteresis", type=int, help="overflows before it backs off, for the scalers that wait (2)")
    result.add_argument("--growth-factor", type=float, help="what it grows by (2)")
    result.add_argument("--backoff-factor", type=float, help="what an overflow multiplies it by (1/2)")
    result.add_argument("--scale-floor", type=float, help="the least scale, for the scalers that have one to choose")
    result.add_argument("--compare", action="store_true", help="all scalers, as a table")
    result.add_argument(
        "--plot", nargs="?", const=PICTURE, type=Path, metavar="FILE", help=f"draw it too (a new {PICTURE})"
    )
    result.add_argument("--overwrite", action="store_true", help="replace the picture that is there")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_loss_scale(**vars(parser().parse_args())))
