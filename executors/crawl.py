"""How is one page fetched, read, and its links turned into tasks?

task_data (only url is required):
    url               http or https
    method            GET (default), HEAD, or POST without a body
    headers           {name: value}; on a redirect or link to another host only User-Agent and Accept* go along
    timeout_seconds   30; for the whole page, redirects and slow servers included (name resolution apart)
    depth             0; counted up from task to task
    follow            nothing is followed without it; {} follows all links of the same host. In it:
        allow, deny       lists of regular expressions, searched for (re.search) in the link's canonical URL; no allow
                          means every link; deny wins
        same_host         true; host and port of the start URL (after its redirects)
        max_depth         none; links of a page at this depth are not followed
        max_pages         none; the batch gets no more tasks than that
    fields            {name: CSS selector}: text of the first match, or null; a selector in a list, ["a::attr(href)"],
                      gives all matches. Needs parsel: submit such tasks with required_tags ["selectors"]

result: status, final_url, title, links_found (distinct, to http and https), text_length (visible characters, without
white space), bytes, sha256, elapsed_seconds, fields where asked for, and "truncated": true where the page was larger
than 10 MiB (decoded), of which the first 10 MiB count.

Every status below 500 is a result, 404 too, except 429, which snoozes the task by its Retry-After (1 s to 1 h, else 60
s). 5xx, errors of the connection and time-outs are retried. Wrong task_data and more than 5 redirects are not.

Only links of 2xx HTML pages are followed, at most 5,000 or 4 MiB of tasks a page. Children carry the canonical URL as
unique_key, so a batch fetches no page twice. A task without a batch gives its children the batch "crawl-ID": else a
second crawl of the same site would find all its pages known.

This file must not know the master; requests is imported here and nowhere else in executors/.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import importlib.util
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import Any, Optional, Union
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from executors.task_executor import DoNotRetry, Result, Retry, Snooze, TaskExecutor

MAX_BODY_BYTES = 10 * 1024 * 1024
MAX_REDIRECTS = 5
MAX_URL_CHARACTERS = 1024  # of a unique_key, too
MAX_CHILDREN = 5000
MAX_CHILDREN_BYTES = 4 * 1024 * 1024
MAX_TIMEOUT_SECONDS = 3600.0
RETRY_AFTER_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 3600.0
CHUNK_BYTES = 64 * 1024
USER_AGENT = "af-distribution/0.1"
FOLLOW_KEYS = ("allow", "deny", "same_host", "max_depth", "max_pages")
DEFAULT_PORTS = {"http": 80, "https": 443}
HARMLESS_HEADERS = ("user-agent", "accept", "accept-language", "accept-encoding")


class CrawlExecutor(TaskExecutor):
    def __init__(self) -> None:
        super().__init__("crawl")
        self.tags = ("selectors",) if has_parsel() else ()

    def execute_task(self, task_data: dict[str, Any]) -> Result:
        started = time.monotonic()
        order = read_order(task_data)
        left = self.context.deadline_seconds
        timeout = order.timeout_seconds if left is None else max(0.001, min(order.timeout_seconds, left))
        page = fetch(order, timeout, self.context.is_cancelled)
        refuse_failure(page)
        html = decode(page) if is_html(page) else None
        read = read_html(html) if html is not None else PageReader()
        links = read.links_from(page.url)
        result: dict[str, Any] = {
            "status": page.status,
            "final_url": page.url,
            "title": read.title,
            "links_found": len(links),
            "text_length": read.text_length if html is not None else text_length(page),
            "bytes": len(page.body),
            "sha256": hashlib.sha256(page.body).hexdigest(),
            "elapsed_seconds": round(time.monotonic() - started, 4),
        }
        if page.is_truncated:
            result["truncated"] = True
        if order.fields and html is not None:
            result["fields"] = extract_fields(html, order.fields)
        follows = 200 <= page.status < 300
        return Result(result, children(order, page, links, self.context.task) if follows else [])


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


@dataclass(frozen=True)
class Follow:
    allow: list[re.Pattern[str]]
    deny: list[re.Pattern[str]]
    same_host: bool
    max_depth: Optional[int]
    max_pages: Optional[int]


@dataclass(frozen=True)
class Order:
    """A checked task_data. `passed_on` is what children get unchanged."""

    url: str
    method: str
    headers: dict[str, str]
    timeout_seconds: float
    depth: int
    follow: Optional[Follow]
    fields: dict[str, Union[str, list[str]]]
    passed_on: dict[str, Any]


def read_order(task_data: Mapping[str, Any]) -> Order:
    """Check task_data; DoNotRetry names the field and what to write."""
    url = task_data.get("url")
    if not isinstance(url, str) or canonical_url(url.strip()) is None:
        raise DoNotRetry(
            f"task_data.url is {url!r:.200}: write an http or https URL of up to {MAX_URL_CHARACTERS} characters"
        )
    method = task_data.get("method", "GET")
    if method not in ("GET", "HEAD", "POST"):
        raise DoNotRetry(f"task_data.method is {method!r:.100}: write GET, HEAD or POST")
    timeout = task_data.get("timeout_seconds", 30)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise DoNotRetry(f"task_data.timeout_seconds is {timeout!r:.100}: write a number above 0, up to 3600")
    return Order(
        url=url.strip(),
        method=method,
        headers=read_headers(task_data.get("headers")),
        timeout_seconds=float(timeout),
        depth=read_count(task_data.get("depth", 0), "depth", 0) or 0,
        follow=read_follow(task_data.get("follow")),
        fields=read_fields(task_data.get("fields")),
        passed_on={k: task_data[k] for k in ("follow", "fields", "timeout_seconds") if task_data.get(k) is not None},
    )


def read_headers(headers: Any) -> dict[str, str]:
    if headers is None:
        return {}
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise DoNotRetry('task_data.headers must be an object of texts, such as {"Accept-Language": "zh"}')
    return dict(headers)


def read_count(value: Any, name: str, minimum: int) -> Optional[int]:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
        raise DoNotRetry(f"task_data.{name} is {value!r:.100}: write a whole number from {minimum}")
    return value


def read_follow(follow: Any) -> Optional[Follow]:
    if follow is None:
        return None
    if not isinstance(follow, dict):
        raise DoNotRetry('task_data.follow must be an object, such as {"same_host": true, "max_pages": 100}')
    for key in follow:
        # A typing error in a limit would crawl without it.
        if key not in FOLLOW_KEYS:
            near = difflib.get_close_matches(str(key), FOLLOW_KEYS, 1)
            meant = f"did you mean {near[0]}?" if near else f"it may hold {', '.join(FOLLOW_KEYS)}"
            raise DoNotRetry(f"task_data.follow.{key!s:.100} is not known: {meant}")
    same_host = follow.get("same_host", True)
    if not isinstance(same_host, bool):
        raise DoNotRetry(f"task_data.follow.same_host is {same_host!r:.100}: write true or false")
    return Follow(
        allow=read_patterns(follow.get("allow"), "allow"),
        deny=read_patterns(follow.get("deny"), "deny"),
        same_host=same_host,
        max_depth=read_count(follow.get("max_depth"), "follow.max_depth", 0),
        max_pages=read_count(follow.get("max_pages"), "follow.max_pages", 1),
    )


def read_patterns(patterns: Any, name: str) -> list[re.Pattern[str]]:
    if patterns is None:
        return []
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise DoNotRetry(f"task_data.follow.{name} must be a list of regular expressions")
    compiled = []
    for i, pattern in enumerate(patterns):
        try:
            compiled.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            where = f"task_data.follow.{name}[{i}]"
            raise DoNotRetry(f"{where} is {pattern!r:.100}, no regular expression: {error}") from None
    return compiled


def read_fields(fields: Any) -> dict[str, Union[str, list[str]]]:
    if fields is None or fields == {}:
        return {}
    if not isinstance(fields, dict):
        raise DoNotRetry('task_data.fields must be an object of name and CSS selector, such as {"price": ".price"}')
    if not has_parsel():
        raise DoNotRetry('task_data.fields needs parsel on the device: submit it with required_tags ["selectors"]')
    from cssselect import SelectorError
    from parsel.csstranslator import HTMLTranslator

    for name, selector in fields.items():
        css = selector[0] if isinstance(selector, list) and len(selector) == 1 else selector
        if not isinstance(css, str):
            raise DoNotRetry(
                f"task_data.fields.{name} must be a CSS selector, or a list with one of them for all matches"
            )
        try:
            HTMLTranslator().css_to_xpath(css)
        except SelectorError as error:
            raise DoNotRetry(f"task_data.fields.{name} is {css!r:.100}, no CSS selector: {error}") from None
    return fields


def has_parsel() -> bool:
    return importlib.util.find_spec("parsel") is not None


# ---------------------------------------------------------------------------------------------------------------------
# URLs


def canonical_url(url: str, base: str = "") -> Optional[str]:
    """One spelling for one page, and the form that is fetched; None for what is no http(s) URL.

    Scheme and host in lower case (IDNA), no default port, no user and password, no fragment, dot segments resolved,
    "/" for an empty path, what a URL may not hold percent-encoded as UTF-8, %xx in upper case."""
    try:
        parts = urlsplit(urljoin(base, url) if base else url)
        scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
        if scheme not in DEFAULT_PORTS or not host or re.search(r"[\s\x00-\x20<>\"\\^`{|}%/?#@]", host):
            return None
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        netloc = f"[{host}]" if ":" in host else host
        if parts.port not in (None, DEFAULT_PORTS[scheme]):
            netloc += f":{parts.port}"
        path = without_dot_segments(escape(parts.path, "/:@!$&'()*+,;=~%"))
        canonical = urlunsplit((scheme, netloc, path or "/", escape(parts.query, "/:@!$&'()*+,;=~%?[]"), ""))
    except ValueError:  # a bad port, an open bracket, a lone surrogate, a host that IDNA refuses
        return None
    return canonical if len(canonical) <= MAX_URL_CHARACTERS else None


def escape(text: str, safe: str) -> str:
    """Percent-encode what is left over; a % that starts no escape is one itself."""
    text = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text)
    return re.sub(r"%[0-9a-f]{2}", lambda match: match.group().upper(), quote(text, safe=safe), flags=re.IGNORECASE)


def without_dot_segments(path: str) -> str:
    """RFC 3986, 5.2.4, for absolute paths: /a/./b/../c -> /a/c"""
    segments: list[str] = []
    pieces = path.split("/")[1:]
    for piece in pieces:
        if piece == "..":
            segments[-1:] = []
        elif piece != ".":
            segments.append(piece)
    if pieces and pieces[-1] in (".", ".."):
        segments.append("")
    return "/" + "/".join(segments)


def host_of(url: str) -> str:
    """Host and port of a canonical URL."""
    return urlsplit(url).netloc


def scrub_headers(headers: Mapping[str, str], from_url: str, to_url: str) -> dict[str, str]:
    """The headers that may go along: to another host or scheme none that may hold a secret."""
    if urlsplit(from_url)[:2] == urlsplit(to_url)[:2]:
        return dict(headers)
    return {name: value for name, value in headers.items() if name.lower() in HARMLESS_HEADERS}


# ---------------------------------------------------------------------------------------------------------------------
# Fetching, with an end to it


class Watch:
    """Ends the connection in use when the time is up: requests' own timeout starts anew with every byte read."""

    def __init__(self, seconds: float):
        self.is_expired = False
        self._deadline = time.monotonic() + seconds
        self._sock: Any = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Watch:
        _thread.watch = self
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        _thread.watch = None
        with self._lock:
            self._sock = None
        self._timer.cancel()

    def left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def use(self, sock: Any) -> None:
        with self._lock:
            self._sock = sock
        if self.is_expired:
            self._expire()

    def _expire(self) -> None:
        with self._lock:
            self.is_expired = True
            if self._sock is not None:
                try:
                    # Of the plain class: SSLSocket.shutdown would first switch encryption off under the reading thread.
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
                except OSError:
                    pass


_thread = threading.local()


def watch_socket(sock: Any) -> None:
    watch = getattr(_thread, "watch", None)
    if watch is not None and sock is not None:
        watch.use(sock)


class Watched:
    """Mixed into urllib3's connections: tells the watch which socket this thread is about to wait for."""

    sock: Any

    def _new_conn(self) -> Any:
        sock = super()._new_conn()  # type: ignore[misc]
        watch_socket(sock)
        return sock

    def getresponse(self) -> Any:
        watch_socket(self.sock)
        return super().getresponse()  # type: ignore[misc]


class WatchedConnection(Watched, HTTPConnection):
    pass


class WatchedSecureConnection(Watched, HTTPSConnection):
    pass


class WatchedPool(HTTPConnectionPool):
    ConnectionCls = WatchedConnection


class WatchedSecurePool(HTTPSConnectionPool):
    ConnectionCls = WatchedSecureConnection


class WatchedAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": WatchedPool, "https": WatchedSecurePool}


@dataclass
class Page:
    """What came back in the end."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    is_truncated: bool = False


def thread_session() -> requests.Session:
    """One session a thread: connections are kept, cookies are not carried from one task to the next."""
    session = getattr(_thread, "session", None)
    if session is None:
        session = requests.Session()
        session.trust_env = False
        session.headers["User-Agent"] = USER_AGENT
        for scheme in ("http://", "https://"):
            session.mount(scheme, WatchedAdapter(pool_connections=8, pool_maxsize=1))
        _thread.session = session
    session.cookies.clear()
    return session


def fetch(order: Order, timeout: float, is_cancelled: Any) -> Page:
    """Fetch the page, at most 5 redirects further, within `timeout` seconds in all."""
    too_long = Retry(f"{order.url} took longer than {timeout:g} s")
    with Watch(timeout) as watch:
        try:
            page = follow_redirects(order, watch, is_cancelled)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader, UnicodeError) as error:
            raise DoNotRetry(f"task_data.url or task_data.headers cannot be sent: {error}") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if watch.is_expired or isinstance(error, requests.Timeout):
                raise too_long from None
            raise Retry(f"{order.url}: {type(error).__name__}: {error}") from None
        if watch.is_expired:  # the end of the connection may look like the end of the page
            raise too_long
    return page


def follow_redirects(order: Order, watch: Watch, is_cancelled: Any) -> Page:
    """Redirects by hand: requests would send private headers of ours along to another host."""
    session = thread_session()
    url = canonical_url(order.url) or order.url
    method, headers = order.method, order.headers
    for _ in range(MAX_REDIRECTS + 1):
        left = watch.left()
        with session.request(
            method, url, headers=headers, timeout=(left, left), stream=True, allow_redirects=False
        ) as response:
            page = Page(url, response.status_code, response.headers)
            location = response.headers.get("Location")
            if not response.is_redirect or location is None:
                read_body(page, response, watch, is_cancelled)
                return page
        # requests decodes headers as ISO-8859-1, servers that do not escape send UTF-8.
        target = canonical_url(location.encode("latin-1", "replace").decode("utf-8", "replace"), base=url)
        if target is None:
            raise DoNotRetry(f"{url} redirects to {location!r:.200}: only http and https are followed")
        if page.status in (301, 302, 303) and method == "POST":
            method = "GET"
        url, headers = target, scrub_headers(headers, url, target)
    raise DoNotRetry(f"{order.url} redirects more than {MAX_REDIRECTS} times")


def read_body(page: Page, response: requests.Response, watch: Watch, is_cancelled: Any) -> None:
    """Read at most 10 MiB, decoded. read1 returns what has come; read would wait for a full chunk."""
    body = bytearray()
    while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
        body += chunk
        if watch.is_expired:
            break
        if is_cancelled():
            raise DoNotRetry("cancelled while the page was read")
        if len(body) > MAX_BODY_BYTES:
            del body[MAX_BODY_BYTES:]
            page.is_truncated = True
            break
    page.body = bytes(body)


def refuse_failure(page: Page) -> None:
    """Raise what comes again later: 429 and 5xx. Other statuses are results."""
    if page.status == 429:
        raise Snooze(retry_after(page) or RETRY_AFTER_SECONDS, f"{page.url} answered 429")
    if page.status >= 500:
        raise Retry(f"{page.url} answered {page.status}", retry_after(page))


def retry_after(page: Page) -> Optional[float]:
    """Seconds from Retry-After (a number, or a date against the server's own Date), 1 s to 1 h; None without one."""
    text = (page.headers.get("Retry-After") or "").strip()
    if not text:
        return None
    try:
        if text.isdigit():
            seconds = float(text)
        else:
            date = page.headers.get("Date")
            now = parsedate_to_datetime(date).timestamp() if date else time.time()
            seconds = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(MAX_RETRY_AFTER_SECONDS, max(1.0, seconds))


# ---------------------------------------------------------------------------------------------------------------------
# Reading the page


def content_type(page: Page) -> str:
    return (page.headers.get("Content-Type") or "").partition(";")[0].strip().lower()


def is_html(page: Page) -> bool:
    """By Content-Type; without one, by the first bytes."""
    kind = content_type(page)
    if kind:
        return kind in ("text/html", "application/xhtml+xml")
    return bool(re.match(rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b", page.body[:4096], re.I | re.S))


BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Names that pages use for more than they say, as browsers read them.
CHARSETS = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "latin-1": "cp1252"}
NO_CHARSETS = ("punycode", "idna", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7")


def decode(page: Page) -> str:
    """The text of a page by byte order mark, else the header's charset, else <meta>, else UTF-8; the rest is U+FFFD.

    Not requests' own guess: that is ISO-8859-1 for every page whose header does not say."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if page.body.startswith(mark):
            return page.body[len(mark) :].decode(encoding, "replace")
    header = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", page.headers.get("Content-Type") or "", re.IGNORECASE)
    meta = re.search(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?([\w.:-]+)", page.body[:4096], re.IGNORECASE)
    name = charset(header.group(1)) if header else None
    if name is None and meta:
        name = charset(meta.group(1).decode("ascii", "replace"))
    return page.body.decode(name or "utf-8", "replace")


def charset(name: str) -> Optional[str]:
    """Python's name of a page's charset; None for what is none."""
    try:
        codec = codecs.lookup(name)
        b"x".decode(codec.name, "replace")  # refuses codecs that are no charset, such as zip
    except (LookupError, ValueError):
        return None
    return None if codec.name in NO_CHARSETS else CHARSETS.get(codec.name, codec.name)


class PageReader(HTMLParser):
    """Collects title, links and the length of the visible text."""

    SILENT = ("script", "style", "noscript", "template", "title")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text_length = 0
        self._base = ""
        self._hrefs: list[str] = []
        self._title: list[str] = []
        self._has_title = False
        self._silent: list[str] = []

    @property
    def title(self) -> Optional[str]:
        title = " ".join("".join(self._title).split())
        return title[:500] or None

    def links_from(self, page_url: str) -> list[str]:
        """The page's distinct http(s) links as canonical URLs, in order, itself included where it links itself."""
        base = canonical_url(self._base, base=page_url) or page_url
        links = (canonical_url(href.strip(), base=base) for href in self._hrefs)
        return list(dict.fromkeys(link for link in links if link is not None))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        if tag in self.SILENT:
            self._silent.append(tag)
        elif tag in ("a", "area", "base"):
            href = dict(reversed(attrs)).get("href")  # of several the first counts
            if href is not None and tag != "base":
                self._hrefs.append(href)
            elif href and not self._base:
                self._base = href.strip()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        if tag not in self.SILENT:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._has_title = self._has_title or bool(self._title)
        if tag in self._silent:
            del self._silent[self._silent.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text_length += sum(map(len, data.split()))
        elif self._silent[-1] == "title" and not self._has_title:
            self._title.append(data)


def read_html(html: str) -> PageReader:
    """Read as much of the page as can be read."""
    reader = PageReader()
    try:
        reader.feed(html)
        reader.close()
    except (AssertionError, ValueError, RecursionError):
        pass  # what html.parser raises on broken declarations; the links up to there count
    return reader


def text_length(page: Page) -> int:
    """Characters of a plain text that are no white space; 0 for what is no text."""
    if not content_type(page).startswith("text/"):
        return 0
    return sum(map(len, decode(page).split()))


def extract_fields(html: str, fields: Mapping[str, Union[str, list[str]]]) -> dict[str, Any]:
    """The text that each selector finds: of the first match or null, or of all where the selector is in a list."""
    from parsel import Selector

    root = Selector(text=html)

    def texts(css: str) -> list[str]:
        found = root.css(css)
        values = (match.get() if isinstance(match.root, str) else match.xpath("string()").get() for match in found)
        return [" ".join((value or "").split()) for value in values]

    answers: dict[str, Any] = {}
    for name, selector in fields.items():
        answers[name] = texts(selector[0]) if isinstance(selector, list) else next(iter(texts(selector)), None)
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# What comes next


def children(order: Order, page: Page, links: list[str], task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One new task for each link that may be followed; the batch sees to it that a page is fetched once."""
    follow = order.follow
    if follow is None or (follow.max_depth is not None and order.depth >= follow.max_depth):
        return []
    start = canonical_url(order.url) or order.url
    # Only the start page may move the crawl to another host (example.com -> www.example.com).
    host = host_of(page.url) if order.depth == 0 else host_of(start)
    if follow.same_host and host_of(page.url) != host:
        return []
    chosen = [link for link in links if link not in (start, page.url) and may_follow(link, follow, host)]
    new_tasks: list[dict[str, Any]] = []
    bytes_left = MAX_CHILDREN_BYTES
    for link in chosen[:MAX_CHILDREN]:
        new_task = child(order, start, link, task)
        bytes_left -= len(json.dumps(new_task))
        if bytes_left < 0:
            break
        new_tasks.append(new_task)
    return new_tasks


def may_follow(link: str, follow: Follow, host: str) -> bool:
    if follow.same_host and host_of(link) != host:
        return False
    if any(pattern.search(link) for pattern in follow.deny):
        return False
    return not follow.allow or any(pattern.search(link) for pattern in follow.allow)


def child(order: Order, start: str, link: str, task: Mapping[str, Any]) -> dict[str, Any]:
    task_data = {"url": link, "depth": order.depth + 1, **order.passed_on}
    headers = scrub_headers(order.headers, start, link)
    if headers:
        task_data["headers"] = headers
    new_task: dict[str, Any] = {"task_type": "crawl", "task_data": task_data, "unique_key": link}
    new_task["batch"] = task.get("batch") or f"crawl-{task.get('id')}"
    new_task["parent_id"] = task.get("id")
    for name in ("priority", "username", "app_id"):
        if task.get(name) is not None:
            new_task[name] = task[name]
    if task.get("execution_timeout_seconds"):
        new_task["execution_timeout_seconds"] = max(1, int(task["execution_timeout_seconds"]))
    if order.fields:
        new_task["required_tags"] = ["selectors"]
    if order.follow is not None and order.follow.max_pages is not None:
        new_task["max_batch_tasks"] = order.follow.max_pages
    return new_task
