"""Who beats while the worker cannot? A task in a C call that keeps the interpreter, or a disk that stalls, stops all
threads of a process, so a small process beside it does.

After every beat the worker tells it through a pipe when the next one is due. If nothing comes until half an interval
(at most 10 s) after that, the deputy sends a sign of life: a heartbeat with holding null, from which the master
concludes nothing about tasks. It does so for as long as a task may last, not for ever; and not for a worker that was
stopped (SIGSTOP), where the system tells (Linux).

It ends with the worker, when the pipe does, and before that only by SIGKILL. It logs nothing: the worker says how late
its own beat was. Windows has no deputy: there a pipe and a time cannot be waited for in one call.

It is a bare interpreter (no site, no requests, no json until the first beat), which costs 4 MB; forked from the worker
it would cost 10. So this file imports nothing at its top that such an interpreter does not have already, or almost.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # typing itself would cost another megabyte
if TYPE_CHECKING:
    import subprocess
    from pathlib import Path
    from typing import Any, NoReturn, Optional

    from settings import Settings

BEAT_SECONDS = 10.0
LONGEST_MARGIN_SECONDS = 10.0
NEVER = float("inf")
RUN = "import sys; sys.path.insert(0, sys.argv[1]); from executors.device import deputy; deputy.main()"


class Deputy:
    """The worker's end of the pipe; without a process at the other end it does nothing."""

    def __init__(self, settings: Settings, boot_id: str, folder: Path) -> None:
        self._settings, self._boot_id, self._folder = settings, boot_id, folder
        self._process = _start(settings, boot_id, folder)
        self._due: Optional[float] = None
        self._speaks_at = NEVER

    def expect(self, due: float, *, interval: float, patience: float) -> None:
        """The next beat is due at that moment (monotonic); `patience`: how long to beat in its place, in seconds."""
        if self._due == due:
            return
        if self._process is not None and (time.monotonic() > self._speaks_at or self._process.poll() is not None):
            self._replace()  # it was killed; or it has had to beat, and will never be small again
        self._due, self._speaks_at = due, due + _margin(interval)
        self._tell(f"{due} {interval} {patience}")

    def _replace(self) -> None:
        import contextlib
        import subprocess

        assert self._process is not None and self._process.stdin is not None
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._process.stdin.close()
        self._process = _start(self._settings, self._boot_id, self._folder)

    def rest(self) -> None:
        """No beat is due until the next `expect`."""
        if self._due is not None:
            self._due, self._speaks_at = None, NEVER
            self._tell(f"{NEVER} 0 0")

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            try:
                os.write(self._process.stdin.fileno(), line.encode() + b"\n")
            except (OSError, ValueError):  # it was killed, or is just replaced: a worker can do without it
                pass


def _margin(interval: float) -> float:
    return min(LONGEST_MARGIN_SECONDS, interval / 2)


def _start(settings: Settings, boot_id: str, folder: Path) -> Optional[subprocess.Popen[bytes]]:
    if os.name != "posix":
        return None
    import dataclasses
    import json
    import logging
    import subprocess
    from pathlib import Path

    from executors.device.machine import STOP_SIGNALS

    root = str(Path(__file__).resolve().parents[2])
    about = {"path": sys.path, "settings": dataclasses.asdict(settings), "boot_id": boot_id, "folder": str(folder)}
    # The mask is inherited: what stops the worker must not stop its deputy first.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", RUN, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin is not None
        # By the pipe and not by its command line: there is a key in it.
        process.stdin.write(json.dumps(about).encode() + b"\n")
        process.stdin.flush()
        os.set_blocking(process.stdin.fileno(), False)
    except OSError as error:
        logging.getLogger("worker").warning("no deputy: %s; a task that holds the interpreter will cost beats", error)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    return process


# ---- the deputy's own process ----


def main() -> NoReturn:
    """Wait for the worker's word, its silence or its end."""
    worker, unread = os.getppid(), b""
    watch: Optional[Watch] = None
    while True:
        if select.select([0], [], [], watch.wait_seconds() if watch else None)[0]:
            heard = os.read(0, 65536)
            if not heard:
                os._exit(0)
            *lines, unread = (unread + heard).split(b"\n")
            if lines and watch is None:
                watch = Watch(worker, lines.pop(0))
            if lines and watch is not None:
                watch.expect(*map(float, lines[-1].split()))
        if watch is not None:
            watch.look(time.monotonic())


class Watch:
    """When is it time to beat in the worker's place?"""

    def __init__(self, worker: int, about: bytes) -> None:
        self._worker, self._about = worker, about
        self._interval, self._until = 0.0, NEVER
        self._due = NEVER  # a beat in its place
        self._client: Any = None
        self._credential: Any = None
        self._thread: Any = None

    def expect(self, due: float, interval: float, patience: float) -> None:
        self._interval, self._until = interval, due + patience
        self._due = due + _margin(interval)

    def wait_seconds(self) -> Optional[float]:
        if self._thread is not None:
            return 0.5
        return None if self._due == NEVER else max(0.0, self._due - time.monotonic())

    def look(self, now: float) -> None:
        if self._thread is not None:
            self._client.cut_if_overdue(now)
            if not self._thread.is_alive():
                self._thread = None
        if now < self._due:
            return
        if now > self._until:
            self._due = NEVER
            return
        self._due = now + self._interval
        if self._thread is None and os.getppid() == self._worker and not self._is_stopped():
            self._start_beat()

    def _is_stopped(self) -> bool:
        """By SIGSTOP or a debugger: it works on nothing, so nobody may say that it lives."""
        try:
            with open(f"/proc/{self._worker}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] in "Tt"
        except (OSError, IndexError):
            return False

    def _start_beat(self) -> None:
        """In a thread, so that the end of the worker is seen while the master does not answer."""
        import json
        import threading
        from urllib.parse import quote

        about = json.loads(self._about)
        if self._client is None:
            sys.path[:] = about["path"]
            from pathlib import Path

            from executors.device.credential import Credential
            from executors.device.link import Link, MasterClient
            from settings import Settings

            settings = Settings(**about["settings"])
            self._credential = Credential(settings.api_key, Path(about["folder"]))
            self._client = MasterClient(Link(settings.master_url), settings, self._credential)
        self._credential.reload()
        path = f"/devices/{quote(about['settings']['device_id'], safe='')}/heartbeat"
        body = {"boot_id": about["boot_id"], "seq": 0, "holding": None}
        self._thread = threading.Thread(target=self._beat, args=(path, body), daemon=True)
        self._thread.start()

    def _beat(self, path: str, body: dict[str, Any]) -> None:
        from executors.device.link import Busy, Refused, Unreachable

        try:
            self._client.post(path, body, BEAT_SECONDS)
        except (Busy, Refused, Unreachable):
            pass  # the next one is not far
