"""`pyhv network create|ls|inspect|rm|prune|connect|disconnect`, printed as docker and podman print it.

Driven by tests/root/test_network_cli.py.
"""

from __future__ import annotations

__all__ = ["connect", "create", "disconnect", "inspect", "list_networks", "prune", "remove"]

import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from hv.cli.say import say_error
from hv.cli.table import print_found, print_rows
from hv.errors import ConfigError, HvError, NetworkError
from hv.network.networks import Networks

_KEYS = ("name", "id", "driver", "label")


def create(name: str, driver: str, subnet: str, gateway: str, ip_range: str, internal: bool, disable_dns: bool,
           labels: Iterable[str]) -> int:
    """Make a network and print its name."""
    pairs = [text.partition("=") for text in labels]
    if any(not key for key, _, _ in pairs):
        raise ConfigError("--label: begins with =", "KEY or KEY=VALUE")
    made = Networks().create(name, subnet=subnet, gateway=gateway, ip_range=ip_range, internal=internal, driver=driver,
                             labels={key: value for key, _, value in pairs}, dns=not disable_dns)
    print(made["name"])
    return 0


def list_networks(filters: Iterable[str], form: str, quiet: bool) -> int:
    """Print the table of networks."""
    tests = [_test(text) for text in filters]
    rows = [_row(network) for network in Networks().ls() if all(test(network) for test in tests)]
    columns = {"NETWORK ID": "ID", "NAME": "Name", "DRIVER": "Driver", "SUBNET": "Subnet", "MEMBERS": "Members"}
    print_rows(rows, columns, form, "ID" if quiet else "")
    return 0


def _test(text: str) -> Callable[[dict[str, Any]], bool]:
    key, equals, value = text.partition("=")
    if key not in _KEYS or not equals:
        raise ConfigError(f"--filter {text!r:.60}", ", ".join(f"{key}=" for key in _KEYS))
    if key == "label":
        label, given, wanted = value.partition("=")
        return lambda network: label in network["labels"] and (not given or network["labels"][label] == wanted)
    if key == "driver":
        return lambda network: bool(network["driver"] == value)
    return lambda network: value in network[key]


def _row(network: dict[str, Any]) -> dict[str, Any]:
    row = {"ID": network["id"], "Name": network["name"], "Driver": network["driver"], "Subnet": network["subnet"],
           "Gateway": network["gateway"], "IPRange": network["ip_range"], "Internal": network["internal"],
           "DNSEnabled": network["dns"], "Labels": network["labels"], "NetworkInterface": network["bridge"],
           "Created": datetime.fromtimestamp(network["created"], UTC).isoformat()}
    members = network["members"]
    if isinstance(members, int):
        return {**row, "Members": members}
    return {**row, "Containers": {
        instance: {"Name": member["name"], "IPv4Address": f"{member['address']}/{network['subnet'].partition('/')[2]}",
                   "MacAddress": member["mac"], "Interface": member["interface"]}
        for instance, member in members.items()}}


def inspect(names: Iterable[str], form: str) -> int:
    """Print what networks are."""
    networks = Networks()
    return print_found(lambda name: _row(networks.inspect(name)), names, form)


def remove(names: Iterable[str], force: bool) -> int:
    """Remove networks; all that can be."""
    networks, code = Networks(), 0
    for name in names:
        try:
            if force and not any(name in (network["name"], network["id"]) for network in networks.ls()):
                continue
            networks.rm(name)
            print(name)
        except HvError as error:
            say_error(error)
            code = 1
    return code


def prune(force: bool) -> int:
    """Remove what has no members; asks on a terminal unless forced."""
    if not force and sys.stdin.isatty():
        sys.stderr.write("This removes every network without members, but the default one. Go on? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    for name in Networks().prune():
        print(name)
    return 0


def connect(name: str, instance: str, aliases: Iterable[str], ip: str) -> int:
    """Join a running container to one more network."""
    found = _running(instance)
    Networks().connect(name, found.id, aliases=list(aliases), ip=ip, netns=f"/proc/{found.program()}/ns/net")
    return 0


def disconnect(name: str, instance: str, force: bool) -> int:
    """Part it from a network."""
    Networks().disconnect(name, _running(instance).id, force=force)
    return 0


def _running(text: str) -> Any:
    from hv.instance.records import find

    found = find(text)
    if not found.running:
        raise NetworkError(f"{found.name} does not run", f"`pyhv start {found.name}` first; --network of `pyhv create` "
                           "says which networks it gets")
    return found
