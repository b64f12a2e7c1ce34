"""Every fuzzing target takes its seeds and some mutations of them, always the same; the fuzzer finds what it should."""

from __future__ import annotations

import os
import time

import pytest
from fuzz import engine
from fuzz.engine import Found, Target, fuzz, smaller
from fuzz.targets import TARGETS, bounded

# How many inputs: about a second of each.
COUNTS = {"queue": 4000, "mmio": 800, "pci": 250, "entropy": 500, "block": 120, "overlay": 60, "network": 500,
          "console": 150, "balloon": 300, "vsock": 150, "share": 100, "vhost-user": 60, "manifest": 4000,
          "archive": 300}


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str) -> None:
    with bounded():
        assert fuzz(name, TARGETS[name], count=COUNTS[name], seed=1) >= COUNTS[name]


def test_every_target_is_counted():
    assert set(COUNTS) == set(TARGETS)


def test_a_crash_is_found_and_made_smaller():
    def run(data: bytes) -> None:
        at = data.find(b"\xff\xff")
        if 0 <= at < len(data) - 20:
            raise IndexError(at)

    target = Target(run, (bytes(200),))
    with pytest.raises(Found) as info:
        fuzz("planted", target, seconds=20)
    assert isinstance(info.value.error, IndexError)
    least = smaller("planted", target, info.value)
    assert len(least.data) <= 24 and b"\xff\xff" in least.data and least.data.hex() in str(least)


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SECONDS_EACH", 0.2)

    def run(data: bytes) -> None:
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("the alarm was caught on its way")

    with pytest.raises(Found, match=r"Hang: more than 0\.2 s"):
        fuzz("planted", Target(run, ()), count=1)


def test_a_leak_is_found():
    left: list[int] = []
    with pytest.raises(Found, match="1 descriptors were left open"):
        fuzz("planted", Target(lambda data: left.append(os.open("/dev/null", os.O_RDONLY)), ()), count=1)
    os.close(left[0])


def test_the_same_seed_gives_the_same_inputs():
    seen: list[list[bytes]] = []
    for seed in (1, 1, 2):
        seen.append([])
        fuzz("planted", Target(seen[-1].append, (b"one seed", b"another")), count=100, seed=seed)
    assert seen[0] == seen[1] != seen[2]
