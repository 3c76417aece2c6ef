"""Which tasks come of a sitemap?"""

from __future__ import annotations

import gzip
from typing import Any

import pytest
from crawl_site import PAGE, Site, fetched, followed, refused, reply, run

from executors.web import follow, sitemap

HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
NAMESPACE = (
    'xmlns="http://www.sitemaps.org/schemas/sitemap/0.9" xmlns:image="http://www.google.com/schemas/sitemap-image/1.1"'
)


def urlset(*urls: str) -> bytes:
    entries = "".join(f"<url><loc>\n {url} </loc><lastmod>2026-11-25</lastmod></url>\n" for url in urls)
    return f"{HEAD}<urlset {NAMESPACE}>{entries}</urlset>".encode()


def index(*urls: str) -> bytes:
    entries = "".join(f"<sitemap><loc>{url}</loc></sitemap>" for url in urls)
    return f"{HEAD}<sitemapindex {NAMESPACE}>{entries}</sitemapindex>".encode()


def xml(body: bytes, **headers: str) -> Any:
    return reply(body, Content_Type="application/xml", **headers)


def test_each_page_of_a_sitemap_becomes_a_task(site: Site) -> None:
    pages = [
        f"{site.url}/a",
        f"{site.url}/b?x=1&amp;y=2",
        f"{site.url}/中",
        f"{site.url}/a#again",
        "http://elsewhere.example/",
    ]
    site.pages["/sitemap.xml"] = xml(urlset(*pages))
    outcome = run(site.url + "/shop/", sitemap=True, follow={"max_depth": 2}, headers={"X-Key": "k"}, raw=True)
    assert followed(outcome) == [f"{site.url}/a", f"{site.url}/b?x=1&y=2", f"{site.url}/%E4%B8%AD"]
    assert outcome.new_tasks[0] == {
        "task_type": "crawl",
        "task_data": {
            "url": f"{site.url}/a", "depth": 1, "follow": {"max_depth": 2}, "raw": True, "timeout_seconds": 60,
            "headers": {"X-Key": "k"},
        },
        "unique_key": f"{site.url}/a", "batch": "b", "parent_id": 1, "priority": 5,
    }  # fmt: skip
    assert outcome.result is not None
    assert (outcome.result["status"], outcome.result["pages_found"], outcome.result["sitemaps_found"]) == (200, 4, 0)
    assert [path for _, path, _ in site.requests] == ["/sitemap.xml"]


def test_the_rules_of_follow_choose_pages(site: Site) -> None:
    pages = [f"{site.url}/p/1", f"{site.url}/p/2.pdf", f"{site.url}/blog", "http://elsewhere.example/p/"]
    site.pages["/sitemap.xml"] = xml(urlset(*pages))

    def chosen(**rules: Any) -> list[str]:
        return followed(run(site.url, sitemap=True, follow=rules))

    assert chosen() == pages[:3]
    assert chosen(allow=["/p/"], deny=[r"\.pdf$"]) == pages[:1]
    assert chosen(same_host=False) == pages
    assert {task["max_batch_tasks"] for task in run(site.url, sitemap=True, follow={"max_pages": 7}).new_tasks} == {7}


def test_a_sitemap_of_sitemaps_becomes_a_task_for_each(site: Site) -> None:
    site.pages["/maps/index.xml"] = xml(
        index(f"{site.url}/m/1.xml", f"{site.url}/m/2.xml.gz", "http://elsewhere.example/m.xml")
    )
    site.pages["/m/2.xml.gz"] = reply(gzip.compress(urlset(f"{site.url}/z")), Content_Type="application/gzip")
    outcome = run(site.url + "/", sitemap="/maps/index.xml", follow={})
    assert [task["task_data"]["sitemap"] for task in outcome.new_tasks] == [
        f"{site.url}/m/1.xml",
        f"{site.url}/m/2.xml.gz",
    ]
    # A sitemap is not the page that has the same URL.
    assert outcome.new_tasks[0]["unique_key"] == f"sitemap:{site.url}/m/1.xml"
    part = outcome.new_tasks[1]["task_data"]
    assert followed(run(part.pop("url"), **part)) == [f"{site.url}/z"]


def test_robots_txt_names_the_sitemaps(site: Site) -> None:
    site.pages["/robots.txt"] = reply(f"User-agent: *\nDisallow: /no\nSitemap: {site.url}/one.xml\n".encode())
    site.pages["/one.xml"] = xml(urlset(f"{site.url}/a", f"{site.url}/no/b"))
    assert followed(run(site.url, sitemap=True)) == [f"{site.url}/a"]  # what it forbids becomes no task
    other = Site()
    try:
        other.pages["/robots.txt"] = reply(b"Sitemap: /one.xml\nSitemap: /two.xml\nSitemap: javascript:1\n")
        outcome = run(other.url, sitemap=True)
        assert [task["task_data"]["sitemap"] for task in outcome.new_tasks] == [
            f"{other.url}/one.xml",
            f"{other.url}/two.xml",
        ]
        assert outcome.result == {"sitemaps_found": 2}
    finally:
        other.close()


def test_a_sitemap_may_be_plain_text_or_packed(site: Site) -> None:
    lines = f"{site.url}/a\n{site.url}/b\r\n\n".encode()
    site.pages["/a.txt"] = reply(lines, Content_Type="text/plain")
    site.pages["/a.txt.gz"] = reply(gzip.compress(lines), Content_Type="application/x-gzip")
    site.pages["/twice.gz"] = reply(gzip.compress(gzip.compress(lines)), Content_Encoding="gzip")
    for path in ("/a.txt", "/a.txt.gz", "/twice.gz"):
        assert followed(run(site.url, sitemap=path)) == [f"{site.url}/a", f"{site.url}/b"]


def test_a_sitemap_too_large_for_one_report_goes_on_in_a_further_task(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "MAX_CHILDREN", 100)
    urls = [f"{site.url}/{i}" for i in range(250)]
    site.pages["/sitemap.xml"] = xml(urlset(*urls))
    found: list[str] = []
    data: dict[str, Any] = {"url": site.url, "sitemap": True}
    keys = set()
    while data:
        new_tasks = run(data.pop("url"), **data).new_tasks
        found += [task["task_data"]["url"] for task in new_tasks if "sitemap" not in task["task_data"]]
        rest = [task for task in new_tasks if "sitemap" in task["task_data"]]
        keys |= {task["unique_key"] for task in rest}
        data = dict(rest[0]["task_data"]) if rest else {}
    assert found == urls
    assert keys == {f"sitemap:{site.url}/sitemap.xml#{offset}" for offset in (100, 200)}


def test_a_sitemap_that_is_not_there_is_a_result(site: Site) -> None:
    result = fetched(site.url, sitemap=True)
    assert (result["status"], result["pages_found"]) == (404, 0)


def test_an_entity_bomb_is_refused_at_its_declaration(site: Site) -> None:
    laughs = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    stolen = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    for declared in (laughs, stolen, '<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1/x"> %a;]>'):
        site.pages["/sitemap.xml"] = xml(
            f"{HEAD}{declared}<urlset><url><loc>{site.url}/&b;</loc></url></urlset>".encode()
        )
        assert "declares XML entities" in refused(run(site.url, sitemap=True))


def test_a_packed_bomb_is_refused(site: Site) -> None:
    bomb = gzip.compress(b"<urlset>" + b" " * (30 * 1024 * 1024))
    site.pages["/sitemap.xml"] = xml(bomb)
    assert "a bomb" in refused(run(site.url, sitemap=True))


@pytest.mark.parametrize(
    "body",
    [b"", b"<", b"<urlset", b"<urlset><url><loc>", b"<a/>", b"\xff\xfe\0", b"<?xml version='1.0' encoding='no-such'?><a/>",
     b"<urlset>" + b"<url>" * 5000, b"\x1f\x8b garbage", b"<urlset><url><loc>" + b"x" * 100_000 + b"</loc></url></urlset>",
     b"\0" * 5000, b"<urlset><url><loc>http://[::1</loc></url></urlset>"],
)  # fmt: skip
def test_nothing_that_a_sitemap_holds_is_a_crash(site: Site, body: bytes) -> None:
    site.pages["/sitemap.xml"] = xml(body)
    outcome = run(site.url, sitemap=True)
    assert outcome.new_tasks == []
    assert outcome.error_type in (None, "Retry", "DoNotRetry"), outcome


def test_broken_xml_gives_the_pages_up_to_there(site: Site) -> None:
    site.pages["/sitemap.xml"] = xml(urlset(f"{site.url}/a").replace(b"</urlset>", b"<url><loc>& broken"))
    outcome = run(site.url, sitemap=True)
    assert followed(outcome) == [f"{site.url}/a"]
    assert outcome.result is not None and outcome.result["truncated"] is True


def test_what_is_no_page_is_left_out(site: Site) -> None:
    body = f"<urlset {NAMESPACE}><loc>{site.url}/0</loc><url><image:image><image:loc>{site.url}/i.png</image:loc></image:image>"
    body += f"<loc>{site.url}/a</loc></url><url><loc>ftp://x/</loc></url><url><loc/></url></urlset>"
    site.pages["/sitemap.xml"] = xml(body.encode())
    assert followed(run(site.url, sitemap=True)) == [f"{site.url}/a"]


def test_an_html_page_is_no_sitemap(site: Site) -> None:
    site.pages["/sitemap.xml"] = reply(PAGE)
    assert "is an HTML page and no sitemap" in refused(run(site.url, sitemap=True))


def test_no_more_than_fifty_thousand_entries_are_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sitemap, "MAX_ENTRIES", 10)
    site.pages["/sitemap.xml"] = xml(urlset(*(f"{site.url}/{i}" for i in range(2000))))
    outcome = run(site.url, sitemap=True)
    assert len(outcome.new_tasks) == 10
    assert outcome.result is not None and outcome.result["truncated"] is True
