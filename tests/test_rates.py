"""How often may one ask?"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, cast

import pytest

import rates
from access import Refused, Who
from addresses import Addresses
from connections import Connections
from rates import BURST_SECONDS, Rates
from web import Gate

if TYPE_CHECKING:
    from audit import Audit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def let_in(limits: Rates, name: str, times: int, share: float = 1.0) -> int:
    return sum(limits.seconds_to_wait(name, share) == 0 for _ in range(times))


def test_so_much_at_once_as_in_five_seconds_and_then_at_the_rate() -> None:
    clock = Clock()
    limits = Rates(10, clock=clock)
    assert let_in(limits, "a", 500) == 10 * BURST_SECONDS
    clock.now += 1.0
    assert let_in(limits, "a", 500) == 10
    clock.now += 3600.0
    assert let_in(limits, "a", 500) == 10 * BURST_SECONDS, "silence is not saved up"


def test_over_a_long_time_the_rate_is_the_rate_however_it_is_asked() -> None:
    clock = Clock()
    limits = Rates(10, clock=clock)
    count = 0
    for _ in range(10_000):
        count += let_in(limits, "a", 1)
        clock.now += 0.01
    assert count == pytest.approx(10 * (100 + BURST_SECONDS), abs=2)


def test_after_the_seconds_it_says_the_next_one_is_let_in() -> None:
    clock = Clock()
    limits = Rates(0.25, clock=clock)
    while not (seconds := limits.seconds_to_wait("a")):
        pass
    clock.now += seconds - 0.01
    assert limits.seconds_to_wait("a") > 0
    clock.now += 0.02
    assert limits.seconds_to_wait("a") == 0


def test_names_are_apart_and_a_share_is_a_part() -> None:
    limits = Rates(10, clock=Clock())
    let_in(limits, "a", 500)
    assert let_in(limits, "b", 500, 0.2) == 10 * BURST_SECONDS * 0.2


def test_0_is_no_limit_and_remembers_nobody() -> None:
    limits = Rates(0)
    assert let_in(limits, "a", 1000) == 1000 and not limits._paid_at


def test_ever_new_names_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "NAMES_REMEMBERED", 100)
    limits = Rates(1, clock=Clock())
    let_in(limits, "busy", 500)
    for number in range(1000):
        limits.seconds_to_wait(f"stranger {number}")
        assert limits.seconds_to_wait("busy") > 0, "who goes on asking is not forgotten"
    assert len(limits._paid_at) == 100


def test_exactly_as_many_of_many_threads_are_let_in() -> None:
    limits = Rates(20, clock=Clock())
    barrier, counts = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait(60)
        counts.append(let_in(limits, "a", 100))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(counts) == 20 * BURST_SECONDS


def test_a_devices_token_has_a_fifth_and_the_key_of_the_configuration_no_limit_of_its_own() -> None:
    def let_in(who: Who) -> int:
        count = 0
        for _ in range(1000):
            with contextlib.suppress(Refused):
                gate.check_key(who)
                count += 1
        return count

    gate = Gate(Addresses(), Rates(10, clock=Clock()), Connections(10), cast("Audit", None))
    made = Who("made", "submitter", 3, None, "key", "192.168.1.7")
    assert let_in(made) == 10 * BURST_SECONDS
    assert let_in(made._replace(role="device", key_id=4, device_id="shop-1")) == 2 * BURST_SECONDS
    assert let_in(made._replace(key_id=0)) == 1000, "a whole fleet may have it"
    assert let_in(made._replace(key_id=5, address="127.0.0.1")) == 1000, "this machine asks as often as it likes"
    with pytest.raises(Refused, match="max_requests_per_second") as caught:
        gate.check_key(made)
    assert (caught.value.status, caught.value.code) == (429, "too_many_requests") and caught.value.headers[
        "Retry-After"
    ]
