"""How many devices does one master carry? A simulated fleet over real HTTP: idle, at work, and after a kill.

    idle       1,000 devices with an open pull and a beat every 30 s, and nothing to do: the master's CPU and memory
    working    5,000 devices share short tasks; some hand a task back, some vanish and start again
    stampede   10,000 devices with tasks lose their master (kill -9) and come back; a fleet that knows its spread

All devices live in this one program; the master is the shipped one. A device keeps the contract of worker.py: seq and
ack, holding[] in every beat, a new boot_id after it vanished, jitter on every wait, a report again until it is judged.
At the end the database is read: every task must be completed, with exactly one accepted attempt.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import resource
import secrets
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.farm import Farm, bodies, open_farm
from bench.run import machine
from settings import PROTOCOL, VERSION

API = "/api/distribution"
CALL_SECONDS = 60.0
PULL_WAIT_SECONDS = 20.0
LONGEST_BACKOFF_SECONDS = 60.0
FILES_BESIDE_CONNECTIONS = 500
FIRST_BEAT_SECONDS = 5.0
SCENE_SECONDS = 420.0
"""No scene takes longer, whatever happens."""
STARTS_A_SECOND = 300
"""Devices that are switched on; as many as come back in a second after an outage."""


class Lost(Exception):
    """The master did not answer, or not as a master does."""


class Connection:
    """One kept-alive HTTP/1.1 connection to the master; a reply always has a Content-Length."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Status and document; raises Lost, after which the connection is closed."""
        try:
            return await asyncio.wait_for(self._call(method, path, body), CALL_SECONDS)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError) as error:
            self.close()
            raise Lost(repr(error)) from None

    async def _call(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._reader, self._writer  # close() at the end of a scene forgets them under a call
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        head = f"{method} {API}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Length: {len(content)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in answer[1:] if ": " in line)
        document = json.loads(await reader.readexactly(int(headers["content-length"])))
        if headers.get("connection") == "close":
            self.close()
        document.setdefault("retry_after", float(headers.get("retry-after", 5)))
        return int(answer[0].split()[1]), document

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class Fleet:
    """What all devices share: where the master is, what they did, and when to stop."""

    def __init__(self, url: str, count: int, *, slowest_seconds: float = 0.0, faults: float = 0.0) -> None:
        self.url = url
        self.count = count
        self.keeps_beats_open = 2 * count + FILES_BESIDE_CONNECTIONS <= resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        """As a worker does; else its second connection is opened for each beat"""
        self.slowest_seconds = slowest_seconds
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self.registered: set[str] = set()
        self.reached: set[str] = set()
        self.beating: set[str] = set()
        self.seconds: dict[str, list[float]] = {"heartbeat": [], "report": []}
        """How long calls took until they were answered, after the last `forget`"""
        self.stopping = asyncio.Event()

    def forget(self) -> None:
        """What happened so far does not count."""
        self.reached.clear()
        self.counts.clear()
        for seconds in self.seconds.values():
            seconds.clear()

    async def pause(self, seconds: float) -> None:
        """Sleep, but no longer than the fleet lives."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)


class Device:
    """One simulated device with one slot: a pull and a beat, each on a connection of its own."""

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name, self._fleet = name, fleet
        self._pulls, self._beats = Connection(fleet.url), Connection(fleet.url)
        self._spread_seconds, self._beat_seconds = 1.0, 30.0
        self._next_beat_seconds = FIRST_BEAT_SECONDS
        self._is_registered = asyncio.Event()
        self._start_again()

    def _start_again(self) -> None:
        """A new process of the same device: nothing is held any more."""
        self._boot_id = secrets.token_hex(16)
        self._seq = self._ack = self._beat_seq = 0
        self._held: dict[int, dict[str, Any]] = {}
        self._is_registered.clear()

    async def live(self) -> None:
        beats = asyncio.create_task(self._again_and_again(self._beat))
        try:
            await self._again_and_again(self._work)
        finally:
            beats.cancel()
            self._pulls.close()
            self._beats.close()

    async def _again_and_again(self, step: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        while not self._fleet.stopping.is_set():
            try:
                await step()
                failures = 0
            except Lost:
                self._fleet.counts["calls that found no master"] += 1
                longest = self._spread_seconds if failures == 0 else min(LONGEST_BACKOFF_SECONDS, 2.0**failures)
                failures += 1
                await self._fleet.pause(random.uniform(0, longest))

    async def _say(self, connection: Connection, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        """The document of a 200; None where the call must be made again later, after the wait that was asked for."""
        started = time.monotonic()
        status, document = await connection.call(method, path, body)
        if status == 200:
            kind = path.rpartition("/")[2]
            if kind in self._fleet.seconds:
                self._fleet.seconds[kind].append(time.monotonic() - started)
            self._fleet.reached.add(self.name)
            return document
        self._fleet.counts[f"answers {status} {document.get('code', '')}"] += 1
        if status == 404:
            self._is_registered.clear()
        elif status in (429, 503):
            await self._fleet.pause(document["retry_after"] * random.uniform(1, 1.5))
        elif status >= 400:
            raise SystemExit(f"{self.name}: {status} {document}")
        return None

    async def _register(self) -> None:
        body = {
            "device_id": self.name, "device_name": self.name, "device_type": "simulated", "boot_id": self._boot_id,
            "protocol": PROTOCOL, "version": VERSION, "task_types": ["echo"], "tags": [], "weight": 1,
            "max_concurrent_tasks": 1, "holding": self._holding(),
        }  # fmt: skip
        reply = await self._say(self._pulls, "POST", "/devices/register", body)
        if reply is not None:
            self._beat_seconds = reply["settings"]["heartbeat_interval_seconds"]
            self._spread_seconds = reply["settings"]["reconnect_spread_seconds"]
            self._fleet.registered.add(self.name)
            self._drop(reply["cancel"])
            self._is_registered.set()

    def _holding(self) -> list[dict[str, Any]]:
        return [
            {"assignment_id": task["assignment_id"], "lease_id": task["lease_id"], "phase": "running"}
            for task in self._held.values()
        ]

    def _drop(self, cancelled: Sequence[int]) -> None:
        for assignment_id in cancelled:
            self._held.pop(assignment_id, None)

    async def _beat(self) -> None:
        await self._fleet.pause(self._next_beat_seconds * random.uniform(0.9, 1))
        self._next_beat_seconds = self._beat_seconds
        if self._is_registered.is_set() and not self._fleet.stopping.is_set():
            self._beat_seq += 1
            body = {"boot_id": self._boot_id, "seq": self._beat_seq, "holding": self._holding(), "active_tasks": 0}
            reply = await self._say(self._beats, "POST", f"/devices/{self.name}/heartbeat", body)
            if reply:
                self._drop(reply["cancel"])
                self._fleet.beating.add(self.name)
            if not self._fleet.keeps_beats_open:
                self._beats.close()

    async def _work(self) -> None:
        """One step: register, or ask for a task and do it."""
        if not self._is_registered.is_set():
            await self._register()
            return
        self._seq += 1
        query = f"device_id={self.name}&boot_id={self._boot_id}&limit=1&wait={PULL_WAIT_SECONDS}"
        reply = await self._say(self._pulls, "GET", f"/tasks/pull?{query}&seq={self._seq}&ack={self._ack}")
        if reply is None:
            return
        self._ack = self._seq
        self._drop(reply["cancel"])
        for task in reply["tasks"]:
            self._held[task["assignment_id"]] = task
            await self._run(task)
        if not reply["tasks"] and reply["next_seconds"]:
            await self._fleet.pause(reply["next_seconds"] * random.uniform(0.5, 1))

    async def _run(self, task: dict[str, Any]) -> None:
        await self._fleet.pause(random.uniform(0, self._fleet.slowest_seconds))
        fault = random.random()
        if fault < self._fleet.faults / 2:
            self._fleet.counts["vanished with a task"] += 1
            self._pulls.close()
            await self._fleet.pause(random.uniform(0, 2))
            self._start_again()
            return
        if fault < self._fleet.faults:
            self._fleet.counts["handed a task back"] += 1
            await self._report(task, {"outcome": "released", "reason": "stalled"})
            return
        await self._report(task, {"outcome": "completed", "result": {}, "duration_seconds": 0.01})

    async def _report(self, task: dict[str, Any], entry: dict[str, Any]) -> None:
        """Until it is judged, as from a spool."""
        name = task["assignment_id"], task["lease_id"]
        entry = {"assignment_id": name[0], "lease_id": name[1], **entry}
        body = {"device_id": self.name, "boot_id": self._boot_id, "reports": [entry]}
        failures = 0
        while not self._fleet.stopping.is_set():
            try:
                reply = await self._say(self._pulls, "POST", "/tasks/report", body)
            except Lost:
                self._fleet.counts["calls that found no master"] += 1
                longest = self._spread_seconds if failures == 0 else min(LONGEST_BACKOFF_SECONDS, 2.0**failures)
                failures += 1
                await self._fleet.pause(random.uniform(0, longest))
                continue
            if reply is not None:
                self._fleet.counts[f"reports {reply['reports'][0]['outcome']}"] += 1
                self._held.pop(task["assignment_id"], None)
                return
            if not self._is_registered.is_set():
                await self._register()


@contextlib.asynccontextmanager
async def living(fleet: Fleet) -> AsyncIterator[None]:
    """All devices, started one after the other, until the block ends; they are registered then."""
    tasks = []
    started = time.monotonic()
    try:
        for n in range(fleet.count):
            tasks.append(asyncio.create_task(Device(f"device-{n}", fleet).live()))
            if n % 30 == 29:
                await asyncio.sleep(max(0.0, started + n / STARTS_A_SECOND - time.monotonic()))
        await until("all devices", 180, lambda: len(fleet.registered) == fleet.count)
        yield
    finally:
        fleet.stopping.set()
        await asyncio.wait(tasks, timeout=30)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(what: str, seconds: float, is_done: Callable[[], bool], pause_seconds: float = 0.1) -> float:
    """Seconds until it is done; ends the bench when that takes too long."""
    started = time.monotonic()
    while not is_done():
        if time.monotonic() - started > seconds:
            raise SystemExit(f"waited {seconds:.0f} s in vain for {what}")
        await asyncio.sleep(pause_seconds)
    return time.monotonic() - started


async def idle(farm: Farm, count: int, seconds: float) -> None:
    fleet = Fleet(farm.url, count)
    async with living(fleet):
        await until("a beat of every device", 120, lambda: len(fleet.beating) == count)
        await asyncio.sleep(2 * PULL_WAIT_SECONDS)  # every device has asked again
        fleet.forget()
        cpu = farm.master.cpu_seconds()
        await asyncio.sleep(seconds)
        tell(f"{count:,} idle", "the master's CPU", f"{(farm.master.cpu_seconds() - cpu) / seconds:.1%} of a core")
        tell_size(f"{count:,} idle", farm)
        tell_calls(f"{count:,} idle", fleet)


async def working(farm: Farm, count: int, tasks: int) -> None:
    fleet = Fleet(farm.url, count, slowest_seconds=2.0, faults=0.02)
    scene = f"{count:,} working"
    async with living(fleet):
        await until("a beat of every device", 120, lambda: len(fleet.beating) == count)
        fleet.forget()
        cpu, started = farm.master.cpu_seconds(), time.monotonic()
        await submit(farm, tasks)
        await until("every task", 300, lambda: completed(farm) == tasks, 0.5)
        seconds = time.monotonic() - started
        used = (farm.master.cpu_seconds() - cpu) / seconds
        rate = f"{seconds:.1f} s, {tasks / seconds:,.0f} tasks/s"
        tell(scene, f"{tasks:,} tasks of up to 2 s, 2 % faults", rate)
        tell(scene, "the master's CPU", f"{used:.0%} of a core")
        tell_size(scene, farm)
        tell_calls(scene, fleet)
    check(scene, farm.database, tasks)


async def stampede(farm: Farm, count: int, tasks: int) -> None:
    fleet = Fleet(farm.url, count, slowest_seconds=1.0)
    scene = f"{count:,} back after a kill"
    async with living(fleet):
        await submit(farm, tasks)
        await asyncio.to_thread(farm.kill_master)
        await asyncio.sleep(2)  # long enough for every device to notice
        done = fleet.counts["reports accepted"]
        fleet.forget()
        started = time.monotonic()
        await asyncio.to_thread(farm.start_master_again)
        tell(scene, "the master ready again", f"{time.monotonic() - started:.1f} s after its start")
        await until("all devices back", 300, lambda: len(fleet.reached) == count)
        tell(scene, "all devices answered", f"{time.monotonic() - started:.1f} s after its start")
        tell_size(scene, farm)
        await until("every task", 300, lambda: completed(farm) == tasks, 0.5)
        told = f"{time.monotonic() - started:.1f} s after its start ({done:,} before the kill)"
        tell(scene, f"{tasks:,} tasks of up to 1 s completed", told)
        tell_calls(scene, fleet)
    check(scene, farm.database, tasks)


async def submit(farm: Farm, tasks: int) -> None:
    for body in bodies({"task_type": "echo"}, tasks):
        await asyncio.to_thread(farm.post, "/tasks", body)


def completed(farm: Farm) -> int:
    found: int = farm.get("/tasks/stats?task_type=echo")["by_state"]["completed"]
    return found


def tell(scene: str, what: str, figure: str) -> None:
    print(f"| {scene} | {what} | {figure} |", flush=True)


def tell_size(scene: str, farm: Farm) -> None:
    now, peak = farm.master.resident_bytes() / 2**20, farm.master.peak_bytes() / 2**20
    figure = f"{now:.0f} MB, {peak:.0f} MB at most, {farm.master.open_files():,} open files"
    tell(scene, "the master's memory", figure)


def tell_calls(scene: str, fleet: Fleet) -> None:
    """What the devices saw: how long calls took, and all that was not a plain answer."""
    for kind, seconds in fleet.seconds.items():
        if seconds:
            p50, p99 = (sorted(seconds)[int(share * (len(seconds) - 1))] * 1000 for share in (0.5, 0.99))
            figure = f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {max(seconds) * 1000:.0f} ms"
            tell(scene, f"{len(seconds):,} answers to a {kind}", figure)
    if fleet.counts:
        tell(scene, "what the devices saw", ", ".join(f"{n:,} {what}" for what, n in sorted(fleet.counts.items())))


def check(scene: str, database: Path, tasks: int) -> None:
    """Every task completed, by one accepted attempt; ends the bench if not."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        states = dict(connection.execute("SELECT status, count(*) FROM af_crawl_tasks GROUP BY status").fetchall())
        accepted = "SELECT count(*) FROM af_task_assignment WHERE status = 'completed' GROUP BY task_id"
        twice = sum(n > 1 for (n,) in connection.execute(accepted))
    verdict = states == {"completed": tasks} and not twice
    lost = tasks - states.get("completed", 0)
    tell(scene, "tasks lost, tasks accepted twice", f"{lost} and {twice} of {tasks:,}: {'ok' if verdict else 'WRONG'}")
    if not verdict:
        raise SystemExit(f"the database says {states}")


def allow_files(count: int) -> None:
    """A connection is a file, here and in the master, which inherits this limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + FILES_BESIDE_CONNECTIONS
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if count + FILES_BESIDE_CONNECTIONS > hard:
        raise SystemExit(f"{count:,} devices need as many open files, and this machine allows {hard:,}: ulimit -Hn")


def main(argv: list[str] | None = None) -> int:
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=first, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--idle", type=int, default=1_000, help="devices that have nothing to do (1000)")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long the idle ones are watched (40)")
    parser.add_argument("--working", type=int, default=5_000, help="devices that share tasks (5000)")
    parser.add_argument("--stampede", type=int, default=10_000, help="devices that lose their master (10000)")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks of each run (20000)")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the master is stopped then, too
    allow_files(max(options.idle, options.working, options.stampede))
    print(machine() + "\n\n| scene | what | figure |\n|---|---|---|", flush=True)
    if options.idle:
        with open_farm() as farm:
            asyncio.run(asyncio.wait_for(idle(farm, options.idle, options.seconds), SCENE_SECONDS + options.seconds))
    for step, count in ((working, options.working), (stampede, options.stampede)):
        if count:
            with open_farm() as farm:
                asyncio.run(asyncio.wait_for(step(farm, count, options.tasks), SCENE_SECONDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
