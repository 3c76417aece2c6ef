"""Whose address is it, and may it come in? The rules alone, then through a real master behind a proxy that is trusted."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from farm import ROOT, Master, environment, farm
from hypothesis import given
from hypothesis import strategies as some

from access import Access
from addresses import PEER, Addresses, NotAnAddress, is_this_machine, neighbourhood
from settings import ExitCode, Settings

PROXIES = ("127.0.0.1/32", "10.9.0.0/16", "fd00:9::/32")
KEY = "a-key-of-a-test-that-nobody-else-knows"


def recognized(peer: str, forwarded: str | None = None, proxies: tuple[str, ...] = PROXIES, **more: str) -> Any:
    environ: dict[str, Any] = {"REMOTE_ADDR": peer, "wsgi.url_scheme": "http", **more}
    if forwarded is not None:
        environ["HTTP_X_FORWARDED_FOR"] = forwarded
    Addresses(trusted_proxies=proxies).recognize(environ)
    return environ


# ---- the rules


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.7", None, "192.0.2.7"),
        ("192.0.2.7", "127.0.0.1", "192.0.2.7"),  # no proxy of ours: what it says is not read
        ("::ffff:192.0.2.7", None, "192.0.2.7"),
        ("fe80::1%eth0", None, "fe80::1"),
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "192.0.2.7", "192.0.2.7"),
        ("::ffff:127.0.0.1", "192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "203.0.113.5, 192.0.2.7", "192.0.2.7"),  # the left one was sent by the client itself
        ("127.0.0.1", "127.0.0.1, 192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "203.0.113.5, 192.0.2.7, 10.9.0.2", "192.0.2.7"),  # two proxies in a row
        ("127.0.0.1", "10.9.0.3,10.9.0.2", "10.9.0.3"),  # a proxy asks for itself
        ("127.0.0.1", "not an address, 192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "192.0.2.7:51234", "192.0.2.7"),
        ("127.0.0.1", "[2001:db8::7]:51234", "2001:db8::7"),
        ("127.0.0.1", "2001:DB8:0:0::7", "2001:db8::7"),
        ("127.0.0.1", "::ffff:192.0.2.7", "192.0.2.7"),
        ("fd00:9::1", "192.0.2.7", "192.0.2.7"),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_no_proxy_of_ours(
    peer: str, forwarded: str | None, client: str
) -> None:
    environ = recognized(peer, forwarded)
    assert (environ["REMOTE_ADDR"], environ[PEER]) == (client, peer)


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "192.0.2.7", "::ffff:10.9.0.1"])
def test_without_trusted_proxies_nobody_is_believed(peer: str) -> None:
    said = recognized(peer, "203.0.113.5", (), HTTP_X_FORWARDED_PROTO="https")
    assert said["REMOTE_ADDR"] == recognized(peer, None, ())["REMOTE_ADDR"] and said["wsgi.url_scheme"] == "http"


@given(some.text(alphabet="0123456789abcdef:.,[] unkow", max_size=60))
def test_whatever_a_client_writes_into_the_header_it_stays_itself(text: str) -> None:
    assert recognized("127.0.0.1", f"{text}, 192.0.2.7")["REMOTE_ADDR"] == "192.0.2.7"


@pytest.mark.parametrize("entry", ["unknown", "_hidden", "192.0.2", "192.0.2.7.8", "example.org", ",", "1.2.3.4:5:6"])
def test_a_proxy_that_names_no_address_is_a_mistake_and_nobody_is_let_in_by_it(entry: str) -> None:
    with pytest.raises(NotAnAddress):
        recognized("127.0.0.1", entry)


@pytest.mark.parametrize(("said", "scheme"), [("https", "https"), ("http, HTTPS", "https"), ("https, http", "http"),
                                              ("gopher", "http"), ("", "http")])  # fmt: skip
def test_only_a_trusted_proxy_says_that_it_was_asked_with_tls(said: str, scheme: str) -> None:
    assert recognized("127.0.0.1", "192.0.2.7", HTTP_X_FORWARDED_PROTO=said)["wsgi.url_scheme"] == scheme
    assert recognized("192.0.2.7", None, HTTP_X_FORWARDED_PROTO=said)["wsgi.url_scheme"] == "http"


def test_allowed_ips_are_networks_and_never_lock_this_machine_out() -> None:
    rules = Addresses(["192.168.0.0/16", "2001:db8:1::/48"])
    allowed = ("192.168.0.1", "192.168.255.255", "2001:db8:1::1", "127.0.0.1", "127.9.9.9", "::1")
    assert [rules.may_come_in(client) for client in allowed] == [True] * 6
    refused = ("192.169.0.1", "10.0.0.1", "2001:db8:2::1", "::192.168.0.1", "", "192.168.0.1.example.org")
    assert [rules.may_come_in(client) for client in refused] == [False] * 6
    assert Addresses().may_come_in("203.0.113.5") and Addresses().may_come_in("")


def test_a_home_with_a_network_of_its_own_is_one_asker() -> None:
    assert neighbourhood("2001:db8:1:2::3") == neighbourhood("2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    assert neighbourhood("2001:db8:1:3::3") != neighbourhood("2001:db8:1:2::3")
    assert neighbourhood("192.0.2.7") == "192.0.2.7"
    assert [is_this_machine(text) for text in ("127.3.2.1", "::1", "::ffff:127.0.0.1", "192.0.2.7", "")] == [
        True, True, True, False, False,
    ]  # fmt: skip


# ---- a real master; its proxy is this test


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with farm() as started:
        master = Master(
            tmp_path_factory.mktemp("proxied"),
            api_key=KEY,
            trusted_proxies=["127.0.0.1/32"],
            allowed_ips=["192.168.0.0/16"],
            max_requests_per_second=2,
        )
        started.append(master)
        yield master


def ask(master: Master, path: str, client: str | None, method: str = "GET", **options: Any) -> requests.Response:
    forwarded = {"X-Forwarded-For": client} if client else {}
    headers = {"Authorization": f"Bearer {KEY}", **forwarded, **options.pop("headers", {})}
    return requests.request(method, f"{master.url}{path}", headers=headers, timeout=60, **options)


DEVICES = "/api/distribution/devices"


def test_who_is_not_in_allowed_ips_gets_nothing_with_the_right_key_either(proxied: Master) -> None:
    for path in (DEVICES, "/", "/healthz", "/static/app.js", "/no/such/path"):
        reply = ask(proxied, path, "203.0.113.5")
        assert (reply.status_code, reply.json()["code"]) == (403, "address_not_allowed"), path
        assert reply.headers["Content-Type"] == "application/problem+json"
        assert reply.headers["X-Frame-Options"] == "DENY"
    assert ask(proxied, DEVICES, "203.0.113.5, 192.168.1.20").status_code == 200
    assert ask(proxied, DEVICES, "192.168.1.20, 203.0.113.5").status_code == 403
    assert ask(proxied, DEVICES, None).status_code == 200, "this machine is never locked out"


def test_a_proxy_without_an_address_is_told_so(proxied: Master) -> None:
    reply = ask(proxied, DEVICES, "unknown")
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_forwarded_for")


def test_the_device_list_has_the_devices_own_address_behind_a_proxy(proxied: Master) -> None:
    body = {
        "device_id": "shop-1",
        "boot_id": "boot-1",
        "protocol": 1,
        "task_types": ["echo"],
        "max_concurrent_tasks": 1,
    }
    assert ask(proxied, f"{DEVICES}/register", "10.1.1.1, 192.168.1.21", "POST", json=body).status_code == 200
    [device] = ask(proxied, DEVICES, None).json()["devices"]
    assert device["ip_address"] == "192.168.1.21"


def test_behind_a_proxy_with_tls_the_cookie_is_secure_and_browsers_are_told_to_stay(proxied: Master) -> None:
    with_tls = {"X-Forwarded-Proto": "https"}
    login = {"method": "POST", "json": {"key": KEY}}
    reply = ask(proxied, "/api/distribution/login", "192.168.1.22", headers=with_tls, **login)
    assert "Secure" in reply.headers["Set-Cookie"] and "max-age=" in reply.headers["Strict-Transport-Security"]
    reply = ask(proxied, "/api/distribution/login", "192.168.1.22", **login)
    assert "Secure" not in reply.headers["Set-Cookie"] and "Strict-Transport-Security" not in reply.headers


def test_behind_a_proxy_with_tls_the_masters_own_page_is_the_one_with_https(proxied: Master) -> None:
    entered = ask(proxied, "/api/distribution/login", "192.168.1.23", "POST", json={"key": KEY})
    headers = {"Authorization": "", "Cookie": entered.headers["Set-Cookie"].partition(";")[0]}
    headers["X-Forwarded-Proto"] = "https"
    for origin, status in ((proxied.url.replace("http:", "https:"), 201), (proxied.url, 403)):
        reply = ask(proxied, "/api/distribution/tasks", "192.168.1.23", "POST", json={"task_type": "nobody"},
                    headers={**headers, "Origin": origin})  # fmt: skip
        assert reply.status_code == status, reply.text


def test_who_asks_too_often_waits_and_nobody_else_does(proxied: Master) -> None:
    started = time.monotonic()
    replies = [ask(proxied, "/no/such/path", "192.168.1.30") for _ in range(40)]
    refused = [reply for reply in replies if reply.status_code == 429]
    # Two a second, and five seconds' worth at once.
    assert len(replies) - len(refused) <= 11 + 2 * (time.monotonic() - started) and refused
    assert refused[0].json()["code"] == "too_many_requests" and int(refused[0].headers["Retry-After"]) >= 1
    assert ask(proxied, "/healthz", "192.168.1.31").status_code == 200
    assert {ask(proxied, "/healthz", None).status_code for _ in range(40)} == {200}, "this machine is never slowed down"


def test_an_untrusted_peer_cannot_choose_its_address(tmp_path: Path, master: Master) -> None:
    """The same requests to a master that trusts no proxy: they are this machine's, whatever they say."""
    for name in ("X-Forwarded-For", "X_Forwarded_For", "X-Real-IP", "Forwarded", "X-Client-IP", "True-Client-IP"):
        body = {
            "device_id": "spoof",
            "boot_id": "boot-1",
            "protocol": 1,
            "task_types": ["x"],
            "max_concurrent_tasks": 1,
        }
        headers = {name: "203.0.113.66"}
        with contextlib.closing(master.api("POST", "/devices/register", body, headers=headers)) as reply:
            assert reply.status_code == 200, reply.text
        assert [row["ip_address"] for row in master.get("/devices")["devices"]] == ["127.0.0.1"], name


def test_a_proxy_in_front_is_others_who_can_ask_and_so_needs_a_key(tmp_path: Path) -> None:
    """Every request would come from loopback, and an open master would let everybody in."""
    config = tmp_path / "master.json"
    values = {"mode": "master", "port": 0, "database": str(tmp_path / "x.db"), "trusted_proxies": ["127.0.0.1/32"]}
    config.write_text(json.dumps(values))
    command = [sys.executable, str(ROOT / "master.py"), "--config", str(config), "--log-file", str(tmp_path / "log")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert ended.returncode == ExitCode.SETTINGS and "--create-key admin" in ended.stderr
    assert "trusted_proxies" in ended.stderr and "is set, so a key is needed" in ended.stderr
    closed = Access(Settings(mode="master", trusted_proxies=("127.0.0.1/32",)))
    assert not closed.is_open and Access(Settings(mode="master")).is_open
