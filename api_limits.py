"""How are limits, lanes and pauses looked at and changed over HTTP? Handlers; their routes are in api.py's table."""

from __future__ import annotations

import json
from typing import Any

import lanes
import limits
import wire
from backlog import Backlog
from store import Store
from web import Call, invalid


class LimitHandlers:
    """A part of the Api, with what these handlers use."""

    store: Store
    backlog: Backlog

    # GET /limits -> 200 {limits: [{name, task_type, key, …, keys: [{value, running, held_by, …}]}], moving}
    def get_limits(self, call: Call) -> Any:
        call.query.finish()
        return self._limits()

    def _limits(self) -> dict[str, Any]:
        return {"limits": self.backlog.limits(*self.store.moments()), "moving": self.backlog.moving()}

    # PUT /limits {limits} -> 200 the same as GET: these hold from now on, and no others
    def set_limits(self, call: Call) -> Any:
        wanted = wanted_limits(wire.decode(call.body, wire.LimitsIn))
        call.told.update(names=[limit.name for limit in wanted])
        self.store.write(lanes.set_limits, wanted, call.who.actor)
        self.store.write(lanes.reshape)  # a short queue has moved when this is answered; the scheduler goes on
        return self._limits()

    # POST /limits/{name}/open {value?} -> 200 {name, opened}: what devices had closed goes on now
    def open_limit(self, call: Call) -> Any:
        name = call.names["name"]
        value = wire.decode(call.body or b"{}", wire.OpenLimitIn).value
        call.told.update(value=value)
        opened = self.store.write(
            limits.open_keys, name, None if value is None else json.dumps(value, ensure_ascii=False)
        )
        if opened is None:
            raise invalid(404, "unknown_limit", "There is no such limit; GET /limits lists them.", "name")
        return {"name": name, "opened": opened}

    # GET /lanes?task_type=&limit=&cursor= -> 200 {lanes, next_cursor}
    def list_lanes(self, call: Call) -> Any:
        task_type = call.query.name("task_type")
        limit = call.query.integer("limit", 50, minimum=1, maximum=200) or 50
        cursor = call.query.integer("cursor", None, minimum=1)
        call.query.finish()
        return self.backlog.lanes(task_type=task_type, limit=limit, cursor=cursor)

    # POST /lanes/{lane_id}/pause {reason?} -> 200 {scope, name, paused, reason}
    def pause_lane(self, call: Call) -> Any:
        lane_id = wire.check_id(call.names["lane_id"], "lane_id")
        reason = _reason(call)
        return self._lane(lane_id, self.store.write(lanes.pause_lane, lane_id, reason), reason)

    # POST /lanes/{lane_id}/resume {reason?} -> 200 {scope, name, paused, reason}
    def resume_lane(self, call: Call) -> Any:
        lane_id = wire.check_id(call.names["lane_id"], "lane_id")
        _reason(call)
        return self._lane(lane_id, self.store.write(lanes.resume_lane, lane_id), None, paused=False)

    def _lane(self, lane_id: int, is_known: bool, reason: str | None, *, paused: bool = True) -> dict[str, Any]:
        if not is_known:
            raise invalid(404, "unknown_lane", "There is no such lane; GET /lanes lists them.", "lane_id")
        return {"scope": "lane", "name": str(lane_id), "paused": paused, "reason": reason}

    # POST /task-types/{task_type}/pause {reason?} -> 200 {scope, name, paused, reason}
    def pause_type(self, call: Call) -> Any:
        return self._pause("type", wire.check_name(call.names["task_type"], "task_type"), _reason(call))

    # POST /task-types/{task_type}/resume {reason?} -> 200 {scope, name, paused, reason}
    def resume_type(self, call: Call) -> Any:
        _reason(call)
        return self._resume("type", wire.check_name(call.names["task_type"], "task_type"))

    # POST /system/pause {reason?} -> 200 {scope, name, paused, reason}
    def pause_all(self, call: Call) -> Any:
        return self._pause("all", "", _reason(call))

    # POST /system/resume {reason?} -> 200 {scope, name, paused, reason}
    def resume_all(self, call: Call) -> Any:
        _reason(call)
        return self._resume("all", "")

    def _pause(self, scope: str, name: str, reason: str | None) -> dict[str, Any]:
        self.store.write(lanes.pause, scope, name, reason)
        return {"scope": scope, "name": name or None, "paused": True, "reason": reason}

    def _resume(self, scope: str, name: str) -> dict[str, Any]:
        self.store.write(lanes.resume, scope, name)
        return {"scope": scope, "name": name or None, "paused": False, "reason": None}


def _reason(call: Call) -> str | None:
    reason = wire.decode(call.body or b"{}", wire.ReasonIn).reason
    call.told.update(reason=reason)
    return reason


def wanted_limits(body: wire.LimitsIn) -> list[limits.Limit]:
    """What a request or the config asks for, as limits.py knows it."""
    return [
        limits.Limit(
            0, limit.name, limit.task_type, limit.fields, limit.max_running, limit.max_starts, limit.window_seconds,
            limit.max_starts_per_day,
        )
        for limit in body.limits
    ]  # fmt: skip
