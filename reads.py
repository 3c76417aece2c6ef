"""What can be asked of the database? Lists, counts, statistics and the export, by read-only connections.

This file never writes and never uses a verb of db.py. No cursor outlives a page, and no question grows with history:
a list walks windows of ids from one end, stops at its limit or after 50 ms, and says where to go on.

Rows come out ready for JSON: moments as "2026-11-25T13:59:07.123Z", no batch as None, lists parsed; never a lease or a
token. Moments that come in (`now`) are epoch seconds. Filters are explained in listing.py.
"""

from __future__ import annotations

import json
import os
import queue
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from peewee import DatabaseError, SqliteDatabase

from listing import ACTIVE_SQL, STATES, Walked, plan, walk_down, walk_up
from schema import FAILURES_TO_PROBATION

PAGE_SECONDS = 0.05
COUNT_CAP = 10_000
ATTEMPTS_SHOWN = 20
LANES_LOOKED_AT = 100
FIRST_ROWS = 50  # of an export, so that its first byte comes at once
RESULTS_AT_ONCE = 16  # results may be large: only a few are in memory together
DEVICE_STATES = ("online", "busy", "offline", "draining", "disabled", "conflict")

TASK_COLUMNS = (
    "id", "task_type", "username", "app_id", "start_date", "end_date", "status", "priority", "lane_id", "batch",
    "unique_key", "parent_id", "next_run_at", "give_up_at", "execution_timeout", "max_retry_count", "retry_count",
    "lost_count", "snooze_count", "attempt_count", "required_tags", "pinned_device_id", "prefer_device_id",
    "same_device_as", "prefer_seconds", "avoid_device_id", "assigned_device_id", "assignment_id", "end_reason",
    "error_message", "created_by", "created_at", "started_at", "finished_at", "updated_at",
)  # fmt: skip
ATTEMPT_COLUMNS = (
    "id", "task_id", "device_id", "status", "assigned_at", "delivered_at", "started_at", "completed_at", "deadline_at",
    "duration_seconds", "progress", "progress_message", "error_message", "error_type", "late_outcome", "late_at",
)  # fmt: skip
DEVICE_COLUMNS = (
    "device_id", "device_name", "device_type", "ip_address", "wanted", "wanted_reason", "conflict", "task_types",
    "tags", "weight", "max_concurrent_tasks", "version", "protocol", "last_heartbeat_at", "cpu_usage", "memory_usage",
    "disk_usage", "active_tasks", "system_info", "problem", "clock_skew_seconds", "last_finished_at", "registered_at",
    "consecutive_failures", "completed_count", "failed_count", "lost_count", "total_duration_seconds", "boot_id",
    "given_name",
)  # fmt: skip
TASK_SQL = ", ".join(TASK_COLUMNS)
FAILURE_SQL = (
    "id, (SELECT attempt.error_type FROM af_task_assignment AS attempt"
    " WHERE attempt.id = af_crawl_tasks.assignment_id), error_message"
)
ARTIFACT_COLUMNS = ("artifact_id", "assignment_id", "name", "bytes", "sha256", "created_at")
ARTIFACT_SQL = f"SELECT {', '.join(ARTIFACT_COLUMNS)} FROM af_artifact"
BEAT_COLUMNS = ("heartbeat_at", "cpu_usage", "memory_usage", "disk_usage", "active_tasks")
MINUTE_COLUMNS = ("completed", "failed", "lost", "snoozed", "duration_seconds", "duration_max_seconds")

# The writers' numbers, by hops over the primary key: without them a count by name would read the whole table.
WRITERS = (
    "WITH RECURSIVE writer(id) AS (SELECT min(writer_id) FROM af_count UNION ALL SELECT (SELECT min(writer_id)"
    " FROM af_count WHERE writer_id > writer.id) FROM writer WHERE writer.id IS NOT NULL)"
)


class ReadsBusy(Exception):
    """All read connections were in use for longer than a reader may wait; the caller answers 503."""


@dataclass(frozen=True)
class Counted:
    """A count of tasks; is_capped means "at least": the cap or the time was reached.

    No tuple, because a tuple has a method `count` of its own.
    """

    count: int
    is_capped: bool


class IdPage(NamedTuple):
    """Ids in ascending order; `next_after` goes on from there, None means that all were seen."""

    ids: list[int]
    next_after: int | None


class Reads:
    """A pool of read-only connections to the database file, and the questions."""

    def __init__(self, path: str | os.PathLike[str], connections: int = 4, wait_seconds: float = 2.0):
        self._path = os.fspath(path)
        self._wait_seconds = wait_seconds
        self._is_closed = False
        self.is_storage_at_fault: Callable[[Exception], bool] = lambda error: False
        """Is asked what SQLite meant when it could not read."""
        self._free: queue.LifoQueue[SqliteDatabase] = queue.LifoQueue()
        for _ in range(connections):
            self._free.put(self._new_connection())
        self._all = list(self._free.queue)

    def _new_connection(self) -> SqliteDatabase:
        quoted = self._path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        return SqliteDatabase(
            f"file:{quoted}?mode=ro",
            uri=True,
            thread_safe=False,  # handed from thread to thread by the pool, used by one at a time
            check_same_thread=False,
            timeout=1,
            pragmas=(("query_only", 1), ("cache_size", -8192), ("temp_store", 2), ("mmap_size", 0)),
        )

    def close(self) -> None:
        """Closes every connection that is free; one in use is closed when it comes back."""
        self._is_closed = True
        while True:
            try:
                self._free.get_nowait().close()
            except queue.Empty:
                return

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._is_closed:
            raise ReadsBusy("the database is closing")
        try:
            database = self._free.get(timeout=self._wait_seconds)
        except queue.Empty:
            raise ReadsBusy("all read connections are in use; try again in a second") from None
        try:
            database.connect(reuse_if_open=True)
            yield database.connection()
        except (sqlite3.DatabaseError, DatabaseError) as error:  # peewee has one of its own
            if self.is_storage_at_fault(error):
                raise ReadsBusy("the database cannot be read now") from error
            raise
        finally:
            if self._is_closed:
                database.close()
            else:
                self._free.put(database)

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """All that is read inside is of one moment: a task that changes its state is not met twice, nor missed."""
        with self._connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:  # SQLite ends it by itself after some errors
                    connection.execute("COMMIT")

    def _all_rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Every row at once, so that the cursor is done before the connection goes back."""
        with self._connection() as connection:
            return connection.execute(sql, values).fetchall()

    rows = _all_rows
    """For the questions that have a file of their own."""

    def _one(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        rows = self._all_rows(sql, values)
        return rows[0] if rows else None

    # ------------------------------------------------------------------------------------ tasks

    def task_page(
        self, filters: Mapping[str, Any], *, limit: int = 50, cursor: int | None = None, seconds: float = PAGE_SECONDS
    ) -> dict[str, Any]:
        """{tasks, next_cursor, partial}: newest first, ids below `cursor`; partial means that the time was up."""
        by_state = self._most_of(filters)
        with self._snapshot() as connection:
            search = plan(connection, filters, by_state)
            rows, reached, is_partial = walk_down(
                connection, search, TASK_SQL, below=cursor, limit=limit, seconds=seconds
            )
        next_cursor = None if reached is None else str(reached)
        return {"tasks": [task_row(row) for row in rows], "next_cursor": next_cursor, "partial": is_partial}

    def count(self, filters: Mapping[str, Any], *, cap: int = COUNT_CAP, seconds: float = PAGE_SECONDS) -> Counted:
        """How many tasks match: exact from the kept counters where they answer it, else up to `cap`."""
        exact = self._kept_count(filters)
        if exact is not None:
            return Counted(exact, False)
        by_state = self._most_of(filters)
        with self._snapshot() as connection:
            search = plan(connection, filters, by_state)
            walked = walk_down(connection, search, "id", below=None, limit=cap + 1, seconds=seconds)
        return Counted(min(len(walked.rows), cap), walked.is_partial or len(walked.rows) > cap)

    def ids_matching(
        self, filters: Mapping[str, Any], *, after_id: int = 0, limit: int = 1_000, seconds: float = PAGE_SECONDS
    ) -> IdPage:
        """The next ids that match, oldest first; an empty page with a next_after means that time was up."""
        walked = self._walk_up("id", filters, after_id, limit, seconds)
        return IdPage([row[0] for row in walked.rows], walked.reached)

    def newest_failures(self, batch: str, *, limit: int, seconds: float = PAGE_SECONDS) -> tuple[list[Any], bool]:
        """(id, error_type, error_message) of a batch's failed tasks, newest first; and whether there may be more."""
        by_state = self._most_of({"batch": batch, "status": ("failed",)})
        with self._snapshot() as connection:
            search = plan(connection, {"batch": batch, "status": ("failed",)}, by_state)
            walked = walk_down(connection, search, FAILURE_SQL, below=None, limit=limit, seconds=seconds)
        return walked.rows, walked.reached is not None

    def export(
        self, filters: Mapping[str, Any], *, include_result: bool = False, page: int = 500
    ) -> Iterator[dict[str, Any]]:
        """Every matching task, oldest first. With include_result each has `result`, as JSON text or None.

        No connection is held while a row is out, so a slow reader blocks nobody. It ends at the newest task there was
        when it began: a crawl that goes on submitting must not make its own export endless.
        """
        after: int | None = 0
        last_id = self.highest_id()
        while after is not None:
            walked = self._walk_up(TASK_SQL, filters, after, page if after else min(page, FIRST_ROWS), PAGE_SECONDS)
            tasks = [task_row(row) for row in walked.rows if row[0] <= last_id]
            for first in range(0, len(tasks), RESULTS_AT_ONCE):
                some = tasks[first : first + RESULTS_AT_ONCE]
                results = self._results([task["id"] for task in some]) if include_result else {}
                yield from ({**task, "result": results.get(task["id"])} if include_result else task for task in some)
            after = walked.reached if len(tasks) == len(walked.rows) else None

    def _walk_up(self, columns: str, filters: Mapping[str, Any], after: int, limit: int, seconds: float) -> Walked:
        by_state = self._most_of(filters)
        with self._snapshot() as connection:
            search = plan(connection, filters, by_state)
            return walk_up(connection, search, columns, above=after, limit=limit, seconds=seconds)

    def _results(self, ids: list[int]) -> dict[int, str]:
        marks = ", ".join("?" * len(ids))
        return dict(self._all_rows(f"SELECT task_id, result FROM af_task_result WHERE task_id IN ({marks})", ids))

    def highest_id(self) -> int:
        row = self._one("SELECT max(id) FROM af_crawl_tasks")
        return (row[0] if row else 0) or 0

    def _most_of(self, filters: Mapping[str, Any]) -> dict[str, int]:
        """{state: n}, by the kept counters: no more tasks than these can match. Only for a filter with states."""
        if not filters.get("status"):
            return {}
        found = self.counts_by_state()
        for scope, name in (("batch", filters.get("batch")), ("type", filters.get("task_type"))):
            if name is not None:
                counts = self._counts(scope, [name]).get(name, {})
                found = {state: min(n, counts.get(state, 0)) for state, n in found.items()}
        return found

    def _kept_count(self, filters: Mapping[str, Any]) -> int | None:
        """The count by the kept counters, for a filter of a batch or a type, and states; else None."""
        rest = set(filters) - {"status"}
        if rest - {"batch"} and rest - {"task_type"}:
            return None
        scope = "batch" if "batch" in rest else "type" if "task_type" in rest else "all"
        name = str(filters.get("batch", filters.get("task_type", "")))
        by_state = self._counts(scope, [name]).get(name, {})
        return sum(by_state.get(state, 0) for state in filters.get("status") or STATES)

    def task(self, task_id: int) -> dict[str, Any] | None:
        """A task with task_data, result, its newest attempts (newest first) and children_count (up to 10,000)."""
        row = self._one(f"SELECT {TASK_SQL} FROM af_crawl_tasks WHERE id = ?", (task_id,))
        if row is None:
            return None
        beside = self._one(
            "SELECT (SELECT task_data FROM af_task_payload WHERE task_id = ?1),"
            " (SELECT result FROM af_task_result WHERE task_id = ?1),"
            f" (SELECT count(*) FROM (SELECT 1 FROM af_crawl_tasks WHERE parent_id = ?1 LIMIT {COUNT_CAP}))",
            (task_id,),
        )
        data, result, children_count = beside or (None, None, 0)
        return {
            **task_row(row),
            "task_data": json.loads(data) if data else {},
            "result": None if result is None else json.loads(result),
            "attempts": self.attempts(task_id),
            "children_count": children_count,
        }

    def attempts(self, task_id: int) -> list[dict[str, Any]]:
        """The newest attempts of a task, newest first, with their log tails."""
        columns = (*ATTEMPT_COLUMNS, "log_tail")
        rows = self._all_rows(
            f"SELECT {_columns(columns)} FROM af_task_assignment WHERE task_id = ? ORDER BY id DESC LIMIT ?",
            (task_id, ATTEMPTS_SHOWN),
        )
        return [_moments(dict(zip(columns, row))) for row in rows]

    def artifacts(self, task_id: int) -> list[dict[str, Any]]:
        """The files of all attempts of a task, oldest first."""
        rows = self._all_rows(
            f"{ARTIFACT_SQL} WHERE task_id = ? AND dropped = 0 ORDER BY artifact_id",
            (task_id,),
        )
        return [_moments(dict(zip(ARTIFACT_COLUMNS, row))) for row in rows]

    def artifact(self, task_id: int, artifact_id: int) -> dict[str, Any] | None:
        """One of them, or None."""
        row = self._one(f"{ARTIFACT_SQL} WHERE task_id = ? AND artifact_id = ? AND dropped = 0", (task_id, artifact_id))
        return None if row is None else _moments(dict(zip(ARTIFACT_COLUMNS, row)))

    def dropped_artifacts(self, limit: int) -> list[tuple[Any, ...]]:
        """(artifact_id, task_id, assignment_id, name, sha256) of files whose task was deleted; they are to go."""
        sql = "SELECT artifact_id, task_id, assignment_id, name, sha256 FROM af_artifact WHERE dropped = 1 LIMIT ?"
        return self._all_rows(sql, (limit,))

    def artifacts_of_attempts(self, assignment_ids: Sequence[int]) -> list[tuple[Any, ...]]:
        """(task_id, assignment_id, name, sha256) of every file that has a row."""
        found: list[tuple[Any, ...]] = []
        for first in range(0, len(assignment_ids), 500):
            some = assignment_ids[first : first + 500]
            marks = ", ".join("?" * len(some))
            sql = f"SELECT task_id, assignment_id, name, sha256 FROM af_artifact WHERE assignment_id IN ({marks})"
            found += self._all_rows(sql, some)
        return found

    def oldest_waiting(self, now: float) -> dict[str, Any] | None:
        """The oldest pending task and how long it has been pending; None if none is.

        Of the 100 lanes that were served longest ago: one step of the queue's index for each lane and priority, so it
        costs a millisecond, not a walk. With more lanes an older task may wait elsewhere.
        """
        row = self._one(
            "WITH lane(id) AS (SELECT id FROM af_lane WHERE waiting > 0 ORDER BY last_served, id LIMIT ?),"
            " level(n) AS (VALUES (1), (2), (3), (4), (5), (6), (7), (8), (9), (10)) "
            "SELECT min((SELECT id FROM af_crawl_tasks INDEXED BY task_queue WHERE status = 'pending'"
            " AND lane_id = lane.id AND priority = level.n ORDER BY id LIMIT 1)) FROM lane, level",
            (LANES_LOOKED_AT,),
        )
        if row is None or row[0] is None:
            return None
        found = self._one("SELECT updated_at FROM af_crawl_tasks WHERE id = ? AND status = 'pending'", row)
        return None if found is None else {"task_id": row[0], "waiting_seconds": round(max(now - found[0], 0.0), 3)}

    # ------------------------------------------------------------------------------------ counts and minutes

    def counts_by_state(self) -> dict[str, int]:
        """{state: n} for all tasks, every state named."""
        return _every_state(self._counts("all", [""]).get("", {}))

    def _counts(self, scope: str, names: Sequence[str]) -> dict[str, dict[str, int]]:
        """{name: {state: n}} by the kept counters, for these names."""
        found: dict[str, dict[str, int]] = {}
        for first in range(0, len(names), 500):
            some = names[first : first + 500]
            rows = self._all_rows(
                f"{WRITERS} SELECT name, state, sum(n) FROM writer CROSS JOIN af_count ON writer_id = writer.id"
                f" WHERE scope = ? AND name IN ({', '.join('?' * len(some))}) GROUP BY name, state",
                (scope, *some),
            )
            for name, state, n in rows:
                found.setdefault(name, {})[state] = n
        return found

    def _counts_of_types(self, limit: int = 1_000) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        rows = self._all_rows(
            f"{WRITERS} SELECT name, state, sum(n) FROM writer CROSS JOIN af_count ON writer_id = writer.id"
            " WHERE scope = 'type' GROUP BY name, state HAVING sum(n) > 0 LIMIT ?",
            (limit * len(STATES),),
        )
        for name, state, n in rows:
            found.setdefault(name, {})[state] = n
        return found

    def minutes(self, scope: str, name: str, now: float, count: int = 60) -> list[dict[str, Any]]:
        """The last `count` minutes, oldest first, this one last; a minute without work is all zeros."""
        this = int(now) // 60 * 60
        wanted = [this - 60 * ago for ago in range(count - 1, -1, -1)]
        rows = self._all_rows(
            f"SELECT minute_at, {_columns(MINUTE_COLUMNS)} FROM af_minute WHERE scope = ? AND name = ?"
            f" AND minute_at IN ({', '.join('?' * count)})",
            (scope, name, *wanted),
        )
        known = {row[0]: dict(zip(MINUTE_COLUMNS, row[1:])) for row in rows}
        nothing = dict.fromkeys(MINUTE_COLUMNS, 0)
        return [{"minute": iso(minute), **known.get(minute, nothing)} for minute in wanted]

    def rates(self, now: float) -> dict[str, int]:
        """What ended in the last full minute and in the last hour."""
        hour = self.minutes("all", "", now, 61)
        last, whole = hour[-2], hour[1:]
        return {
            "completed_last_minute": last["completed"],
            "failed_last_minute": last["failed"],
            "completed_last_hour": sum(minute["completed"] for minute in whole),
            "failed_last_hour": sum(minute["failed"] for minute in whole),
        }

    def overview(self, now: float, device_timeout: float) -> dict[str, Any]:
        """tasks, devices, rates, oldest_waiting (without its reason) and database_bytes of GET /system/overview."""
        return {
            "tasks": self.counts_by_state(),
            "devices": self.devices_by_status(now, device_timeout),
            "rates": self.rates(now),
            "oldest_waiting": self.oldest_waiting(now),
            "database_bytes": self.database_bytes(),
        }

    def tasks_stats(self, now: float, *, batch: str | None = None, task_type: str | None = None) -> dict[str, Any]:
        """by_state, by_type, by_batch (newest 50), by_device and last_hour; `batch` or `task_type` narrows it.

        Minutes are kept for all, types and devices: with a batch, last_hour is empty.
        """
        by_type = self._counts_of_types() if task_type is None else self._counts("type", [task_type])
        batches = self.batches(limit=50)["batches"] if batch is None else list(filter(None, [self.batch(batch)]))
        if batch is not None:
            by_state = _every_state(self._counts("batch", [batch]).get(batch, {}))
        elif task_type is not None:
            by_state = _every_state(by_type.get(task_type, {}))
        else:
            by_state = self.counts_by_state()
        scope = ("type", task_type) if task_type is not None else ("all", "")
        return {
            "by_state": by_state,
            "by_type": by_type,
            "by_batch": {entry["name"]: entry["counts"] for entry in batches},
            "by_device": self._counts_by_device(),
            "last_hour": [] if batch is not None else self.minutes(*scope, now),
        }

    def _counts_by_device(self) -> dict[str, dict[str, int]]:
        held = self.assigned_counts()
        rows = self._all_rows("SELECT device_id, completed_count, failed_count, lost_count FROM af_device")
        return {
            device_id: {"assigned": held.get(device_id, 0), "completed": completed, "failed": failed, "lost": lost}
            for device_id, completed, failed, lost in rows
        }

    def attempt_totals(self) -> dict[str, int]:
        """{completed, failed, lost}: attempts of all devices that are registered, since each was."""
        sql = "SELECT sum(completed_count), sum(failed_count), sum(lost_count) FROM af_device"
        row = self._one(sql) or (0, 0, 0)
        return {name: n or 0 for name, n in zip(("completed", "failed", "lost"), row)}

    def database_bytes(self) -> int:
        """The size of the database file and its log on the disk."""
        total = 0
        for suffix in ("", "-wal"):
            try:
                total += Path(self._path + suffix).stat().st_size
            except OSError:  # no log file while nothing is open for writing
                continue
        return total

    # ------------------------------------------------------------------------------------ batches

    def batches(self, *, limit: int = 50, cursor: int | None = None) -> dict[str, Any]:
        """{batches, next_cursor}: newest first, each with its counts by state."""
        rows = self._all_rows(
            "SELECT rowid, name, state, reason, created_at FROM af_batch WHERE rowid < ? ORDER BY rowid DESC LIMIT ?",
            (2**63 - 1 if cursor is None else cursor, limit),
        )
        counts = self._counts("batch", [row[1] for row in rows])
        more = str(rows[-1][0]) if len(rows) == limit else None
        return {"batches": [_batch_row(row[1:], counts) for row in rows], "next_cursor": more}

    def batch(self, name: str) -> dict[str, Any] | None:
        """One batch with its counts, or None."""
        row = self._one("SELECT name, state, reason, created_at FROM af_batch WHERE name = ?", (name,))
        return None if row is None else _batch_row(row, self._counts("batch", [name]))

    # ------------------------------------------------------------------------------------ devices

    def devices(
        self, now: float, device_timeout: float, *, status: str | None = None, task_type: str | None = None,
        tag: str | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Every device, by id, with its derived status and how many tasks it holds."""
        held = self.assigned_counts()
        rows = self._all_rows(f"SELECT {_columns(DEVICE_COLUMNS)} FROM af_device ORDER BY device_id")
        found = (device_row(row, held.get(row[0], 0), now, device_timeout) for row in rows)
        return [
            device
            for device in found
            if status in (None, device["status"])
            and (task_type is None or task_type in device["task_types"])
            and (tag is None or tag in device["tags"])
        ]

    def device(self, device_id: str, now: float, device_timeout: float) -> dict[str, Any] | None:
        """One device, as in the list, or None."""
        row = self._one(f"SELECT {_columns(DEVICE_COLUMNS)} FROM af_device WHERE device_id = ?", (device_id,))
        if row is None:
            return None
        held = self._one(
            "SELECT count(*) FROM af_task_assignment INDEXED BY attempt_holder"
            f" WHERE device_id = ? AND status IN ({ACTIVE_SQL})",
            (device_id,),
        )
        return device_row(row, held[0] if held else 0, now, device_timeout)

    def devices_by_status(self, now: float, device_timeout: float) -> dict[str, int]:
        """{status: n}, every status named."""
        held = self.assigned_counts()
        found = dict.fromkeys(DEVICE_STATES, 0)
        sql = "SELECT device_id, wanted, conflict, last_heartbeat_at, max_concurrent_tasks, boot_id FROM af_device"
        for device_id, wanted, conflict, seen_at, slots, boot_id in self._all_rows(sql):
            silent = None if seen_at is None or boot_id is None else now - seen_at
            found[device_status(wanted, conflict, silent, held.get(device_id, 0), slots, device_timeout)] += 1
        return found

    def assigned_counts(self) -> dict[str, int]:
        """{device_id: n} of the tasks that are assigned to it or run on it; devices without any are left out."""
        return dict(
            self._all_rows(
                "SELECT device_id, count(*) FROM af_task_assignment INDEXED BY attempt_holder"
                f" WHERE status IN ({ACTIVE_SQL}) GROUP BY device_id"
            )
        )

    def device_stats(self, device_id: str, now: float, device_timeout: float) -> dict[str, Any] | None:
        """Totals, rates, the last hour by minute, recent failures and heartbeats."""
        device = self.device(device_id, now, device_timeout)
        if device is None:
            return None
        completed, failed, lost = (device[f"{name}_count"] for name in ("completed", "failed", "lost"))
        ended = completed + failed + lost
        total_seconds = device["total_duration_seconds"]
        return {
            "device_id": device_id,
            "status": device["status"],
            "totals": {
                "completed": completed, "failed": failed, "lost": lost, "assigned": device["assigned_count"],
                "duration_seconds": total_seconds,
            },
            "success_rate": round(completed / ended, 4) if ended else None,
            "average_duration_seconds": round(total_seconds / completed, 3) if completed else None,
            "last_hour": self.minutes("device", device_id, now),
            "recent_failures": self._recent_failures(device_id),
            "heartbeats": self._heartbeats(device_id),
        }  # fmt: skip

    def _recent_failures(self, device_id: str) -> list[dict[str, Any]]:
        rows = self._all_rows(
            f"SELECT {_columns(ATTEMPT_COLUMNS)} FROM af_task_assignment INDEXED BY attempt_failed"
            " WHERE device_id = ? AND (status = 'failed' OR status = 'timeout') ORDER BY id DESC LIMIT 20",
            (device_id,),
        )
        return [_moments(dict(zip(ATTEMPT_COLUMNS, row))) for row in rows]

    def _heartbeats(self, device_id: str) -> list[dict[str, Any]]:
        rows = self._all_rows(
            f"SELECT {_columns(BEAT_COLUMNS)} FROM af_device_heartbeat WHERE device_id = ?"
            " ORDER BY heartbeat_at DESC LIMIT 120",
            (device_id,),
        )
        return [_moments(dict(zip(BEAT_COLUMNS, row))) for row in reversed(rows)]


# ---------------------------------------------------------------------------------------- rows and SQL


def device_status(
    wanted: str, conflict: bool, silent_seconds: float | None, assigned_count: int, slots: int, device_timeout: float
) -> str:
    """The status that people see: what was decided about a device comes before what it does."""
    if wanted == "disabled":
        return "disabled"
    if conflict:
        return "conflict"
    if silent_seconds is None or silent_seconds >= device_timeout:
        return "offline"
    if wanted == "draining":
        return "draining"
    return "busy" if assigned_count >= slots else "online"


def iso(epoch_seconds: float | None) -> str | None:
    """Epoch seconds as "2026-11-25T13:59:07.123Z"."""
    if epoch_seconds is None:
        return None
    return datetime.fromtimestamp(epoch_seconds, timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


def task_row(row: Sequence[Any]) -> dict[str, Any]:
    """A row of TASK_COLUMNS as JSON has it."""
    task = _moments(dict(zip(TASK_COLUMNS, row)))
    task["batch"] = task["batch"] or None
    task["required_tags"] = json.loads(task["required_tags"])
    task["execution_timeout_seconds"] = task.pop("execution_timeout")
    return task


def device_row(row: Sequence[Any], assigned_count: int, now: float, device_timeout: float) -> dict[str, Any]:
    """A row of DEVICE_COLUMNS as JSON has it, with its derived status."""
    device = dict(zip(DEVICE_COLUMNS, row))
    seen_at, conflict = device["last_heartbeat_at"], device.pop("conflict")
    silent = None if seen_at is None else now - seen_at
    said_goodbye = device.pop("boot_id") is None
    status = device_status(
        device["wanted"], conflict, None if said_goodbye else silent, assigned_count, device["max_concurrent_tasks"],
        device_timeout,
    )  # fmt: skip
    device["device_name"] = device.pop("given_name") or device["device_name"]
    for name in ("task_types", "tags", "system_info"):
        device[name] = json.loads(device[name]) if device[name] else None
    one_at_a_time = device["consecutive_failures"] >= FAILURES_TO_PROBATION
    # What the device says of itself comes first: without its spool it takes no task at all.
    if device["problem"] is None and one_at_a_time:
        device["problem"] = "failing"
    return {
        **_moments(device),
        "status": status,
        "has_stopped": said_goodbye,
        "one_at_a_time": one_at_a_time,
        "assigned_count": assigned_count,
        "seconds_since_heartbeat": None if silent is None else round(max(silent, 0.0), 3),
    }


def _batch_row(row: Sequence[Any], counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    name, state, reason, created_at = row
    by_state = _every_state(counts.get(name, {}))
    return {"name": name, "state": state, "reason": reason, "created_at": iso(created_at), "counts": by_state}


def _moments(row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        if name.endswith("_at"):
            row[name] = iso(value)
    return row


def _every_state(counts: Mapping[str, int]) -> dict[str, int]:
    return {state: counts.get(state, 0) for state in STATES}


def _columns(names: Sequence[str]) -> str:
    return ", ".join(names)
