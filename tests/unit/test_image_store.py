"""The store: blobs, names, IDs, locks; many processes at once; killed, or out of room, at any step."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from framework.images import OCI, Built, busybox_image, digest, docker_archive, tar
from framework.run import ROOT

from hv.errors import ImageError, ImageMissing, StateError
from hv.image.archive import load
from hv.image.fsck import check
from hv.image.media import Descriptor
from hv.image.prune import sweep
from hv.image.store import Store

MISSING = "sha256:" + "0" * 64


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def put(store: Store, built: Built) -> None:
    with store.lock(shared=True):
        for blob in [*built.blobs, built.config]:
            store.put_bytes(blob)
        for name in built.names:
            store.tag(name, store.put_bytes(built.manifest, f"{OCI}manifest.v1+json"))


def files(store: Store) -> list[str]:
    return sorted(os.listdir(f"{store.root}/blobs/sha256")) + os.listdir(f"{store.root}/tmp")


def test_a_blob_is_what_was_put(store):
    data = os.urandom(3 << 20)
    item = store.put(io.BytesIO(data), digest(data), len(data), f"{OCI}layer.v1.tar")
    assert (item.digest, item.size) == (digest(data), len(data))
    assert Path(store.blob_path(item.digest)).read_bytes() == data
    assert store.has(item.digest) and store.has(item.digest, len(data)) and not store.has(item.digest, 1)
    assert store.put(io.BytesIO(data)).digest == item.digest and files(store) == [item.digest[7:]]


@pytest.mark.parametrize("size, wanted, says", [
    (9, "", "has 10 bytes|has more than the 9"), (11, "", "has 10 bytes, and should have 11"),
    (-1, MISSING, "its content has the digest")])
def test_a_blob_that_is_not_what_it_should_be_is_not_kept(store, size, wanted, says):
    with pytest.raises(ImageError, match=says):
        store.put(io.BytesIO(bytes(10)), wanted, size)
    assert files(store) == []


def test_an_endless_stream_ends_at_its_size(store):
    class Endless:
        def read(self, size: int) -> bytes:
            return bytes(size)

    with pytest.raises(ImageError, match="has more than"):
        store.put(Endless(), MISSING, 5 << 20)
    assert files(store) == []


def test_a_stream_that_breaks_leaves_nothing(store):
    class Breaking:
        def read(self, size: int) -> bytes:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put(Breaking())
    assert files(store) == []


def test_a_disk_that_is_full_costs_one_line_and_nothing_else(store):
    before, usual = busybox_image(store), resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = files(store)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, usual[1]))     # tests/root has the real ENOSPC
    try:
        with pytest.raises(ImageError, match=r"image store: writing blob.*File too large"):
            store.put(io.BytesIO(os.urandom(2 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert files(store) == kept and store.resolve("busybox").digest == before.digest


def test_a_partial_download_becomes_a_blob_once_it_verifies(store):
    data = b"layer" * 1000
    item = Descriptor(f"{OCI}layer.v1.tar", digest(data), len(data))
    Path(store.partial(item.digest)).write_bytes(data)
    assert store.adopt(item).digest == item.digest and store.has(item.digest, len(data))
    assert not os.path.exists(store.partial(item.digest))
    item.digest = MISSING
    Path(store.partial(MISSING)).write_bytes(data)
    with pytest.raises(ImageError, match="its content has the digest"):
        store.adopt(item)
    assert not os.path.exists(store.partial(MISSING)) and not store.has(MISSING)


def test_names_ids_and_prefixes(store):
    image = busybox_image(store, "busybox:1")
    other = busybox_image(store, "quay.io/a/b", layers=[tar({"x": b"y"})])
    for text in ("busybox:1", "docker.io/library/busybox:1", f"busybox@{image.digest}", f"busybox:x@{image.digest}",
                 image.id, image.id[7:], image.id[7:19], image.digest, image.id[:30]):
        assert store.resolve(text).id == image.id, text
    assert store.resolve("quay.io/a/b").id == other.id != image.id
    assert image.config.cmd == ["sh"] and [diff for _, diff in image.layers] == image.config.diff_ids
    assert image.size == sum(len(blob) for blob in Built().blobs) + len(image.config.raw) + len(image.manifest.raw)
    for text in ("busybox", "busybox:2", f"quay.io/a/b@{image.digest}", "f" * 64, "sha256:" + "f" * 64, "a/b"):
        with pytest.raises(ImageMissing) as caught:
            store.resolve(text)
        assert "pyhv image pull" in caught.value.hint


def test_a_name_that_reads_as_an_id_is_a_name_first(store):
    image = busybox_image(store, "busybox:1")
    taken = busybox_image(store, image.id[7:13], layers=[tar({"x": b"y"})])
    assert store.resolve(image.id[7:13]).id == taken.id


def test_what_podman_built_is_found_without_localhost(store):
    image = busybox_image(store, "localhost/mine:1")
    assert store.resolve("mine:1").id == image.id
    theirs = busybox_image(store, "mine:1", layers=[tar({"x": b"y"})])
    assert store.resolve("mine:1").id == theirs.id


def test_an_ambiguous_prefix_is_refused(store):
    seen: dict[str, int] = {}
    for n in range(20):         # 20 IDs, 16 first digits
        image = busybox_image(store, f"i:{n}", layers=[tar({"n": str(n).encode()})])
        seen[image.id[7]] = seen.get(image.id[7], 0) + 1
    twice = next(digit for digit, count in seen.items() if count > 1)
    with pytest.raises(ImageError, match="images begin so"):
        store.resolve("sha256:" + twice)


def test_a_name_that_moves_leaves_the_old_image_without_one(store):
    old = busybox_image(store)
    new = busybox_image(store, layers=[tar({"x": b"y"})])
    assert sorted((name, item.digest) for name, item in store.entries()) == sorted(
        [("", old.digest), ("docker.io/library/busybox:latest", new.digest)])
    store.tag("busybox:old", store.entries()[0][1])
    assert set(store.names()) == {"docker.io/library/busybox:latest", "docker.io/library/busybox:old"}
    assert len(store.entries()) == 2
    assert store.untag("busybox:old", keep=True).digest == old.digest
    assert [name for name, item in store.entries() if item.digest == old.digest] == [""]
    with pytest.raises(ImageMissing):
        store.untag("busybox:old")
    assert store.forget(new.digest) == ["docker.io/library/busybox:latest"] and len(store.entries()) == 1


def test_an_index_gives_the_image_of_a_platform(store):
    arm = Built([tar({"arm": b""})], architecture="arm64", names=[])
    amd = Built([tar({"amd": b""})], names=[])
    for built in (arm, amd):
        put(store, Built(built.layers, names=["x:1"], architecture=built.architecture))
        store.forget(digest(built.manifest))
    raw = json.dumps({"schemaVersion": 2, "manifests": [arm.descriptor(), amd.descriptor(), {
        **amd.descriptor(), "digest": MISSING, "platform": {"os": "linux", "architecture": "s390x"}}]}).encode()
    store.tag("both", store.put_bytes(raw, f"{OCI}index.v1+json"))
    assert store.resolve("both", "linux/arm64").digest == digest(arm.manifest)
    found = store.resolve("both", "linux/amd64")
    assert (found.digest, found.index) == (digest(amd.manifest), digest(raw))
    assert store.resolve(f"both@{digest(raw)}", "linux/amd64").digest == found.digest
    with pytest.raises(ImageMissing, match="its part for linux/s390x is not in the store"):
        store.resolve("both", "linux/s390x")
    with pytest.raises(ImageError, match="no image for linux/riscv64"):
        store.resolve("both", "linux/riscv64")


def test_images_for_other_hosts_only_are_listed_and_removed(store):
    built = Built([tar({"x": b""})], architecture="s390x", names=["one"])
    put(store, built)
    raw = json.dumps({"schemaVersion": 2, "manifests": [built.descriptor()]}).encode()
    store.tag("both", store.put_bytes(raw, f"{OCI}index.v1+json"))
    store.untag("one")
    with pytest.raises(ImageError, match="no image for linux/"):
        store.resolve("both")
    assert store.load(store.names()["docker.io/library/both:latest"], listed=True).config.architecture == "s390x"
    assert store.resolve(digest(built.config)[7:20]).name == "docker.io/library/both:latest"
    assert not check(store)


def test_another_architectures_image_is_refused_by_name(store):
    put(store, Built([tar({"arm": b""})], architecture="s390x", names=["z"]))
    image = store.resolve("z")
    with pytest.raises(ImageError, match="is for linux/s390x, this host is linux/") as caught:
        image.check_platform()
    assert "--platform" in caught.value.hint
    busybox_image(store).check_platform()
    with pytest.raises(ImageMissing, match="is for linux/s390x, not linux/amd64"):
        store.resolve("z", "linux/amd64")


def test_damage_of_one_image_is_named_and_spares_the_others(store):
    image, other = busybox_image(store), busybox_image(store, "other", layers=[tar({"x": b"y"})])
    os.unlink(store.blob_path(image.id))
    with pytest.raises(ImageError, match=f"{image.id} is missing"):
        store.resolve("busybox")
    assert store.resolve("other").id == other.id == store.resolve(other.id[7:20]).id
    Path(store.root, "index.json").write_text("{")
    with pytest.raises(ImageError, match=r"index\.json: is not JSON") as caught:
        store.resolve("other")
    assert "fsck --repair" in caught.value.hint


def test_a_blob_that_is_a_symbolic_link_is_not_followed(store, tmp_path):
    image = busybox_image(store)
    path = store.blob_path(image.digest)
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(ImageError, match="Too many levels of symbolic links"):
        store.resolve("busybox")


def test_users_are_noted_and_gone(store):
    image = busybox_image(store)
    with store.lock(shared=True):
        for user in ("a", "b", "a"):
            store.use(image, user)
    assert store.users() == {image.id: {"a": image.digest, "b": image.digest}}
    store.unuse(image.id, "a")
    store.unuse(image.id, "nobody")
    assert store.users() == {image.id: {"b": image.digest}}
    store.unuse(image.id, "b")
    assert store.users() == {}
    for user in ("", ".", "../x", "a/b", "a\0b"):
        with pytest.raises(ImageError):
            store.use(image, user)


def test_users_come_and_go_at_once(store):
    image = busybox_image(store)
    failed: list[BaseException] = []

    def some(worker: int) -> None:
        try:
            for _ in range(100):
                store.use(image, f"w{worker}")
                store.unuse(image.id, f"w{worker}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=some, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and store.users() == {} and os.listdir(f"{store.root}/users") == []


def test_whoever_removes_waits_for_whoever_adds(store):
    busybox_image(store)
    with store.lock(shared=True), store.lock(shared=True):
        with pytest.raises(StateError, match="another command is at work"), store.lock(shared=False, wait=0.05):
            pass
        assert sweep(store, wait=0.05).later
    with store.lock(shared=False, wait=0.05), pytest.raises(StateError), store.lock(shared=True, wait=0.05):
        pass
    assert not sweep(store).later


def test_many_name_at_once_and_none_is_lost(store):
    busybox_image(store)
    item = store.names()["docker.io/library/busybox:latest"]

    def some(worker: int) -> None:
        for n in range(10):
            store.tag(f"w{worker}:{n}", item)

    threads = [threading.Thread(target=some, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(store.names()) == 41


def test_two_loads_of_one_image_at_once(store, tmp_path):
    archive = docker_archive(tmp_path / "a.tar", Built())
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from hv.image.archive import load; " \
           f"from hv.image.store import Store; load(Store({store.root!r}), {str(archive)!r})"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0, 0, 0, 0]
    assert store.resolve("busybox").id == digest(Built().config) and not check(store)


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from hv.image.archive import load
from hv.image.store import Store
load(Store(sys.argv[2]), sys.argv[3])
"""
STEPS = ("mkdir", "write", "fdatasync", "rename", "fsync")


@pytest.mark.skipif(not shutil.which("strace"), reason="not installed: strace")
@pytest.mark.parametrize("call", STEPS)
def test_killed_at_any_step_the_store_is_whole(tmp_path, call):
    """SIGKILL at each call that changes the store: the names that are there work, the next load does the rest."""
    first = docker_archive(tmp_path / "1.tar", Built([os.urandom(300 << 10)], names=["first"]))
    second = docker_archive(tmp_path / "2.tar", Built([os.urandom(300 << 10), b"small"], names=["second"]))
    for at in range(1, 100):
        store = Store(str(tmp_path / f"s{at}"))
        if at % 3 == 0 and call != "mkdir":     # else the making of the store is killed too
            load(store, str(first))
        traced = [sys.executable, "-ISEB", "-c", LOAD, str(ROOT), store.root, str(second)]
        command = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e",
                   f"inject={call}:signal=KILL:when={at}", *traced]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        for name in store.names():
            store.resolve(name)
        assert not [finding.what for finding in check(store) if not finding.stray and finding.what != "oci-layout"]
        load(store, str(second))
        assert store.resolve("second").id
        sweep(store)
        assert not [(finding.what, finding.problem) for finding in check(store)], at
    assert at > 4
