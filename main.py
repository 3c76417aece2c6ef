"""What does a person type? The guide's front door, and the two commands of the first hour.

    python main.py distribute --mode master|worker|standalone [--config FILE] [--host ...] [--port ...] [...]
    python main.py distribute --status
    python main.py submit FILE.json|.jsonl|.csv [--batch NAME]
    python main.py results BATCH [--format jsonl|csv] [--output FILE]

A mode's program is imported only when it is started, so that a device needs nothing of the master's. --status, submit
and results know the master's public API only, never its database. They end with 1 when no master answers or an export
is cut off, 2 when the input is wrong, 8 when the key is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import ipaddress
import json
import os
import random
import re
import sys
import time
import unicodedata
import urllib.parse
from pathlib import Path
from typing import IO, Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import settings as knobs
from settings import MODES, ExitCode, Settings, SettingsError, one_line

CLIENT_KEYS = ("mode", "host", "port", "master_url")
CHUNK_TASKS = 1000
# Below the master's smallest sensible limit for a body (8 MiB unless changed), with room for the envelope.
CHUNK_BYTES = 4 * 1024 * 1024
LONGEST_TASK_BYTES = 4 * 1024 * 1024
READ_BYTES = 64 * 1024
# Waits of about 0.5, 1, 2, 4 and 8 s: a master that restarts is back by then.
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
CONNECT_AND_READ_SECONDS = (5.0, 60.0)
BUSY_STATUSES = (429, 502, 503, 504)


class CommandFailed(Exception):
    """One sentence for stderr and the exit code."""

    def __init__(self, message: str, exit_code: int = ExitCode.UNREACHABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# ---- the master, from outside ----


def master_address(settings: Settings, arguments: argparse.Namespace) -> str:
    """Where commands find the master: what was said last and most clearly, else the mode's own way to know it."""
    says_url = bool(arguments.master_url or os.environ.get("AF_MASTER_URL"))
    says_host = bool(arguments.host or arguments.port)
    if arguments.master_url or (not says_host and (says_url or settings.mode == "worker")):
        return settings.master_url
    if settings.port == 0:
        raise CommandFailed(
            "port 0 means any free port; say which it is with --port or --master-url", ExitCode.SETTINGS
        )
    host = settings.host.strip("[]")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # listens everywhere, so also here
            host = "127.0.0.1" if address.version == 4 else "::1"
        if address.version == 6:
            host = f"[{host}]"
    return f"http://{host}:{settings.port}"


class Master:
    """The public API of one master, with the key, bounded retries, and every trouble as one CommandFailed."""

    def __init__(
        self, url: str, api_key: str, *, attempts: int = ATTEMPTS, pause: Callable[[float], None] = time.sleep
    ):
        import requests

        self.url = url
        self._attempts = attempts
        self._pause = pause
        self._errors = requests.exceptions
        self._session = requests.Session()
        # A proxy from the environment is never the way to this machine.
        self._session.trust_env = not knobs.is_loopback(urllib.parse.urlsplit(url).hostname or "")

        def authorize(request: Any) -> Any:
            """As an auth hook, so that a .netrc cannot put another password in its place."""
            if api_key:
                request.headers["Authorization"] = f"Bearer {api_key}"
            return request

        self._session.auth = authorize

    def get(self, path: str, **parameters: object) -> Any:
        return self._json(self._answer("GET", path, params=parameters))

    def post(self, path: str, body: bytes) -> Any:
        return self._json(self._answer("POST", path, data=body, headers={"Content-Type": "application/json"}))

    @contextlib.contextmanager
    def stream(self, path: str, **parameters: object) -> Iterator[Iterator[bytes]]:
        """The body in pieces; a connection that breaks in the middle raises CommandFailed."""
        response = self._answer("GET", path, params=parameters, stream=True)
        if response.status_code >= 400:
            self._json(response)

        def pieces() -> Iterator[bytes]:
            try:
                yield from response.iter_content(READ_BYTES)
            except self._errors.RequestException:
                raise CommandFailed(
                    f"The master at {self.url} broke off in the middle; run the command again."
                ) from None

        try:
            yield pieces()
        finally:
            response.close()

    def _answer(self, method: str, path: str, **how: Any) -> Any:
        """The first answer that is not "busy"; every request here may be sent twice, because unique keys make it so."""
        trouble = ""
        for attempt in range(self._attempts):
            wait = FIRST_WAIT_SECONDS * 2**attempt
            try:
                response = self._session.request(
                    method, f"{self.url}/api/distribution{path}",
                    timeout=CONNECT_AND_READ_SECONDS, allow_redirects=False, **how,
                )  # fmt: skip
            except (self._errors.ConnectionError, self._errors.Timeout, self._errors.ChunkedEncodingError) as error:
                trouble = _reason(error)
            except self._errors.RequestException as error:
                raise CommandFailed(f"{self.url} cannot be asked: {one_line(str(error))}", ExitCode.SETTINGS) from None
            else:
                if response.status_code not in BUSY_STATUSES:
                    return self._judged(response)
                trouble = f"it is busy ({response.status_code})"
                wait = max(wait, _retry_after(response))
                response.close()
            if attempt + 1 < self._attempts:
                self._pause(min(wait, LONGEST_WAIT_SECONDS) * random.uniform(0.8, 1.2))
        raise CommandFailed(
            f"No master answers at {self.url}: {trouble}; start it, or say where it is with --master-url or --mode."
        )

    def _judged(self, response: Any) -> Any:
        status = response.status_code
        if status in (401, 403):
            raise CommandFailed(
                f"The master at {self.url} refused the key; write its api_key into the config file or set AF_API_KEY.",
                ExitCode.REFUSED,
            )
        kind = response.headers.get("Content-Type", "")
        if 300 <= status < 400 or "html" in kind or (status >= 400 and "json" not in kind):
            raise CommandFailed(f"What answers at {self.url} is no master (status {status}); check address and port.")
        return response

    def _json(self, response: Any) -> Any:
        try:
            answer = response.json()
        except (ValueError, self._errors.RequestException):
            raise CommandFailed(f"What answers at {self.url} is no master; check address and port.") from None
        if response.status_code >= 400:
            raise Refused(response.status_code, answer if isinstance(answer, dict) else {})
        return answer


class Refused(CommandFailed):
    """The master understood and said no; `problem` is its application/problem+json."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        detail = one_line(str(problem.get("detail") or problem.get("title") or "no reason given"))
        exit_code = ExitCode.UNREACHABLE if status >= 500 else ExitCode.SETTINGS
        super().__init__(f"The master refused ({status}): {detail}", exit_code)
        self.status, self.detail, self.field = status, detail, str(problem.get("field") or "")


def _reason(error: Exception) -> str:
    """The part of a nested connection error that a person can use."""
    if "timed out" in str(error).lower():
        return "it did not answer in time"
    found = re.search(r"\] ([A-Z][A-Za-z ,]+)", str(error)) or re.search(r"(CERTIFICATE_VERIFY_FAILED)", str(error))
    return found.group(1).strip().lower() if found else "the connection failed"


def _retry_after(response: Any) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"[0-9]{1,6}", value) else 0.0


# ---- distribute ----


def distribute(argv: list[str]) -> int:
    """Start a mode, or with --status show how the fleet is."""
    parser = argparse.ArgumentParser(prog="main.py distribute", allow_abbrev=False, add_help=False)
    parser.add_argument("--mode", choices=MODES, help="which program to start; its own --help shows all its flags")
    parser.add_argument(
        "--status", action="store_true", help="show devices, counts and the oldest waiting task, and end"
    )
    parser.add_argument("--config", metavar="FILE", help="instead of config/distribution_<mode>.json")
    parser.add_argument("--version", action="version", version=f"af-distribution {knobs.VERSION}")
    known, others = parser.parse_known_args(argv)
    wants_help = "-h" in others or "--help" in others
    if known.status:
        return show_status(argv)
    mode = known.mode or os.environ.get("AF_MODE") or (knobs.mode_in_file(Path(known.config)) if known.config else None)
    if mode not in MODES:
        if wants_help:
            parser.print_help()
            return ExitCode.OK
        raise SettingsError("--mode", "", None, f"write --mode {', '.join(MODES[:-1])} or {MODES[-1]}, or --status")
    config = ["--config", known.config] if known.config else []
    return start(mode, ["--mode", mode, *config, *others])


def start(mode: str, argv: list[str]) -> int:
    """Hand over to the mode's program; what it needs is imported only now."""
    try:
        program = importlib.import_module(mode)
    except ModuleNotFoundError as error:
        needed = "requirements-worker.txt" if mode == "worker" else "requirements.txt"
        advice = f"{error} is needed to start a {mode}; install it: pip install -r {needed}"
        raise CommandFailed(advice, ExitCode.SETTINGS) from None
    return int(program.main(argv))


def show_status(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="main.py distribute", allow_abbrev=False)
    parser.add_argument(
        "--status", action="store_true", help="show devices, counts and the oldest waiting task, and end"
    )
    settings, arguments = _client_settings(argv, parser)
    master = Master(master_address(settings, arguments), settings.api_key, attempts=1)
    overview = _object(master, master.get("/system/overview"))
    devices = _object(master, master.get("/devices")).get("devices")
    if "tasks" not in overview or not isinstance(devices, list):
        raise CommandFailed(f"What answers at {master.url} is no master; check address and port.")
    print(status_text(master.url, overview, devices))
    return ExitCode.OK


def _object(master: Master, answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise CommandFailed(f"What answers at {master.url} is no master; check address and port.")
    return answer


def status_text(url: str, overview: dict[str, Any], devices: Sequence[dict[str, Any]]) -> str:
    """The fleet on one screen: master, counts, rates, what waits longest and why, a line a device."""
    rates = overview.get("rates") or {}
    uptime = _duration(overview.get("uptime_seconds"))
    lines = [
        f"master   {url}   version {overview.get('version')}   up {uptime}   strategy {overview.get('strategy')}",
        f"tasks    {_counts(overview.get('tasks'))}",
        f"devices  {_counts(overview.get('devices'))}",
        f"rates    last minute {rates.get('completed_last_minute', 0)} completed, "
        f"{rates.get('failed_last_minute', 0)} failed; "
        f"last hour {rates.get('completed_last_hour', 0)} completed, {rates.get('failed_last_hour', 0)} failed",
        f"waiting  {_oldest(overview.get('oldest_waiting'))}",
        "",
    ]
    if not devices:
        return one_line_each([*lines, "No device has registered yet: python worker.py --device-id NAME"])
    return one_line_each([*lines, *_table([DEVICE_COLUMNS, *map(_device_row, devices)])])


DEVICE_COLUMNS = ("DEVICE", "NAME", "STATUS", "TASKS", "CPU", "MEMORY", "DISK", "DONE", "FAILED", "LAST SEEN")


def _device_row(device: dict[str, Any]) -> tuple[str, ...]:
    seen = device.get("seconds_since_heartbeat")
    return (
        str(device.get("device_id")),
        str(device.get("device_name") or ""),
        str(device.get("status")),
        f"{device.get('assigned_count', 0)}/{device.get('max_concurrent_tasks', '?')}",
        *(_percent(device.get(name)) for name in ("cpu_usage", "memory_usage", "disk_usage")),
        str(device.get("completed_count", 0)),
        str(device.get("failed_count", 0)),
        "never" if seen is None else f"{_duration(seen)} ago",
    )


def one_line_each(lines: Iterable[str]) -> str:
    return "\n".join(one_line(line).rstrip() for line in lines)


def _counts(counts: object) -> str:
    return "   ".join(f"{name} {count}" for name, count in counts.items()) if isinstance(counts, dict) else "unknown"


def _oldest(oldest: object) -> str:
    if not isinstance(oldest, dict):
        return "no task waits"
    detail = oldest.get("detail") or oldest.get("reason") or "unknown"
    return f"task {oldest.get('task_id')} since {_duration(oldest.get('waiting_seconds'))}: {detail}"


def _percent(value: object) -> str:
    return f"{value:.0f} %" if isinstance(value, (int, float)) else "-"


def _duration(seconds: object) -> str:
    """Two units are enough for a person: 3 h 12 min, 4 d 2 h, 9 s."""
    if not isinstance(seconds, (int, float)):
        return "unknown"
    whole = int(seconds)
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((index for index, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count or unit == "s")


def _width(text: str) -> int:
    """Columns on a terminal: a Chinese sign takes two."""
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*rows)]
    return ["  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths)) for row in rows]


# ---- submit: what the file says ----


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
        size = len(_dumps(line.task))
    except UnicodeEncodeError:
        raise _wrong(path, line.place, "holds half a character (a lone surrogate); write it again") from None
    except (ValueError, RecursionError):
        raise _wrong(path, line.place, "holds a number or a depth that JSON does not have") from None
    if size > LONGEST_TASK_BYTES:
        raise _wrong(path, line.place, f"is larger than {LONGEST_TASK_BYTES >> 20} MiB")


def _dumps(task: object) -> bytes:
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
               "pinned_device_id", "prefer_device_id", "if_exists")  # fmt: skip
NUMBER_FIELDS = ("priority", "parent_id", "delay_seconds", "give_up_seconds", "execution_timeout_seconds",
                 "max_retry_count", "max_batch_tasks")  # fmt: skip


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


# ---- submit: sending ----


def submit(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="main.py submit",
        description="Submit a file of tasks. A task without a unique_key gets one made of its content: the same "
        "content twice in one batch is one task, so running the same submit again creates nothing twice.",
    )
    parser.add_argument("file", metavar="FILE", help="one that ends in .json, .jsonl or .csv")
    parser.add_argument("--batch", help="the batch of the tasks that name none; then: main.py results BATCH")
    settings, arguments = _client_settings(argv, parser)
    path = Path(arguments.file)
    total = sum(1 for _ in read_tasks(path))  # the whole file is read before anything is sent
    if not total:
        raise CommandFailed(f"{path} holds no task", ExitCode.SETTINGS)
    master = Master(master_address(settings, arguments), settings.api_key)
    counts: dict[str, int] = {}
    with _progress(total) as advance:
        for chunk in _chunks(_prepared(read_tasks(path), arguments.batch)):
            _send(master, path, chunk, counts)
            advance(len(chunk))
    created, refused = counts.get("created", 0), counts.get("batch_full", 0)
    over = f", {refused} over the limit of their batch" if refused else ""
    print(f"{created} created, {counts.get('existing', 0)} already there{over}")
    print("Running the same submit again creates nothing twice." if created else "Nothing new was in the file.")
    if arguments.batch:
        print(f"Results: python main.py results {arguments.batch}")
    return ExitCode.OK


class _Prepared(NamedTuple):
    place: str
    text: bytes


def _prepared(lines: Iterable[Line], batch: str | None) -> Iterator[_Prepared]:
    for line in lines:
        task = dict(line.task)
        if batch and task.get("batch") is None:
            task["batch"] = batch
        if task.get("unique_key") is None:
            task["unique_key"] = content_key(task)
        yield _Prepared(line.place, _dumps(task))


def content_key(task: dict[str, Any]) -> str:
    """The same content, the same key; what only says how to submit is left out."""
    content = {
        name: value for name, value in task.items() if name not in ("unique_key", "if_exists", "max_batch_tasks")
    }
    return "content-" + hashlib.sha256(_dumps(content)).hexdigest()[:40]


def _chunks(tasks: Iterable[_Prepared]) -> Iterator[list[_Prepared]]:
    chunk: list[_Prepared] = []
    size = 0
    for task in tasks:
        if chunk and (len(chunk) >= CHUNK_TASKS or size + len(task.text) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(task)
        size += len(task.text) + 1
    if chunk:
        yield chunk


def _send(master: Master, path: Path, chunk: Sequence[_Prepared], counts: dict[str, int]) -> None:
    """Post one chunk and count the answers; one that is too large for this master goes in halves."""
    try:
        answer = _object(master, master.post("/tasks", b"[" + b",".join(task.text for task in chunk) + b"]"))
    except Refused as error:
        if error.status == 413 and len(chunk) > 1:
            middle = len(chunk) // 2
            _send(master, path, chunk[:middle], counts)
            _send(master, path, chunk[middle:], counts)
            return
        raise _named_by_line(path, chunk, error, sum(counts.values())) from None
    entries = answer.get("tasks")
    if not isinstance(entries, list) or len(entries) != len(chunk):
        raise CommandFailed(f"The master at {master.url} answered something else than one entry a task; is it newer?")
    for entry in entries:
        what = "created" if entry.get("created") else "batch_full" if entry.get("id") is None else "existing"
        counts[what] = counts.get(what, 0) + 1


def _named_by_line(path: Path, chunk: Sequence[_Prepared], error: Refused, sent: int) -> CommandFailed:
    found = re.search(r"\[([0-9]{1,6})\]\.?", error.field) or re.search(r"\[([0-9]{1,6})\]\.?", error.detail)
    if found and int(found.group(1)) < len(chunk):
        where = chunk[int(found.group(1))].place
        field = error.field.split("]", 1)[-1].lstrip(".")
        detail = error.detail.replace(found.group(), "")  # the place in what was sent; the line says more
        problem = f"{field}: {detail}" if field and field not in detail else detail
    else:
        where, problem = f"{chunk[0].place} to {chunk[-1].place}", error.detail
    before = f" The {sent} tasks before it were sent; the same submit again creates nothing twice." if sent else ""
    return CommandFailed(f"{path}, {where}: {problem}.{before}".replace("..", "."), ExitCode.SETTINGS)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; a plain line a tenth where stdout goes into a file, or without tqdm."""
    with contextlib.suppress(ImportError):
        if sys.stdout.isatty():
            from tqdm import tqdm

            with tqdm(total=total, unit=" tasks", file=sys.stdout) as bar:
                yield bar.update
            return
    done = shown = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if done * 10 // total > shown * 10 // total:
            shown = done
            print(f"sent {done} of {total} tasks", flush=True)

    yield advance


# ---- results ----


def results(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="main.py results", description="Export the tasks of a batch with results.")
    parser.add_argument("batch", metavar="BATCH")
    parser.add_argument("--format", choices=("jsonl", "csv"), default="jsonl")
    parser.add_argument("--output", metavar="FILE", help="instead of standard output; written whole or not at all")
    settings, arguments = _client_settings(argv, parser)
    master = Master(master_address(settings, arguments), settings.api_key)
    how = {"format": arguments.format, "batch": arguments.batch, "include": "result"}
    with _destination(arguments.output) as output, master.stream("/tasks/export", **how) as pieces:
        rows = copy_export(pieces, output, arguments.format)
    note = f"{rows} tasks" if rows else f"no task in batch {arguments.batch}: check its name"
    print(one_line(note + (f" in {arguments.output}" if arguments.output else "")), file=sys.stderr)
    return ExitCode.OK


@contextlib.contextmanager
def _destination(name: str | None) -> Iterator[IO[bytes]]:
    if not name:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    partial = Path(name + ".part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(name)
    except OSError as error:
        raise CommandFailed(f"{name} cannot be written: {error.strerror}", ExitCode.SETTINGS) from None
    finally:
        partial.unlink(missing_ok=True)


def copy_export(pieces: Iterable[bytes], output: IO[bytes], form: str) -> int:
    """Copy the rows, hold back and check the end mark, return the rows; CommandFailed where the export is not whole."""
    rows, last = 0, b""
    in_quotes = False  # a line end inside a quoted cell of CSV does not end its row
    for line in _lines(pieces):
        if last:
            output.write(last)
            in_quotes ^= form == "csv" and last.count(b'"') % 2 == 1
            rows += not in_quotes
        last = line
    promised = None if in_quotes else _end_mark(last, form)
    rows -= form == "csv"  # the names of the columns
    if promised != rows:
        said = "without its end mark" if promised is None else f"with {rows} of {promised} rows"
        raise CommandFailed(f"The export ended {said}: it is not complete; run the command again.")
    return rows


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines with their ends; a last one without an end is a line too."""
    rest: list[bytes] = []
    for piece in pieces:
        *whole, tail = piece.split(b"\n")
        for part in whole:
            yield b"".join(rest) + part + b"\n"
            rest = []
        rest.append(tail)
    if any(rest):
        yield b"".join(rest)


def _end_mark(line: bytes, form: str) -> int | None:
    """How many rows the last line promises, None where it is no end mark."""
    if form == "csv":
        found = re.fullmatch(rb"# end rows=([0-9]{1,18})\s*", line)
        return int(found.group(1)) if found else None
    with contextlib.suppress(ValueError, RecursionError):
        mark = json.loads(line)
        if (
            isinstance(mark, dict)
            and set(mark) == {"end", "rows"}
            and mark["end"] is True
            and type(mark["rows"]) is int
        ):
            return int(mark["rows"])
    return None


# ---- the front door ----


def _client_settings(argv: list[str], parser: argparse.ArgumentParser) -> tuple[Settings, argparse.Namespace]:
    """Address and key for a command that asks a running master; without --mode the first config file that is there."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode")
    first.add_argument("--config")
    known, _ = first.parse_known_args(argv)
    there = [mode for mode in ("master", "worker", "standalone") if knobs.default_config_path(mode).is_file()]
    in_file = knobs.mode_in_file(Path(known.config)) if known.config else None
    mode = known.mode or os.environ.get("AF_MODE") or in_file or (there[0] if there else "master")
    if mode not in MODES:
        raise SettingsError("--mode" if known.mode else "AF_MODE", "", None, f"write {', '.join(MODES)}")
    return knobs.from_arguments(mode, argv, parser=parser, keys=CLIENT_KEYS, starting=False)


COMMANDS: dict[str, Callable[[list[str]], int]] = {"distribute": distribute, "submit": submit, "results": results}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"af-distribution {knobs.VERSION}")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="COMMAND --help shows them")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a sign shows an escape instead of a traceback
            stream.reconfigure(errors="backslashreplace")
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments.rest)
    except SettingsError as error:
        knobs.stop(error)
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"{error}; install it: pip install -r requirements-worker.txt", file=sys.stderr)
        return ExitCode.SETTINGS
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except KeyboardInterrupt:
        print("Interrupted; run the same command again.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
