"""What is kept of what happened, and for how long?"""

from __future__ import annotations

from typing import Any

import pytest
from world import World

import db
import devices
import history
import lanes
from events import Events
from history import History
from reads import Reads
from transaction import Tx


def told(world: World, **filters: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """(kind, verb, facts) of what is kept, the oldest first."""
    reads = Reads(world.path, connections=1)
    events = History(reads).page(limit=200, **filters)["events"]
    reads.close()
    return [(event["kind"], event["verb"], event["facts"]) for event in reversed(events)]


def verbs(world: World, **filters: Any) -> list[str]:
    return [verb for _, verb, _ in told(world, **filters)]


def test_what_a_device_does_and_is_told_to_do_is_kept(world: World) -> None:
    world.register("shop-1")
    world.lose()
    world.beat("shop-1")
    world.store.write(devices.rename, "shop-1", "Front")
    world.store.write(devices.set_wanted, "shop-1", "draining", "new disk")
    world.store.write(devices.forget, world.presence, "shop-1")
    world.register("shop-2")
    assert verbs(world, device_id="shop-1") == [
        "device_registered", "device_offline", "device_online", "device_renamed", "device_wanted", "device_removed",
    ]  # fmt: skip
    assert ("device", "device_wanted", {"device": "shop-1", "status": "draining", "reason": "new disk"}) in told(world)
    assert verbs(world, device_id="shop-2") == ["device_registered"]


def test_a_start_of_the_master_does_not_bring_every_device_online_again(world: World) -> None:
    world.register("shop-1")
    world.reopen()
    world.beat("shop-1")
    assert verbs(world) == ["device_registered"]


def test_a_device_that_does_not_come_back_after_a_start_is_missed_once(world: World) -> None:
    world.register("shop-1")
    world.register("shop-2")
    for _ in range(2):
        world.reopen()
        world.beat("shop-1")
        world.now += 200
        world.beat("shop-1")
        world.now += 150
        world.store.write(devices.release_silent, world.presence, 300.0)
    assert verbs(world, device_id="shop-1") == ["device_registered"]
    assert verbs(world, device_id="shop-2") == ["device_registered", "device_offline"]
    world.beat("shop-2")
    assert verbs(world, device_id="shop-2")[2:] == ["device_online"]


def test_the_routine_life_of_a_task_is_not_kept(world: World) -> None:
    world.submit()
    task = world.take(start=True)
    world.report(task, "failed", error_message="no", delay_seconds=1)
    world.submit()
    world.report(world.take(start=True), "completed")
    assert verbs(world, kind="task") == []


def test_all_that_is_lost_with_a_device_is_one_row(world: World) -> None:
    ids = [world.submit() for _ in range(30)]
    world.register("shop-1", max_concurrent_tasks=50)
    for task in world.pull("shop-1", 30):
        world.report(task, "running")
    events = Events()
    world.store.listeners.append(events.hear)
    assert world.lose() == 30
    [(kind, verb, facts)] = told(world, kind="task")
    assert (kind, verb) == ("task", "release")
    span = {"count": 30, "first_task": min(ids), "last_task": max(ids)}
    assert facts == {"device": "shop-1", "reason": "lost", **span}
    following = events.follow(0)
    heard = [event.facts for event in (next(following), next(following)) if event is not None]
    assert {"verb": "release", **span, "device": "shop-1", "status": "pending"}.items() <= heard[1].items()
    [row] = world.rows("SELECT id FROM af_event WHERE verb = 'release'")
    assert heard[1]["history_id"] == row["id"]


def test_a_timeout_and_poison_are_told_by_their_names(world: World) -> None:
    world.submit()
    world.release(world.take(start=True), "timeout")
    world.submit()
    for n in range(db.LOST_ON_DEVICES_LIMIT):
        world.register(f"other-{n}")
        world.release(world.take(f"other-{n}", start=True), "lost")
    assert verbs(world, kind="task") == ["timeout", "release", "release", "poison"]


def test_what_is_undone_is_not_kept(world: World) -> None:
    def pause_and_fail(tx: Tx) -> None:
        lanes.pause(tx, "all", "", None)
        history.record(tx, "system", "strategy")
        raise ValueError("never mind")

    with pytest.raises(ValueError, match="never mind"):
        world.store.write(pause_and_fail)
    assert verbs(world) == []


def test_what_goes_on_for_long_is_one_row_that_says_how_far_it_went(world: World) -> None:
    row_id = world.store.write(history.record, "task", "bulk_cancel", changed=1)
    world.store.write(history.amend, row_id, {"changed": 2})
    assert told(world) == [("task", "bulk_cancel", {"changed": 2})]


def test_failed_logins_are_one_row_for_each_address_and_minute(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(history, "FAILED_LOGINS_A_MINUTE", 3)
    for address in ("a", "a", "b", "c", "d"):
        world.store.write(history.record_failed_login, address)
    assert [facts["by"] for _, _, facts in told(world, verb="login_failed")] == ["a", "b", "c"]
    world.now += 61
    world.store.write(history.record_failed_login, "a")
    assert len(told(world, kind="access")) == 4


def test_the_history_is_forgotten_by_age_and_by_number(world: World, monkeypatch: Any) -> None:
    for n in range(6):
        world.now += 10
        world.store.write(history.record, "system", "strategy", n=n)
    assert world.store.write(history.forget, world.now - 35, 2) == 2, "at most so many at once"
    assert world.store.write(history.forget, world.now - 35, 100) == 0
    monkeypatch.setattr(history, "MAX_ROWS", 3)
    assert world.store.write(history.forget, 0.0, 100) == 1
    assert [facts["n"] for _, _, facts in told(world)] == [3, 4, 5]


def test_pages_go_on_where_they_ended_and_filters_narrow_them(world: World) -> None:
    for n in range(5):
        world.now += 10
        world.store.write(history.record, "system" if n % 2 else "batch", "strategy", n=n, device=f"shop-{n}")
    reads = Reads(world.path, connections=1)
    past = History(reads)
    first = past.page(limit=2)
    second = past.page(limit=2, cursor=int(first["next_cursor"]))
    last = past.page(limit=2, cursor=int(second["next_cursor"]))
    found = [event["facts"]["n"] for page in (first, second, last) for event in page["events"]]
    assert found == [4, 3, 2, 1, 0] and last["next_cursor"] is None
    narrowed = (
        {"kind": "system"}, {"device_id": "shop-2"}, {"verb": "strategy", "kind": "batch"}, {"after": world.now - 15},
        {"kind": "system", "device_id": "shop-2"},
    )  # fmt: skip
    shown = [[event["facts"]["n"] for event in past.page(limit=9, **filters)["events"]] for filters in narrowed]
    assert shown == [[3, 1], [2], [4, 2, 0], [4, 3], []]
    reads.close()
