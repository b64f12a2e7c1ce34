"""A FUSE client over the mock driver: a guest's kernel as far as the file server of a shared folder can tell.

    share = Share(tmp_path)                     # a device for the folder, probed, INIT done
    node = share.lookup(ROOT, b"file")          # attributes as a namedtuple; OSError with what the server answered
    fh = share.open(node.nodeid, os.O_RDWR)
    share.write(fh, 0, b"text"); share.read(fh, 0, 100)
"""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

from framework.driver import Driver

from hv.devices.virtio import fuse
from hv.devices.virtio.fs import REQUESTS
from hv.devices.virtio.fs_config import ShareConfig
from hv.memory.guest import GuestMemory

ROOT = fuse.ROOT_ID
PAGE = 4096
Attr = namedtuple("Attr", "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev "
                  "blksize flags nodeid valid")


class Share:
    """A shared folder and its one client; closes with `with`."""

    def __init__(self, folder: Path | str, *, init: bool = True, **options: object) -> None:
        self.device = ShareConfig(folder, **options).create()       # type: ignore[arg-type]
        self.driver = Driver(self.device, GuestMemory(64 << 20)).probe(sizes={REQUESTS: 1024})
        self.unique = 2
        self.uid, self.gid, self.pid = os.getuid(), os.getgid(), 100
        if init:
            self.init()

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *exc: object) -> None:
        self.device.set_status(0)
        self.device.close()

    def header(self, opcode: int, nodeid: int, length: int) -> bytes:
        self.unique += 2
        return fuse.IN_HEADER.pack(fuse.IN_HEADER.size + length, opcode, self.unique, nodeid, self.uid, self.gid,
                                   self.pid, 0)

    def send(self, opcode: int, nodeid: int, body: bytes = b"", room: int = 256, data: bytes = b"") -> int:
        """Make the request available and kick; its head."""
        ring = self.driver.rings[REQUESTS]
        pages = [data[at:at + PAGE] for at in range(0, len(data), PAGE)]
        header = self.header(opcode, nodeid, len(body) + len(data))
        if room > PAGE:
            rooms = [PAGE] * (room // PAGE) + ([room % PAGE] if room % PAGE else [])
        else:
            rooms = [room] if room else []
        head = ring.add([header, *([body] if body else []), *pages], [fuse.OUT_HEADER.size, *rooms], indirect=True)
        self.driver.notify(REQUESTS)
        return head

    def received(self) -> dict[int, tuple[int, bytes]]:
        """Replies since the last look: head -> (error number, payload)."""
        found = {}
        for head, written, buffers in self.driver.rings[REQUESTS].take():
            reply = b"".join(buffers)[:written]
            length, error, _ = fuse.OUT_HEADER.unpack_from(reply)
            assert length == written and (not error or written == fuse.OUT_HEADER.size)
            found[head] = -error, reply[fuse.OUT_HEADER.size:]
        return found

    def received_any(self) -> None:
        """Take all replies, each as long as it says, whatever they are."""
        for _, written, buffers in self.driver.rings[REQUESTS].take():
            if written:
                assert fuse.OUT_HEADER.unpack_from(b"".join(buffers))[0] == written

    def call(self, opcode: int, nodeid: int, body: bytes = b"", room: int = 256, data: bytes = b"") -> bytes:
        """One request; the reply's payload, or OSError."""
        head = self.send(opcode, nodeid, body, room, data)
        error, payload = self.received()[head]
        if error:
            raise OSError(error, os.strerror(error))
        return payload

    def quietly(self, opcode: int, nodeid: int, body: bytes, queue: int = 0) -> None:
        """A request without reply, as the short queue gets them."""
        written, _ = self.driver.request(queue, [self.header(opcode, nodeid, len(body)), body], [])
        assert written == 0

    # operations --------------------------------------------------------------------------------------

    def init(self, minor: int = fuse.MINOR, flags: int = 0xFFFFFFFF) -> tuple[int, ...]:
        return fuse.INIT_OUT.unpack(self.call(fuse.INIT, 0, fuse.INIT_IN.pack(7, minor, 1 << 17, flags) + bytes(48)))

    def _entry(self, reply: bytes) -> Attr:
        nodeid, _, valid, _, valid_ns, _ = fuse.ENTRY_OUT.unpack_from(reply)
        return Attr(*fuse.ATTR.unpack_from(reply, fuse.ENTRY_OUT.size), nodeid, valid + valid_ns / 1e9)

    def lookup(self, parent: int, name: bytes) -> Attr:
        found = self._entry(self.call(fuse.LOOKUP, parent, name + b"\0"))
        if not found.nodeid:
            raise FileNotFoundError(2, "negative entry", name)
        return found

    def walk(self, path: str) -> Attr:
        """Look one name after the other up from the root."""
        at = ROOT
        for name in path.split("/"):
            found = self.lookup(at, os.fsencode(name))
            at = found.nodeid
        return found

    def forget(self, nodeid: int, count: int = 1) -> None:
        self.quietly(fuse.FORGET, nodeid, fuse.FORGET_IN.pack(count))

    def getattr(self, nodeid: int, fh: int | None = None) -> Attr:
        body = fuse.GETATTR_IN.pack(0 if fh is None else fuse.GETATTR_FH, 0, fh or 0)
        return self._attr(self.call(fuse.GETATTR, nodeid, body), nodeid)

    def _attr(self, reply: bytes, nodeid: int) -> Attr:
        valid, valid_ns, _ = fuse.ATTR_OUT.unpack_from(reply)
        return Attr(*fuse.ATTR.unpack_from(reply, fuse.ATTR_OUT.size), nodeid, valid + valid_ns / 1e9)

    def setattr(self, nodeid: int, valid: int, *, fh: int = 0, size: int = 0, mode: int = 0, uid: int = 0, gid: int = 0,
                atime: tuple[int, int] = (0, 0), mtime: tuple[int, int] = (0, 0)) -> Attr:
        mask = (1 << 64) - 1
        body = fuse.SETATTR_IN.pack(valid, 0, fh, size, 0, atime[0] & mask, mtime[0] & mask, 0, atime[1], mtime[1], 0,
                                    mode, 0, uid, gid, 0)
        return self._attr(self.call(fuse.SETATTR, nodeid, body), nodeid)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int = 0) -> Attr:
        return self._entry(self.call(fuse.MKNOD, parent, fuse.MKNOD_IN.pack(mode, rdev, 0, 0) + name + b"\0"))

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755) -> Attr:
        return self._entry(self.call(fuse.MKDIR, parent, fuse.MKDIR_IN.pack(mode, 0o22) + name + b"\0"))

    def symlink(self, parent: int, name: bytes, target: bytes) -> Attr:
        return self._entry(self.call(fuse.SYMLINK, parent, name + b"\0" + target + b"\0"))

    def readlink(self, nodeid: int) -> bytes:
        return self.call(fuse.READLINK, nodeid, room=4096)

    def link(self, nodeid: int, parent: int, name: bytes) -> Attr:
        return self._entry(self.call(fuse.LINK, parent, fuse.LINK_IN.pack(nodeid) + name + b"\0"))

    def unlink(self, parent: int, name: bytes) -> None:
        self.call(fuse.UNLINK, parent, name + b"\0")

    def rmdir(self, parent: int, name: bytes) -> None:
        self.call(fuse.RMDIR, parent, name + b"\0")

    def rename(self, parent: int, old: bytes, new_parent: int, new: bytes, flags: int | None = None) -> None:
        names = old + b"\0" + new + b"\0"
        if flags is None:
            self.call(fuse.RENAME, parent, fuse.RENAME_IN.pack(new_parent) + names)
        else:
            self.call(fuse.RENAME2, parent, fuse.RENAME2_IN.pack(new_parent, flags, 0) + names)

    def open(self, nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> int:
        return self.open_flags(nodeid, flags, open_flags)[0]

    def open_flags(self, nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> tuple[int, int]:
        fh, answered, _ = fuse.OPEN_OUT.unpack(self.call(fuse.OPEN, nodeid, fuse.OPEN_IN.pack(flags, open_flags)))
        return fh, answered

    def create(self, parent: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644) -> tuple[Attr, int]:
        reply = self.call(fuse.CREATE, parent, fuse.CREATE_IN.pack(flags, mode, 0o22, 0) + name + b"\0")
        return self._entry(reply), fuse.OPEN_OUT.unpack_from(reply, fuse.ENTRY_BYTES)[0]

    def read(self, fh: int, offset: int, size: int) -> bytes:
        return self.call(fuse.READ, 0, fuse.READ_IN.pack(fh, offset, size, 0, 0, 0, 0), room=size)

    def write(self, fh: int, offset: int, data: bytes, flags: int = os.O_RDWR, write_flags: int = 0) -> int:
        body = fuse.WRITE_IN.pack(fh, offset, len(data), write_flags, 0, flags, 0)
        return fuse.WRITE_OUT.unpack(self.call(fuse.WRITE, 0, body, data=data))[0]

    def flush(self, fh: int, owner: int = 0) -> None:
        self.call(fuse.FLUSH, 0, fuse.FLUSH_IN.pack(fh, 0, 0, owner))

    def release(self, fh: int, flags: int = 0) -> None:
        self.call(fuse.RELEASE, 0, fuse.RELEASE_IN.pack(fh, 0, flags, 0))

    def opendir(self, nodeid: int) -> int:
        return fuse.OPEN_OUT.unpack(self.call(fuse.OPENDIR, nodeid, fuse.OPEN_IN.pack(0, 0)))[0]

    def releasedir(self, fh: int) -> None:
        self.call(fuse.RELEASEDIR, 0, fuse.RELEASE_IN.pack(fh, 0, 0, 0))

    def readdir(self, fh: int, offset: int = 0, size: int = PAGE, plus: bool = False) -> list[tuple[bytes, int, int]]:
        """(name, offset of the next, node id or 0) of as many entries as fit."""
        reply = self.call(fuse.READDIRPLUS if plus else fuse.READDIR, 0,
                          fuse.READ_IN.pack(fh, offset, size, 0, 0, 0, 0), room=size)
        found, at = [], 0
        while at < len(reply):
            nodeid = fuse.ENTRY_OUT.unpack_from(reply, at)[0] if plus else 0
            at += fuse.ENTRY_BYTES if plus else 0
            _, following, length, _ = fuse.DIRENT.unpack_from(reply, at)
            name = reply[at + 24:at + 24 + length]
            found.append((name, following, nodeid))
            at += 24 + (length + 7 & ~7)
        return found

    def list(self, nodeid: int, plus: bool = False, size: int = PAGE) -> list[tuple[bytes, int, int]]:
        """All entries of a directory."""
        fh = self.opendir(nodeid)
        found: list[tuple[bytes, int, int]] = []
        while part := self.readdir(fh, found[-1][1] if found else 0, size, plus):
            found += part
        self.releasedir(fh)
        return found

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int = 0) -> None:
        self.call(fuse.SETXATTR, nodeid, fuse.SETXATTR_IN.pack(len(value), flags) + name + b"\0" + value)

    def getxattr(self, nodeid: int, name: bytes, size: int = 256) -> bytes:
        return self.call(fuse.GETXATTR, nodeid, fuse.GETXATTR_IN.pack(size, 0) + name + b"\0", room=max(size, 8))

    def listxattr(self, nodeid: int, size: int = 256) -> bytes:
        return self.call(fuse.LISTXATTR, nodeid, fuse.GETXATTR_IN.pack(size, 0), room=max(size, 8))

    def lock_body(self, fh: int, owner: int, kind: int, start: int = 0, end: int = (1 << 63) - 1,
                  flags: int = 0) -> bytes:
        return fuse.LK_IN.pack(fh, owner, start, end, kind, self.pid, flags, 0)
