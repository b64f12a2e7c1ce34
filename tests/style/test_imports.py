"""Who may import whom, and what `pyhv boot` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HV = ROOT / "hv"

# A room may import itself, and the rooms named here (docs/architecture.md draws it), inside functions too.
ALLOWED = {
    "errors": set(),
    "linux": {"errors"},
    "kvm": {"errors", "linux"},
    "memory": {"errors", "linux"},
    "boot": {"errors", "memory"},
    "devices": {"errors", "linux"},
    "guests": {"errors"},
    "plainjson": set(),
    "container": {"errors", "linux", "plainjson"},
    # machine asks softkvm for help on hosts that need it (hv/machine/builder.py, software_kvm_help)
    "machine": {"errors", "linux", "kvm", "memory", "boot", "devices", "guests", "softkvm", "plainjson"},
    "softkvm": {"errors", "kvm", "memory", "machine"},
    "debug": {"errors", "kvm", "memory", "machine"},
    "snapshot": {"errors", "plainjson", "linux", "kvm", "memory", "devices", "machine", "softkvm"},
    "kernels": {"errors", "boot"},
    "places": set(),
    "phases": set(),
    "image": {"errors", "linux", "plainjson", "places"},
    "network": {"errors", "linux", "plainjson", "places"},
    # a bundle inside a VM: the first room that sees both the VM's and the container's
    "sandbox": {"errors", "linux", "plainjson", "places", "kvm", "memory", "devices", "machine", "snapshot", "softkvm",
                "container", "kernels", "guests", "phases"},
    # what `pyhv run` makes, of either kind
    "instance": {"errors", "linux", "plainjson", "places", "container", "image", "network", "sandbox", "phases"},
    "bench": {"errors", "plainjson", "linux", "kvm", "machine", "guests", "kernels", "devices", "memory", "testing",
              "container", "snapshot", "softkvm", "places", "image", "network", "sandbox", "instance"},
    "cli": {"errors", "__init__", "linux", "machine", "debug", "softkvm", "kernels", "bench", "kvm", "guests",
            "devices", "container", "snapshot", "plainjson", "places", "phases", "image", "network", "sandbox",
            "instance"},
    "testing": {"errors", "memory", "devices"},
    "__init__": {"errors", "machine", "snapshot"},
}

# Outside packages, and the only files that may import them.
OUTSIDE = {
    "click": ["cli/full"],
    "capstone": ["debug/disasm.py", "softkvm/complete.py"],
    "elftools": ["debug/symbols.py"],
    "unicorn": ["softkvm/emulate.py"],
    "zstandard": ["boot/decompress.py", "snapshot/pack.py", "image/"],
    "isal": ["image/"],
    "lz4": ["boot/decompress.py"],
    "lzallright": ["boot/decompress.py"],
    "jeepney": ["container/cgroups/bus.py"],
    "urllib3": ["image/registry"],
    "rich": ["cli/"],
    "pyroute2": ["network/"],
    "subprocess": ["network/", "image/auth.py", "kernels/", "bench/", "guests.py"],
}

# Everything a plain `pyhv boot` of a PVH kernel may load beyond what the bare interpreter has.
BOOT_SET = {"__future__", "_ctypes", "_struct", "ctypes", "ctypes._endian", "errno", "gc", "mmap", "select", "struct",
            "types"}
# What site would have loaded anyway, and -S leaves out.
SITE = {"os", "os.path", "posixpath", "genericpath", "stat", "_stat", "_collections_abc"}


def sources() -> list[Path]:
    return sorted(HV.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(HV).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of modules that `path` imports; for type checkers only (TYPE_CHECKING) left out."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(child for part in node.body for child in ast.walk(part))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "hv":
                names.update(f"hv.{alias.name}" for alias in node.names if (HV / alias.name).exists())
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(HV)))
def test_import_directions(path):
    mine = room(path)
    for name in imported(path):
        if name == "hv" or name.startswith("hv."):
            other = name.split(".")[1] if "." in name else "__init__"
            assert other == mine or other in ALLOWED[mine], f"{path.relative_to(ROOT)} imports {name}"
        for package, places in OUTSIDE.items():
            if name == package or name.startswith(package + "."):
                assert any(str(path.relative_to(HV)).startswith(place) for place in places), f"{path} imports {name}"


def test_only_one_door_to_libc():
    for path in sources():
        if path != HV / "linux/libc.py":
            assert "CDLL" not in path.read_text(), path


def modules_of(code: str) -> set[str]:
    command = [sys.executable, "-I", "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}; "
               "print(*sorted(sys.modules))"]
    return set(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split())


def test_import_hv_loads_the_core_only():
    assert modules_of("import hv") - modules_of("pass") == {"hv", "__future__"}


def test_the_boot_path_keeps_its_import_budget():
    code = ("import hv.cli.main, hv.cli.boot, hv.cli.options, hv.cli.terminal, hv.machine.builder, hv.boot.pvh, "
            "hv.boot.longmode, hv.boot.acpi, hv.boot.mptable")
    loaded = {name for name in modules_of(code) - modules_of("pass") if not name.startswith("hv")} - SITE
    assert loaded <= BOOT_SET, f"beyond the budget: {sorted(loaded - BOOT_SET)}"


# Everything `pyhv-runtime run` may load beyond the bare interpreter; no json, no enum, no ctypes package. _struct is
# built in: 0.1 ms, and packs a system call in a third of the time.
RUNTIME_SET = {"__future__", "_ctypes", "_functools", "_json", "_socket", "_struct", "errno", "fcntl", "gc",
               "itertools", "time"}


def test_the_runtime_keeps_its_import_budget():
    code = ("import hv.cli.runtime, hv.cli.oci, hv.cli.oci_life, hv.container.foreground, "
            "hv.container.cgroups.manager, hv.container.cgroups.mount, hv.container.cgroups.devices, "
            "hv.container.hooks, hv.container.seccomp.compile")
    loaded = {name for name in modules_of(code) - modules_of("pass") if not name.startswith("hv")} - SITE
    assert loaded <= RUNTIME_SET, f"beyond the budget: {sorted(loaded - RUNTIME_SET)}"
