"""What does this device hold, and has it room?"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Iterable, Optional

from executors.device.link import number
from executors.device.machine import boot_clock
from executors.device.spool import Report

log = logging.getLogger("worker")

REMEMBERED_ASSIGNMENTS = 10_000
SHORTEST_PATIENCE_SECONDS = 240.0
QUEUED, RUNNING, REPORTING, GONE = "queued", "running", "reporting", "gone"


@dataclass(eq=False)
class Held:
    """One assignment, from its delivery until its report is acknowledged."""

    assignment_id: Any
    lease_id: str
    task: dict[str, Any]
    delivered: float  # boot_clock
    phase: str = QUEUED
    started: float = 0.0  # monotonic
    is_start_told: bool = False
    cancelled: Optional[float] = None  # monotonic
    is_replaced: bool = False  # its thread was left behind: a new one has the slot
    progress: Optional[float] = None
    message: str = ""
    is_progress_told: bool = True

    def is_cancelled(self) -> bool:
        """What the executor asks: cancelled, out of time, or handed back."""
        return self.cancelled is not None or self.phase != RUNNING

    def note_progress(self, fraction: float, message: str) -> None:
        self.progress, self.message, self.is_progress_told = fraction, message, False

    def is_too_late(self) -> bool:
        within = number(self.task.get("start_within_seconds"), float("inf"), 0, float("inf"))
        return boot_clock() - self.delivered > within

    def __str__(self) -> str:
        task = self.task
        return f"task={task.get('id')} type={task.get('task_type')} attempt={task.get('attempt')}"


class Holding:
    """What does this device hold, and has it room? Every change of phase is here, under one lock."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.changed = threading.Condition()
        self._held: dict[Any, Held] = {}
        self._recent: deque[Any] = deque(maxlen=REMEMBERED_ASSIGNMENTS)
        self._known: set[Any] = set()
        self._queue: list[tuple[float, int, Held]] = []  # a heap: by priority, then in order of delivery
        self._serials = itertools.count()
        self.busy_count = 0  # queued or running
        self._low_mark = slots - 1  # of busy_count: below it the device asks for more

    def add(self, tasks: Iterable[dict[str, Any]], delivered: float) -> list[Held]:
        """Those that are new; what was delivered before is not run again."""
        added = []
        with self.changed:
            for task in tasks:
                held = Held(task["assignment_id"], task["lease_id"], task, delivered)
                if held.assignment_id not in self._known and held.assignment_id not in self._held:
                    self._remember(held.assignment_id)
                    self._held[held.assignment_id] = held
                    priority = number(task.get("priority"), 5, -1e9, 1e9)
                    heapq.heappush(self._queue, (-priority, next(self._serials), held))
                    self.busy_count += 1
                    added.append(held)
            waiting = max(0, self.busy_count - self.slots)
            self._low_mark = self.slots - 1 + (waiting + 1) // 2
        return added

    def next_queued(self) -> Held:
        """The most urgent one that waits for a slot; call it once for each that was added."""
        with self.changed:
            return heapq.heappop(self._queue)[2]

    def _remember(self, assignment_id: Any) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._known.discard(self._recent[0])
        self._recent.append(assignment_id)
        self._known.add(assignment_id)

    def add_reported(self, report: Report) -> None:
        """A report of an earlier process, on its way again."""
        with self.changed:
            held = Held(report.assignment_id, report.lease_id, {}, boot_clock(), phase=REPORTING)
            self._held[report.assignment_id] = held

    def begin(self, held: Held) -> bool:
        """queued -> running; False if it was cancelled or handed back."""
        with self.changed:
            if held.phase != QUEUED:
                return False
            held.phase, held.started = RUNNING, time.monotonic()
            return True

    def settle(self, held: Held, *, leave_thread: bool = False) -> bool:
        """queued or running -> reporting, the slot is free. False: it was settled before, or cancelled: do not report.

        `leave_thread`: the task goes on in a thread that can no longer be waited for."""
        with self.changed:
            if held.phase not in (QUEUED, RUNNING):
                return False
            held.is_replaced = leave_thread and held.phase == RUNNING
            held.phase = REPORTING if held.cancelled is None else GONE
            if held.phase == GONE:
                del self._held[held.assignment_id]
            self.busy_count -= 1
            if self.is_low:
                self.changed.notify_all()
            return held.phase == REPORTING

    def forget(self, assignment_id: Any) -> None:
        """Its report is acknowledged."""
        with self.changed:
            held = self._held.get(assignment_id)
            if held is not None and held.phase == REPORTING:
                held.phase = GONE
                del self._held[assignment_id]

    def cancel(self, assignment_ids: Iterable[Any]) -> None:
        """The master gave these away or cancelled them: queued ones go now, running ones are asked to end."""
        for assignment_id in assignment_ids:
            with self.changed:
                held = self._held.get(assignment_id)
                if held is None or held.phase == REPORTING or held.cancelled is not None:
                    continue
                held.cancelled = time.monotonic()
                if held.phase == QUEUED:
                    self.settle(held)
            log.info("cancel %s", held)

    def room(self) -> int:
        return max(0, self.slots - self.busy_count)

    @property
    def is_low(self) -> bool:
        """A slot is free, or half of what waited for one at the last delivery has begun."""
        return self.busy_count <= self._low_mark

    def types_in(self, phase: str) -> list[str]:
        """The task type of each one that is queued, or running."""
        with self.changed:
            return [str(held.task.get("task_type")) for held in self._held.values() if held.phase == phase]

    def longest_timeout(self, default: float) -> float:
        """How long may a task that is here now go on? At least 4 minutes: one may have come this moment."""
        here = [number(held.task.get("execution_timeout_seconds"), default, 0, 1e9) for held in self.busy()]
        return max([SHORTEST_PATIENCE_SECONDS, *here])

    def busy(self) -> list[Held]:
        with self.changed:
            return [held for held in self._held.values() if held.phase in (QUEUED, RUNNING)]

    def has_progress_to_tell(self) -> bool:
        return any(not held.is_progress_told for held in self.busy())

    def as_holding(self) -> list[dict[str, Any]]:
        """holding[] of a beat."""
        with self.changed:
            everything = list(self._held.values())
        entries = []
        for held in everything:
            entry: dict[str, Any] = {
                "assignment_id": held.assignment_id,
                "lease_id": held.lease_id,
                "phase": held.phase,
            }
            if held.progress is not None and held.phase == RUNNING:
                held.is_progress_told = True
                entry.update(progress=held.progress, message=held.message)
            if held.phase != GONE:
                entries.append(entry)
        return entries
