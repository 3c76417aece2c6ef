"""How is one page fetched, read, and its links turned into tasks? Against a real HTTP server on a loopback port."""

from __future__ import annotations

import gzip
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from executors import crawl, task_executor
from executors.crawl import CrawlExecutor, canonical_url
from executors.task_executor import Outcome

Reply = Callable[[BaseHTTPRequestHandler], None]


def reply(body: bytes = b"", status: int = 200, **headers: str) -> Reply:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Type": "text/html; charset=utf-8", **headers}.items():
            if value:
                handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


class Site:
    """A server whose pages a test writes down; it notes every request."""

    def __init__(self) -> None:
        self.pages: dict[str, Reply] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.connections: set[Any] = set()
        self.stop_dripping = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                site.requests.append((self.command, self.path, dict(self.headers)))
                site.connections.add(self.client_address)
                site.pages.get(self.path, reply(b"not here", 404))(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.host}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def drip(self, before: bytes, drop: bytes) -> Reply:
        """Send `drop` again and again, faster than any time-out between two reads."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.close_connection = True
            handler.wfile.write(before)
            while not self.stop_dripping.wait(0.02):
                handler.wfile.write(drop)

        return answer

    def close(self) -> None:
        self.stop_dripping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def run(url: Any, task: dict[str, Any] | None = None, **task_data: Any) -> Outcome:
    """Run one crawl task as a worker would."""
    whole = {"id": 1, "task_type": "crawl", "batch": "b", "priority": 5, **(task or {})}
    whole["task_data"] = {"url": url, "timeout_seconds": 5, **task_data}
    return task_executor.run(CrawlExecutor(), whole)


def fetched(*arguments: Any, **task_data: Any) -> dict[str, Any]:
    outcome = run(*arguments, **task_data)
    assert outcome.outcome == "completed", outcome
    assert outcome.result is not None
    return outcome.result


def followed(outcome: Outcome) -> list[str]:
    return [child["task_data"]["url"] for child in outcome.new_tasks]


PAGE = b"""<!doctype html><html><head><title> A
 page &amp; more </title><style>p {color: red}</style></head><body>
<p>Hello <b>you</b></p><script>var a = "<a href='/no-link'>";</script>
<a href="/a">a</a> <a href="/a#part">a again</a> <a HREF='b?x=1&amp;y=2'>b</a>
<a href="http://elsewhere.example/">other host</a> <a href="mailto:me@example.com">mail</a>
<a href="javascript:void(0)">js</a> <a name="anchor">no href</a> <map><area href="/area"></map>
</body></html>"""


# --- the result


def test_a_page_is_described_by_exactly_the_promised_fields(site: Site) -> None:
    site.pages["/dir/page"] = reply(PAGE)
    result = fetched(site.url + "/dir/page")
    assert result.pop("elapsed_seconds") > 0
    assert result == {
        "status": 200,
        "final_url": site.url + "/dir/page",
        "title": "A page & more",
        "links_found": 4,
        "text_length": len("Helloyou") + len("aaagainbotherhostmailjsnohref"),
        "bytes": len(PAGE),
        "sha256": hashlib.sha256(PAGE).hexdigest(),
    }


@pytest.mark.parametrize("status", [404, 410, 400, 403, 304])
def test_a_status_below_500_is_a_result_and_its_links_are_not_followed(site: Site, status: int) -> None:
    site.pages["/x"] = reply(b"" if status == 304 else PAGE, status)
    outcome = run(site.url + "/x", follow={})
    assert outcome.outcome == "completed"
    assert outcome.result is not None and outcome.result["status"] == status
    assert outcome.new_tasks == []


def test_a_page_that_is_no_html_has_no_links(site: Site) -> None:
    site.pages["/plain"] = reply(PAGE, Content_Type="text/plain")
    site.pages["/pdf"] = reply(PAGE, Content_Type="application/pdf")
    plain, pdf = run(site.url + "/plain", follow={}), run(site.url + "/pdf", follow={})
    assert plain.result is not None and pdf.result is not None
    assert (plain.result["links_found"], plain.result["title"], plain.new_tasks) == (0, None, [])
    assert (pdf.result["links_found"], pdf.result["text_length"], pdf.new_tasks) == (0, 0, [])
    assert plain.result["text_length"] > 0


def test_html_without_a_content_type_is_html(site: Site) -> None:
    site.pages["/x"] = reply(PAGE, Content_Type="")
    assert fetched(site.url + "/x")["links_found"] == 4


@pytest.mark.parametrize(
    ("header", "before", "encoding"),
    [
        ("text/html; charset=gb2312", "", "gb18030"),
        ("text/html", '<meta charset="gbk">', "gb18030"),
        ("text/html", '<meta http-equiv="Content-Type" content="text/html; charset=Big5">', "big5"),
        ("text/html", "", "utf-8"),
        ("text/html; charset=utf-8", '<meta charset="gbk">', "utf-8"),
        ("text/html; charset=no-such", '<meta charset="gbk">', "gb18030"),
        ("text/html; charset=base64", "", "utf-8"),
        ("text/html; charset=idna", "", "utf-8"),
        ("text/html", "", "utf-8-sig"),
        ("text/html", "", "utf-16"),
    ],
)
def test_the_charset_is_the_headers_else_the_pages_else_utf_8(
    site: Site, header: str, before: str, encoding: str
) -> None:
    body = f"<html><head>{before}<title>中文標題</title></head></html>".encode(encoding)
    site.pages["/x"] = reply(body, Content_Type=header)
    assert fetched(site.url + "/x")["title"] == "中文標題"


def test_wrong_bytes_and_nul_make_a_result_that_can_be_sent(site: Site) -> None:
    site.pages["/x"] = reply(b"<title>a\0b\xff</title><a href='/\xff\0'>x</a><a href='http://[::1'>y</a>")
    result = fetched(site.url + "/x", follow={})
    assert result["title"] == "a\ufffdb\ufffd"


def test_broken_html_gives_what_can_be_read(site: Site) -> None:
    site.pages["/x"] = reply(b"<title>t</title><a href='/a'>a<![x[ <!DOCTYPE [ <a href='/b'>b</a> <b <i")
    assert fetched(site.url + "/x")["title"] == "t"


def test_a_body_is_read_up_to_10_mib_decoded(site: Site) -> None:
    bomb = gzip.compress(b"<title>big</title>" + b"x" * (30 * 1024 * 1024))
    site.pages["/bomb"] = reply(bomb, Content_Encoding="gzip")
    result = fetched(site.url + "/bomb")
    assert (result["bytes"], result["truncated"], result["title"]) == (10 * 1024 * 1024, True, "big")


def test_compressed_and_chunked_pages_are_read_whole(site: Site) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for i in range(0, len(PAGE), 50):
            part = PAGE[i : i + 50]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    site.pages["/chunked"] = chunked
    site.pages["/gzip"] = reply(gzip.compress(PAGE), Content_Encoding="gzip")
    for path in ("/chunked", "/gzip"):
        assert fetched(site.url + path)["sha256"] == hashlib.sha256(PAGE).hexdigest()


def test_a_page_cut_short_is_retried(site: Site) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")

    site.pages["/x"] = short
    outcome = run(site.url + "/x")
    assert (outcome.outcome, outcome.retry) == ("failed", True)


# --- method, headers, sessions


def test_method_and_headers_are_sent_and_head_has_no_body(site: Site) -> None:
    site.pages["/x"] = reply(PAGE)
    result = fetched(site.url + "/x", method="HEAD", headers={"Accept-Language": "zh", "X-Key": "k"})
    method, _, headers = site.requests[0]
    assert (method, headers["Accept-Language"], headers["X-Key"], result["bytes"]) == ("HEAD", "zh", "k", 0)
    assert headers["User-Agent"] == crawl.USER_AGENT


def test_a_thread_keeps_its_connection_but_no_cookies(site: Site) -> None:
    site.pages["/x"] = reply(PAGE, Set_Cookie="secret=1; Path=/")
    for _ in range(3):
        fetched(site.url + "/x")
    assert len(site.connections) == 1
    assert not any("Cookie" in headers for _, _, headers in site.requests)


def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    site.pages["/x"] = reply(PAGE)
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
    outcome = run(site.url + "/0")
    assert (outcome.outcome, outcome.retry) == ("failed", False)
    assert "redirects more than 5 times" in (outcome.error_message or "")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:1", "http://"])
def test_a_redirect_to_anything_but_http_is_refused(site: Site, location: str) -> None:
    site.pages["/x"] = reply(b"", 302, Location=location)
    outcome = run(site.url + "/x")
    assert (outcome.outcome, outcome.retry) == ("failed", False)
    assert location in (outcome.error_message or "")


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


# --- failures


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("120", 120.0),
        ("0", 1.0),
        ("99999999", 3600.0),
        ("", 60.0),
        ("soon", 60.0),
        ("-5", 60.0),
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


def test_5xx_is_retried_after_what_the_server_asks(site: Site) -> None:
    site.pages["/500"] = reply(PAGE, 500)
    site.pages["/503"] = reply(PAGE, 503, Retry_After="7")
    plain, asked = run(site.url + "/500"), run(site.url + "/503")
    assert (plain.outcome, plain.retry, plain.retry_after_seconds) == ("failed", True, None)
    assert (asked.outcome, asked.retry, asked.retry_after_seconds) == ("failed", True, 7.0)
    assert "answered 503" in (asked.error_message or "")


def test_a_refused_connection_is_retried() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        outcome = run(f"http://127.0.0.1:{taken.getsockname()[1]}/")
    assert (outcome.outcome, outcome.retry) == ("failed", True)


@pytest.mark.parametrize(
    ("before", "drop"),
    [
        (b"", b""),
        (b"", b"HTTP/1.1 200"[:1]),
        (b"HTTP/1.1 200 OK\r\n", b"X-Drip: 1\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
)
def test_the_timeout_is_for_the_whole_page_however_slowly_it_drips(site: Site, before: bytes, drop: bytes) -> None:
    site.pages["/x"] = site.drip(before, drop)
    outcome = run(site.url + "/x", timeout_seconds=0.3)
    assert (outcome.outcome, outcome.retry) == ("failed", True)
    assert "took longer than 0.3 s" in (outcome.error_message or "")


def test_the_tasks_own_deadline_bounds_the_timeout(site: Site) -> None:
    site.pages["/x"] = site.drip(b"", b"")
    outcome = run(site.url + "/x", {"execution_timeout_seconds": 0.2}, timeout_seconds=60)
    assert (outcome.outcome, outcome.retry) == ("failed", True)


def test_after_a_timeout_the_thread_crawls_on(site: Site) -> None:
    site.pages["/slow"] = site.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x")
    site.pages["/x"] = reply(PAGE)
    assert run(site.url + "/slow", timeout_seconds=0.1).outcome == "failed"
    assert fetched(site.url + "/x")["status"] == 200


# --- bad task_data


@pytest.mark.parametrize(
    ("task_data", "named"),
    [
        ({"url": None}, "task_data.url"),
        ({"url": 7}, "task_data.url"),
        ({"url": "ftp://example.com/"}, "task_data.url"),
        ({"url": "file:///etc/passwd"}, "task_data.url"),
        ({"url": "example.com"}, "task_data.url"),
        ({"url": "http://"}, "task_data.url"),
        ({"url": "http://example.com:99999/"}, "task_data.url"),
        ({"url": "http://exa mple.com/"}, "task_data.url"),
        ({"url": "http://127.0.0.1/" + "x" * 1100}, "task_data.url"),
        ({"method": "DELETE"}, "task_data.method"),
        ({"headers": ["x"]}, "task_data.headers"),
        ({"headers": {"X-N": 5}}, "task_data.headers"),
        ({"headers": {"X-N": "a\r\nHost: evil"}}, "task_data.headers"),
        ({"headers": {"X-N": "中"}}, "task_data.headers"),
        ({"timeout_seconds": 0}, "task_data.timeout_seconds"),
        ({"timeout_seconds": True}, "task_data.timeout_seconds"),
        ({"depth": -1}, "task_data.depth"),
        ({"follow": True}, "task_data.follow"),
        ({"follow": {"max_page": 5}}, "did you mean max_pages?"),
        ({"follow": {"max_pages": 0}}, "task_data.follow.max_pages"),
        ({"follow": {"max_depth": "2"}}, "task_data.follow.max_depth"),
        ({"follow": {"same_host": "yes"}}, "task_data.follow.same_host"),
        ({"follow": {"allow": "x"}}, "task_data.follow.allow"),
        ({"follow": {"deny": ["ok", "("]}}, "task_data.follow.deny[1]"),
        ({"fields": ["h1"]}, "task_data.fields"),
        ({"fields": {"title": "h1[["}}, "task_data.fields.title"),
        ({"fields": {"title": ["h1", "h2"]}}, "task_data.fields.title"),
    ],
)
def test_wrong_task_data_is_not_retried_and_names_the_field(site: Site, task_data: dict[str, Any], named: str) -> None:
    site.pages["/x"] = reply(PAGE)
    whole = {"url": site.url + "/x", "timeout_seconds": 5, **task_data}
    outcome = task_executor.run(CrawlExecutor(), {"id": 1, "task_data": whole})
    assert (outcome.outcome, outcome.retry, outcome.error_type) == ("failed", False, "DoNotRetry")
    assert named in (outcome.error_message or "")
    assert site.requests == []


# --- URLs


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("HTTP://Example.COM", "http://example.com/"),
        ("http://example.com:80/a", "http://example.com/a"),
        ("https://example.com:443/", "https://example.com/"),
        ("http://example.com:8080/", "http://example.com:8080/"),
        ("http://example.com/a#part", "http://example.com/a"),
        ("http://example.com/a/./b/../c", "http://example.com/a/c"),
        ("http://example.com/../../a/..", "http://example.com/"),
        ("http://example.com/a/b/..", "http://example.com/a/"),
        ("http://example.com/a//b/", "http://example.com/a//b/"),
        ("http://example.com?x=1", "http://example.com/?x=1"),
        ("http://example.com/?", "http://example.com/"),
        ("http://example.com/a b/中?q=中 文", "http://example.com/a%20b/%E4%B8%AD?q=%E4%B8%AD%20%E6%96%87"),
        ("http://example.com/%7euser%2f?100%", "http://example.com/%7Euser%2F?100%25"),
        ("http://user:secret@example.com/", "http://example.com/"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
        ("http://exa\nmple.com/a\tb", "http://example.com/ab"),
        ("http://example.com/\ud800", None),
        ("http://example.com:0x50/", None),
        ("http://[::1", None),
        ("//example.com/", None),
        ("data:text/html,x", None),
    ],
)
def test_one_page_has_one_spelling(url: str, canonical: str | None) -> None:
    assert canonical_url(url) == canonical
    if canonical is not None:
        assert canonical_url(canonical) == canonical


def test_links_are_resolved_against_the_page_or_its_base(site: Site) -> None:
    site.pages["/dir/x"] = reply(
        b'<a href="../up">1</a><a href="?q">2</a><a href="//h.example/p">3</a><a href="">4</a>'
    )
    site.pages["/based"] = reply(b'<base href="/other/"><a href="x">1</a>')
    plain = run(site.url + "/dir/x", follow={"same_host": False})
    assert followed(plain) == [site.url + "/up", site.url + "/dir/x?q", "http://h.example/p"]
    assert followed(run(site.url + "/based", follow={})) == [site.url + "/other/x"]


# --- what comes next


def test_nothing_is_followed_unless_asked_for(site: Site) -> None:
    site.pages["/x"] = reply(PAGE)
    assert run(site.url + "/x").new_tasks == []


def test_a_child_carries_on_what_its_parent_was_told(site: Site) -> None:
    site.pages["/x"] = reply(b'<a href="/a">a</a><a href="/a#2">a</a><a href="/x">self</a><a href="HTTP://x">x</a>')
    follow = {"same_host": True, "max_depth": 3, "max_pages": 50, "deny": ["logout"]}
    task = {"id": 9, "batch": "shop", "priority": 8, "username": "u", "execution_timeout_seconds": 90}
    outcome = run(site.url + "/x", task, follow=follow, headers={"X-Key": "k"}, timeout_seconds=7, depth=1)
    assert outcome.new_tasks == [
        {
            "task_type": "crawl",
            "task_data": {
                "url": site.url + "/a",
                "depth": 2,
                "follow": follow,
                "timeout_seconds": 7,
                "headers": {"X-Key": "k"},
            },
            "unique_key": site.url + "/a",
            "batch": "shop",
            "parent_id": 9,
            "priority": 8,
            "username": "u",
            "execution_timeout_seconds": 90,
            "max_batch_tasks": 50,
        }
    ]


def test_a_task_without_batch_gives_its_children_one(site: Site) -> None:
    site.pages["/x"] = reply(PAGE)
    outcome = run(site.url + "/x", {"id": 9, "batch": None}, follow={"max_pages": 5})
    assert {child["batch"] for child in outcome.new_tasks} == {"crawl-9"}


def test_same_host_allow_deny_and_depth_choose_the_links(site: Site) -> None:
    links = ["/docs/a", "/docs/b.pdf", "/blog", "http://elsewhere.example/docs/"]
    site.pages["/x"] = reply("".join(f'<a href="{link}">x</a>' for link in links).encode())

    def chosen(depth: int = 0, **follow: Any) -> list[str]:
        return [url.removeprefix(site.url) for url in followed(run(site.url + "/x", follow=follow, depth=depth))]

    assert chosen() == ["/docs/a", "/docs/b.pdf", "/blog"]
    assert chosen(same_host=False) == links
    assert chosen(allow=["/docs/"]) == ["/docs/a", "/docs/b.pdf"]
    assert chosen(allow=["/docs/"], deny=[r"\.pdf$"]) == ["/docs/a"]
    assert chosen(max_depth=2, depth=1) == ["/docs/a", "/docs/b.pdf", "/blog"]
    assert chosen(max_depth=2, depth=2) == []
    assert chosen(max_depth=0) == []


def test_only_the_start_page_may_move_the_crawl_to_another_host(site: Site) -> None:
    other = Site()
    try:
        other.pages["/y"] = reply(b'<a href="/z">z</a>')
        site.pages["/x"] = reply(b"", 302, Location=other.url + "/y")
        start = run(site.url + "/x", follow={})
        later = run(site.url + "/x", follow={}, depth=1)
    finally:
        other.close()
    assert followed(start) == [other.url + "/z"]
    assert followed(later) == []


def test_a_page_with_very_many_links_makes_a_report_that_can_be_sent(site: Site) -> None:
    site.pages["/x"] = reply(b"".join(b'<a href="/%d">x</a>' % i for i in range(6000)))
    outcome = run(site.url + "/x", follow={})
    assert outcome.result is not None and outcome.result["links_found"] == 6000
    assert len(outcome.new_tasks) == crawl.MAX_CHILDREN
    fat = run(site.url + "/x", follow={"deny": ["y" * 2000]})
    assert 0 < len(fat.new_tasks) < 2500


# --- fields


def test_fields_are_the_text_of_the_first_match_or_of_all(site: Site) -> None:
    html = "<h1>One <b>title</b></h1><p class=price> 5\n € </p><p class=price>6</p><a href='/a'>x</a><a href='/b'>y</a>"
    site.pages["/x"] = reply(html.encode())
    fields = {"title": "h1", "price": ".price::text", "none": "h2", "links": ["a::attr(href)"], "all": [".price"]}
    outcome = run(site.url + "/x", fields=fields, follow={})
    assert outcome.result is not None
    assert outcome.result["fields"] == {
        "title": "One title",
        "price": "5 €",
        "none": None,
        "links": ["/a", "/b"],
        "all": ["5 €", "6"],
    }
    assert [child["required_tags"] for child in outcome.new_tasks] == [["selectors"]] * 2
    assert outcome.new_tasks[0]["task_data"]["fields"] == fields


def test_a_device_without_parsel_crawls_and_says_what_fields_need(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CrawlExecutor().tags == ("selectors",)
    monkeypatch.setattr(crawl, "has_parsel", lambda: False)
    site.pages["/x"] = reply(PAGE)
    assert CrawlExecutor().tags == ()
    assert fetched(site.url + "/x")["links_found"] == 4
    outcome = run(site.url + "/x", fields={"title": "h1"})
    assert (outcome.outcome, outcome.retry) == ("failed", False)
    assert 'required_tags ["selectors"]' in (outcome.error_message or "")


# --- parallel


def test_parallel_threads_crawl_with_sessions_of_their_own(site: Site) -> None:
    for i in range(8):
        site.pages[f"/{i}"] = reply(f"<title>{i}</title>".encode())
    barrier, titles = threading.Barrier(8), {}

    def one(i: int) -> None:
        barrier.wait(10)
        titles[i] = [fetched(f"{site.url}/{i}")["title"] for _ in range(5)]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert titles == {i: [str(i)] * 5 for i in range(8)}
