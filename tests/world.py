"""A small world for tests: the real store in a temporary folder, with a clock that a test moves by hand."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import db
import devices
import history
import judging
from dispatcher import Delivery, Dispatcher
from store import Store
from transaction import Policy, Tx

START = 1_800_000_000.0


class World:
    """Store, presence and dispatcher as the master wires them; `now` moves only when a test says so."""

    def __init__(self, folder: Path, policy: Policy | None = None, strategy: str = "least_tasks") -> None:
        self.now = START
        self.wall_offset = 0.0
        self.jumped = 0.0
        self.path = folder / "distribution.db"
        self.policy = policy or Policy()
        self.strategy = strategy
        self.boots: dict[str, str] = {}
        self.beats: dict[str, int] = {}
        self._open()

    def _open(self) -> None:
        self.store = Store(self.path, policy=self.policy, moments=lambda: (self.now, self.now + self.wall_offset))
        self.presence = devices.Presence(self.now)
        self.dispatcher = Dispatcher(self.store, self.presence, strategy=self.strategy, max_held_polls=100)
        self.store.keep = history.keep
        self.store.open()
        self.store.write(db.resume_clock, "this-boot", self.now - self.jumped)

    def close(self) -> None:
        self.store.close()

    def reopen(self, jump: float = 0.0) -> None:
        """The master stops and starts again: what is not in the database is gone. `jump`: its clock begins elsewhere."""
        self.store.close()
        self.now += jump
        self.jumped += jump
        self._open()

    def submit(self, **fields: Any) -> int:
        """One task; its id."""
        task_id = self.store.write(db.submit, [db.NewTask(**{"task_type": "echo", **fields})])[0].id
        assert task_id is not None
        return task_id

    def register(self, device_id: str = "shop-1", boot_id: str = "boot-1", **facts: Any) -> devices.Registered:
        facts = {"task_types": ("echo",), "max_concurrent_tasks": 10, **facts}
        self.boots[device_id] = boot_id
        new = devices.Registration(device_id, boot_id, device_id, **facts)
        return self.store.write(devices.register, self.presence, new)

    def pull(self, device_id: str = "shop-1", limit: int = 1, **more: Any) -> list[Delivery]:
        return self.dispatcher.pull(device_id, self.boots[device_id], limit, 0.0, **more).tasks

    def take(self, device_id: str = "shop-1", start: bool = False) -> Delivery:
        """One task for that device, started if asked."""
        if device_id not in self.boots:
            self.register(device_id)
        tasks = self.pull(device_id)
        assert tasks, "nothing was dispatched"
        if start:
            assert self.report(tasks[0], "running", device_id).outcome == "accepted"
        return tasks[0]

    def report(self, task: Delivery, outcome: str, device_id: str = "shop-1", **facts: Any) -> db.Judged:
        report = db.Report(task.assignment_id, task.lease_id, outcome, **facts)
        return self.store.write(judging.apply_report, device_id, report)

    def beat(self, device_id: str = "shop-1", holding: tuple[devices.Held, ...] | None = (), **facts: Any) -> list[int]:
        """One heartbeat; what the device must cancel."""
        seq = self.beats[device_id] = self.beats.get(device_id, 0) + 1
        heard = devices.Beat(self.boots[device_id], seq, holding, **facts)
        now, wall = self.store.moments()
        if self.presence.beat_idle(device_id, heard, now, wall, keep_history=True) is not None:
            return []
        taken = self.store.write(devices.beat, self.presence, device_id, heard, keep_history=True)
        self.presence.remember_idle(device_id, taken)
        return taken.cancel

    def be_idle(self, device_id: str = "shop-1") -> None:
        """The device beats until the master knows that it holds nothing."""
        while self.presence.idle_device(device_id, self.boots[device_id]) is None:
            assert self.beat(device_id) == []

    def release(self, task: Delivery, reason: str) -> str | None:
        def run(tx: Tx) -> str | None:
            attempt = db.get_attempt(tx, task.assignment_id)
            assert attempt is not None
            return db.release(tx, attempt, reason)

        return self.store.write(run)

    def lose(self, device_timeout: float = 300.0) -> int:
        """Lets every device be silent for longer than its timeout; how many attempts were released."""
        self.now += device_timeout + 1
        return self.store.write(devices.release_silent, self.presence, device_timeout)

    def row(self, task_id: int) -> dict[str, Any]:
        return self.rows("SELECT * FROM af_crawl_tasks WHERE id = ?", task_id)[0]

    def attempt(self, assignment_id: int) -> dict[str, Any]:
        return self.rows("SELECT * FROM af_task_assignment WHERE id = ?", assignment_id)[0]

    def rows(self, sql: str, *parameters: Any) -> list[dict[str, Any]]:
        connection = sqlite3.connect(self.path)
        connection.row_factory = sqlite3.Row
        found = [dict(row) for row in connection.execute(sql, parameters)]
        connection.close()
        return found

    def counts(self) -> dict[str, int]:
        """The kept counters, which must equal what counting the rows gives."""
        kept = self.rows(
            "SELECT state, SUM(n) AS n FROM af_count WHERE scope = 'all' GROUP BY state HAVING SUM(n) <> 0"
        )
        return {row["state"]: row["n"] for row in kept}

    def check_books(self) -> None:
        """Counters and lane lengths say what the rows say."""
        rows = self.rows("SELECT status, COUNT(*) AS n FROM af_crawl_tasks GROUP BY status")
        assert self.counts() == {row["status"]: row["n"] for row in rows}
        waiting = self.rows(
            "SELECT lane.id, lane.waiting, lane.top_priority, COUNT(task.id) AS n, MAX(task.priority) AS top FROM af_lane"
            " AS lane LEFT JOIN af_crawl_tasks AS task ON task.lane_id = lane.id AND task.status = 'pending'"
            " GROUP BY lane.id"
        )
        for lane in waiting:
            assert (lane["waiting"], lane["top_priority"]) == (lane["n"], lane["top"])
        unfinished = self.rows(
            "SELECT lane_id, COUNT(*) AS n FROM af_crawl_tasks WHERE finished_at IS NULL GROUP BY lane_id"
        )
        kept = self.rows("SELECT id AS lane_id, unfinished AS n FROM af_lane WHERE unfinished > 0")
        assert sorted(map(str, unfinished)) == sorted(map(str, kept))
        for key in self.rows(
            "SELECT key.id, key.running, (SELECT COUNT(*) FROM af_lane_key JOIN af_crawl_tasks AS task"
            " ON task.lane_id = af_lane_key.lane_id WHERE key_id = key.id AND task.status IN ('assigned', 'running'))"
            " AS n FROM af_limit_key AS key"
        ):
            assert key["running"] == key["n"]
