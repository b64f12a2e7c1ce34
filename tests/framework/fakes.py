"""What a device model needs around it, without a VM."""

from __future__ import annotations

from hv.devices.irq import IrqLine


class FakeIrq:
    """Records every change of level; `line` is what the device gets."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.line = IrqLine(lambda gsi, level: self.levels.append(level), 4)

    @property
    def level(self) -> bool:
        return self.levels[-1] if self.levels else False
