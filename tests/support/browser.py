"""A page in a browser, where Chromium is installed: how large it is, and what it looks like."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
MEASURE = """
for (const details of document.querySelectorAll("details")) details.open = true;
const sizes = chosen => [...document.querySelectorAll(chosen)].map(e => e.getBoundingClientRect().toJSON());
const boxes = [...document.querySelectorAll(".scroll")].map(e => [e.clientWidth, e.scrollWidth]);
const found = {page: document.documentElement.scrollWidth, figures: sizes("figure svg"), boxes};
"""
"""A program that leaves in `found` how large a page and its parts are."""
SEND = "<script>{program}\nparent.postMessage({{...found, name: location.hash, window: innerWidth}}, '*');</script>"
LISTEN = """
<!DOCTYPE html><pre id="found"></pre>
<script>
const found = [];
onmessage = event => { found.push(event.data); document.getElementById("found").textContent = JSON.stringify(found) };
</script>
"""


def browse(folder: Path, *flags: str) -> str:
    """Start the browser with a profile of its own in `folder`, and return what it prints."""
    quiet = ("quic", "gpu", "background-networking", "component-update", "sync")
    basics = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    basics += [f"--disable-{each}" for each in quiet]
    done = subprocess.run([str(BROWSER), *basics, *flags], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(folder: Path, page: Path, width: int, height: int, scheme: str = "light") -> Path:
    """Take a picture of a page in a frame, which may be narrower than a window, and return its path."""
    frame = f"<!DOCTYPE html><style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}</style>"
    (folder / "frame.html").write_text(f'{frame}<iframe src="{page.as_uri()}"></iframe>')
    target = folder / f"{page.stem}-{width}-{scheme}.png"
    flags = f"--screenshot={target}", f"--window-size={max(width, 500)},{height}", SCHEMES[scheme]
    browse(folder, *flags, "--virtual-time-budget=4000", (folder / "frame.html").as_uri())
    return target


SCHEMES = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}


def measured(
    folder: Path, pages: dict[str, tuple[str, int]], program: str = MEASURE, scheme: str = "light"
) -> dict[str, dict[str, Any]]:
    """Load each page in a frame of its width, and return what the program finds there."""
    frames = []
    for name, (text, width) in pages.items():
        (folder / f"{name}.html").write_text(text.replace("</body>", SEND.format(program=program) + "</body>"))
        frames.append(f'<iframe src="{name}.html#{name}" style="width: {width}px; height: 900px; border: 0"></iframe>')
    (folder / "all.html").write_text(LISTEN + "\n".join(frames))
    dom = browse(folder, "--virtual-time-budget=8000", SCHEMES[scheme], "--dump-dom", (folder / "all.html").as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None and found[1], f"no frame has sent anything: {dom[:500]}"
    return {row["name"].removeprefix("#"): row for row in json.loads(unescape(found[1]))}
