"""When did a task start on its device? An executor for the idle latency: its result is the moment it was called.

perf_counter is one clock for all processes of a machine (on Linux CLOCK_MONOTONIC), so submitter and device compare.
"""

from __future__ import annotations

import time
from typing import Any

from executors.task_executor import TaskExecutor


class MomentExecutor(TaskExecutor):
    isolation = "thread"  # as the executors that come with it

    def __init__(self) -> None:
        super().__init__("moment")

    def execute_task(self, task_data: dict[str, Any]) -> dict[str, Any]:
        return {"started": time.perf_counter()}
