"""Model states in and out of a checkpoint, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import checkpoint
from refimpl.backends import NUMPY, Backend
from refimpl.cast import cast
from refimpl.compensated import merge
from refimpl.errors import UsageError
from refimpl.models import GPTConfig, MLPConfig, Model, gpt, mlp
from refimpl.policy import Run
from refimpl.recipes import get_recipe
from refimpl.state import State
from refimpl.storage import Part, buffer_name, get_storage

Array = Any

KEPT = ("weights", "master", "m", "v")
"""The kinds of state that a checkpoint holds; gradients are made anew by the next step."""
SCALES = "scales."


def _buffers(state: State) -> Iterator[tuple[str, str, Part]]:
    """(kind, part, how it is stored) of every buffer that is kept."""
    for kind in KEPT:
        if kind in state.stored:
            for part, spec in state.storages[kind].parts.items():
                yield kind, part, spec


def _tensors(name: str, spec: Part, buffer: Array, state: State) -> dict[str, Array]:
    """Views of a buffer by name, buffer.parameter; buffer.flat where parameters share elements.

    So 'weights.wte.weight', 'weights_compensation.wte.weight', 'm_scales.flat'.
    """
    views = state.layout.views(buffer) if spec.values == 1 else {"flat": buffer}
    return {f"{name}.{parameter}": view for parameter, view in views.items()}


def state_arrays(state: State) -> dict[str, np.ndarray]:
    """All that is kept of the states, on the host; of all ranks, if they are divided, and all must ask."""
    arrays = {}
    for kind, part, spec in _buffers(state):
        whole = state.backend.to_host(state.whole(kind, part))
        arrays.update(_tensors(buffer_name(kind, part), spec, whole, state))
    return arrays


def scale_arrays(run: Run) -> dict[str, np.ndarray]:
    """What quantisation remembers of past steps: scales.tensor.format.array."""
    return {SCALES + name: array for name, array in run.scales.arrays().items()}


def take_scales(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Remove from a checkpoint's arrays what `scale_arrays` made, and return it for `Scales.load`."""
    return {name.removeprefix(SCALES): arrays.pop(name) for name in sorted(arrays) if name.startswith(SCALES)}


def load_state_arrays(path: Path, arrays: dict[str, np.ndarray], state: State) -> None:
    """The way back. All is checked before anything is changed. Errors: UsageError naming the first tensor that differs."""
    buffers = {
        (kind, part): (buffer_name(kind, part), spec, np.empty(spec.size(state.layout.size), spec.dtype))
        for kind, part, spec in _buffers(state)
    }
    views = {name: view for about in buffers.values() for name, view in _tensors(*about, state).items()}
    for name, view in views.items():
        view[...] = checkpoint.checked(path, arrays, name, view.shape, view.dtype)
    surplus = arrays.keys() - views.keys()
    if surplus:
        raise UsageError(f"{path} has a tensor {min(surplus)} that this model and recipe do not: it is another run's")
    for (kind, part), (_, _, whole) in buffers.items():
        state.put_whole(kind, part, state.backend.from_host(whole))


def fp32_weights(path: Path, arrays: Mapping[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    """The weights of a checkpoint in FP32 by name: its masters where it has them, or their two halves. Errors: UsageError."""
    kind = "master" if any(name.startswith("master.") for name in arrays) else "weights"
    weights = {}
    for name, spec in model.parameters.items():
        array = arrays.get(f"{kind}.{name}")
        if array is None or array.shape != spec.shape:
            raise UsageError(f"{path} has no {kind}.{name} of shape {spec.shape}")
        lower = arrays.get(f"weights_remainder.{name}")
        weights[name] = cast(array, "fp32") if lower is None else merge(array, lower)
    return weights


def load_initial_weights(path: Path, model: Model, state: State, rounded: bool = False) -> None:
    """Start from the weights alone of a checkpoint of the same model, of any recipe: its masters where it has them.

    rounded: as in `State.load_weights`.
    """
    arrays, header = checkpoint.load(path)
    if header.get("sizes") != dict(model.config) or header.get("model") != model.name:
        raise UsageError(f"{path} is a {header.get('model')} of sizes {header.get('sizes')}, this run's is another")
    state.load_weights(fp32_weights(path, arrays, model), rounded)


def model_of(path: Path, header: Mapping[str, Any]) -> Model:
    """The model that a checkpoint's header names. Errors: UsageError."""
    try:
        sizes = header["sizes"]
        return gpt(GPTConfig(**sizes)) if header["model"] == "gpt" else mlp(MLPConfig(**sizes))
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} has a damaged header: {error!r}") from error


def load_for_inference(path: Path, backend: Backend = NUMPY) -> tuple[Model, State, Run]:
    """A checkpoint's model with its weights alone, in the recipe's format: 2 bytes a parameter in 16 bits.

    Errors: UsageError when the file is damaged or does not fit the model that it names.
    """
    arrays, header = checkpoint.load(path)
    model, recipe = model_of(path, header), get_recipe(header.get("recipe", "no recipe"))
    state = State(model, {"weights": get_storage(recipe.state["weights"]).fmt}, backend)
    only = {name: array for name, array in arrays.items() if name.startswith("weights.")}
    load_state_arrays(path, only, state)
    run = Run(recipe.policy, backend)
    run.scales.load(0, take_scales(arrays))
    return model, state, run
