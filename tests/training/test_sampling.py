"""refimpl.training.sampling: which token is chosen, and what a writer reads before each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import Model
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.training.sampling import Choice, Writer
from refimpl.training.tokenizer import BYTES

pytestmark = pytest.mark.usefixtures("one_blas_thread")

# --------------------------------------------------------------------------------------------------------------- choice


def test_the_most_likely_tokens_of_a_probability_are_chosen() -> None:
    p = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    logits, u = np.log(p), (np.arange(2000) + 0.5) / 2000

    def shares(choice: Choice) -> list[float]:
        return (np.bincount([choice.of(logits, x) for x in u], minlength=5) / len(u)).tolist()

    assert shares(Choice(1.0)) == pytest.approx(p, abs=1e-3)
    assert shares(Choice(1.0, 0.69)) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=1e-3)  # 0.4 + 0.3 reach it
    assert shares(Choice(1.0, 0.71)) == pytest.approx([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], abs=1e-3)
    assert shares(Choice(1.0, 0.1)) == shares(Choice(0.0)) == [0, 1, 0, 0, 0]
    assert shares(Choice(0.5)) == pytest.approx(p**2 / (p**2).sum(), abs=1e-3)
    assert shares(Choice(1e-300)) == [0, 1, 0, 0, 0]
    ties = Choice(1.0, 0.5)
    assert {ties.of(np.zeros(4), x) for x in u} == {0, 1}  # of equal ones, the first
    assert Choice(1.0).of(np.array([0.0, -np.inf]), np.nextafter(1, 0)) == 0


def test_top_p_keeps_the_tokens_that_transformers_keeps() -> None:
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers").generation.logits_process
    u = (np.arange(2000) + 0.5) / 2000
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits, top_p = rng.normal(size=12), float(rng.uniform(0.05, 0.98))
        kept = logits_process.TopPLogitsWarper(top_p)(None, torch.tensor(logits)[None])[0]
        chosen = {Choice(1.0, top_p).of(logits, x) for x in u}
        likely = {i for i in torch.where(torch.isfinite(kept))[0].tolist() if torch.softmax(kept, 0)[i] > 1 / 1000}
        assert likely <= chosen <= set(torch.where(torch.isfinite(kept))[0].tolist())


@pytest.mark.parametrize(
    ("choice", "message"),
    [((-1.0, 1.0), "--temperature is -1.0"), ((math.nan, 1.0), "--temperature is nan"), ((1.0, 0.0), "--top-p is 0.0"),
     ((1.0, 1.01), "--top-p is 1.01"), ((math.inf, 1.0), "--temperature is inf"), ((1.0, math.nan), "--top-p is nan")],
)  # fmt: skip
def test_choices_that_cannot_be_are_refused(choice: tuple[float, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Choice(*choice)


# --------------------------------------------------------------------------------------------------------------- writer


def gpt(block_size: int) -> Model:
    return gpt_model(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=block_size))


def llama(block_size: int, **settings: Any) -> Model:
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "head_dim": 8, "ffn_dim": 32}
    return llama_model(LlamaConfig(**sizes, block_size=block_size, **settings))


def mlp(block_size: int) -> Model:
    return mlp_model(MLPConfig(n_layer=1, n_embd=8, block_size=block_size))


def started(model: Model) -> tuple[State, Run]:
    """FP64, in which another order of sums does not make another choice; weights large enough that tokens matter."""
    recipe = get_recipe("fp64")
    state = State(model, recipe.state_encodings(), NUMPY)
    weights = model.initial_weights(np.random.default_rng(0))
    state.load_weights({name: w * (5 if w.ndim == 2 else 1) for name, w in weights.items()})
    state.weights_down()
    return state, Run(recipe.policy, NUMPY)


def logits_after(model: Model, state: State, run: Run, window: list[int]) -> np.ndarray:
    """The logits after a window, in one call."""
    if model.name == "mlp":
        window = [10] * (model.config["block_size"] - len(window)) + window
    logits = model.logits(Tape(run.frozen(), state.weight_views, model.tied, record=False), np.array([window])).array
    return logits.reshape(-1, 256)[-1]


def expected(model: Model, prompt: list[int], n: int) -> list[int]:
    """n bytes, each from all that the model may read: halved when it is full, or the last ones where nothing is kept."""
    (state, run), block, rng = started(model), model.config["block_size"], np.random.default_rng(0)
    keeps = model.name != "mlp" and "dynamic" not in model.config.get("rope_scaling", "")
    tokens, window = [*prompt], prompt[-block:]
    for _ in range(n):
        tokens.append(Choice(1.0).of(logits_after(model, state, run, window), rng.random()))
        window = [*window, tokens[-1]]
        if len(window) > block:
            window = tokens[-max(1, block // 2) :] if keeps else tokens[-block:]
    return tokens[len(prompt) :]


DYNAMIC = llama(8, rope_scaling="dynamic,factor=4.0,original=4")
CASES = {
    "gpt": gpt(8), "gpt of one position": gpt(1), "gpt of three": gpt(3), "llama": llama(8), "mlp": mlp(8), "dynamic": DYNAMIC,
}  # fmt: skip


@pytest.mark.parametrize("prompt", [b"a", b"a prompt", b"a longer prompt"], ids=len)
@pytest.mark.parametrize("name", CASES)
def test_the_text_is_that_of_one_call_per_token(name: str, prompt: bytes) -> None:
    model = CASES[name]
    writer = Writer(model, *started(model), BYTES, np.frombuffer(prompt, np.uint8))
    list(writer.text(20, np.random.default_rng(0), Choice(1.0)))
    assert writer.tokens == [*prompt, *expected(model, [*prompt], 20)]
    assert len(set(writer.tokens[len(prompt) :])) > 5 and writer.count == 20 and writer.why_ended == ""


def test_dynamic_frequencies_would_make_old_keys_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the cache that other models have, the text is another."""
    monkeypatch.setattr("refimpl.training.sampling._is_dynamic", lambda model: False)
    with pytest.raises(AssertionError):
        test_the_text_is_that_of_one_call_per_token("dynamic", b"a")


def test_each_token_is_read_once_until_the_model_is_full() -> None:
    model, read = gpt(8), []

    def logits(t: Tape, tokens: np.ndarray, start: int) -> Any:
        read.append((start, tokens.shape[1]))
        return model.logits(t, tokens, start)

    writer = Writer(replace(model, logits=logits), *started(model), BYTES, np.frombuffer(b"abcd", np.uint8))
    list(writer.text(10, np.random.default_rng(0)))
    assert read == [(0, 4), (4, 1), (5, 1), (6, 1), (7, 1), (0, 4), (4, 1), (5, 1), (6, 1), (7, 1)]
    assert writer.slid == 1


@pytest.mark.parametrize("make", [gpt, llama])
def test_on_a_device_the_text_is_the_same(make: Any, backend: Backend) -> None:
    """Its arrays are not NumPy's; its sums have the order of the definitions on the host."""
    model, recipe, texts = make(8), get_recipe("bf16"), []
    for where in (REFERENCE, backend):
        state = State(model, recipe.state_encodings(), where)
        state.load_weights({name: 3 * w for name, w in model.initial_weights(np.random.default_rng(0)).items()})
        state.weights_down()
        writer = Writer(model, state, Run(recipe.policy, where), BYTES, np.frombuffer(b"ab", np.uint8))
        list(writer.text(20, np.random.default_rng(0)))
        texts.append(writer.tokens)
    assert texts[0] == texts[1] and len(set(texts[0])) > 5


def test_a_writer_goes_on_where_it_stopped() -> None:
    whole, parts = (Writer(gpt(8), *started(gpt(8)), BYTES, np.frombuffer(b"ab", np.uint8)) for _ in range(2))
    text = "".join(whole.text(30, np.random.default_rng(0)))
    rng = np.random.default_rng(0)
    list(parts.text(13, rng))
    list(parts.text(17, rng))
    assert parts.tokens == whole.tokens and len(text) >= 30


def test_logits_that_are_not_finite_end_the_text() -> None:
    model = gpt(8)
    state, run = started(model)
    state.weight_views["transformer.ln_f.bias"][:] = np.nan
    writer = Writer(model, state, run, BYTES, np.frombuffer(b"ab", np.uint8))
    assert "".join(writer.text(5, np.random.default_rng(0))) == ""
    assert writer.why_ended == "the logits are not finite after 0 bytes: nothing can be sampled"
