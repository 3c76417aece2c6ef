"""Does the master go on answering while clients are slow, silent, half gone or endless? Real sockets, a real master.

What a client costs depends on how far it came: a connection, half a head or half a TLS handshake cost no thread at all;
a body costs one for as long as it takes. So most of these tests count threads or places, and none of them a time.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from farm import ROOT, Master, Program, farm, wait_for

import connections
from connections import Body, Connections, Crowded, Export, Open

KEY = "a-key-of-a-test-that-nobody-else-knows"
MANY = 1500
PATIENCE = 60.0
TASKS = "POST /api/distribution/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
WITH_KEY = f"Authorization: Bearer {KEY}\r\n"


class Patched(Master):
    """A master with other constants: `patch` is run before it starts."""

    def __init__(self, folder: Path, patch: str, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "patched.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport connections, master, server\n{patch}\n"
            "sys.exit(master.main())\n"
        )
        super().__init__(folder, str(script), **settings)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with farm() as started:
        master = Master(tmp_path_factory.mktemp("locked"), api_key=KEY)
        started.append(master)
        yield master


@pytest.fixture(scope="module", autouse=True)
def room_for_many_connections() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"ulimit -n {hard} is too little for {MANY} connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted) if soft >= 0 else soft, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def clients(master: Master, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", master.port), PATIENCE))
            if sent:
                client.sendall(sent)
            found.append(client)
        yield found


def threads_of(master: Master) -> int:
    status = Path(f"/proc/{master.process.pid}/status").read_text()
    return int(status.partition("Threads:")[2].split()[0])


def answer(client: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            received += part
    return received


# ---- what costs no thread


@pytest.mark.parametrize("count", [110, MANY])
@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /heal", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half"],
    ids=["idle", "half a line", "half a head"],
)
def test_sockets_that_never_finish_a_head_take_no_thread(locked: Master, count: int, sent: bytes) -> None:
    before = threads_of(locked)
    with clients(locked, count, sent):
        assert {locked.session.get(f"{locked.url}/healthz", timeout=PATIENCE).status_code for _ in range(20)} == {200}
        assert locked.submit_one("slow") and threads_of(locked) < before + 50


def test_a_head_that_never_ends_is_ended_however_it_drips(tmp_path: Path, programs: list[Program]) -> None:
    master = Patched(tmp_path, "server.IDLE_CONNECTION_SECONDS = 1")
    programs.append(master)
    with clients(master, 2, b"GET /healthz HTTP/1.1\r\nX-Endless: ") as (silent, dripping):
        assert answer(silent).startswith((b"", b"HTTP/1.1 408"))
        with pytest.raises(OSError):
            while True:
                dripping.sendall(b"a")
                threading.Event().wait(0.02)


@pytest.mark.parametrize("head", ["X-Large: " + "a" * 1_000_000, "X-Many: a\r\n" * 200], ids=["large", "many"])
def test_a_head_that_is_too_large_is_refused_before_anybody_sees_it(locked: Master, head: str) -> None:
    request = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{head}\r\n\r\n"
    with clients(locked, 1, b"") as [client]:
        with contextlib.suppress(ConnectionError):  # it hangs up in the middle
            client.sendall(request.encode())
        received = answer(client)
    assert received.startswith(b"HTTP/1.1 431 ") or received == b"", received


def test_requests_sent_ahead_are_answered_one_after_the_other(locked: Master) -> None:
    ahead = b"".join(b"GET /static/%d HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % number for number in range(300))
    before = threads_of(locked)
    with clients(locked, 1, ahead + b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n") as [
        client
    ]:
        received = answer(client)
    assert received.count(b"HTTP/1.1 404 ") == 300 and received.count(b"HTTP/1.1 200 ") == 1
    assert threads_of(locked) < before + 50


# ---- bodies


@pytest.mark.parametrize("path", ["tasks", "tasks/report", "devices/register", "tasks/actions"])
@pytest.mark.parametrize("header", ["Authorization: Bearer wrong\r\n", ""], ids=["a wrong key", "no key"])
def test_a_wrong_key_is_answered_before_any_byte_of_the_body(locked: Master, path: str, header: str) -> None:
    request = TASKS.replace("/tasks ", f"/{path} ") + f"{header}Content-Length: 104857600\r\n\r\n"
    with clients(locked, 1, request.encode()) as [client]:
        received = answer(client)
    assert received.startswith(b"HTTP/1.1 401 ") and b"connection: close" in received.lower()
    assert b"application/problem+json" in received


def test_a_body_that_is_too_large_is_answered_before_any_byte_of_it(locked: Master) -> None:
    with clients(locked, 1, f"{TASKS}{WITH_KEY}Content-Length: 104857600\r\n\r\n".encode()) as [client]:
        assert answer(client).startswith(b"HTTP/1.1 413 ")


def readable(waiting: list[socket.socket]) -> list[socket.socket]:
    """Those that have been answered, or closed."""
    poll, by_number = select.poll(), {client.fileno(): client for client in waiting}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(0)]


def test_slow_bodies_beyond_their_places_are_refused_and_everybody_else_is_answered(locked: Master) -> None:
    places = connections.BODIES_AT_ONCE // 2  # one address may have half of them
    with clients(locked, 300, f"{TASKS}{WITH_KEY}Content-Length: 1000\r\n\r\n[".encode()) as slow:
        wait_for("the refusals", lambda: len(readable(slow)) >= 300 - places)
        received = answer(readable(slow)[0])
        assert received.startswith(b"HTTP/1.1 503 ") and b'"busy"' in received and b"retry-after: " in received
        for path in ("/healthz", "/", "/api/distribution/login"):
            assert locked.session.get(f"{locked.url}{path}", timeout=PATIENCE).status_code in (200, 405)
        assert locked.get("/system/overview")["tasks"]
        assert len(readable(slow)) == 300 - places
    wait_for("their places", lambda: locked.api("POST", "/tasks", {"task_type": "slow"}).status_code == 201)


def test_slow_bodies_without_a_key_have_few_places_of_their_own(locked: Master) -> None:
    places = connections.BODIES_WITHOUT_KEY // 2
    login = TASKS.replace("/tasks ", "/login ") + "Content-Length: 1000\r\n\r\n{"
    with clients(locked, 300, login.encode()) as slow:
        wait_for("the refusals", lambda: len(readable(slow)) >= 300 - places)
        assert locked.submit_one("slow"), "who has a key does not wait for those who have none"
        assert len(readable(slow)) == 300 - places


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.05], ids=["one after the other", "dripping"])
def test_1500_slow_bodies_leave_it_answering(locked: Master, seconds: float) -> None:
    with clients(locked, MANY, f"{TASKS}{WITH_KEY}Content-Length: 100000\r\n\r\n[".encode()) as slow:
        for client in slow if seconds else ():
            with contextlib.suppress(OSError):
                client.sendall(b" ")
        wait_for("the refusals", lambda: len(readable(slow)) >= MANY - connections.BODIES_AT_ONCE // 2)
        assert {locked.session.get(f"{locked.url}/healthz", timeout=PATIENCE).status_code for _ in range(50)} == {200}


def test_an_overdue_body_ends_with_its_connection_silent_or_dripping(tmp_path: Path, programs: list[Program]) -> None:
    patch = "connections.BODY_SECONDS = connections.BODY_SECONDS_WITHOUT_KEY = 1.0"
    master = Patched(tmp_path, patch, api_key=KEY)
    programs.append(master)
    login = TASKS.replace("/tasks ", "/login ")
    requests = [f"{head}Content-Length: 500\r\n\r\n[".encode() for head in (TASKS + WITH_KEY, TASKS + WITH_KEY, login)]
    with contextlib.ExitStack() as stack:
        silent, dripping, unknown = [stack.enter_context(clients(master, 1, request))[0] for request in requests]
        with pytest.raises(OSError):
            while True:
                dripping.sendall(b" ")
                threading.Event().wait(0.01)
        # What is left to say to them is said to nobody: the connection is over.
        assert [answer(silent), answer(unknown)] == [b"", b""]
    assert master.submit_one("slow") and "did not come within" in master.output


# ---- the rules, with sockets of this process


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Stalled:
    """A stream whose read waits until the test lets it end."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Semaphore(0), threading.Event()

    def read(self, size: int) -> bytes:
        self.begun.release()
        assert self.end.wait(PATIENCE)
        return b""


def test_one_address_has_half_of_the_places_and_whoever_has_no_key_has_others() -> None:
    rules, stream = Connections(1000, clock=Clock()), Stalled()

    def begin(count: int, client: str, *, has_key: bool = True) -> int:
        """How many of them found a place."""
        refused = threading.Semaphore(0)

        def read() -> None:
            body = Body(stream, rules, client=client, peer=client, length=10, has_key=has_key)
            try:
                body.read(10)
            except Crowded:
                refused.release()
                stream.begun.release()

        threads.extend(threading.Thread(target=read) for _ in range(count))
        for thread in threads[-count:]:
            thread.start()
        for _ in range(count):
            assert stream.begun.acquire(timeout=PATIENCE)
        return count - sum(refused.acquire(blocking=False) for _ in range(count))

    threads: list[threading.Thread] = []
    half = connections.BODIES_AT_ONCE // 2
    assert begin(half + 5, "192.0.2.1") == half
    assert begin(3, "192.0.2.1", has_key=False) == 3
    assert begin(half - 1, "2001:db8::1") + begin(5, "2001:db8::2") == half, "a home's network is one address"
    assert begin(5, "192.0.2.3") == 0, "all are taken"
    assert begin(connections.BODIES_WITHOUT_KEY, "192.0.2.4", has_key=False) == connections.BODIES_WITHOUT_KEY // 2
    stream.end.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert begin(half, "192.0.2.1") == half and not rules._waiting
    for thread in threads:
        thread.join(PATIENCE)
    assert +rules._places == {}, "nothing of those that are gone is kept"


def test_an_export_gives_its_place_back_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Export, "_places", threading.BoundedSemaphore(2))
    whole, left = Export(iter([b"a", b"b"])), Export(iter([b"a", b"b"]))
    with pytest.raises(Crowded, match="again in a moment"):
        Export(iter([b"a"]))
    assert list(whole) == [b"a", b"b"] and next(left) == b"a"
    for ended in (whole, left):
        ended.close()
        ended.close()
    assert list(left) == []
    again = [Export(iter([])), Export(iter([]))]  # one of them is never read
    for one in again:
        one.close()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_exports_one_after_the_other_are_all_answered(locked: Master, form: str) -> None:
    for _ in range(connections.EXPORTS_AT_ONCE + 8):
        assert locked.api("GET", f"/tasks/export?format={form}").status_code == 200
    assert locked.api("GET", "/tasks/export?format=none").status_code == 422


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Four connections of this process with itself: the client's end and the server's."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        found = []
        for _ in range(4):
            client = stack.enter_context(socket.create_connection(listener.getsockname(), PATIENCE))
            found.append((client, stack.enter_context(listener.accept()[0])))
        yield found


def are_open(pairs: list[tuple[socket.socket, socket.socket]]) -> list[bool]:
    return [client not in readable([client for client, _ in pairs]) for client, _ in pairs]


def test_only_what_was_silent_as_long_as_the_body_is_late_ends(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(), Stalled()
    rules = Connections(1000, clock=clock)
    # Seconds since we sent anything: the late body's, a held pull's, an event stream's; and another address's.
    silence = dict(zip((server.fileno() for _, server in pairs), (61.2, 25.0, 15.0, 300.0)))
    peers = dict(zip(silence, ("127.0.0.1", "127.0.0.1", "127.0.0.1", "192.0.2.1")))

    def seen() -> list[Open]:
        return [
            one._replace(silent_seconds=silence[one.descriptor], peer=peers[one.descriptor])
            for one in really_open()
            if one.descriptor in silence
        ]

    really_open = connections._open
    monkeypatch.setattr(connections, "_open", seen)
    body = Body(stream, rules, client="192.168.1.7", peer="127.0.0.1", length=0, has_key=True)
    reading = threading.Thread(target=body.read, args=(10,))
    reading.start()
    assert stream.begun.acquire(timeout=PATIENCE)
    clock.now += 59.0
    rules.end_overdue()
    assert are_open(pairs) == [True, True, True, True], "it still has time"
    clock.now += 2.0
    rules.end_overdue()
    assert are_open(pairs) == [False, True, True, True]
    stream.end.set()
    reading.join(PATIENCE)


def test_when_nearly_all_places_are_taken_the_greediest_address_gives_up_half(
    pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = dict(zip((server.fileno() for _, server in pairs), (3.0, 70.0, 15.0, 1.0)))
    really_open = connections._open

    def seen() -> list[Open]:
        found = [one for one in really_open() if one.descriptor in silence]
        strangers = [Open(-1, f"192.0.2.{number % 200}", 1, 500.0) for number in range(600)]
        return [one._replace(silent_seconds=silence[one.descriptor]) for one in found] + strangers

    monkeypatch.setattr(connections, "_open", seen)
    monkeypatch.setattr(connections, "_descriptors", lambda: list(range(600)))
    Connections(1000).end_overdue()
    assert are_open(pairs) == [True, True, True, True], "there is room"
    Connections(650).end_overdue()
    assert are_open(pairs) == [True, False, False, True], "its longest silent ones"


def test_the_kernel_says_for_how_long_a_connection_was_silent(pairs: Any) -> None:
    """The place of the figure in its answer is written down in connections.py."""
    (quiet, quiet_end), (_, talking_end), *_ = pairs
    wait_for("some silence", lambda: silent_of(quiet_end) > 0.3)
    talking_end.sendall(b"x")
    assert silent_of(talking_end) < silent_of(quiet_end)
    assert {one.port for one in connections._open()} >= {quiet.getsockname()[1]}


def silent_of(end: socket.socket) -> float:
    [one] = [one for one in connections._open() if one.descriptor == end.fileno()]
    return one.silent_seconds
