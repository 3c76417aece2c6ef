"""What does the API say to what it cannot use? The right 4xx with the field, and nothing written.

Bodies, queries and heads that no route may take go over every route in test_hostile_input.py.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from farm import Master

import api
import openapi

PREFIX = "/api/distribution"
JSON = {"Content-Type": "application/json"}
BIG = 2**63


class NoHandlers:
    def __getattr__(self, name: str) -> None:
        return None


@pytest.fixture(scope="module")
def work(master: Master) -> dict[str, str]:
    """A device with a task, so that a route's names lead to something; what stands for the names in a path."""
    master.register("shop-1")
    master.submit_one(batch="b")
    [task] = master.pull("shop-1")
    master.submit_one("nobody", batch="b")
    names = {"device_id": "shop-1", "task_id": "2", "name": "b", "file": "app.js", "lane_id": "1", "task_type": "echo"}
    return {**names, "lease_id": task["lease_id"]}


def written(master: Master) -> Any:
    """What must not change: tasks, devices, batches, the strategy, and what each device is wanted to do."""
    devices = [(device["device_id"], device["wanted"]) for device in master.get("/devices")["devices"]]
    return master.states(), devices, master.get("/batches")["batches"], master.get("/strategy")["strategy"]


@pytest.fixture(autouse=True)
def nothing_is_written(master: Master, work: dict[str, str]) -> Iterator[None]:
    before = written(master)
    yield
    assert written(master) == before


def send(master: Master, method: str, path: str, body: bytes = b"", **headers: str) -> requests.Response:
    """Exactly these bytes."""
    url = master.url + (path if path.startswith("//") else PREFIX + path)
    return master.session.request(method, url, data=body, headers={**JSON, **headers}, timeout=60)


def refused(response: requests.Response, *expected: Any) -> None:
    """(status, code, field): as many of them as are given."""
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    found = response.json()
    assert found["status"] == response.status_code and found["detail"] and len(found["detail"]) <= 500
    assert not re.search(r"Traceback|SELECT|/main/|\.py\b(?<!worker\.py)", found["detail"]), found
    assert (response.status_code, found["code"], found.get("field"))[: len(expected)] == expected, found


def bodies(*, needed: bool = False) -> list[tuple[str, str]]:
    """(method, path) of every route that takes a body, or of those that need one."""
    routes = api.routes(NoHandlers())  # type: ignore[arg-type]
    rows = [route.operation for _, some in routes for route in some]
    taking = [row for row in rows if row.request is not None and not (needed and openapi.may_be_left_out(row.request))]
    return [(row.method, row.path) for row in taking]


def filled(path: str, work: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: work[found[1]], path)


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


ROUTES = pytest.mark.parametrize(("method", "path"), bodies(), ids=[" ".join(row) for row in bodies()])


@ROUTES
def test_an_unknown_or_missing_field_never_passes_for_a_message(
    master: Master, work: dict[str, str], method: str, path: str
) -> None:
    raw = b'{"no_such_field": 1e400, "task_type": 5, "status": "asleep", "reason": 7, "device_id": [], "key": {}}'
    refused(send(master, method, filled(path, work), raw), 422)


@ROUTES
def test_how_a_body_is_sent_is_checked_before_what_it_says(
    master: Master, work: dict[str, str], method: str, path: str
) -> None:
    path = filled(path, work)
    refused(send(master, method, path, b"{}", **{"Content-Type": "text/plain"}), 415, "not_json")
    refused(send(master, method, path, b"a=1", **{"Content-Type": "application/x-www-form-urlencoded"}), 415)
    limit = 8 * 1024 * 1024
    raw = raw_request(master, f"{method} {PREFIX}{path}", b"", f"Content-Length: {limit + 1}", *JSON_LINE)
    assert (raw.status, raw.document["code"]) == (413, "too_large")
    raw = raw_request(
        master, f"{method} {PREFIX}{path}", b"2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked", *JSON_LINE
    )
    assert (raw.status, raw.document["code"]) == (411, "length_required")


@pytest.mark.parametrize(
    "line", ["POST /api/distribution/tasks", "POST /api/distribution/nothing", "GET /api/distribution/tasks"]
)
def test_a_reply_that_comes_before_the_body_closes_the_connection(master: Master, line: str) -> None:
    """Else the client's next request on it is lost now and then."""
    reply = raw_request(master, line, b"", "Content-Type: text/plain", "Content-Length: 2")
    assert "connection: close" in reply.head.lower()


@pytest.mark.parametrize(("method", "path"), bodies(needed=True))
def test_no_body_at_all_changes_nothing(master: Master, work: dict[str, str], method: str, path: str) -> None:
    refused(send(master, method, filled(path, work)), 400, "bad_json")


def task(value: str) -> bytes:
    return b'{"task_type": "echo", ' + value.encode("utf-8", "surrogatepass") + b"}"


def data(value: str) -> bytes:
    return task('"task_data": {"x": ' + value + "}")


VALUES: list[tuple[str, str, bytes, int, str, str | None]] = [
    ("POST", "/tasks", data("NaN"), 400, "bad_json", None),
    ("POST", "/tasks", data("1e400"), 422, "invalid_field", "task_data"),
    ("POST", "/tasks", data(str(BIG)), 422, "invalid_field", "task_data.x"),
    ("POST", "/tasks", data(str(-BIG - 1)), 422, "invalid_field", "task_data.x"),
    ("POST", "/tasks", data("9" * 5000), 422, "invalid_field", "task_data"),
    ("POST", "/tasks", data('"\\u0000"'), 422, "invalid_field", "task_data.x"),
    ("POST", "/tasks", data('{"\\u0000": 1}'), 422, "invalid_field", "task_data.x"),
    ("POST", "/tasks", data('"\\udc00"'), 400, "bad_json", None),
    ("POST", "/tasks", data("[" * 32 + "]" * 32), 400, "too_deep", "task_data"),
    ("POST", "/tasks", data("[" * 100_000 + "]" * 100_000), 400, "too_deep", None),
    ("POST", "/tasks", data(json.dumps("x" * 1024 * 1024)), 413, "too_large", "task_data"),
    ("POST", "/tasks", task('"priority": 0'), 422, "invalid_field", "priority"),
    ("POST", "/tasks", task('"priority": -1'), 422, "invalid_field", "priority"),
    ("POST", "/tasks", task('"priority": 1.5'), 422, "invalid_field", "priority"),
    ("POST", "/tasks", task(f'"priority": {BIG}'), 422, "invalid_field", "priority"),
    ("POST", "/tasks", task('"delay_seconds": -1'), 422, "invalid_field", "delay_seconds"),
    ("POST", "/tasks", task('"delay_seconds": 1e400'), 422, "invalid_field", "delay_seconds"),
    ("POST", "/tasks", task('"username": "a\\u0000b"'), 422, "invalid_field", "username"),
    ("POST", "/tasks", task('"username": ""'), 422, "invalid_field", "username"),
    ("POST", "/tasks", task('"unique_key": "' + "x" * 1025 + '"'), 422, "invalid_field", "unique_key"),
    ("POST", "/tasks", task('"start_date": "2026-02-30"'), 422, "invalid_field", "start_date"),
    ("POST", "/tasks", task('"run_at": "9999-12-31T23:59:59Z"'), 422, "invalid_field", "run_at"),
    ("POST", "/tasks", task('"prioriti": 5'), 422, "unknown_field", "prioriti"),
    ("POST", "/tasks", b'{"task_type": "a b"}', 422, "invalid_field", "task_type"),
    ("POST", "/tasks", b"{}", 422, "missing_field", "task_type"),
    ("POST", "/tasks", b'[{"task_type": "echo"}, {"task_type": "echo", "priority": 11}]', 422, "invalid_field", "[1].priority"),
    ("POST", "/tasks", b'{"tasks": [{"task_type": "echo"}, {}]}', 422, "missing_field", "tasks[1].task_type"),
    ("POST", "/tasks", b"[" + b'{"task_type":"echo"},' * 10_000 + b'{"task_type":"echo"}]', 422, "invalid_field", None),
    ("POST", "/tasks?dry_run=yes", b'{"task_type": "echo"}', 422, "invalid_field", "dry_run"),
    ("POST", "/tasks?dry_run=true", b'[{"task_type": "echo"}', 400, "bad_json", None),
    ("POST", "/tasks?dry_run=true", b"hello", 400, "bad_json", None),
    ("POST", "/tasks?dry_run=true", b"", 400, "bad_json", None),
    ("POST", "/tasks?dry_run=true", b'{"tasks": 1}', 422, "invalid_field", "tasks"),
    ("POST", "/tasks/actions", b'{"action": "cancel", "filter": {"error": 1}}', 422, "invalid_field", "filter.error"),
    ("POST", "/tasks/actions", b'{"action": "cancel", "filter": {"error": "' + b"x" * 4001 + b'"}}', 422, "invalid_field", "filter.error"),
    ("PUT", "/devices/shop-1", b'{}', 422, "missing_field", "device_name"),
    ("PUT", "/devices/shop-1", b'{"device_name": ""}', 422, "invalid_field", "device_name"),
    ("PUT", "/devices/shop-1", b'{"device_name": "a\\nb"}', 422, "invalid_field", "device_name"),
    ("POST", "/tasks/actions", b'{"action": "delete", "filter": {}}', 422, "invalid_field", "action"),
    ("POST", "/tasks/actions", b'{"action": "cancel", "filter": {"status": "asleep"}}', 422, "invalid_field", "filter.status"),
    ("POST", "/tasks/actions", b'{"action": "cancel", "filter": {"batc": "b"}}', 422, "unknown_field", "filter.batc"),
    ("POST", "/tasks/actions", b'{"action": "cancel", "filter": {"parent_id": -1}}', 422, "invalid_field", "filter.parent_id"),
    ("PUT", "/tasks/2/status", b'{"status": "asleep"}', 422, "invalid_field", "status"),
    ("PUT", "/tasks/2/status", b'{"status": "pending"}', 422, "invalid_field", "status"),
    ("PUT", "/tasks/2/status", b'{"status": "running", "assignment_id": 0}', 422, "invalid_field", "assignment_id"),
    ("PUT", "/tasks/2/assign", b'{"device_id": ""}', 422, "invalid_field", "device_id"),
    ("PUT", "/devices/shop-1/status", b'{"status": "online"}', 422, "invalid_field", "status"),
    ("PUT", "/strategy", b'{"strategy": "../../etc/passwd"}', 422, "invalid_field", "strategy"),
    ("PUT", "/strategy", b'{"strategy": "fastest"}', 422, "invalid_field", "strategy"),
    ("POST", "/devices/register", b'{"device_id": "n", "boot_id": "b", "protocol": -1, "task_types": []}', 422, "invalid_field", "protocol"),
    ("POST", "/devices/register", b'{"device_id": "n/../m", "boot_id": "b", "protocol": 1, "task_types": []}', 422, "invalid_field", "device_id"),
    ("POST", "/devices/register", b'{"device_id": "n", "boot_id": "b", "protocol": 1, "task_types": [], "weight": 1e400}', 422, "invalid_field", "weight"),
    ("POST", "/devices/shop-1/heartbeat", b'{"boot_id": "boot-1", "seq": -1}', 422, "invalid_field", "seq"),
    ("POST", "/devices/shop-1/heartbeat", f'{{"boot_id": "boot-1", "seq": {BIG}}}'.encode(), 422, "invalid_field", "seq"),
    ("POST", "/tasks/report", b'{"device_id": "shop-1"}', 422, "missing_field", "reports"),
    ("POST", "/batches/b/pause", b'{"reason": "\\u0000"}', 422, "invalid_field", "reason"),
    ("POST", "/batches/b/cancel", b'{"reason": 1}', 422, "invalid_field", "reason"),
    ("POST", "/limits/l/open", b'{"value": ["a\\u0085b"]}', 422, "invalid_field", "value"),
    ("POST", "/tasks/2/cancel", b'{"reason": "' + b"x" * 501 + b'"}', 422, "invalid_field", "reason"),
    ("POST", "/login", b'{"key": ""}', 422, "invalid_field", "key"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "raw", "status", "code", "field"), VALUES)
def test_a_bad_value_is_told_with_its_field(
    master: Master, method: str, path: str, raw: bytes, status: int, code: str, field: str | None
) -> None:
    refused(send(master, method, path, raw), status, code, *([field] if field else []))


def test_an_invalid_report_is_answered_in_its_place(master: Master, work: dict[str, str]) -> None:
    entries = [
        b"null", b"1", b"{}", b'{"assignment_id": "1"}', b'{"assignment_id": 0}',
        b'{"assignment_id": 1, "lease_id": "x", "outcome": "asleep"}',
        b'{"assignment_id": 1, "lease_id": "x", "outcome": "completed", "result": [1]}',
        b'{"assignment_id": 1, "lease_id": "x", "outcome": "completed", "result": {"x": 1e400}}',
        b'{"assignment_id": 1, "lease_id": "x", "outcome": "completed", "result": ' + deep(100) + b"}",
        b'{"assignment_id": 1, "lease_id": "x", "outcome": "failed", "retry_after_seconds": -1}',
        b'{"assignment_id": 1, "lease_id": "x", "outcome": "completed", "new_tasks": [{}]}',
        b'{"assignment_id": 9223372036854775808, "lease_id": "x", "outcome": "completed"}',
    ]  # fmt: skip
    raw = b'{"device_id": "shop-1", "reports": [' + b",".join(entries) + b"]}"
    response = send(master, "POST", "/tasks/report", raw)
    assert response.status_code == 200, response.text
    answers = response.json()["reports"]
    assert [answer["outcome"] for answer in answers] == ["invalid"] * len(entries)
    assert all(answer["detail"] for answer in answers)


@pytest.mark.parametrize("task_id", ["0", "-1", str(BIG), "abc", "1.0", "1e3", "٣", "%31%00", "0x1", "9" * 400])
@pytest.mark.parametrize(
    ("method", "path", "raw"),
    [
        ("GET", "", b""),
        ("GET", "/why", b""),
        ("POST", "/cancel", b"{}"),
        ("POST", "/requeue", b"{}"),
        ("PUT", "/assign", b'{"device_id": "shop-1"}'),
        ("PUT", "/status", b'{"status": "cancelled"}'),
    ],
)
def test_an_id_that_is_none_is_422(master: Master, task_id: str, method: str, path: str, raw: bytes) -> None:
    refused(send(master, method, f"/tasks/{task_id}{path}", raw), 422, "invalid_field", "task_id")


@pytest.mark.parametrize("device_id", ["%00", "a%2Fb", "%ff", "x" * 5000, "..%2f..", "%F0%9F%92%A9", "'--", "%0a"])
def test_a_device_id_that_is_none_is_refused(master: Master, device_id: str) -> None:
    for method, path, raw in (
        ("GET", "stats", b""),
        ("GET", "heartbeats", b""),
        ("PUT", "status", b'{"status": "active"}'),
        ("POST", "heartbeat", b'{"boot_id": "b", "seq": 1}'),
    ):
        assert send(master, method, f"/devices/{device_id}/{path}", raw).status_code in (400, 404, 422)
    assert send(master, "DELETE", f"/devices/{device_id}").status_code in (400, 404, 422)


def test_a_path_that_is_not_utf8_never_means_another_one(master: Master) -> None:
    refused(send(master, "PUT", "/devices/shop%ff-1/status", b'{"status": "disabled"}'), 400, "bad_path")
    refused(send(master, "POST", "/batches/%ffb/cancel", b"{}"), 400, "bad_path")


@pytest.mark.parametrize("name", ["%00", "x" * 129, "%0a", "%C2%80", "%ff" * 9])
def test_a_batch_name_that_is_none_is_refused(master: Master, name: str) -> None:
    for verb in ("pause", "resume", "cancel"):
        response = send(master, "POST", f"/batches/{name}/{verb}", b"{}")
        assert response.status_code in (400, 404, 405, 422), response.text
        refused(response)


QUERIES = [
    ("/tasks", "limit=0", "limit"),
    ("/tasks", "limit=201", "limit"),
    ("/tasks", "limit=-1", "limit"),
    ("/tasks", "limit=abc", "limit"),
    ("/tasks", "limit=1e2", "limit"),
    ("/tasks", "limit=1&limit=2", "limit"),
    ("/tasks", f"cursor={BIG}", "cursor"),
    ("/tasks", "cursor=0", "cursor"),
    ("/tasks", "status=asleep", "status"),
    ("/tasks", "status=pending,asleep", "status"),
    ("/tasks", "task_type=a%20b", "task_type"),
    ("/tasks", "username=%00", "username"),
    ("/tasks", "username=" + "x" * 129, "username"),
    ("/tasks", "text=" + "x" * 1025, "text"),
    ("/tasks", "created_after=yesterday", "created_after"),
    ("/tasks", "created_after=2026-01-01T00:00:00", "created_after"),
    ("/tasks", "created_before=0000-00-00T00:00:00Z", "created_before"),
    ("/tasks", "parent_id=-1", "parent_id"),
    ("/tasks", "stat=pending", "stat"),
    ("/tasks/export", "format=xml", "format"),
    ("/tasks/export", "include=task_data", "include"),
    ("/tasks/export", "batc=b", "batc"),
    ("/tasks/stats", "batch=%0a", "batch"),
    ("/tasks/pull", "boot_id=b", "device_id"),
    ("/tasks/pull", "device_id=shop-1&boot_id=boot-1&limit=-1", "limit"),
    ("/tasks/pull", "device_id=shop-1&boot_id=boot-1&limit=1001", "limit"),
    ("/tasks/pull", "device_id=shop-1&boot_id=boot-1&wait=26", "wait"),
    ("/tasks/pull", "device_id=shop-1&boot_id=boot-1&wait=NaN", "wait"),
    ("/tasks/pull", "device_id=shop-1&boot_id=boot-1&wait=inf", "wait"),
    ("/tasks/pull", f"device_id=shop-1&boot_id=boot-1&seq={BIG}", "seq"),
    ("/devices", "status=asleep", "status"),
    ("/devices", "tag=a%20b", "tag"),
    ("/batches", "limit=0", "limit"),
    ("/batches", "cursor=x", "cursor"),
    ("/system/overview", "x=1", "x"),
    ("/tasks", "error=" + "x" * 4001, "error"),
    ("/devices", "limit=201", "limit"),
    ("/devices", "beats=61", "beats"),
    ("/devices", "cursor=a%20b", "cursor"),
    ("/devices/shop-1", "x=1", "x"),
    ("/devices/shop-1/heartbeats", "hours=2", "hours"),
    ("/batches/b", "x=1", "x"),
    ("/batches/b/failures", "x=1", "x"),
    ("/system", "x=1", "x"),
    ("/system/series", "hours=25", "hours"),
    ("/system/series", "task_type=a%20b", "task_type"),
    ("/events/history", "kind=other", "kind"),
    ("/events/history", "device_id=a%20b", "device_id"),
    ("/events/history", "verb=a%20b", "verb"),
    ("/events/history", "after=yesterday", "after"),
    ("/events/history", "cursor=x", "cursor"),
    ("/events/history", "limit=201", "limit"),
    ("/strategy", "x=1", "x"),
    ("/tasks/2", "x=1", "x"),
]


@pytest.mark.parametrize(("path", "query", "field"), QUERIES)
def test_a_bad_query_is_told_with_its_parameter(master: Master, path: str, query: str, field: str) -> None:
    response = send(master, "GET", f"{path}?{query}")
    refused(response, 422)
    assert response.json()["field"] == field


@pytest.mark.parametrize("query", ["username=%ff", "username=%ed%a0%80", "&".join(f"a{n}=1" for n in range(65))])
def test_a_query_that_cannot_be_read_is_400(master: Master, query: str) -> None:
    refused(send(master, "GET", f"/tasks?{query}"), 400, "bad_query")


# -- over a bare socket: what no HTTP client would send -----------------------------------------------------------

JSON_LINE = ("Content-Type: application/json",)


class Raw:
    """The first reply on a connection: its status, its headers in one text, and its JSON."""

    def __init__(self, text: bytes) -> None:
        head, _, body = text.partition(b"\r\n\r\n")
        self.head = head.decode("latin-1")
        self.status = int(self.head.split()[1]) if head else 0
        self.body = body
        self.document: dict[str, Any] = json.loads(body) if body.startswith(b"{") and b"chunked" not in head else {}


def raw_request(master: Master, line: str | bytes, body: bytes, *headers: str, half_close: bool = False) -> Raw:
    """One request as it is written here; the connection is closed after it."""
    address = urlsplit(master.url)
    line = line.encode() if isinstance(line, str) else line
    head = "\r\n".join([f"Host: {address.netloc}", *headers])
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(line + b" HTTP/1.1\r\n" + head.encode("latin-1") + b"\r\n\r\n" + body)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return Raw(read_reply(connection))


def read_reply(connection: socket.socket) -> bytes:
    """Until the reply is whole by its Content-Length, or the other side closed."""
    found = b""
    while True:
        head, separator, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"(?im)^content-length: (\d+)", head) if separator else None
        if length and len(body) >= int(length[1]):
            return found
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return found
        if not part:
            return found
        found += part


def test_an_endless_chunked_body_is_refused_without_being_read(master: Master) -> None:
    address = urlsplit(master.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        head = f"POST {PREFIX}/tasks HTTP/1.1\r\nHost: {address.netloc}\r\n{JSON_LINE[0]}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        connection.sendall(b"4\r\n[{}]\r\n" * 100)
        raw = Raw(read_reply(connection))
        assert (raw.status, raw.document["code"]) == (411, "length_required")
        with pytest.raises(OSError):  # and the connection ends: nobody listens to the rest
            for _ in range(100_000):
                connection.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")


def test_a_body_that_ends_early_is_400_and_writes_nothing(master: Master) -> None:
    raw = raw_request(
        master, f"POST {PREFIX}/tasks", b'{"task_type": "echo"}', "Content-Length: 500", *JSON_LINE, half_close=True
    )
    assert raw.status in (0, 400)
    assert not raw.document or raw.document["code"] == "cut_off"


def test_a_body_without_a_length_is_no_body(master: Master) -> None:
    raw = raw_request(master, f"POST {PREFIX}/tasks", b"", *JSON_LINE)
    assert (raw.status, raw.document["code"]) == (400, "bad_json")


@pytest.mark.parametrize("length", ["-1", "abc", "1.5", "99999999999999999999", "0x10"])
def test_a_length_that_is_none_is_refused(master: Master, length: str) -> None:
    raw = raw_request(master, f"POST {PREFIX}/tasks", b"", f"Content-Length: {length}", *JSON_LINE)
    assert raw.status in (400, 413)


@pytest.mark.parametrize(
    "path",
    [
        "/static/%00", "/static/app.js%00", "/static/../settings.py", "/static/%2e%2e/settings.py",
        "/static/..%2fsettings.py", "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/static/" + "x" * 5000,
        "/static/" + "a/" * 3000, "/static/.", "/static/", "/static/..", "/../settings.py", "/%2e%2e/settings.py",
        "/..%5csettings.py", "/%ff%fe", "//", "/static/..\\settings.py", f"{PREFIX}/../settings.py", f"{PREFIX}//tasks",
        f"{PREFIX}/tasks/", f"{PREFIX}/tasks/1/2/3", "/" + "x" * 20_000, "/data/distribution.db", "/config/distribution_master.json",
    ],
)  # fmt: skip
def test_a_strange_path_leads_nowhere(master: Master, path: str) -> None:
    raw = raw_request(master, f"GET {path}", b"")
    assert raw.status in (400, 404, 405, 414, 422), (raw.head, raw.body[:200])
    assert b"import" not in raw.body and b"SQLite" not in raw.body
    assert raw.document.get("code") or not raw.body, raw.body


def test_a_refused_request_leaves_the_connection_in_order(master: Master, work: dict[str, str]) -> None:
    """What was left unread of a refused body must not be taken for the next request."""
    address = urlsplit(master.url)
    smuggled = f"DELETE {PREFIX}/devices/shop-1 HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
    raw = raw_request(
        master, f"POST {PREFIX}/tasks", smuggled, "Content-Type: text/plain", f"Content-Length: {len(smuggled)}"
    )
    assert raw.status == 415


def test_every_error_is_counted_as_the_askers_and_never_as_ours(master: Master) -> None:
    """The log of this master, after all of the above: no handler failed."""
    assert "a handler failed" not in master.output and "Traceback" not in master.output
