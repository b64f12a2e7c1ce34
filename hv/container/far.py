"""A container's first process without Python in it: the program of stub.py from its first moment on, which does what
the runtime tells it.

    runtime                                                    the new process
       | --- clone with CLONE_VM and CLONE_VFORK ---------------->|  keeps some descriptors, runs the program: no page
       |                                                          |  is copied, nothing of the runtime's memory is left
       | --- where a list of system calls begins ---------------->|
       |<-- done, or (number of the call, errno), and it ends ----|  and so on, for each list

The lists lie in memory that both have, the results as well: a call takes the result of an earlier one as an argument
without the runtime's hearing of it. Only where it has to know a result before it can go on does it wait for one; all
decisions are the runtime's. The last list ends as stub.py's programs do: wait for start, filter, the user's program.

Left out, and done by a fork of the runtime that makes the same calls itself (init.py): what needs Python inside (hooks,
terminals, tmpcopyup, labels, a supervisor's filter, --no-pivot) or several steps to get there (joined pid and user
namespaces, time namespaces), and what a user without rights does. What CRIU restores is made by it (restore.py). Driven
by tests/root/test_container_far.py, tests/unit/test_far.py.
"""

from __future__ import annotations

__all__ = ["Far", "Program", "able", "program"]

import os
from _ctypes import addressof
from _signal import SIGKILL
from _struct import Struct

from hv.container import stub
from hv.container.state import rootless
from hv.errors import HvError, KernelError
from hv.linux import creds
from hv.linux.hands import Hands
from hv.linux.ns import CLONE_FLAGS, CLONE_HINT, CLONE_INTO_CGROUP
from hv.linux.syscall import buffer, call_at, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Container
    from typing import Any

    from hv.container.process import Plan
    from hv.linux.hands import Teller

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_READ, _SYS_WRITE, _SYS_CLOSE, _SYS_MMAP, _SYS_MUNMAP, _SYS_CLONE = 0, 1, 3, 9, 11, 56
_SYS_FCNTL, _SYS_EXECVEAT, _SYS_CLONE3 = 72, 322, 435
_PROT_RX, _PROT_RW, _MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED = 1 | 4, 1 | 2, 1, 2, 0x10        # asm-generic/mman-common.h
_F_SETFD, _AT_EMPTY_PATH = 2, 0x1000
_CLONE_VM, _CLONE_VFORK, _CLONE_PARENT_SETTID, _SIGCHLD = 0x100, 0x4000, 0x100000, 17     # include/uapi/linux/sched.h
_ROW = Struct("<9q").pack
_NULS = [bytes(8 - rest) for rest in range(8)]
# the memory that both have: where the new process has it, and the parts of it
_BASE, _SIZE = 0x10000000, 64 << 20
_ROOMS, _LISTS = 1 << 20, 16 << 20      # from 0 on results, then rooms, then lists and what they point to
_RESULTS_MOST = _ROOMS // 8
_EAGER = 48 * 72                        # bytes of calls that are worth to begin with
_OPEN_MOST = 128                        # descriptors that wait for the end
_IMAGE_MOST = 4096                      # the program is smaller than a page
_TAG = 1 << 16                          # of the first call of all; less is stub.py's
_DONE = bytes(8)
_HANDLE = stub.ELSEWHERE | _BASE        # and 8 times its number: the result of a call


class Far(Hands):
    """The hands of a new process. `inside`, `memory`: its descriptors of the channel and of the memory; `begin` makes
    it, once its first list is there."""

    def __init__(self, channel: socket, inside: int, memory: int, begin: Callable[[], None]) -> None:
        super().__init__()
        self._begin: Callable[[], None] | None = begin
        self._channel, self.inside, self.memory = channel, inside, memory
        self._calls: list[tuple[str, str, Container[int], Teller | None]] = []
        self._known = 0                 # results that have been looked at
        self._values: list[int] = []
        self._rooms = _ROOMS
        self._used: dict[int, int] = {}         # the call that writes to a room: the first after it was made
        self._lists = _LISTS            # where the next list goes
        self._data, self._rows = bytearray(), bytearray()
        self._places: dict[bytes, int] = {}
        self._open: list[Any] = []
        self._open_most = min(_OPEN_MOST, os.sysconf("SC_OPEN_MAX") // 2)

    # calls -----------------------------------------------------------------------------------------

    def do(self, name: str, number: int, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0, f: Any = 0, *,
           hint: str = "", may: Container[int] = ()) -> Any:
        calls, places = self._calls, self._places
        index = len(calls)
        calls.append((name, hint, may, self.teller))
        if may:
            number |= stub.MAY_FAIL
        # written out, for this is done three hundred times
        if a.__class__ is not int:
            a = places.get(a) or self._address(a)
        if b.__class__ is not int:
            b = places.get(b) or self._address(b)
        if c.__class__ is not int:
            c = places.get(c) or self._address(c)
        if d.__class__ is not int:
            d = places.get(d) or self._address(d)
        rows = self._rows
        rows += _ROW(number, a, b, c, d, e, f, _TAG + index, _BASE + 8 * index)
        if len(rows) > _EAGER:
            self.post()
        return _HANDLE + 8 * index

    def add(self, tag: int, number: int, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0, f: Any = 0, *,
            result: int = 0) -> None:
        """As stub.Steps.add: what is reported with `tag` once nobody asks for results any more."""
        words = [word if word.__class__ is int else self._address(word) for word in (a, b, c, d, e, f)]
        self._rows += _ROW(number, *words, tag | result << 32, 0)

    def _address(self, argument: Any) -> int:
        if argument.__class__ is bytes:
            return self._places.get(argument) or self._place(argument)
        if argument is None:
            return 0
        if isinstance(argument, list):          # an array of pointers, NULL at its end
            return self._place(b"".join(self._address(item).to_bytes(8, "little") for item in argument) + bytes(8))
        if isinstance(argument, tuple):         # a structure: numbers, and the addresses of what it holds
            return self._place(b"".join((item if isinstance(item, int) else self._address(item)).to_bytes(8, "little")
                                        for item in argument))
        return self._place(bytes(argument))

    def _place(self, content: bytes) -> int:
        """The address of a copy in the next list, NUL behind it."""
        data = self._data
        address = _BASE + self._lists + len(data)
        data += content
        data += _NULS[len(content) % 8]
        self._places[content] = address
        return address

    def close(self, fd: Any) -> None:
        """Left to the last list, which closes all there is, as long as there are not too many."""
        self._open.append(fd)
        if len(self._open) > self._open_most:
            waiting, self._open = self._open, []
            for open_one in waiting:
                super().close(open_one)

    def settle(self) -> None:
        """Close what is to be closed, and from now on at once."""
        waiting, self._open, self._open_most = self._open, [], 0
        for fd in waiting:
            super().close(fd)

    def repeat(self, name: str, number: int, rows: list[tuple[int, int]]) -> None:
        calls = self._calls
        tag, slot = _TAG + len(calls), _BASE + 8 * len(calls)
        calls.append((name, "", (), self.teller))
        self._rows += b"".join([_ROW(number, a, b, 0, 0, 0, 0, tag, slot) for a, b in rows])

    def room(self, size: int) -> Any:
        room = _BASE + self._rooms
        self._rooms += (size + 7) & ~7
        if self._rooms > _LISTS:
            raise HvError("the configuration is too large for one process to be prepared")
        self._used[room] = len(self._calls)
        return room

    def read(self, room: Any, size: int) -> bytes:
        if self._used[room] >= self._known:
            self.flush()
        return os.pread(self.memory, size, room - _BASE)

    def value(self, handle: Any) -> int:
        index = int(handle - _HANDLE) >> 3
        if index >= self._known:
            self.flush()
        return self._values[index]

    # lists -----------------------------------------------------------------------------------------

    def post(self) -> None:
        """Have what was said so far done meanwhile."""
        # where the next list begins is read into the last of the results
        self._rows += _ROW(_SYS_READ, self.inside, _BASE + _ROOMS - 8, 8, 0, 0, 0, stub.KEEP | stub.GOTO << 32, 0)
        self._send()

    def flush(self) -> None:
        """Have it done, and wait for it."""
        self._rows += _ROW(_SYS_WRITE, self.inside, self._address(_DONE), 8, 0, 0, 0, stub.KEEP, 0)
        self.post()
        report = self.report()
        self._look()
        if report != _DONE:
            self.fail(report)

    def end(self) -> None:
        """Have the last list done, whose end is heard of by the channel's end."""
        self._send()

    def _send(self) -> None:
        if len(self._calls) >= _RESULTS_MOST - 1 or self._lists + len(self._data) + len(self._rows) > _SIZE:
            raise HvError("the configuration is too large for one process to be prepared")
        start = _BASE + self._lists + len(self._data)
        content = self._data + self._rows
        done = 0
        while done < len(content):
            done += os.pwrite(self.memory, memoryview(content)[done:], self._lists + done)
        self._lists += len(content)
        self._data, self._rows = bytearray(), bytearray()
        try:
            self._channel.send(start.to_bytes(8, "little"))
        except OSError:
            pass                        # it has ended: the answer tells
        if self._begin is not None:
            begin, self._begin = self._begin, None
            begin()

    def outcome(self, program: str) -> None:
        """Return once `program` runs or waits; HvError where it can't."""
        report = self.report()
        if len(report) == 8 and int.from_bytes(report[:4], "little") < _TAG:
            raise HvError(stub.explain(report, program))
        if report:
            self.fail(report)

    def report(self) -> bytes:
        """The next thing that the new process says; nothing where it has gone."""
        try:
            return self._channel.recv(64)
        except OSError as error:
            raise HvError(f"the container's first process: {os.strerror(error.errno or 0)}") from None

    def _look(self) -> None:
        """Take the results; one that failed as it may not is the first error of all."""
        new = len(self._calls) - self._known
        raw = os.pread(self.memory, 8 * new, 8 * self._known).ljust(8 * new, b"\0")
        values = memoryview(raw).cast("q").tolist()
        calls = self._calls
        for number, value in enumerate(values, self._known):
            if value < 0 and calls[number][2] and -value not in calls[number][2]:
                self._raise(number, -value)
        self._values += values
        self._known += new

    def fail(self, report: bytes) -> None:
        """Raise what `report` tells of."""
        tag, number = (int.from_bytes(report[at:at + 4], "little") for at in (0, 4))
        if len(report) == 8 and _TAG <= tag < _TAG + len(self._calls):
            self._raise(tag - _TAG, number)
        raise HvError("the container's first process died before it was ready", "perhaps its memory limit is too low")

    def _raise(self, index: int, number: int) -> None:
        name, hint, _, teller = self._calls[index]
        error = KernelError(name, number, hint)
        raise (teller(error) if teller else error) from None


def able(plan: Plan) -> bool:
    """Whether the first process can do without Python in it."""
    spec, program = plan.spec, plan.spec.program
    return not (plan.needs_stage_one or plan.console >= 0 or spec.time_offsets
                or spec.new_namespaces & (CLONE_FLAGS["time"] | CLONE_FLAGS["user"])
                or "createContainer" in spec.hooks or "startContainer" in spec.hooks
                or (plan.filter is not None and plan.filter.listener)
                or program.apparmor or program.selinux or spec.rootfs_propagation.endswith("shared")
                or any("tmpcopyup" in mount["options"] for mount in spec.mounts)
                or not plan.pivot or rootless())


class Program:
    """What a new process runs, for the numbers of its descriptors; for the next one as well, if they are the same."""

    def __init__(self, channel: int, memory: int) -> None:
        self.channel, self.memory, self.image, self.code = channel, memory, -1, 0
        self.image = stub.image(_beginning(channel, memory))
        # mapped from the sealed file: nothing here is both writable and run
        self.code = syscall("mmap", _SYS_MMAP, None, _IMAGE_MOST, _PROT_RX, _MAP_PRIVATE, self.image, 0)

    def __del__(self) -> None:          # nobody uses it any more: threads may have shared it
        if self.code:
            syscall("munmap", _SYS_MUNMAP, self.code, _IMAGE_MOST)
        if self.image >= 0:
            os.close(self.image)

    def launch(self, flags: int, cgroup: int, kept: list[int], born: Any) -> int:
        """The pid of a new process that waits for lists; in `born` before any signal's exception. `kept`: descriptors
        that it gets, beside those that are no one's own. KernelError where it can't be made."""
        return _launch(self.code + stub.HEADERS + stub.LAUNCH, flags | _CLONE_PARENT_SETTID, cgroup, self.channel,
                       [self.channel, self.memory, *kept], self.image, addressof(born))


def program(kept: list[Program], channel: int, memory: int) -> Program:
    """One for these numbers: that of `kept`, or a new one in its place. Threads may have the same list."""
    try:
        found = kept.pop()
    except IndexError:
        found = None
    if found is None or found.channel != channel or found.memory != memory:
        found = Program(channel, memory)
    kept[:] = [found]
    return found


def _beginning(channel: int, memory: int) -> stub.Steps:
    """What it does before it can read a list: not to be looked into, and the memory."""
    steps = stub.Steps(channel)
    steps.add(stub.KEEP, creds.SYS_PRCTL, creds.PR_SET_DUMPABLE, 0)
    steps.add(stub.KEEP, creds.SYS_PRCTL, creds.PR_SET_PDEATHSIG, SIGKILL)
    steps.add(stub.KEEP, _SYS_MMAP, _BASE, _SIZE, _PROT_RW, _MAP_SHARED | _MAP_FIXED, memory, 0)
    steps.add(stub.KEEP, _SYS_CLOSE, memory)
    steps.add(stub.KEEP, _SYS_READ, channel, _BASE + _ROOMS - 8, 8, result=stub.GOTO)
    return steps


def _launch(entry: int, flags: int, cgroup: int, channel: int, kept: list[int], image: int, born: int) -> int:
    name, empty = buffer(16, b"pyhv-init"), buffer(8)
    arguments = buffer(16, addressof(name).to_bytes(8, "little"))
    rows = [_ROW(_SYS_FCNTL, fd, _F_SETFD, 0, 0, 0, 0, stub.KEEP, 0) for fd in kept]
    rows.append(_ROW(_SYS_EXECVEAT, image, addressof(empty), addressof(arguments), addressof(empty), _AT_EMPTY_PATH,
                     0, stub.KEEP, 0))
    flags |= _CLONE_VM | _CLONE_VFORK
    if cgroup >= 0:
        # struct clone_args, as in ns.clone()
        words = (flags | CLONE_INTO_CGROUP, 0, 0, born, _SIGCHLD, 0, 0, 0, 0, 0, cgroup)
        how = b"".join(word.to_bytes(8, "little") for word in words)
        place = buffer(len(how), how)
        call = _SYS_CLONE3, addressof(place), len(how), 0
    else:
        call = _SYS_CLONE, flags | _SIGCHLD, 0, born
    control = _ROW(-1, 0, *call, 0, 0, channel) + b"".join(rows)
    block = buffer(len(control), control)
    result = call_at(entry, addressof(block))
    if result < 0:
        raise KernelError(f"clone({flags:#x})", -result, CLONE_HINT)
    return result
