"""Sample text from a checkpoint, or measure the loss of a file under it.

    python scripts/generate.py runs/gpt-fp16 --prompt "The for statement"
    python scripts/generate.py runs/gpt-fp16 --loss README.md
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.training.arguments import Parser
from refimpl.training.generate import generate_text


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run")
    result.add_argument("--prompt", default="\n", help="beginning of the text")
    result.add_argument("--bytes", type=int, default=500, dest="n_bytes", help="bytes to generate (500)")
    result.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely byte (0.8)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--loss", type=Path, metavar="FILE", help="print the loss of this file instead, in nats per byte")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: generate_text(**vars(parser().parse_args())))
