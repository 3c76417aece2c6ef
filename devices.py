"""What is a device, and is it there? Registration, heartbeats, what a person wants of it, and silence.

A device is one row, and one running process of it is one boot_id. What it holds is what its beats say (holding[]); the
attempts in the books are brought in line with that here. A lease has no clock of its own: it ends when its device has
been silent for device_timeout, counted from its last word or from the start of the master, whichever is later.

Every function with a `tx` runs in the writer. `Presence` is memory that a restart may lose: a beat later it is back.

A device that holds nothing says nothing new by its beats: they are taken in memory (`beat_idle`) and written together,
a second later or when somebody asks for them (`write_beats`), so that a thousand idle devices are one commit a second.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import db
import judging
from schema import ACTIVE
from transaction import Note, Tx

BOOT_WINDOW_SECONDS = 300.0
BOOTS_TO_CONFLICT = 3
KEPT_BOOTS = 20
UNCONFIRMED_SECONDS = 30.0
MOST_UNWRITTEN = 10_000
"""Beats that wait in memory; while the database takes none, more of them go to the writer, which says so."""


class UnknownDevice(Exception):
    """No such device: it has to register (again)."""


class Superseded(Exception):
    """A newer process has this device id; this one must stop."""


class DeviceConflict(Exception):
    """Several processes fight over this device id; a person has to decide."""


class Held(NamedTuple):
    """One line of holding[]: phase is queued, running or reporting."""

    assignment_id: int
    lease_id: str
    phase: str
    progress: float | None = None
    message: str | None = None


@dataclass(frozen=True)
class Registration:
    device_id: str
    boot_id: str
    device_name: str
    device_type: str | None = None
    ip_address: str | None = None
    version: str | None = None
    protocol: int | None = None
    task_types: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    max_concurrent_tasks: int = 1
    holding: tuple[Held, ...] = ()


@dataclass(frozen=True)
class Beat:
    """`holding` None: only a sign of life, by somebody who cannot say what the device holds."""

    boot_id: str
    seq: int
    holding: tuple[Held, ...] | None = ()
    is_leaving: bool = False
    cpu_usage: float | None = None
    memory_usage: float | None = None
    disk_usage: float | None = None
    active_tasks: int | None = None
    system_info: str | None = None
    problem: str | None = None
    clock: float | None = None


class Device(NamedTuple):
    """The part of a device's row that decisions need."""

    device_id: str
    wanted: str
    conflict: int
    task_types: str
    tags: str
    weight: float
    max_concurrent_tasks: int
    boot_id: str | None
    recent_boots: str
    heartbeat_seq: int
    last_heartbeat_at: float | None
    cpu_usage: float | None
    memory_usage: float | None


class Registered(NamedTuple):
    created: bool
    keep: list[int]
    cancel: list[int]


class Taken(NamedTuple):
    """What a beat brings: the attempts to stop, and what is wanted of the device. `idle`: its row, if it held nothing
    when the books had seen `changes` changes of devices."""

    cancel: list[int]
    wanted: str
    idle: Device | None = None
    changes: int = 0


class Unwritten(NamedTuple):
    """A beat of an idle device, on its way into the database."""

    device_id: str
    heard: Beat
    now: float
    wall: float
    keep_history: bool


@dataclass
class Presence:
    """Who was heard when, in this process's memory. `watching_since` is the start, or the end of a long pause;
    `expected_count` is how many devices there were before it."""

    watching_since: float
    expected_count: int = 0
    seen: dict[str, float] = field(default_factory=dict)
    online: set[str] = field(default_factory=set)
    has_called_the_roll: bool = False
    last_beat: dict[str, tuple[float, frozenset[int]]] = field(default_factory=dict)
    """device -> when its previous beat came, and which active attempts were missing from it"""
    changes: int = 0
    unwritten: list[Unwritten] = field(default_factory=list)
    _idle: dict[str, Device] = field(default_factory=dict)
    """Devices that hold nothing, as the database knows them"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hear(self, notes: Sequence[Note]) -> None:
        """After a commit, in the writer's thread: what was known of these devices may be wrong now."""
        with self._lock:
            for note in notes:
                device_id = note.facts.get("device")
                if device_id is not None:
                    self.changes += 1
                    self._idle.pop(device_id, None)

    def doubt(self, device_id: str) -> None:
        """The device's row changes: what is known of it here is not to be trusted any more."""
        with self._lock:
            self.changes += 1
            self._idle.pop(device_id, None)

    def remember_idle(self, device_id: str, taken: Taken) -> None:
        """After the commit of its beat: it holds nothing, unless something has changed since that beat was judged."""
        if taken.idle is not None:
            with self._lock:
                if self.changes == taken.changes:
                    self._idle[device_id] = taken.idle

    def idle_device(self, device_id: str, boot_id: str | None) -> Device | None:
        """The device's row, if this process speaks for it and it is known to hold nothing."""
        device = self._idle.get(device_id)
        is_known = device is not None and device.boot_id == boot_id and device_id in self.online
        return device if is_known else None

    def beat_idle(self, device_id: str, heard: Beat, now: float, wall: float, *, keep_history: bool) -> str | None:
        """Takes a beat that changes nothing but the device's figures, without the writer, and returns what is wanted
        of the device; None for every other beat."""
        if heard.is_leaving or heard.holding != ():
            return None
        with self._lock:
            device = self.idle_device(device_id, heard.boot_id)
            if device is None or heard.seq <= device.heartbeat_seq or len(self.unwritten) >= MOST_UNWRITTEN:
                return None
            self._idle[device_id] = device._replace(
                heartbeat_seq=heard.seq, cpu_usage=heard.cpu_usage, memory_usage=heard.memory_usage
            )
            self.unwritten.append(Unwritten(device_id, heard, now, wall, keep_history))
        self.seen[device_id] = now
        return device.wanted

    def take_unwritten(self) -> list[Unwritten]:
        with self._lock:
            taken, self.unwritten = self.unwritten, []
        return taken

    @property
    def device_count(self) -> int:
        """How many devices come back after an outage, as far as this process knows."""
        return max(len(self.seen), self.expected_count)

    def last_seen(self, device_id: str, last_heartbeat_at: float | None) -> float:
        return max(self.seen.get(device_id, 0.0), last_heartbeat_at or 0.0)


_DEVICE_SQL = f"SELECT {', '.join(Device._fields)} FROM af_device WHERE device_id = ?"


def count_devices(tx: Tx) -> int:
    """How many have not said goodbye: as many come back after a start."""
    count: int = tx.one("SELECT count(*) FROM af_device WHERE boot_id IS NOT NULL")[0]
    return count


def get_device(tx: Tx, device_id: str) -> Device | None:
    row = tx.one(_DEVICE_SQL, (device_id,))
    return Device(*row) if row else None


def check_device(tx: Tx, presence: Presence, device_id: str, boot_id: str | None) -> Device:
    """The device, if this process may speak for it; remembers that it was heard.

    Raises UnknownDevice, Superseded or DeviceConflict. A client that sends no boot_id (a simple script) is let through.
    """
    device = get_device(tx, device_id)
    if device is None or (device.boot_id is None and boot_id is not None):
        raise UnknownDevice(f"device {device_id} is not registered; register it first")
    _refuse_conflict(device)
    if boot_id is not None and boot_id != device.boot_id:
        raise Superseded(f"a newer process has taken over device {device_id}; this one must stop")
    _hear(tx, presence, device_id)
    return device


def _refuse_conflict(device: Device) -> None:
    if device.conflict:
        raise DeviceConflict(conflict_sentence(device.device_id))


def conflict_sentence(device_id: str) -> str:
    return (
        f"{BOOTS_TO_CONFLICT} processes took over device {device_id} within five minutes: give each machine its own"
        " device id, then set the device's status to active"
    )


def _hear(tx: Tx, presence: Presence, device_id: str) -> None:
    presence.seen[device_id] = tx.now
    if device_id not in presence.online:
        presence.online.add(device_id)
        tx.note("device", "device_online", device=device_id)


def hear_report(presence: Presence, device_id: str, now: float) -> None:
    """A report is a sign of life too, of a device that is known to be there."""
    if device_id in presence.online:
        presence.seen[device_id] = now


def register(tx: Tx, presence: Presence, new: Registration) -> Registered:
    """Makes or renews a device; a new process's attempts that it does not hold are released at once.

    Raises Superseded (that process was replaced) or DeviceConflict (the third change within five minutes).
    """
    write_beats(tx, presence)
    device = get_device(tx, new.device_id)
    if device is not None:
        _refuse_conflict(device)
    boots = json.loads(device.recent_boots) if device else []
    is_new_boot = device is None or device.boot_id != new.boot_id
    if device is not None and is_new_boot:
        if any(boot == new.boot_id for boot, _, _ in boots):
            raise Superseded(f"a newer process has taken over device {new.device_id}; this one must stop")
        took_over = device.boot_id is not None
        boots = [*boots, (new.boot_id, tx.now, took_over)][-KEPT_BOOTS:]
        recent = [at for _, at, counts in boots if counts and tx.now - at <= BOOT_WINDOW_SECONDS]
        if len(recent) >= BOOTS_TO_CONFLICT:
            _declare_conflict(tx, new.device_id, boots)
            return Registered(False, [], [])
    elif device is None:
        boots = [(new.boot_id, tx.now, False)]
    _store(tx, new, boots)
    presence.doubt(new.device_id)
    _hear(tx, presence, new.device_id)
    if is_new_boot:
        presence.last_beat.pop(new.device_id, None)
        _release_unheld(tx, new.device_id, {(held.assignment_id, held.lease_id) for held in new.holding})
        verb = "device_registered" if device is None else "register"
        tx.note("device", verb, device=new.device_id, version=new.version, address=new.ip_address)
    keep, cancel = _judge_holding(tx, new.device_id, new.holding)
    return Registered(device is None, keep, cancel)


def _declare_conflict(tx: Tx, device_id: str, boots: Sequence[Any]) -> None:
    """Kept, not raised: an exception would undo it. The caller sees it in the device's status."""
    tx.execute(
        "UPDATE af_device SET conflict = 1, recent_boots = ? WHERE device_id = ?", (json.dumps(boots), device_id)
    )
    tx.note("device", "device_conflict", device=device_id)


def _store(tx: Tx, new: Registration, boots: Sequence[Any]) -> None:
    columns = {
        "device_name": new.device_name,
        "device_type": new.device_type,
        "ip_address": new.ip_address,
        "version": new.version,
        "protocol": new.protocol,
        "task_types": json.dumps(sorted(set(new.task_types))),
        "tags": json.dumps(sorted(set(new.tags))),
        "weight": new.weight,
        "max_concurrent_tasks": new.max_concurrent_tasks,
        "boot_id": new.boot_id,
        "recent_boots": json.dumps(boots),
        "problem": None,
        "last_heartbeat_at": tx.now,
    }
    names = ", ".join(columns)
    updates = ", ".join(f"{name} = excluded.{name}" for name in columns)
    tx.execute(
        f"INSERT INTO af_device (device_id, registered_at, {names}) VALUES (?, ?{', ?' * len(columns)})"
        f" ON CONFLICT (device_id) DO UPDATE SET {updates},"
        " heartbeat_seq = CASE WHEN boot_id IS excluded.boot_id THEN heartbeat_seq ELSE 0 END",
        (new.device_id, tx.now, *columns.values()),
    )


def _release_unheld(tx: Tx, device_id: str, held: set[tuple[int, str]]) -> None:
    for attempt in db.active_attempts(tx, device_id):
        if (attempt.id, attempt.lease_id) not in held:
            db.release(tx, attempt, "lost")


def _judge_holding(tx: Tx, device_id: str, holding: Sequence[Held]) -> tuple[list[int], list[int]]:
    """Which held attempts are still the device's (and are started in the books if they run), and which are not."""
    keep: list[int] = []
    cancel: list[int] = []
    for held in holding:
        (keep if _is_still_theirs(tx, device_id, held) else cancel).append(held.assignment_id)
    return keep, cancel


def _is_still_theirs(tx: Tx, device_id: str, held: Held) -> bool:
    attempt = db.get_attempt(tx, held.assignment_id)
    if attempt is None or attempt.lease_id != held.lease_id or attempt.device_id != device_id:
        return False
    if held.phase == "reporting":
        return True  # its report will be judged on its own
    task = db.get_task(tx, attempt.task_id)
    if task is None or task.assignment_id != attempt.id or task.status in db.FINAL:
        return False
    device = get_device(tx, device_id)
    is_adoptable = device is not None and device.wanted != "disabled"
    if held.phase == "running" and attempt.status != "running" and is_adoptable:
        report = db.Report(held.assignment_id, held.lease_id, "running", progress=held.progress)
        return judging.apply_report(tx, device_id, report).outcome == "accepted"
    return attempt.status in ("assigned", "running")


def beat(tx: Tx, presence: Presence, device_id: str, heard: Beat, *, keep_history: bool) -> Taken:
    """Takes one heartbeat.

    Raises UnknownDevice, Superseded or DeviceConflict. A beat that was overtaken by a later one changes nothing, but a
    sign of life (without holding, any seq) always counts as one, and nothing is concluded from it about tasks.
    """
    write_beats(tx, presence)
    device = check_device(tx, presence, device_id, heard.boot_id)
    if heard.seq <= device.heartbeat_seq:
        if heard.holding is None:
            tx.execute("UPDATE af_device SET last_heartbeat_at = ? WHERE device_id = ?", (tx.now, device_id))
            _release_unconfirmed(tx, device_id)
        return Taken([], device.wanted)
    _write_beat(tx, Unwritten(device_id, heard, tx.now, tx.wall, keep_history))
    if heard.is_leaving:
        _say_goodbye(tx, presence, device_id)
        return Taken([], device.wanted)
    if heard.holding is None:
        _release_unconfirmed(tx, device_id)
        return Taken([], device.wanted)
    attempts = db.active_attempts(tx, device_id)
    if not attempts and not heard.holding:
        presence.last_beat[device_id] = (tx.now, frozenset())
        return Taken([], device.wanted, device._replace(heartbeat_seq=heard.seq), presence.changes)
    return Taken(_reconcile(tx, presence, device_id, attempts, heard.holding), device.wanted)


def write_beats(tx: Tx, presence: Presence) -> None:
    """What was taken in memory goes into the database; call it where that must be right."""
    for beat in presence.take_unwritten():
        _write_beat(tx, beat)


def _write_beat(tx: Tx, beat: Unwritten) -> None:
    """The device's figures, and a line of its history. One that another process has taken over is left alone."""
    heard = beat.heard
    skew = None if heard.clock is None else round(heard.clock - beat.wall, 1)
    metrics = (heard.cpu_usage, heard.memory_usage, heard.disk_usage, heard.active_tasks, heard.system_info)
    is_there = tx.execute(
        "UPDATE af_device SET last_heartbeat_at = ?, heartbeat_seq = ?, cpu_usage = ?, memory_usage = ?,"
        " disk_usage = ?, active_tasks = ?, system_info = COALESCE(?, system_info), problem = ?,"
        " clock_skew_seconds = ? WHERE device_id = ? AND boot_id = ?",
        (beat.now, heard.seq, *metrics, heard.problem, skew, beat.device_id, heard.boot_id),
    ).rowcount
    if is_there and beat.keep_history:
        tx.execute(
            "INSERT INTO af_device_heartbeat (device_id, heartbeat_at, cpu_usage, memory_usage, disk_usage,"
            " active_tasks, system_info) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (beat.device_id, beat.now, *metrics),
        )


def _release_unconfirmed(tx: Tx, device_id: str) -> None:
    """A device that gives only a sign of life may stand still for long: what went to it and was not confirmed since
    goes to others."""
    for attempt in db.active_attempts(tx, device_id):
        is_old = attempt.status == "assigned" and attempt.assigned_at < tx.now - UNCONFIRMED_SECONDS
        if is_old and not _was_delivered_before(tx, attempt.id, tx.now):
            db.release(tx, attempt, "lost")


def _reconcile(
    tx: Tx, presence: Presence, device_id: str, attempts: Sequence[db.Attempt], holding: Sequence[Held]
) -> list[int]:
    """Brings the books in line with what the device holds: missing from two beats in a row is released."""
    held = {line.assignment_id: line for line in holding}
    previous_beat_at, missing_before = presence.last_beat.get(device_id, (0.0, frozenset()))
    missing = set()
    for attempt in attempts:
        line = held.get(attempt.id)
        if line is None:
            missing.add(attempt.id)
            if attempt.id in missing_before and _was_delivered_before(tx, attempt.id, previous_beat_at):
                db.release(tx, attempt, "lost")
        elif line.progress is not None:
            tx.execute(
                "UPDATE af_task_assignment SET progress = ?, progress_message = ? WHERE id = ?",
                (line.progress, line.message, attempt.id),
            )
    presence.last_beat[device_id] = (tx.now, frozenset(missing))
    return _judge_holding(tx, device_id, holding)[1]


def _was_delivered_before(tx: Tx, assignment_id: int, moment: float) -> bool:
    row = tx.one("SELECT delivered_at FROM af_task_assignment WHERE id = ?", (assignment_id,))
    return row is not None and row[0] is not None and row[0] < moment


def _say_goodbye(tx: Tx, presence: Presence, device_id: str) -> None:
    """The device stops in good order: offline at once, and its next start is no fight over its id."""
    tx.execute("UPDATE af_device SET boot_id = NULL WHERE device_id = ?", (device_id,))
    for attempt in db.active_attempts(tx, device_id):
        db.release(tx, attempt, "handed_back")
    presence.online.discard(device_id)
    presence.seen.pop(device_id, None)
    presence.last_beat.pop(device_id, None)
    tx.note("device", "device_stopped", device=device_id)


def revoke(tx: Tx, presence: Presence, device_id: str, by: str, reason: str | None) -> int:
    """The device is not trusted any more: what it held goes back to the queue now, and no loss is counted; how many.
    The same process may register again, if it has a key that may: from now on an enroll key, too. Raises
    UnknownDevice."""
    changed = tx.execute("UPDATE af_device SET boot_id = NULL, recent_boots = '[]' WHERE device_id = ?", (device_id,))
    if not changed.rowcount:
        raise UnknownDevice(f"there is no device {device_id}")
    mark_revoked(tx, device_id, by)
    presence.doubt(device_id)
    released = sum(db.release(tx, attempt, "handed_back") is not None for attempt in db.active_attempts(tx, device_id))
    presence.online.discard(device_id)
    presence.seen.pop(device_id, None)
    presence.last_beat.pop(device_id, None)
    tx.note("device", "device_revoked", device=device_id, by=by, reason=reason)
    return released


def mark_revoked(tx: Tx, device_id: str, by: str | None) -> None:
    """By whom, until the device has a token again (None)."""
    tx.execute("UPDATE af_device SET revoked_by = ? WHERE device_id = ?", (by, device_id))


def is_known(tx: Tx, device_id: str) -> bool:
    """Whether this id belongs to a device, with a token or without, that nobody has revoked or removed."""
    sql = "SELECT 1 FROM af_device WHERE device_id = ? AND revoked_by IS NULL"
    return tx.one(sql, (device_id,)) is not None


def release_silent(tx: Tx, presence: Presence, device_timeout: float) -> int:
    """Takes back the tasks of every device that was silent for device_timeout seconds; returns how many.

    Silence that began before the master did counts as nobody's loss: the device may have tried in vain.
    """
    released = 0
    sql = (
        "SELECT device_id, last_heartbeat_at FROM af_device WHERE device_id IN"
        f" (SELECT DISTINCT device_id FROM af_task_assignment WHERE status IN ({ACTIVE}))"
    )
    for device_id, last_heartbeat_at in tx.execute(sql).fetchall():
        last_seen = presence.last_seen(device_id, last_heartbeat_at)
        if tx.now - max(last_seen, presence.watching_since) <= device_timeout:
            continue
        reason = "lost" if last_seen >= presence.watching_since else "silent_since_start"
        for attempt in db.active_attempts(tx, device_id):
            if db.release(tx, attempt, reason):
                released += 1
    if not presence.has_called_the_roll and tx.now - presence.watching_since > device_timeout:
        presence.has_called_the_roll = True
        _miss_absent(tx, presence)
    for device_id in [*presence.online]:
        if tx.now - presence.seen.get(device_id, 0.0) > device_timeout:
            presence.online.discard(device_id)
            tx.note("device", "device_offline", device=device_id, reason=f"silent for over {device_timeout:g} s")
    return released


def _miss_absent(tx: Tx, presence: Presence) -> None:
    """Once after a start: devices that were there before it and have not come back."""
    sql = "SELECT device_id FROM af_device WHERE boot_id IS NOT NULL AND last_heartbeat_at < ?"
    for (device_id,) in tx.execute(sql, (presence.watching_since,)).fetchall():
        if device_id not in presence.seen:
            tx.note("device", "device_offline", device=device_id, reason="not heard since the master started")


def set_wanted(tx: Tx, device_id: str, wanted: str, reason: str | None) -> None:
    """What a person wants of a device: active, draining (finish, take nothing new) or disabled (hand back now).

    Active also ends a conflict. Raises UnknownDevice.
    """
    changed = tx.execute(
        "UPDATE af_device SET wanted = ?, wanted_reason = ?,"
        " conflict = CASE WHEN ? = 'active' THEN 0 ELSE conflict END,"
        " recent_boots = CASE WHEN ? = 'active' AND conflict THEN '[]' ELSE recent_boots END,"
        " boot_id = CASE WHEN ? = 'active' AND conflict THEN NULL ELSE boot_id END WHERE device_id = ?",
        (wanted, reason, wanted, wanted, wanted, device_id),
    )
    if not changed.rowcount:
        raise UnknownDevice(f"there is no device {device_id}")
    if wanted == "disabled":
        for attempt in db.active_attempts(tx, device_id):
            if db.release(tx, attempt, "handed_back"):
                tx.note("device", "cancel_attempt", device=device_id, assignment=attempt.id)
    tx.note("device", "device_wanted", device=device_id, status=wanted, reason=reason)
    tx.wants_dispatch = True


def rename(tx: Tx, device_id: str, name: str | None) -> None:
    """A person's name for a device, which its worker does not undo; None: its worker's again. Raises UnknownDevice."""
    if not tx.execute("UPDATE af_device SET given_name = ? WHERE device_id = ?", (name, device_id)).rowcount:
        raise UnknownDevice(f"there is no device {device_id}")
    tx.note("device", "device_renamed", device=device_id, name=name)


def forget(tx: Tx, presence: Presence, device_id: str) -> None:
    """Removes a device and its heartbeats; its tasks go elsewhere. Raises UnknownDevice."""
    write_beats(tx, presence)
    for attempt in db.active_attempts(tx, device_id):
        db.release(tx, attempt, "device_removed")
    tx.execute("DELETE FROM af_device_heartbeat WHERE device_id = ?", (device_id,))
    if not tx.execute("DELETE FROM af_device WHERE device_id = ?", (device_id,)).rowcount:
        raise UnknownDevice(f"there is no device {device_id}")
    presence.online.discard(device_id)
    presence.seen.pop(device_id, None)
    presence.last_beat.pop(device_id, None)
    tx.note("device", "device_removed", device=device_id)
