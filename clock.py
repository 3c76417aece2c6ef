"""What time is it, and may it jump?

`now` is wall time at the start plus what the boot clock has counted since: a step of the wall clock moves nothing, a
suspended machine counts its sleep, and it never falls behind the last moment the database has seen. `wall` is the
clock on the wall, for due times and display only.
"""

from __future__ import annotations

import time
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def boot_seconds() -> float:
    """Seconds since some fixed moment, counting sleep where the system can tell (Linux)."""
    return time.clock_gettime(_BOOT_CLOCK) if _BOOT_CLOCK is not None else time.monotonic()


def machine_boot_id() -> str:
    """Which start of this machine the boot clock counts from; "" where the system does not say."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Clock:
    """The master's two clocks, in seconds since the epoch, UTC."""

    def __init__(self, not_before: float = 0.0) -> None:
        self._start = max(time.time(), not_before)
        self._boot = boot_seconds()

    def now(self) -> float:
        return self._start + boot_seconds() - self._boot

    def wall(self) -> float:
        return time.time()

    def moments(self) -> tuple[float, float]:
        return self.now(), self.wall()
