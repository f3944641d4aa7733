"""Time training steps: against PyTorch, against their own matrix products, by operation, and as sizes grow.

    python scripts/bench.py                                      the small and the medium GPT in FP32, BF16, FP16
    python scripts/bench.py --against torch                      beside PyTorch, alternating, with peak memory
    python scripts/bench.py --profile --models small --recipes fp16
    python scripts/bench.py --scaling --recipes fp32
    python scripts/bench.py --ranks 2 --models medium            on several ranks, and what 1024 GPUs should give
    python scripts/bench.py --smoke                              runs everything once at a toy size: correct, not timed
"""

from refimpl.training.cli import main as run_program

from typing import Any

from refimpl.tools.bench.ranks import show
from refimpl.tools.bench.steps import MODELS, bench
from refimpl.training.arguments import Parser
from refimpl.training.console import json_text


def parser() -> Parser:
    """The flags of this script."""
    result = Parser(description=__doc__)
    kind = result.add_mutually_exclusive_group()
    kind.add_argument("--against", choices=("torch",), help="time PyTorch beside it (pip install torch==2.13.0)")
    kind.add_argument("--profile", action="store_true", help="the time of each operation, for the first model and recipe")
    kind.add_argument("--scaling", action="store_true", help="time a token as batch, block and layers grow")
    kind.add_argument("--ranks", type=int, metavar="N", help="weak scaling on up to N processes (pip install '.[mpi]')")
    kind.add_argument("--smoke", action="store_true", help="a toy size and two steps, for tests")
    result.add_argument("--models", default="small,medium", help=f"{', '.join(MODELS)} (small,medium)")
    result.add_argument("--recipes", default="fp32,bf16,fp16", help="recipes, with commas between them (fp32,bf16,fp16)")
    result.add_argument("--rounds", type=int, default=15, help="steps timed (15)")
    result.add_argument("--json", action="store_true", dest="as_json", help="print it as data")
    return result


def run(arguments: dict[str, Any]) -> None:
    """Choose what is timed."""
    kinds = {"torch": arguments.pop("against"), "profile": arguments.pop("profile"), "scaling": arguments.pop("scaling")}
    ranks = arguments.pop("ranks")
    if ranks is not None:
        text, rows = show(arguments["models"].split(","), arguments["recipes"].split(","), ranks, arguments["rounds"])
        print(json_text(rows) if arguments["as_json"] else text)
        return
    if arguments.pop("smoke"):
        arguments |= {"models": "smoke", "rounds": 2}
    bench(next((name for name, asked in kinds.items() if asked), "alone"), **arguments)


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())))
