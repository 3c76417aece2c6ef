"""What a person holds back, where a task would rather go, and what is done about a device that fails everything."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from test_limits import account, explain, ids, set_limits
from world import World

import db
import devices
import lanes
import retention
from dispatcher import Lane
from reads import Reads
from schema import FAILURES_TO_PROBATION
from transaction import Tx

# -- pauses ----------------------------------------------------------------------------------------------------


def test_everything_can_be_paused_and_what_runs_runs_on(world: World) -> None:
    running = world.submit()
    task = world.take()
    waiting = world.submit()
    world.store.write(lanes.pause, "all", "", "the site is down")
    assert world.pull() == []
    assert explain(world, waiting).reason == "all_paused"
    assert "the site is down" in explain(world, waiting).detail
    assert world.report(task, "completed").outcome == "accepted"
    world.reopen()
    world.register()
    assert world.pull() == []
    assert world.store.write(lanes.resume, "all", "")
    assert not world.store.write(lanes.resume, "all", "")
    assert ids(world.pull(limit=9)) == [waiting] and world.row(running)["status"] == "completed"


def test_a_task_type_can_be_paused_and_the_others_go_on(world: World) -> None:
    world.register(task_types=("echo", "crawl"))
    held, free = world.submit(task_type="crawl", priority=9), world.submit()
    world.store.write(lanes.pause, "type", "crawl", None)
    assert ids(world.pull(limit=9)) == [free]
    assert explain(world, held).reason == "type_paused"
    world.store.write(lanes.resume, "type", "crawl")
    assert ids(world.pull(limit=9)) == [held]


def test_a_resumed_lane_wakes_the_pull_that_is_held(world: World) -> None:
    world.register()
    task_id = world.submit()
    lane_id = world.row(task_id)["lane_id"]
    world.store.write(lanes.pause_lane, lane_id, None)
    got: list[Any] = []
    pull = threading.Thread(target=lambda: got.extend(world.dispatcher.pull("shop-1", "boot-1", 1, 20.0).tasks))
    pull.start()
    until = time.monotonic() + 60
    while not world.dispatcher.is_asking("shop-1"):
        assert time.monotonic() < until
    world.store.write(lanes.resume_lane, lane_id)
    pull.join(60)
    assert ids(got) == [task_id]


def test_new_lanes_of_a_paused_batch_are_held_too(world: World) -> None:
    world.register()
    world.submit(batch="b")
    world.store.write(db.set_batch_state, "b", "paused", None)
    world.submit(batch="b", required_tags=())
    world.submit(batch="b", pinned_device_id="shop-1")
    assert world.pull(limit=9) == []
    world.store.write(db.set_batch_state, "b", "open")
    assert len(world.pull(limit=9)) == 3


def test_a_pause_ends_with_its_batch_and_not_later(world: World) -> None:
    world.submit(batch="b")
    last = world.take()
    world.store.write(db.set_batch_state, "b", "paused", None)
    world.report(last, "completed")
    world.now += 100
    assert world.store.write(retention.delete_finished, world.now - 50) == 1
    again = world.submit(batch="b")
    assert ids(world.pull()) == [again]


# -- a device that is preferred ----------------------------------------------------------------------------------


def test_a_task_waits_for_the_device_that_it_prefers_and_then_goes_elsewhere(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    task_id = world.submit(prefer_device_id="shop-1", prefer_seconds=20.0)
    other = world.submit()
    assert ids(world.pull("shop-2", limit=9)) == [other]
    why = explain(world, task_id)
    waits = "the task waits for shop-1, for 20 s more"
    assert (why.reason, why.devices[1]["excluded_because"]) == ("waits_for_device", waits)
    world.now += 19.9
    assert world.pull("shop-2", limit=9) == []
    world.now += 0.1
    assert ids(world.pull("shop-2", limit=9)) == [task_id]


def test_the_preferred_device_gets_it_at_once(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    task_id = world.submit(prefer_device_id="shop-1")
    assert world.pull("shop-2") == []
    assert ids(world.pull("shop-1")) == [task_id]


def test_the_default_patience_is_half_a_minute(world: World) -> None:
    world.register("shop-2")
    world.submit(prefer_device_id="shop-1")
    world.now += lanes.PREFER_SECONDS - 1
    assert world.pull("shop-2") == []
    world.now += 1
    assert len(world.pull("shop-2")) == 1


def test_a_task_of_no_patience_goes_anywhere_at_once(world: World) -> None:
    world.register("shop-2")
    world.submit(prefer_device_id="shop-1", prefer_seconds=0.0)
    assert len(world.pull("shop-2")) == 1


def test_those_that_waited_long_enough_go_although_younger_and_more_urgent_ones_wait(world: World) -> None:
    world.register("shop-2")
    old = world.submit(prefer_device_id="shop-1", priority=1)
    world.now += 25
    young = world.submit(prefer_device_id="shop-1", priority=9)
    world.now += 5
    assert ids(world.pull("shop-2", limit=9)) == [old]
    world.now += 25
    assert ids(world.pull("shop-2", limit=9)) == [young]


def test_a_new_session_makes_no_other_sessions_wait_be_worked_out_again(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    for name in ("joe@shop", "ann@shop"):
        world.submit(same_device_as=name)
        assert len(world.pull("shop-1")) == 1
        world.submit(same_device_as=name)
    assert world.pull("shop-2", limit=9) == []
    worked_out: list[str] = []
    be_patient = world.dispatcher._be_patient

    def count(tx: Tx, lane: Lane, device_id: str) -> None:
        worked_out.append(lane.same_device_as)
        be_patient(tx, lane, device_id)

    world.dispatcher._be_patient = count  # type: ignore[method-assign]
    new = world.submit(same_device_as="new@shop")
    assert ids(world.pull("shop-2", limit=9)) == [new]
    assert world.pull("shop-2", limit=9) == []
    assert worked_out == []


def test_cookies_stay_where_they_are(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    first = [world.submit(same_device_as="joe@shop") for _ in range(4)]
    assert ids(world.pull("shop-2", limit=2)) == first[:2]
    assert world.pull("shop-1", limit=9) == []
    assert ids(world.pull("shop-2", limit=9)) == first[2:]
    world.reopen()
    world.register("shop-1")
    world.register("shop-2")
    later = world.submit(same_device_as="joe@shop", batch="another")
    elsewhere = world.submit(same_device_as="ann@shop")
    assert ids(world.pull("shop-1", limit=9)) == [elsewhere]
    assert explain(world, later).devices[0]["excluded_because"] == "the task waits for shop-2, for 30 s more"
    world.now += 30
    assert ids(world.pull("shop-1", limit=9)) == [later]
    moved = world.submit(same_device_as="joe@shop")
    assert world.pull("shop-2", limit=9) == []
    assert ids(world.pull("shop-1", limit=9)) == [moved]


def test_tasks_that_are_given_out_together_stay_together(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    got: dict[str, list[int]] = {}

    def ask(device_id: str) -> None:
        got[device_id] = ids(world.dispatcher.pull(device_id, "boot-1", 10, 60.0).tasks)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("shop-1", "shop-2")]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while not all(world.dispatcher.is_asking(name) for name in ("shop-1", "shop-2")):
        assert time.monotonic() < until
    tasks = [db.NewTask("echo", same_device_as=name) for name in ("a", "b") for _ in range(4)]
    sent = [task.id for task in world.store.write(db.submit, tasks)]
    until = time.monotonic() + 60
    while sum(map(len, got.values())) < len(sent):
        assert time.monotonic() < until
        time.sleep(0.001)
    world.dispatcher.stop()
    for thread in threads:
        thread.join(60)
    owner = {task_id: device_id for device_id, some in got.items() for task_id in some}
    assert len({owner[task_id] for task_id in sent[:4]}) == 1
    assert len({owner[task_id] for task_id in sent[4:]}) == 1


def test_what_a_key_remembers_ends_with_its_time(world: World) -> None:
    world.register("shop-1")
    world.submit(same_device_as="joe")
    world.pull("shop-1")
    world.store.write(lanes.forget_affinities, world.now, 10)
    assert len(world.rows("SELECT * FROM af_affinity")) == 1
    world.store.write(lanes.forget_affinities, world.now + 1, 10)
    assert world.rows("SELECT * FROM af_affinity") == []


def test_a_preference_and_a_limit_hold_together(world: World) -> None:
    set_limits(world, account(max_running=1))
    world.register("shop-1")
    for _ in range(2):
        world.submit(username="joe", same_device_as="joe")
    assert len(world.pull("shop-1", limit=9)) == 1


# -- a device that fails everything ------------------------------------------------------------------------------


def fail_tasks(world: World, n: int) -> None:
    for _ in range(n):
        world.submit(max_retry_count=0)
        world.report(world.take(), "failed", error_message="no network")


def device(world: World) -> dict[str, Any]:
    reads = Reads(world.path)
    found = reads.device("shop-1", world.now, 300.0)
    reads.close()
    assert found is not None
    return found


def test_a_device_that_fails_five_in_a_row_gets_one_task_at_a_time_until_it_succeeds(world: World) -> None:
    fail_tasks(world, FAILURES_TO_PROBATION - 1)
    assert device(world)["problem"] is None
    fail_tasks(world, 1)
    assert (device(world)["problem"], device(world)["consecutive_failures"]) == ("failing", 5)
    waiting = [world.submit(max_retry_count=0) for _ in range(20)]
    task = world.pull(limit=9)
    assert ids(task) == waiting[:1]
    assert world.pull(limit=9) == []
    why = explain(world, waiting[5])
    assert "one at a time until it succeeds" in str(why.devices[0]["excluded_because"])
    world.report(task[0], "failed")
    task = world.pull(limit=9)
    assert ids(task) == waiting[1:2]
    world.report(task[0], "completed")
    assert device(world)["problem"] is None
    assert len(world.pull(limit=9)) == 9


def test_a_failing_device_without_a_free_slot_gets_nothing(world: World) -> None:
    fail_tasks(world, FAILURES_TO_PROBATION)
    world.submit()
    assert world.pull(limit=0, ahead={"echo": 5}) == []
    assert len(world.pull(limit=9, ahead={"echo": 5})) == 1


def test_a_device_that_lets_tasks_run_out_of_time_is_failing_too(world: World) -> None:
    for _ in range(FAILURES_TO_PROBATION):
        world.submit(max_retry_count=0)
        world.release(world.take(start=True), "timeout")
    for _ in range(3):
        world.submit()
    assert len(world.pull(limit=9)) == 1


@pytest.mark.parametrize("outcome", ["completed", "failed"])
def test_a_held_pull_of_a_failing_device_goes_on_when_its_one_task_has_ended(world: World, outcome: str) -> None:
    fail_tasks(world, FAILURES_TO_PROBATION)
    first = world.submit(max_retry_count=0)
    task = world.pull(limit=9)[0]
    assert task.id == first
    got: list[Any] = []
    pull = threading.Thread(target=lambda: got.extend(world.dispatcher.pull("shop-1", "boot-1", 9, 20.0).tasks))
    pull.start()
    until = time.monotonic() + 60
    while not world.dispatcher.is_asking("shop-1"):
        assert time.monotonic() < until
    more = [world.submit() for _ in range(3)]
    assert got == []
    world.report(task, outcome)
    pull.join(60)
    assert ids(got) == (more if outcome == "completed" else more[:1])


def test_a_failing_device_leaves_the_queue_to_the_others(world: World) -> None:
    fail_tasks(world, FAILURES_TO_PROBATION)
    world.register("shop-2")
    for _ in range(10):
        world.submit()
    assert len(world.pull("shop-1", limit=9)) == 1
    assert len(world.pull("shop-2", limit=9)) == 9
    world.store.write(devices.set_wanted, "shop-1", "disabled", "broken")
