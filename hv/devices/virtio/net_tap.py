"""A tap of the host behind a network device. The kernel takes and gives the same header as the guest, so frames go
straight between guest RAM and the kernel, large segments and open checksums included.

Driven by tests/unit/test_virtio_net.py and tests/kvm/test_virtio_net.py.
"""

from __future__ import annotations

__all__ = ["NetTap"]

import errno
import os

from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net_backend import Backend
from hv.errors import ConfigError, KernelError
from hv.linux import netif, tap

# what the driver takes -> what the tap may leave to it
_OFFLOADS = ((net.F_GUEST_CSUM, tap.TUN_F_CSUM), (net.F_GUEST_TSO4, tap.TUN_F_TSO4), (net.F_GUEST_TSO6, tap.TUN_F_TSO6),
             (net.F_GUEST_ECN, tap.TUN_F_TSO_ECN), (net.F_GUEST_UFO, tap.TUN_F_UFO))
_BASE = (net.F_CSUM | net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_HOST_ECN
         | net.F_GUEST_CSUM | net.F_GUEST_TSO4 | net.F_GUEST_TSO6 | net.F_GUEST_ECN)


class NetTap(Backend):
    """Tap `name`, or one that the kernel names; `address` is (4 bytes, prefix) for the host's side of one made here."""

    def __init__(self, name: str = "", address: tuple[bytes, int] | None = None, mtu: int = 0) -> None:
        given = bool(name) and netif.exists(name)
        if given and (address or mtu):
            raise ConfigError(f"tap {name} is there already: its address and MTU are the host's to set",
                              f"ip address add ... dev {name}; or let pyhv make the tap, by another name")
        try:
            self.fd, self.name = tap.open_tap(name, net.HEADER_SIZE)
        except (KernelError, OSError) as error:
            raise _refused(name, given, error.errno or 0) from None
        try:
            self.features = _BASE | self._ufo()
            tap.set_offloads(self.fd, 0)
            if mtu:
                netif.set_mtu(self.name, mtu)
            if address:
                netif.set_address(self.name, *address)
            if not given:
                netif.set_up(self.name)
        except KernelError as error:
            os.close(self.fd)
            raise ConfigError(f"tap {self.name}: {error}") from None
        self.identity = f"tap={self.name}"

    def _ufo(self) -> int:
        try:
            tap.set_offloads(self.fd, tap.TUN_F_CSUM | tap.TUN_F_UFO)
        except KernelError:
            return 0        # Linux without UDP fragmentation offload (4.14 and some after it)
        return net.F_GUEST_UFO | net.F_HOST_UFO

    def negotiated(self, features: int) -> None:
        """The kernel may leave to the guest what its driver took."""
        try:
            tap.set_offloads(self.fd, sum(offload for feature, offload in _OFFLOADS if features & feature))
        except KernelError:
            pass        # somebody deleted the interface: receive() tells

    def send(self, parts: list[memoryview]) -> bool:
        """EINVAL: the kernel did not like the header; EIO: the interface is down."""
        try:
            os.writev(self.fd, parts)
        except BlockingIOError:
            return False
        return True

    def receive(self, views: list[memoryview]) -> int:
        """The kernel writes header and frame."""
        return os.readv(self.fd, views)

    def link(self, up: bool) -> None:
        """The host sees it too."""
        try:
            tap.set_carrier(self.fd, up)
        except KernelError:
            pass        # before Linux 5.0: frames are dropped all the same

    def close(self) -> None:
        """A tap made here goes with its descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _refused(name: str, given: bool, number: int) -> ConfigError:
    what = f"tap {name}" if name else "a new tap"
    if number in (errno.EPERM, errno.EACCES):
        wanted = name or "tap0"
        return ConfigError(f"{what}: not allowed", f"as root: ip tuntap add {wanted} mode tap user {os.getuid()} && "
                           f"ip link set {wanted} up, then --net tap={wanted}; or use --net user")
    if number == errno.EBUSY:
        return ConfigError(f"{what} is in use", "another program has it; each guest needs a tap of its own")
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return ConfigError(f"{what}: /dev/net/tun is not there", "load the module tun on the host, or use --net user")
    if number == errno.EINVAL and given:
        return ConfigError(f"{name} is no tap", "ip -d link show lists what it is")
    return ConfigError(f"{what}: {os.strerror(number)}")
