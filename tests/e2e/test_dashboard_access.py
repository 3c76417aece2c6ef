"""Does everybody see and do what their key is for, and does the dashboard show who may come in and who did what?

Real masters, a real Chromium. One master with keys is shared by most tests; none of them changes what another looks at.
"""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from day import HOSTILE, Day, a_day_of_work
from farm import ROOT, environment, wait_for

import api
from access import COOKIE
from web import UNTOLD, WRITING

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)

CONFIG_KEY = "opensesame-of-this-test"
REFUSED = (
    "status of 401",
    "status of 403",
    "status of 422",
)  # what Chromium itself writes into the console about these
PLACES = "() => location.href + document.cookie + JSON.stringify([{...localStorage}, {...sessionStorage}])"
PRESS = """async () => {
  const found = [...document.querySelectorAll("main button:not(:disabled, .curl, .copy)")];
  for (const button of found) button.click();
  await new Promise((done) => setTimeout(done, 20));
  for (const button of found) button.click();  // for those that ask once more
  await new Promise((done) => setTimeout(done, 20));
  return [found.length, document.querySelectorAll("dialog").length];
}"""
FITS = """() => document.documentElement.scrollWidth <= innerWidth
  && ![...document.querySelectorAll("body, main, .card, .part, dialog, dd, .top, .end")].some((node) => node.scrollWidth > node.clientWidth + 1)"""


class Keyed(NamedTuple):
    """A master that asks for keys, with a day of work behind it."""

    day: Day
    keys: dict[str, str]

    @property
    def master(self) -> Any:
        return self.day.master

    def make(self, role: str, name: str, **more: Any) -> dict[str, Any]:
        made: dict[str, Any] = self.master.call("POST", "/keys", {"role": role, "name": name, **more})
        return made

    def session(self, key: str) -> str:
        """What the browser of somebody with this key holds."""
        response = requests.post(f"{self.master.url}/api/distribution/login", json={"key": key}, timeout=60)
        return response.cookies[COOKIE]

    def status(self, key: str, method: str = "GET", path: str = "/tasks") -> int:
        """How the master answers to this key."""
        response = self.master.api(method, path, headers={"Authorization": f"Bearer {key}"})
        return int(response.status_code)


@pytest.fixture(scope="module")
def keyed(launch_master, tmp_path_factory) -> Keyed:
    folder, later = tmp_path_factory.mktemp("copies"), datetime.now() + timedelta(hours=12)
    day = a_day_of_work(launch_master(api_key=CONFIG_KEY, backup_folder=str(folder), backup_at=f"{later:%H:%M}"))
    made = Keyed(day, {})
    for role, name in (("viewer", "Wallboard"), ("submitter", "Import"), ("operator", "Maria"), ("admin", "Anna")):
        made.keys[role] = made.make(role, name)["key"]
    made.make("viewer", HOSTILE)
    return made


@pytest.fixture(scope="module")
def tabs() -> dict[str, Any]:
    """By role: to load the page costs as much as most tests do with it, so these stay."""
    return {}


@pytest.fixture
def enter(keyed, tabs, stay, open_tab):
    """Opens a view for somebody with the key of a role, who signed in before; in a tab of its own with options."""

    def open_view(role: str, view: str, *, key: str = "", **options: Any) -> Any:
        address = f"{keyed.day.url}#/{view}"
        if role not in tabs or key or options:
            cookies = {COOKIE: keyed.session(key or keyed.keys[role])}
            if key or options:
                return open_tab(address, forgive=REFUSED, cookies=cookies, **options).page
            tabs[role] = stay(forgive=REFUSED)
            tabs[role].sign_in(keyed.day.url, cookies)
        page = tabs[role].page
        page.goto(address)
        page.evaluate("() => new Promise(requestAnimationFrame)")  # what was there before is gone
        expect(page.locator("main .part").first).to_be_visible()
        return page

    yield open_view
    for tab in tabs.values():
        tab.page.goto(f"{keyed.day.url}#/new")  # which asks for little while others are looked at


@pytest.fixture
def listen():
    """Tells a function of what a page does until the end of the test."""
    heard: list[tuple[Any, str, Any]] = []

    def hear(page: Any, what: str, tell: Any) -> None:
        page.on(what, tell)
        heard.append((page, what, tell))

    yield hear
    for page, what, tell in heard:
        page.remove_listener(what, tell)


def sign_in(page: Any, key: str) -> None:
    page.locator("[name=key]").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_have_count(0)
    expect(page.locator("main .part").first).to_be_visible()


def settled(page: Any) -> None:
    expect(page.locator("main .part, main form").first).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)


def complaints(page: Any) -> list[str]:
    """What axe finds wrong with the page as it is."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{one['id']}: {one['help']} {[node['html'][:90] for node in one['nodes'][:3]]}" for one in found]


def row(page: Any, text: str) -> Any:
    return page.locator("tbody tr", has_text=text)


# -- in and out ---------------------------------------------------------------------------------------------------


def test_one_signs_in_with_a_key_of_ones_own_and_a_key_that_opens_nothing_says_why(keyed, open_tab):
    revoked = keyed.make("viewer", "was here")
    keyed.master.call("DELETE", f"/keys/{revoked['id']}")
    page = open_tab(f"{keyed.day.url}#/tasks", forgive=REFUSED).page
    for key, why in (
        ("not-a-key", "not the key of this master"),
        (revoked["key"], "was revoked"),
        (keyed.make("enroll", "for a till")["key"], "for devices"),
    ):
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text(why)
    sign_in(page, keyed.keys["viewer"])
    expect(page.locator(".who-am-i")).to_have_text("Wallboard viewer")
    expect(page.locator("tbody")).to_be_visible()
    assert "afk_" not in page.content() + page.evaluate(PLACES)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.locator("tbody")).to_have_count(0)
    expect(page.locator("#ended")).to_have_count(0)
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()


def test_a_revoked_key_brings_the_form_back_and_what_was_typed_survives(keyed, enter):
    mine = keyed.make("submitter", "Temp")
    page = enter("submitter", "new", key=mine["key"])
    page.get_by_label("task_data.url").or_(page.locator("[name='task_data.url']")).first.fill(
        "https://example.org/half"
    )
    page.get_by_role("link", name="Many from a file").focus()
    keyed.master.call("DELETE", f"/keys/{mine['id']}")
    page.get_by_role("button", name="Submit the task").click()
    expect(page.locator("#ended")).to_contain_text("your key was revoked")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.get_by_label("API key")).to_be_visible()
    sign_in(page, keyed.keys["submitter"])
    assert page.url.endswith("#/new")
    expect(page.locator("[name='task_data.url']")).to_have_value("https://example.org/half")
    page.get_by_role("button", name="Submit the task").click()
    expect(page.get_by_role("status").filter(has_text="is submitted")).to_be_visible()
    expect(page.get_by_role("button", name="Undo")).to_have_count(0)  # to cancel is for operators


@pytest.mark.slow
def test_an_expired_key_is_told_from_a_revoked_one(start_master, open_tab):
    master = start_master(api_key=CONFIG_KEY)
    made = master.call("POST", "/keys", {"role": "viewer", "name": "a day", "days": 1})
    page = open_tab(f"{master.url}/#/system", forgive=(*REFUSED, "ERR_", "503")).page
    sign_in(page, made["key"])
    master.stop()
    with sqlite3.connect(master.settings["database"]) as connection:
        connection.execute("UPDATE af_key SET expires_at = ?", (time.time() - 1,))
    connection.close()
    master.start()
    expect(page.locator("#ended")).to_contain_text("your key has expired")
    assert complaints(page) == []


# -- what is offered ----------------------------------------------------------------------------------------------


def test_a_viewer_finds_no_button_that_would_be_refused(keyed, enter, listen):
    page = enter("viewer", "overview")
    sent: list[str] = []
    listen(page, "request", lambda request: request.method != "GET" and sent.append(f"{request.method} {request.url}"))
    listen(page, "response", lambda response: response.status == 403 and sent.append(f"403 {response.url}"))
    pressed = 0
    for address in keyed.day.addresses():
        page.goto(address)
        settled(page)
        buttons, dialogs = page.evaluate(PRESS)
        pressed += buttons
        assert sent == [] and dialogs == 0, address
    assert pressed > 10
    expect(page.get_by_role("link", name="New tasks")).to_have_count(0)
    page.goto(f"{keyed.day.url}#/new")
    expect(page.locator("main")).to_contain_text("for the role submitter")
    page.goto(f"{keyed.day.url}#/access")
    expect(page.locator("main")).to_contain_text("for the role admin")
    page.goto(f"{keyed.day.url}#/dispatch")
    expect(page.get_by_role("button", name="In turn")).to_be_disabled()
    expect(page.get_by_role("button", name="In turn")).to_have_attribute(
        "title", re.compile("needs the key of an operator")
    )
    assert sent == []


def test_an_operator_acts_but_makes_no_keys_and_no_backups(keyed, enter, listen):
    page = enter("operator", "overview")
    refused: list[str] = []
    listen(page, "response", lambda response: response.status == 403 and refused.append(response.url))
    page.goto(f"{keyed.day.url}#/devices/shop-1")
    expect(page.get_by_role("button", name="Drain")).to_be_visible()
    expect(page.get_by_role("button", name="Revoke its key")).to_be_visible()
    page.goto(f"{keyed.day.url}#/devices")
    expect(page.get_by_role("button", name="Change…").first).to_be_visible()
    expect(page.locator("#add-device")).to_have_count(0)
    page.goto(f"{keyed.day.url}#/system")
    expect(page.get_by_role("heading", name="Backups")).to_be_visible()
    settled(page)
    expect(page.get_by_role("button", name="Back up now")).to_have_count(0)
    expect(page.get_by_role("link", name="Access")).to_have_count(0)
    assert refused == []


# -- keys ---------------------------------------------------------------------------------------------------------


def test_a_key_is_made_shown_once_and_revoked_with_a_second_click(keyed, enter):
    page = enter("admin", "access")
    page.get_by_role("button", name="Make a key").click()
    box = page.get_by_role("dialog")
    box.get_by_label("Role").select_option("operator")
    box.get_by_label("Days").fill("30")
    box.get_by_label("Name").fill("Night\ashift")
    page.keyboard.press("Enter")
    expect(box.locator("label", has_text="Name").get_by_role("alert")).to_contain_text("control characters")
    box.get_by_label("Name").fill("Night shift")
    page.keyboard.press("Enter")
    key = box.locator("code").inner_text()
    expect(box).to_contain_text("shown this once")
    assert keyed.status(key) == 200
    page.mouse.click(5, 5)  # beside it: it stays until somebody closes it
    expect(box.locator("code")).to_have_text(key)
    assert key not in page.evaluate(PLACES)
    box.get_by_role("button", name="Close").click()
    expect(page.locator("dialog")).to_have_count(0)
    secret = key.split("_", 2)[2]
    assert secret not in page.content() + page.evaluate(PLACES)
    expect(row(page, HOSTILE)).to_contain_text("never")
    made = row(page, "Night shift")
    for text in ("operator", "In force", "in 29d 23h", "by Anna"):
        expect(made).to_contain_text(text)
    expect(row(page, "yours")).to_contain_text("from 127.0.0.1")
    made.get_by_role("button", name="Revoke: Night shift").click()
    assert keyed.status(key) == 200
    made.get_by_role("button", name="Really revoke?").click()
    expect(made).to_contain_text("Revoked")
    expect(made.get_by_role("button")).to_have_count(0)
    assert keyed.status(key) == 401


def test_the_first_admin_key_closes_an_open_master_and_its_maker_stays_in(master, open_tab):
    page = open_tab(f"{master.url}/#/system", forgive=REFUSED).page
    expect(page.locator("main")).to_contain_text('"backup_folder"')  # what to set, as there is none
    expect(page.get_by_role("button", name="Sign out")).to_have_count(0)
    page.get_by_role("link", name="Access").click()
    expect(page.locator("main")).to_contain_text("No key is needed now")
    page.get_by_role("button", name="Make a key").click()
    box = page.get_by_role("dialog")
    expect(box.get_by_label("Role").locator("option")).to_have_text(["admin"])
    box.get_by_label("Name").fill("Anna")
    box.get_by_role("button", name="Make a key").click()
    expect(box).to_contain_text("you are signed in with this one")
    assert box.locator("code").inner_text().startswith("afk_")
    assert master.api("GET", "/tasks").status_code == 401
    expect(page.locator(".who-am-i")).to_have_text("Anna admin")
    box.get_by_role("button", name="Close").click()
    expect(row(page, "Anna")).to_contain_text("yours")
    expect(page.locator("#key-form")).to_have_count(0)


# -- the audit ----------------------------------------------------------------------------------------------------


def audited() -> set[str]:
    """The actions that a row of the audit may name (web.py)."""
    found = [route for _, some in api.routes(api.Api.__new__(api.Api)) for route in some]
    return {
        route.handler.__name__
        for route in found
        if route.operation.method in WRITING
        and route.operation.path not in UNTOLD
        and "device" not in route.operation.role
    } | {"login"}


def test_the_audit_tells_who_did_what_and_refusals_stand_out(keyed, enter):
    master, viewer = keyed.master, {"Authorization": f"Bearer {keyed.keys['viewer']}"}
    maria = {"Authorization": f"Bearer {keyed.keys['operator']}"}
    for _ in range(51):
        assert master.api("POST", "/keys", {"role": "king"}).status_code == 422
    for _ in range(2):
        assert master.api("POST", "/system/pause", {}, headers=viewer).status_code == 403
    assert master.api("PUT", "/devices/shop-2/status", {"status": "draining", "reason": "disk"}, headers=maria).ok
    page = enter("admin", "access?show=audit")
    page.get_by_label("Action").wait_for()
    known = page.get_by_label("Action").locator("option").evaluate_all("(all) => all.map((one) => one.value)")
    assert audited() | {"refused"} == set(known) - {""}
    told = row(page, "Tell a device what to do").first
    for text in ("Maria", "operator · 127.0.0.1", "done", "status: draining", "reason: disk"):
        expect(told).to_contain_text(text)
    expect(told.get_by_role("link", name="shop-2")).to_have_attribute("href", "#/devices/shop-2")
    refused = row(page, "first POST /system/pause").first
    expect(refused).to_contain_text("Wallboard")
    expect(refused.locator(".pill.red")).to_have_text("not this role")
    page.get_by_label("Outcome").select_option("forbidden")
    expect(page.locator("tbody .pill").first).to_be_visible()
    expect(page.locator("tbody .pill:not(.red)")).to_have_count(0)
    assert page.url.endswith("outcome=forbidden")
    page.get_by_label("Outcome").select_option("")
    page.get_by_label("Who").fill("Maria")
    page.keyboard.press("Enter")
    expect(row(page, "Anna")).to_have_count(0)
    expect(row(page, "Tell a device what to do").first).to_be_visible()
    page.get_by_label("Action").select_option("login")
    expect(row(page, "Tell a device")).to_have_count(0)
    page.goto(f"{keyed.day.url}#/access?show=audit&action=create_key")
    expect(page.locator("tbody tr")).to_have_count(50)
    page.get_by_role("button", name="Next page").click()
    expect(row(page, "Wallboard")).to_be_visible()
    expect(row(page, HOSTILE)).to_contain_text("Make a key")
    assert page.evaluate("window.pwned") is None
    page.get_by_role("button", name="First page").click()
    expect(page.locator("tbody tr")).to_have_count(50)


# -- backups ------------------------------------------------------------------------------------------------------


def test_a_backup_is_made_by_a_click_and_told_with_age_and_size(keyed, enter):

    def is_one_made() -> bool:  # a new master makes its first one by itself
        said = keyed.master.get("/system/backups")
        return len(said["backups"]) == 1 and not said["is_running"]

    wait_for("the first one", is_one_made)
    page = enter("admin", "system")
    section = page.locator("section", has=page.get_by_role("heading", name="Backups"))
    expect(section.locator("tbody tr")).to_have_count(1)
    section.get_by_role("button", name="Back up now").click()
    expect(page.locator(".said")).to_contain_text(re.compile("distribution-.* is made and checked"))
    expect(section.locator("tbody tr")).to_have_count(2)
    expect(section.locator(".facts")).to_contain_text(re.compile(r"Last backup\d+m? ?\d*s ago"))
    made = keyed.master.get("/system/backups")["backups"][0]
    expect(section.locator("tbody tr").first).to_contain_text(made["name"])
    expect(section.locator("tbody tr").first).to_contain_text(f"{made['bytes'] / 1000:.0f}kB")


# -- devices ------------------------------------------------------------------------------------------------------


def enrolled(master: Any, key: str, device_id: str) -> str:
    """The token of a device that registers with this key."""
    body = {"device_id": device_id, "boot_id": "boot-1", "protocol": 1, "task_types": ["till"], "wants_token": True}
    headers = {"Authorization": f"Bearer {key}"}
    token: str = master.call("POST", "/devices/register", body, headers=headers)["token"]
    return token


def test_a_device_is_kept_out_with_two_clicks_and_its_task_waits_again(keyed, enter):
    master = keyed.master
    token = enrolled(master, keyed.make("enroll", "tills")["key"], "till-1")
    task_id = master.submit_one("till")
    headers = {"Authorization": f"Bearer {token}"}
    query = {"device_id": "till-1", "boot_id": "boot-1", "limit": 1, "wait": 5}
    assert master.call("GET", "/tasks/pull", params=query, headers=headers)["tasks"][0]["id"] == task_id
    page = enter("operator", "devices/till-1")
    page.get_by_role("button", name="Revoke its key").click()
    assert keyed.status(token, "POST", "/devices/till-1/heartbeat") != 401
    page.get_by_role("button", name="Really revoke?").click()
    expect(page.locator(".said")).to_contain_text("till-1 is kept out; 1 task went back to the queue.")
    assert keyed.status(token, "POST", "/devices/till-1/heartbeat") == 401
    assert master.get(f"/tasks/{task_id}")["status"] == "pending"
    page.goto(f"{keyed.day.url}#/events?device_id=till-1")
    expect(row(page, "Key revoked")).to_be_visible()


def test_an_admin_sees_with_which_key_a_device_comes_in(keyed, enter):
    enrolled(keyed.master, keyed.make("enroll", "Rollout")["key"], "till-2")
    page = enter("admin", "devices/till-2")
    section = page.locator("section", has=page.get_by_role("heading", name="Its key"))
    expect(section).to_contain_text("Rollout")
    expect(section.get_by_role("button", name="Revoke its key")).to_be_visible()
    page.goto(f"{keyed.day.url}#/devices/shop-1")  # it came in with the key of the configuration
    expect(section).to_contain_text("No key of its own")
    page.goto(f"{keyed.day.url}#/access?role=device")
    expect(row(page, "till-2").get_by_role("link", name="till-2")).to_be_visible()


def run_as_pasted(line: str, folder: Path) -> subprocess.Popen[bytes]:
    """The worker that the line starts, with its files in a folder of ours."""
    words = shlex.split(line)
    name, _, key = next(word for word in words if word.startswith("AF_")).partition("=")
    arguments = words[words.index("--device-id") :]
    config = folder / "worker.json"
    config.write_text(json.dumps({"state_folder": str(folder / "state"), "log_file": str(folder / "worker.log")}))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "worker.py"), *arguments, "--config", str(config)],
        env={**environment(), name: key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_new_device_gets_a_key_in_the_line_to_paste(keyed, enter, tmp_path):
    page = enter("admin", "devices")
    page.locator("#add-device").click()
    panel = page.locator("#add-panel")
    line = panel.locator("code").first
    expect(line).to_contain_text("AF_API_KEY=YOUR_KEY ")
    panel.get_by_label("Id of the new device").fill("till-3")
    panel.get_by_role("button", name="Make a key for it").click()
    expect(line).to_contain_text("AF_API_KEY=afk_")
    pasted = line.inner_text()
    before, _, arguments = pasted.partition(" --device-id ")
    assert re.search(r"AF_API_KEY=afk_\S+ python3? worker\.pyz?$", before)
    assert "afk_" not in arguments  # which every user of a machine can read
    assert "afk_" not in page.evaluate(PLACES)
    page.locator("#add-device").click()
    expect(panel).to_have_count(0)
    assert "afk_" not in page.content()
    worker = run_as_pasted(pasted, tmp_path)
    try:
        expect(page.locator('tr[data-row="till-3"]')).to_contain_text("Online")
    finally:
        worker.kill()
        worker.wait()
    page.goto(f"{keyed.day.url}#/access?role=enroll")
    expect(row(page, "till-3")).to_contain_text("Used up")
    page.goto(f"{keyed.day.url}#/access?role=device")
    expect(row(page, "till-3")).to_contain_text("by till-3")  # the key that was made for it, by its name


# -- how it looks -------------------------------------------------------------------------------------------------


def test_the_views_of_an_admin_are_accessible(enter):
    page = enter("admin", "access?show=audit")
    settled(page)
    assert complaints(page) == []
    page.get_by_role("link", name="Keys").click()
    page.get_by_role("button", name="Make a key").click()
    page.locator("dialog form").wait_for()
    assert complaints(page) == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "locale"), [("light", "en-GB"), ("dark", "zh-CN")])
def test_they_are_so_in_light_and_dark_and_fit_from_a_phone_to_a_wall(keyed, enter, scheme, locale):
    page = enter("admin", "access", locale=locale, color_scheme=scheme, reduced_motion="reduce")
    for view, opens in (
        ("access?show=audit", ""),
        ("access", "[aria-haspopup=dialog].main"),
        ("devices", "#add-device"),
        ("devices/shop-1", ""),
        ("system", ""),
    ):
        page.goto(f"{keyed.day.url}#/{view}")
        settled(page)
        for is_open in (False, True) if opens else (False,):
            if is_open:
                page.locator(opens).click()
                page.locator("dialog form, #add-panel form").first.wait_for()
            assert complaints(page) == [], view
            for width in (320, 390, 1280, 1920):
                page.set_viewport_size({"width": width, "height": 900})
                wait_for(f"{view} {opens} to fit into {width}", lambda: page.evaluate(FITS), 20)
        page.keyboard.press("Escape")
