"""Containers of a user who is not root, with subordinate ids: the runtime alone, and podman, beside runc."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.bundle import container
from framework.engines import IMAGE, groups_under, needs, until
from framework.rootless import User, UsersBundle, UsersPodman

from hv.container.cgroups.detect import detect

pytestmark = [*container, needs("unshare", "nsenter", "setpriv", "newuidmap", "newgidmap"),
              pytest.mark.skipif(not detect().v2, reason="this host has no cgroup version 2 to delegate")]
LOOP = "while :; do sleep 0.1; done"


@pytest.fixture(scope="module")
def plain() -> Iterator[User]:
    made = User()
    yield made
    made.close()


@pytest.fixture(scope="module")
def delegated() -> Iterator[User]:
    made = User(delegated=True)
    yield made
    made.close()


@pytest.fixture
def bundle(plain: User) -> Iterator[UsersBundle]:
    yield from _bundle(plain)


@pytest.fixture
def with_groups(delegated: User) -> Iterator[UsersBundle]:
    yield from _bundle(delegated)


def _bundle(user: User) -> Iterator[UsersBundle]:
    with UsersBundle(user) as made:
        yield made
    made.gone()
    assert not user.processes()
    assert [path.name for path in groups_under(user.group)] in ([], ["session", user.group])


def test_many_ids(bundle: UsersBundle) -> None:
    user = bundle.user
    for words in bundle.config["process"]["capabilities"].values():
        words.append("CAP_CHOWN")
    out = bundle.shell("tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map; id -u; stat -c %u:%g /bin; "
                       "echo x >/dev/null; stat -c %t:%T /dev/null; touch /tmp/mine; chown 5:6 /tmp/mine")
    maps = f"0 {user.id} 1 1 {user.first} 65535"
    assert " ".join(out.split()) == f"{maps} {maps} 0 0:0 1:3"
    made = (bundle.rootfs / "tmp/mine").stat()
    assert (made.st_uid, made.st_gid) == (user.first + 4, user.first + 5)


def test_another_user_and_groups(bundle: UsersBundle) -> None:
    bundle.config["process"]["user"] = {"uid": 7, "gid": 8, "additionalGids": [9, 65535], "umask": 0o77}
    assert bundle.shell("id -u; id -G; umask").split() == ["7", "8", "9", "65535", "0077"]


def test_life_of_a_detached_container(bundle: UsersBundle) -> None:
    assert bundle.create("sh", "-c", f"trap 'exit 5' TERM; touch /tmp/begun; {LOOP}").returncode == 0
    assert bundle.status() == "created"
    assert bundle.call("start", bundle.name).returncode == 0
    until(lambda: (bundle.rootfs / "tmp/begun").exists())
    done = bundle.call("exec", "--user", "3:4", bundle.name, "sh", "-c", "id -u; id -g; cat /proc/1/comm; exit 6")
    assert (done.returncode, done.stdout.split()) == (6, ["3", "4", "sh"]), done.stderr
    done = bundle.call("ps", "--format", "json", bundle.name)
    assert bundle.pid() in json.loads(done.stdout), done.stderr
    assert bundle.call("list", "-q").stdout.split() == [bundle.name]
    assert bundle.call("kill", bundle.name, "TERM").returncode == 0
    assert until(lambda: bundle.status() == "stopped")
    assert bundle.call("delete", bundle.name).returncode == 0


def test_a_fault_leaves_nothing(bundle: UsersBundle) -> None:
    done = bundle.run("/absent")
    assert done.returncode == 1 and "no such file" in done.stderr and done.stderr.count("\n") == 1


def test_ranges_that_are_somebody_elses(bundle: UsersBundle) -> None:
    for kind, program in (("uidMappings", "newuidmap"), ("gidMappings", "newgidmap")):
        rows = bundle.config["linux"][kind]
        kept, rows[1] = rows[1], rows[1] | {"hostID": 100}
        done = bundle.run("true")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert program in done.stderr and "/etc/subuid" in done.stderr
        rows[1] = kept


def test_without_the_programs_that_map() -> None:
    user = User(hidden=("newgidmap",))
    try:
        with UsersBundle(user) as made:
            done = made.run("true")
            assert done.returncode == 1 and done.stderr.count("\n") == 1
            assert "newgidmap is not installed" in done.stderr and "uidmap" in done.stderr
            for kind in ("uidMappings", "gidMappings"):
                del made.config["linux"][kind][1]           # the user alone needs nobody's help
            for row in made.config["mounts"]:
                row["options"] = [word for word in row["options"] if word != "gid=5"]
            assert made.shell("id -u; id -g").split() == ["0", "0"]
        made.gone()
    finally:
        user.close()


def test_without_a_group_limits_and_pausing_are_refused(bundle: UsersBundle) -> None:
    assert bundle.create("sleep", "1000").returncode == 0
    assert bundle.call("start", bundle.name).returncode == 0
    for words, reason in ((("pause", bundle.name), "pausing needs root, or cgroup delegation"),
                          (("update", "--pids-limit", "5", bundle.name), "limits need root, or a cgroup")):
        done = bundle.call(*words)
        assert done.returncode == 1 and reason in done.stderr and done.stderr.count("\n") == 1
    assert bundle.call("delete", "--force", bundle.name).returncode == 0
    bundle.config["linux"]["resources"]["pids"] = {"limit": 5}
    done = bundle.run("true")
    assert done.returncode == 1 and "linux.resources.pids" in done.stderr and done.stderr.count("\n") == 1


def test_in_a_delegated_group(with_groups: UsersBundle) -> None:
    """Beside the session's group, which holds processes; paused, counted, limited, killed as a whole."""
    made, user = with_groups, with_groups.user
    assert made.create("sh", "-c", f"sleep 1000 & {LOOP}").returncode == 0
    assert made.call("start", made.name).returncode == 0
    group = Path(detect().v2) / user.group / f"pyhv-{made.name}"
    assert str(made.pid()) in (group / "cgroup.procs").read_text().split()
    assert made.call("pause", made.name).returncode == 0 and made.status() == "paused"
    assert (group / "cgroup.freeze").read_text() == "1\n"
    assert made.call("resume", made.name).returncode == 0 and made.status() == "running"
    assert json.loads(made.call("events", "--stats", made.name).stdout)["data"]["cpu"]["usage"]["total"] > 0
    done = made.call("exec", made.name, "cat", "/proc/self/cgroup")
    assert "0::/\n" in done.stdout, done.stderr
    assert made.call("kill", "--all", made.name, "KILL").returncode == 0
    assert until(lambda: made.status() == "stopped")
    assert made.call("delete", made.name).returncode == 0 and not group.exists()


def test_limits_in_a_delegated_group(with_groups: UsersBundle) -> None:
    made, user = with_groups, with_groups.user
    top = Path(detect().v2) / user.group
    given = (top / "cgroup.controllers").read_text().split()
    if "pids" in given:
        resources, leaf, value = {"pids": {"limit": 77}}, "pids.max", "77\n"
    elif "hugetlb" in given:
        resources, leaf, value = {"hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}]}, "hugetlb.2MB.max", \
            f"{4 << 20}\n"
    else:
        pytest.skip(f"version 2 has no controller that could be delegated here: {given}")
    made.config["linux"]["resources"] |= resources
    assert made.create("sleep", "1000").returncode == 0
    assert (top / f"pyhv-{made.name}" / leaf).read_text() == value
    assert made.call("delete", "--force", made.name).returncode == 0



@pytest.fixture(scope="module", params=[(runtime, where) for runtime in ("", "runc") for where in (0, 1)],
                ids=["pyhv", "pyhv-delegated", "runc", "runc-delegated"])
def podman(request: pytest.FixtureRequest, plain: User, delegated: User) -> Iterator[UsersPodman]:
    runtime, where = request.param
    if runtime and not shutil.which(runtime):
        pytest.skip(f"{runtime} is not installed")
    user = (plain, delegated)[where]
    made = UsersPodman(user, runtime or user.runtime)
    try:
        yield made
    finally:
        made.call("system", "migrate", code=None)
        made.close()


needs_podman = needs("podman", "conmon")


@needs_podman
@pytest.mark.parametrize("flags, script, expected", [
    ((), "tr -s ' ' </proc/self/uid_map; id -u", "0 {id} 1\n 1 {first} 65536\n0"),
    (("--user", "7:8", "--group-add", "9"), "id -u; id -G; touch /tmp/x; stat -c %u:%g /tmp/x", "7\n8 9\n7:8"),
    (("--cap-drop", "ALL"), "grep CapEff /proc/self/status", "CapEff:\t0000000000000000"),
    (("--userns", "keep-id"), "id -u; id -g", "{id}\n{id}"),
    (("--read-only",), "touch /x 2>/dev/null || echo refused", "refused"),
    (("--privileged",), "echo x >/dev/full 2>/dev/null || test -w /sys && echo open", "open"),
    (("--volume", "{folder}/home:/mnt:ro"), "stat -c %u /mnt; touch /mnt/x 2>/dev/null || echo refused", "0\nrefused"),
    (("--tmpfs", "/mnt:size=1m,mode=755"), "stat -f -c %T /mnt; stat -c %a /mnt", "tmpfs\n755")], ids=str)
def test_podman_options_reach_the_container(podman: UsersPodman, flags: tuple[str, ...], script: str,
                                            expected: str) -> None:
    facts = vars(podman.user)
    assert podman.shell(script, *(flag.format(**facts) for flag in flags)) == expected.format(**facts)


@needs_podman
def test_podman_life_of_a_container(podman: UsersPodman) -> None:
    podman.run(IMAGE, "sh", "-c", "exit 7", code=7)
    assert "not found" in podman.run(IMAGE, "absent", code=127).stderr
    podman.call(*podman.new("run", "--detach", "--name", "box"), IMAGE, "sh", "-c",
                f"trap 'exit 5' TERM; echo begun; {LOOP}")
    until(lambda: "begun" in podman.said("logs", "box"))
    assert podman.said("exec", "--user", "5:6", "box", "sh", "-c", "id -u; cat /proc/1/comm") == "5\nsh"
    assert podman.said("exec", "--interactive", "box", "cat", input="through\n") == "through"
    assert podman.said("exec", "--tty", "box", "tty") == "/dev/pts/0"
    podman.call("exec", "box", "sh", "-c", "exit 4", code=4)
    assert "sleep" in podman.said("top", "box", "args")
    if podman.user.session:
        figures = json.loads(podman.said("stats", "--no-stream", "--format", "json", "box"))
        assert figures[0]["name"] == "box" and figures[0]["cpu_time"] != "0s"
        podman.call("pause", "box")
        assert podman.inspect("box")["State"]["Status"] == "paused"
        podman.call("unpause", "box")
    podman.call("stop", "--time", "20", "box")
    state = podman.inspect("box")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 5)
    podman.call("start", "box")
    podman.call("rm", "--force", "--time", "0", "box")
    assert until(lambda: not [path for path in groups_under(podman.user.group)
                              if path.name not in ("session", podman.user.group)])
