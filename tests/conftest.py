"""Fixtures: the small world of tests/world.py, and the real processes of tests/farm.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import farm
import pytest
from crawl_site import canary, site  # noqa: F401 - fixtures of test_crawl*.py
from world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.check_books()
    world.close()


@pytest.fixture
def programs() -> Iterator[list[farm.Program]]:
    """Programs that a test starts; none outlives it."""
    with farm.farm() as started:
        yield started


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[farm.Master]:
    """One real master for the tests of a module."""
    with farm.farm() as started:
        master = farm.Master(tmp_path_factory.mktemp("master"))
        started.append(master)
        yield master
