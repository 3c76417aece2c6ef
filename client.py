"""How does a command reach the master? One address, a few retries, and every refusal as one sentence.

It knows the public API only. A master that restarts is waited for; a key that is refused is not tried again. An export
is whole, by its end mark, or an error.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import random
import re
import time
import urllib.parse
from typing import Any, Callable, Iterable, Iterator

import settings as knobs
from settings import ExitCode, Settings, one_line

READ_BYTES = 64 * 1024
# Waits of about 0.5, 1, 2, 4 and 8 s: a master that restarts is back by then. Who tries more often waits 8 s each time,
# and longer only where the master asks for it.
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 8.0
LONGEST_WAIT_SECONDS = 30.0
CONNECT_AND_READ_SECONDS = (5.0, 60.0)
BUSY_STATUSES = (429, 502, 503, 504)


class CommandFailed(Exception):
    """One sentence for stderr and the exit code."""

    def __init__(self, message: str, exit_code: int = ExitCode.UNREACHABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CutOff(CommandFailed):
    """An export that is not whole; the same again may be."""


def master_address(settings: Settings, arguments: argparse.Namespace) -> str:
    """Where commands find the master: what was said last and most clearly, else the mode's own way to know it."""
    says_url = bool(arguments.master_url or os.environ.get("AF_MASTER_URL"))
    says_host = bool(arguments.host or arguments.port)
    if arguments.master_url or (not says_host and (says_url or settings.mode == "worker")):
        return settings.master_url
    if settings.port == 0:
        raise CommandFailed(
            "port 0 means any free port; say which it is with --port or --master-url", ExitCode.SETTINGS
        )
    host = settings.host.strip("[]")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # listens everywhere, so also here
            host = "127.0.0.1" if address.version == 4 else "::1"
        if address.version == 6:
            host = f"[{host}]"
    return f"{'https' if settings.ssl_certificate else 'http'}://{host}:{settings.port}"


class Master:
    """The public API of one master, with the key, bounded retries, and every trouble as one CommandFailed.

    `trust` says which certificates are trusted, and whether http:// may leave private networks. `pause` waits so many
    seconds between two attempts; what it raises ends them. `advice` is for when none succeeds.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        trust: Settings | None = None,
        attempts: int = ATTEMPTS,
        pause: Callable[[float], object] = time.sleep,
        advice: str = "start it, or say where it is with --master-url or --mode",
    ):
        import requests

        from executors.device.trust import MasterAdapter, PlainHttp

        self.url = url
        self._attempts = attempts
        self.pause = pause
        self._advice = advice
        self._errors = requests.exceptions
        self._plain_http = PlainHttp
        self._session = requests.Session()
        self._adapter = MasterAdapter(url, trust)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, self._adapter)
        # A proxy from the environment is never the way to this machine.
        self._session.trust_env = not knobs.is_loopback(urllib.parse.urlsplit(url).hostname or "")

        def authorize(request: Any) -> Any:
            """As an auth hook, so that a .netrc cannot put another password in its place."""
            if api_key:
                request.headers["Authorization"] = f"Bearer {api_key}"
            return request

        self._session.auth = authorize

    def get(self, path: str, **parameters: object) -> dict[str, Any]:
        return self._json(self._answer("GET", path, params=parameters))

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        return self._json(self._answer("POST", path, data=body, headers={"Content-Type": "application/json"}))

    def delete(self, path: str) -> dict[str, Any]:
        return self._json(self._answer("DELETE", path))

    def export(self, batch: str, form: str) -> Iterator[bytes]:
        """The rows of a batch's tasks with their results, as whole_rows gives them; `form` is jsonl or csv."""
        how = {"format": form, "batch": batch, "include": "result"}
        with self._answer("GET", "/tasks/export", params=how, stream=True) as response:
            if response.status_code >= 400:
                self._json(response)
            try:
                yield from whole_rows(response.iter_content(READ_BYTES), form)
            except self._errors.RequestException:
                raise CutOff(f"The master at {self.url} broke off in the middle; run the command again.") from None

    def _answer(self, method: str, path: str, **how: Any) -> Any:
        """The first answer that is not "busy"; every request here may be sent twice, because unique keys make it so."""
        trouble = ""
        for attempt in range(self._attempts):
            wait = min(FIRST_WAIT_SECONDS * 2**attempt, LONGEST_BACKOFF_SECONDS)
            try:
                response = self._session.request(
                    method, f"{self.url}/api/distribution{path}",
                    timeout=CONNECT_AND_READ_SECONDS, allow_redirects=False, verify=self._adapter.verify, **how,
                )  # fmt: skip
            except self._plain_http as error:
                raise CommandFailed(str(error), ExitCode.SETTINGS) from None
            except (self._errors.ConnectionError, self._errors.Timeout, self._errors.ChunkedEncodingError) as error:
                trouble = _reason(error)
            except self._errors.RequestException as error:
                raise CommandFailed(f"{self.url} cannot be asked: {one_line(str(error))}", ExitCode.SETTINGS) from None
            else:
                if response.status_code not in BUSY_STATUSES:
                    return self._judged(response)
                trouble = f"it is busy ({response.status_code})"
                wait = max(wait, _retry_after(response))
                response.close()
            if attempt + 1 < self._attempts:
                self.pause(min(wait, LONGEST_WAIT_SECONDS) * random.uniform(0.8, 1.2))
        raise CommandFailed(f"No master answers at {self.url}: {trouble}; {self._advice}.")

    def _judged(self, response: Any) -> Any:
        status = response.status_code
        if status in (401, 403):
            why = _detail(response) if status == 403 else ""
            said = (
                f"refuses it: {why}"
                if why
                else "refused the key; write its api_key into the config file or set AF_API_KEY."
            )
            raise CommandFailed(f"The master at {self.url} {said}", ExitCode.REFUSED)
        kind = response.headers.get("Content-Type", "")
        if 300 <= status < 400 or "html" in kind or (status >= 400 and "json" not in kind):
            raise self.not_a_master(f" (status {status})")
        return response

    def _json(self, response: Any) -> dict[str, Any]:
        try:
            answer = response.json()
        except (ValueError, self._errors.RequestException):
            answer = None
        if not isinstance(answer, dict):
            raise self.not_a_master()
        if response.status_code >= 400:
            raise Refused(response.status_code, answer)
        return answer

    def not_a_master(self, how: str = "") -> CommandFailed:
        return CommandFailed(f"What answers at {self.url} is no master{how}; check address and port.")


class Refused(CommandFailed):
    """The master understood and said no; `problem` is its application/problem+json."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        detail = one_line(str(problem.get("detail") or problem.get("title") or "no reason given"))
        exit_code = ExitCode.UNREACHABLE if status >= 500 else ExitCode.SETTINGS
        super().__init__(f"The master refused ({status}): {detail}", exit_code)
        self.status, self.detail, self.field = status, detail, str(problem.get("field") or "")


def _reason(error: Exception) -> str:
    """The part of a nested connection error that a person can use."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not trusted here; name your own in ca_file, or write the name that it is for"
    if "Fingerprints did not match" in str(error):
        return "its certificate is not the one in ssl_certificate; a master takes a new one when it is started again"
    if knobs.TLS_ALERT in repr(error):
        return knobs.WANTS_TLS
    if "timed out" in str(error).lower():
        return "it did not answer in time"
    found = re.search(r"\] ([A-Z][A-Za-z ,]+)", str(error))
    return found.group(1).strip().lower() if found else "the connection failed"


def _detail(response: Any) -> str:
    """The sentence of a problem document, "" where there is none."""
    try:
        return one_line(str(response.json()["detail"]))
    except (ValueError, LookupError, TypeError):
        return ""


def _retry_after(response: Any) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"[0-9]{1,6}", value) else 0.0


def whole_rows(pieces: Iterable[bytes], form: str) -> Iterator[bytes]:
    """The rows of an export without its end mark, the names of CSV's columns first; CutOff where it is not whole."""
    rows, last = -1 if form == "csv" else 0, b""
    for row in _csv_rows(pieces) if form == "csv" else _lines(pieces):
        if last:
            yield last
            rows += 1
        last = row
    promised = _end_mark(last, form)
    if promised != rows:
        said = "without its end mark" if promised is None else f"with {rows} of {promised} rows"
        raise CutOff(f"The export ended {said}: it is not complete; run the command again.")


def _csv_rows(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Whole rows: a line end inside a quoted cell does not end its row."""
    lines: list[bytes] = []
    in_quotes = False
    for line in _lines(pieces):
        lines.append(line)
        in_quotes ^= line.count(b'"') % 2 == 1
        if not in_quotes:
            yield b"".join(lines)
            lines = []
    if lines:
        yield b"".join(lines)


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines with their ends; a last one without an end is a line too."""
    rest: list[bytes] = []
    for piece in pieces:
        *whole, tail = piece.split(b"\n")
        for part in whole:
            yield b"".join(rest) + part + b"\n"
            rest = []
        rest.append(tail)
    if any(rest):
        yield b"".join(rest)


def _end_mark(row: bytes, form: str) -> int | None:
    """How many rows the last one promises, None where it is no end mark."""
    if form == "csv":
        found = re.fullmatch(rb"# end rows=([0-9]{1,18})\s*", row)
        return int(found.group(1)) if found else None
    with contextlib.suppress(ValueError, RecursionError):
        mark = json.loads(row)
        if isinstance(mark, dict) and set(mark) == {"end", "rows"} and mark["end"] is True:
            return mark["rows"] if type(mark["rows"]) is int else None
    return None
