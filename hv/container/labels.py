"""Labels of security modules: AppArmor profiles and SELinux contexts, done where the host has the module.

Written for the next exec (man 5 proc_pid_attr; Documentation/admin-guide/LSM/). A host without the module refuses by
name, as the specification wants it for what can't be met. Never run for real here: this host has neither.

Driven by tests/unit/test_container_spec.py.
"""

from __future__ import annotations

__all__ = ["on_exec", "require"]

import os

from hv.errors import ConfigError, HvError

_FOUND = {"apparmor": "/sys/kernel/security/apparmor", "selinux": "/sys/fs/selinux/enforce"}


def require(module: str, field: str) -> None:
    """ConfigError where the host's kernel does not run the security module that `field` is for."""
    if not os.path.exists(_FOUND[module]):
        raise ConfigError(f"{field}: this host does not run {module}", "leave it empty")


def on_exec(apparmor: str, selinux: str) -> None:
    """The next program of this process gets these labels ("": as it comes)."""
    if apparmor:
        own = "/proc/self/attr/apparmor/exec"
        _write(own if os.path.exists(own) else "/proc/self/attr/exec", f"exec {apparmor}", "process.apparmorProfile")
    if selinux:
        _write("/proc/self/attr/exec", selinux, "process.selinuxLabel")


def _write(path: str, text: str, field: str) -> None:
    try:
        with open(path, "wb", 0) as file:
            file.write(text.encode())
    except OSError as error:
        raise HvError(f"{field} {text!r:.60}: {os.strerror(error.errno or 0)}", "is it loaded on this host?") from None
