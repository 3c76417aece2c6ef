"""Where do a task's files lie, and how do they get there and go?

Beside the database, in `<database>.artifacts/`, readable by its owner alone:

    incoming/<random>                                           what is on its way in; emptied at each start
    <task_id // 1000>/<task_id>.<assignment_id>.<16 digits of its sha256>.<name>

In: the bytes are streamed into incoming/, length and sha256 are checked, then fsync, rename, fsync of the folder, and
last the row of af_artifact through the writer. A crash between two steps leaves a file without a row; the device sends
it again, and one that nobody sends again is swept an hour later. Sending a file twice changes nothing.
Out: who deletes a task marks its rows as dropped in the same transaction; the sweep removes the files, then the rows.

A name comes here only after wire.py has checked it. It must not hold a whole file in memory, nor run in the writer.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import db
import judging
from connections import Shares
from reads import Reads
from store import Store, folder_of, make_folder, sync_folder
from transaction import Tx
from writer import StorageFailing

log = logging.getLogger("af.artifacts")

PIECE_BYTES = 256 * 1024
MOVING_AT_ONCE = 32
"""Uploads, and downloads: each has a handler thread for as long as it takes. With as many overdue uploads they are
still fewer than the threads that master.py keeps for everybody."""
UPLOADS_OF_A_DEVICE = DOWNLOADS_OF_A_KEY = MOVING_AT_ONCE // 4
DOWNLOADS_OF_A_SHARED_KEY = MOVING_AT_ONCE - DOWNLOADS_OF_A_KEY
UPLOAD_SECONDS = 60.0
SLOWEST_BYTES_A_SECOND = 16 * 1024
"""An upload has a minute and a second for each 16 KiB, as the device promises; and so has each piece of it."""
KEPT_FREE_BYTES = 64 * 1024 * 1024
"""The last of the disk is the database's."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
STRAY_AFTER_SECONDS = 3600.0
NAMES_A_RUN = 2000
OURS = re.compile(r"([0-9]+)\.([0-9]+)\.([0-9a-f]{16})\.(.+)")


class NoRoom(Exception):
    """The disk is full, or would be."""


class Busy(Exception):
    """Too many files are on their way at this moment."""


class ChecksumWrong(Exception):
    """What came is not what was announced."""


class Artifacts:
    """The folder beside the database, and the rows that say what belongs to whom."""

    def __init__(self, database: Path, store: Store, reads: Reads) -> None:
        self.folder = folder_of(database)
        self._incoming = self.folder / "incoming"
        self._store, self._reads = store, reads
        self._uploads = Places()
        self._downloads = Shares()
        self._placing = threading.Lock()  # while a file gets its place, or loses it
        self._arriving: set[Path] = set()
        self._walk: Iterator[Path] = iter(())
        #              every (s)                  what happens
        self.chores = ((10.0, self.remove_dropped), (60.0, self.remove_strays))
        if self._incoming.is_dir():  # cut off by the end of the process before this one
            for path in self._incoming.iterdir():
                with contextlib.suppress(OSError):
                    path.unlink()

    # -- in ---------------------------------------------------------------------------------------------------

    def receive(
        self, device_id: str, assignment_id: int, lease_id: str, artifact: db.Artifact, parts: Iterable[bytes]
    ) -> db.Judged:
        """Takes a file in, if its attempt may still send it (see judging.judge_upload); durable when accepted.

        Raises NoRoom, Busy or ChecksumWrong, what `parts` raises, and what a write raises; then the file is not in.
        """
        judged = self._store.write(judging.judge_upload, device_id, assignment_id, lease_id, artifact)
        if judged.outcome != "accepted" or judged.task_id is None:
            return judged
        upload = self._uploads.take(artifact.bytes, device_id)
        path = self._path(judged.task_id, assignment_id, artifact.sha256, artifact.name)
        try:
            self._arriving.add(path)
            self._place(self._take(artifact, in_time(parts, upload)), path)
            # A file whose row fails stays: the same file may be on its way again, and strays are swept.
            return self._store.write(judging.add_artifact, device_id, assignment_id, lease_id, artifact)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise NoRoom("the master's disk has no room for this file; send it again later") from error
            log.error("a file cannot be stored: %s", error)
            raise StorageFailing(f"the file cannot be stored now ({error.strerror}); send it again later") from error
        finally:
            self._arriving.discard(path)
            self._uploads.give_back(upload)

    def _take(self, artifact: db.Artifact, parts: Iterable[bytes]) -> Path:
        """The whole file, on the disk and as announced; nothing of it is left when that fails."""
        for folder in (self.folder, self._incoming):
            make_folder(folder, mode=0o700)
        if shutil.disk_usage(self.folder).free < artifact.bytes + KEPT_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path = self._incoming / secrets.token_hex(16)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        digest = hashlib.sha256()
        try:
            with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
                for part in parts:
                    digest.update(part)
                    left = memoryview(part)
                    while left:
                        left = left[file.write(left) :]
                os.fsync(file.fileno())
            if digest.hexdigest() != artifact.sha256:
                raise ChecksumWrong("the file's bytes have another sha256 than the one that was sent; send it again")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _place(self, taken: Path, path: Path) -> None:
        try:
            with self._placing:
                if not path.parent.is_dir():
                    path.parent.mkdir(mode=0o700)
                    sync_folder(self.folder)
                taken.replace(path)
        except BaseException:
            taken.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def _path(self, task_id: int, assignment_id: int, sha256: str, name: str) -> Path:
        return self.folder / f"{task_id // 1000:06d}" / f"{task_id}.{assignment_id}.{sha256[:16]}.{name}"

    # -- out --------------------------------------------------------------------------------------------------

    def open(self, task_id: int, artifact: dict[str, Any], key_id: int | None) -> Parts | None:
        """The bytes of a file (a row of Reads.artifact), to be closed by whoever reads them; None if it is lost.
        `key_id` 0 or None: the key that many may share."""
        path = self._path(task_id, artifact["assignment_id"], artifact["sha256"], artifact["name"])
        own = DOWNLOADS_OF_A_KEY if key_id else DOWNLOADS_OF_A_SHARED_KEY
        shares = {"": MOVING_AT_ONCE, f"key {key_id or 0}": own}
        if not self._downloads.take(shares):
            text = f"{own} files are going out to this key, or {MOVING_AT_ONCE} in all"
            raise Busy(f"{text}; ask for this one again in a moment")
        give_back = functools.partial(self._downloads.give_back, shares)
        try:
            if path.resolve() != self.folder.resolve() / path.relative_to(self.folder):
                raise OSError(errno.ELOOP, "it leads out of its place", str(path))
            parts = Parts(path, give_back)
        except OSError as error:
            give_back()
            log.error("a file cannot be read: %s", error)
            return None
        if parts.bytes != artifact["bytes"]:
            log.error("a file has %d bytes instead of %d: %s", parts.bytes, artifact["bytes"], path)
            parts.close()
            return None
        return parts

    # -- what the scheduler calls, outside the writer ---------------------------------------------------------

    def remove_dropped(self) -> int:
        """Files of deleted tasks, first the files, then their rows: a crash between the two removes them again."""
        gone = []
        for artifact_id, task_id, assignment_id, name, sha256 in self._reads.dropped_artifacts(NAMES_A_RUN):
            if self._remove(self._path(task_id, assignment_id, sha256, name)):
                gone.append((artifact_id,))

        def forget(tx: Tx) -> None:
            tx.connection.executemany("DELETE FROM af_artifact WHERE artifact_id = ?", gone)

        if gone:
            self._store.write(forget)
        return len(gone)

    def remove_strays(self) -> int:
        """Files that no row names, once they are an hour old; a part of the folder at a time, round and round."""
        paths = self._next_paths()
        found = {path: match for path in paths if (match := OURS.fullmatch(path.name))}
        attempts = sorted({int(match[2]) for match in found.values()})
        known = {self._path(task, attempt, sha256, name)
                 for task, attempt, name, sha256 in self._reads.artifacts_of_attempts(attempts)}  # fmt: skip
        strays = [path for path in found if path not in known and _is_old(path)]
        for path in strays:
            log.info("remove_stray file=%s", path.name)
        return sum(self._remove(path) for path in strays)

    def _next_paths(self) -> list[Path]:
        paths = [path for path, _ in zip(self._walk, range(NAMES_A_RUN))]
        if not paths:
            self._walk = self.folder.glob("[0-9]*/*")
        return paths

    def _remove(self, path: Path) -> bool:
        """True if it is gone; its folder goes with the last file."""
        with self._placing:
            if path in self._arriving:
                return False
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.error("a file that nobody needs cannot be removed: %s", error)
                return False
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()
        return True


class Upload:
    """One file on its way in: until when its next piece has to be here, which is known anew with each piece."""

    def __init__(self, size: int, device_id: str) -> None:
        self.device_id = device_id
        self._all_until = time.monotonic() + UPLOAD_SECONDS + size / SLOWEST_BYTES_A_SECOND
        self.until = 0.0
        self.go_on()

    def go_on(self) -> None:
        piece_until = time.monotonic() + UPLOAD_SECONDS + PIECE_BYTES / SLOWEST_BYTES_A_SECOND
        self.until = min(self._all_until, piece_until)


class Places:
    """Who may send a file now? A read from a silent connection cannot be ended everywhere, so whoever is overdue keeps
    a thread, and no place: the next one gets that, as long as not too many are overdue. A device has a share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: list[Upload] = []

    def take(self, size: int, device_id: str) -> Upload:
        """A place for a file of that size; raises Busy."""
        now = time.monotonic()
        with self._lock:
            in_time = sum(upload.until > now for upload in self._taken)
            if in_time >= MOVING_AT_ONCE or len(self._taken) >= 2 * MOVING_AT_ONCE:
                raise Busy(f"{MOVING_AT_ONCE} files are coming in already; send this one again in a moment")
            if sum(upload.device_id == device_id for upload in self._taken) >= UPLOADS_OF_A_DEVICE:
                raise Busy(f"{UPLOADS_OF_A_DEVICE} files of this device are coming in already; send fewer at once")
            upload = Upload(size, device_id)
            self._taken.append(upload)
            return upload

    def give_back(self, upload: Upload) -> None:
        with self._lock:
            self._taken.remove(upload)


def in_time(parts: Iterable[bytes], upload: Upload) -> Iterator[bytes]:
    """The parts as they come in; raises Busy once they are overdue."""
    for part in parts:
        if time.monotonic() > upload.until:
            raise Busy("the file, or a piece of it, took over a minute and a second for each 16 KiB; send it again")
        upload.go_on()
        yield part


class Parts:
    """A file's bytes, piece by piece. The server closes it, also when the reader goes away."""

    def __init__(self, path: Path, when_closed: Any) -> None:
        self._file = path.open("rb", buffering=0)
        self._when_closed = when_closed
        self.bytes = os.fstat(self._file.fileno()).st_size

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        part = self._file.read(PIECE_BYTES)
        if not part:
            raise StopIteration
        return part

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._when_closed()


def copy_files(database: Path, target: Path, copied_before: Path | None = None) -> list[int]:
    """Copies the files of a database that may be in use into the folder `target`, durably; how many bytes each has.

    Copy the database first: a file never changes, so that each row of that copy finds its file, unless its task was
    deleted in between. For the same reason one that `copied_before` has (the folder of an earlier copy) is linked."""
    sizes = []
    for path in folder_of(database).glob("[0-9]*/*"):
        if path.is_symlink() or path.parent.is_symlink():
            continue  # we make none; whoever did must not get what it leads to into a backup
        place = target / folder_of(database).name / path.parent.name
        if not place.is_dir():
            place.mkdir(mode=0o700, parents=True)
        earlier = copied_before / path.parent.name / path.name if copied_before else None
        with contextlib.suppress(FileNotFoundError):
            if not (earlier and _is_linked(earlier, place / path.name)):
                shutil.copy2(path, place / path.name)
                with (place / path.name).open("rb") as copied:
                    os.fsync(copied.fileno())
            sizes.append((place / path.name).stat().st_size)
    for folder in (target / folder_of(database).name).glob("[0-9]*"):
        sync_folder(folder)
    return sizes


def _is_linked(earlier: Path, place: Path) -> bool:
    try:
        os.link(earlier, place)
    except OSError:  # not there, or no links on this disk
        return False
    return True


def _is_old(path: Path) -> bool:
    # By the same clock that the file system writes down, not by the master's own.
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > STRAY_AFTER_SECONDS
    return False
