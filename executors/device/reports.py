"""How does the end of a task reach the master?"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
from typing import Any, Optional, Union

from executors.device.artifacts import ArtifactFiles
from executors.device.holding import RUNNING, Held, Holding
from executors.device.link import MasterClient, Refused, Unreachable
from executors.device.spool import Report, Spool

log = logging.getLogger("worker")

REPORT_SECONDS = 30.0
REPORTS_PER_REQUEST = 500
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Reporter:
    """How does the end of a task reach the master? Through two threads: one journals, one sends.

    They are two so that a result is on disk at once even while a send hangs, and one batch is synced while another is
    on its way."""

    ENVELOPE_BYTES = 1024
    REPLACED = ("result_too_large", "report_refused")

    def __init__(
        self, spool: Spool, holding: Holding, files: ArtifactFiles, client: MasterClient, device_id: str, boot_id: str
    ) -> None:
        self.spool, self.holding, self.files, self.client = spool, holding, files, client
        self.max_body_bytes = 8 * 1024 * 1024
        self._envelope = {"device_id": device_id, "boot_id": boot_id}
        self._outbox: queue.SimpleQueue[Union[Report, list[Report]]] = queue.SimpleQueue()
        self._ready = threading.Condition()
        self._starts: list[Held] = []
        self._aside: set[Report] = set()  # they go again when their files are at the master
        self.uploads: queue.SimpleQueue[tuple[Report, list[dict[str, Any]]]] = queue.SimpleQueue()
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
            payload = _encode(content).encode()
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
            while not self._starts and self.spool.count <= len(self._aside):
                self._ready.wait()
            starts, self._starts = self._starts[:REPORTS_PER_REQUEST], self._starts[REPORTS_PER_REQUEST:]
        batch = [self._start_report(held) for held in starts if held.phase == RUNNING]
        room = self.max_body_bytes - self.ENVELOPE_BYTES
        batch += self.spool.oldest(REPORTS_PER_REQUEST - len(batch), room, but=self._aside)
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
        settled = [report for report, answer in zip(batch, answers) if self._judge(report, answer)]
        self._acknowledged(settled)

    def _judge(self, report: Report, answer: Any) -> bool:
        """False: it is not settled yet, its files come first."""
        answer = answer if isinstance(answer, dict) else {}
        outcome, detail = answer.get("outcome"), answer.get("detail") or ""
        if outcome == "artifacts_missing":
            self._put_aside(report, answer.get("missing"))
            return False
        if report.is_start:
            if outcome in ("gone", "stale"):
                self.holding.cancel([report.assignment_id])
        elif outcome in ("gone", "stale"):
            log.warning("report %s assignment=%s %s", outcome, report.assignment_id, detail)
        elif outcome not in ("accepted", "duplicate"):
            self._refused(report, f"{outcome}: {detail}", is_large=False)
        return True

    def _put_aside(self, report: Report, missing: Any) -> None:
        """Until its files are at the master; pulls do not wait for it."""
        entries: list[dict[str, Any]] = json.loads(report.payload or b"{}").get("artifacts") or []
        wanted = [entry for entry in entries if isinstance(missing, list) and entry["name"] in missing] or entries
        with self._ready:
            self._aside.add(report)
            self._replayed_left -= report.is_replayed
            report.is_replayed = False
        self.uploads.put((report, wanted))

    def resume(self, report: Report) -> None:
        """Its files were sent, or not: the master says how it stands."""
        with self._ready:
            self._aside.discard(report)
            self._ready.notify_all()

    def replace(self, report: Report, error_type: str, message: str, *, retry: bool) -> None:
        """Its files are lost, or the master never takes them: say failed in its place."""
        content = json.loads(report.payload or b"{}")
        self.put({**self._failed(content, error_type, message), "retry": retry})
        self._acknowledged([report])

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
            self.files.drop_sent(report.assignment_id)
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
        return self.problem is None

    @property
    def problem(self) -> Optional[str]:
        """Why the device takes no tasks, in the heartbeat's word."""
        if not self.spool.is_writable:
            return "spool_unwritable"
        if self._is_full():
            return "spool_full"
        return None if self.files.has_room else "artifacts_full"

    def _is_full(self) -> bool:
        return self.spool.pending_bytes + self._unwritten_bytes >= self.spool.max_bytes

    def is_flushed(self, *, to_disk_only: bool = False) -> bool:
        return self._unwritten == 0 and (to_disk_only or self.spool.is_empty)
