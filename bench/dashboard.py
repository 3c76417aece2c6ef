"""What does a look at the dashboard take? Until it shows something, and what an open one costs the master.

A real master with --rows waiting tasks, and Chromium on the same machine. Each view is opened in a fresh context
(nothing cached), from the navigation to the moment when what was asked is on the page. Then --tabs dashboards stay
open with nothing going on, and the CPU of the master is watched, with and without them. Linux, with Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.farm import Farm, bodies, open_farm
from bench.run import machine, row

VIEWS = {  # view: what is there when it is usable
    "overview": "a.tile[data-state=pending] b",
    "tasks": "tbody tr",
    "batches": "tbody tr",
    "devices": "main .part",
    "dispatch": "main .part",
    "system": "tbody tr",
}
SETTLE_SECONDS = 5.0


def first_look(browser: Any, url: str, view: str, seen: str) -> float:
    """Seconds from the navigation to a usable view, in a browser that has nothing cached."""
    context = browser.new_context()
    page = context.new_page()
    started = time.perf_counter()
    page.goto(f"{url}/#/{view}", wait_until="commit")
    page.wait_for_selector(seen, timeout=60_000)
    took = time.perf_counter() - started
    context.close()
    return took


def idle_percent(farm: Farm, seconds: float) -> float:
    before = farm.master.cpu_seconds()
    time.sleep(seconds)
    return (farm.master.cpu_seconds() - before) / seconds * 100


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="waiting tasks (1,000,000)")
    parser.add_argument("--runs", type=int, default=5, help="how often each view is opened (5)")
    parser.add_argument("--tabs", type=int, default=5, help="dashboards that stay open (5)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long they are watched (30)")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that our processes are stopped then, too
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("no Chromium on this machine: apt-get install chromium")
    with open_farm() as farm, sync_playwright() as running:
        task = {"task_type": "parked", "batch": "many", "username": "acme", "task_data": {"n": 1}}
        for body in bodies(task, options.rows):
            farm.post("/tasks", body)
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        print(f"{machine()}\n\n{options.rows:,} waiting tasks\n")
        print("| what | median | min to max | raw runs |\n|---|---|---|---|")
        for view, seen in VIEWS.items():
            looks = [first_look(browser, farm.url, view, seen) for _ in range(options.runs)]
            print(row(f"{view}: first look", "s", looks), flush=True)
        alone = idle_percent(farm, options.seconds)
        for _ in range(options.tabs):  # a page behind another one is hidden and asks nothing, so each has a window
            browser.new_context().new_page().goto(farm.url)
        time.sleep(SETTLE_SECONDS)
        together = idle_percent(farm, options.seconds)
        print(row("an open dashboard, nothing going on", "% of a core", [(together - alone) / options.tabs]))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
