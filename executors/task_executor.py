"""How is one kind of work done, and what becomes of what it prints, returns and raises?

An executor is a class with one method:

    from executors.task_executor import TaskExecutor

    class CustomTaskExecutor(TaskExecutor):
        def __init__(self):
            super().__init__("custom_task")

        def execute_task(self, task_data):
            return {"status": "success"}

`run(executor, task)` turns every ending into one Outcome and never raises:

    returns a dict, or Result(dict, new_tasks=[...])    completed
    raises Snooze(seconds, reason)                      snoozed: comes again after that time, uses no retry
    raises Snooze(..., closes="task_data.host")         and no device gets another task with that host until then
    raises Retry(message, after=seconds)                failed, retried (after that time instead of the usual backoff)
    raises DoNotRetry(message)                          failed, not retried
    raises anything else, SystemExit and such included  failed, retried: a crawler's errors mostly pass
    returns anything else, or what JSON cannot hold     failed (BadResult), not retried: it would return it again
    does not implement execute_task                     failed, not retried

One executor object may serve several tasks in parallel threads: keep what belongs to one task in local variables, and
reach the running task by `self.context` (log, cancelled, deadline_seconds, progress(), settings, credential(),
artifact()). A credential's value is taken out of result, error and log tail (the device's log hides it by itself).

After install_capture() everything that a task's thread prints to sys.stdout or sys.stderr or logs goes to the device's
log, and its last 16 KiB to the attempt. With isolation "thread" that leaves out what child processes write, what goes
to sys.stdout.buffer, and threads that the executor starts without contextvars.copy_context(); "process" has it all.

It must not import anything but the standard library and executors.device, and it knows nothing of the master.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import logging
import math
import pkgutil
import re
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Optional, Union

import executors
from executors.device.sendable import MAX_RESULT_BYTES, Unsendable, clean_text, hidden, hide, secrets_of, strict_json

LOG_TAIL_BYTES = 16 * 1024
ERROR_MESSAGE_CHARACTERS = 2000
MAX_NEW_TASKS = 10_000
MAX_WAIT_SECONDS = 7 * 86400.0
# A line without an end is passed to the device's log in pieces of this many characters.
LOG_LINE_CHARACTERS = 4000

_log = logging.getLogger("executors.task_executor")
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_CLOSING_FIELD = re.compile(r"task_type|username|app_id|batch|start_date|end_date|task_data\.[A-Za-z0-9_\-]{1,64}")
_ARTIFACT_NAME = re.compile(r"(?!\.)[A-Za-z0-9._\-]{1,100}")


class Retry(Exception):
    """It failed and may succeed later: counts as a retry; `after` (seconds) replaces the usual backoff."""

    def __init__(self, message: str = "", after: Optional[float] = None):
        super().__init__(message)
        self.after = after


class DoNotRetry(Exception):
    """It failed and would fail again: the task ends in failed at once."""


class Snooze(Exception):
    """Not now: the task comes again after `seconds`, and no retry is used.

    `closes`: the fields of this task that were refused with it, such as "task_data.host" or ("username", "app_id"): no
    device gets a task with the same values until then, where the master has a limit with that key. ValueError for what
    no limit may have as its key."""

    def __init__(self, seconds: float, reason: str = "", closes: Union[str, Iterable[str]] = ()):
        super().__init__(reason)
        self.seconds = seconds
        self.closes = closing_fields(closes)


class BadResult(DoNotRetry):
    """The executor returned what cannot be sent as a result."""


@dataclass
class Result:
    """A result with the tasks that come of it: they are created in the same transaction that completes this one.

    `new_tasks` are dicts as POST /tasks takes them; batch and parent_id are filled in where they are missing."""

    result: dict[str, Any]
    new_tasks: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """What became of one attempt, ready for the report."""

    outcome: str  # completed | failed | snoozed
    result: Optional[dict[str, Any]] = None
    error_message: Optional[str] = None
    error_type: Optional[str] = None
    log_tail: str = ""
    duration_seconds: float = 0.0
    retry: bool = True
    retry_after_seconds: Optional[float] = None
    snooze_seconds: Optional[float] = None
    closes: list[str] = field(default_factory=list)
    new_tasks: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256 of each file to send

    def as_report(self, assignment_id: int, lease_id: str) -> dict[str, Any]:
        """One entry of POST /tasks/report, without what says nothing."""
        entry: dict[str, Any] = {"assignment_id": assignment_id, "lease_id": lease_id, "outcome": self.outcome}
        entry["duration_seconds"] = round(self.duration_seconds, 6)
        for name in ("result", "error_message", "error_type", "retry_after_seconds", "snooze_seconds"):
            if getattr(self, name) is not None:
                entry[name] = getattr(self, name)
        if self.log_tail:
            entry["log_tail"] = self.log_tail
        if self.outcome == "failed" and not self.retry:
            entry["retry"] = False
        if self.outcome == "snoozed" and self.error_message:
            entry["reason"] = entry.pop("error_message")
        if self.closes:
            entry["limit_key"], entry["limit_closed_seconds"] = self.closes, self.snooze_seconds
        if self.new_tasks:
            entry["new_tasks"] = self.new_tasks
        if self.artifacts:
            entry["artifacts"] = self.artifacts
        return entry


# ---------------------------------------------------------------------------------------------------------------------
# The running task


class LogTail:
    """The last 16 KiB of what one task wrote. Any thread may write."""

    def __init__(self, limit: int = LOG_TAIL_BYTES, secrets: tuple[str, ...] = ()):
        self._limit = limit
        self._secrets = secrets
        self._bytes = bytearray()
        self._line = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        # Hidden before anything is cut: half a credential is still too much of it.
        written = clean_text(hide(text, self._secrets)[-self._limit :]).encode("utf-8")
        with self._lock:
            self._bytes += written
            if len(self._bytes) > 2 * self._limit:
                del self._bytes[: -self._limit]

    def text(self) -> str:
        with self._lock:
            # "ignore": the cut may have gone through a character.
            return hide(self._bytes[-self._limit :].decode("utf-8", "ignore"), self._secrets)

    def ends_line(self) -> bool:
        with self._lock:
            return not self._bytes or self._bytes.endswith(b"\n")

    def complete_lines(self, text: str) -> list[str]:
        """Add printed text; return the lines that are complete now, for the device's log."""
        with self._lock:
            *lines, self._line = hide(self._line + text, self._secrets).split("\n")
            if len(self._line) > LOG_LINE_CHARACTERS:
                lines.append(self._line)
                self._line = ""
        return [line[i : i + LOG_LINE_CHARACTERS] for line in lines for i in range(0, len(line), LOG_LINE_CHARACTERS)]

    def rest_of_line(self) -> str:
        with self._lock:
            rest, self._line = self._line, ""
        return rest


class Context:
    """What an executor may know and say about the task it is running."""

    def __init__(
        self,
        task: Mapping[str, Any],
        *,
        is_cancelled: Optional[Callable[[], bool]] = None,
        report_progress: Optional[Callable[[float, str], None]] = None,
        settings: Optional[Mapping[str, Any]] = None,
        artifact_folder: Union[Path, str, None] = None,
        tail: Optional[LogTail] = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.task = task
        self._device_settings = settings or {}
        self.secrets = secrets_of(self._device_settings)
        self.tail = LogTail(secrets=self.secrets) if tail is None else tail
        self._is_cancelled = is_cancelled
        self._report_progress = report_progress
        self._artifact_folder = artifact_folder
        self._artifact_names: list[str] = []
        self._clock = clock
        timeout = bounded_seconds(task.get("execution_timeout_seconds"))
        self._deadline = clock() + timeout if timeout else None

    @property
    def log(self) -> logging.Logger:
        """For what an executor has to say: to the device's log, and to the attempt."""
        return logging.getLogger(f"executors.{self.task.get('task_type') or 'task'}")

    @property
    def cancelled(self) -> bool:
        """Has the master taken this task back? A long executor asks now and then; its result then counts no more."""
        return bool(self._is_cancelled and self._is_cancelled())

    @property
    def deadline_seconds(self) -> Optional[float]:
        """Seconds left before the task runs out of time (0 when they are gone); None without a limit."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def progress(self, fraction: float, message: str = "") -> None:
        """Say how far the task is, 0 to 1; the next heartbeat carries it."""
        if self._report_progress and math.isfinite(fraction):
            said = clean_text(hide(str(message), self.secrets))[:200]
            self._report_progress(min(1.0, max(0.0, float(fraction))), said)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The device's settings by name, without those that are secret."""
        return MappingProxyType({k: v for k, v in self._device_settings.items() if k not in ("api_key", "credentials")})

    def credential(self, name: str) -> str:
        """The token of that name in this device's setting `credentials`; it is hidden in all that the task says."""
        value = dict(self._device_settings.get("credentials") or {}).get(name)
        if not isinstance(value, str) or not value:
            raise DoNotRetry(f"this device has no credential {name!r}: write it under credentials in its config file")
        return value

    def artifact(self, name: str) -> Path:
        """Where to write a file of that name; it goes to the master if the task completes, and only then."""
        if not _ARTIFACT_NAME.fullmatch(name):
            raise DoNotRetry(f"an artifact cannot be named {name!r}: write 1 to 100 of A-Z a-z 0-9 . _ -, no dot first")
        if self._artifact_folder is None:
            raise DoNotRetry("there is no folder for artifacts here: run the task on a device")
        folder = Path(self._artifact_folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if name not in self._artifact_names:
            self._artifact_names.append(name)
        return folder / name

    def artifacts(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of each artifact that was written."""
        if self._artifact_folder is None or not self._artifact_names:
            return []
        folder = Path(self._artifact_folder)
        written = [
            {"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for name in self._artifact_names
            if (path := folder / name).is_file()
        ]
        if not written:  # the device looks for files only where there are some
            with contextlib.suppress(OSError):
                folder.rmdir()
        return written


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()


_current: ContextVar[Optional[Context]] = ContextVar("current_task", default=None)


def current() -> Context:
    """The context of the task that this thread is running."""
    context = _current.get()
    if context is None:
        raise RuntimeError("no task is running in this thread; a thread of your own needs contextvars.copy_context()")
    return context


class TaskExecutor:
    """Base class of all executors.

    `isolation`: "process" runs each task in a process of its own, which is killed when its time is up; "thread" runs it
    in a thread of the worker, which costs less and cannot be killed: only for code that keeps its own time limits.
    `memory_limit_mb`: what one task may use at most, in a process of its own; None is the device's task_memory_mb.
    `required_modules`: the executor is left off a device where one of them cannot be imported.
    `tags`: a device with this executor registers them, such as "selectors"."""

    task_type: str = ""
    isolation: str = "process"
    memory_limit_mb: Optional[int] = None
    required_modules: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def __init__(self, task_type: str):
        self.task_type = task_type

    @property
    def context(self) -> Context:
        return current()

    def execute_task(self, task_data: dict[str, Any]) -> Any:
        """Do the work. username, app_id, start_date and end_date of the task are added to `task_data` where set."""
        raise DoNotRetry(f"the executor of {self.task_type!r} has no execute_task(self, task_data)")


# ---------------------------------------------------------------------------------------------------------------------
# One run, in small steps


def run(
    executor: TaskExecutor,
    task: Mapping[str, Any],
    *,
    is_cancelled: Optional[Callable[[], bool]] = None,
    report_progress: Optional[Callable[[float, str], None]] = None,
    settings: Optional[Mapping[str, Any]] = None,
    artifact_folder: Union[Path, str, None] = None,
    tail: Optional[LogTail] = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run one pulled task in this thread and say what became of it. Never raises.

    `settings`: the device's, by name, secrets included. `artifact_folder` is made when the task asks for an artifact;
    whoever gave it removes it."""
    started = clock()
    context = Context(
        task,
        is_cancelled=is_cancelled,
        report_progress=report_progress,
        settings=settings,
        artifact_folder=artifact_folder,
        tail=tail,
        clock=clock,
    )
    token = _current.set(context)
    try:
        outcome = execute(executor, context)
        pass_to_device_log(context, [context.tail.rest_of_line()])
    finally:
        _current.reset(token)
    outcome.log_tail, outcome.duration_seconds = context.tail.text(), max(0.0, clock() - started)
    return outcome


def execute(executor: TaskExecutor, context: Context) -> Outcome:
    """Call the executor; whatever comes out of it is an outcome."""
    try:
        outcome = completed(executor.execute_task(arguments(context.task)), context.task)
        outcome.artifacts = context.artifacts()
    except BaseException as error:  # an executor that calls sys.exit() must not end the device
        try:
            outcome = ended_by(error, context.secrets)
            if not isinstance(error, (Retry, DoNotRetry, Snooze)):
                note_traceback(error, context)
        except BaseException:  # what was raised has code of its own, in its class too
            outcome = Outcome("failed", error_type="Exception", error_message="it raised what cannot be described")
    if context.secrets:
        outcome.result = hidden(outcome.result, context.secrets)
        outcome.new_tasks = hidden(outcome.new_tasks, context.secrets)
    return outcome


def arguments(task: Mapping[str, Any]) -> dict[str, Any]:
    """The task_data that the executor gets."""
    task_data = dict(task.get("task_data") or {})
    for name in ("username", "app_id", "start_date", "end_date"):
        if task.get(name) not in (None, ""):
            task_data.setdefault(name, task[name])
    return task_data


def completed(returned: Any, task: Mapping[str, Any]) -> Outcome:
    """The outcome of a returned value; BadResult if it cannot be sent."""
    result, new_tasks = (returned.result, returned.new_tasks) if isinstance(returned, Result) else (returned, [])
    if not isinstance(result, dict):
        raise BadResult(f"execute_task returned {type(result).__name__}: return a dict (a JSON object)")
    if not isinstance(new_tasks, (list, tuple)) or not all(isinstance(child, dict) for child in new_tasks):
        raise BadResult("new_tasks is not a list of dicts: write each as POST /tasks takes it")
    if len(new_tasks) > MAX_NEW_TASKS:
        raise BadResult(f"new_tasks holds {len(new_tasks)} tasks: at most {MAX_NEW_TASKS} may come of one")
    budget = [MAX_RESULT_BYTES]
    try:
        strict_result = strict_json(result, "result", budget)
        strict_tasks = [strict_json(child, f"new_tasks[{i}]", budget) for i, child in enumerate(new_tasks)]
    except Unsendable as error:
        raise BadResult(str(error)) from None
    inherited = {"batch": task.get("batch"), "parent_id": task.get("id")}
    inherited = {name: value for name, value in inherited.items() if value is not None}
    return Outcome("completed", result=strict_result, new_tasks=[{**inherited, **child} for child in strict_tasks])


def ended_by(error: BaseException, secrets: tuple[str, ...] = ()) -> Outcome:
    """The outcome of a raised exception."""
    message, error_type = describe(error, secrets), type(error).__name__
    if isinstance(error, Snooze):
        seconds = bounded_seconds(attribute_of(error, "seconds"))
        closes = closing_fields(attribute_of(error, "closes") or ())
        seconds = 60.0 if seconds is None else seconds
        return Outcome("snoozed", error_message=message, snooze_seconds=seconds, closes=list(closes))
    if isinstance(error, Retry):
        after = bounded_seconds(attribute_of(error, "after"))
        return Outcome("failed", error_message=message, error_type=error_type, retry_after_seconds=after)
    return Outcome("failed", error_message=message, error_type=error_type, retry=not isinstance(error, DoNotRetry))


def closing_fields(closes: Union[str, Iterable[str]]) -> tuple[str, ...]:
    """The fields of a closing, checked as the master checks a limit's key."""
    fields = (closes,) if isinstance(closes, str) else tuple(closes)
    if len(fields) > 8 or not all(isinstance(name, str) and _CLOSING_FIELD.fullmatch(name) for name in fields):
        raise ValueError(
            f"closes is {closes!r:.100}: write username, app_id, batch, start_date, end_date, task_type or"
            " task_data.NAME, or a list of at most 8 of them"
        )
    return fields


def attribute_of(error: BaseException, name: str) -> Any:
    """None where a subclass' own __init__ has not set it, or its own code fails."""
    try:
        return getattr(error, name, None)
    except BaseException:
        return None


def describe(error: BaseException, secrets: tuple[str, ...] = ()) -> str:
    """One bounded sentence for an exception, even for one whose own text fails."""
    try:
        text = str(error)
    except BaseException:  # its __str__ may end in any way
        text = ""
    if isinstance(error, SystemExit):
        text = f"the executor called sys.exit({text})"
    return clean_text(hide(text or type(error).__name__, secrets))[:ERROR_MESSAGE_CHARACTERS]


def note_traceback(error: BaseException, context: Context) -> None:
    """Write an unexpected exception's traceback to the attempt and, unless the task was to end, to the device's log."""
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except BaseException:
        text = f"{type(error).__name__} (its traceback cannot be shown)\n"
    pass_to_device_log(context, [context.tail.rest_of_line()])
    context.tail.write(text if context.tail.ends_line() else "\n" + text)
    with contextlib.suppress(Exception):
        level, task = logging.DEBUG if context.cancelled else logging.WARNING, context.task
        _log.log(level, "raised task=%s type=%s\n%s", task.get("id"), task.get("task_type"), text.rstrip())


def bounded_seconds(value: Any) -> Optional[float]:
    """A wait between 0 and 7 days; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    return float(min(MAX_WAIT_SECONDS, max(0.0, value)))


# ---------------------------------------------------------------------------------------------------------------------
# What a task prints and logs

# True while a printed line is on its way to the device's log: a console handler may hold our own stream.
_passing_on: ContextVar[bool] = ContextVar("passing_on", default=False)


def pass_to_device_log(context: Context, lines: Iterable[str]) -> None:
    """Write what a task printed to the device's log, one record a line."""
    token = _passing_on.set(True)
    try:
        for line in lines:
            if line.strip():
                _log.info("printed task=%s: %s", context.task.get("id"), clean_text(line.rstrip()))
    finally:
        _passing_on.reset(token)


class TaskStream:
    """Stands in for sys.stdout or sys.stderr: a task's text goes to its tail, everybody else's to the real stream."""

    def __init__(self, original: Any):
        self.original = original  # None where a service has no console

    def write(self, text: str) -> int:
        context = _current.get()
        if context is None or _passing_on.get():
            return self.original.write(text) if self.original is not None else len(text)
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        context.tail.write(text)
        pass_to_device_log(context, context.tail.complete_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.original is not None:
            self.original.flush()

    def isatty(self) -> bool:
        return _current.get() is None and self.original is not None and self.original.isatty()

    def close(self) -> None:
        """Nothing: an executor must not close the device's console."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class TailHandler(logging.Handler):
    """Copies what a task's thread logs to the task's tail."""

    def emit(self, record: logging.LogRecord) -> None:
        context = _current.get()
        # Records of this file are text that the tail has already.
        if context is not None and record.name != _log.name:
            try:
                context.tail.write(self.format(record) + "\n")
            except Exception:
                self.handleError(record)


_capture_lock = threading.Lock()
_tail_handler: Optional[TailHandler] = None


def install_capture() -> None:
    """Capture what tasks print and log in this process; called again, it changes nothing.

    Call it after logging is configured, so that the console handler holds the real stream."""
    global _tail_handler
    with _capture_lock:
        if _tail_handler is not None:
            return
        _tail_handler = TailHandler()
        _tail_handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
        logging.getLogger().addHandler(_tail_handler)
        sys.stdout = TaskStream(sys.stdout)
        sys.stderr = TaskStream(sys.stderr)


def remove_capture() -> None:
    """Put the real streams back."""
    global _tail_handler
    with _capture_lock:
        if _tail_handler is None:
            return
        logging.getLogger().removeHandler(_tail_handler)
        _tail_handler = None
        # Somebody may have put another stream over ours; then it is theirs to take away.
        if isinstance(sys.stdout, TaskStream):
            sys.stdout = sys.stdout.original
        if isinstance(sys.stderr, TaskStream):
            sys.stderr = sys.stderr.original


# ---------------------------------------------------------------------------------------------------------------------
# The registry


def load_executors(extra_files: Iterable[str] = ()) -> dict[str, TaskExecutor]:
    """Every executor of this folder and of the extra files, by task type. What cannot be loaded is logged and left off.

    A later file may replace a task type of an earlier one (so your own "crawl" wins over ours); that is logged."""
    loaded: dict[str, TaskExecutor] = {}
    # Not by a look into the folder: worker.pyz has none. A folder below this one is a library, no executor.
    for module in sorted(pkgutil.iter_modules(executors.__path__), key=lambda module: module.name):
        if not module.ispkg and module.name != "task_executor":
            name = f"executors.{module.name}"
            add_executors(loaded, name, partial(importlib.import_module, name))
    for path in extra_files:
        extra = Path(path).expanduser().resolve()
        add_executors(loaded, str(extra), partial(import_file, extra))
    return loaded


def add_executors(loaded: dict[str, TaskExecutor], path: str, import_it: Callable[[], ModuleType]) -> None:
    """Import one file and add what it defines."""
    try:
        module = import_it()
    except BaseException as error:  # a file that calls sys.exit() on import is left off, too
        if isinstance(error, KeyboardInterrupt):
            raise
        _log.error("left off executors of %s: %s: %s", path, type(error).__name__, describe(error), exc_info=True)
        return
    found = [executor for cls in executor_classes(module) if (executor := make_executor(cls, path)) is not None]
    if not found:
        _log.warning("no executor in %s: it needs a class that inherits TaskExecutor and has execute_task", path)
    for executor in found:
        if executor.task_type in loaded:
            _log.warning("task type %s is taken from %s now", executor.task_type, path)
        loaded[executor.task_type] = executor


def import_file(path: Path) -> ModuleType:
    """Import a file that is in no package; files beside it can be imported by it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check --executors (setting executors)")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # The sum keeps two files of one name apart; a child process finds the same one by it.
    name = f"executor_file_{path.stem}_{zlib.crc32(str(path).encode('utf-8', 'surrogateescape')):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def executor_classes(module: ModuleType) -> list[type[TaskExecutor]]:
    """The executors that this module defines itself: not those it imports, nor bases without execute_task."""
    return [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, TaskExecutor)
        and cls.__module__ == module.__name__
        and not cls.__name__.startswith("_")
        and cls.execute_task is not TaskExecutor.execute_task
    ]


def make_executor(cls: type[TaskExecutor], path: str) -> Optional[TaskExecutor]:
    """Make one executor object; None, and a line in the log, if it cannot work here."""
    missing = [name for name in cls.required_modules if not is_importable(name)]
    if missing:
        _log.warning("left off %s of %s: pip install %s", cls.__name__, path, " ".join(missing))
        return None
    try:
        executor = cls()  # type: ignore[call-arg]
        # The master would refuse the whole device for one name that it does not take.
        if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in (executor.task_type, *executor.tags)):
            raise ValueError('write super().__init__("task_type"): names and tags are 1 to 64 of A-Z a-z 0-9 _ . -')
        if executor.isolation not in ("process", "thread"):
            raise ValueError(f'isolation is {executor.isolation!r}: write "process" or "thread"')
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        _log.error("left off %s of %s: %s: %s", cls.__name__, path, kind, describe(error), exc_info=True)
        return None
    return executor


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """DoNotRetry for a field that is not `known`: a typing error in a limit would run without it."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            meant = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(known)}"
            raise DoNotRetry(f"{where}.{name!s:.100} is not known: {meant}")


def is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def device_tags(loaded: Mapping[str, TaskExecutor]) -> list[str]:
    """The tags that these executors bring to the device, sorted."""
    return sorted({tag for executor in loaded.values() for tag in executor.tags})
