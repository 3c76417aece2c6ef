"""Fixtures: the small world of tests/world.py, and the real processes of tests/farm.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import farm
import pytest
from crawl_site import canary, site  # noqa: F401 - fixtures of test_crawl*.py
from world import World

from executors import app_sync, crawl, data_sync
from executors.appsflyer.pacing import Pacing

# Files of ten seconds and more. They come first, so that no process of `make test` has one left when the others end.
LONGEST_FIRST = ("test_torture", "test_dashboard_tasks", "test_device_faults", "test_faults", "test_dashboard",
                 "test_worker", "test_isolation", "test_dashboard_story", "test_dashboard_access", "test_backups",
                 "test_full_disk", "test_tls", "test_deploy", "test_stopped_device", "test_dashboard_new",
                 "test_artifacts", "test_standalone", "test_dashboard_dispatch", "test_dashboard_devices",
                 "test_dashboard_batches", "test_bench", "test_start", "test_edge")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: n for n, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def no_memory_of_earlier_servers() -> None:
    """The system gives ports out again: what an executor knows of a server is not to be that of an earlier test's."""
    crawl._fetchers.clear()
    app_sync.PACING = data_sync.PACING = Pacing()


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
