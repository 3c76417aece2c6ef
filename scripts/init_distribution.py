"""How does a fresh machine get its database, its config files and a key?

Creates what is missing: the database with its tables, and the three config files with one random api_key, readable by
their owner only; a --database stands in the files that it writes. Run again it changes nothing. --reset starts the
database afresh and keeps a copy of the old one; the config files stay, because the devices know the key. It never
prints the key, and never touches a database in use.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import secrets
import shlex
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import settings
from settings import MODES, ExitCode, SettingsError

OWN_VALUES = {
    "master": {"device_id": "master", "device_name": "Master"},
    "worker": {"device_id": "", "device_name": ""},
    "standalone": {"device_id": "standalone", "device_name": "Standalone"},
}

CONFIG_FOLDER = settings.ROOT / "config"

# Stands in for the key while a file that has none yet is checked.
PLACE_HOLDER = "a-key-that-is-about-to-be-written"


class Stopped(Exception):
    """Nothing was changed; the text says why, and exit_code is the process's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# ---- the config files ----


def config_values(mode: str) -> dict[str, object]:
    """What a fresh config file of this mode holds: every key with its default, and no secret."""
    values: dict[str, object] = {row.name: row.default for row in settings.SETTINGS if mode in row.modes}
    return {**values, "mode": mode, **OWN_VALUES[mode]}


def config_path(folder: Path, mode: str) -> Path:
    return folder / f"distribution_{mode}.json"


def _key_in(values: dict[str, object]) -> str:
    """The file's key; an example out of a document counts as none."""
    key = values.get("api_key", "")
    return key if isinstance(key, str) and key.lower() not in settings.EXAMPLE_KEYS else ""


def read_config_files(folder: Path) -> dict[str, dict[str, object]]:
    """The files that are there, by mode, each one checked as if its mode started (but for the key). SettingsError."""
    found = {}
    for mode in MODES:
        path = config_path(folder, mode)
        if path.exists():
            values = settings.read_config_file(path)
            replaced = {} if _key_in(values) else {"AF_API_KEY": PLACE_HOLDER}
            settings.load(mode, config_path=path, environ=replaced, starting=False)
            found[mode] = values
    return found


def write_config_files(folder: Path, found: dict[str, dict[str, object]], database: Path | None = None) -> list[str]:
    """Creates missing files and fills empty keys, one key for all; returns a line for each file it wrote. `database`:
    the one that was named, which master and standalone find there from now on."""
    keys = [key for key in map(_key_in, found.values()) if key]
    key = keys[0] if keys else secrets.token_urlsafe(32)
    lines = []
    for mode in MODES:
        path = config_path(folder, mode)
        named = {} if database is None or mode == "worker" else {"database": str(database)}
        if mode in found and _key_in(found[mode]):
            if named and settings.load(mode, config_path=path, environ={}, starting=False).database != str(database):
                lines.append(f"Note: {path} names another database; write {json.dumps(named)} into it.")
            continue
        _write_private(path, {**(found.get(mode) or config_values(mode)), **named, "api_key": key})
        lines.append(f"{path}: " + ("the api_key is now in it" if mode in found else "created"))
    if len(set(keys)) > 1:
        lines.append(f"Note: the files in {folder} hold different api_keys; a worker needs its master's.")
    return lines


def _write_private(path: Path, values: dict[str, object]) -> None:
    """Whole or not at all, and at no moment readable by others: the file holds the key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- the database ----


def database_paths(folder: Path, flag: str | None) -> list[Path]:
    """Where the databases of master and standalone belong; one path, unless their files differ."""
    paths = []
    for mode in ("master", "standalone"):
        path = config_path(folder, mode)
        environ = {"AF_DATABASE": os.environ.get("AF_DATABASE", ""), "AF_API_KEY": PLACE_HOLDER}
        wanted = settings.load(
            mode, config_path=path if path.exists() else None, flags={"database": flag}, environ=environ, starting=False
        )
        paths.append(Path(wanted.database))
    return list(dict.fromkeys(paths))


def create_database(path: Path) -> bool:
    """True if it was created, False if it was there and is ours. Raises store.DatabaseRefused and OSError."""
    import store

    if path.exists():
        return store.create_database(path)
    with store.lock_database(path):
        return store.create_database(path)


def reset_database(path: Path) -> str:
    """Backs the database up beside itself and starts it afresh; returns the line that says where the copy is."""
    import store

    with store.lock_database(path):
        if not path.exists():
            store.create_database(path)
            return f"{path}: created (there was none to back up)"
        _refuse_foreign(path)
        moment = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        target = path.with_name(f"{path.stem}.{moment}-{secrets.token_hex(2)}.backup{path.suffix}")
        try:
            store.backup_database(path, target)
            how = "was backed up to"
            for old in _files_of(path):
                old.unlink(missing_ok=True)
        except (store.DatabaseRefused, sqlite3.Error) as error:
            # Damaged, which may be why it is being reset: kept byte for byte instead of copied page by page.
            target.unlink(missing_ok=True)
            _move_aside(path, target)
            how = f"could not be read ({error}) and was moved as it is to"
        if store.folder_of(path).exists():
            store.folder_of(path).rename(store.folder_of(target))
        store.create_database(path)
    return f"{path}: the old database {how} {target}\n{path}: created afresh"


def _files_of(path: Path) -> list[Path]:
    """The write-ahead log first: alone beside a fresh database it could be replayed into it."""
    return [Path(f"{path}-wal"), Path(f"{path}-shm"), path]


def _move_aside(path: Path, target: Path) -> None:
    for old, new in zip(_files_of(path), _files_of(target)):
        if old.exists():
            old.rename(new)


def _refuse_foreign(path: Path) -> None:
    """Another program's file is not ours to move; an empty one, or a damaged one of ours, is."""
    import schema

    with path.open("rb") as file:
        head = file.read(100)
    application_id = int.from_bytes(head[68:72], "big")
    if head and not (head.startswith(b"SQLite format 3\0") and application_id == schema.APPLICATION_ID):
        advice = f"{path} is not a database of ours and is left alone; move it away or name another with --database"
        raise Stopped(advice, ExitCode.DATABASE_BAD)


def _confirm_reset(paths: Sequence[Path], *, is_confirmed: bool) -> None:
    names = " and ".join(map(str, paths))
    if is_confirmed:
        return
    if not sys.stdin.isatty():
        raise Stopped(f"--reset empties {names}: without a terminal to ask at it needs --yes", ExitCode.SETTINGS)
    print(f"This backs up and then empties {names}: all tasks, results and devices.")
    with contextlib.suppress(EOFError):
        if input("Type yes to go on: ").strip().lower() == "yes":
            return
    raise Stopped("Nothing was changed.", 1)


# ---- the command ----


def _run(arguments: argparse.Namespace) -> list[str]:
    folder = Path(arguments.config_folder)
    found = read_config_files(folder)  # before anything is written: a mistake in one file changes nothing
    paths = database_paths(folder, arguments.database)
    if arguments.reset:
        _confirm_reset(paths, is_confirmed=arguments.yes)
        lines = [reset_database(path) for path in paths]
    else:
        lines = [f"{path}: created" for path in paths if create_database(path)]
    return lines + write_config_files(folder, found, paths[0] if arguments.database else None)


def _next_steps(arguments: argparse.Namespace, *, was_changed: bool) -> list[str]:
    """The commands that come next, with the files that these came with."""
    is_elsewhere = bool(arguments.database) or Path(arguments.config_folder) != CONFIG_FOLDER
    if was_changed:
        config = shlex.quote(str(config_path(Path(arguments.config_folder).absolute(), "master")))
        start = f"python master.py --config {config}" if is_elsewhere else "python standalone.py"
        return [f"The api_key stands in the config files; to devices give enroll keys (docs/deploy.md). Start: {start}"]
    if arguments.reset:
        return []
    given = ["--config-folder", arguments.config_folder] if is_elsewhere else []
    given += ["--database", arguments.database] if arguments.database else []
    command = shlex.join(["python", "scripts/init_distribution.py", *given, "--reset"])
    return [f"To start the database afresh (the old one is backed up): {command}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Create the database and the config files with a random api_key.")
    parser.add_argument("--reset", action="store_true", help="back the database up beside itself, then start afresh")
    parser.add_argument("--yes", action="store_true", help="with --reset: do not ask")
    parser.add_argument("--database", metavar="FILE", help="instead of the one in the config files")
    parser.add_argument("--config-folder", metavar="FOLDER", default=str(CONFIG_FOLDER))
    arguments = parser.parse_args(argv)
    try:
        lines = _run(arguments)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return ExitCode.SETTINGS
    except ModuleNotFoundError as error:
        print(f"{error}; install the master's packages: pip install -r requirements.txt", file=sys.stderr)
        return ExitCode.SETTINGS
    except (OSError, sqlite3.Error) as error:
        named = isinstance(error, OSError) and error.filename
        why = f"{error.filename}: {error.strerror}" if named else error  # type: ignore[union-attr]
        print(f"The database or a config file cannot be written: {why}", file=sys.stderr)
        return ExitCode.DATABASE_BAD
    except Exception as error:
        # The database's own refusals are known only once its module could be imported; each brings sentence and code.
        if not isinstance(getattr(error, "exit_code", None), int):
            raise
        print(error, file=sys.stderr)
        return int(error.exit_code)  # type: ignore[attr-defined]
    print("\n".join(lines) if lines else "Everything is there already; nothing was changed.")
    print("\n".join(_next_steps(arguments, was_changed=bool(lines))))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
