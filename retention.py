"""What is deleted, and in which order? Finished tasks with all that hangs on them, and batches of which none is left.

Small pieces, one a call, because each is a transaction in which nobody else writes. What else becomes idle (lanes, keys
of limits, past starts) is forgotten by its own file.
"""

from __future__ import annotations

from transaction import Tx


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
    return len(rows)


def forget_empty_batches(tx: Tx, created_before: float) -> None:
    """Batches of which no task is kept any more go, with their counters."""
    empty = (
        "SELECT name FROM af_batch WHERE created_at < ? AND NOT EXISTS (SELECT 1 FROM af_crawl_tasks"
        " WHERE af_crawl_tasks.batch = af_batch.name AND af_crawl_tasks.batch <> '') LIMIT 100"
    )
    names = [row[:1] for row in tx.execute(empty, (created_before,)).fetchall()]
    tx.connection.executemany("DELETE FROM af_count WHERE scope = 'batch' AND name = ? AND n = 0", names)
    tx.connection.executemany("DELETE FROM af_batch WHERE name = ?", names)
