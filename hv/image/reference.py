"""The name of an image: registry, repository, tag, digest.

Source: github.com/distribution/reference (grammar in reference.go, docker's defaults in normalize.go). Written without
regular expressions, since `pyhv run` parses a name before anything else and the re package costs 4 ms. Left out on
purpose: digests other than sha256. Driven by tests/unit/test_image_reference.py.
"""

from __future__ import annotations

__all__ = ["DIGEST_LENGTH", "Reference", "is_digest", "is_hex"]

from hv.errors import ConfigError

DIGEST_LENGTH = 71              # "sha256:" and 64 hexadecimal digits

_DOCKER, _LIBRARY, _LATEST = "docker.io", "library/", "latest"      # normalize.go: defaultDomain and so on
_NAME_LENGTH = 255              # reference.go: NameTotalLengthMax
_TAG_LENGTH = 128               # regexp.go: tag

_LOWER, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
_ALNUM = _LOWER + _LOWER.upper() + _DIGITS


def is_hex(text: str) -> bool:
    """Lower-case hexadecimal digits, and at least one."""
    return bool(text) and not text.strip("0123456789abcdef")


def is_digest(text: str) -> bool:
    """`sha256:` and 64 lower-case hexadecimal digits."""
    return len(text) == DIGEST_LENGTH and text.startswith("sha256:") and is_hex(text[7:])


class Reference:
    """What an image is called: `registry` / `repository` : `tag` @ `digest`; the last two may be ""."""

    __slots__ = ("digest", "registry", "repository", "tag")

    def __init__(self, registry: str, repository: str, tag: str = "", digest: str = "") -> None:
        self.registry, self.repository, self.tag, self.digest = registry, repository, tag, digest

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read what a person typed; a registry, `library/` and `:latest` are added where docker adds them."""
        rest, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise _wrong(text, f"the digest {digest[:80]!r} is not sha256: and 64 hexadecimal digits")
        tag = ""
        if ":" in rest.rpartition("/")[2]:
            rest, _, tag = rest.rpartition(":")
            if not _is_tag(tag):
                raise _wrong(text, f"the tag {tag[:140]!r} may have letters, digits, '_', '.', '-', and 128 of them")
        registry, repository = _split_registry(rest)
        if not _is_registry(registry):
            raise _wrong(text, f"the registry {registry[:80]!r} is no host[:port]")
        for part in repository.split("/"):
            if not _is_component(part):
                why = "is in upper case" if _is_component(part.lower()) else "is not as a repository's name may be"
                raise _wrong(text, f"{part[:80]!r} {why}")
        if len(registry) + 1 + len(repository) > _NAME_LENGTH:
            raise _wrong(text, f"the name is longer than {_NAME_LENGTH} characters")
        if len(rest) == 64 and is_hex(rest):
            raise _wrong(text, "64 hexadecimal digits are an image ID, not a name")
        return cls(registry, repository, tag or ("" if digest else _LATEST), digest)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def familiar(self) -> str:
        """As people write it: without docker.io/library/."""
        return _shortened(self.name) + self._suffix()

    def familiar_name(self) -> str:
        """`name` as people write it."""
        return _shortened(self.name)

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        return self.name + self._suffix()

    def __repr__(self) -> str:
        return f"Reference({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"image name {text[:300]!r}: {why}", "write it as [REGISTRY/]REPOSITORY[:TAG][@sha256:DIGEST]")


def _split_registry(rest: str) -> tuple[str, str]:
    """normalize.go, splitDockerDomain: the first part is a registry if it looks like a host and more follows."""
    first, slash, others = rest.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        registry, repository = _DOCKER, rest
    else:
        registry, repository = first, others
    if registry == "index.docker.io":
        registry = _DOCKER
    if registry == _DOCKER and "/" not in repository:
        repository = _LIBRARY + repository
    return registry, repository


def _shortened(name: str) -> str:
    if name.startswith(_DOCKER + "/"):
        name = name[len(_DOCKER) + 1:]
        rest = name[len(_LIBRARY):]
        # normalize.go, familiarizeName: what remains must not read as a registry
        if name.startswith(_LIBRARY) and "/" not in rest:
            return rest
    return name


def _is_tag(text: str) -> bool:
    return 0 < len(text) <= _TAG_LENGTH and text[0] in _ALNUM + "_" and not text.strip(_ALNUM + "_.-")


def _is_registry(text: str) -> bool:
    """host, host:port, or [IPv6]:port (regexp.go: domainAndPort)."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    elif not port or len(port) > 5 or port.strip(_DIGITS):
        return False
    if host.startswith("[") and host.endswith("]"):
        return len(host) > 2 and not host[1:-1].strip("0123456789abcdefABCDEF:")
    return all(label and not label.strip(_ALNUM + "-") and label[0] != "-" != label[-1] for label in host.split("."))


def _is_component(text: str) -> bool:
    """Runs of lower-case letters and digits, between them one of `.`, `_`, `__`, `---` (regexp.go: pathComponent)."""
    between = ""
    for char in text:
        if char in "._-":
            between += char
        elif char not in _LOWER + _DIGITS or (between not in ("", ".", "_", "__") and between.strip("-")):
            return False
        else:
            between = ""
    return bool(text) and not between and text[0] not in "._-"
