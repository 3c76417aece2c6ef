"""What schemathesis cannot know of this API, for tests/test_schemathesis.py: requests are made fit before they are sent.

It is loaded by `hooks` in tests/fuzzing.toml, in schemathesis' own process.
"""

from __future__ import annotations

import math
from typing import Any

import schemathesis
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi import checks

# Ten wrong keys a minute and address are told 401; the next ones are kept out by 429, which is no hole.
checks.AUTH_REJECTION_STATUSES = frozenset({*checks.AUTH_REJECTION_STATUSES, 429})


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    query = case.query if isinstance(case.query, dict) else {}
    if is_number(query.get("wait")):
        query["wait"] = 0.01  # a pull is held for as long as it asks for: 25 s of them would be the whole time
    is_body_bad = case.meta is not None and case.meta.is_negative_at(ParameterLocation.BODY)
    if is_body_bad and "dry_run" in query:
        del query["dry_run"]  # a rehearsal tells what is wrong with each task in a reply that says 200
    if isinstance(case.body, dict | list):  # a body left out counts as a bad one once it is touched
        case.body = with_whole_numbers(case.body)


def is_number(value: Any) -> bool:
    try:
        return 0 <= float(value) <= 25
    except (TypeError, ValueError):
        return False


def with_whole_numbers(value: Any) -> Any:
    """1.0 is an integer for JSON Schema; for our decoder it is a float, and no program writes an id like that."""
    if isinstance(value, dict):
        return {key: with_whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value
