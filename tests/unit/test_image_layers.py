"""Unpacked layers in a store: shared, made once, whole or not at all, found again quickly."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from framework.images import Built, Link, Special, busybox_image, tar
from framework.run import ROOT as CHECKOUT

from hv.errors import ImageError
from hv.image.image import Image
from hv.image.layers import Layers
from hv.image.store import Store

SHARED = tar([("./", None), ("shared", b"1" * 5000)])
ROOT = os.geteuid() == 0


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "images"))


def image(store: Store, *layers: bytes, name: str = "x", compression: str = "none") -> Image:
    built = Built(list(layers), compression=compression)
    with store.lock(shared=True):
        for blob in [*built.blobs, built.config]:
            store.put_bytes(blob)
        store.tag(name, store.put_bytes(built.manifest, "application/vnd.oci.image.manifest.v1+json"))
    return store.resolve(name)


def leftovers(store: Store) -> list[str]:
    return os.listdir(f"{store.root}/layers/tmp")


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_uppermost_first_and_each_once(store, compression):
    heard: dict[str, list[tuple[int, int]]] = {}
    made = busybox_image(store, layers=[tar([("a", b"1")]), tar([("a", b"2")])], compression=compression)
    folders = Layers(store).ensure(made, lambda layer, done, size: heard.setdefault(layer, []).append((done, size)))
    assert [Path(folder, "a").read_bytes() for folder in folders[:2]] == [b"2", b"1"]
    assert Path(folders[2], "bin/busybox").is_file() and len(folders) == 3
    assert [f"{store.root}/layers/sha256/{diff_id[7:]}/diff" for _, diff_id in made.layers[::-1]] == folders
    assert {layer: rows[-1] for layer, rows in heard.items()} == {
        diff_id: (layer.size, layer.size) for layer, diff_id in made.layers}
    heard.clear()
    assert Layers(store).ensure(made, lambda *row: heard.setdefault("", [])) == folders and not heard
    assert leftovers(store) == []


def test_layers_are_shared_between_images(store):
    one, two = (image(store, SHARED, tar([(name, b"")]), name=name) for name in ("one", "two"))
    layers = Layers(store)
    first, second = layers.ensure(one), layers.ensure(two)
    assert first[1] == second[1] and first[0] != second[0] and len(layers.names()) == 3
    assert layers.unused([one, two]) == []
    assert layers.unused([one]) == [two.layers[1][1][7:]]
    assert layers.remove(layers.unused([one])) == 0 and layers.remove(["0" * 64]) == 0
    assert layers.ensure(one) == first and len(layers.names()) == 2
    assert layers.size(one.layers[0][1][7:]) == 5000
    assert layers.ensure(two) == second                 # its record was taken away with its layer
    assert layers.remove(layers.names()) == 5000
    assert layers.names() == [] and os.listdir(f"{store.root}/layers/images") == [] and leftovers(store) == []


def test_a_layer_that_stands_twice_or_hides_all_below(store):
    empty, other = tar([("./", None)]), tar([("./", None), ("f", b"")])
    assert len(Layers(store).ensure(image(store, empty, other, empty))) == 2
    made = image(store, other, tar([("./", None), (".wh..wh..opq", b""), ("g", b"")]), empty, name="opaque")
    assert [sorted(os.listdir(folder)) for folder in Layers(store).ensure(made)] == [[], ["g"]]
    nothing = image(store, name="nothing")
    for _ in range(2):
        (folder,) = Layers(store).ensure(nothing)
        assert os.listdir(folder) == []


@pytest.mark.skipif(not ROOT, reason="owners take root")
def test_folders_that_a_layer_does_not_name_are_as_below(store):
    below = tar([("./", None), ("tmp/", Special({"type": tarfile.DIRTYPE, "mode": 0o1777})), ("opt/", None),
                 ("srv/", Special({"type": tarfile.DIRTYPE, "mode": 0o2770, "uid": 7, "gid": 8}))])
    above = tar([("tmp/x/y", b"1"), ("srv/z", b"2")])
    plain = tar([("./", None), ("tmp/", None)])
    layers = Layers(store)
    first = layers.ensure(image(store, plain, above, name="plain"))
    second = layers.ensure(image(store, below, above, name="below"))
    assert first[0] != second[0] and len(layers.names()) == 4
    looks = [(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
             for status in (os.stat(f"{second[0]}/{name}") for name in (".", "tmp", "tmp/x", "srv"))]
    assert looks == [(0o755, 0, 0), (0o1777, 0, 0), (0o755, 0, 0), (0o2770, 7, 8)]
    assert stat.S_IMODE(os.stat(f"{first[0]}/tmp").st_mode) == 0o755
    assert layers.unused([store.resolve("plain"), store.resolve("below")]) == []
    assert layers.ensure(store.resolve("below")) == second


def test_a_bad_layer_leaves_nothing_and_the_good_ones_stay(store):
    good, bad = tar([("f", b"1")]), tar([("../f", b"1")])
    with pytest.raises(ImageError, match="leads out"):
        Layers(store).ensure(image(store, good, bad))
    assert leftovers(store) == [] and os.listdir(f"{store.root}/layers/images") == []
    for folder in Layers(store).names():
        assert os.listdir(f"{store.root}/layers/sha256/{folder}/diff") == ["f"]


def test_a_layer_with_another_content_is_refused(store):
    made = image(store, tar([("f", b"1")]))
    descriptor, _ = made.layers[0]
    made.layers[0] = (descriptor, "sha256:" + "ab" * 32)
    with pytest.raises(ImageError, match="its content has the digest sha256:"):
        Layers(store).ensure(made)
    assert leftovers(store) == [] and Layers(store).names() == []
    os.unlink(store.blob_path(descriptor.digest))
    with pytest.raises(ImageError, match="is missing"):
        Layers(store).ensure(store.resolve("x"))
    assert leftovers(store) == []


def test_what_is_not_settled_is_made_again_after_a_boot(store, monkeypatch):
    one, two = image(store, tar([("f", b"1")]), name="one"), image(store, tar([("f", b"2")]), name="two")
    layers = Layers(store)
    (settled,) = layers.ensure(one)
    layers.settle()
    (lost,) = layers.ensure(two)
    for folder in (settled, lost):
        Path(folder, "f").write_bytes(b"")            # as after a crash of the host
    monkeypatch.setattr("hv.image.layers.boot_id", lambda: "next")
    monkeypatch.setattr("hv.image.unpacking.boot_id", lambda: "next")
    assert layers.ensure(one) == [settled] and layers.ensure(two) == [lost]
    assert Path(settled, "f").read_bytes() == b"" and Path(lost, "f").read_bytes() == b"2"
    assert leftovers(store) == []


SCRIPT = """
import sys, time
from hv.image.layers import Layers
from hv.image.store import Store
store = Store(sys.argv[1])
slow = float(sys.argv[2])
def progress(*row):
    print(row, flush=True)
    time.sleep(slow)
print(Layers(store).ensure(store.resolve("x"), progress), flush=True)
"""


def process(store: Store, slow: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, store.root, str(slow)], stdout=subprocess.PIPE, text=True,
                            env={"PYTHONPATH": str(CHECKOUT)})


def test_many_processes_at_once_make_each_layer_once(store):
    image(store, *(tar([(f"f{number}", b"x" * 100_000), ("d/", None)]) for number in range(6)))
    running = [process(store, 0.01) for _ in range(5)]
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in running]
    assert [child.returncode for child in running] == [0] * 5
    assert len({lines[-1] for lines in outputs}) == 1
    made = [layer for lines in outputs for layer in {line.split(",")[0] for line in lines[:-1]}]
    assert len(made) == len(set(made)) == 6
    assert leftovers(store) == [] and len(Layers(store).names()) == 6


def test_a_killed_process_leaves_what_the_next_one_removes(store):
    image(store, tar([(f"f{number}", os.urandom(400_000)) for number in range(20)]))
    child = process(store, 0.2)
    assert child.stdout and child.stdout.readline() and child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    assert len(leftovers(store)) == 1 and Layers(store).names() == []
    waiting = process(store)
    assert "diff" in waiting.communicate(timeout=30)[0].splitlines()[-1]
    assert leftovers(store) == [] and len(Layers(store).names()) == 1
    os.makedirs(f"{store.root}/layers/tmp/{'ab' * 32}/diff/d")
    Layers(store).remove([])
    assert leftovers(store) == []


def test_an_interrupt_leaves_nothing(store):
    image(store, *(tar([(f"f{number}", os.urandom(3_000_000))]) for number in range(3)))
    child = process(store, 0.2)
    assert child.stdout and child.stdout.readline()
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=10)
    assert child.returncode != 0 and leftovers(store) == []


def test_finding_an_unpacked_image_takes_less_than_a_millisecond_and_loads_little(store):
    made = image(store, *(tar([(f"f{number}", b"")]) for number in range(40)))
    layers = Layers(store)
    layers.ensure(made)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        layers.ensure(made)
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 0.001
    code = "import sys; import hv.image.layers, hv.image.overlay; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(CHECKOUT)}, timeout=30,
                            capture_output=True, text=True, check=True).stdout.split()
    assert not {"tarfile", "threading", "zlib", "pathlib", "hashlib", "re", "typing", "ctypes", "json"} & set(loaded)


def test_links_between_layers_are_refused_in_one_line(store):
    made = image(store, tar([("a", b"1")]), tar([("b", Link("a", hard=True))]))
    with pytest.raises(ImageError, match="is a link to a, which is not in the layer"):
        Layers(store).ensure(made)
