"""Every command through click: help, error messages, and all commands but a well-formed `pyhv boot`."""

from __future__ import annotations

__all__ = ["run"]

from typing import Any

import click

from hv import __version__
from hv.cli.boot import OPTIONS, boot
from hv.cli.full_image import image
from hv.cli.full_image_registry import login, logout, pull, push
from hv.cli.full_instance import add_verbs
from hv.cli.full_migrate import migrate
from hv.cli.full_network import network
from hv.cli.full_options import with_options
from hv.cli.full_pool import pool
from hv.cli.full_snapshot import snapshot
from hv.cli.full_volume import volume
from hv.cli.say import say

_EXIT_CODES = """Exit codes: 0 the guest powered off or reset; (v << 1) | 1 debug exit (--debug-exit); 134 the guest
crashed; 124 --timeout; 130, 143, 129 SIGINT, SIGTERM, closed terminal; 70 internal error; 1 failure; 2 usage."""


def run(arguments: list[str]) -> int:
    """Run the command line; the exit code. Usage errors print one line and give 2."""
    try:
        code = pyhv.main(arguments, prog_name="pyhv", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        help_command = f"{context.command_path} --help" if context else "pyhv --help"
        say(f"pyhv: {error.format_message()} - see `{help_command}`")
        return 2
    except click.Abort:
        return 130
    return code if isinstance(code, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pyhv", message="%(prog)s %(version)s")
def pyhv() -> None:
    """A hypervisor and container runtime in one Python program."""


pyhv.add_command(snapshot)
pyhv.add_command(pool)
pyhv.add_command(migrate)
pyhv.add_command(volume)
pyhv.add_command(network)
add_verbs(pyhv)
pyhv.add_command(image)
for command in (pull, push, login, logout):
    pyhv.add_command(command)


@pyhv.command("boot", epilog=_EXIT_CODES)
@click.argument("kernel", required=False)
@with_options(OPTIONS)
def boot_command(kernel: str | None, **values: Any) -> int:
    """Boot KERNEL: a bzImage, an ELF vmlinux, a Multiboot or a real-mode image; without one, the built-in guest.

    On a terminal, Ctrl-A h shows the keys.
    """
    return boot({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}, kernel)


@pyhv.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def doctor(as_json: bool) -> int:
    """Say whether this host can run VMs and containers, and how well. Exit code 0 if VMs can run."""
    from hv.cli.doctor import doctor as examine

    return examine(as_json)


@pyhv.group()
def kernel() -> None:
    """Build, fetch and list Linux kernels for guests."""


@kernel.command()
@click.argument("flavour", type=click.Choice(["micro", "smp", "image"]), default="micro")
@click.option("--source", metavar="DIR|TARBALL", help="kernel source; else the distribution's source package")
@click.option("--jobs", type=int, metavar="N", help="compile N files at a time [default: one per processor]")
def build(flavour: str, source: str | None, jobs: int | None) -> int:
    """Build a small vmlinux and bzImage: micro (one processor, fastest boot), smp, or container (runs containers)."""
    from hv.cli.kernel import build as command

    return command(flavour, source, jobs)


@kernel.command()
def fetch() -> int:
    """Get the distribution's ready-made cloud kernel through its package manager."""
    from hv.cli.kernel import fetch as command

    return command()


@kernel.command("list")
def list_kernels() -> int:
    """List the kernels in the cache."""
    from hv.cli.kernel import list_kernels as command

    return command()


@kernel.command()
@click.argument("file")
@click.option("--from", "tree", metavar="DIR", help="pack this directory instead of busybox")
@click.option("--add", metavar="FILE[:PATH]", multiple=True, help="add a file or directory, to /root if no PATH")
@click.option("--modules", "folder", metavar="DIR", help="where the kernel's modules are")
@click.option("--module", "names", metavar="NAME", multiple=True, help="add and load a module, and those it needs")
@click.option("--agent", is_flag=True, help="add the guest's agent, at /bin/pyhv-agent (docs/clones.md)")
@click.option("--agent-init", is_flag=True, help="the guest's agent as init, and no busybox (docs/agent.md)")
def initramfs(file: str, tree: str | None, add: tuple[str, ...], folder: str | None, names: tuple[str, ...],
              agent: bool, agent_init: bool) -> int:
    """Write an initramfs to FILE: a busybox with a shell on the console, or a directory of yours."""
    from hv.cli.kernel import initramfs as command

    return command(file, tree, add, folder, names, agent, agent_init)


@pyhv.group()
def bench() -> None:
    """Measure, beside the peers that are installed."""


@bench.command("boot")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="interleaved rounds")
@click.option("--linux", is_flag=True, help="boot the micro kernel too (build it first)")
@click.option("--json", "file", metavar="FILE", help="write every sample to FILE")
def bench_boot(rounds: int, linux: bool, file: str | None) -> int:
    """Start-up of the tiny guest, exits, memory; QEMU microvm and kvmtool in the same run where installed."""
    from hv.bench.boot import bench_boot as command

    return command(rounds, linux, file)


@bench.command("io")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="interleaved rounds")
@click.option("--quick", is_flag=True, help="a twentieth of the work, to see that it runs; the figures are worth less")
@click.option("--json", "file", metavar="FILE", help="write every sample to FILE")
def bench_io(rounds: int, quick: bool, file: str | None) -> int:
    """Disk, network, console, shared folder, vsock; QEMU microvm, virtiofsd, plain host calls beside them.

    What of these is not installed is named and left out. The network figures need the right to make a tap (root).
    """
    from hv.bench.io import bench_io as command

    return command(rounds, quick, file)


@pyhv.command("oci", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def oci(arguments: tuple[str, ...]) -> int:
    """Run OCI bundles as containers: an OCI runtime with runc's command line (also: pyhv-runtime)."""
    from hv.cli.oci import main as runtime

    return runtime(list(arguments))


@bench.command("container")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="interleaved rounds")
@click.option("--containers", type=click.IntRange(0), default=50, show_default=True,
              help="idle ones whose memory is measured")
@click.option("--json", "file", metavar="FILE", help="write every sample to FILE")
def bench_container(rounds: int, containers: int, file: str | None) -> int:
    """Start-up and memory of containers; runc and crun in the same run where installed. Needs root."""
    from hv.bench.container import bench_container as command

    return command(rounds, containers, file)


@bench.command("snapshot")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="interleaved rounds")
@click.option("--quick", is_flag=True, help="few and small, to see that it runs; the figures are worth less")
@click.option("--only", metavar="PARTS", help="some of restore,pool,create,density,migrate")
@click.option("--json", "file", metavar="FILE", help="write every sample to FILE")
@click.option("--plots", metavar="DIR", help="draw every table's samples into DIR, as SVG")
@click.option("--write-docs", "docs", metavar="DIR", help="write DIR/performance.md with its plots")
@click.option("--from", "source", metavar="FILE", help="measure nothing: take what --json wrote")
def bench_snapshot(**options: Any) -> int:
    """Restore, hand out, save, keep and move VMs; C, runc, crun and QEMU in the same run where installed.

    Boots a Linux guest first (`pyhv kernel build micro`). The figures of containers need root.
    """
    from hv.bench.snapshot import bench_snapshot as command

    return command(**options)


@bench.command("run")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="interleaved rounds")
@click.option("--quick", is_flag=True, help="small images, to see that it runs; the figures are worth less")
@click.option("--only", metavar="PARTS", help="some of start,images")
@click.option("--json", "file", metavar="FILE", help="write every sample to FILE")
def bench_run(rounds: int, quick: bool, only: str | None, file: str | None) -> int:
    """`pyhv run` and images; runc, podman, docker and skopeo in the same run where installed. Needs root."""
    from hv.bench.run import bench_run as command

    return command(rounds, quick, only, file)


@pyhv.group()
def vm() -> None:
    """List, pause, resume, stop and attach to running VMs (docs/control.md).

    NAME is what `pyhv vm ls` shows, or the path of a control socket, with a slash in it.
    """


@vm.command("ls")
@click.option("--json", "as_json", is_flag=True, help="print a JSON list")
def vm_ls(as_json: bool) -> int:
    """The running VMs."""
    from hv.cli.vm import list_vms

    return list_vms(as_json)


@vm.command("status")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def vm_status(name: str, as_json: bool) -> int:
    """What a VM is, and whether it runs."""
    from hv.cli.vm import status

    return status(name, as_json)


@vm.command("stats")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def vm_stats(name: str, as_json: bool) -> int:
    """Memory, processor time and counters of a VM."""
    from hv.cli.vm import stats

    return stats(name, as_json)


@vm.command("pause")
@click.argument("name")
def vm_pause(name: str) -> int:
    """Hold a VM: processors, devices, and the time its guest sees."""
    from hv.cli.vm import pause

    return pause(name)


@vm.command("resume")
@click.argument("name")
def vm_resume(name: str) -> int:
    """Let a paused VM go on."""
    from hv.cli.vm import resume

    return resume(name)


@vm.command("stop")
@click.argument("name")
@click.option("--force", is_flag=True, help="end it at once, without asking the guest")
@click.option("--timeout", type=click.FloatRange(0, 3600), default=10.0, show_default=True, metavar="SECONDS",
              help="what the guest has to shut down in; then it is ended")
def vm_stop(name: str, force: bool, timeout: float) -> int:
    """Press a VM's power button, and wait until it has ended."""
    from hv.cli.vm import stop

    return stop(name, force, timeout)


@vm.command("console")
@click.argument("name")
@click.option("--view", is_flag=True, help="only look: nothing is typed")
def vm_console(name: str, view: bool) -> int:
    """Attach to a VM's console; Ctrl-A d leaves it."""
    from hv.cli.vm import console

    return console(name, view)
