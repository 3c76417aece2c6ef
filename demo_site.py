"""What does the demo crawl? The documentation of Python's standard library, rendered here and served on loopback.

The site is what pydoc writes, untouched, and an index page of ours. Its relative links lead to pages of this site, and
some to pages that do not exist: private and platform modules that pydoc links and nobody rendered. These dead links are
the point. Links to file: (a module's source) and to other hosts (docs.python.org) are on the pages, too, and are not
followed.

This file is also the program of its own child processes, which see nothing but the standard library (python -I): it
must import nothing else.
"""

from __future__ import annotations

import contextlib
import html
import http.server
import importlib
import io
import os
import pkgutil
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

RENDER_SECONDS = 300.0

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


class SiteError(Exception):
    """There is no site to crawl: one line that says what to do."""


class Stopped(Exception):
    """Somebody set `stop`."""


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
        raise SiteError(f"{site} could not be created: check that the folder may be written")
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
        raise SiteError(f"the modules of the demo site could not be listed: {' '.join(detail)}") from None
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
                raise SiteError(f"rendering the demo site took longer than {RENDER_SECONDS:.0f} s: run it again")
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
        raise SiteError("rendering the demo site failed: run it again")
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
    remembered.write_text(f"{port}\n", encoding="ascii")  # so few bytes are there or not, never half
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
