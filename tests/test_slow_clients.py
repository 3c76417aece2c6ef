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
import requests
from farm import ROOT, Master, Program, farm, wait_for

import connections
from connections import Body, Connections, Crowded, Export, Open
from settings import Settings

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
def clients(master: Master, count: int, sent: bytes, *addresses: str) -> Iterator[list[socket.socket]]:
    """`addresses`: whose they are, in turns."""
    with contextlib.ExitStack() as stack:
        found = []
        for number in range(count):
            source = (addresses[number % len(addresses)], 0) if addresses else None
            client = stack.enter_context(socket.create_connection(("127.0.0.1", master.port), PATIENCE, source))
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


@pytest.mark.parametrize(
    ("path", "length"),
    [("tasks", 8 << 20), ("tasks/report", 8 << 20), ("devices/x/heartbeat", 2 << 20), ("devices/register", 2 << 20),
     ("limits/x/open", 256 << 10), ("devices/x/revoke", 256 << 10), ("login", 4 << 10)],
)  # fmt: skip
def test_a_body_that_is_too_large_is_answered_before_any_byte_of_it(locked: Master, path: str, length: int) -> None:
    """How much that is, depends on what a route takes."""
    head = TASKS.replace("/tasks ", f"/{path} ") + WITH_KEY
    with clients(locked, 1, f"{head}Content-Length: {length + 1}\r\n\r\n".encode()) as [client]:
        assert answer(client).startswith(b"HTTP/1.1 413 ")
    fitting = locked.api("POST", f"/{path}", data=b"[" * length, headers={"Content-Type": "application/json"})
    assert fitting.status_code in (400, 404, 422) and fitting.json()["code"] != "too_large", fitting.text


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
    places = 2 * connections.BODIES_WITHOUT_KEY_OF_AN_ADDRESS
    login = TASKS.replace("/tasks ", "/login ")
    begun = f"{login}Content-Length: 1000\r\n\r\n{{".encode()
    with clients(locked, 300, begun, "127.0.0.1", "127.0.0.2") as slow:
        wait_for("the refusals", lambda: len(readable(slow)) >= 300 - places)
        assert locked.submit_one("slow"), "who has a key does not wait for those who have none"
        entering = f'{login}Connection: close\r\nContent-Length: {len(KEY) + 10}\r\n\r\n{{"key":"{KEY}"}}'
        with clients(locked, 1, entering.encode(), "127.0.0.3") as [other]:
            assert answer(other).startswith(b"HTTP/1.1 204 "), "nor does who comes from a third address"
        assert len(readable(slow)) == 300 - places


def test_the_bodies_of_one_device_leave_places_for_all_others_and_end_with_its_token(locked: Master) -> None:
    token = locked.register("thief", wants_token=True)["token"]
    beat = b'{"boot_id":"boot-1","seq":1}'
    head = TASKS.replace("/tasks ", "/devices/thief/heartbeat ") + f"Authorization: Bearer {token}\r\n"
    begun = f"{head}Content-Length: {len(beat)}\r\n\r\n".encode() + beat[:1]
    count, places = 40, connections.BODIES_OF_A_DEVICE
    with clients(locked, count, begun, "127.0.0.1", "127.0.0.2") as slow:
        wait_for("the refusals", lambda: len(readable(slow)) >= count - places)
        assert len(readable(slow)) == count - places
        locked.register("honest")
        locked.beat("honest")
        refused = readable(slow)
        locked.call("POST", "/devices/thief/revoke", {})
        for client in slow:
            if client not in refused:
                client.sendall(beat[1:])
                received = client.recv(65536)
                assert received.startswith(b"HTTP/1.1 401 ") and b'"key_revoked"' in received, received


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
    patch = "connections.PIECE_SECONDS = 1.0"
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


def test_the_streams_of_one_viewer_leave_some_for_an_admin(locked: Master) -> None:
    viewer = locked.call("POST", "/keys", {"role": "viewer", "name": "watcher"})["key"]
    fifth = Settings().max_event_streams // 5

    def watch(key: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{locked.url}/api/distribution/events"
        return stack.enter_context(requests.get(url, headers=headers, stream=True, timeout=PATIENCE))

    with contextlib.ExitStack() as stack:
        assert [watch(viewer).status_code for _ in range(fifth + 2)] == [200] * fifth + [503] * 2
        assert watch(KEY).status_code == 200


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


def with_key(client: str, key_id: int = 0, *, is_device: bool = False, is_operator: bool = False) -> dict[str, int]:
    return connections.shares_with_key(client, key_id, is_device=is_device, is_operator=is_operator)


def test_one_address_and_one_key_have_few_of_the_places_and_whoever_has_no_key_has_others() -> None:
    places = connections.Shares()

    def begin(count: int, shares: dict[str, int]) -> int:
        """How many of them found a place."""
        found = [shares for _ in range(count) if places.take(shares)]
        taken.extend(found)
        return len(found)

    taken: list[dict[str, int]] = []
    half, few = connections.BODIES_OF_AN_ADDRESS, connections.BODIES_WITHOUT_KEY_OF_AN_ADDRESS
    assert begin(half + 5, with_key("192.0.2.1")) == half, "of a fleet with one key"
    assert begin(few + 5, connections.shares_without_key("192.0.2.1")) == few
    assert begin(9, with_key("192.0.2.4", 7, is_device=True)) + begin(9, with_key("192.0.2.5", 7, is_device=True)) == 8
    assert begin(9, with_key("192.0.2.4", 8)) + begin(9, with_key("192.0.2.5", 8)) == 16
    left = connections.BODIES_AT_ONCE - connections.BODIES_FOR_OPERATORS - half - 8 - 16
    assert begin(left - 1, with_key("2001:db8::1")) + begin(half, with_key("2001:db8::2")) == left
    assert begin(5, with_key("192.0.2.3")) == 0, "all are taken"
    assert begin(99, with_key("192.0.2.1", is_operator=True)) == connections.BODIES_FOR_OPERATORS, "not to an operator"
    for shares in taken:
        places.give_back(shares)
    assert not places.taken, "nothing of those that are gone is kept"
    assert begin(half, with_key("2001:db8::1")) + begin(5, with_key("2001:db8::2")) == half, "a home is one address"


def test_an_export_gives_its_place_back_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "EXPORTS_AT_ONCE", 2)
    monkeypatch.setattr(connections, "EXPORTS_OF_A_SHARED_KEY", 2)
    whole, left = Export(iter([b"a", b"b"]), None), Export(iter([b"a", b"b"]), 0)
    with pytest.raises(Crowded, match="again in a moment"):
        Export(iter([b"a"]), 7)
    assert list(whole) == [b"a", b"b"] and next(left) == b"a"
    for ended in (whole, left):
        ended.close()
        ended.close()
    assert list(left) == []
    again = [Export(iter([]), 0), Export(iter([]), 0)]  # one of them is never read
    for one in again:
        one.close()


def test_one_key_has_a_quarter_of_the_exports_and_the_one_that_many_share_the_others() -> None:
    def begin(count: int, key_id: int | None) -> int:
        before = len(begun)
        with contextlib.suppress(Crowded):
            begun.extend(Export(iter([]), key_id) for _ in range(count))
        return len(begun) - before

    begun: list[Export] = []
    quarter = connections.EXPORTS_AT_ONCE // 4
    assert begin(99, 7) == quarter and begin(99, None) == 3 * quarter and begin(1, 8) == 0
    for one in begun:
        one.close()
    begun.clear()
    assert begin(99, 0) == 3 * quarter and begin(99, 7) == quarter
    for one in begun:
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


@pytest.mark.parametrize(
    ("piece", "before", "is_revoked"),
    [(10, 29.5, False), (256 * 1024, 45.5, False), (256 * 1024, 29.5, True)],
    ids=["small", "a piece of a large one", "of a revoked key"],
)
def test_only_what_was_silent_as_long_as_the_body_is_late_ends(
    pairs: Any, monkeypatch: pytest.MonkeyPatch, piece: int, before: float, is_revoked: bool
) -> None:
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
    announced = 8 << 20  # and nothing of it comes
    is_wanted = [True]
    body = Body(stream, rules, peer="127.0.0.1", length=announced, shares={}, is_wanted=lambda: is_wanted[0])
    reading = threading.Thread(target=body.read, args=(piece,))
    reading.start()
    assert stream.begun.acquire(timeout=PATIENCE)
    clock.now += before
    rules.end_overdue()
    assert are_open(pairs) == [True, True, True, True], "it still has time"
    is_wanted[0] = not is_revoked
    rules.end_overdue()
    assert are_open(pairs) == [True, True, True, True], "a pull may be held for as long"
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
