"""Does the dashboard say how the devices are, which one needs a person, and do what a person asks of one?"""

from __future__ import annotations

import re
import time

import pytest
from day import HOSTILE, a_day_of_work

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def day(launch_master):
    return a_day_of_work(launch_master())


def row(page, device_id):
    return page.locator(f'tr[data-row="{device_id}"]')


def change(page, device_id):
    row(page, device_id).get_by_role("button", name="Change…").click()
    return page.get_by_role("dialog")


def test_a_device_shows_its_load_its_figures_and_what_it_did(day, open_tab):
    page = open_tab(f"{day.url}#/devices").page
    for text in (
        "Front desk",
        "shop-1",
        "Online",
        "2 of 4",
        "97%",
        "88%",
        "13%",
        "selectors",
        "echo",
        "50%",
        "1 / 1 / 0",
    ):
        expect(row(page, "shop-1")).to_contain_text(text)
    expect(row(page, "shop-1").locator("td.last")).to_contain_text("ago")
    expect(row(page, "shop-1").locator("td.finished")).to_contain_text("ago")
    expect(row(page, "shop-2")).to_contain_text("收银台")
    expect(row(page, "shop-2").locator("td.finished")).to_have_text("never")
    expect(page.locator("[data-status=online] b")).to_have_text("2")


def test_trouble_comes_first_and_says_what_it_is(master, open_tab):
    for name in ("a-well", "b-full", "c-newer", "d-gone"):
        master.register(name)
    master.beat("a-well", clock=time.time() - 20)
    master.beat("b-full", problem="spool_full", clock=time.time() + 7200)
    master.beat("c-newer", problem=HOSTILE)
    master.beat("d-gone", leaving=True)
    page = open_tab(f"{master.url}/#/devices").page
    expect(row(page, "b-full")).to_contain_text("Its spool is full")
    expect(row(page, "b-full")).to_contain_text(re.compile(r"Its clock is (2h|1h 59m) ahead\."))
    expect(row(page, "c-newer").locator(".trouble")).to_contain_text(HOSTILE[:40])  # the master cuts it
    expect(row(page, "d-gone")).to_contain_text("Stopped")
    expect(row(page, "a-well").locator(".trouble")).to_have_count(0)
    order = [line.get_attribute("data-row") for line in page.locator("tbody tr").all()]
    assert order == ["b-full", "c-newer", "a-well", "d-gone"]
    page.get_by_role("button", name="中文").click()
    expect(row(page, "b-full")).to_contain_text("结果暂存区已满")
    assert page.evaluate("window.pwned") is None


def test_rows_stay_in_place_while_the_pointer_is_on_them(master, open_tab):
    for name in ("a", "b"):
        master.register(name)
    page = open_tab(f"{master.url}/#/devices").page
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(2)
    row(page, "a").hover()
    master.beat("b", problem="spool_full")
    master.submit_one()  # an event, so that the page looks again at once
    expect(row(page, "b")).to_contain_text("Its spool is full")
    expect(rows.first).to_have_attribute("data-row", "a")
    page.mouse.move(2, 2)
    master.submit_one()
    expect(rows.first).to_have_attribute("data-row", "b")


def test_the_address_holds_the_filter_and_many_devices_come_by_pages(master, open_tab):
    for n in range(30):
        master.register(
            f"shop-{n:02}", tags=["fast"] if n == 29 else [], task_types=["echo", "crawl"] if n == 7 else ["echo"]
        )
    tab = open_tab(f"{master.url}/#/devices", own=True)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    page = tab.page
    expect(page.locator("tbody tr")).to_have_count(25)
    page.get_by_role("button", name="Next page").click()
    expect(page.locator("tbody tr")).to_have_count(5)
    assert page.url.endswith("#/devices?page=2")
    expect(page.locator(".pages")).to_contain_text("26–30 of 30")
    page.get_by_label("Tag").select_option("fast")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(row(page, "shop-29")).to_be_visible()
    page.goto(f"{master.url}/#/devices?task_type=crawl")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(row(page, "shop-07")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("searchbox").fill("shop-1")
    expect(page.locator("tbody tr")).to_have_count(10)
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.get_by_role("searchbox").fill("nowhere")
    expect(page.get_by_text("No device matches")).to_be_visible()


def test_drain_is_one_click_and_can_be_undone(master, open_tab):
    master.register("shop-1")
    page = open_tab(f"{master.url}/#/devices").page
    row(page, "shop-1").get_by_role("button", name="Drain").click()
    expect(row(page, "shop-1")).to_contain_text("Draining")
    expect(page.get_by_role("status").last).to_contain_text("takes nothing new")
    page.get_by_role("button", name="Undo").click()
    expect(row(page, "shop-1")).to_contain_text("Online")
    assert master.get("/devices/shop-1")["wanted"] == "active"


def test_a_device_is_disabled_with_a_reason_and_renamed(master, open_tab):
    master.register("shop-1", device_name="Till")
    page = open_tab(f"{master.url}/#/devices").page
    dialog = change(page, "shop-1")
    dialog.get_by_label("Reason").fill("its disk is replaced")
    dialog.get_by_role("button", name="Disable").click()
    expect(row(page, "shop-1")).to_contain_text("Disabled")
    expect(row(page, "shop-1")).to_contain_text("its disk is replaced")
    dialog = change(page, "shop-1")
    dialog.get_by_label("Name").fill("Till 7")
    dialog.get_by_role("button", name="Rename").click()
    expect(row(page, "shop-1")).to_contain_text("Till 7")
    master.register("shop-1", device_name="Till")
    assert master.get("/devices/shop-1")["device_name"] == "Till 7"


def test_a_device_is_removed_after_asking_twice_and_only_while_it_is_away(master, open_tab):
    master.register("shop-1")
    page = open_tab(f"{master.url}/#/devices/shop-1", forgive=("status of 4",)).page

    def remove():
        page.get_by_role("button", name="Change…").click()
        page.get_by_role("button", name="Remove the device").click()
        assert master.get("/devices")["devices"]
        page.get_by_role("button", name="Really remove it?").click()

    remove()
    expect(page.get_by_text("stop its worker first")).to_be_visible()
    master.beat("shop-1", leaving=True)
    expect(page.get_by_role("heading", name="shop-1").last).to_contain_text("Stopped")
    remove()
    expect(page.locator("#add-panel")).to_be_visible()
    assert page.url.endswith("#/devices")
    assert master.get("/devices")["devices"] == []


def test_one_device_shows_its_charts_tasks_failures_and_beats(day, open_tab):
    figures = {"memory_usage": 88.0, "disk_usage": 12.5, "system_info": {"rack": HOSTILE}}
    for seq in range(2, 5):
        day.master.beat("shop-1", seq=seq, holding=None, cpu_usage=90.0 + seq, **figures)
    page = open_tab(f"{day.url}#/devices/shop-1").page
    expect(page.get_by_role("img", name="CPU, memory and disk, %")).to_be_visible()
    expect(page.get_by_role("img", name="Tasks by minute. Completed")).to_be_visible()
    part = lambda name: page.get_by_role("region", name=name)  # noqa: E731
    expect(part("Tasks that it has or had last")).to_contain_text(f"task {day.ids['running']}")
    expect(part("Tasks that it has or had last").get_by_role("link", name="All of its tasks")).to_have_attribute(
        "href", "#/tasks?device_id=shop-1"
    )
    expect(part("Recent failures")).to_contain_text("HTTPError: 403 Forbidden")
    expect(part("Heartbeats")).to_contain_text("94%")
    expect(part("What happened to it")).to_contain_text("Registered")
    expect(page.locator("dl.facts")).to_contain_text(HOSTILE)
    assert page.evaluate("window.pwned") is None


def test_an_unknown_device_is_said_to_be_unknown(day, open_tab):
    page = open_tab(f"{day.url}#/devices/shop-404", forgive=("status of 404",)).page
    expect(page.get_by_role("alert")).to_contain_text("There is no such device")
