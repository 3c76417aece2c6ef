"""What happens when the disk is full, fails, is held by somebody else, or lies? Nothing that was acknowledged is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from farm import Master, Program, Worker, wait_for
from test_start import config, refusal, start
from world import World

import db
import master as master_module
import settings
import storage
import store
from scheduler import Scheduler, Times
from settings import ExitCode
from storage import RETRY_SECONDS, Storage, Trouble, kind_of
from writer import StorageFailing

BIG = [db.NewTask("echo", task_data='{"x": "%s"}' % ("x" * 10_000))] * 20
LEASES = """SELECT id, attempt_count, lost_count, status FROM af_crawl_tasks ORDER BY id"""


# -- what SQLite says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("database or disk is full", "full"),
        ("disk I/O error", "failing"),
        ("attempt to write a readonly database", "failing"),
        ("database is locked", "locked"),
        ("database disk image is malformed", "damaged"),
        ("file is not a database", "damaged"),
        ("too many SQL variables", None),
    ],
)
def test_each_sentence_of_sqlite_has_its_meaning(text: str, kind: str | None) -> None:
    assert kind_of(sqlite3.OperationalError(text)) == kind
    assert kind_of(OSError(text)) is None


def test_clients_come_back_later_the_longer_it_lasts(tmp_path: Path) -> None:
    found = Storage(tmp_path / "x.db")
    told = []
    for seconds in (0, 1, 7, 29, 500):
        found.trouble = Trouble("full", time.monotonic() - seconds)
        told.append(found.fails(sqlite3.OperationalError("database or disk is full")))
    assert told == [2, 2, 7, 29, 30]
    assert found.works() == 45.0 and found.trouble is None and found.works() == 0.0


def test_a_minute_of_trouble_is_one_line_and_half_a_minute_makes_it_not_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = Storage(tmp_path / "x.db")
    for _ in range(50):
        found.fails(sqlite3.OperationalError("database or disk is full"))
    assert len(caplog.records) == 1 and not found.is_long_in_trouble
    assert found.trouble is not None
    found.trouble = Trouble("full", found.trouble.since - 31)
    assert found.is_long_in_trouble


def test_little_room_is_told_before_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Storage(tmp_path / "x.db")
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and Free(100 * 2**20))
    assert found.watch(0, 0) is None
    monkeypatch.setattr("shutil.disk_usage", lambda _: Free(63 * 2**20))
    kind, sentence = found.watch(0, 0) or ("", "")
    assert kind == "storage" and "63 MiB" in sentence


class Free:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_that_has_no_room_says_nothing_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    handler = settings.SharedRotatingFile("/dev/full")
    for _ in range(3):
        handler.handle(logging.LogRecord("af", logging.ERROR, "file", 1, "no room for this", (), None))
    assert capsys.readouterr().err == ""
    handler.handle(logging.LogRecord("af", logging.ERROR, "file", 1, "%d", ("a mistake of ours",), None))
    assert "Logging error" in capsys.readouterr().err
    with contextlib.suppress(OSError):
        handler.close()


# -- leases ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler(world: World) -> Scheduler:
    times = Times(dispatch_interval=10, timeout_check_interval=60, device_timeout=1, retention_days=30,
                  heartbeat_retention_days=7, event_retention_days=90, audit_retention_days=90)  # fmt: skip
    return Scheduler(world.store, world.dispatcher, world.presence, times)


def fill(world: World) -> None:
    pages = world.store.write(lambda tx: tx.one("PRAGMA page_count")[0])
    world.store.write(lambda tx: tx.one(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(StorageFailing):
        world.store.write(db.submit, BIG)


def make_room(world: World) -> None:
    world.store.write(lambda tx: tx.one("PRAGMA max_page_count = 1000000"))


def test_while_nothing_can_be_written_no_lease_ends_and_nothing_is_given_away(
    world: World, scheduler: Scheduler
) -> None:
    task_id = world.submit(execution_timeout=10)
    world.take(start=True)
    world.submit()
    fill(world)
    assert world.pull() == []
    world.now += 1_000_000
    assert world.store.write(scheduler.release_silent) == 0
    assert world.store.write(scheduler.release_overdue) == 0
    with pytest.raises(StorageFailing):
        world.store.write(scheduler.probe_storage)
    assert world.row(task_id)["status"] == "running"
    make_room(world)
    assert world.store.write(scheduler.probe_storage) is True
    assert world.store.write(scheduler.probe_storage) is False
    assert world.rows("SELECT * FROM af_meta WHERE key = 'probe'") == []
    assert len(world.pull()) == 1, "and the next one is given away"


def test_devices_that_were_told_to_keep_away_are_waited_for_afterwards(world: World, scheduler: Scheduler) -> None:
    """device_timeout is 1 s here: a device that keeps away for 45 s as it was told must not lose its task for that."""
    task_id = world.submit()
    task = world.take(start=True)
    fill(world)
    world.store.writer.storage.trouble = Trouble("full", time.monotonic() - 100)
    with pytest.raises(StorageFailing) as caught:
        world.store.write(db.submit, BIG)
    assert caught.value.retry_after == RETRY_SECONDS[1] == 30
    make_room(world)
    world.now += 100
    world.store.write(scheduler.probe_storage)
    world.now += 30 * storage.PAUSE_FACTOR
    assert world.store.write(scheduler.release_silent) == 0
    assert world.store.write(scheduler.release_overdue) == 0
    assert world.report(task, "completed").outcome == "accepted"
    assert world.row(task_id)["attempt_count"] == 1


def test_a_device_that_does_not_come_back_afterwards_loses_its_task_to_nobodys_blame(
    world: World, scheduler: Scheduler
) -> None:
    task_id = world.submit()
    world.take(start=True)
    fill(world)
    make_room(world)
    world.store.write(scheduler.probe_storage)
    world.now += RETRY_SECONDS[1] * storage.PAUSE_FACTOR + 2
    assert world.store.write(scheduler.release_silent) == 1
    assert (world.row(task_id)["status"], world.row(task_id)["lost_count"]) == ("pending", 0)


def test_what_devices_wait_is_what_they_are_thought_to_wait() -> None:
    text = (Path(master_module.__file__).parent / "worker.py").read_text()
    assert f"error.seconds * random.uniform(1, {storage.PAUSE_FACTOR})" in text


def test_a_probe_that_a_kill_left_behind_goes_with_the_next_start(world: World, scheduler: Scheduler) -> None:
    world.store.write(lambda tx: tx.execute("INSERT INTO af_meta VALUES ('probe', zeroblob(1000))"))
    assert world.store.write(scheduler.probe_storage) is False
    assert world.rows("SELECT * FROM af_meta WHERE key = 'probe'") == []


# -- a whole fleet on a full disk --------------------------------------------------------------------------------

FAST = {"heartbeat_interval": 0.2, "device_timeout": 1.0, "timeout_check_interval": 0.2}


def live_through(
    master: Master, worker: Worker, fill_disk: Callable[[], None], free_disk: Callable[[], None], seconds: float
) -> None:
    """Before, during, after: what was acknowledged is there, each task ran once, and the devices came back."""
    large = {"x": "y" * 3000}
    acknowledged = master.submit(
        *({"task_type": "echo", "task_data": {"sleep_seconds": 0.1, **large}} for _ in range(20))
    )
    slow = master.submit(*({"task_type": "echo", "task_data": {"sleep_seconds": 1.0, **large}} for _ in range(3)))
    wait_for("work to begin", lambda: master.states().get("completed", 0) >= 2)
    fill_disk()
    [refused] = wait_for("a refusal", lambda: refused_submit(master, acknowledged))
    problem = refused.json()
    assert refused.status_code == 503 and problem["code"] == "storage_failing"
    assert int(refused.headers["Retry-After"]) >= 2 and "full" in problem["detail"]
    assert "/" not in problem["detail"] and "SQL" not in problem["detail"]
    # Much longer than device_timeout: what the device holds stays with it, while reads go on.
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        refused_submit(master, acknowledged)
        assert complaints(master)
        assert master.session.get(f"{master.url}/").status_code == 200
        assert master.get("/tasks?limit=200")["tasks"]
        time.sleep(0.2)
    free_disk()
    everything = [*acknowledged, *slow]
    wait_for("everything to be done", lambda: master.states() == {"completed": len(everything)}, 120)
    for task_id in everything:
        task = master.get(f"/tasks/{task_id}")
        assert [attempt["status"] for attempt in task["attempts"]] == ["completed"], task["attempts"]
        assert task["result"] is not None and task["lost_count"] == 0
    assert not [text for text in complaints(master) if "nothing is written" in text]
    assert worker.process.poll() is None and master.process.poll() is None
    assert "Traceback" not in master.output and "Logging error" not in master.output, master.output
    told = [line for line in master.lines if "The disk of the database" in line]
    assert 1 <= len(told) <= 3, told


def complaints(master: Master) -> list[str]:
    attention = master.get("/system/overview")["attention"]
    return [item["detail"] for item in attention if item["kind"] == "storage"]


def refused_submit(master: Master, acknowledged: list[int]) -> Any:
    """Submits until the disk has no room for another one; in a list, because a refused answer counts as false."""
    answer = master.api("POST", "/tasks", {"task_type": "echo", "task_data": {"x": "z" * 20_000}})
    if answer.status_code == 201:
        acknowledged.append(answer.json()["id"])
        return []
    return [answer]


def test_a_fleet_lives_through_a_full_database(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path / "master", script="tests/full_disk_master.py", **FAST)
    programs.append(master)
    worker = Worker(master.url, tmp_path / "worker", concurrent_tasks=3, **FAST)
    programs.append(worker)
    mark = tmp_path / "master" / "full"
    live_through(master, worker, mark.touch, mark.unlink, seconds=2.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_devices_that_keep_away_for_long_after_a_long_outage_lose_nothing(
    programs: list[Program], tmp_path: Path
) -> None:
    """They are told up to 30 s and wait up to 45, with a device_timeout of one second."""
    master = Master(tmp_path / "master", script="tests/full_disk_master.py", **FAST)
    programs.append(master)
    worker = Worker(master.url, tmp_path / "worker", concurrent_tasks=3, **FAST)
    programs.append(worker)
    mark = tmp_path / "master" / "full"
    live_through(master, worker, mark.touch, mark.unlink, seconds=35.0)
    assert [line for line in worker.lines if "the master is busy, again in" in line and float(line.split()[-2]) >= 10]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB. Mounting one needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill_to_the_last_byte(filler: Path) -> None:
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fleet_lives_through_a_full_disk(programs: list[Program], tmp_path: Path, small_disk: Path) -> None:
    master = Master(small_disk, **FAST)
    programs.append(master)
    worker = Worker(master.url, tmp_path / "worker", concurrent_tasks=3, **FAST)
    programs.append(worker)
    filler = small_disk / "filler"
    live_through(master, worker, lambda: fill_to_the_last_byte(filler), filler.unlink, seconds=8.0)
    # A start on the full disk says so, and loses nothing.
    fill_to_the_last_byte(filler)
    master.kill()
    line = refusal(config(tmp_path, database=master.settings["database"]), ExitCode.DISK_FULL)
    assert "make room" in line
    filler.unlink()
    master.start()
    assert master.states()["completed"] >= 23


# -- a start -----------------------------------------------------------------------------------------------------


def test_a_start_on_a_full_disk_is_refused_in_one_sentence_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: Free(15 * 2**20))
    assert master_module.main(["--config", str(config(tmp_path))]) == ExitCode.DISK_FULL
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "15 MiB" in said and "make room" in said
    assert [path.name for path in tmp_path.iterdir()] == ["master.json"]


MOUNTED = """\
22 1 254:0 / / rw - ext4 /dev/vda rw
23 22 0:21 / /srv rw - nfs4 server:/srv rw
24 23 0:22 / /srv/local rw - xfs /dev/sdb rw
25 22 0:23 / /mnt/a\\040share rw,relatime shared:1 - cifs //server/share rw
26 22 0:24 / /twice rw - ext4 /dev/sdc rw
27 22 0:25 / /twice rw - fuse.sshfs me@server: rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/", "ext4"), ("/home/x", "ext4"), ("/srv/x", "nfs4"), ("/srv/local/x", "xfs"), ("/srvx", "ext4"),
     ("/mnt/a share/x", "cifs"), ("/twice/x", "fuse.sshfs")],
)  # fmt: skip
def test_the_file_system_of_a_folder_is_that_of_its_innermost_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, kind: str
) -> None:
    monkeypatch.setattr(store, "MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(MOUNTED)
    assert store.filesystem_of(Path(folder)) == kind


def test_a_system_that_tells_of_no_mounts_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOUNTS", tmp_path / "none")
    assert store.filesystem_of(tmp_path) == ""


def test_a_database_across_a_network_is_refused_unless_somebody_knows_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(f"22 1 0:21 / {tmp_path.resolve()} rw - nfs4 server:/ rw\n")
    assert master_module.main(["--config", str(config(tmp_path))]) == ExitCode.NETWORK_FILESYSTEM
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nfs4" in said and "allow_network_filesystem" in said
    assert not (tmp_path / "distribution.db.lock").exists()
    # Past this question the next one is asked: there is no such backup.
    knows = config(tmp_path, allow_network_filesystem=True)
    assert master_module.main(["--config", str(knows), "--restore", str(tmp_path / "none")]) == ExitCode.DATABASE_BAD


@pytest.mark.slow
def test_a_start_on_a_database_that_another_program_holds_says_so(tmp_path: Path) -> None:
    path = tmp_path / "distribution.db"
    store.create_database(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = wal")
        other.execute("BEGIN EXCLUSIVE")
        ended = start(config(tmp_path))
    assert ended.returncode == ExitCode.DATABASE_IN_USE and "Traceback" not in ended.stderr
    assert "end what else holds it" in ended.stderr.splitlines()[-1]


# -- held by somebody else ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(master: Master) -> Iterator[None]:
    """Another process (this one) has the database for itself."""
    with contextlib.closing(sqlite3.connect(master.settings["database"], isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


def test_a_short_lock_by_another_process_only_takes_time(master: Master) -> None:
    answers: list[int] = []
    with held(master):
        asking = threading.Thread(target=lambda: answers.append(master.submit_one()))
        asking.start()
        asking.join(0.5)
        assert not answers
    asking.join(60)
    assert len(answers) == 1 and master.get(f"/tasks/{answers[0]}")["status"] == "pending"


def test_a_long_lock_is_told_names_its_holder_and_passes(master: Master) -> None:
    with held(master):
        answer = master.api("POST", "/tasks", {"task_type": "echo"})
        assert answer.status_code == 503 and answer.json()["code"] == "storage_failing"
        assert 2 <= int(answer.headers["Retry-After"]) <= 30
        assert complaints(master)[0].startswith(f"Process {os.getpid()} holds the database")
        assert master.get("/tasks")["tasks"] is not None, "reads go on"
    wait_for("writes to be taken", lambda: master.api("POST", "/tasks", {"task_type": "echo"}).status_code == 201)
    wait_for("the complaint to go", lambda: not complaints(master))


# -- a clock that lies --------------------------------------------------------------------------------------------


def test_a_master_that_starts_long_after_all_it_knows_keeps_old_results_and_asks_a_person(
    programs: list[Program], tmp_path: Path
) -> None:
    path = tmp_path / "distribution.db"
    store.create_database(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO af_meta VALUES ('last_now', ?)", (repr(time.time() - 40 * 86400),))
        connection.commit()
    master = Master(tmp_path)
    programs.append(master)
    [item] = [item for item in master.get("/system/overview")["attention"] if item["kind"] == "clock"]
    assert "nothing old is deleted for" in item["detail"]
    assert "deletion_waits" in [event["verb"] for event in master.get("/events/history?kind=system")["events"]]


# -- a disk that lies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "notice",
    [
        pytest.param(lambda master: master.api("POST", "/tasks", {"task_type": "echo"}), marks=pytest.mark.slow),
        lambda master: master.api("GET", "/tasks?limit=200"),
    ],
    ids=["by a write", "by a read"],
)
def test_damage_while_it_runs_ends_the_master_with_one_line_and_its_code(
    programs: list[Program], tmp_path: Path, notice: Any
) -> None:
    master = Master(tmp_path)
    programs.append(master)
    master.submit(*({"task_type": "echo", "task_data": {"x": "y" * 500}} for _ in range(2000)))
    master.stop()
    master.start()
    path = Path(master.settings["database"])
    content = path.read_bytes()
    with path.open("r+b") as file:  # under the feet of a running master; the first page it has read already
        file.seek(4096)
        file.write(bytes(n * 97 % 251 for n in range(4096)) * (len(content) // 4096 - 1))
    with contextlib.suppress(
        requests.ConnectionError
    ):  # a job of the master's own met it first, and it is gone already
        answer = notice(master)
        assert answer.status_code == 503, answer.text
    assert master.wait() == ExitCode.DATABASE_BAD
    assert len([line for line in master.lines if "is damaged" in line]) == 1, master.output
    assert "--restore" in next(line for line in master.lines if "is damaged" in line)
    assert "Traceback" not in master.output, master.output
