"""The virtio-pci transport, modern only (virtio 1.2, 4.1): a device's registers in one BAR, found by capabilities.

    0x0000  common configuration (4.1.4.3)      0x3000  notifications, 4 bytes for each queue (4.1.4.4)
    0x1000  ISR status (4.1.4.5)                0x4000  MSI-X table
    0x2000  device configuration (4.1.4.6)      0x6000  MSI-X pending bits

Each queue has a notification address of its own, which machine/attach_pci.py binds to its event descriptor wherever the
BAR is; what still arrives here is passed on. With MSI-X, an interrupt is a write to the vector's event descriptor;
without, it is ISR status and the INTx line. Left out on purpose: the legacy interface, shared memory, data in
notifications.
Driven by tests/unit/test_virtio_pci.py and tests/kvm/test_virtio_pci.py.
"""

from __future__ import annotations

__all__ = ["BAR_SIZE", "NOTIFY", "NOTIFY_STEP", "VirtioPci"]

import os
from _thread import allocate_lock

from hv.devices.pci.config import INTA, INTERRUPT_LINE, INTX_OFF, STATUS, STATUS_INTERRUPT, ConfigSpace
from hv.devices.pci.host import Function
from hv.devices.pci.msix import CAPABILITY as MSIX
from hv.devices.pci.msix import CONTROL_WRITABLE, Msix
from hv.devices.virtio import ids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hv.devices.pci.msix import Line
    from hv.devices.virtio.device import VirtioDevice
    from hv.devices.virtio.queue import Queue

VENDOR, DEVICE_BASE = 0x1AF4, 0x1040        # 4.1.2: the device's id is added
SUBSYSTEM = (VENDOR, 0x40)                  # 4.1.2.1: 0x40 or higher keeps legacy drivers away

# The BAR: a page or more for each structure.
COMMON, ISR, CONFIG, NOTIFY, TABLE, PENDING, BAR_SIZE = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x6000, 0x8000
NOTIFY_STEP = 4
MOST_QUEUES = 511                           # their vectors and the configuration's fill the table's two pages

# capabilities: 4.1.4
_VENDOR_SPECIFIC = 0x09
_COMMON_CFG, _NOTIFY_CFG, _ISR_CFG, _DEVICE_CFG, _PCI_CFG = 1, 2, 3, 4, 5
_CAP_LEN, _NOTIFY_CAP_LEN, _PCI_CAP_LEN = 16, 20, 20
_PCI_BAR, _PCI_OFFSET, _PCI_LENGTH, _PCI_DATA = 4, 8, 12, 16    # of the PCI configuration access capability (4.1.4.9)

# common configuration: 4.1.4.3
DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0x00, 0x04, 0x08, 0x0C
CONFIG_MSIX_VECTOR, NUM_QUEUES, DEVICE_STATUS, CONFIG_GENERATION = 0x10, 0x12, 0x14, 0x15
QUEUE_SELECT, QUEUE_SIZE, QUEUE_MSIX_VECTOR, QUEUE_ENABLE, QUEUE_NOTIFY_OFF = 0x16, 0x18, 0x1A, 0x1C, 0x1E
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE, QUEUE_RESET = 0x20, 0x28, 0x30, 0x3A
COMMON_LENGTH = 0x3C
NO_VECTOR = 0xFFFF

_SIZES = {DEVICE_FEATURE_SELECT: 4, DEVICE_FEATURE: 4, DRIVER_FEATURE_SELECT: 4, DRIVER_FEATURE: 4,
          CONFIG_MSIX_VECTOR: 2, NUM_QUEUES: 2, DEVICE_STATUS: 1, CONFIG_GENERATION: 1, QUEUE_SELECT: 2, QUEUE_SIZE: 2,
          QUEUE_MSIX_VECTOR: 2, QUEUE_ENABLE: 2, QUEUE_NOTIFY_OFF: 2, QUEUE_RESET: 2}
_ADDRESSES = {QUEUE_DESC: ("desc", 0), QUEUE_DESC + 4: ("desc", 32), QUEUE_DRIVER: ("avail", 0),
              QUEUE_DRIVER + 4: ("avail", 32), QUEUE_DEVICE: ("used", 0), QUEUE_DEVICE + 4: ("used", 32)}
_OF_QUEUE = (QUEUE_SIZE, QUEUE_MSIX_VECTOR, QUEUE_ENABLE, QUEUE_NOTIFY_OFF, QUEUE_RESET, *_ADDRESSES)


class VirtioPci(Function):
    """The function of one device.

    `lines` are the MSI-X vectors, one more than the device has queues; `set_intx(level)` drives the interrupt pin;
    `moved(base)` is told where the BAR answers, None: nowhere. `announce` completes it once the device is attached.
    """

    def __init__(self, device: VirtioDevice, lines: Sequence[Line], set_intx: Callable[[bool], None],
                 moved: Callable[[int | None], None]) -> None:
        super().__init__(ConfigSpace(VENDOR, DEVICE_BASE + device.ID, device.PCI_CLASS, subsystem=SUBSYSTEM, pin=INTA))
        self.device = device
        self.msix = Msix(lines, device.fault)
        self._moved = moved
        self._set_intx = set_intx
        self._isr_lock = allocate_lock()    # taken behind the device's: its thread and vCPUs change ISR status
        self._isr = 0
        self._level = False
        self._window = self._msix_at = 0
        self._reset_registers()

    def announce(self) -> None:
        """Add the capabilities. The device is attached, so that it is known what it has to show."""
        space, queues = self.space, len(self.device.queues)

        def structure(kind: int, length: int, offset: int, size: int, more: bytes = b"") -> bytes:
            """struct virtio_pci_cap behind its link: length, type, BAR 0, id, padding, offset, size (4.1.4)."""
            return bytes((length, kind, 0, 0, 0, 0)) + offset.to_bytes(4, "little") + size.to_bytes(4, "little") + more

        for body in (structure(_COMMON_CFG, _CAP_LEN, COMMON, COMMON_LENGTH),
                     structure(_NOTIFY_CFG, _NOTIFY_CAP_LEN, NOTIFY, NOTIFY_STEP * max(1, queues),
                               NOTIFY_STEP.to_bytes(4, "little")),
                     structure(_ISR_CFG, _CAP_LEN, ISR, 1)):
            space.add_capability(_VENDOR_SPECIFIC, body)
        if self.device.config():
            space.add_capability(_VENDOR_SPECIFIC, structure(_DEVICE_CFG, _CAP_LEN, CONFIG, NOTIFY - CONFIG))
        # 4.1.4.9: BAR, offset, length and the data are the driver's to write
        self._window = space.add_capability(_VENDOR_SPECIFIC, structure(_PCI_CFG, _PCI_CAP_LEN, 0, 0, bytes(4)),
                                            bytes((0, 0, 0xFF, 0, 0, 0)) + b"\xff" * 12)
        self._msix_at = space.add_capability(MSIX, self.msix.capability(TABLE, PENDING), CONTROL_WRITABLE)

    def wire(self, irq: int) -> None:
        """Note the interrupt that the pin is wired to, as firmware would (PCI 3.0, 6.2.4)."""
        self.space.put(INTERRUPT_LINE, 1, irq)

    def moved(self, base: int | None) -> None:
        """The bridge has placed the BAR."""
        self._moved(base)

    # for the device ------------------------------------------------------------------------------------

    def queue_used(self, index: int) -> None:
        """Interrupt: requests were used (4.1.5.3)."""
        if self.msix.enabled:
            self._send(self._vectors[index])
        else:
            self._raise(ids.ISR_QUEUE)

    def config_changed(self) -> None:
        """Interrupt: the configuration space has changed, or the device needs a reset (4.1.5.4)."""
        if self.msix.enabled:
            self._send(self._config_vector)
        else:
            self._raise(ids.ISR_CONFIG)

    def queue_fd(self, index: int) -> int | None:
        """An event descriptor that raises queue `index`'s interrupt when anybody writes to it, None with INTx.

        It keeps what is written while the vector is masked. The driver may choose another vector before DRIVER_OK only.
        """
        vector = self._vectors[index]
        return self.msix.lines[vector].fd if self.msix.enabled and vector != NO_VECTOR else None

    def _send(self, vector: int) -> None:
        if vector != NO_VECTOR:
            os.eventfd_write(self.msix.lines[vector].fd, 1)

    def _raise(self, bit: int) -> None:
        with self._isr_lock:
            self._isr |= bit
            self._drive()

    def _drive(self) -> None:
        """The pin and a status bit follow ISR status (4.1.4.5; PCI 3.0, 6.2.2, 6.2.3). With the ISR's lock held."""
        space, pending = self.space, bool(self._isr)
        space.put(STATUS, 2, space.get(STATUS, 2) & ~STATUS_INTERRUPT | (STATUS_INTERRUPT if pending else 0))
        level = pending and not self.msix.enabled and not space.command & INTX_OFF
        if level != self._level:
            self._level = level
            self._set_intx(level)

    # configuration space -------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """A read of the access capability's data is a read of the BAR (4.1.4.9.1)."""
        space = self.space
        if self._hits_window(offset, size):
            length, at = self._window_access()
            space.put(self._window + _PCI_DATA, 4, self.read(at, length) if length else 0xFFFFFFFF)
        return space.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A write may switch MSI-X or the interrupt pin, or be one to the BAR (4.1.4.9.1)."""
        space = self.space
        space.write(offset, size, value)
        self.msix.control(space.get(self._msix_at + 2, 2))
        with self._isr_lock:
            self._drive()
        if self._hits_window(offset, size):
            length, at = self._window_access()
            if length:
                self.write(at, length, space.get(self._window + _PCI_DATA, length))

    def _hits_window(self, offset: int, size: int) -> bool:
        data = self._window + _PCI_DATA
        return offset < data + 4 and data < offset + size

    def _window_access(self) -> tuple[int, int]:
        """(length, offset in the BAR) of the access that the capability stands for; length 0: none."""
        space, at = self.space, self._window
        length, offset = space.get(at + _PCI_LENGTH, 4), space.get(at + _PCI_OFFSET, 4)
        if space.get(at + _PCI_BAR, 1) or length not in (1, 2, 4) or offset % length or offset > BAR_SIZE - length:
            self.device.fault(f"a PCI configuration access of {length} bytes at {offset:#x} (4.1.4.9.2)")
            return 0, 0
        return length, offset

    # the BAR -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Registers in their own width (4.1.3.1)."""
        if offset < ISR:
            return self._read_common(offset, size)
        if offset >= PENDING:
            return self.msix.read_pending(offset - PENDING, size)
        if offset >= TABLE:
            return self.msix.read_table(offset - TABLE, size)
        if offset >= NOTIFY:
            return 0
        if offset >= CONFIG:
            return self.device.read_config(offset - CONFIG, size)
        if offset > ISR:
            return 0
        with self._isr_lock:        # 4.1.4.5.1: reading clears, and takes the interrupt away
            value, self._isr = self._isr, 0
            self._drive()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Writes to what can't be written change nothing and are counted."""
        device = self.device
        if offset < ISR:
            self._write_common(offset, size, value)
        elif CONFIG <= offset < NOTIFY:
            device.put_config(offset - CONFIG, size, value)
        elif TABLE <= offset < PENDING:
            self.msix.write_table(offset - TABLE, size, value)
        elif NOTIFY <= offset < TABLE and (offset - NOTIFY) // NOTIFY_STEP < len(device.kick_fds):
            os.eventfd_write(device.kick_fds[(offset - NOTIFY) // NOTIFY_STEP], 1)
        else:
            device.fault(f"a write of {size} bytes at {offset:#x} of the BAR")

    def _read_common(self, offset: int, size: int) -> int:
        device, queue = self.device, self._queue()
        if offset in _ADDRESSES and (size == 4 or (size == 8 and not offset & 7)):
            name, shift = _ADDRESSES[offset]
            return getattr(queue, name) >> shift & (1 << 8 * size) - 1 if queue else 0
        if _SIZES.get(offset) != size:
            device.fault(f"a read of {size} bytes at {offset:#x} of the common configuration (4.1.3.1)")
            return 0
        if offset in _OF_QUEUE:
            if queue is None:
                return 0            # 4.1.4.3.1: no such queue
            return {QUEUE_SIZE: queue.size, QUEUE_MSIX_VECTOR: self._vectors[queue.index],
                    QUEUE_ENABLE: int(queue.ready), QUEUE_NOTIFY_OFF: queue.index}.get(offset, 0)
        if offset == DEVICE_STATUS:
            return device.status
        if offset == DEVICE_FEATURE:
            return device.offered >> 32 * self._device_select & 0xFFFFFFFF if self._device_select < 2 else 0
        if offset == DRIVER_FEATURE:
            return device.features >> 32 * self._driver_select & 0xFFFFFFFF if self._driver_select < 2 else 0
        return {DEVICE_FEATURE_SELECT: self._device_select, DRIVER_FEATURE_SELECT: self._driver_select,
                CONFIG_MSIX_VECTOR: self._config_vector, NUM_QUEUES: len(device.queues),
                CONFIG_GENERATION: device.generation, QUEUE_SELECT: self._queue_select}[offset]

    def _write_common(self, offset: int, size: int, value: int) -> None:
        device = self.device
        if size == 8 and offset in _ADDRESSES and not offset & 7:
            self._write_queue(offset, value & 0xFFFFFFFF)
            self._write_queue(offset + 4, value >> 32)
        elif _SIZES.get(offset, 4 if offset in _ADDRESSES else 0) != size:
            device.fault(f"a write of {size} bytes at {offset:#x} of the common configuration (4.1.3.1)")
        elif offset in _OF_QUEUE:
            self._write_queue(offset, value)
        elif offset == DEVICE_STATUS:
            device.set_status(value)
            if value == 0:
                self.reset()
        elif offset == DEVICE_FEATURE_SELECT:
            self._device_select = value
        elif offset == DRIVER_FEATURE_SELECT:
            self._driver_select = value
        elif offset == DRIVER_FEATURE:
            if self._driver_select < 2:
                device.select_features(self._driver_select == 0, value)
            elif value:
                device.fault("features beyond bit 63")
        elif offset == CONFIG_MSIX_VECTOR:
            self._config_vector = self._vector(value)
        elif offset == QUEUE_SELECT:
            self._queue_select = value
        else:
            device.fault(f"a write to the read-only field {offset:#x} of the common configuration")

    def _write_queue(self, offset: int, value: int) -> None:
        device, queue = self.device, self._queue()
        if queue is None or offset == QUEUE_NOTIFY_OFF:
            device.fault(f"a write at {offset:#x} of the common configuration, queue {self._queue_select}")
        elif offset == QUEUE_MSIX_VECTOR:
            self._vectors[queue.index] = self._vector(value)
        elif offset == QUEUE_ENABLE:
            if value == 1:
                device.enable_queue(queue.index, True)
            else:
                device.fault(f"{value} written to queue_enable (4.1.4.3.2)")
        elif offset == QUEUE_RESET:
            if value == 1:
                device.reset_queue(queue.index)
        elif queue.ready:
            device.fault(f"a write at {offset:#x} of queue {queue.index} in use (4.1.4.3.2)")
        elif offset == QUEUE_SIZE:
            queue.size = value
        else:
            name, shift = _ADDRESSES[offset]
            setattr(queue, name, getattr(queue, name) & ~(0xFFFFFFFF << shift) | value << shift)

    def _vector(self, value: int) -> int:
        """What a vector register holds behind a write (4.1.5.1.2): NO_VECTOR where there is no such vector."""
        return value if value < len(self.msix.lines) else NO_VECTOR

    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    # reset and state -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """What a reset of the device does to the transport; PCI's own registers stay."""
        self._reset_registers()
        with self._isr_lock:
            self._isr = 0
            self._drive()

    def _reset_registers(self) -> None:
        self._device_select = self._driver_select = self._queue_select = 0
        self._config_vector = NO_VECTOR
        self._vectors = [NO_VECTOR] * (len(self.msix.lines) - 1)

    def state(self) -> dict[str, object]:
        """All registers that are not the device's."""
        return {"space": self.space.state(), "msix": self.msix.state(), "isr": self._isr, "vectors": self._vectors[:],
                "config_vector": self._config_vector,
                "selects": [self._device_select, self._driver_select, self._queue_select]}

    def load(self, state: dict[str, object]) -> None:
        """Take them over, the device having loaded its own; the bridge's load() places the BAR. Untrusted."""
        vectors: list[int] = state["vectors"]  # type: ignore[assignment]
        if len(vectors) != len(self._vectors):
            raise ValueError(f"vectors of {len(vectors)} queues, not {len(self._vectors)}")
        selects: list[int] = state["selects"]  # type: ignore[assignment]
        self._device_select, self._driver_select, self._queue_select = (int(value) & 0xFFFFFFFF for value in selects)
        self._vectors = [self._vector(int(value) & 0xFFFF) for value in vectors]
        self._config_vector = self._vector(int(state["config_vector"]) & 0xFFFF)  # type: ignore[call-overload]
        self.space.load(state["space"])  # type: ignore[arg-type]
        waiting = self.msix.load(state["msix"])  # type: ignore[arg-type]
        self.msix.control(self.space.get(self._msix_at + 2, 2))
        with self._isr_lock:
            self._isr = int(state["isr"]) & (ids.ISR_QUEUE | ids.ISR_CONFIG)  # type: ignore[call-overload]
            self._drive()
        for vector in waiting:
            self._send(vector)
