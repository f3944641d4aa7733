"""memory.py --measure: predictions met to the byte in every recipe, and a tape that keeps more is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SCRIPTS
from recipe_lists import MECHANISMS, others_slow

from refimpl.errors import UsageError
from refimpl.nn.op import Op
from refimpl.nn.ops import OPS
from refimpl.parity.trace import batches_of
from refimpl.precision.recipes import RECIPES
from refimpl.tools.memory.measure import (
    AGAIN,
    measure_model,
    measure_run,
    predicted_activations,
    state_lines,
    tape_lines,
    traced_peak,
)
from refimpl.tools.memory.tape import forward, owned_bytes, owner, tape_memory
from refimpl.training.activation_memory import largest, nbytes
from refimpl.training.config import Config
from refimpl.training.setup import INIT, generator

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4}
SCRIPT = SCRIPTS / "memory.py"


EVERY = [(recipe, model) for recipe in RECIPES for model in ("gpt", "llama", "mlp")]
OF_EACH_KIND = [
    *((recipe, "gpt") for recipe in MECHANISMS),
    *((recipe, model) for recipe in ("fp16", "amp-fp16", "mxfp8") for model in ("llama", "mlp")),
]
"""Of EVERY: each mechanism in one model; the others in one format, under autocast, and with quantized operands."""


@pytest.mark.parametrize(("recipe", "model"), others_slow(EVERY, plain=OF_EACH_KIND))
def test_every_prediction_is_met(recipe: str, model: str) -> None:
    result = measure_run(Config.of({**TINY, "recipe": recipe, "model": model, "steps": 2}))
    assert result.wrong == []
    assert sum(line.measured for line in result.sections["activations"]) > 0


@pytest.mark.parametrize("recipe", others_slow(RECIPES))
def test_every_prediction_is_met_with_checkpointing(recipe: str) -> None:
    """After forward, and in backward when the last block has been computed again."""
    result = measure_run(Config.of({**TINY, "n_layer": 3, "recipe": recipe, "steps": 1, "checkpointing": "full"}))
    assert result.wrong == [] and AGAIN in result.sections
    assert all(line.measured for line in result.sections[AGAIN])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("more", [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}, {"grad_accum": 2}])
def test_model_states_of_other_optimizers(recipe: str, more: dict[str, Any]) -> None:
    config = Config.of({**TINY, "recipe": recipe, "steps": 1, **more})
    lines = state_lines(config, config.make_training(config.make_backend()))
    assert all(line.verdict == "equal" for line in lines)
    kinds = {line.what for line in lines}
    assert kinds == set(RECIPES[recipe].buffers(config.make_rule().moments, config.grad_accum))
    assert ("v" in kinds) == ("optimizer" not in more) and ("m" in kinds) == (more.get("momentum") != 0.0)


def test_scales_are_whole_numbers() -> None:
    """One for each 256 values, and one for the rest."""
    config = Config.of({**TINY, "recipe": "adam-8bit", "steps": 1})
    training = config.make_training(config.make_backend())
    n = training.model.n_params
    lines = {line.what: line for line in state_lines(config, training)}
    assert n % 256 and lines["m_scales"].predicted == 4 * (n // 256 + 1)
    assert lines["m_scales"].formula == f"4 x {n:,} / 256, rounded up float32"
    training.state.buffers["v_scales"] = np.zeros(n // 256, np.float32)
    wrong = {line.what: line.verdict for line in state_lines(config, training) if line.verdict != "equal"}
    assert wrong == {"v_scales": "differs by -4 bytes"}


def hoarding(name: str) -> Op:
    """An operation that saves a copy of its output too, for nothing."""
    op = OPS[name]

    def forward(*arrays: Any, p: Any, **static: Any) -> Any:
        y, saved = op.forward(*arrays, p=p, **static)
        return y, (saved, y.copy())

    def backward(dy: Any, saved: Any, *params: Any, p: Any, **static: Any) -> Any:
        return op.backward(dy, saved[0], *params, p=p, **static)

    return Op(op.name, forward, backward, op.params)


@pytest.mark.parametrize("name", ["add", "layernorm", "linear"])
def test_a_tape_that_keeps_more_is_found_out(name: str) -> None:
    config = Config.of({**TINY, "recipe": "fp16", "steps": 1})
    training = config.make_training(config.make_backend())
    training.state.load_weights(training.model.initial_weights(generator(0, INIT)))
    batch = np.zeros((4, 8), np.int64), np.zeros((4, 8), np.int64)
    assert all(line.verdict == "equal" for line in tape_lines(config, training, batch)["activations"])
    training.run.overrides = {name: hoarding(name)}
    assert any("differs by +" in line.verdict for line in tape_lines(config, training, batch)["activations"])


@pytest.mark.parametrize("recipe", ["fp32", "amp-bf16"])
def test_the_peak_of_a_step_falls_by_a_block_less_its_input_per_layer(recipe: str) -> None:
    """As counted by tracemalloc, with temporary buffers. Python's objects are less than one array of the residual stream."""
    fallen, predicted = [], []
    for n_layer in (2, 5):
        peaks, stored = [], []
        for how in ("none", "full"):
            given = {"n_layer": n_layer, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 8, "steps": 2}
            config = Config.of({**given, "recipe": recipe, "checkpointing": how})
            batches = list(batches_of(config, None))
            traced_peak(config, batches[0])  # what a first step leaves in caches is not the tape's
            peaks.append(traced_peak(config, batches[1]))
            stored.append(nbytes(largest(predicted_activations(config))))
        fallen.append(peaks[0] - peaks[1])
        predicted.append(stored[0] - stored[1])
    assert abs((fallen[1] - fallen[0]) - (predicted[1] - predicted[0])) < 8 * 64 * 64 * 2


def test_so_is_a_block_that_saves_more_when_it_is_computed_again() -> None:
    config = Config.of({**TINY, "recipe": "fp16", "steps": 1, "checkpointing": "full"})
    training = config.make_training(config.make_backend())
    training.state.load_weights(training.model.initial_weights(generator(0, INIT)))
    training.run.overrides = {"layernorm": hoarding("layernorm")}
    sections = tape_lines(config, training, (np.zeros((4, 8), np.int64), np.zeros((4, 8), np.int64)))
    wrong = {name: [line.what for line in lines if "differs by +" in line.verdict] for name, lines in sections.items()}
    norms = [f"{name} input, {name} mean and rstd" for name in ("ln_f", "h.i ln_1", "h.i ln_2")]
    assert wrong == {"activations": norms[:1], "copies of weights": [], AGAIN: norms[1:]}


def test_a_state_that_is_larger_is_found_out() -> None:
    config = Config.of({**TINY, "recipe": "fp16", "steps": 1})
    training = config.make_training(config.make_backend())
    training.state.buffers["m"] = np.zeros(training.model.n_params + 1, np.float32)
    training.state.buffers["fp32 gradients"] = np.zeros(training.model.n_params, np.float32)
    wrong = {line.what: line.verdict for line in state_lines(config, training) if line.verdict != "equal"}
    assert wrong == {"m": "differs by +4 bytes", "fp32 gradients": f"differs by +{4 * training.model.n_params:,} bytes"}


def test_memory_is_counted_where_it_is_owned() -> None:
    x = np.zeros((4, 6), np.float32)
    assert owner(x[1:].T) is x
    assert owned_bytes([x[0], x.T, x], set()) == x.nbytes
    assert owned_bytes([x], {id(x)}) == 0


def test_weights_are_not_activations() -> None:
    config = Config.of({**TINY, "recipe": "fp32", "steps": 1})
    training = config.make_training(config.make_backend())
    training.state.load_weights(training.model.initial_weights(generator(0, INIT)))
    tokens = np.zeros((4, 8), np.int64)
    tape = forward(training, (tokens, tokens))
    before, _ = tape_memory(tape)
    tape.entries[-1].saved = (tape.entries[-1].saved, training.state.weight_views["transformer.wte.weight"])
    assert tape_memory(tape)[0] == before


def test_the_report_and_its_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_model({**TINY, "recipe": "amp-fp16"}, as_json=False) == 0
    text = capsys.readouterr().out
    assert "All predictions are equal to the byte." in text and "peak of the process" in text and "dropout mask" in text
    assert measure_model({**TINY, "recipe": "bf16"}, as_json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["equal"] and data["measured_only"]["peak memory of one step"] > 0
    monkeypatch.setattr("refimpl.tools.memory.measure.moments", lambda *a: [[]])
    assert measure_model({**TINY, "recipe": "fp16"}, as_json=False) == 1
    assert "NOT as predicted: activations: transformer.wte: not in the formula" in capsys.readouterr().out


def test_only_the_host_can_be_measured() -> None:
    with pytest.raises(UsageError, match="only numpy"):
        measure_model({**TINY, "backend": "cupy"}, as_json=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_is_that_of_the_process_itself_not_of_the_one_that_started_it() -> None:
    ballast = np.ones(25_000_000)  # 200 MB here, of which a child must know nothing
    code = "from refimpl.tools.memory.measure import process_memory; print(*process_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, peak = map(int, done.stdout.split())
    assert 0 < now <= peak < ballast.nbytes


def test_the_script_measures(tmp_path: Path) -> None:
    words = ["--measure", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "8", "--batch-size", "2"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "All predictions are equal to the byte." in done.stdout, done.stderr
