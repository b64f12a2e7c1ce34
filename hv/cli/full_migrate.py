"""`pyhv migrate` through click: hv/cli/full.py adds it to the others."""

from __future__ import annotations

__all__ = ["migrate"]

from collections.abc import Callable
from typing import Any

import click

from hv.cli.full_options import with_options
from hv.cli.restore import RESTORE_OPTIONS, SHARED


@click.group()
def migrate() -> None:
    """Move a running VM from one pyhv to another (docs/migration.md).

    ADDRESS is unix:PATH, tcp:HOST:PORT, or tls:HOST:PORT with --cert, --key and --ca.
    """


def _tls(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, text in (("--ca", "the authority that signed the other side's certificate"), ("--key", "our key"),
                       ("--cert", "our certificate")):
        function = click.option(name, metavar="FILE", help=text)(function)
    return function


@migrate.command()
@click.argument("vm")
@click.argument("address")
@click.option("--downtime", type=float, default=100.0, show_default=True, metavar="MS",
              help="how long the guest may stand still")
@click.option("--copy-disks", is_flag=True, help="send writable disks too: the other side can't reach them")
@click.option("--postcopy", is_flag=True, help="go on there at once; the pages follow (docs/lazy-memory.md)")
@click.option("--quiet", is_flag=True, help="no progress")
@_tls
def send(vm: str, address: str, downtime: float, copy_disks: bool, postcopy: bool, quiet: bool,
         **tls: str | None) -> int:
    """Move VM to the pyhv that receives at ADDRESS. Ctrl-C aborts: the VM stays here."""
    from hv.cli.migrate import send as command

    return command(vm, address, downtime, copy_disks, postcopy, (tls["cert"], tls["key"], tls["ca"]), quiet)


@migrate.command()
@click.argument("address")
@click.option("--wait", type=float, metavar="SECONDS", help="how long to wait for one")
@_tls
@with_options(tuple(option for option in RESTORE_OPTIONS if option.name in SHARED))
def receive(address: str, wait: float | None, cert: str | None, key: str | None, ca: str | None, **values: Any) -> int:
    """Wait at ADDRESS for a VM, and run it on this terminal; the guest's exit code."""
    from hv.cli.migrate import receive as command

    return command(address, (cert, key, ca), wait, values)
