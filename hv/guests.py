"""Where the small guests of guests/ are: built into hv/data, in a source checkout on demand; and programs for guests.

Driven by tests/kvm/test_guests.py and tests/unit/test_agent.py.
"""

from __future__ import annotations

__all__ = ["BUILT_IN", "PREFIX", "names", "path", "program", "resolve"]

import os
import sys

from hv.errors import ImageError

_HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(_HERE, "data")
SOURCES = os.path.join(os.path.dirname(_HERE), "guests")
PREFIX = "guest:"               # guest:NAME stands for a guest where a kernel file is expected
BUILT_IN = "demo"
AGENT = "agent"
_SHARED = ("common", "build.py")
_KINDS = (".elf", ".bin")


def resolve(kernel: str | None) -> str:
    """The file that `kernel` stands for: a guest:NAME, or None for the built-in guest; a file name is itself."""
    if kernel is None:
        return path(BUILT_IN)
    return path(kernel.removeprefix(PREFIX)) if kernel.startswith(PREFIX) else kernel


def names() -> list[str]:
    """The guests there are, built or not."""
    found = set()
    if _from_source():
        for leaf in os.listdir(SOURCES):
            # `linux` holds kernel configurations, not a guest of ours; `agent` is a program.
            if leaf not in ("common", "linux", AGENT) and any(_sources(os.path.join(SOURCES, leaf))):
                found.add(leaf)
    elif os.path.isdir(DATA):
        found = {leaf[:-4] for leaf in os.listdir(DATA) if leaf.endswith(_KINDS)}
    return sorted(found)


def path(name: str) -> str:
    """The built file of guest `name`; built first where a source is newer. ImageError where there is none."""
    found = next((file for kind in _KINDS if os.path.isfile(file := os.path.join(DATA, name + kind))), None)
    if not _from_source():
        if found is None:
            raise ImageError(f"no built-in guest {name!r}", f"there are {', '.join(names()) or 'none'}")
        return found
    if found is None or _is_stale(name, os.stat(found).st_mtime_ns):
        return _build(name, found)
    return found


def program(name: str) -> str:
    """The built file of a program that runs in Linux guests; built first where a source is newer. ImageError."""
    file = os.path.join(DATA, name)
    built = os.stat(file).st_mtime_ns if os.path.isfile(file) else 0
    if not _from_source():
        if not built:
            raise ImageError(f"there is no program {name!r}", "the installation is incomplete")
    elif _is_stale(name, built):
        _run_build(name, have_old=bool(built))
    return file


def _from_source() -> bool:
    return os.path.isfile(os.path.join(SOURCES, "build.py"))


def _sources(folder: str) -> list[str]:
    try:
        return [os.path.join(folder, leaf) for leaf in os.listdir(folder) if leaf.endswith((".c", ".S"))]
    except NotADirectoryError:
        return []


def _is_stale(name: str, built: int) -> bool:
    """Whether something the guest is made from changed after it was built."""
    for leaf in (name, *_SHARED):
        at = os.path.join(SOURCES, leaf)
        try:
            if os.path.isdir(at):
                if any(os.stat(os.path.join(at, name)).st_mtime_ns > built for name in os.listdir(at)):
                    return True
            elif os.stat(at).st_mtime_ns > built:
                return True
        except OSError:
            return True
    return False


def _build(name: str, old: str | None) -> str:
    """Run guests/build.py. Where that cannot be done, an older build will do."""
    if name not in names():
        raise ImageError(f"no built-in guest {name!r}", f"there are {', '.join(names()) or 'none'}")
    if _run_build(name, have_old=old is not None):
        return next(file for kind in _KINDS if os.path.isfile(file := os.path.join(DATA, name + kind)))
    assert old is not None
    return old


def _run_build(name: str, *, have_old: bool) -> bool:
    """Whether it was built. ImageError where it can't be; an older one will do where there is no compiler."""
    import subprocess

    script = os.path.join(SOURCES, "build.py")
    done = subprocess.run([sys.executable, script, "--out", DATA, name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return True
    if have_old and "gcc is missing" in done.stderr:
        return False
    raise ImageError(f"the guest {name!r} cannot be built: {done.stderr.strip()}", "run guests/build.py")
