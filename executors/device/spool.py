"""Which reports has the master not acknowledged yet, whatever happens to this process?"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Container, Iterable, Iterator, Optional, Sequence

from executors.device.machine import make_folder, sync_file, sync_folder

log = logging.getLogger("worker")


@dataclass(eq=False)
class Report:
    """One report of a finished task: the bytes that are sent, and where they lie in the spool (segment 0: nowhere)."""

    assignment_id: Any
    lease_id: str
    payload: Optional[bytes]
    size: int
    segment: int = 0
    offset: int = 0
    is_replayed: bool = False
    is_start: bool = False  # only says that a task began: not spooled


class Spool:
    """Which reports has the master not acknowledged yet, whatever happens to this process?

    One thread writes (`write`), one reads (`oldest`, `remove`). Segments hold records: magic, kind, CRC, length,
    payload. Kind R is a report; kind A names acknowledged ones, so that they are not sent again, and losing it is
    harmless. A segment is deleted when all its reports are acknowledged, and never written over.
    """

    MAGIC = b"\xffAFr"  # \xff is in no UTF-8 text, so that the next record is found behind a damaged one
    HEADER = struct.Struct("<4scII")
    SEGMENT_BYTES = 4 * 1024 * 1024
    MEMORY_BYTES = 8 * 1024 * 1024
    KEPT_ASIDE = 100

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.aside = folder / "spool", folder / "set-aside"
        for path in (self.folder, self.aside):
            make_folder(path, mode=0o700)
        self.max_bytes = max_bytes
        self.is_writable = True
        self._segment_bytes = max(4096, min(self.SEGMENT_BYTES, max_bytes // 8))
        self._lock = threading.Lock()
        self._pending: dict[int, Report] = {}
        self._serials: dict[Report, int] = {}
        self._next_serial = itertools.count()
        self.pending_bytes = self._memory_bytes = 0
        self.lost: list[Report] = []  # could not be read back
        self._live: dict[int, int] = {}  # segment -> its reports without acknowledgement
        self._file: Optional[int] = None
        self._segment = self._size = 0
        self._replay()

    # -- reading back --

    def _replay(self) -> None:
        acknowledged: set[tuple[int, int]] = set()
        reports: list[Report] = []
        for path in sorted(path for path in self.folder.glob("*.spool") if path.stem.isdigit()):
            self._segment = int(path.stem)
            for offset, kind, payload in self.records(path.read_bytes()):
                if kind == b"A":
                    acknowledged.update((segment, at) for segment, at in json.loads(payload))
                elif kind == b"R" and (report := self._report_of(payload)) is not None:
                    report.segment, report.offset = self._segment, offset
                    reports.append(report)
                else:
                    log.warning("set aside %d damaged bytes of %s at %d", len(payload), path.name, offset)
                    self.set_aside(f"{path.stem}-{offset}.damaged", payload)
            self._live[self._segment] = 0
        for report in reports:
            if (report.segment, report.offset) not in acknowledged:
                self._live[report.segment] += 1
                self._add(report)
        for segment in [number for number, live in self._live.items() if live == 0]:
            self._delete(segment)

    @classmethod
    def records(cls, content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        """Each record's offset, kind and payload; kind ? for the bytes between two that cannot be read."""
        position = 0
        while position < len(content):
            record = cls._record_at(content, position)
            if record is not None:
                yield position, *record
                position += cls.HEADER.size + len(record[1])
                continue
            following = content.find(cls.MAGIC, position + 1)
            while following >= 0 and cls._record_at(content, following) is None:
                following = content.find(cls.MAGIC, following + 1)
            following = following if following >= 0 else len(content)
            yield position, b"?", content[position:following]
            position = following

    @classmethod
    def _record_at(cls, content: bytes, position: int) -> Optional[tuple[bytes, bytes]]:
        if position + cls.HEADER.size > len(content):
            return None
        magic, kind, checksum, length = cls.HEADER.unpack_from(content, position)
        payload = content[position + cls.HEADER.size : position + cls.HEADER.size + length]
        intact = magic == cls.MAGIC and len(payload) == length and zlib.crc32(kind + payload) == checksum
        return (kind, payload) if intact else None

    @staticmethod
    def _report_of(payload: bytes) -> Optional[Report]:
        try:
            content = json.loads(payload)
            return Report(content["assignment_id"], content["lease_id"], None, len(payload), is_replayed=True)
        except (ValueError, KeyError, TypeError):
            return None

    # -- the writing thread --

    def write(self, reports: Sequence[Report], acknowledged: Sequence[Report] = ()) -> None:
        """Append reports, and which others are acknowledged; durable on return if there are reports.

        On a full or broken disk they stay in memory, are sent all the same, and the next write stores them again."""
        unstored = [] if self.is_writable else [r for r in self.pending() if r.segment == 0 and r not in reports]
        try:
            self._append([*unstored, *reports], [[r.segment, r.offset] for r in acknowledged if r.segment])
            if not self.is_writable:
                log.info("spool writable again folder=%s", self.folder)
            self.is_writable = True
        except OSError as error:
            if self.is_writable:
                log.error("spool not writable folder=%s: %s; no more pulls until it is", self.folder, error.strerror)
            self.is_writable = False
            self._close_segment()
        with self._lock:
            for report in reports:
                self._add(report)
        for report in acknowledged:
            self._one_less(report.segment)

    def _append(self, reports: Sequence[Report], acknowledged: list[list[int]]) -> None:
        if not reports and not acknowledged and self.is_writable:
            return
        if self._file is None or self._size >= self._segment_bytes:
            self._open_segment()
        assert self._file is not None
        records = [self._record(b"R", report.payload or b"") for report in reports]
        places = list(itertools.accumulate((len(record) for record in records), initial=self._size))
        if acknowledged or not reports:
            records.append(self._record(b"A", json.dumps(acknowledged).encode()))
        left = memoryview(b"".join(records))
        while left:
            written = os.write(self._file, left)
            self._size += written
            left = left[written:]
        if reports or not self.is_writable:
            sync_file(self._file)
        for report, place in zip(reports, places):
            report.segment, report.offset = self._segment, place
        self._live[self._segment] += len(reports)

    def _record(self, kind: bytes, payload: bytes) -> bytes:
        return self.HEADER.pack(self.MAGIC, kind, zlib.crc32(kind + payload), len(payload)) + payload

    def _open_segment(self) -> None:
        self._close_segment()
        path = self._path(self._segment + 1)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        self._segment, self._size = self._segment + 1, 0
        self._live[self._segment] = 0
        sync_folder(self.folder)

    def _close_segment(self) -> None:
        """Nothing is ever appended behind a failed write: its tail may be torn."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            if self._live[self._segment] == 0:
                self._delete(self._segment)

    def _one_less(self, segment: int) -> None:
        if segment:
            self._live[segment] -= 1
            if self._live[segment] == 0 and (segment != self._segment or self._file is None):
                self._delete(segment)

    def _delete(self, segment: int) -> None:
        del self._live[segment]
        with contextlib.suppress(OSError):
            self._path(segment).unlink()

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:012d}.spool"

    def close(self) -> None:
        """Call it when nobody writes any more; an empty spool leaves no file."""
        self._close_segment()

    # -- the sending thread --

    def _add(self, report: Report) -> None:
        serial = self._serials[report] = next(self._next_serial)
        self._pending[serial] = report
        self.pending_bytes += report.size
        if report.payload is not None and report.segment and self._memory_bytes > self.MEMORY_BYTES:
            report.payload = None  # it is read back when its turn comes
        self._memory_bytes += len(report.payload or b"")

    def pending(self) -> list[Report]:
        """Everything that is not acknowledged, oldest first."""
        with self._lock:
            return list(self._pending.values())

    def oldest(self, count: int, max_bytes: int, but: Container[Report] = ()) -> list[Report]:
        """The oldest reports with their payload, at least one if there is any, `max_bytes` together; none of `but`."""
        with self._lock:
            candidates = list(itertools.islice((r for r in self._pending.values() if r not in but), count))
        chosen: list[Report] = []
        for report in candidates:
            max_bytes -= report.size + 1
            if chosen and max_bytes < 0:
                break
            if report.payload is None and not self._load(report):
                continue
            chosen.append(report)
        return chosen

    def _load(self, report: Report) -> bool:
        """Read a payload back from disk."""
        try:
            with self._path(report.segment).open("rb") as file:
                file.seek(report.offset)
                record = self._record_at(file.read(self.HEADER.size + report.size), 0)
        except OSError:
            record = None
        if record is None:
            log.error("spooled report cannot be read assignment=%s; it stays on disk", report.assignment_id)
            self.remove([report])  # on disk without an acknowledgement: the next start tries again
            self.lost.append(report)
            return False
        report.payload = record[1]
        with self._lock:
            self._memory_bytes += len(report.payload)
        return True

    def remove(self, reports: Iterable[Report]) -> None:
        """These are acknowledged; hand them to `write` as well, for the disk."""
        with self._lock:
            for report in reports:
                serial = self._serials.pop(report, None)
                if serial is not None:
                    del self._pending[serial]
                    self.pending_bytes -= report.size
                    self._memory_bytes -= len(report.payload or b"")

    def set_aside(self, name: str, content: bytes) -> None:
        """Keep what cannot be used, for a person to look at; the oldest beyond 100 are deleted."""
        with contextlib.suppress(OSError):
            (self.aside / name).write_bytes(content)
            kept = sorted(self.aside.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in kept[: -self.KEPT_ASIDE]:
                path.unlink()

    @property
    def is_empty(self) -> bool:
        return not self._pending

    @property
    def count(self) -> int:
        return len(self._pending)
