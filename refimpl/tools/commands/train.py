"""Train a model on real text in mixed precision.

    python scripts/train.py                              a small GPT in FP16, with FP32 masters: about a minute
    python scripts/train.py --recipe bf16 --steps 300
    python scripts/train.py --model mlp --data FILE --out runs/mine
    python scripts/train.py --resume --out runs/mine
    python scripts/train.py --config runs/mine --lr 1e-3   with the settings of runs/mine, but another learning rate
    python scripts/train.py --init-from DIR --data FILE  fine-tune a Hugging Face model, of the Llama family or GPT-2

Fine-tuning begins with --lr 5e-5, 100 steps of 4 x 128 tokens and 10 of warm-up, unless these are given.
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.errors import UsageError
from refimpl.parity.mistakes import MISTAKES
from refimpl.training.arguments import Parser
from refimpl.training.config import STARTS
from refimpl.training.config_file import overridden, read_settings
from refimpl.training.flags import add_config_flags, refuse_unused
from refimpl.training.run import only_rank_0_prints, train


def parser() -> Parser:
    """Return the parser of the flags, one per field of Config; defaults are Config's, or those of the run that is resumed."""
    result = Parser(description=__doc__)
    add_config_flags(result)
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for log, checkpoint and picture (default: a new one under runs/)"
    )
    what = "settings from a file such as config.json, or from the folder of a run; flags override them"
    result.add_argument("--config", type=Path, metavar="FILE", help=what)
    result.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    result.add_argument("--resume", action="store_true", help="continue the run in --out, bit for bit")
    result.add_quiet()
    what = "start from the weights and sizes of a run, a checkpoint, or a Hugging Face folder"
    result.add_argument("--init-from", type=Path, metavar="DIR", help=what)
    return result


def run() -> int:
    """Run the training that the command line describes. Return the exit code."""
    arguments = vars(parser().parse_args())
    special = {name: arguments.pop(name) for name in ("out", "resume", "overwrite", "init_from", "quiet")}
    file = arguments.pop("config")
    with only_rank_0_prints():
        if file is not None:
            if special["resume"]:
                raise UsageError("--resume and --config contradict each other: a resumed run has the settings in its folder")
            settings, first_weights = read_settings(file)
            settings = overridden(settings, arguments)
            of_the_file = (*STARTS, "n_head")  # which a flag may make unused
            refuse_unused({name: value for name, value in settings.items() if name in arguments or name not in of_the_file})
            arguments, special["init_from"] = settings, special["init_from"] or first_weights
        elif not special["resume"]:  # a resumed run has the settings in its folder, and may change none of these
            refuse_unused(arguments)
    return train(arguments, **special, faults=MISTAKES)


def main() -> None:
    """Run the command and exit."""
    run_program(run, goes_on=True)
