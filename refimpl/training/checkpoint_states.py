"""Save and load model states: the tensors of a checkpoint, by parameter, and the checks of its header."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.backends.base import Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import OPTIONAL
from refimpl.nn.models.model import Model
from refimpl.nn.models.registry import make_model
from refimpl.nn.ops import GELUS
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast
from refimpl.numerics.compensated import merge
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import Recipe, get_recipe
from refimpl.precision.state_encodings import BufferSpec, buffer_name, get_encoding
from refimpl.training import checkpoint
from refimpl.training.huggingface.config_json import is_hugging_face
from refimpl.training.huggingface.kinds import is_model_folder
from refimpl.training.huggingface.weights import read_model, refuse_non_finite
from refimpl.training.schema import FINITE, Integer, OneOf, Real, Table, Text, check
from refimpl.training.tokenizer import BYTES, Tokenizer, load_tokenizer
from refimpl.training.tokenizer import FILE as TOKENIZER

SAVED = ("weights", "master", "m", "v")
"""The kinds of state in a checkpoint. The next step computes the gradients again."""
SCALES = "scales."


def _buffers(state: State) -> Iterator[tuple[str, str, BufferSpec]]:
    """Yield (kind, part, spec) of every buffer that a checkpoint has."""
    for kind in SAVED:
        if kind in state.stored:
            for part, spec in state.encodings[kind].parts.items():
                yield kind, part, spec


def _tensors(name: str, spec: BufferSpec, buffer: Array, state: State) -> dict[str, Array]:
    """Return views of a buffer by name: `buffer.parameter`, or `buffer.flat` if parameters share elements.

    Examples: 'weights.wte.weight', 'weights_compensation.wte.weight', 'm_scales.flat'.
    """
    views = state.layout.views(buffer, spec.first) if spec.values == 1 else {"flat": buffer}
    return {f"{name}.{parameter}": view for parameter, view in views.items()}


def state_arrays(state: State) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint, on the host. All ranks must call this together."""
    arrays = {}
    for kind, part, spec in _buffers(state):
        whole = state.backend.to_host(state.gather(kind, part))
        arrays.update(_tensors(buffer_name(kind, part), spec, whole, state))
    return arrays


def saved_bytes(state: State) -> int:
    """Return the bytes of what `state_arrays` returns, without gathering it."""
    return sum(spec.size(state.layout.size) * spec.dtype.itemsize for _, _, spec in _buffers(state))


def scale_arrays(run: Run) -> dict[str, np.ndarray]:
    """Return what quantization remembers of past steps, by name: scales.tensor.format.array."""
    return {SCALES + name: array for name, array in run.scales.arrays().items()}


def load_scales(path: Path, run: Run, passes: int, arrays: dict[str, np.ndarray]) -> None:
    """Load what `scale_arrays` returned, and remove it from a checkpoint's arrays. Errors: UsageError if it is damaged."""
    try:
        run.scales.load(passes, take_scales(arrays))
    except (ValueError, KeyError) as error:  # raised for a name that is not of this form
        raise UsageError(f"{path} has damaged scales: {error}") from error


def take_scales(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Remove the tensors of `scale_arrays` from a checkpoint's arrays, and return them for `ScalingState.load`."""
    return {name.removeprefix(SCALES): arrays.pop(name) for name in sorted(arrays) if name.startswith(SCALES)}


def load_state_arrays(path: Path, arrays: dict[str, np.ndarray], state: State) -> None:
    """Load what `state_arrays` returned, after checking all of it. Errors: UsageError for the first bad tensor."""
    buffers = {
        (kind, part): (buffer_name(kind, part), spec, np.empty(spec.size(state.layout.size), spec.dtype))
        for kind, part, spec in _buffers(state)
    }
    views = {name: view for about in buffers.values() for name, view in _tensors(*about, state).items()}
    for name, view in views.items():
        view[...] = checkpoint.checked(path, arrays, name, view.shape, view.dtype)
    surplus = arrays.keys() - views.keys()
    if surplus:
        raise UsageError(f"{path} has a tensor {min(surplus)} that this model and recipe lack: it belongs to another run")
    for (kind, part), (_, _, whole) in buffers.items():
        state.load_gathered(kind, part, state.backend.from_host(whole))


# -- headers -----------------------------------------------------------------------------------------------------------

_SIZE = Integer(1, 2**31 - 1)
_NAMES = ("n_layer", "n_embd", "block_size", "vocab_size")
SIZES = {
    "gpt": Table(
        dict.fromkeys((*_NAMES, "n_head"), _SIZE),
        {"bias": OneOf((False, True)), "activation": OneOf(tuple(GELUS))},
        closed=True,
    ),
    "llama": Table(
        {
            **dict.fromkeys((*_NAMES, "n_head", "n_kv_head", "head_dim", "ffn_dim"), _SIZE),
            **dict.fromkeys(("rope_theta", "norm_eps"), FINITE), "rope_scaling": Text(),
            **dict.fromkeys(("qk_norm", "qkv_bias", "o_bias", "mlp_bias", "tied"), OneOf((False, True))),
        },
        closed=True,
    ),
    "mlp": Table(dict.fromkeys(_NAMES, _SIZE), closed=True),
}  # fmt: skip
MODEL_HEADER = Table({"model": OneOf(tuple(SIZES)), "sizes": Table(), "recipe": Text()})
"""The fields in every checkpoint's header: the model and the recipe of its weights."""

LARGEST_INT32 = 2**31 - 1
LOSS_SCALE = Table(
    {"scale": Real(0, math.inf)},
    {
        "growth_factor": FINITE, "backoff_factor": FINITE, "growth_interval": Integer(1),
        "_growth_tracker": Integer(0, LARGEST_INT32), "hysteresis": Integer(1, LARGEST_INT32),
        "_hysteresis_tracker": Integer(0, LARGEST_INT32), "exhausted": OneOf((0, 1)), "overflowed": OneOf((0, 1)),
    },
)  # fmt: skip
GENERATOR = Table({
    "bit_generator": OneOf(("PCG64",)), "state": Table({"state": Integer(0, 2**128 - 1), "inc": Integer(0, 2**128 - 1)}),
    "has_uint32": OneOf((0, 1)), "uinteger": Integer(0, 2**32 - 1),
})  # fmt: skip
RUN_HEADER = Table(
    {
        **MODEL_HEADER.fields, "config": Table(), "corpus": Table(), "t": Integer(), "loss_scale": LOSS_SCALE,
        "progress": Table({"step": Integer(), "skipped": Integer(), "skipped_in_a_row": Integer()}, closed=True),
        "generator": GENERATOR,
    },
    {"delayed_scales": Integer()},
)  # fmt: skip
"""The fields in the header of a run's checkpoint: all that determines the rest of the run."""


def check_run_header(path: Path, header: Mapping[str, Any]) -> None:
    """Check the header of a run's checkpoint before it is used.

    Errors: UsageError that names the first field that is missing, of another type, out of range, or contradicts another.
    """
    if "progress" not in header:
        raise UsageError(f"{path} has weights only, not the state of a run: start from it with --init-from")
    check(header, RUN_HEADER, f"{path} has a damaged header")
    progress = header["progress"]
    for name, value in (("t", header["t"]), *progress.items()):
        if value > progress["step"]:
            raise UsageError(f"{path} has a damaged header: {name} is {value} after {progress['step']} steps")


def model_of(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Model:
    """Return the model of a checkpoint's header, after checking that its tensors are the weights of that model.

    Errors: UsageError if the header is damaged, or tensors and header do not match.
    """
    check(header, MODEL_HEADER, f"{path} has a damaged header")
    check(header["sizes"], SIZES[header["model"]], f"{path} has a damaged header", "sizes")
    sizes = header["sizes"]
    if sizes["n_layer"] > len(arrays):  # before a table of 2^31 layers is built
        raise UsageError(f"{path} has a damaged header: {sizes['n_layer']} layers, and {len(arrays)} tensors")
    model = make_model(header["model"], sizes)
    for name, spec in model.parameters.items():
        array = arrays.get(f"weights.{name}")
        if array is None or array.shape != spec.shape:
            raise UsageError(f"{path} has no weights.{name} of shape {spec.shape}, which its header requires: it is damaged")
    return model


def tokenizer_of(path: Path, model: Model, given: str | None = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint that has been loaded: the one that is given, that beside it, or bytes.

    Errors: UsageError if the checkpoint was trained with another one, or a Hugging Face folder has none and none is given.
    """
    corpus = checkpoint.header_of(path).get("corpus")
    beside = (path if path.is_dir() else path.parent) / TOKENIZER
    usual = str(beside) if beside.exists() else BYTES.name
    if corpus is None:  # weights alone, which may have come from anywhere
        if given is None and is_hugging_face(path) and not beside.exists() and model.config["vocab_size"] > BYTES.vocab_size:
            what = f"there is no {TOKENIZER} in {path}, whose model has {model.config['vocab_size']} token ids"
            raise UsageError(f"{what}: give its tokenizer with --tokenizer FILE, or --tokenizer bytes if they are bytes")
        tokenizer = load_tokenizer(given or usual)
        if beside.exists() and tokenizer.checksum != load_tokenizer(usual).checksum:
            raise UsageError(f"{tokenizer.name} is not the tokenizer of {path}, {beside}: leave it out")
        return tokenizer
    trained = corpus.get("tokenizer", BYTES.checksum)
    tokenizer = load_tokenizer(given or (usual if trained != BYTES.checksum else BYTES.name))
    if tokenizer.checksum != trained:
        missing = f"; its own was {TOKENIZER} beside it: give it with --tokenizer" if tokenizer is BYTES else ""
        raise UsageError(f"{path} was trained with a tokenizer other than {tokenizer.name}{missing}")
    return tokenizer


# -- weights alone -----------------------------------------------------------------------------------------------------


def fp32_weights(path: Path, arrays: Mapping[str, np.ndarray], model: Model) -> dict[str, np.ndarray]:
    """Return the FP32 weights of a checkpoint by name: its masters, if it has any, else its weights. Errors: UsageError."""
    kind = "master" if any(name.startswith("master.") for name in arrays) else "weights"
    weights = {}
    for name, spec in model.parameters.items():
        array = arrays.get(f"{kind}.{name}")
        if array is None or array.shape != spec.shape:
            raise UsageError(f"{path} has no {kind}.{name} of shape {spec.shape}")
        lower = arrays.get(f"weights_remainder.{name}")
        weights[name] = cast(array, "fp32") if lower is None else merge(array, lower)
    return weights


class FirstWeights(NamedTuple):
    """What a run may start from: a model, and its FP32 weights by name, which may be read from a file when they are asked for.

    block_size: the length of the sequences that it was trained with, None where that is not known.
    """

    model: Model
    weights: Mapping[str, np.ndarray]
    block_size: int | None


def load_initial_weights(path: Path, model: Model, state: State, rounded: bool = False) -> None:
    """Load the weights of a checkpoint of the same model, of any recipe: its masters, if it has any.

    rounded: as in `State.load_weights`.
    """
    start_from(path, read_weights(path), model, state, rounded)


def read_weights(path: Path) -> FirstWeights:
    """Return the model of a checkpoint or of a Hugging Face folder, and its FP32 weights: its masters, if it has any.

    A note on stderr says where a folder's model computes something else here. Errors: UsageError.
    """
    if is_model_folder(path):
        model, weights, notes = read_model(path)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return FirstWeights(model, weights, None)
    arrays, header = checkpoint.load(path)
    model = model_of(path, header, arrays)
    weights = fp32_weights(path, arrays, model)
    for name, array in weights.items():
        refuse_non_finite(path, name, array)
    return FirstWeights(model, weights, _block_size(header, model))


def block_size_of(path: Path, model: Model) -> int | None:
    """Return the length of the sequences that a checkpoint, which has been loaded, was trained with; None for other folders."""
    return None if is_model_folder(path) else _block_size(checkpoint.header_of(path), model)


def _block_size(header: Mapping[str, Any], model: Model) -> int:
    size = header["config"].get("block_size") if isinstance(header.get("config"), dict) else None
    positions: int = model.config["block_size"]
    return size if type(size) is int and 1 <= size <= positions else positions


def start_from(path: Path, read: FirstWeights, model: Model, state: State, rounded: bool = False) -> None:
    """Load what `read_weights` returned. Errors: UsageError that names each setting in which the two models differ."""
    theirs, weights = read.model, read.weights
    if theirs.name != model.name:
        raise UsageError(f"{path} is a {theirs.name}, but this run's model is a {model.name}")
    if theirs.config != model.config:
        names = sorted(theirs.config.keys() | model.config.keys())
        pairs = {name: [one.config.get(name, OPTIONAL.get(name)) for one in (theirs, model)] for name in names}
        differences = ", ".join(f"{name} {a} instead of {b}" for name, (a, b) in pairs.items() if a != b)
        raise UsageError(f"{path} differs in size from this run: {differences}; what is not given is taken from the file")
    state.load_weights(weights, rounded)


def in_recipe(model: Model, weights: Mapping[str, np.ndarray], recipe: Recipe, backend: Backend = NUMPY) -> tuple[State, Run]:
    """Return FP32 weights rounded to the format of a recipe's weights, without other states, and the run that computes so."""
    state = State(model, {"weights": get_encoding(recipe.state["weights"]).fmt}, backend)
    state.load_weights(weights)
    return state, Run(recipe.policy, backend)


def load_for_inference(path: Path, backend: Backend = NUMPY) -> tuple[Model, State, Run]:
    """Return a checkpoint's model with its weights only, in the recipe's format: 2 bytes per parameter in 16 bits.

    A Hugging Face folder has no recipe: its model computes in FP32.
    Errors: UsageError if the file is damaged or does not match the model in its header.
    """
    if is_model_folder(path):
        model, weights, _ = read_weights(path)
        print(f"reading {path}: {model.n_params:,} parameters", file=sys.stderr)
        return model, *in_recipe(model, weights, get_recipe("fp32"), backend)
    arrays, header = checkpoint.load(path)
    model, recipe = model_of(path, header, arrays), get_recipe(header["recipe"])
    state = State(model, {"weights": get_encoding(recipe.state["weights"]).fmt}, backend)
    only = {name: array for name, array in arrays.items() if name.startswith("weights.")}
    load_state_arrays(path, only, state)
    run = Run(recipe.policy, backend)
    load_scales(path, run, 0, arrays)
    return model, state, run
