"""The no-op task of rq, on Redis."""

from __future__ import annotations

import os

import redis
from rq import Queue

from bench.peer.witness import witness


def noop() -> None:
    witness()


def submit(total: int) -> None:
    queue = Queue(connection=redis.Redis.from_url(os.environ["PEER_REDIS"]))
    left = total
    while left:
        count = min(1000, left)
        queue.enqueue_many([Queue.prepare_data(noop, result_ttl=0) for _ in range(count)])
        left -= count
