"""What is deleted, and in which order? Finished tasks with all that hangs on them, and batches of which none is left.

Small pieces, one a call, because each is a transaction in which nobody else writes. What else becomes idle (lanes, keys
of limits, past starts) is forgotten by its own file.
"""

from __future__ import annotations

from transaction import WRITER_ID, Tx


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
