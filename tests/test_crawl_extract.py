"""Which values are taken out of a page?"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from crawl_site import PAGE, Site, fetched, refused, reply, retried, run

from executors.crawl import CrawlExecutor
from executors.web import extract

SHOP = """<h1>One <b>title</b></h1><p class=price> 5\n € </p><p class=price>6</p><a href='/a'>x</a><a href='/b'>y</a>
<ul><li class=item><h2>Shoe</h2><span class=price>10</span><a href=/1>1</a></li>
<li class=item><h2>包</h2><a href=/2>2</a><a href=/3>3</a></li></ul>""".encode()


def test_fields_are_the_text_of_the_first_match_or_of_all(site: Site) -> None:
    site.pages["/x"] = reply(SHOP)
    fields = {
        "title": "h1",
        "price": ".price::text",
        "none": "h3",
        "links": ["body > a::attr(href)"],
        "all": ["p.price"],
    }
    outcome = run(site.url + "/x", fields=fields, follow={})
    assert outcome.result is not None
    assert outcome.result["fields"] == {
        "title": "One title",
        "price": "5 €",
        "none": None,
        "links": ["/a", "/b"],
        "all": ["5 €", "6"],
    }
    assert all(child["required_tags"] == ["selectors"] for child in outcome.new_tasks)
    assert outcome.new_tasks[0]["task_data"]["fields"] == fields


def test_a_selector_that_begins_like_an_xpath_is_one(site: Site) -> None:
    site.pages["/x"] = reply(SHOP)
    fields = {
        "title": "//h1",
        "links": ["//body/a/@href"],
        "second": "(//p)[2]/text()",
        "n": "xpath:count(//p)",
        "none": "//h3",
    }
    assert fetched(site.url + "/x", fields=fields)["fields"] == {
        "title": "One title", "links": ["/a", "/b"], "second": "6", "n": "2.0", "none": None,
    }  # fmt: skip


def test_items_are_records_whose_fields_are_looked_for_inside_each(site: Site) -> None:
    site.pages["/x"] = reply(SHOP)
    for selector in ("li.item", "//li"):
        fields = {"name": "h2", "price": ".price", "links": ["a::attr(href)"], "x": "./h2", "all": "//a/@href"}
        outcome = run(site.url + "/x", items={"selector": selector, "fields": fields}, follow={})
        assert outcome.result is not None
        assert outcome.result["items"] == [
            {"name": "Shoe", "price": "10", "links": ["/1"], "x": "Shoe", "all": "/1"},
            {"name": "包", "price": None, "links": ["/2", "/3"], "x": "包", "all": "/2"},
        ]
        assert outcome.new_tasks[0]["required_tags"] == ["selectors"]
        assert outcome.new_tasks[0]["task_data"]["items"]["selector"] == selector


def test_what_does_not_fit_into_a_result_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/x"] = reply(b"<p>" + b"x" * 90_000 + b"</p>" + b"<i>a</i>" * 30)
    everything = {"fields": {str(i): ["p"] for i in range(60)}}
    assert "find more than" in refused(run(site.url + "/x", **everything))
    monkeypatch.setattr(extract, "MAX_ITEMS", 20)
    result = fetched(site.url + "/x", items={"selector": "i", "fields": {"t": "xpath:text()"}})
    assert (len(result["items"]), result["items_truncated"]) == (20, True)


def test_selectors_work_on_broken_and_empty_pages(site: Site) -> None:
    for body in (b"", b"\0", b"<", b"<p", b"\xff" * 100, b"<!-- ", b"<div>" * 3000):
        site.pages["/x"] = reply(body)
        assert fetched(site.url + "/x", fields={"t": "h1", "all": ["h2"]})["fields"] == {"t": None, "all": []}


# --- JSON


def answer(document: Any) -> Any:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return reply(body, Content_Type="application/json")


def test_an_expression_takes_values_out_of_json(site: Site) -> None:
    site.pages["/api"] = answer({"data": {"items": [{"id": 1, "name": "鞋"}, {"id": 2, "name": "包"}], "next": None}})
    expression = "data.items[?id > `1`].{key: id, name: name}"
    assert fetched(site.url + "/api", jmespath=expression)["data"] == [{"key": 2, "name": "包"}]
    assert fetched(site.url + "/api", jmespath="data.next")["data"] is None
    assert fetched(site.url + "/api", jmespath="length(data.items)", json={"page": 1})["data"] == 2


def test_numbers_that_json_readers_would_change_stay_text(site: Site) -> None:
    site.pages["/api"] = answer(
        b'{"a": 123456789012345678901234567890, "b": NaN, "c": 9007199254740993, "d": -Infinity}'
    )
    data = fetched(site.url + "/api", jmespath="@")["data"]
    assert data == {"a": "123456789012345678901234567890", "b": None, "c": 9007199254740993, "d": None}


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"[" * 100_000, b"\xff", b'{"a": 1' + b"0" * 10_000 + b"}x"])
def test_an_answer_that_is_no_json_is_tried_again(site: Site, body: bytes) -> None:
    site.pages["/api"] = answer(body)
    assert "and no JSON" in retried(run(site.url + "/api", jmespath="a"))


def test_an_expression_that_finds_too_much_is_refused(site: Site) -> None:
    site.pages["/api"] = answer(["x" * 1000] * 5000)
    assert "write a narrower one" in refused(run(site.url + "/api", jmespath="@"))
    assert "fails on" in refused(run(site.url + "/api", jmespath="sum(@)"))


# --- the raw body


def test_the_raw_body_is_kept_as_a_gzip_artifact(site: Site, tmp_path: Path) -> None:
    site.pages["/x"] = reply(gzip.compress(PAGE), Content_Encoding="gzip")
    kept = []
    for n in range(2):
        outcome = run(site.url + "/x", raw=True, follow={}, artifacts=tmp_path / str(n))
        assert outcome.result is not None and outcome.result["artifact"] == "body.gz"
        assert [artifact["name"] for artifact in outcome.artifacts] == ["body.gz"]
        kept.append((tmp_path / str(n) / "body.gz").read_bytes())
    assert gzip.decompress(kept[0]) == PAGE
    assert kept[0] == kept[1]  # so that a second attempt sends nothing new
    assert outcome.new_tasks[0]["task_data"]["raw"] is True


# --- what a device can do


def test_a_device_says_by_tags_what_it_can_extract(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CrawlExecutor().tags == ("selectors", "jmespath")
    monkeypatch.setattr("executors.crawl.is_installed", lambda name: False)
    assert CrawlExecutor().tags == ()


def test_a_device_without_the_libraries_crawls_and_says_what_they_are_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "is_installed", lambda name: False)
    site.pages["/x"] = reply(PAGE)
    assert fetched(site.url + "/x")["links_found"] == 4
    assert 'required_tags ["selectors"]' in refused(run(site.url + "/x", fields={"title": "h1"}))
    assert 'required_tags ["selectors"]' in refused(run(site.url + "/x", items={"selector": "a", "fields": {"t": "b"}}))
    assert 'required_tags ["jmespath"]' in refused(run(site.url + "/x", jmespath="a"))
