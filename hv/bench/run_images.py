"""Images: pulling, loading and unpacking, beside skopeo and podman.

The image is made: layers of many files, half of them random bytes, half text, gzipped as registries have them. The
registry is Debian's docker-registry on this machine. Driven by tests/root/test_bench_run.py.
"""

from __future__ import annotations

__all__ = ["image_groups"]

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

from hv.bench.figures import Aim, Figure, Group, Run, measure
from hv.bench.harness import launcher, say, spawn
from hv.bench.run_peers import Podman
from hv.errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
_LAYERS, _FILE = 4, 20 << 10
_NAME = "bench/files:1"
_CONFIG = """version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
log: {{level: error, accesslog: {{disabled: true}}}}
"""
_UP_SECONDS = 20.0
# Load and unpack, as the first `pyhv run` of an image does.
_UNPACK = """import sys
from hv.image.layers import Layers
from hv.image.store import Store
store = Store()
Layers(store).ensure(store.resolve(sys.argv[1]))
"""


def image_groups(place: Path, rounds: int, quick: bool) -> list[Group]:
    """Measured; what lacks a peer is left out."""
    if shutil.which("skopeo") is None:
        say("skopeo is not installed: the images are left out")
        return []
    archive = place / "files.tar"
    size = _make_archive(archive, 8 * MIB if quick else 200 * MIB)
    layout = place / "layout"
    _skopeo("copy", "-q", "--dest-compress-format", "gzip", f"docker-archive:{archive}", f"oci:{layout}:1")
    stored = sum(path.stat().st_size for path in (layout / "blobs" / "sha256").iterdir())
    packed = place / "packed.tar"
    _skopeo("copy", "-q", f"oci:{layout}:1", f"oci-archive:{packed}:localhost/{_NAME}")
    text = f"{size // MIB} MiB in {_LAYERS} layers, {stored // MIB} MiB as they are stored; into an empty store."
    with ExitStack() as undo:
        groups = [_load(place, archive, text)]
        if shutil.which("docker-registry"):
            groups.append(_pull(place, layout, text, undo))
        else:
            say("docker-registry is not installed: pulling is left out")
        if shutil.which("podman"):
            groups.append(_unpack(place, packed, text, undo))
        runs = [run for _, more in groups for run in more]
        say(f"images: {rounds} rounds of {len(runs)} commands")
        measure(runs, rounds)
    return [group for group, _ in groups]


def _load(place: Path, archive: Path, text: str) -> tuple[Group, list[Run]]:
    mine = Figure("pyhv image load", "ms", Aim(1.2, "ratio"), vm=False)
    theirs = Figure("skopeo copy docker-archive: oci:", "ms", vm=False)
    runs = [Run(_fresh(place, [*launcher(), "image", "load", "-q", "-i", str(archive)]), mine),
            Run(_emptied(place / "out", ["skopeo", "copy", "-q", "--dest-oci-accept-uncompressed-layers",
                                         f"docker-archive:{archive}", f"oci:{place}/out:1"]), theirs)]
    return Group("images", "Loading a docker-archive", text + " Layers are kept as they come.", [mine, theirs],
                 theirs), runs


def _pull(place: Path, layout: Path, text: str, undo: ExitStack) -> tuple[Group, list[Run]]:
    port = _registry(place / "registry", undo)
    name = f"127.0.0.1:{port}/{_NAME}"
    _skopeo("copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:1", f"docker://{name}")
    mine = Figure("pyhv image pull", "ms", Aim(1.2, "ratio"), vm=False)
    theirs = Figure("skopeo copy docker: oci:", "ms", vm=False)
    runs = [Run(_fresh(place, [*launcher(), "image", "pull", "-q", name]), mine),
            Run(_emptied(place / "out", ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{name}",
                                         f"oci:{place}/out:1"]), theirs)]
    return Group("images", "Pulling from a registry on this machine", text, [mine, theirs], theirs), runs


def _unpack(place: Path, packed: Path, text: str, undo: ExitStack) -> tuple[Group, list[Run]]:
    podman = Podman(place / "podman-images")
    undo.callback(podman.close)
    mine = Figure("pyhv: load and unpack", "ms", Aim(1, "ratio"), vm=False)
    theirs = Figure("podman load", "ms", vm=False)
    load = _fresh(place, [*launcher(), "image", "load", "-q", "-i", str(packed)])
    unpack = spawn([sys.executable, "-c", _UNPACK, f"localhost/{_NAME}"])
    take = spawn([*podman.command, "load", "-q", "-i", str(packed)])
    forget = spawn([*podman.command, "rmi", "--all", "--force"])

    def sample() -> list[float]:
        forget()
        return [take()]

    runs = [Run(lambda: [load()[0] + unpack()], mine), Run(sample, theirs)]
    return Group("images", "Loading an oci-archive and unpacking its layers", text + " podman's load does both.",
                 [mine, theirs], theirs), runs


def _fresh(place: Path, command: list[str]) -> Callable[[], list[float]]:
    """Into an empty store."""
    return _emptied(place / "data" / "images", command)


def _emptied(folder: Path, command: list[str]) -> Callable[[], list[float]]:
    sample = spawn(command)

    def measured() -> list[float]:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()               # what was written before is not this one's to wait for
        return [sample()]

    return measured


def _registry(folder: Path, undo: ExitStack) -> int:
    """Start docker-registry; its port."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    config = folder / "config.yml"
    config.write_text(_CONFIG.format(root=folder / "data", port=port))
    process = subprocess.Popen(["docker-registry", "serve", str(config)], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end() -> None:
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    undo.callback(end)
    until = time.monotonic() + _UP_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return port
        except OSError:
            if time.monotonic() > until or process.poll() is not None:
                raise HvError("docker-registry does not come up") from None
            time.sleep(0.05)


def _skopeo(*words: str) -> None:
    done = subprocess.run(["skopeo", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
                          check=False)
    if done.returncode:
        raise HvError(f"skopeo {words[0]}: {done.stderr.strip()[-300:]}")


def _make_archive(file: Path, size: int) -> int:
    """A docker-archive of about `size` bytes in files of 20 KiB; the same each time."""
    from hashlib import sha256
    from json import dumps

    dice = random.Random(1)
    text = b"".join(b"%08d the quick brown fox\n" % dice.randrange(10 ** 6) for _ in range(_FILE // 20))[:_FILE]
    names, ids, total = [], [], 0
    with tarfile.open(file, "w") as outer:
        for number in range(_LAYERS):
            layer = BytesIO()
            with tarfile.open(fileobj=layer, mode="w") as tar:
                for index in range(size // _LAYERS // _FILE):
                    info = tarfile.TarInfo(f"layer{number}/{index // 100}/{index}")
                    info.size = _FILE
                    tar.addfile(info, BytesIO(dice.randbytes(_FILE) if index % 2 else text))
            content = layer.getvalue()
            total += len(content)
            names.append(f"{number}.tar")
            ids.append(f"sha256:{sha256(content).hexdigest()}")
            _add(outer, names[-1], content)
        _add(outer, "config.json", dumps({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["true"]},
                                          "rootfs": {"type": "layers", "diff_ids": ids}}).encode())
        _add(outer, "manifest.json", dumps([{"Config": "config.json", "RepoTags": [f"localhost/{_NAME}"],
                                             "Layers": names}]).encode())
    return total


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))
