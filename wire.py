"""What is a valid message?

Every body and query parameter of the HTTP API is checked here, once, before anything else sees it: types, ranges,
names, characters, depth. Whoever gets a value from `decode` or `Query` may store it. This file must not know routes,
the database or the clock.

  400 bad_json    not JSON, not UTF-8, NaN, a lone surrogate      422 invalid_field  wrong type, range or character
  400 too_deep    a JSON object of more than 32 levels            422 unknown_field  a typing mistake: did you mean ...
  413 too_large   one field is over its own limit                 422 missing_field

Messages of persons and submitting programs refuse unknown fields; messages of devices ignore them, because a device may
be newer than its master. What a device measures or logs is clamped, cut or dropped where its type is right: telemetry
must not cost a lease.

Two equal keys in one object: the last one counts, as in every JSON reader that will see the text later.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Optional, TypeVar, cast
from urllib.parse import parse_qsl

import msgspec
from msgspec import Raw, Struct

from values import (
    ARTIFACT_NAME_PATTERN,
    ARTIFACT_NAME_RULE,
    BIGGEST_INTEGER,
    CONTROL,
    EMPTY_OBJECT,
    ERROR_MESSAGE_LENGTH,
    KEY_FIELD_PATTERN,
    KEY_RULE,
    MAX_TASKS,
    NAME_PATTERN,
    NAME_RULE,
    NOTHING,
    REASON_LENGTH,
    SHA256_PATTERN,
    SHA256_RULE,
    STRATEGY_PATTERN,
    SYSTEM_INFO_BYTES,
    TASK_DATA_BYTES,
    ArtifactBytes,
    ArtifactName,
    BatchLimit,
    Clock,
    Count,
    Day,
    Delay,
    ErrorMessage,
    FreeText,
    Id,
    Invalid,
    Key,
    Line128,
    Moment,
    Name,
    Number,
    Percent,
    PreferSeconds,
    Priority,
    Reason,
    ResultData,
    RetryCount,
    Screen,
    Sequence,
    Sha256,
    Slots,
    States,
    SystemInfo,
    Tags,
    TaskData,
    TaskTypes,
    Timeout,
    TypePattern,
    UniqueKey,
    Wait,
    Weight,
    Window,
    at_most,
    check_days,
    check_each,
    check_object,
    check_result,
    clamp,
    clean,
    decode_json,
    decoder_for,
    invalid,
    line,
    measured,
    rule,
    screen_bytes,
    states_of,
    suggestion,
    tail,
    text_of,
    whole,
)

T = TypeVar("T")
LONGEST_CLOSING_SECONDS = 31 * 86400.0
LAST_YEAR = 2999  # what follows from a time (an end after days, another zone) must still be one that Python can write


class Body(Struct):
    """A request body. LINES are its strings that must be free of control characters; names have a pattern instead."""

    LINES: ClassVar[tuple[str, ...]] = ()

    def check(self, where: str, screen: Screen) -> None:
        """Raise Invalid for what types alone cannot say; `where` is the prefix of field names: "[3]." or ""."""
        if screen.strings:
            self.check_lines(where)

    def check_lines(self, where: str) -> None:
        for name in self.LINES:
            text = getattr(self, name)
            if text and CONTROL.search(text):
                raise invalid(where + name, "must not hold control characters (line feeds, tabs, NUL)")


class DeviceBody(Body):
    """A message of a device: unknown fields are ignored."""


class StrictBody(Body, forbid_unknown_fields=True):
    """A message of a person or a submitting program: a typing mistake must not be read as "not given"."""


# ----------------------------------------------------------------------------------------- tasks


class TaskIn(StrictBody, kw_only=True):
    """One task to submit."""

    LINES: ClassVar[tuple[str, ...]] = ("username", "app_id", "batch", "unique_key", "same_device_as")

    task_type: Name
    username: Optional[Line128] = None
    app_id: Optional[Line128] = None
    start_date: Optional[Day] = None
    end_date: Optional[Day] = None
    task_data: TaskData = msgspec.field(default_factory=lambda: EMPTY_OBJECT)
    priority: Priority = 5
    batch: Optional[Line128] = None
    unique_key: Optional[UniqueKey] = None
    parent_id: Optional[Id] = None
    delay_seconds: Optional[Delay] = None
    run_at: Optional[Moment] = None
    give_up_seconds: Optional[Wait] = None
    execution_timeout_seconds: Optional[Timeout] = None
    max_retry_count: Optional[RetryCount] = None
    required_tags: Optional[Tags] = None
    pinned_device_id: Optional[Name] = None
    prefer_device_id: Optional[Name] = None
    same_device_as: Optional[Line128] = None
    prefer_seconds: Optional[PreferSeconds] = None
    if_exists: Literal["return", "requeue_failed"] = "return"
    max_batch_tasks: Optional[BatchLimit] = None

    @property
    def data_text(self) -> str:
        """task_data as JSON text; an empty object is "{}", however it was written."""
        text = bytes(self.task_data).decode()
        return text if text[1:-1].strip() else "{}"

    @property
    def run_at_seconds(self) -> float | None:
        """run_at in epoch seconds."""
        return None if self.run_at is None else self.run_at.timestamp()

    def check(self, where: str, screen: Screen) -> None:
        if self.task_data is not EMPTY_OBJECT:
            check_object(self.task_data, where + "task_data", TASK_DATA_BYTES, screen)
        if self.start_date is not None or self.end_date is not None:
            check_days(self.start_date, self.end_date, where)
        if self.run_at is not None and self.delay_seconds is not None:
            raise invalid(where + "run_at", "must not be given together with delay_seconds; send one of them")
        if self.run_at is not None and self.run_at.year > LAST_YEAR:
            raise invalid(where + "run_at", f"must not be after the year {LAST_YEAR}")
        if self.prefer_seconds is not None and self.prefer_device_id is None and self.same_device_as is None:
            raise invalid(where + "prefer_seconds", "needs prefer_device_id or same_device_as; send one of them")
        if self.max_batch_tasks is not None and self.batch is None:
            raise invalid(where + "max_batch_tasks", "needs a batch to count in; send batch too, or leave it out")
        if screen.strings:
            self.check_lines(where)


TaskList = Annotated[list[TaskIn], at_most(MAX_TASKS, "tasks")]


class TasksIn(StrictBody):
    """Many tasks: the same as sending the list itself."""

    tasks: TaskList

    def check(self, where: str, screen: Screen) -> None:
        check_each(self.tasks, where + "tasks", screen)


RawTaskList = Annotated[list[Raw], at_most(MAX_TASKS, "tasks")]


class TasksRawIn(StrictBody):
    """The same with its entries unread."""

    tasks: RawTaskList


class Submission(NamedTuple):
    """What POST /tasks was sent: the tasks, and whether it was one object (then the reply is one object too)."""

    tasks: list[TaskIn]
    single: bool


class FilterIn(StrictBody, kw_only=True):
    """The filter of the task list, as a body. `status` is one state or several, separated by commas."""

    LINES: ClassVar[tuple[str, ...]] = ("status", "batch", "username", "app_id", "text")

    status: Optional[States] = None
    task_type: Optional[Name] = None
    device_id: Optional[Name] = None
    batch: Optional[Line128] = None
    username: Optional[Line128] = None
    app_id: Optional[Line128] = None
    text: Optional[UniqueKey] = None
    created_after: Optional[Moment] = None
    created_before: Optional[Moment] = None
    parent_id: Optional[Id] = None
    error: Optional[ErrorMessage] = None

    def check(self, where: str, screen: Screen) -> None:
        super().check(where, screen)
        if self.status is not None:
            states_of(self.status, where + "status")

    def filters(self) -> dict[str, Any]:
        """The mapping that reads.py takes: only what was given, states as a tuple, times as epoch seconds."""
        chosen = {name: getattr(self, name) for name in self.__struct_fields__ if getattr(self, name) is not None}
        if self.status is not None:
            chosen["status"] = states_of(self.status, "status")
        for name in ("created_after", "created_before"):
            if name in chosen:
                chosen[name] = chosen[name].timestamp()
        return chosen


class ActionIn(StrictBody, kw_only=True):
    """The same change for all tasks that a filter matches."""

    LINES: ClassVar[tuple[str, ...]] = ("reason",)

    action: Literal["cancel", "requeue"]
    filter: FilterIn
    dry_run: bool = False
    reason: Optional[Reason] = None

    def check(self, where: str, screen: Screen) -> None:
        super().check(where, screen)
        self.filter.check(where + "filter.", screen)


class AssignIn(StrictBody):
    """Pins a waiting task to a device."""

    device_id: Name


class ReasonIn(StrictBody):
    """A change that needs no more than a reason."""

    LINES: ClassVar[tuple[str, ...]] = ("reason",)

    reason: Optional[Reason] = None


class StrategyIn(StrictBody):
    """A strategy's name, or module:name for one's own."""

    strategy: Annotated[str, rule("a strategy's name, or module:name", pattern=STRATEGY_PATTERN)]


class LimitIn(StrictBody, kw_only=True):
    """A limit: how many tasks of these types may run or start for each value of `key`, on all devices together.

    Without any number it only makes the values of its key take turns, and lets devices close them.
    """

    name: Name
    task_type: TypePattern = "*"
    key: Key = ""
    max_running: Optional[Number] = None
    max_starts: Optional[Number] = None
    window_seconds: Optional[Window] = None
    max_starts_per_day: Optional[Number] = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The key's fields; none: all tasks of these types are counted together."""
        return (tuple(self.key) if isinstance(self.key, list) else (self.key,)) if self.key else ()

    def check(self, where: str, screen: Screen) -> None:
        if len(self.fields) > 8 or not all(re.search(KEY_FIELD_PATTERN, field) for field in self.fields):
            raise invalid(where + "key", f"must be {KEY_RULE}")
        if len(set(self.fields)) < len(self.fields):
            raise invalid(where + "key", "names a field twice; name each once")
        if (self.max_starts is None) != (self.window_seconds is None):
            missing = "window_seconds" if self.window_seconds is None else "max_starts"
            raise invalid(where + missing, "is needed: max_starts and window_seconds belong together")


class LimitsIn(StrictBody):
    """All limits that are to hold, in place of those that hold now."""

    limits: Annotated[list[LimitIn], at_most(100, "limits")]

    def check(self, where: str, screen: Screen) -> None:
        check_each(self.limits, where + "limits", screen)
        names = [limit.name for limit in self.limits]
        for n, name in enumerate(names):
            if name in names[:n]:
                raise invalid(f"{where}limits[{n}].name", f"is taken: two limits are called {name}; rename one")


class OpenLimitIn(StrictBody):
    """Which value of a limit's key is to be open again, as GET /limits shows it; all of them without it."""

    value: Optional[Annotated[list[UniqueKey], at_most(8, "values")]] = None

    def check(self, where: str, screen: Screen) -> None:
        if screen.strings and any(CONTROL.search(text) for text in self.value or ()):
            raise invalid(where + "value", "must not hold control characters (line feeds, tabs, NUL)")


class LoginIn(StrictBody):
    """The key that the dashboard's form sends."""

    LINES: ClassVar[tuple[str, ...]] = ("key",)

    key: Annotated[str, line(1, 1024)]


class KeyIn(StrictBody, kw_only=True):
    """A new key. days: until it ends; uses (of an enroll key): how many devices it may register."""

    LINES: ClassVar[tuple[str, ...]] = ("name",)

    role: Literal["viewer", "submitter", "operator", "admin", "enroll"]
    name: Optional[Line128] = None
    days: Optional[Annotated[int, whole(1, 3650)]] = None
    uses: Optional[Annotated[int, whole(1, 100_000)]] = None

    def check(self, where: str, screen: Screen) -> None:
        super().check(where, screen)
        if self.uses is not None and self.role != "enroll":
            raise invalid(where + "uses", "is for enroll keys; leave it out")


# ----------------------------------------------------------------------------------------- devices


class Holding(DeviceBody, kw_only=True):
    """An assignment that a device has and has not yet reported."""

    assignment_id: Id
    lease_id: Name
    phase: Literal["queued", "running", "reporting"]
    progress: Optional[float] = None
    message: Optional[FreeText] = None

    def check(self, where: str, screen: Screen) -> None:
        self.progress = clamp(self.progress, 0.0, 1.0)
        self.message = clean(self.message, REASON_LENGTH)


HoldingList = Annotated[list[Holding], at_most(10_000, "entries")]


class RegisterIn(DeviceBody, kw_only=True):
    """A device introduces itself. wants_token: it keeps a token of its own, if its key may give it one."""

    LINES: ClassVar[tuple[str, ...]] = ("device_name", "device_type", "version")

    device_id: Name
    device_name: Optional[Line128] = None
    device_type: Optional[Line128] = None
    boot_id: Name
    protocol: Annotated[int, whole(0, 1_000_000)]
    version: Optional[Line128] = None
    task_types: TaskTypes
    tags: Optional[Tags] = None
    weight: Weight = 1.0
    max_concurrent_tasks: Slots = 1
    holding: Optional[HoldingList] = None
    wants_token: bool = False

    def check(self, where: str, screen: Screen) -> None:
        super().check(where, screen)
        check_each(self.holding, where + "holding", screen)


class HeartbeatIn(DeviceBody, kw_only=True):
    """A device's heartbeat. Figures out of range are dropped, not refused. `problem` is a word, such as spool_full.

    Without holding (or null) it is a sign of life only: what the device holds stays as it is in the books."""

    boot_id: Name
    seq: Sequence
    cpu_raw: Percent = msgspec.field(default_factory=lambda: NOTHING, name="cpu_usage")
    memory_raw: Percent = msgspec.field(default_factory=lambda: NOTHING, name="memory_usage")
    disk_raw: Percent = msgspec.field(default_factory=lambda: NOTHING, name="disk_usage")
    active_raw: Count = msgspec.field(default_factory=lambda: NOTHING, name="active_tasks")
    system_info_raw: SystemInfo = msgspec.field(default_factory=lambda: NOTHING, name="system_info")
    clock_raw: Clock = msgspec.field(default_factory=lambda: NOTHING, name="clock")
    problem: Optional[FreeText] = None
    leaving: bool = False
    holding: Optional[HoldingList] = None

    @property
    def cpu_usage(self) -> float | None:
        return measured(self.cpu_raw, 100.0)

    @property
    def memory_usage(self) -> float | None:
        return measured(self.memory_raw, 100.0)

    @property
    def disk_usage(self) -> float | None:
        return measured(self.disk_raw, 100.0)

    @property
    def active_tasks(self) -> int | None:
        number = measured(self.active_raw, 1e6)
        return None if number is None else int(number)

    @property
    def clock(self) -> float | None:
        return measured(self.clock_raw, 1e11)

    @property
    def system_info_text(self) -> str | None:
        """system_info as JSON text, or None if absent, no object, too large or unfit to store."""
        try:
            check_object(self.system_info_raw, "system_info", SYSTEM_INFO_BYTES, Screen(strings=True, values=True))
        except Invalid:
            return None
        return bytes(self.system_info_raw).decode()

    def check(self, where: str, screen: Screen) -> None:
        self.problem = clean(self.problem, 64)
        check_each(self.holding, where + "holding", screen)


class ArtifactIn(DeviceBody, kw_only=True):
    """A file that belongs to a completed task; it was sent before by PUT /tasks/artifacts."""

    name: ArtifactName
    bytes: ArtifactBytes
    sha256: Sha256


class ReportIn(DeviceBody, kw_only=True):
    """What became of one assignment."""

    assignment_id: Id
    lease_id: Name
    outcome: Literal["running", "completed", "failed", "snoozed", "released"]
    result: ResultData = msgspec.field(default_factory=lambda: NOTHING)
    error_message: Optional[FreeText] = None
    error_type: Optional[FreeText] = None
    log_tail: Optional[FreeText] = None
    duration_seconds: Optional[float] = None
    progress: Optional[float] = None
    retry: bool = True
    retry_after_seconds: Optional[Delay] = None
    snooze_seconds: Optional[Delay] = None
    reason: Optional[FreeText] = None
    limit_closed_seconds: Optional[float] = None
    limit_closed_until: Optional[FreeText] = None
    limit_name: Optional[FreeText] = None
    limit_key: Optional[Annotated[list[FreeText], at_most(8, "fields")]] = None
    new_tasks: Optional[TaskList] = None
    artifacts: Optional[Annotated[list[ArtifactIn], at_most(100, "files")]] = None

    @property
    def result_text(self) -> str | None:
        """result as JSON text, or None for null or none."""
        return text_of(self.result)

    def closed_seconds(self, wall: float) -> float | None:
        """For how long the task's limit keys are to be closed; None where nothing says so, or it is over."""
        if self.limit_closed_seconds is not None:
            return self.limit_closed_seconds if self.limit_closed_seconds > 0 else None
        if self.limit_closed_until is None:
            return None
        try:
            until = parse_time(self.limit_closed_until, "limit_closed_until")
        except Invalid:  # what a device learned must not cost its report
            return None
        return until - wall if until > wall else None

    def check(self, where: str, screen: Screen) -> None:
        if self.result is not NOTHING:
            check_result(self.result, where + "result", screen)
        self.error_message = clean(self.error_message, ERROR_MESSAGE_LENGTH, lines=True)
        self.error_type = clean(self.error_type, 128)
        self.limit_name = clean(self.limit_name, 64)
        self.limit_closed_until = clean(self.limit_closed_until, 64)
        self.limit_closed_seconds = clamp(self.limit_closed_seconds, 0.0, LONGEST_CLOSING_SECONDS)
        self.reason = clean(self.reason, REASON_LENGTH)
        self.log_tail = tail(self.log_tail)
        self.duration_seconds = clamp(self.duration_seconds, 0.0, 1e9)
        self.progress = clamp(self.progress, 0.0, 1.0)
        if self.new_tasks:
            check_each(self.new_tasks, where + "new_tasks", screen)


class ReportsIn(DeviceBody, kw_only=True):
    """Many reports of one device. Read it with `decode_reports`, so that one bad entry does not block the others."""

    device_id: Name
    boot_id: Optional[Name] = None
    reports: Annotated[list[ReportIn], at_most(10_000, "reports")]

    def check(self, where: str, screen: Screen) -> None:
        check_each(self.reports, where + "reports", screen)


class ReportsRawIn(DeviceBody, kw_only=True):
    """The same with its entries unread."""

    device_id: Name
    boot_id: Optional[Name] = None
    reports: Annotated[list[Raw], at_most(10_000, "reports")]


class AssignmentOnly(Struct):
    assignment_id: Id


class BadReport(NamedTuple):
    """An entry of a report that is answered `invalid`; assignment_id is None if not even that could be read."""

    assignment_id: int | None
    problem: Invalid


class Reports(NamedTuple):
    """A device's reports, in the order sent."""

    device_id: str
    boot_id: str | None
    entries: list[ReportIn | BadReport]


class StatusIn(DeviceBody, kw_only=True):
    """A task's new state, from a simple client that holds a lease, or `cancelled` from an operator."""

    status: Literal["running", "completed", "failed", "cancelled"]
    assignment_id: Optional[Id] = None
    lease_id: Optional[Name] = None
    result: ResultData = msgspec.field(default_factory=lambda: NOTHING)
    error_message: Optional[FreeText] = None
    reason: Optional[FreeText] = None

    @property
    def result_text(self) -> str | None:
        """result as JSON text, or None for null or none."""
        return text_of(self.result)

    def check(self, where: str, screen: Screen) -> None:
        if self.result is not NOTHING:
            check_result(self.result, where + "result", screen)
        self.error_message = clean(self.error_message, ERROR_MESSAGE_LENGTH, lines=True)
        self.reason = clean(self.reason, REASON_LENGTH)
        if self.status != "cancelled" and self.lease_id is None:
            raise invalid(where + "lease_id", "is needed unless status is cancelled; it came with the pulled task")


class DeviceNameIn(StrictBody):
    """A person's name for a device; null gives it the name back that its worker sends."""

    LINES: ClassVar[tuple[str, ...]] = ("device_name",)

    device_name: Optional[Line128]


class DeviceStatusIn(StrictBody, kw_only=True):
    """What a person wants a device to do."""

    LINES: ClassVar[tuple[str, ...]] = ("reason",)

    status: Literal["active", "draining", "disabled"]
    reason: Optional[Reason] = None


# ----------------------------------------------------------------------------------------- decode


def decode(raw: bytes, type_: type[T]) -> T:
    """The body as `type_`, checked; raises Invalid (400, 413 or 422) with the field."""
    screen = screen_bytes(raw)
    value = decode_json(raw, type_, "")
    if isinstance(value, Body):
        value.check("", screen)
    elif isinstance(value, list):
        check_each(value, "", screen)
    return value


def decode_submit(raw: bytes) -> Submission:
    """The body of POST /tasks: one task, a list of tasks, or {"tasks": [...]}."""
    if raw.lstrip(b" \t\r\n")[:1] == b"[":
        return Submission(cast("list[TaskIn]", decode(raw, cast("type[Any]", TaskList))), single=False)
    if b'"tasks"' in raw[:4096] and "tasks" in decode_json(raw, cast("type[dict[str, Raw]]", dict[str, Raw]), ""):
        return Submission(decode(raw, TasksIn).tasks, single=False)
    return Submission([decode(raw, TaskIn)], single=True)


def decode_each_task(raw: bytes) -> list[TaskIn | Invalid]:
    """The same body, each task by itself: where one is invalid, what is wrong with it stands in its place."""
    screen_bytes(raw)
    if raw.lstrip(b" \t\r\n")[:1] == b"[":
        entries = decode_json(raw, RawTaskList, "")
    elif b'"tasks"' in raw[:4096] and "tasks" in decode_json(raw, cast("type[dict[str, Raw]]", dict[str, Raw]), ""):
        entries = decode(raw, TasksRawIn).tasks
    else:
        entries = [decode_json(raw, Raw, "")]
    return [_task_or_problem(bytes(entry)) for entry in entries]


def _task_or_problem(raw: bytes) -> TaskIn | Invalid:
    try:
        return decode(raw, TaskIn)
    except Invalid as problem:
        return problem


def decode_reports(raw: bytes) -> Reports:
    """The body of POST /tasks/report; an entry that is invalid becomes a BadReport in its place."""
    try:
        body = decode(raw, ReportsIn)
        return Reports(body.device_id, body.boot_id, list(body.reports))
    except Invalid as problem:
        if problem.code == "bad_json":
            raise
    unread = decode(raw, ReportsRawIn)
    return Reports(unread.device_id, unread.boot_id, [decode_one_report(bytes(entry)) for entry in unread.reports])


def decode_one_report(raw: bytes) -> ReportIn | BadReport:
    try:
        return decode(raw, ReportIn)
    except Invalid as problem:
        try:
            return BadReport(msgspec.json.decode(raw, type=AssignmentOnly).assignment_id, problem)
        except (msgspec.DecodeError, RecursionError):
            return BadReport(None, problem)


# ----------------------------------------------------------------------------------------- query parameters


class Query:
    """A URL's query, read by name; a bad value raises Invalid (422) with its name. Call `finish` when all are read."""

    def __init__(self, query_string: str):
        try:
            pairs = parse_qsl(query_string, keep_blank_values=True, errors="strict", max_num_fields=64)
        except (UnicodeDecodeError, ValueError):
            raise Invalid(400, "bad_query", "The query is not UTF-8, or has more than 64 parameters.") from None
        self._given: dict[str, str] = {}
        self._read: set[str] = set()
        for name, value in pairs:
            if CONTROL.search(name) or len(name) > 64:
                raise Invalid(422, "unknown_field", "A query parameter's name is not a name; leave it out.")
            if name in self._given:
                raise invalid(name, "is given twice; send it once")
            self._given[name] = value

    def text(self, name: str, default: str | None = None, *, maximum: int = 1024) -> str | None:
        """A line of text; an empty value counts as not given."""
        self._read.add(name)
        value = self._given.get(name, "")
        if not value:
            return default
        if len(value) > maximum or CONTROL.search(value):
            raise invalid(name, f"must be text of at most {maximum} characters, without control characters")
        return value

    def message(self, name: str) -> str | None:
        """Text as a device wrote it, of several lines maybe; an empty value counts as not given."""
        self._read.add(name)
        value = self._given.get(name, "")
        if len(value) > ERROR_MESSAGE_LENGTH:
            raise invalid(name, f"must be text of at most {ERROR_MESSAGE_LENGTH} characters")
        return value or None

    def hours(self) -> int:
        """How far back a chart goes: 1 or 24."""
        return int(self.choice("hours", ("1", "24")) or 1)

    def name(self, name: str, default: str | None = None, *, required: bool = False) -> str | None:
        """A name as for task types, devices and tags."""
        value = self.text(name)
        if value is None:
            if required:
                raise Invalid(422, "missing_field", f"{name} is missing; it must be {NAME_RULE}.", name)
            return default
        return check_name(value, name)

    def required(self, name: str) -> str:
        """A line of text that has to be there."""
        value = self.text(name)
        if value is None:
            raise Invalid(422, "missing_field", f"{name} is missing.", name)
        return value

    def integer(
        self, name: str, default: int | None, *, minimum: int = 0, maximum: int = BIGGEST_INTEGER
    ) -> int | None:
        """A whole number in its range."""
        value = self.text(name)
        if value is None:
            return default
        if not re.fullmatch(r"-?[0-9]{1,20}", value) or not minimum <= int(value) <= maximum:
            raise invalid(name, f"must be a whole number from {minimum} to {maximum}")
        return int(value)

    def number(self, name: str, default: float | None, *, minimum: float = 0.0, maximum: float = 1e9) -> float | None:
        """A finite number in its range."""
        value = self.text(name)
        if value is None:
            return default
        if not re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", value) or not minimum <= float(value) <= maximum:
            raise invalid(name, f"must be a number from {minimum:g} to {maximum:g}")
        return float(value)

    def counts(self, name: str, *, maximum: int) -> dict[str, int]:
        """Names with a number each: "echo:400,crawl:2"."""
        found: dict[str, int] = {}
        text = self.text(name, maximum=4096)
        for part in text.split(",") if text else ():
            word, _, number = part.partition(":")
            if not re.fullmatch(r"[0-9]{1,9}", number) or not 1 <= int(number) <= maximum:
                raise invalid(name, f"must be names with a number from 1 to {maximum} each, such as echo:400,crawl:2")
            found[check_name(word, name)] = int(number)
        return found

    def choice(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str | None:
        """One of a few words."""
        value = self.text(name)
        if value is None:
            return default
        if value not in choices:
            raise invalid(name, f"must be one of {', '.join(choices)}" + suggestion(value, choices))
        return value

    def moment(self, name: str) -> float | None:
        """A time with its zone, as epoch seconds."""
        value = self.text(name)
        return None if value is None else parse_time(value, name)

    def filters(self) -> dict[str, Any]:
        """The filters of the task list that were given, as the mapping that reads.py takes."""
        status = self.text("status", maximum=128)
        found: dict[str, Any] = {
            "status": None if status is None else states_of(status, "status"),
            "task_type": self.name("task_type"),
            "device_id": self.name("device_id"),
            "batch": self.text("batch", maximum=128),
            "username": self.text("username", maximum=128),
            "app_id": self.text("app_id", maximum=128),
            "text": self.text("text"),
            "created_after": self.moment("created_after"),
            "created_before": self.moment("created_before"),
            "parent_id": self.integer("parent_id", None, minimum=1),
            "error": self.message("error"),
        }
        return {name: value for name, value in found.items() if value is not None}

    def finish(self) -> None:
        """Refuse parameters that nobody read: a misspelt filter must not export or cancel everything."""
        for name in self._given:
            if name not in self._read:
                hint = suggestion(name, self._read) or "; leave it out"
                raise Invalid(422, "unknown_field", f"{name} is not a known query parameter{hint}.", name)


def check_name(text: str, field: str) -> str:
    """The text, if it is a name (from a path, for example)."""
    if not re.search(NAME_PATTERN, text):
        raise invalid(field, f"must be {NAME_RULE}")
    return text


def check_artifact_name(text: str) -> str:
    """The text, if it is a file's name and never more than that."""
    if not re.search(ARTIFACT_NAME_PATTERN, text):
        raise invalid("name", f"must be {ARTIFACT_NAME_RULE}")
    return text


def check_sha256(text: str) -> str:
    """The text, if it is a sha256 in hex digits."""
    if not re.search(SHA256_PATTERN, text):
        raise invalid("sha256", f"must be {SHA256_RULE}")
    return text


def check_line(text: str, field: str, maximum: int = 128) -> str:
    """The text, if it is one line of at most `maximum` characters (a batch's name in a path, for example)."""
    if not 1 <= len(text) <= maximum or CONTROL.search(text):
        raise invalid(field, f"must be text of 1 to {maximum} characters, without control characters")
    return text


def check_id(text: str, field: str = "task_id") -> int:
    """The number, if the text is an id."""
    if not re.fullmatch(r"[0-9]{1,19}", text) or not 1 <= int(text) <= BIGGEST_INTEGER:
        raise invalid(field, f"must be a whole number from 1 to {BIGGEST_INTEGER}")
    return int(text)


# ----------------------------------------------------------------------------------------- replies


def iso(epoch_seconds: float | None) -> str | None:
    """1764079147.123 -> "2025-11-25T13:59:07.123Z"; None stays None."""
    if epoch_seconds is None:
        return None
    return datetime.fromtimestamp(epoch_seconds, timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


def parse_time(text: str, field: str) -> float:
    """The epoch seconds of a time with its zone."""
    try:
        return msgspec.convert(text, Moment).timestamp()
    except (msgspec.ValidationError, OverflowError, ValueError):
        raise invalid(field, 'must be a time with its zone, such as "2026-11-25T13:59:07Z"') from None


def problem(status: int, code: str, detail: str, field: str | None = None) -> dict[str, Any]:
    """The body of an error reply (RFC 9457, application/problem+json)."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code, "detail": detail}
    return body if field is None else {**body, "field": field}


encode = msgspec.json.Encoder().encode  # NaN and Infinity become null, so a reply is always JSON


# Made now, by one thread: msgspec 0.22 crashes the process when two threads are the first to use a Struct at once.
for _first in (
    TaskIn, TaskList, TasksIn, RawTaskList, TasksRawIn, FilterIn, ActionIn, AssignIn, ReasonIn, StrategyIn, LimitIn,
    LimitsIn, OpenLimitIn, LoginIn, KeyIn, Holding, RegisterIn,
    HeartbeatIn, ArtifactIn, ReportIn, ReportsIn, ReportsRawIn, AssignmentOnly, StatusIn, DeviceNameIn, DeviceStatusIn,
):  # fmt: skip
    decoder_for(cast("Any", _first))
