"""Who may import whom: the house stays a house."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# file -> what it may import besides the standard library, and why the line is drawn there
HOUSE: dict[str, tuple[str, str]] = {
    "settings": ("", "every program and every device reads it, so it must run anywhere"),
    "strategies": ("", "a strategy is a function of what it is given"),
    "clock": ("", "time is an argument everywhere else"),
    "reasons": ("", "why a task waits is worked out from rows, not looked up"),
    "values": ("msgspec", "which values may be stored is no matter of routes or tables"),
    "wire": ("msgspec values", "what a valid message is, is no matter of routes or tables"),
    "keys": ("reads schema store transaction", "whose key it is is no matter of requests"),
    "access": ("keys settings", "who may ask is decided before anything else is looked at"),
    "audit": ("access keys reads store transaction writer", "what is kept of calls knows no routes"),
    "latency": ("", "how long something took is a number, whatever it was"),
    "storage": ("", "what SQLite says of the disk is the same for every table"),
    "writer": ("peewee latency storage", "how a write becomes durable has nothing to do with tasks"),
    "schema": ("peewee", "tables know no verbs"),
    "transaction": ("", "what a job has changed so far is plain bookkeeping"),
    "limits": ("transaction", "how many may run is counted, wherever the tasks come from"),
    "lanes": ("limits schema transaction", "where a task waits is known before any verb"),
    "db": ("lanes limits schema transaction", "transitions know no HTTP, no schedule and no strategy"),
    "judging": ("db limits schema transaction", "what a report may still do is decided before any verb"),
    "retention": ("transaction", "what is over is deleted, whatever it was"),
    "devices": ("db judging schema transaction", "what a device is needs the verbs, not the API"),
    "store": ("peewee schema storage transaction writer", "the file and its lock are no matter of tasks"),
    "listing": ("", "how a list is walked is SQL alone"),
    "backlog": ("reads", "questions never use a verb"),
    "reads": ("peewee listing schema", "questions never use a verb"),
    "series": ("reads", "questions never use a verb"),
    "progress": ("reads series", "questions never use a verb"),
    "fleet": ("reads", "questions never use a verb"),
    "attention": ("reads schema", "questions never use a verb"),
    "history": ("reads transaction", "what is kept of what happened is what the verbs noted"),
    "about": ("db schema settings writer", "what is told of the master changes nothing"),
    "dispatcher": (
        "db devices limits schema store strategies transaction writer",
        "dispatch knows no HTTP and no schedule",
    ),
    "scheduler": (
        "schedule audit db devices dispatcher history keys lanes limits retention store transaction writer",
        "what time does knows no HTTP",
    ),
    "events": ("transaction", "telling what happened changes nothing"),
    "edge": ("", "what a device downloads is a file, no matter of routes"),
    "export": ("msgspec", "a file format is no matter of routes or tables"),
    "metrics": ("prometheus_client reads", "one home for Prometheus"),
    "openapi": ("msgspec values", "the document is made from types, not from handlers"),
    "replies": ("msgspec openapi", "the document is made from types, not from handlers"),
    "backups": (
        "artifacts audit db history schema storage store transaction",
        "a copy and its return are no matter of routes",
    ),
    "artifacts": ("connections db judging reads store transaction writer", "where files lie is no matter of routes"),
    "addresses": ("", "whose address it is can be told from the request alone"),
    "rates": ("", "how often is a number, whoever asks"),
    "connections": ("addresses", "a connection is a connection, whatever is asked on it"),
    "web": (
        "bottle access addresses artifacts audit connections devices keys latency openapi rates reads strategies wire writer",
        "one home for bottle",
    ),
    "api_batches": (
        "db history progress reads store transaction web wire",
        "a part of api.py, with a question of its own",
    ),
    "api_devices": (
        "devices fleet reads settings store transaction web wire writer",
        "a part of api.py, with a question of its own",
    ),
    "api_keys": (
        "access audit devices dispatcher keys store transaction web wire",
        "a part of api.py, with a question of its own",
    ),
    "api_limits": ("backlog lanes limits store web wire", "a part of api.py, with a question of its own"),
    "api_system": (
        "about access attention audit backlog backups dispatcher edge events fleet history keys latency openapi reads reasons scheduler schema series"
        " settings store strategies web wire writer",
        "a part of api.py, with a question of its own",
    ),
    "api": (
        "msgspec access api_batches api_devices api_keys api_limits api_system artifacts attention audit backlog backups connections db devices dispatcher edge"
        " events export fleet history judging keys latency metrics openapi progress reads reasons replies scheduler schema series settings store"
        " transaction values web wire",
        "routes are thin; they never run tasks or talk to other servers",
    ),
    "key_commands": (
        "access audit client clock devices keys settings store transaction wire",
        "a command uses the file, or the public API of the master that has it",
    ),
    "server": ("granian", "how the app meets the network is no matter of the app"),
    "master": (
        "access addresses api api_limits artifacts attention audit backlog backups clock connections db devices"
        " dispatcher edge events fleet history key_commands keys lanes latency limits metrics progress rates reads retention"
        " scheduler series server settings store strategies transaction web wire writer",
        "an outline of the master; never a worker's or an executor's",
    ),
    "worker": ("settings executors", "it is copied to machines that have nothing else"),
    "standalone": ("client demo settings", "it starts the same programs as in production and never opens the database"),
    "demo": ("client demo_site settings", "it uses the public API only"),
    "demo_site": ("", "it renders in child processes that see nothing else, and knows nothing of tasks"),
    "client": ("requests executors settings", "a command uses the public API only"),
    "task_files": ("client settings", "what a file of tasks says is no matter of HTTP"),
    "main": ("client settings task_files tqdm", "each mode is imported by its name when it is asked for"),
}
DEVICE = ("requests psutil settings executors", "a device has no peewee, no bottle and no schedule")
EXECUTORS = (
    "requests urllib3 charset_normalizer protego parsel lxml cssselect jmespath executors",
    "an edge machine has no peewee, no bottle and no schedule",
)


def rooms() -> list[str]:
    """The files at the top; not what a user has put beside them, which git does not know."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = done.stdout.split() if done.returncode == 0 else [path.name for path in ROOT.glob("*.py")]
    return sorted(name.removesuffix(".py") for name in names if "/" not in name)


def imports_of(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def foreign(path: Path) -> set[str]:
    import sys

    return {name for name in imports_of(path) if name not in sys.stdlib_module_names} - {"__future__"}


@pytest.mark.parametrize("name", rooms())
def test_a_file_imports_only_what_the_house_allows(name: str) -> None:
    assert name in HOUSE, f"{name}.py is new: which question does it answer, and whom may it import? Say so in HOUSE."
    allowed, why = HOUSE[name]
    surplus = foreign(ROOT / f"{name}.py") - set(allowed.split())
    assert not surplus, f"{name}.py must not import {', '.join(sorted(surplus))}: {why}."


@pytest.mark.parametrize("path", sorted((ROOT / "executors").rglob("*.py")), ids=lambda path: path.name)
def test_an_executor_needs_nothing_of_the_master(path: Path) -> None:
    allowed, why = DEVICE if path.parent.name == "device" else EXECUTORS
    surplus = foreign(path) - set(allowed.split())
    assert not surplus, f"executors/{path.name} must not import {', '.join(sorted(surplus))}: {why}."


@pytest.mark.parametrize(
    ("library", "home"),
    [("bottle", "web"), ("granian", "server"), ("schedule", "scheduler"), ("prometheus_client", "metrics")],
)
def test_each_library_has_one_home(library: str, home: str) -> None:
    users = [name for name in rooms() if library in imports_of(ROOT / f"{name}.py")]
    assert users == [home]


def test_the_dashboard_talks_to_the_public_api_only() -> None:
    ours = [path for path in sorted((ROOT / "static").rglob("*.js")) if "vendor" not in path.parts]
    assert len(ours) > 10
    for path in ours:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org|HOST|example\.org)\w", text), path.name
        assert "innerHTML" not in text and "eval(" not in text, path.name
        assert "fetch(" not in text or path.name == "api.js", path.name


def test_the_libraries_of_the_dashboard_are_those_that_its_list_names() -> None:
    vendor = ROOT / "static" / "vendor"
    told = (vendor / "README.md").read_text(encoding="utf-8")
    for path in (*vendor.glob("*.js"), *vendor.glob("*.css")):
        assert path.name in told and hashlib.sha256(path.read_bytes()).hexdigest() in told, path.name


def test_no_file_of_the_house_is_named_for_nothing() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "core", "models", "manager", "misc"}
    assert not vague & {Path(name).stem for name in rooms()}
    assert not vague & {path.stem for path in (ROOT / "executors").rglob("*.py")}
