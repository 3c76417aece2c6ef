"""app_sync: which apps does an AppsFlyer account have, and what is to be pulled of each?

A task names the credential in `username` (its token is in the device's own config and nowhere else). The result is the
list of the apps that this token sees. With `pull` in task_data one data_sync task an app and report comes of it:

    {"pull": {"reports": ["installs_report", "in_app_events_report"], "start_date": "2026-11-01",
              "end_date": "2026-11-30", "timezone": "app"}}

`pull` may hold every field of data_sync but app_id and report; without dates the task's own count. The new tasks have
stable unique keys, so a list that is made twice in a batch orders nothing twice. "timezone": "app" is each app's own.

It keeps its own time limits, so it runs in a thread of the worker.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Optional
from urllib.parse import parse_qsl, urlsplit

from executors.appsflyer.answers import raise_if_closed, with_jitter
from executors.appsflyer.client import Client, Limits, base_url
from executors.appsflyer.pacing import CREDENTIAL_FIELDS, PACING, Key, field_with
from executors.appsflyer.pull import APP_ID, OPTIONS, Pull, read_credential_name, read_pull, read_report
from executors.task_executor import MAX_NEW_TASKS, DoNotRetry, Result, Retry, Snooze, TaskExecutor, refuse_unknown

PATH = "/api/mng/apps"
LARGEST_PAGE = 1000
# A list that goes on and on is broken: 200,000 apps.
MAX_PAGES = 200
FIELDS = ("credential", "username", "app_id", "start_date", "end_date", "pull", "page_size", "capabilities")
PULL_FIELDS = ("reports", "start_date", "end_date", *OPTIONS)
ATTRIBUTES = ("name", "platform", "currency", "time_zone")


class AppSyncExecutor(TaskExecutor):
    isolation = "thread"
    required_modules = ("requests",)

    def __init__(self) -> None:
        super().__init__("app_sync")

    def execute_task(self, task_data: dict[str, Any]) -> Any:
        name = read_credential_name(task_data)
        query = read_query(task_data)
        order = read_order(task_data, name)
        # What counts lists counts nothing else, so the closing is for this task type alone.
        fields = ("task_type", field_with(name, self.context.task, CREDENTIAL_FIELDS))
        key = Key(base_url(self.context.settings), name, report=PATH, fields=fields)
        raise_if_closed(key, PACING)
        limits = Limits(self.context.deadline_seconds, lambda: self.context.cancelled)
        with Client(key, self.context.credential(name), limits, PACING) as client:
            apps, pages = self._list(client, query, limits)
        new_tasks = [pull.as_task(self.context.task) for pull in pulls_of(apps, order, name)]
        if len(new_tasks) > MAX_NEW_TASKS:
            raise DoNotRetry(f"{len(new_tasks)} tasks would come of it, {MAX_NEW_TASKS} may: name fewer pull.reports")
        result = {"apps": apps, "count": len(apps), "pages": pages, "new_tasks": len(new_tasks)}
        return Result(result, new_tasks=new_tasks)

    def _list(self, client: Client, query: dict[str, str], limits: Limits) -> tuple[list[dict[str, Any]], int]:
        """All pages. Of a page's links.next only the query counts: the token goes to no other address than ours."""
        apps: dict[str, dict[str, Any]] = {}
        offset = 0
        for page_number in range(1, MAX_PAGES + 1):
            self._wait_for_turn(client.key, limits, is_first=page_number == 1)
            page = client.get_json(PATH, query)
            items, total, following = read_page(page)
            known = len(apps)
            apps.update((item["id"], app_of(item)) for item in items)
            offset += len(items)
            self.context.progress(min(0.99, offset / total) if total else 0.0, f"{len(apps)} apps")
            if len(apps) == known or (following is None and (total is None or offset >= total)):
                return list(apps.values()), page_number
            query = {**query, "offset": str(offset), **(following or {})}
        raise Retry(f"AppsFlyer's app list does not end after {MAX_PAGES} pages", after=3600.0)

    def _wait_for_turn(self, key: Key, limits: Limits, *, is_first: bool) -> None:
        """Keep to AppsFlyer's 20 calls a minute and 100 a day. In the middle of a list it waits in its slot, because
        coming back later would begin from the first page again."""
        while seconds := PACING.take_list_call(key):
            if is_first or seconds > 60.0:
                raise Snooze(with_jitter(seconds), "AppsFlyer lists apps 20 times a minute and 100 times a day")
            time.sleep(min(seconds, 0.2, limits.left()))


# ---- what was asked for ----


def read_query(task_data: Mapping[str, Any]) -> dict[str, str]:
    refuse_unknown(task_data, FIELDS, "task_data")
    size = task_data.get("page_size", LARGEST_PAGE)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_PAGE:
        raise DoNotRetry(f"page_size is {size!r:.100}: write a whole number from 1 to {LARGEST_PAGE}")
    query = {"limit": str(size), "offset": "0"}
    capabilities = task_data.get("capabilities")
    if capabilities not in (None, "", "protect_360", "cost"):
        raise DoNotRetry(f"capabilities is {capabilities!r:.100}: write protect_360 or cost, or leave it out")
    if capabilities:
        query["capabilities"] = str(capabilities)
    return query


def read_order(task_data: Mapping[str, Any], credential_name: str) -> list[dict[str, Any]]:
    """The task_data that each app's data_sync tasks share, one a report; checked before AppsFlyer is asked."""
    pull = task_data.get("pull")
    if pull is None:
        return []
    if not isinstance(pull, dict):
        raise DoNotRetry('pull must be an object, such as {"reports": ["installs_report"]}')
    refuse_unknown(pull, PULL_FIELDS, "task_data.pull")
    reports = pull.get("reports")
    if not isinstance(reports, list) or not reports:
        raise DoNotRetry('pull.reports is missing: write a list of reports, such as ["installs_report"]')
    shared = {name: pull[name] for name in PULL_FIELDS if name != "reports" and pull.get(name) is not None}
    for name in ("start_date", "end_date"):
        shared.setdefault(name, task_data.get(name))
    order = [{**shared, "credential": credential_name, "report": read_report(name)} for name in dict.fromkeys(reports)]
    for one in order:
        read_pull({**one, "app_id": "checked.before.listing"})
    return order


def pulls_of(apps: list[dict[str, Any]], order: list[dict[str, Any]], credential_name: str) -> list[Pull]:
    """One pull for each app and report. An app whose id cannot stand in a path is in the list, and is not pulled."""
    pulls = []
    for app in apps:
        for one in order:
            if not APP_ID.fullmatch(app["id"]) or app["id"].isdigit():
                continue
            zone = one.get("timezone")
            pulls.append(
                read_pull({**one, "app_id": app["id"], "timezone": app["time_zone"] if zone == "app" else zone})
            )
    return pulls


# ---- what came ----


def read_page(page: Any) -> tuple[list[dict[str, Any]], Optional[int], Optional[dict[str, str]]]:
    """A page's items, how many there are in all (where it says so), and the query of the next page."""
    items = page.get("data") if isinstance(page, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) and is_id(item.get("id")) for item in items):
        raise Retry("AppsFlyer answered 200 with what is no list of apps", after=60.0)
    meta, links = (page.get(name) if isinstance(page.get(name), dict) else {} for name in ("meta", "links"))
    total = meta.get("total_items")
    total = total if isinstance(total, int) and not isinstance(total, bool) else None
    following = links.get("next")
    if not isinstance(following, str) or not following:
        return items, total, None
    try:
        return items, total, dict(parse_qsl(urlsplit(following).query))
    except ValueError:
        return items, total, {}


def is_id(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 128 and value.isprintable()


def app_of(item: Mapping[str, Any]) -> dict[str, Any]:
    attributes = item.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    texts = {name: attributes.get(name) for name in ATTRIBUTES}
    return {"id": item["id"], **{name: text if isinstance(text, str) else None for name, text in texts.items()}}
