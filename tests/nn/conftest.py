"""What the comparisons with PyTorch found, beside each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from torch_cases import REPORT


@pytest.fixture(autouse=True)
def report(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts it into the report of the test run (--junit-xml) and on the screen (-s)."""
    REPORT.clear()
    yield
    for name, text in REPORT:
        record_property(name, text)
        print(f"{request.node.name}  {name}: {text}")
