"""The shipped master or worker, with a clock that can be set and, if asked, one mistake planted in it.

`launch.py --config FILE [...]`: the config's mode says which. For the torture bench alone: what is wrapped here is
wrapped from outside, so nothing in the product knows of it, and a function that is renamed there fails here.

  TORTURE_CLOCK     a file with a double: so many seconds are added to the wall clock of this process (time.time)
  TORTURE_WITNESS   where a worker notes which reports its spool has promised to keep
  TORTURE_PLANT     the name of a mistake, of PLANTS below
  TORTURE_KILL_AT   a file; when it is there, it names the point, of POINTS below, at which the master kills itself in
                    the next submit or report
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sqlite3
import struct
import sys
import time
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


def append(path: str, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


# -- what every run has ---------------------------------------------------------------------------------------


def follow_the_clock() -> None:
    """Wall time as the bench sets it. The boot clock and the monotonic one stay as they are, as at a real step."""
    with open(os.environ["TORTURE_CLOCK"], "rb") as file:
        offset = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    real = time.time
    time.time = lambda: real() + struct.unpack("d", offset[:8])[0]


def note_what_is_spooled(party: str) -> None:
    """When Spool.write returns, its reports must survive everything; the bench holds the worker to it."""
    from witness import note

    from executors.device.spool import Spool

    write = Spool.write

    def noted(self: Any, reports: Any, acknowledged: Any = ()) -> None:
        write(self, reports, acknowledged)
        if reports and self.is_writable:
            note(e="spooled", party=party, assignments=[report.assignment_id for report in reports])

    Spool.write = noted  # type: ignore[method-assign]


POINTS = ("before_begin", "inside", "before_commit", "after_commit")


def kill_at_a_point(file: Path) -> None:
    """A point of the way of one submit or report through the writer, where the master is killed."""
    from store import Store
    from writer import Writer

    write, opened, release = Store.write, Store.open, Writer._release
    is_meant = False

    def reached(point: str) -> None:
        if file.exists() and file.read_text() == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def marked(self: Store, verb: Callable[..., Any], *args: Any, **more: Any) -> Any:
        def meant(tx: Any, *args: Any, **more: Any) -> Any:
            nonlocal is_meant
            done = verb(tx, *args, **more)
            reached("inside")
            is_meant = True
            return done

        if verb.__name__ not in ("submit", "judge"):
            return write(self, verb, *args, **more)
        reached("before_begin")
        return write(self, meant, *args, **more)

    def traced(self: Store) -> None:
        opened(self)

        def trace(tx: Any) -> None:  # in the writer's thread, which alone may touch its connection
            tx.connection.set_trace_callback(
                lambda sql: reached("before_commit") if sql == "COMMIT" and is_meant else None
            )

        write(self, trace)

    def released(self: Writer, job: Any) -> None:
        if is_meant:
            reached("after_commit")
        release(self, job)

    Store.write, Store.open, Writer._release = marked, traced, released  # type: ignore


# -- the mistakes ---------------------------------------------------------------------------------------------


def no_fencing() -> None:
    """Reports count by their task alone, whichever attempt they come from."""
    import db
    import judging

    judged = judging.apply_report

    def by_task_alone(tx: Any, device_id: str, report: db.Report) -> db.Judged:
        answer = judged(tx, device_id, report)
        if answer.outcome != "stale" or report.outcome != "completed":
            return answer
        tx.execute("INSERT OR REPLACE INTO af_task_result VALUES (?, ?)", (answer.task_id, report.result))
        task = db.get_task(tx, answer.task_id or 0)
        newest = db.get_attempt(tx, task.assignment_id or 0) if task else None
        if task is not None and newest is not None and task.status not in db.FINAL:
            db.complete(tx, task, newest, report)
        return db.Judged("accepted", answer.task_id, "completed")

    judging.apply_report = by_task_alone


def reply_before_commit() -> None:
    """The answer goes out, and the commit follows a little later."""
    from writer import Writer, _Job

    def write(self: Writer, group: list[_Job]) -> None:
        assert self.connection is not None
        hook = _Job(self.before_commit or (lambda: None))
        self.connection.execute("BEGIN IMMEDIATE")
        for job in [*group, hook]:
            self._run_in_savepoint(job)
        for job in [hook, *group]:
            self._release(job)
        time.sleep(0.2)
        self.connection.execute("COMMIT")

    Writer._write = write  # type: ignore[method-assign]


def no_unique_index() -> None:
    """A key is looked up first and inserted then, and no index stands behind it."""
    import db
    from store import Store

    is_known: dict[tuple[str, str], int | None] = {}
    write, opened = Store.write, Store.open

    def looked_up_before(self: Store, verb: Callable[..., Any], *args: Any, **more: Any) -> Any:
        if verb is db.submit:
            connection = sqlite3.connect(self.path)
            sql = "SELECT id FROM af_crawl_tasks WHERE batch = ? AND unique_key = ?"
            for task in args[0]:
                row = connection.execute(sql, (task.batch, task.unique_key)).fetchone()
                is_known[task.batch, task.unique_key] = row[0] if row else None
            connection.close()
            time.sleep(0.3)
        return write(self, verb, *args, **more)

    def without_index(self: Store) -> None:
        opened(self)
        connection = sqlite3.connect(self.path)
        sql = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE '%UNIQUE%unique_key%'"
        for (name,) in connection.execute(sql).fetchall():
            connection.execute(f"DROP INDEX {name}")
        connection.commit()
        connection.close()

    def remembered(tx: Any, task: db.NewTask, new_here: Any) -> int | None:
        return new_here.get((task.batch, task.unique_key)) or is_known.get((task.batch, task.unique_key or ""))

    Store.write, Store.open, db._known_id = looked_up_before, without_index, remembered  # type: ignore


def synchronous_normal() -> None:
    """SQLite syncs at its checkpoints alone: no mistake against kills, but one against power cuts."""
    import store

    store.PRAGMAS = tuple((name, 1 if name == "synchronous" else value) for name, value in store.PRAGMAS)


def expiry_by_wall_clock() -> None:
    """Leases run out by the clock on the wall."""
    from clock import Clock

    Clock.now = lambda self: time.time()  # type: ignore[method-assign]


def no_fsync() -> None:
    """The spool is written and never synced."""
    from executors.device import spool

    spool.sync_file = lambda descriptor: None


def no_spool() -> None:
    """Reports are kept in memory only."""
    from executors.device.spool import Spool

    Spool._append = lambda self, reports, acknowledged: None  # type: ignore[method-assign]


PLANTS: dict[str, tuple[str, Callable[[], None]]] = {
    "no_fencing": ("master", no_fencing),
    "reply_before_commit": ("master", reply_before_commit),
    "no_unique_index": ("master", no_unique_index),
    "synchronous_normal": ("master", synchronous_normal),
    "expiry_by_wall_clock": ("master", expiry_by_wall_clock),
    "no_fsync": ("worker", no_fsync),
    "no_spool": ("worker", no_spool),
}


def main(arguments: list[str]) -> int:
    config = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
    mode = config["mode"]
    if mode != "worker" and "TORTURE_CLOCK" in os.environ:
        follow_the_clock()
    where, plant = PLANTS.get(os.environ.get("TORTURE_PLANT", ""), ("", lambda: None))
    if where == mode:
        plant()
    if "TORTURE_KILL_AT" in os.environ:
        kill_at_a_point(Path(os.environ["TORTURE_KILL_AT"]))
    if mode == "worker":
        note_what_is_spooled(Path(config["state_folder"]).parent.name)
        import worker

        return worker.main(arguments)
    import master

    return master.main(arguments)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
