"""A Linux guest on a network of ours, by the packet socket: names, published ports, the way to and from a container."""

from __future__ import annotations

import os
from hashlib import sha256

import pytest
from framework.linux import Shell, kernel, skip_without_build_tools
from framework.run import needs_kvm
from framework.sites import Site, a_site  # noqa: F401 (the fixture `site`)

from hv.devices.virtio import net_ids as net
from hv.devices.virtio.net import Net
from hv.devices.virtio.net_config import NetConfig
from hv.devices.virtio.net_packet import NetPacket
from hv.network.ports import parse_publish

pytestmark = [needs_kvm, pytest.mark.timeout(2400),
              pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")]


def test_a_guest_and_a_container_on_one_network(site: Site) -> None:
    skip_without_build_tools()
    image = kernel("micro") / "vmlinux"
    told = site.join("box", vm=True, ports=parse_publish(["8080:80", "5300:53/udp"]))
    site.join("mate")
    site.serve("mate", 80)
    with Shell(image, devices=(NetConfig(packet="eth0", netns=told.netns),), timeout=400) as guest:
        (device,) = guest.machine.devices.values()
        assert isinstance(device, Net) and isinstance(device.backend, NetPacket)
        backend, card = device.backend, told.interfaces[0]
        assert (backend.address, backend.prefix, backend.gateway, device.mac.hex(":"), device.mtu) == \
            (card.address, card.prefix, card.gateway, card.mac, card.mtu)
        guest.booted()
        lines = " ".join(line.replace(" ", "_") for line in told.resolv_conf.splitlines())
        guest.run(f"ip link set eth0 up; ip addr add {backend.address}/{backend.prefix} dev eth0; "
                  f"ip route add default via {backend.gateway}; for l in {lines}; do echo $l | tr _ ' '; done "
                  ">/etc/resolv.conf")
        assert site.address("mate") in guest.run("nslookup mate", 90)
        assert f"mate {card.address}" in guest.run(f"nc {site.address('mate')} 80 </dev/null", 90)
        guest.run("mkdir -p /www; dd if=/bin/busybox of=/www/busybox bs=64k count=4; httpd -p 80 -h /www")
        with open("/bin/busybox", "rb") as file:
            content = file.read(4 * 65536)
        for name, where in (("host", "127.0.0.1:8080"), ("mate", "box"), ("mate", f"{card.gateway}:8080")):
            done = site.call(name, "sh", "-ec", f"curl -sS -m 90 http://{where}/busybox | sha256sum")
            assert done.returncode == 0, done.stderr
            assert done.stdout.split()[0] == sha256(content).hexdigest(), where
        assert device.dropped == 0 and device.longest_sent > net.HEADER_SIZE + 1514, "large segments leave the guest"
        site.networks.detach("box" * 8)
        for _ in range(50):
            if device.lost:
                break
            guest.run("sleep 0.1")
        assert device.lost and guest.run("cat /sys/class/net/eth0/carrier").strip().startswith("0")
