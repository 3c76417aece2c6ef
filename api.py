"""What can be asked over HTTP?

`routes` is the whole API: method, path, role, handler, what goes in and what comes out. A handler reads the request,
calls one verb or one question, and replies; it holds no rules. Bodies are checked in wire.py, access in access.py,
errors become replies in web.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

import db
import devices
import edge
import export
import judging
import keys
import openapi
import reasons
import replies
import web
import wire
from access import Access, Refused, open_upload, require_own
from api_batches import BatchHandlers
from api_devices import DeviceHandlers
from api_keys import KeyHandlers
from api_limits import LimitHandlers
from api_system import SystemHandlers
from artifacts import Artifacts
from attention import Attention
from audit import Audit
from backlog import Backlog
from backups import Backups
from connections import Export
from dispatcher import Delivery, Dispatcher, Reply
from events import Events
from fleet import MAX_BEATS, Fleet
from history import History
from keys import ADMIN, DEVICE, ENROLL, OPERATOR
from latency import Latency
from metrics import CONTENT_TYPE, Metrics
from openapi import FILTERS, PAGE, Operation, Query
from progress import Progress
from reads import DEVICE_STATES, TASK_COLUMNS, Reads
from scheduler import Deletion
from schema import EVENT_KINDS, KEY_ROLES
from series import STEP_SECONDS, Series
from settings import PROTOCOL, Settings
from store import Store
from transaction import Tx
from values import ARTIFACT_NAME_PATTERN, SHA256_PATTERN
from web import Answer, Call, Route, invalid

PREFIX = openapi.PREFIX
REFUSALS = {
    "batch_cancelled": "That batch was cancelled; use another batch name.",
    "batch_full": "The batch has max_batch_tasks tasks already; allow more, or use another batch name.",
}
LONGEST_WAIT_SECONDS = 25.0
RETURNS_A_SECOND = 300
"""After an outage no more devices than this come back each second."""
OCTETS = "application/octet-stream"
AHEAD = r"[A-Za-z0-9_.\-]{1,64}:0{0,5}([1-9][0-9]{0,2}|1000)"
EXPORT_KINDS = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}
EXPORT_COLUMNS = ["execution_timeout_seconds" if name == "execution_timeout" else name for name in TASK_COLUMNS]


@dataclass
class Api(BatchHandlers, DeviceHandlers, KeyHandlers, LimitHandlers, SystemHandlers):
    """The things that handlers use; made once by the master."""

    settings: Settings
    store: Store
    reads: Reads
    backlog: Backlog
    fleet: Fleet
    series: Series
    progress: Progress
    history: History
    attention: Attention
    latency: Latency
    last_deletion: Callable[[], Deletion | None]
    artifacts: Artifacts
    backups: Backups
    dispatcher: Dispatcher
    presence: devices.Presence
    events: Events
    access: Access
    audit: Audit
    metrics: Metrics
    worker_file: edge.WorkerFile
    started_at: float
    is_stopping: bool = False

    # -- devices ----------------------------------------------------------------------------------------------

    # POST /devices/register {device_id, boot_id, protocol, task_types, …} -> 200 {settings, keep, cancel, token?}
    def register_device(self, call: Call) -> Any:
        body = wire.decode(call.body, wire.RegisterIn)
        require_own(call.who, body.device_id)
        if body.protocol < PROTOCOL:
            raise invalid(426, "protocol_too_old", f"This master speaks protocol {PROTOCOL}, the device {body.protocol}:"
                          " copy worker.py, settings.py and executors/ of this release to it and start it again.")  # fmt: skip
        new = devices.Registration(
            body.device_id, body.boot_id, body.device_name or body.device_id, body.device_type, call.who.address, body.version,
            body.protocol, tuple(body.task_types), tuple(body.tags or ()), body.weight, body.max_concurrent_tasks,
            _held(body.holding),
        )  # fmt: skip
        giver = self._giver(call, wants_token=body.wants_token)

        def register(tx: Tx) -> tuple[devices.Registered, tuple[keys.Key, str] | None]:
            is_known = devices.is_known(tx, body.device_id)
            if giver is not None and giver.role == ENROLL:  # before anything: who is refused has changed nothing
                keys.refuse_known(tx, self.access.keys, giver, body.device_id, is_known=is_known)
            registered = devices.register(tx, self.presence, new)
            device = devices.get_device(tx, body.device_id)
            if giver is None or device is None or device.conflict:
                return registered, None
            self.end_tokens(tx, body.device_id)
            devices.mark_revoked(tx, body.device_id, None)
            return registered, keys.give_token(tx, giver, body.device_id, is_known=is_known)

        registered, given = self.store.write(register)
        if given is not None:
            self.access.keys.put(given[0])
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
            **({"token": given[1]} if given is not None else {}),
        }

    def _giver(self, call: Call, *, wants_token: bool) -> keys.Key | None:
        """The key that gives the device a token: an enroll key always, since it is good for nothing else."""
        is_giver = call.who.role == ENROLL or (wants_token and call.who.role == ADMIN)
        return self.access.keys.get(call.who.key_id) if is_giver and call.who.key_id is not None else None

    def _device_settings(self) -> dict[str, Any]:
        return {
            "heartbeat_interval_seconds": self.settings.heartbeat_interval,
            "device_timeout_seconds": self.settings.device_timeout,
            "next_seconds": 0,
            "reconnect_spread_seconds": max(
                self.settings.reconnect_seconds, self.presence.device_count / RETURNS_A_SECOND
            ),
            "max_body_bytes": self.settings.max_body_bytes,
            "max_artifact_bytes": self.settings.max_artifact_bytes,
            "enable_monitoring": self.settings.enable_monitoring,
        }

    # POST /devices/{device_id}/heartbeat {boot_id, seq, holding, …} -> 200 {cancel, drain, next_seconds}
    def take_heartbeat(self, call: Call) -> Any:
        device_id = wire.check_name(call.names["device_id"], "device_id")
        require_own(call.who, device_id)
        body = wire.decode(call.body, wire.HeartbeatIn)
        keep = self.settings.enable_monitoring
        usage = (body.cpu_usage, body.memory_usage, body.disk_usage) if keep else (None, None, None)
        holding = None if body.holding is None else _held(body.holding)
        heard = devices.Beat(
            body.boot_id, body.seq, holding, body.leaving, *usage, body.active_tasks, body.system_info_text,
            body.problem, body.clock,
        )  # fmt: skip
        cancel: list[int] = []
        now, wall = self.store.moments()
        wanted = self.presence.beat_idle(device_id, heard, now, wall, keep_history=keep)
        if wanted is None:
            taken = self.store.write(devices.beat, self.presence, device_id, heard, keep_history=keep)
            self.presence.remember_idle(device_id, taken)
            cancel, wanted = taken.cancel, taken.wanted
        return {"cancel": cancel, "drain": wanted != "active", "next_seconds": self.settings.heartbeat_interval}

    # -- tasks: submit, pull, report --------------------------------------------------------------------------

    # POST /tasks?dry_run= one task, a list, or {tasks} -> 201 {id, created, status} or {tasks: [...]}
    def submit_tasks(self, call: Call) -> Any:
        is_rehearsal = call.query.choice("dry_run", ("true", "false")) == "true"
        call.query.finish()
        if is_rehearsal:
            return self._preview(call)
        submission = wire.decode_submit(call.body)
        wall = self.store.moments()[1]
        new = [_new_task(task, wall) for task in submission.tasks]
        submitted = self.store.write(db.submit, new, created_by=call.who.actor) if new else []
        if submission.single and submitted[0].status == "batch_cancelled":
            raise invalid(409, "batch_cancelled", REFUSALS["batch_cancelled"], "batch")
        status = 201 if any(task.created for task in submitted) else 200
        tasks = [task._asdict() for task in submitted]
        return Answer(tasks[0] if submission.single else {"tasks": tasks}, status)

    def _preview(self, call: Call) -> Any:
        """What a submission would do, task by task; nothing of it is kept."""
        read = wire.decode_each_task(call.body)
        wall = self.store.moments()[1]
        new = [_new_task(task, wall) for task in read if isinstance(task, wire.TaskIn)]
        # Before the rehearsal: an id that was only rehearsed may be another task's in a moment.
        types, newest = self.fleet.task_types(), self.reads.highest_id()
        submitted = iter(self.store.rehearse(db.submit, new, created_by=call.who.actor) if new else [])
        entries = [
            _problem(task) if isinstance(task, wire.Invalid) else _previewed(task, next(submitted), types, newest)
            for task in read
        ]
        return {"tasks": [{"index": index, **entry} for index, entry in enumerate(entries)]}

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
        require_own(call.who, device_id)
        return _pulled(self.dispatcher.pull(device_id, boot_id, limit, wait, seq, ack, ahead, call.who.key_id))

    # POST /tasks/report {device_id, boot_id?, reports} -> 200 {reports: [{assignment_id, outcome}]}
    def report_tasks(self, call: Call) -> Any:
        sent = wire.decode_reports(call.body)
        require_own(call.who, sent.device_id)
        wall = self.store.moments()[1]
        reports = [None if isinstance(entry, wire.BadReport) else _report(entry, wall) for entry in sent.entries]

        def judge(tx: Tx) -> list[db.Judged]:
            devices.hear_report(self.presence, sent.device_id, tx.now)
            return judging.apply_reports(tx, sent.device_id, [report for report in reports if report])

        judged = iter(self.store.write(judge) if any(reports) else ())
        return {"reports": [_judged(entry, judged) for entry in sent.entries]}

    # PUT /tasks/{task_id}/status {status, assignment_id?, lease_id, …} -> 200 {id, outcome, status}
    def set_task_status(self, call: Call) -> Any:
        task_id = wire.check_id(call.names["task_id"])
        body = wire.decode(call.body, wire.StatusIn)
        if body.status == "cancelled":
            call.told.update(action="cancel_task", reason=body.reason)
        is_allowed = call.who.role in ((OPERATOR, ADMIN) if body.status == "cancelled" else (DEVICE, ADMIN))
        if not is_allowed or (call.who.by == "session" and body.status != "cancelled"):
            needed = "operator" if body.status == "cancelled" else "device"
            raise Refused(403, "forbidden", f"Setting {body.status} needs a key of the role {needed}.", who=call.who)
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
            require_own(call.who, attempt.device_id)
            return judging.apply_report(tx, attempt.device_id, report)

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
        require_own(call.who, device_id)
        length, parts = open_upload(call.environ, self.settings.max_artifact_bytes)
        artifact = db.Artifact(name, length, sha256)
        judged = self.artifacts.receive(device_id, assignment_id, lease_id, artifact, parts)
        _refuse_if_over(judged)
        if judged.outcome == "differs":
            raise invalid(
                409, "artifact_differs", "This attempt has another file of that name; choose another.", "name"
            )
        if judged.outcome == "too_many":
            limit = f"An attempt has at most {judging.ARTIFACTS_LIMIT} files; put several into one archive."
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
        parts = self.artifacts.open(task_id, artifact, call.who.key_id)
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
        why = self.explain(task)
        waiting = {"reason": why.reason, "detail": why.detail} if task["status"] in ("pending", "scheduled") else None
        return {**task, "artifacts": self.reads.artifacts(task["id"]), "waiting": waiting}

    # GET /tasks/{task_id}/why -> 200 {reason, detail, devices, limit, next_look_seconds}
    def explain_task(self, call: Call) -> Any:
        call.query.finish()
        task = self.reads.task(wire.check_id(call.names["task_id"])) or self._no_task()
        why = self.explain(task)
        return {
            "task_id": task["id"],
            "status": task["status"],
            "reason": why.reason,
            "detail": why.detail,
            "devices": why.devices[:200],
            "limit": why.limit,
            "next_look_seconds": why.next_look_seconds,
        }

    def explain(self, task: dict[str, Any]) -> reasons.Explanation:
        now, wall = self.store.moments()
        due = task["next_run_at"]
        return reasons.explain(
            task,
            self.backlog.lane_of(task["id"], now, wall),
            self.reads.batch(task["batch"]) if task["batch"] else None,
            self.reads.devices(now, self.settings.device_timeout),
            self.dispatcher.is_asking,
            pauses=self.backlog.pauses(),
            dispatch_interval=self.settings.dispatch_interval,
            due_seconds=max(0.0, round(wire.parse_time(due, "next_run_at") - wall, 3)) if due else None,
        )

    # PUT /tasks/{task_id}/assign {device_id} -> 200 {id, status}: it comes with that device's next pull
    def assign_task(self, call: Call) -> Any:
        task_id = wire.check_id(call.names["task_id"])
        body = wire.decode(call.body, wire.AssignIn)
        call.told.update(device_id=body.device_id)
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
        call.told.update(reason=reason)
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

    # GET /tasks/export?format=jsonl|csv&include=result&<filters> -> 200 rows, oldest first, then an end mark
    def export_tasks(self, call: Call) -> Any:
        filters = call.query.filters()
        form = call.query.choice("format", tuple(EXPORT_KINDS)) or "jsonl"
        with_result = call.query.choice("include", ("result",)) == "result"
        call.query.finish()
        rows = export.begun(self.reads.export(filters, include_result=with_result))
        columns = EXPORT_COLUMNS + (["result"] if with_result else [])
        lines = export.csv_lines(rows, columns) if form == "csv" else export.json_lines(rows)
        lines = export.while_allowed(lines, lambda: self.access.is_in_force(call.who))
        disposition = f'attachment; filename="tasks.{form}"'
        return web.stream(Export(lines, call.who.key_id), EXPORT_KINDS[form], ("Content-Disposition", disposition))

    # GET /tasks/stats?batch=&task_type= -> 200 {by_state, by_type, by_batch, by_device, last_hour}
    def tasks_stats(self, call: Call) -> Any:
        batch, task_type = call.query.text("batch", maximum=128), call.query.name("task_type")
        call.query.finish()
        return self.reads.tasks_stats(self.now, batch=batch, task_type=task_type)

    def operations(self) -> Iterable[Operation]:
        """The table, as far as a document of it needs it."""
        return (route.operation for route in routes(self)[0][1])

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
        storage = self.store.writer.storage
        if storage.is_long_in_trouble:
            raise invalid(503, "storage_failing", storage.complaint() or "", retry_after=storage.retry_after)
        return {"status": "ready"}

    # GET /metrics -> 200 for Prometheus; 404 with enable_monitoring false
    def metrics_text(self, call: Call) -> Any:
        if not self.settings.enable_monitoring:
            raise invalid(404, "monitoring_off", "enable_monitoring is false in the master's config.")
        return Answer(self.metrics.render(), kind=CONTENT_TYPE)


def routes(api: Api) -> tuple[tuple[str, tuple[Route, ...]], ...]:
    """The API's table, under its prefix, and what stands at the root."""
    text, name, number = openapi.TEXT, openapi.NAME, {**openapi.NUMBER, "minimum": 0}
    device_filter = (
        Query("status", {"enum": list(DEVICE_STATES)}, "One status"),
        Query("task_type", name, "Runs this type"),
        Query("tag", name, "Has this tag"),
        Query(
            "beats", {"type": "integer", "minimum": 0, "maximum": MAX_BEATS}, "So many of each device's newest beats"
        ),
        PAGE[0],
        Query("cursor", name, "next_cursor of the page before"),
    )
    pull = (
        Query("device_id", name, "Who asks", True),
        Query("boot_id", name, "Its process"),
        Query("limit", {**number, "maximum": 1000}, "Free slots"),
        Query(
            "ahead",
            {"type": "string", "maxLength": 4096, "pattern": rf"^{AHEAD}(,{AHEAD})*$(?!\n)"},
            "Of each short type, how many more make a second of work: echo:400,crawl:2",
        ),
        Query("wait", {"type": "number", "minimum": 0, "maximum": LONGEST_WAIT_SECONDS}, "Seconds to hold"),
        Query("seq", number, "Number of this pull"),
        Query("ack", number, "Last pull whose reply arrived"),
    )
    upload = (
        Query("device_id", name, "Who sends", True),
        Query("boot_id", name, "Its process"),
        Query("assignment_id", openapi.NUMBER, "The attempt that it belongs to", True),
        Query("lease_id", name, "The attempt's lease", True),
        Query("name", {"type": "string", "pattern": ARTIFACT_NAME_PATTERN}, "The file's name", True),
        Query("sha256", {"type": "string", "pattern": SHA256_PATTERN}, "Of the file's bytes, in hex digits", True),
    )
    hours = Query("hours", {"enum": list(STEP_SECONDS)}, "How far back: one hour, or a day")
    series = (
        hours,
        Query("task_type", name, "Of this type"),
        Query("device_id", name, "Of this device"),
        Query("batch", text, "Of this batch: its tasks that ended"),
    )
    happened = (
        Query("kind", {"enum": list(EVENT_KINDS)}, "Of this kind"),
        Query("device_id", name, "About this device"),
        Query("verb", name, "Exactly this"),
        Query("after", openapi.TIME, "Not before that"),
        *PAGE,
    )
    dry_run = (
        Query("dry_run", {"enum": ["true", "false"]}, "Check only: says of each task what is wrong, and keeps none"),
    )
    stats = (Query("batch", text, "Of this batch"), Query("task_type", name, "Of this type"))
    lane_page = (Query("task_type", name, "Of this type"), *PAGE)
    batch_page = (Query("name", text, "Only this batch"), *PAGE)
    key_page = (
        Query("role", {"enum": list(KEY_ROLES)}, "Of this role"),
        Query("device_id", name, "Tokens of this device"),
        *PAGE,
    )
    audited = (
        Query("actor", openapi.TEXT, "By this key's name, or this address"),
        Query("action", name, "Exactly this"),
        Query("outcome", name, "ok, or the code of a refusal"),
        Query("since", openapi.TIME, "Not before that"),
        Query("until", openapi.TIME, "Before that"),
        *PAGE,
    )
    shape = (Query("format", {"enum": ["jsonl", "csv"]}, "Of the file"), Query("include", {"enum": ["result"]}, "More"))
    o, r, w = openapi, replies, wire
    # fmt: off
    return (PREFIX, (
        _("POST",   "/devices/register",              "device, enroll", api.register_device,   "A device introduces itself.", w.RegisterIn, o.RegisterOut),
        _("GET",    "/devices",                       "viewer",    api.list_devices,      "All devices.", None, r.DevicesOut, device_filter),
        _("GET",    "/devices/{device_id}",           "viewer",    api.get_device,        "One device, with its newest heartbeats.", None, r.DeviceDetailOut),
        _("PUT",    "/devices/{device_id}",           "operator",  api.rename_device,     "Give a device a name that its worker does not undo.", w.DeviceNameIn, o.DeviceOut),
        _("PUT",    "/devices/{device_id}/status",    "operator",  api.set_device_status, "Make a device active, draining or disabled.", w.DeviceStatusIn, o.DeviceOut),
        _("POST",   "/devices/{device_id}/revoke",    "operator",  api.revoke_device,     "Trust a device no more: its tokens end, its tasks go back.", w.ReasonIn, r.DeviceRevokedOut),
        _("POST",   "/devices/{device_id}/heartbeat", "device",    api.take_heartbeat,    "A sign of life, and what the device holds.", w.HeartbeatIn, o.HeartbeatOut),
        _("GET",    "/devices/{device_id}/stats",     "viewer",    api.device_stats,      "Totals, rates, failures and heartbeats.", None, o.DeviceStatsOut),
        _("GET",    "/devices/{device_id}/heartbeats", "viewer",   api.device_heartbeats, "A device's heartbeats as points for charts.", None, r.BeatsOut, (hours,)),
        _("DELETE", "/devices/{device_id}",           "operator",  api.delete_device,     "Remove a device that is offline."),
        _("POST",   "/tasks",                         "submitter", api.submit_tasks,      "Submit one task or a list.", (w.TaskIn, w.TasksIn, w.TaskList), (o.SubmittedOut, o.SubmittedListOut, r.PreviewOut), dry_run, status=201, other_status=200, is_large=True),
        _("GET",    "/tasks",                         "viewer",    api.list_tasks,        "Tasks, newest first, by pages.", None, o.TaskPageOut, (*FILTERS, *PAGE)),
        _("GET",    "/tasks/pull",                    "device",    api.pull_tasks,        "Ask for tasks; held until there are some.", None, o.PullOut, pull),
        _("GET",    "/tasks/stats",                   "viewer",    api.tasks_stats,       "Counts, and the last hour.", None, o.TasksStatsOut, stats),
        _("GET",    "/tasks/export",                  "viewer",    api.export_tasks,      "All matching tasks as a file.", None, None, (*FILTERS, *shape), kind="application/x-ndjson, text/csv"),
        _("POST",   "/tasks/report",                  "device",    api.report_tasks,      "What became of tasks.", w.ReportsIn, o.ReportsOut, is_large=True),
        _("PUT",    "/tasks/artifacts",               "device",    api.receive_artifact,  "Send a file, before the report that names it.", None, o.UploadedOut, upload, sent=OCTETS),
        _("POST",   "/tasks/actions",                 "operator",  api.act_on_tasks,      "Cancel or requeue all that a filter matches.", w.ActionIn, o.ActionOut),
        _("GET",    "/tasks/{task_id}",               "viewer",    api.get_task,          "One task with all that belongs to it.", None, o.TaskDetailOut),
        _("GET",    "/tasks/{task_id}/artifacts/{artifact_id}", "viewer", api.download_artifact, "A file of a task.", kind=OCTETS, other_status=304),
        _("GET",    "/tasks/{task_id}/why",           "viewer",    api.explain_task,      "Why a task waits, device by device.", None, o.WhyOut),
        _("PUT",    "/tasks/{task_id}/assign",        "operator",  api.assign_task,       "Pin a waiting task to a device.", w.AssignIn, o.ChangedOut),
        _("PUT",    "/tasks/{task_id}/status",        "device, operator", api.set_task_status,   "Report one task, for simple clients.", w.StatusIn, o.StatusOut, is_large=True),
        _("POST",   "/tasks/{task_id}/cancel",        "operator",  api.cancel_task,       "Cancel a task.", w.ReasonIn, o.StatusOut),
        _("POST",   "/tasks/{task_id}/requeue",       "operator",  api.requeue_task,      "Give a failed or cancelled task another life.", w.ReasonIn, o.ChangedOut),
        _("GET",    "/batches",                       "viewer",    api.list_batches,      "Batches with their counts.", None, o.BatchesOut, batch_page),
        _("GET",    "/batches/{name}/failures",       "viewer",    api.batch_failures,    "What went wrong in a batch, by error message.", None, r.FailuresOut),
        _("GET",    "/batches/{name}",                "viewer",    api.get_batch,         "How far a batch is, and how fast it goes.", None, r.BatchProgressOut),
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
        _("GET",    "/system",                        "viewer",    api.about_system,      "The master itself: database, writer, latency, settings, states.", None, r.SystemOut),
        _("GET",    "/system/overview",               "viewer",    api.overview,          "The system at a glance.", None, r.OverviewOut),
        _("GET",    "/system/series",                 "viewer",    api.system_series,     "What was done over the last hour or day, as points for charts.", None, r.SeriesOut, series),
        _("GET",    "/system/backups",                "operator",  api.list_backups,      "The master's own backups, newest first.", None, r.BackupsOut),
        _("POST",   "/system/backup",                 "admin",     api.make_backup,       "Make a backup now.", w.ReasonIn, r.BackupMadeOut),
        _("GET",    "/strategy",                      "viewer",    api.get_strategy,      "The load-balancing strategy in force.", None, o.StrategyOut),
        _("PUT",    "/strategy",                      "operator",  api.set_strategy,      "Switch the strategy.", w.StrategyIn, o.StrategyOut),
        _("GET",    "/events",                        "viewer",    api.stream_events,     "What happens, as server-sent events.", kind="text/event-stream"),
        _("GET",    "/events/history",                "viewer",    api.event_history,     "What happened, kept: all but the routine life of tasks.", None, r.HistoryOut, happened),
        _("GET",    "/session",                       "public",    api.session,           "Who am I for the master?", None, r.SessionOut),
        _("POST",   "/login",                         "public",    api.login,             "Trade a key for a session cookie.", w.LoginIn, status=204),
        _("POST",   "/logout",                        "public",    api.logout,            "Forget the session cookie.", status=204),
        _("GET",    "/keys",                          "admin",     api.list_keys,         "Keys, newest first; tokens of devices only where asked for.", None, r.KeysOut, key_page),
        _("POST",   "/keys",                          "admin",     api.create_key,        "Make a key, which is told this once.", w.KeyIn, r.NewKeyOut, status=201),
        _("DELETE", "/keys/{key_id}",                 "admin",     api.revoke_key,        "Revoke a key, at once.", None, r.KeyOut),
        _("GET",    "/audit",                         "admin",     api.list_audit,        "Who did what, from where, and how it ended.", None, r.AuditOut, audited),
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
    other_status: int | None = None,
    is_large: bool = False,
) -> Route:
    said = (summary, request, response, query, status, kind, sent, other_status, is_large)
    return Route(Operation(method, path, role, *said), handler)


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


def _problem(wrong: wire.Invalid) -> dict[str, Any]:
    return {"ok": False, "problem": {"code": wrong.code, "field": wrong.field, "detail": wrong.detail}}


def _previewed(task: wire.TaskIn, submitted: db.Submitted, types: Mapping[str, int], newest: int) -> dict[str, Any]:
    """`id` is that of the task which has this key already; one that was only rehearsed has none."""
    if submitted.status in REFUSALS:
        return _problem(wire.Invalid(409, submitted.status, REFUSALS[submitted.status], "batch"))
    warning = None if task.task_type in types else f"No device runs {task.task_type} tasks: it waits until one does."
    known_id = submitted.id if not submitted.created and (submitted.id or 0) <= newest else None
    return {"ok": True, "id": known_id, "created": submitted.created, "status": submitted.status, "warning": warning}


def _report(report: wire.ReportIn, wall: float) -> db.Report:
    delay = report.snooze_seconds if report.outcome == "snoozed" else report.retry_after_seconds
    return db.Report(
        report.assignment_id, report.lease_id, report.outcome, report.result_text,
        report.error_message or report.reason, report.error_type, report.log_tail, report.duration_seconds,
        report.progress, report.retry, delay, tuple(_new_task(task, wall) for task in report.new_tasks) if report.new_tasks else (),
        tuple(db.Artifact(file.name, file.bytes, file.sha256) for file in report.artifacts) if report.artifacts else (),
        report.closed_seconds(wall), report.limit_name, tuple(report.limit_key or ()),
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
