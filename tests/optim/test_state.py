"""refimpl.optim.state: the flat buffers, their layout and views, the way in for weights and the way in for gradients."""

import math
from fractions import Fraction

import numpy as np
import pytest

import refimpl.optim.layout
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import Model, Parameter
from refimpl.numerics.bits import bits_of
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of, format_of, is_float
from refimpl.optim.adamw import AdamW
from refimpl.optim.layout import Layout, blocks
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.state import State
from refimpl.precision.recipes import RECIPES, get_recipe

TINY_GPT = gpt_model(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=5, vocab_size=11))
TINY_MLP = mlp_model(MLPConfig(n_layer=1, n_embd=4, block_size=3, vocab_size=7))
TINY_LLAMA = llama_model(LlamaConfig(1, 2, 1, 8, 4, 12, 5, 11, tied=False))


def toy(**shapes: tuple[int, ...]) -> Model:
    """A model that is only its table of parameters."""
    return Model("toy", {}, {name: Parameter(shape, std=1.0) for name, shape in shapes.items()}, {}, None, None)


def state_of(model: Model, recipe: str, grad_accum: int = 1) -> State:
    return State(model, get_recipe(recipe).state_encodings(grad_accum=grad_accum), NUMPY)


def weights_of(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    return model.initial_weights(np.random.default_rng(seed))


# ---------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("model", [TINY_GPT, TINY_LLAMA, TINY_MLP], ids=["gpt", "llama", "mlp"])
def test_parameters_lie_end_to_end_in_the_order_of_the_table(model: Model) -> None:
    layout = Layout.of(model)
    assert list(layout.slots) == list(model.parameters)
    end = 0
    for name, (start, stop, shape) in layout.slots.items():
        assert start == end and shape == model.parameters[name].shape
        assert stop - start == np.prod(shape)
        end = stop
    assert end == layout.size == model.n_params


@pytest.mark.parametrize(
    ("model", "size"), [(TINY_GPT, (11 + 5) * 8), (TINY_LLAMA, 11 * 8), (TINY_MLP, 7 * 4)], ids=["gpt", "llama", "mlp"]
)
def test_embeddings_are_known_in_each_model(model: Model, size: int) -> None:
    """The tables of tokens and positions, at the start; an output layer of its own is none."""
    assert Layout.of(model).embeddings == size


def test_gpt_order_is_state_dicts() -> None:
    names = list(Layout.of(TINY_GPT).slots)
    block = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")]  # fmt: skip
    assert names == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *(f"transformer.h.0.{name}" for name in block),
        *(f"transformer.h.1.{name}" for name in block),
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]


def test_decayed_ranges_are_the_matrices_joined_where_they_touch() -> None:
    layout = Layout.of(toy(a=(2, 3), b=(4,), c=(2, 2), d=(5, 1), e=(3,), f=(1,)))
    assert layout.decayed == ((0, 6), (10, 19))
    assert Layout.of(toy(a=(3,), b=(2,))).decayed == ()
    assert Layout.of(toy(a=(3, 1), b=(2, 2))).decayed == ((0, 7),)


@pytest.mark.parametrize("model", [TINY_GPT, TINY_MLP], ids=["gpt", "mlp"])
def test_decayed_elements_are_exactly_those_of_matrices(model: Model) -> None:
    layout = Layout.of(model)
    mask = np.zeros(layout.size, bool)
    for start, stop in layout.decayed:
        assert not mask[start:stop].any()
        mask[start:stop] = True
    for name, view in layout.views(mask).items():
        matrix = len(model.parameters[name].shape) == 2
        assert view.all() if matrix else not view.any(), name


def test_views_share_the_buffers_memory() -> None:
    layout = Layout.of(toy(a=(2, 3), b=(4,), c=()))
    buffer = np.arange(11, dtype=np.float32)
    views = layout.views(buffer)
    assert {name: view.shape for name, view in views.items()} == {"a": (2, 3), "b": (4,), "c": ()}
    assert np.array_equal(views["a"], [[0, 1, 2], [3, 4, 5]])
    for view in views.values():
        assert np.shares_memory(view, buffer)
    views["b"][1] = -1
    views["c"][...] = -2
    assert buffer[7] == -1 and buffer[10] == -2


def test_name_at_finds_the_parameter_of_every_index() -> None:
    layout = Layout.of(TINY_GPT)
    for name, (start, stop, _) in layout.slots.items():
        assert layout.name_at(start) == layout.name_at(stop - 1) == name


@pytest.mark.parametrize(("size", "block"), [(0, 4), (1, 4), (4, 4), (5, 4), (1000, 7), (70_000, 1 << 16)])
def test_blocks_cover_everything_once(size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refimpl.optim.layout, "BLOCK", block)
    parts = list(blocks(size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(size))
    assert all(part.stop - part.start == block for part in parts[:-1])


# ----------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_nbytes_is_bytes_a_parameter_times_parameters(name: str, grad_accum: int) -> None:
    state, recipe, n = state_of(TINY_GPT, name, grad_accum), get_recipe(name), TINY_GPT.n_params
    scales = [buffer for kind, buffer in state.buffers.items() if kind.endswith("_scales")]
    unused = sum(4 * (len(buffer) - Fraction(n, 256)) for buffer in scales)  # of the last scale: fewer than 256 share it
    exact = sum(buffer.nbytes for kind, buffer in state.buffers.items() if kind.endswith("_embeddings"))
    assert state.nbytes == recipe.bytes_per_parameter(grad_accum=grad_accum) * n + unused + exact
    embeddings = sum(math.prod(TINY_GPT.parameters[f"transformer.{x}.weight"].shape) for x in ("wte", "wpe"))
    assert exact == (8 * embeddings if name == "adam-8bit-fp32-embeddings" else 0)
    assert bool(scales) == name.startswith("adam-") and all(len(buffer) == math.ceil(n / 256) for buffer in scales)
    for kind, encoding in recipe.state_encodings(grad_accum=grad_accum).items():
        main = state.buffers[kind]
        assert main.dtype == (np.uint8 if f"{kind}_scales" in state.buffers else dtype_of(encoding.partition("-")[0]))
        assert main.shape == (n,)
    assert not any(bits_of(buffer).any() if is_float(buffer) else buffer.any() for buffer in state.buffers.values())


@pytest.mark.parametrize("name", RECIPES)
def test_buffers_are_those_of_the_recipe(name: str) -> None:
    """In the order of its table, each with as many elements as it says."""
    state = state_of(TINY_GPT, name)
    buffers = get_recipe(name).buffers(embeddings=state.layout.embeddings)
    expected = {name: (part.dtype, part.size(TINY_GPT.n_params)) for name, part in buffers.items()}
    assert {name: (buffer.dtype, len(buffer)) for name, buffer in state.buffers.items()} == expected
    assert list(state.buffers) == list(expected)


def test_the_notes_sixteen_bytes() -> None:
    for name in ("fp16", "bf16", "fp32", "amp-fp16"):
        assert state_of(TINY_MLP, name).nbytes == 16 * TINY_MLP.n_params


def test_state_starts_at_update_zero() -> None:
    t = state_of(TINY_MLP, "fp16").t
    assert t == 0 and t.shape == () and t.dtype == np.int64


SEPARATE = {
    "fp16", "bf16", "bf16-moments", "fp16-moments", "megatron-bf16", "apex-o2", "fp16-sums", "fp16-sums-64", "fp8",
    "fp8-delayed", "fp8-e4m3", "fp8-rows", "fp8-rows-dw-bf16", "fp8-blocks", "fp8-14bit", "fp8-14bit-128", "mxfp8",
    "mxfp8-floor", "mxfp6", "mxfp4", "nvfp4",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_master_is_separate_only_where_the_recipe_says_so(name: str) -> None:
    state = state_of(TINY_MLP, name)
    separate = name in SEPARATE
    assert (state.master is state.weights) != separate
    assert np.shares_memory(state.master, state.weights) != separate
    assert state.master_format == format_of(state.master) and state.master_kind == ("master" if separate else "weights")
    assert state.math_format == ("fp64" if name == "fp64" else "fp32")


def test_views_for_the_tape_are_parts_of_the_buffers() -> None:
    state = state_of(TINY_GPT, "bf16")
    for views, buffer in ((state.weight_views, state.weights), (state.grad_views, state.grads)):
        assert list(views) == list(TINY_GPT.parameters)
        assert all(np.shares_memory(view, buffer) for view in views.values())


# --------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", RECIPES)
def test_masters_start_from_the_full_fp32_weights(name: str) -> None:
    state, weights = state_of(TINY_GPT, name), weights_of(TINY_GPT)
    state.load_weights(weights)
    full = state.master_format in ("fp32", "fp64") or name == "bf16-remainder"
    for parameter, master in state.layout.views(state.values(state.master_kind)).items():
        expected = weights[parameter] if full else cast(weights[parameter], state.master_format)
        assert np.array_equal(master, expected), parameter
        if name != "bf16-remainder":  # which rounds ties another way: test_state_encodings.py
            assert np.array_equal(state.weight_views[parameter], cast(master, state.formats["weights"])), parameter


@pytest.mark.parametrize("name", sorted(SEPARATE))
def test_masters_may_start_from_the_rounded_weights(name: str) -> None:
    """Apex's way, and Megatron's: a 16-bit model first, and masters of it."""
    state, other, weights = state_of(TINY_GPT, name), state_of(TINY_GPT, name), weights_of(TINY_GPT)
    state.load_weights(weights, rounded=True)
    other.load_weights(weights)
    assert state.weights.tobytes() == other.weights.tobytes()
    assert state.master.tobytes() == widen(state.weights, "fp32").tobytes()
    assert (state.master != other.master).mean() > 0.5  # all but what 16 bits hold


@pytest.mark.parametrize("name", sorted(set(RECIPES) - SEPARATE))
def test_weights_that_are_their_own_masters_start_the_same_either_way(name: str) -> None:
    starts = []
    for rounded in (False, True):
        state = state_of(TINY_GPT, name)
        state.load_weights(weights_of(TINY_GPT), rounded)
        starts.append(widen(state.values("weights"), "fp64"))
    if name == "bf16-remainder":  # the one in which the weights hold masters of more bits
        assert (starts[1] == widen(cast(starts[0], "bf16"), "fp64")).all() and (starts[0] != starts[1]).mean() > 0.5
    else:
        assert np.array_equal(*starts)


def test_masters_hold_more_than_the_weights_do() -> None:
    state, weights = state_of(TINY_GPT, "bf16"), weights_of(TINY_GPT)
    state.load_weights(weights)
    assert (widen(state.weights) != state.master).mean() > 0.5  # or the test above could not tell the two starts apart


def test_loading_copies() -> None:
    state, weights = state_of(TINY_MLP, "fp32"), weights_of(TINY_MLP)
    state.load_weights(weights)
    before = state.master.copy()
    for value in weights.values():
        value += 1
    assert np.array_equal(state.master, before)


def test_a_missing_weight_is_an_error_that_names_it() -> None:
    state, weights = state_of(TINY_MLP, "fp32"), weights_of(TINY_MLP)
    del weights["h.0.fc.bias"]
    with pytest.raises(UsageError, match=r"h\.0\.fc\.bias"):
        state.load_weights(weights)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_weights_down_rounds_the_masters(name: str) -> None:
    state = state_of(TINY_MLP, name)
    state.master[:] = master = np.random.default_rng(1).standard_normal(state.layout.size).astype(np.float32)
    state.weights_down()
    assert np.array_equal(state.weights, cast(master, name))
    assert np.array_equal(state.master, master)
    state.weights_down()
    assert np.array_equal(state.weights, cast(master, name))


def test_a_monitor_hears_of_each_block_by_the_names_of_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update goes block by block, and blocks end in the middle of parameters: all parts together are the parameters."""
    monkeypatch.setattr(refimpl.optim.layout, "BLOCK", 7)
    state, heard = state_of(TINY_MLP, "pure-bf16"), dict[str, list[np.ndarray]]()
    state.monitor = lambda site, before, after: heard.setdefault(site, []).append(before)
    state.grads[...] = cast(np.random.default_rng(2).standard_normal(state.layout.size), "bf16")
    optimizer = Optimizer(AdamW(weight_decay=0.0), Schedule(lr=1.0, min_lr=1.0, warmup=0, steps=1))
    optimizer.update(state, np.float32(1), 1.0, np.False_)
    for name, view in state.layout.views(state.weights).items():
        values = np.concatenate(heard[f"{name}:update.weights"])
        assert np.array_equal(cast(values, "bf16"), view.reshape(-1)), name


@pytest.mark.parametrize("name", ["fp32", "fp64", "amp-bf16", "pure-bf16", "pure-fp16"])
def test_weights_down_does_nothing_where_the_weights_are_the_masters(name: str) -> None:
    state = state_of(TINY_MLP, name)
    cast(np.random.default_rng(1).standard_normal(state.layout.size), state.master_format, out=state.weights)
    before = state.weights.tobytes()
    for buffer in state.buffers.values():
        buffer.flags.writeable = False  # copying the weights onto themselves is not nothing
    state.weights_down()
    assert state.weights.tobytes() == before


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "amp-fp16"])
def test_the_first_gradients_of_a_step_are_stored_over_what_was_there(name: str) -> None:
    state = state_of(toy(a=(2, 3), b=(4,)), name)
    state.grads[:] = 99.0
    fmt = state.formats["grads"]
    state.zero_grad()
    state.accumulate_grad("b", np.arange(4).astype(dtype_of(fmt)))
    assert np.array_equal(widen(state.grads), [0] * 7 + [1, 2, 3])  # a parameter without a gradient has none, not the last one
    state.accumulate_grad("a", np.full((2, 3), 7).astype(dtype_of(fmt)))
    assert np.array_equal(widen(state.grads), [7] * 6 + [0, 1, 2, 3])
    state.zero_grad()
    assert not state.grads.any()
    state.accumulate_grad("b", cast(np.full(4, -0.0), fmt))
    assert np.signbit(widen(state.grads)).tolist() == [False] * 6 + [True] * 4  # -0 is not added to 0


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp64"])
def test_the_others_are_added_in_fp32_at_least(name: str) -> None:
    state = state_of(toy(a=(2, 2)), name, grad_accum=2)
    fmt = get_recipe(name).state["grads"]
    sum_format = "fp64" if name == "fp64" else "fp32"
    assert format_of(state.grads) == sum_format
    large, small = (np.full((2, 2), x).astype(dtype_of(fmt)) for x in (256.0, 2.0**-6))
    state.zero_grad()
    for gradient in (large, small, small, small):
        state.accumulate_grad("a", gradient)
    assert (state.grads == 256 + 3 * 2.0**-6).all()  # in 16 bits each of these additions would vanish
    assert float((large + small)[0, 0]) == 256.0 or name == "fp64"


def test_a_gradient_that_would_be_rounded_is_refused() -> None:
    state = state_of(toy(a=(2,)), "fp16")
    with pytest.raises(TypeError, match="would round"):
        state.accumulate_grad("a", np.zeros(2, np.float32))
