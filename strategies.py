"""Which of these devices should get this task?

A strategy is a function `select_device(devices, task)`, or an object with a method of that name. `devices` is a list of
1 to 64 fitting devices that are asking right now; it returns one of them. It suggests, the transaction decides: a
strategy that raises or returns anything else is logged, and least_tasks decides instead.

Your own: set load_balance_strategy to "my_module:name" (a function, a class or an object) in the master's config.
"""

from __future__ import annotations

import importlib
import random as random_module
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

BUSY_FLOOR = 0.05
"""A device that reports 100 % use still counts as 5 % free, so that it is never shut out by its own metrics."""


@dataclass
class Candidate:
    """A device as a strategy sees it. Percentages are 0..100 and None where the device does not report them."""

    device_id: str
    load: int = 0
    """tasks it holds now, assigned or running"""
    max_concurrent_tasks: int = 1
    weight: float = 1.0
    cpu_usage: float | None = None
    memory_usage: float | None = None
    last_assigned_seq: int = 0
    """grows with every assignment: the smallest was served longest ago"""
    credit: float = 0.0
    """the running account of `weighted`"""


Strategy = Callable[[Sequence[Candidate], Any], Candidate]


class StrategyError(ValueError):
    """No such strategy; the text says what to write instead."""


def least_tasks(devices: Sequence[Candidate], task: Any) -> Candidate:
    """The device with the fewest tasks, the longest unserved of them first.

    Loads 2, 0, 1 and six tasks: they end at 3, 3, 3.
    """
    return min(devices, key=lambda device: (device.load, device.last_assigned_seq, device.device_id))


def round_robin(devices: Sequence[Candidate], task: Any) -> Candidate:
    """Each device in its turn, whatever it holds: with A, B, C asking, seven tasks go A B C A B C A."""
    return min(devices, key=lambda device: (device.last_assigned_seq, device.device_id))


def weighted(devices: Sequence[Candidate], task: Any) -> Candidate:
    """Smooth weighted round robin over weight times what the heartbeats say is free.

    Weights 5, 1, 1, all idle: A A B A C A A, then again. A device of weight 4 at 75 % CPU counts as one of weight 1.
    Algorithm: nginx's smooth weighted round robin (each gains its weight, the richest pays the sum).
    """
    for device in devices:
        device.credit += _free_weight(device)
    chosen = max(devices, key=lambda device: device.credit)
    chosen.credit -= sum(_free_weight(device) for device in devices)
    return chosen


def random(devices: Sequence[Candidate], task: Any) -> Candidate:
    """Any of them, all equally likely: of 3,000 tasks over three devices each gets 1,000, give or take 80."""
    return random_module.choice(devices)


STRATEGIES: dict[str, Strategy] = {
    "least_tasks": least_tasks,
    "round_robin": round_robin,
    "weighted": weighted,
    "random": random,
}


def _free_weight(device: Candidate) -> float:
    used = max(device.cpu_usage or 0.0, device.memory_usage or 0.0) / 100.0
    return device.weight * max(BUSY_FLOOR, 1.0 - used)


def find_strategy(name: str) -> Strategy:
    """The strategy of that name, or the user's own by "module:name". Raises StrategyError."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    module_name, separator, attribute = name.partition(":")
    if not separator:
        raise StrategyError(f"no strategy {name!r}: write one of {', '.join(STRATEGIES)}, or module:name for your own")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        chosen = found() if isinstance(found, type) else found
    except Exception as error:
        raise StrategyError(f"strategy {name!r} cannot be loaded: {error}") from error
    select = getattr(chosen, "select_device", chosen)
    if not callable(select):
        raise StrategyError(f"strategy {name!r} is neither a function nor has a method select_device(devices, task)")
    strategy: Strategy = select
    return strategy
