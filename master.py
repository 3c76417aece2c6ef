"""What does the master start, in which order?

    settings -> database -> dispatch -> API -> socket -> scheduler -> serve, until a signal stops it in the same order

`python master.py` runs until SIGTERM or Ctrl-C. Once it takes requests it prints one line, `ready http://HOST:PORT`,
to standard output; its log goes to logs/distribution.log and to standard error. Exit codes: settings.ExitCode.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle==0.13.4", "granian==2.8.7", "msgspec==0.22.0", "peewee==4.5.3", "prometheus_client==0.26.0",
#                 "schedule==1.2.2"]
# ///

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import json
import logging
import os
import shlex
import sys
import threading
from pathlib import Path

import db
import devices
import history
import key_commands
import keys
import lanes
import limits
import retention
import settings as settings_module
import wire
from access import Access, session_secret
from addresses import Addresses
from api import Api, routes
from api_limits import wanted_limits
from artifacts import Artifacts
from attention import Attention
from audit import Audit
from backlog import Backlog
from backups import Backups, back_up, restore
from clock import Clock, boot_seconds, machine_boot_id
from connections import BODIES_AT_ONCE, BODIES_WITHOUT_KEY, EXPORTS_AT_ONCE, Connections
from dispatcher import Dispatcher
from edge import WorkerFile
from events import Events
from fleet import Fleet
from latency import Latency
from metrics import Metrics
from progress import Progress
from rates import Rates
from reads import Reads
from scheduler import Scheduler, Times
from series import Series
from server import CertificateUnusable, PortInUse, Server
from settings import VERSION, ExitCode, Settings, SettingsError
from store import DatabaseRefused, Store, last_moment, lock_database, refusal, refuse_bad_disk, refuse_missing
from strategies import StrategyError
from transaction import Policy
from web import Gate, make_app
from writer import StorageFailing, WriterBusy

log = logging.getLogger("af.master")

ROOM_THREADS = 100 + BODIES_AT_ONCE + BODIES_WITHOUT_KEY + EXPORTS_AT_ONCE
"""Handler threads beyond the held polls and streams, so that everybody else is always served, also while as many slow
bodies and readers as there may be at once are waited for."""


def main(argv: list[str] | None = None) -> int:
    """Runs a master; returns its exit code."""
    parser = argparse.ArgumentParser(prog="master.py", description="Runs the master: API, dashboard and scheduler.")
    parser.add_argument("--stop-with-stdin", action="store_true", help="stop when standard input ends")
    parser.add_argument("--backup", metavar="FOLDER", help="copy the database, in use or not, and its files; then end")
    parser.add_argument("--restore", metavar="FOLDER", help="bring such a copy back, keeping what is there; then end")
    key_commands.add_arguments(parser)
    settings, options = settings_module.from_arguments("master", argv, parser=parser)
    path = Path(settings.database)
    try:
        if options.backup:
            return _back_up(path, Path(options.backup))
        refuse_bad_disk(path, allow_network=settings.allow_network_filesystem)
        if key_commands.is_wanted(options):
            return key_commands.run(settings, options)
        if options.restore:
            with lock_database(path):
                print(restore(path, Path(options.restore), _policy(settings)))
            return ExitCode.OK
        settings_module.configure_logging(settings)
        with lock_database(path):
            return run(settings, path, stop_with_stdin=options.stop_with_stdin)
    except (DatabaseRefused, PortInUse, CertificateUnusable, SettingsError, StrategyError) as error:
        print(f"master: {error}", file=sys.stderr)
        codes = {PortInUse: ExitCode.PORT_IN_USE, CertificateUnusable: ExitCode.SETTINGS,
                 SettingsError: ExitCode.SETTINGS, StrategyError: ExitCode.SETTINGS}  # fmt: skip
        return codes.get(type(error), getattr(error, "exit_code", ExitCode.DATABASE_BAD))
    except StorageFailing as error:
        refused = refusal(path, error)
        print(f"master: {refused}", file=sys.stderr)
        return refused.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"master: {where}{error.strerror or error}", file=sys.stderr)
        return ExitCode.DISK_FULL if error.errno == errno.ENOSPC else ExitCode.SETTINGS


def _back_up(path: Path, folder: Path) -> int:
    refuse_missing(path)
    made = back_up(path, folder)
    print(f"backup {folder}: {path.name}, {made.files} files, {made.bytes} bytes, checked")
    command = shlex.join(["python", "master.py", "--database", str(path), "--restore", str(folder)])
    print(f"To bring it back, stop the master and run: {command}")
    return ExitCode.OK


def run(settings: Settings, path: Path, *, stop_with_stdin: bool = False) -> int:
    """Everything a master is, in the order of its start. Raises DatabaseRefused, PortInUse, CertificateUnusable,
    SettingsError, StrategyError, OSError."""
    refuse_open_host(settings, path)
    server = Server(
        host=settings.host,
        port=settings.port,
        threads=settings.max_held_polls + settings.max_event_streams + ROOM_THREADS,
        certificate=(Path(settings.ssl_certificate), Path(settings.ssl_keyfile)) if settings.ssl_certificate else None,
    )
    server.bind()
    known_until = last_moment(path)
    clock = Clock(not_before=known_until)
    store = Store(path, policy=_policy(settings), moments=clock.moments, max_queue_length=settings.max_queue_length)
    presence = devices.Presence(watching_since=clock.now())
    # The server may have got fewer threads than it asked for: polls must never take the last ones.
    affordable_polls = max(1, server.threads - settings.max_event_streams - ROOM_THREADS)
    dispatcher = Dispatcher(
        store,
        presence,
        strategy=settings.load_balance_strategy,
        max_held_polls=min(settings.max_held_polls, affordable_polls),
    )
    events = Events(settings.max_event_streams)
    store.listeners.append(events.hear)
    store.keep = history.keep
    wanted = _limits(settings)
    store.open()
    store.write(db.resume_clock, machine_boot_id(), boot_seconds())
    store.write(lanes.apply_config, wanted)
    store.write(lambda tx: tx.note("system", "master_started", version=VERSION))
    presence.expected_count = store.write(devices.count_devices)
    held_keys = keys.Keys(settings.api_key)
    held_keys.load(store)
    held_keys.keep_first_use = lambda key: store.write(keys.write_uses, [key])
    store.listeners.insert(0, held_keys.hear)
    reads = Reads(path)
    storage = store.writer.storage
    reads.is_storage_at_fault = storage.cannot_read
    series, latency = Series(reads), Latency()
    artifacts = Artifacts(path, store, reads)
    folder = Path(settings.backup_folder) if settings.backup_folder else None
    backups = Backups(path, folder, settings.backup_at, settings.backup_keep, store)
    audit = Audit(store, reads)

    def keep_books() -> None:
        """What is counted in memory: who was not let in, and when a key was used last."""
        audit.flush()
        held_keys.write_uses(store)

    chores = (*artifacts.chores, *backups.chores, (60.0, keep_books))
    scheduler = Scheduler(store, dispatcher, presence, _times(settings), chores)
    scheduler.deletes_from = store.write(retention.deletes_from, known_until)
    api = Api(
        settings=settings,
        store=store,
        reads=reads,
        backlog=Backlog(reads),
        fleet=Fleet(reads, settings.device_timeout),
        series=series,
        progress=Progress(reads, series),
        history=history.History(reads),
        attention=Attention(reads, settings.device_timeout, storage.watch, backups.watch, scheduler.watch),
        latency=latency,
        last_deletion=lambda: scheduler.last_deletion,
        artifacts=artifacts,
        backups=backups,
        dispatcher=dispatcher,
        presence=presence,
        events=events,
        access=Access(settings, held_keys, secret=session_secret(path), wall=clock.now),
        audit=audit,
        metrics=Metrics(
            reads,
            now=clock.now,
            device_timeout=settings.device_timeout,
            version=VERSION,
            gauges={
                "af_writer_queue": ("Writes that wait for the writer.", lambda: store.writer.queue_length),
                "af_held_polls": ("Pulls that are held open.", lambda: dispatcher.held_polls),
            },
        ),
        worker_file=WorkerFile(Path(settings.worker_file)),
        started_at=clock.now(),
    )

    def announce() -> None:
        log.info("master ready url=%s database=%s", server.url, path)
        if held_keys.are_wanted and not held_keys.has_admin(clock.now()):
            log.warning("no admin key is in force: stop this master and run python master.py --create-key admin")
        if not settings_module.is_loopback(settings.host) and not settings.ssl_certificate:
            log.warning("without TLS everybody on the way can read the keys: see docs/deploy.md, or ssl_certificate")
        # One write with its line end: without a buffer (PYTHONUNBUFFERED) print would let a log line in between.
        print(f"ready {server.url}\n", end="", flush=True)

    def stop_on_damage() -> None:
        server.exit_code = ExitCode.DATABASE_BAD
        server.stop()

    def wake_everybody() -> None:
        api.is_stopping = True
        dispatcher.stop()
        events.close()

    def finish() -> None:
        scheduler.stop()
        with contextlib.suppress(StorageFailing, WriterBusy):
            store.write(lambda tx: tx.note("system", "master_stopped"))
            keep_books()
        reads.close()  # first, so that the writer's connection is the last one and leaves no log file behind
        if not store.close():
            log.error("the writer did not finish in time; what was acknowledged is in the database")
        log.info("master stopped")

    connections = Connections(server.backpressure)
    gate = Gate(
        Addresses(settings.allowed_ips, settings.trusted_proxies),
        Rates(settings.max_requests_per_second),
        connections,
        audit,
    )
    storage.on_damage = stop_on_damage
    app = make_app(routes(api), api.access, gate, settings.max_body_bytes, latency)
    if stop_with_stdin:
        threading.Thread(target=_stop_at_end_of_input, args=(server,), name="stdin", daemon=True).start()
    scheduler.start()
    # What is here stays, and what a request makes ends with it: looked for after every 700 objects, cycles that are
    # hardly ever there cost a twentieth of all time.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    return server.serve(app, on_ready=announce, on_stop=wake_everybody, finish=finish, on_tick=connections.end_overdue)


def refuse_open_host(settings: Settings, path: Path) -> None:
    """Who can be reached from other machines does not even listen without a key. Raises SettingsError."""
    if not settings.api_key and not keys.has_admin(path):
        settings_module.refuse_open(settings)


def _limits(settings: Settings) -> list[limits.Limit]:
    """The config's limits. Raises SettingsError with what PUT /limits would say."""
    try:
        return wanted_limits(wire.decode(json.dumps({"limits": settings.limits}).encode(), wire.LimitsIn))
    except wire.Invalid as error:
        raise SettingsError("config", "limits", None, error.detail) from None


def _policy(settings: Settings) -> Policy:
    return Policy(
        task_timeout=max(1, round(settings.task_timeout)),
        max_retry_count=settings.max_retry_count,
        retry_backoff_seconds=settings.retry_backoff_seconds,
        give_up_seconds=settings.give_up_days * 86400.0,
    )


def _times(settings: Settings) -> Times:
    return Times(
        dispatch_interval=settings.dispatch_interval,
        timeout_check_interval=settings.timeout_check_interval,
        device_timeout=settings.device_timeout,
        retention_days=settings.retention_days,
        heartbeat_retention_days=settings.heartbeat_retention_days,
        event_retention_days=settings.event_retention_days,
        audit_retention_days=settings.audit_retention_days,
    )


def _stop_at_end_of_input(server: Server) -> None:
    """The program that started this one holds the other end of standard input; when it is gone, so are we."""
    while os.read(0, 4096):
        pass
    server.stop()


if __name__ == "__main__":
    sys.exit(main())
