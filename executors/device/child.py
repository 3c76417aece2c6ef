"""How does a task run in a process of its own?

A child (task_process.py) is started at first need, kept warm between tasks, of whatever kind, and ended after 5 minutes
without any. The slot's thread gives it a task and follows what it says. When the task's time is up or it is cancelled:

    cancelled       context.cancelled is true at once; 0.5 s later TaskStopped is raised in the task and what it started
                    gets SIGTERM; CANCEL_GRACE_SECONDS (5) after that the whole process tree gets SIGKILL
    out of time     the same without the 0.5 s

and the next task gets a new child, as it does after one that left its child worn (wear.py), or something in it that
writes without end. A child that dies takes only its own task with it, and the end is told as what it was: timeout,
killed (by signal 9), out_of_memory, exited (exit code 3). The child dies with the worker; what a dead worker left all
the same is killed by its next start, known by the files in the state folder.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import math
import os
import queue
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import executors
from executors import task_executor
from executors.device.process_tree import MARK_NAME, kill_tree, members, start_time
from executors.device.task_process import EXITED, OUT_OF_MEMORY, as_frame, raw_end, read_frame

log = logging.getLogger("worker")

CANCEL_GRACE_SECONDS = 5.0
NOTICE_SECONDS = 0.5
IDLE_SECONDS = 300.0
POLL_SECONDS = 0.2
# How long a child may take to read a task, a used one to begin it, and each to give the rest of its output.
SEND_SECONDS = BEGIN_SECONDS = 10.0
REST_SECONDS = 1.0
WAIT_SECONDS = 5.0
EVENTS_WAITING = 100
# What a used child may still have to say at the begin of the next task, how long it is listened to, how much is logged.
OLD_EVENTS, OLD_BYTES, OLD_SECONDS, OLD_LOG_BYTES = 1000, 256 * 1024, 0.5, 4000
# How often, at least, a task that talks without a pause is looked after.
LOOK_SECONDS = 0.05
ATTEMPTS = 3
SIGKILL = 9  # signal has no such name on Windows
TIMEOUT, CANCELLED, RELEASED, KILLED, NOT_STARTED = "timeout", "cancelled", "released", "killed", "not_started"

_START = "import sys; sys.path[0] = sys.argv[1]; from executors.device.task_process import main; main()"
# A child's environment is also that of everything it starts.
_KEPT_BACK = ("AF_API_KEY", "AF_CREDENTIALS")
_FRAME, _RAW, _RAW_END, _CLOSED = "frame", "raw", "raw end", "closed"
_MEMORY_WORDS = ("MemoryError", "bad_alloc", "Cannot allocate memory", "out of memory", "memory allocation")

# Why a task shall end now: error_type and message; None while it may go on.
Ending = Callable[[], Optional["tuple[str, str]"]]


class ChildGone(Exception):
    """The child died, or does not listen any more."""


class Child:
    """One child: how it is started, given a task, followed and ended."""

    def __init__(self, hello: Mapping[str, Any], folder: Path) -> None:
        self.mark = secrets.token_hex(16)
        self._serial = 0
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue(EVENTS_WAITING)
        self.is_ended = self.is_forgotten = False
        self.worn = ""  # why it shall do no other task
        self._ending = threading.Lock()  # a stop may meet the end of its task
        root = str(Path(executors.__path__[0]).resolve().parent)
        environment = {name: value for name, value in os.environ.items() if name not in _KEPT_BACK}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**environment, MARK_NAME: self.mark},
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.pid = self.process.pid
        self._started = start_time(self.pid)
        self._record = folder / f"{self.mark}.json"
        self.idle_since = time.monotonic()
        with contextlib.suppress(OSError):  # only the next start after a crash needs it
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._record.write_text(json.dumps({"pid": self.pid, "started": self._started, "mark": self.mark}))
        for read in (self._read_frames, self._read_raw):
            threading.Thread(target=read, name="child", daemon=True).start()
        if os.name == "posix":
            os.set_blocking(self._stdin, False)
        with contextlib.suppress(ChildGone):  # the first task finds it out
            self._send(hello)

    @property
    def _stdin(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def is_fresh(self) -> bool:
        return self._serial <= 1

    # -- what it says --

    def _read_frames(self) -> None:
        """Its words, in a thread of their own: nothing else works on every system."""
        assert self.process.stdout is not None
        with os.fdopen(os.dup(self.process.stdout.fileno()), "rb") as stream, self.process.stdout:
            with contextlib.suppress(OSError, ValueError):
                while (frame := read_frame(stream)) is not None:
                    self._put(_FRAME, frame)
            self._put(_CLOSED, None)

    def _read_raw(self) -> None:
        """What was written past Python; the end of one task's output is marked."""
        assert self.process.stderr is not None
        end, rest = raw_end(self.mark), b""
        with self.process.stderr as stream, contextlib.suppress(OSError, ValueError):
            while chunk := os.read(stream.fileno(), 65536):
                *ended, rest = (rest + chunk).split(end)
                for part in ended:
                    self._put(_RAW, part)
                    self._put(_RAW_END, None)
                begun = rest.rfind(b"\0")
                cut = begun if begun >= 0 and end.startswith(rest[begun:]) else len(rest)
                self._put(_RAW, rest[:cut])
                rest = rest[cut:]
        self._put(_RAW, rest)
        self._put(_RAW_END, None)

    def _put(self, kind: str, content: Any) -> None:
        """Full means that the task talks faster than it is listened to: it waits in turn."""
        while (content or kind != _RAW) and not self.is_forgotten:
            try:
                self._events.put((kind, content), timeout=1.0)
                return
            except queue.Full:
                continue

    def next_event(self, seconds: float) -> tuple[str, Any]:
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return ("", None)

    def _send(self, order: Mapping[str, Any], ending: Ending = lambda: None) -> None:
        left = memoryview(as_frame(order))
        until = time.monotonic() + SEND_SECONDS
        while left:
            try:
                left = left[os.write(self._stdin, left) :]
            except BlockingIOError:
                ready = select.poll()
                ready.register(self._stdin, select.POLLOUT)
                ready.poll(POLL_SECONDS * 1000)
                if time.monotonic() > until or ending() is not None:
                    raise ChildGone("does not read its orders") from None
            except (OSError, ValueError) as error:
                raise ChildGone(str(error)) from None

    # -- one task --

    def run(self, order: Mapping[str, Any], context: task_executor.Context, ending: Ending) -> task_executor.Outcome:
        """Run one task to whatever end; `context` gets what it says. ChildGone if a used child had not even begun."""
        self._serial += 1
        self._forget_events(ending)
        self._send({"run": {**order, "number": self._serial}}, ending)
        return _Following(self, self._serial, context, ending, order["memory_limit_mb"]).follow()

    def _forget_events(self, ending: Ending) -> None:
        """What it said after its last task: its output is only logged. What an earlier task left may write for ever."""
        until, printed, size = time.monotonic() + OLD_SECONDS, b"", 0
        try:
            for _ in range(OLD_EVENTS):
                kind, content = self._events.get_nowait()
                if kind == _CLOSED:
                    raise ChildGone("ended between two tasks")
                if kind == _RAW:
                    printed, size = (printed + content)[:OLD_LOG_BYTES], size + len(content)
                if size > OLD_BYTES or time.monotonic() > until or ending() is not None:
                    break
            raise ChildGone("something of an earlier task writes without end")
        except queue.Empty:
            return
        finally:
            if said := printed.decode("utf-8", "replace").strip():
                log.info("printed child=%d between tasks: %s", self.pid, said)

    def tell(self, word: str) -> None:
        with contextlib.suppress(ChildGone):
            self._send({word: self._serial})

    def terminate(self) -> None:
        """SIGTERM for it and its group."""
        self.tell("stop")
        if os.name == "posix":
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGTERM)

    def is_dead(self) -> bool:
        """Whether it has ended, even if somebody holds its pipes open.

        It is not waited for if that can be helped: until then its pid is nobody else's."""
        if not hasattr(os, "waitid"):
            return self.process.poll() is not None
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError:
            return True
        return ended is not None

    def end(self) -> Optional[int]:
        """SIGKILL for what is left of it and of all that it started; its exit code, which may be an earlier one."""
        with self._ending:
            return self._end()

    def _end(self) -> Optional[int]:
        if self.is_ended:
            return self.process.returncode
        self.is_ended = True
        kill_tree(self.pid, self._started, self.mark)
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            code = self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("child=%d cannot be killed; the next start of this device tries again", self.pid)
            return None
        with contextlib.suppress(OSError):
            self._record.unlink()
        return code


class _Following:
    """Follows one task of one child to its end."""

    def __init__(
        self, child: Child, number: int, context: task_executor.Context, ending: Ending, memory_limit_mb: int
    ) -> None:
        self.child, self.number, self.context, self.ending = child, number, context, ending
        self.memory_limit_mb = memory_limit_mb
        self.started = time.monotonic()
        self.kills_before = kills_for_memory()
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.was_alive = False
        self.has_begun = self.has_said_all = self.has_printed_all = self.is_terminated = False
        self.outcome: Optional[task_executor.Outcome] = None
        self.why: Optional[tuple[str, str]] = None
        self.step_at = 0.0  # when the next step against it is due
        self.looked_at = 0.0
        self.quiet_at = math.inf  # from then on its output is not logged: a slow log may hold up no end

    def follow(self) -> task_executor.Outcome:
        while not self.has_said_all:
            kind, content = self.child.next_event(POLL_SECONDS)
            self._take(kind, content)
            self._press()
            if (self.is_terminated and time.monotonic() >= self.step_at) or (not kind and self.child.is_dead()):
                break
            if not self.has_begun and not self.child.is_fresh and time.monotonic() - self.started > BEGIN_SECONDS:
                raise ChildGone("does not begin: something of an earlier task still holds it")
        code = None
        if self.outcome is None or self.is_terminated:
            self.was_alive = not self._has_died()
            code = self.child.end()
        self._hear_the_rest()
        return self._judge(code)

    def _has_died(self) -> bool:
        """Whether it ended by itself; its pipes close a moment before."""
        until = time.monotonic() + (0 if self.why else REST_SECONDS)
        while not (is_dead := self.child.is_dead()) and time.monotonic() < until:
            time.sleep(0.005)
        return is_dead

    def _press(self) -> None:
        """See whether the task shall end, and take the next step against it."""
        self.looked_at = now = time.monotonic()
        if self.why is None:
            self.why = self.ending()
            if self.why is None:
                return
            self.step_at = now + (NOTICE_SECONDS if self.why[0] == CANCELLED else 0)
            self.child.tell("cancel")
        if not self.is_terminated and now >= self.step_at:
            self.is_terminated, self.step_at = True, now + CANCEL_GRACE_SECONDS
            self.quiet_at = now + min(REST_SECONDS, CANCEL_GRACE_SECONDS)
            self.child.terminate()

    def _take(self, kind: str, content: Any) -> None:
        if kind == _RAW:
            self._print(self.context.tail.complete_lines(self.decode(content)))
        elif kind == _RAW_END:
            self.has_printed_all = True
        elif kind == _CLOSED:
            self.has_said_all = True
        elif kind == _FRAME:
            ((word, said),) = content.items()
            if word == "log" and time.monotonic() < self.quiet_at:
                logging.getLogger(said[1]).log(said[0], "%s", said[2])
            elif word == "began":
                self.has_begun = True
            elif word != "log" and said[0] == self.number:  # else a thread that an earlier task left running
                self._take_word(word, said[1:])

    def _take_word(self, word: str, said: list[Any]) -> None:
        if word == "tail":
            self.context.tail.write(said[0])
        elif word == "progress":
            self.context.progress(said[0], said[1])
        elif word == "end":
            self.outcome = task_executor.Outcome(**said[0])
            self.child.worn = str(said[1])
            self.has_said_all = True

    def _print(self, lines: list[str]) -> None:
        """Whole lines only: what comes by the other pipe shall not stand in the middle of one."""
        if lines:
            text = "\n".join(lines) + "\n"
            self.context.tail.write(text if self.context.tail.ends_line() else f"\n{text}")
        for line in lines:
            now = time.monotonic()
            if now >= self.quiet_at:
                break
            task_executor.pass_to_device_log(self.context, [line])
            if now - self.looked_at > LOOK_SECONDS:
                self._press()

    def _hear_the_rest(self) -> None:
        """What was said and printed before the end may arrive behind it: there are two pipes."""
        until = time.monotonic() + REST_SECONDS
        self.quiet_at, self.looked_at = min(self.quiet_at, until), math.inf  # nothing is to be ended any more
        while not (self.has_printed_all and self.has_said_all) and time.monotonic() < until:
            self._take(*self.child.next_event(0.05))
        self._print(self.context.tail.complete_lines(self.decode(b"", True)))
        self._print([rest for rest in (self.context.tail.rest_of_line(),) if rest])

    def _judge(self, code: Optional[int]) -> task_executor.Outcome:
        outcome = self.outcome
        if self.why is not None:
            outcome = task_executor.Outcome("failed", error_type=self.why[0], error_message=self.why[1])
        elif outcome is None:
            if not self.has_begun and not self.child.is_fresh:
                raise ChildGone("ended before it began")
            error_type, message = self._how_it_died(code)
            outcome = task_executor.Outcome("failed", error_type=error_type, error_message=message)
        elif outcome.error_type == OUT_OF_MEMORY:
            self.child.end()  # the next task shall not begin with what this one has left
        took = outcome.duration_seconds or time.monotonic() - self.started
        return replace(outcome, log_tail=self.context.tail.text(), duration_seconds=took)

    def _how_it_died(self, code: Optional[int]) -> tuple[str, str]:
        if code is None or self.was_alive:
            return KILLED, "its process had no connection to the worker any more"
        if not self.has_begun:
            return NOT_STARTED, f"its process did not start: {in_words(code)}"
        if code == -SIGKILL and kills_for_memory() > self.kills_before:
            return OUT_OF_MEMORY, "the machine was out of memory and killed its process"
        # Where a library does not raise MemoryError it says so and gives up.
        if code != -SIGKILL and self.memory_limit_mb:
            printed = self.context.tail.text()
            if any(words in printed for words in _MEMORY_WORDS):
                return OUT_OF_MEMORY, f"over its memory limit of {self.memory_limit_mb} MB: {in_words(code)}"
        return (KILLED if code < 0 else EXITED), in_words(code)


def in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"killed by signal {-code}"


def kills_for_memory() -> int:
    """How many processes the system has killed because memory ran out, where it counts them."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0


class Children:
    """The children of a device: at most one for each running task, the last used first, none before the first need."""

    def __init__(self, settings: Mapping[str, Any], state_folder: Path) -> None:
        self._settings = settings
        self._folder = state_folder / "children"
        self._lock = threading.Lock()
        self._idle: list[Child] = []
        self._all: set[Child] = set()

    def kill_leftovers(self) -> None:
        """End what an earlier process of this device has left running; call it before the first task."""
        for record in sorted(self._folder.glob("*.json")):
            try:
                content = json.loads(record.read_text())
                pid, started, mark = int(content["pid"]), str(content["started"]), str(content["mark"])
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("removed %s, which cannot be read", record)
            else:
                left = members(pid, started, mark)
                if left:
                    log.warning("killing what an earlier process has left: pids %s", " ".join(map(str, sorted(left))))
                    kill_tree(pid, started, mark)
            with contextlib.suppress(OSError):
                record.unlink()

    def run(
        self,
        executor: task_executor.TaskExecutor,
        task: Mapping[str, Any],
        *,
        ending: Ending,
        report_progress: Optional[Callable[[float, str], None]] = None,
        artifact_folder: Optional[Path] = None,
    ) -> task_executor.Outcome:
        """Run one pulled task in a child and say what became of it."""
        limit_mb = executor.memory_limit_mb
        if limit_mb is None:
            limit_mb = int(self._settings.get("task_memory_mb") or 0)
        order = {
            "task": task,
            **place_of(executor),
            "artifact_folder": str(artifact_folder) if artifact_folder else None,
            "memory_limit_mb": limit_mb,
        }
        reason = ""
        for _ in range(ATTEMPTS):
            context = task_executor.Context(task, report_progress=report_progress, settings=self._settings)
            if reason and (why := ending()) is not None:
                return task_executor.Outcome("failed", error_type=why[0], error_message=why[1])
            try:
                # After one that is no good the others may be like it.
                child = self._start() if reason else self._take()
            except OSError as error:
                reason = error.strerror or str(error)
                break
            try:
                return child.run(order, context, ending)
            except ChildGone as error:
                reason = str(error)
                child.end()
            except Exception as error:  # what it said is not of our making
                log.exception("child=%d is not understood", child.pid)
                child.end()
                return task_executor.Outcome("failed", error_type=KILLED, error_message=f"not understood: {error}")
            finally:
                self._give_back(child)
        message = f"no process could be started for it: {reason}"
        return task_executor.Outcome("failed", error_type=NOT_STARTED, error_message=message)

    def _take(self) -> Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._start()

    def _start(self) -> Child:
        known = {name: value for name, value in self._settings.items() if name != "api_key"}
        path = [str(Path(entry).resolve()) for entry in sys.path]
        child = Child({"hello": {"path": path, "level": logging.getLogger().level, "settings": known}}, self._folder)
        log.debug("child=%d started", child.pid)
        with self._lock:
            self._all.add(child)
        return child

    def _give_back(self, child: Child) -> None:
        child.idle_since = time.monotonic()
        with self._lock:
            if child.is_ended:
                child.is_forgotten = True
                self._all.discard(child)
                return
            if not child.worn:
                self._idle.append(child)
                return
        log.info("child=%d is replaced: %s", child.pid, child.worn)
        # Its end takes a while, and the report of its task shall not wait for it.
        threading.Thread(target=self._retire, args=(child,), name="child", daemon=True).start()

    def _retire(self, child: Child) -> None:
        child.end()
        self._give_back(child)

    def end_idle(self, now: float) -> None:
        """End those that have had no task for IDLE_SECONDS; the memory is the machine's again."""
        if not self._idle:
            return
        with self._lock:
            tired = [child for child in self._idle if now - child.idle_since > IDLE_SECONDS]
            self._idle = [child for child in self._idle if child not in tired]
        for child in tired:
            self._retire(child)

    def end_all(self) -> None:
        """The device stops: nothing is left running."""
        with self._lock:
            left, self._idle = list(self._all), []
        for child in left:
            child.end()
            child.is_forgotten = True


def place_of(executor: task_executor.TaskExecutor) -> dict[str, Optional[str]]:
    """Where a child finds the executor: its module, the module's file if it is in no package, and its name."""
    cls = type(executor)
    module = sys.modules[cls.__module__]
    file = None if module.__package__ else getattr(module, "__file__", None)
    return {"module": cls.__module__, "file": file, "name": cls.__qualname__}
