"""Does app_sync list every app once, and order each app's reports once? Over real HTTP, against the fake."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_appsflyer import TOKEN, App, FakeAppsFlyer

import executors.app_sync as app_sync
from executors import task_executor
from executors.app_sync import AppSyncExecutor
from executors.appsflyer import pacing, window
from executors.appsflyer.pacing import Key, Pacing
from executors.data_sync import DataSyncExecutor
from executors.task_executor import Outcome

DAY = (window.utc_today() - timedelta(days=1)).isoformat()
PULL = {"reports": ["installs_report", "daily_report"], "start_date": DAY, "end_date": DAY}


@pytest.fixture
def fake() -> Iterator[FakeAppsFlyer]:
    fake = FakeAppsFlyer().start()
    yield fake
    fake.stop()


def settings_for(fake: FakeAppsFlyer) -> dict[str, Any]:
    return {"appsflyer_url": fake.url, "credentials": {"acme": TOKEN}}


def run(fake: FakeAppsFlyer, **fields: Any) -> Outcome:
    task: dict[str, Any] = {"id": 9, "task_type": "app_sync", "username": "acme", "batch": "b"}
    task.update({name: fields.pop(name) for name in ("username", "batch", "start_date", "end_date") if name in fields})
    return task_executor.run(AppSyncExecutor(), {**task, "task_data": fields}, settings=settings_for(fake))


# ---- the list ----


def test_the_result_is_every_app_with_its_platform_currency_and_time_zone(fake: FakeAppsFlyer) -> None:
    fake.apps[2].time_zone = "Asia/Seoul"
    outcome = run(fake)
    result = outcome.result or {}
    assert outcome.outcome == "completed" and (result["count"], result["pages"], result["new_tasks"]) == (12, 1, 0)
    assert result["apps"][2] == {"id": fake.apps[2].app_id, "name": "Orchard", "platform": "android", "currency": "USD",
                                 "time_zone": "Asia/Seoul"}  # fmt: skip
    assert fake.calls[0].query == {"limit": "1000", "offset": "0"}


@pytest.mark.parametrize("absolute_next", [True, False])
def test_pages_are_followed_to_the_last_one(fake: FakeAppsFlyer, absolute_next: bool) -> None:
    fake.absolute_next = absolute_next
    result = run(fake, page_size=5).result or {}
    assert result["pages"] == 3 and [app["id"] for app in result["apps"]] == [app.app_id for app in fake.apps]
    assert [call.query["offset"] for call in fake.calls] == ["0", "5", "10"]


def test_a_next_link_to_another_host_does_not_get_the_token(
    fake: FakeAppsFlyer, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief = FakeAppsFlyer().start()
    try:
        said = fake._say

        def say(call: Any, status: int, text: str, *more: Any, **how: Any) -> Any:
            return said(call, status, text.replace(fake.url, thief.url), *more, **how)

        monkeypatch.setattr(fake, "_say", say)
        result = run(fake, page_size=5).result or {}
        assert result["count"] == 12 and thief.calls == [] and len(fake.calls) == 3
    finally:
        thief.stop()


def test_a_list_that_repeats_itself_ends(fake: FakeAppsFlyer, monkeypatch: pytest.MonkeyPatch) -> None:
    said = fake._say
    stuck = json.dumps({"data": [{"id": "a.b", "attributes": {}}], "links": {"next": "/api/mng/apps?offset=0"}})
    monkeypatch.setattr(fake, "_say", lambda call, status, text, *more, **how: said(call, status, stuck, *more, **how))
    result = run(fake).result or {}
    assert (result["count"], result["pages"]) == (1, 2)


def test_a_page_without_a_next_link_is_not_the_last_where_the_total_says_more(
    fake: FakeAppsFlyer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = fake._say

    def say(call: Any, status: int, text: str, *more: Any, **how: Any) -> Any:
        return said(call, status, json.dumps({**json.loads(text), "links": {}}), *more, **how)

    monkeypatch.setattr(fake, "_say", say)
    assert (run(fake, page_size=5).result or {})["count"] == 12


def test_an_account_without_apps_is_an_empty_list(fake: FakeAppsFlyer) -> None:
    fake.apps = []
    assert (run(fake).result or {})["apps"] == []


# ---- what is ordered ----


def test_each_app_and_report_becomes_one_data_sync_task_with_the_same_key_every_time(fake: FakeAppsFlyer) -> None:
    first, second = run(fake, pull=PULL), run(fake, pull=PULL, page_size=5)
    keys = [task["unique_key"] for task in first.new_tasks]
    assert len(set(keys)) == 24 and keys == [task["unique_key"] for task in second.new_tasks]
    child = first.new_tasks[1]
    assert child == {"task_type": "data_sync", "username": "acme", "app_id": fake.apps[0].app_id, "start_date": DAY,
                     "end_date": DAY, "batch": "b", "parent_id": 9, "unique_key": keys[1],
                     "task_data": {"report": "daily_report", "credential": "acme"}}  # fmt: skip
    assert TOKEN not in json.dumps(first.as_report(1, "l"))


def test_an_ordered_task_runs_as_it_is(fake: FakeAppsFlyer, tmp_path: Path) -> None:
    child = run(fake, pull=PULL).new_tasks[0]
    outcome = task_executor.run(
        DataSyncExecutor(), {"id": 10, **child}, settings=settings_for(fake), artifact_folder=tmp_path
    )
    assert outcome.outcome == "completed" and (outcome.result or {})["app_id"] == child["app_id"]


def test_the_tasks_own_dates_count_where_pull_has_none(fake: FakeAppsFlyer) -> None:
    outcome = run(fake, start_date=DAY, end_date=DAY, pull={"reports": ["installs_report"]})
    assert {task["start_date"] for task in outcome.new_tasks} == {DAY}


def test_the_time_zone_app_is_each_apps_own(fake: FakeAppsFlyer) -> None:
    fake.apps[2].time_zone = "Asia/Seoul"
    outcome = run(fake, pull={**PULL, "reports": ["installs_report"], "timezone": "app"})
    assert [task["task_data"]["timezone"] for task in outcome.new_tasks[1:3]] == ["UTC", "Asia/Seoul"]


def test_an_app_whose_id_cannot_stand_in_a_path_is_listed_and_not_pulled(fake: FakeAppsFlyer) -> None:
    fake.apps = [App("../../x", "Odd"), App("com.example.fine", "Fine")]
    outcome = run(fake, pull={**PULL, "reports": ["installs_report"]})
    assert (outcome.result or {})["count"] == 2 and [task["app_id"] for task in outcome.new_tasks] == [
        "com.example.fine"
    ]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pull": {"report": "installs_report"}}, "task_data.pull.report is not known: did you mean reports?"),
        ({"pull": {"reports": []}}, "pull.reports is missing"),
        ({"pull": {**PULL, "reports": ["installs"]}}, "did you mean installs_report?"),
        ({"pull": {"reports": ["installs_report"]}}, "start_date is None"),
        ({"pull": "all"}, "pull must be an object"),
        ({"page_size": 0}, "page_size is 0"),
        ({"capabilities": "x"}, "write protect_360 or cost"),
        ({"username": None}, "username is missing"),
        ({"username": "nobody"}, "no credential 'nobody'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_one_sentence_and_no_request(
    fake: FakeAppsFlyer, fields: dict[str, Any], sentence: str
) -> None:
    outcome = run(fake, **fields)
    assert (outcome.outcome, outcome.retry) == ("failed", False) and sentence in (outcome.error_message or ""), outcome
    assert fake.calls == []


# ---- limits and errors ----


def test_too_many_requests_is_a_snooze_and_a_hint_counts(fake: FakeAppsFlyer) -> None:
    fake.fault("list", "429", "429 soon")
    waits = [run(fake).snooze_seconds or 0 for _ in range(2)]
    assert 65 <= waits[0] <= 72 and 7 <= waits[1] <= 8
    assert run(fake).outcome == "completed"


@pytest.mark.parametrize(
    ("fault", "retry", "sentence"),
    [("revoked", False, "make a new API token"), ("500", True, "answered 500"), ("blank", True, "what is no JSON"),
     ("html", True, "what is no JSON"), ("evil redirect", True, "answered 302")],
)  # fmt: skip
def test_each_error_of_the_list_ends_as_it_should(fake: FakeAppsFlyer, fault: str, retry: bool, sentence: str) -> None:
    fake.fault("list", fault)
    outcome = run(fake)
    assert (outcome.outcome, outcome.retry) == ("failed", retry) and sentence in (outcome.error_message or ""), outcome


def test_the_device_itself_keeps_to_20_lists_a_minute_and_100_a_day() -> None:
    now = [0.0]
    paced = Pacing(clock=lambda: now[0], wall_clock=lambda: 86400.0 * 3 + 3600 + now[0])
    key = Key("https://x", "acme")
    assert [paced.take_list_call(key) for _ in range(20)] == [0.0] * 20
    now[0] = 10.0
    assert paced.take_list_call(key) == 50.0 and paced.take_list_call(Key("https://x", "other")) == 0.0
    for minute in range(1, 5):
        now[0] = minute * 61.0
        assert [paced.take_list_call(key) for _ in range(20)] == [0.0] * 20
    now[0] = 600.0
    assert paced.take_list_call(key) == 86400 - 3600 - 600
    now[0] = 86400.0
    assert paced.take_list_call(key) == 0.0, "a new day"


def test_a_list_that_may_not_start_yet_is_snoozed_and_asks_nobody(
    fake: FakeAppsFlyer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_sync, "PACING", Pacing())
    for _ in range(20):
        assert run(fake).outcome == "completed"
    outcome = run(fake)
    assert outcome.outcome == "snoozed" and 50 < (outcome.snooze_seconds or 0) <= 66 and len(fake.calls) == 20


def test_in_the_middle_of_a_list_it_waits_for_its_turn(fake: FakeAppsFlyer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(app_sync, "PACING", Pacing(clock=lambda: now[0]))
    monkeypatch.setattr(pacing, "LIST_CALLS_A_MINUTE", 2)
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(run(fake, page_size=5)))
    thread.start()
    end = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < end:
        now[0] += 61.0 if len(fake.calls) == 2 else 0.0
        thread.join(0.05)
    assert found[0].outcome == "completed" and (found[0].result or {})["count"] == 12
