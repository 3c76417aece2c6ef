"""Who did what, from where, and how it ended: written down for all that people and programs change."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from farm import Master, Program, farm
from world import World

import audit
import keys
from access import Refused, Who
from reads import Reads
from scheduler import Scheduler, Times
from writer import WriterBusy

KEY = "the-key-of-the-configuration"
SOMEBODY = Who("ops", "operator", 3, None, "key", "192.0.2.7")


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with farm() as started:
        started.append(Master(tmp_path_factory.mktemp("master"), api_key=KEY))
        yield started[0]  # type: ignore[misc]


_numbers = iter(range(1, 10_000))


def entries(master: Master, **filters: Any) -> list[dict[str, Any]]:
    """Newest first."""
    found: list[dict[str, Any]] = master.call("GET", "/audit", params={"limit": 200, **filters})["entries"]
    return found


@pytest.fixture
def key(master: Master) -> dict[str, Any]:
    """An operator's key of this test's own."""
    made: dict[str, Any] = master.call("POST", "/keys", {"role": "operator", "name": f"ops-{next(_numbers)}"})
    return made


def ask(master: Master, key: str, method: str, path: str, body: Any = None) -> requests.Response:
    return master.api(method, path, body, headers={"Authorization": f"Bearer {key}"})


def test_what_somebody_changed_is_told_with_who_from_where_and_how_it_ended(
    master: Master, key: dict[str, Any]
) -> None:
    task = ask(master, key["key"], "POST", "/tasks", {"task_type": "echo"}).json()["id"]
    ask(master, key["key"], "POST", f"/tasks/{task}/cancel", {"reason": "a mistake"})
    ask(master, key["key"], "POST", f"/tasks/{task}/cancel", {})
    ask(master, key["key"], "PUT", "/devices/nobody/status", {"status": "disabled", "reason": "stolen"})
    ask(master, key["key"], "PUT", f"/tasks/{task}/status", {"status": "cancelled"})
    ask(master, key["key"], "POST", "/tasks/actions", {"action": "requeue", "filter": {"batch": "b"}, "dry_run": True})
    ask(master, key["key"], "GET", "/tasks")
    told = [(row["action"], row["object"], row["outcome"], row["detail"]) for row in entries(master, actor=key["name"])]
    assert told[::-1] == [
        ("cancel_task", str(task), "ok", {"reason": "a mistake"}),
        ("cancel_task", str(task), "ok", {}),
        ("set_device_status", "nobody", "unknown_device", {"status": "disabled", "reason": "stolen"}),
        ("cancel_task", str(task), "ok", {}),
        ("act_on_tasks", None, "ok", {"do": "requeue", "filter": {"batch": "b"}, "dry_run": True, "changed": 0}),
    ]
    row = entries(master, actor=key["name"])[0]
    assert (row["role"], row["key_id"], row["address"]) == ("operator", key["id"], "127.0.0.1")


def test_what_devices_say_and_what_is_submitted_is_not_told(master: Master, key: dict[str, Any]) -> None:
    before = entries(master)[0]["id"]
    master.submit(*[{"task_type": "echo"}] * 3)
    master.register("shop-1")
    master.beat("shop-1")
    [task] = master.pull("shop-1")
    assert master.report("shop-1", task, "completed")["outcome"] == "accepted"
    assert [row for row in entries(master) if row["id"] > before] == []


def test_logins_are_told_and_wrong_ones_are_counted(tmp_path: Any, programs: list[Program]) -> None:
    master = Master(tmp_path, api_key=KEY)
    programs.append(master)
    browser, url = requests.Session(), f"{master.url}/api/distribution"
    for _ in range(13):
        requests.post(f"{url}/login", json={"key": "wrong"}, timeout=60)
    assert browser.post(f"{url}/login", json={"key": KEY}, timeout=60).status_code == 204
    assert browser.post(f"{url}/logout", json={}, headers={"Origin": master.url}, timeout=60).status_code == 204
    requests.post(f"{url}/logout", json={}, timeout=60)  # by nobody: no row, or anybody could fill the table
    told = {(row["actor"], row["action"], row["outcome"]): row["detail"] for row in entries(master)}
    assert told == {
        ("api_key", "login", "ok"): {"count": 1},
        ("127.0.0.1", "refused", "unauthorized"): {"count": 10, "first": "POST /login"},
        ("127.0.0.1", "refused", "too_many_failures"): {"count": 3, "first": "POST /login"},
    }
    # What is counted is written at the stop, too, and a minute that goes on stays one row.
    assert requests.get(f"{url}/devices", headers={"X-API-Key": "wrong"}, timeout=60).status_code == 429
    assert requests.get(f"{url}/devices?token=x", timeout=60).status_code == 400
    assert master.stop() == 0
    master.start()
    counted = {row["outcome"]: row["detail"] for row in entries(master, action="refused")}
    assert counted["too_many_failures"] == {"count": 4, "first": "POST /login"}
    assert counted["key_in_url"] == {"count": 1, "first": "GET /devices"} and len(entries(master)) == 4


def test_a_small_key_cannot_wash_the_log_away(master: Master) -> None:
    made = master.call("POST", "/keys", {"role": "viewer", "name": "the wall"})
    headers = {"Authorization": f"Bearer {made['key']}"}
    for _ in range(3):
        master.api("POST", "/login", {"key": made["key"]}).raise_for_status()
        master.api("POST", "/logout", {}, headers=headers).raise_for_status()
        assert master.api("POST", "/login", {}, headers=headers).status_code == 422
    told = [(row["action"], row["outcome"], row["address"]) for row in entries(master, actor="the wall")]
    assert 1 <= len(told) <= 2 and set(told) == {("login", "ok", "127.0.0.1")}  # 2 where a minute went by
    assert sum(row["detail"]["count"] for row in entries(master, actor="the wall")) == 3
    logins = master.get("/events/history?verb=login&limit=200")["events"]
    assert 1 <= len([event for event in logins if event["facts"]["by"] == "the wall"]) <= 2


def test_who_made_a_key_and_who_logs_in_is_for_admins_only(master: Master) -> None:
    viewer = master.call("POST", "/keys", {"role": "viewer"})
    headers = {"Authorization": f"Bearer {viewer['key']}"}
    master.api("POST", "/login", {"key": viewer["key"]}).raise_for_status()
    with master.api("GET", "/events", headers=headers, stream=True) as stream:
        lines = stream.iter_lines()
        assert next(lines) == b": hello"
        master.call("POST", "/keys", {"role": "viewer"})
        master.call("PUT", "/strategy", {"strategy": "random"})
        seen = b""
        while b"strategy" not in seen:
            seen = next(lines)
            assert b"access" not in seen and b"key_created" not in seen
    assert master.get("/events/history?kind=access")["events"]
    for query in ("", "?kind=access", "?verb=login"):
        events = master.call("GET", f"/events/history{query}", headers=headers)["events"]
        assert "access" not in {event["kind"] for event in events}


def test_who_may_not_is_counted_under_the_name_of_the_key(master: Master, key: dict[str, Any]) -> None:
    for _ in range(3):
        assert ask(master, key["key"], "POST", "/keys", {"role": "admin"}).status_code == 403
    [row] = entries(master, actor=key["name"])
    assert (row["action"], row["outcome"], row["detail"]) == (
        "refused",
        "forbidden",
        {"count": 3, "first": "POST /keys"},
    )
    master.call("DELETE", f"/keys/{key['id']}")
    assert ask(master, key["key"], "GET", "/tasks").status_code == 401
    assert entries(master, actor=key["name"])[0]["outcome"] == "key_revoked"


def test_the_life_of_keys_and_devices_is_told_without_a_secret(master: Master) -> None:
    made = master.call("POST", "/keys", {"role": "enroll", "name": "van", "days": 2, "uses": 3})
    token = master.call(
        "POST", "/devices/register", {"device_id": "van-1", "boot_id": "b", "protocol": 1, "task_types": []},
        headers={"Authorization": f"Bearer {made['key']}"},
    )["token"]  # fmt: skip
    master.call("POST", "/devices/van-1/revoke", {"reason": "lost"})
    master.call("DELETE", f"/keys/{made['id']}")
    text = master.api("GET", "/audit?limit=200").text
    assert made["key"] not in text and token not in text and "afk_" not in text and KEY not in text
    rows = [row for row in entries(master) if row["object"] in ("van-1", str(made["id"]))]
    assert [(row["action"], row["detail"]) for row in rows] == [
        ("revoke_key", {"role": "enroll", "name": "van"}),
        ("revoke_device", {"reason": "lost", "tokens": 1, "tasks": 0}),
        ("create_key", {"role": "enroll", "name": "van", "days": 2, "uses": 3}),
    ]


def test_the_log_is_filtered_and_read_by_pages(master: Master, key: dict[str, Any]) -> None:
    for n in range(5):
        ask(master, key["key"], "POST", f"/task-types/type-{n}/{'pause' if n % 2 else 'resume'}", {})
    mine = entries(master, actor=key["name"])
    assert [row["object"] for row in mine] == [f"type-{n}" for n in (4, 3, 2, 1, 0)]
    assert [row["object"] for row in entries(master, actor=key["name"], action="pause_type")] == ["type-3", "type-1"]
    assert entries(master, actor=key["name"], outcome="forbidden") == []
    first = master.call("GET", "/audit", params={"actor": key["name"], "limit": 3})
    rest = master.call("GET", "/audit", params={"actor": key["name"], "limit": 3, "cursor": first["next_cursor"]})
    assert first["entries"] + rest["entries"] == mine and rest["next_cursor"] is None
    middle = mine[2]["at"]
    since, until = entries(master, actor=key["name"], since=middle), entries(master, actor=key["name"], until=middle)
    assert since + until == mine and mine[2] in since
    assert entries(master, since="2100-01-01T00:00:00Z") == []
    assert entries(master, actor=key["name"], until="2100-01-01T00:00:00Z") == mine
    assert master.api("GET", "/audit?who=me").json()["code"] == "unknown_field"


def test_on_an_open_master_the_actor_is_the_address(programs: list[Program], tmp_path: Any) -> None:
    master = Master(tmp_path)
    programs.append(master)
    master.call("PUT", "/strategy", {"strategy": "random"})
    [row] = entries(master)
    assert (row["actor"], row["role"], row["key_id"], row["action"]) == ("127.0.0.1", "admin", None, "set_strategy")


# -- in one process, with a clock of its own


@pytest.fixture
def book(world: World) -> Iterator[audit.Audit]:
    reads = Reads(world.path, connections=1)
    yield audit.Audit(world.store, reads)
    reads.close()


def refuse(book: audit.Audit, address: str, code: str = "unauthorized", status: int = 401) -> None:
    book.count(Refused(status, code, "no"), None, address, "GET /tasks")


def counts(book: audit.Audit) -> list[tuple[str, str, int]]:
    return [(row["address"], row["outcome"], row["detail"]["count"]) for row in book.page(limit=200)["entries"]]


def test_refusals_are_a_row_for_each_address_code_and_minute(world: World, book: audit.Audit) -> None:
    for _ in range(3):
        refuse(book, "192.0.2.1")
    refuse(book, "192.0.2.2")
    refuse(book, "192.0.2.1", "too_many_requests", 429)
    refuse(book, "192.0.2.1", "cut_off", 400)  # which is no refusal to come in
    first = [("192.0.2.1", "unauthorized", 3), ("192.0.2.2", "unauthorized", 1), ("192.0.2.1", "too_many_requests", 1)]
    assert counts(book) == first[::-1]
    world.now += 30
    refuse(book, "192.0.2.1")
    assert ("192.0.2.1", "unauthorized", 4) in counts(book) and len(counts(book)) == 3
    world.now += 31
    assert len(counts(book)) == 3  # the minute is over
    refuse(book, "192.0.2.1")
    assert counts(book)[0] == ("192.0.2.1", "unauthorized", 1) and len(counts(book)) == 4


def test_a_flood_of_addresses_fills_neither_the_memory_nor_the_table(world: World, book: audit.Audit) -> None:
    for n in range(audit.REFUSALS_A_MINUTE + 500):
        refuse(book, f"10.0.{n // 256}.{n % 256}")
    book.flush()
    assert len(book._counted) == audit.REFUSALS_A_MINUTE + 1
    assert counts(book)[0] == ("others", "unauthorized", 500)
    assert world.rows("SELECT count(*) AS n FROM af_audit") == [{"n": audit.REFUSALS_A_MINUTE + 1}]


def test_old_rows_and_old_keys_are_deleted_after_their_time(world: World) -> None:
    times = Times(10, 60, 300, **{name: 365 for name in Times.__annotations__ if name.endswith("_days")})
    scheduler = Scheduler(world.store, world.dispatcher, world.presence, times)
    tell = lambda: world.store.write(audit.record, SOMEBODY, "set_strategy", detail={})  # noqa: E731
    tell()
    kept, gone, expired = (
        world.store.write(keys.create, "viewer", by="me", days=days)[0].id for days in (None, None, 1)
    )
    world.store.write(keys.revoke, [gone])
    world.now += 300 * 86400
    tell()
    world.store.write(scheduler.forget_audit)
    assert len(world.rows("SELECT id FROM af_audit")) == 2 and len(world.rows("SELECT id FROM af_key")) == 3
    world.now += 67 * 86400
    world.store.write(scheduler.forget_audit)
    assert len(world.rows("SELECT id FROM af_audit")) == 1
    assert world.rows("SELECT id FROM af_key") == [{"id": kept}], (gone, expired)


def test_the_table_has_an_end_however_much_is_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_ROWS", 10)
    for _ in range(25):
        world.store.write(audit.record, SOMEBODY, "set_strategy", detail={})
    assert world.store.write(audit.forget, 0.0, 500) == 15
    assert [row["id"] for row in world.rows("SELECT id FROM af_audit ORDER BY id")] == list(range(16, 26))


def test_what_anybody_can_cause_goes_first_when_there_is_too_much(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_ROWS", 10)
    for action in ["set_strategy", *["login", "refused"] * 6, *["set_limits"] * 8]:
        world.store.write(audit.record, SOMEBODY, action, detail={})
    for _ in range(3):
        world.store.write(audit.forget, 0.0, 5)
    left = [row["action"] for row in world.rows("SELECT action FROM af_audit ORDER BY id")]
    assert left == ["set_strategy", "login", *["set_limits"] * 8]


def test_who_may_do_something_does_not_hang_on_whether_it_can_be_written_down() -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise WriterBusy("no room")

    book = audit.Audit(SimpleNamespace(write=busy, moments=lambda: (0.0, 0.0)), None)  # type: ignore[arg-type]
    book.tell(SOMEBODY, "set_strategy")
