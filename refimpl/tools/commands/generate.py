"""Sample text from a checkpoint, or measure the loss of a file under it.

    python scripts/generate.py runs/gpt-fp16 --prompt "The for statement"
    python scripts/generate.py runs/gpt-fp16 --loss README.md
"""

from refimpl.training.cli import main as run_program

import math
import sys
from pathlib import Path

import numpy as np

from refimpl.errors import UsageError
from refimpl.training.arguments import Parser
from refimpl.training.checkpoint_states import load_for_inference
from refimpl.training.console import printable
from refimpl.training.data import BYTES, check_has_bytes, map_file, sequential_batches
from refimpl.training.evaluate import mean_loss
from refimpl.training.sampling import sample


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    result.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run")
    result.add_argument("--prompt", default="\n", help="beginning of the text")
    result.add_argument("--bytes", type=int, default=500, dest="n_bytes", help="bytes to generate (500)")
    result.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely byte (0.8)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--loss", type=Path, metavar="FILE", help="print the loss of this file instead, in nats per byte")
    return result


def run(checkpoint: Path, prompt: str, n_bytes: int, temperature: float, seed: int, loss: Path | None) -> None:
    """Print a sample of a checkpoint's model, or the loss of a file under it. Errors: UsageError."""
    if n_bytes < 0 or seed < 0 or not 0 <= temperature < math.inf:
        raise UsageError("--bytes, --seed and --temperature must be 0 or more, and finite")
    model, state, context = load_for_inference(checkpoint)
    vocab_size = model.config["vocab_size"]
    check_has_bytes(vocab_size, f"the vocabulary of {checkpoint}")
    if vocab_size > BYTES:
        note = f"note: {vocab_size - BYTES} of this model's {vocab_size} token ids are not bytes and are not sampled;"
        print(f"{note} the sample is text only if the model was trained on bytes", file=sys.stderr)
    if loss is not None:
        text = map_file(loss)
        block_size = model.config["block_size"]
        if len(text) <= block_size:
            raise UsageError(f"{loss} has {len(text)} bytes; this model needs at least {block_size + 1}")
        nats = mean_loss(model, state, context, sequential_batches(text, 16, block_size))
        print(f"{loss}: {nats:.4f} nats per byte, {nats / math.log(2):.4f} bits per byte")
        return
    rng, given = np.random.Generator(np.random.PCG64(seed)), prompt.encode("utf-8", "surrogateescape")
    sampled = sample(model, state, context, n_bytes, rng, given, temperature)
    print(printable(given + sampled))
    if len(sampled) < n_bytes:
        print(f"note: the logits are not finite after {len(sampled)} bytes: nothing can be sampled from them", file=sys.stderr)


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(**vars(parser().parse_args())))
