"""Beside skopeo and podman: they read our store and archives, we read theirs; and a disk that is really full."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import needs_busybox, needs_root
from framework.engines import Podman, needs
from framework.images import Built, Link, busybox_image, busybox_layer, digest, docker_archive, oci_archive, tar
from framework.run import PYHV

from hv.image.archive import load
from hv.image.archive_write import Output, save
from hv.image.fsck import check
from hv.image.store import Store

pytestmark = [needs_root, needs_busybox]
UPPER = tar({"etc/": None, "etc/motd": b"hi", "etc/again": Link("etc/motd", hard=True), ".wh.root": b""})
NAMES = {"docker.io/library/busybox:latest", "quay.io/a/b:1", "localhost/z:1"}


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "store"))
    busybox_image(store, layers=[UPPER])
    busybox_image(store, "quay.io/a/b:1", layers=[UPPER], compression="gzip", Entrypoint=["/bin/sh"])
    busybox_image(store, "localhost/z:1", layers=[UPPER], compression="zstd", Labels={"a": "b"})
    return store


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def podman() -> Iterator[Podman]:
    """With a store of its own, which is empty."""
    engine = Podman()
    engine.said("rmi", "--all", "--force")
    yield engine
    engine.close()


def images(podman: Podman) -> dict[str, str]:
    """Name to ID."""
    rows: list[dict[str, Any]] = json.loads(podman.said("images", "--format", "json"))
    return {name: "sha256:" + row["Id"] for row in rows for name in row.get("Names") or [""]}


@needs("skopeo")
def test_skopeo_reads_the_store_as_it_stands(store, tmp_path):
    for name in NAMES:
        image = store.resolve(name)
        found = json.loads(run("skopeo", "inspect", f"oci:{store.root}:{name}"))
        assert found["Digest"] == image.digest and found["Layers"] == [layer.digest for layer, _ in image.layers]
        run("skopeo", "copy", f"oci:{store.root}:{name}", f"dir:{tmp_path / name.replace('/', '-')}")
    run("skopeo", "copy", "--dest-compress-format", "zstd", f"oci:{store.root}:quay.io/a/b:1",
        f"oci:{tmp_path / 'theirs'}:quay.io/a/b:1")
    again = Store(str(tmp_path / "again"))
    assert [item.names for item in load(again, str(tmp_path / "theirs"))] == [["quay.io/a/b:1"]]
    assert again.resolve("quay.io/a/b:1").id == store.resolve("quay.io/a/b:1").id and not check(again)


@needs("podman")
def test_podman_reads_the_store_as_it_stands(store, podman):
    for name in NAMES - {"localhost/z:1"}:
        assert podman.said("pull", "--quiet", f"oci:{store.root}:{name}") == store.resolve(name).id[7:]


@needs("podman")
@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_podman_reads_what_we_save(store, podman, tmp_path, form):
    for name in sorted(NAMES):
        with Output(str(tmp_path / "a.tar")) as output:
            save(store, [name], output, form)
        podman.said("load", "--input", str(tmp_path / "a.tar"))
    assert images(podman) == {name: store.resolve(name).id for name in NAMES}


@needs("podman")
def test_podman_reads_several_in_one(store, podman, tmp_path):
    with Output(str(tmp_path / "a.tar")) as output:
        save(store, sorted(NAMES), output)
    podman.said("load", "--input", str(tmp_path / "a.tar"))
    assert images(podman) == {name: store.resolve(name).id for name in NAMES}


@needs("podman")
def test_we_read_what_podman_saves(podman, tmp_path):
    names = ["docker.io/library/busybox:latest", "quay.io/a/b:1"]
    docker_archive(tmp_path / "in.tar", Built([busybox_layer(), UPPER]),
                   Built([busybox_layer()], names[1:], {"Cmd": ["x"]}))
    podman.said("load", "--input", str(tmp_path / "in.tar"))
    ids = images(podman)
    for form, options in (("docker-archive", ["--multi-image-archive"]), ("docker-archive", []), ("oci-archive", []),
                          ("oci-dir", [])):
        store, path = Store(str(tmp_path / f"{form}{len(options)}")), tmp_path / f"{form}{len(options)}.tar"
        asked = names if options else names[:1]
        podman.said("save", "--quiet", *options, "--format", form, "--output", str(path), *asked)
        assert [name for item in load(store, str(path)) for name in item.names] == asked
        if form == "docker-archive":        # for the others podman writes the configuration anew
            assert {name: store.resolve(name).id for name in asked} == {name: ids[name] for name in asked}
        found = store.resolve(names[0]).config
        assert found.cmd == ["sh"] and found.diff_ids == [digest(busybox_layer()), digest(UPPER)] and not check(store)


@needs("skopeo")
@pytest.mark.parametrize("kind, options", [("docker-archive", []), ("oci-archive", []),
                                           ("oci-archive", ["--dest-compress-format", "zstd"])], ids=str)
def test_we_read_what_skopeo_writes(tmp_path, kind, options):
    source = oci_archive(tmp_path / "in.tar", Built([busybox_layer(), UPPER], ["quay.io/a/b:1"]))
    run("skopeo", "copy", *options, f"oci-archive:{source}", f"{kind}:{tmp_path / 'a.tar'}:quay.io/a/b:1")
    store = Store(str(tmp_path / "store"))
    assert [item.names for item in load(store, str(tmp_path / "a.tar"))] == [["quay.io/a/b:1"]] and not check(store)
    assert store.resolve("quay.io/a/b:1").config.cmd == ["sh"]


@pytest.mark.parametrize("room", [400, 900, 2000, 2900])
def test_a_full_disk_costs_one_line_and_harms_nothing(tmp_path, room):
    """On a file system of its own: an image is there, the next one does not fit in, or its last parts don't."""
    first = docker_archive(tmp_path / "1.tar", Built([b""], ["first"]))
    second = docker_archive(tmp_path / "2.tar", Built([tar({"a": os.urandom(600 << 10)}), tar({
        "b": os.urandom(1000 << 10)}), tar({"c": os.urandom(1300 << 10)})], ["second"]))
    pyhv = " ".join(PYHV)
    script = f"""
mount -t tmpfs -o size={room}k none "$PYHV_DATA" || exit 99
{pyhv} image load -q {first} || exit 98
{pyhv} image load -q {second}
echo "code $?"
ls "$PYHV_DATA/images/tmp" | wc -l
{pyhv} image ls --format '{{{{.Repository}}}}'
{pyhv} image fsck --repair > /dev/null
{pyhv} image fsck
df --output=used "$PYHV_DATA" | tail -1
"""
    (tmp_path / "data").mkdir()
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYHV_DATA": str(tmp_path / "data")}, check=False)
    loaded, code, left, *names, whole, used = done.stdout.splitlines()
    assert (loaded, code, left, names, whole) == ("first:latest", "code 1", "0", ["first"], "the store is whole")
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "pyhv image prune" in done.stderr and int(used) < 100


