"""What do people who mean no good send? Bodies, queries, paths and whole requests that no route may take.

Every body is one that each route refuses: it is no JSON, or no message of any route. `request` writes what no HTTP
client would; `heads` are the ways to spoil the request of a route that would be in order otherwise.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

MARK = "INJECTED-4711"
"""Stands behind a line feed wherever one can be sent: no line of a log may begin with it."""
BIG = 2**63


def text(value: str) -> bytes:
    return b'{"x": "' + value.encode("utf-8", "surrogatepass") + b'"}'


def number(value: str) -> bytes:
    return b'{"x": ' + value.encode() + b"}"


def bodies() -> dict[str, bytes]:
    """More than 120, each refused by every route that takes JSON."""
    found: dict[str, bytes] = {
        "a word": b"hello", "a brace": b"{", "a bracket": b"[", "a quote": b'"', "a closing brace": b"}", "a comma": b",",
        "two values": b"{} {}", "a value and a word": b"{} x", "trailing comma": b'{"a": 1,}', "leading comma": b'{,"a": 1}',
        "no colon": b'{"a" 1}', "no value": b'{"a":}', "no key": b'{:1}', "single quotes": b"{'a': 1}", "bare key": b"{a: 1}",
        "a comment": b'{"a": 1} // so', "a comment inside": b'{/* */"a": 1}', "hex": number("0x10"), "octal": number("010"),
        "plus": number("+1"), "a dot first": number(".5"), "a dot last": number("5."), "an open exponent": number("1e"),
        "two minus": number("--1"), "an underscore": number("1_000"), "Python's True": number("True"), "None": number("None"),
        "undefined": number("undefined"), "a function": number("alert(1)"), "yaml": b"a: 1\nb: 2\n", "xml": b"<?xml version='1.0'?><a/>",
        "an entity bomb": b'<!DOCTYPE a [<!ENTITY b "cccc"><!ENTITY d "&b;&b;&b;">]><a>&d;</a>', "a form": b"a=1&b=2",
        "multipart": b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--\r\n", "php": b'a:1:{s:1:"a";i:1;}',
        "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.", "msgpack": b"\x81\xa1a\x01",
        "cbor": b"\xa1aa\x01", "bson": b"\x0c\0\0\0\x10a\0\1\0\0\0\0", "gzip": gzip.compress(b'{"task_type": "echo"}', mtime=0),
        "an ELF": b"\x7fELF" + bytes(60), "a picture": b"\x89PNG\r\n\x1a\n" + bytes(20), "a jwt": b"eyJhbGciOiJub25lIn0" b".e30.",
        "json lines": b'{"a": 1}\n{"a": 2}\n', "jsonp": b'cb({"a": 1})', "xssi": b")]}',\n{}", "a template": b"{{7*7}}", "sql": b"1; DROP TABLE af_task;--",
        "NaN alone": b"NaN", "Infinity alone": b"Infinity", "-Infinity alone": b"-Infinity", "NaN": number("NaN"), "Infinity": number("Infinity"),
        "-Infinity": number("-Infinity"), "nan": number("nan"), "inf": number("inf"), "1e400": number("1e400"), "-1e400": number("-1e400"),
        "1e99999": number("1e99999"), "1E+400": number("1E+400"), "1e-400": number("1e-400"), "2**63": number(str(BIG)), "-2**63-1": number(str(-BIG - 1)),
        "2**64": number(str(2**64)), "2**1024": number(str(2**1024)), "5,000 digits": number("9" * 5000), "100,000 digits": number("9" * 100_000),
        "a long fraction": number("0." + "1" * 100_000), "a long exponent": number("1e" + "0" * 5000 + "1"),
        "a lone surrogate": text("\\ud800"), "a lone low surrogate": text("\\udc00"), "surrogates reversed": text("\\udc00\\ud800"),
        "a surrogate in UTF-8": text("\ud800"), "a surrogate as key": b'{"\\ud800": 1}', "an open escape": text("\\"), "a short escape": text("\\u12"),
        "an unknown escape": text("\\x41"), "an escaped NUL": text("\\u0000"), "NUL as key": b'{"\\u0000": 1}', "a raw NUL": text("\0"), "raw NULs": b"\0" * 100,
        "a raw line feed": text(f"a\n{MARK}"), "an escaped line feed": text(f"a\\n{MARK}"), "an escape sequence": text("\\u001b[31m"),
        "a key with a line feed": f'{{"a\\r\\n{MARK}": 1}}'.encode(), "a separator": text("a\\u2028b"), "bidi": text("\u202eevil"),
        "overlong slash": b'{"x": "\xc0\xaf"}', "overlong NUL": b'{"x": "\xc0\x80"}', "five bytes": b'{"x": "\xf8\x88\x80\x80\x80"}', "past Unicode": b'{"x": "\xf4\x90\x80\x80"}',
        "cut UTF-8": b'{"x": "\xe8\xaf', "latin-1": b'{"x": "\xe9"}', "0xff": b"\xff" * 64, "a BOM": b"\xef\xbb\xbf{}", "a BOM and a task": b'\xef\xbb\xbf{"task_type": "echo"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"), "UTF-16 BE": '{"a": 1}'.encode("utf-16-be"), "UTF-32": '{"a": 1}'.encode("utf-32"), "UTF-7": b"+AHsAfQ-",
        "null": b"null", "true": b"true", "one": b"1", "minus zero": b"-0", "a float": b"1.5", "a text": b'"text"', "an empty text": b'""', "a list of a list": b"[[]]",
        "a list of null": b"[null]", "a list of one": b"[1]", "a list of text": b'["task_type"]', "nulls": b"[null, null]", "an empty key": b'{"": 1}',
        "a proto": b'{"__proto__": {"role": "admin"}}', "a constructor": b'{"constructor": {"prototype": {"a": 1}}}', "a class": b'{"__class__": "os.system"}',
        "an operator": b'{"$where": "1"}', "equal keys": b'{"x": 1, "x": 2}', "1,000 equal keys": b"{" + b'"x": 1, ' * 1000 + b'"x": 1}',
        "10,000 keys": ("{" + ", ".join(f'"k{n}": {n}' for n in range(10_000)) + "}").encode(), "a long key": b'{"' + b"k" * 100_000 + b'": 1}',
        "colliding keys": json.dumps({f"{n:x}" * 9: n for n in range(2000)}).encode(), "a long text": text("x" * 1_000_000), "spaces": b" " * 100_000,
        "spaces and a brace": b" " * 100_000 + b"{", "escapes": text("\\u0041" * 20_000), "html": text("<script>alert(1)</script>"), "a quote out": text("\\\" OR 1=1 --"),
        "a formula": text("=HYPERLINK(1)"), "a format": text("%s%n{0.__class__}${jndi:ldap://127.0.0.1/x}"), "a path": text("../../../../etc/passwd"),
        "wrong kinds": b'{"task_type": 5, "status": {}, "reason": [], "device_id": null, "key": {}, "boot_id": 1, "limits": 5, "strategy": [], "role": 1, "value": 5, "device_name": 7}',
        "null everywhere": b'{"task_type": null, "status": null, "device_id": null, "boot_id": null, "seq": null, "key": null, "limits": null, "strategy": null, "role": null, "action": null, "x": null}',
    }  # fmt: skip
    for levels in (33, 500, 1_000, 10_000, 100_000):
        found[f"{levels} objects deep"] = b'{"a":' * levels + b"1" + b"}" * levels
        found[f"{levels} lists deep"] = b"[" * levels + b"]" * levels
        found[f"{levels} open lists"] = b"[" * levels
        found[f"{levels} open objects"] = b'{"a":' * levels
        found[f"{levels} deep in a field"] = b'{"task_data": ' + b"[" * levels + b"]" * levels + b"}"
    return found


QUERIES = {
    "not UTF-8": "x=%ff", "overlong": "x=%c0%af", "a surrogate": "x=%ed%a0%80", "raw bytes": "x=\xff\xfe", "65 parameters": "&".join(f"a{n}=1" for n in range(65)),
    "6,000 parameters": "&".join(f"a{n}" for n in range(6_000)), "NUL in a name": "a%00=1", "a line feed in a name": f"a%0d%0a{MARK}=1", "a long name": "n" * 5000 + "=1",
    "twice": "x=1&x=2", "twice, encoded": "limi%74=1&limit=1", "a key": "key=SECRET", "a token": "token=SECRET", "an api_key": "api_key=SECRET", "a key in capitals": "API_KEY=SECRET",
    "an encoded key": "%6bey=SECRET", "a key among others": "limit=1&access_token=SECRET", "an empty key": "key=",
}  # fmt: skip
"""Refused by every route of the API, whatever its parameters are."""

UNKNOWN = {
    "unknown": "x=1", "a typing mistake": "limt=1", "brackets": "x[]=1", "nested": "x[a][b]=1", "a semicolon": "a;b=1", "a semicolon between": "a=1;limit=5", "an empty name": "=1",
    "only a name": "x", "proto": "__proto__[a]=1", "sql": "x=1'%20OR%20'1'='1", "html": "%3Cscript%3E=1", "capitals": "LIMIT=5", "a space": "%20limit=5", "a plus": "+limit=5", "a fragment": "%23=1",
}  # fmt: skip
"""Refused by every route that reads its query."""

NAMES = {
    "NUL": "%00", "a NUL after": "shop-1%00", "dots": "..%2f..%2fsettings", "encoded dots": "%2e%2e%2f%2e%2e", "twice encoded": "%252e%252e%252f", "backslashes": "..%5c..%5c",
    "a line feed": f"a%0d%0a{MARK}%3a%201", "not UTF-8": "%ff%fe", "cut UTF-8": "%e8%af", "a surrogate": "%ed%a0%80", "overlong": "%c0%ae%c0%ae", "9,000 letters": "x" * 9000,
    "a semicolon": "shop-1;a=b", "sql": "1'%20OR%20'1'%3D'1", "html": "%3Cscript%3E", "a percent": "%", "half a percent": "%4", "no hex": "%zz", "spaces": "%20%20", "a pipe": "%7cid", "minus": "-1",
    "zero": "0", "past 64 bits": str(BIG), "400 digits": "9" * 400, "other digits": "%D9%A3", "a float": "1.0", "an exponent": "1e3", "hex": "0x1", "full width": "%EF%BC%91", "a separator": "%E2%80%A8",
}  # fmt: skip
"""In the place of a name in a path: no id, and nothing that is there."""


class Sent(NamedTuple):
    """What goes over the wire. `ok`: how the body of a 200 begins, where that is right; else it has to be refused."""

    data: bytes
    half_close: bool = False
    """Nothing follows: where the request is not whole, the server would wait for the rest."""
    ok: bytes = b""


def request(line: str, *headers: str, body: bytes = b"", end: str = "\r\n") -> bytes:
    return (end.join([line, *headers]) + end + end).encode("latin-1") + body


def heads(method: str, path: str, host: str, key: str) -> Iterator[tuple[str, Sent]]:
    """A route's request, spoilt in its head. The second request in a body must never be taken for one."""
    line, to, kept = f"{method} {path} HTTP/1.1", f"Host: {host}", f"X-API-Key: {key}"
    kind = "Content-Type: application/json"
    hidden = request("DELETE /api/distribution/devices/left-1 HTTP/1.1", to, kept)
    chunks = b"2\r\n{}\r\n0\r\n\r\n"
    for name, given in {
        "no type": [], "text": ["Content-Type: text/plain"], "a form": ["Content-Type: application/x-www-form-urlencoded"], "multipart": ["Content-Type: multipart/form-data; boundary=x"],
        "nearly": ["Content-Type: application/jsonp"], "another json": ["Content-Type: text/json"], "an empty type": ["Content-Type: "], "bytes": ["Content-Type: \xff\xfe"],
        "two types": ["Content-Type: text/plain", kind],
    }.items():  # fmt: skip
        yield f"type: {name}", Sent(request(line, to, kept, *given, "Content-Length: 9", body=b'{"a": 1} '))
    for name, length in {
        "-1": "-1", "a word": "abc", "a fraction": "1.5", "hex": "0x10", "plus": "+9", "20 digits": "9" * 20, "400 digits": "9" * 400, "a list": "9, 9", "unequal list": "9, 10",
        "a space": "9 9", "other digits": "\xb2", "huge": str(10**15), "64 bits": str(BIG), "empty": "",
    }.items():  # fmt: skip
        yield (
            f"length: {name}",
            Sent(request(line, to, kept, kind, f"Content-Length: {length}", body=b'{"a": 1} ')),
        )
    yield "length: too short", Sent(request(line, to, kept, kind, "Content-Length: 3", body=b'{"a": 1} ' + hidden))
    yield (
        "length: too long",
        Sent(request(line, to, kept, kind, "Content-Length: 500", body=b'{"a": 1} '), half_close=True),
    )
    yield (
        "length: two equal",
        Sent(request(line, to, kept, kind, "Content-Length: 9", "Content-Length: 9", body=b'{"a": 1} ')),
    )
    yield (
        "length: two",
        Sent(request(line, to, kept, kind, "Content-Length: 9", "Content-Length: 0", body=b'{"a": 1} ' + hidden)),
    )
    yield (
        "smuggled: CL and TE",
        Sent(
            request(
                line,
                to,
                kept,
                kind,
                f"Content-Length: {5 + len(hidden)}",
                "Transfer-Encoding: chunked",
                body=b"0\r\n\r\n" + hidden,
            )
        ),
    )
    yield (
        "smuggled: TE and CL",
        Sent(
            request(
                line,
                to,
                kept,
                kind,
                "Transfer-Encoding: chunked",
                "Content-Length: 4",
                body=b"5c\r\n" + hidden + b"\r\n0\r\n\r\n",
            )
        ),
    )
    for name, value in {
        "chunked": "chunked", "capitals": "CHUNKED", "twice": "chunked, chunked", "a tab": "\tchunked", "gzip": "gzip, chunked", "identity": "identity", "unknown": "xchunked", "quoted": '"chunked"',
    }.items():  # fmt: skip
        yield (
            f"TE: {name}",
            Sent(request(line, to, kept, kind, f"Transfer-Encoding: {value}", body=chunks + hidden)),
        )
    yield (
        "TE: a space before the colon",
        Sent(
            request(
                line, to, kept, kind, "Transfer-Encoding : chunked", "Content-Length: 5", body=b"0\r\n\r\n" + hidden
            )
        ),
    )
    yield (
        "TE: two",
        Sent(
            request(
                line, to, kept, kind, "Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=chunks + hidden
            )
        ),
    )
    for name, chunk in {
        "a flood": b"1\r\n{\r\n" * 5000,
        "a huge size": b"ffffffffffffffff\r\n{}",
        "no size": b"xyz\r\n{}\r\n",
        "an extension": b"2;" + b"a" * 50_000 + b"\r\n{}\r\n0\r\n\r\n",
        "a minus": b"-2\r\n{}\r\n",
    }.items():
        yield (
            f"chunks: {name}",
            Sent(request(line, to, kept, kind, "Transfer-Encoding: chunked", body=chunk)),
        )
    yield "Expect", Sent(request(line, to, kept, kind, "Expect: 200-maybe", "Content-Length: 9", body=b'{"a": 1} '))
    yield (
        "Content-Encoding",
        Sent(
            request(
                line, to, kept, kind, "Content-Encoding: gzip", "Content-Length: 20", body=gzip.compress(b"", mtime=0)
            )
        ),
    )
    yield (
        "a header without a colon",
        Sent(request(line, to, kept, kind, "nothing", "Content-Length: 9", body=b'{"a": 1} ')),
    )
    yield (
        "a folded header",
        Sent(request(line, to, kept, kind, "X-A: 1", f" {MARK}: 2", "Content-Length: 9", body=b'{"a": 1} ')),
    )
    yield "NUL in a header", Sent(request(line, to, kept, kind, "X-A: \0", "Content-Length: 9", body=b'{"a": 1} '))
    yield (
        "bytes in a header",
        Sent(request(line, to, kept, kind, "X-A: \xff\xfe", "Content-Length: 9", body=b'{"a": 1} ')),
    )
    yield (
        "a carriage return",
        Sent(request(line, to, kept, kind, f"X-A: 1\r{MARK}: 1", "Content-Length: 9", body=b'{"a": 1} ')),
    )
    yield (
        "64 KB in a header",
        Sent(request(line, to, kept, kind, "X-A: " + "a" * 65_536, "Content-Length: 9", body=b'{"a": 1} ')),
    )
    yield (
        "2 MB in a header",
        Sent(request(line, to, kept, kind, "X-A: " + "a" * 2_000_000, "Content-Length: 9", body=b'{"a": 1} ')),
    )
    yield (
        "1,000 headers",
        Sent(
            request(line, to, kept, kind, *(f"X-{n}: 1" for n in range(1000)), "Content-Length: 9", body=b'{"a": 1} ')
        ),
    )
    yield (
        "a cookie flood",
        Sent(
            request(
                line,
                to,
                "Cookie: " + "; ".join(f"af_session={n}.{n:016x}.{n}" for n in range(2000)),
                kind,
                "Content-Length: 9",
                body=b'{"a": 1} ',
            )
        ),
    )
    yield "a foreign host", Sent(request(line, "Host: evil.example.org", kind, "Content-Length: 9", body=b'{"a": 1} '))
    yield (
        "an override",
        Sent(
            request(
                line,
                to,
                kept,
                kind,
                "X-HTTP-Method-Override: DELETE",
                "X-Original-URL: /",
                "X-Rewrite-URL: /",
                "X-Forwarded-For: 127.0.0.1",
                "Content-Length: 9",
                body=b'{"a": 1} ',
            )
        ),
    )
    yield (
        "the key in another header",
        Sent(
            request(
                line,
                to,
                f"Proxy-Authorization: Bearer {key}",
                f"X-Key: {key}",
                f"Cookie: key={key}",
                kind,
                "Content-Length: 9",
                body=b'{"a": 1} ',
            )
        ),
    )
    yield (
        "the key as Basic",
        Sent(request(line, to, f"Authorization: Basic {key}", kind, "Content-Length: 9", body=b'{"a": 1} ')),
    )


def lines(host: str, key: str) -> Iterator[tuple[str, Sent]]:
    """Requests that are wrong before any route is looked for."""
    to, kept, tasks = f"Host: {host}", f"X-API-Key: {key}", "/api/distribution/tasks"
    yield "a TLS hello", Sent(bytes.fromhex("16030100f8010000f40303") + bytes(240), half_close=True)
    yield "SSH", Sent(b"SSH-2.0-OpenSSH_9.6\r\n", half_close=True)
    yield "HTTP/2", Sent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(27), half_close=True)
    yield "SOCKS", Sent(b"\x05\x01\x00", half_close=True)
    yield (
        "a proxy line",
        Sent(b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + request(f"GET {tasks} HTTP/1.1", to, kept), half_close=True),
    )
    yield "NULs", Sent(bytes(5000), half_close=True)
    yield "random", Sent(bytes(n * 73 % 256 for n in range(5000)), half_close=True)
    yield "line feeds", Sent(b"\r\n" * 5000, half_close=True)
    yield "nothing", Sent(b"", half_close=True)
    yield "HTTP/0.9", Sent(b"GET /api/distribution/tasks\r\n", half_close=True)
    yield "an endless line", Sent(b"GET /" + b"a" * 3_000_000, half_close=True)
    for version in (
        "HTTP/0.9",
        "HTTP/1.2",
        "HTTP/3.0",
        "HTTP/9.9",
        "http/1.1",
        "HTTP/1.1 x",
        "HTTP/",
        "FTP/1.1",
        "HTTP/1.10",
    ):
        yield f"version {version}", Sent(request(f"GET {tasks} {version}", to, kept))
    for method in (
        "GETT",
        "G\xcbT",
        "",
        "GET\0",
        f"A\n{MARK}",
        "TRACE",
        "CONNECT",
        "TRACK",
        "DEBUG",
        "PATCH",
        "PROPFIND",
        "PURGE",
        "OPTIONS",
        "LINK",
        "X" * 5000,
        "G(T",
        "HEAD,GET",
    ):
        yield f"method {method[:20]!r}", Sent(request(f"{method} {tasks} HTTP/1.1", to, kept))
    for target in (
        "*", "", " ", "?", "#", "//", "///", "/\xff\xfe", f"/%0d%0a{MARK}:%201", "/%00", "/\0", "/..", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%5c..%5csettings.py", "/%252e%252e/settings.py",
        "/static/..", "/static/%2e%2e/settings.py", "/static/..%2f..%2fsettings.py", "/static/%2fetc%2fpasswd", "/static//etc/passwd", "/static/app.js%00.html", "/static/app.js/", "/static/./../settings.py", "/static/....//....//settings.py",
        "/static/%c0%ae%c0%ae/settings.py", "/static/" + "a/" * 3000, "/edge/../settings.py", "/edge/%2e%2e%2fsettings.py", "/.git/config", "/.env", "/config/distribution_master.json", "/data/distribution.db", "/logs/master.log",
        "/server-status", "/debug", "/console", "/admin", "/metrics/", "/healthz/../metrics", "/healthz%2f..%2fmetrics", f"{tasks}/", f"{tasks}//", f"/{tasks}", f"{tasks}/..", f"{tasks}/../keys", f"{tasks};x=1", f"{tasks}/1;x=1",
        f"{tasks}/%31%00", f"{tasks}/1%20", "/api/distribution", "/api/distribution/", "/API/DISTRIBUTION/TASKS", "/api/distribution/%74asks/x", "/api//distribution/tasks", "/" + "x" * 20_000, "/" + "%41" * 20_000, "/" + "a/" * 20_000,
        "http://169.254.169.254/latest/meta-data/", "https://127.0.0.1/api/distribution/nothing", "file:///etc/passwd", "//evil.example.org/", "/\\evil.example.org",
        f"{tasks} {MARK}", f"{tasks}\t", "/%", "/%4", "/%zz", "/\u00e9", "/~root", "/cgi-bin/sh", "/index.php?a=1", "/;", "/?" + "a" * 100_000,
    ):  # fmt: skip
        yield f"target {target[:40]!r}", Sent(request(f"GET {target} HTTP/1.1", to, kept))
    # No path at all is the page, whatever stands before it: anybody may read that, and the Host is still looked at.
    for target in (
        "tasks",
        "http://evil.example.org/",
        "gopher://127.0.0.1:70/",
        "127.0.0.1:22",
        "javascript:alert(1)",
    ):
        yield f"target {target}", Sent(request(f"GET {target} HTTP/1.1", to, kept), ok=b"<!doctype html>")
    # Other spellings of a path and of a method mean the same, with the same key asked for.
    yield "an encoded slash", Sent(request(f"GET {tasks}%2f1 HTTP/1.1", to, kept), ok=b'{"id":1,')
    yield "a small method", Sent(request(f"get {tasks}/1 HTTP/1.1", to, kept), ok=b'{"id":1,')
    yield "no host", Sent(request(f"GET {tasks} HTTP/1.1", "X: 1"))
    yield "two hosts", Sent(request(f"GET {tasks} HTTP/1.1", to, "Host: evil.example.org"))
    yield "an old version without a host", Sent(request(f"GET {tasks} HTTP/1.0", "X: 1"))
    for name in (
        "evil.example.org",
        "127.0.0.1.evil.example.org",
        "127.0.0.1@evil.example.org",
        "localhost.",
        "[::1",
        "a b",
        "\xff",
        "x" * 5000,
        "",
        "0",
        "127.0.0.1:99999999",
        "127.1.evil",
    ):
        yield f"host {name[:20]!r}", Sent(request(f"GET {tasks} HTTP/1.1", f"Host: {name}"))
    yield "only line feeds", Sent(request(f"GET {tasks}/x HTTP/1.1", to, kept, end="\n"))
    yield "only carriage returns", Sent(request(f"GET {tasks}/x HTTP/1.1", to, kept, end="\r"), half_close=True)
    yield "spaces in the line", Sent(request(f"GET  {tasks}/x  HTTP/1.1", to, kept))
    yield "a space before the line", Sent(request(f" GET {tasks}/x HTTP/1.1", to, kept))
    yield "a header before the line", Sent(request(to, f"GET {tasks} HTTP/1.1", kept))
    yield "a half head", Sent(f"GET {tasks} HTTP/1.1\r\nHost: {host}\r\nX-".encode(), half_close=True)
    yield (
        "upgrade to a websocket",
        Sent(
            request(
                f"GET {tasks}/x HTTP/1.1",
                to,
                kept,
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Key: eA==",
                "Sec-WebSocket-Version: 13",
            ),
        ),
    )
    yield (
        "upgrade to HTTP/2",
        Sent(
            request(
                f"GET {tasks}/x HTTP/1.1",
                to,
                kept,
                "Connection: Upgrade, HTTP2-Settings",
                "Upgrade: h2c",
                "HTTP2-Settings: AAMAAABkAAQAAP__",
            ),
        ),
    )
    yield (
        "another site asks",
        Sent(
            request(
                f"OPTIONS {tasks} HTTP/1.1",
                to,
                "Origin: http://evil.example.org",
                "Access-Control-Request-Method: POST",
            ),
        ),
    )


class Connection:
    """One connection to the master that is used again and again, as long as the master lets it."""

    def __init__(self, url: str) -> None:
        split = urlsplit(url)
        assert split.hostname and split.port
        self._address, self.host = (split.hostname, split.port), split.netloc
        self._socket: socket.socket | None = None

    def ask(self, data: bytes) -> Reply:
        """The answer to one request with a Content-Length, on the connection of the request before if it still is."""
        is_new = self._socket is None
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=60)
        try:
            self._socket.sendall(data)
            reply = read_reply(self._socket)
        except OSError:
            reply = Reply(0, "", b"")
        if reply.status == 0 or "connection: close" in reply.head.lower():
            self.close()
        if reply.status == 0 and not is_new:
            return self.ask(data)  # the master had closed it
        return reply

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def once(self, sent: Sent) -> Reply:
        """The first answer on a connection of its own; status 0 when the master closed it without a word."""
        with socket.create_connection(self._address, timeout=60) as own:
            try:
                own.sendall(sent.data)
                if sent.half_close:
                    own.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was closed while we were still talking: an answer may be there all the same
            return read_reply(own)


class Reply(NamedTuple):
    status: int
    head: str
    body: bytes

    def header(self, name: str) -> str | None:
        found = re.search(rf"(?im)^{re.escape(name)}: *(.*?)\r?$", self.head)
        return found[1] if found else None


def read_reply(connection: socket.socket) -> Reply:
    """Whole by its Content-Length, or until the other side closes."""
    found = b""
    while True:
        head, separator, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"(?im)^content-length: (\d+)", head) if separator else None
        if length and len(body) >= int(length[1]):
            body = body[: int(length[1])]
            break
        try:
            part = connection.recv(65_536)
        except ConnectionError:
            part = b""
        if not part:
            break
        found += part
    status = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    return Reply(int(status[1]) if status else 0, head.decode("latin-1"), body)
