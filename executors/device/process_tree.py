"""Which processes has a task started, and how do all of them end?

On Linux everything that is below the first process by parent, in its session, or that carries its mark in the
environment (what left the session and lost its parent still does) is found in /proc. While the first process lives,
what loses its parent becomes its child, so that a daemon without environment is found too; once it is dead, such a one
is not. Elsewhere psutil says it, or the process group and taskkill do as well as they can. A process is known by pid
and start time: a pid alone may belong to somebody else by now.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

# The environment variable that every process of a task inherits.
MARK_NAME = "CRAWL_TASK_MARK"
_PROC = Path("/proc")
_HAS_PROC = (_PROC / "self" / "stat").exists()
psutil: Any = None
if not _HAS_PROC:  # else it would only cost memory, in each child
    with contextlib.suppress(ImportError):
        psutil = importlib.import_module("psutil")
_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS = 100
_ROUND_SECONDS = 0.01


@dataclass(frozen=True)
class _Entry:
    """One line of /proc."""

    pid: int
    parent: int
    session: int
    started: str
    is_alive: bool


def start_time(pid: int) -> str:
    """When that process started, comparable also after a reboot; empty if there is none or nobody can say."""
    if _HAS_PROC:
        entry = _read_entry(pid)
        return f"{_boot()}:{entry.started}" if entry is not None else ""
    if psutil is not None:
        with contextlib.suppress(psutil.Error):
            return str(psutil.Process(pid).create_time())
        return ""
    if os.name == "posix":
        asked = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return asked.stdout.strip()
    return ""


def adopt_orphans() -> None:
    """From now on what this process' descendants leave behind when they end becomes its child, not that of init."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):
            importlib.import_module("ctypes").CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_tree(pid: int, started: str, mark: str) -> None:
    """SIGKILL for that process and everything it started, again until none is left (at most a second or two).

    Call it before the process is waited for: until then its pid cannot be anybody else's. It is stopped first and goes
    after all the others: as long as it lives, what loses its parent stays in reach. The caller goes last if it is one
    of them."""
    if os.name != "posix":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True, check=False)
        return
    if not _HAS_PROC and psutil is None:
        if members(pid, started, mark):
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        return
    me = os.getpid()
    for round_number in range(_ROUNDS):
        found = members(pid, started, mark) - {me}
        if not found:
            break
        if round_number == 0 and pid in found:
            _signal(pid, signal.SIGSTOP)
        is_last = found == {pid} and round_number > 0
        for member in found if is_last else found - {pid}:
            _signal(member, signal.SIGKILL)
        time.sleep(_ROUND_SECONDS)
    for last in (pid, me):
        if last in members(pid, started, mark):
            _signal(last, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def members(pid: int, started: str, mark: str) -> set[int]:
    """The processes that are alive of that tree."""
    if _HAS_PROC:
        return _members_by_proc(pid, started, mark)
    if not started or start_time(pid) != started:
        return set()
    if psutil is None:
        return {pid}  # the others are not found, but those of its group are killed with it
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        return {process.pid for process in family if process.status() != psutil.STATUS_ZOMBIE}
    return set()


def zombies_of(pid: int) -> int:
    """How many processes right below that one have ended and were not waited for, where /proc shows it."""
    return sum(entry.parent == pid and not entry.is_alive for entry in _entries()) if _HAS_PROC else 0


def _entries() -> list[_Entry]:
    numbers = [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]
    return [entry for number in numbers if (entry := _read_entry(number)) is not None]


def _members_by_proc(pid: int, started: str, mark: str) -> set[int]:
    entries = _entries()
    is_root_here = any(entry.pid == pid and f"{_boot()}:{entry.started}" == started for entry in entries)
    found = {
        entry.pid
        for entry in entries
        if (is_root_here and pid in (entry.pid, entry.session)) or (entry.is_alive and _has_mark(entry.pid, mark))
    }
    grows = True
    while grows:
        below = {entry.pid for entry in entries if entry.parent in found} - found
        found |= below
        grows = bool(below)
    return {entry.pid for entry in entries if entry.pid in found and entry.is_alive}


def _read_entry(pid: int) -> Optional[_Entry]:
    try:
        # The name in the second field may hold anything, a closing bracket too.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return _Entry(pid, int(fields[1]), int(fields[3]), fields[19], fields[0] not in ("Z", "X", "x"))
    except (OSError, ValueError, IndexError):
        return None


def _has_mark(pid: int, mark: str) -> bool:
    try:
        return f"{MARK_NAME}={mark}".encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _boot() -> str:
    try:
        return (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
    except OSError:
        return ""
