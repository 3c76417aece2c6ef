"""How does a report become a file, without ever being in memory?

It is read as CSV row by row (quoted line breaks, CRLF or LF, a byte order mark, bytes that are no UTF-8) and written as
gzipped CSV: UTF-8 without a byte order mark, LF, otherwise what came, in the order in which it came. Nothing of a row
is logged or returned but its event time: rows hold personal data. It must not know how a report is asked for.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Optional

from executors.task_executor import Retry

# One of these is in the header of every report, raw or aggregate, that AppsFlyer describes.
HEADER_COLUMNS = ("Media Source", "Media Source (pid)", "Event Time", "AppsFlyer ID")
TIME_COLUMNS = ("Event Time", "Date")
TOLD_EVERY_ROWS = 20_000
# gzip's middle: a third of the time that a row takes here, about a tenth of the size.
COMPRESSION = 5
# Python's own 128 KB may be less than an event's value; a quote that never ends must not fill the memory either.
csv.field_size_limit(4 * 1024 * 1024)


@dataclass
class Written:
    """What is told of a report."""

    rows: int = 0
    received_rows: int = 0
    columns: list[str] = field(default_factory=list)
    first_event_time: Optional[str] = None
    last_event_time: Optional[str] = None
    uneven_rows: int = 0

    def note_time(self, moment: str) -> None:
        if moment:
            self.first_event_time = min(moment, self.first_event_time or moment)
            self.last_event_time = max(moment, self.last_event_time or moment)


def write_report(
    body: io.RawIOBase, path: Path, *, before: Optional[str] = None, tell: Callable[[int], None] = lambda rows: None
) -> Written:
    """Write the report to `path`; Retry where it is no report or was cut off.

    `before`: rows of exactly this event time are left out, because they belong to the window that begins then: whether
    AppsFlyer counts the end of a window as in it is not certain."""
    # surrogateescape: bytes that are no UTF-8 go through unchanged.
    text = io.TextIOWrapper(io.BufferedReader(body, 256 * 1024), "utf-8-sig", "surrogateescape", newline="")
    with open(path, "wb") as file:
        try:
            return copy_rows(text, file, before, tell)
        except csv.Error as error:
            raise Retry(f"the report is no readable CSV ({error})", after=60.0) from None


def copy_rows(text: io.TextIOBase, file: BinaryIO, before: Optional[str], tell: Callable[[int], None]) -> Written:
    rows = csv.reader(text)
    written = Written(columns=read_header(rows))
    width = len(written.columns)
    time_at = next((written.columns.index(name) for name in TIME_COLUMNS if name in written.columns), None)
    is_uneven = False
    # No name and no time in the gzip header: the same report is the same file.
    packed = gzip.GzipFile("", "wb", COMPRESSION, file, mtime=0)
    with packed, io.TextIOWrapper(packed, "utf-8", "surrogateescape", newline="") as target:
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(written.columns)
        for row in rows:
            if not row:
                continue
            written.received_rows += 1
            is_uneven = len(row) != width
            moment = row[time_at] if time_at is not None and not is_uneven else ""
            if before is not None and moment == before:
                continue
            writer.writerow(row)
            written.rows += 1
            written.uneven_rows += is_uneven
            written.note_time(moment)
            if written.received_rows % TOLD_EVERY_ROWS == 0:
                tell(written.received_rows)
    if is_uneven:
        raise Retry("the report ends in the middle of a row: it was cut off on its way")
    return written


def read_header(rows: Any) -> list[str]:
    """The first line, which must be a report's: an empty answer or an error page with status 200 is none."""
    header: list[str] = next(rows, [])
    if not header:
        raise Retry("AppsFlyer answered 200 with an empty body: that is no report", after=60.0)
    if not any(name in header for name in HEADER_COLUMNS):
        raise Retry("AppsFlyer answered 200 with what has no report's header", after=60.0)
    return header
