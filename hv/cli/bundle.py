"""A command's path in one file: its modules, compiled without docstrings and assertions, in the order they are run in.

Finding, reading and importing 60 modules one by one costs 8 ms, from a bundle 3. It lies beside the compiled modules,
is written at the end of a `pyhv boot` (or of one of the runtime's commands: three bundles, hv/cli/runtime.py) that
found none, and holds while every source has the time and size it had then. Losing it costs only time. The launcher
reads it before anything of hv is imported: `marshal.loads` gives

    (code of `install`, [(source, mtime in ns, size)], [(module name, code, source, whether a package)])

Driven by tests/kvm/test_bundle.py and tests/root/test_container_cli.py.
"""

from __future__ import annotations

__all__ = ["PATH", "RESTORE_PATH", "install", "place_of", "save"]

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ast
    from types import CodeType

    Stamps = list[tuple[str, int, int]]
    Modules = list[tuple[str, CodeType, str, bool]]

ROOT = __file__[:-len("/cli/bundle.py")]


def place_of(kind: str) -> str:
    """Where the bundle of that name lies."""
    return f"{ROOT}/__pycache__/{kind}.{sys.hexversion:x}.bundle"


PATH = place_of("boot")
RESTORE_PATH = place_of("restore")
STANDARD = ("__future__", "ctypes", "ctypes._endian", "struct", "types")
# What a boot imports only where it is asked for something special, or which is slow to run.
RARE = ("hv.cli.bundle", "hv.cli.full", "hv.cli.watch", "hv.cli.devices", "hv.debug", "hv.softkvm.complete",
        "hv.softkvm.emulate", "hv.devices.virtio", "hv.devices.pci", "hv.devices.vhost_user", "hv.machine.attach",
        "hv.machine.iothread", "hv.machine.control", "hv.boot.decompress")


def install(stamps: Stamps, modules: Modules) -> bool:
    """Run all modules into sys.modules; False, with nothing done, where a source has changed.

    It runs as the launcher found it, without this module's globals: everything it uses is imported here.
    """
    import sys
    from posix import stat

    try:
        for path, time, size in stamps:
            status = stat(path)
            if status.st_mtime_ns != time or status.st_size != size:
                return False
    except OSError:
        return False
    known, kind = sys.modules, type(sys)
    spec_of = type(sys.__spec__)
    for name, code, source, is_package in modules:
        if name in known:
            continue
        module = kind(name)
        space = module.__dict__
        space["__file__"] = source
        parent, _, leaf = name.rpartition(".")
        if is_package:
            space["__path__"] = [source.rpartition("/")[0]]
            space["__package__"] = name
        else:
            space["__package__"] = parent
        space["__spec__"] = spec_of(name, None, origin=source, is_package=is_package)
        known[name] = module
        exec(code, space)
        if parent:
            setattr(known[parent], leaf, module)
    return True


def save(path: str = PATH, rare: tuple[str, ...] = RARE, bare: bool = False) -> None:
    """Write the bundle of what this process has imported, but for `rare` modules and those of full.py. `bare`: no
    annotations either, where no module of it looks at them when it runs.

    Does nothing where the installation can't be written.
    """
    import marshal
    import os

    if not os.access(path.rpartition("/")[0], os.W_OK):
        return
    found: dict[str, tuple[CodeType, str, bool]] = {}
    stamps: Stamps = []
    fresh = f"{path}.{os.getpid()}"
    try:
        for name, module in list(sys.modules.items()):
            source = getattr(module, "__file__", None)
            if not source or name.startswith((*rare, "hv.cli.bundle", "hv.cli.full")):
                continue
            if name in STANDARD or name.partition(".")[0] == "hv":
                status = os.stat(source)
                stamps.append((source, status.st_mtime_ns, status.st_size))
                with open(source, "rb") as file:
                    # without docstrings: they are a third of it
                    text = _bare(file.read()) if bare else file.read()
                    code = compile(text, source, "exec", dont_inherit=True, optimize=2)
                found[name] = code, source, hasattr(module, "__path__")
        modules = [(name, *found[name]) for name in _in_order(found)]
        with open(fresh, "wb") as out:
            out.write(marshal.dumps((install.__code__, stamps, modules)))
        os.replace(fresh, path)
    except OSError:
        pass


def _bare(text: bytes) -> ast.Module:
    """A module's source without annotations and without what is for type checkers only."""
    import ast

    class Barer(ast.NodeTransformer):
        """Takes them out."""

        def visit_arg(self, node: ast.arg) -> ast.arg:
            node.annotation = None
            return node

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
            node.returns = None
            self.generic_visit(node)
            return node

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
            self.generic_visit(node)
            if node.value is None:
                return ast.copy_location(ast.Pass(), node)
            return ast.copy_location(ast.Assign([node.target], node.value), node)

        def visit_If(self, node: ast.If) -> ast.stmt:
            self.generic_visit(node)
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not node.orelse:
                return ast.copy_location(ast.Pass(), node)
            return node

    tree: ast.Module = Barer().visit(ast.parse(text))
    return ast.fix_missing_locations(tree)


def _in_order(found: dict[str, tuple[CodeType, str, bool]]) -> list[str]:
    """Each module behind its package and those it imports when it is run."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in found or name in order or name in open_:
            return
        open_.add(name)
        visit(name.rpartition(".")[0])
        for wanted in _imports(found[name][0]):
            visit(wanted)
        order.append(name)

    open_: set[str] = set()
    for name in found:
        visit(name)
    return order


def _imports(code: CodeType) -> list[str]:
    """The modules that a module's own statements import, those under `if TYPE_CHECKING` left out."""
    import dis

    wanted: list[str] = []
    base = ""
    skip_to = 0
    before = None
    for step in dis.get_instructions(code):
        if step.offset < skip_to:
            continue
        if step.opname == "IMPORT_NAME":
            base = str(step.argval)
            wanted.append(base)
        elif step.opname == "IMPORT_FROM":
            wanted.append(f"{base}.{step.argval}")
        elif "JUMP" in step.opname and before is not None and before.argval == "TYPE_CHECKING":
            skip_to = step.argval
        before = step
    return wanted
