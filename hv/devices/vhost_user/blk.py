"""A disk served by a vhost-user back end, such as qemu-storage-daemon (virtio 1.2, 5.2).

The configuration space is the back end's, but for the number of queues. Left out: zoned devices. Driven by
tests/unit/test_vhost_user.py and tests/kvm/test_vhost_user.py.
"""

from __future__ import annotations

__all__ = ["VhostUserBlk"]

from hv.devices.vhost_user.frontend import VhostUserDevice
from hv.devices.vhost_user.protocol import VhostUserError
from hv.devices.virtio import ids
from hv.errors import ConfigError

# 5.2.3: SIZE_MAX 1, SEG_MAX 2, GEOMETRY 4, RO 5, BLK_SIZE 6, FLUSH 9, TOPOLOGY 10, CONFIG_WCE 11, DISCARD 13,
# WRITE_ZEROES 14
FEATURES = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 14
F_CONFIG_WCE, F_MQ = 1 << 11, 1 << 12
CONFIG_SIZE = 60            # 5.2.4: up to and with write_zeroes_may_unmap and its padding
WRITEBACK, NUM_QUEUES = 32, 34      # 5.2.4: u8, and u16
QUEUE_SIZE = 256
MOST_QUEUES = 64


class VhostUserBlk(VhostUserDevice):
    """virtio-blk behind a socket."""

    ID = ids.BLOCK
    NAME = "vhost-user-blk"
    KIND = "disk"
    DRIVER = "CONFIG_VIRTIO_BLK (module virtio_blk)"
    PCI_CLASS = 0x018000        # mass storage, other (PCI 3.0, appendix D)
    OFFERS = FEATURES
    CONFIG_SIZE = CONFIG_SIZE

    def __init__(self, socket_path: str, queues: int = 1) -> None:
        if not 1 <= queues <= MOST_QUEUES:
            raise ConfigError(f"a disk with {queues} queues", f"possible are 1 to {MOST_QUEUES}")
        self.QUEUES = (QUEUE_SIZE,) * queues
        self.DRAINED = tuple(range(queues))
        if queues > 1:
            self.OFFERS = FEATURES | F_MQ
        super().__init__(socket_path)
        if queues > 1 and not self.offered & F_MQ:
            self.close()
            raise ConfigError(f"vhost-user: the back end at {socket_path!r} has one queue only", "leave out queues=")

    def config(self) -> bytes:
        """The back end's, with the number of queues that there are here (5.2.4)."""
        config = super().config()
        return config[:NUM_QUEUES] + len(self.QUEUES).to_bytes(2, "little") + config[NUM_QUEUES + 2:]

    def write_config(self, offset: int, data: bytes) -> None:
        """Only the cache mode can be written, a byte (5.2.4)."""
        if offset != WRITEBACK or len(data) != 1 or not self.has(F_CONFIG_WCE):
            self.fault(f"a write of {len(data)} bytes to the configuration space at {offset:#x}")
        elif self.back_end is not None:
            try:
                self._config = self.back_end.set_config(offset, data, CONFIG_SIZE)
            except VhostUserError as error:
                self._lost(str(error))
