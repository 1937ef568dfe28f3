"""Fixtures: a shared server, and the canary beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from canary import Canary
from house import House


@pytest.fixture(scope="session")
def house() -> Iterator[House]:
    """Hash tokens: random bytes that depend on the whole context."""
    with House() as shared:
        yield shared


@pytest.fixture
def canary(house: House) -> Iterator[Canary]:
    bird = Canary(house)
    yield bird
    bird.finish()
