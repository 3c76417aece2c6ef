"""What a peer's no-op task does: it adds one byte to a file, so that the bench can count from outside."""

from __future__ import annotations

import os

_file = os.open(os.environ["PEER_WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def witness() -> None:
    os.write(_file, b".")
