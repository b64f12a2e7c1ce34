"""`pyhv snapshot` through click: hv/cli/full.py adds it to the others."""

from __future__ import annotations

__all__ = ["snapshot"]

from collections.abc import Callable
from typing import Any

import click

from hv.cli.full_options import with_options
from hv.cli.restore import RESTORE_OPTIONS


@click.group()
def snapshot() -> None:
    """Save running VMs, and go on with them as often as wanted (docs/snapshots.md).

    NAME is a snapshot's name in the store, or the path of its folder, with a slash in it.
    """


def _store(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--store", metavar="DIR", help="where snapshots are kept")(function)


@snapshot.command()
@click.argument("vm")
@click.argument("name")
@click.option("--diff", is_flag=True, help="only what changed since the snapshot before")
@click.option("--track", is_flag=True, help="note what changes from now on, for differences")
@click.option("--copy-disks", is_flag=True, help="copy writable disks into the snapshot, not only what overlays hold")
@click.option("--stop", is_flag=True, help="end the VM once it is saved")
@click.option("--compress", is_flag=True, help="pack the memory, as `pyhv snapshot pack` does")
@_store
def create(vm: str, name: str, store: str | None, **options: bool) -> int:
    """Save the running VM as NAME; it goes on afterwards. container:ID stands for a container (by CRIU)."""
    from hv.cli.snapshot import create as command

    return command(vm, name, store, options)


@snapshot.command()
@click.argument("what", metavar="NAME")
@with_options(RESTORE_OPTIONS)
def restore(what: str, **values: Any) -> int:
    """Go on with NAME on this terminal; the guest's exit code."""
    from hv.cli.restore import restore as command

    return command({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}, what)


@snapshot.command("ls")
@click.option("--json", "as_json", is_flag=True, help="print one JSON array")
@_store
def list_snapshots(as_json: bool, store: str | None) -> int:
    """List the snapshots in the store."""
    from hv.cli.snapshot import list_snapshots as command

    return command(store, as_json)


@snapshot.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@_store
def inspect(name: str, as_json: bool, store: str | None) -> int:
    """Say what a snapshot holds: machine, registers, host, disks."""
    from hv.cli.snapshot import inspect as command

    return command(name, store, as_json)


@snapshot.command()
@click.argument("first")
@click.argument("second")
@_store
def diff(first: str, second: str, store: str | None) -> int:
    """Say in what two snapshots differ."""
    from hv.cli.snapshot import diff as command

    return command(first, second, store)


@snapshot.command()
@click.argument("name")
@_store
def fsck(name: str, store: str | None) -> int:
    """Check a snapshot and those it rests on; exit code 1 where one is damaged."""
    from hv.cli.snapshot import fsck as command

    return command(name, store)


@snapshot.command()
@click.argument("name")
@click.argument("target")
@_store
def merge(name: str, target: str, store: str | None) -> int:
    """Make TARGET, which stands alone, of the difference NAME."""
    from hv.cli.snapshot import merge as command

    return command(name, target, store)


@snapshot.command()
@click.argument("names", nargs=-1, required=True)
@_store
def pack(names: tuple[str, ...], store: str | None) -> int:
    """Pack the memory of snapshots by zstd, in place (docs/lazy-memory.md)."""
    from hv.cli.snapshot import pack as command

    return command(names, store, False)


@snapshot.command()
@click.argument("names", nargs=-1, required=True)
@_store
def unpack(names: tuple[str, ...], store: str | None) -> int:
    """Undo `pack`: clones map a plain memory file as it is."""
    from hv.cli.snapshot import pack as command

    return command(names, store, True)


@snapshot.command("rm")
@click.argument("names", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="also one that others are differences from")
@_store
def remove(names: tuple[str, ...], force: bool, store: str | None) -> int:
    """Remove snapshots."""
    from hv.cli.snapshot import remove as command

    return command(names, store, force)
