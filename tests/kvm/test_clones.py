"""Clones of a real Linux: equal without our doing, distinct with it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import needs_kvm

from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.rng import RngConfig
from hv.devices.virtio.vsock_config import VsockConfig
from hv.errors import HvError
from hv.guests import program
from hv.kernels.initramfs import AGENT, busybox
from hv.snapshot.agent import Agent, NoAgentError, RefusedError
from hv.snapshot.clone import Introduced, clone_cid, clone_mac, distinct, introduce
from hv.snapshot.format import Snapshot
from hv.snapshot.restore import restore
from hv.snapshot.save import save

pytestmark = [needs_kvm, pytest.mark.timeout(2400),
              pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")]

MAC, CID = "02:00:00:00:00:01", 42
RANDOM = "od -An -tx1 -N16 /dev/urandom"
ABOUT = "hostname; ifconfig eth0; route -n; date +%s"     # few programs: each takes a third of a second to start


class Base:
    """A snapshot of a booted guest, and clones of it."""

    def __init__(self, folder: str) -> None:
        self.snapshot = Snapshot(folder)
        self.id = self.snapshot.part("id", kind=str)

    @contextmanager
    def clone(self, index: int, told: dict[str, Any] | None = None) -> Iterator[Shell]:
        """Clone `index` that runs; introduced with the arguments `told`, unless these are None."""
        recipe = distinct(self.snapshot.part("config"), index, self.id)
        shell = Shell.__new__(Shell)
        shell.machine, shell.at = restore(self.snapshot, recipe=recipe), 0
        with shell:
            shell.machine.start()
            shell.introduced = None if told is None else introduce(shell.machine, index, **told)    # type: ignore
            yield shell


def take(folder: Path, flavour: str, agent: bool, **options: Any) -> Base:
    """Boot it, save it with its random numbers just reseeded (so that the kernel will not do that by itself soon)."""
    devices = (RngConfig(), NetConfig("none", mac=MAC), VsockConfig(str(folder / "v"), CID))
    files = ((program("agent"), AGENT),) if agent else ()
    with Shell(kernel(flavour) / "vmlinux", devices=devices, initrd=busybox(files=files), timeout=300,
               **options) as shell:
        shell.booted()
        shell.run("hostname base; cat /proc/sys/kernel/random/boot_id > /dev/null; " + RANDOM)
        if agent:
            with Agent(shell.machine) as client:
                assert client.version()[1][:6] == ["ping", "time", "hostname", "entropy", "mac", "address"]
                client.ask("entropy", "00" * 64)
        save(shell.machine, str(folder / "base"), stop=True)
    return Base(str(folder / "base"))


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Base:
    skip_without_build_tools()
    return take(tmp_path_factory.mktemp("micro"), "micro", agent=True)


def random_of(shell: Shell) -> str:
    return re.findall(r"(?: [0-9a-f]{2}){16}", shell.run(RANDOM))[0]


def test_without_our_doing_two_clones_have_the_same_random_numbers(micro: Base) -> None:
    """What the others prevent: were this not so, they would show nothing."""
    seen = set()
    for index in (1, 2):
        with micro.clone(index) as shell:
            seen.add(random_of(shell))
    assert len(seen) == 1


def test_introduced_clones_are_distinct(micro: Base) -> None:
    seen = []
    for index in (1, 2):
        told = {"hostname": f"web-{index}", "address": f"10.1.2.{index}/24", "gateway": "10.1.2.254"}
        with micro.clone(index, told) as shell:
            introduced: Introduced = shell.introduced      # type: ignore[attr-defined]
            assert introduced.done == ["entropy", "time", "hostname", "mac", "address"], introduced
            assert not introduced.failed
            seen.append(random_of(shell))
            says = shell.run(ABOUT)
            assert f"web-{index}\n" in says and clone_mac(micro.id, index, 0, MAC).hex(":").upper() in says, says
            assert f"addr:10.1.2.{index} " in says and "Mask:255.255.255.0" in says, says
            assert re.search(r"^0\.0\.0\.0 +10\.1\.2\.254 .* eth0", says, re.MULTILINE), says
            assert abs(int(re.findall(r"^(\d+)$", says, re.MULTILINE)[0]) - time.time()) < 5, says
    assert seen[0] != seen[1]


def test_the_guest_learns_its_cid_and_keeps_its_name_with_a_number(micro: Base) -> None:
    with micro.clone(3, {"clock": False}) as shell:
        assert shell.introduced.done == ["entropy", "hostname", "mac"]     # type: ignore[attr-defined]
        assert "base-3\n" in shell.run("hostname")
        # packets with the old one are dropped, so the agent's answers had this
        assert shell.machine.devices["vsock0"].cid == clone_cid(CID, 3) == 46      # type: ignore[attr-defined]
        assert not any(device.faults for device in shell.machine.devices.values())


def test_a_clone_of_an_introduced_clone(micro: Base, tmp_path: Path) -> None:
    """What the driver knows is saved, not what it knew."""
    with micro.clone(4, {}) as shell:
        save(shell.machine, str(tmp_path / "second"), stop=True)
    second = Base(str(tmp_path / "second"))
    with second.clone(5, {"address": "10.0.0.9/8"}) as shell:
        assert not shell.introduced.failed, shell.introduced       # type: ignore[attr-defined]
        mac = clone_mac(second.id, 5, 0, clone_mac(micro.id, 4, 0, MAC).hex(":")).hex(":")
        says = shell.run(ABOUT)
        assert mac.upper() in says and "addr:10.0.0.9 " in says and "Mask:255.0.0.0" in says and "base-4-5\n" in says


def test_what_the_agent_refuses(micro: Base) -> None:
    wrong = [
        ("nonsense",), ("ping", "x"), ("mac", "eth0"), ("a", "b", "c", "d", "e", "f"),
        ("time", "5"), ("time", "5.1"), ("time", "-1.000000000"), ("time", "99999999999999999999.000000000"),
        ("hostname", "a/b"), ("hostname", "x" * 65), ("entropy", "0"), ("entropy", "zz"), ("entropy", "00" * 513),
        ("mac", "eth0", "03:00:00:00:00:01"), ("mac", "eth0", "02:00:00:00:00"), ("mac", "eth9", MAC),
        ("mac", "00:00:00:00:00:09", "02:00:00:00:00:08"), ("mac", "e" * 16, MAC),
        ("address", "eth0", "10.0.0.1"), ("address", "eth0", "10.0.0.256/8"), ("address", "eth0", "10.0.0.1/33"),
        ("address", "eth0", "1.2.3/8"), ("address", "eth0", "10.0.0.1/24", "10.9.9.9.9"),
    ]
    with micro.clone(6) as shell, Agent(shell.machine) as agent:
        for words in wrong:
            with pytest.raises(RefusedError):
                pytest.fail(f"{words}: ok {agent.ask(*words)}")
        assert agent.ask("hostname") == "base"
        agent.ask("mac", "eth0", "02:00:00:00:00:07")
        agent.ask("mac", MAC, "02:00:00:00:00:07")          # again: done before
        with pytest.raises(RefusedError, match="route: errno 101"):
            agent.ask("address", "eth0", "10.0.0.1/24", "10.99.0.1")       # a gateway that is not there
        streams = [Agent(shell.machine) for _ in range(20)]
        try:
            answers = 0
            for stream in streams:
                try:
                    answers += bool(stream.version(timeout=1.0))
                except HvError:
                    pass
            assert answers == 15, "16 streams at a time, one is ours"
        finally:
            for stream in streams:
                stream.close()
        assert agent.ask("hostname") == "base"
        assert "1\n" in shell.run("ps | grep -c '[p]yhv-agent'")


def test_a_guest_with_acpi_reseeds_by_itself(tmp_path: Path) -> None:
    """No agent: the generation ID, its interrupt, the driver, the kernel's random numbers."""
    skip_without_build_tools()
    base = take(tmp_path, "smp", agent=False)
    seen = set()
    for index in (1, 2):
        with base.clone(index) as shell:
            says = shell.run("dmesg | grep 'virtual machine fork'; grep -i ged /proc/interrupts")
            assert says.count("crng reseeded due to virtual machine fork") == 1, says
            seen.add(random_of(shell))
            assert not introduce(shell.machine, index).agent
            with pytest.raises(NoAgentError, match="has no agent"):
                Agent(shell.machine).version()
    assert len(seen) == 2
