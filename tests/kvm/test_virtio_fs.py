"""Shared folders in a real Linux guest: its root file system is one, a read-only one is mounted beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import ROOT, needs_kvm

from hv import Machine, MachineConfig
from hv.devices.virtio.fs_config import ShareConfig
from hv.kernels.initramfs import INIT, _static_busybox

pytestmark = [needs_kvm, pytest.mark.timeout(2400)]

HELLO = '#include <stdio.h>\nint main(void) { printf("hello from %d\\n", 6 * 7); return 0; }\n'
ENTRIES = 400


class RootShell(Shell):
    """A guest whose root file system is the first share."""

    def __init__(self, image: Path, **options: object) -> None:
        self.machine = Machine(MachineConfig(str(image), **options))    # type: ignore[arg-type]
        self.machine.start()
        self.at = 0


def system(root: Path) -> None:
    """A busybox system, the check program and a C compiler with what it needs, under `root`."""
    busybox = _static_busybox()
    assert busybox is not None
    for name in ("bin", "dev", "proc", "sys", "tmp", "root", "ro", "work"):
        (root / name).mkdir()
    shutil.copy(busybox, root / "bin/busybox")
    for name in ("sh", "mount", "setsid", "cttyhack", "poweroff", "reboot"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    subprocess.run(["gcc", "-static", "-O2", "-o", str(root / "bin/fs_check"), str(ROOT / "guests/linux/fs_check.c")],
                   check=True, timeout=60)


def compiler(root: Path) -> None:
    """tcc, its headers and libraries, symbolic links resolved."""
    (root / "root/hello.c").write_text(HELLO)
    (root / "usr").mkdir()
    (root / "usr/lib").symlink_to("../lib")
    listed = subprocess.run(["gcc", "-M", str(root / "root/hello.c")], capture_output=True, text=True, check=True,
                            timeout=60).stdout
    libraries = subprocess.run(["ldd", "/usr/bin/tcc"], capture_output=True, text=True, check=True, timeout=60).stdout
    files = re.findall(r"/usr/include\S+", listed) + re.findall(r"/lib\S+", libraries)
    files += ["/usr/bin/tcc", *(f"/lib/x86_64-linux-gnu/{name}" for name in
                                ("crt1.o", "crti.o", "crtn.o", "libc.so", "libc.so.6", "libc_nonshared.a",
                                 "ld-linux-x86-64.so.2"))]
    tcc = Path("/usr/lib/x86_64-linux-gnu/tcc")
    files += [str(path) for path in tcc.rglob("*") if path.is_file()]
    for name in files:
        target = root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(name).resolve(), target)
        target.chmod(0o755)


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders for the root file system and for the read-only share."""
    skip_without_build_tools()
    root, fixed = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("fixed")
    system(root)
    (fixed / "file").write_text("cannot be changed\n")
    (fixed / "many").mkdir()
    for number in range(ENTRIES):
        (fixed / "many" / f"entry-{number:05}").touch()
    (fixed / "way-out").symlink_to("/etc/passwd")
    return root, fixed


@pytest.fixture(scope="module")
def shell(shares: tuple[Path, Path]) -> Iterator[RootShell]:
    """The guest, up, with both shares mounted."""
    root, fixed = shares
    devices = (ShareConfig(root, tag="rootfs"), ShareConfig(fixed, readonly=True))
    with RootShell(kernel("micro") / "vmlinux", cmdline="rootfstype=virtiofs root=rootfs rw init=/init",
                   devices=devices, timeout=900) as shell:
        shell.wait_for(b"pyhv# ")
        assert "END 0" in shell.run("mount -t virtiofs share1 /ro")
        yield shell
        assert shell.machine.devices["share0"].faults == 0, shell.machine.devices["share0"].fault_texts


def test_it_is_the_root_file_system(shell: RootShell, shares: tuple[Path, Path]) -> None:
    assert re.search(r"^rootfs / virtiofs rw", shell.run("cat /proc/mounts"), re.M)
    shell.run("echo from the guest > /tmp/note; mkdir /tmp/d; mv /tmp/note /tmp/d/note")
    assert (shares[0] / "tmp/d/note").read_text() == "from the guest\n"


def test_what_the_host_changes_is_seen(shell: RootShell, shares: tuple[Path, Path]) -> None:
    note = shares[0] / "tmp/host"
    note.write_text("first")
    assert "first" in shell.run("sleep 1.1; cat /tmp/host")     # the guest trusts names for a second
    note.write_text("second, longer")
    assert "second, longer" in shell.run("sleep 1.1; cat /tmp/host")
    note.unlink()
    assert "No such file" in shell.run("sleep 1.1; cat /tmp/host")


def test_posix_basics(shell: RootShell) -> None:
    printed = shell.run("cd /work && fs_check; cd /", timeout=200)
    assert "FAIL" not in printed and "\n0 failures" in printed, printed
    assert printed.count("ok ") == 28, printed


def test_a_large_directory(shell: RootShell) -> None:
    assert f"{ENTRIES + 2} entries" in shell.run("fs_check count /ro/many", timeout=200)


def test_a_read_only_share(shell: RootShell, shares: tuple[Path, Path]) -> None:
    before = sorted((path, path.lstat().st_mode) for path in shares[1].iterdir())
    printed = shell.run("cd /ro && fs_check readonly file; cat file; cd /")
    assert "FAIL" not in printed and "0 failures" in printed and "cannot be changed" in printed
    # a link that leads out of the share on the host leads to the guest's own file, which is not there
    assert "No such file" in shell.run("cat /ro/way-out")
    assert sorted((path, path.lstat().st_mode) for path in shares[1].iterdir()) == before


def test_building_something_in_it(shell: RootShell, shares: tuple[Path, Path]) -> None:
    if shutil.which("tcc") is None:
        pytest.skip("no tcc (package tcc) to put into the share")
    compiler(shares[0])
    printed = shell.run("sleep 1; cd /root && time /usr/bin/tcc -o hello hello.c && ./hello; cd /", timeout=300)
    assert "hello from 42" in printed, printed
    assert os.access(shares[0] / "root/hello", os.X_OK)


def test_unmount(shell: RootShell) -> None:
    shell.run("umount /ro")
    device = shell.machine.devices["share1"]
    assert not device.faults, device.fault_texts
    assert len(device.server.nodes.by_id) == 1 and not device.server.handles.by_number
