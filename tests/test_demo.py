"""Does the demo find exactly what is on its site, and does it go on where it was interrupted?

The master is a small stand-in that speaks the few routes the demo uses and runs the real crawl executor."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle
import pytest
from test_demo_site import SMALL, expected_site

import client
import demo
import demo_site
from executors import task_executor
from executors.crawl import CrawlExecutor
from settings import ExitCode


class StandIn:
    """A master and a worker in one, with the real crawl executor."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []
        self.submits: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.works = True
        self.cut_exports = 0
        self.busy_replies = 0
        self.lock = threading.Lock()
        app = bottle.Bottle()
        app.add_hook("before_request", self.note_key)
        app.post("/api/distribution/tasks", callback=self.submit)
        app.get("/api/distribution/tasks/stats", callback=self.stats)
        app.get("/api/distribution/tasks", callback=self.list)
        app.get("/api/distribution/tasks/<task_id:int>/why", callback=lambda task_id: {"detail": "no device is online"})
        app.get("/api/distribution/tasks/export", callback=self.export)

        class Server(ThreadingMixIn, WSGIServer):
            daemon_threads = True

        class Quiet(WSGIRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = make_server("127.0.0.1", 0, app, server_class=Server, handler_class=Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(60)

    def note_key(self) -> None:
        self.keys.add(bottle.request.get_header("Authorization"))
        if self.busy_replies:
            self.busy_replies -= 1
            raise bottle.HTTPResponse(status=503, body="{}")

    def submit(self) -> dict[str, Any]:
        self.submits.append(bottle.request.json)
        return {"id": self.add(bottle.request.json), "created": True, "status": "pending"}

    def add(self, task: dict[str, Any]) -> int:
        for known in self.tasks:
            if (known["batch"], known["unique_key"]) == (task["batch"], task["unique_key"]):
                return known["id"]
        row = {"parent_id": None, **task, "id": len(self.tasks) + 1, "status": "pending"}
        self.tasks.append(row)
        return row["id"]

    def stats(self) -> dict[str, Any]:
        """Counts; a look at them does a piece of work, so that tests wait for nothing."""
        batch = bottle.request.query["batch"]
        with self.lock:
            self.work(batch, 50)
            states = [task["status"] for task in self.tasks if task["batch"] == batch]
        return {"by_state": {state: states.count(state) for state in ("pending", "running", "completed", "failed")}}

    def work(self, batch: str, pieces: int) -> None:
        for task in [t for t in self.tasks if t["batch"] == batch and t["status"] == "pending"][:pieces]:
            if not self.works:
                return
            outcome = task_executor.run(CrawlExecutor(), task, settings={"crawl_allow_networks": ["127.0.0.0/8"]})
            task.update(status=outcome.outcome, result=outcome.result, error_message=outcome.error_message)
            for child in outcome.new_tasks:
                limit = child.get("max_batch_tasks")
                if limit is None or sum(t["batch"] == batch for t in self.tasks) < limit:
                    self.add(child)

    def list(self) -> dict[str, Any]:
        found = [task for task in self.tasks if task["status"] == bottle.request.query["status"]]
        return {"tasks": [{"id": task["id"], "error_message": "refused"} for task in found[:1]], "next_cursor": None}

    def export(self) -> Iterator[str]:
        query = bottle.request.query
        assert (query["format"], query["include"]) == ("jsonl", "result")
        bottle.response.content_type = "application/x-ndjson"
        rows = [task for task in self.tasks if task["batch"] == query["batch"]]
        if self.cut_exports:
            self.cut_exports -= 1
            return iter([json.dumps(rows[0]) + "\n"])
        return iter([*(json.dumps(row) + "\n" for row in rows), json.dumps({"end": True, "rows": len(rows)}) + "\n"])


@pytest.fixture
def master() -> Iterator[StandIn]:
    master = StandIn()
    yield master
    master.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    original = demo.Screen.__init__

    def impatient(self: demo.Screen, *arguments: Any) -> None:
        original(self, *arguments)
        self.interval_seconds = 0.0

    monkeypatch.setattr(demo.Screen, "__init__", impatient)
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.0)


def run(master: StandIn, folder: Path, output: Path, **options: Any) -> demo.Summary | None:
    options = {"modules": SMALL, "out": io.StringIO(), **options}
    return demo.run(master.url, "a-key", folder, output, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_stop_during_the_rendering_ends_it_without_an_error(master: StandIn, tmp_path: Path) -> None:
    stop, out = threading.Event(), io.StringIO()
    stop.set()
    assert run(master, tmp_path / "site", tmp_path / "out", stop=stop, out=out) is None
    assert "the same command renders it again" in out.getvalue()
    assert list((tmp_path / "site").iterdir()) == []
    assert master.submits == []


# --- the crawl


def test_the_demo_finds_every_reachable_page_and_every_dead_link_and_nothing_else(
    master: StandIn, folder: Path, tmp_path: Path
) -> None:
    out = io.StringIO()
    summary = run(master, folder, tmp_path, out=out)
    assert summary is not None
    reachable, dead = expected_site(demo_site.build_site(folder, modules=SMALL))
    start = master.submits[0]["unique_key"]

    def name(url: str) -> str:
        return url.removeprefix(start) or "index.html"

    pages = lines(summary.folder / "pages.jsonl")
    # The start and index.html are two URLs of one page only if a page links index.html by name; none does.
    assert sorted(name(page["url"]) for page in pages if page["status"] == 200) == sorted(reachable)
    assert sorted(name(link["url"]) for link in summary.dead_links) == sorted(dead)
    assert all(name(link["linked_from"]) in dead[name(link["url"])] for link in summary.dead_links)
    assert (summary.pages, summary.failed) == (len(reachable), [])
    table = (summary.folder / "dead-links.tsv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "status\turl\tlinked_from"
    assert len(table) == 1 + len(dead)
    assert all(line.startswith("404\t" + start) for line in table[1:])
    assert str(summary.folder.resolve()) in out.getvalue()
    assert f"{len(reachable)} pages, {len(dead)} dead links, 0 failed" in out.getvalue()
    assert master.keys == {"Bearer a-key"}
    assert len(master.submits) == 1


def test_a_finished_batch_is_followed_by_a_new_one(master: StandIn, folder: Path, tmp_path: Path) -> None:
    first, second = run(master, folder, tmp_path), run(master, folder, tmp_path)
    assert first is not None and second is not None
    assert first.batch != second.batch
    assert first.pages == second.pages
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", first.batch, second.batch}


class StopAfter(threading.Event):
    """Set after it was asked so many times: a Ctrl-C at every possible place."""

    def __init__(self, asks: int):
        super().__init__()
        self.asks = asks

    def wait(self, timeout: float | None = None) -> bool:
        self.asks -= 1
        return self.asks < 0


def test_stopped_at_any_moment_the_same_command_finishes_the_same_batch(
    master: StandIn, folder: Path, tmp_path: Path
) -> None:
    stops = 0
    for asks in (0, 0, 1, 0, 1, 100):
        out = io.StringIO()
        summary = run(master, folder, tmp_path, stop=StopAfter(asks), out=out)
        if summary is not None:
            break
        stops += 1
        assert "the same command goes on" in out.getvalue()
    assert stops >= 2
    assert summary is not None
    assert {task["batch"] for task in master.tasks} == {summary.batch}
    assert len(master.submits) == 1
    assert summary.pages == len(expected_site(demo_site.build_site(folder, modules=SMALL))[0])


@pytest.mark.parametrize("step", ["post", "watch", "collect", "remember_finished"])
def test_killed_at_any_step_the_same_command_finishes_the_same_batch(
    master: StandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "post":
            patch.setattr(client.Master, "post", die)  # before the submit, after its batch was noted
        elif step == "remember_finished":
            patch.setattr(demo.Job, "show", die)
            original = demo.Job.remember
            patch.setattr(
                demo.Job, "remember", lambda job, finished: die() if finished else original(job, finished=False)
            )
        else:
            patch.setattr(demo.Job, step, die)
        with pytest.raises(KeyboardInterrupt):
            run(master, folder, tmp_path)
    noted = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert noted["finished"] is False
    summary = run(master, folder, tmp_path)
    assert summary is not None
    assert summary.batch == noted["batch"]
    assert {task["batch"] for task in master.tasks} == {summary.batch}


@pytest.mark.parametrize("state", ["", "{", "[]", '{"batch": 5}', '{"batch": "x", "finished": false, "task_data": 1}'])
def test_a_state_file_that_cannot_be_read_means_a_new_batch(
    master: StandIn, folder: Path, tmp_path: Path, state: str
) -> None:
    (tmp_path / "demo.json").write_text(state)
    summary = run(master, folder, tmp_path)
    assert summary is not None
    assert summary.batch.startswith("demo-")


def test_an_export_without_its_end_is_asked_for_again_and_never_kept(
    master: StandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = StopAfter(1000)
    master.cut_exports = 2
    summary = run(master, folder, tmp_path, stop=patient)
    assert summary is not None and summary.pages > 10
    master.cut_exports = 3
    with pytest.raises(client.CommandFailed, match="without its end mark"):
        run(master, folder, tmp_path, stop=patient)
    batch = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["batch"]
    assert list((tmp_path / batch).iterdir()) == []


def test_a_busy_master_is_asked_again_and_one_that_stays_away_is_named(
    master: StandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master.busy_replies = 3
    assert run(master, folder, tmp_path, stop=StopAfter(1000)) is not None
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(client.CommandFailed, match=rf"No master answers at {away}: .*; the same command goes on"):
            demo.run(away, "", folder, tmp_path, modules=SMALL, stop=StopAfter(1000), out=io.StringIO())


def test_a_batch_in_which_nothing_happens_says_why_is_given_up_and_can_be_gone_on_with(
    master: StandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master.works = False
    out = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(demo, "HINT_AFTER_SECONDS", 0.0)
        patch.setattr(demo, "STALLED_SECONDS", 0.0)
        with pytest.raises(client.CommandFailed, match="nothing happened"):
            run(master, folder, tmp_path, out=out)
    assert out.getvalue().count("task 1 waits: no device is online; refused") == 1
    master.works = True
    summary = run(master, folder, tmp_path)
    assert summary is not None
    assert summary.batch == master.submits[0]["batch"]


# --- the user's own site


def test_crawl_keeps_to_max_pages_and_depth(master: StandIn, folder: Path, tmp_path: Path) -> None:
    site = demo_site.build_site(folder, modules=SMALL)
    with demo_site.serve_site(site, folder) as url:
        options: dict[str, Any] = {"master_url": master.url, "api_key": "", "output_folder": tmp_path}
        few = demo.crawl(url, 5, None, **options, out=io.StringIO())
        flat = demo.crawl(demo.start_url(url.upper()), None, 1, **options, out=io.StringIO())
    assert few is not None and flat is not None
    assert few.pages + len(few.dead_links) == 5
    assert flat.pages == 1 + sum((site / f"{name}.html").is_file() for name in SMALL)
    assert few.batch != flat.batch


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("example.com", "http://example.com/"),
        ("HTTPS://Example.com:443/A?b#c", "https://example.com/A?b"),
        ("http://example.com:8080", "http://example.com:8080/"),
        ("http://[::1]:80/", "http://[::1]/"),
    ],
)
def test_the_users_url_is_read_as_the_crawler_would_write_it(written: str, meant: str) -> None:
    assert demo.start_url(written) == meant


@pytest.mark.parametrize("written", ["", "ftp://example.com/", "http://", "http://x:99999/", "http://[::1"])
def test_a_url_that_cannot_be_crawled_is_refused_in_one_line(written: str) -> None:
    with pytest.raises(client.CommandFailed, match="--crawl") as caught:
        demo.start_url(written)
    assert caught.value.exit_code == ExitCode.SETTINGS


# --- the screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_rewritten_line_on_a_terminal_and_plain_lines_elsewhere() -> None:
    terminal, plain = Terminal(), io.StringIO()
    for out in (terminal, plain):
        screen = demo.Screen(out)
        screen.progress("10 completed, 5 pending")
        screen.progress("15 completed")
        screen.progress("15 completed: 3 pages/s", is_last=True)
        screen.say("done")
    assert terminal.getvalue().count("\n") == 2
    assert terminal.getvalue().count("\r") == 3
    assert plain.getvalue() == "10 completed, 5 pending\n15 completed: 3 pages/s\ndone\n"


def test_text_that_the_console_cannot_show_does_not_end_the_demo() -> None:
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding="ascii")
    demo.Screen(console).say("批次 done")
    assert raw.getvalue() == b"?? done\n"
