"""The verbs of instances, `pyhv run` and its kind: where they are, without click, whose import takes 40 ms.

Driven by tests/root/test_instance.py and tests/unit/test_cli_words.py.
"""

from __future__ import annotations

__all__ = ["VERBS", "run_verb", "save_bundle"]

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

# verb -> (module, its table of options, how it is used, what it does)
VERBS = {
    "run": ("hv.cli.run", "RUN_OPTIONS", "run [OPTIONS] IMAGE [COMMAND ...]",
            "Run a command in a new instance of an image: a container, or with --vm a virtual machine."),
    "create": ("hv.cli.run", "CREATE_OPTIONS", "create [OPTIONS] IMAGE [COMMAND ...]",
               "Make an instance of an image, to be started later."),
    "start": ("hv.cli.run", "START_OPTIONS", "start [OPTIONS] INSTANCE ...", "Start instances that do not run."),
    "restart": ("hv.cli.run", "RESTART_OPTIONS", "restart [OPTIONS] INSTANCE ...", "Stop instances and start them."),
    "attach": ("hv.cli.run", "ATTACH_OPTIONS", "attach [OPTIONS] INSTANCE",
               "Join our standard streams to a running instance's."),
    "exec": ("hv.cli.instance_exec", "EXEC_OPTIONS", "exec [OPTIONS] INSTANCE COMMAND ...",
             "Run one more program in a running instance."),
    "ps": ("hv.cli.instance_list", "PS_OPTIONS", "ps [OPTIONS]", "List instances: those that run, or with -a all."),
    "logs": ("hv.cli.instance_logs", "LOGS_OPTIONS", "logs [OPTIONS] INSTANCE", "Print what an instance has written."),
    "inspect": ("hv.cli.instance_list", "INSPECT_OPTIONS", "inspect [OPTIONS] INSTANCE ...",
                "Print all there is to know of instances, as JSON."),
    "stop": ("hv.cli.instance_life", "STOP_OPTIONS", "stop [OPTIONS] INSTANCE ...",
             "Ask instances to end, and kill those that don't."),
    "kill": ("hv.cli.instance_life", "KILL_OPTIONS", "kill [OPTIONS] INSTANCE ...", "Send instances a signal."),
    "wait": ("hv.cli.instance_life", "WAIT_OPTIONS", "wait INSTANCE ...",
             "Wait until instances have ended, and print their exit codes."),
    "pause": ("hv.cli.instance_life", "PAUSE_OPTIONS", "pause INSTANCE ...", "Hold all processes of instances."),
    "unpause": ("hv.cli.instance_life", "UNPAUSE_OPTIONS", "unpause INSTANCE ...", "Let them go on."),
    "rm": ("hv.cli.instance_life", "RM_OPTIONS", "rm [OPTIONS] INSTANCE ...", "Remove instances and what they wrote."),
    "rename": ("hv.cli.instance_life", "RENAME_OPTIONS", "rename INSTANCE NAME", "Give an instance another name."),
    "stats": ("hv.cli.instance_stats", "STATS_OPTIONS", "stats [OPTIONS] [INSTANCE ...]",
              "Show what instances use, again and again."),
    "top": ("hv.cli.instance_stats", "TOP_OPTIONS", "top INSTANCE", "List the processes of an instance."),
    "cp": ("hv.cli.instance_cp", "CP_OPTIONS", "cp [OPTIONS] SOURCE TARGET",
           "Copy between an instance (INSTANCE:PATH) and the host; - is a tar archive on a standard stream."),
    "port": ("hv.cli.instance_list", "PORT_OPTIONS", "port INSTANCE [PORT[/PROTOCOL]]",
             "List the published ports of an instance."),
}

# verb that has a bundle of modules (hv/cli/bundle.py) -> what it needs even if this run did not. "make" is the process
# that makes an instance for `run`
_BUNDLED = {
    "run": (),
    "make": ("hv.cli.start", "hv.instance.ready", "hv.instance.rootfs", "hv.instance.networking",
             "hv.instance.bundle", "hv.instance.streams", "hv.instance.container_way", "hv.instance.holder",
             "hv.image.overlay", "hv.container.seccomp.profile", "hv.container.seccomp.compile",
             "hv.container.seccomp.syscalls", "hv.container.cgroups.devices", "hv.container.cgroups.mount",
             "hv.container.plan", "hv.container.process", "hv.container.stub", "hv.container.cgroups.manager"),
    "exec": ("hv.container.exec", "hv.container.foreground", "hv.container.seccomp.compile",
             "hv.container.cgroups.manager", "hv.instance.container_way", "hv.instance.bundle"),
    "ps": (),
}
_NOT_BUNDLED = ("hv.instance.keeper_guest", "hv.instance.kept", "hv.instance.vm", "hv.sandbox", "hv.network",
                "hv.devices", "hv.machine", "hv.kvm", "hv.image.unpack", "hv.image.pull", "hv.image.registry")
_NOT_MADE = ("hv.cli.main", "hv.cli.verbs", "hv.cli.words", "hv.cli.run", "hv.cli.say", "hv.instance.attach",
             "hv.instance.life", "hv.image.store", "hv.image.reference", "hv.image.media", "hv.image.image",
             "hv.image.layers", "hv.image.files")


def save_bundle(verb: str) -> None:
    """Write the bundle of a verb that has just run without one. Its client of the keeper is among it."""
    from hv.cli.bundle import place_of, save

    for name in (*_BUNDLED[verb], "hv.instance.keeper_client"):
        __import__(name)
    save(place_of(f"instance-{verb}"), rare=_NOT_BUNDLED, bare=True)
    if verb == "run":
        for name in _BUNDLED["make"]:
            __import__(name)
        save(place_of("instance-make"), rare=(*_NOT_BUNDLED, *_NOT_MADE), bare=True)


def run_verb(arguments: list[str], maker: tuple[int, socket] | None = None) -> int:
    """Run a verb with its arguments; the exit code. `maker`: of `run`, a process that waits to make the instance."""
    from hv.cli.words import HelpAsked, help_text

    verb = arguments[0]
    name, table, usage, what = VERBS[verb]
    module = __import__(name, fromlist=["*"])
    command: Callable[..., int] = getattr(module, f"command_{verb}")
    try:
        return command(arguments[1:], maker) if verb == "run" else command(arguments[1:])
    except HelpAsked:
        print(help_text(usage, what, getattr(module, table)))
        return 0
    except FileNotFoundError as error:
        from hv.errors import HvError

        raise HvError(f"{error.filename}: {os.strerror(error.errno or 0)}") from None
