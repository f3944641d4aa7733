"""Weights to PyTorch and back: every bit, both names of the tied weight, and foreign files refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import SCRIPTS
from safetensors.numpy import load_file, save_file
from samples import sample
from script_loader import run_here

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import Model
from refimpl.numerics.casts import widen
from refimpl.optim.state import State
from refimpl.parity.state_dict import export, from_state_dict, import_, to_state_dict
from refimpl.precision.context import Run
from refimpl.precision.recipes import RECIPES
from refimpl.tools.commands.generate import run as generate
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import load_for_inference, load_initial_weights, state_arrays
from refimpl.training.run import train

MODELS = {
    "gpt": gpt_model(GPTConfig(2, 3, 12, 5)), "mlp": mlp_model(MLPConfig(2, 6, 4)),
    "bare": gpt_model(GPTConfig(2, 3, 12, 5, 300, bias=False)),
    "large": mlp_model(MLPConfig(1, 6, 4, 259)),
}  # fmt: skip


def saved(path: Path, model: Model, recipe: str) -> dict[str, np.ndarray]:
    """A checkpoint of fresh weights, which are returned."""
    weights = model.initial_weights(np.random.default_rng(3))
    state = State(model, RECIPES[recipe].state_encodings(), NUMPY)
    state.load_weights(weights)
    checkpoint.save(path, state_arrays(state), {"model": model.name, "sizes": dict(model.config), "recipe": recipe})
    return weights


@pytest.mark.parametrize(("name", "recipe"), [
    *((name, recipe) for name in ("gpt", "mlp") for recipe in ("fp32", "fp16", "bf16", "pure-bf16")),
    ("bare", "bf16"), ("large", "fp16"),
])  # fmt: skip
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
    state = State(model, RECIPES["fp32"].state_encodings(), NUMPY)
    load_initial_weights(tmp_path / "c", model, state)
    for key, view in state.weight_views.items():
        np.testing.assert_array_equal(view, weights[key])
    assert load_for_inference(tmp_path / "c")[0].config == model.config


def test_masters_start_from_the_weights_of_a_file_or_from_their_rounded_copy(tmp_path: Path) -> None:
    model = MODELS["gpt"]
    weights = saved(tmp_path / "a", model, "fp32")
    for rounded in (False, True):
        state = State(model, RECIPES["bf16"].state_encodings(), NUMPY)
        load_initial_weights(tmp_path / "a", model, state, rounded)
        equal = {key: np.array_equal(view, weights[key]) for key, view in state.layout.views(state.master).items()}
        assert all(equal.values()) != rounded
        assert np.array_equal(state.master, widen(state.weights)) == rounded


@pytest.mark.parametrize("name", ["gpt", "bare"])
def test_torch_loads_it_strictly(name: str, tmp_path: Path) -> None:
    """The PyTorch model has nanoGPT's names: nothing missing, nothing unexpected."""
    pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    from refimpl.parity.pytorch_model import GPT
    from refimpl.training.config import Config

    saved(tmp_path / "a", MODELS[name], "bf16")
    gpt = GPT(Config.of(dict(MODELS[name].config)))
    export(tmp_path / "a", tmp_path / "b")
    weights = to_state_dict(tmp_path / "a")
    gpt.load_state_dict(load_torch(tmp_path / "b"), strict=True)
    for name, value in gpt.state_dict().items():
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
    saved(tmp_path / "checkpoint", MODELS["gpt"], "fp16")
    with pytest.raises(UsageError, match="is already a checkpoint of refimpl"):
        import_(tmp_path / "checkpoint", tmp_path / "x", 3)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UsageError, match="not a valid safetensors file"):
        import_(tmp_path / "text", tmp_path / "x", 3)
    save_file(weights, tmp_path / "good")
    with pytest.raises(UsageError, match="exists"):
        import_(tmp_path / "good", tmp_path / "text", 3)
    assert (tmp_path / "text").read_text() == "no tensors"


PREFIXES = ["module.", "_orig_mod.", "model.", "model._orig_mod.module.", "module._orig_mod."]


@pytest.mark.parametrize("tied", ["wte", "lm_head", "both"])
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_names_of_wrapped_and_tied_models(prefix: str, tied: str) -> None:
    """What safetensors' save_model writes for a tied model keeps either name; wrappers put theirs in front."""
    for model in (MODELS["gpt"], MODELS["bare"]):
        weights = model.initial_weights(np.random.default_rng(0))
        given = {**weights, "transformer.h.1.attn.bias": np.tril(np.ones((1, 1, 5, 5), np.float32))}
        if tied != "wte":
            given["lm_head.weight"] = weights["transformer.wte.weight"]
        if tied == "lm_head":
            del given["transformer.wte.weight"]
        found, converted = from_state_dict({prefix + name: x for name, x in given.items()}, 3)
        assert found.config == model.config and list(converted) == list(weights)
        assert all(np.array_equal(converted[name], weights[name]) for name in weights)


def test_what_pytorch_itself_saves(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_model

    from refimpl.parity.pytorch_model import GPT
    from refimpl.training.config import Config

    for name in ("gpt", "bare"):
        gpt = GPT(Config.of(dict(MODELS[name].config)))
        forms = {
            "plain": gpt,
            "compiled": torch.nn.ModuleDict({"_orig_mod": gpt}),
            "in": torch.nn.ModuleDict({"model": gpt}),
        }
        for form, wrapped in forms.items():
            save_model(wrapped, str(tmp_path / f"{name}-{form}"))
            import_(tmp_path / f"{name}-{form}", tmp_path / f"{name}-{form}-here", 3)
            exported = to_state_dict(tmp_path / f"{name}-{form}-here")
            assert all(np.array_equal(exported[k], v.numpy()) for k, v in gpt.state_dict().items())
    torch.save(gpt.state_dict(), tmp_path / "pickle.pt")
    torch.save(gpt.state_dict(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for pickle in ("pickle.pt", "old.bin"):
        with pytest.raises(UsageError, match=r"a pickle, as torch.save writes it.*safetensors.torch.save_model\(model, "):
            import_(tmp_path / pickle, tmp_path / "x", 3)


def test_hugging_faces_gpt2_is_refused_by_name() -> None:
    nanogpts = MODELS["gpt"].initial_weights(np.random.default_rng(0))
    weights = {name: x.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else x
               for name, x in nanogpts.items()}  # fmt: skip
    bare = {name.removeprefix("transformer."): x for name, x in weights.items()}
    plain = {name.removeprefix("transformer."): x for name, x in nanogpts.items()}
    for given in (weights, bare, plain, {**bare, "h.0.attn.bias": np.ones((1, 1, 5, 5))}):
        with pytest.raises(UsageError, match="Hugging Face's GPT-2 names"):
            from_state_dict(given, 3)
    with pytest.raises(UsageError, match=r"neither a GPT .* it holds embedding.weight"):
        from_state_dict({"model.embedding.weight": np.ones((4, 4), np.float32)}, 3)
    with pytest.raises(UsageError, match="Hugging Face's names of a Llama: give the folder"):
        from_state_dict({"model.embed_tokens.weight": np.ones((4, 4), np.float32)}, 3)


@pytest.mark.parametrize("vocab_size", [65, 255, 256, 300])
@pytest.mark.parametrize("kind", ["gpt", "mlp"])
def test_any_vocabulary_works_or_is_refused_at_import(kind: str, vocab_size: int, tmp_path: Path) -> None:
    """From import to a sample and to training on."""
    model = gpt_model(GPTConfig(1, 2, 8, 8, vocab_size)) if kind == "gpt" else mlp_model(MLPConfig(1, 4, 8, vocab_size))
    save_file(model.initial_weights(np.random.default_rng(1)), tmp_path / "w")
    if vocab_size < 256:
        with pytest.raises(UsageError, match=f"vocabulary of .*w is {vocab_size}, .* ids: train the model again on bytes$"):
            import_(tmp_path / "w", tmp_path / "start", 2)
        return
    import_(tmp_path / "w", tmp_path / "start", 2)
    _, state, run = load_for_inference(tmp_path / "start")
    assert len(sample(model, state, run, 300, 5.0)) == 300
    assert len(sample(model, state, run, 20, 0.0)) == 20
    if vocab_size == 256 or kind == "mlp":
        return
    (tmp_path / "text").write_text("to be or not to be; " * 40)
    given = {"data": str(tmp_path / "text"), "steps": 2, "batch_size": 2, "eval_batches": 1, "sample_bytes": 5}
    assert train(given, tmp_path / "run", False, False, tmp_path / "start") == 0  # the sizes are the file's
    assert load_for_inference(tmp_path / "run")[0].config == model.config  # the folder of a run is taken, too
    with pytest.raises(UsageError, match=r"differs in size from this run: n_embd \d instead of 16; what is not given"):
        train({**given, "n_embd": 16}, tmp_path / "other", False, False, tmp_path / "start")
    generate(tmp_path / "run", "be", 3, 0.8, 0, None)


def test_ids_that_are_no_bytes_are_never_sampled() -> None:
    """Also where they are by far the likeliest."""
    model = gpt_model(GPTConfig(1, 1, 4, 4, 300))
    weights = model.initial_weights(np.random.default_rng(0))
    weights["transformer.ln_f.weight"][:] = 0
    weights["transformer.ln_f.bias"][:] = 1
    weights["transformer.wte.weight"][256:] = 50
    state = State(model, RECIPES["fp32"].state_encodings(), NUMPY)
    state.load_weights(weights)
    run = Run(RECIPES["fp32"].policy, NUMPY)
    for temperature in (0.0, 1.0):
        assert len(sample(model, state, run, 40, temperature)) == 40


@pytest.mark.parametrize(("value", "found"), [(np.nan, "1 NaN"), (-np.inf, "1 Inf"), (1e300, "1 Inf")])
def test_weights_that_are_not_finite_are_told(
    value: float, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At import, where 1e300 becomes Inf in FP32, and when nothing can be sampled from them."""
    weights = {n: widen(w, "fp64") for n, w in MODELS["gpt"].initial_weights(np.random.default_rng(0)).items()}
    weights["transformer.h.0.mlp.c_fc.weight"][3, 2] = value
    save_file(weights, tmp_path / "w")
    import_(tmp_path / "w", tmp_path / "start", MODELS["gpt"].config["n_head"])
    said = capsys.readouterr().out
    assert f"transformer.h.0.mlp.c_fc.weight holds {found}: it can neither" in said and "use it" not in said
    generate(tmp_path / "start", "x", 5, 0.8, 0, None)
    out, err = capsys.readouterr()
    assert out == "x\n" and "not finite after 0 bytes" in err


def test_a_vocabulary_without_some_bytes_is_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--vocab-size is 65, but text is read.*: leave it out, or give .* by --tokenizer$"):
        train({"vocab_size": 65}, tmp_path / "run", False, False, None)
    assert not (tmp_path / "run").exists()


def test_a_state_dict_is_no_start(tmp_path: Path) -> None:
    save_file(MODELS["gpt"].initial_weights(np.random.default_rng(0)), tmp_path / "w")
    with pytest.raises(UsageError, match=r"not a checkpoint of refimpl; .* scripts/convert.py import .*w start.safetensors"):
        train({}, tmp_path / "run", False, False, tmp_path / "w")


def test_command_line(tmp_path: Path) -> None:
    """Through a real process once."""
    saved(tmp_path / "a", MODELS["gpt"], "fp16")
    first = [sys.executable, SCRIPTS / "convert.py", "export", "a", "b.safetensors"]
    assert "FP32" in subprocess.run(first, capture_output=True, text=True, cwd=tmp_path, check=False).stdout

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_here("convert", *arguments, folder=tmp_path)

    assert "a gpt of" in call("import", "b.safetensors", "c", "--n-head", "3").stdout
    assert "GPT2LMHeadModel of 28 tensors in BF16" in call("export", "a", "folder", "--format", "bf16").stdout
    assert "GPT2LMHeadModel of 28 tensors in FP32" in call("export", "folder", "again").stdout
    for bad, message in (
        (call("import", "b.safetensors", "d", "--n-head", "5"), "error: n_embd 12"),
        (call("export", "a", "d.safetensors", "--format", "bf16"), "error: --format is for folders"),
        (call("gguf", "a", "d"), "error: "),
    ):
        assert bad.returncode == 2 and bad.stderr.startswith(message) and bad.stderr.count("\n") == 1
