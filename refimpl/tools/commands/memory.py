"""Count the memory of training: model states, activations, and each rank's share of them under ZeRO.

    python scripts/memory.py                                     7 billion parameters with Adam: 112 GB
    python scripts/memory.py --preset gpt2-xl --batch-size 32 --checkpointing full
    python scripts/memory.py --params 7e9 --convention megatron-bf16 --zero 1 --ranks 64
    python scripts/memory.py --model gpt --n-layer 12 --n-head 12 --n-embd 768 --block-size 1024 --recipe bf16
    python scripts/memory.py --preset smollm2-135m --recipe bf16 --batch-size 2 --block-size 512 --checkpointing full
    python scripts/memory.py --hf DIR                            the sizes in the config.json of a Hugging Face folder
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
from refimpl.training.arguments import Parser, file_name, one_of
from refimpl.training.config import LLAMA, MODEL_DEFAULTS, flag
from refimpl.training.flags import add_config_flags, refuse_unused

NO_MEMORY = ("rope_theta", "rope_scaling", "norm_eps")
"""Sizes of llama that take no memory."""
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", *LLAMA)


SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def amount(text: str) -> float:
    """Return a number from its text, which may end as the names of models do: 7B, 124M."""
    number, suffix = (text[:-1], SUFFIXES[text[-1].upper()]) if text[-1:].upper() in SUFFIXES else (text, 1.0)
    return float(number) * suffix


def parser() -> Parser:
    """Return the parser of the flags; defaults are those of `report.choose` or of the measured run."""
    result = Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    model = result.add_argument_group("model: --params, --preset, --hf, or --model with sizes")
    model.add_argument("--params", type=amount, metavar="N", help="number of parameters: 7e9, 7B or 124M (default: 7e9)")
    model.add_argument("--preset", type=one_of(PRESETS), metavar="NAME", help=f"a model by name: {', '.join(PRESETS)}")
    model.add_argument("--hf", type=file_name, metavar="DIR", help="folder with a Hugging Face config.json, or that file")
    models = "gpt or llama, with the sizes below; with --measure also mlp"
    model.add_argument("--model", type=one_of(MODEL_DEFAULTS), metavar="NAME", help=models)
    for name, what in {"n_layer": "layers", "n_head": "attention heads", "n_embd": "width", "vocab_size": "token ids"}.items():
        default = {"vocab_size": 256}.get(name) or MODEL_DEFAULTS["gpt"][name]
        model.add_argument(flag(name), type=int, metavar="N", help=f"{what} (default: {default})")
    add_config_flags(result, [name for name in LLAMA if name not in NO_MEMORY])
    states = result.add_argument_group("model states")
    recipe = "the format of each state (default: fp16; `python scripts/recipes.py` lists all)"
    states.add_argument("--recipe", type=one_of(RECIPES), metavar="NAME", help=recipe)
    convention = f"in place of a recipe: {', '.join(CONVENTIONS)}"
    states.add_argument("--convention", type=one_of(CONVENTIONS), metavar="NAME", help=convention)
    states.add_argument("--optimizer", type=str.lower, metavar="NAME", help="adamw or sgd (default: adamw)")
    states.add_argument("--momentum", type=float, metavar="X", help="momentum of sgd; with 0 there is no m (default: 0.9)")
    accumulated = "micro-batches per step, whose gradients are summed in FP32 (default: 1)"
    states.add_argument("--grad-accum", type=int, metavar="N", help=accumulated)
    states.add_argument("--zero", type=int, metavar="STAGE", help="ZeRO stage, 0 to 3: which states are divided (default: 0)")
    states.add_argument("--ranks", type=int, metavar="N", help="data-parallel ranks (default: 1)")
    activations = result.add_argument_group("activations")
    activations.add_argument("--batch-size", type=int, metavar="N", help="sequences (default: 1)")
    activations.add_argument("--block-size", type=int, metavar="N", help="tokens per sequence (default: the model's)")
    stored = f"{', '.join(CHECKPOINTING)} (default: none)"
    activations.add_argument("--checkpointing", type=one_of(CHECKPOINTING), metavar="NAME", help=stored)
    kinds = f"{', '.join(ATTENTION)} (default: unfused)"
    activations.add_argument("--attention", type=one_of(ATTENTION), metavar="NAME", help=kinds)
    other = result.add_argument_group("other tables, and data")
    other.add_argument("--conventions", action="store_true", help="print published ways to count model states")
    other.add_argument("--zero-table", action="store_true", help="print table 1 of the ZeRO paper")
    other.add_argument("--measure", action="store_true", help="train a small model and compare its arrays with the formulas")
    other.add_argument("--json", action="store_true", dest="as_json", help="print the data as JSON")
    result.add_quiet()
    return result


def run(arguments: dict[str, Any]) -> int:
    """Print what the flags ask for. Return the exit code. Errors: UsageError for flags that do not go together."""
    as_json, quiet = arguments.pop("as_json", False), arguments.pop("quiet", False)
    asked = [name for name in ("conventions", "zero_table", "measure") if arguments.pop(name, False)]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0].replace('_', '-')} and --{asked[1].replace('_', '-')} exclude each other: give one")
    if asked == ["measure"]:
        for name in ("params", "preset", "hf", "convention", "zero", "ranks", "vocab_size"):
            if name in arguments:
                raise UsageError(f"--measure trains a model of this project: --{name.replace('_', '-')} does not apply")
        refuse_unused(arguments)
        return measure_model(arguments, as_json, quiet)
    if asked:
        if arguments:
            raise UsageError(f"--{asked[0].replace('_', '-')} takes no other flag but --json")
        (show_conventions if asked == ["conventions"] else show_zero_table)(as_json)
        return 0
    if arguments.get("zero") and "ranks" not in arguments:
        raise UsageError(f"--zero {arguments['zero']} divides states among ranks: give their number with --ranks")
    sizes = {name: arguments.pop(name) for name in SIZES if name in arguments}
    show_memory(as_json, sizes=sizes, **arguments)
    return 0


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())))
