"""What does a crawl task ask for? Every mistake in task_data is found here, before anything is fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union
from urllib.parse import urlencode

from executors.task_executor import DoNotRetry, refuse_unknown
from executors.web.extract import Fields, Items, read_fields, read_items, read_jmespath
from executors.web.patterns import TooSlow, searcher
from executors.web.urls import MAX_URL_CHARACTERS, fetched_form

MAX_TIMEOUT_SECONDS = 3600.0
MAX_BODY_BYTES = 1024 * 1024
METHODS = ("GET", "HEAD", "POST")
KEYS = (
    "url", "method", "headers", "form", "json", "timeout_seconds", "depth", "start", "follow", "fields", "items",
    "jmespath", "sitemap", "sitemap_offset", "raw",
    "username", "app_id", "start_date", "end_date", "host",  # the task's own, which the device or the master adds
)  # fmt: skip
FOLLOW_KEYS = ("allow", "deny", "same_host", "max_depth", "max_pages")
# They are the connection's own: a task that set them could hide a second request in its first.
OWN_HEADERS = ("connection", "content-length", "expect", "host", "keep-alive", "te", "transfer-encoding", "upgrade")
WRITE_INSTEAD = "Begin it with ^, write [^/]+ or words instead of .*, or several shorter patterns"
# What children get unchanged.
PASSED_ON = ("follow", "fields", "items", "timeout_seconds", "raw")


@dataclass(frozen=True)
class Follow:
    allow: tuple[Callable[[str], Any], ...] = ()
    deny: tuple[Callable[[str], Any], ...] = ()
    same_host: bool = True
    max_depth: Optional[int] = None
    max_pages: Optional[int] = None


@dataclass(frozen=True)
class Order:
    """A checked task_data; `url` is a fetched form. `passed_on` is what children get unchanged."""

    url: str
    method: str
    headers: dict[str, str]
    body: Optional[bytes]
    timeout_seconds: float
    depth: int
    follow: Optional[Follow]
    fields: Fields
    items: Optional[Items]
    jmespath: str
    sitemap: Union[bool, str]
    sitemap_offset: int
    raw: bool
    start: Optional[str]
    passed_on: dict[str, Any]


def read_order(task_data: Mapping[str, Any]) -> Order:
    """Check task_data; DoNotRetry names the field and what to write."""
    refuse_unknown(task_data, KEYS, "task_data")
    url = read_url(task_data.get("url"), "url")
    headers = read_headers(task_data.get("headers"))
    body, kind = read_body(task_data)
    if kind and not any(name.lower() == "content-type" for name in headers):
        headers["Content-Type"] = kind
    order = Order(
        url=url,
        method=read_method(task_data.get("method"), has_body=body is not None),
        headers=headers,
        body=body,
        timeout_seconds=read_timeout(task_data.get("timeout_seconds", 30)),
        depth=read_count(task_data.get("depth", 0), "depth", 0) or 0,
        follow=read_follow(task_data.get("follow")),
        fields=read_fields(task_data.get("fields")),
        items=read_items(task_data.get("items")),
        jmespath=read_jmespath(task_data.get("jmespath")),
        sitemap=read_sitemap(task_data.get("sitemap"), url),
        sitemap_offset=read_count(task_data.get("sitemap_offset", 0), "sitemap_offset", 0) or 0,
        raw=read_flag(task_data.get("raw", False), "raw"),
        start=read_url(task_data["start"], "start") if task_data.get("start") is not None else None,
        passed_on={name: task_data[name] for name in PASSED_ON if task_data.get(name) is not None},
    )
    if order.sitemap and (order.method != "GET" or order.jmespath):
        raise DoNotRetry("task_data.sitemap is read by GET and gives tasks: leave out method, form, json and jmespath")
    return order


def read_url(url: Any, name: str, base: str = "") -> str:
    known = fetched_form(url.strip(), base) if isinstance(url, str) else None
    if known is None:
        raise DoNotRetry(
            f"task_data.{name} is {url!r:.200}: write an http or https URL of up to {MAX_URL_CHARACTERS} characters"
        )
    return known


def read_method(method: Any, *, has_body: bool) -> str:
    if method is None:
        return "POST" if has_body else "GET"
    if method not in METHODS:
        raise DoNotRetry(f"task_data.method is {method!r:.100}: write GET, HEAD or POST")
    if has_body and method != "POST":
        raise DoNotRetry(
            f"task_data.method is {method} and there is a form or json to send: write POST, or leave it out"
        )
    return str(method)


def read_headers(headers: Any) -> dict[str, str]:
    if headers is None:
        return {}
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise DoNotRetry('task_data.headers must be an object of texts, such as {"Accept-Language": "zh"}')
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}", name):
            raise DoNotRetry(f"task_data.headers: {name!r:.100} is no name of a header")
        if name.lower() in OWN_HEADERS or name.lower().startswith("proxy-"):
            raise DoNotRetry(f"task_data.headers.{name} is set by the device: leave it out")
        if not re.fullmatch(r"[\t\x20-\x7e\xa0-\xff]{0,8000}", value) or value != value.strip():
            raise DoNotRetry(f"task_data.headers.{name} must be up to 8,000 characters of ISO-8859-1 in one line")
    return dict(headers)


def read_body(task_data: Mapping[str, Any]) -> tuple[Optional[bytes], str]:
    """What is posted, and its Content-Type."""
    form, document = task_data.get("form"), task_data.get("json")
    if form is not None and document is not None:
        raise DoNotRetry("task_data.form and task_data.json are two bodies: write one of them")
    if form is None and document is None:
        return None, ""
    if form is None:
        body, kind = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace"), "application/json"
    else:
        body, kind = encode_form(form), "application/x-www-form-urlencoded"
    if len(body) > MAX_BODY_BYTES:
        raise DoNotRetry(f"task_data.{'json' if form is None else 'form'} is {len(body)} bytes: at most 1 MiB is sent")
    return body, kind


def encode_form(form: Any) -> bytes:
    def is_text(value: Any) -> bool:
        return isinstance(value, (str, int, float)) and not isinstance(value, bool)

    if not isinstance(form, dict) or not all(
        is_text(value) or (isinstance(value, list) and all(map(is_text, value))) for value in form.values()
    ):
        raise DoNotRetry('task_data.form must be an object of texts, or lists of them: {"q": "shoes", "size": ["40"]}')
    return urlencode(form, doseq=True, errors="replace").encode("ascii")


def read_timeout(timeout: Any) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise DoNotRetry(f"task_data.timeout_seconds is {timeout!r:.100}: write a number above 0, up to 3600")
    return float(timeout)


def read_count(value: Any, name: str, minimum: int) -> Optional[int]:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
        raise DoNotRetry(f"task_data.{name} is {value!r:.100}: write a whole number from {minimum}")
    return value


def read_flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise DoNotRetry(f"task_data.{name} is {value!r:.100}: write true or false")
    return value


def read_sitemap(sitemap: Any, url: str) -> Union[bool, str]:
    if sitemap is None or isinstance(sitemap, bool):
        return bool(sitemap)
    return read_url(sitemap, "sitemap", base=url)


def read_follow(follow: Any) -> Optional[Follow]:
    if follow is None:
        return None
    if not isinstance(follow, dict):
        raise DoNotRetry('task_data.follow must be an object, such as {"same_host": true, "max_pages": 100}')
    refuse_unknown(follow, FOLLOW_KEYS, "task_data.follow")
    return Follow(
        allow=read_patterns(follow.get("allow"), "allow"),
        deny=read_patterns(follow.get("deny"), "deny"),
        same_host=read_flag(follow.get("same_host", True), "follow.same_host"),
        max_depth=read_count(follow.get("max_depth"), "follow.max_depth", 0),
        max_pages=read_count(follow.get("max_pages"), "follow.max_pages", 1),
    )


def read_patterns(patterns: Any, name: str) -> tuple[Callable[[str], Any], ...]:
    if patterns is None:
        return ()
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise DoNotRetry(f"task_data.follow.{name} must be a list of regular expressions")
    searchers = []
    for i, pattern in enumerate(patterns):
        try:
            searchers.append(searcher(pattern))
        except TooSlow as error:
            where = f"task_data.follow.{name}[{i}]"
            raise DoNotRetry(f"{where} is {pattern!r:.100}, too slow: {error}. {WRITE_INSTEAD}") from None
        except (re.error, RecursionError, OverflowError) as error:
            where = f"task_data.follow.{name}[{i}]"
            raise DoNotRetry(f"{where} is {pattern!r:.100}, no regular expression: {error}") from None
    return tuple(searchers)
