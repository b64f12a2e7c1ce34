"""The bundle of compiled modules: written by the first boot, used by the next, dropped when a source changes."""

from __future__ import annotations

import marshal
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from framework.run import ROOT, needs_kvm

from hv.guests import path

pytestmark = needs_kvm


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout of its own, whose files may be changed."""
    for name in ("bin", "hv", "guests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def boot(copy: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-ISE", str(copy / "bin" / "pyhv"), "boot", path("tiny"), "--quiet", *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"hello from the guest\n") or done.returncode, done.stderr
    return done


def bundle(copy: Path) -> Path:
    return copy / f"hv/__pycache__/boot.{sys.hexversion:x}.bundle"


def test_written_once_and_used(copy: Path) -> None:
    assert boot(copy).returncode == 0
    first = bundle(copy).stat()
    _, stamps, modules = marshal.loads(bundle(copy).read_bytes())
    names = [name for name, *_ in modules]
    assert {"hv", "hv.cli.start", "hv.machine.builder", "hv.machine.vcpu", "ctypes"} <= set(names)
    assert not any(name.startswith(("hv.debug", "hv.cli.full", "hv.devices.virtio")) for name in names)
    assert len(stamps) == len(modules)
    # every module stands behind its package, so that none is searched for
    assert all(name.rpartition(".")[0] in ("", *names[:at]) for at, name in enumerate(names))
    assert boot(copy).returncode == 0
    assert bundle(copy).stat().st_mtime_ns == first.st_mtime_ns


def test_used_means_that_no_module_is_searched_for(copy: Path) -> None:
    boot(copy)
    command = ["strace", "-f", "-e", "trace=openat", "-o", str(copy / "trace"), sys.executable, "-ISE",
               str(copy / "bin" / "pyhv"), "boot", path("tiny"), "--quiet"]
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
    opened = [line for line in (copy / "trace").read_text().splitlines() if str(copy) in line and "/hv/" in line]
    assert len(opened) == 1 and ".bundle" in opened[0], opened


def test_a_changed_source_counts_at_once(copy: Path) -> None:
    boot(copy)
    source = copy / "hv/cli/boot.py"
    source.write_text(source.read_text() + "\nraise SystemExit(77)\n")
    assert boot(copy).returncode == 77


@pytest.mark.parametrize("damage", [b"", b"\x00", b"nonsense", None])
def test_a_damaged_bundle_costs_only_time(copy: Path, damage: bytes | None) -> None:
    boot(copy)
    whole = bundle(copy).read_bytes()
    bundle(copy).write_bytes(whole[:len(whole) // 2] if damage is None else damage)
    assert boot(copy).returncode == 0
    assert bundle(copy).read_bytes() == whole       # mended by that very boot


def test_an_installation_that_cannot_be_written(copy: Path) -> None:
    if os.geteuid() == 0:
        bundle(copy).mkdir(parents=True)            # root may write anywhere, but not over a folder
    else:
        (copy / "hv/__pycache__").mkdir()
        (copy / "hv/__pycache__").chmod(0o500)
    assert boot(copy).returncode == 0
