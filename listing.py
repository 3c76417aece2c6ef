"""Which tasks match a filter? Bounded walks along ids, from either end.

A filter is a mapping of any of: status (a tuple of states), task_type, device_id, batch, username, app_id, parent_id,
text (a prefix of unique_key, username or app_id), created_after, created_before (epoch seconds). `plan` chooses where
to walk: states with few tasks by their partial indexes, else the narrowest index, else all ids. A walk reads window
after window, so it can stop at its limit or when its time is up and say where to go on; it always gets past one.

This file must not write. Only fixed text becomes SQL; every value is bound.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

FIRST_WINDOW, LARGEST_WINDOW, SMALLEST_WINDOW = 1_000, 64_000, 100
QUICK_SECONDS = 0.005
FEW = 5_000
STATES = ("scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled")
ACTIVE_SQL = "'assigned', 'running'"

# Where the tasks of a state are found without a walk, while they are few.
_ACTIVE = f"SELECT task_id FROM af_task_assignment INDEXED BY attempt_active WHERE status IN ({ACTIVE_SQL})"
SMALL_SETS = {
    "scheduled": "SELECT id FROM af_crawl_tasks INDEXED BY task_due WHERE status = 'scheduled'",
    "pending": "SELECT id FROM af_crawl_tasks INDEXED BY task_queue WHERE status = 'pending'",
    "failed": "SELECT id FROM af_crawl_tasks INDEXED BY task_failed WHERE status = 'failed'",
    "assigned": _ACTIVE,
    "running": _ACTIVE,
}
# Filters with an index of their own, the narrowest first. The partial indexes need their condition in the query.
INDEXED = (
    ("parent_id", "parent_id = ?", "task_children"),
    ("batch", "batch = ? AND batch <> ''", "task_batch"),
    ("app_id", "app_id = ?", "task_app"),
    ("username", "username = ?", "task_username"),
)


class Search(NamedTuple):
    """A filter as SQL: the rows it walks along (all ids, an index, or a small set), and what else must hold."""

    table: str
    walk: str
    walk_values: tuple[Any, ...]
    terms: str
    values: tuple[Any, ...]
    lowest: int
    highest: int
    step: str  # how a window is measured: ids, rows (of an index), or all (a small set is one window)


class Walked(NamedTuple):
    """Rows in the walk's order; `reached` is the last id looked at, None at the end; is_partial: the time was up."""

    rows: list[tuple[Any, ...]]
    reached: int | None
    is_partial: bool


def plan(connection: sqlite3.Connection, filters: Mapping[str, Any], by_state: Mapping[str, int]) -> Search:
    """The cheapest walk for a filter; `by_state` are the kept counts of all tasks."""
    lowest, highest = _id_bounds(connection, filters)
    table, walk, step = "af_crawl_tasks NOT INDEXED", "", "ids"
    values: tuple[Any, ...] = ()
    states = tuple(state for state in STATES if state in filters.get("status", ()))
    if states and not any(by_state.get(state) for state in states):
        highest = lowest - 1  # the kept counters say that there is none: nothing to walk along
    walked = next(((name, term, index) for name, term, index in INDEXED if name in filters), None)
    if _are_few(states, by_state):
        union = " UNION ".join(dict.fromkeys(SMALL_SETS[state] for state in states))
        few = f"(WITH few(few_id) AS ({union}) SELECT few_id FROM few)"
        table, step, walked = f"{few} CROSS JOIN af_crawl_tasks NOT INDEXED ON id = few_id", "all", None
    elif walked is not None:
        table, walk, values, step = f"af_crawl_tasks INDEXED BY {walked[2]}", walked[1], (filters[walked[0]],), "rows"
    elif states == ("failed",):
        table, walk, step = "af_crawl_tasks INDEXED BY task_failed", "status = 'failed'", "rows"
    terms, bound = _terms(filters, states, walked[0] if walked else "")
    return Search(table, walk, values, terms, bound, lowest, highest, step)


def walk_down(
    connection: sqlite3.Connection, search: Search, columns: str, *, below: int | None, limit: int, seconds: float
) -> Walked:
    """Newest first: the matching rows under `below` (all of them if None). The first of `columns` must be id."""
    deadline = time.monotonic() + seconds
    upper = search.highest if below is None else min(below - 1, search.highest)
    rows: list[tuple[Any, ...]] = []
    window = FIRST_WINDOW
    while upper >= search.lowest:
        started = time.monotonic()
        lower = _edge(connection, search, upper, window, is_down=True)
        rows += _select(connection, search, columns, lower, upper, "DESC", limit - len(rows))
        if len(rows) >= limit:
            return Walked(rows, rows[-1][0], False)
        upper = lower - 1
        if time.monotonic() >= deadline and upper >= search.lowest:
            return Walked(rows, lower, True)
        window = _next_window(window, time.monotonic() - started)
    return Walked(rows, None, False)


def walk_up(
    connection: sqlite3.Connection, search: Search, columns: str, *, above: int, limit: int, seconds: float
) -> Walked:
    """Oldest first: the matching rows over `above`. The first of `columns` must be id."""
    deadline = time.monotonic() + seconds
    lower = max(above + 1, search.lowest)
    rows: list[tuple[Any, ...]] = []
    window = FIRST_WINDOW
    while lower <= search.highest:
        started = time.monotonic()
        upper = _edge(connection, search, lower, window, is_down=False)
        rows += _select(connection, search, columns, lower, upper, "ASC", limit - len(rows))
        if len(rows) >= limit:
            return Walked(rows, rows[-1][0], False)
        lower = upper + 1
        if time.monotonic() >= deadline and lower <= search.highest:
            return Walked(rows, upper, True)
        window = _next_window(window, time.monotonic() - started)
    return Walked(rows, None, False)


def _are_few(states: tuple[str, ...], by_state: Mapping[str, int]) -> bool:
    if not states or not all(state in SMALL_SETS for state in states):
        return False
    read = set(states) | ({"assigned", "running"} if {"assigned", "running"} & set(states) else set())
    return sum(by_state.get(state, 0) for state in read) <= FEW


def _terms(filters: Mapping[str, Any], states: tuple[str, ...], walked: str) -> tuple[str, tuple[Any, ...]]:
    """What must hold beside the walk, with its values."""
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
        ("created_after", "created_at >= ?"),
        ("created_before", "created_at <= ?"),
    ):
        if name in filters and name != walked:
            terms.append(term)
            values.append(filters[name])
    if "text" in filters:
        columns = ("unique_key", "username", "app_id")
        terms.append("(" + " OR ".join(f"({column} >= ? AND {column} < ?)" for column in columns) + ")")
        values += [filters["text"], filters["text"] + "\U0010ffff"] * len(columns)
    return " AND ".join(terms), tuple(values)


def _select(
    connection: sqlite3.Connection, search: Search, columns: str, lowest: int, highest: int, order: str, limit: int
) -> list[tuple[Any, ...]]:
    where = " AND ".join(filter(None, [search.walk, "id >= ? AND id <= ?", search.terms]))
    sql = f"SELECT {columns} FROM {search.table} WHERE {where} ORDER BY id {order} LIMIT ?"
    values = (*search.walk_values, lowest, highest, *search.values, limit)
    return connection.execute(sql, values).fetchall()


def _edge(connection: sqlite3.Connection, search: Search, start: int, window: int, *, is_down: bool) -> int:
    """The far id of the window that begins at `start`, itself included."""
    end = search.lowest if is_down else search.highest
    if search.step == "all":
        return end
    if search.step == "ids":
        return max(start - window + 1, end) if is_down else min(start + window - 1, end)
    between, order = ("id <= ? AND id >= ?", "DESC") if is_down else ("id >= ? AND id <= ?", "ASC")
    row = connection.execute(
        f"SELECT id FROM {search.table} WHERE {search.walk} AND {between} ORDER BY id {order} LIMIT 1 OFFSET ?",
        (*search.walk_values, start, end, window - 1),
    ).fetchone()
    return end if row is None else int(row[0])


def _next_window(window: int, took_seconds: float) -> int:
    """Twice as large while windows are quick, so that an empty stretch is crossed fast; half as large when not."""
    return min(window * 2, LARGEST_WINDOW) if took_seconds < QUICK_SECONDS else max(window // 2, SMALLEST_WINDOW)


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
