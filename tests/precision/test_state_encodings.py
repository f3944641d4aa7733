"""precision.state_encodings: a value read is what the encoding's definition says, and trainings that differ only in how
states are kept differ only by that.

Definitions are restated here. Codes and scales that torchao 0.18 made stand here as literals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from arrays import U
from fake_blas import FakeBlas
from hand_training import Training

import refimpl.backends.numpy.backend
import refimpl.optim.layout
import refimpl.precision.state_encodings
from refimpl.backends.numpy.backend import NUMPY
from refimpl.backends.numpy.threads import Workers
from refimpl.errors import UsageError
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import Model, Parameter
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.compensated import kahan_update, merge, split
from refimpl.numerics.formats import dtype_of
from refimpl.numerics.philox import FIRST_OF_TENSORS, STREAMS, random_bits
from refimpl.numerics.stochastic_rounding import stochastic_round
from refimpl.optim.adamw import AdamW
from refimpl.optim.gradients import check_and_measure
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.recipes import RECIPES, STATE_KINDS
from refimpl.precision.state_encodings import (
    ENCODINGS,
    MAIN,
    Blockwise,
    BufferSpec,
    FP32Embeddings,
    Kahan,
    Plain,
    RandomKey,
    Remainder,
    Stochastic,
    buffers_of,
    dynamic_codebook,
    get_encoding,
    nearest,
)
from refimpl.step import StepResult
from refimpl.training.config import Config

Array = Any
"""The largest relative error of one FP32 rounding."""
SIZE = 1000  # three blocks of 256 and a part of one
STEP = np.float32(6e-4)
ONE = np.float32(1)


def parts_of(encoding: str, n: int = SIZE) -> dict[str, Array]:
    """Empty parts for n values."""
    return {name: np.zeros(part.size(n), part.dtype) for name, part in get_encoding(encoding).parts.items()}


def values(n: int = SIZE, seed: int = 0) -> Array:
    """FP32 numbers of many sizes and both signs."""
    rng = np.random.default_rng(seed)
    return cast(rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 1, n), "fp32")


def rounded_trip(encoding: str, x: Array, key: RandomKey = RandomKey(0, np.int64(0), 0)) -> Array:  # noqa: B008 (nothing changes it)
    """What is read after `x` was written."""
    parts = parts_of(encoding, x.size)
    get_encoding(encoding).write(parts, x, key)
    return get_encoding(encoding).read(parts, "fp32")


def toy(n: int = SIZE) -> Model:
    """A model that is only a vector of n parameters: it does not decay."""
    return Model("toy", {}, {"w": Parameter((n,), std=1.0)}, {}, None, None)


def updated(weights: str, w: Array, gradients: list[Array], seed: int = 0, lr: float = 1.0, **moments: str) -> State:
    """A state whose weights have this encoding after an update by each of the gradients, FP32: SGD, or AdamW with moments."""
    state = State(toy(w.size), {"weights": weights, "grads": "fp32", **moments}, NUMPY, seed)
    state.load_weights({"w": w})
    rule = AdamW() if moments else SGD(momentum=0.0)
    optimizer = Optimizer(rule, Schedule(lr, lr, 0, len(gradients)))
    for g in gradients:
        state.grads[...] = g
        optimizer.update(state, ONE, 1.0, np.False_)
    return state


def test_get_encoding_finds_by_name_and_lists_all() -> None:
    assert get_encoding("bf16-kahan") is ENCODINGS["bf16-kahan"]
    with pytest.raises(UsageError, match="unknown state encoding 'int4'") as caught:
        get_encoding("int4")
    assert all(name in str(caught.value) for name in ENCODINGS)


def test_buffers_are_named_by_kind_and_part() -> None:
    buffers = buffers_of({"weights": "bf16-kahan", "grads": "bf16", "m": "int8-signed", "v": "e4m3-blocks"})
    assert list(buffers) == ["weights", "weights_compensation", "grads", "m", "m_scales", "v", "v_scales"]
    assert [buffers[name].size(257) for name in buffers] == [257, 257, 257, 257, 2, 257, 2]


def test_a_block_takes_the_scales_that_are_its_own() -> None:
    scales = BufferSpec(np.dtype(np.float32), 256)
    assert scales.slice(slice(0, 256)) == slice(0, 1) and scales.slice(slice(512, 1000)) == slice(2, 4)
    assert BufferSpec(np.dtype(np.uint8)).slice(slice(7, 9)) == slice(7, 9)
    with pytest.raises(ValueError, match="starts at 7, within 256"):
        scales.slice(slice(7, 300))


# --------------------------------------------------------------------------------------------------------- plain numbers


@pytest.mark.parametrize("fmt", ["fp64", "fp32", "fp16", "bf16"])
def test_plain_is_a_cast(fmt: str) -> None:
    encoding, x, parts = get_encoding(fmt), values(), parts_of(fmt)
    assert type(encoding) is Plain
    for write in (lambda: encoding.write(parts, x, RandomKey(1, np.int64(2), 3)), lambda: encoding.start(parts, x)):
        parts[MAIN][...] = 0
        write()
        assert parts[MAIN].tobytes() == cast(x, fmt).tobytes()
    assert encoding.values(parts) is parts[MAIN]
    wide = "fp64" if fmt == "fp64" else "fp32"
    assert encoding.read(parts, wide).tobytes() == widen(cast(x, fmt), wide).tobytes()


# ---------------------------------------------------------------------------------------------------- stochastic rounding


def test_stochastic_is_stochastic_round_by_seed_update_and_index() -> None:
    x, encoding = values(), get_encoding("bf16-stochastic")
    for seed, t, start in ((0, 0, 0), (5, 7, 256), (1 << 40, 3, 123)):
        expected = stochastic_round(x, "bf16", random_bits(seed, t, start, SIZE))
        assert rounded_trip("bf16-stochastic", x, RandomKey(seed, np.int64(t), start)).tobytes() == widen(expected).tobytes()
    parts = parts_of("bf16-stochastic")
    encoding.start(parts, x)  # nothing is left to chance before training
    assert parts[MAIN].tobytes() == cast(x, "bf16").tobytes()


@pytest.mark.parametrize("other", [RandomKey(1, np.int64(0), 0), RandomKey(0, np.int64(1), 0), RandomKey(0, np.int64(0), 4)])
def test_another_seed_update_or_index_makes_other_bits(other: RandomKey) -> None:
    """Negative control of the above: nearly all values lie between two of BF16, and half of their draws fall the other way."""
    x = cast(np.full(SIZE, 1 + 2.0**-8), "fp32")  # half way
    differ = (rounded_trip("bf16-stochastic", x) != rounded_trip("bf16-stochastic", x, other)).mean()
    assert abs(differ - 0.5) < 4 * 0.5 / math.sqrt(SIZE)


def test_no_two_kinds_of_state_draw_the_same_bits() -> None:
    """All kept by chance, half way between two values of BF16, in one update: each falls as no other does."""
    kinds = [kind for kind in STATE_KINDS if kind != "grads"]
    state = State(toy(), {**dict.fromkeys(kinds, "bf16-stochastic"), "grads": "fp32"}, NUMPY)
    x = cast(np.full(SIZE, 1 + 2.0**-8), "fp32")
    for kind in kinds:
        state.write(kind, slice(0, SIZE), state.parts(kind, slice(0, SIZE)), x)
    assert len({state.buffers[kind].tobytes() for kind in kinds}) == len(kinds)
    assert set(STATE_KINDS) < set(STREAMS) and len(set(STREAMS.values())) == len(STREAMS) <= FIRST_OF_TENSORS


SMALL = ("fp32", "bf16", "bf16-stochastic", "bf16-kahan", "bf16-remainder")
MOMENTS = {"plain": ("fp32", "fp32"), "int8": ("int8-signed", "int8-unsigned"), "fp8": ("e4m3-blocks", "e4m3-blocks")}


def trained(weights: str, moments: str, seed: int = 0) -> dict[str, bytes]:
    m, v = MOMENTS[moments]
    gradients = [values(SIZE, i) for i in range(1, 4)]
    state = updated(weights, values(), gradients, seed, 1e-3, m=m, v=v)
    return {name: buffer.tobytes() for name, buffer in state.buffers.items()}


@pytest.mark.parametrize("weights", SMALL)
@pytest.mark.parametrize("moments", MOMENTS)
def test_results_depend_on_neither_blocks_nor_threads(weights: str, moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the cache's size, of any size where no scale is shared, and shared among threads."""
    whole = trained(weights, moments)
    for block in (7, 300, 256, 512):
        monkeypatch.setattr(refimpl.optim.layout, "BLOCK", block)
        if moments == "plain" or block % 256 == 0:
            assert trained(weights, moments) == whole, block
        else:
            with pytest.raises(ValueError, match="values that share an element"):
                trained(weights, moments)
    monkeypatch.setattr(refimpl.backends.numpy.backend, "SHARED", 0)
    for threads in (1, 3):
        others = Workers(FakeBlas(threads))
        monkeypatch.setattr(refimpl.backends.numpy.backend, "workers", lambda others=others: others)
        assert trained(weights, moments) == whole


def test_only_chance_depends_on_the_seed() -> None:
    for weights in SMALL:
        assert (trained(weights, "int8") != trained(weights, "int8", seed=1)) == (weights == "bf16-stochastic")


def hundred_updates(weights: str, n: int = 1) -> State:
    """1 - 100 x 6e-4: what is the sum of updates of which each is less than half an ulp of BF16?"""
    return updated(weights, np.ones(n, np.float32), [np.ones(n, np.float32)] * 100, lr=6e-4)


def check_mean_and_spread(n: int = 1 << 14) -> None:
    """The mean is the exact sum; each update is a draw between 0 and 2^-8 with p = 6e-4 / 2^-8, of which 100 have a spread of
    10 2^-8 sqrt(p (1 - p)) = 0.0141: those of different updates are independent of one another.

    The standard error of the mean is that by sqrt(n), that of the spread nearly that by sqrt(2 n).
    """
    w = widen(hundred_updates("bf16-stochastic", n).weights, "fp64")
    p = float(STEP) * 2**8
    spread = 10 * 2.0**-8 * math.sqrt(p * (1 - p))
    assert abs(w.mean() - (1 - 100 * float(STEP))) < 4 * spread / math.sqrt(n)
    assert abs(w.std() - spread) < 4 * spread / math.sqrt(2 * n)


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    check_mean_and_spread()


def test_draws_that_do_not_go_on_with_the_updates_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in each update: a weight moves always or never. The mean hides it, the spread is ten times as large."""
    write = Stochastic.write

    def standing(self: Stochastic, parts: Any, x: Array, key: RandomKey) -> None:
        write(self, parts, x, replace(key, t=np.int64(0)))

    monkeypatch.setattr(Stochastic, "write", standing)
    with pytest.raises(AssertionError):
        check_mean_and_spread()


def test_nearest_rounding_stands_still() -> None:
    assert float(hundred_updates("bf16").weights[0]) == 1.0


# -------------------------------------------------------------------------------------------------------------- Kahan's sum


def check_kahan_keeps_the_sum() -> None:
    """w + c is .93992 (algorithms.md, 9.6), where w alone would have stood still."""
    state = hundred_updates("bf16-kahan")
    total = widen(state.weights, "fp64") + widen(state.buffers["weights_compensation"], "fp64")
    assert round(float(total[0]), 5) == 0.93992


def test_kahan_keeps_the_sum_of_small_updates() -> None:
    check_kahan_keeps_the_sum()


def test_kahan_without_its_compensation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        refimpl.precision.state_encodings, "kahan_update", lambda w, c, step: (kahan_update(w, c, step)[0], c * 0)
    )
    with pytest.raises(AssertionError):
        check_kahan_keeps_the_sum()


def test_kahan_is_kahan_update_step_by_step() -> None:
    x, gradients = values(), [values(SIZE, i) for i in range(1, 20)]
    state = updated("bf16-kahan", x, gradients, lr=1e-3)
    w, c = cast(x, "bf16"), cast(np.zeros(SIZE), "bf16")
    for g in gradients:
        w, c = kahan_update(w, c, -(g * np.float32(1e-3)))
    assert state.weights.tobytes() == w.tobytes() and state.buffers["weights_compensation"].tobytes() == c.tobytes()
    assert np.count_nonzero(widen(c)) > 0.9 * SIZE
    assert state.values("weights") is not state.master and (state.values("weights") == state.master).all()


def test_weight_decay_is_not_compensated() -> None:
    """A decay of 1e-5 is less than half an ulp of BF16: it is lost from w and not found in c."""
    model = Model("toy", {}, {"w": Parameter((4, 4), std=1.0)}, {}, None, None)
    state = State(model, {"weights": "bf16-kahan", "grads": "fp32"}, NUMPY)
    state.load_weights({"w": np.ones((4, 4), np.float32)})
    optimizer = Optimizer(SGD(momentum=0.0, weight_decay=1e-2), Schedule(1e-3, 1e-3, 0, 10))
    for _ in range(10):
        optimizer.update(state, ONE, 1.0, np.False_)
    assert (widen(state.weights) == 1).all() and not widen(state.buffers["weights_compensation"]).any()


# ----------------------------------------------------------------------------------------------------------- the remainder


def test_a_remainder_gives_every_master_back() -> None:
    x = values()
    parts, encoding = parts_of("bf16-remainder"), get_encoding("bf16-remainder")
    encoding.write(parts, x, RandomKey(0, np.int64(0), 0))
    w, r = split(x)
    assert parts[MAIN].tobytes() == w.tobytes() and parts["remainder"].tobytes() == r.tobytes()
    assert encoding.read(parts, "fp32").tobytes() == encoding.values(parts).tobytes() == x.tobytes()
    assert isinstance(encoding, Remainder) and merge(w, r).tobytes() == x.tobytes()


def at_a_tie(master: Array) -> Array:
    """Where the BF16 weight is not the one that `cast` makes: half way, above an even one."""
    return (bits_of(master) & 0x1FFFF) == 0x8000


def test_with_equal_gradients_the_master_is_that_of_bf16() -> None:
    """To the bit, in every update: the update reads masters, moments and gradients, never the weights."""
    x, gradients = values(), [values(SIZE, i) for i in range(1, 20)]
    x[:100] = from_bits(bits_of(x[:100]) & 0xFFFE0000 | 0x8000, "fp32")  # ties, some of which the first gradients leave alone
    for g in gradients:
        g[:50] = 0
    moments = {"m": "fp32", "v": "fp32"}
    ours = updated("bf16-remainder", x, gradients, lr=1e-3, **moments)
    theirs = updated("bf16", x, gradients, lr=1e-3, master="fp32", **moments)
    theirs.weights_down()
    assert ours.values("weights").tobytes() == theirs.master.tobytes()
    differ = bits_of(ours.weights) != bits_of(theirs.weights)
    assert differ[:50].all() and np.array_equal(differ, at_a_tie(theirs.master))
    assert np.array_equal(bits_of(ours.weights)[differ], bits_of(theirs.weights)[differ] + 1)  # away from zero
    assert ours.nbytes == 16 * SIZE and theirs.nbytes == 18 * SIZE  # here gradients are FP32


# ------------------------------------------------------------------------------------------------------------ 8-bit blocks

BLOCKWISE = {"int8-signed": True, "int8-unsigned": False}


def middles(signed: bool) -> list[Fraction]:
    """The dynamic map once more, in fractions: in the decade from 10^(i-7) there are 2^i middles, or twice as many."""
    found = [Fraction(0), Fraction(1)]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        for j in range(count):
            middle = (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * count)) * Fraction(10) ** (i - 6)
            found += [middle, -middle] if signed else [middle]
    return sorted(found)


@pytest.mark.parametrize("signed", [True, False])
def test_the_codebook(signed: bool) -> None:
    """The numbers of the fractions, each to the nearest FP32: double precision is off by less than 2^-50 before."""
    book, exact = dynamic_codebook(signed), middles(signed)
    assert book.dtype == np.float32 and len(book) == len(exact) == 256
    assert (np.diff(book) > 0).all() and len(set(book.tolist())) == 256
    for entry, fraction in zip(book.tolist(), exact, strict=True):
        assert abs(Fraction(entry) - fraction) <= abs(fraction) * Fraction(U) * (1 + Fraction(1, 2**20))


def test_facts_of_the_codebooks() -> None:
    """With signs there is no -1. And some of torchao's create_dynamic_map, formed in FP32: 2 ulps at most away."""
    signed, unsigned = dynamic_codebook(True), dynamic_codebook(False)
    assert (signed[127], signed[255], unsigned[0], unsigned[255]) == (0, 1, 0, 1)
    theirs = [-0.992968738079071, -0.9789062738418579, 5.500000384017767e-07, 0.992968738079071]
    ours = [*signed[[0, 1, 128, 254]].tolist(), *unsigned[[1, 254]].tolist()]
    for a, b in zip(ours, [*theirs, 3.2500003044333425e-07, 0.9964843988418579], strict=True):
        assert abs(a - b) <= 2 * np.spacing(np.float32(abs(b)))


X = np.float32(0.37) * np.array(
    [0.0, 1e-9, 3e-7, -1e-6, 2e-5, -3e-4, 0.004, -0.05, 0.3, -0.7, 0.99, -1.0, 1.0, -0.9929, 0.5, -0.001], np.float32
)
TORCHAO = {
    "int8-signed": ([127, 127, 128, 126, 131, 118, 148, 81, 205, 21, 254, 0, 255, 0, 219, 112], "0x1.7ae1480000000p-2"),
    "int8-unsigned": ([0, 0, 1, 2, 7, 18, 41, 91, 155, 212, 253, 255, 255, 253, 183, 30], "0x1.7ae1480000000p-2"),
    "e4m3-blocks": ([0, 0, 0, 128, 5, 161, 62, 219, 112, 250, 126, 254, 126, 254, 118, 174], "0x1.b101760000000p-11"),
}
"""Codes and scale of a block of X and 240 zeros: scale_tensor and quantize_8bit_with_qmap, quantize_fp8."""


@pytest.mark.parametrize("encoding", TORCHAO)
def test_codes_and_scales_are_torchaos(encoding: str) -> None:
    codes, scale = TORCHAO[encoding]
    x = np.zeros(256, np.float32)
    x[:16] = abs(X) if encoding == "int8-unsigned" else X
    parts = parts_of(encoding, 256)
    get_encoding(encoding).write(parts, x, RandomKey(0, np.int64(0), 0))
    zero = 127 if encoding == "int8-signed" else 0
    assert parts[MAIN].dtype == np.uint8 and parts[MAIN].tolist() == [*codes, *[zero] * 240]
    assert [float(s).hex() for s in parts["scales"]] == [scale]


def test_the_nearest_entry_is_taken() -> None:
    """And of two equally near ones the lower."""
    for signed in (True, False):
        book = dynamic_codebook(signed)
        x = cast(np.random.default_rng(1).uniform(-1 if signed else 0, 1, 4000), "fp32")
        distance = abs(widen(x, "fp64")[:, None] - widen(book, "fp64"))
        chosen = np.take_along_axis(distance, np.asarray(nearest(book, x), np.int64)[:, None], 1)[:, 0]
        assert (chosen <= distance.min(1) + U).all()  # the middle between two entries is rounded to FP32
    book, x = np.array([0, 1, 2, 4], np.float32), np.array([0.5, 1.5, 3, 3.1, np.nan], np.float32)
    assert nearest(book, x).tolist() == [0, 1, 2, 3, 3]


def errors_within(encoding: str, x: Array) -> Array:
    """The bound for each value: half the gap between the numbers that 8 bits have there, times the scale, and roundings.

    A value is divided by its scale, and a code multiplied by it: 2 roundings of at most U each, with one more for the middle
    between two codes and one for the scale itself. All are of numbers up to the largest of the block.
    """
    largest = np.array([abs(x[i : i + 256]).max() for i in range(0, len(x), 256)]).repeat(256)[: len(x)]
    if encoding == "e4m3-blocks":
        scaled = abs(widen(x, "fp64")) / largest * 448
        half = np.maximum(2.0 ** np.floor(np.log2(np.maximum(scaled, 2.0**-30))) * 2.0**-4, 2.0**-10) / 448
    else:
        book = widen(dynamic_codebook(BLOCKWISE[encoding]), "fp64")
        gaps = np.diff(book)
        position = np.searchsorted(book, widen(x, "fp64") / largest).clip(1, 255) - 1  # below -.99: as far as the first gap
        half = gaps[position] / 2
    return largest * (half + 4 * U)


def check_errors(encoding: str) -> None:
    x = values()
    x[256:512] *= 1e-5  # a block of small values has a scale of its own
    x = abs(x) if encoding == "int8-unsigned" else x
    wrong = abs(widen(rounded_trip(encoding, x), "fp64") - widen(x, "fp64"))
    assert (wrong <= errors_within(encoding, x)).all()
    assert (wrong > errors_within(encoding, x) / 2).mean() > 0.1  # the bound is not far off


@pytest.mark.parametrize("encoding", TORCHAO)
def test_each_value_is_wrong_by_half_a_gap_at_most(encoding: str) -> None:
    check_errors(encoding)


@pytest.mark.parametrize("encoding", TORCHAO)
def test_scales_of_the_wrong_blocks_are_found(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Blockwise.read

    def shifted(self: Blockwise, parts: Any, fmt: str) -> Array:
        return read(self, {**parts, "scales": np.roll(parts["scales"], 1)}, fmt)

    monkeypatch.setattr(Blockwise, "read", shifted)
    with pytest.raises(AssertionError):
        check_errors(encoding)


@pytest.mark.parametrize("encoding", TORCHAO)
def test_blocks_of_zeros_of_tiny_values_and_of_part_of_256(encoding: str) -> None:
    """Zeros stay zeros, those of a fresh state too. A scale is at least 1e-12 by the largest code."""
    x = np.zeros(600, np.float32)
    x[256:512], x[512:] = 1e-14, np.linspace(0, 3, 88)
    parts, row = parts_of(encoding, 600), get_encoding(encoding)
    assert not row.read(parts, "fp32").any()
    row.write(parts, x, RandomKey(0, np.int64(0), 0))
    largest = 448 if encoding == "e4m3-blocks" else 1
    least = np.float32(1e-12) / np.float32(largest)
    assert parts["scales"].tolist() == [least, least, np.float32(3) / np.float32(largest)]
    back = row.read(parts, "fp32")
    assert not back[:256].any() and back[-1] == pytest.approx(3, rel=2 * U) and back.size == 600
    assert (abs(back[256:512] - x[256:512]) <= 1e-12).all()


@pytest.mark.parametrize("encoding", TORCHAO)
def test_a_block_is_kept_whatever_its_neighbors_are(encoding: str) -> None:
    x = abs(values())
    parts, alone = parts_of(encoding), parts_of(encoding, 256)
    get_encoding(encoding).write(parts, x, RandomKey(0, np.int64(0), 0))
    get_encoding(encoding).write(alone, x[256:512], RandomKey(0, np.int64(0), 0))
    assert parts[MAIN][256:512].tobytes() == alone[MAIN].tobytes() and parts["scales"][1] == alone["scales"][0]


# ----------------------------------------------------------------------------------------------------- trainings that agree

TINY = mlp_model(MLPConfig(n_layer=1, n_embd=8, block_size=8, vocab_size=17))


class Numbered(Training):
    """A training of a tiny model on batches that the number of the step alone decides."""

    def __init__(self, recipe: str, rounded: bool = False, grad_accum: int = 1, loss_scale: str | None = None) -> None:
        super().__init__(NUMPY, TINY, recipe, grad_accum, steps=40, loss_scale=loss_scale, rounded=rounded)
        self.grad_accum, self.steps = grad_accum, 0

    def next(self) -> StepResult:
        texts = np.random.default_rng(self.steps).integers(0, 17, (self.grad_accum, 4, 9))
        self.steps += 1
        return self.step(*((text[:, :-1], text[:, 1:]) for text in texts), max_norm=0.5)


PAIRS = [("apex-o2", "fp16", ("grads", "main_grads")), ("megatron-bf16", "bf16", ("grads",))]


@pytest.mark.parametrize(("name", "like", "other"), PAIRS)
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_fp32_gradients_change_no_bit_of_a_training(name: str, like: str, other: tuple[str, ...], grad_accum: int) -> None:
    """From the same rounded masters: where FP32 gradients are kept, and unscaled, there is nothing left to round."""
    ours, theirs = Numbered(name, True, grad_accum), Numbered(like, True, grad_accum)
    for _ in range(20):
        a, b = ours.next(), theirs.next()
        assert [float(x) for x in vars(a).values()] == [float(x) for x in vars(b).values()]
        assert ours.bits(*other) == theirs.bits(*other)
    assert int(ours.state.t) >= 15 and ("main_grads" in ours.state.buffers) == (name == "apex-o2" and grad_accum == 1)


def test_from_original_masters_it_is_another_training() -> None:
    """The control: what the rounded start has lost matters."""
    ours, theirs = Numbered("apex-o2", True), Numbered("fp16", False)
    for _ in range(5):
        ours.next()
        theirs.next()
    assert ours.bits("grads", "main_grads") != theirs.bits("grads", "main_grads")


def test_main_grads_are_the_unscaled_gradients() -> None:
    """Not clipped: the norm is 0.5 at most after clipping only. Where they overflowed the step was skipped."""
    training = Numbered("apex-o2")
    for _ in range(5):
        result = training.next()
        state, S = training.state, result.loss_scale
        main_grads = state.buffers["main_grads"]
        assert main_grads.dtype == np.float32
        with np.errstate(invalid="ignore"):
            assert main_grads.tobytes() == (widen(state.grads) * (1 / S)).tobytes()
        assert result.skipped or float(np.linalg.norm(main_grads)) > 0.6


def test_main_grads_take_the_place_of_the_16_bit_ones() -> None:
    """The update reads them: what is added to them afterwards is part of the step, and to the 16-bit ones is not."""
    moved = {}
    for kind in ("none", "grads", "main_grads"):
        training = Numbered("apex-o2", loss_scale="1")
        training.next()
        state = training.state
        check_and_measure(state, ONE)
        if kind != "none":
            state.buffers[kind][...] = 1
        training.optimizer.update(state, ONE, 1.0, np.False_)
        moved[kind] = state.master.tobytes()
    assert moved["none"] == moved["grads"] != moved["main_grads"]


def test_a_remainder_trains_as_fp32_masters_do_up_to_the_first_tie() -> None:
    """Masters, moments and weights to the bit, while no master lies half way above an even BF16 number."""
    ours, theirs = Numbered("bf16-remainder"), Numbered("bf16")
    equal = 0
    while equal < 40 and not at_a_tie(theirs.state.master).any():
        assert float(ours.next().loss) == float(theirs.next().loss)
        assert ours.state.values("weights").tobytes() == theirs.state.master.tobytes()
        for kind in ("m", "v", "grads"):
            assert ours.state.buffers[kind].tobytes() == theirs.state.buffers[kind].tobytes()
        equal += 1
    print(f"{equal} equal steps")
    assert equal >= 10  # 2777 masters, each at a tie by a chance of 2^-17: once in 47 steps
    assert ours.state.nbytes == 14 * TINY.n_params and theirs.state.nbytes == 16 * TINY.n_params


def test_without_a_remainder_it_is_another_training() -> None:
    ours, theirs = Numbered("bf16-no-master"), Numbered("bf16")
    for _ in range(2):
        ours.next()
        theirs.next()
    assert ours.bits()["weights"] != theirs.bits()["weights"]


# ---------------------------------------------------------------------------------------------------------- skipped steps


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """spoil(x): gradients have x in one place from now on; spoil(0): they are left alone again."""
    found = [0.0]
    accumulate = State.accumulate_grad

    def spoiled(self: State, name: str, gradient: Array) -> None:
        if found[0] and name == "lm_head.bias":
            gradient = gradient.copy()
            gradient[-1] = found[0]
        accumulate(self, name, gradient)

    monkeypatch.setattr(State, "accumulate_grad", spoiled)
    yield lambda x: found.__setitem__(0, x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_skipped_step_leaves_every_part_of_every_encoding(recipe: str, spoil: Callable[[float], None]) -> None:
    """Weights, what rounding left of them, masters, moments, scales, t: not one bit. The next good step moves them."""
    training = Numbered(recipe, loss_scale="1")
    training.next()
    training.state.weights_down()
    before = training.bits("grads", "main_grads")
    for bad in (math.inf, math.nan):
        spoil(bad)
        assert training.next().skipped
        assert training.bits("grads", "main_grads") == before
    spoil(0)
    assert not training.next().skipped
    after = training.bits("grads", "main_grads")
    assert all(after[name] != before[name] for name in before if name != "weights")
    assert int(training.state.t) == 2


def test_a_skipped_step_takes_no_draws(spoil: Callable[[float], None]) -> None:
    """The bits of an update depend on the number of updates before it: two runs, of which one skipped steps, go on alike."""
    ends = []
    for skips in (0, 3):
        training = Numbered("bf16-sr", loss_scale="1")
        training.next()
        spoil(math.inf)
        for _ in range(skips):
            training.next()
        spoil(0)
        training.steps = 1
        training.next()
        ends.append(training.bits())
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------------------- FP32 for the embeddings alone


def test_embeddings_keep_every_bit_and_the_others_are_coded_as_if_alone() -> None:
    """300 embeddings, in the middle of a block of 256: what is coded beside them has a scale of its own."""
    encoding, plain = get_encoding("int8-signed-embeddings-fp32").of(300), get_encoding("int8-signed")
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    x[:300] *= 1e9
    both, alone = ({name: np.zeros(part.size(1000), part.dtype) for name, part in s.parts.items()} for s in (encoding, plain))
    assert {name: len(part) for name, part in both.items()} == {"": 1000, "scales": 4, "embeddings": 300}
    before = x.copy()
    encoding.write(both, x, RandomKey(0, np.int64(0), 0))
    plain.write(alone, np.where(np.arange(1000) < 300, 0, x).astype(np.float32), RandomKey(0, np.int64(0), 0))
    read, coded = encoding.read(both, "fp32"), plain.read(alone, "fp32")
    assert np.array_equal(x, before) and np.array_equal(read[:300], x[:300]) and np.array_equal(read[300:], coded[300:])
    assert 0 < np.abs(read[300:] - x[300:]).max() < 0.05 * np.abs(x[300:]).max()
    plain.write(alone, x, RandomKey(0, np.int64(0), 0))  # negative control: coded beside them the others are lost
    assert not plain.read(alone, "fp32")[300:512].any()


def test_blocks_of_any_size_find_their_embeddings() -> None:
    part = get_encoding("int8-signed-embeddings-fp32").of(300).parts["embeddings"]
    assert [part.slice(slice(a, a + 256)) for a in (0, 256, 512)] == [slice(0, 256), slice(256, 300), slice(300, 300)]
    assert part.size(1000) == 300 and part.size(100) == 100


@pytest.mark.parametrize(("model", "names"), [("gpt", 2), ("mlp", 1)])
def test_the_embeddings_of_both_models_lie_first(model: str, names: int) -> None:
    config = Config.of({"model": model, "n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": 4})
    state = config.make_training(NUMPY).state
    first = [name for name in state.layout.slots if name.split(".")[-2] in ("wte", "wpe")]
    assert first == list(state.layout.slots)[:names] and state.layout.embeddings == 8 * 256 + (8 * 4 if model == "gpt" else 0)


# ------------------------------------------------------------------------------------------------------ who cannot read them


def test_who_knows_no_codes_says_so() -> None:
    for name, encoding in ENCODINGS.items():
        state = State(toy(), {"weights": "bf16", "m": name}, NUMPY)
        if not isinstance(encoding, Blockwise):
            state.refuse_codes("this")
        else:
            with pytest.raises(UsageError, match=f"^this supports states of 16 bits and more; .* stores m as {name}$"):
                state.refuse_codes("this")
        assert state.values("m").dtype == (dtype_of("fp32") if isinstance(encoding, Blockwise | Remainder) else
                                           dtype_of(encoding.fmt))  # fmt: skip
    assert {type(encoding) for encoding in ENCODINGS.values()} == {
        Plain, Stochastic, Kahan, Remainder, Blockwise, FP32Embeddings,
    }  # fmt: skip
