"""`--share DIR[,tag=NAME][,readonly][,submounts][,timeout=N]`, or `--share tag=NAME,vhost-user=SOCKET`."""

from __future__ import annotations

__all__ = ["ShareConfig"]

import os
import resource
from errno import ENOSYS, EPERM

from hv.devices.virtio.fs import TAG_SIZE, Fs
from hv.devices.virtio.fs_host import FileServer
from hv.errors import ConfigError
from hv.linux.files import open_beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.device import VirtioDevice

TIMEOUT = 1.0               # seconds; as virtiofsd has it by default
_TIMEOUT_MOST = 10.0**6
_NODES_MOST = 4096          # descriptors kept for inodes of one share
_USAGE = "--share DIR,tag=NAME,readonly,submounts,timeout=SECONDS; or tag=NAME,vhost-user=SOCKET"


class ShareConfig:
    """A folder for the guest. `tag` is what it mounts, by default share0, share1, ...; `readonly` keeps it from
    changing anything; `timeout` is for how long it trusts what it knows of names and attributes; `submounts`: what is
    mounted inside the folder when the machine is made belongs to it.
    """

    FIELDS = (("directory", "text"), ("tag", "text"), ("readonly", "flag"), ("timeout", "text"), ("vhost_user", "text"),
              ("submounts", "flag"))

    def __init__(self, directory: str | os.PathLike[str] = "", *, tag: str = "", readonly: bool = False,
                 timeout: float | str = TIMEOUT, vhost_user: str = "", submounts: bool = False) -> None:
        self.directory = os.fspath(directory)
        self.tag = tag
        self.readonly = readonly
        self.vhost_user = vhost_user
        self.submounts = submounts
        if not isinstance(tag, str) or len(os.fsencode(tag)) > TAG_SIZE or "\0" in tag:
            raise ConfigError(f"share {self.directory}: tag {tag!r} is not 1 to {TAG_SIZE} bytes", _USAGE)
        for name, value in (("readonly", readonly), ("submounts", submounts)):
            if not isinstance(value, bool):
                raise ConfigError(f"share {self.directory}: {name}={value} is no option", f"{name} takes no value")
        try:
            self.timeout = float(timeout)
        except ValueError:
            self.timeout = -1.0
        if isinstance(timeout, bool) or not 0 <= self.timeout <= _TIMEOUT_MOST:
            raise ConfigError(f"share {self.directory}: timeout {timeout!r} is no number of seconds", _USAGE)
        if bool(self.directory) == bool(vhost_user) or not isinstance(vhost_user, str):
            raise ConfigError("a share needs a directory or vhost-user=SOCKET, and not both", _USAGE)
        if vhost_user and (readonly or submounts or self.timeout != TIMEOUT):
            raise ConfigError("a share by vhost-user: readonly, submounts and timeout are the back end's business",
                              "give them to the program that listens there")

    def create(self) -> VirtioDevice:
        """The device, its folder open. ConfigError where that can't be."""
        if self.vhost_user:
            from hv.devices.vhost_user.fs import VhostUserFs

            return VhostUserFs(self.vhost_user, self.tag or "share0")
        try:
            root_fd = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"share {self.directory}: {error.strerror}", "name a directory that exists") from None
        try:
            _probe(self.directory, root_fd)
            most = _raised_limit()
            own = (os.geteuid(), os.getegid()) if os.geteuid() == 0 else None
            crossings = None
            if self.submounts:
                from hv.devices.virtio.fs_mounts import crossings_below

                crossings = crossings_below(root_fd)
            server = FileServer(root_fd, readonly=self.readonly, timeout=self.timeout, own=own,
                                nodes=max(64, min(_NODES_MOST, most // 8)), handles=max(64, most // 4),
                                crossings=crossings)
        except BaseException:
            os.close(root_fd)
            raise
        return Fs(server, os.fsencode(self.tag))

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one."""
        return {"directory": self.directory and os.path.abspath(self.directory), "tag": self.tag,
                "readonly": self.readonly, "timeout": repr(self.timeout),
                "vhost_user": self.vhost_user and os.path.abspath(self.vhost_user), "submounts": self.submounts}


def _probe(directory: str, root_fd: int) -> None:
    """Whether this host has what keeps a guest inside the folder."""
    try:
        os.close(open_beneath(b".", root_fd))
        os.readlink(f"/proc/self/fd/{root_fd}")
    except OSError as error:
        if error.errno in (ENOSYS, EPERM):
            raise ConfigError(f"share {directory}: no openat2 here",
                              "it takes Linux 5.6 and a sandbox that allows the call; or use vhost-user=") from None
        raise ConfigError(f"share {directory}: {error.strerror}", "is it readable, and /proc mounted?") from None


def _raised_limit() -> int:
    """As many descriptors as this process may have: a guest's open files each take one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass
    return 1 << 16 if soft == resource.RLIM_INFINITY else min(soft, 1 << 16)
