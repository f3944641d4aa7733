"""The `memory` command: the ledger of a choice of model and states, and published tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from refimpl.distributed.zero import COMMUNICATION, Bytes, per_rank
from refimpl.errors import UsageError, unknown
from refimpl.nn.checkpointing import CHECKPOINTING
from refimpl.nn.models.gpt import GPTConfig
from refimpl.precision.recipes import Recipe, get_recipe
from refimpl.tools.memory.states import (
    CONVENTIONS,
    GB,
    PRESETS,
    Architecture,
    published_activations,
    zero_table,
)
from refimpl.training.activation_memory import Row, against_paper, moments, nbytes, weight_copies
from refimpl.training.config import Config
from refimpl.training.console import json_text, table
from refimpl.training.memory_limits import GIB

OWN = "gpt"
"""The name of this project's GPT among the architectures."""
DEFAULT_PARAMS = 7_000_000_000
"""The number of parameters if no size is given."""


@dataclass(frozen=True)
class Line:
    """One line of a ledger, in bytes on one rank."""

    group: str
    name: str
    nbytes: int
    remark: str = ""


@dataclass(frozen=True)
class Choice:
    """The checked flags of scripts/memory.py. `model` is None if only the number of parameters is known."""

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


def choose(
    params: float | None = None,
    preset: str | None = None,
    model: str | None = None,
    sizes: Mapping[str, int] | None = None,
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
) -> Choice:
    """Check the flags and fill in defaults. sizes: n_layer, n_head, n_embd, vocab_size of this project's GPT.

    Errors: UsageError that names the flag and what it must be.
    """
    architecture = _architecture(params, preset, model, dict(sizes or {}), block_size)
    for flag, value in (("--ranks", ranks), ("--batch-size", batch_size), ("--grad-accum", grad_accum)):
        if value < 1:
            raise UsageError(f"{flag} is {value}: it must be at least 1")
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
    return Choice(what, n_params, states, source, architecture, chosen, zero, ranks, batch_size, T, checkpointing)


def _architecture(
    params: float | None, preset: str | None, model: str | None, sizes: dict[str, int], block_size: int | None
) -> Architecture | None:
    """Return the model that the flags name, if any."""
    given = [flag for flag, value in (("--params", params), ("--preset", preset), ("--model", model)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other: give one")
    if preset is not None and preset not in PRESETS:
        raise UsageError(unknown("preset", preset, PRESETS))
    if sizes and model is None:
        raise UsageError(f"--{min(sizes).replace('_', '-')} is a size of --model gpt: add --model gpt")
    if model is None:
        return PRESETS[preset] if preset else None
    if model != "gpt":
        raise UsageError(f"--model is {model!r}: the formulas are for gpt")
    default = Config.of({})
    filled = {"n_layer": default.n_layer, "n_head": default.n_head, "n_embd": default.n_embd, "vocab_size": 256, **sizes}
    gpt = GPTConfig(**filled, block_size=block_size or default.block_size)  # type: ignore[arg-type]
    return Architecture(
        OWN, gpt.n_layer, gpt.n_head, gpt.n_embd, gpt.block_size, gpt.vocab_size, "refimpl/nn/models/gpt.py"
    )


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


# ---------------------------------------------------------------------------------------------------- the ledger


def ledger(choice: Choice) -> list[Line]:
    """Return the model states of a choice, on one rank."""
    return [
        Line("model states", kind, nbytes, _divided(kind, nbytes, choice))
        for kind, nbytes in per_rank(choice.n_params, choice.states, choice.stage, choice.ranks).items()
    ]


def published(choice: Choice) -> list[Line]:
    """Return activations by the published formula; [] if no model is known."""
    if not choice.model:
        return []
    terms = published_activations(choice.model, choice.batch_size, choice.block_size, choice.checkpointing)
    lines = [Line("activations", t.name, t.count * t.nbytes, f"{t.count} layers" if t.count > 1 else "") for t in terms]
    if choice.checkpointing != "none":
        lines.append(Line("buffers", "one layer, recomputed", _one_layer(choice), "during its backward pass"))
    return lines


def _one_layer(choice: Choice) -> int:
    """Return the bytes that checkpointing recomputes for one layer."""
    assert choice.model
    whole = published_activations(choice.model, choice.batch_size, choice.block_size)
    kept = published_activations(choice.model, choice.batch_size, choice.block_size, choice.checkpointing)
    ends = 3  # terms that are not of a layer
    return sum(t.nbytes for t in whole[:-ends]) - sum(t.nbytes for t in kept[:-ends])


def _divided(kind: str, nbytes: int, choice: Choice) -> str:
    each = f"{_number(choice.states[kind])} bytes per parameter"
    return each + (f", 1/{choice.ranks} of it" if nbytes < choice.n_params * choice.states[kind] else "")


def _own_config(choice: Choice) -> GPTConfig | None:
    """Return the configuration of this project's GPT if the choice is about it, as it can train; else None."""
    a = choice.model
    if a is None or a.name != OWN or choice.checkpointing not in CHECKPOINTING:
        return None
    return GPTConfig(a.n_layer, a.n_head, a.n_embd, a.block_size, a.vocab_size)


def own_gpt(choice: Choice) -> list[Line]:
    """Return the activations of our GPT, by our formulas; [] if the choice is about another model."""
    config = _own_config(choice)
    if config is None or choice.recipe is None:
        return []
    terms, *later = moments(config, choice.recipe, choice.batch_size, choice.block_size, choice.checkpointing)
    lines = [Line("our GPT's tape", term.name, term.nbytes, f"{term.shape}, {term.fmt}") for term in terms]
    for again in later:
        remark = f"the last block is computed again: {nbytes(again):,} bytes with it, since what is above it has been freed"
        lines.append(Line("buffers", "more in backward", max(0, nbytes(again) - nbytes(terms)), remark))
    return lines + [Line("buffers", t.name, t.nbytes, f"{t.shape}, {t.fmt}") for t in weight_copies(config, choice.recipe)]


def show_memory(as_json: bool = False, **flags: Any) -> None:
    """Print the ledger. Errors: UsageError."""
    choice = choose(**flags)
    print(json_text(ledger_data(choice)) if as_json else ledger_text(choice))


def ledger_data(choice: Choice) -> dict[str, Any]:
    """Return the ledger as plain data. The total uses our formula for activations if there is one."""
    states, own, paper = ledger(choice), own_gpt(choice), published(choice)
    return {
        "what": choice.what,
        "states": choice.states_from,
        "parameters": choice.n_params,
        "bytes_per_parameter": float(sum(choice.states.values(), Fraction(0))),
        "zero": choice.stage,
        "ranks": choice.ranks,
        "communication_elements_per_parameter": COMMUNICATION[choice.stage] if choice.ranks > 1 else 0,
        "model_states": [vars(line) for line in states],
        "published_activations": [vars(line) for line in paper],
        "own_activations": [vars(line) for line in own],
        "total_bytes": _sum(states) + _sum(own or paper),
        "inference_bytes": 2 * choice.n_params,
    }


def ledger_text(choice: Choice) -> str:
    """Return the ledger as text."""
    states, own, paper = ledger(choice), own_gpt(choice), published(choice)
    rank = f", on each of {choice.ranks} ranks, ZeRO stage {choice.stage}" if choice.ranks > 1 else ""
    each = " + ".join(_number(size) for size in choice.states.values())
    total = _number(sum(choice.states.values(), Fraction(0)))
    parts = [
        f"{choice.what}{rank}\n{choice.states_from}",
        f"model states: {each} = {total} bytes per parameter\n{_table(states)}",
    ]
    sizes = f"{choice.batch_size} sequences of {choice.block_size} tokens, checkpointing {choice.checkpointing}"
    if own:
        parts.append(f"activations of this project's GPT by its own formula (see --measure), {sizes}\n{_table(own)}")
        config = _own_config(choice)
        assert config and choice.recipe
        parts.append(paper_text(config, choice.recipe, choice.batch_size, choice.block_size))
    elif paper:
        parts.append(f"activations by the published formula (arXiv 2205.05198; 16 bits, dropout), {sizes}\n{_table(paper)}")
    parts += _remarks(choice)
    parts.append(_totals(choice, states, own or paper))
    return "\n\n".join(parts)


def _remarks(choice: Choice) -> list[str]:
    """Return remarks on the figures."""
    if choice.model is None:
        remarks = ["Activations depend on the model's sizes: give --preset or --model gpt."]
        if choice.n_params == DEFAULT_PARAMS:
            gpt2 = 16 * 1_500_000_000 // GB
            remarks.append(f"(The often quoted {gpt2} GB are for the 1.5 billion parameters of GPT-2, in arXiv 1910.02054.)")
        return remarks
    if not choice.model.gpt:
        return ["The formula counts dropout masks, which this model lacks; its gated MLP stores one more F than a GPT's."]
    return []


def _totals(choice: Choice, states: Sequence[Line], rest: Sequence[Line]) -> str:
    rows = [["model states", *_units(_sum(states))]]
    if rest:
        rows += [["activations and buffers", *_units(_sum(rest))], ["total", *_units(_sum(states) + _sum(rest))]]
    rows.append(["inference only, 2 bytes per parameter", *_units(2 * choice.n_params)])
    text = table(["", "GB (10^9)", "GiB (2^30)"], rows)
    if choice.ranks > 1:
        text += f"\n\neach rank sends about {COMMUNICATION[choice.stage]} elements per parameter and step"
    return text


def paper_text(config: GPTConfig, recipe: Recipe, batch_size: int, block_size: int) -> str:
    """Return a table of one layer, tensor by tensor, by the published formula and by ours."""
    rows = against_paper(config, recipe, batch_size, block_size)
    rows.append(Row("total", sum(row.paper for row in rows), sum(row.ours for row in rows), ""))
    cells = [[row.tensor, f"{row.paper:,}", f"{row.ours:,}", row.why] for row in rows]
    return (
        "One layer by the published formula, 34 s b h + 5 a s^2 b bytes (Korthikanti et al. 2022, arXiv 2205.05198):\n"
        f"16-bit values, with dropout; s = T, b = B, h = C, a = H. Ours is recipe {recipe.name}, without dropout.\n"
        + table(["tensor", "paper", "ours", "why"], cells, "  ")
    )


def _table(lines: Sequence[Line]) -> str:
    rows = [[line.name, f"{line.nbytes:,}", *_units(line.nbytes), line.remark] for line in lines]
    rows.append(["total", f"{_sum(lines):,}", *_units(_sum(lines)), ""])
    return table(["kind", "bytes", "GB", "GiB", ""], rows, "  ")


def _sum(lines: Sequence[Line]) -> int:
    return sum(line.nbytes for line in lines)


def _units(nbytes: int) -> tuple[str, str]:
    """Return bytes in GB and GiB as text: four digits or more, and whole numbers without decimals: '112', '104.3'."""
    return _short(nbytes / GB), _short(nbytes / GIB)


def _short(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) else f"{x:,.1f}" if x >= 100 else f"{x:.4g}"


def _number(size: Fraction) -> str:
    return f"{float(size):g}"


# ---------------------------------------------------------------------------------------------------- the published tables


def show_conventions(as_json: bool = False) -> None:
    """Print every published convention: bytes by kind, their sum, and the source."""
    if as_json:
        print(json_text({
            c.name: {"states": {k: float(v) for k, v in c.states.items()}, "total": float(c.total), "source": c.source,
                     "remark": c.remark}
            for c in CONVENTIONS.values()
        }))  # fmt: skip
        return
    rows = []
    for c in CONVENTIONS.values():
        split = " + ".join(f"{kind} {_number(size)}" for kind, size in c.states.items())
        rows.append([c.name, _number(c.total), split, c.source, c.remark])
    print("Published bytes per parameter of the model states, with Adam.\n")
    print(table(["convention", "bytes", "of which", "source", ""], rows))


def show_zero_table(as_json: bool = False) -> None:
    """Print ZeRO's table: GB of model states per rank, by stage and number of ranks."""
    tables = zero_table()
    if as_json:
        print(json_text({str(n): {str(r): dict(zip(("1", "2", "3"), gb, strict=True)) for r, gb in rows.items()}
                         for n, rows in tables.items()}))  # fmt: skip
        return
    header = ["ranks"] + [f"{n / 1e9:g}B: stage {stage}" for n in tables for stage in (1, 2, 3)]
    ranks = next(iter(tables.values())).keys()
    rows = [[str(r), *(_short(gb) for n in tables for gb in tables[n][r])] for r in ranks]
    print("GB (10^9 bytes) of model states per rank at 16 bytes per parameter: arXiv 1910.02054, table 1.\n")
    print(table(header, rows))
    print("\nStage 1 divides the optimizer's states, 2 the gradients too, 3 the weights too. Each rank sends about "
          + ", ".join(f"{elements} (stage {stage})" for stage, elements in COMMUNICATION.items() if stage)
          + " elements per parameter and step.")  # fmt: skip
