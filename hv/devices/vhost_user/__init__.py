"""vhost-user: devices whose queues another process serves (QEMU's docs/interop/vhost-user.rst; docs/vhost-user.md)."""
