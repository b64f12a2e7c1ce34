"""Volumes: made, used, filled from an image, removed; whole or not there."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from framework.run import ROOT as CHECKOUT

from hv.errors import ConfigError, StateError
from hv.image.volumes import Volumes

ROOT = os.geteuid() == 0


@pytest.fixture
def volumes(tmp_path) -> Volumes:
    (tmp_path / "data/instances").mkdir(parents=True)
    return Volumes(str(tmp_path / "data/volumes"))


@pytest.fixture
def image(tmp_path):
    """A root file system with something at /srv; its descriptor, and the folder."""
    place = tmp_path / "rootfs/srv"
    (place / "d/e").mkdir(parents=True)
    (place / "f").write_bytes(b"content")
    (place / "h").hardlink_to(place / "f")
    (place / "l").symlink_to("/etc/passwd")
    os.mkfifo(place / "p", 0o640)
    (place / "d/e/x").write_text("1")
    os.truncate(place / "d/e/x", 1 << 30)
    (place / "f").chmod(0o4711)
    os.setxattr(place / "f", "user.a", b"1")
    os.utime(place / "f", ns=(5, 6))
    os.utime(place / "l", ns=(7, 8), follow_symlinks=False)
    if ROOT:
        os.chown(place / "f", 11, 12)
        (place / "f").chmod(0o4711)
        os.chown(place, 33, 34)
    place.chmod(0o3770)
    os.utime(place / "d", ns=(9, 10))
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(place / "s"))
    os.utime(place, ns=(11, 12))
    fd = os.open(tmp_path / "rootfs", os.O_PATH)
    yield fd, place
    os.close(fd)


def look(folder: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        if stat.S_ISSOCK(status.st_mode):
            continue
        found[str(path.relative_to(folder))] = (
            status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_nlink,
            (0, 0) if path.is_dir() else (status.st_size, status.st_blocks),
            os.readlink(path) if path.is_symlink() else "",
            os.listxattr(path, follow_symlinks=False))
    return found


def instance(volumes: Volumes, name: str) -> str:
    os.makedirs(f"{os.path.dirname(volumes.root)}/instances/{name}", exist_ok=True)
    return name


@pytest.mark.skipif(not ROOT, reason="somebody else is needed")
def test_nobody_else_gets_at_what_an_instance_puts_there():
    """Root of an instance may make set-user-ID files: for other users of the host they would be the host root's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        os.chmod(top, 0o755)
        place = Path(Volumes(f"{top}/data/volumes").create("web").mountpoint, "id")
        place.write_bytes(Path("/usr/bin/id").read_bytes())
        place.chmod(0o4755)
        # sh has lost the capabilities that setpriv itself runs with until then
        found = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", '"$0"; :',
                                str(place)], text=True, capture_output=True, check=False)
    assert not found.stdout and "denied" in found.stderr


def test_made_listed_found_removed(volumes):
    assert volumes.ls() == [] and volumes.unused(everything=True) == []
    made = volumes.create("web", {"a": "b"})
    assert volumes.create("web", {"other": "x"}).labels == {"a": "b"}       # it is there: as docker does
    nameless = volumes.create(anonymous=True)
    assert len(nameless.name) == 64 and nameless.anonymous and not made.anonymous
    assert {volume.name for volume in volumes.ls()} == {"web", nameless.name}
    assert volumes.get(nameless.name[:8]).name == nameless.name
    assert made.mountpoint == f"{volumes.root}/web/_data" and os.listdir(made.mountpoint) == []
    assert abs(made.created - time.time()) < 60
    Path(made.mountpoint, "f").write_text("1")
    assert [volume.name for volume in volumes.unused()] == [nameless.name]
    assert {volume.name for volume in volumes.unused(everything=True)} == {"web", nameless.name}
    volumes.remove("web")
    volumes.remove("web", force=True)
    with pytest.raises(ConfigError, match="volume web: there is none of that name"):
        volumes.remove("web")
    assert sorted(os.listdir(volumes.root)) == [".lock", nameless.name]


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "-x", "a b", "a\0", "n" * 129, "ä", "/etc"])
def test_bad_names(volumes, name):
    for call in (volumes.create, volumes.get, volumes.remove, lambda name: volumes.use(name, "i"), volumes.users,
                 lambda name: volumes.use("good", name), lambda name: volumes.fill(name, 0, "/")):
        with pytest.raises(ConfigError, match="is no name for a volume"):
            call(name)


def test_what_the_local_driver_does_not_do(volumes):
    with pytest.raises(ConfigError, match="driver nfs"):
        volumes.create("x", driver="nfs")
    with pytest.raises(ConfigError, match="option type"):
        volumes.create("x", options={"type": "tmpfs"})


def test_used_by_instances_until_they_are_gone(volumes):
    one, two = instance(volumes, "one"), instance(volumes, "two")
    volumes.use("v", one)
    nameless = volumes.use("n" * 8, one, anonymous=True)
    volumes.use("v", two)
    assert volumes.users("v") == ["one", "two"]
    with pytest.raises(StateError, match="volume v: is used by one, two"):
        volumes.remove("v", force=True)
    volumes.release(one)
    assert volumes.users("v") == ["two"] and volumes.get(nameless.name)
    volumes.use(nameless.name, one)
    volumes.release(one, remove_anonymous=True)
    volumes.release(two, remove_anonymous=True)
    assert [volume.name for volume in volumes.ls()] == ["v"]
    volumes.use("v", two)
    os.rmdir(f"{os.path.dirname(volumes.root)}/instances/two")         # it is gone, however
    volumes.remove("v")


def test_an_empty_volume_is_filled_from_the_image(volumes, image):
    fd, place = image
    for name, target in (("a", "/srv"), ("b", "srv/../srv/")):
        made = volumes.create(name)
        assert volumes.fill(name, fd, target)
        assert look(Path(made.mountpoint)) == look(place)
        assert not volumes.fill(name, fd, "/srv")                # it is not empty
        assert os.path.samefile(f"{made.mountpoint}/f", f"{made.mountpoint}/h")
    assert Path(made.mountpoint, "d/e/x").stat().st_blocks < 16
    volumes.create("c")
    assert not volumes.fill("c", fd, "/nothing") and not volumes.fill("c", fd, "/srv/f")
    assert sorted(os.listdir(f"{volumes.root}/c")) == ["_data", "users", "volume.json"]


def test_a_link_in_the_image_never_leads_out(volumes, image, tmp_path):
    fd, place = image
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/f").write_text("secret")
    for number, target in enumerate([str(tmp_path / "secret"), "../../../../../.." + str(tmp_path / "secret")]):
        (place / f"out{number}").symlink_to(target)
        volumes.create(f"v{number}")
        assert not volumes.fill(f"v{number}", fd, f"/srv/out{number}")
    volumes.create("w")
    assert not volumes.fill("w", fd, "/../../secret")


def test_a_killed_filling_is_done_again(volumes, image):
    fd, place = image
    for number in range(3000):
        (place / f"many{number}").touch()
    made = volumes.create("v")
    code = ("import os, sys\nfrom hv.image.volumes import Volumes\nprint('begun', flush=True)\n"
            "Volumes(sys.argv[1]).fill('v', os.open(sys.argv[2], os.O_PATH), '/srv')")
    child = subprocess.Popen([sys.executable, "-c", code, volumes.root, place.parent], stdout=subprocess.PIPE,
                             env={"PYTHONPATH": str(CHECKOUT)})
    end = time.monotonic() + 20
    while len(os.listdir(made.mountpoint)) < 5 and time.monotonic() < end:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    assert 5 <= len(os.listdir(made.mountpoint)) < 3006
    assert volumes.fill("v", fd, "/srv")
    assert look(Path(made.mountpoint)) == look(place)
    assert not volumes.fill("v", fd, "/srv")


def test_many_at_once(volumes, image):
    fd, place = image
    results: list[object] = []

    def work(number: int) -> None:
        volumes.use("v", instance(volumes, f"i{number}"))
        results.append(volumes.fill("v", fd, "/srv"))
        volumes.use(f"n{number}", f"i{number}", anonymous=True)
        volumes.release(f"i{number}", remove_anonymous=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [False] * 7 + [True]
    assert look(Path(volumes.get("v").mountpoint)) == look(place)
    assert sorted(os.listdir(volumes.root)) == [".lock", "v"] and volumes.users("v") == []


def test_what_killed_processes_left_is_swept(volumes):
    volumes.create("v")
    for name in (".new-1", ".gone-2"):
        (Path(volumes.root) / name / "_data/x").mkdir(parents=True)
    volumes.remove("v")
    assert os.listdir(volumes.root) == [".lock"]
