"""How many of which tasks may run at once, and when may the next start?

A limit names a task type (a pattern), a key (the fields that are counted together: each account, each host) and any of
max_running, max_starts per window, max_starts per UTC day. Each value of its key is a row of af_limit_key, which says
how many of its tasks run; what was started is counted in af_limit_start, in the transaction that assigns. So limits
hold for all devices together and over a restart, and nothing of this is kept in memory.

A key without room closes the lanes that stand under it, and says when to look again: at a moment, or when one of its
tasks ends. A closed lane is not looked at until then, however many tasks wait in it.

  window   counted in fiftieths, each as if all of it had started at its latest moment: never too many in any window,
           and at most a fiftieth too slow
  day      by both clocks, the one on the wall and the steady one, and both must have room: a clock that is set opens
           no second helping

Which task waits in which lane is a matter of lanes.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from transaction import Tx

FIELDS = ("username", "app_id", "batch", "start_date", "end_date")
DATA_PREFIX = "task_data."
LONGEST_VALUE = 200
DAY_SECONDS = 86400.0
WINDOW_PIECES = 50
DAYS_KEPT = 8.0
REOPENED_LANES, REOPENED_KEYS = 50, 200
"""In one dispatch: so many lanes of one key come back at once, and so many keys are looked at."""
LONGEST_CLOSING_SECONDS = 31 * DAY_SECONDS
SMALLEST_JUMP_SECONDS = 0.5
JUMPS_KEPT = 20
NO_LIMIT = 1 << 60


class Limit(NamedTuple):
    """One limit; a new one has no id yet. The same name with another task_type or key is another limit."""

    id: int
    name: str
    task_type: str
    fields: tuple[str, ...]
    max_running: int | None = None
    max_starts: int | None = None
    window_seconds: float | None = None
    max_starts_per_day: int | None = None


class Keyed(Protocol):
    """The fields of a task that a key may name; task_data is JSON text."""

    @property
    def task_type(self) -> str: ...
    @property
    def task_data(self) -> str: ...


# -- which limits a task stands under, and by which key ------------------------------------------------------------


def read_limits(tx: Tx) -> list[Limit]:
    """All limits, oldest first."""
    rows = tx.execute(f"SELECT {', '.join(Limit._fields)} FROM af_limit ORDER BY id").fetchall()
    return [
        Limit(id_, name, task_type, tuple(json.loads(fields)), *numbers)
        for id_, name, task_type, fields, *numbers in rows
    ]


def limits_of(limits: Iterable[Limit], task_type: str) -> list[Limit]:
    """Those that a task of this type stands under."""
    return [limit for limit in limits if fnmatchcase(task_type, limit.task_type)]


def values_of(limits: Iterable[Limit], task: Keyed) -> tuple[str | None, ...]:
    """The task's value for each limit's key, as JSON text; None where it lacks one of the fields, and goes free."""
    data: dict[str, Any] | None = None
    values: list[str | None] = []
    for limit in limits:
        parts = []
        for field in limit.fields:
            if field.startswith(DATA_PREFIX):
                data = json.loads(task.task_data) if data is None else data
                parts.append(_text(_of_task_data(task.task_type, data, field[len(DATA_PREFIX) :])))
            else:
                parts.append(_text(getattr(task, field)))
        values.append(None if None in parts else json.dumps(parts, ensure_ascii=False))
    return tuple(values)


def _of_task_data(task_type: str, data: Mapping[str, Any], name: str) -> object:
    """A member of task_data; `host` is that of task_data.url: always for a crawl, else where no other is given."""
    if name == "host" and (task_type == "crawl" or data.get("host") is None):
        return host_of(data.get("url"))
    return data.get(name)


def host_of(url: object) -> str | None:
    """The host of an address in lower case and ASCII, without port and last dot; None if there is none."""
    try:
        host = (urlsplit(url.strip()).hostname or "").rstrip(".") if isinstance(url, str) else ""
        return (host if host.isascii() else host.encode("idna").decode("ascii")).lower() or None
    except ValueError:  # no address, or a name that IDNA refuses
        return None


def _text(value: object) -> str | None:
    """A field's value as the text that it is counted by; what is long, by its digest."""
    if value is None or value == "" or isinstance(value, dict | list):
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def key_id(tx: Tx, limit: Limit, value: str) -> int:
    """The row of this value of the limit's key; made when it is met first."""
    row = tx.one("SELECT id FROM af_limit_key WHERE limit_id = ? AND value = ?", (limit.id, value))
    if row is not None:
        return int(row[0])
    made = tx.execute("INSERT INTO af_limit_key (limit_id, value) VALUES (?, ?)", (limit.id, value)).lastrowid
    assert made is not None
    return made


# -- is there room? ------------------------------------------------------------------------------------------------


class Gate:
    """One key as a transaction meets it: `room` is how many more may start now."""

    def __init__(self, tx: Tx, key: int) -> None:
        self._tx = tx
        self.key = key
        self._is_told = False
        row = tx.one(
            "SELECT key.running, key.closed_until, max_running, max_starts, window_seconds, max_starts_per_day"
            " FROM af_limit_key AS key JOIN af_limit ON af_limit.id = key.limit_id WHERE key.id = ?",
            (key,),
        )
        self._running: int = row[0]
        self._closed_until: float | None = row[1]
        self._max_running: int | None = row[2]
        self._max_starts: int | None = row[3]
        self._window: float = row[4]
        self._max_day: int | None = row[5]
        self.room = self._room()

    def _room(self) -> int:
        if self._closed_until is not None and self._closed_until > self._tx.now:
            return 0
        room = NO_LIMIT
        if self._max_running is not None:
            room = self.room_to_run
        if self._max_starts is not None and room > 0:
            room = min(room, self._max_starts - sum(n for _, n in self._in_window()))
        if self._max_day is not None and room > 0:
            room = min(room, self._max_day - max(n for n, _ in self._today()))
        return max(0, room)

    @property
    def room_to_run(self) -> int:
        """By max_running alone."""
        return NO_LIMIT if self._max_running is None else max(0, self._max_running - self._running)

    def _in_window(self) -> list[tuple[float, int]]:
        """(moment, how many): what counts in the window that ends now, oldest first."""
        return self._tx.execute(
            "SELECT last_at, n FROM af_limit_start WHERE key_id = ? AND span = 'window' AND last_at + ? > ?"
            " ORDER BY last_at",
            (self.key, self._window, self._tx.now),
        ).fetchall()

    def _today(self) -> list[tuple[int, float]]:
        """(how many, seconds to its end) of this day by each clock."""
        sql = "SELECT n FROM af_limit_start WHERE key_id = ? AND span = 'day' AND slot = ?"
        found = []
        for moment in {self._tx.now, self._tx.wall}:
            row = self._tx.one(sql, (self.key, _day(moment)))
            found.append((row[0] if row else 0, (_day(moment) + 1) * DAY_SECONDS - moment))
        return found

    def start(self, n: int) -> None:
        """Counts n starts now; how many run is counted by the tasks' own transitions."""
        self.room -= n
        self._running += n
        if self._max_starts is not None:
            slot = int(self._tx.now / (self._window / WINDOW_PIECES))
            self._count("window", slot, n, self._window)
        if self._max_day is not None:
            for day in {_day(self._tx.now), _day(self._tx.wall)}:
                self._count("day", day, n, DAYS_KEPT * DAY_SECONDS)

    def _count(self, span: str, slot: int, n: int, kept_seconds: float) -> None:
        count_starts(self._tx, self.key, span, slot, n, self._tx.now, self._tx.now + kept_seconds)

    def close(self, lane_id: int) -> None:
        """Without room: the lane is not looked at until this key is."""
        self._tx.execute("UPDATE af_lane SET closed_by = ? WHERE id = ?", (self.key, lane_id))
        self.tell()

    def tell(self) -> None:
        """Writes down when this key has to be looked at again: at a moment, or when one of its tasks ends."""
        if not self._is_told:
            look_at = self._opens_at()
            sql = "UPDATE af_limit_key SET look_at = ?, is_full = ? WHERE id = ?"
            self._tx.execute(sql, (look_at, look_at is None, self.key))
            self._is_told = True

    def _opens_at(self) -> float | None:
        """When what closes it by time is over; None if only the end of a task can open it."""
        moments = []
        if self._closed_until is not None and self._closed_until > self._tx.now:
            moments.append(self._closed_until)
        if self._max_starts is not None:
            started = self._in_window()
            left = sum(n for _, n in started)
            while left >= self._max_starts:
                last_at, n = started.pop(0)
                left -= n
                if left < self._max_starts:
                    moments.append(last_at + self._window)
        if self._max_day is not None:
            moments += [self._tx.now + rest for n, rest in self._today() if n >= self._max_day]
        return max(moments, default=None)


def _day(moment: float) -> int:
    return int(moment // DAY_SECONDS)


def count_starts(tx: Tx, key: int, span: str, slot: int, n: int, at: float, forget_at: float) -> None:
    tx.execute(
        "INSERT INTO af_limit_start (key_id, span, slot, n, last_at, forget_at) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (key_id, span, slot) DO UPDATE SET n = n + excluded.n,"
        " last_at = MAX(last_at, excluded.last_at), forget_at = MAX(forget_at, excluded.forget_at)",
        (key, span, slot, n, at, forget_at),
    )


def keys_of_lane(tx: Tx, lane_id: int) -> list[int]:
    rows = tx.execute("SELECT key_id FROM af_lane_key WHERE lane_id = ?", (lane_id,)).fetchall()
    return [row[0] for row in rows]


def may_run_again(tx: Tx, lane_id: int) -> bool:
    """May an attempt that was given up run on? It started long ago, so only max_running speaks against it."""
    tx.flush_lanes()
    return all(Gate(tx, key).room_to_run > 0 for key in keys_of_lane(tx, lane_id))


def reopen(tx: Tx) -> None:
    """Keys whose time has come, or one of whose tasks has ended: with room, the best of their lanes are open again."""
    due = "SELECT id FROM af_limit_key WHERE look_at <= ? ORDER BY look_at LIMIT ?"
    for (key,) in tx.execute(due, (tx.now, REOPENED_KEYS)).fetchall():
        gate = Gate(tx, key)
        if gate.room <= 0:
            gate.tell()
            continue
        opened = tx.execute(
            "UPDATE af_lane SET closed_by = NULL WHERE id IN (SELECT id FROM af_lane WHERE closed_by = ?"
            " ORDER BY top_priority DESC, last_served LIMIT ?)",
            (key, REOPENED_LANES),
        ).rowcount
        look_at = None if opened < REOPENED_LANES else tx.now
        tx.execute("UPDATE af_limit_key SET look_at = ?, is_full = 0 WHERE id = ?", (look_at, key))


def next_look(tx: Tx) -> float | None:
    """When the first closed key is to be looked at."""
    moment: float | None = tx.one("SELECT MIN(look_at) FROM af_limit_key WHERE look_at IS NOT NULL")[0]
    return moment


# -- what devices learn --------------------------------------------------------------------------------------------


def close_keys(
    tx: Tx, lane_id: int, seconds: float, reason: str | None, name: str | None = None, fields: Sequence[str] = ()
) -> int:
    """A device was told to stay away: nothing of these keys is sent anywhere for so long. How many were closed.

    By a limit's name; or by the fields of a task that were refused, of the limits whose key has all of them (for
    task_type, those that are about this type alone), so that nothing else is held up. Without both, all keys of the
    lane but those of limits that count everything together.
    """
    until = tx.now + min(seconds, LONGEST_CLOSING_SECONDS)
    closed = 0
    rows = tx.execute(
        "SELECT key.id, af_limit.name, value, fields, af_limit.task_type = af_lane.task_type"
        " FROM af_lane_key JOIN af_limit_key AS key ON key.id = key_id JOIN af_limit ON af_limit.id = limit_id"
        " JOIN af_lane ON af_lane.id = lane_id WHERE lane_id = ?",
        (lane_id,),
    ).fetchall()
    for key, limit_name, value, key_fields, is_of_one_type in rows:
        known = {*json.loads(key_fields), *(["task_type"] if is_of_one_type else [])}
        is_meant = limit_name == name if name is not None else known.issuperset(fields)
        if is_meant and (name is not None or fields or value != "[]"):
            tx.execute(
                "UPDATE af_limit_key SET closed_until = ?1, closed_reason = ?2, look_at = MAX(COALESCE(look_at, 0), ?1)"
                " WHERE id = ?3 AND (closed_until IS NULL OR closed_until < ?1)",
                (until, reason, key),
            )
            tx.note("system", "limit_closed", limit=limit_name, key=value, seconds=round(seconds, 1), reason=reason)
            closed += 1
    return closed


def open_keys(tx: Tx, name: str, value: str | None) -> int | None:
    """A person knows better: what devices had closed is open again, for one value or all. None: no such limit."""
    row = tx.one("SELECT id FROM af_limit WHERE name = ?", (name,))
    if row is None:
        return None
    opened = tx.execute(
        "UPDATE af_limit_key SET closed_until = NULL, closed_reason = NULL, look_at = 0"
        " WHERE limit_id = ?1 AND closed_until > ?2 AND (?3 IS NULL OR value = ?3)",
        (row[0], tx.now, value),
    ).rowcount
    tx.note("system", "limit_opened", limit=name, key=value, count=opened)
    tx.wants_dispatch = True
    return opened


# -- changing the limits -------------------------------------------------------------------------------------------


def store_limits(tx: Tx, wanted: Sequence[Limit]) -> list[Limit]:
    """Makes the table say what is wanted; returns the limits whose past starts are not counted yet.

    A limit of the same name, task_type and key keeps its counts. Lanes and tasks follow in lanes.set_limits.
    """
    known = {(limit.name, limit.task_type, limit.fields): limit for limit in read_limits(tx)}
    kept = {(limit.name, limit.task_type, limit.fields) for limit in wanted}
    for identity, old in known.items():
        if identity not in kept:
            _drop(tx, old)
    uncounted = []
    for limit in wanted:
        before = known.get((limit.name, limit.task_type, limit.fields))
        stored = _insert(tx, limit) if before is None else limit._replace(id=before.id)
        if before is not None and before != stored:
            _renumber(tx, stored)
        if _counts_more(before, stored):
            uncounted.append(stored)
    return uncounted


def _insert(tx: Tx, limit: Limit) -> Limit:
    made = tx.execute(
        "INSERT INTO af_limit (name, task_type, fields, max_running, max_starts, window_seconds, max_starts_per_day)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (limit.name, limit.task_type, json.dumps(limit.fields), *limit[4:]),
    ).lastrowid
    assert made is not None
    return limit._replace(id=made)


def _renumber(tx: Tx, limit: Limit) -> None:
    tx.execute(
        "UPDATE af_limit SET max_running = ?, max_starts = ?, window_seconds = ?, max_starts_per_day = ? WHERE id = ?",
        (*limit[4:], limit.id),
    )
    sql = "UPDATE af_limit_key SET look_at = 0 WHERE limit_id = ? AND (is_full = 1 OR look_at IS NOT NULL)"
    tx.execute(sql, (limit.id,))


def _drop(tx: Tx, limit: Limit) -> None:
    keys = "(SELECT id FROM af_limit_key WHERE limit_id = ?)"
    tx.execute(f"DELETE FROM af_lane_key WHERE key_id IN {keys}", (limit.id,))
    tx.execute(f"DELETE FROM af_limit_start WHERE key_id IN {keys}", (limit.id,))
    tx.execute("DELETE FROM af_limit_key WHERE limit_id = ?", (limit.id,))
    tx.execute("DELETE FROM af_limit WHERE id = ?", (limit.id,))


def _counts_more(before: Limit | None, limit: Limit) -> bool:
    """Does it ask for starts that were not counted so far?"""
    old_window = (before and before.max_starts and before.window_seconds) or 0.0
    new_window = (limit.max_starts and limit.window_seconds) or 0.0
    had_day = before is not None and before.max_starts_per_day is not None
    return new_window > old_window or (limit.max_starts_per_day is not None and not had_day)


def recount_starts(tx: Tx, limit: Limit, started: Iterable[tuple[float, Keyed]]) -> None:
    """Counts a limit's past starts anew, from attempts (when, task), newest first."""
    tx.execute(
        "DELETE FROM af_limit_start WHERE key_id IN (SELECT id FROM af_limit_key WHERE limit_id = ?)", (limit.id,)
    )
    window = (limit.max_starts and limit.window_seconds) or 0.0
    horizon = tx.now - max(window, 2 * DAY_SECONDS if limit.max_starts_per_day is not None else 0.0)
    for at, task in started:
        if at < horizon:
            return
        value = values_of([limit], task)[0] if fnmatchcase(task.task_type, limit.task_type) else None
        if value is None:
            continue
        key = key_id(tx, limit, value)
        if window and at > tx.now - window:
            count_starts(tx, key, "window", int(at / (window / WINDOW_PIECES)), 1, at, at + window)
        if limit.max_starts_per_day is not None:
            for day in {_day(at), _day(at + tx.wall - tx.now)}:
                count_starts(tx, key, "day", day, 1, at, tx.now + DAYS_KEPT * DAY_SECONDS)


# -- over a restart ------------------------------------------------------------------------------------------------


def resume_clock(tx: Tx, boot_id: str, boot_seconds: float) -> float:
    """After a start: when the steady clock begins elsewhere than it would have been, because somebody set the wall's,
    windows and closings move along. The machine's boot clock tells, while that machine has not been started anew.
    Returns by how many seconds.

    Without this, a clock set forward before a restart would end every window.
    """
    row = tx.one("SELECT value FROM af_meta WHERE key = 'clock_start'")
    before = json.loads(row[0]) if row else None
    jump = 0.0
    if before is not None and boot_id and before["boot_id"] == boot_id:
        jump = tx.now - (before["now"] + boot_seconds - before["boot_seconds"])
        if abs(jump) > SMALLEST_JUMP_SECONDS:
            moved = "last_at = last_at + ?1, forget_at = forget_at + ?1"
            tx.execute(f"UPDATE af_limit_start SET {moved} WHERE span = 'window'", (jump,))
            tx.execute("UPDATE af_limit_key SET closed_until = closed_until + ?1, look_at = look_at + ?1", (jump,))
            last = tx.one("SELECT COALESCE(MAX(id), 0) FROM af_task_assignment")[0]
            jumps = json.dumps([*clock_jumps(tx), (last, jump)][-JUMPS_KEPT:])
            tx.execute("INSERT OR REPLACE INTO af_meta (key, value) VALUES ('clock_jumps', ?)", (jumps,))
            tx.note("system", "clock_moved", seconds=round(jump, 1))
    start = json.dumps({"boot_id": boot_id, "boot_seconds": boot_seconds, "now": tx.now})
    tx.execute("INSERT OR REPLACE INTO af_meta (key, value) VALUES ('clock_start', ?)", (start,))
    return jump


def clock_jumps(tx: Tx) -> list[tuple[int, float]]:
    """(the last attempt before it, seconds) of each jump: by the clock of now, that attempt was so much later."""
    row = tx.one("SELECT value FROM af_meta WHERE key = 'clock_jumps'")
    return [(last, seconds) for last, seconds in json.loads(row[0])] if row else []


# -- what is over --------------------------------------------------------------------------------------------------


def forget_starts(tx: Tx, count: int) -> None:
    """Starts that no window and no day counts any more."""
    sql = "DELETE FROM af_limit_start WHERE rowid IN (SELECT rowid FROM af_limit_start WHERE forget_at <= ? LIMIT ?)"
    tx.execute(sql, (tx.now, count))


def forget_keys(tx: Tx, after: int, count: int) -> int:
    """Values that nothing stands under any more, among the next `count` after that id; where to go on, 0 at the end."""
    last = tx.one("SELECT MAX(id) FROM (SELECT id FROM af_limit_key WHERE id > ? ORDER BY id LIMIT ?)", (after, count))[
        0
    ]
    if last is None:
        return 0
    tx.execute(
        "DELETE FROM af_limit_key WHERE id > ? AND id <= ? AND running = 0 AND COALESCE(closed_until, 0) <= ?"
        " AND NOT EXISTS (SELECT 1 FROM af_lane_key WHERE key_id = af_limit_key.id)"
        " AND NOT EXISTS (SELECT 1 FROM af_limit_start WHERE key_id = af_limit_key.id)",
        (after, last, tx.now),
    )
    return int(last)
