"""Does the dashboard show what the master knows, and run nothing that others wrote? A real master, a real Chromium.

The frame, the overview, events and the system; the other views have files of their own beside this one.
"""

from __future__ import annotations

import gzip
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from day import HOSTILE, VIEWS, Day, a_day_of_work, a_hostile_day
from farm import wait_for

import reasons
from history import KEPT

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)

STATIC = Path(__file__).resolve().parents[2] / "static"
REFUSED = "status of 401"  # what Chromium itself writes into the console about a 401
GONE = "ERR_"  # and about a master that does not answer
MOST_BYTES = 150_000

FITS = """() => document.documentElement.scrollWidth <= innerWidth
  && ![...document.querySelectorAll("body, main, .card, .part, dialog, dd")].some((node) => node.scrollWidth > node.clientWidth + 1)"""


def tile(page: Any, state: str) -> Any:
    return page.locator(f".tile[data-state={state}] b")


def settled(page: Any) -> None:
    """Every question of the view was answered. (Playwright's wait_for_function needs an eval, which the page forbids.)"""
    expect(page.locator("main .part, main form").first).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)


@pytest.fixture(scope="module")
def day(launch_master) -> Day:
    """A master that the tests of this file share, which only look at it."""
    return a_day_of_work(launch_master())


def test_the_overview_shows_counts_devices_and_why_the_oldest_task_waits(day, open_tab):
    page = open_tab(day.url).page
    for state in day.ids:
        expect(tile(page, state)).to_have_text("1")
    expect(tile(page, "all")).to_have_text("7")
    expect(page.get_by_role("link", name="2 of 2 devices online")).to_be_visible()
    detail = day.master.call("GET", f"/tasks/{day.ids['pending']}/why")["detail"]
    expect(page.locator("#oldest")).to_contain_text(detail[0].upper() + detail[1:])
    expect(page.locator(".chart canvas")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("Tasks a minute.*Completed: 1"))).to_be_visible()


def test_a_count_leads_to_its_tasks_and_back(day, open_tab):
    page = open_tab(day.url).page
    page.locator(".tile[data-state=failed]").click()
    assert page.url.endswith("#/tasks?status=failed")
    expect(page.get_by_text("403 Forbidden").first).to_be_visible()
    page.go_back()
    expect(tile(page, "failed")).to_have_text("1")


def test_the_page_refreshes_itself(master, dashboard_url, open_tab):
    page = open_tab(dashboard_url).page
    expect(page.locator("#connection")).to_have_text("Live")
    expect(tile(page, "pending")).to_have_text("0")
    master.submit_one()
    expect(tile(page, "pending")).to_have_text("1")
    master.register("shop-1")
    expect(page.get_by_role("link", name="1 of 1 device online")).to_be_visible()
    master.report("shop-1", master.pull("shop-1")[0], "completed", result={})
    expect(tile(page, "completed")).to_have_text("1")


def test_what_happened_is_listed_newest_first_filtered_and_live(master, dashboard_url, open_tab):
    master.register("shop-1")
    page = open_tab(f"{dashboard_url}#/events").page
    rows = page.locator("tbody tr")
    expect(rows.first).to_contain_text("Registered")
    master.call("PUT", "/devices/shop-1/status", {"status": "draining", "reason": "rebuild"})
    expect(rows.first).to_contain_text("rebuild")
    expect(rows.first.get_by_role("link", name="shop-1")).to_be_visible()
    page.get_by_label("About").select_option("system")
    expect(page.get_by_text("Master started").last).to_be_visible()
    expect(page.locator("tbody")).not_to_contain_text("rebuild")
    assert page.url.endswith("#/events?kind=system")


def test_the_system_view_tells_settings_and_no_secret(start_master, open_tab):
    master = start_master(api_key="opensesame-of-this-test", device_timeout=77)
    page = open_tab(master.url + "/", forgive=(REFUSED,)).page
    page.get_by_label("API key").fill("opensesame-of-this-test")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="System").click()
    expect(page.get_by_role("row", name=re.compile("device_timeout 77"))).to_be_visible()
    expect(page.get_by_text("distribution.db").first).to_be_visible()
    expect(page.locator("main")).to_contain_text("api_key")
    assert "opensesame" not in page.content()


def test_scripts_planted_in_every_field_never_run(start_master, open_tab):
    day = a_hostile_day(start_master())
    hostile = quote(HOSTILE, safe="")
    page = open_tab(day.url, locale="zh-CN", forgive=("404", "422")).page
    for address in (*day.addresses()[:-2], f"{day.url}#/batches/{hostile}", f"{day.url}#/devices/shop-1"):
        page.goto(address)
        settled(page)
        assert page.evaluate("window.pwned") is None, address
        assert page.locator("img[src=x], body script").count() == 0, address
    page.goto(f"{day.url}#/tasks/{day.ids['failed']}")
    expect(page.locator("main")).to_contain_text(HOSTILE)
    page.goto(f"{day.url}#/tasks?text={hostile}&batch={hostile}")
    expect(page.locator("tbody")).to_contain_text(HOSTILE)
    assert page.evaluate("window.pwned") is None


def test_the_key_form_lets_in_with_the_key_only(start_master, open_tab):
    master = start_master(api_key="opensesame-of-this-test")
    master.submit_one()
    page = open_tab(master.url + "/", forgive=(REFUSED,)).page
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_role("navigation")).to_have_count(0)
    page.keyboard.type("not-the-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").first).to_contain_text("not the key")
    page.get_by_label("API key").fill("opensesame-of-this-test")
    page.get_by_role("button", name="Open the dashboard").click()
    expect(tile(page, "pending")).to_have_text("1")
    expect(page.locator("#connection")).to_have_text("Live")
    assert "opensesame" not in page.evaluate("document.cookie + JSON.stringify(localStorage) + location.href")
    assert "opensesame" not in page.content()
    page.reload()
    expect(tile(page, "pending")).to_have_text("1")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    expect(page.locator(".tile")).to_have_count(0)
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()


def test_the_language_follows_the_browser_and_the_switch_is_remembered(day, open_tab):
    page = open_tab(day.url, locale="zh-CN").page
    expect(page.get_by_role("link", name="设备", exact=True)).to_be_visible()
    expect(page.locator("#oldest")).to_contain_text("没有设备能执行这种任务")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("link", name="Devices", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_role("link", name="Devices", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="中文")).to_be_visible()


def test_both_languages_have_the_same_words(day, open_tab):
    page = open_tab(day.url).page
    read = "(name) => import(`/static/strings.${name}.js`).then((module) => module.default)"
    english, chinese = page.evaluate(read, "en"), page.evaluate(read, "zh")
    assert {key for key in chinese if not key.startswith("why_")} == {
        key for key in english if not key.startswith("why_")
    }
    assert {f"why_{reason}" for reason in reasons.REASONS} <= set(chinese)
    assert {f"event_{verb}" for verb in KEPT} <= set(english)
    braces = re.compile(r"\{\w+\}")
    for key, words in english.items():
        assert sorted(braces.findall(words)) == sorted(braces.findall(chinese[key])), key
    code = "\n".join(path.read_text() for path in (*STATIC.glob("*.js"), *(STATIC / "views").glob("*.js")))
    used = set(re.findall(r"\bt\(\"(\w+)\"", code))
    assert used <= set(english), "used without words"
    made = tuple(re.findall(r"`(\w+_)\$\{", code))  # t(`event_${verb}`)
    unused = {key for key in english if not key.startswith((*made, "why_")) and not re.search(rf'"{key}"', code)}
    assert unused <= STATES_OF_THINGS, "words that nothing says"


STATES_OF_THINGS = {
    "scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled", "snoozed", "timeout", "released",
    "online", "busy", "draining", "disabled", "conflict", "off", "stopped", "live", "polling", "offline", "starting",
    "signed_out", "open", "paused", "closed", "full", "language",
}  # fmt: skip
"""Words for what the master or the connection says of itself: t(name)."""


def test_a_lost_master_is_told_greyed_and_found_again(master, dashboard_url, open_tab):
    master.submit_one()
    # A master that stops refuses what comes during its last second.
    page = open_tab(dashboard_url, forgive=(GONE, "503")).page
    expect(tile(page, "pending")).to_have_text("1")
    master.stop()
    expect(page.locator("#banner")).to_contain_text("No answer from the master")
    expect(page.locator("#banner")).to_contain_text(re.compile(r"\(\d+s\)"))
    expect(page.locator("main")).to_have_class("old")
    expect(tile(page, "pending")).to_have_text("1")
    master.start()
    expect(page.locator("#banner")).to_be_hidden()
    master.submit_one()
    expect(tile(page, "pending")).to_have_text("2")


def test_times_are_in_the_viewers_zone_with_utc_on_hover(master, dashboard_url, open_tab):
    task_id = master.submit_one()
    page = open_tab(f"{dashboard_url}#/tasks/{task_id}", timezone_id="Asia/Shanghai").page
    created = datetime.fromisoformat(master.call("GET", f"/tasks/{task_id}")["created_at"].replace("Z", "+00:00"))
    shown = page.locator("time", has_text=created.astimezone(timezone(timedelta(hours=8))).strftime("%H:%M:%S")).first
    expect(shown).to_have_attribute("title", re.compile(created.strftime(r"%Y-%m-%d %H:%M:%S\.\d+ UTC")))


@pytest.mark.parametrize(
    ("scheme", "locale"),
    [
        ("light", "en-GB"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("dark", "en-GB"), ("dark", "zh-CN"))),
    ],
)
def test_every_view_is_accessible_in_light_and_dark(day, open_tab, scheme, locale):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_tab(day.url, locale=locale, color_scheme=scheme, reduced_motion="reduce").page
    for address in day.addresses():
        page.goto(address)
        settled(page)
        found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
        told = [f"{one['id']}: {one['help']} {[node['html'][:90] for node in one['nodes'][:3]]}" for one in found]
        assert told == [], address


@pytest.mark.parametrize("widths", [(320, 1024), pytest.param((390, 768, 1920), marks=pytest.mark.slow)])
def test_nothing_runs_off_the_side_from_a_phone_to_a_wall(day, open_tab, widths):
    page = open_tab(day.url, own=True).page
    for address in day.addresses():
        page.goto(address)
        settled(page)
        for width in widths:
            page.set_viewport_size({"width": width, "height": 900})
            wait_for(f"{address} to fit into {width}", lambda: page.evaluate(FITS), 20)  # charts follow a moment later


def test_the_keyboard_reaches_the_views_and_skips_to_the_content(day, open_tab):
    page = open_tab(day.url).page
    expect(tile(page, "all")).to_have_text("7")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    tasks = page.get_by_role("navigation").get_by_role("link", name="Tasks", exact=True)
    tasks.focus()
    page.keyboard.press("Enter")
    expect(tasks).to_have_attribute("aria-current", "page")
    page.locator(f'tr[data-row="{day.ids["failed"]}"]').get_by_role("link", name="task").focus()
    page.keyboard.press("Enter")  # that link is gone with its view: one goes on at the new one
    expect(page.locator("main")).to_be_focused()


def test_a_question_that_nobody_answers_holds_up_no_other(day, open_tab):
    page = open_tab("about:blank").page
    given_up: list[str] = []
    page.on("requestfailed", lambda request: given_up.append(request.url))
    page.route("**/system/series*", lambda route: None)
    page.goto(day.url)
    expect(tile(page, "all")).to_have_text("7")
    page.get_by_role("navigation").get_by_role("link", name="Devices").click()
    expect(page.get_by_role("link", name="Front desk")).to_be_visible()
    assert given_up == []


def test_a_view_that_opens_while_others_are_asked_is_asked_itself(day, open_tab):
    """What nobody looks at is forgotten after a minute; a question that is new has nobody for a moment, too."""
    tab = open_tab("about:blank")
    tab.context.add_init_script(
        "const now = performance.now.bind(performance); performance.now = () => now() + 120000;"
    )
    page = tab.page
    page.goto(day.url)
    expect(tile(page, "all")).to_have_text("7")
    page.evaluate(
        """async () => {
          const live = await import("/static/live.js");
          new MutationObserver(() => live.soon(0)).observe(document.getElementById("main"), { childList: true });
        }"""
    )
    page.get_by_role("navigation").get_by_role("link", name="Batches").click()
    expect(page.get_by_role("link", name="day", exact=True)).to_be_visible()


def test_the_whole_dashboard_is_small_and_has_no_inline_script(day):
    session, sent = day.master.session, 0
    paths = [path for path in sorted(STATIC.rglob("*")) if path.suffix in (".js", ".css", ".svg", ".html")]
    for path in paths:
        name = path.relative_to(STATIC).as_posix()
        url = day.url if name == "index.html" else f"{day.url}static/{name}"
        response = session.get(url, headers={"Accept-Encoding": "gzip"}, stream=True)
        assert response.headers["Content-Encoding"] == "gzip", name
        raw = response.raw.read()
        assert gzip.decompress(raw) == path.read_bytes(), name
        sent += len(raw)
    assert sent < MOST_BYTES
    policy = session.get(day.url).headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy and "style-src 'self';" in policy and "unsafe" not in policy
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)", page) and not re.search(r"\son\w+=|\sstyle=", page)


def test_every_view_gives_its_question_as_curl(day, open_tab):
    page = open_tab(day.url).page
    for name in VIEWS:
        if name == "new":
            continue
        page.goto(f"{day.url}#/{name}")
        button = page.get_by_role("button", name="Copy as curl").first
        line = button.get_attribute("title")
        path = re.search(r"'http://[^/]+(/[^']*)'", line).group(1)
        assert day.master.session.get(day.url.rstrip("/") + path).ok, line
