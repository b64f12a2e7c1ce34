"""Numbers that the virtio specification gives: device ids, feature bits, status bits (virtio 1.2)."""

from __future__ import annotations

# device ids (5)
NET, BLOCK, CONSOLE, ENTROPY, BALLOON, VSOCK, FS = 1, 2, 3, 4, 5, 19, 26

# device status (2.1)
ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
NEEDS_RESET = 64
FAILED = 128

# feature bits that belong to no device type (6)
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_RESET = 1 << 40

# descriptor flags (2.7.5), ring flags (2.7.6, 2.7.8)
DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4
AVAIL_NO_INTERRUPT = 1
USED_NO_NOTIFY = 1

# what an interrupt is for (4.2.2, InterruptStatus; 4.1.4.5, ISR status)
ISR_QUEUE = 1
ISR_CONFIG = 2

QUEUE_SIZE_MAX = 32768      # 2.7
