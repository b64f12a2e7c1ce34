"""What can be done to an instance: made, started, stopped, killed, paused, waited for, removed. Nothing here prints.

Driven by tests/root/test_instance.py and tests/kvm/test_instance_vm.py.
"""

from __future__ import annotations

__all__ = ["create", "find_image", "kill", "pause", "remove_instance", "start", "stop", "wait_for"]

import os
from _signal import SIGKILL, SIGTERM

from hv.errors import ConfigError, HvError, ImageMissing, StateError
from hv.image.layers import Layers
from hv.image.store import Store
from hv.instance import keeper_client, records
from hv.instance.finish import remove
from hv.instance.launch import Launch
from hv.instance.record import CREATED, EXITED, PAUSED, RESTARTING, RUNNING, Instance
from hv.instance.values import signal_number
from hv.instance.way import way_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

    from hv.image.image import Image
    from hv.instance.settings import Settings

_KILL_PATIENCE = 20.0           # seconds after SIGKILL


def find_image(store: Store, text: str, pull: str, fetch: Callable[[Store, str], Image]) -> Image:
    """The image, fetched as `pull` (missing, always, never) says."""
    if pull not in ("missing", "always", "never"):
        raise ConfigError(f"--pull {pull!r:.40}", "missing, always or never")
    if pull == "always":
        return fetch(store, text)
    try:
        image = store.resolve(text)
    except ImageMissing:
        if pull == "never":
            raise
        image = fetch(store, text)
    image.check_platform()
    return image


def create(settings: Settings, image: Image, store: Store, name: str = "") -> tuple[Instance, list[str]]:
    """A new instance, locked, and the folders of its image's layers. HvError, and nothing is left."""
    config = image.config
    about = {"name": image.name, "id": image.id, "digest": image.digest, "entrypoint": config.entrypoint,
             "cmd": config.cmd, "env": config.env, "working_dir": config.working_dir, "user": config.user,
             "volumes": config.volumes, "exposed_ports": config.exposed_ports, "labels": config.labels,
             "stop_signal": config.stop_signal}
    from hv.instance.bundle import command_of

    command_of(settings, about)             # asked now: an image without a command is not worth an instance
    with store.lock(shared=True):           # nobody removes the image's layers until they are in use
        layers = Layers(store).ensure(image)
        instance = records.make(name, settings.data, {key: value for key, value in about.items() if value}, layers)
        try:
            store.use(image, instance.id)
        except BaseException:
            remove(instance, volumes=True)
            instance.unlock()
            raise
    return instance, layers


def start(instance: Instance, layers: list[str] | None = None, *, gate: bool = False,
          maker: tuple[int, socket] | None = None) -> Launch:
    """Start a loaded, locked instance. Its lock may be let go of: the process that makes it has it."""
    status = instance.status()
    if status in (RUNNING, PAUSED):
        raise StateError(f"{instance.name} is {status} already")
    if instance.kept():                     # ended, and nobody has seen to it yet
        instance.unlock()
        keeper_client.ensure()
        keeper_client.wait(instance.id, _KILL_PATIENCE)
        instance.lock()
        instance.load()
    if instance.state.get("wait"):
        instance.save_state(wait=0, restarts=0)
    return Launch(instance, layers, gate=gate, maker=maker)


def kill(instance: Instance, signal: int) -> None:
    """Signal its program."""
    if not instance.running:
        raise StateError(f"{instance.name} is not running", f"pyhv start {instance.name}")
    way_of(instance).kill(instance, signal)


def stop_signal(instance: Instance) -> int:
    """What asks it to end: the options', the image's, SIGTERM."""
    if instance.settings.stop_signal:
        return int(instance.settings.stop_signal)
    said = instance.image.get("stop_signal")
    try:
        return signal_number(str(said), "the image's StopSignal") if said else int(SIGTERM)
    except ConfigError:
        return int(SIGTERM)


def stop(instance: Instance, seconds: float | None = None, signal: int = 0) -> None:
    """Ask it to end, and kill it where it has not after `seconds` (its own --stop-timeout). It is not restarted."""
    if not instance.running and not _stop_restarting(instance):
        return
    instance.stopping(True)
    way = way_of(instance)
    if instance.status() == PAUSED:
        pause(instance, False)
    patience = instance.settings.stop_timeout if seconds is None else seconds
    try:
        way.kill(instance, signal or stop_signal(instance))
        if patience > 0:
            keeper_client.wait(instance.id, patience)
            return
    except TimeoutError:
        pass
    except StateError:
        pass                                # it has ended meanwhile
    except HvError:
        pass                                # a guest that does not answer
    try:
        way.kill(instance, SIGKILL)
    except StateError:
        pass
    _wait_dead(instance)


def _wait_dead(instance: Instance) -> None:
    try:
        keeper_client.wait(instance.id, _KILL_PATIENCE)
    except TimeoutError:
        raise HvError(f"{instance.name} does not end, though it was killed", "it may hang in the kernel") from None


def _stop_restarting(instance: Instance) -> bool:
    """It does not run: see to it that it stays so. Whether it was just being started, and runs now."""
    if instance.refresh().state.get("status") != RESTARTING and not instance.has_begun:
        return False
    instance.stopping(True)
    with instance:                          # whoever starts it has the lock
        instance.refresh()
        if instance.state.get("status") == RESTARTING:
            instance.save_state(status=EXITED)
    return instance.running


def pause(instance: Instance, on: bool) -> None:
    """Hold all of it, or let it go on."""
    with instance:
        instance.refresh()
        status = instance.status()
        if status != (RUNNING if on else PAUSED):
            raise StateError(f"{instance.name} is {status}", "only a running one can be paused" if on
                             else "only a paused one can go on")
        way_of(instance).pause(instance, on)
        instance.save_state(status=PAUSED if on else RUNNING)


def wait_for(instance: Instance, patience: float | None = None) -> int:
    """The exit code, once it has ended."""
    if instance.status() == CREATED:
        raise StateError(f"{instance.name} was never started", f"pyhv start {instance.name}")
    code = keeper_client.wait(instance.id, patience)
    if code is not None:
        return code
    try:
        return instance.refresh().exit_code
    except StateError:
        return 0                            # removed at its end


def remove_instance(instance: Instance, *, force: bool = False, volumes: bool = False) -> None:
    """Remove it; a running one only with `force`, which kills it."""
    if instance.running or (instance.state and _stop_restarting(instance)):
        if not force:
            raise StateError(f"{instance.name} is {instance.status()}",
                             f"stop it first, or: pyhv rm -f {instance.name}")
        instance.stopping(True)
        if instance.status() == PAUSED:
            pause(instance, False)
        try:
            way_of(instance).kill(instance, SIGKILL)
        except StateError:
            pass
        _wait_dead(instance)
    elif instance.kept():
        keeper_client.wait(instance.id, _KILL_PATIENCE)
    try:
        with instance:
            if instance.state:              # else it can't be read, which is why it is removed
                instance.load()
            if instance.running:
                raise StateError(f"{instance.name} was started meanwhile")
            remove(instance, volumes=volumes)
    except StateError:
        if os.path.isdir(instance.folder):
            raise                           # else --rm was faster


__all__ += ["stop_signal"]
