"""Does a task in a process of its own take nothing else down, and is its end told as what it was?

The children are real processes; most tests give them tasks as a slot of the worker does, the rest go through a real
worker. What a task does stands in its test, as code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipapp
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_master import FakeMaster
from farm import ROOT, Program, Worker, environment, farm, wait_for

from executors import task_executor
from executors.device import child, process_tree
from executors.device.child import CANCELLED, Children
from executors.task_executor import Outcome

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process trees of other systems are untested")

TOKEN = "token-that-nobody-may-read-51cc"
EXECUTORS = '''
import ctypes, logging, multiprocessing, os, re, signal, subprocess, sys, threading, time
from pathlib import Path
from executors.task_executor import DoNotRetry, Result, Retry, Snooze, TaskExecutor


class CodeExecutor(TaskExecutor):
    """Does what its task says; `answer` is the result."""

    def __init__(self):
        super().__init__("code")

    def execute_task(self, task_data):
        names = {**globals(), "task_data": task_data, "context": self.context, "answer": {"pid": os.getpid()}}
        exec(task_data["code"], names)
        return names["answer"]


class OtherExecutor(CodeExecutor):
    def __init__(self):
        TaskExecutor.__init__(self, "other")


class FreeExecutor(CodeExecutor):
    memory_limit_mb = 0

    def __init__(self):
        TaskExecutor.__init__(self, "free")


class SmallExecutor(CodeExecutor):
    memory_limit_mb = 200

    def __init__(self):
        TaskExecutor.__init__(self, "small")
'''
# Three that a task may leave: in its group, in a session of its own, and one that has lost its parent besides.
THREE_DESCENDANTS = """
subprocess.Popen(["sleep", "301"])
subprocess.Popen(["sleep", "302"], start_new_session=True)
subprocess.run(["setsid", "sh", "-c", "sleep 303 & sleep 304 &"])
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> set[int]:
    """That process and those that carry its mark."""
    mark = psutil.Process(pid).environ()[process_tree.MARK_NAME]
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(process_tree.MARK_NAME) == mark:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def write_executors(folder: Path) -> str:
    path = folder / "code_executors.py"
    path.write_text(EXECUTORS)
    return str(path)


class Bench:
    """Children and the executors that they run."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.executors = task_executor.load_executors([write_executors(folder)])
        self.children = Children({"credentials": {"af": TOKEN}, "colour": "red", **settings}, folder)

    def run(self, code: str, kind: str = "code", ending: child.Ending = lambda: None, **more: Any) -> Outcome:
        task = {"id": 7, "task_type": kind, "batch": "b", "task_data": {"code": code}}
        return self.children.run(self.executors[kind], task, ending=ending, **more)

    def pid(self) -> int:
        """Of the child that does the next task."""
        outcome = self.run("")
        assert outcome.result is not None, outcome
        pid: int = outcome.result["pid"]
        return pid


def after(seconds: float, why: str = "timeout") -> child.Ending:
    end = time.monotonic() + seconds
    return lambda: (why, f"ran longer than {seconds:g} s") if time.monotonic() > end else None


def once_there(file: Path) -> child.Ending:
    """The time of a task is up as soon as it has made that file."""
    return lambda: ("timeout", "ran for too long") if file.exists() else None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.children.end_all()


# ---- how it may end ----


@pytest.mark.parametrize(
    ("code", "error_type", "message"),
    [
        ("os._exit(3)", "exited", "exit code 3"),
        ("os._exit(0)", "exited", "exit code 0"),
        ("sys.exit(3)", "exited", "exit code 3"),
        ("sys.exit('no more')", "exited", "exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "killed by signal 9 (SIGKILL)"),
        ("os.abort()", "killed", "killed by signal 6 (SIGABRT)"),
        ("ctypes.string_at(0)", "killed", "killed by signal 11 (SIGSEGV)"),
        ("1 / 0", "ZeroDivisionError", "division by zero"),
    ],
)
def test_an_end_is_told_as_what_it_was_and_the_next_task_runs(
    bench: Bench, code: str, error_type: str, message: str
) -> None:
    outcome = bench.run(f"print('on the way')\n{code}")
    assert (outcome.outcome, outcome.error_type, outcome.error_message) == ("failed", error_type, message)
    assert outcome.retry and "on the way\n" in outcome.log_tail
    assert bench.run("answer = {'fine': True}").result == {"fine": True}


def test_a_crash_shows_where_it_was(bench: Bench) -> None:
    outcome = bench.run("ctypes.string_at(0)")
    assert "Segmentation fault" in outcome.log_tail and "execute_task" in outcome.log_tail


def test_an_endless_recursion_ends_its_own_process_at_most(bench: Bench) -> None:
    endless = "sys.setrecursionlimit(10**8)\ndef again(x): return sorted([x], key=again)\nagain(1)"
    outcome = bench.run(endless)
    assert (outcome.outcome, outcome.error_type) in (("failed", "killed"), ("failed", "RecursionError"))
    assert bench.run("").outcome == "completed"


def test_what_an_executor_may_say_arrives_as_from_a_thread(bench: Bench, tmp_path: Path) -> None:
    retry = bench.run("raise Retry('busy', after=90)")
    assert (retry.retry, retry.retry_after_seconds, retry.error_type) == (True, 90.0, "Retry")
    never = bench.run("raise DoNotRetry('no such app')")
    assert (never.retry, never.error_message) == (False, "no such app")
    snooze = bench.run("raise Snooze(60, 'limit')")
    assert (snooze.outcome, snooze.snooze_seconds, snooze.error_message) == ("snoozed", 60.0, "limit")
    result = bench.run("answer = Result({'n': 1}, new_tasks=[{'task_type': 'echo'}])")
    assert (result.result, result.new_tasks) == ({"n": 1}, [{"task_type": "echo", "batch": "b", "parent_id": 7}])
    assert bench.run("answer = {'x': float('nan')}").error_type == "BadResult"
    code = "context.artifact('a.csv').write_text('1,2'); answer = {'colour': context.settings['colour']}"
    written = bench.run(code, artifact_folder=tmp_path / "files")
    assert written.result == {"colour": "red"} and (tmp_path / "files" / "a.csv").read_text() == "1,2"
    assert [(entry["name"], entry["bytes"]) for entry in written.artifacts] == [("a.csv", 3)]


# ---- time and cancellation ----


def test_a_busy_loop_is_ended_when_its_time_is_up_and_shows_where_it_was(bench: Bench, tmp_path: Path) -> None:
    pid, begun = bench.pid(), tmp_path / "begun"
    code = f"print('round and round')\nPath({str(begun)!r}).touch()\nwhile True: pass"
    outcome = bench.run(code, ending=once_there(begun))
    assert (outcome.outcome, outcome.error_type, outcome.retry) == ("failed", "timeout", True)
    assert outcome.error_message == "ran for too long" and 0 < outcome.duration_seconds < 60
    assert outcome.log_tail.startswith("round and round\n") and "TaskStopped" in outcome.log_tail
    assert not is_running(pid) and bench.pid() != pid


def test_a_task_can_clean_up_when_it_is_ended(bench: Bench, tmp_path: Path) -> None:
    kept, begun = tmp_path / "kept", tmp_path / "begun"
    code = f"try:\n    Path({str(begun)!r}).touch()\n    while True: time.sleep(0.01)\n"
    code += f"finally:\n    Path({str(kept)!r}).write_text('closed')"
    assert bench.run(code, ending=once_there(begun)).error_type == "timeout"
    assert kept.read_text() == "closed"


@pytest.mark.parametrize(
    "stubborn",
    [
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n    try: time.sleep(10)\n    except BaseException: pass",
        "re.match('(a+)+$', 'a' * 60 + 'b')",  # C code that lets no other thread run
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\nwhile True: pass",
    ],
    ids=["ignores SIGTERM", "swallows everything", "holds the interpreter", "blocks signals"],
)
def test_a_task_that_does_not_listen_is_killed_after_the_grace(
    bench: Bench, stubborn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "CANCEL_GRACE_SECONDS", 0.3)
    pid = bench.pid()
    outcome = bench.run(stubborn, ending=after(0.2))
    assert outcome.error_type == "timeout" and outcome.duration_seconds < 60
    assert not is_running(pid)
    assert bench.run("").outcome == "completed"


@pytest.mark.parametrize("last", ["while True: pass", "os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_that_a_task_started_outlives_its_end(bench: Bench, last: str, tmp_path: Path) -> None:
    pid, ready = bench.pid(), tmp_path / "ready"
    seen: set[int] = set()

    def look() -> Any:
        if ready.exists() and not seen and len(found := descendants(pid)) >= 6:  # itself, its guard and four sleeps
            seen.update(found)
            (tmp_path / "seen").touch()
        return ("timeout", "late") if seen and "while" in last else None

    code = f"{THREE_DESCENDANTS}\nPath({str(ready)!r}).touch()\n"
    code += f"while not Path({str(tmp_path / 'seen')!r}).exists(): time.sleep(0.01)\n{last}"
    assert bench.run(code, ending=look).outcome == "failed"
    assert not [pid for pid in seen if is_running(pid)]


def test_a_cancelled_task_sees_it_before_it_would_be_ended_and_keeps_its_process(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "NOTICE_SECONDS", 30.0)
    pid, begun = bench.pid(), tmp_path / "begun"
    code = f"Path({str(begun)!r}).touch()\nwhile not context.cancelled: time.sleep(0.01)"
    outcome = bench.run(code, ending=lambda: (CANCELLED, "") if begun.exists() else None)
    assert outcome.error_type == CANCELLED and outcome.duration_seconds < 30
    assert bench.pid() == pid
    assert bench.run("answer = {'cancelled': context.cancelled}").result == {"cancelled": False}


def test_a_cancelled_task_that_does_not_ask_is_ended(bench: Bench) -> None:
    pid = bench.pid()
    outcome = bench.run("time.sleep(300)", ending=lambda: (CANCELLED, ""))
    assert outcome.error_type == CANCELLED and outcome.duration_seconds < 60
    assert not is_running(pid)


def test_a_signal_to_everybody_does_not_end_a_task(bench: Bench) -> None:
    """A service manager sends SIGTERM to all processes of the unit; the worker then lets its tasks finish."""
    code = "os.killpg(0, signal.SIGTERM); time.sleep(0.1); answer = {'finished': True}"
    assert bench.run(code).result == {"finished": True}


# ---- memory ----


def test_a_memory_bomb_meets_its_limit_and_the_next_task_is_free_of_it(bench: Bench) -> None:
    bomb = "hoard = [bytearray(10**7) for _ in range(1000)]"
    outcome = bench.run(bomb, kind="small")
    assert (outcome.error_type, outcome.error_message) == ("out_of_memory", "over its memory limit of 200 MB")
    assert outcome.retry and "MemoryError" in outcome.log_tail
    large = "hoard = bytearray(300 * 1024 * 1024); answer = {'fine': True}"
    assert bench.run(large).result == {"fine": True}
    assert bench.run(large, kind="small").error_type == "out_of_memory"
    assert bench.run("", kind="small").outcome == "completed"
    assert bench.run(large).result == {"fine": True}, "a warm child keeps no limit of an earlier task"


def test_the_device_sets_the_limit_of_executors_that_set_none(tmp_path: Path) -> None:
    bench = Bench(tmp_path, task_memory_mb=150)
    try:
        large = "hoard = bytearray(160 * 1024 * 1024)"
        assert bench.run(large).error_message == "over its memory limit of 150 MB"
        assert bench.run(large, kind="small").outcome == "completed"
        assert bench.run("hoard = bytearray(300 * 1024 * 1024)", kind="free").outcome == "completed"
    finally:
        bench.children.end_all()


def test_a_library_that_dies_for_want_of_memory_is_told_apart_from_a_crash(bench: Bench) -> None:
    died = "os.write(2, b\"terminate called after throwing an instance of 'std::bad_alloc'\\n\"); os.abort()"
    outcome = bench.run(died, kind="small")
    assert outcome.error_type == "out_of_memory" and "SIGABRT" in (outcome.error_message or "")
    assert bench.run(died).error_type == "killed", "without a limit nobody knows"


# ---- what it says ----


def test_everything_it_prints_is_kept_whoever_prints_it(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    code = """
print("one", "word")
logging.getLogger("mine").warning("two")
context.log.info("three")
os.write(1, "四\\n".encode())
subprocess.run("echo five; echo six >&2", shell=True)
threading.Thread(target=print, args=["seven"]).start()
os.system("echo eight")
if os.fork() == 0:
    print("nine")
    os._exit(0)
os.wait()
print("ten", end="")
"""
    outcome = bench.run(code)
    assert outcome.outcome == "completed"
    lines = outcome.log_tail.splitlines()
    for said in ("one word", "WARNING mine two", "INFO executors.code three", "四", "five", "six", "seven", "eight",
                 "nine"):  # fmt: skip
        assert lines.count(said) == 1, (said, lines)
    assert "ten" in outcome.log_tail
    logged = "\n".join(caplog.messages)
    for word in ("one word", "two", "three", "四", "five", "six", "seven", "eight", "nine", "ten"):
        assert logged.count(word) == 1, (word, logged)


@pytest.mark.parametrize("flood", ["print('x' * 99)", "os.write(1, b'y' * 65536)", "context.progress(0.5, 'z' * 99)"])
def test_a_task_that_never_stops_talking_is_ended_in_time(bench: Bench, flood: str) -> None:
    outcome = bench.run(f"while True: {flood}", ending=after(0.5))
    assert outcome.error_type == "timeout" and outcome.duration_seconds < 60
    assert len(outcome.log_tail.encode()) <= task_executor.LOG_TAIL_BYTES
    wait_for("the end of its listeners", lambda: "child" not in [thread.name for thread in threading.enumerate()])


def test_noise_on_the_protocols_old_numbers_breaks_nothing(bench: Bench) -> None:
    code = "os.write(1, b'\\0\\0\\0\\7{\"end\"'); os.close(0); os.closerange(0, 3); answer = {'fine': True}"
    assert bench.run(code).result == {"fine": True}
    assert bench.run("answer = {'again': True}").result == {"again": True}


def test_progress_is_told_at_once(bench: Bench) -> None:
    said: list[tuple[float, str]] = []
    code = f"context.progress(0.1); context.progress(0.5, 'half, {TOKEN}')"
    bench.run(code, report_progress=lambda *progress: said.append(progress))
    assert said == [(0.1, ""), (0.5, "half, ***")]


def test_a_credential_is_in_nothing_that_leaves_the_task(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AF_API_KEY", "the-key-of-the-device")
    code = """
token = context.credential("af")
print("my token is", token)
os.write(1, ("raw " + token + "\\n").encode())
subprocess.run(["echo", token])
answer = {"text": "a" + token, token: [token]}
"""
    outcome = bench.run(code)
    assert TOKEN not in json.dumps(vars(outcome)) and outcome.log_tail.count("***") == 3
    assert outcome.result == {"text": "a***", "***": ["***"]}
    failed = bench.run("raise ValueError('https://api/?t=' + context.credential('af'))")
    assert TOKEN not in json.dumps(vars(failed)) and failed.error_message == "https://api/?t=***"
    assert bench.run("context.credential('other')").error_type == "DoNotRetry"
    assert "AF_API_KEY" not in json.dumps(bench.run("answer = dict(os.environ)").result)


# ---- one child for many tasks ----


def test_a_child_is_started_at_first_need_and_does_many_tasks_of_all_kinds(bench: Bench, tmp_path: Path) -> None:
    records = tmp_path / "children"
    assert not records.exists()
    pids = {bench.run("", kind=kind).result["pid"] for kind in ("code", "other", "code", "small")}  # type: ignore[index]
    assert len(pids) == 1
    assert len(list(records.iterdir())) == 1
    bench.children.end_idle(time.monotonic() + child.IDLE_SECONDS / 2)
    assert all(is_running(pid) for pid in pids)
    bench.children.end_idle(time.monotonic() + child.IDLE_SECONDS + 1)
    assert not any(is_running(pid) for pid in pids) and not list(records.iterdir())


def test_parallel_tasks_have_a_child_each(bench: Bench, tmp_path: Path) -> None:
    pids: list[int] = []

    def one(n: int) -> None:
        code = f"folder = Path({str(tmp_path)!r})\n(folder / 'here-{n}').touch()\n"
        code += "while len(list(folder.glob('here-*'))) < 3: time.sleep(0.01)"
        pids.append(bench.run(code).result["pid"])  # type: ignore[index]

    threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(pids)) == 3


def test_a_child_that_died_between_two_tasks_is_not_the_second_ones_fault(bench: Bench) -> None:
    pid = bench.pid()
    os.kill(pid, signal.SIGKILL)
    assert bench.run("").outcome == "completed"


def test_a_child_that_an_earlier_task_still_holds_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "BEGIN_SECONDS", 0.5)
    pid = bench.pid()
    os.kill(pid, signal.SIGSTOP)
    assert bench.pid() != pid
    assert not is_running(pid)


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["runs", "is cancelled"])
def test_what_an_earlier_task_left_writing_holds_up_no_later_one(bench: Bench, is_cancelled: bool) -> None:
    left = "subprocess.Popen(['sh', '-c', 'sleep 0.1; exec yes ' + 'y' * 100])\nanswer = {'pid': os.getpid()}"
    pid = bench.run(left).result["pid"]  # type: ignore[index]
    (idle,) = bench.children._idle
    wait_for("more than is listened to", idle._events.full)
    outcomes: list[Outcome] = []
    ending: child.Ending = (lambda: (CANCELLED, "")) if is_cancelled else lambda: None
    thread = threading.Thread(target=lambda: outcomes.append(bench.run("", ending=ending)), daemon=True)
    thread.start()
    thread.join(60)
    assert outcomes, "it still listens to the earlier task"
    assert is_cancelled or outcomes[0].result != {"pid": pid}
    wait_for("the end of the first child", lambda: not is_running(pid))


def test_a_log_slower_than_the_task_delays_neither_its_cancellation_nor_its_end(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "CANCEL_GRACE_SECONDS", 1.0)
    slow = logging.Handler()
    slow.emit = lambda record: time.sleep(0.001)  # type: ignore[method-assign]
    printed = logging.getLogger("executors.task_executor")
    monkeypatch.setattr(printed, "handlers", [slow])
    monkeypatch.setattr(printed, "propagate", False)
    monkeypatch.setattr(printed, "level", logging.INFO)
    printed.manager._clear_cache()  # type: ignore[attr-defined]
    begun, saw = tmp_path / "begun", tmp_path / "saw"
    code = f"""
def look():
    while not context.cancelled: time.sleep(0.01)
    Path({str(saw)!r}).touch()
threading.Thread(target=look).start()
Path({str(begun)!r}).touch()
while True:
    try: os.write(1, b"y\\n" * 30000)
    except BaseException: pass
"""
    clicked: list[float] = []

    def click() -> None:
        wait_for("its begin", begun.exists)
        clicked.append(time.monotonic())
        wait_for("the task to see it", saw.exists)
        clicked.append(time.monotonic())

    watcher = threading.Thread(target=click)
    watcher.start()
    outcome = bench.run(code, ending=lambda: (CANCELLED, "") if clicked else None)
    ended = time.monotonic()
    watcher.join(60)
    assert outcome.error_type == CANCELLED and outcome.log_tail.endswith("y\n")
    assert clicked[1] - clicked[0] < 15 and ended - clicked[0] < 15, "0.1 s and 1.5 s, on a machine that is not busy"


# ---- what a task leaves behind ----


@pytest.mark.parametrize(
    ("poison", "look"),
    [
        ("os.environ['HTTP_PROXY'] = 'x'; del os.environ['PATH']", "dict(os.environ)"),
        ("os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()", "time.timezone"),
        ("import tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)", "os.getcwd()"),
        ("os.umask(0o777)", "os.umask(0o022)"),
        ("import socket; socket.setdefaulttimeout(0.001)", "__import__('socket').getdefaulttimeout()"),
        ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1))",
         "__import__('resource').getrlimit(__import__('resource').RLIMIT_FSIZE)"),
        ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "str(signal.getsignal(signal.SIGCHLD))"),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})", "len(signal.pthread_sigmask(0, ()))"),
        ("signal.setitimer(signal.ITIMER_REAL, 60)", "signal.getitimer(signal.ITIMER_REAL)"),
        ("os.dup2(os.open('/dev/null', 1), 1)", "os.stat(1).st_ino == os.stat(2).st_ino"),
        ("sys.stdout = None", "sys.stdout is None"),
    ],
)  # fmt: skip
def test_what_a_task_changes_in_its_process_is_put_back_for_the_next(bench: Bench, poison: str, look: str) -> None:
    looks = f"answer = {{'pid': os.getpid(), 'seen': {look}}}"
    before = bench.run(looks)
    assert before.outcome == "completed", before
    assert bench.run(poison).outcome == "completed"
    assert bench.run(looks).result == before.result, "the same process, too"


@pytest.mark.parametrize(
    ("poison", "after_it"),
    [
        ("try:\n    while True: os.open('/dev/null', 0)\nexcept OSError: pass", "open('/dev/null').close()"),
        ("threading.Timer(60, os._exit, [9]).start()", ""),
        ("for _ in range(40): os.waitid(os.P_PID, os.posix_spawnp('true', ['true'], {}), os.WEXITED | os.WNOWAIT)", ""),
    ],
    ids=["descriptors", "a thread", "zombies"],
)
def test_a_child_in_which_something_is_left_for_good_is_replaced(bench: Bench, poison: str, after_it: str) -> None:
    pid = bench.pid()
    poisoned = bench.run(f"{poison}\nanswer = {{'pid': os.getpid()}}")
    assert poisoned.result == {"pid": pid}, poisoned
    outcome = bench.run(f"{after_it}\nanswer = {{'pid': os.getpid()}}")
    assert outcome.result is not None and outcome.result["pid"] != pid, outcome
    wait_for("the end of the worn one", lambda: not is_running(pid))


def test_a_child_is_kept_after_ordinary_ends(bench: Bench) -> None:
    pid = bench.pid()
    for code in ("1 / 0", "raise Snooze(5)", "sys.exit(3)", "answer = None", "task_data['kept'] = open('/dev/null')"):
        bench.run(code)
    assert bench.pid() == pid


def test_what_an_executor_opens_when_it_is_made_is_no_leftover(tmp_path: Path) -> None:
    made = """
class PoolExecutor(CodeExecutor):
    def __init__(self):
        TaskExecutor.__init__(self, "pool")
        self.files = [open("/dev/null") for _ in range(100)]
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()
        os.environ["MADE"] = "yes"
"""
    bench = Bench(tmp_path)
    path = tmp_path / "pool_executors.py"
    path.write_text(EXECUTORS + made)
    bench.executors = task_executor.load_executors([str(path)])
    try:
        code = "answer = {'pid': os.getpid(), 'made': os.environ['MADE']}"
        first = bench.run(code, kind="pool").result
        assert first is not None and bench.run(code, kind="pool").result == first
    finally:
        bench.children.end_all()
        os.environ.pop("MADE", None)


def test_an_exit_code_is_left_for_the_task_that_asks_for_it(bench: Bench) -> None:
    bench.run("sys.kept = subprocess.Popen(['sh', '-c', 'exit 3'])")
    assert bench.run("answer = {'code': sys.kept.wait()}").result == {"code": 3}


@pytest.mark.parametrize("end", ["time is up", "the worker stops"])
def test_a_daemon_without_session_parent_and_environment_ends_too(bench: Bench, tmp_path: Path, end: str) -> None:
    file = tmp_path / "pid"
    daemon = f"env -i setsid sh -c 'echo $$ > {file}.new; mv {file}.new {file}; exec sleep 306' &"
    code = f'subprocess.run(["sh", "-c", {daemon!r}])\nwhile not Path({str(file)!r}).exists(): time.sleep(0.01)'
    if end == "time is up":
        outcome = bench.run(f"{code}\ntime.sleep(60)", ending=lambda: ("timeout", "") if file.exists() else None)
        assert outcome.error_type == "timeout"
    else:
        assert bench.run(code).outcome == "completed"
        assert is_running(int(file.read_text()))
        bench.children.end_all()
    assert not is_running(int(file.read_text()))


def test_a_copy_of_the_process_that_a_task_forks_answers_nothing(bench: Bench) -> None:
    forks = "pid = os.fork()\nif pid: os.waitpid(pid, 0)\nanswer = {'forked': bool(pid)}"
    assert bench.run(forks).result == {"forked": True}
    assert bench.run("answer = {'next': True}").result == {"next": True}
    leaves = "pid = os.fork()\nif not pid: sys.exit(5)\nanswer = {'code': os.waitpid(pid, 0)[1] >> 8}"
    assert bench.run(leaves).result == {"code": 5}


def test_a_task_may_use_processes_of_its_own(bench: Bench) -> None:
    code = "with multiprocessing.get_context('fork').Pool(2) as pool: answer = {'sum': sum(pool.map(abs, [-1, -2]))}"
    assert bench.run(code, ending=after(20)).result == {"sum": 3}
    ends = "p = multiprocessing.get_context('fork').Process(target=time.sleep, args=[60]); p.start(); p.terminate()"
    assert bench.run(f"{ends}; p.join(); answer = {{'code': p.exitcode}}", ending=after(20)).result == {"code": -15}
    waits = "subprocess.Popen(['true'])\ntry:\n    while True: os.wait()\nexcept ChildProcessError: pass"
    assert bench.run(waits, ending=after(20)).outcome == "completed"


# ---- after the end of the worker ----


def leave_record(folder: Path, pid: int, started: str, mark: str = "no-such-mark") -> None:
    (folder / "children").mkdir(parents=True, exist_ok=True)
    record = {"pid": pid, "started": started, "mark": mark}
    (folder / "children" / f"{mark}.json").write_text(json.dumps(record))


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, with one below it."""
    process = subprocess.Popen(["sh", "-c", "sleep 305 & wait"], start_new_session=True)
    wait_for("its child", lambda: psutil.Process(process.pid).children())
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def test_what_an_earlier_process_left_is_killed_with_its_tree(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    below = psutil.Process(stranger.pid).children()[0]
    leave_record(tmp_path, stranger.pid, process_tree.start_time(stranger.pid))
    Children({}, tmp_path).kill_leftovers()
    assert not is_running(below.pid) and not is_running(stranger.pid)
    assert not list((tmp_path / "children").iterdir())


def test_a_process_that_only_has_the_pid_of_a_leftover_is_left_alone(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    leave_record(tmp_path, stranger.pid, process_tree.start_time(os.getpid()))
    (tmp_path / "children" / "torn.json").write_text('{"pid": 1')
    Children({}, tmp_path).kill_leftovers()
    assert stranger.poll() is None
    assert not list((tmp_path / "children").iterdir())


# ---- through a real worker ----


@pytest.fixture
def master() -> Iterator[FakeMaster]:
    with FakeMaster() as fake:
        fake.next_seconds = 0.1
        fake.settings["next_seconds"] = 0.1
        yield fake


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    with farm() as programs:
        yield programs


@pytest.fixture
def start(master: FakeMaster, programs: list[Program], tmp_path: Path) -> Callable[..., Worker]:
    def start_worker(**settings: Any) -> Worker:
        settings = {"executors": [write_executors(tmp_path)], "concurrent_tasks": 1, **settings}
        worker = Worker(master.url, tmp_path, "shop-7", **settings)
        programs.append(worker)
        return worker

    return start_worker


def give(master: FakeMaster, code: str, **more: Any) -> dict[str, Any]:
    return master.give("code", {"code": code}, **more)


def pid_of_next(master: FakeMaster) -> int:
    pid: int = master.wait_for_report(give(master, ""))["result"]["pid"]
    return pid


def test_a_timeout_is_reported_and_frees_the_only_slot(master: FakeMaster, start: Callable[..., Worker]) -> None:
    start()
    pid_of_next(master)  # so that its process is there
    endless = give(master, "print('here')\nwhile True: pass", execution_timeout_seconds=1)
    crashed, fine = give(master, "os._exit(3)"), give(master, "answer = {'fine': True}")
    report = master.wait_for_report(endless)
    assert (report["outcome"], report["error_type"]) == ("failed", "timeout")
    assert report["error_message"] == "ran longer than 1 s" and report["log_tail"].startswith("here\n")
    report = master.wait_for_report(crashed)
    assert (report["error_type"], report["error_message"]) == ("exited", "exit code 3")
    assert master.wait_for_report(fine)["result"] == {"fine": True}
    assert len(master.reports_of(endless)) == 1


def test_progress_is_shown_by_a_beat_while_the_task_runs(master: FakeMaster, start: Callable[..., Worker]) -> None:
    """Within seconds, not with the next beat of every 30 s."""
    start(heartbeat_interval=30)
    task = give(master, "context.progress(0.5, 'half'); time.sleep(60)")

    def shown() -> Any:
        holding = master.beats[-1]["holding"] or [] if master.beats else []
        return [h for h in holding if h["assignment_id"] == task["assignment_id"] and h.get("progress")]

    (held,) = master.wait_for(shown, "its progress in a beat")
    assert (held["phase"], held["progress"], held["message"]) == ("running", 0.5, "half")


@pytest.mark.parametrize(
    "code",
    [
        "os.closerange(3, 64)",
        "for n in range(3, 64):\n    try: os.write(n, b'\\0\\0\\0\\3{1}')\n    except OSError: pass",
        "for n in range(3, 64):\n    try: os.write(n, b'\\0\\0\\0\\2{}')\n    except OSError: pass",
        "for n in range(3, 64):\n    try: os.write(n, b'\\xff' * 9)\n    except OSError: pass",
    ],
    ids=["closes it", "no JSON", "an empty frame", "a huge frame"],
)
def test_a_task_that_tampers_with_the_connection_harms_itself_only(bench: Bench, code: str) -> None:
    outcome = bench.run(f"{code}\ntime.sleep(300)", ending=after(60))
    assert (outcome.outcome, outcome.error_type) == ("failed", "killed")
    assert bench.run("answer = {'fine': True}").result == {"fine": True}


@pytest.mark.parametrize("code", ["while not context.cancelled: time.sleep(0.01)", "time.sleep(300)"])
def test_a_cancelled_task_reports_nothing_and_its_slot_is_free(
    master: FakeMaster, start: Callable[..., Worker], tmp_path: Path, code: str
) -> None:
    start()
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    task = give(
        master, f"try:\n    Path({str(begun)!r}).touch()\n    {code}\nfinally:\n    Path({str(ended)!r}).touch()"
    )
    wait_for("its start", begun.exists)
    master.cancel = [task["assignment_id"]]
    wait_for("the task to end", ended.exists)
    fine = give(master, "")
    assert master.wait_for_report(fine)["outcome"] == "completed"
    assert not master.reports_of(task)


def test_a_stop_ends_what_is_not_done_in_time_before_it_is_handed_back(
    master: FakeMaster, start: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = start(drain_seconds=0.3)
    pid = pid_of_next(master)
    task = give(master, f"{THREE_DESCENDANTS}\nPath({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(60)")
    wait_for("its start", (tmp_path / "ready").exists)
    family = wait_for("its family", lambda: len(found := descendants(pid)) >= 6 and found)
    assert worker.stop() == 0
    assert master.wait_for_report(task)["outcome"] == "released"
    wait_for("their end", lambda: not any(is_running(member) for member in family))


@pytest.mark.parametrize("code", ["time.sleep(60)", "re.match('(a+)+$', 'a' * 60 + 'b')"], ids=["sleeps", "holds"])
def test_nothing_outlives_a_killed_worker(
    master: FakeMaster, start: Callable[..., Worker], tmp_path: Path, code: str
) -> None:
    worker = start()
    pid = pid_of_next(master)
    give(master, f"{THREE_DESCENDANTS}\nPath({str(tmp_path / 'ready')!r}).touch()\n{code}")
    wait_for("its start", (tmp_path / "ready").exists)
    family = wait_for("its family", lambda: len(found := descendants(pid)) >= 6 and found)
    for member in family:  # as a service manager does, first
        if "task_process" in " ".join(psutil.Process(member).cmdline()):
            os.kill(member, signal.SIGTERM)
    worker.kill()
    wait_for("their end", lambda: not any(is_running(member) for member in family))


def test_leftovers_are_killed_before_the_first_pull(
    master: FakeMaster, start: Callable[..., Worker], tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    leave_record(tmp_path / "state" / "shop-7", stranger.pid, process_tree.start_time(stranger.pid))
    alive_at_register: list[bool] = []
    register = master._register

    def look(sent: dict[str, Any]) -> Any:
        alive_at_register.append(is_running(stranger.pid))
        return register(sent)

    master.script["register"].append(look)
    worker = start()
    master.wait_for(lambda: master.pulls, "the first pull")
    assert alive_at_register == [False]
    wait_for("the line about it", lambda: "earlier process" in worker.output)


def test_an_idle_device_has_no_child(master: FakeMaster, start: Callable[..., Worker], tmp_path: Path) -> None:
    worker = start()
    master.wait_for_report(master.give("echo", {"x": 1}))
    assert not (tmp_path / "state" / "shop-7" / "children").exists()
    below = [" ".join(process.cmdline()) for process in psutil.Process(worker.process.pid).children(recursive=True)]
    assert not [line for line in below if "task_process" in line]


def test_a_worker_in_one_file_starts_children_out_of_it(master: FakeMaster, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(ROOT / "executors", packed / "executors", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("worker.py", "settings.py"):
        shutil.copy(ROOT / name, packed)
    zipapp.create_archive(packed, tmp_path / "worker.pyz", main="worker:main")
    command = [sys.executable, "worker.pyz", "--device-id", "shop-8", "--master-url", master.url]
    command += ["--executors", write_executors(tmp_path), "--state-folder", str(tmp_path / "state")]
    process = subprocess.Popen(
        [*command, "--log-file", str(tmp_path / "log")], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        where = "import executors; answer = {'from': executors.__file__, 'pid': os.getpid()}"
        result = master.wait_for_report(give(master, where))["result"]
        assert str(tmp_path / "worker.pyz") in result["from"] and result["pid"] != process.pid
    finally:
        process.kill()
        process.wait(60)
