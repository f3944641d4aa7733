"""Checkpoint files: whole or absent, equal bytes for equal states, foreign and damaged ones refused with a reason."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.numerics.bits import bits_of
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import is_float
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import RECIPES
from refimpl.step import forward_backward
from refimpl.training.checkpoint import load, save, write_tensors, write_text_atomically, written_here
from refimpl.training.checkpoint_states import (
    fp32_weights,
    load_for_inference,
    load_state_arrays,
    scale_arrays,
    state_arrays,
    take_scales,
)

MODEL = gpt_model(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4))


def state_of(recipe: str, seed: int = 0) -> State:
    state = State(MODEL, RECIPES[recipe].state_encodings(), NUMPY)
    state.load_weights(MODEL.initial_weights(np.random.default_rng(seed)))
    rng, everything = np.random.default_rng(seed + 1), slice(0, state.layout.size)
    for kind in ("m", "v"):
        values = rng.standard_normal(state.layout.size)
        start = cast(values if kind == "m" else values**2, state.math_format)
        state.encodings[kind].start(state.parts(kind, everything), start)
    for name in ("weights_compensation", "weights_remainder"):
        if name in state.buffers:
            bits = bits_of(state.buffers[name]) if is_float(state.buffers[name]) else state.buffers[name]
            bits[...] = rng.integers(0, 1 << 14, bits.size)
    return state


@pytest.mark.parametrize("recipe", RECIPES)
def test_states_come_back_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    state, other = state_of(recipe, 0), state_of(recipe, 5)
    path = tmp_path / "c.safetensors"
    save(path, state_arrays(state), {"x": 1})
    load_state_arrays(path, load(path)[0], other)
    for name, buffer in state.buffers.items():
        if name not in ("grads", "main_grads"):  # made anew by the next step
            assert buffer.any() and buffer.tobytes() == other.buffers[name].tobytes(), name


FILES = {
    "fp16": {"weights": "float16", "master": "float32", "m": "float32", "v": "float32"},
    "pure-bf16": {"weights": "bfloat16", "m": "bfloat16", "v": "bfloat16"},
    "apex-o2": {"weights": "float16", "master": "float32", "m": "float32", "v": "float32"},
    "bf16-kahan": {"weights": "bfloat16", "weights_compensation": "bfloat16", "m": "bfloat16", "v": "bfloat16"},
    "bf16-remainder": {"weights": "bfloat16", "weights_remainder": "uint16", "m": "float32", "v": "float32"},
    "adam-8bit": {"weights": "bfloat16", "m": "uint8", "m_scales": "float32", "v": "uint8", "v_scales": "float32"},
    "adam-fp8": {"weights": "bfloat16", "m": "uint8", "m_scales": "float32", "v": "uint8", "v_scales": "float32"},
    "adam-8bit-fp32-embeddings": {
        "weights": "bfloat16", "m": "uint8", "m_scales": "float32", "m_embeddings": "float32",
        "v": "uint8", "v_scales": "float32", "v_embeddings": "float32",
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", FILES)
def test_what_is_in_a_file(recipe: str, tmp_path: Path) -> None:
    """Each buffer by parameter; a scale belongs to no parameter, so scales are one flat tensor."""
    save(tmp_path / "c", state_arrays(state_of(recipe)), {})
    arrays = load(tmp_path / "c")[0]
    kinds: dict[str, set[str]] = {}
    for name, array in arrays.items():
        kind, _, parameter = name.partition(".")
        kinds.setdefault(kind, set()).add(parameter)
        assert array.dtype.name == FILES[recipe][kind]
        assert array.shape == ((-(-MODEL.n_params // 256),) if parameter == "flat" else MODEL.parameters[parameter].shape)
    embeddings = {f"transformer.{x}.weight" for x in ("wte", "wpe")}
    partly = {kind: {"flat"} if "scales" in kind else embeddings for kind in FILES[recipe] if "_" in kind}
    assert kinds == {kind: set(MODEL.parameters) for kind in FILES[recipe]} | {
        kind: names for kind, names in partly.items() if kind.partition("_")[2] in ("scales", "embeddings")
    }


def test_equal_states_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, state_arrays(state_of("bf16")), {"z": 1, "a": {"y": 2, "b": 3}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_of_any_memory_order_are_stored_right(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    save(tmp_path / "c", {"f": np.asfortranarray(x), "t": x.T, "s": x[:, ::2]}, {})
    arrays, _ = load(tmp_path / "c")
    np.testing.assert_array_equal(arrays["f"], x)
    np.testing.assert_array_equal(arrays["t"], x.T)
    np.testing.assert_array_equal(arrays["s"], x[:, ::2])


def test_bf16_and_scalars_survive(tmp_path: Path) -> None:
    save(tmp_path / "c", {"b": np.array([1.5, np.nan], ml_dtypes.bfloat16), "0d": np.array(3.0, np.float32)}, {})
    arrays, _ = load(tmp_path / "c")
    assert arrays["b"].dtype == ml_dtypes.bfloat16 and arrays["0d"].shape == ()


@pytest.mark.parametrize("keep", [0, 4, 20, 200, -1])
def test_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save(path, state_arrays(state_of("fp16")), {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="not a valid safetensors file"):
        load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(UsageError, match="no checkpoint"):
        load(path)
    path.write_bytes(b"PK\x03\x04 this is a zip, perhaps")
    with pytest.raises(UsageError, match="not a valid safetensors file"):
        load(path)
    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(UsageError, match="not a checkpoint of refimpl"):
        load(path)
    for text, message in (("{", "damaged header"), ("[]", "damaged header"), (json.dumps({"version": 99}), "version 99")):
        save_file({"x": np.zeros(2)}, path, metadata={"refimpl": text})
        with pytest.raises(UsageError, match=message):
            load(path)


def test_wrong_tensors_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    state, path = state_of("fp16"), tmp_path / "c"
    before = {kind: buffer.tobytes() for kind, buffer in state.buffers.items()}
    good = state_arrays(state_of("fp16", 9))
    name = "v.transformer.ln_f.bias"
    bad = [
        ({k: v for k, v in good.items() if k != name}, "no tensor v.transformer.ln_f.bias"),
        ({**good, name: np.zeros(9, np.float32)}, "shape"),
        ({**good, name: np.zeros(8, np.float64)}, "float64, expected float32"),
        ({**good, "v.more": np.zeros(8)}, "v.more"),
        (state_arrays(state_of("bf16")), "another recipe"),
    ]
    for arrays, message in bad:
        with pytest.raises(UsageError, match=message):
            load_state_arrays(path, arrays, state)
    assert before == {kind: buffer.tobytes() for kind, buffer in state.buffers.items()}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, {"x": np.zeros(2)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save(path, {"x": np.ones(2)}, {"not json": object()})
    with pytest.raises(UsageError, match="cannot write"):
        save(tmp_path / "no folder" / "c", {"x": np.ones(2)}, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path / "c", {"x": np.zeros(2)}, {})
        write_text_atomically(tmp_path / "t", "text")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_full_disk_is_one_line_about_the_file_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save(path, {"x": np.zeros(2)}, {})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the temporary name")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: save(path, {"x": np.ones(2)}, {}), lambda: write_text_atomically(path, "text")):
        with pytest.raises(UsageError, match=r"c: No space left on device; any previous file is unchanged$"):
            write()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(UsageError) as error:
        write_text_atomically(tmp_path / "none" / "file", "text")
    assert ".tmp" not in str(error.value) and "No such file" in str(error.value)


def test_the_file_is_what_safetensors_itself_writes_but_for_the_spaces(tmp_path: Path) -> None:
    arrays = {"h": np.arange(3, dtype=np.float16), "a": np.ones((2, 2), np.float32), "e": np.zeros((0, 3), np.int64),
              "s": np.array(7, np.uint8), "b": np.array([1, 2], ml_dtypes.bfloat16)}  # fmt: skip
    write_tensors(tmp_path / "ours", arrays, {"k": "v"})
    save_file(arrays, tmp_path / "theirs", metadata={"k": "v"})
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    size = [8 + int.from_bytes(data[:8], "little") for data in (ours, theirs)]
    assert json.loads(ours[8 : size[0]]) == json.loads(theirs[8 : size[1]])
    assert ours[size[0] :] == theirs[size[1] :] and size[0] % 64 == 0
    assert written_here(tmp_path / "ours") and not written_here(tmp_path / "theirs")


@pytest.mark.parametrize("recipe", RECIPES)
def test_inference_reads_the_weights_alone(recipe: str, tmp_path: Path) -> None:
    """Not what rounding left over, nor masters and moments: the tape reads none of them."""
    state = state_of(recipe)
    save(tmp_path / "c", state_arrays(state), {"model": "gpt", "sizes": dict(MODEL.config), "recipe": recipe})
    _, loaded, run = load_for_inference(tmp_path / "c")
    assert list(loaded.buffers) == ["weights"] and loaded.weights.tobytes() == state.weights.tobytes()
    assert loaded.weights.dtype == state.weights.dtype and run.policy is RECIPES[recipe].policy


def test_the_fp32_weights_of_a_file(tmp_path: Path) -> None:
    """Masters where there are any, put together again where they are in two halves; else the weights."""
    for recipe in ("bf16", "bf16-remainder", "bf16-sr"):
        state = state_of(recipe)
        save(tmp_path / "c", state_arrays(state), {})
        weights = fp32_weights(tmp_path / "c", load(tmp_path / "c")[0], MODEL)
        expected = state.layout.views(widen(state.values(state.master_kind), "fp32"))
        assert {name: x.tobytes() for name, x in weights.items()} == {name: x.tobytes() for name, x in expected.items()}


def test_what_quantization_remembers_comes_back(tmp_path: Path) -> None:
    """Its tensors have names of their own, in the file and among the arrays that `take_scales` takes from it."""
    tokens, state = np.zeros((1, 4), np.int64), state_of("fp8-delayed")
    run, other = (Run(RECIPES["fp8-delayed"].policy, NUMPY) for _ in range(2))
    forward_backward(MODEL, [(tokens, tokens)], state, np.float32(1), run)
    save(tmp_path / "c", {**state_arrays(state), **scale_arrays(run)}, {})
    arrays = load(tmp_path / "c")[0]
    other.scales.load(run.scales.passes, take_scales(arrays))
    load_state_arrays(tmp_path / "c", arrays, state_of("fp8-delayed"))  # which refuses what is left over
    ours, theirs = run.scales.arrays(), other.scales.arrays()
    assert len(ours) == 4 * 3 * 2 and other.scales.passes == 1  # layers, operands, arrays of each
    assert {name: x.tobytes() for name, x in ours.items()} == {name: x.tobytes() for name, x in theirs.items()}


def test_inference_keeps_two_bytes_a_parameter(tmp_path: Path) -> None:
    header = {"model": "gpt", "sizes": dict(MODEL.config), "recipe": "fp16"}
    save(tmp_path / "c", state_arrays(state_of("fp16")), header)
    model, state, _ = load_for_inference(tmp_path / "c")
    assert state.nbytes == 2 * model.n_params and model.parameters == MODEL.parameters
    save(tmp_path / "d", state_arrays(state_of("fp16")), {**header, "sizes": dict(mlp_model(MLPConfig()).config)})
    with pytest.raises(UsageError):
        load_for_inference(tmp_path / "d")


def test_bf16_is_read_by_a_program_that_imports_nothing_else(tmp_path: Path) -> None:
    """safetensors finds bfloat16 by its NumPy name, which exists only once ml_dtypes has been imported."""
    save(tmp_path / "c", {"w": np.ones(3, ml_dtypes.bfloat16)}, {})
    path = str(tmp_path / "c")
    program = (
        "from pathlib import Path; from refimpl.training.checkpoint import load; "
        f"print(load(Path({path!r}))[0]['w'].dtype)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "bfloat16\n", done.stderr


def test_tensors_of_types_that_numpy_has_not_are_refused(tmp_path: Path) -> None:
    """A file as PyTorch writes it, with a tensor in FP8: eight bytes of length, the header, the data."""
    header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UsageError, match="a type that NumPy lacks"):
        load(tmp_path / "f")
