"""How fast are other task systems on this machine, in the same run as ours?

The same work for each: no-op tasks, from the first submit to the last execution, two worker processes, submitted by one
program with the system's own client. Each task adds a byte to a file, which is how all are counted from outside. A
peer that needs Redis gets a redis-server of its own that saves nothing (save "", appendonly no), which is its fastest
and the least safe. CPU is user and system time of workers and server together, the submitter left out.

Run by bench/run.py (make bench) with the Python of .venv-bench, which holds requirements-bench.txt.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-bench" / "bin" / "python"
DEADLINE_SECONDS = 120.0
WARM_UP_SECONDS = 30.0


class Peer(NamedTuple):
    """One setting of one system: its module in bench/peer, the command of a worker, how many, and its environment."""

    name: str
    module: str
    worker: tuple[str, ...]
    workers: int = 2
    environment: tuple[tuple[str, str], ...] = ()
    is_on_redis: bool = True


HUEY = ("-m", "huey.bin.huey_consumer", "bench.peer.huey_tasks.huey", "-w", "4", "-k", "thread", "-d", "0.01", "-q")
CELERY = ("-m", "celery", "-A", "bench.peer.celery_tasks", "worker", "--loglevel", "CRITICAL")
RQ = ("-m", "rq.cli", "worker", "--quiet", "--url", "REDIS")
PEERS: tuple[Peer, ...] = (
    Peer("huey, durable", "huey_tasks", HUEY, environment=(("PEER_FSYNC", "1"),), is_on_redis=False),
    Peer("huey, fsync off", "huey_tasks", HUEY, environment=(("PEER_FSYNC", "0"),), is_on_redis=False),
    Peer("dramatiq", "dramatiq_tasks", ("-m", "dramatiq", "bench.peer.dramatiq_tasks", "-p", "2"), workers=1),
    Peer("celery, default", "celery_tasks", (*CELERY, "--hostname", "one", "--concurrency", "2"), workers=1),
    Peer(
        "celery, tuned",
        "celery_tasks",
        (*CELERY, "--pool", "solo", "--without-gossip", "--without-mingle", "--without-heartbeat", "--hostname", "N@x"),
        environment=(("PEER_TUNED", "1"),),
    ),
    Peer("rq, simple worker", "rq_tasks", (*RQ, "--worker-class", "rq.worker.SimpleWorker")),
)


class PeerRun(NamedTuple):
    """Tasks/s from the first submit to the last execution; CPU seconds of workers and server per 1,000 tasks."""

    rate: float
    cpu: float


def missing() -> str:
    """Why the peers cannot run here; "" if they can."""
    if not PYTHON.exists():
        return "no .venv-bench: make bench makes it"
    if shutil.which("redis-server") is None:
        return "no redis-server on this machine: apt-get install redis-server"
    return ""


def run(peer: Peer, total: int) -> PeerRun:
    """One run in a folder of its own; every process is ended by its pid."""
    with TemporaryDirectory(prefix="bench-peer-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        witness = folder / "witness"
        witness.touch()
        environment = {**os.environ, **dict(peer.environment), "PYTHONPATH": str(ROOT)}
        environment.update(PEER_WITNESS=str(witness), PEER_FILE=str(folder / "queue.db"))
        servers: list[subprocess.Popen[bytes]] = []
        if peer.is_on_redis:
            process, url = stack.enter_context(_redis(folder))
            servers.append(process)
            environment["PEER_REDIS"] = url
        for n in range(peer.workers):
            place = {"REDIS": environment.get("PEER_REDIS", ""), "N@x": f"worker{n}@bench"}
            command = [str(PYTHON), *(place.get(word, word) for word in peer.worker)]
            servers.append(stack.enter_context(_process(command, environment, folder)))
        _submit(peer, 2, environment, folder)  # opens connections and starts what starts late
        _wait(lambda: witness.stat().st_size >= 2, WARM_UP_SECONDS, f"the first task of {peer.name}")
        before = cpu_seconds(servers)
        started = _submit(peer, total, environment, folder)
        _wait(lambda: witness.stat().st_size >= total + 2, DEADLINE_SECONDS, f"the tasks of {peer.name}")
        seconds = time.perf_counter() - started
        return PeerRun(total / seconds, (cpu_seconds(servers) - before) / total * 1000)


def _submit(peer: Peer, total: int, environment: dict[str, str], folder: Path) -> float:
    """Submit from a process of its own; the moment of the first submit, by the clock that all processes share."""
    steps = f"from time import perf_counter; from bench.peer.{peer.module} import submit"
    command = [str(PYTHON), "-c", f"{steps}; print(perf_counter()); submit({total})"]
    done = subprocess.run(
        command, env=environment, cwd=folder, check=True, timeout=DEADLINE_SECONDS, stdout=subprocess.PIPE
    )
    return float(done.stdout.split()[0])


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with _process(command, dict(os.environ), folder) as process:
        _wait(lambda: _answers(port), WARM_UP_SECONDS, "redis-server")
        yield process, f"redis://127.0.0.1:{port}/0"


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def _process(command: Sequence[str], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "peer.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own session: nobody else is in it
            process.wait(10)


def _wait(is_done: object, seconds: float, what: str) -> None:
    assert callable(is_done)
    end = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.02)


def cpu_seconds(processes: Sequence[subprocess.Popen[bytes]]) -> float:
    """User and system time so far of these processes and their children, the ended ones included; Linux only."""
    wanted = {process.pid for process in processes}
    seconds = 0.0
    parents: dict[int, int] = {}
    times: dict[int, float] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(words[1])
            times[int(entry.parent.name)] = sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")
    for pid in times:
        above = pid
        while above not in wanted and above > 1:
            above = parents.get(above, 0)
        seconds += times[pid] if above in wanted else 0.0
    return seconds


if __name__ == "__main__":
    if missing():
        sys.exit(missing())
    for each in PEERS:
        found = run(each, int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
        print(f"{each.name}: {found.rate:,.0f} tasks/s, {found.cpu:.3f} s CPU per 1,000 tasks", flush=True)
