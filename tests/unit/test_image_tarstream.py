"""Archives as they come: what tarfile and GNU tar write is read, what is damaged is refused in one line."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hv.errors import ImageError
from hv.image.inflate import Limits, inflate
from hv.image.tarstream import Entry, TarStream

FORMATS = {"v7": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SKIPPABLE = b"\x5a\x2a\x4d\x18\x05\0\0\0hello"


def entries(data: bytes, piece: int = 1000) -> list[tuple[Entry, bytes]]:
    stream = TarStream(iter([data[at:at + piece] for at in range(0, len(data), piece)]), "layer x")
    found = []
    while (entry := stream.next()) is not None:
        found.append((entry, b"".join(map(bytes, stream.data()))))
    return found


def archive(*members: tuple[str, bytes], kind: int = tarfile.PAX_FORMAT, **fields: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def plain(blob: bytes, tmp_path: Path, limits: Limits | None = None) -> bytes:
    path = tmp_path / "blob"
    path.write_bytes(blob)
    with path.open("rb") as file:
        return b"".join(inflate(file.fileno(), "layer x", limits or Limits()))


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=4), st.binary(max_size=1500)), max_size=5),
       st.sampled_from(["gnu", "pax"]), st.integers(0, 0xfffffffe), st.integers(-2**33, 2**36), st.integers(1, 3000))
def test_what_tarfile_writes_is_read(members, kind, owner, mtime, piece):
    members = [("/".join(parts), data) for parts, data in members]
    data = archive(*members, kind=FORMATS[kind], uid=owner, gid=owner // 2, mtime=mtime, mode=0o4751)
    found = entries(data, piece)
    assert [(entry.name.decode(), content) for entry, content in found] == members
    for entry, content in found:
        assert (entry.uid, entry.gid, entry.mode, entry.real) == (owner, owner // 2, 0o4751, len(content))
        assert entry.mtime == mtime * 10**9


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_what_gnu_tar_writes_is_read(form, tmp_path):
    folder = tmp_path / "in"
    short, limited = form == "v7", form in ("v7", "ustar")
    long = folder / ("d" * 90) / ("e" * (1 if short else 50))
    long.mkdir(parents=True)
    (long / ("f" * (1 if short else 60 if limited else 200))).write_bytes(b"x" * 700)
    (folder / "link").symlink_to("t" * (9 if limited else 200))
    (folder / "hard").write_text("1")
    (folder / "other").hardlink_to(folder / "hard")
    data = subprocess.run(["tar", "-C", folder, f"--format={form}", "--sort=name", "-c", "."], check=True,
                          capture_output=True).stdout
    expected = subprocess.run(["tar", "-t"], input=data, check=True, capture_output=True).stdout.splitlines()
    found = entries(data)
    assert [entry.name for entry, _ in found] == expected
    kinds = {entry.name.rstrip(b"/").rpartition(b"/")[2]: entry for entry, _ in found}
    assert kinds[b"link"].kind == b"2" and set(kinds[b"link"].link) == set(b"t")
    assert kinds[b"other"].kind == b"1" and kinds[b"other"].link == b"./hard"
    assert kinds[b"d" * 90].kind == b"5"


@pytest.mark.parametrize("form", [["--format=gnu"], ["--format=posix", "--sparse-version=0.0"],
                                  ["--format=posix", "--sparse-version=0.1"], ["--format=posix"]])
def test_sparse_files(form, tmp_path):
    path = tmp_path / "holes"
    with path.open("wb") as file:
        for number in range(60):            # more than fit in the header of the old form
            file.seek(number * 100_000)
            file.write(bytes([number + 1]) * 5000)
        file.truncate(7_000_000)
    data = subprocess.run(["tar", "-C", tmp_path, "-S", *form, "-c", "holes"], check=True, capture_output=True).stdout
    assert len(data) < 1_000_000
    ((entry, content),) = entries(data)
    assert entry.name == b"holes" and entry.real == 7_000_000 and entry.pieces
    made, at = bytearray(entry.real), 0
    for offset, length in entry.pieces:
        made[offset:offset + length] = content[at:at + length]
        at += length
    assert made == path.read_bytes()


def test_pax_records():
    headers = {"mtime": "-1.25", "uid": "70000000", "path": "long/ä", "SCHILY.xattr.user.x": "v\0w", "comment": "n"}
    ((entry, _),) = entries(archive(("short", b""), pax_headers=headers))
    assert (entry.name, entry.mtime, entry.uid) == ("long/ä".encode(), -1_250_000_000, 70000000)
    assert entry.xattrs == {b"user.x": b"v\0w"}


def test_a_global_header_counts_for_all_that_follow_but_not_for_names_and_sizes():
    text = b"10 gid=77\n20 path=/etc/passwd\n9 size=9\n"
    data = header(b"g", b"x", len(text)) + text.ljust(512, b"\0") + archive(("a", b"1"), ("b", b"2"))
    found = [(entry.name, entry.gid, content) for entry, content in entries(data)]
    assert found == [(b"a", 77, b"1"), (b"b", 77, b"2")]


def test_what_a_global_header_holds_is_not_done_for_each_entry():
    """A MiB of records once, then entries without end that each would take all of them."""
    records = b"".join(b"12 k%05d=v\n" % number for number in range(80_000)) + b"29 SCHILY.xattr.user.x=12345\n"
    data = header(b"g", b"x", len(records)) + records + bytes(-len(records) % 512) + header(b"0", b"f", 0) * 1000 + END
    began = time.process_time()
    found = entries(data)
    assert len(found) == 1000 and all(entry.xattrs is None for entry, _ in found)
    assert time.process_time() - began < 2


def header(kind: bytes = b"0", name: bytes = b"f", size: int | bytes = 0, **fields: bytes) -> bytes:
    block = bytearray(512)
    places = {"mode": 100, "uid": 108, "gid": 116, "mtime": 136, "link": 157, "magic": 257, "major": 329, "minor": 337,
              "sparse": 386}
    block[:len(name)] = name
    for key, value in {"mode": b"0000644", "uid": b"0000000", "gid": b"0000000", "mtime": b"00000000000",
                       "magic": b"ustar\x0000", **fields}.items():
        block[places[key]:places[key] + len(value)] = value
    number = size if isinstance(size, bytes) else b"%011o\0" % size
    block[124:124 + len(number)] = number
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
BAD = {
    "checksum": (header()[:148] + b"0000001\0" + header()[156:] + END, "wrong checksum"),
    "negative size": (header(size=b"\xff" * 12) + END, "-1 bytes"),
    "huge size": (header(size=b"\x80" + b"\x7f" * 11) + END, "bytes"),
    "size of letters": (header(size=b"0000000abcd\0") + END, "bad size"),
    "size of minus": (header(size=b"-0000000001\0") + END, "bad size"),
    "eight": (header(mode=b"0000008") + END, "bad mode"),
    "owner": (header(uid=b"\x80\0\0\0\xff\xff\xff\xff") + END, "owner"),
    "negative owner": (header(uid=b"\xff" * 8) + END, "owner"),
    "type": (header(b"Z") + END, "unknown type"),
    "volumes": (header(b"M") + END, "multi-volume"),
    "zeros between": (header() + bytes(512) + header() + END, "after a block of zeros"),
    "data that ends": (header(size=600) + bytes(512), "ends within the data"),
    "half a header": (header()[:300], "ends within the header"),
    "endless extensions": ((header(b"L", size=2) + b"a".ljust(512, b"\0")) * 20 + header() + END,
                           "headers before entry"),
    "long name": (header(b"L", size=2 << 20) + bytes(2 << 20) + header() + END, "extended header of"),
    "name and no more": (header(b"L", size=2) + b"a".ljust(512, b"\0") + END, "behind an extended header"),
    "pax length": (header(b"x", size=8) + b"99 a=bc\n".ljust(512, b"\0") + header() + END, "bad record"),
    "pax letters": (header(b"x", size=8) + b"xx a=bc\n".ljust(512, b"\0") + header() + END, "bad length"),
    "pax short": (header(b"x", size=8) + b"3 a=bcd\n".ljust(512, b"\0") + header() + END, "bad record"),
    "pax zero": (header(b"x", size=12) + b"12 path=a\0b\n".ljust(512, b"\0") + header() + END, "zero byte"),
    "pax size": (header(b"x", size=11) + b"11 size=-5\n".ljust(512, b"\0") + header() + END, "whose size"),
    "pax time": (header(b"x", size=11) + b"11 mtime=x\n".ljust(512, b"\0") + header() + END, "whose time"),
    "sparse beyond": (header(b"S", size=512, sparse=b"00000000000\0" + b"00000001000\0", magic=b"ustar  \0")
                      + bytes(512) + END, "bad map"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_refused(name):
    data, text = BAD[name]
    with pytest.raises(ImageError, match=text) as caught:
        entries(data)
    assert str(caught.value).startswith("layer x: ") and "\n" not in str(caught.value)


def test_old_sunos_summed_signed_bytes():
    block = bytearray(header(name=b"\xff\xfe"))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in block)
    assert entries(bytes(block) + END)[0][0].name == b"\xff\xfe"


def test_an_archive_cut_anywhere_is_refused_or_shorter():
    data = archive(("a", b"x" * 900), ("n" * 200, b"y" * 600))
    whole = [entry.name for entry, _ in entries(data)]
    for end in range(0, len(data), 37):
        try:
            names = [entry.name for entry, _ in entries(data[:end])]
        except ImageError as error:
            assert "ends" in str(error)
        else:
            assert end == 0 or names == whole or end % 512 == 0 or end >= 512 * 4
            assert names == whole[:len(names)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_archives_give_entries_or_one_line(data):
    raw = bytearray(archive(("a/b", b"x" * 900), ("n" * 200, b"y" * 600), ("z", b""), pax_headers={"uid": "5"}))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, 4095))] = data.draw(st.integers(0, 255))
    try:
        entries(bytes(raw))
    except ImageError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_gives_one_line(noise):
    try:
        entries(noise)
    except ImageError as error:
        assert "\n" not in str(error)


# -- compression -------------------------------------------------------------------------------------------------


def test_gzip_members_zstd_frames_and_plain(tmp_path):
    one, two = b"one" * 100_000, bytes(3_000_000)
    squeeze = zstandard.ZstdCompressor().compress
    assert plain(gzip.compress(one) + gzip.compress(two), tmp_path) == one + two
    assert plain(gzip.compress(one) + bytes(700_000), tmp_path) == one
    assert plain(squeeze(one) + SKIPPABLE + squeeze(two) + SKIPPABLE, tmp_path) == one + two
    assert plain(SKIPPABLE + squeeze(one), tmp_path) == one
    assert plain(one, tmp_path) == one
    assert plain(b"", tmp_path) == b""
    assert plain(gzip.compress(b""), tmp_path) == b""


@pytest.mark.parametrize("blob, text", [
    (gzip.compress(b"abc" * 9999)[:-9], "ends early"),
    (gzip.compress(b"abc") + b"junk", "something follows"),
    (gzip.compress(b"abc") + bytes(300_000) + b"j", "something follows"),
    (gzip.compress(b"abc")[:-8] + b"\1\2\3\4\3\0\0\0", "damaged"),
    (b"\x1f\x8b\x08\0junkjunkjunkjunk", "damaged"),
    (b"\x28\xb5\x2f\xfdjunkjunk", "damaged"),
    (zstandard.ZstdCompressor().compress(b"abc") + b"junkjunk", "damaged"),
    (b"BZh9junk", "bzip2"), (b"\xfd7zXZ\0\0", "xz")])
def test_damaged_compression_is_refused(blob, text, tmp_path):
    with pytest.raises(ImageError, match=text) as caught:
        plain(blob, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("squeeze", [gzip.compress, zstandard.ZstdCompressor(level=1).compress])
def test_a_bomb_is_stopped(squeeze, tmp_path):
    blob = squeeze(bytes(40 << 20))
    with pytest.raises(ImageError, match="becomes more than 20971520 bytes"):
        plain(blob, tmp_path, Limits(most=20 << 20))
    assert len(plain(blob, tmp_path)) == 40 << 20


def test_limits_are_settings(monkeypatch):
    assert Limits().bytes_of(1 << 30) == 200 << 30
    assert Limits().bytes_of(10) == 1 << 30
    monkeypatch.setenv("PYHV_LAYER_RATIO", "3")
    monkeypatch.setenv("PYHV_LAYER_BYTES", str(2 << 40))
    monkeypatch.setenv("PYHV_LAYER_ENTRIES", "many")
    assert Limits().bytes_of(1 << 30) == 3 << 30
    assert Limits().most == 2 << 40
    assert Limits().entries == 4_000_000
