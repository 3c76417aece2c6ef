"""How does a command reach the master? One address, a few retries, and every refusal as one sentence.

It knows the public API only. A master that restarts is waited for; a key that is refused is not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import random
import re
import time
import urllib.parse
from typing import Any, Callable, Iterator

import settings as knobs
from settings import ExitCode, Settings, one_line

READ_BYTES = 64 * 1024
# Waits of about 0.5, 1, 2, 4 and 8 s: a master that restarts is back by then.
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
CONNECT_AND_READ_SECONDS = (5.0, 60.0)
BUSY_STATUSES = (429, 502, 503, 504)


class CommandFailed(Exception):
    """One sentence for stderr and the exit code."""

    def __init__(self, message: str, exit_code: int = ExitCode.UNREACHABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
    return f"http://{host}:{settings.port}"


class Master:
    """The public API of one master, with the key, bounded retries, and every trouble as one CommandFailed."""

    def __init__(
        self, url: str, api_key: str, *, attempts: int = ATTEMPTS, pause: Callable[[float], None] = time.sleep
    ):
        import requests

        self.url = url
        self._attempts = attempts
        self._pause = pause
        self._errors = requests.exceptions
        self._session = requests.Session()
        # A proxy from the environment is never the way to this machine.
        self._session.trust_env = not knobs.is_loopback(urllib.parse.urlsplit(url).hostname or "")

        def authorize(request: Any) -> Any:
            """As an auth hook, so that a .netrc cannot put another password in its place."""
            if api_key:
                request.headers["Authorization"] = f"Bearer {api_key}"
            return request

        self._session.auth = authorize

    def get(self, path: str, **parameters: object) -> Any:
        return self._json(self._answer("GET", path, params=parameters))

    def post(self, path: str, body: bytes) -> Any:
        return self._json(self._answer("POST", path, data=body, headers={"Content-Type": "application/json"}))

    @contextlib.contextmanager
    def stream(self, path: str, **parameters: object) -> Iterator[Iterator[bytes]]:
        """The body in pieces; a connection that breaks in the middle raises CommandFailed."""
        response = self._answer("GET", path, params=parameters, stream=True)
        if response.status_code >= 400:
            self._json(response)

        def pieces() -> Iterator[bytes]:
            try:
                yield from response.iter_content(READ_BYTES)
            except self._errors.RequestException:
                raise CommandFailed(
                    f"The master at {self.url} broke off in the middle; run the command again."
                ) from None

        try:
            yield pieces()
        finally:
            response.close()

    def _answer(self, method: str, path: str, **how: Any) -> Any:
        """The first answer that is not "busy"; every request here may be sent twice, because unique keys make it so."""
        trouble = ""
        for attempt in range(self._attempts):
            wait = FIRST_WAIT_SECONDS * 2**attempt
            try:
                response = self._session.request(
                    method, f"{self.url}/api/distribution{path}",
                    timeout=CONNECT_AND_READ_SECONDS, allow_redirects=False, **how,
                )  # fmt: skip
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
                self._pause(min(wait, LONGEST_WAIT_SECONDS) * random.uniform(0.8, 1.2))
        raise CommandFailed(
            f"No master answers at {self.url}: {trouble}; start it, or say where it is with --master-url or --mode."
        )

    def _judged(self, response: Any) -> Any:
        status = response.status_code
        if status in (401, 403):
            raise CommandFailed(
                f"The master at {self.url} refused the key; write its api_key into the config file or set AF_API_KEY.",
                ExitCode.REFUSED,
            )
        kind = response.headers.get("Content-Type", "")
        if 300 <= status < 400 or "html" in kind or (status >= 400 and "json" not in kind):
            raise CommandFailed(f"What answers at {self.url} is no master (status {status}); check address and port.")
        return response

    def _json(self, response: Any) -> Any:
        try:
            answer = response.json()
        except (ValueError, self._errors.RequestException):
            raise CommandFailed(f"What answers at {self.url} is no master; check address and port.") from None
        if response.status_code >= 400:
            raise Refused(response.status_code, answer if isinstance(answer, dict) else {})
        return answer


class Refused(CommandFailed):
    """The master understood and said no; `problem` is its application/problem+json."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        detail = one_line(str(problem.get("detail") or problem.get("title") or "no reason given"))
        exit_code = ExitCode.UNREACHABLE if status >= 500 else ExitCode.SETTINGS
        super().__init__(f"The master refused ({status}): {detail}", exit_code)
        self.status, self.detail, self.field = status, detail, str(problem.get("field") or "")


def _reason(error: Exception) -> str:
    """The part of a nested connection error that a person can use."""
    if "timed out" in str(error).lower():
        return "it did not answer in time"
    found = re.search(r"\] ([A-Z][A-Za-z ,]+)", str(error)) or re.search(r"(CERTIFICATE_VERIFY_FAILED)", str(error))
    return found.group(1).strip().lower() if found else "the connection failed"


def _retry_after(response: Any) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"[0-9]{1,6}", value) else 0.0
