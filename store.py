"""Which file is the database, is it ours, who holds it, and how do verbs reach it?

A file is created, never guessed: an empty or foreign one is refused, each with its own exit code, and so are a disk
without room and one across a network. The file is locked for the life of the process that writes, so a second master on
it ends with one sentence; whoever gets the lock first finishes a restore that was cut off. `Store.write` runs a verb in
the writer's thread and returns when it is durable.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import re
import secrets
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from peewee import OperationalError, SqliteDatabase

import schema
from storage import kind_of
from transaction import Note, Policy, Tx
from writer import StorageFailing, Writer

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
STARTS_WITH_BYTES = 16 * 1024 * 1024
"""Less room than this is no start: the write-ahead log alone grows to 8 MB before it is written back."""
NETWORK_FILESYSTEMS = frozenset({
    "nfs", "nfs3", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "9p", "afs", "ceph", "lustre", "glusterfs", "davfs",
    "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.glusterfs", "fuse.ceph", "fuse.gcsfuse", "fuse.davfs2",
})  # fmt: skip
MOUNTS = Path("/proc/self/mountinfo")
START_CHECK_SECONDS = 5.0
"""A start looks for damage so long, which is enough for about 2 GB; it must not take minutes because there is more."""


class DatabaseRefused(Exception):
    """The file cannot be used; the text says why and what to do. `exit_code` is the process's own."""

    exit_code = 4


class DatabaseInUse(DatabaseRefused):
    exit_code = 5


class DatabaseNewer(DatabaseRefused):
    exit_code = 6


class DiskFull(DatabaseRefused):
    exit_code = 9


class NetworkFilesystem(DatabaseRefused):
    exit_code = 10


REFUSED_BY_STORAGE: dict[str, tuple[type[DatabaseRefused], str]] = {
    "full": (DiskFull, "make room on its disk"),
    "locked": (DatabaseInUse, "end what else holds it"),
    "damaged": (DatabaseRefused, "restore a backup"),
}
"""What a start is refused with that could not write, and what is to be done."""


def refuse_bad_disk(path: Path, *, allow_network: bool) -> None:
    """Raises NetworkFilesystem or DiskFull for a place where a database would not be safe, before it is touched."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    kind = filesystem_of(folder)
    if kind in NETWORK_FILESYSTEMS and not allow_network:
        raise NetworkFilesystem(
            f"{path} lies on {kind}, where SQLite's locks and its shared memory cannot be trusted; put it on a disk of"
            " this machine, or set allow_network_filesystem if you know that no other machine opens it"
        )
    free = shutil.disk_usage(folder).free
    if free < STARTS_WITH_BYTES:
        raise DiskFull(
            f"the disk of {path} has {free // 2**20} MiB left and a master needs {STARTS_WITH_BYTES // 2**20} MiB to"
            " start; make room on it, nothing is lost"
        )


def filesystem_of(folder: Path) -> str:
    """The kind of file system that this folder lies on, as Linux calls it; "" where nobody says."""
    found, longest = "", -1
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        place = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split()[4]))
        # Of several on one place the last one is on top.
        if len(place.parts) >= longest and folder.resolve().is_relative_to(place):
            found, longest = after.split()[0], len(place.parts)
    return found


def refusal(path: Path, error: StorageFailing) -> DatabaseRefused:
    """What a start says that could not write."""
    kind, advice = REFUSED_BY_STORAGE.get(error.kind or "", (DatabaseRefused, "look at the disk"))
    return kind(f"{path} cannot be written ({error}); {advice} and start again")


@contextlib.contextmanager
def lock_database(path: Path) -> Iterator[None]:
    """Holds `PATH.lock` for as long as the block runs; raises DatabaseInUse when another process has it."""
    make_folder(path.parent)
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
        finish_restore(path)
        yield
    finally:
        os.close(descriptor)


def refuse_missing(path: Path) -> None:
    """Raises DatabaseRefused where no start has made a database yet, nor a restore is about to put one."""
    if not path.exists() and not restored_folder(path).exists():
        advice = "name the right one with --config or --database; a start makes a new one"
        raise DatabaseRefused(f"there is no database at {path}; {advice}")


def create_database(path: Path) -> bool:
    """Makes the file with all its tables, readable by its owner alone; False if it was there and is ours already.

    Raises DatabaseRefused for a file that is there and is not ours.
    """
    if path.exists():
        check_database(path, seconds=START_CHECK_SECONDS)
        return False
    make_folder(path.parent)
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
    _roll_back(path)
    with reading(path) as connection:
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
    if verdict == "ok" and marker is None:
        raise DatabaseRefused(f"{path} lacks its marker (af_meta instance_id): no master made it; restore a backup")
    if verdict != "ok":
        found = " ".join(verdict.replace("*** in database main ***", "").split())  # SQLite's verdict has line ends
        raise DatabaseRefused(f"{path} is damaged ({found}); restore a backup")


def _roll_back(path: Path) -> None:
    """A file that a crash left while it was changing its journal mode (new, or just upgraded) has a rollback journal,
    which a connection that only reads may not apply: SQLite does it by itself when one opens that may write."""
    if path.with_name(f"{path.name}-journal").exists():
        with (
            contextlib.suppress(sqlite3.DatabaseError),  # whatever is wrong with the file is said by the checks
            contextlib.closing(sqlite3.connect(f"file:{_quoted(path)}?mode=rw", uri=True)) as connection,
        ):
            connection.execute("PRAGMA user_version")


def folder_of(database: Path) -> Path:
    """Where the files of the tasks in this database lie (artifacts.py); they are copied and moved together."""
    return database.with_name(f"{database.name}.artifacts")


KEPT_AS = "kept-as"


def restored_folder(path: Path) -> Path:
    """Where a restored database waits, complete and on the disk, to be put into its place (backups.py)."""
    return path.with_name(f"{path.name}.restored")


def finish_restore(path: Path) -> None:
    """Moves what is there aside and what was restored into its place, from wherever a crash left it; under the lock.

    As long as something waits in the folder, its place holds the old one: so what is new moves last."""
    staged = restored_folder(path)
    if not staged.exists():
        return
    new, files = staged / path.name, folder_of(staged / path.name)
    if new.exists() or files.exists():
        kept = path.with_name((staged / KEPT_AS).read_text(encoding="utf-8"))
        if new.exists():
            # The logs first: beside the new database they would be replayed into it.
            for suffix in ("-wal", "-shm", "-journal", ""):
                _move(Path(f"{path}{suffix}"), Path(f"{kept}{suffix}"))
            sync_folder(path.parent)
            new.replace(path)
        if files.exists():
            _move(folder_of(path), folder_of(kept))
            files.replace(folder_of(path))
        sync_folder(path.parent)
    shutil.rmtree(staged)


def _move(old: Path, new: Path) -> None:
    if old.exists():
        old.replace(new)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that only reads; raises DatabaseRefused for what SQLite cannot read."""
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
    with reading(path) as connection:
        moments = connection.execute(_LAST_MOMENTS_SQL).fetchall()
    return max(float(moment or 0.0) for (moment,) in moments)


def backup_database(path: Path, target: Path) -> None:
    """Copies a live database page by page, syncs the copy and checks it. Raises DatabaseRefused or OSError."""
    with contextlib.closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)) as source:
        os.close(os.open(target, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite would let others read it
        target.chmod(0o600)  # also one that an upgrade left here
        with contextlib.closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = delete")
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


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """A folder and those above it, whose names are durable on return, as what is synced inside has to be."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=mode, exist_ok=True)
        sync_folder(folder.parent)


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
        try:
            if not create_database(self.path):
                upgrade_database(self.path)
            self.writer.start()
        except (OperationalError, sqlite3.OperationalError) as error:  # peewee has one of its own, around SQLite's
            raise refusal(self.path, StorageFailing(str(error), kind=kind_of(error))) from error

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
        # What is given away while reports cannot be taken would only come back.
        if self._dispatch_wanted and self.dispatch is not None and not self.writer.storage.trouble:
            self._dispatch_wanted = False
            now, wall = self.moments()
            self._in_transaction(now, wall, self.dispatch)
            self._dispatch_wanted = False

    def _tell(self, notes: list[Note]) -> None:
        for listener in self.listeners:
            listener(notes)
