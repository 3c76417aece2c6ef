"""Which waiting task goes to whom: lanes, priorities, strategies, and the pull that carries it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from world import World

import db
import devices
import lanes
import reasons
from backlog import Backlog
from dispatcher import Reply
from reads import Reads


def finish(world: World, device_id: str, tasks: list) -> None:
    for task in tasks:
        assert world.report(task, "completed", device_id).outcome == "accepted"


def test_tasks_go_out_by_priority_then_by_age(world: World) -> None:
    world.register()
    low = world.submit(priority=1)
    first, second = world.submit(), world.submit()
    high = world.submit(priority=10)
    assert [task.id for task in world.pull(limit=10)] == [high, first, second, low]


def test_priority_rules_between_lanes_too(world: World) -> None:
    world.register()
    for _ in range(3):
        world.submit(batch="a", priority=5)
    urgent = world.submit(batch="b", priority=9)
    assert world.pull(limit=1)[0].id == urgent


def test_a_big_batch_does_not_starve_a_small_one(world: World) -> None:
    world.register()
    world.store.write(db.submit, [db.NewTask("echo", batch="big") for _ in range(500)])
    small = {world.submit(batch="small") for _ in range(5)}
    first_ten = [task.id for _ in range(5) for task in world.pull(limit=2)]
    assert small <= set(first_ten)


def test_tasks_that_nobody_may_run_do_not_hold_up_the_others(world: World) -> None:
    world.register()
    world.store.write(db.submit, [db.NewTask("unknown", priority=10) for _ in range(2000)])
    mine = world.submit(priority=1)
    assert [task.id for task in world.pull(limit=5)] == [mine]


def test_a_task_type_is_never_sent_to_a_device_that_lacks_it(world: World) -> None:
    world.register("shop-1", task_types=("crawl",))
    world.submit()
    assert world.pull("shop-1", limit=5) == []


def test_required_tags_must_all_be_there(world: World) -> None:
    world.register("plain", tags=("eu",))
    world.register("able", tags=("eu", "selectors"))
    task_id = world.submit(required_tags=("selectors", "eu"))
    assert world.pull("plain") == []
    assert world.pull("able")[0].id == task_id


def test_a_pinned_task_waits_for_its_device(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    task_id = world.submit()
    assert world.store.write(db.pin, task_id, "shop-2") == "pending"
    assert world.pull("shop-1") == []
    assert world.pull("shop-2")[0].id == task_id


def test_a_paused_batch_sends_nothing_and_resumes_where_it_was(world: World) -> None:
    world.register()
    paused, other = world.submit(batch="a", priority=10), world.submit()
    world.store.write(db.set_batch_state, "a", "paused", "site is down")
    assert [task.id for task in world.pull(limit=5)] == [other]
    world.store.write(db.set_batch_state, "a", "open")
    assert [task.id for task in world.pull(limit=5)] == [paused]


def test_a_paused_lane_sends_nothing_until_it_is_resumed(world: World) -> None:
    world.register()
    task_id = world.submit()
    lane_id = world.row(task_id)["lane_id"]
    assert world.store.write(lanes.pause_lane, lane_id, "site is down")
    assert world.pull() == []
    assert world.store.write(lanes.resume_lane, lane_id)
    assert world.pull()[0].id == task_id
    assert not world.store.write(lanes.pause_lane, 999, None)


def test_draining_and_disabled_devices_get_nothing(world: World) -> None:
    world.register()
    world.submit()
    for wanted in ("draining", "disabled"):
        world.store.write(devices.set_wanted, "shop-1", wanted, None)
        reply = world.dispatcher.pull("shop-1", "boot-1", 1, 0.0)
        assert (reply.tasks, reply.drain) == ([], True)
    world.store.write(devices.set_wanted, "shop-1", "active", None)
    assert len(world.pull()) == 1


def test_a_retry_avoids_the_device_that_failed_it_while_another_asks(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    world.submit()
    world.report(world.pull("shop-1")[0], "failed", delay_seconds=1.0)
    world.now += 2
    got: dict[str, list] = {}

    def ask(device_id: str) -> None:
        got[device_id] = world.dispatcher.pull(device_id, "boot-1", 1, 60.0).tasks

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("shop-1", "shop-2")]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while not (world.dispatcher.is_asking("shop-1") and world.dispatcher.is_asking("shop-2")):
        assert time.monotonic() < until
    world.store.write(db.promote)
    threads[1].join(60)
    world.dispatcher.stop()
    threads[0].join(60)
    assert (len(got["shop-1"]), len(got["shop-2"])) == (0, 1)


def test_a_retry_goes_back_to_the_same_device_when_no_other_asks(world: World) -> None:
    world.submit()
    world.report(world.take(), "failed", delay_seconds=1.0)
    world.now += 2
    world.store.write(db.promote)
    assert len(world.pull()) == 1


def test_a_held_pull_gets_a_task_the_moment_it_is_submitted(world: World) -> None:
    world.register()
    got: list = []
    puller = threading.Thread(target=lambda: got.extend(world.dispatcher.pull("shop-1", "boot-1", 1, 20.0).tasks))
    started = time.monotonic()
    puller.start()
    while not world.dispatcher.is_asking("shop-1"):
        assert time.monotonic() - started < 60
    task_id = world.submit()
    puller.join(60)
    assert [task.id for task in got] == [task_id]


def test_a_new_pull_of_a_device_ends_its_older_one(world: World) -> None:
    world.register()
    older: list = []
    puller = threading.Thread(target=lambda: older.append(world.dispatcher.pull("shop-1", "boot-1", 1, 20.0)))
    started = time.monotonic()
    puller.start()
    while not world.dispatcher.is_asking("shop-1"):
        assert time.monotonic() - started < 60
    world.pull()
    puller.join(60)
    assert older[0].tasks == []


def test_what_was_sent_in_a_lost_reply_is_sent_again_with_the_same_lease(world: World) -> None:
    world.register()
    world.submit()
    world.submit()
    lost = world.pull(limit=1, seq=1, ack=0)
    again = world.pull(limit=5, seq=2, ack=0)
    assert again == lost
    assert world.attempt(lost[0].assignment_id)["delivered_at"] is None
    fresh = world.pull(limit=5, seq=3, ack=2)
    assert len(fresh) == 1 and fresh[0].id != lost[0].id
    assert world.attempt(lost[0].assignment_id)["delivered_at"] == world.now


def test_a_client_without_seq_counts_as_having_received(world: World) -> None:
    world.register()
    world.submit()
    delivery = world.pull()[0]
    assert world.attempt(delivery.assignment_id)["delivered_at"] == world.now
    assert world.pull() == []


def test_a_cancelled_task_reaches_its_device_with_the_open_pull(world: World) -> None:
    task_id = world.submit()
    delivery = world.take(start=True)
    replies: list = []
    puller = threading.Thread(target=lambda: replies.append(world.dispatcher.pull("shop-1", "boot-1", 0, 20.0)))
    puller.start()
    world.store.write(db.cancel, task_id)
    puller.join(60)
    assert replies[0].cancel == [delivery.assignment_id]


class HeldPull(threading.Thread):
    """A pull that is held in a thread of its own; `reply` is there when it has ended."""

    def __init__(self, world: World, limit: int, **more: Any) -> None:
        super().__init__(daemon=True)
        self.world, self.limit, self.more = world, limit, more
        self.reply: Reply | None = None
        asks = world.dispatcher._asks
        before = asks.get("shop-1")
        self.start()
        until = time.monotonic() + 60
        while self.is_alive() and (asks.get("shop-1") in (None, before) or world.dispatcher.held_polls == 0):
            assert time.monotonic() < until
            time.sleep(0.001)

    def run(self) -> None:
        self.reply = self.world.dispatcher.pull("shop-1", "boot-1", self.limit, 20.0, **self.more)

    def ended(self) -> Reply:
        self.join(60)
        assert self.reply is not None, "it is still held"
        return self.reply


def test_a_pull_with_limit_0_is_held_and_is_no_candidate(world: World) -> None:
    world.register()
    listening = HeldPull(world, 0)
    task_id = world.submit()
    assert listening.is_alive() and world.dispatcher.held_polls == 1
    assert not world.dispatcher.is_asking("shop-1")
    assert world.row(task_id)["status"] == "pending"
    assert [task.id for task in world.pull(limit=1)] == [task_id]
    assert listening.ended().tasks == []


def test_a_pull_that_a_device_left_behind_gets_nothing(world: World) -> None:
    """The last beat may overtake the pull that would have taken the open one back."""
    world.register()
    HeldPull(world, limit=1)
    world.beat(is_leaving=True)
    task_id = world.submit()
    assert world.row(task_id)["status"] == "pending"
    world.register("shop-2")
    assert [task.id for task in world.pull("shop-2")] == [task_id]


def test_a_full_device_hears_of_a_drain_and_of_its_end_at_once(world: World) -> None:
    world.register()
    for wanted, drain in (("draining", True), ("active", False)):
        listening = HeldPull(world, 0)
        world.store.write(devices.set_wanted, "shop-1", wanted, None)
        assert listening.ended().drain is drain


def test_a_drain_that_came_while_no_pull_was_open_is_said_by_the_next_one(world: World) -> None:
    world.register()
    for wanted, drain in (("draining", True), ("active", False)):
        world.store.write(devices.set_wanted, "shop-1", wanted, None)
        assert HeldPull(world, 0).ended().drain is drain
        held = HeldPull(world, 0)  # said once: the next one is held
        assert held.is_alive()
        world.dispatcher.stop()
        world.dispatcher._stopping = False
        assert held.ended().drain is drain


def test_whatever_ends_a_pull_of_a_draining_device_it_says_drain(world: World) -> None:
    world.submit()
    task = world.take(start=True)
    world.store.write(devices.set_wanted, "shop-1", "draining", None)
    assert world.dispatcher.pull("shop-1", "boot-1", 0, 0.0).drain
    assert world.dispatcher.pull("shop-1", "boot-1", 0, 0.05).drain
    listening = HeldPull(world, 0)
    newer = HeldPull(world, 0)
    assert listening.ended().drain
    world.store.write(db.cancel, task.id)
    assert (newer.ended().cancel, newer.ended().drain) == ([task.assignment_id], True)


def test_a_listening_pull_that_comes_late_does_not_end_the_one_that_asks_for_tasks(world: World) -> None:
    world.register()
    asking = HeldPull(world, 1, seq=1, ack=0)
    assert world.dispatcher.pull("shop-1", "boot-1", 0, 20.0).tasks == []  # at once
    task_id = world.submit()
    assert [task.id for task in asking.ended().tasks] == [task_id]


def test_a_numbered_pull_that_was_overtaken_ends_nothing_and_gets_nothing(world: World) -> None:
    world.register()
    asking = HeldPull(world, 1, seq=7, ack=5)
    world.dispatcher.pull("shop-1", "boot-1", 1, 20.0, seq=6, ack=5)
    task_id = world.submit()
    assert [task.id for task in asking.ended().tasks] == [task_id]
    world.submit()
    assert world.pull(limit=1, seq=6, ack=5) == []  # its number would count as received with the next ack
    assert len(world.pull(limit=1, seq=8, ack=7)) == 1


def test_a_listening_pull_neither_acknowledges_nor_repeats_a_delivery(world: World) -> None:
    world.register()
    world.submit()
    lost = world.pull(limit=1, seq=1, ack=0)
    assert HeldPull(world, 0).is_alive()
    assert world.attempt(lost[0].assignment_id)["delivered_at"] is None
    assert world.pull(limit=1, seq=2, ack=0) == lost


def test_a_device_that_counts_anew_after_it_registered_is_served(world: World) -> None:
    world.register()
    world.submit()
    world.pull(limit=0, seq=9, ack=0)
    world.dispatcher.forget_pulls("shop-1")
    assert len(world.pull(limit=1, seq=1, ack=0)) == 1


def test_a_pull_with_limit_0_counts_among_the_held_ones(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.dispatcher._max_held_polls = 1
    world.register()
    listening = HeldPull(world, 0)
    world.register("shop-2")
    assert world.dispatcher.pull("shop-2", "boot-1", 1, 20.0).next_seconds > 0
    world.dispatcher.stop()
    listening.ended()
    world.close()


def test_a_pull_of_an_unknown_device_is_refused(world: World) -> None:
    with pytest.raises(devices.UnknownDevice):
        world.dispatcher.pull("stranger", "boot-1", 1, 0.0)


def test_above_the_limit_of_held_polls_a_pull_answers_at_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.dispatcher._max_held_polls = 0
    world.register()
    reply = world.dispatcher.pull("shop-1", "boot-1", 1, 20.0)
    assert reply.tasks == [] and 2.5 <= reply.next_seconds <= 7.5
    world.close()


def test_a_stopping_dispatcher_answers_every_held_pull(world: World) -> None:
    world.register()
    replies: list = []
    puller = threading.Thread(target=lambda: replies.append(world.dispatcher.pull("shop-1", "boot-1", 1, 20.0)))
    started = time.monotonic()
    puller.start()
    while not world.dispatcher.is_asking("shop-1"):
        assert time.monotonic() - started < 60
    world.dispatcher.stop()
    puller.join(60)
    assert replies and replies[0].tasks == []


def test_a_strategy_that_raises_or_chooses_a_stranger_leaves_it_to_least_tasks(world: World) -> None:
    world.register()
    for broken in (lambda found, task: 1 / 0, lambda found, task: "nobody", lambda found, task: None):
        world.dispatcher._strategy = broken  # type: ignore[assignment]
        task_id = world.submit()
        assert world.pull()[0].id == task_id


def test_a_dispatch_that_fails_gives_nothing_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.register()
    task_id = world.submit()

    def broken(*args: object, **more: object) -> None:
        raise ValueError("in the middle of a dispatch")

    monkeypatch.setattr(db, "assign", broken)
    with pytest.raises(Exception, match="could not be stored"):
        world.pull()
    monkeypatch.undo()
    assert world.row(task_id)["status"] == "pending"
    assert world.pull()[0].id == task_id


def explain(world: World, task_id: int) -> reasons.Explanation:
    reads = Reads(world.path)
    task = reads.task(task_id)
    assert task is not None
    found = reasons.explain(
        task,
        Backlog(reads).lane_of(task_id, world.now, world.now),
        reads.batch(task["batch"]) if task["batch"] else None,
        reads.devices(world.now, 300.0),
        world.dispatcher.is_asking,
    )
    reads.close()
    return found


def test_everybody_can_see_why_a_task_waits(world: World) -> None:
    task_id = world.submit(batch="b", required_tags=("eu",))
    seen = [explain(world, task_id).reason]
    world.register("shop-1", task_types=("crawl",))
    seen.append(explain(world, task_id).reason)
    world.register("shop-2")
    seen.append(explain(world, task_id).reason)
    world.register("shop-3", tags=("eu",), max_concurrent_tasks=1)
    seen.append(explain(world, task_id).reason)
    world.now += 301
    seen.append(explain(world, task_id).reason)
    world.store.write(db.set_batch_state, "b", "paused", "site is down")
    why = explain(world, task_id)
    assert seen == ["no_device", "no_device_runs_type", "no_device_has_tags", "all_busy", "no_device_online"]
    assert why.reason == "batch_paused" and "site is down" in why.detail
    assert {line["device_id"]: line["excluded_because"] for line in why.devices} == {
        "shop-1": "does not run task type echo",
        "shop-2": "lacks the tag eu",
        "shop-3": "is offline",
    }


def test_a_scheduled_task_says_when_and_why_it_comes_back(world: World) -> None:
    task_id = world.submit()
    world.report(world.take(), "failed", error_message="connection refused")
    why = explain(world, task_id)
    assert why.reason == "scheduled" and "retry 1 of 3: connection refused" in why.detail


# -- pulls of idle devices, which open without the writer


def _commits(world: World) -> list[int]:
    """Counts the writer's groups from now on."""
    commits: list[int] = []
    dispatch = world.store.writer.before_commit
    assert dispatch is not None

    def count() -> None:
        commits.append(1)
        dispatch()

    world.store.writer.before_commit = count
    return commits


def test_a_pull_of_an_idle_device_costs_no_commit_while_nothing_waits(world: World) -> None:
    world.register()
    world.be_idle()
    assert world.pull(seq=1, ack=0) == []
    commits = _commits(world)
    assert world.pull(seq=2, ack=1) == []
    assert commits == []
    world.submit(task_type="crawl")
    assert world.pull(seq=3, ack=2) == []
    assert len(commits) == 2  # the task that nobody can run, and the pull, for which it might have been


def test_a_pull_that_was_opened_without_a_commit_gets_the_next_task(world: World) -> None:
    world.register()
    world.be_idle()
    assert world.pull(seq=1, ack=0) == []
    commits = _commits(world)
    got: list = []
    puller = threading.Thread(target=lambda: got.extend(world.dispatcher.pull("shop-1", "boot-1", 1, 20.0, 2, 1).tasks))
    started = time.monotonic()
    puller.start()
    while not world.dispatcher.is_asking("shop-1"):
        assert time.monotonic() - started < 60
    assert commits == []
    task_id = world.submit()
    puller.join(60)
    assert [task.id for task in got] == [task_id]
    again = world.pull(seq=3, ack=1)
    assert [task.id for task in again] == [task_id], "its reply was not received"


def test_a_device_that_is_told_to_drain_while_its_pull_opens_gets_no_task(world: World) -> None:
    world.register()
    world.be_idle()
    assert world.pull(seq=1, ack=0) == []
    describe, told = world.dispatcher._describe, []

    def drain_meanwhile(ask: Any, device: devices.Device) -> None:
        describe(ask, device)
        if not told:
            told.append(device.wanted)
            world.store.write(devices.set_wanted, "shop-1", "draining", None)

    world.dispatcher._describe = drain_meanwhile  # type: ignore[method-assign]
    assert world.dispatcher.pull("shop-1", "boot-1", 1, 0.0, 2, 1).drain
    assert told == ["active"]


def test_a_pull_above_the_limit_comes_back_so_late_that_a_big_fleet_leaves_time_for_tasks(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.dispatcher._max_held_polls = 0
    world.register()
    for count, at_least, at_most in ((10, 2.5, 7.5), (4000, 10.0, 30.0), (1_000_000, 20.0, 60.0)):
        world.presence.online = {"shop-1", *(str(n) for n in range(count - 1))}
        asked_again = [world.dispatcher.pull("shop-1", "boot-1", 1, 20.0).next_seconds for _ in range(20)]
        assert at_least <= min(asked_again) <= max(asked_again) <= at_most
    world.close()
