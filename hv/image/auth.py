"""Who we are to a registry: logins in docker's and podman's files, and their credential helpers.

Looked for in this order, the first that knows the registry wins:

    --authfile, or $REGISTRY_AUTH_FILE         then nothing else is read
    $DOCKER_CONFIG/config.json                 only where the variable is set
    $XDG_RUNTIME_DIR/containers/auth.json      podman's; /run/containers/<uid>/auth.json without the variable
    $XDG_CONFIG_HOME/containers/auth.json
    ~/.docker/config.json

In one file: credHelpers (by registry), auths (the longest match of registry/repository), credsStore, as
containers-auth.json(5) and docker's credential helpers protocol have it: `docker-credential-NAME get|store|erase`, the
server on stdin. A helper gets 30 seconds and 64 KiB. Left out: ~/.dockercfg, logins of mirrors.

Driven by tests/unit/test_image_auth.py and tests/root/test_registry_auth.py.
"""

from __future__ import annotations

__all__ = ["Login", "Logins"]

import base64
import binascii
import fcntl
import os
import signal
import subprocess
import threading
from typing import Any

from hv.errors import ConfigError
from hv.plainjson import dumps, loads

_FILE_LIMIT = 1 << 20
_HELPER_LIMIT = 64 << 10
_HELPER_SECONDS = 30
_TOKEN_USER = "<token>"     # docker/cli, cli/config/credentials: this user's secret is an identity token
_DOCKER_HUB = "https://index.docker.io/v1/"     # the key that docker login has always written
_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")


class Login:
    """A user and password, or an identity token (OAuth2 refresh token) in their place."""

    def __init__(self, user: str, password: str, token: str = "") -> None:
        self.user, self.password, self.token = user, password, token

    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Logins:
    """The logins of this user, read at each call."""

    def __init__(self, authfile: str = "") -> None:
        self._only = authfile or os.environ.get("REGISTRY_AUTH_FILE", "")
        self._explicit = bool(authfile)

    def find(self, registry: str, repository: str = "") -> Login | None:
        """The login for this registry, None if there is none."""
        for path in self._files():
            config = _read(path, must=self._explicit)
            if config is not None and (login := _find_in(config, path, registry, repository)) is not None:
                return login
        return None

    def save(self, registry: str, login: Login) -> str:
        """Keep a login; returns where."""
        def add(config: dict[str, Any]) -> str:
            if helper := _helper_of(config, registry):
                _helper(helper, "store", dumps({
                    "ServerURL": _server(registry), "Username": login.user, "Secret": login.password}))
                return f"docker-credential-{helper}"
            secret = base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
            config.setdefault("auths", {})[_server(registry)] = {"auth": secret}
            return ""

        path = self._file_to_write()
        return self._change(path, add) or path

    def remove(self, registry: str) -> bool:
        """Forget the logins for this registry in every file; whether there was one."""
        gone = False

        def drop(config: dict[str, Any]) -> str:
            nonlocal gone
            if (helper := _helper_of(config, registry)) and _ask_helper(helper, registry) is not None:
                _helper(helper, "erase", _server(registry))
                gone = True
            auths = config.get("auths", {})
            for key in [key for key in auths if _host_of(key) == _known_as(registry)]:
                del auths[key]
                gone = True
            return ""

        for path in self._files():
            if os.path.exists(path):
                self._change(path, drop)
        return gone

    def _files(self) -> list[str]:
        if self._only:
            return [self._only]
        home, runtime = os.path.expanduser("~"), os.environ.get("XDG_RUNTIME_DIR")
        configs = os.environ.get("XDG_CONFIG_HOME") or f"{home}/.config"
        files = [f"{runtime}/containers/auth.json" if runtime else f"/run/containers/{os.geteuid()}/auth.json",
                 f"{configs}/containers/auth.json"]
        if docker := os.environ.get("DOCKER_CONFIG"):
            return [f"{docker}/config.json", *files]
        return [*files, f"{home}/.docker/config.json"]

    def _file_to_write(self) -> str:
        if self._only:
            return self._only
        return (os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")) + "/config.json"

    def _change(self, path: str, change: Any) -> str:
        """Rewrite a file in one step, alone; all that is not ours in it stays."""
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, mode=0o700, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            config = _read(path, must=False) or {}
            before = dumps(config)
            answer: str = change(config)
            if dumps(config) != before:
                target = os.path.realpath(path)     # people link this file to elsewhere
                temporary = f"{target}.{os.getpid()}.tmp"
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with open(fd, "w", encoding="utf-8") as file:
                    file.write(dumps(config, indent=1) + "\n")
                os.replace(temporary, target)
            return answer
        finally:
            os.close(lock)


def _read(path: str, must: bool) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            raw = file.read(_FILE_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        if must:
            raise ConfigError(f"{path}: no such file", "write it with `pyhv login`") from None
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(raw) > _FILE_LIMIT:
        raise ConfigError(f"{path}: is larger than {_FILE_LIMIT} bytes", "repair or remove it")
    try:
        config = loads(raw.decode("utf-8")) if raw.strip() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}", "repair or remove it") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a file of logins", "repair or remove it")
    for field in ("auths", "credHelpers"):
        if config.get(field) is None:
            config.pop(field, None)
        elif not isinstance(config[field], dict):
            raise ConfigError(f"{path}: {field}: not an object", "repair or remove it")
    return config


def _find_in(config: dict[str, Any], path: str, registry: str, repository: str) -> Login | None:
    helpers = config.get("credHelpers", {})
    for name in _names(registry):
        if name in helpers:
            return _ask_helper(helpers[name], registry)
    auths = config.get("auths", {})
    for key in _keys(registry, repository):
        if key in auths and (login := _entry(auths[key], f"{path}: auths: {key}")) is not None:
            return login
    if config.get("credsStore"):
        return _ask_helper(config["credsStore"], registry)
    return None


def _keys(registry: str, repository: str) -> list[str]:
    """The keys an entry may stand under, the most special first."""
    keys = []
    parts = repository.split("/") if repository else []
    for name in _names(registry):
        keys += ["/".join([name, *parts[:count]]) for count in range(len(parts), 0, -1)]
    for name in _names(registry):
        keys.append(name)
        keys += [f"{scheme}://{name}{path}" for scheme in ("https", "http") for path in ("", "/", "/v1/", "/v2/")]
    return keys


def _entry(entry: object, where: str) -> Login | None:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: not an object", "log in again")
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Login("", "", token)
    auth = entry.get("auth")
    if not isinstance(auth, str) or not auth:
        return None         # what docker leaves for a login that a helper keeps
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        raise ConfigError(f"{where}: auth: no base64 of user:password", "log in again") from None
    if not colon:
        raise ConfigError(f"{where}: auth: no base64 of user:password", "log in again")
    return Login(user, password.rstrip("\0"))


def _names(registry: str) -> tuple[str, ...]:
    return _HUB_NAMES if registry in _HUB_NAMES else (registry,)


def _known_as(registry: str) -> str:
    return _names(registry)[0]


def _server(registry: str) -> str:
    return _DOCKER_HUB if registry in _HUB_NAMES else registry


def _host_of(key: str) -> str:
    """The registry that a key of auths is for; one with a repository is for itself only."""
    bare, scheme, rest = key.partition("://")
    return _known_as(rest.partition("/")[0] if scheme else bare)


def _helper_of(config: dict[str, Any], registry: str) -> str:
    helpers = config.get("credHelpers", {})
    named = [helpers[name] for name in _names(registry) if name in helpers]
    return str(named[0] if named else config.get("credsStore") or "")


def _ask_helper(name: object, registry: str) -> Login | None:
    text = _helper(name, "get", _server(registry), absent=True)
    if text is None:
        return None
    try:
        answer = loads(text)
        user, secret = answer["Username"], answer["Secret"]
        if not isinstance(user, str) or not isinstance(secret, str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"docker-credential-{name} get: no Username and Secret in its answer") from None
    return Login("", "", secret) if user == _TOKEN_USER else Login(user, secret)


def _helper(name: object, verb: str, text: str, absent: bool = False) -> str | None:
    """What the helper says; None where it knows no login and `absent` allows that."""
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(f"credential helper: {str(name)[:80]!r} is no name of one")
    program = f"docker-credential-{name}"
    try:
        child = subprocess.Popen([program, verb], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise ConfigError(f"{program}: {error.strerror}", "install it, or remove it from the file of logins") from None
    timer = threading.Timer(_HELPER_SECONDS, _kill, [child.pid])
    timer.start()
    try:
        assert child.stdin and child.stdout
        try:
            child.stdin.write(text.encode())
            child.stdin.close()
        except BrokenPipeError:
            pass                # it may answer without reading
        said = child.stdout.read(_HELPER_LIMIT + 1).decode("utf-8", "replace")
        if len(said) > _HELPER_LIMIT:
            raise ConfigError(f"{program} {verb}: its answer has no end")
        code = child.wait()
    finally:
        timer.cancel()
        if child.returncode is None:
            _kill(child.pid)
        child.wait()
        child.stdout.close()    # type: ignore[union-attr]
    if code == 0:
        return said
    if absent and "not found" in said.lower():      # docker-credential-helpers, credentials/error.go
        return None
    why = " ".join(said.split())[:200] or f"exit code {code}"
    if code == -9:
        why = f"no answer in {_HELPER_SECONDS} seconds"
    raise ConfigError(f"{program} {verb}: {why}")


def _kill(leader: int) -> None:
    """The helper and all it started: any of them may hold the pipe that is read."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass
