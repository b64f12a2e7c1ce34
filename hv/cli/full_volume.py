"""`pyhv volume` through click: hv/cli/full.py adds it to the others; hv/cli/volume.py does the work."""

from __future__ import annotations

__all__ = ["volume"]

import click


@click.group()
def volume() -> None:
    """Make, list and remove volumes: folders that outlive instances (docs/layers.md)."""


@volume.command()
@click.argument("name", metavar="[NAME]", required=False, default="")
@click.option("-d", "--driver", metavar="NAME", default="local", help="only local is there [default: local]")
@click.option("--label", "labels", metavar="KEY[=VALUE]", multiple=True, help="may be given several times")
@click.option("-o", "--opt", "options", metavar="KEY=VALUE", multiple=True, help="the local driver takes none here")
def create(name: str, driver: str, labels: tuple[str, ...], options: tuple[str, ...]) -> int:
    """Make a volume, unless it is there; print its name. Without NAME it gets a random one."""
    from hv.cli.volume import create as command

    return command(name, driver, labels, options)


@volume.command("ls")
@click.option("-f", "--filter", "filters", metavar="KEY=VALUE", multiple=True,
              help="name=PART, label=KEY[=VALUE], dangling=true|false or driver=NAME; may be given several times")
@click.option("--format", "form", metavar="FORM", default="", help='json, table, or a template such as "{{.Name}}"')
@click.option("-q", "--quiet", is_flag=True, help="print only names")
def list_volumes(filters: tuple[str, ...], form: str, quiet: bool) -> int:
    """List the volumes."""
    from hv.cli.volume import list_volumes as command

    return command(filters, form, quiet)


volume.add_command(click.Command("list", params=list_volumes.params, callback=list_volumes.callback,
                                 help=list_volumes.help, hidden=True))


@volume.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("-f", "--format", "form", metavar="FORM", default="", help='json, or a template: "{{.Mountpoint}}"')
def inspect(names: tuple[str, ...], form: str) -> int:
    """Say what volumes are: a JSON list, as docker and podman print it."""
    from hv.cli.volume import inspect as command

    return command(names, form)


@volume.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="no error if it is not there")
def remove(names: tuple[str, ...], force: bool) -> int:
    """Remove volumes that no instance uses, with what is in them."""
    from hv.cli.volume import remove as command

    return command(names, force)


@volume.command()
@click.option("-a", "--all", "everything", is_flag=True, help="named ones too, not only those without a name")
@click.option("-f", "--force", is_flag=True, help="don't ask")
@click.option("--filter", "filters", metavar="KEY=VALUE", multiple=True, help="label=KEY[=VALUE] or label!=KEY[=VALUE]")
def prune(everything: bool, force: bool, filters: tuple[str, ...]) -> int:
    """Remove every volume that no instance uses and that got no name of its own."""
    from hv.cli.volume import prune as command

    return command(everything, force, filters)
