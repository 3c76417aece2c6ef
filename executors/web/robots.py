"""What does a site ask crawlers not to do? robots.txt by RFC 9309.

It is fetched by the same guarded way as a page, once for each origin and hour, by one task while others of the origin
wait for it. 2xx is read (up to 500 KiB); 4xx, redirects that lead nowhere and addresses that are refused mean that
there are no rules; 429 and 503 snooze the task, other 5xx and errors of the connection fail it with a retry: a site
whose rules cannot be had is not crawled. An answer that is no robots.txt (HTML) has no rules in it.

Protego reads the rules where it is installed, from 0.7 on: older ones match "*" by a regular expression that one rule
can keep busy for ever. urllib.robotparser, which every Python has, knows no "*" and "$" inside a path and takes the
first rule that fits where RFC 9309 takes the longest. A file whose groups give many names many rules each (Protego
keeps each rule once for each name) is refused.
"""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.robotparser
from collections import OrderedDict
from importlib import metadata
from typing import Any, Callable, Optional

from executors.task_executor import DoNotRetry, Snooze
from executors.web.connection import Cancelled, OutOfTime

MAX_BYTES = 500 * 1024
MAX_RULES = 200_000
MAX_ORIGINS = 200
KEPT_SECONDS = 3600.0
FAILURE_KEPT_SECONDS = 5.0
MAX_DELAY_SECONDS = 30.0
MAX_WAIT_SECONDS = 5.0


def linear_protego() -> Any:
    """The module; None where it is not installed or older than 0.7."""
    try:
        import protego

        version = metadata.version("protego").split(".")
    except ImportError:
        return None
    return protego if (int(version[0]), int(version[1])) >= (0, 7) else None


def refuse_multiplied(text: str) -> None:
    """DoNotRetry where the groups' names times their rules are too many to keep."""
    rules, names, is_in_names = 0, 0, False
    for line in text.splitlines():
        directive = line.strip().lower()
        if directive.startswith("user"):
            names, is_in_names = (names + 1 if is_in_names else 1), True
        elif directive.startswith(("allow", "di")):  # as loosely as Protego reads "disallow"
            rules, is_in_names = rules + names, False
    if rules > MAX_RULES:
        raise DoNotRetry(
            f"a robots.txt gives its names {rules} rules, at most {MAX_RULES} are read: leave the site out, or set"
            " crawl_obey_robots to false on devices whose owner may crawl there"
        )


class Rules:
    """One origin's robots.txt."""

    def __init__(self, text: str):
        self._protego: Any = None
        self._parser: Any = None
        if not text.strip():
            return
        protego = linear_protego()
        if protego is not None:
            refuse_multiplied(text)
            self._protego = protego.Protego.parse(text)
        else:
            self._parser = urllib.robotparser.RobotFileParser()
            self._parser.parse(text.splitlines())

    @property
    def has_rules(self) -> bool:
        return self._protego is not None or self._parser is not None

    def allows(self, url: str, user_agent: str) -> bool:
        if self._protego is not None:
            return bool(self._protego.can_fetch(url, user_agent))
        return bool(self._parser.can_fetch(user_agent, url)) if self._parser is not None else True

    def delay_seconds(self, user_agent: str) -> float:
        """Its Crawl-delay, up to 30 s; 0 without one."""
        delay: Any = None
        if self._protego is not None:
            delay = self._protego.crawl_delay(user_agent)
        elif self._parser is not None:
            delay = self._parser.crawl_delay(user_agent)
        return min(float(delay or 0.0), MAX_DELAY_SECONDS)

    def sitemaps(self) -> list[str]:
        """The sitemaps that it names, as they stand there."""
        if self._protego is not None:
            return list(self._protego.sitemaps)
        return list(self._parser.site_maps() or []) if self._parser is not None else []


class _Origin:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: Optional[Rules] = None
        self.failure: Optional[Exception] = None
        self.until = 0.0


class Robots:
    """The rules of the origins that a device crawls, each kept for an hour, 200 at most."""

    def __init__(self, fetch_text: Callable[[str], str], clock: Callable[[], float] = time.monotonic):
        """`fetch_text` answers a robots.txt ("" for none) or raises what the task ends with."""
        self._fetch_text = fetch_text
        self._clock = clock
        self._lock = threading.Lock()
        self._origins: OrderedDict[str, _Origin] = OrderedDict()

    def of(self, origin: str) -> Rules:
        """The rules of an origin. Raises Retry and Snooze where they cannot be had now."""
        entry = self._entry(origin)
        rules = self._kept(entry)
        if rules is not None:
            return rules
        if not entry.lock.acquire(timeout=MAX_WAIT_SECONDS):
            raise Snooze(MAX_WAIT_SECONDS, f"{origin}/robots.txt is on its way to this device")
        with contextlib.ExitStack() as stack:
            stack.callback(entry.lock.release)
            rules = self._kept(entry)  # another task may have been faster
            return rules if rules is not None else self._ask(origin, entry)

    def _ask(self, origin: str, entry: _Origin) -> Rules:
        try:
            entry.rules, entry.failure = Rules(self._fetch_text(f"{origin}/robots.txt")), None
            entry.until = self._clock() + KEPT_SECONDS
        except (OutOfTime, Cancelled):  # says something about the task that asked, not about the site
            raise
        except Exception as error:
            # Kept shortly: the tasks that waited for it must not try one after the other.
            entry.rules, entry.failure = None, error
            entry.until = self._clock() + FAILURE_KEPT_SECONDS
            raise
        return entry.rules

    def _kept(self, entry: _Origin) -> Optional[Rules]:
        if self._clock() >= entry.until:
            return None
        if entry.failure is not None:
            raise entry.failure.with_traceback(None)
        return entry.rules

    def _entry(self, origin: str) -> _Origin:
        with self._lock:
            entry = self._origins.setdefault(origin, _Origin())
            self._origins.move_to_end(origin)
            while len(self._origins) > MAX_ORIGINS:
                self._origins.popitem(last=False)
            return entry
