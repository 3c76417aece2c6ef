"""How is one page fetched, with bounds on everything that a server may do? By real servers that do it."""

from __future__ import annotations

import gzip
import hashlib
import random
import socket
import ssl
import subprocess
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from crawl_site import PAGE, Site, fetched, raw, refused, reply, retried, run
from farm import wait_for

from executors.web import connection, fetch

MIB = 1024 * 1024
# Without the moment, which would give the same test another name in each process.
packed = partial(gzip.compress, mtime=0)
NO_ROBOTS = {"crawl_obey_robots": False}


# --- method, headers, bodies, sessions


def test_method_and_headers_are_sent_and_head_has_no_body(site: Site) -> None:
    site.pages["/x"] = reply(PAGE)
    result = fetched(site.url + "/x", method="HEAD", headers={"Accept-Language": "zh", "X-Key": "k"})
    method, _, headers = site.requests[0]
    assert (method, headers["Accept-Language"], headers["X-Key"], result["bytes"]) == ("HEAD", "zh", "k", 0)
    assert headers["User-Agent"] == "af-distribution/0.1.0"


def test_the_user_agent_is_the_devices_setting(site: Site) -> None:
    site.pages["/x"] = reply(PAGE)
    fetched(site.url + "/x", settings={"crawl_user_agent": "shop-crawler/1.0 (+https://example.org/bot)"})
    assert site.requests[0][2]["User-Agent"] == "shop-crawler/1.0 (+https://example.org/bot)"


def test_a_form_and_json_are_posted(site: Site) -> None:
    site.pages["/x"] = reply(PAGE)
    fetched(site.url + "/x", form={"q": "鞋 & 包", "size": ["40", 41]})
    fetched(site.url + "/x", json={"page": 1, "名": "值"})
    fetched(site.url + "/x", method="POST")
    kinds = [headers.get("Content-Type") for _, _, headers in site.requests]
    assert [method for method, _, _ in site.requests] == ["POST"] * 3
    assert kinds == ["application/x-www-form-urlencoded", "application/json", None]
    assert site.bodies == [b"q=%E9%9E%8B+%26+%E5%8C%85&size=40&size=41", '{"page": 1, "名": "值"}'.encode(), b""]


def test_threads_share_connections_and_keep_no_cookies(site: Site) -> None:
    site.pages["/x"] = reply(PAGE, Set_Cookie="secret=1; Path=/")
    for _ in range(3):
        fetched(site.url + "/x")
    other = threading.Thread(target=lambda: fetched(site.url + "/x"))
    other.start()
    other.join(60)
    assert (len(site.requests), len(site.connections)) == (4, 1)
    assert not any("Cookie" in headers for _, _, headers in site.requests)


def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    site.pages["/x"] = reply(PAGE)
    assert fetched(site.url + "/x")["status"] == 200


def test_a_kept_connection_that_the_server_closed_is_no_failure(site: Site) -> None:
    def close_silently(handler: BaseHTTPRequestHandler) -> None:
        reply(PAGE)(handler)
        handler.close_connection = True

    site.pages["/x"] = close_silently
    for _ in range(20):
        assert fetched(site.url + "/x")["status"] == 200


# --- redirects


def test_redirects_are_followed_with_cookies_to_the_final_url(site: Site) -> None:
    site.pages["/old"] = reply(b"", 302, Location="../new?q=中".encode().decode("latin-1"), Set_Cookie="seen=1")
    site.pages["/new?q=%E4%B8%AD"] = reply(PAGE)
    result = fetched(site.url + "/old")
    assert (result["status"], result["final_url"]) == (200, site.url + "/new?q=%E4%B8%AD")
    assert site.requests[1][2]["Cookie"] == "seen=1"


def test_five_redirects_are_followed_and_no_sixth(site: Site) -> None:
    for i in range(6):
        site.pages[f"/{i}"] = reply(b"", 301, Location=f"/{i + 1}")
    site.pages["/6"] = reply(PAGE)
    assert fetched(site.url + "/1")["final_url"] == site.url + "/6"
    assert "redirects more than 5 times" in refused(run(site.url + "/0"))


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:1", "gopher://x", "http://"]
)
def test_a_redirect_to_anything_but_http_is_refused(site: Site, location: str) -> None:
    site.pages["/x"] = reply(b"", 302, Location=location)
    assert location in refused(run(site.url + "/x"))


def test_private_headers_do_not_go_along_to_another_host(site: Site) -> None:
    other = Site()
    try:
        other.pages["/y"] = reply(f'<a href="{site.url}/back">back</a><a href="/z">z</a>'.encode())
        site.pages["/x"] = reply(b"", 302, Location=other.url + "/y")
        headers = {"X-Api-Key": "secret", "Authorization": "Bearer s", "Accept-Language": "zh"}
        outcome = run(site.url + "/x", headers=headers, follow={"same_host": False})
    finally:
        other.close()
    assert "X-Api-Key" in site.requests[0][2]
    received = other.requests[0][2]
    assert "X-Api-Key" not in received and "Authorization" not in received
    assert received["Accept-Language"] == "zh"
    passed = {child["unique_key"]: child["task_data"]["headers"] for child in outcome.new_tasks}
    assert passed == {site.url + "/back": headers, other.url + "/z": {"Accept-Language": "zh"}}


@pytest.mark.parametrize(("status", "method", "body"), [(301, "GET", b""), (302, "GET", b""), (303, "GET", b""),
                                                        (307, "POST", b"q=1"), (308, "POST", b"q=1")])  # fmt: skip
def test_a_post_is_redirected_as_browsers_do(site: Site, status: int, method: str, body: bytes) -> None:
    site.pages["/x"] = reply(b"", status, Location="/y")
    site.pages["/y"] = reply(PAGE)
    fetched(site.url + "/x", form={"q": "1"})
    assert (site.requests[1][0], site.bodies[1]) == (method, body)
    assert ("Content-Type" in site.requests[1][2]) == (method == "POST")


def test_what_was_posted_is_not_sent_on_to_another_host(site: Site) -> None:
    other = Site()
    try:
        site.pages["/x"] = reply(b"", 307, Location=other.url + "/y")
        assert "sends what was posted on" in refused(run(site.url + "/x", form={"password": "p"}))
        assert other.requests == []
    finally:
        other.close()


# --- statuses and failures


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("120", 120.0),
        ("0", 1.0),
        ("99999999", 3600.0),
        ("9" * 5000, 3600.0),
        ("", 60.0),
        ("soon", 60.0),
        ("-5", 60.0),
        ("²", 60.0),
        ("Wed, 25 Nov 2026 12:05:00 GMT", 300.0),
        ("Wed, 25 Nov 2020 12:05:00 GMT", 1.0),
    ],
)
def test_429_snoozes_by_retry_after_within_bounds(site: Site, retry_after: str, seconds: float) -> None:
    def busy(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response_only(429)
        handler.send_header("Date", "Wed, 25 Nov 2026 12:00:00 GMT")
        if retry_after:
            handler.send_header("Retry-After", retry_after)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    site.pages["/x"] = busy
    outcome = run(site.url + "/x")
    assert (outcome.outcome, outcome.snooze_seconds) == ("snoozed", seconds)


def test_5xx_is_retried_and_503_snoozes_for_as_long_as_it_asks(site: Site) -> None:
    site.pages["/500"] = reply(PAGE, 500, Retry_After="9")
    site.pages["/503"] = reply(PAGE, 503)
    site.pages["/asks"] = reply(PAGE, 503, Retry_After="7")
    failed, plain, asked = run(site.url + "/500"), run(site.url + "/503"), run(site.url + "/asks")
    assert (failed.outcome, failed.retry, failed.retry_after_seconds) == ("failed", True, 9.0)
    assert (plain.outcome, plain.retry, plain.retry_after_seconds) == ("failed", True, None)
    assert (asked.outcome, asked.snooze_seconds) == ("snoozed", 7.0)
    assert "answered 503" in (asked.error_message or "")


def test_a_refused_connection_is_retried() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        message = retried(run(f"http://127.0.0.1:{taken.getsockname()[1]}/"))
    assert "127.0.0.1 cannot be reached on port" in message and "refused" in message


@pytest.mark.parametrize(
    ("before", "drop"),
    [
        (b"", b""),
        (b"", b"HTTP/1.1 200"[:1]),
        (b"HTTP/1.1 200 OK\r\n", b"X-Drip: 1\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + packed(b"")[:10], b"\0\0\0\xff\xff"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 302 Found\r\nLocation: ", b"/"),
    ],
)
def test_the_timeout_is_for_the_whole_page_however_slowly_it_drips(
    site: Site,
    before: bytes,
    drop: bytes,
) -> None:
    site.pages["/x"] = site.drip(before, drop)
    outcome = run(site.url + "/x", timeout_seconds=0.3, settings=NO_ROBOTS)
    if b"X-Drip" not in drop:  # a hundred headers may come before the time is up, and are too many
        assert "took longer than 0.3 s" in retried(outcome)
    assert outcome.duration_seconds < 30


def test_redirects_share_one_timeout(site: Site) -> None:
    def slowly(handler: BaseHTTPRequestHandler) -> None:
        site.stop_dripping.wait(0.2)
        reply(b"", 302, Location=handler.path + "x")(handler)

    site.pages = {"/" + "x" * i: slowly for i in range(1, 6)}
    outcome = run(site.url + "/x", timeout_seconds=0.5, settings=NO_ROBOTS)
    assert "took longer than 0.5 s" in retried(outcome)


def test_a_tls_handshake_that_drips_ends_in_time(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            peer = listener.accept()[0]
            peer.send(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03")  # a ServerHello of 16 KiB begins
            while not site.stop_dripping.wait(0.02):
                try:
                    peer.send(b"x")
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        outcome = run(f"https://127.0.0.1:{listener.getsockname()[1]}/", timeout_seconds=0.4, settings=NO_ROBOTS)
        assert "took longer than 0.4 s" in retried(outcome)
        assert outcome.duration_seconds < 30


def test_the_tasks_own_deadline_bounds_the_timeout(site: Site) -> None:
    site.pages["/x"] = site.drip(b"", b"")
    retried(run(site.url + "/x", {"execution_timeout_seconds": 0.2}, timeout_seconds=60))


def test_after_a_timeout_the_thread_crawls_on(site: Site) -> None:
    site.pages["/slow"] = site.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x")
    site.pages["/x"] = reply(PAGE)
    assert run(site.url + "/slow", timeout_seconds=0.1).outcome == "failed"
    assert fetched(site.url + "/x")["status"] == 200


def test_a_cancelled_task_ends_its_page(site: Site) -> None:
    site.pages["/x"] = site.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x")
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    outcome = run(site.url + "/x", timeout_seconds=60, is_cancelled=cancelled.is_set)
    assert "cancelled while" in refused(outcome)
    assert outcome.duration_seconds < 30


def test_the_thread_that_keeps_deadlines_ends_when_nothing_is_fetched(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "IDLE_TICKS", 2)
    site.pages["/x"] = reply(PAGE)
    fetched(site.url + "/x")
    names = lambda: [thread.name for thread in threading.enumerate()]  # noqa: E731
    wait_for("the end of the thread", lambda: "crawl deadlines" not in names())


# --- too much


def test_a_body_is_read_up_to_10_mib_unpacked(site: Site) -> None:
    noise = random.Random(1).randbytes(256 * 1024).hex().encode()
    page = b"<title>big</title>" + noise * 60  # 30 MiB at a ratio of a page
    site.pages["/gzip"] = reply(packed(page, 1), Content_Encoding="gzip")
    site.pages["/plain"] = reply(page)
    for path in ("/gzip", "/plain"):
        result = fetched(site.url + path)
        assert (result["bytes"], result["truncated"], result["title"]) == (10 * MIB, True, "big")
        assert result["sha256"] == hashlib.sha256(page[: 10 * MIB]).hexdigest()


def test_a_page_of_200_mb_costs_no_more_memory_than_its_first_10_mib(site: Site) -> None:
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 209715200\r\n\r\n"
        )
        for _ in range(3200):
            handler.wfile.write(b"x" * 65536)
            sent.append(65536)

    site.pages["/x"] = endless
    tracemalloc.start()
    try:
        result = fetched(site.url + "/x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (result["bytes"], result["truncated"]) == (10 * MIB, True)
    assert peak < 25 * MIB  # the body as it grows, and the body as it is kept
    assert sum(sent) < 100 * MIB


BOMB = b"x" * (30 * MIB)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", packed(BOMB)),
        ("x-gzip", packed(BOMB)),
        ("deflate", zlib.compress(BOMB)),
        ("deflate", zlib.compress(BOMB)[2:-4]),
        ("gzip, gzip", packed(packed(BOMB))),
        ("gzip", packed(b"x" * MIB) * 30),
    ],
)
def test_a_bomb_is_refused_before_it_is_unpacked(site: Site, encoding: str, body: bytes) -> None:
    site.pages["/x"] = reply(body, Content_Encoding=encoding)
    tracemalloc.start()
    try:
        message = refused(run(site.url + "/x"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "unpacks to more than 100 times its size" in message
    assert peak < 8 * MIB


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "aes128gcm", "gzip, gzip, gzip, gzip"])
def test_an_encoding_that_was_not_asked_for_is_refused(site: Site, encoding: str) -> None:
    site.pages["/x"] = reply(PAGE, Content_Encoding=encoding)
    refused(run(site.url + "/x"))
    assert site.requests[0][2]["Accept-Encoding"] == "gzip, deflate"


def test_a_flood_that_unpacks_to_nothing_ends(site: Site) -> None:
    empty_block = b"\0\0\0\xff\xff"
    site.pages["/x"] = reply(empty_block * (21 * MIB // 5), Content_Encoding="deflate")
    assert "unpack to next to nothing" in refused(run(site.url + "/x"))


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", packed(PAGE)),
        ("gzip", packed(PAGE[:100]) + packed(PAGE[100:])),
        ("gzip", packed(PAGE) + b"\0" * 100),
        ("GZIP", packed(PAGE)),
        ("deflate", zlib.compress(PAGE)),
        ("deflate", zlib.compress(PAGE)[2:-4]),
        ("deflate, gzip", packed(zlib.compress(PAGE))),
        ("identity", PAGE),
        ("", PAGE),
    ],
)
def test_packed_pages_are_read_whole(site: Site, encoding: str, body: bytes) -> None:
    def in_chunks(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Encoding", encoding)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for i in range(0, len(body), 7):
            part = body[i : i + 7]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    site.pages["/chunked"] = in_chunks
    site.pages["/whole"] = reply(body, Content_Encoding=encoding)
    for path in ("/chunked", "/whole", "/chunked"):
        assert fetched(site.url + path)["sha256"] == hashlib.sha256(PAGE).hexdigest()
    assert len(site.connections) == 1  # read to the end, so it can be used again


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 99 x\r\n\r\n",
        b"HTTP/1.1 1000 x\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 " + b"2" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\0\r\n: x\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 7\r\n\r\nxxxxxxx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nbody\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nbody\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nbody\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nthis is no gzip",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + packed(PAGE)[:50],
        b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n\r\n\xff\xff\xff\xff",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: \0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: " + b"/" * 60_000 + b"\r\n\r\n",
        b"HTTP/1.1 302 Found\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: \xff\xfe; charset=\0\r\nSet-Cookie: =;=;\xff\r\n\r\n<title>\0\xff",
        b"HTTP/1.1 429 x\r\nRetry-After: Wed, 99 Nov 99999 99:99:99 GMT\r\nDate: x\r\n\r\n",
        b"<html>HTTP/0.9</html>",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_nothing_that_a_server_sends_is_a_crash(site: Site, data: bytes) -> None:
    site.pages["/x"] = raw(data)
    outcome = run(site.url + "/x", follow={})
    assert outcome.outcome in ("completed", "failed", "snoozed")
    if outcome.outcome == "failed":
        assert outcome.error_type in ("Retry", "DoNotRetry", "OutOfTime"), outcome
        assert site.url in (outcome.error_message or "")
        assert outcome.log_tail == ""  # no traceback


def test_no_random_answer_is_a_crash(site: Site) -> None:
    pieces = [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 ", b"302 F\r\n", b"Content-Length: ", b"5\r\n", b"\r\n", b"\r\n\r\n", b"\0",
              b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"Location: ", b"/x", b"http://", b"\xff" * 9,
              packed(PAGE), PAGE, b"Content-Type: text/html; charset=", b"utf-7\r\n", b"big5\r\n", b"<a href='", b"[::"]  # fmt: skip
    chance = random.Random(47)
    for _ in range(300):
        site.pages["/x"] = raw(b"HTTP/1.1 200 OK\r\n"[: chance.choice((0, 17))] + b"".join(chance.choices(pieces, k=8)))
        outcome = run(site.url + "/x", follow={}, timeout_seconds=2)
        assert outcome.error_type in (None, "Retry", "DoNotRetry", "OutOfTime", "Snooze"), outcome


# --- TLS: the connection goes to the checked address, the certificate must be the name's


@pytest.fixture
def tls_site(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key,
         "-out", certificate, "-days", "2", "-subj", "/CN=shop.test", "-addext", "subjectAltName=DNS:shop.test"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names: list[str | None] = []
    context.sni_callback = lambda _sock, name, _context: names.append(name)
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(certificate))
    real = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith(".test") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield {"port": int(site.host.rpartition(":")[2]), "names": names}


def test_the_certificate_is_checked_for_the_name_and_not_for_the_address(
    site: Site,
    tls_site: dict[str, Any],
) -> None:
    site.pages["/x"] = reply(b"<title>safe</title>")
    assert fetched(f"https://shop.test:{tls_site['port']}/x")["title"] == "safe"
    assert set(tls_site["names"]) == {"shop.test"}
    message = retried(run(f"https://other.test:{tls_site['port']}/x", settings={"crawl_obey_robots": False}))
    assert "no safe connection" in message and "other.test" in message


def test_the_defaults_of_a_device_are_those_of_its_settings() -> None:
    from settings import Settings

    theirs = {name: getattr(Settings(), f"crawl_{name}") for name in fetch.Manners.__dataclass_fields__}
    assert fetch.Manners(**theirs) == fetch.Manners()
    assert fetch.Manners.from_settings({}) == fetch.Manners()
