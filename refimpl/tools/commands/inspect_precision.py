"""Show what every cast of a training run did: how much it rounded, flushed to zero or overflowed, tensor by tensor.

    python scripts/inspect_precision.py                                200 steps of the small GPT in FP16: about 40 seconds
    python scripts/inspect_precision.py --recipe bf16 --steps 50 --every 5
    python scripts/inspect_precision.py --what-if e4m3,bf16              also round the same values to other formats
    python scripts/inspect_precision.py --run runs/gpt-fp16 --steps 20   continue from the checkpoint of a run of train.py
    python scripts/inspect_precision.py --init-from DIR --batch-size 1   five steps of a Hugging Face model: its outliers
    python scripts/inspect_precision.py --trace ours.safetensors --no-page --json precision.json

A summary is printed; the page is one HTML file with figures and all tables, and needs matplotlib.
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.numerics.formats import FORMATS
from refimpl.tools.precision_report.main import FIRST_STEPS, MORE_STEPS, STEPS, inspect_precision
from refimpl.training.arguments import Parser, some_of
from refimpl.training.config import LLAMA
from refimpl.training.flags import add_config_flags, refuse_unused

CONFIG_FLAGS = (
    "model", "recipe", "data", "tokenizer", "examples", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size",
    "bias", *LLAMA, "optimizer", "beta1", "beta2", "eps", "lr", "min_lr", "schedule", "warmup", "clip", "grad_accum",
    "masters_from", "loss_scale", "init_scale", "growth_interval", "hysteresis", "growth_factor", "backoff_factor",
    "scale_floor", "seed", "mistake", "backend", "steps",
)  # fmt: skip
OWN_FLAGS = ("init_from", "run", "trace", "every", "what_if", "out", "no_page", "json_file", "plot", "overwrite", "quiet")


def parser() -> Parser:
    """Return the parser of the flags: fields of Config for a new run, and those of this command."""
    result = Parser(description=__doc__)
    what = "start from the weights and sizes of a Hugging Face folder, a run or a checkpoint"
    result.add_argument("--init-from", type=Path, metavar="DIR", help=what)
    result.add_argument("--run", type=Path, metavar="DIR", help="continue a run of train.py; its folder is only read")
    result.add_argument("--trace", type=Path, metavar="FILE", help="repeat the run that a trace records, and inspect it")
    result.add_argument(
        "--every", type=int, default=10, metavar="N", help="inspect every N-th step, the first and the last (default: 10)"
    )
    also = "also round the same values to these formats"
    result.add_argument("--what-if", type=some_of(FORMATS), default="", metavar="FORMAT,...", help=also)
    result.add_argument("--out", type=Path, metavar="FILE", help="the page (default: a new one, such as runs/report-fp16.html)")
    result.add_argument("--no-page", action="store_true", help="write no page; needs no matplotlib")
    result.add_argument("--json", type=Path, dest="json_file", metavar="FILE", help="also write all data as JSON")
    result.add_argument("--plot", type=Path, metavar="FILE", help="also draw the outliers and errors of each block, as a PNG")
    result.add_argument("--overwrite", action="store_true", help="replace an existing page, data and picture")
    result.add_quiet()
    steps = f"{STEPS}; with --init-from {FIRST_STEPS}; with --run {MORE_STEPS} more"
    add_config_flags(result, CONFIG_FLAGS, said={"steps": steps})
    return result


def run() -> None:
    """Inspect the run that the command line describes."""
    arguments = vars(parser().parse_args())
    own = {name: arguments.pop(name) for name in OWN_FLAGS}
    refuse_unused(arguments)
    inspect_precision(arguments, **own)


def main() -> None:
    """Run the command and exit."""
    run_program(run, goes_on=True)
