"""A master whose database is full: master.py that lets it grow no further while a file `full` lies beside its config.

`full_disk_master.py [master.py's own flags]`. For tests alone. SQLite's max_page_count holds for one connection, which
is the writer's; unlike a small disk it needs no rights.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import master
from writer import StorageFailing, Writer

NO_LIMIT = 1_000_000_000
mark = Path(sys.argv[sys.argv.index("--config") + 1]).parent / "full"
start = Writer.start


def watched(writer: Writer) -> None:
    start(writer)
    threading.Thread(target=watch, args=(writer,), daemon=True).start()


def limit(writer: Writer, pages: int) -> None:
    assert writer.connection is not None
    writer.connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()


def watch(writer: Writer) -> None:
    was_full = False
    while True:
        is_full = mark.exists()
        if is_full != was_full:
            # 1 stands for as many as there are. It may share its group with a write that has no room: then once more.
            with contextlib.suppress(StorageFailing):
                writer.call(lambda pages=1 if is_full else NO_LIMIT: limit(writer, pages))  # type: ignore[misc]
                was_full = is_full
        time.sleep(0.02)


Writer.start = watched  # type: ignore[assignment, method-assign]
sys.exit(master.main())
