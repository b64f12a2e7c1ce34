"""python -m fuzz [--seconds N] [--seed N] [NAME...]; python -m fuzz NAME --input HEX repeats one."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time

from fuzz.engine import Found, check, fuzz, smaller
from fuzz.targets import TARGETS, bounded

MEMORY = 3 << 30        # address space: an allocation of what a guest claims fails here and is found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz the parsers of devices.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(TARGETS)} (all)")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (60)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed, the same inputs (the time)")
    parser.add_argument("--input", metavar="HEX", help="run this one input")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    failed = 0
    with bounded():
        for name in arguments.names or TARGETS:
            target = TARGETS[name]
            try:
                if arguments.input is not None:
                    check(name, target, bytes.fromhex(arguments.input))
                    continue
                start = time.monotonic()
                done = fuzz(name, target, seconds=arguments.seconds, seed=arguments.seed)
                print(f"{name}: {done} inputs in {time.monotonic() - start:.0f} s, seed {arguments.seed}", flush=True)
            except Found as found:
                failed += 1
                import traceback

                least = smaller(name, target, found) if arguments.input is None else found
                traceback.print_exception(least.error)
                print(f"FOUND {least}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    sys.exit(main())
