"""The origin of pages that tests make, the same each time; and the scripts that a page may have."""

from __future__ import annotations

from refimpl.training.html.made import Made
from refimpl.training.html.style import HINT, SORT

MADE = Made("python x.py", "2026-11-30 12:00 UTC", {"refimpl": "0.1.0", "Python": "3.11.7"}, "a processor, 2 cores")
SCRIPTS = [f"<script>{each}</script>" for each in (HINT + SORT, HINT)]
