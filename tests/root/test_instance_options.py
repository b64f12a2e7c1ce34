"""Options of `pyhv run` as a program inside sees them."""

from __future__ import annotations

import os

import pytest
from framework.instances import world as make_world

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


def inside(world, script, *options, image="busybox", **more):
    done = world.run("--rm", *options, image, "sh", "-c", script, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_what_an_image_says(world):
    world.image("says", Entrypoint=["sh", "-c"], Cmd=["echo $A; id -u; pwd"], Env=["PATH=/bin", "A=image"],
                User="somebody", WorkingDir="/made/here")
    assert world.run("--rm", "says").stdout == b"image\n1000\n/made/here\n"
    assert world.run("--rm", "-e", "A=ours", "-u", "0", "-w", "/tmp", "says").stdout == b"ours\n0\n/tmp\n"
    assert world.run("--rm", "--entrypoint", "/bin/echo", "says", "x").stdout == b"x\n"
    world.image("empty", Cmd=[])
    assert "no command" in world.fails(125, "run", "--network", "none", "empty")


def test_environment_and_identity(world, tmp_path):
    (tmp_path / "env").write_text("FILE=f\n")
    out = inside(world, "echo $X $FILE; hostname; cat /etc/hostname; id", "-e", "X=x", "--env-file",
                 str(tmp_path / "env"), "--hostname", "here", "-u", "somebody", "--group-add", "55")
    assert out.startswith("x f\nhere\nhere\nuid=1000(somebody) gid=1000(somebody)") and "55" in out


def test_capabilities_and_privileges(world):
    def caps(*options):
        return int(inside(world, "grep CapEff /proc/self/status", *options).split()[1], 16)

    assert bin(caps()).count("1") == 14 and caps("--cap-drop", "ALL") == 0
    assert caps("--cap-drop", "all", "--cap-add", "net_admin") == 1 << 12 and bin(caps("--privileged")).count("1") > 35
    assert inside(world, "grep NoNewPrivs /proc/self/status", "--security-opt", "no-new-privileges").split()[1] == "1"
    assert inside(world, "grep Seccomp: /proc/self/status").split()[1] == "2"
    assert inside(world, "grep Seccomp: /proc/self/status", "--security-opt", "seccomp=unconfined").split()[1] == "0"


def test_limits(world):
    out = inside(world, "ulimit -n; ulimit -c; cd /sys/fs/cgroup; cat pids/pids.max pids.max 2>/dev/null; true",
                 "--ulimit", "nofile=64", "--ulimit", "core=0", "--pids-limit", "33")
    assert out.split() == ["64", "0", "33"]
    done = world.run("--rm", "--pids-limit", "8", "busybox", "sh", "-c",
                     "for i in $(seq 1 20); do sleep 9 & done; true")
    assert b"fork" in done.stderr


def test_file_systems(world, tmp_path):
    (tmp_path / "bound").mkdir()
    (tmp_path / "bound" / "f").write_text("from the host")
    out = inside(world, "cat /b/f; touch /b/x || echo ro; touch /t/x && touch /m/y; echo w > /v/kept; df -k /dev/shm",
                 "-v", f"{tmp_path}/bound:/b:ro", "--tmpfs", "/t:size=1m", "--mount", "type=tmpfs,target=/m", "-v",
                 "named:/v", "--shm-size", "2m")
    assert "from the host" in out and "ro" in out and "2048" in out
    assert inside(world, "cat /v/kept", "-v", "named:/v") == "w\n"
    assert not (tmp_path / "bound" / "x").exists()


def test_a_volume_is_filled_from_the_image_and_one_without_a_name_goes(world):
    assert "busybox" in inside(world, "ls /bin", "-v", "filled:/bin:ro", "-e", "PATH=/bin")
    before = set(os.listdir(world.data / "volumes"))
    inside(world, "echo x > /a/x", "-v", "/a")
    assert set(os.listdir(world.data / "volumes")) == before


def test_a_root_that_can_not_be_written(world):
    done = world.run("--rm", "--read-only", "-w", "/new/dir", "busybox", "sh", "-c",
                     "pwd; touch /x; touch /dev/shm/y && echo shm")
    assert b"/new/dir\n" in done.stdout and b"Read-only" in done.stderr and b"shm" in done.stdout


def test_sysctl_init_and_devices(world):
    assert inside(world, "cat /proc/sys/net/ipv4/ip_default_ttl", "--sysctl", "net.ipv4.ip_default_ttl=99") == "99\n"
    assert inside(world, "echo $$", "--init") == "2\n"
    assert "character" in inside(world, "ls -l /dev/more; [ -c /dev/more ] && echo character", "--device",
                                 "/dev/null:/dev/more")
    assert "change the host" in world.fails(125, "run", "--network", "none", "--sysctl", "vm.swappiness=5", "busybox",
                                            "true")


def test_hosts_and_dns(world):
    out = inside(world, "cat /etc/hosts /etc/resolv.conf", "--add-host", "db:10.1.2.3", "--dns", "9.9.9.9")
    assert "10.1.2.3\tdb" in out.replace(" ", "\t") and "nameserver 9.9.9.9" in out


def test_the_hosts_network(world):
    done = world("run", "--rm", "--network", "host", "busybox", "sh", "-c", "readlink /proc/self/ns/net; hostname")
    assert done.stdout.decode().split() == [os.readlink("/proc/self/ns/net"), os.uname().nodename]


def test_an_image_that_is_not_there(world):
    assert "nosuch" in world.fails(125, "run", "--pull", "never", "nosuch:1")
    line = world.fails(125, "run", "--network", "none", "-q", "127.0.0.1:1/nosuch:1")
    assert "127.0.0.1:1" in line
