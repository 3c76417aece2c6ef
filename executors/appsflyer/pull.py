"""What may a task ask of the Pull APIs, and which task is a part of it?

A Pull is a checked order: one report of one app over one window. Whatever goes into a path or a query is checked here;
a field that is not known is refused, because a typing mistake in a filter would pull without it. It must not ask
AppsFlyer anything.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any, Optional

from executors.appsflyer.window import TIME_FORMAT, Window, utc_today
from executors.task_executor import DoNotRetry, refuse_unknown

RAW_NAMES = """
    installs_report in_app_events_report uninstall_events_report reinstalls organic_installs_report
    organic_in_app_events_report organic_uninstall_events_report reinstalls_organic installs-retarget
    in-app-events-retarget ad_revenue_raw ad_revenue_organic_raw ad-revenue-raw-retarget blocked_installs_report
    blocked_in_app_events_report blocked_clicks_report blocked_install_postbacks detection fraud-post-inapps
    postbacks in-app-events-postbacks retarget_in_app_events_postbacks retarget_install_postbacks
"""
RAW_REPORTS = tuple(RAW_NAMES.split())
# These give a row a day (and more): cut into windows they stay the same. The others are sums over their window.
DAILY_REPORTS = ("partners_by_date_report", "daily_report", "geo_by_date_report")
AGGREGATE_REPORTS = (*DAILY_REPORTS, "partners_report", "geo_report")
REPORTS = (*RAW_REPORTS, *AGGREGATE_REPORTS)

RAW_DAYS = 31
AGGREGATE_DAYS = 999
LOOKBACK_DAYS = 90
# A pull of at most so many days has no daily limit, but one of a call a minute.
SHORT_AGGREGATE_DAYS = 2
# Downloads are what is scarce, and a download is one whatever its size: so the larger of AppsFlyer's two caps.
MAXIMUM_ROWS = 1_000_000

TEXT_NAMES = """
    timezone currency media_source category geo agency event_name additional_fields from_install_time to_install_time
    from_detect_time to_detect_time attribution_touch_type reattr
"""
TEXT_OPTIONS = tuple(TEXT_NAMES.split())
LIST_OPTIONS = ("agency", "event_name", "additional_fields")
OPTIONS = (*TEXT_OPTIONS, "maximum_rows", "days_per_pull")
FIELDS = ("credential", "username", "app_id", "report", "start_date", "end_date", "from_time", "to_time", *OPTIONS)

APP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}")


@dataclass(frozen=True)
class Pull:
    credential_name: str
    app_id: str
    report: str
    window: Window
    options: dict[str, Any]  # as the task said them, checked

    @property
    def is_raw(self) -> bool:
        return self.report in RAW_REPORTS

    @property
    def is_short_aggregate(self) -> bool:
        return not self.is_raw and self.window.day_count <= SHORT_AGGREGATE_DAYS

    @property
    def days_per_pull(self) -> int:
        return int(self.options.get("days_per_pull") or (RAW_DAYS if self.is_raw else AGGREGATE_DAYS))

    @property
    def maximum_rows(self) -> Optional[int]:
        """The cap of a raw report; None for an aggregate one, which has none."""
        return int(self.options.get("maximum_rows") or MAXIMUM_ROWS) if self.is_raw else None

    @property
    def path(self) -> str:
        return f"/api/{'raw' if self.is_raw else 'agg'}-data/export/app/{self.app_id}/{self.report}/v5"

    @property
    def query(self) -> dict[str, Any]:
        query: dict[str, Any] = {"from": self.window.first, "to": self.window.last}
        query.update({name: self.options[name] for name in TEXT_OPTIONS if name in self.options})
        if self.maximum_rows is not None:
            query["maximum_rows"] = self.maximum_rows
        return query

    @property
    def file_name(self) -> str:
        return f"{self.app_id[:30]}_{self.report}_{self.window.file_part}.csv.gz"

    @property
    def unique_key(self) -> str:
        """The same for the same pull, whoever asks for it and whenever; no two windows or options share it."""
        key = f"data_sync {self.credential_name} {self.app_id} {self.report} {self.window.first}..{self.window.last}"
        asked = {name: self.options[name] for name in (*TEXT_OPTIONS, "maximum_rows") if name in self.options}
        if asked:
            key += " " + hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        return key

    def over(self, window: Window) -> Pull:
        return replace(self, window=window)

    def as_task(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """This pull as a new task that comes of `task`; its columns name the days, task_data the rest."""
        task_data: dict[str, Any] = {"report": self.report, "credential": self.credential_name, **self.options}
        if not self.window.is_of_days:
            task_data.update(
                from_time=self.window.start.strftime(TIME_FORMAT), to_time=self.window.end.strftime(TIME_FORMAT)
            )
        new_task: dict[str, Any] = {
            "task_type": "data_sync",
            "username": task.get("username") or self.credential_name,
            "app_id": self.app_id,
            "start_date": self.window.start.date().isoformat(),
            "end_date": self.window.last_day.isoformat(),
            "task_data": task_data,
            "unique_key": self.unique_key,
            # Without a batch nothing could be created twice or not: keys count within one.
            "batch": task.get("batch") or f"{task.get('task_type') or 'data_sync'}-{task.get('id')}",
        }
        if task.get("priority") is not None:
            new_task["priority"] = task["priority"]
        if task.get("execution_timeout_seconds"):
            new_task["execution_timeout_seconds"] = max(1, int(task["execution_timeout_seconds"]))
        return new_task


# ---- from task_data to a Pull: DoNotRetry names the field and what to write ----


def read_pull(task_data: Mapping[str, Any]) -> Pull:
    refuse_unknown(task_data, FIELDS, "task_data")
    app_id = task_data.get("app_id")
    check_app_id(app_id)
    report = read_report(task_data.get("report"))
    options = read_options(task_data)
    most = RAW_DAYS if report in RAW_REPORTS else AGGREGATE_DAYS
    if options.get("days_per_pull", 1) > most:
        raise DoNotRetry(f"days_per_pull is {options['days_per_pull']}: one call of {report} takes at most {most} days")
    return Pull(read_credential_name(task_data), str(app_id), report, read_window(task_data, report), options)


def read_credential_name(task_data: Mapping[str, Any]) -> str:
    """Which of the device's credentials: task_data.credential, or else the task's username."""
    name = task_data.get("credential") or task_data.get("username")
    if not isinstance(name, str) or not 1 <= len(name) <= 128:
        raise DoNotRetry("username is missing: write the name of a token in the devices' credentials")
    return name


def check_app_id(app_id: Any) -> None:
    if not isinstance(app_id, str) or not APP_ID.fullmatch(app_id):
        raise DoNotRetry(
            f"app_id is {app_id!r:.200}: write it as AppsFlyer does, such as id123456789 or com.example.app"
        )
    if app_id.isdigit():
        raise DoNotRetry(f"app_id is {app_id}: of an iOS app it starts with id, so write id{app_id}")


def read_report(report: Any) -> str:
    if report not in REPORTS:
        near = [name for name in REPORTS if name.startswith(f"{report}_")] or difflib.get_close_matches(
            str(report), REPORTS, 1
        )
        meant = f"did you mean {near[0]}?" if near else "docs/appsflyer.md lists the reports"
        raise DoNotRetry(f"report is {report!r:.100}: {meant}")
    return str(report)


def read_options(task_data: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set, checked as far as AppsFlyer does not check them itself."""
    options: dict[str, Any] = {}
    for name in TEXT_OPTIONS:
        value = task_data.get(name)
        if name in LIST_OPTIONS and isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ",".join(value)
        if name == "reattr" and isinstance(value, bool):
            value = "true" if value else "false"
        if value in (None, ""):
            continue
        if not isinstance(value, str) or len(value) > 2000 or not value.isprintable():
            raise DoNotRetry(f"{name} is {value!r:.100}: write a text of at most 2000 characters")
        options[name] = value
    for name in ("maximum_rows", "days_per_pull"):
        count = task_data.get(name)
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise DoNotRetry(f"{name} is {count!r:.100}: write a whole number from 1")
        options[name] = count
    return options


def read_window(task_data: Mapping[str, Any], report: str) -> Window:
    """The window, with ends in order and none in the future; how far back is not looked at."""
    first, last = (read_day(task_data.get(name), name) for name in ("start_date", "end_date"))
    if last < first:
        raise DoNotRetry(f"end_date {last} is before start_date {first}")
    # Tomorrow, because it is that already in zones ahead of UTC.
    latest = utc_today() + timedelta(days=1)
    if last > latest:
        raise DoNotRetry(f"end_date {last} is in the future: write {latest - timedelta(days=1)} or earlier")
    window = Window.of_days(first, last)
    if task_data.get("from_time") is None and task_data.get("to_time") is None:
        return window
    if report not in RAW_REPORTS:
        raise DoNotRetry(f"from_time and to_time are for raw reports: {report} takes whole days")
    part = Window(*(read_time(task_data.get(name), name) for name in ("from_time", "to_time")))
    if not window.start <= part.start < part.end <= window.end:
        raise DoNotRetry("from_time must be before to_time, and both within start_date and end_date")
    return part


def read_day(value: Any, name: str) -> date:
    try:
        if not isinstance(value, str) or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            raise ValueError
        return date.fromisoformat(value)
    except ValueError:
        raise DoNotRetry(f"{name} is {value!r:.100}: write a date as YYYY-MM-DD") from None


def read_time(value: Any, name: str) -> datetime:
    try:
        return datetime.strptime(value, TIME_FORMAT)
    except (ValueError, TypeError):
        raise DoNotRetry(f"{name} is {value!r:.100}: write YYYY-MM-DD HH:MM:SS") from None
