"""Who did what, from where, and how did it end?

A row for every call of a person or a program that changes something, but not for what devices say and not for
submissions, whose tasks carry `created_by`; and for each backup and command. `outcome` is "ok" or the code of the
refusal. Who was not let in is counted: a row for each address, key, code and minute; and so are logins: a row for each
key and minute. No secret and no payload is in it. The reply to a call leaves after its row is written; where nothing
can be written, the call is answered anyhow.
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
REFUSED, LOGIN = "refused", "login"
CHEAP = (REFUSED, LOGIN)
"""Rows of these actions go first where there are too many: anybody, and any small key, can cause them."""
COUNTED = (401, 403, 429)
"""Refusals with these statuses are counted, all others are rows of their own."""
MINUTE_SECONDS = 60.0
REFUSALS_A_MINUTE = 1_000
"""So many are told apart in a minute; what comes then is counted as of OTHERS."""
OTHERS = "others"
COLUMNS = ("id", "at", "actor", "role", "key_id", "address", "action", "object", "outcome", "detail")


@dataclass
class Counted:
    """Who was not let in, or came in, counted for a minute; `row_id` once it is in the table."""

    who: Who
    action: str
    outcome: str
    first: str | None
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
    """Deletes at most `limit` rows that are older, or more than MAX_ROWS, CHEAP ones first; how many."""
    sql = "SELECT id FROM (SELECT id, at FROM af_audit ORDER BY id LIMIT ?) WHERE at < ?"
    gone = tx.execute(f"DELETE FROM af_audit WHERE id IN ({sql})", (limit, before)).rowcount
    sql = "SELECT (SELECT max(id) FROM af_audit) - (SELECT min(id) FROM af_audit) >= ?"
    if tx.one(sql, (MAX_ROWS,))[0]:  # else there is nothing to count
        excess = tx.one("SELECT count(*) FROM af_audit")[0] - MAX_ROWS
        most = gone + min(excess, limit - gone)
        for where, given in [*(("WHERE action = ?", (action,)) for action in CHEAP), ("", ())]:
            sql = f"SELECT id FROM af_audit {where} ORDER BY id LIMIT ?"
            gone += tx.execute(f"DELETE FROM af_audit WHERE id IN ({sql})", (*given, max(0, most - gone))).rowcount
    return gone


class Audit:
    """Writes and asks; made once by the master."""

    def __init__(self, store: Store, reads: Reads) -> None:
        self._store = store
        self._reads = reads
        self._counted: dict[tuple[str, str, str], Counted] = {}
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
            if key not in self._counted and len(self._counted) >= REFUSALS_A_MINUTE:
                who = Who("", None, None, None, "public", OTHERS)
                key = (OTHERS, OTHERS, error.code)
            self._add(key, who, REFUSED, error.code, asked)

    def count_login(self, who: Who) -> bool:
        """Somebody came in; whether it is the first time in a minute with this key, which is written at once."""
        with self._lock:
            is_first = self._add((LOGIN, who.actor, "ok"), who, LOGIN, "ok", None) == 1
        if is_first:
            with contextlib.suppress(StorageFailing, WriterBusy, WriterStopped):
                self.flush()
        return is_first

    def _add(self, key: tuple[str, str, str], who: Who, action: str, outcome: str, first: str | None) -> int:
        counted = self._counted.setdefault(key, Counted(who, action, outcome, first, self._store.moments()[0]))
        counted.count += 1
        return counted.count

    def flush(self) -> None:
        """Writes what was counted; a minute that goes on is written again into the row that it has."""
        with self._flushing:
            with self._lock:
                now = self._store.moments()[0]
                unwritten = [counted for counted in self._counted.values() if counted.count > counted.written]
                counts = [counted.count for counted in unwritten]
                over = [key for key, counted in self._counted.items() if now - counted.began_at >= MINUTE_SECONDS]
                for key in over:
                    del self._counted[key]
            if unwritten:
                row_ids = self._store.write(_write_counted, list(zip(unwritten, counts, strict=True)))
                for counted, count, row_id in zip(unwritten, counts, row_ids, strict=True):
                    counted.written, counted.row_id = count, row_id

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


def _write_counted(tx: Tx, counts: list[tuple[Counted, int]]) -> list[int]:
    row_ids = []
    for counted, count in counts:
        detail: dict[str, Any] = {"count": count, **({} if counted.first is None else {"first": counted.first})}
        if counted.row_id is None:
            row_ids.append(record(tx, counted.who, counted.action, outcome=counted.outcome, detail=detail))
        else:
            row_ids.append(counted.row_id)
            sql = "UPDATE af_audit SET detail = ? WHERE id = ?"
            tx.execute(sql, (json.dumps(detail, ensure_ascii=False), counted.row_id))
    return row_ids
