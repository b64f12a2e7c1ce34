"""userfaultfd(2): a process fills in pages of memory, its own or another's, when they are first touched.

    open, api      a descriptor for one address space: that of the process that opened it, whoever holds it later
    register       from here on a touch of a page that is not there waits, and is an event to be read
    copy, zero     a page is there, and who waits for it goes on; on what is there already: EEXIST
    remove event   pages were given back (madvise(2), MADV_DONTNEED); who did that waits until the event is read

Source: include/uapi/linux/userfaultfd.h, Documentation/admin-guide/mm/userfaultfd.rst. KVM and system calls touch
memory from within the kernel, so descriptors for user mode only, which anybody may have, are no use. Left out on
purpose: write protection, minor faults, events of fork and mremap, huge pages. No ctypes package, as in
hv/linux/syscall.py: the process that serves pages starts in a few ms. Driven by tests/unit/test_userfaultfd.py.
"""

from __future__ import annotations

__all__ = ["EVENT_PAGEFAULT", "EVENT_REMOVE", "Userfaultfd"]

import os
from errno import EAGAIN, EEXIST, ENOENT, EPERM, ESRCH
from struct import Struct

from hv.errors import KernelError
from hv.linux.ioc import io, ior, iowr
from hv.linux.syscall import buffer, syscall, try_syscall

SYS_IOCTL, SYS_USERFAULTFD = 16, 323        # arch/x86/entry/syscalls/syscall_64.tbl
API = 0xAA                                  # UFFD_API
FEATURE_EVENT_REMOVE = 1 << 3
MODE_MISSING = 1 << 0                       # UFFDIO_REGISTER_MODE_MISSING
EVENT_PAGEFAULT, EVENT_REMOVE = 0x12, 0x15

_API = Struct("<QQQ")                       # struct uffdio_api: api, features, ioctls
_REGISTER = Struct("<QQQQ")                 # struct uffdio_register: start, len, mode, ioctls
_RANGE = Struct("<QQ")                      # struct uffdio_range
_COPY = Struct("<QQQQq")                    # struct uffdio_copy: dst, src, len, mode, copy
_ZEROPAGE = Struct("<QQQq")                 # struct uffdio_zeropage: start, len, mode, zeropage
_MESSAGE = Struct("<B7xQQQ")                # struct uffd_msg: event, flags and address, or start and end

USERFAULTFD_IOC_NEW = io(0xAA, 0x00)        # on /dev/userfaultfd
UFFDIO_API = iowr(0xAA, 0x3F, _API.size)
UFFDIO_REGISTER = iowr(0xAA, 0x00, _REGISTER.size)
UFFDIO_UNREGISTER = ior(0xAA, 0x01, _RANGE.size)
UFFDIO_WAKE = ior(0xAA, 0x02, _RANGE.size)
UFFDIO_COPY = iowr(0xAA, 0x03, _COPY.size)
UFFDIO_ZEROPAGE = iowr(0xAA, 0x04, _ZEROPAGE.size)

_EVENTS = 16                                # read at once
_HINT = "root may, others with sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd"


class Userfaultfd:
    """One descriptor. Made for this process's memory, or around a `fd` that came from another, whose memory it is."""

    def __init__(self, fd: int = -1) -> None:
        self.fd = _open() if fd < 0 else fd
        self._copy = buffer(_COPY.size)
        self._zero = buffer(_ZEROPAGE.size)
        if fd < 0:
            try:
                self._ioctl("UFFDIO_API", UFFDIO_API, _API.pack(API, FEATURE_EVENT_REMOVE, 0))
            except BaseException:
                self.close()
                raise

    def register(self, start: int, length: int) -> None:
        """Wait for missing pages of [start, start+length), which is anonymous memory or a memfd's."""
        self._ioctl("UFFDIO_REGISTER", UFFDIO_REGISTER, _REGISTER.pack(start, length, MODE_MISSING, 0))

    def unregister(self, start: int, length: int) -> None:
        """No longer: who waits goes on, and what is missing reads 0."""
        self._ioctl("UFFDIO_UNREGISTER", UFFDIO_UNREGISTER, _RANGE.pack(start, length))

    def copy(self, start: int, source: int, length: int) -> tuple[int, int]:
        """Fill [start, start+length) from `source`, an address in this process: (bytes done, errno).

        Where that is less than asked for, errno says why: EEXIST, something is there; EAGAIN, an event is to be read
        first; ENOENT, no such range any more; ESRCH, the process has ended. KernelError for all else.
        """
        place = self._copy
        place.raw = _COPY.pack(start, source, length, 0, 0)
        result = try_syscall(SYS_IOCTL, self.fd, UFFDIO_COPY, place)
        return _outcome("UFFDIO_COPY", result, _COPY.unpack(place.raw)[4], length)

    def zero(self, start: int, length: int) -> tuple[int, int]:
        """Fill with zeros, which takes no memory until it is written. As copy()."""
        place = self._zero
        place.raw = _ZEROPAGE.pack(start, length, 0, 0)
        result = try_syscall(SYS_IOCTL, self.fd, UFFDIO_ZEROPAGE, place)
        return _outcome("UFFDIO_ZEROPAGE", result, _ZEROPAGE.unpack(place.raw)[3], length)

    def wake(self, start: int, length: int) -> None:
        """Who waits for a page of these looks again."""
        self._ioctl("UFFDIO_WAKE", UFFDIO_WAKE, _RANGE.pack(start, length))

    def events(self) -> list[tuple[int, int, int]]:
        """What has happened: (EVENT_PAGEFAULT, address, flags), (EVENT_REMOVE, start, end). Empty where nothing has."""
        try:
            data = os.read(self.fd, _EVENTS * _MESSAGE.size)
        except BlockingIOError:
            return []
        found = []
        for event, first, second, _ in _MESSAGE.iter_unpack(data):
            found.append((event, second, first) if event == EVENT_PAGEFAULT else (event, first, second))
        return found

    def close(self) -> None:
        """Where it was the last holder of the descriptor, missing pages read 0 from here on. May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _ioctl(self, name: str, request: int, argument: bytes) -> None:
        syscall(name, SYS_IOCTL, self.fd, request, buffer(len(argument), argument))


def _open() -> int:
    """A descriptor that does not block, also for faults within the kernel. KernelError says who may have one."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    result = try_syscall(SYS_USERFAULTFD, flags)
    if result == -EPERM:
        try:
            device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            raise KernelError("userfaultfd", EPERM, _HINT) from None
        try:
            result = try_syscall(SYS_IOCTL, device, USERFAULTFD_IOC_NEW, flags)
        finally:
            os.close(device)
    if result < 0:
        raise KernelError("userfaultfd", -result, _HINT if result == -EPERM else "a kernel with CONFIG_USERFAULTFD")
    return result


def _outcome(name: str, result: int, done: int, length: int) -> tuple[int, int]:
    """The kernel leaves in the structure how many bytes were done, or minus errno where none were."""
    if result >= 0:
        return length, 0
    if done > 0:
        return done, EAGAIN
    if -result in (EEXIST, EAGAIN, ENOENT, ESRCH):
        return 0, -result
    raise KernelError(name, -result)
