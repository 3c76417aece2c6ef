"""What does a worker meet that the real master never does? A small master on a loopback port that plays a script.

It hands out what a test gives it and writes down all that comes in. For each route a test may script the next answers
(refusals, captive portals, garbage, silence); without a script it behaves as a master does. It judges nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from socketserver import ThreadingMixIn
from typing import Any, Callable, Optional
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle
from farm import reserved_port

PREFIX = "/api/distribution"


class Answer:
    """A scripted answer: JSON or raw bytes."""

    def __init__(self, status: int, body: Any, *, kind: str = "application/json", headers: Optional[dict] = None):
        self.status, self.kind, self.headers = status, kind, headers or {}
        self.content = body if isinstance(body, bytes) else json.dumps(body).encode()


def problem(status: int, code: str, detail: str = "do something else") -> Answer:
    body = {"type": "about:blank", "title": code, "status": status, "code": code, "detail": detail}
    return Answer(status, body, kind="application/problem+json", headers={"Retry-After": "0.1"})


def captive_portal() -> Answer:
    return Answer(200, b"<html><title>Welcome to the hotel</title></html>", kind="text/html")


class Dripping:
    """A body that arrives byte by byte and never ends."""

    def __init__(self, seconds: float = 0.2, count: int = 300) -> None:
        self.seconds, self.count = seconds, count


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class FakeMaster:
    """A context manager; `url` is where it listens."""

    def __init__(self, port: int = 0) -> None:
        self.changed = threading.Condition()
        self.registers: list[dict] = []
        self.beats: list[dict] = []
        self.pulls: list[dict] = []
        self.reports: list[dict] = []  # every entry, in order
        self.report_sizes: list[int] = []  # entries a request
        self.authorizations: set[Optional[str]] = set()
        self.waiting: deque[dict] = deque()
        self.cancel: list[Any] = []
        self.drain = False
        self.open_pulls: list[dict] = []
        self.told: tuple[list[Any], bool] = ([], False)  # of cancel and drain, by the last reply to a pull
        self.settings = {"heartbeat_interval_seconds": 30, "reconnect_spread_seconds": 0, "max_body_bytes": 8388608,
                         "next_seconds": 0.1}  # fmt: skip
        self.next_seconds = 30.0
        self.script: dict[str, deque] = defaultdict(deque)
        self.judge: Callable[[dict], dict] = lambda entry: {"outcome": "accepted"}
        self._place = None if port else reserved_port()
        port = port or self._place.getsockname()[1]
        self._server = make_server("127.0.0.1", port, self._app(), _Server, _Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FakeMaster:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- what a test does --

    def give(self, task_type: str, task_data: Optional[dict] = None, **more: Any) -> dict:
        """Make one task wait; answers it."""
        number = give_number()
        task = {"id": number, "assignment_id": number + 1000, "lease_id": f"lease-{number}", "task_type": task_type}
        task.update(username="", app_id="", start_date=None, end_date=None, task_data=task_data or {}, batch=None)
        task.update(attempt=1, priority=5, parent_id=None, execution_timeout_seconds=60, start_within_seconds=None)
        task.update(more)
        with self.changed:
            self.waiting.append(task)
            self.changed.notify_all()
        return task

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
        """The condition's value as soon as it is true, looked at after every request; fails after `seconds`."""
        until = time.monotonic() + seconds
        with self.changed:
            while not (value := condition()):
                left = until - time.monotonic()
                assert left > 0, f"waited {seconds} s in vain for: {what}"
                self.changed.wait(min(left, 0.05))
        return value

    @property
    def ends(self) -> list[dict]:
        """Every report but those of a start, which comes of any task on a machine that is slow enough."""
        return [entry for entry in self.reports if entry["outcome"] != "running"]

    def reports_of(self, task: dict, *, starts: bool = False) -> list[dict]:
        entries = self.reports if starts else self.ends
        return [entry for entry in entries if entry["assignment_id"] == task["assignment_id"]]

    def wait_for_report(self, task: dict) -> dict:
        return self.wait_for(lambda: self.reports_of(task), f"the report of {task['task_type']}")[0]

    def is_holding(self, task: dict, phase: Optional[str] = None) -> bool:
        """Whether the last beat names it."""
        last = self.beats[-1]["holding"] if self.beats else []
        return any(h["assignment_id"] == task["assignment_id"] and phase in (None, h["phase"]) for h in last)

    # -- the routes --

    def _app(self) -> bottle.Bottle:
        app = bottle.Bottle()
        app.post(PREFIX + "/devices/register", callback=lambda: self._answer("register", self._register))
        app.post(PREFIX + "/devices/<device_id>/heartbeat", callback=lambda device_id: self._answer("beat", self._beat))
        app.get(PREFIX + "/tasks/pull", callback=lambda: self._answer("pull", self._pull))
        app.post(PREFIX + "/tasks/report", callback=lambda: self._answer("report", self._report))
        return app

    def _answer(self, route: str, usual: Callable[[Any], Any]) -> Any:
        length = int(bottle.request.environ.get("CONTENT_LENGTH") or 0)
        sent = json.loads(bottle.request.environ["wsgi.input"].read(length)) if length else dict(bottle.request.query)
        with self.changed:
            self.authorizations.add(bottle.request.get_header("Authorization"))
            scripted = self.script[route].popleft() if self.script[route] else None
        answer = usual(sent) if scripted is None else scripted(sent) if callable(scripted) else scripted
        with self.changed:
            self.changed.notify_all()
        if isinstance(answer, Dripping):
            bottle.response.content_type = "application/json"
            return self._drip(answer)
        if not isinstance(answer, Answer):
            answer = Answer(200, answer)
        return bottle.HTTPResponse(answer.content, answer.status, {"Content-Type": answer.kind, **answer.headers})

    @staticmethod
    def _drip(answer: Dripping) -> Any:
        for _ in range(answer.count):
            time.sleep(answer.seconds)
            yield b" "

    def _register(self, sent: dict) -> Any:
        with self.changed:
            self.registers.append(sent)
        keep = [held["assignment_id"] for held in sent["holding"]]
        return {"device_id": sent["device_id"], "status": "online", "created": True, "settings": self.settings,
                "keep": keep, "cancel": [], "server_time": "2026-11-25T13:59:07.123Z"}  # fmt: skip

    def _beat(self, sent: dict) -> Any:
        with self.changed:
            self.beats.append(sent)
            return {"cancel": list(self.cancel), "drain": self.drain, "next_seconds": self.next_seconds}

    def _pull(self, sent: dict) -> Any:
        limit, until = int(sent["limit"]), time.monotonic() + float(sent["wait"])
        with self.changed:
            self.pulls.append(sent)
            self.open_pulls.append(sent)
            self.changed.notify_all()
            while not (limit and self.waiting) and time.monotonic() < until and not self._is_over(sent):
                if self.told != (self.cancel, self.drain):
                    break
                self.changed.wait(min(0.1, until - time.monotonic()))
            tasks = (
                [] if self._is_over(sent) else [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]
            )
            self.open_pulls.remove(sent)
            self.told = (list(self.cancel), self.drain)
            return {"tasks": tasks, "cancel": list(self.cancel), "drain": self.drain, "next_seconds": 0}

    def _is_over(self, pull: dict) -> bool:
        """The server was stopped, the process that pulls was followed by another, or its listening by its asking."""
        if self._server.socket.fileno() < 0 or pull["boot_id"] != self.registers[-1]["boot_id"]:
            return True
        return pull["limit"] == "0" and any(other["limit"] != "0" for other in self.open_pulls)

    def _report(self, sent: dict) -> Any:
        with self.changed:
            self.reports += sent["reports"]
            self.report_sizes.append(len(sent["reports"]))
            return {"reports": [{"assignment_id": e["assignment_id"], **self.judge(e)} for e in sent["reports"]]}


_numbers = iter(range(1, 1_000_000_000))
_numbers_lock = threading.Lock()


def give_number() -> int:
    with _numbers_lock:
        return next(_numbers)
