"""A machine's part of a loop that serves many: it ends alone, and leaves nothing behind."""

from __future__ import annotations

import os
import threading
import time

import pytest

from hv.machine.iothread import IoThread
from hv.machine.loop import EPOLLIN, Loop
from hv.machine.share import Share


def share(loop: Loop) -> tuple[Share, list[Exception]]:
    errors: list[Exception] = []
    return Share(loop, errors.append), errors


def broken(*_: object) -> None:
    raise ZeroDivisionError("a handler's bug")


def test_what_one_machine_raises_ends_neither_the_loop_nor_the_others():
    loop = Loop()
    (bad, told), (good, silent) = share(loop), share(loop)
    reader, writer = os.pipe()
    seen: list[str] = []
    bad.call(broken)
    bad.call_later(0.001, broken)
    bad.add(reader, EPOLLIN, lambda events: (os.read(reader, 1), broken()))
    good.call(lambda: seen.append("call"))
    good.call_later(0.01, lambda: seen.append("timer"))
    os.write(writer, b"x")
    assert loop.run_until(lambda: len(seen) == 2 and len(told) == 3, 5), (seen, told)
    assert not silent
    bad.close()
    good.close()
    loop.close()
    os.close(reader)
    os.close(writer)


def test_after_close_nothing_runs():
    loop = Loop()
    gone, _ = share(loop)
    stays, _ = share(loop)
    reader, writer = os.pipe()
    seen: list[str] = []
    gone.add(reader, EPOLLIN, lambda events: seen.append("descriptor"))
    gone.call(lambda: seen.append("call"))
    gone.call_later(0.0, lambda: seen.append("timer"))
    os.write(writer, b"x")
    gone.close()
    gone.close()
    gone.call(lambda: seen.append("late call"))
    gone.call_later(0.0, lambda: seen.append("late timer"))
    assert not gone.add(reader, EPOLLIN, lambda events: seen.append("late descriptor"))
    stays.call_later(0.02, lambda: seen.append("end"))
    assert loop.run_until(lambda: "end" in seen, 5)
    assert seen == ["end"]
    loop.close()
    os.close(reader)
    os.close(writer)


def test_it_can_only_touch_its_own_descriptors():
    loop = Loop()
    one, _ = share(loop)
    other, _ = share(loop)
    reader, writer = os.pipe()
    seen: list[int] = []
    one.add(reader, EPOLLIN, lambda events: seen.append(os.read(reader, 1)[0]))
    other.remove(reader)
    other.modify(reader, 0)
    os.write(writer, b"\7")
    assert loop.run_until(lambda: bool(seen), 5)
    one.remove(reader)
    os.close(reader)
    os.close(writer)
    loop.close()


def test_close_waits_for_the_handler_under_way():
    thread = IoThread(lambda error: None)
    thread.start()
    part, _ = share(thread.loop)
    begun, over = threading.Event(), []
    part.call(lambda: (begun.set(), time.sleep(0.1), over.append(True)))
    assert begun.wait(5)
    part.close()
    assert over
    thread.stop()


def test_a_timer_can_be_cancelled_and_is_forgotten_once_it_ran():
    loop = Loop()
    part, _ = share(loop)
    seen: list[str] = []
    timer = part.call_later(0.001, lambda: seen.append("no"))
    part.cancel(timer)
    part.cancel(timer)
    part.call_later(0.002, lambda: seen.append("yes"))
    assert loop.run_until(lambda: bool(seen), 5)
    assert seen == ["yes"]
    assert not part._timers
    assert not loop._timers
    loop.close()


def test_run_there_runs_in_the_serving_thread_and_hands_errors_back():
    thread = IoThread(lambda error: None)
    thread.start()
    serving = threading.Event()
    thread.loop.call(serving.set)
    assert serving.wait(5)
    where: list[int] = []
    thread.loop.run_there(lambda: where.append(threading.get_ident()))
    assert where != [threading.get_ident()]
    with pytest.raises(ZeroDivisionError):
        thread.loop.run_there(broken)
    thread.loop.run_there(lambda: thread.loop.run_there(lambda: where.append(1)))       # from there: at once
    assert where[1:] == [1]
    thread.stop()


def test_run_there_runs_here_where_nobody_serves():
    loop = Loop()
    where: list[int] = []
    loop.run_there(lambda: where.append(threading.get_ident()))
    assert where == [threading.get_ident()]
    loop.close()


def test_who_looks_on_sees_the_end_and_serves_when_the_other_stops():
    loop = Loop()
    stop: list[bool] = []
    server = threading.Thread(target=lambda: loop.run_until(lambda: bool(stop)))
    server.start()
    seen: list[str] = []
    threading.Timer(0.05, lambda: loop.call(lambda: seen.append("x"))).start()
    assert loop.run_until(lambda: bool(seen), 5)
    assert not loop.run_until(lambda: False, 0.05)
    threading.Timer(0.05, lambda: (stop.append(True), loop.call(lambda: None))).start()
    threading.Timer(0.2, lambda: loop.call(lambda: seen.append("y"))).start()
    assert loop.run_until(lambda: len(seen) == 2, 5)        # now this thread serves
    server.join(5)
    assert not server.is_alive()
    loop.close()
