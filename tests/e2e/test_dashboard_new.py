"""Does the dashboard take in one task and a great many, say what is wrong before, and lose and double none? A real master, a real Chromium."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from farm import wait_for

from main import content_key
from task_files import read_tasks

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)

REFUSED = "status of 4"  # what Chromium itself writes into the console about a 422
GONE = "ERR_"  # and about a request that was cut off

READ_FILE = """async ([text, name]) => {
  const { readTasks } = await import("/static/views/read_tasks.js");
  const { contentKey } = await import("/static/views/content_key.js");
  const { tasks, problems } = readTasks(text, name);
  return { tasks: tasks.map(({ place, task }) => [place, task, contentKey(task)]), problems: problems.map((one) => one.place) };
}"""

FILES = {
    "list.json": '[\n {"task_type": "crawl", "task_data": {"url": "https://example.org/[{,}]", "n": [1, 2.5, null, true]}},\n\n'
    ' {"task_type": "echo", "batch": "b",\n  "unique_key": "k"} ]\n',
    "tasks.json": '{"tasks": [{"task_type": "echo"}, {"task_type": "echo", "priority": 9}]}',
    "one.json": '\ufeff {"task_type": "echo", "username": "收银台 \\"é\\" \\u2028"}',
    "lines.jsonl": '{"task_type": "echo", "task_data": {"b": 1, "a": {"z": "<b>", "y": []}}}\n\n{"task_type": "echo", "priority": 3}\r\n',
    "rows.csv": "task_type,username,priority,required_tags,task_data,task_data.depth,task_data.text,note\r\n"
    'echo,ann,3,"a, b","{""x"": [1]}",2,00123,hello\r\n'
    '\r\necho,"two\nlines",,,,true,"a ""quoted"" word",\r\necho,bob,1,,,2026-01-01,[1],"x,y"\r\n',
    "semicolons.csv": "task_type;batch;task_data.url\necho;b;https://example.org/?a=1,2\n",
    "tabs.csv": "task_type\tapp_id\necho\tcom.example.ferry\n",
}


@pytest.fixture(scope="module")
def empty_page(launch_master, chromium):
    """The dashboard's own modules, to be imported."""
    page = chromium.new_page()
    page.goto(launch_master().url + "/")
    yield page
    page.close()


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_the_browser_as_main_py_submit_reads_it(name, empty_page, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8", newline="")
    expected = [[line.place, line.task, content_key(line.task)] for line in read_tasks(path)]
    read = empty_page.evaluate(READ_FILE, [FILES[name].lstrip("\ufeff"), name])
    assert read["problems"] == []
    assert read["tasks"] == expected and expected


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.jsonl", '{"task_type": "echo"}\n{"task_type": \n[1]\n{"batch": "b"}\n', ["line 2", "line 3", "line 4"]),
        ("a.json", '[{"task_type": "echo"},\n{"task_type": nothing},\n{"task_type": "echo"}]', ["line 2"]),
        ("a.json", '[{"task_type": "echo"}\n {"task_type": "echo"}]', ["line 2"]),
        ("a.json", '[{"task_type": "echo"},\n 5]', ["line 2"]),
        ("a.json", '[{"task_type": "echo"', ["line 1"]),
        ("a.json", '[{"task_type": "echo"}]\n more', ["line 2"]),
        ("a.json", '{\n "task_type": echo}', ["the file"]),
        ("a.csv", "type,batch\necho,b\n", ["line 1"]),
        ("a.csv", "task_type,task_type\necho,b\n", ["line 1"]),
        ("a.csv", "task_type,priority\necho,high\necho,1,2\necho,3\n", ["line 2", "line 3"]),
        ("a.csv", 'task_type,batch\necho,"b\n', ["line 2"]),
        ("a.csv", 'task_type,batch\necho,"b"c\n', ["line 2"]),
        ("a.jsonl", '{"task_type": "echo", "task_data": {"id": 12345678901234567890}}', ["line 1"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_its_line(name, text, places, empty_page):
    assert empty_page.evaluate(READ_FILE, [text, name])["problems"] == places


# ---- one task ----


def field(page: Any, at: str) -> Any:
    return page.locator(f'[name="{at}"]')


def newest(master: Any) -> dict[str, Any]:
    task_id = master.get("/tasks?limit=1")["tasks"][0]["id"]
    task: dict[str, Any] = master.get(f"/tasks/{task_id}")
    return task


def test_a_form_makes_the_task_that_its_fields_say(master, dashboard_url, open_tab):
    page = open_tab(f"{dashboard_url}#/new").page
    field(page, "kind").select_option("crawl")
    field(page, "task_data.url").fill("https://example.org/")
    field(page, "task_data.follow").check()
    field(page, "task_data.follow.allow").fill("/en/\n/de/")
    field(page, "task_data.follow.max_pages").fill("50")
    field(page, "task_data.fields").fill('{"title": "h1"}')
    field(page, "rest").fill('{"depth": 1, "follow": {"max_depth": 2}}')
    field(page, "batch").fill("docs")
    field(page, "priority").fill("8")
    field(page, "required_tags").fill("selectors, fast")
    field(page, "delay_seconds").fill("3600")
    page.get_by_role("button", name="Submit the task").click()
    expect(page.locator(".said")).to_contain_text("is submitted")
    expect(page.get_by_role("heading", name=re.compile(r"#\d+ · crawl"))).to_be_visible()
    task = newest(master)
    assert task["task_data"] == {
        "url": "https://example.org/",
        "depth": 1,
        "follow": {"allow": ["/en/", "/de/"], "max_pages": 50, "max_depth": 2},
        "fields": {"title": "h1"},
    }
    assert (task["batch"], task["priority"], task["required_tags"]) == ("docs", 8, ["fast", "selectors"])
    assert task["status"] == "scheduled"
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".way li").last).to_contain_text("Cancelled")


def test_a_form_says_what_is_wrong_at_its_field_and_sends_nothing(master, dashboard_url, open_tab):
    page = open_tab(f"{dashboard_url}#/new", forgive=(REFUSED,)).page
    field(page, "kind").select_option("data_sync")
    field(page, "app_id").fill("not an app")
    field(page, "start_date").fill("2026-11-24")
    field(page, "end_date").fill("2026-11-01")
    field(page, "priority").fill("11")
    page.get_by_role("button", name="Submit the task").click()
    expect(field(page, "username")).to_be_focused()
    for at, words in (
        ("username", "This is needed."),
        ("app_id", "An app id has letters"),
        ("task_data.report", "This is needed."),
        ("end_date", "The end lies before the start."),
        ("priority", "from 1 to 10"),
    ):
        expect(page.locator("label.field", has=field(page, at)).get_by_role("alert")).to_contain_text(words)
    assert master.get("/tasks")["tasks"] == []
    field(page, "end_date").fill("2026-11-25")
    field(page, "kind").select_option("echo")
    field(page, "app_id").fill("")
    field(page, "priority").fill("5")
    field(page, "batch").fill("line\u0085break")
    page.get_by_role("button", name="Submit the task").click()
    expect(page.locator("label.field", has=field(page, "batch")).get_by_role("alert")).to_contain_text("batch")
    field(page, "batch").fill("right")
    page.get_by_role("button", name="Submit the task").click()
    expect(page.get_by_role("heading", name=re.compile(r"#\d+ · echo"))).to_be_visible()


def test_any_other_type_is_submitted_by_its_name(master, dashboard_url, open_tab):
    page = open_tab(f"{dashboard_url}#/new", own=True).page
    field(page, "kind").select_option("")
    field(page, "task_type").fill("my_own")
    field(page, "rest").fill('{"n": 1}')
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert json.loads(command[command.index("-d") + 1]) == {"task_type": "my_own", "task_data": {"n": 1}}
    page.get_by_role("button", name="Submit the task").click()
    expect(page.get_by_role("heading", name=re.compile(r"#\d+ · my_own"))).to_be_visible()
    assert newest(master)["task_data"] == {"n": 1}


def test_a_task_is_run_again_edited(master, dashboard_url, open_tab):
    data = {"url": "https://example.org/old", "follow": {"deny": ["\\.zip$"], "unheard": 1}, "raw": True, "x": {"y": 2}}
    old = master.submit_one("crawl", task_data=data, unique_key="page", batch="docs", username="ann", max_retry_count=7)
    page = open_tab(f"{dashboard_url}#/tasks/{old}").page
    page.get_by_role("link", name="Run again, edited").click()
    expect(field(page, "task_data.url")).to_have_value("https://example.org/old")
    field(page, "task_data.url").fill("https://example.org/new")
    page.get_by_role("button", name="Submit the task").click()
    expect(page.get_by_role("heading", name=f"#{old + 1} · crawl")).to_be_visible()
    task = newest(master)
    assert task["task_data"] == {**data, "url": "https://example.org/new"}
    assert (task["batch"], task["username"], task["max_retry_count"], task["unique_key"]) == ("docs", "ann", 7, None)
    assert master.get(f"/tasks/{old}")["task_data"] == data


# ---- many ----


def test_a_file_is_checked_by_line_before_the_right_part_is_sent(master, dashboard_url, open_tab, tmp_path):
    path = tmp_path / "tasks.csv"
    lines = [
        "task_type,username,priority,task_data.n",
        "echo,ann,3,1",
        "echo,<b>bob</b>,99,2",
        "echo,cid,x,3",
        "nobody,dan,1,4",
    ]
    path.write_text("\n".join(lines))
    page = open_tab(f"{dashboard_url}#/new?mode=many").page
    page.locator("input[type=file]").set_input_files(str(path))
    expect(page.get_by_role("status").filter(has_text="3 tasks read.")).to_contain_text("1 line is wrong.")
    expect(page.locator("table")).to_contain_text("<b>bob</b>")
    field(page, "batch").fill("sheet")
    page.get_by_role("button", name="Check 3 tasks").click()
    problems = page.locator(".problems li")
    expect(problems).to_have_text([re.compile("line 3: priority must be"), re.compile("line 4: Column priority")])
    expect(page.get_by_text("No device runs nobody tasks now")).to_be_visible()
    assert master.get("/tasks")["tasks"] == []
    page.get_by_role("button", name="Submit the other 2, leave 2 out").click()
    expect(page.get_by_text("2 created. 2 were left out.")).to_be_visible()
    expect(problems).to_have_count(2)
    page.get_by_role("link", name="Look at sheet").click()
    expect(page.locator("tr[data-row]")).to_have_count(2)
    assert {task["username"] for task in master.get("/tasks?batch=sheet")["tasks"]} == {"ann", "dan"}


def test_many_tasks_go_in_chunks_and_what_failed_goes_again_without_doubles(master, dashboard_url, open_tab):
    tab = open_tab(f"{dashboard_url}#/new?mode=many", own=True, forgive=(GONE, "503"))
    page, answers = tab.page, []

    def break_the_second(route: Any) -> None:
        """The second chunk arrives, and its answer is lost; then the master refuses for a while."""
        answers.append(len(json.loads(route.request.post_data)))
        if len(answers) == 1 or len(answers) > 5:
            route.continue_()
        elif len(answers) == 2:
            route.fetch()
            route.abort()
        else:
            route.fulfill(status=503, json={"detail": "The master is busy."})

    page.route(
        re.compile(r"/tasks$"),
        lambda route: break_the_second(route) if route.request.method == "POST" else route.continue_(),
    )
    expect(field(page, "tasks")).to_be_editable()
    page.clock.install()  # the pauses between the tries are not waited for
    text = "\n".join(json.dumps({"task_type": "echo", "batch": "load", "task_data": {"n": n}}) for n in range(2500))
    # As a file: Chromium takes ten seconds to type so many lines.
    load = {"name": "load.jsonl", "mimeType": "application/x-ndjson", "buffer": text.encode()}
    page.locator("input[type=file]").set_input_files(load)
    page.clock.run_for(1000)
    page.get_by_role("button", name="Check 2,500 tasks").click()
    page.get_by_role("button", name="Submit 2,500 tasks").click()
    again = page.get_by_role("button", name="Send the other 1,500 again")
    wait_for("the page to give up", lambda: page.clock.run_for(10_000) or again.is_visible())
    expect(page.get_by_text("1,500 were not sent: The master is busy.")).to_be_visible()
    again.click()
    expect(page.get_by_text("1,500 created. 1,000 were there already.")).to_be_visible()
    assert answers == [1000, 1000, 1000, 1000, 1000, 1000, 500]
    assert master.states("load")["pending"] == 2500


def test_a_file_that_is_not_utf_8_or_not_tasks_is_told(master, dashboard_url, open_tab, tmp_path):
    page = open_tab(f"{dashboard_url}#/new?mode=many", locale="zh-CN").page
    path = Path(tmp_path / "latin.csv")
    path.write_bytes("task_type,username\necho,é\n".encode("latin-1"))
    page.locator("input[type=file]").set_input_files(str(path))
    expect(page.get_by_role("alert")).to_contain_text("不是 UTF-8")
    field(page, "tasks").fill("what is this")
    expect(page.locator(".problems")).to_contain_text("没有 task_type 列")
    expect(page.locator(".many button.main")).to_have_count(0)
