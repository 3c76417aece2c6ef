"""How is one page described, and which tasks come of it? Against a real HTTP server on a loopback port."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
from crawl_site import LOOPBACK, PAGE, Site, fetched, followed, refused, reply, run

from executors import task_executor
from executors.crawl import CrawlExecutor
from executors.web import follow as following

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
        ({"headers": {"Host": "internal"}}, "task_data.headers.Host"),
        ({"headers": {"transfer-encoding": "chunked"}}, "task_data.headers.transfer-encoding"),
        ({"headers": {"Content-Length": "5"}}, "task_data.headers.Content-Length"),
        ({"headers": {"Proxy-Authorization": "x"}}, "task_data.headers.Proxy-Authorization"),
        ({"headers": {"a b": "x"}}, "task_data.headers"),
        ({"headers": {"": "x"}}, "task_data.headers"),
        ({"method": "GET", "form": {"a": "b"}}, "task_data.method"),
        ({"form": ["a"]}, "task_data.form"),
        ({"form": {"a": None}}, "task_data.form"),
        ({"form": {"a": "b"}, "json": {}}, "task_data.form"),
        ({"json": "x" * 1_100_000}, "task_data.json"),
        ({"sitemap": 5}, "task_data.sitemap"),
        ({"sitemap": "ftp://x/"}, "task_data.sitemap"),
        ({"sitemap": True, "method": "POST"}, "task_data.sitemap"),
        ({"sitemap": True, "sitemap_offset": -1}, "task_data.sitemap_offset"),
        ({"raw": "yes"}, "task_data.raw"),
        ({"jmespath": 5}, "task_data.jmespath"),
        ({"jmespath": "a["}, "task_data.jmespath"),
        ({"items": ["li"]}, "task_data.items"),
        ({"items": {"selector": "li"}}, "task_data.items"),
        ({"items": {"selector": "li[[", "fields": {"a": "b"}}}, "task_data.items.selector"),
        ({"items": {"selector": "li", "fields": {"a": "//["}}}, "task_data.items.fields.a"),
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
        ({"fields": {"title": "//h1["}}, "task_data.fields.title"),
        ({"fields": {"title": ""}}, "task_data.fields.title"),
    ],
)
def test_wrong_task_data_is_not_retried_and_names_the_field(site: Site, task_data: dict[str, Any], named: str) -> None:
    site.pages["/x"] = reply(PAGE)
    whole = {"url": site.url + "/x", "timeout_seconds": 5, **task_data}
    outcome = task_executor.run(CrawlExecutor(), {"id": 1, "task_data": whole}, settings=LOOPBACK)
    assert (outcome.outcome, outcome.retry, outcome.error_type) == ("failed", False, "DoNotRetry")
    assert named in (outcome.error_message or "")
    assert site.requests == []


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


def test_spellings_of_one_page_are_one_task(site: Site) -> None:
    site.pages["/x"] = reply(
        b'<a href="/a?b=1&c=2">1</a><a href="/a?c=2&b=1#f">2</a><a href="/%61?b=1&c=2">3</a><a href="/./x">x</a>'
    )
    outcome = run(site.url + "/x", follow={})
    # Fetched as it was written first, known by its canonical URL.
    assert [(c["task_data"]["url"], c["unique_key"]) for c in outcome.new_tasks] == [(site.url + "/a?b=1&c=2",) * 2]


def test_the_start_page_is_not_fetched_again_whichever_page_links_it(site: Site) -> None:
    """Its task has no key of its own in the batch."""
    site.pages["/"] = reply(b'<a href="/a">a</a>')
    site.pages["/a"] = reply(b'<a href="/">home</a><a href="/b">b</a>')
    (first,) = run(site.url + "/", follow={}).new_tasks
    second = run(**first["task_data"])
    assert [new_task["unique_key"] for new_task in second.new_tasks] == [site.url + "/b"]
    assert second.new_tasks[0]["task_data"]["start"] == site.url + "/"


def test_a_key_that_is_not_known_is_refused_with_the_one_that_was_meant(site: Site) -> None:
    assert "did you mean fields?" in refused(run(site.url + "/", feilds={"a": "b"}))
    assert site.requests == []


def test_a_child_gets_no_body_and_no_expression(site: Site) -> None:
    site.pages["/x"] = reply(PAGE)
    outcome = run(site.url + "/x", form={"q": "1"}, follow={}, headers={"X-Key": "k"})
    assert [set(c["task_data"]) for c in outcome.new_tasks] == [
        {"url", "depth", "start", "follow", "timeout_seconds", "headers"}
    ] * 3
    assert outcome.new_tasks[0]["task_data"]["headers"] == {"X-Key": "k"}


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
    assert len(outcome.new_tasks) == following.MAX_CHILDREN
    fat = run(site.url + "/x", follow={"deny": ["y" * 2000]})
    assert 0 < len(fat.new_tasks) < 2500


# --- parallel


def test_parallel_threads_crawl_with_sessions_of_their_own(site: Site) -> None:
    for i in range(8):
        site.pages[f"/{i}"] = reply(f"<title>{i}</title>".encode())
    barrier, titles = threading.Barrier(8), {}

    def one(i: int) -> None:
        barrier.wait(60)
        titles[i] = [fetched(f"{site.url}/{i}")["title"] for _ in range(5)]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert titles == {i: [str(i)] * 5 for i in range(8)}


# --- the document


def test_the_document_names_every_key_setting_and_tag() -> None:
    from executors.web.fetch import Manners
    from executors.web.order import FOLLOW_KEYS, Order

    text = (Path(__file__).resolve().parent.parent / "docs" / "crawl.md").read_text(encoding="utf-8")
    keys = {*Order.__dataclass_fields__, *FOLLOW_KEYS, "form", "json"} - {"body", "passed_on"}
    settings = {f"crawl_{name}" for name in Manners.__dataclass_fields__}
    missing = [name for name in (*sorted(keys | settings), *CrawlExecutor().tags) if f"`{name}" not in text]
    assert missing == []
