"""From linux.seccomp of config.json to the filter that the kernel takes; compiled once, then found on disk.

Engines give every container the same profile of 350 names, and compiling it costs some milliseconds. So a filter is
kept in a folder of ours, in a file named after the profile: found again, it costs one read, and nothing of the compiler
is imported. Whoever can write there could weaken a filter, so the folder and the file must belong to us and be
writable to nobody else, and links are not followed. The file holds the whole profile and is only good for that: names
are no cryptographic hashes. A damaged file, or one of another version of this compiler, counts as missing.

    /run/pyhv-filters (root) or $XDG_RUNTIME_DIR/pyhv-filters: gone with the next boot, bounded in number

Driven by tests/unit/test_seccomp_cache.py.
"""

from __future__ import annotations

__all__ = ["Program", "compile_profile"]

import os
import stat
from _imp import source_hash  # SipHash, built in: a module with a better hash costs more than all the rest here

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HERE = __file__.rpartition("/")[0]
_COMPILER = ("bpf.py", "rules.py", "tree.py", "syscalls.py", "syscalls.txt")
_MAGIC = b"pyhv-filter 1\n"
_FILE_MOST = 4 << 20            # bytes
_FILES_MOST = 64


class Program(bytes):
    """A compiled filter, and how the kernel is to load it."""

    flags = 0                   # of seccomp(2)
    listener = False            # some calls are for a supervisor to decide


def compile_profile(profile: dict[str, Any], *, cache: bool = True) -> Program:
    """The filter for linux.seccomp of config.json. ConfigError names the field that can't be."""
    key = _key(profile) if cache else b""
    folder = _open_folder() if key else -1
    try:
        if folder >= 0:
            found = _load(folder, key)
            if found is not None:
                return found
        from hv.container.seccomp.rules import Profile
        from hv.container.seccomp.tree import build

        checked = Profile(profile)
        program = _program(build(checked), checked.flags, checked.listener)
        if folder >= 0:
            _store(folder, key, program)
        return program
    finally:
        if folder >= 0:
            os.close(folder)


def _program(code: bytes, flags: int, listener: bool) -> Program:
    program = Program(code)
    program.flags, program.listener = flags, listener
    return program


def _key(profile: dict[str, Any]) -> bytes:
    """All that a filter depends on; b"" where that can't be told."""
    try:
        stamps = [os.uname().machine]
        for leaf in _COMPILER:
            status = os.stat(f"{_HERE}/{leaf}")
            stamps.append(f"{leaf} {status.st_mtime_ns} {status.st_size}")
        return ascii((stamps, profile)).encode()
    except (OSError, RecursionError):
        return b""


def _open_folder() -> int:
    """The cache's folder, made where there is none; -1 where there is none that is safe."""
    for place in _places():
        path = f"{place}/pyhv-filters"
        for _ in range(2):
            try:
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                try:
                    os.mkdir(path, 0o700)
                except OSError:
                    break
            except OSError:
                break
            else:
                if _is_ours(os.fstat(folder)):
                    return folder
                os.close(folder)
                break
    return -1


def _places() -> list[str]:
    places = ["/run"] if os.geteuid() == 0 else []
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    return [*places, own] if own.startswith("/") else places


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _name(key: bytes) -> str:
    return source_hash(len(key), key).hex()


def _load(folder: int, key: bytes) -> Program | None:
    """What is kept for `key`: magic, checksum of what follows, flags, listener, length of the key, key, code."""
    try:
        # O_NONBLOCK: a FIFO with that name must not hold us up
        file = os.open(_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not _is_ours(status) or status.st_size > _FILE_MOST:
            return None
        data = os.read(file, _FILE_MOST)
    except OSError:
        return None
    finally:
        os.close(file)
    start = len(_MAGIC) + 8
    body = data[start:]
    if data[:start] != _MAGIC + source_hash(len(body), body):
        return None
    flags, listener, length = (int.from_bytes(body[at:at + 4], "little") for at in (0, 4, 8))
    if body[12:12 + length] != key:
        return None
    return _program(body[12 + length:], flags, bool(listener))


def _store(folder: int, key: bytes, program: Program) -> None:
    """Keep `program`, whole or not at all. Where that fails there is no cache, and nothing else."""
    body = b"".join([number.to_bytes(4, "little") for number in (program.flags, program.listener, len(key))])
    body += key + program
    data = _MAGIC + source_hash(len(body), body) + body
    if len(data) > _FILE_MOST:
        return
    fresh = f"{_name(key)}.{os.getpid()}"
    try:
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600,
                       dir_fd=folder)
        try:
            whole = os.write(file, data) == len(data)
        finally:
            os.close(file)
        if whole:
            os.rename(fresh, _name(key), src_dir_fd=folder, dst_dir_fd=folder)
        else:
            os.unlink(fresh, dir_fd=folder)
        _prune(folder)
    except OSError:
        try:
            os.unlink(fresh, dir_fd=folder)
        except OSError:
            pass


def _prune(folder: int) -> None:
    """Remove the oldest files that are too many, those of a writer that died among them."""
    names = os.listdir(folder)
    if len(names) > _FILES_MOST:
        ages = sorted((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns, name) for name in names)
        for _, name in ages[:len(names) - _FILES_MOST]:
            os.unlink(name, dir_fd=folder)
