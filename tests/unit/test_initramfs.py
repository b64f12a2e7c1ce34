"""Files and modules in an initramfs."""

from __future__ import annotations

import lzma
import os
import subprocess
from pathlib import Path

import pytest
from framework.run import no_traceback, pyhv

from hv.errors import ConfigError, ImageError
from hv.kernels.initramfs import INIT, busybox, from_directory, place
from hv.kernels.modules import depends, modules


def module(*needs: str, more: bytes = b"") -> bytes:
    """As much of a module as matters here."""
    body = b"\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0" + more
    header = bytearray(b"\x7fELF" + bytes(60))
    header[0x28:0x30] = (64 + len(body)).to_bytes(8, "little")
    header[0x3A:0x3E] = b"\x40\0\2\0"
    return bytes(header) + body + bytes(128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    deep = tmp_path / "modules/6.1/kernel/drivers/virtio"
    deep.mkdir(parents=True)
    for name, needs in (("virtio", ()), ("virtio_ring", ("virtio",)), ("virtio-pci", ("virtio_ring", "virtio")),
                        ("loop_a", ("loop_b",)), ("loop_b", ("loop_a",)), ("orphan", ("gone",)), ("user", ("inside",))):
        (deep / f"{name}.ko").write_bytes(module(*needs))
    (deep / "packed.ko.xz").write_bytes(lzma.compress(module("virtio", more=bytes(100000))))
    (deep / "short.ko").write_bytes(module()[:100])
    (deep / "damaged.ko.xz").write_bytes(lzma.compress(module(more=os.urandom(9999)))[:4000])
    (tmp_path / "modules/6.1/modules.builtin").write_text("kernel/lib/inside.ko\nkernel/fs/proc-fs.ko\n")
    return tmp_path / "modules"


def unpack(data: bytes, where: Path) -> Path:
    subprocess.run(["cpio", "-id", "--quiet", "--no-preserve-owner"], input=data, cwd=where, capture_output=True,
                   timeout=60, check=False)
    return where


def test_modules_come_behind_what_they_need(folder):
    found = modules(str(folder), ("virtio-pci", "packed", "virtio"))
    assert [name for name, _ in found] == ["virtio", "virtio_ring", "virtio_pci", "packed"]
    assert found[3][1] == module("virtio", more=bytes(100000))        # stored plain
    assert [name for name, _ in modules(str(folder), ("user", "proc_fs"))] == ["user"]      # built in: nothing to load
    assert sorted(name for name, _ in modules(str(folder), ("loop_a",))) == ["loop_a", "loop_b"]


@pytest.mark.parametrize(("name", "text"), [("nothing", "no nothing.ko"), ("orphan", "gone, which orphan needs")])
def test_a_module_that_is_not_there_is_named(folder, name, text):
    with pytest.raises(ConfigError, match=text):
        modules(str(folder), (name,))


def test_a_damaged_module_is_named(folder):
    with pytest.raises(ImageError, match=r"damaged\.ko\.xz"):
        modules(str(folder), ("damaged",))
    with pytest.raises(ImageError, match=r"short\.ko"):
        modules(str(folder), ("short",))
    with pytest.raises(ConfigError, match="not a directory"):
        modules(str(folder / "no"), ())


def test_dependencies_of_what_is_no_module():
    assert depends(b"") == depends(b"\0depends=\0") == [] and depends(b"\0depends=a-b,c") == ["a_b"]


def test_files_and_modules_lie_where_they_should(folder, tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/c").write_text("c")
    os.symlink("c", tree / "a/b/d")
    files = [place(str(tool)), place(f"{tool}:/usr/bin/my-tool"), place(f"{tree}:/data"), place(f"{tool}:etc/")]
    out = tmp_path / "out"
    out.mkdir()
    unpack(busybox(files=files, modules=modules(str(folder), ("virtio_pci",))), out)
    assert (out / "root/tool").stat().st_mode & 0o777 == 0o755 and (out / "usr/bin/my-tool").is_file()
    assert (out / "etc/tool").is_file() and (out / "data/a/b/c").read_text() == "c"
    assert os.readlink(out / "data/a/b/d") == "c"
    assert (out / "lib/modules/order").read_text() == "virtio\nvirtio_ring\nvirtio_pci\n"
    assert (out / "lib/modules/virtio_pci.ko").read_bytes() == module("virtio_ring", "virtio")
    assert (out / "init").read_text() == INIT and "/lib/modules/order" in INIT
    other = tmp_path / "other"
    other.mkdir()
    unpack(from_directory(str(tree), files), other)
    assert (other / "a/b/c").is_file() and (other / "root/tool").is_file() and not (other / "lib").exists()


def test_a_name_with_a_colon_is_a_name_if_it_is_there(tmp_path):
    odd = tmp_path / "a:b"
    odd.write_text("x")
    assert place(str(odd)) == (str(odd), "root/a:b") and place(f"{odd}:/c") == (str(odd), "c")
    with pytest.raises(ConfigError, match="no such file"):
        place(str(tmp_path / "gone:/c"))


def test_the_command(folder, tmp_path):
    (tmp_path / "note").write_text("hello")
    file = tmp_path / "out.cpio"
    done = pyhv("kernel", "initramfs", str(file), "--add", f"{tmp_path / 'note'}:/note", "--modules", str(folder),
                "--module", "virtio_pci")
    assert done.returncode == 0, done.stderr
    assert b"hello" in file.read_bytes() and b"lib/modules/virtio_ring.ko" in file.read_bytes()
    for wrong in (["--module", "virtio_pci"], ["--modules", str(folder)], ["--add", "/no/such"],
                  ["--modules", str(folder), "--module", "gone"]):
        done = pyhv("kernel", "initramfs", str(file), *wrong)
        no_traceback(done)
        assert done.returncode == 2 and len(done.stderr.decode().splitlines()) <= 2, done.stderr


@pytest.mark.parametrize("tree", [False, True])
def test_the_agent_is_put_where_init_starts_it(tmp_path, tree):
    (tmp_path / "tree").mkdir()
    more = ("--from", str(tmp_path / "tree")) if tree else ()
    done = pyhv("kernel", "initramfs", str(tmp_path / "a.cpio"), "--agent", *more)
    assert done.returncode == 0, done.stderr
    (tmp_path / "out").mkdir()
    out = unpack((tmp_path / "a.cpio").read_bytes(), tmp_path / "out")
    assert (out / "bin/pyhv-agent").read_bytes()[:4] == b"\x7fELF" and os.access(out / "bin/pyhv-agent", os.X_OK)
    if not tree:
        assert "\nif [ -x /bin/pyhv-agent ]; then /bin/pyhv-agent & fi\n" in (out / "init").read_text()
    assert not (unpack(busybox(), tmp_path) / "bin/pyhv-agent").exists()


def test_the_agent_alone_is_init(folder, tmp_path):
    (tmp_path / "note").write_text("hello")
    done = pyhv("kernel", "initramfs", str(tmp_path / "a.cpio"), "--agent-init", "--add", f"{tmp_path / 'note'}:/note",
                "--modules", str(folder), "--module", "virtio_pci")
    assert done.returncode == 0, done.stderr
    (tmp_path / "out").mkdir()
    out = unpack((tmp_path / "a.cpio").read_bytes(), tmp_path / "out")
    assert (out / "init").read_bytes()[:4] == b"\x7fELF" and os.access(out / "init", os.X_OK)
    assert (out / "note").read_text() == "hello" and (out / "lib/modules/order").exists()
    assert not (out / "bin").exists()
    for wrong in ("--agent", "--from=/"):
        done = pyhv("kernel", "initramfs", str(tmp_path / "b.cpio"), "--agent-init", wrong)
        no_traceback(done)
        assert done.returncode == 2 and not (tmp_path / "b.cpio").exists()
