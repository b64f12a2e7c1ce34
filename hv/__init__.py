"""pyhv: a hypervisor and container runtime in Python.

The public names are loaded on first use, so that `import hv` costs nothing that is not needed:

    Machine, MachineConfig   configure, start, stop and look into a virtual machine
    Host                     many of them in one process (docs/pool.md)
    Pool                     machines restored from a snapshot ahead of time
    HvError and its family   everything pyhv raises on purpose
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = [
    "ConfigError", "GuestError", "Host", "HvError", "ImageError", "KernelError", "Machine", "MachineConfig", "Pool",
    "StateError", "__version__",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.errors import ConfigError, GuestError, HvError, ImageError, KernelError, StateError
    from hv.machine.config import MachineConfig
    from hv.machine.fleet import Host
    from hv.machine.machine import Machine
    from hv.snapshot.pool import Pool

_HOME = {
    "Machine": "hv.machine.machine",
    "MachineConfig": "hv.machine.config",
    "Host": "hv.machine.fleet",
    "Pool": "hv.snapshot.pool",
    "ConfigError": "hv.errors", "GuestError": "hv.errors", "HvError": "hv.errors",
    "ImageError": "hv.errors", "KernelError": "hv.errors", "StateError": "hv.errors",
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'hv' has no attribute {name!r}")
    module = __import__(home, fromlist=[name])
    value: object = getattr(module, name)
    globals()[name] = value
    return value
