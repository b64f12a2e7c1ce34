"""Who the container's program is and what it may: ids, capabilities, limits, directory, program.

Driven by tests/root/test_container_identity.py.
"""

from __future__ import annotations

__all__ = ["become_root", "find_program", "last_step", "set_sysctls", "set_time_offsets", "take_on"]

import errno
import os
import resource
import stat

from hv.errors import ConfigError, HvError
from hv.linux import creds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.container.process import Plan
    from hv.container.spec import Spec


def become_root() -> None:
    """User and group 0 of the user namespace just entered."""
    os.setgroups([]) if _may_set_groups() else None
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _may_set_groups() -> bool:
    try:
        with open("/proc/self/setgroups", "rb", 0) as file:
            return file.read().strip() != b"deny"
    except OSError:
        return True


def set_time_offsets(offsets: dict[str, tuple[int, int]]) -> None:
    """linux.timeOffsets into the time namespace that the next child enters."""
    for clock, (seconds, nanoseconds) in offsets.items():
        with open("/proc/self/timens_offsets", "w") as file:
            file.write(f"{clock} {seconds} {nanoseconds}")


def set_sysctls(values: dict[str, str]) -> None:
    """linux.sysctl, in the new namespaces."""
    for name, value in values.items():
        path = "/proc/sys/" + name.replace(".", "/")
        try:
            with open(path, "w") as file:
                file.write(value)
        except OSError as error:
            raise HvError(f"linux.sysctl {name}: {os.strerror(error.errno or 0)}") from None


def take_on(plan: Plan) -> str:
    """All of process but what must come last; the program's path."""
    spec = plan.spec
    _limits(spec)
    _score(spec)
    program = find_program(spec)
    last = creds.last_capability()
    creds.drop_bounding(spec.bounding, last)
    if spec.umask is not None:
        os.umask(spec.umask)
    creds.prctl(creds.PR_SET_KEEPCAPS, 1)
    if _may_set_groups():
        os.setgroups(spec.groups)
    os.setresgid(spec.gid, spec.gid, spec.gid)
    os.setresuid(spec.uid, spec.uid, spec.uid)
    creds.prctl(creds.PR_SET_KEEPCAPS, 0)
    creds.set_capabilities(spec.effective, spec.permitted, spec.inheritable)
    creds.clear_ambient()
    creds.raise_ambient(spec.ambient)
    _change_directory(spec.cwd)
    if spec.no_new_privileges:
        creds.prctl(creds.PR_SET_NO_NEW_PRIVS, 1)
    return program


def last_step(plan: Plan) -> None:
    """What would forbid everything else."""
    if plan.filter:
        from hv.linux.seccomp import load_filter

        load_filter(plan.filter)


def _limits(spec: Spec) -> None:
    for number, soft, hard in spec.rlimits:
        try:
            resource.setrlimit(number, (soft, hard))
        except (OSError, ValueError) as error:
            raise HvError(f"process.rlimits: {error}", "raising a hard limit needs CAP_SYS_RESOURCE") from None


def _score(spec: Spec) -> None:
    if spec.oom_score_adj is not None:
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(str(spec.oom_score_adj))
        except OSError as error:
            raise HvError(f"process.oomScoreAdj {spec.oom_score_adj}: {os.strerror(error.errno or 0)}",
                          "lowering it needs CAP_SYS_RESOURCE") from None


def _change_directory(path: str) -> None:
    try:
        os.chdir(path)
    except FileNotFoundError:
        try:
            os.makedirs(path, 0o755, exist_ok=True)
            os.chdir(path)
        except OSError as error:
            raise HvError(f"process.cwd {path}: {os.strerror(error.errno or 0)}") from None
    except OSError as error:
        raise HvError(f"process.cwd {path}: {os.strerror(error.errno or 0)}") from None


def find_program(spec: Spec) -> str:
    """process.args[0] in the new root, by PATH of process.env; HvError as a shell would say it."""
    name = spec.args[0]
    if "/" in name:
        places = [name if name.startswith("/") else os.path.join(spec.cwd, name)]
    else:
        path = spec.environment.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        places = [f"{folder or '.'}/{name}" for folder in path.split(":")]
    found = errno.ENOENT
    for place in places:
        try:
            mode = os.stat(place).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                found = error.errno or found
            continue
        if stat.S_ISREG(mode) and mode & 0o111:
            return place
        found = errno.EACCES
    if not name:
        raise ConfigError("process.args[0] is empty", "name a program")
    raise HvError(f'exec: "{name}": ' + ("executable file not found in $PATH" if found == errno.ENOENT
                                         else os.strerror(found).lower()))
