"""`--no-pivot`: what is left of the host below the container's root."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle  # a fixture

from hv.linux.mount import umount
from hv.linux.ns import CLONE_NEWNS, CLONE_NEWUSER, setns

pytestmark = container

MAPS = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]


def below(pid: int, userns: bool) -> dict[str, Any]:
    """What somebody finds who has entered the container's namespaces with all capabilities and unmounts its root."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(20)
            kinds = [("user", CLONE_NEWUSER)] if userns else []
            fds = [(os.open(f"/proc/{pid}/ns/{leaf}", os.O_RDONLY), flag)
                   for leaf, flag in [*kinds, ("mnt", CLONE_NEWNS)]]
            for fd, flag in fds:
                setns(fd, flag)
            umount("/")
            setns(fds[-1][0], CLONE_NEWNS)          # its root is what is on top now
            found = {name: sorted(os.listdir(name)) for name in ("/", "/proc", "/sys") if os.path.isdir(name)}
            os.write(writer, json.dumps(found).encode()[:60_000])
        except BaseException as error:
            os.write(writer, json.dumps({"error": repr(error)}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    found: dict[str, Any] = json.loads(data)
    assert "error" not in found, found
    return found


@pytest.mark.parametrize("propagation", ["", "rslave", "rshared", "private"])
def test_the_hosts_mounts_are_gone(bundle: Bundle, propagation: str) -> None:
    if propagation:
        bundle.config["linux"]["rootfsPropagation"] = propagation
    before = Path("/proc/self/mountinfo").read_text()
    assert bundle.create("sleep", "1000", flags=("--no-pivot",)).returncode == 0
    found = below(bundle.pid(), False)
    assert "usr" in found["/"]                                      # it is the host's root indeed
    assert found["/proc"] == [] and found["/sys"] == []
    assert Path("/proc/self/mountinfo").read_text() == before       # and the host's own are where they were


def test_where_they_cannot_be_unmounted_they_are_covered(bundle: Bundle) -> None:
    bundle.config["linux"]["namespaces"].append({"type": "user"})
    bundle.config["linux"] |= {"uidMappings": MAPS, "gidMappings": MAPS}
    before = Path("/proc/self/mountinfo").read_text()
    done = bundle.create("sleep", "1000", flags=("--no-pivot",))
    assert done.returncode == 0, done.stderr
    found = below(bundle.pid(), True)
    assert "usr" in found["/"] and found["/proc"] == [] and found["/sys"] == []
    assert Path("/proc/self/mountinfo").read_text() == before


def test_a_shared_host_loses_nothing(bundle: Bundle) -> None:
    """The same where the host's mounts are shared, as systemd makes them, some on top of one another."""
    script = ("mount --make-rshared /; mkdir -p {0}/a; mount -t tmpfs one {0}/a; mount -t proc two {0}/a; "
              "grep -v ' - cgroup' /proc/self/mountinfo >{0}/before; {1} && "
              "grep -v ' - cgroup' /proc/self/mountinfo >{0}/after; umount {0}/a; umount {0}/a")
    for propagation in ("rslave", "rshared"):
        bundle.config["linux"]["rootfsPropagation"] = propagation
        bundle.config["process"]["args"] = ["true"]
        bundle.write()
        command = " ".join([*RUNTIME, "--root", str(bundle.state), "run", "--no-pivot", bundle.name])
        done = bundle.call(runtime=["unshare", "-m", "sh", "-c", script.format(bundle.folder, command) + " #"])
        assert done.returncode == 0, done.stderr
        before, after = ((bundle.folder / leaf).read_text() for leaf in ("before", "after"))
        assert before == after and "two" in before, propagation
