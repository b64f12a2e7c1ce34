"""Numbers of the network device (virtio 1.2, 5.1): features, status bits, the header in front of every frame."""

from __future__ import annotations

from struct import Struct

RX, TX = 0, 1                       # queues (5.1.2)

# feature bits (5.1.3)
F_CSUM = 1 << 0                     # the device completes checksums of frames sent
F_GUEST_CSUM = 1 << 1               # the driver takes frames whose checksum is not complete
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO = 1 << 7, 1 << 8, 1 << 9, 1 << 10     # large frames, received
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_UFO = 1 << 11, 1 << 12, 1 << 13, 1 << 14      # large frames, sent
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16

# (feature, those of which it needs one) (5.1.3.1)
NEEDS = (
    (F_GUEST_TSO4, F_GUEST_CSUM), (F_GUEST_TSO6, F_GUEST_CSUM), (F_GUEST_UFO, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_HOST_TSO4, F_CSUM), (F_HOST_TSO6, F_CSUM), (F_HOST_UFO, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
)

S_LINK_UP = 1                       # status in the configuration space (5.1.4)

# struct virtio_net_hdr (5.1.6): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
HEADER = Struct("<BBHHHHH")
HEADER_SIZE = 12                    # with VERSION_1 num_buffers is always there (5.1.6)
NUM_BUFFERS = 10                    # where it is
HDR_NEEDS_CSUM, HDR_DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 3, 4, 5, 0x80

ETHERNET = 14                       # bytes of an Ethernet header
LONGEST = HEADER_SIZE + 65550 + 4   # 5.1.6.3.1: 65550 bytes of frame, and a VLAN tag
SHORTEST = HEADER_SIZE + ETHERNET
