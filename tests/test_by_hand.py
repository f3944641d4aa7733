"""scripts/by_hand.py: `train_step` does the same, to the bit, and what the script prints is so.

Every product sums two exact products of FP16 values, so that no order of sums and no BLAS can make a difference.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from arrays import Array
from paths import SCRIPTS
from script_loader import load_script

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.autograd import Tape, Value
from refimpl.nn.models.model import Model, Parameter
from refimpl.nn.op import Op
from refimpl.nn.ops import linear
from refimpl.numerics.casts import cast, widen
from refimpl.optim.adamw import AdamW
from refimpl.optim.loss_scalers import make_loss_scale
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.step import train_step

SCRIPT = SCRIPTS / "by_hand.py"
by_hand = load_script("by_hand")
STEPS = 20


def squared_error(y: Array, target: Array, p: Any) -> tuple[Array, Array]:
    """The mean squared error of FP16 outputs, in FP32."""
    error = widen(y) - target
    return (error * error).mean(), error


def squared_error_backward(dloss: Array, error: Array, p: Any) -> tuple[Array, None]:
    return cast(dloss * (2 / error.size) * error, "fp16"), None


def loss(t: Tape, x: Array, target: Array) -> Value:
    return t(Op("squared_error", squared_error, squared_error_backward), "loss", t(linear, "layer", x), target)


LAYER = Model("layer", {}, {"layer.weight": Parameter(by_hand.W.shape)}, {}, lambda t, x: t(linear, "layer", x), loss)


KINDS = {"w": "weights", "dw": "grads", "master": "master", "m": "m", "v": "v"}


def refimpl_steps(backend: Backend = REFERENCE) -> list[dict[str, Any]]:
    """The same training by `train_step`: what each step did."""
    row, rule = get_recipe("fp16"), AdamW((by_hand.BETA1, by_hand.BETA2), by_hand.EPS, weight_decay=0.0)
    state = State(LAYER, row.state_encodings(rule.moments), backend)
    state.load_weights({"layer.weight": by_hand.W})
    optimizer = Optimizer(rule, Schedule(by_hand.LR, by_hand.LR, 0, STEPS, "constant"))
    loss_scale = make_loss_scale("dynamic", growth_interval=by_hand.GROWTH_INTERVAL)
    run, done = Run(row.policy, backend), []
    for _ in range(STEPS):
        result = train_step(LAYER, [(by_hand.X, by_hand.TARGET)], state, optimizer, loss_scale, run)
        arrays = {name: state.views(kind)["layer.weight"].copy() for name, kind in KINDS.items()}
        done.append({"S": float(result.loss_scale), "loss": result.loss, "skipped": bool(result.skipped), **arrays})
    return done


def first_difference(script: types.ModuleType, theirs: list[dict[str, Any]]) -> str:
    """The first step and value that differ in type or bits; '' if none does."""
    with np.errstate(all="ignore"):
        for step, (ours, expected) in enumerate(zip(script.train(STEPS), theirs, strict=True), 1):
            for name, value in expected.items():
                a, b = np.asarray(ours[name]), np.asarray(value)
                if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                    return f"step {step}: {name}"
    return ""


@pytest.mark.parametrize("backend", [REFERENCE, NUMPY], ids=lambda backend: backend.name)
def test_train_step_does_the_same_to_the_bit(backend: Backend) -> None:
    theirs = refimpl_steps(backend)
    assert first_difference(by_hand, theirs) == ""
    assert [step["skipped"] for step in theirs[:6]] == [True, False, False, False, True, False]
    assert {step["S"] for step in theirs} == {65536.0, 32768.0}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("w = master.astype(np.float16)", "w = (W if t == 0 else master).astype(np.float16) if t < 2 else w"),  # stale weights
        ("(S * (2 / error.size) * error).astype(np.float16)", "np.float16(S / 2) * (0.4 * error).astype(np.float16)"),
        ("@ w.astype(np.float32).T).astype(np.float16)", "@ w.astype(np.float32).T)"),
        ("@ X.astype(np.float32)).astype(np.float16)", "@ X.astype(np.float32))"),
        ("skipped = not np.isfinite(g).all()", "skipped = False"),
        ("        g /= S\n", "        pass\n"),
        ("master.astype(np.float16)  # 1.", "np.trunc(master * 1024).astype(np.float16) / np.float16(1024)  # 1."),
        ("            t += 1\n", "            pass\n        t += 1\n        if not skipped:\n"),
        ("            m += (1 - BETA1) * (g - m)\n", "            m = m * BETA1 + (1 - BETA1) * g\n"),
        ("math.sqrt(1 - BETA2**t)", "np.sqrt(1 - BETA2**t)"),
        ("/ root + EPS)", "/ (root + EPS))"),
        ("step_size * m / (np", "m / (np"),
        ("step_size * m / (np.sqrt(v) / root + EPS)", "step_size * (m / (np.sqrt(v) / root + EPS))"),
        ("S / 2 if skipped", "S if skipped"),
        ("S * 2, 0", "S * 2, int(skipped)"),
        ("if skipped or good_steps == GROWTH_INTERVAL", "if skipped"),
    ],
)  # fmt: skip
def test_a_script_with_a_mistake_differs(right: str, wrong: str) -> None:
    """Negative control: each line of the four steps matters to the comparison."""
    text = SCRIPT.read_text()
    assert text.count(right) == 1
    changed = types.ModuleType("changed_by_hand")
    exec(compile(text.replace(right, wrong), "changed", "exec"), changed.__dict__)
    assert first_difference(changed, refimpl_steps())


def test_it_is_short_and_needs_numpy_only() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 60
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names}
    assert modules == {"math", "sys", "typing", "numpy"}


def test_what_it_prints_is_so() -> None:
    done = subprocess.run([sys.executable, "-W", "error", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second, _, _, *rows, _, last = done.stdout.splitlines()
    assert first == "backward from     1 * loss: 2 of the ten gradients are 0 in FP16"
    assert second == "backward from 32768 * loss: 0 of the ten gradients are 0 in FP16"
    exact = by_hand.W.astype(np.float16).astype(np.float64) @ by_hand.X.T.astype(np.float64) - by_hand.TARGET.T
    assert np.all(exact @ by_hand.X.astype(np.float64) != 0)  # the ten gradients are not 0: two of them underflow
    assert ["skipped" in row for row in rows] == [True, False, False, False, True, False, False, False]
    shown = [re.findall(r"(\S+) -> (\S+)", row)[0] for row in rows]
    masters, weights = ([float(pair[i]) for pair in shown] for i in (0, 1))
    assert masters == [1.0, 1.0001, 1.0002, 1.0003, 1.0003, 1.0004, 1.0005, 1.0006]  # each update but the skipped ones
    assert weights == [1.0] * 6 + [1.000977] * 2  # and the weight moves once they add up to half a step of FP16
    assert np.nextafter(np.float16(1), np.float16(2)) == 1 + 2.0**-10 and "1.000977" in last
    assert np.float16(1) + np.float16(0.0001) == 1


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_says_what_it_does_and_does_nothing(flag: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, flag], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, by_hand.__doc__.strip(), "")
