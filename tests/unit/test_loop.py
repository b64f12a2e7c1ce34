"""The I/O loop: calls and timers, from its own thread and from others."""

from __future__ import annotations

import threading

from hv.machine.loop import Loop


def test_timers_run_in_time_and_can_be_cancelled_by_one_another():
    loop, seen = Loop(), []
    first = loop.call_later(0.01, lambda: (seen.append("first"), loop.cancel(second)))
    second = loop.call_later(0.01, lambda: seen.append("second"))
    third = loop.call_later(0.02, lambda: seen.append("third"))
    fourth = loop.call_later(0.001, lambda: seen.append("fourth"))
    loop.cancel(fourth)
    loop.cancel(fourth)         # twice does no harm
    assert loop.run_until(lambda: "third" in seen, 5)
    assert seen == ["first", "third"]
    loop.cancel(first)
    loop.cancel(third)
    loop.close()


def test_no_call_and_no_timer_of_another_thread_is_lost():
    loop, seen = Loop(), []

    def add() -> None:
        for number in range(2000):
            loop.call(lambda number=number: seen.append(number))
            loop.call_later(0.0, lambda number=number: seen.append(number))

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert loop.run_until(lambda: len(seen) == 12000, 30), len(seen)
    for thread in threads:
        thread.join()
    loop.close()
