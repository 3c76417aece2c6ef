"""Is the master who it says it is, and does a key only go where nobody reads along?

TLS by the master itself, with certificates made here by openssl; and http://, which keys may take inside of private
networks only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from fake_master import FakeMaster
from farm import ROOT, Master, Program, Worker, environment, farm, wait_for

import server
from client import CommandFailed
from client import Master as Client
from executors.device import doctor, trust
from executors.device.link import Link, MasterClient, Unreachable
from settings import ExitCode, Settings, SettingsError, is_private, load

KEY = "a-key-of-a-test-that-nobody-else-knows"
NAME = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
PATIENCE = 60.0


def openssl(folder: Path, *command: str) -> None:
    subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good.pem and other.pem with their keys, for localhost and no address; and keys that are of no use."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine to make certificates with: TLS is untested here")
    folder = tmp_path_factory.mktemp("tls")
    new = ("req", "-x509", "-nodes", "-days", "30", *NAME)
    for name in ("good", "other"):
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        openssl(folder, *new, *curve, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl(folder, *new, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1", "-keyout", "p521.key",
            "-out", "p521.pem")  # fmt: skip
    openssl(folder, "pkey", "-in", "good.key", "-aes256", "-passout", "pass:secret", "-out", "encrypted.key")
    openssl(
        folder, "pkcs12", "-export", "-in", "good.pem", "-inkey", "good.key", "-passout", "pass:", "-out", "good.p12"
    )
    return folder


class TlsMaster(Master):
    def __init__(self, folder: Path, certificates: Path, **settings: Any) -> None:
        self.ca_file = str(certificates / "good.pem")
        ours = {"ssl_certificate": self.ca_file, "ssl_keyfile": str(certificates / "good.key"), "api_key": KEY}
        super().__init__(folder, **{**ours, **settings})

    def start(self) -> None:
        self.session.verify = self.ca_file
        super().start()
        self.ready_line, self.url = self.url, self.url.replace("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[TlsMaster]:
    with farm() as started:
        master = TlsMaster(tmp_path_factory.mktemp("secure"), certificates)
        started.append(master)
        yield master


# ---- the master


def test_a_master_with_a_certificate_says_https_and_answers_to_who_trusts_it(secure: TlsMaster) -> None:
    assert secure.ready_line == f"https://127.0.0.1:{secure.port}"
    reply = secure.api("GET", "/devices")
    assert reply.status_code == 200 and "max-age=" in reply.headers["Strict-Transport-Security"]
    entered = secure.api("POST", "/login", {"key": KEY}, headers={"Authorization": ""})
    assert "Secure" in entered.headers["Set-Cookie"]
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{secure.url}/healthz", timeout=PATIENCE)


def test_without_tls_it_says_nothing_at_all(secure: TlsMaster) -> None:
    with socket.create_connection(("127.0.0.1", secure.port), PATIENCE) as plain:
        plain.sendall(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(4096)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda one: one.name)
def test_tls_1_2_and_1_3_are_spoken(secure: TlsMaster, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=secure.ca_file)
    context.minimum_version = context.maximum_version = version
    client = http.client.HTTPSConnection("localhost", secure.port, timeout=PATIENCE, context=context)
    client.request("GET", "/healthz")
    assert client.getresponse().status == 200
    client.close()


def test_handshakes_that_never_end_take_no_thread(secure: TlsMaster) -> None:
    status = Path(f"/proc/{secure.process.pid}/status")

    def threads() -> int:
        return int(status.read_text().partition("Threads:")[2].split()[0])

    before = threads()
    with contextlib.ExitStack() as stack:
        for number in range(300):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", secure.port), PATIENCE))
            if number % 2:
                client.sendall(bytes.fromhex("160301020001"))
        assert {secure.api("GET", "/devices").status_code for _ in range(20)} == {200}
        assert threads() < before + 50


def test_polls_are_held_and_answered_at_a_stop_over_tls_too(
    programs: list[Program], tmp_path: Path, certificates: Path
) -> None:
    master = TlsMaster(tmp_path, certificates)
    programs.append(master)
    master.register("shop-1")
    answers: list[Any] = []
    query = {"device_id": "shop-1", "boot_id": "boot-1", "limit": 1, "wait": 25}
    polling = threading.Thread(target=lambda: answers.append(master.call("GET", "/tasks/pull", params=query)))
    polling.start()
    held = f"{master.url}/metrics"
    auth = {"Authorization": f"Bearer {KEY}"}
    wait_for(
        "the held poll",
        lambda: "af_held_polls 1.0" in requests.get(held, headers=auth, verify=master.ca_file, timeout=PATIENCE).text,
    )
    assert master.stop(signal.SIGTERM) == 0
    polling.join(PATIENCE)
    assert answers and answers[0]["tasks"] == []


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("good.pem", "other.key", "do not go together"),
        ("good.pem", "encrypted.key", "openssl pkey -in"),
        ("p521.pem", "p521.key", "make one of RSA, P-256, P-384, Ed25519"),
        ("good.p12", "good.key", "write PEM files"),
        ("good.pem", "good.pem", "write PEM files"),
        ("good.key", "good.pem", "ssl_certificate and ssl_keyfile are swapped"),
        ("nothing.pem", "good.key", "cannot be read"),
        ("good.pem", "nothing.key", "cannot be read"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_one_sentence_before_anything_starts(
    certificates: Path, certificate: str, key: str, words: str
) -> None:
    files = (certificates / certificate, certificates / key)
    with pytest.raises(server.CertificateUnusable, match=words) as caught:
        server.Server(host="127.0.0.1", port=0, threads=4, certificate=files)
    assert "\n" not in str(caught.value) and str(certificates) in str(caught.value)


def test_every_kind_of_key_that_is_promised_is_taken(certificates: Path, tmp_path: Path) -> None:
    kinds = {
        "rsa": ("rsa:2048",),
        "p384": ("ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"),
        "ed25519": ("ed25519",),
    }
    for name, kind in kinds.items():
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        openssl(tmp_path, "req", "-x509", "-nodes", "-days", "30", *NAME, "-newkey", *kind, *files)
        server.check_certificate(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
    openssl(tmp_path, "rsa", "-in", "rsa.key", "-traditional", "-out", "pkcs1.key")
    server.check_certificate(tmp_path / "rsa.pem", tmp_path / "pkcs1.key")
    openssl(tmp_path, "ec", "-in", str(certificates / "good.key"), "-out", "sec1.key")
    server.check_certificate(certificates / "good.pem", tmp_path / "sec1.key")


def test_a_master_with_a_bad_certificate_ends_with_the_code_for_settings(tmp_path: Path, certificates: Path) -> None:
    master = tmp_path / "master.json"
    values = f'"ssl_certificate": "{certificates}/good.pem", "ssl_keyfile": "{certificates}/other.key"'
    master.write_text(f'{{"mode": "master", "port": 0, "database": "{tmp_path}/x.db", {values}}}')
    command = [sys.executable, str(ROOT / "master.py"), "--config", str(master), "--log-file", str(tmp_path / "log")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), check=False)
    assert ended.returncode == ExitCode.SETTINGS and "do not go together" in ended.stderr
    assert "Traceback" not in ended.stderr and ended.stdout == ""


@pytest.mark.parametrize("name", ["ssl_certificate", "ssl_keyfile"])
def test_a_certificate_without_its_key_is_no_plain_http_by_mistake(name: str) -> None:
    with pytest.raises(SettingsError, match="TLS needs a certificate and its key"):
        load("master", flags={name: "/tmp/x.pem"}, environ={})


# ---- who asks it


def test_a_worker_does_its_tasks_over_tls_with_the_ca_file(
    secure: TlsMaster, programs: list[Program], tmp_path: Path
) -> None:
    programs.append(Worker(secure.url, tmp_path, "tls-1", api_key=KEY, ca_file=secure.ca_file))
    task = secure.submit_one("echo", task_data={"say": "hello"}, batch="tls")
    wait_for("the task", lambda: secure.get(f"/tasks/{task}")["status"] == "completed")


def test_a_worker_sends_its_key_to_no_master_that_it_does_not_trust(secure: TlsMaster, certificates: Path) -> None:
    for ca_file in ("", str(certificates / "other.pem")):
        client = MasterClient(Link(secure.url), Settings(master_url=secure.url, api_key=KEY, ca_file=ca_file))
        with pytest.raises(Unreachable, match=r"not trusted here .self-signed"):
            client.get("/devices", {}, PATIENCE)
    by_address = secure.url.replace("localhost", "127.0.0.1")  # which the certificate does not name
    client = MasterClient(Link(by_address), Settings(master_url=by_address, api_key=KEY, ca_file=secure.ca_file))
    with pytest.raises(Unreachable, match=r"not trusted here .IP address mismatch"):
        client.get("/devices", {}, PATIENCE)


def test_http_to_a_port_that_wants_tls_is_said_so(secure: TlsMaster) -> None:
    plain = secure.url.replace("https", "http")
    with pytest.raises(Unreachable, match="wants TLS; write https://"):
        MasterClient(Link(plain), Settings(master_url=plain, api_key=KEY)).get("/devices", {}, PATIENCE)
    with pytest.raises(CommandFailed, match="wants TLS; write https://"):
        Client(plain, KEY, attempts=1).get("/devices")


def test_a_device_whose_ca_file_is_of_no_use_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for name, why in (("nothing.pem", "No such file"), ("empty.pem", "holds no certificate")):
        flags = {"device_id": "shop-1", "ca_file": str(tmp_path / name)}
        with pytest.raises(SettingsError, match=f"cannot be used .*{why}"):
            load("worker", flags=flags, environ={})
        assert load("worker", flags=flags, environ={}, starting=False).ca_file, "the doctor says it in its own words"


def test_commands_on_the_masters_machine_know_its_certificate_by_its_file(secure: TlsMaster) -> None:
    ended = status_of(secure._config)
    assert ended.returncode == 0 and f"https://127.0.0.1:{secure.port}" in ended.stdout, ended.stderr


def test_a_server_with_another_certificate_gets_no_key_from_them(
    secure: TlsMaster, tmp_path: Path, certificates: Path
) -> None:
    config = tmp_path / "master.json"
    files = f'"ssl_certificate": "{certificates}/other.pem", "ssl_keyfile": "{certificates}/other.key"'
    config.write_text(f'{{"mode": "master", "port": {secure.port}, "api_key": "{KEY}", {files}}}')
    ended = status_of(config)
    assert ended.returncode == ExitCode.UNREACHABLE and "is not the one in ssl_certificate" in ended.stderr


def test_nor_does_one_at_the_end_of_a_proxys_tunnel(
    secure: TlsMaster, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that only the proxy knows; the tunnel ends at the master, which must have the pinned certificate."""
    with Tunnels(secure.port) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        host = "master.example.org"
        url = f"https://{host}:8000"
        for name in ("other", "good"):
            pinned = Settings(mode="master", host=host, api_key=KEY, ssl_certificate=str(certificates / f"{name}.pem"))
            commands = Client(url, KEY, trust=pinned, attempts=1)
            device = MasterClient(Link(url), dataclasses.replace(pinned, master_url=url))
            if name == "good":
                assert commands.get("/strategy") == device.get("/strategy", {}, PATIENCE)
            else:
                with pytest.raises(CommandFailed, match="is not the one in ssl_certificate"):
                    commands.get("/devices")
                with pytest.raises(Unreachable):
                    device.get("/devices", {}, PATIENCE)
        assert proxy.asked == [f"CONNECT {host}:8000".encode()] * 4


class Tunnels:
    """A proxy that leads everybody to one port of this machine."""

    def __init__(self, leads_to: int) -> None:
        self._leads_to = leads_to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.asked: list[bytes] = []

    def __enter__(self) -> Tunnels:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._lead, args=(self._listener.accept()[0],), daemon=True).start()

    def _lead(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._leads_to), PATIENCE) as server_side:
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536)
            self.asked.append(head.partition(b" HTTP/")[0])
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_copy, args=(server_side, client), daemon=True)
            back.start()
            _copy(client, server_side)
            back.join(PATIENCE)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def status_of(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "main.py"), "distribute", "--status", "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment(), check=False)


@pytest.mark.slow
def test_standalone_with_a_certificate_works_as_without(
    programs: list[Program], tmp_path: Path, certificates: Path
) -> None:
    paths = {"database": "x.db", "state_folder": "state", "log_file": "log"}
    settings = {
        "mode": "standalone",
        "port": 0,
        "api_key": KEY,
        "ssl_certificate": str(certificates / "good.pem"),
        "ssl_keyfile": str(certificates / "good.key"),
        **{name: str(tmp_path / path) for name, path in paths.items()},
    }
    program = Program("standalone.py", tmp_path, settings)
    programs.append(program)
    line = wait_for(
        "the dashboard", lambda: next((line for line in program.lines if line.startswith("dashboard: ")), None)
    )
    client = Client(line.split()[1], KEY, trust=Settings(**{**settings, "mode": "master"}))
    wait_for("its worker", lambda: client.get("/devices")["devices"])
    assert program.stop() == 0


# ---- http://


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("127.0.0.1", True), ("10.1.2.3", True), ("172.16.0.1", True), ("172.31.255.255", True), ("192.168.1.10", True),
        ("169.254.1.1", True), ("::1", True), ("fd00::1", True), ("fe80::1%eth0", True), ("::ffff:192.168.1.1", True),
        ("172.32.0.1", False), ("100.64.0.1", False), ("8.8.8.8", False), ("2001:db8::1", False), ("0.0.0.0", False),
        ("::ffff:8.8.8.8", False), ("64:ff9b::c0a8:101", False), ("localhost", False), ("", False),
    ],
)  # fmt: skip
def test_a_private_address_is_one_that_no_router_of_the_internet_passes_on(address: str, private: bool) -> None:
    assert is_private(address) is private


def test_a_worker_does_not_start_with_http_to_a_public_address() -> None:
    flags = {"device_id": "shop-1", "master_url": "http://203.0.113.5:8000"}
    with pytest.raises(SettingsError, match="insecure_http"):
        load("worker", flags=flags, environ={})
    assert load("worker", flags={**flags, "insecure_http": "true"}, environ={}).insecure_http
    for fine in ("https://203.0.113.5:8000", "http://192.168.1.10:8000", "http://[fd00::5]:8000", "http://example.org"):
        load("worker", flags={**flags, "master_url": fine}, environ={})


@pytest.fixture
def abroad(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 stands for an address far away."""
    monkeypatch.setattr(trust, "is_private", lambda address: False)
    monkeypatch.setattr(trust, "_warned_of", set())


class Listener:
    """Something that listens where a name leads, and keeps what it hears."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def heard(self) -> bytes:
        connection, _ = self.socket.accept()
        with connection:
            connection.settimeout(PATIENCE)
            return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    found.socket.settimeout(PATIENCE)
    yield found
    found.socket.close()


@pytest.mark.usefixtures("abroad")
def test_a_name_that_leads_to_a_public_address_is_told_no_key(listener: Listener) -> None:
    url = f"http://localhost:{listener.port}"
    client = MasterClient(Link(url), Settings(master_url=url, api_key=KEY))
    with pytest.raises(Unreachable, match="insecure_http"):
        client.post("/tasks/report", {"reports": []}, PATIENCE)
    assert listener.heard() == b""
    with pytest.raises(CommandFailed, match="insecure_http") as caught:
        Client(url, KEY).get("/system/overview")
    assert caught.value.exit_code == ExitCode.SETTINGS and listener.heard() == b""


@pytest.mark.usefixtures("abroad")
def test_insecure_http_is_obeyed_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with FakeMaster() as master:
        allowed = Settings(master_url=master.url, api_key=KEY, insecure_http=True)
        clients = [MasterClient(Link(master.url), allowed) for _ in range(3)]
        for client in clients:
            client.post("/devices/register", {"device_id": "x", "boot_id": "b", "holding": []}, PATIENCE)
    assert caplog.text.count("without TLS") == 1


def test_the_doctor_says_so_too(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(mode="worker", master_url=f"http://127.0.0.1:{listener.port}", api_key=KEY)
    assert doctor.Way(settings).connection().mark == doctor.OK
    monkeypatch.setattr(doctor, "is_private", lambda address: False)
    found = doctor.Way(settings).connection()
    assert found.mark == doctor.FIX and "insecure_http" in found.text
    assert doctor.Way(dataclasses.replace(settings, insecure_http=True)).connection().mark == doctor.NOTE


def test_the_doctor_looks_at_the_certificate_with_the_ca_file(secure: TlsMaster) -> None:
    settings = Settings(mode="worker", master_url=secure.url, api_key=KEY, ca_file=secure.ca_file)
    assert doctor.Way(settings).certificate().mark == doctor.OK
    found = doctor.Way(dataclasses.replace(settings, ca_file="")).certificate()
    assert found.mark == doctor.FIX and "ca_file" in found.text


def test_a_proxy_is_no_way_around_it(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy's own address is private, and what lies behind it is not known."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    url = "http://master.example.org:8000"
    with pytest.raises(Unreachable, match="insecure_http"):
        MasterClient(Link(url), Settings(master_url=url, api_key=KEY)).get("/devices", {}, PATIENCE)
    with pytest.raises(CommandFailed, match="insecure_http"):
        Client(url, KEY).get("/devices")
    listener.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.socket.accept()


def test_commands_do_not_follow_a_redirect_and_neither_does_a_device(listener: Listener) -> None:
    """A redirect would take the key along, or a result."""
    elsewhere = f"http://127.0.0.1:{listener.port}/api/distribution/devices"
    with socket.create_server(("127.0.0.1", 0)) as redirecting:
        url = f"http://127.0.0.1:{redirecting.getsockname()[1]}"

        def answer() -> None:
            for _ in range(2):
                connection, _ = redirecting.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(f"HTTP/1.1 307 x\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n".encode())

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        with pytest.raises(Unreachable, match="a redirect to"):
            MasterClient(Link(url), Settings(master_url=url, api_key=KEY)).get("/devices", {}, PATIENCE)
        with pytest.raises(CommandFailed, match="no master"):
            Client(url, KEY).get("/devices")
        answering.join(PATIENCE)
    listener.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.socket.accept()
    assert urlsplit(elsewhere).port == listener.port
