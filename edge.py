"""What does a new device download?

worker.pyz (setting worker_file), if `make edge` has made it: a whole device in one file. It is read once and kept until
it changes. It holds what is in the repository and no key, so everybody may have it who can reach the dashboard's page,
and the line that downloads it needs no key.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

NAME = "worker.pyz"
ADVICE = "This master has no worker.pyz yet: run `make edge` in its folder; it needs no restart."


@dataclass(frozen=True)
class Download:
    """The file's bytes and their sha256, in hexadecimal."""

    content: bytes
    sha256: str


class WorkerFile:
    """The file as it is now; several threads may ask."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._mark: tuple[int, ...] = ()
        self._download: Download | None = None

    @property
    def is_there(self) -> bool:
        return os.access(self._path, os.R_OK) and self._path.is_file()

    def read(self) -> Download | None:
        """None where it was not made yet, or is gone again."""
        with self._lock:
            try:
                found = self._path.stat()
                # make edge puts a new file in the old one's place, so the inode tells them apart.
                mark = (found.st_ino, found.st_size, found.st_mtime_ns)
                if mark != self._mark:
                    content = self._path.read_bytes()
                    self._download, self._mark = Download(content, hashlib.sha256(content).hexdigest()), mark
            except OSError:
                self._download, self._mark = None, ()
            return self._download
