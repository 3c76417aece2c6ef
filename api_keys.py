"""How are keys, and what was done with them, looked at and changed over HTTP? Handlers; their routes are in api.py."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import devices
import keys
import wire
from access import Access
from audit import Audit
from dispatcher import Dispatcher
from keys import ADMIN, DEVICE, Key, KeyRefused
from store import Store
from transaction import Tx
from web import Answer, Call, invalid


class KeyHandlers:
    """A part of the Api, with what these handlers use."""

    store: Store
    access: Access
    audit: Audit
    presence: devices.Presence
    dispatcher: Dispatcher

    # GET /keys?role=&device_id=&limit=&cursor= -> 200 {keys, next_cursor}; tokens of devices only where asked for
    def list_keys(self, call: Call) -> Any:
        role, device_id = call.query.choice("role", keys.KEY_ROLES), call.query.name("device_id")
        limit = call.query.integer("limit", 200, minimum=1, maximum=200) or 200
        cursor = call.query.integer("cursor", None, minimum=1)
        call.query.finish()

        def is_wanted(key: Key) -> bool:
            if role is None and device_id is None:
                return key.role != DEVICE
            return role in (None, key.role) and device_id in (None, key.device_id)

        held = self.access.keys.newest_first()
        found = [key for key in held if is_wanted(key) and (cursor is None or key.id < cursor)]
        next_cursor = str(found[limit - 1].id) if len(found) > limit else None
        return {"keys": [keys.as_json(key) for key in found[:limit]], "next_cursor": next_cursor}

    # POST /keys {role, name?, days?, uses?} -> 201 the key's row, and the key itself, this once
    def create_key(self, call: Call) -> Any:
        wanted = wire.decode(call.body, wire.KeyIn)
        if self.access.is_open and wanted.role != ADMIN:
            raise KeyRefused(409, "admin_key_first", keys.ADMIN_FIRST, "role")
        if self.access.is_open and self.presence.online:
            text = (
                f"From the first admin key on everybody needs a key, and devices are at work that have none"
                f" ({len(self.presence.online)}): write an api_key into the config, which python"
                " scripts/init_distribution.py does, start again and make keys then; or stop the devices first."
            )
            raise KeyRefused(409, "devices_without_key", text)
        key, text = self.store.write(
            keys.create, wanted.role, by=call.who.actor, name=wanted.name, days=wanted.days, uses=wanted.uses
        )
        self.access.keys.put(key)
        call.told.update(object=str(key.id), role=key.role, name=key.name, days=wanted.days, uses=key.uses_left)
        return Answer({**keys.as_json(key), "key": text}, 201)

    # DELETE /keys/{key_id} -> 200 the key's row; it opens nothing any more
    def revoke_key(self, call: Call) -> Any:
        number = call.names["key_id"]
        key = self.access.keys.get(keys.CONFIG_KEY_ID if number == "0" else wire.check_id(number, "key_id"))
        if key is None:
            raise invalid(404, "unknown_key", keys.UNKNOWN, "key_id")
        keys.refuse_config_key(key)

        def revoke(tx: Tx) -> None:
            if not self.access.keys.has_config_key:
                keys.refuse_last_admin(tx, key.id)
            if key.device_id is not None and key.id in keys.tokens_of(tx, key.device_id):
                with contextlib.suppress(devices.UnknownDevice):  # its token is older than what removed the device
                    devices.revoke(tx, self.presence, key.device_id, call.who.actor, None)
            self._end(tx, [key.id])

        self.store.write(revoke)
        call.told.update(role=key.role, name=key.name)
        return keys.as_json(key)

    # POST /devices/{device_id}/revoke {reason?} -> 200 {device_id, tokens, tasks}
    def revoke_device(self, call: Call) -> Any:
        device_id = call.names["device_id"]
        reason = wire.decode(call.body or b"{}", wire.ReasonIn).reason

        def revoke(tx: Tx) -> tuple[int, int]:
            tasks = devices.revoke(tx, self.presence, device_id, call.who.actor, reason)
            return self.end_tokens(tx, device_id), tasks

        tokens, tasks = self.store.write(revoke)
        call.told.update(reason=reason, tokens=tokens, tasks=tasks)
        return {"device_id": device_id, "tokens": tokens, "tasks": tasks}

    # GET /audit?actor=&action=&outcome=&since=&until=&limit=&cursor= -> 200 {entries, next_cursor}
    def list_audit(self, call: Call) -> Any:
        query = call.query
        actor, action, outcome = query.text("actor", maximum=128), query.name("action"), query.name("outcome")
        since, until = query.moment("since"), query.moment("until")
        limit = query.integer("limit", 50, minimum=1, maximum=200) or 50
        cursor = query.integer("cursor", None, minimum=1)
        query.finish()
        return self.audit.page(
            actor=actor, action=action, outcome=outcome, since=since, until=until, limit=limit, cursor=cursor
        )

    def end_tokens(self, tx: Tx, device_id: str) -> int:
        """All that a device has; how many."""
        tokens = keys.tokens_of(tx, device_id)
        self._end(tx, tokens)
        return len(tokens)

    def _end(self, tx: Tx, key_ids: Sequence[int]) -> None:
        """They open nothing any more, and what is held open with them gets nothing."""
        keys.revoke(tx, key_ids)
        self.dispatcher.end_keys(key_ids)
