"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
from strict_backend import BACKENDS

from refimpl.backends import Backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The host, and the CuPy backend on its stand-in: a test that takes this holds for arrays that are not NumPy's too."""
    return BACKENDS[request.param]


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no loss.png, which takes longer than all else in a test: test_files_of_a_run and its like draw theirs."""
    monkeypatch.setattr("refimpl.train.plot_run", lambda *_: None)
