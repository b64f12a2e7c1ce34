"""A bundle whose network namespace an engine has made: the VM's card is its interface, with address and route."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import container
from framework.engines import IMAGE, Podman, needs
from framework.namespaces import Host
from framework.vms import VmBundle, VmHome

pytestmark = container


@pytest.fixture(scope="module")
def cable() -> Iterator[tuple[Host, Host]]:
    """(the peer, what a container would have): two namespaces, a veth between them."""
    with Host() as box, Host() as peer:
        peer.run(f"ip link add up0 type veth peer name eth0 address 02:00:00:00:09:02 netns {box.netns.path}; "
                 "ip addr add 10.9.0.1/24 dev up0; ip addr add 10.9.1.1/32 dev lo; ip link set up0 up")
        box.run("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 mtu 1400 up; ip route add default via 10.9.0.1")
        yield peer, box


def networked(vm: VmBundle, path: str) -> None:
    """Its network namespace is the one at `path`; "": a new one."""
    own = {"type": "network"} | ({"path": path} if path else {})
    vm.config["linux"]["namespaces"] = [own if row["type"] == "network" else row
                                        for row in vm.config["linux"]["namespaces"]]


def test_address_route_and_traffic_both_ways(vm_home: VmHome, tmp_path: Path, cable: tuple[Host, Host]) -> None:
    peer, box = cable
    vm = vm_home.bundle(tmp_path)
    vm.config["process"]["capabilities"] = {kind: ["CAP_NET_RAW"] for kind in ("bounding", "effective", "permitted")}
    networked(vm, box.netns.path)
    before = box.run("ip -4 -o addr show eth0")
    done = vm.create("sleep", "1000")
    assert done.returncode == 0, done.stderr
    assert vm.call("start", vm.name).returncode == 0
    out = vm.call("exec", vm.name, "sh", "-c", "ip -o addr show; cd /sys/class/net/eth0; cat address mtu; ip route; "
                  "busybox ping -c 2 -W 5 10.9.1.1 >/dev/null && echo pong").stdout
    assert "inet 10.9.0.2/24" in out and "02:00:00:00:09:02\n1400\n" in out and "default via 10.9.0.1" in out
    assert "pong" in out and "127.0.0.1/8" in out
    assert peer.call("ping", "-c", "1", "-W", "10", "10.9.0.2").returncode == 0
    assert vm.call("delete", "--force", vm.name).returncode == 0
    assert peer.call("ping", "-c", "1", "-W", "10", "10.9.0.2").returncode == 0, "the namespace has it back"
    assert box.run("ip -4 -o addr show eth0") == before
    networked(vm, "")
    assert vm.run("ls", "/sys/class/net").stdout.split() == ["lo"]
    vm.gone()


def test_a_namespace_that_is_not_there(vm_home: VmHome, tmp_path: Path) -> None:
    vm = vm_home.bundle(tmp_path)
    networked(vm, "/run/netns/absent-7")
    done = vm.run("true")
    assert done.returncode == 1 and "network /run/netns/absent-7: No such file" in done.stderr
    vm.gone()


class Bridged(Podman):
    """podman inside a namespace that plays the host, with one bridge network."""

    def __init__(self, home: VmHome, host: Host) -> None:
        self.runtime, self.host = str(home.runtime), host
        super().__init__()
        networks = self.folder / "networks"
        networks.mkdir()
        (networks / "pyhv.conflist").write_text(json.dumps({
            "cniVersion": "0.4.0", "name": "pyhvtest", "plugins": [
                {"type": "bridge", "bridge": "pyhvt0", "isGateway": True, "ipam": {
                    "type": "host-local", "dataDir": str(self.folder / "ipam"),
                    "ranges": [[{"subnet": "10.9.8.0/24", "gateway": "10.9.8.1"}]],
                    "routes": [{"dst": "0.0.0.0/0"}]}}]}))
        settings = self.folder / "containers.conf"
        settings.write_text(settings.read_text() + f'[network]\nnetwork_backend = "cni"\n'
                            f'network_config_dir = "{networks}"\ncni_plugin_dirs = ["/usr/lib/cni"]\n')

    def command(self, *words: str, runtime: str = "") -> list[str]:
        return ["nsenter", f"--net={self.host.netns.path}", *super().command(*words, runtime=runtime or self.runtime)]


@pytest.mark.skipif(not os.path.exists("/usr/lib/cni/bridge"), reason="no CNI plugins (containernetworking-plugins)")
@needs("podman", "conmon", "nsenter")
def test_podman_s_bridge(vm_home: VmHome) -> None:
    with Host() as host:
        host.run("ip addr add 10.9.9.1/32 dev lo")
        podman = Bridged(vm_home, host)
        try:
            done = podman.call(*podman.new("run", "--rm", "--cap-add", "NET_RAW", IMAGE, "sh", "-c",
                                           "ip -o addr show eth0; busybox ping -c 1 -W 5 10.9.9.1 >/dev/null && "
                                           "echo pong; cat /etc/hosts", network="pyhvtest"))
            assert "inet 10.9.8." in done.stdout and "pong" in done.stdout and "10.9.8." in done.stdout
        finally:
            podman.close()
        shutil.rmtree(podman.folder, ignore_errors=True)
