"""How busy is this machine, and what differs between Linux, macOS and Windows? All that differs is here."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Callable, Optional

from settings import VERSION

try:
    import psutil
except ImportError:
    psutil = None  # type: ignore[assignment, unused-ignore]

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

sync_file: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]


def lock_file(descriptor: int) -> None:
    """Lock an open file for the life of this process; OSError if another process has it."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]


def sync_folder(folder: Path) -> None:
    """Make a new file's name durable; Windows cannot open a folder, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it; their names are durable on return, as what is synced inside has to be."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=mode, exist_ok=True)
        sync_folder(folder.parent)


def boot_clock() -> float:
    """Seconds that also pass while the machine is suspended, where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Machine:
    """How busy is this machine? Percent figures from psutil, or from the system itself; None where nobody says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cpu_before = self._cpu_times()
        self.system_info = {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "hostname": socket.gethostname(),
            "worker_version": VERSION,
        }

    def usage(self) -> dict[str, float]:
        figures = {"cpu_usage": self._cpu(), "memory_usage": self._memory(), "disk_usage": self._disk()}
        return {name: round(min(100.0, max(0.0, f)), 1) for name, f in figures.items() if f is not None}

    @staticmethod
    def _cpu_times() -> Optional[tuple[float, float]]:
        """Idle and total time since boot."""
        try:
            if psutil is not None:
                spent = psutil.cpu_times()
                return spent.idle + getattr(spent, "iowait", 0.0), sum(spent[:8])
            times = [float(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            return times[3] + times[4], sum(times)
        except (OSError, ValueError, IndexError):
            return None

    def _cpu(self) -> Optional[float]:
        """Since the last beat."""
        before, now = self._cpu_before, self._cpu_times()
        self._cpu_before = now
        if before is not None and now is not None and now[1] > before[1]:
            return 100 * (1 - (now[0] - before[0]) / (now[1] - before[1]))
        return 100 * os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None

    def _disk(self) -> Optional[float]:
        try:
            disk = shutil.disk_usage(self._folder)
            return 100 * disk.used / disk.total
        except (OSError, ZeroDivisionError):
            return None

    @staticmethod
    def _memory() -> Optional[float]:
        if psutil is not None:
            return float(psutil.virtual_memory().percent)
        try:
            lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
            kilobytes = {words[0]: float(words[1]) for words in lines if len(words) > 1}
            return 100 * (1 - kilobytes["MemAvailable:"] / kilobytes["MemTotal:"])
        except (OSError, ValueError, KeyError):
            return None
