"""What goes wrong, when, and to whom? The schedule is made from the seed alone; what comes of it is not repeatable.

Each fault has a moment, a target and a length. `Stage` holds the programs and makes a fault happen; whatever ends is
started again by its keeper.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import power
import proxy
from farm import Master, Program, Worker

HERE = Path(__file__).resolve().parent
LAUNCH = "tests/torture/launch.py"
DEVICE_TIMEOUT = 3.0
STEPS_SECONDS = (10.0, 7200.0, -3600.0, 86400.0, 10.0, 10.0)
"""Of the master's wall clock. Over 30 s forward the master could also take for a sleep of its machine."""
SMALL_DISK_BYTES = 64 * 1024 * 1024
PAUSE_SECONDS = (0.3, 1.0)
"""Between the beginnings of two faults."""
MASTER_SETTINGS: dict[str, Any] = {
    "heartbeat_interval": 0.5,
    "device_timeout": DEVICE_TIMEOUT,
    "timeout_check_interval": 1,
    "dispatch_interval": 1,
    "retry_backoff_seconds": 0.2,
    "log_console_level": "CRITICAL",
    "limits": [{"name": "account", "task_type": "torture", "key": "username", "max_running": 2}],
}
WORKER_SETTINGS: dict[str, Any] = {
    "concurrent_tasks": 4,
    "heartbeat_interval": 0.5,
    "pull_wait_seconds": 2,
    "reconnect_seconds": 0.5,
    "drain_seconds": 5,
    "enable_monitoring": False,
    "log_console_level": "CRITICAL",
    "executors": [str(HERE / "witness.py")],
}


WORKERS = ["shop-1", "shop-2", "shop-3"]
PRODUCERS = ["producer-1", "producer-2"]


class Fault(NamedTuple):
    at: float
    kind: str
    target: str
    seconds: float


#        kind              at whom       for how long (seconds)
KINDS: dict[str, tuple[str, tuple[float, float]]] = {
    "kill_master":        ("master",    (0, 0)),
    "stop_master":        ("master",    (0.5, 4)),
    "disk_full":          ("master",    (0.5, 2)),
    "clock_step":         ("master",    (0, 0)),
    "power_cut_master":   ("master",    (0, 0)),
    "kill_worker":        ("worker",    (0, 0)),
    "power_cut_worker":   ("worker",    (0, 0)),
    "stop_worker":        ("worker",    (DEVICE_TIMEOUT + 1.5, DEVICE_TIMEOUT + 3)),
    "twin":               ("worker",    (1, 4)),
    "kill_producer":      ("producer",  (0, 0)),
    "lose_answers":       ("anybody",   (1, 4)),
    "delay":              ("anybody",   (1, 4)),
    "duplicate":          ("anybody",   (1, 4)),
    "reorder":            ("anybody",   (1, 4)),
    "cut":                ("anybody",   (1, 4)),
    "black_hole":         ("anybody",   (1, DEVICE_TIMEOUT + 3)),
}  # fmt: skip


def make_schedule(
    seed: int, seconds: float, kinds: list[str], pause: tuple[float, float] = PAUSE_SECONDS
) -> list[Fault]:
    """Every kind comes once before any comes again; kills of the master twice as often."""
    rng = random.Random(seed)
    targets = {
        "master": ["master"],
        "worker": WORKERS,
        "producer": PRODUCERS,
        "anybody": [*WORKERS, *WORKERS, *PRODUCERS],
    }
    bag: list[str] = []
    schedule = []
    at = 1.0 + rng.uniform(*pause)
    while at < seconds:
        if not bag:
            bag = [*kinds, *[kind for kind in kinds if kind in ("kill_master", "kill_worker")]]
            rng.shuffle(bag)
        kind = bag.pop()
        whom, length = KINDS[kind]
        schedule.append(Fault(at, kind, rng.choice(targets[whom]), rng.uniform(*length)))
        at += rng.uniform(*pause)
    return schedule


def signal_all(program: Program, number: int) -> None:
    """To the program and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.process.pid, number)


class Stage:
    """All programs of one run below one folder, and the faults that were done to them."""

    def __init__(self, folder: Path, seed: int, plant: str = "", *, has_small_disk: bool = False,
                 workers: list[str] = WORKERS, is_hasty: bool = False) -> None:  # fmt: skip
        """`is_hasty`: producers pause less, and tasks take no time."""
        self.folder, self.seed = folder, seed
        self.worker_names, self.is_hasty = workers, is_hasty
        self.random = random.Random(seed + 1)
        self.witness, self.history = folder / "witness.jsonl", folder / "history.jsonl"
        self.done: list[dict[str, Any]] = []
        self.restarts: dict[str, int] = {}
        self.is_over, self.is_submitted = threading.Event(), threading.Event()
        self.twins = 0
        self._lock = threading.Lock()
        self._cutting = threading.Lock()
        """While a disk is made as a power cut leaves it, nothing else ends its programs or lets them go on."""
        self._keepers: list[threading.Thread] = []
        self.clock = folder / "clock"
        self.clock.write_bytes(struct.pack("d", 0.0))
        self.latest_step = 0.0
        os.environ.update(TORTURE_CLOCK=str(self.clock), TORTURE_WITNESS=str(self.witness), TORTURE_PLANT=plant)
        self.powers = {name: power.Power(folder / name) for name in ("master", *workers)}
        if not power.why_not():
            os.environ.update(power.environment(power.build(folder), *(one.folder for one in self.powers.values())))
        self.is_mounted = has_small_disk
        if has_small_disk:
            (folder / "master").mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(folder / "master")]
            subprocess.run(mount, check=True)
        for one in self.powers.values():
            one.watch()
        self.master = Master(folder / "master", LAUNCH, **MASTER_SETTINGS)
        self.proxy = proxy.Proxy(self.master.port, seed)
        self.workers: dict[str, Worker] = {}
        self.producers: dict[str, subprocess.Popen[bytes]] = {}
        self.database = folder / "master" / "distribution.db"

    # -- programs -------------------------------------------------------------------------------------------

    def start(self) -> None:
        for name in self.worker_names:
            self.workers[name] = self.new_worker(name, name)
            self._keep(name, self._keep_worker)
        for name in PRODUCERS:
            self.start_producer(name)
            self._keep(name, self._keep_producer)
        self._keep("master", self._keep_master)

    def _keep(self, name: str, keep: Callable[[str], None]) -> None:
        thread = threading.Thread(target=keep, args=(name,), name=f"keeper of {name}", daemon=True)
        thread.start()
        self._keepers.append(thread)

    def new_worker(self, party: str, device_id: str) -> Worker:
        return Worker(self.proxy.add(party), self.folder / party, device_id, LAUNCH, **WORKER_SETTINGS)

    def start_producer(self, name: str) -> None:
        command = [sys.executable, str(HERE / "producer.py"), self.proxy.add(name), str(self.history), name]
        more = [str(self.random.randrange(2**31)), *(["hasty"] if self.is_hasty else [])]
        self.producers[name] = subprocess.Popen([*command, *more], stdin=subprocess.DEVNULL)

    def _rest(self, name: str) -> bool:
        """The pause before a restart; False when there is to be none."""
        with self._lock:
            self.restarts[name] = self.restarts.get(name, 0) + 1
        return not self.is_over.wait(self.random.uniform(0.05, 0.5))

    def _keep_master(self, name: str) -> None:
        while not self.is_over.wait(0.05):
            if self.master.process.poll() is not None and self._rest(name):
                self.start_master()

    def start_master(self) -> None:
        with contextlib.suppress(AssertionError):  # a full disk, or killed again while it started: the next try comes
            self.master.start()

    def _keep_worker(self, name: str) -> None:
        worker = self.workers[name]
        while not self.is_over.wait(0.05):
            code = worker.process.poll()
            if code is not None and self._rest(name):
                if code == 3:  # its device is in conflict, or a twin had it: what a person does then
                    self.as_operator(f"/devices/{name}/status", {"status": "active", "reason": "torture"})
                worker.start()

    def as_operator(self, path: str, body: Any) -> None:
        with contextlib.suppress(OSError):
            self.master.api("PUT", path, body, timeout=5)

    def _keep_producer(self, name: str) -> None:
        while not self.is_submitted.wait(0.05):
            if self.producers[name].poll() is not None and self._rest(name):
                self.start_producer(name)

    def end_producers(self) -> None:
        """They finish what they have begun."""
        self.is_submitted.set()
        for thread in self._keepers:
            if thread.name.endswith(tuple(PRODUCERS)):
                thread.join(120)
        for process in self.producers.values():
            process.terminate()
        for process in self.producers.values():
            process.wait(60)

    def end_keepers(self) -> None:
        self.is_over.set()
        for thread in self._keepers:
            thread.join(120)

    def close(self) -> None:
        """Whatever still runs is killed."""
        self.is_submitted.set()
        self.end_keepers()
        self.proxy.close()
        for process in self.producers.values():
            process.kill()
            process.wait(60)
        for program in (*self.workers.values(), self.master):
            signal_all(program, signal.SIGKILL)
            program.kill()
        if self.is_mounted:
            subprocess.run(["umount", str(self.folder / "master")], check=True)

    # -- faults ---------------------------------------------------------------------------------------------

    def play(self, schedule: list[Fault], seconds: float) -> None:
        """The whole schedule, each fault in a thread of its own; returns when all of it is over and made good."""
        start = time.monotonic()
        threads = []
        for fault in schedule:
            self.is_over.wait(max(0.0, start + fault.at - time.monotonic()))
            threads.append(threading.Thread(target=self._do, args=(fault,), name=fault.kind))
            threads[-1].start()
        self.is_over.wait(max(0.0, start + seconds - time.monotonic()))
        for thread in threads:
            thread.join(120)
        self.step_clock(self.latest_step)  # what is due by any clock that was shown is due now

    def _do(self, fault: Fault) -> None:
        began = time.monotonic()
        if fault.kind in proxy.FAULTS:
            self.proxy.set(fault.target, fault.kind)
            time.sleep(fault.seconds)
            self.proxy.set(fault.target, None)
        else:
            getattr(self, fault.kind)(fault)
        facts = {"kind": fault.kind, "target": fault.target, "from": began, "to": time.monotonic()}
        self.done.append(facts)

    def kill_master(self, fault: Fault) -> None:
        with self._cutting:
            self.master.process.kill()

    def kill_worker(self, fault: Fault) -> None:
        with self._cutting:
            self.workers[fault.target].process.kill()

    def kill_producer(self, fault: Fault) -> None:
        self.producers[fault.target].kill()

    def power_cut_master(self, fault: Fault) -> None:
        """The machine is off: every process of it is gone, and of its files only what was synced is there."""
        self.cut_power("master", self.master)

    def power_cut_worker(self, fault: Fault) -> None:
        self.cut_power(fault.target, self.workers[fault.target])

    def cut_power(self, name: str, program: Program, look: Callable[[], None] = lambda: None) -> bool:
        """False if it had just ended by itself. `look` is called while its disk is as the cut has left it."""
        with self._cutting:
            group = program.process.pid
            with contextlib.suppress(ProcessLookupError):
                power.stand_still(group)
                if program.process.poll() is None:  # else it has just been killed, and is started again any moment
                    self.powers[name].cut(self.random)
                    look()
                    os.killpg(group, signal.SIGKILL)
                    return True
        return False

    def stop_master(self, fault: Fault) -> None:
        self._pause(self.master, fault.seconds)

    def stop_worker(self, fault: Fault) -> None:
        self._pause(self.workers[fault.target], fault.seconds)

    def _pause(self, program: Program, seconds: float) -> None:
        """As a suspended machine: all of its processes stand still."""
        group = program.process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGSTOP)
            time.sleep(seconds)
            with self._cutting:
                os.killpg(group, signal.SIGCONT)

    def disk_full(self, fault: Fault) -> None:
        """A small disk is filled to the last byte. Any other: the shim says that it is, or where there is none, the system
        refuses each write of this process (RLIMIT_FSIZE, set from outside)."""
        if self.is_mounted:
            filler = self.folder / "master" / f"filler-{threading.get_ident()}"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(65536)):
                    pass
            time.sleep(fault.seconds)
            filler.unlink(missing_ok=True)  # a power cut may have taken it
            return
        if not power.why_not():
            with self.powers["master"].full():
                time.sleep(fault.seconds)
            return
        pid = self.master.process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            time.sleep(fault.seconds)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    def clock_step(self, fault: Fault) -> None:
        with self._lock:
            (offset,) = struct.unpack("d", self.clock.read_bytes())
            step = STEPS_SECONDS[sum(done["kind"] == "clock_step" for done in self.done) % len(STEPS_SECONDS)]
        self.step_clock(offset + step)

    def step_clock(self, offset: float) -> None:
        self.latest_step = max(self.latest_step, offset)
        with self.clock.open("r+b") as file:
            file.write(struct.pack("d", offset))

    def twin(self, fault: Fault) -> None:
        """A copy of the device starts beside it, as from a cloned disk."""
        with self._lock:
            self.twins += 1
            name = f"twin-{self.twins}"
        twin = self.new_worker(name, fault.target)
        time.sleep(fault.seconds)
        signal_all(twin, signal.SIGKILL)
        twin.kill()
