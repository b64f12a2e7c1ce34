"""`--net`: what the user asks of a network device, and the MAC address it gets.

A MAC address that is not given is derived: 02 (locally administered, IEEE 802 8.2) and five bytes of the SHA-256 of
"pyhv net", the host's /etc/machine-id, what the cable ends in (tap=NAME, pair=SOCKET and which end, ...) and the
device's name in the machine. So it stays when a guest is started again, and no two guests on one network share it.
"""

from __future__ import annotations

__all__ = ["NetConfig", "derive_mac"]

import os

from hv.devices.virtio.net import Net
from hv.devices.virtio.net_backend import Backend, Unplugged
from hv.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.device import VirtioDevice

    Forward = tuple[str, str, int, int]     # protocol, address and port of the host, port of the guest

_UNITS = {"K": 10 ** 3, "M": 10 ** 6, "G": 10 ** 9}
INTERFACE_MOST = 15                         # IFNAMSIZ - 1 (include/uapi/linux/if.h)
MTU_LEAST, MTU_MOST = 68, 65520             # RFC 791; what passt and Linux taps can
LOOPBACK = "127.0.0.1"
_EXAMPLES = "tap, tap=NAME, user, packet=INTERFACE, pair=SOCKET, vhost-user=SOCKET or none"


class NetConfig:
    """`kind` is "tap", "user" or "none" (a card whose cable ends nowhere), or `tap`, `packet`, `pair`, `vhost_user`
    name one; or `kind` is a Backend made before. `netns` (of packet) is the path of a network namespace.

    `mac` is text or 6 bytes; `rate` bytes a second in each direction, with K, M or G (powers of 10); `address` (of the
    host's side of a new tap) like 10.0.0.1/24; `forward` (of user) [ADDRESS:]HOST:GUEST[/udp], several joined by +;
    `mtu` bytes.
    """

    FIELDS = (("kind", "text?"), ("tap", "text?"), ("packet", "text?"), ("netns", "text?"), ("pair", "text?"),
              ("vhost_user", "text?"), ("mac", "text?"), ("rate", "number?"), ("address", "text?"),
              ("forward", "text?"), ("mtu", "number?"))

    def __init__(self, kind: str | Backend | None = None, *, tap: str | None = None, packet: str | None = None,
                 netns: str | None = None, pair: str | None = None, vhost_user: str | None = None,
                 mac: str | bytes | None = None, rate: str | int | None = None, address: str | None = None,
                 forward: str | None = None, mtu: str | int | None = None) -> None:
        if tap is not None and kind is None:
            kind = "tap"
        given = {name: value for name, value in (("packet", packet), ("pair", pair), ("vhost-user", vhost_user))
                 if value is not None}
        named = list(given)
        kinds = [*([kind] if kind is not None else []), *named]
        if len(kinds) != 1 or (isinstance(kind, str) and kind not in ("tap", "user", "none")):
            asked = "nothing" if not kinds else " and ".join(map(str, kinds))
            raise ConfigError(f"--net: {asked} asked for", f"one of {_EXAMPLES}")
        self.kind = kinds[0]
        self.vhost_user = vhost_user        # guest RAM must be shared then (hv/machine/config.py)
        self.tap = parse_name(_text("tap", tap)) if tap is not None else ""
        self.path = _text(named[0], given[named[0]]) if named else ""
        if self.kind == "packet":
            parse_name(self.path, "packet")
        self.netns = _text("netns", netns) if netns is not None else ""
        self.mac = parse_mac(mac) if mac is not None else b""
        self.rate = parse_rate(rate) if rate is not None else 0
        self.mtu = parse_mtu(mtu) if mtu is not None else 0
        self.address = parse_address(_text("address", address)) if address is not None else None
        self.forwards = parse_forwards(_text("forward", forward)) if forward is not None else ()
        for name, value, place in (("address", address, "tap"), ("forward", forward, "user"),
                                   ("netns", netns, "packet")):
            if value is not None and self.kind != place:
                raise ConfigError(f"--net: {name}= goes with {place} only", "see docs/net.md")
        if self.kind == "vhost-user" and (self.rate or self.mtu):
            raise ConfigError("--net vhost-user: rate= and mtu= are the back end's to set", "see docs/net.md")
        if self.kind == "packet" and self.mtu:
            raise ConfigError("--net packet: mtu= is the interface's", "ip link set dev ... mtu ...")

    def create(self) -> VirtioDevice:
        """The device, its cable plugged in. ConfigError where that can't be."""
        if self.kind == "vhost-user":
            from hv.devices.vhost_user.net import VhostUserNet

            device: VirtioDevice = VhostUserNet(
                self.path, mac=self.mac or derive_mac(f"vhost-user={self.path}", "net"))
            return device
        if self.kind == "packet":
            from hv.devices.virtio.net_packet import NetPacket

            packet = NetPacket(self.path, self.netns)
            return Net(packet, self.mac or packet.mac, self.rate, packet.mtu)
        return Net(self._backend(), self.mac, self.rate, self.mtu)

    def _backend(self) -> Backend:
        if isinstance(self.kind, Backend):
            return self.kind
        if self.kind == "tap":
            from hv.devices.virtio.net_tap import NetTap

            return NetTap(self.tap, self.address, self.mtu)
        if self.kind == "user":
            from hv.devices.virtio.net_user import NetUser

            return NetUser(self.forwards, self.mtu)
        if self.kind == "none":
            return Unplugged()
        from hv.devices.virtio.net_pair import NetPair

        return NetPair(self.path)

    def recipe(self) -> dict[str, object]:
        """The arguments that make an equal one; a Backend made before can't be had again, and becomes none."""
        kind = "none" if isinstance(self.kind, Backend) else self.kind
        path = os.path.abspath(self.path) if self.path and kind != "packet" else self.path or None
        text = "+".join(f"{address}:{host}:{guest}/{protocol}" for protocol, address, host, guest in self.forwards)
        named = {name: path if kind == name.replace("_", "-") else None for name in ("packet", "pair", "vhost_user")}
        return {"kind": None if path else kind, "tap": self.tap or None, **named, "netns": self.netns or None,
                "mac": self.mac.hex(":") or None, "rate": self.rate or None, "forward": text or None,
                "mtu": self.mtu or None,
                "address": f"{'.'.join(map(str, self.address[0]))}/{self.address[1]}" if self.address else None}


def derive_mac(identity: str, name: str) -> bytes:
    """The MAC address of device `name` whose cable ends in `identity`."""
    try:
        with open("/etc/machine-id", "rb") as file:
            host = file.read(64).strip()
    except OSError:
        host = b""
    return b"\x02" + _sha256(b"\0".join((b"pyhv net", host, identity.encode(), name.encode())))[:5]


def _sha256(data: bytes) -> bytes:
    """By the interpreter's own module: hashlib takes OpenSSL's, which costs 3 MiB of memory."""
    for module in ("_sha256", "_sha2", "hashlib"):      # Python 3.11; 3.12 on; one that was built without
        try:
            return bytes(__import__(module).sha256(data).digest())
        except ImportError:
            pass
    raise ConfigError("--net: this Python has no SHA-256", "give the card its mac=")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"--net: {name} needs a value", f"{name}=...")
    return value


def parse_name(name: str, what: str = "tap") -> str:
    """A name that an interface may have (net/core/dev.c, dev_valid_name)."""
    if len(name.encode()) > INTERFACE_MOST or name in (".", "..") or any(c in "/:%" or c.isspace() for c in name):
        raise ConfigError(f"--net: {what}={name} is no name of an interface",
                          f"at most {INTERFACE_MOST} letters and digits, for example tap=tap0 or packet=eth0")
    return name


def parse_mac(value: str | bytes) -> bytes:
    """Six bytes of `52:54:00:12:34:56`, which must be the address of one card."""
    mac = value
    if isinstance(value, str):
        parts = value.replace("-", ":").split(":")
        try:
            mac = bytes(int(part, 16) for part in parts if len(part) == 2)
        except ValueError:
            mac = b""
        if len(parts) != 6:
            mac = b""
    if not isinstance(mac, bytes) or len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise ConfigError(f"--net: mac={value!r} is no address of a card",
                          "six bytes, the first one even, for example mac=52:54:00:12:34:56")
    return mac


def parse_rate(value: str | int) -> int:
    """Bytes a second from `10M`, `500K`, `1G` or a number."""
    text = str(value)
    unit = _UNITS.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isascii() or not digits.isdigit() or not int(digits):
        raise ConfigError(f"--net: rate={value} is no number of bytes a second", "for example rate=10M")
    return int(digits) * unit


def parse_mtu(value: str | int) -> int:
    """The longest packet."""
    text = str(value)
    if not text.isascii() or not text.isdigit() or not MTU_LEAST <= int(text) <= MTU_MOST:
        raise ConfigError(f"--net: mtu={value} is not {MTU_LEAST} to {MTU_MOST}", "usual is 1500")
    return int(text)


def parse_address(text: str) -> tuple[bytes, int]:
    """(4 bytes, prefix) of `10.0.0.1/24`."""
    host, slash, prefix = text.partition("/")
    numbers = host.split(".")
    if (len(numbers) != 4 or not slash or not all(part.isascii() and part.isdigit() for part in (*numbers, prefix))
            or not all(int(part) < 256 for part in numbers) or not 1 <= int(prefix) <= 32):
        raise ConfigError(f"--net: address={text} is no IPv4 address with a prefix", "for example address=10.0.0.1/24")
    return bytes(map(int, numbers)), int(prefix)


def parse_forwards(text: str) -> tuple[Forward, ...]:
    """What `8080:80+0.0.0.0:5353:53/udp` asks for; without an address, the host's loopback interface listens."""
    found = []
    for part in text.replace(";", "+").split("+"):
        place, slash, protocol = part.partition("/")
        *address, host, guest = place.split(":") if ":" in place else ("", "", "")
        sound = len(address) < 2 and (not slash or protocol in ("tcp", "udp"))
        if not sound or not all(port.isascii() and port.isdigit() and 0 < int(port) < 65536 for port in (host, guest)):
            raise ConfigError(f"--net user: forward={part} is not HOST:GUEST, two ports",
                              "for example forward=8080:80, or forward=8080:80+0.0.0.0:5353:53/udp")
        where = address[0] if address else LOOPBACK
        parse_address(where + "/32")
        found.append((protocol or "tcp", where, int(host), int(guest)))
    if len({(entry[0], entry[2]) for entry in found}) != len(found):
        raise ConfigError(f"--net user: forward={text} has a port twice", "each port of the host leads to one place")
    return tuple(found)
