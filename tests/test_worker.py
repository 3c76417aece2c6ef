"""Does a device keep its contract? A real worker process against a master that plays a script."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest
import requests
from fake_master import Answer, Dripping, FakeMaster, captive_portal, problem
from farm import reserved_port

import worker
from executors.device import holding, link, machine, pace, pulls, reports
from executors.device.spool import Spool
from settings import ExitCode, Settings

ROOT = Path(__file__).resolve().parent.parent
KEY = "key-that-nobody-may-read-in-a-log-7f3a"
EXECUTORS = '''
import time
from pathlib import Path
from executors.task_executor import TaskExecutor


class CountingExecutor(TaskExecutor):
    """Adds a line to a file for each run."""

    isolation = "thread"

    def __init__(self):
        super().__init__("counting")

    def execute_task(self, task_data):
        with open(task_data["file"], "a") as file:
            file.write("ran\\n")
        return {"status": "success"}


class BlockedExecutor(TaskExecutor):
    """Goes on until the file is there, whatever it is told; then says whether it had been cancelled."""

    isolation = "thread"

    def __init__(self):
        super().__init__("blocked")

    def execute_task(self, task_data):
        print("now it blocks")
        while not Path(task_data["until"]).exists():
            time.sleep(0.01)
        Path(task_data["until"] + ".cancelled").write_text(str(self.context.cancelled))
        return {"status": "success"}


class ObedientExecutor(TaskExecutor):
    """Runs until it is cancelled."""

    isolation = "thread"

    def __init__(self):
        super().__init__("obedient")

    def execute_task(self, task_data):
        while not self.context.cancelled:
            time.sleep(0.01)
        Path(task_data["file"]).write_text("saw it")
        return {"status": "success"}


class LargeExecutor(TaskExecutor):
    isolation = "thread"

    def __init__(self):
        super().__init__("large")

    def execute_task(self, task_data):
        return {"text": "x" * task_data["size"]}


class BadExecutor(TaskExecutor):
    isolation = "thread"

    def __init__(self):
        super().__init__("bad")

    def execute_task(self, task_data):
        print("about to raise")
        raise RuntimeError("the page has no table")
'''


class Device:
    """A worker process, its files in one folder; started again, it goes on from the same files."""

    def __init__(self, folder: Path, master_url: str) -> None:
        self.folder, self.master_url = folder, master_url
        self.process: Optional[subprocess.Popen[bytes]] = None
        (folder / "my_executors.py").write_text(EXECUTORS)

    def start(self, *flags: str, patch: str = "", stdin: Any = subprocess.DEVNULL, key: str = KEY) -> Device:
        """`patch` is Python run inside the process before main: shorter waits, for instance."""
        state, log = self.folder / "state", self.folder / "device.log"
        flags = ("--device-id", "shop-7", "--master-url", self.master_url, "--state-folder", str(state), *flags)
        flags = ("--log-file", str(log), "--executors", str(self.folder / "my_executors.py"), *flags)
        run = f"import os, worker\n{patch}\nos._exit(worker.main())"
        command = [sys.executable, "-c", run] if patch else [sys.executable, str(ROOT / "worker.py")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        # requests would send this one's password in place of our key, if it were let.
        (self.folder / "netrc").write_text("machine 127.0.0.1 login ann password wrong")
        environment.update(AF_API_KEY=key, PYTHONPATH=str(ROOT), NETRC=str(self.folder / "netrc"))
        with open(self.folder / "stderr", "ab") as stderr:
            self.process = subprocess.Popen(
                [*command, *flags], stdin=stdin, stdout=stderr, stderr=stderr, env=environment, cwd=self.folder
            )
        return self

    def wait(self, seconds: float = 60.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait(60)

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    def spooled(self) -> list[Any]:
        """What the spool would replay, read without changing it."""
        records = [
            (path, offset, kind, payload)
            for path in sorted((self.folder / "state/shop-7/spool").glob("*.spool"))
            for offset, kind, payload in Spool.records(path.read_bytes())
        ]
        done = {tuple(place) for _, _, kind, payload in records if kind == b"A" for place in json.loads(payload)}
        return [json.loads(p) for path, at, kind, p in records if kind == b"R" and (int(path.stem), at) not in done]


@pytest.fixture
def master() -> Iterator[FakeMaster]:
    with FakeMaster() as fake:
        fake.next_seconds = 0.1
        yield fake


@pytest.fixture
def device(tmp_path: Path, master: FakeMaster) -> Iterator[Device]:
    found = Device(tmp_path, master.url)
    yield found
    found.kill()


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s in vain for: {what}"
        time.sleep(0.01)


# ---- tasks and reports ----


def test_a_task_runs_and_its_result_arrives_with_its_lease(master: FakeMaster, device: Device) -> None:
    task = master.give("echo", {"word": "你好"}, username="ann", app_id="com.shop", start_date="2026-01-01")
    device.start("--log-level", "DEBUG")
    report = master.wait_for_report(task)
    assert report["lease_id"] == task["lease_id"] and report["outcome"] == "completed"
    assert report["result"]["echo"] == {
        "word": "你好", "username": "ann", "app_id": "com.shop", "start_date": "2026-01-01",
    }  # fmt: skip
    assert report["duration_seconds"] >= 0
    register = master.registers[0]
    assert register["device_id"] == "shop-7" and register["protocol"] == 1 and register["holding"] == []
    assert {"echo", "crawl", "counting"} <= set(register["task_types"]) and register["max_concurrent_tasks"] == 3
    assert master.authorizations == {f"Bearer {KEY}"}
    assert KEY not in device.said + (device.folder / "device.log").read_text()


def test_an_error_arrives_with_its_type_and_what_the_task_printed(master: FakeMaster, device: Device) -> None:
    task = master.give("bad")
    device.start()
    report = master.wait_for_report(task)
    assert (report["outcome"], report["error_type"]) == ("failed", "RuntimeError")
    assert "the page has no table" in report["error_message"] and report.get("retry", True)
    assert "about to raise" in report["log_tail"]
    eventually(lambda: "about to raise" in device.said, "the print in the device's log")


def test_a_task_without_an_executor_is_failed_and_not_lost(master: FakeMaster, device: Device) -> None:
    task = master.give("unheard_of")
    device.start()
    assert master.wait_for_report(task)["error_type"] == "no_executor"


def test_a_long_task_reports_its_start_and_a_fast_one_only_its_end(master: FakeMaster, device: Device) -> None:
    fast, slow = master.give("echo"), master.give("blocked", {"until": str(device.folder / "go")})
    device.start(patch="worker.START_REPORT_SECONDS = 1.0")  # on a busy machine, a fast one may need the usual 0.2 s
    master.wait_for(lambda: master.reports_of(slow, starts=True), "the start")
    (device.folder / "go").touch()
    master.wait_for_report(slow)
    assert [entry["outcome"] for entry in master.reports_of(slow, starts=True)] == ["running", "completed"]
    assert [entry["outcome"] for entry in master.reports_of(fast, starts=True)] == ["completed"]


def test_many_tasks_are_each_reported_once_in_batches_of_at_most_500(master: FakeMaster, device: Device) -> None:
    tasks = [master.give("echo", {"n": n}) for n in range(1200)]
    master.script["report"].extend([problem(503, "busy")] * 8)
    device.start("--concurrent-tasks", "100")
    master.wait_for(lambda: len(master.ends) >= 1200, "1200 reports")
    device.signal(signal.SIGTERM)
    assert device.wait() == ExitCode.OK
    assert sorted(entry["assignment_id"] for entry in master.ends) == [task["assignment_id"] for task in tasks]
    assert max(master.report_sizes) == reports.REPORTS_PER_REQUEST == 500


def test_an_assignment_that_is_delivered_again_is_not_run_again(master: FakeMaster, device: Device) -> None:
    counted = str(device.folder / "runs")
    task = master.give("counting", {"file": counted})
    for _ in range(3):
        master.script["pull"].append({"tasks": [task], "cancel": [], "drain": False, "next_seconds": 0})
    device.start("--concurrent-tasks", "1")
    after = master.give("echo")
    master.wait_for_report(after)
    assert Path(counted).read_text() == "ran\n"
    assert len(master.reports_of(task)) == 1


def test_pulls_are_numbered_and_acknowledge_the_last_one_received(master: FakeMaster, device: Device) -> None:
    master.script["pull"].append(lambda sent: master.pulls.append(sent) or captive_portal())
    device.start("--reconnect-seconds", "0")
    master.wait_for(lambda: len(master.pulls) > 1, "two pulls")
    master.wait_for_report(master.give("echo"))
    master.wait_for(lambda: len(master.pulls) > 2, "three pulls")
    assert [(pull["seq"], pull["ack"]) for pull in master.pulls[:3]] == [("1", "0"), ("2", "0"), ("3", "2")]


def listens(master: FakeMaster) -> bool:
    """The pull that is open is the one of a full device."""
    return [pull["limit"] for pull in master.open_pulls] == ["0"]


def test_a_full_device_holds_a_pull_with_limit_0_and_asks_as_soon_as_a_slot_is_free(
    master: FakeMaster, device: Device
) -> None:
    first, second = master.give("blocked", {"until": str(device.folder / "go")}), master.give("echo")
    device.start("--concurrent-tasks", "1")
    master.wait_for(lambda: listens(master), "a pull with limit 0")
    listening = master.pulls[-1]
    assert listening["wait"] == "20" and "seq" not in listening and "ack" not in listening
    (device.folder / "go").touch()
    master.wait_for_report(first)
    master.wait_for_report(second)
    master.wait_for(lambda: [pull["limit"] for pull in master.open_pulls] == ["1"], "the listening to end")
    assert [pull["seq"] for pull in master.pulls if pull["limit"] == "1"] == ["1", "2", "3"]
    assert {pull["wait"] for pull in master.pulls} == {"20"}


def test_short_tasks_cost_no_pull_with_limit_0(master: FakeMaster, device: Device) -> None:
    tasks = [master.give("echo") for _ in range(100)]
    # Not the usual 0.3 s, which a busy machine may need for a short task.
    device.start("--concurrent-tasks", "1", patch="from executors.device import pulls; pulls.FULL_SECONDS = 5.0")
    for task in tasks:
        master.wait_for_report(task)
    assert "0" not in {pull["limit"] for pull in master.pulls}


def test_cancel_and_drain_reach_a_full_device_long_before_its_pull_and_its_beat_are_due(
    master: FakeMaster, device: Device
) -> None:
    master.settings["next_seconds"] = master.next_seconds = 3000  # the heartbeat tells it nothing
    task = master.give("obedient", {"file": str(device.folder / "saw")})
    device.start("--concurrent-tasks", "1")
    master.wait_for(lambda: listens(master), "a pull with limit 0")
    master.drain = True
    eventually(lambda: "the master says drain" in device.said, "the drain", seconds=15)
    master.wait_for(lambda: listens(master), "a pull with limit 0")
    master.cancel = [task["assignment_id"]]
    eventually((device.folder / "saw").exists, "the executor to see it", seconds=15)
    master.wait_for(lambda: listens(master), "a pull with limit 0")
    later = master.give("echo")
    master.drain = False
    master.wait_for_report(later)


def test_a_master_that_cannot_hold_the_pull_of_a_full_device_is_not_asked_again_at_once(
    master: FakeMaster, device: Device
) -> None:
    empty = {"tasks": [], "cancel": [], "drain": False, "next_seconds": 0}
    master.give("blocked", {"until": str(device.folder / "go")})
    busy = lambda sent: empty if sent["limit"] == "0" else master._pull(sent)  # noqa: E731
    master.script["pull"].extend(busy for _ in range(1000))
    device.start("--concurrent-tasks", "1")
    master.wait_for(lambda: len(master.script["pull"]) <= 996, "three pulls with limit 0")
    began, left = time.monotonic(), len(master.script["pull"])
    master.wait_for(lambda: len(master.script["pull"]) <= left - 2, "two more")
    assert time.monotonic() - began > 0.5


def test_a_full_device_that_the_master_forgot_registers_again(master: FakeMaster, device: Device) -> None:
    master.give("blocked", {"until": str(device.folder / "go")})
    device.start("--concurrent-tasks", "1", "--pull-wait-seconds", "0.5")
    master.wait_for(lambda: listens(master), "a pull with limit 0")
    master.script["pull"].append(problem(404, "unknown_device"))
    master.wait_for(lambda: len(master.registers) == 2, "the second register")


def test_holding_names_a_task_from_delivery_until_its_report_is_acknowledged(
    master: FakeMaster, device: Device
) -> None:
    until = str(device.folder / "go")
    running, queued = master.give("blocked", {"until": until}), master.give("echo")
    both = {"tasks": [running, queued], "cancel": [], "drain": False, "next_seconds": 0}
    master.script["pull"].append(both)
    master.waiting.clear()
    device.start("--concurrent-tasks", "1")
    master.wait_for(lambda: master.is_holding(running, "running") and master.is_holding(queued, "queued"), "both")
    assert master.beats[-1]["active_tasks"] == 2
    master.script["report"].extend(problem(503, "busy") for _ in range(1000))
    Path(until).touch()
    both_reporting = lambda: master.is_holding(running, "reporting") and master.is_holding(queued, "reporting")  # noqa: E731
    master.wait_for(both_reporting, "both reporting")
    master.script["report"].clear()
    master.wait_for(lambda: master.beats[-1]["holding"] == [], "an empty holding[]")
    assert len(master.reports_of(running)) == len(master.reports_of(queued)) == 1


# ---- cancelled, over time, too late ----


def test_a_cancelled_task_is_told_so_and_reports_nothing(master: FakeMaster, device: Device) -> None:
    task = master.give("obedient", {"file": str(device.folder / "saw")})
    device.start()
    master.wait_for(lambda: master.is_holding(task, "running"), "the task in holding[]")
    master.cancel = [task["assignment_id"]]
    eventually((device.folder / "saw").exists, "the executor to see it")
    master.wait_for(lambda: not master.is_holding(task), "the task out of holding[]")
    assert master.reports_of(task) == []


def test_a_cancelled_task_that_does_not_end_gives_its_slot_to_another(master: FakeMaster, device: Device) -> None:
    task = master.give("blocked", {"until": str(device.folder / "go")})
    device.start("--concurrent-tasks", "1", patch="worker.CANCEL_GRACE_SECONDS = 0.3")
    master.wait_for(lambda: master.is_holding(task, "running"), "the task in holding[]")
    master.cancel = [task["assignment_id"]]
    master.wait_for_report(master.give("echo"))
    master.wait_for(lambda: not master.is_holding(task), "the task out of holding[]")
    assert master.reports_of(task) == []
    eventually(lambda: f"left behind task={task['id']}" in device.said, "the line about it")


def test_a_start_report_answered_gone_cancels_the_task(master: FakeMaster, device: Device) -> None:
    master.judge = lambda entry: {"outcome": "gone" if entry["outcome"] == "running" else "accepted"}
    task = master.give("obedient", {"file": str(device.folder / "saw")})
    device.start()
    eventually((device.folder / "saw").exists, "the executor to see it")
    assert master.reports_of(task) == []


def test_a_task_over_its_time_is_failed_its_slot_works_on_and_its_late_result_is_dropped(
    master: FakeMaster, device: Device
) -> None:
    task = master.give("blocked", {"until": str(device.folder / "go")}, execution_timeout_seconds=0.3)
    device.start("--concurrent-tasks", "1")
    report = master.wait_for_report(task)
    assert (report["outcome"], report["error_type"]) == ("failed", "timeout")
    assert report.get("retry", True) and report["duration_seconds"] > 0.3
    master.wait_for_report(master.give("echo"))
    (device.folder / "go").touch()
    eventually((device.folder / "go.cancelled").exists, "the thread to end")
    assert (device.folder / "go.cancelled").read_text() == "True"
    eventually(lambda: "dropped task=" in device.said, "the late result")
    master.wait_for_report(master.give("echo"))
    assert len(master.reports_of(task)) == 1


def test_a_task_that_did_not_start_in_time_is_handed_back_unstarted(master: FakeMaster, device: Device) -> None:
    first = master.give("blocked", {"until": str(device.folder / "go")})
    late = master.give("counting", {"file": str(device.folder / "runs")}, start_within_seconds=0.2)
    master.waiting.clear()
    master.script["pull"].append({"tasks": [first, late], "cancel": [], "drain": False, "next_seconds": 0})
    device.start("--concurrent-tasks", "1")
    report = master.wait_for_report(late)
    assert (report["outcome"], report["reason"]) == ("released", "not started in time")
    (device.folder / "go").touch()
    master.wait_for_report(first)
    master.wait_for_report(master.give("echo"))
    assert not (device.folder / "runs").exists()


# ---- the spool, through kill -9 ----


def test_a_result_survives_kill_9_and_goes_out_before_the_first_pull(master: FakeMaster, device: Device) -> None:
    order: list[str] = []  # of the second process; what the first one sent may still come in after its end
    report, pull = master._report, master._pull

    def note(name: str, sent: dict) -> None:
        order.extend([name] * (sent["boot_id"] != master.registers[0]["boot_id"]))

    def busy_four_times(sent: dict) -> Any:
        note("report", sent)
        return report(sent) if len(order) > 4 else problem(503, "busy")

    def noted_pull(sent: dict) -> Any:
        note("pull", sent)
        return pull(sent)

    master._report, master._pull = busy_four_times, noted_pull  # type: ignore[method-assign]
    task = master.give("echo", {"n": 1})
    device.start()
    eventually(device.spooled, "the report on disk")
    device.kill()
    device.start()
    assert master.wait_for_report(task)["result"] == {"echo": {"n": 1}}
    register = master.registers[-1]
    assert register["boot_id"] != master.registers[0]["boot_id"]
    held = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "phase": "reporting"}
    assert register["holding"] == [held]
    master.wait_for(lambda: "pull" in order, "a pull")
    assert order[:6] == ["report"] * 5 + ["pull"]
    device.signal(signal.SIGTERM)
    assert device.wait() == ExitCode.OK
    assert device.spooled() == [] and len(master.reports_of(task)) == 1


def test_after_kill_9_what_was_acknowledged_is_not_reported_again(master: FakeMaster, device: Device) -> None:
    tasks = [master.give("echo", {"n": n}) for n in range(20)]
    device.start()
    master.wait_for(lambda: len(master.ends) == 20, "20 reports")
    eventually(lambda: not device.spooled(), "the acknowledgements on disk")
    device.kill()
    device.start()
    master.wait_for(lambda: len(master.registers) == 2, "the second process")
    master.wait_for_report(master.give("echo"))
    assert master.registers[-1]["holding"] == []
    assert all(len(master.reports_of(task)) == 1 for task in tasks)


def test_a_full_spool_stops_the_pulls_and_drops_nothing(master: FakeMaster, device: Device) -> None:
    master.script["report"].extend(problem(503, "busy") for _ in range(1000))
    tasks = [master.give("large", {"size": 1500}) for _ in range(8)]
    device.start("--spool-max-bytes", "4096", "--concurrent-tasks", "1")
    eventually(lambda: "spool full" in device.said, "the line about the spool")
    master.wait_for(lambda: listens(master), "a pull with limit 0")
    assert len(master.waiting) > 0
    master.wait_for(lambda: master.beats[-1]["problem"] == "spool_full", "a beat that says so")
    master.script["report"].clear()
    for task in tasks:
        assert master.wait_for_report(task)["outcome"] == "completed"
    eventually(lambda: "spool has room" in device.said, "the line about the room")
    master.wait_for(lambda: master.beats[-1]["problem"] is None, "a beat that says it is over")


def test_reports_that_are_stale_or_gone_are_logged_and_leave_the_spool(master: FakeMaster, device: Device) -> None:
    stale, gone = master.give("echo"), master.give("echo")
    outcomes = {stale["assignment_id"]: "stale", gone["assignment_id"]: "gone"}
    # Only of the ends: a start that is gone (a slow machine sends some) cancels its task.
    master.judge = lambda entry: {
        "outcome": "accepted" if entry["outcome"] == "running" else outcomes[entry["assignment_id"]]
    }
    device.start()
    master.wait_for_report(gone)
    master.wait_for_report(stale)
    master.wait_for(lambda: master.beats and master.beats[-1]["holding"] == [], "an empty holding[]")
    device.signal(signal.SIGTERM)
    assert device.wait() == ExitCode.OK
    assert len(master.ends) == 2 and device.spooled() == []
    assert "report stale" in device.said and "report gone" in device.said


def test_a_report_found_invalid_is_failed_once_with_the_detail(master: FakeMaster, device: Device) -> None:
    master.judge = lambda entry: {"outcome": "invalid", "detail": "result.url is no URL", "field": "result.url"}
    task = master.give("echo")
    device.start()
    master.wait_for(lambda: len(master.reports_of(task)) == 2, "the second report")
    device.signal(signal.SIGTERM)
    assert device.wait() == ExitCode.OK
    first, second = master.reports_of(task)
    assert first["outcome"] == "completed" and second["lease_id"] == task["lease_id"]
    assert (second["outcome"], second["retry"]) == ("failed", False)
    assert "result.url is no URL" in second["error_message"]
    assert device.spooled() == [] and len(list((device.folder / "state/shop-7/set-aside").iterdir())) == 1


def test_one_bad_entry_never_blocks_the_others(master: FakeMaster, device: Device) -> None:
    tasks = [master.give("echo", {"n": n}) for n in range(16)]
    bad = tasks[5]["assignment_id"]

    def picky(sent: dict) -> Any:
        entries = [e for e in sent["reports"] if e["assignment_id"] == bad and e["outcome"] == "completed"]
        return problem(400, "malformed", "a number past 64 bits") if entries else master._report(sent)

    master.script["report"].append(problem(503, "busy"))  # so that a batch comes together
    master.script["report"].extend(picky for _ in range(1000))
    device.start("--concurrent-tasks", "16")
    for task in tasks:
        report = master.wait_for_report(task)
        assert report["outcome"] == ("failed" if task is tasks[5] else "completed")


def test_a_batch_that_is_too_large_is_split(master: FakeMaster, device: Device) -> None:
    tasks = [master.give("large", {"size": 1000}) for _ in range(12)]

    def small(sent: dict) -> Any:
        return problem(413, "too_large") if len(json.dumps(sent)) > 5000 else master._report(sent)

    master.script["report"].append(problem(503, "busy"))
    master.script["report"].extend(small for _ in range(1000))
    device.start("--concurrent-tasks", "12")
    for task in tasks:
        assert master.wait_for_report(task)["outcome"] == "completed"


@pytest.mark.parametrize("told", [True, False], ids=["known from register", "learned from 413"])
def test_a_single_result_that_is_too_large_is_failed_and_not_retried(
    master: FakeMaster, device: Device, told: bool
) -> None:
    if told:
        master.settings["max_body_bytes"] = 8192
    else:
        small = lambda sent: problem(413, "too_large") if len(json.dumps(sent)) > 8192 else master._report(sent)  # noqa: E731
        master.script["report"].extend(small for _ in range(1000))
    large, after = master.give("large", {"size": 9000}), master.give("echo")
    device.start()
    report = master.wait_for_report(large)
    assert (report["outcome"], report["error_type"], report["retry"]) == ("failed", "result_too_large", False)
    assert master.wait_for_report(after)["outcome"] == "completed"


# ---- the master is away, or says no ----


def test_a_device_that_boots_first_says_so_once_and_works_when_the_master_comes(tmp_path: Path) -> None:
    place = reserved_port()
    port = place.getsockname()[1]
    device = Device(tmp_path, f"http://127.0.0.1:{port}")
    try:
        device.start()
        eventually(lambda: "master not reached" in device.said, "the line about the master")
        with FakeMaster(port) as master:
            master.wait_for_report(master.give("echo"))
            assert device.said.count("master not reached") == 1
            assert f"http://127.0.0.1:{port}: Connection refused; trying until it answers" in device.said
    finally:
        device.kill()


def test_after_an_outage_the_results_made_meanwhile_arrive(tmp_path: Path) -> None:
    with FakeMaster() as master:
        device = Device(tmp_path, master.url)
        try:
            task = master.give("blocked", {"until": str(tmp_path / "go")})
            device.start("--reconnect-seconds", "0", "--pull-wait-seconds", "1")
            master.wait_for(lambda: master.reports_of(task, starts=True), "the start")
            master.stop()
            eventually(lambda: "master lost" in device.said, "the line about the outage")
            (tmp_path / "go").touch()
            eventually(device.spooled, "the report on disk")
            with FakeMaster(master.port) as again:
                assert again.wait_for_report(task)["outcome"] == "completed"
                eventually(lambda: "master back" in device.said, "the line about its end")
                assert again.registers == []  # it is still known: no new registration
        finally:
            device.kill()


@pytest.mark.parametrize(
    "answer",
    [captive_portal(), Answer(500, {"code": "bug"}), Answer(200, b"[]"), Answer(502, b"", kind="text/html"),
     Answer(403, b"<html>proxy</html>", kind="text/html"), Answer(200, b"{" * 100_000),
     Answer(200, {"settings": {}}, kind="text/html")],
    ids=["captive portal", "500", "no object", "gateway", "proxy 403", "garbage", "JSON as HTML"],
)  # fmt: skip
def test_what_is_no_answer_of_a_master_counts_as_unreachable(
    master: FakeMaster, device: Device, answer: Answer
) -> None:
    master.script["register"].append(answer)
    device.start()
    master.wait_for_report(master.give("echo"))
    assert device.said.count("master not reached") == 1


def test_a_redirect_is_not_followed(master: FakeMaster, device: Device) -> None:
    with FakeMaster() as other:
        location = other.url + "/api/distribution/devices/register"
        master.script["register"].append(Answer(307, {"code": "moved"}, headers={"Location": location}))
        device.start()
        master.wait_for_report(master.give("echo"))
        assert other.registers == [] and other.authorizations == set()


def test_a_reply_that_drips_for_ever_is_cut_and_the_beats_go_on(master: FakeMaster, device: Device) -> None:
    master.script["beat"].append(Dripping())
    device.start("--reconnect-seconds", "0", patch="worker.BEAT_SECONDS = 0.4")
    master.wait_for(lambda: len(master.beats) >= 2, "two beats")
    assert "no complete answer in time" in device.said


@pytest.mark.parametrize(
    ("answer", "code", "word"),
    [(problem(409, "superseded"), 3, "another process"), (problem(409, "conflict"), 3, "conflict"),
     (problem(401, "unauthorized"), 8, "api_key"), (problem(403, "forbidden"), 8, "api_key"),
     (problem(426, "protocol_too_old", "copy worker.py again: scp master:worker.py ."), 8, "scp master:worker.py")],
    ids=["superseded", "conflict", "401", "403", "426"],
)  # fmt: skip
@pytest.mark.parametrize("route", ["register", pytest.param("beat", marks=pytest.mark.slow)])
def test_a_refusal_for_good_ends_it_with_one_sentence(
    master: FakeMaster, device: Device, route: str, answer: Answer, code: int, word: str
) -> None:
    master.script[route].append(answer)
    device.start("--drain-seconds", "0")
    assert device.wait() == code
    (line,) = [line for line in device.said.splitlines() if " ERROR " in line]
    assert word in line
    assert "Traceback" not in device.said


def test_a_refused_key_leaves_the_results_of_running_tasks_in_the_spool(master: FakeMaster, device: Device) -> None:
    task = master.give("blocked", {"until": str(device.folder / "go")})
    slow_disk = "import time; write = worker.Spool.write\nworker.Spool.write = lambda *a: (time.sleep(0.3), write(*a))"
    device.start(patch=slow_disk)
    master.wait_for(lambda: master.is_holding(task, "running"), "the task in holding[]")
    for route in ("beat", "report", "pull"):
        master.script[route].extend(problem(401, "unauthorized") for _ in range(1000))
    eventually(lambda: "refuses this device's key" in device.said, "the sentence")
    (device.folder / "go").touch()
    assert device.wait() == ExitCode.REFUSED
    assert [entry["outcome"] for entry in device.spooled()] == ["completed"]


def test_a_device_that_the_master_forgot_registers_again_with_what_it_holds(master: FakeMaster, device: Device) -> None:
    task = master.give("blocked", {"until": str(device.folder / "go")})
    device.start("--pull-wait-seconds", "0.5")
    master.wait_for(lambda: master.is_holding(task, "running"), "the task in holding[]")
    master.script["beat"].append(problem(404, "unknown_device"))
    master.wait_for(lambda: len(master.registers) == 2, "the second register")
    first, second = master.registers
    assert second["boot_id"] == first["boot_id"]
    assert [held["assignment_id"] for held in second["holding"]] == [task["assignment_id"]]
    (device.folder / "go").touch()
    master.wait_for_report(task)


def test_a_drain_ordered_by_the_master_stops_the_pulls_until_it_is_lifted(master: FakeMaster, device: Device) -> None:
    master.drain = True
    device.start("--pull-wait-seconds", "0.5")
    master.wait_for(lambda: master.beats and master.pulls and master.pulls[-1]["limit"] == "0", "limit 0")
    task = master.give("echo")
    assert master.reports_of(task) == []
    master.drain = False
    master.wait_for_report(task)


# ---- stopping ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_tasks_finish_says_goodbye_and_exits_0(master: FakeMaster, device: Device, number: int) -> None:
    task = master.give("blocked", {"until": str(device.folder / "go")})
    device.start()
    master.wait_for(lambda: master.is_holding(task, "running"), "the task in holding[]")
    device.signal(number)
    eventually(lambda: "drain busy=1" in device.said, "the drain")
    later = master.give("echo")
    master.wait_for(lambda: master.pulls[-1]["limit"] == "0", "the master told that nothing more is taken")
    (device.folder / "go").touch()
    assert device.wait() == ExitCode.OK
    assert master.reports_of(task)[0]["outcome"] == "completed"
    assert master.reports_of(later) == [] or master.reports_of(later)[0]["outcome"] == "released"
    assert master.beats[-1]["leaving"] is True and master.beats[-1]["holding"] == []
    assert list((device.folder / "state/shop-7/spool").iterdir()) == []


def test_what_does_not_finish_within_drain_seconds_is_handed_back(master: FakeMaster, device: Device) -> None:
    running = master.give("blocked", {"until": str(device.folder / "go")})
    queued = master.give("echo")
    master.waiting.clear()
    master.script["pull"].append({"tasks": [running, queued], "cancel": [], "drain": False, "next_seconds": 0})
    device.start("--concurrent-tasks", "1", "--drain-seconds", "0.3")
    master.wait_for(lambda: master.is_holding(running, "running"), "the task in holding[]")
    device.signal(signal.SIGTERM)
    assert device.wait() == ExitCode.OK
    assert [entry["outcome"] for entry in master.reports_of(running)] == ["released"]
    assert [entry["outcome"] for entry in master.reports_of(queued)] == ["released"]


def test_a_second_signal_ends_it_at_once(master: FakeMaster, device: Device) -> None:
    task = master.give("blocked", {"until": str(device.folder / "go")})
    device.start(patch="worker.SECOND_SIGNAL_SECONDS = 0.0")
    master.wait_for(lambda: master.is_holding(task, "running"), "the task in holding[]")
    device.signal(signal.SIGTERM)
    eventually(lambda: "drain busy=1" in device.said, "the drain")
    device.signal(signal.SIGTERM)
    assert device.wait() == 130


def test_a_stop_loses_no_report_of_a_task_that_ends_in_the_same_moment(master: FakeMaster, device: Device) -> None:
    late = """
import time
from executors.device.reports import Reporter
put = Reporter.put
def put_later(self, content):
    time.sleep(0.5)
    put(self, content)
Reporter.put = put_later
"""
    task = master.give("blocked", {"until": str(device.folder / "go")})
    device.start(patch=late)
    master.wait_for(lambda: master.is_holding(task, "running"), "its start")
    (device.folder / "go").touch()
    device.signal(signal.SIGTERM)
    assert device.wait() == 0
    assert [report["outcome"] for report in master.reports_of(task)] == ["completed"]


@pytest.mark.parametrize(("own", "asked", "spread"), [(30, 300, 300), (5, 300, 5), (30, 10, 10), (60, 30, 30)])
def test_a_large_fleet_is_spread_as_its_master_asks(own: int, asked: int, spread: int, tmp_path: Path) -> None:
    device = worker.Worker(Settings(device_id="shop-7", reconnect_seconds=own), tmp_path)
    device._adopt({"reconnect_spread_seconds": asked})
    assert device.link.spread_seconds == spread


def test_a_stop_does_not_wait_for_the_next_try_to_deliver_what_is_finished(tmp_path: Path) -> None:
    with FakeMaster() as master:
        master.settings["reconnect_spread_seconds"] = 3000
        device = Device(tmp_path, master.url)
        try:
            task = master.give("blocked", {"until": str(tmp_path / "go")})
            longest_waits = "worker.random.uniform = lambda low, high: high"
            device.start("--reconnect-seconds", "3000", "--pull-wait-seconds", "1", patch=longest_waits)
            master.wait_for(lambda: master.reports_of(task, starts=True), "the start")
            master.stop()
            eventually(lambda: "master lost" in device.said, "the line about the outage")
            (tmp_path / "go").touch()
            eventually(device.spooled, "the report on disk")
            with FakeMaster(master.port) as again:
                device.signal(signal.SIGTERM)
                assert device.wait() == ExitCode.OK
                assert [entry["outcome"] for entry in again.reports_of(task)] == ["completed"]
                assert again.beats[-1]["leaving"] is True
        finally:
            device.kill()


def test_it_stops_at_once_where_the_master_was_never_there(tmp_path: Path) -> None:
    place = reserved_port()
    device = Device(tmp_path, f"http://127.0.0.1:{place.getsockname()[1]}")
    try:
        device.start()
        eventually(lambda: "master not reached" in device.said, "the line about the master")
        device.signal(signal.SIGTERM)
        assert device.wait() == ExitCode.OK
    finally:
        device.kill()


def test_with_stop_with_stdin_the_end_of_stdin_is_a_stop(master: FakeMaster, device: Device) -> None:
    device.start("--stop-with-stdin", stdin=subprocess.PIPE)
    master.wait_for_report(master.give("echo"))
    assert device.process is not None and device.process.stdin is not None
    device.process.stdin.close()
    assert device.wait() == ExitCode.OK
    assert master.beats[-1]["leaving"] is True


def test_a_second_start_with_the_same_device_id_is_refused(master: FakeMaster, device: Device) -> None:
    device.start()
    master.wait_for_report(master.give("echo"))
    second = Device(device.folder, master.url).start()
    assert second.wait() == ExitCode.CONFLICT
    (line,) = [line for line in device.said.splitlines() if " ERROR " in line]
    assert "shop-7 runs on this machine already" in line
    assert len(master.registers) == 1


def test_a_malformed_master_url_is_a_settings_error(tmp_path: Path) -> None:
    device = Device(tmp_path, "master:8000").start()
    assert device.wait() == ExitCode.SETTINGS
    assert "master_url" in device.said and "Traceback" not in device.said


# ---- beats, and machines that lack things ----


@pytest.mark.parametrize("is_monitored", [True, False])
def test_beats_carry_machine_figures_unless_monitoring_is_off(
    master: FakeMaster, device: Device, is_monitored: bool
) -> None:
    device.start("--enable-monitoring", str(is_monitored).lower())
    master.wait_for(lambda: len(master.beats) >= 2, "two beats")
    beat = master.beats[-1]
    figures = [beat[name] for name in ("cpu_usage", "memory_usage", "disk_usage") if name in beat]
    assert len(figures) == (3 if is_monitored else 0)
    assert all(0 <= figure <= 100 for figure in figures)
    assert beat["seq"] == master.beats[-2]["seq"] + 1
    assert beat["boot_id"] == master.registers[0]["boot_id"]
    assert abs(beat["clock"] - time.time()) < 60 and beat["problem"] is None
    assert beat["system_info"]["worker_version"]


def test_the_figures_come_without_psutil_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "psutil", None)
    figures = machine.Machine(tmp_path).usage()
    assert {"memory_usage", "disk_usage"} <= set(figures)
    assert all(0 <= figure <= 100 for figure in figures.values())


def test_it_imports_where_fcntl_and_psutil_are_absent() -> None:
    run = "import sys; sys.modules.update(fcntl=None, psutil=None)\nimport worker\n"
    run += "from executors.device.machine import fcntl, psutil; print(fcntl, psutil)"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "None None", done.stderr


def test_a_master_may_not_shorten_or_stretch_what_this_device_was_told(tmp_path: Path) -> None:
    assert link.number("nan", 3.0, 0, 10) == 3.0
    assert link.number(None, 3.0, 0, 10) == 3.0
    assert link.number(1e9, 3.0, 0, 10) == 10
    assert link.number(-1, 3.0, 0, 10) == 0


def test_the_contract_names_the_numbers_that_the_code_has() -> None:
    text, defaults = " ".join((worker.__doc__ or "").split()), Settings()
    for sentence in (
        f"held up to pull_wait_seconds ({defaults.pull_wait_seconds:g}, at most 25)",
        f"Full for {pulls.FULL_SECONDS:g} s",
        f"{holding.SHORTEST_PATIENCE_SECONDS:g} s at least, and {worker.DEPUTY_EXTRA_SECONDS:g} s more",
        f"Every heartbeat_interval ({defaults.heartbeat_interval:g} s",
        f"At most {reports.REPORTS_PER_REQUEST} in a request",
        f"has run for {worker.START_REPORT_SECONDS:g} s",
        f"(under {pace.SHORT_SECONDS:g} s) a pull also asks for as many as make about {pace.AHEAD_SECONDS:g} s of work,"
        f" at most {pace.AHEAD_LIMIT}",
        f"{worker.CANCEL_GRACE_SECONDS:g} s later SIGKILL",
        f"Connecting takes at most {link.CONNECT_SECONDS:g} s",
        f"pull: wait + {pulls.PULL_EXTRA_SECONDS:g} s, beat {worker.BEAT_SECONDS:g}, report {reports.REPORT_SECONDS:g}",
        f"{link.LONGEST_BACKOFF_SECONDS:g} s)",
        f"drain_seconds ({defaults.drain_seconds:g})",
        f"flushed ({worker.FLUSH_SECONDS:g} s)",
        f"A second signal, {worker.SECOND_SIGNAL_SECONDS:g} s later",
        f"{int(ExitCode.SETTINGS)} settings; {int(ExitCode.CONFLICT)} another process",
        f"{int(ExitCode.REFUSED)} the master refuses",
    ):
        assert sentence in text, sentence


def test_waits_grow_have_an_end_and_are_spread_after_an_outage() -> None:
    a_link = link.Link("http://master")
    a_link.worked(time.monotonic())
    a_link.spread_seconds = 30.0
    gone, broken = link.Unreachable("refused"), link.Unreachable("reset", was_broken=True)
    a_link._failures = 1
    assert a_link._longest_wait(broken) == 3.0
    assert a_link._longest_wait(gone) == 30.0
    waits = []
    for a_link._failures in range(2, 12):
        waits.append(a_link._longest_wait(gone))
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60, 60, 60]


def test_an_answer_to_a_call_older_than_the_failure_does_not_end_the_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    a_link = link.Link("http://master")
    a_link.worked(time.monotonic())
    held = time.monotonic()
    a_link.failed(time.monotonic(), link.Unreachable("refused"))
    a_link.worked(held)
    assert "master back" not in caplog.text
    a_link.worked(time.monotonic())
    assert "master back" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_that_a_task_forks_does_not_keep_the_state_folder(tmp_path: Path) -> None:
    take = "import os, time, worker; from settings import Settings\n"
    take += f"worker.take_folder(Settings(device_id='shop-7', state_folder={str(tmp_path)!r}))\n"
    fork = take + "pid = os.fork()\nif not pid: os.close(1); time.sleep(60)\nprint(pid, flush=True); os._exit(0)"
    first = subprocess.run([sys.executable, "-c", fork], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    try:
        again = subprocess.run([sys.executable, "-c", take], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert again.returncode == 0, again.stderr
    finally:
        os.kill(int(first.stdout), signal.SIGKILL)


def test_no_proxy_stands_between_a_device_and_a_master_on_the_same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    near, far = (
        link.MasterClient(link.Link(url), Settings(master_url=url))
        for url in ("http://localhost:8000", "http://master.example.org:8000")
    )
    assert (near._session.proxies, far._session.proxies) == ({}, {"http": "http://127.0.0.1:9"})


def test_a_log_line_has_no_line_break_of_a_master(master: FakeMaster, device: Device) -> None:
    master.script["register"].append(problem(426, "protocol_too_old", "line one\nERROR forged line"))
    device.start()
    assert device.wait() == ExitCode.REFUSED
    assert not re.search(r"^ERROR forged line", device.said, re.MULTILINE)


# ---- with the real master ----


class RealMaster:
    """master.py as it runs in production, on a free port, with its database in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        database, log = str(folder / "master.db"), str(folder / "master.log")
        command = [sys.executable, str(ROOT / "master.py"), "--port", "0", "--database", database, "--log-file", log]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        environment.update(AF_API_KEY=KEY)
        with open(folder / "master.stderr", "wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, cwd=ROOT)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words[:1] == [b"ready"], (folder / "master.stderr").read_text()
        self.url = words[1].decode()
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {KEY}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        reply = self.session.request(method, f"{self.url}/api/distribution{path}", json=body, timeout=60)
        assert reply.ok, reply.text
        return reply.json()

    def submit(self, *tasks: tuple[str, dict]) -> list[int]:
        body = [{"task_type": task_type, "task_data": task_data} for task_type, task_data in tasks]
        return [entry["id"] for entry in self.call("POST", "/tasks", body)["tasks"]]

    def task(self, number: int) -> dict:
        return self.call("GET", f"/tasks/{number}")  # type: ignore[no-any-return]

    def count(self, state: str) -> int:
        return int(self.call("GET", "/system/overview")["tasks"].get(state, 0))


@pytest.fixture
def real_master(tmp_path: Path) -> Iterator[RealMaster]:
    found = RealMaster(tmp_path)
    yield found
    found.process.terminate()
    found.process.communicate(timeout=60)


def test_with_a_real_master_every_task_is_completed_at_its_first_attempt(
    tmp_path: Path, real_master: RealMaster
) -> None:
    device = Device(tmp_path, real_master.url)
    try:
        device.start()
        numbers = real_master.submit(*[("counting", {"file": str(tmp_path / "runs")}) for _ in range(200)])
        eventually(lambda: real_master.count("completed") == 200, "200 completed")
        assert (tmp_path / "runs").read_text() == "ran\n" * 200
        assert all(len(real_master.task(number)["attempts"]) == 1 for number in numbers[::20])
    finally:
        device.kill()


def test_with_a_real_master_a_killed_device_delivers_its_spool_and_the_rest_runs_again(
    tmp_path: Path, real_master: RealMaster
) -> None:
    device = Device(tmp_path, real_master.url)
    try:
        # A first device that can finish but not report: its reports stay in the spool.
        device.start("--concurrent-tasks", "2", patch="worker.Reporter.send = lambda self: __import__('time').sleep(1)")
        done, killed = real_master.submit(("echo", {"n": 1}), ("blocked", {"until": str(tmp_path / "go")}))
        eventually(device.spooled, "the report on disk")
        eventually(lambda: real_master.task(killed)["status"] in ("assigned", "running"), "the other delivered")
        device.kill()
        (tmp_path / "go").touch()
        device.start()
        eventually(lambda: real_master.count("completed") == 2, "both completed")
        assert len(real_master.task(done)["attempts"]) == 1
        assert len(real_master.task(killed)["attempts"]) == 2
    finally:
        device.kill()


def test_with_a_real_master_a_cancelled_task_is_told_and_a_stop_hands_back_without_a_retry(
    tmp_path: Path, real_master: RealMaster
) -> None:
    device = Device(tmp_path, real_master.url)
    try:
        device.start("--drain-seconds", "0.2")
        cancelled, back = real_master.submit(
            ("obedient", {"file": str(tmp_path / "saw")}), ("blocked", {"until": str(tmp_path / "go")})
        )
        eventually(lambda: real_master.count("running") == 2, "both running")
        real_master.call("POST", f"/tasks/{cancelled}/cancel", {"reason": "a test"})
        eventually((tmp_path / "saw").exists, "the executor to see it")
        device.signal(signal.SIGTERM)
        assert device.wait() == ExitCode.OK
        task = real_master.task(back)
        assert (task["status"], task["retry_count"], task["lost_count"]) == ("pending", 0, 0)
        assert real_master.task(cancelled)["status"] == "cancelled"
    finally:
        device.kill()
