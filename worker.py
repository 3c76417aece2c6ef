# /// script
# requires-python = ">=3.9"
# dependencies = ["requests>=2.32"]
# ///
"""How does a device take, run and report tasks?

Copy worker.py, settings.py, executors/ and config/distribution_worker.json to a machine, `pip install requests`, and
start `python worker.py --device-id shop-7`. Only the device opens connections. The contract, with its numbers:

  pull       One pull is always open: limit = free slots, held up to pull_wait_seconds (20, at most 25), numbered by
             seq; ack is the last one received. A request on its way cannot be changed, so none is held with limit 0: a
             full device waits here for a slot (1.5 to 2.5 s), then asks with wait 0 for cancel[] and drain, and a slot
             that becomes free is filled at once. What is delivered again is not run again.
  heartbeat  Every heartbeat_interval (30 s, or the reply's next_seconds), from its own thread, against a deadline. Its
             holding[] names everything from delivery until the report is acknowledged: queued, running or reporting.
  reports    At most 100 in a request and max_body_bytes in all; what is ready goes at once, what becomes ready
             meanwhile goes together. A start is reported once a task has run for 0.2 s; a faster one only its end.
  spool      A report is on disk (length, CRC, one fdatasync a batch) before it is sent, and is sent again after any
             crash, before the first pull. Full (spool_max_bytes) or unwritable: no more pulls, nothing is dropped.
  time       A task over execution_timeout_seconds is reported failed (timeout), a cancelled one may go on for 5 s; then
             its thread, which cannot be killed, is left behind and replaced, and its result does not count.
             What did not start within start_within_seconds (by CLOCK_BOOTTIME) is handed back unstarted.
  outage     First try after rand(0, reconnect spread), after a broken connection rand(0, a tenth of it); then rand(0,
             2, 4, 8 ... 60 s). At the first start rand(0, 1) instead of the spread: devices boot before their master.
             Connecting takes at most 5 s; a call has a total deadline (pull: wait + 10 s, beat 10, report 30).
  stop       SIGTERM, SIGINT: no more pulls, running tasks get drain_seconds (30), the rest is handed back, the spool is
             flushed (5 s), a last beat says leaving, exit 0. A second signal, 0.5 s later or more: exit 130 at once.
  exit       0 stopped; 2 settings; 3 another process runs under this device_id; 8 the master refuses key or protocol.

It must not trust the network: only a JSON object is an answer, everything else (a captive portal, a proxy's 502, a
redirect) means that the master was not reached. It must not import what the master needs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import platform
import queue
import random
import secrets
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, Union
from urllib.parse import quote

import requests
import requests.adapters

from executors import task_executor
from settings import PROTOCOL, VERSION, ExitCode, Settings, SettingsError, configure_logging, from_arguments
from settings import stop as stop_with

try:
    import psutil
except ImportError:
    psutil = None  # type: ignore[assignment, unused-ignore]

log = logging.getLogger("worker")

API = "/api/distribution"
CONNECT_SECONDS = 5.0
REGISTER_SECONDS = BEAT_SECONDS = PULL_EXTRA_SECONDS = 10.0
REPORT_SECONDS = 30.0
LEAVE_SECONDS = 3.0
FLUSH_SECONDS = 5.0
LONGEST_BACKOFF_SECONDS = 60.0
FULL_WAIT_SECONDS = (1.5, 2.5)
START_REPORT_SECONDS = 0.2
CANCEL_GRACE_SECONDS = 5.0
SECOND_SIGNAL_SECONDS = 0.5
BUSY_TICK_SECONDS, IDLE_TICK_SECONDS = 0.2, 1.0
REPORTS_PER_REQUEST = 100
LARGEST_REPLY_BYTES = 64 * 1024 * 1024
REMEMBERED_ASSIGNMENTS = 10_000
QUEUED, RUNNING, REPORTING, GONE = "queued", "running", "reporting", "gone"


# ---- what differs between Linux, macOS and Windows, all of it ----

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

sync_file: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]


def lock_file(descriptor: int) -> None:
    """Lock an open file for the life of this process; OSError if another process has it."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]


def sync_folder(folder: Path) -> None:
    """Make a new file's name durable; Windows cannot open a folder, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def boot_clock() -> float:
    """Seconds that also pass while the machine is suspended, where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


# ---- the spool ----


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
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        for path in sorted(self.folder.glob("*.spool")):
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

    def oldest(self, count: int, max_bytes: int) -> list[Report]:
        """The oldest reports with their payload, at least one if there is any, `max_bytes` together."""
        with self._lock:
            candidates = list(itertools.islice(self._pending.values(), count))
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


# ---- talking to the master ----


class Unreachable(Exception):
    """The master did not answer as a master does. `was_broken`: a connection stood; `was_cut`: we ended it."""

    def __init__(self, reason: str, *, was_broken: bool = False, was_cut: bool = False) -> None:
        super().__init__(reason)
        self.was_broken, self.was_cut = was_broken, was_cut


class Busy(Exception):
    """The master answered that it cannot now (429, 503)."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the master is busy, again in {seconds:.1f} s")
        self.seconds = seconds


class Refused(Exception):
    """The master answered 4xx, with a code and a sentence."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail = status, code, detail


class Link:
    """Is the master there, and when may the next call be tried? One for all threads, so that an outage ends once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spread_seconds = 0.0  # none at the first start
        self.is_stopping = False
        self._changed = threading.Condition()
        self._failures = 0
        self._was_spread = False
        self._next_try = self._failed_at = self._lost_at = 0.0
        self._was_reached = False

    def wait_turn(self) -> None:
        with self._changed:
            while (left := self._next_try - time.monotonic()) > 0:
                self._changed.wait(left)

    def worked(self) -> None:
        if not self._failures and self._was_reached:
            return
        with self._changed:
            if self._was_reached:
                log.info("master back url=%s after=%.1fs", self.url, time.monotonic() - self._lost_at)
            self._was_reached, self._failures, self._was_spread, self._next_try = True, 0, False, 0.0
            self._changed.notify_all()

    def failed(self, started: float, error: Unreachable) -> None:
        """Another thread's call that began before the last failure is the same failure."""
        with self._changed:
            if started < self._failed_at:
                return
            now = time.monotonic()
            if self._failures == 0:
                self._lost_at = now
                verb = "master lost" if self._was_reached else "master not reached"
                log.warning("%s url=%s: %s; trying until it answers", verb, self.url, error)
            self._failures += 1
            self._failed_at = now
            self._next_try = now + random.uniform(0, self._longest_wait(error))

    def _longest_wait(self, error: Unreachable) -> float:
        if self.is_stopping:
            return 0.5
        if error.was_broken and self._failures == 1:
            return max(self.spread_seconds / 10, 0.5)
        if not self._was_spread:
            self._was_spread = True
            return max(self.spread_seconds, 1.0)
        return float(min(LONGEST_BACKOFF_SECONDS, 2 ** min(self._failures - 1, 10)))

    def hurry(self) -> None:
        """The process is about to end: wait no longer."""
        with self._changed:
            self.is_stopping, self._next_try = True, 0.0
            self._changed.notify_all()


class CuttableAdapter(requests.adapters.HTTPAdapter):
    """An HTTP adapter with one connection, whose socket another thread may shut down.

    The timeouts of requests count from byte to byte, so a server that drips would hold a call for ever."""

    socket: Optional[socket.socket] = None

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if "ConnectionCls" not in vars(pool):
            adapter = self

            class Connection(pool.ConnectionCls):
                def connect(self) -> None:
                    super().connect()
                    adapter.socket = self.sock

            pool.ConnectionCls = Connection
        return pool


class MasterClient:
    """How does one thread call the master? One requests.Session, total deadlines, no redirects, JSON only."""

    def __init__(self, link: Link, settings: Settings) -> None:
        self.link = link
        self.url = settings.master_url
        self._lock = threading.Lock()
        self._deadline: Optional[float] = None
        self._cut: str = ""
        self._adapter = CuttableAdapter(pool_connections=1, pool_maxsize=1)
        self._session = requests.Session()
        # trust_env would let a ~/.netrc replace our key; proxies and CA bundles of the environment still count.
        self._session.trust_env = False
        self._session.proxies.update(requests.utils.get_environ_proxies(self.url, no_proxy=None))
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._session.mount("http://", self._adapter)
        self._session.mount("https://", self._adapter)
        self._session.headers.update(
            {"User-Agent": f"af-worker/{VERSION}", "Accept": "application/json", "Accept-Encoding": "identity"}
        )
        if settings.api_key:
            self._session.headers["Authorization"] = f"Bearer {settings.api_key}"

    def get(self, path: str, query: dict[str, Any], seconds: float) -> dict[str, Any]:
        return self._call("GET", path, seconds, params=query)

    def post(self, path: str, body: Union[dict[str, Any], bytes], seconds: float) -> dict[str, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        return self._call("POST", path, seconds, data=content, headers={"Content-Type": "application/json"})

    def _call(self, method: str, path: str, seconds: float, **more: Any) -> dict[str, Any]:
        self.link.wait_turn()
        with self._lock:
            self._deadline, self._cut = time.monotonic() + seconds, ""
        timeout = (min(CONNECT_SECONDS, seconds), seconds)
        try:
            with self._session.request(
                method, self.url + API + path, timeout=timeout, allow_redirects=False, stream=True, **more
            ) as response:
                content = bytearray()
                for part in response.iter_content(65536):
                    content += part
                    if len(content) > LARGEST_REPLY_BYTES:
                        raise Unreachable(f"its answer is larger than {LARGEST_REPLY_BYTES} bytes", was_broken=True)
                cut = self._cut
        except (OSError, ValueError) as error:  # requests' own exceptions are OSErrors
            raise self._unreachable(error, seconds) from None
        finally:
            with self._lock:
                self._deadline = None
        if cut:
            raise self._unreachable(OSError(cut), seconds)
        return self._judge(response, bytes(content))

    def _unreachable(self, error: Exception, seconds: float) -> Unreachable:
        if self._cut:
            return Unreachable(self._cut, was_broken=True, was_cut=self._cut == "stop")
        if isinstance(error, requests.Timeout) and not isinstance(error, requests.ConnectionError):
            return Unreachable(f"no answer within {seconds:.0f} s", was_broken=True)
        cause: Any = error
        while deeper := [part for part in (getattr(cause, "reason", None), *cause.args) if isinstance(part, Exception)]:
            cause = deeper[0]
        never_stood = any(word in repr(error) for word in ("NewConnection", "ConnectTimeout", "NameResolution"))
        why = str(cause).rsplit(": ", 1)[-1].rpartition("] ")[2]  # "... failed: [Errno 111] Connection refused"
        return Unreachable(why[:200], was_broken=not never_stood)

    def _judge(self, response: requests.Response, content: bytes) -> dict[str, Any]:
        status, kind = response.status_code, response.headers.get("Content-Type", "")
        try:
            reply = json.loads(content) if kind.partition(";")[0].strip().endswith("json") else None
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not (200 <= status < 300 or (status >= 400 and "code" in reply)):
            where = f", a redirect to {response.headers.get('Location', '')[:200]}" if 300 <= status < 400 else ""
            raise Unreachable(f"answered {status} {kind[:80]}{where}, not as a master does", was_broken=True)
        if status >= 500 and status != 503:
            raise Unreachable(f"answered {status} {reply['code']}", was_broken=True)
        self.link.worked()
        if 200 <= status < 300:
            return reply
        if status in (429, 503):
            raise Busy(number(response.headers.get("Retry-After"), 5.0, 0.1, LONGEST_BACKOFF_SECONDS))
        raise Refused(status, str(reply["code"]), str(reply.get("detail") or reply.get("title") or ""))

    def cut_if_overdue(self, now: float) -> None:
        self._shut_down("no complete answer in time", lambda deadline: now > deadline)

    def cut(self) -> None:
        """End the call that is on its way, if any; the thread in it gets Unreachable with was_cut."""
        self._shut_down("stop", lambda deadline: True)

    def _shut_down(self, reason: str, is_due: Callable[[float], bool]) -> None:
        # Under the lock, so that it cannot hit the next call on the same connection.
        with self._lock:
            if self._deadline is not None and is_due(self._deadline):
                self._cut = reason
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    self._adapter.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


def number(value: Any, default: float, low: float, high: float) -> float:
    """A number from outside, between low and high; the default for what is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return default
    return min(high, max(low, found)) if found == found else default


# ---- what the device holds ----


@dataclass(eq=False)
class Held:
    """One assignment, from its delivery until its report is acknowledged."""

    assignment_id: Any
    lease_id: str
    task: dict[str, Any]
    delivered: float  # boot_clock
    phase: str = QUEUED
    started: float = 0.0  # monotonic
    is_start_told: bool = False
    cancelled: Optional[float] = None  # monotonic
    is_replaced: bool = False  # its thread was left behind: a new one has the slot
    progress: Optional[float] = None
    message: str = ""

    def is_cancelled(self) -> bool:
        """What the executor asks: cancelled, out of time, or handed back."""
        return self.cancelled is not None or self.phase != RUNNING

    def note_progress(self, fraction: float, message: str) -> None:
        self.progress, self.message = fraction, message

    def is_too_late(self) -> bool:
        within = number(self.task.get("start_within_seconds"), float("inf"), 0, float("inf"))
        return boot_clock() - self.delivered > within

    def __str__(self) -> str:
        task = self.task
        return f"task={task.get('id')} type={task.get('task_type')} attempt={task.get('attempt')}"


class Holding:
    """What does this device hold, and has it room? Every change of phase is here, under one lock."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.changed = threading.Condition()
        self._held: dict[Any, Held] = {}
        self._recent: deque[Any] = deque(maxlen=REMEMBERED_ASSIGNMENTS)
        self._known: set[Any] = set()
        self.busy_count = 0  # queued or running

    def add(self, tasks: Iterable[dict[str, Any]], delivered: float) -> list[Held]:
        """Those that are new; what was delivered before is not run again."""
        added = []
        with self.changed:
            for task in tasks:
                held = Held(task["assignment_id"], task["lease_id"], task, delivered)
                if held.assignment_id not in self._known and held.assignment_id not in self._held:
                    self._remember(held.assignment_id)
                    self._held[held.assignment_id] = held
                    self.busy_count += 1
                    added.append(held)
        return added

    def _remember(self, assignment_id: Any) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._known.discard(self._recent[0])
        self._recent.append(assignment_id)
        self._known.add(assignment_id)

    def add_reported(self, report: Report) -> None:
        """A report of an earlier process, on its way again."""
        with self.changed:
            held = Held(report.assignment_id, report.lease_id, {}, boot_clock(), phase=REPORTING)
            self._held[report.assignment_id] = held

    def begin(self, held: Held) -> bool:
        """queued -> running; False if it was cancelled or handed back."""
        with self.changed:
            if held.phase != QUEUED:
                return False
            held.phase, held.started = RUNNING, time.monotonic()
            return True

    def settle(self, held: Held, *, leave_thread: bool = False) -> bool:
        """queued or running -> reporting, the slot is free. False: it was settled before, or cancelled: do not report.

        `leave_thread`: the task goes on in a thread that can no longer be waited for."""
        with self.changed:
            if held.phase not in (QUEUED, RUNNING):
                return False
            held.is_replaced = leave_thread and held.phase == RUNNING
            held.phase = REPORTING if held.cancelled is None else GONE
            if held.phase == GONE:
                del self._held[held.assignment_id]
            self.busy_count -= 1
            self.changed.notify_all()
            return held.phase == REPORTING

    def forget(self, assignment_id: Any) -> None:
        """Its report is acknowledged."""
        with self.changed:
            held = self._held.get(assignment_id)
            if held is not None and held.phase == REPORTING:
                held.phase = GONE
                del self._held[assignment_id]

    def cancel(self, assignment_ids: Iterable[Any]) -> None:
        """The master gave these away or cancelled them: queued ones go now, running ones are asked to end."""
        for assignment_id in assignment_ids:
            with self.changed:
                held = self._held.get(assignment_id)
                if held is None or held.phase == REPORTING or held.cancelled is not None:
                    continue
                held.cancelled = time.monotonic()
                if held.phase == QUEUED:
                    self.settle(held)
            log.info("cancel %s", held)

    def room(self) -> int:
        return max(0, self.slots - self.busy_count)

    def busy(self) -> list[Held]:
        with self.changed:
            return [held for held in self._held.values() if held.phase in (QUEUED, RUNNING)]

    def as_holding(self) -> list[dict[str, Any]]:
        """holding[] of a beat."""
        with self.changed:
            everything = list(self._held.values())
        entries = []
        for held in everything:
            entry: dict[str, Any] = {
                "assignment_id": held.assignment_id,
                "lease_id": held.lease_id,
                "phase": held.phase,
            }
            if held.progress is not None and held.phase == RUNNING:
                entry.update(progress=held.progress, message=held.message)
            if held.phase != GONE:
                entries.append(entry)
        return entries


# ---- reports ----


class Reporter:
    """How does the end of a task reach the master? Through two threads: one journals, one sends.

    They are two so that a result is on disk at once even while a send hangs, and one batch is synced while another is
    on its way."""

    ENVELOPE_BYTES = 1024
    REPLACED = ("result_too_large", "report_refused")

    def __init__(self, spool: Spool, holding: Holding, client: MasterClient, device_id: str, boot_id: str) -> None:
        self.spool, self.holding, self.client = spool, holding, client
        self.max_body_bytes = 8 * 1024 * 1024
        self._envelope = {"device_id": device_id, "boot_id": boot_id}
        self._outbox: queue.SimpleQueue[Union[Report, list[Report]]] = queue.SimpleQueue()
        self._ready = threading.Condition()
        self._starts: list[Held] = []
        self._unwritten = self._unwritten_bytes = 0
        self._was_full = False
        replayed = spool.pending()
        self._replayed_left = len(replayed)
        for report in replayed:
            holding.add_reported(report)
        if replayed:
            log.info("spool replayed reports=%d", len(replayed))

    def put(self, content: dict[str, Any]) -> None:
        """Report the end of a task; called by whoever settled it."""
        payload = self._encoded(content)
        self._post(Report(content["assignment_id"], content["lease_id"], payload, len(payload)))

    def _post(self, item: Union[Report, list[Report]]) -> None:
        with self._ready:
            self._unwritten += 1
            self._unwritten_bytes += item.size if isinstance(item, Report) else 0
        self._outbox.put(item)

    def put_start(self, held: Held) -> None:
        """Report that a task runs. It is cheap to lose: the heartbeat says it, too."""
        with self._ready:
            self._starts.append(held)
            self._ready.notify_all()

    def _encoded(self, content: dict[str, Any]) -> bytes:
        try:
            payload = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return self._encoded(self._failed(content, "report_refused", f"the result is not JSON: {error}"))
        if len(payload) > self.max_body_bytes - self.ENVELOPE_BYTES:
            what = f"the report has {len(payload)} bytes, the master takes {self.max_body_bytes}"
            return self._encoded(self._failed(content, "result_too_large", what))
        return payload

    @staticmethod
    def _failed(content: dict[str, Any], error_type: str, message: str) -> dict[str, Any]:
        kept: dict[str, Any] = {
            name: content[name] for name in ("assignment_id", "lease_id", "duration_seconds") if name in content
        }
        message = message.encode("utf-8", "replace").decode()[:1000]
        return {**kept, "outcome": "failed", "error_type": error_type, "error_message": message, "retry": False}

    # -- the journal's thread --

    def journal(self) -> None:
        """Wait for news, then make all there is durable with one sync and hand it to the sender."""
        try:
            news = [self._outbox.get(timeout=None if self.spool.is_writable else 2.0)]
        except queue.Empty:
            news = []  # the disk may have room again
        with contextlib.suppress(queue.Empty):
            while len(news) < 1000:
                news.append(self._outbox.get_nowait())
        reports = [item for item in news if isinstance(item, Report)]
        self.spool.write(reports, [report for item in news if isinstance(item, list) for report in item])
        with self._ready:
            self._unwritten -= len(news)
            self._unwritten_bytes -= sum(report.size for report in reports)
            self._ready.notify_all()
        if self._is_full() != self._was_full:
            self._was_full = not self._was_full
            log.warning(
                "spool %s", "full: no more pulls until the master takes reports" if self._was_full else "has room"
            )

    # -- the sender's thread --

    def send(self) -> None:
        """Wait for something to report, then send one batch."""
        with self._ready:
            while not self._starts and self.spool.is_empty:
                self._ready.wait()
            starts, self._starts = self._starts[:REPORTS_PER_REQUEST], self._starts[REPORTS_PER_REQUEST:]
        batch = [self._start_report(held) for held in starts if held.phase == RUNNING]
        batch += self.spool.oldest(REPORTS_PER_REQUEST - len(batch), self.max_body_bytes - self.ENVELOPE_BYTES)
        while self.spool.lost:
            self.holding.forget(self.spool.lost.pop().assignment_id)
        try:
            if batch:
                self._deliver(batch)
        except Exception:
            with self._ready:
                self._starts += starts
            raise

    def _start_report(self, held: Held) -> Report:
        content = {"assignment_id": held.assignment_id, "lease_id": held.lease_id, "outcome": "running"}
        payload = json.dumps(content).encode()
        return Report(held.assignment_id, held.lease_id, payload, len(payload), is_start=True)

    def _deliver(self, batch: list[Report]) -> None:
        """Send; if the master refuses the request as a whole, halve it until the bad entry stands alone."""
        head = json.dumps(self._envelope, separators=(",", ":"))[:-1].encode()
        body = b'%s,"reports":[%s]}' % (head, b",".join(report.payload or b"" for report in batch))
        try:
            reply = self.client.post("/tasks/report", body, REPORT_SECONDS)
        except Refused as refused:
            if refused.status not in (400, 413, 422):
                raise
            if len(batch) > 1:
                self._deliver(batch[: len(batch) // 2])
                self._deliver(batch[len(batch) // 2 :])
            else:
                self._refused(batch[0], refused.detail, is_large=refused.status == 413)
                self._acknowledged(batch)
            return
        answers = reply.get("reports")
        if not isinstance(answers, list) or len(answers) != len(batch):
            raise Unreachable("answered a report without one outcome for each entry", was_broken=True)
        for report, answer in zip(batch, answers):
            self._judge(report, answer if isinstance(answer, dict) else {})
        self._acknowledged(batch)

    def _judge(self, report: Report, answer: dict[str, Any]) -> None:
        outcome, detail = answer.get("outcome"), answer.get("detail") or ""
        if report.is_start:
            if outcome in ("gone", "stale"):
                self.holding.cancel([report.assignment_id])
        elif outcome in ("gone", "stale"):
            log.warning("report %s assignment=%s %s", outcome, report.assignment_id, detail)
        elif outcome not in ("accepted", "duplicate"):
            self._refused(report, f"{outcome}: {detail}", is_large=False)

    def _refused(self, report: Report, detail: str, *, is_large: bool) -> None:
        """The master will never take this entry: say failed in its place, once; then leave it to a person."""
        if report.is_start:
            return
        log.error("report refused assignment=%s: %s", report.assignment_id, detail)
        content = json.loads(report.payload or b"{}")
        if content.get("outcome") == "released" or content.get("error_type") in self.REPLACED:
            self.spool.set_aside(f"{report.segment}-{report.offset}.refused", report.payload or b"")
            return
        message = "the master finds the report too large" if is_large else f"the master refused the report: {detail}"
        self.put(self._failed(content, self.REPLACED[0 if is_large else 1], message))

    def _acknowledged(self, batch: list[Report]) -> None:
        """Off the list. A replacement is in the outbox already, so that the disk never lacks both."""
        settled = [report for report in batch if not report.is_start]
        self.spool.remove(settled)
        with self._ready:
            self._replayed_left -= sum(report.is_replayed for report in settled)
        for report in settled:
            self.holding.forget(report.assignment_id)
        if settled:
            self._post(settled)

    # -- what others ask --

    @property
    def is_replaying(self) -> bool:
        """Reports of an earlier process go first, before any pull."""
        return self._replayed_left > 0 and not self.spool.is_empty

    @property
    def has_room(self) -> bool:
        """Whether the device may take more tasks, whose reports will need a place."""
        return self.spool.is_writable and not self._is_full()

    def _is_full(self) -> bool:
        return self.spool.pending_bytes + self._unwritten_bytes >= self.spool.max_bytes

    def is_flushed(self, *, to_disk_only: bool = False) -> bool:
        return self._unwritten == 0 and (to_disk_only or self.spool.is_empty)


# ---- the machine ----


class Machine:
    """How busy is this machine? Percent figures from psutil, or from the system itself; None where nobody says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cpu_before = self._cpu_times()
        self.system_info = {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "hostname": socket.gethostname(),
            "worker_version": VERSION,
        }

    def usage(self) -> dict[str, float]:
        figures = {"cpu_usage": self._cpu(), "memory_usage": self._memory(), "disk_usage": self._disk()}
        return {name: round(min(100.0, max(0.0, f)), 1) for name, f in figures.items() if f is not None}

    @staticmethod
    def _cpu_times() -> Optional[tuple[float, float]]:
        """Idle and total time since boot."""
        try:
            if psutil is not None:
                spent = psutil.cpu_times()
                return spent.idle + getattr(spent, "iowait", 0.0), sum(spent[:8])
            times = [float(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            return times[3] + times[4], sum(times)
        except (OSError, ValueError, IndexError):
            return None

    def _cpu(self) -> Optional[float]:
        """Since the last beat."""
        before, now = self._cpu_before, self._cpu_times()
        self._cpu_before = now
        if before is not None and now is not None and now[1] > before[1]:
            return 100 * (1 - (now[0] - before[0]) / (now[1] - before[1]))
        return 100 * os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None

    def _disk(self) -> Optional[float]:
        try:
            disk = shutil.disk_usage(self._folder)
            return 100 * disk.used / disk.total
        except (OSError, ZeroDivisionError):
            return None

    @staticmethod
    def _memory() -> Optional[float]:
        if psutil is not None:
            return float(psutil.virtual_memory().percent)
        try:
            lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
            kilobytes = {words[0]: float(words[1]) for words in lines if len(words) > 1}
            return 100 * (1 - kilobytes["MemAvailable:"] / kilobytes["MemTotal:"])
        except (OSError, ValueError, KeyError):
            return None


# ---- the worker ----


class Bell:
    """How is the main thread woken from anywhere, a signal handler included? By a byte in a socket, without a lock."""

    def __init__(self) -> None:
        self._ear, self._rope = socket.socketpair()
        self._ear.setblocking(False)
        self._rope.setblocking(False)

    def fileno(self) -> int:
        return self._rope.fileno()

    def ring(self) -> None:
        with contextlib.suppress(OSError):
            self._rope.send(b"!")

    def wait(self, seconds: float) -> None:
        if select.select([self._ear], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self._ear.recv(4096)


class Worker:
    """Which threads run on a device, and when do they stop? The main thread watches; all others may be left behind."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(16)
        self.executors = task_executor.load_executors(settings.executors)
        self.link = Link(settings.master_url)
        self.clients = {name: MasterClient(self.link, settings) for name in ("pull", "beat", "report", "leave")}
        self.holding = Holding(settings.concurrent_tasks)
        self.spool = Spool(folder, settings.spool_max_bytes)
        self.reporter = Reporter(self.spool, self.holding, self.clients["report"], settings.device_id, self.boot_id)
        self.machine = Machine(folder)
        self.work: queue.SimpleQueue[Held] = queue.SimpleQueue()
        self.bell = Bell()
        self.registered = threading.Event()
        self.stopping = threading.Event()  # no new work
        self.end_code: Optional[ExitCode] = None
        self.signal_count, self.signal_at = 0, 0.0
        self.heartbeat_seconds = float(settings.heartbeat_interval)
        self.drain_seconds = float(settings.drain_seconds)
        self.is_monitored = settings.enable_monitoring
        self.is_drained_by_master = False
        self.next_beat = 0.0
        self.beating = threading.Lock()  # held during a beat, and for good by the last one
        self.beat_seq = itertools.count(1)  # one for two threads: the last beat must not share its number
        self.pull_seq = self.pull_ack = 0
        self.empty_pause = 0.0
        self.open_limit = 0  # of the pull that is on its way
        self.is_stop_told = False

    # -- the main thread --

    def run(self) -> ExitCode:
        """Work until a signal, or until the master refuses this process; answers the exit code."""
        log.info("worker started device=%s master=%s slots=%d types=%s", self.settings.device_id,
                 self.settings.master_url, self.holding.slots, ",".join(sorted(self.executors)))  # fmt: skip
        self._start("journal", self._loop, self.reporter.journal, lambda: True)
        for name, step in (("report", self._report), ("beat", self._beat), ("pull", self._pull)):
            self._start(name, self._loop, step, lambda: self.end_code is None)
        for _ in range(self.holding.slots):
            self._start("slot", self._slot)
        while self.end_code is None and not self.stopping.is_set():
            self._tick(BUSY_TICK_SECONDS if self.holding.busy_count else IDLE_TICK_SECONDS)
            if self.signal_count:
                self.stopping.set()
        return self._stop()

    def _start(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()

    def _tick(self, seconds: float) -> None:
        """Wait that long or until the bell rings, and see what time did."""
        self.bell.wait(seconds)
        try:
            now = time.monotonic()
            for client in self.clients.values():
                client.cut_if_overdue(now)
            if self.stopping.is_set() and self.open_limit:
                self.clients["pull"].cut()
            for held in self.holding.busy():
                self._watch(held, now)
        except Exception:
            log.exception("the watching thread goes on")

    def _watch(self, held: Held, now: float) -> None:
        """What time does to a task that is here."""
        timeout = number(held.task.get("execution_timeout_seconds"), self.settings.task_timeout, 0.01, 1e9)
        ran = now - held.started
        if held.phase == QUEUED:
            self._hand_back_if_it_may_not_start(held)
        elif held.cancelled is not None and now - held.cancelled > CANCEL_GRACE_SECONDS:
            self._leave_behind(held, "was cancelled")
        elif ran > timeout:
            message = f"ran longer than {timeout:g} s"
            self._leave_behind(held, message, error_type="timeout", error_message=message, duration_seconds=ran)
        elif ran >= START_REPORT_SECONDS and not held.is_start_told and held.cancelled is None:
            held.is_start_told = True
            self.reporter.put_start(held)

    def _leave_behind(self, held: Held, why: str, **failed: Any) -> None:
        """Give the slot of a task that does not end to a new thread."""
        is_reported = self.holding.settle(held, leave_thread=True)
        if held.is_replaced:
            log.warning("left behind %s: it %s and its thread does not end; a new thread has its slot", held, why)
            self._start("slot", self._slot)
        if is_reported and failed:
            self._report_end(held, {"outcome": "failed", **failed})

    def _hand_back_if_it_may_not_start(self, held: Held) -> None:
        if self.stopping.is_set():
            self._hand_back(held, "the device stops")
        elif held.is_too_late():
            self._hand_back(held, "not started in time")

    def _hand_back(self, held: Held, reason: str) -> None:
        if self.holding.settle(held):
            log.info("released %s reason=%s", held, reason)
            self._report_end(held, {"outcome": "released", "reason": reason})

    def _report_end(self, held: Held, content: dict[str, Any]) -> None:
        self.reporter.put({"assignment_id": held.assignment_id, "lease_id": held.lease_id, **content})

    def end(self, code: ExitCode, sentence: str) -> None:
        """The master refuses this process for good."""
        if self.end_code is None:
            log.error("%s", sentence)
            self.end_code = code
            self.bell.ring()

    def on_signal(self, *_: Any) -> None:
        """It must not lock, log or wait: the main thread may be anywhere. A Ctrl-C passed on counts once."""
        now = time.monotonic()
        if self.signal_count and now - self.signal_at >= SECOND_SIGNAL_SECONDS:
            os._exit(130)
        self.signal_count += 1
        self.signal_at = self.signal_at or now

    def stop_with_stdin(self) -> None:
        """The parent holds the other end of stdin; its end is the parent's end."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            while sys.stdin.buffer.read(4096):
                pass
        self.stopping.set()
        self.bell.ring()

    # -- stopping --

    def _stop(self) -> ExitCode:
        self.stopping.set()
        self.link.hurry()
        with self.holding.changed:
            self.holding.changed.notify_all()
        if self.end_code != ExitCode.CONFLICT:  # another process has the tasks now
            self._drain()
        self._wait(lambda: self.reporter.is_flushed(to_disk_only=True), FLUSH_SECONDS)
        if self.end_code is None and self.registered.is_set():
            self._wait(self.reporter.is_flushed, FLUSH_SECONDS)
            self._leave()
        if self.reporter.is_flushed():
            self.spool.close()
        log.info("worker stopped device=%s spooled=%d", self.settings.device_id, len(self.spool.pending()))
        return ExitCode.OK if self.end_code is None else self.end_code

    def _drain(self) -> None:
        """Let running tasks finish, and hand back what does not; `_watch` hands back what has not begun."""
        log.info("drain busy=%d seconds=%g", self.holding.busy_count, self.drain_seconds)
        self._wait(lambda: self.holding.busy_count == 0, self.drain_seconds)
        for held in self.holding.busy():
            self._hand_back(held, "the device stops")

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until and self.end_code != ExitCode.CONFLICT:
            self._tick(0.02)

    def _leave(self) -> None:
        self.beating.acquire(timeout=LEAVE_SECONDS)
        try:
            self.clients["leave"].post(self._path("heartbeat"), self._beat_body(leaving=True), LEAVE_SECONDS)
        except (Unreachable, Busy, Refused) as error:
            log.warning("the master was not told that this device leaves: %s", error)

    # -- every other thread --

    def _loop(self, step: Callable[[], None], goes_on: Callable[[], bool]) -> None:
        """Call `step` again and again; what goes wrong is judged here, for all threads."""
        while goes_on():
            started = time.monotonic()
            try:
                step()
            except Unreachable as error:
                if not error.was_cut:
                    self.link.failed(started, error)
            except Busy as error:
                log.warning("%s", error)
                self._pause(error.seconds * random.uniform(1, 1.5))
            except Refused as error:
                self._refused(error)
            except Exception:
                log.exception("the %s thread goes on", threading.current_thread().name)
                self._pause(random.uniform(0.5, 1.5))

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            time.sleep(0.2)

    def _refused(self, error: Refused) -> None:
        me = self.settings.device_id
        if error.code == "unknown_device" and self.registered.is_set():
            log.warning("the master does not know device=%s; it registers again", me)
            self.registered.clear()
        elif error.code == "superseded":
            self.end(
                ExitCode.CONFLICT, f"another process runs as device {me}, so this one ends: one device_id, one worker"
            )
        elif error.code == "conflict":
            detail = error.detail or f"several processes run as device {me}; stop all but one, then set it active"
            self.end(ExitCode.CONFLICT, f"the master holds device {me} in conflict: {detail}")
        elif error.status in (401, 403):
            advice = "write the master's api_key into the config file or AF_API_KEY"
            self.end(ExitCode.REFUSED, f"the master refuses this device's key ({error.status}): {advice}")
        elif error.status == 426:
            self.end(ExitCode.REFUSED, error.detail or "the master needs a newer worker.py: copy its version here")
        else:
            log.error("the master refused a call: %s", error)
            self._pause(random.uniform(5, 15))

    def _path(self, what: str) -> str:
        return f"/devices/{quote(self.settings.device_id, safe='')}/{what}"

    def _report(self) -> None:
        if self.registered.wait(1.0):
            self.reporter.send()

    # -- beats --

    def _beat(self) -> None:
        """Wait for the next beat's moment, and beat."""
        if not self.registered.wait(1.0):
            return
        left = self.next_beat - time.monotonic()
        if left > 0:
            time.sleep(min(left, 1.0))
            return
        self.link.wait_turn()  # before holding[] is written down, or it would be stale
        with self.beating:
            reply = self.clients["beat"].post(self._path("heartbeat"), self._beat_body(), BEAT_SECONDS)
        self._follow(reply)
        seconds = number(reply.get("next_seconds"), self.heartbeat_seconds, 0.05, 3600) * random.uniform(0.9, 1)
        self.next_beat = max(self.next_beat + seconds, time.monotonic())

    def _beat_body(self, *, leaving: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {"boot_id": self.boot_id, "seq": next(self.beat_seq)}
        body["holding"] = self.holding.as_holding()
        body.update(active_tasks=self.holding.busy_count, system_info=self.machine.system_info)
        if self.is_monitored:
            body.update(self.machine.usage())
        return {**body, "leaving": True} if leaving else body

    def _follow(self, reply: dict[str, Any]) -> None:
        """What the replies to beats and pulls say about tasks and draining."""
        cancel = reply.get("cancel")
        self.holding.cancel(cancel if isinstance(cancel, list) else ())
        if bool(reply.get("drain")) != self.is_drained_by_master:
            self.is_drained_by_master = not self.is_drained_by_master
            log.info("the master says %s", "drain: no new tasks" if self.is_drained_by_master else "go on")

    # -- registering and pulling --

    def _pull(self) -> None:
        """One step: register if need be, wait for the replay or for a slot, then one pull."""
        self.link.wait_turn()
        if not self.registered.is_set():
            self._register()
        elif self.reporter.is_replaying and not self.stopping.is_set():
            self.stopping.wait(0.05)
        else:
            self._pull_once(self._limit() or self._wait_for_a_slot())

    def _register(self) -> None:
        if self.stopping.is_set():
            self._pause(0)
            return
        settings = self.settings
        body = {
            "device_id": settings.device_id,
            "device_name": settings.device_name,
            "device_type": f"{platform.system()} {platform.machine()}".strip(),
            "boot_id": self.boot_id,
            "protocol": PROTOCOL,
            "version": VERSION,
            "task_types": sorted(self.executors),
            "tags": sorted({*settings.tags, *task_executor.device_tags(self.executors)}),
            "weight": settings.weight,
            "max_concurrent_tasks": self.holding.slots,
            "holding": self.holding.as_holding(),
        }
        reply = self.clients["pull"].post("/devices/register", body, REGISTER_SECONDS)
        said = reply.get("settings")
        self._adopt(said if isinstance(said, dict) else {})
        cancel = reply.get("cancel")
        self.holding.cancel(cancel if isinstance(cancel, list) else ())
        log.info("registered device=%s status=%s", settings.device_id, reply.get("status"))
        self.registered.set()

    def _adopt(self, said: dict[str, Any]) -> None:
        """What the master wants of its devices, as far as this device's own settings allow."""
        mine = self.settings
        self.heartbeat_seconds = number(said.get("heartbeat_interval_seconds"), mine.heartbeat_interval, 0.05, 3600)
        self.drain_seconds = number(said.get("drain_seconds"), mine.drain_seconds, 0, mine.drain_seconds)
        spread = number(said.get("reconnect_spread_seconds"), mine.reconnect_seconds, 0, mine.reconnect_seconds)
        self.link.spread_seconds = spread
        self.reporter.max_body_bytes = int(number(said.get("max_body_bytes"), 8388608, 4096, 2**30))
        self.is_monitored = mine.enable_monitoring and said.get("enable_monitoring") is not False
        first = number(said.get("next_seconds"), self.heartbeat_seconds, 0.05, 3600)
        self.next_beat = time.monotonic() + first * random.uniform(0.5, 1)

    def _limit(self) -> int:
        """How many tasks to ask for."""
        if self.stopping.is_set() or self.is_drained_by_master or not self.reporter.has_room:
            return 0
        return self.holding.room()

    def _wait_for_a_slot(self) -> int:
        """The limit, as soon as it is not 0, or 0 after about 2 s; at once where a stop is news to the master."""
        if self.stopping.is_set() and not self.is_stop_told:
            self.is_stop_told = True
            return 0
        until = time.monotonic() + random.uniform(*FULL_WAIT_SECONDS)
        with self.holding.changed:
            while (limit := self._limit()) == 0 and (left := until - time.monotonic()) > 0:
                self.holding.changed.wait(left)
        return limit

    def _pull_once(self, limit: int) -> None:
        self.pull_seq += 1
        wait = self.settings.pull_wait_seconds if limit else 0
        query = {"device_id": self.settings.device_id, "boot_id": self.boot_id, "limit": limit, "wait": f"{wait:g}",
                 "seq": self.pull_seq, "ack": self.pull_ack}  # fmt: skip
        started = time.monotonic()
        self.open_limit = limit
        try:
            reply = self.clients["pull"].get("/tasks/pull", query, wait + PULL_EXTRA_SECONDS)
        finally:
            self.open_limit = 0
        delivered = boot_clock()
        tasks = reply.get("tasks")
        if not isinstance(tasks, list) or not all(self._is_task(task) for task in tasks):
            raise Unreachable("answered a pull without a list of tasks", was_broken=True)
        added = self.holding.add(tasks, delivered)
        self.pull_ack = self.pull_seq
        for held in added:
            self.work.put(held)
        if added:
            self.bell.ring()
        self._follow(reply)
        self._pause_if_useless(limit, wait, reply, time.monotonic() - started)

    @staticmethod
    def _is_task(task: Any) -> bool:
        return isinstance(task, dict) and isinstance(task.get("lease_id"), str) and bool(task.get("assignment_id"))

    def _pause_if_useless(self, limit: int, wait: float, reply: dict[str, Any], took: float) -> None:
        """A master that cannot hold a pull answers at once and says when to come again. The wait resets on work."""
        if reply["tasks"] or reply.get("cancel") or not limit or took >= min(wait, 1.0) / 2 > 0:
            self.empty_pause = 0.0
            return
        self.empty_pause = min(2.0, max(0.05, 2 * self.empty_pause))
        self.stopping.wait(random.uniform(0.5, 1) * number(reply.get("next_seconds"), self.empty_pause, 0.05, 60))

    # -- slots --

    def _slot(self) -> None:
        """Run tasks one after another, until this thread was left behind."""
        while True:
            held = self.work.get()
            self._hand_back_if_it_may_not_start(held)
            if self.holding.begin(held):
                self._run(held)
            if held.is_replaced:
                return

    def _run(self, held: Held) -> None:
        log.debug("start %s", held)
        executor = self.executors.get(str(held.task.get("task_type")))
        if executor is None:
            message = f"device {self.settings.device_id} has no executor for {held.task.get('task_type')}"
            outcome = task_executor.Outcome("failed", error_message=message, error_type="no_executor")
        else:
            outcome = task_executor.run(
                executor, held.task, is_cancelled=held.is_cancelled, report_progress=held.note_progress
            )
        if not self.holding.settle(held):
            log.info("dropped %s: cancelled, or reported before", held)
            return
        self.reporter.put(outcome.as_report(held.assignment_id, held.lease_id))
        # A line for each of thousands of short tasks a second would cost more than the tasks.
        is_notable = outcome.outcome != "completed" or outcome.duration_seconds >= START_REPORT_SECONDS
        log.log(logging.INFO if is_notable else logging.DEBUG, "%s %s seconds=%.3f %s", outcome.outcome, held,
                outcome.duration_seconds, outcome.error_message or "")  # fmt: skip


def take_folder(settings: Settings) -> Path:
    """The folder of this device's state, locked for the life of this process; exits with 2 or 3 if that cannot be."""
    folder = Path(settings.state_folder) / settings.device_id
    try:
        if not settings.device_id.strip("."):
            raise OSError(0, "device_id is no name for a folder")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        stop_with(SettingsError("state_folder", str(folder), None, f"cannot be used ({error.strerror}); write another"))
    try:
        lock_file(descriptor)
    except OSError:
        log.error("device %s runs on this machine already (%s is locked); stop it, or start with another --device-id",
                  settings.device_id, folder)  # fmt: skip
        sys.exit(ExitCode.CONFLICT)
    return folder  # the descriptor stays open on purpose: closing it would give the lock away


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a worker until it is told to stop; answers the exit code."""
    parser = argparse.ArgumentParser(prog="worker.py", description="Take tasks from the master, run them, report them.")
    parser.add_argument("--stop-with-stdin", action="store_true", help="stop as at SIGTERM when stdin ends")
    settings, arguments = from_arguments("worker", argv, parser=parser)
    configure_logging(settings)
    task_executor.install_capture()
    folder = take_folder(settings)
    try:
        worker = Worker(settings, folder)
    except OSError as error:
        stop_with(SettingsError("state_folder", str(folder), None, f"cannot be used ({error.strerror}); write another"))
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(worker.bell.fileno(), warn_on_full_buffer=False)
        for number_of_signal in STOP_SIGNALS:
            signal.signal(number_of_signal, worker.on_signal)
    if arguments.stop_with_stdin:
        threading.Thread(target=worker.stop_with_stdin, name="stdin", daemon=True).start()
    return int(worker.run())


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    # Not sys.exit: it would wait for threads that a task left behind.
    os._exit(code)
