"""What the flags of scripts/memory.py choose: a model, how its states are stored, and which activations are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refimpl.distributed.zero import COMMUNICATION, Bytes
from refimpl.errors import UsageError, nearest, unknown
from refimpl.nn.checkpointing import CHECKPOINTING
from refimpl.nn.models.gpt import GPTConfig
from refimpl.nn.models.llama import LlamaConfig
from refimpl.nn.models.registry import SIZES
from refimpl.precision.policy_variants import ATTENTION, with_attention
from refimpl.precision.recipes import Recipe, get_recipe
from refimpl.tools.memory.states import CHECKPOINTING as KNOWN_CHECKPOINTING
from refimpl.tools.memory.states import CONVENTIONS, PRESETS, Architecture
from refimpl.training.config import LLAMA, Config, flag
from refimpl.training.huggingface.config_json import read_config

OWN = ("gpt", "llama")
"""The models of this project that are known here."""
DEFAULT_PARAMS = 7_000_000_000
"""The number of parameters if no size is given."""


@dataclass(frozen=True)
class Choice:
    """The checked flags of scripts/memory.py.

    model: None if only the number of parameters is known. own: the sizes of our model, where activations are those of its tape.
    notes: what else is to be said of the model.
    """

    what: str
    n_params: int
    states: Bytes
    states_from: str
    model: Architecture | None
    recipe: Recipe | None
    stage: int
    ranks: int
    batch_size: int
    block_size: int
    checkpointing: str
    own: GPTConfig | LlamaConfig | None = None
    notes: tuple[str, ...] = ()


def choose(
    params: float | None = None,
    preset: str | None = None,
    model: str | None = None,
    hf: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    convention: str | None = None,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    grad_accum: int = 1,
    zero: int = 0,
    ranks: int = 1,
    batch_size: int = 1,
    block_size: int | None = None,
    checkpointing: str = "none",
    attention: str | None = None,
) -> Choice:
    """Check the flags and fill in defaults. sizes: n_layer, n_head and so on, of this project's gpt or llama.

    Activations are those of our own tape if a recipe, --model or --hf is given, else those of the published formula.
    Errors: UsageError that names the flag and what it must be.
    """
    architecture, sizes_of_ours, notes = _architecture(params, preset, model, hf, dict(sizes or {}), block_size)
    for name, value in (("--ranks", ranks), ("--batch-size", batch_size), ("--grad-accum", grad_accum)):
        if value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    if checkpointing not in KNOWN_CHECKPOINTING:
        raise UsageError(unknown("checkpointing", checkpointing, KNOWN_CHECKPOINTING))
    if zero not in COMMUNICATION:
        raise UsageError(f"--zero is {zero}: it must be 0, 1, 2 or 3")
    if params is not None and not 1 <= params < 1e18:
        raise UsageError(f"--params is {params:g}: it must be at least 1 and finite")
    T = block_size if block_size is not None else architecture.block_size if architecture else 0
    if architecture and not 1 <= T <= architecture.block_size:
        raise UsageError(f"--block-size is {T}: {architecture.name} takes 1 to {architecture.block_size} tokens")
    states, source, chosen = _states(recipe, convention, optimizer, momentum, grad_accum, architecture)
    n_params = architecture.n_params if architecture else int(DEFAULT_PARAMS if params is None else params)
    what = f"{architecture.name}, {n_params:,} parameters" if architecture else f"{n_params:,} parameters"
    ours = architecture and chosen and checkpointing in CHECKPOINTING and (recipe or not preset)
    own = sizes_of_ours if ours else None
    if attention is not None:
        if attention not in ATTENTION:
            raise UsageError(unknown("attention", attention, ATTENTION))
        if chosen is None or own is None:
            raise UsageError("--attention is for the activations of this project's own tape: give a model, and --recipe")
        chosen = replace(chosen, policy=with_attention(chosen.policy, attention))
    common = (zero, ranks, batch_size, T, checkpointing)
    return Choice(what, n_params, states, source, architecture, chosen, *common, own, notes)


def _architecture(
    params: float | None, preset: str | None, model: str | None, hf: str | None, sizes: dict[str, Any], block_size: int | None
) -> tuple[Architecture | None, GPTConfig | LlamaConfig | None, tuple[str, ...]]:
    """Return the model that the flags name, if any, its sizes if we have it, and what is to be said of it."""
    flags = {"--params": params, "--preset": preset, "--model": model, "--hf": hf}
    given = [name for name, value in flags.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other: give one")
    if preset is not None and preset not in PRESETS:
        raise UsageError(unknown("preset", preset, PRESETS))
    if sizes and model is None:
        kinds = "llama" if min(sizes) in LLAMA else "gpt or llama"
        raise UsageError(f"{flag(min(sizes))} is a size of --model {kinds}: add --model")
    if hf is not None:
        path = Path(hf).resolve()
        found, folder = read_config(Path(hf)), path.parent if path.is_file() else path
        return *_ours(found.model, found.sizes, folder.name, hf), found.notes
    if model is None:
        known = PRESETS[preset] if preset else None
        return known, known.sizes if known else None, ()
    if model not in OWN:
        raise UsageError(f"--model is {model!r}: the formulas are for {' and '.join(OWN)}{nearest(model, OWN)}")
    config = Config.of({"model": model, **sizes, "block_size": block_size})
    one = replace(config, n_layer=1).make_model().config  # --n-layer may be 10^9
    return *_ours(model, {**one, "n_layer": config.n_layer}, model, f"refimpl/nn/models/{model}.py"), ()


def _ours(model: str, sizes: Mapping[str, Any], name: str, source: str) -> tuple[Architecture, GPTConfig | LlamaConfig]:
    """Return the architecture of a gpt or llama of these sizes, and the sizes."""
    own = SIZES[model](**sizes)
    assert isinstance(own, GPTConfig | LlamaConfig)
    return Architecture.of(name, own, source), own


def _states(
    recipe: str | None, convention: str | None, optimizer: str, momentum: float, grad_accum: int, model: Architecture | None
) -> tuple[Bytes, str, Recipe | None]:
    if convention is not None:
        if recipe is not None:
            raise UsageError("--convention and --recipe contradict each other: give one")
        if convention not in CONVENTIONS:
            raise UsageError(unknown("convention", convention, CONVENTIONS))
        row = CONVENTIONS[convention]
        return row.states, f"convention {row.name}: {row.source}", None
    chosen, rule = get_recipe(recipe or "fp16"), Config.of({"optimizer": optimizer, "momentum": momentum}).make_rule()
    kept = f"recipe {chosen.name} with {optimizer}" + (f", {grad_accum} micro-batches" if grad_accum > 1 else "")
    embeddings = (model.vocab_size + model.gpt * model.block_size) * model.n_embd if model else 0
    if model is None and any(part.first is not None for part in chosen.buffers().values()):
        kept += " (without states of embeddings only: give a model)"
    return chosen.bytes_by_buffer(rule.moments, grad_accum, embeddings, model.n_params if model else 1), kept, chosen
