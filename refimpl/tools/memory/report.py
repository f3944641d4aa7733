"""The `memory` command: the ledger of a choice of model and states, and published tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from refimpl.distributed.zero import COMMUNICATION, per_rank
from refimpl.nn.checkpointing import CHECKPOINTING
from refimpl.nn.models.gpt import GPTConfig
from refimpl.precision.recipes import Recipe
from refimpl.tools.memory.choice import DEFAULT_PARAMS, Choice, choose
from refimpl.tools.memory.states import (
    CONVENTIONS,
    GB,
    published_activations,
    zero_table,
)
from refimpl.training.activation_memory import Row, against_paper, moments, nbytes, weight_copies
from refimpl.training.columns import table
from refimpl.training.console import count, json_text
from refimpl.training.memory_limits import GIB


@dataclass(frozen=True)
class Line:
    """One line of a ledger, in bytes on one rank."""

    group: str
    name: str
    nbytes: int
    remark: str = ""


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


def own_activations(choice: Choice) -> list[Line]:
    """Return the activations of our own model, by our formulas; [] if the choice is about published ones."""
    config = choice.own
    if config is None or choice.recipe is None:
        return []
    terms, *later = moments(config, choice.recipe, choice.batch_size, choice.block_size, choice.checkpointing)
    lines = [Line("our tape", term.name, term.nbytes, f"{term.shape}, {term.fmt}") for term in terms]
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
    states, own, paper = ledger(choice), own_activations(choice), published(choice)
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
    states, own, paper = ledger(choice), own_activations(choice), published(choice)
    rank = f", on each of {choice.ranks} ranks, ZeRO stage {choice.stage}" if choice.ranks > 1 else ""
    each = " + ".join(_number(size) for size in choice.states.values())
    total = _number(sum(choice.states.values(), Fraction(0)))
    parts = [
        f"{choice.what}{rank}\n{choice.states_from}",
        f"model states: {each} = {total} bytes per parameter\n{_table(states)}",
    ]
    batch = f"{count(choice.batch_size, 'sequence')} of {count(choice.block_size, 'token')}"
    sizes = f"{batch}, checkpointing {choice.checkpointing}"
    if own:
        what = "GPT" if isinstance(choice.own, GPTConfig) else "llama"
        parts.append(f"activations of this project's {what} by its own formula (see --measure), {sizes}\n{_table(own)}")
        if isinstance(choice.own, GPTConfig) and choice.recipe:
            parts.append(paper_text(choice.own, choice.recipe, choice.batch_size, choice.block_size))
    elif paper:
        parts.append(f"activations by the published formula (arXiv 2205.05198; 16 bits, dropout), {sizes}\n{_table(paper)}")
    parts += _remarks(choice)
    parts.append(_totals(choice, states, own or paper))
    return "\n\n".join(parts)


def _remarks(choice: Choice) -> list[str]:
    """Return remarks on the figures."""
    if choice.model is None:
        remarks = ["Activations depend on the model's sizes: give --preset, --model or --hf."]
        if choice.n_params == DEFAULT_PARAMS:
            gpt2 = 16 * 1_500_000_000 // GB
            remarks.append(f"(The often quoted {gpt2} GB are for the 1.5 billion parameters of GPT-2, in arXiv 1910.02054.)")
        return remarks
    remarks = list(choice.notes)
    if choice.own is None and not choice.model.gpt:
        remarks.append("The formula counts dropout masks, which this model lacks; its gated MLP has one more F than a GPT's.")
    if choice.own is None and choice.model.sizes and choice.checkpointing in CHECKPOINTING:
        remarks.append("Give --recipe for the activations of this project's own tape.")
    return remarks


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
