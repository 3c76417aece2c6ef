"""In which lane does a task wait, and what may hold a lane back?

A lane is what waiting tasks share that decides where and when they may go: type, tags, devices, batch, and their value
for the key of each limit that they stand under. So what holds tasks back is a property of a few lanes, never of a
million tasks, and accounts or hosts take turns because lanes do.

A lane is made for the limits of its day (`shape`). When they change, lanes of another shape are stale: nothing leaves
them, and their tasks move to new lanes, a chunk at a time. What runs then is moved at once, so that no new limit can be
overrun while that lasts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import limits
from limits import Keyed, Limit
from schema import ACTIVE
from transaction import Tx

PREFER_SECONDS = 30.0
"""So long a task waits for the device that it prefers, unless it says otherwise."""
CHUNK = 1000
STALE_LANES_A_CHUNK = 100
ATTEMPTS_COUNTED = 50_000
"""A new limit counts what was started before it among so many of the newest attempts."""


class Placed(Keyed, Protocol):
    """What decides where a task waits: a new task, or one of the table."""

    @property
    def required_tags(self) -> tuple[str, ...]: ...
    @property
    def pinned_device_id(self) -> str | None: ...
    @property
    def prefer_device_id(self) -> str | None: ...
    @property
    def same_device_as(self) -> str | None: ...
    @property
    def prefer_seconds(self) -> float | None: ...
    @property
    def batch(self) -> str: ...


class Stored(NamedTuple):
    """A task of the table, as far as its lane depends on it; task_data is JSON text."""

    id: int
    status: str
    lane_id: int
    task_type: str
    batch: str
    tags_text: str
    pinned_device_id: str | None
    prefer_device_id: str | None
    same_device_as: str | None
    prefer_seconds: float | None
    username: str | None
    app_id: str | None
    start_date: str | None
    end_date: str | None
    task_data: str

    @property
    def required_tags(self) -> tuple[str, ...]:
        return tuple(json.loads(self.tags_text))


_STORED = (
    "task.id, task.status, task.lane_id, task.task_type, task.batch, task.required_tags, task.pinned_device_id,"
    " task.prefer_device_id, task.same_device_as, task.prefer_seconds, task.username, task.app_id, task.start_date,"
    " task.end_date, COALESCE(payload.task_data, '{}')"
)
_PAYLOAD = "LEFT JOIN af_task_payload AS payload ON payload.task_id = task.id"
_PLACE = (
    "task_type", "batch", "limit_keys", "shape", "required_tags", "pinned_device_id", "prefer_device_id",
    "same_device_as", "prefer_seconds",
)  # fmt: skip
_FIND = f"SELECT id FROM af_lane WHERE {' AND '.join(f'{name} = ?' for name in _PLACE)}"


class Lanes:
    """The lanes as one transaction meets them: the limits are read once, and a lane is looked up once."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self._limits = limits.read_limits(tx)
        self._of_type: dict[str, tuple[str, list[Limit]]] = {}
        self._ids: dict[tuple[Any, ...], int] = {}

    def of_type(self, task_type: str) -> tuple[str, list[Limit]]:
        """The shape of lanes of this type now, and the limits that make it."""
        found = self._of_type.get(task_type)
        if found is None:
            mine = limits.limits_of(self._limits, task_type)
            found = self._of_type[task_type] = ",".join(str(limit.id) for limit in mine), mine
        return found

    def find(self, task: Placed) -> int:
        """The lane of this task; made when the first one comes."""
        shape, mine = self.of_type(task.task_type)
        values = limits.values_of(mine, task) if mine else ()
        place = (
            task.task_type, task.batch, values, shape, task.required_tags, task.pinned_device_id,
            task.prefer_device_id, task.same_device_as, task.prefer_seconds,
        )  # fmt: skip
        lane_id = self._ids.get(place)
        if lane_id is None:
            lane_id = self._ids[place] = self._look_up(task, shape, mine, values)
        return lane_id

    def _look_up(self, task: Placed, shape: str, mine: Sequence[Limit], values: Sequence[str | None]) -> int:
        prefers = task.prefer_device_id or task.same_device_as
        seconds = PREFER_SECONDS if task.prefer_seconds is None else task.prefer_seconds
        row = (
            task.task_type, task.batch, json.dumps(values, ensure_ascii=False), shape,
            json.dumps(sorted(task.required_tags)), task.pinned_device_id or "", task.prefer_device_id or "",
            task.same_device_as or "", seconds if prefers else 0.0,
        )  # fmt: skip
        found = self._tx.one(_FIND, row)
        return int(found[0]) if found else self._make(row, mine, values)

    def _make(self, row: tuple[Any, ...], mine: Sequence[Limit], values: Sequence[str | None]) -> int:
        lane_id = self._tx.execute(
            f"INSERT INTO af_lane ({', '.join(_PLACE)}, is_held) VALUES ({', '.join('?' * len(row))},"
            " COALESCE((SELECT state <> 'open' FROM af_batch WHERE name = ?), 0))",
            (*row, row[1]),
        ).lastrowid
        assert lane_id is not None
        for limit, value in zip(mine, values, strict=True):
            if value is not None:
                key = limits.key_id(self._tx, limit, value)
                self._tx.execute("INSERT INTO af_lane_key (lane_id, key_id) VALUES (?, ?)", (lane_id, key))
        return lane_id

    def move(self, tasks: Iterable[Stored]) -> set[int]:
        """Puts tasks where they belong now, in the books too; the lanes that they came to."""
        targets = set()
        for task in tasks:
            lane_id = self.find(task)
            if lane_id != task.lane_id:
                self._tx.execute("UPDATE af_crawl_tasks SET lane_id = ? WHERE id = ?", (lane_id, task.id))
                self._tx.count_lane(task.lane_id, task.status, None)
                self._tx.count_lane(lane_id, None, task.status)
                targets.add(lane_id)
        return targets


def bring_into_place(tx: Tx, task_id: int) -> None:
    """One task goes to the lane that it belongs to now: it was pinned, or comes back after a long time."""
    Lanes(tx).move(_read(tx, f"FROM af_crawl_tasks AS task {_PAYLOAD} WHERE task.id = ?", (task_id,)))


def _read(tx: Tx, where: str, values: Sequence[Any]) -> list[Stored]:
    return [Stored(*row) for row in tx.execute(f"SELECT {_STORED} {where}", values).fetchall()]


# -- when limits change --------------------------------------------------------------------------------------------


def set_limits(tx: Tx, wanted: Sequence[Limit], by: str) -> None:
    """These limits and no others hold from this transaction on; waiting tasks follow by `reshape`.

    What runs is counted for the new limits here and now, and so is what was started before.
    """
    uncounted = limits.store_limits(tx, wanted)
    _mark_stale(tx)
    running = (
        "FROM af_task_assignment AS attempt INDEXED BY attempt_holder"
        " JOIN af_crawl_tasks AS task ON task.id = attempt.task_id"
        f" JOIN af_lane AS lane ON lane.id = task.lane_id {_PAYLOAD}"
        f" WHERE attempt.status IN ({ACTIVE}) AND lane.is_stale = 1"
    )
    Lanes(tx).move(_read(tx, running, ()))
    tx.flush_lanes()
    for limit in uncounted:
        limits.recount_starts(tx, limit, _started(tx))
    tx.note("system", "limits", names=", ".join(limit.name for limit in wanted), by=by)
    tx.wants_dispatch = True


def _mark_stale(tx: Tx) -> None:
    now = Lanes(tx)
    for task_type, shape in tx.execute("SELECT DISTINCT task_type, shape FROM af_lane").fetchall():
        is_stale = now.of_type(task_type)[0] != shape
        tx.execute(
            "UPDATE af_lane SET is_stale = ? WHERE task_type = ? AND shape = ? AND is_stale <> ?",
            (is_stale, task_type, shape, is_stale),
        )


def _started(tx: Tx) -> Iterator[tuple[float, Stored]]:
    """(when by the clock of now, task) of the newest attempts, newest first."""
    jumps = limits.clock_jumps(tx)
    rows = tx.execute(
        f"SELECT attempt.id, attempt.assigned_at, {_STORED} FROM af_task_assignment AS attempt"
        f" JOIN af_crawl_tasks AS task ON task.id = attempt.task_id {_PAYLOAD} ORDER BY attempt.id DESC LIMIT ?",
        (ATTEMPTS_COUNTED,),
    )
    for attempt_id, at, *row in rows:
        yield at + sum(seconds for last, seconds in jumps if attempt_id <= last), Stored(*row)


def reshape(tx: Tx, count: int = CHUNK) -> bool:
    """Moves at most `count` waiting tasks out of stale lanes, the most urgent of each first; True if more are left.

    A pause moves along: nothing that a person held back gets away because limits changed.
    """
    now = Lanes(tx)
    left = count
    stale = "SELECT id, paused, paused_reason FROM af_lane WHERE is_stale = 1 AND waiting > 0 ORDER BY id LIMIT ?"
    for lane_id, paused, reason in tx.execute(stale, (STALE_LANES_A_CHUNK,)).fetchall():
        tasks = _read(
            tx,
            f"FROM af_crawl_tasks AS task {_PAYLOAD} WHERE task.lane_id = ? AND task.status = 'pending'"
            " ORDER BY task.priority DESC, task.id LIMIT ?",
            (lane_id, left),
        )
        targets = now.move(tasks)
        if paused:
            sql = "UPDATE af_lane SET paused = 1, paused_reason = ? WHERE id = ?"
            tx.connection.executemany(sql, [(reason, target) for target in targets])
        left -= len(tasks)
        if left <= 0:
            break
    tx.flush_lanes()
    return tx.one("SELECT 1 FROM af_lane WHERE is_stale = 1 AND waiting > 0 LIMIT 1") is not None


# -- what a person holds back --------------------------------------------------------------------------------------


def pause_lane(tx: Tx, lane_id: int, reason: str | None) -> bool:
    """Nothing leaves this lane until it is resumed. False: there is no such lane."""
    return _set_lane(tx, lane_id, True, reason)


def resume_lane(tx: Tx, lane_id: int) -> bool:
    """The lane goes on where it was. False: there is no such lane."""
    return _set_lane(tx, lane_id, False, None)


def _set_lane(tx: Tx, lane_id: int, paused: bool, reason: str | None) -> bool:
    sql = "UPDATE af_lane SET paused = ?, paused_reason = ? WHERE id = ?"
    if not tx.execute(sql, (paused, reason, lane_id)).rowcount:
        return False
    tx.note("system", "lane_paused" if paused else "lane_resumed", lane=lane_id, reason=reason)
    tx.wants_dispatch = True
    return True


def pause(tx: Tx, scope: str, name: str, reason: str | None) -> None:
    """Nothing is sent of `all` (name ""), or of one task `type`, until it is resumed; what runs, runs on."""
    sql = "INSERT OR REPLACE INTO af_pause (scope, name, reason, paused_at) VALUES (?, ?, ?, ?)"
    tx.execute(sql, (scope, name, reason, tx.now))
    tx.note("system", "paused", scope=scope, name=name, reason=reason)


def resume(tx: Tx, scope: str, name: str) -> bool:
    """False: it was not paused."""
    was_paused = tx.execute("DELETE FROM af_pause WHERE scope = ? AND name = ?", (scope, name)).rowcount > 0
    if was_paused:
        tx.note("system", "resumed", scope=scope, name=name)
        tx.wants_dispatch = True
    return was_paused


# -- what is over --------------------------------------------------------------------------------------------------


def forget_idle_lanes(tx: Tx, count: int) -> None:
    """Lanes in which nothing waits, runs or is due; the next task makes its lane anew."""
    idle = "SELECT id FROM af_lane WHERE unfinished = 0 AND paused = 0 LIMIT ?"
    ids = tx.execute(idle, (count,)).fetchall()
    tx.connection.executemany("DELETE FROM af_lane_key WHERE lane_id = ?", ids)
    tx.connection.executemany("DELETE FROM af_lane WHERE id = ?", ids)


def forget_affinities(tx: Tx, served_before: float, count: int) -> None:
    """Which device served a same_device_as last, where that was long ago."""
    old = "SELECT name FROM af_affinity WHERE served_at < ? LIMIT ?"
    tx.execute(f"DELETE FROM af_affinity WHERE name IN ({old})", (served_before, count))


# -- the config ----------------------------------------------------------------------------------------------------


def apply_config(tx: Tx, wanted: Sequence[Limit]) -> None:
    """The limits of the config file hold when they are new to this database; else what the API set later goes on."""
    text = json.dumps(wanted)
    row = tx.one("SELECT value FROM af_meta WHERE key = 'configured_limits'")
    if row is None or row[0] != text:
        set_limits(tx, wanted, "the config")
        tx.execute("INSERT OR REPLACE INTO af_meta (key, value) VALUES ('configured_limits', ?)", (text,))
