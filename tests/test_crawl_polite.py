"""What does a site ask crawlers not to do, and when may a device ask it again?"""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from crawl_site import PAGE, Site, fetched, followed, refused, reply, retried, run

from executors.task_executor import DoNotRetry, Retry, Snooze
from executors.web import robots
from executors.web.politeness import Politeness
from executors.web.robots import MAX_BYTES, MAX_ORIGINS, Robots, Rules, linear_protego

ROBOTS = b"User-agent: *\nDisallow: /private\nAllow: /private/open\nCrawl-delay: 0\nSitemap: /map.xml\n"


# --- robots.txt


def test_what_robots_txt_forbids_is_not_fetched(site: Site) -> None:
    site.pages["/robots.txt"] = reply(ROBOTS, Content_Type="text/plain")
    site.pages["/private"] = site.pages["/ok"] = reply(PAGE)
    message = refused(run(site.url + "/private"))
    assert "robots.txt of" in message and "crawl_obey_robots" in message
    assert fetched(site.url + "/ok")["status"] == 200
    assert [path for _, path, _ in site.requests] == ["/ok"]


def test_a_device_whose_owner_may_crawl_there_can_ignore_it(site: Site) -> None:
    site.pages["/robots.txt"] = reply(ROBOTS)
    site.pages["/private"] = reply(PAGE)
    assert fetched(site.url + "/private", settings={"crawl_obey_robots": False})["status"] == 200
    assert site.robots_requests == 0


def test_links_that_robots_txt_forbids_become_no_tasks(site: Site) -> None:
    site.pages["/robots.txt"] = reply(ROBOTS)
    site.pages["/x"] = reply(b'<a href="/a">a</a><a href="/private/b">b</a><a href="/private/open">c</a>')
    assert followed(run(site.url + "/x", follow={})) == [site.url + "/a", site.url + "/private/open"]


def test_a_redirect_to_what_is_forbidden_is_not_followed(site: Site) -> None:
    site.pages["/robots.txt"] = reply(ROBOTS)
    site.pages["/x"] = reply(b"", 302, Location="/private")
    refused(run(site.url + "/x"))
    assert [path for _, path, _ in site.requests] == ["/x"]


def test_the_rules_are_those_for_our_name(site: Site) -> None:
    site.pages["/robots.txt"] = reply(b"User-agent: *\nDisallow:\n\nUser-agent: shop-crawler\nDisallow: /\n")
    site.pages["/x"] = reply(PAGE)
    named = {"crawl_user_agent": "shop-crawler/2.1 (+https://example.org)"}
    assert "shop-crawler" in refused(run(site.url + "/x", settings=named))
    assert fetched(site.url + "/x")["status"] == 200
    assert "shop-crawler" in refused(run(site.url + "/x", headers={"user-agent": "Shop-Crawler/1"})).lower()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_robots_txt_that_is_not_there_allows_everything(site: Site, status: int) -> None:
    site.pages["/robots.txt"] = reply(b"User-agent: *\nDisallow: /\n", status)
    site.pages["/x"] = reply(PAGE)
    assert fetched(site.url + "/x")["status"] == 200


@pytest.mark.parametrize(
    "body", [b"<html>Disallow: /</html>", b"\xff\xfe\0garbage", b"", b"User-agent\nDisallow /\n\0"]
)
def test_an_answer_that_is_no_robots_txt_holds_no_rules(site: Site, body: bytes) -> None:
    site.pages["/robots.txt"] = reply(body)
    site.pages["/x"] = reply(PAGE)
    assert fetched(site.url + "/x")["status"] == 200


def test_a_site_whose_rules_cannot_be_had_is_not_crawled(site: Site) -> None:
    site.pages["/robots.txt"] = reply(b"", 500)
    site.pages["/x"] = reply(PAGE)
    assert "/robots.txt answered 500" in retried(run(site.url + "/x"))
    retried(run(site.url + "/x"))
    assert (site.requests, site.robots_requests) == ([], 1)  # known for some seconds


def test_a_robots_txt_that_says_later_is_asked_later(site: Site) -> None:
    site.pages["/robots.txt"] = reply(b"", 503, Retry_After="40")
    outcome = run(site.url + "/x")
    assert (outcome.outcome, outcome.snooze_seconds) == ("snoozed", 40.0)


def test_robots_txt_is_redirected_and_cut_at_500_kib(site: Site) -> None:
    other = Site()
    try:
        rules = b"User-agent: *\nDisallow: /early\n" + b"# filler\n" * 60_000 + b"Disallow: /late\n"
        other.pages["/robots.txt"] = reply(rules)
        site.pages["/robots.txt"] = reply(b"", 301, Location=other.url + "/robots.txt")
        site.pages["/late"] = reply(PAGE)
        refused(run(site.url + "/early"))
        assert fetched(site.url + "/late")["status"] == 200
    finally:
        other.close()


def test_robots_txt_is_fetched_once_for_all_slots_and_without_the_tasks_headers(site: Site) -> None:
    seen = []

    def slowly(handler: BaseHTTPRequestHandler) -> None:
        seen.append(dict(handler.headers))
        site.stop_dripping.wait(0.2)
        reply(b"")(handler)

    site.pages["/robots.txt"] = slowly
    site.pages["/x"] = reply(PAGE)
    threads = [
        threading.Thread(target=run, args=(site.url + "/x",), kwargs={"headers": {"X-Key": "k"}}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (site.robots_requests, len(site.requests)) == (1, 4)
    assert "X-Key" not in seen[0]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rules_are_kept_for_an_hour_and_for_so_many_origins() -> None:
    clock, asked = Clock(), []

    def fetch_text(url: str) -> str:
        asked.append(url)
        return ""

    robots = Robots(fetch_text, clock)
    robots.of("http://a.test")
    clock.now += 3599
    robots.of("http://a.test")
    assert len(asked) == 1
    clock.now += 2
    robots.of("http://a.test")
    assert asked == ["http://a.test/robots.txt"] * 2
    for i in range(MAX_ORIGINS):
        robots.of(f"http://{i}.test")
    robots.of("http://a.test")
    assert len(asked) == MAX_ORIGINS + 3


def test_a_failure_is_known_to_those_who_waited_and_soon_asked_again() -> None:
    clock, asked = Clock(), []

    def fetch_text(url: str) -> str:
        asked.append(url)
        raise Retry("away")

    robots = Robots(fetch_text, clock)
    for _ in range(3):
        with pytest.raises(Retry, match="away"):
            robots.of("http://a.test")
    clock.now += 6
    with pytest.raises(Retry):
        robots.of("http://a.test")
    assert len(asked) == 2


@pytest.mark.parametrize("has_protego", [True, False])
def test_rules_are_read_with_and_without_protego(has_protego: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_protego:
        monkeypatch.setitem(sys.modules, "protego", None)
    rules = Rules(
        "User-agent: af-distribution\nDisallow: /no\nCrawl-delay: 7\n\nUser-agent: *\nDisallow: /\nSitemap: http://a/m\n"
    )
    assert rules.allows("http://a/yes", "af-distribution") and not rules.allows("http://a/no/x", "af-distribution")
    assert not rules.allows("http://a/yes", "other")
    assert (rules.delay_seconds("af-distribution"), rules.sitemaps()) == (7.0, ["http://a/m"])
    assert Rules("User-agent: *\nCrawl-delay: 86400").delay_seconds("x") == 30.0
    assert Rules("User-agent: *\nCrawl-delay: soon").delay_seconds("x") == 0.0


def test_with_protego_the_longest_rule_and_wildcards_count() -> None:
    rules = Rules("User-agent: *\nDisallow: /private\nAllow: /private/open\nDisallow: /*.pdf$\n")
    assert rules.allows("http://a/private/open", "x") and not rules.allows("http://a/private/x", "x")
    assert not rules.allows("http://a/b/c.pdf", "x") and rules.allows("http://a/c.pdf?x", "x")


@pytest.mark.timeout(120)  # what backtracks takes much longer
def test_wildcards_cost_a_time_that_grows_with_the_path_and_no_faster() -> None:
    rule = "Disallow: /*a*a*a*a*b$\n"
    rules = Rules("User-agent: *\n" + rule * (MAX_BYTES // len(rule)))
    assert rules.allows("http://a/" + "a" * 1000, "x") and not rules.allows("http://a/" + "a" * 1000 + "b", "x")


def test_a_protego_that_backtracks_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear_protego() is not None
    monkeypatch.setattr(robots.metadata, "version", lambda name: "0.5.0")
    assert linear_protego() is None
    assert not Rules("User-agent: *\nDisallow: /no\n").allows("http://a/no", "x"), "read by Python's own reader"


def test_a_robots_txt_that_multiplies_names_by_rules_is_refused(site: Site) -> None:
    names = "".join(f"User-agent: a{i}\n" for i in range(3000))
    with pytest.raises(DoNotRetry, match="crawl_obey_robots"):
        Rules(names + "Disallow: /x\n" * 3000)
    site.pages["/robots.txt"] = reply((names + "Disallow: /x\n" * 3000).encode())
    site.pages["/x"] = reply(PAGE)
    assert "9000000 rules" in refused(run(site.url + "/x"))
    assert not Rules(names + "Disallow: /no\n").allows("http://a/no", "a7")
    groups = "".join(f"User-agent: a{i}\n" + "Disallow: /no\n" * 5 for i in range(3000))
    assert not Rules(groups).allows("http://a/no", "a7")


# --- delay and connections


def test_requests_to_one_host_start_a_delay_apart_whichever_slot_sends_them(site: Site) -> None:
    moments = []

    def note(handler: BaseHTTPRequestHandler) -> None:
        moments.append(time.monotonic())
        reply(PAGE)(handler)

    site.pages["/x"] = note
    settings = {"crawl_delay_seconds": 0.2, "crawl_obey_robots": False}
    threads = [threading.Thread(target=run, args=(site.url + "/x",), kwargs={"settings": settings}) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Each one's earliest moment, which a busy machine can only put off.
    assert [moment - started >= 0.2 * n for n, moment in enumerate(sorted(moments))] == [True] * 4


def test_the_delay_of_robots_txt_counts_where_it_is_longer(site: Site) -> None:
    site.pages["/robots.txt"] = reply(b"User-agent: *\nCrawl-delay: 20\n")
    site.pages["/x"] = reply(PAGE)
    assert fetched(site.url + "/x")["status"] == 200
    snoozed = [run(site.url + "/x") for _ in range(3)]
    assert [outcome.outcome for outcome in snoozed] == ["snoozed"] * 3
    # One after the other, as a queue would let them in.
    waits = [outcome.snooze_seconds or 0 for outcome in snoozed]
    assert [round(wait / 20) for wait in waits] == [1, 2, 3]
    assert all(outcome.duration_seconds < 10 for outcome in snoozed)  # it gave its slot back at once


def test_no_more_requests_than_so_many_are_under_way_to_one_host(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors.web.politeness.MAX_WAIT_SECONDS", 60.0)  # on a busy machine the last one waits long
    lock, now, most = threading.Lock(), [0], [0]

    def count(handler: BaseHTTPRequestHandler) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        site.stop_dripping.wait(0.05)
        with lock:
            now[0] -= 1
        reply(PAGE)(handler)

    site.pages["/x"] = count
    settings = {"crawl_host_connections": 2}
    threads = [threading.Thread(target=run, args=(site.url + "/x",), kwargs={"settings": settings}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most[0] == 2 and len(site.requests) == 8


def test_a_host_that_asked_for_a_pause_is_left_alone(site: Site) -> None:
    site.pages["/busy"] = reply(b"", 429, Retry_After="30")
    site.pages["/x"] = reply(PAGE)
    assert run(site.url + "/busy").outcome == "snoozed"
    other = run(site.url + "/x")
    assert other.outcome == "snoozed" and 0 < (other.snooze_seconds or 0) <= 30
    assert [path for _, path, _ in site.requests] == ["/busy"]


def test_whoever_would_wait_longer_than_3_seconds_snoozes() -> None:
    politeness = Politeness(4, delay_seconds=10.0)
    with politeness.turn("a.test"):
        pass
    with politeness.turn("b.test"):
        pass
    with pytest.raises(Snooze) as snooze, politeness.turn("a.test"):
        pass
    assert 3 < snooze.value.seconds <= 10


def test_a_slow_host_does_not_hold_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executors.web.politeness.MAX_WAIT_SECONDS", 0.2)
    politeness = Politeness(1)
    with politeness.turn("a.test"), pytest.raises(Snooze, match="answers slowly"), politeness.turn("a.test"):
        pass
    with politeness.turn("a.test"):
        pass


def test_a_cancelled_task_does_not_wait_for_its_turn() -> None:
    politeness: Any = Politeness(1, delay_seconds=2.9)
    with politeness.turn("a.test"):
        pass
    started = time.monotonic()
    with politeness.turn("a.test", 0.0, lambda: True):
        pass
    assert time.monotonic() - started < 2


def test_hosts_that_are_idle_are_forgotten() -> None:
    politeness = Politeness(4)
    for i in range(1500):
        with politeness.turn(f"{i}.test"):
            pass
    assert len(politeness._hosts) <= 1000
