"""Weights to PyTorch and back: every bit, both names of the tied weight, and foreign files refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl import checkpoint
from refimpl.backends import NUMPY
from refimpl.cast import widen
from refimpl.convert import export, from_state_dict, import_, to_state_dict
from refimpl.errors import UsageError
from refimpl.models import GPTConfig, MLPConfig, Model, gpt, mlp
from refimpl.recipes import RECIPES
from refimpl.state import State
from refimpl.state_file import load_for_inference, load_initial_weights, state_arrays

MODELS = {"gpt": gpt(GPTConfig(2, 3, 12, 5)), "mlp": mlp(MLPConfig(2, 6, 4))}


def saved(path: Path, model: Model, recipe: str) -> dict[str, np.ndarray]:
    """A checkpoint of fresh weights, which are returned."""
    weights = model.initial_weights(np.random.default_rng(3))
    state = State(model, RECIPES[recipe].state_storages(), NUMPY)
    state.load_weights(weights)
    checkpoint.save(path, state_arrays(state), {"model": model.name, "sizes": dict(model.config), "recipe": recipe})
    return weights


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "pure-bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, recipe: str, tmp_path: Path) -> None:
    model = MODELS[name]
    weights = saved(tmp_path / "a", model, recipe)
    export(tmp_path / "a", tmp_path / "b")
    exported = load_file(tmp_path / "b")
    assert set(exported) == set(model.parameters) | set(model.tied)
    if recipe == "pure-bf16":  # it never had more than 8 bits of them
        weights = {k: v for k, v in to_state_dict(tmp_path / "a").items() if k in weights}
    for key, value in weights.items():
        np.testing.assert_array_equal(exported[key], value)
    import_(tmp_path / "b", tmp_path / "c", n_head=3)
    state = State(model, RECIPES["fp32"].state_storages(), NUMPY)
    load_initial_weights(tmp_path / "c", model, state)
    for key, view in state.weight_views.items():
        np.testing.assert_array_equal(view, weights[key])
    assert load_for_inference(tmp_path / "c")[0].config == model.config


def test_masters_start_from_the_weights_of_a_file_or_from_their_rounded_copy(tmp_path: Path) -> None:
    model = MODELS["gpt"]
    weights = saved(tmp_path / "a", model, "fp32")
    for rounded in (False, True):
        state = State(model, RECIPES["bf16"].state_storages(), NUMPY)
        load_initial_weights(tmp_path / "a", model, state, rounded)
        equal = {key: np.array_equal(view, weights[key]) for key, view in state.layout.views(state.master).items()}
        assert all(equal.values()) != rounded
        assert np.array_equal(state.master, widen(state.weights)) == rounded


def test_torch_loads_it_strictly(tmp_path: Path) -> None:
    """The twin has nanoGPT's names: nothing missing, nothing unexpected."""
    torch = pytest.importorskip("torch")
    from refimpl.config import Config
    from refimpl.pytorch_twin import GPT

    saved(tmp_path / "a", MODELS["gpt"], "bf16")
    twin = GPT(Config.of({"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 5}))
    weights = to_state_dict(tmp_path / "a")
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=True)
    for name, value in twin.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[name])


def test_masks_and_16_bit_state_dicts_are_welcome() -> None:
    weights = MODELS["gpt"].initial_weights(np.random.default_rng(0))
    with_masks = {**weights, "transformer.h.0.attn.bias": np.ones((1, 1, 5, 5), np.float32)}
    assert from_state_dict(with_masks, 3)[0].config == MODELS["gpt"].config
    half = {k: v.astype(np.float16) for k, v in weights.items()}
    for key, value in from_state_dict(half, 3)[1].items():
        np.testing.assert_array_equal(value, widen(half[key]))


def test_wrong_ones_are_refused(tmp_path: Path) -> None:
    weights = MODELS["gpt"].initial_weights(np.random.default_rng(0))
    wte = "transformer.wte.weight"
    for given, message in [
        ({}, "neither a GPT"),
        ({k: v for k, v in weights.items() if "ln_f.bias" not in k}, "ln_f.bias is missing"),
        ({**weights, "transformer.ln_f.bias": np.zeros(3, np.float32)}, "ln_f.bias is float32"),
        ({**weights, "transformer.ln_f.bias": np.zeros(12, np.int64)}, "ln_f.bias is int64"),
        ({**weights, "lm_head.weight": weights[wte] + 1}, "lm_head.weight differs"),
        ({**weights, "more": weights[wte]}, "a tensor more"),
    ]:
        with pytest.raises(UsageError, match=message):
            from_state_dict(given, 3)
    with pytest.raises(UsageError, match="n_head"):
        from_state_dict(weights, 5)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        import_(tmp_path / "text", tmp_path / "x", 3)
    save_file(weights, tmp_path / "good")
    with pytest.raises(UsageError, match="exists"):
        import_(tmp_path / "good", tmp_path / "text", 3)
    assert (tmp_path / "text").read_text() == "no tensors"


def test_command_line(tmp_path: Path) -> None:
    saved(tmp_path / "a", MODELS["gpt"], "fp16")
    script = str(Path(__file__).parent.parent / "scripts" / "convert.py")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)

    assert "FP32" in call("export", "a", "b").stdout
    assert "a gpt of" in call("import", "b", "c", "--n-head", "3").stdout
    bad = call("import", "b", "d", "--n-head", "5")
    assert bad.returncode == 2 and bad.stderr.startswith("error: n_embd 12")
