"""What did submitters ask for, and what were they promised? One producer: `producer.py URL HISTORY NAME SEED`;
with `hasty` behind it, it pauses less, and its tasks take no time.

It submits tasks until SIGTERM and appends each call to HISTORY twice: before it is sent, and when it is answered. A
call without an answer is repeated with the same keys, as every submitter should; what is never answered stays unknown,
which is neither lost nor kept. SIGKILL may end it anywhere.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import secrets
import signal
import sys
import time
from typing import Any
from urllib.parse import urlsplit

CALL_SECONDS = 3.0
PATIENCE_SECONDS = 20.0
MOST_UNFINISHED = 300
USERS = 6
API = "/api/distribution"


class Producer:
    def __init__(self, url: str, history: str, name: str, seed: int, *, is_hasty: bool) -> None:
        address = urlsplit(url)
        self.host, self.port = address.hostname or "", address.port or 80
        self.history = os.open(history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.name = f"{name}-{secrets.token_hex(3)}"  # keys of two lives must differ
        self.random = random.Random(seed)
        self.is_hasty = is_hasty
        self.count = 0
        self.is_stopping = False
        self.recent: list[int] = []

    def note(self, **facts: Any) -> None:
        os.write(self.history, (json.dumps({"t": time.monotonic(), **facts}) + "\n").encode())

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of one answer; OSError or HTTPException when there is none."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=CALL_SECONDS)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, API + path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def call_until_answered(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """The first answer that is not "later"; (0, None) when patience is at its end."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            try:
                status, answer = self.call(method, path, body)
            except (OSError, http.client.HTTPException, ValueError):
                status, answer = 0, None
            if status and status != 503:
                return status, answer
            time.sleep(self.random.uniform(0.05, 0.4))
        return 0, None

    def submit(self) -> None:
        tasks = [self.task() for _ in range(self.random.randint(1, 12 if self.is_hasty else 4))]
        keys = [[t.get("batch", ""), t["unique_key"], t["task_data"]["act"]] for t in tasks]
        self.note(f="submit", keys=keys)
        status, answer = self.call_until_answered("POST", "/tasks", tasks)
        ids = [task["id"] for task in answer["tasks"]] if status in (200, 201) else None
        self.note(f="submitted", keys=keys, ids=ids, status=status, answer=None if ids else answer)
        self.recent = [*self.recent, *(ids or ())][-20:]

    def task(self) -> dict[str, Any]:
        r = self.random
        self.count += 1
        is_shared = r.random() < 0.1  # the other producers submit the same key in the same second
        key = f"shared-{int(time.monotonic())}" if is_shared else f"{self.name}-{self.count}"
        act = "" if is_shared else r.choices(["", "fail", "snooze", "spawn"], [80, 8, 4, 8])[0]
        seconds = round(r.uniform(0.3, 1.5) if r.random() < 0.2 else r.uniform(0, 0.15), 3)
        if self.is_hasty:
            seconds = 0.0
        task: dict[str, Any] = {
            "task_type": "torture",
            "unique_key": key,
            "priority": r.randint(1, 10),
            "execution_timeout_seconds": 60,
            "task_data": {"key": key, "seconds": seconds, "act": act},
        }
        if is_shared or r.random() < 0.5:
            task["batch"] = "torture"
        if r.random() < 0.75:  # the others stand under no limit, so devices may take them ahead of a slot
            task["username"] = f"user-{r.randrange(USERS)}"
        if r.random() < 0.05:
            task["delay_seconds"] = 0.5
        return task

    def cancel(self) -> None:
        task_id = self.random.choice(self.recent)
        self.note(f="cancel", id=task_id)
        status, _ = self.call_until_answered("POST", f"/tasks/{task_id}/cancel", {})
        self.note(f="cancelled", id=task_id, status=status)

    def wait_while_much_waits(self) -> None:
        while not self.is_stopping:
            status, stats = self.call_until_answered("GET", "/tasks/stats", None)
            states = stats["by_state"] if status == 200 else {}
            if sum(states.get(s, 0) for s in ("scheduled", "pending", "assigned", "running")) < MOST_UNFINISHED:
                return
            time.sleep(0.3)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "is_stopping", True))
        while not self.is_stopping:
            self.submit()
            if self.recent and self.random.random() < 0.04:
                self.cancel()
            if self.random.random() < 0.1:
                self.wait_while_much_waits()
            time.sleep(self.random.uniform(0.02, 0.12) / (20 if self.is_hasty else 1))


if __name__ == "__main__":
    url, history, name, seed, *pace = sys.argv[1:]
    Producer(url, history, name, int(seed), is_hasty="hasty" in pace).run()
