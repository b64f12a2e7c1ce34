"""What this runtime knows, for engines to read (runtime-spec 1.2, features.md and features-linux.md).

It tells what is understood, whatever the host is able to; taken from the tables that understand it. Driven by
tests/unit/test_container_values.py and tests/root/test_container_commands.py.
"""

from __future__ import annotations

__all__ = ["features"]

from hv.container.mounts import option_names
from hv.container.plan import REAPER
from hv.container.seccomp.rules import ACTIONS, FLAGS, OPERATORS
from hv.container.seccomp.syscalls import ARCHITECTURES, OTHER_ARCHITECTURES
from hv.container.spec import HOOKS
from hv.container.state import OCI_VERSION
from hv.linux.creds import CAPABILITIES
from hv.linux.ns import CLONE_FLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def features(version: str) -> dict[str, Any]:
    """The features document."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": list(HOOKS),
        "mountOptions": option_names(),
        "linux": {
            "namespaces": sorted(CLONE_FLAGS),
            "capabilities": list(CAPABILITIES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": False},
            "seccomp": {
                "enabled": True,
                "actions": sorted(ACTIONS),
                "operators": sorted(OPERATORS),
                "archs": sorted({*ARCHITECTURES, *OTHER_ARCHITECTURES}),
                "knownFlags": sorted(FLAGS),
                "supportedFlags": sorted(FLAGS)},
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}}},
        "annotations": {"io.pyhv.version": version,
                        "org.opencontainers.runc.checkpoint.enabled": "false"},
        # config.json's annotations that change what the runtime does
        "potentiallyUnsafeConfigAnnotations": [REAPER, "org.systemd.property."],
    }
