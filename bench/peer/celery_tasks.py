"""The no-op task of celery, on Redis."""

from __future__ import annotations

import os

from celery import Celery

from bench.peer.witness import witness

app = Celery("peer", broker=os.environ["PEER_REDIS"])
if os.environ.get("PEER_TUNED"):
    app.conf.update(
        task_ignore_result=True,
        worker_prefetch_multiplier=128,
        broker_pool_limit=1,
        worker_send_task_events=False,
        task_acks_late=False,
    )


@app.task
def noop() -> None:
    witness()


def submit(total: int) -> None:
    with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
        for _ in range(total):
            noop.apply_async(producer=producer)
