"""How does a write become durable? The one writer, on a real file in a temporary folder."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from peewee import SqliteDatabase

import writer as writer_module
from writer import StorageFailing, Writer, WriterBusy, WriterStopped

PATIENCE = 60.0


class Desk:
    """A writer with one table, and what a test needs to hold it up and to look behind it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path = folder / "desk.db"
        self.writer = Writer(SqliteDatabase(str(self.path), pragmas=(("journal_mode", "wal"),)), **options)
        self.commits: list[str] = []
        self.writer.start()
        self.writer.call(lambda: self.execute("CREATE TABLE line (n INTEGER PRIMARY KEY, text TEXT)"))
        self.writer.call(self._trace_commits)

    def _trace_commits(self) -> None:
        assert self.writer.connection is not None
        self.writer.connection.set_trace_callback(self._trace)

    def _trace(self, statement: str) -> None:
        if statement == "COMMIT":
            self.commits.append(statement)

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        assert self.writer.connection is not None
        return self.writer.connection.execute(sql, values)

    def insert(self, n: int, text: str = "") -> Callable[[], int]:
        """A job that writes one row; its result is the row's number."""

        def job() -> int:
            self.execute("INSERT INTO line VALUES (?, ?)", n, text)
            return n

        return job

    def hold(self) -> threading.Event:
        """Keeps the writer busy until the event is set, so that what comes now waits together."""
        entered, leave = threading.Event(), threading.Event()

        def job() -> None:
            entered.set()
            assert leave.wait(PATIENCE)

        self.writer.post(job)
        assert entered.wait(PATIENCE)
        return leave

    def rows(self) -> list[int]:
        """What somebody else sees: a connection of its own."""
        connection = sqlite3.connect(self.path)
        found = [n for (n,) in connection.execute("SELECT n FROM line ORDER BY n")]
        connection.close()
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, max_queue_length=1000)
    yield desk
    assert desk.writer.stop(PATIENCE)


def results(futures: list[Future[Any]]) -> list[Any]:
    """What each job returned, or the kind of what it raised."""
    return [type(error) if (error := future.exception(PATIENCE)) else future.result() for future in futures]


def test_all_writes_that_wait_share_one_commit(desk: Desk) -> None:
    leave = desk.hold()
    futures = [desk.writer.post(desk.insert(n)) for n in range(200)]
    desk.commits.clear()
    leave.set()
    assert results(futures) == list(range(200))
    assert len(desk.commits) == 2  # the one that held them up, and theirs
    assert desk.rows() == list(range(200))


def test_a_group_has_a_limit_so_that_the_first_need_not_wait_for_all(desk: Desk) -> None:
    leave = desk.hold()
    futures = [desk.writer.post(desk.insert(n)) for n in range(2 * writer_module.GROUP_LIMIT + 1)]
    desk.commits.clear()
    leave.set()
    assert results(futures) == list(range(2 * writer_module.GROUP_LIMIT + 1))
    assert len(desk.commits) == 4


def test_a_lone_write_waits_for_nobody(desk: Desk) -> None:
    desk.commits.clear()
    assert desk.writer.call(desk.insert(1)) == 1
    assert len(desk.commits) == 1 and desk.rows() == [1]


def test_a_result_is_released_only_when_the_row_is_there_for_everybody(desk: Desk) -> None:
    seen: list[list[int]] = []

    def job() -> None:
        desk.insert(7)()
        seen.append(desk.rows())
        desk.writer.when_committed(lambda: seen.append(desk.rows()))

    desk.writer.call(job)
    assert [*seen, desk.rows()] == [[], [7], [7]]


def test_a_job_that_raises_undoes_itself_alone(desk: Desk) -> None:
    def half_done() -> None:
        desk.insert(100)()
        raise KeyError("of the job itself")

    leave = desk.hold()
    futures = [desk.writer.post(job) for job in (desk.insert(1), half_done, desk.insert(1), desk.insert(2))]
    leave.set()
    assert results(futures) == [1, KeyError, sqlite3.IntegrityError, 2]
    assert desk.rows() == [1, 2]


def test_what_waits_for_a_commit_or_a_rollback_hears_of_its_own_only(desk: Desk) -> None:
    heard: list[str] = []

    def job(name: str, fails: bool) -> None:
        desk.writer.when_committed(lambda: heard.append(f"{name} committed"))
        desk.writer.when_undone(lambda: heard.append(f"{name} undone"))
        if fails:
            raise ValueError(name)

    leave = desk.hold()
    futures = [desk.writer.post(lambda n=n, f=f: job(n, f)) for n, f in (("a", False), ("b", True), ("c", False))]
    leave.set()
    assert results(futures) == [None, ValueError, None]
    assert heard == ["b undone", "a committed", "c committed"]


def test_a_callback_that_raises_stops_neither_its_job_nor_the_others(desk: Desk) -> None:
    def job() -> str:
        desk.writer.when_committed(lambda: 1 / 0)
        return "done"

    assert desk.writer.call(job) == "done"
    assert desk.writer.call(desk.insert(1)) == 1


def test_what_runs_before_each_commit_is_part_of_it_and_its_failure_is_its_own(desk: Desk) -> None:
    numbers = iter((10, 1, 11))
    desk.writer.before_commit = lambda: desk.insert(next(numbers))()  # type: ignore[func-returns-value]
    assert desk.writer.call(desk.insert(1)) == 1
    assert desk.writer.call(desk.insert(2)) == 2  # the hook's own row 1 exists already
    assert desk.writer.call(desk.insert(3)) == 3
    assert desk.rows() == [1, 2, 3, 10, 11]


def test_a_full_queue_says_so_at_once_and_loses_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path, max_queue_length=3)
    leave = desk.hold()
    futures = [desk.writer.post(desk.insert(n)) for n in range(3)]
    assert desk.writer.queue_length == 3
    with pytest.raises(WriterBusy):
        desk.writer.post(desk.insert(99))
    leave.set()
    assert results(futures) == [0, 1, 2]
    assert desk.writer.call(desk.insert(4)) == 4  # and it takes writes again
    assert desk.writer.stop(PATIENCE) and desk.rows() == [0, 1, 2, 4]


def test_a_write_that_takes_too_long_is_busy_and_no_error_of_its_own(desk: Desk) -> None:
    leave = desk.hold()
    with pytest.raises(WriterBusy, match="ask for its state"):
        desk.writer.call(desk.insert(1), timeout_seconds=0.01)
    leave.set()
    desk.writer.call(lambda: None)
    assert desk.rows() == [1]


def test_a_full_disk_is_told_undoes_the_write_and_heals(desk: Desk) -> None:
    pages = desk.writer.call(lambda: desk.execute("PRAGMA page_count").fetchone()[0])
    desk.writer.call(lambda: desk.execute(f"PRAGMA max_page_count = {pages + 2}"))
    big = "x" * 100_000
    leave = desk.hold()
    heard: list[str] = []

    def job() -> None:
        desk.writer.when_undone(lambda: heard.append("undone"))
        desk.writer.when_committed(lambda: heard.append("committed"))
        desk.insert(1, big)()

    futures = [desk.writer.post(job), desk.writer.post(desk.insert(2, big))]
    leave.set()
    assert results(futures) == [StorageFailing, StorageFailing]
    assert heard == ["undone"] and desk.rows() == []
    desk.writer.call(lambda: desk.execute("PRAGMA max_page_count = 1000000"))
    assert desk.writer.call(desk.insert(1, big)) == 1 and desk.rows() == [1]


def test_a_transaction_that_sqlite_drops_fails_every_write_of_its_group(desk: Desk) -> None:
    heard: list[str] = []

    def first() -> None:
        desk.insert(1)()
        desk.writer.when_undone(lambda: heard.append("undone"))
        desk.writer.when_committed(lambda: heard.append("committed"))

    def drop() -> None:
        desk.execute("ROLLBACK")  # as SQLite does by itself after some I/O errors
        raise sqlite3.OperationalError("disk I/O error")

    leave = desk.hold()
    futures = [desk.writer.post(job) for job in (first, drop, desk.insert(2))]
    leave.set()
    assert results(futures) == [StorageFailing] * 3
    assert heard == ["undone"] and desk.rows() == []
    assert desk.writer.call(desk.insert(3)) == 3 and desk.rows() == [3]


def test_a_damaged_file_is_not_written_any_more(desk: Desk) -> None:
    told: list[str] = []
    desk.writer.storage.on_damage = lambda: told.append("damaged")

    def reads_nonsense() -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    leave = desk.hold()
    futures = [desk.writer.post(job) for job in (desk.insert(1), reads_nonsense, desk.insert(2))]
    leave.set()
    assert results(futures) == [StorageFailing] * 3
    assert results([desk.writer.post(desk.insert(3))]) == [StorageFailing]
    assert desk.rows() == [] and told == ["damaged"]


class FailingCommit:
    """The writer's own connection, whose next COMMIT meets a full disk."""

    def __init__(self, real: sqlite3.Connection) -> None:
        self._real = real
        self._failures = 1

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql == "COMMIT" and self._failures:
            self._failures -= 1
            raise sqlite3.OperationalError("database or disk is full")
        return self._real.execute(sql, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_commit_that_fails_is_nobodys_success(desk: Desk) -> None:
    assert desk.writer.connection is not None
    desk.writer.connection = FailingCommit(desk.writer.connection)  # type: ignore[assignment]
    heard: list[str] = []

    def job() -> int:
        desk.writer.when_committed(lambda: heard.append("committed"))
        desk.writer.when_undone(lambda: heard.append("undone"))
        return desk.insert(1)()

    assert results([desk.writer.post(job)]) == [StorageFailing]
    assert heard == ["undone"] and desk.rows() == []
    assert desk.writer.call(desk.insert(2)) == 2 and desk.rows() == [2]


def test_stop_finishes_what_is_queued_and_takes_nothing_more(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    leave = desk.hold()
    futures = [desk.writer.post(desk.insert(n)) for n in range(700)]
    stopping = threading.Thread(target=desk.writer.stop, args=(PATIENCE,))
    stopping.start()
    while not desk.writer._stopping:
        stopping.join(0.001)
    with pytest.raises(WriterStopped):
        desk.writer.post(desk.insert(999))
    leave.set()
    stopping.join(PATIENCE)
    assert results(futures) == list(range(700)) and desk.rows() == list(range(700))
    assert not desk.path.with_name("desk.db-wal").exists()
    assert desk.writer.stop(PATIENCE)  # again: no harm


def test_a_write_that_slips_in_behind_the_stop_is_told_and_not_left_waiting(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    leave = desk.hold()
    assert not desk.writer.stop(0.01)
    late = writer_module._Job(desk.insert(1))
    desk.writer._queue.put(late)
    leave.set()
    assert desk.writer.stop(PATIENCE)
    assert results([late.future]) == [WriterStopped] and desk.rows() == []


def test_stop_says_when_the_time_was_not_enough(desk: Desk) -> None:
    leave = desk.hold()
    assert not desk.writer.stop(0.01)
    leave.set()


def test_a_database_that_cannot_be_opened_is_told_to_whoever_starts(tmp_path: Path) -> None:
    writer = Writer(SqliteDatabase(str(tmp_path / "no-such-folder" / "x.db")))
    with pytest.raises(Exception, match="unable to open"):
        writer.start()


def test_only_a_failing_storage_is_called_one(desk: Desk) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        desk.writer.call(lambda: [desk.insert(1)(), desk.insert(1)()])
    with pytest.raises(ZeroDivisionError):
        desk.writer.call(lambda: 1 / 0)


def test_every_one_of_many_threads_gets_its_own_answer(desk: Desk) -> None:
    barrier = threading.Barrier(8)
    answers: dict[int, list[int]] = {}

    def submitter(first: int) -> None:
        barrier.wait(PATIENCE)
        answers[first] = [desk.writer.call(desk.insert(first * 100 + n)) for n in range(25)]

    threads = [threading.Thread(target=submitter, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == {first: [first * 100 + n for n in range(25)] for first in range(8)}
    assert len(desk.rows()) == 200
