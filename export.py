"""How do tasks leave as a file? JSON lines or CSV, a row at a time, each with an end mark.

A stream that breaks looks like one that ended, so the last line says how many rows there are: {"end": true, "rows": N},
or `# end rows=N` in CSV. Whoever reads the file checks it.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

Rows = Iterator[dict[str, Any]]
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def begun(rows: Rows) -> Rows:
    """The same rows, with the first one read now: what fails at the start is an error reply and no broken file."""
    return itertools.chain([row for row in (next(rows, None),) if row is not None], rows)


def while_allowed(lines: Iterator[bytes], may_go_on: Callable[[], bool]) -> Iterator[bytes]:
    """The same lines, as long as whoever reads them may: then it breaks off, without an end mark."""
    for line in lines:
        if not may_go_on():
            return
        yield line


def json_lines(rows: Rows) -> Iterator[bytes]:
    """One JSON object a row; `result` is JSON text in and JSON out."""
    n = 0
    for row in rows:
        n += 1
        if row.get("result") is not None:
            row["result"] = msgspec.Raw(row["result"].encode())
        yield msgspec.json.encode(row) + b"\n"
    yield msgspec.json.encode({"end": True, "rows": n}) + b"\n"


def csv_lines(rows: Rows, names: list[str]) -> Iterator[bytes]:
    """A head line, then a line a row with these columns; `result` is one column of JSON text."""
    n = 0
    yield _csv_line(names)
    for row in rows:
        n += 1
        yield _csv_line([_cell(row[name]) for name in names])
    yield f"# end rows={n}\r\n".encode()


def _csv_line(cells: list[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue().encode()


def _cell(value: Any) -> str:
    """Text for a spreadsheet; an apostrophe in front keeps it from taking a text for a formula."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return "'" + value if value.startswith(FORMULA_STARTS) else value
