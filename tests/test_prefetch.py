"""Short tasks wait on the device for a slot: who gets how many, in which order, and what if they do not start."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from farm import wait_for
from test_limits import account, set_limits
from world import World

import db
import devices
import judging
from dispatcher import Delivery
from executors.device.holding import QUEUED, Holding
from executors.device.pace import AHEAD_LIMIT, Pace


def submit(world: World, count: int, **fields: Any) -> None:
    world.store.write(db.submit, [db.NewTask(**{"task_type": "echo", **fields}) for _ in range(count)])


def pull(world: World, device_id: str = "shop-1", limit: int = 0, ahead: int = 100, **more: Any) -> list[Delivery]:
    return world.pull(device_id, limit, **{"ahead": {"echo": ahead}, **more})


def ahead(tasks: list[Delivery]) -> int:
    return sum(task.start_within is not None for task in tasks)


def sweep(world: World) -> list[str | None]:
    run = lambda tx: [db.release(tx, attempt, "timeout") for attempt in db.overdue_attempts(tx)]  # noqa: E731
    return world.store.write(run)


# ---- the master: who gets how many ----


def test_slots_are_filled_first_and_the_rest_must_start_within_five_seconds(world: World) -> None:
    world.register()
    submit(world, 200)
    tasks = pull(world, limit=3, ahead=20)
    assert [task.start_within for task in tasks] == [None] * 3 + [5.0] * 20


def test_a_free_slot_elsewhere_goes_before_a_queue(world: World) -> None:
    world.register("full")
    world.register("idle")
    got: dict[str, list[Delivery]] = {}

    def ask(device_id: str, limit: int) -> None:
        asked = {"echo": 100}
        got[device_id] = world.dispatcher.pull(device_id, "boot-1", limit, 10.0, ahead=asked).tasks

    threads = [threading.Thread(target=ask, args=pair) for pair in (("full", 0), ("idle", 4))]
    for thread in threads:
        thread.start()
    wait_for("both pulls", lambda: world.dispatcher.held_polls == 2)
    submit(world, 4)
    threads[1].join()
    assert (len(got["idle"]), ahead(got["idle"])) == (4, 0)
    submit(world, 4)
    threads[0].join()
    assert (len(got["full"]), ahead(got["full"])) == (2, 2)


def test_nobody_takes_more_ahead_than_its_share_of_what_waits(world: World) -> None:
    for device_id in ("shop-1", "shop-2", "shop-3", "shop-4"):
        world.register(device_id)
    submit(world, 100)
    assert len(pull(world, "shop-1", ahead=90)) == 25
    assert len(pull(world, "shop-2", ahead=90)) == 18


def test_only_types_that_the_device_knows_to_be_short_go_ahead(world: World) -> None:
    world.register(task_types=("echo", "crawl"))
    submit(world, 5, task_type="crawl", priority=10)
    submit(world, 5)
    assert {task.task_type for task in pull(world)} == {"echo"}


def test_two_short_types_share_one_second_of_work(world: World) -> None:
    world.register(task_types=("echo", "crawl"))
    submit(world, 5, priority=9)
    submit(world, 50, task_type="crawl")
    tasks = world.pull("shop-1", 0, ahead={"echo": 10, "crawl": 4})
    assert [task.task_type for task in tasks] == ["echo"] * 5 + ["crawl"] * 2


def test_the_most_urgent_go_ahead_first(world: World) -> None:
    world.register()
    submit(world, 3, priority=1)
    submit(world, 3, priority=9)
    assert [task.priority for task in pull(world, ahead=4)] == [9, 9, 9, 1]


def test_nothing_that_a_limit_counts_waits_on_a_device(world: World) -> None:
    world.register()
    set_limits(world, account(max_running=50))
    submit(world, 10, username="ann")
    submit(world, 10)
    tasks = pull(world, limit=2, ahead=30)
    assert ahead(tasks) == 9 and all(task.username is None for task in tasks if task.start_within)


def test_a_paused_batch_and_a_draining_device_get_nothing_ahead(world: World) -> None:
    world.register()
    submit(world, 5, batch="a")
    world.store.write(db.set_batch_state, "a", "paused", None)
    assert pull(world) == []
    world.store.write(db.set_batch_state, "a", "open")
    world.store.write(devices.set_wanted, "shop-1", "draining", None)
    assert pull(world) == []


def test_a_device_that_fails_everything_gets_nothing_ahead(world: World) -> None:
    world.register()
    for _ in range(5):
        submit(world, 1, max_retry_count=0)
        world.report(world.take(), "failed")
    submit(world, 20)
    assert (len(tasks := pull(world, limit=5)), ahead(tasks)) == (1, 0)


# ---- the master: what does not start ----


def test_what_was_not_started_goes_to_others_after_seven_seconds_and_counts_nowhere(world: World) -> None:
    world.register()
    submit(world, 10)
    tasks = pull(world, ahead=10)
    world.now += 6.9
    assert sweep(world) == []
    world.now += 0.2
    assert sweep(world) == ["pending"] * 10
    row = world.row(tasks[0].id)
    assert (row["retry_count"], row["lost_count"]) == (0, 0)
    world.register("shop-2")
    again = pull(world, "shop-2", limit=10, ahead=1)
    assert {task.id for task in again} == {task.id for task in tasks}
    assert world.report(tasks[0], "released").outcome == "duplicate"
    assert world.report(tasks[1], "completed").outcome == "stale"
    for task in again:
        assert world.report(task, "completed", "shop-2").outcome == "accepted"
    assert world.counts() == {"completed": 10}


def test_what_was_started_in_time_keeps_its_own_time(world: World) -> None:
    world.register()
    submit(world, 2, execution_timeout=60)
    started, _ = pull(world, ahead=2)
    world.now += 4
    assert world.report(started, "running").outcome == "accepted"
    world.now += 80
    assert sweep(world) == ["pending"]
    assert world.row(started.id)["status"] == "running"
    world.now += 15
    assert sweep(world) == ["scheduled"]


def test_a_reply_that_is_sent_again_leaves_only_the_time_that_is_left(world: World) -> None:
    world.register()
    submit(world, 2)
    assert len(pull(world, ahead=2, seq=1, ack=0)) == 2
    world.now += 3
    assert [task.start_within for task in pull(world, ahead=2, seq=2, ack=0)] == [pytest.approx(2.0)] * 2
    world.now += 3
    assert [task.start_within for task in pull(world, ahead=2, seq=3, ack=0)] == [0.0] * 2


def test_a_cancel_reaches_what_waits_on_a_device(world: World) -> None:
    world.register()
    submit(world, 3)
    task = pull(world, ahead=3, seq=1, ack=0)[0]
    world.store.write(db.cancel, task.id)
    assert world.dispatcher.pull("shop-1", "boot-1", 0, 0.0, 2, 1).cancel == [task.assignment_id]


# ---- reports: many at once are judged as one by one ----


@pytest.mark.parametrize("outcome", ["completed", "failed", "released", "running"])
def test_reports_of_one_request_are_judged_as_they_would_be_alone(tmp_path: Path, outcome: str) -> None:
    """Running, completed, cancelled, taken back, given to another, unknown, of a wrong lease, and the same twice."""
    answers = []
    for at_once in (True, False):
        world = World(tmp_path / str(at_once))
        world.register("shop-1")
        world.register("shop-2")
        submit(world, 7, max_retry_count=0)
        tasks = world.pull(limit=7)
        world.report(tasks[1], "running")
        world.report(tasks[2], "completed")
        world.store.write(db.cancel, tasks[3].id)
        world.release(tasks[4], "lost")
        world.release(tasks[5], "lost")
        assert {task.id for task in world.pull("shop-2", 1)} == {tasks[4].id}
        tasks[6] = tasks[6]._replace(lease_id="0" * 32)
        sent = [tasks[0], *tasks, tasks[1], tasks[0]._replace(assignment_id=999)]
        reports = [db.Report(t.assignment_id, t.lease_id, outcome, "{}", duration_seconds=0.5) for t in sent]
        if at_once:
            answers.append(world.store.write(judging.apply_reports, "shop-1", reports))
        else:
            answers.append([world.store.write(judging.apply_report, "shop-1", report) for report in reports])
        rows = world.rows("SELECT status, finished_at, started_at, end_reason FROM af_crawl_tasks ORDER BY id")
        attempts = world.rows("SELECT status, completed_at, late_outcome, duration_seconds FROM af_task_assignment")
        totals = world.rows("SELECT completed_count, failed_count, total_duration_seconds FROM af_device")
        minutes = world.rows("SELECT scope, name, completed, failed, duration_seconds FROM af_minute ORDER BY 1, 2")
        answers[-1] = (answers[-1], rows, attempts, totals, minutes)
        world.check_books()
        world.close()
    assert answers[0] == answers[1]


def test_a_report_of_another_device_or_a_wrong_lease_completes_nothing_among_others(world: World) -> None:
    world.register("shop-1")
    submit(world, 2)
    mine, forged = world.pull(limit=2)
    reports = [db.Report(t.assignment_id, t.lease_id, "completed") for t in (mine, forged)]
    assert [j.outcome for j in world.store.write(judging.apply_reports, "shop-2", reports)] == ["gone", "gone"]
    reports[1] = reports[1]._replace(lease_id="x")
    assert [j.outcome for j in world.store.write(judging.apply_reports, "shop-1", reports)] == ["accepted", "stale"]


def test_of_two_reports_of_one_attempt_each_is_judged_by_its_own_lease(world: World) -> None:
    world.register("shop-1")
    submit(world, 1)
    task = world.pull(limit=1)[0]
    forged, true = (db.Report(task.assignment_id, lease, "completed", f'"{lease}"') for lease in ("x", task.lease_id))
    judged = world.store.write(judging.apply_reports, "shop-1", [forged, true, true])
    assert [j.outcome for j in judged] == ["stale", "accepted", "duplicate"]
    assert world.rows("SELECT result FROM af_task_result") == [{"result": f'"{task.lease_id}"'}]


def test_a_report_whose_files_are_missing_is_not_completed_by_another_one_behind_it(world: World) -> None:
    world.register("shop-1")
    submit(world, 1)
    task = world.pull(limit=1)[0]
    plain = db.Report(task.assignment_id, task.lease_id, "completed")
    judged = world.store.write(
        judging.apply_reports, "shop-1", [plain._replace(artifacts=(db.Artifact("a.csv", 1, "0" * 64),)), plain]
    )
    assert [j.outcome for j in judged] == ["artifacts_missing", "accepted"]
    world.check_books()


def test_what_a_completion_says_beside_its_result_is_kept_on_its_own_attempt(world: World) -> None:
    world.register("shop-1")
    submit(world, 3)
    tasks = world.pull(limit=3)
    reports = [db.Report(t.assignment_id, t.lease_id, "completed", duration_seconds=n) for n, t in enumerate(tasks)]
    reports[1] = reports[1]._replace(log_tail="it said so", duration_seconds=None)
    world.now += 10
    world.store.write(judging.apply_reports, "shop-1", reports)
    kept = world.rows("SELECT log_tail, duration_seconds FROM af_task_assignment ORDER BY id")
    assert [tuple(row.values()) for row in kept] == [(None, 0.0), ("it said so", None), (None, 2.0)]
    assert [world.row(task.id)["started_at"] for task in tasks] == [world.now, world.now, world.now - 2]


# ---- the device ----


def test_a_type_is_long_until_sixteen_short_ones_ran_and_one_long_one_ends_it() -> None:
    pace = Pace(slots=2)
    for n in range(16):
        assert pace.ahead([], []) == {}, n
        pace.note("echo", 0.01, is_completed=True)
    assert 9 < pace.ahead([], [])["echo"] < 11
    pace.note("echo", 2.0, is_completed=True)
    assert pace.ahead([], []) == {}


def test_a_failure_or_a_late_start_makes_a_type_unknown_again() -> None:
    for spoil in (lambda p: p.note("echo", 0.01, is_completed=False), lambda p: p.forget("echo")):
        pace = Pace(slots=1)
        for _ in range(20):
            pace.note("echo", 0.01, is_completed=True)
        assert pace.ahead([], [])
        spoil(pace)
        assert pace.ahead([], []) == {}


def test_what_waits_already_counts_against_the_second_of_work() -> None:
    pace = Pace(slots=1)
    for _ in range(200):
        pace.note("echo", 0.02, is_completed=True)
    assert pace.ahead([], [])["echo"] in (49, 50)
    assert pace.ahead(["echo"] * 30, ["echo"])["echo"] in (19, 20)
    assert pace.ahead(["echo"] * 50, []) == {}
    assert pace.ahead(["unknown"], []) == {}


def test_slots_with_long_tasks_have_no_time_for_short_ones() -> None:
    pace = Pace(slots=4)
    for _ in range(200):
        pace.note("echo", 0.1, is_completed=True)
    assert pace.ahead([], ["echo"] * 4)["echo"] in (39, 40)
    assert pace.ahead([], ["report", "report", "report"])["echo"] in (9, 10)
    assert pace.ahead([], ["report"] * 4) == {}


def test_no_device_holds_more_than_a_thousand_ahead() -> None:
    pace = Pace(slots=50)
    for _ in range(100):
        pace.note("echo", 0.0, is_completed=True)
    assert pace.ahead([], [])["echo"] == AHEAD_LIMIT
    assert pace.ahead(["echo"] * 900, [])["echo"] == AHEAD_LIMIT - 900


def test_a_device_asks_again_when_half_of_its_queue_has_begun() -> None:
    holding = Holding(slots=2)
    held = holding.add([{"assignment_id": n, "lease_id": "x"} for n in range(12)], 0.0)
    assert not holding.is_low and holding.room() == 0 and len(holding.types_in(QUEUED)) == 12
    for one in held[:5]:
        holding.settle(one)
    assert not holding.is_low
    holding.settle(held[5])
    assert holding.is_low and holding.room() == 0
    holding.add([], 0.0)
    assert not holding.is_low


def test_the_most_urgent_task_of_a_queue_starts_first_then_the_oldest() -> None:
    holding = Holding(slots=1)
    tasks = [{"assignment_id": n, "lease_id": "x", "priority": p} for n, p in enumerate((5, 5, 1, 9, 5))]
    holding.add(tasks, 0.0)
    assert [holding.next_queued().assignment_id for _ in tasks] == [3, 0, 1, 4, 2]
