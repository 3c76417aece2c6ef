"""How fast is it on this machine? End to end, bulk submit and idle latency: medians of several runs, with their spread.

`make bench`, or `python bench/run.py --quick` for a first impression. The master and the workers are the shipped
programs, as processes of their own on loopback, with the spool on, synchronous=FULL and full history; everything lies
in a temporary folder. The submitter, this program, shares the machine with them. Other task systems (bench/peers.py)
follow in the same run, with a quarter of the tasks.

It measures and never judges: the figures depend on the machine, and on what else it does.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import signal
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peers
from bench.farm import BODY_TASKS, Farm, bodies, cpu_seconds, open_farm, wait_until

WORKERS = 2
LIBRARIES = ("granian", "bottle", "peewee", "msgspec", "requests")
QUICK = {"runs": 1, "tasks": 2000, "latencies": 20}


class EndToEnd(NamedTuple):
    """One run: tasks/s from the first submit to the last completion, and CPU seconds per 1,000 tasks."""

    rate: float
    master_cpu: float
    workers_cpu: float


def end_to_end(total: int, slots: int) -> EndToEnd:
    """No-op tasks through two idle workers."""
    with open_farm() as farm:
        farm.add_workers(WORKERS, concurrent_tasks=slots)
        sent = bodies({"task_type": "echo"}, total)
        cpu = cpu_seconds([farm.master]), cpu_seconds(farm.workers)
        started = time.perf_counter()
        for body in sent:
            farm.post("/tasks", body)
        wait_until("the last task", lambda: completed(farm) == total)
        seconds = time.perf_counter() - started
        used = cpu_seconds([farm.master]) - cpu[0], cpu_seconds(farm.workers) - cpu[1]
        return EndToEnd(total / seconds, used[0] / total * 1000, used[1] / total * 1000)


def completed(farm: Farm) -> int:
    found: int = farm.get("/tasks/stats?task_type=echo")["by_state"]["completed"]
    return found


def bulk_submit(total: int) -> float:
    """Tasks per second, one request after the other, with no device to take them."""
    with open_farm() as farm:
        sent = bodies({"task_type": "echo", "task_data": {"url": "https://example.com/a/page"}}, total)
        started = time.perf_counter()
        for body in sent:
            farm.post("/tasks", body)
        return total / (time.perf_counter() - started)


def idle_latency(count: int) -> list[float]:
    """Milliseconds from the submit's request to the call of the executor in an idle worker, one task at a time."""
    with open_farm() as farm:
        farm.add_workers(1, concurrent_tasks=3, executors=[str(Path(__file__).with_name("moment.py"))])
        _one_latency(farm)  # the first one opens connections
        return sorted(_one_latency(farm) for _ in range(count))


def _one_latency(farm: Farm) -> float:
    time.sleep(random.uniform(0.02, 0.04))  # the worker's report is over, its next pull is open
    submitted = time.perf_counter()
    task_id = farm.post("/tasks", b'{"task_type":"moment"}')["id"]
    task: dict[str, dict[str, float]] = {}

    def is_completed() -> bool:
        task.update(farm.get(f"/tasks/{task_id}"))
        return bool(task["result"])

    wait_until("one task", is_completed, pause_seconds=0.02)
    return (task["result"]["started"] - submitted) * 1000


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The nearest rank: p99 of 200 is the 198th."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def machine() -> str:
    """What the figures depend on, in a few lines."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    try:
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
        load = f"{os.getloadavg()[0]:.2f}"
    except (AttributeError, OSError, ValueError):  # Windows
        memory = load = "unknown"
    return (
        f"{_cpu_model()}, {os.cpu_count()} cores, {memory} memory, {platform.system()} {platform.release()};"
        f" load average before the runs {load}\n"
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {libraries}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def row(what: str, unit: str, runs: Sequence[float]) -> str:
    """A line of the table: median, spread, raw runs."""
    digits = 0 if min(runs) >= 100 else 2 if min(runs) >= 1 else 3
    low, middle, high = (f"{x:,.{digits}f}" for x in (min(runs), statistics.median(runs), max(runs)))
    return f"| {what} | {middle} {unit} | {low} to {high} | {' '.join(f'{run:,.{digits}f}' for run in runs)} |"


def tables(runs: int, tasks: int, slots: int, latencies: int, say: Callable[[str], None]) -> None:
    """Does all runs and says each figure as soon as it is there."""
    say("| what | median | min to max | raw runs |\n|---|---|---|---|")
    ends = [end_to_end(tasks, slots) for _ in range(runs)]
    say(row(f"end to end, {WORKERS} workers of {slots} slots", "tasks/s", [end.rate for end in ends]))
    say(row("CPU of the master", "s per 1,000 tasks", [end.master_cpu for end in ends]))
    say(row(f"CPU of the {WORKERS} workers together", "s per 1,000 tasks", [end.workers_cpu for end in ends]))
    say(row(f"bulk submit, bodies of {BODY_TASKS:,}", "tasks/s", [bulk_submit(tasks) for _ in range(runs)]))
    waits = [idle_latency(latencies) for _ in range(runs)]
    for percent in (50, 99):
        what = f"idle latency, submit to start, p{percent}"
        say(row(what, "ms", [percentile(run, percent) for run in waits]))


def peer_table(runs: int, tasks: int, say: Callable[[str], None]) -> None:
    """The same no-op tasks through every peer; one sentence instead where they are not installed."""
    if why := peers.missing():
        say(f"\nNo other task system was measured: {why}.")
        return
    say("\n| other task systems, 2 workers | median | min to max | raw runs |\n|---|---|---|---|")
    for peer in peers.PEERS:
        found = [peers.run(peer, tasks) for _ in range(runs)]
        say(row(peer.name, "tasks/s", [run.rate for run in found]))
        say(row(f"{peer.name}: CPU", "s per 1,000 tasks", [run.cpu for run in found]))


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of each figure with few tasks")
    parser.add_argument("--runs", type=int, default=3, help="runs of each figure (3)")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks of a run (20000)")
    parser.add_argument("--slots", type=int, default=100, help="concurrent_tasks of each worker, end to end (100)")
    parser.add_argument("--latencies", type=int, default=200, help="single submits of a latency run (200)")
    parser.add_argument("--no-peers", action="store_true", help="leave the other task systems out")
    options = parser.parse_args(argv)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(argv)
    counts = (options.runs, options.tasks, options.slots, options.latencies)
    if min(counts) < 1:
        parser.error("--runs, --tasks, --slots and --latencies must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that our processes are stopped then, too
    print(machine())
    print(
        f"{options.tasks:,} tasks a run, {options.latencies} submits a latency run; FULL durability, spool on,"
        " every attempt kept, logs at WARNING, all else as shipped\n"
    )
    tables(*counts, say=_say)
    if not options.no_peers:
        peer_table(options.runs, max(1, options.tasks // 4), _say)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
