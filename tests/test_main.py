"""Do the guide's commands do what they say, against something that answers over HTTP as a master does?"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import bottle
import pytest
from farm import reserved_port

import client
import main
import settings
import task_files
from settings import ROOT, ExitCode

KEY = "k3y-of-a-test-that-nobody-uses"


class FakeMaster:
    """Remembers tasks by (batch, unique_key), as the real one does, and misbehaves where a test asks for it."""

    def __init__(self) -> None:
        self.tasks: dict[tuple[str | None, str], dict[str, Any]] = {}
        self.posts: list[int] = []
        self.keys: list[str | None] = []
        self.requests = 0
        self.url = ""
        self.instead: bottle.HTTPResponse | None = None
        self.busy = 0
        self.needs_key = False
        self.largest_body = 8 * 1024 * 1024
        self.refused: tuple[str, str] | None = None
        self.refused_from = 0
        self.export = b""
        self.promises_bytes: int | None = None
        self.devices: list[dict[str, Any]] = []
        waiting = {"task_id": 17, "waiting_seconds": 75, "reason": "no_device", "detail": "nobody does crawl"}
        self.overview: dict[str, Any] = {
            "version": "0.1.0",
            "uptime_seconds": 11520.5,
            "strategy": "least_tasks",
            "tasks": {"pending": 2, "running": 1},
            "devices": {"online": 1, "offline": 0},
            "rates": {"completed_last_minute": 5, "failed_last_minute": 1},
            "oldest_waiting": waiting,
        }
        self.app = bottle.Bottle()
        prefix = "/api/distribution"
        self.app.add_hook("before_request", self._arrive)
        self.app.get(prefix + "/system/overview", callback=lambda: self.overview)
        self.app.get(prefix + "/devices", callback=lambda: {"devices": self.devices})
        self.app.post(prefix + "/tasks", callback=self._submit)
        self.app.get(prefix + "/tasks/export", callback=self._export)

    def _problem(self, status: int, detail: str, field: str = "") -> bottle.HTTPResponse:
        body = {"title": "no", "status": status, "code": "x", "detail": detail, "field": field}
        retry = {"Retry-After": "0"} if status == 503 else {}
        return bottle.HTTPResponse(
            json.dumps(body), status, headers={"Content-Type": "application/problem+json", **retry}
        )

    def _arrive(self) -> None:
        self.requests += 1
        if self.instead is not None:
            raise self.instead
        self.keys.append(bottle.request.get_header("Authorization"))
        if self.busy > 0:
            self.busy -= 1
            raise self._problem(503, "busy")
        if self.needs_key and self.keys[-1] != f"Bearer {KEY}":
            raise self._problem(401, "say who you are")

    def _submit(self) -> Any:
        body = bottle.request.body.read()
        if len(body) > self.largest_body:
            return self._problem(413, "too large")
        tasks = json.loads(body)
        if self.refused and len(self.posts) >= self.refused_from:
            return self._problem(422, *self.refused)
        self.posts.append(len(tasks))
        answer = []
        for task in tasks:
            key = (task.get("batch"), task["unique_key"])
            created = key not in self.tasks
            self.tasks.setdefault(key, task)
            answer.append({"id": len(self.tasks), "created": created, "status": "pending"})
        return {"tasks": answer}

    def _export(self) -> bytes:
        query = bottle.request.query
        assert (query.include, query.format in ("jsonl", "csv"), bool(query.batch)) == ("result", True, True)
        bottle.response.content_type = "text/csv" if query.format == "csv" else "application/x-ndjson"
        if self.promises_bytes is not None:
            bottle.response.content_length = self.promises_bytes
        return self.export


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def master() -> Iterator[FakeMaster]:
    fake = FakeMaster()
    with make_server("127.0.0.1", 0, fake.app, handler_class=Quiet) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield fake
        server.shutdown()
        thread.join(60)


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(settings, "default_config_path", lambda mode: tmp_path / "none" / f"{mode}.json")
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.0)


@pytest.fixture
def run(master: FakeMaster, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command against the fake master; returns (exit code, stdout, stderr)."""

    def command(*argv: str, url: str = "") -> tuple[int, str, str]:
        try:
            code = main.main([*argv, "--master-url", url or master.url])
        except SystemExit as ended:
            code = int(str(int(ended.code or 0)))
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def closed_port() -> Iterator[int]:
    with reserved_port() as place:
        yield place.getsockname()[1]


# ---- distribute ----


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Stands in for master.py, worker.py and standalone.py, and notes how each was started."""
    started: list[tuple[str, list[str]]] = []

    class Program:
        def __init__(self, name: str) -> None:
            self.name = name

        def main(self, argv: list[str]) -> int:
            started.append((self.name, argv))
            return 5

    monkeypatch.setattr(main.importlib, "import_module", Program)
    return started


@pytest.mark.parametrize("mode", settings.MODES)
def test_each_mode_is_started_with_all_its_flags_and_its_exit_code_is_ours(
    mode: str, programs: list[tuple[str, list[str]]]
) -> None:
    flags = ["--host", "0.0.0.0", "--port", "8080", "--device-id", "w-1", "--device-name", "My Worker"]
    assert main.main(["distribute", "--mode", mode, "--config", "config/my_config.json", *flags]) == 5
    assert programs == [(mode, ["--mode", mode, "--config", "config/my_config.json", *flags])]


def test_what_main_hands_over_is_a_command_line_that_the_mode_understands(
    programs: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AF_API_KEY", KEY)
    main.main(["distribute", "--mode", "master", "--host", "0.0.0.0", "--port", "8080"])
    found, _ = settings.from_arguments("master", programs[0][1])
    assert (found.mode, found.host, found.port) == ("master", "0.0.0.0", 8080)


def test_the_help_of_a_mode_is_the_modes_own(programs: list[tuple[str, list[str]]]) -> None:
    main.main(["distribute", "--mode", "worker", "--help"])
    assert programs == [("worker", ["--mode", "worker", "--help"])]


def test_the_mode_may_come_from_the_environment_or_the_config_file(
    programs: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "my.json"
    path.write_text('{"mode": "worker"}')
    main.main(["distribute", "--config", str(path)])
    monkeypatch.setenv("AF_MODE", "standalone")
    main.main(["distribute"])
    assert [mode for mode, _ in programs] == ["worker", "standalone"]


def test_no_mode_is_one_sentence_and_exit_2(run: Any, programs: list[tuple[str, list[str]]]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["distribute"])
    assert caught.value.code == ExitCode.SETTINGS and programs == []


def test_a_missing_package_is_one_sentence_that_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'peewee'", name="peewee")

    monkeypatch.setattr(main.importlib, "import_module", missing)
    assert main.main(["distribute", "--mode", "master"]) == ExitCode.SETTINGS
    assert capsys.readouterr().err.endswith("pip install -r requirements.txt\n")


def test_a_worker_is_started_without_importing_anything_of_the_masters() -> None:
    program = (
        "import sys, types; worker = types.ModuleType('worker'); worker.main = lambda argv: 0;"
        "sys.modules['worker'] = worker;"
        "import main; main.main(['distribute', '--mode', 'worker', '--device-id', 'x']);"
        "print({'peewee', 'bottle', 'schedule', 'granian', 'msgspec', 'requests', 'tqdm'} & set(sys.modules))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "set()\n"


# ---- status ----


def device(name: str, **more: Any) -> dict[str, Any]:
    return {
        "device_id": name, "device_name": name, "status": "online", "assigned_count": 2, "max_concurrent_tasks": 3,
        "cpu_usage": 12.4, "memory_usage": 40, "disk_usage": None, "completed_count": 9, "failed_count": 1,
        "seconds_since_heartbeat": 3.2, **more,
    }  # fmt: skip


def test_status_shows_counts_devices_and_the_oldest_waiting_task_with_its_reason(run: Any, master: FakeMaster) -> None:
    master.devices = [device("shop-7"), device("shop-8", device_name="二号店", seconds_since_heartbeat=None)]
    code, out, err = run("distribute", "--status")
    assert (code, err) == (0, "")
    assert "pending 2   running 1" in out and "up 3 h 12 min" in out and "online 1" in out
    assert "task 17 since 1 min 15 s: nobody does crawl" in out
    assert "shop-7" in out and "2/3" in out and "12 %" in out and "3 s ago" in out and "never" in out
    header, first, second = out.splitlines()[-3:]
    assert header.index("STATUS") == first.index("online")
    # Each of the three Chinese signs takes two columns of a terminal.
    assert second.index("online") == first.index("online") - 3


def test_status_without_devices_says_how_to_start_one(run: Any) -> None:
    assert "python worker.py --device-id" in run("distribute", "--status")[1]


def test_a_devices_name_cannot_steer_the_terminal(run: Any, master: FakeMaster) -> None:
    master.devices = [device("shop-7", device_name="\x1b[2J\nforged")]
    assert r"\x1b[2J\nforged" in run("distribute", "--status")[1]


def test_status_without_a_master_is_one_sentence_and_exit_1(run: Any, closed_port: int) -> None:
    address = f"http://127.0.0.1:{closed_port}"
    code, out, err = run("distribute", "--status", url=address)
    assert (code, out) == (1, "") and err.count("\n") == 1 and address in err and "--master-url" in err


def test_a_refused_key_is_one_sentence_and_exit_8(run: Any, master: FakeMaster) -> None:
    master.needs_key = True
    code, out, err = run("distribute", "--status")
    assert (code, out) == (ExitCode.REFUSED, "") and err.count("\n") == 1 and "AF_API_KEY" in err


def test_the_key_of_the_settings_is_sent(run: Any, master: FakeMaster, monkeypatch: pytest.MonkeyPatch) -> None:
    master.needs_key = True
    monkeypatch.setenv("AF_API_KEY", KEY)
    assert run("distribute", "--status")[0] == 0
    assert set(master.keys) == {f"Bearer {KEY}"}


def test_a_netrc_cannot_replace_the_key(
    run: Any, master: FakeMaster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("AF_API_KEY", KEY)
    run("distribute", "--status")
    assert set(master.keys) == {f"Bearer {KEY}"}


def test_a_redirection_is_not_followed_because_the_key_would_go_with_it(run: Any, master: FakeMaster) -> None:
    master.instead = bottle.HTTPResponse("", 302, headers={"Location": master.url + "/elsewhere"})
    assert run("distribute", "--status")[0] == 1 and master.requests == 1


@pytest.mark.parametrize("answer", ["<html>hello", '{"hello": 1}', "[]"])
def test_something_that_is_no_master_is_told_apart(run: Any, master: FakeMaster, answer: str) -> None:
    kind = "text/html" if answer.startswith("<") else "application/json"
    master.instead = bottle.HTTPResponse(answer, 200, headers={"Content-Type": kind})
    code, _, err = run("distribute", "--status")
    assert code == 1 and "is no master" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "content", "flags", "expected"),
    [
        ("master", {"host": "0.0.0.0", "port": 8123}, [], "http://127.0.0.1:8123"),
        ("master", {"host": "::", "port": 8123}, [], "http://[::1]:8123"),
        ("standalone", {"port": 8123, "master_url": "http://10.0.0.9:1"}, [], "http://127.0.0.1:8123"),
        ("worker", {"port": 8123, "master_url": "http://10.0.0.9:1"}, [], "http://10.0.0.9:1"),
        ("worker", {"master_url": "http://10.0.0.9:1"}, ["--port", "9"], "http://127.0.0.1:9"),
        ("master", {"port": 8123}, ["--master-url", "http://10.0.0.9:2"], "http://10.0.0.9:2"),
    ],
)
def test_commands_find_the_master_where_their_settings_say(
    tmp_path: Path, mode: str, content: dict[str, Any], flags: list[str], expected: str
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"mode": mode, **content}))
    found, arguments = main._client_settings(["--config", str(path), *flags], main.argparse.ArgumentParser())
    assert found.mode == mode and client.master_address(found, arguments) == expected


# ---- submit ----


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return str(folder / name)


def sent(master: FakeMaster) -> list[dict[str, Any]]:
    return [{name: value for name, value in task.items() if name != "unique_key"} for task in master.tasks.values()]


TASKS = [{"task_type": "crawl", "task_data": {"url": f"http://127.0.0.1/{n}", "名": "值"}} for n in range(3)]
FORMS = {
    "a.jsonl": "\n".join(map(json.dumps, TASKS)) + "\n\n",
    "b.json": json.dumps(TASKS, indent=2),
    "c.json": json.dumps({"tasks": TASKS}),
    "d.csv": "task_type,task_data.url,名\r\n" + "".join(f'crawl,"http://127.0.0.1/{n}",值\r\n' for n in range(3)),
    "e.csv": "\ufefftask_type;url;task_data.名\n" + "".join(f"crawl;http://127.0.0.1/{n};值\n" for n in range(3)),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_file_submits_the_same_tasks(run: Any, master: FakeMaster, tmp_path: Path, name: str) -> None:
    code, out, err = run("submit", write(tmp_path, name, FORMS[name]), "--batch", "b1")
    assert (code, err) == (0, "") and "3 created, 0 already there" in out and "main.py results b1" in out
    assert sent(master) == [{**task, "batch": "b1"} for task in TASKS]


def test_a_single_task_in_a_json_file_is_submitted(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    assert run("submit", write(tmp_path, "a.json", '{"task_type": "echo"}'))[0] == 0
    assert sent(master) == [{"task_type": "echo"}]


def test_the_same_submit_again_creates_nothing_twice_and_says_so(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", FORMS["a.jsonl"])
    assert "creates nothing twice" in run("submit", path)[1]
    assert "0 created, 3 already there" in run("submit", path)[1]
    other = write(tmp_path, "b.json", json.dumps([dict(reversed(list(task.items()))) for task in TASKS]))
    assert "0 created, 3 already there" in run("submit", other)[1]
    assert "3 created" in run("submit", path, "--batch", "another")[1]


def test_how_to_submit_is_no_part_of_the_content(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    run("submit", write(tmp_path, "a.json", '{"task_type": "echo"}'))
    again = write(tmp_path, "a.json", '{"task_type": "echo", "if_exists": "requeue_failed"}')
    assert "0 created, 1 already there" in run("submit", again)[1]


def test_a_unique_key_and_a_batch_of_the_files_own_are_kept(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    run("submit", write(tmp_path, "a.json", '{"task_type": "x", "unique_key": "mine", "batch": "own"}'), "--batch", "b")
    assert list(master.tasks) == [("own", "mine")]


def test_columns_that_are_fields_get_the_fields_type_and_empty_cells_are_left_out(
    run: Any, master: FakeMaster, tmp_path: Path
) -> None:
    rows = [
        "task_type,username,priority,delay_seconds,required_tags,task_data,task_data.depth,task_data.id,code,batch",
        'crawl,ann,9,1.5,"a, b","{""url"": ""u""}",3,00123,00123,',
        "crawl,,,,,,,,,",
    ]
    assert run("submit", write(tmp_path, "a.csv", "\n".join(rows)))[0] == 0
    assert sent(master) == [
        {
            "task_type": "crawl", "username": "ann", "priority": 9, "delay_seconds": 1.5, "required_tags": ["a", "b"],
            "task_data": {"url": "u", "depth": 3, "id": "00123", "code": "00123"},
        },
        {"task_type": "crawl"},
    ]  # fmt: skip


WRONG_FILES = [
    ("a.jsonl", '{"task_type": "x"}\n{"task_type": \n', "line 2: is not JSON"),
    ("a.jsonl", '{"task_type": "x"}\n\n[1]\n', "line 3: holds a list"),
    ("a.jsonl", '{"task_type": "x"}\n{"username": "u"}\n', "line 2: has no task_type"),
    ("a.jsonl", '{"task_type": "x", "task_data": {"n": NaN}}\n', "line 1: is not JSON"),
    ("a.jsonl", '{"task_type": "x", "task_data": {"n": 1e400}}\n', "line 1: holds a number"),
    ("a.jsonl", '{"task_type": "x", "username": "\\ud800"}\n', "line 1: holds half a character"),
    ("a.jsonl", "[" * 100000, "line 1: is not JSON"),
    ("a.json", '[{"task_type": "x"},\n\n{"task_type" "x"}]', "line 3: is not JSON"),
    ("a.json", '[{"task_type": "x"}\n{"task_type": "x"}]', "line 2: write , or ]"),
    ("a.json", '[{"task_type": "x"},\n', "line 2: write a task"),
    ("a.json", '[{"task_type": "x"}]\n[]', "line 2: holds something after the list"),
    ("a.json", '[{"task_type": "x"}, 7]', "line 1: write a task"),
    ("a.json", '{"tasks": [{"task_type": "x"}, {}]}', "task 2: has no task_type"),
    ("a.json", '"text"', "line 1: write a list of tasks"),
    ("a.json", "", "line 1: write a list of tasks"),
    ("a.csv", "task_type,url\nx,a\nx\n", "line 3: has 1 cells"),
    ("a.csv", 'task_type,url\nx,"a\nb"\nx,y,z\n', "line 4: has 3 cells"),
    ("a.csv", "task_type,priority\nx,high\n", "line 2: column priority: write a number"),
    ("a.csv", "task_type,task_data\nx,[1]\n", "line 2: column task_data: write a JSON object"),
    ("a.csv", 'task_type,url\nx,"a\n', "is not CSV"),
    ("a.csv", "url\na\n", "line 1: has no column task_type"),
    ("a.csv", "task_type,a,a\nx,1,2\n", "line 1: has a column"),
    ("a.csv", "", "line 1: write the names of the columns"),
    ("a.csv", "task_type,url\n", "holds no task"),
    ("a.txt", "x", "ends in .json, .jsonl or .csv"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_mistake_in_the_file_names_its_line_and_nothing_is_sent(
    run: Any, master: FakeMaster, tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    code, out, err = run("submit", write(tmp_path, name, content))
    assert (code, out) == (ExitCode.SETTINGS, "") and err.count("\n") == 1 and len(err) < 400
    assert sentence in err and name in err
    assert master.requests == 0


def test_a_file_that_is_missing_or_not_utf_8_is_one_sentence(run: Any, tmp_path: Path) -> None:
    assert "cannot be read" in run("submit", str(tmp_path / "none.json"))[2]
    (tmp_path / "excel.csv").write_bytes("task_type,名\nx,值\n".encode("gbk"))
    code, _, err = run("submit", str(tmp_path / "excel.csv"))
    assert code == ExitCode.SETTINGS and "is not UTF-8" in err and err.count("\n") == 1


def many(folder: Path, count: int, padding: str = "") -> str:
    lines = [json.dumps({"task_type": "echo", "task_data": {"n": n, "padding": padding}}) for n in range(count)]
    return write(folder, "many.jsonl", "\n".join(lines))


def test_tasks_go_in_chunks_of_a_thousand_with_plain_progress_lines_into_a_file(
    run: Any, master: FakeMaster, tmp_path: Path
) -> None:
    code, out, _ = run("submit", many(tmp_path, 2500))
    assert code == 0 and master.posts == [1000, 1000, 500]
    assert out.splitlines()[:3] == [f"sent {n} of 2500 tasks" for n in (1000, 2000, 2500)]


def test_a_json_list_longer_than_what_is_read_at_once_arrives_whole_with_its_line_numbers(tmp_path: Path) -> None:
    tasks = [{"task_type": "echo", "task_data": {"n": n, "padding": "x" * (n * 37 % 3000)}} for n in range(500)]
    path = write(tmp_path, "long.json", "[\n" + ",\n".join(map(json.dumps, tasks)) + "\n]\n")
    lines = list(task_files.read_tasks(Path(path)))
    assert [line.task for line in lines] == tasks
    assert [line.place for line in lines] == [f"line {number}" for number in range(2, 502)]


def test_large_tasks_go_in_chunks_that_a_master_takes(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    assert run("submit", many(tmp_path, 12, "x" * 1_000_000))[0] == 0
    assert sum(master.posts) == 12 and max(master.posts) <= 4


def test_a_master_with_a_small_limit_gets_halves(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    master.largest_body = 20_000
    code, out, _ = run("submit", many(tmp_path, 500))
    assert code == 0 and "500 created" in out and len(master.tasks) == 500


def test_what_the_master_refuses_is_named_by_line(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    master.refused, master.refused_from = ("[7].priority must be 1 to 10", "[7].priority"), 1
    code, _, err = run("submit", many(tmp_path, 1500))
    assert code == ExitCode.SETTINGS and "line 1008: priority must be 1 to 10." in err
    assert "The 1000 tasks before it were sent" in err and err.count("\n") == 1


def test_a_busy_master_is_asked_again_with_a_limit(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    path = many(tmp_path, 3)
    master.busy = 3
    assert run("submit", path)[0] == 0 and len(master.tasks) == 3
    master.busy, before = 1000, master.requests
    code, _, err = run("submit", path)
    assert code == 1 and "busy" in err and master.requests - before == client.ATTEMPTS


def test_a_master_that_is_away_is_tried_with_growing_waits_and_then_given_up(closed_port: int) -> None:
    waits: list[float] = []
    away = client.Master(f"http://127.0.0.1:{closed_port}", "", pause=waits.append)
    client.FIRST_WAIT_SECONDS = 0.5  # put back by the fixture
    with pytest.raises(client.CommandFailed) as caught:
        away.post("/tasks", b"[]")
    assert caught.value.exit_code == 1 and len(waits) == client.ATTEMPTS - 1
    assert all(later > earlier for earlier, later in zip(waits, waits[1:])) and sum(waits) < 30


def test_more_attempts_than_usual_do_not_wait_ever_longer(closed_port: int) -> None:
    waits: list[float] = []
    away = client.Master(f"http://127.0.0.1:{closed_port}", "", attempts=12, pause=waits.append, advice="have tea")
    client.FIRST_WAIT_SECONDS = 0.5  # put back by the fixture
    with pytest.raises(client.CommandFailed, match="have tea"):
        away.get("/devices")
    assert len(waits) == 11 and max(waits) < 10 and 48 < sum(waits) < 80


def test_what_a_pause_raises_ends_the_attempts(master: FakeMaster) -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    master.busy = 1000
    with pytest.raises(KeyboardInterrupt):
        client.Master(master.url, "", pause=stop).get("/devices")
    assert master.requests == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo terminal")
def test_on_a_terminal_submit_shows_a_bar(master: FakeMaster, tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "main.py", "submit", many(tmp_path, 30), "--master-url", master.url]
    ended = subprocess.run(command, cwd=ROOT, stdout=terminal, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert ended.returncode == 0 and "100%" in shown and "30/30" in shown and "30 created" in shown


# ---- results ----

ROWS = [{"id": n, "status": "completed", "result": {"text": 'a "quoted"\nline, 值'}} for n in range(3)]


def jsonl(rows: list[dict[str, Any]], promised: int | None = None) -> bytes:
    end = {"end": True, "rows": len(rows) if promised is None else promised}
    return b"".join(json.dumps(row).encode() + b"\n" for row in [*rows, end])


def csv_export(rows: list[dict[str, Any]], end: str = "# end rows={}\r\n") -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerows([["id", "status", "result"], *([row["id"], row["status"], row["result"]["text"]] for row in rows)])
    return (text.getvalue() + end.format(len(rows))).encode()


def test_results_are_printed_without_the_end_mark(run: Any, master: FakeMaster) -> None:
    master.export = jsonl(ROWS)
    code, out, err = run("results", "b1")
    assert (code, err) == (0, "3 tasks\n") and [json.loads(line) for line in out.splitlines()] == ROWS


def test_csv_results_keep_line_ends_inside_cells(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    master.export = csv_export(ROWS)
    output = tmp_path / "out.csv"
    code, out, _ = run("results", "b1", "--format", "csv", "--output", str(output))
    assert (code, out) == (0, "")
    with output.open(encoding="utf-8", newline="") as file:
        assert [row["result"] for row in csv.DictReader(file)] == [ROWS[0]["result"]["text"]] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


BROKEN = [
    ("jsonl", jsonl(ROWS).rsplit(b"{", 1)[0], "without its end mark"),
    ("jsonl", jsonl(ROWS)[:-3], "without its end mark"),
    ("jsonl", jsonl(ROWS, promised=4), "with 3 of 4 rows"),
    ("jsonl", jsonl(ROWS, promised=2), "with 3 of 2 rows"),
    ("jsonl", b"", "without its end mark"),
    ("csv", csv_export(ROWS, ""), "without its end mark"),
    ("csv", csv_export(ROWS, "# end rows=2\n"), "with 3 of 2 rows"),
    # The end mark as text in a cell that was cut off is no end mark.
    ("csv", b'id,text\n1,"cut\n# end rows=0\n', "without its end mark"),
]


@pytest.mark.parametrize(("form", "export", "sentence"), BROKEN, ids=range(len(BROKEN)))
def test_an_export_that_is_not_whole_is_one_sentence_and_exit_1_and_leaves_no_file(
    run: Any, master: FakeMaster, tmp_path: Path, form: str, export: bytes, sentence: str
) -> None:
    master.export = export
    code, _, err = run("results", "b1", "--format", form, "--output", str(tmp_path / "out"))
    assert code == 1 and sentence in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_connection_that_breaks_in_an_export_is_one_sentence_and_exit_1(run: Any, master: FakeMaster) -> None:
    master.export, master.promises_bytes = jsonl(ROWS), len(jsonl(ROWS)) + 100
    code, _, err = run("results", "b1")
    assert code == 1 and err.count("\n") == 1 and "broke off" in err


def test_an_older_file_survives_an_export_that_fails(run: Any, master: FakeMaster, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("yesterday's")
    master.export = jsonl(ROWS, promised=4)
    run("results", "b1", "--output", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "yesterday's"


def test_a_batch_without_tasks_is_said(run: Any, master: FakeMaster) -> None:
    master.export = jsonl([])
    assert run("results", "b1")[2] == "no task in batch b1: check its name\n"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_end_mark_is_found_however_the_pieces_are_cut(size: int) -> None:
    for form, export in (("jsonl", jsonl(ROWS)), ("csv", csv_export(ROWS))):
        pieces = [export[at : at + size] for at in range(0, len(export), size)]
        rows = list(client.whole_rows(pieces, form))
        assert len(rows) == 3 + (form == "csv") and b"end" not in rows[-1]
        assert export.startswith(b"".join(rows))


# ---- the front door ----


def test_a_reader_that_has_seen_enough_is_no_mistake(master: FakeMaster) -> None:
    master.export = jsonl([{"id": n, "text": "x" * 1000} for n in range(2000)])
    command = [sys.executable, "main.py", "results", "b1", "--master-url", master.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""


def test_an_unknown_flag_of_a_command_is_refused_with_a_suggestion(run: Any) -> None:
    code, _, err = run("results", "b1", "--formet", "csv")
    assert code == ExitCode.SETTINGS and 'did you mean "--format"?' in err


def test_version_and_help_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"--version": settings.VERSION, "--help": "main.py submit FILE", "submit --help": "unique_key"}
    for words, text in shown.items():
        with pytest.raises(SystemExit) as caught:
            main.main(words.split())
        assert not caught.value.code and text in capsys.readouterr().out
    assert main.main(["distribute", "--help"]) == 0
    assert "--status" in capsys.readouterr().out
