"""Files and block devices as disks: opening, locking, direct I/O, and the options that lead to them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.cli.devices import split
from hv.devices.virtio.blk import Block
from hv.devices.virtio.blk_config import DiskConfig
from hv.devices.virtio.blk_file import DirectFile, DiskFile, open_disk
from hv.errors import ConfigError

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def refused(text: str, *words: str, **options: object) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        DiskConfig(*words, **options).create()     # type: ignore[arg-type]
    assert caught.value.hint and "\n" not in str(caught.value)


def test_what_is_no_disk(tmp_path, image):
    refused("No such file", str(tmp_path / "missing"))
    refused("neither a file nor a block device", str(tmp_path))
    refused("neither a file nor a block device", "/dev/null")
    os.mkfifo(tmp_path / "fifo")
    refused("neither a file nor a block device", str(tmp_path / "fifo"))
    for content, text in ((b"", "smaller than a sector"), (b"x" * 511, "smaller than a sector"),
                          (b"QFI\xfb" + bytes(512), "a qcow2 image"), (b"KDMV" + bytes(512), "a VMDK image")):
        image.write_bytes(content)
        refused(text, str(image))


def test_what_can_not_be_asked():
    refused("no file")
    refused("readonly takes no value", "x", readonly="yes")
    refused("overlay without a value", "x", overlay=True)
    refused("serial '.*' is not", "x", serial="x" * 21)
    refused("serial '.*' is not", "x", serial="\N{GREEK SMALL LETTER ALPHA}")
    refused("queues=0", "x", queues="0")
    refused("queues=65", "x", queues=65)
    refused("queues=two is not a number", "x", queues="two")
    refused("iops=True is not a number", "x", iops=True)
    refused("the back end decides", "x", vhost_user="socket")


def test_the_options_text(image):
    words, options = split(f"{image},readonly,serial=a,,b,queues=4,iops=1K,bps=10M")
    config = DiskConfig(*words, **options)      # type: ignore[arg-type]
    assert (config.path, config.readonly, config.serial, config.queues, config.iops, config.bps) == \
        (str(image), True, b"a,b", 4, 1024, 10 << 20)
    device = config.create()
    assert isinstance(device, Block) and len(device.QUEUES) == 4
    device.close()


def test_writers_are_alone_and_readers_share(image):
    first, second = (open_disk(str(image), readonly=True, direct=False) for _ in range(2))
    refused("another machine uses it", str(image))
    first.close()
    second.close()
    writer = open_disk(str(image), readonly=False, direct=False)
    refused("another machine uses it", str(image))
    refused("somebody writes to it", str(image), readonly=True)
    writer.close()
    open_disk(str(image), readonly=True, direct=False).close()


def test_the_end_that_is_no_whole_sector_is_left_alone(image):
    os.truncate(image, 1000)
    disk = open_disk(str(image), readonly=False, direct=False)
    assert disk.size == 512
    disk.close()


def test_a_read_only_file_needs_readonly(image):
    image.chmod(0o400)
    if os.geteuid():        # root may write anything
        refused("Permission denied", str(image))
    open_disk(str(image), readonly=True, direct=False).close()


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "disk.img"
    path.write_bytes(os.urandom(4 << 20))
    try:
        disk = open_disk(str(path), readonly=False, direct=True)
    except ConfigError as error:
        pytest.skip(str(error))
    assert isinstance(disk, DirectFile)
    yield disk, bytearray(path.read_bytes())
    disk.close()


@settings(max_examples=150, deadline=None)
@given(sector=st.integers(0, 8191), count=st.integers(1, 3000), shift=st.integers(0, 1030),
       cut=st.integers(1, 511), write=st.booleans(), alignment=st.sampled_from([512, 4096]))
def test_direct_with_any_alignment(direct, sector, count, shift, cut, write, alignment):
    """Buffers that start anywhere, requests longer than the aligned buffer, blocks larger than a sector."""
    disk, content = direct
    offset, size = sector * 512, min(count * 512, disk.size - sector * 512)
    disk._alignment = max(alignment, disk._alignment)
    memory = memoryview(bytearray(shift + size))[shift:]
    if write:
        memory[:] = os.urandom(size)
        content[offset:offset + size] = memory
        disk.write([memory[:cut], memory[cut:]], offset, size, stable=True)
    else:
        disk.read([memory[:cut], memory[cut:]], offset, size)
        assert memory == content[offset:offset + size]
    around = memoryview(bytearray(disk.size))
    disk.read([around], 0, disk.size)
    assert around == content


def test_direct_zeroes(direct):
    disk, content = direct
    disk._can_punch = disk._can_zero = False
    disk.zero(1536, 1 << 20, True)
    content[1536:1536 + (1 << 20)] = bytes(1 << 20)
    got = memoryview(bytearray(disk.size))
    disk.read([got], 0, disk.size)
    assert got == content


def test_direct_needs_a_file_system_that_can(tmp_path, monkeypatch):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    monkeypatch.setattr("hv.devices.virtio.blk_file._ALIGNMENTS", (3, 5))
    refused("no direct I/O", str(image), direct=True)


@pytest.mark.parametrize(("sector", "direct"), [(512, False), (4096, False), (4096, True)])
def test_a_block_device(image: Path, sector: int, direct: bool):
    made = subprocess.run(["losetup", "-f", "--show", "-b", str(sector), str(image)], capture_output=True, text=True,
                          timeout=20, check=False)
    if made.returncode:
        pytest.skip(f"losetup: {made.stderr.strip()}")
    name = made.stdout.strip()
    try:
        disk = open_disk(name, readonly=False, direct=direct)
        assert isinstance(disk, DiskFile) and (disk.size, disk.block_size) == (SIZE, sector)
        before = image.read_bytes()
        data = memoryview(bytearray(b"d" * 1024))
        disk.write([data], 1024, 1024)
        disk.flush()
        disk.zero(8192, 8192, False)
        disk.discard(32768, 65536)
        disk.flush()
        content = image.read_bytes()
        assert content[:8192] == before[:1024] + b"d" * 1024 + before[2048:8192]
        assert content[8192:16384] == bytes(8192) and content[16384:32768] == before[16384:32768]
        assert content[32768 + 65536:] == before[32768 + 65536:]
        with pytest.raises(ConfigError, match="another machine uses it"):
            open_disk(name, readonly=False, direct=False)
        disk.close()
    finally:
        subprocess.run(["losetup", "-d", name], timeout=20, check=True)
