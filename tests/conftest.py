"""Shared fixtures: skip by probed ability, with the reason printed."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm is absent or not accessible"
    for item in items:
        if "/kvm/" in str(item.path) and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _belongings() -> dict[str, set[str]]:
    """What this process holds that a test might leave behind."""
    descriptors = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            pass        # the one that listed the folder
    return {"descriptors": descriptors, "threads": set(os.listdir("/proc/self/task"))}


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once a file's tests and fixtures have ended, no descriptor and no thread of theirs is there."""
    if "/kvm/" not in str(request.path) and "/linux/" not in str(request.path):
        yield
        return
    before = _belongings()
    yield
    for _ in range(100):
        gc.collect()
        left = {kind: held - before[kind] for kind, held in _belongings().items()}
        if not any(left.values()):
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {left}")
