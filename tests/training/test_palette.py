"""training/palette.py: one color per format in all pictures, which people with other color vision tell apart."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
from paths import ROOT

from refimpl.numerics.formats import FORMATS
from refimpl.precision.recipes import RECIPES
from refimpl.training.palette import ALIASES, BLUE, CYCLE, FORMAT_COLORS, ORANGE, colors_of, format_in

CHOSEN = ("training/palette.py", "training/html/style.py", "parity/audit/report/page.py")
"""The files that may have colors of lines and text in them: the palette, and style sheets with one for dark screens too."""
SHADES = r"#f7dcd7|#e9f1fa|#c9def2|#444444|#e4e4e4|#a8a8a8"
"""Light backgrounds and grays, which are no lines."""

VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Linear RGB as people see it. Source: Machado, Oliveira and Fernandes 2009, table 1, severity 1."""
AT_A_GLANCE = 10
"""The CIE 1976 difference of colors that are told apart at a glance; one that is just noticeable is 2.3."""


def lab(color: str, vision: str) -> np.ndarray:
    """CIE L*a*b* of a color as people with this vision see it."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_the_measure_of_differences_by_hand() -> None:
    assert lab("#ffffff", "usual") == pytest.approx([100, 0, 0], abs=0.01)
    assert lab("#ff0000", "usual") == pytest.approx([53.24, 80.09, 67.2], abs=0.1)
    red, green = lab("#cc3311", "deuteranopia"), lab("#887700", "deuteranopia")
    assert np.linalg.norm(red - green) < np.linalg.norm(lab("#cc3311", "usual") - lab("#887700", "usual")) / 2


@pytest.mark.parametrize("vision", VISION)
def test_everybody_tells_the_colors_apart(vision: str) -> None:
    assert FORMAT_COLORS.keys() == FORMATS.keys() and len(set(FORMAT_COLORS.values())) == len(FORMATS)
    for colors in (list(FORMAT_COLORS.values()), list(CYCLE)):
        seen = [lab(color, vision) for color in colors]
        apart = {(colors[i], colors[j]): np.linalg.norm(seen[i] - seen[j]) for i in range(len(colors)) for j in range(i)}
        assert min(apart.values()) > AT_A_GLANCE, min(apart, key=lambda pair: apart[pair])


def test_a_line_has_the_color_of_its_format_and_no_two_lines_the_same() -> None:
    assert [format_in(name) for name in ("bf16", "pure-bf16", "sum in fp16", "with masters")] == ["bf16", "bf16", "fp16", None]
    assert set(ALIASES.values()) <= FORMATS.keys()
    assert colors_of(["amp-bf16", "fp16", "masters"]) == [ORANGE, BLUE, CYCLE[2]]
    for names in (["fp16", "amp-fp16", "bf16", "fp16-moments"], list(RECIPES)[:7], ["a", "b"]):
        assert len(set(colors_of(names))) == len(names)
    assert len(colors_of(list(RECIPES))) == len(RECIPES)


def offences(text: str) -> list[str]:
    """Colors in a text that are not of the palette: hexadecimal ones, those of matplotlib's cycle, and names."""
    texts = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    color = re.compile(r"#[0-9a-fA-F]{6}|C\d|tab:\w+|gr[ae]y|black|red|blue|green|orange")
    cycle = re.findall(r"f[\"']C{", text)
    return cycle + [each for each in texts if color.fullmatch(each) and not re.fullmatch(SHADES, each)]


def test_no_picture_has_colors_of_its_own() -> None:
    bad = "plot(color='tab:red', label=f'C{i}')\nplot('#123456', color='gray')"
    assert set(offences(bad)) == {"tab:red", "#123456", "gray", "f'C{"} and offences("plot('#444444', 'Colors')") == []
    files = {path.relative_to(ROOT / "refimpl").as_posix(): path for path in (ROOT / "refimpl").rglob("*.py")}
    drawing = {name: path.read_text(encoding="utf-8") for name, path in files.items() if name not in CHOSEN}
    drawing = {name: text for name, text in drawing.items() if "axes" in text or "figure" in text}
    assert len(drawing) > 10 and {name: offences(text) for name, text in drawing.items() if offences(text)} == {}
