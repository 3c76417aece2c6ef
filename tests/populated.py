"""A master that holds something of every kind, so that whatever is asked of it leads somewhere."""

from __future__ import annotations

import hashlib

from farm import Master

FILE = b"a file of a task"


def populate(master: Master) -> dict[str, str]:
    """What stands for the names in a path: device shop-1 holds task 3, left-1 has left, task 13 waits for ever."""
    master.register("shop-1", tags=["fast"])
    master.register("left-1")
    master.beat("left-1", leaving=True)
    for n in range(12):
        master.submit_one(batch="b", unique_key=f"key {n}", username="u", task_data={"n": n})
    waiting = master.submit_one("nobody", batch="b")
    done, failed, held = master.pull("shop-1", 3)
    name = {"name": "a.txt", "sha256": hashlib.sha256(FILE).hexdigest()}
    sender = {"device_id": "shop-1", "assignment_id": done["assignment_id"], "lease_id": done["lease_id"]}
    stored = master.api("PUT", "/tasks/artifacts", params={**sender, **name}, data=FILE,
                        headers={"Content-Type": "application/octet-stream"})  # fmt: skip
    assert stored.status_code == 200, stored.text
    master.report("shop-1", done, "completed", result={"x": 1}, artifacts=[{**name, "bytes": len(FILE)}])
    master.report("shop-1", failed, "failed", error_message="it broke", retry=False)
    master.beat("shop-1", seq=2, cpu_usage=3.5, memory_usage=40, disk_usage=50, holding=[
        {"assignment_id": held["assignment_id"], "lease_id": held["lease_id"], "phase": "running"}])  # fmt: skip
    master.call("PUT", "/limits", {"limits": [{"name": "l", "task_type": "echo", "key": "app_id", "max_running": 5}]})
    lane = master.get("/lanes")["lanes"][0]["id"]
    return {
        "device_id": "shop-1", "task_id": str(waiting), "artifact_id": "1", "name": "b", "lane_id": str(lane),
        "task_type": "echo", "file": "app.js", "key_id": "1", "lease_id": held["lease_id"],
    }  # fmt: skip
