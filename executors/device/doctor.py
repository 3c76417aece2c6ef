"""Why does this device not work?

`python worker.py --doctor` looks at what a device needs, in the order in which it needs it, and says a line for each:

    ok   what is well
    note what is worth knowing; the device works all the same
    fix  what is not well, and what to do

It ends with 0 if there is no fix, else with 1. Every step has a time limit, so the whole takes a minute at most. It
registers nothing, pulls nothing, leaves no file, disturbs no running worker of the same id, and prints no secret.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import socket
import ssl
import sys
import threading
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, TypeVar
from urllib.parse import quote, urlsplit

import requests

from executors import task_executor
from executors.device.credential import Credential
from executors.device.link import Busy, Link, MasterClient, Refused, Unreachable
from executors.device.machine import lock_file
from executors.device.trust import bundle_of_environment
from settings import PLAIN_HTTP, PROTOCOL, ExitCode, Settings, is_private, one_line

OK, NOTE, FIX = "ok", "note", "fix"
STEP_SECONDS = 5.0
CALL_SECONDS = 10.0
EXECUTORS_SECONDS = 20.0
SKEW_SECONDS = 30.0
CERTIFICATE_DAYS = 14
LARGEST_LOOK_BYTES = 65536
MAKE_ENROLL_KEY = "make one on the master (python master.py --create-key enroll) and write it into api_key"

Answer = TypeVar("Answer")


class Finding(NamedTuple):
    mark: str
    name: str
    text: str


def examine(settings: Settings) -> ExitCode:
    """Print every finding as soon as it is there."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console of another language must not end the examination
    is_well = True
    for finding in findings(settings):
        is_well = is_well and finding.mark != FIX
        text = finding.text.replace(settings.api_key, "***") if settings.api_key else finding.text
        print(f"{finding.mark:<4} {finding.name}: {one_line(text)}", flush=True)
    return ExitCode.OK if is_well else ExitCode.UNREACHABLE


def findings(settings: Settings) -> Iterator[Finding]:
    """All of them; what depends on a step that failed is left out."""
    yield _device_id(settings)
    yield from Way(settings).findings()
    yield from _state_folder(settings)
    yield _log_file(settings)
    yield from _executors(settings)


def within(seconds: float, step: Callable[[], Answer]) -> Answer:
    """The step's answer; TimeoutError if it has none in time. It runs in a thread, since some waits have no end."""
    outcome: list[tuple[bool, Any]] = []

    def take() -> None:
        try:
            outcome.append((True, step()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=take, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    succeeded, answer = outcome[0]
    if not succeeded:
        raise answer
    return answer


def _device_id(settings: Settings) -> Finding:
    if not settings.device_id.strip("."):
        return Finding(
            FIX, "device id", "there is none; write --device-id shop-7, AF_DEVICE_ID, or device_id in a file"
        )
    return Finding(OK, "device id", settings.device_id)


# ---- the way to the master ----


class Way:
    """Everything between this device and its master, step by step; the first that fails ends it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        parts = urlsplit(settings.master_url)
        self.host, self.is_tls = parts.hostname or "", parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self.proxy = requests.utils.select_proxy(
            settings.master_url, requests.utils.get_environ_proxies(settings.master_url, no_proxy=None)
        )
        if self.proxy:
            proxy = urlsplit(self.proxy if "//" in self.proxy else f"http://{self.proxy}")
            self.next_host, self.next_port = proxy.hostname or "", proxy.port or 80
        else:
            self.next_host, self.next_port = self.host, self.port
        self.credential = Credential(settings.api_key, Path(settings.state_folder) / (settings.device_id or "."))
        self.client = MasterClient(Link(settings.master_url), settings, self.credential)
        self.date: Optional[str] = None
        self.asked_at = 0.0

    def findings(self) -> Iterator[Finding]:
        if self.proxy:
            advice = f"calls to the master go through {self.next_host}:{self.next_port}, as HTTP(S)_PROXY says"
            yield Finding(NOTE, "proxy", f"{advice}; NO_PROXY={self.host} goes without")
        steps = [self.name, self.connection]
        steps += [self.certificate] if self.is_tls and not self.proxy else []
        for step in [*steps, self.master, self.clock, self.key, self.standing]:
            finding = step()
            if finding is None:
                continue
            yield finding
            if finding.mark == FIX and step != self.clock:
                return

    # -- one step each --

    def name(self) -> Finding:
        host = self.next_host
        try:
            found = within(STEP_SECONDS, lambda: socket.getaddrinfo(host, self.next_port, type=socket.SOCK_STREAM))
        except TimeoutError:
            advice = "check this machine's name server (DNS), or write the master's address into master_url"
            return Finding(FIX, "name", f"nobody answers within {STEP_SECONDS:g} s who {host} is; {advice}")
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "no name"
            advice = "check its spelling in master_url and this machine's name server (DNS), or write the address"
            return Finding(FIX, "name", f"{host} is not known ({why}); {advice}")
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        return Finding(OK, "name", host if addresses == [host] else f"{host} is {', '.join(addresses[:4])}")

    def connection(self) -> Finding:
        where = f"{self.next_host} port {self.next_port}"
        started = time.monotonic()
        try:
            with within(STEP_SECONDS, self._connect) as connection:
                address = str(connection.getpeername()[0])
        except ConnectionRefusedError:
            here = " (127.0.0.1 is this machine itself)" if self.next_host in ("127.0.0.1", "localhost", "::1") else ""
            advice = "check master_url; start the master; from other machines it is reached with --host 0.0.0.0 only"
            return Finding(FIX, "connection", f"nothing listens at {where}{here}; {advice}")
        except TimeoutError:
            advice = "check that the machine is on, and the firewalls here and there"
            return Finding(FIX, "connection", f"{where} does not answer within {STEP_SECONDS:g} s; {advice}")
        except OSError as error:
            advice = "check this machine's network, and the address in master_url"
            return Finding(FIX, "connection", f"there is no way to {where} ({error.strerror or error}); {advice}")
        milliseconds = 1000 * (time.monotonic() - started)
        # What lies behind a proxy can be told from the address alone.
        if not self.is_tls and not is_private(self.host if self.proxy else address):
            mark = NOTE if self.settings.insecure_http else FIX
            return Finding(mark, "connection", f"{where} answers in {milliseconds:.0f} ms, but {PLAIN_HTTP}")
        return Finding(OK, "connection", f"{where} answers in {milliseconds:.0f} ms")

    def _connect(self) -> socket.socket:
        try:
            return socket.create_connection((self.next_host, self.next_port), STEP_SECONDS)
        except socket.timeout as error:  # on Python 3.9 it is no TimeoutError
            raise TimeoutError(str(error)) from None

    def certificate(self) -> Finding:
        bundle = self.settings.ca_file or bundle_of_environment() or requests.utils.DEFAULT_CA_BUNDLE_PATH
        try:
            is_folder = Path(bundle).is_dir()
            context = ssl.create_default_context(
                cafile=None if is_folder else bundle, capath=bundle if is_folder else None
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            advice = "ca_file (or REQUESTS_CA_BUNDLE) must name a readable file of certificates"
            return Finding(FIX, "certificate", f"{bundle} cannot be used ({why}); {advice}")

        def shake_hands() -> tuple[str, dict[str, Any]]:
            with context.wrap_socket(self._connect(), server_hostname=self.host) as connection:
                return str(connection.version()), dict(connection.getpeercert() or {})

        try:
            version, certificate = within(2 * STEP_SECONDS, shake_hands)
        except ssl.SSLCertVerificationError as error:
            return Finding(FIX, "certificate", self._distrust(error))
        except (ssl.SSLEOFError, ConnectionError, TimeoutError, socket.timeout):
            advice = "a firewall or a proxy is in between, or the server is not set up for this name"
            return Finding(FIX, "certificate", f"{self.host} ends the connection when TLS begins; {advice}")
        except OSError as error:
            advice = f"if it speaks plain HTTP, write http://{self.host}:{self.port} into master_url"
            reason = getattr(error, "reason", None) or error
            return Finding(FIX, "certificate", f"port {self.port} answers, but not with TLS ({reason}); {advice}")
        days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
        if days < CERTIFICATE_DAYS:
            return Finding(NOTE, "certificate", f"good, but it ends in {days:.0f} days; renew it on the master's side")
        return Finding(OK, "certificate", f"good for {self.host}, {days:.0f} days left ({version})")

    def _distrust(self, error: ssl.SSLCertVerificationError) -> str:
        today = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        if error.verify_code == 10:
            return f"it has expired, or this machine's clock is wrong (it says {today}): renew it, or set the clock"
        if error.verify_code == 9:
            return f"it is not valid yet: this machine's clock is wrong (it says {today}); set it"
        if error.verify_code in (62, 64):
            return f"it is for other names than {self.host}; write the name that it is for into master_url"
        return (
            f"nobody whom this machine trusts has signed it ({error.verify_message}); if it is your own, name its file"
            " in ca_file; else somebody on the way reads everything (a filter, an antivirus, a login page)"
        )

    def master(self) -> Finding:
        """Is it our master, and not a captive portal?"""
        try:
            status, headers, reply = within(CALL_SECONDS, self._look)
        except (OSError, ValueError) as error:  # requests' own exceptions are OSErrors
            if isinstance(error, TimeoutError) or "timed out" in str(error):
                advice = "the machine is overloaded, or another program has the port"
                return Finding(FIX, "master", f"it accepts the connection and says nothing; {advice}")
            advice = "check the port in master_url" + ("" if self.is_tls else "; if it wants TLS, write https://")
            return Finding(FIX, "master", f"what answers there is no HTTP server; {advice}")
        if isinstance(reply, dict) and (reply.get("status") == "ok" or reply.get("code") == "host_not_allowed"):
            return self._protocol(reply)
        if 300 <= status < 400:
            place = headers.get("Location", "")[:200]
            advice = (
                "if that is a login page of this network, log in there; else write the right address into master_url"
            )
            return Finding(FIX, "master", f"what answers there is not our master: it redirects to {place}; {advice}")
        if status >= 500:
            advice = "if that is a reverse proxy, the master behind it does not run"
            return Finding(FIX, "master", f"{self.host} answers {status}; {advice}")
        kind = headers.get("Content-Type", "nothing")[:80]
        advice = "a login page of this network, or another program; open master_url in a browser, and check its port"
        return Finding(FIX, "master", f"what answers there is not our master ({status}, {kind}): {advice}")

    def _look(self) -> tuple[int, Any, Any]:
        self.asked_at = time.time()
        with self.client._session.get(
            f"{self.settings.master_url}/healthz", timeout=STEP_SECONDS, allow_redirects=False, stream=True
        ) as response:
            self.date = response.headers.get("Date")
            self.asked_at = (self.asked_at + time.time()) / 2
            content = response.raw.read(LARGEST_LOOK_BYTES)
        with contextlib.suppress(ValueError, RecursionError):
            return response.status_code, response.headers, json.loads(content)
        return response.status_code, response.headers, None

    def _protocol(self, reply: dict[str, Any]) -> Finding:
        theirs = reply.get("protocol")
        if reply.get("status") == "ok" and not isinstance(theirs, int):
            return Finding(
                NOTE, "master", "it does not say which protocol it speaks; an older master, or another server"
            )
        if isinstance(theirs, int) and theirs > PROTOCOL:
            advice = f"get its {self.settings.master_url}/edge/worker.pyz, or its worker.py, settings.py and executors/"
            return Finding(FIX, "master", f"it speaks protocol {theirs}, this worker only {PROTOCOL}; {advice}")
        if isinstance(theirs, int) and theirs < PROTOCOL:
            return Finding(NOTE, "master", f"it speaks protocol {theirs}, this worker {PROTOCOL}; update the master")
        return Finding(OK, "master", f"answers as our master does, protocol {PROTOCOL}")

    def clock(self) -> Optional[Finding]:
        try:
            theirs = parsedate_to_datetime(self.date or "").timestamp() + 0.5  # the header leaves fractions out
        except (TypeError, ValueError, IndexError):
            return Finding(NOTE, "clock", "the master's reply carries no time to compare with")
        skew = self.asked_at - theirs
        if abs(skew) <= SKEW_SECONDS:
            return Finding(OK, "clock", f"within {max(1, round(abs(skew)))} s of the master's")
        advice = "set the one that is wrong: timedatectl set-ntp true; on Windows w32tm /resync"
        behind = "ahead of" if skew > 0 else "behind"
        return Finding(FIX, "clock", f"this machine's is {abs(skew):.0f} s {behind} the master's; {advice}")

    def key(self) -> Finding:
        """Asked with the name of a device that does not exist, so that nothing changes."""
        shown = "this device's token" if self.credential.has_token else "this key"
        query = {"device_id": f"doctor-{secrets.token_hex(8)}", "limit": 0, "wait": 0}
        try:
            within(2 * CALL_SECONDS, lambda: self.client.get("/tasks/pull", query, CALL_SECONDS))
        except Refused as error:
            if error.code == "unknown_device":
                return Finding(OK, "key", "accepted" if error.key else "none is needed")
            if error.code == "not_your_device":
                return Finding(OK, "key", "accepted: a token of this device's own")
            if error.code == "forbidden":
                return self._key_of_another_role()
            if error.status == 401 and self.credential.put_aside(error.key):
                found = self.key()
                return found._replace(text=f"the master refuses {shown} ({error.detail}); the api_key: {found.text}")
            advice = "write a key of the master (best an enroll key) into the config file's api_key or AF_API_KEY"
            if error.code in ("key_expired", "key_revoked"):
                return Finding(FIX, "key", f"the master refuses {shown} ({error.detail}); {MAKE_ENROLL_KEY}")
            if error.status == 401 or error.code == "host_not_allowed":
                said = "the master wants a key, and this device has none"
                said = f"the master refuses {shown}" if error.key else said
                return Finding(FIX, "key", f"{said}; {advice}")
            return Finding(FIX, "key", f"the master refuses: {error}")
        except Busy:
            advice = "too many wrong keys came from here, or it has too much to do; wait a minute"
            return Finding(FIX, "key", f"the master does not answer now; {advice}")
        except (Unreachable, TimeoutError) as error:
            advice = "check the address in master_url, or try again"
            return Finding(FIX, "key", f"the master's API does not answer ({error}); {advice}")
        return Finding(OK, "key", "accepted")

    def _key_of_another_role(self) -> Finding:
        """An enroll key may do nothing but register, which happens at the start."""
        try:
            said = within(2 * CALL_SECONDS, lambda: self.client.get("/session", {}, CALL_SECONDS))
        except (Refused, Busy, Unreachable, TimeoutError):
            said = {}
        if said.get("role") == "enroll" and said.get("uses_left") == 0:
            text = f"this enroll key has registered all the devices that it was for; {MAKE_ENROLL_KEY}"
            return Finding(FIX, "key", text)
        if said.get("role") == "enroll":
            return Finding(OK, "key", "an enroll key: the first start trades it for a token of this device's own")
        advice = f"a device needs an enroll key; {MAKE_ENROLL_KEY}"
        return Finding(FIX, "key", f"the master knows it as a key of the role {said.get('role')}, but {advice}")

    def standing(self) -> Optional[Finding]:
        """What the master thinks of this device, where this key may ask."""
        me = self.settings.device_id
        if not me:
            return None
        try:
            stats = within(
                2 * CALL_SECONDS, lambda: self.client.get(f"/devices/{quote(me, safe='')}/stats", {}, CALL_SECONDS)
            )
        except Refused as error:
            is_new = error.code == "unknown_device"
            return Finding(OK, "registration", "the first start does it") if is_new else None
        except (Busy, Unreachable, TimeoutError):
            return None
        status = str(stats.get("status"))
        advice = f'PUT /api/distribution/devices/{me}/status with {{"status": "active"}}'
        if status == "conflict":
            return Finding(FIX, "registration", f"several workers used the id {me}; stop all but one, then {advice}")
        if status in ("disabled", "draining"):
            return Finding(FIX, "registration", f"a person made it {status}, so it gets no tasks; to undo: {advice}")
        return Finding(OK, "registration", f"the master has it as {status}")


# ---- this machine ----


def _state_folder(settings: Settings) -> Iterator[Finding]:
    folder = Path(settings.state_folder) / settings.device_id
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        within(STEP_SECONDS, lambda: _try_to_write(there))
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or error
        advice = "give this user the right to write there, or write another state_folder"
        yield Finding(FIX, "state folder", f"{there} cannot be written ({why}); {advice}")
        return
    running = " and a worker runs in it now" if _is_locked(folder / "lock") else ""
    yield Finding(OK, "state folder", f"{folder} can be written{running}")
    free = shutil.disk_usage(there).free
    if free < settings.spool_max_bytes:
        advice = f"unsent reports may need {_megabytes(settings.spool_max_bytes)}; make room, or lower spool_max_bytes"
        yield Finding(FIX, "disk", f"only {_megabytes(free)} are free at {there}; {advice}")
    else:
        yield Finding(OK, "disk", f"{_megabytes(free)} free")
    with contextlib.suppress(OSError):
        waiting = sum(path.stat().st_size for path in (folder / "spool").glob("*.spool"))
        if waiting:
            advice = "the worker sends them when it reaches its master"
            yield Finding(NOTE, "spool", f"{max(1, waiting // 1000)} kB of reports are not sent yet; {advice}")


def _try_to_write(folder: Path) -> None:
    trial = folder / f".doctor-{secrets.token_hex(8)}"
    descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if os.write(descriptor, b"x") != 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        trial.unlink()


def _is_locked(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        lock_file(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)  # which gives it back at once
    return False


def _log_file(settings: Settings) -> Finding:
    path = Path(settings.log_file)
    there = next(place for place in (path, *path.parents) if place.exists())
    if os.access(there, os.W_OK):
        return Finding(OK, "log", str(path))
    return Finding(FIX, "log", f"{path} cannot be written; give this user the right to, or write another log_file")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 10e9 else f"{size / 1e9:,.0f} GB"


class Remarks(logging.Handler):
    """What the registry of executors says about what it leaves off."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _executors(settings: Settings) -> Iterator[Finding]:
    remarks, registry = Remarks(), logging.getLogger(task_executor.__name__)
    registry.addHandler(remarks)
    registry.propagate = False
    try:
        loaded = within(EXECUTORS_SECONDS, lambda: task_executor.load_executors(settings.executors))
    except TimeoutError:
        advice = "one of the files of the setting executors waits for something when it is imported"
        yield Finding(FIX, "executors", f"not loaded within {EXECUTORS_SECONDS:g} s; {advice}")
        return
    finally:
        registry.removeHandler(remarks)
        registry.propagate = True
    tags = sorted({*settings.tags, *task_executor.device_tags(loaded)})
    with_tags = f", with the tags {', '.join(tags)}" if tags else ""
    if loaded:
        yield Finding(OK, "executors", f"{', '.join(sorted(loaded))}{with_tags}")
    else:
        yield Finding(FIX, "executors", "there is none, so this device would get no task; the lines below say why")
    for text in remarks.texts:
        is_wanted = any(name in text for name in settings.executors)  # the setting names it, so it is missed
        is_by_design = "is taken from" in text or ("pip install" in text and not is_wanted)
        yield Finding(NOTE if is_by_design else FIX, "executors", text)
