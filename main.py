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
import hashlib
import importlib
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import IO, Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import settings as knobs
from client import CommandFailed, Master, Refused, master_address
from settings import MODES, ExitCode, Settings, SettingsError, one_line
from task_files import Line, canonical_json, read_tasks

CLIENT_KEYS = ("mode", "host", "port", "master_url", "ca_file", "insecure_http")
CHUNK_TASKS = 1000
# Below the master's smallest sensible limit for a body (8 MiB unless changed), with room for the envelope.
CHUNK_BYTES = 4 * 1024 * 1024


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
        advice = f"A {mode} cannot start: {error}; install what it needs: pip install -r {needed}"
        raise CommandFailed(advice, ExitCode.SETTINGS) from None
    return int(program.main(argv))


def show_status(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="main.py distribute", allow_abbrev=False)
    parser.add_argument(
        "--status", action="store_true", help="show devices, counts and the oldest waiting task, and end"
    )
    settings, arguments = _client_settings(argv, parser)
    master = Master(master_address(settings, arguments), settings.api_key, trust=settings, attempts=1)
    overview = master.get("/system/overview")
    devices = master.get("/devices").get("devices")
    if "tasks" not in overview or not isinstance(devices, list):
        raise master.not_a_master()
    print(status_text(master.url, overview, devices))
    return ExitCode.OK


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
    master = Master(master_address(settings, arguments), settings.api_key, trust=settings)
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
        yield _Prepared(line.place, canonical_json(task))


def content_key(task: dict[str, Any]) -> str:
    """The same content, the same key; what only says how to submit is left out."""
    content = {
        name: value for name, value in task.items() if name not in ("unique_key", "if_exists", "max_batch_tasks")
    }
    return "content-" + hashlib.sha256(canonical_json(content)).hexdigest()[:40]


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
        answer = master.post("/tasks", b"[" + b",".join(task.text for task in chunk) + b"]")
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
    master = Master(master_address(settings, arguments), settings.api_key, trust=settings)
    rows = -1 if arguments.format == "csv" else 0  # the names of the columns are no task
    with _destination(arguments.output) as output:
        for row in master.export(arguments.batch, arguments.format):
            output.write(row)
            rows += 1
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
