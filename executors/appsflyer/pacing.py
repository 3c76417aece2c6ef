"""When may this device ask AppsFlyer again?

Counted in this process, which all of a worker's AppsFlyer tasks share: calls of the app list (20 a minute, 100 a UTC
day), 65 s between two short aggregate pulls of one app's report (60 s were seen to be too few), and what AppsFlyer
closed for today. Nobody but AppsFlyer knows what other devices used up: its refusals are the truth, this only saves
requests. It must not sleep, and it must not know a token: a credential is known by its name.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

LIST_CALLS_A_MINUTE = 20
LIST_CALLS_A_DAY = 100
AGGREGATE_SPACING_SECONDS = 65.0
DAY_SECONDS = 86400.0
# Where a task may say the credential's name and the app.
CREDENTIAL_FIELDS = ("username", "task_data.credential", "task_data.username")
APP_FIELDS = ("app_id", "task_data.app_id")


def field_with(value: str, task: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The first of these fields in which the task has this value; in one of them it has."""
    named = {**task, **{f"task_data.{name}": part for name, part in (task.get("task_data") or {}).items()}}
    return next(name for name in fields if named.get(name) == value)


@dataclass(frozen=True)
class Key:
    """What AppsFlyer counts by. An empty app_id is all of the account's apps, an empty report all reports.

    `fields`: those of the task that say so; tasks with the same in them would be refused with it."""

    url: str
    credential_name: str
    app_id: str = ""
    report: str = ""
    fields: tuple[str, ...] = field(default=(), compare=False)

    @property
    def account(self) -> Key:
        return replace(self, app_id="", fields=tuple(name for name in self.fields if name not in APP_FIELDS))

    @property
    def credential(self) -> Key:
        return replace(self, app_id="", report="")


@dataclass(frozen=True)
class Closed:
    """Until then there is no use in asking; `for_good`: and this task need not come back."""

    until: float
    reason: str
    for_good: bool = False


class Pacing:
    """What this process knows of AppsFlyer's limits. Any thread may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time):
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._closed: dict[Key, Closed] = {}
        self._throttles: dict[Key, int] = {}
        self._list_calls: dict[Key, deque[float]] = {}
        self._list_calls_today: dict[Key, tuple[int, int]] = {}  # UTC day, calls
        self._last_aggregate: dict[Key, float] = {}

    def closed(self, key: Key) -> Optional[tuple[float, Closed]]:
        """What keeps this key from being asked, with the seconds it still takes; None if nothing does."""
        with self._lock:
            now = self._clock()
            self._closed = {known: closed for known, closed in self._closed.items() if closed.until > now}
            found = [self._closed[scope] for scope in (key.credential, key.account, key) if scope in self._closed]
            if not found:
                return None
            longest = max(found, key=lambda closed: (closed.for_good, closed.until))
            return longest.until - now, longest

    def close(self, key: Key, seconds: float, reason: str) -> None:
        with self._lock:
            self._closed[key] = Closed(self._clock() + seconds, reason)

    def forbid(self, key: Key, seconds: float, reason: str) -> None:
        with self._lock:
            self._closed[key] = Closed(self._clock() + seconds, reason, for_good=True)

    def count_throttle(self, key: Key) -> int:
        """How often in a row this key was asked too fast, this time included."""
        with self._lock:
            self._throttles[key] = self._throttles.get(key, 0) + 1
            return self._throttles[key]

    def note_success(self, key: Key) -> None:
        with self._lock:
            self._throttles.pop(key, None)

    def take_list_call(self, key: Key) -> float:
        """0 and the call is counted, or the seconds until the next one may be made."""
        with self._lock:
            now, wall = self._clock(), self._wall_clock()
            calls = self._list_calls.setdefault(key, deque())
            while calls and calls[0] <= now - 60.0:
                calls.popleft()
            today = int(wall // DAY_SECONDS)
            day, count = self._list_calls_today.get(key, (today, 0))
            count = count if day == today else 0
            if count >= LIST_CALLS_A_DAY:
                return DAY_SECONDS - wall % DAY_SECONDS
            if len(calls) >= LIST_CALLS_A_MINUTE:
                return calls[0] + 60.0 - now
            calls.append(now)
            self._list_calls_today[key] = (today, count + 1)
            return 0.0

    def take_aggregate(self, key: Key) -> float:
        """0 and the call is counted, or the seconds until this app's report may be pulled again."""
        with self._lock:
            now = self._clock()
            self._last_aggregate = {
                known: at for known, at in self._last_aggregate.items() if at > now - AGGREGATE_SPACING_SECONDS
            }
            if key in self._last_aggregate:
                return self._last_aggregate[key] + AGGREGATE_SPACING_SECONDS - now
            self._last_aggregate[key] = now
            return 0.0


# One for the process: the limits are the account's, not a task's.
PACING = Pacing()
