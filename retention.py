"""What is deleted, from when on, and in which order? Finished tasks with all that hangs on them, and batches of which
none is left; not in the first hour of a start that finds itself more than a day past all that the database knows, for
its clock may be wrong, and what is deleted does not come back.

Small pieces, one a call, because each is a transaction in which nobody else writes. What else becomes idle (lanes, keys
of limits, past starts) is forgotten by its own file.
"""

from __future__ import annotations

from transaction import WRITER_ID, Tx

GAP_SECONDS = 86400.0
HOLD_SECONDS = 3600.0


def deletes_from(tx: Tx, known_until: float) -> float:
    """After a start, once: from which moment on old things are deleted. A second start does not shorten the wait.

    `known_until`: the last moment that the database had seen before it."""
    row = tx.one("SELECT value FROM af_meta WHERE key = 'deletes_from'")
    moment = float(row[0]) if row else 0.0
    if known_until and tx.now - known_until > GAP_SECONDS:
        moment = tx.now + HOLD_SECONDS
        tx.execute("INSERT OR REPLACE INTO af_meta (key, value) VALUES ('deletes_from', ?)", (repr(moment),))
        tx.note("system", "deletion_waits", gap_seconds=round(tx.now - known_until), wait_seconds=HOLD_SECONDS)
    return moment


def delete_finished(tx: Tx, finished_before: float, limit: int = 500) -> int:
    """Retention: deletes at most `limit` finished tasks that ended before then, with all that hangs on them."""
    rows = tx.execute(
        "SELECT id, task_type, batch, status FROM af_crawl_tasks WHERE finished_at IS NOT NULL AND finished_at < ?"
        " ORDER BY finished_at LIMIT ?",
        (finished_before, limit),
    ).fetchall()
    ids = [(row[0],) for row in rows]
    tx.connection.executemany("DELETE FROM af_task_payload WHERE task_id = ?", ids)
    tx.connection.executemany("DELETE FROM af_task_result WHERE task_id = ?", ids)
    tx.connection.executemany("UPDATE af_artifact SET dropped = 1 WHERE task_id = ? AND dropped = 0", ids)
    tx.connection.executemany("DELETE FROM af_task_assignment WHERE task_id = ?", ids)
    tx.connection.executemany("DELETE FROM af_crawl_tasks WHERE id = ?", ids)
    for _, task_type, batch, status in rows:
        tx.count(task_type, batch, status, -1)
    _forget_empty_batches(tx, {batch for _, _, batch, _ in rows if batch})
    return len(rows)


def _forget_empty_batches(tx: Tx, names: set[str]) -> None:
    """Those of which no task is kept any more go, with their counters, which must have been written before."""
    left = "SELECT 1 FROM af_crawl_tasks WHERE batch = ? AND batch <> '' LIMIT 1"
    empty = [(name,) for name in names if tx.one(left, (name,)) is None]
    if empty:
        tx.flush()
        counters = "DELETE FROM af_count WHERE writer_id = ? AND scope = 'batch' AND name = ?"
        tx.connection.executemany(counters, [(WRITER_ID, *name) for name in empty])
        tx.connection.executemany("DELETE FROM af_batch WHERE name = ?", empty)
        # A pause ends with its batch, also for lanes left of it: a later batch of that name is an open one.
        tx.connection.executemany("UPDATE af_lane SET is_held = 0 WHERE batch = ?", empty)
