"""The README's promises: the Quick start has two lines, every recipe is named. Its links and commands: test_docs.py."""

from __future__ import annotations

import re

from paths import ROOT

README = (ROOT / "README.md").read_text()


def test_quick_start_is_one_block_of_two_lines() -> None:
    section = README.split("## Quick start", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) == 2


def test_every_recipe_is_named() -> None:
    from refimpl.precision.recipes import RECIPES

    missing = [name for name in RECIPES if f"`{name}`" not in README]
    assert not missing
