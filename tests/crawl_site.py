"""What do the tests of the crawl executor crawl? A real server on a loopback port, whose pages a test writes down."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from executors import task_executor
from executors.crawl import CrawlExecutor
from executors.task_executor import Outcome

Reply = Callable[[BaseHTTPRequestHandler], None]
LOOPBACK = {"crawl_allow_networks": ["127.0.0.0/8"]}


def reply(body: bytes = b"", status: int = 200, **headers: str) -> Reply:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Type": "text/html; charset=utf-8", **headers}.items():
            if value:
                handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


def raw(data: bytes) -> Reply:
    """Exactly these bytes, then the end of the connection."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(data)

    return answer


class Site:
    """It notes every request, those for robots.txt apart."""

    def __init__(self) -> None:
        self.pages: dict[str, Reply] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[bytes] = []
        self.robots_requests = 0
        self.connections: set[Any] = set()
        self.stop_dripping = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                if self.path == "/robots.txt":
                    site.robots_requests += 1
                else:
                    site.requests.append((self.command, self.path, dict(self.headers)))
                    site.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                    site.connections.add(self.client_address)
                site.pages.get(self.path, reply(b"not here", 404))(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.host}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def drip(self, before: bytes, drop: bytes) -> Reply:
        """Send `drop` again and again, faster than any time-out between two reads."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.close_connection = True
            handler.wfile.write(before)
            while not self.stop_dripping.wait(0.02):
                handler.wfile.write(drop)

        return answer

    def close(self) -> None:
        self.stop_dripping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(60)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


class Canary:
    """A listener that must never be connected to."""

    def __init__(self, family: int = socket.AF_INET, host: str = "127.0.0.1") -> None:
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind((host, 0))
        self._listener.listen(16)
        self.port: int = self._listener.getsockname()[1]

    def connections(self) -> int:
        """How many came so far: a connection is complete before anybody accepts it."""
        self._listener.setblocking(False)
        count = 0
        try:
            while True:
                self._listener.accept()[0].close()
                count += 1
        except BlockingIOError:
            return count

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    canary = Canary()
    yield canary
    canary.close()


def run(
    url: Any,
    task: dict[str, Any] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    artifacts: Path | None = None,
    **task_data: Any,
) -> Outcome:
    """Run one crawl task as a worker would, on a device that lists loopback unless `settings` say otherwise."""
    whole = {"id": 1, "task_type": "crawl", "batch": "b", "priority": 5, **(task or {})}
    whole["task_data"] = {"url": url, "timeout_seconds": 60, **task_data}
    return task_executor.run(
        CrawlExecutor(),
        whole,
        settings={**LOOPBACK, **(settings or {})},
        is_cancelled=is_cancelled,
        artifact_folder=artifacts,
    )


def fetched(*arguments: Any, **task_data: Any) -> dict[str, Any]:
    outcome = run(*arguments, **task_data)
    assert outcome.outcome == "completed", outcome
    assert outcome.result is not None
    return outcome.result


def refused(outcome: Outcome) -> str:
    """The sentence of a task that is not tried again."""
    assert (outcome.outcome, outcome.retry) == ("failed", False), outcome
    return outcome.error_message or ""


def retried(outcome: Outcome) -> str:
    """The sentence of a task that is tried again."""
    assert (outcome.outcome, outcome.retry) == ("failed", True), outcome
    return outcome.error_message or ""


def followed(outcome: Outcome) -> list[str]:
    return [child["task_data"]["url"] for child in outcome.new_tasks]


PAGE = b"""<!doctype html><html><head><title> A
 page &amp; more </title><style>p {color: red}</style></head><body>
<p>Hello <b>you</b></p><script>var a = "<a href='/no-link'>";</script>
<a href="/a">a</a> <a href="/a#part">a again</a> <a HREF='b?x=1&amp;y=2'>b</a>
<a href="http://elsewhere.example/">other host</a> <a href="mailto:me@example.com">mail</a>
<a href="javascript:void(0)">js</a> <a name="anchor">no href</a> <map><area href="/area"></map>
</body></html>"""
