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
from refimpl.training.arguments import Parser


def numbers(text: str) -> tuple[int, ...]:
    """Return integers from their text: '3,5' -> (3, 5)."""
    return tuple(int(part) for part in text.split(","))


def parser() -> Parser:
    """Return the parser of the flags; defaults are those of `inspect_steps`."""
    result = Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    result.add_argument("--recipe", help=f"{', '.join(FOLLOWED)} (fp16)")
    result.add_argument("--model", help=f"{' or '.join(PARAMETERS)}, a tiny one (gpt)")
    result.add_argument("--parameter", metavar="NAME", help=f"a parameter of the model ({' or '.join(PARAMETERS.values())})")
    result.add_argument("--index", type=numbers, metavar="I,J", help="an element of the parameter (3,5)")
    result.add_argument("--step", type=int, metavar="N", help="the first step to show (the first that is not skipped)")
    result.add_argument("--steps", type=int, metavar="K", help="number of steps to show (1)")
    result.add_argument("--seed", type=int, help="seed of weights and batches (0)")
    result.add_argument("--lr", type=float, help="largest learning rate, after 20 updates of warm-up (3e-4)")
    result.add_argument("--loss-scale", help=f"dynamic, none, a number, or {', '.join(SCALER_RULES)} (the recipe's)")
    result.add_argument("--init-scale", type=float, help="initial value of a dynamic loss scale (65536, or its project's)")
    result.add_argument("--json", action="store_true", dest="as_json", help="print the data as JSON")
    return result


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: inspect_step(**vars(parser().parse_args())))
