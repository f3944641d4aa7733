"""Ways to keep weights that are more than rounded numbers, trained on a device beside the host: the strict stand-in, or CuPy.

Gradients differ in last bits, since sums have another order there; so the host's updates are fed the device's own gradients,
and then every part of every state must have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.backends.base import Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.optim.adamw import AdamW
from refimpl.optim.optimizer import Rule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.training.config import Config
from refimpl.training.setup import INIT, Training, generator
from refimpl.training.trainer import Trainer

WEIGHTS = ("bf16-stochastic", "bf16-kahan", "bf16-remainder")
RULES: Mapping[str, Rule] = {"adamw": AdamW(), "sgd": SGD()}
CASES = [
    *((weights, moments, "adamw") for weights, moments in product(WEIGHTS, ("fp32", "bf16", "fp16"))),
    *((weights, "fp32", "sgd") for weights in WEIGHTS),
]
"""How weights and moments are kept, and the update rule."""
RECIPES = {"bf16-sr": "bf16-stochastic", "bf16-kahan": "bf16-kahan", "bf16-remainder": "bf16-remainder"}
"""The recipes that keep weights so."""
STEPS, OVERFLOWS = 8, (1, 4, 5)
"""So many steps are made, and in these (from 0) a gradient is infinite."""
TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "lr": 1e-3, "warmup": 2, "steps": STEPS,
    "loss_scale": "dynamic", "init_scale": 2.0**10, "growth_interval": 2, "recipe": "bf16-sr", "seed": 3,
}  # fmt: skip


def training_of(backend: Backend, weights: str, moments: str, rule: str) -> Training:
    """A run before its first step, with these encodings."""
    config = Config.of(TINY)
    training = config.make_training(backend)
    kept = {"weights": weights, "grads": "bf16", **dict.fromkeys(RULES[rule].moments, moments)}
    training.state = State(training.model, kept, backend, config.seed)
    training.optimizer.use(RULES[rule])
    training.state.load_weights(training.model.initial_weights(generator(config.seed, INIT)))
    return training


def overflow_in(training: Training, steps: tuple[int, ...]) -> None:
    """In these steps the gradient of one parameter is infinite."""
    accumulate, count = training.state.accumulate_grad, iter(range(1000))

    def spoiled(name: str, gradient: Any) -> None:
        if name == "transformer.ln_f.weight" and next(count) in steps:  # which has one gradient per step
            gradient = gradient.copy()
            gradient[...] = math.inf
        accumulate(name, gradient)

    training.state.accumulate_grad = spoiled  # type: ignore[method-assign]


def kept(state: State) -> dict[str, bytes]:
    """Every part of every state but the gradients, and t."""
    arrays = {name: buffer for name, buffer in state.buffers.items() if name != "grads"} | {"t": state.t}
    return {name: state.backend.to_host(x).tobytes() for name, x in arrays.items()}


def trained(training: Training, steps: int = STEPS) -> Iterator[bool]:
    """Train on drawn tokens; at each step whether it was skipped, which waits."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = tuple(training.state.backend.from_host(rng.integers(0, 256, (4, 8))) for _ in range(2))
        yield bool(training.step([batch]).skipped)


def beside_the_host(
    backend: Backend, weights: str, moments: str, rule: str
) -> Iterator[tuple[bool, dict[str, bytes], dict[str, bytes]]]:
    """At each step on the backend: whether it was skipped, and what is kept there and on a host that was fed its gradients."""
    there, here = (training_of(b, weights, moments, rule) for b in (backend, NUMPY))
    overflow_in(there, OVERFLOWS)
    update = there.optimizer.update

    def both(state: State, *numbers: Any) -> None:
        here.state.grads[...] = backend.to_host(state.grads)
        here.optimizer.update(here.state, *(x if isinstance(x, float) else backend.to_host(x)[()] for x in numbers))
        update(state, *numbers)

    there.optimizer.update = both  # type: ignore[method-assign]
    for skipped in trained(there):
        yield skipped, kept(there.state), kept(here.state)


def differences(backend: Backend, weights: str, moments: str, rule: str) -> list[str]:
    """Where the two are not the same to the bit, or a step was not skipped that should have been, or was not taken."""
    found, before = [], dict[str, bytes]()
    for step, (skipped, there, here) in enumerate(beside_the_host(backend, weights, moments, rule)):
        found += [f"step {step}: {name} differs" for name in here if there[name] != here[name]]
        if skipped != (step in OVERFLOWS):
            found.append(f"step {step} was {'skipped' if skipped else 'taken'}")
        stayed = [name for name in there if there[name] == before.get(name)]
        found += [f"step {step}: {name} moved" for name in there if skipped and name not in stayed]
        found += [f"step {step}: {name} stayed" for name in stayed if not skipped]
        before = there
    return found


def resumed(backend: Backend, recipe: str, folder: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What is kept after six steps on the backend; and after three, a checkpoint, and three more. `Config` must make it."""
    text = folder / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 200)
    config = Config.of({**TINY, "data": str(text), "recipe": recipe, "steps": 6})

    def run(name: str, start: int, stop: int) -> Trainer:
        (folder / name).mkdir(exist_ok=True)
        trainer = Trainer(config, folder / name)
        assert trainer.backend is backend or trainer.backend.name == backend.name == "cupy"
        if start:
            trainer.restore()
        for _ in range(start, stop):
            trainer._one_step(trainer.next_batches())
            trainer.progress.step += 1
        trainer.save()
        return trainer

    whole = run("whole", 0, 6)
    run("halves", 0, 3)
    return kept(whole.state), kept(run("halves", 3, 6).state)
