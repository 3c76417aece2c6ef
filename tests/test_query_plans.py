"""Does any question read a table that grows from one end to the other? The plans of what the master really executes.

SQLite tells which statements it runs while the API is asked for everything and a device lives its life; EXPLAIN QUERY
PLAN says how it goes about each. No figure of ANALYZE helps it, as in production.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from farm import Master, farm, wait_for
from world import World

import listing
import schema
from artifacts import Artifacts
from reads import Reads
from scheduler import Scheduler, Times

GROWING = {
    "af_crawl_tasks", "af_task_payload", "af_task_result", "af_task_assignment", "af_artifact", "af_device_heartbeat",
    "af_lane", "af_lane_key", "af_limit_key", "af_limit_start", "af_affinity", "af_batch", "af_count", "af_minute",
    "af_hour", "af_event", "af_audit",
}  # fmt: skip
BOUNDED_TABLES = {"af_device", "af_limit", "af_pause", "af_key", "af_meta"}
"""As many rows as there are machines, limits, pauses, keys; whatever the tables of tasks hold."""

ACTIVE_INDEXES = {"attempt_active", "attempt_holder", "attempt_deadline"}
"""Partial indexes with as many entries as tasks run now: they may be read from end to end."""

#  part of the plan                                   part of the statement          why it may be so
EXCEPTIONS = (
    ("USE TEMP B-TREE FOR GROUP BY",                  "FROM writer CROSS JOIN af_count", "counters of some names, or of the task types"),
    ("USE TEMP B-TREE FOR",                           "SELECT max(heartbeat_at)",        "the beats of one device in an hour or a day"),
    ("USE TEMP B-TREE FOR GROUP BY",                  "FROM minute CROSS JOIN af_minute", "the minutes of an hour or a day"),
    ("USE TEMP B-TREE FOR GROUP BY",                  "DELETE FROM af_device_heartbeat", "the beats of twenty minutes"),
    ("USE TEMP B-TREE FOR DISTINCT",                  "task_id = 104",                   "the attempts of one task, twenty at most"),
    ("USE TEMP B-TREE FOR ORDER BY",                  "FROM af_limit_key AS key JOIN",   "the keys that one lane stands under, or 100 to show"),
    ("SCAN af_limit_key",                             "ORDER BY id DESC LIMIT 2000",     "the newest keys: it stops at LIMIT"),
    ("SCAN af_lane USING INDEX lane_open",            "EXISTS (SELECT 1 FROM af_lane",   "is there any? It stops at the first"),
    ("SCAN af_lane USING INDEX lane_waiting",         "LIMIT 100",                       "it stops at LIMIT"),
    ("SCAN af_lane USING INDEX lane_paused",          "LIMIT 50",                        "it stops at LIMIT"),
    ("SCAN af_lane USING INDEX lane_idle",            "LIMIT 2000",                      "it stops at LIMIT"),
    ("SCAN af_artifact USING INDEX artifact_dropped", "LIMIT 2000",                      "it stops at LIMIT"),
    ("SCAN af_event",                                 "ORDER BY id LIMIT 500",           "it stops at LIMIT"),
    ("SCAN af_audit",                                 "ORDER BY id LIMIT 500",           "it stops at LIMIT"),
    ("SCAN af_lane USING INDEX lane_stale",           "is_stale = 1 AND waiting > 0",    "for seconds, after the limits were changed"),
    ("SCAN af_lane USING COVERING INDEX lane_place",  "SELECT DISTINCT task_type, shape", "when the limits are changed"),
    ("USE TEMP B-TREE FOR DISTINCT",                  "SELECT DISTINCT task_type, shape", "as many as types and limits"),
    ("SCAN af_task_assignment",                       "ORDER BY attempt.id DESC LIMIT 50000", "when a limit is added: it stops at LIMIT"),
)  # fmt: skip


class Ran(NamedTuple):
    """A database, and the statements that ran on it."""

    database: Path
    statements: list[str]


class Step(NamedTuple):
    """A statement, and a line of what SQLite says that it does."""

    sql: str
    detail: str


class TracedMaster(Master):
    """A real master that writes down its statements."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)

    def start(self) -> None:
        self._command[1] = str(Path(__file__).with_name("tracing_master.py"))
        super().start()


FILTERS: dict[str, Any] = {
    "task_type": "echo", "device_id": "shop-1", "batch": "b", "username": "wang", "app_id": "com.a", "parent_id": 1,
    "text": "k", "created_after": "2020-01-01T00:00:00Z", "created_before": "2100-01-01T00:00:00Z",
}  # fmt: skip
STATES = (*listing.STATES, "failed,cancelled", "assigned,running,failed", "scheduled,pending,assigned,running")


def live(master: Master) -> None:
    """What devices and submitters do."""
    tasks = [
        {"task_type": "echo", "batch": "b", "username": "wang", "app_id": "com.a", "unique_key": f"k{n}",
         "task_data": {"n": n}}
        for n in range(100)
    ]  # fmt: skip
    first = master.submit(*tasks)[0]
    master.submit(*tasks[:2])
    master.submit(*[{"task_type": "echo", "batch": f"batch-{n}", "parent_id": first} for n in range(60)])
    master.submit(
        {"task_type": "echo", "same_device_as": "cookies"}, {"task_type": "echo", "prefer_device_id": "shop-1"},
        {"task_type": "echo", "pinned_device_id": "shop-1"}, {"task_type": "echo", "delay_seconds": 1000},
        {"task_type": "echo", "delay_seconds": 1},
    )  # fmt: skip
    master.register("shop-1", max_concurrent_tasks=50)
    master.beat("shop-1")
    held = master.pull("shop-1", limit=20)
    for task, outcome in zip(held, ("completed", "failed", "snoozed", "released", "running") * 3):
        facts: dict[str, Any] = {"result": {"n": 1}} if outcome == "completed" else {}
        facts |= {"snooze_seconds": 1} if outcome == "snoozed" else {}
        facts |= {"error_message": "no", "retry": False} if outcome == "failed" else {}
        master.report("shop-1", task, outcome, **facts)
    master.report("shop-1", held[-1], "completed", new_tasks=[{"task_type": "echo", "unique_key": "child"}])
    master.beat("shop-1", seq=2, holding=[])
    master.register("shop-1", boot_id="boot-2")


def act(master: Master, failed: int, waiting: int) -> None:
    """What a person does."""
    master.call("POST", f"/tasks/{failed}/requeue", {})
    master.call("POST", f"/tasks/{waiting}/cancel", {})
    master.call("POST", "/tasks/actions", {"action": "cancel", "filter": {"batch": "batch-1"}})
    master.call("POST", "/tasks/actions", {"action": "requeue", "filter": {"status": "cancelled", "username": "li"}})
    for verb in ("pause", "resume", "cancel"):
        master.call("POST", f"/batches/batch-2/{verb}", {})
    master.call("POST", "/batches/batch-3/pause", {})
    lane = master.get("/lanes")["lanes"][0]["id"]
    for path in (f"/lanes/{lane}", "/task-types/echo", "/system"):
        master.call("POST", f"{path}/pause", {})
        master.get("/system/overview")
        master.call("POST", f"{path}/resume", {})
    limit = {"name": "app", "task_type": "echo", "key": "app_id", "max_running": 2, "max_starts_per_day": 10_000}
    master.call("PUT", "/limits", {"limits": [limit]})
    master.register("shop-2", max_concurrent_tasks=50, task_types=["echo"])
    master.submit(*[{"task_type": "echo", "app_id": "com.z", "priority": 10}] * 5)
    running = master.pull("shop-2", limit=2)
    master.pull("shop-2")  # another one, for com.z is full
    for task in running:
        master.report("shop-2", task, "snoozed", limit_closed_seconds=0.01)
    wait_for("room for com.z", lambda: master.pull("shop-2")[0]["app_id"] == "com.z")
    master.call("POST", "/limits/app/open", {})
    master.call("PUT", "/devices/shop-1/status", {"status": "draining"})
    master.call("POST", "/devices/shop-1/revoke", {})


def ask(master: Master) -> None:
    """Every list, with every filter and pair of filters."""
    pairs = itertools.combinations(FILTERS, 2)
    for names in [(), *((name,) for name in FILTERS), *pairs]:
        query = {name: FILTERS[name] for name in names}
        master.call("GET", "/tasks", params=query)
        if len(names) < 2:
            for state in STATES:
                master.call("GET", "/tasks", params={**query, "status": state, "cursor": 1000})
    master.api(
        "GET", "/tasks/export", params={"include": "result", "status": "completed", "batch": "b"}
    ).raise_for_status()
    master.api("GET", "/tasks/export", params={"format": "csv"}).raise_for_status()
    for path in (
        "/system/overview", "/tasks/stats", "/tasks/stats?batch=b", "/tasks/stats?task_type=echo", "/devices",
        "/devices/shop-1/stats", "/batches", "/batches?name=b", "/lanes", "/lanes?task_type=echo", "/limits",
        "/tasks/1", "/tasks/1/why", "/tasks/150/why", "/events/history", "/events/history?kind=system",
        "/events/history?verb=register", "/events/history?device_id=shop-1", "/batches/b", "/batches/b/failures", "/devices/shop-1",
        "/devices/shop-1/heartbeats", "/system/series", "/keys", "/audit", "/audit?actor=127.0.0.1", "/audit?outcome=ok",
        "/audit?action=set_limits", "/audit?since=2020-01-01T00:00:00Z&until=2100-01-01T00:00:00Z",
    ):  # fmt: skip
        master.get(path)
    for part in ("username", "text", "device_id"):
        body = {"action": "cancel", "filter": {part: FILTERS[part]}, "dry_run": True}
        master.call("POST", "/tasks/actions", body)
    master.session.get(f"{master.url}/metrics").raise_for_status()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A master that was asked for everything."""
    folder = tmp_path_factory.mktemp("traced")
    with farm() as started:
        master = TracedMaster(folder)
        started.append(master)
        live(master)
        ask(master)
        failed = master.get("/tasks?status=failed")["tasks"][0]["id"]
        waiting = master.get("/tasks?status=pending")["tasks"][0]["id"]
        act(master, failed, waiting)
        wait_for("a due task", lambda: not master.get("/tasks?status=scheduled")["tasks"][1:])
        assert master.stop() == 0
    lines = (folder / "statements.jsonl").read_text().splitlines()
    return Ran(folder / "distribution.db", [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def by_itself(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All that happens because time passed, over rows that are due for it."""
    world = World(tmp_path_factory.mktemp("world"))
    times = Times(10, 60, 300, **{name: 1 for name in Times.__annotations__ if name.endswith("_days")})
    scheduler = Scheduler(world.store, world.dispatcher, world.presence, times)
    world.register()
    for n in range(20):
        world.submit(batch="old", username=f"user-{n}")
    for task in world.pull(limit=10):
        world.report(task, "completed", duration_seconds=1.0)
    world.beat()
    world.now += 40 * 86400
    statements: list[str] = []
    world.store.write(lambda tx: tx.connection.set_trace_callback(statements.append))
    for _, job in scheduler.jobs:
        while world.store.write(job) is True:
            pass
    reads = Reads(world.path, connections=1)
    with reads._connection() as connection:
        connection.set_trace_callback(statements.append)
    for _, chore in Artifacts(world.path, world.store, reads).chores:
        chore()
    reads.close()
    world.close()
    return Ran(world.path, statements)


def steps(ran: Ran) -> Iterator[Step]:
    """What SQLite would do for each statement, in its own words, with the table's name for its alias."""
    with contextlib.closing(sqlite3.connect(ran.database)) as connection:
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_stat1'").fetchone()
        for sql in ran.statements:
            if not re.match(r"(SELECT|WITH|INSERT|UPDATE|DELETE)\b", sql):
                continue
            names = {alias: table for table, alias in re.findall(r"\b(\w+) AS (\w+)", sql)}
            for *_, detail in plan(connection, re.sub(r"\bInf\b", "9e999", sql)):
                named = re.match(r"(SCAN|SEARCH) (\w+)(.*)", detail)
                yield Step(sql, f"{named[1]} {names.get(named[2], named[2])}{named[3]}" if named else detail)


def plan(connection: sqlite3.Connection, sql: str) -> list[tuple[Any, ...]]:
    """Before Python 3.11 SQLite's trace has marks where values were; which values does not matter here."""
    try:
        return connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
    except sqlite3.ProgrammingError as error:
        count = int(re.findall(r"uses (\d+)", str(error))[0])
        return connection.execute(f"EXPLAIN QUERY PLAN {sql}", [None] * count).fetchall()


def reads_all(step: Step) -> bool:
    """It reads a growing table from end to end, or sorts what it found in one."""
    scanned = re.match(r"SCAN (\w+)(?:.* INDEX (\w+))?", step.detail)
    if scanned:
        return scanned[1] in GROWING and scanned[2] not in ACTIVE_INDEXES
    return "USE TEMP B-TREE" in step.detail and any(table in step.sql for table in GROWING)


def exception_of(step: Step) -> tuple[str, str, str] | None:
    return next((entry for entry in EXCEPTIONS if entry[0] in step.detail and entry[1] in step.sql), None)


def test_no_statement_reads_a_table_that_grows_from_end_to_end(asked: Ran, by_itself: Ran) -> None:
    found = [step for ran in (asked, by_itself) for step in steps(ran) if reads_all(step)]
    unexpected = {f"{step.detail}: {step.sql}" for step in found if exception_of(step) is None}
    assert not unexpected, "\n".join(sorted(unexpected))
    unused = set(EXCEPTIONS) - {exception_of(step) for step in found}
    assert not unused, f"nothing needs these exceptions any more: {sorted(unused)}"


def test_every_index_is_used_by_some_statement(asked: Ran, by_itself: Ran) -> None:
    used = {
        name for ran in (asked, by_itself) for step in steps(ran) for name in re.findall(r"INDEX (\w+)", step.detail)
    }
    unused = set(re.findall(r"CREATE INDEX (\w+)", schema.INDEXES)) - used
    assert not unused, f"each write pays for {', '.join(sorted(unused))}, and no statement of this test uses it"


def test_every_table_that_grows_is_known_here() -> None:
    tables = {table._meta.table_name for table in schema.TABLES}
    assert tables == GROWING | BOUNDED_TABLES


def test_a_missing_index_is_noticed(asked: Ran, tmp_path: Path) -> None:
    """This file sees what it is for: without its index, a list reads all tasks."""
    path = tmp_path / "without.db"
    path.write_bytes(asked.database.read_bytes())
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP INDEX task_finished")
    statement = (
        "SELECT id FROM af_crawl_tasks WHERE finished_at IS NOT NULL AND finished_at < 1 ORDER BY finished_at LIMIT 9"
    )
    assert not any(map(reads_all, steps(asked._replace(statements=[statement]))))
    assert all(map(reads_all, steps(Ran(path, [statement]))))
