"""Building a small Linux kernel from the distribution's source package, or any source tree.

`make tinyconfig`, then guests/linux/common.config and the flavour's file on top; every option asked for must come
out as asked. Driven by tests/linux/test_linux.py.
"""

from __future__ import annotations

__all__ = ["FLAVOURS", "build"]

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from hv.errors import ConfigError, HvError
from hv.kernels.cache import Workplace, folder
from hv.kernels.packages import install, run_logged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FLAVOURS = ("micro", "smp", "image")
SOURCE_PACKAGE = "linux-source"
BUILD_PACKAGES = ("gcc", "make", "flex", "bison", "libelf-dev", "libssl-dev", "bc", "xz-utils", "lz4", "cpio", "kmod")
CONFIGS = Path(__file__).resolve().parents[1] / "data" / "linux"
SOURCE_CONFIGS = Path(__file__).resolve().parents[2] / "guests" / "linux"
BUILD_TIMEOUT = 3600            # s
FILES = {"vmlinux": "vmlinux", "arch/x86/boot/bzImage": "bzImage", "System.map": "System.map", ".config": "config"}


def build(flavour: str, source: str | None = None, jobs: int | None = None,
          say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder with vmlinux, bzImage, System.map and config; made now unless it is in the cache.

    `source` is a tree or tarball; None means the distribution's source package, installed if need be.
    HvError names the log of a build that failed.
    """
    fragments = [_fragment(name) for name in ("common", flavour)]
    archive = Path(source) if source is not None else _source_package(say)
    if not archive.exists():
        raise ConfigError(f"--source {archive}: no such file or directory", "name a kernel source tree or tarball")
    wanted = "".join(path.read_text() for path in fragments)
    name = f"{flavour}-{_label(archive)}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    target = folder() / "kernels" / name
    if target.is_dir():
        return target
    if source is None or os.geteuid() == 0:
        install(BUILD_PACKAGES, say)
    log = folder() / f"{name}.log"
    with Workplace(name) as place:
        if place.target.is_dir():
            return place.target
        tree = _unpack(archive, place.path, log, say)
        out = place.path / "out"
        out.mkdir()
        make = ["make", "-s", "-C", str(tree), f"O={out}", "KBUILD_BUILD_USER=pyhv", "KBUILD_BUILD_HOST=pyhv"]
        run_logged([*make, "tinyconfig"], log, 600, "configuring the kernel")
        _merge(out / ".config", wanted)
        run_logged([*make, "olddefconfig"], log, 600, "configuring the kernel")
        _check(out / ".config", wanted)
        say(f"building {name}; this takes minutes")
        run_logged([*make, f"-j{jobs or os.cpu_count() or 1}", "vmlinux", "bzImage"], log, BUILD_TIMEOUT,
                   "building the kernel")
        made = place.path / "made"
        made.mkdir()
        for inside, name_ in FILES.items():
            shutil.copy2(out / inside, made / name_)
        subprocess.run(["strip", "--strip-debug", str(made / "vmlinux")], check=False, timeout=60)
        log.unlink(missing_ok=True)
        return place.publish(made)


def _fragment(name: str) -> Path:
    for base in (SOURCE_CONFIGS, CONFIGS):
        path = base / f"{name}.config"
        if path.is_file():
            return path
    raise ConfigError(f"no configuration {name}.config", f"flavours are {', '.join(FLAVOURS)}")


def _source_package(say: Callable[[str], None]) -> Path:
    def newest() -> Path | None:
        return max(Path("/usr/src").glob("linux-source-*.tar.*"), default=None)

    found = newest()
    if found is None:
        install((SOURCE_PACKAGE,), say)
        found = newest()
    if found is None:
        raise ConfigError("the package linux-source brought no /usr/src/linux-source-*.tar.*",
                          "name a kernel source with --source")
    return found


def _label(archive: Path) -> str:
    """The version for a name: `6.1` of linux-source-6.1.tar.xz, or what the tree's Makefile says."""
    makefile = archive / "Makefile"
    if makefile.is_file():
        fields = dict(line.split(" = ", 1) for line in makefile.read_text(errors="replace").splitlines()[:10]
                      if " = " in line)
        return ".".join(fields.get(part, "0").strip() for part in ("VERSION", "PATCHLEVEL", "SUBLEVEL"))
    return archive.name.partition(".tar")[0].removeprefix("linux-source-").removeprefix("linux-")


def _unpack(archive: Path, place: Path, log: Path, say: Callable[[str], None]) -> Path:
    if archive.is_dir():
        if not (archive / "Kconfig").is_file():
            raise ConfigError(f"--source {archive}: not a kernel source tree", "it has no Kconfig file")
        return archive.resolve()
    say(f"unpacking {archive.name}")
    run_logged(["tar", "-xf", str(archive), "-C", str(place)], log, 600, f"unpacking {archive}")
    for found in place.glob("*/Kconfig"):
        return found.parent
    raise ConfigError(f"--source {archive}: no kernel source tree inside", "name a linux-*.tar.xz")


def _options(text: str) -> dict[str, str]:
    """CONFIG_X -> its value, "n" for "is not set"; later lines win."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("CONFIG_"):
            name, _, value = line.partition("=")
            found[name] = value
        elif line.startswith("# CONFIG_") and line.endswith(" is not set"):
            found[line.split()[1]] = "n"
    return found


def _merge(config: Path, wanted: str) -> None:
    ours = _options(wanted)
    # Ours last: of several members of a choice (HZ, compression) the last one set counts.
    options = {name: value for name, value in _options(config.read_text()).items() if name not in ours} | ours
    config.write_text("".join(f"# {name} is not set\n" if value == "n" else f"{name}={value}\n"
                              for name, value in options.items()))


def _check(config: Path, wanted: str) -> None:
    got = _options(config.read_text())
    wrong = [name for name, value in _options(wanted).items() if got.get(name, "n") != value]
    if wrong:
        raise HvError(f"the kernel's configuration refuses {', '.join(wrong)}",
                      "this source is too old, too new, or lacks a dependency")
