"""A host with networks of ours, in namespaces of its own: members that say their names, and ask each other.

When it is closed nothing may be left of it: no interface, rule, process or file. `site` is the fixture.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.namespaces import Host

from hv.linux.netns import Netns, new_netns
from hv.network.networks import Networks
from hv.network.shape import Attachment

SAY = "import socket,sys; s=socket.create_server(('0.0.0.0', int(sys.argv[1]))); print('up', flush=True)\n" \
      "while 1:\n c,a=s.accept(); c.sendall((sys.argv[2]+' '+a[0]).encode()); c.close()"
ASK = "import socket,sys; s=socket.create_connection((sys.argv[1], int(sys.argv[2])), 1); print(s.recv(99).decode())"


class Site:
    """A host with networks, and members by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = Host()
        self.host.__enter__()
        self.host.run("ip link set lo up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")       # ours: this thread is in the namespace
        self.networks = Networks(str(folder / "networks"), str(folder / "run"))
        self.held: dict[str, Netns] = {}
        self.told: dict[str, Attachment] = {}
        self.started: list[subprocess.Popen[str]] = []

    def join(self, name: str, *names: str, **options: object) -> Attachment:
        self.held[name] = netns = new_netns()
        self.told[name] = self.networks.attach(list(names) or ["pyhv"], name * 8, name=name, netns=netns.path,
                                               **options)   # type: ignore[arg-type]
        (self.folder / f"{name}.resolv").write_text(self.told[name].resolv_conf)
        (self.folder / f"{name}.hosts").write_text(self.told[name].hosts)
        return self.told[name]

    def _words(self, name: str, words: tuple[str, ...]) -> list[str]:
        """In the namespace of `name`, with its files of /etc."""
        if name not in self.held:
            return ["nsenter", f"--net={self.host.netns.path}", *words]
        return ["nsenter", f"--net={self.held[name].path}", "unshare", "--mount", "sh", "-ec",
                f"mount --bind {self.folder}/{name}.resolv /etc/resolv.conf; "
                f"mount --bind {self.folder}/{name}.hosts /etc/hosts; exec \"$@\"", "sh", *words]

    def call(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._words(name, words), text=True, capture_output=True, timeout=30, check=False)

    def serve(self, name: str, port: int) -> None:
        """`name` says its name to whoever connects."""
        child = subprocess.Popen(self._words(name, (sys.executable, "-c", SAY, str(port), name)), text=True,
                                 stdout=subprocess.PIPE)
        self.started.append(child)
        assert child.stdout and child.stdout.readline() == "up\n"

    def ask(self, name: str, where: str, port: int) -> str:
        """What `name` is told there: the server's name and the address that it sees; or the error."""
        done = self.call(name, sys.executable, "-c", ASK, where, str(port))
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]

    def address(self, name: str, number: int = 0) -> str:
        return self.told[name].interfaces[number].address

    def servers(self) -> list[int]:
        """Process IDs of name servers of this site."""
        done = subprocess.run(["pgrep", "-f", f"hv.network.dns .*{self.folder}/run "], text=True, capture_output=True,
                              check=False)
        return [int(word) for word in done.stdout.split()]

    def close(self) -> None:
        for child in self.started:
            child.kill()
            child.wait()
            assert child.stdout
            child.stdout.close()
        self.networks.sweep(())
        for name in [network["name"] for network in self.networks.ls()]:
            self.networks.rm(name)
        for netns in self.held.values():
            netns.close()
        left = (self.host.run("ip -br link").split(), self.host.run("nft list ruleset"), self.servers(),
                [str(path) for path in (self.folder / "run").rglob("*") if path.is_file() and path.name != "lock"])
        self.host.__exit__()
        assert left == (["lo", "UNKNOWN", "00:00:00:00:00:00", "<LOOPBACK,UP,LOWER_UP>"], "", [], []), left


@pytest.fixture(name="site")
def a_site(tmp_path: Path) -> Iterator[Site]:
    """One, with nothing on it yet."""
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.close()
