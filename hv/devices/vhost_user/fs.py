"""A shared folder served by a vhost-user back end, such as virtiofsd (virtio 1.2, 5.11).

The back end speaks FUSE with the guest; the tag is served here. A FUSE session lives in the back end: behind one that
died, or in a restored snapshot, the guest has to mount again. Left out: more than one request queue, the notification
queue, DAX. Driven by tests/unit/test_vhost_user.py and tests/kvm/test_vhost_user.py.
"""

from __future__ import annotations

__all__ = ["VhostUserFs"]

from hv.devices.vhost_user.frontend import VhostUserDevice
from hv.devices.virtio import ids
from hv.errors import ConfigError

TAG_SIZE = 36               # 5.11.4: padded with NULs
REQUEST_QUEUES = 1
HIPRIO, REQUESTS = 0, 1     # 5.11.2


class VhostUserFs(VhostUserDevice):
    """virtio-fs behind a socket, mounted by its tag: `mount -t virtiofs TAG DIR`."""

    ID = ids.FS
    NAME = "vhost-user-fs"
    KIND = "share"
    QUEUES = (128, 1024)        # the driver makes requests as long as the queue has room for their pages
    DRIVER = "CONFIG_VIRTIO_FS (module virtiofs)"
    PCI_CLASS = 0x018000        # mass storage, other (PCI 3.0, appendix D)
    DRAINED = (HIPRIO, REQUESTS)

    def __init__(self, socket_path: str, tag: str) -> None:
        self.tag = tag.encode("utf-8", "surrogateescape")
        if not 1 <= len(self.tag) <= TAG_SIZE or 0 in self.tag:
            raise ConfigError(f"a share can't have the tag {tag!r}", f"1 to {TAG_SIZE} bytes, as tag=NAME")
        super().__init__(socket_path)

    def config(self) -> bytes:
        """Tag and number of request queues (5.11.4)."""
        return self.tag.ljust(TAG_SIZE, b"\0") + REQUEST_QUEUES.to_bytes(4, "little")
