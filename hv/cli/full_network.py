"""`pyhv network` through click: hv/cli/full.py adds it to the others; hv/cli/network.py does the work."""

from __future__ import annotations

__all__ = ["network"]

from typing import Any

import click


@click.group()
def network() -> None:
    """Make, list and remove networks; join instances to them (docs/network.md)."""


@network.command()
@click.argument("name")
@click.option("-d", "--driver", metavar="NAME", default="bridge", help="only bridge is there [default: bridge]")
@click.option("--subnet", metavar="ADDRESS/BITS", default="", help="its addresses [default: a /24 that is free]")
@click.option("--gateway", metavar="ADDRESS", default="", help="this host's in it [default: the first one]")
@click.option("--ip-range", metavar="ADDRESS/BITS", default="", help="give out only addresses of this part")
@click.option("--internal", is_flag=True, help="members reach each other, nobody else")
@click.option("--disable-dns", is_flag=True, help="no name server: names lead nowhere")
@click.option("--label", "labels", metavar="KEY[=VALUE]", multiple=True, help="may be given several times")
def create(**options: Any) -> int:
    """Make a network; print its name."""
    from hv.cli.network import create as command

    return command(**options)


@network.command("ls")
@click.option("-f", "--filter", "filters", metavar="KEY=VALUE", multiple=True,
              help="name=PART, id=PART, driver=NAME or label=KEY[=VALUE]; may be given several times")
@click.option("--format", "form", metavar="FORM", default="", help='json, table, or a template such as "{{.Name}}"')
@click.option("-q", "--quiet", is_flag=True, help="print only IDs")
def list_networks(filters: tuple[str, ...], form: str, quiet: bool) -> int:
    """List the networks."""
    from hv.cli.network import list_networks as command

    return command(filters, form, quiet)


network.add_command(click.Command("list", params=list_networks.params, callback=list_networks.callback,
                                  help=list_networks.help, hidden=True))


@network.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("-f", "--format", "form", metavar="FORM", default="", help='json, or a template: "{{.Subnet}}"')
def inspect(names: tuple[str, ...], form: str) -> int:
    """Say what networks are, and who is in them: a JSON list."""
    from hv.cli.network import inspect as command

    return command(names, form)


@network.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="no error if it is not there")
def remove(names: tuple[str, ...], force: bool) -> int:
    """Remove networks that have no members."""
    from hv.cli.network import remove as command

    return command(names, force)


@network.command()
@click.option("-f", "--force", is_flag=True, help="don't ask")
def prune(force: bool) -> int:
    """Remove every network without members, but the default one."""
    from hv.cli.network import prune as command

    return command(force)


@network.command()
@click.argument("name", metavar="NETWORK")
@click.argument("instance")
@click.option("--alias", "aliases", metavar="NAME", multiple=True, help="one more name for INSTANCE there")
@click.option("--ip", metavar="ADDRESS", default="", help="this address [default: a free one]")
def connect(name: str, instance: str, aliases: tuple[str, ...], ip: str) -> int:
    """Join a running container to one more network."""
    from hv.cli.network import connect as command

    return command(name, instance, aliases, ip)


@network.command()
@click.argument("name", metavar="NETWORK")
@click.argument("instance")
@click.option("-f", "--force", is_flag=True, help="no error if it is no member")
def disconnect(name: str, instance: str, force: bool) -> int:
    """Part a running container from a network."""
    from hv.cli.network import disconnect as command

    return command(name, instance, force)
