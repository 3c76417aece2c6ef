"""Whatever happens in whatever order, no limit is broken and no task is accepted twice.

A random walk (hypothesis) over the real store and dispatcher: submits, pulls, reports, losses, late starts, restarts,
clocks that are set, limits that change half-way. A model beside it, which knows nothing of how limits are counted,
checks every start by a clock of its own, which nobody can set.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import World

import db
import lanes
import limits
from dispatcher import Delivery
from limits import Limit

DAY = 86400
MEMORY = Path("/dev/shm")  # a disk would only wait: what a power cut leaves is no matter here
USERS = ("joe", "ann", None)
APPS = ("a", "b")
DEVICES = ("shop-1", "shop-2")


class Start(NamedTuple):
    real: float
    wall_day: int
    now_day: int
    since: int
    """the number of changes of limits before it"""
    user: str | None
    app: str


def limit(name: str, *fields: str, task_type: str = "*", **numbers: Any) -> Limit:
    return Limit(0, name, task_type, fields, **numbers)


LIMIT_SETS = (
    (),
    (limit("user", "username", max_running=1),),
    (limit("user", "username", max_running=2, max_starts=3, window_seconds=60.0),),
    (limit("user", "username", max_starts=2, window_seconds=10.0), limit("app", "app_id", max_running=2)),
    (limit("all", max_running=3, max_starts_per_day=6), limit("user", "username", max_starts=4, window_seconds=60.0)),
    (limit("pair", "username", "app_id", max_running=1, max_starts_per_day=3),),
    (limit("user", "username"), limit("app", "app_id", max_starts=3, window_seconds=3600.0)),
)


class Fleet(RuleBasedStateMachine):
    """`real` is the time that passes whatever the clocks say."""

    @initialize(limits=st.sampled_from(LIMIT_SETS))
    def begin(self, limits: tuple[Limit, ...]) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.world = World(Path(self.folder.name))
        self.real = 0.0
        self.starts: list[Start] = []
        self.out: list[tuple[str, Delivery]] = []
        self.accepted: dict[int, int] = {}
        self.tasks: dict[int, tuple[str | None, str]] = {}
        self.limits: tuple[Limit, ...] = ()
        self.changes = 0
        for device_id in DEVICES:
            self.world.register(device_id, max_concurrent_tasks=50)
        self.change_limits(limits, True)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
            self.folder.cleanup()

    # -- what may happen ------------------------------------------------------------------------------------

    @rule(user=st.sampled_from(USERS), app=st.sampled_from(APPS), n=st.integers(1, 4), priority=st.integers(4, 6))
    def submit(self, user: str | None, app: str, n: int, priority: int) -> None:
        for _ in range(n):
            self.tasks[self.world.submit(username=user, app_id=app, priority=priority, max_retry_count=50)] = (
                user,
                app,
            )

    @rule(device_id=st.sampled_from(DEVICES), n=st.integers(1, 8))
    def pull(self, device_id: str, n: int) -> None:
        before = self.running()
        for task in self.world.pull(device_id, limit=n):
            self.out.append((device_id, task))
            user, app = self.tasks[task.id]
            now, wall = self.world.now, self.world.now + self.world.wall_offset
            self.starts.append(Start(self.real, int(wall // DAY), int(now // DAY), self.changes, user, app))
            self.check_starts(self.starts[-1])
        self.check_running(before)

    @precondition(lambda self: self.out)
    @rule(
        n=st.integers(0, 1000),
        outcome=st.sampled_from(["running", "running", "completed", "completed", "failed", "snoozed", "released"]),
        closed=st.sampled_from([None, None, 5.0, 200.0]),
    )
    def report(self, n: int, outcome: str, closed: float | None) -> None:
        """Also late, and also again: what was reported stays in the list."""
        device_id, task = self.out[n % len(self.out)]
        before = self.running()
        closes = closed if outcome in ("failed", "snoozed") else None
        judged = self.world.report(task, outcome, device_id, delay_seconds=1.0, limit_closed_seconds=closes)
        if judged.outcome == "accepted" and outcome == "completed":
            self.accepted[task.id] = self.accepted.get(task.id, 0) + 1
            assert self.accepted[task.id] == 1, "a task was accepted twice"
        self.check_running(before)

    @precondition(lambda self: self.out)
    @rule(n=st.integers(0, 1000), reason=st.sampled_from(["lost", "timeout", "handed_back"]))
    def release(self, n: int, reason: str) -> None:
        self.world.release(self.out[n % len(self.out)][1], reason)

    @precondition(lambda self: self.tasks)
    @rule(n=st.integers(0, 1000), again=st.booleans())
    def cancel_or_requeue(self, n: int, again: bool) -> None:
        task_id = list(self.tasks)[n % len(self.tasks)]
        self.world.store.write(db.requeue if again else db.cancel, task_id)

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 10.0, 59.0, 60.0, 3600.0, 40000.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.real += seconds
        self.world.store.write(db.promote)
        self.world.store.write(limits.forget_starts, 100)
        self.world.store.write(limits.forget_keys, 0, 100)
        self.world.store.write(lanes.forget_idle_lanes, 100)

    @rule()
    def look_early(self) -> None:
        """Keys that are looked at before their time must say the same as at their time."""
        self.world.store.write(lambda tx: tx.execute("UPDATE af_limit_key SET look_at = 0"))

    @rule(offset=st.sampled_from([0.0, 3600.0, -3600.0, 1.5 * DAY, -1.5 * DAY]))
    def set_the_wall_clock(self, offset: float) -> None:
        self.world.wall_offset = offset

    @rule(jump=st.sampled_from([0.0, 0.0, -30.0, 90.0, 7200.0]))
    def restart(self, jump: float) -> None:
        self.world.reopen(jump)
        for device_id in DEVICES:
            self.world.register(device_id, max_concurrent_tasks=50)

    @rule(wanted=st.sampled_from(LIMIT_SETS), whole=st.booleans())
    def change_limits(self, wanted: tuple[Limit, ...], whole: bool) -> None:
        self.world.store.write(lanes.set_limits, wanted, "a test")
        self.limits = wanted
        self.changes += 1
        while whole and self.world.store.write(lanes.reshape, 3):
            pass

    @rule()
    def reshape(self) -> None:
        self.world.store.write(lanes.reshape, 2)

    # -- what must never be ---------------------------------------------------------------------------------

    def key(self, limit: Limit, user: str | None, app: str) -> tuple[str, ...] | None:
        fields = {"username": user, "app_id": app}
        values = tuple(fields[name] for name in limit.fields)
        return None if None in values else values  # type: ignore[return-value]

    def running(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """How many tasks run of each key of each limit, by the rows of the tasks alone."""
        rows = self.world.rows("SELECT id FROM af_crawl_tasks WHERE status IN ('assigned', 'running')")
        found: dict[tuple[str, tuple[str, ...]], int] = {}
        for row in rows:
            for one in self.limits:
                key = self.key(one, *self.tasks[row["id"]])
                if key is not None:
                    found[one.name, key] = found.get((one.name, key), 0) + 1
        return found

    def check_running(self, before: dict[tuple[str, tuple[str, ...]], int]) -> None:
        """A limit that came when more were running lets none start; else it is never passed."""
        most = {one.name: one.max_running for one in self.limits}
        for (name, key), n in self.running().items():
            if most[name] is not None:
                assert n <= max(most[name] or 0, before.get((name, key), 0)), f"{n} run of {name} {key}"

    def check_starts(self, start: Start) -> None:
        for one in self.limits:
            key = self.key(one, start.user, start.app)
            if key is None:
                continue
            same = [other for other in self.starts if self.key(one, other.user, other.app) == key]
            if one.max_starts is not None and one.window_seconds is not None:
                n = sum(other.real > start.real - one.window_seconds for other in same)
                assert n <= one.max_starts, f"{n} starts of {one.name} {key} in {one.window_seconds} s"
            if one.max_starts_per_day is not None:
                for day in ("wall_day", "now_day"):
                    n = sum(getattr(o, day) == getattr(start, day) and o.since == start.since for o in same)
                    assert n <= one.max_starts_per_day, f"{n} starts of {one.name} {key} on one {day}"

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "world"):
            self.world.check_books()


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    max_examples=int(os.environ.get("AF_TEST_WALKS", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="AF_TEST_WALKS" not in os.environ,
    database=None,
)
