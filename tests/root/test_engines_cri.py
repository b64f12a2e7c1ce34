"""Kubernetes' interface: containerd's CRI plugin with a runtime class of `pyhv-runtime`, a pod and its container."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from framework.bundle import RUNTIME, container
from framework.cri import Kubelet, decode
from framework.engines import IMAGE, groups_under, needs, until

pytestmark = [*container, needs("containerd", "ctr", "curl")]
LOOP = "while :; do sleep 0.1; done"
EXITED = 2                          # ContainerState


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    made = Kubelet()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def pod(kubelet: Kubelet) -> Iterator[str]:
    """A pod's sandbox, as long as the test lasts."""
    name = kubelet.ask("RunPodSandbox", [(1, kubelet.pod("one")), (2, "pyhv")])[1].decode()
    yield name
    kubelet.ask("StopPodSandbox", [(1, name)])
    kubelet.ask("RemovePodSandbox", [(1, name)])
    assert until(lambda: not [path for path in groups_under(kubelet.parent) if path.name != kubelet.parent])


def status(kubelet: Kubelet, name: str) -> dict[int, object]:
    return decode(kubelet.ask("ContainerStatus", [(1, name)])[1])


def test_life_of_a_container_in_a_pod(kubelet: Kubelet, pod: str) -> None:
    script = f"trap 'echo asked; exit 5' TERM; echo begun; {LOOP}"
    config = [(1, [(1, "box")]), (2, [(1, IMAGE)]), (3, "sh"), (3, "-c"), (3, script), (11, "box.log"),
              (15, [(1, [(4, 50 << 20)])])]
    name = kubelet.ask("CreateContainer", [(1, pod), (2, config), (3, kubelet.pod("one"))])[1].decode()
    kubelet.ask("StartContainer", [(1, name)])
    log = kubelet.folder / "box.log"
    assert until(lambda: " stdout F begun\n" in log.read_text())
    for one in (pod, name):     # runc would not understand it, nor we what is runc's
        done = subprocess.run([*RUNTIME, "--root", str(kubelet.folder / "runc/k8s.io"), "state", one],
                              capture_output=True, text=True, timeout=20, check=True)
        assert json.loads(done.stdout)["status"] == "running"
    script = "cat /proc/1/comm; echo aside >&2; exit 4"
    answer = kubelet.ask("ExecSync", [(1, name), (2, "sh"), (2, "-c"), (2, script), (3, 20)])
    # the pod's first process, as its pid namespace is shared
    assert answer == {1: b"sleep\n", 2: b"aside\n", 3: 4}
    limits = [path / leaf for path in groups_under(kubelet.parent) for leaf in ("memory.limit_in_bytes", "memory.max")
              if name in path.name]
    assert [path.read_text() for path in limits if path.exists()] == [f"{50 << 20}\n"]
    kubelet.ask("StopContainer", [(1, name), (2, 20)])
    assert " stdout F asked\n" in log.read_text()
    ended = status(kubelet, name)
    assert (ended[3], ended[7]) == (EXITED, 5)
    kubelet.ask("RemoveContainer", [(1, name)])
