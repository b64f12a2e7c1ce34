"""A cgroup tree of plain files, for controllers that this host does not have, as far as the kernel matters here.

A new group gets the files of its hierarchy's template. Writes are noted in order and replace what was in the file.
`refuse[leaf]` is an errno, or a function of (group's path, value) that gives one, or 0.
"""

from __future__ import annotations

import os
from pathlib import Path

from hv.container.cgroups import folder, manager
from hv.container.cgroups.detect import Layout

PROCS = {"cgroup.procs": ""}
V1 = {
    "memory": {"memory.limit_in_bytes": "9223372036854771712", "memory.memsw.limit_in_bytes": "9223372036854771712",
               "memory.soft_limit_in_bytes": "", "memory.kmem.limit_in_bytes": "", "memory.kmem.tcp.limit_in_bytes": "",
               "memory.swappiness": "60", "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
               "memory.use_hierarchy": "1", "memory.usage_in_bytes": "5000000", "memory.max_usage_in_bytes": "6000000"},
    "cpu": {"cpu.shares": "1024", "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000", "cpu.cfs_burst_us": "0",
            "cpu.idle": "0", "cpu.rt_period_us": "1000000", "cpu.rt_runtime_us": "0"},
    "cpuset": {"cpuset.cpus": "", "cpuset.mems": ""},
    "pids": {"pids.max": "max", "pids.current": "0"},
    "blkio": {"blkio.weight": "500", "blkio.weight_device": "", "blkio.leaf_weight": "", "blkio.leaf_weight_device": "",
              **{f"blkio.throttle.{name}_device": "" for name in ("read_bps", "write_bps", "read_iops", "write_iops")}},
    "devices": {"devices.allow": "", "devices.deny": "", "devices.list": "a *:* rwm\n"},
    "hugetlb": {"hugetlb.2MB.limit_in_bytes": "", "hugetlb.2MB.rsvd.limit_in_bytes": "",
                "hugetlb.1GB.limit_in_bytes": ""},
    "net_cls": {"net_cls.classid": "0"}, "net_prio": {"net_prio.ifpriomap": ""}, "rdma": {"rdma.max": ""},
    "freezer": {"freezer.state": "THAWED\n"}, "name=systemd": {},
}
V2_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma")
V2 = {
    "cgroup.controllers": "", "cgroup.subtree_control": "", "cgroup.freeze": "0", "cgroup.events": "populated 0\n",
    "cgroup.kill": "", "memory.max": "max", "memory.low": "0", "memory.high": "max", "memory.swap.max": "max",
    "memory.current": "5000000", "memory.events": "low 0\nhigh 0\nmax 0\noom 1\noom_kill 2\n", "pids.max": "max",
    "cpu.max": "max 100000", "cpu.max.burst": "0", "cpu.weight": "100", "cpu.idle": "0", "cpuset.cpus": "",
    "cpuset.mems": "", "io.max": "", "io.weight": "default 100", "hugetlb.2MB.max": "max", "rdma.max": "",
}


class Tree:
    """The tree below `root`, and the layout that leads there."""

    def __init__(self, root: Path, monkeypatch, v1: tuple[str, ...] = (), v2: tuple[str, ...] | None = None) -> None:
        self.root = root
        self.writes: list[tuple[str, str]] = []
        self.refuse: dict[str, object] = {}
        points = {}
        for name in v1:
            point = root / name.replace("name=", "")
            self._fill(point, V1[name] | PROCS)
            points[name] = str(point)
        if "cpuset" in v1:
            (root / "cpuset/cpuset.cpus").write_text("0-3\n")
            (root / "cpuset/cpuset.mems").write_text("0\n")
        self.v2 = root / "unified" if v2 is not None else None
        if self.v2:
            self._fill(self.v2, PROCS | {"cgroup.controllers": " ".join(v2), "cgroup.subtree_control": ""})
        self.layout = Layout(points, str(self.v2 or ""))
        monkeypatch.setattr(manager, "make", self._make)
        monkeypatch.setattr(folder.Folder, "put", lambda group, leaf, value: self._put(group, leaf, value))
        monkeypatch.setattr(folder.Folder, "write_lines", lambda group, *row: self._put_lines(group, *row))

    def wrote(self, *leaves: str) -> list[tuple[str, str]]:
        """The writes so far, of `leaves` or all but processes'."""
        return [row for row in self.writes if (row[0] in leaves if leaves else row[0] != "cgroup.procs")]

    def _fill(self, path: Path, files: dict[str, str]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for leaf, text in files.items():
            (path / leaf).write_text(text)

    def _make(self, path: str) -> bool:
        place = Path(path)
        hierarchy = place.relative_to(self.root).parts[0]
        known = place.exists()
        for part in [*reversed(place.parents), place]:
            if part.is_relative_to(self.root / hierarchy) and not part.exists():
                if hierarchy == "unified":
                    given = (part.parent / "cgroup.subtree_control").read_text()
                    self._fill(part, V2 | PROCS | {"cgroup.controllers": given})
                else:
                    self._fill(part, next(files for name, files in V1.items() if name.endswith(hierarchy)) | PROCS)
        return not known

    def _put(self, group: folder.Folder, leaf: str, value: str | int) -> None:
        text = str(value)
        why = self.refuse.get(leaf, 0)
        number = why(group.path, text) if callable(why) else why
        if number:
            raise OSError(number, os.strerror(number))
        path = Path(group.path, leaf)
        if not path.exists():
            raise FileNotFoundError(2, "no such file", str(path))
        self.writes.append((leaf, text))
        if leaf == "cgroup.subtree_control":
            names = path.read_text().split() + [word[1:] for word in text.split()]
            text = " ".join(dict.fromkeys(names))
            for child in path.parent.iterdir():
                if child.is_dir():
                    (child / "cgroup.controllers").write_text(text)
        path.write_text(text)

    def _put_lines(self, group: folder.Folder, leaf: str, lines: list[str], field: str) -> None:
        for line in lines:
            group.write(leaf, line, field)
