"""Bytes in flight: never over the total, and nobody waits for ever."""

from __future__ import annotations

import random
import threading
import time

import pytest
from conftest import within

from weightops.engine.budget import Budget, Cancelled


def test_no_more_than_the_total_is_ever_out() -> None:
    budget = Budget(1000)
    out, most, seen = 0, 0, threading.Lock()

    def work(seed: int) -> None:
        nonlocal out, most
        chance = random.Random(seed)
        for _ in range(200):
            nbytes = chance.randint(0, 1000)
            budget.take(nbytes)
            with seen:
                out += nbytes
                most = max(most, out)
            if not chance.randrange(20):
                time.sleep(0.0001)
            with seen:
                out -= nbytes
            budget.give(nbytes)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert 0 < most <= budget.peak <= 1000
    budget.take(1000)  # everything was given back


def test_the_peak_is_the_most_that_was_out_at_once() -> None:
    budget = Budget(100)
    budget.take(30)
    budget.take(40)
    budget.give(40)
    budget.take(20)
    assert budget.peak == 70


def test_who_asks_for_more_than_is_left_waits_until_it_is_given_back() -> None:
    budget = Budget(100)
    budget.take(60)
    taken = threading.Event()

    def take() -> None:
        budget.take(50)
        taken.set()

    threading.Thread(target=take, daemon=True).start()
    assert not taken.wait(0.05)
    budget.give(5)
    assert not taken.wait(0.05)
    budget.give(5)
    assert taken.wait(5)
    assert budget.peak == 100


def test_cancel_wakes_everyone_who_waits() -> None:
    budget = Budget(100)
    budget.take(100)
    woken: list[str] = []

    def take() -> None:
        try:
            budget.take(1)
        except Cancelled:
            woken.append("cancelled")

    threads = [threading.Thread(target=take, daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    assert not budget.cancelled
    budget.cancel()
    for thread in threads:
        thread.join(5)
    assert woken == ["cancelled"] * 5
    assert budget.cancelled


def test_nothing_is_handed_out_after_cancel() -> None:
    budget = Budget(100)
    budget.cancel()
    with pytest.raises(Cancelled):
        within(5, lambda: budget.take(1))


def test_what_never_fits_is_refused_rather_than_waited_for() -> None:
    with pytest.raises(ValueError, match="101 bytes never fit into a budget of 100"):
        within(5, lambda: Budget(100).take(101))
