"""Who holds which key: made, shown once, used, traded for a device's token, expired, revoked. Against real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from farm import ROOT, Master, Program, Worker, environment, farm, wait_for
from world import World

import db
import keys
import wire
from access import Access, Refused, Who
from api import Api
from api_keys import KeyHandlers
from dispatcher import Reply
from executors.device import doctor
from master import main, refuse_open_host
from settings import ExitCode, Settings, SettingsError
from store import Store
from transaction import Policy, Tx
from web import Call

KEY = "the-key-of-the-configuration"


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """One master with an api_key for the tests that do not stop it."""
    with farm() as started:
        started.append(Master(tmp_path_factory.mktemp("master"), api_key=KEY))
        yield started[0]  # type: ignore[misc]


_numbers = iter(range(1, 10_000))


def make(master: Master, role: str, **wanted: Any) -> dict[str, Any]:
    made: dict[str, Any] = master.call("POST", "/keys", {"role": role, **wanted})
    return made


def ask(master: Master, key: str, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
    return master.api(method, path, body, headers={"Authorization": f"Bearer {key}"}, **options)


def code(response: requests.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def register(master: Master, key: str, device_id: str, **facts: Any) -> requests.Response:
    body = {"device_id": device_id, "boot_id": "boot-1", "protocol": 1, "task_types": ["echo"], "wants_token": True}
    return ask(master, key, "POST", "/devices/register", {**body, **facts})


def enrolled(master: Master) -> tuple[str, str]:
    """A device of this test's own, and its token."""
    device_id = f"shop-{next(_numbers)}"
    return device_id, register(master, make(master, "enroll")["key"], device_id).json()["token"]


def listed(master: Master, key_id: int, query: str = "") -> dict[str, Any]:
    return next(key for key in master.get(f"/keys{query}")["keys"] if key["id"] == key_id)


# -- made and shown


def test_a_key_is_shown_once_and_never_kept(tmp_path: Path, programs: list[Program]) -> None:
    master = Master(tmp_path, api_key=KEY)
    programs.append(master)
    made = make(master, "operator", name="Ops")
    secret = made["key"].split("_", 2)[2]
    assert len(secret) >= 22 and made["name"] == "Ops"
    assert ask(master, made["key"], "GET", "/devices").status_code == 200
    assert secret not in ask(master, KEY, "GET", "/keys").text
    assert master.stop() == 0
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"key_created" in written and secret.encode() not in written and secret not in master.output


def test_the_last_use_and_a_revocation_outlive_a_restart(tmp_path: Path, programs: list[Program]) -> None:
    master = Master(tmp_path, api_key=KEY)
    programs.append(master)
    made, revoked = make(master, "viewer"), make(master, "viewer")
    assert made["last_used_at"] is None
    ask(master, made["key"], "GET", "/devices").raise_for_status()
    master.call("DELETE", f"/keys/{revoked['id']}")
    before = master.get("/keys")
    assert before["keys"][1]["last_used_from"] == "127.0.0.1" and before["keys"][0]["revoked_at"]
    assert master.stop() == 0
    master.start()
    assert master.get("/keys") == before
    assert code(ask(master, revoked["key"], "GET", "/devices")) == (401, "key_revoked")
    assert ask(master, made["key"], "GET", "/devices").status_code == 200


def test_keys_are_listed_by_pages_and_tokens_of_devices_only_where_asked_for(master: Master) -> None:
    device_id, _ = enrolled(master)
    mine = [make(master, "submitter")["id"] for _ in range(3)]
    page = master.get("/keys?role=submitter&limit=2")
    more = master.get(f"/keys?role=submitter&limit=2&cursor={page['next_cursor']}")
    found = [key["id"] for key in page["keys"] + more["keys"]]
    assert found[:3] == mine[::-1] and sorted(found, reverse=True) == found
    assert "device" not in {key["role"] for key in master.get("/keys")["keys"]}
    [token] = master.get(f"/keys?device_id={device_id}")["keys"]
    assert (token["role"], token["device_id"], token["name"]) == ("device", device_id, device_id)
    assert token["id"] in {key["id"] for key in master.get("/keys?role=device")["keys"]}


@pytest.mark.parametrize("wrong", [{"role": "device"}, {"role": "root"}, {"role": "viewer", "uses": 3}, {"role": "enroll", "days": 0},
                                   {"role": "enroll", "uses": 0}, {"role": "viewer", "name": "a\nb"}])  # fmt: skip
def test_a_key_that_makes_no_sense_is_refused(master: Master, wrong: dict[str, Any]) -> None:
    assert code(master.api("POST", "/keys", wrong)) == (422, "invalid_field")


def test_a_task_says_with_which_key_it_was_submitted(master: Master) -> None:
    made = make(master, "submitter", name="nightly import")
    task = ask(master, made["key"], "POST", "/tasks", {"task_type": "echo"}).json()["id"]
    assert master.get(f"/tasks/{task}")["created_by"] == "nightly import"
    assert master.get(f"/tasks/{master.submit_one()}")["created_by"] == "api_key"


# -- revoked and expired


def test_a_revoked_key_opens_nothing_and_neither_does_its_session_or_its_stream(master: Master) -> None:
    made, other = make(master, "viewer"), make(master, "viewer")
    browser = requests.Session()
    login = browser.post(f"{master.url}/api/distribution/login", json={"key": made["key"]}, timeout=60)
    assert login.status_code == 204 and browser.get(f"{master.url}/api/distribution/devices", timeout=60).ok
    stream = browser.get(f"{master.url}/api/distribution/events", stream=True, timeout=60)
    lines = stream.iter_lines()
    assert next(lines) == b": hello"
    assert master.call("DELETE", f"/keys/{made['id']}")["revoked_at"]
    assert code(ask(master, made["key"], "GET", "/devices")) == (401, "key_revoked")
    assert code(browser.get(f"{master.url}/api/distribution/devices", timeout=60)) == (401, "key_revoked")
    assert browser.get(f"{master.url}/api/distribution/session", timeout=60).json()["role"] is None
    assert not any(b"key_revoked" in line for line in lines)  # it ended before its own end was told
    assert ask(master, other["key"], "GET", "/devices").status_code == 200
    again = master.call("DELETE", f"/keys/{made['id']}")
    assert again == listed(master, made["id"])
    assert code(master.api("DELETE", "/keys/999999")) == (404, "unknown_key")


def request(key: str, **headers: str) -> dict[str, Any]:
    environ = {"REQUEST_METHOD": "GET", "HTTP_HOST": "127.0.0.1", "REMOTE_ADDR": "192.0.2.7", "HTTP_X_API_KEY": key}
    return {**environ, **{f"HTTP_{name.upper()}": value for name, value in headers.items()}}


def key_of(role: str, text: str, key_id: int = 7, **facts: Any) -> keys.Key:
    device_id = "shop-1" if role == "device" else None
    digest = keys.hashlib.sha256(text.encode()).digest()
    return keys.Key(key_id, f"{role}-{key_id}", role, digest, device_id, 0.0, "somebody", **facts)


def refusal(rules: Access, environ: dict[str, Any], role: str = "viewer") -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        rules.check(environ, role)
    return caught.value.status, caught.value.code


def test_a_key_and_its_session_end_at_their_moment() -> None:
    text, now = "afk_7_secret", [1000.0]
    held = keys.Keys(KEY)
    held.put(key_of("viewer", text, expires_at=2000.0))
    rules = Access(Settings(api_key=KEY), held, wall=lambda: now[0])
    cookie = rules.log_in(request(""), text)[1].partition(";")[0]
    now[0] = 1999.0
    assert rules.check(request(text), "viewer").by == "key"
    assert rules.check(request("", cookie=cookie), "viewer").by == "session"
    now[0] = 2000.0
    assert refusal(rules, request(text)) == (401, "key_expired")
    assert refusal(rules, request("", cookie=cookie)) == (401, "key_expired")
    assert rules.check(request(text), "public").role is None


@pytest.mark.parametrize("sent", ["afk_7_Secret", "afk_8_secret", "afk_7_", "afk_07_secret", "afk__secret", "afk_7_secret ", "secret",
                                  "afk_999999999999999999_x", "afk_9999999999999999999_x", "afk_٧_secret", "\xff\xfe", ""])  # fmt: skip
def test_what_is_nearly_a_key_is_none(sent: str) -> None:
    held = keys.Keys()
    held.put(key_of("viewer", "afk_7_secret"))
    assert held.find(sent.encode("utf-8", "surrogatepass")) is None
    assert held.find(b"afk_7_secret") is not None


def test_a_database_key_may_stand_in_the_config_too() -> None:
    """Whoever writes a made admin key into api_key has not locked themselves out when its row is gone."""
    assert keys.Keys("afk_3_made-by-an-older-database").find(b"afk_3_made-by-an-older-database") is not None


def test_a_key_anywhere_in_the_url_is_refused(master: Master) -> None:
    key = make(master, "viewer")["key"]
    assert code(ask(master, KEY, "GET", f"/tasks?text={key}")) == (400, "key_in_url")


def test_the_last_admin_key_cannot_be_revoked_and_the_first_one_closes_an_open_master(
    tmp_path: Path, programs: list[Program]
) -> None:
    master = Master(tmp_path)
    programs.append(master)
    assert master.get("/session") == {"role": "admin", "name": None, "key_needed": False}
    assert code(master.api("POST", "/keys", {"role": "viewer"})) == (409, "admin_key_first")
    master.register("shop-1")
    assert code(master.api("POST", "/keys", {"role": "admin"})) == (409, "devices_without_key")
    master.beat("shop-1", leaving=True)
    first = make(master, "admin")
    assert code(master.api("GET", "/devices")) == (401, "unauthorized")
    assert master.get("/session") == {"role": None, "name": None, "key_needed": True}
    assert code(ask(master, first["key"], "DELETE", f"/keys/{first['id']}")) == (409, "last_admin_key")
    second = ask(master, first["key"], "POST", "/keys", {"role": "admin"}).json()
    assert ask(master, second["key"], "DELETE", f"/keys/{first['id']}").status_code == 200
    master.stop()
    master.start()
    assert code(master.api("GET", "/devices")) == (401, "unauthorized")
    assert ask(master, second["key"], "GET", "/devices").status_code == 200


def test_two_last_admin_keys_cannot_end_each_other_at_the_same_time(world: World) -> None:
    """Both requests saw both keys: what one commit changed is not in the other's memory yet."""
    handlers, held = KeyHandlers(), keys.Keys()
    held.put(*(world.store.write(keys.create, "admin", by="me")[0] for _ in range(2)))
    handlers.store, handlers.access = world.store, Access(Settings(), held)
    handlers.presence, handlers.dispatcher = world.presence, world.dispatcher

    def end(key_id: int, by: int) -> None:
        who = Who(f"admin-{by}", "admin", by, None, "key", "127.0.0.1")
        handlers.revoke_key(Call(b"", wire.Query(""), {"key_id": str(key_id)}, who, {}, {}))

    end(1, by=2)
    with pytest.raises(keys.KeyRefused, match="only admin key"):
        end(2, by=1)
    assert world.rows("SELECT id FROM af_key WHERE revoked_at IS NULL") == [{"id": 2}]


def test_a_database_that_had_an_admin_key_wants_keys_for_ever(world: World) -> None:
    def held() -> keys.Keys:
        found = keys.Keys()
        found.load(world.store)
        return found

    assert Access(Settings(), held()).is_open
    world.store.write(keys.create, "admin", by="me", days=1)
    world.now += 400 * 86400
    assert world.store.write(keys.forget_ended, world.now - 86400, 10) == 1
    world.reopen()
    assert held().newest_first() == [] and not held().has_admin(world.now)
    assert not Access(Settings(), held()).is_open


def test_a_key_has_a_name_of_its_own(master: Master) -> None:
    for name in ("api_key", "API_KEY", "command line", "admin-7"):
        assert code(master.api("POST", "/keys", {"role": "viewer", "name": name})) == (422, "name_reserved")
    first = make(master, "viewer", name="anna")
    assert code(master.api("POST", "/keys", {"role": "admin", "name": "anna"})) == (409, "name_taken")
    master.call("DELETE", f"/keys/{first['id']}")
    assert make(master, "viewer", name="anna")["id"] > first["id"]
    assert register(master, make(master, "enroll")["key"], "anna").status_code == 200  # a device's name is its own


def test_the_configured_key_is_revoked_where_it_is_configured(master: Master) -> None:
    response = master.api("DELETE", "/keys/0")
    assert code(response) == (422, "invalid_field") and "configuration" in response.json()["detail"]


def test_a_master_that_others_can_reach_needs_an_api_key_or_an_admin_key_in_its_database(tmp_path: Path) -> None:
    path = tmp_path / "distribution.db"
    reachable = Settings(mode="master", host="0.0.0.0", database=str(path))
    store = Store(path, policy=Policy(), moments=lambda: (1.0, 1.0))
    store.open()
    try:
        for role in ("viewer", "admin"):
            with pytest.raises(SettingsError, match="every machine could give orders"):
                refuse_open_host(reachable, path)
            store.write(keys.create, role, by="me")
        refuse_open_host(reachable, path)
        store.write(keys.revoke, [2])
        with pytest.raises(SettingsError):
            refuse_open_host(reachable, path)
        refuse_open_host(dataclasses.replace(reachable, api_key=KEY), path)
    finally:
        store.close()
    with pytest.raises(SettingsError):
        refuse_open_host(reachable, tmp_path / "none.db")


# -- devices


def test_an_enroll_key_registers_devices_as_often_as_it_says_and_does_nothing_else(master: Master) -> None:
    made = make(master, "enroll", uses=2)
    assert made["uses_left"] == 2 and made["expires_at"]
    tokens = [register(master, made["key"], f"fleet-{n}").json()["token"] for n in range(2)]
    assert code(register(master, made["key"], "fleet-2")) == (403, "enroll_key_used_up")
    assert code(master.api("GET", "/devices/fleet-2")) == (404, "unknown_device")
    assert listed(master, made["id"])["uses_left"] == 0
    for n, token in enumerate(tokens):
        assert ask(master, token, "GET", f"/tasks/pull?device_id=fleet-{n}&boot_id=boot-1").status_code == 200
    assert code(ask(master, made["key"], "GET", "/tasks/pull?device_id=fleet-0")) == (403, "forbidden")
    refused = ask(master, made["key"], "GET", "/devices")
    assert code(refused) == (403, "forbidden") and "of the role viewer or higher" in refused.json()["detail"]


def test_of_many_devices_with_one_use_exactly_one_gets_in(master: Master) -> None:
    key = make(master, "enroll")["key"]
    barrier, answers = threading.Barrier(8), []

    def race(n: int) -> None:
        barrier.wait(60)
        url, headers = f"{master.url}/api/distribution/devices/register", {"X-API-Key": key}
        body = {"device_id": f"racer-{n}", "boot_id": "b", "protocol": 1, "task_types": [], "wants_token": True}
        answers.append(requests.post(url, json=body, headers=headers, timeout=60).status_code)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answers) == [200] + [403] * 7


def test_an_enroll_key_cannot_take_over_a_device_but_a_lost_reply_costs_nothing(master: Master) -> None:
    made = make(master, "enroll")
    lost = register(master, made["key"], "warehouse").json()["token"]
    token = register(master, made["key"], "warehouse", boot_id="boot-2").json()["token"]
    assert code(ask(master, lost, "GET", "/tasks/pull?device_id=warehouse")) == (401, "key_revoked")
    assert ask(master, token, "GET", "/tasks/pull?device_id=warehouse&boot_id=boot-2").status_code == 200
    assert code(register(master, made["key"], "warehouse", boot_id="boot-3")) == (403, "device_known")
    other = make(master, "enroll", uses=5)
    assert code(register(master, other["key"], "warehouse", boot_id="boot-3")) == (403, "device_known")
    assert listed(master, other["id"])["uses_left"] == 5
    assert ask(master, token, "GET", "/tasks/pull?device_id=warehouse&boot_id=boot-2").status_code == 200


def test_whom_an_enroll_key_may_not_register_is_refused_before_anything_is_done(master: Master) -> None:
    """Also a device without a token of its own, until somebody revokes it."""
    register(master, KEY, "till", wants_token=False).raise_for_status()
    ask(master, KEY, "POST", "/devices/till/heartbeat", {"boot_id": "boot-1", "seq": 1, "leaving": True})

    def known() -> dict[str, Any]:
        return {name: value for name, value in master.get("/devices/till").items() if not name.startswith("seconds_")}

    before = known()
    made = make(master, "enroll")
    for n in range(4):
        assert code(register(master, made["key"], "till", boot_id=f"other-{n}")) == (403, "device_known")
    assert known() == before and before["status"] == "offline"
    assert (
        register(master, KEY, "till", wants_token=False, boot_id="boot-2").json()["status"] == "online"
    )  # no conflict
    assert listed(master, made["id"])["uses_left"] == 1
    assert master.call("POST", "/devices/till/revoke", {}) == {"device_id": "till", "tokens": 0, "tasks": 0}
    assert "token" in register(master, made["key"], "till", boot_id="other").json()
    again = make(master, "enroll")["key"]
    master.call("DELETE", f"/keys/{listed_token(master, 'till')['id']}")
    assert "token" in register(master, again, "till", boot_id="third").json()
    assert code(register(master, make(master, "enroll")["key"], "till")) == (403, "device_known")  # as before all this


def listed_token(master: Master, device_id: str) -> dict[str, Any]:
    found = master.get(f"/keys?device_id={device_id}")["keys"]
    return next(key for key in found if key["revoked_at"] is None)


def test_a_reply_gets_lost_a_few_times_and_only_to_the_key_that_gave_it(master: Master) -> None:
    made = make(master, "enroll", name="the van's")
    for _ in range(keys.TOKENS_OF_A_LOST_REPLY):
        register(master, made["key"], "van").raise_for_status()
    assert code(register(master, made["key"], "van")) == (403, "device_known")
    other = make(master, "enroll", name="a bike's")
    register(master, other["key"], "bike").raise_for_status()
    master.call("DELETE", f"/keys/{other['id']}")
    namesake = make(master, "enroll", name="a bike's")
    assert code(register(master, namesake["key"], "bike")) == (403, "device_known")


def test_the_first_use_of_a_token_is_written_down_at_once(master: Master) -> None:
    """Else after a kill it would be one whose reply got lost, and its enroll key could have the device."""
    device_id, token = enrolled(master)
    ask(master, token, "GET", f"/tasks/pull?device_id={device_id}&boot_id=boot-1").raise_for_status()
    with contextlib.closing(sqlite3.connect(master.folder / "distribution.db")) as connection:
        sql = "SELECT last_used_at FROM af_key WHERE device_id = ?"
        assert connection.execute(sql, (device_id,)).fetchone()[0] is not None


def test_with_a_device_go_its_tokens(master: Master) -> None:
    device_id, token = enrolled(master)
    ask(master, token, "POST", f"/devices/{device_id}/heartbeat", {"boot_id": "boot-1", "seq": 1, "leaving": True})
    master.call("DELETE", f"/devices/{device_id}")
    assert code(ask(master, token, "GET", f"/tasks/pull?device_id={device_id}")) == (401, "key_revoked")
    assert "token" in register(master, make(master, "enroll")["key"], device_id).json()
    with contextlib.closing(sqlite3.connect(master.folder / "distribution.db", timeout=60)) as connection:
        connection.execute("DELETE FROM af_device WHERE device_id = ?", (device_id,))  # as an older master did
        connection.commit()
    assert master.call("DELETE", f"/keys/{listed_token(master, device_id)['id']}")["revoked_at"]


def test_a_pull_that_is_held_ends_with_its_key_of_whatever_kind(master: Master) -> None:
    made = make(master, "admin")
    body = {"device_id": "shared", "boot_id": "boot-1", "protocol": 1, "task_types": ["echo"]}
    ask(master, made["key"], "POST", "/devices/register", body).raise_for_status()
    url = f"{master.url}/api/distribution/tasks/pull?device_id=shared&boot_id=boot-1&wait=25"
    held: list[requests.Response] = []
    pull = threading.Thread(
        target=lambda: held.append(requests.get(url, headers={"X-API-Key": made["key"]}, timeout=60))
    )
    before = master.get("/system/overview")["held_polls"]
    pull.start()
    wait_for("the open pull", lambda: master.get("/system/overview")["held_polls"] > before)
    master.call("DELETE", f"/keys/{made['id']}")
    task = master.submit_one(pinned_device_id="shared")
    pull.join(60)
    assert held[0].json()["tasks"] == [] and master.get(f"/tasks/{task}")["status"] == "pending"
    master.call("POST", f"/tasks/{task}/cancel", {})


def test_what_is_revoked_and_what_is_submitted_in_one_commit_do_not_meet(world: World) -> None:
    world.register("shop-1")
    replies: list[Reply] = []
    pull = threading.Thread(
        target=lambda: replies.append(world.dispatcher.pull("shop-1", "boot-1", 1, 20.0, key_id=5)), daemon=True
    )
    pull.start()
    wait_for("the open pull", lambda: world.dispatcher.is_asking("shop-1"))

    def both(tx: Tx) -> None:
        world.dispatcher.end_keys([5])
        db.submit(tx, [db.NewTask("echo")])

    world.store.write(both)
    pull.join(60)
    assert replies[0].tasks == []
    assert world.dispatcher.pull("shop-1", "boot-1", 1, 20.0, key_id=5).tasks == []
    assert len(world.dispatcher.pull("shop-1", "boot-1", 1, 0.0, key_id=6).tasks) == 1


def test_an_export_breaks_off_when_its_key_ends() -> None:
    is_in_force = iter([True, False])
    access = SimpleNamespace(is_in_force=lambda who: next(is_in_force))
    reads = SimpleNamespace(export=lambda *_, **__: iter([{"id": n} for n in range(5)]))
    call = Call(b"", wire.Query(""), {}, Who("x", "viewer", 1, None, "key", "127.0.0.1"), {}, {})
    lines = Api.export_tasks(SimpleNamespace(access=access, reads=reads), call).content  # type: ignore[arg-type]
    assert list(lines) == [b'{"id":0}\n']
    lines.close()


def test_an_admin_key_gives_a_device_a_new_token_in_place_of_the_old_one(master: Master) -> None:
    old = register(master, KEY, "branch").json()["token"]
    new = register(master, KEY, "branch").json()["token"]
    assert code(ask(master, old, "GET", "/tasks/pull?device_id=branch")) == (401, "key_revoked")
    assert "token" not in register(master, new, "branch").json()
    assert "token" not in register(master, KEY, "branch", wants_token=False).json()
    assert ask(master, new, "GET", "/tasks/pull?device_id=branch&boot_id=boot-1").status_code == 200


def test_a_device_speaks_for_itself_only(master: Master) -> None:
    mine, token = enrolled(master)
    other, others_token = enrolled(master)
    master.submit_one(pinned_device_id=other)
    [task] = ask(master, others_token, "GET", f"/tasks/pull?device_id={other}&wait=5").json()["tasks"]
    lease = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"]}
    upload = f"device_id={other}&name=a.txt&sha256={'0' * 64}&assignment_id={task['assignment_id']}&lease_id=x"
    octets = {"Authorization": f"Bearer {token}", "Content-Type": "application/octet-stream"}
    answers = [
        register(master, token, other),
        ask(master, token, "POST", f"/devices/{other}/heartbeat", {"boot_id": "boot-1", "seq": 1, "holding": []}),
        ask(master, token, "GET", f"/tasks/pull?device_id={other}&wait=5"),
        ask(
            master, token, "POST", "/tasks/report", {"device_id": other, "reports": [{**lease, "outcome": "completed"}]}
        ),
        ask(master, token, "PUT", f"/tasks/{task['id']}/status", {**lease, "status": "completed"}),
        master.api("PUT", f"/tasks/artifacts?{upload}", data=b"a", headers=octets),
    ]
    assert [code(answer) for answer in answers] == [(403, "not_your_device")] * 6
    assert master.get(f"/tasks/{task['id']}")["status"] == "assigned"
    # What it says of another's attempt in its own name changes nothing.
    own = {"device_id": mine, "reports": [{**lease, "outcome": "completed"}]}
    assert ask(master, token, "POST", "/tasks/report", own).json()["reports"][0]["outcome"] == "gone"
    assert (
        ask(master, others_token, "PUT", f"/tasks/{task['id']}/status", {**lease, "status": "completed"}).status_code
        == 200
    )


def test_cancelling_is_an_operators_and_reporting_a_devices_although_both_are_one_route(master: Master) -> None:
    device_id, token = enrolled(master)
    operator, task = make(master, "operator")["key"], master.submit_one(pinned_device_id=device_id)
    path = f"/tasks/{task}/status"
    assert code(ask(master, token, "PUT", path, {"status": "cancelled"})) == (403, "forbidden")
    assert code(ask(master, operator, "PUT", path, {"status": "completed", "lease_id": "x"})) == (403, "forbidden")
    assert ask(master, operator, "PUT", path, {"status": "cancelled"}).status_code == 200


def test_a_revoked_device_is_answered_at_once_and_its_tasks_go_back_uncounted(master: Master) -> None:
    device_id, token = enrolled(master)
    task = master.submit_one(pinned_device_id=device_id)
    pulled = ask(master, token, "GET", f"/tasks/pull?device_id={device_id}&boot_id=boot-1&wait=5").json()["tasks"]
    lease = {"assignment_id": pulled[0]["assignment_id"], "lease_id": pulled[0]["lease_id"]}
    start = {"device_id": device_id, "reports": [{**lease, "outcome": "running"}]}
    assert ask(master, token, "POST", "/tasks/report", start).json()["reports"][0]["outcome"] == "accepted"
    held: list[requests.Response] = []
    headers = {"X-API-Key": token}
    url = f"{master.url}/api/distribution/tasks/pull?device_id={device_id}&boot_id=boot-1&limit=0&wait=25"
    pull = threading.Thread(target=lambda: held.append(requests.get(url, headers=headers, timeout=60)))
    before = master.get("/system/overview")["held_polls"]
    pull.start()
    wait_for("the open pull", lambda: master.get("/system/overview")["held_polls"] > before)
    revoked = master.call("POST", f"/devices/{device_id}/revoke", {"reason": "stolen"})
    assert revoked == {"device_id": device_id, "tokens": 1, "tasks": 1}
    pull.join(20)  # of the 25 s that it would have been held
    assert not pull.is_alive() and held[0].json()["tasks"] == []
    found = master.get(f"/tasks/{task}")
    assert (found["status"], found["lost_count"], found["retry_count"]) == ("pending", 0, 0)
    assert master.get(f"/devices/{device_id}")["status"] == "offline"
    assert code(ask(master, token, "POST", "/tasks/report", start)) == (401, "key_revoked")
    assert master.call("POST", f"/devices/{device_id}/revoke", {})["tokens"] == 0
    assert code(master.api("POST", "/devices/nobody/revoke", {})) == (404, "unknown_device")
    again = register(master, make(master, "enroll")["key"], device_id).json()
    assert ask(master, again["token"], "GET", f"/tasks/pull?device_id={device_id}&boot_id=boot-1").status_code == 200


def test_revoking_a_devices_token_by_its_number_revokes_the_device(master: Master) -> None:
    device_id, token = enrolled(master)
    task = master.submit_one(pinned_device_id=device_id)
    assert ask(master, token, "GET", f"/tasks/pull?device_id={device_id}&wait=5").json()["tasks"]
    [listed_token] = master.get(f"/keys?device_id={device_id}")["keys"]
    master.call("DELETE", f"/keys/{listed_token['id']}")
    assert master.get(f"/tasks/{task}")["status"] == "pending"
    assert code(ask(master, token, "GET", f"/tasks/pull?device_id={device_id}")) == (401, "key_revoked")


# -- a real worker


def is_online(master: Master, device_id: str) -> bool:
    response = master.api("GET", f"/devices/{device_id}")
    return response.status_code == 200 and response.json()["status"] in ("online", "busy")


def run_one(master: Master, device_id: str) -> None:
    task = master.submit_one(pinned_device_id=device_id)
    wait_for("the task's end", lambda: master.get(f"/tasks/{task}")["status"] == "completed")


def test_a_worker_trades_its_enroll_key_for_a_token_and_ends_when_it_is_revoked(
    master: Master, tmp_path: Path, programs: list[Program]
) -> None:
    made = make(master, "enroll")
    worker = Worker(master.url, tmp_path, "pi-1", api_key=made["key"])
    programs.append(worker)
    run_one(master, "pi-1")
    kept = tmp_path / "state" / "pi-1" / "token"
    assert kept.stat().st_mode & 0o777 == 0o600
    secret = kept.read_text().split("_", 2)[2]
    assert secret not in worker.output and secret not in (tmp_path / "pi-1.log").read_text()
    assert worker.stop() == 0
    del worker.settings["api_key"]  # it needs the enroll key no more
    worker.start()
    run_one(master, "pi-1")
    master.call("POST", "/devices/pi-1/revoke", {})
    assert worker.wait() == ExitCode.REFUSED
    assert "revoked" in worker.output and kept.exists()


def test_a_worker_whose_token_is_not_known_registers_with_its_configured_key(
    tmp_path: Path, programs: list[Program]
) -> None:
    master = Master(tmp_path / "master", api_key=KEY, reconnect_seconds=0.5)
    programs.append(master)
    worker = Worker(master.url, tmp_path, "pi-2", api_key=KEY)
    programs.append(worker)
    run_one(master, "pi-2")
    first = (tmp_path / "state" / "pi-2" / "token").read_text()
    assert first != KEY and master.get("/keys?device_id=pi-2")["keys"]
    master.stop()
    with contextlib.closing(sqlite3.connect(tmp_path / "master" / "distribution.db")) as connection:
        connection.execute("DELETE FROM af_key")  # as after the return of a backup that is older than the token
        connection.commit()
    master.start()
    wait_for("the device", lambda: is_online(master, "pi-2"))
    run_one(master, "pi-2")
    assert (tmp_path / "state" / "pi-2" / "token").read_text() != first
    assert "registers again" in worker.output


def test_a_worker_with_a_key_of_another_role_says_so_and_ends(
    master: Master, tmp_path: Path, programs: list[Program]
) -> None:
    worker = Worker(master.url, tmp_path, "pi-3", api_key=make(master, "viewer")["key"])
    programs.append(worker)
    assert worker.wait() == ExitCode.REFUSED
    assert "role viewer" in worker.output and "write an enroll key" in worker.output


def test_a_worker_without_any_key_is_told_where_to_write_one(
    master: Master, tmp_path: Path, programs: list[Program]
) -> None:
    worker = Worker(master.url, tmp_path, "pi-6")
    programs.append(worker)
    assert worker.wait() == ExitCode.REFUSED
    assert "no key to register with; write an enroll key" in worker.output and "AF_API_KEY" in worker.output


def test_the_doctor_knows_whose_key_it_is(master: Master, tmp_path: Path) -> None:
    def said(key: str) -> tuple[str, str]:
        settings = Settings(
            mode="worker", device_id="pi-4", master_url=master.url, state_folder=str(tmp_path), api_key=key
        )
        return next((found.mark, found.text) for found in doctor.Way(settings).findings() if found.name == "key")

    mark, text = said(make(master, "viewer")["key"])
    assert mark == "fix" and "role viewer" in text and "--create-key enroll" in text
    enroll = make(master, "enroll")["key"]
    assert said(enroll) == ("ok", "an enroll key: the first start trades it for a token of this device's own")
    used_up = make(master, "enroll")
    register(master, used_up["key"], "pi-5").raise_for_status()
    mark, text = said(used_up["key"])
    assert mark == "fix" and "registered all the devices" in text and "--create-key enroll" in text
    master.call("DELETE", f"/keys/{used_up['id']}")
    mark, text = said(used_up["key"])
    assert mark == "fix" and "was revoked" in text and "--create-key enroll" in text
    (tmp_path / "pi-4").mkdir()
    (tmp_path / "pi-4" / "token").write_text(register(master, enroll, "pi-4").json()["token"])
    assert said("") == ("ok", "accepted: a token of this device's own")
    master.call("POST", "/devices/pi-4/revoke", {})
    mark, text = said("")
    assert mark == "fix" and "refuses this device's token" in text and "was revoked" in text


# -- the command line


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """master.py with these arguments: its exit code, standard output and standard error."""

    def run(master: Master, *arguments: str, key: str = "") -> tuple[int, str, str]:
        monkeypatch.setenv("AF_API_KEY", key)
        code = main(["--config", str(master._config), *arguments])
        return code, *capsys.readouterr()

    return run


def test_keys_are_made_listed_and_revoked_on_the_command_line_with_and_without_a_running_master(
    tmp_path: Path, programs: list[Program], command: Any
) -> None:
    master = Master(tmp_path)
    programs.append(master)
    master.stop()
    exit_code, out, said = command(master, "--create-key", "viewer")
    assert (exit_code, out) == (ExitCode.SETTINGS, "") and "admin key first" in said
    root = command(master, "--create-key", "admin", "--name", "root")[1].strip()
    exit_code, _, said = command(master, "--revoke-key", "1")
    assert exit_code == ExitCode.SETTINGS and "make another one first" in said
    exit_code, out, said = command(master, "--create-key", "enroll", "--uses", "3", "--days", "2")
    assert exit_code == 0 and "registers 3 devices" in said and out.strip() not in said
    master.start()
    assert code(master.api("GET", "/keys")) == (401, "unauthorized")
    assert command(master, "--list-keys")[0] == ExitCode.REFUSED
    ops = command(master, "--create-key", "operator", "--name", "ops", key=root)[1].strip()
    assert ask(master, ops, "GET", "/devices").status_code == 200
    rows = [row.split()[:3] for row in command(master, "--list-keys", key=root)[1].splitlines()]
    assert rows == [["3", "operator", "ops"], ["2", "enroll", "enroll-2"], ["1", "admin", "root"]]
    assert command(master, "--revoke-key", "3", key=root)[0] == 0
    assert code(ask(master, ops, "GET", "/devices")) == (401, "key_revoked")
    master.stop()
    assert command(master, "--revoke-key", "2")[0] == 0
    for wrong in (["--revoke-key", "9"], ["--revoke-key", "0"], ["--create-key", "device"], ["--create-key", "root"]):
        assert command(master, *wrong)[0] == ExitCode.SETTINGS
    assert "revoked_at" in command(master, "--list-keys")[1]
    master.start()
    told = {
        (row["actor"], row["action"], row["object"]) for row in ask(master, root, "GET", "/audit").json()["entries"]
    }
    assert {("command line", "revoke_key", "2"), ("root", "revoke_key", "3")} <= told


def test_a_wrong_path_makes_no_new_database_to_list_or_revoke_keys_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AF_API_KEY", "")
    path = tmp_path / "no" / "distribution.db"
    for wanted in (["--list-keys"], ["--revoke-key", "1"], ["--backup", str(tmp_path / "copy")]):
        assert main(["--database", str(path), *wanted]) == ExitCode.DATABASE_BAD
        said = capsys.readouterr().err
        assert f"there is no database at {path}" in said and "--config or --database" in said
        assert not path.parent.exists()
    assert main(["--database", str(path), "--create-key", "admin"]) == ExitCode.OK
    said = capsys.readouterr().err
    assert f"there was no database at {path}" in said and "nobody comes in without a key" in said
    assert main(["--database", str(path), "--create-key", "viewer"]) == ExitCode.OK
    said = capsys.readouterr().err
    assert "no database" not in said and "without a key" not in said


def test_a_new_key_is_all_that_goes_to_standard_output(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "master.py"), "--database", str(tmp_path / "new.db"), "--create-key", "admin"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 0 and keys._TEXT.match(done.stdout.encode()) and done.stdout.count("\n") == 1


def test_no_key_and_no_token_gets_into_a_log() -> None:
    import logging

    import settings

    record = logging.LogRecord("x", logging.INFO, "", 0, "the key afk_12_Se-cret_0 came", (), None)
    assert settings.LineFormatter().format(record).endswith("the key afk_12_*** came")
