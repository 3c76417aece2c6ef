"""data_sync: what does one report of one AppsFlyer app say about some days?

A task names the credential in `username` (its token is in the device's own config and nowhere else), the app in
`app_id`, the days in `start_date` and `end_date`, and the `report` in task_data; further fields: docs/appsflyer.md.

It ends in one of three ways:

    the report as a gzipped CSV artifact, with its rows, bytes, columns, first and last event time in the result
    split: a range that is too wide, or a report that reached the cap of rows, became one new task a window; such a
        result counts no row and has no file
    an error, a retry or a snooze, as executors/appsflyer/answers.py says

It keeps its own time limits, so it runs in a thread of the worker.
"""

from __future__ import annotations

import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Optional

from executors.appsflyer.answers import raise_if_closed
from executors.appsflyer.client import Body, Client, Limits, base_url
from executors.appsflyer.pacing import APP_FIELDS, CREDENTIAL_FIELDS, PACING, Key, field_with
from executors.appsflyer.pull import DAILY_REPORTS, LOOKBACK_DAYS, Pull, read_pull
from executors.appsflyer.report import Written, write_report
from executors.appsflyer.window import TIME_FORMAT, Window, utc_today
from executors.task_executor import DoNotRetry, Result, Snooze, TaskExecutor


class DataSyncExecutor(TaskExecutor):
    isolation = "thread"
    required_modules = ("requests",)

    def __init__(self) -> None:
        super().__init__("data_sync")

    def execute_task(self, task_data: dict[str, Any]) -> Any:
        asked = read_pull(task_data)
        if asked.window.day_count > asked.days_per_pull:
            pieces = pieces_of(asked)
            return self._split(asked, pieces, "range", left_out(asked.window, pieces[0]))
        pull = asked.over(clamped(asked))
        note = left_out(asked.window, pull.window)
        path = self.context.artifact(pull.file_name)
        try:
            started = time.monotonic()
            written, body = self._fetch(pull, path)
            halves = pull.window.halves() if is_full(pull, written) else []
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if halves:
            path.unlink()  # its rows come with the halves, and must not come twice
            return self._split(pull, halves, "rows", note)
        return {**told_of(pull, written, note), "bytes": body.received_bytes, "http_status": body.status,
                "seconds": round(time.monotonic() - started, 3)}  # fmt: skip

    def _fetch(self, pull: Pull, path: Path) -> tuple[Written, Body]:
        """Ask for the report and write it to `path`."""
        context = self.context
        token = context.credential(pull.credential_name)
        fields = (
            field_with(pull.credential_name, context.task, CREDENTIAL_FIELDS),
            field_with(pull.app_id, context.task, APP_FIELDS),
            "task_data.report",
        )
        key = Key(base_url(context.settings), pull.credential_name, pull.app_id, pull.report, fields)
        raise_if_closed(key, PACING)
        if pull.is_short_aggregate and (seconds := PACING.take_aggregate(key)):
            raise Snooze(seconds, f"AppsFlyer takes one call a minute of an app's {pull.report}")
        limits = Limits(context.deadline_seconds, lambda: context.cancelled)
        before = None if pull.window.is_of_days else pull.window.end.strftime(TIME_FORMAT)
        with Client(key, token, limits, PACING) as client, client.report(pull.path, pull.query) as body:
            return write_report(body, path, before=before, tell=lambda rows: self._tell(rows, body)), body

    def _split(self, pull: Pull, windows: list[Window], why: str, note: Optional[str]) -> Result:
        result = {"app_id": pull.app_id, "report": pull.report, "window": pull.window.as_dict(), "rows": 0}
        result.update(split=True, split_by=why, windows=[window.as_dict() for window in windows])
        if note:
            result["left_out"] = note
        return Result(result, new_tasks=[pull.over(window).as_task(self.context.task) for window in windows])

    def _tell(self, rows: int, body: Body) -> None:
        part = body.received_bytes / body.expected_bytes if body.expected_bytes else 0.0
        self.context.progress(min(0.99, part), f"{rows} rows")


def told_of(pull: Pull, written: Written, note: Optional[str]) -> dict[str, Any]:
    """The result of a report that is in the artifact."""
    told: dict[str, Any] = {
        "app_id": pull.app_id,
        "report": pull.report,
        "window": pull.window.as_dict(),
        "timezone": pull.options.get("timezone", "UTC"),
        "split": False,
        "rows": written.rows,
        "first_event_time": written.first_event_time,
        "last_event_time": written.last_event_time,
        "columns": written.columns,
        "uneven_rows": written.uneven_rows,
        "truncated": is_full(pull, written),
        "artifact": pull.file_name,
    }
    if note:
        told["left_out"] = note
    return told


def is_full(pull: Pull, written: Written) -> bool:
    """Whether the report reached its cap: then AppsFlyer gave the latest rows only, and said nothing of it."""
    return pull.maximum_rows is not None and written.received_rows >= pull.maximum_rows


def pieces_of(pull: Pull) -> list[Window]:
    """The windows of a range that is too wide for one pull, without those that AppsFlyer no longer has.

    Cut is the range as it was asked for, so that it is cut at the same days on whichever day that happens."""
    if not pull.is_raw and pull.report not in DAILY_REPORTS and "days_per_pull" not in pull.options:
        raise DoNotRetry(
            f"{pull.report} sums up its {pull.window.day_count} days, and AppsFlyer takes {pull.days_per_pull}:"
            " write days_per_pull for a sum of each part"
        )
    clamped(pull)  # raises where nothing of it is left
    pieces = pull.window.chunks(pull.days_per_pull)
    return [piece for piece in pieces if not pull.is_raw or piece.last_day >= earliest_day()]


def clamped(pull: Pull) -> Window:
    """The window without what AppsFlyer no longer has."""
    if not pull.is_raw:
        return pull.window
    if pull.window.last_day < earliest_day():
        raise DoNotRetry(f"AppsFlyer gives raw data of the last {LOOKBACK_DAYS} days: write {earliest_day()} or later")
    return pull.window.from_day(earliest_day())


def left_out(asked: Window, first: Window) -> Optional[str]:
    """What a result says where the task asked for more than AppsFlyer has."""
    if first.start <= asked.start:
        return None
    return f"before {first.start:%Y-%m-%d}: AppsFlyer gives raw data of the last {LOOKBACK_DAYS} days"


def earliest_day() -> date:
    return utc_today() - timedelta(days=LOOKBACK_DAYS)
