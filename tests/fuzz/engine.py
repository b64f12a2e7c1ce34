"""A small fuzzer: seeds, mutations of them, and mutations of those; the first input that a target can't take is kept.

There is no coverage to guide it. What makes up for that are seeds that reach the depths (a well-formed request each),
mutations that know of integers and of where requests begin, and a script form (fuzz/script.py) in which any bytes at
all are a sequence of legal and illegal steps. The same seed number gives the same inputs.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

LONGEST = 8192              # bytes of input
POOL = 256                  # inputs kept to go on from
SECONDS_EACH = 10.0         # no input may take longer
SECONDS_SMALLER = 30.0      # to make an input smaller
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 12, 15, 16, 31, 32, 44, 63, 64, 127, 128, 255, 256, 511, 512, 1023, 4095, 4096, 4097,
           0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x100000, 0xFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 40,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


class Target(NamedTuple):
    """`run(data)` must return, whatever the data; `seeds` are inputs that do something."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


class Found(Exception):
    """An input that the target could not take."""

    def __init__(self, name: str, data: bytes, error: BaseException) -> None:
        super().__init__(f"{name}: {type(error).__name__}: {error}\n  python -m fuzz {name} --input {data.hex()}")
        self.name, self.data, self.error = name, data, error


class Hang(BaseException):
    """An input that takes too long. Not an Exception: nothing in between may catch it."""


class FuzzLeak(AssertionError):
    """Descriptors stayed open."""


def _too_long(number: int, frame: object) -> None:
    raise Hang(f"more than {SECONDS_EACH} s")


def check(name: str, target: Target, data: bytes) -> None:
    """Run one input; Found where it raises, hangs or leaks descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    old = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_EACH)
    try:
        target.run(data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        after = len(os.listdir("/proc/self/fd"))
        if after > before:
            raise FuzzLeak(f"{after - before} descriptors were left open")
    except (Exception, Hang) as error:
        raise Found(name, data, error) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def mutate(dice: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` with one to eight changes."""
    made = bytearray(data)
    for _ in range(1 << dice.randrange(4)):
        at = dice.randrange(len(made) + 1)
        kind = dice.randrange(9)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << dice.randrange(8)
        elif kind == 1 and made:
            made[at % len(made)] = dice.randrange(256)
        elif kind in (2, 3):
            size = dice.choice((1, 2, 4, 8))
            number = dice.choice(NUMBERS) + dice.choice((0, 0, 0, -1, 1))
            made[at:at + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif kind == 4:
            del made[at:at + dice.randrange(1, 33)]
        elif kind == 5:
            made[at:at] = made[at:at + dice.randrange(1, 65)]
        elif kind == 6:
            made[at:at] = dice.randbytes(dice.randrange(1, 17))
        elif kind == 7:
            other = dice.choice(others)
            start = dice.randrange(len(other) + 1)
            made[at:at + dice.randrange(65)] = other[start:start + dice.randrange(1, 129)]
        else:
            made += dice.choice(others)
    return bytes(made[:LONGEST])


def fuzz(name: str, target: Target, *, count: int | None = None, seconds: float | None = None, seed: int = 0) -> int:
    """Run the seeds, then mutations, until `count` are done or `seconds` have passed; how many ran, or Found."""
    dice = random.Random(f"{name} {seed}")
    pool = list(target.seeds) or [b""]
    end = None if seconds is None else time.monotonic() + seconds
    done = 0
    for data in pool:
        check(name, target, data)
        done += 1
    while (count is None or done < count) and (end is None or time.monotonic() < end):
        data = mutate(dice, dice.choice(pool), pool)
        check(name, target, data)
        done += 1
        if dice.randrange(50) == 0:
            if len(pool) < POOL:
                pool.append(data)
            else:
                pool[dice.randrange(len(target.seeds), POOL)] = data
    return done


def smaller(name: str, target: Target, found: Found, tries: int = 400) -> Found:
    """The same failure from less input, if pieces of it can be left out."""
    kind, step, end = type(found.error), max(1, len(found.data) // 2), time.monotonic() + SECONDS_SMALLER
    while step and tries:
        at = 0
        while at < len(found.data) and tries and time.monotonic() < end:
            tries -= 1
            data = found.data[:at] + found.data[at + step:]
            try:
                check(name, target, data)
                at += step
            except Found as again:
                if type(again.error) is kind:
                    found = again
                else:
                    at += step
        step //= 2
    return found
