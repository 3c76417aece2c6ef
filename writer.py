"""How does a write become durable? One thread, one connection, one commit for everything that waits.

Requests queue up as jobs. The writer takes all that wait (at most GROUP_LIMIT), runs each in a savepoint of one
`BEGIN IMMEDIATE` transaction, and commits once: a durable commit costs the same for one job and for three hundred.
Only then are results, callbacks and replies released, so nobody hears of a write that a power cut could take back.
When nothing waits, a lone job is committed at once: grouping adds no delay.

A job that raises undoes its own savepoint and nobody else's. When SQLite drops the whole transaction (disk full,
I/O error), every job of the group fails with StorageFailing and nothing of it is kept. What that says of the disk is
kept in `storage`; on a damaged file nothing is written any more.

This file knows nothing of tasks. It must never be handed a job that waits for anything but the database.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeVar

from peewee import SqliteDatabase

from latency import Latency
from storage import Storage, kind_of

log = logging.getLogger("af.writer")
Returned = TypeVar("Returned")

GROUP_LIMIT = 300
CALL_TIMEOUT_SECONDS = 30.0


class WriterBusy(Exception):
    """The queue of waiting writes is full: try again in a moment."""


class StorageFailing(Exception):
    """The database could not take the write (disk full, I/O error, locked, damaged); nothing of it was kept.

    `kind` as in storage.py, where it is known; `retry_after` in seconds."""

    def __init__(self, text: str, retry_after: int = 30, kind: str | None = None) -> None:
        super().__init__(text)
        self.retry_after, self.kind = retry_after, kind


class WriterStopped(Exception):
    """The master is stopping: nothing more is written."""


class _Job:
    """One queued write: what to run, who waits for it, and what to do once it is durable or undone."""

    __slots__ = ("future", "outcome", "run", "when_committed", "when_undone")

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.future: Future[Any] = Future()
        self.outcome: Any = None
        self.when_committed: list[Callable[[], None]] = []
        self.when_undone: list[Callable[[], None]] = []


class Writer:
    """Owns the only connection that writes. `start` and `stop` it; `call` it from any other thread."""

    def __init__(self, database: SqliteDatabase, *, max_queue_length: int = 10_000) -> None:
        self._database = database
        self._queue: queue.Queue[_Job | None] = queue.Queue(max_queue_length)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._current: _Job | None = None
        self._stopping = False
        self.connection: sqlite3.Connection | None = None
        self.before_commit: Callable[[], None] | None = None
        """Runs in a savepoint of its own at the end of every group: dispatch lives here."""
        self.storage = Storage(Path(database.database))
        self.commits = Latency()
        self.committed_jobs = 0

    @property
    def queue_length(self) -> int:
        """How many writes wait, not counting the group in progress."""
        return self._queue.qsize()

    def start(self) -> None:
        """Opens the writing connection in the writer's thread; raises what opening raised."""
        opened: Future[None] = Future()
        self._opened = opened
        self._thread.start()
        opened.result(CALL_TIMEOUT_SECONDS)

    def stop(self, timeout_seconds: float = 10.0) -> bool:
        """Finishes what is queued, checkpoints the WAL and closes; True if that happened within the time."""
        if not self._stopping:
            self._stopping = True
            self._queue.put(None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def post(self, run: Callable[[], Returned]) -> Future[Returned]:
        """Queues a job; its future is done when the job is durable. Raises WriterBusy or WriterStopped."""
        if self._stopping:
            raise WriterStopped("the master is stopping; send this again to the next one")
        job = _Job(run)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise WriterBusy(f"{self._queue.maxsize} writes are waiting; send this again in a moment") from None
        return job.future

    def call(self, run: Callable[[], Returned], timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> Returned:
        """Runs a job and returns its result once it is durable; raises what the job raised, or WriterBusy."""
        try:
            return self.post(run).result(timeout_seconds)
        except FutureTimeout:
            raise WriterBusy(f"the write was not durable within {timeout_seconds:.0f} s; ask for its state") from None

    def when_committed(self, callback: Callable[[], None]) -> None:
        """From inside a job: run this once the job is durable."""
        assert self._current is not None, "only a running job can wait for its commit"
        self._current.when_committed.append(callback)

    def when_undone(self, callback: Callable[[], None]) -> None:
        """From inside a job: run this if the job is rolled back, alone or with its group."""
        assert self._current is not None, "only a running job can wait for its rollback"
        self._current.when_undone.append(callback)

    # -- the writer's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._database.connect(reuse_if_open=True)
            self.connection = self._database.connection()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        stop = False
        while not stop:
            group, stop = self._next_group()
            if group:
                self._write(group)
        self._close()

    def _next_group(self) -> tuple[list[_Job], bool]:
        group: list[_Job] = []
        job = self._queue.get()
        while job is not None:
            group.append(job)
            if len(group) >= GROUP_LIMIT:
                return group, False
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _write(self, group: list[_Job]) -> None:
        assert self.connection is not None
        if self.storage.damage is not None:
            self._undo_group(group, sqlite3.DatabaseError(self.storage.damage))
            return
        hook = _Job(self.before_commit) if self.before_commit is not None else None
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            for job in group:
                self._run_in_savepoint(job)
            if hook is not None:
                self._run_in_savepoint(hook)
                if hook.future.done() and not isinstance(hook.future.exception(), StorageFailing):
                    log.error("what runs before each commit failed", exc_info=hook.future.exception())
            started = time.perf_counter()
            self.connection.execute("COMMIT")
            self.commits.add(time.perf_counter() - started)
            self.committed_jobs += len(group)
        except sqlite3.Error as error:
            self._undo_group([*group, hook] if hook else group, error)
            return
        for job in [hook, *group] if hook else group:
            self._release(job)

    def _run_in_savepoint(self, job: _Job) -> None:
        """Runs one job; its failure undoes it alone. Raises only when the whole transaction is gone."""
        assert self.connection is not None
        execute = self.connection.execute
        self._current = job
        execute("SAVEPOINT job")
        try:
            job.outcome = job.run()
        except Exception as error:
            if not self.connection.in_transaction or kind_of(error) == "damaged":
                raise sqlite3.OperationalError(str(error)) from error
            execute("ROLLBACK TO job")
            execute("RELEASE job")
            self._fail(job, self._as_storage_failure(error))
            return
        finally:
            self._current = None
        execute("RELEASE job")

    def _undo_group(self, group: list[_Job], error: sqlite3.Error) -> None:
        assert self.connection is not None
        if kind_of(error) is None:
            log.error("a group of %d writes was undone: %s", len(group), error)
        if self.connection.in_transaction:
            try:
                self.connection.execute("ROLLBACK")
            except sqlite3.Error as second:
                log.error("the rollback failed too: %s", second)  # the next BEGIN fails, and says so to its jobs
        for job in group:
            if not job.future.done():
                self._fail(job, self._as_storage_failure(error))

    def _as_storage_failure(self, error: BaseException) -> BaseException:
        """A failing disk is the storage's fault (503, try again); anything else is the job's own error."""
        is_ours = isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError)
        if is_ours or not isinstance(error, sqlite3.DatabaseError):
            return error
        retry_after = self.storage.fails(error)
        text = f"the database cannot take writes now ({error}); nothing was changed"
        return StorageFailing(text, retry_after, kind_of(error))

    def _fail(self, job: _Job, error: BaseException) -> None:
        _run_callbacks(job.when_undone)
        job.future.set_exception(error)

    def _release(self, job: _Job) -> None:
        if job.future.done():
            return
        _run_callbacks(job.when_committed)
        job.future.set_result(job.outcome)

    def _close(self) -> None:
        assert self.connection is not None
        try:
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            log.warning("the last checkpoint failed (%s); the next start makes up for it", error)
        self._database.close()
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                self._fail(job, WriterStopped("the master is stopping; send this again to the next one"))


def _run_callbacks(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:
            log.exception("a callback after a commit failed")
