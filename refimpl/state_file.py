"""Model states in and out of a checkpoint, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import checkpoint
from refimpl.backends import NUMPY, Backend
from refimpl.cast import cast
from refimpl.errors import UsageError
from refimpl.formats import dtype_of
from refimpl.models import GPTConfig, MLPConfig, Model, gpt, mlp
from refimpl.policy import Run
from refimpl.recipes import get_recipe
from refimpl.state import State

KEPT = ("weights", "master", "m", "v")
"""The kinds of state that a checkpoint holds; gradients are made anew by the next step."""


def state_arrays(state: State) -> dict[str, np.ndarray]:
    """kind.parameter -> array on the host, for every kind that is kept."""
    return {
        f"{kind}.{name}": state.backend.to_host(view)
        for kind in KEPT
        if kind in state.buffers
        for name, view in state.layout.views(state.buffers[kind]).items()
    }


def load_state_arrays(path: Path, arrays: dict[str, np.ndarray], state: State) -> None:
    """The way back. All is checked before anything is changed. Errors: UsageError naming the first tensor that differs."""
    loaded = {}
    for kind in KEPT:
        if kind in state.buffers:
            for name, (_, _, shape) in state.layout.slots.items():
                key = f"{kind}.{name}"
                loaded[key] = checkpoint.checked(path, arrays, key, shape, dtype_of(state.formats[kind]))
    surplus = arrays.keys() - loaded.keys()
    if surplus:
        raise UsageError(f"{path} has a tensor {min(surplus)} that this model and recipe do not: it is another run's")
    for kind in KEPT:
        if kind in state.buffers:
            for name, view in state.layout.views(state.buffers[kind]).items():
                view[...] = state.backend.from_host(loaded[f"{kind}.{name}"])


def fp32_weights(path: Path, arrays: Mapping[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    """The weights of a checkpoint in FP32 by name: its masters where it has them. Errors: UsageError."""
    kind = "master" if any(name.startswith("master.") for name in arrays) else "weights"
    weights = {}
    for name, spec in model.parameters.items():
        array = arrays.get(f"{kind}.{name}")
        if array is None or array.shape != spec.shape:
            raise UsageError(f"{path} has no {kind}.{name} of shape {spec.shape}")
        weights[name] = cast(array, "fp32")
    return weights


def load_initial_weights(path: Path, model: Model, state: State) -> None:
    """Start from the weights alone of a checkpoint of the same model, of any recipe: its masters where it has them."""
    arrays, header = checkpoint.load(path)
    if header.get("sizes") != dict(model.config) or header.get("model") != model.name:
        raise UsageError(f"{path} is a {header.get('model')} of sizes {header.get('sizes')}, this run's is another")
    state.load_weights(fp32_weights(path, arrays, model))


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
    state = State(model, {"weights": recipe.state["weights"]}, backend)
    only = {name: array for name, array in arrays.items() if name.startswith("weights.")}
    load_state_arrays(path, only, state)
    return model, state, Run(recipe.policy, backend)
