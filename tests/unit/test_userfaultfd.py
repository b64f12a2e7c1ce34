"""hv/linux/userfaultfd.py: numbers against the header, and faults of a real second process."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hv.errors import KernelError
from hv.linux import userfaultfd
from hv.linux.userfaultfd import EVENT_PAGEFAULT, EVENT_REMOVE, Userfaultfd

PAGE = 4096
NAMES = {name: value for name, value in vars(userfaultfd).items()
         if name.startswith(("UFFDIO_", "USERFAULTFD_"))} | {
    "UFFD_API": userfaultfd.API, "UFFD_FEATURE_EVENT_REMOVE": userfaultfd.FEATURE_EVENT_REMOVE,
    "UFFDIO_REGISTER_MODE_MISSING": userfaultfd.MODE_MISSING, "UFFD_EVENT_PAGEFAULT": EVENT_PAGEFAULT,
    "UFFD_EVENT_REMOVE": EVENT_REMOVE, "__NR_userfaultfd": userfaultfd.SYS_USERFAULTFD,
    "sizeof(struct uffdio_api)": userfaultfd._API.size, "sizeof(struct uffdio_copy)": userfaultfd._COPY.size,
    "sizeof(struct uffdio_register)": userfaultfd._REGISTER.size, "sizeof(struct uffd_msg)": userfaultfd._MESSAGE.size,
    "sizeof(struct uffdio_zeropage)": userfaultfd._ZEROPAGE.size, "offsetof(struct uffdio_copy, copy)": 32,
    "offsetof(struct uffd_msg, arg.pagefault.address)": 16, "offsetof(struct uffd_msg, arg.remove.end)": 16,
}


def test_the_numbers_are_the_headers(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not os.path.exists("/usr/include/linux/userfaultfd.h"):
        pytest.skip("no C compiler, or no kernel headers (apt-get install gcc linux-libc-dev)")
    headers = ("linux/userfaultfd.h", "sys/ioctl.h", "sys/syscall.h", "stddef.h", "stdio.h")
    lines = [*(f"#include <{name}>" for name in headers), "int main(void) {"]
    lines += [f'printf("%llu\\n", (unsigned long long)({name}));' for name in NAMES]
    source = tmp_path / "a.c"
    source.write_text("\n".join([*lines, "}"]))
    subprocess.run([compiler, "-w", "-o", tmp_path / "a", source], check=True, timeout=60)
    found = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True, timeout=20).stdout.split()
    assert dict(zip(NAMES, map(int, found), strict=True)) == NAMES


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    try:
        made = Userfaultfd()
    except KernelError as error:
        pytest.skip(f"{error}: {error.hint}")
    yield made
    made.close()
    made.close()


@pytest.fixture
def area() -> Iterator[tuple[mmap.mmap, int]]:
    made = mmap.mmap(-1, 16 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    yield made, ctypes.addressof(ctypes.c_char.from_buffer(made))


def touching(address: int) -> threading.Thread:
    """A thread that reads a byte there, as a system call does: without the interpreter's lock."""
    ends = os.pipe()

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.write(ends[1], ctypes.c_void_p(address), 1) == 1
        for fd in ends:
            os.close(fd)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def event(uffd: Userfaultfd, tries: int = 500) -> tuple[int, int, int]:
    for _ in range(tries):
        if found := uffd.events():
            return found[0]
        threading.Event().wait(0.01)
    raise AssertionError("no event came")


def test_a_touch_waits_until_the_page_is_there(uffd, area):
    memory, start = area
    uffd.register(start, 16 * PAGE)
    assert uffd.events() == []
    thread = touching(start + 3 * PAGE + 5)
    kind, address, _ = event(uffd)
    assert (kind, address & -PAGE) == (EVENT_PAGEFAULT, start + 3 * PAGE)
    content = ctypes.create_string_buffer((b"abcdef" * PAGE)[:4 * PAGE], 4 * PAGE)
    assert uffd.copy(start + 2 * PAGE, ctypes.addressof(content), 4 * PAGE) == (4 * PAGE, 0)
    thread.join(10)
    assert not thread.is_alive()
    assert memory[2 * PAGE:6 * PAGE] == content.raw
    # what is there is not written over: the count says how far it came
    other = ctypes.create_string_buffer(b"x" * 4 * PAGE, 4 * PAGE)
    assert uffd.copy(start, ctypes.addressof(other), 4 * PAGE) == (2 * PAGE, errno.EAGAIN)
    assert uffd.copy(start + 2 * PAGE, ctypes.addressof(other), PAGE) == (0, errno.EEXIST)
    assert memory[:3 * PAGE] == other.raw[:2 * PAGE] + content.raw[:PAGE]
    assert uffd.zero(start + 6 * PAGE, 10 * PAGE) == (10 * PAGE, 0)
    assert memory[6 * PAGE:] == bytes(10 * PAGE)


def test_giving_back_is_an_event_and_the_page_is_missing_again(uffd, area):
    memory, start = area
    uffd.register(start, 16 * PAGE)
    uffd.zero(start, 16 * PAGE)
    libc = ctypes.CDLL(None, use_errno=True)
    thread = threading.Thread(target=lambda: libc.madvise(ctypes.c_void_p(start + PAGE), 2 * PAGE, mmap.MADV_DONTNEED))
    thread.start()
    assert event(uffd) == (EVENT_REMOVE, start + PAGE, start + 3 * PAGE)
    thread.join(10)
    content = ctypes.create_string_buffer(b"y" * 2 * PAGE, 2 * PAGE)
    assert uffd.copy(start + PAGE, ctypes.addressof(content), 2 * PAGE) == (2 * PAGE, 0)
    assert memory[:4 * PAGE] == bytes(PAGE) + content.raw + bytes(PAGE)


def test_unregister_and_close_let_go(uffd, area):
    memory, start = area
    uffd.register(start, 16 * PAGE)
    for page, end in ((0, lambda: uffd.unregister(start, 8 * PAGE)), (9, uffd.close)):
        thread = touching(start + page * PAGE)
        event(uffd)
        end()
        thread.join(10)
        assert not thread.is_alive()
    assert memory[:] == bytes(16 * PAGE)


def test_errors_are_told(uffd, area):
    _, start = area
    with pytest.raises(KernelError, match="UFFDIO_REGISTER: EINVAL"):
        uffd.register(start + 1, PAGE)
    assert uffd.copy(start, start, PAGE) == (0, errno.ENOENT)       # never registered
    uffd.register(start, 16 * PAGE)
    with pytest.raises(KernelError, match="UFFDIO_COPY: EFAULT"):
        uffd.copy(start, 4096, PAGE)
