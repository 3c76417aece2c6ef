"""What does the API look like, for programs? The OpenAPI 3.1 document, made from the route table and the wire's types.

The shapes of the replies stand here, because nothing decodes them: they are for the document, and a test may hold the
real replies against it. This file must not know handlers, the database or bottle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal, NamedTuple, Optional, Union

import msgspec
from msgspec import UNSET, Struct, UnsetType

from values import BIGGEST_INTEGER, ERROR_MESSAGE_LENGTH, LINE_PATTERN, NAME_PATTERN, STATES_PATTERN

PREFIX = "/api/distribution"

TaskState = Literal["scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled"]
DeviceState = Literal["online", "busy", "offline", "draining", "disabled", "conflict"]
Moment = Optional[str]
Counts = dict[str, int]


class Query(NamedTuple):
    """A query parameter, for the document."""

    name: str
    schema: dict[str, Any]
    text: str
    is_required: bool = False


class Operation(NamedTuple):
    """One row of the route table, as far as the document needs it. `path` is below the prefix: /tasks/{task_id}.

    request and response are types; a tuple of types means "one of these".
    """

    method: str
    path: str
    role: str
    summary: str
    request: Any = None
    response: Any = None
    query: tuple[Query, ...] = ()
    status: int = 200
    response_type: str = "application/json"
    request_type: str = "application/json"
    """Of the body; one of another type is a file, which only its handler reads, piece by piece."""
    other_status: Optional[int] = None
    """Another good answer: 200 where nothing new came of it, 304 where the asker has it already."""
    is_large: bool = False
    """Tasks or results come in it: as much as max_body_bytes."""


# ----------------------------------------------------------------------------------------- replies


class Problem(Struct):
    """An error (RFC 9457): `code` is stable, `detail` says what to do, `field` is what it is about."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    field: Union[str, UnsetType] = UNSET


class TaskOut(Struct, kw_only=True):
    """A task as in the list."""

    id: int
    task_type: str
    username: Optional[str]
    app_id: Optional[str]
    start_date: Optional[str]
    end_date: Optional[str]
    status: TaskState
    priority: int
    lane_id: int
    batch: Optional[str]
    unique_key: Optional[str]
    parent_id: Optional[int]
    next_run_at: Moment
    give_up_at: Moment
    execution_timeout_seconds: int
    max_retry_count: int
    retry_count: int
    lost_count: int
    snooze_count: int
    attempt_count: int
    required_tags: list[str]
    pinned_device_id: Optional[str]
    prefer_device_id: Optional[str]
    same_device_as: Optional[str]
    prefer_seconds: Optional[float]
    avoid_device_id: Optional[str]
    assigned_device_id: Optional[str]
    assignment_id: Optional[int]
    end_reason: Optional[str]
    error_message: Optional[str]
    created_by: Optional[str]
    created_at: str
    started_at: Moment
    finished_at: Moment
    updated_at: str


class AttemptOut(Struct, kw_only=True):
    """One attempt of one task on one device. log_tail is there in a task's own view."""

    id: int
    task_id: int
    device_id: str
    status: Literal["assigned", "running", "completed", "failed", "snoozed", "timeout", "released", "cancelled"]
    assigned_at: str
    delivered_at: Moment
    started_at: Moment
    completed_at: Moment
    deadline_at: Moment
    duration_seconds: Optional[float]
    progress: Optional[float]
    progress_message: Optional[str]
    error_message: Optional[str]
    error_type: Optional[str]
    late_outcome: Optional[str]
    late_at: Moment
    log_tail: Union[str, UnsetType, None] = UNSET


class ArtifactOut(Struct):
    """A file of one attempt; GET /tasks/{task_id}/artifacts/{artifact_id} gives its bytes."""

    artifact_id: int
    assignment_id: int
    name: str
    bytes: int
    sha256: str
    created_at: str


class WaitingOut(Struct):
    reason: str
    detail: str


class TaskDetailOut(TaskOut, kw_only=True):
    """A task with all that belongs to it."""

    task_data: dict[str, Any]
    result: Optional[dict[str, Any]]
    attempts: list[AttemptOut]
    artifacts: list[ArtifactOut]
    waiting: Optional[WaitingOut]
    children_count: int


class TaskPageOut(Struct):
    """Newest first. `partial`: the time was up before the page was full; go on with next_cursor."""

    tasks: list[TaskOut]
    next_cursor: Optional[str]
    partial: bool


class SubmittedOut(Struct, kw_only=True):
    """What became of one submitted task; id is null when the batch was full or cancelled."""

    id: Optional[int]
    created: bool
    status: str
    unique_key: Union[str, UnsetType, None] = UNSET


class SubmittedListOut(Struct):
    tasks: list[SubmittedOut]


class WhyDeviceOut(Struct):
    device_id: str
    excluded_because: Optional[str]


HeldBy = Optional[Literal["closed", "max_running", "max_starts", "max_starts_per_day"]]


class LimitKeyOut(Struct, kw_only=True):
    """One value of a limit's key: what is counted for it, and what closes it now. closed_until: a device learned it."""

    value: list[str]
    running: int
    starts_in_window: Optional[int]
    starts_today: Optional[int]
    held_by: HeldBy
    closed_until: Moment
    closed_reason: Optional[str]
    next_look_seconds: Optional[float]


class LimitHoldsOut(LimitKeyOut, kw_only=True):
    """The limit that holds a task, and the value of its key."""

    name: str
    task_type: str
    key: list[str]
    max_running: Optional[int]
    max_starts: Optional[int]
    window_seconds: Optional[float]
    max_starts_per_day: Optional[int]


class LimitOut(Struct, kw_only=True):
    """A limit, with at most 100 values of its key, closed ones first."""

    name: str
    task_type: str
    key: list[str]
    max_running: Optional[int]
    max_starts: Optional[int]
    window_seconds: Optional[float]
    max_starts_per_day: Optional[int]
    keys: list[LimitKeyOut]


class LimitsOut(Struct):
    """`moving`: so many waiting tasks still have to go to the lanes of these limits; nothing of them is sent before."""

    limits: list[LimitOut]
    moving: int


class LimitOpenedOut(Struct):
    name: str
    opened: int


class LaneOut(Struct, kw_only=True):
    """What waiting tasks share that decides where and when they may go."""

    id: int
    task_type: str
    batch: Optional[str]
    required_tags: list[str]
    pinned_device_id: Optional[str]
    prefer_device_id: Optional[str]
    same_device_as: Optional[str]
    prefer_seconds: Optional[float]
    limit_keys: list[list[str]]
    waiting: int
    top_priority: Optional[int]
    paused: bool
    paused_reason: Optional[str]
    is_held: bool
    is_stale: bool
    is_closed: bool
    next_task_id: Optional[int]


class LanesOut(Struct):
    lanes: list[LaneOut]
    next_cursor: Optional[str]


class PauseOut(Struct):
    """What a person holds back: all, a type, a batch or a lane."""

    scope: Literal["all", "type", "batch", "lane"]
    name: Optional[str]
    reason: Optional[str]


class PauseChangedOut(PauseOut):
    paused: bool


class WhyOut(Struct):
    """Why a task waits, device by device. next_look_seconds null with a limit: when one of the tasks that run ends."""

    task_id: int
    status: TaskState
    reason: str
    detail: str
    devices: list[WhyDeviceOut]
    limit: Optional[LimitHoldsOut]
    next_look_seconds: Optional[float]


class ChangedOut(Struct):
    id: int
    status: TaskState


class ActionOut(Struct):
    """How many matched (a capped number means at least that many), and how many were changed."""

    matched: int
    matched_is_capped: bool
    changed: int


class PulledTaskOut(Struct, kw_only=True):
    """A task for a device, with its lease."""

    id: int
    assignment_id: int
    lease_id: str
    task_type: str
    username: Optional[str]
    app_id: Optional[str]
    start_date: Optional[str]
    end_date: Optional[str]
    task_data: dict[str, Any]
    batch: Optional[str]
    attempt: int
    priority: int
    parent_id: Optional[int]
    execution_timeout_seconds: int
    start_within_seconds: Optional[float]


class PullOut(Struct):
    tasks: list[PulledTaskOut]
    cancel: list[int]
    drain: bool
    next_seconds: float


class UploadedOut(Struct):
    outcome: Literal["accepted", "duplicate"]


class ReportOut(Struct, kw_only=True):
    """The answer to one report; `invalid` comes with detail and field, `artifacts_missing` with their names."""

    assignment_id: Optional[int]
    outcome: Literal["accepted", "duplicate", "gone", "stale", "invalid", "artifacts_missing"]
    detail: Union[str, UnsetType] = UNSET
    field: Union[str, UnsetType, None] = UNSET
    new_tasks: Union[list[SubmittedOut], UnsetType] = UNSET
    missing: Union[list[str], UnsetType] = UNSET


class ReportsOut(Struct):
    reports: list[ReportOut]


class StatusOut(Struct):
    id: int
    outcome: str
    status: Optional[TaskState]


class DeviceSettingsOut(Struct, kw_only=True):
    """What the master wants of a device."""

    heartbeat_interval_seconds: float
    device_timeout_seconds: float
    next_seconds: float
    reconnect_spread_seconds: float
    max_body_bytes: int
    max_artifact_bytes: int
    enable_monitoring: bool
    drain_seconds: Union[float, UnsetType] = UNSET


class RegisterOut(Struct):
    device_id: str
    status: DeviceState
    created: bool
    settings: DeviceSettingsOut
    keep: list[int]
    cancel: list[int]
    server_time: str
    token: Union[str, UnsetType] = UNSET


class HeartbeatOut(Struct):
    cancel: list[int]
    drain: bool
    next_seconds: float


class DeviceOut(Struct, kw_only=True):
    """A device as in the list; status is derived from what a person wants and how long it has been silent.

    has_stopped: it is offline because its worker was stopped in good order. one_at_a_time: it failed too often in a
    row."""

    device_id: str
    device_name: str
    device_type: Optional[str]
    ip_address: Optional[str]
    status: DeviceState
    has_stopped: bool
    wanted: Literal["active", "draining", "disabled"]
    wanted_reason: Optional[str]
    task_types: list[str]
    tags: list[str]
    weight: float
    max_concurrent_tasks: int
    assigned_count: int
    one_at_a_time: bool
    version: Optional[str]
    protocol: Optional[int]
    last_heartbeat_at: Moment
    seconds_since_heartbeat: Optional[float]
    cpu_usage: Optional[float]
    memory_usage: Optional[float]
    disk_usage: Optional[float]
    active_tasks: Optional[int]
    system_info: Optional[dict[str, Any]]
    problem: Optional[str]
    clock_skew_seconds: Optional[float]
    last_finished_at: Moment
    registered_at: str
    consecutive_failures: int
    completed_count: int
    failed_count: int
    lost_count: int
    total_duration_seconds: float


class DeviceChangedOut(Struct):
    device_id: str
    status: DeviceState


class MinuteOut(Struct):
    minute: str
    completed: int
    failed: int
    lost: int
    snoozed: int
    duration_seconds: float
    duration_max_seconds: float


class BeatOut(Struct):
    heartbeat_at: str
    cpu_usage: Optional[float]
    memory_usage: Optional[float]
    disk_usage: Optional[float]
    active_tasks: Optional[int]


class DeviceTotalsOut(Struct):
    completed: int
    failed: int
    lost: int
    assigned: int
    duration_seconds: float


class DeviceStatsOut(Struct):
    device_id: str
    status: DeviceState
    totals: DeviceTotalsOut
    success_rate: Optional[float]
    average_duration_seconds: Optional[float]
    last_hour: list[MinuteOut]
    recent_failures: list[AttemptOut]
    heartbeats: list[BeatOut]


class TasksStatsOut(Struct):
    """Counts by state, and the last hour by minute (empty for a batch: minutes are not kept by batch)."""

    by_state: Counts
    by_type: dict[str, Counts]
    by_batch: dict[str, Counts]
    by_device: dict[str, Counts]
    last_hour: list[MinuteOut]


class BatchOut(Struct):
    name: str
    state: Literal["open", "paused", "cancelled"]
    reason: Optional[str]
    created_at: str
    counts: Counts
    rate_per_second: float


class BatchesOut(Struct):
    batches: list[BatchOut]
    next_cursor: Optional[str]


class BatchChangedOut(Struct):
    name: str
    state: str
    changed: int


class StrategyOut(Struct):
    strategy: str
    available: list[str]


# ----------------------------------------------------------------------------------------- query parameters

TEXT: dict[str, Any] = {"type": "string", "maxLength": 128, "pattern": LINE_PATTERN}
NAME: dict[str, Any] = {"type": "string", "pattern": NAME_PATTERN}
TIME: dict[str, Any] = {"type": "string", "format": "date-time"}
NUMBER: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": BIGGEST_INTEGER}
LINE: dict[str, Any] = {**TEXT, "minLength": 1}
STATES: dict[str, Any] = {"type": "string", "maxLength": 128, "pattern": STATES_PATTERN}

FILTERS = (
    Query("status", STATES, "One state, or several separated by commas"),
    Query("task_type", NAME, "Exactly this type"),
    Query("device_id", NAME, "Assigned to this device, or ended there"),
    Query("batch", TEXT, "Exactly this batch"),
    Query("username", TEXT, "Exactly this username"),
    Query("app_id", TEXT, "Exactly this app_id"),
    Query("text", {**TEXT, "maxLength": 1024}, "The beginning of unique_key, username or app_id"),
    Query("created_after", TIME, "Created then or later"),
    Query("created_before", TIME, "Created then or earlier"),
    Query("parent_id", NUMBER, "Created by this task"),
    Query("error", {"type": "string", "maxLength": ERROR_MESSAGE_LENGTH}, "Exactly this error_message"),
)
PAGE = (
    Query("limit", {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}, "The size of a page"),
    Query("cursor", NUMBER, "next_cursor of the page before"),
)

# ----------------------------------------------------------------------------------------- the document

EVENTS = "text/event-stream"  # each event is JSON of its own kind
REFERENCE = "#/components/schemas/{name}"
PARAMETER = re.compile(r"\{(\w+)\}")


def build(operations: Iterable[Operation], *, version: str, title: str = "Distributed crawl tasks") -> dict[str, Any]:
    """The OpenAPI 3.1 document for these operations."""
    rows = list(operations)
    types = [type_ for row in rows for type_ in (*_one_of(row.request), *_one_of(row.response))]
    schemas, components = msgspec.json.schema_components([*types, Problem], ref_template=REFERENCE)
    known = {repr(type_): schema for type_, schema in zip([*types, Problem], schemas)}
    paths: dict[str, dict[str, Any]] = {}
    for row in rows:
        paths.setdefault(PREFIX + row.path, {})[row.method.lower()] = _operation(row, known)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "session": {"type": "apiKey", "in": "cookie", "name": "af_session"},
            },
        },
    }


def _one_of(type_: Any) -> tuple[Any, ...]:
    return () if type_ is None else type_ if isinstance(type_, tuple) else (type_,)


def _schema(type_: Any, known: dict[str, Any]) -> dict[str, Any]:
    schemas = [known[repr(one)] for one in _one_of(type_)]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _operation(row: Operation, known: dict[str, Any]) -> dict[str, Any]:
    names = PARAMETER.findall(row.path)
    words = re.findall(r"[a-z0-9]+", PARAMETER.sub(lambda found: f"by {found[1]}", row.path))
    document: dict[str, Any] = {
        "operationId": "_".join([row.method.lower(), *words]),
        "summary": row.summary,
        "tags": [row.path.split("/")[1]],
        "x-role": row.role,
        "parameters": [_path_parameter(name) for name in names] + [_query_parameter(query) for query in row.query],
        "responses": _responses(row, known),
    }
    if row.role != "public":
        document["security"] = [{"bearer": []}, {"header": []}, {"session": []}]
    if row.request_type != "application/json":
        document["requestBody"] = {"required": True, "content": {row.request_type: {}}}
    elif row.request is not None:
        content = {"application/json": {"schema": _schema(row.request, known)}}
        document["requestBody"] = {"required": not may_be_left_out(row.request), "content": content}
    return document


def may_be_left_out(request: Any) -> bool:
    """A body in which no field is required: the path says it all."""
    fields = getattr(request, "__struct_fields__", ())
    return bool(fields) and not any(field.required for field in msgspec.structs.fields(request))


def _responses(row: Operation, known: dict[str, Any]) -> dict[str, Any]:
    good: dict[str, Any] = {"description": HTTPStatus(row.status).phrase}
    if row.response is not None:
        good["content"] = {row.response_type: {"schema": _schema(row.response, known)}}
    elif row.response_type != "application/json":
        one: dict[str, Any] = {} if row.response_type == EVENTS else {"schema": {"type": "string"}}
        good["content"] = dict.fromkeys(row.response_type.split(", "), one)
    problem = {"application/problem+json": {"schema": _schema(Problem, known)}}
    answers = {str(row.status): good}
    if row.other_status is not None:
        other = {"description": HTTPStatus(row.other_status).phrase}
        answers[str(row.other_status)] = {**good, **other} if row.other_status < 300 else other
    for status in _problems(row):
        answers[str(status)] = {"description": HTTPStatus(status).phrase, "content": problem}
    return answers


def _problems(row: Operation) -> list[int]:
    """The errors that an operation of this kind can answer."""
    found = {400, 403, 422, 429, 503} | ({401} if row.role != "public" or row.path == "/login" else set())
    if PARAMETER.search(row.path) or "device" in row.role:
        found |= {404, 409, 410}
    if row.method != "GET":
        found |= {409}
    if row.request is not None or row.request_type != "application/json":
        found |= {411, 413, 415}
    if row.request_type != "application/json":
        found |= {507}
    return sorted(found | ({426} if row.path == "/devices/register" else set()))


def _path_parameter(name: str) -> dict[str, Any]:
    numbers, names = ("task_id", "artifact_id", "lane_id", "key_id"), ("device_id", "task_type")
    schema = NUMBER if name in numbers else NAME if name in names else LINE
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameter(query: Query) -> dict[str, Any]:
    return {
        "name": query.name,
        "in": "query",
        "required": query.is_required,
        "allowEmptyValue": not query.is_required,  # the same as not given
        "description": query.text,
        "schema": query.schema,
    }
