"""Which tasks were executed, by whom and when, whatever the master's books say?

An executor for the torture bench, loaded by the shipped worker.py. Each execution has a random token. It appends one
line to the file TORTURE_WITNESS when it begins and one when it ends (O_APPEND, one write each, on the clock that all
processes of a machine share), and the token is its result: so a result can be traced to the execution that made it.

task_data: {key, seconds, act}; act is "", fail or snooze (on the first attempt), or spawn (one new task comes of it).
"""

from __future__ import annotations

import json
import os
import secrets
import time
from typing import Any, Union

from executors.task_executor import DoNotRetry, Result, Retry, Snooze, TaskExecutor

BOOT = secrets.token_hex(4)


def note(**facts: Any) -> None:
    """One line more, whole or not at all."""
    line = json.dumps({"t": time.monotonic(), **facts}) + "\n"
    descriptor = os.open(os.environ["TORTURE_WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class WitnessExecutor(TaskExecutor):
    isolation = "thread"

    def __init__(self) -> None:
        super().__init__("torture")

    def execute_task(self, task_data: dict[str, Any]) -> Union[dict[str, Any], Result]:
        task, token = self.context.task, secrets.token_hex(8)
        facts = {
            "token": token,
            "task": task["id"],
            "assignment": task["assignment_id"],
            "username": task.get("username"),
            "device": self.context.settings["device_id"],
            "boot": BOOT,
        }
        note(e="begin", **facts)
        end = time.monotonic() + task_data["seconds"]
        while (left := end - time.monotonic()) > 0:
            if self.context.cancelled:
                note(e="cut", **facts)
                raise DoNotRetry("cancelled")
            time.sleep(min(0.05, left))
        note(e="end", **facts)
        is_first = task.get("attempt", 1) <= 1
        if task_data["act"] == "fail" and is_first:
            raise Retry("asked for", after=0.2)
        if task_data["act"] == "snooze" and is_first:
            raise Snooze(0.2, "asked for")
        if task_data["act"] != "spawn":
            return {"token": token}
        child = {**task_data, "key": child_of(task_data["key"]), "act": ""}
        return Result({"token": token}, [{"task_type": "torture", "unique_key": child["key"], "task_data": child}])


def child_of(key: str) -> str:
    return f"{key}/child"
