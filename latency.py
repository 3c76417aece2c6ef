"""How long did it mostly take? Percentiles of the last minutes, from counts in fixed buckets.

Adding is a search and a sum, without a lock: of two threads that add in the same instant one may be lost, which is of
no account in a percentile.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

BOUNDS = tuple(0.00005 * 1.25**n for n in range(64))
"""Seconds, from 0.05 ms to over a minute: a percentile is at most a quarter too large."""
WINDOW_SECONDS = 300.0
PERCENTILES = (50, 95, 99)


class Latency:
    """Of the last five to ten minutes; `count` is of all times."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._now = [0] * (len(BOUNDS) + 1)
        self._before = [0] * (len(BOUNDS) + 1)
        self.count = 0

    def add(self, seconds: float) -> None:
        """One more that took so long."""
        self._turn()
        self._now[bisect_left(BOUNDS, seconds)] += 1
        self.count += 1

    def percentiles(self) -> dict[str, float | None]:
        """{p50, p95, p99} in milliseconds; None while there was nothing."""
        self._turn()
        counts = [now + before for now, before in zip(self._now, self._before, strict=True)]
        return {f"p{percent}": _at(counts, percent) for percent in PERCENTILES}

    def _turn(self) -> None:
        age = self._clock() - self._since
        if age >= WINDOW_SECONDS:
            self._before = self._now if age < 2 * WINDOW_SECONDS else [0] * (len(BOUNDS) + 1)
            self._now = [0] * (len(BOUNDS) + 1)
            self._since += age


def _at(counts: list[int], percent: int) -> float | None:
    rank, seen = sum(counts) * percent / 100, 0
    for bound, count in zip((*BOUNDS, BOUNDS[-1]), counts, strict=True):
        seen += count
        if count and seen >= rank:
            return round(bound * 1000, 3)
    return None
