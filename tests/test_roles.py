"""Which role may use which route? Every route is asked with a key of every role, and with none, at a real master.

The routes come from the router's own table, so a new one is here by itself; the answers have to be the table of
docs/api.md, cell by cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from farm import ROOT, Master, farm

import access
import api
import openapi
from web import UNTOLD, WRITING

KEY = "the-key-of-the-configuration"
NAMES = {"device_id": "nobody", "task_id": "999999", "artifact_id": "999999", "name": "nothing", "file": "app.js",
         "lane_id": "999999", "task_type": "nothing", "key_id": "999999"}  # fmt: skip
"""What a path names: nothing that is there, so that the routes that an admin may use change little."""


class NoHandlers:
    def __getattr__(self, name: str) -> str:
        return name


ROUTES: list[tuple[str, openapi.Operation, str]] = [
    (prefix, route.operation, str(route.handler))
    for prefix, some in api.routes(NoHandlers())  # type: ignore[arg-type]
    for route in some
]


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with farm() as started:
        started.append(Master(tmp_path_factory.mktemp("master"), api_key=KEY))
        yield started[0]  # type: ignore[misc]


@pytest.fixture(scope="module")
def keys(master: Master) -> dict[str, str]:
    """A key of every role; the device's is its token."""
    made = {
        role: master.call("POST", "/keys", {"role": role, "name": f"the {role}"})["key"]
        for role in access.ROLES
        if role != access.DEVICE
    }
    enroll = {"Authorization": f"Bearer {master.call('POST', '/keys', {'role': 'enroll'})['key']}"}
    body = {"device_id": "shop-1", "boot_id": "b", "protocol": 1, "task_types": [], "wants_token": True}
    made[access.DEVICE] = master.call("POST", "/devices/register", body, headers=enroll)["token"]
    return made


def ask(master: Master, prefix: str, operation: openapi.Operation, key: str | None) -> tuple[int, str]:
    """The status, and the problem's code."""
    path = prefix + re.sub(r"\{(\w+)\}", lambda found: NAMES[found[1]], operation.path)
    options: dict[str, Any] = {"headers": {"Authorization": f"Bearer {key}"} if key else {}, "stream": True}
    if operation.method in WRITING and operation.request_type == "application/json":
        options["json"] = {}
    with requests.request(operation.method, master.url + path, timeout=60, **options) as response:
        is_problem = response.headers.get("Content-Type") == "application/problem+json"
        return response.status_code, response.json()["code"] if is_problem else ""


def cell(status: int, code: str) -> str:
    """What the answer says of access, in the words of the table."""
    return "" if status == 401 or (status, code) == (403, "forbidden") else "yes"


def test_every_cell_of_the_table_is_what_a_master_answers(master: Master, keys: dict[str, str]) -> None:
    lines = []
    for prefix, operation, _ in ROUTES:
        answers = {role: ask(master, prefix, operation, key) for role, key in {"none": None, **keys}.items()}
        assert not [answer for answer in answers.values() if answer[0] >= 500 and answer[1] != "monitoring_off"], (
            operation
        )
        cells = [cell(*answers[role]) for role in ("none", *access.ROLES)]
        if answers["none"][0] >= 400 and not cells[0]:
            assert answers["none"] == (401, "unauthorized"), operation
        lines.append(f"| `{operation.method} {operation.path}` | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    said = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = said.partition("## Who may do what")[2].partition("\n## ")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == lines


def test_a_program_that_changes_something_is_in_the_audit_log_by_its_routes_name(
    master: Master, keys: dict[str, str]
) -> None:
    """But for what devices say, for submissions, which carry who they are from, and for logins, which are counted."""
    for prefix, operation, _ in ROUTES:
        if operation.method in WRITING:
            ask(master, prefix, operation, keys["admin"])
    audited = "Bearer " + keys["admin"]
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = master.call("GET", f"/audit?actor=the admin&limit=200{cursor}", headers={"Authorization": audited})
        found += page["entries"]
        cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] else None
    expected = {
        handler
        for _, operation, handler in ROUTES
        if operation.method in WRITING and access.DEVICE not in operation.role and operation.path not in UNTOLD
    }
    assert len(expected) > 20
    assert {entry["action"] for entry in found} - {"refused"} == expected


def test_a_route_without_a_role_that_exists_stops_the_start() -> None:
    for role in ("", "root", "viewer, root", "viewer,operator", "Viewer"):
        with pytest.raises(ValueError, match="unknown role"):
            access.holders(role)


def test_each_role_holds_what_is_below_it_and_devices_stand_apart() -> None:
    assert access.holders("viewer") == {"viewer", "submitter", "operator", "admin"}
    assert access.holders("operator") == {"operator", "admin"}
    assert access.holders("admin") == {"admin"}
    assert access.holders("device, enroll") == {"device", "enroll", "admin"}
    assert access.holders("device, operator") == {"device", "operator", "admin"}


@pytest.mark.parametrize("role", access.LADDER)
def test_a_browser_may_do_what_its_key_may(master: Master, keys: dict[str, str], role: str) -> None:
    browser, url = requests.Session(), f"{master.url}/api/distribution"
    ours = {"Origin": master.url}
    assert browser.post(f"{url}/login", json={"key": keys[role]}, headers=ours, timeout=60).status_code == 204
    assert browser.get(f"{url}/session", timeout=60).json() == {"role": role, "name": f"the {role}", "key_needed": True}
    body = {"strategy": "least_tasks"}
    changed = browser.put(f"{url}/strategy", json=body, headers=ours, timeout=60).status_code
    assert changed == (200 if role in ("operator", "admin") else 403)


def test_what_is_for_devices_takes_no_session(master: Master, keys: dict[str, str]) -> None:
    """A page could take tasks away, and a browser would never run them."""
    browser, url, ours = requests.Session(), f"{master.url}/api/distribution", {"Origin": master.url}
    assert browser.post(f"{url}/login", json={"key": keys["admin"]}, headers=ours, timeout=60).status_code == 204
    answers = [
        browser.get(f"{url}/tasks/pull?device_id=shop-1", timeout=60),
        browser.post(f"{url}/tasks/report", json={}, headers=ours, timeout=60),
        browser.post(f"{url}/devices/register", json={}, headers=ours, timeout=60),
        browser.put(f"{url}/tasks/1/status", json={"status": "running", "lease_id": "x"}, headers=ours, timeout=60),
    ]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(403, "forbidden")] * 4
    cancelled = browser.put(f"{url}/tasks/999999/status", json={"status": "cancelled"}, headers=ours, timeout=60)
    assert cancelled.json()["code"] == "unknown_task"


@pytest.mark.parametrize("role", [access.ENROLL, access.DEVICE])
def test_keys_of_programs_do_not_log_in(master: Master, keys: dict[str, str], role: str) -> None:
    response = master.api("POST", "/login", {"key": keys[role]})
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert "Set-Cookie" not in response.headers
