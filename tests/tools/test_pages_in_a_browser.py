"""All HTML pages in Chromium, on a desktop and on a phone, light and dark: what a reader sees, and what a reader does there."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import measured, needs_browser, screenshot
from pages import MADE
from paths import ROOT, SUPPORT

from refimpl.training.html.figures import Picture, as_svg, legend_above
from refimpl.training.html.page import document, figures, section, table

pytestmark = [
    pytest.mark.slow, needs_browser,
    pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the pages need matplotlib"),
]  # fmt: skip
LOOK = (SUPPORT / "look.js").read_text()
SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4", "--steps", "12"]
COMMANDS = {
    "report": ["inspect_precision", *SMALL, "--what-if", "e4m3,bf16", "--init-scale", "1e8", "--out", "report.html"],
    "narrow": ["inspect_precision", *SMALL, "--recipe", "nvfp4", "--out", "narrow.html"],
    "recipes": ["compare_recipes", *SMALL, "--recipes", "all", "--out", "recipes.html"],
    "audit": ["audit", "--demo", "--out", "."],
}
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@functools.cache
def page(folder: Path, name: str) -> str:
    """Return a page that its command makes."""
    if name == "audit":
        pytest.importorskip("torch")
    script, *arguments = COMMANDS[name]
    done = subprocess.run(
        [sys.executable, ROOT / f"scripts/{script}.py", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == (1 if name == "audit" else 0), done.stderr
    return (folder / f"{name}.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_cut_off_covered_empty_or_illegible(folder: Path, name: str, scheme: str) -> None:
    text = page(folder, name)
    seen = measured(folder, {f"{name}-{width}": (text, width) for width in WIDTHS}, LOOK, scheme)
    assert {each: found["wrong"] for each, found in seen.items()} == {f"{name}-{width}": [] for width in WIDTHS}
    for width in WIDTHS:
        count = seen[f"{name}-{width}"]["count"]
        assert seen[f"{name}-{width}"]["window"] == width
        assert count["texts"] > 100 and count["sorted"] > 6, count
        assert count["figures"] == text.count("<svg") and (name == "audit") == (count["figures"] == 0), count
    assert seen[f"{name}-390"]["count"]["wide"] > seen[f"{name}-1280"]["count"]["wide"]


DEFECTS = {
    "the page is": ("</main>", '<div style="width: 3000px">x</div></main>'),
    "is cut off": (".scroll { width: fit-content; max-width: 100%;", ".scroll { width: fit-content;"),
    "has no hint": ("more.length === 0", "true"),
    "breaks the word": ("min-width: calc(16ch + 1rem)", "min-width: 0"),
    "along": ("th:first-child { position: sticky; left: 0;", "th:first-child {"),
    "takes its heading along": ("thead th { position: sticky; top: 0;", "thead th {"),
    "is not sorted by": ("down ? compare(b, a) : compare(a, b)", "0"),
    "contrast": ("--soft: #5a5a5a", "--soft: #b0b0b0"),
    "is drawn on": ("fill: var(--page)", "fill: #ff0000"),
    "is empty": ("clip-path", "class"),
    "cuts off": ('viewBox="0 0 309.6 ', 'viewBox="40 0 309.6 '),
    "has a line in": ("stroke: #0072b2", "stroke: #fafafa"),
}


@pytest.mark.parametrize("complaint", DEFECTS)
def test_each_defect_is_seen(folder: Path, complaint: str) -> None:
    text, (good, bad) = page(folder, "report"), DEFECTS[complaint]
    assert good in text
    (found,) = measured(folder, {"defect": (text.replace(good, bad), 390)}, LOOK).values()
    assert any(complaint in each for each in found["wrong"]), found


@pytest.mark.parametrize(("legend", "wrong"), [(legend_above, False), (lambda axes: axes.legend(), True)])
def test_a_legend_over_data_is_seen(folder: Path, legend: Callable[[Any], object], wrong: bool) -> None:
    def draw(axes: Any) -> None:
        axes.plot([1, 2], label="a line")
        legend(axes)

    picture = Picture("name", "title", "label", "caption", as_svg("name", draw))
    text = document("t", [section("s", figures([picture]), table("table", ["a"], [["b"]]))], MADE)
    (found,) = measured(folder, {"legend": (text, 390)}, LOOK).values()
    assert found["count"]["legends"] == 1 and ("label has a legend over its data" in found["wrong"]) == wrong


@pytest.mark.parametrize("name", COMMANDS)
def test_screenshots_are_of_pages_in_the_colors_of_the_screen(folder: Path, name: str) -> None:
    from matplotlib.image import imread

    page(folder, name)
    for width in WIDTHS:
        files = {scheme: screenshot(folder, folder / f"{name}.html", width, 5000, scheme) for scheme in ("light", "dark")}
        shots = {scheme: imread(file) for scheme, file in files.items()}
        for shot in shots.values():
            assert shot.shape[:2] == (5000, max(width, 500)) and len({tuple(pixel) for pixel in shot[::7, 200]}) > 20
        corner = {scheme: shot[5, 5, :3].mean() for scheme, shot in shots.items()}
        assert corner["light"] > 0.95 and corner["dark"] < 0.15, corner
