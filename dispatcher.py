"""Which waiting task goes to whom, now?

A device is a candidate while its pull is open: the assignment is written in the transaction that answers that pull, so
`assigned` always means "in a reply". Dispatch runs in the writer, at the end of every group of writes that changed
something, and in the same commit.

Tasks wait in lanes (what decides where they may go). Open lanes with a fitting device are served by top priority, then
the least recently served first, each with an even share of the free slots; inside a lane by priority, then age. So
half a million tasks that nobody may run cost nothing, and one batch does not starve another.

The strategy suggests a device for each task; what it may not choose is decided here.
"""

from __future__ import annotations

import heapq
import json
import logging
import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import db
import devices
from store import Store
from strategies import Candidate, Strategy, find_strategy, least_tasks
from transaction import Note, Tx
from writer import StorageFailing

log = logging.getLogger("af.dispatcher")

CANDIDATE_LIMIT = 64
LANE_LIMIT = 500
"""Fitting lanes looked at in one dispatch; the next one goes on with those served least recently."""
TASKS_A_VISIT = 500
BUSY_POLL_SECONDS = 5.0
"""When no more polls can be held, a device is told to ask again after this long."""


class Delivery(NamedTuple):
    """One task as it goes to a device; task_data is JSON text."""

    id: int
    assignment_id: int
    lease_id: str
    attempt: int
    task_type: str
    username: str | None
    app_id: str | None
    start_date: str | None
    end_date: str | None
    task_data: str
    batch: str
    priority: int
    parent_id: int | None
    execution_timeout: int


@dataclass
class Reply:
    """What a pull brings: tasks, the attempts to stop, and whether to drain."""

    tasks: list[Delivery] = field(default_factory=list)
    cancel: list[int] = field(default_factory=list)
    drain: bool = False
    next_seconds: float = 0.0


class Waiting(NamedTuple):
    """A waiting task with all that its delivery carries."""

    task: db.Task
    username: str | None
    app_id: str | None
    start_date: str | None
    end_date: str | None
    parent_id: int | None
    prefer_device_id: str | None
    task_data: str


class Lane(NamedTuple):
    id: int
    task_type: str
    required_tags: str
    pinned_device_id: str
    prefer_device_id: str
    top_priority: int


class Ask:
    """One open pull. Open until it is taken by a dispatch, answered, or given up by its own thread.

    `drain` is what its device is wanted to do; every reply says it."""

    def __init__(self, device_id: str, boot_id: str | None, limit: int, seq: int | None, ack: int | None) -> None:
        self.device_id = device_id
        self.boot_id = boot_id
        self.limit = limit
        self.seq = seq
        self.ack = ack
        self.device: devices.Device | None = None
        self.task_types: frozenset[str] = frozenset()
        self.tags: frozenset[str] = frozenset()
        self.candidate = Candidate(device_id)
        self.free = limit
        self.drain = False
        self._state = "open"
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._reply: Reply | Exception = Reply()

    @property
    def is_open(self) -> bool:
        return self._state == "open"

    @property
    def only_listens(self) -> bool:
        """It asks for no task and is outside the count of pulls: it acknowledges nothing, and nothing is sent again."""
        return self.limit == 0 and self.seq is None

    def take(self) -> bool:
        """A dispatch wants to answer it; from then on its thread waits for the commit."""
        with self._lock:
            if self._state != "open":
                return False
            self._state = "taken"
            return True

    def answer(self, reply: Reply | Exception) -> None:
        self._reply = reply
        self._state = "answered"
        self._answered.set()

    def wait(self, seconds: float, commit_seconds: float = 30.0) -> Reply:
        """The reply, or an empty one after `seconds`. Raises what undid the dispatch."""
        if not self._answered.wait(seconds):
            with self._lock:
                if self._state == "open":
                    self._state = "closed"
                    return Reply(drain=self.drain)
            if not self._answered.wait(commit_seconds):
                raise TimeoutError(f"the reply to {self.device_id} was not durable within {commit_seconds:.0f} s")
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply


class Dispatcher:
    """Holds the open pulls and, inside the writer, gives waiting tasks to them."""

    def __init__(self, store: Store, presence: devices.Presence, *, strategy: str, max_held_polls: int) -> None:
        """Raises StrategyError. Call once; then the store's dispatch and listeners lead here."""
        self._store = store
        self._presence = presence
        self._max_held_polls = max_held_polls
        self._asks: dict[str, Ask] = {}
        self._candidates: dict[str, Candidate] = {}
        self._cancels: dict[str, list[int]] = {}
        self._told: dict[str, bool] = {}
        """device -> whether it was told to drain, last"""
        self._newest: dict[str, tuple[str, int]] = {}
        """device -> its process, and the highest number of a pull of it"""
        self._held_polls = 0
        self._lock = threading.Lock()
        self._stopping = False
        self._turns: int | None = None
        self._assignments = 0
        self.configured_strategy = strategy
        self.strategy_name = strategy
        self._strategy: Strategy = find_strategy(strategy)
        store.dispatch = self.dispatch
        store.listeners.append(self.hear)

    # -- from the handlers' threads ---------------------------------------------------------------------------

    def pull(self, device_id: str, boot_id: str | None, limit: int, wait: float, seq: int | None = None,
             ack: int | None = None) -> Reply:  # fmt: skip
        """Opens a pull and holds it for at most `wait` seconds, or until there is something to say.

        Raises UnknownDevice, Superseded, DeviceConflict, and what Store.write raises.
        """
        ask = Ask(device_id, boot_id, limit, seq, ack)
        self._store.write(self._open, ask)
        with self._lock:
            is_full = self._held_polls >= self._max_held_polls
            self._held_polls += not is_full
        try:
            reply = ask.wait(0.0 if is_full or self._stopping else wait)
        finally:
            with self._lock:
                self._held_polls -= not is_full
                if self._asks.get(device_id) is ask:
                    del self._asks[device_id]
        self._told[device_id] = reply.drain
        if is_full and not reply.tasks:
            reply.next_seconds = BUSY_POLL_SECONDS * random.uniform(0.5, 1.5)
        return reply

    @property
    def held_polls(self) -> int:
        return self._held_polls

    def is_asking(self, device_id: str) -> bool:
        ask = self._asks.get(device_id)
        return ask is not None and ask.is_open and ask.limit > 0

    def set_strategy(self, name: str) -> None:
        """Switches the strategy for the next dispatch. Raises StrategyError."""
        self._strategy, self.strategy_name = find_strategy(name), name

    def stop(self) -> None:
        """Answers every held pull at once with nothing, and holds no more."""
        self._stopping = True
        with self._lock:
            asks = list(self._asks.values())
        for ask in asks:
            if ask.take():
                ask.answer(Reply(drain=ask.drain, next_seconds=1.0))

    def forget_pulls(self, device_id: str) -> None:
        """The device registers: it may count its pulls anew."""
        self._newest.pop(device_id, None)

    # -- after a commit, in the writer's thread ---------------------------------------------------------------

    def hear(self, notes: list[Note]) -> None:
        """Wakes the pulls of devices that have something to stop, are to drain, or to go on."""
        for note in notes:
            if note.verb == "cancel_attempt":
                self._cancels.setdefault(note.facts["device"], []).append(note.facts["assignment"])
                self._say(note.facts["device"])
            elif note.verb == "device_wanted":
                self._say(note.facts["device"], drain=note.facts["status"] != "active")

    def _say(self, device_id: str, *, drain: bool | None = None) -> None:
        ask = self._asks.get(device_id)
        if ask is not None and ask.take():
            ask.answer(Reply(cancel=self._cancels.pop(device_id, []), drain=ask.drain if drain is None else drain))

    # -- inside the writer's transaction ----------------------------------------------------------------------

    def _open(self, tx: Tx, ask: Ask) -> None:
        """Books a pull: what was acknowledged, what has to be sent again, and a place among those that ask."""
        device = devices.check_device(tx, self._presence, ask.device_id, ask.boot_id)
        self._describe(ask, device)
        drain = ask.drain = device.wanted != "active"
        if self._is_overtaken(ask):
            ask.take()
            self._store.writer.when_committed(lambda: ask.answer(Reply(drain=drain)))
            return
        again = _unacknowledged(tx, ask) if ask.seq is not None else []
        with self._lock:
            older = self._asks.pop(ask.device_id, None)
            cancels = self._cancels.pop(ask.device_id, [])
            if not again and not cancels and not self._stopping:
                self._asks[ask.device_id] = ask
        if older is not None and older.take():
            older.answer(Reply(drain=drain))
        if again or cancels:
            ask.take()
            self._store.writer.when_committed(lambda: ask.answer(Reply(again, cancels, drain)))
        elif (drain and ask.limit > 0) or (ask.limit == 0 and drain is not self._told.get(ask.device_id, False)):
            # Said once; the device then asks with limit 0, or with its free slots, and that pull is held as usual.
            ask.free = 0
            ask.take()
            self._store.writer.when_committed(lambda: ask.answer(Reply(drain=drain)))
        elif ask.limit > 0:
            self._store.want_dispatch()

    def _is_overtaken(self, ask: Ask) -> bool:
        """Whether a newer pull of this process came before it: late on the network, it must not end that one.

        A device that is full listens on a second connection, without a number, while its next pull may be on its way.
        """
        older = self._asks.get(ask.device_id)
        if ask.only_listens:
            return older is not None and older.is_open and older.limit > 0 and older.boot_id == ask.boot_id
        if ask.seq is None or ask.boot_id is None:
            return False
        boot_id, newest = self._newest.get(ask.device_id, ("", 0))
        if boot_id == ask.boot_id and ask.seq < newest:
            return True
        self._newest[ask.device_id] = (ask.boot_id, ask.seq)
        return False

    def _describe(self, ask: Ask, device: devices.Device) -> None:
        ask.device = device
        ask.task_types = frozenset(json.loads(device.task_types))
        ask.tags = frozenset(json.loads(device.tags))
        ask.candidate = self._candidates.setdefault(ask.device_id, ask.candidate)
        ask.candidate.weight = device.weight
        ask.candidate.cpu_usage = device.cpu_usage
        ask.candidate.memory_usage = device.memory_usage
        ask.candidate.max_concurrent_tasks = device.max_concurrent_tasks

    def dispatch(self, tx: Tx) -> None:
        """Gives waiting tasks to the open pulls until one side runs out; their replies leave with the commit."""
        with self._lock:
            # A device that said goodbye is not seen any more; a pull that it left behind would swallow a task.
            present = self._presence.seen
            asks = [ask for ask in self._asks.values() if ask.is_open and ask.free > 0 and ask.device_id in present]
        if not asks:
            return
        given: dict[str, tuple[Ask, list[Delivery]]] = {}
        loads_known: set[str] = set()
        queue = [(-lane.top_priority, order, lane) for order, lane in enumerate(_open_lanes(tx, asks))]
        heapq.heapify(queue)
        while queue:
            negative_priority, order, lane = heapq.heappop(queue)
            fitting = [ask for ask in asks if ask.free > 0 and _fits(ask, lane)]
            if not fitting:
                continue
            peers = 1 + sum(1 for other in queue if other[0] == negative_priority)
            share = min(max(1, sum(ask.free for ask in fitting) // peers), TASKS_A_VISIT)
            waiting = _take_from(tx, lane, -negative_priority, share)
            for task in waiting:
                if fitting:
                    self._give(tx, task, fitting, given, loads_known)
            if waiting:
                tx.execute("UPDATE af_lane SET last_served = ? WHERE id = ?", (self._next_turn(tx), lane.id))
            top = _top_priority(tx, lane)
            if top is not None:
                heapq.heappush(queue, (-top, order + len(queue) + 1, lane))
        for ask, deliveries in given.values():
            self._reply_with(ask, deliveries)

    def _next_turn(self, tx: Tx) -> int:
        """Grows with every visit, also over a restart."""
        if self._turns is None:
            self._turns = tx.one("SELECT COALESCE(MAX(last_served), 0) FROM af_lane")[0]
        self._turns += 1
        return self._turns

    def _give(self, tx: Tx, waiting: Waiting, fitting: list[Ask], given: dict[str, tuple[Ask, list[Delivery]]],
              loads_known: set[str]) -> None:  # fmt: skip
        """Gives one task to one of the fitting asks; an ask that has no slot left leaves the list."""
        ask = self._choose(tx, waiting, fitting, loads_known)
        if ask.device_id not in given and not self._take(ask):
            fitting.remove(ask)
            return
        task = waiting.task
        assigned = db.assign(tx, task, ask.device_id, pull_seq=ask.seq, is_delivered=ask.seq is None)
        deliveries = given.setdefault(ask.device_id, (ask, []))[1]
        if assigned is None:
            return
        ask.free -= 1
        if ask.free == 0:
            fitting.remove(ask)
        ask.candidate.load += 1
        self._assignments += 1
        ask.candidate.last_assigned_seq = self._assignments
        deliveries.append(_delivery(waiting, assigned))

    def _take(self, ask: Ask) -> bool:
        """From here on the pull waits for this commit, and hears of it if it fails."""
        if not ask.take():
            ask.free = 0
            return False
        self._store.writer.when_undone(lambda: ask.answer(StorageFailing("the assignment could not be stored")))
        return True

    def _choose(self, tx: Tx, waiting: Waiting, fitting: Sequence[Ask], loads_known: set[str]) -> Ask:
        """The strategy's pick among at most CANDIDATE_LIMIT asking devices; not the one that just failed the task."""
        asks: Sequence[Ask] = fitting
        if waiting.task.avoid_device_id:
            asks = [ask for ask in fitting if ask.device_id != waiting.task.avoid_device_id] or fitting
        if waiting.prefer_device_id:
            asks = [ask for ask in fitting if ask.device_id == waiting.prefer_device_id] or asks
        if len(asks) > CANDIDATE_LIMIT:
            asks = random.sample(asks, CANDIDATE_LIMIT)
        _load(tx, [ask.candidate for ask in asks if ask.device_id not in loads_known], loads_known)
        candidates = [ask.candidate for ask in asks]
        try:
            chosen = self._strategy(candidates, waiting)
            return next(ask for ask in asks if ask.candidate is chosen)
        except Exception as error:
            what = "chose none of the devices offered" if isinstance(error, StopIteration) else f"raised {error!r}"
            log.error("strategy %s %s; least_tasks decides", self.strategy_name, what)
            chosen = least_tasks(candidates, waiting)
            return next(ask for ask in asks if ask.candidate is chosen)

    def _reply_with(self, ask: Ask, deliveries: list[Delivery]) -> None:
        with self._lock:
            if self._asks.get(ask.device_id) is ask:
                del self._asks[ask.device_id]
        self._store.writer.when_committed(lambda: ask.answer(Reply(deliveries)))


def _fits(ask: Ask, lane: Lane) -> bool:
    if lane.pinned_device_id and lane.pinned_device_id != ask.device_id:
        return False
    return lane.task_type in ask.task_types and ask.tags.issuperset(json.loads(lane.required_tags))


def _open_lanes(tx: Tx, asks: Iterable[Ask]) -> list[Lane]:
    """Lanes with waiting tasks, neither paused nor closed, that some asking device fits; in serving order."""
    lanes = []
    rows = tx.execute(
        f"SELECT {', '.join('lane.' + name for name in Lane._fields)} FROM af_lane AS lane"
        " LEFT JOIN af_batch AS batch ON batch.name = lane.batch WHERE lane.waiting > 0 AND lane.paused = 0"
        " AND (lane.closed_until IS NULL OR lane.closed_until <= ?) AND COALESCE(batch.state, 'open') = 'open'"
        " ORDER BY lane.top_priority DESC, lane.last_served",
        (tx.wall,),
    )
    for row in rows:
        lane = Lane(*row)
        if any(_fits(ask, lane) for ask in asks):
            lanes.append(lane)
            if len(lanes) == LANE_LIMIT:
                break
    return lanes


_WAITING_SQL = (
    f"SELECT {', '.join('task.' + name for name in db.Task._fields)}, task.username, task.app_id, task.start_date,"
    " task.end_date, task.parent_id, task.prefer_device_id, COALESCE(payload.task_data, '{}')"
    " FROM af_crawl_tasks AS task"
    " LEFT JOIN af_task_payload AS payload ON payload.task_id = task.id"
)


def _take_from(tx: Tx, lane: Lane, priority: int, limit: int) -> list[Waiting]:
    """The lane's oldest waiting tasks of its top priority."""
    width = len(db.Task._fields)
    rows = tx.execute(
        f"{_WAITING_SQL} WHERE task.lane_id = ? AND task.status = 'pending' AND task.priority = ?"
        " ORDER BY task.id LIMIT ?",
        (lane.id, priority, limit),
    ).fetchall()
    return [Waiting(db.Task(*row[:width]), *row[width:]) for row in rows]


def _top_priority(tx: Tx, lane: Lane) -> int | None:
    row = tx.one(
        "SELECT priority FROM af_crawl_tasks WHERE lane_id = ? AND status = 'pending'"
        " ORDER BY priority DESC, id LIMIT 1",
        (lane.id,),
    )
    return row[0] if row else None


def _load(tx: Tx, candidates: Sequence[Candidate], loads_known: set[str]) -> None:
    """Counts what these devices hold now, by the books."""
    if not candidates:
        return
    marks = ", ".join("?" * len(candidates))
    rows = tx.execute(
        f"SELECT device_id, COUNT(*) FROM af_task_assignment {db.HELD} AND device_id IN ({marks}) GROUP BY device_id",
        [candidate.device_id for candidate in candidates],
    )
    loads = dict(rows.fetchall())
    for candidate in candidates:
        candidate.load = loads.get(candidate.device_id, 0)
        loads_known.add(candidate.device_id)


def _unacknowledged(tx: Tx, ask: Ask) -> list[Delivery]:
    """Marks what the device has received by its ack; returns what it has not, to be sent with the same leases."""
    acknowledged = ask.ack if ask.ack is not None else -1
    tx.execute(
        f"UPDATE af_task_assignment SET delivered_at = ? WHERE id IN (SELECT id FROM af_task_assignment {db.HELD}"
        " AND device_id = ? AND delivered_at IS NULL AND pull_seq <= ?)",
        (tx.now, ask.device_id, acknowledged),
    )
    attempts = tx.execute(
        f"SELECT id, lease_id, task_id FROM af_task_assignment {db.HELD} AND device_id = ? AND delivered_at IS NULL"
        " ORDER BY id",
        (ask.device_id,),
    ).fetchall()
    again = []
    width = len(db.Task._fields)
    for assignment_id, lease_id, task_id in attempts:
        row = tx.one(f"{_WAITING_SQL} WHERE task.id = ?", (task_id,))
        waiting = Waiting(db.Task(*row[:width]), *row[width:])
        again.append(_delivery(waiting, db.Assigned(assignment_id, lease_id, waiting.task.attempt_count)))
    return again


def _delivery(waiting: Waiting, assigned: db.Assigned) -> Delivery:
    task = waiting.task
    return Delivery(
        task.id, assigned.assignment_id, assigned.lease_id, assigned.attempt, task.task_type, waiting.username,
        waiting.app_id, waiting.start_date, waiting.end_date, waiting.task_data, task.batch, task.priority,
        waiting.parent_id, task.execution_timeout,
    )  # fmt: skip
