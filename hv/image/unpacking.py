"""What Layers.ensure does when something is missing: unpack several layers at once, each by one process only.

A layer is unpacked in layers/tmp/HEX, whose folder is flock(2)ed, and renamed; a killed process leaves a folder that
nobody holds, and the next one removes it. Layers are shared by diff ID. But for one case: a layer may have files in
folders that it does not name (docker and buildah name all, others don't), and which then are as lower layers have
them, /tmp with its 1777 say. The layer's own folder would hide that. Such a layer is unpacked once more under its chain
ID (image-spec config.md, "Layer ChainID") with these folders' modes and owners; containerd does so for all layers,
docker and podman make such folders 0755.

Driven by tests/unit/test_image_layers.py.
"""

from __future__ import annotations

__all__ = ["Unpacking", "chain_ids", "discard", "sweep"]

import fcntl
import os
import stat
from errno import ENOTDIR

from hv.errors import ImageError
from hv.image.files import replace, said
from hv.image.inflate import Limits
from hv.image.layers import Layers, boot_id
from hv.image.pipe import wait_for
from hv.image.tree import clear_folder
from hv.image.unpack import Summary, unpack
from hv.linux.mount import open_in
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from hv.image.image import Image
    from hv.image.layers import Progress
    from hv.image.media import Descriptor

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_ONCE = 4
_EMPTY = "0" * 64               # an image of no layers has one empty folder


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain ID of each layer, which stands for it and all below it."""
    from hashlib import sha256

    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append("sha256:" + sha256(f"{chain[-1]} {diff_id}".encode()).hexdigest() if chain else diff_id)
    return chain


class Unpacking:
    """For one image."""

    def __init__(self, layers: Layers, progress: Progress | None) -> None:
        self.layers, self.root, self.store = layers, layers.root, layers.store
        self.progress, self.limits = progress, Limits()
        self._stop = False

    def image(self, image: Image) -> list[str]:
        """The names of the layers, the uppermost first; noted for Layers.ensure."""
        try:
            with self.store.lock(shared=True):
                for name in ("sha256", "tmp", "images"):
                    os.makedirs(f"{self.root}/{name}", mode=0o700, exist_ok=True)
                sweep(self.root)
                self._several([pair for number, pair in enumerate(image.layers)
                               if self.layers.info(pair[1][7:]) is None
                               and pair[1] not in [diff_id for _, diff_id in image.layers[:number]]])
                names = self._names(image.layers)
                text = "\n".join([boot_id(), *names])
                replace(f"{self.root}/images/{image.id[7:]}", text.encode(),
                        f"{self.store.root}/tmp/{os.urandom(12).hex()}", sync=False)
                return names
        except OSError as error:
            raise said(error, f"unpacking {image.name or image.id}") from None

    def _names(self, pairs: Sequence[tuple[Descriptor, str]]) -> list[str]:
        names: list[str] = []
        for (descriptor, diff_id), chain in zip(pairs, chain_ids([diff_id for _, diff_id in pairs]), strict=True):
            name = diff_id[7:]
            info = self.layers.info(name) or self._one(name, descriptor, diff_id)
            implied = [os.fsencode(path) for path in info.get("implied") or ()]
            if implied and names and self._differ(name, implied, names):
                name = chain[7:]
                if self.layers.info(name) is None:
                    self._one(name, descriptor, diff_id, names)
            names = [name] if info.get("opaque") else [name, *(other for other in names if other != name)]
        if not names:
            os.makedirs(self.layers.folder(_EMPTY), exist_ok=True)
        return names or [_EMPTY]

    # -- unpacking ---------------------------------------------------------------------------------------------

    def _several(self, pairs: list[tuple[Descriptor, str]]) -> None:
        if len(pairs) < 2:
            for descriptor, diff_id in pairs:
                self._one(diff_id[7:], descriptor, diff_id)
            return
        import threading
        from _queue import SimpleQueue

        over: SimpleQueue[None] = SimpleQueue()
        left = sorted(pairs, key=lambda pair: pair[0].size)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not errors and not self._stop:
                    try:
                        descriptor, diff_id = left.pop()
                    except IndexError:
                        break
                    self._one(diff_id[7:], descriptor, diff_id)
            except BaseException as error:
                errors.append(error)
            finally:
                over.put(None)

        count = min(len(pairs), len(os.sched_getaffinity(0)), _AT_ONCE)
        for number in range(count):
            threading.Thread(target=work, name=f"layer-{number}").start()
        wait_for(over, count, self._end)
        if errors:
            raise errors[0]

    def _end(self) -> None:
        self._stop = True

    def _one(self, name: str, descriptor: Descriptor, diff_id: str, lowers: Sequence[str] = ()) -> dict[str, Any]:
        """Unpack a layer as `name`, or wait for who does it; what is known of it then."""
        place = f"{self.root}/tmp/{name}"
        while True:
            fd = _locked(place)
            if fd < 0:
                continue
            try:
                info = self.layers.info(name)
                if info is None:
                    clear_folder(fd)
                    discard(self.root, name)
                    info = self._unpack(fd, place, descriptor, diff_id, lowers)
                    os.rename(place, f"{self.root}/sha256/{name}")
                return info
            finally:
                if _same(place, fd):        # not renamed: an error, or somebody else was faster
                    clear_folder(fd)
                    os.rmdir(place)
                os.close(fd)

    def _unpack(self, fd: int, place: str, descriptor: Descriptor, diff_id: str,
                lowers: Sequence[str]) -> dict[str, Any]:
        label = f"layer {diff_id[:19]}"

        def progress(done: int) -> None:
            if self._stop:
                raise ImageError(f"{label}: unpacking was ended")
            if self.progress:
                self.progress(diff_id, done, descriptor.size)

        try:
            blob = os.open(self.store.blob_path(descriptor.digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise ImageError(f"{label}: its blob {descriptor.digest} is missing", "pull the image again; `pyhv image "
                             "fsck` says what else is missing") from None
        try:
            os.mkdir("diff", 0o755, dir_fd=fd)
            files = os.open("diff", _FOLDER, dir_fd=fd)
            try:
                summary = unpack(blob, files, label, diff_id, self.limits, progress)
                for path in summary.implied if lowers else ():
                    self._imply(files, path, lowers)
            finally:
                os.close(files)
        finally:
            os.close(blob)
        info = _information(summary)
        with open(f"{place}/info", "wb") as file:
            file.write(dumps(info).encode())
        return info

    # -- folders that a layer does not name --------------------------------------------------------------------

    def _differ(self, name: str, implied: list[bytes], lowers: Sequence[str]) -> bool:
        fd = os.open(self.layers.folder(name), _FOLDER)
        try:
            for path in implied:
                below, own = self._below(path, lowers), _status(fd, path)
                if below and own and _looks(below) != _looks(own):
                    return True
            return False
        finally:
            os.close(fd)

    def _below(self, path: bytes, lowers: Sequence[str]) -> os.stat_result | None:
        """What the folder is in the uppermost of `lowers` that has it."""
        for lower in lowers:
            fd = os.open(self.layers.folder(lower), _FOLDER)
            try:
                status = _status(fd, path)
            finally:
                os.close(fd)
            if status is not None:
                return status if stat.S_ISDIR(status.st_mode) else None
        return None

    def _imply(self, files: int, path: bytes, lowers: Sequence[str]) -> None:
        below, own = self._below(path, lowers), _status(files, path)
        if below is None or own is None or not stat.S_ISDIR(own.st_mode):
            return
        fd = open_in(files, os.fsdecode(path or b"."), _FOLDER)
        try:
            if os.geteuid() == 0:
                os.fchown(fd, below.st_uid, below.st_gid)
            os.fchmod(fd, stat.S_IMODE(below.st_mode))
            os.utime(fd, ns=(own.st_mtime_ns, own.st_mtime_ns))
        finally:
            os.close(fd)


def _status(fd: int, path: bytes) -> os.stat_result | None:
    found = open_in(fd, os.fsdecode(path or b"."), os.O_PATH | os.O_NOFOLLOW, may=range(1, 4096))
    if found < 0:
        return os.stat("/dev/null") if found == -ENOTDIR else None      # no folder leads there: nothing to look like
    try:
        return os.fstat(found)
    finally:
        os.close(found)


def _looks(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mode, status.st_uid, status.st_gid


def _information(summary: Summary) -> dict[str, Any]:
    return {"boot": boot_id(), "size": summary.size, "entries": summary.entries, "skipped": summary.skipped,
            "opaque": summary.opaque, "implied": [os.fsdecode(path) for path in summary.implied]}


def _locked(place: str) -> int:
    """The folder, made if need be, locked; -1 where it was renamed or removed while we waited."""
    try:
        os.mkdir(place, 0o700)
    except FileExistsError:
        pass
    try:
        fd = os.open(place, _FOLDER)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if _same(place, fd):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def _same(place: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(place, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def discard(root: str, name: str) -> None:
    """Remove an unpacked layer at once, as others see it."""
    place = f"{root}/tmp/{name}.{os.urandom(6).hex()}"
    try:
        os.makedirs(f"{root}/tmp", mode=0o700, exist_ok=True)
        os.rename(f"{root}/sha256/{name}", place)
    except FileNotFoundError:
        return
    except OSError as error:
        raise said(error, f"removing layer {name}") from None
    _remove(place)


def sweep(root: str) -> None:
    """Remove what killed processes left in tmp/."""
    try:
        places = os.listdir(f"{root}/tmp")
    except FileNotFoundError:
        return
    for name in places:
        _remove(f"{root}/tmp/{name}")


def _remove(place: str) -> None:
    """Remove a folder in tmp/ that nobody holds."""
    try:
        fd = os.open(place, _FOLDER)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same(place, fd):
            clear_folder(fd)
            os.rmdir(place)
    except BlockingIOError:
        pass            # its unpacking goes on
    except FileNotFoundError:
        pass            # somebody else removes it, too
    except OSError as error:
        raise said(error, f"removing {place}") from None
    finally:
        os.close(fd)
