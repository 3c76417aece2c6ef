"""Limits across the fleet: how many may run and start, what closes a key, and what happens when limits change."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from world import World

import db
import lanes
import limits
import reasons
import scheduler as scheduler_module
from backlog import Backlog
from limits import Limit
from reads import Reads
from transaction import Tx

DAY = 86400.0


def set_limits(world: World, *wanted: Limit, reshape: bool = True) -> None:
    world.store.write(lanes.set_limits, wanted, "a test")
    while reshape and world.store.write(lanes.reshape):
        pass


def account(**numbers: Any) -> Limit:
    return Limit(0, "account", "*", ("username",), **numbers)


def ids(tasks: list[Any]) -> list[int]:
    return [task.id for task in tasks]


def keys(world: World) -> dict[str, dict[str, Any]]:
    """{value: what GET /limits says of it} of the first limit."""
    reads = Reads(world.path)
    found = Backlog(reads).limits(world.now, world.now + world.wall_offset)[0]["keys"]
    reads.close()
    return {"/".join(key["value"]): key for key in found}


def explain(world: World, task_id: int) -> reasons.Explanation:
    reads = Reads(world.path)
    task = reads.task(task_id)
    assert task is not None
    lane = Backlog(reads).lane_of(task_id, world.now, world.now + world.wall_offset)
    known = reads.devices(world.now, 300.0)
    found = reasons.explain(task, lane, None, known, world.dispatcher.is_asking, Backlog(reads).pauses(), 10.0)
    reads.close()
    return found


def look_now(world: World) -> None:
    """Keys are looked at by what they count, not by when they said that they would open."""
    world.store.write(lambda tx: tx.execute("UPDATE af_limit_key SET look_at = 0"))


# -- max_running -----------------------------------------------------------------------------------------------


def test_never_more_than_max_running_of_a_key_on_all_devices_together(world: World) -> None:
    set_limits(world, account(max_running=2))
    world.register("shop-1")
    world.register("shop-2")
    mine = [world.submit(username="joe") for _ in range(5)]
    free = world.submit(username="ann")
    first = world.pull("shop-1", limit=10)
    assert sorted(ids(first)) == sorted([*mine[:2], free])
    assert world.pull("shop-2", limit=10) == []
    done = next(task for task in first if task.id == mine[0])
    world.report(done, "completed")
    assert ids(world.pull("shop-2", limit=10)) == [mine[2]]


@pytest.mark.parametrize("end", ["completed", "failed", "snoozed", "released"])
def test_however_an_attempt_ends_its_place_is_free_again(world: World, end: str) -> None:
    set_limits(world, account(max_running=1))
    world.submit(username="joe", max_retry_count=0)
    second = world.submit(username="joe", priority=1)
    task = world.take(start=True)
    assert world.pull() == []
    world.report(task, end, can_retry=False)
    assert world.pull()[0].id in (task.id, second)
    assert world.pull() == []


def test_a_lost_a_cancelled_and_an_overdue_task_free_their_place(world: World) -> None:
    set_limits(world, account(max_running=1))
    for end in ("lost", "cancel", "timeout"):
        world.submit(username="joe")
        task = world.take(start=True)
        if end != "cancel":
            world.release(task, end)
        world.store.write(db.cancel, task.id)
        world.pull(limit=0)  # it hears of the cancelled one
        assert keys(world)["joe"]["running"] == 0


def test_a_task_that_lacks_the_keys_field_goes_free(world: World) -> None:
    set_limits(world, account(max_running=1))
    world.register()
    for _ in range(4):
        world.submit()
    assert len(world.pull(limit=10)) == 4


def test_a_limit_without_a_key_counts_all_tasks_of_its_types_together(world: World) -> None:
    set_limits(world, Limit(0, "all", "cr*", (), max_running=3))
    world.register(task_types=("crawl", "echo"))
    for n in range(10):
        world.submit(task_type="crawl", username=f"user-{n}")
    other = world.submit()
    assert len(world.pull(limit=10)) == 4
    assert world.row(other)["status"] == "assigned"


def test_a_key_of_several_fields_counts_each_combination(world: World) -> None:
    set_limits(world, Limit(0, "pair", "*", ("username", "app_id", "task_data.zone"), max_running=1))
    world.register()
    for zone in ("1", "1", "2"):
        world.submit(username="joe", app_id="a", task_data=f'{{"zone": {zone}}}')
    world.submit(username="joe", app_id="b", task_data='{"zone": 1}')
    world.submit(username="joe", app_id="b", task_data='{"zone": [1]}')
    world.submit(username="joe", app_id="b", task_data='{"zone": [1]}')
    assert len(world.pull(limit=10)) == 5


def test_several_limits_all_hold(world: World) -> None:
    set_limits(world, account(max_running=3), Limit(0, "app", "*", ("app_id",), max_running=1))
    world.register()
    for n in range(4):
        world.submit(username="joe", app_id=f"app-{n % 2}")
    assert len(world.pull(limit=10)) == 2
    for n in range(4):
        world.submit(username="joe", app_id=f"other-{n}")
    assert len(world.pull(limit=10)) == 1


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.COM/a?b=c", "example.com"),
        ("http://user:secret@example.com:8080/", "example.com"),
        ("HTTP://EXAMPLE.com.", "example.com"),
        ("http://bücher.example/", "xn--bcher-kva.example"),
        ("http://[2001:DB8::1]:80/x", "2001:db8::1"),
        ("http://192.168.0.1/x", "192.168.0.1"),
        ("not an address", None),
        ("http://[broken/", None),
        (17, None),
    ],
)
def test_a_crawl_is_counted_by_the_host_of_its_url(url: object, host: str | None) -> None:
    site = Limit(1, "site", "crawl", ("task_data.host",))
    task = db.NewTask("crawl", json.dumps({"url": url, "host": "what-it-says.example"}))
    assert limits.values_of([site], task) == (None if host is None else json.dumps([host]),)


def test_another_type_may_name_its_host_itself() -> None:
    site = Limit(1, "site", "*", ("task_data.host",))
    own = db.NewTask("render", '{"url": "http://example.com/", "host": "proxy-1"}')
    derived = db.NewTask("render", '{"url": "http://example.com/"}')
    assert limits.values_of([site], own) == ('["proxy-1"]',)
    assert limits.values_of([site], derived) == ('["example.com"]',)


def test_a_task_given_up_is_not_taken_back_when_its_place_is_taken(world: World) -> None:
    set_limits(world, account(max_running=1))
    task_id = world.submit(username="joe")
    other = world.submit(username="joe", priority=9)
    world.store.write(db.cancel, other)
    away = world.take("shop-1", start=True)
    world.lose()
    world.store.write(db.requeue, other)
    world.register("shop-2")
    assert ids(world.pull("shop-2")) == [other]
    assert world.report(away, "running").outcome == "stale"
    assert world.row(task_id)["status"] == "pending"
    world.store.write(db.cancel, other)
    assert world.report(away, "running").outcome == "accepted"


# -- starts ----------------------------------------------------------------------------------------------------


def test_never_more_than_max_starts_in_any_window(world: World) -> None:
    set_limits(world, account(max_starts=3, window_seconds=60.0))
    world.register(max_concurrent_tasks=100)
    for _ in range(20):
        world.submit(username="joe")
    starts: list[float] = []
    for _ in range(300):
        look_now(world)
        starts += [world.now] * len(world.pull(limit=10))
        world.now += 1.0
    for at in starts:
        assert sum(at <= other < at + 60.0 for other in starts) <= 3
    assert len(starts) == 15  # five windows in 300 s, and none of it wasted


def test_starts_of_a_window_that_ended_are_given_back_one_by_one(world: World) -> None:
    set_limits(world, account(max_starts=2, window_seconds=60.0))
    world.register()
    for _ in range(5):
        world.submit(username="joe")
    assert len(world.pull(limit=1)) == 1
    world.now += 30
    assert len(world.pull(limit=5)) == 1
    world.now += 29.9
    assert world.pull(limit=5) == []
    world.now += 0.1
    assert len(world.pull(limit=5)) == 1
    world.now += 30.0
    assert len(world.pull(limit=5)) == 1


def test_an_attempt_counts_as_a_start_however_it_ends(world: World) -> None:
    set_limits(world, account(max_starts=2, window_seconds=60.0))
    world.submit(username="joe")
    for _ in range(2):
        world.report(world.take(), "released")
    assert world.pull() == []
    world.now += 60
    assert len(world.pull()) == 1


def test_a_day_ends_at_midnight_utc(world: World) -> None:
    world.now = (world.now // DAY + 1) * DAY - 100.0
    set_limits(world, account(max_starts_per_day=2))
    world.register()
    for _ in range(5):
        world.submit(username="joe")
    assert len(world.pull(limit=5)) == 2
    world.now += 99.0
    assert world.pull(limit=5) == []
    world.now += 1.0
    assert len(world.pull(limit=5)) == 2


@pytest.mark.parametrize("step", [DAY, -DAY, 5 * 3600.0, -5 * 3600.0, 40 * DAY])
def test_a_clock_that_is_set_opens_no_second_day(world: World, step: float) -> None:
    world.now = world.now // DAY * DAY + 12 * 3600.0
    set_limits(world, account(max_starts_per_day=2))
    world.register()
    for _ in range(9):
        world.submit(username="joe")
    assert len(world.pull(limit=9)) == 2
    for offset in (step, 0.0, step):
        world.wall_offset = offset
        world.now += 60.0
        look_now(world)
        assert world.pull(limit=9) == []


def test_midnight_comes_once_when_the_wall_clock_is_set_back_over_it(world: World) -> None:
    world.now = (world.now // DAY + 1) * DAY - 10.0
    set_limits(world, account(max_starts_per_day=2))
    world.register()
    for _ in range(9):
        world.submit(username="joe")
    assert len(world.pull(limit=2)) == 2
    world.wall_offset = -3600.0
    world.now += 20.0
    assert world.pull(limit=9) == []
    world.now += 3600.0
    assert len(world.pull(limit=9)) == 2


def test_counts_are_those_of_before_after_a_restart(world: World) -> None:
    set_limits(
        world,
        account(max_running=4, max_starts=3, window_seconds=100.0),
        Limit(0, "day", "*", (), max_starts_per_day=6),
    )
    world.register(max_concurrent_tasks=50)
    for _ in range(20):
        world.submit(username="joe")
    assert len(world.pull(limit=50)) == 3
    world.reopen()
    world.register(boot_id="boot-1")
    assert world.pull(limit=50) == []
    world.now += 100
    world.reopen()
    world.register(boot_id="boot-1")
    assert len(world.pull(limit=50)) == 1
    assert keys(world)["joe"]["running"] == 4


@pytest.mark.parametrize("jump", [7200.0, 5 * DAY, -50.0])
def test_a_clock_that_is_set_before_a_restart_ends_no_window_and_no_closing(world: World, jump: float) -> None:
    set_limits(world, account(max_starts=2, window_seconds=60.0))
    world.register()
    for user in ("joe", "joe", "joe", "ann", "ann"):
        world.submit(username=user)
    first = world.pull(limit=9)
    world.report(first[-1], "snoozed", limit_closed_seconds=60.0)
    world.now += 30
    world.reopen(jump)
    world.register()
    look_now(world)
    assert world.pull(limit=9) == []
    world.now += 30
    assert len(world.pull(limit=9)) == 1


@pytest.mark.parametrize("jump", [90.0, -30.0])
def test_a_limit_that_is_new_after_the_clock_was_set_counts_what_was_started_before(world: World, jump: float) -> None:
    world.register()
    for _ in range(6):
        world.submit(username="joe")
    for task in world.pull(limit=2):
        world.report(task, "completed")
    world.now += 30
    world.reopen(jump)
    world.register()
    set_limits(world, account(max_starts=3, window_seconds=60.0))
    assert len(world.pull(limit=9)) == 1
    world.now += 31
    assert len(world.pull(limit=9)) == 2


# -- what devices learn ----------------------------------------------------------------------------------------


def test_a_closed_key_is_sent_nowhere_until_then_and_uses_no_attempt(world: World) -> None:
    set_limits(world, account())
    world.register("shop-2")
    task_id, other = world.submit(username="joe"), world.submit(username="joe")
    free = world.submit(username="ann")
    task = world.take()
    judged = world.report(task, "failed", error_message="429 too many requests", limit_closed_seconds=300.0)
    assert (judged.outcome, judged.status) == ("accepted", "scheduled")
    row = world.row(task_id)
    assert (row["retry_count"], row["snooze_count"], row["next_run_at"]) == (0, 1, world.now + 300)
    assert ids(world.pull("shop-2", limit=9)) == [free]
    why = explain(world, other)
    assert (why.reason, why.next_look_seconds) == ("limit_closed", 300.0)
    assert why.limit is not None and (why.limit["name"], why.limit["value"]) == ("account", ["joe"])
    assert "429 too many requests" in why.detail
    world.now += 299
    world.store.write(db.promote)
    assert world.pull("shop-2", limit=9) == []
    world.now += 1
    world.store.write(db.promote)
    assert sorted(ids(world.pull("shop-2", limit=9))) == [task_id, other]


def test_a_snooze_may_close_its_key_for_longer_than_it_sleeps_itself(world: World) -> None:
    set_limits(world, account())
    world.submit(username="joe")
    world.report(world.take(), "snoozed", delay_seconds=10.0, limit_closed_seconds=100.0)
    world.now += 10
    world.store.write(db.promote)
    assert world.pull() == []
    world.now += 90
    assert len(world.pull()) == 1


def test_a_shorter_closing_does_not_open_earlier_and_a_person_may_open_it(world: World) -> None:
    set_limits(world, account())
    for _ in range(3):
        world.submit(username="joe")
    first, second = world.take(), world.take()
    world.report(first, "snoozed", limit_closed_seconds=100.0)
    world.report(second, "snoozed", limit_closed_seconds=5.0)
    world.now += 50
    assert world.pull() == []
    assert world.store.write(limits.open_keys, "account", '["ann"]') == 0
    assert world.pull() == []
    assert world.store.write(limits.open_keys, "account", '["joe"]') == 1
    assert len(world.pull()) == 1
    assert world.store.write(limits.open_keys, "no-such", None) is None


def test_a_report_may_name_the_limit_that_it_learned_of(world: World) -> None:
    set_limits(world, account(), Limit(0, "app", "*", ("app_id",)), Limit(0, "all", "*", ()))
    world.submit(username="joe", app_id="a")
    same_app, same_user = world.submit(username="ann", app_id="a"), world.submit(username="joe", app_id="b")
    world.report(world.take(), "snoozed", limit_closed_seconds=60.0, limit_name="app")
    assert ids(world.pull(limit=9)) == [same_user]
    assert explain(world, same_app).limit["name"] == "app"  # type: ignore[index]


def test_without_a_name_what_counts_everything_together_stays_open(world: World) -> None:
    set_limits(world, account(), Limit(0, "all", "*", ()))
    world.submit(username="joe")
    other = world.submit(username="ann")
    world.report(world.take(), "snoozed", limit_closed_seconds=60.0)
    assert ids(world.pull(limit=9)) == [other]


def test_a_hopeless_failure_may_close_its_key_too(world: World) -> None:
    set_limits(world, account())
    world.submit(username="joe")
    assert world.report(world.take(), "failed", can_retry=False, limit_closed_seconds=60.0).status == "failed"
    world.submit(username="joe")
    assert world.pull() == []


def test_a_device_cannot_close_a_key_for_years(world: World) -> None:
    set_limits(world, account())
    world.submit(username="joe")
    world.report(world.take(), "snoozed", delay_seconds=1.0, limit_closed_seconds=1e9)
    world.now += limits.LONGEST_CLOSING_SECONDS
    world.submit(username="joe")
    assert len(world.pull()) == 1


# -- lanes: fair, urgent first, and closed ones cost nothing -----------------------------------------------------


def test_an_account_with_100_000_tasks_does_not_starve_one_with_10_and_priority_still_rules(world: World) -> None:
    set_limits(world, account())
    world.register(max_concurrent_tasks=100)
    fill(world, 100_000, priority=5)
    few = [world.submit(username="ann") for _ in range(10)]
    urgent = [world.submit(username="joe", priority=6) for _ in range(4)]
    assert [world.take().id for _ in range(4)] == urgent, "the most urgent first, although his turn was just now"
    got = [world.take().id for _ in range(20)]
    assert [task_id for task_id in got if task_id in few] == few
    assert all(len(set(got[n : n + 2]) & set(few)) == 1 for n in range(0, 20, 2)), "turn by turn: the many go on, too"


def test_priority_still_rules_over_fairness(world: World) -> None:
    set_limits(world, account())
    world.register()
    urgent = [world.submit(username="big", priority=9) for _ in range(10)]
    world.submit(username="small")
    assert ids(world.pull(limit=5)) + ids(world.pull(limit=5)) == urgent


def steps_of(world: World, run: Any) -> int:
    """How many hundred steps SQLite's machine takes in the writer for this."""
    count = [0]

    def tick() -> None:
        count[0] += 1

    world.store.write(lambda tx: tx.connection.set_progress_handler(tick, 100))
    run()
    world.store.write(lambda tx: tx.connection.set_progress_handler(None, 0))
    return count[0]


@pytest.mark.parametrize("many", [20_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_great_many_tasks_of_a_closed_key_cost_what_ten_of_them_cost(tmp_path: Path, many: int) -> None:
    steps = []
    for n in (10, many):
        folder = tmp_path / str(n)
        folder.mkdir()
        world = World(folder)
        set_limits(world, account(max_running=1))
        world.register(max_concurrent_tasks=100)
        fill(world, n)
        assert len(world.pull(limit=1)) == 1
        free = {world.submit(username="ann", priority=1), world.submit(priority=1)}
        got: set[int] = set()
        steps.append(steps_of(world, lambda world=world, got=got: got.update(ids(world.pull(limit=50)))))  # type: ignore[misc]
        assert got == free
        world.close()
    assert steps[1] <= steps[0] + 2, steps


def fill(world: World, n: int, priority: int = 10) -> None:
    """n tasks of one account, as rows: submitting half a million of them would take longer than the test."""
    world.submit(username="joe", priority=priority)

    def insert(tx: Tx) -> None:
        columns = [row[1] for row in tx.execute("PRAGMA table_info(af_crawl_tasks)") if row[1] != "id"]
        names = ", ".join(columns)
        tx.execute(
            f"INSERT INTO af_crawl_tasks ({names}) WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n"
            f" WHERE i < {n}) SELECT {names} FROM n, af_crawl_tasks WHERE id = 1 AND {n} > 1"
        )
        tx.execute("UPDATE af_lane SET waiting = ?, unfinished = ?", (n, n))
        tx.execute("UPDATE af_count SET n = ? WHERE state = 'pending'", (n,))

    world.store.write(insert)


def test_many_closed_lanes_are_not_looked_at_either(world: World) -> None:
    set_limits(world, account(max_running=1), Limit(0, "all", "*", (), max_running=5))
    world.register(max_concurrent_tasks=1000)
    for n in range(400):
        world.submit(username=f"user-{n}", priority=9)
        world.submit(username=f"user-{n}", priority=9)
    assert len(world.pull(limit=100)) == 5
    world.pull(limit=100)
    quiet = steps_of(world, lambda: world.pull(limit=100))
    assert quiet < 15, quiet  # some hundred steps, though 400 lanes wait


def test_the_hot_queries_read_an_index_and_sort_nothing(world: World) -> None:
    from dispatcher import _LANES_SQL

    due = "SELECT id FROM af_limit_key WHERE look_at <= 1 ORDER BY look_at LIMIT 5"
    parked = "SELECT id FROM af_lane WHERE closed_by = 1 ORDER BY top_priority DESC, last_served LIMIT 5"
    stale = "SELECT id, paused, paused_reason FROM af_lane WHERE is_stale = 1 AND waiting > 0 ORDER BY id LIMIT 5"
    failing = "SELECT device_id FROM af_device WHERE consecutive_failures >= 5"
    window = "SELECT last_at, n FROM af_limit_start WHERE key_id = 1 AND span = 'window'"
    for sql in (_LANES_SQL.replace("?", "'echo'"), due, parked, stale, failing, window):
        plan = " / ".join(row["detail"] for row in world.rows("EXPLAIN QUERY PLAN " + sql))
        assert "USING" in plan and "TEMP B-TREE" not in plan, (sql, plan)


# -- limits that change while tasks wait ---------------------------------------------------------------------------


def test_a_new_limit_counts_what_runs_and_what_was_started_before_it(world: World) -> None:
    world.register(max_concurrent_tasks=100)
    for _ in range(20):
        world.submit(username="joe")
    running = world.pull(limit=3)
    set_limits(world, account(max_running=3))
    assert world.pull(limit=9) == []
    world.report(running[0], "completed")
    assert len(world.pull(limit=9)) == 1
    set_limits(world, account(max_starts=5, window_seconds=60.0))
    assert len(world.pull(limit=9)) == 1
    set_limits(world, account(max_starts_per_day=6))
    assert len(world.pull(limit=9)) == 1
    world.now += 60
    set_limits(world, account(max_starts=7, window_seconds=3600.0))
    assert len(world.pull(limit=9)) == 1


def test_waiting_tasks_move_in_chunks_and_nothing_leaves_before_it_has_moved(world: World) -> None:
    world.register(max_concurrent_tasks=100)
    for n in range(30):
        world.submit(username=f"user-{n % 3}", priority=1 + n % 10)
    other = world.submit(task_type="crawl")
    set_limits(world, Limit(0, "account", "echo", ("username",), max_running=1), reshape=False)
    assert world.pull(limit=50) == []
    assert explain(world, 1).reason == "lane_moving"
    assert world.store.write(lanes.reshape, 10)
    world.check_books()
    moved = world.rows(
        "SELECT priority FROM af_crawl_tasks JOIN af_lane ON af_lane.id = lane_id WHERE is_stale = 0 AND priority > 1 AND af_crawl_tasks.task_type = 'echo'"
    )
    assert min(row["priority"] for row in moved) >= 7  # the urgent ones go first
    first = world.pull(limit=50)
    assert 1 <= len(first) <= 3
    while world.store.write(lanes.reshape, 10):
        world.check_books()
    got = [*first, *world.pull(limit=50)]
    owners = Counter(world.row(task.id)["username"] for task in got)
    assert owners == {"user-0": 1, "user-1": 1, "user-2": 1}
    assert world.row(other)["status"] == "pending"
    set_limits(world)
    assert len(world.pull(limit=50)) == 27


def test_what_comes_back_into_a_lane_of_old_limits_moves_too(world: World) -> None:
    task_id = world.submit(username="joe")
    later = world.submit(username="joe", run_at=world.now + 10)
    task = world.take(start=True)
    set_limits(world, account(max_running=1))
    assert keys(world)["joe"]["running"] == 1
    world.report(task, "released")
    world.now += 10
    assert world.store.write(db.promote) == 1
    while world.store.write(lanes.reshape):
        pass
    assert ids(world.pull(limit=5)) == [task_id]
    assert world.pull(limit=5) == []
    assert world.row(later)["status"] == "pending"


def test_a_task_that_is_taken_back_is_counted_for_the_limits_of_now(world: World) -> None:
    world.submit(username="joe")
    away = world.take(start=True)
    world.lose()
    set_limits(world, account(max_running=1), reshape=False)
    assert world.report(away, "running").outcome == "accepted"
    assert keys(world)["joe"]["running"] == 1


def test_higher_and_lower_numbers_hold_at_once_and_keep_the_counts(world: World) -> None:
    set_limits(world, account(max_running=1))
    world.register(max_concurrent_tasks=100)
    for _ in range(20):
        world.submit(username="joe")
    running = world.pull(limit=9)
    assert world.pull(limit=9) == []
    set_limits(world, account(max_running=4))
    running += world.pull(limit=9)
    assert len(running) == 4
    set_limits(world, account(max_running=2))
    for task in running[:2]:
        world.report(task, "completed")
        assert world.pull(limit=9) == []
    world.report(running[2], "completed")
    assert len(world.pull(limit=9)) == 1


def test_a_pause_survives_the_change_of_limits(world: World) -> None:
    world.register()
    task_id = world.submit(username="joe")
    world.store.write(lanes.pause_lane, world.row(task_id)["lane_id"], "by hand")
    set_limits(world, account(max_running=5))
    assert world.pull() == []
    assert "by hand" in explain(world, task_id).detail
    world.store.write(lanes.resume_lane, world.row(task_id)["lane_id"])
    assert len(world.pull()) == 1


def test_a_limit_taken_back_and_set_again_counts_from_the_books(world: World) -> None:
    set_limits(world, account(max_running=1))
    world.register()
    for _ in range(3):
        world.submit(username="joe")
    task = world.pull(limit=9)[0]
    set_limits(world)
    assert len(world.pull(limit=1)) == 1
    set_limits(world, account(max_running=2))
    assert world.pull(limit=9) == []
    world.report(task, "completed")
    assert len(world.pull(limit=9)) == 1


def test_the_config_holds_until_the_api_says_otherwise_and_again_when_it_changes(world: World) -> None:
    world.store.write(lanes.apply_config, [account(max_running=1)])
    set_limits(world, account(max_running=9))
    world.store.write(lanes.apply_config, [account(max_running=1)])
    assert world.rows("SELECT max_running FROM af_limit")[0]["max_running"] == 9
    world.store.write(lanes.apply_config, [account(max_running=2)])
    assert world.rows("SELECT max_running FROM af_limit")[0]["max_running"] == 2


def test_what_counts_for_nothing_any_more_is_forgotten(world: World) -> None:
    set_limits(world, account(max_starts=100, window_seconds=60.0))
    world.register()
    for n in range(10):
        world.submit(username=f"user-{n}")
    for task in world.pull(limit=10):
        world.report(task, "completed")
    kept = world.submit(username="user-3")
    tidy = scheduler_module.Scheduler.forget_lanes
    times = scheduler_module.Times(10, 60, 300, 30, 7, 30, 365)
    tidier = scheduler_module.Scheduler(world.store, world.dispatcher, world.presence, times)
    world.store.write(lambda tx: tidy(tidier, tx))
    assert len(world.rows("SELECT * FROM af_lane")) == 1
    assert len(world.rows("SELECT * FROM af_limit_key")) == 10
    world.now += 60
    for _ in range(2):
        world.store.write(lambda tx: tidy(tidier, tx))
    assert world.rows("SELECT * FROM af_limit_start") == []
    assert [row["value"] for row in world.rows("SELECT value FROM af_limit_key")] == ['["user-3"]']
    assert ids(world.pull(limit=9)) == [kept]


def test_a_finished_task_whose_lane_is_gone_can_be_run_again(world: World) -> None:
    set_limits(world, account(max_running=1))
    task_id = world.submit(username="joe", max_retry_count=0)
    world.report(world.take(), "failed")
    world.store.write(lanes.forget_idle_lanes, 100)
    assert world.rows("SELECT * FROM af_lane") == []
    assert world.store.write(db.requeue, task_id) == "pending"
    assert ids(world.pull()) == [task_id]
    assert keys(world)["joe"]["running"] == 1


def test_a_database_that_other_programs_look_into_says_the_same_as_the_books(world: World) -> None:
    set_limits(world, account(max_running=3))
    world.register()
    for _ in range(5):
        world.submit(username="joe")
    world.pull(limit=9)
    with sqlite3.connect(world.path) as connection:
        assert connection.execute("SELECT running, is_full FROM af_limit_key").fetchall() == [(3, 1)]
    found = keys(world)["joe"]
    assert (found["running"], found["held_by"], found["next_look_seconds"]) == (3, "max_running", None)
