"""One cgroup folder: its files read and written, its processes counted, the whole of it removed.

The container may have made groups of its own below, as deep and as many as it likes, so walks keep one descriptor and
no recursion. Driven by tests/unit/test_cgroups_folder.py.
"""

from __future__ import annotations

__all__ = ["Folder", "make", "pids_below", "remove_tree"]

import errno
import os
from time import monotonic, sleep

from hv.errors import ConfigError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_READ_MOST = 1 << 20
_PATIENCE = 5.0         # seconds for a group to become empty of processes that have been killed
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


class Folder:
    """The cgroup at `path`."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def put(self, leaf: str, value: str | int) -> None:
        """Write to a control file; OSError as it comes."""
        fd = os.open(f"{self.path}/{leaf}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)

    def write(self, leaf: str, value: str | int, field: str) -> None:
        """Write what `field` of linux.resources asks for; the error names both."""
        try:
            self.put(leaf, value)
        except (OSError, UnicodeError) as error:
            raise refusal(error, leaf, value, field) from None

    def write_lines(self, leaf: str, lines: list[str], field: str) -> None:
        """Write to a control file that takes one line at a time."""
        if not lines:
            return
        line = ""
        try:
            fd = os.open(f"{self.path}/{leaf}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                for line in lines:
                    os.write(fd, line.encode())
            finally:
                os.close(fd)
        except (OSError, UnicodeError) as error:
            raise refusal(error, leaf, line, field) from None

    def read(self, leaf: str) -> str:
        """A control file's text; "" where it can't be read."""
        try:
            fd = os.open(f"{self.path}/{leaf}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            parts = []
            while part := os.read(fd, _READ_MOST):
                parts.append(part)
            return b"".join(parts).decode("ascii", "replace")
        except OSError:
            return ""
        finally:
            os.close(fd)

    def number(self, leaf: str, default: int = 0) -> int:
        """A control file that holds one number; `max` and what is no number give `default`."""
        text = self.read(leaf).strip()
        return int(text) if text.lstrip("-").isdigit() else default

    def table(self, leaf: str) -> dict[str, int]:
        """A control file of lines "name number"."""
        rows = {}
        for line in self.read(leaf).split("\n"):
            name, _, value = line.partition(" ")
            if value.lstrip("-").isdigit():
                rows[name] = int(value)
        return rows

    def has(self, leaf: str) -> bool:
        """Whether there is such a control file."""
        return os.path.exists(f"{self.path}/{leaf}")


def refusal(error: OSError | UnicodeError, leaf: str, value: str | int, field: str) -> HvError:
    """The error for a control file that would not take what `field` asks for."""
    where = f"linux.resources.{field}"
    if isinstance(error, UnicodeError):         # half of a surrogate pair, which JSON can hold
        return ConfigError(f"{where}: {value!r:.60} is not text")
    if error.errno == errno.EOPNOTSUPP and leaf == "io.weight":
        return ConfigError(f"{where}: {leaf} does not take {value} ({os.strerror(error.errno)})",
                           "a weight for one device needs io.cost.qos enabled for it, in the root group")
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        return ConfigError(f"{where}: this host's kernel has no {leaf} here", "leave the field out")
    if error.errno in (errno.EINVAL, errno.ERANGE, errno.ENODEV):
        return ConfigError(f"{where}: {leaf} does not take {value} ({os.strerror(error.errno)})",
                           "the groups above may allow less, or the value is out of its range")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HvError(f"{where}: {leaf}: {os.strerror(error.errno)}",
                       "limits need root, or a cgroup that was delegated to this user")
    return HvError(f"{where}: {leaf} = {value}: {os.strerror(error.errno or 0)}")


def make(path: str) -> bool:
    """Make the group, and those above it that are missing. False where it was there before."""
    for _ in range(3):                  # another container's end may take away a group above that we just saw
        try:
            os.mkdir(path, 0o755)
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:
            above = os.path.dirname(path)
            if above in ("", "/"):
                raise
            make(above)
    os.mkdir(path, 0o755)
    return True


def _subfolders(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def pids_below(path: str) -> list[int]:
    """The processes of the group and all below it."""
    found: list[int] = []

    def visit(fd: int) -> None:
        try:
            procs = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd)
        except OSError:
            return
        try:
            text = b""
            while part := os.read(procs, _READ_MOST):
                text += part
            found.extend(map(int, text.split()))
        except OSError:
            pass                        # ENOTSUP: a threaded group of version 2, whose processes its domain lists
        finally:
            os.close(procs)

    _walk(path, visit, None)
    return found


def remove_tree(path: str, patience: float = _PATIENCE) -> None:
    """Remove the group and all below it. HvError where processes hold it for too long."""
    end, pause = monotonic() + patience, 0.0002
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise HvError(f"{path}: {os.strerror(error.errno or 0)}") from None
        _walk(path, None, os.rmdir)
        if monotonic() > end:
            raise HvError(f"cgroup {path}: still in use", f"processes {pids_below(path)[:8]}; end them and try again")
        sleep(pause)                    # a process is counted until it has been reaped down to its last thread
        pause = min(2 * pause, 0.05)


def _walk(path: str, visit: Callable[[int], object] | None, leave: Callable[..., object] | None) -> None:
    """visit(fd) for the folder and all below; leave(name, dir_fd=) for each below once its own are done.

    What vanishes or can't be opened meanwhile is passed over.
    """
    try:
        fd = os.open(path, _DIRECTORY)
    except OSError:
        return
    try:
        if visit:
            visit(fd)
        todo: list[list[str]] = [_subfolders(fd)]
        names: list[str] = []
        while True:
            if todo[-1]:
                name = todo[-1].pop()
                try:
                    inner = os.open(name, _DIRECTORY, dir_fd=fd)
                except OSError:
                    continue
                os.close(fd)
                fd = inner
                if visit:
                    visit(fd)
                todo.append(_subfolders(fd))
                names.append(name)
                continue
            todo.pop()
            if not names:
                return
            outer = os.open("..", _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = outer
            name = names.pop()
            if leave:
                try:
                    leave(name, dir_fd=fd)
                except OSError:
                    pass
    except OSError:
        pass                            # the folder we stand in has been removed
    finally:
        os.close(fd)
