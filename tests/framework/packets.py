"""TCP packets for tests of the network device, as a guest hands them over, and a check of finished ones."""

from __future__ import annotations

import struct

from hv.devices.virtio import net_ids as net


def rfc1071(data: bytes, start: int = 0) -> int:
    """Word by word, as the RFC has it."""
    data += b"\0" * (len(data) & 1)
    total = start + sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def tcp_packet(payload: bytes, version: int, *, flags: int = 0x18, options: bytes = b"", vlan: bool = False,
               gso_size: int = 0, extra: int = 0) -> bytes:
    """What a Linux guest hands over: the pseudo header's sum in the checksum field, the rest undone."""
    length = 20 + len(options) + len(payload)
    source, target = (b"\x0a\0\0\1", b"\x0a\0\0\2") if version == 4 else (bytes(range(16)), bytes(range(16, 32)))
    pseudo = source + target + struct.pack(">II", length, 6)
    tcp = struct.pack(">HHIIBBHHH", 1000, 80, 0xFFFFFF00, 7, (20 + len(options)) // 4 << 4, flags, 500,
                      rfc1071(pseudo) ^ 0xFFFF, 0) + options + payload
    if version == 4:
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0xFFFF, 0x4000, 64, 6, 0, source, target)
        kind = 0x0800
    else:
        ip = struct.pack(">IHBB16s16s", 6 << 28, length, 6, 64, source, target)
        kind = 0x86DD
    start = bytes(12) + (b"\x81\x00\x00\x05" if vlan else b"") + struct.pack(">H", kind) + ip
    gso = {4: net.GSO_TCPV4, 6: net.GSO_TCPV6}[version] | extra if gso_size else 0
    return net.HEADER.pack(net.HDR_NEEDS_CSUM, gso, 0, gso_size, len(start), 16, 0) + start + tcp


def check_tcp(frame: bytes, version: int, ip: int) -> tuple[int, int, bytes]:
    """(sequence, flags, payload) of a finished segment, whose sums must be right."""
    if version == 4:
        assert rfc1071(frame[ip:ip + 20]) == 0 and struct.unpack_from(">H", frame, ip + 2)[0] == len(frame) - ip
        addresses, at = frame[ip + 12:ip + 20], ip + 20
    else:
        assert struct.unpack_from(">H", frame, ip + 4)[0] == len(frame) - ip - 40
        addresses, at = frame[ip + 8:ip + 40], ip + 40
    assert rfc1071(addresses + struct.pack(">II", len(frame) - at, 6) + frame[at:]) == 0
    return struct.unpack_from(">I", frame, at + 4)[0], frame[at + 13], frame[at + 4 * (frame[at + 12] >> 4):]
