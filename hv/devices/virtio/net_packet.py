"""A packet socket behind a network device: the guest has the interface of a network namespace for its own.

    NetConfig("packet", netns="/proc/1234/fd/7", interface="eth0")     # or --net packet=eth0,netns=PATH

Driven by tests/root/test_network_packet.py.
"""

from __future__ import annotations

__all__ = ["NetPacket"]

from hv.devices.virtio.net_backend import Backend


class NetPacket(Backend):
    """Interface `interface` in the network namespace at `netns` ("": this process's). `mac` is then its address, `mtu`
    its MTU, `address`, `prefix`, `gateway` what its own stack had and lost ("" where there was none)."""

    def __init__(self, interface: str, netns: str = "") -> None:
        raise NotImplementedError
