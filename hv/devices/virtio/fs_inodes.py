"""The inodes a guest knows of a shared folder: by node id, each with its place, its lookup count, perhaps a descriptor.

A guest names files by node ids that it got from lookups, and says when it forgets them. Tens of thousands may be known
at once, so a node has no descriptor until it needs one; it is then found again by its parent and its name, one name at
a time (openat2, see hv/linux/files.py), and must be the inode it was. Only `limit` descriptors are kept. An inode whose
name the guest removes keeps its descriptor, because nothing else leads to it.

Nothing outside the folder is reached: no path from the guest is ever resolved, only single names in directories that
lie in the folder now. Where the host moved a directory out of the folder its descriptor still works, so the kernel is
asked where it is (/proc/self/fd) before each use. What is mounted inside the folder is not reached either, unless the
share is to cross mounts (fs_mounts.py): then an inode is known by its mount as well, for one directory may be mounted
twice, and be read-only in one place. Driven by tests/unit/test_virtio_fs_escape.py and test_virtio_fs_mounts.py.
"""

from __future__ import annotations

__all__ = ["Node", "Nodes"]

import os
from errno import ELOOP, ENOENT, ENOMEM, ENOTDIR, ESTALE
from stat import S_IFMT

from hv.devices.virtio.fuse import ROOT_ID
from hv.linux.files import open_beneath

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.devices.virtio.fs_handles import Handle
    from hv.devices.virtio.fs_mounts import Crossings

MOST_NODES = 1 << 20        # known to one guest: about 300 bytes each
_CHAIN_KEPT = 32            # ancestors that keep their descriptors when a deep node is found again


class Node:
    """One inode: `parent` and `name` say where it was last seen, `dev` and `ino` which it is, `kind` its type; `mount`
    counts the mounts that are crossed, 0 is the folder's own."""

    __slots__ = ("dev", "fd", "handles", "ino", "kind", "lookups", "mount", "name", "nodeid", "parent", "stamp", "used")

    def __init__(self, nodeid: int, parent: Node | None, name: bytes, dev: int, ino: int, kind: int,
                 mount: int = 0) -> None:
        self.nodeid = nodeid
        self.parent = parent
        self.name = name
        self.dev = dev
        self.ino = ino
        self.kind = kind
        self.mount = mount
        self.lookups = 0
        self.fd = -1
        self.used = False           # since the last look for descriptors to close
        self.stamp: tuple[int, int, int] | None = None      # what the file was when the guest last opened it
        self.handles: list[Handle] = []


class Nodes:
    """All nodes of one guest; `root_fd` is an O_PATH descriptor of the folder, closed with them. `crossings`: where
    what is mounted; None where that is out of reach."""

    def __init__(self, root_fd: int, limit: int, crossings: Crossings | None = None) -> None:
        self.proc_fd = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        status = os.stat(root_fd)
        self.root = Node(ROOT_ID, None, b"", status.st_dev, status.st_ino, S_IFMT(status.st_mode))
        self.root.fd = root_fd
        self.limit = limit
        self.crossings = crossings
        self.by_id: dict[int, Node] = {}
        self.by_key: dict[tuple[int, int, int], Node] = {}      # device, inode, mount
        self.next_id = ROOT_ID + 1
        self._cached: dict[Node, None] = {}     # have a descriptor that can be had again, oldest first
        self._kept: dict[Node, None] = {}       # have one that can't
        self.clear()

    # the table --------------------------------------------------------------------------------------

    def get(self, nodeid: int) -> Node:
        """The node with that id. ESTALE where the guest does not know it."""
        node = self.by_id.get(nodeid)
        if node is None:
            raise OSError(ESTALE, "unknown node")
        return node

    def enter(self, parent: Node, name: bytes, status: os.stat_result) -> Node:
        """The node of what was found as `name` in `parent`, one lookup the more."""
        key = status.st_dev, status.st_ino, self.mount_at(parent, name) if self.crossings else 0
        node = self.by_key.get(key)
        if node is None or node.kind != S_IFMT(status.st_mode):     # another kind: the number was used again
            if len(self.by_id) >= MOST_NODES:
                raise OSError(ENOMEM, "too many inodes")
            node = Node(self.next_id, parent, name, key[0], key[1], S_IFMT(status.st_mode), key[2])
            self.next_id += 1
            self.by_id[node.nodeid] = node
            self.by_key[key] = node
        elif node is not self.root:
            self.place(node, parent, name)
        node.lookups += 1
        return node

    def mount_at(self, parent: Node, name: bytes) -> int:
        """The mount of what `name` in `parent` is."""
        if not self.crossings:
            return 0
        return self.crossings.get((parent.mount, parent.dev, parent.ino, name), parent.mount)

    def find(self, parent: Node, name: bytes, status: os.stat_result) -> Node | None:
        """The node of what is `name` in `parent`, if the guest knows it."""
        node = self.by_key.get((status.st_dev, status.st_ino, self.mount_at(parent, name)))
        return node if node is not None and node.kind == S_IFMT(status.st_mode) else None

    def place(self, node: Node, parent: Node, name: bytes) -> None:
        """`node` can be found there."""
        node.parent, node.name = parent, name
        if node in self._kept:
            del self._kept[node]
            self._cached[node] = None

    def keep(self, node: Node) -> None:
        """`node` is about to lose its name: keep a descriptor of it, where there is one to be had."""
        if node is self.root:
            return
        if node.fd < 0:
            try:
                node.fd = self._open(node)
            except OSError:
                return
        self._cached.pop(node, None)
        self._kept[node] = None

    def lost(self, node: Node, parent: Node, name: bytes) -> None:
        """What was `name` in `parent` is no longer there."""
        if node.parent is parent and node.name == name:
            node.parent = None

    def forget(self, nodeid: int, count: int) -> bool:
        """The guest drops `count` lookups. False where it never had as many."""
        node = self.by_id.get(nodeid)
        if node is None or (count > node.lookups and node is not self.root):
            return False
        if node is not self.root:
            node.lookups -= count
            if not node.lookups:
                self._remove(node)
        return True

    def _remove(self, node: Node) -> None:
        del self.by_id[node.nodeid]
        key = node.dev, node.ino, node.mount
        if self.by_key.get(key) is node:
            del self.by_key[key]
        self._close(node)

    def _close(self, node: Node) -> None:
        self._cached.pop(node, None)
        self._kept.pop(node, None)
        if node.fd >= 0:
            os.close(node.fd)
            node.fd = -1

    def clear(self) -> None:
        """Forget all but the root."""
        for node in (*self._cached, *self._kept):
            self._close(node)
        self.by_id = {ROOT_ID: self.root}
        self.by_key = {(self.root.dev, self.root.ino, 0): self.root}

    def close(self) -> None:
        """Give all descriptors back."""
        self.clear()
        os.close(self.root.fd)
        os.close(self.proc_fd)

    # descriptors ------------------------------------------------------------------------------------

    def trim(self, limit: int | None = None) -> None:
        """Close descriptors beyond the limit, those not used lately first. Between requests only."""
        most = self.limit if limit is None else limit
        cached = self._cached
        for _ in range(2 * len(cached)):
            if len(cached) <= most:
                break
            node = next(iter(cached))
            if node.used and limit is None:
                node.used = False
                del cached[node]
                cached[node] = None
            else:
                self._close(node)
        while len(self._kept) > self.limit:
            self._close(next(iter(self._kept)))

    def crowded(self) -> bool:
        """Whether trim() has something to do."""
        return len(self._cached) > self.limit or len(self._kept) > self.limit

    def fd(self, node: Node) -> int:
        """A descriptor of `node`, good until the request ends. ESTALE where it is gone, or outside the folder now."""
        fd = node.fd
        if fd < 0:
            if not node.handles:
                return self._found(node)
            fd = node.handles[0].fd
        elif node is self.root:
            return fd
        node.used = True
        self.inside(fd)
        return fd

    def inside(self, fd: int) -> None:
        """ESTALE unless what `fd` stands for lies in the folder now."""
        root = os.readlink(b"%d" % self.root.fd, dir_fd=self.proc_fd)
        at = os.readlink(b"%d" % fd, dir_fd=self.proc_fd)
        if not at.startswith(root) or (at[len(root):len(root) + 1] not in (b"/", b"") and root != b"/"):
            raise OSError(ESTALE, "moved out of the folder")

    def _found(self, node: Node) -> int:
        """Open what leads from an ancestor with a descriptor to `node`, and keep what was opened."""
        chain: list[Node] = []
        seen: set[Node] = set()
        at = node
        while at.fd < 0 and not at.handles:
            if at.parent is None or at in seen:     # unlinked, or places that contradict each other
                raise OSError(ESTALE, "no way to it")
            seen.add(at)
            chain.append(at)
            at = at.parent
        fd = self.fd(at)
        passing = -1                # the last descriptor that is not kept
        try:
            while chain:
                child = chain.pop()
                opened = self._open_in(child, fd)
                if passing >= 0:
                    os.close(passing)
                    passing = -1
                if len(chain) < _CHAIN_KEPT:
                    child.fd = opened
                    child.used = True
                    self._cached[child] = None
                else:
                    passing = opened
                fd = opened
        finally:
            if passing >= 0:
                os.close(passing)
        return fd

    def _open(self, node: Node) -> int:
        if node.parent is None:
            raise OSError(ESTALE, "no way to it")
        return self._open_in(node, self.fd(node.parent))

    def _open_in(self, node: Node, parent_fd: int) -> int:
        try:
            fd = open_beneath(node.name, parent_fd, self.crossings is not None)
        except OSError as error:
            if error.errno in (ENOENT, ENOTDIR, ELOOP):
                raise OSError(ESTALE, "not where it was") from None
            raise
        try:
            self._same(node, os.stat(fd))
        except OSError:
            os.close(fd)
            raise
        return fd

    def _same(self, node: Node, status: os.stat_result) -> None:
        """ESTALE unless `status` is that of the inode `node` stands for."""
        if S_IFMT(status.st_mode) != node.kind:
            raise OSError(ESTALE, "another inode")
        if node.ino < 0:            # loaded from a snapshot: this is the first time it is seen
            node.dev, node.ino = status.st_dev, status.st_ino
            if node.parent is not None:
                node.mount = self.mount_at(node.parent, node.name)
            self.by_key.setdefault((node.dev, node.ino, node.mount), node)
        elif status.st_ino != node.ino or status.st_dev != node.dev:
            raise OSError(ESTALE, "another inode")

    def stat(self, node: Node) -> os.stat_result:
        """The inode's attributes now, without opening it."""
        if node.fd >= 0:
            return os.stat(node.fd)
        if node.handles:
            return os.stat(node.handles[0].fd)
        if node.parent is None:
            raise OSError(ESTALE, "no way to it")
        try:
            status = os.stat(node.name, dir_fd=self.fd(node.parent), follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            raise OSError(ESTALE, "not where it was") from None
        self._same(node, status)
        return status

    def reopen(self, node: Node, flags: int) -> int:
        """Open a regular file or a directory for I/O."""
        return os.open(b"%d" % self.fd(node), flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=self.proc_fd)

    def path(self, node: Node) -> bytes:
        """A path that leads to the inode itself, for calls that take no O_PATH descriptor."""
        return b"/proc/self/fd/%d" % self.fd(node)
