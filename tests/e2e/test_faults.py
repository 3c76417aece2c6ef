"""What goes wrong on a real fleet, with real processes: killed, hung, failing, stopped in the middle."""

from __future__ import annotations

import collections
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
from farm import ROOT, Master, Program, Worker, wait_for

QUICK = {"heartbeat_interval": 0.5, "device_timeout": 3, "timeout_check_interval": 1, "retry_backoff_seconds": 0.2}
BEATS = {"heartbeat_interval": 0.5, "device_timeout": 3, "pull_wait_seconds": 2}

TASKS = """
import logging, time
from pathlib import Path
from executors.task_executor import TaskExecutor


class CustomTaskExecutor(TaskExecutor):
    def __init__(self):
        super().__init__("custom_task")

    def execute_task(self, task_data):
        # 实现自定义任务逻辑
        return {"status": "success"}


class Sleep(TaskExecutor):
    def __init__(self):
        super().__init__("sleep")

    def execute_task(self, task_data):
        print("going to sleep for", task_data["seconds"])
        time.sleep(task_data["seconds"])
        return {"slept": task_data["seconds"]}


class Gate(TaskExecutor):
    def __init__(self):
        super().__init__("gate")

    def execute_task(self, task_data):
        while not Path(task_data["file"]).exists():
            time.sleep(0.01)
        return {}


class Fail(TaskExecutor):
    def __init__(self):
        super().__init__("fail")

    def execute_task(self, task_data):
        logging.getLogger("mine").warning("about to fail")
        raise ValueError("the site said no")


class Witness(TaskExecutor):
    def __init__(self):
        super().__init__("witness")

    def execute_task(self, task_data):
        with open(task_data["file"], "a") as file:
            file.write(f"{task_data['n']}\\n")
        time.sleep(0.002)
        return {"n": task_data["n"]}
"""


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_tasks.py"
    path.write_text(TASKS, encoding="utf-8")
    return path


def start_master(programs: list[Program], folder: Path, **settings: Any) -> Master:
    master = Master(folder, **{**QUICK, **settings})
    programs.append(master)
    return master


def start_worker(programs: list[Program], master: Master, folder: Path, name: str, **settings: Any) -> Worker:
    worker = Worker(master.url, folder / name, name, **{**BEATS, **settings})
    programs.append(worker)
    return worker


def wait_for_status(master: Master, task_id: int, *statuses: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        task: dict[str, Any] = master.get(f"/tasks/{task_id}")
        return task if task["status"] in statuses else None

    found: dict[str, Any] = wait_for(f"task {task_id} to be {' or '.join(statuses)}", look)
    return found


def test_the_guides_own_executor_runs_as_printed(programs: list[Program], tmp_path: Path, tasks_file: Path) -> None:
    master = start_master(programs, tmp_path)
    start_worker(programs, master, tmp_path, "shop-1", executors=[str(tasks_file)])
    task = wait_for_status(master, master.submit({"task_type": "custom_task"})[0], "completed")
    assert task["result"] == {"status": "success"}


def test_the_tasks_of_a_killed_worker_go_to_another(programs: list[Program], tmp_path: Path, tasks_file: Path) -> None:
    master = start_master(programs, tmp_path)
    first = start_worker(programs, master, tmp_path, "shop-1", executors=[str(tasks_file)])
    task_id = master.submit_one("gate", task_data={"file": str(tmp_path / "go")})
    wait_for_status(master, task_id, "running")
    first.kill()
    start_worker(programs, master, tmp_path, "shop-2", executors=[str(tasks_file)])
    (tmp_path / "go").touch()
    task = wait_for_status(master, task_id, "completed")
    devices = [attempt["device_id"] for attempt in task["attempts"]]
    assert (devices[0], devices[-1]) == ("shop-2", "shop-1")  # shop-2 may be silent too, on a machine that stands still
    assert (task["lost_count"], task["retry_count"]) == (len(devices) - 1, 0)


def test_a_worker_that_hung_and_came_back_cannot_overwrite_the_result(
    programs: list[Program], tmp_path: Path, tasks_file: Path
) -> None:
    master = start_master(programs, tmp_path)
    first = start_worker(programs, master, tmp_path, "shop-1", executors=[str(tasks_file)])
    task_id = master.submit_one("gate", task_data={"file": str(tmp_path / "go")})
    wait_for_status(master, task_id, "running")
    os.kill(first.process.pid, signal.SIGSTOP)
    (tmp_path / "go").touch()
    start_worker(programs, master, tmp_path, "shop-2", executors=[str(tasks_file)])
    done = wait_for_status(master, task_id, "completed")
    os.kill(first.process.pid, signal.SIGCONT)

    def is_heard() -> bool:
        """Its report came too late and was kept as that, or its beat came first and told it to drop the task."""
        attempts = master.get(f"/tasks/{task_id}")["attempts"]
        late = [attempt["late_outcome"] for attempt in attempts if attempt["device_id"] == "shop-1"]
        return late == ["completed"] or f"cancel task={task_id} " in first.output

    wait_for("the first device to be heard again", is_heard)
    after = master.get(f"/tasks/{task_id}")
    assert after["assigned_device_id"] == done["assigned_device_id"] == "shop-2"
    assert after["finished_at"] == done["finished_at"]


def test_a_task_over_its_time_is_taken_back_and_retried(
    programs: list[Program], tmp_path: Path, tasks_file: Path
) -> None:
    master = start_master(programs, tmp_path)
    start_worker(programs, master, tmp_path, "shop-1", executors=[str(tasks_file)])
    hung = {"task_type": "sleep", "task_data": {"seconds": 40}, "execution_timeout_seconds": 1, "max_retry_count": 1}
    task = wait_for_status(master, master.submit(hung)[0], "failed")
    assert task["retry_count"] == 1 and len(task["attempts"]) == 2
    assert {attempt["error_type"] for attempt in task["attempts"]} == {"timeout"}


@pytest.mark.slow
def test_the_masters_sweep_is_the_backstop_for_a_device_that_beats_and_never_ends(
    programs: list[Program], tmp_path: Path
) -> None:
    master = start_master(programs, tmp_path)
    master.register("shop-1")
    task_id = master.submit({"task_type": "echo", "execution_timeout_seconds": 1, "max_retry_count": 0})[0]
    task = master.get("/tasks/pull?device_id=shop-1&boot_id=boot-1&limit=1")["tasks"][0]
    held = {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "phase": "running"}
    beats = iter(range(1, 10_000))

    def beat_and_look() -> bool:
        body = {"boot_id": "boot-1", "seq": next(beats), "holding": [held]}
        assert master.api("POST", "/devices/shop-1/heartbeat", body).status_code == 200
        status: str = master.get(f"/tasks/{task_id}")["status"]
        return status == "failed"

    wait_for("the sweep", beat_and_look, 60)
    assert master.get(f"/tasks/{task_id}")["end_reason"] == "timeout"


def test_a_failing_task_is_retried_up_to_its_limit_and_says_why(
    programs: list[Program], tmp_path: Path, tasks_file: Path
) -> None:
    master = start_master(programs, tmp_path)
    start_worker(programs, master, tmp_path, "shop-1", executors=[str(tasks_file)])
    task = wait_for_status(master, master.submit({"task_type": "fail", "max_retry_count": 2})[0], "failed")
    assert len(task["attempts"]) == 3 and task["retry_count"] == 2
    assert "the site said no" in task["error_message"]
    assert "about to fail" in task["attempts"][0]["log_tail"]


def test_what_an_executor_prints_is_kept_with_its_attempt(
    programs: list[Program], tmp_path: Path, tasks_file: Path
) -> None:
    master = start_master(programs, tmp_path)
    worker = start_worker(programs, master, tmp_path, "shop-1", executors=[str(tasks_file)])
    task_id = master.submit({"task_type": "sleep", "task_data": {"seconds": 0.01}})[0]
    task = wait_for_status(master, task_id, "completed")
    assert "going to sleep for 0.01" in task["attempts"][0]["log_tail"]
    assert "going to sleep for 0.01" in (worker.folder / "shop-1.log").read_text()


def test_a_stopped_worker_finishes_what_it_runs_and_hands_back_the_rest(
    programs: list[Program], tmp_path: Path, tasks_file: Path
) -> None:
    master = start_master(programs, tmp_path)
    worker = start_worker(programs, master, tmp_path, "shop-1", executors=[str(tasks_file)], drain_seconds=3)
    short, long = master.submit(
        {"task_type": "gate", "task_data": {"file": str(tmp_path / "go")}},
        {"task_type": "gate", "task_data": {"file": str(tmp_path / "never")}},
    )
    for task_id in (short, long):
        wait_for_status(master, task_id, "running")
    worker.process.send_signal(signal.SIGTERM)
    wait_for("the drain", lambda: "drain busy=2" in worker.output)
    (tmp_path / "go").touch()
    assert worker.wait() == 0
    assert master.get(f"/tasks/{short}")["status"] == "completed"
    handed_back = master.get(f"/tasks/{long}")
    assert handed_back["status"] == "pending"
    assert (handed_back["retry_count"], handed_back["lost_count"]) == (0, 0)
    assert master.get("/devices")["devices"][0]["status"] == "offline"


def test_nothing_is_lost_or_counted_twice_when_a_worker_and_the_master_are_killed(
    programs: list[Program], tmp_path: Path, tasks_file: Path
) -> None:
    """One master, three workers, 1,000 tasks; one worker and the master get SIGKILL in the middle."""
    total = 1000
    master = start_master(programs, tmp_path)
    workers = [
        start_worker(programs, master, tmp_path, f"shop-{n}", executors=[str(tasks_file)], concurrent_tasks=8)
        for n in range(3)
    ]
    witness = tmp_path / "witness.txt"
    acknowledged: set[int] = set()
    url, stop = master.url, threading.Event()

    def submit_all() -> None:
        """As a careful client does: what was not acknowledged is sent again with the same keys."""
        session = requests.Session()
        for first in range(0, total, 50):
            body = [
                {
                    "task_type": "witness",
                    "batch": "b",
                    "unique_key": str(n),
                    "task_data": {"n": n, "file": str(witness)},
                }
                for n in range(first, first + 50)
            ]
            while not stop.is_set():
                try:
                    reply = session.post(f"{url}/api/distribution/tasks", json=body, timeout=60)
                    if reply.ok:
                        acknowledged.update(task["id"] for task in reply.json()["tasks"])
                        break
                except requests.RequestException:
                    pass
                stop.wait(0.1)

    submitter = threading.Thread(target=submit_all)
    submitter.start()
    try:
        wait_for("the first hundred", lambda: master.states("b").get("completed", 0) > 100)
        workers[0].kill()
        wait_for("a few hundred more", lambda: master.states("b").get("completed", 0) > 400)
        master.kill()
        second = start_master(programs, tmp_path, port=master.port)
        wait_for("all of them", lambda: second.states("b") == {"completed": total}, 90)
    finally:
        stop.set()
        submitter.join(60)
    ids = _all_ids(second)
    assert acknowledged <= ids and len(ids) == total
    runs = collections.Counter(int(line) for line in witness.read_text().split())
    assert set(runs) == set(range(total))
    accepted = _accepted_reports(tmp_path / "distribution.db")
    assert set(accepted.values()) == {1} and set(accepted) == ids


def _all_ids(master: Master) -> set[int]:
    ids: set[int] = set()
    cursor = ""
    while True:
        page = master.get(f"/tasks?batch=b&limit=200{cursor}")
        ids |= {task["id"] for task in page["tasks"]}
        if page["next_cursor"] is None:
            return ids
        cursor = f"&cursor={page['next_cursor']}"


def _accepted_reports(database: Path) -> dict[int, int]:
    """task -> how many of its attempts count as completed."""
    import sqlite3

    connection = sqlite3.connect(database)
    rows = connection.execute(
        "SELECT task_id, COUNT(*) FROM af_task_assignment WHERE status = 'completed' GROUP BY task_id"
    ).fetchall()
    connection.close()
    return dict(rows)


def test_an_edge_machine_needs_four_things_and_one_package(programs: list[Program], tmp_path: Path) -> None:
    """worker.py, executors/, settings.py and a config file in an empty folder, with requests alone, crawl pages."""
    edge, packages = tmp_path / "edge", tmp_path / "packages"
    (edge / "config").mkdir(parents=True)
    packages.mkdir()
    for name in ("worker.py", "settings.py"):
        shutil.copy(ROOT / name, edge)
    shutil.copytree(ROOT / "executors", edge / "executors", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "config" / "distribution_worker.json", edge / "config")
    site = Path(requests.__file__).parent.parent
    for name in ("requests", "urllib3", "idna", "certifi", "charset_normalizer"):
        shutil.copytree(site / name, packages / name)
    # -S leaves the site-packages of this Python out: only the standard library and the one package are there.
    python = [sys.executable, "-S"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(packages), "HOME": str(tmp_path)}
    environment["AF_CRAWL_ALLOW_NETWORKS"] = "127.0.0.0/8"
    probe = subprocess.run([*python, "-c", "import peewee"], env=environment, capture_output=True, timeout=60)
    assert b"No module named 'peewee'" in probe.stderr

    master = start_master(programs, tmp_path / "master")
    web = tmp_path / "web"
    web.mkdir()
    (web / "index.html").write_text("<title>Home</title><a href='a.html'>a</a> <a href='gone.html'>gone</a>")
    (web / "a.html").write_text("<title>Page A</title>")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(web)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    worker = subprocess.Popen(
        [*python, "worker.py", "--device-id", "edge-1", "--master-url", master.url],
        cwd=edge,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().split(" port ")[1].split()[0]
        follow = {
            "task_type": "crawl",
            "batch": "edge",
            "task_data": {"url": f"http://127.0.0.1:{port}/", "follow": {}},
        }
        master.submit(follow)
        wait_for("three pages", lambda: master.states("edge") == {"completed": 3})
        lines = master.api("GET", "/tasks/export?batch=edge&include=result").text.splitlines()
        assert '"title":"Page A"' in "".join(lines) and '"status":404' in "".join(lines)
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
        server.kill()
        server.wait(60)
