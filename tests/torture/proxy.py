"""What may a network do to a request? One small HTTP proxy, with a port of its own for each party.

It reads whole requests and whole answers (Content-Length only: all that workers and producers send), so it can lose
either, hold them, send them twice, let later ones overtake, or send a copy much later. Without a fault it passes them
on at once. It also writes down what the master answered to registrations, beats, pulls and reports, before anything
happens to the answer: `calls` is what the master has said, whatever its database says later.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

FAULTS = ("lose_answers", "delay", "duplicate", "reorder", "black_hole", "cut")
LATEST_SECONDS = 0.8


@dataclass
class Party:
    """One program behind the proxy; `fault` is what happens to its traffic now."""

    name: str
    random: random.Random
    port: int = 0
    fault: str | None = None
    healed: asyncio.Event = field(default_factory=asyncio.Event)


class Cut(Exception):
    """The client's connection ends here."""


class Proxy:
    """Runs in a thread of its own; `add` a party, `set` its fault."""

    def __init__(self, target_port: int, seed: int) -> None:
        self.target_port, self.seed = target_port, seed
        self.calls: list[dict[str, Any]] = []
        self.parties: dict[str, Party] = {}
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def add(self, name: str) -> str:
        """A port for this party; its URL."""
        if name not in self.parties:
            party = Party(name, random.Random(f"{self.seed} {name}"))

            async def listen() -> None:
                server = await asyncio.start_server(lambda r, w: self._serve(party, r, w), "127.0.0.1", 0)
                party.port = server.sockets[0].getsockname()[1]

            self._run(listen())
            self.parties[name] = party
        return f"http://127.0.0.1:{self.parties[name].port}"

    def set(self, name: str, fault: str | None) -> None:
        party = self.parties[name]

        async def change() -> None:
            party.fault = fault
            party.healed.set()
            party.healed = asyncio.Event()

        self._run(change())

    def close(self) -> None:
        async def cancel_all() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self._run(cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    # -- one connection -------------------------------------------------------------------------------------

    async def _serve(self, party: Party, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._hold(asyncio.current_task())
        try:
            while True:
                request = await read_message(reader)
                answer = await self._exchange(party, request)
                writer.write(answer)
                await writer.drain()
        except (Cut, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _exchange(self, party: Party, request: bytes) -> bytes:
        """The answer that the client gets; Cut when it gets none."""
        r, fault = party.random, party.fault
        if fault in ("delay", "reorder"):
            await asyncio.sleep(r.uniform(0.0, LATEST_SECONDS))
        if fault == "cut" and r.random() < 0.4:
            raise Cut
        if fault == "black_hole":
            await self._swallowed(party)
        if fault == "duplicate":
            answers = await asyncio.gather(*[self._forward(party, request) for _ in range(2)], return_exceptions=True)
            answer = r.choice(answers)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        if fault == "reorder":
            self._send_again_later(party, request)
        answer = await self._forward(party, request)
        if party.fault == "lose_answers" and r.random() < 0.6:
            raise Cut
        if party.fault == "black_hole":
            await self._swallowed(party)
        return answer

    async def _swallowed(self, party: Party) -> None:
        """Nothing moves until the hole closes; then what hung arrives late, or its connection is found dead."""
        while party.fault == "black_hole":
            await party.healed.wait()
        if party.random.random() < 0.5:
            raise Cut

    def _send_again_later(self, party: Party, request: bytes) -> None:
        async def again() -> None:
            await asyncio.sleep(party.random.uniform(0.1, 2.0))
            try:
                await self._forward(party, request)
            except (Cut, OSError):
                pass

        self._hold(self.loop.create_task(again()))

    def _hold(self, task: asyncio.Task[Any] | None) -> None:
        """The loop itself would let a task be collected that nobody waits for."""
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, party: Party, request: bytes) -> bytes:
        sent_at = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            raise Cut from None
        try:
            writer.write(request)
            answer = await read_message(reader)
        except (OSError, asyncio.IncompleteReadError):
            if b"/devices/register " in request[:100]:  # it may have been committed all the same
                self._note_register(party, request, sent_at, 0)
            raise Cut from None
        finally:
            writer.transport.abort()
        self._note(party, request, answer, sent_at)
        return answer

    # -- what was said --------------------------------------------------------------------------------------

    def _note(self, party: Party, request: bytes, answer: bytes, sent_at: float) -> None:
        method, target, _ = request.split(b"\r\n", 1)[0].decode().split(" ")
        status = int(answer.split(b" ", 2)[1])
        path = urlsplit(target).path.removeprefix("/api/distribution")
        call: dict[str, Any] = {"party": party.name, "from": sent_at, "to": time.monotonic(), "status": status}
        if path == "/devices/register":
            self._note_register(party, request, sent_at, status)
        if status >= 500:
            self.calls.append({**call, "f": "refused", "path": path, "answer": body_of(answer).decode()[:500]})
        if status != 200:
            return
        if path == "/tasks/pull":
            device = parse_qs(urlsplit(target).query)["device_id"][0]
            given = [task["assignment_id"] for task in json.loads(body_of(answer))["tasks"]]
            if given:
                self.calls.append({**call, "f": "pull", "device": device, "given": given})
        elif path == "/tasks/report":
            sent, said = json.loads(body_of(request)), json.loads(body_of(answer))
            reports = [
                [entry["assignment_id"], entry["outcome"], (entry.get("result") or {}).get("token"), verdict["outcome"]]
                for entry, verdict in zip(sent["reports"], said["reports"], strict=True)
            ]
            self.calls.append({**call, "f": "report", "device": sent["device_id"], "reports": reports})
        elif path.endswith("/heartbeat") and method == "POST":
            self.calls.append({**call, "f": "beat", "device": path.split("/")[2]})

    def _note_register(self, party: Party, request: bytes, sent_at: float, status: int) -> None:
        device = json.loads(body_of(request))["device_id"]
        call = {"party": party.name, "from": sent_at, "to": time.monotonic(), "status": status, "device": device}
        self.calls.append({**call, "f": "register"})


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Head and body of one request or answer."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise OSError(str(error)) from None
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        assert name.lower() != b"transfer-encoding", "the proxy knows no chunks"
    return head + await reader.readexactly(length)


def body_of(message: bytes) -> bytes:
    return message.split(b"\r\n\r\n", 1)[1]
