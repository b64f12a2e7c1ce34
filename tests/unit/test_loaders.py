"""Every boot protocol into plain guest memory, and every way a kernel file can be bad."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import struct

import lz4.block
import pytest
import zstandard
from framework.elfwriter import bzimage, elf, multiboot_header
from hypothesis import given, settings
from hypothesis import strategies as st
from lzallright import LZOCompressor

from hv.boot.decompress import decompress, method_of
from hv.boot.load import PROTOCOLS, prepare
from hv.errors import ConfigError, HvError, ImageError
from hv.memory.guest import GuestMemory
from hv.memory.layout import BOOT_PARAMS, CMDLINE, LOW_RAM_END, MODULES_INFO, PVH_INFO

MIB = 1 << 20
KERNEL = elf([(0x1000000, b"Linux version 6.1" + bytes(100), 0x5000), (0x1200000, b"data", 4)], entry=0x1000000,
             note=0x1000010)


def lzo(data: bytes) -> bytes:
    """An lzop file: header (version 0x1030, no name) and blocks."""
    head = b"\x89LZO\0\r\n\x1a\n" + struct.pack(">HHHBBIIIIB", 0x1030, 0x20A0, 0x0940, 1, 5, 0, 0o100644, 0, 0, 0)
    out = head + bytes(4)
    for at in range(0, len(data), 256 << 10):
        block = data[at:at + (256 << 10)]
        packed = LZOCompressor().compress(block)
        packed = block if len(packed) >= len(block) else packed
        out += struct.pack(">III", len(block), len(packed), 0) + packed
    return out + bytes(4)


def lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        packed = lz4.block.compress(data[at:at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(packed)) + packed
    return out


METHODS = {
    "gzip": lambda d: gzip.compress(d, mtime=0),
    "bzip2": bz2.compress,
    "xz": lambda d: lzma.compress(d, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=[
        {"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]),
    "lzma": lambda d: lzma.compress(d, lzma.FORMAT_ALONE),
    "lzo": lzo,
    "lz4": lz4_legacy,
    "zstd": lambda d: zstandard.ZstdCompressor().compress(d),
}


def packed(method: str, plain: bytes, size: int | None = None) -> bytes:
    data = METHODS[method](plain)
    tail = struct.pack("<I", len(plain) if size is None else size)
    return data[:-4] + tail if method == "gzip" else data + tail


@pytest.fixture
def memory():
    ram = GuestMemory(64 * MIB)
    yield ram
    ram.close()


def load(memory, image, protocol=None, **more):
    return prepare(image, protocol).load(memory, **more)


# what works ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_bzimage_of_each_compression_is_entered_in_64_bit_mode(memory, method):
    image = bzimage(packed(method, KERNEL + bytes(300_000)))
    prepared = prepare(image)
    assert prepared.is_linux and prepared.protocol == "linux64"
    entry = prepared.load(memory, cmdline=b"console=ttyS0", initrd=b"rd" * 3000)
    assert (entry.mode, entry.rip, entry.rsi) == ("long64", 0x1000000, BOOT_PARAMS)
    assert memory.read(0x1000000, 5) == b"Linux" and memory.read(0x1200000, 4) == b"data"
    assert memory.read(CMDLINE, 14) == b"console=ttyS0\0"
    assert memory.u8(BOOT_PARAMS + 0x210) == 0xFF and memory.read(BOOT_PARAMS + 0x202, 4) == b"HdrS"
    at, size = memory.u32(BOOT_PARAMS + 0x218), memory.u32(BOOT_PARAMS + 0x21C)
    assert size == 6000 and at % 4096 == 0 and memory.read(at, 6000) == b"rd" * 3000


def test_vmlinux_gets_the_64_bit_entry_by_default_and_pvh_on_demand(memory):
    assert load(memory, KERNEL).mode == "long64"
    entry = load(memory, KERNEL, "pvh", initrd=b"x" * 10)
    assert (entry.mode, entry.rip, entry.rbx) == ("prot32", 0x1000010, PVH_INFO)
    magic, version, _, modules = struct.unpack("<IIII", memory.read(PVH_INFO, 16))
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    module = memory.u64(PVH_INFO + 16)
    assert memory.read(memory.u64(module), memory.u64(module + 8)) == b"x" * 10


def test_an_elf_that_is_not_linux_gets_pvh_where_it_has_the_note(memory):
    prepared = prepare(elf(note=0x100000))
    assert prepared.protocol == "pvh" and not prepared.is_linux
    assert prepare(elf()).protocol == "linux64"


def test_entry_point_linked_high_is_translated(memory):
    image = bytearray(elf([(0x200000, bytes(64), None)], entry=0xFFFFFFFF80000010))
    struct.pack_into("<Q", image, 64 + 16, 0xFFFFFFFF80000000)
    assert load(memory, bytes(image)).rip == 0x200010


def test_e820_has_the_hole_below_4_gib():
    ram = GuestMemory(8 << 30)
    load(ram, KERNEL, reserved=[(0x9B000, 0x4C00)])
    count = ram.u8(BOOT_PARAMS + 0x1E8)
    rows = [struct.unpack("<QQI", ram.read(BOOT_PARAMS + 0x2D0 + 20 * i, 20)) for i in range(count)]
    usable = [(start, start + size) for start, size, kind in rows if kind == 1]
    assert usable == [(0, 0x9B000), (0x100000, LOW_RAM_END), (4 << 30, (4 << 30) + (8 << 30) - LOW_RAM_END)]
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(rows))
    ram.close()


def test_multiboot_elf_with_modules(memory):
    image = elf([(0x100000, multiboot_header() + b"\xf4" * 64, 0x3000)], bits=32, entry=0x10000C)
    entry = prepare(image).load(memory, cmdline=b"mb words", modules=[(b"first", b"one"), (b"second" * 900, b"")])
    assert (entry.mode, entry.rax, entry.rbx, entry.rip) == ("prot32", 0x2BADB002, MODULES_INFO, 0x10000C)
    flags, _, upper, _, words, count, mods = struct.unpack("<7I", memory.read(MODULES_INFO, 28))
    assert flags & 0x4D == 0x4D and upper == 63 * 1024 and count == 2
    assert memory.read(words, 9) == b"mb words\0"
    start, end, name, _ = struct.unpack("<4I", memory.read(mods, 16))
    assert start >= 0x103000 and memory.read(start, end - start) == b"first" and memory.read(name, 4) == b"one\0"
    length, at = struct.unpack("<II", memory.read(MODULES_INFO + 44, 8))
    assert length % 24 == 0 and memory.u32(at) == 20


def test_multiboot_by_address_fields(memory):
    body = multiboot_header(0x10003, (0x200000, 0x200000, 0, 0x201000, 0x200020)) + b"\x90" * 100
    entry = load(memory, body)
    assert entry.rip == 0x200020 and memory.read(0x200000, 4) == body[:4]


def test_flat_image_goes_to_7c00(memory):
    sector = b"\xf4".ljust(510, b"\0") + b"\x55\xaa"
    entry = load(memory, sector)
    assert (entry.mode, entry.rip, entry.cs_base) == ("real16", 0x7C00, 0) and memory.u8(0x7C00) == 0xF4
    assert load(memory, b"\xf4", "flat").mode == "real16"


# what is bad -----------------------------------------------------------------------------------------------


def bad_elf(offset: int, layout: str, value: int) -> bytes:
    image = bytearray(KERNEL)
    struct.pack_into(layout, image, offset, value)
    return bytes(image)


SEGMENT = 64        # the first program header
BAD = {
    "empty": (b"", "empty"),
    "text": (b"#!/bin/sh\necho not a kernel\n" * 50, "not a bzImage"),
    "gzip file": (gzip.compress(b"x" * 1000), "gzip file"),
    "ARM64 Image": (bytes(0x38) + b"ARM\x64" + bytes(600), "another processor"),
    "ELF for AArch64": (elf(machine=183), "AArch64"),
    "big-endian ELF": (elf(order=2), "little-endian"),
    "ELF cut in its header": (KERNEL[:40], "cut off"),
    "ELF cut in its segments": (KERNEL[:-60], "beyond the file"),
    "no program headers": (bad_elf(56, "<H", 0), "program headers"),
    "program headers elsewhere": (bad_elf(32, "<Q", 1 << 62), "program headers"),
    "memory size below file size": (bad_elf(SEGMENT + 40, "<Q", 3), "takes only"),
    "segment on the boot data": (bad_elf(SEGMENT + 24, "<Q", 0x7000), "overlaps the boot data"),
    "segment in the VGA hole": (bad_elf(SEGMENT + 24, "<Q", 0xA0000), "overlaps the boot data"),
    "segment beyond RAM": (bad_elf(SEGMENT + 24, "<Q", 64 * MIB - 8), "not in guest RAM"),
    "segment that wraps": (bad_elf(SEGMENT + 24, "<Q", (1 << 64) - 16), "not in guest RAM"),
    "segment of 2^63 bytes": (bad_elf(SEGMENT + 40, "<Q", 1 << 63), "not in guest RAM"),
    "segments on each other": (bad_elf(SEGMENT + 24, "<Q", 0x1200000 - 0x1000), "overlaps"),
    "entry point nowhere": (bad_elf(24, "<Q", 0x5000000), "in no segment"),
    "32-bit ELF": (elf(bits=32), "32-bit"),
    "32-bit bzImage": (bzimage(packed("gzip", KERNEL), xloadflags=0), "32-bit kernel"),
    "ancient bzImage": (bzimage(packed("gzip", KERNEL), version=0x206), "boot protocol 2.06"),
    "bzImage cut in its header": (bzimage(packed("gzip", KERNEL))[:0x240], "cut off"),
    "bzImage cut in its payload": (bzimage(packed("gzip", KERNEL))[:-100], "beyond the file"),
    "payload too short": (bzimage(b"\x1f\x8b\0\0"), "beyond the file"),
    "unknown compression": (bzimage(b"????" * 10 + struct.pack("<I", 1000)), "unknown way"),
    "payload is not ELF": (bzimage(packed("gzip", b"no kernel" * 100)), "not a little-endian ELF|cut off"),
    "damaged payload": (bzimage(packed("zstd", KERNEL)[:20] + b"\xff" * 200 + struct.pack("<I", 500)), "damaged"),
    "PVH entry nowhere": (elf(note=0x900000), "PVH entry point"),
    "Multiboot with unknown demands": (multiboot_header(0x10) + bytes(64), "unknown features"),
    "Multiboot without addresses": (multiboot_header(0) + bytes(64), "neither an ELF"),
    "Multiboot into the boot data": (multiboot_header(0x10000, (0x8000, 0x8000, 0, 0, 0x8000)) + bytes(64),
                                     "wants to be loaded"),
    "Multiboot beyond RAM": (multiboot_header(0x10000, (0xF0000000,) * 2 + (0, 0, 0xF0000000)) + bytes(64),
                             "wants to be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_kernels_are_refused_in_one_line(memory, name):
    image, message = BAD[name]
    with pytest.raises(ImageError, match=message) as caught:
        load(memory, image)
    assert "\n" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lie", [-100, 100, 1 << 25])
def test_a_payload_that_lies_about_its_size_is_refused(method, lie):
    if method == "gzip" and lie == 1 << 25:
        lie = 5000
    with pytest.raises(ImageError, match=r"declares|damaged"):
        prepare(bzimage(packed(method, KERNEL, len(KERNEL) + lie)))


def test_a_bomb_costs_no_more_than_it_declares():
    bomb = bzimage(packed("gzip", bytes(64 * MIB), 4096))
    with pytest.raises(ImageError, match="more than the 4096 bytes"):
        prepare(bomb)


def test_initrd_larger_than_ram_and_command_line_too_long(memory):
    with pytest.raises(ImageError, match=r"the initrd of \d+ bytes does not fit"):
        load(memory, KERNEL, initrd=bytes(60 * MIB))
    with pytest.raises(ConfigError, match="at most 2047"):
        load(memory, KERNEL, cmdline=b"x" * 2048)
    with pytest.raises(ConfigError, match="at most 255"):
        load(memory, bzimage(packed("gzip", KERNEL), cmdline_size=255), cmdline=b"x" * 256)
    with pytest.raises(ConfigError, match="--module is for Multiboot"):
        load(memory, KERNEL, modules=[(b"x", b"")])


def test_reserved_memory_stays_free(memory):
    with pytest.raises(ImageError, match="overlaps the boot data"):
        load(memory, KERNEL, reserved=[(0x1001000, 4096)])
    top = 64 * MIB - 4096
    load(memory, KERNEL, reserved=[(top, 4096)], initrd=b"i" * 100)
    assert memory.u32(BOOT_PARAMS + 0x218) == top - 4096


def test_protocols_an_image_does_not_offer(memory):
    for image, protocol in ((elf(), "pvh"), (b"\xf4".ljust(510, b"\0") + b"\x55\xaa", "linux64"), (KERNEL, "multiboot"),
                            (elf(bits=32, note=0x100000), "linux64")):
        with pytest.raises(ImageError):
            load(memory, image, protocol)
    with pytest.raises(ConfigError, match="no such protocol"):
        prepare(KERNEL, "uefi")


# properties ------------------------------------------------------------------------------------------------

WELL_FORMED = [KERNEL, elf(bits=32, note=0x100000), bzimage(packed("gzip", KERNEL)), bzimage(packed("lz4", KERNEL)),
               multiboot_header(0x10003, (0x200000, 0x200000, 0, 0x201000, 0x200020)) + bytes(64),
               elf([(0x100000, multiboot_header() + bytes(64), 0x3000)], bits=32, entry=0x10000C)]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2048), st.sampled_from([None, *PROTOCOLS]))
def test_random_bytes_never_break_a_loader(data, protocol):
    _try(data, protocol)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(WELL_FORMED), st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)),
                                              min_size=1, max_size=4), st.sampled_from([None, *PROTOCOLS]))
def test_damaged_kernels_never_break_a_loader(image, patches, protocol):
    data = bytearray(image)
    for at, patch in patches:
        at %= min(len(data), 0x300)
        data[at:at + len(patch)] = patch
    _try(bytes(data), protocol)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(sorted(METHODS)), st.integers(0, 1 << 16))
def test_random_payloads_never_break_a_decoder(noise, method, size):
    data = METHODS[method](b"abc" * 100)[:30] + noise
    assert method_of(data) == method
    try:
        assert len(decompress(data, size)) == size
    except ImageError:
        pass


def _try(data: bytes, protocol: str | None) -> None:
    ram = GuestMemory(24 * MIB)
    try:
        entry = prepare(data, protocol).load(ram, cmdline=b"words", initrd=b"initrd", modules=None)
        assert 0 <= entry.rip < 1 << 64
    except HvError:
        pass
    finally:
        ram.close()
