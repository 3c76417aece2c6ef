"""How does a request become a call, and what a handler says a reply?

The one way in and out of the API: access first, then the body (read once, capped), then the handler. Every error leaves
as application/problem+json with a stable code and a sentence; what nobody foresaw is logged whole and told in one
sentence. This file knows no route and no table.
"""

from __future__ import annotations

import functools
import gzip
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import bottle

import wire
from access import PUBLIC, SECURITY_HEADERS, Access, Refused, Who, holders, read_body
from addresses import PEER, Addresses, NotAnAddress, is_this_machine, neighbourhood
from artifacts import Busy, ChecksumWrong, NoRoom
from audit import COUNTED, Audit
from connections import Body, Connections, Crowded, shares_with_key, shares_without_key
from devices import DeviceConflict, Superseded, UnknownDevice
from keys import ADMIN, DEVICE, ENROLL, OPERATOR, KeyRefused
from latency import Latency
from openapi import Operation
from rates import DEVICE_SHARE, Rates
from reads import ReadsBusy
from strategies import StrategyError
from wire import Invalid, Query
from writer import StorageFailing, WriterBusy, WriterStopped

log = logging.getLogger("af.web")

STATIC = Path(__file__).resolve().parent / "static"
COMPRESSED = (".js", ".css", ".html", ".svg")
WRITING = ("POST", "PUT", "DELETE", "PATCH")
# What a body may have on a route that takes no tasks and no results. A device says what it holds: 10,000 attempts are
# 0.8 MiB, and some of them have a message.
PUBLIC_BODY_BYTES = 4 * 1024
OPERATOR_BODY_BYTES = 256 * 1024
DEVICE_BODY_BYTES = 2 * 1024 * 1024
UNTOLD = ("/tasks", "/login", "/logout")
"""Paths that leave no row in the audit log for each call: whoever has a small key could fill it with them."""
HSTS = "max-age=31536000"
"""No browser that was here with TLS comes without it within a year."""

#                error           status  code               seconds to wait
KNOWN_ERRORS: tuple[tuple[type[Exception], int, str, int], ...] = (
    (UnknownDevice,   404, "unknown_device",  0),
    (Superseded,      409, "superseded",      0),
    (DeviceConflict,  409, "conflict",        0),
    (StrategyError,   422, "invalid_field",   0),
    (WriterBusy,      503, "busy",            2),
    (ReadsBusy,       503, "busy",            2),
    (TimeoutError,    503, "busy",            2),
    (WriterStopped,   503, "stopping",        2),
    (StorageFailing,  503, "storage_failing", 30),
    (Busy,            503, "busy",            5),
    (Crowded,         503, "busy",            5),
    (NoRoom,          507, "storage_full",    60),
    (ChecksumWrong,   422, "checksum_wrong",  0),
)  # fmt: skip


class Call(NamedTuple):
    """One request, as a handler sees it: the raw body, the query, the names in the path, and who asks. What it writes
    into `told` is kept in the audit log: facts, and instead of what is known anyway `who`, `action` and `object`."""

    body: bytes
    query: Query
    names: dict[str, str]
    who: Who
    environ: dict[str, Any]
    told: dict[str, Any]


class Answer(NamedTuple):
    """A reply that is not plain JSON with status 200; `content`: bytes, an iterator of them, or what becomes JSON."""

    content: Any
    status: int = 200
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Route(NamedTuple):
    """One line of the API: what the document says of it, and the handler that does it."""

    operation: Operation
    handler: Callable[[Call], Any]


def invalid(status: int, code: str, detail: str, field: str | None = None, retry_after: int | None = None) -> Invalid:
    """An error that a handler raises; `retry_after` in seconds becomes a header."""
    error = Invalid(status, code, detail, field)
    if retry_after is not None:
        error.headers["Retry-After"] = str(retry_after)
    return error


class Gate(NamedTuple):
    """What every request passes before anybody asks for a key: whose address it is, and how often it asks."""

    addresses: Addresses
    rates: Rates
    connections: Connections
    audit: Audit

    def let_in(self) -> None:
        """Before bottle looks for a route: so also for paths that do not exist. Raises the refusal as a reply."""
        environ = bottle.request.environ
        try:
            self._check(environ)
        except Refused as refused:
            self.audit.count(refused, None, environ["REMOTE_ADDR"], environ["REQUEST_METHOD"][:16])
            raise _finished(_problem(refused), environ) from None

    def _check(self, environ: dict[str, Any]) -> None:
        try:
            self.addresses.recognize(environ)
        except NotAnAddress as error:
            text = f"A trusted proxy sent {error} without an address in it; see docs/deploy.md for what it has to send."
            raise Refused(400, "bad_forwarded_for", text) from None
        client = environ["REMOTE_ADDR"]
        if not self.addresses.may_come_in(client):
            text = f"Requests from {client} are not taken; allowed_ips in the master's configuration lists who may ask."
            raise Refused(403, "address_not_allowed", text)
        if not is_this_machine(client):
            self._spend(f"address {neighbourhood(client)}", "Your address")

    def check_key(self, who: Who) -> None:
        """How often a key of the database may be used; the one of the configuration may be a whole fleet's."""
        if who.key_id and not is_this_machine(who.address):
            self._spend(f"key {who.key_id}", "This key", DEVICE_SHARE if who.device_id is not None else 1.0)

    def _spend(self, name: str, who: str, share: float = 1.0) -> None:
        seconds = self.rates.seconds_to_wait(name, share)
        if seconds:
            text = f"{who} asks too often; again in {seconds:.1f} s. max_requests_per_second says how often is allowed."
            raise Refused(429, "too_many_requests", text, {"Retry-After": str(math.ceil(seconds))})

    def watch_body(self, environ: dict[str, Any], who: Who, role: str, access: Access) -> None:
        """From here on the body of this request is one that does not keep its thread for ever; `role` is the route's.
        With a key that a fleet shares, what it asks for tells an operator from a device."""
        if _has_unread_body(environ):
            length = str(environ.get("CONTENT_LENGTH") or "0")
            is_operator = who.role in (OPERATOR, ADMIN) and not is_for_devices(role)
            environ["wsgi.input"] = Body(
                environ["wsgi.input"], self.connections, peer=environ[PEER],
                length=int(length) if re.fullmatch("[0-9]{1,18}", length) else 0,
                shares=shares_without_key(who.address) if role == PUBLIC else shares_with_key(
                    who.address, who.key_id, is_device=who.device_id is not None, is_operator=is_operator),
                is_wanted=lambda: access.is_in_force(who), refuse_unwanted=lambda: access.require_in_force(who),
            )  # fmt: skip


def is_for_devices(role: str) -> bool:
    """Whether devices call a route of this role."""
    return not {DEVICE, ENROLL}.isdisjoint(role.split(", "))


def largest_body(operation: Operation, max_body_bytes: int) -> int:
    """The most bytes that a body of this route may have."""
    if operation.is_large:
        return max_body_bytes
    largest = PUBLIC_BODY_BYTES if operation.role == PUBLIC else OPERATOR_BODY_BYTES
    return min(DEVICE_BODY_BYTES if is_for_devices(operation.role) else largest, max_body_bytes)


def make_app(
    routes: Iterable[tuple[str, Iterable[Route]]], access: Access, gate: Gate, max_body_bytes: int, latency: Latency
) -> bottle.Bottle:
    """The WSGI application for (prefix, routes) pairs. Bodies over `max_body_bytes`, and over less where a route needs
    less, are refused unread; `latency` is told how long each reply took, but of those routes that wait for something
    to happen."""
    app = bottle.Bottle(autojson=False)
    app.add_hook("before_request", gate.let_in)
    for prefix, some in routes:
        for route in some:
            path = re.sub(r"\{(name|file)\}", r"<\1:path>", prefix + route.operation.path)
            path = re.sub(r"\{(\w+)\}", r"<\1>", path)
            app.route(path, route.operation.method, _Endpoint(route, access, gate, max_body_bytes, latency))
    app.default_error_handler = _refused_by_bottle
    return app


class _Endpoint:
    """A callable object and no closure: bottle loops for ever when it shows the source of one."""

    def __init__(self, route: Route, access: Access, gate: Gate, max_body_bytes: int, latency: Latency) -> None:
        holders(route.operation.role)  # a route without a role that exists stops the start
        self._route = route
        self._asked = f"{route.operation.method} {route.operation.path}"
        self._is_told = route.operation.method in WRITING and route.operation.path not in UNTOLD
        self._is_told = self._is_told and DEVICE not in route.operation.role
        self._latency = None if any(query.name == "wait" for query in route.operation.query) else latency
        self._access = access
        self._gate = gate
        self._largest_body = largest_body(route.operation, max_body_bytes)

    def __call__(self, **names: str) -> bottle.HTTPResponse:
        environ = bottle.request.environ
        started = time.perf_counter()
        who = None
        try:
            who = self._access.check(environ, self._route.operation.role)
            self._gate.check_key(who)
            response = _response(self._handle(environ, names, who))
        except Exception as error:
            self._gate.audit.count(error, who, environ["REMOTE_ADDR"], self._asked)
            response = _problem(error)
        response = _finished(response, environ)
        if self._latency is not None:
            self._latency.add(time.perf_counter() - started)
        return response

    def _handle(self, environ: dict[str, Any], names: dict[str, str], who: Who) -> Any:
        operation = self._route.operation
        self._gate.watch_body(environ, who, operation.role, self._access)
        _refuse_unreadable_path(environ)
        # A file is read by its handler, which first looks whether it is wanted.
        is_read = operation.method in WRITING and operation.request_type == "application/json"
        body = read_body(environ, self._largest_body) if is_read else b""
        query = Query(environ.get("QUERY_STRING", ""))
        call = Call(body, query, names, who, environ, {})
        try:
            said = self._route.handler(call)
        except Exception as error:
            self._tell(call, _code_of(error))
            raise
        self._tell(call, "ok")
        return said

    def _tell(self, call: Call, outcome: str | None) -> None:
        """Into the audit log; submissions and what devices say are not told, logins and who was not let in counted."""
        if outcome is not None and (self._is_told or "action" in call.told):
            named = wire.clean(" ".join(call.names.values()), 200)
            known = {"who": call.who, "action": self._route.handler.__name__, "object": named}
            self._gate.audit.tell(outcome=outcome, **{**known, **call.told})


def _finished(response: bottle.BaseResponse, environ: Mapping[str, Any]) -> bottle.BaseResponse:
    """With the headers that every reply has."""
    for name, value in SECURITY_HEADERS.items():
        if name not in response.headers:
            response.set_header(name, value)
    if environ["wsgi.url_scheme"] == "https":
        response.set_header("Strict-Transport-Security", HSTS)
    if _has_unread_body(environ):
        # The server closes a connection with an unread body; a client that is not told sends its next call into it.
        response.set_header("Connection", "close")
    return response


def _has_unread_body(environ: Mapping[str, Any]) -> bool:
    is_announced = environ.get("HTTP_TRANSFER_ENCODING") or environ.get("CONTENT_LENGTH") not in (None, "", "0")
    return bool(is_announced) and "af.body" not in environ


def _refuse_unreadable_path(environ: dict[str, Any]) -> None:
    """Bottle drops bytes that are not UTF-8, and would then do to shop-1 what was asked for shop-%FF1."""
    try:
        environ["bottle.raw_path"].encode("latin-1").decode()
    except UnicodeError:
        raise Invalid(400, "bad_path", "The path is not UTF-8; send it percent-encoded in UTF-8.") from None


def _response(said: Any) -> bottle.HTTPResponse:
    if isinstance(said, bottle.HTTPResponse):
        return said
    answer = said if isinstance(said, Answer) else Answer(said)
    content = answer.content
    if answer.kind == "application/json" and content is not None:
        content = wire.encode(content)
    response = bottle.HTTPResponse(b"" if content is None else content, answer.status)
    if content is not None:
        response.set_header("Content-Type", answer.kind)
    for name, value in answer.headers:
        response.set_header(name, value)
    return response


def _code_of(error: Exception) -> str | None:
    """The problem's code; None for those that audit.py counts."""
    if isinstance(error, Invalid | Refused | KeyRefused):
        return None if isinstance(error, Refused) and error.status in COUNTED else error.code
    return next((code for kind, _, code, _ in KNOWN_ERRORS if isinstance(error, kind)), "internal")


def _problem(error: Exception) -> bottle.HTTPResponse:
    if isinstance(error, Invalid | Refused | KeyRefused):
        document = wire.problem(error.status, error.code, error.detail, error.field)
        return _problem_response(document, error.headers)
    for kind, status, code, seconds in KNOWN_ERRORS:
        if isinstance(error, kind):
            seconds = getattr(error, "retry_after", seconds)
            return _problem_response(
                wire.problem(status, code, f"{error}."), {"Retry-After": str(seconds)} if seconds else {}
            )
    log.error("a handler failed", exc_info=error)
    return _problem_response(wire.problem(500, "internal", "The master made a mistake; its log has the details."), {})


def _problem_response(document: dict[str, Any], headers: dict[str, str]) -> bottle.HTTPResponse:
    response = bottle.HTTPResponse(wire.encode(document), document["status"])
    for name, value in {**headers, "Content-Type": "application/problem+json"}.items():
        response.set_header(name, value)
    return response


def _refused_by_bottle(error: bottle.HTTPError) -> bytes:
    """Unknown paths and methods, and what bottle cannot read: its own page would be HTML."""
    texts = {
        404: ("not_found", "There is nothing at this path; /api/distribution/openapi.json lists all there is."),
        405: ("method_not_allowed", "This path does not take that method; see /api/distribution/openapi.json."),
        500: ("internal", "The master made a mistake; its log has the details."),
    }
    status = error.status_code if error.status_code in texts else 500 if error.status_code >= 500 else 400
    code, detail = texts.get(status, ("bad_request", "The request could not be read."))
    bottle.response.set_header("Content-Type", "application/problem+json")
    bottle.response.status = status
    _finished(bottle.response, bottle.request.environ)
    encoded: bytes = wire.encode(wire.problem(status, code, detail))
    return encoded


def static_file(name: str) -> bottle.HTTPResponse:
    """A file of static/, and nothing outside of it, by a link either (bottle itself would follow one)."""
    try:
        path = (STATIC / name).resolve()
        # A file has one name: app.js/ and ./app.js are none.
        is_there = STATIC in path.parents and path.is_file() and path.relative_to(STATIC).as_posix() == name
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        is_there = False
    if not is_there:
        raise Invalid(404, "not_found", "There is no such file.")
    response: bottle.HTTPResponse = bottle.static_file(path.relative_to(STATIC).as_posix(), root=str(STATIC))
    response.set_header("Cache-Control", "no-cache")
    response.set_header("Vary", "Accept-Encoding")
    takes_gzip = "gzip" in bottle.request.get_header("Accept-Encoding", "")
    if takes_gzip and response.status_code == 200 and bottle.request.method == "GET" and path.suffix in COMPRESSED:
        if response.body:
            response.body.close()
        response.body = _gzipped(path, path.stat().st_mtime_ns)
        response.set_header("Content-Length", str(len(response.body)))
        response.set_header("Content-Encoding", "gzip")
    return response


@functools.lru_cache(maxsize=64)
def _gzipped(path: Path, modified_ns: int) -> bytes:
    return gzip.compress(path.read_bytes(), mtime=0)


def stream(lines: Iterator[bytes], kind: str, *headers: tuple[str, str]) -> Answer:
    """A reply that is written while it is made."""
    return Answer(lines, 200, kind, headers)
