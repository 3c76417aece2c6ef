"""Does the torture bench find nothing in the shipped programs, and everything that was planted?

Most mistakes are shown to the checker on a history written by hand; the slow tests plant them in real programs, and
run ten minutes without any. No figure is asserted, only what the checker counts.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from farm import environment

sys.path.insert(0, str(Path(__file__).resolve().parent / "torture"))

import launch
import power
from checker import COUNTS, Evidence, Verdict, check
from faults import KINDS, make_schedule
from torture import PLANTS

BENCHES = Path(__file__).resolve().parent / "torture"


def torture(folder: Path, *arguments: str, bench: str = "torture.py", seconds: float = 280) -> tuple[int, str]:
    """Exit code and output; the processes of a bench that hangs end with it."""
    command = [sys.executable, str(BENCHES / bench), "--keep", str(folder), *arguments]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        output, _ = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        run.terminate()
        output, _ = run.communicate()
    return run.returncode, output


# -- the shipped programs -------------------------------------------------------------------------------------


def test_half_a_minute_of_all_faults_loses_nothing(tmp_path: Path) -> None:
    code, output = torture(tmp_path, "--seconds", "30", "--seed", "1")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_minutes_of_all_faults_lose_nothing(tmp_path: Path) -> None:
    code, output = torture(tmp_path, "--seconds", "600", seconds=1700)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(power.why_not()), reason=f"no power can be cut here: {power.why_not()}")
def test_forty_power_cuts_lose_nothing(tmp_path: Path) -> None:
    code, output = torture(tmp_path, "--cuts", "40", bench="power_cuts.py", seconds=1100)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_mistake_is_found(plant: str, tmp_path: Path) -> None:
    """Chance decides whether a kill meets the moment that it needs, so there are three tries."""
    if power.why_not() and any(kind.startswith("power_cut") for kind in PLANTS[plant].kinds):
        pytest.skip(f"no power can be cut here: {power.why_not()}")

    def is_found(seed: int) -> bool:
        code, output = torture(tmp_path / str(seed), "--plant", plant, "--seed", str(seed))
        evidence = tmp_path / str(seed) / "evidence.json"
        assert evidence.exists(), output
        return code == 1 and check(Evidence.load(evidence)).counts[PLANTS[plant].shown_by] > 0

    assert any(is_found(seed) for seed in (1, 2, 3))


def test_every_mistake_that_can_be_planted_has_a_schedule_that_brings_it_out() -> None:
    assert set(PLANTS) == set(launch.PLANTS)
    assert all(set(plant.kinds) <= set(KINDS) and plant.shown_by in COUNTS for plant in PLANTS.values())


def test_a_seed_makes_the_same_schedule_again() -> None:
    assert make_schedule(5, 60, list(KINDS)) == make_schedule(5, 60, list(KINDS)) != make_schedule(6, 60, list(KINDS))
    assert {fault.kind for fault in make_schedule(5, 60, list(KINDS))} == set(KINDS)


# -- the checker, on a history written by hand ----------------------------------------------------------------


def execution(at: float, task: int, assignment: int, *, username: str = "ann") -> list[dict]:
    """One second of work, as its witness wrote it down; its report was spooled at its end."""
    facts = {"token": f"t{assignment}", "task": task, "assignment": assignment, "username": username}
    return [
        {"t": at, "e": "begin", **facts},
        {"t": at + 1, "e": "end", **facts},
        {"t": at + 1, "e": "spooled", "party": "shop-1", "assignments": [assignment]},
    ]


def call(f: str, at: float, **facts: object) -> dict:
    return {"f": f, "from": at, "to": at, "status": 200, "party": "shop-1", "device": "shop-1", **facts}


def report(at: float, assignment: int, verdict: str = "accepted") -> dict:
    return call("report", at, reports=[[assignment, "completed", f"t{assignment}", verdict]])


def attempt(number: int, task: int, status: str, error_type: str | None = None) -> dict:
    return {"id": number, "task_id": task, "device_id": "shop-1", "status": status, "error_type": error_type,
            "late_outcome": None}  # fmt: skip


def row(task: int, assignment: int, key: str) -> dict:
    return {"id": task, "batch": "", "unique_key": key, "status": "completed", "assignment_id": assignment,
            "result": {"token": f"t{assignment}"}}  # fmt: skip


def sound() -> Evidence:
    """Two tasks. The device of the first was silent for four seconds, so that it ran twice, and its first report came
    too late."""
    keys = [["", "a", ""], ["", "b", ""]]
    return Evidence(
        device_timeout=3.0,
        max_running=1,
        ended_at=20.0,
        history=[
            {"f": "submit", "keys": keys},
            {"f": "submitted", "keys": keys, "ids": [1, 2], "status": 201, "answer": None},
        ],
        witness=[*execution(1, 1, 1), *execution(8, 1, 2), *execution(10, 2, 3)],
        calls=[
            call("register", 0),
            *(call("beat", at) for at in (0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)),
            call("pull", 1, given=[1]),
            report(6, 1, "stale"),
            call("pull", 8, given=[2]),
            report(9, 2),
            call("pull", 10, given=[3]),
            report(11, 3),
            report(12, 3, "duplicate"),
        ],
        faults=[{"kind": "stop_worker", "target": "shop-1", "from": 1.5, "to": 5.0}],
        tasks=[row(1, 2, "a"), row(2, 3, "b")],
        attempts=[attempt(1, 1, "released", "lost"), attempt(2, 1, "completed"), attempt(3, 2, "completed")],
        counters={"": {"completed": 2, "failed": 0}},
    )


def test_a_sound_history_is_clean() -> None:
    verdict: Verdict = check(sound())
    assert verdict.is_clean, verdict.findings


def result_of_the_attempt_that_was_fenced_off(evidence: Evidence) -> None:
    evidence.tasks[0]["result"] = {"token": "t1"}


def stale_report_was_accepted(evidence: Evidence) -> None:
    evidence.calls[evidence.calls.index(report(6, 1, "stale"))] = report(6, 1)


def task_that_was_acknowledged_before_its_commit(evidence: Evidence) -> None:
    del evidence.tasks[1], evidence.attempts[2]
    evidence.counters = {"": {"completed": 1}}


def report_that_was_acknowledged_before_its_commit(evidence: Evidence) -> None:
    evidence.tasks[1].update(status="failed", result=None)
    evidence.attempts[2].update(status="released", error_type="handed_back")
    evidence.counters = {"": {"completed": 1, "failed": 1}}


def two_tasks_of_one_key(evidence: Evidence) -> None:
    evidence.tasks[1]["unique_key"] = "a"
    evidence.history = [
        {"f": "submit", "keys": [["", "a", ""]]},
        {"f": "submitted", "keys": [["", "a", ""]], "ids": [2], "status": 201, "answer": None},
    ]


def task_of_nobody(evidence: Evidence) -> None:
    evidence.history = [{"f": "submit", "keys": [["", "a", ""]]}]


def task_without_an_end(evidence: Evidence) -> None:
    evidence.tasks[0]["status"] = "running"
    evidence.counters = {"": {"running": 1, "completed": 1}}


def two_at_once_where_one_may_run(evidence: Evidence) -> None:
    evidence.witness = [*execution(1, 1, 1), *execution(8.5, 1, 2), *execution(9, 2, 3)]


def lease_that_ran_out_while_its_device_was_heard(evidence: Evidence) -> None:
    evidence.calls += [call("beat", at) for at in (2, 3, 4)]


def spool_that_forgot_a_report(evidence: Evidence) -> None:
    evidence.calls.remove(report(6, 1, "stale"))


def counter_that_lost_a_task(evidence: Evidence) -> None:
    evidence.counters = {"": {"completed": 1}}


def page_that_is_damaged(evidence: Evidence) -> None:
    evidence.integrity = "row 2 missing from index task_key"


def traceback_for_a_device(evidence: Evidence) -> None:
    evidence.calls.append({**call("refused", 9), "status": 500, "path": "/tasks/report", "answer": "boom"})


@pytest.mark.parametrize(
    ("count", "mistake"),
    [
        ("double-accepted", result_of_the_attempt_that_was_fenced_off),
        ("double-accepted", stale_report_was_accepted),
        ("lost", task_that_was_acknowledged_before_its_commit),
        ("lost", report_that_was_acknowledged_before_its_commit),
        ("unexpected", two_tasks_of_one_key),
        ("unexpected", task_of_nobody),
        ("stuck", task_without_an_end),
        ("limits broken", two_at_once_where_one_may_run),
        ("early expiries", lease_that_ran_out_while_its_device_was_heard),
        ("results dropped", spool_that_forgot_a_report),
        ("books wrong", counter_that_lost_a_task),
        ("books wrong", page_that_is_damaged),
        ("server errors", traceback_for_a_device),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_checker_finds(count: str, mistake: Callable[[Evidence], None]) -> None:
    evidence = copy.deepcopy(sound())
    mistake(evidence)
    assert check(evidence).counts[count] > 0
