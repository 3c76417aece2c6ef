"""What the dashboard asks for, over real HTTP: charts, one device, one batch, what happened, the master itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from farm import Master, Program, wait_for
from test_api import problem, shaped
from world import World

import db
import openapi
import replies
from access import Who
from api import Api
from web import Call
from wire import Query

KEY = "correct-horse-battery-staple-of-a-test"
_numbers = iter(range(1, 10_000))


@pytest.fixture
def name() -> str:
    """A device, a task type or a batch of this test's own."""
    return f"view-{next(_numbers)}"


@pytest.fixture
def fail(master: Master, name: str) -> Callable[..., int]:
    """Lets one task of a batch fail with that message; its id."""
    master.register(name, task_types=[name])

    def run(message: str | None, batch: str = name) -> int:
        task_id = master.submit_one(name, batch=batch)
        [task] = master.pull(name)
        facts = {"error_message": message} if message is not None else {}
        assert (
            master.report(name, task, "failed", retry=False, error_type="HTTPError", **facts)["outcome"] == "accepted"
        )
        return task_id

    return run


def happened(master: Master, **filters: str) -> list[tuple[str, dict[str, Any]]]:
    """(verb, facts) of the history, newest first."""
    found = shaped(master.call("GET", "/events/history", params=filters), replies.HistoryOut)
    return [(event["verb"], event["facts"]) for event in found["events"]]


# -- charts ------------------------------------------------------------------------------------------------------


def test_what_was_done_comes_as_points_for_a_chart(master: Master, name: str, fail: Callable[..., int]) -> None:
    fail("no")
    for query in ("", f"&task_type={name}", f"&device_id={name}", f"&batch={name}"):
        for hours, step, count in ((1, 60, 60), (24, 900, 96)):
            found = shaped(master.get(f"/system/series?hours={hours}{query}"), replies.SeriesOut)
            assert found["step_seconds"] == step and len(found["points"]) == count
            assert sum(point["failed"] for point in found["points"]) >= 1
    assert master.get("/system/series") == master.get("/system/series?hours=1")
    problem(master.api("GET", "/system/series?batch=a&task_type=b"), 422, "invalid_field", "batch")


# -- devices -----------------------------------------------------------------------------------------------------


def test_a_device_has_a_view_with_its_heartbeats(master: Master, name: str) -> None:
    problem(master.api("GET", f"/devices/{name}"), 404, "unknown_device", "device_id")
    problem(master.api("GET", f"/devices/{name}/heartbeats"), 404, "unknown_device", "device_id")
    master.register(name)
    for seq in (1, 2, 3):
        master.beat(name, seq=seq, cpu_usage=10 * seq, active_tasks=seq)
    found = shaped(master.get(f"/devices/{name}"), replies.DeviceDetailOut)
    assert [(beat["cpu"], beat["active"]) for beat in found["beats"]] == [(10.0, 1), (20.0, 2), (30.0, 3)]
    assert (found["assigned_count"], found["max_concurrent_tasks"], found["one_at_a_time"]) == (0, 4, False)
    for hours in (1, 24):
        chart = shaped(master.get(f"/devices/{name}/heartbeats?hours={hours}"), replies.BeatsOut)
        assert 1 <= len(chart["points"]) <= 3 and chart["points"][-1]["active"] == 3


def test_devices_come_by_pages_with_their_newest_beats(master: Master, name: str) -> None:
    ids = [f"{name}-{n}" for n in range(5)]
    for device_id in ids:
        master.register(device_id, tags=[name])
        for seq in (1, 2, 3):
            master.beat(device_id, seq=seq, cpu_usage=seq)
    assert [device["device_id"] for device in master.get(f"/devices?tag={name}")["devices"]] == ids
    seen: list[str] = []
    cursor = ""
    while cursor is not None:
        page = shaped(master.get(f"/devices?tag={name}&limit=2&beats=2&cursor={cursor}"), replies.DevicesOut)
        assert all([beat["cpu"] for beat in device["beats"]] == [2.0, 3.0] for device in page["devices"])
        seen += [device["device_id"] for device in page["devices"]]
        cursor = page["next_cursor"]
    assert seen == ids


def test_a_name_that_a_person_gave_is_not_undone_by_the_worker(master: Master, name: str) -> None:
    master.register(name, device_name="of the worker")
    assert (
        shaped(master.call("PUT", f"/devices/{name}", {"device_name": "收银台"}), openapi.DeviceOut)["device_name"]
        == "收银台"
    )
    master.register(name, "boot-2", device_name="of the worker, again")
    assert master.get(f"/devices/{name}")["device_name"] == "收银台"
    given_back = master.call("PUT", f"/devices/{name}", {"device_name": None})
    assert given_back["device_name"] == "of the worker, again"
    problem(master.api("PUT", "/devices/nobody", {"device_name": "x"}), 404, "unknown_device")


def test_a_device_that_holds_tasks_is_not_removed(programs: list[Program], tmp_path: Any, name: str) -> None:
    """It is silent for long enough to be offline, but what it holds has not been taken back yet."""
    master = Master(tmp_path, heartbeat_interval=0.1, device_timeout=0.5, timeout_check_interval=3600)
    programs.append(master)
    master.register(name)
    master.submit_one()
    master.pull(name)
    wait_for("its silence", lambda: master.get(f"/devices/{name}")["status"] == "offline")
    problem(master.api("DELETE", f"/devices/{name}"), 409, "device_holds_tasks", "device_id")
    master.call("PUT", f"/devices/{name}/status", {"status": "disabled"})
    assert master.call("DELETE", f"/devices/{name}")["deleted"]


# -- batches and bulk actions ------------------------------------------------------------------------------------


def test_a_batch_has_a_view_with_its_rate(master: Master, name: str, fail: Callable[..., int]) -> None:
    batch = f"{name}/数据 1"
    path = "/batches/" + batch.replace("/", "%2F")
    problem(master.api("GET", path), 404, "unknown_batch", "name")
    problem(master.api("GET", f"{path}/failures"), 404, "unknown_batch", "name")
    fail("no", batch)
    master.submit_one("nobody", batch=batch)
    found = shaped(master.get(path), replies.BatchProgressOut)
    assert (found["name"], found["total"], found["failed_last_hour"]) == (batch, 2, 1)
    assert found["rate_per_second"] > 0 and found["eta_seconds"] > 0
    for query in (f"?name={batch}", "?limit=200"):
        listed = shaped(master.get(f"/batches{query}"), openapi.BatchesOut)["batches"]
        assert [one["rate_per_second"] > 0 for one in listed if one["name"] == batch] == [True]
    master.call("POST", f"{path}/pause", {"reason": "later"})
    found = master.get(path)
    assert (found["state"], found["reason"], found["eta_seconds"]) == ("paused", "later", None)


def test_a_group_of_failures_is_requeued_by_its_error(master: Master, name: str, fail: Callable[..., int]) -> None:
    strange = "no such page\n<script>alert('张')</script> %&+"
    ids = [fail(strange) for _ in range(3)]
    silent = fail(None)
    found = shaped(master.get(f"/batches/{name}/failures"), replies.FailuresOut)
    assert [(group["error_message"], group["n"], group["task_id"]) for group in found["groups"]] == [
        (strange, 3, ids[-1]),
        (None, 1, silent),
    ]
    listed = master.call("GET", "/tasks", params={"batch": name, "error": strange})["tasks"]
    assert sorted(task["id"] for task in listed) == ids
    filters = {"batch": name, "status": "failed", "error": strange}
    for dry_run, changed in ((True, 0), (False, 3)):
        body = {"action": "requeue", "filter": filters, "dry_run": dry_run}
        done = shaped(master.call("POST", "/tasks/actions", body), openapi.ActionOut)
        assert done == {"matched": 3, "matched_is_capped": False, "changed": changed}
    body = {"action": "requeue", "filter": {"batch": name, "error": ""}}
    assert (
        master.call("POST", "/tasks/actions", {**body, "filter": {**body["filter"], "status": "failed"}})["changed"]
        == 1
    )
    assert master.states(name) == {"pending": 4}
    done_by = [facts for verb, facts in happened(master, verb="bulk_requeue") if facts["filter"]["batch"] == name]
    assert [facts["changed"] for facts in done_by] == [1, 3]


@pytest.mark.parametrize(
    "field",
    ["status", "task_type", "device_id", "username", "app_id", "text", "created_after", "created_before", "parent_id"],
)
def test_a_bulk_action_takes_every_filter_of_the_list(master: Master, name: str, field: str) -> None:
    parent = master.submit_one("nobody", batch=f"{name}-parent")
    master.submit_one(name, batch=name, username="u", app_id="a", unique_key=f"{name}-key", parent_id=parent)
    if field == "device_id":
        master.register(name, task_types=[name])
        master.pull(name)
    values = {
        "status": "pending,scheduled", "task_type": name, "device_id": name, "username": "u", "app_id": "a",
        "text": f"{name}-k", "created_after": "2020-01-01T00:00:00Z", "created_before": "2100-01-01T00:00:00Z",
        "parent_id": parent,
    }  # fmt: skip
    chosen = {"batch": name, field: values[field]}
    listed = master.call("GET", "/tasks", params=chosen)["tasks"]
    body = {"action": "cancel", "filter": chosen, "reason": "a test"}
    assert master.call("POST", "/tasks/actions", {**body, "dry_run": True})["matched"] == len(listed) == 1
    assert master.call("POST", "/tasks/actions", body)["changed"] == 1
    assert master.states(name) == {"cancelled": 1}


def test_a_submission_can_be_tried_and_nothing_of_it_is_kept(master: Master, name: str) -> None:
    master.register(name, task_types=[name])
    known = master.submit_one(name, batch=name, unique_key="k")
    master.submit_one(name, batch=f"{name}-over")
    master.call("POST", f"/batches/{name}-over/cancel")
    before = master.states()
    tasks: list[Any] = [
        {"task_type": name, "batch": f"{name}-new"},
        {"task_type": name, "priority": 11},
        {},
        3,
        {"task_type": name, "batch": name, "unique_key": "k"},
        {"task_type": f"{name}-unknown"},
        {"task_type": name, "batch": f"{name}-over"},
        {"task_type": name, "batch": name, "max_batch_tasks": 1},
        {"task_type": name, "delay_seconds": 60},
    ]
    response = master.api("POST", "/tasks?dry_run=true", tasks)
    assert response.status_code == 200
    found = shaped(response.json(), replies.PreviewOut)["tasks"]
    assert [entry["index"] for entry in found] == list(range(len(tasks)))
    assert [entry["ok"] for entry in found] == [True, False, False, False, True, True, False, False, True]
    wrong = [(entry["problem"]["code"], entry["problem"]["field"]) for entry in found if not entry["ok"]]
    assert wrong == [
        ("invalid_field", "priority"), ("missing_field", "task_type"), ("invalid_field", None),
        ("batch_cancelled", "batch"), ("batch_full", "batch"),
    ]  # fmt: skip
    assert (found[0]["created"], found[0]["id"], found[0]["warning"]) == (True, None, None)
    assert (found[4]["created"], found[4]["id"]) == (False, known)
    assert f"{name}-unknown" in found[5]["warning"] and found[8]["status"] == "scheduled"
    assert master.states() == before
    problem(master.api("GET", f"/batches/{name}-new"), 404, "unknown_batch", "name")
    one = master.api("POST", "/tasks?dry_run=true", {"task_type": name}).json()
    assert [entry["ok"] for entry in one["tasks"]] == [True]
    problem(master.api("POST", "/tasks?dryrun=true", {"task_type": name}), 422, "unknown_field", "dryrun")
    assert master.states() == before


def test_an_id_that_was_only_rehearsed_is_never_told_as_another_tasks(world: World) -> None:
    somebody = SimpleNamespace(highest_id=world.submit)  # who submits while the rehearsal goes on
    api = SimpleNamespace(store=world.store, reads=somebody, fleet=SimpleNamespace(task_types=dict))
    twice = b'[{"task_type": "echo", "unique_key": "k"}, {"task_type": "echo", "unique_key": "k"}]'
    found = Api._preview(api, Call(twice, Query(""), {}, Who("", None, None, None, "open", ""), {}, {}))  # type: ignore[arg-type]
    assert [entry["id"] for entry in found["tasks"]] == [None, None]


# -- what happened -----------------------------------------------------------------------------------------------


def test_what_people_do_is_kept_and_told_live_with_its_id(master: Master, name: str) -> None:
    with master.api("GET", "/events", stream=True) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        assert next(lines) == ": hello"
        master.register(name)
        master.call("PUT", f"/devices/{name}/status", {"status": "draining", "reason": "new disk"})
        master.submit_one("nobody", batch=name)
        master.call("POST", f"/batches/{name}/pause", {"reason": "later"})
        master.call("PUT", "/strategy", {"strategy": "least_tasks"})
        newest = master.get("/events/history?limit=1")["events"][0]["id"]
        live: set[int] = set()
        for line in lines:
            live |= {int(found) for found in re.findall(r'"history_id": (\d+)', line)}
            if newest in live:
                break
    assert happened(master, device_id=name) == [
        ("device_wanted", {"device": name, "status": "draining", "reason": "new disk"}),
        ("device_registered", {"device": name, "address": "127.0.0.1"}),
    ]
    assert ("batch_paused", {"batch": name, "reason": "later"}) in happened(master, kind="batch")
    assert happened(master, kind="system")[0][0] == "strategy"
    kept = {event["id"] for event in master.get("/events/history?limit=4")["events"]}
    assert kept <= live


def test_starts_stops_and_logins_are_kept(programs: list[Program], tmp_path: Any) -> None:
    master = Master(tmp_path, api_key=KEY)
    programs.append(master)
    assert master.session.post(f"{master.url}/api/distribution/login", json={"key": "wrong"}).status_code == 401
    assert master.session.post(f"{master.url}/api/distribution/login", json={"key": "wrong"}).status_code == 401
    assert master.session.post(f"{master.url}/api/distribution/login", json={"key": KEY}).status_code == 204
    assert master.stop() == 0
    master.start()
    verbs = [verb for verb, _ in happened(master)]
    assert [verb for verb in verbs if verb != "limits"] == [
        "master_started", "master_stopped", "login", "login_failed", "master_started",
    ]  # fmt: skip
    assert KEY not in str(master.get("/events/history"))


# -- the master itself -------------------------------------------------------------------------------------------


def test_the_master_tells_of_itself_and_no_secret(programs: list[Program], tmp_path: Any) -> None:
    master = Master(tmp_path, api_key=KEY)
    programs.append(master)
    master.register("shop-1")
    master.submit_one()
    text = master.api("GET", "/system").text
    assert KEY not in text and str(tmp_path) not in text
    found = shaped(master.get("/system"), replies.SystemOut)
    assert found["settings"]["api_key"] == "set" and found["settings"]["retention_days"] == 30
    assert found["states"] == list(db.STATES)
    assert {entry["verb"]: (entry["from"], entry["to"]) for entry in found["transitions"]} == {
        verb: (list(old), list(new)) for verb, (old, new) in db.TRANSITIONS.items()
    }
    assert found["task_types"] == [{"task_type": "echo", "devices": 1, "online": 1}]
    assert found["database"]["file"] == "distribution.db" and found["database"]["tasks"] == 1
    assert found["writer"]["commits"] > 0 and found["http"]["request_ms"]["p50"] > 0


def test_the_overview_says_what_needs_a_person(programs: list[Program], tmp_path: Any) -> None:
    master = Master(tmp_path, device_timeout=600)
    programs.append(master)
    assert shaped(master.get("/system/overview"), replies.OverviewOut)["attention"] == []
    master.register("shop-1")
    master.beat("shop-1", problem="spool_full")
    for _ in range(10):
        master.submit_one(max_retry_count=0)
    for task in master.pull("shop-1", 4) + master.pull("shop-1", 4) + master.pull("shop-1", 1):
        master.report("shop-1", task, "failed", retry=False)
    for boot in ("boot-1", "boot-2", "boot-3", "boot-4"):
        master.api(
            "POST", "/devices/register", {"device_id": "fought-over", "boot_id": boot, "protocol": 1, "task_types": []}
        )
    master.call("POST", "/task-types/crawl/pause", {"reason": "later"})
    overview = shaped(master.get("/system/overview"), replies.OverviewOut)
    found = {item["kind"]: (item["n"], item["ids"]) for item in overview["attention"]}
    assert found["device_conflict"] == (1, ["fought-over"]) and found["black_hole"] == (1, ["shop-1"])
    assert found["paused"] == (1, ["crawl"])
    assert overview["rates"]["failed_last_day"] == 9
