"""Does what was acknowledged survive a power cut, and a kill at any moment at all?

Through the shim of tests/torture/power.c: it knows what was synced, and it ends a process before its n-th operation on
files. A scripted life of the database and one of the spool end at each of them; what is found afterwards must be the
state before or after the step that was cut off, never one between, with everything that had been acknowledged.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from farm import Master, environment, farm
from world import World

import store
from executors.device.spool import Spool

sys.path.insert(0, str(Path(__file__).resolve().parent / "torture"))

import launch
import power

HERE = Path(__file__).resolve().parent
MEMORY = Path("/dev/shm")  # the shim leaves the real syncs out, so a disk would only wait

needs_shim = pytest.mark.skipif(bool(power.why_not()), reason=f"no power can be cut here: {power.why_not()}")


class Mortal:
    """A process under the shim that lives the lives of mortal.py, in a folder that a test makes and looks at."""

    def __init__(self, folder: Path) -> None:
        self.disk = folder / "disk"
        self.power = power.Power(self.disk)
        shim = power.environment(power.build(folder), self.disk)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "torture" / "mortal.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment(), **shim},
        )  # fmt: skip

    def live(self, life: str, *, at: int = 0, torn: bool = False, with_file: Path | None = None) -> dict[str, Any]:
        """A life on a new disk, up to its n-th operation on files (0: to its end)."""
        shutil.rmtree(self.disk, ignore_errors=True)
        self.disk.mkdir()
        if with_file is not None:
            shutil.copyfile(with_file, self.disk / "distribution.db")
        self.power.watch()
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"life": life, "folder": str(self.disk), "at": at, "torn": torn}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["ended"] or answer["killed"], answer
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def mortal() -> Iterator[Mortal]:
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    mortal = Mortal(folder)
    yield mortal
    mortal.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the first release, with a device in it."""
    path = tmp_path_factory.mktemp("old") / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript((HERE / "schema_1.sql").read_text())
        connection.execute("INSERT INTO af_meta VALUES ('instance_id', 'abc')")
        connection.execute("INSERT INTO af_device (device_id, device_name, registered_at) VALUES ('shop-1', 'Shop', 1)")
    connection.close()
    return path


def check_database(disk: Path, answer: dict[str, Any], where: str) -> None:
    """It opens, holds all that was acknowledged, and nothing by halves."""
    said = answer["said"]
    if not (disk / "distribution.db").exists():
        assert said == [], where  # it was cut off while it was made, and nobody had been told that it is there
        return
    world = World(disk)
    try:
        keys = [row["unique_key"] for row in world.rows("SELECT unique_key FROM af_crawl_tasks")]
        sizes = {"a": 3, "c": 2, "d": 4, "e": 4, "f": 4}
        found = {name: sum(key.startswith(name) for key in keys) for name in sizes}
        assert all(found[name] in (0, size) for name, size in sizes.items()), f"{where}: by halves {found}"
        for word, *facts in said:
            if word == "submitted":
                assert found[facts[0]] == facts[1], f"{where}: {facts} was acknowledged"
            if word == "completed":
                assert world.row(facts[0])["status"] == "completed", f"{where}: a report was acknowledged"
        is_completed = world.counts().get("completed", 0) == 1
        assert is_completed is (found["c"] == 2), f"{where}: a task ended without the tasks that come of it"
        assert len(world.rows("SELECT 1 FROM af_task_result")) == is_completed, where
        world.check_books()
        assert world.rows("PRAGMA integrity_check") == [{"integrity_check": "ok"}], where
        if world.rows("SELECT 1 FROM af_device"):
            assert world.rows("SELECT device_name FROM af_device") == [{"device_name": "Shop"}], where
    finally:
        world.close()


def check_spool(disk: Path, answer: dict[str, Any], where: str) -> None:
    spooled = {number for word, *numbers in answer["said"] if word == "spooled" for number in numbers}
    sent = {number for word, *numbers in answer["said"] if word == "sent" for number in numbers}
    kept = [report.assignment_id for report in Spool(disk, 1 << 20).pending()]
    assert spooled - sent <= set(kept), f"{where}: lost {sorted(spooled - sent - set(kept))}"
    assert kept == sorted(set(kept)), where


def check_files(disk: Path, answer: dict[str, Any], where: str) -> None:
    """Each file that was acknowledged, and each that the database names, is there with all of its bytes."""
    if not (disk / "distribution.db").exists():
        assert answer["said"] == [], where
        return
    world = World(disk)
    try:
        named = world.rows("SELECT task_id, assignment_id, name, sha256 FROM af_artifact")
        received = {number for word, *numbers in answer["said"] if word == "received" for number in numbers}
        reported = {number for word, *numbers in answer["said"] if word == "reported" for number in numbers}
        assert received <= {row["task_id"] for row in named}, where
        for row in named:
            (path,) = disk.rglob(f"{row['task_id']}.{row['assignment_id']}.*.{row['name']}")
            assert path.read_bytes() == b"%d" % row["task_id"] * 9000, where
        assert world.counts().get("completed", 0) >= len(reported), where
        world.check_books()
    finally:
        world.close()


def walk(mortal: Mortal, life: str, with_file: Path | None, share: int) -> int:
    """Ends that life at every operation, or at one of `share`: by a kill, in the middle of a write, by a power cut."""
    check = {"spool": check_spool, "files": check_files, "database": check_database}[life]
    whole = mortal.live(life, with_file=with_file)
    assert whole["ended"] and whole["said"][-1][0] in ("closed", "sent")
    check(mortal.disk, whole, f"{life} as a whole")
    ends = [(at, way) for at in range(1, whole["steps"] + 1) for way in ("kill", "torn", "power")]
    for at, way in ends[::share]:
        answer = mortal.live(life, at=at, torn=way == "torn", with_file=with_file)
        assert answer["killed"], f"{life} lived on after operation {at}"
        if way == "power":
            mortal.power.cut(random.Random(at))
        check(mortal.disk, answer, f"{life} ended at operation {at} of {whole['steps']} by {way}")
    return len(ends[::share])


SHARES = [pytest.param(59, id="some"), pytest.param(1, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


@needs_shim
@pytest.mark.parametrize("share", SHARES)
def test_a_database_that_is_made_and_used_is_whole_wherever_it_was_cut_off(mortal: Mortal, share: int) -> None:
    assert walk(mortal, "database", None, share) > 5


@needs_shim
@pytest.mark.parametrize("share", SHARES)
def test_an_upgrade_is_done_or_not_done_wherever_it_was_cut_off(
    mortal: Mortal, first_release: Path, share: int
) -> None:
    assert walk(mortal, "database", first_release, share) > 5


@needs_shim
@pytest.mark.parametrize("share", SHARES)
def test_a_file_that_a_device_has_sent_is_whole_wherever_the_master_was_cut_off(mortal: Mortal, share: int) -> None:
    assert walk(mortal, "files", None, 2 * share) > 5


@needs_shim
@pytest.mark.parametrize("share", SHARES)
def test_a_spool_keeps_what_it_promised_wherever_it_was_cut_off(mortal: Mortal, share: int) -> None:
    assert walk(mortal, "spool", None, max(1, share // 4)) > 5


@needs_shim
def test_a_power_cut_takes_nothing_that_was_acknowledged_and_would_with_less_than_full(mortal: Mortal) -> None:
    for life, kept in (("submits", 30), ("submits_normal", 0)):
        answer = mortal.live(life)
        assert len(answer["said"]) == 30
        mortal.power.cut(None)
        with sqlite3.connect(mortal.disk / "distribution.db") as connection:
            assert connection.execute("SELECT COUNT(*) FROM af_crawl_tasks").fetchone() == (kept,), life
        connection.close()


def test_a_rollback_journal_that_a_crash_left_is_no_damage(tmp_path: Path) -> None:
    """As in the milliseconds in which a new or an upgraded file gets its write-ahead log."""
    path, found = tmp_path / "distribution.db", tmp_path / "found" / "distribution.db"
    store.create_database(path)
    found.parent.mkdir()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN IMMEDIATE")
    for n in range(200):
        connection.execute("INSERT INTO af_meta VALUES (?, ?)", (f"half {n}", "x" * 4000))
    for end in ("", "-journal"):
        shutil.copyfile(f"{path}{end}", f"{found}{end}")
    connection.close()
    assert found.stat().st_size > 100_000, "nothing of it has reached the file"
    assert store.create_database(found) is False
    assert not Path(f"{found}-journal").exists()
    with sqlite3.connect(found) as connection:
        assert connection.execute("SELECT COUNT(*) FROM af_meta WHERE key LIKE 'half%'").fetchone() == (0,)
    connection.close()


# -- a master that is killed at a chosen point of one request -------------------------------------------------------


class Doomed:
    """A real master, and the file that says where it is to die."""

    def __init__(self, folder: Path) -> None:
        self.order = folder / "kill-at"
        self.master = Master(folder, "tests/torture/launch.py")

    def request_and_die(self, point: str, path: str, body: Any) -> None:
        self.order.write_text(point)
        with pytest.raises(requests.ConnectionError):
            self.master.api("POST", path, body)
        assert self.master.wait() == -signal.SIGKILL
        self.order.unlink()
        self.master.start()


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doomed]:
    folder = tmp_path_factory.mktemp("doomed")
    with pytest.MonkeyPatch.context() as patch, farm() as programs:
        patch.setenv("TORTURE_KILL_AT", str(folder / "kill-at"))
        doomed = Doomed(folder)
        programs.append(doomed.master)
        doomed.master.register("shop-1")
        yield doomed


def points(quick: str) -> list[Any]:
    return [point if point == quick else pytest.param(point, marks=pytest.mark.slow) for point in launch.POINTS]


@pytest.mark.parametrize("point", points("after_commit"))
def test_a_submit_that_got_no_answer_may_be_sent_again(doomed: Doomed, point: str) -> None:
    task = {"task_type": "echo", "unique_key": f"submit {point}"}
    before = doomed.master.states()
    doomed.request_and_die(point, "/tasks", task)
    is_kept = point == "after_commit"
    found = doomed.master.states()
    assert sum(found.values()) - sum(before.values()) == is_kept
    again = doomed.master.call("POST", "/tasks", task)
    assert again["created"] is not is_kept
    assert doomed.master.call("POST", "/tasks", task) == {**again, "created": False}


@pytest.mark.parametrize("point", points("before_commit"))
def test_a_report_that_got_no_answer_may_be_sent_again(doomed: Doomed, point: str) -> None:
    task_id = doomed.master.submit_one(unique_key=f"report {point}", priority=10)
    (task,) = doomed.master.pull("shop-1")
    child = {"task_type": "echo", "unique_key": f"child {point}"}
    entry = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "outcome": "completed",
             "result": {"n": 1}, "new_tasks": [child]}  # fmt: skip
    assert task["id"] == task_id
    doomed.request_and_die(point, "/tasks/report", {"device_id": "shop-1", "reports": [entry]})
    is_kept = point == "after_commit"
    assert doomed.master.get(f"/tasks/{task_id}")["status"] == ("completed" if is_kept else "assigned")
    again = doomed.master.report("shop-1", task, "completed", result={"n": 1}, new_tasks=[child])
    assert again["outcome"] == ("duplicate" if is_kept else "accepted")
    assert doomed.master.call("POST", "/tasks", child)["created"] is False
    assert doomed.master.get(f"/tasks/{task_id}")["result"] == {"n": 1}


@pytest.mark.slow
def test_what_was_answered_by_half_is_kept_whole(doomed: Doomed) -> None:
    """The answer to a large submit is on its way, and the client reads next to nothing of it."""
    tasks = [{"task_type": "echo", "unique_key": f"half {n}"} for n in range(10_000)]
    body = json.dumps(tasks).encode()
    head = "POST /api/distribution/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", doomed.master.port))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(12) == b"HTTP/1.1 201"
        doomed.master.kill()
    doomed.master.start()
    again = [
        task
        for n in range(0, 10_000, 2500)
        for task in doomed.master.call("POST", "/tasks", tasks[n : n + 2500])["tasks"]
    ]
    assert not any(task["created"] for task in again)
