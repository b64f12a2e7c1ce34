"""podman and containerd save and restore containers by CRIU, with `pyhv-runtime` beneath them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from framework.bundle import container
from framework.criu import needs_criu
from framework.engines import IMAGE, Containerd, Podman, needs, until

pytestmark = [*container, needs_criu]
_COUNT = "while :; do n=$((n+1)); echo count $n; sleep 0.2; done"


@pytest.fixture
def podman() -> Iterator[Podman]:
    made = Podman()
    yield made
    made.close()


@pytest.fixture
def containerd() -> Iterator[Containerd]:
    made = Containerd()
    yield made
    made.close()


def counted(podman: Podman, name: str) -> int:
    lines = podman.said("logs", name).splitlines()
    return int(lines[-1].split()[1]) if lines else 0


@needs("podman", "conmon")
def test_podman_checkpoint_and_restore(podman):
    podman.call(*podman.new("run", "--detach", "--name", "box", IMAGE, "sh", "-c", _COUNT))
    assert until(lambda: counted(podman, "box") > 2, 20)
    podman.call("container", "checkpoint", "box")
    state = podman.inspect("box")["State"]
    assert state["Status"] == "exited" and state["Checkpointed"], state
    before = counted(podman, "box")
    podman.call("container", "restore", "box")
    assert podman.inspect("box")["State"]["Status"] == "running"
    assert until(lambda: counted(podman, "box") > before + 2, 20)
    lines = [int(line.split()[1]) for line in podman.said("logs", "box").splitlines()]
    assert lines == sorted(set(lines)), lines           # it went on, and did not begin again
    podman.call("container", "checkpoint", "--leave-running", "box")
    assert podman.inspect("box")["State"]["Status"] == "running"
    assert podman.said("exec", "box", "echo", "inside") == "inside"
    podman.call("rm", "--force", "--time", "0", "box")


@needs("podman", "conmon")
def test_podman_moves_a_container(podman):
    podman.call(*podman.new("run", "--detach", "--name", "box", IMAGE, "sh", "-c", "echo kept > /file; " + _COUNT))
    assert until(lambda: counted(podman, "box") > 2, 20)
    archive = str(podman.folder / "box.tar.gz")
    podman.call("container", "checkpoint", "--compress", "gzip", "--export", archive, "box")
    before = counted(podman, "box")
    podman.call("rm", "box")
    podman.call("container", "restore", "--import", archive, "--name", "other")
    assert until(lambda: counted(podman, "other") > before, 20)
    assert podman.said("exec", "other", "cat", "/file") == "kept"
    podman.call("rm", "--force", "--time", "0", "other")


@needs("containerd", "ctr")
def test_containerd_leaves_it_running(containerd):
    containerd.call(*containerd.new("box", "--detach"), "sleep", "1000")
    images = containerd.folder / "images"
    containerd.call("task", "checkpoint", "--image-path", str(images), "box")
    assert (images / "inventory.img").exists()
