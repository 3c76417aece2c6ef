"""Tasks that wait on a device for a slot, with real processes: the device stops in the middle, and others go on."""

from __future__ import annotations

import collections
import os
import signal
from pathlib import Path
from typing import Any

from farm import ROOT, Master, Program, Worker, wait_for

EXECUTORS = '''
import time
from pathlib import Path
from executors.task_executor import TaskExecutor


class Witness(TaskExecutor):
    """4 ms, and a line for each run."""

    isolation = "thread"

    def __init__(self):
        super().__init__("witness")

    def execute_task(self, task_data):
        with open(task_data["file"], "a") as file:
            file.write(f"{task_data['n']}\\\\n")
        time.sleep(0.004)
        return {}


class Gate(TaskExecutor):
    """Keeps its slot until the file is there."""

    isolation = "thread"

    def __init__(self):
        super().__init__("gate")

    def execute_task(self, task_data):
        while not Path(task_data["file"]).exists():
            time.sleep(0.01)
        return {}
'''.replace("\\\\", "\\")


def start(programs: list[Program], master: Master, folder: Path, name: str) -> Worker:
    """A worker that asks for as many short tasks as it may, also where a busy machine makes them longer."""
    script = folder / "eager_worker.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport worker\nfrom executors.device import pace\n"
        "pace.SHORT_SECONDS, pace.AHEAD_SECONDS = 10.0, 1000.0\nos._exit(worker.main())"
    )
    worker = Worker(
        master.url, folder / name, name, script=str(script), concurrent_tasks=1, heartbeat_interval=0.5,
        executors=[str(folder / "mine.py")],
    )  # fmt: skip
    programs.append(worker)
    return worker


def teach(master: Master, witness: Path) -> None:
    """After some short tasks the device knows that they are short."""
    warm = [{"task_type": "witness", "batch": "warm", "task_data": {"n": -1, "file": f"{witness}.warm"}}] * 60
    master.submit(*warm)
    wait_for("the short tasks", lambda: master.states("warm") == {"completed": len(warm)})


def hold_fifty(master: Master, folder: Path) -> tuple[int, list[int]]:
    """The device runs one long task, and 50 short ones wait there behind it."""
    short = [
        {"task_type": "witness", "batch": "b", "task_data": {"n": n, "file": str(folder / "witness")}}
        for n in range(50)
    ]
    gate = {"task_type": "gate", "priority": 10, "task_data": {"file": str(folder / "go")}}
    gate_id, *ids = master.submit(gate, *short)
    wait_for("all 50 on the device", lambda: master.states("b") == {"assigned": 50})
    wait_for("the long one to run", lambda: master.get(f"/tasks/{gate_id}")["status"] == "running")
    return gate_id, ids


def attempts_of(master: Master, task_ids: list[int]) -> list[dict[str, Any]]:
    return [attempt for task_id in task_ids for attempt in master.get(f"/tasks/{task_id}")["attempts"]]


def test_what_waits_on_a_stopped_device_is_done_by_others_and_nothing_runs_twice(
    programs: list[Program], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(EXECUTORS)
    master = Master(tmp_path, device_timeout=12, timeout_check_interval=1, heartbeat_interval=0.5)
    programs.append(master)
    first = start(programs, master, tmp_path, "shop-1")
    teach(master, tmp_path / "witness")
    _, ids = hold_fifty(master, tmp_path)
    device = master.get("/devices")["devices"][0]
    assert (device["assigned_count"], device["max_concurrent_tasks"]) == (51, 1)
    os.kill(first.process.pid, signal.SIGSTOP)
    start(programs, master, tmp_path, "shop-2")
    wait_for("all of them", lambda: master.states("b") == {"completed": 50})
    (tmp_path / "go").touch()
    os.kill(first.process.pid, signal.SIGCONT)

    def is_dropped() -> bool:
        """By its own clock, or because the master says so first."""
        lines = (first.folder / "shop-1.log").read_text().splitlines()
        return (
            sum("type=witness" in line and ("not started in time" in line or " cancel " in line) for line in lines)
            == 50
        )

    wait_for("the first device to drop them", is_dropped)
    after = [{"task_type": "witness", "batch": "after", "task_data": {"n": -1, "file": str(tmp_path / "after")}}]
    master.submit(*after)
    wait_for("one more", lambda: master.states("after") == {"completed": 1})
    runs = collections.Counter((tmp_path / "witness").read_text().split())
    assert runs == {str(n): 1 for n in range(50)}
    attempts = attempts_of(master, ids)
    assert collections.Counter((a["device_id"], a["status"]) for a in attempts) == {
        ("shop-1", "released"): 50, ("shop-2", "completed"): 50,
    }  # fmt: skip
    assert {a["error_type"] for a in attempts if a["device_id"] == "shop-1"} == {"never_started"}
    assert {(t["retry_count"], t["lost_count"]) for t in (master.get(f"/tasks/{n}") for n in ids)} == {(0, 0)}


def test_a_cancel_reaches_the_queue_of_a_device_and_a_stop_hands_it_back(
    programs: list[Program], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(EXECUTORS)
    master = Master(tmp_path)
    programs.append(master)
    worker = start(programs, master, tmp_path, "shop-1")
    teach(master, tmp_path / "witness")
    _, ids = hold_fifty(master, tmp_path)
    for task_id in ids[:10]:
        master.call("POST", f"/tasks/{task_id}/cancel", {})
    os.kill(worker.process.pid, signal.SIGTERM)
    wait_for("the rest to come back", lambda: master.states("b") == {"cancelled": 10, "pending": 40}, 4)
    (tmp_path / "go").touch()
    assert worker.wait() == 0
    assert not (tmp_path / "witness").exists()
