"""What waits, and what holds it back? Lanes, limits and pauses, as rows ready for JSON.

Questions only, by the connections of reads.py. Moments that come in are `now` (steady, what limits compare with) and
`wall` (what people read); moments that go out are on the wall's clock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from reads import ACTIVE_SQL, Reads, iso

KEYS_SHOWN = 100
KEYS_LOOKED_AT = 2_000
"""Of those that are closed, of the newest, and of those of running tasks."""
PAUSES_SHOWN = 50
LANES_LOOKED_AT = 5_000
DAY_SECONDS = 86400.0

LIMIT_COLUMNS = ("name", "task_type", "fields", "max_running", "max_starts", "window_seconds", "max_starts_per_day")
LANE_COLUMNS = (
    "id", "task_type", "batch", "required_tags", "pinned_device_id", "prefer_device_id", "same_device_as",
    "prefer_seconds", "limit_keys", "waiting", "top_priority", "paused", "paused_reason", "is_held", "is_stale",
    "closed_by",
)  # fmt: skip
KEY_COLUMNS = (
    "key.id", "key.value", "key.running", "key.look_at", "key.closed_until", "key.closed_reason",
    "(SELECT COALESCE(SUM(n), 0) FROM af_limit_start WHERE key_id = key.id AND span = 'window'"
    " AND last_at + limits.window_seconds > ?)",
    "(SELECT COALESCE(MAX(n), 0) FROM af_limit_start WHERE key_id = key.id AND span = 'day' AND slot IN (?, ?))",
)  # fmt: skip
_KEY_SQL = (
    f"SELECT {', '.join(f'limits.{name}' for name in LIMIT_COLUMNS)}, {', '.join(KEY_COLUMNS)}"
    " FROM af_limit_key AS key JOIN af_limit AS limits ON limits.id = key.limit_id"
)

_NEXT_SQL = (
    "(SELECT id FROM af_crawl_tasks INDEXED BY task_queue WHERE lane_id = lane.id AND status = 'pending'"
    " ORDER BY priority DESC, id LIMIT 1)"
)
_KEY_ORDER = "key.look_at IS NULL, key.is_full DESC, key.running DESC, key.id DESC"
# A limit may have a key for each account and host there is: those to show are looked for where they can be.
_SHOWN_SQL = (
    "SELECT key.id FROM af_limit_key AS key WHERE key.limit_id = ? AND key.id IN ("
    f"SELECT id FROM (SELECT id FROM af_limit_key WHERE look_at IS NOT NULL ORDER BY look_at LIMIT {KEYS_LOOKED_AT})"
    f" UNION SELECT id FROM (SELECT id FROM af_limit_key ORDER BY id DESC LIMIT {KEYS_LOOKED_AT})"
    " UNION SELECT key_id FROM (SELECT task_id FROM af_task_assignment INDEXED BY attempt_active"
    f" WHERE status IN ({ACTIVE_SQL}) LIMIT {KEYS_LOOKED_AT}) AS attempt CROSS JOIN af_crawl_tasks AS task"
    " ON task.id = attempt.task_id CROSS JOIN af_lane_key AS link ON link.lane_id = task.lane_id)"
    f" ORDER BY {_KEY_ORDER} LIMIT {KEYS_SHOWN}"
)


class Backlog:
    """The questions about what waits; made once, beside the Reads that it asks."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    # -- one task's lane --------------------------------------------------------------------------------------

    def lane_of(self, task_id: int, now: float, wall: float) -> dict[str, Any] | None:
        """The lane in which this task waits, with the limits that it stands under and the device that it prefers."""
        columns = ", ".join(f"lane.{name}" for name in LANE_COLUMNS)
        found = self._reads.rows(
            f"SELECT task.updated_at, (SELECT device_id FROM af_affinity WHERE name = lane.same_device_as), {columns}"
            " FROM af_crawl_tasks AS task JOIN af_lane AS lane ON lane.id = task.lane_id WHERE task.id = ?",
            (task_id,),
        )
        if not found:
            return None
        since, served_by, *row = found[0]
        lane = _lane_row(row)
        device_id = served_by or lane["prefer_device_id"]
        left = since + (lane["prefer_seconds"] or 0.0) - now
        prefers = {"device_id": device_id, "seconds": round(left, 3)} if device_id and left > 0 else None
        keys = self._keys("JOIN af_lane_key AS link ON link.key_id = key.id WHERE link.lane_id = ?", row[0], now, wall)
        return {**lane, "prefers": prefers, "limits": keys}

    # -- limits -----------------------------------------------------------------------------------------------

    def limits(self, now: float, wall: float) -> list[dict[str, Any]]:
        """Every limit, with those of its keys that run, started or are closed: at most 100, closed ones first."""
        rows = self._reads.rows(f"SELECT id, {', '.join(LIMIT_COLUMNS)} FROM af_limit ORDER BY id")
        found = []
        for limit_id, *row in rows:
            keys = self._keys(
                f"WHERE key.id IN ({_SHOWN_SQL}) ORDER BY {_KEY_ORDER}", limit_id, now, wall,
            )  # fmt: skip
            shown = [{name: value for name, value in key.items() if name not in _LIMIT_NAMES} for key in keys]
            found.append({**_limit_row(row), "keys": shown})
        return found

    def _keys(self, where: str, value: int, now: float, wall: float) -> list[dict[str, Any]]:
        days = (int(now // DAY_SECONDS), int(wall // DAY_SECONDS))
        rows = self._reads.rows(f"{_KEY_SQL} {where}", (now, *days, value))
        return [_key_row(row, now, wall) for row in rows]

    def moving(self) -> int:
        """How many tasks still wait in lanes of limits that do not hold any more."""
        return int(
            self._reads.rows("SELECT COALESCE(SUM(waiting), 0) FROM af_lane WHERE is_stale = 1 AND waiting > 0")[0][0]
        )

    # -- lanes and pauses -------------------------------------------------------------------------------------

    def lanes(self, *, task_type: str | None, limit: int, cursor: int | None) -> dict[str, Any]:
        """{lanes, next_cursor}: lanes in which something waits, and paused ones; the newest first, each with the task
        that goes next.

        A page has fewer where many others lie between: it looks at 5,000 lanes at most, and says where to go on.
        """
        columns = ", ".join(LANE_COLUMNS)
        lanes = (
            "af_lane NOT INDEXED WHERE" if task_type is None else "af_lane INDEXED BY lane_type WHERE task_type = ? AND"
        )
        lanes += " id < ? ORDER BY id DESC LIMIT"
        values = (*([] if task_type is None else [task_type]), 2**63 - 1 if cursor is None else cursor)
        rows = self._reads.rows(
            f"SELECT *, {_NEXT_SQL} FROM (SELECT {columns} FROM {lanes} {LANES_LOOKED_AT}) AS lane"
            " WHERE waiting > 0 OR paused = 1 LIMIT ?",
            (*values, limit),
        )
        last = rows[-1:] if len(rows) == limit else None
        if last is None:
            last = self._reads.rows(f"SELECT id FROM {lanes} 1 OFFSET {LANES_LOOKED_AT - 1}", values)
        found = [{**_lane_row(row[:-1]), "next_task_id": row[-1]} for row in rows]
        return {"lanes": found, "next_cursor": str(last[0][0]) if last else None}

    def pauses(self) -> list[dict[str, Any]]:
        """Whatever a person holds back: everything, task types, batches, lanes; {scope, name, reason} each."""
        rows = self._reads.rows(
            "SELECT scope, name, reason FROM af_pause"
            " UNION ALL SELECT * FROM (SELECT 'batch', name, reason FROM af_batch INDEXED BY batch_paused"
            " WHERE state = 'paused' ORDER BY rowid DESC LIMIT ?1)"
            " UNION ALL SELECT * FROM (SELECT 'lane', CAST(id AS TEXT), paused_reason FROM af_lane"
            " INDEXED BY lane_paused WHERE paused = 1 LIMIT ?1)",
            (PAUSES_SHOWN,),
        )
        return [{"scope": scope, "name": name or None, "reason": reason} for scope, name, reason in rows]


# -- rows --------------------------------------------------------------------------------------------------------


def _lane_row(row: Sequence[Any]) -> dict[str, Any]:
    lane = dict(zip(LANE_COLUMNS, row, strict=True))
    for name in ("batch", "pinned_device_id", "prefer_device_id", "same_device_as", "prefer_seconds"):
        lane[name] = lane[name] or None
    for name in ("paused", "is_held", "is_stale"):
        lane[name] = bool(lane[name])
    lane["required_tags"] = json.loads(lane["required_tags"])
    lane["limit_keys"] = [json.loads(value) for value in json.loads(lane["limit_keys"]) if value is not None]
    lane["is_closed"] = lane.pop("closed_by") is not None
    return lane


def _limit_row(row: Sequence[Any]) -> dict[str, Any]:
    limit = dict(zip(LIMIT_COLUMNS, row, strict=True))
    return {
        "name": limit.pop("name"),
        "task_type": limit.pop("task_type"),
        "key": json.loads(limit.pop("fields")),
        **limit,
    }


_LIMIT_NAMES = ("name", "task_type", "key", "max_running", "max_starts", "window_seconds", "max_starts_per_day")


def _key_row(row: Sequence[Any], now: float, wall: float) -> dict[str, Any]:
    """A key with its limit's numbers; `held_by` is what closes it at this moment, None while it has room."""
    limit = _limit_row(row[: len(LIMIT_COLUMNS)])
    _, value, running, look_at, closed_until, closed_reason, in_window, today = row[len(LIMIT_COLUMNS) :]
    is_closed = closed_until is not None and closed_until > now
    held_by = None
    if is_closed:
        held_by = "closed"
    elif limit["max_starts_per_day"] is not None and today >= limit["max_starts_per_day"]:
        held_by = "max_starts_per_day"
    elif limit["max_starts"] is not None and in_window >= limit["max_starts"]:
        held_by = "max_starts"
    elif limit["max_running"] is not None and running >= limit["max_running"]:
        held_by = "max_running"
    return {
        **limit,
        "value": json.loads(value),
        "running": running,
        "starts_in_window": in_window if limit["max_starts"] is not None else None,
        "starts_today": today if limit["max_starts_per_day"] is not None else None,
        "held_by": held_by,
        "closed_until": iso(closed_until + wall - now) if is_closed else None,
        "closed_reason": closed_reason if is_closed else None,
        "next_look_seconds": max(0.0, round(look_at - now, 3)) if look_at is not None and held_by else None,
    }
