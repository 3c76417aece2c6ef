"""How fast is it on this machine? End to end, bulk submit, idle latency: medians of several runs, with their spread.

`make bench`, or `python bench/run.py --runs 3`. The master and the two workers are the shipped programs, as processes
of their own on loopback, with the spool on, synchronous=FULL and full history. Everything lies in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_SECONDS = 120.0


class Farm:
    """A master and some workers in a folder; `close` ends them."""

    def __init__(self, folder: Path, workers: int, slots: int) -> None:
        self.folder = folder
        self.processes = [self._start("master.py", {"mode": "master", "port": 0, "database": str(folder / "b.db")})]
        output = self.processes[0].stdout
        assert output is not None
        self.url = output.readline().split()[1] + "/api/distribution"
        self.session = requests.Session()
        for n in range(workers):
            settings = {
                "mode": "worker", "device_id": f"bench-{n}", "master_url": self.url[: -len("/api/distribution")],
                "state_folder": str(folder / "state"), "concurrent_tasks": slots,
            }  # fmt: skip
            self.processes.append(self._start("worker.py", settings))

    def _start(self, script: str, settings: dict[str, Any]) -> subprocess.Popen[str]:
        name = f"{Path(script).stem}-{settings.get('device_id', 'master')}"
        config = self.folder / f"{name}.json"
        quiet = {"log_file": str(self.folder / f"{name}.log"), "log_level": "WARNING", "log_console_level": "ERROR"}
        config.write_text(json.dumps({**settings, **quiet}))
        command = [sys.executable, str(ROOT / script), "--config", str(config)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("AF_")}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def get(self, path: str) -> Any:
        return self.session.get(self.url + path, timeout=30).json()

    def submit(self, tasks: list[dict[str, Any]]) -> None:
        self.session.post(self.url + "/tasks", json=tasks, timeout=60).raise_for_status()

    def wait_for_devices(self, count: int) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while len(self.get("/devices?status=online")["devices"]) < count:
            if time.monotonic() > end:
                raise SystemExit("the workers did not come up in time")
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """User and system time of all processes so far (Linux)."""
        ticks = 0
        for process in self.processes:
            words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def bulk_submit(total: int) -> float:
    """Tasks per second over HTTP in bodies of 1,000, with no device to take them."""
    with tempfile.TemporaryDirectory() as folder:
        farm = Farm(Path(folder), workers=0, slots=1)
        try:
            body = [{"task_type": "echo", "task_data": {"n": n}} for n in range(1000)]
            started = time.perf_counter()
            for _ in range(total // 1000):
                farm.submit(body)
            return total / (time.perf_counter() - started)
        finally:
            farm.close()


def end_to_end(total: int, slots: int) -> tuple[float, float]:
    """(tasks/s, CPU seconds per 1,000 tasks) of no-op tasks from the first submit to the last completion."""
    with tempfile.TemporaryDirectory() as folder:
        farm = Farm(Path(folder), workers=2, slots=slots)
        try:
            farm.wait_for_devices(2)
            cpu, started = farm.cpu_seconds(), time.perf_counter()
            for _ in range(total // 1000):
                farm.submit([{"task_type": "echo"}] * 1000)
            while farm.get("/tasks/stats?task_type=echo")["by_state"]["completed"] < total:
                if time.perf_counter() - started > DEADLINE_SECONDS:
                    raise SystemExit("the tasks were not done in time")
                time.sleep(0.02)
            seconds = time.perf_counter() - started
            return total / seconds, (farm.cpu_seconds() - cpu) / total * 1000
        finally:
            farm.close()


def idle_latency(count: int) -> list[float]:
    """Milliseconds from a submit's request to the task's arrival at a device with an open pull, one at a time."""
    with tempfile.TemporaryDirectory() as folder:
        farm = Farm(Path(folder), workers=0, slots=1)
        try:
            device = {"device_id": "d", "boot_id": "b", "protocol": 1, "task_types": ["echo"]}
            farm.session.post(f"{farm.url}/devices/register", json=device, timeout=10).raise_for_status()
            return [_one_latency(farm) for _ in range(count)]
        finally:
            farm.close()


def _one_latency(farm: Farm) -> float:
    arrived: list[float] = []

    def pull() -> None:
        found = requests.get(f"{farm.url}/tasks/pull?device_id=d&boot_id=b&limit=1&wait=20", timeout=30).json()["tasks"]
        arrived.append(time.perf_counter())
        held = {key: found[0][key] for key in ("assignment_id", "lease_id")}
        body = {"device_id": "d", "reports": [{**held, "outcome": "completed"}]}
        requests.post(f"{farm.url}/tasks/report", json=body, timeout=10).raise_for_status()

    puller = threading.Thread(target=pull)
    puller.start()
    time.sleep(0.03)
    started = time.perf_counter()
    farm.submit([{"task_type": "echo"}])
    puller.join(30)
    return (arrived[0] - started) * 1000


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    names = ("granian", "bottle", "peewee", "msgspec", "requests")
    libraries = ", ".join(f"{name} {version(name)}" for name in names)
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, load {load:.2f} before the run;"
        f" Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {libraries}"
    )


def row(what: str, runs: list[float], unit: str) -> str:
    raw = " ".join(f"{run:,.2f}" if run < 100 else f"{run:,.0f}" for run in runs)
    return f"| {what} | {statistics.median(runs):,.2f} {unit} | {min(runs):,.2f} to {max(runs):,.2f} | {raw} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each figure")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks of a run, a multiple of 1,000")
    parser.add_argument("--slots", type=int, default=100, help="concurrent_tasks of each worker, end to end")
    options = parser.parse_args()
    print(machine())
    print("\n| what | median | spread | raw runs |\n|---|---|---|---|")
    ends = [end_to_end(options.tasks, options.slots) for _ in range(options.runs)]
    print(row(f"end to end, 2 workers of {options.slots} slots", [end[0] for end in ends], "tasks/s"))
    print(row("CPU of master and workers", [end[1] for end in ends], "s per 1,000 tasks"))
    bulks = [bulk_submit(options.tasks) for _ in range(options.runs)]
    print(row("bulk submit, bodies of 1,000", bulks, "tasks/s"))
    latencies = [sorted(idle_latency(100)) for _ in range(options.runs)]
    print(row("idle latency, submit to device, p50", [run[49] for run in latencies], "ms"))
    print(row("idle latency, submit to device, p99", [run[98] for run in latencies], "ms"))


if __name__ == "__main__":
    main()
