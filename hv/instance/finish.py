"""The end of a run, and of an instance: what is given back, what is written down.

Driven by tests/root/test_instance.py and tests/root/test_instance_faults.py.
"""

from __future__ import annotations

__all__ = ["abandon", "give_back", "remove", "settle", "sweep"]

import os

from hv.container.state import now
from hv.errors import HvError, StateError
from hv.instance.holder import read_status
from hv.instance.record import CREATED, EXITED, PAUSED, RESTARTING, RUNNING, UNKNOWN_CODE, Instance
from hv.instance.records import all_instances, forget_names, half_made, remove_record
from hv.instance.way import way_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container


def give_back(instance: Instance) -> tuple[bool, str]:
    """Give back what a run had; whether memory ran out in it, and what could not be given back."""
    from hv.instance.networking import part

    killed, trouble = False, []
    try:
        killed = way_of(instance).clean(instance)
    except HvError as error:
        trouble.append(f"{error}")
    try:
        part(instance)
    except HvError as error:
        trouble.append(f"{error}")
    for leaf in ("keep.json", "status", "began"):
        try:
            os.unlink(f"{instance.run}/{leaf}")
        except OSError:
            pass
    return killed, "; ".join(trouble)


def settle(instance: Instance, code: int | None) -> None:
    """It has ended with `code` (None: nobody knows). Locked by the caller."""
    killed, trouble = give_back(instance)
    instance.save_state(status=EXITED, exit_code=UNKNOWN_CODE if code is None else code, finished=now(),
                        error=trouble, oom=killed, unknown=code is None)


def abandon(instance: Instance, why: str, code: int) -> None:
    """It could not be started. Locked by the caller."""
    before = instance.state.get("status", CREATED)
    give_back(instance)
    instance.save_state(status=CREATED if before == CREATED else EXITED, exit_code=code, finished=now(), error=why)


def remove(instance: Instance, *, volumes: bool = False) -> None:
    """Remove it, and with `volumes` its anonymous volumes. Locked by the caller, and not running."""
    give_back(instance)
    if instance.about.get("volumes"):
        from hv.image.volumes import Volumes

        try:
            Volumes().release(instance.id, remove_anonymous=volumes)
        except HvError:
            pass
    _leave_image(instance)
    remove_record(instance)


def _leave_image(instance: Instance) -> None:
    from hv.image.store import Store

    store = Store()
    try:
        image = instance.image.get("id")
        used = [str(image)] if image else [image for image, users in store.users().items() if instance.id in users]
        for image in used:
            store.unuse(str(image), instance.id)
    except (HvError, OSError):
        pass                        # `image fsck` finds it


def sweep(kept: Container[str] = ()) -> list[Instance]:
    """Write down the ends that nobody has: after a reboot, or where all that watched was killed. Those instances.

    `kept`: IDs of those that the keeper sees to.
    """
    found = []
    for instance in all_instances():
        status = instance.state.get("status")
        if status not in (RUNNING, PAUSED, RESTARTING) and not instance.has_begun:
            continue
        if instance.id in kept or instance.holder() or instance.program():
            continue
        try:
            if not instance.lock(wait=False):
                continue            # somebody is at it
        except StateError:
            continue
        try:
            instance.refresh()
            if instance.state.get("status") == status and not instance.holder() and not instance.program():
                if status in (RUNNING, PAUSED, RESTARTING):
                    settle(instance, read_status(f"{instance.run}/status"))
                    found.append(instance)
                else:
                    abandon(instance, "the process that was to start it was killed", UNKNOWN_CODE)
                if instance.settings.rm:
                    remove(instance, volumes=True)
        except HvError:
            pass
        finally:
            instance.unlock()
    forget_names()
    for instance in half_made():
        try:
            remove(instance, volumes=True)
        except HvError:
            pass
        finally:
            instance.unlock()
    return found
