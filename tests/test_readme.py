"""The README: its length, the two lines of Quick start; and that docs/recipes.md names every recipe. Links: test_docs.py."""

from __future__ import annotations

import re

from doc_commands import commands, words_of
from paths import ROOT

README = (ROOT / "README.md").read_text()


def test_quick_start_is_one_block_of_two_lines() -> None:
    section = README.split("## Quick start", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) == 2


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_commands_that_an_installed_package_lacks_are_named() -> None:
    from refimpl.__main__ import commands as installed

    sentence = README.partition("After `pip install .`")[2].partition("refimpl is a library")[0]
    lacking = {words_of(command)[0] for command in commands(README)} - installed().keys()
    assert lacking == {*re.findall(r"`(\w+)\.py`", sentence)} and "`refimpl train`" in sentence


def test_every_recipe_is_named() -> None:
    from refimpl.precision.recipes import RECIPES

    page = (ROOT / "docs" / "recipes.md").read_text()
    missing = [name for name in RECIPES if f"`{name}`" not in page]
    assert not missing
