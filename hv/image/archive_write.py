"""`save`: images of the store as an archive that docker, podman and skopeo read.

docker-archive has a manifest.json and each layer once, as it is kept (readers take compressed layers since docker 1.10
and in containers/image); oci-archive is an image layout. Every blob is hashed on its way out, so that damage in the
store doesn't travel. The same images give the same bytes. Source: moby image/spec/spec.md; image-spec image-layout.md.
Driven by tests/unit/test_image_archive.py.
"""

from __future__ import annotations

__all__ = ["FORMATS", "Output", "save"]

import errno
import os
from hashlib import sha256

from hv.errors import ConfigError, ImageError
from hv.image.files import said
from hv.image.image import Image
from hv.image.media import INDEX, MANIFEST, Descriptor
from hv.image.reference import Reference
from hv.image.store import LAYOUT, REF_NAME, Store
from hv.image.tarwrite import END, header, padding
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

FORMATS = ("docker-archive", "oci-archive")

_CHUNK = 1 << 20


class Output:
    """Where an archive goes: a file, in place once it is whole, or a descriptor ("-": standard output).

    Until then the file has no name (O_TMPFILE), so that a killed process leaves nothing; a file system that lacks this
    gets a hidden one.
    """

    def __init__(self, path: str) -> None:
        self._path = "" if path == "-" or (os.path.exists(path) and not os.path.isfile(path)) else path
        folder, name = os.path.split(path)
        self._temporary = f"{folder or '.'}/.{name}.{os.urandom(6).hex()}"
        self._nameless = False
        self.name, self.written = path, 0
        try:
            if not self._path:
                self.fd = os.dup(1) if path == "-" else os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                return
            try:
                self.fd = os.open(folder or ".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
                self._nameless = True
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):   # man 2 open, O_TMPFILE
                    raise
                self.fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    def write(self, data: bytes | memoryview) -> None:
        """All of `data`; ImageError where the disk is full."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.fd, view):]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ImageError(f"{self.name}: {os.strerror(error.errno or 0)}", "nothing was kept of it") from None
        self.written += len(data)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if self._path and kind is None:
                if self._nameless:          # given one directory descriptor, link is linkat(2) and follows the link
                    os.link(f"/proc/self/fd/{self.fd}", self._temporary, src_dir_fd=self.fd, follow_symlinks=True)
                    self._nameless = False
                os.rename(self._temporary, self._path)
            elif self._path and not self._nameless:
                os.unlink(self._temporary)
        except OSError as error:
            raise ImageError(f"{self.name}: {error.strerror}") from None
        finally:
            os.close(self.fd)


def save(store: Store, names: Iterable[str], output: Output, form: str = "docker-archive",
         progress: Callable[[int], object] | None = None) -> None:
    """Write the images called `names` (names or IDs) to `output`. `progress`: bytes written."""
    with store.lock(shared=True):
        images: dict[str, tuple[Image, list[str]]] = {}
        for text in names:
            image = store.resolve(text)
            its_names = images.setdefault(image.digest, (image, []))[1]
            if image.name and _is_name(text) and image.name not in its_names:
                its_names.append(image.name)
        write = _Archive(store, output, progress)
        if form == "docker-archive":
            _docker(write, list(images.values()))
        elif form == "oci-archive":
            _oci(write, list(images.values()))
        else:
            raise ConfigError(f"--format {form}: there are {' and '.join(FORMATS)}")
        output.write(END)


def _docker(write: _Archive, images: list[tuple[Image, list[str]]]) -> None:
    table = []
    for image, names in images:
        config = f"{image.id[7:]}.json"
        write.content(config, image.config.raw)
        layers = []
        for layer, _ in image.layers:
            suffix = ".gz" if "gzip" in layer.media_type else ".zst" if "zstd" in layer.media_type else ""
            layers.append(f"{layer.digest[7:]}.tar{suffix}")
            write.blob(layers[-1], layer)
        tags = [name for name in names if "@" not in name]
        table.append({"Config": config, "RepoTags": tags or None, "Layers": layers})
    write.content("manifest.json", dumps(table).encode())


def _oci(write: _Archive, images: list[tuple[Image, list[str]]]) -> None:
    write.content("oci-layout", LAYOUT.encode())
    manifests = []
    for image, names in images:
        for layer, _ in image.layers:
            write.blob(f"blobs/sha256/{layer.digest[7:]}", layer)
        write.content(f"blobs/sha256/{image.id[7:]}", image.config.raw)
        write.content(f"blobs/sha256/{image.digest[7:]}", image.manifest.raw)
        for name in names or [""]:
            item = Descriptor(image.manifest.media_type or MANIFEST, image.digest, len(image.manifest.raw),
                              {REF_NAME: name} if name else {})
            manifests.append(item.json())
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
    write.content("index.json", dumps(index).encode())


class _Archive:
    """A tar archive being written, with each name once."""

    def __init__(self, store: Store, output: Output, progress: Callable[[int], object] | None) -> None:
        self._store, self._output, self._progress = store, output, progress
        self._there: set[str] = set()

    def content(self, name: str, data: bytes) -> None:
        if name not in self._there:
            self._there.add(name)
            self._output.write(header(name.encode(), len(data)) + data + padding(len(data)))

    def blob(self, name: str, item: Descriptor) -> None:
        if name in self._there:
            return
        self._there.add(name)
        hasher, left = sha256(), item.size
        try:
            with open(self._store.blob_path(item.digest), "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != item.size:
                    raise ImageError(f"blob {item.digest}: is not {item.size} bytes long", "`pyhv image fsck`")
                self._output.write(header(name.encode(), item.size))
                while left and (piece := file.read(min(left, _CHUNK))):
                    hasher.update(piece)
                    self._output.write(piece)
                    left -= len(piece)
                    if self._progress:
                        self._progress(self._output.written)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise said(error, f"reading blob {item.digest}") from None
        if left or hasher.hexdigest() != item.digest[7:]:
            raise ImageError(f"blob {item.digest}: is not what its digest says", "`pyhv image fsck`")
        self._output.write(padding(item.size))


def _is_name(text: str) -> bool:
    """Whether a person gave a name, not an ID."""
    try:
        return bool(Reference.parse(text).name) and not text.startswith("sha256:")
    except ConfigError:
        return False
