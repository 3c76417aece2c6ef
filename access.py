"""Who may ask? Keys, sessions, hosts, origins, and how much of a body is read; on a WSGI environ, without a framework.

No key is needed only while none is configured, no admin key was ever made, and the master listens on loopback. Else a
request carries a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`, or a browser's session cookie, which no route
for devices takes. A cookie is signed with a key derived from the key that it was traded for and from a secret beside
the database: it lives seven days, survives a restart, and ends with that key. Each key has a role. A viewer looks, a
submitter submits, too, an operator acts, too, an admin may do all; a device may speak for itself and nothing else, and
an enroll key may register devices and nothing else.

What a browser can be tricked into (another site's page, a name that suddenly points here) is refused by Host, Origin
and Sec-Fetch-Site. A request with the right key in its header is past that: no strange page can send it.

Whose address it is was decided before, in addresses.py. No key, header or cookie goes into a text or a log.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import os
import re
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from keys import ADMIN, DEVICE, ENROLL, OPERATOR, SUBMITTER, VIEWER, Key, Keys
from settings import Settings, is_for_others

LADDER = (VIEWER, SUBMITTER, OPERATOR, ADMIN)
"""Each of these holds the ones before it; an admin holds device and enroll, too, for any device."""
ROLES = (*LADDER, ENROLL, DEVICE)
PUBLIC = "public"  # the role of what needs no key: the login, the health checks, the page itself

COOKIE = "af_session"
SESSION_SECONDS = 7 * 86_400
SECRET_BYTES = 32
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
    """A request that is not let in: the same facts as a message that is invalid, and the headers that go with it; and
    who it was, if that is known."""

    def __init__(
        self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None, who: Who | None = None
    ):
        super().__init__(detail)
        self.status, self.code, self.detail, self.field = status, code, detail, None
        self.headers, self.who = dict(headers or {}), who


class Who(NamedTuple):
    """Who asks, and by what: key, session, open (no key is needed) or public (nobody in particular)."""

    name: str
    role: str | None
    key_id: int | None
    device_id: str | None
    by: str
    address: str

    @property
    def actor(self) -> str:
        """The key's name; the address of somebody without one."""
        return self.name or self.address


def require_own(who: Who, device_id: str) -> None:
    """A device speaks for itself only, whatever the request says; raises Refused (403)."""
    if who.device_id is not None and who.device_id != device_id:
        text = f"This is the token of the device {who.device_id}; it may not speak for {device_id}."
        raise Refused(403, "not_your_device", text, who=who)


@functools.cache
def holders(role: str) -> frozenset[str]:
    """Which keys may do what `role` may; several roles are written "device, operator". Raises ValueError."""
    if role == PUBLIC:
        return frozenset(ROLES)
    found: set[str] = {ADMIN}
    for one in role.split(", "):
        if one not in ROLES:
            raise ValueError(f"unknown role {one!r}: write {', '.join(ROLES)} or {PUBLIC}")
        found |= set(LADDER[LADDER.index(one) :]) if one in LADDER else {one}
    return frozenset(found)


def _is_for_people(role: str) -> bool:
    return any(one in LADDER for one in role.split(", "))


def session_secret(database: Path) -> bytes:
    """Random bytes in a file beside the database, which no backup has: who reads one cannot sign a session. Made where
    it is missing, and then all sessions end."""
    path = database.with_name(f"{database.name}.sessions")
    found = path.read_bytes() if path.exists() else b""
    if len(found) == SECRET_BYTES:
        return found
    made = secrets.token_bytes(SECRET_BYTES)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o600), "wb") as file:
        file.write(made)
    return made


class Access:
    """The rules, for one configuration. `secret` (`session_secret`) is in each session's signature; `clock` counts
    seconds, `wall` is the time of day (for the end of keys and sessions)."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys | None = None,
        *,
        secret: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.keys = Keys(settings.api_key) if keys is None else keys
        self._may_be_open = not settings.api_key and not is_for_others(settings)
        self._hosts = _allowed_names(settings)
        self._failures = Failures(clock)
        self._secret = secret
        self._wall = wall

    @property
    def is_open(self) -> bool:
        """No key is needed: nobody ever made one, and only this machine can ask."""
        return self._may_be_open and not self.keys.are_wanted

    def check(self, environ: Environ, role: str) -> Who:
        """Let the request in and say who it is, or raise Refused (400, 401, 403, 429)."""
        allowed = holders(role)
        refuse_key_in_url(environ)
        sent = _keys_of(environ)
        now = self._wall()
        key = self._right_one(sent, now)
        if key is None or key.has_ended(now):
            self._check_host(environ)
            who = self._without_key(environ, key, is_wrong=bool(sent), is_public=role == PUBLIC)
        else:
            who = self._who(key, environ, "key")
            self.keys.note_use(key, now, who.address)
        if who.role not in allowed and role != PUBLIC:
            raise Refused(403, "forbidden", _forbidden(who, role), who=who)
        if who.by == "session" and role != PUBLIC and not _is_for_people(role):
            text = "Only a device does this, with its key in a header: a browser's session is for what people do."
            raise Refused(403, "forbidden", text, who=who)
        return who

    def is_in_force(self, who: Who) -> bool:
        """Whether somebody who was let in would be let in still."""
        if who.by == "public":
            return True
        if who.key_id is None:
            return self.is_open
        key = self.keys.get(who.key_id)
        return key is not None and not key.has_ended(self._wall())

    def require_in_force(self, who: Who) -> None:
        """Once a body that took its time is here; raises Refused (401)."""
        if not self.is_in_force(who):
            key = None if who.key_id is None else self.keys.get(who.key_id)
            raise _unauthorized("A key is needed by now.") if key is None else _ended(key, who)

    def _right_one(self, sent: list[bytes], now: float) -> Key | None:
        """The first key that is in force, else one that was once."""
        ended = None
        for text in sent:
            key = self.keys.find(text)
            if key is not None and not key.has_ended(now):
                return key
            ended = ended or key
        return ended

    def _without_key(self, environ: Environ, ended: Key | None, *, is_wrong: bool, is_public: bool) -> Who:
        address = str(environ.get("REMOTE_ADDR", ""))
        if self.is_open:
            if not is_public:
                _check_origin(environ, must_say=False)
            return Who("", ADMIN, None, None, "open", address)
        if is_wrong:
            refused = self._failed(environ) if ended is None else _ended(ended, self._who(ended, environ, "key"))
            # What needs no key must not be the place where wrong keys are tried without end.
            if not is_public or refused.status == 429:
                raise refused
            return Who("", None, None, None, "public", address)
        key = self._session_key(environ)
        if key is not None and not key.has_ended(self._wall()):
            if not is_public:
                _check_origin(environ, must_say=environ.get("REQUEST_METHOD") not in READING)
            return self._who(key, environ, "session")
        if is_public:
            return Who("", None, None, None, "public", address)
        if key is not None:
            raise _ended(key, self._who(key, environ, "session"))
        raise _unauthorized("A key is needed: send `Authorization: Bearer KEY`, or log in on the page.")

    def _who(self, key: Key, environ: Environ, by: str) -> Who:
        return Who(key.name, key.role, key.id, key.device_id, by, str(environ.get("REMOTE_ADDR", "")))

    def log_in(self, environ: Environ, text: str) -> tuple[Who, str]:
        """Who that is, and the Set-Cookie header for their browser; raises Refused (401, 403, 429)."""
        refuse_key_in_url(environ)
        self._check_host(environ)
        _check_origin(environ, must_say=False)
        key = self._right_one([text.encode("utf-8", "surrogatepass")], self._wall())
        if key is None or key.has_ended(self._wall()):
            return self._without_key(environ, key, is_wrong=True, is_public=False), self.log_out(environ)
        if key.role not in LADDER:
            text = f"The key {key.name} is for programs ({key.role}); log in with one of {', '.join(LADDER)}."
            raise Refused(403, "forbidden", text)
        self.keys.note_use(key, self._wall(), str(environ.get("REMOTE_ADDR", "")))
        signed = f"{int(self._wall()) + SESSION_SECONDS}.{secrets.token_hex(8)}.{key.id}"
        return self._who(key, environ, "key"), _cookie(environ, f"{signed}.{self._sign(key, signed)}", SESSION_SECONDS)

    def log_out(self, environ: Environ) -> str:
        """The Set-Cookie header that makes the browser forget its session."""
        return _cookie(environ, "", 0)

    def _failed(self, environ: Environ) -> Refused:
        wait_seconds = self._failures.add(str(environ.get("REMOTE_ADDR", "")))
        if wait_seconds:
            text = f"Too many wrong keys from your address; try again in {wait_seconds} s, or send the right one now."
            return Refused(429, "too_many_failures", text, {"Retry-After": str(wait_seconds)})
        return _unauthorized("This key is wrong: compare it with what the master's admin gave you.")

    def _session_key(self, environ: Environ) -> Key | None:
        """The key that the browser's cookie was traded for, if the cookie is in force; it may have ended."""
        for part in str(environ.get("HTTP_COOKIE", "")).split(";"):
            name, _, value = part.strip().partition("=")
            signed, _, signature = value.rpartition(".")
            said = re.fullmatch(r"([0-9]{1,12})\.[0-9a-f]{16}\.([0-9]{1,18})", signed) if name == COOKIE else None
            key = self.keys.get(int(said[2])) if said else None
            if said is None or key is None:
                continue
            is_ours = hmac.compare_digest(self._sign(key, signed).encode(), signature.encode("latin-1", "replace"))
            if is_ours and 0 < int(said[1]) - self._wall() <= SESSION_SECONDS:
                return key
        return None

    def _sign(self, key: Key, text: str) -> str:
        signing_key = hmac.digest(self._secret + key.digest, b"af_session, version 3", "sha256")
        return hmac.new(signing_key, text.encode("latin-1", "replace"), "sha256").hexdigest()

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
    if not re.search("key|token|auth|afk_|%", query, re.IGNORECASE):
        return  # the usual case, without taking the query apart
    parameters = parse_qsl(query, keep_blank_values=True)
    if any(name.lower() in KEY_PARAMETERS or value.startswith("afk_") for name, value in parameters):
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
        said, host = urlsplit(str(origin)), str(environ.get("HTTP_HOST", "")).lower()
        is_ours = (said.scheme, said.netloc.lower()) == (environ.get("wsgi.url_scheme"), host) and host != ""
    else:
        is_ours = not must_say
    if not is_ours:
        raise Refused(403, "foreign_origin", "A page of another site may not do this; use the master's own page.")


def _cookie(environ: Environ, value: str, seconds: int) -> str:
    secure = "; Secure" if environ.get("wsgi.url_scheme") == "https" else ""
    return f"{COOKIE}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"


def _unauthorized(text: str, code: str = "unauthorized") -> Refused:
    return Refused(401, code, text, {"WWW-Authenticate": 'Bearer realm="distribution"'})


def _ended(key: Key, who: Who) -> Refused:
    """It was right once: whoever sends it guesses nothing, and may know what became of it."""
    how = "expired" if key.revoked_at is None else "revoked"
    has = "has expired" if key.revoked_at is None else "was revoked"
    refused = _unauthorized(f"The key {key.name} {has}: ask an admin of the master for a new one.", f"key_{how}")
    refused.who = who
    return refused


def _forbidden(who: Who, role: str) -> str:
    limits = {ENROLL: ": it registers devices and no more", DEVICE: ": it speaks for its device and no more"}
    limit = limits.get(who.role or "", "")
    higher = " or higher" if role in LADDER[:-1] else ""
    return f"This needs a key of the role {role}{higher}; {who.name} is one of the role {who.role}{limit}."


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
