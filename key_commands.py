"""How are keys made, listed and revoked on the command line?

    python master.py --create-key ROLE [--name NAME] [--days N] [--uses N]
    python master.py --list-keys
    python master.py --revoke-key ID

While no master runs, the database is opened for a moment; else the running one is asked over loopback, with the
configured api_key (or an admin key in AF_API_KEY). A new key is all that goes to standard output, so that
`python master.py --create-key enroll > key` is the key and nothing else; everything about it goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import audit
import devices
import keys
import wire
from access import ROLES
from audit import COMMAND
from client import CommandFailed, Master, master_address
from clock import Clock
from settings import ExitCode, Settings
from store import DatabaseInUse, Store, last_moment, lock_database, refuse_missing
from transaction import Policy, Tx

KEY_IS_NEEDED = (
    "From now on nobody comes in without a key: the commands and the standalone of this machine take theirs from"
    " AF_API_KEY, or from api_key in their config."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    roles = ", ".join(role for role in ROLES if role != keys.DEVICE)
    parser.add_argument("--create-key", metavar="ROLE", help=f"make a key ({roles}); then end")
    parser.add_argument("--name", help="of the key to make")
    parser.add_argument("--days", type=int, help="after which the key ends; an enroll key after 7 unless said")
    parser.add_argument("--uses", type=int, help="how many devices the enroll key may register, 1 unless said")
    parser.add_argument("--list-keys", action="store_true", help="list the keys, without the keys themselves; then end")
    parser.add_argument("--revoke-key", metavar="ID", type=int, help="revoke a key, at once; then end")


def is_wanted(options: argparse.Namespace) -> bool:
    return bool(options.create_key or options.list_keys or options.revoke_key is not None)


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Does what the options say; its exit code. Raises DatabaseRefused and its kin, but for one in use."""
    path = Path(settings.database)
    if not options.create_key:
        refuse_missing(path)
    try:
        try:
            with lock_database(path):
                if not path.exists():
                    print(f"there was no database at {path}: a new one is made", file=sys.stderr)
                return _in_the_file(settings, path, options)
        except DatabaseInUse:
            return _by_the_master(settings, options)
    except (CommandFailed, keys.KeyRefused, wire.Invalid) as error:
        print(f"master: {error}", file=sys.stderr)
        return getattr(error, "exit_code", ExitCode.SETTINGS)


def _in_the_file(settings: Settings, path: Path, options: argparse.Namespace) -> int:
    store = Store(path, policy=Policy(), moments=Clock(not_before=last_moment(path)).moments)
    store.open()
    try:
        held = keys.Keys(settings.api_key)
        held.load(store)
        if options.create_key:
            wanted = wire.decode(_wanted(options), wire.KeyIn)
            if wanted.role != keys.ADMIN and not held.are_wanted:
                raise keys.KeyRefused(409, "admin_key_first", keys.ADMIN_FIRST)
            key, text = store.write(_create, wanted)
            _show_new(settings, keys.as_json(key), text)
        elif options.revoke_key is not None:
            revoked = held.get(options.revoke_key)
            if revoked is None:
                raise keys.KeyRefused(404, "unknown_key", keys.UNKNOWN)
            store.write(_revoke, held, revoked)
            print(f"key {options.revoke_key} is revoked", file=sys.stderr)
        else:
            _show_list([keys.as_json(key) for key in held.newest_first() if key.role != keys.DEVICE])
    finally:
        store.close()
    return ExitCode.OK


def _wanted(options: argparse.Namespace) -> bytes:
    """As POST /keys takes it."""
    wanted = {"role": options.create_key, "name": options.name, "days": options.days, "uses": options.uses}
    return json.dumps({name: value for name, value in wanted.items() if value is not None}).encode()


def _create(tx: Tx, wanted: wire.KeyIn) -> tuple[keys.Key, str]:
    key, text = keys.create(tx, wanted.role, by=COMMAND.name, name=wanted.name, days=wanted.days, uses=wanted.uses)
    audit.record(tx, COMMAND, "create_key", object=str(key.id), detail={"role": key.role, "name": key.name})
    return key, text


def _revoke(tx: Tx, held: keys.Keys, key: keys.Key) -> None:
    keys.refuse_config_key(key)
    if not held.has_config_key:
        keys.refuse_last_admin(tx, key.id)
    if key.device_id is not None:
        devices.mark_revoked(tx, key.device_id, COMMAND.name)
    keys.revoke(tx, [key.id])
    audit.record(tx, COMMAND, "revoke_key", object=str(key.id), detail={})


def _by_the_master(settings: Settings, options: argparse.Namespace) -> int:
    master = Master(master_address(settings, options), settings.api_key, trust=settings, attempts=1)
    if options.create_key:
        made = master.post("/keys", _wanted(options))
        _show_new(settings, made, made["key"])
    elif options.revoke_key is not None:
        master.delete(f"/keys/{options.revoke_key}")
        print(f"key {options.revoke_key} is revoked", file=sys.stderr)
    else:
        page = master.get("/keys")
        found = page["keys"]
        while page["next_cursor"]:
            page = master.get("/keys", cursor=page["next_cursor"])
            found += page["keys"]
        _show_list(found)
    return ExitCode.OK


def _show_new(settings: Settings, key: dict[str, Any], text: str) -> None:
    if key["role"] == keys.ADMIN and not settings.api_key:
        print(KEY_IS_NEEDED, file=sys.stderr)
    ends = f", ends {key['expires_at']}" if key["expires_at"] else ""
    uses = f", registers {key['uses_left']} device{'s' * (key['uses_left'] != 1)}" if key["uses_left"] else ""
    print(f"key {key['id']}, {key['role']}, name {key['name']}{ends}{uses}. It is shown this once:", file=sys.stderr)
    print(text)


def _show_list(found: list[dict[str, Any]]) -> None:
    for key in found:
        facts = ("created_at", "expires_at", "uses_left", "last_used_at", "last_used_from", "revoked_at")
        told = " ".join(f"{name}={key[name]}" for name in facts if key[name] is not None)
        print(f"{key['id']} {key['role']} {key['name']} {told}")
