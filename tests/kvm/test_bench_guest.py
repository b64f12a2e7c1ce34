"""The benchmark guest drives each device from ring 3: the data is right, in small amounts. How fast is not asked."""

from __future__ import annotations

import array
import hashlib
import subprocess
import time
from pathlib import Path

import pytest
from framework.run import PYHV, boot, needs_kvm, no_traceback

from hv.bench.io_guest import parse
from hv.bench.netpeer import NetPeer

pytestmark = [needs_kvm]

MIB = 1 << 20


def run(work: str, *options: str) -> tuple[dict[str, dict[str, int]], bytes]:
    done = boot("guest:bench", "--memory", "64M", "--cmdline", work, *options, timeout=90)
    no_traceback(done)
    assert done.returncode == 0 and b"bench: done" in done.stdout, done.stdout[-500:] + done.stderr[-500:]
    assert b"broke" not in done.stderr and b"never drove" not in done.stderr, done.stderr
    return parse(done.stdout), done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Each 8-byte word holds its offset, which the guest compares."""
    file = tmp_path / "disk.img"
    file.write_bytes(array.array("Q", range(0, 8 * MIB, 8)).tobytes())
    return file


def test_reads_are_right(disk: Path) -> None:
    found, _ = run("sequential=24 random=3000 single=100 check", "--disk", f"{disk},readonly")
    assert found["sequential"]["bytes"] == 24 * MIB
    assert (found["random"]["requests"], found["single"]["requests"]) == (3000, 100)
    assert all(found[test]["bad"] == 0 for test in ("sequential", "random", "single"))


def test_wrong_data_is_noticed(disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"\xff" * 80)
    found, _ = run("sequential=8 check", "--disk", f"{disk},readonly")
    assert found["sequential"]["bad"] == 10


def test_writes_are_right(disk: Path) -> None:
    run("write=8", "--disk", str(disk))
    expected = array.array("Q", (~offset & 0xFFFFFFFFFFFFFFFF for offset in range(0, 8 * MIB, 8))).tobytes()
    assert hashlib.sha256(disk.read_bytes()).digest() == hashlib.sha256(expected).digest()


def test_the_stream_arrives_and_packets_come_back() -> None:
    with NetPeer() as peer:
        if not peer.tap:
            pytest.skip(peer.reason)
        found, _ = run(f"segments=200 round-trips=50 {peer.words}", "--net", f"tap={peer.tap}")
        assert peer.received == found["stream"]["bytes"] == 200 * 44 * 1460
        assert peer.order == 0
        assert found["round-trips"]["count"] == 50 and found["round-trips"]["bad"] == 0
        assert 0 < found["round-trips"]["min-ns"] <= found["round-trips"]["median-ns"]


def test_all_that_the_console_prints_is_there() -> None:
    found, output = run("console=300000", "--console", "virtio")
    line = bytes(48 + n for n in range(63)) + b"\n"
    assert found["console"]["bytes"] == 300000
    assert output.replace(b"\r", b"").count(line) == 300000 // 64


def test_a_slow_reader_gets_the_end_too() -> None:
    command = [*PYHV, "boot", "guest:bench", "--memory", "64M", "--console", "virtio", "--timeout", "50", "--cmdline",
               "console=800000"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
        time.sleep(0.8)         # more than the pipe holds waits when the guest has ended
        output, _ = child.communicate(timeout=60)
    assert len(output) >= 800000 and b"bench: done" in output


def test_entropy() -> None:
    found, _ = run("entropy=65536 check", "--rng")
    assert found["entropy"]["bytes"] >= 65536 and found["entropy"]["zeros"] == 0
