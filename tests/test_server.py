"""Does the app meet the network, and leave it in order? A real process with a small bottle app, over loopback."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator
from unittest.mock import Mock

import pytest

import server

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds until something that should take milliseconds is called broken

APP = """
import json, logging, signal, sys, threading
import bottle
import server as tested
from server import PortInUse, Server, _InProcess

options = json.loads(sys.argv[1])
tested.IDLE_THREAD_SECONDS = options.get("idle_thread_seconds", tested.IDLE_THREAD_SECONDS)
logging.basicConfig(level=logging.WARNING)
handlers_before = list(logging.getLogger().handlers)
changed = threading.Condition()
counts = {"held": 0, "begun": 0, "closed": 0, "woken": 0}
app = bottle.Bottle()
paths = set()

@app.hook("before_request")
def remember_path():
    paths.add(bottle.request.path)

@app.get("/seen")
def seen():
    return {"paths": sorted(paths)}

def say(word, **more):
    print(json.dumps({"word": word, **more}), flush=True)

def count(name, by=1):
    with changed:
        counts[name] += by
        changed.notify_all()

@app.get("/ping")
def ping():
    return {"pong": True}

@app.get("/hold")
def hold():
    with changed:
        counts["held"] += 1
        changed.notify_all()
        is_woken = changed.wait_for(lambda: counts["woken"], 60)
        counts["held"] -= 1
    return {"woken": bool(is_woken)}

@app.get("/stuck")
def stuck():
    count("begun")
    threading.Event().wait(60)

@app.get("/counts/<name>/<wanted:int>")
def wait_for_count(name, wanted):
    with changed:
        changed.wait_for(lambda: counts[name] >= wanted, 60)
        return dict(counts)

@app.post("/wake")
def wake():
    count("woken")

@app.post("/sleep")
def sleep():
    count("woken", -counts["woken"])

@app.get("/stream")
def stream():
    def ticks():
        try:
            while True:
                yield b"tick\\n"
                threading.Event().wait(0.01)
        finally:
            count("closed")
    return ticks()

@app.post("/body")
def body():
    told = bottle.request.content_length
    count("begun")
    return {"told": told, "read": len(bottle.request.environ["wsgi.input"].read(told))}

@app.get("/environ")
def environ():
    return {"names": sorted(bottle.request.environ)}

@app.get("/handlers")
def handlers():
    root, granian = logging.getLogger(), logging.getLogger("_granian")
    kept = root.handlers == handlers_before and root.level == logging.WARNING
    return {"kept": kept, "granian": [len(granian.handlers), granian.propagate]}

@app.post("/stop")
def stop():
    server.stop()
    server.stop()
    return {"stopping": True}

def on_ready():
    say("ready", url=server.url, port=server.port)
    if "signal_in_a_thread" in options:  # the main thread is not interrupted in its wait
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

def on_stop():
    if "granian_fails" in options:
        threading.Event().wait(0.1)  # finish must wait for it
    say("on_stop")
    if "on_stop_fails" in options:
        raise ValueError("planted")
    count("woken")

def finish():
    say("finish")
    if "finish_fails" in options:
        raise ValueError("planted")
    if "finish_waits" in options:
        threading.Event().wait(60)

server = Server(host=options.get("host", "127.0.0.1"), port=options.get("port", 0), threads=options.get("threads", 320))
try:
    server.bind()
except PortInUse as error:
    sys.exit(f"{error}")
if "granian_fails" in options:
    _InProcess.run = None
if "stopped_before" in options:
    server.stop()
code = server.serve(
    app, on_ready=on_ready, on_stop=on_stop, finish=finish, stop_within_seconds=options.get("stop_within_seconds", 30.0)
)
say("served", code=code)
sys.exit(code)
"""


class Running:
    """A process of the small app, with its lines and its exit."""

    def __init__(self, options: dict[str, Any], **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", APP, json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        self.readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines.put), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors.append), daemon=True),
        ]
        for reader in self.readers:
            reader.start()
        self.port = 0
        self.url = ""

    @staticmethod
    def _read(stream: Any, take: Any) -> None:
        for line in stream:
            take(line)

    def line(self) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(self.lines.get(timeout=PATIENCE))
        return line

    def until_ready(self) -> Running:
        ready = self.line()
        assert ready["word"] == "ready"
        self.port, self.url = ready["port"], ready["url"]
        return self

    def exit(self) -> tuple[int, list[str], str]:
        """The exit code, the words printed since, and all of stderr."""
        code = self.process.wait(PATIENCE)
        for reader in self.readers:
            reader.join(PATIENCE)
        words = []
        while not self.lines.empty():
            words.append(self.line()["word"])
        return code, words, "".join(self.errors)

    def ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path)
            return json.loads(connection.getresponse().read() or b"{}")

    def open(self, request: str) -> socket.socket:
        """A connection on which this request was sent and whose reply nobody has read."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        client.sendall(request.replace("\n", "\r\n").encode())
        return client

    def until_threads_go_away(self) -> None:
        threads = Path(f"/proc/{self.process.pid}/task")
        most, end = 0, time.monotonic() + PATIENCE
        while (count := sum(1 for _ in threads.iterdir())) >= most:
            most = count
            assert time.monotonic() < end, f"{count} threads stay"

    def hold(self, number: int) -> list[socket.socket]:
        clients = [self.open("GET /hold HTTP/1.1\nHost: test\nConnection: close\n\n") for _ in range(number)]
        assert self.ask(f"/counts/held/{number}")["held"] == number
        return clients


def machine_has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def everything(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


@contextlib.contextmanager
def running(options: dict[str, Any] | None = None, **environment: str) -> Iterator[Running]:
    app = Running(options or {}, **environment)
    try:
        yield app
    finally:
        app.process.kill()  # ours, by its id; already gone in most tests
        app.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with running() as app:
        yield app.until_ready()


# --- it meets the network


def test_it_answers_on_a_free_port_once_it_says_that_it_is_ready(shared: Running) -> None:
    assert shared.port > 0
    assert shared.url == f"http://127.0.0.1:{shared.port}"
    assert shared.ask("/ping") == {"pong": True}


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost", "::1", "::"])
def test_every_kind_of_host_is_answered_at_its_url(host: str) -> None:
    if ":" in host and not machine_has_ipv6():
        pytest.skip("this machine has no IPv6")
    with running({"host": host}) as app:
        app.until_ready()
        assert app.ask("/ping") == {"pong": True}
        if host == "::":  # both kinds of address
            app.url = f"http://127.0.0.1:{app.port}"
            assert app.ask("/ping") == {"pong": True}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_one_sentence_that_says_what_to_do(shared: Running, host: str) -> None:
    with running({"host": host, "port": shared.port}) as second:
        code, words, errors = second.exit()
    assert code == 1
    assert words == []
    assert errors.count("\n") == 1, errors
    assert str(shared.port) in errors
    assert host in errors
    assert "--port" in errors
    assert shared.ask("/ping") == {"pong": True}


@pytest.mark.parametrize("host", ["192.0.2.1", "two..dots", "unknown.invalid"])
def test_a_host_that_is_not_ours_is_one_sentence_and_no_port_in_use(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    if host == "unknown.invalid":  # asks no name server
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=unknown))
    with pytest.raises(OSError, match=f"Cannot listen on {host} port 0: .*\\. Choose another") as caught:
        server.Server(host=host, port=0, threads=4).bind()
    assert not isinstance(caught.value, server.PortInUse)


def test_connections_are_told_to_notice_a_peer_that_is_gone() -> None:
    with server._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            for name, at_most in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_USER_TIMEOUT", 60_000)):
                if hasattr(socket, name):
                    assert 0 < connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) <= at_most, name


def test_the_environment_of_the_process_never_reaches_a_request() -> None:
    with running(AF_API_KEY="a secret", HTTP_X_API_KEY="not a header") as app:
        names = app.until_ready().ask("/environ")["names"]
    assert "REMOTE_ADDR" in names
    assert not {"AF_API_KEY", "HTTP_X_API_KEY", "PATH"} & set(names)


def test_the_log_handlers_of_the_program_are_left_alone(shared: Running) -> None:
    assert shared.ask("/handlers") == {"kept": True, "granian": [0, True]}
    assert shared.errors == []


# --- held polls, streams, bodies


@pytest.mark.parametrize("number", [1, 200])
def test_each_held_poll_of_a_burst_is_started_and_answered(shared: Running, number: int) -> None:
    for _ in range(3):
        clients = shared.hold(number)
        shared.ask("/wake", "POST")
        replies = [everything(client) for client in clients]
        shared.ask("/sleep", "POST")
        assert sum(b'{"woken": true}' in reply for reply in replies) == number


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 199, 1000])
def test_each_held_poll_of_a_burst_is_started_also_while_idle_threads_go_away(number: int) -> None:
    with running({"threads": 1100, "idle_thread_seconds": 5}) as app:
        app.until_ready()
        for burst in (200, number, 200, number):
            clients = app.hold(burst)
            app.ask("/wake", "POST")
            assert sum(b'{"woken": true}' in everything(client) for client in clients) == burst
            app.ask("/sleep", "POST")
            if burst != number:
                app.until_threads_go_away()


def test_granian_is_nudged_for_ever_also_when_it_leaves_a_nudge_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "NUDGE_SECONDS", 0.2)
    tested = server.Server(host="127.0.0.1", port=0, threads=4)
    tested.bind()
    assert tested._listener is not None
    tested._listener.settimeout(PATIENCE)
    is_ready = threading.Event()
    nudging = threading.Thread(target=tested._ask_myself, args=(is_ready.set,), daemon=True)
    nudging.start()
    unanswered, _ = tested._listener.accept()
    for _ in range(50):
        client, _ = tested._listener.accept()  # on a new connection, because the first one is stuck
        client.settimeout(PATIENCE)
        if not (nudge := client.recv(4096)):  # it had given up before, on a busy machine
            continue
        assert nudge.startswith(b"GET /nudge-")
        assert not is_ready.is_set()
        client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        if is_ready.wait(1.0):  # else the answer came too late for it, on a busy machine
            break
    assert client.recv(4096).startswith(b"GET /nudge-")
    tested._is_stop_asked.set()
    nudging.join(PATIENCE)
    assert not nudging.is_alive()
    unanswered.close()


def test_the_app_sees_no_nudge(shared: Running) -> None:
    assert shared.ask("/seen")["paths"]
    assert not [path for path in shared.ask("/seen")["paths"] if "nudge" in path]


@pytest.mark.slow
def test_a_thousand_held_polls_leave_room_for_other_requests() -> None:
    with running({"threads": 1100, "stop_within_seconds": PATIENCE}) as app:
        clients = app.until_ready().hold(1000)
        assert app.ask("/ping") == {"pong": True}
        app.process.send_signal(signal.SIGTERM)
        assert sum(b'{"woken": true}' in everything(client) for client in clients) == 1000
        assert app.exit() == (0, ["on_stop", "finish", "served"], "")


def test_a_client_that_leaves_in_mid_stream_closes_the_generator(shared: Running) -> None:
    before = shared.ask("/counts/closed/0")["closed"]
    client = shared.open("GET /stream HTTP/1.1\nHost: test\n\n")
    received = b""
    while b"tick" not in received:
        received += client.recv(4096)
    client.close()
    assert shared.ask(f"/counts/closed/{before + 1}")["closed"] == before + 1


def test_a_body_cut_short_is_read_short_and_never_waits(shared: Running) -> None:
    client = shared.open("POST /body HTTP/1.1\nHost: test\nContent-Length: 100\nConnection: close\n\n0123456789")
    client.shutdown(socket.SHUT_WR)
    reply = everything(client)
    assert b'{"told": 100, "read": 10}' in reply or reply == b""  # answered or dropped, not held
    assert shared.ask("/ping") == {"pong": True}


def test_a_body_longer_than_told_is_cut_and_the_rest_is_no_request(shared: Running) -> None:
    client = shared.open("POST /body HTTP/1.1\nHost: test\nContent-Length: 4\n\n0123 and some more\n\n")
    reply = everything(client)
    assert b'{"told": 4, "read": 4}' in reply
    assert reply.count(b" 200 OK") == 1


# --- it leaves in order


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_answers_every_held_poll_and_ends_with_0(name: str) -> None:
    number = 200 if name == "SIGTERM" else 20
    with running() as app:
        clients = app.until_ready().hold(number)
        app.process.send_signal(getattr(signal, name))
        replies = [everything(client) for client in clients]
        assert app.exit() == (0, ["on_stop", "finish", "served"], "")
    assert sum(b'{"woken": true}' in reply for reply in replies) == number


def test_a_signal_that_does_not_wake_the_main_thread_is_not_lost() -> None:
    with running({"signal_in_a_thread": True}) as app:
        assert app.until_ready().exit() == (0, ["on_stop", "finish", "served"], "")


def test_a_stop_before_it_serves_ends_with_0() -> None:
    with running({"stopped_before": True}) as app:
        code, words, errors = app.exit()
    assert (code, errors) == (0, "")
    assert [word for word in words if word != "ready"] == ["on_stop", "finish", "served"]


def test_stop_is_idempotent() -> None:
    with running() as app:
        assert app.until_ready().ask("/stop", "POST") == {"stopping": True}
        with contextlib.suppress(ProcessLookupError):
            app.process.send_signal(signal.SIGTERM)
        code, words, errors = app.exit()
    assert code in (0, -signal.SIGTERM)  # it may come when the program has nothing more to do than to end
    assert (words, errors) == (["on_stop", "finish", "served"], "")


def test_a_second_sigint_ends_at_once_with_130() -> None:
    with running({"finish_waits": True}) as app:
        app.until_ready().process.send_signal(signal.SIGINT)
        assert [app.line()["word"], app.line()["word"]] == ["on_stop", "finish"]
        app.process.send_signal(signal.SIGTERM)  # a second SIGTERM, or one after SIGINT, changes nothing
        app.process.send_signal(signal.SIGINT)
        assert app.exit() == (130, [], "")


@pytest.mark.parametrize(
    "request_text",
    [
        "GET /stuck HTTP/1.1\nHost: test\n\n",
        "POST /body HTTP/1.1\nHost: test\nContent-Length: 100\n\nonly this",
    ],
    ids=["a handler that hangs", "a body that never comes"],
)
def test_a_request_that_does_not_end_is_cut_off_and_finish_still_runs(request_text: str) -> None:
    with running({"stop_within_seconds": 0.5}) as app, app.until_ready().open(request_text):
        assert app.ask("/counts/begun/1")["begun"] == 1
        app.process.send_signal(signal.SIGTERM)
        code, words, errors = app.exit()
    assert (code, words) == (0, ["on_stop", "finish"])
    assert "cut off" in errors
    assert "Traceback" not in errors


def test_a_step_that_fails_keeps_no_other_from_running_and_ends_with_1() -> None:
    with running({"on_stop_fails": True, "finish_fails": True}) as app:
        app.until_ready().process.send_signal(signal.SIGTERM)
        code, words, errors = app.exit()
    assert (code, words) == (1, ["on_stop", "finish", "served"])
    assert errors.count("planted") == 2


def test_a_server_that_fails_by_itself_leaves_in_order_too_and_ends_with_1() -> None:
    with running({"granian_fails": True}) as app:
        code, words, errors = app.exit()
    assert (code, words) == (1, ["on_stop", "finish", "served"])
    assert "granian failed" in errors


# --- it asks no more of the machine than there is


def test_threads_stay_below_what_the_container_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "pids.max"
    monkeypatch.setattr(server, "PIDS_MAX", (str(tmp_path / "none"), str(limit)))
    for text, threads in (("max", 1650), ("100000", 1650), ("500", 500 - server.SPARE_THREADS), ("20", 8)):
        limit.write_text(text + "\n")
        assert server.Server(host="127.0.0.1", port=0, threads=1650).threads == threads


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "connections"),
    [
        (1024, 100_000, 3000 + server.SPARE_FILES, 3000),
        (1024, 2048, 2048, 2048 - server.SPARE_FILES),
        (1024, resource.RLIM_INFINITY, 3000 + server.SPARE_FILES, 3000),
        (50_000, 100_000, None, 3000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 3000),
    ],
)
def test_open_files_are_raised_as_far_as_needed_and_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None, connections: int
) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.append(new))
    assert server._affordable_connections(3000, 3000) == connections
    assert limits[1:] == ([(raised, hard)] if raised else [])


def test_bind_alone_keeps_a_second_server_off_the_port() -> None:
    first = server.Server(host="127.0.0.1", port=0, threads=4)
    first.bind()
    second = server.Server(host="127.0.0.1", port=first.port, threads=4)
    with pytest.raises(server.PortInUse) as caught:
        second.bind()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRINUSE
