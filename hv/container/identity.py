"""Who the container's program is and what it may: ids, capabilities, limits, directory; and the last steps to it.

Driven by tests/root/test_container_identity.py.
"""

from __future__ import annotations

__all__ = ["become_root", "find_program", "last_steps", "limits", "may_set_groups", "program_of", "set_score",
           "set_sysctls", "set_time_offsets", "take_on"]

import errno
import os
import stat

from hv.container import stub
from hv.errors import HvError, KernelError
from hv.linux import creds
from hv.linux.mount import open_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.container.program import Program
    from hv.container.seccomp.compile import Program as Filter

_CAP_SYS_ADMIN = 1 << creds.CAPABILITIES.index("CAP_SYS_ADMIN")
# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_EXECVE, _SYS_FCNTL, _SYS_ACCEPT4, _SYS_SECCOMP, _SYS_CLOSE_RANGE = 59, 72, 288, 317, 436
_SYS_RT_SIGPROCMASK, _SYS_CLONE, _SIG_SETMASK, _SIGCHLD = 14, 56, 2, 17
_F_SETFD, _FD_CLOEXEC, _SOCK_CLOEXEC, _CLOSE_RANGE_CLOEXEC = 2, 1, 0o2000000, 4
_SECCOMP_SET_MODE_FILTER = 1            # include/uapi/linux/seccomp.h
_INSTRUCTION = 8                        # struct sock_filter
_BINPRM_BUF_SIZE = 256                  # include/uapi/linux/binfmts.h: what the kernel reads of a script's first line
_INTERPRETERS_MOST = 6                  # fs/exec.c, exec_binprm: five levels of scripts


def become_root(groups: bool | None = None) -> None:
    """User and group 0 of the user namespace just entered, still to be looked at by whoever owns it.

    `groups`: whether setgroups is allowed in there; None: /proc tells.
    """
    if may_set_groups() if groups is None else groups:
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def may_set_groups(pid: int | str = "self") -> bool:
    """Whether the user namespace of a process allows setgroups (man 7 user_namespaces)."""
    try:
        with open(f"/proc/{pid}/setgroups", "rb", 0) as file:
            return file.read().strip() != b"deny"
    except OSError:
        return True


def set_time_offsets(offsets: list[tuple[str, int, int]], pid: int | str = "self") -> None:
    """linux.timeOffsets into the time namespace that the next child of process `pid` enters."""
    for clock, seconds, nanoseconds in offsets:
        _put(f"/proc/{pid}/timens_offsets", f"{clock} {seconds} {nanoseconds}", f"linux.timeOffsets.{clock}")


def set_sysctls(values: list[tuple[str, str, str]]) -> None:
    """linux.sysctl, through the host's /proc: the container's could be anything."""
    for name, path, value in values:
        _put(f"/proc/sys/{path}", value, f"linux.sysctl {name}")


def set_score(score: int | None) -> None:
    """process.oomScoreAdj."""
    if score is not None:
        _put("/proc/self/oom_score_adj", str(score), f"process.oomScoreAdj {score}",
             "lowering it needs CAP_SYS_RESOURCE")


def _put(path: str, text: str, field: str, hint: str = "") -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise HvError(f"{field}: {os.strerror(error.errno or 0)}", hint) from None


def limits(program: Program) -> None:
    """process.rlimits."""
    for number, soft, hard, name in program.rlimits:
        try:
            creds.set_limit(number, soft, hard)
        except KernelError as error:
            raise HvError(f"process.rlimits {name}: {os.strerror(error.errno)}",
                          "raising a hard limit needs CAP_SYS_RESOURCE") from None


def take_on(program: Program, root: int, *, filtered: bool, groups: bool | None = None) -> str:
    """Become who the program runs as, in its directory; the program's path. `root`: a descriptor of the root.

    `filtered`: a seccomp filter will be entered later, which without noNewPrivileges needs CAP_SYS_ADMIN until then.
    `groups`: whether setgroups is allowed; None: /proc tells.
    """
    if program.scheduler or program.io_priority:
        from hv.linux import sched

        if program.scheduler:
            sched.set_scheduler(*program.scheduler)
        if program.io_priority:
            sched.set_io_priority(*program.io_priority)
    if program.apparmor or program.selinux:
        from hv.container.labels import on_exec

        on_exec(program.apparmor, program.selinux)
    os.umask(0o022 if program.umask is None else program.umask)
    entered = _enter(root, program.cwd, late=False)
    _within_ours(program)
    creds.drop_bounding(program.bounding, creds.last_capability())
    creds.prctl(creds.PR_SET_KEEPCAPS, 1)
    try:
        if may_set_groups() if groups is None else groups:
            os.setgroups(program.groups)
        elif program.groups:
            raise HvError("process.user.additionalGids: setgroups is not allowed in this user namespace")
        os.setresgid(program.gid, program.gid, program.gid)
        os.setresuid(program.uid, program.uid, program.uid)
    except OSError as error:
        raise HvError(f"process.user {program.uid}:{program.gid}: {os.strerror(error.errno or 0)}",
                      "in a user namespace every id needs a mapping") from None
    creds.prctl(creds.PR_SET_KEEPCAPS, 0)
    # for the last program (stub.py), which has its capabilities by the ambient set and sets those of process itself
    kept = program.permitted | (_CAP_SYS_ADMIN if filtered and not program.no_new_privileges else 0)
    creds.set_capabilities(kept, kept, program.inheritable | kept)
    creds.clear_ambient()
    creds.raise_ambient(kept)
    if not entered:
        _enter(root, program.cwd, late=True)
    _check_directory(program.cwd)
    if program.no_new_privileges:
        creds.prctl(creds.PR_SET_NO_NEW_PRIVS, 1)
    return find_program(program, root)


def _within_ours(program: Program) -> None:
    """A capability that this process lacks can't be given, nor an ambient one that is not inheritable; as in runc."""
    effective, permitted, _ = creds.capability_sets()
    # what the last program is to keep must be inheritable before it leaves the bounding set (man 2 capset)
    creds.set_capabilities(effective, permitted, permitted)
    program.permitted &= permitted
    program.effective &= program.permitted
    program.inheritable &= permitted
    program.ambient &= program.permitted & program.inheritable


def _enter(root: int, path: str, *, late: bool) -> bool:
    """Change to the program's directory, made where it is missing; False where only the program itself may."""
    try:
        # no magic links: /proc/self/fd/N would lead to what this process has open (CVE-2024-21626)
        fd = open_in(root, path, os.O_PATH | os.O_DIRECTORY)
    except KernelError as error:
        if error.errno == errno.EACCES and not late:
            return False
        if error.errno != errno.ENOENT:
            raise HvError(f"process.cwd {path}: {os.strerror(error.errno)}") from None
        try:
            from hv.container.mounts import target_in

            fd = target_in(root, os.path.normpath(path), True)
        except (KernelError, OSError) as error:
            raise HvError(f"process.cwd {path}: {os.strerror(error.errno or 0)}") from None
    try:
        os.fchdir(fd)
    except PermissionError:
        if not late:
            return False
        raise HvError(f"process.cwd {path}: {os.strerror(errno.EACCES)}") from None
    except OSError as error:
        raise HvError(f"process.cwd {path}: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(fd)
    return True


def _check_directory(path: str) -> None:
    try:
        inside = os.getcwd().startswith("/")
    except OSError:
        inside = False
    if not inside:
        raise HvError(f"process.cwd {path}: outside the container's root")


def find_program(program: Program, root: int) -> str:
    """process.args[0] in the new root, by PATH of process.env; HvError as a shell would say it."""
    name = program.args[0]
    places = [name] if "/" in name else [f"{folder or '.'}/{name}" for folder in program.path.split(":")]
    found = errno.ENOENT
    for place in places:
        try:
            mode = os.stat(place).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                found = error.errno or found
            continue
        if stat.S_ISREG(mode) and os.access(place, os.X_OK, effective_ids=True):
            _refuse_ourselves(place, name)
            return place
        found = errno.EACCES
    if found == errno.ENOENT and "/" not in name:
        raise HvError(f'exec: "{name}": executable file not found in $PATH')
    raise HvError(f'exec: "{name}": {os.strerror(found).lower()}')


def _refuse_ourselves(path: str, name: str) -> None:
    """The runtime itself is no program (stub.py makes it harmless; this makes it plain)."""
    mine = os.stat("/proc/self/exe") if os.path.exists("/proc/self/exe") else None
    for _ in range(_INTERPRETERS_MOST):
        try:
            status = os.stat(path)
            if mine and (status.st_dev, status.st_ino) == (mine.st_dev, mine.st_ino):
                raise HvError(f'exec: "{name}": permission denied', "it leads to the runtime itself")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                start = os.read(fd, _BINPRM_BUF_SIZE)
            finally:
                os.close(fd)
        except OSError:
            return
        words = start[2:].split(b"\n")[0].split()
        if start[:2] != b"#!" or not words:
            return
        path = os.fsdecode(words[0])


def program_of(program: Program) -> tuple[list[bytes], list[bytes]]:
    """Its arguments and its environment as bytes. HOME is set where it is not, as the field's runtimes do.

    Of a name that is there twice the last value counts.
    """
    words = [word.encode("utf-8", "surrogateescape") for word in program.environment]
    environment = list({word.partition(b"=")[0]: word for word in words}.values())
    if not any(word.startswith(b"HOME=") and len(word) > 5 for word in environment):
        environment = [word for word in environment if word != b"HOME="] + [b"HOME=" + _home(program.uid)]
    return [word.encode("utf-8", "surrogateescape") for word in program.args], environment


def _home(uid: int) -> bytes:
    """The user's directory as the image's /etc/passwd has it."""
    try:
        fd = os.open("/etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            text = os.read(fd, 1 << 20)
        finally:
            os.close(fd)
    except OSError:
        text = b""
    for line in text.split(b"\n"):
        fields = line.split(b":")
        if len(fields) >= 6 and fields[2] == str(uid).encode():
            return fields[5] or b"/"
    return b"/"


def last_steps(program: Program, path: str, *, listener: int, reply: int, lowest: int,
               filter: Filter | None = None, steps: stub.Steps | None = None, reaper: bool = False) -> stub.Steps:
    """What stub.py does: wait at `listener` (-1: don't), enter the filter, close descriptors, run `path`.

    `reply`: where a failure is reported; with a listener it is whoever connects. `lowest`: descriptors from this number
    on are not the program's. `steps`: what is to be done before. `reaper`: the program becomes a child of this process.
    """
    args, environment = program_of(program)
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


def _capabilities(steps: stub.Steps, program: Program) -> None:
    steps.add(stub.CAPABILITIES, creds.SYS_PRCTL, creds.PR_CAP_AMBIENT, creds.PR_CAP_AMBIENT_CLEAR_ALL)
    steps.add(stub.CAPABILITIES, creds.SYS_CAPSET,
              *creds.capability_data(program.effective, program.permitted, program.inheritable))
    for number in range(program.ambient.bit_length()):
        if program.ambient >> number & 1:
            steps.add(stub.CAPABILITIES, creds.SYS_PRCTL, creds.PR_CAP_AMBIENT, creds.PR_CAP_AMBIENT_RAISE, number)
