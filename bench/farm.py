"""What is measured? The shipped master.py and worker.py, as processes of their own on loopback, in a temporary folder.

Whoever opens a Farm closes it: its processes are ended by their pid, workers first. Every wait has an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_SECONDS = 120.0
STOP_SECONDS = 40.0
BODY_TASKS = 1000
MASTER = {"mode": "master", "host": "127.0.0.1", "port": 0, "api_key": ""}
QUIET = {"log_level": "WARNING", "log_console_level": "ERROR"}


def wait_until(what: str, is_done: Callable[[], Any], pause_seconds: float = 0.05) -> None:
    """Returns when `is_done` is; ends the bench when that takes longer than DEADLINE_SECONDS."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not is_done():
        if time.monotonic() > end:
            raise SystemExit(f"waited {DEADLINE_SECONDS:.0f} s in vain for {what}")
        time.sleep(pause_seconds)


class Program:
    """One process with a config file of its own."""

    def __init__(self, script: str, folder: Path, settings: dict[str, Any]) -> None:
        self._script = script
        name = settings.get("device_id", "master")
        self.config = folder / f"{name}.json"
        self.config.write_text(json.dumps({**settings, **QUIET, "log_file": str(folder / f"{name}.log")}))
        command = [sys.executable, str(ROOT / script), "--config", str(self.config)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("AF_")}
        self.first_line = ""
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.first_line = self.first_line or line

    def check(self) -> None:
        """Ends the bench if this process has ended; it said why on standard error."""
        if self.process.poll() is not None:
            raise SystemExit(f"{self._script} ended with exit code {self.process.returncode}")

    def cpu_seconds(self) -> float:
        return cpu_seconds_of(self.process.pid)

    def resident_bytes(self) -> int:
        """Memory in use now; 0 where there is no /proc."""
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def peak_bytes(self) -> int:
        """The most memory that was ever in use; 0 where there is no /proc."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def open_files(self) -> int:
        """Descriptors in use now, connections among them; 0 where there is no /proc."""
        try:
            return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
        except OSError:
            return 0

    def kill(self) -> None:
        """As a power cut does, without a word."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


class Farm:
    """A master, some workers that are online, and one connection to the API."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, database: Path | None) -> None:
        self._folder, self._stack = folder, stack
        self.workers: list[Program] = []
        self.database = database or folder / "distribution.db"
        self.master = self._start_master(port=0)
        self.url = self.master.first_line.split()[1]
        self._session = stack.enter_context(requests.Session())
        self._session.trust_env = False
        self._session.headers["Content-Type"] = "application/json"

    def _start(self, script: str, settings: dict[str, Any]) -> Program:
        program = Program(script, self._folder, settings)
        self._stack.callback(program.close)
        return program

    def _start_master(self, port: int) -> Program:
        self.master = self._start("master.py", {**MASTER, "port": port, "database": str(self.database)})
        wait_until("the master", self._is_ready)
        return self.master

    def kill_master(self) -> None:
        self.master.kill()

    def start_master_again(self) -> None:
        """On the same port and the same database."""
        self._start_master(port=int(self.url.rpartition(":")[2]))

    def _is_ready(self) -> bool:
        self.master.check()
        return self.master.first_line.startswith("ready ")

    def add_workers(self, count: int, **settings: Any) -> None:
        """Starts shipped workers and waits until all are online."""
        for n in range(count):
            ours = {"mode": "worker", "device_id": f"bench-{n}", "master_url": self.url}
            ours["state_folder"] = str(self._folder / "state")
            self.workers.append(self._start("worker.py", {**ours, **settings}))
        wait_until("the workers", self._are_online)

    def _are_online(self) -> bool:
        for program in self.workers:
            program.check()
        return len(self.get("/devices?status=online")["devices"]) == len(self.workers)

    def stop(self) -> None:
        """In order, workers first; the database is one file then."""
        for program in (*self.workers, self.master):
            program.close()

    def get(self, path: str) -> Any:
        return self._call("GET", path)

    def get_text(self, path: str) -> str:
        reply = self._session.get(f"{self.url}/api/distribution{path}", timeout=60)
        reply.raise_for_status()
        return reply.text

    def post(self, path: str, body: bytes) -> Any:
        return self._call("POST", path, body)

    def put(self, path: str, body: bytes) -> Any:
        return self._call("PUT", path, body)

    def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        reply = self._session.request(method, f"{self.url}/api/distribution{path}", data=body, timeout=60)
        reply.raise_for_status()
        return reply.json()


@contextlib.contextmanager
def open_farm(database: Path | None = None, kind: type[Farm] = Farm) -> Iterator[Farm]:
    """A farm with a master and no worker yet; at the end its processes are stopped and its folder is deleted."""
    with TemporaryDirectory(prefix="bench-") as folder, contextlib.ExitStack() as stack:
        yield kind(Path(folder), stack, database)


def bodies(task: dict[str, Any], total: int) -> list[bytes]:
    """`total` equal tasks as the bodies of POST /tasks, at most BODY_TASKS in each."""
    sizes = [min(BODY_TASKS, total - at) for at in range(0, total, BODY_TASKS)]
    return [json.dumps([task] * size, separators=(",", ":")).encode() for size in sizes]


def cpu_seconds_of(process_id: int) -> float:
    """User and system time of a process so far; NaN where there is no /proc."""
    try:
        words = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(programs: Sequence[Program]) -> float:
    return sum(program.cpu_seconds() for program in programs)
