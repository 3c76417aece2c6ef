"""What becomes of what an executor returns, raises, prints and logs?"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from executors import task_executor
from executors.echo import EchoExecutor
from executors.task_executor import DoNotRetry, Outcome, Result, Retry, Snooze, TaskExecutor

GUIDE = """
from executors.task_executor import TaskExecutor

class CustomTaskExecutor(TaskExecutor):
    def __init__(self):
        super().__init__("custom_task")
    
    def execute_task(self, task_data):
        # 实现自定义任务逻辑
        return {"status": "success"}
"""  # noqa: W293 - exactly as printed


class Calling(TaskExecutor):
    """An executor that does what a test says."""

    def __init__(self, work: Any):
        super().__init__("calling")
        self.work = work

    def execute_task(self, task_data: dict[str, Any]) -> Any:
        return self.work(task_data)


def run(work: Any, **task: Any) -> Outcome:
    return task_executor.run(Calling(work), {"id": 7, "task_type": "calling", **task})


def raising(error: BaseException) -> Any:
    def work(_: Any) -> None:
        raise error

    return work


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """Not a fixture: pytest puts other streams in place between a fixture and its test."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    task_executor.install_capture()
    try:
        yield
    finally:
        task_executor.remove_capture()
        logging.getLogger().setLevel(level)


# --- the guide


def test_the_guides_custom_executor_runs_exactly_as_printed(tmp_path: Path) -> None:
    (tmp_path / "my_tasks.py").write_text(GUIDE, encoding="utf-8")
    executors = task_executor.load_executors([str(tmp_path / "my_tasks.py")])
    outcome = task_executor.run(executors["custom_task"], {"id": 1, "task_data": {}})
    assert (outcome.outcome, outcome.result) == ("completed", {"status": "success"})


def test_the_task_data_holds_the_tasks_own_columns_where_they_are_set() -> None:
    outcome = run(
        lambda data: data, task_data={"x": 1}, username="u", app_id="", start_date="2026-01-01", end_date=None
    )
    assert outcome.result == {"x": 1, "username": "u", "start_date": "2026-01-01"}


# --- endings


def test_a_dict_is_completed_and_a_result_brings_its_new_tasks_with_batch_and_parent() -> None:
    children = [{"task_type": "echo"}, {"task_type": "echo", "batch": "own", "parent_id": 3}]
    outcome = run(lambda _: Result({"n": 1}, new_tasks=children), batch="b")
    assert outcome.result == {"n": 1}
    assert outcome.new_tasks == [
        {"task_type": "echo", "batch": "b", "parent_id": 7},
        {"task_type": "echo", "batch": "own", "parent_id": 3},
    ]


def test_an_error_is_retried_and_its_traceback_is_in_the_log_tail() -> None:
    outcome = run(raising(ZeroDivisionError("no pages")))
    assert (outcome.outcome, outcome.retry, outcome.error_type) == ("failed", True, "ZeroDivisionError")
    assert outcome.error_message == "no pages"
    assert "Traceback" in outcome.log_tail
    assert "in work" in outcome.log_tail


def test_retry_do_not_retry_and_snooze_mean_what_they_say() -> None:
    retry = run(raising(Retry("busy", after=90)))
    assert (retry.outcome, retry.retry, retry.retry_after_seconds) == ("failed", True, 90.0)
    never = run(raising(DoNotRetry("url is missing")))
    assert (never.outcome, never.retry, never.error_message) == ("failed", False, "url is missing")
    snooze = run(raising(Snooze(120, "rate limit")))
    assert (snooze.outcome, snooze.snooze_seconds, snooze.error_message) == ("snoozed", 120.0, "rate limit")
    assert retry.log_tail == never.log_tail == snooze.log_tail == ""


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -5, None, "soon", True])
def test_a_senseless_wait_becomes_a_wait_that_can_be_sent(seconds: Any) -> None:
    snoozed = run(raising(Snooze(seconds)))
    assert snoozed.snooze_seconds is not None and 0 <= snoozed.snooze_seconds <= 7 * 86400
    retried = run(raising(Retry("x", seconds)))
    assert retried.retry_after_seconds is None or 0 <= retried.retry_after_seconds <= 7 * 86400


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit(), KeyboardInterrupt(), GeneratorExit(), MemoryError()])
def test_an_executor_cannot_end_the_device(error: BaseException) -> None:
    outcome = run(raising(error))
    assert (outcome.outcome, outcome.retry, outcome.error_type) == ("failed", True, type(error).__name__)
    assert outcome.error_message


def test_an_exception_whose_text_fails_is_still_an_outcome() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    outcome = run(raising(Broken()))
    assert (outcome.error_type, outcome.error_message) == ("Broken", "Broken")


def test_an_exception_that_cannot_be_described_is_an_outcome_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)  # what the log's own formatting makes of them is not asked here

    class MySnooze(Snooze):
        def __init__(self) -> None:
            pass

    class MyRetry(Retry):
        def __init__(self) -> None:
            pass

    class Exits(Exception):
        def __str__(self) -> str:
            raise SystemExit(1)

    class Nameless(type):
        @property
        def __name__(cls) -> str:  # type: ignore[override]
            raise KeyboardInterrupt

    class Unnamed(Exception, metaclass=Nameless):
        pass

    class Late(Snooze):
        def __init__(self) -> None:
            pass

        def __getattribute__(self, name: str) -> Any:
            return sys.exit(2) if name == "seconds" else super().__getattribute__(name)

    assert (run(raising(MySnooze())).outcome, run(raising(MySnooze())).snooze_seconds) == ("snoozed", 60.0)
    assert (run(raising(Late())).outcome, run(raising(Late())).snooze_seconds) == ("snoozed", 60.0)
    retry = run(raising(MyRetry()))
    assert (retry.error_type, retry.retry, retry.retry_after_seconds) == ("MyRetry", True, None)
    exits = run(raising(Exits()))
    assert (exits.outcome, exits.error_type, exits.error_message) == ("failed", "Exits", "Exits")
    unnamed = run(raising(Unnamed()))
    assert (unnamed.outcome, unnamed.retry) == ("failed", True) and unnamed.error_message


def test_an_executor_without_execute_task_is_not_retried() -> None:
    outcome = task_executor.run(TaskExecutor("half"), {"id": 1})
    assert (outcome.outcome, outcome.retry) == ("failed", False)
    assert "execute_task" in (outcome.error_message or "")


@pytest.mark.parametrize(
    ("returned", "place"),
    [
        (None, "NoneType"),
        ([1], "list"),
        ({"price": math.nan}, "result.price is nan"),
        ({"rows": [{"n": -math.inf}]}, "result.rows[0].n is -inf"),
        ({"when": object()}, "result.when is of type object"),
        ({1: "x"}, "key 1 of type int"),
        ({"n": 2**63}, "result.n is an integer past 64 bits"),
        (Result({}, new_tasks=["x"]), "new_tasks"),  # type: ignore[list-item]
        (Result({}, new_tasks=[{"priority": math.nan}]), "new_tasks[0].priority"),
        (Result({}, new_tasks=[{}] * 10_001), "10001 tasks"),
        ({"big": "x" * (8 * 1024 * 1024)}, "over 7340032 bytes"),
    ],
)
def test_a_result_that_cannot_be_sent_names_its_place_and_is_not_retried(returned: Any, place: str) -> None:
    outcome = run(lambda _: returned)
    assert (outcome.outcome, outcome.retry, outcome.error_type) == ("failed", False, "BadResult")
    assert place in (outcome.error_message or "")


def test_a_result_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    outcome = run(lambda _: loop)
    assert (outcome.outcome, outcome.error_type) == ("failed", "BadResult")


def test_every_sent_text_is_free_of_nul_and_lone_surrogates(caplog: pytest.LogCaptureFixture) -> None:
    # The log record holds the lone surrogate as it came, and tests that run in parallel cannot send it to each other.
    caplog.set_level(logging.CRITICAL + 1)
    outcome = run(lambda _: {"a\0": ["b\ud800", ("c",)]})
    assert outcome.result == {"a\ufffd": ["b\ufffd", ["c"]]}
    failed = run(raising(ValueError("bad \0 \udfff")))
    assert failed.error_message == "bad \ufffd \ufffd"
    json.dumps(failed.as_report(1, "lease"), allow_nan=False).encode("utf-8")


def test_a_report_leaves_out_what_says_nothing() -> None:
    ok = run(lambda _: {"n": 1}).as_report(5, "lease")
    assert ok.pop("duration_seconds") >= 0
    assert ok == {"assignment_id": 5, "lease_id": "lease", "outcome": "completed", "result": {"n": 1}}
    never = run(raising(DoNotRetry("no"))).as_report(5, "lease")
    assert (never["retry"], never["error_message"], never["error_type"]) == (False, "no", "DoNotRetry")
    snoozed = run(raising(Snooze(5, "later"))).as_report(5, "lease")
    assert (snoozed["reason"], snoozed["snooze_seconds"]) == ("later", 5.0)
    assert "error_message" not in snoozed


def test_the_duration_is_by_the_given_clock() -> None:
    ticks = iter([100.0, 102.5])
    outcome = task_executor.run(Calling(lambda _: {}), {"id": 1}, clock=lambda: next(ticks))
    assert outcome.duration_seconds == 2.5


# --- the context


def test_the_context_carries_task_cancellation_progress_and_deadline() -> None:
    said: list[tuple[float, str]] = []
    now = [100.0]
    seen: dict[str, Any] = {}

    def work(_: Any) -> dict[str, Any]:
        context = task_executor.current()
        now[0] = 104.0
        seen.update(id=context.task["id"], cancelled=context.cancelled, left=context.deadline_seconds)
        for fraction in (0.5, 7.0, math.nan):
            context.progress(fraction, "half")
        return {}

    task = {"id": 9, "execution_timeout_seconds": 10}
    task_executor.run(
        Calling(work),
        task,
        is_cancelled=lambda: True,
        report_progress=lambda f, m: said.append((f, m)),
        clock=lambda: now[0],
    )
    assert seen == {"id": 9, "cancelled": True, "left": 6.0}
    assert said == [(0.5, "half"), (1.0, "half")]


def test_outside_of_a_task_there_is_no_context() -> None:
    with pytest.raises(RuntimeError, match="no task is running"):
        task_executor.current()
    run(lambda _: {})
    with pytest.raises(RuntimeError, match="no task is running"):
        _ = Calling(None).context


TOKEN = "token-that-nobody-may-read-9d2f"
SETTINGS = {"device_id": "shop-7", "api_key": "key-of-the-device", "credentials": {"af": TOKEN, "pin": "1234"}}


def test_the_settings_are_seen_without_what_is_secret() -> None:
    def work(_: Any) -> dict[str, Any]:
        context = task_executor.current()
        with pytest.raises(TypeError):
            context.settings["device_id"] = "other"  # type: ignore[index]
        return {**context.settings}

    outcome = task_executor.run(Calling(work), {"id": 1}, settings=SETTINGS)
    assert outcome.result == {"device_id": "shop-7"}


def test_a_credential_reaches_the_executor_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    progress: list[Any] = []

    def work(_: Any) -> Result:
        token = task_executor.current().credential("af")
        seen.append(token)
        print("printed", token, "key-of-the-device")
        print(token[:9], token[9:], sep="")
        logging.getLogger("mine").warning("logged %s", token)
        task_executor.current().progress(0.5, f"with {token}")
        result = {"list": [token, {token: 1}], "url": f"https://x/?t={token}&pin=1234"}
        return Result(result, new_tasks=[{"task_data": {"token": token}}])

    with captured():
        outcome = task_executor.run(
            Calling(work), {"id": 1}, settings=SETTINGS, report_progress=lambda *said: progress.append(said)
        )
    assert seen == [TOKEN]
    assert outcome.result == {"list": ["***", {"***": 1}], "url": "https://x/?t=***&pin=1234"}
    assert outcome.new_tasks == [{"task_data": {"token": "***"}, "parent_id": 1}]
    assert outcome.log_tail == "printed *** ***\n***\nWARNING mine logged ***\n"
    assert progress == [(0.5, "with ***")]
    assert all(TOKEN not in message for message in caplog.messages if "printed" in message)


def test_the_password_of_the_proxy_is_hidden() -> None:
    settings = {"crawl_proxy": "http://shop:long-word@proxy.example.org:3128"}
    outcome = task_executor.run(Calling(raising(ValueError("407 for shop:long-word"))), {"id": 1}, settings=settings)
    assert outcome.error_message == "407 for shop:***"


@pytest.mark.parametrize(
    ("secret", "spelt"),
    [("a+b/c d", "a%2Bb%2Fc%20d"), ('quote"quote', 'quote\\"quote'), ("密码密码密码", "%E5%AF%86%E7%A0%81" * 3)],
)
def test_a_credential_is_hidden_in_every_spelling(secret: str, spelt: str) -> None:
    settings = {"credentials": {"af": secret}}
    outcome = task_executor.run(Calling(raising(ValueError(f"<{secret}|{spelt}>"))), {"id": 1}, settings=settings)
    assert outcome.error_message == "<***|***>"
    assert secret not in outcome.log_tail and "<***|***>" in outcome.log_tail


def test_a_key_of_a_master_is_hidden_although_no_setting_names_it() -> None:
    token = "afk_12_Q-abcdefghijklmnop_r"
    outcome = task_executor.run(Calling(raising(ValueError(f"<{token}>"))), {"id": 1}, settings={})
    assert outcome.error_message == "<***>" and token not in outcome.log_tail


def test_half_a_credential_is_not_left_where_a_text_is_cut() -> None:
    longest = task_executor.ERROR_MESSAGE_CHARACTERS
    error = ValueError("x" * (longest - 10) + TOKEN)
    outcome = task_executor.run(Calling(raising(error)), {"id": 1}, settings=SETTINGS)
    assert outcome.error_message == "x" * (longest - 10) + "***"
    with captured():
        work = lambda _: print(TOKEN + "y" * (task_executor.LOG_TAIL_BYTES - 10)) or {}  # noqa: E731
        tail = task_executor.run(Calling(work), {"id": 1}, settings=SETTINGS).log_tail
    assert TOKEN[-9:] not in tail and tail.startswith("***y")


@pytest.mark.parametrize("settings", [None, {}, {"credentials": {}}, SETTINGS])
def test_a_credential_that_is_not_there_ends_the_task_with_a_sentence(settings: Any) -> None:
    work = lambda _: task_executor.current().credential("other")  # noqa: E731
    outcome = task_executor.run(Calling(work), {"id": 1}, settings=settings)
    assert (outcome.retry, outcome.error_type) == (False, "DoNotRetry")
    assert "no credential 'other'" in (outcome.error_message or "") and "config" in (outcome.error_message or "")


def test_artifacts_are_named_with_size_and_checksum_when_the_task_completes(tmp_path: Path) -> None:
    folder = tmp_path / "files"

    def work(task_data: dict[str, Any]) -> dict[str, Any]:
        context = task_executor.current()
        context.artifact("a.csv").write_bytes(b"1,2")
        context.artifact("b.gz").write_bytes(b"")
        context.artifact("never-written")
        assert context.artifact("a.csv") == folder / "a.csv"
        (folder / "by-the-way").write_text("not asked for")
        return {} if task_data["completes"] else None  # type: ignore[return-value]

    def run_it(completes: bool) -> Outcome:
        task = {"id": 1, "task_data": {"completes": completes}}
        return task_executor.run(Calling(work), task, artifact_folder=folder)

    outcome = run_it(True)
    assert outcome.artifacts == [
        {"name": "a.csv", "bytes": 3, "sha256": hashlib.sha256(b"1,2").hexdigest()},
        {"name": "b.gz", "bytes": 0, "sha256": hashlib.sha256().hexdigest()},
    ]
    assert outcome.as_report(5, "lease")["artifacts"] == outcome.artifacts
    assert run_it(False).artifacts == []
    assert run(lambda _: {}).artifacts == []


def test_an_artifact_that_was_asked_for_and_not_written_leaves_no_folder(tmp_path: Path) -> None:
    work = lambda _: {"path": str(task_executor.current().artifact("a.csv"))}  # noqa: E731
    outcome = task_executor.run(Calling(work), {"id": 1}, artifact_folder=tmp_path / "files")
    assert (outcome.outcome, outcome.artifacts) == ("completed", []) and not (tmp_path / "files").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "名", "x" * 101, "a\n"])
def test_an_artifact_cannot_be_named_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    work = lambda _: str(task_executor.current().artifact(name))  # noqa: E731
    outcome = task_executor.run(Calling(work), {"id": 1}, artifact_folder=tmp_path / "files")
    assert (outcome.retry, outcome.error_type) == (False, "DoNotRetry")
    assert "cannot be named" in (outcome.error_message or "") and not (tmp_path / "files").exists()


# --- what it prints and logs


def test_prints_and_logs_are_in_the_attempt_and_in_the_devices_log(caplog: pytest.LogCaptureFixture) -> None:
    def work(_: Any) -> dict[str, Any]:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        logging.getLogger("mine").warning("to the log")
        task_executor.current().log.info("to its own log")
        print("without an end", end="")
        return {}

    with captured():
        outcome = run(work)
    expected = "to stdout\nto stderr\nWARNING mine to the log\nINFO executors.calling to its own log\nwithout an end"
    assert outcome.log_tail == expected
    for text in ("to stdout", "to stderr", "to the log", "to its own log", "without an end"):
        assert sum(text in message for message in caplog.messages) == 1


def test_parallel_tasks_keep_their_prints_apart() -> None:
    barrier = threading.Barrier(8)

    def work(task_data: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(60)
        for i in range(200):
            print(task_data["name"], i)
            logging.getLogger("mine").info("%s logged %d", task_data["name"], i)
        return {}

    executor, outcomes = Calling(work), {}

    def one(name: str) -> None:
        outcomes[name] = task_executor.run(executor, {"id": 1, "task_data": {"name": name}})

    threads = [threading.Thread(target=one, args=(f"task-{n}-",)) for n in range(8)]
    with captured():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(outcomes) == 8
    for name, outcome in outcomes.items():
        lines = outcome.log_tail.splitlines()
        assert len(lines) == 400
        assert all(name in line for line in lines)


def test_the_log_tail_is_the_last_16_kib_even_of_one_endless_line() -> None:
    def work(_: Any) -> dict[str, Any]:
        for _i in range(20_000):
            print("汉字 ", end="")
        print("last")
        return {}

    with captured():
        tail = run(work).log_tail
    assert len(tail.encode("utf-8")) <= 16 * 1024
    assert len(tail.encode("utf-8")) > 16 * 1024 - 4
    assert tail.endswith("汉字 last\n")
    assert "\ufffd" not in tail


def test_what_others_print_goes_to_the_real_stream_and_removing_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = io.StringIO()
    monkeypatch.setattr(sys, "stdout", real)
    task_executor.install_capture()
    try:
        task_executor.install_capture()
        print("device")
        outcome = run(lambda _: print("task") or {})
    finally:
        task_executor.remove_capture()
    assert sys.stdout is real
    assert outcome.log_tail == "task\n"
    assert "device\n" in real.getvalue()
    assert real.getvalue().count("device") == 1
    assert not any(isinstance(handler, task_executor.TailHandler) for handler in logging.getLogger().handlers)


def test_a_device_without_console_takes_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    task_executor.install_capture()
    try:
        print("device")
        outcome = run(lambda _: print("task") or sys.stdout.close() or {})
    finally:
        task_executor.remove_capture()
    assert (outcome.outcome, outcome.log_tail) == ("completed", "task\n")


def test_a_console_log_on_the_captured_stream_does_not_run_in_circles() -> None:
    task_executor.install_capture()
    handler = logging.StreamHandler(sys.stderr)  # what a worker gets that configures its logging too late
    logger = logging.getLogger("executors.task_executor")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        outcome = run(lambda _: print("once") or {})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        task_executor.remove_capture()
    assert outcome.log_tail == "once\n"


# --- the registry


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_shipped_executors_are_found_and_one_that_fails_to_import_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = write(tmp_path, "broken.py", "import no_such_module_here\n")
    exiting = write(tmp_path, "exiting.py", "raise SystemExit(1)\n")
    good = write(tmp_path, "good.py", GUIDE)
    executors = task_executor.load_executors([broken, str(tmp_path / "missing.py"), exiting, good])
    assert set(executors) == {"custom_task", *task_executor.load_executors()} > {"crawl", "echo"}
    for name in ("broken.py", "missing.py", "exiting.py"):
        assert any(name in message for message in caplog.messages)


def test_an_executor_whose_modules_are_missing_or_whose_name_is_unfit_is_left_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = """
from executors.task_executor import TaskExecutor
class Base(TaskExecutor):
    pass
class NeedsModule(Base):
    required_modules = ("no_such_module_here",)
    def __init__(self): super().__init__("needs")
    def execute_task(self, task_data): return {}
class NeedsArgument(Base):
    def __init__(self, name): super().__init__(name)
    def execute_task(self, task_data): return {}
class Unnamed(Base):
    def __init__(self): pass
    def execute_task(self, task_data): return {}
class Spaced(Base):
    def __init__(self): super().__init__("my task")
    def execute_task(self, task_data): return {}
class BadTag(Base):
    tags = ("has space",)
    def __init__(self): super().__init__("bad_tag")
    def execute_task(self, task_data): return {}
class Elsewhere(Base):
    isolation = "cloud"
    def __init__(self): super().__init__("elsewhere")
    def execute_task(self, task_data): return {}
class Good(Base):
    tags = ("china", "fast")
    def __init__(self): super().__init__("good")
    def execute_task(self, task_data): return {}
"""
    executors = task_executor.load_executors([write(tmp_path, "mixed.py", text)])
    assert set(executors) == {"good", *task_executor.load_executors()}
    assert {"china", "fast"} <= set(task_executor.device_tags(executors))
    assert "pip install no_such_module_here" in caplog.text
    for name in ("NeedsArgument", "Unnamed", "Spaced", "BadTag", "Elsewhere"):
        assert f"left off {name}" in caplog.text


def test_an_extra_file_imports_the_files_beside_it_and_replaces_a_type_of_ours(tmp_path: Path) -> None:
    write(tmp_path, "beside_for_executor_test.py", "ANSWER = 42\n")
    text = """
from beside_for_executor_test import ANSWER
from executors.task_executor import TaskExecutor
class Mine(TaskExecutor):
    def __init__(self): super().__init__("echo")
    def execute_task(self, task_data): return {"answer": ANSWER}
"""
    executors = task_executor.load_executors([write(tmp_path, "mine.py", text)])
    assert task_executor.run(executors["echo"], {"id": 1}).result == {"answer": 42}


def test_two_extra_files_of_one_name_are_both_there(tmp_path: Path) -> None:
    files = []
    for kind in ("one", "two"):
        (tmp_path / kind).mkdir()
        files.append(write(tmp_path / kind, "mine.py", GUIDE.replace("custom_task", kind)))
    executors = task_executor.load_executors(files)
    assert {"one", "two"} <= set(executors)
    assert sys.modules[type(executors["one"]).__module__].__file__ == files[0]


def test_ours_keep_their_own_time_limits_and_a_users_executor_has_a_process_of_its_own(tmp_path: Path) -> None:
    executors = task_executor.load_executors([write(tmp_path, "mine.py", GUIDE)])
    assert executors["custom_task"].isolation == "process"
    assert executors["echo"].isolation == executors["crawl"].isolation == "thread"


# --- echo


def test_echo_gives_back_what_it_got_and_ends_as_it_is_told() -> None:
    def echo(task_data: dict[str, Any], **task: Any) -> Outcome:
        return task_executor.run(EchoExecutor(), {"id": 1, "task_data": task_data, **task})

    assert echo({"x": [1]}).result == {"echo": {"x": [1]}}
    assert echo({"fail": "again"}).retry is True
    assert echo({"fail_for_good": "never"}).retry is False
    assert echo({"snooze_seconds": 3}, attempt=1).snooze_seconds == 3
    assert echo({"snooze_seconds": 3}, attempt=2).outcome == "completed"
    wrong = echo({"sleep_seconds": "long"})
    assert (wrong.retry, "sleep_seconds" in (wrong.error_message or "")) == (False, True)
