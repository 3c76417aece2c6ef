"""What happened, and when? Kept in af_event for those who ask later.

Everything but the routine life of a task is kept: devices that come, go and are told what to do; tasks that devices
lost, or that ran over their time; bulk actions; batches, lanes, limits and pauses; the strategy; the starts and stops
of the master; logins. `keep` runs at the end of every job of the writer, over what the job noted, and in the same
savepoint: what is in the history has happened, and what happened is in it. The log and the event stream (events.py)
tell the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reads import Reads, iso
from transaction import Note, Tx

MAX_ROWS = 100_000
FAILED_LOGINS_A_MINUTE = 100
"""So many rows at most tell of failed logins in a minute, and one of each address."""
KEPT = frozenset({
    "device_registered", "device_online", "device_offline", "device_stopped", "device_conflict", "device_wanted",
    "device_renamed", "device_removed", "device_revoked",
    "release",
    "batch_open", "batch_paused", "batch_cancelled",
    "paused", "resumed", "lane_paused", "lane_resumed", "limits", "limit_closed", "limit_opened", "strategy",
    "clock_moved", "deletion_waits", "master_started", "master_stopped",
    "backup", "backup_failed", "restored",
    "login",
})  # fmt: skip
"""The verbs of the notes that are kept; a release is kept as release, timeout or poison."""
PRESENCE = (
    "device_registered", "device_online", "device_offline", "device_stopped", "device_removed", "device_revoked",
)  # fmt: skip
SAYS_AGAIN = {
    "device_online": ("device_registered", "device_online"),
    "device_offline": ("device_offline", "device_stopped", "device_removed", "device_revoked"),
}
"""After a start of the master every device is heard or missed for the first time: after these that is no news."""
VERBS_LOOKED_AT = 50


def keep(tx: Tx) -> None:
    """Keeps what this job noted, and writes into each note under which id. Of releases, one row for each cause."""
    causes: dict[tuple[Any, ...], list[Note]] = {}
    new = {note.facts["device"] for note in tx.notes if note.verb == "device_registered"}
    for note in tx.notes:
        if note.verb not in KEPT or "history_id" in note.facts:
            continue
        if note.verb == "release":
            facts = note.facts
            causes.setdefault((_cause(note), facts["device"], facts["reason"]), []).append(note)
        elif note.facts.get("device") in new and note.verb == "device_online":
            continue
        elif note.verb not in SAYS_AGAIN or _presence(tx, note.facts["device"]) not in SAYS_AGAIN[note.verb]:
            note.facts["history_id"] = _insert(tx, note.kind, note.verb, note.facts)
    for (verb, device, reason), notes in causes.items():
        tasks = [note.facts["task"] for note in notes]
        told = {
            "device": device,
            "reason": reason,
            "count": len(tasks),
            "first_task": min(tasks),
            "last_task": max(tasks),
        }
        history_id = _insert(tx, "task", verb, told)
        for note in notes:
            note.facts["history_id"] = history_id


def _cause(note: Note) -> str:
    reason = note.facts["reason"]
    if reason == "lost" and note.facts["status"] == "failed":
        return "poison"
    return "timeout" if reason == "timeout" else "release"


def _presence(tx: Tx, device_id: str) -> str | None:
    """What was kept last of whether a device is there."""
    rows = tx.execute("SELECT verb FROM af_event WHERE device_id = ? ORDER BY id DESC LIMIT ?",
                      (device_id, VERBS_LOOKED_AT))  # fmt: skip
    return next((verb for (verb,) in rows.fetchall() if verb in PRESENCE), None)


def record(tx: Tx, kind: str, verb: str, **facts: Any) -> int:
    """Notes and keeps something at once; its id, for `amend`."""
    history_id = _insert(tx, kind, verb, facts)
    tx.note(kind, verb, **facts, history_id=history_id)
    return history_id


def amend(tx: Tx, history_id: int, facts: Mapping[str, Any]) -> None:
    """Says what has become of something that goes on for more than one job."""
    tx.execute("UPDATE af_event SET facts = ? WHERE id = ?", (_text(facts), history_id))


def record_failed_login(tx: Tx, address: str) -> None:
    """One row for each address and minute, and not more in a minute than a flood of addresses may cost."""
    sql = "SELECT facts FROM af_event WHERE verb = 'login_failed' AND at > ? ORDER BY id DESC LIMIT ?"
    recent = tx.execute(sql, (tx.now - 60.0, FAILED_LOGINS_A_MINUTE)).fetchall()
    facts = {"by": address}
    if len(recent) < FAILED_LOGINS_A_MINUTE and (_text(facts),) not in recent:
        record(tx, "access", "login_failed", **facts)


def forget(tx: Tx, before: float, limit: int) -> int:
    """Deletes at most `limit` rows that are older, or more than MAX_ROWS; how many. Ids and moments rise together."""
    return tx.execute(
        "DELETE FROM af_event WHERE id IN (SELECT id FROM (SELECT id, at FROM af_event ORDER BY id LIMIT ?)"
        " WHERE at < ? OR id <= (SELECT max(id) FROM af_event) - ?)",
        (limit, before, MAX_ROWS),
    ).rowcount


def _insert(tx: Tx, kind: str, verb: str, facts: Mapping[str, Any]) -> int:
    sql = "INSERT INTO af_event (at, kind, verb, device_id, facts) VALUES (?, ?, ?, ?, ?)"
    row_id = tx.execute(sql, (tx.now, kind, verb, facts.get("device"), _text(facts))).lastrowid
    assert row_id is not None
    return row_id


def _text(facts: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in facts.items() if value is not None}, ensure_ascii=False)


class History:
    """The questions about it; made once, beside the Reads that it asks."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    def page(
        self, *, kind: str | None = None, device_id: str | None = None, verb: str | None = None,
        after: float | None = None, limit: int, cursor: int | None = None, hidden: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """{events, next_cursor}: newest first, ids below `cursor`, none that happened before `after`, and none of the
        kind `hidden`."""
        given = {"device_id": device_id, "verb": verb, "kind": kind}
        terms: dict[str, Any] = {f"{name} = ?": value for name, value in given.items() if value is not None}
        index = next((f"INDEXED BY event_{name.removesuffix('_id')}" for name, value in given.items() if value), "")
        terms |= {} if after is None else {"at >= ?": after}
        terms |= {} if hidden is None else {"kind <> ?": hidden}
        where = " AND ".join(["id < ?", *terms])
        rows = self._reads.rows(
            f"SELECT id, at, kind, verb, facts FROM af_event {index} WHERE {where} ORDER BY id DESC LIMIT ?",
            (2**63 - 1 if cursor is None else cursor, *terms.values(), limit),
        )
        events = [
            {"id": row_id, "at": iso(at), "kind": kind, "verb": verb, "facts": json.loads(facts)}
            for row_id, at, kind, verb, facts in rows
        ]
        return {"events": events, "next_cursor": str(rows[-1][0]) if len(rows) == limit else None}
