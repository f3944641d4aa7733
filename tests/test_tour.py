"""docs/tour.ipynb: the cells of docs/tour.py with their outputs, its numbers and figures; executed anew in a slow test."""

from __future__ import annotations

import base64
import importlib.util
import re
from typing import Any

import pytest
from paths import DOCS
from tour_notebook import cells_of_notebook, cells_of_script, executed, stored

STORED = stored()
PACKAGES = ("jupytext", "nbclient", "ipykernel", "matplotlib")
FIGURES = 5


def printed(cell: Any) -> str:
    return "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))


def figures(notebook: Any) -> list[bytes]:
    shown = [output["data"] for cell in notebook["cells"] for output in cell.get("outputs", []) if "data" in output]
    return [base64.b64decode("".join(data["image/png"])) for data in shown if "image/png" in data]


def unprinted(notebook: Any) -> list[str]:
    """The numbers between backquotes in the text that neither the cell before nor the cell after prints."""
    cells, missing = notebook["cells"], []
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            beside = " ".join(printed(other) for other in (*cells[max(i - 1, 0) : i], *cells[i + 1 : i + 2]))
            stated = re.findall(r"`([\d.]+(?:\^-?\d+)?|True)`", "".join(cell["source"]))
            missing += [n for n in stated if not re.search(rf"(?<![\w.^]){re.escape(n)}(?![\w^]|\.\d)", beside)]
    return missing


def check(notebook: Any) -> None:
    """What holds for the outputs on every machine."""
    assert unprinted(notebook) == []
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}  # no warning
    assert len(figures(notebook)) == FIGURES
    text = "".join(map(printed, notebook["cells"]))
    loss = {name: (float(a), float(b)) for name, a, b in re.findall(r"^(\S+) +loss ([\d.]+) -> ([\d.]+)", text, re.M)}
    learned = {name: first - last for name, (first, last) in loss.items()}
    assert learned.keys() == {"fp32", "bf16", "bf16-no-master", "bf16-sr"}
    assert abs(learned["bf16"] - learned["fp32"]) <= 0.02 and abs(learned["bf16-sr"] - learned["fp32"]) <= 0.02
    assert 0 < learned["bf16-no-master"] < learned["fp32"] / 2
    changed = [int(share) for share in re.findall(r"changes (\d+)% of the weights", text)]
    assert changed[0] == 100 and max(changed[1:]) < 50
    few, many = (float(share) for share in re.findall(r"rows: zero at S = 2\^-12: (\d+)%", text))
    assert few < many and float(re.search(r" 8 rows: .* at S = 1: ([\d.]+)%", text)[1]) < 1  # type: ignore[index]


def test_script_and_notebook_have_the_same_cells() -> None:
    assert cells_of_notebook() == cells_of_script()
    assert [cell.get("execution_count") for cell in STORED["cells"] if cell["cell_type"] == "code"] == [
        *range(1, 1 + sum(kind == "code" for kind, _ in cells_of_script()))
    ]


def test_what_the_text_says_is_what_the_cells_print() -> None:
    check(STORED)
    other = {"cells": [dict(cell) for cell in STORED["cells"]]}
    for cell in other["cells"]:
        cell["source"] = "".join(cell["source"]).replace("`65504`", "`65536`").replace("`1638`", "`163`")
    assert unprinted(other) == ["65536", "163"]  # negative control


def test_figures_are_small() -> None:
    assert all(figure.startswith(b"\x89PNG") for figure in figures(STORED))
    assert sum(map(len, figures(STORED))) < 400_000


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", "".join(text for kind, text in cells_of_notebook() if kind == "markdown"))
    assert len(links) > 3 and all((DOCS / link).exists() for link in links)


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    check(executed())
