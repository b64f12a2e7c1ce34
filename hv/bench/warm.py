"""Containers one after the other in a process that lives on, as a program that uses the library makes them.

    python3 -m hv.bench.warm N BUNDLE STATE

prints the microseconds of each: created and started, its program's end awaited, deleted (`pyhv bench container`).
"""

from __future__ import annotations

__all__ = ["main"]

import os
import sys
import time

PAUSE = 0.03        # s: the kernel takes namespaces and groups apart later, on the time of the next one


def main(count: int, bundle: str, state: str) -> None:
    """Make `count` containers of `bundle`, with their state below `state`."""
    from hv.container.runtime import Runtime
    from hv.container.spec import load_bundle
    from hv.errors import HvError

    runtime, spec = Runtime(state), load_bundle(bundle)
    for _ in range(count):
        time.sleep(PAUSE)
        start = time.perf_counter_ns()
        record = runtime.create(f"bench-warm-{os.getpid()}", bundle, start=True, spec=spec)
        _, status = os.waitpid(record.data["pid"], 0)
        runtime.delete(record.name)
        spent = time.perf_counter_ns() - start
        if status:
            raise HvError(f"the container's program ended with {status}")
        print(f"{spent / 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
