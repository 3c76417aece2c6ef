"""One machine, one command: standalone.py with its children, and the demo as a stranger runs it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import requests
from farm import Program, wait_for
from test_demo_site import SMALL, expected_site

from demo_site import build_site


def start(programs: list[Program], folder: Path, *arguments: str, **settings: Any) -> Program:
    values = {
        "mode": "standalone",
        "port": 0,
        "database": str(folder / "distribution.db"),
        "state_folder": str(folder / "worker"),
        "log_file": str(folder / "distribution.log"),
        "concurrent_tasks": 8,
        **settings,
    }
    program = Program("standalone.py", folder, values, "--output", str(folder / "output"), *arguments)
    programs.append(program)
    return program


def dashboard_of(program: Program) -> str:
    line = wait_for("the dashboard's address", lambda: [at for at in program.lines if at.startswith("dashboard: ")])
    return str(line[0].split()[1])


def children_of(pid: int) -> list[int]:
    """The processes that this one started, by /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == pid and words[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def place_small_site(folder: Path) -> Path:
    """Some pages where the demo looks for its site, as if rendered before."""
    small = build_site(folder / "demo-site", modules=SMALL)
    return small.rename(small.with_name(small.name.removesuffix("-" + "-".join(SMALL))))


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """`standalone.py --demo --exit`, run to its end, and its output folder."""
    folder = tmp_path_factory.mktemp("demo")
    if request.param == "small":
        place_small_site(folder)
    started: list[Program] = []
    program = start(started, folder, "--demo", "--exit")
    try:
        assert program.wait(250) == 0, program.output
    finally:
        program.kill()
    (batch,) = (path for path in (folder / "output" / "demo").iterdir() if path.is_dir())
    return program, batch


def site_of(program: Program) -> Path:
    return Path(next(line for line in program.lines if line.startswith("site: ")).split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["whole"], indirect=True)
def test_the_demos_site_has_300_to_450_reachable_pages_and_some_dead_links(demo: tuple[Program, Path]) -> None:
    site = site_of(demo[0])
    reachable, dead = expected_site(site)
    assert 300 <= len(reachable) <= 450
    assert 10 <= len(dead) <= 100
    assert {path.name for path in site.glob("*.html")} == reachable
    assert not any("index.html" in sources for sources in dead.values())


def test_the_demo_finds_the_reachable_pages_and_dead_links_of_its_site(demo: tuple[Program, Path]) -> None:
    program, batch = demo
    pages = [json.loads(line) for line in (batch / "pages.jsonl").read_text(encoding="utf-8").splitlines()]
    reachable, dead = expected_site(site_of(program))
    assert len(reachable) > 5 and dead
    found = {page["url"].split("/", 3)[3] or "index.html": page["status"] for page in pages}
    assert {name for name, status in found.items() if status == 200} == reachable
    lines = (batch / "dead-links.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert {line.split("\t")[1].rpartition("/")[2] for line in lines} == set(dead)


def test_the_demo_shows_progress_and_a_summary_without_noise(demo: tuple[Program, Path]) -> None:
    program, batch = demo
    assert any("pages/s" in line for line in program.lines)
    assert f"{batch}/" in program.output
    assert not [line for line in program.lines if " INFO " in line or "Traceback" in line]


def test_ctrl_c_lets_the_worker_drain_and_stops_everything(programs: list[Program], tmp_path: Path) -> None:
    program = start(programs, tmp_path)
    dashboard_of(program)
    children = wait_for("both children", lambda: len(found := children_of(program.process.pid)) == 2 and found)
    assert program.stop(signal.SIGINT) == 0
    assert not [pid for pid in children if is_alive(pid)]
    assert not (tmp_path / "distribution.db-wal").exists()


def test_a_killed_parent_leaves_nothing_running(programs: list[Program], tmp_path: Path) -> None:
    program = start(programs, tmp_path)
    dashboard_of(program)
    children = wait_for("both children", lambda: len(found := children_of(program.process.pid)) == 2 and found)
    program.kill()
    wait_for("the children to end", lambda: not [pid for pid in children if is_alive(pid)])


def test_a_child_that_is_killed_is_started_again(programs: list[Program], tmp_path: Path) -> None:
    program = start(programs, tmp_path)
    url = dashboard_of(program)
    before = wait_for("both children", lambda: len(found := children_of(program.process.pid)) == 2 and set(found))
    for pid in before:
        os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        found = set(children_of(program.process.pid))
        return len(found) == 2 and not found & before

    wait_for("two new children", replaced)

    def online() -> bool:
        try:
            listed = requests.get(f"{url}/api/distribution/devices", timeout=60).json()["devices"]
        except (requests.RequestException, ValueError):
            return False
        return [device["status"] for device in listed] == ["online"]

    wait_for("the worker at the new master", online)


def test_interrupted_the_same_command_goes_on_with_the_same_batch(programs: list[Program], tmp_path: Path) -> None:
    site = place_small_site(tmp_path)
    (site / "index.html").write_text("".join(f'<a href="{n}.html">{n}</a>' for n in range(100)))
    for n in range(100):
        (site / f"{n}.html").write_text(f"<title>{n}</title>")
    first = start(programs, tmp_path, "--demo", "--exit", concurrent_tasks=1, crawl_delay_seconds=0.2)
    wait_for("the crawl to be under way", lambda: [line for line in first.lines if "completed" in line])
    assert first.stop(signal.SIGINT) == 0
    second = start(programs, tmp_path, "--demo", "--exit")
    assert second.wait() == 0, second.output
    assert len([path for path in (tmp_path / "output" / "demo").iterdir() if path.is_dir()]) == 1


def test_killed_without_goodbye_the_same_command_works_at_once(programs: list[Program], tmp_path: Path) -> None:
    first = start(programs, tmp_path)
    dashboard_of(first)
    wait_for("both children", lambda: len(children_of(first.process.pid)) == 2)
    first.kill()
    second = start(programs, tmp_path)
    dashboard_of(second)
    assert second.stop(signal.SIGINT) == 0


def test_a_url_that_cannot_be_crawled_is_refused_before_anything_is_started(
    programs: list[Program], tmp_path: Path
) -> None:
    program = start(programs, tmp_path, "--crawl", "ftp://example.com/", "--exit")
    assert program.wait() == 2
    assert program.lines == [
        "standalone: --crawl 'ftp://example.com/' is no http or https URL: write it like https://example.com/"
    ]


def test_a_crawl_without_a_single_page_is_no_success(programs: list[Program], tmp_path: Path) -> None:
    program = start(programs, tmp_path, "--crawl", "http://192.168.255.1/", "--exit")
    assert program.wait() == 1
    assert "192.168.255.1 is private" in program.output
    assert program.lines[-1] == (
        "standalone: no page of http://192.168.255.1/ could be fetched; the lines above say why"
    )


def test_a_port_in_use_is_said_in_one_line_with_its_exit_code(programs: list[Program], tmp_path: Path) -> None:
    first = start(programs, tmp_path / "first")
    port = dashboard_of(first).rpartition(":")[2]
    second = start(programs, tmp_path / "second", port=int(port))
    assert second.wait() == 7
    assert f"Port {port}" in second.output and "Traceback" not in second.output
