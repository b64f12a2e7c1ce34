"""`--network` has words that name no network: none, host, container:ID, pasta.

Driven by tests/unit/test_network_store.py.
"""

from __future__ import annotations

__all__ = ["check_mode"]

from hv.errors import ConfigError
from hv.places import rootless

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from hv.network.shape import Port

INTERFACES_MOST = 16            # of one instance


def check_mode(networks: Sequence[str], vm: bool, ports: Sequence[Port], ip: str) -> str:
    """none, host, container, pasta or bridge."""
    special = [name for name in networks if name in ("none", "host", "pasta") or name.startswith("container:")]
    if not special:
        if not networks:
            raise ConfigError("no network given", "--network none is for that")
        if len(set(networks)) != len(networks):
            raise ConfigError(f"--network {', '.join(networks)}: one is named twice", "name each once")
        if len(networks) > INTERFACES_MOST:
            raise ConfigError(f"more than {INTERFACES_MOST} networks for one instance", "use fewer")
        return "bridge"
    mode = special[0].partition(":")[0]
    if len(networks) > 1:
        raise ConfigError(f"--network {special[0]} goes with no other network", "name it alone")
    if mode == "pasta":
        if not rootless():
            raise ConfigError("--network pasta is for users without root", "name a network with a bridge")
        if ip:
            raise ConfigError("--ip goes with networks that have a bridge, not with --network pasta", "leave --ip out")
        return mode
    if vm and mode != "none":
        raise ConfigError(f"--network {special[0]} is for containers: a VM has a kernel and a network of its own",
                          "use a network with a bridge, or none; -p publishes its ports")
    if ports:
        raise ConfigError(f"-p goes with networks that have a bridge, not with --network {special[0]}",
                          "leave -p out" if mode == "host" else "name another network")
    if ip:
        raise ConfigError(f"--ip goes with networks that have a bridge, not with --network {special[0]}",
                          "leave --ip out")
    return mode
