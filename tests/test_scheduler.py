"""What happens because time passed: each job of the table, walked through with a clock moved by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from world import World

import db
import retention
from scheduler import Scheduler, Times
from transaction import Tx

DAY = 86400.0


@pytest.fixture
def scheduler(world: World) -> Scheduler:
    times = Times(10, 60, 300, retention_days=30, heartbeat_retention_days=7, event_retention_days=90,
                  audit_retention_days=365)  # fmt: skip
    return Scheduler(world.store, world.dispatcher, world.presence, times)


def test_the_table_names_all_that_happens_by_itself(scheduler: Scheduler) -> None:
    assert [(seconds, job.__name__) for seconds, job in scheduler.jobs] == [
        (10, "dispatch"),
        (1.0, "promote_due"),
        (1.0, "release_overdue"),
        (1.0, "write_beats"),
        (1.0, "probe_storage"),
        (60, "release_silent"),
        (60.0, "remember_time"),
        (300.0, "thin_heartbeats"),
        (10.0, "delete_finished"),
        (600.0, "roll_up"),
        (1.0, "reshape_lanes"),
        (30.0, "forget_lanes"),
        (60.0, "forget_events"),
        (60.0, "forget_audit"),
    ]


def test_a_job_that_raises_is_logged_and_runs_again_at_its_next_time(
    scheduler: Scheduler, world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def broken(tx: Tx) -> None:
        runs.append(1)
        raise ValueError("no luck")

    monkeypatch.setattr("scheduler.TICK_SECONDS", 0.01)
    scheduler.jobs = ((1.0, broken),)
    scheduler.start()
    import time

    end = time.monotonic() + 60
    while len(runs) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    scheduler.stop()
    assert len(runs) >= 2
    assert "broken failed; it runs again at its next time" in caplog.text


def test_due_tasks_become_pending(scheduler: Scheduler, world: World) -> None:
    task_id = world.submit(run_at=world.now + 50)
    assert world.store.write(scheduler.promote_due) == 0
    world.now += 51
    assert world.store.write(scheduler.promote_due) == 1
    assert world.row(task_id)["status"] == "pending"


def test_tasks_over_their_time_are_taken_back(scheduler: Scheduler, world: World) -> None:
    task_id = world.submit(execution_timeout=100)
    world.take(start=True)
    world.now += 100 + db.GRACE_SECONDS + 1
    assert world.store.write(scheduler.release_overdue) == 1
    assert world.row(task_id)["status"] == "scheduled"


def test_after_a_start_devices_get_time_to_report_before_a_deadline_counts(scheduler: Scheduler, world: World) -> None:
    world.submit(execution_timeout=100)
    world.take(start=True)
    world.now += 10_000
    world.presence.watching_since = world.now
    assert world.store.write(scheduler.release_overdue) == 0
    world.now += 60
    assert world.store.write(scheduler.release_overdue) == 1


def test_a_clock_that_is_set_before_a_restart_takes_no_running_task_back(world: World, scheduler: Scheduler) -> None:
    task_id = world.submit(execution_timeout=100)
    world.take(start=True)
    world.now += 30
    world.reopen(jump=7200.0)
    world.now += 60
    assert world.store.write(scheduler.release_overdue) == 0
    world.now += 50
    assert world.store.write(scheduler.release_overdue) == 1
    assert world.row(task_id)["retry_count"] == 1


def test_a_machine_that_slept_gives_devices_their_full_time_again(scheduler: Scheduler, world: World) -> None:
    scheduler._notice_sleep()
    world.now += 600
    scheduler._notice_sleep()
    assert world.presence.watching_since == world.now


def test_old_heartbeats_are_thinned_to_one_per_five_minutes(scheduler: Scheduler, world: World) -> None:
    world.register()
    for _ in range(240):
        world.now += 30
        world.beat()
        world.store.write(scheduler.write_beats)
        if int(world.now) % 300 == 0:
            world.store.write(scheduler.thin_heartbeats)
    world.store.write(scheduler.thin_heartbeats)
    beats = [row["heartbeat_at"] for row in world.rows("SELECT heartbeat_at FROM af_device_heartbeat")]
    old = [moment for moment in beats if moment < world.now - 3900]
    fresh = [moment for moment in beats if moment > world.now - 3600]
    assert 8 <= len(old) <= 12 and len(fresh) == 120


def test_heartbeats_end_with_their_retention(scheduler: Scheduler, world: World) -> None:
    world.register()
    world.beat()
    world.now += 8 * DAY
    world.store.write(scheduler.thin_heartbeats)
    assert world.rows("SELECT * FROM af_device_heartbeat") == []


def test_finished_tasks_end_with_their_retention_and_their_pages_go_back_to_the_disk(
    scheduler: Scheduler, world: World
) -> None:
    world.register()
    for _ in range(100):
        world.submit(task_data='{"x": "' + "y" * 5000 + '"}', batch="old")
    for task in world.pull(limit=100):
        world.report(task, "completed")
    waiting = world.submit()
    pages_before = world.rows("PRAGMA page_count")[0]["page_count"]
    world.now += 31 * DAY
    while world.store.write(scheduler.delete_finished):
        pass
    assert world.rows("SELECT id FROM af_crawl_tasks") == [{"id": waiting}]
    assert world.rows("SELECT * FROM af_batch") == []
    assert world.rows("SELECT * FROM af_count WHERE scope = 'batch'") == []
    assert world.rows("PRAGMA page_count")[0]["page_count"] < pages_before / 2


def test_a_start_with_a_clock_far_ahead_deletes_nothing_for_an_hour_and_says_so(
    scheduler: Scheduler, world: World
) -> None:
    task_id = world.submit()
    world.report(world.take(), "completed")
    world.store.write(lambda tx: tx.note("system", "master_started"))
    world.beat()
    known_until = world.now
    jobs = [scheduler.delete_finished, scheduler.thin_heartbeats, scheduler.roll_up, scheduler.forget_events]

    def kept() -> list[int]:
        for job in jobs:
            world.store.write(job)
        tables = ("af_crawl_tasks", "af_device_heartbeat", "af_minute", "af_event")
        return [world.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in tables]

    world.now += 100 * DAY
    scheduler.deletes_from = world.store.write(retention.deletes_from, known_until)
    before = kept()
    assert before[0] == 1 and all(before)
    world.now += 3590
    # A second start within the hour knows of nothing unusual, and waits all the same.
    scheduler.deletes_from = world.store.write(retention.deletes_from, world.now)
    assert kept() == before
    kind, sentence = scheduler.watch(world.now, world.now) or ("", "")
    assert kind == "clock" and "set the clock and restore" in sentence
    world.now += 11
    assert scheduler.watch(world.now, world.now) is None
    assert kept()[:2] == [0, 0] and world.rows("SELECT id FROM af_crawl_tasks WHERE id = ?", task_id) == []


def test_a_start_within_a_day_of_what_is_known_deletes_at_once(world: World) -> None:
    assert world.store.write(retention.deletes_from, world.now - DAY) == 0.0
    assert world.store.write(retention.deletes_from, 0.0) == 0.0, "a new database knows nothing"


def test_retention_goes_on_at_once_while_there_is_more(
    scheduler: Scheduler, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.CHUNK", 3)
    monkeypatch.setattr("scheduler.GOES_ON_SECONDS", 60.0)
    world.register()
    for _ in range(10):
        world.submit()
    for task in world.pull(limit=10):
        world.report(task, "completed")
    world.now += 31 * DAY
    scheduler._run_job(scheduler.delete_finished)
    assert world.rows("SELECT id FROM af_crawl_tasks") == []


def test_a_batch_with_tasks_is_never_forgotten(scheduler: Scheduler, world: World) -> None:
    world.register()
    world.submit(batch="b")
    world.report(world.pull()[0], "completed")
    world.now += 31 * DAY
    world.submit(batch="b")
    world.store.write(scheduler.delete_finished)
    assert [row["name"] for row in world.rows("SELECT name FROM af_batch")] == ["b"]
    assert len(world.pull()) == 1


def test_minutes_become_hours_and_lose_nothing(scheduler: Scheduler, world: World) -> None:
    world.register()
    for _ in range(3):
        world.submit()
        world.report(world.pull()[0], "completed", duration_seconds=2.0)
        world.now += 60
    world.now += 3 * DAY
    while world.store.write(scheduler.roll_up):
        pass
    assert world.rows("SELECT * FROM af_minute") == []
    hours = world.rows("SELECT completed, duration_seconds FROM af_hour WHERE scope = 'all'")
    assert sum(hour["completed"] for hour in hours) == 3
    assert sum(hour["duration_seconds"] for hour in hours) == 6.0


def test_the_clock_never_starts_before_what_a_killed_master_wrote_last(world: World) -> None:
    from store import last_moment

    for write in (world.submit, world.register, lambda: world.pull()[0]):
        world.now += 10
        write()
        assert last_moment(Path(world.path)) >= world.now


def test_the_clock_never_starts_before_the_last_moment_of_the_database(world: World, scheduler: Scheduler) -> None:
    from clock import Clock
    from store import last_moment

    world.now += 1_000_000_000
    world.store.write(scheduler.remember_time)
    assert Clock(not_before=last_moment(Path(world.path))).now() >= world.now
