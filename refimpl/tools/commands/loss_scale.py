"""Follow a loss scale step by step through a pattern of overflows, by the rules of a given project.

    python scripts/loss_scale.py torch --overflows 1010100000 --init-scale 1024 --interval 3
    python scripts/loss_scale.py deepspeed --overflows 1110000101 --hysteresis 1
    python scripts/loss_scale.py --compare                       all scalers on the same overflows, as a table
    python scripts/loss_scale.py --compare --plot                the table, and a picture in loss_scale.png

The scale after each step is printed. docs/loss_scaling.md explains how the scalers differ.
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.optim.loss_scalers import SCALER_RULES
from refimpl.tools.loss_scale import PICTURE, show_loss_scale
from refimpl.training.arguments import Parser


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("scaler", nargs="?", metavar="SCALER", help=", ".join(SCALER_RULES))
    result.add_argument("--overflows", default="1010100000", metavar="PATTERN", help="1 (overflow) or 0 per step (1010100000)")
    result.add_argument("--init-scale", type=float, default=1024.0, help="the scale before the first step (1024)")
    result.add_argument("--interval", type=int, default=3, help="good steps before the scale grows (3)")
    result.add_argument("--hysteresis", type=int, help="overflows until the scale is reduced, if the scaler has hysteresis (2)")
    result.add_argument("--growth-factor", type=float, help="factor by which the scale grows (2)")
    result.add_argument("--backoff-factor", type=float, help="factor by which an overflow reduces the scale (1/2)")
    result.add_argument("--scale-floor", type=float, help="smallest scale, for scalers in which it can be chosen")
    result.add_argument("--compare", action="store_true", help="print a table of all scalers")
    result.add_argument(
        "--plot", nargs="?", const=PICTURE, type=Path, metavar="FILE", help=f"also draw the scales (a new {PICTURE})"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_loss_scale(**vars(parser().parse_args())))
