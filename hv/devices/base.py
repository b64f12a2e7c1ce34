"""What every device model looks like. docs/adding-a-device.md walks through one."""

from __future__ import annotations

__all__ = ["Device"]


class Device:
    """A block of registers on a bus.

    `offset` counts from where the bus placed the device; `size` is 1, 2, 4 or 8 bytes. Calls come from
    vCPU threads, several at once when there are several vCPUs. Whatever the guest does, read and write
    return: a nonsensical access reads as all ones and writes nothing.
    """

    __slots__ = ()

    def read(self, offset: int, size: int) -> int:
        """The guest reads `size` bytes at `offset`; bits beyond them are ignored."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes `value`, which fits `size` bytes, to `offset`."""

    def reset(self) -> None:
        """Back to the state after power-on."""

    def state(self) -> dict[str, object]:
        """All that a snapshot must keep, as plain data (int, str, bytes, list, dict)."""
        return {}

    def load(self, state: dict[str, object]) -> None:
        """Take over what `state` returned, perhaps in another process and version. Untrusted."""
