"""Which file is the database, who holds it, and how do verbs reach it?"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from farm import ROOT
from peewee import OperationalError, SqliteDatabase
from world import World

import db
import schema
import store
from store import DatabaseInUse, DatabaseNewer, DatabaseRefused
from transaction import Note, Policy, Tx
from writer import StorageFailing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "distribution.db"
    assert store.create_database(path)
    return path


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def ask(path: Path, sql: str) -> Any:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchone()[0]


def refusal(path: Path) -> DatabaseRefused:
    with pytest.raises(DatabaseRefused) as caught:
        store.check_database(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_new_database_is_complete_private_and_ours(path: Path) -> None:
    store.check_database(path)
    assert not store.create_database(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask(path, "PRAGMA auto_vacuum") == 2
    assert ask(path, "PRAGMA user_version") == schema.SCHEMA_VERSION
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {table._meta.table_name for table in schema.TABLES} <= tables
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_creation_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(database: Any) -> None:
        database.execute_sql("CREATE TABLE af_crawl_tasks (id)")
        assert not path.exists(), "the real name must appear only when all is there"
        raise OSError("the power went")

    path = tmp_path / "distribution.db"
    monkeypatch.setattr(schema, "create_tables", half)
    with pytest.raises(OSError, match="the power went"):
        store.create_database(path)
    assert list(tmp_path.iterdir()) == []


def test_creating_never_touches_a_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but somebody's\n" * 100)
    before = path.read_bytes()
    with pytest.raises(DatabaseRefused):
        store.create_database(path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0", b"x" * 10_000])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.db"
    path.write_bytes(content)
    assert refusal(path).exit_code == 4


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    assert "is not a file" in str(refusal(tmp_path))


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    change(path, "CREATE TABLE af_crawl_tasks (id)")
    assert "another program" in str(refusal(path))


def test_a_newer_database_says_which_version_it_needs(path: Path) -> None:
    change(path, f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    error = refusal(path)
    assert isinstance(error, DatabaseNewer) and error.exit_code == 6
    assert f"schema {schema.SCHEMA_VERSION + 1}" in str(error)


def test_an_sqlite_that_is_too_old_says_which_one_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
    path = tmp_path / "new.db"
    made = store.Store(path, policy=Policy(), moments=lambda: (1.0, 1.0))
    with pytest.raises(DatabaseRefused, match=r"3\.33 or newer is needed"):
        made.open()
    assert not path.exists()


def shape(path: Path) -> dict[str, Any]:
    """Every table's columns, in any order, and every index."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        columns = {
            name: sorted(column[1:] for column in connection.execute(f"PRAGMA table_info({name})"))
            for kind, name, _ in rows
            if kind == "table"
        }
    return {**columns, **{name: sql for kind, name, sql in rows if kind == "index"}}


def test_a_database_of_the_first_release_is_upgraded_and_kept_as_it_was(path: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(old)) as connection:
        connection.executescript((Path(__file__).parent / "schema_1.sql").read_text())
        connection.execute("INSERT INTO af_meta VALUES ('instance_id', 'abc')")
        connection.execute("INSERT INTO af_device (device_id, device_name, registered_at) VALUES ('shop-7', 'Shop', 1)")
        connection.commit()
    master = store.Store(old, policy=Policy(), moments=lambda: (1.0, 1.0))
    master.open()
    master.close()
    assert shape(old) == shape(path)
    assert ask(old, "PRAGMA user_version") == schema.SCHEMA_VERSION
    assert ask(old, "SELECT device_name FROM af_device") == "Shop"
    kept = tmp_path / "old.db.schema-1"
    assert ask(kept, "PRAGMA user_version") == 1 and kept.stat().st_mode & 0o777 == 0o600


def test_an_upgrade_that_fails_half_way_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(old)) as connection:
        connection.executescript((Path(__file__).parent / "schema_1.sql").read_text())
    before = shape(old)
    monkeypatch.setitem(schema.UPGRADES, schema.SCHEMA_VERSION, schema.UPGRADES[schema.SCHEMA_VERSION] + "; NONSENSE")
    database = SqliteDatabase(str(old))
    with database.connection_context(), pytest.raises(OperationalError):
        schema.upgrade_tables(database, 1)
    assert shape(old) == before and ask(old, "PRAGMA user_version") == 1


def test_a_database_without_its_marker_is_refused(path: Path) -> None:
    change(path, "DELETE FROM af_meta WHERE key = 'instance_id'")
    assert "lacks its marker" in str(refusal(path))


def test_a_zeroed_header_is_noticed(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(100))
    refusal(path)


def test_a_page_of_noise_is_noticed_wherever_it_is(path: Path) -> None:
    content = path.read_bytes()
    size = ask(path, "PRAGMA page_size")
    for number in range(1, len(content) // size):
        noise = bytes((number * 31 + n * 97) % 251 for n in range(size))
        path.write_bytes(content[: number * size] + noise + content[(number + 1) * size :])
        refusal(path)


def test_a_check_of_a_large_file_ends_when_its_time_is_up(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Large(sqlite3.Connection):
        """Its check takes until somebody interrupts it."""

        interrupted = threading.Event()

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if "quick_check" in sql:
                assert self.interrupted.wait(60)
                raise sqlite3.OperationalError("interrupted")
            return super().execute(sql, *values)

        def interrupt(self) -> None:
            self.interrupted.set()

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **options: connect(name, factory=Large, **options))
    with caplog.at_level("INFO", "af.store"):
        store.check_database(path, seconds=0.01)
    assert "was checked for 0.01 s" in caplog.text


def test_a_name_with_signs_of_an_address_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a?b#c%20d.db"
    assert store.create_database(path) and path.exists()
    store.check_database(path)
    assert store.last_moment(path) == 0.0


def test_the_clock_starts_after_the_last_moment_of_the_database(path: Path) -> None:
    assert store.last_moment(path.with_name("none.db")) == 0.0
    change(path, "INSERT INTO af_meta (key, value) VALUES ('last_now', '1800000000.5')")
    assert store.last_moment(path) == 1_800_000_000.5


# -- the lock ----------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
import store
try:
    with store.lock_database(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except store.DatabaseInUse as error:
    print(error)
    sys.exit(error.exit_code)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_the_lock_keeps_a_second_process_out_and_names_the_first(path: Path) -> None:
    with store.lock_database(path):
        out, _ = (second := holder(path)).communicate(timeout=60)
        assert second.returncode == 5 and f"process {os.getpid()}" in out
    first = holder(path)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(DatabaseInUse, match=f"process {first.pid}"), store.lock_database(path):
        pass
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_a_killed_holder_leaves_no_lock(path: Path) -> None:
    first = holder(path)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    first.kill()
    first.communicate(timeout=60)
    with store.lock_database(path):
        pass


def test_locking_does_not_create_the_database(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "distribution.db"
    with store.lock_database(path):
        assert not path.exists()


# -- the open store ----------------------------------------------------------------------------------------------


def test_a_write_is_on_the_disk_when_it_returns_and_safe_from_a_power_cut(world: World) -> None:
    task_id = world.submit()
    assert world.row(task_id)["status"] == "pending"
    assert world.store.write(lambda tx: tx.one("PRAGMA synchronous")[0]) == 2  # FULL
    assert world.store.write(lambda tx: tx.one("PRAGMA journal_mode")[0]) == "wal"


def test_listeners_hear_of_a_commit_and_of_nothing_that_was_undone(world: World) -> None:
    heard: list[str] = []
    world.store.listeners.append(lambda notes: heard.extend(note.verb for note in notes))

    def told_and_undone(tx: Tx) -> None:
        tx.note("task", "never", task=1)
        raise ValueError

    with pytest.raises(ValueError):
        world.store.write(told_and_undone)
    world.store.write(lambda tx: tx.note("task", "kept", task=1))
    assert heard == ["kept"]


def test_when_a_listener_hears_of_it_others_can_see_it(world: World) -> None:
    seen: list[int] = []

    def listen(notes: list[Note]) -> None:
        seen.extend(len(world.rows("SELECT id FROM af_crawl_tasks")) for _ in notes)

    world.store.listeners.append(listen)
    world.submit()
    assert seen == [1]


def test_dispatch_runs_in_the_same_commit_as_what_asked_for_it(world: World) -> None:
    world.register()
    commits: list[str] = []
    pulled: list[Any] = []
    pull = threading.Thread(target=lambda: pulled.extend(world.dispatcher.pull("shop-1", "boot-1", 1, 20.0).tasks))
    pull.start()
    while not world.dispatcher.is_asking("shop-1"):
        pull.join(0.001)

    def trace(tx: Tx) -> None:
        tx.connection.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    world.store.write(trace)
    commits.clear()
    task_id = world.submit()
    pull.join(60)
    assert [task.id for task in pulled] == [task_id] and len(commits) == 1


def test_a_full_disk_is_told_changes_nothing_and_heals(world: World) -> None:
    first = world.submit()
    pages = world.store.write(lambda tx: tx.one("PRAGMA page_count")[0])
    world.store.write(lambda tx: tx.one(f"PRAGMA max_page_count = {pages}"))
    big = [db.NewTask("echo", task_data='{"x": "%s"}' % ("x" * 10_000))] * 20
    for _ in range(3):
        with pytest.raises(StorageFailing):
            world.store.write(db.submit, big)
    assert world.counts() == {"pending": 1}
    world.store.write(lambda tx: tx.one("PRAGMA max_page_count = 1000000"))
    assert [task.id for task in world.store.write(db.submit, big)] == list(range(first + 1, first + 21))


def test_a_backup_of_a_live_database_opens_and_is_complete(world: World, tmp_path: Path) -> None:
    stop = threading.Event()

    def go_on_submitting() -> None:
        while not stop.is_set():
            world.submit()

    acknowledged = [world.submit() for _ in range(50)]
    submitter = threading.Thread(target=go_on_submitting)
    submitter.start()
    target = tmp_path / "backup.db"
    try:
        store.backup_database(world.path, target)
    finally:
        stop.set()
        submitter.join(60)
    store.check_database(target)
    assert target.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(target)) as copy:
        ids = [task_id for (task_id,) in copy.execute("SELECT id FROM af_crawl_tasks ORDER BY id")]
        counted = copy.execute("SELECT SUM(n) FROM af_count WHERE scope = 'all'").fetchone()[0]
    assert ids[:50] == acknowledged and ids == list(range(1, len(ids) + 1))
    assert counted == len(ids)  # one moment, not a mixture of two
    assert not target.with_name("backup.db-wal").exists()


def test_a_backup_does_not_overwrite_with_a_bad_copy_silently(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.db"
    change(theirs, "CREATE TABLE x (y)")
    with pytest.raises(DatabaseRefused):
        store.backup_database(theirs, tmp_path / "copy.db")


def test_nobody_else_can_read_a_copy_while_it_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(sqlite3.Connection):
        def backup(self, target: sqlite3.Connection, **options: Any) -> None:
            modes.append(copy.stat().st_mode & 0o777)
            super().backup(target, **options)

    modes: list[int] = []
    copy = path.with_name("copy.db")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **{"factory": Looking, **options}))
    before = os.umask(0o022)
    try:
        store.backup_database(path, copy)
        copy.chmod(0o644)  # as an earlier version left one that was cut off
        store.backup_database(path, copy)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600]


def test_closing_leaves_one_file_and_all_that_was_written(tmp_path: Path) -> None:
    world = World(tmp_path)
    ids = [world.submit() for _ in range(20)]
    assert world.store.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["distribution.db"]
    again = World(tmp_path)
    assert [row["id"] for row in again.rows("SELECT id FROM af_crawl_tasks ORDER BY id")] == ids
    again.close()
