"""The strategies give the numbers that their docstrings promise."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest
from world import World

import strategies
from strategies import Candidate, StrategyError, find_strategy


def run(name: str, devices: list[Candidate], tasks: int) -> list[str]:
    """Who gets each of so many tasks, with loads and turns kept as dispatch keeps them."""
    strategy = find_strategy(name)
    chosen = []
    for turn in range(1, tasks + 1):
        device = strategy(devices, None)
        device.load += 1
        device.last_assigned_seq = turn
        chosen.append(device.device_id)
    return chosen


def test_least_tasks_evens_the_loads_out() -> None:
    devices = [Candidate("A", load=2), Candidate("B", load=0), Candidate("C", load=1)]
    run("least_tasks", devices, 6)
    assert [device.load for device in devices] == [3, 3, 3]


def test_round_robin_takes_turns_whatever_they_hold() -> None:
    devices = [Candidate("A", load=9), Candidate("B"), Candidate("C")]
    assert "".join(run("round_robin", devices, 7)) == "ABCABCA"


def test_weighted_is_smooth() -> None:
    devices = [Candidate("A", weight=5), Candidate("B", weight=1), Candidate("C", weight=1)]
    assert "".join(run("weighted", devices, 14)) == "AABACAA" * 2


def test_weighted_counts_what_the_heartbeats_say_is_free() -> None:
    devices = [Candidate("busy", weight=4, cpu_usage=75.0), Candidate("idle", weight=1, cpu_usage=0.0)]
    assert collections.Counter(run("weighted", devices, 100)) == {"busy": 50, "idle": 50}


def test_a_device_at_full_load_is_not_shut_out() -> None:
    devices = [Candidate("full", memory_usage=100.0), Candidate("idle")]
    assert collections.Counter(run("weighted", devices, 105))["full"] == 5


def test_random_gives_each_about_its_share() -> None:
    strategies.random_module.seed(7)
    shares = collections.Counter(run("random", [Candidate(name) for name in "ABC"], 3000))
    assert all(920 <= shares[name] <= 1080 for name in "ABC")


OWN = """
def last(devices, task):
    return devices[-1]

class CustomLoadBalancer:
    def select_device(self, devices, task):
        return devices[0]

number = 7
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_strategies", None)


@pytest.mark.parametrize(("name", "gets"), [("my_strategies:last", "B"), ("my_strategies:CustomLoadBalancer", "A")])
def test_a_users_own_strategy_may_be_a_function_or_a_class(own_module: None, name: str, gets: str) -> None:
    assert find_strategy(name)([Candidate("A"), Candidate("B")], None).device_id == gets


@pytest.mark.parametrize("name", ["fastest", "my_strategies:nothing", "no_such_module:x", "my_strategies:number"])
def test_an_unknown_strategy_says_what_to_write(own_module: None, name: str) -> None:
    with pytest.raises(StrategyError, match=name):
        find_strategy(name)


def test_the_strategy_can_be_switched_while_tasks_flow(world: World) -> None:
    world.register("shop-1")
    world.submit()
    world.dispatcher.set_strategy("weighted")
    assert len(world.pull()) == 1
    with pytest.raises(StrategyError):
        world.dispatcher.set_strategy("fastest")
    assert world.dispatcher.strategy_name == "weighted"
