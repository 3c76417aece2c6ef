"""What does a stranger see first? A real crawl through the task system, by its public API only.

    run(...)     renders the documentation of Python's standard library into a folder, serves it on loopback, crawls it
    crawl(...)   the same for a site of the user's own

Both submit one task; every further page is a task that a page's links made. What is going on is kept in a small file of
the output folder: whenever it was interrupted, the same command goes on with the unfinished batch. After a finished one
it starts a new batch.

Numbers: a request to the master ends after 30 s and is tried again for 60 s. A batch in which nothing changes for 10
minutes (2 hours while tasks wait for their retry) is given up.

The site is what pydoc writes, untouched, and an index page of ours. Its relative links lead to pages of this site, and
some to pages that do not exist: private and platform modules that pydoc links and nobody rendered. These dead links are
the point. Links to file: (a module's source) and to other hosts (docs.python.org) are on the pages, too, and are not
followed.

This file must not import db.py or any other file of the master.
"""

from __future__ import annotations

import contextlib
import html
import http.server
import importlib
import io
import json
import os
import pkgutil
import secrets
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TextIO
from urllib.parse import urlsplit, urlunsplit

import requests

API = "/api/distribution"
REQUEST_SECONDS = 30.0
UNREACHABLE_SECONDS = 60.0
STALLED_SECONDS = 600.0
RETRY_STALLED_SECONDS = 7200.0
RENDER_SECONDS = 300.0
HINT_AFTER_SECONDS = 10.0
OPEN_STATES = ("scheduled", "pending", "assigned", "running")

# Left off: what opens a window, a browser or a port when imported, prints (this), changes the process (site, readline),
# was removed from newer Pythons, or says little (encodings and its 120 codecs). Packages bring their submodules.
MODULE_NAMES = """
    abc argparse array ast asyncio atexit base64 bdb binascii bisect builtins bz2 cProfile calendar cmath cmd code
    codecs codeop collections colorsys compileall concurrent configparser contextlib contextvars copy copyreg csv
    ctypes curses dataclasses datetime dbm decimal difflib dis doctest email enum errno faulthandler fcntl filecmp
    fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib grp gzip hashlib heapq hmac
    html http imaplib importlib inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox
    marshal math mimetypes mmap modulefinder multiprocessing netrc numbers operator optparse os pathlib pdb pickle
    pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pty pwd py_compile pyclbr pydoc
    pyexpat queue quopri random re reprlib resource runpy sched secrets select selectors shelve shlex shutil signal
    smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys
    sysconfig syslog tabnanny tarfile tempfile termios textwrap threading time timeit token tokenize tomllib trace
    traceback tracemalloc tty types typing unicodedata unittest urllib uuid warnings wave weakref webbrowser wsgiref
    xml xmlrpc zipapp zipfile zipimport zlib zoneinfo
"""
MODULES = tuple(MODULE_NAMES.split())
# A changed list or index is another site: raise this number with it.
RECIPE = 1


class DemoError(RuntimeError):
    """It cannot go on: one line that says what to do."""


class Stopped(Exception):
    """Somebody set `stop`."""


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
    screen.say(f"site: {site} ({count_pages(site)} pages)")
    with serve_site(site, folder, screen.say) as url:
        task_data = {"url": url, "follow": {"same_host": True}}
        return Job("demo", task_data, Master(master_url, api_key, stop), output_folder, screen).finish()


def crawl(
    url: str,
    max_pages: Optional[int],
    depth: Optional[int],
    *,
    master_url: str,
    api_key: str,
    output_folder: Path,
    stop: Optional[threading.Event] = None,
    out: Optional[TextIO] = None,
) -> Optional[Summary]:
    """Crawl the user's own site: links of the same host, at most `max_pages` pages, `depth` links away from `url`."""
    follow: dict[str, Any] = {"same_host": True}
    if max_pages is not None:
        follow["max_pages"] = max_pages
    if depth is not None:
        follow["max_depth"] = depth
    task_data = {"url": start_url(url), "follow": follow}
    return Job("crawl", task_data, Master(master_url, api_key, stop), output_folder, Screen(out)).finish()


def start_url(url: str) -> str:
    """The URL as the crawler would write it, so that the start page is known again when a page links it."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        valid = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise DemoError(f"--crawl {url!r} is no http or https URL: write it like https://example.com/")
    default = {"http": ":80", "https": ":443"}[parts.scheme.lower()]
    netloc = parts.netloc.lower() if "@" not in parts.netloc else parts.netloc
    return urlunsplit((parts.scheme.lower(), netloc.removesuffix(default), parts.path or "/", parts.query, ""))


# ---------------------------------------------------------------------------------------------------------------------
# The site


def build_site(
    folder: Path,
    report: Callable[[str], None] = lambda line: None,
    *,
    modules: tuple[str, ...] = MODULES,
    stop: Optional[threading.Event] = None,
) -> Path:
    """The rendered site's folder; rendered now unless a finished one is there. `report` gets progress lines.

    Raises Stopped when `stop` is set meanwhile."""
    version = ".".join(map(str, sys.version_info[:3]))
    suffix = "" if modules == MODULES else "-" + "-".join(modules)
    site = folder / f"site-{version}-{RECIPE}{suffix}"
    if (site / "index.html").is_file():
        return site
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
    try:
        render_all(unfinished, modules, report, stop or threading.Event())
        (unfinished / "index.html").write_text(index_page(unfinished, modules), encoding="utf-8")
        unfinished.chmod(0o755)
        with contextlib.suppress(OSError):  # another run was faster: its site is as good
            unfinished.rename(site)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not (site / "index.html").is_file():
        raise DemoError(f"{site} could not be created: check that the folder may be written")
    return site


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted runs left; younger than an hour it may be another run's."""
    for leftover in folder.glob("unfinished-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover, ignore_errors=True)


def render_all(target: Path, modules: tuple[str, ...], report: Callable[[str], None], stop: threading.Event) -> None:
    """Render every module in child processes: importing all of them is nothing for this process."""
    # -I: no module of ours, of the current folder or of PYTHONPATH may stand in for one of Python's.
    command = [sys.executable, "-I", "-W", "ignore", str(Path(__file__).resolve())]
    started = time.monotonic()
    try:
        listed = subprocess.run(
            [*command, "--list", *modules], cwd=target, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=RENDER_SECONDS, check=True,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise DemoError(f"the modules of the demo site could not be listed: {' '.join(detail)}") from None
    names = listed.stdout.split()
    count = min(4, os.cpu_count() or 1)
    renderers = [
        subprocess.Popen(
            [*command, "--render", *names[i::count]], cwd=target, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(count)
    ]  # fmt: skip
    try:
        while any(renderer.poll() is None for renderer in renderers):
            report(f"rendering the site: {count_pages(target)} of {len(names)} pages")
            if time.monotonic() - started > RENDER_SECONDS:
                raise DemoError(f"rendering the demo site took longer than {RENDER_SECONDS:.0f} s: run it again")
            stop.wait(0.1)
            # Before the exit codes: a Ctrl-C reaches the children, too.
            if stop.is_set():
                raise Stopped
    finally:
        for renderer in renderers:
            if renderer.poll() is None:
                renderer.kill()
            renderer.wait(timeout=10)
    if any(renderer.returncode for renderer in renderers) or not count_pages(target):
        raise DemoError("rendering the demo site failed: run it again")
    report(f"rendering the site: {count_pages(target)} of {len(names)} pages")


def count_pages(site: Path) -> int:
    return sum(1 for entry in os.scandir(site) if entry.name.endswith(".html"))


def list_modules(name: str) -> Iterator[str]:
    """In the child: the module and its submodules, as far as they can be imported here."""
    try:
        module = importlib.import_module(name)
    except BaseException:  # not on this platform, not in this Python, or one that ends the process
        return
    yield name
    for submodule in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if submodule.name not in ("__main__", "test", "tests", "idle_test"):
            yield from list_modules(f"{name}.{submodule.name}")


def render_modules(names: list[str]) -> None:
    """In the child: write NAME.html for each module into the current folder. One that fails stays a dead link."""
    import pydoc

    for name in names:
        with contextlib.suppress(Exception):
            pydoc.writedoc(name)


def index_page(site: Path, modules: tuple[str, ...]) -> str:
    """Our own page: links every listed module that was rendered; submodules are linked by their packages."""
    rendered = [html.escape(name) for name in modules if (site / f"{name}.html").is_file()]
    items = "\n".join(f'<li><a href="{name}.html">{name}</a></li>' for name in rendered)
    title = f"Python {sys.version_info[0]}.{sys.version_info[1]}: the standard library"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body>\n<h1>{title}</h1>\n<ul>\n{items}\n</ul>\n</body>\n</html>\n"
    )


class SiteHandler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of one folder, quietly. HTTP/1.1: connections are kept."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    # One segment a reply: headers and body sent apart would wait for the client's delayed acknowledgement.
    wbufsize = 256 * 1024
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """The master's log tells about the tasks; a line a page here would bury the progress."""


class SiteServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    # On Windows this option would let two servers share a port.
    allow_reuse_address = os.name != "nt"

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A crawler that went away is no news."""


@contextlib.contextmanager
def serve_site(site: Path, folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """Serve the site on a loopback port; gives its URL. The port is kept in `folder`: an unfinished batch knows it."""
    remembered = folder / "port"
    server = site_server(site, read_port(remembered), say)
    port = server.server_address[1]
    write_atomically(remembered, f"{port}\n")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="site", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def site_server(site: Path, port: int, say: Callable[[str], None]) -> SiteServer:
    def handler(*args: Any) -> SiteHandler:
        return SiteHandler(*args, directory=str(site))

    try:
        return SiteServer(("127.0.0.1", port), handler)
    except OSError:
        if port == 0:
            raise
        say(f"port {port} of the last time is taken: the site gets another one, and a new batch starts")
        return SiteServer(("127.0.0.1", 0), handler)


def read_port(path: Path) -> int:
    """The remembered port; 0, for any free one, without a sensible memory."""
    try:
        port = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return port if 1024 <= port <= 65535 else 0


# ---------------------------------------------------------------------------------------------------------------------
# One job: submit, watch, write


class Master:
    """The master's public API, with patience for its restarts."""

    def __init__(self, master_url: str, api_key: str, stop: Optional[threading.Event] = None):
        self.url = master_url.rstrip("/")
        self.stop = stop or threading.Event()
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy of the environment is not for the own master
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request; tried again for 60 s while the master is away or busy. Safe: every submit has a unique_key."""
        give_up_at = time.monotonic() + UNREACHABLE_SECONDS
        while True:
            try:
                response = self._session.request(
                    method, f"{self.url}{API}{path}", timeout=REQUEST_SECONDS, allow_redirects=False, **options
                )
                if response.status_code not in (429, 502, 503, 504):
                    return self._checked(response)
                trouble = f"answers {response.status_code}"
                response.close()
            except (requests.ConnectionError, requests.Timeout):
                trouble = "cannot be reached"
            if time.monotonic() > give_up_at:
                raise DemoError(f"the master at {self.url} {trouble}: start it; the same command then goes on here")
            if self.stop.wait(0.5):
                raise Stopped

    def json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            return self.ask(method, path, **options).json()
        except requests.RequestException as error:
            raise DemoError(f"the master at {self.url} did not answer with JSON: {error}") from None

    def _checked(self, response: requests.Response) -> requests.Response:
        if response.status_code in (401, 403):
            raise DemoError(f"the master at {self.url} refuses the key: give its api_key")
        if not 200 <= response.status_code < 300:
            try:
                detail = response.json().get("detail", "")
            except (ValueError, AttributeError):
                detail = "is this the address of a master?"
            raise DemoError(f"the master at {self.url} answered {response.status_code}: {detail}")
        return response


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
            self.master.json("POST", "/tasks", json=task)

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
        write_atomically(self.state_path, json.dumps(state, indent=2) + "\n")

    def counts(self) -> dict[str, int]:
        """Tasks of the batch by state."""
        return self.master.json("GET", "/tasks/stats", params={"batch": self.batch})["by_state"]

    def watch(self) -> tuple[float, int]:
        """Show progress until no task is open. Returns this run's seconds and how many tasks ended in it."""
        started = changed_at = time.monotonic()
        counts = self.counts()
        done_before = count_done(counts)
        is_hinted = False
        while not sum(counts.values()) or any(counts.get(state) for state in OPEN_STATES):
            seconds = time.monotonic() - started
            self.screen.progress(progress_line(counts, (count_done(counts) - done_before) / max(seconds, 0.001)))
            if self.master.stop.wait(self.screen.interval_seconds):
                raise Stopped
            previous, counts = counts, self.counts()
            now = time.monotonic()
            if counts != previous:
                changed_at, is_hinted = now, False
            elif now - changed_at > HINT_AFTER_SECONDS and not is_hinted:
                self.hint()
                is_hinted = True
            if now - changed_at > (RETRY_STALLED_SECONDS if counts.get("scheduled") else STALLED_SECONDS):
                raise DemoError(
                    f"nothing happened in batch {self.batch} for {now - changed_at:.0f} s: is a device online?"
                )
        seconds = max(time.monotonic() - started, 0.001)
        done = count_done(counts) - done_before
        self.screen.progress(progress_line(counts, done / seconds), is_last=True)
        return seconds, done

    def hint(self) -> None:
        """Say why the next task waits."""
        with contextlib.suppress(DemoError):
            for state in ("pending", "scheduled"):
                query = {"batch": self.batch, "status": state, "limit": 1}
                for task in self.master.json("GET", "/tasks", params=query).get("tasks", []):
                    why = self.master.json("GET", f"/tasks/{task['id']}/why")
                    reasons = (why.get("detail") or why.get("reason"), task.get("error_message"))
                    self.screen.say(f"task {task['id']} waits: {'; '.join(filter(None, reasons))}")

    def collect(self, seconds: float, done: int) -> Summary:
        """Read the batch back and write pages.jsonl and dead-links.tsv into a folder named after it."""
        folder = self.output_folder / self.batch
        folder.mkdir(parents=True, exist_ok=True)
        summary = Summary(self.batch, seconds=seconds, pages_per_second=done / seconds, folder=folder)
        urls: dict[int, str] = {}  # oldest first: a page is exported before those that it links
        with replacing(folder / "pages.jsonl") as pages:
            for row in self.exported():
                urls[row["id"]] = row["unique_key"]
                page = page_of(row, urls.get(row["parent_id"]))
                sort_page(page, summary)
                pages.write(json.dumps(page, ensure_ascii=False) + "\n")
        with replacing(folder / "dead-links.tsv") as dead_links:
            dead_links.write("status\turl\tlinked_from\n")
            for link in summary.dead_links:
                dead_links.write(f"{link['status']}\t{link['url']}\t{link['linked_from'] or ''}\n")
        return summary

    def exported(self) -> list[dict[str, Any]]:
        """All tasks of the batch with their results. An export without its end mark was cut off: ask again."""
        query = {"batch": self.batch, "format": "jsonl", "include": "result"}
        for _ in range(3):
            rows: list[dict[str, Any]] = []
            try:
                with self.master.ask("GET", "/tasks/export", params=query, stream=True) as response:
                    for line in response.iter_lines(chunk_size=64 * 1024):
                        row = json.loads(line)
                        if row.get("end") is True:
                            if row.get("rows") == len(rows):
                                return rows
                            break
                        rows.append(row)
            except (requests.RequestException, ValueError):
                pass
            if self.master.stop.wait(1):
                raise Stopped
        raise DemoError(f"the export of batch {self.batch} was cut off three times: run the same command again")

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


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text)


def main(arguments: list[str]) -> None:
    """The child process of build_site: `--list MODULE...` prints names, `--render MODULE...` writes pages."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):  # what modules and pydoc print
        if arguments[:1] == ["--render"]:
            render_modules(arguments[1:])
        names = [n for name in arguments[1:] for n in list_modules(name)] if arguments[:1] == ["--list"] else []
    if names:
        print("\n".join(dict.fromkeys(names)))
    elif arguments[:1] != ["--render"]:
        print("The demo starts by: python standalone.py --demo")


if __name__ == "__main__":
    main(sys.argv[1:])
