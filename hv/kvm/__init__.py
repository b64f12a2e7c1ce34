"""Bindings to /dev/kvm: the ABI and three handles (Kvm, VmFd, VcpuFd), one method per ioctl.

Knows nothing of devices.
"""
