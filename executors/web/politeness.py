"""When may this device ask this host again?

All slots of a device share one Politeness. For each host (with its port) it keeps at most `connections` requests on
their way and starts them at least `delay` apart (the setting's, or robots.txt's where that is longer). Waiting is
bounded: a task that would wait longer than 3 s gives its slot to another one and snoozes. Snoozed tasks come back one
delay apart, as a queue would let them in, and not all at once. A host that answered 429 or 503 is left alone until its
Retry-After.

It is the device's own manners: a fleet of ten devices is ten times as fast.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Callable, Optional

from executors.task_executor import Snooze

MAX_WAIT_SECONDS = 3.0
MAX_SNOOZE_SECONDS = 3600.0
MAX_HOSTS = 1000
POLL_SECONDS = 0.1


class _Host:
    def __init__(self) -> None:
        self.under_way = 0
        self.waiting = 0
        self.next_at = 0.0
        self.queued_until = -math.inf
        self.closed_until = 0.0
        self.closed_because = ""


class Politeness:
    """The manners of one device."""

    def __init__(self, connections: int, delay_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._connections = connections
        self._delay = delay_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._hosts: OrderedDict[str, _Host] = OrderedDict()

    @contextlib.contextmanager
    def turn(self, host: str, delay: float = 0.0, has_ended: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Waits for this host's turn and holds it. Raises Snooze where it would wait too long."""
        delay = max(delay, self._delay)
        with self._changed:
            entry = self._entry(host)
            entry.waiting += 1
            try:
                self._wait(entry, host, delay, has_ended)
                entry.under_way += 1
            finally:
                entry.waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                entry.under_way -= 1
                self._changed.notify_all()

    def close(self, host: str, seconds: float, because: str) -> None:
        """The host asked for a pause."""
        with self._changed:
            entry = self._entry(host)
            entry.closed_until = max(entry.closed_until, self._clock() + min(seconds, MAX_SNOOZE_SECONDS))
            entry.closed_because = because

    def _wait(self, entry: _Host, host: str, delay: float, has_ended: Callable[[], bool]) -> None:
        give_up_at = self._clock() + MAX_WAIT_SECONDS
        while not has_ended():
            now = self._clock()
            if entry.closed_until > now:
                raise Snooze(entry.closed_until - now, f"{host} {entry.closed_because}: this device waits")
            if entry.next_at > give_up_at:
                raise Snooze(self._queue(entry, now, delay), f"{host} is asked at most every {delay:g} s")
            if entry.next_at <= now and entry.under_way < self._connections:
                entry.next_at = now + delay
                return
            if now >= give_up_at:
                busy = f"{host} answers slowly: {entry.under_way} requests of this device are on their way"
                raise Snooze(self._queue(entry, now, max(delay, 1.0)), busy)
            until = entry.next_at if entry.next_at > now else give_up_at
            self._changed.wait(min(POLL_SECONDS, max(0.001, until - now)))

    def _queue(self, entry: _Host, now: float, delay: float) -> float:
        """Seconds until the next free place in the queue of those that snooze."""
        at = max(entry.queued_until + delay, entry.next_at, now)
        entry.queued_until = min(at, now + MAX_SNOOZE_SECONDS)
        return entry.queued_until - now

    def _entry(self, host: str) -> _Host:
        entry: Optional[_Host] = self._hosts.get(host)
        if entry is None:
            entry = self._hosts[host] = _Host()
            self._forget_idle()
        self._hosts.move_to_end(host)
        return entry

    def _forget_idle(self) -> None:
        if len(self._hosts) <= MAX_HOSTS:
            return
        now = self._clock()
        for host, entry in list(self._hosts.items())[:-1]:
            if not (entry.under_way or entry.waiting) and max(entry.next_at, entry.closed_until) <= now:
                del self._hosts[host]
                if len(self._hosts) <= MAX_HOSTS:
                    return
