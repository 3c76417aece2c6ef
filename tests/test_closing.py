"""Does what one device was refused say, to whom else it applies, and no more than that?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crawl_site import Site, reply
from crawl_site import run as crawl
from fake_appsflyer import TOKEN, FakeAppsFlyer
from test_executors import raising, run
from test_isolation import Bench
from test_limits import explain, ids, set_limits
from world import World

from executors import task_executor
from executors.app_sync import AppSyncExecutor
from executors.appsflyer import window
from executors.data_sync import DataSyncExecutor
from executors.task_executor import Outcome, Snooze
from limits import Limit

DAY = window.utc_today().isoformat()
APP = "com.example.ferry"


# ---- what an executor says ----


@pytest.mark.parametrize(
    ("closes", "fields"),
    [
        ((), []),
        ("task_data.host", ["task_data.host"]),
        (("username", "app_id"), ["username", "app_id"]),
        (["task_type"], ["task_type"]),
    ],
)
def test_a_closing_is_in_the_report_and_lasts_as_long_as_the_snooze(closes: Any, fields: list[str]) -> None:
    outcome = run(raising(Snooze(90, "429", closes=closes)))
    report = outcome.as_report(7, "lease")
    assert (outcome.outcome, outcome.closes, report["snooze_seconds"]) == ("snoozed", fields, 90.0)
    closing = {name: report[name] for name in ("limit_key", "limit_closed_seconds") if name in report}
    assert closing == ({"limit_key": fields, "limit_closed_seconds": 90.0} if fields else {})


@pytest.mark.parametrize("closes", ["user", "task_data.", "task_data.a b", ["username", 3], [None], ["username"] * 9])
def test_what_no_limit_may_have_as_its_key_is_an_error_where_it_is_written(closes: Any) -> None:
    outcome = run(lambda _: raising(Snooze(90, "429", closes=closes))(_))
    assert (outcome.outcome, outcome.error_type) == ("failed", "ValueError")
    assert "closes is" in (outcome.error_message or "") and "task_data.NAME" in (outcome.error_message or "")


@pytest.mark.parametrize("closes", [5, ["no such field"], object()])
def test_a_snooze_that_was_made_to_say_anything_is_an_outcome_all_the_same(closes: Any) -> None:
    snooze = Snooze(90)
    snooze.closes = closes
    outcome = run(raising(snooze))
    assert (outcome.outcome, outcome.closes) == ("failed", [])


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    try:
        outcome = bench.run("raise Snooze(60, 'limit', closes=('username', 'task_data.host'))")
        assert (outcome.outcome, outcome.closes) == ("snoozed", ["username", "task_data.host"]), outcome
        assert bench.run("raise Snooze(60, 'limit')").closes == []
    finally:
        bench.children.end_all()


# ---- what the master makes of it ----

LIMITS = {
    "user": Limit(0, "user", "*", ("username",)),
    "app": Limit(0, "app", "*", ("app_id",)),
    "pair": Limit(0, "pair", "*", ("app_id", "username")),
    "echo": Limit(0, "echo", "echo", ("username",)),
    "all": Limit(0, "all", "*", ()),
    "echoes": Limit(0, "echoes", "echo", ()),
    "pattern": Limit(0, "pattern", "ech?", ("username",)),
}


@pytest.mark.parametrize(
    ("limit", "fields", "is_closed"),
    [
        ("user", ["username"], True),
        ("pair", ["username"], True),
        ("pair", ["username", "app_id"], True),
        ("user", ["username", "app_id"], False),  # his other apps were not refused
        ("app", ["username"], False),
        ("all", ["username"], False),
        ("echo", ["task_type", "username"], True),
        ("user", ["task_type", "username"], False),  # his other types were not refused
        ("pattern", ["task_type", "username"], False),
        ("echoes", ["task_type"], True),
        ("user", ["task_data.host"], False),
        ("user", ["no such field"], False),
        ("user", [], True),  # a device that says nothing of it
        ("all", [], False),
    ],
)
def test_closed_is_each_key_that_has_all_that_was_refused(
    world: World, limit: str, fields: list[str], is_closed: bool
) -> None:
    set_limits(world, LIMITS[limit])
    world.register("shop-2")
    refused = world.submit(username="joe", app_id="a")
    same = world.submit(username="joe", app_id="a")
    other = world.submit(username="ann", app_id="b")
    judged = world.report(
        world.take(), "snoozed", delay_seconds=60.0, limit_closed_seconds=60.0, limit_key=tuple(fields)
    )
    assert (judged.outcome, world.row(refused)["retry_count"]) == ("accepted", 0)
    if is_closed:
        assert (explain(world, same).reason, explain(world, same).next_look_seconds) == ("limit_closed", 60.0)
    sent = ids(world.pull("shop-2", limit=9))
    assert (same in sent) is not is_closed
    assert (other in sent) is not (is_closed and limit == "echoes")


def test_without_any_limit_the_task_itself_waits_and_nothing_else(world: World) -> None:
    refused, same = world.submit(username="joe"), world.submit(username="joe")
    world.report(world.take(), "snoozed", delay_seconds=60.0, limit_closed_seconds=60.0, limit_key=("username",))
    assert ids(world.pull(limit=9)) == [same] and world.row(refused)["status"] == "scheduled"


# ---- crawl ----


@pytest.mark.parametrize(
    ("status", "retry_after", "outcome", "closes"),
    [
        (429, "", "snoozed", ["task_data.host"]),
        (429, "30", "snoozed", ["task_data.host"]),
        (503, "30", "snoozed", ["task_data.host"]),
        (503, "", "failed", []),
        (500, "30", "failed", []),
        (404, "30", "completed", []),
    ],
)
def test_a_host_that_asks_for_a_pause_is_closed(
    site: Site, status: int, retry_after: str, outcome: str, closes: list[str]
) -> None:
    site.pages["/x"] = reply(b"", status, Retry_After=retry_after)
    ended = crawl(site.url + "/x")
    assert (ended.outcome, ended.closes) == (outcome, closes)


def test_a_host_whose_robots_txt_asks_for_a_pause_is_closed(site: Site) -> None:
    site.pages["/robots.txt"] = reply(b"", 429)
    assert crawl(site.url + "/x").closes == ["task_data.host"]


def test_what_this_device_only_remembers_closes_nothing(site: Site) -> None:
    site.pages["/x"] = reply(b"", 429, Retry_After="3600")
    assert crawl(site.url + "/x").closes == ["task_data.host"]
    again = crawl(site.url + "/y")
    assert (again.outcome, again.closes) == ("snoozed", []), "somebody may have opened it since"


def test_a_host_behind_a_redirect_does_not_close_the_one_before(site: Site) -> None:
    elsewhere = site.url.replace("127.0.0.1", "localhost")
    site.pages["/x"] = reply(b"", 302, Location=elsewhere + "/busy")
    site.pages["/busy"] = reply(b"", 429)
    site.pages["/y"] = reply(b"", 302, Location="/busy")
    ended = crawl(site.url + "/x", settings={"crawl_allow_networks": ["127.0.0.0/8", "::1/128"]})
    assert (ended.outcome, ended.closes) == ("snoozed", [])
    assert crawl(site.url + "/y").closes == ["task_data.host"]


def test_a_sitemap_of_another_host_does_not_close_the_pages(site: Site) -> None:
    site.pages["/map.xml"] = reply(b"", 429)
    ended = crawl("http://localhost:1/", sitemap=site.url + "/map.xml")
    assert (ended.outcome, ended.closes) == ("snoozed", [])
    assert crawl(site.url + "/", sitemap=site.url + "/map.xml", settings={"crawl_delay_seconds": 0.001}).closes


# ---- AppsFlyer ----


@pytest.fixture
def fake() -> Iterator[FakeAppsFlyer]:
    fake = FakeAppsFlyer().start()
    yield fake
    fake.stop()


def pull(fake: FakeAppsFlyer, folder: Path, executor: Any, **task: Any) -> Outcome:
    settings = {"appsflyer_url": fake.url, "credentials": {"acme": TOKEN}}
    whole = {"id": 7, "task_type": executor.task_type, "start_date": DAY, "end_date": DAY, "batch": "b", **task}
    return task_executor.run(executor, whole, settings=settings, artifact_folder=folder)


OF_THE_APP = ["username", "app_id", "task_data.report"]


@pytest.mark.parametrize(
    ("fault", "closes"),
    [
        ("old quota", OF_THE_APP),
        ("account quota", ["username", "task_data.report"]),
        ("403 limit", OF_THE_APP),
        ("429", OF_THE_APP),
        ("429 soon", OF_THE_APP),
        ("500", []),
        ("403", []),
        ("404", []),
        ("no raw", []),
        ("408", []),
    ],
)
def test_each_answer_of_appsflyer_closes_what_it_counts(
    fake: FakeAppsFlyer, tmp_path: Path, fault: str, closes: list[str]
) -> None:
    fake.fault(APP, fault)
    task = {"username": "acme", "app_id": APP, "task_data": {"report": "installs_report"}}
    assert pull(fake, tmp_path, DataSyncExecutor(), **task).closes == closes


def test_the_sixth_throttle_in_a_row_closes_the_report_for_the_day(fake: FakeAppsFlyer, tmp_path: Path) -> None:
    fake.fault(APP, *["429 soon"] * 5, "403 limit")
    fake.clock = lambda: 1_800_000_000 // 86400 * 86400 + 43200.0
    task = {"username": "acme", "app_id": APP, "task_data": {"report": "installs_report"}}
    waits = [pull(fake, tmp_path, DataSyncExecutor(), **task) for _ in range(6)]
    assert waits[-1].closes == OF_THE_APP and (waits[-1].as_report(1, "l")["limit_closed_seconds"]) > 43200


@pytest.mark.parametrize(
    ("task", "closes"),
    [
        ({"username": "acme", "app_id": APP, "task_data": {"credential": "acme"}}, OF_THE_APP),
        (
            {"username": "joe", "app_id": APP, "task_data": {"credential": "acme"}},
            ["task_data.credential", "app_id", "task_data.report"],
        ),
        (
            {"username": "joe", "app_id": "x", "task_data": {"username": "acme", "app_id": APP}},
            ["task_data.username", "task_data.app_id", "task_data.report"],
        ),
    ],
)
def test_the_fields_are_those_of_this_task_that_say_it(
    fake: FakeAppsFlyer, tmp_path: Path, task: dict[str, Any], closes: list[str]
) -> None:
    fake.fault(APP, "429")
    task["task_data"]["report"] = "installs_report"
    assert pull(fake, tmp_path, DataSyncExecutor(), **task).closes == closes


def test_a_list_closes_lists_alone_and_a_remembered_quota_nothing(fake: FakeAppsFlyer, tmp_path: Path) -> None:
    fake.fault("list", "429")
    assert pull(fake, tmp_path, AppSyncExecutor(), username="acme").closes == ["task_type", "username"]
    fake.fault(APP, "old quota")
    task = {"username": "acme", "app_id": APP, "task_data": {"report": "installs_report"}}
    assert pull(fake, tmp_path, DataSyncExecutor(), **task).closes == OF_THE_APP
    asked = len(fake.calls)
    again = pull(fake, tmp_path, DataSyncExecutor(), **task)
    assert (again.outcome, again.closes, len(fake.calls)) == ("snoozed", [], asked)
