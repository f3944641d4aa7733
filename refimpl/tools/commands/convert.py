"""Convert weights to and from PyTorch and Hugging Face.

    python scripts/convert.py export runs/gpt-fp16 gpt                         a folder for transformers
    python scripts/convert.py gguf model.gguf model                            the same, from a GGUF file of a Llama
    python scripts/convert.py export runs/gpt-fp16 gpt.safetensors             a state_dict under nanoGPT's names
    python scripts/convert.py import gpt.safetensors start.safetensors --n-head 4

AutoModelForCausalLM.from_pretrained("gpt") loads a folder, and train.py --init-from starts from it; both read the folders of
other people's Llamas, Mistrals, Qwens and GPT-2s, which need no conversion. A state_dict is for nanoGPT and for our MLP:
model.load_state_dict(safetensors.torch.load_file("gpt.safetensors")) reads the one that `export` writes, and
safetensors.torch.save_model(model, "gpt.safetensors") writes one for `import`. A tied weight may have either name, and names
may have the prefixes of DistributedDataParallel, torch.compile and Lightning. Models without biases have none in the file.
"""

from refimpl.training.cli import main as run_program

from pathlib import Path

from refimpl.errors import UsageError
from refimpl.parity.state_dict import export, import_
from refimpl.training.arguments import Parser
from refimpl.training.huggingface.config_json import DTYPES
from refimpl.training.huggingface.export import convert_gguf, export_folder

STATE_DICT = ".safetensors"
"""The ending of a target that is a state_dict, not a folder."""


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    ways = result.add_subparsers(dest="way", required=True)
    out = ways.add_parser(
        "export",
        help="checkpoint -> folder for transformers, or state_dict",
        description="Convert a checkpoint to a folder that transformers and train.py --init-from read, or to a state_dict.",
    )
    what = "a checkpoint, the folder of a run, or a Hugging Face folder"
    out.add_argument("source", type=Path, metavar="CHECKPOINT", help=what)
    out.add_argument("target", type=Path, metavar="TARGET", help=f"the folder to write, or NAME{STATE_DICT} for a state_dict")
    out.add_argument("--format", choices=DTYPES, default="fp32", help="format of the weights in the folder (default: fp32)")
    back = ways.add_parser(
        "import",
        help="state_dict -> a file for train.py --init-from",
        description="Convert a state_dict of nanoGPT or of our MLP to a checkpoint for train.py --init-from and generate.py.",
    )
    back.add_argument("source", type=Path, metavar="STATE_DICT", help="a state_dict in a safetensors file")
    back.add_argument("target", type=Path, metavar="TARGET", help="the file to write; it must not exist")
    heads = "attention heads of a GPT, which shapes do not determine (default: 4)"
    back.add_argument("--n-head", type=int, default=4, metavar="N", help=heads)
    gguf = ways.add_parser(
        "gguf",
        help="GGUF file of a Llama -> folder for transformers and train.py --init-from",
        description="Convert the GGUF file of a Llama to a folder that transformers and train.py --init-from read.",
    )
    gguf.add_argument("source", type=Path, metavar="GGUF", help="the file to read")
    gguf.add_argument("target", type=Path, metavar="TARGET", help="the folder to write")
    return result


def run() -> None:
    """Make the conversion that the command line describes."""
    arguments = vars(parser().parse_args())
    way, source, target = (arguments.pop(name) for name in ("way", "source", "target"))
    if way == "import":
        import_(source, target, **arguments)
    elif way == "gguf":
        convert_gguf(source, target)
    elif target.suffix == STATE_DICT:
        if arguments["format"] != "fp32":
            raise UsageError(f"--format is for folders: the state_dict {target} is FP32")
        export(source, target)
    else:
        export_folder(source, target, arguments["format"])


def main() -> None:
    """Run the command and exit."""
    run_program(run, goes_on=True)
