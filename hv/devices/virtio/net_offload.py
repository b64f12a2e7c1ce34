"""What a guest left for its card to do, done in software: checksums, segments of TCP and UDP (virtio 1.2, 5.1.6.2).

Used where a frame goes to somebody who can't do it himself: user-mode networking, and the other end of a pair whose
driver did not take the features. The kernel does it for taps. A ones' complement sum of 16-bit words (RFC 1071) is the
number that the bytes spell, modulo 65535, so Python's long integers do it at a few GB/s.

Frames come from guests: everything in them is checked. Driven by tests/unit/test_virtio_net_offload.py.
"""

from __future__ import annotations

__all__ = ["finish", "is_plain", "is_sane", "may_pass"]

from struct import Struct

from hv.devices.virtio import net_ids as net

_get16 = Struct(">H").unpack_from
_put16 = Struct(">H").pack_into
_get32 = Struct(">I").unpack_from
_put32 = Struct(">I").pack_into
_VLAN, _IPV4, _IPV6 = 0x8100, 0x0800, 0x86DD        # ether types (IEEE 802)
_TCP, _UDP = 6, 17                                  # IANA protocol numbers
_UDP_LENGTH, _UDP_CHECKSUM = 4, 6                   # RFC 768
_TCP_CHECKSUM, _TCP_FLAGS = 16, 13                  # RFC 9293, 3.1
_FIN_PSH, _CWR = 0x09, 0x80
_GSO_FEATURE = {net.GSO_TCPV4: net.F_GUEST_TSO4, net.GSO_TCPV6: net.F_GUEST_TSO6}
MOST_SEGMENTS = 256         # of one frame, 256 bytes each if it is of 64 KiB: smaller ones would only cost time


def is_plain(header: bytes | memoryview) -> bool:
    """Whether the frame behind `header` leaves nothing to do."""
    return not header[0] & net.HDR_NEEDS_CSUM and not header[1]


def is_sane(header: bytes | memoryview, length: int) -> bool:
    """Whether a header may be shown to another guest's driver; the frame behind it has `length` bytes."""
    flags, gso, gso_size, start, offset = _fields(header)
    if flags & net.HDR_NEEDS_CSUM and (start < net.ETHERNET or start + offset + 2 > length):
        return False
    kind = gso & ~net.GSO_ECN
    if kind == net.GSO_NONE:
        return gso == net.GSO_NONE
    return kind in (net.GSO_TCPV4, net.GSO_TCPV6) and gso_size > 0 and bool(flags & net.HDR_NEEDS_CSUM)


def may_pass(taken: int, header: bytes | memoryview, length: int) -> bool:
    """Whether a frame may go as it is to a driver that has `taken` these features."""
    needed, gso = net.F_GUEST_CSUM, header[1]
    if gso:
        needed |= _GSO_FEATURE.get(gso & ~net.GSO_ECN, 0) | (net.F_GUEST_ECN if gso & net.GSO_ECN else 0)
    return needed & ~taken == 0 and is_sane(header, length)


def _fields(header: bytes | memoryview) -> tuple[int, int, int, int, int]:
    flags, gso, _, gso_size, start, offset, _ = net.HEADER.unpack_from(header)
    return flags, gso, gso_size, start, offset


def checksum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The Internet checksum of `data` and of a sum made before (RFC 1071)."""
    number = int.from_bytes(data, "big")
    if len(data) & 1:
        number <<= 8
    return 0xFFFF - ((number + start) % 0xFFFF or 0xFFFF)


def finish(packet: bytes, longest: int) -> list[bytearray]:
    """The frames that `packet` (header and frame) stands for, complete; none where it makes no sense.

    One of up to `longest` bytes is left whole, even if segments were asked for.
    """
    flags, gso, gso_size, start, offset = _fields(packet)
    frame = bytearray(packet[net.HEADER_SIZE:])
    if gso == net.GSO_UDP_L4 and flags & net.HDR_NEEDS_CSUM and gso_size and start >= net.ETHERNET:
        return _segments(frame, gso, gso_size, start)
    if not is_sane(packet, len(frame)):
        return []
    if gso and len(frame) > longest:
        return _segments(frame, gso & ~net.GSO_ECN, gso_size, start)
    if flags & net.HDR_NEEDS_CSUM:
        # The field holds the pseudo header's sum. 0 would mean "no checksum" to UDP (RFC 768).
        _put16(frame, start + offset, checksum(memoryview(frame)[start:]) or 0xFFFF)
    return [frame]


def _segments(frame: bytearray, gso: int, size: int, inner: int) -> list[bytearray]:
    """TCP segments, or UDP packets, of `size` bytes out of a large one whose TCP or UDP header is at `inner`."""
    ip, protocol = net.ETHERNET, _UDP if gso == net.GSO_UDP_L4 else _TCP
    (kind,) = _get16(frame, 12)
    if kind == _VLAN and len(frame) >= ip + 4:
        (kind,) = _get16(frame, 16)
        ip += 4
    wanted = {net.GSO_TCPV4: (_IPV4,), net.GSO_TCPV6: (_IPV6,)}.get(gso, (_IPV4, _IPV6))
    shortest, least = 20 if kind == _IPV4 else 40, 20 if protocol == _TCP else 8
    if kind not in wanted or inner < ip + shortest or inner + least > len(frame):
        return []
    if kind == _IPV4 and (frame[ip + 9] != protocol or inner != ip + 4 * (frame[ip] & 15)):
        return []
    payload = inner + (4 * (frame[inner + 12] >> 4) if protocol == _TCP else 8)
    count = -(-(len(frame) - payload) // size)
    if payload < inner + least or not 0 < count <= MOST_SEGMENTS:
        return []
    addresses = bytes(frame[ip + 12:ip + 20] if kind == _IPV4 else frame[ip + 8:ip + 40])
    pseudo = int.from_bytes(addresses, "big") + protocol        # RFC 9293, 3.1; RFC 768; RFC 8200, 8.1
    head, (number,) = frame[:payload], _get16(frame, ip + 4)
    found = []
    for index in range(count):
        at = payload + index * size
        part = head + frame[at:at + size]
        if kind == _IPV4:
            _put16(part, ip + 2, len(part) - ip)
            _put16(part, ip + 4, (number + index) & 0xFFFF)
            _put16(part, ip + 10, 0)
            _put16(part, ip + 10, checksum(memoryview(part)[ip:inner]))
        else:
            _put16(part, ip + 4, len(part) - ip - 40)
        field = inner + _UDP_CHECKSUM
        if protocol == _TCP:
            field = inner + _TCP_CHECKSUM
            _number(part, inner, index, size, index + 1 == count)
        else:
            _put16(part, inner + _UDP_LENGTH, len(part) - inner)
        _put16(part, field, 0)
        value = checksum(memoryview(part)[inner:], pseudo + len(part) - inner)
        _put16(part, field, value or (0xFFFF if protocol == _UDP else 0))       # 0 would mean "no checksum" to UDP
        found.append(part)
    return found


def _number(part: bytearray, tcp: int, index: int, size: int, last: bool) -> None:
    """Sequence number and flags of one TCP segment of several."""
    (sequence,), flags = _get32(part, tcp + 4), part[tcp + _TCP_FLAGS]
    _put32(part, tcp + 4, (sequence + index * size) & 0xFFFFFFFF)
    part[tcp + _TCP_FLAGS] = flags & ~(0 if last else _FIN_PSH) & ~(_CWR if index else 0) & 0xFF
