"""A scripted life of the database, or of a device's spool, that ends at a chosen operation on its files.

`mortal.py` under the shim of power.c reads orders as JSON lines, {"life", "folder", "at", "torn"}, and lives each in a
fork of its own: {"said": what was acknowledged, "steps": operations on files, "ended": whether it lived to its end}.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import db
import judging
import store
from artifacts import Artifacts
from executors.device.spool import Report, Spool
from reads import Reads
from transaction import Policy, Tx

SHIM = ctypes.CDLL(None)
SHIM.power_arm.argtypes = [ctypes.c_long, ctypes.c_int]
SHIM.power_steps.restype = ctypes.c_long
Say = Callable[..., None]


def opened(folder: Path) -> store.Store:
    found = store.Store(folder / "distribution.db", policy=Policy(), moments=lambda: (1000.0, 1000.0))
    found.open()
    return found


def group(name: str, size: int, bulk: int = 0) -> list[db.NewTask]:
    return [db.NewTask("echo", json.dumps("x" * bulk), unique_key=f"{name}{n}") for n in range(size)]


def database(folder: Path, say: Say) -> None:
    """From opening it (what is made, or upgraded, is up to what is there) to closing it, with checkpoints between."""
    master = opened(folder)
    say("opened")
    master.write(lambda tx: tx.execute("PRAGMA wal_autocheckpoint = 25"))
    first = master.write(db.submit, group("a", 3))[0].id
    say("submitted", "a", 3)

    def give(tx: Tx) -> list[db.Assigned]:
        task = db.get_task(tx, first or 0)
        assert task is not None
        return db.assign(tx, [task], db.Gift("shop-1", None, True))

    (given,) = master.write(give)
    report = db.Report(given.assignment_id, given.lease_id, "completed", '"done"', new_tasks=tuple(group("c", 2)))
    master.write(judging.apply_reports, "shop-1", [report])
    say("completed", first)
    for name in "def":
        master.write(db.submit, group(name, 4, 9000))
        say("submitted", name, 4)
    master.close()
    say("closed")


def submits(folder: Path, say: Say) -> None:
    """Thirty submits, and then the end without a goodbye."""
    master = opened(folder)
    for n in range(30):
        master.write(db.submit, group(f"{n}-", 1))
        say("submitted", f"{n}-", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def submits_normal(folder: Path, say: Say) -> None:
    """The same with SQLite's synchronous=NORMAL."""
    store.PRAGMAS = tuple((name, 1 if name == "synchronous" else value) for name, value in store.PRAGMAS)
    submits(folder, say)


def files(folder: Path, say: Say) -> None:
    """A device sends a file of each of three tasks, and then its report."""
    master = opened(folder)
    master.write(db.submit, group("a", 3))
    reads = Reads(master.path)
    kept = Artifacts(master.path, master, reads)

    def give(tx: Tx) -> list[db.Assigned]:
        return db.assign(tx, [t for n in (1, 2, 3) if (t := db.get_task(tx, n))], db.Gift("shop-1", None, True))

    for number, given in enumerate(master.write(give), 1):
        content = b"%d" % number * 9000
        file = db.Artifact("page.html", len(content), hashlib.sha256(content).hexdigest())
        judged = kept.receive(
            "shop-1", given.assignment_id, given.lease_id, file, iter([content[:5000], content[5000:]])
        )
        assert judged.outcome == "accepted"
        say("received", number)
        report = db.Report(given.assignment_id, given.lease_id, "completed", artifacts=(file,))
        master.write(judging.apply_reports, "shop-1", [report])
        say("reported", number)
    reads.close()
    master.close()
    say("closed")


def spool(folder: Path, say: Say) -> None:
    """Six batches, of which the older half is acknowledged, over several segments."""
    kept = Spool(folder, max_bytes=4096)
    for number in range(1, 12, 2):
        reports = [entry(number), entry(number + 1)]
        kept.write(reports)
        say("spooled", number, number + 1)
        oldest = kept.oldest(1, 1 << 20)
        say("sent", oldest[0].assignment_id)
        kept.remove(oldest)
        kept.write([], oldest)


def entry(number: int) -> Report:
    content = {"assignment_id": number, "lease_id": f"lease-{number}", "outcome": "completed", "result": "x" * 1500}
    payload = json.dumps(content).encode()
    return Report(number, f"lease-{number}", payload, len(payload))


LIVES = {life.__name__: life for life in (database, submits, submits_normal, files, spool)}


def live(order: dict[str, Any], voice: int) -> None:
    def say(*what: Any) -> None:
        os.write(voice, (json.dumps(what) + "\n").encode())

    SHIM.power_arm(order["at"], order["torn"])
    LIVES[order["life"]](Path(order["folder"]), say)
    say("ended", SHIM.power_steps())


def main() -> None:
    for line in sys.stdin:
        ear, voice = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                live(json.loads(line), voice)
            finally:
                os._exit(0)
        os.close(voice)
        with os.fdopen(ear) as words:
            said = [json.loads(word) for word in words]
        _, status = os.waitpid(child, 0)
        ended = bool(said) and said[-1][0] == "ended"
        steps = said.pop()[1] if ended else None
        answer = {"said": said, "steps": steps, "ended": ended, "killed": os.WIFSIGNALED(status)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
