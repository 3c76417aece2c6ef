"""How does a device talk to its master, and when does it try again?

It must not trust the network: only a JSON object is an answer, everything else (a captive portal, a proxy's 502, a
redirect) means that the master was not reached.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import ssl
import threading
import time
from types import MappingProxyType
from typing import Any, Callable, Mapping, Optional, Union
from urllib.parse import urlencode, urlsplit

import requests

from executors.device.credential import Credential
from executors.device.trust import MasterAdapter, PlainHttp
from settings import TLS_ALERT, VERSION, WANTS_TLS, Settings, is_loopback

log = logging.getLogger("worker")

API = "/api/distribution"
CONNECT_SECONDS = 5.0
STALLED_SECONDS = 60.0
LONGEST_BACKOFF_SECONDS = 60.0
CANNOT_NOW = (429, 503, 507)
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
LARGEST_REPLY_BYTES = 64 * 1024 * 1024


class Unreachable(Exception):
    """The master did not answer as a master does. `was_broken`: a connection stood; `was_cut`: we ended it."""

    def __init__(self, reason: str, *, was_broken: bool = False, was_cut: bool = False) -> None:
        super().__init__(reason)
        self.was_broken, self.was_cut = was_broken, was_cut


class Busy(Exception):
    """The master answered that it cannot now (429, 503, 507)."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the master is busy, again in {seconds:.1f} s")
        self.seconds = seconds


class Refused(Exception):
    """The master answered 4xx, with a code and a sentence, to a call with that key."""

    def __init__(self, status: int, code: str, detail: str, key: str) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail, self.key = status, code, detail, key


class Link:
    """Is the master there, and when may the next call be tried? One for all threads, so that an outage ends once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spread_seconds = 0.0  # none at the first start
        self.is_stopping = False
        self._changed = threading.Condition()
        self._failures = 0
        self._was_spread = False
        self._next_try = self._failed_at = self._lost_at = 0.0
        self._was_reached = False

    def wait_turn(self) -> None:
        with self._changed:
            while (left := self._next_try - time.monotonic()) > 0:
                self._changed.wait(left)

    @property
    def next_try(self) -> float:
        """No call before this moment (monotonic)."""
        return self._next_try

    def worked(self, started: float) -> None:
        """A call that began at `started` (monotonic) was answered. An answer to one that began before the last failure
        says nothing of the master since: a master that stops still answers the pulls that it holds."""
        if not self._failures and self._was_reached:
            return
        with self._changed:
            if started < self._failed_at or (not self._failures and self._was_reached):
                return
            if self._was_reached:
                log.info("master back url=%s after=%.1fs", self.url, time.monotonic() - self._lost_at)
            self._was_reached, self._failures, self._was_spread, self._next_try = True, 0, False, 0.0
            self._changed.notify_all()

    def failed(self, started: float, error: Unreachable) -> None:
        """Another thread's call that began before the last failure is the same failure."""
        with self._changed:
            if started < self._failed_at:
                return
            now = time.monotonic()
            if self._failures == 0:
                self._lost_at = now
                verb = "master lost" if self._was_reached else "master not reached"
                log.warning("%s url=%s: %s; trying until it answers", verb, self.url, error)
            self._failures += 1
            self._failed_at = now
            self._next_try = now + random.uniform(0, self._longest_wait(error))

    def _longest_wait(self, error: Unreachable) -> float:
        if self.is_stopping:
            return 0.5
        if error.was_broken and self._failures == 1:
            return max(self.spread_seconds / 10, 0.5)
        if not self._was_spread:
            self._was_spread = True
            return max(self.spread_seconds, 1.0)
        return float(min(LONGEST_BACKOFF_SECONDS, 2 ** min(self._failures - 1, 10)))

    def hurry(self) -> None:
        """The process is about to end: wait no longer."""
        with self._changed:
            self.is_stopping, self._next_try = True, 0.0
            self._changed.notify_all()


class CuttableAdapter(MasterAdapter):
    """An adapter with one connection, whose socket another thread may shut down.

    The timeouts of requests count from byte to byte, so a server that drips would hold a call for ever."""

    socket: Optional[socket.socket] = None

    def connected(self, connection: Any) -> None:
        super().connected(connection)
        self.socket = connection
        connection.settimeout(STALLED_SECONDS)  # else a send would only have the time of the connect


class MasterClient:
    """How does one thread call the master? One requests.Session, total deadlines, no redirects, JSON only."""

    def __init__(self, link: Link, settings: Settings, credential: Optional[Credential] = None) -> None:
        self.link = link
        self._credential = credential or Credential(settings.api_key)
        self.url = settings.master_url
        self._lock = threading.Lock()
        self._deadline: Optional[float] = None
        self._cut: str = ""
        self._adapter = CuttableAdapter(self.url, settings, pool_connections=1, pool_maxsize=1)
        self._session = requests.Session()
        # trust_env would let a ~/.netrc replace our key; proxies and CA bundles of the environment still count, but no
        # proxy stands between a device and a master on the same machine.
        self._session.trust_env = False
        if not is_loopback(urlsplit(self.url).hostname or ""):
            self._session.proxies.update(requests.utils.get_environ_proxies(self.url, no_proxy=None))
        self._session.verify = self._adapter.verify
        self._session.mount("http://", self._adapter)
        self._session.mount("https://", self._adapter)
        self._session.headers.update(
            {"User-Agent": f"af-worker/{VERSION}", "Accept": "application/json", "Accept-Encoding": "identity"}
        )
        self._blank = self._session.prepare_request(requests.Request("GET", self.url))
        self._api_url = str(self._blank.url).rstrip("/") + API

    def get(self, path: str, query: dict[str, Any], seconds: float) -> dict[str, Any]:
        return self._call("GET", f"{path}?{urlencode(query)}", seconds)

    def post(self, path: str, body: Union[dict[str, Any], bytes], seconds: float) -> dict[str, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        return self._call("POST", path, seconds, content, {"Content-Type": "application/json"})

    def put(self, path: str, query: dict[str, Any], content: Any, seconds: float) -> dict[str, Any]:
        """Send a file (open for reading, or bytes), on a connection of its own: timeouts stay on a connection."""
        headers = {"Content-Type": "application/octet-stream", "Connection": "close"}
        return self._call("PUT", f"{path}?{urlencode(query)}", seconds, content, headers)

    def _call(
        self, method: str, path: str, seconds: float, content: Any = None, headers: Mapping[str, str] = NO_HEADERS
    ) -> dict[str, Any]:
        self.link.wait_turn()
        key = self._credential.key
        if key:
            headers = {**headers, "Authorization": f"Bearer {key}"}
        with self._lock:
            started = time.monotonic()
            self._deadline, self._cut = started + seconds, ""
        try:
            with self._send(method, path, content, headers, seconds) as response:
                reply = bytearray()
                for part in response.iter_content(65536):
                    reply += part
                    if len(reply) > LARGEST_REPLY_BYTES:
                        raise Unreachable(f"its answer is larger than {LARGEST_REPLY_BYTES} bytes", was_broken=True)
                cut = self._cut
        except (OSError, ValueError) as error:  # requests' own exceptions are OSErrors
            raise self._unreachable(error, seconds) from None
        finally:
            with self._lock:
                self._deadline = None
        if cut:
            raise self._unreachable(OSError(cut), seconds)
        return self._judge(response, bytes(reply), started, key)

    def _send(
        self, method: str, path: str, content: Any, headers: Mapping[str, str], seconds: float
    ) -> requests.Response:
        """As Session.request, without cookies, redirects and hooks, which no call to a master needs: half its time."""
        request = self._blank.copy()
        request.method, request.url = method, self._api_url + path
        request.headers.update(headers)
        request.prepare_body(content, None)
        return self._adapter.send(
            request, stream=True, timeout=(min(CONNECT_SECONDS, seconds), seconds),
            verify=self._adapter.verify, proxies=self._session.proxies,
        )  # fmt: skip

    def _unreachable(self, error: Exception, seconds: float) -> Unreachable:
        if isinstance(error, PlainHttp):
            return Unreachable(str(error))
        if self._cut:
            return Unreachable(self._cut, was_broken=True, was_cut=self._cut == "stop")
        if isinstance(error, requests.Timeout) and not isinstance(error, requests.ConnectionError):
            return Unreachable(f"no answer within {seconds:.0f} s", was_broken=True)
        cause: Any = error
        while deeper := [part for part in (getattr(cause, "reason", None), *cause.args) if isinstance(part, Exception)]:
            cause = deeper[0]
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Unreachable(f"its certificate is not trusted here ({cause.verify_message}); --doctor says more")
        if TLS_ALERT in repr(error):
            return Unreachable(WANTS_TLS)
        never_stood = any(word in repr(error) for word in ("NewConnection", "ConnectTimeout", "NameResolution"))
        why = str(cause).rsplit(": ", 1)[-1].rpartition("] ")[2]  # "... failed: [Errno 111] Connection refused"
        return Unreachable(why[:200], was_broken=not never_stood)

    def _judge(self, response: requests.Response, content: bytes, started: float, key: str) -> dict[str, Any]:
        status, kind = response.status_code, response.headers.get("Content-Type", "")
        try:
            reply = json.loads(content) if kind.partition(";")[0].strip().endswith("json") else None
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not (200 <= status < 300 or (status >= 400 and "code" in reply)):
            where = f", a redirect to {response.headers.get('Location', '')[:200]}" if 300 <= status < 400 else ""
            raise Unreachable(f"answered {status} {kind[:80]}{where}, not as a master does", was_broken=True)
        if status >= 500 and status not in CANNOT_NOW:
            raise Unreachable(f"answered {status} {reply['code']}", was_broken=True)
        self.link.worked(started)
        if 200 <= status < 300:
            return reply
        if status in CANNOT_NOW:
            raise Busy(number(response.headers.get("Retry-After"), 5.0, 0.1, LONGEST_BACKOFF_SECONDS))
        raise Refused(status, str(reply["code"]), str(reply.get("detail") or reply.get("title") or ""), key)

    def cut_if_overdue(self, now: float) -> None:
        self._shut_down("no complete answer in time", lambda deadline: now > deadline)

    def cut(self) -> None:
        """End the call that is on its way, if any; the thread in it gets Unreachable with was_cut."""
        self._shut_down("stop", lambda deadline: True)

    def _shut_down(self, reason: str, is_due: Callable[[float], bool]) -> None:
        # Under the lock, so that it cannot hit the next call on the same connection.
        with self._lock:
            if self._deadline is not None and is_due(self._deadline):
                self._cut = reason
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    self._adapter.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


def number(value: Any, default: float, low: float, high: float) -> float:
    """A number from outside, between low and high; the default for what is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return default
    return min(high, max(low, found)) if found == found else default
