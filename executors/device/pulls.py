"""How does a device get its tasks, and how does the master reach it at once? One pull is always open."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Callable, NamedTuple, Optional

from executors.device.holding import Held, Holding
from executors.device.link import MasterClient, Unreachable, number
from executors.device.machine import boot_clock
from settings import Settings

PULL_EXTRA_SECONDS = 10.0
FULL_SECONDS = 0.3
FULL_TICK_SECONDS = 1.0


class Wish(NamedTuple):
    """What a device wants now: as many tasks as slots are free, and of each short type so many to wait for a slot."""

    limit: int
    ahead: dict[str, int]


class Pulls:
    """Two threads: `pull` asks for tasks while there is room; when there is none for a moment, `listen` takes over.

    A request on its way cannot be changed, so the two have a connection each. The pulls of `pull` are numbered, and
    each acknowledges the one before; those of `listen` bring no tasks and are outside of that count."""

    def __init__(
        self,
        settings: Settings,
        boot_id: str,
        holding: Holding,
        clients: dict[str, MasterClient],
        registered: threading.Event,
        stopping: threading.Event,
        *,
        wish: Callable[[], Wish],
        take: Callable[[list[Held]], None],
        follow: Callable[[dict[str, Any]], bool],
    ) -> None:
        """`wish`: what the device wants now; `take` gets new tasks; `follow` gets every reply, and says whether there
        was news in it."""
        self._holding, self._clients, self._registered, self._stopping = holding, clients, registered, stopping
        self._wish, self._take, self._follow = wish, take, follow
        self._wait_seconds = settings.pull_wait_seconds
        self._query = {"device_id": settings.device_id, "boot_id": boot_id}
        self._seq = self._ack = 0
        self._open_limit = 0  # of the pull that is on its way
        self._is_unanswered = False  # the master may still hold the last pull, and answer it with tasks
        self._is_full = threading.Event()  # for more than a moment: time to listen
        self._empty_pause = 0.0

    def pull(self) -> None:
        """Wait until the device wants tasks, then one pull."""
        wish = self._wait_for_a_wish()
        if wish is not None:
            self._pull(wish)

    def _wait_for_a_wish(self) -> Optional[Wish]:
        """The wish, as soon as there is one; an empty one to take back a pull that was cut; None: it must register.

        Tasks shorter than FULL_SECONDS cost no listening."""
        until = time.monotonic() + FULL_SECONDS
        with self._holding.changed:
            while not any(wish := self._wish()) and self._registered.is_set():
                if self._is_unanswered:
                    return wish
                left = until - time.monotonic()
                if left <= 0:
                    self._is_full.set()
                self._holding.changed.wait(left if left > 0 else FULL_TICK_SECONDS)
        self._is_full.clear()
        return wish if any(wish) else None

    def _pull(self, wish: Wish) -> None:
        """Only one for a free slot is held: nothing must come for a queue that has emptied meanwhile."""
        self._seq += 1
        limit = wish.limit
        wait = self._wait_seconds if limit else 0
        query = {**self._query, "limit": limit, "wait": f"{wait:g}", "seq": self._seq, "ack": self._ack}
        if wish.ahead:
            query["ahead"] = ",".join(f"{task_type}:{count}" for task_type, count in wish.ahead.items())
        started = time.monotonic()
        self._open_limit, self._is_unanswered = limit, True
        try:
            reply = self._clients["pull"].get("/tasks/pull", query, wait + PULL_EXTRA_SECONDS)
        finally:
            self._open_limit = 0
        self._is_unanswered = False
        delivered = boot_clock()
        tasks = reply.get("tasks")
        if not isinstance(tasks, list) or not all(self._is_task(task) for task in tasks):
            raise Unreachable("answered a pull without a list of tasks", was_broken=True)
        added = self._holding.add(tasks, delivered)
        self._ack = self._seq
        if added:
            self._take(added)
        self._follow(reply)
        self._pause_if_useless(limit, wait, reply, time.monotonic() - started)

    @staticmethod
    def _is_task(task: Any) -> bool:
        return isinstance(task, dict) and isinstance(task.get("lease_id"), str) and bool(task.get("assignment_id"))

    def _pause_if_useless(self, limit: int, wait: float, reply: dict[str, Any], took: float) -> None:
        """A master that cannot hold a pull answers at once and says when to come again. The wait resets on work."""
        if reply["tasks"] or reply.get("cancel") or not limit or took >= min(wait, 1.0) / 2 > 0:
            self._empty_pause = 0.0
            return
        self._empty_pause = min(2.0, max(0.05, 2 * self._empty_pause))
        self._stopping.wait(random.uniform(0.5, 1) * number(reply.get("next_seconds"), self._empty_pause, 0.05, 60))

    def take_back(self) -> None:
        """The device wants no more tasks: cut the pull that asks for some; the next one ends it at the master."""
        if self._open_limit:
            self._clients["pull"].cut()

    def listen(self) -> None:
        """While the device is full: one pull with limit 0, for cancel[] and drain."""
        self._is_full.wait()
        query = {**self._query, "limit": 0, "wait": f"{self._wait_seconds:g}"}
        started = time.monotonic()
        reply = self._clients["listen"].get("/tasks/pull", query, self._wait_seconds + PULL_EXTRA_SECONDS)
        was_held = time.monotonic() - started >= min(self._wait_seconds, 1.0) / 2
        if not self._follow(reply) and not was_held and self._is_full.is_set():
            time.sleep(number(reply.get("next_seconds"), 1.0, 1.0, 60) * random.uniform(0.5, 1))
