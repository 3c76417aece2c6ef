"""Real processes for tests: a master on a free port, workers beside it, and a client for the API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
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


class Program:
    """One process of ours, started with a config file of its own; always ended by its owner."""

    def __init__(self, script: str, folder: Path, settings: dict[str, Any], *arguments: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f"{Path(script).stem}-{settings.get('device_id', 'master')}.json"
        config.write_text(json.dumps(settings))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / script), "--config", str(config), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
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
        self.process.wait(10)
        self._reader.join(5)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 45.0) -> int:
        """Asks it to end and waits; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 45.0) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


class Master(Program):
    """A real master; `api` asks it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.api_key = settings.get("api_key", "")
        self.settings = {
            "mode": "master",
            "port": 0,
            "database": str(folder / "distribution.db"),
            "log_file": str(folder / "master.log"),
            **settings,
        }
        super().__init__("master.py", folder, self.settings)
        ready = wait_for(f"the master's ready line; it said: {self.output}", self._ready_line, 30)
        self.url = ready.split()[1]
        self.session = requests.Session()
        self.session.trust_env = False

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
        options = {"timeout": 40, **options}
        if body is not None:
            options["json"] = body
        headers.update(options.pop("headers", {}))
        return self.session.request(method, f"{self.url}/api/distribution{path}", headers=headers, **options)

    def get(self, path: str) -> Any:
        response = self.api("GET", path)
        assert response.status_code == 200, response.text
        return response.json()

    def submit(self, *tasks: dict[str, Any]) -> list[int]:
        response = self.api("POST", "/tasks", list(tasks))
        assert response.status_code in (200, 201), response.text
        return [task["id"] for task in response.json()["tasks"]]

    def register(self, device_id: str, boot_id: str = "boot-1", **facts: Any) -> Any:
        body = {"device_id": device_id, "boot_id": boot_id, "protocol": 1, "task_types": ["echo"], **facts}
        return self.api("POST", "/devices/register", body)

    def states(self, batch: str | None = None) -> dict[str, int]:
        stats = self.get(f"/tasks/stats?batch={batch}" if batch else "/tasks/stats")
        return {state: n for state, n in stats["by_state"].items() if n}


class Worker(Program):
    """A real worker of that master."""

    def __init__(self, master_url: str, folder: Path, device_id: str = "shop-1", **settings: Any) -> None:
        self.device_id = device_id
        super().__init__(
            "worker.py",
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
