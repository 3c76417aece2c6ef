"""What does an answer of AppsFlyer that is no report mean, and what is to be done then?

RULES is read from top to bottom: the first line whose status and text fit decides. AppsFlyer's documents name 400, 401
and 404 only; what public clients met besides is in the table, too, matched by a part of the text, in lower case. Its
texts come as plain text, JSON or HTML. An action is one of

    quota       a day's downloads are used up: snooze until the next 00:00 UTC
    throttle    too fast: snooze for 65 s; the sixth time in a row until the next 00:00 UTC
    credential  nothing can be done with this token: do not retry, and do not ask with it again for 5 minutes
    refuse      it would be refused again: do not retry
    slow        may pass or may not: retry after the rule's seconds, as often as the task allows
    busy        will pass: retry after the usual backoff

quota and throttle are told to the master, too: no device gets a task of the same key until then, where a limit has it.
A Retry-After of the answer goes before every wait. It must not know how a request is made.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Optional

from executors.appsflyer.pacing import Key, Pacing
from executors.task_executor import DoNotRetry, Retry, Snooze

THROTTLE_SECONDS = 65.0
THROTTLES_IN_A_ROW = 5
CREDENTIAL_SECONDS = 300.0
MAX_RETRY_AFTER_SECONDS = 86400.0
# After midnight not everybody at once; AppsFlyer's own counters may need a moment, too.
AFTER_MIDNIGHT_SECONDS = (30.0, 300.0)
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Rule:
    """One line of the table; no statuses: any, no text: any."""

    statuses: tuple[int, ...]
    text: str
    action: str
    advice: str
    wait_seconds: Optional[float] = None


TOKEN_ADVICE = (
    "make a new API token V2 in AppsFlyer (Security center, AppsFlyer API tokens; those made before 2026-03-10 were"
    " revoked), write it under credentials in the device's config file and start the worker again"
)
QUOTA_ADVICE = "its downloads of today are used up"
RULES = (
    Rule((400, 402, 403, 429), "maximum number of", "quota", QUOTA_ADVICE),
    Rule((400, 402, 403, 429), "limit has been reached", "quota", QUOTA_ADVICE),
    Rule((402,), "", "quota", QUOTA_ADVICE),
    Rule((400,), "lookback", "refuse", "raw data goes 90 days back: choose a later start_date"),
    Rule((400,), "invalid limit type", "refuse", "write 200000 or 1000000 as maximum_rows"),
    Rule((400,), "unknown additional field", "refuse", "take what is a standard column out of additional_fields"),
    Rule((400,), "subscription package", "refuse", "this account's plan has no raw data for this app: ask AppsFlyer"),
    Rule((400,), "token is invalid", "credential", TOKEN_ADVICE),
    Rule((401,), "", "credential", TOKEN_ADVICE),
    Rule((403,), "limit reached", "throttle", "it takes one call a minute of an app's report"),
    Rule((403,), "", "slow", "may this token read this app's report?", 300.0),
    # Both were seen where nothing was wrong, and went away by themselves.
    Rule((404, 416), "", "slow", "check app_id (of iOS it starts with id) and whether this token sees the app", 120.0),
    Rule((429,), "", "throttle", "it asks to come back later"),
    Rule((408, 425), "", "busy", "it did not get the request in time"),
    Rule((), "", "refuse", "check the task's fields against docs/appsflyer.md"),
)


@dataclass(frozen=True)
class Answer:
    """What came instead of a report."""

    status: int
    text: str
    headers: Mapping[str, str]

    @property
    def said(self) -> str:
        """Its text in one short line: without tags, and out of {"message": ...}."""
        text = self.text
        try:
            content = json.loads(text)
            if isinstance(content, dict):
                content = content.get("message") or content.get("error") or ""
            text = content if isinstance(content, str) else ""
        except (ValueError, RecursionError):
            text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>|<[^>]{0,2000}>", " ", text)
        return " ".join(text.split())[:SHOWN_CHARACTERS]

    @property
    def retry_after(self) -> Optional[float]:
        """Seconds from Retry-After, a number or a date; None without one. AppsFlyer documents none, and it may come."""
        text = (self.headers.get("Retry-After") or "").strip()
        if re.fullmatch(r"[0-9]{1,9}", text):
            seconds = float(text)
        else:
            moment = moment_of(text)
            if moment is None:
                return None
            seconds = moment - self.now
        return min(MAX_RETRY_AFTER_SECONDS, max(1.0, seconds))

    @property
    def now(self) -> float:
        """The server's time, for a device's own clock may be wrong; in seconds since 1970."""
        moment = moment_of(self.headers.get("Date") or "")
        return time.time() if moment is None else moment

    @property
    def seconds_to_midnight(self) -> float:
        return 86400.0 - self.now % 86400.0


def moment_of(text: str) -> Optional[float]:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def raise_if_closed(key: Key, pacing: Pacing) -> None:
    """Raise what an earlier task of this device was told and still holds, without asking again."""
    found = pacing.closed(key)
    if found is not None:
        seconds, closed_by = found
        raise DoNotRetry(closed_by.reason) if closed_by.for_good else Snooze(with_jitter(seconds), closed_by.reason)


def rule_for(answer: Answer) -> Rule:
    if answer.status >= 500:
        return Rule((), "", "busy", "it has a fault of its own")
    text = answer.text.lower()
    return next(rule for rule in RULES if (not rule.statuses or answer.status in rule.statuses) and rule.text in text)


def raise_for(answer: Answer, key: Key, pacing: Pacing) -> None:
    """Raise what is to be done, and let `pacing` keep other tasks from asking the same in vain. Never returns."""
    rule = rule_for(answer)
    said = f": {answer.said}" if answer.said else ""
    sentence = f"AppsFlyer answered {answer.status}{said} ({rule.advice})"
    hint = answer.retry_after
    if rule.action == "quota":
        scope = key.account if "this account" in answer.text.lower() else key
        raise closed(scope, hint, answer.seconds_to_midnight, sentence, pacing)
    if rule.action == "throttle":
        if pacing.count_throttle(key) > THROTTLES_IN_A_ROW:
            raise closed(key, hint, answer.seconds_to_midnight, f"{sentence}, and said so again and again", pacing)
        raise Snooze(with_jitter(THROTTLE_SECONDS if hint is None else hint), sentence, closes=key.fields)
    if rule.action == "credential":
        pacing.forbid(key.credential, CREDENTIAL_SECONDS, sentence)
        raise DoNotRetry(sentence)
    if rule.action == "refuse":
        raise DoNotRetry(sentence)
    raise Retry(sentence, after=rule.wait_seconds if hint is None else hint)


def closed(key: Key, hint: Optional[float], to_midnight: float, sentence: str, pacing: Pacing) -> Snooze:
    """The snooze until midnight, or as long as the server says; the device's other tasks of this key wait as long."""
    seconds = to_midnight if hint is None else hint
    pacing.close(key, seconds, sentence)
    wait = seconds + random.uniform(*AFTER_MIDNIGHT_SECONDS) if hint is None else with_jitter(hint)
    return Snooze(wait, sentence, closes=key.fields)


def with_jitter(seconds: float) -> float:
    """A tenth more at most, and never more than five minutes."""
    return seconds + random.uniform(0.0, min(0.1 * seconds, AFTER_MIDNIGHT_SECONDS[1]))
