"""How much was done, and how fast, over the last hour or day?

Points for charts, from the roll-ups by minute that every write adds to (transaction.py): for all tasks, a task type, a
device or a batch. Each point is looked up by its own key, so the cost is the same however many devices and batches
there are. This file never writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reads import Reads, iso

STEP_SECONDS = {1: 60, 24: 900}
"""hours asked for -> what one point covers"""
WHAT = ("completed", "failed", "lost", "snoozed")
_POINTS_SQL = (
    "WITH RECURSIVE minute(at) AS (VALUES (?1) UNION ALL SELECT at + 60 FROM minute WHERE at + 60 < ?2)"
    " SELECT at / ?3 * ?3, SUM(completed), SUM(failed), SUM(lost), SUM(snoozed), SUM(duration_seconds)"
    " FROM minute CROSS JOIN af_minute ON minute_at = at AND scope = ?4 AND name = ?5 GROUP BY 1"
)


class Series:
    """The questions about what was done when; made once, beside the Reads that it asks."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads
        self._day: tuple[int, list[tuple[int, int]]] | None = None

    def points(self, now: float, hours: int, scope: str = "all", name: str = "") -> dict[str, Any]:
        """{step_seconds, points}: oldest first, the last one is not over yet; where nothing ended, zeros.

        mean_seconds is the mean over the attempts that ran to an end, None where there was none, and for a batch: of
        batches only the tasks that ended are counted.
        """
        step = STEP_SECONDS[hours]
        end = int(now) // step * step + step
        start = end - hours * 3600
        rows = self._reads.rows(_POINTS_SQL, (start, end, step, scope, name))
        known = {row[0]: row[1:] for row in rows}
        points = [_point(at, known.get(at, (0,) * 5), has_durations=scope != "batch") for at in range(start, end, step)]
        return {"step_seconds": step, "points": points}

    def last_day(self, now: float) -> dict[str, int]:
        """completed_last_day and failed_last_day; the minutes that are over are looked up once: they are many."""
        minute = int(now) // 60
        if self._day is None or self._day[0] != minute:
            self._day = minute, self.ended(now, 1440, "all", "")[:-1]
        day = [*self._day[1], *self.ended(now, 1, "all", "")]
        return {
            "completed_last_day": sum(completed for completed, _ in day),
            "failed_last_day": sum(failed for _, failed in day),
        }

    def ended(self, now: float, minutes: int, scope: str, name: str) -> list[tuple[int, int]]:
        """(completed, failed) of each of the last minutes, this one (which is not over) last."""
        end = int(now) // 60 * 60 + 60
        rows = self._reads.rows(_POINTS_SQL, (end - minutes * 60, end, 60, scope, name))
        known = {row[0]: row[1:3] for row in rows}
        return [known.get(at, (0, 0)) for at in range(end - minutes * 60, end, 60)]


def _point(at: int, sums: Sequence[float], *, has_durations: bool) -> dict[str, Any]:
    counts = dict(zip(WHAT, sums))
    ran = counts["completed"] + counts["failed"] + counts["snoozed"]
    return {"at": iso(at), **counts, "mean_seconds": round(sums[4] / ran, 3) if ran and has_durations else None}
