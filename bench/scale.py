"""What changes when the tables grow? The times of what people and devices ask for, at several sizes.

A size is a database with that many waiting and that many finished tasks. A real master and a real worker make the
first thousand finished ones; copies of their rows (other ids, finished earlier) make the rest, counters included. The
waiting ones are submitted over HTTP. Then a master serves it, and each question is asked several times. The flow is
no-op tasks of top priority through one worker: past all those that wait for a device that is not there, and then also
past as many of that worker that a limit holds back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sqlite3
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.farm import Farm, bodies, open_farm, wait_until
from bench.run import machine

SEED = 1000
QUESTIONS = (
    ("overview", "/system/overview"),
    ("stats", "/tasks/stats"),
    ("first page", "/tasks"),
    ("page: failed", "/tasks?status=failed"),
    ("page: pending of a type", "/tasks?status=pending&task_type=parked"),
    ("page: of a device", "/tasks?device_id=bench-0"),
    ("page: of a batch", "/tasks?batch=seed"),
    ("page: of a username", "/tasks?username=nobody"),
    ("page: text that nothing has", "/tasks?text=zzz"),
    ("page: finished of a username that few have", "/tasks?status=completed&username=few"),
    ("devices", "/devices"),
    ("batches", "/batches"),
    ("why the oldest waits", "/tasks/{oldest}/why"),
)
TIMES = 9
CLOSED = 500_000


def grow(database: Path, finished: int) -> None:
    """Copies of the finished tasks and their attempts, until there are `finished` of them."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        (seed,) = connection.execute("SELECT count(*) FROM af_crawl_tasks").fetchone()
        copies = finished // seed - 1
        if copies < 1:
            return
        (step,) = connection.execute("SELECT max(id) FROM af_crawl_tasks").fetchone()
        (attempts,) = connection.execute("SELECT max(id) FROM af_task_assignment").fetchone()
        moved = {"created_at": "- 0.01 * k", "finished_at": "- 0.01 * k", "unique_key": "|| k"}
        tables = {
            "af_task_assignment": {"id": f"+ {attempts} * k", "task_id": f"+ {step} * k"},
            "af_task_payload": {"task_id": f"+ {step} * k"},
            "af_task_result": {"task_id": f"+ {step} * k"},
            "af_crawl_tasks": {"id": f"+ {step} * k", "assignment_id": f"+ {attempts} * k", **moved},
        }
        with connection:
            for table, shifts in tables.items():
                columns = [name for (_, name, *_) in connection.execute(f"PRAGMA table_info({table})")]
                values = ", ".join(f"{name} {shifts.get(name, '')}" for name in columns)
                connection.execute(
                    f"WITH RECURSIVE copy(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM copy WHERE k < {copies})"
                    f" INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM copy, {table}"
                )
            connection.execute(f"UPDATE af_count SET n = n * {copies + 1}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def ask(farm: Farm, path: str) -> list[float]:
    """Milliseconds of each request, sorted; one more came first, which may have read from disk."""
    times = []
    for _ in range(TIMES + 1):
        started = time.perf_counter()
        farm.get(path)
        times.append((time.perf_counter() - started) * 1000)
    return sorted(times[1:])


def first_byte(farm: Farm) -> float:
    """Milliseconds until an export of everything has sent something."""
    started = time.perf_counter()
    with requests.get(f"{farm.url}/api/distribution/tasks/export?format=jsonl", stream=True, timeout=60) as reply:
        next(reply.iter_content(1))
        return (time.perf_counter() - started) * 1000


def flow(farm: Farm, total: int, batch: str) -> float:
    """Tasks per second through one worker."""
    sent = bodies({"task_type": "echo", "priority": 10, "batch": batch}, total)
    started = time.perf_counter()
    for body in sent:
        farm.post("/tasks", body)
    wait_until("the flow", lambda: farm.get(f"/tasks/stats?batch={batch}")["by_state"]["completed"] == total, 0.02)
    return total / (time.perf_counter() - started)


def close_limit(farm: Farm, waiting: int) -> None:
    """So many urgent tasks of the worker's own type in front of the flow, of an account that has used up its starts."""
    limit = {"name": "account", "task_type": "echo", "key": "username", "max_starts": 1, "window_seconds": 86400}
    farm.put("/limits", json.dumps({"limits": [limit]}).encode())
    for body in bodies({"task_type": "echo", "priority": 10, "batch": "closed", "username": "used-up"}, waiting):
        farm.post("/tasks", body)


def measure(size: int, flowing: int, folder: Path) -> dict[str, str]:
    """What one size costs: question -> "median (slowest) ms"."""
    database = folder / "distribution.db"
    with open_farm() as farm:
        farm.add_workers(1, concurrent_tasks=100)
        for body in bodies({"task_type": "echo", "batch": "seed", "task_data": {"n": 1}}, min(size, SEED)):
            farm.post("/tasks", body)
        wait_until("the seed", lambda: farm.get("/tasks/stats?batch=seed")["by_state"]["completed"] == min(size, SEED))
        farm.stop()
        shutil.copy(farm.database, database)
    grow(database, size)
    found: dict[str, str] = {}
    with open_farm(database) as farm:
        for body in bodies({"task_type": "parked", "username": "nobody"}, size):
            farm.post("/tasks", body)
        farm.add_workers(1, concurrent_tasks=100)
        oldest = farm.get("/tasks?status=pending&limit=1")["tasks"][0]["id"]
        for name, path in QUESTIONS:
            times = ask(farm, path.format(oldest=oldest))
            found[name] = f"{statistics.median(times):.1f} ({times[-1]:.1f})"
        starts = sorted(first_byte(farm) for _ in range(TIMES))
        found["export: first byte"] = f"{statistics.median(starts):.1f} ({starts[-1]:.1f})"
        found["flow past all that waits, tasks/s"] = f"{flow(farm, flowing, 'flow'):,.0f}"
        close_limit(farm, min(size, CLOSED))
        found[f"flow past a closed limit (up to {CLOSED:,} tasks), tasks/s"] = f"{flow(farm, flowing, 'past'):,.0f}"
        found["the master's memory, MB"] = f"{farm.master.resident_bytes() / 2**20:.0f}"
    found["the database, MB"] = f"{database.stat().st_size / 2**20:,.0f}"
    return found


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000, 1_000_000], help="tasks (10000 1000000)")
    parser.add_argument("--flow", type=int, default=10_000, help="tasks that flow past those that wait (10000)")
    options = parser.parse_args(argv)
    if min(options.sizes) < SEED:
        parser.error(f"a size is at least {SEED}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that our processes are stopped then, too
    print(machine() + "\nmilliseconds over HTTP, median and slowest of 9\n", flush=True)
    columns = []
    for size in options.sizes:
        with TemporaryDirectory(prefix="bench-scale-") as folder:
            columns.append(measure(size, options.flow, Path(folder)))
        print(json.dumps({f"{size:,}": columns[-1]}), file=sys.stderr)
    heads = " | ".join(f"{size:,} waiting, {size:,} finished" for size in options.sizes)
    print(f"| what | {heads} |\n|---|{'---|' * len(columns)}")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
