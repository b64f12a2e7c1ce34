"""The PIT, made when the guest first touches it.

KVM's 8254 costs the host 13 ms when the VM ends (unregistering its ports waits for a grace period), and many guests,
Linux with kvmclock among them, never use it. Until then these five ports come here; the first access creates the
in-kernel PIT and is carried out on its state (arch/x86/kvm/i8254.c, pit_ioport_write), all later ones stay in the
kernel. Driven by tests/kvm/test_machine.py.
"""

from __future__ import annotations

__all__ = ["LazyPit"]

from _thread import allocate_lock

from hv.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.kvm.vm import VmFd

BASE, LENGTH = 0x40, 4          # three counters and the command register
SPEAKER = 0x61                  # gate and output of counter 2
COMMAND = 3
SPEAKER_DATA_ON = 2             # KVM_PIT_FLAGS_SPEAKER_DATA_ON


class LazyPit(Device):
    """Ports 0x40 to 0x43, and 0x61 as offset 0x21."""

    __slots__ = ("_lock", "_vm", "made")

    def __init__(self, vm: VmFd) -> None:
        self._vm = vm
        self.made = False       # whether the guest ever used it
        self._lock = allocate_lock()

    def read(self, offset: int, size: int) -> int:
        """A counter that was never set reads 0; counter 2's output is low and its gate closed."""
        self.make()
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Only a command or the speaker port can come first with any effect."""
        self.make()
        state = self._vm.get_pit()
        if offset == SPEAKER - BASE:
            state.channels[2].gate = value & 1
            state.flags = SPEAKER_DATA_ON if value & 2 else 0
        elif offset == COMMAND and value >> 6 < 3 and value & 0x30:
            channel = state.channels[value >> 6]
            access, mode = value >> 4 & 3, value >> 1 & 7
            channel.rw_mode = channel.read_state = channel.write_state = access
            channel.mode = mode - 4 if mode > 5 else mode
            channel.bcd = value & 1
        self._vm.set_pit(state)

    def make(self) -> None:
        """Have KVM make it, unless it is there."""
        with self._lock:
            if not self.made:
                self._vm.create_pit()
                self.made = True
