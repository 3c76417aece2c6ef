"""What is a valid message: a corpus of bodies, as bytes, and what is said about each."""

from __future__ import annotations

import json
import typing

import msgspec
import pytest

import values
import wire
from values import BIGGEST_INTEGER, Invalid


def task(rest: bytes = b"") -> bytes:
    return b'{"task_type": "crawl"' + (b", " + rest if rest else b"") + b"}"


def data(value: bytes) -> bytes:
    return task(b'"task_data": {"a": ' + value + b"}")


def deep(levels: int) -> bytes:
    """A task whose task_data has so many levels."""
    return task(b'"task_data": ' + b'{"a": ' * levels + b"1" + b"}" * levels)


REFUSED_TASKS = [
    # JSON itself
    ("empty", b"", 400, "bad_json", None),
    ("only spaces", b" \n", 400, "bad_json", None),
    ("cut off", b'{"task_type": "cr', 400, "bad_json", None),
    ("two values", task() + b" 1", 400, "bad_json", None),
    ("single quotes", b"{'task_type': 'crawl'}", 400, "bad_json", None),
    ("trailing comma", b'{"task_type": "crawl",}', 400, "bad_json", None),
    ("byte order mark", b"\xef\xbb\xbf" + task(), 400, "bad_json", None),
    ("not UTF-8", data(b'"\xff"'), 400, "bad_json", None),
    ("a surrogate in UTF-8", data(b'"\xed\xa0\x80"'), 400, "bad_json", None),
    ("UTF-16", task().decode().encode("utf-16"), 400, "bad_json", None),
    ("lone surrogate", data(rb'"\ud800"'), 400, "bad_json", None),
    ("low surrogate first", data(rb'"\udc00\ud800"'), 400, "bad_json", None),
    ("lone surrogate in a name", rb'{"task_type": "\ud83d"}', 400, "bad_json", None),
    ("raw control character", data(b'"\x01"'), 400, "bad_json", None),
    ("NaN", data(b"NaN"), 400, "bad_json", None),
    ("Infinity", data(b"[-Infinity]"), 400, "bad_json", None),
    ("NaN in a field", task(b'"priority": NaN'), 400, "bad_json", None),
    ("leading zero", data(b"01"), 400, "bad_json", None),
    # depth
    ("depth 33", deep(33), 400, "too_deep", "task_data"),
    ("depth 33 of lists", data(b"[" * 32 + b"]" * 32), 400, "too_deep", "task_data"),
    (
        "depth 33 behind brackets in strings",
        data(b'["}}}}]]]]", ' + b"[" * 32 + b"]" * 33),
        400,
        "too_deep",
        "task_data",
    ),
    ("depth 100,000", deep(100_000), 400, "too_deep", None),
    ("depth 100,000, never closed", b"[" * 100_000, 422, "invalid_field", "[0]"),
    # the whole body
    ("a number", b"3", 422, "invalid_field", None),
    ("null", b"null", 422, "invalid_field", None),
    ("a list in a list", b"[[]]", 422, "invalid_field", "[0]"),
    ("no task_type", b"{}", 422, "missing_field", "task_type"),
    ("a misspelt field", task(b'"pririty": 3'), 422, "unknown_field", "pririty"),
    # numbers
    ("priority 0", task(b'"priority": 0'), 422, "invalid_field", "priority"),
    ("priority 11", task(b'"priority": 11'), 422, "invalid_field", "priority"),
    ("priority -1", task(b'"priority": -1'), 422, "invalid_field", "priority"),
    ("priority 5.5", task(b'"priority": 5.5'), 422, "invalid_field", "priority"),
    ("priority as text", task(b'"priority": "5"'), 422, "invalid_field", "priority"),
    ("priority true", task(b'"priority": true'), 422, "invalid_field", "priority"),
    ("priority null", task(b'"priority": null'), 422, "invalid_field", "priority"),
    ("priority 2**64", task(b'"priority": 18446744073709551616'), 422, "invalid_field", "priority"),
    ("parent_id 2**63", task(b'"parent_id": 9223372036854775808'), 422, "invalid_field", "parent_id"),
    ("parent_id 0", task(b'"parent_id": 0'), 422, "invalid_field", "parent_id"),
    ("delay 1e400", task(b'"delay_seconds": 1e400'), 422, "invalid_field", "delay_seconds"),
    ("delay below zero", task(b'"delay_seconds": -0.1'), 422, "invalid_field", "delay_seconds"),
    ("timeout 0", task(b'"execution_timeout_seconds": 0'), 422, "invalid_field", "execution_timeout_seconds"),
    ("retries 101", task(b'"max_retry_count": 101'), 422, "invalid_field", "max_retry_count"),
    ("2**63 in task_data", data(b"9223372036854775808"), 422, "invalid_field", "task_data.a"),
    ("2**64 in task_data", data(b"[1, 18446744073709551616]"), 422, "invalid_field", "task_data.a[1]"),
    ("-2**63 - 1 in task_data", data(b"-9223372036854775809"), 422, "invalid_field", "task_data.a"),
    ("5,000 digits", data(b"1" * 5_000), 422, "invalid_field", "task_data"),
    ("1e400 in task_data", data(b"1e400"), 422, "invalid_field", "task_data"),
    ("-1E+0400 in task_data", data(b"[-1E+0400]"), 422, "invalid_field", "task_data"),
    ("300 digits e99", data(b"1" * 300 + b"e99"), 422, "invalid_field", "task_data"),
    # characters
    ("NUL in task_data", data(rb'"x\u0000"'), 422, "invalid_field", "task_data.a"),
    ("NUL deep in task_data", data(rb'{"b": [1, "\u0000"]}'), 422, "invalid_field", "task_data.a.b[1]"),
    ("NUL in a key", task(rb'"task_data": {"x\u0000": 1}'), 422, "invalid_field", "task_data"),
    ("NUL in batch", task(rb'"batch": "x\u0000"'), 422, "invalid_field", "batch"),
    ("line feed in username", task(rb'"username": "x\ny"'), 422, "invalid_field", "username"),
    ("delete in unique_key", task(b'"unique_key": "x\x7f"'), 422, "invalid_field", "unique_key"),
    ("NEL in app_id", task('"app_id": "x\u0085"'.encode()), 422, "invalid_field", "app_id"),
    ("line feed after task_type", rb'{"task_type": "crawl\n"}', 422, "invalid_field", "task_type"),
    ("Chinese task_type", '{"task_type": "爬虫"}'.encode(), 422, "invalid_field", "task_type"),
    ("task_type of 65", b'{"task_type": "' + b"x" * 65 + b'"}', 422, "invalid_field", "task_type"),
    ("batch of 129", task(b'"batch": "' + b"x" * 129 + b'"'), 422, "invalid_field", "batch"),
    ("empty batch", task(b'"batch": ""'), 422, "invalid_field", "batch"),
    ("a tag with a space", task(b'"required_tags": ["a", "b c"]'), 422, "invalid_field", "required_tags[1]"),
    # what belongs together
    ("task_data a list", task(b'"task_data": []'), 422, "invalid_field", "task_data"),
    ("task_data null", task(b'"task_data": null'), 422, "invalid_field", "task_data"),
    ("task_data over 1 MiB", data(b'"' + b"x" * 1024 * 1024 + b'"'), 413, "too_large", "task_data"),
    ("no such day", task(b'"start_date": "2026-02-30"'), 422, "invalid_field", "start_date"),
    ("a day otherwise written", task(b'"end_date": "20260201"'), 422, "invalid_field", "end_date"),
    (
        "end before start",
        task(b'"start_date": "2026-02-02", "end_date": "2026-02-01"'),
        422,
        "invalid_field",
        "end_date",
    ),
    ("run_at without zone", task(b'"run_at": "2026-02-01T00:00:00"'), 422, "invalid_field", "run_at"),
    ("run_at and delay", task(b'"run_at": "2026-02-01T00:00:00Z", "delay_seconds": 1'), 422, "invalid_field", "run_at"),
    ("a limit without batch", task(b'"max_batch_tasks": 5'), 422, "invalid_field", "max_batch_tasks"),
    ("if_exists replace", task(b'"if_exists": "replace"'), 422, "invalid_field", "if_exists"),
    # lists
    (
        "the second of a list",
        b"[" + task() + b", " + task(b'"priority": 0') + b"]",
        422,
        "invalid_field",
        "[1].priority",
    ),
    ("NUL in the second", b"[" + task() + b", " + data(rb'"\u0000"') + b"]", 422, "invalid_field", "[1].task_data.a"),
    ("in tasks", b'{"tasks": [' + task(b'"batch": "\x7f"') + b"]}", 422, "invalid_field", "tasks[0].batch"),
    ("tasks no list", b'{"tasks": 1}', 422, "invalid_field", "tasks"),
    ("tasks and more", b'{"tasks": [], "task_type": "crawl"}', 422, "unknown_field", "task_type"),
    ("10,001 tasks", b"[" + b", ".join([task()] * 10_001) + b"]", 422, "invalid_field", None),
]


@pytest.mark.parametrize(("raw", "status", "code", "field"), [case[1:] for case in REFUSED_TASKS],
                         ids=[case[0] for case in REFUSED_TASKS])  # fmt: skip
def test_a_bad_task_is_refused_with_its_field(raw: bytes, status: int, code: str, field: str | None) -> None:
    with pytest.raises(Invalid) as caught:
        wire.decode_submit(raw)
    refused = caught.value
    assert (refused.status, refused.code, refused.field) == (status, code, field)
    assert refused.detail.endswith(".") and len(refused.detail) <= 501
    assert "`" not in refused.detail and "$" not in refused.detail


ACCEPTED_TASKS = [
    ("the least", task()),
    ("depth 32", deep(32)),
    ("brackets in a string", data(b'"' + b"[{" * 1_000 + b'"')),
    ("an escaped backslash before u0000", data(rb'"x\\u0000"')),
    ("the greatest integer", data(str(BIGGEST_INTEGER).encode())),
    ("a long number in a string", data(b'"18446744073709551616"')),
    ("a page's number", data(b'"https://example.org/page123?x=0e400"')),
    ("the greatest float", data(b"1.7976931348623157e308")),
    ("a tiny float", data(b"1e-400")),
    ("a pair of surrogates", data(rb'"\ud83d\ude00"')),
    ("line feeds in task_data", data(rb'"a\nb"')),
    ("Chinese", task('"batch": "批次", "username": "王"'.encode())),
    ("the same key twice", task(b'"priority": 1, "priority": 2')),
    ("one day", task(b'"start_date": "2026-02-01", "end_date": "2026-02-01"')),
    ("a time with an offset", task(b'"run_at": "2026-02-01T08:00:00+08:00"')),
]


@pytest.mark.parametrize("raw", [case[1] for case in ACCEPTED_TASKS], ids=[case[0] for case in ACCEPTED_TASKS])
def test_a_good_task_is_accepted_and_its_data_is_kept_as_sent(raw: bytes) -> None:
    submission = wire.decode_submit(raw)
    assert submission.single
    assert json.loads(submission.tasks[0].data_text) == json.loads(raw).get("task_data", {})


def test_one_task_and_lists_are_told_apart() -> None:
    assert wire.decode_submit(task()).single
    assert not wire.decode_submit(b" [" + task() + b"]").single
    assert len(wire.decode_submit(b'{"tasks": [' + task() + b", " + task() + b"]}").tasks) == 2
    assert wire.decode_submit(data(b'{"tasks": []}')).single
    assert wire.decode_submit(b"[]").tasks == []


def test_empty_task_data_is_one_text_however_it_is_written() -> None:
    for raw in (task(), task(b'"task_data": {}'), task(b'"task_data": { \n }')):
        assert wire.decode(raw, wire.TaskIn).data_text == "{}"


def test_run_at_is_read_with_its_offset() -> None:
    read = wire.decode(task(b'"run_at": "1970-01-01T08:00:01+08:00"'), wire.TaskIn)
    assert read.run_at_seconds == 1.0


def test_the_last_of_equal_keys_counts() -> None:
    assert wire.decode(task(b'"priority": 1, "priority": 2'), wire.TaskIn).priority == 2


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (task(b'"priority": 11'), "a whole number from 1 to 10"),
        (task(b'"delay_seconds": -1'), "a number of seconds from 0 to 31536000"),
        (task(b'"pririty": 1'), "did you mean priority"),
        (task(b'"if_exists": "x"'), "return"),
        (data(b"NaN"), "send null"),
        (data(rb'"\ud800"'), "must be one of a pair"),
    ],
)
def test_an_error_says_what_to_write(raw: bytes, text: str) -> None:
    with pytest.raises(Invalid, match=text):
        wire.decode(raw, wire.TaskIn)


def test_an_error_never_repeats_a_long_value() -> None:
    with pytest.raises(Invalid) as caught:
        wire.decode(task(b'"if_exists": "' + b"x" * 100_000 + b'"'), wire.TaskIn)
    assert len(caught.value.detail) <= 500


# -- devices


def beat(**fields: object) -> bytes:
    return json.dumps({"boot_id": "b1", "seq": 1, **fields}).encode()


@pytest.mark.parametrize("figure", [-1, 100.5, "50", True, None, [1], 10**30])
def test_a_usage_figure_out_of_range_is_dropped_and_the_beat_counts(figure: object) -> None:
    read = wire.decode(beat(cpu_usage=figure, memory_usage=50), wire.HeartbeatIn)
    assert (read.cpu_usage, read.memory_usage, read.disk_usage) == (None, 50.0, None)


@pytest.mark.parametrize("clock", [-1, "noon", True, [1], 1e300])
def test_a_clock_that_is_none_is_dropped_and_the_beat_counts(clock: object) -> None:
    assert wire.decode(beat(clock=clock), wire.HeartbeatIn).clock is None
    assert wire.decode(beat(clock=1800000000.5), wire.HeartbeatIn).clock == 1800000000.5


def test_a_problem_is_a_short_line_whatever_a_newer_device_says() -> None:
    assert wire.decode(beat(problem="on_fire\n" + "x" * 100), wire.HeartbeatIn).problem == "on_fire " + "x" * 56
    assert wire.decode(beat(problem=""), wire.HeartbeatIn).problem is None


def test_a_beat_that_says_nothing_about_holding_is_told_from_one_that_holds_nothing() -> None:
    assert wire.decode(beat(holding=[]), wire.HeartbeatIn).holding == []
    assert wire.decode(beat(holding=None), wire.HeartbeatIn).holding is None
    assert wire.decode(b'{"boot_id": "b", "seq": 1}', wire.HeartbeatIn).holding is None


def test_a_usage_figure_past_all_floats_is_dropped_too() -> None:
    assert wire.decode(b'{"boot_id": "b", "seq": 1, "cpu_usage": 1e400}', wire.HeartbeatIn).cpu_usage is None


def test_fields_of_newer_devices_are_ignored() -> None:
    holding = [{"assignment_id": 1, "lease_id": "a", "phase": "running", "gpu": 3, "progress": 1.5}]
    read = wire.decode(beat(gpu_usage=3, holding=holding), wire.HeartbeatIn)
    assert read.holding is not None and read.holding[0].progress == 1.0


def test_system_info_that_cannot_be_stored_is_dropped() -> None:
    assert wire.decode(beat(system_info={"os": "linux"}), wire.HeartbeatIn).system_info_text == '{"os": "linux"}'
    for unfit in ([1], None, {"x": "\0"}, {"x": 2**64}, {"x": "y" * 20_000}):
        assert wire.decode(beat(system_info=unfit), wire.HeartbeatIn).system_info_text is None


DEVICE = {"device_id": "a", "boot_id": "b", "protocol": 1, "task_types": []}
HELD = [{"assignment_id": 1}]

REFUSED_MESSAGES = [
    (wire.HeartbeatIn, {"seq": 1}, "missing_field", "boot_id"),
    (wire.HeartbeatIn, {"boot_id": "b", "seq": -1}, "invalid_field", "seq"),
    (wire.HeartbeatIn, {"boot_id": "b", "seq": 1, "holding": HELD}, "missing_field", "holding[0].lease_id"),
    (wire.RegisterIn, {**DEVICE, "device_id": "a b"}, "invalid_field", "device_id"),
    (wire.RegisterIn, {**DEVICE, "device_id": "设备"}, "invalid_field", "device_id"),
    (wire.RegisterIn, {**DEVICE, "task_types": ["x y"]}, "invalid_field", "task_types[0]"),
    (wire.RegisterIn, {**DEVICE, "weight": 0}, "invalid_field", "weight"),
    (wire.RegisterIn, {**DEVICE, "device_name": "x\ny"}, "invalid_field", "device_name"),
    (wire.StatusIn, {"status": "done"}, "invalid_field", "status"),
    (wire.StatusIn, {"status": "completed"}, "invalid_field", "lease_id"),
    (wire.StatusIn, {"status": "completed", "lease_id": "l", "result": [1]}, "invalid_field", "result"),
    (wire.DeviceStatusIn, {"status": "offline"}, "invalid_field", "status"),
    (wire.DeviceStatusIn, {"status": "active", "reson": "x"}, "unknown_field", "reson"),
    (wire.AssignIn, {}, "missing_field", "device_id"),
    (wire.StrategyIn, {"strategy": "os; rm"}, "invalid_field", "strategy"),
    (wire.ReasonIn, {"reason": "a\rb"}, "invalid_field", "reason"),
    (wire.LoginIn, {"key": ""}, "invalid_field", "key"),
    (wire.ActionIn, {"action": "cancel"}, "missing_field", "filter"),
    (wire.ActionIn, {"action": "cancel", "filter": {"state": "failed"}}, "unknown_field", "filter.state"),
    (wire.ActionIn, {"action": "cancel", "filter": {"status": "failed,done"}}, "invalid_field", "filter.status"),
    (wire.ActionIn, {"action": "delete", "filter": {}}, "invalid_field", "action"),
]  # fmt: skip


@pytest.mark.parametrize(("type_", "message", "code", "field"), REFUSED_MESSAGES)
def test_a_bad_message_is_refused_with_its_field(type_: type, message: object, code: str, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        wire.decode(json.dumps(message).encode(), type_)
    assert (caught.value.status, caught.value.code, caught.value.field) == (422, code, field)


def report(**fields: object) -> dict[str, object]:
    return {"assignment_id": 7, "lease_id": "abc", "outcome": "completed", **fields}


def reports(*entries: object) -> bytes:
    return json.dumps({"device_id": "d1", "reports": entries}).encode()


def test_one_bad_report_does_not_block_the_others() -> None:
    read = wire.decode_reports(
        reports(
            report(result={"n": 1}),
            report(outcome="lost"),
            report(result={"x": "\0"}),
            {"assignment_id": "x"},
            3,
            report(assignment_id=8),
        )
    )
    kinds = [type(entry).__name__ for entry in read.entries]
    assert kinds == ["ReportIn", "BadReport", "BadReport", "BadReport", "BadReport", "ReportIn"]
    bad = [entry for entry in read.entries if isinstance(entry, wire.BadReport)]
    assert [entry.assignment_id for entry in bad] == [7, 7, None, None]
    assert [entry.problem.field for entry in bad] == ["outcome", "result.x", "assignment_id", None]
    assert isinstance(read.entries[0], wire.ReportIn) and read.entries[0].result_text == '{"n": 1}'


def test_a_bad_new_task_makes_its_own_report_invalid() -> None:
    read = wire.decode_reports(reports(report(new_tasks=[{"task_type": "crawl"}, {"task_type": "c d"}]), report()))
    assert isinstance(read.entries[0], wire.BadReport) and isinstance(read.entries[1], wire.ReportIn)
    assert read.entries[0].problem.field == "new_tasks[1].task_type"


def test_reports_without_a_device_are_refused_as_a_whole() -> None:
    with pytest.raises(Invalid) as caught:
        wire.decode_reports(b'{"reports": [1]}')
    assert caught.value.field == "device_id"


def test_a_reports_free_text_is_cut_and_cleaned_never_refused() -> None:
    entry = report(log_tail="x\0" + "语" * 20_000, error_message="a\nb\0" + "y" * 9_000, error_type="a\nb", progress=7,
                   duration_seconds=-3)  # fmt: skip
    read = wire.decode(json.dumps(entry).encode(), wire.ReportIn)
    assert read.log_tail is not None and 0 < len(read.log_tail.encode()) <= 16 * 1024 and "\0" not in read.log_tail
    assert (
        read.error_message is not None and read.error_message.startswith("a\nb y") and len(read.error_message) == 4_000
    )
    assert (read.error_type, read.progress, read.duration_seconds) == ("a b", 1.0, 0.0)


def test_an_action_gives_the_filter_that_the_list_takes() -> None:
    body = {"status": "failed, cancelled", "batch": "b", "created_after": "1970-01-01T00:00:01Z"}
    read = wire.decode(json.dumps({"action": "requeue", "filter": body}).encode(), wire.ActionIn)
    assert read.filter.filters() == {"status": ("failed", "cancelled"), "batch": "b", "created_after": 1.0}


def body_types() -> list[type[wire.Body]]:
    found, waiting = [], [wire.Body]
    while waiting:
        kinds = waiting.pop().__subclasses__()
        found += kinds
        waiting += kinds
    return [kind for kind in found if kind not in (wire.DeviceBody, wire.StrictBody)]


@pytest.mark.parametrize("type_", body_types())
def test_every_text_of_a_body_is_a_name_a_line_or_free_text_that_is_cleaned(type_: type[wire.Body]) -> None:
    cleaned = {"error_message", "error_type", "reason", "log_tail", "message", "problem"}
    cleaned |= {"limit_closed_until", "limit_name"}
    for name, hint in typing.get_type_hints(type_, include_extras=True).items():
        info = msgspec.inspect.type_info(hint) if name in type_.__struct_fields__ else None
        shapes = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
        for shape in shapes:
            inner = shape.type if isinstance(shape, msgspec.inspect.Metadata) else shape
            if isinstance(inner, msgspec.inspect.StrType) and inner.pattern is None:
                is_compared = (type_, name) == (wire.FilterIn, "error")  # with texts that were cleaned when they came
                is_cleaned = name in cleaned and issubclass(type_, wire.DeviceBody)
                assert name in type_.LINES or is_cleaned or is_compared, name


# -- queries and replies

REFUSED_QUERIES = [
    ("limit=0", "limit"), ("limit=201", "limit"), ("limit=1.5", "limit"), ("limit=x", "limit"), ("limit=-5", "limit"),
    ("limit=" + "9" * 5000, "limit"), ("limit=1&limit=2", "limit"), ("wait=nan", "wait"), ("wait=1e5", "wait"),
    ("wait=26", "wait"),
    ("status=done", "status"), ("status=pending,,", "status"), ("created_after=yesterday", "created_after"),
    ("created_before=2026-02-01", "created_before"), ("batch=a%00b", "batch"), ("task_type=a%20b", "task_type"),
    ("parent_id=0", "parent_id"), ("format=xml", "format"), ("statsu=failed", "statsu"),
]  # fmt: skip


def read_query(text: str) -> dict[str, object]:
    query = wire.Query(text)
    found = query.filters()
    found["limit"] = query.integer("limit", 50, minimum=1, maximum=200)
    found["wait"] = query.number("wait", 0.0, maximum=25)
    found["format"] = query.choice("format", ("jsonl", "csv"), "jsonl")
    query.finish()
    return found


@pytest.mark.parametrize(("text", "field"), REFUSED_QUERIES)
def test_a_bad_query_is_refused_with_its_parameter(text: str, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_query(text)
    assert (caught.value.status, caught.value.field) == (422, field)


def test_a_query_that_is_not_utf8_is_malformed() -> None:
    with pytest.raises(Invalid) as caught:
        wire.Query("batch=%ff")
    assert caught.value.status == 400


def test_a_query_is_read_with_its_types_and_its_chinese() -> None:
    found = read_query(
        "batch=%E6%89%B9%E6%AC%A1&status=failed,running&limit=7&wait=2.5&created_after=1970-01-01T00:00:02Z&text="
    )
    assert found == {
        "batch": "批次", "status": ("failed", "running"), "limit": 7, "wait": 2.5, "created_after": 2.0,
        "format": "jsonl",
    }  # fmt: skip


def test_ids_and_names_of_a_path_are_checked() -> None:
    assert wire.check_id("17") == 17
    for text in ("0", "-1", "x", "9" * 19, "9" * 40, "1\n", "٣"):
        with pytest.raises(Invalid):
            wire.check_id(text)
    with pytest.raises(Invalid):
        wire.check_name("a/b", "device_id")


def test_times_are_written_with_milliseconds_and_read_back() -> None:
    assert wire.iso(1764079147.1234) == "2025-11-25T13:59:07.123Z"
    assert wire.iso(None) is None
    assert wire.parse_time("2025-11-25T13:59:07.123Z", "x") == pytest.approx(1764079147.123)


def test_a_reply_is_always_json() -> None:
    assert wire.encode({"a": float("nan"), "b": float("inf")}) == b'{"a":null,"b":null}'


def test_a_problem_carries_its_title_and_its_field() -> None:
    assert wire.problem(422, "invalid_field", "Write it.", "a") == {
        "type": "about:blank", "title": "Unprocessable Entity", "status": 422, "code": "invalid_field",
        "detail": "Write it.", "field": "a",
    }  # fmt: skip
    assert "field" not in wire.problem(404, "unknown_task", "No.")


def test_every_decoder_is_ready_before_the_first_request() -> None:
    """msgspec 0.22 crashes the process when two threads are the first to use a message type at the same moment."""
    bodies = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire.Body)]
    messages = [kind for kind in bodies if kind not in (wire.Body, wire.DeviceBody, wire.StrictBody)]
    missed = values.decoder_for.cache_info().misses
    for kind in [*messages, wire.TaskList, wire.AssignmentOnly]:
        values.decoder_for(kind)
    assert len(messages) > 10 and values.decoder_for.cache_info().misses == missed
