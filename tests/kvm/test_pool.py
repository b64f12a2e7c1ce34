"""VMs kept ready, handed out running: the library's pool, the command's, clones. One Linux snapshot serves all."""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import PYHV, needs_kvm, pyhv

from hv import ConfigError, Host, Machine, Pool, StateError
from hv.cli.vm_client import Vm
from hv.devices.virtio.rng import RngConfig
from hv.machine.control import SUFFIX, folder
from hv.snapshot.save import save

pytestmark = needs_kvm


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A micro kernel at its shell."""
    skip_without_build_tools()
    place = str(tmp_path_factory.mktemp("store") / "base")
    with Shell(kernel("micro") / "vmlinux", memory=64 << 20, devices=(RngConfig(),)) as shell:
        shell.booted()
        save(shell.machine, place)
    return place


def answers(machine: Machine, words: str = "alive") -> bool:
    """Whether a shell is there."""
    machine.console.send(f"echo {words[:2]}''{words[2:]}\n".encode())
    machine.console.wait_for(words.encode(), 30)
    return True


def until(true: Callable[[], Any], seconds: float = 15) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


# the library ------------------------------------------------------------------------------------------


def test_a_pool_hands_out_running_machines_and_fills_up_again(snapshot: str) -> None:
    with Pool(snapshot, ready=3) as pool:
        assert pool.ready == 3
        machines = [pool.take() for _ in range(5)]      # more than are ready
        assert all(machine.running() for machine in machines)
        assert all(answers(machine) for machine in machines)
        assert pool.taken == 5
        assert pool.waited >= 1
        assert until(lambda: pool.ready == 3)
        assert sorted(pool.host.machines) == [f"vm.{index}" for index in range(1, 6)]
        machines[0].stop()
        assert until(lambda: len(pool.host.machines) == 4)
        assert not pool.host.errors
        assert pool.error is None
    assert not any(machine.running() for machine in machines)
    with pytest.raises(StateError, match="the pool is closed"):
        pool.take()


def test_taking_is_quick(snapshot: str) -> None:
    times = []
    with Pool(snapshot, ready=8) as pool:
        for _ in range(24):
            start = time.perf_counter_ns()
            machine = pool.take()
            times.append((time.perf_counter_ns() - start) / 1e6)
            time.sleep(0.03)
            machine.stop()
            assert until(lambda: pool.ready >= 4)
        assert not pool.waited
    assert statistics.median(times) < 2, times


def test_a_pool_gives_everything_back(snapshot: str) -> None:
    def some() -> None:
        with Host() as host, Pool(snapshot, ready=2, host=host) as pool:
            pool.take("mine")

    some()
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd")), threads_gone()
    for _ in range(3):
        some()
    gc.collect()
    assert (sorted(os.listdir("/proc/self/fd")), threads_gone()) == before


def threads_gone() -> int:
    until(lambda: len(os.listdir("/proc/self/task")) == 1, 5)
    return len(os.listdir("/proc/self/task"))


def test_a_pool_that_can_not_be_filled_says_so(snapshot: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a pool of 0 machines"):
        Pool(snapshot, ready=0)
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(snapshot, copy)
    with Pool(str(copy), ready=1) as pool:
        (copy / "memory").unlink()
        pool.take()
        assert until(lambda: pool.error is not None)
        assert "memory" in str(pool.error)
        with pytest.raises(type(pool.error)):
            pool.take()


# the command ------------------------------------------------------------------------------------------


class Served:
    """`pyhv pool serve` of a snapshot, with names and a socket of its own."""

    def __init__(self, snapshot: str, place: Path, *options: str) -> None:
        self.socket = str(place / "p.sock")
        self.name = f"t{os.getpid()}-{os.urandom(3).hex()}"
        self.errors = place / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen([*PYHV, "pool", "serve", snapshot, "--socket", self.socket, "--name",
                                             self.name, *options], stdin=subprocess.DEVNULL, stdout=errors,
                                            stderr=errors)
        assert until(lambda: os.path.exists(self.socket)), self.errors.read_text()

    def call(self, *words: str) -> Any:
        done = pyhv("pool", *words, "--socket", self.socket, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call("status", "--json"))
        return found

    def left(self) -> list[str]:
        """Sockets of its VMs."""
        return [name for name in os.listdir(folder()) if name.startswith(self.name + ".")]

    def family(self) -> list[int]:
        """The processes of its VMs."""
        return [pid for template in children(self.process.pid) for pid in children(template)]


def children(parent: int) -> list[int]:
    """Processes that it forked."""
    return [int(pid) for path in Path(f"/proc/{parent}/task").glob("*/children") for pid in path.read_text().split()]


@pytest.fixture(params=["one process", "processes"])
def served(request: pytest.FixtureRequest, snapshot: str, tmp_path: Path) -> Iterator[Served]:
    options = ["--processes"] if request.param == "processes" else []
    pool = Served(snapshot, tmp_path, "--size", "2", *options)
    try:
        yield pool
    finally:
        if pool.process.poll() is None:
            pool.process.terminate()
            pool.process.wait(30)


def test_serve_take_status_stop(served: Served) -> None:
    names = [served.call("take") for _ in range(3)]
    assert names == [f"{served.name}.{index}" for index in (1, 2, 3)]
    assert until(lambda: served.status()["ready"] == 2)
    status = served.status()
    assert (status["running"], status["taken"], status["error"]) == (3, 3, None)
    pids = set()
    for name in names:
        with Vm(name) as vm:
            pids.add(vm.ask("status")["pid"])
            vm.ask("input", text="echo he''llo\n")
        with Vm(name) as vm:
            vm.ask("console", history=4096, view=True)
            seen = vm.rest()
            vm.socket.settimeout(20)
            while b"hello" not in seen:
                seen += vm.socket.recv(4096)
    assert len(pids) == (3 if status["processes"] else 1)
    assert (served.process.pid in pids) != status["processes"]
    assert pyhv("vm", "stop", "--force", names[1]).returncode == 0
    assert until(lambda: served.status()["running"] == 2)
    served.call("stop")
    assert served.process.wait(20) == 0
    assert not served.left()
    assert not os.path.exists(served.socket)


def test_kill_9_of_the_pool_leaves_nothing(served: Served) -> None:
    name = served.call("take")
    assert until(lambda: served.status()["ready"] == 2)
    family = served.family()
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait(10)
    assert until(lambda: not any(alive(pid) for pid in family)), family
    assert name not in pyhv("vm", "ls").stdout.decode()     # which removes what the killed one left
    assert not served.left()
    done = pyhv("pool", "take", "--socket", served.socket)
    assert done.returncode == 1
    assert b"no pool is served" in done.stderr
    assert not os.path.exists(served.socket)


def test_a_signal_ends_it_with_all_vms(served: Served) -> None:
    served.call("take")
    family = served.family()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(20) == 0
    assert not any(alive(pid) for pid in family)
    assert not served.left()
    assert not os.path.exists(served.socket)
    assert "Traceback" not in served.errors.read_text()


def test_a_killed_child_is_replaced(snapshot: str, tmp_path: Path) -> None:
    pool = Served(snapshot, tmp_path, "--size", "1", "--processes")
    try:
        assert until(lambda: pool.status()["ready"] == 1)
        waiting, = pool.family()
        os.kill(waiting, signal.SIGKILL)
        assert until(lambda: pool.family() not in ([], [waiting]) and pool.status()["ready"] == 1)
        name = pool.call("take")
        with Vm(name) as vm:
            os.kill(vm.ask("status")["pid"], signal.SIGKILL)
        assert until(lambda: pool.status()["running"] == 0)
        assert not pool.left()
    finally:
        pool.process.terminate()
        assert pool.process.wait(20) == 0


def test_a_killed_template_ends_the_pool(snapshot: str, tmp_path: Path) -> None:
    """And with it the VMs that were forked from it."""
    pool = Served(snapshot, tmp_path, "--size", "1", "--processes")
    try:
        assert until(lambda: pool.status()["ready"] == 1)
        pool.call("take")
        family = pool.family()
        template, = children(pool.process.pid)
        assert pool.status()["template"] == template
        os.kill(template, signal.SIGKILL)
        assert pool.process.wait(20) == 1
        assert until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family))
        assert not pool.left()
    finally:
        pool.process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_of_a_pool_is_an_orderly_end(snapshot: str, tmp_path: Path, number: signal.Signals) -> None:
    """As Ctrl-C is: the template and the VMs leave it to the one that serves the pool."""
    pool = Served(snapshot, tmp_path, "--size", "1", "--processes")
    try:
        assert until(lambda: pool.status()["ready"] == 1)
        pool.call("take")
        everybody = [pool.process.pid, *children(pool.process.pid), *pool.family()]
        for pid in everybody:
            os.kill(pid, number)
        assert pool.process.wait(20) == 0
        assert until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in everybody[1:]))
        assert not pool.left()
    finally:
        pool.process.kill()



def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_usage_errors_are_one_line(snapshot: str, tmp_path: Path) -> None:
    for words, text in ((("serve", "no-such", "--store", str(tmp_path)), b"there is no snapshot"),
                        (("serve", snapshot, "--name", "a/b"), b"VM name"),
                        (("serve", snapshot, "--socket", "/no/such/folder/s"), b"control socket"),
                        (("status", "--socket", str(tmp_path / "none")), b"no pool is served"),
                        (("serve", snapshot, "--size", "0"), b"--size")):
        done = pyhv("pool", *words)
        assert done.returncode in (1, 2), words
        assert text in done.stderr, done.stderr
        assert done.stderr.count(b"\n") == 1, done.stderr


# clones -----------------------------------------------------------------------------------------------


def test_clones_of_one_process(snapshot: str, tmp_path: Path) -> None:
    name = f"c{os.getpid()}"
    process = subprocess.Popen([*PYHV, "snapshot", "restore", snapshot, "--clone", "3", "--name", name],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wanted = [f"{name}.{index}" for index in (1, 2, 3)]
        assert until(lambda: all(os.path.exists(f"{folder()}/{each}{SUFFIX}") for each in wanted))
        for each in wanted:
            with Vm(each) as vm:
                assert vm.ask("status")["pid"] == process.pid
        with Vm(wanted[1]) as vm:
            vm.ask("stop", force=True)
        assert until(lambda: not os.path.exists(f"{folder()}/{wanted[1]}{SUFFIX}"))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert errors.decode() == f"pyhv: 3 clones run, {name}.1 to {name}.3\n"
        assert not [leaf for leaf in os.listdir(folder()) if leaf.startswith(name + ".")]
    finally:
        process.kill()
        process.wait(10)


def test_clones_end_by_themselves(snapshot: str) -> None:
    name = f"e{os.getpid()}"
    done = pyhv("snapshot", "restore", snapshot, "--clone", "2", "--name", name, "--timeout", "0.5")
    assert done.returncode == 124, done.stderr
    for options in (("--json", "x"), ("--control", "/tmp/x")):
        refused = pyhv("snapshot", "restore", snapshot, "--clone", "2", *options)
        assert refused.returncode == 2
        assert b"exclude each other" in refused.stderr
