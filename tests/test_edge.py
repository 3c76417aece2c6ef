"""Is worker.pyz a whole device, on a Python that has nothing else, and does the master hand it out?"""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import farm
import pytest
import requests

import edge
import settings

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["app_sync", "crawl", "data_sync", "echo"]
KEY = "correct-horse-battery-staple-of-a-test"
PAGES = {"index.html": "a.html b.html", "a.html": "b.html c.html", "b.html": "index.html", "c.html": "a.html#top"}
WHERE_I_RUN = """import os
from executors.task_executor import TaskExecutor

class WhereExecutor(TaskExecutor):
    isolation = "process"

    def __init__(self):
        super().__init__("where")

    def execute_task(self, task_data):
        import requests
        return {"process": os.getpid(), "requests": requests.__file__}
"""


def pythons() -> dict[str, str]:
    """The interpreters of 3.9 to 3.13 that are on this machine, by version; the running one is among them."""
    found = {".".join(map(str, sys.version_info[:2])): sys.executable}
    for minor in range(9, 14):
        version = f"3.{minor}"
        kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        path = str(kept[-1]) if kept else shutil.which(f"python{version}")
        if path:
            found.setdefault(version, path)
    return dict(sorted(found.items(), key=lambda pair: int(pair[0].partition(".")[2])))


PYTHONS = pythons()
OLDEST = next(iter(PYTHONS))
MATRIX = [pytest.param(v, marks=() if v == OLDEST else pytest.mark.slow) for v in PYTHONS]


@pytest.fixture(scope="session")
def maker(pytestconfig: pytest.Config) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import make_edge

        yield make_edge


@pytest.fixture(scope="session")
def pyz(maker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """worker.pyz of this checkout; the packages are fetched once and kept in dist/, which git does not see."""
    output = tmp_path_factory.mktemp("edge") / "worker.pyz"
    assert maker.main(["--output", str(output)]) == 0
    return output


def bare_environment(**variables: str) -> dict[str, str]:
    """Nothing of this project, its virtual environment or its settings."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("AF_", "PYTHON", "VIRTUAL_ENV"))}
    return {**ours, **variables}


class Device(farm.Program):
    """worker.pyz alone in a folder, started as a person starts it."""

    def __init__(self, pyz: Path, folder: Path, python: str, *arguments: str, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(pyz, folder)
        self.folder, self._variables = folder, variables
        self._command = [python, "worker.pyz", *arguments]
        self.start()

    def start(self) -> None:
        self.lines = []
        self.process = subprocess.Popen(
            self._command,
            cwd=self.folder,
            env=bare_environment(**self._variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a small site of linked pages on this machine."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name, links in PAGES.items():
        anchors = "".join(f'<a href="{link}">x</a>' for link in links.split())
        (folder / name).write_text(f"<html><title>{name}</title>{anchors}</html>")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/index.html"
    server.shutdown()
    server.server_close()


def registered(master: farm.Master, device_id: str) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        return next((one for one in master.get("/devices")["devices"] if one["device_id"] == device_id), None)

    device: dict[str, Any] = farm.wait_for(f"{device_id} to register", found)
    return device


# ---- the file ----


def test_the_same_input_gives_the_same_bytes(maker: Any, pyz: Path, tmp_path: Path) -> None:
    again = maker.write(maker.pack(maker.fetch_wheels(ROOT / "dist" / "wheels")), tmp_path / "again.pyz")
    assert again == hashlib.sha256(pyz.read_bytes()).hexdigest()
    assert {entry.date_time for entry in zipfile.ZipFile(pyz).infolist()} == {(1980, 1, 1, 0, 0, 0)}, "no day's date"


def test_it_holds_our_files_as_they_are_and_nothing_compiled(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
        ours = [
            "worker.py",
            "settings.py",
            *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("executors/**/*.py")),
        ]
        for name in ours:
            assert archive.read(name) == (ROOT / name).read_bytes()
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc"))]
    assert not [name for name in names if name in ("api.py", "db.py", "master.py") or "config" in name.split("/")]


def test_every_package_in_it_has_its_licence_beside_it(maker: Any, pyz: Path) -> None:
    names = zipfile.ZipFile(pyz).namelist()
    for pin in maker.pins():
        folder = f"{pin.name.replace('-', '_')}-{pin.version}.dist-info/"
        assert [name for name in names if name.startswith(folder) and "LICENSE" in name], pin.name


def test_a_package_of_other_bytes_than_the_pinned_ones_is_not_packed(
    maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(folder: Path) -> None:
        (folder / "requests-2.32.5-py3-none-any.whl").write_bytes(b"something else under that name")

    monkeypatch.setattr(maker, "_download", another)
    with pytest.raises(SystemExit, match="other files"):
        maker.fetch_wheels(tmp_path)


@pytest.mark.parametrize("version", PYTHONS)
def test_the_robots_reader_in_it_is_not_held_up_by_wildcards(pyz: Path, tmp_path: Path, version: str) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from executors.web.robots import Rules, linear_protego\n"
        "rules = Rules('User-agent: *\\nDisallow: /*a*a*a*a*b$\\nDisallow: /*.pdf$\\n')\n"
        "print(linear_protego().__file__, rules.allows('http://a/' + 'a' * 300, 'x'), rules.allows('http://a/x.pdf', 'x'))\n"
    )
    command = [PYTHONS[version], "-I", "-S", "-W", "error", "-c", code, str(pyz)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "worker.pyz" in done.stdout and done.stdout.split()[1:] == ["True", "False"]


def test_a_python_that_is_too_old_is_told_in_one_sentence(pyz: Path) -> None:
    old = [path for v in ("2.7", "3.6", "3.7", "3.8") for path in Path.home().glob(f".pyenv/versions/{v}.*/bin/python")]
    if not old:
        pytest.skip("no Python older than 3.9 on this machine to show it with")
    for python in old:
        said = subprocess.run([str(python), str(pyz)], capture_output=True, text=True, timeout=60)
        assert said.returncode == 1 and said.stderr.startswith("worker.pyz needs Python 3.9 or newer"), said.stderr
        assert len(said.stderr.splitlines()) == 1


@pytest.mark.parametrize("way", ["in memory", "beside the archive", "temporary"])
def test_certificates_are_read_out_of_the_archive_and_none_is_left_behind(pyz: Path, tmp_path: Path, way: str) -> None:
    if way == "in memory" and not hasattr(os, "memfd_create"):
        pytest.skip("only Linux has files in memory")
    folder = tmp_path / "device"
    folder.mkdir()
    shutil.copy(pyz, folder)
    (tmp_path / "tmp").mkdir()
    if way == "temporary":
        (folder / "data").write_text("no folder can be made here")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport certifi.core\n"
        + ("certifi.core._in_memory = lambda bundle: None\n" if way != "in memory" else "")
        + "import requests, ssl, certifi\n"
        "context = ssl.create_default_context(cafile=requests.utils.DEFAULT_CA_BUNDLE_PATH)\n"
        "print(context.cert_store_stats()['x509_ca'] > 50, requests.__version__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "worker.pyz")], cwd=tmp_path,
        env=bare_environment(TMPDIR=str(tmp_path / "tmp")), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "True 2.32.5\n", done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    kept = [path.name for path in folder.rglob("*.pem")]
    assert len(kept) == (1 if way == "beside the archive" else 0)


# ---- the device ----


@pytest.mark.parametrize("version", MATRIX)
def test_it_registers_crawls_and_isolates_on_a_bare_python(
    pyz: Path, site: str, master: farm.Master, programs: list[farm.Program], tmp_path: Path, version: str
) -> None:
    device_id = f"edge-{version}"
    (tmp_path / "where.py").write_text(WHERE_I_RUN)
    device = Device(
        pyz, tmp_path / "device", PYTHONS[version], "--device-id", device_id, "--master-url", master.url,
        "--executors", str(tmp_path / "where.py"), "--tags", device_id,
        AF_CRAWL_ALLOW_NETWORKS="127.0.0.0/8", AF_CRAWL_DELAY_SECONDS="0", AF_RECONNECT_SECONDS="0.5",
    )  # fmt: skip
    programs.append(device)
    me = registered(master, device_id)
    assert me["task_types"] == [*KINDS, "where"] and me["version"] == settings.VERSION

    mine = {"pinned_device_id": device_id, "batch": device_id}
    start = {"task_type": "crawl", "task_data": {"url": site, "follow": {}}, "unique_key": site}
    master.submit({**start, "required_tags": [device_id], "batch": device_id})
    where = master.submit_one("where", **mine)

    def is_done() -> bool:
        states = master.states(device_id)
        assert not states.get("failed"), [
            t for t in master.get(f"/tasks?batch={device_id}")["tasks"] if t["error_message"]
        ]
        return states == {"completed": len(PAGES) + 1}

    farm.wait_for("the crawl and the isolated task", is_done)
    result = master.get(f"/tasks/{where}")["result"]
    assert result["process"] != device.process.pid, "a process of its own"
    assert "worker.pyz" in result["requests"], "the child lives out of the same file"
    assert device.stop() == 0, device.output
    assert sorted(path.name for path in device.folder.iterdir()) == ["data", "logs", "worker.pyz"]


def test_its_doctor_says_that_all_is_well(pyz: Path, master: farm.Master, tmp_path: Path) -> None:
    folder = tmp_path / "device"
    folder.mkdir()
    shutil.copy(pyz, folder)
    command = [PYTHONS[OLDEST], str(folder / "worker.pyz"), "--doctor", "--device-id", "d1", "--master-url", master.url]
    done = subprocess.run(command, cwd=tmp_path, env=bare_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok   executors: {', '.join(KINDS)}" in done.stdout
    assert f"ok   state folder: {folder}/data/worker/d1" in done.stdout, "beside the file, wherever it is started from"
    assert [path.name for path in folder.iterdir()] == ["worker.pyz"]


def test_a_config_file_beside_it_is_read_and_none_is_needed(pyz: Path, tmp_path: Path) -> None:
    shutil.copy(pyz, tmp_path)

    def shown(*arguments: str) -> str:
        command = [sys.executable, str(tmp_path / "worker.pyz"), "--show-config", "--device-id", "d1", *arguments]
        done = subprocess.run(command, cwd="/", env=bare_environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "weight = 1.0 times   [default]" in shown()
    beside = tmp_path / "config" / "distribution_worker.json"
    beside.parent.mkdir()
    beside.write_text('{"mode": "worker", "weight": 2}')
    assert f"weight = 2 times   [{beside}]" in shown()
    (tmp_path / "other.json").write_text('{"mode": "worker", "weight": 3}')
    assert "weight = 3 times" in shown("--config", str(tmp_path / "other.json"))


# ---- the master's side ----


def test_the_master_hands_it_out_with_its_sha256_and_once_only(
    pyz: Path, programs: list[farm.Program], tmp_path: Path
) -> None:
    built = tmp_path / "dist" / "worker.pyz"
    master = farm.Master(tmp_path / "master", api_key=KEY, worker_file=str(built))
    programs.append(master)
    url = f"{master.url}/edge/worker.pyz"
    absent = requests.get(url, timeout=60)
    assert (absent.status_code, absent.json()["code"]) == (404, "not_built") and "`make edge`" in absent.json()[
        "detail"
    ]
    assert requests.get(f"{url}.sha256", timeout=60).status_code == 404
    assert master.get("/system/overview")["has_worker_file"] is False

    built.parent.mkdir()
    shutil.copy(pyz, built)
    given = requests.get(url, timeout=60)
    digest = hashlib.sha256(pyz.read_bytes()).hexdigest()
    assert given.status_code == 200 and given.content == pyz.read_bytes()
    assert given.headers["ETag"] == f'"{digest}"'
    assert given.headers["Content-Disposition"] == 'attachment; filename="worker.pyz"'
    assert given.headers["X-Content-Type-Options"] == "nosniff"
    assert requests.get(f"{url}.sha256", timeout=60).text == f"{digest}  worker.pyz\n"
    assert requests.get(url, headers={"If-None-Match": f'"{digest}"'}, timeout=60).status_code == 304
    assert master.get("/system/overview")["has_worker_file"] is True

    newer = tmp_path / "newer"
    newer.write_bytes(b"the next build")
    newer.replace(built)
    again = requests.get(url, headers={"If-None-Match": f'"{digest}"'}, timeout=60)
    assert (again.status_code, again.content) == (200, b"the next build")


def test_a_file_that_goes_away_is_no_longer_handed_out(tmp_path: Path) -> None:
    (tmp_path / "worker.pyz").write_bytes(b"a whole device")
    file = edge.WorkerFile(tmp_path / "worker.pyz")
    first = file.read()
    assert first is not None and file.read() is first, "read once"
    (tmp_path / "worker.pyz").unlink()
    assert file.read() is None and not file.is_there


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_line_of_the_readme_makes_an_empty_folder_a_device(
    pyz: Path, programs: list[farm.Program], tmp_path: Path
) -> None:
    master = farm.Master(tmp_path / "master", api_key=KEY, worker_file=str(pyz))
    programs.append(master)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^curl .*/edge/worker\.pyz.*$", readme, re.MULTILINE)
    line = line.replace("http://192.168.1.10:8000", master.url).replace("YOUR_KEY", KEY)
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "python3").symlink_to(PYTHONS[OLDEST])
    path = f"{folder}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["sh", "-c", line], cwd=folder, env=bare_environment(PATH=path), start_new_session=True
    ) as shell:
        try:
            assert registered(master, "shop-7")["task_types"] == KINDS
        finally:
            os.killpg(shell.pid, 9)
