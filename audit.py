"""Who did what, from where, and how did it end?

A row for every call of a person or a program that changes something, but not for what devices say and not for
submissions, whose tasks carry `created_by`; and for each login, backup and command. `outcome` is "ok" or the code of
the refusal. Who was not let in is counted: a row for each address, key, code and minute. No secret and no payload is in
it. The reply to a call leaves after its row is written; where nothing can be written, the call is answered anyhow.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from access import Refused, Who
from keys import ADMIN, KeyRefused
from reads import Reads, iso
from store import Store
from transaction import Tx
from writer import StorageFailing, WriterBusy, WriterStopped

MAX_ROWS = 1_000_000
COMMAND = Who("command line", ADMIN, None, None, "command", "local")
"""As whom it knows whoever may write the database file."""
REFUSED = "refused"
COUNTED = (401, 403, 429)
"""Refusals with these statuses are counted, all others are rows of their own."""
MINUTE_SECONDS = 60.0
REFUSALS_A_MINUTE = 1_000
"""So many are told apart in a minute; what comes then is counted as of OTHERS."""
OTHERS = "others"
COLUMNS = ("id", "at", "actor", "role", "key_id", "address", "action", "object", "outcome", "detail")


@dataclass
class Refusal:
    """Who was not let in, counted for a minute; `row_id` once it is in the table."""

    who: Who
    code: str
    first: str
    began_at: float
    count: int = 0
    written: int = 0
    row_id: int | None = None


def record(
    tx: Tx, who: Who, action: str, *, object: str | None = None, outcome: str = "ok", detail: Mapping[str, Any]
) -> int:
    """A row, in the transaction of what it tells of."""
    told = {name: value for name, value in detail.items() if value is not None}
    row = (tx.now, who.actor, who.role, who.key_id, who.address, action, object, outcome)
    sql = f"INSERT INTO af_audit ({', '.join(COLUMNS[1:])}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    row_id = tx.execute(sql, (*row, json.dumps(told, ensure_ascii=False))).lastrowid
    assert row_id is not None
    return row_id


def forget(tx: Tx, before: float, limit: int) -> int:
    """Deletes at most `limit` rows that are older, or more than MAX_ROWS; how many."""
    return tx.execute(
        "DELETE FROM af_audit WHERE id IN (SELECT id FROM (SELECT id, at FROM af_audit ORDER BY id LIMIT ?)"
        " WHERE at < ? OR id <= (SELECT max(id) FROM af_audit) - ?)",
        (limit, before, MAX_ROWS),
    ).rowcount


class Audit:
    """Writes and asks; made once by the master."""

    def __init__(self, store: Store, reads: Reads) -> None:
        self._store = store
        self._reads = reads
        self._refusals: dict[tuple[str, str, str], Refusal] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()

    def tell(self, who: Who, action: str, *, object: str | None = None, outcome: str = "ok", **detail: Any) -> None:
        """What somebody with a key, or on an open master, did. Whoever is nobody in particular leaves no row."""
        if who.role is not None:
            with contextlib.suppress(StorageFailing, WriterBusy, WriterStopped):
                self._store.write(record, who, action, object=object, outcome=outcome, detail=detail)

    def count(self, error: Exception, who: Who | None, address: str, asked: str) -> None:
        """Somebody was not let in, if that is what this error says; `asked` is what they wanted, such as GET /tasks."""
        if not isinstance(error, Refused | KeyRefused) or (error.status not in COUNTED and error.code != "key_in_url"):
            return
        who = who or getattr(error, "who", None) or Who("", None, None, None, "public", address)
        with self._lock:
            key = (who.address, who.actor, error.code)
            if key not in self._refusals and len(self._refusals) >= REFUSALS_A_MINUTE:
                who = Who("", None, None, None, "public", OTHERS)
                key = (OTHERS, OTHERS, error.code)
            now = self._store.moments()[0]
            refusal = self._refusals.setdefault(key, Refusal(who, error.code, asked, now))
            refusal.count += 1

    def flush(self) -> None:
        """Writes what was counted; a minute that goes on is written again into the row that it has."""
        with self._flushing:
            with self._lock:
                now = self._store.moments()[0]
                unwritten = [refusal for refusal in self._refusals.values() if refusal.count > refusal.written]
                counts = [refusal.count for refusal in unwritten]
                over = [key for key, refusal in self._refusals.items() if now - refusal.began_at >= MINUTE_SECONDS]
                for key in over:
                    del self._refusals[key]
            if unwritten:
                row_ids = self._store.write(_write_refusals, list(zip(unwritten, counts, strict=True)))
                for refusal, count, row_id in zip(unwritten, counts, row_ids, strict=True):
                    refusal.written, refusal.row_id = count, row_id

    def page(
        self, *, actor: str | None = None, action: str | None = None, outcome: str | None = None,
        since: float | None = None, until: float | None = None, limit: int, cursor: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """{entries, next_cursor}: newest first, ids below `cursor`."""
        with contextlib.suppress(StorageFailing, WriterBusy, WriterStopped):
            self.flush()
        given = {"actor": actor, "action": action, "outcome": outcome}
        terms: dict[str, Any] = {f"{name} = ?": value for name, value in given.items() if value is not None}
        index = next((f"INDEXED BY audit_{name}" for name, value in given.items() if value is not None), "")
        # Ids and moments rise together, so a moment is an id, and the list stops where it has to.
        bounds = {
            "id >= (SELECT id FROM af_audit WHERE at >= ? ORDER BY at LIMIT 1)": since,
            "id < COALESCE((SELECT id FROM af_audit WHERE at >= ? ORDER BY at LIMIT 1), 9e18)": until,
        }
        terms |= {term: value for term, value in bounds.items() if value is not None}
        rows = self._reads.rows(
            f"SELECT {', '.join(COLUMNS)} FROM af_audit {index} WHERE {' AND '.join(['id < ?', *terms])}"
            " ORDER BY id DESC LIMIT ?",
            (2**63 - 1 if cursor is None else cursor, *terms.values(), limit),
        )
        entries = [
            {**dict(zip(COLUMNS, row, strict=True)), "at": iso(row[1]), "detail": json.loads(row[-1])} for row in rows
        ]
        return {"entries": entries, "next_cursor": str(rows[-1][0]) if len(rows) == limit else None}


def _write_refusals(tx: Tx, refusals: list[tuple[Refusal, int]]) -> list[int]:
    row_ids = []
    for refusal, count in refusals:
        detail = {"count": count, "first": refusal.first}
        if refusal.row_id is None:
            row_ids.append(record(tx, refusal.who, REFUSED, outcome=refusal.code, detail=detail))
        else:
            row_ids.append(refusal.row_id)
            sql = "UPDATE af_audit SET detail = ? WHERE id = ?"
            tx.execute(sql, (json.dumps(detail, ensure_ascii=False), refusal.row_id))
    return row_ids
