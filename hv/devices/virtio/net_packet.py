"""A packet socket behind a network device: the guest has the interface of a network namespace for its own.

    NetConfig(packet="eth0", netns="/proc/1234/fd/7")           # --net packet=eth0,netns=/proc/1234/fd/7

So a VM joins any network that a container can join, whoever made it: the guest gets the interface's MAC address, and is
to be given the IP address that the interface has. The namespace's own stack keeps that address, and hears nothing as
long as the guest lives (hv/linux/nftables.py, Hush), so it answers nothing in the guest's place; once this process has
ended, in whatever way, it has the interface back.

The kernel puts struct virtio_net_hdr in front of frames (PACKET_VNET_HDR, man 7 packet): large segments and open
checksums pass both ways. Its 10 bytes lack the guest's num_buffers; views are cut so that nothing is copied. A driver
that did not take an offload gets frames finished in software (net_offload.py), as behind NetPair. Left out on purpose:
VLAN tags that a card of the host took off a frame, and PACKET_MMAP, which copies no less.

Driven by tests/root/test_network_packet.py.
"""

from __future__ import annotations

__all__ = ["NetPacket"]

import errno
import os
from _socket import AF_PACKET, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_RAW, SOL_SOCKET, socket

from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net_backend import Backend, scatter
from hv.devices.virtio.net_offload import finish, is_plain, may_pass
from hv.errors import ConfigError, KernelError
from hv.linux import links
from hv.linux.netlink import ROUTE, Netlink
from hv.linux.netns import inside
from hv.linux.nftables import Hush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.linux.links import Link

# include/uapi/linux/if_packet.h, if_ether.h; include/linux/socket.h; include/uapi/asm-generic/socket.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, ETH_P_ALL = 263, 15, 23, 3
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32
_HEADER = net.NUM_BUFFERS           # bytes of the kernel's header: all but num_buffers
_BUFFER = 4 << 20                   # bytes of frames that wait: some 60 of the largest
_HINT = "a namespace that a process holds, for example netns=/proc/PID/ns/net; `ip -n NAME link` lists a named one's"


class NetPacket(Backend):
    """Interface `interface` in the network namespace at `netns` ("": this process's).

    `mac`, `mtu` are the interface's; `address`, `prefix`, `gateway` (text, number, text) its first IPv4 address and
    default route, for the guest: "", 0 where there is none.
    """

    features = (net.F_CSUM | net.F_HOST_TSO4 | net.F_HOST_TSO6 | net.F_HOST_ECN
                | net.F_GUEST_CSUM | net.F_GUEST_TSO4 | net.F_GUEST_TSO6 | net.F_GUEST_ECN)

    def __init__(self, interface: str, netns: str = "") -> None:
        self.interface, self.netns = interface, netns
        self._taken = 0                             # features of the driver
        self._finished: list[bytearray] = []        # plain frames that one large one became
        self._socket: socket | None = None
        self._hush: Hush | None = None
        self.address = self.gateway = ""
        self.prefix = 0
        try:
            self._enter()
        except (KernelError, OSError) as error:
            self.close()
            raise self._refused(error) from None
        except BaseException:
            self.close()
            raise

    def _enter(self) -> None:
        """Open what is needed, in the namespace."""
        if not self.netns:
            self._open()
            return
        fd = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with inside(fd):
                self._open()
        finally:
            os.close(fd)

    def _open(self) -> None:
        with Netlink(ROUTE) as asked:
            found = links.link(asked, self.interface)
            if found is None or len(found.mac) != 17:
                raise ConfigError(f"--net packet={self.interface}: no such Ethernet interface"
                                  + (f" in {self.netns}" if self.netns else ""), _HINT)
            self._ask(asked, found)
            self._hush = Hush(self.interface)
            # protocol 0 hears nothing until it is bound: no frame of another interface gets in
            self._socket = made = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)
            made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            made.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
                try:
                    made.setsockopt(SOL_SOCKET, option, _BUFFER)
                except PermissionError:
                    made.setsockopt(SOL_SOCKET, {SO_RCVBUFFORCE: 8, SO_SNDBUFFORCE: 7}[option], _BUFFER)
            made.bind((self.interface, ETH_P_ALL))
            if not found.flags & links.UP:
                asked.send((links.set_flags(links.UP, found.index),), self.interface)
            self.fd = made.fileno()

    def _ask(self, asked: Netlink, found: Link) -> None:
        self.mac, self.mtu = bytes.fromhex(found.mac.replace(":", "")), found.mtu
        self.identity = f"packet={self.interface},{found.mac}"
        had = links.addresses(asked, found.index)
        if had:
            self.address, self.prefix = _text(had[0][1]), had[0][2]
            ways = links.gateways(asked, found.index)
            self.gateway = _text(ways[0]) if ways else ""

    def _refused(self, error: KernelError | OSError) -> ConfigError:
        what = f"--net packet={self.interface}"
        number = error.errno or 0
        if isinstance(error, OSError):
            return ConfigError(f"{what}: {self.netns or 'packet socket'}: {error.strerror}", _HINT)
        if number == errno.EINVAL and self.netns:
            return ConfigError(f"{what}: {self.netns} is no network namespace", _HINT)
        if number in (errno.EPERM, errno.EACCES) and os.geteuid():
            return ConfigError(f"{what}: not allowed", "it needs root, or --net user")
        if number in (errno.EPERM, errno.EEXIST):
            return ConfigError(f"{what} has a guest already", "each guest needs an interface of its own")
        return ConfigError(f"{what}: {error}", _HINT)

    # frames ------------------------------------------------------------------------------------------

    def negotiated(self, features: int) -> None:
        """What may be given to the driver as it comes."""
        self._taken = features

    def send(self, parts: list[memoryview]) -> bool:
        """EINVAL: the kernel did not like the header; ENETDOWN: the interface is down."""
        first = parts[0]
        if len(first) >= net.HEADER_SIZE:
            cut = [first[:_HEADER], first[net.HEADER_SIZE:], *parts[1:]]
        else:
            whole = b"".join(parts)         # a header in pieces
            cut = [memoryview(whole)[:_HEADER], memoryview(whole)[net.HEADER_SIZE:]]
        try:
            os.writev(self.fd, cut)
        except BlockingIOError:
            return False
        return True

    def receive(self, views: list[memoryview]) -> int:
        """The kernel writes header and frame; the next of several, where one large frame had to be cut."""
        while not self._finished:
            first = views[0]
            if len(first) < net.HEADER_SIZE:
                return self._receive_in_pieces(views)
            size = self._read([first[:_HEADER], first[net.HEADER_SIZE:], *views[1:]])
            header = first[:net.HEADER_SIZE]
            if is_plain(header) or may_pass(self._taken, header, size - net.HEADER_SIZE):
                return size
            self._finished = finish(b"".join(views)[:size], 0)
        frame = self._finished.pop(0)
        scatter(bytes(net.HEADER_SIZE) + frame, views)
        return net.HEADER_SIZE + len(frame)

    def _receive_in_pieces(self, views: list[memoryview]) -> int:
        """Into buffers whose first has no room for a header: by way of one that has."""
        room = memoryview(bytearray(net.LONGEST))
        size = self.receive([room])
        scatter(room[:size], views)
        return size

    def _read(self, views: list[memoryview]) -> int:
        try:
            return os.readv(self.fd, views) + net.HEADER_SIZE - _HEADER
        except OSError as error:
            # told once when the interface goes down, which may come up again, or goes for good
            if error.errno == errno.ENETDOWN and self._socket is not None and self._socket.getsockname()[0]:
                raise BlockingIOError from None
            raise

    def close(self) -> None:
        """The namespace's own stack has the interface again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self.fd = -1
        if self._hush is not None:
            self._hush.close()
            self._hush = None


def _text(address: int) -> str:
    return ".".join(map(str, address.to_bytes(4, "big")))
