"""What has this transaction changed so far, beside the rows themselves?

A verb runs as one job of the writer and is handed a Tx: its connection, its moments, its policy. The verb moves rows;
the Tx adds up what follows from that (kept counters, lane lengths, minute roll-ups) and writes it once, at the end of
the job, in the same savepoint. What it noted is told to the log and the event stream after the commit.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WRITER_ID = 1
"""Each writer keeps counters of its own, summed on read; today there is one."""
MINUTE_FIELDS = ("completed", "failed", "lost", "snoozed")


@dataclass(frozen=True)
class Policy:
    """What a task gets when its submitter does not say (seconds, except the count)."""

    task_timeout: int = 3600
    max_retry_count: int = 3
    retry_backoff_seconds: float = 15.0
    give_up_seconds: float = 7 * 86400.0


class Note(NamedTuple):
    """One thing that happened, told to the log and the event stream once it is durable."""

    kind: str
    verb: str
    facts: dict[str, Any]


@dataclass
class Tx:
    """One job of the writer's transaction: its connection and moments, and what it has changed so far.

    `now` is steady (boot clock) and serves every comparison of ages; `wall` serves next_run_at only.
    """

    connection: sqlite3.Connection
    now: float
    wall: float
    policy: Policy = field(default_factory=Policy)
    rng: random.Random = field(default_factory=random.Random)
    notes: list[Note] = field(default_factory=list)
    _counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _lanes: Counter[int] = field(default_factory=Counter)
    _minutes: defaultdict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 6))
    wants_dispatch: bool = False

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, parameters)

    def one(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row, or None."""
        return self.connection.execute(sql, parameters).fetchone()

    def note(self, kind: str, verb: str, **facts: Any) -> None:
        self.notes.append(Note(kind, verb, facts))

    def count(self, task_type: str, batch: str, state: str, change: int) -> None:
        """Moves the kept counters of af_count: all, this type, this batch."""
        self._counts["all", "", state] += change
        self._counts["type", task_type, state] += change
        if batch:
            self._counts["batch", batch, state] += change

    def count_lane(self, lane_id: int, change: int) -> None:
        self._lanes[lane_id] += change

    def count_minute(self, task_type: str, device_id: str | None, what: str, duration_seconds: float = 0.0) -> None:
        """Adds one `completed`, `failed`, `lost` or `snoozed` attempt to this minute's roll-up."""
        for key in (("all", ""), ("type", task_type), ("device", device_id or "")):
            cell = self._minutes[key]
            cell[MINUTE_FIELDS.index(what)] += 1
            cell[4] += duration_seconds
            cell[5] = max(cell[5], duration_seconds)

    def flush(self) -> None:
        """Writes the counters that this job moved; called once, at its end."""
        self.connection.executemany(
            "INSERT INTO af_count (writer_id, scope, name, state, n) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (writer_id, scope, name, state) DO UPDATE SET n = n + excluded.n",
            [(WRITER_ID, *key, change) for key, change in self._counts.items() if change],
        )
        self.connection.executemany(
            "UPDATE af_lane SET waiting = waiting + ?, top_priority = (SELECT priority FROM af_crawl_tasks"
            " WHERE lane_id = af_lane.id AND status = 'pending' ORDER BY priority DESC, id LIMIT 1) WHERE id = ?",
            [(change, lane_id) for lane_id, change in self._lanes.items()],
        )
        minute = int(self.now) // 60 * 60
        self.connection.executemany(
            "INSERT INTO af_minute (minute_at, scope, name, completed, failed, lost, snoozed, duration_seconds,"
            " duration_max_seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (minute_at, scope, name) DO UPDATE"
            " SET completed = completed + excluded.completed, failed = failed + excluded.failed, lost = lost +"
            " excluded.lost, snoozed = snoozed + excluded.snoozed, duration_seconds = duration_seconds +"
            " excluded.duration_seconds, duration_max_seconds ="
            " max(duration_max_seconds, excluded.duration_max_seconds)",
            [(minute, *key, *cell) for key, cell in self._minutes.items()],
        )
        if any(change > 0 for change in self._lanes.values()):
            self.wants_dispatch = True
        self._counts.clear()
        self._lanes.clear()
        self._minutes.clear()
