"""How does a database get millions of rows in seconds? By SQL: copies of some that a real master and worker have made.

The seed is SEED finished and SEED waiting tasks, and NEEDLES older ones that share a type, a batch, a username, an app
and a device with nobody. Copy k has other ids, a batch of its own for the finished ones and a lane of its own for those
that wait (one an account), and its time; the kept counters are those that the verbs would have written. Indexes are
made again at the end, which is quicker than to keep them. Nobody else may have the file open.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from bench.farm import Farm, open_farm, wait_until

SEED, NEEDLES = 1000, 10
USERNAMES, APPS = 100, 7
NEEDLE = dict.fromkeys(("task_type", "username", "app_id", "batch"), "needle")
DAYS = 25.0
"""The finished tasks are spread over so many days; the waiting ones came after them."""
GROWING = ("af_crawl_tasks", "af_task_assignment", "af_task_payload", "af_task_result")


def make_seed(target: Path) -> None:
    """A small database made by the API alone."""
    with open_farm() as farm:
        _make_needles(farm)
        farm.add_workers(1, concurrent_tasks=100)
        farm.post("/tasks", _tasks({"task_type": "echo", "batch": "copy", "task_data": {"n": 1}}, "key"))
        wait_until("the seed", lambda: farm.get("/tasks/stats?batch=copy")["by_state"]["completed"] == SEED)
        farm.post("/tasks", _tasks({"task_type": "parked", "pinned_device_id": "absent"}, None))
        farm.stop()
        target.write_bytes(farm.database.read_bytes())


def _tasks(task: dict[str, object], key: str | None) -> bytes:
    rows = [{**task, "username": f"user-{n % USERNAMES}", "app_id": f"app-{n % APPS}"} for n in range(SEED)]
    return json.dumps([{**row, "unique_key": f"{key}-{n}"} if key else row for n, row in enumerate(rows)]).encode()


def _make_needles(farm: Farm) -> None:
    """Of each final state some, by a device that this program plays."""
    device = {"device_id": "needle", "boot_id": "1", "protocol": 1, "task_types": ["needle"]}
    farm.post("/devices/register", json.dumps({**device, "max_concurrent_tasks": NEEDLES}).encode())
    first = farm.post("/tasks", json.dumps({**NEEDLE, "unique_key": "needle-0", "max_retry_count": 0}).encode())["id"]
    rest = [
        {**NEEDLE, "unique_key": f"needle-{n}", "max_retry_count": 0, "parent_id": first} for n in range(1, NEEDLES)
    ]
    farm.post("/tasks", json.dumps(rest).encode())
    pulled = farm.get(f"/tasks/pull?device_id=needle&boot_id=1&limit={NEEDLES - 2}")["tasks"]
    reports = [
        {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "outcome": outcome}
        for task, outcome in zip(pulled, ("completed", "failed") * NEEDLES)
    ]
    farm.post("/tasks/report", json.dumps({"device_id": "needle", "reports": reports}).encode())
    farm.post("/tasks/actions", b'{"action": "cancel", "filter": {"batch": "needle", "status": "pending"}}')


def grow(database: Path, finished: int, waiting: int) -> None:
    """Copies of the seed, until there are so many finished and so many waiting tasks (thousands)."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -1000000", "temp_store = 1"):
            connection.execute(f"PRAGMA {pragma}")
        marks = ", ".join("?" * len(GROWING))
        indexes = connection.execute(
            f"SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql <> '' AND tbl_name IN ({marks})", GROWING
        ).fetchall()
        connection.execute("BEGIN")
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        _copy_finished(connection, finished // SEED - 1)
        _copy_waiting(connection, finished // SEED - 1, waiting // SEED - 1)
        for _, sql in indexes:
            connection.execute(sql)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = wal")


def _copy_finished(connection: sqlite3.Connection, copies: int) -> None:
    """Ids go on behind the waiting seed; copy 1 is the oldest, just after the seed itself."""
    span = DAYS * 86400
    moments = ("created_at", "started_at", "finished_at", "updated_at", "assigned_at", "delivered_at", "completed_at")
    for table, names in (("af_crawl_tasks", moments[:4]), ("af_task_assignment", ("started_at", *moments[4:]))):
        of_seed = "" if table == "af_task_assignment" else "WHERE finished_at IS NOT NULL"
        connection.execute(f"UPDATE {table} SET {', '.join(f'{name} = {name} - {span}' for name in names)} {of_seed}")
    later = {name: f"{name} + {span} * k / {copies + 1.0}" for name in moments}
    task_id = f"{SEED} * (k + 1)"
    _copy(connection, "af_task_assignment", copies, "WHERE device_id <> 'needle'",
          {"id": f"id + {SEED} * k", "task_id": f"task_id + {task_id}", **later})  # fmt: skip
    for table in ("af_task_payload", "af_task_result"):
        _copy(connection, table, copies, "", {"task_id": f"task_id + {task_id}"})
    _copy(connection, "af_crawl_tasks", copies, "WHERE task_type = 'echo'", {
        "id": f"id + {task_id}", "assignment_id": f"assignment_id + {SEED} * k", "batch": "batch || '-' || k", **later
    })  # fmt: skip
    _copy(connection, "af_batch", copies, "WHERE name = 'copy'", {"name": "name || '-' || k"})
    _copy(connection, "af_count", copies, "WHERE scope = 'batch' AND name = 'copy'", {"name": "name || '-' || k"})
    _count(connection, "echo", "completed", copies)


def _copy_waiting(connection: sqlite3.Connection, finished_copies: int, copies: int) -> None:
    absent = {"pinned_device_id": "pinned_device_id || '-' || k"}
    ids = {"id": f"id + {SEED} * (k + {finished_copies})", "lane_id": f"lane_id + {USERNAMES} * k"}
    _copy(connection, "af_crawl_tasks", copies, "WHERE task_type = 'parked'", {**ids, **absent})
    _copy(connection, "af_lane_key", copies, "WHERE lane_id IN (SELECT id FROM af_lane WHERE task_type = 'parked')",
          {"lane_id": f"lane_id + {USERNAMES} * k"})  # fmt: skip
    _copy(connection, "af_lane", copies, "WHERE task_type = 'parked'", {"id": f"id + {USERNAMES} * k", **absent})
    _count(connection, "parked", "pending", copies)


def _copy(connection: sqlite3.Connection, table: str, copies: int, which: str, values: dict[str, str]) -> None:
    columns = [name for (_, name, *_) in connection.execute(f"PRAGMA table_info({table})")]
    connection.execute(
        f"WITH RECURSIVE copy(k) AS (SELECT 1 WHERE {copies} > 0 UNION ALL SELECT k + 1 FROM copy WHERE k < {copies}),"
        f" seed AS MATERIALIZED (SELECT * FROM {table} {which})"
        f" INSERT INTO {table} ({', '.join(columns)})"
        f" SELECT {', '.join(values.get(name, name) for name in columns)} FROM copy CROSS JOIN seed"
    )


def _count(connection: sqlite3.Connection, task_type: str, state: str, copies: int) -> None:
    connection.execute(
        "UPDATE af_count SET n = n + ? WHERE state = ? AND (scope = 'all' OR scope = 'type' AND name = ?)",
        (SEED * copies, state, task_type),
    )
