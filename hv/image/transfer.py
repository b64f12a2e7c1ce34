"""One blob from a registry into the store, and several transfers at once.

A download is collected in the store's partial file, which a lock keeps for one downloader: a second pull of the same
blob, in this process or another, waits for it and finds the blob there, or goes on where the first was killed. What was
kept is read again, since the digest is that of all bytes. Driven by tests/unit/test_image_pull.py and
tests/root/test_registry.py.
"""

from __future__ import annotations

__all__ = ["Report", "at_once", "fetch"]

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from hashlib import sha256
from typing import TYPE_CHECKING

from hv.errors import HvError, ImageError, RegistryError
from hv.image.files import said
from hv.image.media import Descriptor
from hv.image.registry import Registry
from hv.image.registry_http import Broken
from hv.image.store import Store

if TYPE_CHECKING:
    from hashlib import _Hash

_PIECE = 1 << 20
_POLL = 0.1
_FAILURES = 5               # in a row, without _HEADWAY between them
_HEADWAY = 1 << 20

# What happened to which blob, bytes done, its size: "there", "waits" (for another pull), "bytes", "again" (after a
# failure), "done". Called from several threads.
Report = Callable[[str, Descriptor, int], None]


def fetch(store: Store, registry: Registry, blob: Descriptor, report: Report) -> None:
    """Have the blob in the store, from the registry if need be. Hold the store's lock, shared."""
    if store.has(blob.digest, blob.size):
        return report("there", blob, blob.size)
    path = store.partial(blob.digest)
    fd = -1
    try:
        fd = _locked(path, registry, blob, report)
        if store.has(blob.digest, blob.size):
            return report("there", blob, blob.size)
        try:
            if not _download(registry, blob, fd, report):
                os.ftruncate(fd, 0)         # what an earlier pull left was bad
                _download(registry, blob, fd, report)
        except (_Wrong, OSError) as error:
            if isinstance(error, _Wrong) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                os.ftruncate(fd, 0)
            raise
        store.adopt(blob, verified=True)    # from here on, the file is the blob
    except OSError as error:
        raise said(error, f"writing blob {blob.digest}") from None
    finally:
        if fd >= 0:
            if os.fstat(fd).st_size == 0 and _is_at(fd, path):
                os.unlink(path)             # nothing to go on with
            os.close(fd)
    return report("done", blob, blob.size)


class _Wrong(RegistryError):
    """What came is not the blob: it is of no use to a later pull."""


def _locked(path: str, registry: Registry, blob: Descriptor, report: Report) -> int:
    """The partial file, ours alone."""
    told = False
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            while not _try_lock(fd):
                if not told:
                    report("waits", blob, 0)
                    told = True
                if registry.session.cancelled.wait(_POLL):
                    raise RegistryError("cancelled")
            if _is_at(fd, path):        # else it has become the blob, or was removed, while we waited
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _download(registry: Registry, blob: Descriptor, fd: int, report: Report) -> bool:
    """Fill the file; False if it is wrong because of what was in it before, _Wrong if the registry is to blame."""
    done, hasher = _kept(fd, blob)
    resumed = done > 0
    failures, counted = 0, done
    while done < blob.size:
        try:
            begin, pieces = registry.blob(blob, done)
            if begin < done:
                done, hasher, resumed = 0, sha256(), False
                os.ftruncate(fd, 0)
            with closing(pieces):
                for piece in pieces:
                    if done + len(piece) > blob.size:
                        raise _Wrong(f"{registry.label}: blob {blob.digest}: is longer than the {blob.size} bytes that "
                                     "the manifest says")
                    hasher.update(piece)
                    _write(fd, piece, done)
                    done += len(piece)
                    report("bytes", blob, done)
            if done < blob.size:
                raise Broken(f"{registry.label}: blob {blob.digest}: ended after {done} of {blob.size} bytes")
        except Broken as broken:
            failures = failures + 1 if done - counted < _HEADWAY else 1
            counted = done
            if failures >= _FAILURES or registry.session.cancelled.is_set():
                raise
            report("again", blob, done)
            registry.session.wait(failures, broken)
        except RegistryError as error:
            if error.status != 416 or not done:     # RFC 9110: Range Not Satisfiable
                raise
            return False
    found = f"sha256:{hasher.hexdigest()}"
    if found != blob.digest and not resumed:
        raise _Wrong(f"{registry.label}: blob {blob.digest}: its content has the digest {found}")
    return found == blob.digest


def _kept(fd: int, blob: Descriptor) -> tuple[int, _Hash]:
    """How much is there from an earlier pull, and its digest so far."""
    hasher, done = sha256(), 0
    if os.fstat(fd).st_size > blob.size:
        os.ftruncate(fd, 0)
    while piece := os.pread(fd, _PIECE, done):
        hasher.update(piece)
        done += len(piece)
    return done, hasher


def _write(fd: int, piece: bytes, at: int) -> None:
    view = memoryview(piece)
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count


def at_once(tasks: Iterable[Callable[[], None]], jobs: int, abort: Callable[[], None]) -> None:
    """Run the tasks, `jobs` at a time; the first failure aborts the others and is raised."""
    queue, lock = iter(list(tasks)), threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            with lock:
                task = next(queue, None)
            if task is None:
                return
            try:
                task()
            except BaseException as error:      # handed over to the caller
                failures.append(error)
                abort()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:       # Ctrl-C
        failures.append(ImageError("interrupted"))
        abort()
        for thread in threads:
            if thread.ident:
                thread.join(2)
        raise
    if failures:
        first = failures[0]
        raise first if isinstance(first, HvError) else RuntimeError("a transfer failed") from first
