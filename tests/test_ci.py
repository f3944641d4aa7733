"""Which tests .ci/run takes once: those that .ci/shown.py notes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from threadpoolctl import threadpool_info

TESTS = """\
import importlib.util
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

def test_shown(): np.ones((8, 8)) @ np.ones((8, 8))
def test_fails(): assert False
def test_needs(): pytest.importorskip("no_such_package")
def test_does_without():
    with suppress(ImportError):
        import no_such_package
def test_asks(): assert importlib.util.find_spec("no_such_package") is None
def test_starts(): subprocess.run([sys.executable, "-c", ""], check=True)
@pytest.mark.xfail
def test_expected_to_fail(): assert False
@pytest.fixture
def package(): return importlib.util.find_spec("no_such_package")
def test_fixture_asks(package): pass
@pytest.mark.parametrize("n", [0, 1])
def test_cases(n): pass
def test_large_product(): np.ones((500, 500)) @ np.ones((500, 500))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are looked up in Linux's /proc")
def test_a_test_is_taken_once_if_nothing_that_it_depends_on_differs(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text("import numpy")
    (tmp_path / "pytest.ini").write_text("[pytest]")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".ci"), "OPENBLAS_NUM_THREADS": "2", "PYTEST_ADDOPTS": ""}

    def run(option: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "shown", f"{option}={tmp_path / 'notes'}"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120).stdout

    first = run("--shown-to")
    shown = {line.partition("::")[2] for line in (tmp_path / "notes").read_text().splitlines()}
    two_threads = any(lib["internal_api"] == "openblas" for lib in threadpool_info()) and (os.cpu_count() or 1) > 1
    assert shown - {"test_large_product"} == {"test_shown", "test_cases[0]", "test_cases[1]"}, first
    assert not two_threads or "test_large_product" not in shown
    again = run("--but-shown-in")
    assert f"collected 11 items / {len(shown)} deselected" in again and "1 failed" in again and "1 skipped" in again, again
