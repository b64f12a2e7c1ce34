"""Who the container's program is and what it may: ids, capabilities, limits, directory; and the last steps to it.

Driven by tests/root/test_container_identity.py.
"""

from __future__ import annotations

__all__ = ["become_root", "last_steps", "limits", "may_set_groups", "program_of", "set_score",
           "set_sysctls", "set_time_offsets", "take_on"]

import errno
import os
import stat

from hv.container import stub
from hv.errors import HvError
from hv.linux import creds
from hv.linux.hands import ANY, AT_FDCWD, plain
from hv.linux.mount import open_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hv.container.program import Program
    from hv.container.seccomp.compile import Program as Filter
    from hv.linux.hands import Hands, Status

    _Looks = tuple[Status, Status, Callable[[], bytes]]

_CAP_SYS_ADMIN = 1 << creds.CAPABILITIES.index("CAP_SYS_ADMIN")
# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_EXECVE, _SYS_FCNTL, _SYS_ACCEPT4, _SYS_SECCOMP, _SYS_CLOSE_RANGE = 59, 72, 288, 317, 436
_SYS_GETCWD, _SYS_SETGROUPS, _SYS_SETRESUID, _SYS_SETRESGID, _SYS_FACCESSAT2 = 79, 116, 117, 119, 439
_PATH_MAX, _AT_EACCESS = 4096, 0x200    # include/uapi/linux/limits.h, fcntl.h
_SYS_RT_SIGPROCMASK, _SYS_CLONE, _SIG_SETMASK, _SIGCHLD = 14, 56, 2, 17
_F_SETFD, _FD_CLOEXEC, _SOCK_CLOEXEC, _CLOSE_RANGE_CLOEXEC = 2, 1, 0o2000000, 4
_SECCOMP_SET_MODE_FILTER = 1            # include/uapi/linux/seccomp.h
_INSTRUCTION = 8                        # struct sock_filter
_FEW = 512          # descriptors: a limit below counts what is open still
_BINPRM_BUF_SIZE = 256                  # include/uapi/linux/binfmts.h: what the kernel reads of a script's first line
_INTERPRETERS_MOST = 6                  # fs/exec.c, exec_binprm: five levels of scripts


def become_root(hands: Hands, groups: bool | None = None) -> None:
    """User and group 0 of the user namespace just entered, still to be looked at by whoever owns it.

    `groups`: whether setgroups is allowed in there; None: /proc tells.
    """
    if may_set_groups() if groups is None else groups:
        hands.do("setgroups", _SYS_SETGROUPS, 0, None)
    hands.do("setresgid", _SYS_SETRESGID, 0, 0, 0)
    hands.do("setresuid", _SYS_SETRESUID, 0, 0, 0)


def may_set_groups(pid: int | str = "self") -> bool:
    """Whether the user namespace of a process allows setgroups (man 7 user_namespaces)."""
    try:
        with open(f"/proc/{pid}/setgroups", "rb", 0) as file:
            return file.read().strip() != b"deny"
    except OSError:
        return True


def set_time_offsets(hands: Hands, offsets: list[tuple[str, int, int]], pid: int | str = "self") -> None:
    """linux.timeOffsets into the time namespace that the next child of process `pid` enters."""
    for clock, seconds, nanoseconds in offsets:
        _put(hands, f"/proc/{pid}/timens_offsets", f"{clock} {seconds} {nanoseconds}", f"linux.timeOffsets.{clock}")


def set_sysctls(hands: Hands, values: list[tuple[str, str, str]]) -> None:
    """linux.sysctl, through the host's /proc: the container's could be anything."""
    for name, path, value in values:
        _put(hands, f"/proc/sys/{path}", value, f"linux.sysctl {name}")


def set_score(hands: Hands, score: int | None) -> None:
    """process.oomScoreAdj."""
    if score is not None:
        _put(hands, "/proc/self/oom_score_adj", str(score), f"process.oomScoreAdj {score}",
             "lowering it needs CAP_SYS_RESOURCE")


def _put(hands: Hands, path: str, text: str, field: str, hint: str = "") -> None:
    with hands.failing(plain(field, hint)):
        hands.put(path, text)


def limits(hands: Hands, program: Program) -> None:
    """process.rlimits."""
    if any(name == "RLIMIT_NOFILE" and 0 <= soft < _FEW for _, soft, _, name in program.rlimits):
        hands.settle()
    for number, soft, hard, name in program.rlimits:
        with hands.failing(plain(f"process.rlimits {name}", "raising a hard limit needs CAP_SYS_RESOURCE")):
            creds.set_limit(number, soft, hard, hands.do)


def take_on(hands: Hands, program: Program, root: Any, *, filtered: bool,
            groups: bool | None = None) -> tuple[str, bytes]:
    """Become who the program runs as, in its directory; the program's path, and the user's home. `root`: a descriptor.

    `filtered`: a seccomp filter will be entered later, which without noNewPrivileges needs CAP_SYS_ADMIN until then.
    `groups`: whether setgroups is allowed; None: /proc tells.
    """
    do = hands.do
    if program.scheduler or program.io_priority:
        from hv.linux import sched

        if program.scheduler:
            sched.set_scheduler(program.scheduler, do)
        if program.io_priority:
            sched.set_io_priority(*program.io_priority, do)
    if program.apparmor or program.selinux:
        from hv.container.labels import on_exec

        on_exec(program.apparmor, program.selinux)
    hands.umask(0o022 if program.umask is None else program.umask)
    had = creds.ask_capabilities(hands)
    entered = _enter(hands, root, program.cwd, late=False)
    _within_ours(hands, program, had)
    creds.drop_bounding(program.bounding, creds.last_capability(), hands)
    creds.prctl(creds.PR_SET_KEEPCAPS, 1, do=do)
    with hands.failing(plain(f"process.user {program.uid}:{program.gid}",
                             "in a user namespace every id needs a mapping")):
        if may_set_groups() if groups is None else groups:
            do("setgroups", _SYS_SETGROUPS, len(program.groups),
               b"".join(group.to_bytes(4, "little") for group in program.groups))
        elif program.groups:
            raise HvError("process.user.additionalGids: setgroups is not allowed in this user namespace")
        do("setresgid", _SYS_SETRESGID, program.gid, program.gid, program.gid)
        do("setresuid", _SYS_SETRESUID, program.uid, program.uid, program.uid)
    creds.prctl(creds.PR_SET_KEEPCAPS, 0, do=do)
    # for the last program (stub.py), which has its capabilities by the ambient set and sets those of process itself
    kept = program.permitted | (_CAP_SYS_ADMIN if filtered and not program.no_new_privileges else 0)
    creds.set_capabilities(kept, kept, program.inheritable | kept, do)
    creds.clear_ambient(do)
    creds.raise_ambient(kept, do)
    if not entered:
        _enter(hands, root, program.cwd, late=True)
    here = hands.room(_PATH_MAX)
    length = do("getcwd", _SYS_GETCWD, here, _PATH_MAX, may=ANY)
    if program.no_new_privileges:
        creds.prctl(creds.PR_SET_NO_NEW_PRIVS, 1, do=do)
    home = _home(hands, program)
    found = _look_for(hands, program)
    # most are named by their path: what is read of that one comes with the same list
    ahead = _look_at(hands, found[0][0]) if len(found) == 1 else None
    if hands.value(length) < 1 or hands.read(here, 1) != b"/":
        raise HvError(f"process.cwd {program.cwd}: outside the container's root")
    return _found(hands, program, found, ahead), home()


def _within_ours(hands: Hands, program: Program, had: Any) -> None:
    """A capability that this process lacks can't be given, nor an ambient one that is not inheritable; as in runc."""
    effective, permitted, _ = creds.read_capabilities(hands, had)
    # what the last program is to keep must be inheritable before it leaves the bounding set (man 2 capset)
    creds.set_capabilities(effective, permitted, permitted, hands.do)
    program.permitted &= permitted
    program.effective &= program.permitted
    program.inheritable &= permitted
    program.ambient &= program.permitted & program.inheritable


def _enter(hands: Hands, root: Any, path: str, *, late: bool) -> bool:
    """Change to the program's directory, made where it is missing; False where only the program itself may."""
    with hands.failing(plain(f"process.cwd {path}")):
        early = () if late else (errno.EACCES,)
        # no magic links: /proc/self/fd/N would lead to what this process has open (CVE-2024-21626)
        fd = open_in(root, path, os.O_PATH | os.O_DIRECTORY, do=hands.do, may=(errno.ENOENT, *early))
        entered = hands.change(fd, may=(errno.EBADF, *early))
        if hands.value(fd) == -errno.ENOENT:
            from hv.container.mounts import target_in

            fd = target_in(hands, root, os.path.normpath(path), True)
            entered = hands.change(fd, may=early)
        hands.close(fd)
        return hands.value(entered) >= 0


def _look_for(hands: Hands, program: Program) -> list[tuple[str, Status, Any]]:
    """Where process.args[0] may be in the new root, by PATH of process.env; what is there, whether it can be run."""
    name = program.args[0]
    places = [name] if "/" in name else [f"{folder or '.'}/{name}" for folder in program.path.split(":")]
    return [(place, hands.stat(AT_FDCWD, place, 0),
             hands.do("faccessat2", _SYS_FACCESSAT2, AT_FDCWD, os.fsencode(place), os.X_OK, _AT_EACCESS, may=ANY))
            for place in places]


def _found(hands: Hands, program: Program, places: list[tuple[str, Status, Any]], ahead: _Looks | None) -> str:
    """The first of them that is a program; HvError as a shell would say it."""
    name, number = program.args[0], errno.ENOENT
    for place, status, access in places:
        if status.error:
            if status.error not in (errno.ENOENT, errno.ENOTDIR):
                number = status.error
            continue
        if stat.S_ISREG(status.mode) and hands.value(access) == 0:
            _refuse_ourselves(hands, place, name, ahead)
            return place
        number = errno.EACCES
    if number == errno.ENOENT and "/" not in name:
        raise HvError(f'exec: "{name}": executable file not found in $PATH')
    raise HvError(f'exec: "{name}": {os.strerror(number).lower()}')


def _look_at(hands: Hands, path: str) -> _Looks:
    """What there is to know of a program: this process's own, that one, how it begins."""
    return (hands.stat(AT_FDCWD, "/proc/self/exe", 0), hands.stat(AT_FDCWD, path, 0),
            hands.start_of(path, _BINPRM_BUF_SIZE))


def _refuse_ourselves(hands: Hands, path: str, name: str, ahead: _Looks | None) -> None:
    """The runtime itself is no program (stub.py makes it harmless; this makes it plain)."""
    for _ in range(_INTERPRETERS_MOST):
        mine, status, read = ahead or _look_at(hands, path)
        ahead = None
        if status.error:
            return
        if not mine.error and status.identity == mine.identity:
            raise HvError(f'exec: "{name}": permission denied', "it leads to the runtime itself")
        start = read()
        words = start[2:].split(b"\n")[0].split()
        if start[:2] != b"#!" or not words:
            return
        path = os.fsdecode(words[0])


def program_of(program: Program, home: bytes) -> tuple[list[bytes], list[bytes]]:
    """Its arguments and its environment as bytes. HOME is set where it is not, as the field's runtimes do.

    Of a name that is there twice the last value counts.
    """
    words = [word.encode("utf-8", "surrogateescape") for word in program.environment]
    environment = list({word.partition(b"=")[0]: word for word in words}.values())
    if not any(word.startswith(b"HOME=") and len(word) > 5 for word in environment):
        environment = [word for word in environment if word != b"HOME="] + [b"HOME=" + home]
    return [word.encode("utf-8", "surrogateescape") for word in program.args], environment


def _home(hands: Hands, program: Program) -> Callable[[], bytes]:
    """The user's directory as the image's /etc/passwd has it, where it is asked for."""
    if any(word.startswith("HOME=") and len(word) > 5 for word in program.environment):
        return lambda: b"/"
    text, number = hands.start_of("/etc/passwd"), str(program.uid).encode()

    def find() -> bytes:
        for line in text().split(b"\n"):
            fields = line.split(b":")
            if len(fields) >= 6 and fields[2] == number:
                return fields[5] or b"/"
        return b"/"

    return find


def last_steps(program: Program, path: str, home: bytes, *, listener: int, reply: int, lowest: int,
               filter: Filter | None = None, steps: Any = None, reaper: bool = False) -> Any:
    """What stub.py does: wait at `listener` (-1: don't), enter the filter, close descriptors, run `path`.

    `reply`: where a failure is reported; with a listener it is whoever connects. `lowest`: descriptors from this number
    on are not the program's. `steps`: what is to be done before. `reaper`: the program becomes a child of this process.
    """
    args, environment = program_of(program, home)
    steps = steps or stub.Steps(reply)
    guard = listener if listener >= 0 else reply
    steps.add(stub.KEEP, _SYS_FCNTL, guard, _F_SETFD, _FD_CLOEXEC)
    if listener >= 0:
        steps.add(stub.WAIT, _SYS_ACCEPT4, listener, 0, 0, _SOCK_CLOEXEC, result=stub.REPLY)
    steps.add(stub.DESCRIPTORS, _SYS_CLOSE_RANGE, lowest, 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)
    if program.no_new_privileges:
        _capabilities(steps, program)
    if filter:                          # without noNewPrivileges it needs CAP_SYS_ADMIN, else nothing
        steps.add(stub.FILTER, _SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, filter.flags,
                  (len(filter) // _INSTRUCTION, bytes(filter)))
    if not program.no_new_privileges:
        _capabilities(steps, program)
    if reaper:
        steps.add(stub.FORK, _SYS_RT_SIGPROCMASK, _SIG_SETMASK, b"\xff" * 8, 0, 8)
        steps.add(stub.FORK, _SYS_CLONE, _SIGCHLD, result=stub.REAP)
        steps.add(stub.FORK, _SYS_RT_SIGPROCMASK, _SIG_SETMASK, bytes(8), 0, 8)
    steps.add(stub.EXEC, _SYS_EXECVE, os.fsencode(path), args, environment)
    return steps


def _capabilities(steps: Any, program: Program) -> None:
    steps.add(stub.CAPABILITIES, creds.SYS_PRCTL, creds.PR_CAP_AMBIENT, creds.PR_CAP_AMBIENT_CLEAR_ALL)
    steps.add(stub.CAPABILITIES, creds.SYS_CAPSET,
              *creds.capability_data(program.effective, program.permitted, program.inheritable))
    for number in range(program.ambient.bit_length()):
        if program.ambient >> number & 1:
            steps.add(stub.CAPABILITIES, creds.SYS_PRCTL, creds.PR_CAP_AMBIENT, creds.PR_CAP_AMBIENT_RAISE, number)
