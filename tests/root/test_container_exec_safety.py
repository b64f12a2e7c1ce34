"""`exec` gives nothing of the host to the container: no descriptor, no directory, no look at the runtime itself."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from framework.bundle import RUNTIME, Bundle, container
from framework.bundle import bundle as bundle

pytestmark = container


def begin(made: Bundle, *args: str) -> int:
    """A running container; its first process."""
    done = made.create(*(args or ("sleep", "1000")))
    assert done.returncode == 0, done.stderr
    assert made.call("start", made.name).returncode == 0
    return made.pid()


def run(made: Bundle, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return made.call("exec", *words, **options)


def inside(made: Bundle, script: str, *flags: str) -> str:
    done = run(made, *flags, made.name, "sh", "-c", script)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_no_descriptor_of_ours_reaches_it(bundle):
    begin(bundle)
    held = os.open("/etc/hostname", os.O_RDONLY)
    try:
        script = "for fd in /proc/$$/fd/*; do readlink $fd > /dev/null && echo ${fd##*/}; done"
        done = run(bundle, bundle.name, "sh", "-c", script, pass_fds=(held,))
    finally:
        os.close(held)
    assert done.stdout.split() == ["0", "1", "2"]


def test_descriptors_that_are_asked_for_do_and_no_more(bundle):
    begin(bundle)
    outside = bundle.folder / "outside"
    outside.write_text("kept\n")
    command = [*RUNTIME, "--root", str(bundle.state), "exec", "--preserve-fds", "1", bundle.name, "sh", "-c",
               "cat <&3; cat <&4"]
    done = subprocess.run(["sh", "-c", 'exec 3<"$0" 4<"$0"; exec "$@"', str(outside), *command], capture_output=True,
                          text=True, timeout=20, check=False)
    assert done.stdout == "kept\n" and done.returncode != 0, done.stderr


def test_a_working_directory_outside_is_none(bundle):
    begin(bundle)
    held = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(held, True)
    try:
        for place in (f"/proc/self/fd/{held}", "/proc/self/fd/7", "/proc/1/root/../../..", "/tmp/link"):
            (bundle.rootfs / "tmp/link").unlink(missing_ok=True)
            (bundle.rootfs / "tmp/link").symlink_to(f"/proc/self/fd/{held}")
            done = run(bundle, "--cwd", place, bundle.name, "ls", "--", ".", pass_fds=(held,))
            assert "boot" not in done.stdout.split(), place
            assert done.returncode == 255 or "etc" in done.stdout
    finally:
        os.close(held)


def test_the_runtime_is_not_to_be_seen_from_inside(bundle):
    """Processes inside watch /proc while others enter: none of them ever runs the host's interpreter."""
    bundle.config["root"]["readonly"] = False
    bundle.config["process"]["capabilities"] = {kind: ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]
                                                for kind in ("bounding", "effective", "permitted")}
    begin(bundle, "sh", "-c", "while true; do for p in /proc/[0-9]*; do readlink $p/exe; done; done > /tmp/seen 2>&1")
    for _ in range(10):
        assert run(bundle, bundle.name, "true").returncode == 0
    seen = set((bundle.rootfs / "tmp/seen").read_text().splitlines())
    assert seen and not any("python" in line for line in seen), seen
    assert seen <= {"/bin/busybox", "/memfd:pyhv-init (deleted)"}, seen


@pytest.mark.parametrize("program", ["/proc/self/exe", "/proc/1/exe"])
def test_the_runtime_cannot_be_run_again_by_its_link(bundle, program):
    begin(bundle)
    done = run(bundle, bundle.name, program, "sh")
    assert done.returncode != 0 or program == "/proc/1/exe"
    (bundle.rootfs / "tmp/script").write_text("#!/proc/self/exe\n")
    (bundle.rootfs / "tmp/script").chmod(0o755)
    done = run(bundle, bundle.name, "/tmp/script")
    assert done.returncode != 0 and "Python" not in done.stdout + done.stderr
