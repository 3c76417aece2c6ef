"""Which statements does a master execute? master.py that writes each one it has not seen into a file, as JSON lines.

`tracing_master.py [master.py's own flags]`, with the key `log_file` beside which `statements.jsonl` is written. For
tests alone: SQLite itself tells what it runs, so nothing that reaches the database can be left out.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import master

config = Path(sys.argv[sys.argv.index("--config") + 1])
target = (config.parent / "statements.jsonl").open("a", buffering=1)
seen: set[str] = set()
connect = sqlite3.connect


def note(sql: str) -> None:
    shape = re.sub(r"'[^']*'|\b[0-9.]+\b", "?", sql)
    if shape not in seen:
        seen.add(shape)
        target.write(json.dumps(sql) + "\n")


def traced(*args: Any, **options: Any) -> sqlite3.Connection:
    connection = connect(*args, **options)
    connection.set_trace_callback(note)
    return connection


sqlite3.connect = traced  # type: ignore[assignment]
sys.exit(master.main())
