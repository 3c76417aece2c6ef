"""Does the container's recipe work? Its steps are run one by one, without a container."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import farm
import pytest
import requests

import settings

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
CONFIG = "data/config/distribution_standalone.json"


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, comments left out and continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def the(word: str) -> str:
    """The rest of the last instruction of this word: the one that counts."""
    return [rest for name, rest in instructions() if name == word][-1]


def container_variables() -> dict[str, str]:
    return dict(pair.split("=", 1) for name, rest in instructions() if name == "ENV" for pair in rest.split())


def left_out(folder: str, names: list[str]) -> set[str]:
    """What the build would not copy, by Dockerfile.dockerignore: top-level names, and `**/name` everywhere."""
    patterns = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    anywhere = [pattern[3:] for pattern in patterns if pattern.startswith("**/")]
    here = anywhere + ([pattern for pattern in patterns if "/" not in pattern] if Path(folder) == ROOT else [])
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in here)}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The files of the image, in a folder of their own."""
    folder = tmp_path / "app"
    shutil.copytree(ROOT, folder, ignore=left_out)
    for name in ("data", "logs", "output"):
        (folder / name).mkdir()
    return folder


class Container:
    """ENTRYPOINT and CMD as one process in a copy of the tree, with the test's own Python and a free loopback port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            self.command("ENTRYPOINT") + self.command("CMD"),
            cwd=folder,
            env=self.environment(AF_PORT="0"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @staticmethod
    def command(word: str) -> list[str]:
        first, *rest = json.loads(the(word).rpartition("CMD ")[2] if word == "HEALTHCHECK" else the(word))
        assert first == "python"
        return [sys.executable, *rest]

    @staticmethod
    def environment(**more: str) -> dict[str, str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        # A test listens on loopback only; that the open address is accepted too is a test of its own.
        return {**outside, **container_variables(), "AF_HOST": "127.0.0.1", **more}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def url(self) -> str:
        def dashboard_line() -> str | None:
            assert self.process.poll() is None, "\n".join(self.lines)
            return next((line for line in self.lines if line.startswith("dashboard: ")), None)

        return str(farm.wait_for("the dashboard's address", dashboard_line)).split()[1]

    def ask(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run entrypoint.py in the running container, as docker exec does."""
        command = [*self.command("ENTRYPOINT"), *arguments]
        environment = self.environment(**more)
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join(5)
        return code


@pytest.fixture
def container(image: Path) -> Iterator[Container]:
    running = Container(image)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def test_the_image_holds_no_key_no_data_and_no_tests(image: Path) -> None:
    assert not (image / "config").exists() and not (image / "tests").exists() and not (image / ".git").exists()
    assert not any((image / "data").iterdir())
    for needed in ("main.py", "standalone.py", "master.py", "worker.py", "executors/crawl.py", "static/index.html"):
        assert (image / needed).is_file(), needed


def test_the_recipe_is_the_guides_with_a_python_that_runs_the_server() -> None:
    version = re.fullmatch(r"python:3\.(\d+)-slim-\w+", the("FROM"))
    assert version and int(version[1]) >= 10, "granian has no release for older Pythons"
    assert "-r requirements.txt -r requirements-crawl.txt" in the("RUN") + "".join(
        rest for word, rest in instructions() if word == "RUN"
    )
    assert json.loads(the("CMD"))[:5] == ["python", "main.py", "distribute", "--mode", "standalone"]


def test_the_process_is_not_root_and_its_folders_are_its_own() -> None:
    words = [word for word, _ in instructions()]
    user = the("USER")
    assert user != "root" and words.index("USER") < words.index("CMD")
    volumes = [Path(volume).relative_to(the("WORKDIR")).name for volume in json.loads(the("VOLUME"))]
    assert volumes == ["data", "logs", "output"]
    assert f"chown {user} {' '.join(volumes)}" in the("RUN")


def test_a_container_asks_for_its_key_does_a_task_and_stops_in_good_order(container: Container) -> None:
    url = container.url
    assert requests.get(f"{url}/healthz", timeout=10).status_code == 200
    overview = f"{url}/api/distribution/system/overview"
    assert requests.get(overview, timeout=10).status_code == 401

    config = container.folder / CONFIG
    key = json.loads(config.read_text())["api_key"]
    assert len(key) >= 32 and stat.S_IMODE(config.stat().st_mode) == 0o600
    assert container.ask("--show-key").stdout.strip() == key
    headers = {"Authorization": f"Bearer {key}"}
    assert requests.get(overview, headers=headers, timeout=10).status_code == 200

    tasks = f"{url}/api/distribution/tasks"
    task_id = requests.post(tasks, json={"task_type": "echo"}, headers=headers, timeout=10).json()["id"]

    def is_done() -> bool:
        task: dict[str, Any] = requests.get(f"{tasks}/{task_id}", headers=headers, timeout=10).json()
        return task["status"] == "completed"

    farm.wait_for("the worker in the container to do a task", is_done)
    assert container.stop() == 0
    assert key not in "\n".join(container.lines), "a container's log is kept and read by others"
    assert (container.folder / "data" / "distribution.db").is_file()


def test_the_health_check_tells_a_running_master_from_none(container: Container) -> None:
    port = container.url.rpartition(":")[2]
    check = Container.command("HEALTHCHECK")[2:]
    assert check == ["--health"]
    assert container.ask(*check, AF_PORT=port).returncode == 0
    assert container.stop() == 0
    assert container.ask(*check, AF_PORT=port).returncode == 1


def test_a_second_start_keeps_key_and_tasks(image: Path) -> None:
    kept = []
    for _ in range(2):
        container = Container(image)
        try:
            assert container.url
        finally:
            code = container.stop()
        assert code == 0, "\n".join(container.lines)
        kept.append((image / CONFIG).read_bytes())
    assert kept[0] == kept[1]


def test_the_container_listens_to_the_outside_and_so_insists_on_a_key(image: Path) -> None:
    outside = container_variables()
    assert outside["AF_HOST"] == "0.0.0.0"
    (image / CONFIG).parent.mkdir(parents=True)
    (image / CONFIG).write_text('{"mode": "standalone"}')
    with pytest.raises(settings.SettingsError, match="every machine could give orders"):
        settings.load("standalone", config_path=image / CONFIG, environ=outside)
    made = subprocess.run(
        [sys.executable, "deploy/entrypoint.py", sys.executable, "-c", "print('started')"],
        cwd=image, env=Container.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert made.returncode == 0 and made.stdout.endswith("started\n"), made.stderr
    assert settings.load("standalone", config_path=image / CONFIG, environ=outside).api_key


def test_a_refusal_of_the_first_start_ends_the_container_with_its_code(image: Path) -> None:
    (image / "data" / "distribution.db").write_bytes(b"no database of ours, and not empty either")
    refused = subprocess.run(
        [sys.executable, "deploy/entrypoint.py", sys.executable, "-c", "print('started')"],
        cwd=image, env=Container.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode == settings.ExitCode.DATABASE_BAD
    assert "started" not in refused.stdout and len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_install_step_brings_everything_that_a_start_needs(image: Path, tmp_path: Path) -> None:
    clean = tmp_path / "venv"
    venv.create(clean, with_pip=True)
    python = clean / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = next(rest for word, rest in instructions() if word == "RUN" and rest.startswith("pip install"))
    subprocess.run([str(python), "-m", *install.split()], cwd=image, check=True, timeout=800, stdout=subprocess.DEVNULL)
    for program in ("master.py", "worker.py", "standalone.py"):
        arguments = [str(python), program, "--show-config", "--device-id", "d1", "--host", "127.0.0.1"]
        shown = subprocess.run(arguments, cwd=image, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
    subprocess.run([str(python), "-c", "import api, server, parsel"], cwd=image, check=True, timeout=60)
