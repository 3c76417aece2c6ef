"""Where does the time of one task go? CPU seconds per 1,000 tasks, step by step, in the master and in the workers.

`make profile`, or `python bench/profile.py --tasks 5000`. The shipped programs as in bench/run.py's end to end, with a
stopwatch around their steps (bench/timed.py). It costs some microseconds a task, so the sums are larger than those of
`make bench`; look at the shares. What no step accounts for is the HTTP server's own code, threads that wake each other,
and the interpreter's lock.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.farm import Farm, Program, bodies, cpu_seconds, open_farm, wait_until
from bench.run import WORKERS, completed, machine


class TimedFarm(Farm):
    """The same programs, each with its stopwatch."""

    def _start(self, script: str, settings: dict[str, Any]) -> Program:
        return super()._start("bench/timed.py", settings)


def table(who: str, programs: Sequence[Program], used: float, tasks: int) -> list[str]:
    """A line for each step, the dearest first; call it when the programs have ended."""
    steps: Counter[str] = Counter()
    for program in programs:
        steps.update(json.loads(program.config.with_suffix(".times").read_text()))
    steps["everything else"] = used - sum(steps.values())  # type: ignore[assignment]
    lines = [f"\n| {who} | CPU s per 1,000 tasks | share |", "|---|---|---|"]
    lines += [f"| {step} | {s / tasks * 1000:.4f} | {s / used * 100:.0f} % |" for step, s in steps.most_common()]
    return [*lines, f"| all | {used / tasks * 1000:.4f} | |"]


def profile(tasks: int, slots: int) -> list[str]:
    with open_farm(kind=TimedFarm) as farm:
        farm.add_workers(WORKERS, concurrent_tasks=slots)
        started = cpu_seconds([farm.master]), cpu_seconds(farm.workers)
        for body in bodies({"task_type": "echo"}, tasks):
            farm.post("/tasks", body)
        wait_until("the last task", lambda: completed(farm) == tasks)
        used = cpu_seconds([farm.master]) - started[0], cpu_seconds(farm.workers) - started[1]
        farm.stop()
        lines = table("master", [farm.master], used[0], tasks)
        return lines + table(f"{WORKERS} workers", farm.workers, used[1], tasks)


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", type=int, default=50_000, help="no-op tasks (50000)")
    parser.add_argument("--slots", type=int, default=100, help="concurrent_tasks of each worker (100)")
    options = parser.parse_args(argv)
    if min(options.tasks, options.slots) < 1:
        parser.error("--tasks and --slots must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that our processes are stopped then, too
    print(f"{machine()}\n{options.tasks:,} tasks, {WORKERS} workers of {options.slots} slots")
    print("\n".join(profile(options.tasks, options.slots)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
