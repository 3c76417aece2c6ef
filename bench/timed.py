"""What does each step of a task cost? The shipped master or worker, with a stopwatch around its steps.

`timed.py --config FILE` is started by bench/profile.py; the config's mode says which program it is. At its end the CPU
seconds of each step, of the thread that does it, are in FILE.times. Put around the code from outside, so that what is
shipped has no stopwatch in it; a function that is renamed there fails here.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Stopwatch:
    """CPU seconds of each step, without the steps inside of it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._here = threading.local()
        self._lock = threading.Lock()

    def around(self, owner: Any, name: str, step: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            outer, self._here.inner = getattr(self._here, "inner", 0.0), 0.0
            started = time.thread_time()
            try:
                return original(*arguments, **more)
            finally:
                took = time.thread_time() - started
                with self._lock:
                    self.seconds[step] += took - self._here.inner
                self._here.inner = outer + took

        setattr(owner, name, call)


def time_master(watch: Stopwatch) -> Callable[[], int]:
    import api
    import db
    import dispatcher
    import judging
    import master
    import store
    import web
    import writer

    watch.around(web._Endpoint, "__call__", "every request: access, query, JSON of the reply")
    watch.around(api.Api, "submit_tasks", "submit: read the body, build the answer")
    watch.around(api.Api, "pull_tasks", "deliver: build the reply to a pull")
    watch.around(api.Api, "report_tasks", "report: read the body, build the answer")
    watch.around(db, "submit", "submit: write the tasks")
    watch.around(dispatcher.Dispatcher, "_open", "dispatch: book the pull")
    watch.around(dispatcher.Dispatcher, "dispatch", "dispatch: choose tasks and devices")
    watch.around(db, "assign", "dispatch: write the attempts")
    watch.around(judging, "apply_reports", "report: judge and write")
    watch.around(writer.Writer, "_write", "commit, savepoints, waking who waits")
    watch.around(store.Store, "_tell", "log and events")
    return lambda: master.main()


def time_worker(watch: Stopwatch) -> Callable[[], int]:
    import worker
    from executors import task_executor
    from executors.device import holding, link, pulls, reports

    watch.around(link.MasterClient, "_call", "every request: HTTP, JSON of the reply")
    watch.around(pulls.Pulls, "_pull", "deliver: take the tasks of a pull")
    watch.around(worker.Worker, "_run", "execute: a slot's own work")
    watch.around(task_executor, "run", "execute: call the executor, keep its log")
    watch.around(holding.Holding, "next_queued", "execute: take the next from the queue")
    watch.around(reports.Reporter, "put", "report: encode")
    watch.around(reports.Reporter, "journal", "report: write to the spool")
    watch.around(reports.Reporter, "send", "report: send, read the answers")
    return lambda: worker.main()


def main() -> int:
    config = Path(sys.argv[sys.argv.index("--config") + 1])
    watch = Stopwatch()
    program = time_worker if json.loads(config.read_text())["mode"] == "worker" else time_master
    try:
        return program(watch)()
    finally:
        config.with_suffix(".times").write_text(json.dumps(watch.seconds))


if __name__ == "__main__":
    sys.exit(main())
