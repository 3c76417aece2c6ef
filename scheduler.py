"""What happens because time passed?

One thread runs the jobs, a table in `Scheduler`. The `schedule` library only ticks: what is due is decided by the rows,
with the moments that the store hands to each job, so a late tick is a late tick and nothing else. A job that raises is
logged and runs again at its next time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import schedule

import audit
import db
import devices
import history
import keys
import lanes
import limits
import retention
from dispatcher import Dispatcher
from store import Store
from transaction import MINUTE_FIELDS, Tx
from writer import StorageFailing

log = logging.getLogger("af.scheduler")

TICK_SECONDS = 0.5
PAUSE_TICKS_SECONDS = 30.0
"""A longer gap between two ticks means that this machine slept: devices get their full time again."""
RETURN_SECONDS = 60.0
"""After a start or a sleep, devices get this long to come back before a deadline takes their tasks."""
GOES_ON_SECONDS = 1.0
"""A job that returns True has more to do, and runs again at once, for so long."""
PROBE_BYTES = 256 * 1024
"""Written while the storage is in trouble: where this has room, reports and assignments have."""
CHUNK = 500
PAGES_A_RUN = 1000
MINUTES_KEPT_SECONDS = 2 * 86400.0
THINNED_AFTER_SECONDS = 3600.0
THINNED_TO_SECONDS = 300.0
AFFINITY_KEPT_SECONDS = 30 * 86400.0
"""Which device served a same_device_as last is forgotten when nothing came for so long."""


@dataclass(frozen=True)
class Times:
    """How often and how long, in seconds unless the name says days; from the settings."""

    dispatch_interval: float
    timeout_check_interval: float
    device_timeout: float
    retention_days: float
    heartbeat_retention_days: float
    event_retention_days: float
    audit_retention_days: float


class Deletion(NamedTuple):
    """The last time that retention deleted something, and how many tasks."""

    at: float
    tasks: int


class Scheduler:
    """Owns the ticking thread; `start` and `stop` it."""

    def __init__(
        self, store: Store, dispatcher: Dispatcher, presence: devices.Presence, times: Times,
        chores: Sequence[tuple[float, Callable[[], object]]] = (),
    ) -> None:  # fmt: skip
        """`chores` are jobs that run in this thread and not in the writer, because they wait for a disk."""
        self._store = store
        self._dispatcher = dispatcher
        self._presence = presence
        self._times = times
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.last_tick_at = 0.0
        self.last_deletion: Deletion | None = None
        self.deletes_from = 0.0
        """Before this moment nothing old is deleted (retention.py)."""
        self._may_have_probe = True
        self._deletes_on = False
        self._keys_seen = 0
        #             every (s)                      what happens
        self.jobs: tuple[tuple[float, Callable[[Tx], object]], ...] = (
            (times.dispatch_interval, self.dispatch),
            (1.0, self.promote_due),
            (1.0, self.release_overdue),
            (1.0, self.write_beats),
            (1.0, self.probe_storage),
            (times.timeout_check_interval, self.release_silent),
            (60.0, self.remember_time),
            (300.0, self.thin_heartbeats),
            (10.0, self.delete_finished),
            (600.0, self.roll_up),
            (1.0, self.reshape_lanes),
            (30.0, self.forget_lanes),
            (60.0, self.forget_events),
            (60.0, self.forget_audit),
        )
        self.chores = tuple(chores)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        self._stop.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        # Built here, because the library has no locks: one thread makes and runs the jobs.
        clock = schedule.Scheduler()
        for seconds, job in self.jobs:
            clock.every(max(1, round(seconds))).seconds.do(self._run_job, job)
        for seconds, chore in self.chores:
            clock.every(max(1, round(seconds))).seconds.do(self._run_chore, chore)
        while not self._stop.wait(self._pause()):
            self._notice_sleep()
            clock.run_pending()
            if self._dispatcher.next_look_at <= self._store.moments()[0]:
                self._run_job(self.dispatch)

    def _pause(self) -> float:
        """A tick, or less where a limit opens before that: 20 ms at least."""
        return min(TICK_SECONDS, max(0.02, self._dispatcher.next_look_at - self._store.moments()[0]))

    def _run_job(self, job: Callable[[Tx], object]) -> None:
        until = time.monotonic() + GOES_ON_SECONDS
        try:
            while self._store.write(job) is True and time.monotonic() < until and not self._stop.is_set():
                pass
        except StorageFailing:
            pass  # storage.py says so, once a minute
        except Exception:
            # Caught here because a job that raises would leave the library's loop and never run again.
            log.exception("%s failed; it runs again at its next time", job.__name__)

    def _run_chore(self, chore: Callable[[], object]) -> None:
        try:
            chore()
        except StorageFailing:
            pass
        except Exception:
            log.exception("%s failed; it runs again at its next time", chore.__name__)

    def _notice_sleep(self) -> None:
        now, _ = self._store.moments()
        if self.last_tick_at and now - self.last_tick_at > PAUSE_TICKS_SECONDS:
            slept = now - self.last_tick_at
            log.warning("no tick for %.0f s: this machine slept; devices get their full time again", slept)
            self._presence.watching_since = now
        self.last_tick_at = now

    # -- the jobs, in the writer ------------------------------------------------------------------------------

    def dispatch(self, tx: Tx) -> None:
        """The safety net under the dispatch that every change sets off."""
        tx.wants_dispatch = True

    def promote_due(self, tx: Tx) -> int:
        """Scheduled tasks whose time has come become pending; many at once are taken in chunks, a tick each."""
        return db.promote(tx, CHUNK)

    def release_overdue(self, tx: Tx) -> int:
        """Takes back tasks that are over their time and over the worker's own time to kill them, and what was given
        ahead of a free slot and has not begun."""
        if tx.now - self._presence.watching_since < min(RETURN_SECONDS, self._times.device_timeout):
            return 0
        if self._store.writer.storage.trouble:
            return 0
        return sum(db.release(tx, attempt, "timeout") is not None for attempt in db.overdue_attempts(tx, CHUNK))

    def write_beats(self, tx: Tx) -> None:
        """The beats of idle devices, all of this second together."""
        devices.write_beats(tx, self._presence)

    def probe_storage(self, tx: Tx) -> bool:
        """While the storage is in trouble: does it take writes again? Then devices get their full time, and before it
        the time that they were told to wait. True while the probe is there, to be removed by the next run."""
        storage = self._store.writer.storage
        if storage.trouble:
            sql = "INSERT OR REPLACE INTO af_meta (key, value) VALUES ('probe', zeroblob(?))"
            tx.execute(sql, (PROBE_BYTES,))
            self._store.writer.when_committed(lambda: self._go_on(tx.now))
            self._may_have_probe = True
            return True
        if self._may_have_probe:
            tx.execute("DELETE FROM af_meta WHERE key = 'probe'")
            self._may_have_probe, tx.wants_dispatch = False, True
        return False

    def _go_on(self, now: float) -> None:
        self._presence.watching_since = now + self._store.writer.storage.works()

    def release_silent(self, tx: Tx) -> int:
        """Takes back the tasks of devices that have been silent for device_timeout; none while nobody can be heard."""
        if self._store.writer.storage.trouble:
            return 0
        return devices.release_silent(tx, self._presence, self._times.device_timeout)

    def remember_time(self, tx: Tx) -> None:
        """The next start's clock does not begin before this moment, whatever the wall says then."""
        sql = "INSERT OR REPLACE INTO af_meta (key, value) VALUES ('last_now', ?)"
        tx.execute(sql, (repr(tx.now),))

    def thin_heartbeats(self, tx: Tx) -> None:
        """Beats older than an hour are kept one per five minutes, and none longer than their retention."""
        if tx.now < self.deletes_from:
            return
        tx.execute(
            "DELETE FROM af_device_heartbeat WHERE id IN (SELECT id FROM af_device_heartbeat WHERE heartbeat_at < ?"
            " ORDER BY heartbeat_at LIMIT ?)",
            (tx.now - self._times.heartbeat_retention_days * 86400.0, CHUNK * 10),
        )
        tx.execute(
            "DELETE FROM af_device_heartbeat WHERE heartbeat_at BETWEEN ? AND ? AND id NOT IN"
            " (SELECT MIN(id) FROM af_device_heartbeat WHERE heartbeat_at BETWEEN ? AND ?"
            " GROUP BY device_id, CAST(heartbeat_at / ? AS INTEGER))",
            (*self._thinned_span(tx), *self._thinned_span(tx), THINNED_TO_SECONDS),
        )

    @staticmethod
    def _thinned_span(tx: Tx) -> tuple[float, float]:
        """Whole five-minute cells that turned an hour old since the last runs; looking back twice as far is enough."""
        newest = (tx.now - THINNED_AFTER_SECONDS) // THINNED_TO_SECONDS * THINNED_TO_SECONDS
        return newest - 4 * THINNED_TO_SECONDS, newest - 0.001

    def delete_finished(self, tx: Tx) -> bool:
        """Retention: a small batch at a time, its pages given back to the disk; True while there is more of it."""
        if tx.now < self.deletes_from:
            return False
        deleted = retention.delete_finished(tx, tx.now - self._times.retention_days * 86400.0, CHUNK)
        give_pages_back(tx, PAGES_A_RUN)
        if deleted:
            before = self.last_deletion.tasks if self._deletes_on and self.last_deletion else 0
            self.last_deletion = Deletion(tx.now, before + deleted)
        self._deletes_on = deleted == CHUNK
        return self._deletes_on

    def roll_up(self, tx: Tx) -> bool:
        """A minute older than two days becomes part of its hour (but for batches), and hours go with the retention of
        tasks; True while there may be more of them. One at a time: each has a row for every device."""
        if tx.now < self.deletes_from:
            return False
        until = int(tx.now - MINUTES_KEPT_SECONDS) // 3600 * 3600
        minute: int | None = tx.one("SELECT MIN(minute_at) FROM af_minute WHERE minute_at < ?", (until,))[0]
        if minute is not None:
            sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in (*MINUTE_FIELDS, "duration_seconds"))
            tx.execute(
                "INSERT INTO af_hour (hour_at, scope, name, completed, failed, lost, snoozed, duration_seconds,"
                " duration_max_seconds) SELECT minute_at / 3600 * 3600, scope, name, completed, failed, lost, snoozed,"
                " duration_seconds, duration_max_seconds FROM af_minute WHERE minute_at = ? AND scope <> 'batch'"
                f" ON CONFLICT (hour_at, scope, name) DO UPDATE SET {sums},"
                " duration_max_seconds = max(duration_max_seconds, excluded.duration_max_seconds)",
                (minute,),
            )
            tx.execute("DELETE FROM af_minute WHERE minute_at = ?", (minute,))
        kept_since = tx.now - max(self._times.retention_days, 30.0) * 86400.0
        tx.execute("DELETE FROM af_hour WHERE hour_at < ?", (kept_since,))
        return minute is not None

    def reshape_lanes(self, tx: Tx) -> bool:
        """Limits were changed: waiting tasks go to the lanes that hold now."""
        return lanes.reshape(tx)

    def forget_lanes(self, tx: Tx) -> None:
        """Lanes, keys and starts that count for nothing any more, some thousands at a time."""
        lanes.forget_idle_lanes(tx, CHUNK * 4)
        limits.forget_starts(tx, CHUNK * 10)
        self._keys_seen = limits.forget_keys(tx, self._keys_seen, CHUNK * 4)
        lanes.forget_affinities(tx, tx.now - AFFINITY_KEPT_SECONDS, CHUNK)

    def forget_events(self, tx: Tx) -> bool:
        """What happened long ago; True while there is more of it."""
        if tx.now < self.deletes_from:
            return False
        return history.forget(tx, tx.now - self._times.event_retention_days * 86400.0, CHUNK) == CHUNK

    def forget_audit(self, tx: Tx) -> bool:
        """Who did what long ago, and keys that ended before that; True while there is more of it."""
        before = tx.now - self._times.audit_retention_days * 86400.0
        if tx.now < self.deletes_from:
            return False
        return max(audit.forget(tx, before, CHUNK), keys.forget_ended(tx, before, CHUNK)) == CHUNK

    def watch(self, now: float, wall: float) -> tuple[str, str] | None:
        """What a person should look at (attention.py)."""
        if now >= self.deletes_from:
            return None
        return "clock", (
            "This master started more than a day after the last moment that its database knows, so nothing old is"
            f" deleted for {(self.deletes_from - now) / 60:.0f} min. If this machine's clock is wrong, stop the master,"
            " set the clock and restore the newest backup."
        )


def give_pages_back(tx: Tx, limit: int) -> None:
    """Returns free pages to the disk. One call frees one page: Python steps a pragma without rows just once."""
    for _ in range(min(limit, tx.one("PRAGMA freelist_count")[0])):
        tx.execute("PRAGMA incremental_vacuum(1)")
