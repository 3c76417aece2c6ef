"""The life of a task: every verb from every state, the judging of reports, and the counts."""

from __future__ import annotations

import ast
import re
import threading
from pathlib import Path

import pytest
from world import World

import db
import judging
import retention
from transaction import Policy, Tx

ROOT = Path(__file__).parent.parent


def bring_to(world: World, state: str) -> tuple[int, object]:
    """A task in that state, with the delivery of its newest attempt (or None)."""
    if state == "scheduled":
        return world.submit(run_at=world.now + 1000), None
    task_id = world.submit(max_retry_count=0)
    if state == "pending":
        return task_id, None
    if state == "cancelled":
        world.store.write(db.cancel, task_id)
        return task_id, None
    delivery = world.take(start=state == "running")
    if state in ("completed", "failed"):
        world.report(delivery, state)
    return task_id, delivery


VERBS = {
    "promote": lambda tx, task, attempt: db._move(tx, "promote", task, "pending", next_run_at=None),
    "assign": lambda tx, task, attempt: db.assign(tx, [task], db.Gift("shop-1", None, True)),
    "start": lambda tx, task, attempt: attempt and judging.apply_report(tx, "shop-1", db.Report(attempt.assignment_id, attempt.lease_id, "running")).outcome == "accepted",
    "complete": lambda tx, task, attempt: attempt and judging.apply_report(tx, "shop-1", db.Report(attempt.assignment_id, attempt.lease_id, "completed")).outcome == "accepted",
    "fail": lambda tx, task, attempt: attempt and judging.apply_report(tx, "shop-1", db.Report(attempt.assignment_id, attempt.lease_id, "failed")).outcome == "accepted",
    "snooze": lambda tx, task, attempt: attempt and judging.apply_report(tx, "shop-1", db.Report(attempt.assignment_id, attempt.lease_id, "snoozed")).outcome == "accepted",
    "release": lambda tx, task, attempt: attempt and db.release(tx, db.get_attempt(tx, attempt.assignment_id), "lost"),
    "cancel": lambda tx, task, attempt: db.cancel(tx, task.id),
    "requeue": lambda tx, task, attempt: db.requeue(tx, task.id),
}  # fmt: skip
# A report needs an attempt, so a task that never had one cannot be reported on; `start` of what runs is a duplicate.
WITHOUT_ATTEMPT = {"start": {"assigned"}, "complete": {"assigned", "running"}}


@pytest.mark.parametrize("state", db.STATES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_moves_a_task_only_from_its_from_states(world: World, verb: str, state: str) -> None:
    task_id, attempt = bring_to(world, state)

    def run(tx: Tx) -> bool:
        task = db.get_task(tx, task_id)
        assert task is not None
        return bool(VERBS[verb](tx, task, attempt))

    moved = world.store.write(run)
    from_states, to_states = db.TRANSITIONS[verb]
    allowed = state in WITHOUT_ATTEMPT.get(verb, set(from_states))
    assert moved is allowed
    assert world.row(task_id)["status"] in (to_states if allowed else (state,))


def test_only_one_function_writes_a_state() -> None:
    writers = []
    for path in sorted(ROOT.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                text = ast.unparse(function)
                if re.search(r"UPDATE\s+af_crawl_tasks\s+SET\s+status", text):
                    writers.append(f"{path.name}:{function.name}")
    assert writers == ["db.py:_move_all"]


def test_the_first_screen_of_db_names_every_state_and_verb() -> None:
    first_screen = db.__doc__ or ""
    for word in (*db.STATES, *(set(db.TRANSITIONS) - {"promote"})):
        assert word in first_screen


def test_a_report_repeated_any_number_of_times_counts_once(world: World) -> None:
    task_id = world.submit()
    delivery = world.take()
    outcomes = [world.report(delivery, "completed", result='{"n": 1}').outcome for _ in range(3)]
    assert outcomes == ["accepted", "duplicate", "duplicate"]
    assert world.counts() == {"completed": 1}
    assert world.rows("SELECT result FROM af_task_result WHERE task_id = ?", task_id) == [{"result": '{"n": 1}'}]


def test_a_report_repeated_with_another_result_keeps_the_first(world: World) -> None:
    world.submit()
    delivery = world.take()
    world.report(delivery, "completed", result='{"n": 1}')
    assert world.report(delivery, "completed", result='{"n": 2}').outcome == "duplicate"
    assert world.rows("SELECT result FROM af_task_result") == [{"result": '{"n": 1}'}]


def test_a_report_with_another_lease_changes_nothing(world: World) -> None:
    task_id = world.submit()
    delivery = world.take()
    forged = delivery._replace(lease_id="0" * 32)
    assert world.report(forged, "completed").outcome == "stale"
    assert world.row(task_id)["status"] == "assigned"


def test_a_report_of_another_device_changes_nothing(world: World) -> None:
    task_id = world.submit()
    delivery = world.take()
    world.register("shop-2")
    assert world.report(delivery, "completed", device_id="shop-2").outcome == "gone"
    assert world.row(task_id)["status"] == "assigned"


def test_a_report_of_an_unknown_attempt_is_gone(world: World) -> None:
    world.submit()
    delivery = world.take()
    assert world.report(delivery._replace(assignment_id=999), "completed").outcome == "gone"


def test_a_report_on_a_cancelled_task_is_gone(world: World) -> None:
    task_id = world.submit()
    delivery = world.take(start=True)
    assert world.store.write(db.cancel, task_id) == "cancelled"
    assert world.report(delivery, "completed").outcome == "gone"
    assert world.row(task_id)["status"] == "cancelled"


def test_a_late_report_of_an_older_attempt_is_kept_and_changes_nothing(world: World) -> None:
    task_id = world.submit()
    old = world.take("shop-1", start=True)
    world.lose()
    new = world.take("shop-2", start=True)
    assert world.report(old, "completed", result='{"from": "old"}').outcome == "stale"
    assert world.row(task_id)["assignment_id"] == new.assignment_id
    assert world.row(task_id)["status"] == "running"
    late = world.attempt(old.assignment_id)
    assert (late["late_outcome"], late["late_at"]) == ("completed", world.now)
    assert world.report(old, "completed").outcome == "duplicate"
    assert world.report(new, "completed", device_id="shop-2").outcome == "accepted"
    assert world.report(old, "failed").outcome == "duplicate"


def test_a_late_success_of_the_newest_attempt_still_counts(world: World) -> None:
    task_id = world.submit()
    delivery = world.take(start=True)
    assert world.lose() == 1
    assert world.row(task_id)["status"] == "pending"
    assert world.report(delivery, "completed", result="{}").outcome == "accepted"
    assert world.row(task_id)["status"] == "completed"
    assert world.attempt(delivery.assignment_id)["late_outcome"] == "completed"
    assert world.pull() == []


def test_a_late_success_counts_even_after_a_sweep_gave_the_task_up(world: World) -> None:
    task_id = world.submit(max_retry_count=0)
    delivery = world.take(start=True)
    assert world.release(delivery, "timeout") == "failed"
    assert world.row(task_id)["end_reason"] == "timeout"
    assert world.report(delivery, "completed").outcome == "accepted"
    row = world.row(task_id)
    assert (row["status"], row["end_reason"], row["error_message"]) == ("completed", None, None)


def test_a_late_start_adopts_the_task_again_and_takes_the_loss_back(world: World) -> None:
    task_id = world.submit()
    delivery = world.take(start=True)
    world.lose()
    assert world.row(task_id)["lost_count"] == 1
    assert world.report(delivery, "running").outcome == "accepted"
    row = world.row(task_id)
    assert (row["status"], row["lost_count"]) == ("running", 0)
    assert world.report(delivery, "completed").outcome == "accepted"


def test_a_late_failure_turns_one_loss_into_one_retry_and_moves_nothing(world: World) -> None:
    task_id = world.submit()
    delivery = world.take(start=True)
    world.lose()
    assert world.report(delivery, "failed").outcome == "accepted"
    row = world.row(task_id)
    assert (row["status"], row["lost_count"], row["retry_count"]) == ("pending", 0, 1)
    assert world.report(delivery, "failed").outcome == "duplicate"


def test_a_failed_task_is_retried_with_growing_waits_and_then_fails(world: World) -> None:
    task_id = world.submit(max_retry_count=2)
    waits = []
    for _ in range(2):
        assert world.report(world.take(), "failed", error_message="no luck").status == "scheduled"
        waits.append(world.row(task_id)["next_run_at"] - world.now)
        assert world.store.write(db.promote) == 0
        world.now += waits[-1]
        assert world.store.write(db.promote) == 1
    assert 15 <= waits[0] <= 18.75 and 30 <= waits[1] <= 37.5
    assert world.report(world.take(), "failed", error_message="no luck").status == "failed"
    row = world.row(task_id)
    assert (row["retry_count"], row["end_reason"], row["error_message"]) == (2, "failed", "no luck")


def test_a_hopeless_error_is_not_retried(world: World) -> None:
    world.submit()
    assert world.report(world.take(), "failed", can_retry=False).status == "failed"


def test_a_retry_says_itself_when_it_comes(world: World) -> None:
    task_id = world.submit()
    world.report(world.take(), "failed", delay_seconds=7.0)
    assert world.row(task_id)["next_run_at"] == world.now + 7.0


def test_a_snooze_uses_no_retry_and_ends_at_give_up(world: World) -> None:
    task_id = world.submit(give_up_seconds=100.0)
    assert world.report(world.take(), "snoozed", delay_seconds=60.0).status == "scheduled"
    row = world.row(task_id)
    assert (row["retry_count"], row["snooze_count"], row["next_run_at"]) == (0, 1, world.now + 60.0)
    world.now += 60.0
    world.store.write(db.promote)
    assert world.report(world.take(), "snoozed", delay_seconds=60.0).status == "failed"
    assert world.row(task_id)["end_reason"] == "gave_up"


def test_a_task_over_its_time_uses_a_retry(world: World) -> None:
    task_id = world.submit(execution_timeout=60, max_retry_count=1)
    world.take(start=True)
    world.now += 60 + db.GRACE_SECONDS - 1
    assert list(world.store.write(db.overdue_attempts)) == []
    world.now += 2

    def sweep(tx: Tx) -> list[str | None]:
        return [db.release(tx, attempt, "timeout") for attempt in db.overdue_attempts(tx)]

    assert world.store.write(sweep) == ["scheduled"]
    row = world.row(task_id)
    assert (row["retry_count"], row["lost_count"], row["error_message"]) == (1, 0, "not finished within 60 s")


def test_a_task_lost_on_three_devices_is_poison(world: World) -> None:
    task_id = world.submit()
    for device_id in ("shop-1", "shop-2", "shop-3"):
        assert world.row(task_id)["status"] == "pending"
        world.take(device_id, start=True)
        world.lose()
    row = world.row(task_id)
    assert (row["status"], row["end_reason"], row["lost_count"]) == ("failed", "poison", 3)
    assert "shop-1, shop-2, shop-3" in row["error_message"]


def test_a_task_lost_five_times_on_one_device_is_poison(world: World) -> None:
    task_id = world.submit()
    for _ in range(5):
        assert world.row(task_id)["end_reason"] is None
        world.take(start=True)
        world.lose()
    assert world.row(task_id)["end_reason"] == "poison"


def test_a_lost_attempt_that_never_started_counts_nowhere(world: World) -> None:
    task_id = world.submit()
    world.take()
    assert world.lose() == 1
    row = world.row(task_id)
    assert (row["status"], row["lost_count"], row["retry_count"]) == ("pending", 0, 0)


def test_handing_back_uses_no_attempt(world: World) -> None:
    task_id = world.submit()
    delivery = world.take(start=True)
    assert world.report(delivery, "released").outcome == "accepted"
    assert world.report(delivery, "released").outcome == "duplicate"
    row = world.row(task_id)
    assert (row["status"], row["lost_count"], row["retry_count"]) == ("pending", 0, 0)


def test_a_person_who_requeues_gives_all_chances_back(world: World) -> None:
    task_id = world.submit(max_retry_count=0)
    world.report(world.take(), "failed", error_message="broken")
    assert world.store.write(db.requeue, task_id) == "pending"
    row = world.row(task_id)
    assert (row["retry_count"], row["error_message"], row["finished_at"], row["end_reason"]) == (0, None, None, None)
    assert world.report(world.take(), "completed").outcome == "accepted"


def test_tasks_of_one_request_keep_their_order_and_each_its_own_fields(world: World) -> None:
    kinds = (
        {}, {"priority": 9}, {"batch": "b"}, {"unique_key": 'an "odd" key: \U0001f600 \\ \u2028'}, {"task_data": '{"n": 1}'},
        {"username": "u"}, {"app_id": "a"}, {"start_date": "2026-01-01"}, {"end_date": "2026-01-31"}, {"parent_id": 7},
        {"max_retry_count": 0}, {"execution_timeout": 5}, {"run_at": world.now + 60}, {"give_up_seconds": 60.0},
        {"required_tags": ("b", "a")}, {"pinned_device_id": "shop-2"}, {"prefer_device_id": "shop-1"},
        {"same_device_as": "s"}, {"prefer_seconds": 3.0},
    )  # fmt: skip
    tasks = [db.NewTask("echo", **kind) for kind in kinds] * 2
    tasks[len(kinds) + 3] = db.NewTask("echo", unique_key="another")
    answers = world.store.write(db.submit, tasks, created_by="me")
    assert [answer.id for answer in answers] == list(range(1, 2 * len(kinds) + 1))
    for answer, task in zip(answers, tasks, strict=True):
        assert answer.id is not None
        row = world.row(answer.id)
        assert (row["status"], row["created_by"]) == (answer.status, "me")
        assert answer.status == ("scheduled" if task.run_at else "pending")
        assert row["next_run_at"] == task.run_at
        assert row["required_tags"] == ('["a", "b"]' if task.required_tags else "[]")
        waits_from = task.run_at or world.now
        assert row["give_up_at"] == waits_from + (task.give_up_seconds or world.policy.give_up_seconds)
        for name in ("task_type", "priority", "batch", "unique_key", "username", "app_id", "start_date", "end_date",
                     "parent_id", "pinned_device_id", "prefer_device_id", "prefer_seconds", "same_device_as"):  # fmt: skip
            assert row[name] == getattr(task, name), name
        assert row["execution_timeout"] == (task.execution_timeout or world.policy.task_timeout)
        assert row["max_retry_count"] == (world.policy.max_retry_count if task.max_retry_count is None else 0)
    payloads = world.rows("SELECT task_id, task_data FROM af_task_payload ORDER BY task_id")
    assert payloads == [{"task_id": n, "task_data": '{"n": 1}'} for n in (5, len(kinds) + 5)]
    world.check_books()


def test_what_was_read_before_a_task_changed_hands_moves_it_no_more(world: World) -> None:
    task_id = world.submit()
    first = world.take("shop-1")

    def run(tx: Tx) -> list[bool]:
        old = db.get_task(tx, task_id)
        attempt = db.get_attempt(tx, first.assignment_id)
        assert old is not None and attempt is not None
        db.release(tx, attempt, "handed_back")
        waiting = db.get_task(tx, task_id)
        assert waiting is not None and db.assign(tx, [waiting], db.Gift("shop-2", None, True))
        new = db.get_task(tx, task_id)
        assert new is not None and new.status == old.status == "assigned"
        return [db._move(tx, "release", task, "pending", assigned_device_id=None) for task in (old, new)]

    assert world.store.write(run) == [False, True]


def test_tasks_given_away_together_have_each_its_own_lease_and_deadline(world: World) -> None:
    timeouts = [10, 20, 10, 30]
    for seconds in timeouts:
        world.submit(execution_timeout=seconds)
    world.register()
    given = world.pull(limit=4)
    attempts = [world.attempt(task.assignment_id) for task in given]
    assert [attempt["deadline_at"] - world.now - db.GRACE_SECONDS for attempt in attempts] == timeouts
    assert [attempt["lease_id"] for attempt in attempts] == [task.lease_id for task in given]
    assert len({task.lease_id for task in given}) == 4 and all(len(task.lease_id) == 32 for task in given)


def test_the_same_key_in_the_same_batch_is_one_task(world: World) -> None:
    first = world.store.write(db.submit, [db.NewTask("echo", batch="a", unique_key="k", task_data='{"n": 1}')])[0]
    again = world.store.write(db.submit, [db.NewTask("echo", batch="a", unique_key="k", task_data='{"n": 2}')])[0]
    other = world.store.write(db.submit, [db.NewTask("echo", batch="b", unique_key="k")])[0]
    assert (again.id, again.created, again.status) == (first.id, False, "pending")
    assert other.created and other.id != first.id
    assert world.rows("SELECT task_data FROM af_task_payload") == [{"task_data": '{"n": 1}'}]


def test_the_same_key_twice_in_one_request_is_one_task(world: World) -> None:
    both = world.store.write(db.submit, [db.NewTask("echo", unique_key="k")] * 2 + [db.NewTask("echo")])
    assert [task.created for task in both] == [True, False, True]
    assert both[0].id == both[1].id
    assert world.counts() == {"pending": 2}


def test_a_known_key_may_requeue_what_failed(world: World) -> None:
    world.submit(unique_key="k", max_retry_count=0)
    world.report(world.take(), "failed")
    again = world.store.write(db.submit, [db.NewTask("echo", unique_key="k", requeue_if_failed=True)])[0]
    assert (again.created, again.status) == (False, "pending")


def test_exactly_one_of_many_submitters_creates_a_key(world: World) -> None:
    barrier = threading.Barrier(16)
    created = []

    def run() -> None:
        barrier.wait()
        created.append(world.store.write(db.submit, [db.NewTask("echo", batch="b", unique_key="one")])[0].created)

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 15 + [True]


def test_exactly_one_of_many_reports_is_accepted(world: World) -> None:
    world.submit()
    delivery = world.take()
    barrier = threading.Barrier(16)
    outcomes = []

    def run() -> None:
        barrier.wait()
        outcomes.append(world.report(delivery, "completed").outcome)

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["accepted"] + ["duplicate"] * 15


def test_what_comes_of_a_task_needs_its_tags_and_is_retried_as_often(world: World) -> None:
    world.register(tags=("lan", "selectors"))
    world.submit(required_tags=("lan",), max_retry_count=0)
    children = (db.NewTask("echo"), db.NewTask("echo", required_tags=("selectors",), max_retry_count=5))
    judged = world.report(world.take(), "completed", new_tasks=children)
    rows = [world.row(task.id) for task in judged.new_tasks if task.id]
    assert [row["required_tags"] for row in rows] == ['["lan"]', '["lan", "selectors"]']
    assert [row["max_retry_count"] for row in rows] == [0, 5]


def test_work_spawns_work_in_the_transaction_of_the_result(world: World) -> None:
    task_id = world.submit(batch="crawl", unique_key="/")
    delivery = world.take()
    children = (
        db.NewTask("echo", batch="crawl", unique_key="/a", parent_id=task_id),
        db.NewTask("echo", batch="crawl", unique_key="/", parent_id=task_id),
    )
    judged = world.report(delivery, "completed", new_tasks=children)
    assert [(task.created, task.status) for task in judged.new_tasks] == [(True, "pending"), (False, "completed")]
    assert world.report(delivery, "completed", new_tasks=children).new_tasks == ()
    assert world.counts() == {"completed": 1, "pending": 1}


def test_a_batch_never_holds_more_tasks_than_its_limit(world: World) -> None:
    tasks = [db.NewTask("echo", batch="b", unique_key=str(n), max_batch_tasks=3) for n in range(5)]
    submitted = world.store.write(db.submit, tasks)
    assert [task.status for task in submitted] == ["pending"] * 3 + ["batch_full"] * 2
    again = world.store.write(db.submit, tasks)
    assert [task.id for task in again] == [task.id for task in submitted]


def test_a_cancelled_batch_takes_no_more_tasks(world: World) -> None:
    world.submit(batch="b")
    world.store.write(db.set_batch_state, "b", "cancelled")
    assert world.store.write(db.submit, [db.NewTask("echo", batch="b")])[0].status == "batch_cancelled"


def test_a_failing_verb_leaves_nothing_behind(world: World) -> None:
    def submit_and_break(tx: Tx) -> None:
        db.submit(tx, [db.NewTask("echo", batch="half")])
        raise ValueError("after the insert")

    with pytest.raises(ValueError, match="after the insert"):
        world.store.write(submit_and_break)
    assert world.rows("SELECT * FROM af_crawl_tasks") == world.rows("SELECT * FROM af_batch") == []


def test_at_most_the_twenty_newest_attempts_of_a_task_are_kept(world: World) -> None:
    task_id = world.submit()
    for _ in range(25):
        world.report(world.take(), "released")
    attempts = world.rows("SELECT id FROM af_task_assignment WHERE task_id = ?", task_id)
    assert len(attempts) == 20 and world.row(task_id)["attempt_count"] == 25


def test_retention_deletes_old_finished_tasks_and_their_counts(world: World) -> None:
    for _ in range(3):
        world.submit(task_data='{"a": 1}')
        world.report(world.take(), "completed", result="{}")
    waiting = world.submit()
    world.now += 31 * 86400
    assert world.store.write(retention.delete_finished, world.now - 30 * 86400, 2) == 2
    assert world.store.write(retention.delete_finished, world.now - 30 * 86400, 2) == 1
    assert [row["id"] for row in world.rows("SELECT id FROM af_crawl_tasks")] == [waiting]
    for table in ("af_task_payload", "af_task_result", "af_task_assignment"):
        assert world.rows(f"SELECT * FROM {table}") == []


def test_an_id_is_never_given_twice(world: World) -> None:
    first = world.submit()
    world.report(world.take(), "completed")
    world.now += 1
    world.store.write(retention.delete_finished, world.now)
    assert world.submit() == first + 1


def test_impossible_rows_are_refused_by_the_table_itself(world: World) -> None:
    task_id = world.submit()
    for column, value in (("status", "'done'"), ("priority", "11"), ("finished_at", "1.0"), ("next_run_at", "1.0")):

        def run(tx: Tx, column: str = column, value: str = value) -> None:
            tx.execute(f"UPDATE af_crawl_tasks SET {column} = {value} WHERE id = {task_id}")

        with pytest.raises(Exception, match="CHECK constraint"):
            world.store.write(run)


def test_the_backoff_gives_the_numbers_of_its_docstring() -> None:
    class NoLuck:
        def random(self) -> float:
            return 0.0

    waits = [db.backoff_seconds(n, 15.0, NoLuck()) for n in (1, 2, 3, 4, 20)]  # type: ignore[arg-type]
    assert waits == [15.0, 30.0, 60.0, 120.0, 3600.0]


def test_a_task_takes_its_defaults_from_the_policy(tmp_path: Path) -> None:
    world = World(tmp_path, Policy(task_timeout=77, max_retry_count=9))
    row = world.row(world.submit())
    assert (row["execution_timeout"], row["max_retry_count"]) == (77, 9)
    world.close()
