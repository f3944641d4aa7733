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
from refimpl.training.arguments import Parser, one_of


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    rules = f"whose rules to follow: {', '.join(SCALER_RULES)}"
    result.add_argument("scaler", type=one_of(SCALER_RULES), nargs="?", metavar="SCALER", help=rules)
    pattern = "a digit per step, 1 for an overflow or 0 for none (default: 1010100000)"
    result.add_argument("--overflows", default="1010100000", metavar="PATTERN", help=pattern)
    hysteresis = "overflows until the scale is reduced, if the scaler has hysteresis (default: 2)"
    result.add_argument(
        "--init-scale", type=float, default=1024.0, metavar="X", help="the scale before the first step (default: 1024)"
    )
    result.add_argument("--interval", type=int, default=3, metavar="N", help="good steps before the scale grows (default: 3)")
    result.add_argument("--hysteresis", type=int, metavar="N", help=hysteresis)
    result.add_argument("--growth-factor", type=float, metavar="X", help="factor by which the scale grows (default: 2)")
    result.add_argument("--backoff-factor", type=float, metavar="X", help="factor at an overflow (default: 1/2)")
    floor = "smallest scale, for scalers that let it be chosen (default: the scaler's)"
    result.add_argument("--scale-floor", type=float, metavar="X", help=floor)
    result.add_argument("--compare", action="store_true", help="print a table of all scalers")
    result.add_argument(
        "--plot", nargs="?", const=PICTURE, type=Path, metavar="FILE", help=f"also draw the scales (default: a new {PICTURE})"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_loss_scale(**vars(parser().parse_args())))
