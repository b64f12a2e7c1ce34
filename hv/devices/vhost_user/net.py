"""A network card served by a vhost-user back end, such as a switch in user space (virtio 1.2, 5.1).

The back end moves frames and says which offloads it can; the MAC address and the link are served here, and the link is
down while there is no back end. One pair of queues: the control queue, which more pairs need, is left out. Driven by
tests/unit/test_vhost_user.py and tests/kvm/test_vhost_user.py.
"""

from __future__ import annotations

__all__ = ["VhostUserNet"]

from hv.devices.vhost_user.frontend import VhostUserDevice
from hv.devices.virtio import ids
from hv.errors import ConfigError

# 5.1.3: CSUM 0, GUEST_CSUM 1, GUEST_TSO4 7, GUEST_TSO6 8, GUEST_ECN 9, GUEST_UFO 10, HOST_TSO4 11, HOST_TSO6 12,
# HOST_ECN 13, HOST_UFO 14, MRG_RXBUF 15
OFFLOADS = 0x3 | 0xFF80
F_MAC, F_STATUS = 1 << 5, 1 << 16
LINK_UP = 1                 # 5.1.4, VIRTIO_NET_S_LINK_UP
QUEUE_SIZE = 256


class VhostUserNet(VhostUserDevice):
    """virtio-net behind a socket. Without `mac` the driver makes one up."""

    ID = ids.NET
    NAME = "vhost-user-net"
    KIND = "net"
    QUEUES = (QUEUE_SIZE, QUEUE_SIZE)       # 5.1.2: receive, transmit
    DRIVER = "CONFIG_VIRTIO_NET (module virtio_net)"
    PCI_CLASS = 0x020000        # Ethernet controller (PCI 3.0, appendix D)
    OFFERS = OFFLOADS

    def __init__(self, socket_path: str, mac: bytes | None = None) -> None:
        if mac is not None and (len(mac) != 6 or mac[0] & 1):
            raise ConfigError(f"{mac.hex(':')} is no MAC address of a card", "six bytes, the first one even")
        self.mac = mac
        self.OWN = F_STATUS | (F_MAC if mac else 0)
        super().__init__(socket_path)

    def config(self) -> bytes:
        """MAC address and link status (5.1.4)."""
        return (self.mac or bytes(6)) + (LINK_UP if self.connected else 0).to_bytes(2, "little")

    def connection_changed(self) -> None:
        """The link goes down and up with the back end."""
        self.config_changed()
