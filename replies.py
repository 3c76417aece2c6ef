"""What do the answers for charts, progress and history look like, for programs? Shapes for the OpenAPI document.

The shapes of rows (tasks, devices, lanes …) are in openapi.py. Nothing decodes these; a test holds the real replies
against them.
"""

from __future__ import annotations

from typing import Any, Literal, Optional, Union

from msgspec import UNSET, Struct, UnsetType

from openapi import BatchOut, Counts, DeviceOut, Moment, PauseOut, TaskState

Role = Literal["viewer", "submitter", "operator", "admin", "enroll", "device"]


class SessionOut(Struct):
    """Who asks: role null is nobody yet. key_needed false: the master takes everybody on its machine for an admin.
    uses_left: how many devices an enroll key may still register."""

    role: Optional[Role]
    name: Optional[str]
    key_needed: bool
    uses_left: Union[int, UnsetType, None] = UNSET


class KeyOut(Struct, kw_only=True):
    """A key, without its secret. device_id: of a device's own token. uses_left: so many devices it may still enroll."""

    id: int
    name: str
    role: Role
    device_id: Optional[str]
    created_at: str
    created_by: str
    expires_at: Moment
    uses_left: Optional[int]
    last_used_at: Moment
    last_used_from: Optional[str]
    revoked_at: Moment


class NewKeyOut(KeyOut, kw_only=True):
    """The only time that the key itself is told."""

    key: str


class KeysOut(Struct):
    """Newest first."""

    keys: list[KeyOut]
    next_cursor: Optional[str]


class DeviceRevokedOut(Struct):
    """How many of its tokens open nothing any more, and how many tasks went back to the queue."""

    device_id: str
    tokens: int
    tasks: int


class AuditEntryOut(Struct, kw_only=True):
    """outcome is "ok" or the code of the refusal; actor is the key's name, or an address; role null is nobody known."""

    id: int
    at: str
    actor: str
    role: Optional[Role]
    key_id: Optional[int]
    address: str
    action: str
    object: Optional[str]
    outcome: str
    detail: dict[str, Any]


class AuditOut(Struct):
    """Newest first."""

    entries: list[AuditEntryOut]
    next_cursor: Optional[str]


class PointOut(Struct, kw_only=True):
    """What ended in the step that begins `at`."""

    at: str
    completed: int
    failed: int
    lost: int
    snoozed: int
    mean_seconds: Optional[float]


class SeriesOut(Struct):
    """Oldest first; the last point is not over yet. A step in which nothing ended has zeros."""

    step_seconds: Literal[60, 900]
    points: list[PointOut]


class BeatPointOut(Struct):
    """A heartbeat, or the mean of some: use in percent, and the tasks at once."""

    at: str
    cpu: Optional[float]
    memory: Optional[float]
    disk: Optional[float]
    active: Optional[int]


class BeatsOut(Struct):
    """Oldest first, at most 300; a step without a heartbeat has no point."""

    step_seconds: int
    points: list[BeatPointOut]


class DeviceDetailOut(DeviceOut, kw_only=True):
    """A device with its newest heartbeats; in the list only where `beats` asks for them."""

    beats: Union[list[BeatPointOut], UnsetType] = UNSET


class DevicesOut(Struct):
    devices: list[DeviceDetailOut]
    next_cursor: Optional[str]


class BatchProgressOut(BatchOut, kw_only=True):
    """A batch with the rate of the last five minutes; eta_seconds null: nothing is left, or nothing moves."""

    total: int
    completed_last_minute: int
    failed_last_minute: int
    completed_last_hour: int
    failed_last_hour: int
    eta_seconds: Optional[float]


class FailureGroupOut(Struct):
    """Failed tasks with one error; is_more: at least n. task_id is the newest of them."""

    error_type: Optional[str]
    error_message: Optional[str]
    n: int
    is_more: bool
    task_id: int


class FailuresOut(Struct):
    """The largest group first. is_partial: there may be more failed tasks or more groups than these."""

    groups: list[FailureGroupOut]
    is_partial: bool


class HappenedOut(Struct):
    """Something that happened; its facts have the names that the event stream and the log give them."""

    id: int
    at: str
    kind: Literal["device", "task", "batch", "system", "access"]
    verb: str
    facts: dict[str, Any]


class HistoryOut(Struct):
    """Newest first."""

    events: list[HappenedOut]
    next_cursor: Optional[str]


class ProblemIn(Struct):
    """What is wrong with one task of many."""

    code: str
    field: Optional[str]
    detail: str


class PreviewedOut(Struct, kw_only=True):
    """What POST /tasks would do with one task: a problem, or what it would become.

    created false: a task with this key is there already, and id is its id."""

    index: int
    ok: bool
    problem: Union[ProblemIn, UnsetType] = UNSET
    id: Union[int, UnsetType, None] = UNSET
    created: Union[bool, UnsetType] = UNSET
    status: Union[str, UnsetType] = UNSET
    warning: Union[str, UnsetType, None] = UNSET


class PreviewOut(Struct):
    """The answer with dry_run=true; its status is 200."""

    tasks: list[PreviewedOut]


class RatesOut(Struct):
    completed_last_minute: int
    failed_last_minute: int
    completed_last_hour: int
    failed_last_hour: int
    completed_last_day: int
    failed_last_day: int


class OldestOut(Struct):
    task_id: int
    waiting_seconds: float
    reason: Optional[str]
    detail: Optional[str]


class AttentionOut(Struct, kw_only=True):
    """Something that needs a person: `n` of it, the ids of the first few, and a sentence."""

    kind: Literal[
        "devices_offline", "device_conflict", "device_problem", "black_hole", "poison", "limit_closed", "paused",
        "oldest_waiting", "failures", "storage", "backup", "clock",
    ]  # fmt: skip
    n: int
    ids: list[Union[int, str]]
    detail: str
    until: Union[str, UnsetType] = UNSET


class OverviewOut(Struct, kw_only=True):
    """The whole system at a glance."""

    version: str
    uptime_seconds: float
    mode: str
    tasks: Counts
    devices: Counts
    rates: RatesOut
    attention: list[AttentionOut]
    oldest_waiting: Optional[OldestOut]
    paused: list[PauseOut]
    strategy: str
    database_bytes: int
    writer_queue: int
    held_polls: int
    has_worker_file: bool


class BackupOut(Struct, kw_only=True):
    """One backup; `name` is its folder."""

    name: str
    at: str
    bytes: int
    files: int
    seconds: float


class BackupMadeOut(BackupOut, kw_only=True):
    """`path`: where it lies on the master's machine."""

    path: str


class BackupsOut(Struct, kw_only=True):
    """Newest first. `folder` null: none are made."""

    folder: Optional[str]
    daily_at: str
    keep: int
    is_running: bool
    last_failure: Optional[str]
    backups: list[BackupOut]


class PercentilesOut(Struct):
    """In milliseconds, of the last minutes; null while there was nothing."""

    p50: Optional[float]
    p95: Optional[float]
    p99: Optional[float]


class DatabaseOut(Struct):
    """free_bytes: room on its disk. tasks: how many are kept, in any state."""

    file: str
    bytes: int
    wal_bytes: int
    free_bytes: int
    schema_version: int
    tasks: int


class WriterOut(Struct):
    """mean_batch: how many writes one commit served."""

    queue: int
    max_queue: int
    commits: int
    mean_batch: Optional[float]
    commit_ms: PercentilesOut


class HttpOut(Struct):
    """Held pulls are not among the requests."""

    requests: int
    request_ms: PercentilesOut
    held_polls: int
    streams: int


class RetentionOut(Struct):
    """What is kept for how long, and what was deleted when last there was something to delete."""

    settings: dict[str, int]
    last_run_at: Moment
    deleted: Optional[dict[str, int]]


class TaskTypeOut(Struct):
    """How many devices run it, and how many of those are there."""

    task_type: str
    devices: int
    online: int


class TransitionOut(Struct, rename={"from_states": "from"}):
    """A verb, and the states that it leads from and to."""

    verb: str
    from_states: list[TaskState]
    to: list[TaskState]


class SystemOut(Struct, kw_only=True):
    """The master itself. `settings` are those in force; of a secret it says only whether it is set."""

    version: str
    protocol: int
    python_version: str
    sqlite_version: str
    mode: str
    started_at: str
    uptime_seconds: float
    database: DatabaseOut
    writer: WriterOut
    http: HttpOut
    retention: RetentionOut
    settings: dict[str, Any]
    task_types: list[TaskTypeOut]
    states: list[TaskState]
    transitions: list[TransitionOut]
