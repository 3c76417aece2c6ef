"""How is the system as a whole looked at and changed, over HTTP? Handlers; their routes are in api.py's table."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import about
import history
import openapi
import reasons
import wire
from access import Access, Refused
from attention import Attention
from audit import Audit
from backlog import Backlog
from backups import Backup, Backups, Unable
from dispatcher import Dispatcher
from edge import WorkerFile
from events import Events
from fleet import Fleet
from history import History
from keys import ADMIN, ENROLL
from latency import Latency
from reads import Reads
from scheduler import Deletion
from schema import EVENT_KINDS
from series import Series
from settings import VERSION, Settings
from store import Store
from strategies import STRATEGIES
from web import Answer, Call, invalid, stream
from writer import StorageFailing, WriterBusy, WriterStopped


class SystemHandlers:
    """A part of the Api, with what these handlers use."""

    settings: Settings
    store: Store
    reads: Reads
    backlog: Backlog
    series: Series
    history: History
    fleet: Fleet
    attention: Attention
    latency: Latency
    last_deletion: Callable[[], Deletion | None]
    backups: Backups
    dispatcher: Dispatcher
    events: Events
    access: Access
    audit: Audit
    worker_file: WorkerFile
    started_at: float
    explain: Callable[[dict[str, Any]], reasons.Explanation]
    operations: Callable[[], Iterable[openapi.Operation]]

    @property
    def now(self) -> float:
        return self.store.moments()[0]

    # GET /system/overview -> 200 counts, rates, the oldest waiting task and why
    def overview(self, call: Call) -> Any:
        call.query.finish()
        found = self.reads.overview(self.now, self.settings.device_timeout)
        oldest = found["oldest_waiting"]
        task = self.reads.task(oldest["task_id"]) if oldest else None
        if task is not None:
            why = self.explain(task)
            found["oldest_waiting"] = {**oldest, "reason": why.reason, "detail": why.detail}
        found["rates"] |= self.series.last_day(self.now)
        found["paused"] = self.backlog.pauses()
        return {
            **found,
            "attention": self.attention.items(*self.store.moments(), found),
            "version": VERSION,
            "mode": self.settings.mode,
            "uptime_seconds": round(self.now - self.started_at, 3),
            "strategy": self.dispatcher.strategy_name,
            "writer_queue": self.store.writer.queue_length,
            "held_polls": self.dispatcher.held_polls,
            "has_worker_file": self.worker_file.is_there,
        }

    # GET /system -> 200 version, database, writer, http, retention, settings, states, transitions, task_types
    def about_system(self, call: Call) -> Any:
        call.query.finish()
        now, wall = self.store.moments()
        deletion = self.last_deletion()
        online = self.fleet.task_types(heard_after=now - self.settings.device_timeout)
        return {
            **about.program(),
            "mode": self.settings.mode,
            "started_at": wire.iso(self.started_at + wall - now),
            "uptime_seconds": round(now - self.started_at, 3),
            "database": about.database(self.store.path, self.reads.counts_by_state()),
            "writer": about.writing(self.store.writer, self.settings.max_queue_length),
            "http": {
                "requests": self.latency.count,
                "request_ms": self.latency.percentiles(),
                "held_polls": self.dispatcher.held_polls,
                "streams": self.events.open_streams,
            },
            "retention": {
                "settings": about.retention(self.settings),
                "last_run_at": wire.iso(deletion.at) if deletion else None,
                "deleted": {"tasks": deletion.tasks} if deletion else None,
            },
            "settings": about.in_force(self.settings),
            "task_types": [
                {"task_type": name, "devices": n, "online": online.get(name, 0)}
                for name, n in self.fleet.task_types().items()
            ],
        }

    # GET /system/series?hours=&task_type=&device_id=&batch= -> 200 {step_seconds, points}
    def system_series(self, call: Call) -> Any:
        hours = call.query.hours()
        narrowed = {
            "type": call.query.name("task_type"),
            "device": call.query.name("device_id"),
            "batch": call.query.text("batch", maximum=128),
        }
        call.query.finish()
        scopes = [(scope, name) for scope, name in narrowed.items() if name is not None]
        if len(scopes) > 1:
            text = "Send one of task_type, device_id and batch: what was done is counted for each of them alone."
            raise invalid(422, "invalid_field", text, "batch")
        return self.series.points(self.now, hours, *(scopes[0] if scopes else ("all", "")))

    # GET /system/backups -> 200 {folder, daily_at, keep, is_running, last_failure, backups}
    def list_backups(self, call: Call) -> Any:
        call.query.finish()
        return {
            "folder": self.backups.folder.name if self.backups.folder else None,
            "daily_at": self.settings.backup_at,
            "keep": self.settings.backup_keep,
            "is_running": self.backups.is_running,
            "last_failure": self.backups.last_failure,
            "backups": [_backup(path, made) for path, made in self.backups.kept()],
        }

    # POST /system/backup {} -> 200 {path, name, at, bytes, files, seconds}
    def make_backup(self, call: Call) -> Any:
        wire.decode(call.body or b"{}", wire.ReasonIn)
        try:
            path, made = self.backups.make(call.who.actor)
        except Unable as unable:
            status, retry_after = (503, 60) if unable.code == "backup_failed" else (409, None)
            raise invalid(status, unable.code, str(unable), retry_after=retry_after) from None
        return {**_backup(path, made), "path": str(path)}

    # GET /strategy -> 200 {strategy, available}
    def get_strategy(self, call: Call) -> Any:
        call.query.finish()
        return {"strategy": self.dispatcher.strategy_name, "available": self._strategies()}

    # PUT /strategy {strategy} -> 200 {strategy, available}
    def set_strategy(self, call: Call) -> Any:
        name = wire.decode(call.body, wire.StrategyIn).strategy
        call.told.update(strategy=name)
        # Only what the config names is imported: a request must not load code that the operator did not choose.
        if name not in self._strategies():
            text = (
                f"strategy must be one of {', '.join(self._strategies())}; your own goes into load_balance_strategy of"
                " the master's config as module:name."
            )
            raise invalid(422, "invalid_field", text, "strategy")
        self.dispatcher.set_strategy(name)
        self.store.write(lambda tx: tx.note("system", "strategy", strategy=name, by=call.who.actor))
        return {"strategy": name, "available": self._strategies()}

    def _strategies(self) -> list[str]:
        return list(dict.fromkeys([*STRATEGIES, self.dispatcher.configured_strategy]))

    # GET /events (Last-Event-ID: N) -> 200 text/event-stream
    def stream_events(self, call: Call) -> Any:
        last = call.environ.get("HTTP_LAST_EVENT_ID", "")
        after_id = int(last) if re.fullmatch(r"[0-9]{1,18}", last) else None
        is_in_force = functools.partial(self.access.is_in_force, call.who)
        lines = self.events.stream(after_id, is_in_force, call.who.key_id, hidden=_hidden(call))
        if lines is None:
            text = "Too many event streams are open, of this key or in all: close some, or poll instead."
            raise invalid(503, "too_many_streams", text, retry_after=30)
        return stream(lines, "text/event-stream", ("Cache-Control", "no-cache"))

    # GET /events/history?kind=&device_id=&verb=&after=&limit=&cursor= -> 200 {events, next_cursor}
    def event_history(self, call: Call) -> Any:
        query = call.query
        kind, device_id = query.choice("kind", EVENT_KINDS), query.name("device_id")
        verb, after = query.name("verb"), query.moment("after")
        limit = query.integer("limit", 50, minimum=1, maximum=200) or 50
        cursor = query.integer("cursor", None, minimum=1)
        query.finish()
        return self.history.page(
            kind=kind, device_id=device_id, verb=verb, after=after, limit=limit, cursor=cursor, hidden=_hidden(call)
        )

    # POST /login {key} -> 204 and a session cookie
    def login(self, call: Call) -> Any:
        key = wire.decode(call.body, wire.LoginIn).key
        try:
            who, cookie = self.access.log_in(call.environ, key)
        except Refused as refused:
            if refused.status == 401:
                self._tell(history.record_failed_login, call.who.address)
            raise
        if self.audit.count_login(who):
            self._tell(lambda tx: tx.note("access", "login", by=who.actor, address=who.address))
        return Answer(None, 204, headers=(("Set-Cookie", cookie),))

    def _tell(self, verb: Callable[..., object], *args: Any) -> None:
        """Who may come in does not hang on whether the database takes writes."""
        with contextlib.suppress(StorageFailing, WriterBusy, WriterStopped):
            self.store.write(verb, *args)

    # GET /session -> 200 {role, name, key_needed, uses_left (of an enroll key)}; role null: log in first
    def session(self, call: Call) -> Any:
        call.query.finish()
        said = {"role": call.who.role, "name": call.who.name or None, "key_needed": not self.access.is_open}
        key = None if call.who.key_id is None else self.access.keys.get(call.who.key_id)
        return {**said, "uses_left": key.uses_left} if key and key.role == ENROLL else said

    # POST /logout -> 204 and the cookie is gone
    def logout(self, call: Call) -> Any:
        return Answer(None, 204, headers=(("Set-Cookie", self.access.log_out(call.environ)),))

    # GET /openapi.json -> 200 this table as an OpenAPI 3.1 document
    def openapi_document(self, call: Call) -> Any:
        return openapi.build(self.operations(), version=VERSION)


def _hidden(call: Call) -> str | None:
    """The kind of events that only an admin sees: who made which key, and who logs in."""
    return None if call.who.role == ADMIN else "access"


def _backup(path: Path, made: Backup) -> dict[str, Any]:
    facts = made._asdict()
    del facts["instance_id"]  # concerns nobody outside
    return {"name": path.name, **facts, "at": wire.iso(made.at)}
