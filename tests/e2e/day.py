"""A fleet to look at: two devices, a task in each state, and text that would do harm if a page ran it."""

from __future__ import annotations

from typing import Any, NamedTuple

HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\'"&lt;b&gt;'
VIEWS = ("overview", "tasks", "batches", "devices", "dispatch", "events", "system", "access", "new")


class Day(NamedTuple):
    """A master, the address of its dashboard, and the id of a task by its state."""

    master: Any
    url: str
    ids: dict[str, int]

    def addresses(self) -> list[str]:
        """Every view, and one of each kind of thing."""
        ones = (f"tasks/{self.ids['failed']}", f"tasks/{self.ids['pending']}", "batches/day", "devices/shop-1")
        return [f"{self.url}#/{name}" for name in (*VIEWS, *ones)]


def a_day_of_work(master: Any) -> Day:
    """Two devices, and a task in each state."""
    master.register("shop-1", device_name="Front desk", tags=["selectors"])
    master.register("shop-2", device_name="收银台")
    master.beat("shop-1", cpu_usage=97.0, memory_usage=88.0, disk_usage=12.5)
    names = ("completed", "failed", "running", "assigned")
    ids = {name: master.submit_one(batch="day", username=name) for name in names}
    completed, failed, running, _assigned = master.pull("shop-1", 4)
    master.report("shop-1", completed, "completed", result={"pages": 3}, duration_seconds=1.25)
    error = {"error_message": "403 Forbidden", "error_type": "HTTPError", "log_tail": "asking for the report"}
    master.report("shop-1", failed, "failed", duration_seconds=0.5, retry=False, **error)
    master.report("shop-1", running, "running")
    ids["scheduled"] = master.submit_one(delay_seconds=3600)
    ids["cancelled"] = master.submit_one()
    master.call("POST", f"/tasks/{ids['cancelled']}/cancel", {"reason": "wrong dates"})
    ids["pending"] = master.submit_one("unknown_type", username="pending", batch="day")
    return Day(master, master.url + "/", ids)


def a_hostile_day(master: Any) -> Day:
    """The same with HOSTILE in every field that somebody else writes."""
    master.register("shop-1", device_name=HOSTILE, device_type=HOSTILE, version=HOSTILE)
    master.call("PUT", "/devices/shop-1/status", {"status": "active", "reason": HOSTILE})
    master.beat("shop-1", problem=HOSTILE)
    names = dict.fromkeys(("username", "app_id", "batch", "unique_key"), HOSTILE)
    failed = master.submit_one(**names, task_data={HOSTILE: HOSTILE})
    [task] = master.pull("shop-1")
    texts = dict.fromkeys(("error_message", "error_type", "log_tail"), HOSTILE)
    master.report("shop-1", task, "failed", retry=False, result={HOSTILE: HOSTILE}, **texts)
    cancelled = master.submit_one()
    master.call("POST", f"/tasks/{cancelled}/cancel", {"reason": HOSTILE})
    pending = master.submit_one(**names)
    master.call("POST", "/system/pause", {"reason": HOSTILE})
    return Day(master, master.url + "/", {"failed": failed, "cancelled": cancelled, "pending": pending})
