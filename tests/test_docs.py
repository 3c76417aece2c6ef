"""Do the documents say what the code does? What is made from it is fresh, what is named in them exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import api
import artifacts
import db
import devices
import dispatcher
import judging
import reads
import scheduler
import schema
import settings
import strategies
import worker
import writer
from executors import task_executor
from executors.device import holding, pace, pulls, reports

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
GUIDE_ROUTES = """POST /devices/register
GET /devices
PUT /devices/{device_id}/status
POST /devices/{device_id}/heartbeat
POST /tasks
GET /tasks
PUT /tasks/{task_id}/assign
PUT /tasks/{task_id}/status
GET /tasks/pull
GET /system/overview
GET /devices/{device_id}/stats
GET /tasks/stats""".splitlines()
GUIDE_TABLES = ("af_device", "af_task_assignment", "af_device_heartbeat", "af_crawl_tasks")
GUIDE_CLASSES = ("TaskDispatcher", "DeviceManager", "TaskScheduler", "TaskExecutor", "LoadBalanceStrategy")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(page: str, language: str = r"\w*") -> list[str]:
    return [block for _, block in re.findall(rf"^```({language})\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]


def page_ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def operations() -> list[tuple[str, str]]:
    class NoHandlers:
        def __getattr__(self, name: str) -> Any:
            return lambda call: None

    return [(row.operation.method, row.operation.path) for _, rows in api.routes(NoHandlers()) for row in rows]  # type: ignore[arg-type]


def test_what_is_made_from_the_code_is_fresh() -> None:
    made = subprocess.run(
        [sys.executable, "scripts/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 0, made.stderr


def test_a_stale_page_is_noticed_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_docs

    (tmp_path / "docs").mkdir()
    for name in ("settings.md", "api.md", "design.md"):
        (tmp_path / "docs" / name).write_text(text(f"docs/{name}").replace("retention_days", "retention_dais"))
    fresh = {tmp_path / "docs" / path.name: made for path, made in make_docs.pages().items()}
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    monkeypatch.setattr(make_docs, "pages", lambda: fresh)
    assert make_docs.main(["--check"]) == 1
    assert "settings.md" in capsys.readouterr().err
    assert make_docs.main([]) == 0 and make_docs.main(["--check"]) == 0


@pytest.mark.parametrize("method, path", operations())
def test_every_route_is_in_the_documents(method: str, path: str) -> None:
    assert f"| {method} | `{path}` |" in text("docs/api.md")


@pytest.mark.parametrize("row", settings.SETTINGS, ids=lambda row: row.name)
def test_every_setting_is_in_the_documents(row: settings.Setting) -> None:
    line = next(line for line in text("docs/settings.md").splitlines() if line.startswith(f"| `{row.name}` |"))
    assert row.sentence in line.replace("\\|", "|")


@pytest.mark.parametrize("state", db.STATES)
def test_every_state_of_a_task_is_in_the_documents(state: str) -> None:
    assert f"| `{state}` |" in text("docs/design.md")


def test_every_state_of_an_attempt_and_a_device_is_in_the_documents() -> None:
    design = text("docs/design.md")
    checks = " ".join(str(check.sql) for check in schema.TaskAssignment._meta.constraints)
    for state in re.findall(r"'(\w+)'", checks):
        assert re.search(rf"Its states: [^.]*\b{state}\b", design), state
    for state in reads.DEVICE_STATES:
        assert f"`{state}`" in design, state


def test_every_exit_code_is_in_the_documents() -> None:
    for code in settings.ExitCode:
        assert f"| {int(code)} | {code.name.lower()} |" in text("docs/settings.md")
        for readme in READMES:
            assert re.search(rf"(Exit codes: |退出码：|[,，] ?){int(code)} ", readme.read_text(encoding="utf-8")), code


def test_the_owners_guide_is_mapped_line_by_line() -> None:
    page = text("docs/owner-guide.md")
    for route in GUIDE_ROUTES:
        assert f"| `{route}` |" in page, route
        assert tuple(route.split()) in operations(), route
    for name in (*settings.GUIDE_KEYS, *GUIDE_TABLES):
        assert f"| `{name}` |" in page, name
    for name in GUIDE_CLASSES:
        assert re.search(rf"^\| `[^|]*\b{name}`", page, re.MULTILINE), name
    tables = {table._meta.table_name for table in schema.TABLES}
    assert tables >= set(GUIDE_TABLES)
    for name in tables:
        assert f"`{name}`" in page, name


def test_both_readmes_have_the_same_code_pictures_and_sections() -> None:
    english, chinese = (readme.read_text(encoding="utf-8") for readme in READMES)
    assert code_blocks(english) == code_blocks(chinese)
    for pattern in (r"^(#+) ", r"!\[.*?\]\((.*?)\)", r"^(\||- \*\*)"):
        ours = re.findall(pattern, chinese.replace(".zh-CN.png", ".png"), re.MULTILINE)
        assert re.findall(pattern, english, re.MULTILINE) == ours, pattern

    def names(page: str) -> list[str]:
        return sorted(set(re.findall(r"`([^`\n]+)`", page)))

    assert names(english) == names(chinese)


def test_the_first_screen_of_the_readme_has_the_picture_and_the_two_commands() -> None:
    for readme in READMES:
        page = readme.read_text(encoding="utf-8")
        assert page.index("docs/images/dashboard") < page.index("make demo") < page.index("make test") < 2000
        assert code_blocks(page)[0] == "make demo\nmake test\n"
        [picture] = re.findall(r"!\[.*?\]\((.*?)\)", page)
        assert (ROOT / picture).stat().st_size < 300_000


def test_commands_in_the_readme_name_files_and_targets_that_exist() -> None:
    commands = "".join(code_blocks(text("README.md"), "bash"))
    made_here = {"my_tasks.py"}
    for name in re.findall(r"[\w/]+\.py\b", commands):
        assert name in made_here or (ROOT / name).is_file(), name
    makefile = text("Makefile")
    for target in re.findall(r"^make (\S+)", commands, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    known = {row.flag for row in settings.SETTINGS}
    sources = "".join(
        path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("deploy/*.py")]
    )
    for line in re.findall(r"^python .*", commands, re.MULTILINE):
        for flag in re.findall(r"--[\w-]+", line):
            assert flag in known or f'"{flag}"' in sources, flag


def test_the_guides_executor_runs_as_it_is_printed(tmp_path: Path) -> None:
    for page in ("README.md", "docs/executors.md"):
        example = next(block for block in code_blocks(text(page), "python") if "custom_task" in block)
        file = tmp_path / f"{page.partition('.')[0].replace('/', '_')}.py"
        file.write_text(example, encoding="utf-8")
        executor = task_executor.load_executors([str(file)])["custom_task"]
        outcome = task_executor.run(executor, {"id": 1, "task_type": "custom_task", "task_data": {}})
        assert (outcome.outcome, outcome.result) == ("completed", {"status": "success"})


def test_the_longer_example_of_an_executor_runs(tmp_path: Path) -> None:
    file = tmp_path / "report.py"
    file.write_text(next(block for block in code_blocks(text("docs/executors.md"), "python") if "Snooze(" in block))
    executor = task_executor.load_executors([str(file)])["report"]
    done = task_executor.run(executor, {"id": 1, "task_type": "report", "task_data": {"names": ["a", "b"]}})
    assert done.result == {"done": ["a", "b"]} and [task["unique_key"] for task in done.new_tasks] == ["a", "b"]
    snoozed = task_executor.run(executor, {"id": 1, "task_type": "report", "task_data": {}})
    assert (snoozed.outcome, snoozed.snooze_seconds) == ("snoozed", 60)


def test_the_example_of_a_strategy_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_strategies.py").write_text(code_blocks(text("docs/owner-guide.md"), "python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    strategy = strategies.find_strategy("my_strategies:CustomLoadBalancer")
    full, free = strategies.Candidate("a", 2, 2), strategies.Candidate("b", 2, 8)
    assert strategy([full, free], None) is free


DEFAULTS = settings.Settings()


@pytest.mark.parametrize(
    "fragment",
    [
        f"on {db.LOST_ON_DEVICES_LIMIT} different devices, or {db.LOST_LIMIT} times in all",
        f"The newest {db.KEPT_ATTEMPTS} attempts are kept",
        f"up to {judging.ARTIFACTS_LIMIT} an attempt, each up to `max_artifact_bytes` ({DEFAULTS.max_artifact_bytes // 2**20} MiB)",
        f"by {db.GRACE_SECONDS:g} s and a second for each {db.SLOWEST_UPLOAD_BYTES // 1024} KiB",
        f"the last {artifacts.KEPT_FREE_BYTES // 2**20} MiB of the disk",
        f"more than `artifact_max_bytes` ({DEFAULTS.artifact_max_bytes // 2**30} GiB) wait",
        f"with a wait of {DEFAULTS.retry_backoff_seconds}, {2 * DEFAULTS.retry_backoff_seconds}, {4 * DEFAULTS.retry_backoff_seconds} s",
        f"`give_up_at` ({DEFAULTS.give_up_days} days",
        f"at most {dispatcher.LANE_LIMIT}: top priority first",
        f"at most {dispatcher.TASKS_A_VISIT} tasks a visit",
        f"at most {dispatcher.CANDIDATE_LIMIT} candidates",
        f"come back in {dispatcher.BUSY_POLL_SECONDS[0] * 0.5:g} to {dispatcher.BUSY_POLL_SECONDS[0] * 1.5:g} s, later (up"
        f" to {dispatcher.BUSY_POLL_SECONDS[1] * 1.5:g} s) where they would be more than {dispatcher.BUSY_POLLS_A_SECOND} a second",
        f"at most {writer.GROUP_LIMIT} jobs",
        f"stops at its limit or after {reads.PAGE_SECONDS * 1000:g} ms",
        f"stop at {reads.COUNT_CAP:,}",
        f"A gap of more than {scheduler.PAUSE_TICKS_SECONDS:g} s between two ticks",
        f"{scheduler.CHUNK} at a time",
        f"held up to {DEFAULTS.pull_wait_seconds:g} s",
        f"full for {pulls.FULL_SECONDS:g} s holds one with `limit` 0",
        f"{holding.SHORTEST_PATIENCE_SECONDS:g} s at least, and {worker.DEPUTY_EXTRA_SECONDS:g} s more",
        f"Every {DEFAULTS.heartbeat_interval:g} s, from a thread of its own",
        f"After `device_timeout` ({DEFAULTS.device_timeout:g} s)",
        f"the master takes it back {db.GRACE_SECONDS:g} s later",
        f"Up to {reports.REPORTS_PER_REQUEST} in a request",
        f"Each has `start_within_seconds` {db.START_WITHIN_SECONDS:g}: the device hands back what it has not begun by then,"
        f" and {db.GIVE_AWAY_SECONDS:g} s later",
        f"keep a slot for under {pace.SHORT_SECONDS:g} s on average",
        f"up to {pace.AHEAD_SECONDS:g} s of work, at most {pace.AHEAD_LIMIT} tasks",
        f"is full ({DEFAULTS.spool_max_bytes // 2**20} MiB)",
        f"running tasks get {DEFAULTS.drain_seconds:g} s",
        f"spread over {DEFAULTS.reconnect_seconds:g} s after an outage",
    ],
)
def test_the_numbers_of_the_design_are_those_of_the_code(fragment: str) -> None:
    assert fragment in text("docs/design.md")


def test_the_third_takeover_in_five_minutes_is_the_one_that_conflicts() -> None:
    assert (devices.BOOTS_TO_CONFLICT, devices.BOOT_WINDOW_SECONDS) == (3, 300.0)
    assert "third takeover within five minutes" in text("docs/design.md")


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_links_lead_to_files_of_this_project(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert "://" not in target, f"{target}: the documents need no network"
        found = (page.parent / target.partition("#")[0]).resolve()
        assert found.is_relative_to(ROOT) and found.exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_a_document_knows_nothing_of_where_and_how_it_was_written(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    if len(ROOT.parts) > 2:
        assert str(ROOT) not in content
    assert not re.search(r"\bissue #?\d|\bTODO\b|\bFIXME\b|\bstub\b", content, re.IGNORECASE)
    for host in re.findall(r"https?://([^/\s:`'\"*]+)", content):
        assert re.fullmatch(r"127\.0\.0\.1|localhost|192\.168\.\d+\.\d+|HOST|example\.org|hq1\.appsflyer\.com", host), (
            host
        )


def test_a_decision_has_at_most_ten_lines() -> None:
    for entry in text("docs/decisions.md").split("\n## ")[1:]:
        title, _, body = entry.partition("\n")
        lines = sum(-(-len(line) // 160) for line in body.strip().splitlines() if line)
        assert lines <= 10, title


def test_every_test_that_a_promise_names_exists() -> None:
    page = text("docs/guarantees.md") + text("SECURITY.md")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    shown = set(re.findall(r"^\| (G\d+) \| `tests/", page, re.MULTILINE))
    assert shown == {f"G{n}" for n in range(1, 16)}
    missing = [f"{path}::{name}" for path, name in named if not re.search(rf"^def {name}\(", text(path), re.MULTILINE)]
    assert not missing
