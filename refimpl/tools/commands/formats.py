"""Show the floating-point formats, and how each stores a given number.

    python scripts/formats.py                                    bits, largest and smallest values, eps of each format
    python scripts/formats.py 0.1 65519.99 65520 6e-8 1e-3       each number in the common formats: bits, error, what happened
    python scripts/formats.py 1+2^-11+2^-30 --format fp16,bf16   rounded twice, as PyTorch rounds FP64 to 16 bits
    python scripts/formats.py 448 464.1 -inf --format e4m3 --overflow inf
    python scripts/formats.py 0.1 65520 --explain fp16           how a number is rounded, step by step
    python scripts/formats.py --plot                             spacing and ranges, drawn in formats.png
"""

from refimpl.training.cli import main as run_program

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refimpl.numerics.formats import FORMATS
from refimpl.tools.formats.plot import PICTURE
from refimpl.tools.formats.report import COMMON, show_formats
from refimpl.training.arguments import Parser, some_of


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument(
        "values", nargs="*", type=str.strip, metavar="NUMBER", help="0.1, -1e-8, 0x1p-24, 2^-24, 1+2^-11, inf, nan, ..."
    )
    result.add_argument(
        "--format", type=some_of(FORMATS), metavar="NAME,...", dest="formats",
        help=f"formats, of {', '.join(FORMATS)} (default: all; for numbers {','.join(COMMON)})",
    )  # fmt: skip
    result.add_argument(
        "--overflow", choices=("saturate", "inf"), default="saturate",
        help="in formats of 8 bits and fewer, what is too large becomes the largest value, or Inf or NaN (default: saturate)",
    )  # fmt: skip
    explained = "show step by step how these formats round each number, from its exact value"
    result.add_argument("--explain", type=some_of(FORMATS), metavar="NAME,...", help=explained)
    result.add_argument(
        "--plot", nargs="?", const=PICTURE, type=Path, metavar="FILE", help=f"also draw the formats (default: a new {PICTURE})"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    result.add_argument("--json", action="store_true", dest="as_json", help="print the data as JSON")
    return result


def arguments(words: Sequence[str]) -> Any:
    """Parse the command line; flags may come between the numbers."""
    return parser().parse_intermixed_args(words)


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: show_formats(**vars(arguments(sys.argv[1:]))))
