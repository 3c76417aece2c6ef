"""Which tasks match a filter? Bounded walks along ids, from either end.

A filter is a mapping of any of: status (a tuple of states), task_type, device_id, batch, username, app_id, parent_id,
text (a prefix of unique_key, username or app_id), error (exactly this error_message; "" is none), created_after,
created_before (epoch seconds).

Each filter with an index is one way along the ids, and nobody knows beforehand which is the shortest: a million tasks
of a username, of which none failed, or a million that failed, of which none is that user's. So all ways are walked in
turns, window after window, and the first that fills the page or comes to its end has the answer: the cost is that of
the shortest, times the number of filters. A walk stops when its time is up and says where to go on; it always gets
past one window.

This file must not write. Only fixed text becomes SQL; every value is bound.
"""

from __future__ import annotations

import json
import sqlite3
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FIRST_WINDOW, LARGEST_WINDOW, SMALLEST_WINDOW = 250, 64_000, 100
QUICK_SECONDS = 0.005
FEW = 2_000
"""So many tasks at most are found by a prefix before everything else is looked at; more of them are easily met."""
STATES = ("scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled")
WAITING = ("scheduled", "pending")
ACTIVE_SQL = "'assigned', 'running'"


class Source(NamedTuple):
    """Rows in the order of `key`, which is a task's id: those of `table` where `where` holds with `values`."""

    table: str
    where: str
    values: tuple[Any, ...]
    key: str = "id"
    join: str = ""


# The partial indexes need their condition in the query.
_BY_COLUMN = (
    ("parent_id", "af_crawl_tasks INDEXED BY task_children", "parent_id = ?"),
    ("batch", "af_crawl_tasks INDEXED BY task_batch", "batch = ? AND batch <> ''"),
    ("app_id", "af_crawl_tasks INDEXED BY task_app", "app_id = ?"),
    ("username", "af_crawl_tasks INDEXED BY task_username", "username = ?"),
    ("task_type", "af_crawl_tasks INDEXED BY task_type", "task_type = ?"),
)
_BY_STATE = "status = ? AND status <> 'assigned' AND status <> 'running'"
_ACTIVE = Source(
    f"(SELECT task_id FROM af_task_assignment INDEXED BY attempt_active WHERE status IN ({ACTIVE_SQL})) AS attempt",
    "1", (), "attempt.task_id", "CROSS JOIN af_crawl_tasks NOT INDEXED ON id = attempt.task_id",
)  # fmt: skip
_OF_DEVICE = (
    "(SELECT task_id, id AS attempt_id FROM af_task_assignment INDEXED BY attempt_device"
    " WHERE device_id = ?) AS attempt"
)
_ALL = Source("af_crawl_tasks NOT INDEXED", "1", ())
_PREFIXED = (("task_key", "unique_key"), ("task_username", "username"), ("task_app", "app_id"))


class Way(NamedTuple):
    """One way along the ids: sources that have no task in common, or the ids themselves, ascending."""

    sources: tuple[Source, ...]
    ids: list[int] | None = None


class Search(NamedTuple):
    """A filter as SQL: the ways to walk, what must hold of a task, and the ids between which a match can be."""

    ways: tuple[Way, ...]
    terms: str
    values: tuple[Any, ...]
    lowest: int
    highest: int


class Walked(NamedTuple):
    """Rows in the walk's order; `reached` is the last id looked at, None at the end; is_partial: the time was up."""

    rows: list[tuple[Any, ...]]
    reached: int | None
    is_partial: bool


def plan(connection: sqlite3.Connection, filters: Mapping[str, Any], by_state: Mapping[str, int]) -> Search:
    """The ways to walk for a filter; `by_state` are kept counts of tasks among which all matches are."""
    lowest, highest = _id_bounds(connection, filters)
    states = tuple(state for state in STATES if state in filters.get("status", ()))
    if "device_id" in filters:
        states = tuple(state for state in states if state not in WAITING)  # what waits is no device's
    if filters.get("status") and not any(by_state.get(state) for state in states):
        highest = lowest - 1  # the kept counters say that there is none: nothing to walk along
    terms, values = _terms(filters, states)
    ways = list(_ways(filters, states))
    if "text" in filters and highest >= lowest:
        ids = _prefixed(connection, filters["text"])
        ways += [Way((_ALL,), ids)] if ids is not None else []
    return Search(tuple(ways or [Way((_ALL,))]), terms, values, lowest, highest)


def walk_down(
    connection: sqlite3.Connection, search: Search, columns: str, *, below: int | None, limit: int, seconds: float
) -> Walked:
    """Newest first: the matching rows under `below` (all of them if None). The first of `columns` must be id."""
    upper = search.highest if below is None else min(below - 1, search.highest)
    return _race(connection, search, columns, (search.lowest, upper), -1, limit, seconds)


def walk_up(
    connection: sqlite3.Connection, search: Search, columns: str, *, above: int, limit: int, seconds: float
) -> Walked:
    """Oldest first: the matching rows over `above`. The first of `columns` must be id."""
    lower = max(above + 1, search.lowest)
    return _race(connection, search, columns, (lower, search.highest), +1, limit, seconds)


def _ways(filters: Mapping[str, Any], states: tuple[str, ...]) -> Sequence[Way]:
    ways = [Way((Source(table, where, (filters[name],)),)) for name, table, where in _BY_COLUMN if name in filters]
    if "device_id" in filters:
        join = "CROSS JOIN af_crawl_tasks NOT INDEXED ON id = attempt.task_id AND assignment_id = attempt.attempt_id"
        ways.append(Way((Source(_OF_DEVICE, "1", (filters["device_id"],), "attempt.task_id", join),)))
    if states:
        table = "af_crawl_tasks INDEXED BY task_state"
        settled = [Source(table, _BY_STATE, (state,)) for state in states if state not in ("assigned", "running")]
        ways.append(Way((*settled, *([_ACTIVE] if len(settled) < len(states) else []))))
    return ways


def _prefixed(connection: sqlite3.Connection, text: str) -> list[int] | None:
    """The ids of all tasks of which a name begins so, ascending; None if there are many."""
    found: set[int] = set()
    for index, column in _PREFIXED:
        rows = connection.execute(
            f"SELECT id FROM af_crawl_tasks INDEXED BY {index} WHERE {column} >= ? AND {column} < ? LIMIT ?",
            (text, text + "\U0010ffff", FEW + 1),
        ).fetchall()
        found.update(row[0] for row in rows)
        if len(found) > FEW:
            return None
    return sorted(found)


def _terms(filters: Mapping[str, Any], states: tuple[str, ...]) -> tuple[str, tuple[Any, ...]]:
    """What must hold of a task, with its values."""
    terms: list[str] = []
    values: list[Any] = []
    if filters.get("status"):
        terms.append(f"status IN ({', '.join(repr(state) for state in states) or 'NULL'})")
    for name, term in (
        ("parent_id", "parent_id = ?"),
        ("batch", "batch = ?"),
        ("app_id", "app_id = ?"),
        ("username", "username = ?"),
        ("task_type", "task_type = ?"),
        ("device_id", "assigned_device_id = ?"),
        ("error", "COALESCE(error_message, '') = ?"),
        ("created_after", "created_at >= ?"),
        ("created_before", "created_at <= ?"),
    ):
        if name in filters:
            terms.append(term)
            values.append(filters[name])
    if "text" in filters:
        columns = [column for _, column in _PREFIXED]
        terms.append("(" + " OR ".join(f"({column} >= ? AND {column} < ?)" for column in columns) + ")")
        values += [filters["text"], filters["text"] + "\U0010ffff"] * len(columns)
    return " AND ".join(terms), tuple(values)


# -- the walk ----------------------------------------------------------------------------------------------------


def _race(
    connection: sqlite3.Connection, search: Search, columns: str, between: tuple[int, int], step: int, limit: int,
    seconds: float,
) -> Walked:  # fmt: skip
    """All ways in turns. Whichever gets furthest has every match up to there, so it speaks for all."""
    deadline = time.monotonic() + seconds
    walkers = [_Walker(connection, search, way, columns, between, step) for way in search.ways]
    if between[0] > between[1]:
        return Walked([], None, False)
    while True:
        for walker in walkers:
            walker.advance(limit)
            if len(walker.rows) >= limit:
                return Walked(walker.rows, walker.rows[-1][0], False)
            if walker.is_at_end:
                return Walked(walker.rows, None, False)
            if time.monotonic() >= deadline:
                best = max(walkers, key=lambda one: one.reached * step)
                return Walked(best.rows, best.reached, True)


class _Walker:
    """Goes one way, a window at a time: upwards (step 1) or downwards (-1)."""

    def __init__(
        self, connection: sqlite3.Connection, search: Search, way: Way, columns: str, between: tuple[int, int],
        step: int,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._search = search
        self._way = way
        self._columns = columns
        self._step = step
        start, self._end = between if step > 0 else between[::-1]
        self.reached = start - step
        self._window = FIRST_WINDOW
        self.rows: list[tuple[Any, ...]] = []

    @property
    def is_at_end(self) -> bool:
        return self.reached == self._end

    def advance(self, limit: int) -> None:
        """Reads one window. The next is twice as large while they are quick, so that an empty stretch is crossed fast,
        and half as large when not."""
        started = time.monotonic()
        near = self.reached + self._step
        far = self._ids_edge(near) if self._way.ids is not None else self._edge(near)
        found = [
            row
            for source in self._way.sources
            for row in self._select(source, min(near, far), max(near, far), limit - len(self.rows))
        ]
        if len(self._way.sources) > 1:
            found.sort(key=lambda row: row[0] * self._step)
        self.rows += found[: limit - len(self.rows)]
        self.reached = far
        is_quick = time.monotonic() - started < QUICK_SECONDS
        self._window = min(self._window * 2, LARGEST_WINDOW) if is_quick else max(self._window // 2, SMALLEST_WINDOW)

    def _select(self, source: Source, lowest: int, highest: int, limit: int) -> list[tuple[Any, ...]]:
        where = [source.where, f"{source.key} >= ? AND {source.key} <= ?"]
        values: list[Any] = [*source.values, lowest, highest]
        if self._way.ids is not None:
            some = self._way.ids[bisect_left(self._way.ids, lowest) : bisect_right(self._way.ids, highest)]
            where.append("id IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(some))
        sql = (
            f"SELECT {self._columns} FROM {source.table} {source.join}"
            f" WHERE {' AND '.join(filter(None, [*where, self._search.terms]))}"
            f" ORDER BY {source.key} {self._order} LIMIT ?"
        )
        return self._connection.execute(sql, (*values, *self._search.values, limit)).fetchall()

    @property
    def _order(self) -> str:
        return "ASC" if self._step > 0 else "DESC"

    def _edge(self, near: int) -> int:
        """The far id of the window that begins at `near`: of several sources the nearest one, so that none has more."""
        if self._way.sources == (_ALL,):
            edges = [near + self._step * (self._window - 1)]
        else:
            edges = [self._edge_of(source, near) for source in self._way.sources]
        return min([*edges, self._end], key=lambda edge: edge * self._step)

    def _edge_of(self, source: Source, near: int) -> int:
        sql = (
            f"SELECT {source.key} FROM {source.table} WHERE {source.where} AND {source.key} >= ? AND {source.key} <= ?"
            f" ORDER BY {source.key} {self._order} LIMIT 1 OFFSET ?"
        )
        between = sorted((near, self._end))
        row = self._connection.execute(sql, (*source.values, *between, self._window - 1)).fetchone()
        return self._end if row is None else int(row[0])

    def _ids_edge(self, near: int) -> int:
        """The same along ids that are known."""
        ids = self._way.ids or []
        at = bisect_left(ids, near) + self._window - 1 if self._step > 0 else bisect_right(ids, near) - self._window
        return ids[at] if 0 <= at < len(ids) and (ids[at] - self._end) * self._step < 0 else self._end


def _id_bounds(connection: sqlite3.Connection, filters: Mapping[str, Any]) -> tuple[int, int]:
    """The ids between which a match can be; moments by bisection, because ids and created_at rise together."""
    low, high = connection.execute(
        "SELECT (SELECT min(id) FROM af_crawl_tasks), (SELECT max(id) FROM af_crawl_tasks)"
    ).fetchone()
    if low is None:
        return 1, 0
    if "created_after" in filters:
        low = _first_created(connection, filters["created_after"], low, high)
    if "created_before" in filters:
        high = _first_created(connection, filters["created_before"] + 0.001, low, high)
    return low, high


def _first_created(connection: sqlite3.Connection, moment: float, low: int, high: int) -> int:
    """The lowest id between low and high created at `moment` or later; `high` if none was."""
    while low < high:
        middle = (low + high) // 2
        row = connection.execute(
            "SELECT created_at FROM af_crawl_tasks WHERE id >= ? ORDER BY id LIMIT 1", (middle,)
        ).fetchone()
        if row is not None and row[0] < moment:
            low = middle + 1
        else:
            high = middle
    return low
