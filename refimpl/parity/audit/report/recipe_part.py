"""The loop's recipe as a section of the page: from the data of `LoopRecipe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.parity.audit.report import wording
from refimpl.training.html.page import paragraphs, table

EXPLAINED = """\
Read off the last audited step, in the words of refimpl's own recipes: which format each operation reads, sums in and \
writes, how each state is stored, and how the loss is scaled."""
HEADS = ("operation", "where", "inputs", "sums", "output", "places")


def recipe_section(recipe: Mapping[str, Any]) -> list[str]:
    """Return the parts of the section."""
    also = f" Equally near: {', '.join(recipe['also'])}." if recipe["also"] else ""
    operations = [
        [row["operation"], _where(row), row["inputs"], row["sums"], row["output"], f"{row['count']:,}"]
        for row in recipe["operations"]
    ]
    states = [[s["kind"], s["encoding"] or s["format"], wording.amount(s["bytes"])] for s in recipe["states"]]
    return [
        paragraphs([f"Nearest: {recipe['sentence']}.{also}", EXPLAINED]),
        table("Operations of the recipe", HEADS, operations, sentences=True),
        table("States", ("state", "stored as", "bytes"), states),
        paragraphs([f"Loss scale: {recipe['loss_scale']['text']}."]),
    ]


def _where(row: Mapping[str, Any]) -> str:
    places = [name or "(the model)" for name in row["places"]]
    return ", ".join(places[:4]) + (", ..." if len(places) > 4 else "")
