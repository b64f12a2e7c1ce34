"""What an instance has where its options say nothing: as docker and podman document it.

Sources: docs.docker.com, "docker run": runtime privilege and Linux capabilities; moby's documentation of the default
mounts and masked paths; the filter is hv/container/seccomp/profile.py's. Driven by tests/unit/test_instance_bundle.py.
"""

from __future__ import annotations

__all__ = ["CAPABILITIES", "MASKED", "PATH", "READONLY", "TERM", "devices", "mounts"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM = "xterm"
CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
                "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
                "CAP_SYS_CHROOT")
MASKED = ("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
          "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
          "/sys/firmware")
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_QUIET = ("nosuid", "noexec", "nodev")


def mounts(shm_size: int, *, privileged: bool) -> list[dict[str, Any]]:
    """The file systems of the kernel's. `privileged`: /sys and the cgroups can be written."""
    ro = () if privileged else ("ro",)
    return [
        _mount("/proc", "proc", *_QUIET),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/shm", "tmpfs", *_QUIET, "mode=1777", f"size={shm_size}", source="shm"),
        _mount("/dev/mqueue", "mqueue", *_QUIET),
        _mount("/sys", "sysfs", *_QUIET, *ro),
        _mount("/sys/fs/cgroup", "cgroup", *_QUIET, "relatime", *ro)]


def _mount(destination: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


def devices(*, privileged: bool) -> list[dict[str, Any]]:
    """linux.resources.devices: nobody's device but those of every container (runtime-spec, config-linux.md)."""
    if privileged:
        return [{"allow": True, "access": "rwm"}]
    allowed = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)]
    return [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "access": "m"},
            {"allow": True, "type": "b", "access": "m"},
            *({"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
              for major, minor in allowed),
            {"allow": True, "type": "c", "major": 136, "access": "rwm"}]       # the slaves of /dev/pts
