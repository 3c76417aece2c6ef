"""Who holds which key, and is it the one that was sent?

A key is `afk_{id}_{secret}`, the secret 192 random bits. It is shown once; kept is its sha256. `Keys` has all of them
in memory, so that a request asks no database; the functions with a `tx` run in the writer, and their caller tells
`Keys` once it is durable. The config's `api_key` is an admin key with the id 0, which no table knows.

Once an admin key was made, a database wants keys for ever, whatever becomes of that key: a row of af_meta says so.

Which role may do what is no matter of this file: that is in access.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reads import iso
from schema import KEY_ROLES
from store import Store
from transaction import Note, Tx

VIEWER, SUBMITTER, OPERATOR, ADMIN, ENROLL, DEVICE = KEY_ROLES
CONFIG_KEY_ID = 0
CONFIG_KEY_NAME = "api_key"
ADMIN_FIRST = "Make an admin key first: until there is one, everybody on this machine may do everything without a key."
LAST_ADMIN = "This is the only admin key: make another one first."
CONFIGURED = (
    "This is the api_key of the master's configuration: take it out there (or out of AF_API_KEY) and start the master"
    " again."
)
UNKNOWN = "There is no such key; GET /keys, or python master.py --list-keys, lists them."
ENROLL_DAYS, ENROLL_USES = 7, 1
"""What an enroll key gets when nobody says: one device, within a week."""
TOKENS_OF_A_LOST_REPLY = 5
"""So many tokens an enroll key gives one device whose registrations are answered and which uses none of them."""
DAY_SECONDS = 86_400.0
USES_A_WRITE = 1_000
"""Last uses are written in pieces of so many rows, in between which others write."""

_TEXT = re.compile(rb"afk_([0-9]{1,18})_")
_NOBODY = bytes(32)
_RESERVED = re.compile(rf"{CONFIG_KEY_NAME}|command line|({'|'.join(KEY_ROLES)})-[0-9]+", re.IGNORECASE)
"""What the audit log calls others, and keys that nobody gave a name."""
_WANTED = "keys_wanted"


class KeyRefused(Exception):
    """What was asked of the keys cannot be; the text says what to do instead."""

    def __init__(self, status: int, code: str, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.field = status, code, detail, field
        self.headers: dict[str, str] = {}


@dataclass(slots=True)
class Key:
    """One key, without its secret; moments in seconds since the epoch."""

    id: int
    name: str
    role: str
    digest: bytes
    device_id: str | None
    created_at: float
    created_by: str
    expires_at: float | None = None
    uses_left: int | None = None
    last_used_at: float | None = None
    last_used_from: str | None = None
    revoked_at: float | None = None
    giver_id: int | None = None

    def has_ended(self, now: float) -> bool:
        """Revoked, or expired."""
        return self.revoked_at is not None or (self.expires_at is not None and self.expires_at <= now)


COLUMNS = tuple(field.name for field in dataclasses.fields(Key))


class Keys:
    """All keys, in memory. One is changed here after the change is durable, by the thread that asked for it."""

    def __init__(self, config_key: str = "") -> None:
        text = config_key.encode()
        self._config = (
            Key(CONFIG_KEY_ID, CONFIG_KEY_NAME, ADMIN, hashlib.sha256(text).digest(), None, 0.0, "the configuration")
            if text
            else None
        )
        self._by_id: dict[int, Key] = {}
        self.are_wanted = self._config is not None
        """Whether nobody comes in without a key: one is configured, or an admin key was made here once."""
        self.keep_first_use: Callable[[Key], object] | None = None
        """Writes down at once that a device uses its token, so that no crash makes it one that never arrived."""
        self._used: set[int] = set()
        self._lock = threading.Lock()

    @property
    def has_config_key(self) -> bool:
        return self._config is not None

    def load(self, store: Store) -> None:
        """All keys of the database, at the start."""
        found, are_wanted = store.write(_load)
        self.put(*found)
        self.are_wanted = self.are_wanted or are_wanted

    def has_admin(self, now: float) -> bool:
        """Whether an admin can come in."""
        with self._lock:
            held = [*self._by_id.values()]
        return self.has_config_key or any(key.role == ADMIN and not key.has_ended(now) for key in held)

    def put(self, *keys: Key) -> None:
        with self._lock:
            for key in keys:
                self._by_id[key.id] = key
                self.are_wanted = self.are_wanted or key.role == ADMIN

    def hear(self, notes: Sequence[Note]) -> None:
        """After a commit, in the writer's thread: before anybody else hears of it, a revoked key opens nothing."""
        for note in notes:
            if note.verb in ("key_revoked", "key_used"):
                with self._lock:
                    key = self._by_id.get(note.facts["key"])
                    if key is not None and note.verb == "key_used":
                        key.uses_left = note.facts["uses_left"]
                    elif key is not None:
                        key.revoked_at = note.facts["at"]

    def get(self, key_id: int) -> Key | None:
        return self._config if key_id == CONFIG_KEY_ID else self._by_id.get(key_id)

    def newest_first(self) -> list[Key]:
        with self._lock:
            return sorted(self._by_id.values(), key=lambda key: -key.id)

    def find(self, text: bytes) -> Key | None:
        """The key of this text, revoked or expired ones too. What is compared are digests of equal length, as often for
        an id that nobody has as for one that somebody has, so the time tells nothing."""
        given = hashlib.sha256(text).digest()
        said = _TEXT.match(text)
        key = self._by_id.get(int(said[1])) if said else None
        is_right = hmac.compare_digest(given, _NOBODY if key is None else key.digest)
        is_config = hmac.compare_digest(given, _NOBODY if self._config is None else self._config.digest)
        if is_config:
            return self._config
        return key if is_right else None

    def note_use(self, key: Key, now: float, address: str) -> None:
        """In memory; `write_uses` brings it into the table, once a minute and at the stop. Raises what a write raises
        where a token is used for the first time."""
        is_first = key.last_used_at is None
        key.last_used_at, key.last_used_from = now, address
        self._used.add(key.id)
        if is_first and key.role == DEVICE and self.keep_first_use is not None:
            self.keep_first_use(key)

    def write_uses(self, store: Store) -> None:
        """Brings the newest uses into the table."""
        with self._lock:
            used, self._used = self._used, set()
            # A copy, in one step: somebody may be about to add to it.
            keys = [self._by_id[key_id] for key_id in [*used] if key_id in self._by_id]
        for start in range(0, len(keys), USES_A_WRITE):
            store.write(write_uses, keys[start : start + USES_A_WRITE])


def as_json(key: Key) -> dict[str, Any]:
    """What may be told of it."""
    told = {name: getattr(key, name) for name in COLUMNS if name not in ("digest", "giver_id")}
    return {name: iso(value) if name.endswith("_at") else value for name, value in told.items()}


def has_admin(path: Path) -> bool:
    """Whether a database, which nobody need have opened yet, has an admin key that was not revoked."""
    sql = f"SELECT 1 FROM af_key WHERE role = '{ADMIN}' AND revoked_at IS NULL"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchone() is not None
    except sqlite3.Error:  # there is none, it is older than keys, or it will be refused in a moment
        return False


# ---- in the writer ----


def _load(tx: Tx) -> tuple[list[Key], bool]:
    """All keys, and whether they are wanted."""
    rows = tx.execute(f"SELECT {', '.join(COLUMNS)} FROM af_key").fetchall()
    are_wanted = tx.one("SELECT 1 FROM af_meta WHERE key = ?", (_WANTED,)) is not None
    return [_of_row(row) for row in rows], are_wanted


def _of_row(row: Any) -> Key:
    fields = dict(zip(COLUMNS, row, strict=True))
    return Key(**{**fields, "digest": bytes.fromhex(fields["digest"])})


def create(
    tx: Tx, role: str, *, by: str, name: str | None = None, days: int | None = None, uses: int | None = None,
    device_id: str | None = None, giver_id: int | None = None,
) -> tuple[Key, str]:  # fmt: skip
    """A new key, and its text, which is nowhere else. An enroll key ends after some days and some uses. Raises
    KeyRefused for a name that would make somebody take it for another."""
    if name is not None and role != DEVICE:
        _refuse_name(tx, name)
    if role == ADMIN:
        tx.execute("INSERT OR IGNORE INTO af_meta (key, value) VALUES (?, ?)", (_WANTED, repr(tx.now)))
    if role == ENROLL:
        days, uses = days or ENROLL_DAYS, uses or ENROLL_USES
    expires_at = None if days is None else tx.now + days * DAY_SECONDS
    sql = (
        "INSERT INTO af_key (name, role, digest, device_id, created_at, created_by, expires_at, uses_left,"
        " giver_id) VALUES (?, ?, '', ?, ?, ?, ?, ?, ?)"
    )
    key_id = tx.execute(sql, (name or "", role, device_id, tx.now, by, expires_at, uses, giver_id)).lastrowid
    assert key_id is not None
    text = f"afk_{key_id}_{secrets.token_urlsafe(24)}"
    digest = hashlib.sha256(text.encode()).digest()
    name = name or f"{role}-{key_id}"
    tx.execute("UPDATE af_key SET name = ?, digest = ? WHERE id = ?", (name, digest.hex(), key_id))
    tx.note("access", "key_created", key=key_id, role=role, name=name, by=by)
    return Key(key_id, name, role, digest, device_id, tx.now, by, expires_at, uses, giver_id=giver_id), text


def _refuse_name(tx: Tx, name: str) -> None:
    if _RESERVED.fullmatch(name):
        raise KeyRefused(422, "name_reserved", f"No key may be called {name}: choose another name.", "name")
    sql = (
        f"SELECT 1 FROM af_key WHERE name = ? AND role <> '{DEVICE}' AND revoked_at IS NULL"
        " AND (expires_at IS NULL OR expires_at > ?)"
    )
    if tx.one(sql, (name, tx.now)) is not None:
        text = f"Another key is called {name}, and the audit log tells keys by their names: choose another name."
        raise KeyRefused(409, "name_taken", text, "name")


def refuse_config_key(key: Key) -> None:
    """Raises KeyRefused for the one that no table knows."""
    if key.id == CONFIG_KEY_ID:
        raise KeyRefused(422, "invalid_field", CONFIGURED, "key_id")


def refuse_last_admin(tx: Tx, key_id: int) -> None:
    """Raises KeyRefused if no admin could come in without this key; in the transaction in which it is to be revoked, or
    the last two could end each other at the same time."""
    sql = (
        f"SELECT 1 FROM af_key WHERE id = ? AND role = '{ADMIN}' AND revoked_at IS NULL AND NOT EXISTS (SELECT 1"
        f" FROM af_key WHERE role = '{ADMIN}' AND id <> ? AND revoked_at IS NULL"
        " AND (expires_at IS NULL OR expires_at > ?))"
    )
    if tx.one(sql, (key_id, key_id, tx.now)) is not None:
        raise KeyRefused(409, "last_admin_key", LAST_ADMIN, "key_id")


def revoke(tx: Tx, key_ids: Sequence[int]) -> None:
    """From now on these open nothing."""
    for key_id in key_ids:
        changed = tx.execute("UPDATE af_key SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (tx.now, key_id))
        if changed.rowcount:
            tx.note("access", "key_revoked", key=key_id, at=tx.now)


def tokens_of(tx: Tx, device_id: str) -> list[int]:
    """The ids of a device's tokens that are not revoked."""
    rows = tx.execute("SELECT id FROM af_key WHERE device_id = ? AND revoked_at IS NULL", (device_id,))
    return [key_id for (key_id,) in rows.fetchall()]


def refuse_known(tx: Tx, held: Keys, giver: Key, device_id: str, *, is_known: bool) -> None:
    """Before anything of a registration is done: raises KeyRefused if this enroll key may not register that device.

    It may not take over one that is known, but for a device that has only unused tokens of its own giving: then the
    reply got lost. A device that was revoked or removed is not known.
    """
    row = tx.one("SELECT uses_left FROM af_key WHERE id = ? AND revoked_at IS NULL", (giver.id,))
    if is_known and not _got_lost(tx, held, giver, device_id):
        text = (
            f"Device {device_id} is known already. If it lost its token, or another machine is to have its name, an"
            f" operator revokes the old one first: POST /devices/{device_id}/revoke."
        )
        raise KeyRefused(403, "device_known", text, "device_id")
    if row is None or not (row[0] or is_known):
        advice = "make another one on the master: python master.py --create-key enroll"
        text = f"The enroll key {giver.name} has registered all the devices that it was for; {advice}"
        raise KeyRefused(403, "enroll_key_used_up", text)


def give_token(tx: Tx, giver: Key, device_id: str, *, is_known: bool) -> tuple[Key, str]:
    """A token for a device that registers with an admin key, or with an enroll key that may (`refuse_known`); those it
    had before are to be revoked."""
    if giver.role == ENROLL and not is_known:
        tx.execute("UPDATE af_key SET uses_left = uses_left - 1 WHERE id = ?", (giver.id,))
        uses_left = tx.one("SELECT uses_left FROM af_key WHERE id = ?", (giver.id,))[0]
        tx.note("access", "key_used", key=giver.id, uses_left=uses_left)
    return create(tx, DEVICE, by=giver.name, name=device_id, device_id=device_id, giver_id=giver.id)


def _got_lost(tx: Tx, held: Keys, giver: Key, device_id: str) -> bool:
    tokens = [held.get(token) for token in tokens_of(tx, device_id)]
    if not tokens or any(one is None or one.giver_id != giver.id or one.last_used_at is not None for one in tokens):
        return False
    sql = "SELECT count(*) FROM af_key WHERE device_id = ? AND giver_id = ?"
    given: int = tx.one(sql, (device_id, giver.id))[0]
    return given < TOKENS_OF_A_LOST_REPLY


def write_uses(tx: Tx, keys: Sequence[Key]) -> None:
    tx.connection.executemany(
        "UPDATE af_key SET last_used_at = ?, last_used_from = ? WHERE id = ?",
        [(key.last_used_at, key.last_used_from, key.id) for key in keys],
    )


def forget_ended(tx: Tx, before: float, limit: int) -> int:
    """Deletes at most `limit` keys that were revoked or expired before then; how many. `Keys` knows them until the next
    start, and takes them as little as before."""
    sql = "SELECT id FROM af_key WHERE revoked_at < ? OR expires_at < ? LIMIT ?"
    return tx.execute(f"DELETE FROM af_key WHERE id IN ({sql})", (before, before, limit)).rowcount
