"""refimpl.nn.models: nanoGPT's parameters by name, a start near the uniform guess, and the GPT that PyTorch would compute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arrays import DTYPE, Array, wide
from recipe_lists import BASIC

from refimpl.backends.base import REFERENCE, Backend
from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import Model
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.training.config import Config

SMALL_GPT = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=23)
SMALL_MLP = MLPConfig(n_layer=2, n_embd=6, block_size=5, vocab_size=23)


def perturbed(model: Model, seed: int = 0, size: float = 0.1) -> dict[str, Array]:
    """Weights in general position (fp64): biases that are not 0, norms that are not 1."""
    rng = np.random.default_rng(seed)
    return {name: w + size * rng.standard_normal(w.shape) for name, w in model.initial_weights(rng).items()}


def tape(backend: Backend, model: Model, weights: dict[str, Array], recipe: str, record: bool = True) -> Tape:
    fmt = get_recipe(recipe).state["weights"]
    stored = {name: backend.from_host(w.astype(np.float64).astype(DTYPE[fmt])) for name, w in weights.items()}
    return Tape(Run(get_recipe(recipe).policy, backend), stored, model.tied, record)


def loss_of(
    backend: Backend, model: Model, weights: dict[str, Array], tokens: Array, targets: Array, recipe: str = "fp64"
) -> float:
    t = tape(backend, model, weights, recipe, record=False)
    return float(model.loss(t, *map(backend.from_host, (tokens, targets))).array)


def logits_of(backend: Backend, model: Model, weights: dict[str, Array], tokens: Array, recipe: str = "fp64") -> Array:
    t = tape(backend, model, weights, recipe, record=False)
    return backend.to_host(model.logits(t, backend.from_host(tokens)).array)


def gradients_of(
    backend: Backend, model: Model, weights: dict[str, Array], tokens: Array, targets: Array, recipe: str = "fp64"
) -> dict[str, Array]:
    t = tape(backend, model, weights, recipe)
    gradients: dict[str, Array] = {}
    loss = model.loss(t, *map(backend.from_host, (tokens, targets)))
    seed = backend.from_host(np.asarray(1, loss.array.dtype))
    t.backward(loss, seed, lambda name, gradient: gradients.__setitem__(name, backend.to_host(gradient)))
    return gradients


def batch(rows: int, T: int, vocab_size: int, seed: int = 5) -> tuple[Array, Array]:
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (rows, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


# -------------------------------------------------------------------------------------------------------------- parameters


def test_gpt_has_the_names_shapes_and_order_of_nanogpts_state_dict() -> None:
    model = gpt_model(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=6, vocab_size=11))
    assert [(name, spec.shape) for name, spec in model.parameters.items()] == [
        ("transformer.wte.weight", (11, 8)),
        ("transformer.wpe.weight", (6, 8)),
        ("transformer.h.0.ln_1.weight", (8,)),
        ("transformer.h.0.ln_1.bias", (8,)),
        ("transformer.h.0.attn.c_attn.weight", (24, 8)),
        ("transformer.h.0.attn.c_attn.bias", (24,)),
        ("transformer.h.0.attn.c_proj.weight", (8, 8)),
        ("transformer.h.0.attn.c_proj.bias", (8,)),
        ("transformer.h.0.ln_2.weight", (8,)),
        ("transformer.h.0.ln_2.bias", (8,)),
        ("transformer.h.0.mlp.c_fc.weight", (32, 8)),
        ("transformer.h.0.mlp.c_fc.bias", (32,)),
        ("transformer.h.0.mlp.c_proj.weight", (8, 32)),
        ("transformer.h.0.mlp.c_proj.bias", (8,)),
        ("transformer.ln_f.weight", (8,)),
        ("transformer.ln_f.bias", (8,)),
    ]
    assert model.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_mlp_names_and_shapes() -> None:
    model = mlp_model(MLPConfig(n_layer=2, n_embd=3, block_size=5, vocab_size=11))
    assert [(name, spec.shape) for name, spec in model.parameters.items()] == [
        ("wte.weight", (11, 3)),
        ("h.0.fc.weight", (12, 15)),
        ("h.0.fc.bias", (12,)),
        ("h.1.fc.weight", (12, 12)),
        ("h.1.fc.bias", (12,)),
        ("lm_head.weight", (11, 12)),
        ("lm_head.bias", (11,)),
    ]
    assert model.tied == {}


@pytest.mark.parametrize("n_layer", [1, 4])
def test_the_number_of_parameters_of_gpt(n_layer: int) -> None:
    V, block, C = 256, 64, 128
    # A block: 12 C^2 in matrices; biases 3C + C + 4C + C and two norms of 2C.
    expected = V * C + block * C + n_layer * (12 * C * C + 13 * C) + 2 * C
    assert gpt_model(GPTConfig(n_layer, 4, C, block, V)).n_params == expected


def test_the_gpt2_configuration_has_the_124_million_parameters_it_is_known_by() -> None:
    # 124,439,808: OpenAI's smallest GPT-2, tied embedding counted once.
    assert gpt_model(GPTConfig(12, 12, 768, 1024, 50257)).n_params == 124_439_808


def test_the_number_of_parameters_of_mlp() -> None:
    V, k, C, width = 256, 16, 64, 256
    n_params = mlp_model(MLPConfig(2, C, k, V)).n_params
    assert n_params == V * C + (k * C * width + width) + (width * width + width) + width * V + V


@pytest.mark.parametrize("model", [gpt_model(SMALL_GPT), mlp_model(SMALL_MLP)], ids=lambda model: model.name)
def test_weight_decay_is_for_matrices_and_embeddings(model: Model) -> None:
    for name, spec in model.parameters.items():
        assert spec.decay == (name.endswith("weight") and "ln_" not in name)


# ----------------------------------------------------------------------------------------------------------- initialization


def expected_std(name: str, model: Model) -> float:
    """0 for a constant."""
    if name.endswith("bias") or "ln_" in name:
        return 0.0
    if model.name == "gpt":
        return 0.02 / math.sqrt(2 * model.config["n_layer"]) if "c_proj" in name else 0.02
    if name == "wte.weight":
        return 0.5
    return 0.02 if name == "lm_head.weight" else math.sqrt(2 / model.parameters[name].shape[1])


@pytest.mark.parametrize("model", [gpt_model(GPTConfig()), mlp_model(MLPConfig())], ids=lambda model: model.name)
def test_initial_weights_have_the_stated_mean_and_spread(model: Model) -> None:
    weights = model.initial_weights(np.random.default_rng(0))
    assert list(weights) == list(model.parameters)
    for name, w in weights.items():
        std, n = expected_std(name, model), w.size
        assert w.dtype == np.float32 and w.shape == model.parameters[name].shape
        if std == 0:
            assert (w == (1.0 if "ln_" in name and name.endswith("weight") else 0.0)).all()
        else:
            # Five standard deviations of a sample's mean (std / sqrt n) and of its spread (std / sqrt 2n).
            assert abs(w.mean(dtype=np.float64)) <= 5 * std / math.sqrt(n)
            assert abs(w.std(dtype=np.float64) / std - 1) <= 5 / math.sqrt(2 * n)


def test_projections_into_the_residual_stream_start_smaller_by_the_root_of_twice_the_layers() -> None:
    model = gpt_model(GPTConfig(n_layer=8, n_head=4, n_embd=128))
    weights = model.initial_weights(np.random.default_rng(0))
    for small_name, plain_name in (("attn.c_proj", "attn.c_attn"), ("mlp.c_proj", "mlp.c_fc")):
        small, plain = (weights[f"transformer.h.3.{name}.weight"].std() for name in (small_name, plain_name))
        # Two spreads of at least 16,384 values each: 5 sqrt(2) / sqrt(2 * 16384) = 4 %; without the factor it is 300 %.
        assert plain / small == pytest.approx(math.sqrt(16), rel=0.04)


def test_initial_weights_follow_from_the_seed() -> None:
    model = gpt_model(SMALL_GPT)
    a, b, c = (model.initial_weights(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["transformer.wte.weight"], c["transformer.wte.weight"])
    assert not np.array_equal(a["transformer.h.0.mlp.c_fc.weight"], a["transformer.h.1.mlp.c_fc.weight"])


@pytest.mark.parametrize("recipe", BASIC)
@pytest.mark.parametrize("model", [gpt_model(GPTConfig(n_layer=2)), mlp_model(MLPConfig())], ids=lambda model: model.name)
def test_the_first_loss_is_near_that_of_a_uniform_guess(model: Model, recipe: str, backend: Backend) -> None:
    tokens, targets = batch(8, model.config["block_size"], 256)
    weights = model.initial_weights(np.random.default_rng(0))
    spread = float(logits_of(backend, model, weights, tokens, "fp32").std())
    rows = 8 if model.name == "mlp" else targets.size
    # Logits N(0, s^2) apart from the targets make ln V + s^2 / 2, give or take s / sqrt(rows) for the mean target logit
    # (five of them, s is 0.2); the mean over V of exp varies by s / sqrt(V). 16 bits round a logit below 1 by at most 2^-9.
    assert spread < 0.3
    away = abs(loss_of(backend, model, weights, tokens, targets, recipe) - (math.log(256) + spread**2 / 2))
    assert away <= 5 * spread / math.sqrt(rows) + 5 * spread / math.sqrt(256) + 2**-9


# ------------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("config", [GPTConfig, MLPConfig])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused_by_name(config: Any, size: int) -> None:
    for name in config.__dataclass_fields__:
        with pytest.raises(UsageError, match=f"^{name} is {size}: "):
            config(**{name: size})


def test_sizes_that_no_array_has_are_refused_at_once() -> None:
    for config in (GPTConfig, MLPConfig):
        for name, size in (("n_layer", 2**31), ("n_embd", 2**31), ("vocab_size", 2**70)):
            with pytest.raises(UsageError, match=f"^{name} is {size}: it must be at most"):
                config(**{name: size})


def test_without_biases_there_is_none_and_the_rest_is_the_same() -> None:
    model, bare = gpt_model(SMALL_GPT), gpt_model(replace(SMALL_GPT, bias=False))
    assert list(bare.parameters) == [name for name in model.parameters if not name.endswith(".bias")]
    full, weights = (m.initial_weights(np.random.default_rng(3)) for m in (model, bare))
    assert all(np.array_equal(full[name], weight) for name, weight in weights.items())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UsageError, match=r"n_embd 128 .* n_head 3"):
        GPTConfig(n_head=3)
    assert GPTConfig(n_head=128).n_head == 128


def test_a_model_knows_its_configuration() -> None:
    assert gpt_model(SMALL_GPT).config == {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 23}
    assert gpt_model(replace(SMALL_GPT, bias=False)).config == {**gpt_model(SMALL_GPT).config, "bias": False}
    assert mlp_model(SMALL_MLP).config == {"n_layer": 2, "n_embd": 6, "block_size": 5, "vocab_size": 23}


def test_the_activation_of_a_gpt_is_in_its_config_where_it_is_not_the_usual_and_rounds_otherwise_in_16_bits() -> None:
    usual, other = gpt_model(SMALL_GPT), gpt_model(replace(SMALL_GPT, activation="gelu_new"))
    assert "activation" not in usual.config and other.config == {**usual.config, "activation": "gelu_new"}
    weights, (tokens, _) = usual.initial_weights(np.random.default_rng(0)), batch(2, 4, SMALL_GPT.vocab_size)
    for recipe, differs in (("fp64", False), ("bf16", True)):
        one, two = (wide(logits_of(REFERENCE, model, weights, tokens, recipe)) for model in (usual, other))
        assert (np.abs(one - two).max() > 1e-12) == differs
    with pytest.raises(UsageError, match="activation is 'relu': it must be gelu_tanh or gelu_new"):
        replace(SMALL_GPT, activation="relu")
    for model in ("llama", "mlp"):
        with pytest.raises(UsageError, match="--activation gelu_new is for --model gpt"):
            Config.of({"model": model, "activation": "gelu_new"})


# ----------------------------------------------------------------------------------------------------------- whole gradients

STEP = 1e-5
"""Of the central difference: truncation of order STEP^2 times a third derivative of order 100 here, rounding 2^-53 / STEP."""


@pytest.mark.parametrize("model", [gpt_model(SMALL_GPT), mlp_model(SMALL_MLP)], ids=lambda model: model.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_of_the_whole_model_is_its_directional_derivative(model: Model, seed: int, backend: Backend) -> None:
    weights = perturbed(model, seed)
    tokens, targets = batch(4, model.config["block_size"], 23, seed)
    rng = np.random.default_rng(100 + seed)
    direction = {name: rng.standard_normal(w.shape) for name, w in weights.items()}
    gradients = gradients_of(backend, model, weights, tokens, targets)
    analytic = sum(float((gradients[name] * d).sum()) for name, d in direction.items())

    def along(step: float) -> float:
        return loss_of(backend, model, {name: w + step * direction[name] for name, w in weights.items()}, tokens, targets)

    numeric = (along(STEP) - along(-STEP)) / (2 * STEP)
    assert abs(analytic - numeric) <= 1e-6 * max(abs(analytic), abs(numeric))
    # And the check would notice: each parameter's part of the derivative is more than it tolerates.
    for name, d in direction.items():
        assert abs(float((gradients[name] * d).sum())) > 1e-5 * abs(analytic), name


@pytest.mark.parametrize("recipe", BASIC)
@pytest.mark.parametrize("model", [gpt_model(SMALL_GPT), mlp_model(SMALL_MLP)], ids=lambda model: model.name)
def test_every_parameter_gets_a_finite_gradient_in_every_recipe(model: Model, recipe: str, backend: Backend) -> None:
    tokens, targets = batch(4, model.config["block_size"], 23)
    gradients = gradients_of(backend, model, perturbed(model), tokens, targets, recipe)
    assert set(gradients) == set(model.parameters)
    for name, g in gradients.items():
        assert g.shape == model.parameters[name].shape and g.dtype == DTYPE[get_recipe(recipe).state["grads"]]
        wide = g.astype(np.float64)
        assert np.isfinite(wide).all() and wide.any()


# --------------------------------------------------------------------------------------------------------------------- GPT


def test_gpt_does_not_look_ahead(backend: Backend) -> None:
    model = gpt_model(SMALL_GPT)
    weights, (tokens, _) = perturbed(model), batch(3, 8, 23)
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 23
    before, after = logits_of(backend, model, weights, tokens), logits_of(backend, model, weights, changed)
    assert np.array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("T", [1, 3, 8])
def test_gpt_reads_up_to_a_block(T: int, backend: Backend) -> None:
    model = gpt_model(SMALL_GPT)
    weights, (tokens, _) = perturbed(model), batch(3, 8, 23)
    short, full = logits_of(backend, model, weights, tokens[:, :T]), logits_of(backend, model, weights, tokens)
    assert short.shape == (3, T, 23)
    # The same numbers but for the order of sums, which BLAS may choose by shape: fp64, some hundred roundings.
    assert np.abs(short - full[:, :T]).max() <= 1e-12


def test_gpt_knows_the_order_of_tokens(backend: Backend) -> None:
    model = gpt_model(SMALL_GPT)
    logits = logits_of(backend, model, perturbed(model), np.array([[1, 2, 3], [2, 1, 3]]))
    assert np.abs(logits[0, 2] - logits[1, 2]).max() > 1e-3  # without positions the two would be equal


# --------------------------------------------------------------------------------------------------------------------- MLP


def test_mlp_predicts_one_byte_from_a_whole_block(backend: Backend) -> None:
    model = mlp_model(SMALL_MLP)
    weights, (tokens, _) = perturbed(model), batch(4, 5, 23)
    logits = logits_of(backend, model, weights, tokens)
    assert logits.shape == (4, 23)
    for position in range(5):  # every byte of the block matters, to its own row only
        changed = tokens.copy()
        changed[1, position] = (changed[1, position] + 1) % 23
        moved = (logits_of(backend, model, weights, changed) != logits).any(-1)
        assert moved.tolist() == [False, True, False, False]


def test_mlp_refuses_a_block_of_another_length(backend: Backend) -> None:
    model = mlp_model(SMALL_MLP)
    with pytest.raises(UsageError, match="4 tokens per sequence: the mlp reads exactly 5, its block_size"):
        logits_of(backend, model, perturbed(model), batch(4, 4, 23)[0])


def test_mlp_is_trained_on_the_last_column_of_the_targets(backend: Backend) -> None:
    model = mlp_model(SMALL_MLP)
    weights, (tokens, targets) = perturbed(model), batch(4, 5, 23)
    others, last = targets.copy(), targets.copy()
    others[:, :-1] = (others[:, :-1] + 1) % 23
    last[:, -1] = (last[:, -1] + 1) % 23
    loss = loss_of(backend, model, weights, tokens, targets)
    assert loss_of(backend, model, weights, tokens, others) == loss != loss_of(backend, model, weights, tokens, last)
    a, b = gradients_of(backend, model, weights, tokens, targets), gradients_of(backend, model, weights, tokens, others)
    assert all(np.array_equal(a[name], b[name]) for name in a)

    z = logits_of(backend, model, weights, tokens)
    expected = np.mean([math.log(np.exp(row).sum()) - row[target] for row, target in zip(z, targets[:, -1], strict=True)])
    assert loss == pytest.approx(expected, rel=1e-12)  # fp64, 23 terms


def test_mlp_by_definition(backend: Backend) -> None:
    model = mlp_model(SMALL_MLP)
    w, (tokens, _) = perturbed(model), batch(4, 5, 23)
    x = np.stack([np.concatenate([w["wte.weight"][token] for token in row]) for row in tokens])
    for i in range(2):
        x = np.maximum(x @ w[f"h.{i}.fc.weight"].T + w[f"h.{i}.fc.bias"], 0)
    expected = x @ w["lm_head.weight"].T + w["lm_head.bias"]
    assert np.abs(logits_of(backend, model, w, tokens) - expected).max() <= 1e-12  # fp64, sums of 30 terms


# ------------------------------------------------------------------------------------------------ GPT-2, written in PyTorch


def torch_gpt(torch: Any, w: dict[str, Any], tokens: Any, n_layer: int, n_head: int) -> Any:
    """GPT-2 on a state_dict, with PyTorch's own attention: independent of refimpl but for the names."""
    F = torch.nn.functional

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"))

    B, T = tokens.shape
    x = F.embedding(tokens, w["transformer.wte.weight"]) + w["transformer.wpe.weight"][:T]
    for i in range(n_layer):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, f"{h}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def torch_results(torch: Any, weights: dict[str, Array], tokens: Array, targets: Array, dtype: Any) -> tuple[Any, ...]:
    """Logits, loss, gradients by name; in fp64 for comparing."""
    w = {name: torch.tensor(value, dtype=dtype, requires_grad=True) for name, value in weights.items()}
    logits = torch_gpt(torch, w, torch.tensor(tokens), SMALL_GPT.n_layer, SMALL_GPT.n_head)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    return (
        logits.detach().double().numpy(),
        float(loss.detach()),
        {name: leaf.grad.double().numpy() for name, leaf in w.items()},
    )


@pytest.mark.parametrize(("T", "bias"), [(1, True), (5, True), (8, True), (8, False)])
def test_gpt_in_fp64_is_pytorchs_gpt2(T: int, bias: bool, torch: Any, backend: Backend) -> None:
    model = gpt_model(replace(SMALL_GPT, bias=bias))
    weights, (tokens, targets) = perturbed(model), batch(4, T, 23)
    logits, loss, gradients = torch_results(torch, weights, tokens, targets, torch.float64)
    # One formula, two orders of evaluation: a dozen layers of sums of up to 64 terms, 2^-53 each: 1e-13 of the largest.
    # A hundred times that leaves room for cancellation; a formula that differs, in eps say, differs by 1e-5.
    limit = 1e-11
    assert np.abs(logits_of(backend, model, weights, tokens) - logits).max() <= limit * np.abs(logits).max()
    assert loss_of(backend, model, weights, tokens, targets) == pytest.approx(loss, rel=limit)
    ours = gradients_of(backend, model, weights, tokens, targets)
    assert set(ours) == set(gradients)
    for name, g in gradients.items():
        # At T = 1 attention has one position: dq = dk = 0 up to rounding, so compare with the largest of all gradients.
        assert np.abs(ours[name] - g).max() <= limit * max(np.abs(other).max() for other in gradients.values()), name


def test_gpt_in_fp32_is_as_close_to_the_exact_result_as_pytorchs(torch: Any, backend: Backend) -> None:
    model = gpt_model(SMALL_GPT)
    tokens, targets = batch(16, 8, 23)
    weights = {name: w.astype(np.float32).astype(np.float64) for name, w in perturbed(model).items()}
    exact, _, exact_gradients = torch_results(torch, weights, tokens, targets, torch.float64)
    theirs, their_loss, their_gradients = torch_results(torch, weights, tokens, targets, torch.float32)
    ours = logits_of(backend, model, weights, tokens, "fp32")
    our_loss = loss_of(backend, model, weights, tokens, targets, "fp32")
    our_gradients = gradients_of(backend, model, weights, tokens, targets, "fp32")

    def distance(a: Array, b: Array) -> float:
        return float(np.sqrt(((a.astype(np.float64) - b) ** 2).mean()))

    # The same number of roundings in another order makes an error of the same size (3: NumPy's exp errs by 2.5 ulp where
    # PyTorch's errs by 1). One operation in 16 bits would be 1000 times that.
    assert ours.dtype == np.float32
    assert distance(ours, exact) <= 3 * distance(theirs, exact)
    together = [
        np.concatenate([g[name].ravel() for name in weights]) for g in (our_gradients, their_gradients, exact_gradients)
    ]
    assert distance(together[0], together[2]) <= 3 * distance(together[1], together[2])
    # Two fp32 means of 128 values near 3: gamma_128 each, and the error of the logits.
    assert abs(our_loss - their_loss) <= 2 * 128 * 2**-24 * their_loss + 4 * distance(theirs, exact)
