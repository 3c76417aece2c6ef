"""Does --doctor find what keeps a device from working, say what to do, and touch nothing?"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import farm
import pytest
from farm import reserved_port

import settings
from executors.device import doctor

ROOT = Path(__file__).resolve().parent.parent
KEY = "correct-horse-battery-staple-of-a-test"
Said = dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[farm.Master]:
    """A master with a key."""
    with farm.farm() as started:
        master = farm.Master(tmp_path_factory.mktemp("locked"), api_key=KEY)
        started.append(master)
        yield master


@pytest.fixture
def examine(tmp_path: Path) -> Callable[..., Said]:
    """What the doctor says of a device, by the name of the step: (mark, text)."""

    def run(master_url: str, **more: Any) -> Said:
        flags = {"device_id": "shop-7", "state_folder": str(tmp_path / "state"), "log_file": str(tmp_path / "log")}
        wanted = settings.load("worker", flags={**flags, "master_url": master_url, **more}, environ={}, starting=False)
        said: Said = {}
        for mark, name, text in doctor.findings(wanted):
            said.setdefault(name, []).append((mark, text))
        return said

    return run


class Stranger(http.server.BaseHTTPRequestHandler):
    """A server that is no master of ours: it gives the same answer to everything."""

    status, headers_sent, body, date = 200, {"Content-Type": "application/json"}, b"{}", ""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response_only(self.status)
        self.send_header("Date", self.date or formatdate(usegmt=True))
        for name, value in {**self.headers_sent, "Content-Length": str(len(self.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def stranger(body: Any = b"{}", tls: ssl.SSLContext | None = None, **more: Any) -> Iterator[int]:
    """A port with such a server."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Stranger,), {"body": content, **more}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def by_command(
    master: farm.Master, folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "worker.py"), "--doctor", "--master-url", master.url]
    command += ["--state-folder", str(folder / "state"), "--log-file", str(folder / "log" / "log"), *arguments]
    environment = {**farm.environment(), **variables}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


def test_all_is_well_says_ok_line_by_line_and_leaves_no_trace(locked: farm.Master, tmp_path: Path) -> None:
    done = by_command(locked, tmp_path, "--device-id", "shop-7", AF_API_KEY=KEY)
    assert done.returncode == settings.ExitCode.OK, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines if not line.startswith("note")] == [
        "ok   device id", "ok   name", "ok   connection", "ok   master", "ok   clock", "ok   key", "ok   registration",
        "ok   state folder", "ok   disk", "ok   log", "ok   executors",
    ]  # fmt: skip
    assert KEY not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert locked.get("/devices")["devices"] == []


def test_a_wrong_key_is_told_without_being_shown(locked: farm.Master, tmp_path: Path) -> None:
    done = by_command(locked, tmp_path, "--device-id", "shop-7", AF_API_KEY="some-other-key-of-somebody")
    assert done.returncode == settings.ExitCode.UNREACHABLE
    assert "fix  key: the master refuses this key; write a key of the master" in done.stdout
    assert "some-other-key" not in done.stdout + done.stderr


def test_a_missing_key_and_a_missing_device_id_are_told(locked: farm.Master, tmp_path: Path) -> None:
    done = by_command(locked, tmp_path)
    assert done.returncode == settings.ExitCode.UNREACHABLE
    assert "fix  key: the master wants a key, and this device has none" in done.stdout
    assert "fix  device id: there is none; write --device-id" in done.stdout


def test_a_running_worker_of_the_same_id_is_seen_and_not_disturbed(
    master: farm.Master, programs: list[farm.Program], tmp_path: Path
) -> None:
    worker = farm.Worker(master.url, tmp_path, "shop-1")
    programs.append(worker)

    def mine() -> dict[str, Any]:
        return next((one for one in master.get("/devices")["devices"] if one["device_id"] == "shop-1"), {})

    before = farm.wait_for("the worker to register", mine)
    done = by_command(master, tmp_path, "--device-id", "shop-1")
    assert done.returncode == settings.ExitCode.OK, done.stdout
    assert "shop-1 can be written and a worker runs in it now" in done.stdout
    assert "ok   registration: the master has it as" in done.stdout
    task_id = master.submit_one(pinned_device_id="shop-1")
    farm.wait_for("the worker to go on", lambda: master.get(f"/tasks/{task_id}")["status"] == "completed")
    assert mine()["registered_at"] == before["registered_at"] and worker.process.poll() is None


def test_a_device_that_a_person_switched_off_is_told_how_to_undo_it(
    master: farm.Master, examine: Callable[..., Said]
) -> None:
    master.register("shop-9")
    master.call("PUT", "/devices/shop-9/status", {"status": "disabled"})
    [(mark, text)] = examine(master.url, device_id="shop-9")["registration"]
    assert mark == "fix" and "made it disabled" in text and '{"status": "active"}' in text


def test_an_unknown_name_ends_the_way_but_not_the_examination(examine: Callable[..., Said]) -> None:
    said = examine("http://no-such-machine.invalid:8000")
    [(mark, text)] = said["name"]
    assert mark == "fix" and "no-such-machine.invalid is not known" in text and "name server" in text
    assert "connection" not in said and said["state folder"][0][0] == "ok" and "executors" in said


def test_a_port_where_nothing_listens(examine: Callable[..., Said]) -> None:
    with reserved_port() as place:
        port = place.getsockname()[1]
        [(mark, text)] = examine(f"http://127.0.0.1:{port}")["connection"]
    assert mark == "fix" and f"nothing listens at 127.0.0.1 port {port}" in text and "--host 0.0.0.0" in text


def test_a_server_that_says_nothing_costs_only_its_limit(
    examine: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "STEP_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        [(mark, text)] = examine(f"http://127.0.0.1:{silent.getsockname()[1]}")["master"]
    assert mark == "fix" and "accepts the connection and says nothing" in text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"body": b"<html>Welcome to the hotel</html>", "headers_sent": {"Content-Type": "text/html"}},
         "not our master (200, text/html): a login page"),
        ({"status": 302, "headers_sent": {"Location": "http://login.example/"}}, "redirects to http://login.example/"),
        ({"status": 502, "headers_sent": {"Content-Type": "text/html"}}, "the master behind it does not run"),
        ({"body": {"status": "ok", "protocol": settings.PROTOCOL + 1}}, "/edge/worker.pyz"),
    ],
    ids=["captive portal", "redirect", "reverse proxy", "newer protocol"],
)  # fmt: skip
def test_what_answers_there_is_no_master_for_this_device(
    examine: Callable[..., Said], answer: dict[str, Any], words: str
) -> None:
    with stranger(**answer) as port:
        said = examine(f"http://127.0.0.1:{port}")
    [(mark, text)] = said["master"]
    assert mark == "fix" and words in text
    assert "key" not in said, "no key goes on to what is no master"


def test_it_asks_under_the_name_of_no_device_that_could_be_there(examine: Callable[..., Said]) -> None:
    asked: list[str] = []
    with stranger({"status": "ok", "protocol": settings.PROTOCOL}, asked=asked) as port:
        examine(f"http://127.0.0.1:{port}")
    health, pull, standing = asked
    assert health == "/healthz" and re.search(r"/tasks/pull\?device_id=doctor-[0-9a-f]{16}&limit=0&wait=0$", pull)
    assert standing.endswith("/devices/shop-7/stats"), "which only reads"


@pytest.mark.parametrize(("seconds", "words"), [(3600, "3600 s behind"), (-90, "90 s ahead of")])
def test_a_wrong_clock_is_told_and_the_rest_goes_on(examine: Callable[..., Said], seconds: float, words: str) -> None:
    date = formatdate(time.time() + seconds, usegmt=True)
    with stranger({"status": "ok", "protocol": settings.PROTOCOL}, date=date) as port:
        said = examine(f"http://127.0.0.1:{port}")
    [(mark, text)] = said["clock"]
    amount, unit, direction = words.split(" ", 2)
    told = int(text.partition("this machine's is ")[2].split()[0])
    assert mark == "fix" and abs(told - int(amount)) <= 2 and f"{unit} {direction} the master's" in text
    assert "key" in said


# ---- TLS ----


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good.pem and expired.pem for localhost, with key.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine to make certificates with; what the doctor says of them is untested")
    folder = tmp_path_factory.mktemp("tls")
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    for command in (
        ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key.pem",
         "-out", "good.pem", "-days", "30", *name],
        ["req", "-new", "-key", "key.pem", "-out", "request.pem", *name],
        ["x509", "-req", "-in", "request.pem", "-key", "key.pem", "-days", "0", "-out", "expired.pem"],
    ):  # fmt: skip
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


@contextlib.contextmanager
def tls_server(folder: Path, certificate: str = "good.pem") -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / certificate, folder / "key.pem")
    with stranger({"status": "ok", "protocol": settings.PROTOCOL}, tls=context) as port:
        yield port


def test_a_certificate_that_is_trusted_is_well(
    examine: Callable[..., Said], certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "good.pem"))
    with tls_server(certificates) as port:
        said = examine(f"https://localhost:{port}")
    [(mark, text)] = said["certificate"]
    assert mark == "ok" and "good for localhost, " in text and said["master"][0][0] == "ok"


def test_a_certificate_of_nobody_is_told_plainly(examine: Callable[..., Said], certificates: Path) -> None:
    with tls_server(certificates) as port:
        said = examine(f"https://localhost:{port}")
    [(mark, text)] = said["certificate"]
    assert mark == "fix" and "nobody whom this machine trusts has signed it" in text and "ca_file" in text
    assert "master" not in said


def test_an_expired_certificate_may_be_a_wrong_clock(
    examine: Callable[..., Said], certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "expired.pem"))
    with tls_server(certificates, "expired.pem") as port:
        [(mark, text)] = examine(f"https://localhost:{port}")["certificate"]
    assert mark == "fix" and "expired, or this machine's clock is wrong" in text


def test_a_certificate_for_another_name(
    examine: Callable[..., Said], certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "good.pem"))
    with tls_server(certificates) as port:
        [(mark, text)] = examine(f"https://127.0.0.1:{port}")["certificate"]
    assert mark == "fix" and "for other names than 127.0.0.1" in text


def test_https_to_a_port_without_tls_and_http_to_one_with_it(
    examine: Callable[..., Said], certificates: Path, master: farm.Master
) -> None:
    [(mark, text)] = examine(master.url.replace("http", "https"))["certificate"]
    assert mark == "fix" and f"write {master.url} into master_url" in text
    with tls_server(certificates) as port:
        [(mark, text)] = examine(f"http://127.0.0.1:{port}")["master"]
    assert mark == "fix" and "write https://" in text


# ---- this machine ----


def test_a_state_folder_that_cannot_be_written(
    master: farm.Master, examine: Callable[..., Said], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    [(mark, text)] = examine(master.url, state_folder=str(tmp_path / "file"))["state folder"]
    assert mark == "fix" and "cannot be written" in text and "another state_folder" in text


def test_a_disk_with_less_room_than_the_reports_may_need(master: farm.Master, examine: Callable[..., Said]) -> None:
    [(mark, text)] = examine(master.url, spool_max_bytes=10**12)["disk"]
    free = shutil.disk_usage("/").free
    assert mark == ("fix" if free < 10**12 else "ok") and "free" in text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no such table')", "RuntimeError: no such table"),
        ("from executors.task_executor import TaskExecutor\nclass E(TaskExecutor):\n    required_modules = ('no_such_lib',)\n"
         "    def execute_task(self, task_data): return {}\n", "pip install no_such_lib"),
    ],
    ids=["broken", "library missing"],
)  # fmt: skip
def test_an_executor_that_was_asked_for_and_is_left_off_says_why(
    master: farm.Master, examine: Callable[..., Said], tmp_path: Path, code: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(code)
    said = examine(master.url, executors=[str(tmp_path / "mine.py")])["executors"]
    assert said[0][0] == "ok" and "echo" in said[0][1]
    assert any(mark == "fix" and words in text for mark, text in said)
