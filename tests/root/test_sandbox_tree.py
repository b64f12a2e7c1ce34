"""A bundle's tree on the host, for a VM: what is mounted here, what is left to the guest, and that it goes with us."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from framework.bundle import config, container, rootfs

from hv.container.spec import Spec
from hv.errors import HvError
from hv.sandbox.guest import PLAIN, mounts
from hv.sandbox.rootfs_tree import Tree, assemble

pytestmark = container


def in_a_process(made: dict[str, Any], bundle: Path, check: Callable[[Tree], object]) -> Any:
    """What `check` makes of the tree, in a process whose mounts are its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            warnings: list[str] = []
            tree = assemble(Spec(made, str(bundle)), warnings.append)
            os.write(writer, json.dumps([check(tree), warnings]).encode())
            code = 0
        except HvError as error:
            os.write(writer, json.dumps([f"{error}", []]).encode())
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert str(bundle) not in Path("/proc/self/mounts").read_text()
    return json.loads(said)


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    rootfs(tmp_path / "rootfs")
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/f").write_text("volume")
    made = config("true")
    made["root"]["readonly"] = False
    return made, tmp_path


def bound(source: Path | str, place: str, *options: str) -> dict[str, Any]:
    return {"destination": place, "type": "bind", "source": str(source), "options": ["bind", *options]}


def test_what_is_the_host_s_and_what_the_guest_s(bundle):
    made, folder = bundle
    made["mounts"] += [bound(folder / "volume", "/v"), bound(folder / "volume", "/r", "ro"),
                       {"destination": "/t", "type": "tmpfs", "source": "tmpfs",
                        "options": ["nosuid", "ro", "size=1m"]}]

    def check(tree: Tree) -> object:
        refused = 0
        try:
            Path(tree.path, "r/x").touch()
        except OSError as error:
            refused = error.errno or 0
        return [Path(tree.path, "v/f").read_text(), refused,
                [[row.kind, row.target, row.flags, row.data, row.optional] for row in tree.guest], tree.held]

    (text, refused, guest, held), warnings = in_a_process(made, folder, check)
    assert (text, refused, held, warnings) == ("volume", 30, [], [])
    kinds = {target: kind for kind, target, _, _, _ in guest}
    assert kinds == {"/proc": "proc", "/dev": "devtmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs", "/sys": "sysfs",
                     "/dev/mqueue": "mqueue", "/sys/fs/cgroup": "cgroup2", "/t": "tmpfs"}
    assert ["tmpfs", "/t", 3, "mode=755,size=1m", False] in guest


def test_only_what_differs_from_the_template_is_asked_of_the_guest(bundle):
    made, folder = bundle
    made["mounts"] += [{"destination": "/t", "type": "tmpfs", "source": "x", "options": ["mode=1777"]}]
    asked, _ = in_a_process(made, folder, lambda tree: [row for row, _ in mounts(tree)])
    assert asked == [["mount", "tmpfs", "x", "/t", "0", "mode=1777"]]
    made["mounts"] = [row | ({"options": ["nosuid"]} if row["type"] == "sysfs" else {}) for row in made["mounts"][:-1]]
    asked, _ = in_a_process(made, folder, lambda tree: [row for row, _ in mounts(tree)])
    assert [row[:4] for row in asked] == [["mount", "-", "-", "/sys"]]


def test_what_the_guest_s_mounts_hide_comes_on_top(bundle):
    """Below a tmpfs, in /dev, and by a link of the image that leads there."""
    made, folder = bundle
    (folder / "rootfs/etc/link").symlink_to("../run/named")
    made["mounts"] += [{"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": []},
                       bound(folder / "volume", "/run/v"), bound(folder / "volume/f", "/dev/log-file"),
                       bound(folder / "volume/f", "/etc/link")]
    (held, asked), _ = in_a_process(made, folder, lambda tree: [tree.held, [row for row, _ in mounts(tree)]])
    assert held == ["/run/v", "/dev/log-file", "/run/named"]
    assert [row[:4] for row in asked[-5:]] == [
        ["mount", "virtiofs", "root", PLAIN], *(["mount", "-", PLAIN + path, path] for path in held),
        ["unmount", PLAIN]]


def test_a_source_that_is_missing_is_named(bundle):
    made, folder = bundle
    for source in (folder / "nothing", folder / "volume/f/x"):
        said, _ = in_a_process({**made, "mounts": [*made["mounts"], bound(source, "/v")]}, folder, lambda tree: "made")
        assert str(source) in said and "mounts[" in said


def test_hooks_that_have_no_place_are_told_of(bundle):
    made, folder = bundle
    made["hooks"] = {kind: [{"path": "/bin/true"}] for kind in ("createRuntime", "createContainer", "poststop")}
    _, warnings = in_a_process(made, folder, lambda tree: None)
    assert len(warnings) == 1 and warnings[0].startswith("hooks.createContainer: not run")


def test_shared_memory_devices_and_sockets(bundle):
    made, folder = bundle
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        made["mounts"] = [row for row in made["mounts"] if row["destination"] != "/dev/shm"]
        made["mounts"] += [bound("/dev/null", "/dev/null"), bound(folder / "volume", "/dev/shm"),
                           bound(folder / "s", "/s")]
        guest, warnings = in_a_process(made, folder, lambda tree: [[row.target, row.kind, row.data]
                                                                   for row in tree.guest])
    assert any(row[:2] == ["/dev/shm", "tmpfs"] and row[2].startswith("mode=1777,size=") for row in guest)
    assert not [row for row in guest if row[0] == "/dev/null"]
    assert len(warnings) == 1 and "is a socket" in warnings[0]
    made["mounts"].append(bound("/dev/kvm", "/x"))
    said, _ = in_a_process(made, folder, lambda tree: None)
    assert "/dev/kvm is a device of the host" in said


def test_a_read_only_root_masked_paths_and_the_directory(bundle):
    made, folder = bundle
    made["root"]["readonly"] = True
    made["process"]["cwd"] = "/made/for/it"
    (folder / "rootfs/secret").write_text("not for programs")
    made["linux"]["maskedPaths"].append("/secret")

    def check(tree: Tree) -> object:
        try:
            Path(tree.path, "x").touch()
        except OSError as error:
            return [error.errno, Path(tree.path, "secret").read_bytes() == b"", Path(tree.path, "made/for/it").is_dir()]
        return "written"

    assert in_a_process(made, folder, check)[0] == [30, True, True]


def test_tmpcopyup_is_made_here_where_there_is_something_to_copy(bundle):
    made, folder = bundle
    made["mounts"] += [{"destination": place, "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}
                       for place in ("/etc", "/root")]
    found, _ = in_a_process(made, folder, lambda tree: [
        Path(tree.path, "etc/passwd").read_text()[:4], [row.target for row in tree.guest if row.kind == "tmpfs"]])
    assert found == ["root", ["/dev/shm", "/root"]]


def test_links_of_the_image_lead_nowhere_else(bundle):
    made, folder = bundle
    (folder / "outside").mkdir()
    (folder / "rootfs/out").symlink_to(folder / "outside")
    made["mounts"] += [bound(folder / "volume", "/out/v"),
                       {"destination": "/out/t", "type": "tmpfs", "source": "tmpfs", "options": []}]
    targets, _ = in_a_process(made, folder, lambda tree: [row.target for row in tree.guest])
    assert not list((folder / "outside").iterdir())
    assert str(folder / "outside") + "/t" in targets, "inside the root, under that name"
