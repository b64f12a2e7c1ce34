"""All targets by name, and the bounds in which they run."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

from fuzz import core, devices, images, vhost

TARGETS = {**core.TARGETS, **devices.TARGETS, **images.TARGETS, **vhost.TARGETS}
FILE_MOST = 64 << 20        # bytes of any file: what a guest allocates on the host's disk


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No file larger than FILE_MOST; this process's umask as it was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MOST, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
