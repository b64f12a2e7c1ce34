"""A FUSE session as plain data, and back: nodes by parent and name, open files by node and flags.

What has no name any more (files that are open but removed) and locks can't be taken along: the first answer ESTALE,
the second are taken anew by those who wait. Loading trusts nothing: names are checked, files are found as they always
are. Driven by tests/unit/test_virtio_fs_state.py.
"""

from __future__ import annotations

__all__ = ["load_server", "server_state"]

import os
import stat

from hv.devices.virtio.fs_files import host_flags
from hv.devices.virtio.fs_handles import Handle
from hv.devices.virtio.fs_inodes import MOST_NODES, Node
from hv.devices.virtio.fs_request import checked_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hv.devices.virtio.fs_host import FileServer

_NOT_SEEN = -1              # an inode number that is learned at the first sight
_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


def server_state(server: FileServer) -> dict[str, Any]:
    """All that the guest's side of the session refers to."""
    nodes = []
    for node in server.nodes.by_id.values():
        parent = node.parent.nodeid if node.parent is not None else 0
        if node is not server.nodes.root:
            nodes.append([node.nodeid, node.lookups, node.kind, parent, os.fsdecode(node.name)])
    handles = [[number, handle.node.nodeid, handle.flags, handle.directory]
               for number, handle in server.handles.by_number.items()]
    return {"started": server.started, "next_node": server.nodes.next_id, "next_handle": server.handles.next_number,
            "nodes": nodes, "handles": handles}


def load_server(server: FileServer, state: dict[str, Any]) -> None:
    """Take over what `server_state` returned. Untrusted: ValueError, KeyError, TypeError."""
    server.end()
    server.started = bool(state["started"])
    table = server.nodes
    table.next_id, server.handles.next_number = int(state["next_node"]), int(state["next_handle"])
    if len(state["nodes"]) >= MOST_NODES or len(state["handles"]) > server.handles.limit:
        raise ValueError("more inodes or open files than a guest may have")
    parents = {}
    for nodeid, lookups, kind, parent, name in state["nodes"]:
        if kind not in _KINDS or nodeid in table.by_id or not 0 < lookups < 1 << 64 or not 0 < nodeid < table.next_id:
            raise ValueError(f"node {nodeid}")
        node = Node(int(nodeid), None, os.fsencode(name), 0, _NOT_SEEN, int(kind))
        node.lookups = int(lookups)
        table.by_id[node.nodeid] = node
        parents[node] = parent
    for node, parent in parents.items():
        if parent:
            try:
                checked_name(node.name)
            except OSError:
                raise ValueError(f"node {node.nodeid} has the name {node.name!r}") from None
            node.parent = table.by_id.get(parent)
    for node in parents:
        try:
            table.stat(node)
        except OSError:
            pass            # it is not there any more: the guest learns so when it asks
        if table.crowded():
            table.trim()
    for number, nodeid, flags, directory in state["handles"]:
        node = table.by_id[nodeid]
        if number in server.handles.by_number or not 0 < number < server.handles.next_number:
            raise ValueError(f"open file {number}")
        if (stat.S_ISDIR(node.kind), stat.S_ISREG(node.kind)) != (bool(directory), not directory):
            raise ValueError(f"open file {number} is of another kind")
        try:
            fd = table.reopen(node, os.O_RDONLY | os.O_DIRECTORY if directory
                              else host_flags(server, int(flags) & ~os.O_TRUNC))
        except OSError:
            continue        # as above: EBADF
        server.handles.put(int(number), Handle(node, fd, int(flags), bool(directory)))
