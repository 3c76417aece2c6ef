"""What does a fleet do with AppsFlyer's quotas? Shown without an account: make demo-appsflyer

It starts a stand-in for AppsFlyer (tests/fake_appsflyer.py), a master and two workers on this machine, submits one
app_sync task, and watches: 12 apps are listed, and 30 days of three reports are pulled of each. On the way the stand-in
refuses what is over its quotas, cuts a connection, answers 500, and truncates what has too many rows. At the end every
row of every file is compared with the rows that the stand-in made: exit code 0 if each app-day arrived exactly once.

One thing is not as in life: the stand-in's quota day lasts 5 s instead of 24 h, and it says in Retry-After how long to
wait, which the executors obey. The master has limits for what AppsFlyer counts, so that what refuses one device is not
asked by the other. Everything goes through the public API.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from client import CommandFailed, Master  # noqa: E402

TOKEN = "fake.t0ken-of-nobody.V2"
REPORTS = ("installs_report", "in_app_events_report", "partners_by_date_report")
DAYS = 30
DAY_SECONDS = 5
ROW_CAP = 500
READY_SECONDS = 60.0
GIVE_UP_SECONDS = 300.0
# So that a refusal is told to the whole fleet, and one of a report's tasks meets it, not each in turn.
LIMITS = (
    {"name": "account", "task_type": "data_sync", "key": ["username", "task_data.report"]},
    {"name": "report", "task_type": "data_sync", "key": ["username", "app_id", "task_data.report"], "max_running": 1},
)
OPEN_STATES = ("scheduled", "pending", "assigned", "running")


class Program:
    """One of the programs; it ends when its standard input does, so it cannot outlive this one."""

    def __init__(self, name: str, *arguments: str):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / name), *arguments, "--stop-with-stdin"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.url = ""
        self._is_ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready "):
                self.url = line.split()[1]
                self._is_ready.set()
        self._is_ready.set()

    def wait_until_ready(self) -> str:
        self._is_ready.wait(READY_SECONDS)
        if not self.url:
            raise CommandFailed(
                f"{self.name} did not start: make demo-appsflyer once more, or python {self.name} by hand"
            )
        return self.url

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@contextlib.contextmanager
def fleet(folder: Path) -> Iterator[tuple[str, str]]:
    """The stand-in, a master and two workers; gives the addresses of the first two."""
    programs: list[Program] = []
    try:
        fake = Program(
            "tests/fake_appsflyer.py", "--hints", "--day-seconds", str(DAY_SECONDS),
            "--installs-limit", "2", "--events-limit", "2", "--account-limit", "5", "--row-caps", f"{ROW_CAP},5000",
            "--faults", "500,403 limit,429 soon,cut,gone",
        )  # fmt: skip
        programs.append(fake)
        shared: dict[str, Any] = {"log_console_level": "CRITICAL"}
        config = write_config(
            folder, "master", port=0, database=str(folder / "demo.db"), retry_backoff_seconds=1, limits=LIMITS, **shared
        )
        master = Program("master.py", "--config", config)
        programs.append(master)
        urls = fake.wait_until_ready(), master.wait_until_ready()
        for device_id in ("shop-1", "shop-2"):
            config = write_config(
                folder, "worker", device_id=device_id, master_url=urls[1], state_folder=str(folder / "state"),
                appsflyer_url=urls[0], credentials={"acme": TOKEN}, **shared,
            )  # fmt: skip
            programs.append(Program("worker.py", "--config", config))
        yield urls
    finally:
        for program in reversed(programs):
            program.stop()


def write_config(folder: Path, mode: str, **values: Any) -> str:
    path = folder / f"{values.get('device_id', mode)}.json"
    path.write_text(json.dumps({"mode": mode, "log_file": str(path.with_suffix(".log")), **values}), encoding="utf-8")
    path.chmod(0o600)  # a worker's file holds its tokens
    return str(path)


def days() -> list[str]:
    today = datetime.now(timezone.utc).date()
    return [(today - timedelta(days=ago)).isoformat() for ago in range(DAYS, 0, -1)]


def submit(master: Master, batch: str) -> None:
    pull = {"reports": list(REPORTS), "start_date": days()[0], "end_date": days()[-1], "maximum_rows": ROW_CAP}
    task_data = {"page_size": 5, "pull": pull}
    task = {"task_type": "app_sync", "username": "acme", "batch": batch, "unique_key": "apps", "task_data": task_data}
    master.post("/tasks", json.dumps(task).encode())


def watch(master: Master, batch: str, fake_url: str) -> None:
    """A line every few seconds until no task is open."""
    started, next_line = time.monotonic(), 0.0
    while True:
        counts = master.get("/tasks/stats", batch=batch)["by_state"]
        is_done = counts.get("completed", 0) > 0 and not any(counts.get(state) for state in OPEN_STATES)
        seconds = time.monotonic() - started
        if is_done or seconds >= next_line:
            told = requests.get(f"{fake_url}/fake/told", timeout=10).json()
            refused = sum(n for what, n in told.items() if what.startswith("400"))
            print(
                f"{seconds:4.0f} s: {counts.get('completed', 0)} tasks done, {counts.get('running', 0)} running,"
                f" {counts.get('pending', 0)} waiting for a device or a limit, {counts.get('scheduled', 0)} for"
                f" the next quota day or a retry; downloads {told.get('report', 0)}, refused by a quota {refused}",
                flush=True,
            )
            next_line = seconds + 3.0
        if is_done:
            print("what else the stand-in answered: " + (", ".join(
                f"{n} x {what}" for what, n in sorted(told.items()) if what != "report" and not what.startswith("400")
            ) or "nothing"))  # fmt: skip
            return
        if seconds > GIVE_UP_SECONDS:
            raise CommandFailed(f"batch {batch} is not done after {GIVE_UP_SECONDS:.0f} s: look at the logs")
        time.sleep(0.3)


def collect(master: Master, batch: str, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All tasks of the batch with their results, and those of them that have a file, which is now in `folder`."""
    rows = [json.loads(line) for line in b"".join(master.export(batch, "jsonl")).splitlines()]
    tasks = [row for row in rows if "end" not in row]
    folder.mkdir(parents=True, exist_ok=True)
    pulled = []
    for task in tasks:
        for artifact in master.get(f"/tasks/{task['id']}")["artifacts"]:
            url = f"{master.url}/api/distribution/tasks/{task['id']}/artifacts/{artifact['artifact_id']}"
            response = requests.get(url, timeout=60)
            response.raise_for_status()
            path = folder / f"{task['id']}_{artifact['name']}"
            path.write_bytes(response.content)
            pulled.append({**task, "path": path})
    return tasks, pulled


def check(fake_url: str, tasks: list[dict[str, Any]], pulled: list[dict[str, Any]]) -> list[str]:
    """Every app-day of every report against what the stand-in made; a sentence for each that is not right."""
    listed = next(task["result"]["apps"] for task in tasks if task["task_type"] == "app_sync")
    arrived: dict[tuple[str, str], dict[str, Counter[tuple[str, ...]]]] = {}
    row_count = 0
    for task in pulled:
        result = task["result"]
        text = gzip.decompress(task["path"].read_bytes()).decode("utf-8")
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        at = header.index("Date" if "Date" in header else "Event Time")
        by_day = arrived.setdefault((result["app_id"], result["report"]), {})
        for row in rows:
            by_day.setdefault(row[at][:10], Counter())[tuple(row)] += 1
        row_count += len(rows)
        if len(rows) != result["rows"]:
            return [f"task {task['id']} says {result['rows']} rows, its file has {len(rows)}"]
    wrong, right = [], 0
    for app in listed:
        for report in REPORTS:
            query = {"app_id": app["id"], "report": report, "days": ",".join(days())}
            made = requests.get(f"{fake_url}/fake/rows", params=query, timeout=60).json()
            got = arrived.pop((app["id"], report), {})
            surplus = set(got) - set(made)
            wrong += [f"{app['id']} {report} {day}: nobody asked for this day" for day in surplus]
            for day, rows in made.items():
                expected, found = Counter(map(tuple, rows)), got.get(day, Counter())
                missing, doubled = (expected - found).total(), (found - expected).total()
                right += not missing and not doubled
                if missing or doubled:
                    wrong.append(f"{app['id']} {report} {day}: {missing} rows missing, {doubled} too many")
    split = sum(1 for task in tasks if (task.get("result") or {}).get("split"))
    print(
        f"{right} of {len(listed) * len(REPORTS) * DAYS} app-days arrived exactly once ({len(listed)} apps,"
        f" {len(REPORTS)} reports, {DAYS} days): {row_count} rows in {len(pulled)} files;"
        f" {split} pulls had too many rows and were halved"
    )
    return wrong + [f"{key}: nobody asked for it" for key in arrived]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pull a stand-in for AppsFlyer through a master and two workers.")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo-appsflyer", help="where the files go")
    options = parser.parse_args(argv)
    batch = f"appsflyer-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory(prefix="demo-appsflyer-") as name, fleet(Path(name)) as (fake_url, master_url):
        print(f"a stand-in for AppsFlyer at {fake_url}, with made-up data and a quota day of {DAY_SECONDS} s")
        print(f"a master at {master_url} (dashboard) and the workers shop-1 and shop-2; batch {batch}", flush=True)
        master = Master(master_url, "")
        submit(master, batch)
        watch(master, batch, fake_url)
        tasks, pulled = collect(master, batch, options.output / batch)
        wrong = check(fake_url, tasks, pulled)
        failed = [task for task in tasks if task["status"] != "completed"]
        wrong += [f"task {task['id']} {task['status']}: {task.get('error_message')}" for task in failed]
    for sentence in wrong[:20]:
        print(f"  {sentence}")
    print(f"written: {options.output / batch}{os.sep}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandFailed as error:
        print(f"demo_appsflyer: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
