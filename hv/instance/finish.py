"""The end of a run, and of an instance: what is given back, what is written down.

Driven by tests/root/test_instance.py and tests/root/test_instance_faults.py.
"""

from __future__ import annotations

__all__ = ["abandon", "remove", "settle", "sweep"]

import os

from hv.container.state import now
from hv.errors import HvError, StateError
from hv.instance.holder import read_status
from hv.instance.record import CREATED, EXITED, PAUSED, RESTARTING, RUNNING, UNKNOWN_CODE, Instance
from hv.instance.records import all_instances, half_made, remove_record
from hv.instance.way import way_of


def _give_back(instance: Instance) -> tuple[bool, str]:
    """Whether memory ran out, and what could not be given back."""
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
    for leaf in ("keep.json", "status"):
        try:
            os.unlink(f"{instance.run}/{leaf}")
        except OSError:
            pass
    return killed, "; ".join(trouble)


def settle(instance: Instance, code: int | None) -> None:
    """It has ended with `code` (None: nobody knows). Locked by the caller."""
    killed, trouble = _give_back(instance)
    instance.save_state(status=EXITED, exit_code=UNKNOWN_CODE if code is None else code, finished=now(),
                        error=trouble, oom=killed, unknown=code is None)


def abandon(instance: Instance, why: str, code: int) -> None:
    """It could not be started. Locked by the caller."""
    before = instance.state.get("status", CREATED)
    _give_back(instance)
    instance.save_state(status=CREATED if before == CREATED else EXITED, exit_code=code, finished=now(), error=why)


def remove(instance: Instance, *, volumes: bool = False) -> None:
    """Remove it, and with `volumes` its anonymous volumes. Locked by the caller, and not running."""
    _give_back(instance)
    if instance.about.get("volumes"):
        from hv.image.volumes import Volumes

        try:
            Volumes().release(instance.id, remove_anonymous=volumes)
        except HvError:
            pass
    image = instance.image.get("id")
    if image:
        from hv.image.store import Store

        try:
            Store().unuse(str(image), instance.id)
        except (HvError, OSError):
            pass
    remove_record(instance)


def sweep() -> list[Instance]:
    """Write down the ends that nobody has: after a reboot, or where all that watched was killed. Those instances.

    Whoever holds one still is left alone: the keeper will see to it.
    """
    found = []
    for instance in all_instances():
        status = instance.state.get("status")
        if status not in (RUNNING, PAUSED, RESTARTING) or instance.holder() or instance.program():
            continue
        try:
            if not instance.lock(wait=False):
                continue            # somebody is at it
        except StateError:
            continue
        try:
            instance.refresh()
            if instance.state.get("status") == status and not instance.holder() and not instance.program():
                settle(instance, read_status(f"{instance.run}/status"))
                found.append(instance)
                if instance.settings.rm:
                    remove(instance, volumes=True)
        except HvError:
            pass
        finally:
            instance.unlock()
    for instance in half_made():
        try:
            remove(instance, volumes=True)
        except HvError:
            pass
        finally:
            instance.unlock()
    return found
