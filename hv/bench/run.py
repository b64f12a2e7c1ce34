"""`pyhv bench run`: one image as a container and as a VM, beside runc, podman and docker; images beside skopeo, podman.

    start     whole processes: `pyhv run` of busybox `true`, with and without a network; ps, --help
    images    a registry of this machine, archives, unpacking      (hv/bench/run_images.py)

Everything lies below a temporary folder, pyhv's store too. Driven by tests/root/test_bench_run.py.
"""

from __future__ import annotations

__all__ = ["PARTS", "bench_run"]

import os
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

from hv.bench.container import make_bundle, make_peers
from hv.bench.figures import Aim, Figure, Group, Run, lines, measure
from hv.bench.harness import launcher, say, spawn, write_json
from hv.bench.run_images import image_groups
from hv.bench.run_peers import Docker, Podman
from hv.errors import ConfigError, HvError
from hv.kernels.cache import find
from hv.kvm.system import Kvm
from hv.softkvm.detect import is_software

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PARTS = ("start", "images")
IMAGE = "localhost/pyhv-bench:1"


def bench_run(rounds: int, quick: bool, only: str | None, file: str | None) -> int:
    """Run the parts, print tables; every sample to `file`. `quick`: small images, to see that it runs."""
    if os.geteuid():
        raise ConfigError("pyhv bench run: the peers need root", "run it as root")
    parts = list(PARTS) if only is None else only.split(",")
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"--only {only}: there is no part {part!r}", f"there are {', '.join(PARTS)}")
    with Kvm() as kvm:
        software = is_software(kvm)
    host = (f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f} at the start, Linux {os.uname().release}, "
            f"Python {sys.version.split()[0]}")
    groups: list[Group] = []
    before = {name: os.environ.get(name) for name in ("PYHV_DATA", "PYHV_RUN")}
    with tempfile.TemporaryDirectory(prefix="pyhv-runs-") as place:
        os.environ |= {"PYHV_DATA": f"{place}/data", "PYHV_RUN": f"{place}/run"}
        try:
            if "start" in parts:
                groups += _start(Path(place), rounds)
            if "images" in parts:
                groups += image_groups(Path(place), rounds, quick)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    data: dict[str, Any] = {"host": host, "date": time.strftime("%Y-%m-%d"), "software_kvm": software,
                            "rounds": rounds, "groups": [group.data() for group in groups]}
    print(host + (", software KVM" if software else ""))
    for group in data["groups"]:
        print("\n".join(lines(group)))
    if file is not None:
        write_json(file, data)
    return 0


def _start(place: Path, rounds: int) -> list[Group]:
    bundle = make_bundle(place)
    archive = place / "image.tar"
    _archive(bundle / "rootfs", archive)
    pyhv = launcher()
    spawn([*pyhv, "image", "load", "-q", "-i", str(archive)])()
    with ExitStack() as undo:
        runc = next((peer for peer in make_peers(place) if peer.name == "runc"), None)
        engines: list[Podman | Docker] = []
        for make in (Podman, Docker):
            try:
                engine = make(place / make.name)
            except HvError as error:
                say(f"{error}: left out")
                continue
            undo.callback(engine.close)
            engine.take(archive, IMAGE)
            engines.append(engine)
        return _measured(place, rounds, bundle, pyhv, runc.sample("run", "--bundle", str(bundle), "bench")
                         if runc else None, engines)


def _measured(place: Path, rounds: int, bundle: Path, pyhv: list[str], runc: Any,
              engines: list[Podman | Docker]) -> list[Group]:
    ours = [*pyhv, "run", "--rm"]
    alone = Figure("pyhv run --container, no network", "ms", Aim(1.2, "ratio"), vm=False)
    runs = [Run(_one(ours, "--container", "--network", "none"), alone)]
    base = None
    groups = []
    if runc is not None:
        base = Figure("runc run, the same files", "ms", vm=False)
        runs.append(Run(lambda: [runc()], base))
    first = [alone, *([base] if base else [])]
    kernel = find("image") or find("micro")
    if kernel is not None:
        say("making the template")
        spawn([*ours, "--vm", "--network", "none", IMAGE, "true"])()
        run, whole, group = _vm(place, [*ours, "--vm", "--network", "none"], [*ours, "--network", "none"])
        runs.append(run)
        first.insert(1, whole)
        groups.append(group)
    groups.append(Group("start", "busybox true, whole process, no network",
                        "From the fork to the end; the store is warm and the VM's template is made.", first, base))
    for engine in engines:
        theirs = Figure(f"{engine.name} run, no network", "ms", vm=False)
        mine = Figure("pyhv run --container, no network", "ms", Aim(0.25, "ratio"), vm=False)
        sample, other = _one(ours, "--container", "--network", "none"), spawn(engine.run(IMAGE, "true"))
        runs += [Run(sample, mine), Run(_listed(other), theirs)]
        groups.append(Group("start", f"Beside {engine.name}, no network", "The same image.", [mine, theirs], theirs))
        if engine.name == "podman":
            theirs = Figure("podman run, its bridge", "ms", vm=False)
            mine = Figure("pyhv run --container, its bridge", "ms", Aim(0.25, "ratio"), vm=False)
            other = spawn(engine.run(IMAGE, "true", network="podman"))
            runs += [Run(_one(ours, "--container"), mine), Run(_listed(other), theirs)]
            groups.append(Group("start", "Beside podman, default networks", "Bridge, address, NAT.", [mine, theirs],
                                theirs))
    listing, help_ = Figure("pyhv ps", "ms", Aim(120), vm=False), Figure("pyhv --help", "ms", Aim(120), vm=False)
    runs += [Run(_listed(spawn([*pyhv, "ps"])), listing), Run(_listed(spawn([*pyhv, "--help"])), help_)]
    groups.append(Group("start", "Commands that only look", "Whole processes.", [listing, help_]))
    say(f"starting: {rounds} rounds of {len(runs)} commands")
    measure(runs, rounds)
    return groups


def _vm(place: Path, command: list[str], container: list[str]) -> tuple[Run, Figure, Group]:
    """A VM beside a container: how much later the guest goes on, and its agent answers, than a container has ended."""
    figures = [Figure("pyhv run --container, its end", "ms", vm=False),
               Figure("pyhv run --vm, the guest goes on", "ms"),
               Figure("pyhv run --vm, the agent has answered", "ms"), Figure("pyhv run --vm, no network", "ms"),
               Figure("the guest goes on, later than the container's end", "ms", Aim(50)),
               Figure("the agent has answered, later than the container's end", "ms", Aim(50))]
    beside, file = _one(container), place / "phases"
    run = spawn([*command, IMAGE, "true"])

    def sample() -> list[float]:
        (alone,) = beside()
        file.unlink(missing_ok=True)
        os.environ["PYHV_PHASES"] = str(file)
        start = time.monotonic_ns()
        try:
            whole = run()
        finally:
            del os.environ["PYHV_PHASES"]
        moments = dict(line.split() for line in file.read_text().splitlines())
        on, answered = ((int(moments[name]) - start) / 1e6 for name in ("restored", "answered"))
        return [alone, on, answered, whole, on - alone, answered - alone]

    text = ("From the fork. Until the guest goes on all is the host's work; its agent then sets the guest up, which is "
            "the guest's own time, and answers.")
    return Run(sample, *figures), figures[3], Group("start", "A VM from its template, beside a container", text,
                                                    [figure for figure in figures if figure is not figures[3]])


def _one(command: list[str], *words: str) -> Any:
    return _listed(spawn([*command, *words, IMAGE, "true"]))


def _listed(sample: Any) -> Any:
    return lambda: [sample()]


def _archive(root: Path, file: Path) -> None:
    """A docker-archive of `root` as the one layer of IMAGE."""
    from hashlib import sha256
    from json import dumps

    layer = BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(root, ".")
    content = layer.getvalue()
    config = dumps({"architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], "Cmd": ["true"]},
                    "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(content).hexdigest()}"]}}).encode()
    members = {"config.json": config, "layer.tar": content, "manifest.json": dumps(
        [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]).encode()}
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
