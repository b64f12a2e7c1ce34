"""An interrupt line, as a device sees it."""

from __future__ import annotations

__all__ = ["IrqLine"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class IrqLine:
    """GSI `gsi` of a machine: `set_level(gsi, level)` drives it (VmFd.irq_line, or a fake in tests)."""

    __slots__ = ("_set_level", "gsi", "level")

    def __init__(self, set_level: Callable[[int, bool], None], gsi: int) -> None:
        self._set_level = set_level
        self.gsi = gsi
        self.level = False

    def set(self, level: bool) -> None:
        """Drive the line high or low; nothing happens when it already is."""
        if level != self.level:
            self.level = level
            self._set_level(self.gsi, level)

    def pulse(self) -> None:
        """Low to high to low: one edge-triggered interrupt."""
        self.set(False)
        self.set(True)
        self.set(False)
