"""The distribution's ready-made cloud kernel, through its package manager: downloaded and unpacked, not installed."""

from __future__ import annotations

__all__ = ["fetch"]

import shutil
import subprocess

from hv.errors import HvError
from hv.kernels.cache import Workplace, folder
from hv.kernels.packages import run_logged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

META_PACKAGE = "linux-image-cloud-amd64"


def fetch(say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder with vmlinuz, config, System.map and modules; fetched now unless it is in the cache."""
    for program in ("apt-cache", "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise HvError(f"no {program}: kernels can be fetched on Debian and its descendants only",
                          "name a kernel of your own: pyhv boot /boot/vmlinuz-...")
    package = _newest()
    version = package.removeprefix("linux-image-")
    name = f"cloud-{version}"
    target = folder() / "kernels" / name
    if target.is_dir():
        return target
    log = folder() / f"{name}.log"
    with Workplace(name) as place:
        if place.target.is_dir():
            return place.target
        say(f"downloading {package}")
        # The download runs in the scratch folder, where apt's own user may not write: apt then stays root, with a note.
        run_logged(["sh", "-c", 'cd "$1" && apt-get download -q "$2"', "sh", str(place.path), package], log, 900,
                   f"downloading {package}")
        archives = list(place.path.glob("*.deb"))
        if not archives:
            raise HvError(f"apt-get download {package} brought no file", f"see {log}")
        run_logged(["dpkg-deb", "-x", str(archives[0]), str(place.path / "tree")], log, 300, f"unpacking {package}")
        made = place.path / "made"
        made.mkdir()
        for inside, outside in ((f"boot/vmlinuz-{version}", "vmlinuz"), (f"boot/config-{version}", "config"),
                                (f"boot/System.map-{version}", "System.map"), ("lib/modules", "modules")):
            found = place.path / "tree" / inside
            if found.exists():
                shutil.move(str(found), str(made / outside))
        if not (made / "vmlinuz").is_file():
            raise HvError(f"{package} holds no boot/vmlinuz-{version}", f"see {log}")
        log.unlink(missing_ok=True)
        return place.publish(made)


def _newest() -> str:
    """The package that the meta package stands for today."""
    done = subprocess.run(["apt-cache", "depends", META_PACKAGE], capture_output=True, text=True, timeout=120,
                          check=False)
    for line in done.stdout.splitlines():
        word = line.split()[-1] if line.split() else ""
        if word.startswith("linux-image-") and word != META_PACKAGE:
            return word
    raise HvError(f"apt knows no package {META_PACKAGE}", "run apt-get update, or check the sources list")
