"""What was done when, how far is a batch, and how long did things take?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from world import START, World

from latency import BOUNDS, WINDOW_SECONDS, Latency
from progress import Progress
from reads import Reads
from scheduler import Scheduler, Times
from series import Series


@pytest.fixture
def series(world: World) -> Iterator[Series]:
    reads = Reads(world.path, connections=1)
    yield Series(reads)
    reads.close()


@pytest.fixture
def progress(world: World, series: Series) -> Iterator[Progress]:
    reads = Reads(world.path, connections=1)
    yield Progress(reads, series)
    reads.close()


def end(world: World, outcome: str, **fields: str) -> None:
    """One task that ends so, after two seconds."""
    world.submit(max_retry_count=0, **fields)
    facts = {"error_message": "no such page", "error_type": "HTTPError"} if outcome == "failed" else {}
    world.report(world.take(start=True), outcome, duration_seconds=2.0, **facts)


def test_a_point_is_a_minute_and_gaps_are_zeros(world: World, series: Series) -> None:
    end(world, "completed")
    end(world, "failed")
    world.now += 180
    end(world, "completed")
    found = series.points(world.now, 1)
    assert found["step_seconds"] == 60 and len(found["points"]) == 60
    assert [point["completed"] for point in found["points"][-5:]] == [0, 1, 0, 0, 1]
    assert [point["failed"] for point in found["points"][-5:]] == [0, 1, 0, 0, 0]
    assert [point["mean_seconds"] for point in found["points"][-5:]] == [None, 2.0, None, None, 2.0]
    assert series.points(world.now, 1, "type", "other")["points"][-1]["completed"] == 0
    assert series.points(world.now, 1, "device", "shop-1")["points"][-1]["completed"] == 1


def test_a_day_is_by_quarters_of_an_hour_and_has_a_sum(world: World, series: Series) -> None:
    world.now = START // 900 * 900 + 1
    end(world, "completed")
    world.now += 13 * 3600
    end(world, "completed")
    end(world, "failed")
    found = series.points(world.now, 24)
    assert found["step_seconds"] == 900 and len(found["points"]) == 96
    assert [point["completed"] for point in found["points"] if point["completed"]] == [1, 1]
    assert found["points"][-1 - 13 * 4]["completed"] == 1
    day = {"completed_last_day": 2, "failed_last_day": 1}
    assert series.last_day(world.now) == day
    end(world, "completed")
    assert series.last_day(world.now) == {**day, "completed_last_day": 3}
    world.now += 60
    end(world, "completed")
    assert series.last_day(world.now) == {**day, "completed_last_day": 4}
    world.now += 86400
    assert series.last_day(world.now) == {"completed_last_day": 0, "failed_last_day": 0}


def test_a_batch_says_how_fast_it_goes_and_what_is_left(world: World, progress: Progress) -> None:
    assert progress.batch("b", world.now) is None
    end(world, "completed", batch="b")
    end(world, "failed", batch="b")
    for _ in range(6):
        world.submit(batch="b")
    world.now += 100
    found = progress.batch("b", world.now)
    assert found is not None
    assert (found["total"], found["completed_last_hour"], found["failed_last_hour"]) == (8, 1, 1)
    assert (found["rate_per_second"], found["eta_seconds"]) == (0.02, 300.0)
    world.now += 3600
    found = progress.batch("b", world.now)
    assert found is not None and (found["rate_per_second"], found["eta_seconds"]) == (0.0, None)


def test_a_batch_that_is_deleted_while_it_is_asked_for_has_no_rate(progress: Progress) -> None:
    assert progress.rated({"name": "gone"}, START) == {"name": "gone", "rate_per_second": 0.0}


def test_failures_are_grouped_by_their_error(world: World, progress: Progress) -> None:
    for _ in range(3):
        end(world, "failed", batch="b")
    end(world, "failed", batch="other")
    world.submit(batch="b", max_retry_count=0)
    other = world.take(start=True)
    world.report(other, "failed", error_message="cut off", error_type="Timeout")
    found = progress.failures("b", seconds=60)
    assert found["is_partial"] is False
    assert [(group["error_message"], group["error_type"], group["n"]) for group in found["groups"]] == [
        ("no such page", "HTTPError", 3),
        ("cut off", "Timeout", 1),
    ]
    assert found["groups"][1] == {**found["groups"][1], "task_id": other.id, "is_more": False}


def test_more_failures_than_are_looked_at_are_at_least_so_many(
    world: World, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("progress.LOOKED_AT", 2)
    for _ in range(3):
        end(world, "failed", batch="b")
    found = progress.failures("b", seconds=60)
    assert found["is_partial"] and [(group["n"], group["is_more"]) for group in found["groups"]] == [(2, True)]


def test_minutes_of_batches_do_not_become_hours(world: World) -> None:
    end(world, "completed", batch="b")
    world.now += 3 * 86400
    times = Times(dispatch_interval=1, timeout_check_interval=1, device_timeout=300, retention_days=30,
                  heartbeat_retention_days=7, event_retention_days=30, audit_retention_days=365)  # fmt: skip
    scheduler = Scheduler(world.store, world.dispatcher, world.presence, times)
    while world.store.write(scheduler.roll_up):
        pass
    assert {row["scope"] for row in world.rows("SELECT scope FROM af_hour")} == {"all", "type", "device"}
    assert world.rows("SELECT * FROM af_minute WHERE scope = 'batch'") == []


def test_percentiles_are_of_the_last_minutes_and_a_quarter_too_large_at_most() -> None:
    now = [0.0]
    latency = Latency(clock=lambda: now[0])
    assert latency.percentiles() == {"p50": None, "p95": None, "p99": None}
    for n in range(1, 101):
        latency.add(n / 1000)
    latency.add(3600.0)
    found = latency.percentiles()
    for name, right in (("p50", 50.0), ("p95", 95.0), ("p99", 99.0)):
        value = found[name]
        assert value is not None and right <= value <= (right + 1) * 1.25
    now[0] += WINDOW_SECONDS
    latency.add(0.001)
    assert (latency.percentiles()["p50"] or 0) > 40, "the window before counts too"
    now[0] += 3 * WINDOW_SECONDS
    assert latency.percentiles()["p50"] is None and latency.count == 102
    latency.add(1e9)
    assert latency.percentiles()["p50"] == round(BOUNDS[-1] * 1000, 3)
