"""How many short tasks may wait here for a slot?"""

from __future__ import annotations

from collections.abc import Iterable

AHEAD_SECONDS = 1.0
SHORT_SECONDS = 0.2
AHEAD_LIMIT = 1000
TYPES_LIMIT = 16


class Pace:
    """How many short tasks may wait here for a slot? About AHEAD_SECONDS of work, of types that are known to be short.

    A type's estimate starts as long (1 s) and moves by a tenth of the difference with each task: 16 short ones in a row
    make a type short, one of 2 s ends it. Whatever is not completed makes it unknown again, for a device that fails
    everything at once is fast, too. Longer tasks gain nothing from waiting here: a pull takes milliseconds.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._seconds: dict[str, float] = {}

    def note(self, task_type: str, seconds: float, *, is_completed: bool) -> None:
        """A task of this type kept its slot for so long."""
        known = self._seconds.get(task_type, 1.0)
        self._seconds[task_type] = known + (seconds - known) / 10 if is_completed else 1.0

    def forget(self, task_type: str) -> None:
        """A task of this type waited here for too long."""
        self._seconds.pop(task_type, None)

    def ahead(self, queued: Iterable[str], running: Iterable[str]) -> dict[str, int]:
        """How many more of each type would fill the time, if they were all of that type. Given the types of what waits
        and of what runs: a slot with a long task has no time for them."""
        short = {name: seconds for name, seconds in list(self._seconds.items()) if seconds < SHORT_SECONDS}
        waiting = list(queued)
        slots = self._slots - sum(name not in short for name in running)
        left = AHEAD_SECONDS * slots - sum(short.get(name, AHEAD_SECONDS) for name in waiting)
        room = AHEAD_LIMIT - len(waiting)
        counts = {name: min(int(left / max(seconds, 1e-6)), room) for name, seconds in short.items()}
        return dict(sorted(((n, c) for n, c in counts.items() if c > 0), key=lambda one: -one[1])[:TYPES_LIMIT])
