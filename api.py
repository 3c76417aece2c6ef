"""What can be asked over HTTP?

`routes` is the whole API: method, path, role, handler, what goes in and what comes out. A handler reads the request,
calls one verb or one question, and replies; it holds no rules. Bodies are checked in wire.py, access in access.py,
errors become replies in web.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

import db
import devices
import edge
import export
import openapi
import reasons
import web
import wire
from access import Access, open_upload
from api_limits import LimitHandlers
from artifacts import Artifacts
from backlog import Backlog
from dispatcher import Delivery, Dispatcher, Reply
from events import Events
from metrics import CONTENT_TYPE, Metrics
from openapi import FILTERS, PAGE, Operation, Query
from reads import DEVICE_STATES, TASK_COLUMNS, Reads
from settings import PROTOCOL, VERSION, Settings
from store import Store
from strategies import STRATEGIES
from transaction import Tx
from values import ARTIFACT_NAME_PATTERN, SHA256_PATTERN
from web import Answer, Call, Route, invalid

PREFIX = openapi.PREFIX
CHUNK = 1000
"""Bulk actions change this many tasks in one transaction."""
LONGEST_WAIT_SECONDS = 25.0
OCTETS = "application/octet-stream"
EXPORT_KINDS = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}
EXPORT_COLUMNS = ["execution_timeout_seconds" if name == "execution_timeout" else name for name in TASK_COLUMNS]


@dataclass
class Api(LimitHandlers):
    """The things that handlers use; made once by the master."""

    settings: Settings
    store: Store
    reads: Reads
    backlog: Backlog
    artifacts: Artifacts
    dispatcher: Dispatcher
    presence: devices.Presence
    events: Events
    access: Access
    metrics: Metrics
    worker_file: edge.WorkerFile
    started_at: float
    is_stopping: bool = False

    @property
    def now(self) -> float:
        return self.store.moments()[0]

    # -- devices ----------------------------------------------------------------------------------------------

    # POST /devices/register {device_id, boot_id, protocol, task_types, …} -> 200 {settings, keep, cancel}
    def register_device(self, call: Call) -> Any:
        body = wire.decode(call.body, wire.RegisterIn)
        if body.protocol < PROTOCOL:
            raise invalid(426, "protocol_too_old", f"This master speaks protocol {PROTOCOL}, the device {body.protocol}:"
                          " copy worker.py, settings.py and executors/ of this release to it and start it again.")  # fmt: skip
        new = devices.Registration(
            body.device_id, body.boot_id, body.device_name or body.device_id, body.device_type, call.peer, body.version,
            body.protocol, tuple(body.task_types), tuple(body.tags or ()), body.weight, body.max_concurrent_tasks,
            _held(body.holding),
        )  # fmt: skip
        registered = self.store.write(devices.register, self.presence, new)
        self.dispatcher.forget_pulls(body.device_id)
        device = self._device(body.device_id)
        if device["status"] == "conflict":
            raise devices.DeviceConflict(devices.conflict_sentence(body.device_id))
        return {
            "device_id": body.device_id,
            "status": device["status"],
            "created": registered.created,
            "settings": self._device_settings(),
            "keep": registered.keep,
            "cancel": registered.cancel,
            "server_time": wire.iso(self.store.moments()[1]),
        }

    def _device_settings(self) -> dict[str, Any]:
        devices_known = max(1, len(self.presence.seen))
        return {
            "heartbeat_interval_seconds": self.settings.heartbeat_interval,
            "device_timeout_seconds": self.settings.device_timeout,
            "next_seconds": 0,
            "reconnect_spread_seconds": max(self.settings.reconnect_seconds, devices_known / 300),
            "max_body_bytes": self.settings.max_body_bytes,
            "max_artifact_bytes": self.settings.max_artifact_bytes,
            "enable_monitoring": self.settings.enable_monitoring,
        }

    # POST /devices/{device_id}/heartbeat {boot_id, seq, holding, …} -> 200 {cancel, drain, next_seconds}
    def take_heartbeat(self, call: Call) -> Any:
        device_id = wire.check_name(call.names["device_id"], "device_id")
        body = wire.decode(call.body, wire.HeartbeatIn)
        keep = self.settings.enable_monitoring
        usage = (body.cpu_usage, body.memory_usage, body.disk_usage) if keep else (None, None, None)
        holding = None if body.holding is None else _held(body.holding)
        heard = devices.Beat(
            body.boot_id, body.seq, holding, body.leaving, *usage, body.active_tasks, body.system_info_text,
            body.problem, body.clock,
        )  # fmt: skip
        cancel, wanted = self.store.write(devices.beat, self.presence, device_id, heard, keep_history=keep)
        return {"cancel": cancel, "drain": wanted != "active", "next_seconds": self.settings.heartbeat_interval}

    # GET /devices?status=&task_type=&tag= -> 200 {devices}
    def list_devices(self, call: Call) -> Any:
        status = call.query.choice("status", DEVICE_STATES)
        task_type, tag = call.query.name("task_type"), call.query.name("tag")
        call.query.finish()
        timeout = self.settings.device_timeout
        return {"devices": self.reads.devices(self.now, timeout, status=status, task_type=task_type, tag=tag)}

    # PUT /devices/{device_id}/status {status, reason?} -> 200 the device
    def set_device_status(self, call: Call) -> Any:
        body = wire.decode(call.body, wire.DeviceStatusIn)
        device_id = call.names["device_id"]
        self.store.write(devices.set_wanted, device_id, body.status, body.reason)
        return self._device(device_id)

    # DELETE /devices/{device_id} -> 200 {device_id, deleted}
    def delete_device(self, call: Call) -> Any:
        device_id = call.names["device_id"]
        if self._device(device_id)["status"] in ("online", "busy", "draining"):
            raise invalid(409, "device_online", f"Device {device_id} is online; stop its worker first.", "device_id")
        self.store.write(devices.forget, self.presence, device_id)
        return {"device_id": device_id, "deleted": True}

    # GET /devices/{device_id}/stats -> 200 totals, rates, last hour, failures, heartbeats
    def device_stats(self, call: Call) -> Any:
        call.query.finish()
        found = self.reads.device_stats(call.names["device_id"], self.now, self.settings.device_timeout)
        return found or self._no_device(call.names["device_id"])

    def _device(self, device_id: str) -> dict[str, Any]:
        return self.reads.device(device_id, self.now, self.settings.device_timeout) or self._no_device(device_id)

    def _no_device(self, device_id: str) -> dict[str, Any]:
        raise invalid(404, "unknown_device", "There is no such device; GET /devices lists them.", "device_id")

    # -- tasks: submit, pull, report --------------------------------------------------------------------------

    # POST /tasks one task, a list, or {tasks} -> 201 {id, created, status} or {tasks: [...]}
    def submit_tasks(self, call: Call) -> Any:
        submission = wire.decode_submit(call.body)
        wall = self.store.moments()[1]
        new = [_new_task(task, wall) for task in submission.tasks]
        submitted = self.store.write(db.submit, new, created_by=call.peer) if new else []
        if submission.single and submitted[0].status == "batch_cancelled":
            raise invalid(409, "batch_cancelled", "That batch was cancelled; use another batch name.", "batch")
        status = 201 if any(task.created for task in submitted) else 200
        tasks = [task._asdict() for task in submitted]
        return Answer(tasks[0] if submission.single else {"tasks": tasks}, status)

    # GET /tasks/pull?device_id=&boot_id=&limit=&ahead=&wait=&seq=&ack= -> 200 {tasks, cancel, drain, next_seconds}
    def pull_tasks(self, call: Call) -> Any:
        query = call.query
        device_id = query.name("device_id", required=True) or ""
        boot_id = query.name("boot_id")
        limit = query.integer("limit", 1, maximum=1000) or 0
        ahead = query.counts("ahead", maximum=1000)
        wait = query.number("wait", 0.0, maximum=LONGEST_WAIT_SECONDS) or 0.0
        seq, ack = query.integer("seq", None), query.integer("ack", None)
        query.finish()
        return _pulled(self.dispatcher.pull(device_id, boot_id, limit, wait, seq, ack, ahead))

    # POST /tasks/report {device_id, boot_id?, reports} -> 200 {reports: [{assignment_id, outcome}]}
    def report_tasks(self, call: Call) -> Any:
        sent = wire.decode_reports(call.body)
        wall = self.store.moments()[1]
        reports = [None if isinstance(entry, wire.BadReport) else _report(entry, wall) for entry in sent.entries]

        def judge(tx: Tx) -> list[db.Judged]:
            devices.hear_report(self.presence, sent.device_id, tx.now)
            return db.apply_reports(tx, sent.device_id, [report for report in reports if report])

        judged = iter(self.store.write(judge) if any(reports) else ())
        return {"reports": [_judged(entry, judged) for entry in sent.entries]}

    # PUT /tasks/{task_id}/status {status, assignment_id?, lease_id, …} -> 200 {id, outcome, status}
    def set_task_status(self, call: Call) -> Any:
        task_id = wire.check_id(call.names["task_id"])
        body = wire.decode(call.body, wire.StatusIn)
        if body.status == "cancelled":
            return self._cancel(task_id, body.reason)
        task = self.reads.task(task_id) or self._no_task()
        assignment_id = body.assignment_id or task["assignment_id"]
        if assignment_id is None:
            raise invalid(409, "stale", "The task was never given to a device; pull it first.", "lease_id")
        report = db.Report(assignment_id, body.lease_id or "", body.status, body.result_text, body.error_message)

        def judge(tx: Tx) -> db.Judged:
            attempt = db.get_attempt(tx, assignment_id)
            if attempt is None or attempt.task_id != task_id:
                return db.Judged("gone")
            return db.apply_report(tx, attempt.device_id, report)

        judged = self.store.write(judge)
        _refuse_if_over(judged)
        return {"id": task_id, "outcome": judged.outcome, "status": judged.status}

    # PUT /tasks/artifacts?device_id=&assignment_id=&lease_id=&name=&sha256= (a file) -> 200 {outcome}
    def receive_artifact(self, call: Call) -> Any:
        query = call.query
        device_id = query.name("device_id", required=True) or ""
        query.name("boot_id")  # the lease decides, as for a report
        assignment_id = wire.check_id(query.required("assignment_id"), "assignment_id")
        lease_id = query.name("lease_id", required=True) or ""
        name = wire.check_artifact_name(query.required("name"))
        sha256 = wire.check_sha256(query.required("sha256"))
        query.finish()
        length, parts = open_upload(call.environ, self.settings.max_artifact_bytes)
        artifact = db.Artifact(name, length, sha256)
        judged = self.artifacts.receive(device_id, assignment_id, lease_id, artifact, parts)
        _refuse_if_over(judged)
        if judged.outcome == "differs":
            raise invalid(
                409, "artifact_differs", "This attempt has another file of that name; choose another.", "name"
            )
        if judged.outcome == "too_many":
            limit = f"An attempt has at most {db.ARTIFACTS_LIMIT} files; put several into one archive."
            raise invalid(422, "too_many_artifacts", limit, "name")
        return {"outcome": judged.outcome}

    # GET /tasks/{task_id}/artifacts/{artifact_id} -> 200 the file
    def download_artifact(self, call: Call) -> Any:
        task_id = wire.check_id(call.names["task_id"])
        artifact_id = wire.check_id(call.names["artifact_id"], "artifact_id")
        call.query.finish()
        artifact = self.reads.artifact(task_id, artifact_id)
        if artifact is None:
            raise invalid(404, "unknown_artifact", "The task has no such file; GET the task to see which it has.",
                          "artifact_id")  # fmt: skip
        tag = f'"{artifact["sha256"]}"'
        if call.environ.get("HTTP_IF_NONE_MATCH") == tag:
            return Answer(None, 304, headers=(("ETag", tag),))
        parts = self.artifacts.open(task_id, artifact)
        if parts is None:
            raise invalid(404, "artifact_lost", "The file is no longer beside the database: bring its folder back from a"
                          " backup, or run the task again.", "artifact_id")  # fmt: skip
        attachment = f'attachment; filename="{artifact["name"]}"'
        return web.stream(parts, OCTETS, ("Content-Length", str(artifact["bytes"])), ("ETag", tag),
                          ("Content-Disposition", attachment), ("Content-Security-Policy", "sandbox"))  # fmt: skip

    # -- tasks: look and act ----------------------------------------------------------------------------------

    # GET /tasks?status=&task_type=&device_id=&batch=&username=&app_id=&text=&… -> 200 {tasks, next_cursor, partial}
    def list_tasks(self, call: Call) -> Any:
        filters = call.query.filters()
        limit = call.query.integer("limit", 50, minimum=1, maximum=200) or 50
        cursor = call.query.integer("cursor", None, minimum=1)
        call.query.finish()
        return self.reads.task_page(filters, limit=limit, cursor=cursor)

    # GET /tasks/{task_id} -> 200 the task with task_data, result, attempts, files and why it waits
    def get_task(self, call: Call) -> Any:
        call.query.finish()
        task = self.reads.task(wire.check_id(call.names["task_id"])) or self._no_task()
        why = self._explain(task)
        waiting = {"reason": why.reason, "detail": why.detail} if task["status"] in ("pending", "scheduled") else None
        return {**task, "artifacts": self.reads.artifacts(task["id"]), "waiting": waiting}

    # GET /tasks/{task_id}/why -> 200 {reason, detail, devices, limit, next_look_seconds}
    def explain_task(self, call: Call) -> Any:
        call.query.finish()
        task = self.reads.task(wire.check_id(call.names["task_id"])) or self._no_task()
        why = self._explain(task)
        return {
            "task_id": task["id"],
            "status": task["status"],
            "reason": why.reason,
            "detail": why.detail,
            "devices": why.devices[:200],
            "limit": why.limit,
            "next_look_seconds": why.next_look_seconds,
        }

    def _explain(self, task: dict[str, Any]) -> reasons.Explanation:
        now, wall = self.store.moments()
        return reasons.explain(
            task,
            self.backlog.lane_of(task["id"], now, wall),
            self.reads.batch(task["batch"]) if task["batch"] else None,
            self.reads.devices(now, self.settings.device_timeout),
            self.dispatcher.is_asking,
            pauses=self.backlog.pauses(),
            dispatch_interval=self.settings.dispatch_interval,
        )

    # PUT /tasks/{task_id}/assign {device_id} -> 200 {id, status}: it comes with that device's next pull
    def assign_task(self, call: Call) -> Any:
        task_id = wire.check_id(call.names["task_id"])
        body = wire.decode(call.body, wire.AssignIn)
        task = self.reads.task(task_id) or self._no_task()
        device = self._device(body.device_id)
        if device["status"] not in ("online", "busy"):
            raise invalid(409, "device_unavailable", f"Device {body.device_id} is {device['status']}; choose one that is online.",
                          "device_id")  # fmt: skip
        if task["task_type"] not in device["task_types"]:
            raise invalid(
                409, "device_unfit", f"Device {body.device_id} does not run {task['task_type']} tasks.", "device_id"
            )
        status = self.store.write(db.pin, task_id, body.device_id)
        if status is None:
            raise invalid(
                409, "not_waiting", f"The task is {task['status']}; only a waiting task can be assigned.", "task_id"
            )
        return {"id": task_id, "status": status}

    # POST /tasks/{task_id}/cancel {reason?} -> 200 {id, status}
    def cancel_task(self, call: Call) -> Any:
        reason = wire.decode(call.body or b"{}", wire.ReasonIn).reason
        return self._cancel(wire.check_id(call.names["task_id"]), reason)

    def _cancel(self, task_id: int, reason: str | None) -> Any:
        status = self.store.write(db.cancel, task_id, reason)
        if status is None:
            task = self.reads.task(task_id) or self._no_task()
            if task["status"] != "cancelled":
                raise invalid(
                    409, "already_final", f"The task is {task['status']} already; there is nothing to cancel."
                )
        return {"id": task_id, "outcome": "accepted" if status else "duplicate", "status": "cancelled"}

    # POST /tasks/{task_id}/requeue {} -> 200 {id, status}
    def requeue_task(self, call: Call) -> Any:
        wire.decode(call.body or b"{}", wire.ReasonIn)
        task_id = wire.check_id(call.names["task_id"])
        status = self.store.write(db.requeue, task_id)
        if status is None:
            task = self.reads.task(task_id) or self._no_task()
            raise invalid(
                409, "not_final", f"The task is {task['status']}; only failed or cancelled ones can be requeued."
            )
        return {"id": task_id, "status": status}

    def _no_task(self) -> Any:
        raise invalid(
            404, "unknown_task", "There is no such task (finished ones are deleted after a while).", "task_id"
        )

    # POST /tasks/actions {action, filter, dry_run, reason?} -> 200 {matched, matched_is_capped, changed}
    def act_on_tasks(self, call: Call) -> Any:
        body = wire.decode(call.body, wire.ActionIn)
        filters = body.filter.filters()
        matched = self.reads.count(filters)
        changed = 0 if body.dry_run else self._act(body.action, filters, body.reason)
        return {"matched": matched.count, "matched_is_capped": matched.is_capped, "changed": changed}

    def _act(self, action: str, filters: dict[str, Any], reason: str | None) -> int:
        """Chunk by chunk in the order of ids, up to the newest id there was at the start; each chunk is durable."""

        def change(tx: Tx, ids: list[int]) -> int:
            if action == "cancel":
                return sum(db.cancel(tx, task_id, reason) is not None for task_id in ids)
            return sum(db.requeue(tx, task_id) is not None for task_id in ids)

        changed = 0
        after: int | None = 0
        newest = self.reads.highest_id()
        while after is not None and after < newest:
            ids, after = self.reads.ids_matching(filters, after_id=after, limit=CHUNK)
            ids = [task_id for task_id in ids if task_id <= newest]
            if ids:
                changed += self.store.write(change, ids)
        return changed

    # GET /tasks/export?format=jsonl|csv&include=result&<filters> -> 200 rows, oldest first, then an end mark
    def export_tasks(self, call: Call) -> Any:
        filters = call.query.filters()
        form = call.query.choice("format", tuple(EXPORT_KINDS)) or "jsonl"
        with_result = call.query.choice("include", ("result",)) == "result"
        call.query.finish()
        rows = export.begun(self.reads.export(filters, include_result=with_result))
        columns = EXPORT_COLUMNS + (["result"] if with_result else [])
        lines = export.csv_lines(rows, columns) if form == "csv" else export.json_lines(rows)
        return web.stream(lines, EXPORT_KINDS[form], ("Content-Disposition", f'attachment; filename="tasks.{form}"'))

    # GET /tasks/stats?batch=&task_type= -> 200 {by_state, by_type, by_batch, by_device, last_hour}
    def tasks_stats(self, call: Call) -> Any:
        batch, task_type = call.query.text("batch", maximum=128), call.query.name("task_type")
        call.query.finish()
        return self.reads.tasks_stats(self.now, batch=batch, task_type=task_type)

    # -- batches ----------------------------------------------------------------------------------------------

    # GET /batches?name=&limit=&cursor= -> 200 {batches, next_cursor}
    def list_batches(self, call: Call) -> Any:
        name = call.query.text("name", maximum=128)
        limit = call.query.integer("limit", 50, minimum=1, maximum=200) or 50
        cursor = call.query.integer("cursor", None, minimum=1)
        call.query.finish()
        if name is not None:
            found = self.reads.batch(name)
            return {"batches": [found] if found else [], "next_cursor": None}
        return self.reads.batches(limit=limit, cursor=cursor)

    # POST /batches/{name}/pause {reason?} -> 200 {name, state, changed}
    def pause_batch(self, call: Call) -> Any:
        return self._set_batch(call, "paused")

    # POST /batches/{name}/resume {reason?} -> 200 {name, state, changed}
    def resume_batch(self, call: Call) -> Any:
        return self._set_batch(call, "open")

    # POST /batches/{name}/cancel {reason?} -> 200 {name, state, changed}: its unfinished tasks are cancelled too
    def cancel_batch(self, call: Call) -> Any:
        reply = self._set_batch(call, "cancelled")
        unfinished = {"batch": reply["name"], "status": ("scheduled", "pending", "assigned", "running")}
        return {**reply, "changed": self._act("cancel", unfinished, "its batch was cancelled")}

    def _set_batch(self, call: Call, state: str) -> dict[str, Any]:
        name = wire.check_line(call.names["name"], "name")
        reason = wire.decode(call.body or b"{}", wire.ReasonIn).reason
        if not self.store.write(db.set_batch_state, name, state, reason):
            raise invalid(404, "unknown_batch", "There is no such batch; GET /batches lists them.", "name")
        return {"name": name, "state": state, "changed": 0}

    # -- the system -------------------------------------------------------------------------------------------

    # GET /system/overview -> 200 counts, rates, the oldest waiting task and why
    def overview(self, call: Call) -> Any:
        call.query.finish()
        found = self.reads.overview(self.now, self.settings.device_timeout)
        oldest = found["oldest_waiting"]
        task = self.reads.task(oldest["task_id"]) if oldest else None
        if task is not None:
            why = self._explain(task)
            found["oldest_waiting"] = {**oldest, "reason": why.reason, "detail": why.detail}
        return {
            **found,
            "version": VERSION,
            "paused": self.backlog.pauses(),
            "mode": self.settings.mode,
            "uptime_seconds": round(self.now - self.started_at, 3),
            "strategy": self.dispatcher.strategy_name,
            "writer_queue": self.store.writer.queue_length,
            "held_polls": self.dispatcher.held_polls,
            "has_worker_file": self.worker_file.is_there,
        }

    # GET /strategy -> 200 {strategy, available}
    def get_strategy(self, call: Call) -> Any:
        call.query.finish()
        return {"strategy": self.dispatcher.strategy_name, "available": self._strategies()}

    # PUT /strategy {strategy} -> 200 {strategy, available}
    def set_strategy(self, call: Call) -> Any:
        name = wire.decode(call.body, wire.StrategyIn).strategy
        # Only what the config names is imported: a request must not load code that the operator did not choose.
        if name not in self._strategies():
            raise invalid(422, "invalid_field", f"strategy must be one of {', '.join(self._strategies())}; your own goes"
                          " into load_balance_strategy of the master's config as module:name.", "strategy")  # fmt: skip
        self.dispatcher.set_strategy(name)
        self.store.write(lambda tx: tx.note("system", "strategy", strategy=name, by=call.peer))
        return {"strategy": name, "available": self._strategies()}

    def _strategies(self) -> list[str]:
        return list(dict.fromkeys([*STRATEGIES, self.dispatcher.configured_strategy]))

    # GET /events (Last-Event-ID: N) -> 200 text/event-stream
    def stream_events(self, call: Call) -> Any:
        last = call.environ.get("HTTP_LAST_EVENT_ID", "")
        stream = self.events.stream(int(last) if re.fullmatch(r"[0-9]{1,18}", last) else None)
        if stream is None:
            raise invalid(503, "too_many_streams", "Too many event streams are open; poll instead.", retry_after=30)
        return web.stream(stream, "text/event-stream", ("Cache-Control", "no-cache"))

    # POST /login {key} -> 204 and a session cookie
    def login(self, call: Call) -> Any:
        cookie = self.access.log_in(call.environ, wire.decode(call.body, wire.LoginIn).key)
        return Answer(None, 204, headers=(("Set-Cookie", cookie),))

    # POST /logout -> 204 and the cookie is gone
    def logout(self, call: Call) -> Any:
        return Answer(None, 204, headers=(("Set-Cookie", self.access.log_out(call.environ)),))

    # GET /openapi.json -> 200 this table as an OpenAPI 3.1 document
    def openapi_document(self, call: Call) -> Any:
        return openapi.build((route.operation for route in routes(self)[0][1]), version=VERSION)

    # -- at the root ------------------------------------------------------------------------------------------

    # GET / -> 200 the dashboard
    def dashboard(self, call: Call) -> Any:
        return web.static_file("index.html")

    # GET /static/{file} -> 200 a file of the dashboard
    def static_file(self, call: Call) -> Any:
        return web.static_file(call.names["file"])

    # GET /edge/worker.pyz -> 200 a whole device in one file; 304; 404 before make edge
    def worker_pyz(self, call: Call) -> Any:
        download = self._download()
        tag = f'"{download.sha256}"'
        headers = (("ETag", tag), ("Cache-Control", "no-cache"))
        if tag in call.environ.get("HTTP_IF_NONE_MATCH", ""):
            return Answer(None, 304, headers=headers)
        attachment = ("Content-Disposition", f'attachment; filename="{edge.NAME}"')
        return Answer(download.content, kind="application/octet-stream", headers=(*headers, attachment))

    # GET /edge/worker.pyz.sha256 -> 200 a line as sha256sum --check reads it
    def worker_pyz_sha256(self, call: Call) -> Any:
        return Answer(f"{self._download().sha256}  {edge.NAME}\n".encode(), kind="text/plain; charset=utf-8")

    def _download(self) -> edge.Download:
        download = self.worker_file.read()
        if download is None:
            raise invalid(404, "not_built", edge.ADVICE)
        return download

    # GET /healthz -> 200 while the process lives; what a device's --doctor looks for
    def healthz(self, call: Call) -> Any:
        return {"status": "ok", "protocol": PROTOCOL}

    # GET /readyz -> 200 while it takes work, 503 while it stops
    def readyz(self, call: Call) -> Any:
        if self.is_stopping:
            raise invalid(503, "stopping", "The master is stopping; try again in a moment.", retry_after=2)
        return {"status": "ready"}

    # GET /metrics -> 200 for Prometheus; 404 with enable_monitoring false
    def metrics_text(self, call: Call) -> Any:
        if not self.settings.enable_monitoring:
            raise invalid(404, "monitoring_off", "enable_monitoring is false in the master's config.")
        return Answer(self.metrics.render(), kind=CONTENT_TYPE)


def routes(api: Api) -> tuple[tuple[str, tuple[Route, ...]], ...]:
    """The API's table, under its prefix, and what stands at the root."""
    text, name, number = {"type": "string"}, openapi.NAME, {"type": "integer", "minimum": 0}
    device_filter = (
        Query("status", text, "One status"),
        Query("task_type", name, "Runs this type"),
        Query("tag", name, "Has this tag"),
    )
    pull = (
        Query("device_id", name, "Who asks", True),
        Query("boot_id", name, "Its process"),
        Query("limit", number, "Free slots"),
        Query("ahead", text, "Of each short type, how many more make a second of work: echo:400,crawl:2"),
        Query("wait", {"type": "number", "maximum": 25}, "Seconds to hold"),
        Query("seq", number, "Number of this pull"),
        Query("ack", number, "Last pull whose reply arrived"),
    )
    upload = (
        Query("device_id", name, "Who sends", True),
        Query("boot_id", name, "Its process"),
        Query("assignment_id", number, "The attempt that it belongs to", True),
        Query("lease_id", name, "The attempt's lease", True),
        Query("name", {"type": "string", "pattern": ARTIFACT_NAME_PATTERN}, "The file's name", True),
        Query("sha256", {"type": "string", "pattern": SHA256_PATTERN}, "Of the file's bytes, in hex digits", True),
    )
    stats = (Query("batch", text, "Of this batch"), Query("task_type", name, "Of this type"))
    lane_page = (Query("task_type", name, "Of this type"), *PAGE)
    batch_page = (Query("name", text, "Only this batch"), *PAGE)
    shape = (Query("format", {"enum": ["jsonl", "csv"]}, "Of the file"), Query("include", {"enum": ["result"]}, "More"))
    o, w = openapi, wire
    # fmt: off
    return (PREFIX, (
        _("POST",   "/devices/register",              "device",    api.register_device,   "A device introduces itself.", w.RegisterIn, o.RegisterOut),
        _("GET",    "/devices",                       "viewer",    api.list_devices,      "All devices.", None, o.DevicesOut, device_filter),
        _("PUT",    "/devices/{device_id}/status",    "operator",  api.set_device_status, "Make a device active, draining or disabled.", w.DeviceStatusIn, o.DeviceOut),
        _("POST",   "/devices/{device_id}/heartbeat", "device",    api.take_heartbeat,    "A sign of life, and what the device holds.", w.HeartbeatIn, o.HeartbeatOut),
        _("GET",    "/devices/{device_id}/stats",     "viewer",    api.device_stats,      "Totals, rates, failures and heartbeats.", None, o.DeviceStatsOut),
        _("DELETE", "/devices/{device_id}",           "operator",  api.delete_device,     "Remove a device that is offline."),
        _("POST",   "/tasks",                         "submitter", api.submit_tasks,      "Submit one task or a list.", (w.TaskIn, w.TasksIn, w.TaskList), (o.SubmittedOut, o.SubmittedListOut), status=201),
        _("GET",    "/tasks",                         "viewer",    api.list_tasks,        "Tasks, newest first, by pages.", None, o.TaskPageOut, (*FILTERS, *PAGE)),
        _("GET",    "/tasks/pull",                    "device",    api.pull_tasks,        "Ask for tasks; held until there are some.", None, o.PullOut, pull),
        _("GET",    "/tasks/stats",                   "viewer",    api.tasks_stats,       "Counts, and the last hour.", None, o.TasksStatsOut, stats),
        _("GET",    "/tasks/export",                  "viewer",    api.export_tasks,      "All matching tasks as a file.", None, None, (*FILTERS, *shape), kind="application/x-ndjson"),
        _("POST",   "/tasks/report",                  "device",    api.report_tasks,      "What became of tasks.", w.ReportsIn, o.ReportsOut),
        _("PUT",    "/tasks/artifacts",               "device",    api.receive_artifact,  "Send a file, before the report that names it.", None, o.UploadedOut, upload, sent=OCTETS),
        _("POST",   "/tasks/actions",                 "operator",  api.act_on_tasks,      "Cancel or requeue all that a filter matches.", w.ActionIn, o.ActionOut),
        _("GET",    "/tasks/{task_id}",               "viewer",    api.get_task,          "One task with all that belongs to it.", None, o.TaskDetailOut),
        _("GET",    "/tasks/{task_id}/artifacts/{artifact_id}", "viewer", api.download_artifact, "A file of a task.", kind=OCTETS),
        _("GET",    "/tasks/{task_id}/why",           "viewer",    api.explain_task,      "Why a task waits, device by device.", None, o.WhyOut),
        _("PUT",    "/tasks/{task_id}/assign",        "operator",  api.assign_task,       "Pin a waiting task to a device.", w.AssignIn, o.ChangedOut),
        _("PUT",    "/tasks/{task_id}/status",        "device",    api.set_task_status,   "Report one task, for simple clients.", w.StatusIn, o.StatusOut),
        _("POST",   "/tasks/{task_id}/cancel",        "operator",  api.cancel_task,       "Cancel a task.", w.ReasonIn, o.StatusOut),
        _("POST",   "/tasks/{task_id}/requeue",       "operator",  api.requeue_task,      "Give a failed or cancelled task another life.", w.ReasonIn, o.ChangedOut),
        _("GET",    "/batches",                       "viewer",    api.list_batches,      "Batches with their counts.", None, o.BatchesOut, batch_page),
        _("POST",   "/batches/{name}/pause",          "operator",  api.pause_batch,       "Hold a batch back.", w.ReasonIn, o.BatchChangedOut),
        _("POST",   "/batches/{name}/resume",         "operator",  api.resume_batch,      "Let a batch go on.", w.ReasonIn, o.BatchChangedOut),
        _("POST",   "/batches/{name}/cancel",         "operator",  api.cancel_batch,      "Cancel a batch and its unfinished tasks.", w.ReasonIn, o.BatchChangedOut),
        _("GET",    "/limits",                        "viewer",    api.get_limits,        "Limits, with what they count and hold now.", None, o.LimitsOut),
        _("PUT",    "/limits",                        "operator",  api.set_limits,        "Set all limits.", w.LimitsIn, o.LimitsOut),
        _("POST",   "/limits/{name}/open",            "operator",  api.open_limit,        "Open what devices have closed.", w.OpenLimitIn, o.LimitOpenedOut),
        _("GET",    "/lanes",                         "viewer",    api.list_lanes,        "Lanes in which something waits, and paused ones.", None, o.LanesOut, lane_page),
        _("POST",   "/lanes/{lane_id}/pause",         "operator",  api.pause_lane,        "Hold a lane back.", w.ReasonIn, o.PauseChangedOut),
        _("POST",   "/lanes/{lane_id}/resume",        "operator",  api.resume_lane,       "Let a lane go on.", w.ReasonIn, o.PauseChangedOut),
        _("POST",   "/task-types/{task_type}/pause",  "operator",  api.pause_type,        "Hold a task type back.", w.ReasonIn, o.PauseChangedOut),
        _("POST",   "/task-types/{task_type}/resume", "operator",  api.resume_type,       "Let a task type go on.", w.ReasonIn, o.PauseChangedOut),
        _("POST",   "/system/pause",                  "operator",  api.pause_all,         "Send nothing at all; what runs, runs on.", w.ReasonIn, o.PauseChangedOut),
        _("POST",   "/system/resume",                 "operator",  api.resume_all,        "Send tasks again.", w.ReasonIn, o.PauseChangedOut),
        _("GET",    "/system/overview",               "viewer",    api.overview,          "The system at a glance.", None, o.OverviewOut),
        _("GET",    "/strategy",                      "viewer",    api.get_strategy,      "The load-balancing strategy in force.", None, o.StrategyOut),
        _("PUT",    "/strategy",                      "operator",  api.set_strategy,      "Switch the strategy.", w.StrategyIn, o.StrategyOut),
        _("GET",    "/events",                        "viewer",    api.stream_events,     "What happens, as server-sent events.", kind="text/event-stream"),
        _("POST",   "/login",                         "public",    api.login,             "Trade a key for a session cookie.", w.LoginIn, status=204),
        _("POST",   "/logout",                        "public",    api.logout,            "Forget the session cookie.", status=204),
        _("GET",    "/openapi.json",                  "viewer",    api.openapi_document,  "This API as an OpenAPI document."),
    )), ("", (
        _("GET",    "/",                              "public",    api.dashboard,         "The dashboard."),
        _("GET",    "/static/{file}",                 "public",    api.static_file,       "A file of the dashboard."),
        _("GET",    "/edge/worker.pyz",               "public",    api.worker_pyz,        "A whole device in one file.", kind="application/octet-stream"),
        _("GET",    "/edge/worker.pyz.sha256",        "public",    api.worker_pyz_sha256, "Its sha256.", kind="text/plain"),
        _("GET",    "/healthz",                       "public",    api.healthz,           "Alive?"),
        _("GET",    "/readyz",                        "public",    api.readyz,            "Ready for work?"),
        _("GET",    "/metrics",                       "viewer",    api.metrics_text,      "Figures for Prometheus."),
    ))
    # fmt: on


def _(
    method: str,
    path: str,
    role: str,
    handler: Callable[[Call], Any],
    summary: str,
    request: Any = None,
    response: Any = None,
    query: tuple[Query, ...] = (),
    status: int = 200,
    kind: str = "application/json",
    sent: str = "application/json",
) -> Route:
    return Route(Operation(method, path, role, summary, request, response, query, status, kind, sent), handler)


# -- from messages to verbs and back ------------------------------------------------------------------------------


def _held(holding: list[wire.Holding] | None) -> tuple[devices.Held, ...]:
    lines = holding or ()
    return tuple(
        devices.Held(line.assignment_id, line.lease_id, line.phase, line.progress, line.message) for line in lines
    )


def _new_task(task: wire.TaskIn, wall: float) -> db.NewTask:
    run_at = wall + task.delay_seconds if task.delay_seconds else task.run_at_seconds
    return db.NewTask(
        task.task_type, task.data_text or "{}", task.username, task.app_id, task.start_date, task.end_date,
        task.priority, task.batch or "", task.unique_key, task.parent_id, run_at, task.give_up_seconds,
        task.execution_timeout_seconds, task.max_retry_count, tuple(task.required_tags or ()), task.pinned_device_id,
        task.prefer_device_id, task.if_exists == "requeue_failed", task.max_batch_tasks, task.same_device_as,
        task.prefer_seconds,
    )  # fmt: skip


def _report(report: wire.ReportIn, wall: float) -> db.Report:
    delay = report.snooze_seconds if report.outcome == "snoozed" else report.retry_after_seconds
    return db.Report(
        report.assignment_id, report.lease_id, report.outcome, report.result_text,
        report.error_message or report.reason, report.error_type, report.log_tail, report.duration_seconds,
        report.progress, report.retry, delay, tuple(_new_task(task, wall) for task in report.new_tasks) if report.new_tasks else (),
        tuple(db.Artifact(file.name, file.bytes, file.sha256) for file in report.artifacts) if report.artifacts else (),
        report.closed_seconds(wall), report.limit_name,
    )  # fmt: skip


def _refuse_if_over(judged: db.Judged) -> None:
    """The errors of an attempt that counts no more."""
    if judged.outcome == "gone":
        raise invalid(410, "gone", "That attempt is over (cancelled or deleted); drop it and pull again.", "lease_id")
    if judged.outcome == "stale":
        raise invalid(409, "stale", "Another attempt has this task, or the lease is wrong; drop it.", "lease_id")


def _judged(entry: wire.ReportIn | wire.BadReport, outcomes: Iterator[db.Judged]) -> dict[str, Any]:
    if isinstance(entry, wire.BadReport):
        wrong = entry.problem
        return {
            "assignment_id": entry.assignment_id,
            "outcome": "invalid",
            "detail": wrong.detail,
            "field": wrong.field,
        }
    judged = next(outcomes)
    reply: dict[str, Any] = {"assignment_id": entry.assignment_id, "outcome": judged.outcome}
    if judged.missing:
        reply["missing"] = judged.missing
    if judged.new_tasks:
        reply["new_tasks"] = [task._asdict() for task in judged.new_tasks]
    return reply


def _pulled(reply: Reply) -> dict[str, Any]:
    tasks = [_delivered(delivery) for delivery in reply.tasks]
    return {"tasks": tasks, "cancel": reply.cancel, "drain": reply.drain, "next_seconds": reply.next_seconds}


def _delivered(delivery: Delivery) -> dict[str, Any]:
    sent = delivery._asdict()
    sent["task_data"] = msgspec.Raw(delivery.task_data.encode())
    sent["batch"] = delivery.batch or None
    sent["execution_timeout_seconds"] = sent.pop("execution_timeout")
    sent["start_within_seconds"] = sent.pop("start_within")
    return sent
