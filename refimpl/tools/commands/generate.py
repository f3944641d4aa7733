"""Let a model continue a text, or measure its loss on a file.

    python scripts/generate.py runs/gpt-fp16 --prompt "The for statement"
    python scripts/generate.py runs/gpt-fp16 --temperature 0.7 --top-p 0.9 --seed 1
    python scripts/generate.py runs/gpt-fp16 --loss README.md

Text is printed as it is generated. The tokenizer is that of the run, whose folder has a copy of it.
"""

from refimpl.training.cli import main as run_program

import sys
from pathlib import Path

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.models.model import Model
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.training.arguments import Parser, file_name
from refimpl.training.checkpoint_states import block_size_of, load_for_inference, tokenizer_of
from refimpl.training.console import count, printable
from refimpl.training.data import map_file
from refimpl.training.evaluate import MeasuredBatches, count_batches, text_loss, whole_text
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.sampling import Choice, Writer
from refimpl.training.token_cache import encode_text
from refimpl.training.tokenizer import Tokenizer, refuse_smaller

LONGEST = 1024
"""The most tokens of a block for the loss of a file, unless a run had longer ones: attention takes their square
in memory."""
LOGITS = 2**26
"""The most logits at a time, unless one block has more."""


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    what = "a checkpoint, the folder of a run, or a Hugging Face folder"
    result.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=what)
    tokenizer = "bytes, a tokenizer.json, or a folder that has one (default: that of the checkpoint)"
    result.add_argument("--tokenizer", type=file_name, metavar="FILE", help=tokenizer)
    result.add_argument("--prompt", default="\n", metavar="TEXT", help="beginning of the text (default: a line break)")
    result.add_argument(
        "--tokens", type=int, default=500, dest="n_tokens", metavar="N", help="tokens to write at most (default: 500)"
    )
    divisor = "divisor of the logits; 0 always takes the most likely token (default: 0.8)"
    result.add_argument("--temperature", type=float, default=0.8, metavar="X", help=divisor)
    top = "choose among the likeliest tokens, whose probabilities add up to X (default: 1)"
    result.add_argument("--top-p", type=float, default=1.0, metavar="X", help=top)
    result.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice of tokens (default: 0)")
    blocks = f"the run's --block-size, or of as many tokens as a Hugging Face model has positions, {LONGEST:,} at most"
    what = f"print the loss of FILE instead of a text, in blocks of {blocks}"
    result.add_argument("--loss", type=Path, metavar="FILE", help=what)
    result.add_quiet()
    return result


def run(
    checkpoint: Path,
    prompt: str,
    n_tokens: int,
    temperature: float,
    seed: int,
    loss: Path | None,
    top_p: float = 1.0,
    tokenizer: str | None = None,
    quiet: bool = False,
) -> None:
    """Print a text that a checkpoint's model writes, or the loss of a file under it. quiet: show no progress.

    Errors: UsageError.
    """
    if n_tokens < 0 or seed < 0:
        raise UsageError("--tokens and --seed must be 0 or more")
    choice = Choice(temperature, top_p)
    loaded = load_for_inference(checkpoint)
    tokens = tokenizer_of(checkpoint, loaded[0], tokenizer)
    vocab_size = loaded[0].config["vocab_size"]
    refuse_smaller(tokens, vocab_size, f"the vocabulary of {checkpoint}")
    if vocab_size > tokens.vocab_size:
        note = f"note: {vocab_size - tokens.vocab_size} of this model's {vocab_size} token ids are not in the tokenizer"
        more = "and are never chosen; the sample is text only if the model was trained with it"
        print(f"{note}, {tokens.name}, {more}", file=sys.stderr)
    if loss is not None:
        _print_loss(*loaded, tokens, loss, block_size_of(checkpoint, loaded[0]) or LONGEST, quiet)
        return
    _print_text(*loaded, tokens, prompt, n_tokens, choice, np.random.Generator(np.random.PCG64(seed)))


def _print_text(
    model: Model, state: State, run: Run, tokenizer: Tokenizer, prompt: str, n: int, choice: Choice, rng: np.random.Generator
) -> None:
    given = prompt.encode("utf-8", "surrogateescape")
    ids, _ = tokenizer.encode(given)
    if not ids.size:
        raise UsageError(f"--prompt {prompt!r} has no tokens: give a longer one")
    writer = Writer(model, state, run, tokenizer, ids)
    print(printable(given), end="", flush=True)
    for piece in writer.text(n, rng, choice):
        print(printable(piece), end="", flush=True)
    print()
    if writer.slid:
        block = model.config["block_size"]
        print(f"note: the model reads {block} {tokenizer.unit}s at most: of as many, the last half was kept", file=sys.stderr)
    if writer.why_ended:
        print(f"note: {writer.why_ended}", file=sys.stderr)


def _print_loss(model: Model, state: State, run: Run, tokenizer: Tokenizer, file: Path, usual: int, quiet: bool) -> None:
    """Print the loss of the consecutive blocks of a file, or of a single one of a file that is shorter. usual: their length."""
    ids, lengths = encode_text(tokenizer, map_file(file), quiet)
    vocab_size, unit = model.config["vocab_size"], tokenizer.unit
    whole = model.config["block_size"] if model.name == "mlp" else None  # an mlp reads whole blocks only
    least = (whole or 1) + 1
    if len(ids) < least:
        raise UsageError(f"{file} has {count(len(ids), unit)}; this model needs at least {least}, the last to be predicted")
    block_size = whole or min(model.config["block_size"], usual, len(ids) - 1)
    sizes = min(16, max(1, LOGITS // (block_size * vocab_size))), block_size
    with ProgressBar(count_batches(ids, sizes), "batch", quiet=quiet, stays=False) as bar:
        loss = text_loss(model, state, run, _counted(whole_text(ids, lengths, sizes), bar))
    print(f"{file}: {loss.described(unit)}, in blocks of {count(block_size, unit)}")


def _counted(batches: MeasuredBatches, bar: ProgressBar) -> MeasuredBatches:
    """Yield the batches, and count each on the bar when the next one is asked for."""
    for batch in batches:
        yield batch
        bar.update()


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(**vars(parser().parse_args())))
