"""The pictures of README and docs/: what pages say of them is what they show, and today's code makes the same.

Each PNG carries the figures that it was drawn from: tests/support/pictures.py, the command that makes them.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import zlib
from pathlib import Path

import pytest
from browser import BROWSER
from paths import DOCS, ROOT
from pictures import PICTURES, SIGNATURE, differences, first_sections, note_of, stamp, words_of_page

NEEDS = {"audit.png": "torch"}
QUICK = ("audit.png", "real_models.png")
"""The pictures that take a few seconds."""


def flat(text: str) -> str:
    """Return a text without its line ends."""
    return " ".join(text.split())


def unsaid(text: str, sentences: list[str]) -> list[str]:
    """Return the sentences that are not in a text."""
    return [sentence for sentence in sentences if sentence not in flat(text)]


def test_every_picture_has_its_page_and_its_maker() -> None:
    assert {path.name for path in DOCS.glob("*.png")} == PICTURES.keys()
    for name, picture in PICTURES.items():
        page = (ROOT / picture.page).read_text(encoding="utf-8")
        assert re.search(rf"!\[[^\]]+\]\((?:docs/)?{re.escape(name)}\)", page), name


@pytest.mark.parametrize("name", PICTURES)
def test_the_page_says_of_its_picture_what_it_shows(name: str) -> None:
    picture, figures = PICTURES[name], note_of(DOCS / name)["figures"]
    page = (ROOT / picture.page).read_text(encoding="utf-8")
    sentences = picture.sentences(figures)
    assert sentences and unsaid(page, sentences) == [], "correct the page, or run python tests/support/pictures.py"
    for sentence in sentences:  # another number in the page is seen
        number = re.findall(r"\d+", sentence)[-1]
        other = sentence[::-1].replace(number[::-1], f"{int(number) + 1}"[::-1], 1)[::-1]
        assert unsaid(flat(page).replace(sentence, other), sentences), sentence


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_as_wide_as_a_page_shows_it(name: str) -> None:
    width, height = struct.unpack_from(">II", (DOCS / name).read_bytes(), 16)
    assert 800 <= width <= 1300 and height <= 3 * width


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PICTURES])
def test_the_code_of_today_makes_the_same_picture(name: str, tmp_path: Path) -> None:
    """Its figures, of which those of a long run are of its beginning, and its words; and, where it can be drawn, its size."""
    for package in filter(None, ("matplotlib", NEEDS.get(name))):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    note, made = note_of(DOCS / name), PICTURES[name].again(tmp_path)
    assert differences(name, note["figures"], made.figures) == [] and made.figures, "run python tests/support/pictures.py"
    assert made.words == note["words"] and made.words, "run python tests/support/pictures.py"
    if PICTURES[name].again is PICTURES[name].make and (BROWSER or name == "real_models.png"):
        made.draw(tmp_path / name)
        sizes = [struct.unpack_from(">II", path.read_bytes(), 16) for path in (DOCS / name, tmp_path / name)]
        assert sizes[1][0] == sizes[0][0] and sizes[1][1] == pytest.approx(sizes[0][1], rel=0.1)  # fonts differ


# -- the tools ---------------------------------------------------------------------------------------------------------


def small_png(gray: int) -> bytes:
    """Return an image of one pixel."""
    header, pixels = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(bytes([0, gray]))
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    whole = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return SIGNATURE + b"".join(whole)


def test_figures_are_read_back_and_belong_to_their_image(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(small_png(1))
    second.write_bytes(small_png(2))
    for figures in ({"x": 1}, {"x": 2.5, "names": ["a"]}):  # a second stamp takes the place of the first
        stamp(first, figures, ["title"])
    note = note_of(first)
    assert (note["figures"], note["words"]) == ({"x": 2.5, "names": ["a"]}, ["title"])
    old, new = first.read_bytes(), second.read_bytes()
    pixels = re.search(rb"....IDAT.*(?=....IEND)", old, re.DOTALL), re.search(rb"....IDAT.*(?=....IEND)", new, re.DOTALL)
    assert pixels[0] is not None and pixels[1] is not None
    first.write_bytes(old.replace(pixels[0][0], pixels[1][0]))
    with pytest.raises(AssertionError, match=r"a\.png is not the image"):
        note_of(first)


def test_differences_are_named_beyond_a_twentieth() -> None:
    recorded = {"a": 1.0, "b": [1, 2.0], "c": "x", "d": 3}
    assert differences("p", recorded, {"a": 1.04, "b": [1, 2.05], "c": "x"}) == []
    assert differences("p", recorded, {"a": 1.1, "b": [2, 2.0], "c": "y", "e": 1}) == [
        "p.a was 1.0 and is 1.1", "p.b[0] was 1 and is 2", "p.c was x and is y", "p.e was None and is 1",
    ]  # fmt: skip
    assert differences("p", recorded, {"b": [1]}) == ["p.b was [1, 2.0] and is [1]"]


def test_a_page_is_cut_after_a_section_and_its_words_have_no_numbers() -> None:
    parts = [f'<section id="s{i}">\n<h2>Part {i} of 2^<sup>15</sup></h2>\n</section>\n' for i in (1, 2)]
    page = f"<main><h1>A &amp; b</h1>{''.join(parts)}</main><script>x</script>"
    assert first_sections(page, 2) == page and first_sections(page, 1) == page.replace(parts[1], "")
    assert words_of_page(first_sections(page, 1)) == ["A & b", "Part # of #^#"]
