"""`pyhv kernel ...`: build, fetch, list; initramfs."""

from __future__ import annotations

__all__ = ["build", "fetch", "initramfs", "list_kernels"]

import os

from hv.cli.say import say
from hv.errors import ConfigError
from hv.kernels import cache


def _say(text: str) -> None:
    say(f"pyhv: {text}")


def build(flavour: str, source: str | None, jobs: int | None) -> int:
    """Build, or find it built; print the folder."""
    from hv.kernels.build import build as make

    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1", "leave it out for one per processor")
    print(make(flavour, source, jobs, _say))
    return 0


def fetch() -> int:
    """Fetch, or find it fetched; print the folder."""
    from hv.kernels.fetch import fetch as get

    print(get(_say))
    return 0


def list_kernels() -> int:
    """One line per kernel file: flavour and version, size, path."""
    for folder in cache.kernels():
        for name in ("vmlinux", "bzImage", "vmlinuz"):
            file = folder / name
            if file.is_file():
                print(f"{folder.name:<40} {file.stat().st_size / (1 << 20):7.1f} MiB  {file}")
    return 0


def initramfs(file: str, tree: str | None, add: tuple[str, ...] = (), folder: str | None = None,
              names: tuple[str, ...] = (), agent: bool = False, agent_init: bool = False) -> int:
    """Write an initramfs: a busybox or `tree`, with the files `add` and the modules `names` of `folder` on top.

    `agent`: and with the guest's agent, which a busybox system starts. `agent_init`: that alone, as init.
    """
    from hv.kernels.initramfs import AGENT, agent_alone, busybox, from_directory, place
    from hv.kernels.modules import modules

    if bool(folder) != bool(names):
        raise ConfigError("--modules and --module go together",
                          "for example: --modules $(pyhv kernel fetch)/modules --module virtio_pci --module virtio_blk")
    if agent_init and (tree is not None or agent):
        raise ConfigError("--agent-init goes with neither --from nor --agent", "it has the agent and no system")
    files = [place(text) for text in add]
    if agent or agent_init:
        from hv.guests import program
    if agent:
        files.append((program("agent"), AGENT))
    loaded = modules(folder, names) if folder else []
    if agent_init:
        data = agent_alone(program("agent"), files, loaded)
    elif tree is not None:
        data = from_directory(tree, files, loaded)
    else:
        data = busybox(_say, files=files, modules=loaded)
    try:
        with open(f"{file}.part", "wb") as out:
            out.write(data)
        os.replace(f"{file}.part", file)
    except OSError as error:
        raise ConfigError(f"{file}: {os.strerror(error.errno or 0)}", "name a file in a writable directory") from None
    print(f"{file}: {len(data)} bytes; boot it with: pyhv boot KERNEL --initrd {file}")
    return 0
