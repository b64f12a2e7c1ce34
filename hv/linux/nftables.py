"""The little of nf_tables that is asked for often, without a program: is a table there; hush an interface.

Rules are written by nft(8) elsewhere (hv/network/nft.py). include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h.

Driven by tests/root/test_network_netlink.py and tests/root/test_network_packet.py.
"""

from __future__ import annotations

__all__ = ["Hush", "table_exists"]

import errno
from struct import Struct

from hv.linux.netlink import CREATE, EXCL, NETFILTER, Message, Netlink, Refused, attribute, nested, text

_SUBSYSTEM = 10                             # NFNL_SUBSYS_NFTABLES
_BEGIN, _END = 16, 17                       # NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END
_NEWTABLE, _GETTABLE, _NEWCHAIN = (_SUBSYSTEM << 8 | number for number in (0, 1, 3))
_INET, _NETDEV = 1, 5                       # include/uapi/linux/netfilter.h, NFPROTO_...
_INGRESS, _DROP = 0, 0                      # NF_NETDEV_INGRESS, NF_DROP
_TABLE_NAME, _TABLE_FLAGS, _OWNER = 1, 2, 2         # NFTA_TABLE_...; NFT_TABLE_F_OWNER
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7      # NFTA_CHAIN_...
_HOOK_NUMBER, _HOOK_PRIORITY, _HOOK_DEVICE = 1, 2, 3                                    # NFTA_HOOK_...
_GENERIC = Struct(">BBH")                   # struct nfgenmsg


def _word(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(4, "big"))        # nf_tables speaks big-endian


def table_exists(name: str) -> bool:
    """Whether this network namespace has the table `inet name`. KernelError where there is no nf_tables."""
    with Netlink(NETFILTER) as socket:
        return socket.get(_GETTABLE, _GENERIC.pack(_INET, 0, 0) + text(_TABLE_NAME, name), "nf_tables",
                          may=(errno.ENOENT,)) is not None


class Hush:
    """While this lives, the namespace's own stack hears nothing of what `interface` receives; packet sockets do.

    A chain that drops at the interface's ingress, which is behind packet sockets (net/core/dev.c,
    __netif_receive_skb_core). The table belongs to a socket of ours: the kernel removes it when this process ends,
    whatever way, and the stack is as it was.
    """

    def __init__(self, interface: str) -> None:
        self._socket = Netlink(NETFILTER)
        name = f"pyhv-{interface}"
        border = _GENERIC.pack(0, 0, _SUBSYSTEM)
        head = _GENERIC.pack(_NETDEV, 0, 0)
        hook = nested(_CHAIN_HOOK, _word(_HOOK_NUMBER, _INGRESS), _word(_HOOK_PRIORITY, 0),
                      text(_HOOK_DEVICE, interface))
        try:
            self._socket.send((
                Message(_BEGIN, 0, border, plain=True),
                Message(_NEWTABLE, CREATE | EXCL, head + text(_TABLE_NAME, name) + _word(_TABLE_FLAGS, _OWNER)),
                Message(_NEWCHAIN, CREATE | EXCL, head + text(_CHAIN_TABLE, name) + text(_CHAIN_NAME, "hush") + hook
                        + text(_CHAIN_TYPE, "filter") + _word(_CHAIN_POLICY, _DROP)),
                Message(_END, 0, border, plain=True)), f"nf_tables: {interface}")
        except Refused:
            self._socket.close()        # EPERM, EEXIST: it is hushed already
            raise

    def close(self) -> None:
        """The stack hears it again."""
        self._socket.close()
