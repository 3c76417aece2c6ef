"""Which knobs exist, with which default and unit?

One table: the fields of Settings. Each key stands there once, with default, unit, range, the modes that use it and one
sentence; the checker, the flags, --show-config and the documents read it. A value comes from, in this order, a flag
(--port 8000), the environment (AF_PORT=8000; an empty variable counts as not set), the config file
(config/distribution_<mode>.json), the default. What is wrong stops the start with one line that says what to write.

It must not import anything of ours, start anything, or print a secret. It runs on Python 3.9 with the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import ipaddress
import json
import logging
import logging.handlers
import os
import re
import ssl
import sys
import time
import urllib.parse
from enum import IntEnum
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Callable, Collection, Iterator, Mapping, NoReturn, Sequence, Union, cast

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION = "0.1.0"
PROTOCOL = 1


def _project_folder() -> Path:
    """The folder of this file; inside an archive (worker.pyz) the folder that the archive lies in."""
    folder = Path(__file__).resolve().parent
    return folder.parent if folder.is_file() else folder


ROOT = _project_folder()

MODES = ("master", "worker", "standalone")
STRATEGIES = ("least_tasks", "round_robin", "weighted", "random")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Printed in the guide or in many a tutorial: whoever scans the network tries these first.
EXAMPLE_KEYS = ("your-secure-api-key-here", "your-api-key", "changeme", "change-me", "admin", "default_token", "secret")
PLAIN_HTTP = (
    "http:// goes through networks of others, who could read the key and the tasks; write https://, or insecure_http:"
    " true where something else encrypts the way, such as a VPN"
)
WANTS_TLS = "that port wants TLS; write https:// instead of http://"
TLS_ALERT = repr("\x15\x03")[1:-1]
"""In what is said of an answer that is no HTTP: how a server that wants TLS refuses everything else."""
LONGEST_TEXT = 4096
LARGEST_FILE_BYTES = 1024 * 1024

Value = Union[str, int, float, bool, "tuple[str, ...]", "dict[str, str]", "tuple[dict[str, Any], ...]"]


class ExitCode(IntEnum):
    """How a program of ours ends; a service manager and the tests read it."""

    OK = 0
    UNREACHABLE = 1
    SETTINGS = 2
    CONFLICT = 3
    DATABASE_BAD = 4
    DATABASE_IN_USE = 5
    DATABASE_NEWER = 6
    PORT_IN_USE = 7
    REFUSED = 8
    DISK_FULL = 9
    NETWORK_FILESYSTEM = 10


class SettingsError(ValueError):
    """One line: where it stands (file, AF_ variable or flag), the key, its value, and what to write instead."""

    def __init__(self, where: str, key: str, value: object, advice: str) -> None:
        self.where, self.key, self.advice = where, key, advice
        shown = "" if value is None else f" = {_shown(key, value)}"
        super().__init__(f"{where}: {key}{shown}: {advice}" if key else f"{where}: {advice}")


OPEN_TO_ALL = (
    "every machine could give orders here; run python scripts/init_distribution.py, set AF_API_KEY, or make a key:"
    " python master.py --create-key admin"
)


# ---- what a single value must look like: each check answers None, or what to write ----


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`; a name other than localhost counts as open."""
    bare = host.strip("[]")
    if bare.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


_PRIVATE = tuple(
    ipaddress.ip_network(network)
    for network in ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "::1/128",
                    "fc00::/7", "fe80::/10")
)  # fmt: skip


def is_private(address: str) -> bool:
    """Whether it is an address of this machine or of a network of one's own, which no router of the internet passes on.
    A provider's shared 100.64.0.0/10 is none; False also for what is no address."""
    try:
        found = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return False
    found = (found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None) or found
    return any(found.version == network.version and found in network for network in _PRIVATE)


def _check_device_id(value: str) -> str | None:
    if value and not re.fullmatch(r"[\w.\-]{1,64}", value, re.ASCII):
        return "write 1 to 64 of the letters a-z A-Z, digits, . _ and -, for instance shop-7"
    return None


def _check_device_name(value: str) -> str | None:
    return "write at most 128 characters" if len(value) > 128 else None


def _check_host(value: str) -> str | None:
    if _is_address(value):
        return None
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.\-]{0,252})", value) and not re.fullmatch(r"[0-9.]+", value):
        return None
    return "write an address or a host name without scheme and port, for instance 127.0.0.1 or 0.0.0.0"


def _check_master_url(value: str) -> str | None:
    advice = "write http://HOST:PORT or https://HOST:PORT, without user, password or path, for instance {}"
    advice = advice.format("http://192.168.1.10:8000")
    try:
        parts = urllib.parse.urlsplit(value)
        port = parts.port
    except ValueError:
        return advice
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"\s", value):
        return advice
    if "@" in parts.netloc or parts.path not in ("", "/") or "?" in value or "#" in value:
        return advice
    return None


def _check_strategy(value: str) -> str | None:
    if value in STRATEGIES or re.fullmatch(r"[A-Za-z_][\w.]{0,127}:[A-Za-z_]\w{0,127}", value, re.ASCII):
        return None
    return f"write {', '.join(STRATEGIES)}, or module:name for one of your own{_did_you_mean(value, STRATEGIES)}"


def _check_api_key(value: str) -> str | None:
    if value and not re.fullmatch(r"[\x21-\x7e]+", value):
        return "write ASCII letters, digits and signs without spaces; python scripts/init_distribution.py makes a key"
    if value.lower() in EXAMPLE_KEYS:
        return "this is an example that everybody knows; python scripts/init_distribution.py makes a random key"
    return None


def _check_tags(value: tuple[str, ...]) -> str | None:
    if len(value) <= 64 and all(re.fullmatch(r"[\w.\-]{1,64}", tag, re.ASCII) for tag in value):
        return None
    return "write at most 64 tags of 1 to 64 of a-z A-Z 0-9 . _ and -, for instance selectors"


def _check_allowed_hosts(value: tuple[str, ...]) -> str | None:
    if all(re.fullmatch(r"[A-Za-z0-9.\-]+(:[0-9]+)?|\[[0-9a-fA-F:.]+\](:[0-9]+)?", host) for host in value):
        return None
    return "write host names as a browser's address line has them, for instance crawl.example.org"


def _check_credentials(value: dict[str, str]) -> str | None:
    for name, token in value.items():
        if not 1 <= len(name) <= 128 or not name.isprintable():
            return "write names of 1 to 128 characters, as the tasks say them in username"
        if not re.fullmatch(r"[\x21-\x7e]{8,8192}", token):
            return f"the token of {_shown('', name)} must be 8 to 8192 ASCII letters, digits and signs without spaces"
        if token.lower().startswith(("your-", "<")) or token.lower() in EXAMPLE_KEYS:
            return f"the token of {_shown('', name)} is an example; write the one that its service gave you"
    return None


def _check_appsflyer_url(value: str) -> str | None:
    if _check_master_url(value):
        return "write https://HOST, without user, password or path, for instance https://hq1.appsflyer.com"
    parts = urllib.parse.urlsplit(value)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        return "write https://; without it everybody on the way could read the tokens (http:// only to this machine)"
    return None


def _check_user_agent(value: str) -> str | None:
    if re.fullmatch(r"[\x21-\x7e][\x20-\x7e]{0,255}", value):
        return None
    return "write a name, a version and where to complain, for instance shop-crawler/1.0 (+https://example.org/bot)"


def _check_networks(value: tuple[str, ...]) -> str | None:
    try:
        for network in value:
            ipaddress.ip_network(network)
    except ValueError as error:
        return f'{one_line(str(error))}: write networks such as "192.168.1.0/24", "127.0.0.0/8" or "fd00:1::/64"'
    return None


def _check_proxy(value: str) -> str | None:
    advice = "write http://HOST:PORT or https://HOST:PORT, with USER:PASSWORD@ before the host where it asks for them"
    try:
        parts = urllib.parse.urlsplit(value)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return advice
    plain = is_good and parts.path in ("", "/") and not re.search(r"[^\x21-\x7e]|[?#]", value)
    return None if not value or plain else advice


def _check_not_empty(value: str) -> str | None:
    return None if value else "write a path; a relative one starts at the project's folder"


def _check_time_of_day(value: str) -> str | None:
    good = re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", value, re.ASCII)
    return None if good else "write hours and minutes, for instance 03:30"


def _check_paths(value: tuple[str, ...]) -> str | None:
    return None if all(value) else "write paths of Python files; a relative one starts at the project's folder"


def _check_limits(value: tuple[dict[str, Any], ...]) -> str | None:
    """Only the outline: what a limit may say is checked by the master, as for PUT /limits."""
    if len(value) <= 100 and all(isinstance(limit.get("name"), str) for limit in value):
        return None
    return 'write at most 100 objects, each with a name, for instance {"name": "account", "key": "username"}'


# Without numbers: accounts and sites take turns, and a device that is told to stay away says so for all.
DEFAULT_LIMITS = (
    {"name": "account", "key": "username"},
    {"name": "site", "task_type": "crawl", "key": "task_data.host"},
)


# ---- the table ----


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known about one key; `modes` are the programs that use it and whose config files may carry it."""

    name: str
    type: str  # str, int, float, bool, tuple[str, ...], dict[str, str] or tuple[dict[str, Any], ...]
    default: Value
    unit: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    modes: tuple[str, ...]
    secret: bool
    is_path: bool
    check: Callable[[Any], str | None] | None
    sentence: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "AF_" + self.name.upper()


_ON_MASTER = ("master", "standalone")
_ON_DEVICE = ("worker", "standalone")


def _key(default: Value, sentence: str, unit: str = "", **more: Any) -> Any:
    """One row of the table; `more` holds minimum, maximum, choices, modes, secret, is_path and check."""
    metadata = {"sentence": sentence, "unit": unit, **more}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), repr=False, metadata=metadata)
    return dataclasses.field(default=default, repr=not more.get("secret", False), metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The effective values, one attribute a key. The guide's keys come first, and every config file has them."""

    mode: str = _key("standalone", "Which program this file is for.", choices=MODES)
    device_id: str = _key("", "The device's name for the master, unique in the fleet.", check=_check_device_id)
    device_name: str = _key("", "What people read; the device_id where it is empty.", check=_check_device_name)
    host: str = _key("127.0.0.1", "Where the master listens; 0.0.0.0 is every network.", check=_check_host)
    port: int = _key(8000, "The master's port; 0 takes a free one.", "TCP port", minimum=0, maximum=65535)
    master_url: str = _key("http://127.0.0.1:8000", "Where a device finds its master.", check=_check_master_url)
    concurrent_tasks: int = _key(3, "How many tasks a device runs at once.", "tasks", minimum=1, maximum=256)
    task_timeout: float = _key(
        3600, "How long a task may run unless it says so itself.", "seconds", minimum=0.1, maximum=604800
    )
    max_retry_count: int = _key(
        3, "How often a failed task is tried again unless it says so itself.", "retries", minimum=0, maximum=100
    )
    dispatch_interval: float = _key(
        10, "How often dispatch looks again although nothing happened.", "seconds", minimum=0.05, maximum=3600
    )
    load_balance_strategy: str = _key(
        "least_tasks", f"Which device gets a task: {', '.join(STRATEGIES)} or module:name.", check=_check_strategy
    )
    heartbeat_interval: float = _key(30, "How often a device reports.", "seconds", minimum=0.1, maximum=3600)
    timeout_check_interval: float = _key(
        60, "How often the master looks for devices that went silent.", "seconds", minimum=0.05, maximum=3600
    )
    device_timeout: float = _key(
        300, "After which silence a device's tasks go to others.", "seconds", minimum=0.2, maximum=604800
    )
    enable_monitoring: bool = _key(True, "Whether beats carry machine figures, are kept, and /metrics exists.")
    api_key: str = _key(
        "", "The admin key of the configuration; on a device its enroll key, or the api_key.",
        secret=True, check=_check_api_key,
    )  # fmt: skip

    database: str = _key(
        "data/distribution.db", "The master's one file.", modes=_ON_MASTER, is_path=True, check=_check_not_empty
    )
    allow_network_filesystem: bool = _key(
        False, "Whether the database may lie on NFS, SMB and the like, where SQLite's locks are not to be trusted;"
        " false ends a start there with 10.",
        modes=_ON_MASTER,
    )  # fmt: skip
    backup_folder: str = _key(
        "", "Where the master puts a backup each night; empty makes none.", modes=_ON_MASTER, is_path=True
    )
    backup_at: str = _key(
        "03:30", "When the nightly backup is made, by the clock on the wall.", "HH:MM",
        modes=_ON_MASTER, check=_check_time_of_day,
    )  # fmt: skip
    backup_keep: int = _key(
        7, "How many of its backups a master keeps.", "backups", modes=_ON_MASTER, minimum=1, maximum=1000
    )
    retention_days: int = _key(
        30, "How long finished tasks are kept.", "days", modes=_ON_MASTER, minimum=1, maximum=36500
    )
    heartbeat_retention_days: int = _key(
        7, "How long heartbeats are kept.", "days", modes=_ON_MASTER, minimum=1, maximum=3650
    )
    event_retention_days: int = _key(
        30, "How long it is kept what happened: devices, batches, limits, logins.", "days",
        modes=_ON_MASTER, minimum=1, maximum=3650,
    )  # fmt: skip
    audit_retention_days: int = _key(
        365, "How long it is kept who did what, and which keys have ended.", "days",
        modes=_ON_MASTER, minimum=1, maximum=36500,
    )  # fmt: skip
    retry_backoff_seconds: float = _key(
        15, "The wait before the first retry; it doubles from there.", "seconds",
        modes=_ON_MASTER, minimum=0, maximum=86400,
    )  # fmt: skip
    give_up_days: int = _key(
        7, "After which time a task that still waits is given up.", "days", modes=_ON_MASTER, minimum=1, maximum=3650
    )
    max_held_polls: int = _key(
        1500, "How many pulls may wait for work at once.", "pulls", modes=_ON_MASTER, minimum=1, maximum=20000
    )
    max_event_streams: int = _key(
        50, "How many browsers may watch live, a fifth of them with one key that was made.", "streams",
        modes=_ON_MASTER, minimum=1, maximum=5000,
    )  # fmt: skip
    max_body_bytes: int = _key(
        8388608, "The largest request body that brings tasks or results.", "bytes",
        modes=_ON_MASTER, minimum=1024, maximum=1073741824,
    )  # fmt: skip
    max_artifact_bytes: int = _key(
        536870912, "The largest file that a task may send.", "bytes", modes=_ON_MASTER, minimum=1, maximum=1099511627776
    )
    max_queue_length: int = _key(
        10000, "How many writes may wait before 503.", "writes", modes=_ON_MASTER, minimum=1, maximum=1000000
    )
    limits: tuple[dict[str, Any], ...] = _key(
        DEFAULT_LIMITS, "How many tasks may run or start for each account, site or other key: docs/limits.md.",
        modes=_ON_MASTER, check=_check_limits,
    )  # fmt: skip
    allowed_hosts: tuple[str, ...] = _key(
        (), "Further names under which browsers may reach the master.", modes=_ON_MASTER, check=_check_allowed_hosts
    )
    allowed_ips: tuple[str, ...] = _key(
        (), "Networks whose addresses may ask the master, besides this machine; none listed means all.",
        modes=_ON_MASTER, check=_check_networks,
    )  # fmt: skip
    trusted_proxies: tuple[str, ...] = _key(
        (), "Networks of reverse proxies, which are believed whom they asked for (X-Forwarded-For, X-Forwarded-Proto).",
        modes=_ON_MASTER, check=_check_networks,
    )  # fmt: skip
    max_requests_per_second: float = _key(
        1000, "How many requests one address may send, and one key of the database; a device's own a fifth of it; 0 is"
        " no limit.", "requests a second", modes=_ON_MASTER, minimum=0, maximum=1000000,
    )  # fmt: skip
    ssl_certificate: str = _key(
        "", "The master's certificate and its chain, a PEM file; with it the master speaks TLS and nothing else.",
        modes=_ON_MASTER, is_path=True,
    )  # fmt: skip
    ssl_keyfile: str = _key("", "The certificate's private key, a PEM file.", modes=_ON_MASTER, is_path=True)
    worker_file: str = _key(
        "dist/worker.pyz", "The device in one file that the master hands out.",
        modes=_ON_MASTER, is_path=True, check=_check_not_empty,
    )  # fmt: skip

    ca_file: str = _key(
        "", "A PEM file of certificates to trust in the master, instead of those that the machine trusts.", is_path=True
    )
    insecure_http: bool = _key(
        False,
        "Whether a key may go over http:// to an address that is not private: all on the way can read it.",
    )
    state_folder: str = _key(
        "data/worker", "Where a device keeps unsent reports.", modes=_ON_DEVICE, is_path=True, check=_check_not_empty
    )
    executors: tuple[str, ...] = _key(
        (), "Further Python files with executors.", modes=_ON_DEVICE, is_path=True, check=_check_paths
    )
    tags: tuple[str, ...] = _key((), "What tasks may require of this device.", modes=_ON_DEVICE, check=_check_tags)
    weight: float = _key(
        1.0, "This device's share under the strategy weighted.", "times", modes=_ON_DEVICE, minimum=0.01, maximum=1000
    )
    task_memory_mb: int = _key(
        0, "How much memory a task in a process of its own may use, unless its executor says; 0 is no limit.", "MB",
        modes=_ON_DEVICE, minimum=0, maximum=16777216,
    )  # fmt: skip
    drain_seconds: float = _key(
        30, "How long running tasks may finish at a stop.", "seconds", modes=_ON_DEVICE, minimum=0, maximum=86400
    )
    spool_max_bytes: int = _key(
        268435456, "How much unsent reports may fill.", "bytes", modes=_ON_DEVICE, minimum=4096, maximum=1099511627776
    )
    artifact_max_bytes: int = _key(
        2147483648, "How much files that wait for the master may fill.", "bytes",
        modes=_ON_DEVICE, minimum=4096, maximum=1099511627776,
    )  # fmt: skip
    pull_wait_seconds: float = _key(
        20, "How long an empty pull is held open.", "seconds", modes=_ON_DEVICE, minimum=0, maximum=25
    )
    crawl_user_agent: str = _key(
        f"af-distribution/{VERSION}", "What crawls call themselves; robots.txt is read for the name before the slash.",
        modes=_ON_DEVICE, check=_check_user_agent,
    )  # fmt: skip
    crawl_obey_robots: bool = _key(True, "Whether crawls keep to robots.txt.", modes=_ON_DEVICE)
    crawl_delay_seconds: float = _key(
        0, "The least time between two requests of this device to one host.", "seconds",
        modes=_ON_DEVICE, minimum=0, maximum=3600,
    )  # fmt: skip
    crawl_host_connections: int = _key(
        4, "How many requests this device sends to one host at once.", "requests",
        modes=_ON_DEVICE, minimum=1, maximum=256,
    )  # fmt: skip
    crawl_allow_networks: tuple[str, ...] = _key(
        (), "Private networks that crawls may reach, besides public addresses.", modes=_ON_DEVICE, check=_check_networks
    )
    crawl_proxy: str = _key(
        "", "The HTTP proxy for crawls; it then looks up names.", modes=_ON_DEVICE, secret=True, check=_check_proxy
    )
    credentials: dict[str, str] = _key(  # noqa: RUF009 - _key makes a field with a factory of it
        {}, "Tokens of other services by name, which tasks say in username.",
        modes=_ON_DEVICE, secret=True, check=_check_credentials,
    )  # fmt: skip
    appsflyer_url: str = _key(
        "https://hq1.appsflyer.com", "Where AppsFlyer's APIs are.", modes=_ON_DEVICE, check=_check_appsflyer_url
    )
    reconnect_seconds: float = _key(
        30, "Over which time devices come back after an outage. A master of over 9,000 devices asks them for more;"
        " one whose own value is below 30 keeps to that.", "seconds", minimum=0, maximum=3600,
    )  # fmt: skip

    log_file: str = _key("logs/distribution.log", "Where the log goes.", is_path=True, check=_check_not_empty)
    log_level: str = _key("INFO", "The least level that is logged.", choices=LOG_LEVELS)
    log_console_level: str = _key("INFO", "The least level that is also shown on the console.", choices=LOG_LEVELS)
    log_max_bytes: int = _key(
        10485760, "At which size the log starts a new file.", "bytes", minimum=1024, maximum=1099511627776
    )
    # At least one, for with none Python never rotates and the file grows until the disk is full.
    log_backup_count: int = _key(5, "How many older log files are kept.", "files", minimum=1, maximum=1000)


def is_for_others(settings: Settings) -> bool:
    """Whether other machines can ask this master: by its host, or through a proxy in front of it."""
    return not is_loopback(settings.host) or bool(settings.trusted_proxies)


def refuse_open(settings: Settings, where: Callable[[str], str] = lambda name: "config") -> None:
    """Raises SettingsError for a master without a key that other machines can ask."""
    if not is_loopback(settings.host):
        raise SettingsError(where("host"), "host", settings.host, OPEN_TO_ALL)
    if settings.trusted_proxies:
        advice = f"is set, so a key is needed: {OPEN_TO_ALL}"
        raise SettingsError(where("trusted_proxies"), "trusted_proxies", settings.trusted_proxies, advice)


def _setting_of(row: dataclasses.Field[Any]) -> Setting:
    more = {"minimum": None, "maximum": None, "choices": (), "modes": MODES, "secret": False, "is_path": False}
    default: Any = row.default if row.default_factory is dataclasses.MISSING else row.default_factory()
    return Setting(name=row.name, type=str(row.type), default=default, **{**more, "check": None, **row.metadata})


SETTINGS: tuple[Setting, ...] = tuple(_setting_of(row) for row in dataclasses.fields(Settings))
GUIDE_KEYS = tuple(setting.name for setting in SETTINGS[:16])
_BY_NAME = {setting.name: setting for setting in SETTINGS}


# ---- from what was written to a value ----


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def _shown(key: str, value: object) -> str:
    if key in _BY_NAME and _BY_NAME[key].secret:
        return "(hidden)" if value else "(empty)"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = type(value).__name__
    text = one_line(text.encode("utf-8", "backslashreplace").decode("utf-8"))
    text = re.sub(r"//[^/\s]*@", "//***@", text)  # a URL with a password, refused or not
    return text if len(text) <= 80 else text[:77] + "..."


def _range_of(setting: Setting) -> str:
    unit = f" ({setting.unit})" if setting.unit else ""
    return f"from {setting.minimum:.15g} to {setting.maximum:.15g}{unit}, for instance {setting.default}"


def _advice_for_type(setting: Setting) -> str:
    return {
        "str": f'write text in quotation marks, for instance "{setting.default}"',
        "int": "write a whole number " + (_range_of(setting) if setting.type == "int" else ""),
        "float": "write a number " + (_range_of(setting) if setting.type == "float" else ""),
        "bool": "write true or false",
        "tuple[str, ...]": 'write a list of texts, for instance ["one", "two"] (in a flag or variable also one,two)',
        "tuple[dict[str, Any], ...]": 'write a list of objects, for instance [{"name": "account", "key": "username"}]',
        "dict[str, str]": 'write an object of texts, for instance {"name": "token"} (in a variable the same, as JSON)',
    }[setting.type]


def _from_text(setting: Setting, text: str) -> object:
    """What a flag or a variable means, in the types of a JSON file; what cannot be read stays text and is refused."""
    if setting.type == "int" and re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip(), re.ASCII):
        return int(text)
    if setting.type == "float" and re.fullmatch(r"[+-]?[0-9.]{1,30}(e[+-]?[0-9]{1,4})?", text.strip(), re.ASCII | re.I):
        with contextlib.suppress(ValueError):
            return float(text) if re.search(r"[.e]", text, re.I) else int(text)
    if setting.type == "bool":
        word = text.strip().lower()
        return True if word in ("true", "1", "yes", "on") else False if word in ("false", "0", "no", "off") else text
    if setting.type in ("dict[str, str]", "tuple[dict[str, Any], ...]"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    if setting.type == "tuple[str, ...]":
        if text.strip().startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(text)
            return text
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _of_its_type(setting: Setting, raw: object) -> Value | None:
    """`raw` as the key's type, or None where it is of another; true and false are no numbers."""
    if setting.type == "bool":
        return raw if isinstance(raw, bool) else None
    if setting.type == "int":
        return raw if isinstance(raw, int) and not isinstance(raw, bool) else None
    if setting.type == "float":
        return raw if isinstance(raw, (int, float)) and not isinstance(raw, bool) else None
    if setting.type == "str":
        return raw if isinstance(raw, str) else None
    if setting.type == "dict[str, str]":
        is_of_texts = isinstance(raw, dict) and all(isinstance(part, str) for pair in raw.items() for part in pair)
        return dict(raw) if isinstance(raw, dict) and is_of_texts else None
    of = dict if setting.type == "tuple[dict[str, Any], ...]" else str
    if isinstance(raw, (list, tuple)) and all(isinstance(part, of) for part in raw):
        return tuple(raw)
    return None


def _is_plain_text(text: str) -> bool:
    return len(text) <= LONGEST_TEXT and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text)


def _checked(setting: Setting, raw: object, where: str) -> Value:
    value = _of_its_type(setting, raw)
    if value is None:
        raise SettingsError(where, setting.name, raw, _advice_for_type(setting))
    if isinstance(value, (int, float)) and setting.minimum is not None and setting.maximum is not None:
        if not setting.minimum <= value <= setting.maximum:  # also what is not a number: it compares with nothing
            raise SettingsError(where, setting.name, raw, _advice_for_type(setting))
        return value
    listed = value if isinstance(value, tuple) else ()
    texts = [value] if isinstance(value, str) else [part for part in listed if isinstance(part, str)]
    # A secret goes to its own check, whose sentence says more.
    if not setting.secret and not all(_is_plain_text(text) for text in texts):
        raise SettingsError(where, setting.name, raw, f"write at most {LONGEST_TEXT} characters without control signs")
    if setting.choices and value not in setting.choices:
        advice = f"write {', '.join(setting.choices)}{_did_you_mean(str(value), setting.choices)}"
        raise SettingsError(where, setting.name, raw, advice)
    advice_of_check = setting.check(value) if setting.check else None
    if advice_of_check:
        raise SettingsError(where, setting.name, raw, advice_of_check)
    return value


# ---- the file ----

_OBJECT = 'write a JSON object, for instance {"port": 8000}'


def default_config_path(mode: str) -> Path:
    return ROOT / "config" / f"distribution_{mode}.json"


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingsError("", twice, None, "stands there more than once; write each key once")
    return seen


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")


def read_config_file(path: Path) -> dict[str, object]:
    """The file's raw values by key; SettingsError where it is missing, not JSON, no object, or has a key twice."""
    where = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        advice = "there is no such file; write another path, or make the files: python scripts/init_distribution.py"
        raise SettingsError(where, "", None, advice) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError(where, "", None, f"cannot be read ({reason}); write the path of a readable file") from None
    if len(content) > LARGEST_FILE_BYTES:
        raise SettingsError(where, "", None, f"is larger than 1 MiB; {_OBJECT}")
    try:
        # utf-8-sig: Windows' editor puts a byte order mark in front.
        parsed = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except SettingsError as error:
        raise SettingsError(where, error.key, None, error.advice) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(where, "", None, f"is not JSON ({one_line(str(error))}); {_OBJECT}") from None
    if not isinstance(parsed, dict):
        raise SettingsError(where, "", None, f"holds a {type(parsed).__name__}; {_OBJECT}")
    return parsed


def mode_in_file(path: Path) -> str | None:
    """Which mode a config file is for; None where it does not say."""
    raw = read_config_file(path)
    return str(_checked(_BY_NAME["mode"], raw["mode"], str(path))) if "mode" in raw else None


def _check_file_mode(mode: str, raw: Mapping[str, object], where: str) -> str:
    """The mode whose keys the file may carry. standalone starts a master and a worker from its one file."""
    if "mode" not in raw:
        return mode
    file_mode = str(_checked(_BY_NAME["mode"], raw["mode"], where))
    if file_mode not in (mode, "standalone"):
        advice = f"this file is for the {file_mode} and cannot start a {mode}; write --config with the {mode}'s file"
        raise SettingsError(where, "mode", file_mode, advice)
    return file_mode


def _from_file(mode: str, path: Path) -> tuple[dict[str, object], str]:
    raw, where = read_config_file(path), str(path)
    file_mode = _check_file_mode(mode, raw, where)
    names = [setting.name for setting in SETTINGS if file_mode in setting.modes]
    for name in raw:
        if name in names:
            continue
        if name in _BY_NAME:
            owners = " and ".join(_BY_NAME[name].modes)
            advice = f"is a setting of {owners} and does nothing in a {file_mode}'s file; take the line out"
        else:
            advice = f"is no setting; take the line out{_did_you_mean(name, names)}"
        raise SettingsError(where, one_line(_shown("", name).strip('"')), None, advice)
    return {name: value for name, value in raw.items() if name != "mode"}, file_mode


def _refuse_misspelt_variables(environ: Mapping[str, str]) -> None:
    """AF_PROT is a mistake; AF_APPSFLYER_TOKEN belongs to somebody's executor. Only near misses are refused."""
    known = {setting.variable for setting in SETTINGS}
    for name in environ:
        if name.startswith("AF_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                raise SettingsError(name, "", None, f"is no setting; did you mean {near[0]}?")


# ---- all four sources together ----


def load_with_sources(
    mode: str,
    *,
    flags: Mapping[str, object] | None = None,
    config_path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    starting: bool = True,
) -> tuple[Settings, dict[str, str]]:
    """Like load, and where each key's value comes from: "default", the file's path, AF_X or --x."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}")
    environ = os.environ if environ is None else environ
    path = Path(config_path) if config_path else default_config_path(mode)
    file_mode, values, sources = mode, {}, {}
    if config_path or path.is_file():
        from_file, file_mode = _from_file(mode, path)
        values, sources = dict(from_file), dict.fromkeys(from_file, str(path))
    _refuse_misspelt_variables(environ)
    for setting in SETTINGS:
        if environ.get(setting.variable):
            values[setting.name] = _from_text(setting, environ[setting.variable])
            sources[setting.name] = setting.variable
    for name, raw in (flags or {}).items():
        if name not in _BY_NAME:
            raise SettingsError("flags", name, None, f"is no setting{_did_you_mean(name, [*_BY_NAME])}")
        if raw is not None:
            values[name] = _from_text(_BY_NAME[name], raw) if isinstance(raw, str) else raw
            sources[name] = _BY_NAME[name].flag
    checked = {name: _checked(_BY_NAME[name], raw, sources[name]) for name, raw in values.items()}
    settings = _completed(mode, file_mode, checked, sources)
    _check_together(settings, sources, starting=starting)
    return settings, {setting.name: sources.get(setting.name, "default") for setting in SETTINGS}


def _completed(mode: str, file_mode: str, values: dict[str, Value], sources: dict[str, str]) -> Settings:
    """The defaults that depend on others, and absolute paths."""
    wanted = values.get("mode", mode)
    # AF_MODE=standalone reaches the master and the worker that a standalone starts, as its file does.
    if wanted != mode and not (wanted == "standalone" and sources["mode"] == "AF_MODE"):
        advice = f"a {mode} is being started; write {mode}, or start the {wanted}"
        raise SettingsError(sources["mode"], "mode", wanted, advice)
    values["mode"] = mode
    if not values.get("device_id") and "standalone" in (mode, file_mode):
        values["device_id"] = "standalone"
    values["device_name"] = values.get("device_name") or values.get("device_id", "")
    for name in ("master_url", "appsflyer_url"):
        values[name] = str(values.get(name, _BY_NAME[name].default)).rstrip("/")
    for setting in SETTINGS:
        if setting.is_path:
            value = values.get(setting.name, setting.default)
            paths = cast("tuple[str, ...]", value) if isinstance(value, tuple) else ()
            values[setting.name] = tuple(map(_absolute, paths)) if isinstance(value, tuple) else _absolute(str(value))
    return dataclasses.replace(Settings(), **values)  # type: ignore[arg-type]


def _absolute(path: str) -> str:
    return str(ROOT / Path(path).expanduser()) if path else ""


def _check_together(settings: Settings, sources: Mapping[str, str], *, starting: bool) -> None:
    def where(name: str) -> str:
        return sources.get(name, "default")

    if settings.device_timeout <= settings.heartbeat_interval:
        advice = f"write more than heartbeat_interval ({settings.heartbeat_interval}), or every device counts as lost"
        raise SettingsError(where("device_timeout"), "device_timeout", settings.device_timeout, advice)
    if not starting:
        return
    if settings.ca_file and settings.mode != "master":
        try:
            is_folder = Path(settings.ca_file).is_dir()
            files, folders = (None, settings.ca_file) if is_folder else (settings.ca_file, None)
            ssl.create_default_context(cafile=files, capath=folders)
        except OSError as error:
            why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
            advice = f"cannot be used ({why}); write the path of a readable PEM file of certificates"
            raise SettingsError(where("ca_file"), "ca_file", settings.ca_file, advice) from None
    for name, other in (("ssl_certificate", "ssl_keyfile"), ("ssl_keyfile", "ssl_certificate")):
        if settings.mode != "worker" and getattr(settings, name) and not getattr(settings, other):
            advice = f"{other} is missing: TLS needs a certificate and its key; write both, or none for plain HTTP"
            raise SettingsError(where(name), name, getattr(settings, name), advice)
    url = urllib.parse.urlsplit(settings.master_url)
    # A name is looked up when it is asked for, and judged then.
    is_far = _is_address(url.hostname or "") and not is_private(url.hostname or "")
    if settings.mode == "worker" and url.scheme == "http" and is_far and not settings.insecure_http:
        raise SettingsError(where("master_url"), "master_url", settings.master_url, PLAIN_HTTP)
    if settings.mode == "worker" and not settings.device_id:
        advice = "a worker needs a name of its own; write --device-id shop-7, AF_DEVICE_ID, or device_id in its file"
        raise SettingsError(where("device_id"), "device_id", "", advice)
    # A master may have an admin key in its database, so it looks for itself; the worker of a standalone needs this one.
    if settings.mode == "standalone" and not settings.api_key:
        refuse_open(settings, where)


def load(
    mode: str,
    *,
    flags: Mapping[str, object] | None = None,
    config_path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    starting: bool = True,
) -> Settings:
    """The effective settings of `mode`; raises SettingsError.

    `flags` holds values by key, as text or typed, None for not given. Without config_path the mode's own file is read
    if it is there. starting=False leaves out what only a starting program needs (a device_id, a key for an open host).
    """
    return load_with_sources(mode, flags=flags, config_path=config_path, environ=environ, starting=starting)[0]


# ---- the command line ----


def add_arguments(parser: argparse.ArgumentParser, mode: str, keys: Collection[str] | None = None) -> None:
    """One flag a key of this mode, --config, --show-config and --version. Secrets have none: everybody can read ps."""
    parser.allow_abbrev = False
    parser.add_argument("--config", metavar="FILE", help=f"instead of config/distribution_{mode}.json")
    parser.add_argument("--show-config", action="store_true", help="print the effective values and end; no secrets")
    parser.add_argument("--version", action="version", version=f"af-distribution {VERSION}")
    for setting in SETTINGS:
        if mode in setting.modes and not setting.secret and (keys is None or setting.name in keys):
            of_texts = setting.type == "tuple[str, ...]"
            shown = ",".join(cast("tuple[str, ...]", setting.default)) if of_texts else setting.default
            alone: dict[str, Any] = {"nargs": "?", "const": "true"} if setting.type == "bool" else {}
            parser.add_argument(
                setting.flag,
                action="append" if setting.type == "tuple[str, ...]" else "store",
                **alone,
                metavar=setting.unit.split(" ")[-1].upper() or setting.name.split("_")[-1].upper(),
                help=f"{setting.sentence} Default: {shown}".replace("%", "%%") if shown != "" else setting.sentence,
            )


def from_arguments(
    mode: str,
    argv: Sequence[str] | None = None,
    *,
    parser: argparse.ArgumentParser | None = None,
    keys: Collection[str] | None = None,
    starting: bool = True,
) -> tuple[Settings, argparse.Namespace]:
    """Settings and the parser's own options from a command line; a mistake is printed as one line and exits with 2.

    `parser` may bring options of its own; the settings' flags (all of the mode's, or those in `keys`) are added to it.
    """
    parser = parser or argparse.ArgumentParser()
    add_arguments(parser, mode, keys)
    arguments, unknown = parser.parse_known_args(argv)
    try:
        if unknown:
            raise _unknown_argument(unknown[0], mode, parser)
        flags = {setting.name: _given(getattr(arguments, setting.name, None)) for setting in SETTINGS}
        settings, sources = load_with_sources(mode, flags=flags, config_path=arguments.config, starting=starting)
    except SettingsError as error:
        stop(error)
    if arguments.show_config:
        try:
            print(describe(settings, sources), flush=True)
        except BrokenPipeError:  # as of `| head`; what is left would be tried again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
    return settings, arguments


def _given(value: object) -> object:
    """A flag that may be repeated arrives as a list of texts, each a comma list or JSON."""
    if not isinstance(value, list):
        return value
    parts = [_from_text(_BY_NAME["tags"], text) for text in value]
    return [piece for part in parts for piece in (part if isinstance(part, list) else [part])]


def _unknown_argument(word: str, mode: str, parser: argparse.ArgumentParser) -> SettingsError:
    name = word.split("=")[0]
    for setting in SETTINGS:
        if setting.secret and name == setting.flag:
            advice = f"everybody here can read a command line; write it into the config file or {setting.variable}"
            return SettingsError(name, "", None, advice)
        if name == setting.flag:
            return SettingsError(name, "", None, f"is a setting of {' and '.join(setting.modes)}; a {mode} has none")
    choices = [*parser._option_string_actions]
    return SettingsError(one_line(name), "", None, f"is unknown; --help lists the flags{_did_you_mean(name, choices)}")


def stop(error: SettingsError) -> NoReturn:
    """Say what is wrong in one line and end with the exit code for settings."""
    print(error, file=sys.stderr)
    sys.exit(ExitCode.SETTINGS)


def describe(settings: Settings, sources: Mapping[str, str]) -> str:
    """The effective values of this mode, a line each, with unit and source; a secret only as set or empty."""
    lines = []
    for setting in SETTINGS:
        if settings.mode in setting.modes:
            value = f"{_shown(setting.name, getattr(settings, setting.name))} {setting.unit}".strip()
            lines.append(f"{setting.name} = {value}   [{sources.get(setting.name, 'default')}]")
    return "\n".join(lines)


# ---- the log ----


def one_line(text: str) -> str:
    """Line ends and what steers a terminal become escapes: a device's name must not forge a record."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda sign: sign.group().encode("unicode_escape").decode("ascii"), text
    )


class LineFormatter(logging.Formatter):
    """One line a record (a traceback adds its own), in UTC, and never one of the secrets, in a traceback neither."""

    converter = time.gmtime  # type: ignore[assignment]

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-8s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        forms = {form for secret in secrets for form in (secret, urllib.parse.quote(secret), repr(secret)[1:-1])}
        self._secrets = sorted(forms - {""}, key=len, reverse=True)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return re.sub(r"afk_([0-9]+)_[\w-]+", r"afk_\1_***", text) if "afk_" in text else text


class SharedRotatingFile(logging.handlers.RotatingFileHandler):
    """A rotating file, readable by its owner only, that a master and a worker on one machine may share.

    Windows lets nobody rename a file that another has open: there the shared file keeps growing until one of them ends.
    """

    def _open(self) -> TextIOWrapper:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=private)

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        if self._was_moved():
            self._reopen()
        return bool(super().shouldRollover(record))

    def doRollover(self) -> None:
        with self._rotation_lock():
            try:
                if self._was_moved():
                    self._reopen()
                else:
                    super().doRollover()
            except OSError:  # going on in the old file is better than losing the record
                self._reopen()

    def handleError(self, record: logging.LogRecord) -> None:
        """What a full disk does not take is on the console; a traceback for each line would only hide it."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def _was_moved(self) -> bool:
        try:
            return self.stream is not None and not os.path.samestat(
                os.fstat(self.stream.fileno()), Path(self.baseFilename).stat()
            )
        except OSError:
            return True

    def _reopen(self) -> None:
        if self.stream:
            self.stream.close()
        self.stream = self._open()

    @contextlib.contextmanager
    def _rotation_lock(self) -> Iterator[None]:
        """Held on a copy of the open file, because rotating closes the file itself before it renames it."""
        if fcntl is None or self.stream is None:
            yield
            return
        copy = os.dup(self.stream.fileno())
        try:
            fcntl.flock(copy, fcntl.LOCK_EX)
            yield
        finally:
            os.close(copy)


_installed: list[logging.Handler] = []


def configure_logging(settings: Settings) -> None:
    """Log to the rotating file and to stderr, replacing an earlier call's; exits with 2 where it fails."""
    path = Path(settings.log_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = SharedRotatingFile(path, maxBytes=settings.log_max_bytes, backupCount=settings.log_backup_count)
    except OSError as error:
        stop(SettingsError("log_file", str(path), None, f"cannot be written ({error.strerror}); write another path"))
    formatter = LineFormatter([settings.api_key, *settings.credentials.values()])
    root = logging.getLogger()
    while _installed:
        old = _installed.pop()
        root.removeHandler(old)
        old.close()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(settings.log_console_level)
    for handler in (file, console):
        handler.setFormatter(formatter)
        root.addHandler(handler)
        _installed.append(handler)
    root.setLevel(settings.log_level)
    # At DEBUG these say something for every request and every tick, and nothing that ours do not say.
    for chatty in ("urllib3", "schedule"):
        logging.getLogger(chatty).setLevel(max(logging.INFO, root.level))
