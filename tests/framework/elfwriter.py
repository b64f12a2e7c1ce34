"""Kernels made up in memory: ELF files, bzImages, Multiboot images, each well-formed until told otherwise."""

from __future__ import annotations

import struct

PT_LOAD, PT_NOTE = 1, 4


def pvh_note(entry: int) -> bytes:
    return struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)


def elf(segments: list[tuple[int, bytes, int | None]] | None = None, *, entry: int = 0x100000, bits: int = 64,
        machine: int | None = None, note: int | None = None, order: int = 1) -> bytes:
    """An executable with (paddr, data, memsz or None) segments; `note` adds a PVH entry point."""
    segments = [(0x100000, b"\xf4" * 16, None)] if segments is None else segments
    machine = machine if machine is not None else 62 if bits == 64 else 3
    rows = [(PT_LOAD, paddr, data, memsz) for paddr, data, memsz in segments]
    if note is not None:
        rows.append((PT_NOTE, 0, pvh_note(note), None))
    header, size = (64, 56) if bits == 64 else (52, 32)
    at = header + size * len(rows)
    table, body = b"", b""
    for kind, paddr, data, memsz in rows:
        total = len(data) if memsz is None else memsz
        offset = at + len(body)
        if bits == 64:
            table += struct.pack("<IIQQQQQQ", kind, 7, offset, paddr & (1 << 64) - 1, paddr & (1 << 64) - 1, len(data),
                                 total, 1)
        else:
            table += struct.pack("<IIIIIIII", kind, offset, paddr, paddr, len(data), total, 7, 1)
        body += data
    ident = b"\x7fELF" + bytes((2 if bits == 64 else 1, order, 1)) + bytes(9)
    layout = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    fields = struct.pack(layout, 2, machine, 1, entry, header, 0, 0, header, size, len(rows), 0, 0, 0)
    return ident + fields + table + body


def bzimage(payload: bytes, *, version: int = 0x20F, xloadflags: int = 1, cmdline_size: int = 2047,
            payload_length: int | None = None) -> bytes:
    """A bzImage around a compressed payload that already ends with its plain size."""
    page = bytearray(2 * 512)
    page[0x1F1] = 1                     # one setup sector
    struct.pack_into("<H", page, 0x1FE, 0xAA55)
    page[0x200:0x202] = b"\xeb\x66"     # jump over the header: ends at 0x268
    struct.pack_into("<4sH", page, 0x202, b"HdrS", version)
    struct.pack_into("<I", page, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", page, 0x236, xloadflags)
    struct.pack_into("<I", page, 0x238, cmdline_size)
    struct.pack_into("<II", page, 0x248, 0, len(payload) if payload_length is None else payload_length)
    return bytes(page) + payload


def multiboot_header(flags: int = 3, addresses: tuple[int, ...] = ()) -> bytes:
    return struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses)
