"""`import`: an image of one layer, made of a root file system's tar archive.

The archive is kept as it comes (plain, gzip or zstd), read through once to see that it is one, and hashed as the diff
ID. `--change` takes the instructions of a Dockerfile that docker's import takes. Left out: URLs, and ONBUILD and
HEALTHCHECK, which no part of pyhv acts on. Driven by tests/unit/test_image_import.py.
"""

from __future__ import annotations

__all__ = ["import_image"]

import os
import time
from hashlib import sha256

from hv.errors import ConfigError, ImageError
from hv.image.archive import open_source
from hv.image.image import Image
from hv.image.inflate import Limits, inflate
from hv.image.media import CONFIG, LAYER, LAYER_GZIP, LAYER_ZSTD, MANIFEST, Descriptor, host_platform
from hv.image.reference import Reference
from hv.image.store import Store
from hv.image.tarstream import TarStream
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

_CHUNK = 1 << 20


def import_image(store: Store, path: str, name: str = "", changes: Iterable[str] = (), message: str = "",
                 platform: str = "", progress: Callable[[int], object] | None = None) -> Image:
    """Make an image of the archive `path` ("-": standard input)."""
    run: dict[str, Any] = {}
    for change in changes:
        _apply(run, change)
    system, architecture, *variant = [*(platform or host_platform()).split("/"), ""]
    if not system or not architecture:
        raise ConfigError(f"--platform {platform!r}: is not OS/ARCH[/VARIANT]")
    reference = Reference.parse(name) if name else None
    if reference and reference.digest:
        raise ConfigError(f"image name {name!r}: a new image's digest can't be chosen", "leave @sha256:... out")
    with store.lock(shared=True):
        fd = open_source(path)
        if fd < 0:
            raise ConfigError(f"{path}: is a folder", "`tar -C FOLDER -c . | pyhv image import - NAME`")
        try:
            temporary, digest, size = store.write(_read(fd, progress))
        finally:
            os.close(fd)
        try:
            kind, diff_id = _examined(temporary, "archive" if path == "-" else path)
            store.place(temporary, digest, size)
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        config = {"architecture": architecture, "os": system, "created": now, "config": run,
                  "rootfs": {"type": "layers", "diff_ids": [diff_id]},
                  "history": [{"created": now, "created_by": f"pyhv image import {os.path.basename(path)}",
                               "comment": message or "imported"}]}
        if variant and variant[0]:
            config["variant"] = variant[0]
        described = store.put_bytes(dumps(config).encode(), CONFIG)
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described.json(),
                    "layers": [Descriptor(kind, digest, size).json()]}
        item = store.put_bytes(dumps(manifest).encode(), MANIFEST)
        image = store.load(item, str(reference) if reference else "")
        store.tag(reference or "", item)
    return image


def _read(fd: int, progress: Callable[[int], object] | None) -> Iterator[bytes]:
    total = 0
    while piece := os.read(fd, _CHUNK):
        total += len(piece)
        if progress:
            progress(total)
        yield piece


def _examined(path: str, label: str) -> tuple[str, str]:
    """The media type and the diff ID of a tar archive, read to its end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(fd, 4, 0)
        hasher = sha256()

        def hashed() -> Iterator[bytes]:
            for piece in inflate(fd, label, Limits()):
                hasher.update(piece)
                yield piece

        stream = TarStream(hashed(), label)
        while stream.next() is not None:
            pass
        stream.drain()
    finally:
        os.close(fd)
    if not stream.count:
        raise ImageError(f"{label}: has no file in it")
    kind = LAYER_GZIP if head.startswith(b"\x1f\x8b") else LAYER_ZSTD if head == b"\x28\xb5\x2f\xfd" else LAYER
    return kind, "sha256:" + hasher.hexdigest()


def _apply(run: dict[str, Any], change: str) -> None:
    """One instruction, as `CMD ["sh"]` or `CMD=sh`."""
    ends = [place for place in (change.find(" "), change.find("=")) if place > 0]
    word, value = (change[:min(ends)].upper(), change[min(ends) + 1:].strip()) if ends else (change.upper(), "")
    if not value:
        raise _wrong(change, "it has no value")
    if word in ("CMD", "ENTRYPOINT"):
        run["Cmd" if word == "CMD" else "Entrypoint"] = _words(value, change)
    elif word in ("USER", "WORKDIR", "STOPSIGNAL"):
        run[{"USER": "User", "WORKDIR": "WorkingDir", "STOPSIGNAL": "StopSignal"}[word]] = value
    elif word == "EXPOSE":
        for port in value.split():
            number, _, protocol = port.partition("/")
            if not number.isdecimal() or not 0 < int(number[:9]) < 65536 or (protocol or "tcp") not in ("tcp", "udp"):
                raise _wrong(change, f"{port!r} is no PORT[/tcp|udp]")
            run.setdefault("ExposedPorts", {})[f"{int(number)}/{protocol or 'tcp'}"] = {}
    elif word == "VOLUME":
        for place in _words(value, change) if value.startswith("[") else value.split():
            run.setdefault("Volumes", {})[place] = {}
    elif word in ("ENV", "LABEL"):
        key, equals, text = value.partition("=" if "=" in value.split(" ")[0] else " ")
        if not key or not equals:
            raise _wrong(change, "it is not KEY=VALUE")
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        if word == "LABEL":
            run.setdefault("Labels", {})[key] = text
        else:
            others = [item for item in run.get("Env", []) if not item.startswith(key + "=")]
            run["Env"] = [*others, f"{key}={text}"]
    else:
        raise _wrong(change, f"{word[:30]!r} is none of CMD ENTRYPOINT ENV EXPOSE LABEL STOPSIGNAL USER VOLUME WORKDIR")


def _words(value: str, change: str) -> list[str]:
    """A JSON list of strings; else a command for the shell, as docker has it."""
    if not value.startswith("["):
        return ["/bin/sh", "-c", value]
    try:
        words = loads(value)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _wrong(change, "it is not a list of strings")
    return words


def _wrong(change: str, why: str) -> ConfigError:
    return ConfigError(f"--change {change[:100]!r}: {why}")
