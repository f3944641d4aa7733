"""Count the memory of training: model states, activations, and each rank's share of them under ZeRO.

    python scripts/memory.py                                     7 billion parameters with Adam: 112 GB
    python scripts/memory.py --preset gpt2-xl --batch-size 32 --checkpointing full
    python scripts/memory.py --params 7e9 --convention megatron-bf16 --zero 1 --ranks 64
    python scripts/memory.py --model gpt --n-layer 12 --n-head 12 --n-embd 768 --block-size 1024 --recipe bf16
    python scripts/memory.py --preset smollm2-135m --recipe bf16 --batch-size 2 --block-size 512 --checkpointing full
    python scripts/memory.py --hf DIR                            the sizes in the config.json of a folder of Hugging Face
    python scripts/memory.py --conventions                       6 to 20 bytes per parameter: what each project counts
    python scripts/memory.py --zero-table
    python scripts/memory.py --measure --recipe amp-fp16         trains a small model and measures its arrays
    python scripts/memory.py --measure --checkpointing full
"""

from refimpl.training.cli import main as run_program

import argparse
from typing import Any

from refimpl.errors import UsageError
from refimpl.precision.policy_variants import ATTENTION
from refimpl.precision.recipes import RECIPES
from refimpl.tools.memory.measure import measure_model
from refimpl.tools.memory.report import show_conventions, show_memory, show_zero_table
from refimpl.tools.memory.states import CHECKPOINTING, CONVENTIONS, PRESETS
from refimpl.training.arguments import Parser
from refimpl.training.config import LLAMA
from refimpl.training.flags import add_config_flags

NO_MEMORY = ("rope_theta", "rope_scaling", "norm_eps")
"""Sizes of llama that take no memory."""
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", *LLAMA)


def parser() -> Parser:
    """Return the parser of the flags; defaults are those of `report.choose` or of the measured run."""
    result = Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    result.add_argument("--params", type=float, metavar="N", help="number of parameters (7e9)")
    result.add_argument("--preset", help=", ".join(PRESETS))
    result.add_argument("--hf", metavar="DIR", help="folder with a config.json of Hugging Face, or that file")
    result.add_argument("--model", help="gpt or llama, with the sizes below; with --measure also mlp")
    result.add_argument("--n-layer", type=int, help="layers (4)")
    result.add_argument("--n-head", type=int, help="attention heads (4)")
    result.add_argument("--n-embd", type=int, help="width (128)")
    result.add_argument("--vocab-size", type=int, help="vocabulary (256)")
    add_config_flags(result, [name for name in LLAMA if name not in NO_MEMORY])
    result.add_argument("--recipe", help=f"{', '.join(RECIPES)} (fp16)")
    result.add_argument("--convention", help=f"instead of a recipe: {', '.join(CONVENTIONS)}")
    result.add_argument("--optimizer", help="adamw or sgd (adamw)")
    result.add_argument("--momentum", type=float, help="momentum of sgd; with 0 there is no m (0.9)")
    result.add_argument("--grad-accum", type=int, help="micro-batches per step, their gradients summed in FP32 (1)")
    result.add_argument("--zero", type=int, metavar="STAGE", help="ZeRO stage, 0 to 3: which states are divided (0)")
    result.add_argument("--ranks", type=int, metavar="N", help="data-parallel ranks (1)")
    result.add_argument("--batch-size", type=int, help="sequences (1)")
    result.add_argument("--block-size", type=int, help="tokens per sequence (the model's)")
    result.add_argument("--checkpointing", help=f"{', '.join(CHECKPOINTING)} (none)")
    result.add_argument("--attention", help=f"{', '.join(ATTENTION)} (unfused)")
    result.add_argument("--conventions", action="store_true", help="print published ways to count model states")
    result.add_argument("--zero-table", action="store_true", help="print table 1 of the ZeRO paper")
    result.add_argument("--measure", action="store_true", help="train a small model and compare its arrays with the formulas")
    result.add_argument("--json", action="store_true", dest="as_json", help="print the data as JSON")
    return result


def run(arguments: dict[str, Any]) -> int:
    """Print what the flags ask for. Return the exit code. Errors: UsageError for flags that do not go together."""
    as_json = arguments.pop("as_json", False)
    asked = [name for name in ("conventions", "zero_table", "measure") if arguments.pop(name, False)]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0].replace('_', '-')} and --{asked[1].replace('_', '-')} exclude each other: give one")
    if asked == ["measure"]:
        for name in ("params", "preset", "hf", "convention", "zero", "ranks", "vocab_size"):
            if name in arguments:
                raise UsageError(f"--measure trains a model of this project: --{name.replace('_', '-')} does not apply")
        return measure_model(arguments, as_json)
    if asked:
        if arguments:
            raise UsageError(f"--{asked[0].replace('_', '-')} takes no other flag but --json")
        (show_conventions if asked == ["conventions"] else show_zero_table)(as_json)
        return 0
    sizes = {name: arguments.pop(name) for name in SIZES if name in arguments}
    show_memory(as_json, sizes=sizes, **arguments)
    return 0


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())))
