"""What does the process do that runs tasks for the worker?

It is started by child.py, takes one order after another from its stdin, and says on its stdout what the task says.
Both carry frames: the length in 4 bytes, then JSON. Before the first task it keeps both ends for itself under other
numbers, so that whatever the task, its C code or its children write to 1 and 2 comes out of stderr and breaks nothing.

    orders  {"hello": {path, level, settings}}   once
            {"run": {number, task, module, file, name, artifact_folder, memory_limit_mb}}
            {"cancel": number}                   context.cancelled becomes true
            {"stop": number}                     TaskStopped is raised in the task
    words   {"began": number}, {"tail": [number, text]}, {"log": [level, name, text]},
            {"progress": [number, fraction, message]}, {"end": [number, outcome, why it is worn or ""]}

When the worker is gone, however it went, a guard ends this process and all that its tasks have started. The guard is a
process of its own because a task may be in C code that lets no Python thread run. SIGTERM by itself is ignored: a
service manager sends it to everybody, and the worker then lets its tasks finish.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import logging
import os
import queue
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Optional

from executors import task_executor
from executors.device.process_tree import MARK_NAME, adopt_orphans, kill_tree, start_time
from executors.device.wear import Start

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LARGEST_FRAME_BYTES = 64 * 1024 * 1024
# What a task says about its progress: a burst at once, then so many a second.
PROGRESS_BURST, PROGRESS_PER_SECOND = 50, 20
TAIL_PIECE_CHARACTERS = 4096
MEGABYTE = 1024 * 1024

# error_type of a report
OUT_OF_MEMORY, EXITED = "out_of_memory", "exited"

# How long the guard has, before the process ends itself.
GUARD_SECONDS = 10.0

_HEADER = struct.Struct("!I")


class TaskStopped(BaseException):
    """The worker ends this task; not an Exception, so that `except Exception` does not swallow it."""


def as_frame(content: Mapping[str, Any]) -> bytes:
    body = json.dumps(content, default=str).encode("ascii")
    return _HEADER.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> Optional[dict[str, Any]]:
    """The next frame; None at the end of the stream. ValueError for what is no frame."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    (length,) = _HEADER.unpack(header)
    if length > LARGEST_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    body = stream.read(length)
    if len(body) < length:
        return None
    content = json.loads(body)
    if not isinstance(content, dict):
        raise ValueError("a frame that is no object")
    return content


def raw_end(mark: str) -> bytes:
    """What stands in stderr behind the output of one task."""
    return f"\0{mark}\0".encode()


class Words:
    """The way to the worker, for any thread. A process that the task forked has no such way: it only prints."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.is_open = True

    def say(self, content: Mapping[str, Any]) -> None:
        if not self.is_open:
            return
        left = memoryview(as_frame(content))
        with self._lock:
            while left:
                left = left[os.write(self._descriptor, left) :]

    def close_in_fork(self) -> None:
        self.is_open = False
        os.close(self._descriptor)


class SpokenTail(task_executor.LogTail):
    """The log tail of the running task: what is written to it reaches the worker line by line and outlives us."""

    def __init__(self, words: Words, number: int, secrets: tuple[str, ...]) -> None:
        super().__init__(secrets=secrets)
        self._words = words
        self._number = number
        self._unsaid = ""
        self._saying = threading.Lock()

    def write(self, text: str) -> None:
        if not self._words.is_open:
            with contextlib.suppress(OSError, ValueError):
                sys.__stdout__.write(text)  # type: ignore[union-attr]
            return
        super().write(text)
        with self._saying:
            self._unsaid += text
            if "\n" in text or len(self._unsaid) > TAIL_PIECE_CHARACTERS:
                self._say()

    def flush(self) -> None:
        with self._saying:
            self._say()

    def _say(self) -> None:
        unsaid, self._unsaid = self._unsaid, ""
        if unsaid:
            self._words.say({"tail": [self._number, unsaid[-task_executor.LOG_TAIL_BYTES :]]})


class SpokenLog(logging.Handler):
    """Passes log records to the worker's log."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self._words = words

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._words.say({"log": [record.levelno, record.name, self.format(record)]})
        except Exception:
            self.handleError(record)


class TaskProcess:
    """Runs one task after another in the main thread, while another thread listens to the worker."""

    def __init__(self) -> None:
        self.mark = os.environ.get(MARK_NAME, "")
        self._orders_descriptor, words, self._raw = os.dup(0), os.dup(1), os.dup(2)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        if os.name == "posix":
            self._start_guard(words)
        adopt_orphans()  # behind the guard, which is none of them
        self.words = Words(words)
        self.orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.settings: dict[str, Any] = {}
        self._executors: dict[tuple[str, str], task_executor.TaskExecutor] = {}
        self._masks = threading.local()
        self._running: Optional[int] = None
        self._cancelled: Optional[int] = None
        self._stopped: Optional[int] = None
        self._progress_left, self._progress_at = float(PROGRESS_BURST), 0.0

    # -- the guard --

    def _start_guard(self, words: int) -> None:
        """Fork it twice: a task that waits for all its children must not wait for the guard."""
        pid, started = os.getpid(), start_time(os.getpid())
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            return
        try:
            os.setsid()
            if os.fork() == 0:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                for descriptor in (0, 1, 2, words, self._raw):
                    os.close(descriptor)
                gone = select.poll()
                gone.register(self._orders_descriptor, 0)  # the other end's close is told without being asked for
                gone.poll()
                kill_tree(pid, started, self.mark)
        finally:
            os._exit(0)

    # -- listening --

    def _listen(self, stream: BinaryIO) -> None:
        with contextlib.suppress(Exception):
            while (order := read_frame(stream)) is not None:
                if "cancel" in order:
                    self._cancelled = order["cancel"]
                elif "stop" in order:
                    self._cancelled = self._stopped = order["stop"]
                    if os.name == "posix":
                        os.kill(os.getpid(), signal.SIGTERM)
                else:
                    self.orders.put(order)
        if os.name == "posix":
            # The guard ends this process. Two that do it at once would stop and kill each other, and leave it stopped.
            time.sleep(GUARD_SECONDS)
        kill_tree(os.getpid(), start_time(os.getpid()), self.mark)
        os._exit(1)

    def _on_terminate(self, *_: Any) -> None:
        if self._running is not None and self._stopped == self._running:
            self._stopped = None
            raise TaskStopped("the worker ended this task")

    # A process that the task forks is no part of this: it ends on SIGTERM, and must not answer for the task. One that
    # comes while it is being forked waits, or Python would drop it.

    def _before_fork(self) -> None:
        self._masks.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.blocked)

    def _forget_in_fork(self) -> None:
        self.words.close_in_fork()
        with contextlib.suppress(OSError):
            os.close(self._orders_descriptor)
        if signal.getsignal(signal.SIGTERM) == self._on_terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._after_fork()

    # -- working --

    def work(self) -> None:
        """Run what the worker orders, until it is gone."""
        stream = os.fdopen(self._orders_descriptor, "rb", closefd=False)
        first = read_frame(stream)
        if first is None:
            os._exit(1)
        hello = first["hello"]
        sys.path[:] = hello["path"]
        self.settings = hello["settings"]
        self._open_streams(hello["level"])
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._forget_in_fork
            )
        threading.Thread(target=self._listen, args=(stream,), name="listen", daemon=True).start()
        pid = os.getpid()
        if os.name == "posix":
            signal.signal(signal.SIGTERM, self._on_terminate)
        self._start = Start(self._raw)
        while True:
            order = self.orders.get()["run"]
            try:
                self._run(order)
            except TaskStopped:
                os._exit(1)  # in the middle of our own code: the worker starts a new process in any case
            if os.getpid() != pid:
                os._exit(0)  # the task forked, and the copy came back from execute_task

    def _open_streams(self, level: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            # A line at a time, or those of two processes get mixed; PYTHONUNBUFFERED would have it otherwise.
            stream.reconfigure(  # type: ignore[union-attr]
                encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=False
            )
        faulthandler.enable(2)
        root = logging.getLogger()
        root.setLevel(level)
        logging.getLogger("urllib3").setLevel(max(logging.INFO, level))
        root.addHandler(SpokenLog(self.words))
        task_executor.install_capture()

    def _run(self, order: dict[str, Any]) -> None:
        number, task = order["number"], order["task"]
        self.words.say({"began": number})
        tail = SpokenTail(self.words, number, task_executor.secrets_of(self.settings))
        folder = order["artifact_folder"]
        self._running = number
        outcome = task_executor.run(
            _Called(self, order),
            task,
            is_cancelled=lambda: self._cancelled == number,
            report_progress=lambda fraction, message: self._say_progress(number, fraction, message),
            settings=self.settings,
            artifact_folder=Path(folder) if folder else None,
            tail=tail,
        )
        self._running = None
        if not self.words.is_open:
            return
        tail.flush()
        worn = self._start.restore()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(OSError):
            os.write(self._raw, raw_end(self.mark))
        error_type = _ENDINGS.get(outcome.error_type or "", outcome.error_type)
        self.words.say({"end": [number, vars(replace(outcome, error_type=error_type, log_tail="")), worn]})

    def executor_of(self, order: Mapping[str, Any]) -> task_executor.TaskExecutor:
        """The executor that the worker means, made at its first task."""
        key = (order["module"], order["name"])
        if key not in self._executors:
            module = sys.modules.get(order["module"])
            if module is None and order["file"]:
                module = task_executor.import_file(Path(order["file"]))
            module = module or importlib.import_module(order["module"])
            classes = {cls.__qualname__: cls for cls in task_executor.executor_classes(module)}
            self._executors[key] = classes[order["name"]]()  # type: ignore[call-arg]
            self._start = Start(self._raw)
        return self._executors[key]

    def _say_progress(self, number: int, fraction: float, message: str) -> None:
        now = time.monotonic()
        self._progress_left += (now - self._progress_at) * PROGRESS_PER_SECOND
        self._progress_left, self._progress_at = min(self._progress_left, PROGRESS_BURST), now
        if self._progress_left >= 1:
            self._progress_left -= 1
            self.words.say({"progress": [number, fraction, message]})


class _OutOfMemory(Exception):
    """A MemoryError of the task, when the limit is off again."""


class _Exited(Exception):
    """sys.exit() of the task; in a process that the task forked it is obeyed."""


# What these two are called in a report, as when the process itself ends in that way.
_ENDINGS = {_OutOfMemory.__name__: OUT_OF_MEMORY, _Exited.__name__: EXITED}


class _Called(task_executor.TaskExecutor):
    """The ordered executor with what this process adds: it is made inside the run, and memory is limited around it."""

    def __init__(self, process: TaskProcess, order: Mapping[str, Any]) -> None:
        super().__init__(str(order["task"].get("task_type")))
        self._process = process
        self._order = order
        self._pid = os.getpid()

    def execute_task(self, task_data: dict[str, Any]) -> Any:
        limit = self._order["memory_limit_mb"]
        try:
            executor = self._process.executor_of(self._order)
            with memory_limit(limit):
                return executor.execute_task(task_data)
        except MemoryError as error:
            raise _OutOfMemory(f"over its memory limit of {limit} MB" if limit else "out of memory") from error
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if os.getpid() != self._pid:
                os._exit(code)
            raise _Exited(f"exit code {code}") from error


@contextlib.contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """At most so much memory for this process and, each, for those that it starts; the limit is off again behind it."""
    if not megabytes or resource is None:
        yield
        return
    # Of what is asked for and writable; address space alone is not counted, which threads and C libraries waste.
    kind = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
    _, hard = resource.getrlimit(kind)
    try:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (megabytes * MEGABYTE, hard))
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (hard, hard))


def main() -> None:
    TaskProcess().work()
