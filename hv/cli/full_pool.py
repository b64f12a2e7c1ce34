"""`pyhv pool` through click: hv/cli/full.py adds it to the others."""

from __future__ import annotations

__all__ = ["pool"]

from collections.abc import Callable
from typing import Any

import click


@click.group()
def pool() -> None:
    """Keep VMs of a snapshot ready, and hand them out running (docs/pool.md)."""


def _socket(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--socket", metavar="PATH", help="the pool's socket, elsewhere than usual")(function)


@pool.command()
@click.argument("snapshot")
@click.option("--size", type=click.IntRange(1, 10_000), default=4, show_default=True, help="VMs to keep ready")
@click.option("--processes", is_flag=True, help="a process for each VM, not one for all")
@click.option("--name", metavar="NAME", help="VMs are called NAME.1, NAME.2, ... [default: the snapshot's name]")
@click.option("--store", metavar="DIR", help="where snapshots are kept")
@_socket
def serve(snapshot: str, **options: Any) -> int:
    """Keep VMs of SNAPSHOT ready until Ctrl-C, SIGTERM or `pyhv pool stop`; all of them end with it."""
    from hv.cli.pool import serve as command

    return command(snapshot, **options)


@pool.command()
@_socket
def take(socket: str | None) -> int:
    """Get a running VM; prints its name, by which `pyhv vm` knows it."""
    from hv.cli.pool import take as command

    return command(socket)


@pool.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@_socket
def status(socket: str | None, as_json: bool) -> int:
    """Say how many VMs are ready, and how many run."""
    from hv.cli.pool import status as command

    return command(socket, as_json)


@pool.command()
@_socket
def stop(socket: str | None) -> int:
    """End the pool and all its VMs."""
    from hv.cli.pool import stop as command

    return command(socket)
