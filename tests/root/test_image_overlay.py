"""Overlay mounts of unpacked layers, in mount namespaces of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import needs_root
from framework.images import Built, Link, Special, busybox_image, tar
from framework.run import ROOT as CHECKOUT

from hv.errors import ImageError
from hv.image.layers import Layers
from hv.image.overlay import make, make_upper
from hv.image.store import Store

pytestmark = needs_root


def inside(code: str, *words: Any) -> str:
    """Run Python in a new mount namespace, with `words`; what it prints."""
    lines = ["import os, sys", "from pathlib import Path", "from hv.image.overlay import make, mount_overlay",
             "from hv.image import overlay", "from hv.linux.mount import move", "words = sys.argv[1:]", code]
    done = subprocess.run(["unshare", "--mount", "--propagation", "private", sys.executable, "-c", "\n".join(lines),
                           *map(str, words)], text=True, capture_output=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def folders(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("upper", "work", "root")]
    for path in found:
        path.mkdir()
    return found


@pytest.mark.parametrize("way", ["options", "page"])
def test_many_layers_with_hard_names(way, tmp_path):
    place = tmp_path / "a:b,c\\d e" / ("n" * 200) if way == "options" else tmp_path / "a:b,c\\d e"
    lowers = []
    for number in range(130):
        lowers.append(place / f"l{number}")
        lowers[-1].mkdir(parents=True)
        (lowers[-1] / f"f{number}").touch()
        (lowers[-1] / "who").write_text(str(number))
    upper, work, root = folders(place)
    call = ("fd = make(words[3:], *words[:2])\nmove(fd, os.open(words[2], os.O_PATH))" if way == "options" else
            "overlay._mount_by_page(words[3:], *words[:2], os.open(words[2], os.O_PATH), False, (), 0, None)")
    shown = inside(f"{call}\nroot = Path(words[2])\nprint(len(os.listdir(root)), (root / 'who').read_text())\n"
                   "(root / 'who').write_text('written')\n(root / 'f9').unlink()\n"
                   "print(len(os.listdir('/proc/self/fd')))", upper, work, root, *lowers)
    assert shown.split() == ["131", "0", "6" if way == "options" else "5"]
    assert (upper / "who").read_text() == "written" and (lowers[0] / "who").read_text() == "0"
    assert (upper / "f9").is_char_device() and os.listdir(root) == []


def test_read_only_without_an_upper_folder(tmp_path):
    for name in ("one", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "one/f").write_text("1")
    shown = inside("mount_overlay(words[1:], '', '', words[0])\nprint(Path(words[0], 'f').read_text())\n"
                   "try:\n    Path(words[0], 'g').touch()\nexcept OSError as error:\n    print(error.strerror)",
                   tmp_path / "root", tmp_path / "one")
    assert shown == "1\nRead-only file system\n"


def test_the_upper_folder_looks_as_the_images_root(tmp_path):
    (tmp_path / "one").mkdir(0o750)
    os.chown(tmp_path / "one", 5, 6)
    for _ in range(2):
        make_upper([str(tmp_path / "one")], str(tmp_path / "upper"), str(tmp_path / "work"))
    status = (tmp_path / "upper").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o750, 5, 6)


def test_what_can_not_be_mounted_costs_one_line(tmp_path):
    upper, work, _ = map(str, folders(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="gone is not a folder"):
        make([str(tmp_path / "gone")], upper, work)
    with pytest.raises(ImageError, match="501 layers"):
        make([upper] * 501)
    with pytest.raises(ImageError, match="0 layers"):
        make([])
    with pytest.raises(ImageError, match="gone"):
        make([f"{tmp_path}/{'n' * 250}/gone"], upper, work)
    assert len(os.listdir("/proc/self/fd")) == before


def test_whiteouts_and_opaque_folders_hide_what_is_below(tmp_path):
    store = Store(str(tmp_path / "images"))
    image = busybox_image(store, layers=[
        tar([("etc/", None), ("etc/old", b"1"), ("opt/", None), ("opt/a", b"1"), ("opt/b", b"1"), ("srv/", None),
             ("srv/x", b"1"), ("home/", None), ("home/u", b"1")]),
        tar([("etc/", None), ("etc/.wh.old", b""), ("etc/new", b"2"), ("opt/", None), ("opt/.wh..wh..opq", b""),
             ("opt/c", b"2"), (".wh.srv", b""), ("srv/", None), ("srv/y", b"2"), (".wh.home", b"")])])
    upper, work, root = folders(tmp_path)
    shown = inside("mount_overlay(words[3:], *words[:3])\nfor name in ('etc', 'opt', 'srv', ''):\n"
                   "    print(*sorted(os.listdir(words[2] + '/' + name)))", upper, work, root,
                   *Layers(store).ensure(image))
    assert shown.splitlines() == ["group new passwd", "c", "y", "bin dev etc opt proc root srv sys tmp"]


def test_root_of_a_user_namespace(tmp_path):
    """As another user: unpacked without root's rights, mounted with user.overlay.*."""
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    place = tmp_path / "home"
    place.mkdir()
    store = Store(str(place / "images"))
    busybox_image(store, name="x", layers=[
        tar([("d/", None), ("d/f", b"1"), ("g", b"1")]),
        tar([("d/", None), ("d/.wh..wh..opq", b""), (".wh.g", b""), ("d/n", Special({"uid": 99}, b"2"))])])
    for path in (place, *place.rglob("*")):
        os.chown(path, 1234, 1234)
    script = f"""
import os, hashlib, threading, time, _queue, ctypes
from hv.image import unpacking, overlay, store, layers
os.setgroups([]); os.setresgid(1234, 1234, 1234); os.setresuid(1234, 1234, 1234)
place = {str(place)!r}
images = store.Store(place + "/images")
lowers = layers.Layers(images).ensure(images.resolve("x"))
libc = ctypes.CDLL(None)
assert libc.prctl(4, 1, 0, 0, 0) == 0              # PR_SET_DUMPABLE: /proc/self is this user's again
while libc.unshare(0x10000000 | 0x20000):       # until the threads are gone, to the kernel too
    time.sleep(0.01)
for name, text in (("setgroups", "deny"), ("uid_map", "0 1234 1"), ("gid_map", "0 1234 1")):
    open("/proc/self/" + name, "w").write(text)
for name in ("upper", "work", "root"):
    os.mkdir(place + "/" + name)
overlay.mount_overlay(lowers, place + "/upper", place + "/work", place + "/root")
print(*sorted(os.listdir(place + "/root")), *os.listdir(place + "/root/d"))
os.rmdir(place + "/root/tmp"), os.mkdir(place + "/root/tmp")
print(os.getxattr(place + "/upper/tmp", "user.overlay.opaque"))
"""
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=60,
                          env={"PYTHONPATH": str(CHECKOUT)})
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["bin d dev etc proc root sys tmp n", "b'y'"]


def test_a_full_disk_costs_one_line_and_leaves_nothing(tmp_path):
    built = Built([tar([(f"f{number}", os.urandom(1 << 20)) for number in range(8)])])
    layout = tmp_path / "small"
    layout.mkdir()
    script = f"""
import os, subprocess, sys
from hv.errors import ImageError
from hv.image.layers import Layers
from hv.image.store import Store
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", {str(layout)!r}], check=True)
store = Store({str(layout)!r} + "/images")
for blob in sys.stdin.buffer.read().split(b"--------"):
    last = store.put_bytes(blob)
store.tag("x", last)
try:
    Layers(store).ensure(store.resolve("x"))
except ImageError as error:
    print(error, "|", error.hint)
print(os.listdir(store.root + "/layers/tmp"), Layers(store).names(), os.statvfs(store.root).f_bavail > 700)
"""
    done = subprocess.run(["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script],
                          input=b"--------".join([*built.blobs, built.config, built.manifest]), capture_output=True,
                          timeout=60, env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    first, second = done.stdout.decode().splitlines()
    assert first.startswith("layer sha256:") and "No space left on device | free space" in first
    assert second == "[] [] True"


def test_a_hundred_instances_cost_the_image_and_what_they_write(tmp_path):
    """Each writes 64 KiB. All mounted at once, in one mount namespace."""
    store = Store(str(tmp_path / "images"))
    image = busybox_image(store, layers=[tar([(f"big{number}", os.urandom(4 << 20)) for number in range(10)]),
                                         tar([("l", Link("big1"))])])
    lowers = Layers(store).ensure(image)
    before = used(tmp_path)
    shown = inside("""
lowers, place = words[1:], words[0]
for number in range(100):
    folders = [f"{place}/{number}/{name}" for name in ("upper", "work", "root")]
    for folder in folders:
        os.makedirs(folder)
    mount_overlay(lowers, *folders)
    Path(folders[2], "written").write_bytes(os.urandom(65536))
    assert Path(folders[2], "l").stat().st_size == 4 << 20
print(sum(line.split()[2] == "overlay" for line in open("/proc/self/mounts")))
""", tmp_path / "i", *lowers)
    assert int(shown) >= 100
    cost = used(tmp_path) - before
    assert before > 40 << 20 and 6.5e6 < cost < 100 * (65536 + 6 * 4096)


def used(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


@pytest.mark.skipif(not all(map(shutil.which, ("podman", "skopeo"))), reason="podman or skopeo is not installed")
def test_the_files_are_those_that_podman_shows(tmp_path):
    """The store as it stands is copied to podman's, which unpacks it by its own code."""
    store = Store(str(tmp_path / "images"))
    image = busybox_image(store, name="localhost/peer:1", compression="gzip", layers=[
        tar([("./", None), ("etc/", None), ("etc/old", b"1"),
             ("opt/", Special({"type": tarfile.DIRTYPE, "mode": 0o2755, "gid": 9})),
             ("opt/a", Special({"mode": 0o4711, "uid": 5, "gid": 6, "mtime": 99}, b"1")), ("opt/b", b"1"),
             ("srv/", None), ("srv/x", b"1"), ("usr/lib/", None), ("lib", Link("usr/lib")), ("lib/so", b"2"),
             ("hard", Special({"type": tarfile.LNKTYPE, "linkname": "opt/a", "mode": 0o4711, "uid": 5, "gid": 6,
                               "mtime": 99})),
             ("fifo", Special({"type": tarfile.FIFOTYPE, "mode": 0o640})),
             ("zero", Special({"type": tarfile.CHRTYPE, "mode": 0o666, "devmajor": 1, "devminor": 5})),
             ("cap", Special({"mode": 0o755, "pax_headers": {"SCHILY.xattr.user.x": "1"}}, b"3"))]),
        tar([("./", None), ("etc/", None), ("etc/.wh.old", b""), ("etc/new", b"2"), ("opt/", None),
             ("opt/.wh..wh..opq", b""), ("opt/c", b"2"), (".wh.srv", b""), ("fifo", b"now a file"),
             ("long/" + "n" * 150, b"3")])])
    upper, work, root = folders(tmp_path)
    peer = tempfile.mkdtemp(prefix="pyhv-", dir="/var/tmp")     # podman takes no long path
    script = f"""
set -e
skopeo copy -q oci:{store.root}:localhost/peer:1 \
    'containers-storage:[overlay@{peer}/root+{peer}/run]localhost/peer:1'
where=$(podman --root={peer}/root --runroot={peer}/run --storage-driver overlay image mount localhost/peer:1)
cd "${{where:?}}"
{SHOW}
cd /
"""
    try:
        theirs = subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", script], text=True,
                                capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        assert theirs.returncode == 0, theirs.stderr
        ours = inside("import subprocess\nmount_overlay(words[3:], *words[:3])\n"
                      f"subprocess.run(['sh', '-c', {SHOW!r}], cwd=words[2], check=True)", upper, work, root,
                      *Layers(store).ensure(image))
        assert ours.splitlines() == theirs.stdout.splitlines()
        assert len(ours.splitlines()) > 50
    finally:
        subprocess.run(["umount", "-q", f"{peer}/root/overlay"], check=False)
        shutil.rmtree(peer)


# podman makes the root 0555, whatever the layers say
SHOW = r"""find . -mindepth 1 -printf '%p %y %m %U %G %l\n' | sort
find . -type f -printf '%p %n %s %T@\n' | sort
find . -type f -exec cat {} + | sha256sum
stat -c '%n %t %T' zero
getfattr -d cap 2>/dev/null || true"""
