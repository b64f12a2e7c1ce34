"""What host and agent say to each other on the stream of one process: frames, and how a process is to be started.

A frame is a byte that says its kind, three zero bytes, the length of what follows (32 bits, little endian, at most
65536), and that. guests/agent/frames.c is the other end, docs/agent.md the protocol. A guest is hostile: what it sends
is checked here for kind and length as it comes, and process.py checks the order. Driven by
tests/unit/test_guest_frames.py and tests/unit/test_guest_process.py.
"""

from __future__ import annotations

__all__ = ["FRAME_MOST", "WINDOW", "FrameError", "Frames", "ProcessSpec", "frame"]

from struct import Struct

from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PORT = 2                        # guests/agent/agent.c
FRAME_MOST = 1 << 16            # bytes behind a frame's head
WINDOW = 1 << 16                # bytes of standard input that the agent takes ahead of its process (agent.h)
SPEC_MOST = 2 << 20             # bytes of all records, and how many of a kind (guests/agent/spec.c)
STRINGS_MOST = 16384
GROUPS_MOST, RLIMITS_MOST = 256, 16
STRING_MOST = (128 << 10) - 1   # the kernel's limit for an argument (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h)

HEAD = Struct("<BxxxI")
_U32 = Struct("<I")
_RECORD = Struct("<cI")
_PAIR = Struct("<II")
_ERRNO_MOST = 4095              # MAX_ERRNO, include/linux/err.h
# What the guest may send: kind -> least and most bytes. docs/agent.md says what they mean.
FROM_GUEST = {b"P": (4, 4), b"E": (4, 4 + 512), b"O": (1, FRAME_MOST), b"R": (1, FRAME_MOST), b"X": (8, 8),
              b"I": (4, 4)}


class FrameError(HvError):
    """The guest sent what is no frame, or not the one that may come now."""


class ProcessSpec:
    """How a process of the guest is started; the paths are the guest's.

    `program` is run where it is given (the host has looked it up); else `argv[0]`, by the PATH in `env` where it has no
    slash. `terminal` is (rows, columns) or None; `rlimits` holds (resource, soft, hard); `capabilities` the five sets
    bounding, effective, inheritable, permitted, ambient as bits, None leaves them as the agent has them.
    """

    def __init__(self, argv: Sequence[str], env: Sequence[str] = (), cwd: str = "/", *, program: str = "",
                 uid: int = 0, gid: int = 0, groups: Sequence[int] = (),
                 terminal: tuple[int, int] | None = None, rlimits: Sequence[tuple[int, int, int]] = (),
                 capabilities: Sequence[int] | None = None, no_new_privs: bool = False,
                 umask: int | None = None, oom_score_adj: int | None = None) -> None:
        self.argv = argv
        self.env = env
        self.cwd = cwd
        self.program = program
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.terminal = terminal
        self.rlimits = rlimits
        self.capabilities = capabilities
        self.no_new_privs = no_new_privs
        self.umask = umask
        self.oom_score_adj = oom_score_adj

    def frames(self) -> bytes:
        """The frames that start it. ConfigError names what can't be sent."""
        data = b"".join(self._records())
        if len(data) > SPEC_MOST:
            raise ConfigError(f"arguments and environment have {len(data)} bytes, more than {SPEC_MOST}",
                              "pass long ones in a file")
        parts = [frame(b"S", data[at:at + FRAME_MOST]) for at in range(0, len(data), FRAME_MOST)]
        return b"".join([*parts, frame(b"G")])

    def _records(self) -> list[bytes]:
        if not self.argv:
            raise ConfigError("there is no command to run", "name one")
        if len(self.argv) + len(self.env) > STRINGS_MOST:
            raise ConfigError(f"more than {STRINGS_MOST} arguments and variables", "pass them in a file")
        if len(self.groups) > GROUPS_MOST or len(self.rlimits) > RLIMITS_MOST:
            raise ConfigError(f"more than {GROUPS_MOST} groups or {RLIMITS_MOST} limits", "leave some out")
        parts = [_text(b"a", word, "argument") for word in self.argv]
        parts += [_text(b"e", word, "environment variable") for word in self.env]
        if self.program:
            parts.append(_text(b"p", self.program, "program"))
        if self.cwd and self.cwd != "/":
            parts.append(_text(b"c", self.cwd, "working directory"))
        if self.uid:
            parts.append(_record(b"u", _number(self.uid, "uid")))
        if self.gid:
            parts.append(_record(b"g", _number(self.gid, "gid")))
        parts += [_record(b"G", _number(group, "additional gid")) for group in self.groups]
        if self.terminal is not None:
            parts.append(_record(b"t", _size(*self.terminal)))
        parts += [_record(b"r", _U32.pack(resource) + _wide(soft, "rlimit") + _wide(hard, "rlimit"))
                  for resource, soft, hard in self.rlimits]
        if self.capabilities is not None:
            if len(self.capabilities) != 5:
                raise ConfigError("capabilities are five sets", "bounding, effective, inheritable, permitted, ambient")
            parts.append(_record(b"C", b"".join(_wide(bits, "capabilities") for bits in self.capabilities)))
        if self.no_new_privs:
            parts.append(_record(b"n"))
        if self.umask is not None:
            parts.append(_record(b"m", _number(self.umask & 0o777, "umask")))
        if self.oom_score_adj is not None:
            if not -1000 <= self.oom_score_adj <= 1000:
                raise ConfigError(f"oom_score_adj {self.oom_score_adj} is not -1000 to 1000", "see proc(5)")
            parts.append(_record(b"o", self.oom_score_adj.to_bytes(4, "little", signed=True)))
        return parts


class Frames:
    """Cuts what the guest sends into frames; holds one at most."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """More has come."""
        self._data += data

    def next(self) -> tuple[bytes, bytes] | None:
        """(kind, what is in it) of the next frame, None until it is whole. FrameError."""
        data = self._data
        if len(data) < HEAD.size:
            return None
        code, length = HEAD.unpack_from(data)
        kind = bytes((code,))
        if kind not in FROM_GUEST or data[1:4] != b"\0\0\0":
            raise FrameError(f"the guest's agent sent a frame of kind {kind!r}, which there is not")
        least, most = FROM_GUEST[kind]
        if not least <= length <= most:
            raise FrameError(f"the guest's agent sent a frame {kind.decode()!r} of {length} bytes")
        end = HEAD.size + length
        if len(data) < end:
            return None
        body = bytes(data[HEAD.size:end])
        del data[:end]
        return kind, body

    def __len__(self) -> int:
        """Bytes that wait for the rest of their frame."""
        return len(self._data)


def frame(kind: bytes, data: bytes = b"") -> bytes:
    """One frame; at most FRAME_MOST bytes."""
    return HEAD.pack(kind[0], len(data)) + data


def started(body: bytes) -> int:
    """The process's number, of a frame P. FrameError."""
    pid: int = _U32.unpack(body)[0]
    if not 1 < pid <= 1 << 22:          # PID_MAX_LIMIT, include/linux/threads.h
        raise FrameError(f"the guest's agent says that a process has number {pid}")
    return pid


def failed(body: bytes) -> tuple[int, str]:
    """(errno, step) of a frame E. FrameError."""
    number: int = _U32.unpack_from(body)[0]
    if not 0 < number <= _ERRNO_MOST:
        raise FrameError(f"the guest's agent reports errno {number}")
    return number, "".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in body[4:])


def exited(body: bytes) -> tuple[str, int]:
    """("exit", code) or ("signal", number) of a frame X. FrameError."""
    kind, value = _PAIR.unpack(body)
    if kind > 1 or value > (64 if kind else 255) or (kind and not value):
        raise FrameError(f"the guest's agent says that a process ended by {kind}, {value}")
    return ("signal" if kind else "exit"), value


def taken(body: bytes) -> int:
    """How many bytes of standard input the process took, of a frame I."""
    count: int = _U32.unpack(body)[0]
    return count


def attach_frame(pid: int) -> bytes:
    """The stream is for a process whose own broke. ConfigError."""
    return frame(b"A", _number(pid, "pid"))


def signal_frame(number: int) -> bytes:
    """Send the process a signal."""
    return frame(b"K", _U32.pack(number))


def resize_frame(rows: int, columns: int) -> bytes:
    """Its terminal has another size."""
    return frame(b"W", _size(rows, columns))


def gone_frame(descriptor: int) -> bytes:
    """Nobody reads its standard output (1) or error (2) any more."""
    return frame(b"o", _U32.pack(descriptor))


def _record(key: bytes, data: bytes = b"") -> bytes:
    return _RECORD.pack(key, len(data)) + data


def _text(key: bytes, text: str, what: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise ConfigError(f"the {what} {text!r:.60} has a zero byte in it", "leave that out")
    if len(data) > STRING_MOST:
        raise ConfigError(f"the {what} {text!r:.20}... is longer than {STRING_MOST} bytes", "pass it in a file")
    return _record(key, data)


def _number(value: int, what: str) -> bytes:
    if not 0 <= value < 0xFFFFFFFF:     # the last one means: as it is (setresuid(2))
        raise ConfigError(f"{what} {value} is not 0 to 4294967294", "")
    return _U32.pack(value)


def _wide(value: int, what: str) -> bytes:
    if not 0 <= value <= 0xFFFFFFFFFFFFFFFF:
        raise ConfigError(f"{what}: {value} has no 64 bits", "")
    return value.to_bytes(8, "little")


def _size(rows: int, columns: int) -> bytes:
    if not (0 <= rows <= 0xFFFF and 0 <= columns <= 0xFFFF):
        raise ConfigError(f"a terminal of {rows} rows and {columns} columns", "at most 65535 of each")
    return rows.to_bytes(2, "little") + columns.to_bytes(2, "little")
