"""Registration, heartbeats, silence: who is there, and what it holds."""

from __future__ import annotations

import pytest
from world import START, World

import devices
from devices import Held


def held(task: object, phase: str = "running", progress: float | None = None) -> Held:
    return Held(task.assignment_id, task.lease_id, phase, progress)  # type: ignore[attr-defined]


def device(world: World, device_id: str = "shop-1") -> dict:
    return world.rows("SELECT * FROM af_device WHERE device_id = ?", device_id)[0]


def test_a_silent_devices_tasks_are_released_after_its_timeout(world: World) -> None:
    task_id = world.submit()
    world.take(start=True)
    world.now += 300
    assert world.store.write(devices.release_silent, world.presence, 300.0) == 0
    world.now += 1
    assert world.store.write(devices.release_silent, world.presence, 300.0) == 1
    row = world.row(task_id)
    assert (row["status"], row["lost_count"], row["avoid_device_id"]) == ("pending", 1, "shop-1")


def test_a_heartbeat_keeps_the_tasks_of_its_device(world: World) -> None:
    world.submit()
    task = world.take(start=True)
    for _ in range(10):
        world.now += 200
        assert world.beat(holding=(held(task),)) == []
        assert world.store.write(devices.release_silent, world.presence, 300.0) == 0


def test_the_first_silence_after_a_master_start_counts_nowhere(world: World) -> None:
    task_id = world.submit()
    world.take(start=True)
    world.now += 1000
    world.presence = devices.Presence(watching_since=world.now)
    assert world.store.write(devices.release_silent, world.presence, 300.0) == 0
    world.now += 301
    assert world.store.write(devices.release_silent, world.presence, 300.0) == 1
    row = world.row(task_id)
    assert (row["status"], row["lost_count"]) == ("pending", 0)


def test_a_delivered_task_missing_from_two_beats_in_a_row_is_released(world: World) -> None:
    task_id = world.submit()
    world.take(start=True)
    world.now += 1
    world.beat()
    assert world.row(task_id)["status"] == "running"
    world.now += 30
    world.beat()
    assert world.row(task_id)["status"] == "pending"


def test_a_task_missing_from_one_beat_only_is_kept(world: World) -> None:
    task_id = world.submit()
    task = world.take(start=True)
    for holding in ((), (held(task),), (), (held(task),)):
        world.now += 30
        world.beat(holding=holding)
    assert world.row(task_id)["status"] == "running"


def test_what_was_given_away_comes_back_in_cancel(world: World) -> None:
    world.submit()
    old = world.take("shop-1", start=True)
    world.lose()
    world.take("shop-2", start=True)
    assert world.beat("shop-1", holding=(held(old),)) == [old.assignment_id]


def test_a_beat_adopts_a_task_that_went_back_while_the_device_was_away(world: World) -> None:
    task_id = world.submit()
    task = world.take(start=True)
    world.lose()
    assert world.beat(holding=(held(task),)) == []
    row = world.row(task_id)
    assert (row["status"], row["lost_count"]) == ("running", 0)


def test_a_beat_starts_a_task_in_the_books_and_shows_its_progress(world: World) -> None:
    task_id = world.submit()
    task = world.take()
    world.beat(holding=(held(task, progress=0.25),))
    world.beat(holding=(Held(task.assignment_id, task.lease_id, "running", 0.5, "half of it"),))
    assert world.row(task_id)["status"] == "running"
    attempt = world.attempt(task.assignment_id)
    assert (attempt["progress"], attempt["progress_message"]) == (0.5, "half of it")


def test_a_forged_lease_in_a_beat_is_not_believed(world: World) -> None:
    world.submit()
    task = world.take()
    forged = Held(task.assignment_id, "f" * 32, "running")
    assert world.beat(holding=(forged,)) == [task.assignment_id]


def test_an_overtaken_beat_changes_nothing(world: World) -> None:
    world.register()
    world.beat(cpu_usage=50.0)
    world.beat(cpu_usage=60.0)
    world.beats["shop-1"] = 0
    world.beat(cpu_usage=10.0)
    assert device(world)["cpu_usage"] == 60.0


def test_a_sign_of_life_keeps_a_device_online_and_says_nothing_about_its_tasks(world: World) -> None:
    delivered, running = world.submit(), world.submit()
    world.take()
    world.take(start=True)
    world.beat(problem="spool_full", cpu_usage=50.0)
    for _ in range(5):
        world.now += 200
        beat = devices.Beat("boot-1", 0, None)
        assert world.store.write(devices.beat, world.presence, "shop-1", beat, keep_history=True)[:2] == ([], "active")
        assert world.store.write(devices.release_silent, world.presence, 300.0) == 0
    assert (world.row(delivered)["status"], world.row(running)["status"]) == ("assigned", "running")
    seen = device(world)
    assert (seen["last_heartbeat_at"], seen["problem"], seen["cpu_usage"]) == (world.now, "spool_full", 50.0)
    assert len(world.rows("SELECT id FROM af_device_heartbeat")) == 1


def test_what_a_device_never_confirmed_goes_to_others_while_it_only_gives_a_sign_of_life(world: World) -> None:
    """Its interpreter is held by a task: the reply with this one may lie unread for long."""
    world.register()
    unread = world.submit()
    assert [task.id for task in world.pull(seq=1, ack=0)] == [unread]
    for seconds, status in ((20, "assigned"), (20, "pending")):
        world.now += seconds
        world.beat(holding=None)
        assert world.row(unread)["status"] == status
    assert world.row(unread)["lost_count"] == 0
    assert world.take("shop-2").id == unread


def test_a_beat_without_holding_keeps_its_figures_and_releases_nothing(world: World) -> None:
    task_id = world.submit()
    world.take(start=True)
    for _ in range(3):
        world.now += 30
        world.beat(holding=None, cpu_usage=30.0)
    assert world.row(task_id)["status"] == "running" and device(world)["cpu_usage"] == 30.0


def test_a_devices_problem_and_clock_are_those_of_its_last_beat_and_process(world: World) -> None:
    world.register()
    world.wall_offset = 100.0
    world.beat(problem="spool_unwritable", clock=world.now + 100 - 7200.04)
    assert (device(world)["problem"], device(world)["clock_skew_seconds"]) == ("spool_unwritable", -7200.0)
    world.register(boot_id="boot-2")
    assert device(world)["problem"] is None
    world.beat()
    assert (device(world)["problem"], device(world)["clock_skew_seconds"]) == (None, None)


def test_a_new_process_releases_at_once_what_it_does_not_hold(world: World) -> None:
    kept, lost = world.submit(), world.submit()
    world.register()
    tasks = {task.id: task for task in world.pull(limit=2)}
    for task in tasks.values():
        world.report(task, "running")
    answer = world.register(boot_id="boot-2", holding=(held(tasks[kept], "reporting"),))
    assert answer.keep == [tasks[kept].assignment_id]
    assert (world.row(kept)["status"], world.row(lost)["status"]) == ("running", "pending")


def test_a_task_that_kills_three_devices_processes_is_poison(world: World) -> None:
    task_id = world.submit()
    for n in range(3):
        name = f"shop-{n}"
        world.register(name)
        world.take(name, start=True)
        world.register(name, boot_id="after-the-crash")
    assert world.row(task_id)["end_reason"] == "poison"


def test_the_older_process_of_a_device_is_told_to_stop(world: World) -> None:
    world.register(boot_id="old")
    world.register(boot_id="new")
    world.boots["shop-1"] = "old"
    with pytest.raises(devices.Superseded):
        world.beat()
    with pytest.raises(devices.Superseded):
        world.pull()
    with pytest.raises(devices.Superseded):
        world.register(boot_id="old")


def test_a_third_change_within_five_minutes_is_a_conflict_until_a_person_decides(world: World) -> None:
    world.register(boot_id="a")
    for boot_id in ("b", "c", "d"):
        world.now += 60
        world.register(boot_id=boot_id)
    assert device(world)["conflict"] == 1
    with pytest.raises(devices.DeviceConflict):
        world.beat()
    with pytest.raises(devices.DeviceConflict):
        world.register(boot_id="e")
    world.store.write(devices.set_wanted, "shop-1", "active", None)
    world.register(boot_id="e")
    assert device(world)["conflict"] == 0
    world.beat()


def test_slow_restarts_are_no_conflict(world: World) -> None:
    for n in range(6):
        world.now += 200
        world.register(boot_id=f"boot-{n}")
    assert device(world)["conflict"] == 0


def test_a_device_that_says_goodbye_may_restart_as_often_as_it_likes(world: World) -> None:
    for n in range(6):
        world.now += 5
        world.beats.clear()
        world.register(boot_id=f"boot-{n}")
        world.beat(is_leaving=True)
    assert device(world)["conflict"] == 0


def test_goodbye_hands_everything_back(world: World) -> None:
    task_id = world.submit()
    world.take(start=True)
    world.beat(is_leaving=True)
    row = world.row(task_id)
    assert (row["status"], row["lost_count"]) == ("pending", 0)


def test_disabling_a_device_hands_its_tasks_back_and_tells_it(world: World) -> None:
    task_id = world.submit()
    task = world.take(start=True)
    world.store.write(devices.set_wanted, "shop-1", "disabled", "noisy")
    assert world.row(task_id)["status"] == "pending"
    assert world.beat(holding=(held(task, "queued"),)) == [task.assignment_id]


def test_a_disabled_device_does_not_win_its_task_back_by_a_beat(world: World) -> None:
    task_id = world.submit()
    task = world.take(start=True)
    world.store.write(devices.set_wanted, "shop-1", "disabled", None)
    assert world.beat(holding=(held(task),)) == [task.assignment_id]
    assert world.row(task_id)["status"] == "pending"


def test_a_removed_device_is_unknown_and_its_tasks_go_elsewhere(world: World) -> None:
    task_id = world.submit()
    world.take(start=True)
    world.store.write(devices.forget, world.presence, "shop-1")
    assert world.row(task_id)["status"] == "pending"
    with pytest.raises(devices.UnknownDevice):
        world.beat()
    with pytest.raises(devices.UnknownDevice):
        world.store.write(devices.forget, world.presence, "shop-1")


def test_a_step_of_the_wall_clock_releases_nothing(world: World) -> None:
    world.submit()
    world.take(start=True)
    world.wall_offset = 7200.0
    assert world.store.write(devices.release_silent, world.presence, 300.0) == 0
    assert world.presence.watching_since == START


# -- beats of idle devices, which are taken in memory and written together


def test_beats_of_idle_devices_are_written_together(world: World) -> None:
    names = [f"shop-{n}" for n in range(50)]
    for name in names:
        world.register(name)
        world.be_idle(name)
    world.now += 30
    written = len(world.rows("SELECT id FROM af_device_heartbeat"))
    for name in names:
        world.beat(name, cpu_usage=50.0)
    assert len(world.rows("SELECT id FROM af_device_heartbeat")) == written
    assert {row["last_heartbeat_at"] for row in world.rows("SELECT * FROM af_device")} == {world.now - 30}
    world.store.write(devices.write_beats, world.presence)
    rows = world.rows("SELECT * FROM af_device")
    assert {(row["last_heartbeat_at"], row["cpu_usage"]) for row in rows} == {(world.now, 50.0)}
    assert len(world.rows("SELECT id FROM af_device_heartbeat WHERE heartbeat_at = ?", world.now)) == 50


def test_a_device_whose_beats_are_not_written_yet_is_not_silent(world: World) -> None:
    world.register()
    world.be_idle()
    for _ in range(10):
        world.now += 200
        world.beat()
        world.store.write(devices.release_silent, world.presence, 300.0)
        assert world.presence.online == {"shop-1"}


def test_an_idle_device_that_gets_a_task_and_does_not_hold_it_loses_it_as_any_other(world: World) -> None:
    world.register()
    world.be_idle()
    task_id = world.submit()
    world.take()
    for _ in range(2):
        assert world.row(task_id)["status"] == "assigned"
        world.now += 30
        world.beat()
    assert world.row(task_id)["status"] == "pending"


def test_a_beat_that_was_judged_before_a_change_does_not_make_its_device_idle(world: World) -> None:
    world.register()
    world.be_idle()
    heard = devices.Beat("boot-1", 1000, ())
    judged = world.store.write(devices.beat, world.presence, "shop-1", heard, keep_history=True)
    world.submit()
    world.take()
    world.presence.remember_idle("shop-1", judged)
    assert world.presence.idle_device("shop-1", "boot-1") is None


@pytest.mark.parametrize("wanted", ["draining", "disabled"])
def test_an_idle_device_hears_what_is_wanted_of_it_with_its_next_beat(world: World, wanted: str) -> None:
    world.register()
    world.be_idle()
    world.store.write(devices.set_wanted, "shop-1", wanted, None)
    heard = devices.Beat("boot-1", 1000, ())
    assert world.presence.beat_idle("shop-1", heard, world.now, world.now, keep_history=True) is None
    assert world.store.write(devices.beat, world.presence, "shop-1", heard, keep_history=True).wanted == wanted


def test_an_idle_device_that_registers_again_gets_what_it_says_now(world: World) -> None:
    world.register()
    world.be_idle()
    assert world.pull(seq=1, ack=0) == []
    world.register(task_types=("crawl",))
    assert world.presence.idle_device("shop-1", "boot-1") is None


def test_beats_that_cannot_be_written_do_not_fill_the_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.register()
    world.be_idle()
    monkeypatch.setattr("devices.MOST_UNWRITTEN", len(world.presence.unwritten) + 1)
    heard = [devices.Beat("boot-1", seq, ()) for seq in (1000, 1001)]
    wanted = [world.presence.beat_idle("shop-1", beat, world.now, world.now, keep_history=True) for beat in heard]
    assert wanted == ["active", None]


def test_an_overtaken_beat_of_an_idle_device_changes_nothing(world: World) -> None:
    world.register()
    world.be_idle()
    world.beats["shop-1"] = 10
    world.beat(cpu_usage=50.0)
    world.beats["shop-1"] = 5
    world.beat(cpu_usage=1.0)
    assert device(world)["cpu_usage"] == 50.0


def test_the_unwritten_beat_of_an_older_process_does_not_reach_its_successor(world: World) -> None:
    world.register()
    world.be_idle()
    late = devices.Unwritten("shop-1", devices.Beat("boot-1", 1000, ()), world.now, world.now, True)
    world.register(boot_id="boot-2")
    world.presence.unwritten.append(late)
    beats = len(world.rows("SELECT id FROM af_device_heartbeat"))
    world.store.write(devices.write_beats, world.presence)
    assert device(world)["heartbeat_seq"] == 0
    assert len(world.rows("SELECT id FROM af_device_heartbeat")) == beats


def test_unwritten_beats_are_written_before_their_device_says_goodbye_or_is_removed(world: World) -> None:
    world.register()
    world.be_idle()
    world.now += 30
    world.beat(cpu_usage=50.0)
    world.beat(is_leaving=True)
    assert len(world.rows("SELECT id FROM af_device_heartbeat WHERE cpu_usage = 50")) == 1
    world.register(boot_id="boot-2")
    world.beats["shop-1"] = 0
    world.be_idle()
    world.beat()
    world.store.write(devices.forget, world.presence, "shop-1")
    world.store.write(devices.write_beats, world.presence)
    assert world.rows("SELECT id FROM af_device_heartbeat") == []


def test_a_fleet_is_as_big_as_it_was_before_the_master_started_again(world: World) -> None:
    for n in range(3):
        world.register(f"shop-{n}")
    world.beat("shop-2", is_leaving=True)
    world.presence = devices.Presence(world.now, world.store.write(devices.count_devices))
    assert world.presence.device_count == 2
    for n in range(3, 7):
        world.register(f"shop-{n}")
    assert world.presence.device_count == 4
