"""What is left by a crash is found and removed, by detach() or sweep(); what lives is not touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from framework.run import ROOT
from framework.sites import Site, a_site  # noqa: F401 (the fixture `site`)

from hv.linux.netns import new_netns
from hv.network.ports import parse_publish

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

# a process that joins and parts without end, until it is killed at any point of it
CHURN = """
import sys
sys.path.insert(0, sys.argv[1])
from hv.linux.netns import new_netns
from hv.network.networks import Networks
from hv.network.ports import parse_publish
networks = Networks(sys.argv[2] + "/networks", sys.argv[2] + "/run")
for count in range(10 ** 6):
    with new_netns() as netns:
        networks.attach(["pyhv", "second"], f"churn{count % 3}", name=f"c{count % 3}", netns=netns.path,
                        ports=parse_publish(["7000-7003:80-83"]))
        if not count:
            print("going", flush=True)
        if count % 2:
            networks.detach(f"churn{count % 3}")
        # else: the namespace goes with all that is in it, and the next round or the sweep finds the rest
        else:
            networks.detach(f"churn{count % 3}", netns_ends=True)
"""


def test_killed_at_any_point(site: Site) -> None:
    site.networks.create("second")
    site.join("alive", ports=parse_publish(["8080:80"]))
    site.serve("alive", 80)
    for number in range(12):
        churn = subprocess.Popen([sys.executable, "-c", CHURN, str(ROOT), str(site.folder)], text=True,
                                 stdout=subprocess.PIPE)
        assert churn.stdout and churn.stdout.readline() == "going\n"
        time.sleep(number * 0.011)
        churn.kill()
        churn.wait()
        churn.stdout.close()
        site.networks.sweep(lambda: ["alive" * 8])
        assert [record["id"] for record in site.networks._store.records()] == ["alive" * 8]
        assert list(site.networks.inspect("pyhv")["members"]) == ["alive" * 8]
        assert not site.networks.inspect("second")["members"]
        assert "700" not in site.host.run("nft list maps") and "8080" in site.host.run("nft list maps")
        names = {path.parent.name for path in (site.folder / "run/on").glob("*/names/*/*")}
        assert names == {"alive", "alivealiveal"}
        site.networks.check(["pyhv"], ports=parse_publish(["7000-7003:80-83"]))
        assert not list((site.folder / "run").rglob("*~"))
    end = time.monotonic() + 5      # namespaces end in their own time
    while site.host.run("ip -br link").count("pv0") != 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert site.host.run("ip -br link").count("pv0") == 1, "that of `alive`"
    assert site.ask("host", "127.0.0.1", 8080).startswith("alive ")
    assert site.networks.sweep(["alive" * 8]) == []


def test_detach_is_idempotent_and_takes_all_of_a_crashed_instance(site: Site) -> None:
    with new_netns() as netns:
        site.networks.attach(["pyhv"], "dead", name="dead", netns=netns.path, ports=parse_publish(["8080:80"]))
    for _ in range(2):
        site.networks.detach("dead")
    site.networks.detach("never-there")
    assert "8080" not in site.host.run("nft list maps") and "pv" not in site.host.run("ip -o link")


def test_a_dead_name_server_is_started_by_the_next_command(site: Site) -> None:
    site.join("web")
    site.serve("web", 80)
    site.join("asker")
    commands = (lambda: site.networks.inspect("pyhv"), lambda: site.networks.sweep(["web" * 8, "asker" * 8]),
                lambda: site.join("third"))
    for command in commands:
        (server,) = site.servers()
        os.kill(server, signal.SIGKILL)
        assert site.ask("asker", site.address("web"), 80).startswith("web "), "nothing else depends on it"
        command()
        assert site.servers() not in ([], [server])
        assert site.ask("asker", "web", 80).startswith("web ")


def test_networks_that_nobody_would_take_down(site: Site) -> None:
    site.networks.create("plain", dns=False)
    site.join("one")
    site.join("two", "plain")
    (server,) = site.servers()
    os.kill(server, signal.SIGKILL)
    for name in ("one", "two"):
        site.networks.detach(name * 8)
    assert "pyhv1" in site.host.run("ip -br link")
    assert site.networks.sweep([]) == []
    assert "pyhv" not in site.host.run("ip -br link; nft list ruleset")


def test_files_of_what_runs_that_somebody_deleted(site: Site) -> None:
    site.join("lost", ports=parse_publish(["8080:80"]))
    for name in ("instances", "ports"):
        shutil.rmtree(site.folder / "run" / name)
    assert site.networks.sweep([]) == ["lost" * 8]
    assert "8080" not in site.host.run("nft list maps") and "pv" not in site.host.run("ip -o link")
    site.join("lost", ports=parse_publish(["8080:80"]))


def test_after_a_reboot(site: Site, tmp_path: Path) -> None:
    """No interfaces, no rules, an empty /run; the definitions are there."""
    site.networks.create("mine", subnet="10.213.61.0/24")
    site.join("one", "mine", ports=parse_publish(["8080:80"]))
    (server,) = site.servers()
    os.kill(server, signal.SIGKILL)
    site.host.run("for l in $(ip -o link show type bridge | cut -d: -f2); do ip link delete $l; done; "
                  "nft flush ruleset")
    site.held.pop("one").close()
    for _ in range(100):
        if "pv" not in site.host.run("ip -o link"):
            break
        time.sleep(0.05)
    shutil.rmtree(site.folder / "run")
    site.join("one", "mine", ports=parse_publish(["8080:80"]))
    site.serve("one", 80)
    assert site.ask("host", "127.0.0.1", 8080) == "one 10.213.61.1"
