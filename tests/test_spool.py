"""Does a finished task's report survive whatever happens to the process and the disk? Through real files."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from executors.device import spool as spooling
from executors.device.spool import Report, Spool

MAX_BYTES = 1024 * 1024


def report(number: int, size: int = 20) -> Report:
    content = {"assignment_id": number, "lease_id": f"lease-{number}", "outcome": "completed", "result": "x" * size}
    payload = json.dumps(content).encode()
    return Report(number, f"lease-{number}", payload, len(payload))


def numbers(spool: Spool) -> list[int]:
    return [entry.assignment_id for entry in spool.pending()]


def reopened(folder: Path) -> Spool:
    return Spool(folder, MAX_BYTES)


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "spool").glob("*.spool"))


def acknowledge(spool: Spool, reports: list[Report]) -> None:
    spool.remove(reports)
    spool.write([], reports)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder whose spool was left with the reports 1, 2, 3 in one segment."""
    Spool(tmp_path, MAX_BYTES).write([report(1), report(2), report(3)])
    return tmp_path


def test_reports_come_back_after_a_restart_in_order_with_their_bytes(three: Path) -> None:
    spool = reopened(three)
    assert numbers(spool) == [1, 2, 3]
    assert [entry.payload for entry in spool.oldest(10, MAX_BYTES)] == [report(n).payload for n in (1, 2, 3)]
    assert all(entry.is_replayed and entry.lease_id == f"lease-{entry.assignment_id}" for entry in spool.pending())


def test_a_batch_is_synced_once_and_whole_before_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(spooling, "sync_file", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    Spool(tmp_path, MAX_BYTES).write([report(number) for number in range(100)])
    assert synced == [path.stat().st_size for path in segments(tmp_path)]


def test_a_file_that_is_not_ours_is_left_alone(three: Path) -> None:
    foreign = three / "spool" / "000000000001 (1).spool"
    foreign.write_bytes(b"copied by somebody")
    assert numbers(reopened(three)) == [1, 2, 3]
    assert foreign.exists()


def test_what_was_acknowledged_does_not_come_back(three: Path) -> None:
    spool = reopened(three)
    acknowledge(spool, [spool.pending()[1]])
    assert numbers(spool) == [1, 3]
    assert numbers(reopened(three)) == [1, 3]


def test_an_acknowledgement_that_never_reached_the_disk_only_sends_again(three: Path) -> None:
    spool = reopened(three)
    spool.remove(spool.pending()[:1])
    assert numbers(spool) == [2, 3]
    assert numbers(reopened(three)) == [1, 2, 3]


def test_a_torn_tail_is_set_aside_wherever_it_was_torn(three: Path) -> None:
    (path,) = segments(three)
    whole = path.read_bytes()
    start_of_third = whole.rindex(Spool.MAGIC)
    for length in range(start_of_third, len(whole)):
        path.write_bytes(whole[:length])
        assert numbers(reopened(three)) == [1, 2], f"torn after {length} bytes"
        for aside in (three / "set-aside").iterdir():
            assert aside.read_bytes() == whole[start_of_third:length]
            aside.unlink()


def test_any_one_damaged_byte_costs_at_most_the_report_it_is_in(three: Path) -> None:
    (path,) = segments(three)
    whole = path.read_bytes()
    size = len(whole) // 3
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        assert numbers(reopened(three)) == [n for n in (1, 2, 3) if n != position // size + 1], f"byte {position}"
        assert [aside.unlink() for aside in (three / "set-aside").iterdir()], f"byte {position} was not set aside"


def test_what_is_intact_but_no_report_is_set_aside(three: Path) -> None:
    spool = reopened(three)
    spool.write([Report(4, "x", b"[1,2]", 5)])
    assert numbers(reopened(three)) == [1, 2, 3]
    assert [path.read_bytes() for path in (three / "set-aside").iterdir()] == [b"[1,2]"]


def test_a_segment_goes_when_its_last_report_is_acknowledged_and_not_before(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=4096)  # the smallest: a segment of 4096 bytes
    for number in range(1, 7):
        spool.write([report(number, size=2000)])
    first, second, third = segments(tmp_path)
    entries = spool.pending()
    acknowledge(spool, entries[:1])
    assert first.exists()
    acknowledge(spool, entries[1:2])
    assert not first.exists()
    assert second.exists() and third.exists()
    acknowledge(spool, entries[2:])
    spool.close()
    assert segments(tmp_path) == []


def test_a_new_process_never_writes_where_an_older_one_wrote(three: Path) -> None:
    (old,) = segments(three)
    before = old.read_bytes()
    reopened(three).write([report(4)])
    assert old.read_bytes() == before
    assert numbers(reopened(three)) == [1, 2, 3, 4]


def test_a_long_backlog_is_read_back_from_disk_and_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spool, "MEMORY_BYTES", 500)
    spool = Spool(tmp_path, MAX_BYTES)
    for number in range(50):
        spool.write([report(number)])
    assert sum(entry.payload is None for entry in spool.pending()) > 40
    sent: list[int] = []
    while batch := spool.oldest(7, MAX_BYTES):
        assert all(entry.payload == report(entry.assignment_id).payload for entry in batch)
        sent += [entry.assignment_id for entry in batch]
        acknowledge(spool, batch)
    assert sent == list(range(50))


def test_a_batch_keeps_to_its_bytes_and_has_at_least_one(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MAX_BYTES)
    spool.write([report(1, size=500), report(2, size=500), report(3, size=500)])
    assert len(spool.oldest(100, 1400)) == 2
    assert len(spool.oldest(100, 10)) == 1
    assert len(spool.oldest(2, MAX_BYTES)) == 2


def test_a_report_that_cannot_be_read_back_does_not_block_the_next(three: Path) -> None:
    spool = reopened(three)
    (path,) = segments(three)
    content = bytearray(path.read_bytes())
    content[20] ^= 0x55
    path.write_bytes(content)
    assert [entry.assignment_id for entry in spool.oldest(10, MAX_BYTES)] == [2, 3]
    assert [entry.assignment_id for entry in spool.lost] == [1]


def test_past_its_limit_it_still_takes_what_is_finished(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=4096)
    spool.write([report(1, size=4096)])
    spool.write([report(2)])
    assert spool.pending_bytes > spool.max_bytes
    assert numbers(reopened(tmp_path)) == [1, 2]
    acknowledge(spool, spool.pending()[:1])
    assert spool.pending_bytes == report(2).size


@pytest.mark.parametrize("torn_bytes", [0, 5, 40])
def test_a_full_disk_loses_nothing_and_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn_bytes: int) -> None:
    spool = Spool(tmp_path, MAX_BYTES)
    spool.write([report(1)])
    real_write = os.write

    def full(descriptor: int, content: memoryview) -> int:
        real_write(descriptor, content[:torn_bytes])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spooling.os, "write", full)
    spool.write([report(2)])
    spool.write([report(3)])
    assert not spool.is_writable  # no more pulls
    assert [entry.assignment_id for entry in spool.oldest(10, MAX_BYTES)] == [1, 2, 3]  # sent all the same
    monkeypatch.setattr(spooling.os, "write", real_write)
    spool.write([])
    assert spool.is_writable
    assert numbers(reopened(tmp_path)) == [1, 2, 3]
    acknowledge(spool, spool.pending())
    assert numbers(reopened(tmp_path)) == []


def test_what_is_set_aside_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spool, "KEPT_ASIDE", 5)
    spool = Spool(tmp_path, MAX_BYTES)
    for number in range(20):
        spool.set_aside(f"{number}.refused", b"x")
    assert len(list((tmp_path / "set-aside").iterdir())) == 5


def test_nobody_else_can_read_it(three: Path) -> None:
    assert [path.stat().st_mode & 0o777 for path in segments(three)] == [0o600]
    assert (three / "spool").stat().st_mode & 0o777 == 0o700


def _child_life(folder: Path, die_at: int, said: int) -> None:
    """Write 1..12 in six batches, acknowledge the older half, and die before the file operation number `die_at`."""
    left = iter(range(die_at))

    def mortal(operation):  # type: ignore[no-untyped-def]
        def call(*arguments, **more):  # type: ignore[no-untyped-def]
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **more)

        return call

    write = os.write
    spooling.sync_file = mortal(spooling.sync_file)
    spooling.sync_folder = mortal(spooling.sync_folder)
    spooling.os.open, spooling.os.write = mortal(os.open), mortal(os.write)
    Path.unlink = mortal(Path.unlink)  # type: ignore[method-assign]
    spool = Spool(folder, max_bytes=4096)
    for number in range(1, 12, 2):
        spool.write([report(number, size=1500), report(number + 1, size=1500)])
        write(said, b"durable %d\ndurable %d\n" % (number, number + 1))
        oldest = spool.oldest(1, MAX_BYTES)
        write(said, b"acknowledged %d\n" % oldest[0].assignment_id)
        acknowledge(spool, oldest)
    write(said, b"end\n")


def test_killed_at_any_step_it_keeps_every_report_that_was_durable(tmp_path: Path) -> None:
    ended_by_itself = False
    for die_at in range(1, 200):
        folder = tmp_path / str(die_at)
        ear, said = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _child_life(folder, die_at, said)
            finally:
                os._exit(0)
        os.close(said)
        _, status = os.waitpid(child, 0)
        with os.fdopen(ear) as lines:
            words = [line.split() for line in lines]
        durable = {int(word[1]) for word in words if word[0] == "durable"}
        acknowledged = {int(word[1]) for word in words if word[0] == "acknowledged"}
        kept = numbers(reopened(folder))
        assert durable - acknowledged <= set(kept), f"killed at step {die_at}"
        assert kept == sorted(set(kept)), f"killed at step {die_at}"
        if ["end"] in words:
            ended_by_itself = True
            assert set(kept) == durable - acknowledged
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert ended_by_itself and die_at > 20
