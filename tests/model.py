"""What should become of a task? The contract of db.py's first screen once more, in plain Python.

Written from the promises and not from the code: no SQL, no lanes, no counters that are carried along. What can be
counted is counted anew each time it is asked for. tests/test_model.py does everything to this and to the real store,
and compares.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

ACTIVE = ("assigned", "running")
FINAL = ("completed", "failed", "cancelled")
BY_SWEEP = ("timeout", "poison", "gave_up")
DAY = 86400.0

Holding = tuple[tuple[int, str, str], ...]
"""(assignment, lease, phase) for each that a device holds"""


@dataclass
class Task:
    id: int
    batch: str
    unique_key: str | None
    priority: int
    max_retry_count: int
    execution_timeout: int
    give_up_at: float
    status: str
    next_run_at: float | None = None
    pinned_device_id: str | None = None
    retry_count: int = 0
    lost_count: int = 0
    snooze_count: int = 0
    attempt_count: int = 0
    assignment_id: int | None = None
    assigned_device_id: str | None = None
    avoid_device_id: str | None = None
    end_reason: str | None = None
    finished_at: float | None = None
    result: str | None = None
    acceptances: int = 0
    """completions that were accepted; not a column"""


@dataclass
class Attempt:
    id: int
    task_id: int
    device_id: str
    lease_id: str
    pull_seq: int | None
    assigned_at: float
    deadline_at: float | None
    delivered_at: float | None
    status: str = "assigned"
    error_type: str | None = None
    late_outcome: str | None = None
    waits_ahead: bool = False
    """went out ahead of a free slot, and has not begun; not a column"""


@dataclass
class Device:
    boot: int = 0
    boot_at: float = 0.0
    is_there: bool = False
    seen: float = 0.0
    """its last word to this life of the master"""
    previous_beat: tuple[float, frozenset[int]] = (0.0, frozenset())
    cancels: list[int] = field(default_factory=list)
    completed: int = 0
    failed: int = 0
    lost: int = 0
    failures_in_a_row: int = 0


class Model:
    """`now` is steady, `wall` is the clock on the wall; `watching_since` is the start of this life of the master."""

    def __init__(self, now: float, devices: tuple[str, ...], device_timeout: float) -> None:
        self.now = self.watching_since = now
        self.wall_offset = 0.0
        self.device_timeout = device_timeout
        self.tasks: dict[int, Task] = {}
        self.attempts: dict[int, Attempt] = {}
        self.devices = {name: Device() for name in devices}
        self.next_task_id = 1
        self.last_assignment_id = 0
        self.paused: set[str] = set()
        self.batches: set[str] = set()
        self.minutes: Counter[str] = Counter()

    @property
    def wall(self) -> float:
        return self.now + self.wall_offset

    # -- questions --------------------------------------------------------------------------------------------

    def with_key(self, batch: str, key: str | None) -> Task | None:
        if key is None:
            return None
        return next((t for t in self.tasks.values() if (t.batch, t.unique_key) == (batch, key)), None)

    def held_by(self, device_id: str) -> list[Attempt]:
        return [a for a in self.attempts.values() if a.device_id == device_id and a.status in ACTIVE]

    def waiting_for(self, device_id: str) -> list[Task]:
        """What this device could get now, the first to go first."""
        fitting = [
            t
            for t in self.tasks.values()
            if t.status == "pending" and t.pinned_device_id in (None, device_id) and t.batch not in self.paused
        ]
        return sorted(fitting, key=lambda t: (-t.priority, t.id))

    # -- submitting -------------------------------------------------------------------------------------------

    def submit(self, new: dict[str, Any]) -> tuple[int, bool, str]:
        batch, key = new.get("batch", ""), new.get("unique_key")
        if batch:
            self.batches.add(batch)
        known = self.with_key(batch, key)
        if known is not None:
            if new.get("requeue_if_failed") and known.status == "failed":
                self.requeue(known.id)
            return known.id, False, known.status
        run_at = new.get("run_at")
        is_later = run_at is not None and run_at > self.wall
        task = Task(
            id=self.next_task_id,
            batch=batch,
            unique_key=key,
            priority=new.get("priority", 5),
            max_retry_count=new.get("max_retry_count", 3),
            execution_timeout=new.get("execution_timeout", 3600),
            give_up_at=(run_at if is_later else self.wall) + new.get("give_up_seconds", 7 * DAY),
            status="scheduled" if is_later else "pending",
            next_run_at=run_at if is_later else None,
            pinned_device_id=new.get("pinned_device_id"),
        )
        self.next_task_id += 1
        self.tasks[task.id] = task
        return task.id, True, task.status

    def promote(self) -> None:
        for task in self.tasks.values():
            if task.status == "scheduled" and (task.next_run_at or 0.0) <= self.wall:
                task.status, task.next_run_at = "pending", None

    def pin(self, task_id: int, device_id: str) -> str | None:
        task = self.tasks.get(task_id)
        if task is None or task.status not in ("pending", "scheduled"):
            return None
        task.pinned_device_id = device_id
        return task.status

    # -- one attempt ------------------------------------------------------------------------------------------

    def assign(self, task_id: int, device_id: str, assignment_id: int, lease_id: str, pull_seq: int | None,
               start_within: float | None = None) -> None:  # fmt: skip
        task = self.tasks[task_id]
        assert task.status == "pending", f"task {task_id} was given away while {task.status}"
        assert assignment_id > self.last_assignment_id, "the number of an attempt came again"
        assert all(a.lease_id != lease_id for a in self.attempts.values()), "a lease came again"
        self.last_assignment_id = assignment_id
        is_ahead = start_within is not None
        seconds = 5.0 + 2.0 if is_ahead else task.execution_timeout + 30.0
        self.attempts[assignment_id] = Attempt(
            assignment_id, task_id, device_id, lease_id, pull_seq, self.now, self.now + seconds,
            self.now if pull_seq is None else None, waits_ahead=is_ahead,
        )  # fmt: skip
        task.status, task.assignment_id, task.assigned_device_id = "assigned", assignment_id, device_id
        task.attempt_count += 1
        kept = sorted(a.id for a in self.attempts.values() if a.task_id == task_id)[-20:]
        self.attempts = {n: a for n, a in self.attempts.items() if a.task_id != task_id or n in kept}

    def judge(self, device_id: str, assignment_id: int, lease_id: str, outcome: str, **facts: Any) -> str:
        """What a report is answered; it has its effect."""
        attempt = self.attempts.get(assignment_id)
        if attempt is None or attempt.device_id != device_id:
            return "gone"
        task = self.tasks[attempt.task_id]
        if attempt.lease_id != lease_id:
            return "stale"
        is_settled = attempt.late_outcome is not None or attempt.status in ("completed", "failed", "snoozed")
        if is_settled or (outcome in ("running", "released") and attempt.status == outcome):
            return "duplicate"
        if task.status == "cancelled":
            return "gone"
        is_final = task.status == "completed" or (task.status == "failed" and task.end_reason not in BY_SWEEP)
        if task.assignment_id != attempt.id or is_final:
            if outcome != "running":
                attempt.late_outcome = outcome
            return "stale"
        verbs = {"running": self._start, "completed": self._complete, "failed": self._fail, "snoozed": self._snooze,
                 "released": self._hand_back}  # fmt: skip
        return "accepted" if verbs[outcome](task, attempt, facts) else "stale"

    def _start(self, task: Task, attempt: Attempt, facts: dict[str, Any]) -> bool:
        if task.status not in ("assigned", "pending", "scheduled"):
            return False
        if attempt.error_type == "lost":
            task.lost_count -= 1  # it was not lost after all
        task.status, task.assigned_device_id, task.next_run_at = "running", attempt.device_id, None
        attempt.status, attempt.error_type, attempt.waits_ahead = "running", None, False
        attempt.deadline_at = self.now + task.execution_timeout + 30.0
        attempt.delivered_at = self.now if attempt.delivered_at is None else attempt.delivered_at
        return True

    def _complete(self, task: Task, attempt: Attempt, facts: dict[str, Any]) -> bool:
        if attempt.status not in ACTIVE:
            attempt.late_outcome = "completed"
        self._end(task, "completed", None)
        task.acceptances += 1
        task.result = facts.get("result") or task.result
        task.assigned_device_id = attempt.device_id
        self._settle(attempt, "completed")
        device = self.devices[attempt.device_id]
        device.completed += 1
        device.failures_in_a_row = 0
        self.minutes["completed"] += 1
        for new in facts.get("new_tasks", ()):
            self.submit({"max_retry_count": task.max_retry_count, **new})
        return True

    def _fail(self, task: Task, attempt: Attempt, facts: dict[str, Any]) -> bool:
        if attempt.status not in ACTIVE:
            attempt.late_outcome = "failed"
            if attempt.error_type == "lost":  # what looked like a loss was an ordinary failure
                task.lost_count -= 1
                task.retry_count += 1
            return True
        self._retry_or_fail(task, attempt, "failed", **facts)
        self._settle(attempt, "failed")
        device = self.devices[attempt.device_id]
        device.failed += 1
        device.failures_in_a_row += 1
        self.minutes["failed"] += 1
        return True

    def _retry_or_fail(self, task: Task, attempt: Attempt, reason: str, *, can_retry: bool = True,
                       delay_seconds: float | None = None) -> None:  # fmt: skip
        if delay_seconds is None:  # 15, 30, 60 s ..., at most an hour
            delay_seconds = min(15.0 * 2**task.retry_count, 3600.0)
        if not can_retry or task.retry_count >= task.max_retry_count:
            self._end(task, "failed", reason)
        elif self.wall + delay_seconds > task.give_up_at:
            self._end(task, "failed", "gave_up")
        else:
            task.retry_count += 1
            task.avoid_device_id, task.assigned_device_id = attempt.device_id, None
            task.status, task.next_run_at = "scheduled", self.wall + delay_seconds

    def _snooze(self, task: Task, attempt: Attempt, facts: dict[str, Any]) -> bool:
        if attempt.status not in ACTIVE:
            attempt.late_outcome = "snoozed"
            return True
        next_run_at = self.wall + facts["delay_seconds"]
        if next_run_at > task.give_up_at:
            self._end(task, "failed", "gave_up")
        else:
            task.status, task.next_run_at = "scheduled", next_run_at
        task.snooze_count += 1
        task.assigned_device_id = None
        self._settle(attempt, "snoozed")
        self.minutes["snoozed"] += 1
        return True

    def _hand_back(self, task: Task, attempt: Attempt, facts: dict[str, Any]) -> bool:
        return self.release(attempt, "handed_back")

    def release(self, attempt: Attempt, reason: str) -> bool:
        """lost, timeout, or one that counts nowhere. False: it was not active any more."""
        task = self.tasks[attempt.task_id]
        if task.assignment_id != attempt.id or task.status not in ACTIVE:
            return False
        device = self.devices[attempt.device_id]
        if (reason == "lost" and task.status != "running") or (reason == "timeout" and attempt.waits_ahead):
            reason = "never_started"
        if reason == "timeout":
            self._retry_or_fail(task, attempt, "timeout")
            device.failed += 1
            device.failures_in_a_row += 1
            self.minutes["failed"] += 1
            self._settle(attempt, "timeout", "timeout")
            return True
        if reason == "lost":
            task.lost_count += 1
            device.lost += 1
            self.minutes["lost"] += 1
        self._settle(attempt, "released", reason)
        victims = {a.device_id for a in self.attempts.values() if a.task_id == task.id and a.error_type == "lost"}
        if reason == "lost" and (len(victims) >= 3 or task.lost_count >= 5):
            self._end(task, "failed", "poison")
        else:
            task.status, task.assigned_device_id = "pending", None
            if reason == "lost":
                task.avoid_device_id = attempt.device_id
        return True

    def _settle(self, attempt: Attempt, status: str, error_type: str | None = None) -> None:
        attempt.status, attempt.error_type, attempt.deadline_at = status, error_type, None
        attempt.waits_ahead = False

    def _end(self, task: Task, status: str, reason: str | None) -> None:
        task.status, task.end_reason, task.finished_at, task.next_run_at = status, reason, self.now, None

    # -- a person ---------------------------------------------------------------------------------------------

    def cancel(self, task_id: int) -> str | None:
        task = self.tasks.get(task_id)
        if task is None or task.status in FINAL:
            return None
        if task.status in ACTIVE:
            attempt = self.attempts[task.assignment_id or 0]
            self._settle(attempt, "cancelled")
            self.devices[attempt.device_id].cancels.append(attempt.id)
        self._end(task, "cancelled", "cancelled")
        return "cancelled"

    def requeue(self, task_id: int) -> str | None:
        task = self.tasks.get(task_id)
        if task is None or task.status not in ("failed", "cancelled"):
            return None
        task.retry_count = task.lost_count = task.snooze_count = 0
        task.status, task.end_reason, task.finished_at = "pending", None, None
        task.avoid_device_id = task.assigned_device_id = None
        task.give_up_at = self.wall + 7 * DAY
        for attempt in self.attempts.values():
            if attempt.task_id == task_id and attempt.error_type == "lost":
                attempt.error_type = "lost_before_requeue"
        return "pending"

    def forget(self, finished_before: float) -> None:
        gone = {t.id: t.batch for t in self.tasks.values() if (t.finished_at or finished_before) < finished_before}
        self.tasks = {n: t for n, t in self.tasks.items() if n not in gone}
        self.attempts = {n: a for n, a in self.attempts.items() if a.task_id not in gone}
        empty = set(gone.values()) - {t.batch for t in self.tasks.values()}
        self.batches -= empty
        self.paused -= empty

    # -- devices ----------------------------------------------------------------------------------------------

    def hear(self, device_id: str) -> None:
        self.devices[device_id].seen = self.now

    def acknowledge(self, device_id: str, pull_seq: int) -> list[Attempt]:
        """The replies up to this one have arrived; what is in a later one has to be sent again."""
        held = self.held_by(device_id)
        for attempt in held:
            if attempt.delivered_at is None and (attempt.pull_seq or 0) <= pull_seq:
                attempt.delivered_at = self.now
        return [attempt for attempt in held if attempt.delivered_at is None]

    def register(self, device_id: str, boot: int, holding: Holding) -> list[int]:
        """What of `holding` it has to stop."""
        device = self.devices[device_id]
        if boot != device.boot or not device.is_there:
            device.boot, device.boot_at, device.previous_beat = boot, self.now, (0.0, frozenset())
            for attempt in self.held_by(device_id):
                if (attempt.id, attempt.lease_id) not in {(n, lease) for n, lease, _ in holding}:
                    self.release(attempt, "lost")
        device.is_there = True
        self.hear(device_id)
        return self._judge_holding(device_id, holding)

    def beat(self, device_id: str, holding: Holding | None) -> list[int]:
        device = self.devices[device_id]
        self.hear(device_id)
        if holding is None:  # a sign of life, by somebody who cannot say what it holds
            for attempt in self.held_by(device_id):
                is_delivered = attempt.delivered_at is not None and attempt.delivered_at < self.now
                if attempt.status == "assigned" and attempt.assigned_at < self.now - 30.0 and not is_delivered:
                    self.release(attempt, "lost")
            return []
        beat_at, missing_before = device.previous_beat
        missing = [a for a in self.held_by(device_id) if a.id not in {n for n, _, _ in holding}]
        for attempt in missing:
            was_there = attempt.delivered_at is not None and attempt.delivered_at < beat_at
            if attempt.id in missing_before and was_there:
                self.release(attempt, "lost")
        device.previous_beat = (self.now, frozenset(a.id for a in missing))
        return self._judge_holding(device_id, holding)

    def _judge_holding(self, device_id: str, holding: Holding) -> list[int]:
        return [n for n, lease, phase in holding if not self._is_theirs(device_id, n, lease, phase)]

    def _is_theirs(self, device_id: str, assignment_id: int, lease_id: str, phase: str) -> bool:
        attempt = self.attempts.get(assignment_id)
        if attempt is None or (attempt.device_id, attempt.lease_id) != (device_id, lease_id):
            return False
        if phase == "reporting":
            return True
        task = self.tasks[attempt.task_id]
        if task.assignment_id != attempt.id or task.status in FINAL:
            return False
        if phase == "running" and attempt.status != "running":
            return self.judge(device_id, assignment_id, lease_id, "running") == "accepted"
        return attempt.status in ACTIVE

    def say_goodbye(self, device_id: str) -> None:
        for attempt in self.held_by(device_id):
            self.release(attempt, "handed_back")
        device = self.devices[device_id]
        device.is_there, device.seen, device.previous_beat = False, self.now, (0.0, frozenset())

    # -- time, and the master's own lives ---------------------------------------------------------------------

    def sweep(self) -> None:
        """What time alone does."""
        self.promote()
        if self.now - self.watching_since >= min(60.0, self.device_timeout):
            for attempt in [a for a in self.attempts.values() if a.status in ACTIVE]:
                if (attempt.deadline_at or 0.0) < self.now:
                    self.release(attempt, "timeout")
        for device_id, device in self.devices.items():
            if self.now - max(device.seen, self.watching_since) > self.device_timeout:
                reason = "lost" if device.seen >= self.watching_since else "silent_since_start"
                for attempt in self.held_by(device_id):
                    self.release(attempt, reason)

    def begin_again(self, jump: float) -> None:
        """The master was killed, and starts again; its machine's clock was set meanwhile."""
        self.now += jump
        self.watching_since = self.now
        for attempt in self.attempts.values():
            if attempt.status in ACTIVE and not attempt.waits_ahead and attempt.deadline_at is not None:
                attempt.deadline_at += jump
        for device in self.devices.values():
            device.seen, device.previous_beat, device.cancels = 0.0, (0.0, frozenset()), []
