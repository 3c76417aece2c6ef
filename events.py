"""What just happened, and who wants to know? The log and the event streams, fed after each commit.

The log gets one line a state change (`complete task=7 device=shop-7 attempt=1`); when one commit makes many alike, one
line for all of them. Streams get the same facts from a ring of the last RING_SIZE events, so that a browser that was
away for a moment misses nothing. Nothing here is needed after a restart; what is kept for longer (history.py) has its
`history_id` among its facts.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transaction import NOTED_ALONE, Note

log = logging.getLogger("af.events")

RING_SIZE = 1000
WARNED = {"release", "device_offline", "device_conflict"}


class Event(NamedTuple):
    id: int
    kind: str
    facts: dict[str, Any]


class Events:
    """A ring with a bell. `hear` is a listener of the store; `follow` is one stream's view of it."""

    def __init__(self, max_streams: int = 50) -> None:
        self._max_streams = max_streams
        self._streams: Counter[int] = Counter()  # by key
        self._ring: deque[Event] = deque(maxlen=RING_SIZE)
        self._bell = threading.Condition()
        self._last_id = 0
        self._closed = False

    @property
    def open_streams(self) -> int:
        return self._streams.total()

    def hear(self, notes: list[Note]) -> None:
        """Logs and publishes what one commit brought."""
        alike: defaultdict[tuple[str, str], list[Note]] = defaultdict(list)
        for note in notes:
            alike[note.kind, note.verb].append(note)
        many = {key: group for key, group in alike.items() if len(group) > NOTED_ALONE}
        told = [note for note in notes if (note.kind, note.verb) not in many] if len(many) < len(alike) else []
        told += [_summary(kind, verb, group) for (kind, verb), group in sorted(many.items())]
        for note in told:
            _log(note.verb, note.facts)
        with self._bell:
            for note in told:
                self._last_id += 1
                self._ring.append(Event(self._last_id, note.kind, {"verb": note.verb, **note.facts}))
            self._bell.notify_all()

    def follow(self, after_id: int | None, beat_seconds: float = 15.0) -> Iterator[Event | None]:
        """Events after that id (None: from now on), and None every `beat_seconds` without one. Ends at `close`."""
        last = self._last_id if after_id is None or after_id > self._last_id else after_id
        while True:
            with self._bell:
                if not self._closed and self._last_id <= last:
                    self._bell.wait(beat_seconds)
                if self._closed:
                    return
                new = [event for event in self._ring if event.id > last]
            if not new:
                yield None
            for event in new:
                last = event.id
                yield event

    def stream(
        self, after_id: int | None, may_go_on: Callable[[], bool] = lambda: True, key_id: int | None = None,
        *, hidden: str | None = None,
    ) -> Iterator[bytes] | None:  # fmt: skip
        """The same as server-sent events; None when max_streams are open already, or so many of this key: a fifth, or
        all but a fifth for the one that many may share (0 or None). It ends before the line at which `may_go_on` says
        no, and has no event of the kind `hidden`."""
        key_id, fifth = key_id or 0, self._max_streams // 5
        share = max(1, fifth) if key_id else self._max_streams - fifth
        with self._bell:
            if self._closed or self._streams.total() >= self._max_streams or self._streams[key_id] >= share:
                return None
            self._streams[key_id] += 1
            # Now and not when the first line is asked for: what happens from here on is the caller's.
            last = self._last_id if after_id is None or after_id > self._last_id else after_id
        return self._lines(last, may_go_on, key_id, hidden)

    def _lines(self, after_id: int, may_go_on: Callable[[], bool], key_id: int, hidden: str | None) -> Iterator[bytes]:
        try:
            yield b": hello\n\n"
            for event in self.follow(after_id):
                if not may_go_on():
                    return
                if event is None:
                    yield b": still here\n\n"
                elif event.kind != hidden:
                    data = json.dumps(event.facts, ensure_ascii=False)
                    yield f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n".encode()
        finally:
            with self._bell:
                self._streams[key_id] -= 1
                if not self._streams[key_id]:
                    del self._streams[key_id]

    def close(self) -> None:
        """Ends every stream within a moment."""
        with self._bell:
            self._closed = True
            self._bell.notify_all()


def _summary(kind: str, verb: str, alike: list[Note]) -> Note:
    facts: dict[str, Any] = {"count": sum(note.facts.get("count", 1) for note in alike)}
    tasks = {note.facts[name] for note in alike for name in ("task", "first_task", "last_task") if name in note.facts}
    if tasks:
        facts["first_task"], facts["last_task"] = min(tasks), max(tasks)
    for name in ("device", "status", "history_id"):
        values = {note.facts[name] for note in alike if name in note.facts}
        if len(values) == 1:
            facts[name] = values.pop()
    return Note(kind, verb, facts)


def _log(verb: str, facts: dict[str, Any]) -> None:
    level = logging.WARNING if verb in WARNED or facts.get("status") == "failed" else logging.INFO
    if log.isEnabledFor(level):
        told = ((name, value) for name, value in facts.items() if value is not None and name != "history_id")
        words = (f"{name}={_plain(value)}" for name, value in told)
        log.log(level, "%s %s", verb, " ".join(words))


def _plain(value: Any) -> str:
    """One line, never two: a device name or an error text must not forge a log line."""
    text = str(value)
    shown = text if text.isprintable() else text.encode("unicode_escape").decode()
    return f'"{shown[:300]}"' if " " in shown or not shown else shown[:300]
