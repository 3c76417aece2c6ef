"""Who is too slow to send or to read, and when is he cut off?

The server knows no limit for a body's time: a client that announces one and sends it slowly, or never, keeps its
handler's thread in a read for ever, and nothing in Python can end that read. Here stands who reads since when, so that

    - at most BODIES_AT_ONCE bodies are read at once, half of them for one address, few for one key and for callers
      without a key, and the last of them for operators; the server has threads for them besides all others, so that
      everybody else is always served;
    - a body that is overdue ends with its connection: `end_overdue` shuts down those sockets of its peer on which
      nothing was sent for as long. A held pull, an event stream and a connection in use are never among them. An idle
      one may be: its client finds it closed and opens another. A body whose key ended is overdue, too.

The same for replies: an export keeps its thread for as long as its reader takes, and a deaf one takes a minute, so few
are written at once, and fewer for one key.

When nearly all connections are taken, the address that has the most loses half, those that were silent the longest.

It knows sockets alone, no routes and no keys. Elsewhere than on Linux only the number of bodies is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from addresses import neighbourhood, parse

log = logging.getLogger("af.connections")

BODIES_AT_ONCE = 128
BODIES_OF_AN_ADDRESS = BODIES_AT_ONCE // 2
BODIES_OF_A_KEY = BODIES_AT_ONCE // 8
BODIES_OF_A_DEVICE = BODIES_AT_ONCE // 16
BODIES_FOR_OPERATORS = 16
BODIES_WITHOUT_KEY = 32
BODIES_WITHOUT_KEY_OF_AN_ADDRESS = 4
# A body has a minute and a second for each 16 KiB, and half a minute and as much for each piece in which it is read, so
# also a small one: longer than a pull is held, for a connection that was silent for as long must not be one on which
# somebody waits for his reply.
BODY_SECONDS = 60.0
PIECE_SECONDS = 30.0
SLOWEST_BYTES_A_SECOND = 16 * 1024
EXPORTS_AT_ONCE = 32
EXPORTS_OF_A_KEY = EXPORTS_AT_ONCE // 4
EXPORTS_OF_A_SHARED_KEY = EXPORTS_AT_ONCE - EXPORTS_OF_A_KEY
# How often the open connections are counted, and from which share of all it is crowded. Whoever takes all of them has
# more waiting to be accepted, in front of everybody else: so it must go on quickly.
LOOK_SECONDS = 5.0
CROWDED_LOOK_SECONDS = 1.0
CROWDED = 0.9
OPEN_FILES = "/dev/fd"
TCP_INFO = getattr(socket, "TCP_INFO", None) if sys.platform == "linux" else None
LAST_DATA_SENT = struct.Struct("44xI")
"""Linux's struct tcp_info up to the milliseconds since data was sent last."""


class Crowded(Exception):
    """So many are on their way already; str() is one sentence."""


class Shares:
    """So many at once, and so many of those for one asker: `shares` says of each name how many may be taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.taken: Counter[str] = Counter()

    def take(self, shares: Mapping[str, int]) -> bool:
        """One of each name, or none at all."""
        with self._lock:
            if any(self.taken[name] >= most for name, most in shares.items()):
                return False
            self.taken.update(list(shares))
            return True

    def give_back(self, shares: Mapping[str, int]) -> None:
        with self._lock:
            self.taken.subtract(list(shares))
            for name in shares:
                if not self.taken[name]:
                    del self.taken[name]


class Connections:
    """Who is being waited for. `most` is how many connections the server takes; `clock` counts seconds."""

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._most = most
        self._lock = threading.Lock()
        self._waiting: dict[Body, float] = {}  # until when
        self.places = Shares()
        self._look_at = 0.0

    @contextlib.contextmanager
    def waiting(self, body: Body, until: float) -> Iterator[None]:
        """Around a read that may not come back; raises Crowded."""
        if not self.places.take(body.shares):
            raise Crowded("too many slow requests are being read; send this one again in a moment")
        with self._lock:
            self._waiting[body] = until
        try:
            yield
        finally:
            with self._lock:
                del self._waiting[body]
            self.places.give_back(body.shares)

    def end_overdue(self) -> None:
        """The server calls it several times a second; it costs nothing unless there is something to end."""
        now = self.clock()
        with self._lock:
            waiting = list(self._waiting.items())
        overdue = {body.peer: now - body.since for body, until in waiting if now > body.ends_at(until)}
        for peer, seconds in overdue.items():
            count = _end(one for one in _open() if one.peer == peer and one.silent_seconds >= seconds - 1.0)
            log.warning("a body from %s did not come within %.0f s; connections ended: %d", peer, seconds, count)
        if now >= self._look_at:
            self._look_at = now + (CROWDED_LOOK_SECONDS if self._make_room() else LOOK_SECONDS)

    def _make_room(self) -> bool:
        """Whether there was need to."""
        if TCP_INFO is None or len(_descriptors()) < CROWDED * self._most:
            return False
        of: dict[str, list[Open]] = {}
        for one in _open():
            of.setdefault(neighbourhood(one.peer), []).append(one)
        address, its = max(of.items(), key=lambda entry: len(entry[1]), default=("", []))
        its.sort(key=lambda one: one.silent_seconds, reverse=True)
        count = _end(its[: len(its) // 2])
        log.warning("nearly all connections are taken: ended %d of %d from %s, long silent", count, len(its), address)
        return True


class Body:
    """In the place of wsgi.input: the same bytes, and known to be waited for."""

    def __init__(
        self,
        stream: Any,
        connections: Connections,
        *,
        peer: str,
        length: int,
        shares: Mapping[str, int],
        is_wanted: Callable[[], bool] = lambda: True,
        refuse_unwanted: Callable[[], None] = lambda: None,
    ) -> None:
        """`peer` is the address at the other end of the socket, which a proxy may be; `is_wanted` says whether who
        sends it would be let in still, and `refuse_unwanted` raises if not."""
        self._stream, self._connections = stream, connections
        self._is_wanted, self._refuse_unwanted = is_wanted, refuse_unwanted
        self.peer, self.shares = peer, shares
        self._seconds = BODY_SECONDS + length / SLOWEST_BYTES_A_SECOND
        self.since = connections.clock()

    def read(self, size: int) -> bytes:
        """Raises Crowded; short where the connection ended, by itself or because the body was overdue."""
        piece_until = self._connections.clock() + PIECE_SECONDS + size / SLOWEST_BYTES_A_SECOND
        with self._connections.waiting(self, min(self.since + self._seconds, piece_until)):
            part: bytes = self._stream.read(size)
        self._refuse_unwanted()
        return part

    def ends_at(self, until: float) -> float:
        """When it is overdue: earlier than `until` if it is not wanted any more."""
        return until if self._is_wanted() else min(until, self.since + PIECE_SECONDS)


def shares_without_key(client: str) -> dict[str, int]:
    """The places that a body takes which needs no key."""
    own = f"without a key from {neighbourhood(client)}"
    return {"without a key": BODIES_WITHOUT_KEY, own: BODIES_WITHOUT_KEY_OF_AN_ADDRESS}


def shares_with_key(client: str, key_id: int | None, *, is_device: bool, is_operator: bool) -> dict[str, int]:
    """The same for one with a key; 0 or None is the one that a whole fleet may share."""
    own = f"{'an operator' if is_operator else 'a key'} from {neighbourhood(client)}"
    shares = {
        "with a key": BODIES_AT_ONCE if is_operator else BODIES_AT_ONCE - BODIES_FOR_OPERATORS,
        own: BODIES_OF_AN_ADDRESS,
    }
    if key_id:
        shares[f"key {key_id}"] = BODIES_OF_A_DEVICE if is_device else BODIES_OF_A_KEY
    return shares


class Export:
    """Bytes that are made while they are sent, for which there is a place. The server closes it, also when the reader
    goes away. Raises Crowded."""

    _places = Shares()

    def __init__(self, lines: Iterator[bytes], key_id: int | None) -> None:
        """`key_id` 0 or None: the key that many may share."""
        own = EXPORTS_OF_A_KEY if key_id else EXPORTS_OF_A_SHARED_KEY
        self._shares = {"": EXPORTS_AT_ONCE, f"key {key_id or 0}": own}
        if not self._places.take(self._shares):
            text = f"{own} exports of this key, or {EXPORTS_AT_ONCE} in all, are being read already"
            raise Crowded(f"{text}; ask for this one again in a moment")
        self._lines: Iterator[bytes] | None = lines

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._lines or iter(()))

    def close(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            self._places.give_back(self._shares)
            if hasattr(lines, "close"):
                lines.close()


class Open(NamedTuple):
    """One connection of this process; `port` is the peer's, `silent_seconds` since we sent data on it."""

    descriptor: int
    peer: str
    port: int
    silent_seconds: float


def _open() -> list[Open]:
    if TCP_INFO is None:
        return []
    found = []
    for descriptor in _descriptors():
        with contextlib.suppress(OSError):  # closed in the meantime, or no connection
            with _copy_of(descriptor) as connection:
                peer, port = connection.getpeername()[:2]
                answer = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, LAST_DATA_SENT.size)
            [milliseconds] = LAST_DATA_SENT.unpack(answer)
            found.append(Open(descriptor, str(parse(peer) or peer), port, milliseconds / 1000))
    return found


def _end(connections: Iterable[Open]) -> int:
    """Shuts them down; returns how many. A descriptor that belongs to another connection by now is left alone."""
    count = 0
    for one in connections:
        with contextlib.suppress(OSError), _copy_of(one.descriptor) as connection:
            if connection.getpeername()[1] == one.port:
                connection.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir(OPEN_FILES)]  # noqa: PTH208 - there may be 20,000


def _copy_of(descriptor: int) -> socket.socket:
    """Raises OSError for what is no internet socket."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    connection = socket.socket(fileno=os.dup(descriptor))
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        connection.close()
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    return connection
