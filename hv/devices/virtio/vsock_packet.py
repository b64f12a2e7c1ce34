"""The packet of the socket device: its header and its numbers (virtio 1.2, 5.10.6).

Driven by tests/unit/test_virtio_vsock.py.
"""

from __future__ import annotations

__all__ = ["HEADER", "HEADER_SIZE", "cut"]

from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.chain import Views

# src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt (5.10.6, struct virtio_vsock_hdr)
HEADER = Struct("<QQIIIHHIII")
HEADER_SIZE = 44

HOST_CID = 2                # 5.10.4: the well-known CID of the host
CID_LEAST, CID_MOST = 3, 0xFFFFFFFE     # 5.10.4: 0, 1, 2 and 0xffffffff are not for guests
PORT_MOST = 0xFFFFFFFE      # 0xffffffff is Linux' VMADDR_PORT_ANY (include/uapi/linux/vm_sockets.h)

TYPE_STREAM = 1             # 5.10.6.2

# 5.10.6, enum virtio_vsock_op
OP_REQUEST, OP_RESPONSE, OP_RST, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST = range(1, 8)

# 5.10.6.5: hints in the flags of SHUTDOWN, permanent once sent
SHUTDOWN_RECEIVE = 1        # "I will receive no more"
SHUTDOWN_SEND = 2           # "I will send no more"
SHUTDOWN_BOTH = SHUTDOWN_RECEIVE | SHUTDOWN_SEND

EVENT_TRANSPORT_RESET = 0   # 5.10.6.7

PAYLOAD_MOST = 64 << 10     # bytes in one packet; Linux' drivers use as many (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE)
CONNECT_SECONDS = 20        # a host client waits so long for the guest's answer
CLOSE_SECONDS = 30          # we wait so long for the guest's RST behind a clean end, before we reset it

WRAP = 0xFFFFFFFF           # byte counts are 32 bits wide and wrap (5.10.6.3)


def cut(views: Views, length: int) -> tuple[Views, Views]:
    """(the first `length` bytes, what is behind them) of `views`; the first part is shorter where they are."""
    if not length:
        return [], views
    head: Views = []
    for number, view in enumerate(views):
        size = len(view)
        if size >= length:
            rest = views[number + 1:]
            if size == length:
                head.append(view)
            else:
                head.append(view[:length])
                rest.insert(0, view[length:])
            return head, rest
        head.append(view)
        length -= size
    return head, []
