"""Is one device's refusal enough for the whole fleet? A real master, two real workers, a site and an AppsFlyer that refuse."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from crawl_site import Site, reply
from fake_appsflyer import TOKEN, FakeAppsFlyer
from farm import ROOT, Master, Program, Worker, wait_for

from executors.appsflyer import window

SHOP = {"name": "shop", "task_type": "price", "key": "task_data.host"}
LIMIT_OF = {"crawl": "site", "price": "shop"}
DAY = window.utc_today().isoformat()


def example(page: str, word: str) -> str:
    """The one code block of a document that has this word."""
    [block] = [
        block
        for block in re.findall(r"^```\w+\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)
        if word in block
    ]
    return str(block)


class Fleet:
    """A master and two workers, which have the user's executor of docs/executors.md as well."""

    def __init__(self, folder: Path, programs: list[Program], **of_workers: Any) -> None:
        self.folder, self._programs = folder, programs
        (folder / "price.py").write_text(example("executors.md", "closes="), encoding="utf-8")
        limits = json.loads(example("limits.md", "appsflyer-report"))["limits"]
        self.master = Master(folder / "master", limits=[*limits, SHOP])
        programs.append(self.master)
        networks = {"crawl_allow_networks": ["127.0.0.0/8", "::1/128"]}
        self.of_workers = {"executors": [str(folder / "price.py")], **networks, **of_workers}
        self.workers = [self.start(f"shop-{n}") for n in (1, 2)]

    def start(self, device_id: str) -> Worker:
        worker = Worker(self.master.url, self.folder / device_id, device_id, **self.of_workers)
        self._programs.append(worker)
        return worker

    def task(self, task_id: int) -> dict[str, Any]:
        found: dict[str, Any] = self.master.get(f"/tasks/{task_id}")
        return found

    def refused(self, **task: Any) -> int:
        """Submits one and waits until it was refused."""
        task_id = self.master.submit_one(**task)
        wait_for("the refusal", lambda: self.task(task_id)["snooze_count"] == 1)
        return task_id

    def completed(self, *task_ids: int) -> bool:
        return all(self.task(task_id)["status"] == "completed" for task_id in task_ids)

    def why(self, task_id: int) -> tuple[str, str, list[str]]:
        """Why it waits: the reason, the limit and its value. There must be a moment when it goes on."""
        found = self.master.get(f"/tasks/{task_id}/why")
        limit = found["limit"] or {}
        assert found["reason"] != "limit_closed" or (limit["closed_until"] > DAY and found["next_look_seconds"] > 0)
        return found["reason"], limit.get("name"), limit.get("value")


@pytest.fixture
def fake() -> Iterator[FakeAppsFlyer]:
    fake = FakeAppsFlyer().start()
    yield fake
    fake.stop()


def asked(site: Site, host: str) -> list[str]:
    return [path for _, path, headers in site.requests if headers["Host"].startswith(host)]


@pytest.mark.parametrize("task_type", ["crawl", "price"])
def test_after_one_429_no_device_asks_that_host_and_all_others_are_asked(
    site: Site, tmp_path: Path, programs: list[Program], task_type: str
) -> None:
    site.pages["/busy"] = reply(b"", 429, Retry_After="3600")
    site.pages["/x"] = reply(b'{"price": 3}', Content_Type="application/json")
    other_host = site.url.replace("127.0.0.1", "localhost")
    fleet = Fleet(tmp_path, programs)
    first = fleet.refused(task_type=task_type, username="joe", task_data={"url": site.url + "/busy"})
    same = fleet.master.submit(
        *[{"task_type": task_type, "username": "joe", "task_data": {"url": site.url + "/x"}}] * 8
    )
    others = fleet.master.submit(
        *[{"task_type": task_type, "username": "joe", "task_data": {"url": other_host + "/x"}}] * 8
    )
    wait_for("the other host's pages", lambda: fleet.completed(*others))
    assert fleet.why(same[0]) == ("limit_closed", LIMIT_OF[task_type], ["127.0.0.1"])
    assert {fleet.task(task_id)["status"] for task_id in same} == {"pending"}
    assert asked(site, "127.0.0.1") == ["/busy"] and len(asked(site, "localhost")) == 8
    task = fleet.task(first)
    assert (task["status"], task["retry_count"], task["snooze_count"]) == ("scheduled", 0, 1)
    opened = fleet.master.call("POST", f"/limits/{LIMIT_OF[task_type]}/open", {"value": ["127.0.0.1"]})
    assert opened["opened"] == 1
    if task_type == "price":  # a crawler that was refused keeps away by itself, whatever a person knows
        wait_for("the pages after it was opened", lambda: fleet.completed(*same))


def test_a_host_that_was_closed_opens_by_itself_and_not_before(
    site: Site, tmp_path: Path, programs: list[Program]
) -> None:
    moments: list[float] = []
    is_first = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        moments.append(time.monotonic())
        is_busy = not is_first.is_set()
        is_first.set()
        (reply(b"", 429, Retry_After="2") if is_busy else reply(b'{"price": 3}'))(handler)

    site.pages["/x"] = answer
    fleet = Fleet(tmp_path, programs)
    order = {"task_type": "price", "task_data": {"url": site.url + "/x"}}
    tasks = [fleet.refused(**order), *fleet.master.submit(*[order] * 8)]
    wait_for("all pages", lambda: fleet.completed(*tasks))
    assert len(moments) == 10 and min(moments[1:]) - moments[0] >= 2.0
    assert [fleet.task(task_id)["retry_count"] for task_id in tasks] == [0] * 9


def test_what_appsflyer_refused_one_device_no_device_asks_again(
    fake: FakeAppsFlyer, tmp_path: Path, programs: list[Program]
) -> None:
    ferry, lantern, orchard = fake.apps[1].app_id, fake.apps[0].app_id, fake.apps[2].app_id
    fake.clock = lambda: 1_800_000_000 // 86400 * 86400 + 43200.0  # noon: a day's quota closes for twelve hours
    fleet = Fleet(tmp_path, programs, appsflyer_url=fake.url, credentials={"acme": TOKEN, "other": TOKEN})

    def order(app_id: str, report: str, username: str = "acme") -> dict[str, Any]:
        days = {"start_date": DAY, "end_date": DAY}
        return {"task_type": "data_sync", "username": username, "app_id": app_id, **days, "task_data": {"report": report}}  # fmt: skip

    fake.fault(ferry, "old quota")
    of_the_app = fleet.refused(**order(ferry, "installs_report"))
    fake.fault(lantern, "account quota")
    of_the_account = fleet.refused(**order(lantern, "in_app_events_report"))
    calls = len(fake.calls)
    same_app = fleet.master.submit(*[order(ferry, "installs_report")] * 4)
    same_account = fleet.master.submit(*[order(app.app_id, "in_app_events_report") for app in fake.apps[:4]])
    others = fleet.master.submit(
        order(ferry, "uninstall_events_report"),
        order(orchard, "installs_report"),
        order(ferry, "installs_report", "other"),
        order(lantern, "in_app_events_report", "other"),
        {"task_type": "app_sync", "username": "acme"},
    )
    wait_for("what nobody refused", lambda: fleet.completed(*others))
    assert len([call for call in fake.calls[calls:] if call.path.startswith("/api")]) == len(others)
    for task_id in same_app:
        assert fleet.why(task_id) == ("limit_closed", "appsflyer-report", ["acme", ferry, "installs_report"])
    for task_id in same_account[1:]:
        assert fleet.why(task_id) == ("limit_closed", "appsflyer-account", ["acme", "in_app_events_report"])
    for task_id in (of_the_app, of_the_account):
        assert (fleet.task(task_id)["retry_count"], fleet.task(task_id)["status"]) == (0, "scheduled")
    fake.fault("list", "429")
    fleet.refused(task_type="app_sync", username="acme")
    again = fleet.master.submit_one("app_sync", username="acme")
    assert fleet.why(again) == ("limit_closed", "appsflyer-lists", ["acme"])
    more = fleet.master.submit_one(**order(orchard, "organic_installs_report"))
    wait_for("a report of the same account", lambda: fleet.completed(more))


def test_a_closing_survives_the_end_of_its_device_and_of_its_master(
    site: Site, tmp_path: Path, programs: list[Program]
) -> None:
    fleet = Fleet(tmp_path, programs)
    is_asked, go_on = threading.Event(), threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        is_asked.set()
        go_on.wait(60)
        reply(b"", 429, Retry_After="3600")(handler)

    site.pages["/x"] = answer
    order = {"task_type": "price", "task_data": {"url": site.url + "/x"}}
    first = fleet.master.submit_one(**order)
    assert is_asked.wait(60)
    device_id = fleet.task(first)["assigned_device_id"]
    worker = next(worker for worker in fleet.workers if worker.device_id == device_id)
    fleet.master.kill()
    go_on.set()
    spools = tmp_path / device_id / "state"
    wait_for("the report on the disk", lambda: any(b"limit_key" in path.read_bytes() for path in files_of(spools)))
    worker.kill()
    fleet.master.start()
    fleet.start(device_id)
    wait_for("the late report", lambda: fleet.task(first)["snooze_count"] == 1)
    second = fleet.master.submit_one(**order)
    fleet.master.kill()
    fleet.master.start()
    other = fleet.master.submit_one("echo")
    wait_for("another task after the restart", lambda: fleet.completed(other))
    assert fleet.why(second) == ("limit_closed", "shop", ["127.0.0.1"])
    assert [path for _, path, _ in site.requests] == ["/x"]


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
