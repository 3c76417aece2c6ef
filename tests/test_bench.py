"""Does the bench run by itself, and does it leave nothing behind? Its figures are nobody's business here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from world import World

ROOT = Path(__file__).resolve().parent.parent
RUN = str(ROOT / "bench" / "run.py")
FIGURES = (
    "end to end, 2 workers of 4 slots",
    "CPU of the master",
    "CPU of the 2 workers together",
    "bulk submit, bodies of 1,000",
    "idle latency, submit to start, p50",
    "idle latency, submit to start, p99",
)


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, RUN, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)


@pytest.mark.slow
def test_every_figure_is_printed_and_no_process_or_file_stays_behind(tmp_path: Path) -> None:
    done = bench(tmp_path, "--runs", "1", "--tasks", "50", "--slots", "4", "--latencies", "2", "--no-peers")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[1:]] == list(FIGURES)
    assert all(any(character in "123456789" for character in row[1]) for row in rows[1:])
    assert list(tmp_path.iterdir()) == []  # a master that still ran would hold its database there
    assert done.stderr == ""


def test_the_machine_and_the_settings_stand_above_the_figures(tmp_path: Path) -> None:
    done = bench(tmp_path, "--quick", "--runs", "1", "--tasks", "1", "--slots", "300", "--latencies", "1")
    assert done.returncode == 1
    assert "cores" in done.stdout and "SQLite" in done.stdout and "FULL durability" in done.stdout
    assert "concurrent_tasks" in done.stderr and "worker.py ended with exit code 2" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["--runs", "--tasks", "--slots", "--latencies"])
def test_a_count_below_one_is_refused(tmp_path: Path, wrong: str) -> None:
    done = bench(tmp_path, wrong, "0")
    assert done.returncode == 2
    assert "at least 1" in done.stderr


@pytest.mark.slow
def test_the_profile_accounts_for_every_step_of_a_task(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "bench" / "profile.py"), "--tasks", "200", "--slots", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    for step in ("submit: write", "dispatch: write", "deliver: build", "deliver: take", "execute: call", "report: judge",
                 "report: send", "everything else"):  # fmt: skip
        assert f"| {step}" in done.stdout, step
    assert list(tmp_path.iterdir()) == []


def steps_of_a_pull(world: World) -> int:
    """How many times SQLite's machine has passed a hundred instructions while a device pulled and found one task."""
    task_id = world.submit()
    passed = [0]

    def count() -> int:
        passed[0] += 1
        return 0

    world.store.write(lambda tx: tx.connection.set_progress_handler(count, 100))
    tasks = world.pull(seq=task_id, ack=task_id - 1)
    world.store.write(lambda tx: tx.connection.set_progress_handler(None, 0))
    assert len(tasks) == 1
    world.report(tasks[0], "completed")
    return passed[0]


def test_a_pull_costs_the_same_after_a_thousand_tasks(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.register(max_concurrent_tasks=1000)
    before = steps_of_a_pull(world)
    for _ in range(1000):
        world.submit()
    for task in world.pull(limit=1000):
        world.report(task, "completed")
    assert steps_of_a_pull(world) <= before + 5
    world.close()


@pytest.mark.slow
def test_the_scale_bench_prints_its_table_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "bench" / "scale.py"), "--rows", "2000", "--flow", "50"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| "))
    assert rows.pop("what") == "2,000 finished, 2,000 waiting"
    assert len(rows) > 30 and rows["deleted by retention in 32 s"] == "1,004"  # the oldest, and all of them
    assert list(tmp_path.iterdir()) == []
