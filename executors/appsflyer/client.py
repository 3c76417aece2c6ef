"""How is AppsFlyer asked?

With the token in a header, to the device's appsflyer_url only. A report may be answered by a redirect to a signed URL
on another host: it is followed here, by hand, without the token. That URL is as good as a password, so neither it nor
an error's text that may hold it leaves this file: errors are told in words of ours.

Time limits: 15 s to connect, 300 s for AppsFlyer to make a report, 120 s between two pieces of it, and the task's own
time for all of it. It must not know what a report's rows mean.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional
from urllib.parse import quote, urlencode, urljoin, urlsplit

import requests
import urllib3
from requests.auth import AuthBase

from executors.appsflyer.answers import Answer, raise_for
from executors.appsflyer.pacing import Key, Pacing
from executors.task_executor import DoNotRetry, Retry

DEFAULT_URL = "https://hq1.appsflyer.com"
CONNECT_SECONDS = 15.0
ANSWER_SECONDS = 300.0
PIECE_SECONDS = 120.0
TASK_SECONDS = 3600.0
# What is kept of the task's time for the report about its end.
MARGIN_SECONDS = 2.0
MAX_REDIRECTS = 3
MAX_LIST_BYTES = 16 * 1024 * 1024
MAX_ERROR_BYTES = 16 * 1024
PIECE_BYTES = 64 * 1024
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)


class NoUrls(logging.Filter):
    """urllib3 warns of odd response headers with the whole URL, which may be a signed one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "url=" not in str(record.msg)


logging.getLogger("urllib3.connectionpool").addFilter(NoUrls())


class Bearer(AuthBase):
    """The token, or with None nothing at all: given as auth, it also keeps requests from a ~/.netrc."""

    def __init__(self, token: Optional[str]):
        self._token = token

    def __call__(self, request: Any) -> Any:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Limits:
    """What ends a task's requests from outside: its time, and its cancellation."""

    def __init__(self, seconds: Optional[float], is_cancelled: Callable[[], bool], clock: Any = time.monotonic):
        self._seconds = TASK_SECONDS if seconds is None else seconds
        self._clock = clock
        self._end = clock() + max(0.0, self._seconds - MARGIN_SECONDS)
        self._is_cancelled = is_cancelled

    def left(self) -> float:
        """Seconds; raises when there are none, or when the task was cancelled."""
        if self._is_cancelled():
            raise DoNotRetry("cancelled")
        left: float = self._end - self._clock()
        if left <= 0:
            raise Retry(f"it was not done within the task's {self._seconds:.0f} s: give it a longer execution_timeout")
        return left


class Client:
    """One task's connection to AppsFlyer; used in a with statement."""

    def __init__(self, key: Key, token: str, limits: Limits, pacing: Pacing):
        self.key = key
        self._token = token
        self._limits = limits
        self._pacing = pacing
        self._is_local = is_local(key.url)
        self._session = requests.Session()
        # Proxies and CA bundles of the environment count, but a service on this machine is asked directly.
        self._session.trust_env = not self._is_local
        self._session.headers["User-Agent"] = "af-distribution"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: Any) -> None:
        self._session.close()

    def get_json(self, path: str, query: Mapping[str, Any]) -> Any:
        """The JSON of an answer with status 200; anything else raises what is to be done."""
        with self._ask(path, query, "application/json") as response:
            self._refuse_failure(response)
            content = self._read(response, MAX_LIST_BYTES)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Retry("AppsFlyer answered 200 with what is no JSON", after=60.0) from None

    @contextlib.contextmanager
    def report(self, path: str, query: Mapping[str, Any]) -> Iterator[Body]:
        """The body of a report, while it comes; anything but a report raises what is to be done."""
        with self._ask(path, query, "text/csv") as response:
            if not response.is_redirect:
                self._refuse_failure(response)
                yield Body(response, self._limits)
                return
            self._pacing.note_success(self.key)
            target = self._target(response)
        for _ in range(MAX_REDIRECTS):
            with self._fetch(target) as response:
                if not response.is_redirect:
                    self._refuse_no_report(response)
                    yield Body(response, self._limits)
                    return
                target = self._target(response)
        raise Retry(f"the report is behind more than {MAX_REDIRECTS} redirects", after=60.0)

    def _ask(self, path: str, query: Mapping[str, Any], accept: str) -> requests.Response:
        with in_words("AppsFlyer"):
            return self._get(self.key.url + path, accept, self._token, ANSWER_SECONDS, query)

    def _fetch(self, url: str) -> requests.Response:
        """What a signed URL holds: asked without the token, as whoever has the URL may."""
        self._session.cookies.clear()
        with in_words("where the report is stored"):
            return self._get(url, "text/csv", None, PIECE_SECONDS, {})

    def _get(
        self, url: str, accept: str, token: Optional[str], seconds: float, query: Mapping[str, Any]
    ) -> requests.Response:
        left = self._limits.left()
        return self._session.get(
            url,
            # A space as %20: the form with + is read by most servers, not by all.
            params=urlencode(query, quote_via=quote),
            headers={"Accept": accept},
            auth=Bearer(token),
            timeout=(min(CONNECT_SECONDS, left), min(seconds, left)),
            stream=True,
            allow_redirects=False,
        )

    def _target(self, response: requests.Response) -> str:
        """Where a redirect leads: https anywhere, http only from this machine to this machine."""
        target = urljoin(response.url, response.headers.get("Location", ""))
        scheme = urlsplit(target).scheme
        if scheme == "https" or (scheme == "http" and self._is_local and is_local(target)):
            return target
        raise DoNotRetry("the report is behind a redirect to what is no https address: it is not followed")

    def _refuse_failure(self, response: requests.Response) -> None:
        if response.status_code == 200:
            self._pacing.note_success(self.key)
            return
        if response.is_redirect or response.status_code < 400:
            raise Retry(f"AppsFlyer answered {response.status_code} where an answer was expected", after=300.0)
        text = self._read(response, MAX_ERROR_BYTES).decode("utf-8", "replace").replace(self._token, "***")
        raise_for(Answer(response.status_code, text, response.headers), self.key, self._pacing)

    def _refuse_no_report(self, response: requests.Response) -> None:
        """A signed URL that has run out or was used is asked for anew, which is one more download."""
        if response.status_code != 200:
            hint = Answer(response.status_code, "", response.headers).retry_after
            raise Retry(f"where the report is stored the answer was {response.status_code}", after=hint)

    def _read(self, response: requests.Response, limit: int) -> bytes:
        body = Body(response, self._limits)
        content = bytearray()
        while len(content) < limit and (piece := body.piece()):
            content += piece
        return bytes(content[:limit])


class Body(io.RawIOBase):
    """A response's decoded body as a file to read once; counts what came, and ends with the task's time."""

    def __init__(self, response: requests.Response, limits: Limits):
        super().__init__()
        self.status = response.status_code
        self.received_bytes = 0
        length = response.headers.get("Content-Length", "")
        self.expected_bytes = int(length) if length.isdigit() and "Content-Encoding" not in response.headers else 0
        self._raw = response.raw
        self._limits = limits
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._left or self.piece()
        count = min(len(buffer), len(piece))
        buffer[:count], self._left = piece[:count], piece[count:]
        return count

    def piece(self) -> bytes:
        """What has come by now, at least a byte; b"" at the end. read1, because read would wait for all it may."""
        self._limits.left()
        with in_words("the answer's sender"):
            piece: bytes = self._raw.read1(PIECE_BYTES, decode_content=True)
        self.received_bytes += len(piece)
        return piece


@contextlib.contextmanager
def in_words(what: str) -> Iterator[None]:
    """A network error as a Retry whose sentence holds no URL: an error's own text may."""
    try:
        yield
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
        raise Retry(f"{what} did not answer in time") from None
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError):
        raise Retry(f"{what} has a certificate that is not accepted here: check this device's clock and CA") from None
    except requests.exceptions.ProxyError:
        raise Retry(f"{what} cannot be reached through the proxy of HTTPS_PROXY") from None
    except (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError):
        raise Retry(f"{what} cut the connection in the middle") from None
    except FAILURES as error:
        raise Retry(f"{what} cannot be reached ({type(error).__name__})") from None


def base_url(settings: Mapping[str, Any]) -> str:
    return str(settings.get("appsflyer_url") or DEFAULT_URL)


def is_local(url: str) -> bool:
    """Whether the URL is of this machine."""
    return (urlsplit(url).hostname or "") in LOOPBACK
