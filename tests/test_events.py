"""What just happened, and who hears of it?"""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import pytest

import events as events_module
from events import Events
from transaction import Note


def note(verb: str, task: int, **facts: object) -> Note:
    return Note("task", verb, {"task": task, **facts})


def facts_of(lines: list[bytes]) -> list[dict[str, object]]:
    """The data of server-sent events; comments are left out."""
    events = [line.decode() for line in lines if not line.startswith(b":")]
    return [json.loads(event.split("data: ", 1)[1]) for event in events]


def test_a_stream_gets_what_happens_after_it_was_opened_not_after_its_first_line_was_read() -> None:
    events = Events()
    events.hear([note("submit", 1)])
    stream = events.stream(None)
    assert stream is not None
    events.hear([note("submit", 2)])
    assert next(stream).startswith(b":")
    events.hear([note("submit", 3)])
    assert [fact["task"] for fact in facts_of([next(stream), next(stream)])] == [2, 3]


def test_a_stream_goes_on_after_the_id_it_names() -> None:
    events = Events()
    events.hear([note("submit", n) for n in range(1, 6)])
    stream = events.stream(3)
    assert stream is not None
    assert [fact["task"] for fact in facts_of([next(stream), next(stream), next(stream)])] == [4, 5]


def test_an_id_of_an_earlier_life_of_the_master_starts_from_now() -> None:
    events = Events()
    events.hear([note("submit", 1)])
    stream = events.stream(500)
    assert stream is not None and next(stream).startswith(b":")
    events.hear([note("submit", 2)])
    assert facts_of([next(stream)]) == [{"verb": "submit", "task": 2}]


def test_only_the_newest_events_are_kept() -> None:
    events = Events()
    for n in range(events_module.RING_SIZE + 5):
        events.hear([note("submit", n)])
    stream = events.stream(0)
    assert stream is not None
    next(stream)
    assert facts_of([next(stream)]) == [{"verb": "submit", "task": 5}]


def test_more_streams_than_allowed_are_refused_until_one_ends() -> None:
    events = Events(max_streams=2)
    first, second = events.stream(None), events.stream(None)
    assert first is not None and second is not None and events.stream(None) is None
    next(first)
    first.close()  # type: ignore[attr-defined]
    assert events.stream(None) is not None


def test_one_key_has_a_fifth_of_the_streams_and_the_one_that_many_share_leaves_a_fifth() -> None:
    def open_all(key_id: int | None) -> int:
        streams = [events.stream(None, key_id=key_id) for _ in range(60)]
        for stream in streams:
            if stream is not None:
                next(stream)
                kept.append(stream)
        return len(streams) - streams.count(None)

    kept: list[Any] = []
    events = Events(max_streams=50)
    assert [open_all(key_id) for key_id in (7, None, 0, 8)] == [10, 40, 0, 0] and events.open_streams == 50
    for stream in kept:
        stream.close()
    assert events.open_streams == 0
    assert [open_all(key_id) for key_id in (0, 7, 8)] == [40, 10, 0]


def test_closing_ends_every_stream_at_once_and_opens_no_more() -> None:
    events = Events()
    stream = events.stream(None)
    assert stream is not None
    next(stream)
    rest: list[bytes] = []
    reader = threading.Thread(target=lambda: rest.extend(stream))
    reader.start()
    events.close()
    reader.join(60)
    assert not reader.is_alive() and rest == []
    assert events.stream(None) is None


def test_silence_is_broken_by_a_comment() -> None:
    following = Events().follow(None, beat_seconds=0.001)
    assert next(following) is None


def test_many_changes_of_a_kind_in_one_commit_are_one_line_and_one_event(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "af")
    events = Events()
    many = [note("release", n, device="shop-1") for n in range(1, 101)]
    events.hear([*many, note("submit", 7)])
    stream = events.stream(0)
    assert stream is not None
    next(stream)
    found = facts_of([next(stream), next(stream)])
    assert found == [
        {"verb": "submit", "task": 7},
        {"verb": "release", "count": 100, "first_task": 1, "last_task": 100, "device": "shop-1"},
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "submit task=7",
        "release count=100 first_task=1 last_task=100 device=shop-1",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_notes_that_tell_of_many_tasks_are_summed_up_with_all_of_them() -> None:
    events = Events()
    events.hear([Note("task", "assign", {"count": 50, "first_task": n * 100, "last_task": n * 100 + 49, "status": "assigned"})
                 for n in range(1, 22)])  # fmt: skip
    stream = events.stream(0)
    assert stream is not None
    next(stream)
    (found,) = facts_of([next(stream)])
    assert found == {"verb": "assign", "count": 1050, "first_task": 100, "last_task": 2149, "status": "assigned"}


def test_what_others_wrote_forges_neither_a_log_line_nor_an_event(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "af")
    events = Events()
    events.hear([note("fail", 1, error="a\nid: 9\nevent: task\ndata: {}\n\n", status="failed")])
    stream = events.stream(0)
    assert stream is not None
    next(stream)
    line = next(stream).decode()
    assert line.count("\n") == 4 and line.endswith("\n\n")
    [record] = caplog.records
    assert "\n" not in record.getMessage() and record.levelname == "WARNING"
