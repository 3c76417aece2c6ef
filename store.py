"""Which file is the database, is it ours, who holds it, and how do verbs reach it?

A file is created, never guessed: an empty or foreign one is refused, each with its own exit code. The file is locked
for the life of the process that writes, so a second master on it ends with one sentence. `Store.write` runs a verb in
the writer's thread and returns when it is durable.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from peewee import SqliteDatabase

import schema
from transaction import Note, Policy, Tx
from writer import Writer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

log = logging.getLogger("af.store")

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

PRAGMAS = (
    # auto_vacuum only takes effect before the first page is written, so it comes first.
    ("auto_vacuum", 2),
    ("journal_mode", "wal"),
    ("synchronous", 2),
    ("busy_timeout", 5000),
    ("cache_size", -65536),
    ("temp_store", 2),
    ("wal_autocheckpoint", 2000),
)
SMALLEST_FILE_BYTES = 512
OLDEST_SQLITE = (3, 33)
"""The first with UPDATE … FROM, which changes many rows with a value for each."""
START_CHECK_SECONDS = 5.0
"""A start looks for damage so long, which is enough for about 2 GB; it must not take minutes because there is more."""


class DatabaseRefused(Exception):
    """The file cannot be used; the text says why and what to do. `exit_code` is the process's own."""

    exit_code = 4


class DatabaseInUse(DatabaseRefused):
    exit_code = 5


class DatabaseNewer(DatabaseRefused):
    exit_code = 6


@contextlib.contextmanager
def lock_database(path: Path) -> Iterator[None]:
    """Holds `PATH.lock` for as long as the block runs; raises DatabaseInUse when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            holder = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
            raise DatabaseInUse(
                f"{path} is in use by another master (process {holder}); stop that one first, or name another database"
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def create_database(path: Path) -> bool:
    """Makes the file with all its tables, readable by its owner alone; False if it was there and is ours already.

    Raises DatabaseRefused for a file that is there and is not ours.
    """
    if path.exists():
        check_database(path, seconds=START_CHECK_SECONDS)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its name and renamed, so that a crash half-way never leaves a file that looks like ours.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        database = SqliteDatabase(str(temporary), pragmas=PRAGMAS)
        with database.connection_context():
            schema.create_tables(database)
            sql = "INSERT INTO af_meta (key, value) VALUES ('instance_id', ?)"
            database.execute_sql(sql, (secrets.token_hex(16),))
            database.execute_sql("PRAGMA journal_mode = delete")
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def upgrade_database(path: Path) -> None:
    """Brings a checked file of an older version up to this one, keeping a copy of it as it was; only under its lock."""
    with contextlib.closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)) as connection:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == schema.SCHEMA_VERSION:
        return
    kept = path.with_name(f"{path.name}.schema-{version}")
    backup_database(path, kept)
    database = SqliteDatabase(str(path), pragmas=PRAGMAS)
    with database.connection_context():
        schema.upgrade_tables(database, version)
    log.info("database %s upgraded from schema %d to %d; as it was: %s", path, version, schema.SCHEMA_VERSION, kept)


def check_database(path: Path, *, seconds: float = math.inf) -> None:
    """Raises DatabaseRefused (empty, foreign, corrupt) or DatabaseNewer; reads only, up to 3 s per GB. What could not
    be looked at within `seconds` is taken for sound."""
    size = path.stat().st_size if path.is_file() else -1
    if size < SMALLEST_FILE_BYTES:
        what = "is not a file" if size < 0 else f"is empty or cut off ({size} bytes)"
        raise DatabaseRefused(f"{path} {what}; restore a backup, or move it away and start again to make a new one")
    with _reading(path) as connection:
        application_id = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application_id != schema.APPLICATION_ID:
            raise DatabaseRefused(f"{path} is a database of another program; name another file for ours")
        if version > schema.SCHEMA_VERSION:
            raise DatabaseNewer(
                f"{path} was written by a newer version (schema {version}, this one knows {schema.SCHEMA_VERSION});"
                " start that version, or restore an older backup"
            )
        verdict = _quick_check(connection, path, seconds)
        marker = connection.execute("SELECT value FROM af_meta WHERE key = 'instance_id'").fetchone()
    if verdict != "ok" or marker is None:
        found = " ".join(verdict.replace("*** in database main ***", "").split())  # SQLite's verdict has line ends
        raise DatabaseRefused(f"{path} is damaged ({found}); restore a backup")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        raise DatabaseRefused(f"{path} is not a readable database ({error}); restore a backup") from None


def _quick_check(connection: sqlite3.Connection, path: Path, seconds: float) -> str:
    """SQLite's verdict; "ok" also when it had found nothing when the time was up."""
    if seconds == 0:
        return "ok"
    if seconds == math.inf:
        return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    timer = threading.Timer(seconds, connection.interrupt)
    timer.start()
    try:
        return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        if str(error) != "interrupted":
            raise
        log.info("%s was checked for %g s, which was not enough for all of it; a backup checks its copy", path, seconds)
        return "ok"
    finally:
        timer.cancel()
        timer.join()  # or it would interrupt what comes next


# What is remembered once a minute, and what a kill left behind since then: beats, and the newest task and attempt.
_LAST_MOMENTS_SQL = (
    "SELECT (SELECT value FROM af_meta WHERE key = 'last_now') UNION ALL SELECT MAX(last_heartbeat_at) FROM af_device"
    " UNION ALL SELECT (SELECT created_at FROM af_crawl_tasks ORDER BY id DESC LIMIT 1)"
    " UNION ALL SELECT (SELECT assigned_at FROM af_task_assignment ORDER BY id DESC LIMIT 1)"
)


def last_moment(path: Path) -> float:
    """The last moment this database has seen (epoch seconds; 0 for a new one); the clock starts after it."""
    if not path.exists():
        return 0.0
    check_database(path, seconds=0.0)
    with _reading(path) as connection:
        moments = connection.execute(_LAST_MOMENTS_SQL).fetchall()
    return max(float(moment or 0.0) for (moment,) in moments)


def backup_database(path: Path, target: Path) -> None:
    """Copies a live database page by page, syncs the copy and checks it. Raises DatabaseRefused or OSError."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = delete")
    target.chmod(0o600)
    with target.open("rb") as written:
        os.fsync(written.fileno())
    sync_folder(target.parent)
    check_database(target)


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def sync_folder(folder: Path) -> None:
    """A rename is durable only when its folder is; Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class _Rehearsed(Exception):
    """Undoes the job that raises it, and brings out what its verb returned."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned


class Store:
    """The open database: `write` runs a verb durably. Its owner calls `open`, later `close`, and holds the lock."""

    def __init__(self, path: Path, *, policy: Policy, moments: Callable[[], tuple[float, float]],
                 max_queue_length: int = 10_000) -> None:  # fmt: skip
        """`moments` returns (now, wall), in seconds since the epoch: the steady clock and the clock on the wall."""
        self.path = path
        self.policy = policy
        self.moments = moments
        self.writer = Writer(SqliteDatabase(str(path), pragmas=PRAGMAS), max_queue_length=max_queue_length)
        self.listeners: list[Callable[[list[Note]], None]] = []
        self.dispatch: Callable[[Tx], None] | None = None
        """Runs at the end of every group of writes that asks for it, in the same commit."""
        self.keep: Callable[[Tx], None] | None = None
        """Runs at the end of every job that noted something, in the same savepoint."""
        self._dispatch_wanted = False
        self._rng = random.Random()
        self.writer.before_commit = self._dispatch_if_wanted

    def open(self) -> None:
        """Creates, checks or upgrades the file and starts the writer. Raises DatabaseRefused and its kin."""
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise DatabaseRefused(
                f"this Python has SQLite {sqlite3.sqlite_version}; {oldest} or newer is needed: use a newer Python"
            )
        if not create_database(self.path):
            upgrade_database(self.path)
        self.writer.start()

    def close(self) -> bool:
        """Writes what is queued, checkpoints and closes; True if all of it was done in time."""
        return self.writer.stop()

    def write(
        self,
        verb: Callable[Concatenate[Tx, Parameters], Returned],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Returned:
        """Runs verb(tx, …) in the writer; returns its result once it is durable.

        Raises what the verb raises, WriterBusy, StorageFailing or WriterStopped; then nothing of it was kept.
        """
        now, wall = self.moments()

        def job() -> Returned:
            return self._in_transaction(now, wall, lambda tx: verb(tx, *args, **kwargs))

        return self.writer.call(job)

    def rehearse(
        self,
        verb: Callable[Concatenate[Tx, Parameters], Returned],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Returned:
        """What verb(tx, …) would return at this moment; nothing of it is kept. Raises what `write` raises."""
        now, wall = self.moments()

        def job() -> None:
            connection = self.writer.connection
            assert connection is not None, "the store is not open"
            raise _Rehearsed(verb(Tx(connection, now, wall, self.policy, self._rng), *args, **kwargs))

        try:
            self.writer.call(job)
        except _Rehearsed as rehearsed:
            returned: Returned = rehearsed.returned
        return returned

    def want_dispatch(self) -> None:
        """From inside a job: something changed that may let a waiting task go."""
        self._dispatch_wanted = True

    def _in_transaction(self, now: float, wall: float, run: Callable[[Tx], Returned]) -> Returned:
        connection = self.writer.connection
        assert connection is not None, "the store is not open"
        tx = Tx(connection, now, wall, self.policy, self._rng)
        result = run(tx)
        if tx.notes and self.keep is not None:
            self.keep(tx)
        tx.flush()
        self._dispatch_wanted = self._dispatch_wanted or tx.wants_dispatch
        if tx.notes:
            self.writer.when_committed(lambda: self._tell(tx.notes))
        return result

    def _dispatch_if_wanted(self) -> None:
        if self._dispatch_wanted and self.dispatch is not None:
            self._dispatch_wanted = False
            now, wall = self.moments()
            self._in_transaction(now, wall, self.dispatch)
            self._dispatch_wanted = False

    def _tell(self, notes: list[Note]) -> None:
        for listener in self.listeners:
            listener(notes)
