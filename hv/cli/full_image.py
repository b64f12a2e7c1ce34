"""`pyhv image` through click: hv/cli/full.py adds it to the others, hv/cli/full_image_registry.py has pull and push."""

from __future__ import annotations

__all__ = ["image"]

from collections.abc import Callable
from typing import Any

import click

from hv.cli.full_image_registry import pull, push


@click.group()
def image() -> None:
    """Fetch, keep, list and remove OCI images (docs/images.md).

    IMAGE is a name ([REGISTRY/]REPOSITORY[:TAG][@DIGEST]), an image ID, or the beginning of one.
    """


image.add_command(pull)
image.add_command(push)


def _listing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of what prints a table."""
    for option in (click.option("--format", "form", metavar="FORM", default="",
                                help='json, table, or a template such as "{{.ID}} {{.Size}}"'),
                   click.option("--no-trunc", is_flag=True, help="print IDs and texts whole"),
                   click.option("-q", "--quiet", is_flag=True, help="print only IDs")):
        function = option(function)
    return function


@image.command("ls")
@click.argument("name", metavar="[REPOSITORY[:TAG]]", required=False, default="")
@click.option("-a", "--all", "everything", is_flag=True, help="nothing is hidden anyway; taken as docker takes it")
@click.option("--digests", is_flag=True, help="print manifests' digests too")
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE",
              help="dangling, label, reference, before, since or until; may be given several times")
@_listing
def list_images(name: str, **options: Any) -> int:
    """List the images in the store."""
    from hv.cli.image import list_images as command

    return command(name, **options)


image.add_command(click.Command("list", params=list_images.params, callback=list_images.callback,
                                help=list_images.help, hidden=True))


@image.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-f", "--format", "form", metavar="FORM", default="", help='json, or a template such as "{{.Id}}"')
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", default="", help="of an image for several platforms, this one")
def inspect(names: tuple[str, ...], form: str, platform: str) -> int:
    """Say what images are: a JSON list, as docker and podman print it."""
    from hv.cli.image import inspect as command

    return command(names, form, platform)


@image.command()
@click.argument("name", metavar="IMAGE")
@click.option("-H", "--human/--no-human", default=True, help="sizes and dates as people read them [default: yes]")
@_listing
def history(name: str, **options: Any) -> int:
    """List the steps that made an image, the last first."""
    from hv.cli.image import history as command

    return command(name, **options)


@image.command()
@click.argument("source", metavar="IMAGE")
@click.argument("targets", metavar="NAME...", nargs=-1, required=True)
def tag(source: str, targets: tuple[str, ...]) -> int:
    """Give IMAGE another NAME."""
    from hv.cli.image_keep import tag as command

    return command(source, targets)


@image.command("rm")
@click.argument("names", metavar="IMAGE...", nargs=-1)
@click.option("-f", "--force", is_flag=True, help="although instances use it (it stays until they are gone), or by ID "
                                                  "with all its names; no error if it is not there")
@click.option("-a", "--all", "everything", is_flag=True, help="every image")
@click.option("-i", "--ignore", is_flag=True, help="no error if it is not there")
def remove(names: tuple[str, ...], force: bool, everything: bool, ignore: bool) -> int:
    """Take names away; with its last name, or by ID, the image and what no other image needs."""
    from hv.cli.image_keep import remove as command

    return command(names, force, everything, ignore)


@image.command()
@click.option("-a", "--all", "everything", is_flag=True,
              help="every image that no instance uses, and interrupted pulls")
@click.option("-f", "--force", is_flag=True, help="don't ask")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE",
              help="until=WHEN, label=KEY[=VALUE] or label!=KEY[=VALUE]")
def prune(everything: bool, force: bool, filters: tuple[str, ...]) -> int:
    """Remove images without a name, and every blob and unpacked layer that nothing uses."""
    from hv.cli.image_keep import prune as command

    return command(everything, force, filters)


@image.command()
@click.option("--repair", is_flag=True, help="remove strays and damaged blobs, and name what must be pulled again")
@click.option("--format", "form", type=click.Choice(["json"]), help="print one JSON list")
@click.option("-q", "--quiet", is_flag=True, help="print nothing; the exit code says it")
def fsck(repair: bool, form: str | None, quiet: bool) -> int:
    """Read every blob and say what is missing, damaged or stray. Exit code 1 if an image is damaged."""
    from hv.cli.image_keep import fsck as command

    return command(repair, form or "", quiet)


@image.command()
@click.argument("path", metavar="[FILE]", required=False, default="")
@click.option("-i", "--input", "given", metavar="FILE", default="", help="archive or folder [default: standard input]")
@click.option("-q", "--quiet", is_flag=True, help="no progress, and only names or IDs")
def load(path: str, given: str, quiet: bool) -> int:
    """Take images from an archive: docker-archive, oci-archive, an OCI layout; plain, gzip or zstd."""
    from hv.cli.image_move import load as command

    return command(given or path, quiet)


@image.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", default="", help="[default: standard output, if it is no terminal]")
@click.option("--format", "form", type=click.Choice(["docker-archive", "oci-archive"]), default="docker-archive",
              show_default=True)
@click.option("-m", "--multi-image-archive", is_flag=True, hidden=True)     # podman's; several are always taken
@click.option("-q", "--quiet", is_flag=True, help="no progress")
def save(names: tuple[str, ...], output: str, form: str, multi_image_archive: bool, quiet: bool) -> int:
    """Write images to an archive that docker, podman and skopeo read."""
    from hv.cli.image_move import save as command

    return command(names, output, form, quiet)


@image.command("import")
@click.argument("path", metavar="FILE|-")
@click.argument("name", metavar="[NAME]", required=False, default="")
@click.option("-c", "--change", "changes", multiple=True, metavar="INSTRUCTION",
              help="CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR, as a Dockerfile has it")
@click.option("-m", "--message", default="", metavar="TEXT", help="a comment for the history")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", default="", help="[default: this host's]")
@click.option("-q", "--quiet", is_flag=True, help="no progress")
def import_(path: str, name: str, **options: Any) -> int:
    """Make an image of a root file system's tar archive; prints its ID."""
    from hv.cli.image_move import import_ as command

    return command(path, name, **options)


@image.command()
@click.argument("name", metavar="IMAGE")
@click.option("-o", "--output", metavar="FILE", default="", help="[default: standard output, if it is no terminal]")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", default="", help="of an image for several platforms, this one")
def export(name: str, output: str, platform: str) -> int:
    """Write an image's files as one tar archive."""
    from hv.cli.image_move import export as command

    return command(name, output, platform)
