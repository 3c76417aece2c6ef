"""What does a device cost? From its start to its first task, then its memory and CPU while it has nothing to do.

The worker is the shipped one with one slot of work waiting for it. Memory is PSS (what the process has for itself, and
its share of what it shares) of the worker and every child of it; CPU is theirs together. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.farm import Farm, open_farm, wait_until
from bench.run import machine, row

SETTLE_SECONDS = 5.0


def family(pid: int) -> list[int]:
    """This process and all its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def memory_bytes(pid: int) -> int:
    """PSS."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def start_to_first_task(farm: Farm) -> float:
    """Seconds from the start of the process to the call of its executor."""
    task_id = farm.post("/tasks", b'{"task_type":"moment"}')["id"]
    started = time.perf_counter()
    farm.add_workers(1, executors=[str(Path(__file__).with_name("moment.py"))])
    wait_until("the first task", lambda: farm.get(f"/tasks/{task_id}")["status"] == "completed")
    found: float = farm.get(f"/tasks/{task_id}")["result"]["started"] - started
    return found


def measure(seconds: float) -> tuple[float, float, float]:
    """Seconds to the first task, MB when idle, percent of a core when idle."""
    with open_farm() as farm:
        first = start_to_first_task(farm)
        time.sleep(SETTLE_SECONDS)
        pids = family(farm.workers[0].process.pid)
        before = sum(map(cpu_seconds, pids))
        time.sleep(seconds)
        used = sum(map(cpu_seconds, pids)) - before
        return first, sum(map(memory_bytes, pids)) / 2**20, used / seconds * 100


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs (3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long an idle device is watched (60)")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that our processes are stopped then, too
    print(machine() + "\n\n| what | median | min to max | raw runs |\n|---|---|---|---|")
    starts, memories, cpus = zip(*(measure(options.seconds) for _ in range(options.runs)), strict=True)
    print(row("a device: start to first task", "s", starts))
    print(row("a device, idle: memory (PSS) of its processes", "MB", memories))
    print(row("a device, idle: CPU", "% of a core", cpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
