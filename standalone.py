"""What does one machine need to try it, or to run a small fleet of itself? A master and one worker, in one command.

    settings -> master -> worker -> (a crawl) -> wait, until a signal stops them in the opposite order

Both run as children over loopback HTTP, the same programs as in production. Each is in a session of its own, so Ctrl-C
reaches this parent alone: it lets the worker drain first, then stops the master; a second Ctrl-C kills both. Their
standard input is a pipe from here: if this parent is killed, it ends, and so do they. One that dies is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import demo
import settings as settings_module
from client import CommandFailed
from settings import ROOT, ExitCode, Settings

log = logging.getLogger("af.standalone")

READY_SECONDS = 60.0
STOP_MASTER_SECONDS = 15.0
RESTART_SECONDS = (1.0, 30.0)
HOPELESS = (ExitCode.SETTINGS, ExitCode.CONFLICT, ExitCode.DATABASE_BAD, ExitCode.DATABASE_IN_USE,
            ExitCode.DATABASE_NEWER, ExitCode.PORT_IN_USE, ExitCode.REFUSED)  # fmt: skip
"""A child that ends so would end so again: it is not started again, and its code becomes ours."""
THIS_MACHINE = ("127.0.0.0/8", "::1/128")
PASSING = (ExitCode.CONFLICT, ExitCode.DATABASE_IN_USE)
PATIENCE_SECONDS = 15.0
"""The children of a parent that was killed end within seconds; until then they hold the database and the device id."""


def main(argv: list[str] | None = None) -> int:
    """Runs master and worker until a signal; returns an exit code."""
    parser = argparse.ArgumentParser(prog="standalone.py", description="Runs a master and one worker on this machine.")
    parser.add_argument("--demo", action="store_true", help="crawl the documentation of Python's standard library")
    parser.add_argument("--crawl", metavar="URL", help="crawl this site")
    parser.add_argument("--max-pages", type=_positive, metavar="N", help="with --crawl: at most so many pages")
    parser.add_argument("--depth", type=_positive, metavar="N", help="with --crawl: at most so many links away")
    parser.add_argument("--output", type=Path, default=ROOT / "output", metavar="FOLDER", help="where pages go")
    parser.add_argument("--exit", action="store_true", help="with --demo or --crawl: end when the crawl is done")
    settings, options = settings_module.from_arguments("standalone", argv, parser=parser)
    if options.demo or options.crawl:
        # The progress line is what one looks at; the log file has the rest.
        settings = dataclasses.replace(settings, log_console_level="WARNING")
    if options.demo or (options.crawl and _is_here(options.crawl)):
        # On this machine itself crawls may go only where its owner says so: here, by the command line.
        networks = (*settings.crawl_allow_networks, *THIS_MACHINE)
        settings = dataclasses.replace(settings, crawl_allow_networks=tuple(dict.fromkeys(networks)))
    settings_module.configure_logging(settings)
    family = Family(settings)
    _stop_on_signals(family)
    try:
        if options.crawl:
            options.crawl = demo.start_url(options.crawl)  # a mistake in it is said before anything is started
        family.start()
        print(f"dashboard: {family.url}   (Ctrl-C stops)\n", end="", flush=True)
        if options.demo or options.crawl:
            _run_job(options, settings, family)
        if not (options.exit and (options.demo or options.crawl)):
            family.stopping.wait()
        return family.stop()
    except CommandFailed as error:
        family.stop()
        print(f"standalone: {error}", file=sys.stderr)
        return error.exit_code


def _run_job(options: argparse.Namespace, settings: Settings, family: Family) -> None:
    """The crawl that was asked for; it returns early when everything is being stopped."""
    url = _loopback(family.url)
    if options.crawl:
        found = demo.crawl(options.crawl, options.max_pages, options.depth, master_url=url, api_key=settings.api_key,
                           output_folder=options.output / "crawl", trust=settings, stop=family.stopping)  # fmt: skip
        if options.exit and found is not None and not found.pages:
            raise CommandFailed(f"no page of {options.crawl} could be fetched; the lines above say why")
    else:
        site = Path(settings.database).parent / "demo-site"
        demo.run(url, settings.api_key, site, options.output / "demo", trust=settings, stop=family.stopping)


class Child:
    """One program of ours as a child process, started again when it dies of something that may pass."""

    def __init__(self, script: str, arguments: list[str], stopping: threading.Event) -> None:
        self.script = script
        self.arguments = arguments
        self.process: subprocess.Popen[str] | None = None
        self.exit_code = 0
        self._stopping = stopping
        self._wait_seconds = self._passing_seconds = RESTART_SECONDS[0]
        self._ready = threading.Event()
        self._patient_until = time.monotonic() + PATIENCE_SECONDS
        self.ready_line = ""

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AF_")}
        self._ready.clear()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / self.script), *self.arguments, "--stop-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, args=(self.process,), name=f"{self.script} output", daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Reads the child's standard output to its end, which is also the child's end."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready "):
                self.ready_line = line.split()[1]
                self._ready.set()
            else:
                print(line, end="", flush=True)
        self.exit_code = process.wait()
        process.stdout.close()
        if self.exit_code in PASSING and time.monotonic() < self._patient_until:
            self._passing_seconds *= 2  # it says the same sentence each time
            if not self._stopping.wait(self._passing_seconds / 2):
                self.start()
                return
        self._ready.set()
        if not self._stopping.is_set() and self.exit_code not in HOPELESS and self.ready_line:
            log.error("%s ended with %d; it starts again in %.0f s", self.script, self.exit_code, self._wait_seconds)
            if not self._stopping.wait(self._wait_seconds):
                self._wait_seconds = min(self._wait_seconds * 2, RESTART_SECONDS[1])
                self.start()
        elif not self._stopping.is_set():
            log.error("%s ended with %d", self.script, self.exit_code)
            self._stopping.set()

    def wait_until_ready(self) -> str:
        """The rest of its line `ready …`; raises CommandFailed when it ended or said nothing for a minute."""
        self._ready.wait(READY_SECONDS)
        if not self.ready_line:
            raise CommandFailed(f"{self.script} did not start; the lines above say why", self.exit_code or 1)
        return self.ready_line

    def stop(self, seconds: float) -> int:
        """Asks it to end, kills it after `seconds`; returns its exit code, 0 where it did as asked."""
        process = self.process
        if process is None:
            return 0
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end within %.0f s; it is killed", self.script, seconds)
            process.kill()
            process.wait(10)
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        # Asked before it could listen to the signal, it ends by it: that is no failure.
        return 0 if process.returncode == -signal.SIGTERM else process.returncode

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()


class Family:
    """The master and its worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        self.url = ""
        self._config = _write_config(settings)
        self.master = Child("master.py", ["--config", str(self._config)], self.stopping)
        self.worker = Child("worker.py", ["--config", str(self._config)], self.stopping)

    def start(self) -> None:
        """Starts the master, and the worker as soon as the master answers. Raises CommandFailed."""
        self.master.start()
        self.url = self.master.wait_until_ready()
        # A master that has to start again must be found at the same port, also where port 0 chose it.
        self.master.arguments += ["--port", self.url.rpartition(":")[2]]
        self.worker.arguments += ["--master-url", _loopback(self.url)]
        self.worker.ready_line = "started"
        self.worker.start()

    def stop(self) -> int:
        """The worker drains, then the master stops; returns the first exit code that is not 0."""
        self.stopping.set()
        codes = [
            self.worker.stop(self.settings.drain_seconds + STOP_MASTER_SECONDS),
            self.master.stop(STOP_MASTER_SECONDS),
        ]
        return next((code for code in codes if code), 0)

    def kill(self) -> None:
        self.worker.kill()
        self.master.kill()


def _write_config(settings: Settings) -> Path:
    """The effective settings as one file that both children read; it holds the key, so it is its owner's alone."""
    path = Path(settings.state_folder) / "standalone.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    temporary = path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
    temporary.replace(path)
    return path


def _loopback(url: str) -> str:
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _stop_on_signals(family: Family) -> None:
    """The first signal asks for the orderly stop, which the main thread does; the second one ends at once."""

    def on_signal(number: int, frame: object) -> None:
        if family.stopping.is_set():
            family.kill()
            os._exit(130)
        family.stopping.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def _is_here(url: str) -> bool:
    """Whether the URL of --crawl names this machine."""
    with contextlib.suppress(ValueError):  # a mistake in it is said later, by whoever reads it in full
        host = urllib.parse.urlsplit(url if "://" in url else f"http://{url}").hostname
        return settings_module.is_loopback(host or "")
    return False


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("write a whole number of 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
