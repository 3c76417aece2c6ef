# /// script
# requires-python = ">=3.9"
# dependencies = ["requests>=2.32"]
# ///
"""How does a device take, run and report tasks?

Copy worker.py, settings.py, executors/ and config/distribution_worker.json to a machine, `pip install requests`, and
start `python worker.py --device-id shop-7`. Only the device opens connections. The contract, with its numbers:

  pull       One pull is always open: limit = free slots, held up to pull_wait_seconds (20, at most 25), numbered by
             seq; ack is the last one received. What is delivered again is not run again. Full for 0.3 s, a device holds
             one with limit 0 on a second connection, so that cancel[] and drain still reach it at once. That one has
             no number: it brings no tasks, and the master ends it when the next one with a limit comes.
  ahead      Of types whose tasks are known to be short (under 0.2 s) a pull also asks for as many as make about 1 s of
             work, at most 1000: they wait here for a slot, the most urgent first. It asks again when half of them have
             begun, and such a pull without a free slot is not held. A queued task says so in holding[].
  heartbeat  Every heartbeat_interval (30 s, or the reply's next_seconds), from its own thread, against a deadline. Its
             holding[] names everything from delivery until the report is acknowledged: queued, running or reporting.
             A problem (spool_full, spool_unwritable, artifacts_full) is told within a second or two, what a task says
             of its progress within 5 s or so. While the interpreter or the disk stalls, a deputy process beats with
             holding null, for as long as a task here may run, 240 s at least, and 60 s more (not on Windows).
  reports    At most 500 in a request and max_body_bytes in all; what is ready goes at once, what becomes ready
             meanwhile goes together. A start is reported once a task has run for 0.2 s; a faster one only its end.
  spool      A report is on disk (length, CRC, one fdatasync a batch) before it is sent, and is sent again after any
             crash, before the first pull. Full (spool_max_bytes) or unwritable: no more pulls, nothing is dropped.
  time       A task over execution_timeout_seconds is reported failed (timeout). One in a process of its own is ended:
             SIGTERM (a cancelled one sees context.cancelled 0.5 s earlier), 5 s later SIGKILL for all it started. A
             thread cannot be killed: 5 s after a cancel, or at once when out of time, it is left behind and replaced.
             What did not start within start_within_seconds (5 for what waits here, by CLOCK_BOOTTIME) is handed back
             unstarted; 2 s later the master gives it to others.
  key        The configured api_key (best an enroll key) is traded for a token of this device when it first registers.
             That stands in the state folder and is shown from then on; refused, the device registers anew with api_key.
  outage     First try after rand(0, reconnect spread), after a broken connection rand(0, a tenth of it); then rand(0,
             2, 4, 8 ... 60 s). At the first start rand(0, 1) instead of the spread: devices boot before their master.
             Connecting takes at most 5 s; a call has a total deadline (pull: wait + 10 s, beat 10, report 30).
  stop       SIGTERM, SIGINT: no more pulls, running tasks get drain_seconds (30), the rest is handed back, the spool is
             flushed (5 s), a last beat says leaving, exit 0. A second signal, 0.5 s later or more: exit 130 at once.
  exit       0 stopped; 2 settings; 3 another process runs under this device_id; 8 the master refuses key or protocol.

It must not trust the network: only a JSON object is an answer, everything else (a captive portal, a proxy's 502, a
redirect) means that the master was not reached. It must not import what the master needs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import platform
import queue
import random
import secrets
import select
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Sequence
from urllib.parse import quote

from executors import task_executor
from executors.device.artifacts import ArtifactFiles, Uploader
from executors.device.child import CANCEL_GRACE_SECONDS, CANCELLED, RELEASED, TIMEOUT, Children
from executors.device.credential import Credential
from executors.device.deputy import Deputy
from executors.device.holding import QUEUED, RUNNING, Held, Holding
from executors.device.link import Busy, Link, MasterClient, Refused, Unreachable, number
from executors.device.machine import STOP_SIGNALS, Machine, lock_file, make_folder
from executors.device.pace import Pace
from executors.device.pulls import Pulls, Wish
from executors.device.reports import Reporter
from executors.device.spool import Spool
from settings import PROTOCOL, VERSION, ExitCode, Settings, SettingsError, configure_logging, from_arguments
from settings import stop as stop_with

log = logging.getLogger("worker")

REGISTER_SECONDS = BEAT_SECONDS = 10.0
LEAVE_SECONDS = 3.0
FLUSH_SECONDS = 5.0
DEPUTY_EXTRA_SECONDS = 60.0
PROGRESS_BEAT_SECONDS = 5.0
CALLERS = ("pull", "listen", "beat", "report", "files", "leave")
START_REPORT_SECONDS = 0.2
KILL_SECONDS = CANCEL_GRACE_SECONDS + 2
SECOND_SIGNAL_SECONDS = 0.5
BUSY_TICK_SECONDS, IDLE_TICK_SECONDS = 0.2, 1.0
GIVE_WAY_SECONDS = 0.0002
"""For the slots to begin what was delivered; else the next request has the interpreter first."""


class Bell:
    """How is the main thread woken from anywhere, a signal handler included? By a byte in a socket, without a lock."""

    def __init__(self) -> None:
        self._ear, self._rope = socket.socketpair()
        self._ear.setblocking(False)
        self._rope.setblocking(False)

    def fileno(self) -> int:
        return self._rope.fileno()

    def ring(self) -> None:
        with contextlib.suppress(OSError):
            self._rope.send(b"!")

    def wait(self, seconds: float) -> None:
        if select.select([self._ear], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self._ear.recv(4096)


class Worker:
    """Which threads run on a device, and when do they stop? The main thread watches; all others may be left behind."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(16)
        self.deputy = Deputy(settings, self.boot_id, folder)
        self.executors = task_executor.load_executors(settings.executors)
        self.link = Link(settings.master_url)
        self.credential = Credential(settings.api_key, folder)
        self.clients = {name: MasterClient(self.link, settings, self.credential) for name in CALLERS}
        self.holding = Holding(settings.concurrent_tasks)
        self.pace = Pace(settings.concurrent_tasks)
        self.spool = Spool(folder, settings.spool_max_bytes)
        unsent = [report.assignment_id for report in self.spool.pending()]
        self.files = ArtifactFiles(folder, settings.artifact_max_bytes, unsent)
        process = (settings.device_id, self.boot_id)
        self.reporter = Reporter(self.spool, self.holding, self.files, self.clients["report"], *process)
        self.uploader = Uploader(self.files, self.reporter, self.clients["files"], *process)
        self.machine = Machine(folder)
        self.settings_by_name = dataclasses.asdict(settings)
        self.children = Children(self.settings_by_name, folder)
        self.unreported: set[Held] = set()  # settled, the report not handed over yet: a stop waits
        self.handing_back = threading.Event()  # children end now, and their tasks are handed back
        self.work: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry for each task that waits for a slot
        self.bell = Bell()
        self.registered = threading.Event()
        self.stopping = threading.Event()  # no new work
        self.end_code: Optional[ExitCode] = None
        self.signal_count, self.signal_at = 0, 0.0
        self.heartbeat_seconds = float(settings.heartbeat_interval)
        self.drain_seconds = float(settings.drain_seconds)
        self.is_monitored = settings.enable_monitoring
        self.is_drained_by_master = False
        self.next_beat = self.last_beat = 0.0
        self.told_problem: Optional[str] = None
        self.beating = threading.Lock()  # held during a beat, and for good by the last one
        self.beat_seq = itertools.count(1)  # one for two threads: the last beat must not share its number
        self.pulls = Pulls(settings, self.boot_id, self.holding, self.clients, self.registered, self.stopping,
                           wish=self._wish, take=self._take, follow=self._follow)  # fmt: skip

    # -- the main thread --

    def run(self) -> ExitCode:
        """Work until a signal, or until the master refuses this process; answers the exit code."""
        log.info("worker started device=%s master=%s slots=%d types=%s", self.settings.device_id,
                 self.settings.master_url, self.holding.slots, ",".join(sorted(self.executors)))  # fmt: skip
        self.children.kill_leftovers()
        self._start("journal", self._loop, self.reporter.journal, lambda: True)
        steps = {"report": self._report, "files": self.uploader.send, "beat": self._beat, "pull": self._pull}
        for name, step in {**steps, "listen": self.pulls.listen}.items():
            self._start(name, self._loop, step, lambda: self.end_code is None)
        for _ in range(self.holding.slots):
            self._start("slot", self._slot)
        while self.end_code is None and not self.stopping.is_set():
            self._tick(BUSY_TICK_SECONDS if self.holding.busy_count else IDLE_TICK_SECONDS)
            if self.signal_count:
                self.stopping.set()
        return self._stop()

    def _start(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name=name, daemon=True).start()

    def _tick(self, seconds: float) -> None:
        """Wait that long or until the bell rings, and see what time did."""
        self.bell.wait(seconds)
        try:
            now = time.monotonic()
            for client in self.clients.values():
                client.cut_if_overdue(now)
            if self.stopping.is_set() or self.reporter.problem:
                self.pulls.take_back()
            for held in self.holding.busy():
                self._watch(held, now)
            self.children.end_idle(now)
        except Exception:
            log.exception("the watching thread goes on")

    def _watch(self, held: Held, now: float) -> None:
        """What time does to a task that is here; one in a process of its own is ended by its slot's thread."""
        ran = now - held.started
        is_in_thread = not self._has_process(held)
        if held.phase == QUEUED:
            self._hand_back_if_it_may_not_start(held)
        elif is_in_thread and held.cancelled is not None and now - held.cancelled > CANCEL_GRACE_SECONDS:
            self._leave_behind(held, "was cancelled")
        elif is_in_thread and ran > (timeout := self._timeout(held)):
            message = f"ran longer than {timeout:g} s"
            self._leave_behind(held, message, error_type=TIMEOUT, error_message=message, duration_seconds=ran)
        elif ran >= START_REPORT_SECONDS and not held.is_start_told and held.cancelled is None:
            held.is_start_told = True
            self.reporter.put_start(held)

    def _has_process(self, held: Held) -> bool:
        executor = self.executors.get(str(held.task.get("task_type")))
        return executor is not None and executor.isolation == "process"

    def _timeout(self, held: Held) -> float:
        return number(held.task.get("execution_timeout_seconds"), self.settings.task_timeout, 0.01, 1e9)

    def _leave_behind(self, held: Held, why: str, **failed: Any) -> None:
        """Give the slot of a task that does not end to a new thread."""
        is_reported = self.holding.settle(held, leave_thread=True)
        self.files.drop(held.assignment_id)
        if held.is_replaced:
            log.warning("left behind %s: it %s and its thread does not end; a new thread has its slot", held, why)
            self._start("slot", self._slot)
        if is_reported and failed:
            self._report_end(held, {"outcome": "failed", **failed})

    def _hand_back_if_it_may_not_start(self, held: Held) -> None:
        if self.stopping.is_set():
            self._hand_back(held, "the device stops")
        elif held.is_too_late():
            self._hand_back(held, "not started in time")
            self.pace.forget(str(held.task.get("task_type")))

    def _hand_back(self, held: Held, reason: str) -> None:
        self.unreported.add(held)
        if self.holding.settle(held):
            log.info("released %s reason=%s", held, reason)
            self._report_end(held, {"outcome": "released", "reason": reason})
        self.unreported.discard(held)

    def _report_end(self, held: Held, content: dict[str, Any]) -> None:
        self.reporter.put({"assignment_id": held.assignment_id, "lease_id": held.lease_id, **content})

    def end(self, code: ExitCode, sentence: str) -> None:
        """The master refuses this process for good."""
        if self.end_code is None:
            log.error("%s", sentence)
            self.end_code = code
            self.deputy.rest()
            self.bell.ring()

    def on_signal(self, *_: Any) -> None:
        """It must not lock, log or wait: the main thread may be anywhere. A Ctrl-C passed on counts once."""
        now = time.monotonic()
        if self.signal_count and now - self.signal_at >= SECOND_SIGNAL_SECONDS:
            os._exit(130)
        self.signal_count += 1
        self.signal_at = self.signal_at or now

    def stop_with_stdin(self) -> None:
        """The parent holds the other end of stdin; its end is the parent's end."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            while sys.stdin.buffer.read(4096):
                pass
        self.stopping.set()
        self.bell.ring()

    # -- stopping --

    def _stop(self) -> ExitCode:
        self.stopping.set()
        self.link.hurry()
        with self.holding.changed:
            self.holding.changed.notify_all()
        if self.end_code != ExitCode.CONFLICT:  # another process has the tasks now
            self._drain()
        self._wait(lambda: not self.unreported and self.reporter.is_flushed(to_disk_only=True), FLUSH_SECONDS)
        if self.end_code is None and self.registered.is_set():
            self._wait(self.reporter.is_flushed, FLUSH_SECONDS)
            self._leave()
        if self.reporter.is_flushed():
            self.spool.close()
        self.handing_back.set()
        self.children.end_all()
        log.info("worker stopped device=%s spooled=%d", self.settings.device_id, len(self.spool.pending()))
        return ExitCode.OK if self.end_code is None else self.end_code

    def _drain(self) -> None:
        """Let running tasks finish, and hand back what does not; `_watch` hands back what has not begun."""
        log.info("drain busy=%d seconds=%g", self.holding.busy_count, self.drain_seconds)
        self._wait(lambda: self.holding.busy_count == 0, self.drain_seconds)
        # Nobody else may get a task that still runs here: first its process ends.
        self.handing_back.set()
        self._wait(lambda: not any(self._has_process(held) for held in self.holding.busy()), KILL_SECONDS)
        for held in self.holding.busy():
            self._hand_back(held, "the device stops")

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until and self.end_code != ExitCode.CONFLICT:
            self._tick(0.02)

    def _leave(self) -> None:
        self.beating.acquire(timeout=LEAVE_SECONDS)
        self.deputy.rest()
        try:
            self.clients["leave"].post(self._path("heartbeat"), self._beat_body(leaving=True), LEAVE_SECONDS)
        except (Unreachable, Busy, Refused) as error:
            log.warning("the master was not told that this device leaves: %s", error)

    # -- every other thread --

    def _loop(self, step: Callable[[], None], goes_on: Callable[[], bool]) -> None:
        """Call `step` again and again; what goes wrong is judged here, for all threads."""
        while goes_on():
            started = time.monotonic()
            try:
                step()
            except Unreachable as error:
                if not error.was_cut:
                    self.link.failed(started, error)
            except Busy as error:
                log.warning("%s", error)
                self._pause(error.seconds * random.uniform(1, 1.5))
            except Refused as error:
                self._refused(error)
            except Exception:
                log.exception("the %s thread goes on", threading.current_thread().name)
                self._pause(random.uniform(0.5, 1.5))

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            time.sleep(0.2)

    def _refused(self, error: Refused) -> None:
        me = self.settings.device_id
        if error.code == "unknown_device" and self.registered.is_set():
            log.warning("the master does not know device=%s; it registers again", me)
            self.registered.clear()
        elif error.code == "superseded":
            self.end(
                ExitCode.CONFLICT, f"another process runs as device {me}, so this one ends: one device_id, one worker"
            )
        elif error.code == "conflict":
            detail = error.detail or f"several processes run as device {me}; stop all but one, then set it active"
            self.end(ExitCode.CONFLICT, f"the master holds device {me} in conflict: {detail}")
        elif error.status == 401 and self.credential.put_aside(error.key):
            log.warning("the master refuses the token of device=%s; it registers again: %s", me, error.detail)
            self.registered.clear()
        elif error.status in (401, 403) and error.code != "address_not_allowed":  # an address may change again
            what = f"the master refuses this device's key ({error})" if error.key else "no key to register with"
            advice = "write an enroll key, or the api_key, into api_key of its config or into AF_API_KEY"
            self.end(ExitCode.REFUSED, f"device {me}: {what}; {advice}")
        elif error.status == 426:
            self.end(ExitCode.REFUSED, error.detail or "the master needs a newer worker.py: copy its version here")
        else:
            log.error("the master refused a call: %s", error)
            self._pause(random.uniform(5, 15))

    def _path(self, what: str) -> str:
        return f"/devices/{quote(self.settings.device_id, safe='')}/{what}"

    def _report(self) -> None:
        if self.registered.wait(1.0):
            self.reporter.send()

    # -- beats --

    def _beat(self) -> None:
        """Wait for the next beat's moment, and beat. The deputy hears of it too, and beats if this thread cannot."""
        if not self.registered.is_set():
            self.deputy.rest()
            self.registered.wait(1.0)
            return
        due = max(self.next_beat, self.link.next_try)  # no holding[] is written down before, or it would be stale
        patience = self.holding.longest_timeout(self.settings.task_timeout) + DEPUTY_EXTRA_SECONDS
        self.deputy.expect(due, interval=self.heartbeat_seconds, patience=patience)
        left = due - time.monotonic()
        if left > 0:
            time.sleep(min(left, 1.0))
            is_early = self.reporter.problem != self.told_problem
            if time.monotonic() - self.last_beat >= PROGRESS_BEAT_SECONDS:
                is_early = is_early or self.holding.has_progress_to_tell()
            if is_early:
                self.next_beat = 0.0
            return
        if self.next_beat and -left > self.heartbeat_seconds + BEAT_SECONDS:
            log.warning("beat late by %.0f s: a task held the interpreter, or this machine stood still", -left)
        try:
            with self.beating:
                reply = self.clients["beat"].post(self._path("heartbeat"), self._beat_body(), BEAT_SECONDS)
        except Busy as busy:
            self.next_beat = time.monotonic() + busy.seconds * random.uniform(1, 1.5)
            return
        if not isinstance(reply.get("cancel"), list):
            raise Unreachable("answered a heartbeat without cancel[]", was_broken=True)
        self._follow(reply)
        seconds = number(reply.get("next_seconds"), self.heartbeat_seconds, 0.05, 3600) * random.uniform(0.9, 1)
        self.next_beat = max(self.next_beat + seconds, time.monotonic())

    def _beat_body(self, *, leaving: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {"boot_id": self.boot_id, "seq": next(self.beat_seq)}
        self.last_beat = time.monotonic()
        body["holding"] = self.holding.as_holding()
        body["problem"] = self.told_problem = self.reporter.problem
        body["clock"] = round(time.time(), 3)
        body.update(active_tasks=self.holding.busy_count, system_info=self.machine.system_info)
        if self.is_monitored:
            body.update(self.machine.usage())
        return {**body, "leaving": True} if leaving else body

    def _follow(self, reply: dict[str, Any]) -> bool:
        """What the replies to beats and pulls say about tasks and draining; whether it was news."""
        cancel = reply.get("cancel")
        self.holding.cancel(cancel if isinstance(cancel, list) else ())
        is_news = bool(reply.get("drain")) != self.is_drained_by_master
        if is_news:
            self.is_drained_by_master = not self.is_drained_by_master
            log.info("the master says %s", "drain: no new tasks" if self.is_drained_by_master else "go on")
            with self.holding.changed:
                self.holding.changed.notify_all()
        return is_news or bool(cancel)

    # -- registering and pulling --

    def _pull(self) -> None:
        """One step: register if need be, wait for the replay or for a slot, then one pull."""
        self.link.wait_turn()
        if not self.registered.is_set():
            self._register()
        elif self.reporter.is_replaying and not self.stopping.is_set():
            self.stopping.wait(0.05)
        else:
            self.pulls.pull()

    def _register(self) -> None:
        if self.stopping.is_set():
            self._pause(0)
            return
        settings = self.settings
        body = {
            "device_id": settings.device_id,
            "device_name": settings.device_name,
            "device_type": f"{platform.system()} {platform.machine()}".strip(),
            "boot_id": self.boot_id,
            "protocol": PROTOCOL,
            "version": VERSION,
            "task_types": sorted(self.executors),
            "tags": sorted({*settings.tags, *task_executor.device_tags(self.executors)}),
            "weight": settings.weight,
            "max_concurrent_tasks": self.holding.slots,
            "holding": self.holding.as_holding(),
            "wants_token": self.credential.is_configured,
        }
        reply = self.clients["pull"].post("/devices/register", body, REGISTER_SECONDS)
        said = reply.get("settings")
        if not isinstance(said, dict):
            raise Unreachable("answered a registration without settings", was_broken=True)
        self.credential.keep(reply.get("token"))
        self._adopt(said)
        cancel = reply.get("cancel")
        self.holding.cancel(cancel if isinstance(cancel, list) else ())
        log.info("registered device=%s status=%s", settings.device_id, reply.get("status"))
        self.registered.set()

    def _adopt(self, said: dict[str, Any]) -> None:
        """What the master wants of its devices, as far as this device's own settings allow."""
        mine = self.settings
        self.heartbeat_seconds = number(said.get("heartbeat_interval_seconds"), mine.heartbeat_interval, 0.05, 3600)
        self.drain_seconds = number(said.get("drain_seconds"), mine.drain_seconds, 0, mine.drain_seconds)
        # A large fleet needs longer than 30 s; who writes a shorter time into a device's config keeps it.
        longest = mine.reconnect_seconds if mine.reconnect_seconds < Settings.reconnect_seconds else 3600.0
        self.link.spread_seconds = number(said.get("reconnect_spread_seconds"), mine.reconnect_seconds, 0, longest)
        self.files.largest_bytes = int(number(said.get("max_artifact_bytes"), self.files.largest_bytes, 1, 2**50))
        self.reporter.max_body_bytes = int(number(said.get("max_body_bytes"), 8388608, 4096, 2**30))
        self.is_monitored = mine.enable_monitoring and said.get("enable_monitoring") is not False
        first = number(said.get("next_seconds"), self.heartbeat_seconds, 0.05, 3600)
        self.next_beat = time.monotonic() + first * random.uniform(0.5, 1)

    def _wish(self) -> Wish:
        """What to ask for."""
        if not self.holding.is_low or self.stopping.is_set() or self.is_drained_by_master or not self.reporter.has_room:
            return Wish(0, {})
        ahead = self.pace.ahead(self.holding.types_in(QUEUED), self.holding.types_in(RUNNING))
        return Wish(self.holding.room(), ahead)

    def _take(self, added: list[Held]) -> None:
        for _ in added:
            self.work.put(None)
        time.sleep(GIVE_WAY_SECONDS)
        self.bell.ring()

    # -- slots --

    def _slot(self) -> None:
        """Run tasks one after another, until this thread was left behind."""
        while True:
            self.work.get()
            held = self.holding.next_queued()
            self._hand_back_if_it_may_not_start(held)
            if self.holding.begin(held):
                self._run(held)
            if held.is_replaced:
                return

    def _run(self, held: Held) -> None:
        log.debug("start %s", held)
        executor = self.executors.get(str(held.task.get("task_type")))
        if executor is None:
            message = f"device {self.settings.device_id} has no executor for {held.task.get('task_type')}"
            outcome = task_executor.Outcome("failed", error_message=message, error_type="no_executor")
        elif executor.isolation == "process":
            outcome = self.children.run(
                executor,
                held.task,
                ending=partial(self._ending_of, held, self._timeout(held)),
                report_progress=held.note_progress,
                artifact_folder=self.files.folder_of(held.assignment_id),
            )
            if outcome.error_type == RELEASED and self.handing_back.is_set():
                self.files.drop(held.assignment_id)
                self._hand_back(held, "the device stops")
                return
        else:
            outcome = task_executor.run(
                executor,
                held.task,
                is_cancelled=held.is_cancelled,
                report_progress=held.note_progress,
                settings=self.settings_by_name,
                artifact_folder=self.files.path_of(held.assignment_id),
            )
        outcome = self.files.seal(held.assignment_id, outcome)
        self.unreported.add(held)
        is_reported = self.holding.settle(held)
        if is_reported:
            self.reporter.put(outcome.as_report(held.assignment_id, held.lease_id))
        self.unreported.discard(held)
        if not is_reported:
            self.files.drop(held.assignment_id)
            log.info("dropped %s: %s", held, "reported before" if held.cancelled is None else "cancelled")
            return
        is_completed = outcome.outcome == "completed"
        self.pace.note(str(held.task.get("task_type")), time.monotonic() - held.started, is_completed=is_completed)
        # A line for each of thousands of short tasks a second would cost more than the tasks.
        is_notable = not is_completed or outcome.duration_seconds >= START_REPORT_SECONDS
        log.log(logging.INFO if is_notable else logging.DEBUG, "%s %s seconds=%.3f %s", outcome.outcome, held,
                outcome.duration_seconds, outcome.error_message or "")  # fmt: skip

    def _ending_of(self, held: Held, timeout: float) -> Optional[tuple[str, str]]:
        """Why a task in a process of its own shall end now."""
        if held.is_cancelled():
            return CANCELLED, "cancelled"
        if self.handing_back.is_set():
            return RELEASED, "the device stops"
        if time.monotonic() - held.started > timeout:
            return TIMEOUT, f"ran longer than {timeout:g} s"
        return None


def take_folder(settings: Settings) -> Path:
    """The folder of this device's state, locked for the life of this process; exits with 2 or 3 if that cannot be."""
    folder = Path(settings.state_folder) / settings.device_id
    try:
        if not settings.device_id.strip("."):
            raise OSError(0, "device_id is no name for a folder")
        make_folder(folder, mode=0o700)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        stop_with(SettingsError("state_folder", str(folder), None, f"cannot be used ({error.strerror}); write another"))
    try:
        lock_file(descriptor)
    except OSError:
        log.error("device %s runs on this machine already (%s is locked); stop it, or start with another --device-id",
                  settings.device_id, folder)  # fmt: skip
        sys.exit(ExitCode.CONFLICT)
    if hasattr(os, "register_at_fork"):  # a process that a task forks must not keep the lock when the worker is gone
        os.register_at_fork(after_in_child=partial(os.close, descriptor))
    return folder  # the descriptor stays open on purpose: closing it would give the lock away


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a worker until it is told to stop; answers the exit code."""
    parser = argparse.ArgumentParser(prog="worker.py", description="Take tasks from the master, run them, report them.")
    parser.add_argument("--stop-with-stdin", action="store_true", help="stop as at SIGTERM when stdin ends")
    parser.add_argument("--doctor", action="store_true", help="say what keeps this device from working, and end")
    is_start = "--doctor" not in (sys.argv if argv is None else argv)
    settings, arguments = from_arguments("worker", argv, parser=parser, starting=is_start)
    if arguments.doctor:
        from executors.device import doctor

        return doctor.examine(settings)
    configure_logging(settings)
    task_executor.install_capture()
    folder = take_folder(settings)
    try:
        worker = Worker(settings, folder)
    except OSError as error:
        stop_with(SettingsError("state_folder", str(folder), None, f"cannot be used ({error.strerror}); write another"))
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(worker.bell.fileno(), warn_on_full_buffer=False)
        for number_of_signal in STOP_SIGNALS:
            signal.signal(number_of_signal, worker.on_signal)
    if arguments.stop_with_stdin:
        threading.Thread(target=worker.stop_with_stdin, name="stdin", daemon=True).start()
    return int(worker.run())


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    # Not sys.exit: it would wait for threads that a task left behind.
    os._exit(code)
