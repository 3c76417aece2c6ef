"""How does a request reach exactly the checked address, and end in time?

urllib3 connects by name and its time-outs start anew with every byte. Here a connection asks the guard for the
addresses of its host and connects to these; certificate and SNI stay the host's, for only the socket is ours. A watch
ends the socket that its thread waits for when the time is up or the task is cancelled: a server that sends a byte a
second, in a handshake, a header or a chunk's length, holds nobody.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Callable, Optional

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from executors.task_executor import DoNotRetry, Retry
from executors.web.addresses import Guard

CONNECT_SECONDS = 10.0
TICK_SECONDS = 0.05
IDLE_TICKS = 20

_thread = threading.local()


class OutOfTime(Retry):
    """The page took longer than its task allows."""


class Cancelled(DoNotRetry):
    """Nobody waits for the page any more."""


class Watch:
    """The end of what one thread fetches: at a deadline, or when its task is cancelled. They nest."""

    def __init__(self, seconds: float, is_cancelled: Callable[[], bool] = lambda: False):
        self.seconds = seconds
        self.is_expired = False
        self.is_cancelled = False
        self._ask_cancelled = is_cancelled
        self._deadline = time.monotonic() + seconds
        self._sock: Any = None
        self._outer: Optional[Watch] = None
        self._lock = threading.Lock()

    def __enter__(self) -> Watch:
        self._outer = Watch.of_this_thread()
        _thread.watch = self
        _keeper.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _keeper.remove(self)
        _thread.watch = self._outer
        with self._lock:
            self._sock = None

    @staticmethod
    def of_this_thread() -> Optional[Watch]:
        watch: Optional[Watch] = getattr(_thread, "watch", None)
        return watch

    @property
    def limit(self) -> str:
        return f"{round(self.seconds, 2):g} s"

    @property
    def has_ended(self) -> bool:
        return self.is_expired or self.is_cancelled

    def left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def check(self, url: str) -> None:
        """Raises Cancelled or OutOfTime once it has ended."""
        if self.is_cancelled:
            raise Cancelled(f"cancelled while {url} was fetched")
        if self.is_expired:
            raise OutOfTime(f"{url} took longer than {self.limit}")

    def use(self, sock: Any) -> None:
        with self._lock:
            self._sock = sock
        if self.has_ended:
            self._end()

    def look(self) -> None:
        """Called again and again by the keeper's thread."""
        if not self.has_ended:
            self.is_expired = time.monotonic() >= self._deadline
            self.is_cancelled = self._ask_cancelled()
        if self.has_ended:
            self._end()

    def _end(self) -> None:
        with self._lock:
            if self._sock is not None:
                try:
                    # Of the plain class: SSLSocket.shutdown would first switch encryption off under the reading thread.
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
                except OSError:
                    pass


class Keeper:
    """One thread that looks at all watches; it ends by itself a second after the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[Watch] = set()
        self._is_running = False

    def add(self, watch: Watch) -> None:
        with self._lock:
            self._watches.add(watch)
            if self._is_running:
                return
            self._is_running = True
        threading.Thread(target=self._run, name="crawl deadlines", daemon=True).start()

    def remove(self, watch: Watch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def _run(self) -> None:
        idle_ticks = 0
        while True:
            time.sleep(TICK_SECONDS)
            with self._lock:
                watches = list(self._watches)
                idle_ticks = 0 if watches else idle_ticks + 1
                if idle_ticks > IDLE_TICKS:
                    self._is_running = False
                    return
            for watch in watches:
                watch.look()


_keeper = Keeper()


def watch_socket(sock: Any) -> None:
    watch = Watch.of_this_thread()
    if watch is not None and sock is not None:
        watch.use(sock)


def connect(guard: Guard, host: str, port: int, seconds: float, options: Any) -> socket.socket:
    """A socket to the first address of the host that answers. Raises Refused and Retry."""
    end = time.monotonic() + min(seconds, CONNECT_SECONDS)
    addresses = guard.addresses(host, port, min(seconds, CONNECT_SECONDS))
    trouble = "no answer"
    for i, (family, where) in enumerate(addresses):
        left = end - time.monotonic()
        if left <= 0:
            break
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            for option in options or ():
                sock.setsockopt(*option)
            # One address that swallows everything must not use up the time of the others.
            sock.settimeout(left if i == len(addresses) - 1 else left / 2)
            watch_socket(sock)
            sock.connect(where)
        except OSError as error:
            sock.close()
            trouble = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        except BaseException:
            sock.close()
            raise
        else:
            sock.settimeout(seconds)
            return sock
    tried = ", ".join(str(where[0]) for _, where in addresses[:4])
    shown = host if tried == host.strip("[]") else f"{host} ({tried})"
    raise Retry(f"{shown} cannot be reached on port {port}: {trouble}")


class Guarded:
    """Mixed into urllib3's connections."""

    sock: Any
    port: Any
    proxy: Any
    timeout: Any
    socket_options: Any
    _dns_host: str
    guard: Guard

    def _new_conn(self) -> Any:
        if self.proxy is not None:  # the way to the device's own proxy; the target was checked as far as it can be
            sock = super()._new_conn()  # type: ignore[misc]
        else:
            watch = Watch.of_this_thread()
            seconds = watch.left() if watch is not None else CONNECT_SECONDS
            sock = connect(self.guard, self._dns_host, int(self.port), seconds, self.socket_options)
        watch_socket(sock)
        return sock

    def getresponse(self, *arguments: Any, **options: Any) -> Any:
        watch_socket(self.sock)
        return super().getresponse(*arguments, **options)  # type: ignore[misc]


class GuardedAdapter(HTTPAdapter):
    """requests' way to the connections above; all slots of a device share one, and with it the open connections."""

    def __init__(self, guard: Guard, connections: int):
        # Classes of this adapter alone: urllib3 makes connections itself and passes nothing of ours along.
        plain = type("GuardedConnection", (Guarded, HTTPConnection), {"guard": guard})
        secure = type("GuardedSecureConnection", (Guarded, HTTPSConnection), {"guard": guard})
        self._pool_classes = {
            "http": type("GuardedPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("GuardedSecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
        }
        super().__init__(pool_connections=32, pool_maxsize=connections)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self._pool_classes

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        manager.pool_classes_by_scheme = self._pool_classes
        return manager
