"""Do two devices find the same pages of a large real site as wget does?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from farm import Master, Program, Worker, wait_for

SITE = Path("/usr/share/doc/python3-doc/html")
TEN_MINUTES = 600.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="no python3-doc here: apt-get install python3-doc")
@pytest.mark.skipif(shutil.which("wget") is None, reason="no wget here: apt-get install wget")
def test_two_devices_find_the_same_pages_as_wget(programs: list[Program], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(SITE.resolve()),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r" port (\d+)", server.stdout.readline())
        assert found is not None
        start = f"http://127.0.0.1:{found.group(1)}/"
        theirs = mirrored(start, tmp_path / "wget")
        ours = crawled(start, programs, tmp_path)
    finally:
        server.kill()
        server.wait(60)
    assert len(theirs) > 500
    assert ours == theirs


def mirrored(start: str, folder: Path) -> set[str]:
    """The HTML pages that wget finds by following links; not what pages embed."""
    folder.mkdir()
    # Only what is parsed for links is of interest: pictures, styles and scripts are no pages that a link leads to.
    only_links = ["--mirror", "--follow-tags=a,area", "--no-verbose", "--tries=3", "--no-host-directories"]
    done = subprocess.run(["wget", *only_links, start], cwd=folder, capture_output=True, text=True, timeout=TEN_MINUTES)
    assert done.returncode in (0, 8), done.stderr[-2000:]  # 8: some page answered 404
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {file for file in files if file.endswith(".html")}


def crawled(start: str, programs: list[Program], folder: Path) -> set[str]:
    """The HTML pages that two devices find, as file names; both have found some."""
    master = Master(folder / "master")
    programs.append(master)
    for name in ("one", "two"):
        programs.append(Worker(master.url, folder / name, name, crawl_allow_networks=["127.0.0.0/8"]))
    wait_for("two devices", lambda: len(master.get("/devices?status=online")["devices"]) == 2)
    task = {"task_type": "crawl", "batch": "site", "unique_key": start, "task_data": {"url": start, "follow": {}}}
    master.submit(task)
    done = {"completed"}
    wait_for("the last page", lambda: set(master.states("site")) == done, TEN_MINUTES)
    text = master.api("GET", "/tasks/export?batch=site&include=result").text
    *tasks, end = (json.loads(line) for line in text.splitlines())
    assert end == {"end": True, "rows": len(tasks)}
    for name in ("one", "two"):
        assert master.get(f"/tasks?batch=site&device_id={name}&limit=1")["tasks"], f"device {name} did nothing"
    good = [task["result"]["final_url"] for task in tasks if task["result"]["status"] == 200]
    names = {unquote(url[len(start) :]).partition("?")[0] or "index.html" for url in good}
    return {name for name in names if name.endswith(".html")}
