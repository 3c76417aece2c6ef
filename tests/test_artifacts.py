"""Do a task's files get to the master whole, once, and away again? A real master, a real worker, and real kills."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from farm import ROOT, Master, Program, Worker, environment, wait_for
from world import World

import artifacts
import db
import judging
import retention
from access import Refused
from artifacts import STRAY_AFTER_SECONDS, Artifacts, Busy, ChecksumWrong, NoRoom, folder_of
from dispatcher import Delivery
from executors import task_executor
from executors.device.artifacts import ArtifactFiles
from executors.task_executor import TaskExecutor
from reads import Reads
from settings import ExitCode

OCTETS = "application/octet-stream"
CONTENT = b"date,installs\n2026-11-25,12\n" * 100
WRITERS = '''
import hashlib, os, time
from pathlib import Path
from executors.task_executor import DoNotRetry, TaskExecutor


class WritingExecutor(TaskExecutor):
    """Writes files of so many bytes each; then ends as it is told."""

    def __init__(self):
        super().__init__("writing")

    def execute_task(self, task_data):
        digests = {}
        for name, length in task_data["files"].items():
            content = os.urandom(length)
            self.context.artifact(name).write_bytes(content)
            digests[name] = hashlib.sha256(content).hexdigest()
        if task_data.get("fails"):
            raise DoNotRetry("as it was told")
        return {"sha256": digests}
'''


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def upload(master: Master, task: dict[str, Any], content: Any = CONTENT, **other: Any) -> requests.Response:
    """What a worker sends, or something a little different."""
    headers = {"Content-Type": OCTETS, **other.pop("headers", {})}
    query = {"device_id": "shop-1", "assignment_id": task["assignment_id"], "lease_id": task["lease_id"],
             "name": "report.csv", "sha256": sha256(content) if isinstance(content, bytes) else "0" * 64, **other}  # fmt: skip
    return master.api("PUT", "/tasks/artifacts", params=query, data=content, headers=headers)


def problem(response: requests.Response, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    found: dict[str, Any] = response.json()
    assert (response.status_code, found["code"], found.get("field")) == (status, code, field), found
    return found


def entry(name: str = "report.csv", content: bytes = CONTENT) -> dict[str, Any]:
    return {"name": name, "bytes": len(content), "sha256": sha256(content)}


def files_of(master: Master) -> list[Path]:
    """Everything that lies in the folder beside the database."""
    return [path for path in folder_of(Path(master.settings["database"])).rglob("*") if path.is_file()]


@pytest.fixture
def task(master: Master) -> dict[str, Any]:
    """A task that shop-1 holds."""
    return pulled(master)


def pulled(master: Master) -> dict[str, Any]:
    master.register("shop-1", task_types=["echo"], max_concurrent_tasks=1000)
    task_id = master.submit_one(priority=10)
    query = {"device_id": "shop-1", "boot_id": "boot-1", "limit": 1, "wait": 5}
    # The reply to a first pull may be only that another task was cancelled.
    [task] = wait_for("the task", lambda: master.call("GET", "/tasks/pull", params=query)["tasks"])
    assert task["id"] == task_id
    found: dict[str, Any] = task
    return found


# -- the wire ----------------------------------------------------------------------------------------------------


def test_a_file_goes_up_is_listed_and_comes_down_as_it_was(master: Master, task: dict[str, Any]) -> None:
    assert upload(master, task).json() == {"outcome": "accepted"}
    assert master.report("shop-1", task, "completed", result={}, artifacts=[entry()])["outcome"] == "accepted"
    [listed] = master.get(f"/tasks/{task['id']}")["artifacts"]
    assert listed.pop("created_at") and listed.pop("artifact_id")
    assert listed == {"assignment_id": task["assignment_id"], **entry()}
    [file] = [path for path in files_of(master) if path.name.startswith(f"{task['id']}.")]
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_download_is_an_attachment_that_no_browser_runs(master: Master, task: dict[str, Any]) -> None:
    upload(master, task, b"<script>alert(1)</script>", name="page.html")
    [listed] = master.get(f"/tasks/{task['id']}")["artifacts"]
    path = f"/tasks/{task['id']}/artifacts/{listed['artifact_id']}"
    response = master.api("GET", path)
    assert response.content == b"<script>alert(1)</script>"
    headers = response.headers
    assert headers["Content-Disposition"] == 'attachment; filename="page.html"'
    assert (headers["Content-Type"], headers["X-Content-Type-Options"]) == (OCTETS, "nosniff")
    assert (headers["Content-Security-Policy"], headers["ETag"]) == ("sandbox", f'"{listed["sha256"]}"')
    assert headers["Content-Length"] == str(listed["bytes"])
    assert master.api("GET", path, headers={"If-None-Match": headers["ETag"]}).status_code == 304
    problem(master.api("GET", f"/tasks/{task['id']}/artifacts/999999"), 404, "unknown_artifact", "artifact_id")
    problem(master.api("GET", f"/tasks/{task['id'] + 9}/artifacts/{listed['artifact_id']}"), 404, "unknown_artifact",
            "artifact_id")  # fmt: skip


def test_a_file_that_is_lost_on_the_master_is_said_to_be_lost(master: Master, task: dict[str, Any]) -> None:
    upload(master, task)
    [listed] = master.get(f"/tasks/{task['id']}")["artifacts"]
    [file] = [path for path in files_of(master) if path.name.startswith(f"{task['id']}.")]
    path = f"/tasks/{task['id']}/artifacts/{listed['artifact_id']}"
    file.write_bytes(CONTENT[:-1])
    problem(master.api("GET", path), 404, "artifact_lost", "artifact_id")
    file.unlink()
    problem(master.api("GET", path), 404, "artifact_lost", "artifact_id")


def test_the_same_again_is_a_duplicate_and_another_of_that_name_is_refused(master: Master, task: Any) -> None:
    assert [upload(master, task).json()["outcome"] for _ in range(3)] == ["accepted", "duplicate", "duplicate"]
    problem(upload(master, task, b"other"), 409, "artifact_differs", "name")
    master.report("shop-1", task, "completed", artifacts=[entry()])
    assert upload(master, task).json()["outcome"] == "duplicate"
    assert [found["sha256"] for found in master.get(f"/tasks/{task['id']}")["artifacts"]] == [sha256(CONTENT)]


def test_a_completion_waits_for_its_files_and_changes_nothing_before(master: Master, task: dict[str, Any]) -> None:
    files = [entry("a.csv", b"a"), entry("b.csv", b"b")]
    upload(master, task, b"a", name="a.csv")
    new = [{"task_type": "nobody"}]
    answer = master.report("shop-1", task, "completed", result={"rows": 1}, artifacts=files, new_tasks=new)
    assert answer == {"assignment_id": task["assignment_id"], "outcome": "artifacts_missing", "missing": ["b.csv"]}
    found = master.get(f"/tasks/{task['id']}")
    assert (found["status"], found["result"], found["children_count"]) == ("assigned", None, 0)
    upload(master, task, b"b", name="b.csv")
    assert master.report("shop-1", task, "completed", artifacts=files)["outcome"] == "accepted"
    assert master.report("shop-1", task, "completed", artifacts=files)["outcome"] == "duplicate"


def test_a_file_with_another_checksum_or_length_does_not_count(master: Master, task: dict[str, Any]) -> None:
    before = files_of(master)
    problem(upload(master, task, sha256="ab" * 32), 422, "checksum_wrong")
    assert files_of(master) == before
    upload(master, task)
    wrong = {**entry(), "bytes": 1}
    assert master.report("shop-1", task, "completed", artifacts=[wrong])["outcome"] == "artifacts_missing"


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "../x", "a/b", "a\\b", "a\0b", "x" * 101, "naïve", "a b", "a\n", "con:"]
)
def test_a_name_that_is_more_than_a_name_is_refused(master: Master, task: dict[str, Any], name: str) -> None:
    before = files_of(master)
    problem(upload(master, task, name=name), 422, "invalid_field" if name else "missing_field", "name")
    answer = master.report("shop-1", task, "completed", artifacts=[{**entry(), "name": name}])
    assert answer["outcome"] == "invalid" and files_of(master) == before


def test_a_file_is_judged_as_its_report_would_be(master: Master) -> None:
    task = pulled(master)
    problem(upload(master, task, lease_id="wrong"), 409, "stale", "lease_id")
    problem(upload(master, task, device_id="shop-2"), 410, "gone", "lease_id")
    problem(upload(master, task, assignment_id=10**9), 410, "gone", "lease_id")
    master.call("POST", f"/tasks/{task['id']}/cancel", {})
    problem(upload(master, task), 410, "gone", "lease_id")
    done = pulled(master)
    master.report("shop-1", done, "completed")
    problem(upload(master, done), 409, "stale", "lease_id")
    again = pulled(master)
    master.report("shop-1", again, "released")
    newer = master.pull("shop-1")
    assert newer[0]["id"] == again["id"]
    problem(upload(master, again), 409, "stale", "lease_id")
    assert upload(master, newer[0]).json()["outcome"] == "accepted"


def test_the_files_of_an_attempt_that_failed_stay_under_it(master: Master) -> None:
    task = pulled(master)
    upload(master, task)
    master.report("shop-1", task, "failed", retry=False)
    [listed] = master.get(f"/tasks/{task['id']}")["artifacts"]
    assert listed["assignment_id"] == task["assignment_id"]


def test_an_attempt_has_a_hundred_files_and_no_more(master: Master, task: dict[str, Any]) -> None:
    for number in range(judging.ARTIFACTS_LIMIT):
        assert upload(master, task, b"x", name=f"{number}.txt").status_code == 200
    problem(upload(master, task, b"x", name="one-more.txt"), 422, "too_many_artifacts", "name")
    assert upload(master, task, b"x", name="0.txt").json()["outcome"] == "duplicate"


def test_a_body_that_is_no_file_of_known_length_is_refused(master: Master, task: dict[str, Any]) -> None:
    problem(upload(master, task, headers={"Content-Type": "application/json"}), 415, "not_octets")
    problem(upload(master, task, iter([b"in", b"chunks"]), sha256=sha256(b"inchunks")), 411, "length_required")
    assert upload(master, task, b"").json()["outcome"] == "accepted"  # of length 0, which was said


# -- limits, keys and cut connections ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master with a key and small limits."""
    master = Master(tmp_path_factory.mktemp("locked"), api_key="a-key-for-this-test-only", max_artifact_bytes=1_000_000)
    yield master
    master.kill()


def test_too_large_a_file_is_refused_before_it_is_sent(locked: Master) -> None:
    task = pulled(locked)
    reply = head_only(locked, task, 1_000_001, f"Authorization: Bearer {locked.api_key}")
    assert reply.startswith(b"HTTP/1.1 413 ") and b'"too_large"' in reply
    assert upload(locked, task, b"x" * 1_000_000).status_code == 200


def test_without_the_key_nothing_of_the_body_is_read(locked: Master) -> None:
    task = pulled(locked)
    reply = head_only(locked, task, 1000, "X-Nothing: 1")
    assert reply.startswith(b"HTTP/1.1 401 ") and b"connection: close" in reply.lower()
    url = f"{locked.url}/api/distribution/tasks/{task['id']}/artifacts/1"
    assert locked.session.get(url).status_code == 401


def head_only(master: Master, task: dict[str, Any], length: int, header: str) -> bytes:
    """The reply to a request whose body never comes: it was given without looking at the body."""
    query = (
        f"device_id=shop-1&assignment_id={task['assignment_id']}&lease_id={task['lease_id']}&name=x&sha256={'0' * 64}"
    )
    with socket.create_connection(("127.0.0.1", master.port), timeout=60) as connection:
        connection.sendall(
            f"PUT /api/distribution/tasks/artifacts?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {OCTETS}\r\n"
            f"Content-Length: {length}\r\n{header}\r\n\r\n".encode()
        )
        reply = b""
        while part := connection.recv(65536):
            reply += part
    return reply


def begun(master: Master, task: dict[str, Any], content: bytes, announced: int, key: str = "") -> socket.socket:
    """An upload that has sent its first bytes; the master has them on its disk."""
    query = (
        f"device_id=shop-1&assignment_id={task['assignment_id']}&lease_id={task['lease_id']}&name=x&sha256={'0' * 64}"
    )
    connection = socket.create_connection(("127.0.0.1", master.port), timeout=60)
    connection.sendall(
        f"PUT /api/distribution/tasks/artifacts?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {OCTETS}\r\n"
        f"Content-Length: {announced}\r\nAuthorization: Bearer {key or master.api_key}\r\n\r\n".encode()
        + content
    )
    incoming = folder_of(Path(master.settings["database"])) / "incoming"
    wait_for("the first bytes", lambda: incoming.is_dir() and any(path.stat().st_size for path in incoming.iterdir()))
    return connection


def test_a_connection_that_ends_too_early_leaves_nothing(locked: Master) -> None:
    task = pulled(locked)
    before = set(files_of(locked))
    with begun(locked, task, b"x" * 300_000, 400_000):
        pass
    wait_for("the half file to go", lambda: set(files_of(locked)) == before)
    assert upload(locked, task, name="x").status_code == 200


def test_an_upload_of_a_revoked_device_ends_with_its_next_piece(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path, api_key="a-key-for-this-test-only")
    programs.append(master)
    task = pulled(master)
    token = master.register("shop-1", wants_token=True)["token"]
    with begun(master, task, b"x" * 300_000, 100_000_000, token) as sending:
        master.call("POST", "/devices/shop-1/revoke", {})
        sending.sendall(b"x" * 300_000)
        reply = sending.recv(65536)
    assert reply.startswith(b"HTTP/1.1 401 ") and b'"key_revoked"' in reply, reply
    assert files_of(master) == []


def test_one_device_has_a_quarter_of_the_places_and_the_others_have_the_rest() -> None:
    places, quarter = artifacts.Places(), artifacts.MOVING_AT_ONCE // 4
    large = 512 * 1024 * 1024
    taken = [places.take(large, "shop-1") for _ in range(quarter)]
    with pytest.raises(Busy, match="of this device"):
        places.take(1, "shop-1")
    taken += [places.take(1, f"shop-{number}") for number in range(2, 2 + 3 * quarter)]
    with pytest.raises(Busy, match="32 files are coming in"):
        places.take(1, "shop-99")
    for upload in taken:
        places.give_back(upload)
    places.give_back(places.take(1, "shop-1"))


def test_one_key_has_a_quarter_of_the_downloads(shelf: Shelf) -> None:
    shelf.world.submit()
    assert shelf.send(shelf.world.take()) == "accepted"
    [row] = shelf.world.rows("SELECT * FROM af_artifact")

    def begin(count: int, key_id: int | None) -> int:
        before = len(begun)
        with contextlib.suppress(Busy):
            begun.extend(shelf.artifacts.open(row["task_id"], dict(row), key_id) for _ in range(count))
        return len(begun) - before

    begun: list[Any] = []
    quarter = artifacts.MOVING_AT_ONCE // 4
    for _ in range(2):
        assert [begin(99, key_id) for key_id in (7, None, 0, 8)] == [quarter, 3 * quarter, 0, 0]
        for parts in begun:
            parts.close()
        begun.clear()


def test_a_large_upload_may_take_its_time_and_each_piece_of_it_has_little(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def received(*seconds: float) -> int:
        upload, count = artifacts.Upload(512 * 1024 * 1024, "shop-1"), 0

        def come() -> Iterator[bytes]:
            for wait in seconds:
                now[0] += wait
                yield b"x"

        with contextlib.suppress(Busy):
            for _ in artifacts.in_time(come(), upload):
                count += 1
        return count

    assert received(*[75.0] * 400) == 400
    assert received(75.0, 75.0, 77.0, 1.0) == 2, "nothing came for over a minute"
    assert received(*[75.0] * 1000) == (60 + 512 * 64) // 75, "and it does not go on like that for ever"


def test_uploads_that_stall_keep_no_place_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "MOVING_AT_ONCE", 2)
    later = [0.0]
    monkeypatch.setattr(
        artifacts, "time", SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + later[0])
    )
    shelf, resume = Shelf(world), threading.Event()
    world.submit()
    task = world.take()
    ends: list[Exception] = []
    here = threading.Semaphore(0)

    def stalls() -> Iterator[bytes]:
        yield CONTENT[:3]
        here.release()
        assert resume.wait(60)
        yield CONTENT[3:]

    def stall(name: str) -> None:
        with pytest.raises(Busy) as caught:
            shelf.receive(task, db.Artifact(name, len(CONTENT), sha256(CONTENT)), stalls())
        ends.append(caught.value)

    def start(*names: str) -> list[threading.Thread]:
        threads = [threading.Thread(target=stall, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
            assert here.acquire(timeout=60)
        return threads

    threads = start("a", "b")
    with pytest.raises(Busy, match="coming in already"):
        shelf.send(task)
    later[0] += 1000
    assert shelf.send(task) == "accepted"
    threads += start("c", "d")
    later[0] += 1000
    with pytest.raises(Busy):  # as many overdue ones, and no thread more
        shelf.send(task, "e")
    resume.set()
    for thread in threads:
        thread.join(60)
    assert [str(end) for end in ends if "send it again" in str(end)] == [str(end) for end in ends] and len(ends) == 4
    assert len(shelf.files()) == 1 and shelf.rows() == 1, "of those that came too late nothing is left"
    assert shelf.send(task, "e") == "accepted"
    shelf.reads.close()


@pytest.mark.slow
def test_a_silent_connection_gives_its_place_up_on_a_real_master(programs: list[Program], tmp_path: Path) -> None:
    (tmp_path / "impatient.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport artifacts, master\n"
        "artifacts.UPLOAD_SECONDS, artifacts.MOVING_AT_ONCE = 1.0, 1\nsys.exit(master.main())\n"
    )
    master = Impatient(tmp_path)
    programs.append(master)
    task = pulled(master)
    with begun(master, task, b"x" * 300_000, 400_000):
        problem(upload(master, task), 503, "busy")
        wait_for("the place", lambda: upload(master, task).status_code == 200)


class Impatient(Master):
    def start(self) -> None:
        self._command[1] = str(self.folder / "impatient.py")
        super().start()


def test_a_master_killed_in_the_middle_keeps_nothing_half(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path)
    programs.append(master)
    task = pulled(master)
    with begun(master, task, b"x" * 300_000, 400_000):
        master.kill()
    assert len(files_of(master)) == 1  # which no row names, and which the next start removes
    master.start()
    assert files_of(master) == [] and master.get(f"/tasks/{task['id']}")["artifacts"] == []
    assert upload(master, task, b"x" * 400_000, name="x").json()["outcome"] == "accepted"
    master.kill()
    master.start()
    [listed] = master.get(f"/tasks/{task['id']}")["artifacts"]
    assert master.api("GET", f"/tasks/{task['id']}/artifacts/{listed['artifact_id']}").content == b"x" * 400_000


def test_a_full_disk_is_told_and_leaves_nothing(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path)
    programs.append(master)
    task = pulled(master)
    resource.prlimit(master.process.pid, resource.RLIMIT_FSIZE, (30_000_000, resource.RLIM_INFINITY))
    response = upload(master, task, b"x" * 30_000_001)
    problem(response, 507, "storage_full")
    assert int(response.headers["Retry-After"]) > 0 and files_of(master) == []
    assert master.report("shop-1", task, "completed", artifacts=[entry()])["outcome"] == "artifacts_missing"
    resource.prlimit(master.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert upload(master, task, b"x" * 30_000_001).status_code == 200


def memory_bytes(program: Program) -> int:
    return int(Path(f"/proc/{program.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(program: Program) -> list[str]:
    found = []
    for path in Path(f"/proc/{program.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            found.append(str(path.readlink()))
    return found


def test_a_large_file_is_never_in_memory_and_an_aborted_download_is_closed(
    programs: list[Program], tmp_path: Path
) -> None:
    master = Master(tmp_path)
    programs.append(master)
    task = pulled(master)
    content = os.urandom(1_000_000) * 100
    upload(master, task, b"warm", name="warm")
    before = memory_bytes(master)
    assert upload(master, task, content).status_code == 200
    listed = master.get(f"/tasks/{task['id']}")["artifacts"][-1]
    path = f"/tasks/{task['id']}/artifacts/{listed['artifact_id']}"
    response = master.api("GET", path, stream=True)
    assert len(response.raw.read(1_000_000)) == 1_000_000
    assert any("report.csv" in name for name in open_files(master))
    response.close()
    wait_for("the file to be closed", lambda: not any("report.csv" in name for name in open_files(master)))
    assert sha256(master.api("GET", path).content) == listed["sha256"]
    assert memory_bytes(master) - before < 30_000_000


# -- a worker ----------------------------------------------------------------------------------------------------


@pytest.fixture
def start_worker(programs: list[Program], master: Master, tmp_path: Path) -> Callable[..., Worker]:
    """Starts a worker with the executor above; each test's has a name of its own."""
    (tmp_path / "writers.py").write_text(WRITERS)

    def start(url: str = "", **settings: Any) -> Worker:
        worker = Worker(url or master.url, tmp_path / "worker", f"writer-{tag_of(tmp_path)}"[:60],
                        executors=[str(tmp_path / "writers.py")], tags=[tag_of(tmp_path)], **settings)  # fmt: skip
        programs.append(worker)
        return worker

    return start


def tag_of(folder: Path) -> str:
    """Keeps this test's tasks from the workers of others."""
    return folder.name[-60:]


def waiting_files(worker: Worker) -> list[Path]:
    folder = Path(worker.settings["state_folder"]) / worker.device_id / "artifacts"
    return [path for path in folder.rglob("*") if path.is_file()]


def ended(master: Master, task_id: int) -> dict[str, Any]:
    found: dict[str, Any] = wait_for("the task's end", lambda: is_final(master, task_id))
    return found


def is_final(master: Master, task_id: int) -> Any:
    task = master.get(f"/tasks/{task_id}")
    return task if task["status"] in ("completed", "failed") else None


def test_what_an_executor_writes_arrives_before_its_result_counts(
    master: Master, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = start_worker()
    sizes = {"report.csv.gz": 5_000_000, "log.txt": 10, "empty": 0}
    task_id = master.submit_one("writing", task_data={"files": sizes}, required_tags=[tag_of(tmp_path)])
    task = ended(master, task_id)
    assert {file["name"]: file["bytes"] for file in task["artifacts"]} == sizes, task
    assert {file["name"]: file["sha256"] for file in task["artifacts"]} == task["result"]["sha256"]
    for file in task["artifacts"]:
        response = master.api("GET", f"/tasks/{task_id}/artifacts/{file['artifact_id']}")
        assert sha256(response.content) == file["sha256"]
    wait_for("the device to delete them", lambda: not waiting_files(worker))
    assert worker.stop() == 0


def test_a_task_that_fails_sends_no_file_and_keeps_none(
    master: Master, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = start_worker()
    data = {"files": {"half": 1000}, "fails": True}
    task = ended(master, master.submit_one("writing", task_data=data, required_tags=[tag_of(tmp_path)]))
    assert (task["status"], task["artifacts"]) == ("failed", [])
    wait_for("the device to delete it", lambda: not waiting_files(worker))


def test_a_file_that_the_master_never_takes_fails_its_task_with_a_sentence(
    locked: Master, start_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = start_worker(locked.url, api_key=locked.api_key)
    data = {"files": {"large": 1_000_001}}
    task = ended(locked, locked.submit_one("writing", task_data=data, required_tags=[tag_of(tmp_path)]))
    assert task["status"] == "failed" and task["retry_count"] == 0
    assert "large has 1000001 bytes, the master takes 1000000" in task["error_message"]
    wait_for("the device to delete it", lambda: not waiting_files(worker))
    locked.settings["max_artifact_bytes"] = 500_000  # which the worker does not know, since it registered before
    locked.stop()
    locked.start()
    data = {"files": {"large": 700_000}}
    task = ended(locked, locked.submit_one("writing", task_data=data, required_tags=[tag_of(tmp_path)]))
    locked.settings["max_artifact_bytes"] = 1_000_000
    locked.stop()
    locked.start()
    assert task["status"] == "failed" and "at most 500000 are accepted" in task["error_message"]
    wait_for("the device to delete it", lambda: not waiting_files(worker))


class Ends:
    """What an executor may leave in its folder that is no file."""

    @staticmethod
    def directory(path: Path) -> None:
        path.mkdir()
        (path / "inside").write_bytes(CONTENT)

    @staticmethod
    def pipe(path: Path) -> None:
        os.mkfifo(path)

    @staticmethod
    def link(path: Path) -> None:
        path.symlink_to("/etc/passwd")

    @staticmethod
    def dangling(path: Path) -> None:
        path.symlink_to("nowhere")

    @staticmethod
    def nothing(path: Path) -> None:
        (path.parent / "beside").write_bytes(CONTENT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("has_good", [False, True])
@pytest.mark.parametrize("what", ["directory", "pipe", "link", "dangling", "nothing"])
def test_what_is_no_file_is_dropped_and_said_and_its_folder_goes(
    tmp_path: Path, what: str, has_good: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Leaving(TaskExecutor):
        def execute_task(self, task_data: dict[str, Any]) -> dict[str, Any]:
            getattr(Ends, what)(self.context.artifact("asked"))
            if has_good:
                self.context.artifact("good").write_bytes(CONTENT)
            return {}

    files = ArtifactFiles(tmp_path, 10**9, [])
    outcome = task_executor.run(Leaving("leaving"), {"id": 1, "task_data": {}}, artifact_folder=files.folder_of(7))
    outcome = files.seal(7, outcome)
    assert outcome.outcome == "completed" and [file["name"] for file in outcome.artifacts] == ["good"] * has_good
    said = "beside" if what == "nothing" else "asked"
    assert said in outcome.log_tail and said in caplog.text
    assert [path.name for path in files.folder_of(7).parent.rglob("*")] == ["7", "good"] * has_good
    files.drop_sent(7)
    assert not list(files.folder_of(7).parent.iterdir())


# -- a worker that dies, and one whose files do not get through --------------------------------------------------

DIES = {
    "before the journal": "Reporter.put = die",
    "before the upload": "MasterClient.put = die",
    "in the middle of the upload": """
class Half:
    mode = "rb"
    def __init__(self, file):
        self.file, self.fileno, self.tell, self.left = file, file.fileno, file.tell, 100
    def __iter__(self):
        return iter(self.file)
    def read(self, count):
        self.left -= 1
        return self.file.read(count) if self.left else die()
put = MasterClient.put
MasterClient.put = lambda self, path, query, content, seconds: put(self, path, query, Half(content), seconds)
""",
    "after the upload": "put = MasterClient.put\nMasterClient.put = lambda *all: (put(*all), die())",
    "before the files are deleted": "ArtifactFiles.drop_sent = die",
}
HELD_UP = """
put = MasterClient.put
def wait_and_put(*all):
    while not os.path.exists(GATE):
        time.sleep(0.01)
    return put(*all)
MasterClient.put = wait_and_put
"""


class Patched(Worker):
    """A worker with a fault of this test's choice."""

    def __init__(self, master: Master, folder: Path, patch: str, **settings: Any) -> None:
        self.patch = patch
        (folder / "writers.py").write_text(WRITERS)
        super().__init__(master.url, folder, tag_of(folder), executors=[str(folder / "writers.py")],
                         tags=[tag_of(folder)], **settings)  # fmt: skip

    def start(self) -> None:
        script = self.folder / "patched_worker.py"
        lines = ["import os, sys, time", f"sys.path.insert(0, {str(ROOT)!r})", f"GATE = {str(self.gate)!r}", "import worker",
                 "from executors.device.artifacts import ArtifactFiles", "from executors.device.link import MasterClient",
                 "from executors.device.reports import Reporter", "die = lambda *_: os.kill(os.getpid(), 9)", self.patch,
                 "os._exit(worker.main())"]  # fmt: skip
        script.write_text("\n".join(lines))
        self._command[1] = str(script if self.patch else ROOT / "worker.py")
        super().start()

    @property
    def gate(self) -> Path:
        return self.folder / "gate"


@pytest.mark.parametrize("moment", DIES)
def test_a_worker_killed_at_any_moment_leaves_one_file_and_one_completion(
    programs: list[Program], master: Master, tmp_path: Path, moment: str
) -> None:
    worker = Patched(master, tmp_path, DIES[moment])
    programs.append(worker)
    data = {"files": {"report.csv": 3_000_000}}
    task_id = master.submit_one("writing", task_data=data, required_tags=[tag_of(tmp_path)])
    assert worker.wait() == -signal.SIGKILL
    assert waiting_files(worker)
    before = master.get(f"/tasks/{task_id}")
    is_accepted = moment == "before the files are deleted"
    assert (before["status"] == "completed") == is_accepted
    worker.patch = ""
    worker.start()
    task = ended(master, task_id)
    assert task["status"] == "completed" and task["attempt_count"] == (2 if moment == "before the journal" else 1)
    assert [attempt["status"] for attempt in task["attempts"]].count("completed") == 1
    [file] = task["artifacts"]
    assert (file["assignment_id"], file["bytes"]) == (task["assignment_id"], 3_000_000)
    assert file["sha256"] == task["result"]["sha256"]["report.csv"]
    wait_for("the device to delete it", lambda: not waiting_files(worker))
    assert worker.stop() == 0
    assert len([path for path in files_of(master) if path.name.startswith(f"{task_id}.")]) == 1


def test_files_on_their_way_hold_no_other_report_up_but_new_tasks_once_they_are_too_many(
    programs: list[Program], master: Master, tmp_path: Path
) -> None:
    worker = Patched(master, tmp_path, HELD_UP, artifact_max_bytes=100_000, concurrent_tasks=2)
    programs.append(worker)
    tags = [tag_of(tmp_path)]
    held = master.submit_one("writing", task_data={"files": {"a": 60_000}}, required_tags=tags)
    wait_for("the first file", lambda: waiting_files(worker))
    assert ended(master, master.submit_one("echo", required_tags=tags))["status"] == "completed"
    assert master.get(f"/tasks/{held}")["status"] in ("assigned", "running")
    second = master.submit_one("writing", task_data={"files": {"a": 60_000}}, required_tags=tags)
    wait_for("the device to say so", lambda: device(master, worker.device_id)["problem"] == "artifacts_full")
    # A pull that was open already may bring as many as there are slots; the others have to wait.
    more = master.submit(*({"task_type": "echo", "required_tags": tags} for _ in range(3)))
    worker.gate.touch()
    tasks = [ended(master, task_id) for task_id in (held, second, *more)]
    assert {task["status"] for task in tasks} == {"completed"}
    assert min(task["finished_at"] for task in tasks[:2]) <= tasks[-1]["attempts"][0]["assigned_at"]
    wait_for("the device to be well", lambda: device(master, worker.device_id)["problem"] is None)
    assert worker.stop() == 0
    assert worker.output.count("artifact sent") == 2, "a report that waits for its files is not sent meanwhile"


def device(master: Master, device_id: str) -> dict[str, Any]:
    found: dict[str, Any]
    [found] = [one for one in master.get("/devices")["devices"] if one["device_id"] == device_id]
    return found


def test_a_cancelled_task_sends_no_file_and_its_files_go(
    programs: list[Program], master: Master, tmp_path: Path
) -> None:
    worker = Patched(master, tmp_path, HELD_UP)
    programs.append(worker)
    data = {"files": {"a": 1000}}
    task_id = master.submit_one("writing", task_data=data, required_tags=[tag_of(tmp_path)])
    wait_for("the file", lambda: waiting_files(worker))
    wait_for("the report", lambda: list((waiting_files(worker)[0].parents[2] / "spool").glob("*.spool")))
    master.call("POST", f"/tasks/{task_id}/cancel", {})
    worker.gate.touch()
    wait_for("the device to delete it", lambda: not waiting_files(worker))
    task = master.get(f"/tasks/{task_id}")
    assert (task["status"], task["artifacts"]) == ("cancelled", [])


def test_a_master_that_dies_while_a_file_comes_in_gets_it_again(programs: list[Program], tmp_path: Path) -> None:
    master = Master(tmp_path / "master")
    programs.append(master)
    slow = DIES["in the middle of the upload"].replace("self.left -= 1", "time.sleep(0.01)")
    worker = Patched(master, tmp_path, slow)
    programs.append(worker)
    data = {"files": {"large": 2_000_000}}
    task_id = master.submit_one("writing", task_data=data, required_tags=[tag_of(tmp_path)])
    wait_for("its first bytes", lambda: any(path.stat().st_size for path in files_of(master)))
    master.kill()
    master.start()
    task = ended(master, task_id)
    assert task["status"] == "completed" and task["attempt_count"] == 1
    assert [file["sha256"] for file in task["artifacts"]] == [task["result"]["sha256"]["large"]]
    assert len(files_of(master)) == 1


# -- rows and files, through the real store ----------------------------------------------------------------------


class Shelf:
    """The world's store with its folder of files; a test sends, deletes and sweeps."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reads = Reads(world.path)
        self.artifacts = Artifacts(world.path, world.store, self.reads)
        self.folder = folder_of(world.path)

    def send(self, task: Delivery, name: str = "report.csv", content: bytes = CONTENT, **other: Any) -> str:
        artifact = db.Artifact(name, len(content), other.get("sha256", sha256(content)))
        return self.receive(task, artifact, [content])

    def receive(self, task: Delivery, artifact: db.Artifact, parts: Iterable[bytes]) -> str:
        return self.artifacts.receive("shop-1", task.assignment_id, task.lease_id, artifact, parts).outcome

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())

    def rows(self) -> int:
        count: int = self.world.rows("SELECT COUNT(*) AS n FROM af_artifact")[0]["n"]
        return count


@pytest.fixture
def shelf(world: World) -> Iterator[Shelf]:
    shelf = Shelf(world)
    yield shelf
    shelf.reads.close()


def test_files_go_with_their_task_and_stay_with_the_others(shelf: Shelf) -> None:
    world = shelf.world
    for _ in range(2):
        world.submit()
    first, second = world.take(), world.take()
    for task in (first, second):
        assert shelf.send(task) == "accepted"
    world.report(first, "completed", artifacts=(db.Artifact("report.csv", len(CONTENT), sha256(CONTENT)),))
    world.now += 100
    world.report(second, "completed")
    assert world.store.write(retention.delete_finished, world.now - 50) == 1
    assert shelf.reads.artifacts(first.id) == [] and shelf.rows() == 2
    assert shelf.artifacts.remove_dropped() == 1
    assert [name.partition(".")[0] for name in shelf.files()] == [str(second.id)] and shelf.rows() == 1
    assert shelf.artifacts.remove_dropped() == 0
    world.store.write(retention.delete_finished, world.now + 1)
    shelf.artifacts.remove_dropped()
    assert shelf.files() == [] and shelf.rows() == 0
    assert [path.name for path in shelf.folder.iterdir()] == ["incoming"]


def test_a_crash_between_file_and_row_of_a_deletion_is_made_up_for(shelf: Shelf) -> None:
    world = shelf.world
    world.submit()
    task = world.take()
    shelf.send(task)
    world.report(task, "completed")
    world.store.write(retention.delete_finished, world.now + 1)
    [path] = shelf.folder.rglob("*.csv")
    path.unlink()  # and then the master died
    again = Artifacts(world.path, world.store, shelf.reads)
    assert again.remove_dropped() == 1 and shelf.rows() == 0


def test_the_files_of_attempts_that_are_no_longer_kept_go_too(shelf: Shelf) -> None:
    world = shelf.world
    world.submit()
    for number in range(db.KEPT_ATTEMPTS + 1):
        task = world.take()
        if number < 2:
            shelf.send(task)
        world.report(task, "released")
    task = world.take()
    assert shelf.artifacts.remove_dropped() == 2 and shelf.files() == []


def test_a_file_without_a_row_goes_after_an_hour_and_nothing_else(shelf: Shelf) -> None:
    world = shelf.world
    world.submit()
    task = world.take()
    shelf.send(task)
    [kept] = shelf.files()
    old = time.time() - STRAY_AFTER_SECONDS - 60
    strays = {
        "7.9.0123456789abcdef.report.csv": old,
        "7.9.0123456789abcdef.new.csv": time.time(),
        "a person's.txt": old,
    }
    for name, moment in strays.items():
        (shelf.folder / "000000" / name).write_bytes(b"x")
        os.utime(shelf.folder / "000000" / name, (moment, moment))
    os.utime(shelf.folder / "000000" / kept, (old, old))
    for _ in range(3):
        shelf.artifacts.remove_strays()
    assert shelf.files() == sorted([kept, "7.9.0123456789abcdef.new.csv", "a person's.txt"])


def test_exactly_one_of_many_equal_uploads_is_accepted(shelf: Shelf) -> None:
    world = shelf.world
    world.submit()
    task = world.take()
    barrier = threading.Barrier(8)
    outcomes: list[str] = []

    def send() -> None:
        barrier.wait()
        outcomes.append(shelf.send(task))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["accepted"] + ["duplicate"] * 7
    assert len(shelf.files()) == shelf.rows() == 1


def test_what_goes_wrong_on_the_way_in_leaves_no_file(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    world = shelf.world
    world.submit()
    task = world.take()
    with pytest.raises(ChecksumWrong):
        shelf.send(task, sha256="0" * 64)

    def cut_off() -> Iterator[bytes]:
        yield b"half"
        raise Refused(400, "cut_off", "")

    with pytest.raises(Refused):
        artifact = db.Artifact("x", 8, "0" * 64)
        shelf.artifacts.receive("shop-1", task.assignment_id, task.lease_id, artifact, cut_off())
    monkeypatch.setattr("artifacts.KEPT_FREE_BYTES", 2**62)
    with pytest.raises(NoRoom):
        shelf.send(task)
    assert shelf.files() == [] and shelf.rows() == 0


def test_the_time_that_files_take_is_not_the_tasks_time(shelf: Shelf) -> None:
    world = shelf.world
    world.submit(execution_timeout=60)
    task = world.take(start=True)
    large = db.Artifact("large", 16 * 1024 * 1000, "0" * 64)
    assert world.report(task, "completed", artifacts=(large,)).outcome == "artifacts_missing"
    world.now += 1000
    assert world.store.write(lambda tx: len(list(db.overdue_attempts(tx)))) == 0
    world.now += 100
    assert world.store.write(lambda tx: len(list(db.overdue_attempts(tx)))) == 1


def test_a_backup_beside_a_running_master_has_every_task_and_its_files(tmp_path: Path) -> None:
    master = Master(tmp_path)
    try:
        task = pulled(master)
        assert upload(master, task).status_code == 200
        master.submit(*[{"task_type": "echo"}] * 50)
        folder = tmp_path / "backup"
        flags = ["--database", master.settings["database"], "--backup", str(folder)]
        command = [sys.executable, str(ROOT / "master.py"), *flags]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert again.returncode == ExitCode.SETTINGS and "backup" in again.stderr  # it is never written over
    finally:
        master.stop()
    copy = Master(folder, database=str(folder / "distribution.db"))
    try:
        assert len(copy.get("/tasks?limit=200")["tasks"]) == 51
        (artifact,) = copy.get(f"/tasks/{task['id']}")["artifacts"]
        found = copy.api("GET", f"/tasks/{task['id']}/artifacts/{artifact['artifact_id']}")
        assert found.content == CONTENT
    finally:
        copy.stop()
