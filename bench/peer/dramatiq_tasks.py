"""The no-op task of dramatiq, on Redis."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from bench.peer.witness import witness

dramatiq.set_broker(RedisBroker(url=os.environ["PEER_REDIS"]))


@dramatiq.actor(max_retries=0)
def noop() -> None:
    witness()


def submit(total: int) -> None:
    for _ in range(total):
        noop.send()
