"""Does the dashboard find tasks, tell what became of one, and change one or many? A real master, a real Chromium."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)

HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\'"&lt;b&gt;'
REFUSED = "status of 4"  # what Chromium itself writes into the console about a 404


def row(page: Any, task_id: int) -> Any:
    return page.locator(f'tr[data-row="{task_id}"]')


def rows(page: Any) -> Any:
    return page.locator("tr[data-row]")


class Day(NamedTuple):
    """A master that the tests of this file share, which only look at it."""

    master: Any
    url: str
    ids: dict[str, int]


@pytest.fixture(scope="module")
def day(launch_master):
    """Two devices, and a task in each state; its id by the state."""
    master = launch_master()
    master.register("shop-1", device_name="Front desk")
    master.register("shop-2")
    ids = {
        name: master.submit_one(batch="day", username=name, app_id="com.example.ferry")
        for name in ("completed", "failed", "running", "assigned")
    }
    completed, failed, running, _assigned = master.pull("shop-1", 4)
    master.report("shop-1", completed, "completed", result={"pages": 3}, duration_seconds=1.25)
    error = {"error_message": "403 Forbidden", "error_type": "HTTPError", "log_tail": "Traceback: asking for it"}
    master.report("shop-1", failed, "running")
    master.report("shop-1", failed, "failed", duration_seconds=0.5, retry=False, **error)
    master.report("shop-1", running, "running")
    ids["scheduled"] = master.submit_one(delay_seconds=3600, username="scheduled")
    ids["cancelled"] = master.submit_one(username="cancelled", parent_id=ids["completed"])
    master.call("POST", f"/tasks/{ids['cancelled']}/cancel", {"reason": "wrong dates"})
    ids["pending"] = master.submit_one("unknown_type", username="pending", batch="day")
    return Day(master, master.url + "/", ids)


# ---- the list ----


def test_each_row_says_what_the_task_is_about_and_how_it_stands(day, open_tab):
    ids = day.ids
    page = open_tab(f"{day.url}#/tasks").page
    expect(rows(page)).to_have_count(7)
    for name, words in (
        ("completed", ("Completed", "com.example.ferry", "day", "shop-1", "echo")),
        ("failed", ("Failed", "403 Forbidden")),
        ("scheduled", ("Scheduled", "Due at")),
        ("cancelled", ("Cancelled", "wrong dates")),
        ("pending", ("Pending", "None of the 2 devices runs task type unknown_type", "Waits")),
        ("running", ("Running", "Runs for")),
    ):
        for word in words:
            expect(row(page, ids[name])).to_contain_text(word)
    row(page, ids["failed"]).get_by_role("link", name=f"task {ids['failed']}, echo, Failed").click()
    expect(page.get_by_role("heading", name=f"#{ids['failed']} · echo")).to_be_visible()


def test_the_address_holds_the_filter(day, open_tab):
    ids = day.ids
    page = open_tab(f"{day.url}#/tasks").page
    expect(rows(page)).to_have_count(7)
    page.keyboard.press("/")
    page.keyboard.type("pend")
    expect(rows(page)).to_have_count(1)
    expect(row(page, ids["pending"])).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    for state in ("Failed", "Cancelled"):
        page.get_by_role("button", name=state, exact=True).click()
    expect(rows(page)).to_have_count(2)
    page.reload()
    expect(rows(page)).to_have_count(2)
    expect(page.get_by_role("button", name="Failed", exact=True)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Clear").click()
    expect(rows(page)).to_have_count(7)
    page.get_by_role("button", name="More filters").click()
    page.get_by_label("Error, exactly").fill("403 Forbidden")
    expect(rows(page)).to_have_count(1)
    expect(row(page, ids["failed"])).to_be_visible()
    for search, found in (
        ("device_id=shop-1&batch=day&task_type=echo", ("completed", "failed", "running", "assigned")),
        (f"parent_id={ids['completed']}", ("cancelled",)),
        ("username=running&app_id=com.example.ferry", ("running",)),
        ("created_before=2020-01-01T00:00:00Z", ()),
    ):
        page.goto(f"{day.url}#/tasks?{search}")
        expect(rows(page)).to_have_count(len(found))
        for name in found:
            expect(row(page, ids[name])).to_be_visible()
        expect(page.get_by_role("button", name="More filters")).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_text("No task matches this filter.")).to_be_visible()


def test_a_filter_that_the_master_refuses_is_told(day, open_tab):
    page = open_tab(f"{day.url}#/tasks?status=sleeping", forgive=(REFUSED,)).page
    expect(page.get_by_role("alert")).to_contain_text("status")
    expect(page.locator("#banner")).to_be_hidden()


def test_pages_follow_each_other(start_master, open_tab):
    master = start_master()
    ids = master.submit(*({"task_type": "echo", "batch": "many"} for _ in range(120)))
    page = open_tab(f"{master.url}/#/tasks?batch=many").page
    expect(row(page, ids[-1])).to_be_visible()
    expect(rows(page)).to_have_count(50)
    for newest in (ids[-51], ids[-101]):
        page.get_by_role("button", name="Next page").click()
        expect(rows(page).first).to_have_attribute("data-row", str(newest))
    expect(rows(page)).to_have_count(20)
    expect(page.get_by_role("button", name="Next page")).to_have_count(0)
    page.go_back()
    expect(rows(page).first).to_have_attribute("data-row", str(ids[-51]))
    page.get_by_role("button", name="First page").click()
    expect(row(page, ids[-1])).to_be_visible()


@pytest.mark.slow
def test_a_hundred_thousand_tasks_are_paged_filtered_and_counted(start_master, open_tab):
    master = start_master()
    task = {"task_type": "echo", "batch": "many", "username": "acme"}
    for _ in range(20):
        newest = master.submit(*[task] * 5000)[-1]
    needles = master.submit(*[{**task, "username": "needle"}] * 3)
    page = open_tab(f"{master.url}/#/tasks").page
    expect(row(page, needles[-1])).to_be_visible()
    page.get_by_role("button", name="Next page").click()
    expect(rows(page).first).to_have_attribute("data-row", str(newest - 47))
    page.get_by_role("button", name="First page").click()
    page.get_by_role("button", name="Pending").click()
    page.get_by_role("searchbox").fill("need")
    expect(rows(page)).to_have_count(3)
    page.go_back()  # what was typed is gone from the address, and so from the field
    expect(page.get_by_role("searchbox")).to_have_value("")
    expect(rows(page)).to_have_count(50)
    page.get_by_role("button", name="Cancel…").click()
    expect(page.get_by_role("dialog")).to_contain_text("This cancels 100,003 tasks.")
    page.keyboard.press("Escape")
    page.goto(f"{master.url}/#/batches/many")
    expect(page.get_by_text("0% · 0 of 100,003")).to_be_visible()
    page.get_by_role("link", name="Overview").click()
    expect(page.locator(".tile[data-state=pending]")).to_contain_text("100,003")


def test_a_search_that_stopped_early_says_so_and_goes_on(day, open_tab):
    tab = open_tab("about:blank")

    def stop_early(route: Any) -> None:
        answer = route.fetch().json()
        is_second = "cursor=" in route.request.url
        route.fulfill(json=answer if is_second else {"tasks": [], "next_cursor": str(10**9), "partial": True})

    tab.page.route(re.compile(r"/tasks\?.*text="), stop_early)
    tab.page.goto(f"{day.url}#/tasks?text=pend")
    expect(tab.page.get_by_text("The search stopped early")).to_be_visible()
    expect(tab.page.get_by_text("No task matches")).to_have_count(0)
    tab.page.get_by_role("button", name="Next page").click()
    expect(row(tab.page, day.ids["pending"])).to_be_visible()


def test_many_waiting_tasks_of_one_lane_cost_one_question(master, dashboard_url, open_tab):
    ids = [master.submit_one("unknown_type") for _ in range(25)]
    tab = open_tab("about:blank")
    asked: set[str] = set()
    tab.page.on("request", lambda request: request.url.endswith("/why") and asked.add(request.url))
    tab.page.goto(f"{dashboard_url}#/tasks")
    expect(row(tab.page, ids[-1])).to_contain_text("No device is registered")
    expect(row(tab.page, ids[0])).to_contain_text("No device is registered")
    assert len(asked) == 1


def test_events_do_not_hurry_what_costs_the_master_more(master, dashboard_url, open_tab):
    master.submit_one("unknown_type")
    tab = open_tab("about:blank")
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(urlsplit(request.url).path.rpartition("/")[2]))
    started = time.monotonic()
    tab.page.goto(f"{dashboard_url}#/tasks")
    for _ in range(6):
        task_id = master.submit_one("unknown_type")
        expect(row(tab.page, task_id)).to_contain_text("No device is registered")
    assert asked.count("tasks") >= 6
    assert asked.count("why") <= 1 + (time.monotonic() - started) / 10


def test_a_new_task_appears_by_itself_but_moves_nothing_under_the_mouse(master, dashboard_url, open_tab):
    first = master.submit_one()
    page = open_tab(f"{dashboard_url}#/tasks").page
    expect(row(page, first)).to_be_visible()
    second = master.submit_one()
    expect(row(page, second)).to_be_visible()
    row(page, first).hover()
    third = master.submit_one()
    expect(page.get_by_text("1 newer")).to_be_visible()
    expect(row(page, third)).to_have_count(0)
    page.mouse.move(0, 0)
    expect(row(page, third)).to_be_visible()


def test_an_empty_list_teaches_the_first_task(master, dashboard_url, open_tab):
    page = open_tab(f"{dashboard_url}#/tasks").page
    command = shlex.split(page.locator(".command code").inner_text())
    assert command[:2] == ["curl", f"{master.url}/api/distribution/tasks"]
    master.call("POST", "/tasks", json.loads(command[command.index("-d") + 1]))
    expect(rows(page)).to_have_count(1)


def test_what_matches_is_exported_by_a_link(day, open_tab):
    page = open_tab(f"{day.url}#/tasks?batch=day&status=failed,completed").page
    expect(rows(page)).to_have_count(2)
    with page.expect_download() as download:
        page.get_by_role("link", name="Export JSONL").click()
    lines = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert {line["id"] for line in lines if "id" in line} == {day.ids["completed"], day.ids["failed"]}
    with page.expect_download() as download:
        page.get_by_role("link", name="Export CSV").click()
    assert download.value.suggested_filename == "tasks.csv"


# ---- changing many ----


def test_a_bulk_action_tells_its_count_before_it_changes_anything(master, dashboard_url, open_tab):
    master.submit(*({"task_type": "echo", "batch": "wrong"} for _ in range(12)))
    other = master.submit_one(batch="right")
    page = open_tab(f"{dashboard_url}#/tasks?batch=wrong").page
    expect(rows(page)).to_have_count(12)
    page.get_by_role("button", name="Cancel…").click()
    dialog = page.get_by_role("dialog", name="Cancel by filter")
    expect(dialog).to_contain_text("This cancels 12 tasks.")
    expect(dialog).to_contain_text("wrong")
    assert master.states("wrong")["pending"] == 12
    dialog.get_by_label("Reason").fill("mistyped")
    dialog.get_by_role("button", name="Cancel 12 tasks").click()
    expect(page.locator(".said")).to_contain_text("12 tasks cancelled.")
    expect(rows(page).first).to_contain_text("mistyped")
    assert master.states("wrong")["cancelled"] == 12
    assert master.call("GET", f"/tasks/{other}")["status"] == "pending"
    page.get_by_role("button", name="Cancel…").click()
    expect(page.get_by_role("dialog")).to_contain_text("Nothing here can be cancelled")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Run again…").click()
    page.get_by_role("button", name="Run 12 tasks again").click()
    expect(page.locator(".said")).to_contain_text("12 tasks are back in the queue.")
    assert master.states("wrong")["pending"] == 12


def test_checked_rows_are_cancelled_and_that_is_taken_back(master, dashboard_url, open_tab):
    ids = [master.submit_one() for _ in range(3)]
    page = open_tab(f"{dashboard_url}#/tasks").page
    for task_id in ids[:2]:
        page.get_by_role("checkbox", name=f"Choose task {task_id}").check()
    expect(page.get_by_text("2 chosen")).to_be_visible()
    page.get_by_role("button", name="Cancel these").click()
    expect(row(page, ids[0])).to_contain_text("Cancelled")
    expect(row(page, ids[1])).to_contain_text("Cancelled")
    expect(row(page, ids[2])).to_contain_text("Pending")
    page.get_by_role("button", name="Undo").click()
    expect(row(page, ids[0])).to_contain_text("Pending")
    expect(row(page, ids[1])).to_contain_text("Pending")


# ---- one task ----


def test_a_task_tells_its_life_attempts_and_error(day, open_tab):
    page = open_tab(f"{day.url}#/tasks/{day.ids['failed']}").page
    way = page.get_by_role("list", name="The way it went").locator("li")
    expect(way).to_have_text([re.compile(word) for word in ("Pending", "Assigned.*shop-1", "Running", "Failed")])
    expect(page.locator("#standing")).to_have_text("403 Forbidden")
    attempt = page.locator(".timeline details")
    for text in ("shop-1", "Failed", "HTTPError: 403 Forbidden", "Traceback: asking for it", "waited"):
        expect(attempt).to_contain_text(text)
    expect(page.locator(".facts")).to_contain_text("com.example.ferry")
    page.goto(f"{day.url}#/tasks/{day.ids['completed']}")
    expect(page.locator("pre").first).to_be_visible()
    expect(page.get_by_role("region", name="Result")).to_contain_text('"pages": 3')
    expect(row(page, day.ids["cancelled"])).to_be_visible()  # its child


def test_the_life_is_drawn_on_the_states_that_the_master_gives(day, open_tab):
    page = open_tab(f"{day.url}#/tasks/{day.ids['failed']}").page
    expect(page.locator(".machine .node")).to_have_count(7)
    expect(page.locator(".machine .node.now")).to_have_text("Failed")
    expect(page.locator(".machine .arrow.taken")).to_have_count(4)
    expect(page.locator(".machine .node.been")).to_have_text(["Pending", "Assigned", "Running"], ignore_case=True)


def test_a_waiting_task_says_why_for_each_device(day, open_tab):
    page = open_tab(f"{day.url}#/tasks/{day.ids['pending']}").page
    expect(page.locator("#why")).to_contain_text("None of the 2 devices runs task type unknown_type")
    for device in ("shop-1", "shop-2"):
        expect(row(page, device)).to_contain_text("does not run task type unknown_type")
    expect(page.get_by_text("Looked at again within")).to_be_visible()


def test_the_limit_that_holds_a_task_is_shown(start_master, open_tab):
    master = start_master(limits=[{"name": "site", "task_type": "echo", "max_running": 1}])
    master.register("shop-1")
    ids = [master.submit_one() for _ in range(2)]
    [task] = master.pull("shop-1")
    waiting = next(task_id for task_id in ids if task_id != task["id"])
    page = open_tab(f"{master.url}/#/tasks/{waiting}").page
    expect(page.locator("#why")).to_contain_text("1 of 1 run")
    expect(page.get_by_text("Looked at again when one of the limit's tasks ends")).to_be_visible()
    master.report("shop-1", task, "completed", result={})
    expect(page.locator("#why")).not_to_contain_text("1 of 1 run")


def test_a_scheduled_task_tells_the_limit_that_holds_it_too(start_master, open_tab):
    master = start_master(limits=[{"name": "account", "task_type": "echo", "key": ["username"]}])
    master.register("shop-1")
    task_id = master.submit_one(username="joe")
    [task] = master.pull("shop-1")
    until = "2999-01-01T00:00:00Z"
    master.report("shop-1", task, "snoozed", snooze_seconds=3600, limit_closed_until=until)
    page = open_tab(f"{master.url}/#/tasks/{task_id}").page
    expect(page.locator("#why")).to_contain_text("When it is due, this limit may still hold it")
    expect(page.get_by_role("link", name="account")).to_be_visible()
    expect(page.get_by_text(re.compile(r"Due in 5\dm"))).to_be_visible()


def test_a_task_is_cancelled_after_asking_twice_and_brought_back(master, dashboard_url, open_tab):
    task_id = master.submit_one()
    page = open_tab(f"{dashboard_url}#/tasks/{task_id}").page
    page.get_by_role("button", name="Cancel the task").click()
    assert master.call("GET", f"/tasks/{task_id}")["status"] == "pending"
    page.get_by_role("button", name="Really cancel?").click()
    expect(page.locator(".machine .way li").last).to_contain_text("Cancelled")
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("button", name="Cancel the task")).to_be_visible()
    assert master.call("GET", f"/tasks/{task_id}")["status"] == "pending"
    master.call("POST", f"/tasks/{task_id}/cancel", {})
    page.get_by_role("button", name="Run it again").click()
    expect(page.get_by_role("button", name="Cancel the task")).to_be_visible()


def test_progress_is_shown_while_it_runs(master, dashboard_url, open_tab):
    master.register("shop-1")
    task_id = master.submit_one()
    [task] = master.pull("shop-1")
    lease = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "phase": "running"}
    page = open_tab(f"{dashboard_url}#/tasks/{task_id}").page
    for seq, part, message in ((1, 0.25, "page 1 of 4"), (2, 0.75, "page 3 of 4")):
        master.beat("shop-1", seq=seq, holding=[{**lease, "progress": part, "message": message}])
        expect(page.locator(".task .progress")).to_contain_text(f"{part:.0%} · {message}")
    expect(page.get_by_role("region", name="Attempts")).to_contain_text("Runs for")


def test_a_late_outcome_is_told_beside_the_attempt(master, dashboard_url, open_tab):
    master.register("shop-1")
    task_id = master.submit_one()
    [old] = master.pull("shop-1")
    master.report("shop-1", old, "released")
    master.register("shop-2")
    [new] = master.pull("shop-2")
    master.report("shop-2", new, "completed", result={"by": "shop-2"})
    assert master.report("shop-1", old, "completed", result={"by": "shop-1"})["outcome"] == "stale"
    page = open_tab(f"{dashboard_url}#/tasks/{task_id}").page
    attempts = page.locator(".timeline details")
    expect(attempts).to_have_count(2)
    attempts.last.locator("summary").click()
    expect(attempts.last).to_contain_text("Late report: Completed")
    expect(page.get_by_role("region", name="Result")).to_contain_text("shop-2")


def test_a_tasks_files_are_downloaded(master, dashboard_url, open_tab):
    master.register("shop-1")
    task_id = master.submit_one()
    [task] = master.pull("shop-1")
    lease = {"device_id": "shop-1", "assignment_id": task["assignment_id"], "lease_id": task["lease_id"]}
    content = b"date,installs\n" * 200
    query = {**lease, "name": "report.csv", "sha256": hashlib.sha256(content).hexdigest()}
    sent = {"params": query, "data": content, "headers": {"Content-Type": "application/octet-stream"}}
    master.call("PUT", "/tasks/artifacts", **sent)
    page = open_tab(f"{dashboard_url}#/tasks/{task_id}").page
    files = page.get_by_role("region", name="Files").locator("li")
    expect(files).to_contain_text("report.csv 3kB")
    with page.expect_download() as download:
        files.get_by_role("link").click()
    assert download.value.suggested_filename == "report.csv"
    assert Path(download.value.path()).read_bytes() == content


def test_a_task_that_is_not_there_says_so(day, open_tab):
    page = open_tab(f"{day.url}#/tasks/99999999", forgive=(REFUSED,)).page
    expect(page.get_by_role("alert")).to_contain_text("There is no task 99999999")


def test_scripts_planted_in_every_field_never_run(master, dashboard_url, open_tab):
    master.register("shop-1", device_name=HOSTILE)
    names = dict.fromkeys(("username", "app_id", "batch", "unique_key"), HOSTILE)
    failed = master.submit_one(**names, task_data={HOSTILE: HOSTILE}, same_device_as=HOSTILE)
    [task] = master.pull("shop-1")
    texts = dict.fromkeys(("error_message", "error_type", "log_tail"), HOSTILE)
    master.report("shop-1", task, "failed", retry=False, result={HOSTILE: HOSTILE}, **texts)
    cancelled = master.submit_one()
    master.call("POST", f"/tasks/{cancelled}/cancel", {"reason": HOSTILE})
    running = master.submit_one()
    [task] = master.pull("shop-1")
    lease = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "phase": "running"}
    master.beat("shop-1", holding=[{**lease, "progress": 0.5, "message": HOSTILE}])
    page = open_tab(f"{dashboard_url}#/tasks", locale="zh-CN").page
    expect(row(page, failed)).to_contain_text(HOSTILE)
    expect(row(page, cancelled)).to_contain_text(HOSTILE)
    page.goto(f"{dashboard_url}#/tasks/{failed}")
    expect(page.locator("#standing")).to_have_text(HOSTILE)
    expect(page.locator(".timeline pre")).to_have_text(HOSTILE)
    expect(page.locator(".facts")).to_contain_text(HOSTILE)
    expect(page.get_by_role("region", name="任务数据")).to_contain_text("<script>")
    page.goto(f"{dashboard_url}#/tasks/{running}")
    expect(page.locator(".task .progress")).to_contain_text(HOSTILE)
    page.goto(f"{dashboard_url}#/tasks?batch=" + page.evaluate("encodeURIComponent", HOSTILE))
    expect(rows(page)).to_have_count(1)
    page.get_by_role("button", name="重新运行…").click()
    expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
    page.keyboard.press("Escape")
    page.goto(f"{dashboard_url}#/new?from={failed}")
    expect(page.locator("[name=rest]")).to_have_value(re.compile("<script>"))
    page.goto(f"{dashboard_url}#/batches")
    expect(page.locator("table")).to_contain_text(HOSTILE)
    page.locator("tr[data-row] a").click()
    expect(page.get_by_role("region", name="按错误信息分组的失败")).to_contain_text(HOSTILE)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x], body script").count() == 0


@pytest.mark.parametrize("widths", [(320, 1280), pytest.param((390, 768, 1920), marks=pytest.mark.slow)])
def test_nothing_runs_off_the_side_from_a_phone_to_a_wall(day, open_tab, widths):
    page = open_tab(day.url, own=True).page
    for view in ("tasks", "tasks?status=failed&batch=day", "new", "new?mode=many", "batches", "batches/day"):
        page.goto(f"{day.url}#/{view}")
        expect(page.locator("main .part h2").first).to_be_visible()
        expect(page.locator(".waiting")).to_have_count(0)
        for width in widths:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (view, width)
