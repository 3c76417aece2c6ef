"""Which processes has a task started, and how do all of them end?

On Linux everything that is below the first process by parent, in its session, or that carries its mark in the
environment (what left the session and lost its parent still does) is found in /proc. Elsewhere psutil says it, or the
process group and taskkill do as well as they can. A process is known by pid and start time: a pid alone may belong to
somebody else by now.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
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


def kill_tree(pid: int, started: str, mark: str) -> None:
    """SIGKILL for that process and everything it started, again until none is left (at most a second or two).

    Call it before the process is waited for: until then its pid cannot be anybody else's. The caller goes last if it is
    one of them."""
    if os.name != "posix":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True, check=False)
        return
    if not _HAS_PROC and psutil is None:
        if members(pid, started, mark):
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        return
    for _ in range(_ROUNDS):
        found = members(pid, started, mark)
        others = [member for member in found if member != os.getpid()]
        for member in others:
            with contextlib.suppress(OSError):
                os.kill(member, signal.SIGKILL)
        if not others:
            break
        time.sleep(_ROUND_SECONDS)
    if os.getpid() in members(pid, started, mark):
        os.kill(os.getpid(), signal.SIGKILL)


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


def _members_by_proc(pid: int, started: str, mark: str) -> set[int]:
    numbers = [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]
    entries = [entry for number in numbers if (entry := _read_entry(number)) is not None]
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
