"""What changes when the tables grow? The times of what people and devices ask for, at several sizes.

A size is a database with so many finished tasks and as many waiting ones (a million at most), made by bench/big.py.
Then a master serves it. Each question is asked several times; of a filter's questions (with a value that many tasks
have, one that ten of the oldest have, one that nobody has, and each in several states) the slowest counts. The flow is
no-op tasks of top priority through one worker: past all those that wait for a device that is not there, and then also
past half a million of that worker that a limit holds back. At the end a master starts that keeps less, and deletes.

10,000,000 rows need 13 GB in the folder for temporary files, and some three minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.big import grow, make_seed
from bench.farm import ROOT, Farm, Program, bodies, open_farm, wait_until
from bench.run import machine

QUESTIONS = (
    ("overview", "/system/overview"),
    ("stats", "/tasks/stats"),
    ("first page", "/tasks"),
    ("one task", "/tasks/{oldest}"),
    ("why a task waits", "/tasks/{oldest}/why"),
    ("lanes", "/lanes"),
    ("lanes of a type that has none", "/lanes?task_type=echo"),
    ("limits", "/limits"),
    ("batches", "/batches"),
    ("devices", "/devices"),
    ("a device's stats", "/devices/bench-0/stats"),
)
#          a filter, and its values: of many, of ten of the oldest, of nobody
FILTERS = (
    ("status", ("completed", "failed", "running")),
    ("task_type", ("parked", "needle", "nobody")),
    ("device_id", ("bench-0", "needle", "nobody")),
    ("batch", ("copy-1", "needle", "nobody")),
    ("username", ("user-3", "needle", "nobody")),
    ("app_id", ("app-3", "needle", "nobody")),
    ("parent_id", (1, 2)),
    ("text", ("user-3", "needle", "nobody")),
)
STATES = (None, "pending", "completed", "failed", "cancelled", "failed,cancelled", "assigned,running")
TIMES = 5
LARGEST_BACKLOG, CLOSED = 1_000_000, 500_000
KEPT_DAYS = 20
RETENTION_SECONDS = 32.0
"""The master looks for what is over every ten seconds."""


class Impatient(Farm):
    """A master that keeps finished tasks for less than there are of them."""

    def _start(self, script: str, settings: dict[str, Any]) -> Program:
        return super()._start(script, {**settings, "retention_days": KEPT_DAYS} if script == "master.py" else settings)


def spread(times: list[float]) -> str:
    """ "median (slowest)" of milliseconds."""
    return f"{statistics.median(times):.1f} ({max(times):.1f})"


def ask(farm: Farm, path: str) -> list[float]:
    """Milliseconds of each request; one more came first, which may have read from disk."""
    times = []
    for _ in range(TIMES + 1):
        started = time.perf_counter()
        farm.get(path)
        times.append((time.perf_counter() - started) * 1000)
    return times[1:]


def ask_lists(farm: Farm) -> Iterator[tuple[str, str]]:
    """The slowest of each filter's questions, and of those with two filters."""
    singles: list[dict[str, Any]] = []
    for name, values in FILTERS:
        chosen = [{name: value} for value in values]
        singles += chosen if name != "status" else []
        states = STATES if name != "status" else STATES[:1]
        queries = [{**query, **({"status": state} if state else {})} for query in chosen for state in states]
        yield (
            f"page by {name}",
            spread(max((ask(farm, f"/tasks?{urlencode(query)}") for query in queries), key=statistics.median)),
        )
    pairs = [{**one, **other} for one, other in itertools.combinations(singles, 2) if not one.keys() & other.keys()]
    slowest = max(
        ((ask(farm, f"/tasks?{urlencode(pair)}"), pair) for pair in pairs), key=lambda one: statistics.median(one[0])
    )
    yield "page by any two of them", spread(slowest[0])


def first_byte(farm: Farm, query: str) -> float:
    """Milliseconds until an export has sent something."""
    started = time.perf_counter()
    url = f"{farm.url}/api/distribution/tasks/export?format=jsonl{query}"
    with requests.get(url, stream=True, timeout=60) as reply:
        next(reply.iter_content(1))
        return (time.perf_counter() - started) * 1000


def flow(farm: Farm, total: int, batch: str) -> tuple[str, str]:
    """Tasks per second through one worker, and the master's CPU seconds for 1,000 of them."""
    sent = bodies({"task_type": "echo", "priority": 10, "batch": batch}, total)
    cpu, started = farm.master.cpu_seconds(), time.perf_counter()
    for body in sent:
        farm.post("/tasks", body)
    wait_until("the flow", lambda: farm.get(f"/tasks/stats?batch={batch}")["by_state"]["completed"] == total, 0.02)
    rate = total / (time.perf_counter() - started)
    return f"{rate:,.0f}", f"{(farm.master.cpu_seconds() - cpu) / total * 1000:.3f}"


def close_limit(farm: Farm, waiting: int) -> None:
    """So many urgent tasks of the worker's own type in front of the flow, of an account that has used up its starts."""
    limits = farm.get("/limits")["limits"]
    kept = ("name", "task_type", "key", "max_running", "max_starts_per_day")
    ours = {name: next(limit for limit in limits if limit["key"] == ["username"])[name] for name in kept}
    farm.put("/limits", json.dumps({"limits": [{**ours, "max_starts": 1, "window_seconds": 86400}]}).encode())
    for body in bodies({"task_type": "echo", "priority": 10, "batch": "closed", "username": "used-up"}, waiting):
        farm.post("/tasks", body)


def cancel_many(farm: Farm) -> tuple[str, str]:
    """Tasks per second of a bulk action, and the submits of somebody else meanwhile in milliseconds."""
    action = {"action": "cancel", "filter": {"username": "user-3", "status": "pending"}}
    waits: list[float] = []
    is_over = threading.Event()
    other = threading.Thread(target=_submit_until, args=(farm.url, is_over, waits))
    other.start()
    started = time.perf_counter()
    changed = farm.post("/tasks/actions", json.dumps(action).encode())["changed"]
    rate = changed / (time.perf_counter() - started)
    is_over.set()
    other.join()
    return f"{rate:,.0f}", spread(waits)


def _submit_until(url: str, is_over: threading.Event, waits: list[float]) -> None:
    with requests.Session() as session:
        session.trust_env = False
        while not waits or not is_over.wait(0.02):
            started = time.perf_counter()
            session.post(f"{url}/api/distribution/tasks", json={"task_type": "later"}, timeout=60).raise_for_status()
            waits.append((time.perf_counter() - started) * 1000)


def retention(database: Path) -> Iterator[tuple[str, str]]:
    """A fifth of the finished tasks is over: how fast do they go, and how long does everybody else wait?"""
    started = time.perf_counter()
    with open_farm(database, Impatient) as farm:
        yield "start of a master, s", f"{time.perf_counter() - started:.1f}"
        before = farm.get("/tasks/stats")["by_state"]["completed"]
        waits: list[float] = []
        is_over = threading.Event()
        other = threading.Thread(target=_submit_until, args=(farm.url, is_over, waits))
        other.start()
        is_over.wait(RETENTION_SECONDS)
        is_over.set()
        other.join()
        deleted = before - farm.get("/tasks/stats")["by_state"]["completed"]
    yield f"deleted by retention in {RETENTION_SECONDS:.0f} s", f"{deleted:,}"
    yield "a submit meanwhile", spread(waits)


def backup_seconds(database: Path, folder: Path) -> float:
    """`master.py --backup`, with the check of the copy."""
    config = folder / "backup.json"
    config.write_text(json.dumps({"mode": "master", "database": str(database), "log_file": str(folder / "backup.log")}))
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "master.py"), "--config", str(config), "--backup", str(folder / "copy")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder / "copy")
    return time.perf_counter() - started


def measure(seed: Path, size: int, flowing: int, folder: Path) -> dict[str, str]:
    """What one size costs."""
    database = folder / "distribution.db"
    shutil.copy(seed, database)
    waiting = min(size, LARGEST_BACKLOG)
    grow(database, size, waiting)
    found: dict[str, str] = {}
    with open_farm(database) as farm:
        oldest = farm.get("/system/overview")["oldest_waiting"]["task_id"]
        for name, path in QUESTIONS:
            found[name] = spread(ask(farm, path.format(oldest=oldest)))
        found |= dict(ask_lists(farm))
        action = json.dumps({"action": "cancel", "filter": {"device_id": "bench-0"}, "dry_run": True}).encode()
        started = time.perf_counter()
        farm.post("/tasks/actions", action)
        found["count of a bulk action"] = f"{(time.perf_counter() - started) * 1000:.1f}"
        for name, query in (("everything", ""), ("a user's failed", "&username=user-3&status=failed")):
            found[f"export of {name}: first byte"] = spread([first_byte(farm, query) for _ in range(TIMES)])
        farm.add_workers(1, concurrent_tasks=100)
        flow(farm, flowing // 5, "warm")
        cpu = "the master's CPU for 1,000 of them, s"
        found["flow past all that waits, tasks/s"], found[f"there {cpu}"] = flow(farm, flowing, "flow")
        close_limit(farm, min(size, CLOSED))
        found["flow past a closed limit, too, tasks/s"], found[f"then {cpu}"] = flow(farm, flowing, "past")
        found["bulk cancel, tasks/s"], found["a submit during it"] = cancel_many(farm)
        found["the master's memory, MB"] = f"{farm.master.resident_bytes() / 2**20:.0f}"
    found["the database, MB"] = f"{database.stat().st_size / 2**20:,.0f}"
    found["backup, s"] = f"{backup_seconds(database, folder):.1f}"
    return found | dict(retention(database))


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    sizes = [1_000, 10_000, 1_000_000]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help="thousands (1000 10000 1000000)")
    parser.add_argument("--flow", type=int, default=10_000, help="tasks that flow past those that wait (10000)")
    options = parser.parse_args(argv)
    if min(options.rows) < 1000 or options.flow < 5:
        parser.error("--rows must be at least 1000 each, and --flow at least 5")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that our processes are stopped then, too
    print(machine() + "\nmilliseconds over HTTP, median (slowest), where no unit is given\n", flush=True)
    columns = []
    with TemporaryDirectory(prefix="bench-scale-") as seed_folder:
        seed = Path(seed_folder) / "seed.db"
        make_seed(seed)
        for size in options.rows:
            started = time.perf_counter()
            with TemporaryDirectory(prefix="bench-scale-") as folder:
                columns.append(measure(seed, size, options.flow, Path(folder)))
            columns[-1]["this column took, s"] = f"{time.perf_counter() - started:.0f}"
            print(json.dumps({f"{size:,}": columns[-1]}), file=sys.stderr, flush=True)
    heads = " | ".join(f"{size:,} finished, {min(size, LARGEST_BACKLOG):,} waiting" for size in options.rows)
    print(f"| what | {heads} |\n|---|{'---|' * len(columns)}")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
