"""One end of a stream, a program of its own: `python stream_end.py FD send|receive BYTES`.

It says "ready", then sends when it is told to by a line, or receives and says "BYTES WRONG": how many bytes came, and
how many of the places it looked at were not what the sender wrote. The stream consists of pieces of 64 KiB; each
begins with its number, 8 bytes, and ends in 8 bytes that are always the same. hv/bench/io_vsock.py uses the same form.
"""

from __future__ import annotations

__all__ = ["PIECE", "TAIL", "wrong"]

import socket
import sys

PIECE = 64 << 10
TAIL = b"the end."


def wrong(data: memoryview, at: int) -> int:
    """How many of the first number and the last tail within `data`, which stands at `at` of the stream, are wrong."""
    count = 0
    first = -at % PIECE
    if first + 8 <= len(data):
        count += int.from_bytes(data[first:first + 8], "little") != (at + first) // PIECE
    last = (at + len(data)) // PIECE * PIECE - at - 8
    if last >= 0:
        count += data[last:last + 8] != TAIL
    return count


def _send(fd: int, total: int) -> None:
    piece = memoryview(bytearray(PIECE - len(TAIL)) + TAIL)
    with socket.socket(fileno=fd) as stream:
        for number in range(total // PIECE):
            piece[:8] = number.to_bytes(8, "little")
            stream.sendall(piece)


def _receive(fd: int, total: int) -> str:
    room = memoryview(bytearray(PIECE))
    at = bad = 0
    with socket.socket(fileno=fd) as stream:
        stream.settimeout(60)
        while at < total:
            count = stream.recv_into(room)
            if not count:
                break
            bad += wrong(room[:count], at)
            at += count
    return f"{at} {bad}"


def _main(fd: int, way: str, total: int) -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if way == "send":
        sys.stdin.readline()
        _send(fd, total)
    else:
        sys.stdout.write(_receive(fd, total) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
