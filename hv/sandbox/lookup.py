"""Whether a bundle's program is there, looked up in the tree on the host: engines want `create` to say that it is not.

The guest has the last word (hv/sandbox/process.py): what it mounts itself is not seen here, nor is who may run it.
Driven by tests/kvm/test_vm_engines.py.
"""

from __future__ import annotations

__all__ = ["require_program"]

import errno
import os
import stat

from hv.errors import HvError, KernelError
from hv.linux.mount import open_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.container.program import Program
    from hv.sandbox.rootfs_tree import Tree

_EXECUTABLE = 0o111


def require_program(tree: Tree, program: Program) -> None:
    """HvError, as a shell would say it, where process.args[0] can't be run."""
    name, number = program.args[0], errno.ENOENT
    cwd = os.path.normpath(program.cwd)
    places = [name] if "/" in name else [f"{folder or '.'}/{name}" for folder in program.path.split(":")]
    for place in places:
        path = os.path.normpath(os.path.join(cwd, place))
        if tree.hidden(path):
            return              # the guest knows
        try:
            fd = open_in(tree.fd, path, os.O_PATH)
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                number = error.errno
            continue
        try:
            mode = os.stat(fd).st_mode
            found = os.readlink(f"/proc/self/fd/{fd}")[len(tree.path.rstrip("/")):] or "/"
        finally:
            os.close(fd)
        if tree.hidden(found) or (stat.S_ISREG(mode) and mode & _EXECUTABLE):
            return
        number = errno.EACCES
    if number == errno.ENOENT and "/" not in name:
        raise HvError(f'exec: "{name}": executable file not found in $PATH')
    raise HvError(f'exec: "{name}": {os.strerror(number).lower()}')
