"""What does a stranger see first? A real crawl through the task system, by its public API only.

    run(...)     builds and serves the site of demo_site.py, and crawls it
    crawl(...)   the same for a site of the user's own

Both submit one task; every further page is a task that a page's links made. What is going on is kept in a small file of
the output folder: whenever it was interrupted, the same command goes on with the unfinished batch. After a finished one
it starts a new batch. What goes wrong is a CommandFailed of client.py.

Numbers: a master that does not answer is asked again for about a minute. A batch in which nothing changes for 10
minutes (2 hours while tasks wait for their retry) is given up.

This file must not import db.py or any other file of the master.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TextIO
from urllib.parse import urlsplit, urlunsplit

from client import CommandFailed, CutOff, Master
from demo_site import MODULES, SiteError, Stopped, build_site, count_pages, serve_site
from settings import ExitCode, Settings

# Waits of 0.5, 1, 2, 4 and 7 times 8 s.
ATTEMPTS = 12
EXPORT_ATTEMPTS = 3
STALLED_SECONDS = 600.0
RETRY_STALLED_SECONDS = 7200.0
HINT_AFTER_SECONDS = 10.0
OPEN_STATES = ("scheduled", "pending", "assigned", "running")


@dataclass
class Summary:
    """What a crawl found. seconds and pages_per_second are of this run, even if an older run began the batch."""

    batch: str
    pages: int = 0
    dead_links: list[dict[str, Any]] = field(default_factory=list)  # {"url", "status", "linked_from"}
    failed: list[dict[str, Any]] = field(default_factory=list)  # {"url", "state", "error_message", "linked_from"}
    seconds: float = 0.0
    pages_per_second: float = 0.0
    folder: Path = Path()


# ---------------------------------------------------------------------------------------------------------------------
# The two jobs


def run(
    master_url: str,
    api_key: str,
    folder: Path,
    output_folder: Path,
    *,
    trust: Optional[Settings] = None,
    modules: tuple[str, ...] = MODULES,
    stop: Optional[threading.Event] = None,
    out: Optional[TextIO] = None,
) -> Optional[Summary]:
    """Build the site, serve it, crawl it, write what was found. None if `stop` was set before the end."""
    screen = Screen(out)
    try:
        site = build_site(folder, screen.progress, modules=modules, stop=stop)
    except Stopped:
        screen.say("the site is not finished: the same command renders it again")
        return None
    except SiteError as error:
        raise CommandFailed(str(error)) from None
    screen.say(f"site: {site} ({count_pages(site)} pages)")
    with serve_site(site, folder, screen.say) as url:
        task_data = {"url": url, "follow": {"same_host": True}}
        return Job("demo", task_data, reach(master_url, api_key, trust, stop), output_folder, screen).finish()


def crawl(
    url: str,
    max_pages: Optional[int],
    depth: Optional[int],
    *,
    master_url: str,
    api_key: str,
    output_folder: Path,
    trust: Optional[Settings] = None,
    stop: Optional[threading.Event] = None,
    out: Optional[TextIO] = None,
) -> Optional[Summary]:
    """Crawl the user's own site: links of the same host, at most `max_pages` pages, `depth` links away.

    `url` is as start_url writes it."""
    follow: dict[str, Any] = {"same_host": True}
    if max_pages is not None:
        follow["max_pages"] = max_pages
    if depth is not None:
        follow["max_depth"] = depth
    task_data = {"url": url, "follow": follow}
    return Job("crawl", task_data, reach(master_url, api_key, trust, stop), output_folder, Screen(out)).finish()


def start_url(url: str) -> str:
    """The URL as the crawler would write it, so that the start page is known again when a page links it."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        valid = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        advice = f"--crawl {url!r} is no http or https URL: write it like https://example.com/"
        raise CommandFailed(advice, ExitCode.SETTINGS)
    default = {"http": ":80", "https": ":443"}[parts.scheme.lower()]
    netloc = parts.netloc.lower() if "@" not in parts.netloc else parts.netloc
    return urlunsplit((parts.scheme.lower(), netloc.removesuffix(default), parts.path or "/", parts.query, ""))


# ---------------------------------------------------------------------------------------------------------------------
# One job: submit, watch, write


def reach(master_url: str, api_key: str, trust: Optional[Settings], stop: Optional[threading.Event]) -> Master:
    """The master, with a crawl's patience; every wait ends with Stopped when `stop` is set."""
    stopping = stop or threading.Event()

    def pause(seconds: float) -> None:
        if stopping.wait(seconds):
            raise Stopped

    advice = "the same command goes on where this one ends"
    return Master(master_url, api_key, trust=trust, attempts=ATTEMPTS, pause=pause, advice=advice)


class Job:
    """One batch from its first task to the files with what was found."""

    def __init__(self, name: str, task_data: dict[str, Any], master: Master, output_folder: Path, screen: Screen):
        self.name = name
        self.task_data = task_data
        self.master = master
        self.output_folder = output_folder
        self.screen = screen
        self.state_path = output_folder / f"{name}.json"
        self.batch = ""

    def finish(self) -> Optional[Summary]:
        """Start or go on, wait for the end, write the files. None if `stop` was set; the next call goes on."""
        try:
            self.start_or_go_on()
            seconds, done = self.watch()
            summary = self.collect(seconds, done)
        except Stopped:
            self.screen.end_progress()
            self.screen.say(f"batch {self.batch} is not finished: the same command goes on with it")
            return None
        self.remember(finished=True)
        self.show(summary)
        return summary

    def start_or_go_on(self) -> None:
        """The unfinished batch if there is one for the same task, else a new one; its first task is submitted once."""
        state = self.recall()
        if state is not None:
            self.batch = state["batch"]
            self.screen.say(f"going on with batch {self.batch}")
        else:
            self.batch = f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            # Before the submit: interrupted between the two, the next run submits to this batch.
            self.remember(finished=False)
            self.screen.say(f"batch {self.batch}: {self.task_data['url']}")
        if state is None or not sum(self.counts().values()):
            url = self.task_data["url"]
            task = {"task_type": "crawl", "batch": self.batch, "unique_key": url, "task_data": self.task_data}
            self.master.post("/tasks", json.dumps(task).encode())

    def recall(self) -> Optional[dict[str, Any]]:
        """The state of an unfinished batch of the same task; None for none, or for one that cannot be read."""
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            same = state["task_data"] == self.task_data and isinstance(state["batch"], str) and state["batch"] != ""
            return state if same and state["finished"] is False else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def remember(self, *, finished: bool) -> None:
        state = {"batch": self.batch, "task_data": self.task_data, "finished": finished}
        self.output_folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.state_path) as file:
            file.write(json.dumps(state, indent=2) + "\n")

    def counts(self) -> dict[str, int]:
        """Tasks of the batch by state."""
        return self.master.get("/tasks/stats", batch=self.batch)["by_state"]

    def watch(self) -> tuple[float, int]:
        """Show progress until no task is open. Returns this run's seconds and how many tasks ended in it."""
        started = changed_at = time.monotonic()
        counts = self.counts()
        done_before = count_done(counts)
        is_hinted = False
        while not sum(counts.values()) or any(counts.get(state) for state in OPEN_STATES):
            seconds = time.monotonic() - started
            self.screen.progress(progress_line(counts, (count_done(counts) - done_before) / max(seconds, 0.001)))
            self.master.pause(self.screen.interval_seconds)
            previous, counts = counts, self.counts()
            now = time.monotonic()
            if counts != previous:
                changed_at, is_hinted = now, False
            elif now - changed_at > HINT_AFTER_SECONDS and not is_hinted:
                self.hint()
                is_hinted = True
            if now - changed_at > (RETRY_STALLED_SECONDS if counts.get("scheduled") else STALLED_SECONDS):
                raise CommandFailed(
                    f"nothing happened in batch {self.batch} for {now - changed_at:.0f} s: is a device online?"
                )
        seconds = max(time.monotonic() - started, 0.001)
        done = count_done(counts) - done_before
        self.screen.progress(progress_line(counts, done / seconds), is_last=True)
        return seconds, done

    def hint(self) -> None:
        """Say why the next task waits."""
        with contextlib.suppress(CommandFailed):
            for state in ("pending", "scheduled"):
                for task in self.master.get("/tasks", batch=self.batch, status=state, limit=1).get("tasks", []):
                    why = self.master.get(f"/tasks/{task['id']}/why")
                    reasons = (why.get("detail") or why.get("reason"), task.get("error_message"))
                    self.screen.say(f"task {task['id']} waits: {'; '.join(filter(None, reasons))}")

    def collect(self, seconds: float, done: int) -> Summary:
        """Read the batch back into files; an export that was cut off is asked for again."""
        for _ in range(EXPORT_ATTEMPTS - 1):
            with contextlib.suppress(CutOff):
                return self.write_files(seconds, done)
            self.master.pause(1.0)
        return self.write_files(seconds, done)

    def write_files(self, seconds: float, done: int) -> Summary:
        """Write pages.jsonl and dead-links.tsv into a folder named after the batch; raises CutOff, and leaves none."""
        folder = self.output_folder / self.batch
        folder.mkdir(parents=True, exist_ok=True)
        summary = Summary(self.batch, seconds=seconds, pages_per_second=done / seconds, folder=folder)
        urls: dict[int, str] = {}  # oldest first: a page is exported before those that it links
        with replacing(folder / "pages.jsonl") as pages:
            for row in map(json.loads, self.master.export(self.batch, "jsonl")):
                urls[row["id"]] = row["unique_key"]
                page = page_of(row, urls.get(row["parent_id"]))
                sort_page(page, summary)
                pages.write(json.dumps(page, ensure_ascii=False) + "\n")
        with replacing(folder / "dead-links.tsv") as dead_links:
            dead_links.write("status\turl\tlinked_from\n")
            for link in summary.dead_links:
                dead_links.write(f"{link['status']}\t{link['url']}\t{link['linked_from'] or ''}\n")
        return summary

    def show(self, summary: Summary) -> None:
        say = self.screen.say
        say(
            f"{summary.pages} pages, {len(summary.dead_links)} dead links, {len(summary.failed)} failed"
            f" in {summary.seconds:.1f} s ({summary.pages_per_second:.0f} pages/s)"
        )
        for link in summary.dead_links[:10]:
            say(f"  {link['status']} {link['url']} <- {link['linked_from'] or 'the start'}")
        if len(summary.dead_links) > 10:
            say(f"  and {len(summary.dead_links) - 10} more in dead-links.tsv")
        for page in summary.failed[:10]:
            say(f"  {page['state']} {page['url']}: {page['error_message']}")
        say(f"written: {summary.folder.resolve()}{os.sep} (pages.jsonl, dead-links.tsv)")


def count_done(counts: dict[str, int]) -> int:
    return sum(count for state, count in counts.items() if state not in OPEN_STATES)


def progress_line(counts: dict[str, int], per_second: float) -> str:
    """`12 completed, 1 failed, 3 running, 40 pending: 31 pages/s`"""
    order = ("completed", "failed", "cancelled", "running", "assigned", "pending", "scheduled")
    told = ", ".join(f"{counts[state]} {state}" for state in order if counts.get(state)) or "submitted"
    return f"{told}: {per_second:.0f} pages/s"


def page_of(row: dict[str, Any], linked_from: Optional[str]) -> dict[str, Any]:
    """A line of pages.jsonl: the result, and where it comes from."""
    page = {"url": row["unique_key"], "state": row["status"], "linked_from": linked_from, **(row.get("result") or {})}
    if row.get("error_message"):
        page["error_message"] = row["error_message"]
    return page


def sort_page(page: dict[str, Any], summary: Summary) -> None:
    """A page, a dead link (4xx), or one that could not be had."""
    if page["state"] != "completed":
        kept = {name: page.get(name) for name in ("url", "state", "error_message", "linked_from")}
        summary.failed.append(kept)
    elif page.get("status", 0) >= 400:
        summary.dead_links.append({name: page[name] for name in ("url", "status", "linked_from")})
    else:
        summary.pages += 1


# ---------------------------------------------------------------------------------------------------------------------
# The screen, and files that are whole or not there


class Screen:
    """Progress in one line that is rewritten on a terminal, and a plain line a second elsewhere."""

    def __init__(self, out: Optional[TextIO] = None):
        self._out = out if out is not None else sys.stdout
        self._is_terminal = self._out.isatty()
        self.interval_seconds = 0.2 if self._is_terminal else 1.0
        self._shown = ""
        self._next_at = 0.0

    def progress(self, line: str, *, is_last: bool = False) -> None:
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns - 1
            self._write("\r" + line[:columns].ljust(min(columns, len(self._shown))))
            self._shown = line[:columns]
        elif is_last or (time.monotonic() >= self._next_at and line != self._shown):
            self._write(line + "\n")
            self._shown, self._next_at = line, time.monotonic() + 1.0
        if is_last:
            self.end_progress()

    def end_progress(self) -> None:
        if self._is_terminal and self._shown:
            self._write("\n")
        self._shown, self._next_at = "", 0.0

    def say(self, line: str) -> None:
        self.end_progress()
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        self._out.write(text.encode(self._out.encoding or "utf-8", "replace").decode(self._out.encoding or "utf-8"))
        self._out.flush()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file to write that takes its name when it is complete and on disk, and leaves nothing if that fails."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    print("The demo starts by: python standalone.py --demo")
