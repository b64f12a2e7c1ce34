"""Talking to CRIU (criu.org), which writes a container's processes to files and makes them again from these.

    we                                              criu swrk
     | --- request: DUMP or RESTORE, options ------->|
     |<-- NOTIFY: where it stands, descriptors ------|  so often as there is something to be done
     | --- NOTIFY: done, or not -------------------->|
     |<-- the same kind: success or not -------------|

One SOCK_SEQPACKET pair, on which `criu swrk` waits (criu's own name for it; its images/rpc.proto has the messages).
Its command line could not give us the terminal of a restored container, nor the moments for hooks and limits. The
messages are Protocol Buffers (developers.google.com/protocol-buffers/docs/encoding), of which numbers, texts and
messages within messages are enough here.

criu is not ended with us: it would leave the processes half taken apart. It sees that nobody answers and undoes what it
did. Driven by tests/unit/test_criu_messages.py and tests/root/test_container_criu.py and
tests/root/test_container_criu_failures.py.
"""

from __future__ import annotations

__all__ = ["DUMP", "PRE_DUMP", "RESTORE", "Criu", "FreshImages", "decode", "encode", "find_criu", "reason"]

import os
from _signal import SIG_IGN, SIG_SETMASK, pthread_sigmask, signal
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    SOCK_CLOEXEC,
    SOCK_SEQPACKET,
    socketpair,
)

from hv.errors import ConfigError, HvError
from hv.linux.signals import new_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

# images/rpc.proto, criu_req_type
DUMP, RESTORE, PRE_DUMP, NOTIFY = 1, 2, 4, 6
# criu_req, criu_resp, criu_notify
_TYPE, _OPTIONS, _NOTIFY_SUCCESS = 1, 2, 3
_SUCCESS, _RESTORED, _NOTIFIED, _MESSAGE = 2, 4, 5, 9
_SCRIPT, _PID = 1, 2
_RESTORED_PID = 1         # criu_restore_resp
# criu_opts, those that every request has
_LOG_LEVEL, _LOG_FILE = 9, 10
_LOG_MOST = 32 << 20            # bytes of a log that are looked through
_PLACES = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_ANSWER_MOST = 64 << 10
_NOT_FOR_IT = (1, 2, 3, 15)     # SIGHUP, SIGINT, SIGQUIT, SIGTERM: a terminal's ^C is for us, criu learns of our end
_NUMBER, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}        # wire types


def find_criu(name: str = "criu") -> str:
    """The path of criu; "" where it is not installed."""
    for place in [""] if "/" in name else [folder + "/" for folder in _PLACES]:
        if os.access(place + name, os.X_OK):
            return place + name
    return ""


# messages ----------------------------------------------------------------------------------------------------------


def encode(fields: list[tuple[int, Any]]) -> bytes:
    """A message of (number, value): an int or a bool, a text, or the list of another message's fields."""
    message = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            message += _varint(number << 3 | _NUMBER) + _varint(value & 0xFFFFFFFFFFFFFFFF)
            continue
        content = encode(value) if isinstance(value, list) else os.fsencode(value)
        message += _varint(number << 3 | _BYTES) + _varint(len(content)) + content
    return bytes(message)


def decode(message: bytes) -> dict[int, Any]:
    """The fields of a message by number, the last of each: an int or bytes. ValueError where it is none."""
    fields: dict[int, Any] = {}
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == _NUMBER:
            fields[tag >> 3], at = _read_varint(message, at)
            continue
        if kind == _BYTES:
            size, at = _read_varint(message, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("cut off")
        fields[tag >> 3] = message[at:at + size]
        at += size
    return fields


def _varint(value: int) -> bytes:
    message = bytearray()
    while value > 0x7F:
        message.append(value & 0x7F | 0x80)
        value >>= 7
    message.append(value)
    return bytes(message)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        value |= (message[at] & 0x7F) << shift
        at += 1
        if not message[at - 1] & 0x80:
            return value, at
    raise ValueError("cut off")


# the other program -------------------------------------------------------------------------------------------------


class Criu:
    """One criu, for one request. `keep`: descriptors that it gets under their numbers. `prepare` is run in the new
    process before criu is. `streams`: it gets our standard streams. close() waits for its end."""

    def __init__(self, program: str, keep: list[int], prepare: Callable[[], object] | None = None,
                 streams: bool = False) -> None:
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
        self._end, self._program = ours, program
        made: list[int] = []
        try:
            new_process(os.fork, made)
            if made == [0]:
                _become(program, theirs.fileno(), keep, prepare, streams)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            self._pid = made[0] if made else 0

    def ask(self, kind: int, options: list[tuple[int, Any]], log: str,
            notified: Callable[[str, int, int], None]) -> int:
        """Have a request done; the restored process's pid. `notified` gets (where criu stands, pid, descriptor or -1)
        and closes the descriptor. HvError with criu's reason, which it takes from `log`, where it can't be done."""
        options = [*options, (_LOG_LEVEL, 4), (_LOG_FILE, os.path.basename(log))]
        self._say(encode([(_TYPE, kind), (_OPTIONS, options)]))
        failure: BaseException | None = None
        while True:
            answer, fd = self._hear()
            if answer.get(_TYPE) != NOTIFY:
                break
            told = decode(answer.get(_NOTIFIED, b""))
            try:
                notified(told.get(_SCRIPT, b"").decode(errors="replace"), told.get(_PID, 0), fd)
            except HvError as error:
                failure = error
            self._say(encode([(_TYPE, NOTIFY), (_NOTIFY_SUCCESS, failure is None)]))
        if failure is not None:
            raise failure
        if not answer.get(_SUCCESS):
            hint = f"{log} has the rest"
            if not _understands_kernel(self._program):
                hint += "; `criu check` fails on this kernel: a newer criu may do"
            raise HvError(f"criu: {reason(answer.get(_MESSAGE, b''), log)}", hint)
        return int(decode(answer.get(_RESTORED, b"")).get(_RESTORED_PID, 0))

    def _say(self, message: bytes) -> None:
        try:
            self._end.send(message)
        except OSError:
            pass                    # it has ended; hearing tells

    def _hear(self) -> tuple[dict[int, Any], int]:
        try:
            data, extra, _, _ = self._end.recvmsg(_ANSWER_MOST, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, extra = b"", []
        fd = int.from_bytes(extra[0][2][:4], "little") if extra else -1
        try:
            return decode(data), fd
        except ValueError as error:
            raise HvError(f"criu: an answer that can't be understood ({error})") from None

    def close(self) -> None:
        """Let go, and wait until it has undone or finished what it was at."""
        self._end.close()
        if self._pid > 0:
            try:
                os.waitpid(self._pid, 0)
            except ChildProcessError:
                pass
            self._pid = 0


def _become(program: str, end: int, keep: list[int], prepare: Callable[[], object] | None, streams: bool) -> NoReturn:
    """In the new process: criu. What goes wrong before is told as criu would, in an answer."""
    try:
        if prepare is not None:
            prepare()
        if not streams:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
        for fd in (end, *keep):
            os.set_inheritable(fd, True)
        for number in _NOT_FOR_IT:
            signal(number, SIG_IGN)
        pthread_sigmask(SIG_SETMASK, ())
        os.execve(program, ["criu", "swrk", str(end)], {"PATH": ":".join(_PLACES)})
    except (HvError, OSError) as error:
        text = f"{error}" if isinstance(error, HvError) else f"{program}: {os.strerror(error.errno or 0)}"
        os.write(end, encode([(_TYPE, 0), (_SUCCESS, False), (_MESSAGE, text)]))
    finally:
        os._exit(1)


def _understands_kernel(program: str) -> bool:
    """Whether `criu check` finds in this kernel what criu needs."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = os.posix_spawn(program, ["criu", "check"], {"PATH": ":".join(_PLACES)},
                             file_actions=[(os.POSIX_SPAWN_DUP2, null, fd) for fd in range(3)])
        return os.waitpid(pid, 0)[1] == 0
    except OSError:
        return True                 # not to be run at all, which has been said
    finally:
        os.close(null)


def reason(message: bytes, log: str) -> str:
    """Why criu failed: what it answered, else the first error of its log, which the others follow from."""
    if message:
        return _plain(message)
    try:
        with open(log, "rb", 0) as file:
            for line in file.read(_LOG_MOST).splitlines():
                if line.startswith(b"(") and b") Error (" in line:
                    return _plain(line.partition(b") ")[2])
    except OSError:
        pass
    return "it ended without a reason"


def _plain(text: bytes) -> str:
    """Without the place in criu's source: Error (criu/vdso.c:381): vdso: ..."""
    if text.startswith(b"Error ("):
        text = text.partition(b"): ")[2]
    return " ".join(text.decode(errors="replace").split())


class FreshImages:
    """`with FreshImages(folder):` what it gets meanwhile, but logs, is removed again where the block fails."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._before: set[str] = set()
        try:
            os.makedirs(self._folder, 0o700, exist_ok=True)
            self._before.update(os.listdir(self._folder))
        except OSError as error:
            raise ConfigError(f"--image-path {self._folder}: {os.strerror(error.errno or 0)}") from None

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            return
        for leaf in set(os.listdir(self._folder)) - self._before:
            if not leaf.endswith(".log"):
                try:
                    os.unlink(f"{self._folder}/{leaf}")
                except OSError:
                    pass
