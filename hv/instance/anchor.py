"""The user namespace of a user without root: all commands and instances of that user are in the same one.

The user is root in it, the users after root are those that /etc/subuid and /etc/subgid give. It comes with a mount
namespace, where that root may mount. Both are kept by a process of some hundred bytes of code (hv/container/stub.py),
which waits for a lock on RUN/namespace that every command and the keeper share, and ends once it has it. If it was
killed, the next command finds the namespace by what holds an instance.

    RUN/namespace           locked by those who are in it; pid and start time of that process
    RUN/namespace.lock      locked by who looks for one, or makes one

Source: man 7 user_namespaces, man 5 subuid, man 1 newuidmap. Driven by tests/root/test_instance_rootless.py.
"""

from __future__ import annotations

__all__ = ["enter", "hold_on"]

import os
from fcntl import LOCK_EX, LOCK_SH, flock

from hv.container.idmap import Mappings, write_maps
from hv.container.state import start_time
from hv.container.stub import KEEP, Steps, image
from hv.errors import HvError, KernelError
from hv.instance.record import Instance
from hv.linux.ns import CLONE_NEWNS, CLONE_NEWUSER, setns, unshare
from hv.linux.signals import block_all
from hv.places import run_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_SYS_FTRUNCATE, _SYS_FLOCK, _SYS_EXIT_GROUP, _SYS_CLOSE_RANGE = 77, 73, 231, 436    # syscall_64.tbl
_FD = 3
_RANGES_MOST = 1 << 20          # bytes of /etc/subuid


def _open(leaf: str) -> int:
    path = f"{run_root()}/{leaf}"
    try:
        os.makedirs(run_root(), 0o700, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HvError(f"{path}: {os.strerror(error.errno or 0)}", "set PYHV_RUN to a folder to write in") from None


def hold_on() -> int:
    """While the descriptor is open, the namespace stays."""
    fd = _open("namespace")
    flock(fd, LOCK_SH)
    return fd


def enter() -> None:
    """This process is in the user's namespaces for good, as root of them. HvError where they can't be had."""
    lock = _open("namespace.lock")
    try:
        flock(lock, LOCK_EX)
        mark = hold_on()                    # until this process ends
        if _join(*_marked(mark)):
            return
        if any(_join(int(kept.get("pid", 0)), int(kept.get("start", 0))) for kept in _holders()):
            _anchor(mark, None)
            return
        uids, gids = _ranges("/etc/subuid", os.geteuid()), _ranges("/etc/subgid", os.getegid())
        if not _join(*_anchor(mark, (uids, gids))):
            raise HvError("the process that keeps the user namespace has ended", "try again")
    finally:
        os.close(lock)


def _marked(mark: int) -> tuple[int, int]:
    words = os.pread(mark, 100, 0).split()
    return (int(words[0]), int(words[1])) if len(words) == 2 and all(map(bytes.isdigit, words)) else (0, 0)


def _holders() -> list[dict[str, int]]:
    try:
        ids = os.listdir(f"{run_root()}/instances")
    except OSError:
        return []
    return [kept for id in ids if (kept := Instance(id).kept())]


def _join(pid: int, start: int) -> bool:
    """Enter the namespaces of a process; False where it is not there any more."""
    if not pid or start_time(pid) != start:
        return False
    fds: list[int] = []
    try:
        for kind in ("user", "mnt"):
            fds.append(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
        if start_time(pid) != start:
            return False
        here = os.getcwd()
        setns(fds[0], CLONE_NEWUSER)
        setns(fds[1], CLONE_NEWNS)          # and so at its root
        os.chdir(here)
    except FileNotFoundError:
        return False
    except (OSError, KernelError) as error:
        raise HvError(f"the user namespace of process {pid}: {error}", "end it, and try again") from None
    finally:
        for fd in fds:
            os.close(fd)
    return True


def _ranges(path: str, own: int) -> Mappings:
    """Root is `own`, those after root what the file gives to the user."""
    from pwd import getpwuid

    uid = os.geteuid()
    names = {str(uid)}
    try:
        names.add(getpwuid(uid).pw_name)
    except KeyError:
        pass
    rows: Mappings = [(0, own, 1)]
    try:
        with open(path, "rb", 0) as file:
            lines = file.read(_RANGES_MOST).decode(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, rest = line.partition(":")
        first, _, count = rest.partition(":")
        if name in names and first.isdecimal() and count.isdecimal() and int(count):
            rows.append((rows[-1][0] + rows[-1][2], int(first), int(count)))
    if len(rows) == 1:
        name = max(names, key=len)
        raise HvError(f"{path} gives user {name} no ids, which images need",
                      f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}")
    return rows


def _anchor(mark: int, maps: tuple[Mappings, Mappings] | None) -> tuple[int, int]:
    """Start the process that keeps the namespaces: new ones with `maps`, or ours. Its pid and start time."""
    asked, told = os.pipe2(os.O_CLOEXEC)
    wait, go = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        _be_anchor(mark, (asked, told, wait, go), maps is not None)
    os.close(told)
    os.close(wait)
    try:
        why = os.read(asked, 500)
        if why != b"made":
            raise HvError(f"no user namespace can be made: {why.decode(errors='replace')}",
                          "user.max_user_namespaces, kernel.unprivileged_userns_clone, or AppArmor forbids it")
        if maps:
            write_maps(pid, *maps)
        os.write(go, b".")
        if why := os.read(asked, 500):      # else it has become that program
            raise HvError(f"the process that keeps the user namespace: {why.decode(errors='replace')}")
    except BaseException:
        os.close(go)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(asked)
    os.close(go)
    found = pid, start_time(pid)
    os.ftruncate(mark, 0)
    os.pwrite(mark, f"{found[0]} {found[1]}\n".encode(), 0)
    return found


def _be_anchor(mark: int, pipes: tuple[int, int, int, int], new: bool) -> NoReturn:
    asked, told, wait, go = pipes
    try:
        os.close(asked)
        os.close(go)
        block_all()
        os.setsid()
        os.chdir("/")
        if new:
            unshare(CLONE_NEWUSER | CLONE_NEWNS)
        os.write(told, b"made")
        if os.read(wait, 1):
            null = os.open("/dev/null", os.O_RDWR)
            again = os.open(f"/proc/self/fd/{mark}", os.O_RDWR)     # for a lock of its own
            for fd, number in ((null, 0), (null, 1), (null, 2), (again, _FD)):
                os.dup2(fd, number)
            steps = Steps(_FD)
            steps.add(KEEP, _SYS_CLOSE_RANGE, _FD + 1, 0xFFFFFFFF, 0)
            steps.add(KEEP, _SYS_FLOCK, _FD, LOCK_EX)
            steps.add(KEEP, _SYS_FTRUNCATE, _FD, 0)
            steps.add(KEEP, _SYS_EXIT_GROUP, 0)
            os.execve(image(steps), [b"pyhv-userns"], {})
    except BaseException as error:
        try:
            os.write(told, f"{error}".encode())
        except OSError:
            pass
    os._exit(1)
