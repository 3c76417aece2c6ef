"""Which values may be stored, and what is said about the others?

The kinds of values of the wire, the checks that types cannot say (depth, characters, sizes, 64 bits) and msgspec's
errors in words. Nothing here knows a message, a route or the database; wire.py builds the messages from it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from datetime import date, datetime
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeVar, cast

import msgspec
from msgspec import Meta, Raw

MAX_DEPTH = 32
MAX_TASKS = 10_000
TASK_DATA_BYTES = 1024 * 1024
RESULT_BYTES = 8 * 1024 * 1024
SYSTEM_INFO_BYTES = 16 * 1024
LOG_TAIL_BYTES = 16 * 1024
ERROR_MESSAGE_LENGTH = 4_000
REASON_LENGTH = 500
BIGGEST_INTEGER = 2**63 - 1

TASK_STATES = ("scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled")
DEVICE_STATES = ("online", "busy", "offline", "draining", "disabled", "conflict")

STATES_PATTERN = "^ *({0}) *(, *({0}) *)*$".format("|".join(TASK_STATES))
"""What states_of takes, for the document."""

T = TypeVar("T")


class Invalid(Exception):
    """A message that is refused: the HTTP status, a stable code, a sentence that says what to do, and the field."""

    def __init__(self, status: int, code: str, detail: str, field: str | None = None):
        detail = detail if len(detail) <= 500 else detail[:497] + "..."  # a value may be quoted in it, of any length
        super().__init__(detail)
        self.status, self.code, self.detail, self.field = status, code, detail, field
        self.headers: dict[str, str] = {}


# ----------------------------------------------------------------------------------------- kinds of values
# `description` is what an error says after "must be", and what the OpenAPI document says. "(?!\n)" because Python's $
# also matches before a last line feed; ECMA's regular expressions read it the same way.

NAME_PATTERN = r"^[A-Za-z0-9_.\-]{1,64}$(?!\n)"
DATE_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$(?!\n)"
ARTIFACT_NAME_PATTERN = r"^[A-Za-z0-9_\-][A-Za-z0-9._\-]{0,99}$(?!\n)"
ARTIFACT_NAME_RULE = "1 to 100 of A-Z a-z 0-9 . _ -, without a dot at the start"
SHA256_PATTERN = r"^[0-9a-f]{64}$(?!\n)"
SHA256_RULE = "64 hex digits in lower case"
TYPE_PATTERN = r"^[A-Za-z0-9_.\-*?]{1,64}$(?!\n)"
KEY_FIELD_PATTERN = r"^(username|app_id|batch|start_date|end_date|task_data\.[A-Za-z0-9_\-]{1,64})$(?!\n)"
KEY_RULE = "username, app_id, batch, start_date, end_date or task_data.NAME, or a list of at most 8 of them"
STRATEGY_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.]{0,127}(:[A-Za-z_][A-Za-z0-9_]{0,127})?$(?!\n)"
LINE_PATTERN = r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*$(?!\n)"
"""What CONTROL leaves, for the document: the check itself is one look at the bytes of the whole body."""
NAME_RULE = "1 to 64 of A-Z a-z 0-9 _ . -"


def rule(description: str, **limits: Any) -> Meta:
    return Meta(description=description, **limits)


def whole(low: int, high: int, unit: str = "") -> Meta:
    return Meta(ge=low, le=high, description=f"a whole number {unit}from {low} to {high}")


def number(low: float, high: float, unit: str = "") -> Meta:
    return Meta(ge=low, le=high, description=f"a number {unit}from {low:g} to {high:.12g}")


def line(low: int, high: int) -> Meta:
    text = f"text of {low} to {high} characters, without control characters"
    return Meta(min_length=low, max_length=high, description=text, extra_json_schema={"pattern": LINE_PATTERN})


def at_most(count: int, what: str) -> Meta:
    return Meta(max_length=count, description=f"a list of at most {count} {what}")


def json_text(description: str, *types: str) -> Meta:
    return Meta(description=description, extra_json_schema={"type": types[0] if len(types) == 1 else list(types)})


Name = Annotated[str, rule(NAME_RULE, pattern=NAME_PATTERN)]
Id = Annotated[int, whole(1, BIGGEST_INTEGER)]
Day = Annotated[str, rule("a date written YYYY-MM-DD", pattern=DATE_PATTERN, extra_json_schema={"format": "date"})]
Line128 = Annotated[str, line(1, 128)]
States = Annotated[str, line(1, 128), Meta(extra_json_schema={"pattern": STATES_PATTERN})]
UniqueKey = Annotated[str, line(1, 1024)]
Reason = Annotated[str, line(0, REASON_LENGTH)]
FreeText = Annotated[str, rule("text; what is too long is cut")]
ErrorMessage = Annotated[str, rule("exactly this error_message; empty: without one", max_length=ERROR_MESSAGE_LENGTH)]
Priority = Annotated[int, whole(1, 10)]
Timeout = Annotated[int, whole(1, 604_800, "of seconds ")]
Delay = Annotated[float, number(0, 31_536_000, "of seconds ")]
Wait = Annotated[float, number(1, 31_536_000, "of seconds ")]
RetryCount = Annotated[int, whole(0, 100)]
BatchLimit = Annotated[int, whole(1, 100_000_000)]
Moment = Annotated[datetime, rule('a time with its zone, such as "2026-11-25T13:59:07Z"', tz=True)]
Tags = Annotated[list[Name], at_most(64, f"names ({NAME_RULE})")]
TaskTypes = Annotated[list[Name], at_most(256, f"names ({NAME_RULE})")]
ArtifactName = Annotated[str, rule(ARTIFACT_NAME_RULE, pattern=ARTIFACT_NAME_PATTERN)]
ArtifactBytes = Annotated[int, whole(0, BIGGEST_INTEGER)]
Sha256 = Annotated[str, rule(SHA256_RULE, pattern=SHA256_PATTERN)]
TypePattern = Annotated[str, rule("a task type, or a pattern with * and ?", pattern=TYPE_PATTERN)]
# The pattern is checked by hand: msgspec 0.22 frees memory twice when one kind of a union has one.
Key = Annotated[str | list[str], rule(KEY_RULE)]
Number = Annotated[int, whole(1, 1_000_000_000)]
Window = Annotated[float, number(0.1, 2_678_400, "of seconds ")]
PreferSeconds = Annotated[float, number(0, 604_800, "of seconds ")]
Weight = Annotated[float, number(0.01, 1000)]
Slots = Annotated[int, whole(1, 1000)]
Sequence = Annotated[int, whole(0, BIGGEST_INTEGER)]
TaskData = Annotated[Raw, json_text("a JSON object of at most 1 MiB", "object")]
ResultData = Annotated[Raw, json_text("a JSON object of at most 8 MiB, or null", "object", "null")]
SystemInfo = Annotated[Raw, json_text("a JSON object; dropped if over 16 KiB", "object", "null")]
Percent = Annotated[Raw, json_text("percent, 0 to 100; dropped if it is not", "number", "null")]
Count = Annotated[Raw, json_text("0 or more; dropped if it is not", "integer", "null")]
Clock = Annotated[Raw, json_text("seconds since 1970 by the device's clock; dropped if it is not", "number", "null")]

NOTHING = Raw(b"null")
EMPTY_OBJECT = Raw(b"{}")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Screen(NamedTuple):
    """What a look at the bytes says about a body: which of the slower checks its values need."""

    strings: bool  # some string may hold a control character
    values: bool  # some nested value may hold NUL, a number past 64 bits or past a float


# ----------------------------------------------------------------------------------------- from bytes to values


@lru_cache(maxsize=64)
def decoder_for(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def decode_json(raw: bytes, type_: type[T], where: str) -> T:
    try:
        return cast("T", decoder_for(cast("Any", type_)).decode(raw))
    except msgspec.ValidationError as error:
        raise explain(str(error), type_, where) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_json(raw, str(error)) from None
    except RecursionError:
        raise too_deep(where) from None


# Digits become 0 and E becomes e, so that "a number too long" is a search for a few fixed bytes. 18 digits fit into
# 64 bits, and 18 digits with a two-digit exponent fit into a float: without a hit no number can be out of range.
# A hit only costs a closer look.
DIGITS = bytes.maketrans(b"123456789E", b"000000000e")


def screen_bytes(raw: bytes) -> Screen:
    """A look at the bytes, without a Python loop: 0.1 ms a 100 KB. Raises Invalid if they are not UTF-8."""
    plain = raw.isascii()
    if not plain:
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise Invalid(400, "bad_json", f"The body is not UTF-8 (byte {error.start}); send JSON in UTF-8.") from None
    escapes = b"\\" in raw
    return Screen(not plain or escapes or b"\x7f" in raw, values_suspect(raw, escapes))


def values_suspect(raw: bytes, escapes: bool) -> bool:
    if escapes and b"\\u0000" in raw:
        return True
    digits = raw.translate(DIGITS)
    return b"0000000000000000000" in digits or b"0e000" in digits or b"0e+000" in digits


# ----------------------------------------------------------------------------------------- checks of values


def check_each(bodies: list[Any] | None, where: str, screen: Screen) -> None:
    """Check every Body of a list; its fields are named where[3].name."""
    for index, body in enumerate(bodies or ()):
        body.check(f"{where}[{index}].", screen)


def check_object(raw: Raw, where: str, limit: int, screen: Screen) -> None:
    """Raise Invalid unless the JSON text is an object, small, not too deep, and holds only what can be stored."""
    text = bytes(raw)
    if text[:1] != b"{":
        raise invalid(where, "must be a JSON object")
    if len(text) > limit:
        raise Invalid(413, "too_large", f"{where} has {len(text)} bytes; at most {limit} are accepted.", where)
    # Depth cannot exceed the number of opening brackets, whether or not some of them are in strings.
    suspect = screen.values and values_suspect(text, escapes=True)
    if suspect or text.count(b"{") + text.count(b"[") > MAX_DEPTH:
        walk(decode_json(text, cast("type[Any]", Any), where), where)


def check_result(raw: Raw, where: str, screen: Screen) -> None:
    if bytes(raw) != b"null":
        check_object(raw, where, RESULT_BYTES, screen)


def walk(value: Any, where: str) -> None:
    """Look at every value of parsed JSON: depth, NUL, integers past 64 bits."""
    waiting: list[tuple[Any, str, int]] = [(value, where, 1)]
    while waiting:
        container, path, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise too_deep(where)
        for key, item in members(container):
            if isinstance(key, str) and "\0" in key:
                raise invalid(path, "must not hold NUL characters, in keys either")
            kind = type(item)
            if kind is dict or kind is list:
                waiting.append((item, step(path, key), depth + 1))
            elif kind is str:
                if "\0" in item:
                    raise invalid(step(path, key), "must not hold NUL characters")
            elif kind is int and not -BIGGEST_INTEGER - 1 <= item <= BIGGEST_INTEGER:
                raise invalid(step(path, key), "must fit into 64 bits with its sign; send it as text")


def members(container: dict[str, Any] | list[Any]) -> Iterator[tuple[Any, Any]]:
    return iter(container.items()) if isinstance(container, dict) else iter(enumerate(container))


def step(path: str, key: str | int) -> str:
    """The path of a member; cut, because keys may be of any length, and without characters that break a log line."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{CONTROL.sub('?', key[:64])}"[:300]


def check_days(start: str | None, end: str | None, where: str) -> None:
    for name, day in (("start_date", start), ("end_date", end)):
        if day is not None:
            try:
                date.fromisoformat(day)
            except ValueError:
                raise invalid(where + name, "must be a date of the calendar, written YYYY-MM-DD") from None
    if start is not None and end is not None and start > end:
        raise invalid(where + "end_date", "must not be before start_date")


def states_of(text: str, field: str) -> tuple[str, ...]:
    """One or more task states, separated by commas."""
    states = tuple(dict.fromkeys(part.strip(" ") for part in text.split(",")))
    for state in states:
        if state not in TASK_STATES:
            raise invalid(field, f"must be of {', '.join(TASK_STATES)}" + suggestion(state, TASK_STATES))
    return states


def text_of(raw: Raw) -> str | None:
    text = bytes(raw).decode()
    return None if text == "null" else text


def clean(text: str | None, length: int, *, lines: bool = False) -> str | None:
    """A device's free text: cut to `length`; control characters become spaces (NUL only, where lines are allowed)."""
    if not text:
        return None
    text = text[:length]
    return text.replace("\0", " ") if lines else CONTROL.sub(" ", text)


def tail(text: str | None) -> str | None:
    """The end of a log, at most 16 KiB in UTF-8."""
    if not text:
        return None
    if len(text) > LOG_TAIL_BYTES // 4:
        text = text[-LOG_TAIL_BYTES:].encode()[-LOG_TAIL_BYTES:].decode(errors="ignore")
    return text.replace("\0", " ")


def clamp(number: float | None, low: float, high: float) -> float | None:
    return None if number is None else min(max(number, low), high)


def measured(raw: Raw, high: float) -> float | None:
    """A device's figure from 0 to `high`, or None for anything else."""
    try:
        number = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if type(number) not in (int, float) or not 0 <= number <= high or not math.isfinite(number):
        return None
    return float(number)


# ----------------------------------------------------------------------------------------- errors in words


def invalid(field: str, rule: str) -> Invalid:
    """The 422 for a field: `rule` goes on after the field's name, such as "must be a date"."""
    return Invalid(422, "invalid_field", f"{field} {rule}.", field)


def too_deep(where: str) -> Invalid:
    what = where or "The body"
    return Invalid(400, "too_deep", f"{what} is nested deeper than {MAX_DEPTH} levels; make it flatter.", where or None)


def bad_json(raw: bytes, message: str) -> Invalid:
    """The 400 for a body that is no JSON, with the mistakes that are made most."""
    if not raw.strip():
        hint = "it is empty; send a JSON object"
    elif raw[:3] == b"\xef\xbb\xbf":
        hint = "it starts with a byte order mark; send UTF-8 without one"
    elif re.search(rb"\\u[dD][89a-fA-F]", raw):
        hint = r"a \uD800 to \uDFFF escape must be one of a pair"
    elif re.search(rb"[:,\[]\s*-?(NaN|Infinity)", raw):
        hint = "NaN and Infinity are no JSON; send null"
    else:
        hint = re.sub(r"^JSON is malformed: ", "", message)
    return Invalid(400, "bad_json", f"The body is not valid JSON: {hint}.")


def explain(message: str, type_: Any, where: str) -> Invalid:
    """msgspec's message as a sentence: "Expected `int` <= 10 - at `$[3].priority`" is "[3].priority must be ..."."""
    said, _, place = message.rpartition(" - at ")
    if not said:
        said, place = message, "`$`"
    path = re.sub(r"^key in ", "", place.replace("`", "")).partition("[...]")[0].lstrip("$")
    field = where + path if where else path.lstrip(".")
    top = msgspec.inspect.type_info(type_)
    named = re.match(r"Object (missing required|contains unknown) field `(.*)`$", said, re.DOTALL)
    if named is None:
        wanted = describe(find_type(top, path))
        rule_text = f"must be {wanted}; {got(said)}" if wanted else f"holds something unfit: {got(said)}"
        return Invalid(422, "invalid_field", f"{field or 'The body'} {rule_text}.", field or None)
    name = CONTROL.sub("?", named[2][:64])
    full = f"{field}.{name}" if field else name
    if named[1] == "missing required":
        wanted = describe(find_type(top, f"{path}.{name}")) or "given"
        return Invalid(422, "missing_field", f"{full} is missing; it must be {wanted}.", full)
    known = [entry.encode_name for entry in getattr(find_type(top, path), "fields", ())]
    hint = suggestion(name, known) or "; leave it out"
    return Invalid(422, "unknown_field", f"{full} is not a known field{hint}.", full)


def got(said: str) -> str:
    """The part of msgspec's message that says what was wrong with this value."""
    what = said.replace("`", "").replace("Expected ", "expected ")
    return "this text does not fit" if "matching regex" in what else what[:1].lower() + what[1:]


def suggestion(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?".rstrip("?") if near else ""


def find_type(info: Any, path: str) -> Any:
    """The msgspec.inspect type that a path such as [3].filter.status leads to, or None."""
    for name in re.findall(r"\.([^.\[]+)|\[\d+\]", path):
        info = inner(info)
        if name:
            info = next((entry.type for entry in getattr(info, "fields", ()) if entry.encode_name == name), None)
        else:
            info = getattr(info, "item_type", None)
    return inner(info) if isinstance(inner(info), msgspec.inspect.StructType) else info


def inner(info: Any) -> Any:
    """Without its description, and without "or null"."""
    while True:
        if isinstance(info, msgspec.inspect.Metadata):
            info = info.type
        elif isinstance(info, msgspec.inspect.UnionType):
            info = next(kind for kind in info.types if not isinstance(kind, msgspec.inspect.NoneType))
        else:
            return info


WORDS = {
    "StructType": "a JSON object",
    "BoolType": "true or false",
    "FloatType": "a number",
    "IntType": "a whole number",
    "StrType": "a text",
    "ListType": "a list",
}


def describe(info: Any) -> str:
    """What a value of this type must be, in words; "" if there are none."""
    if isinstance(info, msgspec.inspect.UnionType):
        info = next(kind for kind in info.types if not isinstance(kind, msgspec.inspect.NoneType))
    if isinstance(info, msgspec.inspect.Metadata):
        return str((info.extra_json_schema or {}).get("description", "")) or describe(info.type)
    if isinstance(info, msgspec.inspect.LiteralType):
        return "one of " + ", ".join(str(value) for value in info.values)
    return WORDS.get(type(info).__name__, "")
