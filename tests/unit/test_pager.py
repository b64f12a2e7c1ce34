"""hv/snapshot/pager.py and where its pages come from, against this process's own memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hv.errors import KernelError
from hv.linux.userfaultfd import Userfaultfd
from hv.snapshot.pack import pack_file
from hv.snapshot.page_source import FileSource, PackedSource
from hv.snapshot.pager import MISSING, REMOVED, THERE, Pager

PAGE, SIZE = 4096, 2 << 20
PAGES = SIZE // PAGE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """Content with holes, and the folder where it lies plain and packed."""
    folder = tmp_path_factory.mktemp("pages")
    rng = random.Random(5)
    content = bytearray(SIZE)
    for first, count in ((0, 3), (40, 30), (100, 1), (300, 170), (511, 1)):
        content[first * PAGE:(first + count) * PAGE] = rng.randbytes(count * PAGE)
    with open(folder / "plain", "w+b", 0) as plain, open(folder / "packed", "wb", 0) as packed:
        plain.truncate(SIZE)
        for page in range(PAGES):
            if any(content[page * PAGE:page * PAGE + PAGE]):
                os.pwrite(plain.fileno(), content[page * PAGE:page * PAGE + PAGE], page * PAGE)
        pack_file(plain.fileno(), packed.fileno())
    return bytes(content), folder


class Memory:
    """Two ranges with a gap between them, as guest RAM has, and a pager of them."""

    def __init__(self, folder: Path, kind: str, around: int = 16) -> None:
        self.map = mmap.mmap(-1, SIZE + 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.cut = 310 * PAGE
        self.uffd = Userfaultfd()
        regions = [(self.start, self.cut, 0), (self.start + self.cut + 4 * PAGE, SIZE - self.cut, self.cut)]
        for host, size, _ in regions:
            self.uffd.register(host, size)
        with open(folder / kind, "rb", 0) as file:
            fd = os.dup(file.fileno())
        self.fd = fd
        self.pager = Pager(self.uffd, regions, (FileSource if kind == "plain" else PackedSource)(fd, SIZE), around)

    def address(self, page: int) -> int:
        return self.start + page * PAGE + (4 * PAGE if page * PAGE >= self.cut else 0)

    def touch(self, pages: list[int]) -> bytes:
        """Their first bytes, read by a thread that waits in the kernel, while this one serves."""
        found = bytearray()
        libc = ctypes.CDLL(None)
        ours, theirs = os.pipe()

        def run() -> None:
            for page in pages:
                assert libc.write(theirs, ctypes.c_void_p(self.address(page)), PAGE) == PAGE
                found.extend(os.read(ours, PAGE))

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(100_000):
            if not thread.is_alive():
                break
            self.pager.serve()
        thread.join(1)
        assert not thread.is_alive()
        os.close(ours)
        os.close(theirs)
        return bytes(found)

    def all(self) -> bytes:
        return self.map[:self.cut] + self.map[self.cut + 4 * PAGE:]

    def give_back(self, page: int, count: int) -> None:
        libc = ctypes.CDLL(None)
        thread = threading.Thread(target=lambda: libc.madvise(ctypes.c_void_p(self.address(page)), count * PAGE,
                                                              mmap.MADV_DONTNEED))
        thread.start()
        while thread.is_alive():
            self.pager.serve()


@pytest.fixture(params=["plain", "packed"])
def memory(request: pytest.FixtureRequest, model: tuple[bytes, Path]) -> Iterator[Memory]:
    try:
        made = Memory(model[1], request.param)
    except KernelError as error:
        pytest.skip(f"{error}: {error.hint}")
    yield made
    made.uffd.close()
    os.close(made.fd)


def test_what_is_touched_is_what_was_saved(memory, model):
    content = model[0]
    pages = [0, 41, 69, 70, 5, 309, 310, 311, 511, 469, 470]
    assert memory.touch(pages) == b"".join(content[page * PAGE:page * PAGE + PAGE] for page in pages)
    assert memory.pager.pages.count(THERE) < 100        # and not much more than that is there


def test_all_of_it_in_the_background(memory, model):
    memory.touch([300, 8])
    memory.pager.work.append((0, PAGES))
    steps = 0
    while memory.pager.work:
        memory.pager.step()
        steps += 1
        assert steps < 200
    assert memory.pager.pages.count(THERE) == PAGES
    assert memory.all() == model[0]


def test_pages_given_back_read_0_and_what_was_written_stays(memory, model):
    content = bytearray(model[0])
    memory.touch([41, 44, 47])
    memory.map[42 * PAGE:43 * PAGE] = b"w" * PAGE
    content[42 * PAGE:43 * PAGE] = b"w" * PAGE
    memory.give_back(44, 2)
    memory.give_back(320, 5)            # never touched
    content[44 * PAGE:46 * PAGE], content[320 * PAGE:325 * PAGE] = bytes(2 * PAGE), bytes(5 * PAGE)
    assert memory.pager.pages[44:46] == bytes([REMOVED]) * 2
    pages = [44, 45, 46, 319, 320, 324, 325]
    assert memory.touch(pages) == b"".join(content[page * PAGE:page * PAGE + PAGE] for page in pages)
    memory.pager.work.append((0, PAGES))
    while memory.pager.work:
        memory.pager.step()
    memory.uffd.close()                 # what was given back and not touched since reads 0
    assert memory.all() == content


def test_what_is_there_without_the_pagers_knowledge_stays(memory, model):
    place = ctypes.create_string_buffer(b"k" * PAGE, PAGE)
    memory.uffd.copy(memory.address(45), ctypes.addressof(place), PAGE)
    memory.touch([44])
    assert memory.map[45 * PAGE:46 * PAGE] == b"k" * PAGE
    assert memory.map[46 * PAGE:47 * PAGE] == model[0][46 * PAGE:47 * PAGE]


@pytest.mark.parametrize("around", [1, 16])
def test_how_much_is_filled_in_around(model, around):
    try:
        memory = Memory(model[1], "plain", around)
    except KernelError as error:
        pytest.skip(f"{error}: {error.hint}")
    memory.touch([305])
    low = 305 // around * around
    # not over the gap between the ranges, at page 310
    assert memory.pager.pages.count(THERE) == min(around, 310 - low)
    assert memory.pager.pages.find(THERE) == low and memory.pager.pages[0] == MISSING
    memory.uffd.close()
    os.close(memory.fd)


def test_a_file_that_was_cut_is_told(model, tmp_path):
    (tmp_path / "plain").write_bytes(model[0])
    try:
        memory = Memory(tmp_path, "plain")
    except KernelError as error:
        pytest.skip(f"{error}: {error.hint}")
    os.truncate(tmp_path / "plain", 50 * PAGE)
    memory.pager.work.append((60, 61))
    with pytest.raises(KernelError, match="UFFDIO_COPY: EFAULT"):
        memory.pager.step()
    memory.uffd.close()
    os.close(memory.fd)
