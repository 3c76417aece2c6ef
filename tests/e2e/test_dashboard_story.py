"""Can a person run a fleet with nothing but the dashboard? Real workers, one of them killed on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from farm import Program, Worker, wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
expect = sync_api.expect
expect.set_options(timeout=60_000)


def counts(master: Any) -> dict[str, int]:
    found: dict[str, int] = master.call("GET", "/batches/story")["counts"]
    return {state: n for state, n in found.items() if n}


def test_add_tasks_watch_lose_a_worker_recover_and_requeue_the_failures(
    start_master: Any, open_tab: Any, programs: list[Program], tmp_path: Path
) -> None:
    master = start_master(device_timeout=2, timeout_check_interval=1, heartbeat_interval=1)
    site = tmp_path / "fails_at_first.py"
    flag = tmp_path / "site-is-well"
    site.write_text(
        "from pathlib import Path\nfrom executors.task_executor import DoNotRetry, TaskExecutor\n"
        "class Site(TaskExecutor):\n    isolation = 'thread'\n    def __init__(self):\n        super().__init__('site')\n"
        f"    def execute_task(self, task_data):\n        if not Path({str(flag)!r}).exists():\n"
        "            raise DoNotRetry('the site is down')\n        return {'ok': True}\n"
    )

    def start_worker(name: str) -> Worker:
        some: dict[str, Any] = {"concurrent_tasks": 2, "heartbeat_interval": 1, "executors": [str(site)]}
        worker = Worker(master.url, tmp_path / name, name, **some)
        programs.append(worker)
        return worker

    start_worker("shop-1")
    killed = start_worker("shop-2")
    page = open_tab(master.url + "/").page

    page.get_by_role("link", name="New tasks").first.click()
    page.get_by_role("link", name="Many from a file").click()
    tasks = [{"task_type": "echo", "task_data": {"sleep_seconds": 3, "n": n}} for n in range(8)]
    tasks += [{"task_type": "site", "task_data": {"n": n}} for n in range(3)]
    page.get_by_label("Or paste the tasks").fill("\n".join(map(json.dumps, tasks)))
    page.get_by_label("Batch").fill("story")
    page.get_by_role("button", name=re.compile("^Check")).click()
    page.get_by_role("button", name=re.compile("^Submit")).click()
    page.get_by_role("link", name="Look at story").click()
    expect(page.get_by_role("heading", name="story", level=2)).to_be_visible()

    # A worker dies in the middle of its tasks: the page says so, and the others finish them.
    wait_for(
        "a task on each device", lambda: all(d["assigned_count"] for d in master.call("GET", "/devices")["devices"])
    )
    killed.kill()
    page.get_by_role("link", name="Devices", exact=True).click()
    expect(page.locator("tr[data-row=shop-2]")).to_contain_text("Offline")
    page.get_by_role("link", name="Events", exact=True).click()
    expect(page.locator("tbody")).to_contain_text("Offline")
    page.goto(f"{master.url}/#/batches/story")
    failures = page.get_by_role("region", name="Failures")
    expect(failures).to_contain_text("the site is down")
    wait_for("the rest", lambda: counts(master) == {"completed": 8, "failed": 3})

    # It comes back, and what failed is run again by one button, after its count was shown.
    killed.start()
    flag.touch()
    failures.get_by_role("button", name="Run these again").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("3")
    dialog.get_by_role("button", name=re.compile("Run 3")).click()
    wait_for("all of them", lambda: counts(master) == {"completed": 11})
    expect(page.get_by_role("link", name=re.compile("Completed 11"))).to_be_visible()
    page.goto(f"{master.url}/#/devices")
    expect(page.locator("tr[data-row=shop-2]")).to_contain_text("Online")
