"""What is this master, with which settings does it run, and how is it doing?

Facts for a person who looks after it. No secret is among them, and of a path only its last name.
"""

from __future__ import annotations

import platform
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import settings as settings_module
from db import STATES, TRANSITIONS
from schema import SCHEMA_VERSION
from settings import PROTOCOL, VERSION, Settings
from writer import Writer

RETENTION = ("retention_days", "heartbeat_retention_days", "event_retention_days", "audit_retention_days")


def program() -> dict[str, Any]:
    """What runs here."""
    return {
        "version": VERSION,
        "protocol": PROTOCOL,
        "python_version": platform.python_version(),
        "sqlite_version": sqlite3.sqlite_version,
        "states": list(STATES),
        "transitions": [{"verb": verb, "from": old, "to": new} for verb, (old, new) in TRANSITIONS.items()],
    }


def database(path: Path, counts: Mapping[str, int]) -> dict[str, Any]:
    """The file, its log and the room that is left beside it, in bytes; and how many tasks it keeps."""
    return {
        "file": path.name,
        "bytes": _size(path),
        "wal_bytes": _size(path.with_name(path.name + "-wal")),
        "free_bytes": shutil.disk_usage(path.parent).free,
        "schema_version": SCHEMA_VERSION,
        "tasks": sum(counts.values()),
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # no log file while nothing is open for writing
        return 0


def writing(writer: Writer, max_queue: int) -> dict[str, Any]:
    """How many writes wait, how many one commit serves, and how long a commit takes."""
    commits = writer.commits.count
    return {
        "queue": writer.queue_length,
        "max_queue": max_queue,
        "commits": commits,
        "mean_batch": round(writer.committed_jobs / commits, 2) if commits else None,
        "commit_ms": writer.commits.percentiles(),
    }


def in_force(settings: Settings) -> dict[str, Any]:
    """{key: value} of this mode; of a secret only whether it is set."""
    rows = (row for row in settings_module.SETTINGS if settings.mode in row.modes)
    return {row.name: _shown(row, getattr(settings, row.name)) for row in rows}


def _shown(row: settings_module.Setting, value: Any) -> Any:
    if row.secret:
        return "set" if value else "not set"
    return Path(value).name if row.is_path and isinstance(value, str) else value


def retention(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in RETENTION}
