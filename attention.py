"""What needs a person now? At most ten short items, the weightiest first.

Each is found by a counter, a partial index, or the rows of the devices; nothing here grows with history. This file
never writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reads import Reads, iso
from schema import FAILURES_TO_PROBATION

Watch = Callable[[float, float], "tuple[str, str] | None"]
"""(now, wall) -> (kind, sentence): one of the master's own parts says what is wrong with it."""
IDS_SHOWN = 5
LONG_WAIT_SECONDS = 600.0
STUCK = ("no_device", "wrong_device", "no_device_runs_type", "no_device_has_tags", "no_device_online")
STUCK_SECONDS = 60.0
"""What waits for one of these reasons waits for a person: that is told sooner."""
MANY_FAILURES, MANY_OF_ALL = 10, 0.2
"""So many failures in an hour, and such a part of all that ended, are worth a look."""
FAILED_LOOKED_AT = 1_000
KEYS_LOOKED_AT = 1_000

# What is out of order, in the order of what is told of a device that has several.
_DEVICES_SQL = (
    "SELECT CASE WHEN conflict THEN 'device_conflict' WHEN wanted <> 'active' OR boot_id IS NULL THEN NULL"
    " WHEN last_heartbeat_at <= ? THEN 'devices_offline' WHEN consecutive_failures >= ? THEN 'black_hole'"
    " WHEN problem IS NOT NULL THEN 'device_problem' END AS kind, device_id, problem FROM af_device"
    " WHERE kind IS NOT NULL ORDER BY device_id"
)
_POISON_SQL = (
    "SELECT id FROM (SELECT id, end_reason FROM af_crawl_tasks INDEXED BY task_state WHERE status = 'failed'"
    " AND status <> 'assigned' AND status <> 'running' ORDER BY id DESC LIMIT ?) WHERE end_reason = 'poison'"
)
_CLOSED_SQL = (
    "SELECT af_limit.name, key.closed_until FROM (SELECT limit_id, closed_until FROM af_limit_key"
    " INDEXED BY limit_key_look WHERE look_at IS NOT NULL ORDER BY look_at LIMIT ?) AS key"
    " JOIN af_limit ON af_limit.id = key.limit_id WHERE key.closed_until > ?"
)


class Attention:
    """The question; made once, beside the Reads that it asks."""

    def __init__(self, reads: Reads, device_timeout: float, *watches: Watch) -> None:
        self._reads = reads
        self._device_timeout = device_timeout
        self._watches = watches

    def items(self, now: float, wall: float, overview: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{kind, n, ids, detail, until?}] for an overview with its rates, pauses and its oldest waiting task."""
        own = filter(None, (watch(now, wall) for watch in self._watches))
        found = [_item(kind, 1, [], detail) for kind, detail in own]
        found += [*self._devices(now), *self._poison(), *self._closed(now, wall)]
        found += [*_failures(overview["rates"]), *_paused(overview["paused"]), *_waits(overview["oldest_waiting"])]
        return found

    def _devices(self, now: float) -> list[dict[str, Any]]:
        by_kind: dict[str, list[tuple[str, str]]] = {}
        for kind, device_id, problem in self._reads.rows(
            _DEVICES_SQL, (now - self._device_timeout, FAILURES_TO_PROBATION)
        ):
            by_kind.setdefault(kind, []).append((device_id, problem))
        sentences = {
            "device_conflict": "{} several processes that fight over one device id; give each machine its own.",
            "devices_offline": "{} not been heard for too long; look whether the machine and its worker run.",
            "black_hole": "{} failed many tasks in a row and gets one at a time; look at what went wrong there.",
            "device_problem": "{} a problem and may take no tasks: {problems}.",
        }
        items = []
        for kind, sentence in sentences.items():
            devices = by_kind.get(kind, [])
            problems = ", ".join(sorted({problem for _, problem in devices if problem})[:IDS_SHOWN])
            if devices:
                who = "1 device has" if len(devices) == 1 else f"{len(devices)} devices have"
                ids = [device_id for device_id, _ in devices[:IDS_SHOWN]]
                items.append(_item(kind, len(devices), ids, sentence.format(who, problems=problems)))
        return items

    def _poison(self) -> list[dict[str, Any]]:
        ids = [row[0] for row in self._reads.rows(_POISON_SQL, (FAILED_LOOKED_AT,))]
        text = "{} given up, because the devices that ran {} were lost; look into the task before it runs again."
        words = ("1 task was", "it") if len(ids) == 1 else (f"{len(ids)} tasks were", "them")
        return [_item("poison", len(ids), ids[:IDS_SHOWN], text.format(*words))] if ids else []

    def _closed(self, now: float, wall: float) -> list[dict[str, Any]]:
        rows = self._reads.rows(_CLOSED_SQL, (KEYS_LOOKED_AT, now))
        if not rows:
            return []
        names = list(dict.fromkeys(name for name, _ in rows))[:IDS_SHOWN]
        what = "1 key of a limit is" if len(rows) == 1 else f"{len(rows)} keys of limits are"
        item = _item("limit_closed", len(rows), names, f"{what} closed, because a service asked to wait.")
        return [{**item, "until": iso(max(until for _, until in rows) + wall - now)}]


def _failures(rates: Mapping[str, int]) -> list[dict[str, Any]]:
    failed, completed = rates["failed_last_hour"], rates["completed_last_hour"]
    if failed < MANY_FAILURES or failed < MANY_OF_ALL * (failed + completed):
        return []
    text = f"{failed} of {failed + completed} attempts that ended in the last hour failed."
    return [_item("failures", failed, [], text)]


def _paused(pauses: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not pauses:
        return []
    names = [pause["name"] or pause["scope"] for pause in pauses[:IDS_SHOWN]]
    if any(pause["scope"] == "all" for pause in pauses):
        text = "Everything is paused: nothing is sent until somebody resumes it."
    else:
        text = f"Held back by a person: {', '.join(names)}{' …' if len(pauses) > IDS_SHOWN else ''}."
    return [_item("paused", len(pauses), names, text)]


def _waits(oldest: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if oldest is None:
        return []
    if oldest["waiting_seconds"] < (STUCK_SECONDS if oldest.get("reason") in STUCK else LONG_WAIT_SECONDS):
        return []
    minutes = oldest["waiting_seconds"] // 60
    text = f"Task {oldest['task_id']} has been waiting for {minutes:.0f} min: {oldest.get('detail') or 'see why'}"
    return [_item("oldest_waiting", 1, [oldest["task_id"]], text)]


def _item(kind: str, n: int, ids: Sequence[Any], detail: str) -> dict[str, Any]:
    return {"kind": kind, "n": n, "ids": list(ids), "detail": detail}
