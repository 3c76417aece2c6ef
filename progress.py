"""How far is a batch, how fast does it go, and what failed in it?

Counts come from the kept counters, rates from the roll-ups by minute (transaction.py adds a batch's tasks to them as
they end), failures from a walk along the newest failed tasks that stops after 50 ms. This file never writes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from reads import PAGE_SECONDS, Reads
from series import Series

LOOKED_AT = 5_000
"""Failed tasks that are put into groups; the newest."""
GROUPS = 100
RATE_MINUTES = 5
UNFINISHED = ("scheduled", "pending", "assigned", "running")


class Progress:
    """The questions about one batch; made once, beside what it asks."""

    def __init__(self, reads: Reads, series: Series) -> None:
        self._reads = reads
        self._series = series

    def batch(self, name: str, now: float) -> dict[str, Any] | None:
        """One batch with its counts, rates and the seconds that are left at this rate; None if there is none.

        The rate is that of the last five minutes, or since the batch was made if that is shorter.
        """
        batch = self._reads.batch(name)
        if batch is None:
            return None
        ended = self._series.ended(now, 60, "batch", name)
        rate = self._rate(name, now, ended)
        left = sum(batch["counts"][state] for state in UNFINISHED)
        return {
            **batch,
            "total": sum(batch["counts"].values()),
            "completed_last_minute": ended[-2][0],
            "failed_last_minute": ended[-2][1],
            "completed_last_hour": sum(completed for completed, _ in ended),
            "failed_last_hour": sum(failed for _, failed in ended),
            "rate_per_second": rate,
            "eta_seconds": round(left / rate, 1) if left and rate and batch["state"] == "open" else None,
        }

    def batches(self, now: float, *, limit: int, cursor: int | None) -> dict[str, Any]:
        """{batches, next_cursor}: as reads.py gives them, each with its rate."""
        page = self._reads.batches(limit=limit, cursor=cursor)
        return {**page, "batches": [self.rated(batch, now) for batch in page["batches"]]}

    def rated(self, batch: dict[str, Any], now: float) -> dict[str, Any]:
        """A batch with the rate of its last five minutes."""
        name = batch["name"]
        return {
            **batch,
            "rate_per_second": self._rate(name, now, self._series.ended(now, RATE_MINUTES + 1, "batch", name)),
        }

    def _rate(self, name: str, now: float, ended: list[tuple[int, int]]) -> float:
        """Tasks that ended a second, in the last five full minutes and this one, or since the batch was made."""
        made = self._reads.rows("SELECT created_at FROM af_batch WHERE name = ?", (name,))
        age = now - made[0][0] if made else 0.0  # retention may have taken it since its row was read
        seconds = max(1.0, min(age, RATE_MINUTES * 60 + now % 60))
        return round(sum(map(sum, ended[-RATE_MINUTES - 1 :])) / seconds, 3)

    def failures(self, name: str, seconds: float = PAGE_SECONDS) -> dict[str, Any]:
        """{groups, is_partial}: the newest failed tasks of a batch by what went wrong, the largest group first.

        is_partial: there are more failed tasks, or more groups, than these; then each group's n is "at least".
        """
        newest: dict[tuple[str | None, str | None], int] = {}
        counts: Counter[tuple[str | None, str | None]] = Counter()
        rows, is_partial = self._reads.newest_failures(name, limit=LOOKED_AT, seconds=seconds)
        for task_id, error_type, error_message in rows:
            newest.setdefault((error_type, error_message), task_id)
            counts[error_type, error_message] += 1
        groups = [
            {"error_type": error[0], "error_message": error[1], "n": n, "is_more": is_partial, "task_id": newest[error]}
            for error, n in counts.most_common(GROUPS)
        ]
        return {"groups": groups, "is_partial": is_partial or len(counts) > GROUPS}
