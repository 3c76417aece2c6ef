"""How does the app meet the network?

One socket that this process binds itself, granian's WSGI worker run in this process and thread, and an orderly stop.

    server = Server(host="127.0.0.1", port=8000, threads=1650)   # and certificate=(file, key file) for TLS
    server.bind()                                                # PortInUse or OSError, one sentence each
    code = server.serve(app, on_ready=…, on_stop=…, finish=…)    # until SIGTERM, SIGINT, SIGHUP or stop()

The stop, whoever asks for it: on_stop() (readyz says 503, held polls and streams are woken), the listener closes,
running requests get `stop_within_seconds`, finish() (scheduler, writer, checkpoint), exit code 0. A second SIGINT: 130.

It must not know a route, a table or a setting. It leans on names of granian that are no public API, all of them in
`_InProcess`: the version is pinned exactly, and tests/test_server.py holds what is needed of it. Tested on Linux.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import http.client
import logging
import os
import re
import secrets
import signal
import socket
import ssl
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import granian._signals
import granian.wsgi
from granian._granian import SocketHolder, WorkerSignal
from granian.constants import HTTPModes, Interfaces, Loops, RuntimeModes, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server import MPServer

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger("server")

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none
STOP_SIGNALS = tuple(number for number in (signal.SIGTERM, signal.SIGINT, HANGUP) if number is not None)
STOP_CALLED = 0  # beside the numbers of signals
BACKLOG = 2048
# Granian's pool counts a thread as idle for a moment after it has taken a request, or while it goes away. A request
# that comes in this moment waits, with threads to spare, until the next one comes: so the next one is never far away,
# and threads go away as late as granian allows.
NUDGE_SECONDS = 0.4
IDLE_THREAD_SECONDS = 600
# Longer than two heartbeats, so that a device's next one finds its connection still open.
IDLE_CONNECTION_SECONDS = 75
# About as much a connection may cost that never ends its head. (Granian's default is 400 KB.)
LARGEST_HEAD_BYTES = 64 * 1024
# Two for each of 10,000 devices. Those that find no place wait without a word, for as long as the others stay.
CONNECTIONS = 20_000
SPARE_FILES = 256  # database, logs, static files: descriptors that are no connections
SPARE_THREADS = 64  # the process's own threads, and a little room
# Inherited by every connection. A peer that is gone, or stopped reading, is noticed within a minute.
SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 60_000),
)
PIDS_MAX = ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max")
# Incremental and without handlers: granian's own set-up would replace those of the program.
GRANIAN_LOGS: dict[str, Any] = {
    "version": 1,
    "incremental": True,
    "formatters": {},
    "handlers": {},
    "loggers": {"_granian": {"propagate": True}, "granian.access": {"propagate": True}},
}


# What its TLS can sign with. With another kind of key, such as P-521, it aborts the process.
PRIVATE_KEYS = {
    "RSA": bytes.fromhex("2a864886f70d010101"),
    "P-256": bytes.fromhex("2a8648ce3d030107"),
    "P-384": bytes.fromhex("2b81040022"),
    "Ed25519": bytes.fromhex("06032b6570"),
}


class PortInUse(OSError):
    """Another process listens on this host and port; str() is one sentence that says what to do."""


class CertificateUnusable(ValueError):
    """str() is one sentence that names the file and says what to do."""


class Server:
    """One listening socket and the WSGI server behind it: bind() once, then serve() once."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        threads: int,
        backpressure: int | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        """`threads`: held polls + streams + what else may wait + room. `backpressure`: most connections, idle ones too
        (20,000). `certificate`: the file of the chain and that of its key, for TLS. Raises CertificateUnusable."""
        self.host = host
        self.port = port
        self.certificate = certificate
        if certificate is not None:
            check_certificate(*certificate)
        self.threads = _affordable_threads(threads)
        self.backpressure = _affordable_connections(backpressure or CONNECTIONS, 3 * self.threads)
        self.url = ""
        self.exit_code = 0
        """What a stop in good order ends with."""
        self._listener: socket.socket | None = None
        self._address = ("", 0)
        self._nudge_path = f"/nudge-{secrets.token_hex(16)}"
        self._requests, self._requester = (
            socket.socketpair()
        )  # one byte a request to stop: a signal's number or STOP_CALLED
        self._requester.setblocking(False)
        self._is_stop_asked = threading.Event()
        self._drain = WorkerSignal()
        self._is_drained = threading.Event()
        self._failures: list[str] = []

    def bind(self) -> None:
        """Listen (port 0: a free one): clients queue from now on, and `port` and `url` are known."""
        try:
            self._listener = _listen(self.host, self.port)
        except (OSError, UnicodeError) as error:  # UnicodeError: no host name at all, like "a..b"
            number = getattr(error, "errno", None)
            if number == errno.EADDRINUSE:
                raise PortInUse(
                    f"Port {self.port} on {self.host} is in use: is a master running already? "
                    "Stop it, or choose another port with --port."
                ) from error
            reason = os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or str(error)
            raise OSError(f"Cannot listen on {self.host} port {self.port}: {reason}. Choose another.") from error
        self._address = _reachable(self._listener)
        host, self.port = self._address
        scheme = "http" if self.certificate is None else "https"
        self.url = f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    def serve(
        self,
        app: Callable[..., Any],
        *,
        on_ready: Callable[[], None],
        on_stop: Callable[[], None],
        finish: Callable[[], None],
        on_tick: Callable[[], None] = lambda: None,
        stop_within_seconds: float = 1.0,
    ) -> int:
        """Serve in the main thread until told to stop; `exit_code`, or 1 where granian or one of these steps failed.

        on_ready runs in a thread of its own once a first request was answered, and from then on on_tick there, several
        times a second; on_stop runs in the stop thread; none of them may block. finish runs once: after the last
        request, or beside those that did not end in time, and in that case the process ends here (os._exit) and serve()
        never returns.
        """
        if self._listener is None:
            raise RuntimeError("bind() comes before serve()")
        stopping = threading.Thread(
            target=self._stop_in_order, args=(on_stop, finish, stop_within_seconds), name="server-stop", daemon=True
        )
        self._catch_signals()
        threading.Thread(target=self._watch_requests, name="server-signals", daemon=True).start()
        stopping.start()
        threading.Thread(target=self._ask_myself, args=(on_ready, on_tick), name="server-nudge", daemon=True).start()
        self._attempt("granian", lambda: self._run_granian(app))
        self._is_stop_asked.set()
        self._is_drained.set()
        stopping.join()  # on_stop is over; where the time was over first, that thread ends the process
        self._attempt("finish", finish)
        return 1 if self._failures else self.exit_code

    def stop(self) -> None:
        """Ask for the orderly stop, from any thread, as often as you like; returns at once."""
        with contextlib.suppress(BlockingIOError):  # full: it was asked for often enough
            self._requester.send(bytes([STOP_CALLED]))

    def _run_granian(self, app: Callable[..., Any]) -> None:
        assert self._listener is not None

        def app_or_nudge(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            if environ["PATH_INFO"] == self._nudge_path:
                start_response("204 No Content", [])
                return []
            return app(environ, start_response)

        _InProcess(
            self._listener,
            self._drain,
            threads=self.threads,
            backpressure=self.backpressure,
            certificate=self.certificate,
        ).run(app_or_nudge)
        if not self._is_stop_asked.is_set():
            raise RuntimeError("granian ended by itself")

    def _stop_in_order(self, on_stop: Callable[[], None], finish: Callable[[], None], within_seconds: float) -> None:
        self._is_stop_asked.wait()
        self._attempt("on_stop", on_stop)
        self._drain.set()  # once only: granian hangs when its signal is set again and again
        if self._is_drained.wait(within_seconds):
            return
        log.warning("requests still running %.1f s after the stop are cut off", within_seconds)
        self._attempt("finish", finish)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(1 if self._failures else self.exit_code)

    def _attempt(self, name: str, step: Callable[[], None]) -> None:
        """A step that fails must not keep the later ones from running: the writer is flushed whatever happens."""
        try:
            step()
        except Exception:
            log.exception("%s failed", name)
            self._failures.append(name)

    def _catch_signals(self) -> None:
        """By the wake-up descriptor, which any thread writes: Python's own handlers run in the main thread alone, and a
        signal that comes just before that thread begins to wait is lost (3 of 160 stops in the first moments)."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.set_wakeup_fd(self._requester.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN or number != HANGUP:  # nohup stays nohup
                signal.signal(number, lambda signum, frame: None)

    def _watch_requests(self) -> None:
        interrupt_count = 0
        while True:
            for number in self._requests.recv(64):
                if number == STOP_CALLED or number in STOP_SIGNALS:
                    self._is_stop_asked.set()
                interrupt_count += number == signal.SIGINT
                if interrupt_count > 1:
                    os._exit(130)

    def _ask_myself(self, on_ready: Callable[[], None], on_tick: Callable[[], None] = lambda: None) -> None:
        """Send one tiny request after the other: the first that is answered calls on_ready (a connect would prove
        nothing, the kernel accepts since bind()), and each makes granian look again for requests left waiting."""
        client = _client_of_myself(self._address, is_tls=self.certificate is not None)
        is_ready = False
        while not self._is_stop_asked.is_set():
            try:
                client.request("GET", self._nudge_path)
                client.getresponse().read()
            except (OSError, http.client.HTTPException):
                client.close()  # left waiting itself: the next one comes on a new connection
            else:
                if not is_ready:
                    is_ready = True
                    self._attempt("on_ready", on_ready)
            try:
                on_tick()
            except Exception:  # the nudges must go on
                log.exception("on_tick failed")
            self._is_stop_asked.wait(NUDGE_SECONDS)


class _InProcess(MPServer):
    """Granian with its one worker in this process, on our socket, under our signals: what is private is here."""

    def __init__(
        self,
        listener: socket.socket,
        drain: WorkerSignal,
        *,
        threads: int,
        backpressure: int,
        certificate: tuple[Path, Path] | None,
    ) -> None:
        ssl_cert, ssl_key = certificate or (None, None)
        super().__init__(
            "app",
            interface=Interfaces.WSGI,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(
                header_read_timeout=IDLE_CONNECTION_SECONDS * 1000, max_buffer_size=LARGEST_HEAD_BYTES
            ),
            websockets=False,
            loop=Loops.asyncio,
            runtime_mode=RuntimeModes.mt,
            blocking_threads=threads,
            blocking_threads_idle_timeout=IDLE_THREAD_SECONDS,
            backpressure=backpressure,
            log_level=LogLevels.error,  # at warning it complains about the number of threads, at every start
            log_dictconfig=GRANIAN_LOGS,
            ssl_cert=ssl_cert,
            ssl_key=ssl_key,
            ssl_protocol_min=SSLProtocols.tls12,  # Windows 10's own clients know no 1.3
        )
        self._listener, self._drain = listener, drain

    def run(self, app: Callable[..., Any]) -> None:
        """Return when the drain signal was set and the running requests are over."""
        self.serve(target_loader=lambda: app, wrap_loader=False)

    def _serve(self, spawn_target: Any, target_loader: Any) -> None:
        # Granian's handlers would set the signal at every Ctrl-C, and hang at the third; ours are installed already.
        granian._signals.set_sync_signals = lambda: self._drain
        # Granian copies os.environ into each request's environ: API keys, and HTTP_* names that look like headers.
        granian.wsgi.os = SimpleNamespace(environ={})
        self._ssp = self._sso = None
        self._ipc = {0: (None, None)}
        # Granian closes the socket; its stub does not know this constructor.
        self._shd = SocketHolder(self._listener.detach(), False, BACKLOG)  # type: ignore[call-arg]
        self._spawn_worker(0, spawn_target, target_loader).inner.run()  # start() would be a second process


def check_certificate(certificate: Path, key: Path) -> None:
    """Raises CertificateUnusable for what granian could not serve with, before anything is started."""
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise CertificateUnusable(
                f"{path} cannot be read ({error.strerror}): give the master the right to"
            ) from None
    text, chain = key.read_text("latin-1"), certificate.read_text("latin-1")
    if "PRIVATE KEY-----" in chain and "BEGIN CERT" not in chain and "BEGIN CERT" in text:
        raise CertificateUnusable(f"ssl_certificate and ssl_keyfile are swapped: {certificate} is the key")
    if "ENCRYPTED" in text:
        advice = f"openssl pkey -in {key} -out plain.pem, readable by its owner alone"
        raise CertificateUnusable(f"{key} is encrypted, and nobody is there to type its password: {advice}")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        why = (error.reason or str(error)).replace("_", " ").lower()
        advice = "write PEM files, the certificate (followed by its chain) and the private key that belongs to it"
        raise CertificateUnusable(f"{certificate} and {key} do not go together ({why}): {advice}") from None
    keys = re.findall(r"-----BEGIN (RSA |EC |)PRIVATE KEY-----([^-]*)-----END", text)
    inside = b"".join(binascii.a2b_base64(body) for _, body in keys)
    if not any(kind == "RSA " for kind, _ in keys) and not any(kind in inside for kind in PRIVATE_KEYS.values()):
        raise CertificateUnusable(f"{key} is of a kind that is not served with: make one of {', '.join(PRIVATE_KEYS)}")


def _client_of_myself(address: tuple[str, int], *, is_tls: bool) -> http.client.HTTPConnection:
    if not is_tls:
        return http.client.HTTPConnection(*address, timeout=NUDGE_SECONDS)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it is this process itself, over loopback, and no secret is sent
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(*address, timeout=NUDGE_SECONDS, context=context)


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    is_dual = address[0] == "::" and socket.has_dualstack_ipv6()
    # reuse_port stays off: with it a second master would share the port without a word.
    listener = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    for level, name, value in SOCKET_OPTIONS:
        if hasattr(socket, name):
            listener.setsockopt(level, getattr(socket, name), value)
    return listener


def _reachable(listener: socket.socket) -> tuple[str, int]:
    """Where this machine itself reaches the listener: its address, or loopback for one that listens everywhere."""
    address, port = listener.getsockname()[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address), port


def _affordable_threads(wanted: int) -> int:
    """No more than the container allows: a thread that cannot be made aborts the whole process."""
    for path in PIDS_MAX:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            allowed = max(8, int(Path(path).read_text()) - SPARE_THREADS)
            if allowed < wanted:
                log.warning("%d request threads instead of %d: %s allows no more", allowed, wanted, path)
                return allowed
    return wanted


def _affordable_connections(wanted: int, enough: int) -> int:
    """Raise the limit of open files as far as needed and allowed; beyond the number returned, clients queue. Fewer
    than `enough` deserve a warning."""
    if resource is None:
        return wanted
    needed = wanted + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:  # RLIM_INFINITY is negative on Linux
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft < 0 or soft >= needed:
        return wanted
    allowed = max(64, soft - SPARE_FILES)
    level = logging.WARNING if allowed < enough else logging.INFO
    log.log(level, "%d connections instead of %d: ulimit -n allows no more", allowed, wanted)
    return allowed
