"""`spec`: a config.json to begin with, with the isolation that engines give (man 8 runc-spec).

Driven by tests/root/test_container_cli.py.
"""

from __future__ import annotations

__all__ = ["command_spec", "default_config"]

import os

from hv.cli.oci import Context, parse
from hv.container.state import OCI_VERSION
from hv.errors import ConfigError, HvError
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
_QUIET = ["nosuid", "noexec", "nodev"]
_USAGE = """usage: pyhv-runtime spec [flags]

  --bundle DIR, -b   where to write config.json [.]
  --rootless         for a user who is not root: a user namespace with that user alone"""


def default_config() -> dict[str, Any]:
    """A shell in namespaces of its own, with the mounts and masked paths that the field's engines use."""
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": True, "user": {"uid": 0, "gid": 0}, "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"], "cwd": "/",
            "capabilities": {name: list(_CAPABILITIES) for name in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}], "noNewPrivileges": True},
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "pyhv",
        "mounts": [
            _mount("/proc", "proc"),
            _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            _mount("/dev/shm", "tmpfs", *_QUIET, "mode=1777", "size=65536k", source="shm"),
            _mount("/dev/mqueue", "mqueue", *_QUIET),
            _mount("/sys", "sysfs", *_QUIET, "ro"),
            _mount("/sys/fs/cgroup", "cgroup", *_QUIET, "relatime", "ro")],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                            "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]}}


def _mount(destination: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


def _rootless(config: dict[str, Any]) -> None:
    linux = config["linux"]
    linux["namespaces"] = [row for row in linux["namespaces"] if row["type"] != "network"] + [{"type": "user"}]
    linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    del linux["resources"]
    mounts = [row for row in config["mounts"] if row["type"] not in ("sysfs", "cgroup")]
    for row in mounts:
        row["options"] = [word for word in row["options"] if word != "gid=5"]       # a group without a mapping
    # sysfs belongs to the network namespace, which is the host's here
    config["mounts"] = [*mounts, {"destination": "/sys", "type": "none", "source": "/sys",
                                  "options": ["rbind", *_QUIET, "ro"]}]


def command_spec(context: Context, arguments: list[str]) -> int:
    """spec [--bundle DIR] [--rootless]"""
    known = {"--bundle": ("bundle", "."), "-b": ("bundle", "."), "--rootless": ("rootless", False)}
    values, words = parse(arguments, known, usage=_USAGE)
    if words:
        raise ConfigError(f"spec: {words[0]!r}: it takes no arguments")
    config = default_config()
    if values["rootless"]:
        _rootless(config)
    path = os.path.join(values["bundle"], "config.json")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.write(fd, (dumps(config, 2) + "\n").encode())
        os.close(fd)
    except FileExistsError:
        raise HvError(f"{path} exists", "remove it first, or choose another --bundle") from None
    except OSError as error:
        raise HvError(f"{path}: {os.strerror(error.errno or 0)}") from None
    return 0
