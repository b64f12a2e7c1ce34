"""`import`: an archive of files becomes an image."""

from __future__ import annotations

import gzip
import os

import pytest
import zstandard
from framework.images import OCI, busybox_layer, digest, tar
from hypothesis import given
from hypothesis import strategies as st

from hv.errors import ConfigError, HvError, ImageError
from hv.image.archive_import import _apply, import_image
from hv.image.fsck import check
from hv.image.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("pack, suffix", [(bytes, ""), (gzip.compress, "+gzip"), (zstandard.compress, "+zstd")])
def test_the_layer_is_kept_as_it_comes(store, tmp_path, pack, suffix):
    plain = busybox_layer()
    blob = pack(plain)
    (tmp_path / "a").write_bytes(blob)
    image = import_image(store, str(tmp_path / "a"), "mine:1", message="hello", platform="linux/arm/v7")
    (layer, diff_id), = image.layers
    assert (layer.digest, layer.size, layer.media_type) == (digest(blob), len(blob), f"{OCI}layer.v1.tar{suffix}")
    assert diff_id == digest(plain) and image.config.platform == "linux/arm/v7"
    assert image.config.history[0]["comment"] == "hello"
    assert store.resolve("mine:1").id == image.id and not check(store)
    assert import_image(store, str(tmp_path / "a")).name == ""


@pytest.mark.parametrize("data, says", [
    (b"", "has no file in it"), (b"\0" * 1024, "has no file in it"), (b"no archive" * 100, "tar archive"),
    (gzip.compress(busybox_layer())[:-10], "gzip data"), (tar({"a": b"1" * 2000})[:1500], "ends within")])
def test_what_is_no_archive(store, tmp_path, data, says):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ImageError, match=says):
        import_image(store, str(tmp_path / "a"), "mine")
    assert store.entries() == [] and os.listdir(f"{store.root}/tmp") == os.listdir(f"{store.root}/blobs/sha256") == []


def test_bad_arguments(store, tmp_path):
    for arguments in ({"path": str(tmp_path)}, {"path": str(tmp_path / "none")}, {"name": "Bad"}, {"platform": "/"},
                      {"name": "a@sha256:" + "0" * 64}, {"changes": ["RUN x"]}):
        with pytest.raises(ConfigError):
            import_image(store, **{"path": "/etc/passwd", **arguments})     # type: ignore[arg-type]


def test_changes(store, tmp_path):
    (tmp_path / "a").write_bytes(tar({"a": b""}))
    config = import_image(store, str(tmp_path / "a"), changes=[
        'CMD ["a", "b c"]', "ENTRYPOINT=/bin/x y", "ENV A=1", "ENV A=2", "env B two words", 'ENV C="quoted"',
        "EXPOSE 80 53/udp", "LABEL k=v=w", "STOPSIGNAL SIGINT", "USER=1:2", 'VOLUME ["/v", "/w"]', "VOLUME /x /y",
        "WORKDIR /dir"]).config
    assert config.cmd == ["a", "b c"] and config.entrypoint == ["/bin/sh", "-c", "/bin/x y"]
    assert config.env == ["A=2", "B=two words", "C=quoted"] and config.exposed_ports == ["80/tcp", "53/udp"]
    assert config.labels == {"k": "v=w"} and (config.stop_signal, config.user) == ("SIGINT", "1:2")
    assert config.volumes == ["/v", "/w", "/x", "/y"] and config.working_dir == "/dir"


@pytest.mark.parametrize("change", ["", "CMD", "CMD ", "CMD [1]", "CMD [", "EXPOSE x", "EXPOSE 0", "EXPOSE 70000",
                                    "EXPOSE 80/sctp", "ENV X", "ENV =1", "ONBUILD RUN x", "FROM x", "=x"])
def test_bad_changes(change):
    with pytest.raises(ConfigError, match="--change"):
        _apply({}, change)


@given(st.text(alphabet='CMDENVLABEL =["x]\\', max_size=20))
def test_any_change_is_taken_or_refused(change):
    try:
        _apply({}, change)
    except HvError:
        pass
