"""How is the database copied, kept, and brought back?

A backup is a folder: the database of one moment, the files of its tasks, and backup.json, which says what is in it.

    FOLDER.part   while it is made   ->   FOLDER   once all of it is on the disk, and the copy was opened and checked

`back_up` makes one beside a running master, page by page through SQLite: a copied file would lack what is still in the
write-ahead log. A lock tells the folder that it makes from one that was cut off. `Backups` makes one each night, in a
thread of its own: neither the writer nor the scheduler waits for it. It deletes old ones of its own database, and only
after a new one is good.

`restore` brings one back, under the database's lock. All of it happens in a folder beside the database first, and one
rename decides (`store.finish_restore` moves the rest, and a crash in between changes nothing). The database that was
there is kept. A restored database begins a new life: open attempts end, every lease with which a report could still be
accepted gets a new number, and ids go on behind those that the old life may have given away.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import audit
import db
import history
from artifacts import copy_files
from schema import ACTIVE
from storage import kind_of
from store import (
    KEPT_AS,
    DatabaseRefused,
    Store,
    backup_database,
    check_database,
    finish_restore,
    folder_of,
    last_moment,
    reading,
    restored_folder,
    sync_folder,
)
from transaction import Policy, Tx

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("af.backups")

SAYS = "backup.json"
LATE_SECONDS = 3600.0
RETRY_SECONDS = 600.0
LEAP = 10_000_000
"""So far ids jump where nobody can say how far the old life came."""
FENCED = ("af_crawl_tasks", "af_task_assignment")
"""Whose ids people and devices remember."""


class Backup(NamedTuple):
    """What backup.json says; `at` in seconds since the epoch, by the clock on the wall."""

    at: float
    bytes: int
    files: int
    seconds: float
    instance_id: str
    """Of its database (af_meta): several masters may share a folder."""


BELOW = {"at": 1e11, "bytes": 2**60, "files": 2**60, "seconds": 1e9}
"""What a backup.json may say; a moment from there on has no date."""


class Unable(Exception):
    """No backup can be made now; `code` says why in a word."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


# -- one backup ---------------------------------------------------------------------------------------------------


def back_up(path: Path, folder: Path, *, copied_before: Path | None = None) -> Backup:
    """Copies the database and the files of its tasks into a new folder, durably and checked; files that the folder
    `copied_before` has are linked. Raises DatabaseRefused or OSError; then there is no such folder."""
    if folder.exists():
        advice = "a backup is never written over; name a folder that is not there"
        raise FileExistsError(errno.EEXIST, advice, str(folder))
    check_database(path, seconds=0.0)
    at, started = time.time(), time.monotonic()
    with _making(folder.with_name(f"{folder.name}.part")) as part:
        try:
            backup_database(path, part / path.name)
        except sqlite3.Error as error:
            raise _as_refusal(error, path) from error
        earlier = folder_of(copied_before / path.name) if copied_before else None
        sizes = copy_files(path, part, earlier)
        size = (part / path.name).stat().st_size + sum(sizes)
        seconds = round(time.monotonic() - started, 3)
        made = Backup(at, size, len(sizes), seconds, _instance_of(part / path.name))
        _write(part / SAYS, json.dumps({**made._asdict(), "schema_version": _schema_of(part / path.name)}))
        sync_folder(part)
        part.replace(folder)
        sync_folder(folder.parent)
    return made


@contextmanager
def _making(part: Path) -> Iterator[Path]:
    """A new folder, whose backup.json is locked for as long as the block runs; none is left if that fails."""
    if not _remove_cut_off(part):
        advice = "another process makes a backup there now; wait for it, or delete this folder if none does"
        raise FileExistsError(errno.EEXIST, advice, str(part))
    part.mkdir(mode=0o700, parents=True)
    try:
        if fcntl is None:  # where an open file also keeps its folder from being renamed
            yield part
            return
        with (part / SAYS).open("w") as file:
            with suppress(OSError):  # a disk that knows no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _remove_cut_off(part: Path) -> bool:
    """False if the folder is being made now, or where nobody can say."""
    try:
        with (part / SAYS).open("r+b") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part, ignore_errors=True)
    except FileNotFoundError:
        shutil.rmtree(part, ignore_errors=True)
    except OSError:
        return False
    return True


def _as_refusal(error: sqlite3.Error, path: Path) -> Exception:
    if kind_of(error) == "full":
        return OSError(errno.ENOSPC, "the disk has no room for the copy")
    return DatabaseRefused(f"{path} cannot be copied ({error})")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_backup(folder: Path) -> Backup | None:
    """What a folder's backup.json says; None if it is no whole backup, or what it says makes no sense."""
    try:
        said = json.loads((folder / SAYS).read_text(encoding="utf-8"))
        backup = Backup(*(said[name] for name in Backup._fields))
        is_sound = all(type(said[name]) in (int, float) and 0 <= said[name] < below for name, below in BELOW.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return backup if is_sound and type(backup.bytes) is type(backup.files) is int else None


# -- every night --------------------------------------------------------------------------------------------------


class Backups:
    """The folder of a master's own backups: one each day at `at`, the newest `keep` of them kept."""

    def __init__(self, database: Path, folder: Path | None, at: str, keep: int, store: Store) -> None:
        """`folder` None: none are made. `at` is HH:MM by the clock on the wall."""
        self.folder = folder
        self._database, self._at, self._keep, self._store = database, at, keep, store
        self._ours = re.compile(rf"{re.escape(database.stem)}-[0-9]{{8}}T[0-9]{{6}}Z-[0-9a-f]{{4}}")
        self._one_at_a_time = threading.Lock()
        self._instance_id = _instance_of(database)
        self._started = store.moments()[1]
        self._next_try = 0.0
        _say_if_unusable(folder)
        self.last_failure: str | None = None
        #              every (s)               what happens
        self.chores = ((2.0, self.start_if_due),) if folder else ()

    def kept(self) -> list[tuple[Path, Backup]]:
        """Whole backups of this database, newest first."""
        if self.folder is None or not self.folder.is_dir():
            return []
        folders = [path for path in self.folder.iterdir() if self._ours.fullmatch(path.name)]
        found = [(path, said) for path in folders if (said := read_backup(path)) is not None]
        found = [one for one in found if one[1].instance_id == self._instance_id]
        return sorted(found, key=lambda one: (one[1].at, one[0].name), reverse=True)

    def start_if_due(self) -> None:
        """In the scheduler's thread, which must not wait: the backup has one of its own."""
        wall = self._store.moments()[1]
        if time.monotonic() >= self._next_try and self._is_due(wall):
            self._next_try = time.monotonic() + RETRY_SECONDS
            threading.Thread(target=self._make_nightly, name="backup", daemon=True).start()

    def _is_due(self, wall: float) -> bool:
        """No backup since the last time that one should have been made. One from the future counts for nothing."""
        since = last_time(self._at, wall)
        return not any(since <= backup.at <= wall + 60.0 for _, backup in self.kept())

    def _make_nightly(self) -> None:
        with suppress(Unable):
            self.make("nightly")

    def make(self, by: str) -> tuple[Path, Backup]:
        """Makes one now and rotates. Raises Unable (not_configured, running, failed)."""
        if self.folder is None:
            raise Unable("no_backup_folder", "Write backup_folder into the master's config and start it again.")
        if not self._one_at_a_time.acquire(blocking=False):
            raise Unable("backup_running", "A backup is being made already; look at GET /system/backups.")
        try:
            return self._make(self.folder, by)
        except (DatabaseRefused, OSError) as error:
            self.last_failure = _without_paths(error)
            log.error("backup failed by=%s: %s", by, error)
            self._tell("backup_failed", by=by, reason=self.last_failure)
            raise Unable("backup_failed", "The backup failed; the master's log says why.") from error
        finally:
            self._one_at_a_time.release()

    def _make(self, folder: Path, by: str) -> tuple[Path, Backup]:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            if self._ours.fullmatch(part.stem):
                _remove_cut_off(part)
        before = self.kept()
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        new = folder / f"{self._database.stem}-{stamp}-{secrets.token_hex(2)}"
        made = back_up(self._database, new, copied_before=before[0][0] if before else None)
        self.last_failure = None
        log.info("backup made by=%s folder=%s bytes=%d files=%d seconds=%.1f", by, new, *made[1:4])
        self._tell("backup", by=by, name=new.name, bytes=made.bytes, seconds=made.seconds)
        # The new one is good, so older ones may go; it is not among them, whatever the clock says.
        for old, _ in before[self._keep - 1 :]:
            log.info("backup deleted folder=%s", old)
            shutil.rmtree(old, ignore_errors=True)
        return new, made

    def _tell(self, verb: str, **facts: Any) -> None:
        with suppress(Exception):  # a disk that takes no writes must not make a good backup a bad one
            self._store.write(lambda tx: tx.note("system", verb, **facts))

    @property
    def is_running(self) -> bool:
        return self._one_at_a_time.locked()

    def watch(self, now: float, wall: float) -> tuple[str, str] | None:
        """What a person should look at (attention.py)."""
        if self.folder is None:
            return None
        if self.last_failure is not None:
            return "backup", "The last backup failed; the master's log says why."
        due = max(last_time(self._at, wall), self._started)
        kept = self.kept()
        newest = kept[0][1].at if kept else 0.0
        if wall - due < LATE_SECONDS or newest >= last_time(self._at, wall):
            return None
        age = f"{(wall - newest) / 3600:.0f} h old" if newest else "not there"
        return "backup", f"The nightly backup is late: the newest one is {age}."


def _say_if_unusable(folder: Path | None) -> None:
    """At the start and not only in the night: a master that cannot keep backups goes on all the same."""
    why = None
    if folder is not None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            why = None if os.access(folder, os.W_OK) else "no right to write"
        except OSError as error:
            why = error.strerror
    if why is not None:
        advice = "give the master's user the right to write there, or name another folder"
        log.error("backup_folder %s cannot be used (%s): %s", folder, why, advice)


def _without_paths(error: Exception) -> str:
    return (error.strerror or "failed") if isinstance(error, OSError) else "the copy is not sound"


def last_time(at: str, wall: float) -> float:
    """The last moment at which the clock on the wall showed HH:MM, in seconds since the epoch."""
    now = datetime.fromtimestamp(wall)
    moment = now.replace(hour=int(at[:2]), minute=int(at[3:]), second=0, microsecond=0)
    return (moment if moment <= now else moment - timedelta(days=1)).timestamp()


# -- bring one back -----------------------------------------------------------------------------------------------


class NewLife(NamedTuple):
    """What became of a restored database's tasks."""

    states: dict[str, int]
    ended: int
    leases: int


def restore(path: Path, folder: Path, policy: Policy) -> str:
    """Puts the backup in `folder` into the database's place, whose lock the caller holds; returns what to print.

    Raises DatabaseRefused or OSError; then nothing was changed."""
    source = _database_in(folder, path.name)
    said = _said_in(folder, source)
    check_database(source)
    staging = path.with_name(f"{path.name}.restoring")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    new = staging / path.name
    try:
        backup_database(source, new)
        sizes = copy_files(source, staging)
        if not (staging / folder_of(source).name).exists():
            folder_of(new).mkdir(mode=0o700)
        else:
            (staging / folder_of(source).name).replace(folder_of(new))
        at = said.at if said else last_moment(new)
        life = _begin_new_life(new, _floors(path, new), policy)
        kept = f"{path.name}.before-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        _write(staging / KEPT_AS, kept)
        for place in (folder_of(new), staging):
            sync_folder(place)
        was_there = path.exists()
        staging.replace(restored_folder(path))  # from here on it is done, sooner or later
        sync_folder(path.parent)
    except sqlite3.Error as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _as_refusal(error, source) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finish_restore(path)
    return _told(folder, path, kept if was_there else None, at, life, len(sizes))


def _database_in(folder: Path, name: str) -> Path:
    """The one database in a backup's folder; it may have another name than the one that it becomes."""
    if (folder / name).is_file():
        return folder / name
    try:
        found = [one for one in folder.iterdir() if one.suffix == ".db" and one.is_file()]
    except OSError as error:
        raise DatabaseRefused(f"{folder} is no backup ({error.strerror}); name a folder that --backup made") from None
    if len(found) != 1:
        raise DatabaseRefused(f"{folder} holds {len(found)} databases instead of one; name a folder that --backup made")
    return found[0]


def _said_in(folder: Path, source: Path) -> Backup | None:
    """What a backup says of itself; None if it has no backup.json. Raises DatabaseRefused for what we never made."""
    for path in (source, folder_of(source), *folder_of(source).glob("[0-9]*")):
        if path.is_symlink():
            raise DatabaseRefused(f"{path} is a link, and --backup makes none; put in its place what belongs there")
    said = read_backup(folder)
    if said is None and (folder / SAYS).exists():
        raise DatabaseRefused(
            f"{folder / SAYS} makes no sense; name another backup, or delete that file if you trust the rest"
        )
    return said


def _floors(path: Path, new: Path) -> dict[str, int]:
    """Below which ids must not begin again, because the old life may have given them away: what the present database
    says if it is the same one, later on; else a leap."""
    with reading(new) as connection:
        restored = _last_ids(connection)
    with suppress(DatabaseRefused), reading(path) as connection:
        present = _last_ids(connection)
        if present.get("instance_id") == restored["instance_id"]:
            return {table: max(present.get(table, 0), restored.get(table, 0)) for table in FENCED}
    return {table: restored.get(table, 0) + LEAP for table in FENCED}


def _instance_of(path: Path) -> str:
    with reading(path) as connection:
        return str(_last_ids(connection)["instance_id"])


def _schema_of(path: Path) -> int:
    """The database's own version, which is older than this program's where no start has upgraded it yet."""
    with reading(path) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _last_ids(connection: sqlite3.Connection) -> dict[str, Any]:
    found = dict(connection.execute("SELECT name, seq FROM sqlite_sequence").fetchall())
    found |= dict(connection.execute("SELECT key, value FROM af_meta WHERE key = 'instance_id'").fetchall())
    return found


def _begin_new_life(path: Path, floors: dict[str, int], policy: Policy) -> NewLife:
    moment = max(time.time(), last_moment(path))
    store = Store(path, policy=policy, moments=lambda: (moment, moment))
    store.keep = history.keep
    store.open()
    try:
        return store.write(begin_new_life, floors)
    finally:
        store.close()


def begin_new_life(tx: Tx, floors: dict[str, int]) -> NewLife:
    """Nothing that the old life gave away may be taken for something of this one.

    Open attempts end and count nowhere, so their tasks wait again; the newest attempt of every task that is not over
    gets another lease, so that a report of the old life is stale; and ids go on behind `floors`."""
    rows = tx.execute(f"SELECT id FROM af_task_assignment WHERE status IN ({ACTIVE})").fetchall()
    attempts = [attempt for (attempt_id,) in rows if (attempt := db.get_attempt(tx, attempt_id)) is not None]
    ended = sum(db.release(tx, attempt, "restored") is not None for attempt in attempts)
    leases = tx.execute(
        f"UPDATE af_task_assignment SET lease_id = lower(hex(randomblob({db.LEASE_BYTES}))) WHERE id IN"
        " (SELECT assignment_id FROM af_crawl_tasks WHERE status NOT IN ('completed', 'cancelled'))"
    ).rowcount
    for table, floor in floors.items():
        if not tx.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (floor, table)).rowcount:
            tx.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, floor))
    tx.note("system", "restored", ended=ended, leases=leases)
    audit.record(tx, audit.COMMAND, "restore", detail={"ended": ended, "leases": leases})
    states = dict(tx.execute("SELECT status, count(*) FROM af_crawl_tasks GROUP BY status").fetchall())
    return NewLife(states, ended, leases)


def _told(folder: Path, path: Path, kept: str | None, at: float, life: NewLife, files: int) -> str:
    counts = ", ".join(f"{n} {state}" for state, n in sorted(life.states.items())) or "none"
    moment = f"{datetime.fromtimestamp(at, timezone.utc):%Y-%m-%d %H:%M:%S} UTC" if at else "its making"
    return "\n".join([
        f"restored {folder} to {path}",
        f"tasks: {sum(life.states.values())} ({counts}), {files} files",
        f"open attempts: {life.ended} ended, their tasks wait again and no loss is counted; {life.leases} leases got"
        " a new number, so what devices still report of them is refused",
        f"It is the database of {moment}: what was submitted later is not in it, what was completed later runs again,"
        " and keys that were revoked later are valid again.",
        f"The database that was there is kept as {path.with_name(kept)}." if kept else "There was no database before.",
    ])  # fmt: skip
