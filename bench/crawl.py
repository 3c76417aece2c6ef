"""How many pages a second does one device crawl, and two? A large documentation site, from the first page to the last.

`make bench-crawl`, or `python bench/crawl.py`. The site is Debian's python3-doc (apt-get install python3-doc; another
folder with --site), served by `python -m http.server` on loopback. Master and workers are the shipped programs, each a
process of its own, as shipped but for the slots: every page is fetched, parsed with its links, described, reported
durably, and its links are tasks that the master compares with the batch.

Everything shares one machine. The table of CPU seconds says who used it: one core is one CPU second a second, and a
worker is one Python process, so it cannot use more than one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.farm import Farm, cpu_seconds_of, open_farm, wait_until
from bench.run import machine, row

SITES = ("/usr/share/doc/python3-doc/html", "/usr/share/doc/python3/html")
START_PAGE = "index.html"
OPEN_STATES = ("scheduled", "pending", "assigned", "running")


class Run(NamedTuple):
    """One crawl: pages (whatever their status), seconds, CPU seconds by process."""

    pages: int
    html: int
    failed: int
    seconds: float
    cpu: dict[str, float]


class SiteServer:
    """python -m http.server, as a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        port = re.search(r" port (\d+)", self.process.stdout.readline())
        if port is None:
            raise SystemExit("python -m http.server did not start")
        self.url = f"http://127.0.0.1:{port.group(1)}/"

    def cpu_seconds(self) -> float:
        return cpu_seconds_of(self.process.pid)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[SiteServer]:
    site = SiteServer(folder)
    try:
        yield site
    finally:
        site.close()


def crawl(folder: Path, devices: int, slots: int) -> Run:
    """The whole site once, by so many workers."""
    with served(folder) as site, open_farm() as farm:
        networks = ["127.0.0.0/8"]
        farm.add_workers(devices, concurrent_tasks=slots, crawl_allow_networks=networks)
        start = site.url + START_PAGE
        task = {"task_type": "crawl", "batch": "site", "unique_key": start, "task_data": {"url": start, "follow": {}}}
        before = used(farm, site)
        started = time.perf_counter()
        farm.post("/tasks", json.dumps(task).encode())
        wait_until("the last page", lambda: is_done(farm))
        seconds = time.perf_counter() - started
        cpu = {name: now - before[name] for name, now in used(farm, site).items()}
        states = farm.get("/tasks/stats?batch=site")["by_state"]
        pages = states["completed"]
        return Run(pages, count_html(farm), sum(states.values()) - pages, seconds, cpu)


def used(farm: Farm, site: SiteServer) -> dict[str, float]:
    workers = {f"worker {n}": worker.cpu_seconds() for n, worker in enumerate(farm.workers, 1)}
    return {"master": farm.master.cpu_seconds(), **workers, "http.server": site.cpu_seconds()}


def is_done(farm: Farm) -> bool:
    states = farm.get("/tasks/stats?batch=site")["by_state"]
    return bool(states["completed"]) and not any(
        states[name] for name in ("scheduled", "pending", "assigned", "running")
    )


def count_html(farm: Farm) -> int:
    """How many of the pages have a title, which only HTML has."""
    lines = farm.get_text("/tasks/export?batch=site&include=result&format=jsonl").splitlines()
    return sum(1 for line in lines if (json.loads(line).get("result") or {}).get("title"))


def find_site(given: str) -> Path:
    for name in [given] if given else SITES:
        folder = Path(name).resolve()
        if (folder / START_PAGE).is_file():
            return folder
    raise SystemExit(f"{given or SITES[0]} has no {START_PAGE}: apt-get install python3-doc, or write another --site")


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--site", default="", metavar="FOLDER", help=f"a folder with {START_PAGE} (python3-doc's)")
    parser.add_argument("--runs", type=int, default=3, help="crawls by one device and by two (3)")
    parser.add_argument("--slots", type=int, default=3, help="concurrent_tasks of each worker (3, as shipped)")
    options = parser.parse_args(argv)
    if min(options.runs, options.slots) < 1:
        parser.error("--runs and --slots must be at least 1")
    folder = find_site(options.site)
    sizes = [path.stat().st_size for path in folder.rglob("*.html")]
    print(machine())
    print(f"{folder}: {len(sizes)} HTML files of {sum(sizes) / max(1, len(sizes)) / 1024:.0f} KiB on average")
    print(f"{options.slots} slots a device; FULL durability, spool on, robots.txt asked for, all else as shipped\n")
    print("| what | median | min to max | raw runs |\n|---|---|---|---|", flush=True)
    for devices in (1, 2):
        runs = [crawl(folder, devices, options.slots) for _ in range(options.runs)]
        report(devices, runs)
    return 0


def report(devices: int, runs: list[Run]) -> None:
    name = "one device" if devices == 1 else f"{devices} devices"
    print(row(f"{name}: all answers", "pages/s", [run.pages / run.seconds for run in runs]))
    print(row(f"{name}: HTML pages", "pages/s", [run.html / run.seconds for run in runs]))
    for process in runs[0].cpu:
        print(row(f"{name}: CPU of {process}", "cores", [run.cpu[process] / run.seconds for run in runs]))
    last = runs[-1]
    print(
        f"| {name}: found | {last.pages} pages, {last.html} HTML | {last.failed} failed | {last.seconds:.1f} s |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
