"""`pyhv image tag`, `rm`, `prune`, `fsck`. Driven by tests/unit/test_cli_image.py."""

from __future__ import annotations

__all__ = ["fsck", "prune", "remove", "tag"]

import sys

from hv.cli.say import say, say_error
from hv.cli.table import human, safe
from hv.errors import ConfigError, HvError, ImageMissing
from hv.image.filters import matcher
from hv.image.fsck import check
from hv.image.prune import Freed
from hv.image.prune import prune as prune_images
from hv.image.prune import remove as remove_image
from hv.image.reference import Reference
from hv.image.store import Store


def tag(source: str, targets: tuple[str, ...]) -> int:
    """Give an image more names."""
    store = Store()
    references = [Reference.parse(target) for target in targets]
    for reference in references:
        if reference.digest:
            raise ConfigError(f"image name {str(reference)!r}: a digest can't be given", "leave @sha256:... out")
    with store.lock(shared=True):
        image = store.resolve(source)
        wanted = image.index or image.digest
        item = next(item for _, item in store.entries() if item.digest == wanted)
        for reference in references:
            store.tag(reference, item)
    return 0


def remove(names: tuple[str, ...], force: bool, everything: bool, ignore: bool) -> int:
    """Take names and images away; goes on after one that can't be."""
    store, failed, later = Store(), 0, False
    if everything:
        names = tuple(dict.fromkeys(name or item.digest for name, item in store.entries()))
    elif not names:
        raise ConfigError("image rm: no image is named", "give names or IDs, or --all")
    for name in names:
        try:
            freed = remove_image(store, name, force)
        except ImageMissing as error:
            if not (force or ignore):
                failed = _failed(error)
            continue
        except HvError as error:
            failed = _failed(error)
            continue
        _print(freed)
        later = later or freed.later
    if later:
        say(_LATER)
    return failed


_LATER = "pyhv: a pull, load or run holds the store: the next rm or prune frees the blobs"


def _failed(error: HvError) -> int:
    say_error(error)
    return error.exit_code


def _print(freed: Freed) -> None:
    lines = [f"Untagged: {Reference.parse(name).familiar()}" for name in freed.untagged]
    lines += [f"Deleted: {digest}" for digest in freed.images]
    sys.stdout.write("".join(safe(line) + "\n" for line in lines))


def prune(everything: bool, force: bool, filters: tuple[str, ...]) -> int:
    """Remove what nothing uses; asks on a terminal unless forced."""
    store = Store()
    matches = matcher(filters, store, ("until", "label")) if filters else None
    if not force and sys.stdin.isatty():
        what = "every image that no instance uses" if everything else "every image without a name"
        sys.stderr.write(f"This removes {what}. Go on? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    freed = prune_images(store, everything, matches)
    _print(freed)
    layers = f" and {freed.layers} unpacked layer{'s' * (freed.layers != 1)}" if freed.layers else ""
    sys.stdout.write(f"Freed {human(freed.bytes)}: {len(freed.blobs)} blob{'s' * (len(freed.blobs) != 1)}{layers}\n")
    if freed.later:
        say(_LATER)
    return 0


def fsck(repair: bool, form: str, quiet: bool) -> int:
    """Check the store; 1 if an image is damaged, 0 if there were only strays, and they are removed."""
    from hv.cli.image_move import Progress

    store = Store()
    with Progress("reading blobs", 0, quiet or bool(form)) as shown:
        findings = check(store, repair, shown.of)
    damaged = sorted({image for finding in findings for image in finding.images})
    left = [finding for finding in findings if not finding.repaired]
    if form:
        from json import dumps

        sys.stdout.write(dumps([{"What": finding.what, "Problem": finding.problem, "Images": sorted(finding.images),
                                 "Stray": finding.stray, "Repaired": finding.repaired} for finding in findings],
                               indent=2) + "\n")
    elif not quiet:
        for finding in findings:
            done = " (removed)" if finding.repaired and finding.stray else " (repaired)" if finding.repaired else ""
            needed = f" (needed by {', '.join(sorted(finding.images))})" if finding.images else ""
            sys.stdout.write(safe(f"{finding.what}: {finding.problem}{needed}{done}") + "\n")
        for image in damaged:
            sys.stdout.write(safe(f"{image}: must be pulled or loaded again") + "\n")
        if not findings:
            sys.stdout.write("the store is whole\n")
        elif left and not repair:
            say("pyhv: `pyhv image fsck --repair` removes strays and damaged blobs")
    return 1 if left else 0
