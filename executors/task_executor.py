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
    raises Retry(message, after_seconds)                failed, retried (after_seconds instead of the usual backoff)
    raises DoNotRetry(message)                          failed, not retried
    raises anything else, SystemExit and such included  failed, retried: a crawler's errors mostly pass
    returns anything else, or what JSON cannot hold     failed (BadResult), not retried: it would return it again
    does not implement execute_task                     failed, not retried

One executor object serves several tasks in parallel threads: keep what belongs to one task in local variables, and
reach the running task by `self.context` (its log, is_cancelled(), progress(), deadline_seconds).

After install_capture() everything that a task's thread prints to sys.stdout or sys.stderr or logs goes to the device's
log, and its last 16 KiB to the attempt. Not captured: what child processes write, what goes to sys.stdout.buffer, and
threads that the executor starts without contextvars.copy_context().

This file must not import anything but the standard library, and it knows nothing of the master.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import math
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

LOG_TAIL_BYTES = 16 * 1024
ERROR_MESSAGE_CHARACTERS = 2000
# A report's envelope adds some levels; the master refuses JSON deeper than 32.
MAX_RESULT_DEPTH = 24
# Result and new tasks of one task as JSON. A report must fit into one request (the master's max_body_bytes, 8 MiB).
MAX_RESULT_BYTES = 7 * 1024 * 1024
MAX_NEW_TASKS = 10_000
MAX_WAIT_SECONDS = 7 * 86400.0
# A line without an end is passed to the device's log in pieces of this many characters.
LOG_LINE_CHARACTERS = 4000

_log = logging.getLogger("executors.task_executor")
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_UNSENDABLE = re.compile("[\0\ud800-\udfff]")


class Retry(Exception):
    """It failed and may succeed later: counts as a retry; `after_seconds` replaces the usual backoff."""

    def __init__(self, message: str = "", after_seconds: Optional[float] = None):
        super().__init__(message)
        self.after_seconds = after_seconds


class DoNotRetry(Exception):
    """It failed and would fail again: the task ends in failed at once."""


class Snooze(Exception):
    """Not now: the task comes again after `seconds`, and no retry is used."""

    def __init__(self, seconds: float, reason: str = ""):
        super().__init__(reason)
        self.seconds = seconds


class BadResult(DoNotRetry):
    """The executor returned what cannot be sent as a result."""


@dataclass
class Result:
    """A result with the tasks that come of it: they are created in the same transaction that completes this one.

    `new_tasks` are dicts as POST /tasks takes them; batch and parent_id are filled in where they are missing."""

    result: dict[str, Any]
    new_tasks: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
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
    new_tasks: list[dict[str, Any]] = field(default_factory=list)

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
        if self.new_tasks:
            entry["new_tasks"] = self.new_tasks
        return entry


# ---------------------------------------------------------------------------------------------------------------------
# The running task


class LogTail:
    """The last 16 KiB of what one task wrote. Any thread may write."""

    def __init__(self, limit: int = LOG_TAIL_BYTES):
        self._limit = limit
        self._bytes = bytearray()
        self._line = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        written = clean_text(text[-self._limit :]).encode("utf-8")
        with self._lock:
            self._bytes += written
            if len(self._bytes) > 2 * self._limit:
                del self._bytes[: -self._limit]

    def text(self) -> str:
        with self._lock:
            # "ignore": the cut may have gone through a character.
            return self._bytes[-self._limit :].decode("utf-8", "ignore")

    def ends_line(self) -> bool:
        with self._lock:
            return not self._bytes or self._bytes.endswith(b"\n")

    def complete_lines(self, text: str) -> list[str]:
        """Add printed text; return the lines that are complete now, for the device's log."""
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
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
        clock: Callable[[], float] = time.monotonic,
    ):
        self.task = task
        self.log = logging.getLogger(f"executors.{task.get('task_type') or 'task'}")
        self.tail = LogTail()
        self._is_cancelled = is_cancelled
        self._report_progress = report_progress
        self._clock = clock
        timeout = bounded_seconds(task.get("execution_timeout_seconds"))
        self._deadline = clock() + timeout if timeout else None

    def is_cancelled(self) -> bool:
        """Has the master taken this task back? A long executor asks now and then; its result then counts no more."""
        return bool(self._is_cancelled and self._is_cancelled())

    @property
    def deadline_seconds(self) -> Optional[float]:
        """Seconds left before the task runs out of time (0 when they are gone); None without a limit."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def progress(self, fraction: float, message: str = "") -> None:
        """Say how far the task is, 0 to 1; the next heartbeat carries it."""
        if self._report_progress and math.isfinite(fraction):
            self._report_progress(min(1.0, max(0.0, float(fraction))), clean_text(str(message))[:200])


_current: ContextVar[Optional[Context]] = ContextVar("current_task", default=None)


def current() -> Context:
    """The context of the task that this thread is running."""
    context = _current.get()
    if context is None:
        raise RuntimeError("no task is running in this thread; a thread of your own needs contextvars.copy_context()")
    return context


class TaskExecutor:
    """Base class of all executors.

    `required_modules`: the executor is left off a device where one of them cannot be imported.
    `tags`: a device with this executor registers them, such as "selectors"."""

    task_type: str = ""
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
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run one pulled task in this thread and say what became of it. Never raises."""
    started = clock()
    context = Context(task, is_cancelled=is_cancelled, report_progress=report_progress, clock=clock)
    token = _current.set(context)
    try:
        outcome = execute(executor, context)
        pass_to_device_log(context, [context.tail.rest_of_line()])
    finally:
        _current.reset(token)
    return replace(outcome, log_tail=context.tail.text(), duration_seconds=max(0.0, clock() - started))


def execute(executor: TaskExecutor, context: Context) -> Outcome:
    """Call the executor; whatever comes out of it is an outcome."""
    try:
        return completed(executor.execute_task(arguments(context.task)), context.task)
    except BaseException as error:  # an executor that calls sys.exit() must not end the device
        if not isinstance(error, (Retry, DoNotRetry, Snooze)):
            note_traceback(error, context)
        return ended_by(error)


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
    strict_result = strict_json(result, "result", budget)
    strict_tasks = [strict_json(child, f"new_tasks[{i}]", budget) for i, child in enumerate(new_tasks)]
    inherited = {"batch": task.get("batch"), "parent_id": task.get("id")}
    inherited = {name: value for name, value in inherited.items() if value is not None}
    return Outcome("completed", result=strict_result, new_tasks=[{**inherited, **child} for child in strict_tasks])


def ended_by(error: BaseException) -> Outcome:
    """The outcome of a raised exception."""
    message, error_type = describe(error), type(error).__name__
    if isinstance(error, Snooze):
        seconds = bounded_seconds(error.seconds)
        return Outcome("snoozed", error_message=message, snooze_seconds=60.0 if seconds is None else seconds)
    if isinstance(error, Retry):
        after = bounded_seconds(error.after_seconds)
        return Outcome("failed", error_message=message, error_type=error_type, retry_after_seconds=after)
    return Outcome("failed", error_message=message, error_type=error_type, retry=not isinstance(error, DoNotRetry))


def describe(error: BaseException) -> str:
    """One bounded sentence for an exception, even for one whose own text fails."""
    try:
        text = str(error)
    except Exception:
        text = ""
    if isinstance(error, SystemExit):
        text = f"the executor called sys.exit({text})"
    return clean_text(text or type(error).__name__)[:ERROR_MESSAGE_CHARACTERS]


def note_traceback(error: BaseException, context: Context) -> None:
    """Write an unexpected exception's traceback to the attempt and to the device's log."""
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:
        text = f"{type(error).__name__} (its traceback cannot be shown)\n"
    pass_to_device_log(context, [context.tail.rest_of_line()])
    context.tail.write(text if context.tail.ends_line() else "\n" + text)
    with contextlib.suppress(Exception):
        _log.warning("raised task=%s type=%s\n%s", context.task.get("id"), context.task.get("task_type"), text.rstrip())


def bounded_seconds(value: Any) -> Optional[float]:
    """A wait between 0 and 7 days; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    return float(min(MAX_WAIT_SECONDS, max(0.0, value)))


# ---------------------------------------------------------------------------------------------------------------------
# Strict JSON


def clean_text(text: str) -> str:
    """NUL and lone surrogates become U+FFFD: the master refuses both, and a page may contain either."""
    return _UNSENDABLE.sub("\ufffd", text)


def strict_json(value: Any, path: str, budget: list[int], depth: int = 0) -> Any:
    """A copy of `value` that every JSON reader takes; BadResult names the place that none would take.

    `budget` holds the bytes left and is counted down."""
    if depth > MAX_RESULT_DEPTH:
        raise BadResult(f"{path[:200]} is nested deeper than {MAX_RESULT_DEPTH} levels")
    budget[0] -= 6 + (len(value.encode("utf-8", "replace")) if isinstance(value, str) else 0)
    if budget[0] < 0:
        raise BadResult(f"the result is over {MAX_RESULT_BYTES} bytes: store large content elsewhere, return where")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean_text(str(value))
    if isinstance(value, (int, float)):
        return strict_number(value, path)
    if isinstance(value, Mapping):
        return {
            strict_key(key, path, budget): strict_json(item, f"{path}.{key}", budget, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [strict_json(item, f"{path}[{i}]", budget, depth + 1) for i, item in enumerate(value)]
    kind = type(value).__name__
    raise BadResult(f"{path} is of type {kind}, which JSON cannot hold: return text, numbers, lists or dicts")


def strict_number(value: Any, path: str) -> Any:
    """A plain int of 64 bits or a finite float."""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise BadResult(f"{path} is an integer past 64 bits: return it as text")
        return int(value)
    if not math.isfinite(value):
        raise BadResult(f"{path} is {float(value)}, which JSON cannot hold: return null instead")
    return float(value)


def strict_key(key: Any, path: str, budget: list[int]) -> str:
    if not isinstance(key, str):
        raise BadResult(f"{path} has the key {key!r} of type {type(key).__name__}: keys are text")
    budget[0] -= 6 + len(key)
    return clean_text(str(key))


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
    executors: dict[str, TaskExecutor] = {}
    here = Path(__file__).parent
    for path in sorted(here.glob("*.py")):
        if path.stem not in ("__init__", "task_executor"):
            add_executors(executors, path, partial(importlib.import_module, f"executors.{path.stem}"))
    for name in extra_files:
        extra = Path(name).expanduser().resolve()
        add_executors(executors, extra, partial(import_file, extra))
    return executors


def add_executors(executors: dict[str, TaskExecutor], path: Path, import_it: Callable[[], ModuleType]) -> None:
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
        if executor.task_type in executors:
            _log.warning("task type %s is taken from %s now", executor.task_type, path)
        executors[executor.task_type] = executor


def import_file(path: Path) -> ModuleType:
    """Import a file that is in no package; files beside it can be imported by it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check --executors (setting executors)")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"executor_file_{path.stem}"
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


def make_executor(cls: type[TaskExecutor], path: Path) -> Optional[TaskExecutor]:
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
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        _log.error("left off %s of %s: %s: %s", cls.__name__, path, kind, describe(error), exc_info=True)
        return None
    return executor


def is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def device_tags(executors: Mapping[str, TaskExecutor]) -> list[str]:
    """The tags that these executors bring to the device, sorted."""
    return sorted({tag for executor in executors.values() for tag in executor.tags})
