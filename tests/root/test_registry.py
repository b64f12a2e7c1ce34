"""pull and push against Debian's docker-registry: skopeo pushes what we pull, and reads what we push."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.images import Built, Special, digest, oci_layout, tar
from framework.registry import RealRegistry, Request, Server, closing, has, serving, skopeo

from hv.errors import ConfigError, ImageError, RegistryError
from hv.image import pull as pulling
from hv.image.pull import pull
from hv.image.push import push
from hv.image.reference import Reference
from hv.image.registry import Registry
from hv.image.registry_http import Session
from hv.image.registry_reach import Access
from hv.image.store import Store

pytestmark = pytest.mark.skipif(not has("docker-registry", "skopeo"), reason="no docker-registry or skopeo (Debian)")

NOISE = os.urandom(3 << 20)
LAYERS = [tar({"etc/": None, "etc/motd": b"one" * 1000}), tar({"noise": NOISE, "etc/two": b"2"})]
IMAGE = Built(LAYERS, compression="gzip")
INDEX = "application/vnd.oci.image.index.v1+json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    yield from closing(RealRegistry(tmp_path_factory.mktemp("registry")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "images"))


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login and no setting of this machine's."""
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    monkeypatch.setattr(Session, "first_wait", 0.01)


def get(store: Store, name: str, **more: object) -> str:
    """Pull; the image's ID. What came is what was sent, and nothing else lies about."""
    image = pull(store, Reference.parse(name), **more)      # type: ignore[arg-type]
    assert os.listdir(f"{store.root}/partial") == os.listdir(f"{store.root}/tmp") == []
    for descriptor in (image.manifest.config, *image.manifest.layers):
        assert digest(Path(store.blob_path(descriptor.digest)).read_bytes()) == descriptor.digest
    return image.id


def test_an_image_comes_as_it_was_pushed_and_skopeo_reads_the_store(registry: RealRegistry, store: Store) -> None:
    name = registry.push("plain/gzip:1", IMAGE)
    assert get(store, name) == digest(IMAGE.config)
    image = store.resolve(name)
    assert (image.digest, image.name) == (digest(IMAGE.manifest), name)
    told = json.loads(skopeo("inspect", f"oci:{store.root}:{name}"))
    assert told["Digest"] == image.digest and len(told["Layers"]) == 2
    before = registry.count("GET", "/blobs/")
    get(store, name)
    assert registry.count("GET", "/blobs/") == before, "what is there is not fetched again"


def test_by_digest_and_only_that(registry: RealRegistry, store: Store) -> None:
    name = registry.push("plain/digest:1", IMAGE).removesuffix(":1")
    exact = f"{name}@{digest(IMAGE.manifest)}"
    get(store, exact)
    assert store.resolve(exact).id == digest(IMAGE.config)
    with pytest.raises(RegistryError, match=r"manifest plain/digest@sha256:0+: not there \(MANIFEST_UNKNOWN"):
        get(store, f"{name}@sha256:{'0' * 64}")


@pytest.mark.parametrize("compression, form, media_type", [
    ("gzip", "v2s2", "application/vnd.docker.image.rootfs.diff.tar.gzip"),
    ("zstd", "oci", "application/vnd.oci.image.layer.v1.tar+zstd")])
def test_dockers_form_and_zstd(registry: RealRegistry, store: Store, compression: str, form: str,
                               media_type: str) -> None:
    name = registry.push(f"forms/{form}:1", dataclasses.replace(IMAGE, compression=compression), "--format", form)
    get(store, name)
    image = store.resolve(name)
    assert {layer.media_type for layer, _ in image.layers} == {media_type}
    assert image.config.diff_ids == [digest(layer) for layer in LAYERS]
    again = push(store, name, Reference.parse(f"{registry.host}/forms/again:1"))
    assert again == image.digest, "manifests go as they came"


def test_schema_1_is_refused(tmp_path: Path, store: Store) -> None:
    old = RealRegistry(tmp_path / "old", compatibility={"schema1": {"enabled": True}})
    try:
        name = old.push("old:1", IMAGE, "--format", "v2s1")
        with pytest.raises(RegistryError, match="schema 1") as caught:
            get(store, name)
        assert "push the image again" in caught.value.hint
    finally:
        old.close()


def push_index(registry: RealRegistry, repository: str, *parts: Built) -> bytes:
    for n, part in enumerate(parts):
        registry.push(f"{repository}:part{n}", part)
    raw = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [part.descriptor() for part in parts]})
    remote = Registry(registry.host, repository, Access(), push=True)
    remote.put_manifest("1", raw.encode(), INDEX)
    remote.close()
    return raw.encode()


def test_an_index_by_platform(registry: RealRegistry, store: Store, tmp_path: Path) -> None:
    arm = dataclasses.replace(IMAGE, architecture="arm64", run={"Cmd": ["arm"]})
    raw = push_index(registry, "index", IMAGE, arm)
    name = f"{registry.host}/index:1"
    assert get(store, name) == digest(IMAGE.config)
    assert store.resolve(name).index == digest(raw)
    assert not store.has(digest(arm.config)), "the other part is not fetched"
    exact = f"{registry.host}/index@{digest(raw)}"
    assert get(store, exact) == store.resolve(exact).id == digest(IMAGE.config)
    with pytest.raises(ImageError, match="no image for linux/s390x") as caught:
        get(store, name, platform="linux/s390x")
    assert "linux/amd64, linux/arm64" in caught.value.hint
    # only a part of it is here: that part goes, under the tag
    assert push(store, name, Reference.parse(f"{registry.host}/part:1")) == digest(IMAGE.manifest)
    assert get(store, name, platform="linux/arm64") == digest(arm.config)
    assert store.resolve(name).id == digest(arm.config), "the name is what was asked for last"
    get(store, name)
    assert push(store, name, Reference.parse(f"{registry.host}/whole:1")) == digest(raw)
    skopeo("copy", "--all", "--src-tls-verify=false", f"docker://{registry.host}/whole:1", f"oci:{tmp_path}/all:x")


def test_an_image_for_another_machine_costs_no_layer(registry: RealRegistry, store: Store) -> None:
    name = registry.push("foreign:1", dataclasses.replace(IMAGE, architecture="riscv64"))
    with pytest.raises(ImageError, match="is for linux/riscv64, not linux/amd64") as caught:
        get(store, name)
    assert "--platform linux/riscv64" in caught.value.hint
    assert registry.count("GET", "/v2/foreign/blobs/") == 1, "the configuration alone"
    get(store, name, platform="linux/riscv64")
    with pytest.raises(ConfigError, match="--platform"):
        get(store, name, platform="arm")


def test_what_an_interrupted_pull_left_is_resumed(registry: RealRegistry, store: Store) -> None:
    name = registry.push("resume:1", IMAGE)
    blob = IMAGE.blobs[1]
    Path(store.partial(digest(blob))).write_bytes(blob[:1_000_000])
    assert get(store, name) == digest(IMAGE.config)
    time_out = registry.requests
    assert ("GET", f"/v2/resume/blobs/{digest(blob)}", 206) in time_out


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * (len(IMAGE.blobs[1]) + 5), b"x" * len(IMAGE.blobs[1])],
                         ids=["wrong", "too long", "wrong and whole"])
def test_bad_left_overs_do_no_harm(registry: RealRegistry, store: Store, left: bytes) -> None:
    name = registry.push("bad-left:1", IMAGE)
    Path(store.partial(digest(IMAGE.blobs[1]))).write_bytes(left)
    assert get(store, name) == digest(IMAGE.config)


def test_two_pulls_at_once_fetch_every_blob_once(registry: RealRegistry, tmp_path: Path) -> None:
    big = Built([tar({f"f{n}": os.urandom(4 << 20)}) for n in range(4)], compression="none")
    name = registry.push("both:1", big)
    code = ("import sys; from hv.image.store import Store; from hv.image.pull import pull; "
            "from hv.image.reference import Reference; "
            "print(pull(Store(sys.argv[1]), Reference.parse(sys.argv[2])).id)")
    command = [os.sys.executable, "-c", code, str(tmp_path / "images"), name]       # type: ignore[attr-defined]
    pulls = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [one.communicate(timeout=60)[0].strip() for one in pulls] == [digest(big.config)] * 3
    blobs = [path for method, path, status in registry.requests if "/v2/both/blobs/" in path and method == "GET"]
    assert len(blobs) == len(set(blobs)) == 5
    store = Store(str(tmp_path / "images"))
    assert store.resolve(name).id == digest(big.config)
    assert os.listdir(f"{store.root}/partial") == []


def test_a_killed_pull_leaves_the_store_whole_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """A server that stops in the middle of a layer, so that there is a middle to be killed in."""
    blob, hold = IMAGE.blobs[1], threading.Event()
    good = serving({"slow:1": IMAGE})

    def answer(request: Request) -> None:
        if request.path.endswith(digest(blob)) and not hold.is_set():
            request.start(200, {"Content-Length": str(len(blob))})
            request.write(blob[:1_500_000])
            hold.wait(30)
            request.hang_up()
        else:
            good(request)

    server, store = Server(answer), Store(str(tmp_path / "images"))
    try:
        name, partial = f"{server.host}/slow:1", Path(store.partial(digest(blob)))
        code = ("import sys; from hv.image.store import Store; from hv.image.pull import pull; "
                "from hv.image.reference import Reference; pull(Store(sys.argv[1]), Reference.parse(sys.argv[2]))")
        child = subprocess.Popen([os.sys.executable, "-c", code, store.root, name])     # type: ignore[attr-defined]
        for _ in range(1000):
            if partial.exists() and partial.stat().st_size > 1_000_000:
                break
            threading.Event().wait(0.01)
        child.kill()
        child.wait()
        kept = partial.stat().st_size
        assert 1_000_000 < kept <= 1_500_000
        assert store.names() == {} and not store.has(digest(blob))
        with store.lock(shared=False, wait=1):
            pass        # it holds no lock any more
        hold.set()
        assert get(store, name) == digest(IMAGE.config)
        assert [headers["Range"] for headers in server.headers if "Range" in headers] == [f"bytes={kept}-"]
    finally:
        hold.set()
        server.close()


def test_a_full_disk_is_one_line_and_nothing_stays(registry: RealRegistry, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    big = Built([tar({f"f{n}": os.urandom(9 << 20)}) for n in range(2)], compression="none")
    name = registry.push("full:1", big)
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], check=True)
    try:
        small = Store(str(folder / "images"))
        with pytest.raises(ImageError, match=r"needs 18 MiB, .* has 1[12] MiB free"):
            get(small, name)
        monkeypatch.setattr(pulling, "_check_space", lambda *_: None)
        with pytest.raises(ImageError, match="No space left on device") as caught:
            get(small, name)
        assert "prune" in caught.value.hint
        assert small.names() == {}
        left = sum(path.stat().st_size for path in Path(small.root, "partial").iterdir())
        assert left <= 9 << 20, "what could not be finished is given back"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_push_sends_what_is_missing_and_mounts_what_is_elsewhere(registry: RealRegistry, store: Store,
                                                                 tmp_path: Path) -> None:
    name = registry.push("from/here:1", IMAGE)
    get(store, name)
    mounted = Reference.parse(f"{registry.host}/to/there:2")
    assert push(store, name, mounted) == digest(IMAGE.manifest)
    assert registry.count("PUT", "/v2/to/there/blobs/") == 0, "mounted"
    assert registry.count("POST", "/v2/to/there/blobs/uploads/?mount=") == 3
    other = RealRegistry(tmp_path / "other")
    try:
        done = []
        target = Reference.parse(f"{other.host}/new/one:3")
        push(store, name, target, report=lambda what, blob, count: done.append((what, blob.digest, count)))
        assert other.count("PUT", "/v2/new/one/blobs/") == 3
        assert ("bytes", digest(IMAGE.blobs[1]), len(IMAGE.blobs[1])) in done
        told = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{other.host}/new/one:3"))
        assert told["Digest"] == digest(IMAGE.manifest)
        skopeo("copy", "--src-tls-verify=false", f"docker://{other.host}/new/one:3", f"dir:{tmp_path}/copy")
        push(store, name, target)
        assert other.count("PUT", "/v2/new/one/blobs/") == 3, "nothing is sent twice"
    finally:
        other.close()
    with pytest.raises(ConfigError, match="a tag, not a digest"):
        push(store, name, Reference.parse(f"{registry.host}/x@{digest(b'')}"))
    with pytest.raises(ImageError, match="is not in the store"):
        push(store, "nothing/here:1", mounted)


def test_an_image_with_empty_and_repeated_layers(registry: RealRegistry, store: Store, tmp_path: Path) -> None:
    layer = tar({"a": Special({"mode": 0o600}, b"a")})
    built = Built([layer, tar({}), layer], compression="gzip")
    layout = oci_layout(tmp_path / "layout", built)
    skopeo("copy", "--dest-tls-verify=false", f"oci:{layout}:{built.names[0]}", f"docker://{registry.host}/twice:1")
    assert get(store, f"{registry.host}/twice:1") == digest(built.config)
    assert push(store, f"{registry.host}/twice:1", Reference.parse(f"{registry.host}/thrice:1"))
