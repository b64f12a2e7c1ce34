"""The program before the user's: 568 bytes of code in sealed memory that do lists of system calls.

Until its program runs, the container's first process would be Python: /proc/PID/exe would lead to the host's
interpreter, which a program inside that is root could write to once it got hold of it, by naming /proc/self/exe as the
program to start or as a script's interpreter (CVE-2019-5736). A created container would hold 8 MB while it waits. So
the first process is this small program, from its first moment on (far.py) or at last (init.py); its file is a memfd
sealed against writing, and its last list waits, enters the seccomp filter and runs the user's program.
hv/container/stub.S is the source. Run a second time, as /proc/self/exe of its own, it ends at its first steps, whose
descriptor has been closed.

It can also make a new process half way, for `exec`, whose first half stays outside of the container's pid namespace
where nobody inside can see it, and for the reaper of `--init`.

Driven by tests/unit/test_container_stub.py, tests/unit/test_container_stub_fork.py and
tests/root/test_container_safety.py.
"""

from __future__ import annotations

__all__ = ["CAPABILITIES", "DESCRIPTORS", "ELSEWHERE", "EXEC", "FILTER", "FORK", "GOTO", "HEADERS", "KEEP", "LAUNCH",
           "LEAVE", "LIMIT", "MAY_FAIL", "REAP", "REPLY", "TERMINAL", "WAIT", "Steps", "above", "become", "explain",
           "image", "inherit", "left_behind", "tell_process"]

import os
from fcntl import F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, FD_CLOEXEC, fcntl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

CODE = bytes.fromhex(
    "488d1d310200004c8b234883c308488b7b084889f848c1e83e83f8017508480fbaf73e488b3f488b73104889f048c1e8"
    "3e83f8017508480fbaf63e488b36488b53184889d048c1e83e83f8017508480fbaf23e488b124c8b53204c89d048c1e8"
    "3e83f8017508490fbaf23e4d8b124c8b43284c89c048c1e83e83f8017508490fbaf03e4d8b004c8b4b304c89c848c1e8"
    "3e83f8017508490fbaf13e4d8b098b030f05488b53404885d274034889024885c0790ff643050174414883c348e94cff"
    "ffff8b4b3cffc978f04c0f44e074eabf0100000083f90374104885c074dbffc97544480fbae81feb144885c07431488b"
    "5b10488b1be914ffffff48f7d848c1e0208b53384809d0504489e74889e6ba08000000b8010000000f05bf01000000b8"
    "e70000000f054989c54489e7b8030000000f05bf03000000beffffffff31d2b8b40100000f054881ec9000000048c704"
    "24ffffffff4889e7488d74241031d241ba08000000b8800000000f0585c07edd83f8117418817c24188000000074ce4c"
    "89ef89c6b83e0000000f05ebc048c7c7ffffffff4889e6ba010000004531d2b83d0000000f0585c07ea34c39e875de8b"
    "04240fb6fc83e07f0f8461ffffff8db880000000e956ffffff5341544889fbbf020000004889de488d530841ba080000"
    "00b80e0000000f05488b4310488b7b18488b7320488b53284c8b53304c8b43380f054885c0750d4c8b63404883c348e9"
    "fafdffff50bf02000000488d730831d241ba08000000b80e0000000f0558415c5bc3cccccccccccc")
LAUNCH = 0x1C9                          # where `launch` is in it
_BASE = 0x400000                        # where the file lies in memory, all of it readable and executable
HEADERS = 64 + 56                      # Elf64_Ehdr, Elf64_Phdr (man 5 elf)
_TABLE = HEADERS + len(CODE) + 8       # the rows, behind the number of the descriptor
_ROW = 72
# include/uapi/linux/memfd.h, fcntl.h
_MFD_EXEC, _F_ADD_SEALS, _ALL_SEALS = 0x10, 1033, 0x1 | 0x2 | 0x4 | 0x8
# steps, as they stand in a report of failure
KEEP, WAIT, FILTER, CAPABILITIES, DESCRIPTORS, EXEC, FORK, TERMINAL, LIMIT = range(1, 10)
_WHAT = {KEEP: "start", WAIT: "wait for start", FILTER: "linux.seccomp", CAPABILITIES: "process.capabilities",
         DESCRIPTORS: "closing descriptors", FORK: "clone", TERMINAL: "process.terminal", LIMIT: "process.rlimits"}
# what is done with the result of a step (stub.S)
REPLY, LEAVE, REAP, GOTO = 1, 2, 3, 4
MAY_FAIL = 1 << 40                      # in the word of the number
ELSEWHERE = 1 << 62                     # in that of an argument: this is its address
_PROCESS = 1 << 31                      # in a report of LEAVE: this is no error number


class Steps:
    """System calls to be done; memory they point to is carried along."""

    def __init__(self, reply: int) -> None:
        self._reply = reply
        self._rows: list[tuple[int, int, int, tuple[Any, ...]]] = []

    def add(self, tag: int, number: int, *arguments: Any, result: int = 0) -> None:
        """Call `number` with numbers, bytes or lists of bytes (a list: an array of pointers that ends with NULL).

        `result`: REPLY, it is the descriptor to which a later failure is reported. LEAVE, it is a new process, which
        does what follows, while this one reports FORK and the process's number, and ends. REAP: this one stays, passes
        signals on, and ends as that one does; all signals must be blocked.
        """
        self._rows.append((tag, result, number, arguments))

    def image(self) -> bytes:
        """The program's file."""
        data = bytearray()
        start = _BASE + _TABLE + _ROW * len(self._rows)

        def place(content: bytes) -> int:
            data.extend(bytes(-len(data) % 8))
            data.extend(content + b"\0")
            return start + len(data) - len(content) - 1

        def address(value: Any) -> int:
            if isinstance(value, list):
                return place(b"".join(_word(place(item)) for item in value) + bytes(8))
            if isinstance(value, tuple):                    # a structure: numbers, and the addresses of what it holds
                return place(b"".join(_word(address(item)) for item in value))
            return place(value) if isinstance(value, bytes) else int(value)

        rows = bytearray()
        for tag, result, number, arguments in self._rows:
            words = [number & 0xFFFFFFFF, *map(address, arguments), *[0] * (6 - len(arguments)), tag | result << 32, 0]
            rows += b"".join(map(_word, words))
        rest = CODE + _word(self._reply) + rows + data
        return _headers(HEADERS + len(rest)) + rest


def _word(value: int) -> bytes:
    return (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")


def _headers(size: int) -> bytes:
    """An ELF file with one segment (man 5 elf): ET_EXEC, EM_X86_64; PT_LOAD, PF_R | PF_X."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    file = (ident + b"\x02\0\x3e\0\x01\0\0\0" + _word(_BASE + HEADERS) + _word(64) + _word(0) + bytes(4)
            + b"\x40\0\x38\0\x01\0" + bytes(6))
    return file + b"\x01\0\0\0\x05\0\0\0" + b"".join(map(_word, (0, _BASE, _BASE, size, size, 0x1000)))


def image(steps: Steps) -> int:
    """A descriptor of the program that does `steps`, sealed."""
    try:
        fd = os.memfd_create("pyhv-init", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_EXEC)
    except OSError:                     # Linux before 6.3 does not know MFD_EXEC
        fd = os.memfd_create("pyhv-init", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    content = steps.image()
    while content:
        content = content[os.write(fd, content):]
    fcntl(fd, _F_ADD_SEALS, _ALL_SEALS)
    return fd


def become(steps: Steps) -> NoReturn:
    """Become the program that does `steps`. Returns only by OSError."""
    os.execve(image(steps), [b"pyhv-init"], {})


def inherit(fd: int, lowest: int) -> int:
    """`fd` under a number from `lowest` on, open in the next program."""
    fresh = fcntl(fd, F_DUPFD, lowest)
    fcntl(fresh, F_SETFD, fcntl(fresh, F_GETFD) & ~FD_CLOEXEC)
    return fresh


def above(fd: int, lowest: int) -> int:
    """`fd`, or in its place a copy under a number from `lowest` on."""
    if not 0 <= fd < lowest:
        return fd
    fresh = fcntl(fd, F_DUPFD_CLOEXEC, lowest)
    os.close(fd)
    return fresh


def left_behind(report: bytes) -> int:
    """The process that a step LEAVE has made, where `report` tells of one; else 0."""
    tag, number = (int.from_bytes(report[at:at + 4], "little") for at in (0, 4))
    return number & ~_PROCESS if len(report) == 8 and tag == FORK and number & _PROCESS else 0


def tell_process(pid: int) -> bytes:
    """The report of LEAVE, for who does that step itself."""
    return FORK.to_bytes(4, "little") + (pid | _PROCESS).to_bytes(4, "little")


def explain(report: bytes, program: str) -> str:
    """What a report of failure means: tag and errno, or a text of Python's."""
    if len(report) != 8 or report[3]:
        return report.decode(errors="replace")
    tag, number = (int.from_bytes(report[at:at + 4], "little") for at in (0, 4))
    if tag == EXEC:
        return f'exec: "{program}": {os.strerror(number).lower()}'
    return f"{_WHAT.get(tag, 'start')}: {os.strerror(number)}"
