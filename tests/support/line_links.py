"""Links of README and docs/ to lines of code: `[text](path#L12)`, where `text` must stand in line 12 of the file.

    python tests/support/line_links.py       corrects the line numbers of all links whose text stands in another line now
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from paths import DOCS, ROOT, TESTS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md")), TESTS / "README.md"]
LINK = re.compile(r"\[(`[^`]+`|[^\]`]+)\]\(([^()#]+)#L(\d+)\)")


def corrected(page: str, folder: Path) -> tuple[str, list[str]]:
    """Return the text of a page in `folder` with right line numbers, and the links whose text stands in no line.

    Of several lines with the text the nearest to the old number is taken.
    """
    lost = []

    def correct(link: re.Match[str]) -> str:
        text, path, number = link[1].strip("`"), link[2], int(link[3])
        lines = (folder / path).read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(lines, 1) if text in line]
        if not found:
            lost.append(link[0])
            return link[0]
        return f"[{link[1]}]({path}#L{min(found, key=lambda i: abs(i - number))})"

    return LINK.sub(correct, page), lost


def wrong() -> Iterator[str]:
    """Yield what is wrong with the links of each page, and what to do."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        better, lost = corrected(text, page.parent)
        yield from (f"{page.name}: no line holds the text of {link}" for link in lost)
        if better != text:
            yield f"{page.name}: `python tests/support/line_links.py` corrects its line numbers"


def main() -> None:
    """Correct all pages, and print the links that a person must mend."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        better, lost = corrected(text, page.parent)
        if better != text:
            page.write_text(better, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: corrected")
        for link in lost:
            print(f"{page.relative_to(ROOT)}: no line holds the text of {link}")


if __name__ == "__main__":
    main()
