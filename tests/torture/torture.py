"""Does anything get lost while everything fails? `make torture SECONDS=60`, or `torture.py --help`.

A master, three workers and two producers, all of them the shipped programs, run under a schedule of faults; then the
faults end, everything has time to settle, the master is killed once more, and checker.py judges what was written down.
Exit code 0 when every count is 0; 1 when one is not; what was written down is kept then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import power
from checker import COUNTS, Evidence, Verdict, arrived, check, spooled
from farm import wait_for
from faults import DEVICE_TIMEOUT, KINDS, MASTER_SETTINGS, PAUSE_SECONDS, Fault, Stage, make_schedule

SETTLE_SECONDS, PLANT_SETTLE_SECONDS = 240.0, 30.0


class Plant(NamedTuple):
    """A mistake of launch.py: the count that must show it, and a schedule that brings it out."""

    shown_by: str
    seconds: float
    kinds: tuple[str, ...]
    pause: tuple[float, float] = PAUSE_SECONDS


PLANTS = {
    "no_fencing": Plant("double-accepted", 20, ("stop_worker",)),
    "reply_before_commit": Plant("lost", 10, ("kill_master",)),
    "no_unique_index": Plant("unexpected", 10, ("duplicate",)),
    "synchronous_normal": Plant("lost", 12, ("power_cut_master",)),
    "expiry_by_wall_clock": Plant("early expiries", 20, ("clock_step",), (0.15, 0.4)),
    "no_fsync": Plant("results dropped", 12, ("kill_master", "power_cut_worker")),
    "no_spool": Plant("results dropped", 12, ("kill_master", "power_cut_worker")),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture.py", description="Kills, cuts and fills everything, and counts.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults go on (60)")
    parser.add_argument("--seed", type=int, help="of an earlier run: the same schedule again")
    parser.add_argument("--plant", choices=sorted(PLANTS), help="a mistake that must be found: exit code 1 is right")
    parser.add_argument("--kinds", help=f"only these faults, with commas: {', '.join(KINDS)}")
    parser.add_argument("--keep", metavar="FOLDER", help="keep everything there, also when nothing is wrong")
    parser.add_argument("--tmpfs", action="store_true", help="the database on a small disk that gets full (needs root)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the end of `run`, which kills what it started
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    plant = PLANTS.get(options.plant)
    kinds = options.kinds.split(",") if options.kinds else list(plant.kinds) if plant else list(KINDS)
    if power.why_not():
        kinds = [kind for kind in kinds if not kind.startswith("power_cut")]
        print(f"no power is cut: {power.why_not()}")
    seconds = plant.seconds if plant else options.seconds
    folder = Path(options.keep or tempfile.mkdtemp(prefix="torture-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"torture seed={seed} seconds={seconds:g} faults={','.join(kinds)} plant={options.plant or 'none'}", flush=True
    )
    schedule = make_schedule(seed, seconds, kinds, plant.pause if plant else PAUSE_SECONDS)
    verdict = check(run(folder, seed, seconds, schedule, options.plant or "", has_small_disk=options.tmpfs))
    tell(verdict)
    if verdict.is_clean and not options.keep:
        shutil.rmtree(folder)
    else:
        print(f"kept: {folder}")
    return 0 if verdict.is_clean else 1


def run(
    folder: Path, seed: int, seconds: float, schedule: list[Fault], plant: str = "", *, has_small_disk: bool = False
) -> Evidence:
    """One run in an empty folder; what was written down, which is also in its evidence.json."""
    stage = Stage(folder, seed, plant, has_small_disk=has_small_disk)
    try:
        stage.start()
        stage.play(schedule, seconds)
        stage.end_producers()
        settle(stage, PLANT_SETTLE_SECONDS if plant else SETTLE_SECONDS)
        stage.end_keepers()
        evidence = collect(stage)
    finally:
        stage.close()
    evidence.save(folder / "evidence.json")
    return evidence


def settle(stage: Stage, seconds: float) -> None:
    """Until every task has ended, every spooled report has come and every device is back; what has not by then, the
    checker will name."""

    def is_settled() -> bool:
        with contextlib.suppress(OSError, AssertionError):
            states = stage.master.states()
            devices = stage.master.get("/devices")["devices"]
            are_back = all(device["status"] == "online" for device in devices)
            return are_back and not set(states) & {"scheduled", "pending", "assigned", "running"} and not unsent(stage)
        return False

    started = time.monotonic()
    with contextlib.suppress(AssertionError):
        wait_for("every task to end", is_settled, seconds)
    print(f"settled after {time.monotonic() - started:.1f} s", flush=True)


def unsent(stage: Stage) -> set[int]:
    """The attempts whose report a device keeps, and whose answer it has not seen."""
    return spooled(lines_of(stage.witness)) - arrived(stage.proxy.calls)


def collect(stage: Stage) -> Evidence:
    """Devices stop in good order and send what they have; the master is killed once more, and asked."""
    ended_at = time.monotonic()
    codes = {name: worker.stop() for name, worker in stage.workers.items()}
    stage.master.kill()
    stage.master.start()
    tasks = [json.loads(line) for line in stage.master.api("GET", "/tasks/export?include=result").text.splitlines()]
    assert tasks.pop() == {"end": True, "rows": len(tasks)}, "the export was cut off"
    for task in tasks:
        task["batch"] = task["batch"] or ""
    counters = {batch: stage.master.states(batch or None) for batch in ("", "torture")}
    codes["master"] = stage.master.stop()
    with contextlib.closing(sqlite3.connect(stage.database)) as connection:
        connection.row_factory = sqlite3.Row
        attempts = [dict(row) for row in connection.execute("SELECT * FROM af_task_assignment")]
        books = [f"{name} ended with {code}" for name, code in codes.items() if code != 0]
        books += wrong_books(connection)
        integrity = "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))
    return Evidence(
        device_timeout=DEVICE_TIMEOUT,
        max_running=MASTER_SETTINGS["limits"][0]["max_running"],
        ended_at=ended_at,
        history=lines_of(stage.history),
        witness=lines_of(stage.witness),
        calls=stage.proxy.calls,
        faults=stage.done,
        tasks=tasks,
        attempts=attempts,
        counters=counters,
        books=books,
        integrity=integrity,
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


BOOKS = {
    "lane.waiting": "SELECT id, waiting, (SELECT COUNT(*) FROM af_crawl_tasks WHERE lane_id = af_lane.id"
    " AND status = 'pending') FROM af_lane",
    "lane.unfinished": "SELECT id, unfinished, (SELECT COUNT(*) FROM af_crawl_tasks WHERE lane_id = af_lane.id"
    " AND finished_at IS NULL) FROM af_lane",
    "limit_key.running": "SELECT id, running, (SELECT COUNT(*) FROM af_lane_key JOIN af_crawl_tasks AS task ON"
    " task.lane_id = af_lane_key.lane_id WHERE key_id = af_limit_key.id AND task.status IN ('assigned', 'running'))"
    " FROM af_limit_key",
}


def wrong_books(connection: sqlite3.Connection) -> list[str]:
    """The kept counts that differ from counting the rows."""
    return [
        f"{name} of {row[0]} is {row[1]}, the rows say {row[2]}"
        for name, sql in BOOKS.items()
        for row in connection.execute(sql)
        if row[1] != row[2]
    ]


def tell(verdict: Verdict) -> None:
    for name, figure in verdict.figures.items():
        print(f"  {name}: {', '.join(f'{k} {v}' for k, v in figure.items()) if isinstance(figure, dict) else figure}")
    for finding in verdict.findings[:40]:
        print(f"! {finding}")
    print("  ".join(f"{count} {verdict.counts[count]}" for count in COUNTS))


if __name__ == "__main__":
    sys.exit(main())
