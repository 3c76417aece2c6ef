"""Does the dashboard show what the master knows, and run nothing that others wrote? A real master, a real Chromium."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import reasons

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=20_000)

HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\'"&lt;b&gt;'
REFUSED = "status of 401"  # what Chromium itself writes into the console about a 401
GONE = "ERR_"  # and about a master that does not answer

CONTRASTS = """() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.getClientRects().length || getComputedStyle(node).visibility === "hidden") continue;
    const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${node.outerHTML.slice(0, 80)} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""

OVERFLOWING = """() => [...document.querySelectorAll("body, .card, .fit, tbody tr, tbody td, dialog, .dialog-body, dd")]
  .filter((node) => node.scrollWidth > node.clientWidth + 1).map((node) => node.outerHTML.slice(0, 80))"""


def tile(page: Any, state: str) -> Any:
    return page.locator(f"#tiles [data-row={state}] b")


def row(page: Any, task_id: int) -> Any:
    return page.locator(f'#task-rows tr[data-row="{task_id}"]')


def a_day_of_work(master: Any) -> dict[str, int]:
    """Two devices, and a task in each state; its id by the state."""
    master.register("shop-1", device_name="Front desk", tags=["selectors"])
    master.register("shop-2", device_name="收银台")
    master.beat("shop-1", cpu_usage=97.0, memory_usage=88.0, disk_usage=12.5)
    ids = {
        name: master.submit_one(batch="day", username=name) for name in ("completed", "failed", "running", "assigned")
    }
    completed, failed, running, _assigned = master.pull("shop-1", 4)
    master.report("shop-1", completed, "completed", result={"pages": 3}, duration_seconds=1.25)
    error = {"error_message": "403 Forbidden", "error_type": "HTTPError", "log_tail": "asking for the report"}
    master.report("shop-1", failed, "failed", duration_seconds=0.5, retry=False, **error)
    master.report("shop-1", running, "running")
    ids["scheduled"] = master.submit_one(delay_seconds=3600)
    ids["cancelled"] = master.submit_one()
    master.call("POST", f"/tasks/{ids['cancelled']}/cancel", {"reason": "wrong dates"})
    ids["pending"] = master.submit_one("unknown_type", username="pending", batch="day")
    return ids


class Day(NamedTuple):
    """A master that the tests of this file share, which only look at it."""

    master: Any
    url: str
    ids: dict[str, int]


@pytest.fixture(scope="module")
def day(launch_master):
    master = launch_master()
    return Day(master, master.url + "/", a_day_of_work(master))


def test_the_page_shows_counts_devices_and_tasks(day, open_tab):
    ids = day.ids
    page = open_tab(day.url).page
    for state in ids:
        expect(tile(page, state)).to_have_text("1")
    expect(tile(page, "all")).to_have_text("7")
    expect(page.locator("#device-rows tr")).to_have_count(2)
    device = page.locator("#device-rows tr[data-row=shop-1]")
    for text in ("Front desk", "2 of 4", "97%", "88%", "selectors", "1 / 1"):
        expect(device).to_contain_text(text)
    expect(device).to_contain_text(re.compile(r"\d+s ago"))
    expect(page.locator("#device-rows tr[data-row=shop-2]")).to_contain_text("收银台")
    expect(page.locator("#task-rows tr")).to_have_count(7)
    expect(row(page, ids["failed"])).to_contain_text("403 Forbidden")
    expect(row(page, ids["cancelled"])).to_contain_text("wrong dates")
    expect(row(page, ids["scheduled"])).to_contain_text("Due at")


def test_a_waiting_task_says_why(day, open_tab):
    task_id = day.ids["pending"]
    page = open_tab(day.url).page
    reason = day.master.call("GET", f"/tasks/{task_id}/why")["detail"]
    sentence = reason[0].upper() + reason[1:]
    expect(row(page, task_id)).to_contain_text(sentence)
    expect(page.locator("#oldest")).to_contain_text(sentence)
    row(page, task_id).locator("a").click()
    expect(page.locator("#dialog-why")).to_contain_text(sentence)
    expect(page.locator("#dialog-devices li")).to_have_count(2)


def test_many_waiting_tasks_of_one_lane_cost_one_question(master, dashboard_url, open_tab):
    ids = [master.submit_one("unknown_type") for _ in range(25)]
    tab = open_tab("about:blank")
    asked: list[str] = []
    tab.page.on("request", lambda request: request.url.endswith("/why") and asked.append(request.url))
    tab.page.goto(dashboard_url)
    expect(row(tab.page, ids[-1])).to_contain_text("No device is registered")
    expect(row(tab.page, ids[0])).to_contain_text("No device is registered")
    assert len(asked) < len(ids) // 2


def test_the_page_refreshes_itself(master, dashboard_url, open_tab):
    page = open_tab(dashboard_url).page
    expect(page.locator("#link")).to_have_text("Live")
    expect(tile(page, "pending")).to_have_text("0")
    task_id = master.submit_one()
    expect(tile(page, "pending")).to_have_text("1")
    master.register("shop-1")
    expect(page.locator("#device-rows tr")).to_have_count(1)
    master.report("shop-1", master.pull("shop-1")[0], "completed", result={})
    expect(row(page, task_id)).to_contain_text("Completed")


def test_a_row_opens_the_task_with_error_attempts_and_log(day, open_tab):
    ids = day.ids
    page = open_tab(day.url).page
    row(page, ids["failed"]).locator("a").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name=f"#{ids['failed']} · echo")
    expect(dialog.locator("#dialog-error")).to_contain_text("403 Forbidden")
    attempt = dialog.locator("details")
    for text in ("shop-1", "Failed", "HTTPError: 403 Forbidden", "asking for the report", "0.5s"):
        expect(attempt).to_contain_text(text)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(row(page, ids["failed"]).locator("a")).to_be_focused()
    page.goto(f"{day.url}#task={ids['completed']}")
    expect(page.locator("#dialog-result")).to_have_text(re.compile(r'"pages": 3'))


def test_a_task_is_cancelled_after_asking_twice_and_requeued(master, dashboard_url, open_tab):
    task_id = master.submit_one()
    page = open_tab(f"{dashboard_url}#task={task_id}").page
    page.get_by_role("button", name="Cancel the task").click()
    assert master.call("GET", f"/tasks/{task_id}")["status"] == "pending"
    page.get_by_role("button", name="Really cancel?").click()
    expect(page.locator("#dialog-state")).to_have_text("Cancelled")
    page.get_by_role("button", name="Run it again").click()
    expect(page.locator("#dialog-state")).to_have_text("Pending")
    assert master.call("GET", f"/tasks/{task_id}")["status"] == "pending"


def test_scripts_planted_in_every_field_never_run(master, dashboard_url, open_tab):
    master.register("shop-1", device_name=HOSTILE, device_type=HOSTILE, version=HOSTILE)
    master.call("PUT", "/devices/shop-1/status", {"status": "active", "reason": HOSTILE})
    names = dict.fromkeys(("username", "app_id", "batch", "unique_key"), HOSTILE)
    failed = master.submit_one(**names, task_data={HOSTILE: HOSTILE})
    [task] = master.pull("shop-1")
    texts = dict.fromkeys(("error_message", "error_type", "log_tail"), HOSTILE)
    master.report("shop-1", task, "failed", retry=False, result={HOSTILE: HOSTILE}, **texts)
    cancelled = master.submit_one()
    master.call("POST", f"/tasks/{cancelled}/cancel", {"reason": HOSTILE})
    page = open_tab(f"{dashboard_url}#text={HOSTILE}&task={failed}", locale="zh-CN").page
    expect(page.locator("#dialog-error")).to_contain_text(HOSTILE)
    expect(page.locator("#dialog-attempts pre")).to_have_text(HOSTILE)
    expect(page.locator("#dialog-data")).to_contain_text("<script>")
    page.keyboard.press("Escape")
    page.goto(dashboard_url)
    page.reload()
    expect(row(page, failed)).to_contain_text(HOSTILE)
    expect(row(page, cancelled)).to_contain_text(HOSTILE)
    expect(page.locator("#device-rows")).to_contain_text(HOSTILE)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x], body script").count() == 0


def test_a_tasks_files_are_listed_and_downloaded(master, dashboard_url, open_tab):
    master.register("shop-1")
    task_id = master.submit_one()
    [task] = master.pull("shop-1")
    lease = {"device_id": "shop-1", "assignment_id": task["assignment_id"], "lease_id": task["lease_id"]}
    content = b"date,installs\n" * 200
    query = {**lease, "name": "report.csv", "sha256": hashlib.sha256(content).hexdigest()}
    sent = {"params": query, "data": content, "headers": {"Content-Type": "application/octet-stream"}}
    master.call("PUT", "/tasks/artifacts", **sent)
    page = open_tab(dashboard_url).page
    row(page, task_id).locator("a").click()
    files = page.locator("#dialog-files li")
    expect(files).to_have_count(1)
    expect(files).to_contain_text("report.csv 3kB")
    with page.expect_download() as download:
        files.locator("a").click()
    assert download.value.suggested_filename == "report.csv"
    assert Path(download.value.path()).read_bytes() == content
    expect(page.locator("#files-part h3")).to_have_text("Files")
    page.locator("#dialog-close").click()
    page.locator("#language").click()
    row(page, task_id).locator("a").click()
    expect(page.locator("#files-part h3")).to_have_text("文件")


def test_a_device_in_trouble_says_so_in_its_row_in_both_languages(master, dashboard_url, open_tab):
    for name in ("full", "broken", "newer", "well"):
        master.register(name)
    master.beat("full", problem="spool_full", clock=time.time() + 7200)
    master.beat("broken", problem="spool_unwritable", clock=time.time() - 120)
    master.beat("newer", problem=HOSTILE)
    master.beat("well", clock=time.time() - 20)
    page = open_tab(dashboard_url, locale="en").page
    of = lambda name: page.locator("#device-rows tr", has_text=name).first  # noqa: E731
    expect(of("full")).to_contain_text("Its spool is full")
    expect(of("full")).to_contain_text(re.compile(r"Its clock is (2h|1h 59m) ahead\."))
    expect(of("broken")).to_contain_text("It cannot write its results to disk")
    expect(of("broken")).to_contain_text(re.compile(r"Its clock is \S+( \S+)? behind\."))
    expect(of("newer")).to_contain_text(HOSTILE[:20])
    expect(of("well").locator(".reason")).to_have_text("")
    page = open_tab(dashboard_url, locale="zh-CN").page
    expect(page.locator("#device-rows")).to_contain_text("结果暂存区已满")
    assert page.evaluate("window.pwned") is None


def test_the_key_form_lets_in_with_the_key_only(start_master, open_tab):
    master = start_master(api_key="opensesame-of-this-test")
    task_id = master.submit_one(username="behind the key")
    page = open_tab(master.url + "/", forgive=(REFUSED,)).page
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.locator("#board")).to_be_hidden()
    page.keyboard.type("not-the-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").first).to_contain_text("not the key")
    page.get_by_label("API key").fill("opensesame-of-this-test")
    page.get_by_role("button", name="Open the dashboard").click()
    expect(row(page, task_id)).to_contain_text("behind the key")
    expect(page.locator("#link")).to_have_text("Live")
    assert "opensesame" not in page.evaluate("document.cookie + JSON.stringify(localStorage) + location.href")
    assert "opensesame" not in page.content()
    page.reload()
    expect(row(page, task_id)).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert "behind the key" not in page.locator("body").inner_text()
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()


def test_the_language_follows_the_browser_and_the_switch_is_remembered(day, open_tab):
    ids = day.ids
    page = open_tab(day.url, locale="zh-CN").page
    expect(page.get_by_role("heading", name="设备")).to_be_visible()
    expect(row(page, ids["failed"])).to_contain_text("失败")
    expect(row(page, ids["pending"])).to_contain_text("没有设备能执行这种任务")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("heading", name="Devices")).to_be_visible()
    expect(row(page, ids["failed"])).to_contain_text("Failed")
    page.reload()
    expect(page.get_by_role("heading", name="Devices")).to_be_visible()


def test_both_languages_have_the_same_words(day, open_tab):
    page = open_tab(day.url).page
    read = "(name) => import(`/static/strings.${name}.js`).then((module) => module.default)"
    english, chinese = page.evaluate(read, "en"), page.evaluate(read, "zh")
    assert {key for key in chinese if not key.startswith("why_")} == set(english)
    assert {f"why_{reason}" for reason in reasons.REASONS} <= set(chinese)
    braces = re.compile(r"\{\w+\}")
    for key, words in english.items():
        assert sorted(braces.findall(words)) == sorted(braces.findall(chinese[key])), key


def test_the_address_holds_the_filter(day, open_tab):
    ids = day.ids
    page = open_tab(day.url).page
    expect(page.locator("#task-rows tr")).to_have_count(7)
    page.locator("#tiles [data-row=failed]").click()
    expect(page.locator("#task-rows tr")).to_have_count(1)
    assert page.url.endswith("#status=failed")
    page.go_back()
    expect(page.locator("#task-rows tr")).to_have_count(7)
    page.keyboard.press("/")
    page.keyboard.type("pend")
    expect(page.locator("#task-rows tr")).to_have_count(1)
    expect(row(page, ids["pending"])).to_be_visible()
    page.goto(f"{day.url}#batch=day&status=running")
    page.reload()
    expect(row(page, ids["running"])).to_be_visible()
    expect(page.locator("#filter [name=batch]")).to_have_value("day")
    page.goto(f"{day.url}#batch=nothing")
    expect(page.locator("#no-match")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#task-rows tr")).to_have_count(7)


def test_a_filter_that_the_master_refuses_is_told_beside_the_list(day, open_tab):
    page = open_tab(f"{day.url}#status=sleeping", forgive=("status of 4",)).page
    expect(page.locator("#task-note")).to_contain_text("status")
    expect(page.locator("#banner")).to_be_hidden()


def test_empty_states_teach_the_next_step(start_master, tmp_path, open_tab):
    master = start_master(worker_file=str(tmp_path / "not-built.pyz"))
    page = open_tab(master.url).page
    expect(page.locator("#submit-command")).to_be_visible()
    worker = shlex.split(page.locator("#worker-command").inner_text())
    assert worker[:2] == ["python", "worker.py"] and worker[-2:] == ["--master-url", master.url]
    curl = shlex.split(page.locator("#submit-command").inner_text())
    assert curl[:2] == ["curl", f"{master.url}/api/distribution/tasks"]
    master.call("POST", "/tasks", json.loads(curl[curl.index("-d") + 1]))
    expect(page.locator("#task-rows tr")).to_have_count(1)
    expect(page.locator("#no-tasks")).to_be_hidden()


def test_a_device_is_added_by_one_line_that_holds_the_masters_address_and_no_key(start_master, tmp_path, open_tab):
    (tmp_path / "worker.pyz").write_bytes(b"a whole device")
    master = start_master(worker_file=str(tmp_path / "worker.pyz"), api_key="a-key-that-no-page-shows")
    page = open_tab(master.url, forgive=(REFUSED,)).page
    page.locator("#key-input").fill("a-key-that-no-page-shows")
    page.locator("#key-input").press("Enter")
    expect(page.locator("#add-panel")).to_contain_text("No device has registered yet")
    master.register("shop-1")
    expect(page.locator("#add-panel")).to_be_hidden()
    page.get_by_role("button", name="Add a device").click()
    panel = page.locator("#add-panel")
    expect(panel).to_contain_text("Write the master's key in place of YOUR_KEY")
    expect(panel).to_contain_text("only this machine reaches")  # the test looks at 127.0.0.1
    unix, windows = (page.locator(f"#{name}-command").inner_text() for name in ("worker", "windows"))
    assert shlex.split(unix) == [
        "curl", "-fsSgO", f"{master.url}/edge/worker.pyz", "&&",
        "AF_API_KEY=YOUR_KEY", "python3", "worker.pyz", "--device-id", "shop-7", "--master-url", master.url,
    ]  # fmt: skip
    assert f'"{master.url}/edge/worker.pyz" -OutFile worker.pyz; $env:AF_API_KEY = "YOUR_KEY"; py worker.pyz' in windows
    assert "a-key-that-no-page-shows" not in page.content()
    assert page.evaluate(CONTRASTS) == [] and page.evaluate(OVERFLOWING) == []
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.get_by_role("button", name="Copy").last.click()
    expect(panel.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == windows
    page.get_by_role("button", name="中文").click()
    expect(panel).to_contain_text("在新机器上粘贴这一行")
    page.get_by_role("button", name="添加设备").click()
    expect(panel).to_be_hidden()


def test_a_lost_master_is_told_and_found_again(master, dashboard_url, open_tab):
    task_id = master.submit_one()
    # A master that stops refuses what comes during its last second.
    page = open_tab(dashboard_url, forgive=(GONE, "503")).page
    expect(row(page, task_id)).to_be_visible()
    master.stop()
    expect(page.locator("#banner")).to_contain_text("No answer from the master")
    expect(row(page, task_id)).to_be_visible()
    master.start()
    expect(page.locator("#banner")).to_be_hidden()
    newer = master.submit_one()
    expect(row(page, newer)).to_be_visible()


def test_times_are_in_the_viewers_zone_with_utc_on_hover(master, dashboard_url, open_tab):
    task_id = master.submit_one()
    page = open_tab(dashboard_url, timezone_id="Asia/Shanghai").page
    created = datetime.fromisoformat(master.call("GET", f"/tasks/{task_id}")["created_at"].replace("Z", "+00:00"))
    shown = row(page, task_id).locator("time")
    expect(shown).to_have_text(created.astimezone(timezone(timedelta(hours=8))).strftime("%H:%M:%S"))
    expect(shown).to_have_attribute("title", re.compile(created.strftime(r"%Y-%m-%d %H:%M:%S\.\d+ UTC")))


def test_every_text_has_aa_contrast_in_light_and_dark(day, open_tab):
    ids = day.ids
    page = open_tab(day.url).page
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.goto(day.url)
        expect(row(page, ids["pending"])).to_contain_text("unknown_type")
        assert page.evaluate(CONTRASTS) == [], scheme
        page.goto(f"{day.url}#status=failed&task={ids['failed']}")
        expect(page.locator("#dialog-error")).to_be_visible()
        assert page.evaluate(CONTRASTS) == [], scheme


def test_nothing_runs_off_the_side_from_a_phone_to_a_wall(master, dashboard_url, open_tab):
    ids = a_day_of_work(master)
    long = master.submit_one(username="a" * 128, unique_key="https://example.org/" + "b" * 200)
    page = open_tab(dashboard_url).page
    expect(row(page, ids["failed"])).to_be_visible()
    for width in (320, 390, 768, 900, 1024, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERFLOWING) == [], width
    page.goto(f"{dashboard_url}#task={long}")
    expect(page.locator("#dialog-facts")).to_contain_text("a" * 128)
    for width in (320, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(OVERFLOWING) == [], width


def test_what_a_running_task_says_of_its_progress_is_shown_live(master, dashboard_url, open_tab):
    master.register("shop-1")
    task_id = master.submit_one()
    (task,) = master.pull("shop-1", 1)
    page = open_tab(f"{dashboard_url}#task={task_id}").page
    for seq, part, sentence in ((1, 0.25, "page 1 of 4"), (2, 0.5, "<b>page 2 of 4</b>")):
        lease = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "phase": "running"}
        master.beat("shop-1", seq=seq, holding=[{**lease, "progress": part, "message": sentence}])
        expect(page.locator("#dialog-attempts summary")).to_contain_text(f"{part:.0%} · {sentence}")
