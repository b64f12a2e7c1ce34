"""Where built and fetched kernels live: one folder each under the user's cache directory.

    $PYHV_CACHE, else $XDG_CACHE_HOME/pyhv, else ~/.cache/pyhv
        kernels/micro-6.1.170-1a2b3c4d/{vmlinux,bzImage,System.map,config}
        work/...                            builds in progress; a lock file each

A folder appears whole, by rename, or not at all.
"""

from __future__ import annotations

__all__ = ["Workplace", "find", "folder", "kernels"]

import fcntl
import os
import shutil
from pathlib import Path

from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


def folder() -> Path:
    """The cache directory, made if absent."""
    named = os.environ.get("PYHV_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyhv"
    try:
        (base / "kernels").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache {base}: {error.strerror}", "set PYHV_CACHE to a writable directory") from None
    return base


def kernels() -> list[Path]:
    """The folders of all finished kernels, by name."""
    return sorted(path for path in (folder() / "kernels").iterdir() if path.is_dir())


def find(flavour: str) -> Path | None:
    """The newest kernel of `flavour` (micro, smp, cloud), None where there is none."""
    found = [path for path in kernels() if path.name.startswith(f"{flavour}-")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


class Workplace:
    """A locked scratch folder for making the kernel called `name`; what a killed build left there goes first.

    `publish` renames a folder inside it to its final place. The scratch folder goes at the end in any case.
    """

    def __init__(self, name: str) -> None:
        self.target = folder() / "kernels" / name
        self.path = folder() / "work" / name
        self._lock = -1

    def __enter__(self) -> Workplace:
        self.path.parent.mkdir(exist_ok=True)
        self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)      # another build of the same kernel: wait, then find it done
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        return self

    def publish(self, made: Path) -> Path:
        """Move the finished folder `made` to its place."""
        if not self.target.exists():
            made.rename(self.target)
        return self.target

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
