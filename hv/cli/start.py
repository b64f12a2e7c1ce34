"""The first and the last thing that runs: from the launcher to the command and out.

Reading 50 module files costs 6 ms, reading one bundle of them half a millisecond. So the modules of `pyhv boot` are
kept in one file beside the compiled ones; it is written at the end of a run that found none, and used while every
source has the time and size it had then. Losing it costs only time.
"""

from __future__ import annotations

__all__ = ["start"]

import gc
import marshal
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType

    Saved = dict[str, tuple[bytes, bool, str]]      # name -> code, whether a package, source file

ROOT = __file__[:-len("/cli/start.py")]
BUNDLE = f"{ROOT}/__pycache__/boot.{sys.implementation.cache_tag}.bundle"
STANDARD = ("__future__", "ctypes", "ctypes._endian", "struct", "types")
RARE = ("hv.cli.full", "hv.cli.watch", "hv.cli.start", "hv.debug", "hv.softkvm.complete", "hv.softkvm.emulate")


def start(arguments: list[str]) -> None:
    """Run the command line and end the process with its exit code."""
    _open_standard_streams()
    gc.disable()    # until the machine is built: 20 collections that would find nothing
    fast = arguments[:1] == ["boot"]
    bundled = fast and _take_bundle()
    from hv.cli.main import main

    code = main(arguments)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass        # whoever read our output has gone
    if fast and not bundled:
        _save_bundle()
    # Everything is closed; taking the interpreter apart object by object would cost another 2 ms.
    posix._exit(code)


def _open_standard_streams() -> None:
    """Descriptors 0 to 2 must be somebody's, or /dev/kvm would get one and the console be written to it."""
    for fd in range(3):
        try:
            posix.fstat(fd)
        except OSError:
            posix.open("/dev/null", posix.O_RDWR)       # the lowest free number, which is `fd`
    if sys.stdout is None or sys.stderr is None:
        sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")    # noqa: SIM115


class _Importer:
    """Finds and runs the modules of a bundle."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        found = self._saved.get(name)
        if found is None:
            return None
        spec: ModuleSpec = type(sys.__spec__)(name, self, origin=found[2], is_package=found[1])  # type: ignore[arg-type]
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(found[2].rpartition("/")[0])
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        code: CodeType = marshal.loads(self._saved[module.__name__][0])
        exec(code, module.__dict__)


def _take_bundle() -> bool:
    try:
        with open(BUNDLE, "rb", 0) as file:
            stamps, saved = marshal.loads(file.read())
        for path, time, size in stamps:
            status = posix.stat(path)
            if status.st_mtime_ns != time or status.st_size != size:
                return False
    except (OSError, ValueError, EOFError, TypeError):
        return False
    sys.meta_path.insert(0, _Importer(saved))
    return True


def _save_bundle() -> None:
    """Collect the compiled form of what was imported. Does nothing where the installation can't be written."""
    saved: Saved = {}
    stamps: list[tuple[str, int, int]] = []
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        source, compiled = getattr(spec, "origin", None), getattr(spec, "cached", None)
        if not source or not compiled or not (name.startswith("hv.") or name in STANDARD) or name.startswith(RARE):
            continue
        try:
            status = posix.stat(source)
            with open(compiled, "rb") as file:
                head, code = file.read(16), file.read()
        except OSError:
            continue
        # a compiled file that is not this source's would freeze an old version (PEP 3147, PEP 552)
        if head[4:8] == bytes(4) and int.from_bytes(head[8:12], "little") == int(status.st_mtime) & 0xFFFFFFFF:
            saved[name] = (code, spec is not None and spec.submodule_search_locations is not None, source)
            stamps.append((source, status.st_mtime_ns, status.st_size))
    try:
        with open(f"{BUNDLE}.{posix.getpid()}", "wb") as file:
            file.write(marshal.dumps((stamps, saved)))
        posix.replace(f"{BUNDLE}.{posix.getpid()}", BUNDLE)
    except OSError:
        pass
