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
<script>
for (const details of document.querySelectorAll("details")) details.open = true;
const sizes = chosen => [...document.querySelectorAll(chosen)].map(e => e.getBoundingClientRect().toJSON());
const boxes = [...document.querySelectorAll(".scroll")].map(e => [e.clientWidth, e.scrollWidth]);
const page = document.documentElement.scrollWidth;
parent.postMessage({name: location.hash, window: innerWidth, page, figures: sizes("figure svg"), boxes}, "*");
</script>
"""
LISTEN = """
<!DOCTYPE html><pre id="found"></pre>
<script>
const found = [];
onmessage = event => { found.push(event.data); document.getElementById("found").textContent = JSON.stringify(found) };
</script>
"""


def browse(folder: Path, *flags: str) -> str:
    basics = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([str(BROWSER), *basics, *flags], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(folder: Path, pages: dict[str, tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Load each page in a frame of its width, and let it say how large it and its figures are."""
    frames = []
    for name, (text, width) in pages.items():
        (folder / f"{name}.html").write_text(text.replace("</main>", f"</main>{MEASURE}"))
        frames.append(f'<iframe src="{name}.html#{name}" style="width: {width}px; height: 900px; border: 0"></iframe>')
    (folder / "all.html").write_text(LISTEN + "\n".join(frames))
    dom = browse(folder, "--virtual-time-budget=8000", "--dump-dom", (folder / "all.html").as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[:500]
    return {row["name"].removeprefix("#"): row for row in json.loads(unescape(found[1]))}
