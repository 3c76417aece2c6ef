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
    "all_paused",
    "type_paused",
    "batch_paused",
    "lane_paused",
    "lane_moving",
    "limit_closed",
    "limit_starts",
    "limit_running",
    "no_device",
    "wrong_device",
    "no_device_runs_type",
    "no_device_has_tags",
    "no_device_online",
    "all_busy",
    "waits_for_device",
    "next_dispatch",
)


class Explanation(NamedTuple):
    """`devices` has a line for each device: {device_id, excluded_because}, None when nothing excludes it.

    `limit` is the limit that holds the task, as backlog.py gives it; with it, `next_look_seconds` None means: when one
    of its tasks ends. Of a scheduled task: the seconds until it is due, and the limit that would hold it if it were.
    """

    reason: str
    detail: str
    devices: list[dict[str, str | None]]
    limit: Row | None = None
    next_look_seconds: float | None = None


class _Exclusion(NamedTuple):
    reason: str
    because: str


def explain(
    task: Row,
    lane: Row | None,
    batch: Row | None,
    devices: Sequence[Row],
    is_asking: Callable[[str], bool],
    pauses: Sequence[Row] = (),
    dispatch_interval: float | None = None,
    due_seconds: float | None = None,
) -> Explanation:
    """All rows as reads.py and backlog.py give them. The most general cause wins: a pause before a busy fleet.

    due_seconds: until a scheduled task is due.
    """
    limit = next((limit for limit in lane["limits"] if limit["held_by"]), None) if lane is not None else None
    if task["status"] == "scheduled":
        detail = _scheduled(task) + (f"; meanwhile {_limited(limit)[1]}" if limit is not None else "")
        return Explanation("scheduled", detail, [], limit, due_seconds)
    if task["status"] != "pending":
        return Explanation("not_waiting", f"the task is {task['status']}; it does not wait for a device", [])
    exclusions = {device["device_id"]: _exclusion(task, lane, device, is_asking) for device in devices}
    lines = [
        {"device_id": device_id, "excluded_because": exclusion.because if exclusion else None}
        for device_id, exclusion in exclusions.items()
    ]
    paused = _paused(task, lane, batch, pauses)
    if paused:
        return Explanation(*paused, lines)
    if limit is not None:
        return Explanation(*_limited(limit), lines, limit, limit["next_look_seconds"])
    return Explanation(*_no_device(task, list(exclusions.values())), lines, None, dispatch_interval)


def _scheduled(task: Row) -> str:
    why = ""
    if task["retry_count"] or task["snooze_count"]:
        what = f"retry {task['retry_count']} of {task['max_retry_count']}" if task["retry_count"] else "snoozed"
        why = f" ({what}: {task['error_message'] or 'no message'})"
    return f"the task is due at {task['next_run_at']}{why}"


def _paused(task: Row, lane: Row | None, batch: Row | None, pauses: Sequence[Row]) -> tuple[str, str] | None:
    """What a person holds back, whatever devices and limits say; and a lane that is being left."""
    for pause in pauses:
        if pause["scope"] == "all":
            return "all_paused", f"everything is paused{_because(pause['reason'])}; resume it"
        if pause["scope"] == "type" and pause["name"] == task["task_type"]:
            return "type_paused", f"task type {pause['name']} is paused{_because(pause['reason'])}; resume it"
    if batch is not None and batch["state"] != "open":
        return "batch_paused", f"batch {batch['name']} is {batch['state']}{_because(batch['reason'])}; resume it"
    if lane is not None and lane["paused"]:
        return "lane_paused", f"its lane {lane['id']} is paused{_because(lane['paused_reason'])}; resume it"
    if lane is not None and lane["is_stale"]:
        return "lane_moving", "the limits were changed; it goes to its new place in the queue in a moment"
    return None


def _limited(limit: Row) -> tuple[str, str]:
    """Which number of a limit is reached, and what opens it."""
    what = f"limit {limit['name']}" + (f" for {', '.join(limit['value'])}" if limit["value"] else "")
    if limit["held_by"] == "closed":
        return "limit_closed", f"{what} is closed until {limit['closed_until']}{_because(limit['closed_reason'])}"
    if limit["held_by"] == "max_running":
        return (
            "limit_running",
            f"{what}: {limit['running']} of {limit['max_running']} run; it goes when one of them ends",
        )
    if limit["held_by"] == "max_starts":
        n = f"{limit['starts_in_window']} of {limit['max_starts']} starts in {limit['window_seconds']:g} s"
        return "limit_starts", f"{what}: {n} are used up"
    n = f"{limit['starts_today']} of {limit['max_starts_per_day']} starts"
    return "limit_starts", f"{what}: {n} of this day (UTC) are used up"


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _exclusion(task: Row, lane: Row | None, device: Row, is_asking: Callable[[str], bool]) -> _Exclusion | None:
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
    prefers = lane["prefers"] if lane is not None else None
    if prefers and prefers["device_id"] != device_id:
        because = f"the task waits for {prefers['device_id']}, for {prefers['seconds']:.0f} s more"
        return _Exclusion("waits_for_device", because)
    if device["problem"] == "failing" and device["assigned_count"]:
        because = f"failed {device['consecutive_failures']} tasks in a row, so it gets one at a time until it succeeds"
        return _Exclusion("all_busy", because)
    if not is_asking(device_id):
        taken = min(device["assigned_count"], device["max_concurrent_tasks"])
        slots = f"{taken} of {device['max_concurrent_tasks']} slots are taken"
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
        "no_device_runs_type": (f"none of the {n} devices runs" if n > 1 else "the only device does not run")
        + f" task type {task_type}; start one that does",
        "no_device_has_tags": f"no device that runs {task_type} has the tags {tags}",
        "no_device_online": f"{_devices(n)} could run it, but it {nearest.because}"
        if n == 1
        else f"{_devices(n)} could run it, but none of them is online and active",
        "waits_for_device": nearest.because + ", then it goes to any other",
        "all_busy": f"{_devices(n)} could run it, but it {nearest.because}"
        if n == 1
        else f"{_devices(n)} could run it, and all slots are taken; it goes to the first that is free",
    }
    return nearest.reason, sentences[nearest.reason]


def _devices(n: int) -> str:
    return "1 device" if n == 1 else f"{n} devices"
