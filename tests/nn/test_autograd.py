"""refimpl.nn.autograd: what it records, how gradients of one tensor meet, what it hands to the sink, and what it lets go of."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import arrays
import numpy as np
import pytest
from arrays import AMP, DTYPE, Array, rounded, same_bits
from recipe_lists import BASIC
from strict_backend import on_host
from torch_cases import RECIPES as TORCH_RECIPES
from torch_cases import Case, check, reference

from refimpl.backends.base import Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.autograd import Tape, Value, selected
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.op import Op
from refimpl.nn.ops import (
    OPS,
    add,
    cross_entropy,
    embedding,
    fan_in,
    gelu_tanh,
    layernorm,
    linear,
    relu,
    reshape,
    silu,
    split,
)
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe

UNIFORM = ["fp64", "fp32", "fp16", "bf16"]


def make_run(recipe: str, backend: Backend = NUMPY) -> Run:
    return Run(get_recipe(recipe).policy, backend)


def draw(*shape: int, fmt: str = "fp32", seed: int = 0, backend: Backend = NUMPY) -> Array:
    return backend.from_host(np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(DTYPE[fmt]))


def weights_format(recipe: str) -> str:
    return get_recipe(recipe).state["weights"]


def wide(x: Any) -> Array:
    return arrays.wide(on_host(x))


class Collector:
    """A sink that keeps what it is handed, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Array]] = []

    def __call__(self, name: str, gradient: Array) -> None:
        self.calls.append((name, gradient))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def __getitem__(self, name: str) -> Array:
        (gradient,) = (g for n, g in self.calls if n == name)  # exactly one
        return gradient


def ones_like(x: Array, backend: Backend = NUMPY) -> Array:
    return backend.xp.ones(x.shape, x.dtype)


def by_hand(run: Run, op: Op) -> tuple[Op, Any]:
    """The operation as this run's backend computes it, and its precision."""
    return selected(op, run, "by hand"), run.precision(op.key, "by hand")


# --------------------------------------------------------------------------------------------------- one tensor, many uses


@pytest.mark.parametrize("fmt", UNIFORM)
def test_gradients_of_a_tensor_used_twice_meet_in_one_sum(fmt: str, backend: Backend) -> None:
    weights = {"fc.weight": draw(6, 4, fmt=fmt, backend=backend), "fc.bias": draw(6, fmt=fmt, seed=1, backend=backend)}
    x, seed = draw(5, 4, fmt=fmt, seed=2, backend=backend), draw(5, 6, fmt=fmt, seed=3, backend=backend)
    run, sink = make_run(fmt, backend), Collector()
    t = Tape(run, weights)
    h = t(linear, "fc", x)
    t.backward(t(add, "sum", t(silu, "silu", h), t(gelu_tanh, "gelu", h)), seed, sink)

    product, p = by_hand(run, linear)
    y, saved = product.forward(x, *weights.values(), p=p)
    each = []
    for definition in (silu, gelu_tanh):
        op, p_op = by_hand(run, definition)
        each.append(op.backward(seed, op.forward(y, p=p_op)[1], p=p_op)[0])
    addition, p_sum = by_hand(run, fan_in)
    dy, _ = addition.forward(*each, p=p_sum)
    _, dw, db = product.backward(dy, saved, *weights.values(), p=p)
    assert same_bits(sink["fc.weight"], dw) and same_bits(sink["fc.bias"], db)


def test_both_inputs_of_one_operation_may_be_the_same_tensor(backend: Backend) -> None:
    w, sink = draw(7, 3, backend=backend), Collector()
    t = Tape(make_run("fp32", backend), {"wte.weight": w})
    x = t(embedding, "wte", backend.xp.arange(7))
    t.backward(t(add, "twice", x, x), ones_like(w, backend), sink)
    assert np.array_equal(wide(sink["wte.weight"]), np.full((7, 3), 2.0))


def test_a_third_gradient_is_added_to_the_rounded_sum_of_two(backend: Backend) -> None:
    # Backward meets the last use first, so 256 arrives, then 1 and 1. In bf16 256 + 1 is a tie and goes back to 256, twice;
    # one sum of all three would be 258.
    values = {"wte.weight": np.array([[1]], DTYPE["bf16"]), "large.weight": np.array([[256]], DTYPE["bf16"])}
    sink = Collector()
    t = Tape(make_run("bf16", backend), {name: backend.from_host(w) for name, w in values.items()})
    x = t(embedding, "wte", backend.xp.zeros(1, np.int64))
    small = t(add, "small", t(reshape, "a", x, shape=(1, 1)), t(reshape, "b", x, shape=(1, 1)))
    y = t(add, "all", small, t(linear, "large", x))
    t.backward(y, ones_like(y.array, backend), sink)
    assert wide(sink["wte.weight"]) == 256


@pytest.mark.parametrize("op", [reshape, split])
def test_views_of_a_tensor_send_back_gradients_of_its_shape(op: Op, backend: Backend) -> None:
    w, sink = draw(4, 6, backend=backend), Collector()
    t = Tape(make_run("fp32", backend), {"wte.weight": w})
    x = t(embedding, "wte", backend.xp.arange(4))
    if op is split:
        parts = [t(split, f"part_{i}", x, start=2 * i, stop=2 * i + 2) for i in range(3)]
        y = t(add, "b", t(add, "a", parts[0], parts[1]), parts[1])  # part 1 twice, part 2 never
        expected = np.repeat([[1.0, 1, 2, 2, 0, 0]], 4, axis=0)
    else:
        y = t(reshape, "flat", x, shape=(24,))
        expected = np.ones((4, 6))
    t.backward(y, ones_like(y.array, backend), sink)
    assert np.array_equal(wide(sink["wte.weight"]), expected)


# ------------------------------------------------------------------------------------------------------------ tied weights


def tied_tape(recipe: str, weights: Mapping[str, Array], backend: Backend = NUMPY) -> tuple[Run, Tape]:
    run = make_run(recipe, backend)
    return run, Tape(run, weights, {"lm_head.weight": "wte.weight"})


@pytest.mark.parametrize("recipe", BASIC)
def test_the_gradient_of_a_tied_embedding_is_the_rounded_sum_of_its_two(recipe: str, backend: Backend) -> None:
    fmt = weights_format(recipe)
    w = draw(9, 8, fmt=fmt, backend=backend)
    tokens, targets = map(backend.from_host, (np.array([[3, 0, 3], [8, 3, 1]]), np.array([[0, 3, 1], [3, 1, 7]])))
    seed = backend.from_host(np.asarray(256.0, DTYPE["fp64" if recipe == "fp64" else "fp32"]))
    run, t = tied_tape(recipe, {"wte.weight": w}, backend)
    sink = Collector()
    t.backward(t(cross_entropy, "loss", t(linear, "lm_head", t(embedding, "wte", tokens)), targets), seed, sink)

    table, p_table = by_hand(run, embedding)
    head, p_head = by_hand(run, linear)
    loss, p_loss = by_hand(run, cross_entropy)
    low = AMP.get(recipe)
    copy = w.astype(DTYPE[low]) if low else w  # what lm_head reads
    x, saved_tokens = table.forward(tokens, w, p=p_table)
    y, saved_linear = head.forward(x, copy, None, p=p_head)
    _, saved_loss = loss.forward(y, targets, p=p_loss)
    dy, _ = loss.backward(seed, saved_loss, p=p_loss)
    dx, dw_head, _ = head.backward(dy, saved_linear, copy, None, p=p_head)
    _, dw_table = table.backward(dx, saved_tokens, w, p=p_table)
    dw_head, dw_table = on_host(dw_head), on_host(dw_table)
    assert dw_head.dtype == DTYPE[low or fmt] and dw_table.dtype == DTYPE[fmt]

    acc = np.float64 if recipe == "fp64" else np.float32
    expected = (dw_head.astype(acc) + dw_table.astype(acc)).astype(DTYPE[fmt])
    assert same_bits(sink["wte.weight"], expected)
    assert sink.names == ["wte.weight"]  # under its first name, and once
    assert dw_head.any() and dw_table.any()


def test_a_tied_name_reads_the_weights_of_its_first_name(backend: Backend) -> None:
    w = draw(9, 8, backend=backend)
    run, t = tied_tape("fp32", {"wte.weight": w}, backend)
    x, (product, p) = t(embedding, "wte", backend.xp.arange(3)), by_hand(run, linear)
    assert same_bits(t(linear, "lm_head", x).array, product.forward(w[:3], w, None, p=p)[0])


# ------------------------------------------------------------------------------------------------------ the shared 16-bit copy


@pytest.mark.parametrize("recipe", AMP)
def test_autocast_casts_a_weight_once_and_its_gradients_meet_at_the_copy(recipe: str, backend: Backend) -> None:
    low = DTYPE[AMP[recipe]]
    w, x1, x2 = (draw(*shape, seed=i, backend=backend) for i, shape in enumerate([(6, 4), (5, 4), (5, 4)]))
    seed = draw(5, 6, fmt=AMP[recipe], seed=3, backend=backend)
    run, sink = make_run(recipe, backend), Collector()
    t = Tape(run, {"a.weight": w}, {"b.weight": "a.weight"})
    y = t(add, "sum", t(linear, "a", x1), t(linear, "b", x2))
    assert [entry.op.name for entry in t.entries] == ["cast", "linear", "linear", "add"]
    t.backward(y, seed, sink)

    each, (product, p) = [], by_hand(run, linear)
    for x in (x1, x2):
        _, saved = product.forward(x, w.astype(low), None, p=p)
        each.append(on_host(product.backward(seed, saved, w.astype(low), None, p=p)[1]))
        assert each[-1].dtype == low  # R(d), already rounded
    meet_at_copy = (each[0].astype(np.float32) + each[1].astype(np.float32)).astype(low).astype(np.float32)
    meet_at_weight = each[0].astype(np.float32) + each[1].astype(np.float32)
    assert same_bits(sink["a.weight"], meet_at_copy)
    assert not same_bits(meet_at_copy, meet_at_weight)  # or this would show nothing


@pytest.mark.parametrize("recipe", AMP)
def test_the_copy_lasts_one_step(recipe: str, backend: Backend) -> None:
    weights, x = {"fc.weight": draw(6, 4, backend=backend)}, draw(5, 4, seed=1, backend=backend)
    run = make_run(recipe, backend)
    first = Tape(run, weights)(linear, "fc", x).array
    weights["fc.weight"] += 1  # an update in place, as the optimizer makes it
    second, (product, p) = Tape(run, weights)(linear, "fc", x).array, by_hand(run, linear)
    assert same_bits(second, product.forward(x, weights["fc.weight"], None, p=p)[0])
    assert not same_bits(first, second)


def test_weights_that_have_the_format_already_are_not_cast() -> None:
    for fmt in UNIFORM:
        t = Tape(make_run(fmt), {"fc.weight": draw(6, 4, fmt=fmt), "fc.bias": draw(6, fmt=fmt)})
        t(linear, "fc", draw(5, 4, fmt=fmt, seed=1))
        assert [entry.op.name for entry in t.entries] == ["linear"]
    # Autocast casts the operands of products only: a norm reads its FP32 weights.
    t = Tape(make_run("amp-fp16"), {"ln.weight": draw(4), "ln.bias": draw(4), "fc.weight": draw(6, 4), "fc.bias": draw(6)})
    t(linear, "fc", t(layernorm, "ln", draw(5, 4)))
    assert [entry.output.name for entry in t.entries] == ["ln", "fc.weight.fp16", "fc.bias.fp16", "fc"]


# ------------------------------------------------------------------------------------------------------------------ the sink

SMALL = gpt_model(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11))


def small_tape(recipe: str, record: bool = True, backend: Backend = NUMPY) -> tuple[Tape, Value]:
    fmt, start = weights_format(recipe), SMALL.initial_weights(np.random.default_rng(0))
    weights = {name: backend.from_host(w.astype(DTYPE[fmt])) for name, w in start.items()}
    t = Tape(make_run(recipe, backend), weights, SMALL.tied, record)
    tokens = backend.from_host(np.random.default_rng(1).integers(0, 11, (3, 7)))
    return t, SMALL.loss(t, tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("recipe", BASIC)
def test_the_sink_gets_every_parameter_once_and_the_tied_embedding_last(recipe: str, backend: Backend) -> None:
    t, loss = small_tape(recipe, backend=backend)
    sink = Collector()
    t.backward(loss, backend.from_host(np.asarray(1.0, DTYPE["fp64" if recipe == "fp64" else "fp32"])), sink)
    assert sorted(sink.names) == sorted(SMALL.parameters)
    assert sink.names[-1] == "transformer.wte.weight"
    assert sink.names[:2] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]  # the last layer first
    for name, gradient in sink.calls:
        assert gradient.dtype == DTYPE[get_recipe(recipe).state["grads"]]
        assert gradient.shape == SMALL.parameters[name].shape and np.isfinite(wide(gradient)).all()


def test_the_sink_is_called_as_soon_as_a_gradient_is_complete() -> None:
    t, loss = small_tape("fp32")
    entries_left: dict[str, int] = {}
    t.backward(loss, np.float32(1), lambda name, gradient: entries_left.setdefault(name, len(t.entries)))
    assert entries_left["transformer.wte.weight"] == 0
    assert entries_left["transformer.h.1.mlp.c_fc.weight"] > entries_left["transformer.h.0.mlp.c_fc.weight"] > 0


def test_a_parameter_that_nothing_uses_is_not_handed_over(backend: Backend) -> None:
    sink = Collector()
    weights = {"fc.weight": draw(6, 4, backend=backend), "spare.weight": draw(6, 4, backend=backend)}
    t = Tape(make_run("fp32", backend), weights)
    y = t(linear, "fc", draw(5, 4, backend=backend))
    t.backward(y, ones_like(y.array, backend), sink)
    assert sink.names == ["fc.weight"]


def test_a_parameter_whose_output_the_loss_does_not_see_is_not_handed_over(backend: Backend) -> None:
    sink = Collector()
    weights = {"fc.weight": draw(6, 4, backend=backend), "dead.weight": draw(6, 4, seed=1, backend=backend)}
    t, x = Tape(make_run("fp32", backend), weights), draw(5, 4, backend=backend)
    y = t(linear, "fc", x)
    t(relu, "dead_end", t(linear, "dead", x))
    t.backward(y, ones_like(y.array, backend), sink)
    assert sink.names == ["fc.weight"] and not t.entries


@pytest.mark.parametrize("recipe", ["fp32", "amp-fp16"])
def test_a_use_that_the_loss_does_not_see_does_not_hold_back_the_others(recipe: str, backend: Backend) -> None:
    sink, x, w = Collector(), draw(5, 4, backend=backend), draw(6, 4, backend=backend)
    t = Tape(make_run(recipe, backend), {"a.weight": w}, {"b.weight": "a.weight"})
    y = t(linear, "a", x)
    t(linear, "b", x)
    t.backward(y, ones_like(y.array, backend), sink)
    alone = Collector()
    t = Tape(make_run(recipe, backend), {"a.weight": w})
    y = t(linear, "a", x)
    t.backward(y, ones_like(y.array, backend), alone)
    assert sink.names == ["a.weight"] and same_bits(sink["a.weight"], alone["a.weight"])


def test_a_missing_bias_is_no_parameter(backend: Backend) -> None:
    w, x, sink, run = draw(6, 4, backend=backend), draw(5, 4, seed=1, backend=backend), Collector(), make_run("fp32", backend)
    t, (product, p) = Tape(run, {"fc.weight": w}), by_hand(run, linear)
    y = t(linear, "fc", x)
    assert same_bits(y.array, product.forward(x, w, None, p=p)[0])
    t.backward(y, ones_like(y.array, backend), sink)
    assert sink.names == ["fc.weight"]


def test_an_operation_that_forgets_a_gradient_is_an_error() -> None:
    broken = Op("add", add.forward, lambda dy, saved, p: (dy,))
    t = Tape(make_run("fp32"), {"wte.weight": draw(5, 4)})
    x = t(embedding, "wte", np.arange(5))
    y = t(broken, "sum", x, x)
    with pytest.raises(ValueError, match="shorter"):
        t.backward(y, ones_like(y.array), Collector())


# --------------------------------------------------------------------------------------------------------- without recording


@pytest.mark.parametrize("recipe", BASIC)
def test_without_recording_the_result_is_the_same_and_nothing_is_kept(recipe: str, backend: Backend) -> None:
    recorded, loss = small_tape(recipe, backend=backend)
    forward_only, other = small_tape(recipe, record=False, backend=backend)
    assert wide(loss.array) == wide(other.array) and math.isfinite(float(loss.array))
    assert forward_only.entries == [] and recorded.entries


@pytest.mark.parametrize("record", [True, False])
def test_backward_without_a_record_is_an_error(record: bool) -> None:
    """A second time, or on a tape that recorded nothing: silence would look like gradients of zero."""
    tape, loss = small_tape("fp32", record=record)
    if record:
        tape.backward(loss, ones_like(loss.array), Collector())
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        tape.backward(loss, ones_like(loss.array), Collector())


def test_without_recording_activations_go_with_their_last_use() -> None:
    t = Tape(make_run("fp32"), {"fc.weight": draw(6, 4)}, record=False)
    h = t(linear, "fc", draw(5, 4))
    alive = weakref.ref(h.array)
    y = t(silu, "silu", h)  # silu saves its input; without a tape nobody keeps that
    del h
    gc.collect()
    assert alive() is None and y.array.shape == (5, 6)


# -------------------------------------------------------------------------------------------------------------------- memory


def test_an_activation_that_backward_does_not_need_dies_in_forward() -> None:
    t = Tape(make_run("fp32"), {"fc.weight": draw(6, 4)})
    x = draw(5, 4)
    h = t(linear, "fc", x)
    added = t(add, "residual", h, h)  # add saves formats and shapes only
    needed = t(silu, "silu", added)  # silu saves its input
    refs = {"h": weakref.ref(h.array), "added": weakref.ref(added.array)}
    del h, added
    gc.collect()
    assert refs["h"]() is None and refs["added"]() is not None
    t.backward(needed, ones_like(needed.array), Collector())
    gc.collect()
    assert refs["added"]() is None


def test_what_an_operation_saved_is_let_go_of_as_backward_passes() -> None:
    t = Tape(make_run("fp32"), {f"{i}.weight": draw(4, 4, seed=i) for i in range(3)})
    x = t(linear, "0", draw(5, 4))
    refs = []
    for i in (1, 2):
        refs.append(weakref.ref(x.array))  # the input of silu i, which saves it
        x = t(linear, str(i), t(silu, f"silu_{i}", x))
    seed = ones_like(x.array)
    gc.collect()
    assert all(ref() is not None for ref in refs)
    alive: dict[str, list[bool]] = {}

    def sink(name: str, gradient: Array) -> None:
        gc.collect()
        alive[name] = [ref() is not None for ref in refs]

    t.backward(x, seed, sink)
    # silu 2 has run by the time that linear 1 is done, silu 1 by that of linear 0.
    assert alive == {"2.weight": [True, True], "1.weight": [True, False], "0.weight": [False, False]}
    assert t.entries == []


class Lent(Mapping[str, Array]):
    """Weights that are handed out as fresh copies, as a shard that is gathered when needed."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.weights, self.out = weights, []

    def __getitem__(self, name: str) -> Array:
        copy = self.weights[name].copy()
        self.out.append(weakref.ref(copy))
        return copy

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.out)


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "amp-fp16"])
def test_the_tape_keeps_no_parameter_between_forward_and_backward(recipe: str) -> None:
    fmt = weights_format(recipe)
    weights = {name: w.astype(DTYPE[fmt]) for name, w in SMALL.initial_weights(np.random.default_rng(0)).items()}
    lent = Lent(weights)
    t, tokens = Tape(make_run(recipe), lent, SMALL.tied), np.array([[1, 2, 3], [4, 5, 6]])
    loss = SMALL.loss(t, tokens, tokens)
    assert lent.out and lent.alive == 0  # the 16-bit copies of autocast are the tape's own
    borrowed, sink = len(lent.out), Collector()
    t.backward(loss, np.float32(1), sink)
    assert len(lent.out) > borrowed and lent.alive == 0  # fetched again

    plain, expected = Tape(make_run(recipe), weights, SMALL.tied), Collector()
    plain.backward(SMALL.loss(plain, tokens, tokens), np.float32(1), expected)
    assert all(same_bits(sink[name], expected[name]) for name in SMALL.parameters)


# --------------------------------------------------------------------------------------------------------------------- names


def test_names_are_the_scopes_and_the_operations_name() -> None:
    weights = {"h.0.mlp.fc.weight": draw(4, 4), "fc.weight": draw(4, 4, seed=1)}
    t = Tape(make_run("fp32"), weights)
    x = draw(5, 4)
    with t.scope("h.0"):
        with t.scope("mlp"):
            inside = t(linear, "fc", x)
        t(relu, "relu", inside)
    outside = t(linear, "fc", x)
    assert [entry.output.name for entry in t.entries] == ["h.0.mlp.fc", "h.0.relu", "fc"]
    assert [entry.p.place for entry in t.entries] == ["h.0.mlp.fc", "h.0.relu", "fc"]
    # And so they read two different weights.
    p = make_run("fp32").precision("linear", "-")
    for value, w in zip((inside, outside), weights.values(), strict=True):
        assert same_bits(value.array, linear.forward(x, w, None, p=p)[0])


def test_a_scope_ends_where_an_error_leaves_it() -> None:
    t = Tape(make_run("fp32"), {})
    with pytest.raises(ZeroDivisionError), t.scope("h.0"):
        raise ZeroDivisionError
    t(relu, "relu", draw(5, 4))
    assert t.entries[0].output.name == "relu"


def test_rounding_sites_are_called_by_the_names_of_the_model() -> None:
    sites: list[str] = []
    run = Run(get_recipe("amp-fp16").policy, NUMPY, lambda site, before, after: sites.append(site))
    t = Tape(run, {"h.0.fc.weight": draw(4, 4)}, {"h.0.again.weight": "h.0.fc.weight"})
    with t.scope("h.0"):
        y = t(add, "sum", t(linear, "fc", draw(5, 4)), t(linear, "again", draw(5, 4, seed=1)))
    forward = ["h.0.fc.weight.fp16:cast.w"] + [f"h.0.{name}:linear.y.{x}" for name in ("fc", "again") for x in "xy"]
    forward.append("h.0.sum:add.y")
    assert sites == forward
    t.backward(y, ones_like(y.array), Collector())
    backward = [site for site in sites if site not in forward]
    assert "h.0.fc:linear.dw.dw" in backward
    assert "h.0.fc.weight.fp16.grad:fan_in.sum" in backward  # the sum at the copy


def test_tokens_have_no_gradient_and_no_place() -> None:
    t = Tape(make_run("fp32"), {"wte.weight": draw(5, 4)})
    t(embedding, "wte", np.array([1, 2]))
    assert t.entries[0].inputs == (None,)


def test_the_tape_runs_operations_that_no_table_lists() -> None:
    seen: list[Any] = []

    def forward(x: Array, w: Array, p: Any, power: int) -> tuple[Array, Any]:
        return w * x**power, x

    def backward(dy: Array, saved: Array, w: Array, p: Any, power: int) -> tuple[Array, Array]:
        seen.append((p.op, p.place, power))
        return dy * w * power * saved ** (power - 1), (dy * saved**power).sum(keepdims=True)

    monomial = Op("monomial", forward, backward, params=(("factor", "w"),))
    assert monomial.name not in OPS
    sink = Collector()
    t = Tape(make_run("fp64"), {"wte.weight": np.array([[3.0]]), "m.factor": np.array([5.0])})
    x = t(embedding, "wte", np.array([0]))
    t.backward(t(monomial, "m", x, power=4), np.ones((1, 1)), sink)
    assert sink["wte.weight"] == 5 * 4 * 3**3 and sink["m.factor"] == 3**4
    assert seen == [("monomial", "m", 4)]


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", TORCH_RECIPES)
def test_a_weight_used_twice_under_autocast_sums_its_gradients_in_16_bits(recipe: str) -> None:
    case = Case("shared_weight", recipe)
    check(case)
    if recipe in AMP:  # summing in FP32 is something else
        unrounded = reference(case).expected[1]
        assert (rounded(unrounded.exact.value, unrounded.rounded) != unrounded.exact.value).mean() > 0.1


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", TORCH_RECIPES)
def test_a_tied_weight_gets_the_sum_of_both_its_gradients(recipe: str) -> None:
    check(Case("tied", recipe))
