"""Which waiting task goes to whom, now?

A device is a candidate while its pull is open: the assignment is written in the transaction that answers that pull, so
`assigned` always means "in a reply". Dispatch runs in the writer, at the end of every group of writes that changed
something, and in the same commit.

A device may let short tasks wait for its slots (`ahead`); it gets them where no device that asks has a free slot.

Tasks wait in lanes (what decides where and when they may go). Open lanes with a fitting device are served by top
priority, then the least recently served first, each with an even share of the free slots; inside a lane by priority,
then age. A lane whose limits have no room is closed until they have (limits.py). So half a million tasks that nobody
may run cost nothing, and one account does not starve another.

The strategy suggests a device for each task; what it may not choose is decided here.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import json
import logging
import math
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import db
import devices
import limits
from schema import FAILURES_TO_PROBATION
from store import Store
from strategies import Candidate, Strategy, find_strategy, least_tasks
from transaction import Note, Tx
from writer import StorageFailing, WriterBusy, WriterStopped

log = logging.getLogger("af.dispatcher")

CANDIDATE_LIMIT = 64
LANE_LIMIT = 500
"""Fitting lanes looked at in one dispatch; the next one goes on with those served least recently."""
TASKS_A_VISIT = 500
BUSY_POLL_SECONDS = (5.0, 40.0)
BUSY_POLLS_A_SECOND = 200
"""When no more polls can be held, the other devices are told to ask again after this long: so many of them come in a
second that they leave the master most of its time."""


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
    start_within: float | None


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
    task_data: str


class Lane(NamedTuple):
    id: int
    task_type: str
    required_tags: str
    pinned_device_id: str
    prefer_device_id: str
    same_device_as: str
    prefer_seconds: float
    shape: str
    waiting: int
    top_priority: int
    last_served: int


class Ask:
    """One open pull. Open until it is taken by a dispatch, answered, or given up by its own thread.

    `drain` is what its device is wanted to do; every reply says it. `ahead`: of each short type, how many make up the
    work that may wait on the device for a slot; `ahead_left` is the part of it that is not given yet."""

    def __init__(self, device_id: str, boot_id: str | None, limit: int, seq: int | None, ack: int | None,
                 ahead: Mapping[str, int], key_id: int | None = None) -> None:  # fmt: skip
        self.device_id = device_id
        self.boot_id = boot_id
        self.limit = limit
        self.seq = seq
        self.ack = ack
        self.ahead = ahead
        self.key_id = key_id
        self.ahead_left = 1.0
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
    def wants_tasks(self) -> bool:
        return self.limit > 0 or bool(self.ahead)

    @property
    def has_room(self) -> bool:
        return self.free > 0 or any(self.room_ahead(task_type) > 0 for task_type in self.ahead)

    def room_ahead(self, task_type: str) -> int:
        return int(self.ahead_left * self.ahead.get(task_type, 0) + 0.001)

    def use(self, task_type: str, *, is_ahead: bool) -> None:
        """It gets a task, for a free slot or to wait for one."""
        if is_ahead:
            self.ahead_left -= 1 / self.ahead[task_type]
        else:
            self.free -= 1

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


class Round:
    """One dispatch: who still asks, what was given to whom, and what is known of devices and limits by now."""

    def __init__(self, tx: Tx, asks: list[Ask], devices_online: int) -> None:
        self.tx = tx
        self.asks = asks
        self._devices_online = max(1, devices_online)
        self.ahead: Counter[tuple[str, int]] = Counter()
        """(device, lane) -> how many it got to wait for a slot"""
        self.given: dict[str, tuple[Ask, list[Delivery]]] = {}
        self.loads_known: set[str] = set()
        self.seen: set[int] = set()
        self._gates: dict[int, limits.Gate] = {}
        self._gates_of: dict[int, list[limits.Gate]] = {}

    @property
    def has_gates(self) -> bool:
        return bool(self._gates)

    def fitting(self, lane: Lane) -> list[Ask]:
        """Those with a free slot; where there is none, those that let a short task wait for one."""
        tags = _tags_of(lane)
        fitting = [ask for ask in self.asks if _fits(ask, lane, tags)]
        return [ask for ask in fitting if ask.free > 0] or [ask for ask in fitting if self.room(ask, lane) > 0]

    def room(self, ask: Ask, lane: Lane) -> int:
        """Nobody gets more ahead than its share of the lane, for others will ask in a moment; and nothing that waits
        on a device may take the place of what could run elsewhere under a limit."""
        if ask.free > 0 or self.gates(lane):
            return ask.free
        share = lane.waiting // self._devices_online - self.ahead[ask.device_id, lane.id]
        return min(ask.room_ahead(lane.task_type), share)

    def gates(self, lane: Lane) -> list[limits.Gate]:
        """What the lane's tasks have to pass; each key is looked at once in a dispatch."""
        if lane.id not in self._gates_of:
            keys = limits.keys_of_lane(self.tx, lane.id) if lane.shape else ()
            for key in keys:
                if key not in self._gates:
                    self._gates[key] = limits.Gate(self.tx, key)
            self._gates_of[lane.id] = [self._gates[key] for key in keys]
        return self._gates_of[lane.id]


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
        self._ended_keys: set[int | None] = set()
        """by their ids: what comes with one of them gets nothing"""
        self._held_polls = 0
        self._lock = threading.Lock()
        self._stopping = False
        self._turns: int | None = None
        self._assignments = 0
        self._failing: set[str] = set()
        """devices that get one task at a time"""
        self._patience: dict[int, tuple[str, float, str]] = {}
        """lane -> the device that its tasks wait for, until when, and the lane's same_device_as; worked out again when
        it is lost, by a walk along the lane"""
        self._may_something_go = True
        self.next_look_at = math.inf
        """When time alone may let a task go: the scheduler asks for a dispatch then."""
        self.configured_strategy = strategy
        self.strategy_name = strategy
        self._strategy: Strategy = find_strategy(strategy)
        store.dispatch = self.dispatch
        store.listeners += [presence.hear, self.hear]

    # -- from the handlers' threads ---------------------------------------------------------------------------

    def pull(self, device_id: str, boot_id: str | None, limit: int, wait: float, seq: int | None = None,
             ack: int | None = None, ahead: Mapping[str, int] = MappingProxyType({}),
             key_id: int | None = None) -> Reply:  # fmt: skip
        """Opens a pull and holds it for at most `wait` seconds, or until there is something to say.

        Raises UnknownDevice, Superseded, DeviceConflict, and what Store.write raises.
        """
        ask = Ask(device_id, boot_id, limit, seq, ack, ahead, key_id)
        if not self._reopen(ask):
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
            others = len(self._presence.online) - self._max_held_polls
            seconds = min(max(BUSY_POLL_SECONDS[0], others / BUSY_POLLS_A_SECOND), BUSY_POLL_SECONDS[1])
            reply.next_seconds = seconds * random.uniform(0.5, 1.5)
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
            elif self._failing and note.verb in ("complete", "fail") and note.facts["device"] in self._failing:
                with contextlib.suppress(WriterBusy, WriterStopped):  # the next pull comes anyway
                    self._store.writer.post(self._store.want_dispatch)
            elif note.verb == "device_revoked":
                self._say(note.facts["device"])
            elif note.verb == "device_wanted":
                self._say(note.facts["device"], drain=note.facts["status"] != "active")

    def _say(self, device_id: str, *, drain: bool | None = None) -> None:
        ask = self._asks.get(device_id)
        if ask is not None and ask.take():
            ask.answer(Reply(cancel=self._cancels.pop(device_id, []), drain=ask.drain if drain is None else drain))

    def _reopen(self, ask: Ask) -> bool:
        """Opens a pull without the writer, which has nothing to book: its device holds nothing, nothing waits for
        anybody, and there is nothing to say. A dispatch that begins later finds it."""
        device = self._presence.idle_device(ask.device_id, ask.boot_id)
        if device is None or device.wanted != "active" or self._told.get(ask.device_id, False):
            return False
        self._describe(ask, device)
        with self._lock:
            may_wait = not self._may_something_go and not self._stopping and ask.device_id not in self._cancels
            if not may_wait or ask.key_id in self._ended_keys or self._is_overtaken(ask):
                return False
            older = self._asks.pop(ask.device_id, None)
            self._asks[ask.device_id] = ask
            if self._presence.idle_device(ask.device_id, ask.boot_id) is not device:
                # Something was said to the device meanwhile, perhaps before this pull could hear it.
                del self._asks[ask.device_id]
                if older is not None:
                    self._asks[ask.device_id] = older
                return False
        if older is not None and older.take():
            older.answer(Reply())
        self._presence.seen[ask.device_id] = self._store.moments()[0]
        return True

    # -- inside the writer's transaction ----------------------------------------------------------------------

    def end_keys(self, key_ids: Sequence[int]) -> None:
        """The job revokes these keys: pulls that came with them are answered, and from here on none gets a task."""
        with self._lock:
            ended = set(key_ids) - self._ended_keys
            self._ended_keys |= ended
            asks = [ask for ask in self._asks.values() if ask.key_id in ended]
        self._store.writer.when_undone(lambda: self._ended_keys.difference_update(ended))
        for ask in filter(Ask.take, asks):
            for when in (self._store.writer.when_committed, self._store.writer.when_undone):
                when(functools.partial(ask.answer, Reply(drain=ask.drain)))

    def _open(self, tx: Tx, ask: Ask) -> None:
        """Books a pull: what was acknowledged, what has to be sent again, and a place among those that ask."""
        if ask.key_id in self._ended_keys:
            ask.take()
            self._store.writer.when_committed(lambda: ask.answer(Reply()))
            return
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
        elif (drain and ask.wants_tasks) or (ask.limit == 0 and drain is not self._told.get(ask.device_id, False)):
            # Said once; the device then asks with limit 0, or with its free slots, and that pull is held as usual.
            ask.take()
            self._store.writer.when_committed(lambda: ask.answer(Reply(drain=drain)))
        elif ask.wants_tasks:
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
        self.next_look_at = math.inf
        with self._lock:
            self._may_something_go = True  # before the open pulls are looked at: one that comes later asks the writer
        held = tx.execute(_HELD_SQL).fetchall()
        self._failing = {name for scope, name in held if scope == "failing"}
        has_closed_keys = ("look_at", None) not in held
        if ("all", "") in held or not (has_closed_keys or ("open", 1) in held):
            self._may_something_go = False
            return  # so that a thousand idle devices cost nothing while nothing waits
        with self._lock:
            # A device that said goodbye is not seen any more; a pull that it left behind would swallow a task.
            present = self._presence.seen
            asks = [ask for ask in self._asks.values() if ask.is_open and ask.wants_tasks and ask.device_id in present]
        now = Round(tx, self._with_room(tx, asks), len(self._presence.online))
        if not now.asks:
            return
        if has_closed_keys:
            limits.reopen(tx)
        task_types = {name for ask in now.asks for name in ask.task_types if ("type", name) not in held}
        is_more = True
        while now.asks and is_more:
            lanes, is_more = self._open_lanes(now, sorted(task_types))
            self._serve(now, lanes)
        if has_closed_keys or now.has_gates or self._patience:
            self.next_look_at = min(limits.next_look(tx) or math.inf, self._next_patience(tx.now))
        for ask, deliveries in now.given.values():
            self._reply_with(ask, deliveries)

    def _with_room(self, tx: Tx, asks: Iterable[Ask]) -> list[Ask]:
        """A device that fails everything has one slot: it must not eat the queue."""
        for ask in asks:
            ask.free = ask.limit
            if ask.device_id in self._failing:
                ask.free, ask.ahead = (0 if db.active_attempts(tx, ask.device_id) else min(1, ask.limit)), {}
        return [ask for ask in asks if ask.has_room]

    def _open_lanes(self, now: Round, task_types: Sequence[str]) -> tuple[list[Lane], bool]:
        """Open lanes that some asking device fits, the first to be served first, and whether there may be more.

        They are read as far as slots are free, so that many lanes cost no more than those that are served.
        """
        lanes: list[Lane] = []
        wanted = min(2 * sum(ask.free for ask in now.asks) + 10, LANE_LIMIT - len(now.seen))
        streams = [_lanes_of(now.tx, task_type) for task_type in task_types]
        for lane in heapq.merge(*streams, key=lambda lane: (-lane.top_priority, lane.last_served, lane.id)):
            if len(lanes) == wanted:
                return lanes, len(now.seen) < LANE_LIMIT
            if lane.id not in now.seen and now.fitting(lane) and not self._is_patient(now, lane):
                now.seen.add(lane.id)
                lanes.append(lane)
        return lanes, False

    def _serve(self, now: Round, lanes: Iterable[Lane]) -> None:
        """Visits these lanes by priority, in turn, until they are empty or nobody asks any more."""
        queue = [(-lane.top_priority, turn, lane) for turn, lane in enumerate(lanes)]
        turn = len(queue)
        peers = Counter(entry[0] for entry in queue)
        heapq.heapify(queue)
        while queue and now.asks:
            negative_priority, _, lane = heapq.heappop(queue)
            next_priority = self._visit(now, lane, -negative_priority, peers[negative_priority])
            peers[negative_priority] -= 1
            if next_priority is not None:
                turn += 1
                peers[-next_priority] += 1
                heapq.heappush(queue, (-next_priority, turn, lane))

    def _visit(self, now: Round, lane: Lane, priority: int, peers: int) -> int | None:
        """Gives the lane's share to devices; the priority of its next task, or None if nothing more can go now."""
        tx = now.tx
        fitting = now.fitting(lane)
        gates = now.gates(lane)
        room = min((gate.room for gate in gates), default=TASKS_A_VISIT)
        if not fitting:
            return None
        if room <= 0:
            next(gate for gate in gates if gate.room <= 0).close(lane.id)
            return None
        share = min(max(1, sum(now.room(ask, lane) for ask in fitting) // peers), TASKS_A_VISIT, room)
        waiting_since = math.inf
        if lane.prefer_seconds:
            preferred = self._preferred(tx, lane)
            if preferred is None:
                share = 1  # whoever gets it is where the next ones go
            elif any(ask.device_id == preferred for ask in fitting):
                fitting = [ask for ask in fitting if ask.device_id == preferred]
            else:
                waiting_since = tx.now - lane.prefer_seconds
                top = _top_priority(tx, lane, waiting_since)
                if top is None:
                    self._be_patient(tx, lane, preferred)
                    return None
                priority = top
        n = self._give(now, lane, _take_from(tx, lane, priority, share, waiting_since), fitting)
        if n == 0:
            return None
        for gate in gates:
            gate.start(n)
        tx.serve_lane(lane.id, self._next_turn(tx))
        now.asks = [ask for ask in now.asks if ask.has_room]
        return _top_priority(tx, lane)

    # -- tasks that would rather go to one device -------------------------------------------------------------

    def _preferred(self, tx: Tx, lane: Lane) -> str | None:
        """The device that served `same_device_as` last, or the one that the lane names."""
        row = tx.one("SELECT device_id FROM af_affinity WHERE name = ?", (lane.same_device_as,))
        return row[0] if row else lane.prefer_device_id or None

    def _be_patient(self, tx: Tx, lane: Lane, device_id: str) -> None:
        sql = "SELECT MIN(updated_at) FROM af_crawl_tasks WHERE lane_id = ? AND status = 'pending'"
        oldest = tx.one(sql, (lane.id,))[0]
        if oldest is not None:
            self._patience[lane.id] = (device_id, oldest + lane.prefer_seconds, lane.same_device_as)

    def _is_patient(self, now: Round, lane: Lane) -> bool:
        """Does every task of the lane still wait for a device that does not ask?"""
        if lane.id not in self._patience:
            return False
        device_id, until, _ = self._patience[lane.id]
        if until > now.tx.now and all(ask.device_id != device_id for ask in now.asks):
            return True
        del self._patience[lane.id]
        return False

    def _next_patience(self, now: float) -> float:
        return min((until for _, until, _ in self._patience.values() if until > now), default=math.inf)

    def _remember(self, tx: Tx, name: str, device_id: str) -> None:
        """From now on tasks with this same_device_as go there."""
        row = tx.one("SELECT device_id FROM af_affinity WHERE name = ?", (name,))
        if row is None or row[0] != device_id:
            self._patience = {
                lane_id: wait for lane_id, wait in self._patience.items() if wait[2] != name and wait[1] > tx.now
            }
        sql = "INSERT OR REPLACE INTO af_affinity (name, device_id, served_at) VALUES (?, ?, ?)"
        tx.execute(sql, (name, device_id, tx.now))

    # -- one task ---------------------------------------------------------------------------------------------

    def _next_turn(self, tx: Tx) -> int:
        """Grows with every visit, also over a restart."""
        if self._turns is None:
            self._turns = tx.one("SELECT COALESCE(MAX(last_served), 0) FROM af_lane")[0]
        self._turns += 1
        return self._turns

    def _give(self, now: Round, lane: Lane, tasks: Iterable[Waiting], fitting: list[Ask]) -> int:
        """Gives tasks to the fitting asks, one after the other; an ask that has no room left leaves the list."""
        chosen: dict[tuple[str, bool], list[Waiting]] = {}
        last = None
        for waiting in tasks:
            ask = self._choose(now, waiting, fitting) if fitting else None
            if ask is None:
                break
            if ask.device_id not in now.given and not self._take(ask):
                fitting.remove(ask)
                continue
            now.given.setdefault(ask.device_id, (ask, []))
            is_ahead = ask.free == 0
            chosen.setdefault((ask.device_id, is_ahead), []).append(waiting)
            now.ahead[ask.device_id, lane.id] += is_ahead
            ask.use(lane.task_type, is_ahead=is_ahead)
            if ask.free == 0 and not (is_ahead and now.room(ask, lane) > 0):
                fitting.remove(ask)
            ask.candidate.load += 1
            self._assignments += 1
            ask.candidate.last_assigned_seq = self._assignments
            last = ask
        for (device_id, is_ahead), waitings in chosen.items():
            ask, deliveries = now.given[device_id]
            within = db.START_WITHIN_SECONDS if is_ahead else None
            gift = db.Gift(device_id, ask.seq, ask.seq is None, within)
            assigned = db.assign(now.tx, [waiting.task for waiting in waitings], gift)
            deliveries += [_delivery(waiting, new, within) for waiting, new in zip(waitings, assigned, strict=True)]
        if lane.same_device_as and last is not None:
            self._remember(now.tx, lane.same_device_as, last.device_id)
        return sum(map(len, chosen.values()))

    def _take(self, ask: Ask) -> bool:
        """From here on the pull waits for this commit, and hears of it if it fails."""
        if not ask.take():
            ask.free, ask.ahead = 0, {}
            return False
        writer = self._store.writer
        text = "the assignment could not be stored"
        writer.when_undone(lambda: ask.answer(StorageFailing(text, writer.storage.retry_after)))
        return True

    def _choose(self, now: Round, waiting: Waiting, fitting: Sequence[Ask]) -> Ask:
        """The strategy's pick among at most CANDIDATE_LIMIT asking devices; not the one that just failed the task."""
        asks: Sequence[Ask] = fitting
        if waiting.task.avoid_device_id:
            asks = [ask for ask in fitting if ask.device_id != waiting.task.avoid_device_id] or fitting
        if len(asks) == 1:
            return asks[0]  # no choice, and no reason to count what it holds
        if len(asks) > CANDIDATE_LIMIT:
            asks = random.sample(asks, CANDIDATE_LIMIT)
        _load(now.tx, [ask.candidate for ask in asks if ask.device_id not in now.loads_known], now.loads_known)
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


def _tags_of(lane: Lane) -> list[str]:
    return json.loads(lane.required_tags) if lane.required_tags != "[]" else []


def _fits(ask: Ask, lane: Lane, tags: Sequence[str]) -> bool:
    if lane.pinned_device_id and lane.pinned_device_id != ask.device_id:
        return False
    return lane.task_type in ask.task_types and ask.tags.issuperset(tags)


_OPEN = (
    "FROM af_lane INDEXED BY lane_open WHERE waiting > 0 AND paused = 0 AND is_held = 0 AND is_stale = 0"
    " AND closed_by IS NULL"
)
_HELD_SQL = (
    f"SELECT 'failing', device_id FROM af_device WHERE consecutive_failures >= {FAILURES_TO_PROBATION}"
    " UNION ALL SELECT scope, name FROM af_pause"
    " UNION ALL SELECT 'look_at', MIN(look_at) FROM af_limit_key WHERE look_at IS NOT NULL"
    f" UNION ALL SELECT 'open', EXISTS (SELECT 1 {_OPEN})"
)
"""(failing, device), what is paused, when a closed key is to be looked at, whether any lane is open: in one
question, since it is asked often."""

_LANES_SQL = f"SELECT {', '.join(Lane._fields)} {_OPEN} AND task_type = ? ORDER BY top_priority DESC, last_served, id"


def _lanes_of(tx: Tx, task_type: str) -> Iterator[Lane]:
    """Open lanes of this type with waiting tasks, in serving order; read as far as they are asked for."""
    return map(Lane._make, tx.execute(_LANES_SQL, (task_type,)))


_WAITING_SQL = (
    f"SELECT {', '.join('task.' + name for name in db.Task._fields)}, task.username, task.app_id, task.start_date,"
    " task.end_date, task.parent_id, COALESCE(payload.task_data, '{}')"
    " FROM af_crawl_tasks AS task"
    " LEFT JOIN af_task_payload AS payload ON payload.task_id = task.id"
)


def _take_from(tx: Tx, lane: Lane, priority: int, limit: int, waiting_since: float) -> list[Waiting]:
    """The lane's oldest tasks of this priority that have been waiting at least since then."""
    width = len(db.Task._fields)
    rows = tx.execute(
        f"{_WAITING_SQL} WHERE task.lane_id = ? AND task.status = 'pending' AND task.priority = ?"
        " AND task.updated_at <= ? ORDER BY task.id LIMIT ?",
        (lane.id, priority, waiting_since, limit),
    ).fetchall()
    return [Waiting(db.Task(*row[:width]), *row[width:]) for row in rows]


def _top_priority(tx: Tx, lane: Lane, waiting_since: float = math.inf) -> int | None:
    """Of the lane's tasks that have been waiting at least since then."""
    row = tx.one(
        "SELECT priority FROM af_crawl_tasks WHERE lane_id = ? AND status = 'pending' AND updated_at <= ?"
        " ORDER BY priority DESC, id LIMIT 1",
        (lane.id, waiting_since),
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
        f"SELECT {', '.join(db.Attempt._fields)} FROM af_task_assignment {db.HELD} AND device_id = ?"
        " AND delivered_at IS NULL ORDER BY id",
        (ask.device_id,),
    ).fetchall()
    again = []
    width = len(db.Task._fields)
    for attempt in map(db.Attempt._make, attempts):
        row = tx.one(f"{_WAITING_SQL} WHERE task.id = ?", (attempt.task_id,))
        waiting = Waiting(db.Task(*row[:width]), *row[width:])
        assigned = db.Assigned(attempt.id, attempt.lease_id, waiting.task.attempt_count)
        again.append(_delivery(waiting, assigned, attempt.start_within(tx.now)))
    return again


def _delivery(waiting: Waiting, assigned: db.Assigned, start_within: float | None) -> Delivery:
    task = waiting.task
    return Delivery(
        task.id, assigned.assignment_id, assigned.lease_id, assigned.attempt, task.task_type, waiting.username,
        waiting.app_id, waiting.start_date, waiting.end_date, waiting.task_data, task.batch, task.priority,
        waiting.parent_id, task.execution_timeout, start_within,
    )  # fmt: skip
