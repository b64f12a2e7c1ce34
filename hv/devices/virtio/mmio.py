"""The virtio-mmio transport, version 2 (virtio 1.2, 4.2): a device's registers in one page of memory.

Notifications do not come here: machine/attach.py binds QueueNotify to event descriptors. Driven by
tests/unit/test_virtio_mmio.py.
"""

from __future__ import annotations

__all__ = ["LENGTH", "QUEUE_NOTIFY", "VirtioMmio"]

from _thread import allocate_lock

from hv.devices.base import Device
from hv.devices.virtio import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from hv.devices.virtio.device import VirtioDevice
    from hv.devices.virtio.queue import Queue

# register layout: 4.2.2, table 4.1
MAGIC_VALUE, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x010, 0x014, 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
QUEUE_DESC_LOW, QUEUE_DESC_HIGH = 0x080, 0x084
QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH = 0x090, 0x094
QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH = 0x0A0, 0x0A4
SHM_SEL, SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH = 0x0AC, 0x0B0, 0x0B4, 0x0B8, 0x0BC
QUEUE_RESET, CONFIG_GENERATION, CONFIG = 0x0C0, 0x0FC, 0x100

MAGIC = 0x74726976          # "virt"
VENDOR = 0x56485950         # "PYHV"
LENGTH = 0x1000
_ADDRESSES = {QUEUE_DESC_LOW: ("desc", 0), QUEUE_DESC_HIGH: ("desc", 32), QUEUE_DRIVER_LOW: ("avail", 0),
              QUEUE_DRIVER_HIGH: ("avail", 32), QUEUE_DEVICE_LOW: ("used", 0), QUEUE_DEVICE_HIGH: ("used", 32)}


class VirtioMmio(Device):
    """The registers of one device. `raise_line()` makes the interrupt (a pulse: the line is edge triggered)."""

    def __init__(self, device: VirtioDevice, raise_line: Callable[[], None]) -> None:
        self.device = device
        self._raise_line = raise_line
        # The device's thread sets bits, vCPUs clear them. Not the device's lock: that may wait for the host's disks.
        self._pending = allocate_lock()
        self._device_sel = self._driver_sel = self._queue_sel = 0
        self._interrupt_status = 0

    # for the device --------------------------------------------------------------------------------

    def queue_used(self, index: int) -> None:
        """Interrupt: requests were used."""
        with self._pending:
            self._interrupt_status |= ids.ISR_QUEUE
        self._raise_line()

    def config_changed(self) -> None:
        """Interrupt: the configuration space has changed, or the device needs a reset."""
        with self._pending:
            self._interrupt_status |= ids.ISR_CONFIG
        self._raise_line()

    # for the bus -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Registers are 32 bits wide and read whole (4.2.2.2); the configuration space in any width."""
        device = self.device
        if offset >= CONFIG:
            return device.read_config(offset - CONFIG, size)
        if size != 4 or offset & 3:
            device.fault(f"a read of {size} bytes at register {offset:#x}")
            return 0
        if offset == INTERRUPT_STATUS:
            return self._interrupt_status
        if offset == STATUS:
            return device.status
        if offset == DEVICE_FEATURES:
            return device.offered >> 32 * self._device_sel & 0xFFFFFFFF if self._device_sel < 2 else 0
        if offset == QUEUE_NUM_MAX:
            queue = self._queue()
            return queue.max_size if queue else 0
        if offset in (QUEUE_READY, QUEUE_RESET):
            queue = self._queue()
            return int(queue.ready) if queue and offset == QUEUE_READY else 0
        if offset in (SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH):
            return 0xFFFFFFFF       # no such region (4.2.2.1)
        return {MAGIC_VALUE: MAGIC, VERSION: 2, DEVICE_ID: device.ID, VENDOR_ID: VENDOR,
                CONFIG_GENERATION: device.generation}.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes to registers that can't be written change nothing and are counted."""
        device = self.device
        if offset >= CONFIG:
            device.put_config(offset - CONFIG, size, value)
            return
        if size != 4 or offset & 3:
            device.fault(f"a write of {size} bytes at register {offset:#x}")
            return
        if offset == INTERRUPT_ACK:
            with self._pending:
                self._interrupt_status &= ~value
        elif offset == QUEUE_NOTIFY:
            device.fault(f"a notification of queue {value}, which is not there")    # the others go to eventfds
        elif offset == STATUS:
            device.set_status(value & 0xFF)
            if not value & 0xFF:
                self.reset()
        elif offset == DEVICE_FEATURES_SEL:
            self._device_sel = value
        elif offset == DRIVER_FEATURES_SEL:
            self._driver_sel = value
        elif offset == DRIVER_FEATURES:
            if self._driver_sel < 2:
                device.select_features(self._driver_sel == 0, value)
            elif value:
                device.fault("features beyond bit 63")
        elif offset == QUEUE_SEL:
            self._queue_sel = value
        elif offset != SHM_SEL:
            self._write_queue(offset, value)

    def _write_queue(self, offset: int, value: int) -> None:
        device, queue = self.device, self._queue()
        if queue is None or offset not in (QUEUE_NUM, QUEUE_READY, QUEUE_RESET, *_ADDRESSES):
            device.fault(f"a write to register {offset:#x} of queue {self._queue_sel}")
        elif offset == QUEUE_READY:
            device.enable_queue(queue.index, bool(value & 1))
        elif offset == QUEUE_RESET:
            if value & 1:
                device.reset_queue(queue.index)
        elif queue.ready:
            device.fault(f"a write to register {offset:#x} of queue {queue.index} in use (4.2.2.2)")
        elif offset == QUEUE_NUM:
            queue.size = value
        else:
            name, shift = _ADDRESSES[offset]
            setattr(queue, name, getattr(queue, name) & ~(0xFFFFFFFF << shift) | value << shift)

    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_sel] if self._queue_sel < len(queues) else None

    def reset(self) -> None:
        """What a reset of the device does to the transport."""
        self._device_sel = self._driver_sel = self._queue_sel = 0
        self._interrupt_status = 0

    def state(self) -> dict[str, object]:
        """The selectors and the pending interrupt."""
        return {"device_sel": self._device_sel, "driver_sel": self._driver_sel, "queue_sel": self._queue_sel,
                "interrupt_status": self._interrupt_status}

    def load(self, state: dict[str, object]) -> None:
        """Take them over. Untrusted: ValueError where there is none; harmless in any value of 32 bits."""
        try:
            self._device_sel, self._driver_sel, self._queue_sel, self._interrupt_status = (
                int(state[name]) & 0xFFFFFFFF  # type: ignore[call-overload]
                for name in ("device_sel", "driver_sel", "queue_sel", "interrupt_status"))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"state of a transport: {type(error).__name__}: {error}") from None
