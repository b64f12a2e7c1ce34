"""The device in docs/adding-a-device.md works as printed."""

from __future__ import annotations

import re
from pathlib import Path

from framework.fakes import FakeIrq

from hv.devices.bus import PioBus

TEXT = (Path(__file__).resolve().parents[2] / "docs/adding-a-device.md").read_text()


def test_the_counter_counts_is_set_and_interrupts():
    names: dict[str, type] = {}
    exec(re.search(r"```python\n(from hv.devices.base.*?)```", TEXT, re.DOTALL).group(1), names)
    irq, bus = FakeIrq(), PioBus()
    counter = names["Counter"](irq.line)
    bus.add(counter, 0x510, 4, wide=True)
    assert bus.read(0x510, 4) == 1
    bus.write(0x510, 4, 0xFFFFFFFF)
    assert bus.read(0x510, 4) == 0 and irq.levels == [True, False]
    other = names["Counter"](irq.line)
    other.load(counter.state())
    assert other.read(0, 4) == 1
