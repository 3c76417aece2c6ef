"""How are many tasks looked at and changed together, over HTTP? Handlers; their routes are in api.py's table."""

from __future__ import annotations

from typing import Any

import db
import history
import wire
from progress import Progress
from reads import Reads
from store import Store
from transaction import Tx
from web import Call, invalid

CHUNK = 1000
"""Bulk actions change this many tasks in one transaction."""


class BatchHandlers:
    """A part of the Api, with what these handlers use."""

    store: Store
    reads: Reads
    progress: Progress

    # POST /tasks/actions {action, filter, dry_run, reason?} -> 200 {matched, matched_is_capped, changed}
    def act_on_tasks(self, call: Call) -> Any:
        body = wire.decode(call.body, wire.ActionIn)
        filters = body.filter.filters()
        matched = self.reads.count(filters)
        call.told.update(do=body.action, filter=filters, reason=body.reason, dry_run=body.dry_run)
        changed = 0 if body.dry_run else self._act(body.action, filters, body.reason, call.who.actor)
        call.told.update(changed=changed)
        return {"matched": matched.count, "matched_is_capped": matched.is_capped, "changed": changed}

    def _act(self, action: str, filters: dict[str, Any], reason: str | None, by: str) -> int:
        """Chunk by chunk in the order of ids, up to the newest id there was at the start; each chunk is durable, and
        the history says how far it went."""
        facts: dict[str, Any] = {"filter": filters, "reason": reason, "by": by, "changed": 0}
        history_id = None

        def change(tx: Tx, ids: list[int]) -> tuple[int, int | None]:
            if action == "cancel":
                changed = sum(db.cancel(tx, task_id, reason) is not None for task_id in ids)
            else:
                changed = sum(db.requeue(tx, task_id) is not None for task_id in ids)
            told = {**facts, "changed": facts["changed"] + changed}
            if history_id is not None:
                history.amend(tx, history_id, told)
            elif changed:
                return changed, history.record(tx, "task", f"bulk_{action}", **told)
            return changed, history_id

        after: int | None = 0
        newest = self.reads.highest_id()
        while after is not None and after < newest:
            ids, after = self.reads.ids_matching(filters, after_id=after, limit=CHUNK)
            ids = [task_id for task_id in ids if task_id <= newest]
            if ids:
                changed, history_id = self.store.write(change, ids)
                facts["changed"] += changed
        return int(facts["changed"])

    # GET /batches?name=&limit=&cursor= -> 200 {batches, next_cursor}
    def list_batches(self, call: Call) -> Any:
        name = call.query.text("name", maximum=128)
        limit = call.query.integer("limit", 50, minimum=1, maximum=200) or 50
        cursor = call.query.integer("cursor", None, minimum=1)
        call.query.finish()
        if name is not None:
            found = self.reads.batch(name)
            rated = [self.progress.rated(found, self.store.moments()[0])] if found else []
            return {"batches": rated, "next_cursor": None}
        return self.progress.batches(self.store.moments()[0], limit=limit, cursor=cursor)

    # GET /batches/{name} -> 200 the batch with its rates and what is left
    def get_batch(self, call: Call) -> Any:
        name = wire.check_line(call.names["name"], "name")
        call.query.finish()
        return self.progress.batch(name, self.store.moments()[0]) or self._no_batch()

    # GET /batches/{name}/failures -> 200 {groups: [{error_type, error_message, n, is_more, task_id}], is_partial}
    def batch_failures(self, call: Call) -> Any:
        name = wire.check_line(call.names["name"], "name")
        call.query.finish()
        if self.reads.batch(name) is None:
            self._no_batch()
        return self.progress.failures(name)

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
        return {**reply, "changed": self._act("cancel", unfinished, "its batch was cancelled", call.who.actor)}

    def _set_batch(self, call: Call, state: str) -> dict[str, Any]:
        name = wire.check_line(call.names["name"], "name")
        reason = wire.decode(call.body or b"{}", wire.ReasonIn).reason
        call.told.update(reason=reason)
        if not self.store.write(db.set_batch_state, name, state, reason):
            self._no_batch()
        return {"name": name, "state": state, "changed": 0}

    def _no_batch(self) -> dict[str, Any]:
        raise invalid(404, "unknown_batch", "There is no such batch; GET /batches lists them.", "name")
