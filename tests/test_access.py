"""Who may ask: keys, sessions, hosts, origins, bodies."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import Any

import pytest

import settings
from access import (
    PUBLIC,
    ROLES,
    SESSION_SECONDS,
    Access,
    Failures,
    Refused,
    read_body,
    refuse_key_in_url,
    session_secret,
)
from backups import back_up
from keys import Keys
from store import create_database

KEY = "correct-horse-battery-staple-1234567890"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def configured(**changes: Any) -> settings.Settings:
    return dataclasses.replace(settings.Settings(mode="master"), **changes)


def access(clock: Clock | None = None, **changes: Any) -> Access:
    clock = clock or Clock()
    return Access(configured(**{"api_key": KEY, **changes}), clock=clock, wall=clock)


def request(method: str = "GET", **headers: str) -> dict[str, Any]:
    """An environ; headers are named as HTTP_… without the prefix."""
    environ = {"REQUEST_METHOD": method, "HTTP_HOST": "127.0.0.1:8000", "REMOTE_ADDR": "192.0.2.7"}
    environ["wsgi.url_scheme"] = "http"
    return {**environ, **{f"HTTP_{name.upper()}": value for name, value in headers.items()}}


def refusal(ask: Any, *arguments: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        ask(*arguments)
    return caught.value


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer   {KEY} "},
        {"x_api_key": KEY},
        {"x_api_key": KEY, "authorization": "Bearer other"},
    ],
)
@pytest.mark.parametrize("role", ROLES)
def test_the_right_key_is_let_in_for_every_role(headers: dict[str, str], role: str) -> None:
    assert access().check(request("POST", **headers), role).by == "key"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": "Bearer " + KEY[:-1]},
        {"x_api_key": "ÿ\xff語"},
        {"x_api_key": "x" * 100_000},
        {"cookie": "af_session="},
        {"cookie": "af_session=99999999999.0123456789abcdef.00"},
        {"cookie": 'af_session="; ;=;\xff'},
    ],
)
def test_anything_else_is_401_and_says_nothing_about_the_key(headers: dict[str, str]) -> None:
    refused = refusal(access().check, request(**headers), "viewer")
    assert (refused.status, refused.code) == (401, "unauthorized")
    assert "WWW-Authenticate" in refused.headers
    assert KEY not in refused.detail


def test_no_key_is_needed_only_without_one_and_on_loopback() -> None:
    assert access(api_key="").check(request(), "admin").by == "open"
    assert refusal(access(api_key="", host="0.0.0.0").check, request(), "viewer").status == 401
    assert refusal(access(host="127.0.0.1").check, request(), "viewer").status == 401


def test_an_empty_key_never_matches_an_unset_key() -> None:
    for headers in ({"authorization": "Bearer "}, {"x_api_key": " "}):
        assert refusal(access(api_key="", host="0.0.0.0").check, request(**headers), "viewer").status == 401


def test_what_is_public_needs_no_key() -> None:
    assert access().check(request(), PUBLIC).by == "public"


def test_a_role_that_does_not_exist_is_a_programmers_mistake() -> None:
    with pytest.raises(ValueError, match="unknown role"):
        access().check(request(x_api_key=KEY), "root")


# -- sessions


def cookie_of(header: str) -> str:
    return header.partition(";")[0]


def test_a_session_works_survives_a_restart_and_dies_with_the_key() -> None:
    header = access().log_in(request("POST"), KEY)[1]
    assert "HttpOnly" in header and "SameSite=Strict" in header and "Path=/" in header and "Secure" not in header
    reading = request(cookie="theme=dark; " + cookie_of(header))
    assert access().check(reading, "viewer").by == "session"
    assert refusal(access(api_key=KEY + "2").check, reading, "viewer").status == 401


def test_a_session_ends_after_seven_days() -> None:
    clock = Clock()
    rules = access(clock)
    reading = request(cookie=cookie_of(rules.log_in(request("POST"), KEY)[1]))
    clock.now += 7 * 86_400 - 1
    assert rules.check(reading, "viewer").by == "session"
    clock.now += 1
    assert refusal(rules.check, reading, "viewer").status == 401


def test_a_session_cannot_be_prolonged_by_hand() -> None:
    name, _, value = cookie_of(access().log_in(request("POST"), KEY)[1]).partition("=")
    expires, nonce, key_id, signature = value.split(".")
    forged = f"{name}={int(expires) + 9}.{nonce}.{key_id}.{signature}"
    assert refusal(access().check, request(cookie=forged), "viewer").status == 401


def test_who_reads_a_backup_cannot_sign_a_session(tmp_path: Path) -> None:
    """It has all digests; the secret is beside the database and in no backup, and no session lasts longer than one."""
    path = tmp_path / "distribution.db"
    assert create_database(path)
    secret = session_secret(path)
    place = tmp_path / "distribution.db.sessions"
    assert session_secret(path) == secret == place.read_bytes() and place.stat().st_mode & 0o777 == 0o600
    back_up(path, tmp_path / "copy")
    assert not [one for one in (tmp_path / "copy").rglob("*") if one.is_file() and secret in one.read_bytes()]
    held = Keys(KEY)
    rules, forger = Access(configured(), held, secret=secret), Access(configured(), held)
    assert rules.check(request(cookie=cookie_of(rules.log_in(request("POST"), KEY)[1])), "viewer").by == "session"
    forged = cookie_of(forger.log_in(request("POST"), KEY)[1])
    assert refusal(rules.check, request(cookie=forged), "viewer").status == 401
    key = held.get(0)
    assert key is not None
    signed = f"{int(time.time()) + SESSION_SECONDS + 3600}.{'0' * 16}.0"
    late = f"af_session={signed}.{rules._sign(key, signed)}"
    assert refusal(rules.check, request(cookie=late), "viewer").status == 401


def test_a_session_is_for_tls_only_where_there_is_tls() -> None:
    environ = {**request("POST"), "wsgi.url_scheme": "https"}
    assert access().log_in(environ, KEY)[1].endswith("; Secure")


def test_a_wrong_key_gets_no_session() -> None:
    assert refusal(access().log_in, request("POST"), "wrong").status == 401
    assert refusal(access().log_in, request("POST"), "\ud800").status == 401


def test_log_out_makes_the_browser_forget() -> None:
    assert "Max-Age=0" in access().log_out(request("POST"))


# -- other sites

OURS = [{"sec_fetch_site": "same-origin"}, {"origin": "http://127.0.0.1:8000"}]
STRANGE = [
    {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "same-site"},
    {"sec_fetch_site": "none"},
    {"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1:8000"},
    {"origin": "http://127.0.0.1:8001"},
    {"origin": "https://127.0.0.1:8000"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:8000.evil.example"},
]


def session() -> str:
    return cookie_of(access().log_in(request("POST"), KEY)[1])


@pytest.mark.parametrize("headers", OURS)
def test_a_session_may_write_from_our_own_page(headers: dict[str, str]) -> None:
    assert access().check(request("PUT", cookie=session(), **headers), "operator").by == "session"


@pytest.mark.parametrize("headers", [{}, *STRANGE])
def test_a_session_may_not_write_from_elsewhere(headers: dict[str, str]) -> None:
    refused = refusal(access().check, request("POST", cookie=session(), **headers), "operator")
    assert (refused.status, refused.code) == (403, "foreign_origin")


@pytest.mark.parametrize("headers", STRANGE)
def test_an_open_master_refuses_pages_of_other_sites(headers: dict[str, str]) -> None:
    assert refusal(access(api_key="").check, request("POST", **headers), "operator").code == "foreign_origin"


def test_an_open_master_serves_programs_that_are_no_browser() -> None:
    assert access(api_key="").check(request("POST"), "submitter").by == "open"


def test_a_strange_page_cannot_even_read_from_an_open_master() -> None:
    assert refusal(access(api_key="").check, request(sec_fetch_site="cross-site"), "device").status == 403
    assert access(api_key="").check(request(sec_fetch_site="none"), "viewer").by == "open"


OUR_HOSTS = ["127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "localhost:8000", "LOCALHOST", "10.1.2.3:8000",
             "crawl.example.org", "crawl.example.org:443", "shop:8000"]  # fmt: skip
STRANGE_HOSTS = ["", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
                 "shop:8001", "a b", "[::1", "127.0.0.1@evil.example"]  # fmt: skip


@pytest.mark.parametrize("host", OUR_HOSTS)
def test_our_own_names_are_hosts(host: str) -> None:
    rules = access(api_key="", allowed_hosts=("Crawl.example.org", "shop:8000"))
    assert rules.check({**request(), "HTTP_HOST": host}, "viewer").by == "open"


@pytest.mark.parametrize("host", STRANGE_HOSTS)
def test_a_name_that_is_not_ours_is_refused(host: str) -> None:
    for rules in (access(api_key="", allowed_hosts=("shop:8000",)), access()):
        for role in ("viewer", PUBLIC):
            assert refusal(rules.check, {**request(), "HTTP_HOST": host}, role).code == "host_not_allowed"


def test_a_device_with_the_key_may_use_any_name() -> None:
    assert access().check({**request("POST", x_api_key=KEY), "HTTP_HOST": "master:8000"}, "device").by == "key"


@pytest.mark.parametrize("query", ["key=x", "a=1&token=x", "API_KEY=x", "access_token=", "%6bey=x"])
def test_a_key_in_the_url_is_refused_even_with_a_right_one_in_the_header(query: str) -> None:
    refused = refusal(access().check, {**request(x_api_key=KEY), "QUERY_STRING": query}, "viewer")
    assert (refused.status, refused.code) == (400, "key_in_url")


def test_other_parameters_are_no_keys() -> None:
    refuse_key_in_url({"QUERY_STRING": "text=key%3Dx&unique_key=1&device_id=token"})


# -- wrong keys


def test_the_eleventh_wrong_key_in_a_minute_has_to_wait_and_the_right_one_never() -> None:
    clock = Clock()
    rules = access(clock)
    answers = [refusal(rules.check, request(x_api_key="wrong"), "viewer") for _ in range(12)]
    assert [answer.status for answer in answers] == [401] * 10 + [429] * 2
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert rules.check(request(x_api_key=KEY), "viewer").by == "key"
    assert rules.log_in(request("POST"), KEY)
    other = {**request(x_api_key="wrong"), "REMOTE_ADDR": "192.0.2.8"}
    assert refusal(rules.check, other, "viewer").status == 401
    clock.now += 60.0
    assert refusal(rules.check, request(x_api_key="wrong"), "viewer").status == 401


def test_the_peer_is_the_socket_not_a_header() -> None:
    rules = access()
    for number in range(11):
        refused = refusal(rules.check, request(x_api_key="wrong", x_forwarded_for=f"10.0.0.{number}"), "viewer")
    assert refused.status == 429


def test_no_key_and_a_stale_cookie_are_no_attacks() -> None:
    rules = access()
    for _ in range(30):
        assert refusal(rules.check, request(cookie="af_session=old"), "viewer").status == 401


def test_failures_of_many_peers_do_not_fill_the_memory() -> None:
    failures = Failures(Clock())
    for number in range(10_000):
        failures.add(f"10.{number // 65536}.{number // 256 % 256}.{number % 256}")
    assert len(failures._moments) == 4_096


def test_an_ipv6_network_is_one_peer() -> None:
    failures = Failures(Clock())
    assert [failures.add(f"2001:db8::{number:x}") for number in range(11)][-1] > 0
    assert failures.add("2001:db8:0:1::1") == 0
    assert failures.add("::ffff:192.0.2.1") == 0


# -- bodies


def post(body: bytes, **changes: Any) -> dict[str, Any]:
    environ = {"CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json", "wsgi.input": io.BytesIO(body)}
    return {**environ, **changes}


class Dripping(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 3))


def test_a_body_is_read_whole_once_and_not_further() -> None:
    environ = post(b"x", CONTENT_LENGTH="10", **{"wsgi.input": Dripping(b"0123456789next")})
    assert read_body(environ, 10) == b"0123456789"
    assert read_body(environ, 10) == b"0123456789"


def test_no_body_is_an_empty_one_whatever_its_type() -> None:
    assert read_body({"wsgi.input": io.BytesIO(b"unread")}, 10) == b""


@pytest.mark.parametrize(
    ("environ", "status", "code"),
    [
        (post(b"x" * 11), 413, "too_large"),
        (post(b"", CONTENT_LENGTH="9" * 18), 413, "too_large"),
        (post(b"x", CONTENT_LENGTH="-1"), 400, "bad_length"),
        (post(b"x", CONTENT_LENGTH="1e3"), 400, "bad_length"),
        (post(b"x", CONTENT_LENGTH="5"), 400, "cut_off"),
        (post(b"x", HTTP_TRANSFER_ENCODING="chunked", CONTENT_LENGTH=""), 411, "length_required"),
        (post(b"x", CONTENT_TYPE="text/plain"), 415, "not_json"),
        (post(b"x", CONTENT_TYPE=""), 415, "not_json"),
        (post(b"x", CONTENT_TYPE="application/x-www-form-urlencoded"), 415, "not_json"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(environ: dict[str, Any], status: int, code: str) -> None:
    refused = refusal(read_body, environ, 10)
    assert (refused.status, refused.code) == (status, code)


def test_a_charset_beside_the_type_is_fine() -> None:
    assert read_body(post(b"{}", CONTENT_TYPE="Application/JSON; charset=utf-8"), 10) == b"{}"
