"""Follow one weight through one training step: its values, formats and bits, and the functions that compute them.

    python scripts/inspect_step.py                                   FP16 with FP32 masters
    python scripts/inspect_step.py --recipe pure-bf16                BF16 without masters: the update is rounded away
    python scripts/inspect_step.py --step 1 --init-scale 1e9         a loss scale that is too large: overflow, skip, halve
    python scripts/inspect_step.py --parameter transformer.wte.weight --index 101,7 --step 50
"""

from refimpl.training.cli import main as run_program

import argparse

from refimpl.optim.loss_scalers import SCALER_RULES
from refimpl.tools.step_inspector import FOLLOWED, PARAMETERS, inspect_step
from refimpl.training.arguments import Parser, one_of


def numbers(text: str) -> tuple[int, ...]:
    """Return integers from their text: '3,5' -> (3, 5)."""
    return tuple(int(part) for part in text.split(","))


def parser() -> Parser:
    """Return the parser of the flags; defaults are those of `inspect_steps`."""
    result = Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    add = result.add_argument
    add("--recipe", type=one_of(FOLLOWED), metavar="NAME", help=f"{', '.join(FOLLOWED)} (default: fp16)")
    add("--model", type=one_of(PARAMETERS), metavar="NAME", help=f"{' or '.join(PARAMETERS)}, a tiny one (default: gpt)")
    add("--parameter", metavar="NAME", help=f"a parameter of the model (default: {' or '.join(PARAMETERS.values())})")
    add("--index", type=numbers, metavar="I,J", help="an element of the parameter (default: 3,5)")
    add("--step", type=int, metavar="N", help="the first step to show (default: the first that is not skipped)")
    add("--steps", type=int, metavar="K", help="number of steps to show (default: 1)")
    add("--seed", type=int, metavar="N", help="seed of weights and batches (default: 0)")
    add("--lr", type=float, metavar="X", help="largest learning rate, after 20 updates of warm-up (default: 3e-4)")
    scalers = ("dynamic", "none", *SCALER_RULES)
    scale = f"{', '.join(scalers)}, or a number (default: the recipe's)"
    add("--loss-scale", type=one_of(scalers), metavar="NAME", help=scale)
    start = "initial value of a loss scale that adapts (default: 65536, or its project's)"
    add("--init-scale", type=float, metavar="X", help=start)
    add("--json", action="store_true", dest="as_json", help="print the data as JSON")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: inspect_step(**vars(parser().parse_args())))
