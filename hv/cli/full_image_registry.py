"""`pyhv image pull` and `push`, `pyhv login` and `logout`: click's side.

hv/cli/full.py and hv/cli/full_image.py add them to their groups.
"""

from __future__ import annotations

__all__ = ["login", "logout", "pull", "push"]

from collections.abc import Callable
from typing import Any

import click


def _reach(creds: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of everything that speaks to a registry, named as podman names them."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = [
            click.option("--tls-verify", type=bool, default=True, is_flag=False, flag_value=True, metavar="BOOL",
                         help="false: trust any certificate, and take http where there is no TLS"),
            click.option("--cert-dir", metavar="DIR", default="", help="*.crt, *.cert and *.key for the registry"),
            click.option("--authfile", metavar="FILE", default="", help="take logins of this file only")]
        if creds:
            options.append(click.option("--creds", metavar="USER[:PASSWORD]", default="", help="log in as USER"))
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", default="", help="another platform's image than this host's")
@click.option("-q", "--quiet", is_flag=True, help="print the image's ID only")
@_reach(creds=True)
def pull(names: tuple[str, ...], **options: Any) -> int:
    """Fetch images from a registry; prints their IDs. An interrupted pull goes on where it was."""
    from hv.cli.image_registry import pull as command

    return command(names, **options)


@click.command()
@click.argument("name", metavar="IMAGE")
@click.argument("destination", required=False, default="")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", default="", help="of an index, this platform's image only")
@click.option("-q", "--quiet", is_flag=True, help="print the digest only")
@_reach(creds=True)
def push(name: str, destination: str, **options: Any) -> int:
    """Send IMAGE to the registry in its name, or to DESTINATION; prints the manifest's digest."""
    from hv.cli.image_registry import push as command

    return command(name, destination, **options)


@click.command()
@click.argument("registry", default="docker.io")
@click.option("-u", "--username", "user", metavar="USER", default="", help="[default: asked for]")
@click.option("-p", "--password", metavar="PASSWORD", default="", help="others may see it in the list of processes")
@click.option("--password-stdin", "from_stdin", is_flag=True, help="read the password from standard input")
@_reach(creds=False)
def login(registry: str, **options: Any) -> int:
    """Try a login at REGISTRY, and keep it where docker and podman find it too."""
    from hv.cli.image_registry import login as command

    return command(registry, **options)


@click.command()
@click.argument("registry", default="docker.io")
@click.option("--authfile", metavar="FILE", default="", help="logins of this file only")
def logout(registry: str, authfile: str) -> int:
    """Forget the login for REGISTRY."""
    from hv.cli.image_registry import logout as command

    return command(registry, authfile)
