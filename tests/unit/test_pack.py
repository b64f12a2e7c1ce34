"""hv/snapshot/pack.py: blocks that can be read alone, an index that is not believed, snapshots packed in place."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from struct import pack as binary

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.errors import ConfigError, SnapshotError
from hv.snapshot.diff import chain_of, whole_memory
from hv.snapshot.format import MEMORY, Snapshot, write_state
from hv.snapshot.memory import data_runs, memory_stamp, write_sums
from hv.snapshot.pack import BLOCK, PACKED, PLAIN, Packed, check, pack, pack_file, plain_memory, unpack
from hv.snapshot.restore import open_memory
from hv.snapshot.save import sweep
from hv.snapshot.working_set import WORKING_SET

SIZE = 3 * BLOCK + 5 * 4096


def fill(path: Path, size: int = SIZE, seed: int = 1) -> bytes:
    rng = random.Random(seed)
    with open(path, "wb", 0) as file:
        file.truncate(size)
        for at in (0, 4096 * 9, BLOCK + 100, 3 * BLOCK + 4096):
            os.pwrite(file.fileno(), rng.randbytes(5000), at)
    return path.read_bytes()


def packed_file(folder: Path) -> tuple[bytes, Path]:
    content = fill(folder / "plain")
    with open(folder / "plain", "rb") as source, open(folder / "packed", "wb") as target:
        pack_file(source.fileno(), target.fileno())
    return content, folder / "packed"


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    content, path = packed_file(tmp_path_factory.mktemp("pack"))
    return content, path.read_bytes()


def read(path: Path, data: bytes, size: int = SIZE) -> bytes:
    path.write_bytes(data)
    with open(path, "rb") as file:
        packed = Packed(file.fileno(), size)
        return b"".join(packed.read(number) for number in reversed(range(len(packed))))[::1]


def test_each_block_is_read_alone_and_zstd_reads_it_all(tmp_path):
    content, path = packed_file(tmp_path)
    with open(path, "rb") as file:
        packed = Packed(file.fileno(), SIZE)
        assert len(packed) == 4
        assert b"".join(packed.read(number) for number in (0, 1, 2, 3)) == content
        assert packed.read(2) == bytes(BLOCK)
    assert path.stat().st_size < 24000
    if shutil.which("zstd") is None:
        assert zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True).read() == content
    else:
        assert subprocess.run(["zstd", "-dc", path], capture_output=True, check=True, timeout=20).stdout == content


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_is_changed_is_refused_or_makes_no_difference(tmp_path_factory, sample, data):
    content, packed = sample
    changed = bytearray(packed)
    at = data.draw(st.integers(0, len(packed) - 1) | st.integers(len(packed) - 60, len(packed) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "changed"
    try:
        found = read(path, bytes(changed))
    except SnapshotError:
        return
    assert len(found) == SIZE
    # A frame's header has a bit or two that mean nothing.
    assert found == b"".join(content[start:start + BLOCK] for start in reversed(range(0, SIZE, BLOCK)))


@pytest.mark.parametrize("cut", [1, 9, 17, 100, 20000])
def test_a_cut_file_is_refused(tmp_path, sample, cut):
    with pytest.raises(SnapshotError, match=r"memory\.zst"):
        read(tmp_path / "cut", sample[1][:-cut])
    with pytest.raises(SnapshotError, match=r"memory\.zst"):
        read(tmp_path / "cut", sample[1][cut:])


def table(entries: list[tuple[int, int]], **other: int) -> bytes:
    body = b"".join(binary("<II", *entry) for entry in entries)
    return (binary("<II", other.get("magic", 0x184D2A5E), other.get("size", len(body) + 9)) + body
            + binary("<IBI", other.get("count", len(entries)), 0, 0x8F92EAB1))


@pytest.mark.parametrize("tail", [
    table([]), table([(10, 0)]), table([(10, 4097)]), table([(10, 1 << 31)] * 2), table([(1 << 31, SIZE)]),
    table([(10, SIZE)], magic=1), table([(10, SIZE)], size=3), table([(10, SIZE)], count=(1 << 32) - 1),
    table([(10, BLOCK)] * 4), table([(10, BLOCK)] * 3 + [(10, 4096)]), table([(0, BLOCK)] * 3 + [(40, 5 * 4096)]),
])
def test_a_hostile_table_is_refused(tmp_path, tail):
    """Before any block is read."""
    (tmp_path / "hostile").write_bytes(bytes(40) + tail)
    with open(tmp_path / "hostile", "rb") as file, pytest.raises(SnapshotError, match=r"memory\.zst"):
        Packed(file.fileno(), SIZE)


def bomb(size: int, says: bool) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, write_content_size=says)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(size))


@pytest.mark.parametrize("frame", [bomb(1 << 30, True), bomb(BLOCK, False), bomb(BLOCK - 1, True), b"\0" * 50])
def test_a_bomb_is_not_unpacked(tmp_path, frame):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "bomb"
    path.write_bytes(frame + table([(len(frame), BLOCK)]))
    with open(path, "rb") as file, pytest.raises(SnapshotError, match="block 0"):
        Packed(file.fileno(), BLOCK).read(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10      # KiB


# whole snapshots -------------------------------------------------------------------------------------


def snapshot(store: Path, name: str, seed: int, **more: object) -> Snapshot:
    folder = store / name
    (folder / "disks").mkdir(parents=True)
    (folder / "disks/0.img").write_bytes(b"disk")
    (folder / WORKING_SET).write_bytes(b"noted")
    fill(folder / MEMORY, seed=seed)
    sums = write_sums(str(folder))
    with open(folder / MEMORY, "rb") as file:
        stamp = memory_stamp(file.fileno()) | {"sums": sums}
    write_state(str(folder), {"version": 1, "id": name, "config": {"memory": SIZE}, "memory": stamp, "parent": None}
                | more)
    return Snapshot(str(folder))


def test_a_snapshot_is_packed_in_place_and_back(tmp_path):
    taken = snapshot(tmp_path, "a", 1)
    content = (tmp_path / "a" / MEMORY).read_bytes()
    with open(tmp_path / "a" / MEMORY, "rb") as running:        # a clone has it open
        before, after = pack(taken)
        assert after < before
        assert running.read() == content
    packed = Snapshot(taken.folder)
    assert sorted(os.listdir(packed.folder)) == ["disks", "memory.sums", "memory.zst", "state.json", "working-set"]
    assert (tmp_path / "a/disks/0.img").read_bytes() == b"disk"
    assert packed.state == taken.state | {"memory": packed.state["memory"]}
    check(packed)
    with pytest.raises(ConfigError, match="is packed already"):
        pack(packed)
    fd = open_memory(packed, SIZE, verify=True)         # unpacks it beside
    assert os.pread(fd, SIZE, 0) == content
    os.close(fd)
    stamp = os.stat(tmp_path / "a" / PLAIN)
    assert plain_memory(packed) == f"{packed.folder}/{PLAIN}" and os.stat(tmp_path / "a" / PLAIN) == stamp     # once
    unpack(packed)
    again = Snapshot(taken.folder)
    assert sorted(os.listdir(again.folder)) == ["disks", "memory", "memory.sums", "state.json", "working-set"]
    with open(again.memory_path, "rb") as file:
        assert file.read() == content
        assert next(data_runs(file.fileno(), 0, SIZE)) == (0, 2 * 4096)      # its holes are holes again
    os.close(open_memory(again, SIZE, verify=True))
    assert os.listdir(tmp_path) == ["a"] and sweep(str(tmp_path)) == []


def test_what_was_unpacked_is_of_this_file(tmp_path):
    taken = snapshot(tmp_path, "a", 1)
    pack(taken)
    path = plain_memory(taken)
    other = snapshot(tmp_path, "b", 2)
    pack(other)
    os.replace(tmp_path / "b" / PACKED, tmp_path / "a" / PACKED)
    with pytest.raises(SnapshotError, match="the MiB at 0x0 is not what was saved"):
        open_memory(taken, SIZE, verify=False)          # its stamp differs, so all of it is compared
    assert Path(plain_memory(taken)).read_bytes() != b"" and Path(path).read_bytes() == fill(tmp_path / "c", seed=2)


def test_a_difference_and_its_base_may_be_packed(tmp_path):
    base = snapshot(tmp_path, "a", 1)
    child = snapshot(tmp_path, "b", 2, parent={"folder": f"{tmp_path}/a", "id": "a"}, pages=[[9, 12], [64, 66]])
    expected = Path(whole_memory(child, SIZE)).read_bytes()
    for taken in (base, child):
        pack(taken)
    child = Snapshot(child.folder)
    for member in chain_of(child):
        check(member)
    assert Path(whole_memory(child, SIZE)).read_bytes() == expected
    fd = open_memory(child, SIZE, verify=True)
    assert os.pread(fd, SIZE, 0) == expected
    os.close(fd)


def test_a_damaged_block_is_found(tmp_path):
    taken = snapshot(tmp_path, "a", 1)
    pack(taken)
    path = tmp_path / "a" / PACKED
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    os.chmod(path, 0o600)
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=r"memory\.zst: block 0"):
        check(Snapshot(taken.folder))
    with pytest.raises(SnapshotError, match=r"memory\.zst: block 0"):
        open_memory(Snapshot(taken.folder), SIZE, verify=False)
