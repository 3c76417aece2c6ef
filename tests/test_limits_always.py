"""Whatever happens in whatever order, no limit is broken, no task is accepted twice, and none waits for ever.

A random walk (hypothesis) over the real store and dispatcher: submits, pulls whose replies may be lost, reports alone
and together, closings, heartbeats, losses, late starts, restarts, clocks that are set, limits that change half-way. A
model beside it, which knows nothing of how limits are counted, checks every start by a clock of its own, which nobody
can set.
"""

from __future__ import annotations

import json
import os
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from world import World

import db
import judging
import lanes
import limits
from devices import Held
from dispatcher import Delivery
from limits import Limit

DAY = 86400
MEMORY = Path("/dev/shm")  # a disk would only wait: what a power cut leaves is no matter here
TYPES = ("echo", "list")
USERS = ("joe", "ann", None)
APPS = ("a", "b")
DEVICES = ("shop-1", "shop-2")
LONG_AFTER = 32 * DAY  # every window, day and closing is over
# What a device may say of a closing: nothing, the fields that were refused, or a limit's name.
CLOSINGS: tuple[dict[str, Any], ...] = (
    {},
    {"limit_key": ("username",)},
    {"limit_key": ("username", "app_id")},
    {"limit_key": ("task_type", "username")},
    {"limit_key": ("task_type",)},
    {"limit_name": "user"},
    {"limit_name": "no-such"},
)

Key = tuple[str, ...]


class Kind(NamedTuple):
    """Of a task, what limits may ask for."""

    task_type: str
    username: str | None
    app_id: str


class Start(NamedTuple):
    real: float
    wall_day: int
    now_day: int
    since: int
    """the number of changes of limits before it"""
    kind: Kind


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
    (limit("user", "username", task_type="list", max_running=1), limit("lists", task_type="li*", max_starts_per_day=5)),
    (limit("lists", task_type="list", max_running=2), limit("pair", "app_id", "username", task_type="echo")),
)


class Fleet:
    """`real` is the time that passes whatever the clocks say."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self.real = 0.0
        self.starts: list[Start] = []
        self.started: dict[int, str] = {}
        """assignment -> its lease"""
        self.out: list[tuple[str, Delivery]] = []
        """what has reached a device; what was reported stays in it"""
        self.pulls = dict.fromkeys(DEVICES, 0)
        self.received = dict.fromkeys(DEVICES, 0)
        self.accepted: dict[int, int] = {}
        self.tasks: dict[int, Kind] = {}
        self.limits: tuple[Limit, ...] = ()
        self.changes = 0
        self.closed: dict[tuple[str, str, Key, Key], float] = {}
        self.register()

    def register(self) -> None:
        for device_id in DEVICES:
            self.world.register(device_id, max_concurrent_tasks=50, task_types=TYPES)

    # -- what may happen ------------------------------------------------------------------------------------

    def submit(self, kind: Kind, n: int, priority: int) -> None:
        for _ in range(n):
            self.tasks[
                self.world.submit(**kind._asdict(), priority=priority, max_retry_count=50, give_up_seconds=1000.0 * DAY)
            ] = kind

    def pull(self, device_id: str, n: int, is_lost: bool, ahead: int) -> None:
        """`is_lost`: the reply never arrives, so the next one has to bring the same again."""
        before = self.running()
        self.pulls[device_id] += 1
        seq, ack = self.pulls[device_id], self.received[device_id]
        for task in self.world.pull(
            device_id, limit=n, seq=seq, ack=ack, ahead=dict.fromkeys(TYPES, ahead) if ahead else {}
        ):
            if not is_lost:
                self.out.append((device_id, task))
            if task.assignment_id in self.started:
                assert self.started[task.assignment_id] == task.lease_id
                continue
            self.note_start(task)
        if not is_lost:
            self.received[device_id] = seq
        self.check_running(before)

    def report(self, n: int, outcome: str, can_retry: bool, closed: float | None, says: dict[str, Any]) -> None:
        """Also late, and also again: what was reported stays in the list."""
        if not self.out:
            return
        device_id, task = self.out[n % len(self.out)]
        before = self.running()
        facts: dict[str, Any] = {"delay_seconds": 1.0, "can_retry": can_retry}
        if closed is not None and outcome in ("failed", "snoozed"):
            facts |= {"limit_closed_seconds": closed, **says}
        judged = self.world.report(task, outcome, device_id, **facts)
        self.note_end(task.id, outcome, judged)
        if judged.outcome == "accepted" and "limit_closed_seconds" in facts:
            self.note_closing(self.tasks[task.id], facts)
        self.check_running(before)

    def report_together(self, device_id: str, entries: list[tuple[int, str]]) -> None:
        """Many of one request, the same attempt more than once among them."""
        own = [task for holder, task in self.out if holder == device_id]
        said = [(own[n % len(own)], outcome) for n, outcome in entries] if own else []
        before = self.running()
        reports = [db.Report(task.assignment_id, task.lease_id, outcome) for task, outcome in said]
        for (task, outcome), judged in zip(
            said, self.world.store.write(judging.apply_reports, device_id, reports), strict=True
        ):
            self.note_end(task.id, outcome, judged)
        self.check_running(before)

    def beat(self, device_id: str, which: int, phase: str) -> None:
        """A device says what it holds: also what it was told to stop, or nothing of what it has."""
        before = self.running()
        own = {task.assignment_id: task for holder, task in self.out if holder == device_id}
        holding = [
            Held(task.assignment_id, task.lease_id, phase)
            for n, task in enumerate(own.values())
            if which >> (n % 10) & 1
        ]
        self.world.beat(device_id, tuple(holding))
        self.check_running(before)

    def release(self, n: int, reason: str) -> None:
        if self.out:
            self.world.release(self.out[n % len(self.out)][1], reason)

    def cancel_or_requeue(self, n: int, again: bool) -> None:
        if self.tasks:
            task_id = list(self.tasks)[n % len(self.tasks)]
            self.world.store.write(db.requeue if again else db.cancel, task_id)

    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.real += seconds
        self.world.store.write(db.promote)
        self.world.store.write(limits.forget_starts, 100)
        self.world.store.write(limits.forget_keys, 0, 100)
        self.world.store.write(lanes.forget_idle_lanes, 100)

    def look_early(self) -> None:
        """Keys that are looked at before their time must say the same as at their time."""
        self.world.store.write(lambda tx: tx.execute("UPDATE af_limit_key SET look_at = 0"))

    def set_the_wall_clock(self, offset: float) -> None:
        self.world.wall_offset = offset

    def restart(self, jump: float) -> None:
        self.world.reopen(jump)
        self.register()

    def change_limits(self, wanted: tuple[Limit, ...], whole: bool) -> None:
        self.world.store.write(lanes.set_limits, wanted, "a test")
        self.limits = wanted
        self.changes += 1
        kept = {(one.name, one.task_type, one.fields) for one in wanted}
        self.closed = {known: until for known, until in self.closed.items() if known[:3] in kept}
        while whole and self.world.store.write(lanes.reshape, 3):
            pass

    def reshape(self) -> None:
        self.world.store.write(lanes.reshape, 2)

    def open_what_was_closed(self, name: str, user: str | None) -> None:
        value = None if user is None else json.dumps([user])
        self.world.store.write(limits.open_keys, name, value)
        self.closed = {
            known: until
            for known, until in self.closed.items()
            if known[0] != name or (user is not None and known[3] != (user,))
        }

    def come_to_an_end(self) -> None:
        """With a device that works, and time enough, nothing is left: no key stays closed without a reason."""
        self.world.wall_offset = 0.0
        for _, task in self.out:
            self.world.release(task, "handed_back")
        while self.world.lose():
            pass
        self.wait_and_reshape(LONG_AFTER)
        self.world.register("shop-3", max_concurrent_tasks=1000, task_types=TYPES)
        while self.world.rows("SELECT 1 FROM af_crawl_tasks WHERE finished_at IS NULL LIMIT 1"):
            tasks = self.world.pull("shop-3", limit=1000)
            assert tasks, "tasks wait and nothing holds them"
            for task in tasks:
                self.note_start(task)
            for task in tasks:
                self.note_end(task.id, "completed", self.world.report(task, "completed", "shop-3"))
            self.wait_and_reshape(DAY)

    def wait_and_reshape(self, seconds: float) -> None:
        """What the master does by itself as time passes."""
        self.wait(seconds)
        while self.world.store.write(lanes.reshape, 100):
            pass

    # -- what the model remembers ---------------------------------------------------------------------------

    def note_start(self, task: Delivery) -> None:
        self.started[task.assignment_id] = task.lease_id
        now, wall = self.world.now, self.world.now + self.world.wall_offset
        start = Start(self.real, int(wall // DAY), int(now // DAY), self.changes, self.tasks[task.id])
        self.starts.append(start)
        self.check_start(start)

    def note_end(self, task_id: int, outcome: str, judged: db.Judged) -> None:
        if judged.outcome == "accepted" and outcome == "completed":
            self.accepted[task_id] = self.accepted.get(task_id, 0) + 1
            assert self.accepted[task_id] == 1, "a task was accepted twice"

    def note_closing(self, kind: Kind, facts: dict[str, Any]) -> None:
        """By the documents: a limit by its name, or each whose key has all the fields that were refused."""
        for one in self.limits:
            key = self.key(one, kind)
            has = {*one.fields, *(["task_type"] if one.task_type == kind.task_type else [])}
            named, refused = facts.get("limit_name"), facts.get("limit_key", ())
            is_meant = one.name == named if named else has.issuperset(refused) if refused else bool(one.fields)
            if key is not None and is_meant:
                known = (one.name, one.task_type, one.fields, key)
                self.closed[known] = max(self.closed.get(known, 0.0), self.real + facts["limit_closed_seconds"])

    # -- what must never be ---------------------------------------------------------------------------------

    def key(self, limit: Limit, kind: Kind) -> Key | None:
        """The value that a task of this kind is counted by; None where the limit is not about it."""
        values = tuple(getattr(kind, name) for name in limit.fields)
        return None if None in values or not fnmatchcase(kind.task_type, limit.task_type) else values

    def running(self) -> dict[tuple[str, Key], int]:
        """How many tasks run of each key of each limit, by the rows of the tasks alone."""
        rows = self.world.rows("SELECT id FROM af_crawl_tasks WHERE status IN ('assigned', 'running')")
        found: dict[tuple[str, Key], int] = {}
        for row in rows:
            for one in self.limits:
                key = self.key(one, self.tasks[row["id"]])
                if key is not None:
                    found[one.name, key] = found.get((one.name, key), 0) + 1
        return found

    def check_running(self, before: dict[tuple[str, Key], int]) -> None:
        """A limit that came when more were running lets none start; else it is never passed."""
        most = {one.name: one.max_running for one in self.limits}
        for (name, key), n in self.running().items():
            if most[name] is not None:
                assert n <= max(most[name] or 0, before.get((name, key), 0)), f"{n} run of {name} {key}"

    def check_start(self, start: Start) -> None:
        for one in self.limits:
            key = self.key(one, start.kind)
            if key is None:
                continue
            assert self.closed.get((one.name, one.task_type, one.fields, key), 0.0) <= start.real, (
                f"{one.name} is closed"
            )
            same = [other for other in self.starts if self.key(one, other.kind) == key]
            if one.max_starts is not None and one.window_seconds is not None:
                n = sum(other.real > start.real - one.window_seconds for other in same)
                assert n <= one.max_starts, f"{n} starts of {one.name} {key} in {one.window_seconds} s"
            if one.max_starts_per_day is not None:
                for day in ("wall_day", "now_day"):
                    n = sum(getattr(o, day) == getattr(start, day) and o.since == start.since for o in same)
                    assert n <= one.max_starts_per_day, f"{n} starts of {one.name} {key} on one {day}"


# -- the walk ------------------------------------------------------------------------------------------------------

NUMBER = st.integers(0, 1000)
DEVICE = st.sampled_from(DEVICES)
OUTCOMES = ("running", "running", "completed", "completed", "failed", "failed", "snoozed", "snoozed", "released")
CLOSED_SECONDS = st.sampled_from([None, 5.0, 200.0])
KIND = st.builds(Kind, st.sampled_from(TYPES), st.sampled_from(USERS), st.sampled_from(APPS))
ENTRIES = st.lists(st.tuples(NUMBER, st.sampled_from(["running", "completed", "completed", "failed"])), min_size=2)

STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "reshape": (1, {}),  # first, because a shorter way to a failure is found where most steps do next to nothing
    "submit": (4, {"kind": KIND, "n": st.integers(1, 4), "priority": st.integers(4, 6)}),
    "pull": (8, {"device_id": DEVICE, "n": st.integers(1, 8), "is_lost": st.sampled_from([False, False, False, True]),
                 "ahead": st.sampled_from([0, 5])}),
    "report": (8, {"n": NUMBER, "outcome": st.sampled_from(OUTCOMES), "can_retry": st.sampled_from([True, True, False]),
                   "closed": CLOSED_SECONDS, "says": st.sampled_from(CLOSINGS)}),
    "report_together": (2, {"device_id": DEVICE, "entries": ENTRIES}),
    "beat": (2, {"device_id": DEVICE, "which": st.integers(0, 1023), "phase": st.sampled_from(["queued", "running"])}),
    "release": (2, {"n": NUMBER, "reason": st.sampled_from(["lost", "timeout", "handed_back"])}),
    "cancel_or_requeue": (1, {"n": NUMBER, "again": st.booleans()}),
    "wait": (4, {"seconds": st.sampled_from([0.5, 1.0, 5.0, 10.0, 59.0, 60.0, 3600.0, 40000.0])}),
    "look_early": (1, {}),
    "set_the_wall_clock": (2, {"offset": st.sampled_from([0.0, 3600.0, -3600.0, 1.5 * DAY, -1.5 * DAY])}),
    "restart": (1, {"jump": st.sampled_from([0.0, 0.0, -30.0, 90.0, 7200.0])}),
    "change_limits": (1, {"wanted": st.sampled_from(LIMIT_SETS), "whole": st.booleans()}),
    "open_what_was_closed": (1, {"name": st.sampled_from(["user", "app", "pair"]), "user": st.sampled_from([None, "joe"])}),
}  # fmt: skip
"""Each step that a walk may take: how often, and with what."""
TAKEN = {name: st.tuples(st.just(name), st.fixed_dictionaries(facts)) for name, (_, facts) in STEPS.items()}
STEP = st.sampled_from([name for name, (often, _) in STEPS.items() for _ in range(often)]).flatmap(TAKEN.__getitem__)


def walk(first: tuple[Limit, ...], steps: list[tuple[str, dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        fleet = Fleet(Path(folder))
        try:
            fleet.change_limits(first, True)
            for name, facts in steps:
                getattr(fleet, name)(**facts)
                fleet.world.check_books()
            fleet.come_to_an_end()
            fleet.world.check_books()
        finally:
            fleet.world.close()


def walks(count: int, *, is_new: bool = False) -> Any:
    """The same ones each time, so that nothing fails by chance; AF_TEST_WALKS=1000 takes so many new ones, and then
    looks for a shorter way to what it found, which may take minutes."""
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not is_new,
        phases=[Phase.generate, Phase.shrink] if is_new else [Phase.generate],
        database=None,
    )


@walks(int(os.environ.get("AF_TEST_WALKS", "8")), is_new="AF_TEST_WALKS" in os.environ)
@given(first=st.sampled_from(LIMIT_SETS), steps=st.lists(STEP, min_size=40, max_size=80))
def test_no_limit_is_broken_and_no_task_is_accepted_twice(
    first: tuple[Limit, ...], steps: list[tuple[str, dict[str, Any]]]
) -> None:
    walk(first, steps)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@walks(40)
@given(first=st.sampled_from(LIMIT_SETS), steps=st.lists(STEP, min_size=100, max_size=200))
def test_not_in_longer_walks_either(first: tuple[Limit, ...], steps: list[tuple[str, dict[str, Any]]]) -> None:
    walk(first, steps)
