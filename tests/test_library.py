"""`import refimpl`: its names, the example of its docstring, and what it says of wrong input."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import refimpl
from refimpl import UsageError, _library
from refimpl.training.config import Config
from refimpl.training.setup import start


def example() -> str:
    """The indented lines of the docstring from the first import to the end of the loop."""
    lines = re.search(r"^    import numpy.*?(?=^\S)", refimpl.__doc__ or "", re.S | re.M)
    assert lines is not None
    return re.sub(r"^    ", "", lines[0], flags=re.M)


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    exec(example(), {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(row[1]) for row in rows]
    assert len(rows) == 20 and len(example().strip().splitlines()) <= 10
    # An untrained model gives each of 256 bytes the same probability: log 256 = 5.5. The first scale overflows and halves.
    assert 5.3 < losses[0] < 5.8 and losses[-1] < 3.5
    skipped = [row[3] == "True" for row in rows]
    assert skipped[0] and sum(skipped) < 4
    for i, (now, after) in enumerate(pairwise(rows)):
        assert float(after[2]) == float(now[2]) * (0.5 if skipped[i] else 1)


def test_every_name_is_there_and_told_of() -> None:
    for name in _library.__all__:
        assert getattr(refimpl, name) is getattr(_library, name)
        assert re.search(rf"\b{name}\b", refimpl.__doc__ or ""), name
    assert {*_library.__all__, "__version__"} <= set(dir(refimpl))
    assert refimpl.State.__module__ == "refimpl.optim.state"


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'refimpl' has no attribute 'Stat'"):
        refimpl.Stat  # noqa: B018
    with pytest.raises(ImportError):
        from refimpl import np  # noqa: F401


def test_modules_are_imported_as_before() -> None:
    program = "import refimpl; from refimpl import step; import refimpl.nn.linear; assert step.train_step is refimpl.train_step"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_star_import_gives_the_names_and_no_more() -> None:
    names: dict[str, object] = {}
    exec("from refimpl import *", names)
    assert names.keys() - {"__builtins__"} == {*_library.__all__}


# ------------------------------------------------------------------------------------------------------ make_training

GPT = refimpl.gpt_model(refimpl.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8))
MLP = refimpl.mlp_model(refimpl.MLPConfig(n_layer=1, n_embd=8, block_size=8))
LLAMA = refimpl.llama_model(
    refimpl.LlamaConfig(n_layer=1, n_head=2, n_kv_head=1, head_dim=8, n_embd=16, ffn_dim=16, block_size=8)
)
TEXT = np.frombuffer(b"The masters are FP32, the weights are FP16. ", np.uint8)


def tiny(model: Any = GPT, recipe: str = "fp16", steps: int = 3, **more: Any) -> refimpl.Training:
    return refimpl.make_training(model, recipe, refimpl.Schedule(1e-2, 1e-3, 0, steps), **more)


def good() -> tuple[np.ndarray, np.ndarray]:
    return refimpl.sample_batch(TEXT, 2, 8, np.random.default_rng(0))


def test_a_training_is_that_of_a_config_with_its_settings() -> None:
    """The same first weights, formats and updates as `train.py` has, in a recipe whose masters start from rounded weights."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
    config = Config.of({**sizes, "recipe": "apex-o2", "lr": 1e-2, "min_lr": 1e-3, "warmup": 1, "steps": 3, "seed": 7})
    model, schedule = refimpl.gpt_model(refimpl.GPTConfig(**sizes)), refimpl.Schedule(1e-2, 1e-3, 1, 3)
    ours, theirs = refimpl.make_training(model, "apex-o2", schedule, seed=7), start(config)
    assert {*ours.state.buffers} == {*theirs.state.buffers} and "main_grads" in ours.state.buffers
    for _ in range(3):
        batch = refimpl.sample_batch(TEXT, 4, 8, np.random.default_rng(0))
        assert ours.step([batch]) == theirs.step([batch])
        for kind, buffer in ours.state.buffers.items():
            assert buffer.tobytes() == theirs.state.buffers[kind].tobytes(), kind


def test_what_is_given_takes_the_place_of_the_default() -> None:
    scale = refimpl.make_loss_scale("8")
    training = tiny(recipe="bf16", rule=refimpl.SGD(), loss_scale=scale, max_norm=0.5, grad_accum=2, backend="reference")
    assert training.loss_scale is scale and training.max_norm == 0.5
    assert "v" not in training.state.buffers and training.state.grads.dtype == np.float32
    assert training.run.backend.name == "reference"
    result = training.step([good(), good()])
    assert result.loss_scale == 8 and training.state.t == 1
    for wrong in ({"recipe": "fp61"}, {"backend": "nump"}):
        with pytest.raises(UsageError, match="did you mean"):
            tiny(**wrong)


# ------------------------------------------------------------------------------------------------------ errors

x, y = good()
INTEGERS = "they must be an array of integers"
WRONG: dict[str, tuple[Any, str]] = {
    "a token of V": ([(x + 256, y)], r"token \d+ at \[0, 0\] is out of range: it must be 0 to 255$"),
    "a negative token": ([(x - 256, y)], r"token -\d+ at \[0, 0\] is out of range"),
    "a target of V": (
        [(x, y + 256)],
        r"loss: target \d+ at \[0.*\] is out of range: it must be 0 to 255, or -100 to be ignored",
    ),
    "too many tokens": ([(np.zeros((2, 9), int),) * 2], "9 tokens per sequence"),
    "a target too few": ([(x, y[:, 1:])], r"tokens \(2, 8\) and targets \(2, 7\) must have equal shapes"),
    "one row of targets": ([(x, y[:1])], r"tokens \(2, 8\) and targets \(1, 8\) must have equal shapes"),
    "no axis of rows": ([(x[0], y[0])], r"tokens have the shape \(8,\): it must be \(B, T\)"),
    "an axis too many": ([(x, y[None])], r"targets have the shape \(1, 2, 8\): it must be \(B, T\)"),
    "no rows": ([(x[:0], y[:0])], r"tokens have the shape \(0, 8\)"),
    "empty rows": ([(x[:, :0], y[:, :0])], r"tokens have the shape \(2, 0\)"),
    "fractions": ([(x.astype(np.float32), y)], f"tokens are of type float32: {INTEGERS}"),
    "truth values": ([(x, y > 0)], f"targets are of type bool: {INTEGERS}"),
    "lists": ([(x.tolist(), y.tolist())], f"tokens are of type list: {INTEGERS}"),
    "a text": ([("ab", "bc")], f"tokens are of type str: {INTEGERS}"),
    "a pair and no list": (
        (x, y),
        r"micro-batch 0 is of type ndarray: each must be a pair in a list .*\[\(tokens, targets\)\]",
    ),
    "three parts": ([(x, y, y)], "micro-batch 0 has 3 parts"),
    "nothing": ([None], "micro-batch 0 is of type NoneType"),
    "an array": (x, "batches is of type ndarray: it must be a list"),
    "a generator": (((x, y) for _ in range(1)), "batches is of type generator: it must be a list"),
    "None": (None, "batches is of type NoneType: it must be a list"),
    "no batch": ([], "no micro-batches: a step needs at least one"),
    "a second batch": ([(x, y), (x, y)], r"several micro-batches: State needs state_encodings\(grad_accum=...\)"),
}


@pytest.mark.parametrize("model", [GPT, MLP, LLAMA], ids=lambda model: model.name)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_batch_is_one_clear_line_and_changes_nothing(name: str, model: Any) -> None:
    batches, message = WRONG[name]
    training = tiny(model)
    before = {kind: buffer.tobytes() for kind, buffer in training.state.buffers.items()}
    with pytest.raises(UsageError, match=message) as error:
        training.step(batches)
    assert "\n" not in str(error.value)
    assert float(training.loss_scale.scale) == 65536 and training.state.t == 0
    del before["grads"]
    assert all(training.state.buffers[kind].tobytes() == buffer for kind, buffer in before.items())


def test_a_batch_too_short_is_for_models_that_read_any_length() -> None:
    short = x[:, 1:], y[:, 1:]
    assert np.isfinite(tiny().step([short]).loss) and np.isfinite(tiny(LLAMA).step([short]).loss)
    with pytest.raises(UsageError, match="7 tokens per sequence: the mlp reads exactly 8, its block_size"):
        tiny(MLP).step([short])


def test_a_step_after_the_schedule_says_so() -> None:
    training = tiny(recipe="fp32", steps=2)
    for _ in range(2):
        training.step([(x, y)])
    with pytest.raises(UsageError, match="all 2 updates of the schedule have been made: give Schedule more steps"):
        training.step([(x, y)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": "cosin"}, "unknown schedule 'cosin': .* did you mean cosine"),
        ({"steps": 0}, "steps is 0"),
        ({"warmup": -1}, "warmup -1"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"min_lr": float("nan")}, "min_lr nan"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        refimpl.Schedule(**{"lr": 1.0, "min_lr": 0.1, "warmup": 1, "steps": 4} | wrong)


def test_weights_that_are_not_those_of_the_model_are_refused() -> None:
    state, weights = tiny().state, GPT.initial_weights(np.random.default_rng(0))
    name = "transformer.wpe.weight"
    with pytest.raises(UsageError, match=rf"the weights for '{name}' have the shape \(16, 8\): it must be \(8, 16\)"):
        state.load_weights(weights | {name: weights[name].T})
    del weights[name]
    with pytest.raises(UsageError, match=rf"no weights for '{name}': there must be an array of shape \(8, 16\)"):
        state.load_weights(weights)
