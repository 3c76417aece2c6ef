"""How does a program of ours start, refuse to start, and end? Real processes; every refusal is one line and a code."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from farm import ROOT, Master, Program, Worker, environment, reserved_port, wait_for

import schema
import store
from settings import ExitCode

KEY = "correct-horse-battery-staple-of-a-test"


def config(folder: Path, **settings: Any) -> Path:
    path = folder / "master.json"
    ours = {"mode": "master", "port": 0, "database": str(folder / "distribution.db"), "log_file": str(folder / "m.log")}
    path.write_text(json.dumps({**ours, **settings}))
    return path


def start(path: Path, script: str = "master.py") -> subprocess.CompletedProcess[str]:
    """A start that ends by itself."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), "--config", str(path)],
        env=environment(), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def refusal(path: Path, code: ExitCode, script: str = "master.py") -> str:
    """The one line with which it refused; log lines of what it did until then are not counted."""
    ended = start(path, script)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr and "ready" not in ended.stdout
    lines = [line for line in ended.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1, ended.stderr
    return lines[0]


# -- settings ----------------------------------------------------------------------------------------------------


def test_a_config_that_is_no_json_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"mode": "master",')
    assert str(path) in refusal(path, ExitCode.SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prot": 8000}, ("prot", "port")),
        ({"port": 70000}, ("port", "70000", "65535")),
        ({"port": "8000"}, ("port",)),
        ({"device_timeout": -1}, ("device_timeout", "-1")),
        ({"host": "0.0.0.0"}, ("0.0.0.0", "AF_API_KEY")),
        ({"load_balance_strategy": "fastest"}, ("fastest", "least_tasks")),
        ({"load_balance_strategy": "no_such_module:choose"}, ("no_such_module",)),
    ],
)
def test_a_wrong_setting_stops_the_start_and_says_what_to_write(
    tmp_path: Path, wrong: dict[str, Any], words: tuple[str, ...]
) -> None:
    line = refusal(config(tmp_path, **wrong), ExitCode.SETTINGS)
    assert all(word in line for word in words), line


def test_a_missing_config_stops_the_start(tmp_path: Path) -> None:
    assert "none.json" in refusal(tmp_path / "none.json", ExitCode.SETTINGS)


def test_a_folder_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal(config(tmp_path, database=str(tmp_path / "file" / "x.db")), ExitCode.SETTINGS)
    assert str(tmp_path / "file") in line


# -- the database ------------------------------------------------------------------------------------------------


def of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")


def of_a_newer_version(path: Path) -> None:
    store.create_database(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")


def with_zeroed_header(path: Path) -> None:
    store.create_database(path)
    with path.open("r+b") as file:
        file.write(bytes(512))


def with_a_page_of_noise(path: Path) -> None:
    store.create_database(path)
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(bytes(n * 97 % 251 for n in range(4096)))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.write_bytes(b""), ExitCode.DATABASE_BAD),
        (lambda path: path.write_bytes(b"hello " * 1000), ExitCode.DATABASE_BAD),
        (lambda path: path.mkdir(), ExitCode.DATABASE_BAD),
        (of_another_program, ExitCode.DATABASE_BAD),
        (with_zeroed_header, ExitCode.DATABASE_BAD),
        (with_a_page_of_noise, ExitCode.DATABASE_BAD),
        (of_a_newer_version, ExitCode.DATABASE_NEWER),
    ],
    ids=["empty", "text", "a folder", "another program's", "zeroed header", "noise", "newer"],
)
def test_a_database_that_is_not_fit_is_refused_and_not_touched(tmp_path: Path, make: Any, code: ExitCode) -> None:
    path = tmp_path / "distribution.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    line = refusal(config(tmp_path), code)
    assert str(path) in line
    assert before is None or path.read_bytes() == before


def test_a_database_in_use_by_another_master_is_refused_and_that_one_goes_on(
    programs: list[Program], tmp_path: Path
) -> None:
    master = Master(tmp_path)
    programs.append(master)
    line = refusal(config(tmp_path), ExitCode.DATABASE_IN_USE)
    assert f"process {master.process.pid}" in line
    assert master.submit_one() == 1


def test_a_port_in_use_is_refused_and_the_database_stays_free_and_untouched(tmp_path: Path) -> None:
    database = tmp_path / "distribution.db"
    store.create_database(database)
    before = database.read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        line = refusal(config(tmp_path, port=port), ExitCode.PORT_IN_USE)
    assert str(port) in line and "--port" in line
    assert database.read_bytes() == before
    with store.lock_database(database):  # not held by anybody
        assert not (tmp_path / "distribution.db-wal").exists()


def test_a_port_in_use_makes_no_database(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusal(config(tmp_path, port=listener.getsockname()[1]), ExitCode.PORT_IN_USE)
    assert not (tmp_path / "distribution.db").exists()


# -- start, stop, kill -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_master_in_order(programs: list[Program], tmp_path: Path, number: int) -> None:
    master = Master(tmp_path)
    programs.append(master)
    ids = master.submit(*({"task_type": "echo"} for _ in range(100)))
    assert master.states() == {"pending": len(ids)}  # so that a reading connection is open, too
    assert master.stop(number) == ExitCode.OK
    assert sorted(path.name for path in tmp_path.glob("distribution.db*")) == [
        "distribution.db",
        "distribution.db.lock",
        "distribution.db.sessions",
    ]
    store.check_database(tmp_path / "distribution.db")
    assert "Traceback" not in master.output
    master.start()
    assert master.states() == {"pending": len(ids)}


def test_a_killed_master_keeps_all_that_it_acknowledged(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path)
    programs.append(master)
    master.register("shop-1")
    acknowledged: list[int] = []
    for _ in range(3):
        acknowledged += master.submit(*({"task_type": "echo", "task_data": {"n": n}} for n in range(50)))
        [task] = master.pull("shop-1")
        assert master.report("shop-1", task, "completed", result={"ok": 1})["outcome"] == "accepted"
        master.kill()
        master.start()
    states = master.states()
    assert states.pop("completed") == 3 and states == {"pending": 147}
    assert [master.get(f"/tasks/{task_id}")["id"] for task_id in acknowledged[::25]] == acknowledged[::25]
    assert master.submit_one() == max(acknowledged) + 1
    assert master.register("shop-1")["created"] is False


def test_a_worker_keeps_trying_a_master_that_is_not_there_and_ends_cleanly(
    programs: list[Program], tmp_path: Path
) -> None:
    place = reserved_port()
    port = place.getsockname()[1]
    worker = Worker(f"http://127.0.0.1:{port}", tmp_path, reconnect_seconds=0.1)
    programs.append(worker)
    wait_for("a second attempt", lambda: worker.process.poll() is not None or len(complaints(worker)) >= 1)
    assert worker.process.poll() is None, worker.output
    master = Master(tmp_path / "master", port=port)
    programs.append(master)
    wait_for("the worker to find it", lambda: master.get("/devices")["devices"])
    master.kill()
    wait_for("the worker to miss it", lambda: len(complaints(worker)) >= 2)
    assert worker.stop() == ExitCode.OK, worker.output
    assert "Traceback" not in worker.output


def complaints(worker: Worker) -> list[str]:
    return [line for line in worker.lines if " WARNING " in line]


def test_the_log_is_private_rotates_and_holds_no_key(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path, api_key=KEY, log_max_bytes=10_000, log_backup_count=3)
    programs.append(master)
    for n in range(150):
        master.submit_one(username=f"user-{n}", task_data={"password": "of-a-user"})
    wrong = {"Authorization": "Bearer wrong-key-of-somebody"}
    assert master.api("GET", "/devices", headers=wrong).status_code == 401
    assert master.api("GET", f"/devices?api_key={KEY}").status_code == 400
    assert master.stop() == ExitCode.OK
    logs = sorted(tmp_path.glob("master.log*"))
    assert 2 <= len(logs) <= 4 and logs[0].stat().st_size <= 10_000
    assert {path.stat().st_mode & 0o777 for path in logs} == {0o600}
    texts = [path.read_text(encoding="utf-8") for path in logs] + [master.output]
    for secret in (KEY, "wrong-key-of-somebody", "of-a-user"):
        assert not [text for text in texts if secret in text], secret
    assert "submit task=150" in "".join(texts)
