"""What does a device survive? A real worker beside a real master, held up, killed at every step, and out of disk."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from crashing_worker import POINTS
from fake_master import Answer, FakeMaster, captive_portal
from farm import ROOT, Master, Program, Worker, farm, wait_for

from executors.device.spool import Spool
from settings import ExitCode

QUICK = {"heartbeat_interval": 0.3, "timeout_check_interval": 0.5, "retry_backoff_seconds": 0.1}
EXECUTORS = """
import ctypes, os, time
from pathlib import Path
from executors.task_executor import TaskExecutor


class Burn(TaskExecutor):
    isolation = "thread"

    def __init__(self):
        super().__init__("burn")

    def execute_task(self, task_data):
        Path(task_data["until"] + ".begun").touch()
        while not os.path.exists(task_data["until"]):
            for _ in range(1_000_000):
                pass
        return {}


class HoldInterpreter(TaskExecutor):
    isolation = "thread"

    def __init__(self):
        super().__init__("hold_interpreter")

    def execute_task(self, task_data):
        Path(task_data["until"] + ".begun").touch()
        waiting = f"until test -e {task_data['until']}; do sleep 0.02; done"
        ctypes.PyDLL(None).system(waiting.encode())  # PyDLL: no other thread of this process runs
        return {}


class Obedient(TaskExecutor):
    isolation = "thread"

    def __init__(self):
        super().__init__("obedient")

    def execute_task(self, task_data):
        while not self.context.cancelled:
            time.sleep(0.01)


class Witness(TaskExecutor):
    isolation = "thread"

    def __init__(self):
        super().__init__("witness")

    def execute_task(self, task_data):
        with open(task_data["file"], "a") as file:
            file.write(f"{task_data['n']}\\n")
        return {"n": task_data["n"], "text": "x" * 1500}
"""
STALLING_DISK = """
import time
from pathlib import Path
from executors.device import spool

sync_file = spool.sync_file


def stalling(descriptor):
    if Path(STALLED_WHILE).exists():
        print("the disk stalls")
    while Path(STALLED_WHILE).exists():
        time.sleep(0.01)
    sync_file(descriptor)


spool.sync_file = stalling
"""


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    with farm() as found:
        yield found


@pytest.fixture
def master(programs: list[Program], tmp_path: Path) -> Master:
    found = Master(tmp_path / "master", **QUICK)
    programs.append(found)
    return found


def start_worker(
    programs: list[Program],
    master: Master | FakeMaster,
    folder: Path,
    stalled_while: Path | None = None,
    script: str = "worker.py",
    **settings: Any,
) -> Worker:
    folder.mkdir(parents=True, exist_ok=True)
    executors = folder / "my_executors.py"
    disk = STALLING_DISK.replace("STALLED_WHILE", repr(str(stalled_while))) if stalled_while else ""
    executors.write_text(EXECUTORS + disk)
    settings = {"concurrent_tasks": 1, "executors": [str(executors)], "heartbeat_interval": 0.3, **settings}
    worker = Worker(master.url, folder, "shop-1", script=script, api_key="key-of-this-test", **settings)
    programs.append(worker)
    return worker


def completed(master: Master, task_id: int) -> dict[str, Any]:
    """The task, once it is completed; meanwhile its device must never be offline."""

    def look() -> Any:
        assert master.get("/devices")["devices"][0]["status"] in ("online", "busy")
        task = master.get(f"/tasks/{task_id}")
        return task if task["status"] == "completed" else None

    found: dict[str, Any] = wait_for(f"task {task_id} to be completed", look)
    return found


def wait_for_a_beat(master: Master) -> None:
    """Meanwhile the device must never be offline."""

    def beaten_at() -> str:
        (device,) = master.get("/devices")["devices"]
        assert device["status"] in ("online", "busy")
        return str(device["last_heartbeat_at"])

    before = beaten_at()
    wait_for("a beat", lambda: beaten_at() > before)


def children_of(worker: Worker) -> list[int]:
    found = []
    for thread in Path(f"/proc/{worker.process.pid}/task").iterdir():
        found += (thread / "children").read_text().split()
    return [int(child) for child in found]


def deputy_of(worker: Worker) -> int:
    """The one child of an idle worker."""
    (child,) = wait_for("one child", lambda: len(found := children_of(worker)) == 1 and found)
    return int(child)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- beats while the interpreter is held ----


@pytest.mark.parametrize("task_type", ["burn", "hold_interpreter"])
def test_a_task_that_holds_the_interpreter_costs_no_beat(
    programs: list[Program], master: Master, tmp_path: Path, task_type: str
) -> None:
    worker = start_worker(programs, master, tmp_path / "shop-1")
    until = tmp_path / "go"
    task_id = master.submit_one(task_type, task_data={"until": str(until)})
    wait_for("the task to hold it", (tmp_path / "go.begun").exists)
    for _ in range(5):
        wait_for_a_beat(master)
    until.touch()
    task = completed(master, task_id)
    assert (len(task["attempts"]), task["lost_count"], task["retry_count"]) == (1, 0, 0)
    assert worker.stop() == 0


def test_nobody_says_that_a_stopped_worker_lives(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path / "master", **QUICK, device_timeout=1.5)
    programs.append(master)
    worker = start_worker(programs, master, tmp_path / "shop-1")
    status = lambda: [device["status"] for device in master.get("/devices")["devices"]]  # noqa: E731
    wait_for("the device", lambda: status() == ["online"])
    os.kill(worker.process.pid, signal.SIGSTOP)
    wait_for("the device to be offline", lambda: status() == ["offline"])
    os.kill(worker.process.pid, signal.SIGCONT)
    wait_for("the device", lambda: status() == ["online"])


def test_the_deputy_ends_with_its_worker_and_never_before(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path / "master", **{**QUICK, "heartbeat_interval": 30})  # no beat is late, so it stays the same
    programs.append(master)
    worker = start_worker(programs, master, tmp_path / "shop-1")
    wait_for("the device", lambda: master.get("/devices")["devices"])
    deputy = deputy_of(worker)
    until = tmp_path / "go"
    master.submit_one("burn", task_data={"until": str(until)})
    wait_for("the task to run", (tmp_path / "go.begun").exists)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(deputy, number)
    os.killpg(worker.process.pid, signal.SIGTERM)
    wait_for("the drain", lambda: "drain busy=1" in worker.output)
    assert is_there(deputy)
    until.touch()
    assert worker.wait() == 0
    wait_for("the deputy's end", lambda: not is_there(deputy))


def test_the_deputy_of_a_killed_worker_keeps_no_lock_and_ends(
    programs: list[Program], master: Master, tmp_path: Path
) -> None:
    worker = start_worker(programs, master, tmp_path / "shop-1")
    wait_for("the device", lambda: master.get("/devices")["devices"])
    deputy = deputy_of(worker)
    os.kill(deputy, signal.SIGSTOP)
    worker.process.kill()
    worker.process.wait(60)
    second = start_worker(programs, master, tmp_path / "shop-1")
    wait_for("the second process", lambda: "registered" in second.output)
    os.kill(deputy, signal.SIGCONT)
    wait_for("the deputy's end", lambda: not is_there(deputy))


def test_a_deputy_that_was_killed_or_had_to_beat_is_replaced(
    programs: list[Program], master: Master, tmp_path: Path
) -> None:
    worker = start_worker(programs, master, tmp_path / "shop-1")
    wait_for("the device", lambda: master.get("/devices")["devices"])
    first = deputy_of(worker)
    os.kill(first, signal.SIGKILL)
    wait_for("another deputy", lambda: children_of(worker) not in ([], [first]))
    second = deputy_of(worker)
    task_id = master.submit_one("hold_interpreter", task_data={"until": str(tmp_path / "go")})
    wait_for("the task to hold it", (tmp_path / "go.begun").exists)
    for _ in range(3):  # the first one may have been on its way before
        wait_for_a_beat(master)
    (tmp_path / "go").touch()
    completed(master, task_id)
    wait_for("a small deputy", lambda: children_of(worker) not in ([], [second]))
    assert not is_there(second)
    assert worker.stop() == 0


@pytest.fixture
def fake() -> Iterator[FakeMaster]:
    """A master that writes down every beat with its moment in `heard`."""
    with FakeMaster() as found:
        found.settings["heartbeat_interval_seconds"] = found.next_seconds = 0.2
        found.heard = []  # type: ignore[attr-defined]
        usual = found._beat

        def beat(sent: dict[str, Any]) -> Any:
            found.heard.append((time.monotonic(), sent))  # type: ignore[attr-defined]
            return usual(sent)

        found._beat = beat  # type: ignore[method-assign]
        yield found


def signs_of_life(fake: Any) -> list[float]:
    """When the deputy beat."""
    return [at for at, sent in fake.heard if sent.get("holding", ()) is None]


def patched_worker(folder: Path, patch: str) -> str:
    """A script that is worker.py with that change."""
    script = folder / "patched_worker.py"
    head = f"import os, random, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport worker\n"
    script.write_text(f"{head}from executors.device import holding, link\n{patch}\nos._exit(worker.main())")
    return str(script)


def test_a_deputy_beats_with_nothing_but_the_boot_id_and_not_for_ever(
    programs: list[Program], fake: FakeMaster, tmp_path: Path
) -> None:
    impatient = "holding.SHORTEST_PATIENCE_SECONDS = 1.0\nworker.DEPUTY_EXTRA_SECONDS = 0.5"
    until = tmp_path / "go"
    task = fake.give("hold_interpreter", {"until": str(until)}, execution_timeout_seconds=1)

    def give_token(sent: dict[str, Any]) -> dict[str, Any]:
        fake.authorizations.clear()  # of the registration itself
        return {**fake._register(sent), "token": "afk_1_of-this-device"}

    fake.script["register"].append(give_token)
    script = patched_worker(tmp_path, impatient)
    start_worker(programs, fake, tmp_path / "shop-1", script=script, task_timeout=1)

    def is_silent() -> bool:
        """It has beaten each 0.2 s, and no more for five times as long."""
        signs = signs_of_life(fake)
        return until.with_suffix(".begun").exists() and bool(signs) and time.monotonic() - signs[-1] > 1

    fake.wait_for(is_silent, "the deputy to give up")
    until.touch()
    fake.wait_for_report(task)
    sent = next(sent for _, sent in fake.heard if sent["holding"] is None)  # type: ignore[attr-defined]
    assert sent == {"boot_id": fake.registers[0]["boot_id"], "seq": 0, "holding": None}
    assert fake.authorizations == {"Bearer afk_1_of-this-device"}


def test_a_deputy_does_not_call_a_master_that_its_worker_waits_for(
    programs: list[Program], fake: FakeMaster, tmp_path: Path
) -> None:
    """After a failure the worker waits for longer than the deputy would; here always as long as it may."""
    longest = patched_worker(tmp_path, "random.uniform = lambda low, high: high")
    waits, failed_at = [0.5, 1.0], []
    usual = fake._beat

    def fails(sent: dict[str, Any]) -> Any:
        reply = usual(sent)
        if sent["holding"] is None or len(failed_at) == len(waits):
            return reply
        failed_at.append(time.monotonic())
        return Answer(500, {"code": "bug"})

    fake._beat = fails  # type: ignore[method-assign]
    start_worker(programs, fake, tmp_path / "shop-1", script=longest)
    own_beats = lambda: [beat for beat in fake.beats if beat["holding"] is not None]  # noqa: E731
    fake.wait_for(lambda: len(own_beats()) > len(waits), "the beat after the failures")
    for failed, wait in zip(
        failed_at, waits
    ):  # a sign that was late on its way, or came for a late beat, is none of it
        assert not [sign for sign in signs_of_life(fake) if failed + wait / 2 < sign < failed + wait]


# ---- a master that is away, or is none ----


def test_through_an_hour_of_failures_it_keeps_its_results_and_goes_on_by_itself(
    programs: list[Program], tmp_path: Path
) -> None:
    """An hour has some 120 tries, with waits of up to a minute; here with waits of up to 20 ms."""
    quick = patched_worker(tmp_path, "link.LONGEST_BACKOFF_SECONDS = 0.02")
    with FakeMaster() as fake:
        fake.next_seconds = 0.2
        ends, goes_on = fake.give("echo", {"sleep_seconds": 1}), fake.give("obedient")
        some = {"concurrent_tasks": 2, "drain_seconds": 0}
        worker = start_worker(programs, fake, tmp_path / "shop-1", script=quick, **some)
        started = lambda: fake.reports_of(ends, starts=True) and fake.reports_of(goes_on, starts=True)  # noqa: E731
        fake.wait_for(started, "the starts")
        port = fake.port
    tries = 0
    with socket.create_server(("127.0.0.1", port)) as hangs_up:
        hangs_up.settimeout(60)
        while tries < 120:
            hangs_up.accept()[0].close()
            tries += 1
    with FakeMaster(port) as again:
        again.registers.append({"boot_id": fake.registers[0]["boot_id"]})
        assert again.wait_for_report(ends)["outcome"] == "completed"
        again.wait_for(lambda: again.beats and again.is_holding(goes_on, "running"), "a beat")
        assert worker.stop() == 0
        assert worker.output.count("master lost") == 1 and worker.output.count("master back") == 1
        assert [entry["outcome"] for entry in again.reports_of(goes_on)] == ["released"]
        assert len(again.reports_of(ends)) == 1


@pytest.mark.parametrize("answer", [
    captive_portal(), Answer(500, {"code": "bug"}), Answer(502, b"", kind="text/html"), Answer(200, b"{" * 100_000),
    Answer(302, b"", headers={"Location": "http://127.0.0.1:9/login"}), Answer(200, {"hello": "world"}),
], ids=["captive portal", "500", "gateway", "garbage", "redirect", "another service"])  # fmt: skip
def test_no_wrong_answer_to_any_call_costs_a_result_or_ends_the_device(
    programs: list[Program], fake: FakeMaster, tmp_path: Path, answer: Answer
) -> None:
    for route in ("register", "beat", "pull", "report"):
        fake.script[route].extend([answer, answer])
    tasks = [fake.give("echo", {"n": n}) for n in range(3)]
    at_once = patched_worker(tmp_path, "random.uniform = lambda low, high: low")
    worker = start_worker(programs, fake, tmp_path / "shop-1", script=at_once)
    for n, task in enumerate(tasks):
        assert fake.wait_for_report(task)["result"] == {"echo": {"n": n}}
    fake.wait_for(lambda: not any(fake.script.values()) and fake.beats, "every route asked again")
    assert worker.stop() == 0
    assert [len(fake.reports_of(task)) for task in tasks] == [1, 1, 1]


# ---- killed at every step ----


class Doomed(Worker):
    """A worker that kills itself at a point, see crashing_worker.py; without one, worker.py itself."""

    def __init__(self, point: str, master: Master, folder: Path, device_id: str) -> None:
        self.point, self.hits = point, 1 if "segment" in point else 2
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "my_executors.py").write_text(EXECUTORS)
        # 4 KiB a segment, so that segments come and go.
        settings = {"executors": [str(folder / "my_executors.py")], "spool_max_bytes": 32_768, "concurrent_tasks": 2}
        super().__init__(master.url, folder, device_id, heartbeat_interval=0.3, reconnect_seconds=0, **settings)

    def start(self) -> None:
        script = [str(ROOT / "tests/crashing_worker.py"), self.point, str(self.hits)] if self.point else ["worker.py"]
        self._command = [sys.executable, *script, "--config", str(self._config)]
        super().start()

    def spooled(self) -> list[int]:
        """The attempts whose reports are in the journal of the process that died."""
        paths = sorted((self.folder / "state" / self.device_id / "spool").glob("*.spool"))
        records = [record for path in paths for record in Spool.records(path.read_bytes())]
        return [json.loads(payload)["assignment_id"] for _, kind, payload in records if kind == b"R"]


def history(database: Path, witness: Path, submitted: list[int]) -> dict[str, list[int]]:
    """What went wrong, by task; nothing did if every list is empty."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        status = dict(connection.execute("SELECT id, status FROM af_crawl_tasks").fetchall())
        results = dict(connection.execute("SELECT task_id, json_extract(result, '$.n') FROM af_task_result").fetchall())
        number = dict(
            connection.execute("SELECT task_id, json_extract(task_data, '$.n') FROM af_task_payload").fetchall()
        )
        rows = connection.execute("SELECT task_id FROM af_task_assignment WHERE status = 'completed'").fetchall()
    accepted = collections.Counter(task_id for (task_id,) in rows)
    ran = {int(line) for line in witness.read_text().split()}
    return {
        "lost": [task for task in submitted if task not in status],
        "stuck": [task for task in submitted if status.get(task) not in ("completed", None)],
        "double accepted": [task for task, n in accepted.items() if n > 1],
        "accepted without a run": [task for task in accepted if number[task] not in ran],
        "of another task": [task for task in submitted if results.get(task) != number.get(task)],
        "unexpected": [task for task in status if task not in submitted],
    }


def witnesses(witness: Path, numbers: range, **more: Any) -> list[dict[str, Any]]:
    of = lambda n: {"n": n, "file": str(witness)}  # noqa: E731
    return [{"task_type": "witness", "task_data": of(n), "max_retry_count": 9, **more} for n in numbers]


IN_THE_JOURNAL = ("after_journal_sync", "mid_send", "after_reply")
"""Killed there, a worker has results in its journal. The other steps only cost time as well."""


@pytest.mark.parametrize("points", [IN_THE_JOURNAL, pytest.param(POINTS, marks=pytest.mark.slow)], ids=["most", "all"])
def test_killed_at_any_step_every_task_is_accepted_exactly_once(
    programs: list[Program], master: Master, tmp_path: Path, points: tuple[str, ...]
) -> None:
    witness, submitted = tmp_path / "witness", []
    for index, point in enumerate(points):
        tasks = witnesses(witness, range(100 * index, 100 * index + 12), batch=point, pinned_device_id=point)
        submitted += master.submit(*tasks)

    spooled: dict[str, list[int]] = {}

    def live(point: str) -> int:
        doomed = Doomed(point, master, tmp_path / point, point)
        programs.append(doomed)
        code = doomed.wait()
        spooled[point] = doomed.spooled()
        doomed.point = ""
        doomed.start()
        wait_for(f"the second life of {point}", lambda: "registered" in doomed.output)
        wait_for(f"the tasks of {point}", lambda: master.states(point) == {"completed": 12})
        assert doomed.stop() == 0
        return code

    with ThreadPoolExecutor(2) as pool:
        codes = dict(zip(points, pool.map(live, points)))
    database = tmp_path / "master/distribution.db"
    assert set(codes.values()) == {-signal.SIGKILL}, codes
    assert not any(history(database, witness, submitted).values())
    # What was in the journal counts: it is not run again.
    assert all(spooled[point] for point in IN_THE_JOURNAL)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ended = dict(connection.execute("SELECT id, status FROM af_task_assignment").fetchall())
    assert {ended[attempt] for attempts in spooled.values() for attempt in attempts} == {"completed"}


def test_the_history_checker_sees_what_is_wrong(programs: list[Program], master: Master, tmp_path: Path) -> None:
    witness, database = tmp_path / "witness", tmp_path / "master/distribution.db"
    start_worker(programs, master, tmp_path / "shop-1")
    submitted = master.submit(*witnesses(witness, range(3)))
    wait_for("the tasks", lambda: master.states() == {"completed": 3})
    assert not any(history(database, witness, submitted).values())
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute(
            "INSERT INTO af_task_assignment (task_id, device_id, lease_id, status, assigned_at)"
            " VALUES (?, 'shop-2', 'x', 'completed', 0)",
            submitted[:1],
        )
        connection.execute("UPDATE af_task_result SET result = '{\"n\": 7}' WHERE task_id = ?", submitted[1:2])
        connection.commit()
    witness.write_text("0 1")
    found = history(database, witness, [*submitted[:2], 99])
    assert {what: tasks for what, tasks in found.items() if tasks} == {
        "lost": [99],
        "double accepted": submitted[:1],
        "accepted without a run": submitted[2:],
        "of another task": submitted[1:2],
        "unexpected": submitted[2:],
    }


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_or_accepted_twice(
    programs: list[Program], master: Master, tmp_path: Path
) -> None:
    """Two devices, 150 lives each that end at a random point, and new tasks all the time."""
    witness, rng = tmp_path / "witness", random.Random(7)
    submitted: list[int] = []

    def live_on(name: str) -> None:
        doomed = Doomed(rng.choice(POINTS), master, tmp_path / name, name)
        programs.append(doomed)
        for _ in range(150):
            try:
                code = doomed.wait(3)
            except subprocess.TimeoutExpired:
                doomed.kill()  # nothing brought it to its point
                code = -signal.SIGKILL
            assert code in (-signal.SIGKILL, ExitCode.CONFLICT), doomed.output
            if code == ExitCode.CONFLICT:  # so many new processes look like a fight over the id: a person decides
                master.call("PUT", f"/devices/{name}/status", {"status": "active"})
            doomed.point, doomed.hits = rng.choice(POINTS), rng.randint(1, 6)
            doomed.start()
        doomed.kill()
        master.call("PUT", f"/devices/{name}/status", {"status": "active"})
        doomed.point = ""
        doomed.start()

    with ThreadPoolExecutor(2) as pool:
        lives = [pool.submit(live_on, name) for name in ("shop-1", "shop-2")]
        while not all(life.done() for life in lives):
            if master.states().get("pending", 0) < 20:
                first = len(submitted)
                submitted += master.submit(*witnesses(witness, range(first, first + 20)))
            time.sleep(0.2)
        for life in lives:
            life.result()
    wait_for("the last tasks", lambda: master.states() == {"completed": len(submitted)}, 90)
    assert not any(history(tmp_path / "master/distribution.db", witness, submitted).values())


# ---- a full device ----


def test_a_cancel_and_a_drain_reach_a_full_device_long_before_its_next_heartbeat(
    programs: list[Program], tmp_path: Path
) -> None:
    master = Master(tmp_path / "master", **{**QUICK, "heartbeat_interval": 100, "device_timeout": 300})
    programs.append(master)
    worker = start_worker(programs, master, tmp_path / "shop-1", heartbeat_interval=100)
    running, waiting = master.submit({"task_type": "obedient"}, {"task_type": "obedient"})
    wait_for("the first one to run", lambda: master.get(f"/tasks/{running}")["status"] == "running")
    clicked = time.monotonic()
    master.call("POST", f"/tasks/{running}/cancel", {})
    wait_for("the second one to run", lambda: master.get(f"/tasks/{waiting}")["status"] in ("assigned", "running"))
    print(f"cancelled and replaced in {time.monotonic() - clicked:.3f} s")
    wait_for("a full device", lambda: master.get("/devices")["devices"][0]["status"] == "busy")
    master.call("PUT", "/devices/shop-1/status", {"status": "draining"})
    wait_for("the drain", lambda: "the master says drain" in worker.output)
    master.call("PUT", "/devices/shop-1/status", {"status": "active"})
    wait_for("the end of the drain", lambda: "the master says go on" in worker.output)


# ---- a disk that is full, broken or slow ----


def device_problem(master: Master) -> Any:
    return master.get("/devices")["devices"][0]["problem"]


def test_a_device_that_cannot_write_says_so_takes_nothing_and_recovers(
    programs: list[Program], master: Master, tmp_path: Path
) -> None:
    worker = start_worker(programs, master, tmp_path / "shop-1")
    wait_for("the device", lambda: master.get("/devices")["devices"])
    _, hard = resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (0, hard))
    completed(master, master.submit_one("echo"))  # it was taken before anything was wrong, and is not dropped
    wait_for("the device to say so", lambda: device_problem(master) == "spool_unwritable")

    def left_waiting() -> int | None:
        """A task that the device did not take in the time of a few heartbeats."""
        task_id = master.submit_one("echo")
        for _ in range(3):
            wait_for_a_beat(master)
        return task_id if master.get(f"/tasks/{task_id}")["status"] == "pending" else None

    later = wait_for("the device to take nothing", left_waiting)
    resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert completed(master, later)["status"] == "completed"
    wait_for("the device to say that it is over", lambda: device_problem(master) is None)
    assert worker.stop() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_on_a_full_disk_nothing_is_dropped_and_it_goes_on_when_there_is_room(
    programs: list[Program], master: Master, tmp_path: Path, small_disk: Path
) -> None:
    start_worker(programs, master, tmp_path / "shop-1", state_folder=str(small_disk))
    wait_for("the device", lambda: master.get("/devices")["devices"])
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    witness = tmp_path / "witness"
    submitted = master.submit(*witnesses(witness, range(5)))
    wait_for("the device to say so", lambda: device_problem(master) == "spool_unwritable")
    filler.unlink()
    wait_for("the tasks", lambda: master.states() == {"completed": 5})
    wait_for("the device to say that it is over", lambda: device_problem(master) is None)
    assert not any(history(tmp_path / "master/distribution.db", witness, submitted).values())


def test_a_disk_that_stalls_costs_no_beat_and_no_task(programs: list[Program], master: Master, tmp_path: Path) -> None:
    stalls = tmp_path / "stalls"
    stalls.touch()
    worker = start_worker(programs, master, tmp_path / "shop-1", heartbeat_interval=0.3, stalled_while=stalls)
    task_id = master.submit_one("echo")
    wait_for("the sync that hangs", lambda: "the disk stalls" in worker.output)
    for _ in range(5):
        wait_for_a_beat(master)
    assert master.get(f"/tasks/{task_id}")["status"] != "completed"  # not sent before it is on the disk
    stalls.unlink()
    task = completed(master, task_id)
    assert (len(task["attempts"]), task["lost_count"]) == (1, 0)
