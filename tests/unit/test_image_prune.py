"""`rm` and `prune`: what goes, what stays because something needs it, and who must wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from framework.images import OCI, Built, busybox_image, digest, docker_archive, tar
from framework.run import ROOT

from hv.errors import ImageError, ImageMissing, StateError
from hv.image.archive import load
from hv.image.filters import matcher
from hv.image.fsck import check
from hv.image.layers import Layers
from hv.image.prune import prune, remove, sweep
from hv.image.store import Store

BOX = "docker.io/library/busybox:latest"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def blobs(store: Store) -> set[str]:
    return {"sha256:" + name for name in os.listdir(f"{store.root}/blobs/sha256")}


def needed_by(*images: object) -> set[str]:
    return {item for image in images for item in (
        image.digest, image.id, *(layer.digest for layer, _ in image.layers))}       # type: ignore[attr-defined]


def other(store: Store, name: str = "other") -> object:
    return busybox_image(store, name, layers=[tar({"x": name.encode()})])


def test_the_last_name_takes_the_image_and_not_what_others_need(store):
    first, second = busybox_image(store), other(store)
    store.tag("again", store.names()[BOX])
    freed = remove(store, "busybox")
    assert (freed.untagged, freed.images, freed.blobs) == ([BOX], [], [])
    freed = remove(store, "again")
    assert freed.images == [first.digest] and set(freed.blobs) == {first.digest, first.id}   # its layer is shared
    assert blobs(store) == needed_by(second) and store.resolve("other").id == second.id
    assert freed.bytes == len(first.config.raw) + len(first.manifest.raw)
    remove(store, "other")
    assert blobs(store) == set() and store.entries() == [] and not check(store)


def test_by_id(store):
    image = busybox_image(store)
    remove(store, image.id[7:19])
    assert blobs(store) == set()
    image = busybox_image(store)
    store.tag("again", store.names()[BOX])
    with pytest.raises(StateError, match="has the names") as caught:
        remove(store, image.id)
    assert "--force" in caught.value.hint
    freed = remove(store, image.id, force=True)
    assert set(freed.untagged) == {BOX, "docker.io/library/again:latest"} and blobs(store) == set()


def test_by_id_all_forms_of_one_image_go(store):
    """Compressed and not, an image has one ID and two manifests."""
    image, packed = busybox_image(store, "a"), busybox_image(store, "b", compression="gzip")
    assert image.id == packed.id and image.digest != packed.digest
    remove(store, "a")
    assert store.resolve("b").digest == packed.digest and store.resolve(image.id).digest == packed.digest
    busybox_image(store, "a")
    remove(store, image.id, force=True)
    assert store.entries() == [] and blobs(store) == set()


def test_what_is_not_there(store):
    for text in ("nothing", "f" * 12, "sha256:" + "f" * 64, "quay.io/a/b@sha256:" + "f" * 64):
        with pytest.raises(ImageMissing):
            remove(store, text)
    assert prune(store).blobs == [] and sweep(store).bytes == 0


def test_an_image_in_use_is_refused_and_forced_it_stays_until_it_is_not(store):
    image, unpacked = busybox_image(store), Layers(store)
    folders = unpacked.ensure(image)
    with store.lock(shared=True):
        store.use(image, "web")
    for text in ("busybox", image.id):
        with pytest.raises(StateError, match="is used by web"):
            remove(store, text)
    freed = remove(store, "busybox", force=True)
    assert freed.untagged == [BOX] and freed.images == [] and needed_by(image) == blobs(store)
    assert store.resolve(image.id).id == image.id and all(os.path.isdir(folder) for folder in folders)
    assert prune(store, everything=True).images == []
    assert all(os.path.isdir(folder) for folder in folders)
    store.unuse(image.id, "web")
    freed = prune(store)
    assert freed.images == [image.digest] and blobs(store) == set() and freed.layers == len(folders)
    assert not any(os.path.exists(folder) for folder in folders)


def test_an_image_that_went_between_look_up_and_use_is_missed(store):
    image = busybox_image(store)
    Layers(store).ensure(image)
    remove(store, "busybox")
    with pytest.raises(ImageMissing, match="has been removed meanwhile"):
        store.use(image, "web")
    assert store.users() == {}


def test_layers_in_use_outlive_even_a_damaged_manifest(store):
    image = busybox_image(store)
    folders = Layers(store).ensure(image)
    with store.lock(shared=True):
        store.use(image, "web")
    Path(store.blob_path(image.digest)).write_text("{}")
    other(store)
    remove(store, "other")
    prune(store, everything=True)
    assert all(os.path.isdir(folder) for folder in folders)


def test_prune_removes_what_has_no_name_and_all_what_nothing_uses(store):
    old, new = busybox_image(store), busybox_image(store, layers=[tar({"x": b"y"})])
    used = other(store)
    store.use(used, "web")      # type: ignore[arg-type]
    freed = prune(store)
    assert freed.images == [old.digest] and blobs(store) == needed_by(new, used)
    freed = prune(store, everything=True)
    assert freed.images == [new.digest] and freed.untagged == [BOX] and blobs(store) == needed_by(used)
    assert set(store.names()) == {"docker.io/library/other:latest"}


def test_prune_by_filter(store):
    for year, label in (("2020", "a"), ("2024", "b")):
        built = Built(names=[f"x:{year}"], created=f"{year}-01-01T00:00:00Z", run={"Labels": {"l": label}})
        load(store, str(docker_archive(Path(store.root).parent / "a.tar", built)))
    allowed = ("until", "label")
    prune(store, True, matcher(["until=2022-01-01T00:00:00Z", "label=l=b"], store, allowed))
    assert len(store.names()) == 2
    prune(store, True, matcher(["until=2022-01-01T00:00:00Z"], store, allowed))
    assert set(store.names()) == {"docker.io/library/x:2024"}
    prune(store, True, matcher(["label!=l=b"], store, allowed))
    assert len(store.names()) == 1
    prune(store, True, matcher(["label=l"], store, allowed))
    assert store.names() == {}


def test_interrupted_pulls_are_kept_a_week_or_until_all_goes(store):
    busybox_image(store)
    young, old = store.partial("sha256:" + "1" * 64), store.partial("sha256:" + "2" * 64)
    for path in (young, old):
        Path(path).write_bytes(b"x" * 100)
    week_ago = time.time() - 8 * 86400
    os.utime(old, (week_ago, week_ago))
    assert prune(store).bytes == 100 and os.path.exists(young) and not os.path.exists(old)
    prune(store, everything=True)
    assert not os.path.exists(young)


def test_a_pull_under_way_loses_nothing(store):
    """Its blobs have no name yet: prune and rm see its lock, free nothing, and say so."""
    image = busybox_image(store)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from hv.image.store import Store
store = Store({store.root!r})
with store.lock(shared=True):
    store.put_bytes(b"a layer")
    print("there", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pulling:
        assert pulling.stdout and pulling.stdout.readline() == b"there\n"
        freed = remove(store, "busybox")
        assert freed.later and freed.images == [image.digest] and freed.blobs == []
        assert prune(store, everything=True).later and digest(b"a layer") in blobs(store)
        pulling.kill()
    assert set(sweep(store).blobs) == needed_by(image) | {digest(b"a layer")}


def test_damaged_images_can_be_removed_by_name_and_digest(store):
    image, item = busybox_image(store), busybox_image(store, "other", layers=[tar({"x": b"y"})])
    os.unlink(store.blob_path(image.digest))
    Path(store.blob_path(item.id)).write_text("{")
    assert remove(store, "busybox").untagged == [BOX]
    with pytest.raises(ImageError):
        store.resolve("other")
    assert remove(store, item.digest[7:20]).untagged == ["docker.io/library/other:latest"]
    assert blobs(store) == set()


def test_rm_of_an_index_takes_its_images(store):
    import json

    built = Built()
    with store.lock(shared=True):
        for blob in [*built.blobs, built.config, built.manifest]:
            store.put_bytes(blob)
        raw = json.dumps({"schemaVersion": 2, "manifests": [built.descriptor(), built.descriptor() | {
            "digest": "sha256:" + "0" * 64, "platform": {"os": "linux", "architecture": "s390x"}}]}).encode()
        store.tag("both", store.put_bytes(raw, f"{OCI}index.v1+json"))
    prune(store)
    assert store.resolve("both", "linux/amd64").id == digest(built.config)
    assert remove(store, digest(raw)).untagged == ["docker.io/library/both:latest"] and blobs(store) == set()


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
from hv.image.prune import prune
from hv.image.store import Store
at = int(sys.argv[1])
def hook(event, arguments):
    global at
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and {store!r} in repr(arguments):
        at -= 1
        if at == 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
prune(Store({store!r}), everything=True)
"""


def test_killed_at_any_step_the_rest_is_whole(tmp_path):
    steps = 0
    for at in range(1, 60):
        store = Store(str(tmp_path / f"s{at}"))
        busybox_image(store, "gone", layers=[tar({"x": b"y"})])
        kept = busybox_image(store, "kept")
        Layers(store).ensure(store.resolve("gone"))
        store.use(kept, "web")
        script = KILLED.format(root=str(ROOT), store=store.root)
        done = subprocess.run([sys.executable, "-c", script, str(at)], capture_output=True, text=True, timeout=60)
        assert store.resolve("kept").id == kept.id
        assert not [finding.what for finding in check(store) if not finding.stray]
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        steps += 1
        prune(store, everything=True)
        assert not check(store) and blobs(store) == needed_by(kept)
    assert steps > 10
