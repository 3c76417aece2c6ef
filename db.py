"""What is a task, and how may it change?

  submit -> pending -> assigned -> running -> completed                              the usual life

  submit (later) -> scheduled --due--> pending --assign--> assigned --start--> running --complete--> completed
                        ^                 ^                   |                   |
                        |                 +----- release -----+-------------------+    device lost, handed back
                        +---- fail with retries left, snooze -+-------------------+
                                                                                  +-- fail, none left --> failed
  cancel: scheduled, pending, assigned, running -> cancelled        requeue (by a person): failed, cancelled -> pending

  scheduled   waits for its time (submitted for later, a retry, a snooze)
  pending     waits in its lane for a device that asks
  assigned    is in a reply to a device: one attempt, one row of af_task_assignment, one lease
  running     its device has confirmed the start
  completed   a report of the newest attempt was accepted          (final)
  failed      no retry left, or poison, timeout, gave_up           (final until a person requeues it)
  cancelled   a person took it back                                (final until a person requeues it)

An attempt's (id, lease_id) is the fencing token. judging.py judges each report by it: unknown attempt -> gone; another
lease -> stale; settled by this report before -> duplicate; cancelled -> gone; a newer attempt exists, or final by
another -> stale, kept on the attempt and never applied; else one guarded UPDATE -> accepted. A late success of the
newest attempt counts.

Every verb runs inside the writer's transaction and takes it as `tx`, which carries `now`: nothing here reads a clock.
Only `_move_all` writes a task's state. SQL for reading lists lives in reads.py, what a device is in devices.py.
"""

from __future__ import annotations

import json
import math
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, Protocol

import limits
from lanes import Lanes, bring_into_place
from schema import ACTIVE, TASK_STATES
from transaction import WRITER_ID, Tx

#                    verb       from states                                          to states
TRANSITIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "submit":       ((),                                                 ("pending", "scheduled")),
    "promote":      (("scheduled",),                                     ("pending",)),
    "assign":       (("pending",),                                       ("assigned",)),
    "start":        (("assigned", "pending", "scheduled"),               ("running",)),
    "complete":     (("running", "assigned", "pending", "scheduled", "failed"), ("completed",)),
    "fail":         (("running", "assigned"),                            ("scheduled", "failed")),
    "snooze":       (("running", "assigned"),                            ("scheduled", "failed")),
    "release":      (("running", "assigned"),                            ("pending", "scheduled", "failed")),
    "cancel":       (("scheduled", "pending", "assigned", "running"),    ("cancelled",)),
    "requeue":      (("failed", "cancelled"),                            ("pending",)),
}  # fmt: skip
STATES = TASK_STATES
FINAL = ("completed", "failed", "cancelled")
FAILED_BY_SWEEP = ("timeout", "poison", "gave_up")

GRACE_SECONDS = 30.0
"""The worker kills a task at its timeout; the master's sweep, this much later, is the backstop."""
START_WITHIN_SECONDS, GIVE_AWAY_SECONDS = 5.0, 2.0
"""What a device got ahead of a free slot it begins within this time, or never; so much later others may have it."""
LOST_ON_DEVICES_LIMIT, LOST_LIMIT = 3, 5
KEPT_ATTEMPTS = 20
SLOWEST_UPLOAD_BYTES = 16 * 1024
"""A second: a device that sends its files slower than this is cut off by itself, and its lease runs out here."""
BACKOFF_LIMIT_SECONDS = 3600.0


class NewTask(NamedTuple):
    """A task as submitted, already validated. `task_data` is JSON text; None takes the policy's default."""

    task_type: str
    task_data: str = "{}"
    username: str | None = None
    app_id: str | None = None
    start_date: str | None = None
    end_date: str | None = None
    priority: int = 5
    batch: str = ""
    unique_key: str | None = None
    parent_id: int | None = None
    run_at: float | None = None
    give_up_seconds: float | None = None
    execution_timeout: int | None = None
    max_retry_count: int | None = None
    required_tags: tuple[str, ...] = ()
    pinned_device_id: str | None = None
    prefer_device_id: str | None = None
    requeue_if_failed: bool = False
    max_batch_tasks: int | None = None
    same_device_as: str | None = None
    prefer_seconds: float | None = None


class Submitted(NamedTuple):
    """The answer to one submitted task; `status` is a task state, or batch_full or batch_cancelled with id None."""

    id: int | None
    created: bool
    status: str


class Artifact(NamedTuple):
    """A file that belongs to one attempt; sha256 in hex digits."""

    name: str
    bytes: int
    sha256: str


class Report(NamedTuple):
    """What a device says of one attempt; `outcome` names the verb by judging.REPORT_VERBS.

    `limit_closed_seconds`: it was told to stay away, so nothing of the task's limit keys is to be sent anywhere for so
    long; `limit_name` and `limit_key` say of which (limits.close_keys).
    """

    assignment_id: int
    lease_id: str
    outcome: str
    result: str | None = None
    error_message: str | None = None
    error_type: str | None = None
    log_tail: str | None = None
    duration_seconds: float | None = None
    progress: float | None = None
    can_retry: bool = True
    delay_seconds: float | None = None
    new_tasks: tuple[NewTask, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    limit_closed_seconds: float | None = None
    limit_name: str | None = None
    limit_key: tuple[str, ...] = ()


class Judged(NamedTuple):
    """The answer to one report: accepted, duplicate, gone, stale or artifacts_missing (with the names of the files
    that have to come first); and what became of its new tasks."""

    outcome: str
    task_id: int | None = None
    status: str | None = None
    new_tasks: tuple[Submitted, ...] = ()
    missing: tuple[str, ...] = ()


class Task(NamedTuple):
    """The part of a hot row that a verb needs to decide."""

    id: int
    task_type: str
    status: str
    batch: str
    lane_id: int
    priority: int
    execution_timeout: int
    max_retry_count: int
    retry_count: int
    lost_count: int
    attempt_count: int
    give_up_at: float
    next_run_at: float | None
    avoid_device_id: str | None
    assigned_device_id: str | None
    assignment_id: int | None
    end_reason: str | None


class Attempt(NamedTuple):
    """The part of an assignment that a verb needs to decide."""

    id: int
    task_id: int
    device_id: str
    lease_id: str
    status: str
    assigned_at: float
    started_at: float | None
    deadline_at: float | None
    error_type: str | None
    late_outcome: str | None

    @property
    def waits_ahead(self) -> bool:
        """It went out ahead of a free slot and has not begun: its deadline, nearer than any task's, is for that."""
        return self.status == "assigned" and (self.deadline_at or math.inf) < self.assigned_at + GRACE_SECONDS

    def start_within(self, now: float) -> float | None:
        """The seconds that are left to begin it; None where there is no hurry."""
        return max(0.0, (self.deadline_at or 0.0) - GIVE_AWAY_SECONDS - now) if self.waits_ahead else None


_TASK_SQL = f"SELECT {', '.join(Task._fields)} FROM af_crawl_tasks WHERE id = ?"
_ATTEMPT_SQL = f"SELECT {', '.join(Attempt._fields)} FROM af_task_assignment"
HELD = f"INDEXED BY attempt_holder WHERE status IN ({ACTIVE})"
"""After af_task_assignment: what devices hold now. Named, or SQLite reads a device's whole history instead."""


def get_task(tx: Tx, task_id: int) -> Task | None:
    row = tx.one(_TASK_SQL, (task_id,))
    return Task(*row) if row else None


def get_attempt(tx: Tx, assignment_id: int) -> Attempt | None:
    row = tx.one(_ATTEMPT_SQL + " WHERE id = ?", (assignment_id,))
    return Attempt(*row) if row else None


def active_attempts(tx: Tx, device_id: str) -> list[Attempt]:
    """What this device holds by the master's books, oldest first."""
    sql = f"{_ATTEMPT_SQL} {HELD} AND device_id = ? ORDER BY id"
    return [Attempt(*row) for row in tx.execute(sql, (device_id,))]


# -- the one writer of a state ------------------------------------------------------------------------------


class Standing(Protocol):
    """Where a task stands in the books: what `_move_all` asks of it."""

    @property
    def id(self) -> int: ...
    @property
    def assignment_id(self) -> int | None: ...
    @property
    def status(self) -> str: ...
    @property
    def task_type(self) -> str: ...
    @property
    def batch(self) -> str: ...
    @property
    def lane_id(self) -> int: ...


_books_of = attrgetter("task_type", "batch", "lane_id", "status")


def _move(tx: Tx, verb: str, task: Task, to_state: str, **columns: Any) -> bool:
    """Writes a task's state if it is still as `task` says; False means that somebody was faster."""
    if task.status not in TRANSITIONS[verb][0]:
        return False
    assignments = ", ".join(f"{column} = ?" for column in columns)
    return _move_all(tx, verb, [task], to_state, assignments, *columns.values()) == 1


def _move_all(tx: Tx, verb: str, tasks: Sequence[Standing], to_state: str, assignments: str, *values: Any) -> int:
    """The same for many, in one statement for each state that they come from; `assignments` is what else it sets.

    Returns how many were as they were said to be: where they are fewer, the caller must let the job be undone.
    """
    from_states, to_states = TRANSITIONS[verb]
    assert to_state in to_states, f"{verb} does not lead to {to_state}"
    assert all(task.status in from_states for task in tasks), f"{verb} does not come from every state here"
    attempts: defaultdict[str, dict[int, int | None]] = defaultdict(dict)
    for task in tasks:
        attempts[task.status][task.id] = task.assignment_id
    moved = 0
    for status, attempt_of in attempts.items():
        # The old state stands in the text: compared with a value, SQLite plans the statement anew at every execution.
        moved += tx.execute(
            f"UPDATE af_crawl_tasks SET status = ?, updated_at = ?, {assignments} FROM json_each(?) AS was"
            f" WHERE af_crawl_tasks.id = was.key AND status = '{status}' AND assignment_id IS was.value",
            (to_state, tx.now, *values, json.dumps(attempt_of)),
        ).rowcount
    if moved == len(tasks):
        for (task_type, batch, lane_id, status), n in Counter(map(_books_of, tasks)).items():
            tx.count(task_type, batch, status, -n)
            tx.count(task_type, batch, to_state, +n)
            tx.count_lane(lane_id, status, to_state, n)
    return moved


def _settle(tx: Tx, attempt: Attempt, status: str, report: Report | None = None, error_type: str | None = None) -> None:
    """Ends an attempt; what the report says of it is kept beside it."""
    r = report or Report(attempt.id, attempt.lease_id, status)
    tx.execute(
        "UPDATE af_task_assignment SET status = ?, completed_at = ?, deadline_at = NULL, duration_seconds = ?,"
        " error_message = ?, error_type = ?, log_tail = ? WHERE id = ?",
        (status, tx.now, r.duration_seconds, r.error_message, error_type or r.error_type, r.log_tail, attempt.id),
    )


# -- submit and promote --------------------------------------------------------------------------------------

_INSERT_TASKS = """INSERT INTO af_crawl_tasks (id, unique_key, lane_id, status, next_run_at, task_type, username,
 app_id, start_date, end_date, priority, batch, parent_id, give_up_at, execution_timeout, max_retry_count,
 required_tags, pinned_device_id, prefer_device_id, same_device_as, prefer_seconds, created_by, created_at, updated_at)
 SELECT key, value, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM json_each(?)"""


def submit(tx: Tx, tasks: Sequence[NewTask], created_by: str | None = None) -> list[Submitted]:
    """Stores new tasks, in order; a known (batch, unique_key) answers with the task that has it.

    Looking before inserting is no race here: one thread writes. The unique index stands behind it all the same.
    """
    batches = {name: _Batch(tx, name) for name in {task.batch for task in tasks} if name}
    known: dict[tuple[str, str], int] = {}
    next_id = first_id = _next_id(tx, "af_crawl_tasks")
    new: list[NewTask] = []
    answers: list[Submitted] = []
    for task in tasks:
        existing_id = _known_id(tx, task, known) if task.unique_key is not None else None
        refusal = batches[task.batch].refuses(task) if task.batch and existing_id is None else None
        if existing_id is not None and existing_id >= first_id:
            answers.append(Submitted(existing_id, False, _first_state(tx, new[existing_id - first_id])))
        elif existing_id is not None:
            answers.append(_existing(tx, task, existing_id))
        elif refusal is not None:
            answers.append(Submitted(None, False, refusal))
        else:
            new.append(task)
            if task.unique_key is not None:
                known[task.batch, task.unique_key] = next_id
            answers.append(Submitted(next_id, True, _first_state(tx, task)))
            next_id += 1
    if new:
        _insert_tasks(tx, first_id, new, created_by)
        tx.note("task", "submit", task=first_id, count=len(new), by=created_by)
    return answers


def _first_state(tx: Tx, task: NewTask) -> str:
    return "pending" if task.run_at is None or task.run_at <= tx.wall else "scheduled"


def _insert_tasks(tx: Tx, first_id: int, tasks: Sequence[NewTask], created_by: str | None) -> None:
    """Numbers them in order. Tasks are much alike, so one statement inserts all that differ in nothing but their id,
    unique_key and task_data; in the same lane they must be."""
    lanes = Lanes(tx)
    alike: defaultdict[Any, dict[int, str | None]] = defaultdict(dict)
    for task_id, task in enumerate(tasks, first_id):
        shared = _SHARED(task)
        if lanes.of_type(task.task_type)[1]:  # limits may go by its task_data
            shared = lanes.find(task), shared
        alike[shared][task_id] = task.unique_key
    for keys in alike.values():
        task = tasks[next(iter(keys)) - first_id]
        lane_id, status = lanes.find(task), _first_state(tx, task)
        columns = _columns_of(tx, task, status, created_by)
        tx.execute(_INSERT_TASKS, (lane_id, status, *columns, json.dumps(keys, ensure_ascii=False)))
        tx.count(task.task_type, task.batch, status, len(keys))
        tx.count_lane(lane_id, None, status, len(keys))
    tx.connection.executemany(
        "INSERT INTO af_task_payload (task_id, task_data) VALUES (?, ?)",
        [(task_id, task.task_data) for task_id, task in enumerate(tasks, first_id) if task.task_data != "{}"],
    )


def _columns_of(tx: Tx, task: NewTask, status: str, created_by: str | None) -> tuple[Any, ...]:
    """The values of _INSERT_TASKS from next_run_at on."""
    run_at = task.run_at if status == "scheduled" else None
    policy = tx.policy
    return (
        run_at, task.task_type, task.username, task.app_id, task.start_date, task.end_date, task.priority, task.batch,
        task.parent_id, (run_at or tx.wall) + (task.give_up_seconds or policy.give_up_seconds),
        task.execution_timeout or policy.task_timeout,
        policy.max_retry_count if task.max_retry_count is None else task.max_retry_count,
        json.dumps(sorted(task.required_tags)) if task.required_tags else "[]",
        task.pinned_device_id, task.prefer_device_id, task.same_device_as, task.prefer_seconds, created_by, tx.now,
        tx.now,
    )  # fmt: skip


_SHARED = itemgetter(*[n for n, name in enumerate(NewTask._fields) if name not in ("unique_key", "task_data")])


def _known_id(tx: Tx, task: NewTask, new_here: dict[tuple[str, str], int]) -> int | None:
    """The task that has this key already, in the table or earlier in this very call."""
    assert task.unique_key is not None
    if (task.batch, task.unique_key) in new_here:
        return new_here[task.batch, task.unique_key]
    sql = "SELECT id FROM af_crawl_tasks WHERE batch = ? AND unique_key = ?"
    row = tx.one(sql, (task.batch, task.unique_key))
    return row[0] if row else None


class _Batch:
    """A batch as one submit meets it: made if it is new, closed if it was cancelled, full at a task's own limit."""

    def __init__(self, tx: Tx, name: str) -> None:
        tx.execute("INSERT INTO af_batch (name, created_at) VALUES (?, ?) ON CONFLICT DO NOTHING", (name, tx.now))
        self.state = tx.one("SELECT state FROM af_batch WHERE name = ?", (name,))[0]
        self.size = batch_size(tx, name)

    def refuses(self, task: NewTask) -> str | None:
        """The answer's status when it does not take this task; else the task counts from now on."""
        if self.state == "cancelled":
            return "batch_cancelled"
        if task.max_batch_tasks is not None and self.size >= task.max_batch_tasks:
            return "batch_full"
        self.size += 1
        return None


def _existing(tx: Tx, task: NewTask, task_id: int) -> Submitted:
    status = tx.one("SELECT status FROM af_crawl_tasks WHERE id = ?", (task_id,))[0]
    if task.requeue_if_failed and status == "failed" and requeue(tx, task_id):
        status = "pending"
    return Submitted(task_id, False, status)


def batch_size(tx: Tx, batch: str) -> int:
    """How many kept tasks the batch has, in every state; exact also in the middle of a transaction."""
    sql = "SELECT COALESCE(SUM(n), 0) FROM af_count WHERE writer_id = ? AND scope = 'batch' AND name = ?"
    total: int = tx.one(sql, (WRITER_ID, batch))[0]
    return total + sum(n for (scope, name, _), n in tx._counts.items() if scope == "batch" and name == batch)


def _next_id(tx: Tx, table: str) -> int:
    row = tx.one("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
    return (row[0] if row else 0) + 1


def promote(tx: Tx, limit: int = 1000) -> int:
    """Scheduled tasks that are due become pending; at most `limit` a call, soonest first. Returns how many."""
    due = tx.execute(
        f"SELECT {', '.join(Task._fields)} FROM af_crawl_tasks"
        " WHERE status = 'scheduled' AND next_run_at <= ? ORDER BY next_run_at LIMIT ?",
        (tx.wall, limit),
    )
    tasks = [Task(*row) for row in due.fetchall()]
    for task in tasks:
        _move(tx, "promote", task, "pending", next_run_at=None)
        tx.note("task", "promote", task=task.id, status="pending")
    return len(tasks)


# -- one attempt: assign, start, complete, fail, snooze, release ---------------------------------------------


class Gift(NamedTuple):
    """To whom pending tasks go. `start_within`: no slot is free for them there, and they are taken back unless they
    begin so soon."""

    device_id: str
    pull_seq: int | None
    is_delivered: bool
    start_within: float | None = None


class Assigned(NamedTuple):
    assignment_id: int
    lease_id: str
    attempt: int


LEASE_BYTES = 16


def assign(tx: Tx, tasks: Sequence[Task], gift: Gift) -> list[Assigned]:
    """Gives pending tasks to a device: for each a new attempt with a new lease. None of them if one is not pending."""
    if not tasks or any(task.status != "pending" for task in tasks):
        return []
    first_id = _next_id(tx, "af_task_assignment")
    leases = secrets.token_bytes(LEASE_BYTES * len(tasks))
    ahead_seconds = None if gift.start_within is None else gift.start_within + GIVE_AWAY_SECONDS
    tx.execute(
        "INSERT INTO af_task_assignment (id, task_id, device_id, lease_id, pull_seq, assigned_at, delivered_at,"
        f" deadline_at) SELECT ?1 + key, task.id, ?2, lower(hex(substr(?3, key * {LEASE_BYTES} + 1, {LEASE_BYTES}))),"
        f" ?4, ?5, ?6, ?5 + COALESCE(?7, task.execution_timeout + {GRACE_SECONDS})"
        " FROM json_each(?8) CROSS JOIN af_crawl_tasks AS task ON task.id = value",
        (first_id, gift.device_id, leases, gift.pull_seq, tx.now, tx.now if gift.is_delivered else None,
         ahead_seconds, json.dumps([task.id for task in tasks])),
    )  # fmt: skip
    moved = _move_all(
        tx, "assign", tasks, "assigned",
        "assigned_device_id = ?, attempt_count = attempt_count + 1, assignment_id ="
        f" (SELECT id FROM af_task_assignment WHERE task_id = af_crawl_tasks.id AND status IN ({ACTIVE}))",
        gift.device_id,
    )  # fmt: skip
    if moved != len(tasks):
        raise RuntimeError("a task that was to be given away was not pending any more")
    lease_ids = leases.hex()
    width = 2 * LEASE_BYTES
    assigned = []
    for n, task in enumerate(tasks):
        attempt = task.attempt_count + 1
        assigned.append(Assigned(first_id + n, lease_ids[n * width : (n + 1) * width], attempt))
        if attempt > KEPT_ATTEMPTS:
            _drop_oldest_attempts(tx, task.id)
    attempts = {task.id: task.attempt_count + 1 for task in tasks}
    tx.note_tasks("assign", attempts, device=gift.device_id, status="assigned")
    return assigned


def _drop_oldest_attempts(tx: Tx, task_id: int) -> None:
    kept = "(SELECT id FROM af_task_assignment WHERE task_id = ? ORDER BY id DESC LIMIT ?)"
    values = (task_id, task_id, KEPT_ATTEMPTS)
    tx.execute(f"UPDATE af_artifact SET dropped = 1 WHERE task_id = ? AND assignment_id NOT IN {kept}", values)
    tx.execute(f"DELETE FROM af_task_assignment WHERE task_id = ? AND id NOT IN {kept}", values)


def keep_late(tx: Tx, attempt: Attempt, report: Report) -> None:
    """What came too late is told on its attempt; it moves nothing."""
    if report.outcome != "running":
        sql = "UPDATE af_task_assignment SET late_outcome = ?, late_at = ? WHERE id = ?"
        tx.execute(sql, (report.outcome, tx.now, attempt.id))


def start(tx: Tx, task: Task, attempt: Attempt, report: Report) -> Judged:
    """The device has begun; this also re-adopts a task that went back while its device was away, if its limits let
    one more run by now."""
    if task.status in ("pending", "scheduled"):
        bring_into_place(tx, task.id)
        task = get_task(tx, task.id) or task
        if not limits.may_run_again(tx, task.lane_id):
            return Judged("stale", task.id, task.status)
    if not _move(
        tx, "start", task, "running",
        assigned_device_id=attempt.device_id, started_at=tx.now, next_run_at=None,
    ):  # fmt: skip
        return Judged("stale", task.id, task.status)
    tx.execute(
        "UPDATE af_task_assignment SET status = 'running', started_at = ?, delivered_at = COALESCE(delivered_at, ?),"
        " completed_at = NULL, error_type = NULL, deadline_at = ?, progress = ? WHERE id = ?",
        (tx.now, tx.now, tx.now + task.execution_timeout + GRACE_SECONDS, report.progress, attempt.id),
    )
    if attempt.error_type == "lost":
        tx.execute("UPDATE af_crawl_tasks SET lost_count = lost_count - 1 WHERE id = ?", (task.id,))
    tx.note("task", "start", task=task.id, device=attempt.device_id, attempt=task.attempt_count, status="running")
    return Judged("accepted", task.id, "running")


def complete(tx: Tx, task: Task, attempt: Attempt, report: Report) -> Judged:
    """The result counts, with the tasks it found, in one transaction; a late one of the newest attempt too.

    Not before all its files are here: else nothing changes, and the device sends them and reports again."""
    missing = _missing_artifacts(tx, attempt, report.artifacts) if report.artifacts else ()
    if missing:
        return Judged("artifacts_missing", task.id, task.status, missing=missing)
    is_late = attempt.status not in ("assigned", "running")
    if is_late:
        keep_late(tx, attempt, report)
    ended = Ended(attempt.id, task.id, task.task_type, task.batch, task.lane_id, task.status, task.attempt_count)
    complete_all(tx, attempt.device_id, [(ended, report)], is_late=is_late)
    new_tasks = submit(tx, _heirs(tx, task, report.new_tasks), created_by=f"task {task.id}")
    return Judged("accepted", task.id, "completed", tuple(new_tasks))


def _heirs(tx: Tx, task: Task, new_tasks: Sequence[NewTask]) -> list[NewTask]:
    """What comes of a task needs the tags that it needed itself, and is retried as often where it does not say."""
    if not new_tasks:
        return []
    tags = json.loads(tx.one("SELECT required_tags FROM af_crawl_tasks WHERE id = ?", (task.id,))[0])
    return [
        new._replace(
            required_tags=tuple(sorted({*tags, *new.required_tags})),
            max_retry_count=task.max_retry_count if new.max_retry_count is None else new.max_retry_count,
        )
        for new in new_tasks
    ]


class Ended(NamedTuple):
    """A task that ends, as far as its books go; `assignment_id` is the attempt that ends it."""

    assignment_id: int
    id: int
    task_type: str
    batch: str
    lane_id: int
    status: str
    attempt_count: int


def complete_all(tx: Tx, device_id: str, ended: Sequence[tuple[Ended, Report]], *, is_late: bool = False) -> None:
    """Books completions of one device that were judged and accepted."""
    if not ended:
        return
    tasks = [task for task, _ in ended]
    durations: defaultdict[str, list[float]] = defaultdict(list)
    for task, report in ended:
        durations[task.task_type].append(report.duration_seconds or 0.0)
    attempts = {task.id: task.attempt_count for task in tasks}
    tx.note_tasks("complete", attempts, device=device_id, late=is_late, status="completed")
    tx.execute(
        "UPDATE af_task_assignment SET status = 'completed', completed_at = ?, deadline_at = NULL,"
        " duration_seconds = said.value FROM json_each(?) AS said WHERE af_task_assignment.id = said.key",
        (tx.now, json.dumps({task.assignment_id: report.duration_seconds for task, report in ended})),
    )
    tx.connection.executemany(
        "UPDATE af_task_assignment SET error_message = ?, error_type = ?, log_tail = ? WHERE id = ?",
        [
            (r.error_message, r.error_type, r.log_tail, task.assignment_id)
            for task, r in ended
            if is_late or r.error_message or r.error_type or r.log_tail
        ],
    )
    moved = _move_all(
        tx, "complete", tasks, "completed",
        "finished_at = ?, assigned_device_id = ?, next_run_at = NULL, end_reason = NULL, error_message = NULL,"
        " started_at = (SELECT COALESCE(started_at, completed_at - COALESCE(duration_seconds, 0))"
        " FROM af_task_assignment AS attempt WHERE attempt.id = assignment_id)",
        tx.now, device_id,
    )  # fmt: skip
    if moved != len(ended):
        raise RuntimeError("a task was not as it had been read in the same transaction")
    tx.connection.executemany(
        "INSERT OR REPLACE INTO af_task_result (task_id, result) VALUES (?, ?)",
        [(task.id, report.result) for task, report in ended if report.result is not None],
    )
    for task_type, seconds in durations.items():
        tx.count_minute(task_type, device_id, "completed", *seconds)
    tx.execute(
        "UPDATE af_device SET completed_count = completed_count + ?, consecutive_failures = 0, last_finished_at = ?,"
        " total_duration_seconds = total_duration_seconds + ? WHERE device_id = ?",
        (len(ended), tx.now, sum(map(sum, durations.values())), device_id),
    )


def _missing_artifacts(tx: Tx, attempt: Attempt, artifacts: Sequence[Artifact]) -> tuple[str, ...]:
    """The names of those that are not here as they are said to be. Their way here does not count as the task's time."""
    rows = tx.execute("SELECT name, bytes, sha256 FROM af_artifact WHERE assignment_id = ?", (attempt.id,))
    here = {Artifact(*row) for row in rows.fetchall()}
    missing = [artifact for artifact in artifacts if artifact not in here]
    if missing:
        way_seconds = sum(artifact.bytes for artifact in missing) / SLOWEST_UPLOAD_BYTES
        tx.execute(
            "UPDATE af_task_assignment SET deadline_at = MAX(deadline_at, ?) WHERE id = ?",
            (tx.now + GRACE_SECONDS + way_seconds, attempt.id),
        )
    return tuple(artifact.name for artifact in missing)


def fail(tx: Tx, task: Task, attempt: Attempt, report: Report) -> Judged:
    """The device reported an error: a retry with backoff while some are left, else failed."""
    if attempt.status not in ("assigned", "running"):
        return _turn_loss_into_retry(tx, task, attempt, report)
    moved_to = _retry_or_fail(tx, "fail", task, attempt, report, reason="failed")
    if moved_to is None:
        return Judged("stale", task.id, task.status)
    _settle(tx, attempt, "failed", report)
    tx.execute(
        "UPDATE af_device SET failed_count = failed_count + 1, consecutive_failures = consecutive_failures + 1,"
        " last_finished_at = ? WHERE device_id = ?",
        (tx.now, attempt.device_id),
    )
    tx.count_minute(task.task_type, attempt.device_id, "failed", report.duration_seconds or 0.0)
    tx.note("task", "fail", task=task.id, device=attempt.device_id, attempt=task.attempt_count, status=moved_to,
            error=report.error_message)  # fmt: skip
    return Judged("accepted", task.id, moved_to)


def _retry_or_fail(tx: Tx, verb: str, task: Task, attempt: Attempt, report: Report, *, reason: str) -> str | None:
    """Uses up one retry; returns the state that the task went to, or None if it was no longer active."""
    error = report.error_message
    if report.can_retry and task.retry_count < task.max_retry_count:
        delay = report.delay_seconds
        if delay is None:
            delay = backoff_seconds(task.retry_count + 1, tx.policy.retry_backoff_seconds, tx.rng)
        if tx.wall + delay <= task.give_up_at:
            moved = _move(
                tx, verb, task, "scheduled", next_run_at=tx.wall + delay, retry_count=task.retry_count + 1,
                avoid_device_id=attempt.device_id, assigned_device_id=None, error_message=error,
            )  # fmt: skip
            return "scheduled" if moved else None
        reason = "gave_up"
    moved = _move(tx, verb, task, "failed", finished_at=tx.now, end_reason=reason, error_message=error)
    return "failed" if moved else None


def backoff_seconds(retry: int, first_seconds: float, rng: random.Random) -> float:
    """The wait before the n-th retry: with 15 s first 15, 30, 60, 120 s …, at most 1 h, plus up to a quarter."""
    return min(first_seconds * 2.0 ** min(retry - 1, 30), BACKOFF_LIMIT_SECONDS) * (1 + rng.random() / 4)


def _turn_loss_into_retry(tx: Tx, task: Task, attempt: Attempt, report: Report) -> Judged:
    """A late fail or snooze moves nothing; a loss that was counted turns out to be an ordinary retry."""
    keep_late(tx, attempt, report)
    if report.outcome == "failed" and attempt.error_type == "lost":
        tx.execute(
            "UPDATE af_crawl_tasks SET lost_count = lost_count - 1, retry_count = retry_count + 1 WHERE id = ?",
            (task.id,),
        )
    return Judged("accepted", task.id, task.status)


def snooze(tx: Tx, task: Task, attempt: Attempt, report: Report) -> Judged:
    """Not now, and nobody's fault: the task comes back after `delay_seconds`, until give_up_at."""
    if attempt.status not in ("assigned", "running"):
        return _turn_loss_into_retry(tx, task, attempt, report)
    delay = report.delay_seconds or report.limit_closed_seconds or tx.policy.retry_backoff_seconds
    next_run_at = tx.wall + delay
    counted = {"error_message": report.error_message, "assigned_device_id": None}
    if next_run_at <= task.give_up_at:
        to_state = "scheduled"
        moved = _move(tx, "snooze", task, to_state, next_run_at=next_run_at, **counted)
    else:
        to_state = "failed"
        moved = _move(tx, "snooze", task, to_state, finished_at=tx.now, end_reason="gave_up", **counted)
    if not moved:
        return Judged("stale", task.id, task.status)
    tx.execute("UPDATE af_crawl_tasks SET snooze_count = snooze_count + 1 WHERE id = ?", (task.id,))
    _settle(tx, attempt, "snoozed", report)
    tx.count_minute(task.task_type, attempt.device_id, "snoozed", report.duration_seconds or 0.0)
    tx.note("task", "snooze", task=task.id, device=attempt.device_id, attempt=task.attempt_count, status=to_state,
            error=report.error_message)  # fmt: skip
    return Judged("accepted", task.id, to_state)


def hand_back(tx: Tx, task: Task, attempt: Attempt, report: Report) -> Judged:
    """The device gives the task back unfinished: no attempt is used up."""
    moved_to = release(tx, attempt, "handed_back", report)
    return Judged("accepted", task.id, moved_to) if moved_to else Judged("stale", task.id, task.status)


def release(tx: Tx, attempt: Attempt, reason: str, report: Report | None = None) -> str | None:
    """Takes an active attempt's task back; returns the state it went to, or None if nothing was to release.

    reason: lost (its device vanished; counts if the start was confirmed), timeout (uses a retry), or one that counts
    nowhere: handed_back, never_delivered, silent_since_start, device_removed, restored (from a backup), never_started
    (in time, on a device that got it ahead of a free slot).
    """
    task = get_task(tx, attempt.task_id)
    if task is None or task.assignment_id != attempt.id or task.status not in ("assigned", "running"):
        return None
    if reason == "timeout" and attempt.waits_ahead:
        reason = "never_started"
    if reason == "timeout":
        text = f"not finished within {task.execution_timeout} s"
        late = Report(attempt.id, attempt.lease_id, "failed", error_message=text, error_type="timeout")
        moved_to = _retry_or_fail(tx, "release", task, attempt, late, reason="timeout")
        _settle(tx, attempt, "timeout", late)
    else:
        if reason == "lost" and task.status != "running":
            reason = "never_started"
        moved_to = _release_lost(tx, task, attempt) if reason == "lost" else _release_uncounted(tx, task)
        _settle(tx, attempt, "released", report, error_type=reason)
    if reason in ("timeout", "lost"):
        column = "failed_count" if reason == "timeout" else "lost_count"
        tx.execute(
            f"UPDATE af_device SET {column} = {column} + 1, consecutive_failures = consecutive_failures + ?"
            " WHERE device_id = ?",
            (reason == "timeout", attempt.device_id),
        )
        tx.count_minute(task.task_type, attempt.device_id, "failed" if reason == "timeout" else "lost", 0.0)
    tx.note("task", "release", task=task.id, device=attempt.device_id, attempt=task.attempt_count, reason=reason,
            status=moved_to)  # fmt: skip
    return moved_to


def _release_uncounted(tx: Tx, task: Task) -> str | None:
    return "pending" if _move(tx, "release", task, "pending", assigned_device_id=None) else None


def _release_lost(tx: Tx, task: Task, attempt: Attempt) -> str | None:
    """One loss more; a task that took several devices down is poison and is kept away from the rest."""
    lost_count = task.lost_count + 1
    sql = "SELECT DISTINCT device_id FROM af_task_assignment WHERE task_id = ? AND error_type = 'lost'"
    devices = {row[0] for row in tx.execute(sql, (task.id,))} | {attempt.device_id}
    if len(devices) >= LOST_ON_DEVICES_LIMIT or lost_count >= LOST_LIMIT:
        text = f"lost {lost_count} times while running, on {', '.join(sorted(devices))}"
        moved = _move(tx, "release", task, "failed", lost_count=lost_count, finished_at=tx.now, end_reason="poison",
                      error_message=text)  # fmt: skip
        return "failed" if moved else None
    moved = _move(tx, "release", task, "pending", lost_count=lost_count, avoid_device_id=attempt.device_id,
                  assigned_device_id=None)  # fmt: skip
    return "pending" if moved else None


# -- what a person asks for -----------------------------------------------------------------------------------


def cancel(tx: Tx, task_id: int, reason: str | None = None) -> str | None:
    """Takes a task back for good; its device hears of it at once. Returns `cancelled`, or None if it was final."""
    task = get_task(tx, task_id)
    if task is None or not _move(
        tx, "cancel", task, "cancelled",
        finished_at=tx.now, end_reason="cancelled", error_message=reason, next_run_at=None,
    ):  # fmt: skip
        return None
    if task.status in ("assigned", "running"):
        attempt = get_attempt(tx, task.assignment_id or 0)
        if attempt is not None:
            _settle(tx, attempt, "cancelled")
            tx.note("device", "cancel_attempt", device=attempt.device_id, assignment=attempt.id)
    tx.note("task", "cancel", task=task.id, status="cancelled", reason=reason)
    return "cancelled"


def requeue(tx: Tx, task_id: int) -> str | None:
    """A person gives a failed or cancelled task another life: all counts start again. None if it is not final."""
    task = get_task(tx, task_id)
    if task is not None and task.status in TRANSITIONS["requeue"][0]:
        bring_into_place(tx, task_id)  # its lane may be gone by now
        task = get_task(tx, task_id)
    if task is None or not _move(
        tx, "requeue", task, "pending",
        retry_count=0, lost_count=0, snooze_count=0, end_reason=None, error_message=None,
        avoid_device_id=None, assigned_device_id=None, started_at=None, finished_at=None,
        give_up_at=tx.wall + tx.policy.give_up_seconds,
    ):  # fmt: skip
        return None
    sql = "UPDATE af_task_assignment SET error_type = 'lost_before_requeue' WHERE task_id = ? AND error_type = 'lost'"
    tx.execute(sql, (task.id,))
    tx.note("task", "requeue", task=task.id, status="pending")
    return "pending"


def pin(tx: Tx, task_id: int, device_id: str) -> str | None:
    """A waiting task may only go to this device from now on. Returns its state, or None if it does not wait."""
    row = tx.one("SELECT status FROM af_crawl_tasks WHERE id = ? AND status IN ('pending', 'scheduled')", (task_id,))
    if row is None:
        return None
    status: str = row[0]
    sql = "UPDATE af_crawl_tasks SET pinned_device_id = ?, updated_at = ? WHERE id = ?"
    tx.execute(sql, (device_id, tx.now, task_id))
    bring_into_place(tx, task_id)
    tx.note("task", "pin", task=task_id, device=device_id, status=status)
    return status


def set_batch_state(tx: Tx, name: str, state: str, reason: str | None = None) -> bool:
    """Opens, pauses or cancels a batch (its waiting tasks are cancelled by the caller, in chunks). False: unknown."""
    changed = tx.execute("UPDATE af_batch SET state = ?, reason = ? WHERE name = ?", (state, reason, name))
    if changed.rowcount:
        tx.execute("UPDATE af_lane SET is_held = ? WHERE batch = ?", (state != "open", name))
        tx.note("batch", f"batch_{state}", batch=name, reason=reason)
        tx.wants_dispatch = True
    return changed.rowcount > 0


def resume_clock(tx: Tx, boot_id: str, boot_seconds: float) -> None:
    """After a start: a clock that was set meanwhile ends no window of a limit, and takes nothing back that runs.

    What waits ahead of a slot keeps its deadline of seconds: its device has dropped it by itself."""
    jump = limits.resume_clock(tx, boot_id, boot_seconds)
    if jump > 0:
        sql = f"UPDATE af_task_assignment SET deadline_at = deadline_at + ? WHERE status IN ({ACTIVE})"
        tx.execute(f"{sql} AND deadline_at >= assigned_at + ?", (jump, GRACE_SECONDS))


def overdue_attempts(tx: Tx, limit: int = 500) -> Iterable[Attempt]:
    """Active attempts whose deadline has passed, longest overdue first."""
    sql = f"{_ATTEMPT_SQL} WHERE status IN ({ACTIVE}) AND deadline_at < ? ORDER BY deadline_at LIMIT ?"
    return [Attempt(*row) for row in tx.execute(sql, (tx.now, limit)).fetchall()]
