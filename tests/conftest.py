"""Fixtures that several test files share."""

from __future__ import annotations

import numpy as np
import pytest
from strict_backend import BACKENDS
from threadpoolctl import threadpool_info

from refimpl.backends import Backend


def pytest_report_header() -> str:
    """What multiplies matrices here, by which kernels: last bits of results depend on it."""
    found = [
        f"{lib['internal_api']} {lib['version']}, {lib.get('architecture', 'unknown')} kernels, {lib['num_threads']} threads"
        for lib in threadpool_info()
        if lib["user_api"] == "blas"
    ]
    return f"NumPy {np.__version__}, BLAS: {'; '.join(found) or 'not known to threadpoolctl'}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The host, and the CuPy backend on its stand-in: a test that takes this holds for arrays that are not NumPy's too."""
    return BACKENDS[request.param]


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no loss.png, which takes longer than all else in a test: test_files_of_a_run and its like draw theirs."""
    monkeypatch.setattr("refimpl.train.plot_run", lambda *_: None)
