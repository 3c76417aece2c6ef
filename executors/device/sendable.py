"""What of a task's words may leave the device?

Only strict JSON that every reader takes, text that UTF-8 can hold, and no secret: the values of the device's
credentials, keys of a master and the password of its proxy become *** wherever they stand. It must not know what a task
is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

# A report's envelope adds some levels; the master refuses JSON deeper than 32.
MAX_RESULT_DEPTH = 24
# Result and new tasks of one task as JSON. A report must fit into one request (the master's max_body_bytes, 8 MiB).
MAX_RESULT_BYTES = 7 * 1024 * 1024
# A shorter value is no secret, and hiding it would tear ordinary words apart.
SHORTEST_SECRET = 6
HIDDEN = "***"

_KEY = re.compile(r"afk_[0-9]+_[\w-]{16,}")
_UNSENDABLE = re.compile("[\0\ud800-\udfff]")


class Unsendable(ValueError):
    """A value that JSON, or the master, does not take; the text names its place."""


# ---- secrets ----


def secrets_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What must never leave the device, in each spelling that it may have in a URL or in JSON; longest first."""
    credentials = dict(settings.get("credentials") or {})
    values = (settings.get("api_key"), settings.get("crawl_proxy"), *credentials.values())
    return _spellings(tuple(str(value) for value in values if value)) if any(values) else ()


def password_in(value: str) -> str:
    """The password of a URL such as that of a proxy; "" for what has none."""
    try:
        return urlsplit(value).password or ""
    except ValueError:
        return ""


@lru_cache(maxsize=16)
def _spellings(values: tuple[str, ...]) -> tuple[str, ...]:
    values += tuple(password for value in values if (password := password_in(value)))
    long_enough = [value for value in values if len(value) >= SHORTEST_SECRET]
    all_of_them = {spelt for v in long_enough for spelt in (v, quote(v, safe=""), quote(v), json.dumps(v)[1:-1])}
    return tuple(sorted(all_of_them, key=lambda text: (-len(text), text)))


def hide(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _KEY.sub(HIDDEN, text) if "afk_" in text else text


def hidden(value: Any, secrets: tuple[str, ...]) -> Any:
    """A copy of a JSON value without secrets, in keys as little as in texts."""
    if isinstance(value, str):
        return hide(value, secrets)
    if isinstance(value, dict):
        return {hide(key, secrets): hidden(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [hidden(item, secrets) for item in value]
    return value


# ---- strict JSON ----


def clean_text(text: str) -> str:
    """NUL and lone surrogates become U+FFFD: the master refuses both, and a page may contain either."""
    return _UNSENDABLE.sub("\ufffd", text)


def strict_json(value: Any, path: str, budget: list[int], depth: int = 0) -> Any:
    """A copy of `value` that every JSON reader takes; Unsendable names the place that none would take.

    `budget` holds the bytes left and is counted down."""
    if depth > MAX_RESULT_DEPTH:
        raise Unsendable(f"{path[:200]} is nested deeper than {MAX_RESULT_DEPTH} levels")
    budget[0] -= 6 + (len(value.encode("utf-8", "replace")) if isinstance(value, str) else 0)
    if budget[0] < 0:
        raise Unsendable(f"the result is over {MAX_RESULT_BYTES} bytes: write large content to an artifact")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean_text(str(value))
    if isinstance(value, (int, float)):
        return strict_number(value, path)
    if isinstance(value, (dict, Mapping)):  # dict first: a look at an abstract class costs more than the rest
        return {
            strict_key(key, path, budget): strict_json(item, f"{path}.{key}", budget, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [strict_json(item, f"{path}[{i}]", budget, depth + 1) for i, item in enumerate(value)]
    kind = type(value).__name__
    raise Unsendable(f"{path} is of type {kind}, which JSON cannot hold: return text, numbers, lists or dicts")


def strict_number(value: Any, path: str) -> Any:
    """A plain int of 64 bits or a finite float."""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise Unsendable(f"{path} is an integer past 64 bits: return it as text")
        return int(value)
    if not math.isfinite(value):
        raise Unsendable(f"{path} is {float(value)}, which JSON cannot hold: return null instead")
    return float(value)


def strict_key(key: Any, path: str, budget: list[int]) -> str:
    if not isinstance(key, str):
        raise Unsendable(f"{path} has the key {key!r} of type {type(key).__name__}: keys are text")
    budget[0] -= 6 + len(key)
    return clean_text(str(key))
