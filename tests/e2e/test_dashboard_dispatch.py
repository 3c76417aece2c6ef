"""Does the dashboard say where tasks go, what holds them back, and change it at a click?"""

from __future__ import annotations

import json

import pytest
from day import HOSTILE

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)

ACCOUNT = {"name": "account", "task_type": "echo", "key": "username", "max_running": 1}


def part(page, name):
    return page.get_by_role("region", name=name)


def test_the_strategy_is_explained_switched_live_and_switched_back(master, open_tab):
    page = open_tab(f"{master.url}/#/dispatch").page
    strategies = part(page, "Strategy")
    expect(strategies).to_contain_text("the device that holds the fewest tasks")
    expect(strategies.get_by_role("button", name="Fewest tasks")).to_have_attribute("aria-pressed", "true")
    strategies.get_by_role("button", name="In turn").click()
    expect(strategies.get_by_role("button", name="In turn")).to_have_attribute("aria-pressed", "true")
    assert master.get("/strategy")["strategy"] == "round_robin"
    page.get_by_role("button", name="Undo").click()
    expect(strategies.get_by_role("button", name="Fewest tasks")).to_have_attribute("aria-pressed", "true")
    assert master.get("/strategy")["strategy"] == "least_tasks"


def test_everything_a_type_and_a_lane_are_paused_with_a_reason_and_resumed(master, open_tab):
    master.submit_one(batch="day")
    page = open_tab(f"{master.url}/#/dispatch").page
    [lane] = master.get("/lanes")["lanes"]
    for what, scope in (("everything", "all"), ("task type echo", "type"), (f"lane {lane['id']}", "lane")):
        page.get_by_role("button", name=f"Pause: {what}").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Reason").fill(f"{scope} {HOSTILE}")
        dialog.get_by_role("button", name="Pause").click()
        expect(part(page, "What waits, and why")).to_contain_text(f"{scope} {HOSTILE}")
        assert [one["scope"] for one in master.get("/system/overview")["paused"]] == [scope]
        page.get_by_role("button", name=f"Resume: {what}").click()
        expect(page.get_by_role("button", name=f"Pause: {what}")).to_be_visible()
        assert master.get("/system/overview")["paused"] == []
    assert page.evaluate("window.pwned") is None


def test_a_lane_says_why_it_waits(master, open_tab):
    master.submit_one("unknown_type")
    master.register("shop-1")
    page = open_tab(f"{master.url}/#/dispatch").page
    expect(part(page, "What waits, and why")).to_contain_text("The only device does not run task type unknown_type")
    page.get_by_role("searchbox").fill("echo")
    page.get_by_role("searchbox").press("Enter")
    expect(part(page, "What waits, and why")).to_contain_text("Nothing of this type waits")
    assert page.url.endswith("?task_type=echo")


def test_a_limit_is_a_gauge_and_holds_its_lane(start_master, open_tab):
    master = start_master(limits=[ACCOUNT])
    master.register("shop-1")
    for _ in range(2):
        master.submit_one(username="acme")
    master.pull("shop-1")
    page = open_tab(f"{master.url}/#/dispatch").page
    gauge = page.locator("[data-limit=account]")
    for text in ("for each username", "acme", "1 of 1", "opens when one of them ends"):
        expect(gauge).to_contain_text(text)
    expect(part(page, "What waits, and why")).to_contain_text("account")
    expect(part(page, "What waits, and why")).to_contain_text("Full: all at once")


def test_a_closed_value_says_until_when_and_is_opened_by_hand(start_master, open_tab):
    master = start_master(limits=[ACCOUNT])
    master.register("shop-1")
    for _ in range(2):
        master.submit_one(username="acme")
    [task] = master.pull("shop-1")
    master.report(
        "shop-1", task, "failed", error_message=f"429 {HOSTILE}", limit_closed_seconds=3600, limit_name="account"
    )
    page = open_tab(f"{master.url}/#/dispatch").page
    gauge = page.locator("[data-limit=account]")
    for text in ("Closed by a device", HOSTILE, "opens at"):
        expect(gauge).to_contain_text(text)
    expect(part(page, "What waits, and why")).to_contain_text("Closed by a device")
    gauge.get_by_role("button", name="Open now").click()
    expect(gauge).not_to_contain_text("Closed by a device")
    assert [key["held_by"] for key in master.get("/limits")["limits"][0]["keys"]] == [None]
    assert page.evaluate("window.pwned") is None


def test_limits_are_added_corrected_by_the_masters_sentence_and_undone(start_master, open_tab):
    master = start_master(limits=[])
    page = open_tab(f"{master.url}/#/dispatch", forgive=("status of 422",)).page
    expect(part(page, "Limits")).to_contain_text("No limit holds anything back")
    page.get_by_role("button", name="Add a limit").click()
    dialog = page.get_by_role("dialog")
    dialog.locator("[name=name]").fill("site")
    dialog.locator("[name=key]").fill("username, app_id")
    dialog.locator("[name=max_starts]").fill("60")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_contain_text("max_starts and window_seconds belong together")
    dialog.locator("[name=window_seconds]").fill("60")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_be_hidden()
    expect(page.locator("[data-limit=site]")).to_contain_text("for each username + app_id")
    page.locator("[data-limit=site]").get_by_role("button", name="Edit").click()
    dialog.locator("[name=max_running]").fill("3")
    dialog.get_by_role("button", name="Save").click()
    expect(page.locator("[data-limit=site]")).to_contain_text("3 at once · 60 starts in 1m")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("[data-limit=site]")).not_to_contain_text("at once")
    [limit] = master.get("/limits")["limits"]
    assert (limit["max_running"], limit["max_starts"], limit["key"]) == (None, 60, ["username", "app_id"])


def test_limits_are_edited_as_json_too(start_master, open_tab):
    master = start_master(limits=[ACCOUNT])
    page = open_tab(f"{master.url}/#/dispatch", forgive=("status of 422",)).page
    page.get_by_role("button", name="Edit as JSON").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("textarea")).to_have_value(json.dumps([ACCOUNT], indent=2))
    for text, sentence in (("[{", "This is not JSON"), ('[{"name": "a b"}]', "limits[0].name")):
        dialog.locator("textarea").fill(text)
        dialog.get_by_role("button", name="Save").click()
        expect(dialog.get_by_role("alert")).to_contain_text(sentence)
    dialog.locator("textarea").fill(json.dumps({"limits": []}))
    dialog.get_by_role("button", name="Save").click()
    expect(part(page, "Limits")).to_contain_text("No limit holds anything back")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("[data-limit=account]")).to_be_visible()
