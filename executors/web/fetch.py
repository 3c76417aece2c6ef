"""How is one page fetched, with bounds on everything that a server may do?

    where to    http and https, public addresses (addresses.py), judged anew at each of at most 5 redirects
    whether     robots.txt (robots.py), at each hop
    when        in the host's turn (politeness.py)
    how long    one deadline for all of it, look-ups, handshakes and redirects included (connection.py)
    how much    10 MiB unpacked, of which the rest is left unread; more than 100:1 past 1 MiB is a bomb (unpack.py)

Whatever a server sends, the end is a Page or one of Retry, DoNotRetry and Snooze, whose text is a sentence.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Optional
from urllib.parse import urlsplit

import requests

from executors.task_executor import DoNotRetry, Retry, Snooze
from executors.web.addresses import Guard
from executors.web.connection import GuardedAdapter, OutOfTime, Watch
from executors.web.politeness import Politeness
from executors.web.robots import MAX_BYTES as MAX_ROBOTS_BYTES
from executors.web.robots import Robots, Rules
from executors.web.unpack import ACCEPT_ENCODING, PIECE_BYTES, unpacked
from executors.web.urls import DEFAULT_PORTS, fetched_form, host_of, origin_of, scrub_headers

MAX_BODY_BYTES = 10 * 1024 * 1024
MAX_RATIO = 100
RATIO_COUNTS_FROM_BYTES = 1024 * 1024
MAX_REDIRECTS = 5
ROBOTS_SECONDS = 10.0
RETRY_AFTER_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 3600.0
HUNG_UP = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)  # http.client.RemoteDisconnected is one


@dataclass(frozen=True)
class Manners:
    """The device's settings for crawling; the defaults are those of settings.py."""

    user_agent: str = "af-distribution/0.1.0"
    obey_robots: bool = True
    delay_seconds: float = 0.0
    host_connections: int = 4
    allow_networks: tuple[str, ...] = ()
    proxy: str = ""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Manners:
        given = {name: settings.get(f"crawl_{name}") for name in cls.__dataclass_fields__}
        if given["allow_networks"] is not None:
            given["allow_networks"] = tuple(given["allow_networks"])
        return cls(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Request:
    """What is asked of a server; `url` is a fetched form."""

    url: str
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Optional[bytes] = None
    max_bytes: int = MAX_BODY_BYTES


@dataclass
class Page:
    """What came back in the end."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    is_truncated: bool = False

    @property
    def content_type(self) -> str:
        return (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower()


class AskedToWait(Snooze):
    """The server of `url` does not want to be asked for a while."""

    def __init__(self, page: Page, seconds: float):
        super().__init__(seconds, f"{page.url} answered {page.status}")
        self.url = page.url


class Fetcher:
    """One device's way to the web; all its slots share it. Cookies live as long as one fetch."""

    def __init__(self, manners: Manners):
        self.manners = manners
        self._guard = Guard(manners.allow_networks, uses_proxy=bool(manners.proxy))
        self._adapter = GuardedAdapter(self._guard, manners.host_connections)
        self._politeness = Politeness(manners.host_connections, manners.delay_seconds)
        self._robots = Robots(self._fetch_robots)
        self._thread = threading.local()

    def fetch(self, request: Request, seconds: float, is_cancelled: Callable[[], bool] = lambda: False) -> Page:
        """The page, at most 5 redirects further, within `seconds` in all. Raises Retry, DoNotRetry and Snooze."""
        with Watch(seconds, is_cancelled) as watch:
            try:
                page = self._follow(self._session("page"), request, watch, obey_robots=self.manners.obey_robots)
            except Exception as error:
                # Everything: what a server sends reaches code of four libraries, and none promises what it raises.
                watch.check(request.url)
                raise ending_of(error, request, watch) from None
            watch.check(request.url)  # the end of the connection may look like the end of the page
        return page

    def rules(self, url: str, seconds: float) -> Optional[Rules]:
        """The robots.txt of the URL's origin; None where this device does not ask for it, or it cannot be had."""
        if not self.manners.obey_robots:
            return None
        with Watch(seconds):
            try:
                return self._robots.of(origin_of(url))
            except (Retry, DoNotRetry, Snooze):
                return None

    def _follow(self, session: requests.Session, request: Request, watch: Watch, *, obey_robots: bool) -> Page:
        """Redirects by hand: each hop is judged, and private headers of ours do not go along to another host."""
        start = request.url
        for _ in range(MAX_REDIRECTS + 1):
            watch.check(start)
            delay = self._check(request, obey_robots=obey_robots)
            with self._politeness.turn(host_of(request.url), delay, lambda: watch.has_ended):
                watch.check(start)
                page, location = self._ask(session, request, watch)
            self._note_pause(page)
            if location is None:
                return page
            request = redirected(request, page, location)
        raise DoNotRetry(f"{start} redirects more than {MAX_REDIRECTS} times")

    def _check(self, request: Request, *, obey_robots: bool) -> float:
        """Whether this hop may be made; the delay that robots.txt asks for."""
        parts = urlsplit(request.url)
        self._guard.check_target(parts.scheme, parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme])
        if not obey_robots:
            return 0.0
        rules = self._robots.of(origin_of(request.url))
        agent = self.user_agent(request.headers)
        if not rules.allows(request.url, agent):
            raise DoNotRetry(
                f"robots.txt of {host_of(request.url)} does not let {agent} fetch {request.url}: leave it out, or set"
                " crawl_obey_robots to false on devices whose owner may crawl there"
            )
        return rules.delay_seconds(agent)

    def user_agent(self, headers: Mapping[str, str]) -> str:
        """The product name that robots.txt is read for, as RFC 9309 has it: up to the slash."""
        own = next((value for name, value in headers.items() if name.lower() == "user-agent"), "")
        return (own or self.manners.user_agent).partition("/")[0].strip() or "*"

    def _ask(self, session: requests.Session, request: Request, watch: Watch) -> tuple[Page, Optional[str]]:
        """One request and its answer; with a Location where it redirects."""
        try:
            response = self._send(session, request, watch)
        except requests.ConnectionError as error:
            # A kept connection may be closed at the moment of use. Asked again, a new one is made.
            if request.method == "POST" or watch.has_ended or not isinstance(root_of(error), HUNG_UP):
                raise
            response = self._send(session, request, watch)
        with response:
            page = Page(request.url, response.status_code, response.headers)
            location = response.headers.get("Location")
            if response.is_redirect and location is not None:
                return page, location
            read_body(page, response, watch, request.max_bytes)
        return page, None

    def _send(self, session: requests.Session, request: Request, watch: Watch) -> requests.Response:
        proxy = self.manners.proxy
        left = watch.left()
        return session.request(
            request.method,
            request.url,
            headers=dict(request.headers),
            data=request.body,
            timeout=(left, left),
            stream=True,
            allow_redirects=False,
            proxies={"http": proxy, "https": proxy} if proxy else None,
        )

    def _session(self, purpose: str) -> requests.Session:
        """One a thread and purpose, without cookies yet; the connections behind it are shared."""
        session: Optional[requests.Session] = getattr(self._thread, purpose, None)
        if session is None:
            session = requests.Session()
            session.trust_env = False
            session.headers.update({"User-Agent": self.manners.user_agent, "Accept-Encoding": ACCEPT_ENCODING})
            session.headers["Accept"] = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
            for scheme in ("http://", "https://"):
                session.mount(scheme, self._adapter)
            setattr(self._thread, purpose, session)
        session.cookies.clear()
        return session

    def _fetch_robots(self, url: str) -> str:
        """The text of a robots.txt, "" for none. Raises Retry and Snooze where it cannot be had."""
        request = Request(url, max_bytes=MAX_ROBOTS_BYTES)
        outer = Watch.of_this_thread()
        seconds = min(ROBOTS_SECONDS, outer.left()) if outer else ROBOTS_SECONDS
        with Watch(seconds, lambda: outer is not None and outer.has_ended) as watch:
            try:
                page = self._follow(self._session("robots"), request, watch, obey_robots=False)
                watch.check(url)
                refuse_failure(page)
            except DoNotRetry:
                return ""
            except Exception as error:
                watch.check(url)
                raise ending_of(error, request, watch) from None
        return page.body.decode("utf-8-sig", "replace") if 200 <= page.status < 300 else ""

    def _note_pause(self, page: Page) -> None:
        if page.status in (429, 503):
            seconds = retry_after(page) or (RETRY_AFTER_SECONDS if page.status == 429 else 0.0)
            self._politeness.close(host_of(page.url), seconds, f"answered {page.status}")


def redirected(request: Request, page: Page, location: str) -> Request:
    """The request that a redirect asks for. Raises DoNotRetry for one that is not followed."""
    # requests decodes headers as ISO-8859-1, servers that do not escape send UTF-8.
    target = fetched_form(location.encode("latin-1", "replace").decode("utf-8", "replace").strip(), base=request.url)
    if target is None:
        raise DoNotRetry(f"{request.url} redirects to {location!r:.200}: only http and https are followed")
    method, body = request.method, request.body
    if page.status == 303 or (page.status in (301, 302) and method == "POST"):
        method, body = "HEAD" if method == "HEAD" else "GET", None
    headers = scrub_headers(request.headers, request.url, target)
    if body is not None and origin_of(target) != origin_of(request.url):
        raise DoNotRetry(
            f"{request.url} sends what was posted on to {origin_of(target)}: write that URL, if it is meant"
        )
    if body is None:
        headers = {name: value for name, value in headers.items() if name.lower() != "content-type"}
    return replace(request, url=target, method=method, body=body, headers=headers)


def read_body(page: Page, response: requests.Response, watch: Watch, max_bytes: int) -> None:
    """Read at most `max_bytes`, unpacked; the rest stays unread, and the connection is closed."""
    received = 0

    def pieces() -> Iterator[bytes]:
        nonlocal received
        # read1 returns what has come; read would wait for a full piece.
        while not watch.has_ended and (piece := response.raw.read1(PIECE_BYTES, decode_content=False)):
            received += len(piece)
            if received > 2 * max_bytes:
                raise DoNotRetry(f"{page.url} sends more than {2 * max_bytes} bytes that unpack to next to nothing")
            yield piece

    packing = response.headers.get("Content-Encoding") or ""
    body = bytearray()
    for piece in unpacked(pieces(), packing, page.url):
        body += piece
        if packing and len(body) > max(RATIO_COUNTS_FROM_BYTES, MAX_RATIO * received):
            raise DoNotRetry(f"{page.url} unpacks to more than {MAX_RATIO} times its size: a bomb, it is not read")
        if len(body) > max_bytes:
            del body[max_bytes:]
            page.is_truncated = True
            break
    page.body = bytes(body)


def refuse_failure(page: Page) -> None:
    """Raise what comes again later: 429, 503 with Retry-After, and 5xx. Other statuses are results."""
    wait = retry_after(page)
    if page.status == 429 or (page.status == 503 and wait is not None):
        raise AskedToWait(page, wait or RETRY_AFTER_SECONDS)
    if page.status >= 500 or page.status < 200:
        raise Retry(f"{page.url} answered {page.status}", wait)


def retry_after(page: Page) -> Optional[float]:
    """Seconds from Retry-After (a number, or a date against the server's own Date), 1 s to 1 h; None without one."""
    text = (page.headers.get("Retry-After") or "").strip()
    try:
        if text.isascii() and text.isdigit():
            seconds = float(text[:20])
        else:
            date = page.headers.get("Date")
            now = parsedate_to_datetime(date).timestamp() if date else time.time()
            seconds = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(MAX_RETRY_AFTER_SECONDS, max(1.0, seconds))


# ---------------------------------------------------------------------------------------------------------------------
# From what a library raised to what the task ends with


def ending_of(error: Exception, request: Request, watch: Watch) -> Exception:
    """Retry, DoNotRetry or Snooze for any exception of a fetch."""
    if isinstance(error, (Retry, DoNotRetry, Snooze)):
        return error
    root = root_of(error)
    if isinstance(error, requests.Timeout) or isinstance(root, TimeoutError):
        return OutOfTime(f"{request.url} took longer than {watch.limit}")
    detail = f"{type(root).__name__}: {str(root)[:300]}" if str(root) else type(root).__name__
    if isinstance(error, requests.exceptions.InvalidURL):
        return DoNotRetry(f"{request.url} leads to a URL that cannot be sent ({detail})")
    if isinstance(error, requests.exceptions.SSLError):
        return Retry(f"{request.url}: no safe connection ({detail}): check its certificate and this device's clock")
    if isinstance(error, requests.exceptions.ProxyError):
        return Retry(f"{request.url}: the proxy of this device cannot be used ({detail}): check crawl_proxy")
    if isinstance(root, HUNG_UP):
        return Retry(f"{request.url}: the server hung up ({detail})")
    return Retry(f"{request.url}: the answer cannot be read ({detail})")


def root_of(error: BaseException) -> BaseException:
    """What is at the bottom: requests wraps urllib3's exceptions, which wrap http.client's."""
    for _ in range(8):
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((part for part in reversed(error.args) if isinstance(part, BaseException)), None)
        if inner is None:
            return error
        error = inner
    return error
