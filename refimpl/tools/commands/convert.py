"""Convert weights to and from PyTorch, under nanoGPT's names, as safetensors files.

    python scripts/convert.py export runs/gpt-fp16/checkpoint.safetensors gpt.safetensors
    python scripts/convert.py import gpt.safetensors start.safetensors --n-head 4

In PyTorch, model.load_state_dict(safetensors.torch.load_file("gpt.safetensors")) reads the file that `export` writes, and
safetensors.torch.save_model(model, "gpt.safetensors") writes one for `import`. A tied weight may have either name, and names
may have the prefixes of DistributedDataParallel, torch.compile and Lightning. Models without biases have none in the file.
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.parity.state_dict import export, import_
from refimpl.training.arguments import Parser


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    ways = result.add_subparsers(dest="way", required=True)
    out = ways.add_parser("export", help="checkpoint -> state_dict")
    back = ways.add_parser("import", help="state_dict -> a file for train.py --init-from")
    for way in (out, back):
        what = "the checkpoint of a run, or its folder" if way is out else "a state_dict as a safetensors file"
        way.add_argument("source", type=Path, help=what)
        way.add_argument("target", type=Path, help="the file to write; it must not exist")
    back.add_argument("--n-head", type=int, default=4, help="attention heads of a GPT, which shapes do not determine (4)")
    return result


def run() -> None:
    """Make the conversion that the command line describes."""
    arguments = vars(parser().parse_args())
    (export if arguments.pop("way") == "export" else import_)(**arguments)


def main() -> None:
    """Run the command and exit."""
    run_program(run, goes_on=True)
