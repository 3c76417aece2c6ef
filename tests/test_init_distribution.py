"""Does the first command of the guide create what is missing, and nothing else, and lose nothing at a reset?"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import artifacts
import settings
import store
from settings import MODES, ROOT, ExitCode


class Place:
    """A folder that stands for a fresh machine."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "config"
        self.database = folder / "data" / "crawl.db"

    def run(self, *arguments: str, answer: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "init_distribution.py"), *arguments]
        command += ["--config-folder", str(self.config), "--database", str(self.database)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        return subprocess.run(
            command, input=answer or "", capture_output=True, text=True, timeout=60, env=environ, check=False
        )

    def file(self, mode: str) -> Path:
        return self.config / f"distribution_{mode}.json"

    def keys(self) -> set[str]:
        return {json.loads(self.file(mode).read_text())["api_key"] for mode in MODES}

    def everything(self) -> dict[str, bytes]:
        files = [*self.config.glob("*"), *self.database.parent.glob("*")]
        return {file.name: file.read_bytes() for file in files if file.suffix != ".lock"}

    def mark(self, value: str) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute("INSERT INTO af_meta (key, value) VALUES ('mark', ?)", (value,))

    def backups(self) -> list[Path]:
        return [path for path in self.database.parent.iterdir() if ".backup" in path.name]


def mark_in(path: Path) -> str | None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        row = connection.execute("SELECT value FROM af_meta WHERE key = 'mark'").fetchone()
    return row[0] if row else None


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def one_sentence(run: subprocess.CompletedProcess[str]) -> str:
    assert run.stderr.count("\n") == 1 and "Traceback" not in run.stderr, run.stderr
    return run.stderr


def test_a_fresh_machine_gets_a_database_and_three_files_with_the_same_random_key(place: Place) -> None:
    run = place.run()
    assert (run.returncode, run.stderr) == (0, "")
    store.check_database(place.database)
    (key,) = place.keys()
    assert len(key) >= 43 and key not in run.stdout
    for mode in MODES:
        assert settings.load(mode, config_path=place.file(mode), environ={}, starting=False).api_key == key


def test_two_machines_get_different_keys(tmp_path: Path) -> None:
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    assert one.run().returncode == two.run().returncode == 0
    assert one.keys() != two.keys()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_only_the_owner_can_read_what_it_writes(place: Place) -> None:
    place.run()
    for file in [*place.config.iterdir(), place.database]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_run_again_it_changes_nothing_and_says_how_to_reset(place: Place) -> None:
    place.run()
    before = place.everything()
    run = place.run()
    assert run.returncode == 0 and "nothing was changed" in run.stdout and "--reset" in run.stdout
    assert place.everything() == before


@pytest.mark.parametrize("old_key", ["", "your-secure-api-key-here", None])
def test_a_file_without_a_key_of_its_own_gets_one_and_keeps_its_other_values(place: Place, old_key: str | None) -> None:
    place.config.mkdir(parents=True)
    values = {"mode": "master", "port": 8123, "device_name": "总部"}
    with_key = values if old_key is None else {**values, "api_key": old_key}
    place.file("master").write_text(json.dumps(with_key), encoding="utf-8")
    place.file("master").chmod(0o644)
    assert place.run().returncode == 0
    after = json.loads(place.file("master").read_text(encoding="utf-8"))
    assert after == {**values, "database": str(place.database), "api_key": after["api_key"]}
    assert {after["api_key"]} == place.keys()
    assert os.name == "nt" or stat.S_IMODE(place.file("master").stat().st_mode) == 0o600


def test_a_key_that_is_there_is_kept_and_given_to_the_others(place: Place) -> None:
    place.config.mkdir(parents=True)
    text = json.dumps({"mode": "worker", "device_id": "shop-7", "api_key": "of-the-master-elsewhere"})
    place.file("worker").write_text(text)
    assert place.run().returncode == 0
    assert place.keys() == {"of-the-master-elsewhere"} and place.file("worker").read_text() == text


def test_the_database_that_was_named_stands_in_the_files_so_that_every_later_command_opens_it(place: Place) -> None:
    run = place.run()
    for mode in ("master", "standalone"):
        path = place.file(mode)
        assert settings.load(mode, config_path=path, environ={}, starting=False).database == str(place.database)
    assert f"python master.py --config {place.file('master')}" in run.stdout and "--reset" not in run.stdout
    again = place.run().stdout
    assert f"--config-folder {place.config} --database {place.database} --reset" in again
    place.database = place.database.with_name("other.db")
    assert f"{place.file('master')} names another database" in place.run().stdout


def test_a_mistake_in_one_file_changes_nothing(place: Place) -> None:
    place.config.mkdir(parents=True)
    place.file("standalone").write_text('{"prot": 1}')
    run = place.run()
    assert run.returncode == ExitCode.SETTINGS and 'did you mean "port"?' in one_sentence(run)
    assert [path.name for path in place.config.iterdir()] == ["distribution_standalone.json"]
    assert not place.database.exists()


def test_a_database_of_another_program_is_left_alone(place: Place) -> None:
    place.database.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(place.database)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = place.database.read_bytes()
    for arguments in ([], ["--reset", "--yes"]):
        run = place.run(*arguments)
        assert run.returncode == ExitCode.DATABASE_BAD and str(place.database) in one_sentence(run)
    assert place.database.read_bytes() == before and place.backups() == []


def test_a_folder_that_cannot_be_made_is_one_sentence(place: Place) -> None:
    place.config.parent.joinpath("data").write_text("a file")
    run = place.run()
    assert run.returncode == ExitCode.DATABASE_BAD and "cannot be written: /" in one_sentence(run)


# ---- reset ----


def test_a_reset_backs_up_says_where_and_starts_afresh(place: Place) -> None:
    place.run()
    place.mark("of the old one")
    keys = place.keys()
    run = place.run("--reset", "--yes")
    (backup,) = place.backups()
    assert run.returncode == 0 and str(backup) in run.stdout
    assert mark_in(backup) == "of the old one" and mark_in(place.database) is None
    store.check_database(place.database)
    assert backup.parent == place.database.parent and place.keys() == keys


def test_a_reset_moves_the_files_of_tasks_to_the_backup(place: Place) -> None:
    place.run()
    folder = artifacts.folder_of(place.database)
    folder.mkdir()
    (folder / "a-file").write_bytes(b"of a task")
    assert place.run("--reset", "--yes").returncode == 0
    (backup,) = [path for path in place.backups() if path.is_file()]
    assert (artifacts.folder_of(backup) / "a-file").read_bytes() == b"of a task" and not folder.exists()


def test_a_backup_holds_what_a_killed_master_left_in_the_write_ahead_log(place: Place) -> None:
    place.run()
    program = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA journal_mode=wal');"
        "c.execute(\"INSERT INTO af_meta (key, value) VALUES ('mark', 'in the log')\"); c.commit(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(place.database)], timeout=60, check=False)
    assert Path(f"{place.database}-wal").stat().st_size > 0
    assert place.run("--reset", "--yes").returncode == 0
    (backup,) = place.backups()
    assert mark_in(backup) == "in the log" and mark_in(place.database) is None


def test_without_a_terminal_and_without_yes_nothing_is_reset(place: Place) -> None:
    place.run()
    before = place.everything()
    run = place.run("--reset", answer="yes\n")
    assert run.returncode == ExitCode.SETTINGS and "--yes" in one_sentence(run)
    assert place.everything() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo terminal")
@pytest.mark.parametrize(("answer", "is_reset"), [("yes", True), ("y", False), ("", False)])
def test_at_a_terminal_only_the_word_yes_resets(place: Place, answer: str, is_reset: bool) -> None:
    import pty

    place.run()
    controller, terminal = pty.openpty()
    os.write(controller, f"{answer}\n".encode())
    command = [sys.executable, str(ROOT / "scripts" / "init_distribution.py"), "--reset"]
    command += ["--config-folder", str(place.config), "--database", str(place.database)]
    run = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60, check=False)
    os.close(controller)
    os.close(terminal)
    assert "Type yes" in run.stdout
    assert (run.returncode == 0, len(place.backups())) == (is_reset, int(is_reset))


def test_a_database_in_use_is_not_reset(place: Place) -> None:
    place.run()
    before = place.everything()
    with store.lock_database(place.database):
        run = place.run("--reset", "--yes")
    assert run.returncode == ExitCode.DATABASE_IN_USE and "in use" in one_sentence(run)
    assert place.everything() == before


def test_a_damaged_database_is_kept_as_it_is_and_replaced(place: Place) -> None:
    place.run()
    damaged = place.database.read_bytes()[:8192] + b"\xff" * 8192
    place.database.write_bytes(damaged)
    assert place.run().returncode == ExitCode.DATABASE_BAD
    run = place.run("--reset", "--yes")
    (backup,) = place.backups()
    assert run.returncode == 0 and "moved as it is" in run.stdout and backup.read_bytes() == damaged
    store.check_database(place.database)


def test_a_reset_of_nothing_creates_it(place: Place) -> None:
    assert place.run("--reset", "--yes").returncode == 0
    store.check_database(place.database)
    assert place.backups() == []
