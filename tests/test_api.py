"""What can be asked over HTTP? Every route of the table, asked of one real master over real HTTP."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import requests
from farm import Master, Program, wait_for

import access
import api
import export
import openapi
import reads
import replies
import settings

PREFIX = "/api/distribution"
KEY = "correct-horse-battery-staple-of-a-test"
CHINESE = "数据/同步 a%2Fb?x=1#y"
PUBLIC = {"GET /session", "POST /login", "POST /logout", "GET /", "GET /static/{file}", "GET /healthz", "GET /readyz"}
PUBLIC |= {"GET /edge/worker.pyz", "GET /edge/worker.pyz.sha256"}  # no secret in it, and no key on a command line


class NoHandlers:
    def __getattr__(self, name: str) -> str:
        return name


def table() -> list[tuple[str, openapi.Operation, str]]:
    """(prefix, operation, the handler's name) of every route."""
    routes = api.routes(NoHandlers())  # type: ignore[arg-type]
    return [(prefix, route.operation, str(route.handler)) for prefix, rows in routes for route in rows]


def shaped(reply: Any, type_: Any) -> Any:
    """The reply, if it is exactly as the document says: nothing missing, nothing of another type, nothing more."""
    read = msgspec.convert(reply, type_)
    assert msgspec.to_builtins(read) == reply, "the reply has more than its documented shape"
    return reply


def problem(response: requests.Response, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """The error, if it is this one, told as every error is."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    found: dict[str, Any] = shaped(response.json(), openapi.Problem)
    assert (found["status"], found["code"], found.get("field")) == (status, code, field), found
    return found


_numbers = iter(range(1, 10_000))


@pytest.fixture
def batch() -> str:
    """A batch of this test's own."""
    return f"batch-{next(_numbers)}"


@pytest.fixture
def device(master: Master) -> str:
    """A device of this test's own, which runs tasks of a type of its own name, and echo."""
    device_id = f"shop-{next(_numbers)}"
    master.register(device_id, task_types=[device_id])
    return device_id


# -- the table itself --------------------------------------------------------------------------------------------


def test_every_route_declares_a_role_that_access_knows() -> None:
    assert all(access.holders(operation.role) for _, operation, _ in table())


def test_no_route_is_public_but_the_login_the_health_checks_and_the_page() -> None:
    public = {f"{operation.method} {operation.path}" for _, operation, _ in table() if operation.role == access.PUBLIC}
    assert public == PUBLIC


def test_every_handler_of_the_table_exists() -> None:
    assert [name for _, _, name in table() if not callable(getattr(api.Api, name, None))] == []


def test_the_document_of_the_api_lists_every_route(master: Master) -> None:
    document = master.get("/openapi.json")
    for prefix, operation, _ in table():
        if prefix:
            assert document["paths"][prefix + operation.path][operation.method.lower()]["x-role"] == operation.role


def test_unknown_paths_and_methods_are_problems_too(master: Master) -> None:
    problem(master.api("GET", "/nothing"), 404, "not_found")
    response = master.api("PATCH", "/tasks", {})
    problem(response, 405, "method_not_allowed")
    assert {"GET", "POST"} <= set(response.headers["Allow"].split(","))
    problem(master.session.get(master.url + "/favicon"), 404, "not_found")
    problem(master.session.get(master.url + "/static/no.js"), 404, "not_found")
    problem(master.api("OPTIONS", "/tasks"), 405, "method_not_allowed")


# -- submit ------------------------------------------------------------------------------------------------------


def test_one_task_comes_back_as_one_object_and_a_list_as_a_list(master: Master, batch: str) -> None:
    one = master.api("POST", "/tasks", {"task_type": "nobody", "batch": batch})
    assert one.status_code == 201
    shaped(one.json(), openapi.SubmittedOut)
    for body in ([{"task_type": "nobody"}], {"tasks": [{"task_type": "nobody"}]}):
        many = master.api("POST", "/tasks", body)
        assert many.status_code == 201
        shaped(many.json(), openapi.SubmittedListOut)
    assert master.api("POST", "/tasks", []).json() == {"tasks": []}


def test_ids_come_in_the_order_of_the_list(master: Master, batch: str) -> None:
    ids = master.submit(*({"task_type": "nobody", "batch": batch, "username": f"u{n}"} for n in range(300)))
    assert ids == sorted(ids) and len(set(ids)) == 300
    named = {task["id"]: task["username"] for task in pages(master, batch=batch)}
    assert [named[task_id] for task_id in ids] == [f"u{n}" for n in range(300)]


def test_a_known_key_answers_with_the_task_that_has_it(master: Master, batch: str) -> None:
    task = {"task_type": "nobody", "batch": batch, "unique_key": "k"}
    first = master.api("POST", "/tasks", task)
    again = master.api("POST", "/tasks", task)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == {**first.json(), "created": False}
    mixed = master.api("POST", "/tasks", [task, {**task, "unique_key": "l"}, {**task, "unique_key": "l"}])
    assert mixed.status_code == 201
    assert [entry["created"] for entry in mixed.json()["tasks"]] == [False, True, False]
    assert mixed.json()["tasks"][1]["id"] == mixed.json()["tasks"][2]["id"]
    elsewhere = master.api("POST", "/tasks", {**task, "batch": batch + "-b"})
    assert elsewhere.status_code == 201 and elsewhere.json()["id"] != first.json()["id"]


def test_a_batch_takes_no_more_than_its_limit(master: Master, batch: str) -> None:
    task = {"task_type": "nobody", "batch": batch, "max_batch_tasks": 1}
    reply = master.call("POST", "/tasks", [task, task])
    assert [entry["status"] for entry in reply["tasks"]] == ["pending", "batch_full"]
    assert reply["tasks"][1]["id"] is None
    shaped(reply, openapi.SubmittedListOut)


def test_a_task_for_later_waits_for_its_time(master: Master) -> None:
    task_id = master.submit_one("nobody", delay_seconds=3600)
    assert master.get(f"/tasks/{task_id}")["status"] == "scheduled"


@pytest.mark.parametrize("run_at", ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"])
def test_a_time_at_the_end_of_the_calendar_breaks_no_list(master: Master, batch: str, run_at: str) -> None:
    response = master.api("POST", "/tasks", {"task_type": "nobody", "batch": batch, "run_at": run_at})
    assert response.status_code in (201, 422), response.text
    assert len(master.get(f"/tasks?batch={batch}")["tasks"]) == (response.status_code == 201)
    assert master.api("GET", f"/tasks?created_after={quote(run_at)}").status_code in (200, 422)


# -- lists, filters, export --------------------------------------------------------------------------------------


def pages(master: Master, limit: int = 7, **filters: Any) -> list[dict[str, Any]]:
    """All tasks of a list, page by page."""
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        query = {**filters, "limit": limit, "cursor": cursor}
        page = shaped(master.call("GET", "/tasks", params=query), openapi.TaskPageOut)
        assert len(page["tasks"]) <= limit
        found += page["tasks"]
        cursor = page["next_cursor"]
    return found


@pytest.mark.parametrize("limit", [1, 7, 50, 51])
def test_pages_show_every_task_once_newest_first_while_others_come_in(master: Master, batch: str, limit: int) -> None:
    ids = master.submit(*({"task_type": "nobody", "batch": batch} for _ in range(50)))
    first = master.call("GET", "/tasks", params={"batch": batch, "limit": limit})
    master.submit({"task_type": "nobody", "batch": batch})
    found = [task["id"] for task in first["tasks"]]
    cursor = first["next_cursor"]
    while cursor is not None:
        page = master.call("GET", "/tasks", params={"batch": batch, "limit": limit, "cursor": cursor})
        found += [task["id"] for task in page["tasks"]]
        cursor = page["next_cursor"]
    assert found == ids[::-1]


def test_the_list_without_a_filter_reaches_the_very_first_task(master: Master) -> None:
    master.submit_one("nobody")
    ids = [task["id"] for task in pages(master, limit=200)]
    assert ids == sorted(ids, reverse=True) and ids[-1] == 1 and len(set(ids)) == len(ids)


def test_each_filter_finds_its_tasks_and_no_other(master: Master, batch: str, device: str) -> None:
    plain = {"task_type": "nobody", "batch": batch}
    kinds = {
        "username": {**plain, "username": "王小明"},
        "app_id": {**plain, "app_id": "com.example.app"},
        "task_type": {**plain, "task_type": f"type-{device}"},
        "text": {**plain, "unique_key": "https://example.org/a"},
        "parent_id": {**plain, "parent_id": 1},
        "scheduled": {**plain, "delay_seconds": 100},
        "device_id": {**plain, "task_type": device},
    }
    ids = dict(zip(kinds, master.submit(*kinds.values())))
    master.pull(device)
    asked = {
        "username": {"username": "王小明"},
        "app_id": {"app_id": "com.example.app"},
        "task_type": {"task_type": f"type-{device}"},
        "text": {"text": "https://example.org/"},
        "parent_id": {"parent_id": "1"},
        "scheduled": {"status": "scheduled"},
        "device_id": {"device_id": device, "status": "assigned,running"},
    }
    for name, query in asked.items():
        assert [task["id"] for task in pages(master, batch=batch, **query)] == [ids[name]], name
    first_at = min(task["created_at"] for task in pages(master, batch=batch))
    assert len(pages(master, batch=batch, created_after=first_at, created_before="2999-01-01T00:00:00Z")) == len(ids)
    assert pages(master, batch=batch, created_before="2001-01-01T00:00:00Z") == []
    assert pages(master, batch=batch + "x") == []


def finished(master: Master, device: str, batch: str) -> list[int]:
    """Two tasks, one completed with a result, and texts that a spreadsheet would take for formulas."""
    ids = master.submit(
        {"task_type": device, "batch": batch, "username": '=HYPERLINK("x")', "priority": 9},
        {"task_type": "nobody", "batch": batch, "username": '-1,"a"', "app_id": "@x", "unique_key": "+1"},
    )
    master.report(device, master.pull(device)[0], "completed", result={"页": [1, "=2"]}, duration_seconds=0.5)
    return ids


def test_the_jsonl_export_is_complete_and_says_so(master: Master, device: str, batch: str) -> None:
    ids = finished(master, device, batch)
    response = master.api("GET", "/tasks/export", params={"batch": batch, "include": "result"})
    assert response.headers["Content-Type"] == "application/x-ndjson"
    *rows, end = map(json.loads, response.content.decode().splitlines())
    assert end == {"end": True, "rows": 2}
    assert [row["id"] for row in rows] == ids
    assert [row.pop("result") for row in rows] == [{"页": [1, "=2"]}, None]
    for row in rows:
        shaped(row, openapi.TaskOut)


def test_the_csv_export_is_complete_and_holds_no_formula(master: Master, device: str, batch: str) -> None:
    finished(master, device, batch)
    query = {"batch": batch, "include": "result", "format": "csv"}
    response = master.api("GET", "/tasks/export", params=query)
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    text = response.content.decode()
    body, _, end = text.rstrip("\r\n").rpartition("\r\n")
    assert end == "# end rows=2"
    rows = list(csv.DictReader(io.StringIO(body)))
    assert [row["username"] for row in rows] == ['\'=HYPERLINK("x")', '\'-1,"a"']
    assert (rows[1]["app_id"], rows[1]["unique_key"]) == ("'@x", "'+1")
    assert json.loads(rows[0]["result"]) == {"页": [1, "=2"]}
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]


def test_an_export_of_nothing_is_whole_too(master: Master) -> None:
    assert master.api("GET", "/tasks/export?batch=none").text == '{"end":true,"rows":0}\n'


# -- actions, batches, strategy ----------------------------------------------------------------------------------


def test_a_dry_run_counts_and_the_action_changes_what_it_counted(master: Master, batch: str) -> None:
    ids = master.submit(*({"task_type": "nobody", "batch": batch} for _ in range(2500)))
    other = master.submit_one("nobody", batch=batch + "-other")
    action = {"action": "cancel", "filter": {"batch": batch}, "reason": "wrong dates"}
    dry = shaped(master.call("POST", "/tasks/actions", {**action, "dry_run": True}), openapi.ActionOut)
    assert dry == {"matched": 2500, "matched_is_capped": False, "changed": 0}
    assert master.states(batch) == {"pending": 2500}
    assert master.call("POST", "/tasks/actions", action) == {**dry, "changed": 2500}
    assert master.states(batch) == {"cancelled": 2500}
    assert master.get(f"/tasks/{ids[0]}")["status"] == "cancelled"
    assert master.get(f"/tasks/{other}")["status"] == "pending"
    back = master.call(
        "POST", "/tasks/actions", {"action": "requeue", "filter": {"batch": batch, "status": "cancelled"}}
    )
    assert back["changed"] == 2500 and master.states(batch) == {"pending": 2500}


def test_an_action_needs_a_filter(master: Master) -> None:
    problem(master.api("POST", "/tasks/actions", {"action": "cancel"}), 422, "missing_field", "filter")


@pytest.mark.parametrize("name", ["plain", CHINESE, "a/pause", "/leading", "trailing/"])
def test_a_batch_is_paused_resumed_and_cancelled_whatever_its_name(master: Master, device: str, name: str) -> None:
    name = f"{name}{device}" if not name.endswith("/") else f"{device}{name}"
    master.submit({"task_type": device, "batch": name}, {"task_type": device, "batch": name})
    path = f"/batches/{quote(name, safe='')}"
    paused = shaped(master.call("POST", f"{path}/pause", {"reason": "周末"}), openapi.BatchChangedOut)
    assert paused == {"name": name, "state": "paused", "changed": 0}
    query = {"device_id": device, "boot_id": "boot-1", "limit": 1}
    assert master.call("GET", "/tasks/pull", params=query)["tasks"] == []
    task_id = pages(master, batch=name)[0]["id"]
    assert shaped(master.get(f"/tasks/{task_id}/why"), openapi.WhyOut)["reason"] == "batch_paused"
    [found] = shaped(master.call("GET", "/batches", params={"name": name}), openapi.BatchesOut)["batches"]
    assert (found["state"], found["reason"], found["counts"]["pending"]) == ("paused", "周末", 2)
    assert master.call("POST", f"{path}/resume")["state"] == "open"
    assert len(master.pull(device)) == 1
    assert master.call("POST", f"{path}/cancel", {}) == {"name": name, "state": "cancelled", "changed": 2}
    refused = master.api("POST", "/tasks", {"task_type": "nobody", "batch": name})
    problem(refused, 409, "batch_cancelled", "batch")


def test_batches_come_newest_first_in_pages(master: Master, device: str) -> None:
    names = [f"{device}-{n}" for n in range(5)]
    for name in names:
        master.submit_one("nobody", batch=name)
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = shaped(master.call("GET", "/batches", params={"limit": 2, "cursor": cursor}), openapi.BatchesOut)
        found += [entry["name"] for entry in page["batches"]]
        cursor = page["next_cursor"]
    assert found[:5] == names[::-1] and len(found) == len(set(found))


def test_an_unknown_batch_is_404(master: Master) -> None:
    for verb in ("pause", "resume", "cancel"):
        problem(master.api("POST", f"/batches/none/{verb}", {}), 404, "unknown_batch", "name")
    assert master.get("/batches?name=none") == {"batches": [], "next_cursor": None}


def test_the_strategy_is_switched_by_name_and_loads_no_code(master: Master) -> None:
    before = shaped(master.get("/strategy"), openapi.StrategyOut)
    assert before["strategy"] == "least_tasks"
    for name in (*before["available"], "least_tasks"):
        assert shaped(master.call("PUT", "/strategy", {"strategy": name}), openapi.StrategyOut)["strategy"] == name
        assert master.get("/system/overview")["strategy"] == name
    problem(master.api("PUT", "/strategy", {"strategy": "os:getcwd"}), 422, "invalid_field", "strategy")
    assert master.get("/strategy") == before


# -- one task: look, why, assign, cancel, requeue ----------------------------------------------------------------


def test_a_task_is_shown_with_all_that_belongs_to_it(master: Master, device: str, batch: str) -> None:
    data = {"深": {"x": [1, 2.5, None, True, "\u0007"]}, "n": 2**63 - 1}
    task_id = master.submit_one(device, batch=batch, task_data=data, start_date="2026-01-01", end_date="2026-01-31")
    waiting = shaped(master.get(f"/tasks/{task_id}"), openapi.TaskDetailOut)
    assert waiting["task_data"] == data and waiting["waiting"]["reason"] and waiting["attempts"] == []
    [task] = master.pull(device)
    assert task["task_data"] == data
    master.report(device, task, "completed", result={"n": 1}, log_tail="said\n", duration_seconds=0.25)
    done = shaped(master.get(f"/tasks/{task_id}"), openapi.TaskDetailOut)
    assert (done["status"], done["result"], done["waiting"]) == ("completed", {"n": 1}, None)
    [attempt] = done["attempts"]
    assert (attempt["device_id"], attempt["log_tail"], attempt["duration_seconds"]) == (device, "said\n", 0.25)
    assert "lease" not in json.dumps(done)


def test_why_names_what_keeps_each_device_from_the_task(master: Master, device: str) -> None:
    task_id = master.submit_one("nobody")
    why = shaped(master.get(f"/tasks/{task_id}/why"), openapi.WhyOut)
    assert why["status"] == "pending" and why["detail"] and why["next_look_seconds"] == 10
    assert next(entry for entry in why["devices"] if entry["device_id"] == device)["excluded_because"]


def test_a_waiting_task_is_assigned_to_a_device_that_is_there(master: Master, device: str) -> None:
    other = device + "-b"
    master.register(other, task_types=[device])
    task_id = master.submit_one(device)
    reply = shaped(master.call("PUT", f"/tasks/{task_id}/assign", {"device_id": other}), openapi.ChangedOut)
    assert reply == {"id": task_id, "status": "pending"}
    query = {"device_id": device, "boot_id": "boot-1", "limit": 5}
    assert master.call("GET", "/tasks/pull", params=query)["tasks"] == []
    assert [task["id"] for task in master.pull(other)] == [task_id]
    problem(master.api("PUT", f"/tasks/{task_id}/assign", {"device_id": other}), 409, "not_waiting", "task_id")


def test_a_task_is_not_assigned_where_it_cannot_go(master: Master, device: str) -> None:
    task_id = master.submit_one(device)
    put = f"/tasks/{task_id}/assign"
    problem(master.api("PUT", put, {"device_id": "no-such"}), 404, "unknown_device", "device_id")
    master.register("elsewhere", task_types=["other"])
    problem(master.api("PUT", put, {"device_id": "elsewhere"}), 409, "device_unfit", "device_id")
    master.beat(device, leaving=True)
    problem(master.api("PUT", put, {"device_id": device}), 409, "device_unavailable", "device_id")
    assert master.get(f"/tasks/{task_id}")["pinned_device_id"] is None


def test_a_device_is_as_its_last_beat_said_the_moment_that_it_is_answered(master: Master, device: str) -> None:
    before = ""
    for seq in range(1, 6):
        master.beat(device, seq=seq, cpu_usage=seq)
        shown = master.get(f"/devices/{device}")
        listed = next(entry for entry in master.get("/devices")["devices"] if entry["device_id"] == device)
        assert shown["cpu_usage"] == listed["cpu_usage"] == seq
        assert before < shown["last_heartbeat_at"] == listed["last_heartbeat_at"]
        assert len(master.get(f"/devices/{device}/stats")["heartbeats"]) == seq
        before = shown["last_heartbeat_at"]


def test_a_task_is_cancelled_once_and_requeued_by_a_person(master: Master, device: str) -> None:
    task_id = master.submit_one(device)
    problem(master.api("POST", f"/tasks/{task_id}/requeue", {}), 409, "not_final")
    first = shaped(master.call("POST", f"/tasks/{task_id}/cancel", {"reason": "no"}), openapi.StatusOut)
    assert first == {"id": task_id, "outcome": "accepted", "status": "cancelled"}
    assert master.call("POST", f"/tasks/{task_id}/cancel")["outcome"] == "duplicate"
    again = shaped(master.call("POST", f"/tasks/{task_id}/requeue", {}), openapi.ChangedOut)
    assert again == {"id": task_id, "status": "pending"}
    master.report(device, master.pull(device)[0], "completed")
    problem(master.api("POST", f"/tasks/{task_id}/cancel"), 409, "already_final")


@pytest.mark.parametrize("path", ["", "/why"])
def test_an_unknown_task_is_404(master: Master, path: str) -> None:
    problem(master.api("GET", f"/tasks/999999999{path}"), 404, "unknown_task", "task_id")


# -- devices -----------------------------------------------------------------------------------------------------


def test_a_device_registers_beats_is_listed_and_goes(master: Master) -> None:
    device_id = f"shop-{next(_numbers)}"
    first = shaped(master.register(device_id, tags=["t"], device_name="收银台"), openapi.RegisterOut)
    assert first["created"] and not master.register(device_id)["created"]
    master.register(device_id, tags=["t"], device_name="收银台")
    info = {"os": "Linux"}
    facts = {"problem": "spool_full", "clock": time.time() - 3600}
    beat = master.beat(
        device_id, cpu_usage=12.5, memory_usage=50, disk_usage=1, active_tasks=0, system_info=info, **facts
    )
    assert shaped(beat, openapi.HeartbeatOut) == {"cancel": [], "drain": False, "next_seconds": 30.0}
    listed = shaped(master.get("/devices?tag=t&status=online"), replies.DevicesOut)["devices"]
    found = next(entry for entry in listed if entry["device_id"] == device_id)
    assert (found["device_name"], found["cpu_usage"], found["system_info"]) == ("收银台", 12.5, info)
    assert found["ip_address"] == "127.0.0.1"
    assert found["problem"] == "spool_full" and -3605 < found["clock_skew_seconds"] < -3595
    stats = shaped(master.get(f"/devices/{device_id}/stats"), openapi.DeviceStatsOut)
    assert len(stats["heartbeats"]) == 1 and len(stats["last_hour"]) == 60
    problem(master.api("DELETE", f"/devices/{device_id}"), 409, "device_online", "device_id")
    master.beat(device_id, seq=2, leaving=True)
    assert master.call("DELETE", f"/devices/{device_id}") == {"device_id": device_id, "deleted": True}
    problem(master.api("GET", f"/devices/{device_id}/stats"), 404, "unknown_device", "device_id")


def test_a_person_drains_and_disables_a_device(master: Master, device: str) -> None:
    [task_id] = master.submit({"task_type": device})
    [task] = master.pull(device)
    drained = master.call("PUT", f"/devices/{device}/status", {"status": "draining", "reason": "update"})
    assert (shaped(drained, openapi.DeviceOut)["status"], drained["wanted_reason"]) == ("draining", "update")
    assert master.beat(device)["drain"] is True
    disabled = master.call("PUT", f"/devices/{device}/status", {"status": "disabled"})
    assert disabled["status"] == "disabled"
    assert master.get(f"/tasks/{task_id}")["status"] == "pending"
    query = {"device_id": device, "boot_id": "boot-1", "limit": 0, "wait": 20}
    told = shaped(master.call("GET", "/tasks/pull", params=query), openapi.PullOut)
    assert (told["cancel"], told["drain"]) == ([task["assignment_id"]], True)
    assert master.call("PUT", f"/devices/{device}/status", {"status": "active"})["status"] == "online"


def test_a_replaced_process_and_a_stranger_are_told_apart(master: Master, device: str) -> None:
    master.register(device, "boot-2")
    query = f"/tasks/pull?device_id={device}&boot_id=boot-1"
    problem(master.api("GET", query), 409, "superseded")
    body = {"boot_id": "boot-1", "seq": 9, "holding": []}
    problem(master.api("POST", f"/devices/{device}/heartbeat", body), 409, "superseded")
    problem(master.api("GET", "/tasks/pull?device_id=stranger&boot_id=b"), 404, "unknown_device")
    problem(master.api("POST", "/devices/stranger/heartbeat", body), 404, "unknown_device")
    problem(master.api("PUT", "/devices/stranger/status", {"status": "active"}), 404, "unknown_device")
    problem(master.api("DELETE", "/devices/stranger"), 404, "unknown_device", "device_id")


def test_three_processes_that_fight_over_an_id_are_stopped_until_a_person_decides(master: Master, device: str) -> None:
    for n in (2, 3):
        master.register(device, f"boot-{n}")
    body = {"device_id": device, "boot_id": "boot-4", "protocol": 1, "task_types": []}
    problem(master.api("POST", "/devices/register", body), 409, "conflict")
    problem(master.api("GET", f"/tasks/pull?device_id={device}&boot_id=boot-3"), 409, "conflict")
    assert device in [entry["device_id"] for entry in master.get("/devices?status=conflict")["devices"]]
    master.call("PUT", f"/devices/{device}/status", {"status": "active"})
    assert master.register(device, "boot-4")["status"] == "online"


def test_a_device_that_is_too_old_is_told_to_upgrade(master: Master) -> None:
    body = {"device_id": "old", "boot_id": "b", "protocol": 0, "task_types": []}
    found = problem(master.api("POST", "/devices/register", body), 426, "protocol_too_old")
    assert "worker.py" in found["detail"]


def test_a_pull_is_held_until_there_is_something(master: Master, device: str) -> None:
    replies: list[Any] = []
    query = {"device_id": device, "boot_id": "boot-1", "limit": 2, "wait": 20}
    url = f"{master.url}{PREFIX}/tasks/pull"
    pull = threading.Thread(target=lambda: replies.append(requests.get(url, params=query, timeout=60).json()))
    pull.start()
    wait_for("the pull to be held", lambda: master.get("/system/overview")["held_polls"] == 1)
    task_id = master.submit_one(device, priority=7)
    pull.join(60)
    [task] = shaped(replies[0], openapi.PullOut)["tasks"]
    assert (task["id"], task["priority"], task["attempt"]) == (task_id, 7, 1)


# -- reports -----------------------------------------------------------------------------------------------------


def test_one_invalid_report_among_good_ones_blocks_none_of_them(master: Master, device: str, batch: str) -> None:
    master.submit(*({"task_type": device, "batch": batch} for _ in range(3)))
    first, second, third = master.pull(device, 3)

    def entry(task: dict[str, Any], **facts: Any) -> dict[str, Any]:
        return {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "outcome": "completed", **facts}

    child = {"task_type": "nobody", "batch": batch, "unique_key": "child"}
    reports = [
        entry(first, new_tasks=[child, child]),
        entry(second, result=[1]),
        entry(third, lease_id="wrong"),
        entry(third),
        entry(third),
        {**entry(third), "assignment_id": 10**12},
    ]
    reply = master.call("POST", "/tasks/report", {"device_id": device, "boot_id": "boot-1", "reports": reports})
    answers = shaped(reply, openapi.ReportsOut)["reports"]
    outcomes = [answer["outcome"] for answer in answers]
    assert outcomes == ["accepted", "invalid", "stale", "accepted", "duplicate", "gone"]
    assert answers[1]["field"] == "result" and answers[1]["assignment_id"] == second["assignment_id"]
    assert [new["created"] for new in answers[0]["new_tasks"]] == [True, False]
    assert master.states(batch) == {"completed": 2, "assigned": 1, "pending": 1}
    assert master.get(f"/tasks/{first['id']}")["children_count"] == 0


def test_a_failed_task_is_tried_again_and_a_hopeless_one_is_not(master: Master, device: str) -> None:
    ids = master.submit({"task_type": device}, {"task_type": device}, {"task_type": device})
    one, two, three = master.pull(device, 3)
    master.report(device, one, "failed", error_message="timeout", retry_after_seconds=500)
    master.report(device, two, "failed", retry=False, error_type="HTTPError", error_message="404")
    master.report(device, three, "snoozed", snooze_seconds=100, reason="not ready")
    states = [master.get(f"/tasks/{task_id}") for task_id in ids]
    assert [task["status"] for task in states] == ["scheduled", "failed", "scheduled"]
    assert [task["retry_count"] for task in states] == [1, 0, 0]
    assert states[1]["error_message"] == "404"


def test_a_simple_client_moves_its_task_by_its_status(master: Master, device: str) -> None:
    task_id = master.submit_one(device)
    put = f"/tasks/{task_id}/status"
    problem(master.api("PUT", put, {"status": "running", "lease_id": "x"}), 409, "stale", "lease_id")
    [task] = master.pull(device)
    lease = {"lease_id": task["lease_id"]}
    problem(master.api("PUT", put, {"status": "running", "lease_id": "wrong"}), 409, "stale", "lease_id")
    problem(master.api("PUT", put, {"status": "completed"}), 422, "invalid_field", "lease_id")
    running = shaped(master.call("PUT", put, {"status": "running", **lease}), openapi.StatusOut)
    assert running == {"id": task_id, "outcome": "accepted", "status": "running"}
    done = master.call("PUT", put, {"status": "completed", "result": {"n": 1}, **lease})
    assert done == {"id": task_id, "outcome": "accepted", "status": "completed"}
    assert master.call("PUT", put, {"status": "completed", **lease})["outcome"] == "duplicate"
    assert master.get(f"/tasks/{task_id}")["result"] == {"n": 1}


def test_a_simple_client_reports_an_error_and_hears_of_a_cancel(master: Master, device: str) -> None:
    failing, cancelled, operated = master.submit(*({"task_type": device, "max_retry_count": 0} for _ in range(3)))
    tasks = {task["id"]: task for task in master.pull(device, 3)}
    body = {"status": "failed", "error_message": "it broke", "lease_id": tasks[failing]["lease_id"]}
    assert master.call("PUT", f"/tasks/{failing}/status", body)["status"] == "failed"
    master.call("POST", f"/tasks/{cancelled}/cancel")
    late = {"status": "completed", "lease_id": tasks[cancelled]["lease_id"]}
    problem(master.api("PUT", f"/tasks/{cancelled}/status", late), 410, "gone", "lease_id")
    assert master.call("PUT", f"/tasks/{operated}/status", {"status": "cancelled"})["status"] == "cancelled"
    strange = {**late, "assignment_id": tasks[failing]["assignment_id"]}
    problem(master.api("PUT", f"/tasks/{operated}/status", strange), 410, "gone", "lease_id")
    problem(master.api("PUT", "/tasks/999999999/status", late), 404, "unknown_task", "task_id")
    problem(master.api("PUT", "/tasks/999999999/status", {"status": "cancelled"}), 404, "unknown_task", "task_id")


# -- the system --------------------------------------------------------------------------------------------------


def test_overview_and_stats_count_what_there_is(master: Master, device: str, batch: str) -> None:
    finished(master, device, batch)
    overview = shaped(master.get("/system/overview"), replies.OverviewOut)
    assert overview["mode"] == "master" and overview["oldest_waiting"]["reason"]
    assert sum(overview["tasks"].values()) == len(pages(master, limit=200))
    assert overview["rates"]["completed_last_hour"] >= 1
    stats = shaped(master.get("/tasks/stats"), openapi.TasksStatsOut)
    assert stats["by_state"] == overview["tasks"]
    assert stats["by_device"][device]["completed"] == 1
    narrow = shaped(master.get(f"/tasks/stats?batch={batch}"), openapi.TasksStatsOut)
    assert (narrow["by_state"]["completed"], narrow["by_state"]["pending"]) == (1, 1)
    typed = shaped(master.get(f"/tasks/stats?task_type={device}"), openapi.TasksStatsOut)
    assert (
        typed["by_type"] == {device: {"completed": 1, "pending": 0, "assigned": 0}}
        or typed["by_state"]["completed"] == 1
    )


def test_health_readiness_and_metrics(master: Master, batch: str) -> None:
    assert master.session.get(f"{master.url}/healthz").json() == {"status": "ok", "protocol": settings.PROTOCOL}
    assert master.session.get(f"{master.url}/readyz").json() == {"status": "ready"}
    response = master.session.get(f"{master.url}/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    counted = re.findall(r'^af_tasks\{state="(\w+)"\} ', response.text, re.MULTILINE)
    assert sorted(counted) == sorted(reads.STATES)
    assert {"af_writer_queue", "af_held_polls", "af_database_bytes"} <= set(
        re.findall(r"^(\w+) ", response.text, re.MULTILINE)
    )


class Stream:
    """An event stream that a test reads by line; a silent one fails after a minute."""

    def __init__(self, master: Master, **headers: str) -> None:
        url = f"{master.url}{PREFIX}/events"
        self.response = requests.get(url, headers=headers, stream=True, timeout=60)
        self.lines = self.response.iter_lines(chunk_size=1)

    def next_event(self, verb: str) -> tuple[int, str, dict[str, Any]]:
        """(id, kind, data) of the next event with that verb."""
        fields: dict[str, str] = {}
        for raw in self.lines:
            name, _, value = raw.decode().partition(": ")
            if name:
                fields[name] = value
            elif fields.get("data"):
                data = json.loads(fields["data"])
                if data["verb"] == verb:
                    return int(fields["id"]), fields["event"], data
                fields = {}
        raise AssertionError("the stream ended")

    def close(self) -> None:
        self.response.close()


@pytest.fixture
def open_stream() -> Iterator[Callable[..., Stream]]:
    streams: list[Stream] = []

    def open_one(master: Master, **headers: str) -> Stream:
        streams.append(Stream(master, **headers))
        return streams[-1]

    yield open_one
    for stream in streams:
        stream.close()


def test_an_event_arrives_after_a_submit_and_can_be_had_again(master: Master, open_stream: Any) -> None:
    stream = open_stream(master)
    assert stream.response.headers["Content-Type"] == "text/event-stream"
    first = master.submit_one("nobody")
    event_id, kind, data = stream.next_event("submit")
    assert (kind, data["task"]) == ("task", first)
    second = master.submit_one("nobody")
    replayed = open_stream(master, **{"Last-Event-ID": str(event_id)})
    assert replayed.next_event("submit")[2]["task"] == second


def test_the_number_of_streams_is_bounded_and_a_place_comes_back(
    programs: list[Program], tmp_path: Path, open_stream: Any
) -> None:
    master = Master(tmp_path, max_event_streams=2)
    programs.append(master)
    for _ in range(5):
        assert master.api("HEAD", "/events").status_code == 200  # opens none for good
    first, second = open_stream(master), open_stream(master)
    assert (first.response.status_code, second.response.status_code) == (200, 200)
    refused = master.api("GET", "/events")
    problem(refused, 503, "too_many_streams")
    assert refused.headers["Retry-After"] == "30"
    first.close()

    def is_open_again() -> bool:
        master.submit_one("nobody")  # writing to the closed one is how it is noticed
        return open_stream(master).response.status_code == 200

    wait_for("the place of the closed stream", is_open_again)


# -- every reply -------------------------------------------------------------------------------------------------


def test_every_kind_of_reply_carries_the_security_headers(master: Master, open_stream: Any) -> None:
    root, ask = master.url, master.session.request
    replies = [
        master.api("GET", "/devices"),
        master.api("GET", "/tasks/export"),
        master.api("GET", "/nothing"),
        master.api("PATCH", "/tasks", {}),
        master.api("POST", "/tasks", {"task_type": 1}),
        master.api("GET", "/tasks/0"),
        master.api("POST", "/logout", {}),
        open_stream(master).response,
        *(
            ask("GET", root + path)
            for path in ("/", "/static/app.js", "/static/no", "/healthz", "/metrics", "/nothing")
        ),
        ask("GET", root + "/", headers={"Host": "evil.example"}),
    ]
    for response in replies:
        for name, value in access.SECURITY_HEADERS.items():
            if name != "Cache-Control":
                assert response.headers.get(name) == value, (response.url, name)
        assert response.headers["Cache-Control"] in ("no-store", "no-cache"), response.url
        assert "text/html" not in response.headers.get("Content-Type", "") or response.url == root + "/"


def test_the_dashboard_is_served_and_nothing_beside_it(master: Master) -> None:
    page = master.session.get(master.url + "/")
    assert page.headers["Content-Type"].startswith("text/html") and "<script" in page.text
    assert master.session.get(master.url + "/static/app.js").status_code == 200


# -- without monitoring ------------------------------------------------------------------------------------------


def test_without_monitoring_no_figure_of_a_machine_is_kept(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path, enable_monitoring=False)
    programs.append(master)
    assert master.register("shop-1")["settings"]["enable_monitoring"] is False
    master.beat("shop-1", cpu_usage=50, memory_usage=50, disk_usage=50, active_tasks=1)
    [device] = master.get("/devices")["devices"]
    assert device["status"] == "online"
    assert [device[name] for name in ("cpu_usage", "memory_usage", "disk_usage")] == [None] * 3
    assert master.get("/devices/shop-1/stats")["heartbeats"] == []
    problem(master.session.get(master.url + "/metrics"), 404, "monitoring_off")
    with closing(sqlite3.connect(tmp_path / "distribution.db")) as connection:
        assert connection.execute("SELECT count(*) FROM af_device_heartbeat").fetchone() == (0,)


# -- with a key --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master with a key."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "worker.pyz").write_bytes(b"a whole device")
    master = Master(folder, api_key=KEY, worker_file=str(folder / "worker.pyz"))
    yield master
    master.kill()


def bare(master: Master, method: str, path: str, **options: Any) -> requests.Response:
    """A request without any key; `path` from the root."""
    return requests.request(method, master.url + path, timeout=60, allow_redirects=False, **options)


def some_path(prefix: str, operation: openapi.Operation) -> str:
    names = {"device_id": "shop-1", "task_id": "1", "artifact_id": "1", "name": "b", "file": "app.js"}
    names |= {"lane_id": "1", "task_type": "echo", "key_id": "1"}
    return prefix + re.sub(r"\{(\w+)\}", lambda found: names[found[1]], operation.path)


@pytest.mark.parametrize(
    ("prefix", "operation"),
    [pytest.param(prefix, row, id=f"{row.method} {prefix}{row.path}") for prefix, row, _ in table()],
)
def test_without_the_key_only_the_public_routes_answer(
    locked: Master, prefix: str, operation: openapi.Operation
) -> None:
    body = {"key": "wrong"} if operation.path == "/login" else {}
    options = {"json": body} if operation.method != "GET" else {}
    response = bare(locked, operation.method, some_path(prefix, operation), **options)
    is_public = f"{operation.method} {operation.path}" in PUBLIC - {"POST /login"}
    assert (response.status_code < 400) if is_public else (response.status_code == 401), response.text
    if not is_public:
        problem(response, 401, "unauthorized")
        assert KEY not in response.text and "WWW-Authenticate" in response.headers


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}])
def test_the_key_in_a_header_opens_reading_and_writing(locked: Master, headers: dict[str, str]) -> None:
    assert bare(locked, "GET", f"{PREFIX}/devices", headers=headers).status_code == 200
    assert bare(locked, "POST", f"{PREFIX}/tasks", headers=headers, json={"task_type": "nobody"}).status_code == 201


@pytest.mark.parametrize("name", ["key", "api_key", "token", "access_token"])
def test_a_key_in_the_url_is_refused_even_a_right_one(locked: Master, name: str) -> None:
    headers = {"X-API-Key": KEY}
    problem(bare(locked, "GET", f"{PREFIX}/devices?{name}={KEY}"), 400, "key_in_url")
    problem(bare(locked, "GET", f"{PREFIX}/devices?{name}={KEY}", headers=headers), 400, "key_in_url")


def test_a_browser_that_knows_the_key_reads_and_writes_from_our_page_only(locked: Master) -> None:
    entered = bare(locked, "POST", f"{PREFIX}/login", json={"key": KEY})
    assert entered.status_code == 204 and entered.content == b""
    set_cookie = entered.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in set_cookie.split(";")}
    cookie = {"Cookie": set_cookie.partition(";")[0]}
    assert bare(locked, "GET", f"{PREFIX}/devices", headers=cookie).status_code == 200
    task = {"task_type": "nobody"}

    def submit(**headers: str) -> requests.Response:
        return bare(locked, "POST", f"{PREFIX}/tasks", json=task, headers={**cookie, **headers})

    before = locked.get("/tasks/stats")["by_state"]["pending"]
    assert submit(Origin=locked.url).status_code == 201
    problem(submit(Origin="https://evil.example"), 403, "foreign_origin")
    problem(submit(Origin=locked.url.replace("http:", "https:")), 403, "foreign_origin")
    problem(submit(), 403, "foreign_origin")
    problem(submit(**{"Sec-Fetch-Site": "cross-site", "Origin": locked.url}), 403, "foreign_origin")
    assert locked.get("/tasks/stats")["by_state"]["pending"] == before + 1
    left = bare(locked, "POST", f"{PREFIX}/logout", headers=cookie)
    assert left.status_code == 204 and "Max-Age=0" in left.headers["Set-Cookie"]


def test_an_event_stream_opens_with_the_cookie(locked: Master) -> None:
    entered = bare(locked, "POST", f"{PREFIX}/login", json={"key": KEY})
    cookie = {"Cookie": entered.headers["Set-Cookie"].partition(";")[0]}
    response = bare(locked, "GET", f"{PREFIX}/events", headers=cookie, stream=True)
    assert response.status_code == 200
    response.close()


def test_another_host_name_is_refused_without_the_key(locked: Master, master: Master) -> None:
    problem(bare(master, "GET", f"{PREFIX}/devices", headers={"Host": "evil.example"}), 403, "host_not_allowed")
    problem(bare(locked, "GET", "/", headers={"Host": "evil.example"}), 403, "host_not_allowed")


def test_the_key_is_in_no_log(locked: Master) -> None:
    assert KEY not in locked.output and KEY not in (locked.folder / "master.log").read_text()


def test_an_export_that_cannot_begin_is_an_error_and_not_a_broken_file() -> None:
    def busy() -> Iterator[dict[str, Any]]:
        raise reads.ReadsBusy("all read connections are in use")
        yield {}

    with pytest.raises(reads.ReadsBusy):
        export.begun(busy())
    assert list(export.begun(iter([{"id": 1}, {"id": 2}]))) == [{"id": 1}, {"id": 2}]
    assert list(export.begun(iter([]))) == []
