"""Does the real store do what the contract says, whatever happens in whatever order?

A random walk (hypothesis) does the same to db.py, devices.py and the dispatcher and to a model in plain Python
(model.py), and after every step all that the store knows of tasks, attempts, devices and counts must be what the model
says. The master may be killed at any moment: then its files are taken as they lie, in the middle of a transaction too.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from model import ACTIVE, Attempt, Model, Task
from world import START, World

import db
import devices
import judging
import lanes
import retention
from dispatcher import Delivery
from scheduler import Scheduler, Times
from transaction import Tx

MEMORY = Path("/dev/shm")  # what a power cut leaves is no matter here
DEVICES = ("shop-1", "shop-2", "shop-3")
DEVICE_TIMEOUT = 300.0
FEWEST_SECONDS_BETWEEN_BOOTS = 151.0  # three in five minutes would be a conflict, which tests of its own have

NUMBER = st.integers(0, 1000)
DEVICE = st.sampled_from(DEVICES)
DELAY = st.sampled_from([None, 1.0, 40.0, 5000.0])
KEY = st.sampled_from([None, None, "k1", "k2", "k3"])
NEW_TASK = st.fixed_dictionaries(
    {"unique_key": KEY, "priority": st.integers(4, 6), "batch": st.sampled_from(["", "a", "b"])},
    optional={
        "max_retry_count": st.integers(0, 2),
        "execution_timeout": st.sampled_from([1, 60]),
        "give_up_seconds": st.sampled_from([30.0, 4000.0]),
        "pinned_device_id": DEVICE,
        "requeue_if_failed": st.just(True),
        "later": st.sampled_from([-5.0, 20.0, 400.0]),
    },
)
OUTCOME = st.sampled_from(["running", "running", "completed", "completed", "failed", "snoozed", "released"])


def step(often: int, **strategies: Any) -> Any:
    """Something that may happen, so often among the others. Not rules each, of which hypothesis leaves many out in every
    walk: a loss that counts needs a submit, a pull, a start and a silence."""

    def make(method: Any) -> Any:
        method.often, method.strategies = often, strategies
        return method

    return make


class NoChance(random.Random):
    """Backoff without its random part, so that the model can say when a retry is due."""

    def random(self) -> float:
        return 0.0


class Undone(Exception):
    """Ends a job whose transaction is to leave no trace."""


class Killed(World):
    """A world whose master can be killed: what its files held at that moment is what the next one finds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self.lives = folder, 0

    def _open(self) -> None:
        super()._open()
        self.store._rng = NoChance()
        times = Times(**{**{one.name: 1000.0 for one in fields(Times)}, "device_timeout": DEVICE_TIMEOUT})
        self.scheduler = Scheduler(self.store, self.dispatcher, self.presence, times)
        self.reader = sqlite3.connect(self.path)

    def close(self) -> None:
        self.reader.close()
        super().close()

    def kill(self, jump: float, unfinished: Any = None) -> None:
        """`unfinished` is a verb whose transaction the kill cuts off, half of it in the WAL already."""
        self.lives += 1
        found = self.folder / str(self.lives) / "distribution.db"
        found.parent.mkdir()

        def take_files(tx: Tx) -> None:
            if unfinished is not None:
                tx.execute("PRAGMA cache_size = 1")
                with contextlib.suppress(Undone):
                    unfinished(tx)
                tx.flush()
            for end in ("", "-wal"):
                shutil.copyfile(f"{self.path}{end}", f"{found}{end}")
            raise Undone

        with pytest.raises(Undone):
            self.store.write(take_files)
        old = self.path.parent
        self.close()
        if old != self.folder:
            shutil.rmtree(old)
        self.path = found
        self.now += 1.0 + jump
        self.jumped += jump
        self._open()


def release_attempt(tx: Tx, assignment_id: int, reason: str) -> str | None:
    found = db.get_attempt(tx, assignment_id)
    return db.release(tx, found, reason) if found else None


class Lives(RuleBasedStateMachine):
    """Each step does one thing to both, and compares the answers; `agree` compares everything."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.world = Killed(self.folder)
        self.model = Model(START, DEVICES, DEVICE_TIMEOUT)
        self.out: list[tuple[str, int, str]] = []
        """(device, assignment, lease): what has reached a device, for ever; so reports may be late, or come again"""
        self.pulls, self.received = dict.fromkeys(DEVICES, 0), dict.fromkeys(DEVICES, 0)

    def teardown(self) -> None:
        self.world.close()
        shutil.rmtree(self.folder)

    def write(self, verb: Any, *args: Any, **more: Any) -> Any:
        return self.world.store.write(verb, *args, **more)

    def any_task(self, n: int) -> int:
        return sorted(self.model.tasks)[n % len(self.model.tasks)] if self.model.tasks else 1

    @rule(taken=st.deferred(lambda: STEP))
    def take(self, taken: tuple[str, dict[str, Any]]) -> None:
        name, facts = taken
        getattr(self, name)(**facts)

    # -- submitting, and what a person asks for -------------------------------------------------------------------

    @initialize()
    def devices_come(self) -> None:
        for device_id in DEVICES:
            self.register(device_id, True, 0, "running")
        self.submit([{"priority": priority, "batch": batch} for priority in (5, 6) for batch in ("", "a")])

    def new_task(self, facts: dict[str, Any]) -> dict[str, Any]:
        facts = dict(facts)
        if "later" in facts:
            facts["run_at"] = self.model.wall + facts.pop("later")
        return facts

    @step(3, new=st.lists(NEW_TASK, min_size=1, max_size=5))
    def submit(self, new: list[dict[str, Any]]) -> None:
        tasks = [self.new_task(facts) for facts in new]
        answers = self.write(db.submit, [db.NewTask("echo", **facts) for facts in tasks])
        assert [tuple(answer) for answer in answers] == [self.model.submit(facts) for facts in tasks]

    @step(1, n=NUMBER)
    def cancel(self, n: int) -> None:
        assert self.write(db.cancel, self.any_task(n)) == self.model.cancel(self.any_task(n))

    @step(1, n=NUMBER)
    def requeue(self, n: int) -> None:
        assert self.write(db.requeue, self.any_task(n)) == self.model.requeue(self.any_task(n))

    @step(1, n=NUMBER)
    def requeue_what_has_failed(self, n: int) -> None:
        ended = [t.id for t in self.model.tasks.values() if t.status in ("failed", "cancelled")]
        if ended:
            task_id = ended[n % len(ended)]
            assert self.write(db.requeue, task_id) == self.model.requeue(task_id) == "pending"

    @step(1, n=NUMBER, device_id=DEVICE)
    def pin(self, n: int, device_id: str) -> None:
        assert self.write(db.pin, self.any_task(n), device_id) == self.model.pin(self.any_task(n), device_id)

    @step(1, batch=st.sampled_from(["a", "b"]), state=st.sampled_from(["paused", "open", "open"]))
    def set_batch_state(self, batch: str, state: str) -> None:
        is_known = self.write(db.set_batch_state, batch, state)
        assert is_known is (batch in self.model.batches)
        if is_known:
            (self.model.paused.add if state == "paused" else self.model.paused.discard)(batch)

    # -- attempts -------------------------------------------------------------------------------------------------

    @step(8, device_id=DEVICE, limit=st.integers(0, 4), is_numbered=st.booleans(), is_lost=st.sampled_from([False, False, True]),
          ahead=st.sampled_from([0, 0, 3]))  # fmt: skip
    def pull(self, device_id: str, limit: int, is_numbered: bool, is_lost: bool, ahead: int) -> None:
        """`is_lost`: the reply never arrives, so the next one has to bring the same again."""
        device = self.model.devices[device_id]
        boot = self.world.boots[device_id]
        ahead_of = {"echo": ahead} if ahead else {}
        if not device.is_there:
            with pytest.raises(devices.UnknownDevice):
                self.world.dispatcher.pull(device_id, boot, limit, 0.0, ahead=ahead_of)
            return
        seq = ack = None
        if is_numbered:
            self.pulls[device_id] += 1
            seq, ack = self.pulls[device_id], self.received[device_id]
        reply = self.world.dispatcher.pull(device_id, boot, limit, 0.0, seq=seq, ack=ack, ahead=ahead_of)
        self.model.hear(device_id)
        again = self.model.acknowledge(device_id, ack) if ack is not None else []
        cancels, device.cancels = device.cancels, []
        if again or cancels:
            said = [(task.id, task.assignment_id, task.lease_id) for task in reply.tasks]
            assert said == [(a.task_id, a.id, a.lease_id) for a in again] and reply.cancel == cancels
        else:
            self.check_dispatch(device_id, limit, ahead, reply.tasks)
            for task in sorted(reply.tasks, key=lambda task: task.assignment_id):
                self.model.assign(task.id, device_id, task.assignment_id, task.lease_id, seq, task.start_within)
        if is_lost and is_numbered:
            return
        self.out += [(device_id, task.assignment_id, task.lease_id) for task in reply.tasks]
        if seq is not None:
            self.received[device_id] = seq

    def check_dispatch(self, device_id: str, limit: int, ahead: int, given: list[Delivery]) -> None:
        """Nothing is held back without a reason; the highest priority first, and the oldest of a lane."""
        if self.model.devices[device_id].failures_in_a_row >= 5:  # it must not eat the queue
            limit, ahead = min(limit, 0 if self.model.held_by(device_id) else 1), 0
        waiting = self.model.waiting_for(device_id)
        at_once = [task for task in given if task.start_within is None]
        assert len(at_once) == min(limit, len(waiting))
        assert len(given) - len(at_once) <= ahead
        taken = {task.id for task in given}
        left = [task for task in waiting if task.id not in taken]
        assert min((task.priority for task in at_once), default=10) >= max((task.priority for task in left), default=0)
        for lane in {(task.batch, task.pinned_device_id) for task in waiting}:
            order = [task.id in taken for task in waiting if (task.batch, task.pinned_device_id) == lane]
            assert order == sorted(order, reverse=True), "a younger task of a lane went before an older one"

    @step(2, n=NUMBER, device_id=DEVICE)
    def assign(self, n: int, device_id: str) -> None:
        """The verb alone, which asks nobody whether the device fits."""
        task_id = self.any_task(n)
        if not self.model.devices[device_id].is_there:
            return

        def run(tx: Tx) -> list[db.Assigned]:
            task = db.get_task(tx, task_id)
            return db.assign(tx, [task], db.Gift(device_id, None, True)) if task else []

        given = self.write(run)
        task = self.model.tasks.get(task_id)
        assert len(given) == (task is not None and task.status == "pending")
        for assignment_id, lease_id, attempt in given:
            self.model.assign(task_id, device_id, assignment_id, lease_id, None)
            assert attempt == self.model.tasks[task_id].attempt_count
            self.out.append((device_id, assignment_id, lease_id))

    def report_of(self, assignment_id: int, lease_id: str, outcome: str, facts: dict[str, Any]) -> db.Report:
        new = tuple(db.NewTask("echo", **task) for task in facts.get("new_tasks", ()))
        return db.Report(assignment_id, lease_id, outcome, **{**facts, "new_tasks": new})

    def facts_of(
        self, outcome: str, delay: float | None, can_retry: bool, new: list[dict[str, Any]], n: int
    ) -> dict[str, Any]:
        if outcome == "completed":
            return {"result": f'"{n}"', "new_tasks": tuple(map(self.new_task, new))}
        if outcome == "failed":
            return {"delay_seconds": delay, "can_retry": can_retry}
        return {"delay_seconds": delay or 15.0} if outcome == "snoozed" else {}

    @step(4, n=NUMBER, outcome=OUTCOME, delay=DELAY, can_retry=st.sampled_from([True, True, True, False]),
          new=st.lists(NEW_TASK, max_size=2))  # fmt: skip
    def report(self, n: int, outcome: str, delay: float | None, can_retry: bool, new: list[dict[str, Any]]) -> None:
        """Of anything that any device ever got: in time, late, or again."""
        if self.out:
            self.say(self.out[n % len(self.out)], outcome, self.facts_of(outcome, delay, can_retry, new, n))

    @step(8, n=NUMBER, outcome=OUTCOME, delay=DELAY, can_retry=st.booleans())
    def report_of_what_runs(self, n: int, outcome: str, delay: float | None, can_retry: bool) -> None:
        held = [a for a in self.model.attempts.values() if a.status in ACTIVE]
        if held:
            attempt = held[n % len(held)]
            facts = self.facts_of(outcome, delay, can_retry, [], n)
            self.say((attempt.device_id, attempt.id, attempt.lease_id), outcome, facts)

    @step(3, n=NUMBER, outcome=OUTCOME)
    def late_report(self, n: int, outcome: str) -> None:
        """Of the newest attempt of a task that was taken back."""
        newest = [self.model.attempts.get(task.assignment_id or 0) for task in self.model.tasks.values()]
        late = [a for a in newest if a is not None and a.status not in (*ACTIVE, "completed")]
        if late:
            attempt = late[n % len(late)]
            what = (attempt.device_id, attempt.id, attempt.lease_id)
            self.say(what, outcome, self.facts_of(outcome, None, True, [], n))

    def say(self, what: tuple[str, int, str], outcome: str, facts: dict[str, Any]) -> None:
        device_id, assignment_id, lease_id = what
        report = self.report_of(assignment_id, lease_id, outcome, facts)
        judged = self.write(judging.apply_report, device_id, report)
        assert judged.outcome == self.model.judge(device_id, assignment_id, lease_id, outcome, **facts)

    @step(1, n=NUMBER, outcome=OUTCOME, mistake=st.sampled_from(["lease", "device", "number"]))
    def report_by_a_stranger(self, n: int, outcome: str, mistake: str) -> None:
        if not self.out:
            return
        device_id, assignment_id, lease_id = self.out[n % len(self.out)]
        if mistake == "lease":
            lease_id = "0" * 32
        elif mistake == "device":
            device_id = "nobody"
        else:
            assignment_id += 100_000
        facts = self.facts_of(outcome, None, True, [], n)
        judged = self.write(judging.apply_report, device_id, self.report_of(assignment_id, lease_id, outcome, facts))
        said = self.model.judge(device_id, assignment_id, lease_id, outcome, **facts)
        assert judged.outcome == said and said in ("gone", "stale")

    @step(2, device_id=DEVICE, entries=st.lists(st.tuples(NUMBER, OUTCOME), min_size=2, max_size=8))
    def report_together(self, device_id: str, entries: list[tuple[int, str]]) -> None:
        """Many of one request, the same attempt more than once among them."""
        own = [what for what in self.out if what[0] == device_id][-6:]
        if not own:
            return
        said = [(*own[n % len(own)], outcome, self.facts_of(outcome, None, True, [], n)) for n, outcome in entries]
        reports = [self.report_of(n, lease, outcome, facts) for _, n, lease, outcome, facts in said]
        judged = [answer.outcome for answer in self.write(judging.apply_reports, device_id, reports)]
        assert judged == [self.model.judge(who, n, lease, outcome, **facts) for who, n, lease, outcome, facts in said]

    @step(4, n=NUMBER, reason=st.sampled_from(["lost", "lost", "timeout", "handed_back"]))
    def release(self, n: int, reason: str) -> None:
        attempts = [a for a in self.model.attempts.values() if a.status == "running"]
        attempts = attempts or list(self.model.attempts.values())[-8:]
        if not attempts:
            return
        attempt = attempts[n % len(attempts)]
        assert (self.write(release_attempt, attempt.id, reason) is not None) is self.model.release(attempt, reason)

    # -- devices --------------------------------------------------------------------------------------------------

    def holding(self, device_id: str, which: int, phase: str) -> tuple[tuple[int, str, str], ...]:
        """Some of what it ever got: also what it was told to stop, or nothing of what it has."""
        own = list(dict.fromkeys((n, lease) for holder, n, lease in self.out if holder == device_id))[-8:]
        return tuple((n, lease, phase) for at, (n, lease) in enumerate(own) if which >> at & 1)

    @step(2, device_id=DEVICE, is_new=st.booleans(), which=st.integers(0, 255),
          phase=st.sampled_from(["queued", "running", "reporting"]))  # fmt: skip
    def register(self, device_id: str, is_new: bool, which: int, phase: str) -> None:
        device = self.model.devices[device_id]
        is_soon = self.model.now - device.boot_at < FEWEST_SECONDS_BETWEEN_BOOTS
        boot = device.boot + 1 if not device.is_there or (is_new and not is_soon) else device.boot
        holding = self.holding(device_id, which, phase)
        held = tuple(devices.Held(*line) for line in holding)
        registered = self.world.register(device_id, f"boot-{boot}", holding=held)
        stopped = self.model.register(device_id, boot, holding)
        assert registered.cancel == stopped
        assert registered.keep == [n for n, _, _ in holding if n not in stopped]

    @step(
        2,
        device_id=DEVICE,
        which=st.one_of(st.none(), st.integers(0, 255)),
        phase=st.sampled_from(["queued", "running"]),
    )
    def beat(self, device_id: str, which: int | None, phase: str) -> None:
        """`which` None: only a sign of life."""
        if not self.model.devices[device_id].is_there:
            return
        holding = None if which is None else self.holding(device_id, which, phase)
        held = None if holding is None else tuple(devices.Held(*line) for line in holding)
        assert self.world.beat(device_id, held) == self.model.beat(device_id, holding)

    @step(3, device_id=DEVICE, phase=st.sampled_from(["queued", "running"]))
    def beat_of_a_device_that_holds_what_it_should(self, device_id: str, phase: str) -> None:
        self.beat(device_id, 255, phase)

    @step(2, device_id=DEVICE)
    def come_back_with_what_it_should_hold(self, device_id: str) -> None:
        """A new process of the device, that has found what the one before it held."""
        self.register(device_id, True, 255, "queued")

    @step(1, device_id=DEVICE)
    def beat_that_was_overtaken(self, device_id: str) -> None:
        if self.model.devices[device_id].is_there:
            late = devices.Beat(self.world.boots[device_id], 0, ())
            assert self.write(devices.beat, self.world.presence, device_id, late, keep_history=False).cancel == []
            self.model.hear(device_id)

    @step(1, device_id=DEVICE)
    def say_goodbye(self, device_id: str) -> None:
        if self.model.devices[device_id].is_there:
            assert self.world.beat(device_id, (), is_leaving=True) == []
            self.model.say_goodbye(device_id)

    # -- time -----------------------------------------------------------------------------------------------------

    @step(4, seconds=st.sampled_from([0.0, 1.0, 6.0, 8.0, 31.0, 95.0, 160.0, 301.0, 4000.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.model.now += seconds
        jobs = self.world.scheduler
        for job in (jobs.promote_due, jobs.release_overdue, jobs.write_beats, jobs.release_silent):
            self.write(job)
        self.write(lanes.forget_idle_lanes, 100)
        self.model.sweep()

    @step(4, device_id=DEVICE)
    def a_device_vanishes_while_it_works(self, device_id: str) -> None:
        for attempt in self.model.held_by(device_id):
            self.say((device_id, attempt.id, attempt.lease_id), "running", {})
        self.world.now += DEVICE_TIMEOUT + 1.0
        self.model.now += DEVICE_TIMEOUT + 1.0
        for other in DEVICES:
            if other != device_id:
                self.beat(other, 255, "queued")
        self.wait(0.0)

    @step(2, n=NUMBER, victims=st.lists(DEVICE, min_size=2, max_size=5))
    def a_task_takes_devices_down(self, n: int, victims: list[str]) -> None:
        waiting = [task.id for task in self.model.tasks.values() if task.status == "pending"]
        for device_id in victims if waiting else []:
            task_id = waiting[n % len(waiting)]
            self.assign(sorted(self.model.tasks).index(task_id), device_id)
            attempt = self.model.attempts.get(self.model.tasks[task_id].assignment_id or 0)
            if attempt is not None and attempt.status == "assigned":
                self.say((device_id, attempt.id, attempt.lease_id), "running", {})
                assert self.write(release_attempt, attempt.id, "lost")
                assert self.model.release(attempt, "lost")

    @step(1, offset=st.sampled_from([0.0, 3600.0, -3600.0, 86400.0]))
    def set_the_wall_clock(self, offset: float) -> None:
        self.world.wall_offset = self.model.wall_offset = offset

    @step(1, seconds=st.sampled_from([50.0, 1000.0]))
    def delete_what_ended_long_ago(self, seconds: float) -> None:
        self.write(retention.delete_finished, self.model.now - seconds)
        self.model.forget(self.model.now - seconds)

    @step(
        2,
        jump=st.sampled_from([0.0, 0.0, 90.0, 7200.0]),
        is_inside=st.booleans(),
        n=NUMBER,
        new=st.lists(NEW_TASK, min_size=1, max_size=3),
    )
    def kill_the_master(self, jump: float, is_inside: bool, n: int, new: list[dict[str, Any]]) -> None:
        """Nothing of a transaction that was not committed is there afterwards, and all of every other. One that failed
        leaves nothing either."""
        task_id = self.any_task(n)
        more = [db.NewTask("echo", **{**self.new_task(facts), "task_data": "x" * 9000}) for facts in new]

        def unfinished(tx: Tx) -> None:
            db.submit(tx, more)
            db.cancel(tx, task_id)
            db.requeue(tx, task_id)
            raise Undone

        with pytest.raises(Undone):
            self.write(unfinished)
        self.agree()
        self.world.kill(jump, unfinished if is_inside else None)
        self.model.now += 1.0
        self.model.begin_again(jump)
        self.wait(0.0)

    # -- what must be true after every step -----------------------------------------------------------------------

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.world.reader.execute(sql).fetchall()

    @invariant()
    def agree(self) -> None:
        tasks, attempts = list(self.model.tasks.values()), list(self.model.attempts.values())
        assert self.rows(TASKS_SQL) == [tuple(getattr(task, name) for name in TASK_COLUMNS) for task in tasks]
        assert self.rows(ATTEMPTS_SQL) == [tuple(getattr(a, name) for name in ATTEMPT_COLUMNS) for a in attempts]
        assert all(task.acceptances <= 1 for task in tasks), "a task was accepted twice"
        counts: Counter[tuple[str, str, str]] = Counter()
        for task in tasks:
            counts["all", "", task.status] += 1
            counts["type", "echo", task.status] += 1
            if task.batch:
                counts["batch", task.batch, task.status] += 1
        assert {row[:3]: row[3] for row in self.rows(COUNTS_SQL)} == counts
        assert self.rows(WRONG_LANES_SQL) == []
        assert self.rows(LANES_SQL) == [(counts["all", "", "pending"], sum(task.finished_at is None for task in tasks))]
        minutes = self.model.minutes
        assert self.rows(MINUTES_SQL) == [tuple(minutes[what] for what in ("completed", "failed", "lost", "snoozed"))]
        assert self.rows(DEVICES_SQL) == [
            (name, d.completed, d.failed, d.lost, d.failures_in_a_row) for name, d in self.model.devices.items()
        ]


TAKEN = {
    name: st.tuples(st.just(name), st.fixed_dictionaries(method.strategies))
    for name, method in vars(Lives).items()
    if hasattr(method, "often")
}
STEP = st.sampled_from([name for name in TAKEN for _ in range(getattr(Lives, name).often)]).flatmap(TAKEN.__getitem__)

TASK_COLUMNS = [column.name for column in fields(Task) if column.name not in ("acceptances", "result")] + ["result"]
ATTEMPT_COLUMNS = [column.name for column in fields(Attempt) if column.name != "waits_ahead"]
TASKS_SQL = f"SELECT {', '.join(TASK_COLUMNS)} FROM af_crawl_tasks LEFT JOIN af_task_result ON task_id = id ORDER BY id"
ATTEMPTS_SQL = f"SELECT {', '.join(ATTEMPT_COLUMNS)} FROM af_task_assignment ORDER BY id"
COUNTS_SQL = "SELECT scope, name, state, SUM(n) FROM af_count GROUP BY scope, name, state HAVING SUM(n) <> 0"
LANES_SQL = "SELECT COALESCE(SUM(waiting), 0), COALESCE(SUM(unfinished), 0) FROM af_lane"
WRONG_LANES_SQL = (
    "SELECT * FROM (SELECT lane.id, lane.waiting, lane.unfinished, lane.top_priority, SUM(task.status = 'pending') AS n,"
    " SUM(task.id > 0 AND task.finished_at IS NULL) AS live, MAX(CASE task.status WHEN 'pending' THEN task.priority END) AS top"
    " FROM af_lane AS lane LEFT JOIN af_crawl_tasks AS task ON task.lane_id = lane.id GROUP BY lane.id)"
    " WHERE waiting <> COALESCE(n, 0) OR unfinished <> COALESCE(live, 0) OR top_priority IS NOT top"
)
MINUTES_SQL = (
    f"SELECT {', '.join(f'COALESCE(SUM({what}), 0)' for what in ('completed', 'failed', 'lost', 'snoozed'))}"
    " FROM af_minute WHERE scope = 'all'"
)
DEVICES_SQL = "SELECT device_id, completed_count, failed_count, lost_count, consecutive_failures FROM af_device ORDER BY device_id"


def walks(count: int, steps: int, *, is_new: bool = False) -> settings:
    """The same ones each time, so that nothing fails by chance; AF_TEST_WALKS=1000 takes so many new ones, and then
    looks for a shorter way to what it found."""
    return settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not is_new,
        phases=[Phase.generate, Phase.shrink] if is_new else [Phase.generate],
        database=None,
        print_blob=False,
    )


def test_the_store_is_as_the_contract_says_after_every_step_and_every_kill() -> None:
    count = int(os.environ.get("AF_TEST_WALKS", "30"))
    run_state_machine_as_test(Lives, settings=walks(count, 100, is_new="AF_TEST_WALKS" in os.environ))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_and_after_thousands_of_longer_walks() -> None:
    run_state_machine_as_test(Lives, settings=walks(200, 200))
