"""One range of guest RAM and the host mapping behind it."""

from __future__ import annotations

__all__ = ["Region"]

import ctypes
import mmap
import os

from hv.errors import ConfigError, KernelError

_MAP_NORESERVE = 0x4000         # asm-generic/mman.h: RAM the guest never touches costs nothing
_MAP_HUGETLB = 0x40000          # asm-generic/mman.h
_HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23       # asm-generic/mman-common.h, since Linux 5.14


class Region:
    """RAM at guest-physical [gpa, gpa+size), mapped at `host` in this process.

    `backing` is "anon" or "memfd" (another process can map it). `huge` is "" (none), "thp"
    (madvise) or "2M" (hugetlbfs pages, which the host must have reserved). With `file` the RAM begins as that
    descriptor's content from `file_offset` on, read when it is touched and shared with whoever else maps the file; what
    is written stays here. The descriptor is the caller's, and must outlive the range.
    """

    __slots__ = ("_map", "_page", "fd", "file", "file_offset", "gpa", "host", "size", "view")

    def __init__(self, gpa: int, size: int, *, backing: str = "anon", huge: str = "", ksm: bool = False,
                 prefault: bool = False, file: int = -1, file_offset: int = 0) -> None:
        self.gpa = gpa
        self.size = size
        self.fd = -1
        self.file, self.file_offset = file, file_offset
        self._page = _HUGE_PAGE if huge == "2M" else mmap.PAGESIZE
        flags = _MAP_HUGETLB if huge == "2M" else _MAP_NORESERVE
        try:
            if backing == "memfd":
                flags_2m = os.MFD_HUGETLB if huge == "2M" else 0
                self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags_2m)
                os.ftruncate(self.fd, size)
                _keep_size(self.fd)
                self._map = mmap.mmap(self.fd, size, mmap.MAP_SHARED | flags)
            elif file >= 0:
                self._map = mmap.mmap(file, size, mmap.MAP_PRIVATE | flags, offset=file_offset)
            else:
                self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise _no_memory(size, huge, error) from None
        anchor = ctypes.c_char.from_buffer(self._map)
        self.host = ctypes.addressof(anchor)
        del anchor      # an export would keep the mapping from being closed
        if huge == "thp":
            self._advise(mmap.MADV_HUGEPAGE, "MADV_HUGEPAGE", "this kernel has no transparent huge pages")
        if ksm:
            self._advise(mmap.MADV_MERGEABLE, "MADV_MERGEABLE", "this kernel has no KSM (CONFIG_KSM)")
        if prefault:
            self._advise(_MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE", "the host has too little free memory")
        self.view = memoryview(self._map)

    def discard(self, start: int, length: int) -> int:
        """Give the host its pages of [start, start+length) of the range; they read 0 until they are written again,
        or what the file has there where the range began as one.

        How many bytes that was: whole pages of the host's only (man 2 madvise), none where it refuses, as for locked
        memory. Nothing else of the range changes.
        """
        page = self._page
        first, end = (start + page - 1) // page * page, (start + length) // page * page
        if not 0 <= first < end <= self.size:
            return 0
        try:
            self._map.madvise(mmap.MADV_DONTNEED if self.fd < 0 else mmap.MADV_REMOVE, first, end - first)
        except OSError:
            return 0
        return end - first

    def close(self) -> None:
        """Give the memory back; views handed out earlier keep it alive until they are gone."""
        if hasattr(self, "view"):
            self.view.release()
        try:
            if hasattr(self, "_map"):
                self._map.close()
        except BufferError:
            pass        # a device still holds a view; the mapping goes with the last one
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _advise(self, advice: int, name: str, hint: str) -> None:
        try:
            self._map.madvise(advice)
        except OSError as error:
            self.close()
            raise KernelError(f"madvise({name}, {self.size >> 20} MiB)", error.errno or 0, hint) from None


def _keep_size(fd: int) -> None:
    """Whoever else maps it can't cut it off under us, which would be a SIGBUS (man 2 memfd_create)."""
    from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl

    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)


def _no_memory(size: int, huge: str, error: Exception) -> ConfigError:
    hint = "ask for less with --memory"
    if huge == "2M":
        hint = "reserve huge pages first: echo N > /proc/sys/vm/nr_hugepages (N pages of 2 MiB)"
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return ConfigError(f"the host can't give {size >> 20} MiB of guest memory: {reason}", hint)
