"""Tap interfaces: a card of the host whose cable ends in a descriptor (Documentation/networking/tuntap.rst)."""

from __future__ import annotations

__all__ = ["TUN_F_CSUM", "TUN_F_TSO4", "TUN_F_TSO6", "TUN_F_TSO_ECN", "TUN_F_UFO", "open_tap", "set_carrier",
           "set_offloads"]

import ctypes
import errno
import os
from struct import pack

from hv.errors import KernelError
from hv.linux.ioc import iow
from hv.linux.libc import ioctl, ioctl_ptr

DEVICE = "/dev/net/tun"
# include/uapi/linux/if_tun.h
TUNSETIFF = iow(0x54, 202, 4)
TUNSETOFFLOAD = iow(0x54, 208, 4)
TUNSETVNETHDRSZ = iow(0x54, 216, 4)
TUNSETCARRIER = iow(0x54, 226, 4)
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO = 1, 2, 4, 8, 16
IFREQ_SIZE, NAME_SIZE = 40, 16


def open_tap(name: str, header_size: int) -> tuple[int, str]:
    """(descriptor, name) of tap `name`, made where there is none; "" has the kernel choose a name.

    Frames have `header_size` bytes of struct virtio_net_hdr in front. A tap made here goes with the descriptor.
    KernelError, OSError where it can't be had.
    """
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        try:
            request = _set_interface(fd, name, flags)
        except KernelError as error:
            if error.errno != errno.EINVAL or not name:
                raise
            request = _set_interface(fd, name, flags | IFF_MULTI_QUEUE)     # it was made for several queues
        ioctl_ptr(fd, TUNSETVNETHDRSZ, ctypes.c_int(header_size), "TUNSETVNETHDRSZ")
        return fd, request[:NAME_SIZE].rstrip(b"\0").decode()
    except BaseException:
        os.close(fd)
        raise


def _set_interface(fd: int, name: str, flags: int) -> bytes:
    request = ctypes.create_string_buffer(pack("<16sH", name.encode(), flags), IFREQ_SIZE)
    ioctl_ptr(fd, TUNSETIFF, request, "TUNSETIFF")
    return request.raw


def set_offloads(fd: int, offloads: int) -> None:
    """What frames read from the tap may leave undone (TUN_F_...)."""
    ioctl(fd, TUNSETOFFLOAD, offloads, "TUNSETOFFLOAD")


def set_carrier(fd: int, on: bool) -> None:
    """Whether the host sees a cable in the tap; since Linux 5.0."""
    ioctl_ptr(fd, TUNSETCARRIER, ctypes.c_int(on), "TUNSETCARRIER")
