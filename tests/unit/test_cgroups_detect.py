"""The mount table understood."""

from __future__ import annotations

import pytest

from hv.container.cgroups.detect import clean, parse_mounts

HYBRID = b"""31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 /docker/abc /sys/fs/cgroup/memory rw shared:2 master:3 - cgroup cgroup rw,memory,clone_children
34 31 0:30 / /mnt/other rw - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
42 31 0:99 / /mnt/with\\040space rw - cgroup none rw,pids
"""


def test_a_hybrid_host():
    layout = parse_mounts(HYBRID)
    assert layout.v1 == {"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
                         "memory": "/sys/fs/cgroup/memory", "name=systemd": "/sys/fs/cgroup/systemd",
                         "pids": "/mnt/with space"}
    assert layout.v2 == "/sys/fs/cgroup/unified"
    assert layout.roots["memory"] == "/docker/abc"
    assert layout.mounts()[""] == layout.v2


def test_version_2_alone_and_nothing_at_all():
    layout = parse_mounts(b"31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n")
    assert (layout.v1, layout.v2, layout.mounts()) == ({}, "/sys/fs/cgroup", {"": "/sys/fs/cgroup"})
    assert parse_mounts(b"1 1 0:1 / / rw - ext4 /dev/sda rw\n").mounts() == {}


@pytest.mark.parametrize(("path", "expected"), [
    ("/a/b", "/a/b"), ("a", "/a"), ("/../../etc", "/etc"), ("//a//b/../c/", "/a/c"), ("/", "/"), ("..", "/"), ("",
        "/")])
def test_a_path_never_leads_above_the_root(path, expected):
    assert clean(path) == expected
