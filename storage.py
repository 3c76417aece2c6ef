"""Does the disk take writes; if not, why, since when, and who is in the way?

SQLite says what went wrong in one of a few sentences, sorted here by what there is to do. A full disk, a failing one
and a foreign lock are trouble that passes: while it lasts nothing is granted and no lease ends (scheduler.py probes
each second whether it is over), and clients are told to come back, later the longer it lasts. A damaged file is the
end: nothing more is written, and the master stops.

This file writes nothing to the database, and knows nothing of tasks.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("af.storage")

#    what SQLite says                        what it is
SENTENCES = (
    ("database or disk is full",             "full"),
    ("disk I/O error",                       "failing"),
    ("unable to open database file",         "failing"),
    ("attempt to write a readonly database", "failing"),
    ("database is locked",                   "locked"),
    ("database disk image is malformed",     "damaged"),
    ("file is not a database",               "damaged"),
)  # fmt: skip
ADVICE = {
    "full": "The disk of the database is full: nothing is written, nothing is given away and no lease ends until there"
    " is room.",
    "failing": "The disk of the database refuses writes: nothing is given away and no lease ends until it takes them.",
    "locked": "Another process holds the database: nothing is given away and no lease ends until it lets go.",
    "damaged": "The database is damaged: this master stops; restore a backup.",
}
RETRY_SECONDS = (2, 30)
"""A client comes back after as long as the trouble has lasted, within these bounds."""
PAUSE_FACTOR = 1.5
"""A device waits up to so many times what it was told (worker.py)."""
LOG_SECONDS = 60.0
LONG_SECONDS = 30.0
LITTLE_ROOM_BYTES = 64 * 1024 * 1024
LOCKS = Path("/proc/locks")


class Trouble(NamedTuple):
    """`kind`: full, failing or locked; `since` by the monotonic clock."""

    kind: str
    since: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


def kind_of(error: BaseException) -> str | None:
    """What is wrong with the storage, if that is what this error says, or SQLite's own below one of peewee's."""
    if not isinstance(error if isinstance(error, sqlite3.DatabaseError) else error.__context__, sqlite3.DatabaseError):
        return None
    return next((kind for sentence, kind in SENTENCES if sentence in str(error)), None)


class Storage:
    """What is known of the disk below one database; the writer tells it, everybody may ask."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble: Trouble | None = None
        self.damage: str | None = None
        self.on_damage: Callable[[], None] | None = None
        """Called once, from the thread that met the damage; must not block."""
        self._longest_told = 0
        self._logged_at = 0.0

    @property
    def retry_after(self) -> int:
        """When a client may try again, in seconds."""
        trouble, (shortest, longest) = self.trouble, RETRY_SECONDS
        return shortest if trouble is None else max(shortest, min(longest, int(trouble.seconds)))

    @property
    def is_long_in_trouble(self) -> bool:
        """Longer than somebody needs who looks at the database beside the master."""
        return self.damage is not None or (self.trouble is not None and self.trouble.seconds >= LONG_SECONDS)

    def fails(self, error: BaseException) -> int:
        """A write failed with this; returns when the client may try again."""
        kind = kind_of(error)
        if kind == "damaged":
            self._finds_damage(error)
        elif kind is not None:
            self._is_troubled(kind, error)
        self._longest_told = max(self._longest_told, self.retry_after)
        return self.retry_after

    def _is_troubled(self, kind: str, error: BaseException) -> None:
        self.trouble = Trouble(kind, self.trouble.since if self.trouble else time.monotonic())
        if time.monotonic() - self._logged_at >= LOG_SECONDS or not self._logged_at:
            self._logged_at = time.monotonic()
            log.error("%s (%s, for %.0f s now)", self.complaint(), error, self.trouble.seconds)

    def cannot_read(self, error: BaseException) -> bool:
        """A read failed with this; True if the storage is at fault and not the question."""
        kind = kind_of(error)
        if kind == "damaged":
            self._finds_damage(error)
        return kind is not None

    def _finds_damage(self, error: BaseException) -> None:
        """Somebody read or wrote a page that makes no sense. Nothing is written from here on."""
        if self.damage is None:
            self.damage = str(error)
            log.critical("%s is damaged (%s): nothing more is written and this master stops; restore a backup with"
                         " master.py --restore FOLDER", self.path, error)  # fmt: skip
            if self.on_damage is not None:
                self.on_damage()

    def works(self) -> float:
        """A probe was written: the trouble is over. Returns how long a device may still keep away, as it was told."""
        if self.trouble is not None:
            log.warning("the database takes writes again, after %.0f s", self.trouble.seconds)
        told, self._longest_told, self.trouble, self._logged_at = self._longest_told, 0, None, 0.0
        return told * PAUSE_FACTOR

    def complaint(self) -> str | None:
        """One sentence for a person, or None."""
        trouble = self.trouble
        if self.damage is not None:
            return ADVICE["damaged"]
        if trouble is None:
            return None
        holder = _holder(Path(f"{self.path}-shm")) if trouble.kind == "locked" else None
        return ADVICE[trouble.kind].replace("Another process", f"Process {holder}") if holder else ADVICE[trouble.kind]

    def watch(self, now: float, wall: float) -> tuple[str, str] | None:
        """What a person should look at (attention.py): trouble, or little room before there is any."""
        complaint = self.complaint()
        if complaint is not None:
            return "storage", complaint
        free = shutil.disk_usage(self.path.parent).free
        if free >= LITTLE_ROOM_BYTES:
            return None
        return "storage", f"The disk of the database has {free // 2**20} MiB left: make room before it is full."


def _holder(file: Path) -> int | None:
    """Which other process has locked bytes of this file for writing, where the system tells (Linux)."""
    try:
        inode = file.stat().st_ino
        lines = [line.split() for line in LOCKS.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    for words in lines:
        if len(words) > 5 and words[3] == "WRITE" and words[5].endswith(f":{inode}") and int(words[4]) != os.getpid():
            return int(words[4])
    return None
