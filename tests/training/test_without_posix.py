"""Commands where POSIX's modules and calls are missing, as on Windows, and where a terminal has Windows' encoding.

What this cannot show: other paths and file systems, and how Windows renames a file that is open.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import os, pathlib, signal, sys
for name in ("fcntl", "resource", "termios", "tty", "pty", "matplotlib"):  # whose files are not ours
    sys.modules[name] = None
for name in ("sysconf", "fork", "sched_getaffinity", "getuid", "posix_fadvise"):
    delattr(os, name)
del signal.SIGHUP
from refimpl.__main__ import main
main()
"""


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "warn_default_encoding", "-c", WITHOUT, *words],
        cwd=folder, env=environment, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("cp1252")
    return done.stdout.decode("cp1252")


@pytest.mark.slow
def test_a_run_its_text_and_its_memory(tmp_path: Path) -> None:
    """Every file is opened with an encoding of its own: `warn_default_encoding` makes another one an error here."""
    small = ("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--eval-batches", "1")
    (tmp_path / "text.txt").write_text("Größe und Maß: naïve façade, œuvre, ’quoted’. " * 200, encoding="utf-8")
    printed = run(tmp_path, "train", "--steps", "4", *small, "--data", "text.txt", "--out", "größe")
    assert "written to" in printed and (tmp_path / "größe" / "metrics.jsonl").exists()
    assert "resumed after step 4 of 6" in run(tmp_path, "train", "--resume", "--out", "größe", "--steps", "6")
    assert run(tmp_path, "generate", "größe", "--tokens", "20", "--prompt", "Maß")
    assert "16 bytes per parameter" in run(tmp_path, "memory")
    assert "65504" in run(tmp_path, "formats")
