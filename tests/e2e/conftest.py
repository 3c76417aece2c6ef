"""A real master as its own process, and the machine's Chromium to look at it. Only loopback."""

from __future__ import annotations

import http.client
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PREFIX = "/api/distribution"
PATIENCE = 20.0  # seconds until something that should take less than one is called broken
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class MasterProcess:
    """`python master.py` on a free port, its database in `folder`; and what a test needs of the API."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.key: str = settings.get("api_key", "")
        self._config = folder / "master.json"
        self._settings = {
            "mode": "master", "host": "127.0.0.1", "port": 0, "dispatch_interval": 1,
            "database": str(folder / "distribution.db"), "log_file": str(folder / "distribution.log"), **settings,
        }  # fmt: skip
        self.url = ""
        self.start()

    def start(self) -> None:
        """Starts it; again on the same port if it ran before."""
        if self.url:
            self._settings["port"] = urlsplit(self.url).port
        self._config.write_text(json.dumps(self._settings), "utf-8")
        command = [sys.executable, str(ROOT / "master.py"), "--config", str(self._config)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        line = lines.get(timeout=PATIENCE)
        assert line.startswith("ready http"), f"the master did not start: {line!r}"
        self.url = line.split()[1]

    def _read(self, lines: queue.Queue[str]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.put(line)
        lines.put("")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer; a refusal fails the test with what it said."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, PREFIX + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        assert response.status < 300, f"{method} {path} -> {response.status} {text}"
        return json.loads(text) if text else None

    def submit(self, task_type: str = "echo", **fields: Any) -> int:
        task_id: int = self.call("POST", "/tasks", {"task_type": task_type, **fields})["id"]
        return task_id

    def register(self, device_id: str, **facts: Any) -> None:
        """A device with a heartbeat, as a worker of its own would send them."""
        new = {"device_id": device_id, "boot_id": f"boot-{device_id}", "protocol": 1, "task_types": ["echo"], **facts}
        self.call("POST", "/devices/register", {"max_concurrent_tasks": 4, **new})

    def beat(self, device_id: str, **facts: Any) -> None:
        beat = {"boot_id": f"boot-{device_id}", "seq": 1, "holding": [], **facts}
        self.call("POST", f"/devices/{device_id}/heartbeat", beat)

    def pull(self, device_id: str, limit: int = 1) -> list[dict[str, Any]]:
        query = f"device_id={device_id}&boot_id=boot-{device_id}&limit={limit}&wait=5"
        tasks: list[dict[str, Any]] = self.call("GET", f"/tasks/pull?{query}")["tasks"]
        assert len(tasks) == limit, f"pulled {len(tasks)} of {limit}"
        return tasks

    def report(self, device_id: str, task: dict[str, Any], outcome: str, **facts: Any) -> None:
        entry = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "outcome": outcome, **facts}
        body = {"device_id": device_id, "boot_id": f"boot-{device_id}", "reports": [entry]}
        answer = self.call("POST", "/tasks/report", body)["reports"][0]
        assert answer["outcome"] == "accepted", answer


@pytest.fixture(scope="session")
def launch_master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., MasterProcess]]:
    """Starts a master that lives until the end of the tests."""
    started: list[MasterProcess] = []

    def launch(**settings: Any) -> MasterProcess:
        started.append(MasterProcess(tmp_path_factory.mktemp("master"), **settings))
        return started[-1]

    yield launch
    for master in started:
        master.stop()


@pytest.fixture
def start_master(tmp_path: Path) -> Iterator[Callable[..., MasterProcess]]:
    """Starts a master that lives as long as the test."""
    started: list[MasterProcess] = []

    def start(**settings: Any) -> MasterProcess:
        started.append(MasterProcess(tmp_path, **settings))
        return started[-1]

    yield start
    for master in started:
        master.stop()


@pytest.fixture
def master(start_master: Callable[..., MasterProcess]) -> MasterProcess:
    return start_master()


@pytest.fixture
def dashboard_url(master: MasterProcess) -> str:
    return master.url + "/"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium); the dashboard stays untested here")
    playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Tab:
    """One page in a browser of its own, and all that it complained about or asked of others."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(PATIENCE * 1000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.forgiven: tuple[str, ...] = ()
        self.asked: set[str] = set()
        self.page.on("console", lambda message: message.type in ("error", "warning") and self._complain(message.text))
        self.page.on("pageerror", lambda error: self._complain(str(error)))
        self.page.on("request", lambda request: self.asked.add(urlsplit(request.url).netloc))

    def _complain(self, text: str) -> None:
        self.complaints.append(text)

    def close(self) -> None:
        """Fails if the page complained, or asked anybody but its own master for anything."""
        own = urlsplit(self.page.url).netloc
        self.context.close()
        unforgiven = [text for text in self.complaints if not any(part in text for part in self.forgiven)]
        assert unforgiven == [], "the console is not clean"
        assert self.asked == {own}, "the page asked somebody else"


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def open_one(url: str, *, forgive: tuple[str, ...] = (), **options: Any) -> Tab:
        tab = Tab(chromium, **options)
        tab.forgiven = forgive
        tabs.append(tab)
        tab.page.goto(url)
        return tab

    yield open_one
    for tab in tabs:
        tab.close()
