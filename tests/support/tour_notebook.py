"""docs/tour.py, a script of cells, and docs/tour.ipynb, the same as a notebook with its figures.

    python tests/support/tour_notebook.py       executes the script as a notebook, and writes it to docs/tour.ipynb
"""

from __future__ import annotations

import json
import re
from typing import Any

from paths import DOCS

SCRIPT, NOTEBOOK = DOCS / "tour.py", DOCS / "tour.ipynb"


def cells_of_script() -> list[tuple[str, str]]:
    """The kind and the text of each cell."""
    cells = []
    for cell in re.split(r"^# %%", SCRIPT.read_text(encoding="utf-8"), flags=re.M)[1:]:
        kind, text = ("markdown", cell.removeprefix(" [markdown]")) if cell.startswith(" [markdown]") else ("code", cell)
        text = re.sub(r"^# ?", "", text, flags=re.M) if kind == "markdown" else text
        cells.append((kind, text.strip()))
    return cells


def cells_of_notebook(notebook: Any = None) -> list[tuple[str, str]]:
    """The kind and the text of each cell. notebook: docs/tour.ipynb if None."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in (notebook or stored())["cells"]]


def stored() -> Any:
    """docs/tour.ipynb."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def executed() -> Any:
    """The script as a notebook, with the outputs of a new kernel. It needs jupytext, nbclient and ipykernel."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(SCRIPT)
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # and not the version of this Python
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    return notebook


if __name__ == "__main__":
    import nbformat

    nbformat.write(executed(), NOTEBOOK)
    print(NOTEBOOK.name, NOTEBOOK.stat().st_size, "bytes")
