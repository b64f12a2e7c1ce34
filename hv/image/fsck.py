"""Is the store whole? Every blob that an image needs is there, has its size and its digest; nothing else is there.

Blobs are read with the lock held shared, so that pulls and runs go on meanwhile; strays are looked for, and repairs
made, with the lock held alone. Repairing removes damaged blobs (a pull skips what is there) and strays; what must be
pulled again is named. An index.json that can't be read is put aside as index.json.bad, and a new one lists every
manifest found, without names. Driven by tests/unit/test_image_fsck.py.
"""

from __future__ import annotations

__all__ = ["Finding", "check"]

import os
import shutil
from hashlib import file_digest

from hv.errors import HvError, ImageError
from hv.image.files import replace, said
from hv.image.layers import Layers
from hv.image.media import MANIFEST_LIMIT, Descriptor, ImageConfig, Index, parse_manifest
from hv.image.prune import needed
from hv.image.reference import is_hex
from hv.image.store import LAYOUT, Store
from hv.plainjson import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_WAIT = 5.0
_OURS = {"blobs", "partial", "tmp", "users", "layers", "oci-layout", "index.json", "index.json.bad",
         "index.json.new", "lock", "index.lock"}


class Finding:
    """One thing that is wrong: `what` (a path in the store, or a blob), `problem`, and the `images` that suffer."""

    __slots__ = ("images", "problem", "repaired", "stray", "what")

    def __init__(self, what: str, problem: str, images: set[str] | None = None, stray: bool = False) -> None:
        self.what, self.problem, self.images, self.stray = what, problem, images or set(), stray
        self.repaired = False


def check(store: Store, repair: bool = False, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Everything that is wrong with the store; with `repair`, what could be repaired is. `progress`: bytes, of all."""
    if not os.path.isdir(store.root):
        return []
    findings: list[Finding] = []
    with store.lock(shared=True):
        _layout(store, findings, repair)
        wanted, images = _wanted(store, findings)
        _blobs(store, wanted, images, findings, progress)
    with store.lock(shared=False, wait=_WAIT):
        _strays(store, findings)
        if repair:
            _repair(store, findings)
    return findings


def _layout(store: Store, findings: list[Finding], repair: bool) -> None:
    path = f"{store.root}/oci-layout"
    try:
        with open(path, "rb") as file:
            good = loads(str(file.read(4096), "utf-8")) == loads(LAYOUT)
    except (OSError, ValueError):
        good = False
    if not good:
        findings.append(Finding("oci-layout", "is damaged"))
        if repair:
            replace(path, LAYOUT.encode(), f"{store.root}/tmp/oci-layout")
            findings[-1].repaired = True
    try:
        store.index()
    except ImageError as error:
        findings.append(Finding("index.json", str(error).removeprefix(f"{store.root}/index.json: ")))
        if repair:
            os.rename(f"{store.root}/index.json", f"{store.root}/index.json.bad")
            for item in _manifests(store):
                store.tag("", item)
            findings[-1].repaired = True


def _manifests(store: Store) -> list[Descriptor]:
    """Every blob that is an image's manifest, or an index of such that are here."""
    found, inside = {}, set()
    for name in os.listdir(f"{store.root}/blobs/sha256"):
        path = f"{store.root}/blobs/sha256/{name}"
        if not is_hex(name) or len(name) != 64 or os.lstat(path).st_size > MANIFEST_LIMIT:
            continue
        try:
            raw = store.read("sha256:" + name)
            manifest = parse_manifest(raw)
        except HvError:
            continue
        found["sha256:" + name] = Descriptor(manifest.media_type, "sha256:" + name, len(raw))
        if isinstance(manifest, Index):
            inside |= {item.digest for item in manifest.manifests}
    return [item for digest, item in found.items() if digest not in inside]


def _wanted(store: Store, findings: list[Finding]) -> tuple[dict[str, int], dict[str, set[str]]]:
    """The size of every blob that the listed images need, and which images those are."""
    wanted: dict[str, int] = {}
    images: dict[str, set[str]] = {}

    def want(item: Descriptor, label: str) -> None:
        if wanted.setdefault(item.digest, item.size) != item.size:
            findings.append(Finding(f"image {label}", f"says {item.size} bytes for blob {item.digest}, another image "
                                    f"{wanted[item.digest]}", {label}))
        images.setdefault(item.digest, set()).add(label)

    def walk(item: Descriptor, label: str, depth: int) -> None:
        want(item, label)
        if not store.has(item.digest):
            return                              # _blobs says so
        try:
            manifest = parse_manifest(store.read(item.digest))
            if isinstance(manifest, Index):
                for part in manifest.manifests:
                    if depth < 1 and store.has(part.digest):
                        walk(part, label, depth + 1)
                return
            want(manifest.config, label)
            for layer in manifest.layers:
                want(layer, label)
            if store.has(manifest.config.digest):
                ImageConfig.parse(store.read(manifest.config.digest))
        except HvError as error:
            findings.append(Finding(f"blob {item.digest}", str(error), {label}))

    try:
        for name, item in store.entries():
            walk(item, name or item.digest, 0)
    except ImageError:
        pass                                    # index.json: _layout has said so
    return wanted, images


def _blobs(store: Store, wanted: dict[str, int], images: dict[str, set[str]], findings: list[Finding],
           progress: Callable[[int, int], None] | None) -> None:
    done, total = 0, sum(wanted.values())
    for digest, size in wanted.items():
        problem = ""
        try:
            fd = os.open(store.blob_path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                found = os.fstat(fd).st_size
                if found != size:
                    problem = f"has {found} bytes, and should have {size}"
                elif file_digest(file, "sha256").hexdigest() != digest[7:]:
                    problem = "is not what its digest says"
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"can't be read: {error.strerror}"
        if problem:
            findings.append(Finding(f"blob {digest}", problem, images[digest]))
        done += size
        if progress:
            progress(done, total)


def _strays(store: Store, findings: list[Finding]) -> None:
    try:
        blobs, used, all_read = needed(store)
    except ImageError:
        return                                  # index.json: what it needs can't be known

    def stray(path: str, problem: str) -> None:
        findings.append(Finding(path, problem, stray=True))

    try:
        for name in sorted(set(os.listdir(store.root)) - _OURS):
            stray(name, "is not the store's")
        for name in sorted(set(os.listdir(f"{store.root}/blobs")) - {"sha256"}):
            stray(f"blobs/{name}", "is not the store's")
        for name in sorted(set(os.listdir(f"{store.root}/layers")) - {"sha256", "images", "tmp"}):
            stray(f"layers/{name}", "is not the store's")
        for name in sorted(os.listdir(f"{store.root}/blobs/sha256")):
            if not is_hex(name) or len(name) != 64:
                stray(f"blobs/sha256/{name}", "is no blob")
            elif "sha256:" + name not in blobs:
                stray(f"blobs/sha256/{name}", "no image needs it")
        for name in sorted(os.listdir(f"{store.root}/tmp")):
            stray(f"tmp/{name}", "was being written by a command that is gone")
        for name in sorted(os.listdir(f"{store.root}/partial")):
            if not is_hex(name) or len(name) != 64:
                stray(f"partial/{name}", "is no download")
        if all_read:
            for name in Layers(store).unused(used):
                stray(f"layers/sha256/{name}", "no image has this layer")
    except OSError as error:
        raise said(error, "looking for strays") from None


def _repair(store: Store, findings: list[Finding]) -> None:
    layers = []
    try:
        for finding in findings:
            path = f"{store.root}/{finding.what}"
            if finding.what.startswith("blob "):
                path = store.blob_path(finding.what[5:])
                if os.path.lexists(path):
                    os.unlink(path)
            elif not finding.stray:
                continue
            elif finding.what.startswith("layers/sha256/"):
                layers.append(finding.what.rpartition("/")[2])
                finding.repaired = True
            else:
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
                finding.repaired = True
    except OSError as error:
        raise said(error, "repairing") from None
    Layers(store).remove(layers)
