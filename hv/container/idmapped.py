"""Bind mounts that show other owners inside: mounts[].uidMappings, the options idmap and ridmap (config.md, Mounts).

The runtime makes these mounts ready, for it takes rights over the file system that root of a container's user namespace
has not (man 2 mount_setattr, MOUNT_ATTR_IDMAP); the first process puts them in their places. Driven by
tests/root/test_container_userns.py.
"""

from __future__ import annotations

__all__ = ["prepare_trees"]

import os

from hv.container.idmap import namespace_of_maps
from hv.container.mounts import Options
from hv.errors import ConfigError, HvError, KernelError
from hv.linux.mount import ATTR, PROPAGATION, clone_tree, set_attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.container.spec import Spec


def prepare_trees(spec: Spec, trees: dict[int, int]) -> None:
    """Fill `trees` with a descriptor of each idmapped mount, by the mount's number."""
    for index, mount in enumerate(spec.mounts):
        uids, gids = mount["uidMappings"], mount["gidMappings"]
        what = f"mounts[{index}] ({mount['destination']})"
        options = Options(mount["options"], what)
        if not (uids or gids or options.idmap):
            continue
        if not options.bind and mount.get("type") != "bind":
            raise ConfigError(f"{what}: only bind mounts can be idmapped")
        if bool(uids) != bool(gids):
            raise ConfigError(f"{what}: uidMappings and gidMappings belong together")
        if not uids:
            uids, gids = spec.uid_mappings, spec.gid_mappings
        if not uids:
            raise ConfigError(f"{what}: idmap without mappings", "give uidMappings, or the container a user namespace")
        namespace = namespace_of_maps(uids, gids)
        try:
            trees[index] = fd = clone_tree(-100, mount["source"], options.tree)
            set_attributes(fd, 0, 0, recursive=True, propagation=PROPAGATION["slave"])
            recursive = options.idmap == "ridmap" or (not options.idmap and options.tree)
            set_attributes(fd, ATTR["idmap"], 0, recursive=recursive, userns_fd=namespace)
        except KernelError as error:
            raise HvError(f"{what}: {error}", "the file system there may not support idmapped mounts") from None
        finally:
            os.close(namespace)
