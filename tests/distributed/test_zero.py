"""Training on several ranks, by ZeRO's stages, on threads: the same algorithm, whatever is divided."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from progress_bars import NoBar
from rank_runs import SIZES, Trained, on_ranks
from recipe_lists import others_slow
from strict_backend import STRICT
from strict_cupy import counter

from refimpl.distributed.collectives import Comm, Serial, share_size
from refimpl.distributed.threads import run_ranks
from refimpl.distributed.zero import COMMUNICATION, SHARDED_FROM, FetchedWeights, ShardedState, exchanged, layers_of, per_rank
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.numerics.casts import cast, widen
from refimpl.optim.gradients import check_and_measure, clip_coefficient
from refimpl.optim.layout import GRAIN
from refimpl.optim.state import State
from refimpl.parity.pytorch import TRAJECTORY
from refimpl.precision.recipes import RECIPES
from refimpl.training.config import Config
from refimpl.training.metrics import read_metrics
from refimpl.training.non_finite import first_non_finite
from refimpl.training.run_folder import CHECKPOINT, METRICS
from refimpl.training.setup import Training
from refimpl.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_blas_thread")
STAGES = (0, 1, 2, 3)
OF_NOTE = ("fp32", "fp16", "bf16")
EIGHT_BIT = next(name for name, recipe in RECIPES.items() if recipe.state.get("m") == "int8-signed")


BAR = math.sqrt(256 / 192) * TRAJECTORY["16 bits"][0]
"""By how much losses of two correct runs in 16 bits may differ in the median, over 192 predictions a step instead of 256."""


def apart(ours: list[float], theirs: list[float]) -> float:
    """The median difference of two runs' losses."""
    return float(np.median(np.abs(np.subtract(ours, theirs))))


def config(recipe: str = "bf16", stage: int | None = 0, **more: Any) -> Config:
    return Config.of({**SIZES, "recipe": recipe, "zero": stage, **more})


@cache
def trained(recipe: str, stage: int | None, ranks: int) -> Trained:
    """Rank 0 of a run, after a look whether all ranks agree."""
    results = on_ranks(config(recipe, stage), ranks)
    assert all(result.same_as(results[0]) for result in results)
    return results[0]


# ------------------------------------------------------------------------------------------------- stages and ranks


NUMBERS = [(ranks, recipe) for ranks in (2, 3, 4) for recipe in OF_NOTE]
OF_EACH_KIND = [(2, "fp32"), (3, "fp16"), (4, "bf16")]
"""Of NUMBERS: each recipe once, and each number of ranks, since what is rounded and what is divided are independent."""


@pytest.mark.parametrize(("ranks", "recipe"), others_slow(NUMBERS, plain=OF_EACH_KIND))
def test_all_stages_have_the_same_bits(ranks: int, recipe: str) -> None:
    first = trained(recipe, 0, ranks)
    for stage in (1, 2, 3):
        assert trained(recipe, stage, ranks).same_as(first), stage
    assert recipe != "fp16" or any(step[2] for step in first.steps[:2])  # it skips a step there, on all ranks


@pytest.mark.parametrize("recipe", OF_NOTE)
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_has_the_bits_of_no_ranks(stage: int, recipe: str) -> None:
    assert trained(recipe, stage, 1).same_as(trained(recipe, None, 1))


LLAMA: dict[str, Any] = {"model": "llama", "n_kv_head": 1, "head_dim": 8, "ffn_dim": 40, "steps": 2}
UNTIED = {**LLAMA, "tied": False, "qk_norm": True, "qkv_bias": True, "checkpointing": "full"}


@pytest.mark.parametrize(("ranks", "recipe", "sizes"), [(2, "fp32", UNTIED), (3, "bf16", LLAMA), (2, "amp-fp16", LLAMA)])
def test_llama_has_the_same_bits_at_all_stages(ranks: int, recipe: str, sizes: dict[str, Any]) -> None:
    """Also with micro-batches, whose gradients stages 2 and 3 sum in another order; and one rank has the bits of no ranks."""
    for grad_accum in (1, 2):
        runs = [on_ranks(config(recipe, stage, grad_accum=grad_accum, **sizes), ranks)[-1] for stage in STAGES]
        assert runs[1].same_as(runs[0]) and runs[3].same_as(runs[2])
        assert grad_accum > 1 or runs[2].same_as(runs[0])
    none, *each = (on_ranks(config(recipe, stage, **sizes), 1)[0] for stage in (None, *STAGES))
    assert all(one.same_as(none) for one in each)


def test_llama_is_divided_by_layers_also_where_blocks_are_computed_again() -> None:
    """At stage 3 a block is fetched once for backward, in which it is computed again; an untied head is a layer of its own."""
    fetched: list[str] = []

    def watch(training: Training, comm: Comm) -> None:
        weights = training.state.weight_views
        assert isinstance(weights, FetchedWeights)
        fetch = weights._fetch

        def counted(layer: Any) -> Any:
            fetched.append(re.sub(r"(?<=\d)\..*|\.weight$", "", next(iter(layer.slots))))
            return fetch(layer)

        weights._fetch = counted  # type: ignore[method-assign]

    on_ranks(config("bf16", 3, **UNTIED | {"steps": 1}), 1, watch)
    layers = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    assert fetched == [*layers, *reversed(layers[:-1])]


DIVIDED = ("fp32", "fp16", "amp-fp16", "bf16-sr", "bf16-remainder", "adam-8bit", "apex-o2", "fp8-delayed", "nvfp4")
"""Of each way to encode states, and to remember scales."""


@pytest.mark.parametrize("recipe", others_slow(RECIPES, plain=DIVIDED))
def test_every_recipe_can_be_divided(recipe: str) -> None:
    """However it keeps its states, and whatever it quantizes: stage 3 has the bits of stage 0, on three ranks."""
    small = {"n_layer": 1, "steps": 2}  # the second has delayed scales from the first
    whole, divided = (on_ranks(config(recipe, stage, **small), 3)[1] for stage in (0, 3))
    assert divided.same_as(whole)
    assert divided.training.state.nbytes < whole.training.state.nbytes


@cache
def learned(recipe: str, ranks: int) -> Trained:
    """Rank 0 of a longer run."""
    return on_ranks(config(recipe, 2, steps=20, warmup=5), ranks)[0]


@pytest.mark.parametrize(("ranks", "recipe"), others_slow(NUMBERS, plain=OF_EACH_KIND))
def test_ranks_learn_what_one_learns(ranks: int, recipe: str) -> None:
    """The whole batch is the same, sums have another order: each rank's share of a gradient is rounded to the buffer's format,
    in FP32 not at all. So the bars are those of two correct runs: `compare_pytorch.TRAJECTORY`, for 192 rows of 256."""
    one, many = learned(recipe, 1), learned(recipe, ranks)
    fewer_rows = math.sqrt(256 / 192)
    loss_bar, drift_bar = (fewer_rows * bar for bar in TRAJECTORY["fp32" if recipe == "fp32" else "16 bits"])
    assert apart(*([step[0] for step in run.steps] for run in (one, many))) <= loss_bar
    assert [step[2] for step in one.steps] == [step[2] for step in many.steps]
    kind = "master." if recipe != "fp32" else "weights."
    start = on_ranks(config(recipe, None, steps=1, lr=1e-30, weight_decay=0.0), 1)[0].arrays
    ends = [{name: widen(x, "fp64") for name, x in run.arrays.items() if name.startswith(kind)} for run in (one, many)]
    between = sum(float(np.square(ends[0][name] - ends[1][name]).sum()) for name in ends[0])
    moved = sum(float(np.square(ends[0][name] - widen(start[name], "fp64")).sum()) for name in ends[0])
    assert 0 < math.sqrt(between / moved) <= drift_bar


@pytest.mark.parametrize("recipe", others_slow(
    ["fp32", "bf16-kahan", "adam-8bit-fp32-embeddings"], plain=["adam-8bit-fp32-embeddings"]
))  # fmt: skip
def test_ranks_for_which_nothing_is_left(recipe: str) -> None:
    """Three grains and seven ranks: four have no share, and train along."""
    small = {"n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": 4, "batch_size": 14, "steps": 2}
    whole = on_ranks(config(recipe, 0, **small), 7)
    for stage in (1, 2, 3):
        divided = on_ranks(config(recipe, stage, **small), 7)
        assert all(result.same_as(whole[0]) for result in divided)
        shares = [result.training.state.share for result in divided]
        assert [share.stop > share.start for share in shares] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(("stage", "victim"), others_slow(product(STAGES, range(3)), plain=[(0, 1), (1, 0), (2, 2), (3, 1)]))
def test_an_infinity_on_one_rank_skips_the_step_on_all(stage: int, victim: int) -> None:
    def spoil(training: Training, comm: Comm) -> None:
        if comm.rank != victim:
            return
        accumulate, step = training.state.accumulate_grad, iter(range(100))

        def spoiled(name: str, gradient: np.ndarray) -> None:
            if name == "transformer.h.1.attn.c_proj.weight" and next(step) == 2:  # which has one gradient per step
                gradient = gradient.copy()
                gradient[3, 3] = np.inf
            accumulate(name, gradient)

        training.state.accumulate_grad = spoiled  # type: ignore[method-assign]

    results = on_ranks(config("fp16", stage, init_scale=1024.0), 3, spoil)
    assert all([step[2] for step in result.steps] == [False, False, True, False] for result in results)
    assert all(result.same_as(results[0]) and float(result.training.loss_scale.scale) == 512 for result in results)


# ---------------------------------------------------------------------------------------- each of these can go wrong


def _in_16_bits(pieces: Any) -> Any:
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total


WRONG: dict[str, tuple[str, Any]] = {
    "the norm of the own share": ("refimpl.distributed.zero.ShardedState.gather_grains", lambda self, *grains: grains),
    "weights that do not go round": ("refimpl.distributed.zero.ShardedState.weights_down", State.weights_down),
    "gradients that are not summed": ("refimpl.distributed.collectives.add_up", lambda pieces: pieces[0]),
    "gradients summed in 16 bits": ("refimpl.distributed.collectives.add_up", _in_16_bits),
    "a mean over ranks, not over the batch": ("refimpl.distributed.zero.ShardedState.ranks", 1),
    "weights that stay as they were fetched": ("refimpl.distributed.zero.FetchedWeights.forget", lambda self: None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_between_ranks_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shows in a run of three ranks, or in that these differ, or that one of them has no weights to begin with."""
    target, wrong = WRONG[name]
    stage = 3 if "fetched" in name else 1
    right = trained("bf16", stage, 3)
    if name == "weights that stay as they were fetched":
        monkeypatch.setattr(FetchedWeights, "_layer", None, raising=False)
        monkeypatch.setattr(FetchedWeights, "_values", None, raising=False)
    if target.endswith("ranks"):
        monkeypatch.setattr(ShardedState, "ranks", property(lambda self: 1, lambda self, value: None))
    else:
        monkeypatch.setattr(target, wrong)
    found = on_ranks(config("bf16", stage), 3)
    assert not all(result.same_as(right) for result in found)


# ------------------------------------------------------------------------------------------- sums that are exact


class Whole:
    """A model of a few parameters whose gradients are handed in: none of it is run."""

    def __init__(self, n: int) -> None:
        table = gpt_model(GPTConfig(1, 1, 8, 4)).parameters
        spec = next(iter(table.values()))
        shapes = {"a.0.w": (n, 3), "a.1.w": (n,), "b.w": (5, n)}
        self.parameters = {name: replace(spec, shape=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("recipe", OF_NOTE)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_that_sum_exactly_give_the_same_bits_on_any_number_of_ranks(stage: int, recipe: str) -> None:
    """Twelfths of the batch have whole numbers as gradients; a rank's share is the sum of its twelfths, however many it has."""
    model, made = Whole(700), config(recipe, stage)
    names, rng = list(model.parameters), np.random.default_rng(0)
    twelfths = [{n: rng.integers(-9, 10, model.parameters[n].shape).astype(np.float32) for n in names} for _ in range(12)]
    start = {n: rng.standard_normal(model.parameters[n].shape).astype(np.float32) for n in names}

    def updated(comm: Comm) -> list[bytes]:
        backend = made.make_backend()
        stored = made.make_recipe().state_encodings(("m", "v"), 1)
        state = ShardedState(model, stored, backend, 0, comm, stage)
        state.load_weights(start)
        optimizer = made.make_optimizer(backend)
        for _ in range(2):
            state.zero_grad()
            mine = np.array_split(range(12), comm.size)[comm.rank]
            for name in reversed(names):
                share = np.sum([twelfths[i][name] for i in mine], axis=0, dtype=np.float32)
                state.accumulate_grad(name, cast(share, state.formats["grads"]))
            state.reduce(np.float32(0))
            found_inf, norm = check_and_measure(state, np.float32(0.25))
            optimizer.update(state, np.float32(0.25), clip_coefficient(norm, 1.0), found_inf)
            state.weights_down()
        return [state.gather(kind, "").tobytes() for kind in ("weights", "m", "v")]

    expected = updated(Serial())
    for ranks in (2, 3, 4):
        assert all(result == expected for result in run_ranks(ranks, updated))


# -------------------------------------------------------------------------------------------------- memory, bytes


@pytest.mark.parametrize("recipe", [*OF_NOTE, "amp-bf16", "apex-o2", "bf16-kahan", "bf16-remainder", EIGHT_BIT])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_bytes_on_each_rank_are_the_formulas_and_the_padding(stage: int, ranks: int, recipe: str) -> None:
    made = config(recipe, stage)
    states, n = made.make_recipe().bytes_by_buffer(), made.make_model().n_params
    expected = per_rank(n, states, stage, ranks)
    padding = share_size(n, ranks, GRAIN) - -(-n // ranks)
    assert 0 <= padding < GRAIN

    def measured(comm: Comm) -> dict[str, int]:
        return {name: x.nbytes for name, x in made.make_training(made.make_backend(), comm).state.buffers.items()}

    for buffers in [measured(Serial())] if ranks == 1 else run_ranks(ranks, measured):
        for name, nbytes in buffers.items():
            divided = stage >= SHARDED_FROM.get(name, 1)
            more = states[name] * padding if divided else 0
            assert expected[name] <= nbytes <= expected[name] + more + (4 if states[name] < 1 else 0), name
            assert nbytes == expected[name] + more or states[name] < 1, name  # to the byte; scales are whole numbers


def test_ranks_share_the_fp32_moments_of_embeddings_and_hold_no_more() -> None:
    """They lie in the shares of the first ranks."""
    made = config("adam-8bit-fp32-embeddings", 1)
    embeddings = made.make_training(made.make_backend(), Serial()).state.layout.embeddings

    def measured(comm: Comm) -> int:
        return int(made.make_training(made.make_backend(), comm).state.buffers["v_embeddings"].nbytes)

    held = run_ranks(3, measured)
    assert sum(held) == 4 * embeddings and held == sorted(held, reverse=True)


def test_the_formulas_of_the_paper() -> None:
    """16, 4 + 12/N, 2 + 14/N, 16/N; fp32 at stage 1: 8 + 8/N."""
    n, ranks = 4 * 1024 * 100, 4
    for recipe, totals in (("bf16", (16, 7, 5.5, 4)), ("fp32", (16, 10, 7, 4))):
        states = config(recipe).make_recipe().bytes_by_buffer()
        assert [sum(per_rank(n, states, stage, ranks).values()) / n for stage in STAGES] == list(totals)


EXCHANGES = list(product(STAGES, (2, 3, 4), ("fp32", "bf16"), (1, 3)))
OF_EACH_STAGE = [(stage, *case) for stage in STAGES for case in ((2, "fp32", 1), (3, "bf16", 3), (4, "bf16", 1))]
"""Of EXCHANGES: in each stage each number of ranks once, each size of a gradient, and micro-batches."""


@pytest.mark.parametrize(("stage", "ranks", "recipe", "grad_accum"), others_slow(EXCHANGES, plain=OF_EACH_STAGE))
def test_bytes_that_are_exchanged_are_those_predicted(stage: int, ranks: int, recipe: str, grad_accum: int) -> None:
    """On average over ranks; and for each step the sums and flags of the grains, and the loss."""
    made = config(recipe, stage, grad_accum=grad_accum, n_layer=1, steps=2)
    results, n = on_ranks(made, ranks), made.make_model().n_params
    states = made.make_recipe().bytes_by_buffer(grad_accum=grad_accum)
    again = math.prod(made.make_model().parameters["transformer.wte.weight"].shape)
    predicted = exchanged(n, states, stage, ranks, again, grad_accum)
    grains = (4 + 1) * math.ceil(n / GRAIN) * (ranks - 1) / ranks if stage else 0
    loss = 2 * (4 + 4) * (ranks - 1) / ranks  # and the number of targets that it is the mean over
    counted = sum(result.received for result in results) / ranks / len(results[0].steps)
    assert counted == pytest.approx(float(predicted) + grains + loss, rel=1e-9)
    assert grad_accum > 1 or float(predicted) / (n * 4 if recipe == "fp32" else n * 2) * ranks / (ranks - 1) == pytest.approx(
        COMMUNICATION[stage] + (again / n if stage == 3 else 0)
    )


def test_stage_3_holds_one_layer_at_a_time() -> None:
    """Weights are fetched layer by layer, and those of the layer before are gone; 3 L + 5 times per step for L layers."""
    largest, fetched = [], []

    def watch(training: Training, comm: Comm) -> None:
        weights = training.state.weight_views
        assert isinstance(weights, FetchedWeights)
        fetch = weights._fetch

        def counted(layer: Any) -> Any:
            assert weights._values is None
            values = fetch(layer)
            if comm.rank == 0:
                largest.append(values.size)
                fetched.append(next(iter(layer.slots)))
            return values

        weights._fetch = counted  # type: ignore[method-assign]

    made = config("bf16", 3, steps=1)
    on_ranks(made, 2, watch)
    sizes = [layer.size for layer in layers_of(on_ranks(made, 1)[0].training.state.layout)]
    assert max(largest) == max(sizes) < sum(sizes) / 2
    embeddings = ["transformer.wte.weight", "transformer.wpe.weight"]
    blocks = ["transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.weight", "transformer.ln_f.weight"]
    assert fetched == [*embeddings, *blocks, embeddings[0], *reversed(blocks), *reversed(embeddings)]


# -------------------------------------------------------------------------------------------------------- checkpoints


class StopsAt(NoBar):
    """A progress bar that asks for the end of a run, as Ctrl-C does to one rank."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        super().__init__()
        self.trainer, self.step = trainer, step

    def update(self, n: int = 1) -> None:
        if self.trainer.progress.step == self.step and self.trainer.comm.rank == self.trainer.comm.size - 1:
            self.trainer.stop.asked = True



RESUMED = [(recipe, "gpt") for recipe in ("fp16", "bf16-sr", "fp8-delayed", EIGHT_BIT, "adam-8bit-fp32-embeddings")]
RESUMED_PLAIN = {("fp16", "gpt"), ("fp8-delayed", "gpt"), ("adam-8bit-fp32-embeddings", "gpt"), ("bf16", "llama")}


@pytest.mark.parametrize(("recipe", "model"), others_slow([*RESUMED, ("bf16", "llama")], plain=RESUMED_PLAIN))
def test_stopped_and_resumed_it_goes_on_bit_for_bit(
    recipe: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On three ranks, of which the last is told to stop; on as many it ends where it would have ended, on two it goes on."""
    monkeypatch.setattr("refimpl.training.evaluate.WHOLE_TEXT", 0)
    sizes = {**(UNTIED if model == "llama" else {}), "n_layer": 1, "steps": 6}
    made = config(recipe, 2, log_every=2, eval_every=100, eval_batches=1, **sizes)
    whole, parts, fewer = (tmp_path / name for name in ("whole", "parts", "fewer"))
    for folder in (whole, parts, fewer):
        folder.mkdir()

    def go_on(folder: Path, stop: int, resume: bool) -> Any:
        def of_rank(comm: Comm) -> int:
            trainer = Trainer(made, folder, comm)
            if resume:
                trainer.restore()
            trainer.train(StopsAt(trainer, stop))
            return trainer.progress.step

        return of_rank

    assert run_ranks(3, go_on(whole, 100, resume=False)) == [6] * 3
    assert run_ranks(3, go_on(parts, 4, resume=False)) == [4] * 3
    for name in (CHECKPOINT, METRICS):
        (fewer / name).write_bytes((parts / name).read_bytes())
    assert run_ranks(3, go_on(parts, 100, resume=True)) == [6] * 3
    assert (parts / CHECKPOINT).read_bytes() == (whole / CHECKPOINT).read_bytes()
    assert run_ranks(2, go_on(fewer, 100, resume=True)) == [6] * 2
    ours, theirs = ([row["loss"] for row in read_metrics(folder).steps] for folder in (fewer, whole))
    assert ours[:4] == theirs[:4]
    assert apart(ours, theirs) <= BAR  # two ranks add in another order than three


# ------------------------------------------------------------------------------------------ micro-batches, parameters


@pytest.mark.parametrize("pair", [(0, 1), (2, 3)])
def test_micro_batches_sum_over_ranks_before_or_after(pair: tuple[int, int]) -> None:
    one, other = (on_ranks(config("bf16", stage, grad_accum=3, batch_size=6), 3)[0] for stage in pair)
    assert one.same_as(other)


def test_micro_batches_at_any_stage_train_alike() -> None:
    """In FP32 the two orders differ in last bits; BF16 gradients, whose FP32 sums are mostly exact, mostly do not."""
    early, late = (on_ranks(config("fp32", stage, grad_accum=3, batch_size=6), 3)[0] for stage in (0, 2))
    assert not early.same_as(late)
    assert all(abs(a[0] - b[0]) < 1e-5 for a, b in zip(early.steps, late.steps, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_names_the_first_bad_gradient_of_all(stage: int) -> None:
    made = config("bf16", stage)

    def first(comm: Comm) -> list[str | None]:
        state, names = made.make_training(made.make_backend(), comm).state, []
        for bad in ((), ("transformer.ln_f.bias",), ("transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.weight")):
            state.zero_grad()
            for name in bad:
                shape = made.make_model().parameters[name].shape
                state.accumulate_grad(name, cast(np.full(shape, np.inf if comm.rank == 1 else 0, np.float32), "bf16"))
            state.reduce(np.float32(0))
            names.append(first_non_finite(state))
        return names

    assert run_ranks(3, first) == [[None, "transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.weight"]] * 3


def test_a_parameter_without_a_gradient_has_one_of_zero_at_any_stage() -> None:
    made = config("bf16", 2)

    def gradients(comm: Comm) -> np.ndarray:
        state = made.make_training(made.make_backend(), comm).state
        state.grads[...] = 7  # of the step before
        state.zero_grad()
        state.accumulate_grad("transformer.ln_f.bias", cast(np.full(32, comm.rank + 1, np.float32), "bf16"))
        state.reduce(np.float32(0))
        return state.gather("grads", "")

    for whole in run_ranks(3, gradients):
        start, stop, _ = made.make_training(made.make_backend()).state.layout.slots["transformer.ln_f.bias"]
        assert (widen(whole[start:stop]) == 1 + 2 + 3).all()
        assert not widen(whole[:start]).any() and not widen(whole[stop:]).any()


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_without_a_gradient_in_one_micro_batch_has_the_sum_of_the_others(stage: int) -> None:
    """Micro-batches follow one another without a sign: the next one begins with a gradient that this one has had already."""
    made = config("bf16", stage, grad_accum=3)
    names = ("transformer.ln_f.weight", "transformer.ln_f.bias", "transformer.wpe.weight")
    parameters = made.make_model().parameters

    def gradients(comm: Comm) -> tuple[int, np.ndarray]:
        state = made.make_training(made.make_backend(), comm).state
        for _ in range(2):  # the second step sees nothing of the first
            state.zero_grad()
            for micro_batch in ((0, 1, 2), (0, 2), (0,), (0, 1)):
                for i in micro_batch:
                    value = np.full(parameters[names[i]].shape, comm.rank + 1, np.float32)
                    state.accumulate_grad(names[i], cast(value, "bf16"))
            assert state.reduce(np.float32(comm.rank)) == 0 + 1 + 2
        return state.first, np.array(state.grads)

    layout = made.make_training(made.make_backend()).state.layout
    expected = np.zeros(layout.size, np.float32)
    for name, times in zip(names, (4, 2, 2), strict=True):
        layout.views(expected)[name][...] = times * (1 + 2 + 3)
    for first, grads in run_ranks(3, gradients):
        assert grads.size and np.array_equal(grads, expected[first : first + grads.size])


def test_layers_are_numbered_blocks_and_single_modules() -> None:
    layout = on_ranks(config("bf16", 3), 1)[0].training.state.layout
    layers = list(layers_of(layout))
    names = [{re.sub(r"(\.\d+)?\.[^.]*$|(?<=\d)\..*", r"\1", name) for name in layer.slots} for layer in layers]
    assert names == [{f"transformer.{part}"} for part in ("wte", "wpe", "h.0", "h.1", "ln_f")]
    assert layers[0].span.start == 0 and layers[-1].span.stop == layout.size
    assert all(a.span.stop == b.span.start for a, b in pairwise(layers))


# ------------------------------------------------------------------------------------------------- other backends


@cache
def on_devices(recipe: str, stage: int) -> Trained:
    """Rank 0 of two, on the stand-in for CuPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "make_backend", lambda self: STRICT)
        return on_ranks(config(recipe, stage, steps=3), 2)[0]


ON_DEVICES = [(recipe, stage) for recipe in ("fp16", "bf16", "fp32", "bf16-kahan") for stage in STAGES]


@pytest.mark.parametrize(
    ("recipe", "stage"), others_slow(ON_DEVICES, plain=[("fp16", 0), ("fp16", 3), ("fp32", 3), ("bf16-kahan", 2)])
)
def test_ranks_with_devices(recipe: str, stage: int) -> None:
    """The same on the stand-in for CuPy: kernels are launched on shards. All stages have the same bits there too."""
    device, host = on_devices(recipe, stage), on_ranks(config(recipe, stage, steps=3), 2)[0]
    assert device.same_as(on_devices(recipe, 0))
    assert [step[2] for step in device.steps] == [step[2] for step in host.steps]
    assert apart(*([step[0] for step in run.steps] for run in (device, host))) <= BAR  # kernels add in another order


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "make_backend", lambda self: STRICT)

    def waits(training: Training, comm: Comm) -> None:
        step = training.step

        def counted(batches: Any) -> Any:
            before = counter.syncs
            result = step(batches)
            assert counter.syncs == before
            return result

        training.step = counted  # type: ignore[method-assign]

    for stage in STAGES:
        on_ranks(config("fp16", stage, steps=2), 1, waits)


# ---------------------------------------------------------------------------------------------------------- errors


def test_a_batch_that_cannot_be_shared_and_a_stage_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="--batch-size 12 is not a multiple of 5, the number of ranks"):
        on_ranks(config("bf16", 1), 5)
    with pytest.raises(UsageError, match="--mistake works on one rank only"):
        config("bf16", 1, mistake="no-masters")
    with pytest.raises(UsageError, match="--zero is 4: it must be a ZeRO stage, 0, 1, 2 or 3"):
        config("bf16", 4)
