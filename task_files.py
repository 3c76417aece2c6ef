"""What does a file of tasks say? JSON, JSON lines or CSV, read a task at a time; what is wrong is named by its line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import IO, Any, Iterable, Iterator, NamedTuple

from client import CommandFailed
from settings import ExitCode, one_line

LONGEST_TASK_BYTES = 4 * 1024 * 1024
READ_BYTES = 64 * 1024


class Line(NamedTuple):
    """One task of the file; `place` is where a person finds it: "line 7"."""

    place: str
    task: dict[str, Any]


def read_tasks(path: Path) -> Iterator[Line]:
    """The file's tasks, one at a time. Raises CommandFailed with the line number for what cannot be read."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CommandFailed(f"{path}: write a file that ends in .json, .jsonl or .csv", ExitCode.SETTINGS)
    try:
        # utf-8-sig: Excel and Windows' editor put a byte order mark in front.
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in reader(path, file):
                _check_task(path, line)
                yield line
    except UnicodeDecodeError:
        advice = f"{path} is not UTF-8; save it again as UTF-8 (in Excel: CSV UTF-8)"
        raise CommandFailed(advice, ExitCode.SETTINGS) from None
    except OSError as error:
        raise CommandFailed(f"{path} cannot be read: {error.strerror}", ExitCode.SETTINGS) from None


def _wrong(path: Path, place: str, advice: str) -> CommandFailed:
    return CommandFailed(f"{path}, {place}: {one_line(advice)}", ExitCode.SETTINGS)


def _check_task(path: Path, line: Line) -> None:
    """What can be known without the master; the rest it says itself, and the line is named then too."""
    if not isinstance(line.task, dict):
        raise _wrong(path, line.place, f"holds a {type(line.task).__name__}; write a task as an object {{...}}")
    task_type = line.task.get("task_type")
    if not isinstance(task_type, str) or not task_type:
        raise _wrong(path, line.place, 'has no task_type; write for instance "task_type": "crawl"')
    try:
        size = len(canonical_json(line.task))
    except UnicodeEncodeError:
        raise _wrong(path, line.place, "holds half a character (a lone surrogate); write it again") from None
    except (ValueError, RecursionError):
        raise _wrong(path, line.place, "holds a number or a depth that JSON does not have") from None
    if size > LONGEST_TASK_BYTES:
        raise _wrong(path, line.place, f"is larger than {LONGEST_TASK_BYTES >> 20} MiB")


def canonical_json(task: object) -> bytes:
    """Canonical: the same content gives the same bytes, and so the same unique key."""
    text = json.dumps(task, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8")


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")


def _read_jsonl(path: Path, file: IO[str]) -> Iterator[Line]:
    for number, text in enumerate(file, 1):
        if text.strip():
            try:
                yield Line(f"line {number}", json.loads(text, parse_constant=_no_constant))
            except (ValueError, RecursionError) as error:
                raise _wrong(path, f"line {number}", f"is not JSON ({_json_reason(error)})") from None


def _json_reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else one_line(str(error))[:80]


class _JsonText:
    """A JSON file read piece by piece: only what was not yet decoded is in memory."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file
        self._text, self._at, self.line = "", 0, 1
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)

    def more(self) -> bool:
        piece = self._file.read(max(READ_BYTES, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """The next sign that is no white space, "" at the end."""
        while True:
            found = re.compile(r"[^ \t\r\n]").search(self._text, self._at)
            end = found.start() if found else len(self._text)
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            if found:
                return found.group()
            if not self.more():
                return ""

    def take(self) -> None:
        self._at += 1

    def value(self, *, is_whole_file: bool = False) -> Any:
        """The object or list that starts at the next sign; read on as long as it is not whole."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if (is_whole_file or len(self._text) - self._at <= 4 * LONGEST_TASK_BYTES) and self.more():
                    continue
                end = error.pos if isinstance(error, json.JSONDecodeError) else self._at
                line = self.line + self._text.count("\n", self._at, end)
                raise _wrong(self._path, f"line {line}", f"is not JSON ({_json_reason(error)})") from None
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            return value


def _read_json(path: Path, file: IO[str]) -> Iterator[Line]:
    """A list of tasks, {"tasks": [...]}, or one task."""
    text = _JsonText(path, file)
    if text.peek() != "[":
        whole = text.value(is_whole_file=True) if text.peek() == "{" else None
        if not isinstance(whole, dict) or text.peek():
            raise _wrong(path, f"line {text.line}", 'write a list of tasks [...], {"tasks": [...]} or one task {...}')
        tasks = whole["tasks"] if isinstance(whole.get("tasks"), list) else [whole]
        yield from (Line(f"task {index}", task) for index, task in enumerate(tasks, 1))
        return
    text.take()
    sign = text.peek()
    while sign != "]":
        sign, number = text.peek(), text.line
        if sign != "{":
            raise _wrong(path, f"line {number}", f"write a task as an object {{...}} instead of {sign or 'the end'}")
        yield Line(f"line {number}", text.value())
        sign = text.peek()
        if sign == ",":
            text.take()
        elif sign != "]":
            raise _wrong(path, f"line {text.line}", f"write , or ] after a task instead of {sign or 'the end'}")
    text.take()
    if text.peek():
        raise _wrong(path, f"line {text.line}", "holds something after the list; take it out")


TEXT_FIELDS = ("task_type", "username", "app_id", "start_date", "end_date", "batch", "unique_key", "run_at",
               "pinned_device_id", "prefer_device_id", "same_device_as", "if_exists")  # fmt: skip
NUMBER_FIELDS = ("priority", "parent_id", "delay_seconds", "give_up_seconds", "execution_timeout_seconds",
                 "max_retry_count", "max_batch_tasks", "prefer_seconds")  # fmt: skip


def _read_csv(path: Path, file: IO[str]) -> Iterator[Line]:
    """Columns are a task's fields; task_data.X is one value of task_data; any other goes into task_data as text."""
    csv.field_size_limit(LONGEST_TASK_BYTES)
    first = file.readline()
    file.seek(0)
    signs = [sign for sign in ",;\t" if sign in first]
    rows = csv.reader(file, delimiter=signs[0] if signs else ",", strict=True)
    header: list[str] = []
    number = 1  # a quoted cell may span lines: a row is named by its first
    try:
        for row in rows:
            if not header:
                header = _csv_header(path, row)
            elif any(row):
                if len(row) != len(header):
                    raise _wrong(path, f"line {number}", f"has {len(row)} cells, the first line has {len(header)}")
                yield Line(f"line {number}", _csv_task(path, number, zip(header, row)))
            number = rows.line_num + 1
    except csv.Error as error:
        raise _wrong(path, f"line {number}", f"is not CSV ({error})") from None
    if not header:
        raise _wrong(path, "line 1", "write the names of the columns, for instance task_type,username,app_id")


def _csv_header(path: Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if "task_type" not in names:
        raise _wrong(path, "line 1", "has no column task_type; write the names of the columns first")
    if "" in names or len(set(names)) < len(names):
        raise _wrong(path, "line 1", "has a column without a name or one name twice")
    return names


def _csv_task(path: Path, number: int, cells: Iterable[tuple[str, str]]) -> dict[str, Any]:
    task: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for name, cell in cells:
        if not cell:
            continue
        if name in TEXT_FIELDS:
            task[name] = cell
        elif name == "required_tags":
            task[name] = [tag for tag in re.split(r"[\s,;]+", cell) if tag]
        elif name in NUMBER_FIELDS or name == "task_data":
            task[name] = _json_cell(cell)
            if not isinstance(task[name], dict if name == "task_data" else (int, float)):
                what = "a JSON object" if name == "task_data" else "a number"
                raise _wrong(path, f"line {number}", f"column {name}: write {what} instead of {cell[:40]!r}")
        elif name.startswith("task_data."):
            more[name[len("task_data.") :]] = _json_cell(cell)
        else:
            more[name] = cell
    if more:
        task["task_data"] = {**task.get("task_data", {}), **more}
    return task


def _json_cell(cell: str) -> Any:
    """A number, true, a list or an object where the cell is one; else its text (00123 and 2026-01-01 are text)."""
    try:
        return json.loads(cell, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return cell
