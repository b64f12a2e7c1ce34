"""Virtio devices (OASIS virtio 1.2): queues, the status machine, transports, and one file per device model."""
