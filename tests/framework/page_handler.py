"""A memory handler as somebody else might write it from docs/lazy-memory.md, without a line of pyhv's.

    python page_handler.py SOCKET MEMORY-FILE [MODE]

It serves one VM, page by page, prints how many it served, and ends with it. MODE makes it misbehave.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import sys
import time

UFFDIO_COPY, UFFDIO_ZEROPAGE = 0xC028AA03, 0xC020AA04
PAGE = 4096


def main(path: str, memory: str, mode: str = "") -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    print("listening", flush=True)
    sock, _ = listener.accept()
    data, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(4))
    (uffd,) = array.array("i", ancillary[0][2])
    while not data.endswith(b"\n"):
        data += sock.recv(65536)
    order = json.loads(data)
    assert order["pyhv-memory"] == 1 and order["page_size"] == PAGE and os.path.exists(f"/proc/{order['pid']}")
    if mode == "hang up":
        sys.exit()
    if mode == "silent":
        time.sleep(60)
    if mode == "garbage":
        sock.sendall(b"\xff{]\n")
    if mode == "endless":
        sock.sendall(b"x" * 100_000)
    if mode == "no":
        sock.sendall(b'{"failed": "not \\u001b[31mtoday"}\n')
    if mode:
        sock.recv(1)
        sys.exit()
    sock.sendall(b'{"ready": true}\n')
    fd = os.open(memory, os.O_RDONLY)
    content = mmap.mmap(fd, 0, mmap.MAP_PRIVATE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(content))
    removed: set[int] = set()
    served = 0
    waits = select.poll()
    waits.register(uffd, select.POLLIN)
    waits.register(sock, select.POLLIN)
    while True:
        ready = dict(waits.poll())
        if sock.fileno() in ready:
            break
        event, flags, address = struct.unpack("<B7xQQ8x", os.read(uffd, 32))
        if event == 0x15:                       # UFFD_EVENT_REMOVE: its fields begin where a fault has its flags
            removed.update(range(flags, address, PAGE))
            continue
        page = address & -PAGE
        region = next(each for each in order["regions"] if each["host"] <= page < each["host"] + each["size"])
        source = start + region["offset"] + page - region["host"]
        try:
            if page in removed:
                fcntl.ioctl(uffd, UFFDIO_ZEROPAGE, bytearray(struct.pack("<QQQq", page, PAGE, 0, 0)))
            else:
                fcntl.ioctl(uffd, UFFDIO_COPY, bytearray(struct.pack("<QQQQq", page, source, PAGE, 0, 0)))
            served += 1
        except FileExistsError:
            pass
    print("served", served, flush=True)


main(*sys.argv[1:])
