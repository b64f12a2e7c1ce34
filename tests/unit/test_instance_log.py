"""The log of an instance: form, rotation, the last lines, what a full or damaged file does."""

from __future__ import annotations

import json
import os

import pytest

from hv.instance.logfile import LogReader, LogWriter


def text(rows):
    return b"".join(data for _, data, _ in rows)


def test_the_form_is_dockers(tmp_path):
    writer = LogWriter(str(tmp_path / "log.json"))
    writer.write("stdout", b"one\ntw")
    writer.write("stdout", b"o\n")
    writer.write("stderr", b"bad \xff byte\r\n")
    rows = [json.loads(line) for line in (tmp_path / "log.json").read_text().splitlines()]
    assert [(row["log"], row["stream"]) for row in rows] == [
        ("one\n", "stdout"), ("tw", "stdout"), ("o\n", "stdout"), ("bad \udcff byte\r\n", "stderr")]
    assert all(row["time"].endswith("Z") for row in rows)
    writer.close()


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n", b"no end", os.urandom(100_000), b"x" * 50_000 + b"\n", b"\r\r\n",
                                  "é\u2028x\n".encode()])
def test_what_was_written_is_read(tmp_path, data):
    writer = LogWriter(str(tmp_path / "log.json"))
    for at in range(0, len(data), 4097):
        writer.write("stdout", data[at:at + 4097])
    reader = LogReader(str(tmp_path / "log.json"))
    assert text(reader.all()) == data
    reader.close()
    writer.close()


@pytest.mark.parametrize("files", [1, 3])
def test_rotation_and_following(tmp_path, files):
    path = str(tmp_path / "log.json")
    writer, reader = LogWriter(path, 4096, files), LogReader(path)
    got = text(reader.all())
    for number in range(500):
        writer.write("stdout", b"line %d\n" % number)
        got += text(reader.more())
    assert got == b"".join(b"line %d\n" % number for number in range(500))
    assert len(os.listdir(tmp_path)) == files
    assert all(os.path.getsize(tmp_path / leaf) <= 4096 for leaf in os.listdir(tmp_path))
    again = LogReader(path)
    assert got.endswith(text(again.all()))


@pytest.mark.parametrize("tail", [0, 1, 2, 10, 99, 100, 1000])
def test_the_last_lines(tmp_path, tail):
    path = str(tmp_path / "log.json")
    writer = LogWriter(path, 3000, 50)
    lines = [b"number %d %s\n" % (number, b"x" * (number * 37 % 300)) for number in range(100)]
    for line in lines:
        writer.write("stdout", line[:5])
        writer.write("stdout", line[5:])
    reader = LogReader(path)
    assert text(reader.all(tail)) == b"".join(lines[-tail:] if tail else [])
    writer.write("stdout", b"unfinished")
    assert text(LogReader(path).all(1)) == b"unfinished"


def test_a_damaged_log(tmp_path):
    path = tmp_path / "log.json"
    good = '{"log":"a\\n","stream":"stdout","time":"t"}\n'
    path.write_bytes(good.encode() + b'{"log":\n[]\nnull\n{"log":5,"stream":1,"time":2}\n\xff\xfe\n' + good.encode()
                     + b'{"log":"cut')
    assert text(LogReader(str(path)).all()) == b"a\na\n"
    assert text(LogReader(str(tmp_path / "none")).all()) == b""


def test_a_full_disk_loses_text_only():
    writer = LogWriter("/dev/full")
    writer.write("stdout", b"some text\n")
    assert writer.lost == 10
