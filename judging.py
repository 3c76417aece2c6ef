"""Does what a device says of an attempt still count?

Networks repeat, delay and reorder, and devices come back from the dead: so each report, and each file before it, is
judged by the attempt and the lease that it names.

  1  unknown attempt, of another device, or deleted   gone
  2  another lease                                    stale
  3  settled by this report before                    duplicate, nothing changes
  4  the task was cancelled                           gone
  5  a newer attempt has the task, or it is final     stale: kept on the attempt (late_outcome), never applied
  6  else                                             accepted: its verb in db.py moves the task

This file moves nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import db
import limits
from db import Artifact, Attempt, Ended, Judged, Report, Task
from schema import ACTIVE
from transaction import Tx

ARTIFACTS_LIMIT = 100
"""Files of one attempt."""


def apply_reports(tx: Tx, device_id: str, reports: Sequence[Report]) -> list[Judged]:
    """Judges the reports of one request, in order. Nearly all are plain completions: they are read and written at once,
    and everything else one by one, as it comes."""
    plain = _plain_completions(tx, device_id, reports)
    judged: list[Judged] = []
    ended: list[tuple[Ended, Report]] = []
    for report in reports:
        task = plain.pop(report.assignment_id, None)  # a second report of it is read anew
        if task is not None:
            ended.append((task, report))
            judged.append(Judged("accepted", task.id, "completed"))
        else:
            db.complete_all(tx, device_id, ended)
            ended = []
            judged.append(apply_report(tx, device_id, report))
    db.complete_all(tx, device_id, ended)
    return judged


_PLAIN_SQL = (
    f"SELECT attempt.id, {', '.join('task.' + name for name in Ended._fields[1:])} FROM json_each(?) AS said"
    " CROSS JOIN af_task_assignment AS attempt ON attempt.id = said.key AND attempt.lease_id = said.value"
    " CROSS JOIN af_crawl_tasks AS task ON task.id = attempt.task_id AND task.assignment_id = attempt.id"
    f" WHERE attempt.device_id = ? AND attempt.status IN ({ACTIVE}) AND task.status IN ({ACTIVE})"
    " AND attempt.late_outcome IS NULL"
)


def _plain_completions(tx: Tx, device_id: str, reports: Sequence[Report]) -> dict[int, Ended]:
    """The usual ends: `apply_report` would accept them, and `complete` has nothing to ask or to add."""
    first: dict[int, Report] = {}
    for report in reports:
        first.setdefault(report.assignment_id, report)
    leases = {
        assignment_id: r.lease_id
        for assignment_id, r in first.items()
        if r.outcome == "completed" and not (r.artifacts or r.new_tasks or r.limit_closed_seconds)
    }
    if not leases:
        return {}
    rows = tx.execute(_PLAIN_SQL, (json.dumps(leases), device_id)).fetchall()
    return {row[0]: Ended._make(row) for row in rows}


def apply_report(tx: Tx, device_id: str, report: Report) -> Judged:
    """Judges one report by the rules above and, if it is accepted, applies its verb."""
    attempt = db.get_attempt(tx, report.assignment_id)
    if attempt is None or attempt.device_id != device_id:
        return Judged("gone")
    task = db.get_task(tx, attempt.task_id)
    if task is None:
        return Judged("gone")
    if attempt.lease_id != report.lease_id:
        return Judged("stale", task.id, task.status)
    if _is_settled_by_report(attempt, report):
        return Judged("duplicate", task.id, task.status)
    if task.status == "cancelled":
        return Judged("gone", task.id, task.status)
    if task.assignment_id != attempt.id or _is_final_by_another(task):
        db.keep_late(tx, attempt, report)
        return Judged("stale", task.id, task.status)
    if report.limit_closed_seconds:
        return _close_limit(tx, task, attempt, report)
    return REPORT_VERBS[report.outcome](tx, task, attempt, report)


def _close_limit(tx: Tx, task: Task, attempt: Attempt, report: Report) -> Judged:
    """The device was told to stay away: that is nobody's failure, so the task waits like the others of its key."""
    seconds = report.limit_closed_seconds or 0.0
    limits.close_keys(tx, task.lane_id, seconds, report.error_message, report.limit_name, report.limit_key)
    if report.outcome != "failed" or not report.can_retry:
        return REPORT_VERBS[report.outcome](tx, task, attempt, report)
    return db.snooze(tx, task, attempt, report._replace(outcome="snoozed"))


def _is_settled_by_report(attempt: Attempt, report: Report) -> bool:
    if attempt.late_outcome is not None or attempt.status in ("completed", "failed", "snoozed"):
        return True
    if report.outcome == "running":
        return attempt.status == "running"
    return report.outcome == "released" and attempt.status == "released"


def _is_final_by_another(task: Task) -> bool:
    """Final, and not merely because a sweep gave it up while its device was away."""
    return task.status == "completed" or (task.status == "failed" and task.end_reason not in db.FAILED_BY_SWEEP)


REPORT_VERBS = {
    "running": db.start,
    "completed": db.complete,
    "failed": db.fail,
    "snoozed": db.snooze,
    "released": db.hand_back,
}


def judge_upload(tx: Tx, device_id: str, assignment_id: int, lease_id: str, artifact: Artifact) -> Judged:
    """May this file come in? Judged as its attempt's report would be: accepted, duplicate, gone or stale; or `differs`
    (another file has its name) or `too_many`."""
    attempt = db.get_attempt(tx, assignment_id)
    task = db.get_task(tx, attempt.task_id) if attempt is not None and attempt.device_id == device_id else None
    if attempt is None or task is None:
        return Judged("gone")
    if attempt.lease_id != lease_id:
        return Judged("stale", task.id, task.status)
    row = tx.one("SELECT name, bytes, sha256 FROM af_artifact WHERE assignment_id = ? AND name = ?",
                 (assignment_id, artifact.name))  # fmt: skip
    if row is not None:
        return Judged("duplicate" if Artifact(*row) == artifact else "differs", task.id, task.status)
    if task.status == "cancelled":
        return Judged("gone", task.id, task.status)
    if task.assignment_id != attempt.id or _is_final_by_another(task):
        return Judged("stale", task.id, task.status)
    known = tx.one("SELECT COUNT(*) FROM af_artifact WHERE assignment_id = ?", (assignment_id,))[0]
    return Judged("accepted" if known < ARTIFACTS_LIMIT else "too_many", task.id, task.status)


def add_artifact(tx: Tx, device_id: str, assignment_id: int, lease_id: str, artifact: Artifact) -> Judged:
    """The file lies beside the database now; from here on it belongs to its attempt, if that is still wanted."""
    judged = judge_upload(tx, device_id, assignment_id, lease_id, artifact)
    if judged.outcome == "accepted":
        tx.execute(
            "INSERT INTO af_artifact (task_id, assignment_id, name, bytes, sha256, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (judged.task_id, assignment_id, *artifact, tx.now),
        )
        tx.note("task", "add_artifact", task=judged.task_id, device=device_id, artifact=artifact.name,
                bytes=artifact.bytes, status=judged.status)  # fmt: skip
    return judged
