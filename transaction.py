"""What has this transaction changed so far, beside the rows themselves?

A verb runs as one job of the writer and is handed a Tx: its connection, its moments, its policy. The verb moves rows;
the Tx adds up what follows from that (kept counters, lane lengths, minute roll-ups) and writes it once, at the end of
the job, in the same savepoint. What it noted is told to the log and the event stream after the commit.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WRITER_ID = 1
"""Each writer keeps counters of its own, summed on read; today there is one."""
NOTED_ALONE = 20
"""More tasks than this that change alike are told in one note, one line of the log and one event."""
MINUTE_FIELDS = ("completed", "failed", "lost", "snoozed")
#            what one task adds to: waiting, active, unfinished
LANE_PARTS = {
    None: (0, 0, 0),
    "scheduled": (0, 0, 1),
    "pending": (1, 0, 1),
    "assigned": (0, 1, 1),
    "running": (0, 1, 1),
    "completed": (0, 0, 0),
    "failed": (0, 0, 0),
    "cancelled": (0, 0, 0),
}
LANE_CHANGES = {
    (old, new): tuple(after - before for before, after in zip(LANE_PARTS[old], LANE_PARTS[new], strict=True))
    for old in LANE_PARTS
    for new in LANE_PARTS
}


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


@dataclass(slots=True)
class LaneChange:
    """What one job did to a lane's numbers."""

    waiting: int = 0
    active: int = 0
    unfinished: int = 0
    is_queue_touched: bool = False
    last_served: int | None = None


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
    _lanes: defaultdict[int, LaneChange] = field(default_factory=lambda: defaultdict(LaneChange))
    _minutes: defaultdict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 6))
    wants_dispatch: bool = False

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, parameters)

    def one(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """The first row, or None."""
        return self.connection.execute(sql, parameters).fetchone()

    def note(self, kind: str, verb: str, **facts: Any) -> None:
        self.notes.append(Note(kind, verb, facts))

    def note_tasks(self, verb: str, attempts: Mapping[int, int], **facts: Any) -> None:
        """A note for each of these tasks (with the number of its attempt); one for all where they are many."""
        if len(attempts) > NOTED_ALONE:
            self.note("task", verb, count=len(attempts), first_task=min(attempts), last_task=max(attempts), **facts)
            return
        for task_id, attempt in attempts.items():
            self.note("task", verb, task=task_id, attempt=attempt, **facts)

    def count(self, task_type: str, batch: str, state: str, change: int) -> None:
        """Moves the kept counters of af_count: all, this type, this batch."""
        self._counts["all", "", state] += change
        self._counts["type", task_type, state] += change
        if batch:
            self._counts["batch", batch, state] += change

    def count_lane(self, lane_id: int, old_state: str | None, new_state: str | None, n: int = 1) -> None:
        """Moves the books of a lane and of its limits' keys: tasks changed state there, came (from None), left."""
        waiting, active, unfinished = LANE_CHANGES[old_state, new_state]
        lane = self._lanes[lane_id]
        lane.waiting += n * waiting
        lane.active += n * active
        lane.unfinished += n * unfinished
        if waiting:
            lane.is_queue_touched = True

    def serve_lane(self, lane_id: int, turn: int) -> None:
        """The lane had its turn: lanes with smaller numbers come before it."""
        self._lanes[lane_id].last_served = turn

    def count_minute(self, task_type: str, device_id: str | None, what: str, *durations_seconds: float) -> None:
        """Adds `completed`, `failed`, `lost` or `snoozed` attempts, one for each duration, to this minute's roll-up."""
        for key in (("all", ""), ("type", task_type), ("device", device_id or "")):
            cell = self._minutes[key]
            cell[MINUTE_FIELDS.index(what)] += len(durations_seconds)
            cell[4] += sum(durations_seconds)
            cell[5] = max(cell[5], *durations_seconds)

    def flush(self) -> None:
        """Writes the counters that this job moved; called once, at its end."""
        self._write(
            "INSERT INTO af_count (writer_id, scope, name, state, n) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (writer_id, scope, name, state) DO UPDATE SET n = n + excluded.n",
            [(WRITER_ID, *key, change) for key, change in self._counts.items() if change],
        )
        self.flush_lanes()
        for (scope, name, state), change in self._counts.items():
            if scope == "batch" and change > 0 and state in MINUTE_FIELDS:
                self._minutes[scope, name][MINUTE_FIELDS.index(state)] += change  # its tasks that ended, by result
        minute = int(self.now) // 60 * 60
        self._write(
            "INSERT INTO af_minute (minute_at, scope, name, completed, failed, lost, snoozed, duration_seconds,"
            " duration_max_seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (minute_at, scope, name) DO UPDATE"
            " SET completed = completed + excluded.completed, failed = failed + excluded.failed, lost = lost +"
            " excluded.lost, snoozed = snoozed + excluded.snoozed, duration_seconds = duration_seconds +"
            " excluded.duration_seconds, duration_max_seconds ="
            " max(duration_max_seconds, excluded.duration_max_seconds)",
            [(minute, *key, *cell) for key, cell in self._minutes.items()],
        )
        self._counts.clear()
        self._minutes.clear()

    def flush_lanes(self) -> None:
        """Lane lengths; how many tasks of a key run; and whether somebody may go now that one has ended."""
        if not self._lanes:
            return
        lanes = list(self._lanes.items())
        self._lanes.clear()
        self._write(
            "UPDATE af_lane SET waiting = waiting + ?, unfinished = unfinished + ?, last_served ="
            " COALESCE(?, last_served), top_priority = (SELECT priority FROM af_crawl_tasks"
            " WHERE lane_id = af_lane.id AND status = 'pending' ORDER BY priority DESC, id LIMIT 1) WHERE id = ?",
            [
                (lane.waiting, lane.unfinished, lane.last_served, lane_id)
                for lane_id, lane in lanes
                if lane.is_queue_touched
            ],
        )
        self._write(
            "UPDATE af_lane SET unfinished = unfinished + ? WHERE id = ?",
            [(lane.unfinished, lane_id) for lane_id, lane in lanes if lane.unfinished and not lane.is_queue_touched],
        )
        has_freed = self._count_running(lanes)
        if has_freed or any(lane.waiting > 0 for _, lane in lanes):
            self.wants_dispatch = True

    def _count_running(self, lanes: list[tuple[int, LaneChange]]) -> bool:
        """How many run of each key; True if one that was full has room now."""
        keys = "(SELECT key_id FROM af_lane_key WHERE lane_id = ?)"
        counted = self._write(
            f"UPDATE af_limit_key SET running = running + ? WHERE id IN {keys}",
            [(lane.active, lane_id) for lane_id, lane in lanes if lane.active],
        )
        if not counted:
            return False
        freed = self._write(
            f"UPDATE af_limit_key SET look_at = 0 WHERE is_full = 1 AND id IN {keys}",
            [(lane_id,) for lane_id, lane in lanes if lane.active < 0],
        )
        return freed > 0

    def _write(self, sql: str, rows: list[tuple[Any, ...]]) -> int:
        """One statement for each row; how many rows of the table it changed. Most jobs have nothing to write here."""
        return self.connection.executemany(sql, rows).rowcount if rows else 0
