"""refimpl.nn.checkpointing: a block that is computed again gives the same bits, is reported once, and holds its input alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arrays import DTYPE, Array, same_bits
from recipe_lists import BASIC
from strict_backend import on_host

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape, Value
from refimpl.nn.checkpointing import Block
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.op import Op
from refimpl.nn.ops import add, linear, relu, silu
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe

SMALL = gpt_model(GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=32))
BATCH = np.random.default_rng(1).integers(0, 32, (2, 2, 9))


def run_of(recipe: str, checkpointing: str, backend: Backend = NUMPY, **more: Any) -> Run:
    return Run(get_recipe(recipe).policy, backend, checkpointing=checkpointing, **more)


def pass_of(run: Run, recipe: str, gradient: float = 1.0) -> tuple[Tape, Array, list[tuple[str, Array]]]:
    """One forward and backward: the tape, the loss, and what the sink got, in order."""
    fmt = get_recipe(recipe).state["weights"]
    start = SMALL.initial_weights(np.random.default_rng(0))
    weights = {name: run.backend.from_host(w.astype(DTYPE[fmt])) for name, w in start.items()}
    tape, sink = Tape(run, weights, SMALL.tied), list[tuple[str, Array]]()
    tokens, targets = (run.backend.from_host(x) for x in (BATCH[0, :, :-1], BATCH[0, :, 1:]))
    loss = SMALL.loss(tape, tokens, targets)
    seed = run.backend.from_host(np.asarray(gradient, DTYPE["fp64" if recipe == "fp64" else "fp32"]))
    tape.backward(loss, seed, lambda name, gradient: sink.append((name, on_host(gradient))))
    return tape, on_host(loss.array), sink


# --------------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("recipe", BASIC)
def test_loss_and_gradients_have_the_same_bits_and_reach_the_sink_in_the_same_order(recipe: str, backend: Backend) -> None:
    (_, loss, plain), (_, again, checkpointed) = (
        pass_of(run_of(recipe, how, backend), recipe, 1024.0) for how in ("none", "full")
    )
    assert same_bits(loss, again)
    assert [name for name, _ in plain] == [name for name, _ in checkpointed]
    assert all(same_bits(a, b) for (_, a), (_, b) in zip(plain, checkpointed, strict=True))


# ------------------------------------------------------------------------------------------- nothing is seen or counted twice


@pytest.mark.parametrize("recipe", ["fp16", "amp-bf16", "fp8-delayed", "nvfp4"])
def test_monitor_and_observer_see_what_they_see_without_checkpointing(recipe: str) -> None:
    seen: dict[str, list[tuple[Any, ...]]] = {"none": [], "full": []}
    for how, calls in seen.items():
        run = run_of(recipe, how, REFERENCE)
        run.monitor = lambda site, before, after, calls=calls: calls.append((site, before.tobytes(), after.tobytes()))

        def observe(kind: str, place: str, x: Array, calls: list[tuple[Any, ...]] = calls) -> Array:
            calls.append((kind, place, x.tobytes()))
            return x

        run.observer = observe
        pass_of(run, recipe)
        assert run.monitor is not None
    assert seen["none"] == seen["full"] and len(seen["none"]) > 100


def test_with_a_monitor_the_definitions_run_the_second_time_too() -> None:
    """As the first time: with fast versions the sums would have another order, and the bits of backward another forward."""

    def unseen(site: str, before: Array, after: Array) -> None:
        pass

    ran: dict[str, list[str]] = {"none": [], "full": []}
    for how, names in ran.items():

        def noting(op: Op, names: list[str] = names) -> Op:
            def forward(*arrays: Any, p: Any, **static: Any) -> Any:
                names.append(op.forward.__module__)
                return op.forward(*arrays, p=p, **static)

            return replace(op, forward=forward)

        run = run_of("fp32", how, monitor=unseen)
        version = run.version
        run.version = lambda op, version=version, noting=noting: noting(version(op))  # type: ignore[method-assign]
        pass_of(run, "fp32")
    assert {*ran["none"]} == {*ran["full"]} and not any("backends" in module for module in ran["full"])
    assert len(ran["full"]) == len(ran["none"]) + 10 * 3  # the ten operations of each block, again


def test_an_array_that_an_observer_puts_in_place_of_a_result_is_used_again() -> None:
    def halve(kind: str, place: str, x: Array) -> Array:
        return x / np.float32(2) if kind == "activations" and place.endswith(("ln_1", "attn.c_proj", "residual_2")) else x

    plain, checkpointed = (pass_of(run_of("fp32", how, observer=halve), "fp32") for how in ("none", "full"))
    untouched = pass_of(run_of("fp32", "full"), "fp32")
    assert all(same_bits(a, b) for (_, a), (_, b) in zip(plain[2], checkpointed[2], strict=True))
    assert not same_bits(plain[1], untouched[1])


def stochastic_forward(how: str) -> Run:
    """A run whose products round both operands stochastically in forward too, which no recipe here does."""
    policy = get_recipe("nvfp4").policy
    row = replace(policy.row("linear.y"), inputs={"x": "nvfp4-sr", "w": "nvfp4-sr"})
    return Run(replace(policy, rows={**policy.rows, "linear.y": row}), NUMPY, checkpointing=how)


def test_stochastic_rounding_draws_the_same_random_bits_and_no_more() -> None:
    """In two micro-batches, of which the second draws other bits than the first."""
    runs = {how: stochastic_forward(how) for how in ("none", "full")}
    found = {how: [pass_of(run, "nvfp4") for _ in range(2)] for how, run in runs.items()}
    for (_, loss, plain), (_, again, checkpointed) in zip(found["none"], found["full"], strict=True):
        assert same_bits(loss, again)
        assert all(same_bits(a, b) for (_, a), (_, b) in zip(plain, checkpointed, strict=True))
    assert runs["none"].scales._draws == runs["full"].scales._draws
    assert not same_bits(found["full"][0][1], found["full"][1][1])


def test_delayed_scaling_records_each_tensor_as_without_checkpointing() -> None:
    runs = {how: run_of("fp8-delayed", how) for how in ("none", "full")}
    for run in runs.values():
        pass_of(run, "fp8-delayed")
        run.after_step()
    plain, checkpointed = (run.scales.arrays() for run in runs.values())
    assert plain.keys() == checkpointed.keys() and len(plain) > 20
    assert all(same_bits(x, checkpointed[name]) for name, x in plain.items())


# ----------------------------------------------------------------------------------------------------- what goes wrong is told


def chain(how: str, op: Op, backend: Backend = NUMPY) -> tuple[Tape, Value, dict[str, Array]]:
    """A tape with one block of three operations, the second of which is `op`."""
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal((4, 4), np.float32), "h.0.fc.weight": rng.standard_normal((4, 4), np.float32)}
    weights = {name: backend.from_host(w) for name, w in weights.items()}
    t = Tape(run_of("fp32", how, backend), weights)
    x = t(linear, "fc", backend.from_host(rng.standard_normal((3, 4), np.float32)))
    with t.block("h.0"):
        h = t(op, "op", t(linear, "fc", x))
        y = t(add, "residual", x, h)
    return t, y, weights


def backward(t: Tape, y: Value) -> None:
    t.backward(y, np.ones_like(y.array), lambda name, gradient: None)


def dropout(rng: np.random.Generator) -> Op:
    """An operation with random numbers of its own, which no run knows of."""

    def forward(x: Array, p: Any) -> tuple[Array, Array]:
        mask = (rng.random(x.shape) < 0.5) * np.float32(2)
        return x * mask, mask

    return Op("dropout", forward, lambda dy, mask, p: (dy * mask,))


def test_an_operation_that_draws_other_random_numbers_the_second_time_is_an_error() -> None:
    t, y, _ = chain("none", dropout(np.random.default_rng(0)))
    backward(t, y)
    t, y, _ = chain("full", dropout(np.random.default_rng(0)))
    with pytest.raises(RuntimeError, match=r"h\.0 has another output when recomputed.* 'none'$") as error:
        backward(t, y)
    assert "\n" not in str(error.value)


def spoil_input(block: Block, weights: dict[str, Array]) -> None:
    (x,) = block.kept.values()
    x[0, 0] = np.nextafter(x[0, 0], np.float32(9))  # in place, as a wrong `out=` would


def spoil_weight(block: Block, weights: dict[str, Array]) -> None:
    weights["h.0.fc.weight"][1, 2] *= 2


def other_order(block: Block, weights: dict[str, Array]) -> None:
    (node,) = block.kept
    block.kept[node] = block.kept[node][::-1]


@pytest.mark.parametrize("spoil", [spoil_input, spoil_weight, other_order])
def test_another_input_or_weight_the_second_time_is_an_error(spoil: Callable[[Block, dict[str, Array]], None]) -> None:
    t, y, weights = chain("full", silu)
    spoil(t.entries[-1].saved, weights)
    with pytest.raises(RuntimeError, match="has another output"):
        backward(t, y)


def test_random_bits_that_are_not_those_of_the_first_time_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: scales that are frozen as for an evaluation draw from the start, not from where the block began."""
    monkeypatch.setattr(ScalingState, "replay", ScalingState.frozen)
    run = stochastic_forward("full")
    pass_of(run, "nvfp4")  # the first micro-batch begins at the start
    with pytest.raises(RuntimeError, match=r"transformer\.h\.2 has another output"):
        pass_of(run, "nvfp4")


def test_after_an_error_the_run_is_as_it_was() -> None:
    t, y, _ = chain("full", dropout(np.random.default_rng(0)))
    before = t.run.monitor, t.run.scales
    with pytest.raises(RuntimeError):
        backward(t, y)
    assert (t.run.monitor, t.run.scales) == before and t.run.scales is before[1]


# --------------------------------------------------------------------------------------------------------------- what is held


def test_only_the_input_of_a_block_outlives_forward_and_all_of_it_goes_in_backward() -> None:
    t = Tape(run_of("fp32", "full"), {})
    alive: dict[str, weakref.ref[Any]] = {}

    def noted(name: str, x: Value) -> Value:
        alive[name] = weakref.ref(x.array)
        return x

    x = noted("input 0", t(relu, "start", np.ones((3, 4), np.float32)))
    for i in range(2):
        with t.block(f"h.{i}"):
            h = noted(f"a {i}", t(silu, "a", x))
            h = noted(f"b {i}", t(silu, "b", h))
            x = noted(f"input {i + 1}", t(add, "residual", x, h))
    y = t(add, "end", x, x)  # which saves nothing
    del x, h
    gc.collect()
    assert {name for name, ref in alive.items() if ref() is not None} == {"input 0", "input 1"}
    backward(t, y)
    gc.collect()
    assert not any(ref() is not None for ref in alive.values()) and not t.entries


def test_what_is_saved_the_second_time_is_let_go_of_as_backward_passes() -> None:
    saved: list[weakref.ref[Any]] = []
    alive: dict[str, list[int]] = {}

    def forward(x: Array, p: Any) -> tuple[Array, Array]:
        saved.append(weakref.ref(x))
        return x * x, x

    square = Op("square", forward, lambda dy, x, p: (dy * 2 * x,))
    t = Tape(run_of("fp32", "full"), {f"h.0.{i}.weight": np.eye(4, dtype=np.float32) for i in range(3)})
    x = t(relu, "start", np.ones((3, 4), np.float32))
    with t.block("h.0"):
        for i in range(3):
            x = t(square, f"square_{i}", t(linear, f"{i}", x))
    del saved[:]

    def sink(name: str, gradient: Array) -> None:
        alive[name] = [i for i, ref in enumerate(saved) if ref() is not None]

    t.backward(x, np.ones_like(x.array), sink)
    assert alive == {"h.0.2.weight": [0, 1], "h.0.1.weight": [0], "h.0.0.weight": []}


def test_the_second_time_too_an_array_goes_with_its_last_use() -> None:
    """Unless an operation saves it: here none does."""
    made: list[weakref.ref[Any]] = []
    alive: list[list[int]] = []

    def forward(x: Array, p: Any) -> tuple[Array, None]:
        alive.append([i for i, ref in enumerate(made) if ref() is not None])
        y = x + np.float32(1)
        made.append(weakref.ref(y))
        return y, None

    step = Op("step", forward, lambda dy, saved, p: (dy,))
    t = Tape(run_of("fp32", "full"), {})
    x = t(step, "start", np.ones((3, 4), np.float32))
    with t.block("h.0"):
        for i in range(3):
            x = t(step, f"step_{i}", x)
    del made[1:], alive[:]  # but the input of the block
    backward(t, x)
    assert alive == [[0], [1], [2]]  # each reads what the one before has made, and nothing else is there


def test_a_tape_that_is_dropped_frees_its_blocks_at_once() -> None:
    """No reference goes round: an interrupted step must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        t, y, _ = chain("full", silu)
        ref = weakref.ref(next(iter(t.entries[-1].saved.kept.values())))
        assert ref() is not None
        del t, y
        assert ref() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("recipe", ["fp16", "amp-fp16"])
def test_the_record_is_the_same_but_for_what_is_saved(recipe: str) -> None:
    fmt = get_recipe(recipe).state["weights"]
    weights = {name: w.astype(DTYPE[fmt]) for name, w in SMALL.initial_weights(np.random.default_rng(0)).items()}
    plain, checkpointed = (Tape(run_of(recipe, how), weights, SMALL.tied) for how in ("none", "full"))
    for tape in (plain, checkpointed):
        SMALL.loss(tape, BATCH[0, :, :-1], BATCH[0, :, 1:])

    def record(tape: Tape) -> list[Any]:
        return [(e.op, e.output.name, e.output.uses, [n and n.name for n in e.inputs], e.static) for e in tape.entries]

    assert record(plain) == record(checkpointed)
    blocks = [entry.saved for entry in checkpointed.entries if isinstance(entry.saved, Block)]
    assert [block.name for block in dict.fromkeys(blocks)] == [f"transformer.h.{i}" for i in range(3)]
    assert len(blocks) == 10 * 3
    assert all(len(block.kept) == 1 and not block.saved for block in blocks)


# ----------------------------------------------------------------------------------------------------------- where it applies


def names_of_blocks(tape: Tape) -> Sequence[str]:
    return [block.name for block in dict.fromkeys(e.saved for e in tape.entries if isinstance(e.saved, Block))]


def test_a_block_inside_a_block_belongs_to_it() -> None:
    t = Tape(run_of("fp32", "full"), {})
    with t.block("outer"), t.block("inner"):
        y = t(silu, "a", t(relu, "start", np.ones(3, np.float32)))
    assert names_of_blocks(t) == ["outer"] and t.entries[-1].output.name == "outer.inner.a"
    backward(t, y)


def test_outside_of_blocks_and_in_empty_ones_nothing_is_dropped() -> None:
    t = Tape(run_of("fp32", "full"), {})
    with t.block("empty"):
        pass
    with t.scope("h.0"):
        t(silu, "a", np.ones(3, np.float32))
    assert names_of_blocks(t) == []


def test_a_block_ends_where_an_error_leaves_it() -> None:
    t = Tape(run_of("fp32", "full"), {})
    with pytest.raises(ZeroDivisionError), t.block("h.0"):
        raise ZeroDivisionError
    t(silu, "a", np.ones(3, np.float32))
    assert names_of_blocks(t) == [] and t.entries[0].output.name == "a"


def test_a_run_that_asks_for_what_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown checkpointing 'fully': choose one of none, full"):
        pass_of(run_of("fp32", "fully"), "fp32")


def test_without_recording_there_are_no_blocks() -> None:
    t = Tape(run_of("fp32", "full"), {}, record=False)
    with t.block("h.0"):
        assert t.in_block is None
    assert t.entries == []


def test_a_block_reads_what_it_likes_from_outside(backend: Backend) -> None:
    """Two tensors, arrays without a gradient, one tensor twice, and results that are used after it."""
    gradients = []
    for how in ("none", "full"):
        rng = np.random.default_rng(0)
        weights = {name: rng.standard_normal((4, 4), np.float32) for name in ("a.weight", "b.weight", "h.0.c.weight")}
        t = Tape(run_of("fp32", how, backend), {name: backend.from_host(w) for name, w in weights.items()})
        data = backend.from_host(rng.standard_normal((3, 4), np.float32))
        a, b = t(linear, "a", data), t(linear, "b", data)
        with t.block("h.0"):
            c = t(linear, "c", data)
            d = t(add, "d", t(add, "twice", a, a), b)
            e = t(add, "e", c, d)
        y = t(add, "y", t(silu, "after", c), e)
        sink: list[tuple[str, Array]] = []
        t.backward(y, backend.xp.ones(y.array.shape, y.array.dtype), lambda name, g, sink=sink: sink.append((name, on_host(g))))
        gradients.append(sink)
    assert [name for name, _ in gradients[0]] == [name for name, _ in gradients[1]]
    assert all(same_bits(x, z) for (_, x), (_, z) in zip(*gradients, strict=True))
