"""What CRIU refuses, or breaks off, leaves the container running, or nothing; and what is refused without it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
from framework.bundle import bundle as bundle
from framework.bundle import container
from framework.criu import COUNTER, needs_criu
from framework.criu import saved as saved
from framework.groups import until

pytestmark = container


@needs_criu
def test_what_criu_refuses_goes_on(saved):
    made = saved.bundle
    for path in ("/usr/bin/flock", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"):
        (made.rootfs / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, made.rootfs / path[1:])
    saved.run("exec 9>/tmp/lock; flock 9; " + COUNTER)
    saved.count(2)
    pid = made.pid()
    before = set(os.listdir(made.folder))
    done = saved.checkpoint()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "dump.log" in done.stderr, done.stderr
    assert "--file-locks" in done.stderr, done.stderr
    assert made.status() == "running" and made.pid() == pid
    saved.count(saved.count() + 2)
    assert [path.name for path in saved.images.iterdir()] == ["dump.log"]
    assert set(os.listdir(made.folder)) - before <= {saved.images.name, "errors"}
    assert not saved.criu_runs()
    assert saved.checkpoint("--file-locks").returncode == 0
    assert saved.restore("--file-locks").returncode == 0
    locked = made.call("exec", made.name, "sh", "-c", "exec 9>/tmp/lock; flock -n 9 || echo held")
    assert locked.stdout == "held\n", locked


@needs_criu
def test_a_failed_restore_leaves_nothing(saved):
    made = saved.bundle
    saved.run(COUNTER)
    saved.count(2)
    assert saved.checkpoint().returncode == 0
    stopped = saved.count()
    core = next(iter(sorted(saved.images.glob("core-*.img"))))
    whole = core.read_bytes()
    core.write_bytes(whole[:40])
    done = saved.restore()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "restore.log" in done.stderr, done.stderr
    made.gone()
    core.write_bytes(whole)
    made.config["hooks"] = {"createRuntime": [{"path": "/bin/false"}]}
    made.write()
    done = saved.restore()
    assert done.returncode == 1 and "hooks.createRuntime[0] /bin/false: exit code 1" in done.stderr, done.stderr
    made.gone()
    made.config.pop("hooks")
    made.config["linux"]["resources"]["unified"] = {"memory.nonsense": "1"}
    made.write()
    done = saved.restore()
    assert done.returncode == 1 and "unified" in done.stderr, done.stderr
    made.gone()
    assert saved.count() == stopped and not saved.criu_runs()
    made.config["linux"]["resources"].pop("unified")
    made.write()
    assert saved.restore().returncode == 0
    saved.count(stopped + 2)


@needs_criu
@pytest.mark.parametrize("delay", [0.3, 0.6, 1.0, 1.5, 2.2])
def test_killed_in_the_middle_the_container_goes_on_or_is_gone(saved, delay):
    made = saved.bundle
    saved.run(COUNTER)
    saved.count(2)
    process = saved.start("checkpoint", "--leave-running")
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not saved.criu_runs(), 30)
    assert made.status() == "running"
    saved.count(saved.count() + 2)
    assert saved.checkpoint().returncode == 0
    process = saved.start("restore", "--detach")
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not saved.criu_runs(), 30)
    made.call("delete", "--force", made.name)
    made.gone()


def test_a_user_namespace_is_refused(saved):
    made = saved.bundle
    made.config["linux"]["namespaces"].append({"type": "user"})
    maps = [{"containerID": 0, "hostID": 0, "size": 65536}]
    made.config["linux"] |= {"uidMappings": maps, "gidMappings": maps}
    saved.run(COUNTER)
    done = saved.bundle.call("--criu", "/bin/true", "checkpoint", "--image-path", str(saved.images), made.name)
    assert done.returncode == 1 and "linux.namespaces: user" in done.stderr, done.stderr
    saved.count(saved.count() + 2)


@pytest.mark.parametrize("words, said", [
    (("--lazy-pages",), "--lazy-pages: not offered"),
    (("--page-server", "127.0.0.1:9"), "--page-server: not offered"),
    (("--empty-ns", "pid"), "--empty-ns 'pid'"),
    (("--manage-cgroups-mode", "loose"), "--manage-cgroups-mode 'loose'"),
])
def test_flags_that_are_refused(bundle, words, said):
    done = bundle.call("checkpoint", *words, bundle.name)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_host_without_criu(saved):
    saved.run(COUNTER)
    for command in ("checkpoint", "restore"):
        done = saved.bundle.call("--criu", "/nowhere/criu", command, "--image-path", str(saved.images),
                                 saved.bundle.name)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "criu is not installed on this host as /nowhere/criu" in done.stderr
    saved.count(saved.count() + 2)
    assert not saved.images.exists()


def test_a_criu_that_dies_leaves_the_container_running(saved):
    saved.run(COUNTER)
    done = saved.bundle.call("--criu", "/bin/false", "checkpoint", "--image-path", str(saved.images), saved.bundle.name)
    assert done.returncode == 1 and "it ended without a reason" in done.stderr, done.stderr
    saved.count(saved.count() + 2)
    assert not list(saved.images.iterdir())


@pytest.mark.skipif(shutil.which("criu") is None, reason="criu is not installed")
@pytest.mark.skipif(not needs_criu.args[0], reason="criu works here")
def test_a_kernel_that_criu_does_not_understand(saved):
    saved.run(COUNTER)
    saved.count(2)
    pid = saved.bundle.pid()
    check = subprocess.run(["criu", "check"], capture_output=True, text=True, check=False, timeout=60)
    reason = (check.stdout + check.stderr).splitlines()[0].partition("): ")[2]
    done = saved.checkpoint()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert reason in done.stderr and "`criu check` fails on this kernel" in done.stderr, (reason, done.stderr)
    assert saved.bundle.pid() == pid
    saved.count(saved.count() + 2)
    assert [path.name for path in saved.images.iterdir()] == ["dump.log"]
    assert not saved.criu_runs()


def test_what_does_not_run_has_no_state(bundle, tmp_path):
    assert bundle.create("sleep", "100").returncode == 0
    done = bundle.call("--criu", "/bin/true", "checkpoint", "--image-path", str(tmp_path / "i"), bundle.name)
    assert done.returncode == 1 and "cannot checkpoint a container that is created" in done.stderr
    done = bundle.call("--criu", "/bin/true", "checkpoint", "--image-path", str(tmp_path / "i"), "nobody")
    assert done.returncode == 1 and "does not exist" in done.stderr
    assert not (tmp_path / "i").exists()


def test_restore_needs_images_and_a_free_name(saved):
    made = saved.bundle
    made.write()
    done = made.call("--criu", "/bin/true", "restore", "--image-path", str(saved.images), made.name)
    assert done.returncode == 1 and "--image-path" in done.stderr and "No such file" in done.stderr
    saved.images.mkdir()
    done = made.call("--criu", "/bin/true", "restore", "--image-path", str(saved.images), made.name)
    assert done.returncode == 1 and "no checkpoint is in there" in done.stderr
    (saved.images / "inventory.img").touch()
    saved.run(COUNTER)
    done = made.call("--criu", "/bin/true", "restore", "--detach", "--image-path", str(saved.images), made.name)
    assert done.returncode == 1 and "exists" in done.stderr
    assert made.status() == "running"


def test_a_restore_that_criu_breaks_off_leaves_nothing(saved):
    made = saved.bundle
    made.write()
    saved.images.mkdir()
    (saved.images / "inventory.img").touch()
    done = made.call("--criu", "/bin/false", "restore", "--detach", "--image-path", str(saved.images), made.name)
    assert done.returncode == 1 and "it ended without a reason" in done.stderr, done.stderr
    made.gone()
