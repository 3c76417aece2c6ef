"""Which key does a device show its master?

The configured one only until the master has given this device a token of its own. That stands in the device's state
folder, for its owner's eyes, and is shown from then on. A token that the master refuses is put aside for this run: the
device registers anew with the configured key, and gets another one if that key may still give one.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path
from typing import Any, Optional

from executors.device.machine import sync_folder

log = logging.getLogger("worker")

FILE_NAME = "token"
LONGEST_TOKEN = 256


class Credential:
    """One for all threads of a process; without a folder it has no token."""

    def __init__(self, configured: str, folder: Optional[Path] = None) -> None:
        self._configured = configured
        self._path = None if folder is None else folder / FILE_NAME
        self._lock = threading.Lock()
        self._token = self._stored()

    @property
    def key(self) -> str:
        return self._token or self._configured

    @property
    def is_configured(self) -> bool:
        """Whether what is shown is the configured key, which may be traded for a token."""
        return bool(self._configured) and not self._token

    @property
    def has_token(self) -> bool:
        return bool(self._token)

    def reload(self) -> None:
        """Another process may have a newer one."""
        self._token = self._stored()

    def keep(self, token: Any) -> None:
        """What the master gave; kept before it is shown for the first time."""
        if not isinstance(token, str) or not _is_token(token):
            return
        with self._lock:
            try:
                self._store(token)
            except OSError as error:
                log.error("the device's token cannot be kept (%s): its next start needs a key to register with", error)
            self._token = token

    def put_aside(self, key: str) -> bool:
        """The master refused this key: whether there is another one to show now."""
        with self._lock:
            if key == self.key:
                if not self._token:
                    return False
                self._token = ""
            return True

    def _stored(self) -> str:
        if self._path is None:
            return ""
        try:
            with self._path.open(encoding="ascii") as file:
                token = file.read(LONGEST_TOKEN + 1).strip()
        except (OSError, ValueError):
            return ""
        return token if _is_token(token) else ""

    def _store(self, token: str) -> None:
        assert self._path is not None
        new = self._path.with_suffix(".new")
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        sync_folder(self._path.parent)


def _is_token(text: str) -> bool:
    return len(text) <= LONGEST_TOKEN and re.fullmatch(r"[\x21-\x7e]+", text) is not None
