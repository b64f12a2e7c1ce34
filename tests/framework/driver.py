"""The mock driver (hv/testing.py), under the name that the tests here use."""

from __future__ import annotations

from hv.testing import BUFFERS, MEMORY, RINGS, Driver, EpollLoop, FakeInterrupts, FakeLoop, Ring

__all__ = ["BUFFERS", "MEMORY", "RINGS", "Driver", "EpollLoop", "FakeInterrupts", "FakeLoop", "Ring"]
