"""Text that a trained model writes, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from refimpl.backends.numpy.threads import one_thread_per_product
from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape
from refimpl.nn.kv_cache import KVCache
from refimpl.nn.models.model import Model
from refimpl.numerics.casts import widen
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.training.tokenizer import Tokenizer

START = b"\n"
"""What stands before a text that is written without a prompt."""


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from the logits. Errors: UsageError for a temperature below 0, or top_p outside (0, 1].

    temperature: of softmax(logits / temperature); 0 takes the most likely token.
    top_p: only the most likely tokens can be chosen, as few as have this probability together.
    Source: Holtzman et al. 2019, arXiv 1904.09751, section 3.1 (top-p, 'nucleus sampling').
    PyTorch: transformers' generate with the same arguments, which keeps the same tokens.
    """

    temperature: float = 0.8
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature is {self.temperature}: it must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}: it must be above 0 and at most 1")

    @np.errstate(over="ignore", under="ignore", invalid="ignore")
    def of(self, logits: np.ndarray, u: float) -> int:
        """Return the index at which the cumulative distribution exceeds u, a random number in [0, 1)."""
        if self.temperature == 0:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()) / self.temperature)
        if self.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            before = weights[order].cumsum() - weights[order]  # of the tokens that are more likely
            weights[order[before >= self.top_p * weights.sum()]] = 0
        cumulative = weights.cumsum()
        return int(min(np.searchsorted(cumulative, u * cumulative[-1], side="right"), np.flatnonzero(weights)[-1]))


class Writer:
    """A model that continues a prompt. It reads at most block_size tokens, the last ones of a longer prompt.

    Each token is read once, with a KV cache. When block_size tokens have been read, the last half of them is read again, as the
    beginning of a text; then it continues. An MLP and a model with dynamic RoPE read all of their last block_size tokens again
    for each token.

    count: the number of tokens so far. why_ended: why there are no more, or ''. slid: how often tokens were read again.
    """

    def __init__(self, model: Model, state: State, run: Run, tokenizer: Tokenizer, prompt: np.ndarray) -> None:
        self.model, self.state, self.tokenizer = model, state, tokenizer
        self.tokens: list[int] = prompt.tolist()
        self.count, self.why_ended, self.slid = 0, "", 0
        self._cache = None if model.name == "mlp" or _is_dynamic(model) else KVCache()
        more = self._cache.overrides if self._cache else {}
        self.run = replace(run, overrides={**run.overrides, **more}).frozen()
        self._unread = self.tokens[-model.config["block_size"] :]

    def text(
        self, n: int, rng: np.random.Generator, choice: Choice = Choice(), stopping: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yield the text of at most n tokens, as soon as it is certain. `rng` gives one random number per token.

        It ends early if `stopping()`, called before each token, returns True, after a token at which texts end, or if the
        logits are not finite. Ids that the tokenizer lacks are never chosen.
        """
        stream = self.tokenizer.stream()
        for token in self.tokens:
            stream.add(token)
        stream.rest()  # the prompt is known; text that follows it may depend on it
        for _ in range(n):
            if stopping():
                break
            logits = self._logits()
            if not np.isfinite(logits.max()):  # some logits may be -Inf: a probability of 0
                self.why_ended = f"the logits are not finite after {self.count} {self.tokenizer.unit}s: nothing can be sampled"
                break
            token = choice.of(logits, rng.random())
            self.tokens.append(token)
            self._unread.append(token)
            self.count += 1
            if token in self.tokenizer.ends:
                self.why_ended = f"the text ended with token {token}, after which none follows"
                break
            yield stream.add(token)
        yield stream.rest()

    @np.errstate(over="ignore", under="ignore", invalid="ignore")
    @one_thread_per_product()
    def _logits(self) -> np.ndarray:
        """Return the logits of the next token, in FP64."""
        tokens, start = self._to_read()
        t = Tape(self.run, self.state.weight_views, self.model.tied, record=False)
        logits = self.model.logits(t, self.run.backend.from_host(np.array([tokens])), start).array
        last = logits.reshape(-1, logits.shape[-1])[-1, : self.tokenizer.vocab_size]
        values: np.ndarray = widen(self.run.backend.to_host(last), "fp64")
        return values

    def _to_read(self) -> tuple[list[int], int]:
        """Return the tokens to read before the next one, and the position of the first of them."""
        block, cache = self.model.config["block_size"], self._cache
        if cache is None:
            last = self.tokens[-block:]
            missing = block - len(last) if self.model.name == "mlp" else 0  # it needs a full block
            return [START[0]] * missing + last, 0
        if cache.length + len(self._unread) > block:
            cache.clear()
            self._unread = self.tokens[-max(1, block // 2) :]
            self.slid += 1
        tokens, self._unread = self._unread, []
        return tokens, cache.length


def _is_dynamic(model: Model) -> bool:
    """Return whether the model's frequencies depend on the length of the text, so that keys cannot be kept."""
    return str(model.config.get("rope_scaling", "")).startswith("dynamic")
