"""How often may one ask?

A bucket for each name (an address, a key), as one number: the moment at which all that was asked for is paid off at
the allowed rate. Whoever would be more than BURST_SECONDS ahead of now waits. The longest unused buckets are forgotten
first, so the memory is bounded however many addresses ask, and those were mostly paid off anyway.

It must not know who asks, nor answer: web.py does.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

BURST_SECONDS = 5.0
"""An asker that was silent may send as much at once as in so many seconds: a device that sends what it has spooled."""
NAMES_REMEMBERED = 20_000
DEVICE_SHARE = 0.2
"""A device's own token may ask a fifth as often: behind an address there may be a whole fleet, behind a token one."""


class Rates:
    """At most `per_second` requests of one name; 0 is no limit. `clock` counts seconds."""

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._paid_at: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def seconds_to_wait(self, name: str, share: float = 1.0) -> float:
        """Counts one request of `name`; 0 where it may go on, else in how many seconds the next one may."""
        if not self._per_second:
            return 0.0
        cost = 1 / (self._per_second * share)
        most_ahead = max(0.0, BURST_SECONDS - cost)
        now = self._clock()
        with self._lock:
            paid_at = max(now, self._paid_at.pop(name, now))
            seconds = paid_at - now - most_ahead
            is_let_in = seconds <= 1e-6  # what adding up loses
            self._paid_at[name] = paid_at + cost if is_let_in else paid_at
            while len(self._paid_at) > NAMES_REMEMBERED:
                self._paid_at.popitem(last=False)
        return 0.0 if is_let_in else seconds
