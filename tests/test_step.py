"""refimpl.step: the whole algorithm on tiny models: every recipe learns, an overflow costs steps and nothing else.

Runs are seeded and deterministic; comparisons of bits have no tolerance, the others say where theirs comes from.
"""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
from hand_training import Training
from recipe_lists import MECHANISMS, others_slow
from strict_backend import BACKENDS, STRICT

import refimpl.optim.layout
from refimpl.backends.base import Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.numerics.casts import cast, widen
from refimpl.optim.adamw import AdamW
from refimpl.optim.gradients import check_and_measure
from refimpl.optim.loss_scalers import make_loss_scale
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.precision.recipes import RECIPES
from refimpl.step import Batch

VOCABULARY = 17
HOST_ONLY = [
    "adam-8bit", "adam-8bit-fp32-embeddings", "adam-fp8",
    "fp8", "fp8-delayed", "fp8-e4m3", "fp8-rows", "fp8-rows-dw-bf16", "fp8-blocks",
    "mxfp8", "mxfp8-floor", "mxfp6", "mxfp4", "nvfp4", "fp8-14bit", "fp8-14bit-128", "fp16-sums", "fp16-sums-64",
]  # fmt: skip
"""Recipes that a device refuses: states in 8-bit codes, operands that are quantized, other sums."""
OF_FP16 = ("fp16", "pure-fp16", "amp-fp16", "amp-fp16-cpu", "apex-o2", "fp16-sums", "fp16-sums-64")
EVERYWHERE = [recipe for recipe in RECIPES if recipe not in HOST_ONLY]
GPT = gpt_model(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=VOCABULARY))
SHALLOW = gpt_model(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=VOCABULARY))
MLP = mlp_model(MLPConfig(n_layer=1, n_embd=8, block_size=8, vocab_size=VOCABULARY))
MODELS = {"gpt": GPT, "mlp": MLP}
RUNS = [
    (recipe, name, model)
    for recipe in RECIPES for name in BACKENDS for model in MODELS
    if name == "numpy" or recipe in EVERYWHERE
]  # fmt: skip
OF_EACH_KIND = [
    *((recipe, "numpy", "gpt") for recipe in MECHANISMS),
    *((recipe, "strict", "gpt") for recipe in ("fp16", "amp-fp16", "bf16-sr", "adam-8bit")),
    *((recipe, "numpy", "mlp") for recipe in ("fp32", "fp16", "bf16", "amp-fp16", "mxfp8")), ("fp16", "strict", "mlp"),
]  # fmt: skip
"""Of RUNS: every mechanism in the model that has nearly all operations; the other in each format, under autocast, quantized.
That a device computes what the host does is what test_strict_backend.py holds."""


def batch(seed: int = 1, rows: int = 4) -> Batch:
    text = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, 9))
    return text[:, :-1], text[:, 1:]


# --------------------------------------------------------------------------------------------------------- it is learned


@pytest.mark.parametrize(("recipe", "backend", "model"), others_slow(RUNS, plain=OF_EACH_KIND), indirect=["backend"])
def test_every_recipe_learns_a_repeated_batch(recipe: str, model: str, backend: Backend) -> None:
    small = {"gpt": SHALLOW, "mlp": MLP}[model]
    training, data = Training(backend, small, recipe), batch()
    results = [training.step(data) for _ in range(24)]
    losses = [float(result.loss) for result in results]
    # Before training the model knows nothing: log 17 = 2.83. In 24 steps a quarter of that is learned by all, the pure
    # 16-bit recipes included: at this learning rate their updates are larger than half an ulp. So do the weak ones, of few
    # bits a product and with moments that vanish: what they lose is noise, and a batch that is repeated forgives it.
    assert abs(losses[0] - math.log(VOCABULARY)) < 0.2
    assert losses[-1] < 0.75 * losses[0], losses
    n = small.n_params
    exact = sum(x.nbytes for kind, x in training.state.buffers.items() if kind.endswith("_embeddings"))
    assert training.state.nbytes - RECIPES[recipe].bytes_per_parameter() * n == last_scales(recipe, n) + exact
    skipped = sum(bool(result.skipped) for result in results)
    assert int(training.state.t) == 24 - skipped
    assert skipped <= (3 if RECIPES[recipe].loss_scale == "dynamic" else 0)  # the dynamic scale starts high and finds its place


def last_scales(recipe: str, n: int) -> float:
    """The bytes that the last, incomplete block of 256 moments takes beyond its share of an FP32 scale, for m and for v."""
    return 2 * 4 * (math.ceil(n / 256) - n / 256) if recipe.startswith("adam-") else 0


@pytest.mark.parametrize("recipe", HOST_ONLY)
def test_a_device_refuses_what_it_does_not_know(recipe: str) -> None:
    with pytest.raises(UsageError, match="--backend strict ") as caught:
        Training(STRICT, MLP, recipe)
    assert "\n" not in str(caught.value)
    row = RECIPES[recipe]
    policy, moments = f"policy {row.policy.name}: give --backend numpy", f"this recipe stores m as {row.state['m']}"
    assert str(caught.value).endswith(moments if row.policy.name == "bf16" else policy)


@pytest.mark.parametrize("model", MODELS)
def test_recipes_agree_at_first(model: str, backend: Backend) -> None:
    # The loss of the first step, before any update, differs from fp64's only by the rounding of weights and activations:
    # fp32 by some 1e-7, 16-bit formats by their eps times a small factor (errors of a few dozen roundings, averaged in part).
    # Layers of fewer bits lie before a 16-bit one whose results are near 0 at first, whatever it reads: no more is allowed.
    data = batch()
    recipes = RECIPES if backend.on_host else EVERYWHERE
    first = {recipe: float(Training(backend, MODELS[model], recipe).step(data).loss) for recipe in recipes}
    for recipe, loss in first.items():
        eps = {"fp64": 2.0**-52, "fp32": 2.0**-23}.get(recipe, 2.0**-10 if recipe in OF_FP16 else 2.0**-7)
        allowed = max(eps, 2.0**-23)  # the fp64 run starts from fp32 weights too, but its sums and the others' differ
        assert abs(loss - first["fp64"]) <= 8 * allowed * first["fp64"], recipe
        # How states are kept has no part in it: where operations are the same, so is every bit.
        same = {"bf16": "bf16", "fp16": "fp16"}.get(RECIPES[recipe].policy.name, recipe)
        assert loss == first[same], recipe


def largest_move(recipe: str) -> float:
    """Of 30 steps the largest change of a master, in learning rates."""
    training, data, lr, largest = Training(NUMPY, GPT, recipe, rule=AdamW(weight_decay=0.0)), batch(), 3e-3, 0.0
    for _ in range(30):
        before = training.host("master")
        training.step(data)
        largest = max(largest, float(np.abs(training.host("master") - before).max()) / lr)
    return largest


def test_squares_vanish_in_fp16_moments_and_updates_grow() -> None:
    """v in FP16 is 0 where (1 - beta2) g^2 <= 2^-25, |g| < 7.7e-4. Then the next update divides by its own gradient alone.

    With all of v, |update| / lr <= sqrt(1 - b2^t) / (1 - b1^t) (1 - b1) / sqrt(1 - b2) sqrt((1 - r^t) / (1 - r)) with
    r = b1^2 / b2, by Cauchy and Schwarz: at most 1.17. BF16 moments are wrong by 2^-9 for each of the some 20 steps that
    they remember: a tenth more is more than that can make. In FP16 there is no bound but 1 / eps.
    """
    v = {}
    for recipe in ("bf16", "bf16-moments", "fp16-moments"):
        training = Training(NUMPY, GPT, recipe)
        training.step(batch())
        v[recipe] = training.host("v")
    for recipe, fmt in (("bf16-moments", "bf16"), ("fp16-moments", "fp16")):
        assert v[recipe].tobytes() == cast(v["bf16"], fmt).tobytes()
    lost = {recipe: float(((kept == 0) & (v["bf16"] > 0)).mean()) for recipe, kept in v.items()}
    moves = {recipe: largest_move(recipe) for recipe in v}
    print(f"v lost: {lost}; largest moves: {moves}")
    assert lost["bf16-moments"] == 0 < lost["fp16-moments"]
    r = 0.81 / 0.95
    bound = max(
        math.sqrt(1 - 0.95**t) / (1 - 0.9**t) * 0.1 / math.sqrt(0.05) * math.sqrt((1 - r**t) / (1 - r)) for t in range(1, 31)
    )
    assert max(moves["bf16"], moves["bf16-moments"]) < 1.1 * bound < 1.3 < moves["fp16-moments"] / 2


# ------------------------------------------------------------------------------------------------------------- the result


def test_the_result_says_what_happened(backend: Backend) -> None:
    training, data = Training(backend, GPT, "fp16", rule=AdamW(), lr=1e-3), batch()
    result = training.step(data)
    assert [field.name for field in dataclasses.fields(result)] == ["loss", "lr", "loss_scale", "grad_norm", "skipped"]
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        assert value.shape == (), field.name  # 0-d: arrays or NumPy scalars
    assert float(result.lr) == 1e-3
    assert float(result.loss_scale) == 65536.0 and not result.skipped
    assert abs(float(result.loss) - math.log(VOCABULARY)) < 0.2
    # the norm is of unscaled gradients: it is not 65536 times too large
    _, norm = check_and_measure(training.state, *training.there(np.float32(2.0**-16)))
    assert result.grad_norm == norm and 0.01 < float(norm) < 10


def test_the_result_holds_the_scale_that_this_step_used(backend: Backend) -> None:
    training, data = Training(backend, MLP, "fp16", loss_scale="dynamic", init_scale=1024.0, growth_interval=2), batch()
    scales = [float(training.step(data).loss_scale) for _ in range(5)]
    assert scales == [1024.0, 1024.0, 2048.0, 2048.0, 4096.0]


def test_the_schedule_is_followed(backend: Backend) -> None:
    training, data = Training(backend, MLP, "bf16"), batch()
    schedule = Schedule(1e-2, 1e-3, 2, 6)
    training.optimizer = Optimizer(AdamW(), schedule, backend.xp)
    assert [float(training.step(data).lr) for _ in range(6)] == [schedule(t) for t in range(6)]


def test_runs_are_reproducible(backend: Backend) -> None:
    results = []
    for _ in range(2):
        training = Training(backend, GPT, "fp16")
        for seed in range(3):
            training.step(batch(seed))
        results.append(training.bits())
    assert results[0] == results[1]


# ----------------------------------------------------------------------------------------------------------- overflow


@pytest.mark.parametrize("model", MODELS)
def test_an_overflow_skips_and_backs_off_then_trains(model: str, backend: Backend) -> None:
    training, data = Training(backend, MODELS[model], "fp16", loss_scale="dynamic", init_scale=2.0**40), batch()
    training.step(data)  # to fill `weights`, which the first step writes
    before = training.bits("grads")
    scale, skips, result = 2.0**39, 1, training.step(data)
    while result.skipped:
        assert float(result.loss_scale) == scale
        assert not math.isfinite(float(result.grad_norm))
        assert training.bits("grads") == before  # weights, master, m, v and t: not one bit
        assert float(result.lr) == 3e-3
        scale, skips = scale / 2, skips + 1
        assert float(training.loss_scale.scale) == scale
        assert skips < 40, "never found a scale that fits"
        result = training.step(data)
    print(f"{model}: {skips} steps skipped, trains at 2^{math.log2(scale):.0f}")
    assert skips >= 5
    assert int(training.state.t) == 1
    losses = [float(training.step(data).loss) for _ in range(25)]
    assert losses[-1] < 0.8 * math.log(VOCABULARY)


def test_an_injected_inf_in_one_weight_gradient_is_enough(backend: Backend) -> None:
    training, data = Training(backend, MLP, "fp16"), batch()
    training.step(data)
    accumulate = training.state.accumulate_grad

    def spoiled(name: str, gradient: np.ndarray) -> None:
        if name == "lm_head.bias":
            gradient = gradient.copy()
            gradient[-1] = math.inf
        accumulate(name, gradient)

    before = training.bits("grads", "weights")
    training.state.accumulate_grad = spoiled
    assert training.step(data).skipped
    assert training.bits("grads", "weights") == before
    assert float(training.loss_scale.scale) == 32768.0
    del training.state.accumulate_grad
    assert not training.step(data).skipped
    assert int(training.state.t) == 2


def test_a_static_scale_skips_but_does_not_adapt(backend: Backend) -> None:
    training, data = Training(backend, MLP, "fp16", loss_scale=str(2.0**40)), batch()
    for _ in range(3):
        assert training.step(data).skipped
    assert int(training.state.t) == 0 and float(training.loss_scale.scale) == 2.0**40


# ------------------------------------------------------------------------------------------------------- loss scaling


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "amp-bf16"])
def test_a_power_of_two_changes_no_bit_where_nothing_overflows_or_vanishes(recipe: str, model: str, backend: Backend) -> None:
    data, results = batch(), []
    for scale in ("none", "1024"):
        training = Training(backend, MODELS[model], recipe, loss_scale=scale)
        losses = [float(training.step(data).loss) for _ in range(5)]
        results.append((losses, training.bits("grads")))
    assert results[0] == results[1]


def test_another_scale_does_change_bits(backend: Backend) -> None:
    # negative control: 1000 is no power of two, so gradients are rounded elsewhere
    bits = []
    for scale in ("none", "1000"):
        training = Training(backend, MLP, "fp32", loss_scale=scale)
        training.step(batch())
        bits.append(training.bits("grads"))
    assert bits[0] != bits[1]


def test_without_a_scale_small_fp16_gradients_vanish(backend: Backend) -> None:
    # a loss 2^-20 times as large, made by the seed: in fp16 most gradients fall below 2^-25 and become zero; scaled by
    # 2^16 or held in bf16 most survive
    zeros = {}
    for recipe, seed in (("fp16", 2.0**-20), ("fp16", 2.0**-4), ("bf16", 2.0**-20)):
        training = Training(backend, GPT, recipe)
        training.forward_backward(batch(), S=seed)
        zeros[recipe, seed] = float((widen(training.host("grads")) == 0).mean())
    print(zeros)
    assert zeros["fp16", 2.0**-20] > 0.9
    # the rows of wte and wpe that no token touched are zero in all; what is lost beside them is less than a tenth
    assert zeros["fp16", 2.0**-4] < zeros["bf16", 2.0**-20] + 0.1


# ------------------------------------------------------------------------------------------------- several micro-batches


@pytest.mark.parametrize("model", MODELS)
def test_two_micro_batches_are_one_of_double_size(model: str, backend: Backend) -> None:
    tokens, targets = batch(rows=8)
    halves = [(tokens[:4], targets[:4]), (tokens[4:], targets[4:])]
    gradients, losses, weights = [], [], []
    for batches in ([(tokens, targets)], halves):
        training = Training(backend, MODELS[model], "fp64", grad_accum=len(batches), rule=SGD(momentum=0.9), lr=0.1)
        losses.append(float(training.step(*batches).loss))
        gradients.append(training.host("grads"))
        training.step(*batches)
        weights.append(training.host("master"))
    # double precision: some hundred additions in another order, each 2^-53 of numbers no larger than the largest
    for a, b in (gradients, weights):
        assert np.abs(a - b).max() <= 1e-12 * np.abs(a).max()
    assert abs(losses[0] - losses[1]) <= 1e-12 * losses[0]


@pytest.mark.parametrize("n", [3, 5])
def test_micro_batches_that_are_no_power_of_two(n: int, backend: Backend) -> None:
    tokens, targets = batch(rows=4 * n)
    parts = [(tokens[i : i + 4], targets[i : i + 4]) for i in range(0, 4 * n, 4)]
    gradients = []
    for batches in ([(tokens, targets)], parts):
        training = Training(backend, MLP, "fp64", grad_accum=len(batches))
        training.step(*batches)
        gradients.append(training.host("grads"))
    # the seed S/n is an fp32 number in every recipe: one rounding, 2^-24 of every gradient
    assert np.abs(gradients[0] - gradients[1]).max() <= 2.0**-24 * np.abs(gradients[0]).max()


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_micro_batches_are_summed_in_fp32(recipe: str, backend: Backend) -> None:
    tokens, targets = batch(rows=8)
    training = Training(backend, MLP, recipe, grad_accum=2)
    training.step((tokens[:4], targets[:4]), (tokens[4:], targets[4:]))
    sums = training.host("grads")
    assert sums.dtype == np.float32
    assert (sums != widen(cast(sums, recipe))).mean() > 0.1  # sums that 16 bits do not hold
    assert training.state.nbytes == 18 * MLP.n_params


@pytest.mark.parametrize("recipe", ["fp16", "pure-bf16"])
def test_a_state_for_one_micro_batch_refuses_a_second(recipe: str) -> None:
    """It would be summed in 16 bits."""
    training = Training(NUMPY, MLP, recipe)
    with pytest.raises(UsageError, match=r"several micro-batches: State needs state_encodings\(grad_accum=...\)"):
        training.step(batch(1), batch(2))
    Training(NUMPY, MLP, "fp32").step(batch(1), batch(2))  # FP32 gradients are summed as they are


def test_a_step_without_micro_batches_is_refused() -> None:
    training = Training(NUMPY, MLP, "fp16")
    before = training.bits()
    with pytest.raises(UsageError, match="no micro-batches: a step needs at least one"):
        training.step()
    assert training.bits("grads") == {kind: bits for kind, bits in before.items() if kind != "grads"}


def test_gradients_of_the_last_step_are_forgotten(backend: Backend) -> None:
    one, other = (Training(backend, MLP, "fp32", grad_accum=2) for _ in range(2))
    parts = [batch(2), batch(3)]
    one.forward_backward(batch(7), batch(8))
    for training in (one, other):
        training.forward_backward(*parts)
    assert one.host("grads").tobytes() == other.host("grads").tobytes()


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Training:
    """A run with more than four blocks of parameters, gradients in 16 bits, after a step."""
    monkeypatch.setattr(refimpl.optim.layout, "BLOCK", 1 << 14)
    model = mlp_model(MLPConfig(n_layer=2, n_embd=64, block_size=16, vocab_size=VOCABULARY))
    assert model.n_params > 4 * refimpl.optim.layout.BLOCK
    training = Training(NUMPY, model, "bf16")
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCABULARY, (8, 16))
    training.step((tokens, tokens))
    return training


def peak_of(function: object) -> int:
    """The most bytes that were allocated at once during a call, beyond those at its start; NumPy reports to tracemalloc."""
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        function()
        return tracemalloc.get_traced_memory()[1] - start
    finally:
        tracemalloc.stop()


def test_steps_three_and_four_never_hold_an_fp32_copy_of_the_gradients(large: Training) -> None:
    state, one = large.state, np.float32(1)
    copy = 4 * state.layout.size
    assert peak_of(lambda: widen(state.grads)) >= copy  # the measurement sees such a copy
    for function in (
        lambda: check_and_measure(state, one),
        lambda: large.optimizer.update(state, one, 1.0, np.False_),
        state.weights_down,
    ):
        peak = peak_of(function)
        block = 4 * refimpl.optim.layout.BLOCK
        print(f"peak {peak / 2**10:.0f} KiB, a block {block // 2**10} KiB, a copy {copy / 2**10:.0f} KiB")
        # at most three fp32 arrays of a block at a time (the gradient, one scratch array, and one that an expression is
        # making; so small a run has one thread), and 64 KiB for Python; masters and moments are updated where they lie
        assert peak < 3 * 4 * refimpl.optim.layout.BLOCK + 2**16 < copy


# ----------------------------------------------------------------------------------------------- the mistakes it avoids


def test_without_masters_a_small_learning_rate_moves_few_weights(backend: Backend) -> None:
    moved, way = {}, {}
    for recipe in ("bf16", "pure-bf16", "fp16", "pure-fp16", "fp32"):
        training = Training(backend, GPT, recipe, lr=1e-6)
        before = training.host("master")
        for seed in range(3):
            training.step(batch(seed))
        after = training.host("master")
        moved[recipe] = int((after != before).sum())
        way[recipe] = np.abs(widen(after, "fp64") - widen(before, "fp64")).sum()
    print(f"of {GPT.n_params} weights moved, three steps at lr 1e-6: {moved}")
    touched = moved["fp32"]
    assert moved["bf16"] > 0.9 * touched
    assert moved["fp16"] > 0.9 * touched
    # Masters that were rounded at each step would keep the last update alone.
    assert way["bf16"] > 0.9 * way["fp32"] and way["fp16"] > 0.9 * way["fp32"]
    # N(0, 0.02) weights: an update of 1e-6 exceeds half an ulp of bf16 for |w| < 2.6e-4, of fp16 for |w| < 2e-3
    assert moved["pure-bf16"] < 0.1 * touched
    assert moved["pure-fp16"] < 0.5 * touched


def test_clipping_scaled_gradients_would_stop_the_training(backend: Backend) -> None:
    # the same step with the clip coefficient of the scaled norm (Adam's own scaling hides this mistake, so SGD): no move
    moves = {}
    for mistake in (False, True):
        training = Training(backend, MLP, "fp16", rule=SGD(momentum=0.0), lr=0.1)
        before = training.host("master")
        S = float(training.loss_scale.scale)
        training.state.weights_down()
        training.forward_backward(batch(), S=S)
        one, inverse = training.there(np.float32(1), np.float32(1 / S))
        found, norm = check_and_measure(training.state, one if mistake else inverse)
        training.optimizer.update(training.state, inverse, min(1.0, 1.0 / float(norm)), found)
        moves[mistake] = float(np.abs(training.host("master") - before).max())
    assert moves[False] > 1000 * moves[True] > 0


# ------------------------------------------------------------------------------------------------ a loss scale without inverse


@pytest.mark.parametrize("S", [0.0, 2.0**-149, 2.0**-128])
def test_a_scale_whose_inverse_is_infinite_changes_no_weight(backend: Backend, S: float) -> None:
    """0 * (1/0) is NaN: without a look at 1/S the first good step would make every weight NaN, as it does in PyTorch."""
    training, data = Training(backend, MLP, "fp16"), batch()
    training.loss_scale = make_loss_scale("torch", 2.0**-126, xp=backend.xp)
    training.loss_scale._scale = backend.from_host(np.asarray(S, np.float32))
    before = training.bits("weights", "grads")
    result = training.step(data)
    assert bool(backend.to_host(result.skipped))
    assert training.bits("weights", "grads") == before


def test_the_smallest_scale_that_has_an_inverse_trains() -> None:
    """Negative control, and PyTorch's way as far as it goes: 1/2^-127 is a number of FP32."""
    training = Training(NUMPY, MLP, "fp32")
    training.loss_scale = make_loss_scale("torch", 2.0**-127)
    assert not training.step(batch()).skipped and np.isfinite(training.state.master).all()
