"""What has a task left behind in its process, and may the next one begin there?

Before a task the process is noted down, after it everything that can be put back is put back. What cannot (a thread
that still runs, a hard limit that was lowered), and what has grown beyond an allowance, makes the process worn:
child.py replaces it. What the import of an executor and its __init__ change is no task's: they are part of the start.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Optional

from executors.device.process_tree import zombies_of

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Over the start, all tasks together: caches and connections that a library keeps open are no fault.
DESCRIPTORS_ALLOWED = 32
# Zombies. A daemon that ends becomes one of ours (see adopt_orphans), and nobody waits for it: a wait by us could take
# the exit code from a Popen object that an executor keeps. They go with the process.
ZOMBIES_ALLOWED = 32


class Start:
    """How this process was before a task. `output` is where its descriptors 1 and 2 lead."""

    def __init__(self, output: int) -> None:
        self._output = output
        self._folder = _current_folder()
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._environment = dict(os.environ)
        self._streams = sys.stdout, sys.stderr
        self._timeout = _sockets().getdefaulttimeout() if _sockets() else None
        self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self._limits = {kind: resource.getrlimit(kind) for kind in _limits()} if resource is not None else {}
        if os.name == "posix":
            self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            self._priority = os.getpriority(os.PRIO_PROCESS, 0)
        self._threads = set(sys._current_frames())
        self._descriptors = _descriptors()

    def restore(self) -> str:
        """Put back what can be; why this process is no good for another task, or ""."""
        try:
            if os.name == "posix":
                self._restore_signals()
                self._restore_limits()
            self._restore_surroundings()
            return self._growth()
        except (OSError, ValueError) as error:
            return f"it cannot be put back as it was: {error}"

    def _restore_signals(self) -> None:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.set_wakeup_fd(-1)
        for number, was in self._handlers.items():
            if was is not None and signal.getsignal(number) is not was:
                signal.signal(number, was)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _restore_limits(self) -> None:
        for kind, was in self._limits.items():
            if resource.getrlimit(kind) != was:
                resource.setrlimit(kind, was)
        if os.getpriority(os.PRIO_PROCESS, 0) != self._priority:
            os.setpriority(os.PRIO_PROCESS, 0, self._priority)

    def _restore_surroundings(self) -> None:
        if self._folder is not None and _current_folder() != self._folder:
            os.chdir(self._folder)
        os.umask(self._umask)
        if dict(os.environ) != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
            if hasattr(time, "tzset"):
                time.tzset()
        if _sockets():
            _sockets().setdefaulttimeout(self._timeout)
        sys.stdout, sys.stderr = self._streams
        for descriptor in (1, 2):
            os.dup2(self._output, descriptor)

    def _growth(self) -> str:
        # Threads of Python alone: those of a C library's pool run no task's code.
        if left := len(set(sys._current_frames()) - self._threads):
            return f"{left} threads of a task still run in it"
        if (left := _descriptors() - self._descriptors) > DESCRIPTORS_ALLOWED:
            return f"{left} descriptors were left open in it"
        if (left := _zombies()) > ZOMBIES_ALLOWED:
            return f"{left} processes that ended were left below it"
        return ""


def _current_folder() -> Optional[Path]:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


def _sockets() -> Any:
    """The module, if anybody has imported it; it costs memory."""
    return sys.modules.get("socket")


def _limits() -> list[int]:
    return sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})


def _descriptors() -> int:
    """How many are open, where the system shows them. OSError when there is none left to look with."""
    try:
        return sum(1 for _ in Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd").iterdir())
    except FileNotFoundError:
        return 0


def _zombies() -> int:
    """How many processes right below this one have ended and were not waited for."""
    if not hasattr(os, "waitid"):
        return 0
    try:  # a look at all processes costs milliseconds, and there is seldom a reason
        has_any = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return 0
    return zombies_of(os.getpid()) if has_any else 0
