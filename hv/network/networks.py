"""Networks: make, list, remove; join instances to them and part them again. The face of this room.

    networks = Networks()
    with new_netns() as netns:                      # hv/linux/netns.py: a namespace held by a descriptor, no mount
        attached = networks.attach(["pyhv"], id, name="web", netns=netns.path, ports=parse_publish(["8080:80"]))
        ...
    networks.detach(id)                             # idempotent; after a crash too

Driven by tests/unit/test_network*.py and tests/root/test_network*.py.
"""

from __future__ import annotations

__all__ = ["DEFAULT", "Networks"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from hv.network.shape import Attachment, Interface, Port

DEFAULT = "pyhv"            # the network of instances that ask for none


class Networks:
    """All networks under `root` (default data_root()/networks), with what is running under `run` (run_root()/networks).

    Every method takes the lock that it needs; any number of processes may call at once.
    """

    def __init__(self, root: str = "", run: str = "") -> None:
        raise NotImplementedError

    # networks ----------------------------------------------------------------------------------------

    def create(self, name: str, *, subnet: str = "", gateway: str = "", ip_range: str = "", internal: bool = False,
               driver: str = "bridge", labels: Mapping[str, str] | None = None, dns: bool = True) -> dict[str, Any]:
        """Make a network; what inspect() gives. ConfigError, NetworkError."""
        raise NotImplementedError

    def rm(self, name: str) -> None:
        """Remove a network that has no member."""
        raise NotImplementedError

    def ls(self) -> list[dict[str, Any]]:
        """All networks: name, driver, subnet, internal, members (number)."""
        raise NotImplementedError

    def inspect(self, name: str) -> dict[str, Any]:
        """One network, and its members with their addresses."""
        raise NotImplementedError

    def prune(self) -> list[str]:
        """Remove all networks without a member, but for the default one; their names."""
        raise NotImplementedError

    # instances ---------------------------------------------------------------------------------------

    def check(self, networks: Sequence[str], *, vm: bool = False, ports: Sequence[Port] = (), ip: str = "") -> None:
        """Whether attach() could do that, before anything is started: names, kinds that a VM can't have, ports in use.
        ConfigError (exit code 2), NetworkError."""
        raise NotImplementedError

    def attach(self, networks: Sequence[str], instance: str, *, name: str, netns: str = "", hostname: str = "",
               aliases: Sequence[str] = (), ports: Sequence[Port] = (), vm: bool = False, ip: str = "", mac: str = "",
               dns: Sequence[str] = (), search: Sequence[str] = (), hosts: Sequence[str] = ()) -> Attachment:
        """Join `instance` (its ID) to `networks`, with eth0, eth1, ... in the namespace at `netns`, and publish ports.

        `networks` may also be ["none"], ["host"] (not with vm) or ["container:ID"]; then `netns` may be "" and no
        interface is made. `vm`: the namespace's own stack gets no address and stays silent, as eth0 is the guest's
        (hv/devices/virtio/net_packet.py). `ip`, `mac` and `aliases` are those on the first network. `hosts`: more
        lines for /etc/hosts, as HOST:IP. All or nothing: what was made is removed again if a step fails.
        """
        raise NotImplementedError

    def detach(self, instance: str, *, netns_ends: bool = False) -> None:
        """Remove all that attach() and connect() made for `instance`; nothing to do is no error.

        `netns_ends`: its namespace is about to end, and takes the interfaces along by the kernel's own worker: saves
        the 20 to 40 ms that removing one takes.
        """
        raise NotImplementedError

    def connect(self, network: str, instance: str, *, aliases: Sequence[str] = (), ip: str = "",
                netns: str = "") -> Interface:
        """Join a running container to one more network. `netns`: where its namespace is now, if not where attach()
        was told."""
        raise NotImplementedError

    def disconnect(self, network: str, instance: str, *, force: bool = False) -> None:
        """Part it from one network. `force`: it need not be a member."""
        raise NotImplementedError

    def rename(self, instance: str, name: str) -> None:
        """Its name in its networks."""
        raise NotImplementedError

    def members(self, instance: str) -> list[Interface]:
        """The interfaces of `instance`."""
        raise NotImplementedError

    def published(self, instance: str) -> list[Port]:
        """The ports of `instance`."""
        raise NotImplementedError

    def sweep(self, alive: Iterable[str]) -> list[str]:
        """Remove what belongs to no instance of `alive` (IDs): those that it belonged to. For after a crash."""
        raise NotImplementedError
