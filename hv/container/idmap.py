"""Which users of the host stand behind the users inside a user namespace (man 7 user_namespaces).

Root writes the maps. Anybody else may map only itself, or what /etc/subuid and /etc/subgid allow, which newuidmap and
newgidmap (package uidmap) write. A user namespace that is only a pair of maps, for idmapped mounts, is made by a
process that ends at once (man 2 mount_setattr, MOUNT_ATTR_IDMAP).

Driven by tests/root/test_container_userns.py.
"""

from __future__ import annotations

__all__ = ["Mappings", "namespace_of_maps", "write_maps"]

import os
from _signal import SIGKILL, pause

from hv.errors import HvError
from hv.linux.creds import PR_SET_PDEATHSIG, prctl
from hv.linux.ns import CLONE_NEWUSER, unshare

Mappings = list[tuple[int, int, int]]
_HELPERS = ("/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin", "/sbin")


def write_maps(pid: int, uids: Mappings, gids: Mappings) -> None:
    """Give the new user namespace of process `pid` its ids. HvError where that is not allowed."""
    if os.geteuid() == 0:
        _write(pid, "uid_map", uids)
        _write(pid, "gid_map", gids)
        return
    mine = ((os.geteuid(), uids, "uid"), (os.getegid(), gids, "gid"))
    for own, rows, kind in mine:
        if len(rows) == 1 and rows[0][1:] == (own, 1):
            if kind == "gid":       # without this the kernel takes no gid_map from an unprivileged process
                _put(pid, "setgroups", "deny")
            _write(pid, f"{kind}_map", rows)
        else:
            _by_helper(f"new{kind}map", pid, rows)


def _text(rows: Mappings) -> str:
    return "".join(f"{inside} {outside} {count}\n" for inside, outside, count in rows)


def _write(pid: int, leaf: str, rows: Mappings) -> None:
    _put(pid, leaf, _text(rows))


def _put(pid: int, leaf: str, text: str) -> None:
    try:
        with open(f"/proc/{pid}/{leaf}", "wb", 0) as file:
            file.write(text.encode())
    except OSError as error:
        raise HvError(f"linux.{'gid' if leaf == 'gid_map' else 'uid'}Mappings: {leaf}: {os.strerror(error.errno or 0)}",
                      "ranges must not overlap, and must be within what this user may map") from None


def _by_helper(name: str, pid: int, rows: Mappings) -> None:
    for folder in _HELPERS:
        if os.access(f"{folder}/{name}", os.X_OK):
            break
    else:
        raise HvError(f"{name} is not installed", "it maps more than one user without root: package uidmap")
    said = os.memfd_create("output", os.MFD_CLOEXEC)
    words = [name, str(pid), *(str(number) for row in rows for number in row)]
    child = os.posix_spawn(f"{folder}/{name}", words, {}, file_actions=((os.POSIX_SPAWN_DUP2, said, 2),))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.lseek(said, 0, os.SEEK_SET)
    text = os.read(said, 500).decode(errors="replace").strip()
    os.close(said)
    if code:
        raise HvError(f"{name}: {text or code}", "the ranges must stand in /etc/subuid and /etc/subgid")


def namespace_of_maps(uids: Mappings, gids: Mappings) -> int:
    """A descriptor of a new user namespace with these maps."""
    ready_out, ready_in = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        try:
            prctl(PR_SET_PDEATHSIG, SIGKILL)
            unshare(CLONE_NEWUSER)
            os.write(ready_in, b".")
            while True:
                pause()
        finally:
            os._exit(1)
    try:
        os.close(ready_in)
        if not os.read(ready_out, 1):
            raise HvError("idmapped mounts: no user namespace can be made here")
        write_maps(child, uids, gids)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_out)
        os.kill(child, SIGKILL)
        os.waitpid(child, 0)
