"""How is a URL written, to be fetched, and to be known again?

`fetched_form` is what is sent to a server: one spelling, but nothing changed that a server may tell apart.
`canonical` is what a page is known by in a batch (its unique_key), and equals w3lib.url.canonicalize_url of that form:
query arguments sorted, escapes that need not be undone, dot segments and a query that says nothing gone. It is written
here and not taken from w3lib, because one fleet must agree on it: a page would be crawled twice if one device had
w3lib, another had none, and a third an older one (2.5 was the first to resolve dot segments). A test compares both.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Optional
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit, urlunsplit

MAX_URL_CHARACTERS = 1024  # of a unique_key, too
MAX_WRITTEN_CHARACTERS = 8192  # before its fragment and dot segments are gone
DEFAULT_PORTS = {"http": 80, "https": 443}
HARMLESS_HEADERS = ("user-agent", "accept", "accept-language", "accept-encoding")

# Nothing to do for what looks like this: most links of most pages.
_SIMPLE = re.compile(r"https?://[a-z0-9.-]*[a-z][a-z0-9.-]*(?:/[\w~-][\w.~-]*)*/?", re.ASCII)
_PATH_SAFE = "/:@!$&'()*+,;=~%"
_QUERY_SAFE = _PATH_SAFE + "?[]"
# w3lib's: all that RFC 3986 reserves but "#", and "|".
_CANONICAL_PATH_SAFE = ":/?[]@!$&'()*+,;=|%~"


def fetched_form(url: str, base: str = "") -> Optional[str]:
    """The URL as it is sent, resolved against `base`; None for what is no http(s) URL of up to 1,024 characters.

    Scheme and host in lower case (IDNA), no default port, no user and password, no fragment, dot segments resolved,
    "/" for an empty path, what a URL may not hold percent-encoded as UTF-8, %xx in upper case."""
    if len(url) > MAX_WRITTEN_CHARACTERS:
        return None
    try:
        joined = urljoin(base, url) if base else url
        if _SIMPLE.fullmatch(joined) and len(joined) <= MAX_URL_CHARACTERS and joined.count("/") > 2:
            return joined
        return _normal(joined)
    except ValueError:  # a bad port, an open bracket, a lone surrogate, a host that IDNA refuses
        return None


@lru_cache(maxsize=4096)
def _normal(url: str) -> Optional[str]:
    # As in browsers: a backslash before the query is a slash, so that http://a\@b/ is host a to everybody.
    end = min(at for at in (url.find("?"), url.find("#"), len(url)) if at >= 0)
    parts = urlsplit(url[:end].replace("\\", "/") + url[end:])
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    if scheme not in DEFAULT_PORTS:
        return None
    netloc = _host(host)
    if netloc is None:
        return None
    if parts.port not in (None, DEFAULT_PORTS[scheme]):
        netloc += f":{parts.port}"
    path = without_dot_segments(_escaped(parts.path, _PATH_SAFE))
    normal = urlunsplit((scheme, netloc, path or "/", _escaped(parts.query, _QUERY_SAFE), ""))
    return normal if len(normal) <= MAX_URL_CHARACTERS else None


def _host(host: str) -> Optional[str]:
    """A host in the spelling of a URL; None for what is none."""
    if "%" in host:  # the scope of a link-local address
        return None
    if ":" in host:
        address = ipaddress.IPv6Address(host)
        # Python 3.13 writes mapped addresses in another way than 3.12; as IPv4 there is one way.
        return str(address.ipv4_mapped) if address.ipv4_mapped else f"[{address}]"
    if not host.isascii():
        host = host.encode("idna").decode("ascii").lower()
    if not host.strip(".") or re.search(r"[\s\x00-\x20\x7f<>\"\\^`{|}%/?#@:\[\]]", host):
        return None
    return host


def _escaped(text: str, safe: str) -> str:
    """Percent-encode what is left over; a % that starts no escape is one itself."""
    text = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text)
    return re.sub(r"%[0-9a-f]{2}", lambda match: match.group().upper(), quote(text, safe=safe), flags=re.IGNORECASE)


def without_dot_segments(path: str) -> str:
    """RFC 3986, 5.2.4, for absolute paths: /a/./b/../c -> /a/c"""
    if "/." not in path:
        return path
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


@lru_cache(maxsize=4096)
def canonical(url: str) -> str:
    """What a page is known by; `url` is a fetched form."""
    if _SIMPLE.fullmatch(url):
        return url
    scheme, netloc, path, query, _ = urlsplit(url)
    path, params = _split_params(path)
    # %25, %2F, %3B and %3F say something else than the sign itself: their escape is escaped before all are undone.
    path = re.sub(r"%(25|2F|3B|3F)", r"%25\1", path)
    path = without_dot_segments(quote(unquote_to_bytes(path), safe=_CANONICAL_PATH_SAFE))
    pairs = sorted(
        tuple(unquote_to_bytes(part.replace("+", " ")) for part in piece.partition("=")[::2])
        for piece in query.split("&")
        if piece
    )
    query = "&".join("=".join(quote(part, safe="").replace("%20", "+") for part in pair) for pair in pairs)
    return urlunsplit((scheme, netloc, path + (f";{params}" if params else ""), query, ""))


def _split_params(path: str) -> tuple[str, str]:
    """The last segment's ";parameters" apart; w3lib leaves them as they are."""
    at = path.find(";", path.rfind("/") + 1)
    return (path[:at], path[at + 1 :]) if at >= 0 else (path, "")


def host_of(url: str) -> str:
    """Host and port of a fetched form."""
    return urlsplit(url).netloc


def origin_of(url: str) -> str:
    """Scheme, host and port: http://example.com:8080"""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def scrub_headers(headers: Mapping[str, str], from_url: str, to_url: str) -> dict[str, str]:
    """The headers that may go along: to another host or scheme none that may hold a secret."""
    if origin_of(from_url) == origin_of(to_url):
        return dict(headers)
    return {name: value for name, value in headers.items() if name.lower() in HARMLESS_HEADERS}
