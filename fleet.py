"""How are the devices doing, page by page, and how were they in the last hour or day?

Rows of the device list by pages, and heartbeats as points for charts. No question reads more than a page of devices, or
more than a day of one device's beats. This file never writes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from reads import ACTIVE_SQL, DEVICE_COLUMNS, Reads, device_row, iso

PAGE = 200
"""Devices read at once, and the longest page."""
MAX_BEATS = 60
STEP_SECONDS = {1: 12, 24: 300}
"""hours asked for -> what one point of a chart covers: at most 300 points; beats older than an hour are 300 s apart"""

_DEVICES_SQL = (
    f"SELECT {', '.join(DEVICE_COLUMNS)}, (SELECT count(*) FROM af_task_assignment INDEXED BY attempt_holder"
    f" WHERE af_task_assignment.device_id = af_device.device_id AND status IN ({ACTIVE_SQL}))"
    " FROM af_device WHERE device_id > ? ORDER BY device_id LIMIT ?"
)
_NEWEST_BEATS_SQL = (
    "SELECT heartbeat_at, cpu_usage, memory_usage, disk_usage, active_tasks FROM af_device_heartbeat"
    " WHERE device_id = ? ORDER BY heartbeat_at DESC LIMIT ?"
)
_THINNED_BEATS_SQL = (
    "SELECT max(heartbeat_at), avg(cpu_usage), avg(memory_usage), avg(disk_usage), max(active_tasks)"
    " FROM af_device_heartbeat WHERE device_id = ? AND heartbeat_at > ? GROUP BY CAST(heartbeat_at / ? AS INTEGER)"
    " ORDER BY 1"
)


class Fleet:
    """The questions about many devices; made once, beside the Reads that it asks."""

    def __init__(self, reads: Reads, device_timeout: float) -> None:
        self._reads = reads
        self._device_timeout = device_timeout

    def page(
        self, now: float, is_wanted: Callable[[Mapping[str, Any]], bool], *, limit: int, after: str = ""
    ) -> tuple[list[dict[str, Any]], str | None]:
        """At most `limit` devices that are wanted, by id, after that one; and the id to go on after (None: the end)."""
        found: list[dict[str, Any]] = []
        while True:
            rows = self._reads.rows(_DEVICES_SQL, (after, PAGE))
            for *row, held in rows:
                device = device_row(row, held, now, self._device_timeout)
                after = device["device_id"]
                if is_wanted(device):
                    found.append(device)
                    if len(found) == limit:
                        return found, after
            if len(rows) < PAGE:
                return found, None

    def task_types(self, heard_after: float = 0.0) -> dict[str, int]:
        """{task type: how many devices run it}, by name; only devices that work here and were heard after that."""
        rows = self._reads.rows(
            "SELECT task_types, count(*) FROM af_device"
            " WHERE ?1 = 0 OR (last_heartbeat_at > ?1 AND boot_id IS NOT NULL) GROUP BY task_types",
            (heard_after,),
        )
        counts: Counter[str] = Counter()
        for names, n in rows:
            counts.update(dict.fromkeys(json.loads(names), n))
        return dict(sorted(counts.items()))

    def newest_beats(self, device_id: str, count: int) -> list[dict[str, Any]]:
        """The newest beats of a device as points, oldest first."""
        rows = self._reads.rows(_NEWEST_BEATS_SQL, (device_id, count))
        return [_point(row) for row in reversed(rows)]

    def beats(self, device_id: str, now: float, hours: int) -> dict[str, Any]:
        """{step_seconds, points}: the beats of the last hours, at most one point a step: the step's means, and the most
        tasks at once. A step without a beat has no point."""
        step = STEP_SECONDS[hours]
        rows = self._reads.rows(_THINNED_BEATS_SQL, (device_id, now - hours * 3600, step))
        return {"step_seconds": step, "points": [_point(row) for row in rows[-300:]]}


def _point(row: tuple[Any, ...]) -> dict[str, Any]:
    at, *figures, active = row
    cpu, memory, disk = (None if figure is None else round(figure, 1) for figure in figures)
    return {"at": iso(at), "cpu": cpu, "memory": memory, "disk": disk, "active": active}
