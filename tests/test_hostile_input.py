"""What becomes of input that means no good, over bare sockets, on every route of a real master with a key?

Promised: never a 5xx and never a success, every error a problem+json with a code that programs may rely on and with the
security headers, no traceback, path or SQL in it, nothing written, no line of the log that somebody else wrote, and a
master that answers afterwards. `make fuzz` tries everything on every route and prints how much it was.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
from farm import Master, farm, wait_for
from populated import populate

import access
import api
import web
from openapi import Operation
from values import CONTROL

KEY = "correct-horse-battery-staple-1234567890"
PREFIX = "/api/distribution"
CODES = {
    "bad_json", "bad_length", "bad_path", "bad_query", "bad_request", "cut_off", "forbidden", "gone", "host_not_allowed", "invalid_field",
    "key_in_url", "length_required", "method_not_allowed", "missing_field", "not_found", "not_json", "not_octets", "too_deep", "too_large",
    "too_many_failures", "unauthorized", "unknown_artifact", "unknown_batch", "unknown_device", "unknown_field", "unknown_key", "unknown_lane",
    "unknown_limit", "unknown_task",
}  # fmt: skip
LEAKS = re.compile(
    rb"Traceback|File \"|SELECT |UPDATE |INSERT |sqlite|/main/|/tmp/|\.db\b|bottle|granian|" + KEY.encode()
)
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|DEBUG) ")
WHOLE = (
    "af_crawl_tasks",
    "af_task_assignment",
    "af_task_payload",
    "af_task_result",
    "af_artifact",
    "af_batch",
    "af_pause",
    "af_limit",
)
COUNTED = ("af_device", "af_key")  # the master itself writes into their rows, when one was heard or used
tried: Counter[str] = Counter()


class NoHandlers:
    def __getattr__(self, name: str) -> Any:
        return lambda call: None


TABLE = [(prefix, row.operation) for prefix, some in api.routes(NoHandlers()) for row in some]  # type: ignore[arg-type]
TAKING = [row for prefix, row in TABLE if row.request is not None]
ASKED = [row for prefix, row in TABLE if prefix and row.method == "GET"]
NAMED = [row for prefix, row in TABLE if prefix and "{" in row.path]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Master, dict[str, str]]]:
    with farm() as programs:
        master = Master(tmp_path_factory.mktemp("hostile"), api_key=KEY)
        programs.append(master)
        yield master, populate(master)


@pytest.fixture
def master(house: tuple[Master, dict[str, str]]) -> Iterator[Master]:
    """What is kept must be the same before and after each test, and the master must be there and say nothing odd."""
    master = house[0]
    before = kept(master)
    yield master
    assert kept(master) == before
    assert master.get("/system/overview")["version"] and master.process.poll() is None
    strange = [line for line in master.lines[1:] if not LOG_LINE.match(line) and not line.startswith("ready ")]
    assert not strange, strange[:20]
    assert KEY not in master.output


@pytest.fixture
def names(house: tuple[Master, dict[str, str]]) -> dict[str, str]:
    return house[1]


@pytest.fixture
def connection(master: Master) -> Iterator[hostile.Connection]:
    made = hostile.Connection(master.url)
    yield made
    made.close()


def kept(master: Master) -> Any:
    """What people and programs have put into the database, and what is wanted of each device."""
    file = f"file:{master.settings['database']}?mode=ro"
    with contextlib.closing(sqlite3.connect(file, uri=True)) as database:
        rows = [database.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in WHOLE]
        counts = [database.execute(f"SELECT count(*) FROM {name}").fetchone() for name in COUNTED]
    devices = master.get("/devices")["devices"]
    wanted = [(device["device_id"], device["wanted"], device["device_name"]) for device in devices]
    return rows, counts, wanted, master.get("/strategy")


def filled(row: Operation, names: dict[str, str]) -> str:
    return PREFIX + re.sub(r"\{(\w+)\}", lambda found: names[found[1]], row.path)


def ask(connection: hostile.Connection, method: str, target: str, body: bytes = b"", *headers: str) -> hostile.Reply:
    given = headers or (f"X-API-Key: {KEY}", "Content-Type: application/json")
    line, sent = f"{method} {target} HTTP/1.1", b"" if method == "GET" else body
    length = f"Content-Length: {len(sent)}"
    return connection.ask(hostile.request(line, f"Host: {connection.host}", *given, length, body=sent))


def refused(reply: hostile.Reply, what: Any, *statuses: int) -> None:
    """A refusal of ours: whole, with a known code, in few words, and with every header that protects a browser."""
    assert 400 <= reply.status < 500 and (not statuses or reply.status in statuses), (what, reply)
    assert reply.header("Content-Type") == "application/problem+json", (what, reply)
    document = json.loads(reply.body)
    assert document["code"] in CODES and document["status"] == reply.status, (what, document)
    assert document["detail"] and len(document["detail"]) <= 500 and not LEAKS.search(reply.body), (what, document)
    missing = [name for name in access.SECURITY_HEADERS if reply.header(name) is None]
    assert not missing and not re.search(r"\d", reply.header("Server") or ""), (what, reply.head)


def kept_out(reply: hostile.Reply, what: Any, sent: hostile.Sent) -> None:
    """As above, or by the server below us, without a word; it may close when a request is not whole, or too much."""
    by_the_server = (400, 413, 414, 431, 505) + ((0,) if sent.half_close or len(sent.data) > 500_000 else ())
    if reply.status in by_the_server and not reply.body:
        return
    if sent.ok and reply.status == 200:
        assert reply.body.startswith(sent.ok), (what, reply)
        return
    refused(reply, what)


# -- in `make test` each input goes to one route in turn, and each route gets its share; `make fuzz` tries them all


def share(rows: list[Operation], inputs: dict[str, Any], every: int) -> Iterator[tuple[Operation, str, Any]]:
    for place, row in enumerate(rows):
        for n, (name, given) in enumerate(inputs.items()):
            if (n + place) % every == 0:
                yield row, name, given


def statuses_for(row: Operation, raw: bytes) -> tuple[int, ...]:
    """413 for what is larger than the route takes; 400 for what is no JSON from its first byte on; else what is wrong first decides, its kind or how it goes on."""
    if len(raw) > web.largest_body(row, 8 * 1024 * 1024):
        return (413,)
    begins = raw.lstrip(b" \t\r\n")[:1]
    return (400, 413, 422) if begins and begins in b'{["-0123456789tfn' else (400,)


ALL = pytest.param(1, marks=pytest.mark.slow)


@pytest.mark.parametrize("every", [4, ALL])
def test_a_bad_body_is_refused_by_every_route(
    master: Master, names: dict[str, str], connection: hostile.Connection, every: int
) -> None:
    assert len(hostile.bodies()) >= 120
    for row, name, raw in share(TAKING, hostile.bodies(), every):
        reply = ask(connection, row.method, filled(row, names), raw)
        refused(reply, (row.method, row.path, name), *statuses_for(row, raw))
        tried["bodies"] += 1


@pytest.mark.parametrize("every", [4, ALL])
def test_a_bad_query_is_refused_by_every_route(
    master: Master, names: dict[str, str], connection: hostile.Connection, every: int
) -> None:
    for row, name, query in share([row for prefix, row in TABLE if prefix], hostile.QUERIES, every):
        reply = ask(connection, row.method, f"{filled(row, names)}?{query}", b'{"x": 1}')
        kept_out(reply, (row.method, row.path, name), hostile.Sent(b""))
        tried["queries"] += 1
    reading = [row for row in ASKED if row.path not in ("/events", "/openapi.json")]
    for row, name, query in share(reading, hostile.UNKNOWN, every):
        refused(ask(connection, "GET", f"{filled(row, names)}?{query}"), (row.path, name), 422)
        tried["queries"] += 1


@pytest.mark.parametrize("every", [4, ALL])
def test_a_bad_name_in_a_path_leads_nowhere(
    master: Master, names: dict[str, str], connection: hostile.Connection, every: int
) -> None:
    for row, name, bad in share(NAMED, hostile.NAMES, every):
        target = PREFIX + re.sub(r"\{(\w+)\}", bad.replace("\\", r"\\"), row.path)
        reply = ask(
            connection, row.method, target, b'{"device_name": "n", "status": "active", "boot_id": "b", "seq": 9}'
        )
        refused(reply, (row.method, row.path, name), 400, 404, 405, 422)
        tried["names"] += 1


@pytest.mark.parametrize("every", [25, ALL])
def test_a_bad_head_is_refused_by_every_route(
    master: Master, names: dict[str, str], connection: hostile.Connection, every: int
) -> None:
    uploads = [row for _, row in TABLE if row.request_type != "application/json"]
    for place, row in enumerate([*TAKING, *uploads]):
        for n, (name, sent) in enumerate(hostile.heads(row.method, filled(row, names), connection.host, KEY)):
            if (n + place) % every == 0:
                kept_out(connection.once(sent), (row.method, row.path, name), sent)
                tried["heads"] += 1


def test_what_is_no_request_of_ours_is_refused(master: Master, connection: hostile.Connection) -> None:
    for name, sent in hostile.lines(connection.host, KEY):
        kept_out(connection.once(sent), name, sent)
        tried["requests"] += 1


def test_without_a_key_nobody_looks_at_what_was_sent(
    master: Master, names: dict[str, str], connection: hostile.Connection
) -> None:
    for prefix, row in TABLE:
        path = filled(row, names) if prefix else row.path
        if row.role == access.PUBLIC:
            continue
        for query, body in (("", b"{"), ("x=%ff", b""), ("x=1", b'{"a":' * 1000)):
            reply = ask(connection, row.method, f"{path}?{query}", body, "Content-Type: text/plain")
            refused(reply, (row.method, row.path), 401)
            assert reply.header("WWW-Authenticate"), reply.head
            tried["without a key"] += 1


def test_keys_that_are_none_are_refused_and_told_to_nobody(master: Master, connection: hostile.Connection) -> None:
    for given in (
        "Authorization: Bearer", f"Authorization: {KEY}", f"Authorization: Basic {KEY}", f"Authorization: Bearer {KEY}x", "Authorization: Bearer \xff\xfe",
        "Authorization: Bearer " + "x" * 20_000, "X-API-Key: afk_1_", "X-API-Key: afk_99999999999999999999_x", "X-API-Key: afk_-1_x", "X-API-Key: afk_\xb2_x", "X-API-Key: '",
        "Cookie: af_session=", "Cookie: af_session=99999999999.0123456789abcdef.00", "Cookie: af_session=" + "9" * 5000 + ".0123456789abcdef.00", "Cookie: af_session=\xff.\xff.\xff",
        f"Cookie: af_session={KEY}",
    ):  # fmt: skip
        refused(ask(connection, "GET", f"{PREFIX}/devices", b"", given), given, 401, 429)
        tried["without a key"] += 1


def test_a_body_that_never_ends_is_refused_unread(master: Master, connection: hostile.Connection) -> None:
    head = hostile.request(f"POST {PREFIX}/tasks HTTP/1.1", f"Host: {connection.host}", f"X-API-Key: {KEY}",
                           "Content-Type: application/json", "Transfer-Encoding: chunked")  # fmt: skip
    reply = connection.once(hostile.Sent(head + b"10000\r\n" + b" " * 65_536 + b"\r\n" + (b"1\r\n \r\n" * 100_000)))
    refused(reply, "a chunked flood", 411)
    tried["requests"] += 1


def test_what_was_tried_is_counted_and_the_log_has_no_line_of_a_stranger(master: Master) -> None:
    """Last of this file: the figure of docs/guarantees.md; in `make test` it is that of a part."""
    log = Path(master.settings["log_file"])
    wait_for("the log", log.exists)
    for line in log.read_text(encoding="utf-8").splitlines():
        assert LOG_LINE.match(line), line
        assert not line.startswith(hostile.MARK) and "Traceback" not in line and KEY not in line, line
    with contextlib.closing(sqlite3.connect(f"file:{master.settings['database']}?mode=ro", uri=True)) as database:
        told = database.execute("SELECT action, object, outcome, detail FROM af_audit").fetchall()
    unfit = [row for row in told if any(len(text or "") > 1000 or CONTROL.search(text or "") for text in row)]
    assert told and not unfit, unfit[:3]
    assert sum(tried.values()) > 500
    print(f"\nbad inputs tried: {sum(tried.values()):,} ({', '.join(f'{n:,} {what}' for what, n in tried.items())})")
