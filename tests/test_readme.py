"""The README's promises about the repository: links lead to the lines they name, the Quick start has two lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_quick_start_is_one_block_of_two_lines() -> None:
    section = README.split("## Quick start", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) == 2


@pytest.mark.parametrize(("text", "target"), re.findall(r"\[(.+?)\]\((?!http)(.+?)\)", README))
def test_links_lead_somewhere(text: str, target: str) -> None:
    path, _, line = target.partition("#L")
    assert (ROOT / path).exists(), target
    if line:
        lines = (ROOT / path).read_text().splitlines()
        assert text.strip("`") in lines[int(line) - 1], f"{target} is not {text}"


def test_every_recipe_is_named() -> None:
    from refimpl.recipes import RECIPES

    missing = [name for name in RECIPES if f"`{name}`" not in README]
    assert not missing
