"""Does the dashboard tell how far a batch is, and change it as a whole or by what failed? A real master, a real Chromium."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)

REFUSED = "status of 4"


class Crawl(NamedTuple):
    """A master with a batch of which 2 tasks are completed, 3 failed for two reasons, and 1 waits."""

    master: Any
    url: str


def a_crawl(master: Any) -> None:
    master.register("shop-1", max_concurrent_tasks=10)
    master.submit(*({"task_type": "echo", "batch": "docs/en", "username": f"user-{n}"} for n in range(6)))
    *done, a, b, c = master.pull("shop-1", 5)
    for task in done:
        master.report("shop-1", task, "completed", result={})
    for task, message in ((a, "403 Forbidden"), (b, "403 Forbidden"), (c, "no such app")):
        master.report("shop-1", task, "failed", retry=False, error_message=message, error_type="HTTPError")
    master.submit_one(batch="other")


@pytest.fixture(scope="module")
def crawl(launch_master):
    master = launch_master()
    a_crawl(master)
    return Crawl(master, master.url + "/")


@pytest.fixture
def own(master):
    a_crawl(master)
    return Crawl(master, master.url + "/")


def test_the_list_shows_each_batch_with_its_counts(crawl, open_tab):
    page = open_tab(f"{crawl.url}#/batches").page
    docs = page.locator('tr[data-row="docs/en"]')
    for words in ("Open", "2 Completed · 3 Failed · 1 Pending", "6", "83%"):
        expect(docs).to_contain_text(words)
    expect(docs.locator("td.rate")).to_have_text(re.compile(r"[\d.]+ a (second|minute)"))
    expect(page.get_by_role("img", name="Completed: 2, Failed: 3, Pending: 1")).to_be_visible()
    expect(page.locator("tr[data-row]")).to_have_count(2)
    page.get_by_label("Name of a batch").fill("other")
    page.keyboard.press("Enter")
    expect(page.locator("tr[data-row]")).to_have_count(1)
    page.reload()
    expect(page.get_by_label("Name of a batch")).to_have_value("other")
    page.goto(f"{crawl.url}#/batches?name=nothing")
    expect(page.get_by_text("There is no batch of exactly this name.")).to_be_visible()
    page.get_by_role("button", name="Clear").first.click()
    expect(page.locator("tr[data-row]")).to_have_count(2)
    docs.get_by_role("link").click()
    expect(page.get_by_role("heading", name="docs/en").first).to_be_visible()


def test_the_list_goes_by_pages(start_master, open_tab):
    master = start_master()
    master.submit(*({"task_type": "echo", "batch": f"batch-{n}"} for n in range(60)))
    page = open_tab(f"{master.url}/#/batches").page
    expect(page.locator("tr[data-row]")).to_have_count(50)
    first = page.locator("td.name").all_inner_texts()
    page.get_by_role("button", name="Next page").click()
    expect(page.locator("tr[data-row]")).to_have_count(10)
    assert {*first, *page.locator("td.name").all_inner_texts()} == {f"batch-{n}" for n in range(60)}


def test_an_empty_list_teaches_what_makes_a_batch(master, dashboard_url, open_tab):
    page = open_tab(f"{dashboard_url}#/batches").page
    expect(page.get_by_text("No batch yet.")).to_be_visible()


def test_a_batch_tells_how_far_it_is_and_what_failed(crawl, open_tab):
    page = open_tab(f"{crawl.url}#/batches/docs%2Fen").page
    expect(page.locator(".batch-progress")).to_contain_text("83.3% · 5 of 6")
    expect(
        page.locator(".batch-progress .figure").filter(has_text="completed in the last hour").locator("b")
    ).to_have_text("2")
    failures = page.get_by_role("region", name="Failures by message").locator("tbody tr")
    expect(failures).to_have_count(2)
    expect(failures.first).to_contain_text("403 Forbidden")
    expect(failures.first.locator("td").first).to_have_text("2")
    expect(page.get_by_role("region", name="Newest tasks").locator("tbody tr")).to_have_count(6)
    failures.first.get_by_role("link", name="Its tasks").click()
    expect(page.get_by_label("Error, exactly")).to_have_value("403 Forbidden")
    expect(page.locator("tr[data-row]")).to_have_count(2)


def test_a_group_of_failures_runs_again_after_its_count_was_told(own, open_tab):
    page = open_tab(f"{own.url}#/batches/docs%2Fen").page
    group = page.get_by_role("region", name="Failures by message").locator("tbody tr", has_text="403 Forbidden")
    group.get_by_role("button", name="Run these again…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This puts 2 failed or cancelled tasks back into the queue")
    assert own.master.states("docs/en")["failed"] == 3
    dialog.get_by_role("button", name="Run 2 tasks again").click()
    expect(page.locator(".said")).to_contain_text("2 tasks are back in the queue.")
    expect(group).to_have_count(0)
    assert own.master.states("docs/en") == {**own.master.states("docs/en"), "failed": 1, "pending": 3}


def test_a_batch_is_paused_with_a_reason_resumed_and_cancelled(own, open_tab):
    page = open_tab(f"{own.url}#/batches/docs%2Fen").page
    main = page.get_by_role("main")
    main.get_by_role("button", name="Pause").click()
    page.get_by_role("dialog").get_by_label("Reason").fill("the site is down")
    page.get_by_role("button", name="Pause the batch").click()
    expect(main).to_contain_text("the site is down")
    expect(main.get_by_role("button", name="Resume")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(main.get_by_role("button", name="Pause")).to_be_visible()
    main.get_by_role("button", name="Cancel the batch").click()
    page.get_by_role("button", name="Cancel the batch and its tasks").click()
    expect(page.locator(".said")).to_contain_text("Batch cancelled, with 1 task.")
    expect(main.get_by_role("button", name="Resume")).to_be_visible()
    assert own.master.states("docs/en")["cancelled"] == 1


def test_a_batch_that_is_not_there_says_so(crawl, open_tab):
    page = open_tab(f"{crawl.url}#/batches/nothing", forgive=(REFUSED,)).page
    expect(page.get_by_role("alert")).to_contain_text("There is no such batch")
