"""The no-op task of huey: SQLite, with fsync or without."""

from __future__ import annotations

import os

from huey import SqliteHuey

from bench.peer.witness import witness

huey = SqliteHuey(filename=os.environ["PEER_FILE"], fsync=os.environ["PEER_FSYNC"] == "1", results=False)


@huey.task()
def noop() -> None:
    witness()


def submit(total: int) -> None:
    for _ in range(total):
        noop()
