"""Real processes for tests: a master on a free port, workers beside it, and a client for the API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_SECONDS = 60.0


def wait_for(what: str, check: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true answer of `check`; fails with `what` when there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what}")


def reserved_port() -> socket.socket:
    """A free port that nobody else gets while this socket is there; whoever asks for it by its number may listen on it.

    Without it another test's server could get the port of one that is away for a moment."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", 0))
    return place


def environment() -> dict[str, str]:
    """This process's, without a setting that would reach the program under test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AF_")}


class Program:
    """One process of ours, started with a config file of its own; always ended by its owner."""

    def __init__(self, script: str, folder: Path, settings: dict[str, Any], *arguments: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self._config = folder / f"{Path(script).stem}-{settings.get('device_id', 'master')}.json"
        self._command = [sys.executable, str(ROOT / script), "--config", str(self._config), *arguments]
        self.start()

    def start(self) -> None:
        """Starts it, with the settings as they are now; again, after it ended."""
        self._config.write_text(json.dumps(self.settings))
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.process.kill()
        self.process.wait(DEADLINE_SECONDS)
        self._reader.join(5)

    def stop(self, number: int = signal.SIGTERM, seconds: float = DEADLINE_SECONDS) -> int:
        """Asks it to end and waits; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


class Master(Program):
    """A real master; `api` asks it."""

    def __init__(self, folder: Path, script: str = "master.py", **settings: Any) -> None:
        self.api_key = settings.get("api_key", "")
        self.url = ""
        self.session = requests.Session()
        self.session.trust_env = False
        self._place = reserved_port()
        ours = {
            "mode": "master",
            "port": self._place.getsockname()[1],
            "database": str(folder / "distribution.db"),
            "log_file": str(folder / "master.log"),
        }
        super().__init__(script, folder, {**ours, **settings})

    def start(self) -> None:
        """Starts it and waits until it is ready; on the same port as before."""
        super().start()
        try:
            self.url = wait_for("the master's ready line", self._ready_line).split()[1]
        except AssertionError:
            self.kill()
            raise

    def _ready_line(self) -> str | None:
        if self.process.poll() is not None:
            self._reader.join(5)
            raise AssertionError(f"the master ended with {self.process.returncode}: {self.output}")
        return next((line for line in self.lines if line.startswith("ready ")), None)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def api(self, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
        """One request below /api/distribution."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        options = {"timeout": DEADLINE_SECONDS, **options}
        if body is not None:
            options["json"] = body
        headers.update(options.pop("headers", {}))
        return self.session.request(method, f"{self.url}/api/distribution{path}", headers=headers, **options)

    def get(self, path: str) -> Any:
        response = self.api("GET", path)
        assert response.status_code == 200, response.text
        return response.json()

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """The JSON of an accepted request; a refusal fails the test with what it said."""
        response = self.api(method, path, body, **options)
        assert response.status_code < 300, f"{method} {path} -> {response.status_code} {response.text}"
        return response.json() if response.content else None

    def submit(self, *tasks: dict[str, Any]) -> list[int]:
        return [task["id"] for task in self.call("POST", "/tasks", list(tasks))["tasks"]]

    def submit_one(self, task_type: str = "echo", **fields: Any) -> int:
        task_id: int = self.call("POST", "/tasks", {"task_type": task_type, **fields})["id"]
        return task_id

    def register(self, device_id: str, boot_id: str = "boot-1", **facts: Any) -> Any:
        """A device without a process: the test sends what its worker would send."""
        body = {"device_id": device_id, "boot_id": boot_id, "protocol": 1, "task_types": ["echo"], **facts}
        return self.call("POST", "/devices/register", {"max_concurrent_tasks": 4, **body})

    def beat(self, device_id: str, boot_id: str = "boot-1", **facts: Any) -> Any:
        beat = {"boot_id": boot_id, "seq": 1, "holding": [], **facts}
        return self.call("POST", f"/devices/{device_id}/heartbeat", beat)

    def pull(self, device_id: str, limit: int = 1, boot_id: str = "boot-1") -> list[dict[str, Any]]:
        """Exactly that many tasks, which must be there."""
        query = {"device_id": device_id, "boot_id": boot_id, "limit": limit, "wait": 5}
        tasks: list[dict[str, Any]] = self.call("GET", "/tasks/pull", params=query)["tasks"]
        assert len(tasks) == limit, f"pulled {len(tasks)} of {limit}"
        return tasks

    def report(self, device_id: str, task: dict[str, Any], outcome: str, **facts: Any) -> Any:
        """The answer to one report, whatever it is."""
        entry = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "outcome": outcome, **facts}
        return self.call("POST", "/tasks/report", {"device_id": device_id, "reports": [entry]})["reports"][0]

    def states(self, batch: str | None = None) -> dict[str, int]:
        stats = self.get(f"/tasks/stats?batch={batch}" if batch else "/tasks/stats")
        return {state: n for state, n in stats["by_state"].items() if n}


class Worker(Program):
    """A real worker of that master."""

    def __init__(
        self, master_url: str, folder: Path, device_id: str = "shop-1", script: str = "worker.py", **settings: Any
    ) -> None:
        self.device_id = device_id
        super().__init__(
            script,
            folder,
            {
                "mode": "worker",
                "device_id": device_id,
                "master_url": master_url,
                "state_folder": str(folder / "state"),
                "log_file": str(folder / f"{device_id}.log"),
                "reconnect_seconds": 0.5,
                **settings,
            },
        )


@contextlib.contextmanager
def farm() -> Iterator[list[Program]]:
    """A list to put programs into; whatever is in it at the end is killed."""
    programs: list[Program] = []
    try:
        yield programs
    finally:
        for program in reversed(programs):
            program.kill()
