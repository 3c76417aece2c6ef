"""Why does this task wait?

Computed when somebody asks, from the task, its lane, its batch and the devices; never stored. `reason` is a stable
word for programs, `detail` a sentence for people that says what would let the task go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

REASONS = (
    "not_waiting",
    "scheduled",
    "batch_paused",
    "lane_paused",
    "lane_closed",
    "no_device",
    "wrong_device",
    "no_device_runs_type",
    "no_device_has_tags",
    "no_device_online",
    "all_busy",
    "next_dispatch",
)


class Explanation(NamedTuple):
    """`devices` has a line for each device: {device_id, excluded_because}, None when nothing excludes it."""

    reason: str
    detail: str
    devices: list[dict[str, str | None]]


class _Exclusion(NamedTuple):
    reason: str
    because: str


def explain(
    task: Row,
    lane: Row | None,
    batch: Row | None,
    devices: Sequence[Row],
    is_asking: Callable[[str], bool],
) -> Explanation:
    """All rows as reads.py gives them. The most general cause wins: a pause before a busy fleet."""
    if task["status"] == "scheduled":
        return Explanation("scheduled", _scheduled(task), [])
    if task["status"] != "pending":
        return Explanation("not_waiting", f"the task is {task['status']}; it does not wait for a device", [])
    exclusions = {device["device_id"]: _exclusion(task, device, is_asking) for device in devices}
    lines = [
        {"device_id": device_id, "excluded_because": exclusion.because if exclusion else None}
        for device_id, exclusion in exclusions.items()
    ]
    return Explanation(*(_held_back(lane, batch) or _no_device(task, list(exclusions.values()))), lines)


def _scheduled(task: Row) -> str:
    why = ""
    if task["retry_count"] or task["snooze_count"]:
        what = f"retry {task['retry_count']} of {task['max_retry_count']}" if task["retry_count"] else "snoozed"
        why = f" ({what}: {task['error_message'] or 'no message'})"
    return f"the task is due at {task['next_run_at']}{why}"


def _held_back(lane: Row | None, batch: Row | None) -> tuple[str, str] | None:
    """What holds it whatever the devices do: a paused batch, a paused or closed lane."""
    if batch is not None and batch["state"] != "open":
        return "batch_paused", f"batch {batch['name']} is {batch['state']}{_because(batch['reason'])}; resume it"
    if lane is not None and lane["paused"]:
        return "lane_paused", f"its lane is paused{_because(lane['paused_reason'])}; resume it"
    if lane is not None and lane["is_closed"]:
        return "lane_closed", f"its lane is closed until {lane['closed_until']}{_because(lane['closed_reason'])}"
    return None


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _exclusion(task: Row, device: Row, is_asking: Callable[[str], bool]) -> _Exclusion | None:
    """What keeps this task from this device now, the lasting causes first."""
    device_id = device["device_id"]
    if task["pinned_device_id"] and task["pinned_device_id"] != device_id:
        return _Exclusion("wrong_device", f"the task is pinned to {task['pinned_device_id']}")
    if task["task_type"] not in device["task_types"]:
        return _Exclusion("no_device_runs_type", f"does not run task type {task['task_type']}")
    missing = sorted(set(task["required_tags"]) - set(device["tags"]))
    if missing:
        return _Exclusion("no_device_has_tags", f"lacks the tag {', '.join(missing)}")
    if device["status"] in ("offline", "disabled", "draining", "conflict"):
        return _Exclusion("no_device_online", f"is {device['status']}{_because(device['wanted_reason'])}")
    if not is_asking(device_id):
        slots = f"{device['assigned_count']} of {device['max_concurrent_tasks']} slots are taken"
        return _Exclusion("all_busy", f"is not asking for work ({slots})")
    return None


def _no_device(task: Row, exclusions: list[_Exclusion | None]) -> tuple[str, str]:
    """The nearest miss of all devices: one that is busy says more than one of another type."""
    task_type = task["task_type"]
    if not exclusions:
        return "no_device", "no device is registered; start one: python worker.py --device-id NAME"
    if None in exclusions:
        return "next_dispatch", "a fitting device is asking; the task goes out with the next dispatch"
    met = [exclusion for exclusion in exclusions if exclusion is not None]
    nearest = max(met, key=lambda exclusion: REASONS.index(exclusion.reason))
    n = sum(1 for exclusion in met if exclusion.reason == nearest.reason)
    tags = ", ".join(task["required_tags"])
    sentences = {
        "wrong_device": f"the task is pinned to {task['pinned_device_id']}, which is not registered",
        "no_device_runs_type": f"none of the {len(met)} devices runs task type {task_type}; start one that does",
        "no_device_has_tags": f"no device that runs {task_type} has the tags {tags}",
        "no_device_online": f"{_devices(n)} could run it, but it {nearest.because}"
        if n == 1
        else f"{_devices(n)} could run it, but none of them is online and active",
        "all_busy": f"{_devices(n)} could run it, and all slots are taken; it goes to the first that is free",
    }
    return nearest.reason, sentences[nearest.reason]


def _devices(n: int) -> str:
    return "1 device" if n == 1 else f"{n} devices"
