"""Who may ask? Keys, sessions, hosts, origins, and how much of a body is read; on a WSGI environ, without a framework.

No key is needed only while none is configured and the master listens on loopback. Else a request carries the key as
`Authorization: Bearer KEY` or `X-API-Key: KEY`, or a browser's session cookie. A cookie is signed with a key derived
from the api_key: it lives seven days, survives a restart, and dies when the api_key changes.

What a browser can be tricked into (another site's page, a name that suddenly points here) is refused by Host, Origin
and Sec-Fetch-Site. A request with the right key in its header is past that: no strange page can send it.

The peer is the socket's; X-Forwarded-For is never believed. No key, header or cookie goes into a text or a log.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from settings import Settings, is_loopback

VIEWER, SUBMITTER, OPERATOR, DEVICE, ADMIN = ROLES = ("viewer", "submitter", "operator", "device", "admin")
PUBLIC = "public"  # the role of what needs no key: the login, the health checks, the page itself

COOKIE = "af_session"
SESSION_SECONDS = 7 * 86_400
FAILURES_PER_MINUTE = 10
PEERS_REMEMBERED = 4_096
PIECE_BYTES = 256 * 1024
READING = ("GET", "HEAD", "OPTIONS")
KEY_PARAMETERS = frozenset({"key", "token", "api_key", "apikey", "access_token", "x-api-key", "authorization"})

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
        " font-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""For every reply; a static file says `Cache-Control: no-cache` instead."""

Environ = Mapping[str, Any]


class Refused(Exception):
    """A request that is not let in: the same facts as a message that is invalid, and the headers that go with it."""

    def __init__(self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.status, self.code, self.detail, self.field = status, code, detail, None
        self.headers = dict(headers or {})


class Access:
    """The rules, for one configuration. `clock` counts seconds, `wall` is the time of day (for a session's end)."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        key = settings.api_key.encode()
        self.is_open = not key and is_loopback(settings.host)
        self._digest = hashlib.sha256(key).digest() if key else None
        self._signing_key = hmac.digest(key, b"af_session, version 1", "sha256") if key else secrets.token_bytes(32)
        self._hosts = _allowed_names(settings)
        self._failures = Failures(clock)
        self._wall = wall

    def check(self, environ: Environ, role: str) -> str:
        """Let the request in, or raise Refused (400, 401, 403, 429). Returns by what: key, session, open or public."""
        if role not in ROLES and role != PUBLIC:
            raise ValueError(f"unknown role {role!r}")
        refuse_key_in_url(environ)
        keys = _keys_of(environ)
        if any(self._is_right(key) for key in keys):
            return "key"  # today one key holds every role
        self._check_host(environ)
        if role == PUBLIC:
            return "public"
        if self.is_open:
            _check_origin(environ, must_say=False)
            return "open"
        if keys:
            raise self._failed(environ)
        if not self._has_session(environ):
            raise _unauthorized("A key is needed: send `Authorization: Bearer KEY`, or log in on the page.")
        _check_origin(environ, must_say=environ.get("REQUEST_METHOD") not in READING)
        return "session"

    def log_in(self, environ: Environ, key: str) -> str:
        """The Set-Cookie header for a browser that knows the key; raises Refused (401, 403, 429)."""
        refuse_key_in_url(environ)
        self._check_host(environ)
        _check_origin(environ, must_say=False)
        if not self.is_open and not self._is_right(key.encode("utf-8", "surrogatepass")):
            raise self._failed(environ)
        expires = f"{int(self._wall()) + SESSION_SECONDS}.{secrets.token_hex(8)}"
        return _cookie(environ, f"{expires}.{self._sign(expires)}", SESSION_SECONDS)

    def log_out(self, environ: Environ) -> str:
        """The Set-Cookie header that makes the browser forget its session."""
        return _cookie(environ, "", 0)

    def _is_right(self, key: bytes) -> bool:
        # Digests of equal length are compared as bytes, so the time says nothing about the key, and any byte may come.
        given = hashlib.sha256(key).digest()
        return self._digest is not None and hmac.compare_digest(given, self._digest)

    def _failed(self, environ: Environ) -> Refused:
        wait_seconds = self._failures.add(str(environ.get("REMOTE_ADDR", "")))
        if wait_seconds:
            text = f"Too many wrong keys from your address; try again in {wait_seconds} s, or send the right one now."
            return Refused(429, "too_many_failures", text, {"Retry-After": str(wait_seconds)})
        return _unauthorized("This key is wrong: compare it with api_key in the master's configuration.")

    def _sign(self, text: str) -> str:
        return hmac.new(self._signing_key, text.encode("latin-1", "replace"), "sha256").hexdigest()

    def _has_session(self, environ: Environ) -> bool:
        for part in str(environ.get("HTTP_COOKIE", "")).split(";"):
            name, _, value = part.strip().partition("=")
            signed, _, signature = value.rpartition(".")
            if name == COOKIE and re.fullmatch(r"[0-9]{1,12}\.[0-9a-f]{16}", signed):
                is_ours = hmac.compare_digest(self._sign(signed).encode(), signature.encode("latin-1", "replace"))
                if is_ours and int(signed.partition(".")[0]) > self._wall():
                    return True
        return False

    def _check_host(self, environ: Environ) -> None:
        """Against DNS rebinding: a name that somebody else controls must not lead a browser here."""
        host = str(environ.get("HTTP_HOST", "")).lower()
        name = _without_port(host)
        if _is_address(name) or name == "localhost" or name.endswith(".localhost"):
            return
        if name.rstrip(".") in self._hosts or host in self._hosts:
            return
        text = "This Host is not one of ours; use the address, or add the name to allowed_hosts in the configuration."
        raise Refused(403, "host_not_allowed", text)


class Failures:
    """Wrong keys by peer in the last minute, for at most 4,096 peers: the longest unseen are forgotten first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._moments: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, peer: str) -> int:
        """Note a wrong key; returns the seconds to wait if there were more than ten in this minute, else 0."""
        now = self._clock()
        name = _peer_name(peer)
        with self._lock:
            recent = [moment for moment in self._moments.pop(name, []) if now - moment < 60.0]
            is_too_many = len(recent) >= FAILURES_PER_MINUTE
            if not is_too_many:
                recent.append(now)
            self._moments[name] = recent
            while len(self._moments) > PEERS_REMEMBERED:
                self._moments.popitem(last=False)
        return max(1, round(60.0 - (now - recent[0]))) if is_too_many else 0


# ---------------------------------------------------------------------------------------- parts of a request


def refuse_key_in_url(environ: Environ) -> None:
    """A key in a URL ends up in logs and histories: refuse it, so that nobody gets used to it."""
    query = str(environ.get("QUERY_STRING", ""))
    if not re.search("key|token|auth|%", query, re.IGNORECASE):
        return  # the usual case, without taking the query apart
    if any(name.lower() in KEY_PARAMETERS for name, _ in parse_qsl(query, keep_blank_values=True)):
        text = "Never put the key into a URL, where logs keep it; send it as a header, and change it if it was real."
        raise Refused(400, "key_in_url", text)


def require_kind(environ: Environ, kind: str, code: str) -> None:
    """Refuse a body of another type (415): a page of another site cannot send ours without asking first."""
    if str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip().lower() != kind:
        raise Refused(415, code, f"Send `Content-Type: {kind}`.")


def read_body(environ: dict[str, Any], limit: int) -> bytes:
    """The whole body, read once and kept; raises Refused (400 cut off, 411 chunked, 413 too large, 415 no JSON)."""
    kept = environ.get("af.body")
    if isinstance(kept, bytes):
        return kept
    length = announced_length(environ, limit)
    if length:
        require_kind(environ, "application/json", "not_json")
    body = b"".join(_parts(environ["wsgi.input"], length))
    environ["af.body"] = body
    return body


def open_upload(environ: dict[str, Any], limit: int) -> tuple[int, Iterator[bytes]]:
    """A body that is a file: its length, and its bytes in pieces while they come in; raises Refused as read_body does,
    400 cut off only once the pieces end too early."""
    if not environ.get("CONTENT_LENGTH") and not environ.get("HTTP_TRANSFER_ENCODING"):
        raise Refused(411, "length_required", "Send the file as the body, with its Content-Length.")
    length = announced_length(environ, limit)
    require_kind(environ, "application/octet-stream", "not_octets")

    def parts() -> Iterator[bytes]:
        yield from _parts(environ["wsgi.input"], length)
        environ["af.body"] = b""  # all of it was read: the connection can go on

    return length, parts()


def announced_length(environ: Environ, limit: int) -> int:
    """The body's length as its header says; raises Refused (400, 411 chunked, 413 too large)."""
    if environ.get("HTTP_TRANSFER_ENCODING"):
        text = "Send the body with a Content-Length, not in chunks."
        raise Refused(411, "length_required", text)
    length_text = str(environ.get("CONTENT_LENGTH") or "0")
    if not re.fullmatch(r"[0-9]{1,18}", length_text):
        raise Refused(400, "bad_length", "Content-Length must be a whole number.")
    length = int(length_text)
    if length > limit:
        text = f"The body has {length} bytes; at most {limit} are accepted. Send it in smaller parts."
        raise Refused(413, "too_large", text)
    return length


def _parts(stream: Any, length: int) -> Iterator[bytes]:
    missing = length
    while missing:
        part = stream.read(min(missing, PIECE_BYTES))
        if not part:
            text = f"The body ended after {length - missing} of {length} bytes; send it again."
            raise Refused(400, "cut_off", text)
        yield part
        missing -= len(part)


def _keys_of(environ: Environ) -> list[bytes]:
    """The keys in the headers, as the bytes that were sent."""
    found = []
    scheme, _, credentials = str(environ.get("HTTP_AUTHORIZATION", "")).strip().partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        found.append(credentials.strip())
    if environ.get("HTTP_X_API_KEY"):
        found.append(str(environ["HTTP_X_API_KEY"]).strip())
    return [key.encode("latin-1", "replace") for key in found]


def _check_origin(environ: Environ, *, must_say: bool) -> None:
    """Only our own pages may use a browser's session, or an open master; with must_say silence is refused too."""
    is_reading = environ.get("REQUEST_METHOD") in READING
    site = environ.get("HTTP_SEC_FETCH_SITE")
    origin = environ.get("HTTP_ORIGIN")
    if site is not None:
        is_ours = site == "same-origin" or (is_reading and site == "none")
    elif origin is not None:
        is_ours = urlsplit(str(origin)).netloc.lower() == str(environ.get("HTTP_HOST", "")).lower() != ""
    else:
        is_ours = not must_say
    if not is_ours:
        raise Refused(403, "foreign_origin", "A page of another site may not do this; use the master's own page.")


def _cookie(environ: Environ, value: str, seconds: int) -> str:
    secure = "; Secure" if environ.get("wsgi.url_scheme") == "https" else ""
    return f"{COOKIE}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"


def _unauthorized(text: str) -> Refused:
    return Refused(401, "unauthorized", text, {"WWW-Authenticate": 'Bearer realm="distribution"'})


def _allowed_names(settings: Settings) -> frozenset[str]:
    machine = socket.gethostname().lower()
    names = {settings.host.lower(), machine, f"{machine}.local", machine.partition(".")[0]}
    return frozenset(filter(None, names | {name.lower().rstrip(".") for name in settings.allowed_hosts}))


def _without_port(host: str) -> str:
    """ "[::1]:8000" -> "::1", "shop:8000" -> "shop"; "" for what is no host."""
    bracketed = re.fullmatch(r"\[([0-9a-f:.]+)\](:[0-9]{1,5})?", host)
    if bracketed:
        return bracketed[1]
    plain = re.fullmatch(r"([a-z0-9_.\-]+)(:[0-9]{1,5})?", host)
    return plain[1] if plain else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _peer_name(peer: str) -> str:
    """What counts as one peer: an IPv4 address, or an IPv6 network of 64 bits, since a home has a whole one."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer[:64]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
