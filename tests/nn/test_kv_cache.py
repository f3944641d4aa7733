"""refimpl.nn.kv_cache: logits with a cache are those without one, to the bit where sums have one order, else to their bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from arrays import Array, rounded, wide
from bounds import Near, gelu_tanh_near, layernorm_near, near, possible, softmax_of, stored

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn import kv_cache
from refimpl.nn.autograd import Tape
from refimpl.nn.kv_cache import KVCache
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.nn.models.model import Model
from refimpl.nn.ops import OPS
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization import registry
from refimpl.numerics.quantization.fp8 import quantize_tensor
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.policy_variants import with_attention
from refimpl.precision.recipes import get_recipe

pytestmark = pytest.mark.usefixtures("one_blas_thread")
T = 7
"""Fewer than 8 keys: NumPy adds up to 7 numbers one after the other, so that hidden keys, which are 0, change no sum."""
GPT = gpt_model(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=40))
LLAMA = llama_model(
    LlamaConfig(
        n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, ffn_dim=64, block_size=T, vocab_size=40, qk_norm=True,
        qkv_bias=True,
    )
)  # fmt: skip
MODELS = {"gpt": GPT, "llama": LLAMA}
RECIPES = (
    "fp64", "fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "fp8-rows", "fp8-blocks", "mxfp8", "mxfp6", "mxfp4",
    "fp16-sums-64",
)  # fmt: skip


@dataclass(frozen=True)
class InOrder(Backend):
    """The definitions, with products whose sums have one order, whatever the number of rows."""

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        a, b = self.widen(a, acc), self.widen(b, acc)
        y = np.zeros((a[..., :1] * b[..., :1, :]).shape, a.dtype)  # in C order, as the BLAS writes it
        for k in range(a.shape[-1]):
            y += a[..., k : k + 1] * b[..., k : k + 1, :]
        return y


IN_ORDER = InOrder("reference", np, on_host=True)


def started(
    model: Model, recipe: str, backend: Backend, attention: str = "unfused", scale: float = 5
) -> tuple[dict[str, Array], Run]:
    """Weights large enough that tokens matter, and the run."""
    chosen = get_recipe(recipe)
    state = State(model, chosen.state_encodings(), backend)
    weights = model.initial_weights(np.random.default_rng(0))
    state.load_weights({name: w * (scale if w.ndim == 2 else 1) for name, w in weights.items()})
    state.weights_down()
    return dict(state.weight_views), Run(with_attention(chosen.policy, attention), backend)


TOKENS = np.random.default_rng(1).integers(0, 40, (2, T))


def whole(model: Model, weights: dict[str, Array], run: Run, n: int) -> Array:
    """The logits of one call for the first n tokens."""
    with np.errstate(all="ignore"):
        return model.logits(Tape(run.frozen(), weights, model.tied, record=False), TOKENS[:, :n]).array


def cached(model: Model, weights: dict[str, Array], run: Run, parts: list[int]) -> list[Array]:
    """The logits of several calls, each for so many tokens more."""
    cache, found = KVCache(), []
    run = replace(run, overrides=cache.overrides).frozen()
    for n in parts:
        at = cache.length
        t = Tape(run, weights, model.tied, record=False)
        with np.errstate(all="ignore"):
            found.append(model.logits(t, TOKENS[:, at : at + n], start=at).array)
        assert cache.length == at + n
    return found


def differing(model: Model, recipe: str, parts: list[int], backend: Backend = IN_ORDER, attention: str = "unfused") -> int:
    """How many logits have other bits in a call of `cached` than in the call for the whole text up to there."""
    weights, run = started(model, recipe, backend, attention)
    count, stop = 0, 0
    for logits in cached(model, weights, run, parts):
        stop += logits.shape[1]
        expected = whole(model, weights, run, stop)[:, stop - logits.shape[1] :]
        assert logits.dtype == expected.dtype and np.isfinite(wide(expected)).all() and np.ptp(wide(expected)) > 1
        count += int((logits != expected).sum())
    return count


PARTS = [2, 1, 3, 1]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_where_sums_have_one_order_the_bits_are_those_without_a_cache(model: str, recipe: str) -> None:
    assert differing(MODELS[model], recipe, PARTS) == 0


@pytest.mark.parametrize("attention", ["fused", "math"])
@pytest.mark.parametrize("model", MODELS)
def test_with_any_kind_of_attention(model: str, attention: str) -> None:
    assert differing(MODELS[model], "bf16", PARTS, attention=attention) == 0


@pytest.mark.parametrize("recipe", ["fp8", "fp8-delayed", "nvfp4"])
def test_only_the_scale_of_a_whole_tensor_is_another(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scale that does not depend on the other tokens, the bits are equal. Delayed scales are such."""
    assert (differing(GPT, recipe, PARTS) == 0) == (recipe == "fp8-delayed")

    def one_scale(fmt: str, x: Array, axis: int, place: Any) -> Any:
        """The scale of a tensor whose largest value is 64."""
        widest = np.concatenate([x, np.full((1, x.shape[1]), 64, x.dtype)])
        q = quantize_tensor(widest, fmt)
        return replace(q, codes=q.codes[:-1], block=tuple(max(1, n) for n in x.shape))

    if recipe == "fp8":
        monkeypatch.setattr(registry, "SCHEMES", {**registry.SCHEMES, "e4m3-tensor": lambda *a: one_scale("e4m3", *a)})
    if recipe == "nvfp4":
        monkeypatch.setattr("refimpl.numerics.quantization.nvfp4.encode_scale", lambda amax: np.asarray(np.float32(2)))
    assert differing(GPT, recipe, PARTS) == 0


def test_one_token_at_a_time_and_all_at_once() -> None:
    assert differing(GPT, "bf16", [1] * T) == differing(GPT, "bf16", [T]) == 0


def test_memory_grows_with_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "FIRST", 2)
    taken, enlarged = [], kv_cache._enlarged
    monkeypatch.setattr(kv_cache, "_enlarged", lambda kept, *more: (taken.append(more[0]), enlarged(kept, *more))[1])
    assert differing(GPT, "fp16", [1] * T) == 0
    assert taken == [2, 2, 3, 3, 5, 5]  # in two layers: 2 positions, then 4, then 8
    assert differing(LLAMA, "fp16", [1] * T) == differing(LLAMA, "fp16", [1, 5, 1]) == 0


def test_a_cleared_cache_begins_anew() -> None:
    weights, run = started(GPT, "bf16", IN_ORDER)
    cache = KVCache()
    run_of_cache = replace(run, overrides=cache.overrides).frozen()
    for _ in range(2):
        logits = GPT.logits(Tape(run_of_cache, weights, GPT.tied, record=False), TOKENS[:, :4]).array
        assert np.array_equal(logits, whole(GPT, weights, run, 4)) and cache.length == 4
        cache.clear()
        assert cache.length == 0


def test_the_comparison_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that loses the first position, one that is a position late, and keys in the place of values."""
    extended = KVCache._extended
    wrong = (
        lambda self, k, v, p: tuple(x[..., 1:, :] if x.shape[-2] > 3 else x for x in extended(self, k, v, p)),
        lambda self, k, v, p: tuple(np.roll(x, 1, -2) for x in extended(self, k, v, p)),
        lambda self, k, v, p: extended(self, k, v, p)[::-1],
    )
    for version in wrong:
        monkeypatch.setattr(KVCache, "_extended", version)
        assert differing(GPT, "bf16", PARTS) > 0 and differing(LLAMA, "bf16", PARTS) > 0
    monkeypatch.undo()
    weights, run = started(GPT, "bf16", IN_ORDER)
    cache = KVCache()
    run = replace(run, overrides=cache.overrides).frozen()
    GPT.logits(Tape(run, weights, GPT.tied, record=False), TOKENS[:, :4])
    late = GPT.logits(Tape(run, weights, GPT.tied, record=False), TOKENS[:, 4:5], start=5).array
    assert not np.array_equal(late, cached(GPT, weights, run, [4, 1])[1])


# ------------------------------------------------------------------------------------------------ sums in another order


class NearTape:
    """Calls the formulas of bounds.py in place of operations: each value comes with the bound of any order of its sums."""

    def __init__(self, model: Model, weights: dict[str, Array], fmt: str) -> None:
        self.model, self.weights, self.fmt, self.prefix = model, weights, fmt, ""
        self.run = SimpleNamespace(backend=REFERENCE)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        outer, self.prefix = self.prefix, f"{self.prefix}{name}."
        yield
        self.prefix = outer

    block = scope

    def parameter(self, name: str) -> Near:
        name = self.prefix + name
        return near(wide(self.weights[self.model.tied.get(name, name)]))

    def __call__(self, op: Any, name: str, *inputs: Any, **static: Any) -> Any:
        if op.name == "embedding":
            return near(self.parameter(f"{name}.weight").value[inputs[0]])
        if op.name == "linear":
            (x,), w = inputs, self.parameter(f"{name}.weight")
            y = x @ w.T
            return stored(y if name == "lm_head" else y + self.parameter(f"{name}.bias"), self.fmt)
        if op.name == "layernorm":
            zeros = near(np.zeros_like(inputs[0].value))
            return stored(layernorm_near(*inputs, *map(self.parameter, (f"{name}.weight", f"{name}.bias")), zeros)[0], self.fmt)
        if op.name == "gelu_tanh":
            return stored(gelu_tanh_near(*inputs, near(0.0))[0], self.fmt)
        if op.name == "attention":
            return self.attention(*inputs, **static)
        assert op.name == "add"
        return stored(inputs[0] + inputs[1], self.fmt)

    def attention(self, qkv: Near, n_head: int) -> Near:
        def heads(a: Array) -> Array:
            B, n, C3 = a.shape
            return a.reshape(B, n, 3, n_head, C3 // 3 // n_head).transpose(2, 0, 3, 1, 4)

        def merged(a: Array) -> Array:
            return a.transpose(0, 2, 1, 3).reshape(a.shape[0], a.shape[2], -1)

        q, k, v = (Near(x, e) for x, e in zip(heads(qkv.value), heads(np.zeros_like(qkv.value) + qkv.err), strict=True))
        n, fmt = q.value.shape[-2], self.fmt
        S = stored(stored(q @ k.T, fmt) * (near(1 / math.sqrt(q.value.shape[-1])) * 1), fmt)
        P = stored(softmax_of(S.where(np.tril(np.ones((n, n), bool)), -1e9)), fmt)
        O = stored(P @ v, fmt)  # noqa: E741
        return Near(merged(O.value), merged(O.err))


BACKENDS = pytest.mark.parametrize("backend", [REFERENCE, NUMPY], ids=lambda b: b.name)
SHALLOW = gpt_model(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=40))


@BACKENDS
@pytest.mark.parametrize(("recipe", "spread"), [("fp32", 0.1), ("fp16", 1.0)])
def test_whatever_the_order_of_sums_both_are_possible_logits(recipe: str, spread: float, backend: Backend) -> None:
    """Running error analysis from the embedding to the logits of one layer. So the two differ by no more than twice its bound.

    spread: the mean bound in standard deviations of the logits, so that a wrong position would be seen. (The true difference
    in FP32 is below 1e-6 of one: errors of products do not add up as they do in the bound.)
    """
    weights, run = started(SHALLOW, recipe, backend, scale=1)
    exact = SHALLOW.logits(NearTape(SHALLOW, weights, recipe), TOKENS)  # type: ignore[arg-type]
    least, greatest = possible(exact, recipe)

    def inside(logits: Array) -> bool:
        x = wide(logits)
        return bool(((least <= x) & (x <= greatest) & (rounded(x, recipe) == x)).all())

    assert inside(whole(SHALLOW, weights, run, T)) and (greatest - least).mean() < spread * exact.value.std()
    for parts in ([1] * T, PARTS, [T]):
        logits = np.concatenate(cached(SHALLOW, weights, run, parts), axis=1)
        assert inside(logits) and not inside(np.roll(logits, 1, axis=1))


@BACKENDS
@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
def test_whatever_the_order_of_sums_attention_gives_a_possible_result(fmt: str, backend: Backend) -> None:
    """With more keys than the fast version takes at a time, from the same q, k and v."""
    qkv, n_head = cast(np.random.default_rng(2).normal(size=(1, 70, 3 * 12)), fmt), 2
    exact = NearTape(GPT, {}, fmt).attention(near(wide(qkv)), n_head)
    least, greatest = possible(exact, fmt)
    run, cache = Run(get_recipe(fmt).policy, backend), KVCache()
    p = run.precision("attention", "here")
    O = run.version(OPS["attention"]).forward(qkv, p=p, n_head=n_head)[0]  # noqa: E741
    sizes = [60, 1, 1, 6, 1, 1]
    parts = np.split(qkv, np.cumsum(sizes)[:-1], axis=1)
    kept = np.concatenate([cache.overrides["attention"].forward(part, p=p, n_head=n_head)[0] for part in parts], axis=1)
    for x in (wide(O), wide(kept)):
        assert ((least <= x) & (x <= greatest) & (rounded(x, fmt) == x)).all()
    spread = exact.value.std() * {"fp32": 1e-4, "fp16": 2.0**-9, "bf16": 2.0**-6}[fmt]
    assert (greatest - least).mean() < spread


def test_the_formats_of_the_cache_are_those_of_keys_and_values() -> None:
    for recipe, fmt in (("fp32", "fp32"), ("bf16", "bf16"), ("amp-fp16", "fp16")):
        weights, run = started(GPT, recipe, NUMPY)
        cache = KVCache()
        GPT.logits(Tape(replace(run, overrides=cache.overrides), weights, GPT.tied, record=False), TOKENS[:, :3])
        assert {kept.k.dtype for kept in cache.places.values()} == {FORMATS[fmt].dtype}
        assert [*cache.places] == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_a_cache_is_for_inference() -> None:
    weights, run = started(GPT, "fp32", NUMPY)
    tape = Tape(replace(run, overrides=KVCache().overrides), weights, GPT.tied)
    loss = GPT.loss(tape, TOKENS[:, :4], TOKENS[:, 1:5])
    with pytest.raises(TypeError, match="this operation has no backward"):
        tape.backward(loss, np.ones((), np.float32), lambda name, gradient: None)

