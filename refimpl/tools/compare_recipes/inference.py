"""What the same weights compute under several recipes, without training: the loss of a text, and a continuation of a prompt.

Under each recipe the weights are rounded once to the format of its weights, and every operation computes as its policy says:
under `mxfp4` linear layers quantize their inputs and their weights, and the head, norms and attention compute in BF16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.precision.recipes import get_recipe
from refimpl.tools.compare_recipes.runs import chosen_recipes
from refimpl.training.checkpoint_states import FirstWeights, in_recipe
from refimpl.training.columns import table
from refimpl.training.config import Config, flag
from refimpl.training.console import json_text
from refimpl.training.data import Corpus
from refimpl.training.evaluate import TextLoss, text_loss, whole_text
from refimpl.training.init_from import settings_from
from refimpl.training.outputs import target
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.sampling import Choice, Writer

FORMATS_COMPARED = ("fp32", "bf16", "fp16", "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
"""The recipes that are compared unless others are named."""
PROMPT, TOKENS = "\n", 24
USED = ("data", "tokenizer", "batch_size", "block_size", "eval_batches")
"""The settings of a run that a comparison without training uses."""


@dataclass(frozen=True)
class Computed:
    """What the weights compute under one recipe.

    loss: of the text. likeliest: the most likely token at each of its positions. continuation: the tokens after the prompt,
    each the most likely one; text: the same as text.
    """

    recipe: str
    loss: TextLoss
    likeliest: np.ndarray
    continuation: list[int]
    text: str


def compare_inference(
    given: Mapping[str, Any],
    init_from: Path,
    recipes: str = ",".join(FORMATS_COMPARED),
    prompt: str = PROMPT,
    n_tokens: int = TOKENS,
    json_file: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Print, for each recipe, the loss of a text and a continuation of a prompt, and write the data.

    given: fields of Config, of USED; the text is the first blocks of the validation part, eval_batches * batch_size of them.
    quiet: show no progress.
    Errors: UsageError for another setting, or what cannot be read.
    """
    unused = [flag(name) for name in given if name not in USED]
    if unused:
        raise UsageError(f"--inference trains nothing and has no {', '.join(unused)}: leave that out")
    if n_tokens < 0:
        raise UsageError("--tokens must be 0 or more")
    names = chosen_recipes(recipes)
    settings, (_, first) = settings_from(init_from, given)
    config = Config.of(settings)
    corpus = config.make_corpus(quiet)
    ids, _ = corpus.tokenizer.encode(prompt.encode("utf-8", "surrogateescape"))
    if not ids.size:
        raise UsageError(f"--prompt {prompt!r} has no tokens: give a longer one")
    data_file = None if json_file is None else target("--json", json_file, json_file, overwrite)
    results = []
    with ProgressBar(len(names), "recipe", quiet=quiet) as bar:
        for name in names:
            results.append(computed(name, first, config, corpus, ids, n_tokens))
            bar.update()
    print(table(HEADER, list(rows(results))), *meaning(results, config, corpus), sep="\n")
    print(*continuations(results, prompt), sep="\n")
    if data_file is not None:
        print(f"written: {data_file.write_text(json_text(data(results)) + chr(10))}")


def computed(name: str, first: FirstWeights, config: Config, corpus: Corpus, prompt: np.ndarray, n_tokens: int) -> Computed:
    """Return what the weights compute under one recipe."""
    model = first.model
    state, run = in_recipe(model, first.weights, get_recipe(name))
    likeliest: list[np.ndarray] = []

    def look(kind: str, place: str, array: np.ndarray) -> np.ndarray:
        if place == "lm_head":
            likeliest.append(array.argmax(-1).reshape(-1))
        return array

    sizes = config.batch_size, config.block_size
    text = whole_text(corpus.valid, corpus.valid_lengths, sizes, config.batch_size * config.eval_batches, config.no_target)
    loss = text_loss(model, state, replace(run, observer=look), text)
    writer = Writer(model, state, run, corpus.tokenizer, prompt)
    written = "".join(writer.text(n_tokens, np.random.default_rng(0), Choice(0)))
    return Computed(name, loss, np.concatenate(likeliest), writer.tokens[len(prompt) :], written)


HEADER = ("recipe", "loss", "minus fp32", "bits per byte", "likeliest", "continuation")


def agreement(one: Computed, other: Computed) -> tuple[float, int]:
    """Return the share of positions at which the same token is the most likely one, and how many tokens both begin with."""
    pairs = zip(one.continuation, other.continuation, strict=False)
    return float(np.mean(one.likeliest == other.likeliest)), sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def rows(results: Sequence[Computed]) -> Iterator[list[str]]:
    """Yield one row per recipe; the first is FP32."""
    baseline = results[0]
    for one in results:
        share, same = agreement(one, baseline)
        yield [
            one.recipe,
            f"{one.loss.nats_per_token:.4f}",
            "" if one is baseline else f"{one.loss.nats_per_token - baseline.loss.nats_per_token:+.4f}",
            f"{one.loss.bits_per_byte:.4f}",
            f"{100 * share:.1f} %",
            f"{same} of {len(baseline.continuation)}",
        ]


def meaning(results: Sequence[Computed], config: Config, corpus: Corpus) -> list[str]:
    """Return sentences that explain the columns."""
    n, unit = len(results[0].likeliest), corpus.tokenizer.unit
    return [
        f"loss: in nats per {unit}, over {n:,} {unit}s of {corpus.name}, the first ones of its validation part in blocks "
        f"of {config.block_size}. likeliest: positions at which the most likely {unit} is that of FP32. continuation: {unit}s "
        f"before the first that differs from FP32's; each is the most likely one, so that all after that may differ too."
    ]


def continuations(results: Sequence[Computed], prompt: str) -> Iterator[str]:
    """Yield the prompt and each recipe's continuation as one line, with escapes for line breaks."""
    yield f"\n{prompt!r} continues:"
    width = max(len(one.recipe) for one in results)
    yield from (f"  {one.recipe.ljust(width)}  {one.text!r}" for one in results)


def data(results: Sequence[Computed]) -> list[dict[str, Any]]:
    """Return all results as plain data."""
    return [
        {
            "recipe": one.recipe, **asdict(one.loss), "likeliest_as_fp32": agreement(one, results[0])[0],
            "continuation": one.continuation, "text": one.text,
        }
        for one in results
    ]  # fmt: skip
