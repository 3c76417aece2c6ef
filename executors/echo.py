"""How is a task done that only tries things out? It gives back what it got, and can be told to end in every way.

task_data: anything; it comes back as {"echo": task_data}. Four keys do more:
    sleep_seconds   wait so long first (it stops early when the task is cancelled)
    fail            raise an error with this text, which is retried
    fail_for_good   raise an error with this text, which is not retried
    snooze_seconds  come again after so many seconds, on the first attempt only
"""

from __future__ import annotations

import math
import time
from typing import Any

from executors.task_executor import DoNotRetry, Retry, Snooze, TaskExecutor


class EchoExecutor(TaskExecutor):
    isolation = "thread"

    def __init__(self) -> None:
        super().__init__("echo")

    def execute_task(self, task_data: dict[str, Any]) -> dict[str, Any]:
        self._sleep(task_data.get("sleep_seconds", 0))
        if task_data.get("fail_for_good"):
            raise DoNotRetry(str(task_data["fail_for_good"]))
        if task_data.get("fail"):
            raise Retry(str(task_data["fail"]))
        if task_data.get("snooze_seconds") and self.context.task.get("attempt", 1) <= 1:
            raise Snooze(task_data["snooze_seconds"], "asked for by snooze_seconds")
        return {"echo": task_data}

    def _sleep(self, seconds: Any) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise DoNotRetry(f"task_data.sleep_seconds is {seconds!r}: write a number of seconds from 0")
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.context.cancelled:
                raise DoNotRetry("cancelled while it slept")
            self.context.progress(1 - left / seconds)
            time.sleep(min(0.1, left))
