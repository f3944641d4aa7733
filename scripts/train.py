"""Train a model on real text in mixed precision.

    python scripts/train.py                              a small GPT, FP16 with FP32 masters, on Python's own manual
    python scripts/train.py --recipe bf16 --steps 300
    python scripts/train.py --model mlp --data FILE --out runs/mine
    python scripts/train.py --resume --out runs/mine
"""

import argparse
from pathlib import Path

from refimpl.cli import main
from refimpl.config import MODEL_DEFAULTS, Config
from refimpl.recipes import RECIPES
from refimpl.train import train

HELP = {
    "model": "gpt or mlp",
    "recipe": ", ".join(RECIPES),
    "backend": "numpy or cupy",
    "data": "pydoc (Python's manual), stdlib (its library's sources), or a file of any kind",
    "steps": "training steps",
    "batch_size": "sequences a micro-batch",
    "block_size": "bytes of context",
    "n_layer": "layers",
    "n_head": "attention heads (gpt)",
    "n_embd": "width",
    "optimizer": "adamw or sgd",
    "momentum": "momentum of sgd",
    "lr": "largest learning rate",
    "min_lr": "learning rate at the end of the cosine (default: lr / 10)",
    "warmup": "updates of linear warm-up",
    "weight_decay": "decoupled decay of matrices (0 for sgd unless given)",
    "clip": "largest gradient norm; 0 does not clip",
    "grad_accum": "micro-batches a step, their gradients summed in FP32",
    "loss_scale": "dynamic, none, or a number (default: the recipe's)",
    "init_scale": "where the dynamic loss scale starts",
    "growth_interval": "good steps before the dynamic loss scale doubles",
    "seed": "of weights, batches, evaluation and sample",
    "mistake": "a known mistake to make on purpose (`python scripts/mistakes.py` lists them)",
    "eval_every": "steps between evaluations, each followed by a checkpoint",
    "eval_batches": "batches an evaluation",
    "log_every": "steps between looks at the device",
    "sample_bytes": "bytes of text to generate at the end",
}
INTEGERS = {"steps", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "warmup", "grad_accum", "growth_interval",
            "seed", "eval_every", "eval_batches", "log_every", "sample_bytes"}  # fmt: skip
NUMBERS = {"momentum", "lr", "min_lr", "weight_decay", "clip", "init_scale"}


def _default(name: str) -> str:
    per_model = [f"{model} {values[name]}" for model, values in MODEL_DEFAULTS.items() if name in values]
    default = getattr(Config, name)
    return f" ({', '.join(per_model)})" if per_model else "" if default is None else f" ({default})"


def parser() -> argparse.ArgumentParser:
    """One flag for each field of Config; a flag that is not given is left to it, or to the run that is resumed."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in HELP.items():
        kind = int if name in INTEGERS else float if name in NUMBERS else str
        result.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text + _default(name))
    result.add_argument("--out", type=Path, help="folder for log, checkpoint and picture (default: a new one under runs/)")
    result.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    result.add_argument("--resume", action="store_true", help="go on with the run in --out, bit for bit")
    result.add_argument("--init-from", type=Path, metavar="FILE", help="start from the weights of a checkpoint")
    return result


if __name__ == "__main__":
    arguments = vars(parser().parse_args())
    special = {name: arguments.pop(name) for name in ("out", "resume", "overwrite", "init_from")}
    main(lambda: train(arguments, **special))
