"""One FUSE request as the file server sees it, and what several operations read from or write into one.

Names are checked here: one component, as bytes. Driven by tests/unit/test_virtio_fs.py.
"""

from __future__ import annotations

__all__ = ["LATER", "MOST_OFFSET", "Request", "attributes", "checked_name", "names"]

from errno import EINVAL, ENAMETOOLONG

from hv.devices.virtio.fuse import ATTR

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hv.devices.virtio.chain import Chain
    from hv.devices.virtio.fs_host import FileServer

    Reply = bytes | bytearray | int | None
    Handler = Callable[["FileServer", "Request"], Reply]

LATER = None                    # a handler's reply: there will be one
MOST_OFFSET = (1 << 63) - 1     # loff_t
_NAME_MAX = 255                 # bytes in one component (include/uapi/linux/limits.h)
_U64 = (1 << 64) - 1
_SECOND = 10**9


class Request:
    """A request's header and contents: `body` is a copy, `data` views of what a WRITE brings.

    `room` is how many bytes the reply may have behind its header, `views` where a READ puts them.
    """

    __slots__ = ("body", "data", "gid", "nodeid", "opcode", "pid", "place", "room", "uid", "unique", "views")

    def __init__(self, opcode: int, unique: int, nodeid: int, uid: int, gid: int, pid: int, body: bytes,
                 data: list[memoryview], room: int, views: list[memoryview]) -> None:
        self.opcode = opcode
        self.unique = unique
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.body = body
        self.data = data
        self.room = room
        self.views = views
        self.place: tuple[int, Chain] | None = None      # queue and chain, where it is answered LATER


def checked_name(name: bytes) -> bytes:
    """`name`, if it is one component of a path; OSError otherwise."""
    if len(name) > _NAME_MAX:
        raise OSError(ENAMETOOLONG, "name too long")
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise OSError(EINVAL, "not one name")
    return name


def names(body: bytes, offset: int, count: int) -> list[bytes]:
    """The `count` strings from `offset` on, each ended by a zero byte; OSError where they are not there."""
    parts = body[offset:].split(b"\0", count)
    if len(parts) <= count:
        raise OSError(EINVAL, "a string without end")
    return parts[:count]


def attributes(status: os.stat_result) -> bytes:
    """struct fuse_attr."""
    # Python's integers from seconds before 1970 are negative; on the wire they are 64 bits (ns >= 0 in both).
    accessed, modified, changed = status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns
    return ATTR.pack(status.st_ino, status.st_size, status.st_blocks, accessed // _SECOND & _U64,
                     modified // _SECOND & _U64, changed // _SECOND & _U64, accessed % _SECOND, modified % _SECOND,
                     changed % _SECOND, status.st_mode, status.st_nlink, status.st_uid, status.st_gid,
                     # makedev() puts 12 bits of major and 20 of minor where the kernel's u32 has them
                     status.st_rdev & 0xFFFFFFFF, status.st_blksize, 0)
