"""Taking images away, and freeing what no image uses: `rm`, `prune`.

A name goes first, then, with the store's lock held alone, every blob and unpacked layer that neither a listed image nor
an instance's image needs. What is killed in between leaves blobs that nothing names; the next sweep has them. While a
pull or load holds the lock, nothing is swept: `Freed.later` says so, and the next sweep has them too.

Driven by tests/unit/test_image_prune.py.
"""

from __future__ import annotations

__all__ = ["Freed", "needed", "prune", "remove", "sweep"]

import os
import shutil
import time

from hv.errors import HvError, StateError
from hv.image.files import said
from hv.image.image import Image
from hv.image.layers import Layers
from hv.image.media import ImageConfig, Index, parse_manifest
from hv.image.reference import Reference, is_hex
from hv.image.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_WAIT = 1.0                         # for those who add just now
_PARTIAL_AGE = 7 * 86400            # an interrupted pull that nobody resumed


class Freed:
    """What a removal did. `later`: a pull or load was under way, so blobs stay until the next sweep."""

    def __init__(self) -> None:
        self.untagged: list[str] = []
        self.images: list[str] = []         # digests of manifests that are no longer listed
        self.blobs: list[str] = []
        self.layers = 0
        self.bytes = 0
        self.later = False


def remove(store: Store, text: str, force: bool = False) -> Freed:
    """`rm`: take the name away; with its last name, or by ID, the image. StateError where it is used or shared."""
    freed = Freed()
    entries = store.entries()
    name = _listed_name(store, text)
    if name:
        digests = {item.digest for other, item in entries if other == name}
        others = [other for other, item in entries if item.digest in digests and other != name]
    else:
        digests = _called(store, text)
        others = [other for other, item in entries if item.digest in digests and other]
        if len(others) > 1 and not force:
            raise StateError(f"image {text}: has the names {', '.join(others)}",
                             "remove it by name, or by ID with --force")
    last = not name or not others
    users = _users(store, digests) if last else []
    if users and not force:
        raise StateError(f"image {text}: is used by {', '.join(users[:5])}{' and others' * (len(users) > 5)}",
                         "remove these first, or only the name with --force")
    if name:
        store.untag(name, keep=bool(users))
        freed.untagged.append(name)
    elif users:
        for other in others:
            store.untag(other, keep=True)
        freed.untagged += others
    else:
        for digest in digests:
            freed.untagged += [other for other in store.forget(digest) if other]
    if last and not users:
        freed.images += sorted(digests)
    return sweep(store, freed) if last else freed


def prune(store: Store, everything: bool = False, chosen: Callable[[str, Image], bool] | None = None) -> Freed:
    """Remove images without a name, or `everything` that no instance uses; of these, those that `chosen` says."""
    freed, ids, used = Freed(), _ids(store), store.users()
    for name, item in store.entries():
        if (name and not everything) or ids.get(item.digest) in used:
            continue
        if chosen:
            try:
                if not chosen(name, store.load(item, name, listed=True)):
                    continue
            except HvError:
                continue            # what can't be read matches no filter
        if name:
            store.untag(name)
            freed.untagged.append(name)
        else:
            store.forget(item.digest)
    left = {item.digest for _, item in store.entries()}
    freed.images = [digest for digest in ids if digest not in left]
    return sweep(store, freed, partials=everything)


def sweep(store: Store, freed: Freed | None = None, partials: bool = False, wait: float = _WAIT) -> Freed:
    """Remove blobs, unpacked layers and temporary files that nothing needs; `partials`: interrupted pulls too."""
    freed = freed or Freed()
    if not os.path.isdir(f"{store.root}/blobs/sha256"):
        return freed
    try:
        with store.lock(shared=False, wait=wait):
            _sweep(store, freed, partials)
    except StateError:
        freed.later = True
    return freed


def _sweep(store: Store, freed: Freed, partials: bool) -> None:
    blobs, images, all_read = needed(store)
    try:
        with os.scandir(f"{store.root}/blobs/sha256") as found:
            for entry in found:
                if is_hex(entry.name) and len(entry.name) == 64 and "sha256:" + entry.name not in blobs:
                    freed.bytes += entry.stat(follow_symlinks=False).st_size
                    os.unlink(entry.path)
                    freed.blobs.append("sha256:" + entry.name)
        freed.bytes += _empty(f"{store.root}/tmp", 0)
        freed.bytes += _empty(f"{store.root}/partial", 0 if partials else _PARTIAL_AGE)
    except OSError as error:
        raise said(error, "freeing blobs") from None
    if all_read:            # else an instance may need a layer that can't be named
        layers = Layers(store)
        unused = layers.unused(images)
        freed.bytes += layers.remove(unused)
        freed.layers += len(unused)


def needed(store: Store) -> tuple[set[str], list[Image], bool]:
    """The blobs that listed and used images need, these images, and whether every used image could be read."""
    blobs: set[str] = set()
    images: dict[str, Image] = {}
    held = {digest for users in store.users().values() for digest in users.values()}
    all_read = "" not in held
    for digest in [item.digest for _, item in store.entries()] + sorted(held - {""}):
        try:
            _mark(store, digest, blobs, images, depth=0)
        except HvError:
            all_read = all_read and digest not in held
    return blobs, list(images.values()), all_read


def _mark(store: Store, digest: str, blobs: set[str], images: dict[str, Image], depth: int) -> None:
    if digest in images or depth > 1:
        return
    blobs.add(digest)
    manifest = parse_manifest(store.read(digest), f"manifest {digest}")
    if isinstance(manifest, Index):
        for item in manifest.manifests:
            if store.has(item.digest):      # of the other platforms there is nothing
                _mark(store, item.digest, blobs, images, depth + 1)
        return
    blobs.add(manifest.config.digest)
    blobs.update(layer.digest for layer in manifest.layers)
    images[digest] = Image("", digest, manifest, ImageConfig.parse(store.read(manifest.config.digest)))


def _listed_name(store: Store, text: str) -> str:
    """The entry that `text` names, or "": found without its blobs, which may be damaged."""
    names = store.names()
    try:
        wanted = Reference.parse(text)
    except HvError:
        return ""
    for name in (str(wanted), f"localhost/{wanted.familiar()}"):
        if name in names:
            return name
    return ""


def _called(store: Store, text: str) -> set[str]:
    """The entries that an ID, or the beginning of one, stands for. Damaged ones go by their manifest's digest."""
    wanted, ids = "sha256:" + text.removeprefix("sha256:"), _ids(store)
    found = {image_id or digest for digest, image_id in ids.items()
             if image_id.startswith(wanted) or digest.startswith(wanted)} if is_hex(wanted[7:]) else set()
    if len(found) != 1:
        return {store.resolve(text).digest}         # which says why not
    return {digest for digest, image_id in ids.items() if found == {image_id or digest}}


def _ids(store: Store) -> dict[str, str]:
    """Digest of each entry's manifest or index to the image ID; "" where it can't be read."""
    found = {}
    for name, item in store.entries():
        try:
            found[item.digest] = store.load(item, name, listed=True).id
        except HvError:
            found[item.digest] = ""
    return found


def _users(store: Store, digests: set[str]) -> list[str]:
    used, ids = store.users(), _ids(store)
    return sorted({user for digest in digests for user in used.get(ids.get(digest, ""), {})})


def _empty(folder: str, older: float) -> int:
    """Remove what is in the folder and has not been touched for `older` seconds; the bytes freed."""
    total, now = 0, time.time()
    with os.scandir(folder) as found:
        for entry in found:
            status = entry.stat(follow_symlinks=False)
            if now - status.st_mtime < older:
                continue
            total += status.st_size
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    return total

