"""The network device in real Linux guests: a tap, user-mode networking, a cable between two guests."""

from __future__ import annotations

import http.server
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import needs_kvm

from hv.devices.virtio.net import Net
from hv.devices.virtio.net_config import NetConfig

pytestmark = [needs_kvm, pytest.mark.timeout(2400),
              pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/net/tun"),
                                 reason="making a tap needs root and /dev/net/tun")]

HOST, GUEST = "10.213.77.1", "10.213.77.2"          # on the tap
CABLE = ("10.213.78.1", "10.213.78.2")              # on the pair
CONTENT = bytes(range(256)) * 1024                  # 256 KiB
BUSYBOX = Path("/bin/busybox").read_bytes()         # the guest has it too, and serves it
RATE = 20000
SECONDS = 60


class Guests:
    """`first` has a tap (eth0), user-mode networking (eth1) and a cable (eth2) to `second` (eth0)."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.pair = str(folder / "cable")
        self.image = kernel("micro") / "vmlinux"
        tap = NetConfig("tap", address=f"{HOST}/24")
        user = NetConfig("user", forward=f"{self.port}:80", mtu=65520)
        self.first = Shell(self.image, devices=(tap, user, NetConfig(pair=self.pair)), timeout=300)
        self.second: Shell | None = None

    def devices(self) -> list[Net]:
        devices = list(self.first.machine.devices.values())
        assert all(isinstance(device, Net) for device in devices)
        return devices      # type: ignore[return-value]

    def start_second(self, rate: int | None = None) -> Shell:
        self.second = Shell(self.image, devices=(NetConfig(pair=self.pair, rate=rate),), timeout=200).booted()
        self.second.run(f"ip link set eth0 up; ip addr add {CABLE[1]}/24 dev eth0")
        return self.second

    def second_leaves(self) -> None:
        assert self.second is not None
        self.second.machine.close()
        self.second = None
        end = time.monotonic() + 5
        while self.devices()[2].backend.carrier and time.monotonic() < end:
            time.sleep(0.01)

    def close(self) -> None:
        for guest in (self.first, self.second):
            if guest is not None:
                guest.machine.close()


def fetch(host: str, port: int) -> bytes:
    with urllib.request.urlopen(f"http://{host}:{port}/busybox", timeout=SECONDS) as answer:
        return answer.read()        # type: ignore[no-any-return]


def free_port() -> int:
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        port: int = test.getsockname()[1]
        return port


def tap_name(guests: Guests) -> str:
    return guests.devices()[0].backend.name         # type: ignore[attr-defined, no-any-return]


def children() -> set[str]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set((task / "children").read_text().split())
    return found


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    skip_without_build_tools()
    folder = tmp_path_factory.mktemp("net")
    before = children(), set(os.listdir("/proc/self/fd")), threading.active_count()
    found = Guests(folder)
    try:
        found.first.booted()
        found.first.run(f"ip link set lo up; ip link set eth0 up; ip addr add {GUEST}/24 dev eth0; "
                        f"ip link set eth1 up; ip addr add 10.0.2.15/24 dev eth1; ip link set eth2 up; "
                        f"ip addr add {CABLE[0]}/24 dev eth2; httpd -p 80 -h /bin")
        yield found
    finally:
        found.close()
    assert not any(device.faults for device in found.devices())
    after = children(), set(os.listdir("/proc/self/fd")), threading.active_count()
    assert after == before, "a process, a descriptor or a thread was left behind"
    assert tap_name(found) not in os.listdir("/sys/class/net")
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """An HTTP server of this host that serves CONTENT; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found.server_port
        found.shutdown()
        thread.join()


def md5(data: bytes) -> str:
    import hashlib

    return hashlib.md5(data).hexdigest()


def test_the_driver_sees_what_was_configured(guests: Guests) -> None:
    seen = guests.first.run("cat /sys/class/net/eth*/address /sys/class/net/eth*/carrier").split()[:6]
    assert seen[:3] == [device.mac.hex(":") for device in guests.devices()]
    assert seen[3:] == ["1", "1", "0"]          # nobody is at the other end of the cable yet
    assert len(set(seen[:3])) == 3


def test_ping_over_a_tap(guests: Guests) -> None:
    assert "3 packets received" in guests.first.run(f"ping -c 3 -i 0.2 -W 5 {HOST}")


def test_fetch_a_file_over_a_tap(guests: Guests, server: int) -> None:
    answer = guests.first.run(f"wget -q -O - http://{HOST}:{server}/ | md5sum", timeout=SECONDS)
    assert md5(CONTENT) in answer


def test_serve_a_file_over_a_tap_in_large_segments(guests: Guests) -> None:
    tap = guests.devices()[0]
    before = tap.sent
    # Linux sends small segments where the round trip is long, as it is on a slow host; not below that many (tcp(7)).
    guests.first.run("echo 40 > /proc/sys/net/ipv4/tcp_min_tso_segs")
    assert fetch(GUEST, 80) == BUSYBOX
    assert tap.longest_sent > 30000             # without TSO no frame is longer than 1526 bytes
    assert tap.sent - before < len(BUSYBOX) // 1460 // 2


def test_user_mode_fetches_from_the_host(guests: Guests, server: int) -> None:
    answer = guests.first.run(f"wget -q -O - http://10.0.2.2:{server}/ | md5sum", timeout=SECONDS)
    assert md5(CONTENT) in answer


def test_user_mode_serves_through_a_forwarded_port(guests: Guests) -> None:
    assert fetch("127.0.0.1", guests.port) == BUSYBOX


def test_dhcp_of_user_mode(guests: Guests) -> None:
    answer = guests.first.run("udhcpc -i eth1 -n -q -t 5 -T 2 -s /bin/true 2>&1", timeout=SECONDS)
    assert re.search(r"lease of 10\.0\.2\.15 obtained", answer), answer


def test_the_link_goes_down_and_up(guests: Guests) -> None:
    tap = guests.devices()[0]
    host_side = Path(f"/sys/class/net/{tap_name(guests)}/carrier")
    tap.set_link(False)
    assert guests.first.run("cat /sys/class/net/eth0/carrier").startswith("0")
    assert host_side.read_text() == "0\n"
    tap.set_link(True)
    assert guests.first.run("cat /sys/class/net/eth0/carrier").startswith("1")
    assert "1 packets received" in guests.first.run(f"ping -c 1 -W 5 {HOST}")


def test_two_guests_on_a_cable(guests: Guests) -> None:
    cable = guests.devices()[2]
    second = guests.start_second(rate=RATE)
    assert guests.first.run("cat /sys/class/net/eth2/carrier").startswith("1")
    assert "2 packets received" in guests.first.run(f"ping -c 2 -i 0.2 -W 5 {CABLE[1]}")
    assert "2 packets received" in second.run(f"ping -c 2 -i 0.2 -W 5 {CABLE[0]}")
    assert second.machine.devices["net0"].mac != cable.mac      # type: ignore[attr-defined]
    # What the second one receives is limited.
    began = time.monotonic()
    second.run(f"wget -q -O /tmp/got http://{CABLE[0]}/busybox & sleep 4; kill %1", timeout=SECONDS)
    took = time.monotonic() - began
    got = int(second.run("stat -c %s /tmp/got").split()[0])
    assert 0.2 * RATE * 4 < got < RATE * (took + 0.2)
    guests.second_leaves()
    assert guests.first.run("cat /sys/class/net/eth2/carrier").startswith("0")


def test_a_guest_comes_back(guests: Guests) -> None:
    second = guests.start_second()
    assert "2 packets received" in second.run(f"ping -c 2 -i 0.2 -W 5 {CABLE[0]}")
    guests.second_leaves()
