"""How a registry is reached: http or https, with which certificates, as whom.

https, always, with two exceptions, as docker has them: a registry on this machine (localhost, 127.0.0.0/8, ::1) and
`--tls-verify=false`. Only for these is it tried whether TLS is spoken at all, and http taken where it is not.

Certificates of a registry are looked for where docker and podman look (containers-certs.d(5)): HOST[:PORT]/*.crt are
further authorities, NAME.cert with NAME.key are a client's, in --cert-dir itself or in ~/.config/containers/certs.d,
/etc/containers/certs.d, /etc/docker/certs.d; the first folder that is there counts. Proxies are taken from the
environment (http_proxy, https_proxy, no_proxy). Left out: registries.conf (mirrors, rewritten names), SOCKS proxies.

Driven by tests/unit/test_image_registry_reach.py and tests/root/test_registry_auth.py.
"""

from __future__ import annotations

__all__ = ["Access", "is_local"]

import os
import socket
import ssl

from hv.errors import ConfigError, RegistryError
from hv.image.auth import Login, Logins

_HUB = "registry-1.docker.io"       # where docker.io keeps its images (moby, registry/config.go)
_PROBE_SECONDS = 10
# OpenSSL's words for an answer that is no TLS: plain http, or the end of the stream
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_EOF_WHILE_READING", "PACKET_LENGTH_TOO_LONG",
           "RECORD_LAYER_FAILURE")


class Access:
    """What a person said about reaching registries; the defaults are what is usual."""

    def __init__(self, tls_verify: bool = True, cert_dir: str = "", authfile: str = "",
                 login: Login | None = None) -> None:
        self.tls_verify, self.cert_dir, self.authfile, self._login = tls_verify, cert_dir, authfile, login

    def with_login(self, login: Login) -> Access:
        """The same, as somebody else."""
        return Access(self.tls_verify, self.cert_dir, self.authfile, login)

    def login(self, registry: str, repository: str = "") -> Login | None:
        """The given login, or the one that is kept for the registry."""
        return self._login or Logins(self.authfile).find(registry, repository)

    def base(self, registry: str) -> str:
        """scheme://host:port of a registry."""
        host = _HUB if registry == "docker.io" else registry
        name, port = split_port(host)
        if self.tls_verify and not is_local(name):
            return f"https://{name}:{port or 443}"
        if port:
            return f"{'https' if _speaks_tls(name, port) else 'http'}://{name}:{port}"
        for scheme, usual in (("https", 443), ("http", 80)):
            try:
                if scheme == "http" or _speaks_tls(name, usual):
                    return f"{scheme}://{name}:{usual}"
            except RegistryError:
                pass            # nobody listens; the other port then
        raise AssertionError("not reached")

    def context(self, host: str, port: int) -> ssl.SSLContext:
        """How TLS is spoken to a host."""
        folder = self._folder(f"{host}:{port}") or (self._folder(host) if port == 443 else "")
        try:
            context = ssl.create_default_context()
            for name in sorted(os.listdir(folder)) if folder else ():
                path = f"{folder}/{name}"
                if name.endswith(".crt"):
                    context.load_verify_locations(path)
                elif name.endswith(".cert"):
                    context.load_cert_chain(path, path.removesuffix(".cert") + ".key")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{folder}: a certificate can't be read: {error.strerror or error}") from None
        if not self.tls_verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def _folder(self, host: str) -> str:
        if self.cert_dir:
            if not os.path.isdir(self.cert_dir):
                raise ConfigError(f"--cert-dir {self.cert_dir}: no such folder")
            return self.cert_dir
        configs = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        for top in (f"{configs}/containers", "/etc/containers", "/etc/docker"):
            if os.path.isdir(folder := f"{top}/certs.d/{host}"):
                return folder
        return ""


def is_local(host: str) -> bool:
    """Whether a host is this machine: localhost, 127.0.0.0/8, [::1]."""
    parts = host.split(".")
    return host in ("localhost", "[::1]") or (
        len(parts) == 4 and parts[0] == "127" and all(part.isdigit() and int(part) < 256 for part in parts))


def split_port(host: str) -> tuple[str, int]:
    """host[:port] in two; 0 for no port."""
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        return host, 0
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"registry {host[:300]!r}: {port[:20]!r} is no port", "write HOST[:PORT]")
    return name, int(port)


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host.strip("[]"), port), _PROBE_SECONDS) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=host.strip("[]")):
                    return True
            except ssl.SSLError as error:
                return error.reason not in _NO_TLS
            except ConnectionError:
                return False
    except OSError as error:
        raise RegistryError(f"registry {host}:{port}: {error.strerror or error}",
                            hint="is it running, and its name spelled right?") from None
