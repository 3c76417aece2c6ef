"""How is the database copied, kept, and brought back? The real store, real files, and processes that are killed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from farm import DEADLINE_SECONDS, ROOT, Master, environment, farm, wait_for
from world import World

import backups
import store
from backups import Backups, Unable, back_up, last_time, restore
from settings import ExitCode
from store import DatabaseRefused, folder_of, lock_database
from transaction import Policy

CONTENT = b"a file of a task"


def leave_file(database: Path, name: str = "7.3.0123456789abcdef.page.html") -> Path:
    place = folder_of(database) / "000000"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    (place / name).write_bytes(CONTENT)
    return place / name


def files_of(database: Path) -> set[str]:
    return {path.name for path in folder_of(database).rglob("*") if path.is_file()}


def kept_in(folder: Path) -> list[Path]:
    """The databases that restores have moved aside."""
    found = [path for path in folder.iterdir() if path.is_file() and ".before-" in path.name]
    return [path for path in found if not path.name.endswith(("-wal", "-shm"))]


def ask(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


# -- one backup --------------------------------------------------------------------------------------------------


def test_a_backup_has_the_database_its_files_and_says_what_it_is(world: World, tmp_path: Path) -> None:
    world.submit()
    leave_file(world.path)
    made = back_up(world.path, tmp_path / "copy")
    copy = tmp_path / "copy" / world.path.name
    assert ask(copy, "SELECT count(*) FROM af_crawl_tasks") == [(1,)]
    assert files_of(copy) == files_of(world.path) and made.files == 1
    assert made.bytes == copy.stat().st_size + len(CONTENT)
    assert backups.read_backup(tmp_path / "copy") == made
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o700


def test_what_a_link_leads_to_does_not_get_into_a_backup(world: World, tmp_path: Path) -> None:
    stored = leave_file(world.path)
    beside = stored.parent.with_name("000001")
    beside.symlink_to(stored.parent)
    (stored.parent / "7.4.0123456789abcdef.link").symlink_to(stored)
    assert back_up(world.path, tmp_path / "copy").files == 1
    assert files_of(tmp_path / "copy" / world.path.name) == {stored.name}


def test_a_backup_that_fails_leaves_nothing_that_looks_like_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        assert not (tmp_path / "copy").exists(), "it has its name only when it is whole, so that a kill leaves none"
        raise OSError("no more room")

    monkeypatch.setattr(backups, "copy_files", fail)
    with pytest.raises(OSError, match="no more room"):
        back_up(world.path, tmp_path / "copy")
    assert not list(tmp_path.glob("copy*"))


def test_a_damaged_copy_is_no_backup(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(sqlite3.Connection):
        def backup(self, target: sqlite3.Connection, **options: Any) -> None:
            super().backup(target, **options)
            target.execute("DELETE FROM af_meta")
            target.commit()

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **{"factory": Bad, **options}))
    with pytest.raises(DatabaseRefused, match="lacks its marker"):
        back_up(world.path, tmp_path / "copy")
    assert not list(tmp_path.glob("copy*"))


def test_a_backup_is_never_written_over_and_needs_a_database(world: World, tmp_path: Path) -> None:
    back_up(world.path, tmp_path / "copy")
    with pytest.raises(FileExistsError):
        back_up(world.path, tmp_path / "copy")
    with pytest.raises(DatabaseRefused):
        back_up(tmp_path / "none.db", tmp_path / "other")


# -- every night -------------------------------------------------------------------------------------------------


class Nights:
    """Backups of a world whose wall clock a test moves."""

    def __init__(self, world: World, folder: Path, keep: int = 2, at: str = "03:30") -> None:
        self.world, self.folder = world, folder
        self.backups = Backups(world.path, folder, at, keep, world.store)

    def make(self, at: float | None = None) -> str:
        """One backup, made at that moment by what it says."""
        path, made = self.backups.make("test")
        if at is not None:
            text = (path / backups.SAYS).read_text()
            (path / backups.SAYS).write_text(text.replace(str(made.at), str(at)))
        return path.name

    def names(self) -> list[str]:
        return [path.name for path, _ in self.backups.kept()]


@pytest.fixture
def nights(world: World, tmp_path: Path) -> Nights:
    return Nights(world, tmp_path / "backups")


def test_the_newest_are_kept_and_nothing_else_in_the_folder_is_touched(nights: Nights) -> None:
    names = ("mine", "other-20260101T033000Z-abcd", "distribution-old", "distribution-by-hand.part")
    theirs = [nights.folder / name for name in names]
    for path in theirs:
        path.mkdir(parents=True)
    made = [nights.make(at=time.time() - 1000 + n) for n in range(4)]
    assert nights.names() == [made[3], made[2]]
    assert all(path.is_dir() for path in theirs)


def test_masters_that_share_a_folder_keep_each_its_own(nights: Nights, tmp_path: Path) -> None:
    (tmp_path / "neighbour").mkdir()
    with closing(World(tmp_path / "neighbour")) as world:
        neighbour = Nights(world, nights.folder)
        theirs = [neighbour.make(at=time.time() - 9000 + n) for n in range(2)]
        assert nights.backups._is_due(time.time()) and nights.names() == []
        mine = [nights.make(at=time.time() - 1000 + n) for n in range(3)]
        assert nights.names() == mine[:0:-1] and neighbour.names() == theirs[::-1]


def test_a_backup_that_fails_deletes_none(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [nights.make(at=time.time() - 100 + n) for n in range(2)]
    monkeypatch.setattr(backups, "backup_database", lambda *_: (_ for _ in ()).throw(DatabaseRefused("it is damaged")))
    for _ in range(3):
        with pytest.raises(Unable) as caught:
            nights.make()
    assert caught.value.code == "backup_failed"
    assert nights.names() == made[::-1]
    assert nights.backups.watch(0.0, time.time()) == ("backup", "The last backup failed; the master's log says why.")
    monkeypatch.undo()
    newest = nights.make()
    assert nights.names() == [newest, made[1]] and nights.backups.watch(0.0, time.time()) is None


def test_the_one_just_made_is_kept_whatever_the_clock_says(nights: Nights) -> None:
    future = [nights.make(at=time.time() + 86400 * n) for n in (30, 31)]
    made = nights.make()
    assert nights.names() == [future[1], made]


def test_what_was_cut_off_is_removed_by_the_next_one(nights: Nights) -> None:
    cut_off = nights.folder / "distribution-20260101T033000Z-abcd.part"
    cut_off.mkdir(parents=True)
    (cut_off / backups.SAYS).touch()
    nights.make()
    assert not cut_off.exists() and len(nights.names()) == 1


def test_what_somebody_makes_right_now_is_let_alone(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = nights.folder / "distribution-20260101T033000Z-abcd"
    copy = backups.backup_database

    def copy_slowly(path: Path, target: Path) -> None:
        monkeypatch.setattr(backups, "backup_database", copy)
        mine.append(nights.make())
        with pytest.raises(FileExistsError, match="another process makes a backup there now"):
            back_up(path, theirs)
        copy(path, target)

    mine: list[str] = []
    monkeypatch.setattr(backups, "backup_database", copy_slowly)
    made = back_up(nights.world.path, theirs)
    assert backups.read_backup(theirs) == made and nights.names() == [*mine, theirs.name]


@pytest.mark.parametrize(
    "said",
    [{"at": "x"}, {"at": float("nan")}, {"at": float("inf")}, {"at": 1e300}, {"at": -1}, {"bytes": True},
     {"bytes": 1.5}, {"files": 10**400}, {"seconds": None}],
    ids=str,
)  # fmt: skip
def test_a_folder_that_says_what_makes_no_sense_is_no_backup(nights: Nights, said: dict[str, Any]) -> None:
    says = nights.folder / nights.make() / backups.SAYS
    says.write_text(json.dumps({**json.loads(says.read_text()), **said}))
    assert nights.names() == []


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", "[" * 100_000], ids=["empty", "list", "number", "{}", "deep"])
def test_what_is_no_description_is_no_backup(tmp_path: Path, text: str) -> None:
    (tmp_path / backups.SAYS).write_text(text)
    assert backups.read_backup(tmp_path) is None


def test_files_that_a_backup_has_already_are_linked_and_outlive_it(nights: Nights) -> None:
    name = leave_file(nights.world.path).name
    made = [nights.make(at=time.time() - 100 + n) for n in range(3)]
    [kept] = (nights.folder / made[2]).rglob(name)
    assert kept.stat().st_nlink == 2 and kept.read_bytes() == CONTENT
    assert kept.stat().st_ino != next(folder_of(nights.world.path).rglob(name)).stat().st_ino


def test_a_backup_is_due_once_a_day_and_made_up_for_after_a_stop(nights: Nights) -> None:
    wall = datetime(2026, 11, 25, 3, 29).timestamp()
    assert nights.backups._is_due(wall), "there is none at all"
    nights.make(at=wall - 3600)
    assert not nights.backups._is_due(wall)
    assert nights.backups._is_due(wall + 60), "it is half past three"
    nights.make(at=wall + 61)
    assert not nights.backups._is_due(wall + 120) and not nights.backups._is_due(wall + 86000)
    assert nights.backups._is_due(wall + 5 * 86400), "the master was stopped"
    assert nights.backups._is_due(wall - 30 * 86400), "the clock was wrong, and backups of the future count for nothing"


@pytest.mark.parametrize(("at", "expected"), [("03:30", 25), ("23:59", 24), ("12:00", 25), ("12:01", 24)])
def test_the_last_time_is_today_or_yesterday(at: str, expected: int) -> None:
    found = datetime.fromtimestamp(last_time(at, datetime(2026, 11, 25, 12, 0, 30).timestamp()))
    assert (found.day, f"{found:%H:%M}") == (expected, at)


def test_a_late_backup_needs_a_person_and_one_that_is_not_configured_does_not(world: World, tmp_path: Path) -> None:
    wall = world.store.moments()[1]
    nights = Nights(world, tmp_path / "backups", at=f"{datetime.fromtimestamp(wall - 6 * 3600):%H:%M}")
    assert nights.backups.watch(0.0, wall + 60) is None, "a master that just started has an hour"
    kind, sentence = nights.backups.watch(0.0, wall + 7200) or ("", "")
    assert kind == "backup" and "not there" in sentence
    nights.make(at=wall + 86400 * 3)
    assert nights.backups.watch(0.0, wall + 86400 * 3 + 60) is None
    kind, sentence = nights.backups.watch(0.0, wall + 86400 * 5) or ("", "")
    assert kind == "backup" and "48 h old" in sentence
    none = Backups(nights.world.path, None, "03:30", 7, nights.world.store)
    assert none.watch(0.0, wall + 1e9) is None and none.chores == ()


def test_two_backups_at_once_are_one_too_many(nights: Nights) -> None:
    assert nights.backups._one_at_a_time.acquire(blocking=False)
    with pytest.raises(Unable) as caught:
        nights.make()
    assert caught.value.code == "backup_running" and nights.backups.is_running
    nights.backups._one_at_a_time.release()
    nights.make()


def test_while_a_nightly_backup_is_made_neither_scheduler_nor_writer_waits(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, may_go_on = threading.Event(), threading.Event()
    copy = backups.backup_database

    def slow(path: Path, target: Path) -> None:
        copying.set()
        assert may_go_on.wait(DEADLINE_SECONDS)
        copy(path, target)

    monkeypatch.setattr(backups, "backup_database", slow)
    nights.backups.start_if_due()
    assert copying.wait(DEADLINE_SECONDS)
    ids = [nights.world.submit() for _ in range(10)]
    nights.backups.start_if_due()  # not a second one
    assert nights.backups.is_running and nights.names() == []
    may_go_on.set()
    wait_for("the backup", lambda: not nights.backups.is_running)
    [name] = nights.names()
    assert ask(nights.folder / name / "distribution.db", "SELECT max(id) FROM af_crawl_tasks") == [(ids[-1],)]


def test_a_nightly_backup_that_failed_is_not_tried_again_at_once(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def fail(path: Path, target: Path) -> None:
        tried.append(target)
        raise OSError("no more room")

    monkeypatch.setattr(backups, "backup_database", fail)
    nights.backups.start_if_due()
    wait_for("it to fail", lambda: nights.backups.last_failure and not nights.backups.is_running)
    nights.backups.start_if_due()
    assert len(tried) == 1 and nights.backups._next_try > time.monotonic() + 500


def test_what_happened_to_a_backup_is_in_the_history(nights: Nights) -> None:
    name = nights.make()
    rows = nights.world.rows("SELECT verb, facts FROM af_event")
    assert [row["verb"] for row in rows] == ["backup"] and name in rows[0]["facts"]


# -- bring one back ----------------------------------------------------------------------------------------------


class Lives:
    """A world that is backed up, lives on, and is brought back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(folder)
        self.backup = folder / "backup"
        self.waiting = self.world.submit(batch="b", unique_key="k")
        self.done = self.world.take(start=True)
        assert self.world.report(self.done, "completed", result='{"n": 1}').outcome == "accepted"
        self.running_id = self.world.submit()
        self.running = self.world.take(start=True)
        self.unstarted_id = self.world.submit()
        self.unstarted = self.world.take()
        self.world.submit(run_at=self.world.now + 1000)
        leave_file(self.world.path)
        back_up(self.world.path, self.backup)
        # What the backup does not know: two results, a new task, a new attempt, a new file.
        assert self.world.report(self.running, "completed").outcome == "accepted"
        self.later = [self.world.submit() for _ in range(3)]
        self.later_attempt = self.world.take(start=True)
        leave_file(self.world.path, "9.9.0123456789abcdef.later")

    def bring_back(self, **options: Any) -> str:
        self.world.close()
        with lock_database(self.world.path):
            text = restore(self.world.path, self.backup, Policy())
        self.world._open()
        return text


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    lives = Lives(tmp_path)
    yield lives
    lives.world.check_books()
    lives.world.close()


def test_a_restore_says_what_became_of_the_tasks(lives: Lives) -> None:
    text = lives.bring_back()
    assert "tasks: 4 (1 completed, 2 pending, 1 scheduled), 1 files" in text
    assert "open attempts: 2 ended, their tasks wait again" in text and "2 leases got a new number" in text
    assert "is kept as" in text and "runs again" in text and "revoked" in text


def test_open_attempts_end_without_blame_and_their_tasks_run_again(lives: Lives) -> None:
    lives.bring_back()
    for task_id in (lives.running_id, lives.unstarted_id):
        row = lives.world.row(task_id)
        assert (row["status"], row["lost_count"], row["retry_count"]) == ("pending", 0, 0)
    device = lives.world.rows("SELECT lost_count, consecutive_failures FROM af_device")[0]
    assert set(device.values()) == {0}
    again = {lives.world.take().id, lives.world.take().id}
    assert again == {lives.running_id, lives.unstarted_id}


def test_what_the_old_life_reports_changes_nothing(lives: Lives) -> None:
    lives.bring_back()

    def report_everything() -> None:
        before = lives.world.rows("SELECT * FROM af_crawl_tasks")
        for outcome in ("completed", "failed", "running", "released", "snoozed"):
            assert lives.world.report(lives.running, outcome).outcome == "stale"
            assert lives.world.report(lives.unstarted, outcome).outcome == "stale"
            assert lives.world.report(lives.later_attempt, outcome).outcome == "gone"
        assert lives.world.rows("SELECT * FROM af_crawl_tasks") == before

    report_everything()
    while lives.world.pull():
        pass  # until everything is given away again, under ids and leases of the new life
    report_everything()


def test_a_result_of_before_the_backup_is_still_known(lives: Lives) -> None:
    lives.bring_back()
    assert lives.world.report(lives.done, "completed").outcome == "duplicate"


@pytest.mark.parametrize("is_present", [True, False], ids=["beside the old one", "on another machine"])
def test_no_id_that_the_old_life_gave_away_is_given_again(lives: Lives, is_present: bool) -> None:
    last_attempt = lives.later_attempt.assignment_id
    if not is_present:
        lives.world.close()
        elsewhere = lives.folder / "elsewhere"
        elsewhere.mkdir()
        with lock_database(elsewhere / "distribution.db"):
            assert "There was no database" in restore(elsewhere / "distribution.db", lives.backup, Policy())
        lives.world = World(elsewhere)
    else:
        lives.bring_back()
    task_id = lives.world.submit()
    new = lives.world.take()
    assert task_id > max(lives.later) and new.assignment_id > last_attempt
    assert task_id == max(lives.later) + 1 if is_present else task_id > backups.LEAP


def test_the_database_that_was_there_is_kept_with_its_files(lives: Lives) -> None:
    before = files_of(lives.world.path)
    text = lives.bring_back()
    [kept] = kept_in(lives.folder)
    assert str(kept) in text
    assert ask(kept, "SELECT count(*) FROM af_crawl_tasks") == [(7,)]
    assert files_of(kept) == before and files_of(lives.world.path) == before - {"9.9.0123456789abcdef.later"}


def test_what_a_killed_master_left_in_its_write_ahead_log_is_kept_too_and_not_replayed(lives: Lives) -> None:
    killed = lives.folder / "killed" / "distribution.db"
    killed.parent.mkdir()
    for suffix in ("", "-wal"):  # nothing is being written, so this is what a kill leaves
        shutil.copy(f"{lives.world.path}{suffix}", f"{killed}{suffix}")
    assert Path(f"{killed}-wal").stat().st_size > 0
    with lock_database(killed):
        restore(killed, lives.backup, Policy())
    [kept] = kept_in(killed.parent)
    assert ask(kept, "SELECT count(*) FROM af_crawl_tasks") == [(7,)]
    assert ask(killed, "SELECT count(*) FROM af_crawl_tasks") == [(4,)]
    store.check_database(killed)


def test_a_damaged_database_is_kept_as_it_is(lives: Lives) -> None:
    lives.world.close()
    lives.world.path.write_bytes(b"x" * 5000)
    with lock_database(lives.world.path):
        restore(lives.world.path, lives.backup, Policy())
    [kept] = kept_in(lives.folder)
    assert kept.read_bytes() == b"x" * 5000
    lives.world._open()
    assert lives.world.submit() > backups.LEAP, "nobody knows how far it came"


def test_an_older_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    old = tmp_path / "backup"
    old.mkdir()
    with closing(sqlite3.connect(old / "standalone.db")) as connection:
        connection.executescript((Path(__file__).parent / "schema_1.sql").read_text())
        connection.execute("INSERT INTO af_meta VALUES ('instance_id', 'abc')")
        connection.commit()
    back_up(old / "standalone.db", tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / backups.SAYS).read_text())["schema_version"] == 1
    path = tmp_path / "distribution.db"
    with lock_database(path):
        assert "tasks: 0 (none)" in restore(path, old, Policy())
    store.check_database(path)
    assert not list(tmp_path.glob("distribution.db.rest*")) and not kept_in(tmp_path)


def replace_by_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[1] / "elsewhere"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "distribution.db").unlink(),
        lambda folder: (folder / "distribution.db").write_bytes(b""),
        lambda folder: (folder / "distribution.db").write_bytes(b"hello " * 1000),
        lambda folder: os.truncate(folder / "distribution.db", 8192),
        lambda folder: [(folder / "distribution.db").rename(folder / "a.db"), (folder / "b.db").touch()],
        lambda folder: (folder / "backup.json").write_text('{"at": "x"}'),
        lambda folder: replace_by_link(folder / "distribution.db"),
        lambda folder: replace_by_link(folder / "distribution.db.artifacts"),
        lambda folder: replace_by_link(folder / "distribution.db.artifacts" / "000000"),
    ],
    ids=[
        "no folder",
        "no database",
        "empty",
        "text",
        "cut off",
        "two",
        "senseless",
        "linked database",
        "linked files",
        "linked folder",
    ],
)
def test_a_bad_backup_is_refused_and_changes_nothing(lives: Lives, spoil: Any) -> None:
    spoil(lives.backup)
    lives.world.close()
    before = {path: path.read_bytes() for path in lives.folder.rglob("*") if path.is_file() and "lock" not in path.name}
    with pytest.raises(DatabaseRefused, match=str(lives.backup)), lock_database(lives.world.path):
        restore(lives.world.path, lives.backup, Policy())
    after = {path: path.read_bytes() for path in lives.folder.rglob("*") if path.is_file() and "lock" not in path.name}
    assert {path: text for path, text in after.items() if not path.name.endswith("-shm")} == before
    lives.world._open()


# A process of its own, because it forks: at each step of a restore in turn the restoring process is killed. Whoever
# takes the lock next finds the whole old database or the whole new one, each with its own files.
KILLED = """
import os, shutil, signal, sqlite3, sys
from contextlib import closing
from pathlib import Path
import backups, store
from transaction import Policy

folder, backup = Path(sys.argv[1]), Path(sys.argv[2])
steps = []

def mortal(name, run):
    def step(*args, **options):
        steps.append(name)
        if is_mortal and len(steps) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args, **options)
    return step

for module, name in ((Path, "replace"), (shutil, "rmtree"), (store, "sync_folder"), (backups, "_write"),
                     (backups, "begin_new_life"), (backups, "copy_files"), (Path, "mkdir")):
    setattr(module, name, mortal(name, getattr(module, name)))
backups.sync_folder = store.sync_folder
is_mortal, dies_at, found = False, 0, []
while True:
    dies_at += 1
    place = folder.with_name(f"try-{dies_at}")
    place.mkdir()
    for path in folder.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, place / path.name)
    path = place / "distribution.db"
    child = os.fork()
    if child == 0:
        is_mortal = True
        steps.clear()
        with store.lock_database(path):
            backups.restore(path, backup, Policy())
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with store.lock_database(path):
        store.check_database(path)
        with closing(sqlite3.connect(path)) as connection:
            tasks = connection.execute("SELECT count(*) FROM af_crawl_tasks").fetchone()[0]
        files = len([1 for file in store.folder_of(path).rglob("*") if file.is_file()])
        kept = [file for file in place.glob("*.before-*") if file.is_file() and not file.name.endswith(("-wal", "-shm"))]
        found.append((tasks, files, len(kept), store.restored_folder(path).exists()))
        if dies_at % 8 == 0:
            backups.restore(path, backup, Policy())  # and it can be brought back now
    shutil.rmtree(place)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
print(len(found), *sorted(set(found)), sep="\\n")
"""


def test_a_restore_that_is_killed_at_any_step_has_happened_or_has_not(lives: Lives) -> None:
    lives.world.close()
    place = lives.folder / "place"
    place.mkdir()
    shutil.copy(lives.world.path, place)
    shutil.copytree(folder_of(lives.world.path), place / folder_of(lives.world.path).name)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(place), str(lives.backup)],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS * 2, check=False,
    )  # fmt: skip
    lives.world._open()
    assert done.returncode == 0, done.stderr
    steps, *found = done.stdout.splitlines()
    assert int(steps) > 15
    # tasks, files, kept databases, something left to do: the old life as it was, or the new one beside the kept old
    assert found == ["(4, 1, 1, False)", "(7, 2, 0, False)"]


# -- as programs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nightly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master that makes backups."""
    folder = tmp_path_factory.mktemp("nightly")
    with farm() as started:
        far = f"{datetime.fromtimestamp(time.time() + 12 * 3600):%H:%M}"  # so that no second one becomes due meanwhile
        started.append(Master(folder, backup_folder=str(folder / "backups"), backup_keep=2, backup_at=far))
        yield started[0]  # type: ignore[misc]


def command(master: Master, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "master.py"), "--database", master.settings["database"], *flags],
        env=environment(), capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False,
    )  # fmt: skip


def test_a_master_without_a_folder_makes_no_backup_and_says_what_to_write(master: Master) -> None:
    answer = master.api("POST", "/system/backup", {})
    assert (answer.status_code, answer.json()["code"]) == (409, "no_backup_folder")
    assert "backup_folder" in answer.json()["detail"]
    found = master.get("/system/backups")
    assert (found["folder"], found["daily_at"], found["keep"], found["backups"]) == (None, "03:30", 7, [])


def test_a_master_makes_a_backup_by_itself_and_when_it_is_told(nightly: Master) -> None:
    senseless = Path(nightly.settings["backup_folder"]) / "distribution-20260101T033000Z-abcd"
    senseless.mkdir(parents=True, exist_ok=True)
    (senseless / backups.SAYS).write_text('{"at": "x", "bytes": 1, "files": 1, "seconds": 1}')
    nightly.submit_one()
    [first] = wait_for("the first one, which is due at once", lambda: nightly.get("/system/backups")["backups"])
    made = nightly.call("POST", "/system/backup", {})
    assert Path(made["path"]).name == made["name"] and made["bytes"] > 0
    found = nightly.get("/system/backups")
    assert [backup["name"] for backup in found["backups"]] == [made["name"], first["name"]]
    assert found["folder"] == "backups" and not found["is_running"] and found["last_failure"] is None
    store.check_database(Path(made["path"]) / "distribution.db")
    assert not [item for item in nightly.get("/system/overview")["attention"] if item["kind"] == "backup"]


def test_a_folder_that_cannot_be_written_is_told_and_needs_a_person(nightly: Master) -> None:
    folder = Path(nightly.settings["backup_folder"])
    nightly.call("POST", "/system/backup", {})
    aside = folder.rename(folder.with_name("aside"))
    folder.write_text("a file where a folder should be")
    answer = nightly.api("POST", "/system/backup", {})
    assert (answer.status_code, answer.json()["code"]) == (503, "backup_failed")
    assert str(folder) not in answer.text
    assert [item for item in nightly.get("/system/overview")["attention"] if item["kind"] == "backup"]
    folder.unlink()
    aside.rename(folder)
    nightly.call("POST", "/system/backup", {})
    assert not [item for item in nightly.get("/system/overview")["attention"] if item["kind"] == "backup"]


def test_a_backup_folder_that_is_of_no_use_is_said_at_the_start(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    Backups(world.path, tmp_path / "file" / "backups", "03:30", 7, world.store)
    assert f"backup_folder {tmp_path / 'file' / 'backups'} cannot be used (Not a directory)" in caplog.text


def test_a_restore_waits_for_the_master_to_stop_and_then_brings_it_all_back(nightly: Master, tmp_path: Path) -> None:
    kept = nightly.submit_one()
    done = command(nightly, "--backup", str(tmp_path / "by hand"))
    assert done.returncode == ExitCode.OK and "checked" in done.stdout, done.stderr
    again = command(nightly, "--backup", str(tmp_path / "by hand"))
    assert again.stderr.startswith(f"master: {tmp_path / 'by hand'}: a backup is never written over")
    _, _, how = done.stdout.splitlines()[-1].partition("stop the master and run: ")
    assert shlex.split(how)[2:] == ["--database", nightly.settings["database"], "--restore", str(tmp_path / "by hand")]
    later = nightly.submit_one()
    refused = command(nightly, "--restore", str(tmp_path / "by hand"))
    assert refused.returncode == ExitCode.DATABASE_IN_USE and f"process {nightly.process.pid}" in refused.stderr
    nightly.stop()
    restored = command(nightly, "--restore", str(tmp_path / "by hand"))
    assert restored.returncode == ExitCode.OK, restored.stderr
    assert "pending" in restored.stdout and "Traceback" not in restored.stderr
    nightly.start()
    assert nightly.get(f"/tasks/{kept}")["status"] == "pending"
    assert nightly.api("GET", f"/tasks/{later}").status_code == 404
    assert nightly.submit_one() > later
    assert "restored" in [event["verb"] for event in nightly.get("/events/history?kind=system")["events"]]
