"""`pyhv image load`, `save`, `import`, `export`. Driven by tests/unit/test_cli_image.py."""

from __future__ import annotations

__all__ = ["Progress", "export", "import_", "load", "save"]

import os
import sys
from typing import Any

from hv.errors import ConfigError
from hv.image.reference import Reference
from hv.image.store import Store


class Progress:
    """A bar on the terminal, if standard error is one and nobody wants quiet. `total` 0: not known."""

    def __init__(self, what: str, total: int, quiet: bool) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._last = 0
        if quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(),
                        TransferSpeedColumn(), console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(what, total=total or None)

    def __call__(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def of(self, done: int, total: int) -> None:
        """`done` bytes of a total that is known only now."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


def load(path: str, quiet: bool) -> int:
    """Images from an archive."""
    from hv.image.archive import load as load_archive

    if not path or path == "-":
        path = "-"
        if sys.stdin.isatty():
            raise ConfigError("image load: standard input is a terminal", "`pyhv image load FILE`, or < FILE")
    total = os.path.getsize(path) if os.path.isfile(path) else 0
    with Progress("loading", total, quiet) as shown:
        loaded = load_archive(Store(), path, shown)
    for item in loaded:
        if quiet:
            sys.stdout.write("".join(f"{name}\n" for name in [_familiar(name) for name in item.names] or [item.id]))
        else:
            sys.stdout.write("".join(f"Loaded image: {_familiar(name)}\n" for name in item.names)
                             or f"Loaded image ID: {item.id or item.digest}\n")
    return 0


def _familiar(name: str) -> str:
    return Reference.parse(name).familiar()


def save(names: tuple[str, ...], path: str, form: str, quiet: bool) -> int:
    """Images to an archive."""
    from hv.image.archive_write import Output
    from hv.image.archive_write import save as save_images

    with Output(_writable(path, "save")) as output, Progress("saving", 0, quiet) as shown:
        save_images(Store(), names, output, form, shown)
    return 0


def _writable(path: str, verb: str) -> str:
    if path and path != "-":
        return path
    if sys.stdout.isatty():
        raise ConfigError(f"image {verb}: standard output is a terminal", "give --output FILE")
    return "-"


def import_(path: str, name: str, changes: tuple[str, ...] = (), message: str = "", platform: str = "",
            quiet: bool = False) -> int:
    """An image from a root file system."""
    from hv.image.archive_import import import_image

    if path == "-" and sys.stdin.isatty():
        raise ConfigError("image import: standard input is a terminal", "`pyhv image import FILE`, or < FILE")
    total = os.path.getsize(path) if os.path.isfile(path) else 0
    with Progress("importing", total, quiet) as shown:
        image = import_image(Store(), path, name, changes, message, platform, shown)
    sys.stdout.write(image.id + "\n")
    return 0


def export(name: str, path: str, platform: str) -> int:
    """An image's files."""
    from hv.image.archive_export import export as export_image
    from hv.image.archive_write import Output

    store = Store()
    with store.lock(shared=True):
        image = store.resolve(name, platform)
        with Output(_writable(path, "export")) as output:
            export_image(store, image, output)
    return 0
