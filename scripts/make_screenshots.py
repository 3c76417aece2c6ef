"""What does the dashboard look like? Pictures of a real run, for the README: make screenshots

It starts a master and three workers on this machine, crawls the demo's site through them, sends smaller batches in
between (some of whose tasks fail), and photographs the dashboard in Chromium after --seconds, in both languages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from client import Master  # noqa: E402
from demo_site import build_site, serve_site  # noqa: E402
from scripts.demo_appsflyer import Program, write_config  # noqa: E402

CHROMIUM = "/usr/bin/chromium"
DEVICES = {"shop-1": "Front desk", "shop-2": "收银台", "attic": "Attic PC"}
PAUSE_SECONDS = 4.0
PICTURES: dict[str, tuple[str, str, Any]] = {  # file: (address, language, colours)
    "dashboard.png": ("#/", "en-GB", "light"),
    "dashboard.zh-CN.png": ("#/", "zh-CN", "light"),
    "dashboard-batch.png": ("#/batches/docs", "en-GB", "dark"),
    "dashboard-devices.png": ("#/devices", "en-GB", "light"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=200.0, help="how long the fleet works before the pictures")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as (url, site):
        work(Master(url, ""), site, options.seconds)
        photograph(url, options.output)
    return 0


@contextlib.contextmanager
def fleet(folder: Path) -> Iterator[tuple[str, str]]:
    """A site, a master and its workers; gives the addresses of master and site."""
    programs: list[Program] = []
    pages = build_site(folder / "site", print)
    with serve_site(pages, folder) as site, contextlib.ExitStack() as ends:
        limits = [{"name": "site", "task_type": "crawl", "key": ["task_data.host"], "max_running": 6}]
        config = write_config(
            folder, "master", port=0, database=str(folder / "distribution.db"), limits=limits, heartbeat_interval=5
        )
        programs.append(Program("master.py", "--config", config))
        ends.callback(programs[0].stop)
        url = programs[0].wait_until_ready()
        for device_id, name in DEVICES.items():
            config = write_config(
                folder, "worker", device_id=device_id, device_name=name, master_url=url, heartbeat_interval=5,
                state_folder=str(folder / device_id), crawl_allow_networks=["127.0.0.0/8"], crawl_delay_seconds=1.5,
            )  # fmt: skip
            programs.append(Program("worker.py", "--config", config))
            ends.callback(programs[-1].stop)
        yield url, site


def work(master: Master, site: str, seconds: float) -> None:
    """Submits a crawl, and small batches until the time is over."""
    crawl = {"url": site, "follow": {"max_depth": 3}}
    submit(master, [{"task_type": "crawl", "batch": "docs", "unique_key": site, "task_data": crawl}])
    end, n = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        n += 1
        names = {"username": f"acme-{n % 3}", "app_id": f"com.example.app{n % 7}"}
        tasks: list[dict[str, Any]] = [
            {"task_type": "echo", "batch": "prices", **names, "task_data": {"sleep_seconds": 1 + i % 3, "n": n}}
            for i in range(4 + n % 5)
        ]
        if n % 4 == 0:
            tasks.append({"task_type": "crawl", "batch": "links", "task_data": {"url": f"{site}gone-{n}.html"}})
        if n == 5:
            tasks.append({"task_type": "report", "batch": "reports", **names})
        submit(master, tasks)
        time.sleep(PAUSE_SECONDS)


def submit(master: Master, tasks: list[dict[str, Any]]) -> None:
    master.post("/tasks", json.dumps(tasks).encode())


def photograph(url: str, output: Path) -> None:
    from playwright.sync_api import sync_playwright

    output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name, (address, locale, colours) in PICTURES.items():
            page = browser.new_page(
                locale=locale, color_scheme=colours, viewport={"width": 1280, "height": 860}, device_scale_factor=1.5
            )
            page.goto(f"{url}/{address}")
            page.wait_for_selector("main .part")
            page.wait_for_timeout(2000)  # the charts' beats come a little after the rest
            page.screenshot(path=output / name)
            print(output / name)
            page.close()
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
