"""A pytest plugin by which a test that has shown all that it can in one run is left out of the next, in other conditions.

    PYTHONPATH=.ci python -m pytest -p shown --shown-to=FILE          notes the tests that passed and depend on nothing else
    PYTHONPATH=.ci python -m pytest -p shown --but-shown-in=FILE      leaves these out

A test may show more elsewhere, and is not noted, if it looked for a package that is not installed, started a process, or gave
work to the BLAS's own threads.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

PROCESSES = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
depends: list[str] = []
"""What the running test depends on."""
shown: list[str] = []
blas_threads = {*os.listdir("/proc/self/task")}
"""The threads before NumPy is loaded; and then those that its BLAS has started."""


class LastFinder:
    """It is asked for the modules that no other has found."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        depends.append(name)


sys.meta_path.append(LastFinder)
sys.addaudithook(lambda event, _: depends.append(event) if event in PROCESSES else None)


def work_of_blas_threads() -> float:
    """Return their CPU seconds. On Linux the clock of a thread is its number, inverted, before the bits 110."""
    return sum(time.clock_gettime(~int(thread) << 3 | 6) for thread in blas_threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shown-to", type=Path)
    parser.addoption("--but-shown-in", type=Path)


def pytest_configure() -> None:
    """Note the threads that there are now that tests/conftest.py has loaded NumPy, and wait until they sleep.

    New threads of a BLAS look for work in a loop for a moment, which is no work that the first test gave them.
    """
    blas_threads.symmetric_difference_update(os.listdir("/proc/self/task"))
    end, before = time.monotonic() + 5, -1.0
    while before != (before := work_of_blas_threads()) and time.monotonic() < end:
        time.sleep(0.05)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if file := config.getoption("--but-shown-in"):
        leave_out = set(file.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in leave_out])
        items[:] = [item for item in items if item.nodeid not in leave_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    depends.clear()
    work = work_of_blas_threads()
    result = yield
    if not depends and work_of_blas_threads() == work:
        shown.append(item.nodeid)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.passed:
        depends.append(report.outcome)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if shown and (file := session.config.getoption("--shown-to")):
        with file.open("a") as notes:  # each process of pytest-xdist writes those that it ran
            notes.write("".join(f"{test}\n" for test in shown))
