"""How much of what was acknowledged is gone after a power cut? `make power-cuts CUTS=40`, or `power_cuts.py --help`.

A master under load (real producers, a real worker), cut off from its power at random moments and started again from
what its disk had; the worker too, every third time. After each cut, before anything goes on, the database that survived
is compared with every answer that was given: an acknowledged task, and an accepted report, must be in it. Once as
shipped (synchronous=FULL), and once with synchronous=NORMAL, which no setting offers, for the figure.

Exit code 0 when FULL lost nothing, no file was damaged, and the run of FULL is clean by checker.py; and when NORMAL did
lose something, for else the cuts prove nothing.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import power
from checker import check
from farm import wait_for
from faults import Stage
from torture import SETTLE_SECONDS, collect, settle, tell

WORKER = "shop-1"


@dataclass
class Figures:
    """What the cuts of one mode came to."""

    mode: str
    cuts: int = 0
    worker_cuts: int = 0
    submits_acknowledged: int = 0
    submits_lost: int = 0
    reports_acknowledged: int = 0
    reports_lost: int = 0
    most_lost_in_one_cut: int = 0
    files_damaged: int = 0
    checker_found: int = 0

    @property
    def lost(self) -> int:
        return self.submits_lost + self.reports_lost

    @property
    def is_sound(self) -> bool:
        return not (self.lost or self.files_damaged or self.checker_found)


class Ledger:
    """What was acknowledged up to now and not found lost yet."""

    def __init__(self, stage: Stage, figures: Figures) -> None:
        self.stage, self.figures = stage, figures
        self.tasks: dict[int, tuple[str, str]] = {}
        self.reports: dict[int, str] = {}
        self._line = self._call = 0

    def read(self) -> None:
        """The answers that have come since the last time."""
        lines = self.stage.history.read_text().split("\n")[:-1] if self.stage.history.exists() else []
        for line in map(json.loads, lines[self._line :]):
            if line["f"] == "submitted" and line["ids"]:
                self.figures.submits_acknowledged += len(line["ids"])
                self.tasks.update(
                    {n: (batch, key) for (batch, key, _), n in zip(line["keys"], line["ids"], strict=True)}
                )
        self._line = len(lines)
        calls = self.stage.proxy.calls
        for call in calls[self._call :]:
            for assignment, outcome, _, answer in call.get("reports", ()):
                if answer == "accepted" and outcome != "running":
                    self.figures.reports_acknowledged += 1
                    self.reports[assignment] = outcome
        self._call = len(calls)

    def compare(self) -> None:
        """With the database as the cut has left it, on a copy: opening it would repair it."""
        self.read()
        with tempfile.TemporaryDirectory() as folder:
            for path in self.stage.database.parent.glob("distribution.db*"):
                shutil.copyfile(path, Path(folder) / path.name)
            with contextlib.closing(sqlite3.connect(Path(folder) / "distribution.db")) as connection:
                verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
                tasks = connection.execute("SELECT id, batch, unique_key FROM af_crawl_tasks").fetchall()
                attempts = connection.execute("SELECT id, status, late_outcome FROM af_task_assignment").fetchall()
        self.figures.files_damaged += verdict != "ok"
        kept = {row[0]: row[1:] for row in tasks}
        ends = {row[0]: row[1:] for row in attempts}
        lost_tasks = [n for n, key in self.tasks.items() if kept.get(n) != key]
        lost_reports = [n for n, outcome in self.reports.items() if outcome not in ends.get(n, ())]
        for n in lost_tasks:
            del self.tasks[n]
        for n in lost_reports:
            del self.reports[n]
        figures = self.figures
        figures.submits_lost += len(lost_tasks)
        figures.reports_lost += len(lost_reports)
        figures.most_lost_in_one_cut = max(figures.most_lost_in_one_cut, len(lost_tasks) + len(lost_reports))


def run(folder: Path, mode: str, cuts: int, seed: int) -> Figures:
    figures = Figures(mode)
    luck = random.Random(seed)
    plant = "" if mode == "FULL" else "synchronous_normal"
    folder.mkdir(parents=True)
    stage = Stage(folder, seed, plant, workers=[WORKER], is_hasty=True)
    ledger = Ledger(stage, figures)
    try:
        stage.start()
        while figures.cuts < cuts:
            wait_for_traffic(stage, ledger)
            time.sleep(luck.uniform(0.0, 0.6))
            figures.cuts += stage.cut_power("master", stage.master, ledger.compare)
            if figures.cuts % 3 == 0:
                figures.worker_cuts += stage.cut_power(WORKER, stage.workers[WORKER])
        if mode == "FULL":
            stage.end_producers()
            settle(stage, SETTLE_SECONDS)
            stage.end_keepers()
            evidence = collect(stage)
            evidence.save(folder / "evidence.json")
            verdict = check(evidence)
            figures.checker_found = sum(verdict.counts.values())
            tell(verdict)
    finally:
        stage.close()
    return figures


def wait_for_traffic(stage: Stage, ledger: Ledger) -> None:
    """Until this life of the master has acknowledged something."""
    ledger.read()
    before = (ledger.figures.submits_acknowledged, ledger.figures.reports_acknowledged)

    def has_come() -> bool:
        ledger.read()
        now = (ledger.figures.submits_acknowledged, ledger.figures.reports_acknowledged)
        return now[0] > before[0] and now[1] > before[1]

    wait_for("the master to acknowledge tasks and reports", has_come, 300)


def main() -> int:
    parser = argparse.ArgumentParser(prog="power_cuts.py", description="Cuts the power of a master under load.")
    parser.add_argument("--cuts", type=int, default=40, help="of the master, for each of FULL and NORMAL (40)")
    parser.add_argument("--seed", type=int, help="of an earlier run: the same luck again")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--keep", metavar="FOLDER", help="keep everything there, also when nothing is wrong")
    options = parser.parse_args()
    if power.why_not():
        print(f"no power can be cut here: {power.why_not()}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the end of `run`, which kills what it started
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    folder = Path(options.keep or tempfile.mkdtemp(prefix="power-cuts-")).resolve()
    print(f"power cuts seed={seed} cuts={options.cuts} of each", flush=True)
    found = [run(folder / mode, mode, options.cuts, seed) for mode in ("FULL", "NORMAL")]
    print(table(found))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(figures) for figures in found], indent=1) + "\n")
    full, normal = found
    if not normal.lost:
        print("NORMAL lost nothing: the cuts met no moment that mattered, so FULL is not shown either")
    is_right = full.is_sound and normal.lost > 0 and not normal.files_damaged
    if is_right and not options.keep:
        shutil.rmtree(folder)
    else:
        print(f"kept: {folder}")
    return 0 if is_right else 1


def table(found: list[Figures]) -> str:
    names = [name.replace("_", " ") for name in asdict(found[0]) if name not in ("mode", "checker_found")]
    rows: list[list[Any]] = [["synchronous", *names]]
    for figures in found:
        row = asdict(figures)
        del row["checker_found"]
        rows.append([value if isinstance(value, str) else f"{value:,}" for value in row.values()])
    return "\n".join(f"{'  '.join(f'{cell:>20}' for cell in column)}" for column in zip(*rows, strict=True))


if __name__ == "__main__":
    sys.exit(main())
