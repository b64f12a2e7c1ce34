"""What `--vsock SOCKET[,cid=N]` asks for (docs/vsock.md). Driven by tests/unit/test_virtio_vsock.py."""

from __future__ import annotations

__all__ = ["VsockConfig"]

import os

from hv.devices.virtio.vsock_packet import CID_LEAST, CID_MOST
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.vsock import Vsock

STREAMS_MOST = 16384        # open at a time; fewer where the process may not have so many descriptors
DESCRIPTORS_KEPT = 256      # for everything else that the process opens


class VsockConfig:
    """A socket device whose host side is the Unix socket `socket`; None where only this process takes part."""

    FIELDS = (("socket", "text?"), ("cid", "number"))

    def __init__(self, socket: str | None, cid: int | str = CID_LEAST) -> None:
        try:
            self.cid = int(cid)
        except ValueError:
            raise ConfigError(f"--vsock: cid={cid} is no number", "for example cid=3") from None
        if not CID_LEAST <= self.cid <= CID_MOST:
            raise ConfigError(f"--vsock: cid={cid} is not a guest's", f"possible are {CID_LEAST} to {CID_MOST}")
        if socket == "":
            raise ConfigError("--vsock: no socket named", "for example --vsock /tmp/guest.sock,cid=3")
        self.socket = socket

    def create(self) -> Vsock:
        """The device, its socket listening. ConfigError."""
        from hv.devices.virtio.vsock import Vsock
        from hv.devices.virtio.vsock_unix import HostSide

        return Vsock(self.cid, HostSide(self.socket or ""), max(1, min(STREAMS_MOST, descriptors() - DESCRIPTORS_KEPT)))

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one."""
        return {"socket": self.socket and os.path.abspath(self.socket), "cid": self.cid}


def descriptors() -> int:
    """How many descriptors this process may open, once its soft limit is raised to the hard one.

    The soft limit is low (1024) for the sake of programs that use select(); we use epoll, and a stream needs one.
    """
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

    soft, hard = getrlimit(RLIMIT_NOFILE)
    if soft != hard:
        try:
            setrlimit(RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass
    return soft if soft != RLIM_INFINITY else STREAMS_MOST + DESCRIPTORS_KEPT
