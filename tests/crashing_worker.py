"""Where may a device die? worker.py that kills itself, as kill -9 would, when it comes to a named point.

`crashing_worker.py POINT HITS [worker.py's own flags]`: at the HITS-th time. For tests alone: the points are wrapped
around the shipped code from outside, so that the program on a real device has nothing in it that kills it; a function
that is renamed there fails here.
"""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import worker
from executors.device import spool
from executors.device.holding import Holding
from executors.device.reports import Reporter
from executors.device.spool import Spool

POINTS = (
    "before_delivery", "after_delivery", "after_start",
    "before_journal_write", "inside_journal_write", "before_journal_sync", "after_journal_sync", "before_new_segment_sync",
    "before_send", "mid_send", "after_send", "after_reply", "after_acknowledgement",
    "before_acknowledgement_write", "inside_acknowledgement_write", "before_segment_delete", "after_segment_delete",
)  # fmt: skip


class Crash:
    """Counts the visits of one point."""

    def __init__(self, point: str, hits: int) -> None:
        if point not in POINTS:
            sys.exit(f"{point} is no point; write one of {', '.join(POINTS)}")
        self._point, self._left = point, itertools.count(hits, -1)

    def is_due(self, point: str) -> bool:
        return point == self._point and next(self._left) == 1

    def at(self, point: str) -> None:
        if self.is_due(point):
            self.now()

    @staticmethod
    def now() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def around(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Both get the call's arguments."""
    original = getattr(owner, name)

    def call(*arguments: Any, **more: Any) -> Any:
        before(*arguments)
        result = original(*arguments, **more)
        after(*arguments)
        return result

    setattr(owner, name, call)


def nothing(*_: Any) -> None:
    pass


def plant(crash: Crash) -> None:
    around(Holding, "add", lambda *_: crash.at("before_delivery"), lambda *_: crash.at("after_delivery"))
    around(Holding, "begin", nothing, lambda *_: crash.at("after_start"))
    around(spool, "sync_file", lambda *_: crash.at("before_journal_sync"), lambda *_: crash.at("after_journal_sync"))
    around(spool, "sync_folder", lambda *_: crash.at("before_new_segment_sync"), nothing)
    around(Spool, "_delete", lambda *_: crash.at("before_segment_delete"), lambda *_: crash.at("after_segment_delete"))
    around(Reporter, "_deliver", lambda *_: crash.at("before_send"), nothing)
    around(Reporter, "_acknowledged", lambda *_: crash.at("after_reply"), lambda *_: crash.at("after_acknowledgement"))
    plant_in_the_journal(crash)
    plant_on_the_wire(crash)


def plant_in_the_journal(crash: Crash) -> None:
    append, write = Spool._append, os.write

    def torn(descriptor: int, content: Any) -> int:
        write(descriptor, content[: len(content) // 2])
        crash.now()
        return 0

    def dying_append(self: Spool, reports: Any, acknowledged: Any) -> None:
        for what, is_there in (("journal", reports), ("acknowledgement", acknowledged)):
            if is_there:
                crash.at(f"before_{what}_write")
                if crash.is_due(f"inside_{what}_write"):
                    os.write = torn
        append(self, reports, acknowledged)

    Spool._append = dying_append  # type: ignore[method-assign]


def plant_on_the_wire(crash: Crash) -> None:
    send = http.client.HTTPConnection.send

    def dying_send(self: Any, content: Any) -> None:
        is_report = isinstance(content, bytes) and b'"reports":[' in content
        if is_report and crash.is_due("mid_send"):
            send(self, content[: len(content) // 2])
            crash.now()
        send(self, content)
        if is_report:
            crash.at("after_send")

    http.client.HTTPConnection.send = dying_send  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(Crash(sys.argv[1], int(sys.argv[2])))
    os._exit(worker.main(sys.argv[3:]))
