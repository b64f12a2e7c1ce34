"""A registry's operations on one repository: manifests and blobs, down and up.

Source: opencontainers/distribution-spec v1.1, and distribution's own docs/spec/api.md, which registries of today follow
alike. What a registry says about sizes and digests is checked at once; contents are checked by whoever keeps them.
Left out on purpose: catalogues, deletion, referrers, uploads in chunks (each is one PUT), external layers' addresses.

Driven by tests/root/test_registry.py (a real one) and tests/unit/test_image_registry_hostile.py (bad ones).
"""

from __future__ import annotations

__all__ = ["Registry", "check_login"]

import os
from collections.abc import Callable, Generator
from hashlib import sha256
from typing import IO

from hv.errors import RegistryError
from hv.image.media import MANIFEST_LIMIT, MANIFEST_TYPES, Descriptor
from hv.image.reference import is_digest
from hv.image.registry_http import Broken, Session
from hv.image.registry_reach import Access

_TYPES = ", ".join(MANIFEST_TYPES)
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"      # distribution, manifest/schema1
_UPLOADS = 5
_COMMIT_SECONDS = 300           # a registry may have to copy what it got before it answers


class Registry:
    """One repository of a registry. Close it."""

    def __init__(self, registry: str, repository: str, access: Access, push: bool = False) -> None:
        self.session = Session(registry, access, repository)
        self.repository = repository
        self._path = f"/v2/{repository}"
        self._scope = f"repository:{repository}:{'pull,push' if push else 'pull'}"
        self.label = f"{registry}/{repository}"

    def manifest(self, wanted: str, size: int = -1) -> tuple[Descriptor, bytes]:
        """The manifest or index with that tag or digest, verified against the digest if it is one."""
        what = f"manifest {self.repository}{'@' if is_digest(wanted) else ':'}{wanted}"
        response = self.session.send("GET", f"{self._path}/manifests/{wanted}", self._scope, what=what,
                                     headers={"Accept": _TYPES})
        said = response.headers.get("Docker-Content-Digest", "")
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        raw = self.session.small(response, MANIFEST_LIMIT, what)
        if media_type.startswith(_SCHEMA_1):
            raise RegistryError(f"{self.label}: {what}: is in docker's schema 1, which nobody makes any more",
                                hint="push the image again with a current tool")
        digest = f"sha256:{sha256(raw).hexdigest()}"
        for source, expected in (("asked for", wanted), ("announced as", said)):
            if is_digest(expected) and expected != digest:
                raise RegistryError(f"{self.label}: {what}: its digest is {digest}, {source} {expected}")
        if 0 <= size != len(raw):
            raise RegistryError(f"{self.label}: {what}: has {len(raw)} bytes, its index says {size}")
        return Descriptor(media_type if media_type in MANIFEST_TYPES else "", digest, len(raw)), raw

    def blob(self, blob: Descriptor, offset: int = 0) -> tuple[int, Generator[bytes, None, None]]:
        """Where the answer begins (0 if the registry can't resume) and its pieces, which may be too many or too few.

        One attempt: the caller knows how far it got.
        """
        what = f"blob {blob.digest}"
        response = self.session.send("GET", f"{self._path}/blobs/{blob.digest}", self._scope, (200, 206), what,
                                     {"Range": f"bytes={offset}-"} if offset else {}, attempts=1)
        begin, length = 0, response.headers.get("Content-Length")
        if response.status == 206:
            begin = offset
            if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                response.close()
                raise RegistryError(f"{self.label}: {what}: sends another part than was asked for")
        if length is not None and length != str(blob.size - begin):
            response.close()
            raise RegistryError(f"{self.label}: {what}: is announced with {length[:30]} bytes, the manifest says "
                                f"{blob.size - begin}")
        return begin, self.session.pieces(response)

    def has_blob(self, blob: Descriptor) -> bool:
        """Whether the repository has the blob."""
        response = self.session.send("HEAD", f"{self._path}/blobs/{blob.digest}", self._scope, (200, 404),
                                     f"blob {blob.digest}")
        self.session.drop(response)
        return bool(response.status == 200)

    def has_manifest(self, digest: str) -> bool:
        """Whether the repository has the manifest."""
        response = self.session.send("HEAD", f"{self._path}/manifests/{digest}", self._scope, (200, 404),
                                     f"manifest {digest}", {"Accept": _TYPES})
        self.session.drop(response)
        return bool(response.status == 200)

    def put_blob(self, blob: Descriptor, path: str, mount_from: str = "",
                 progress: Callable[[int], None] = lambda done: None) -> bool:
        """Upload a file as a blob, or have it mounted from another repository; whether bytes were sent."""
        what = f"upload of {blob.digest}"
        for attempt in range(1, _UPLOADS + 1):
            target = self._begin_upload(blob, mount_from, what)
            if not target:
                return False
            try:
                with open(path, "rb", buffering=0) as file:
                    if os.fstat(file.fileno()).st_size != blob.size:
                        raise RegistryError(f"{self.label}: {what}: the store has another size than {blob.size}",
                                            hint="`pyhv image fsck` says what is damaged")
                    answer = self.session.send(
                        "PUT", target, self._scope, (201, 204), what, attempts=1, patience=_COMMIT_SECONDS,
                        headers={"Content-Length": str(blob.size), "Content-Type": "application/octet-stream"},
                        body=_Counted(file, progress) if blob.size else b"")
                self.session.drop(answer)
                return True
            except Broken as broken:
                if attempt == _UPLOADS:
                    raise
                self.session.wait(attempt, broken)
        raise AssertionError("not reached")

    def _begin_upload(self, blob: Descriptor, mount_from: str, what: str) -> str:
        """The address to send the blob to; "" if it is there already, mounted."""
        query, scope = "", self._scope
        if mount_from:
            query, scope = f"?mount={blob.digest}&from={mount_from}", f"{scope} repository:{mount_from}:pull"
        try:
            response = self.session.send("POST", f"{self._path}/blobs/uploads/{query}", scope, (201, 202), what,
                                         {"Content-Length": "0"})
        except RegistryError as error:
            if mount_from and error.status in (401, 403, 404):
                return self._begin_upload(blob, "", what)       # we may not read there; then it is sent
            raise
        location = response.headers.get("Location", "")
        self.session.drop(response)
        if response.status == 201 and mount_from:
            return ""
        target = self.session.address(f"{self.session.base}{self._path}/", location)
        return f"{target}{'&' if '?' in target else '?'}digest={blob.digest}"

    def put_manifest(self, wanted: str, raw: bytes, media_type: str) -> str:
        """Upload a manifest or an index under a tag or its digest; its digest."""
        digest = f"sha256:{sha256(raw).hexdigest()}"
        response = self.session.send("PUT", f"{self._path}/manifests/{wanted}", self._scope, (201,),
                                     f"manifest {wanted}", {"Content-Type": media_type}, raw)
        said = response.headers.get("Docker-Content-Digest", digest)
        self.session.drop(response)
        if said != digest:
            raise RegistryError(f"{self.label}: manifest {wanted}: is kept as {said[:80]!r}, was sent as {digest}")
        return digest

    def close(self) -> None:
        """Close the connections."""
        self.session.close()


class _Counted:
    """A file whose reader is followed."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        self._file, self._progress, self._done = file, progress, 0

    def read(self, size: int = -1) -> bytes:
        """As a file's; http.client calls it."""
        piece = self._file.read(size)
        self._done += len(piece)
        self._progress(self._done)
        return piece


def check_login(registry: str, access: Access) -> None:
    """RegistryError unless the registry lets this login in."""
    session = Session(registry, access)
    try:
        session.drop(session.send("GET", "/v2/", what="login"))
    finally:
        session.close()
