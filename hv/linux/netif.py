"""Network interfaces of the host: up, address, MTU (man 7 netdevice)."""

from __future__ import annotations

__all__ = ["exists", "set_address", "set_mtu", "set_up"]

import ctypes
import os
from _socket import AF_INET, SOCK_CLOEXEC, SOCK_DGRAM, socket
from struct import pack, pack_into, unpack_from

from hv.linux.libc import ioctl_ptr

# include/uapi/linux/sockios.h
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8913, 0x8914, 0x8916, 0x891C, 0x8922
IFF_UP = 1                  # include/uapi/linux/if.h
IFREQ_SIZE, IFREQ_UNION = 40, 16    # struct ifreq: a name, then what the call is about


def exists(name: str) -> bool:
    """Whether the host has an interface of that name."""
    return os.path.isdir("/sys/class/net/" + name)


def _call(name: str, request: int, value: bytes, call: str) -> bytes:
    argument = ctypes.create_string_buffer(name.encode().ljust(IFREQ_UNION, b"\0") + value, IFREQ_SIZE)
    control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC)        # any socket will do
    try:
        ioctl_ptr(control.fileno(), request, argument, f"{call}({name})")
    finally:
        control.close()
    return argument.raw


def set_up(name: str) -> None:
    """Bring the interface up. KernelError where that is not allowed."""
    (flags,) = unpack_from("<H", _call(name, SIOCGIFFLAGS, b"", "SIOCGIFFLAGS"), IFREQ_UNION)
    _call(name, SIOCSIFFLAGS, pack("<H", flags | IFF_UP), "SIOCSIFFLAGS")


def set_address(name: str, address: bytes, prefix: int) -> None:
    """Give the interface an IPv4 address (4 bytes) in a network of `prefix` bits."""
    for request, value, call in ((SIOCSIFADDR, address, "SIOCSIFADDR"),
                                 (SIOCSIFNETMASK, _netmask(prefix), "SIOCSIFNETMASK")):
        sockaddr = bytearray(16)        # struct sockaddr_in
        pack_into("<HH4s", sockaddr, 0, AF_INET, 0, value)
        _call(name, request, bytes(sockaddr), call)


def _netmask(prefix: int) -> bytes:
    return (0xFFFFFFFF << (32 - prefix) & 0xFFFFFFFF).to_bytes(4, "big")


def set_mtu(name: str, mtu: int) -> None:
    """The longest packet the interface takes."""
    _call(name, SIOCSIFMTU, pack("<i", mtu), "SIOCSIFMTU")
