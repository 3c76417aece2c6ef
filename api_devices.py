"""How are devices looked at and changed by people, over HTTP? Handlers; their routes are in api.py's table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import devices
import wire
from fleet import MAX_BEATS, PAGE, Fleet
from reads import DEVICE_STATES, Reads
from settings import Settings
from store import Store
from transaction import Tx
from web import Call, invalid
from writer import StorageFailing, WriterBusy, WriterStopped

LONGEST_LIST = 10_000
"""Devices in a list that nobody asked to have by pages."""


class DeviceHandlers:
    """A part of the Api, with what these handlers use."""

    settings: Settings
    store: Store
    reads: Reads
    fleet: Fleet
    presence: devices.Presence
    end_tokens: Callable[[Tx, str], int]

    @property
    def now(self) -> float:
        return self.store.moments()[0]

    # GET /devices?status=&task_type=&tag=&beats=&limit=&cursor= -> 200 {devices, next_cursor}; without limit all
    def list_devices(self, call: Call) -> Any:
        query = call.query
        status = query.choice("status", DEVICE_STATES)
        task_type, tag = query.name("task_type"), query.name("tag")
        beats = query.integer("beats", 0, maximum=MAX_BEATS) or 0
        limit = query.integer("limit", PAGE if beats else LONGEST_LIST, minimum=1, maximum=PAGE) or PAGE
        after = query.name("cursor", "") or ""
        query.finish()

        def is_wanted(device: Mapping[str, Any]) -> bool:
            return (
                status in (None, device["status"])
                and (task_type is None or task_type in device["task_types"])
                and (tag is None or tag in device["tags"])
            )

        self._settle_beats()
        found, next_cursor = self.fleet.page(self.now, is_wanted, limit=limit, after=after)
        if beats:
            for device in found:
                device["beats"] = self.fleet.newest_beats(device["device_id"], beats)
        return {"devices": found, "next_cursor": next_cursor}

    # GET /devices/{device_id} -> 200 the device as in the list, with its newest beats
    def get_device(self, call: Call) -> Any:
        call.query.finish()
        device = self._device(call.names["device_id"])
        return {**device, "beats": self.fleet.newest_beats(device["device_id"], MAX_BEATS)}

    # PUT /devices/{device_id} {device_name} -> 200 the device; null: the name that its worker gives it
    def rename_device(self, call: Call) -> Any:
        name = wire.decode(call.body, wire.DeviceNameIn).device_name
        call.told.update(name=name)
        self.store.write(devices.rename, call.names["device_id"], name)
        return self._device(call.names["device_id"])

    # PUT /devices/{device_id}/status {status, reason?} -> 200 the device
    def set_device_status(self, call: Call) -> Any:
        body = wire.decode(call.body, wire.DeviceStatusIn)
        call.told.update(status=body.status, reason=body.reason)
        device_id = call.names["device_id"]
        self.store.write(devices.set_wanted, device_id, body.status, body.reason)
        return self._device(device_id)

    # DELETE /devices/{device_id} -> 200 {device_id, deleted}
    def delete_device(self, call: Call) -> Any:
        device_id = call.names["device_id"]
        device = self._device(device_id)
        if device["status"] in ("online", "busy", "draining"):
            raise invalid(409, "device_online", f"Device {device_id} is online; stop its worker first.", "device_id")
        if device["assigned_count"]:
            raise invalid(409, "device_holds_tasks", f"Device {device_id} still holds {device['assigned_count']} tasks;"
                          " disable it, which hands them back, and remove it then.", "device_id")  # fmt: skip

        def forget(tx: Tx) -> None:
            devices.forget(tx, self.presence, device_id)
            self.end_tokens(tx, device_id)

        self.store.write(forget)
        return {"device_id": device_id, "deleted": True}

    # GET /devices/{device_id}/stats -> 200 totals, rates, last hour, failures, heartbeats
    def device_stats(self, call: Call) -> Any:
        call.query.finish()
        self._settle_beats()
        found = self.reads.device_stats(call.names["device_id"], self.now, self.settings.device_timeout)
        return found or self._no_device(call.names["device_id"])

    # GET /devices/{device_id}/heartbeats?hours= -> 200 {step_seconds, points}
    def device_heartbeats(self, call: Call) -> Any:
        hours = call.query.hours()
        call.query.finish()
        device = self._device(call.names["device_id"])
        return self.fleet.beats(device["device_id"], self.now, hours)

    def _device(self, device_id: str) -> dict[str, Any]:
        self._settle_beats()
        return self.reads.device(device_id, self.now, self.settings.device_timeout) or self._no_device(device_id)

    def _settle_beats(self) -> None:
        """What is asked for here is as the last beats said; where nothing can be written, as it was before them."""
        if self.presence.unwritten:
            with contextlib.suppress(StorageFailing, WriterBusy, WriterStopped):
                self.store.write(devices.write_beats, self.presence)

    def _no_device(self, device_id: str) -> dict[str, Any]:
        raise invalid(404, "unknown_device", "There is no such device; GET /devices lists them.", "device_id")
