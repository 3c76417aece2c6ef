"""Does data_sync bring every row once, and never a token anywhere? Over real HTTP, against tests/fake_appsflyer.py."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_appsflyer import COLUMNS, TOKEN, App, FakeAppsFlyer

from executors import task_executor
from executors.appsflyer import answers, client, pacing, pull, window
from executors.data_sync import DataSyncExecutor
from executors.task_executor import Outcome

APP = "com.example.ferry"


def day(ago: int) -> str:
    return (window.utc_today() - timedelta(days=ago)).isoformat()


@pytest.fixture
def fake() -> Iterator[FakeAppsFlyer]:
    fake = FakeAppsFlyer().start()
    yield fake
    fake.stop()


class Device:
    """Runs data_sync tasks as a worker does, in this process, and keeps all that left them."""

    def __init__(self, fake: FakeAppsFlyer, folder: Path):
        self.fake = fake
        self.folder = folder
        self.settings = {"appsflyer_url": fake.url, "credentials": {"acme": TOKEN, "old": "0ld-token-of-nobody"}}
        self.outcomes: list[Outcome] = []

    def run(self, report: str = "installs_report", **fields: Any) -> Outcome:
        columns = ("username", "app_id", "start_date", "end_date", "batch", "execution_timeout_seconds", "priority")
        task = {"id": 7, "task_type": "data_sync", "username": "acme", "app_id": APP, "start_date": day(3),
                "end_date": day(1), "batch": "b", "execution_timeout_seconds": 60}  # fmt: skip
        task.update({name: fields.pop(name) for name in columns if name in fields})
        task["task_data"] = {"report": report, **fields}
        return self.run_task(task)

    def run_task(self, task: dict[str, Any], **how: Any) -> Outcome:
        folder = self.folder / str(len(self.outcomes))
        how = {"settings": self.settings, "artifact_folder": folder, **how}
        outcome = task_executor.run(DataSyncExecutor(), task, **how)
        self.outcomes.append(outcome)
        named = [one["name"] for one in outcome.artifacts]
        assert sorted(path.name for path in folder.glob("*")) == sorted(named), "a file was left behind"
        return outcome

    def rows(self, at: int = -1) -> list[list[str]]:
        """The rows in an outcome's file, and its header checked against the result."""
        at %= len(self.outcomes)
        outcome = self.outcomes[at]
        assert outcome.result is not None and len(outcome.artifacts) == 1, outcome
        packed = (self.folder / str(at) / outcome.artifacts[0]["name"]).read_bytes()
        header, *rows = csv.reader(io.StringIO(gzip.decompress(packed).decode("utf-8"), newline=""))
        assert header == outcome.result["columns"] and len(rows) == outcome.result["rows"]
        return rows


@pytest.fixture
def device(fake: FakeAppsFlyer, tmp_path: Path) -> Device:
    return Device(fake, tmp_path)


def expected(fake: FakeAppsFlyer, report: str, first: int, last: int, app_id: str = APP) -> Counter[tuple[str, ...]]:
    days = [day(ago) for ago in range(first, last - 1, -1)]
    return Counter(tuple(row) for one in days for row in fake.rows(app_id, report, one))


# ---- a report ----


def test_a_raw_report_arrives_complete_and_says_what_it_is(fake: FakeAppsFlyer, device: Device) -> None:
    outcome = device.run()
    assert outcome.outcome == "completed", outcome
    result = outcome.result or {}
    rows = device.rows()
    assert Counter(map(tuple, rows)) == expected(fake, "installs_report", 3, 1)
    times = [row[COLUMNS.index("Event Time")] for row in rows]
    assert (result["first_event_time"], result["last_event_time"]) == (min(times), max(times))
    assert result["columns"] == COLUMNS and result["http_status"] == 200 and result["bytes"] > 1000
    assert result["window"] == {"from": day(3), "to": day(1)} and not result["truncated"] and not result["split"]
    assert fake.calls[0].query["maximum_rows"] == "1000000"


@pytest.mark.parametrize(
    ("line_end", "has_bom", "is_packed"),
    [("\r\n", True, True), ("\n", True, False), ("\n", False, False), ("\r\n", False, True)],
)
def test_the_file_is_the_same_with_and_without_bom_with_crlf_and_lf_packed_and_not(
    fake: FakeAppsFlyer, device: Device, line_end: str, has_bom: bool, is_packed: bool
) -> None:
    device.run("in_app_events_report")
    fake.line_end, fake.has_bom, fake.is_packed = line_end, has_bom, is_packed
    device.run("in_app_events_report")
    assert device.outcomes[0].artifacts == device.outcomes[1].artifacts, "the same report is the same bytes"
    packed = (device.folder / "0" / device.outcomes[0].artifacts[0]["name"]).read_bytes()
    assert packed[4:8] == bytes(4), "also a second later"
    campaigns = {row[COLUMNS.index("Campaign")] for row in device.rows()}
    assert campaigns == {"夏季, 促销", "Été\nen deux lignes", "two\r\nlines", "plain"}


def test_bytes_that_are_no_utf_8_go_through_unchanged(
    fake: FakeAppsFlyer, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake._csv
    monkeypatch.setattr(fake, "_csv", lambda *what: made(*what).replace(b"plain", b"pl\xffin"))
    outcome = device.run("in_app_events_report")
    assert b"pl\xffin" in gzip.decompress((device.folder / "0" / outcome.artifacts[0]["name"]).read_bytes())


def test_a_header_alone_is_a_report_of_no_rows(fake: FakeAppsFlyer, device: Device) -> None:
    fake.apps[1].rows_per_day = 0
    outcome = device.run()
    result = outcome.result or {}
    assert (outcome.outcome, result["rows"], result["first_event_time"]) == ("completed", 0, None)
    assert device.rows() == []


def test_an_aggregate_report_arrives_without_a_redirect_and_with_its_own_columns(
    fake: FakeAppsFlyer, device: Device
) -> None:
    outcome = device.run("partners_by_date_report", start_date=day(30))
    result = outcome.result or {}
    assert Counter(map(tuple, device.rows())) == expected(fake, "partners_by_date_report", 30, 1)
    assert result["columns"][0] == "Date" and result["first_event_time"] == day(30)
    assert "maximum_rows" not in fake.calls[0].query


def test_options_reach_the_query_as_appsflyer_takes_them(fake: FakeAppsFlyer, device: Device) -> None:
    outcome = device.run(timezone="Europe/Paris", currency="USD", additional_fields=["oaid", "device_model"],
                         media_source="Facebook Ads", maximum_rows=200_000)  # fmt: skip
    asked = dict(fake.calls[0].query)
    assert asked == {"from": day(3), "to": day(1), "timezone": "Europe/Paris", "currency": "USD", "maximum_rows": "200000",
                     "additional_fields": "oaid,device_model", "media_source": "Facebook Ads"}  # fmt: skip
    assert (outcome.result or {})["columns"] == [*COLUMNS, "Oaid", "Device Model"]
    assert {row[12] for row in device.rows()} == {"Facebook Ads"}


# ---- the redirect ----


def test_the_signed_url_is_asked_without_the_token_and_told_nowhere(
    fake: FakeAppsFlyer, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device.run()
    fake.fault(APP, "gone")
    assert device.run().outcome == "failed"
    api, stored = fake.calls[:2]
    assert api.authorization == f"Bearer {TOKEN}" and stored.path.startswith("/export/")
    assert stored.authorization == "" and stored.host in fake.rawdata_url
    told = repr(device.outcomes) + caplog.text
    for name in (call.path for call in fake.calls if call.path.startswith("/export/")):
        assert name.rpartition("/")[2] not in told


def test_a_redirect_to_anything_but_https_is_not_followed(fake: FakeAppsFlyer, device: Device) -> None:
    fake.fault(APP, "evil redirect")
    outcome = device.run()
    assert (outcome.outcome, outcome.retry) == ("failed", False) and "not followed" in (outcome.error_message or "")


@pytest.mark.parametrize(
    ("url", "target", "is_followed"),
    [
        ("https://hq1.appsflyer.com", "https://rawdata.example/x", True),
        ("https://hq1.appsflyer.com", "http://rawdata.example/x", False),
        ("https://hq1.appsflyer.com", "http://127.0.0.1:1/x", False),
        ("http://127.0.0.1:1", "http://127.0.0.1:2/x", True),
        ("http://127.0.0.1:1", "http://192.0.2.1/x", False),
        ("http://127.0.0.1:1", "ftp://127.0.0.1/x", False),
    ],
)
def test_where_a_redirect_may_lead(url: str, target: str, is_followed: bool) -> None:
    asked = client.Client(pacing.Key(url, "acme"), TOKEN, client.Limits(60, lambda: False), pacing.Pacing())
    response = client.requests.Response()
    response.url, response.status_code, response.headers["Location"] = url + "/api", 302, target
    if is_followed:
        assert asked._target(response) == target
    else:
        with pytest.raises(task_executor.DoNotRetry):
            asked._target(response)


# ---- wide ranges, and reports at the cap ----


def test_a_wide_range_becomes_pieces_of_31_days_with_the_same_keys_every_time(device: Device) -> None:
    first = device.run(start_date=day(70), priority=8, timezone="UTC")
    second = device.run(start_date=day(70), priority=8, timezone="UTC")
    result = first.result or {}
    assert result["split"] and result["rows"] == 0 and first.artifacts == [] and not device.fake.calls
    windows = [(task["start_date"], task["end_date"]) for task in first.new_tasks]
    assert windows == [(day(70), day(40)), (day(39), day(9)), (day(8), day(1))]
    keys = [task["unique_key"] for task in first.new_tasks]
    assert keys == [task["unique_key"] for task in second.new_tasks] and len(set(keys)) == 3
    child = first.new_tasks[0]
    assert child["task_data"] == {"report": "installs_report", "credential": "acme", "timezone": "UTC"}
    assert (child["batch"], child["priority"], child["username"], child["parent_id"]) == ("b", 8, "acme", 7)
    assert child["execution_timeout_seconds"] == 60


def test_options_that_change_the_report_change_the_key_and_others_do_not(device: Device) -> None:
    def key(**fields: Any) -> str:
        return str(device.run(start_date=day(40), **fields).new_tasks[0]["unique_key"])

    plain = key()
    assert key(currency="USD") != plain and key(timezone="Asia/Seoul") not in (plain, key(currency="USD"))
    assert key(days_per_pull=31) == plain


def test_a_task_without_a_batch_gives_its_children_one_because_keys_count_within_it(device: Device) -> None:
    assert {task["batch"] for task in device.run(start_date=day(40), batch=None).new_tasks} == {"data_sync-7"}


def test_a_range_that_begins_too_long_ago_is_clamped_to_90_days_and_says_so(
    fake: FakeAppsFlyer, device: Device
) -> None:
    outcome = device.run(start_date=day(100), end_date=day(88))
    assert outcome.outcome == "completed" and fake.calls[0].query["from"] == day(90)
    assert "last 90 days" in (outcome.result or {})["left_out"]
    wide = device.run(start_date=day(130), end_date=day(80))
    assert [task["start_date"] for task in wide.new_tasks] == [day(99)] and "left_out" in (wide.result or {})
    gone = device.run(start_date=day(120), end_date=day(91))
    assert (gone.outcome, gone.retry) == ("failed", False) and day(90) in (gone.error_message or "")


def run_tree(device: Device, outcome: Outcome, limit: int = 200) -> list[int]:
    """Runs the new tasks, theirs and so on, as a master would; the places of the outcomes that have a file."""
    waiting = list(outcome.new_tasks)
    seen: set[tuple[str, str]] = set()
    found = [] if outcome.new_tasks else [len(device.outcomes) - 1]
    while waiting:
        child = waiting.pop(0)
        key = (child["batch"], child["unique_key"])
        assert key not in seen, "two tasks for one window"
        seen.add(key)
        done = device.run_task({"id": 100 + len(seen), **child, "execution_timeout_seconds": 60})
        assert done.outcome == "completed", done
        waiting += done.new_tasks
        if not done.new_tasks:
            found.append(len(device.outcomes) - 1)
        assert len(seen) < limit
    return found


@pytest.mark.parametrize("is_end_included", [False, True])
def test_a_report_at_the_cap_is_halved_until_every_row_has_come_once(
    fake: FakeAppsFlyer, device: Device, is_end_included: bool
) -> None:
    fake.apps[1].rows_per_day = 400
    fake.row_caps = (150,)
    fake.installs_limit = 1000
    fake.is_end_included = is_end_included
    first = device.run(maximum_rows=150)
    result = first.result or {}
    assert (result["split"], result["split_by"], result["rows"], first.artifacts) == (True, "rows", 0, [])
    found = run_tree(device, first)
    arrived = Counter(tuple(row) for at in found for row in device.rows(at))
    assert arrived == expected(fake, "installs_report", 3, 1)
    assert all(not (device.outcomes[at].result or {})["truncated"] for at in found)


def test_an_hour_that_is_still_at_the_cap_is_kept_as_truncated(fake: FakeAppsFlyer, device: Device) -> None:
    fake.apps[1].rows_per_day = 400
    fake.row_caps, fake.installs_limit = (2,), 1000
    outcome = device.run(start_date=day(1), end_date=day(1), maximum_rows=2,
                         from_time=f"{day(1)} 12:00:00", to_time=f"{day(1)} 13:00:00")  # fmt: skip
    result = outcome.result or {}
    assert (outcome.outcome, result["truncated"], result["rows"], outcome.new_tasks) == ("completed", True, 2, [])


def test_halves_meet_at_midnights_and_then_at_full_hours_down_to_one() -> None:
    today = window.utc_today()
    days = window.Window.of_days(today, today + timedelta(days=2))
    first, second = days.halves()
    assert (first.day_count, second.day_count, first.end) == (1, 2, second.start)
    waiting, leaves = [days], []
    while waiting:
        one = waiting.pop()
        waiting += one.halves()
        leaves += [] if one.halves() else [one]
    leaves.sort(key=lambda leaf: leaf.start)
    assert len(leaves) == 72 and all(leaf.end - leaf.start == timedelta(hours=1) for leaf in leaves)
    assert all(one.end == other.start for one, other in zip(leaves, leaves[1:]))


# ---- what goes wrong ----


@pytest.mark.parametrize(
    ("fault", "ending", "wait", "sentence"),
    [
        ("500", "retry", None, "answered 500: Internal error"),
        ("408", "retry", None, "answered 408"),
        ("403", "retry", 300, "may this token read"),
        ("404", "retry", 120, "check app_id"),
        ("416", "retry", 120, "answered 416"),
        ("blank", "retry", 60, "empty body"),
        ("html", "retry", 60, "no report's header"),
        ("403 limit", "snooze", 65, "one call a minute"),
        ("429", "snooze", 65, "come back later"),
        ("429 soon", "snooze", 7, "come back later"),
        ("no raw", "never", None, "plan has no raw data"),
        ("bad limit", "never", None, "200000 or 1000000"),
        ("json error", "never", None, "Something <i>else</i>"),
        ("revoked", "never", None, "make a new API token V2"),
        ("gone", "retry", None, "where the report is stored the answer was 403"),
        ("stored blank", "retry", 60, "empty body"),
        ("stored html", "retry", 60, "no report's header"),
        ("cut", "retry", None, "cut the connection"),
        ("half row", "retry", None, "middle of a row"),
    ],
)
def test_each_error_ends_as_the_table_says_and_leaves_no_file(
    fake: FakeAppsFlyer, device: Device, fault: str, ending: str, wait: float | None, sentence: str
) -> None:
    fake.fault(APP, fault)
    outcome = device.run()
    assert sentence in (outcome.error_message or ""), outcome
    assert outcome.outcome == ("snoozed" if ending == "snooze" else "failed")
    assert outcome.retry == (ending != "never") and outcome.artifacts == [] and outcome.result is None
    if ending == "snooze":
        assert wait is not None and wait <= (outcome.snooze_seconds or 0) <= wait * 1.1
    else:
        assert outcome.retry_after_seconds == wait
    assert "Traceback" not in outcome.log_tail


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"app_id": "no.such.app"}, "check app_id"),
        ({"additional_fields": "is_primary_attribution"}, "Unknown additional field"),
        ({"maximum_rows": 5}, "200000 or 1000000"),
    ],
)
def test_what_appsflyer_itself_refuses_is_passed_on(device: Device, fields: dict[str, Any], sentence: str) -> None:
    assert sentence in (device.run(**fields).error_message or "")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"app_id": "../../etc"}, "app_id is '../../etc'"),
        ({"app_id": ".."}, "app_id is '..'"),
        ({"app_id": "a/b"}, "app_id is 'a/b'"),
        ({"app_id": "123456789"}, "write id123456789"),
        ({"app_id": None}, "app_id is None"),
        ({"report": "install_report"}, "did you mean installs_report?"),
        ({"start_date": day(1), "end_date": day(2)}, "is before start_date"),
        ({"start_date": "20261101"}, "start_date is '20261101'"),
        ({"start_date": None}, "write a date as YYYY-MM-DD"),
        ({"end_date": day(-5)}, "is in the future"),
        ({"username": None}, "username is missing"),
        ({"username": "nobody"}, "this device has no credential 'nobody'"),
        ({"time_zone": "UTC"}, "task_data.time_zone is not known: did you mean timezone?"),
        ({"timezone": "a\r\nb"}, "timezone is 'a\\r\\nb'"),
        ({"maximum_rows": True}, "maximum_rows is True"),
        ({"days_per_pull": 32}, "takes at most 31 days"),
        ({"report": "geo_report", "from_time": "x"}, "takes whole days"),
        ({"from_time": f"{day(1)} 12:00:00"}, "to_time is None"),
        ({"report": "partners_report", "start_date": "2020-01-01"}, "write days_per_pull"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_one_sentence_and_no_request(
    fake: FakeAppsFlyer, device: Device, fields: dict[str, Any], sentence: str
) -> None:
    outcome = device.run(**fields)
    assert (outcome.outcome, outcome.retry) == ("failed", False) and sentence in (outcome.error_message or ""), outcome
    assert fake.calls == [] and outcome.log_tail == ""


def test_a_connection_that_is_refused_is_retried_and_says_no_url(fake: FakeAppsFlyer, device: Device) -> None:
    fake.stop()
    outcome = device.run()
    assert (outcome.outcome, outcome.retry) == ("failed", True)
    assert outcome.error_message == "AppsFlyer cannot be reached (ConnectionError)"


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_server_that_hardly_answers_costs_the_tasks_time_and_no_more(
    fake: FakeAppsFlyer, device: Device, fault: str
) -> None:
    fake.fault(APP, fault)
    started = time.monotonic()
    outcome = device.run(execution_timeout_seconds=client.MARGIN_SECONDS + 0.7)
    assert (outcome.outcome, outcome.retry) == ("failed", True) and time.monotonic() - started < 40
    assert "in time" in (outcome.error_message or "") or "within the task's" in (outcome.error_message or "")


def test_a_cancelled_task_stops_between_two_pieces(fake: FakeAppsFlyer, device: Device) -> None:
    fake.fault(APP, "drip")
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    task = {"id": 1, "task_type": "data_sync", "username": "acme", "app_id": APP, "start_date": day(1), "end_date": day(1),
            "task_data": {"report": "installs_report"}}  # fmt: skip
    started = time.monotonic()
    assert device.run_task(task, is_cancelled=stop.is_set).error_message == "cancelled"
    assert time.monotonic() - started < 40


# ---- quotas ----


def test_a_used_up_quota_is_snoozed_until_midnight_utc_by_the_servers_clock_and_not_asked_again(
    fake: FakeAppsFlyer, device: Device
) -> None:
    fake.installs_limit = 1
    assert device.run().outcome == "completed"
    fake.clock = lambda: (time.time() // 86400 + 1) * 86400 - 7200  # 22:00 UTC, whatever this machine thinks
    fake._used.clear()
    fake.installs_limit = 0
    outcome = device.run()
    low, high = answers.AFTER_MIDNIGHT_SECONDS
    assert outcome.outcome == "snoozed" and 7199 + low <= (outcome.snooze_seconds or 0) <= 7201 + high
    assert "downloads of today are used up" in (outcome.error_message or "")
    asked = len(fake.calls)
    again = device.run(start_date=day(1))
    assert again.outcome == "snoozed" and 7100 < (again.snooze_seconds or 0) <= 7201 + high and len(fake.calls) == asked
    fake.installs_limit = 5
    assert device.run(app_id="id1000000003").outcome == "completed", "another app has a quota of its own"


def test_a_quota_of_the_account_closes_the_report_for_all_its_apps(fake: FakeAppsFlyer, device: Device) -> None:
    fake.fault(APP, "account quota")
    assert device.run().outcome == "snoozed"
    assert device.run(app_id="id1000000003").outcome == "snoozed"
    assert device.run("in_app_events_report").outcome == "completed"


def test_the_older_wording_of_a_quota_is_known_and_a_hint_goes_before_midnight(
    fake: FakeAppsFlyer, device: Device
) -> None:
    fake.fault(APP, "old quota")
    assert (device.run().snooze_seconds or 0) > 30
    fake.hints, fake.day_seconds, fake.events_limit = True, 100.0, 0
    waited = device.run("in_app_events_report").snooze_seconds or 0
    assert 1 <= waited <= 111


@pytest.mark.parametrize(
    ("status", "text", "action"),
    [
        (402, "", "quota"),
        (400, "You've reached your maximum number of in-app event reports", "quota"),
        (400, "Your API call limit has been reached for the given report type", "quota"),
        (400, "The supplied API token is invalid", "credential"),
        (401, "Account may be suspended", "credential"),
        (400, "Raw reports historical lookback is limited to 90 days", "refuse"),
        (403, "Limit reached for geo-by-date-report", "throttle"),
        (425, "", "busy"),
        (503, "Limit reached", "busy"),
        (418, "", "refuse"),
    ],
)
def test_an_answer_is_read_by_its_status_and_a_part_of_its_text(status: int, text: str, action: str) -> None:
    assert answers.rule_for(answers.Answer(status, text, {})).action == action


def test_retry_after_may_be_a_date_of_the_servers_own_clock() -> None:
    headers = {"Date": "Wed, 01 Jan 2020 00:00:00 GMT", "Retry-After": "Wed, 01 Jan 2020 00:01:30 GMT"}
    assert answers.Answer(503, "", headers).retry_after == 90.0
    assert answers.Answer(503, "", {"Retry-After": "soon"}).retry_after is None
    assert answers.Answer(503, "", {"Retry-After": "999999999"}).retry_after == 86400.0


def test_five_throttles_in_a_row_are_waited_out_and_the_sixth_parks_until_midnight(
    fake: FakeAppsFlyer, device: Device
) -> None:
    fake.fault(APP, *["403 limit"] * 6)
    waits = [device.run().snooze_seconds or 0 for _ in range(6)]
    assert all(65 <= wait <= 72 for wait in waits[:5])
    assert answers.Answer(403, "", {}).seconds_to_midnight <= waits[5] + 1
    assert waits[5] >= 30


def test_a_throttle_in_between_is_forgotten_with_the_next_success(fake: FakeAppsFlyer, device: Device) -> None:
    for _ in range(3):
        fake.fault(APP, *["429"] * 3)
        assert [device.run().outcome for _ in range(4)] == ["snoozed"] * 3 + ["completed"]


def test_short_aggregates_keep_65_seconds_between_calls_and_long_ones_do_not(
    fake: FakeAppsFlyer, device: Device
) -> None:
    first = device.run("daily_report", start_date=day(2))
    second = device.run("daily_report", start_date=day(1))
    assert first.outcome == "completed" and second.outcome == "snoozed" and 60 < (second.snooze_seconds or 0) <= 65
    assert len(fake.calls) == 1, "nobody asked in vain"
    other = device.run("daily_report", start_date=day(2), app_id="id1000000003")
    assert other.outcome == "completed", "another app has its own minute"
    assert [device.run("geo_report", start_date=day(5)).outcome for _ in range(2)] == ["completed"] * 2


# ---- the token ----


def test_a_refused_token_stops_the_devices_other_tasks_of_it_and_no_others(fake: FakeAppsFlyer, device: Device) -> None:
    first = device.run(username="old")
    assert (first.outcome, first.retry) == ("failed", False) and "credentials" in (first.error_message or "")
    asked = len(fake.calls)
    second = device.run("in_app_events_report", username="old", app_id="id1000000003")
    assert second.error_message == first.error_message and len(fake.calls) == asked
    assert device.run().outcome == "completed"


def test_the_token_is_in_no_outcome_no_log_and_no_new_task_even_if_the_server_repeats_it(
    fake: FakeAppsFlyer, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.fault(APP, "echo", "500", "revoked")
    for _ in range(3):
        device.run()
    device.run(app_id="id1000000003", start_date=day(60))
    device.run(username="old", app_id="id1000000003")
    assert any(TOKEN in call.authorization for call in fake.calls)
    told = caplog.text + "".join(json.dumps(outcome.as_report(1, "l")) for outcome in device.outcomes)
    assert TOKEN not in told and "0ld-token" not in told and "Bad request with Bearer ***" in told


def test_no_personal_cell_of_a_row_is_told_outside_the_file(
    fake: FakeAppsFlyer, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    device.run()
    told = caplog.text + json.dumps(device.outcomes[0].as_report(1, "l"))
    ids = {row[COLUMNS.index(name)] for row in device.rows() for name in ("AppsFlyer ID", "IP")}
    assert ids and not any(one in told for one in ids)


def test_every_report_and_field_is_in_the_documents() -> None:
    page = (Path(__file__).parent.parent / "docs" / "appsflyer.md").read_text(encoding="utf-8")
    for name in (*pull.REPORTS, *pull.FIELDS):
        assert f"`{name}`" in page, name
    for number in (pull.RAW_DAYS, pull.AGGREGATE_DAYS, pull.LOOKBACK_DAYS, pull.MAXIMUM_ROWS):
        assert f" {number}" in page, number


def test_apps_of_a_fake_are_what_the_tests_think(fake: FakeAppsFlyer) -> None:
    assert len(fake.apps) == 12 and fake.apps[1] == App(APP, "Ferry")
    assert fake.rows(APP, "installs_report", "2026-01-01") == fake.rows(APP, "installs_report", "2026-01-01")
