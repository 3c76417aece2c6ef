"""How do a task's files get to the master before its report?

    <state_folder>/<device_id>/artifacts/<assignment_id>/<name>

An executor writes them there. When its task completes they are synced, and only then its report is journaled, so that a
report never names a file that a power cut takes back. The report goes first: only the master knows which of the files
it has, and whether it still wants them. Its answer `artifacts_missing` puts that report aside, its files go up in a
thread of their own, one after another, and then the report goes again: no other report waits for them, and after any
crash or failed upload the same question is asked again. The files go when the report is acknowledged, or when their
task did not complete; what a crash leaves behind goes at the next start.

An upload has 60 s and a second for each 16 KiB, after which it is cut off; a connection that takes nothing for a minute
is given up. After a failed one: rand(0, 2, 4, 8 ... 60 s).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Optional, Union

from executors.device.link import LONGEST_BACKOFF_SECONDS, Busy, MasterClient, Refused, Unreachable
from executors.device.machine import sync_file, sync_folder
from executors.task_executor import sha256_of

if TYPE_CHECKING:
    from executors.device.reports import Reporter
    from executors.device.spool import Report
    from executors.task_executor import Outcome

log = logging.getLogger("worker")

UPLOAD_SECONDS = 60.0
SLOWEST_BYTES_A_SECOND = 16 * 1024
MOST_FILES = 100


class ArtifactFiles:
    """Which files wait for the master, and is there room for more? Any thread may ask."""

    def __init__(self, folder: Path, max_bytes: int, kept: Collection[Any]) -> None:
        """`kept`: the assignments whose reports are still to be sent; all other files are deleted."""
        self._folder = folder / "artifacts"
        self._root = str(self._folder)
        self.max_bytes = max_bytes
        self.largest_bytes = 512 * 1024 * 1024  # until the master says how large a file may be
        self._waiting: dict[Any, int] = {}
        self._lock = threading.Lock()
        names = {self.folder_of(assignment_id).name: assignment_id for assignment_id in kept}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name in names:
                self._waiting[names[path.name]] = sum(file.lstat().st_size for file in path.iterdir())
            else:
                _remove(path)

    def path_of(self, assignment_id: Any) -> str:
        """Where its executor writes; made when it asks for a first file. As text, since a Path costs as much as a short
        task."""
        name = re.sub(r"[^A-Za-z0-9]", "_", str(assignment_id))  # from the network: never a path
        return f"{self._root}{os.sep}{name}"

    def folder_of(self, assignment_id: Any) -> Path:
        return Path(self.path_of(assignment_id))

    def seal(self, assignment_id: Any, outcome: Outcome) -> Outcome:
        """Before the report of a task that ended: its files are on the disk to stay, or gone if it did not complete."""
        if outcome.outcome == "completed":
            if not outcome.artifacts:
                self._drop_strange(assignment_id, outcome)
                return outcome
            reason = self._unfit(outcome.artifacts)
            try:
                if reason is None:
                    self._drop_strange(assignment_id, outcome)
                    if outcome.artifacts:
                        self._sync(assignment_id, outcome.artifacts)
                    return outcome
            except OSError as error:
                outcome = _failed(outcome, "artifact_unwritable", f"a file is not on the disk: {error.strerror}", True)
            else:
                outcome = _failed(outcome, "artifact_refused", reason, False)
        self.drop(assignment_id)
        return outcome

    def _unfit(self, artifacts: list[dict[str, Any]]) -> Optional[str]:
        """Why the master would not take these."""
        if len(artifacts) > MOST_FILES:
            return f"the task wrote {len(artifacts)} files, the master takes {MOST_FILES}: put several into one archive"
        for entry in artifacts:
            if entry["bytes"] > self.largest_bytes:
                return f"{entry['name']} has {entry['bytes']} bytes, the master takes {self.largest_bytes} a file"
        return None

    def _drop_strange(self, assignment_id: Any, outcome: Outcome) -> None:
        """What lies in the folder and is none of the task's files: never sent, so gone, and said."""
        try:
            with os.scandir(self.path_of(assignment_id)) as entries:
                found = [entry.name for entry in entries]
        except FileNotFoundError:
            return  # the usual case: no file was asked for
        except OSError:
            found = []
        folder = self.folder_of(assignment_id)
        names = {entry["name"] for entry in outcome.artifacts}
        strange = sorted(name for name in found if name not in names or not _is_file(folder / name))
        if strange:
            text = f"these are no files that context.artifact() named, and are not sent: {', '.join(strange)[:500]}"
            log.warning("artifacts dropped assignment=%s: %s", assignment_id, text)
            outcome.log_tail += f"{text}\n"
        for name in strange:
            _remove(folder / name)
        outcome.artifacts = [entry for entry in outcome.artifacts if entry["name"] not in strange]
        if not outcome.artifacts:
            _remove(folder)

    def _sync(self, assignment_id: Any, artifacts: list[dict[str, Any]]) -> None:
        folder = self.folder_of(assignment_id)
        for entry in artifacts:
            descriptor = os.open(folder / entry["name"], os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                sync_file(descriptor)
            finally:
                os.close(descriptor)
        for path in (folder, self._folder, self._folder.parent):
            sync_folder(path)
        with self._lock:
            self._waiting[assignment_id] = sum(entry["bytes"] for entry in artifacts)

    def drop(self, assignment_id: Any) -> None:
        """Nobody needs its files any more."""
        with self._lock:
            self._waiting.pop(assignment_id, None)
        _remove(self.folder_of(assignment_id))

    def drop_sent(self, assignment_id: Any) -> None:
        """Its report is acknowledged. Most have no files, and cost no look at the disk."""
        if assignment_id in self._waiting:
            self.drop(assignment_id)

    @property
    def has_room(self) -> bool:
        """Whether the device may take more tasks, whose files will need a place."""
        with self._lock:
            return sum(self._waiting.values()) < self.max_bytes


class Uploader:
    """How do the files get up? One thread; whatever becomes of them, the report goes again and asks."""

    def __init__(
        self, files: ArtifactFiles, reporter: Reporter, client: MasterClient, device_id: str, boot_id: str
    ) -> None:
        self.files, self.reporter, self.client = files, reporter, client
        self._process = {"device_id": device_id, "boot_id": boot_id}
        self._failures = 0

    def send(self) -> None:
        """Wait for a report that lacks files at the master, and send them."""
        report, entries = self.reporter.uploads.get()
        try:
            for entry in entries:
                self._send_one(report, entry)
            self._failures = 0
        except (Unreachable, Busy) as error:
            self._wait(error)
        except Refused as refused:
            if refused.code in ("gone", "stale"):
                pass  # so the report will be told, too, and settle it
            elif refused.status in (404, 409, 413, 422):
                self._give_up(report, "artifact_refused", f"the master refused a file: {refused.detail}", False)
            else:
                raise
        except OSError as error:
            self._give_up(report, "artifact_lost", f"a file cannot be read any more: {error.strerror}", True)
        finally:
            self.reporter.resume(report)

    def _send_one(self, report: Report, entry: dict[str, Any]) -> None:
        path = self.files.folder_of(report.assignment_id) / entry["name"]
        query = {**self._process, "assignment_id": report.assignment_id, "lease_id": report.lease_id}
        query.update(name=entry["name"], sha256=entry["sha256"])
        started = time.monotonic()
        with path.open("rb") as file:
            # requests would send an empty file in chunks.
            content: Any = file if entry["bytes"] else b""
            seconds = UPLOAD_SECONDS + entry["bytes"] / SLOWEST_BYTES_A_SECOND
            try:
                self.client.put("/tasks/artifacts", query, content, seconds)
            except Refused as refused:
                if refused.code != "checksum_wrong" or sha256_of(path) != entry["sha256"]:
                    raise
                raise Unreachable("got other bytes than were sent", was_broken=True) from None
        log.info("artifact sent assignment=%s name=%s bytes=%d seconds=%.1f", report.assignment_id, entry["name"],
                 entry["bytes"], time.monotonic() - started)  # fmt: skip

    def _give_up(self, report: Report, error_type: str, message: str, retry: bool) -> None:
        log.error("artifact given up assignment=%s: %s", report.assignment_id, message)
        self.reporter.replace(report, error_type, message, retry=retry)

    def _wait(self, error: Union[Unreachable, Busy]) -> None:
        """Not the Link's wait: a file that does not get through is no sign that the master is away."""
        self._failures += 1
        seconds = random.uniform(0, min(LONGEST_BACKOFF_SECONDS, 2.0 ** min(self._failures, 10)))
        if isinstance(error, Busy):
            seconds = max(seconds, error.seconds)
        log.warning("artifact not sent: %s; again in %.1f s", error, seconds)
        time.sleep(seconds)


def _is_file(path: Path) -> bool:
    """A link to a file is none: who knows where it leads."""
    return path.is_file() and not path.is_symlink()


def _remove(path: Path) -> None:
    """Whatever it is, and if it can be."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _failed(outcome: Outcome, error_type: str, message: str, retry: bool) -> Outcome:
    return replace(
        outcome, outcome="failed", result=None, new_tasks=[], artifacts=[], error_type=error_type,
        error_message=message, retry=retry,
    )  # fmt: skip
