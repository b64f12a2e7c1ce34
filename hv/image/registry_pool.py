"""Connections to a host: urllib3's pools, with an end to how long the head of an answer may take.

A socket's timeout bounds each wait, not their sum: a server that sends a header byte by byte would hold us for days. So
a timer ends the connection after twice the timeout. Driven by tests/unit/test_image_registry_hostile.py.
"""

from __future__ import annotations

__all__ = ["new_manager"]

import socket
import ssl
import threading
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import InsecureRequestWarning
from urllib3.response import HTTPResponse

from hv.image.registry_reach import Access, is_local

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 30.0
_BLOCK = 256 << 10              # what one send takes of a body; it must go within _CONNECT_SECONDS


class _Watched(HTTPConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        assert self.sock is not None
        late = threading.Event()
        timer = threading.Timer(2 * (self.timeout or _READ_SECONDS), _end, [self.sock, late])
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()
        finally:
            timer.cancel()
        if late.is_set():           # http.client takes the end of the stream for the end of the head
            response.close()
            raise TimeoutError("timed out")
        return response


class _WatchedTls(_Watched, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Watched


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _WatchedTls


def new_manager(scheme: str, host: str, port: int, access: Access) -> urllib3.PoolManager:
    """Connections to one host, straight or through the proxy that the environment names."""
    options: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS), "maxsize": 16, "num_pools": 2,
        "blocksize": _BLOCK, "socket_options": [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]}
    if scheme == "https":
        options["ssl_context"] = access.context(host, port)
        if not access.tls_verify:
            urllib3.disable_warnings(InsecureRequestWarning)        # a person has asked for it
    proxy = _proxy(scheme, host, port)
    manager = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return manager


def _end(sock: socket.socket | ssl.SSLSocket, late: threading.Event) -> None:
    late.set()
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass        # it has ended already


def _proxy(scheme: str, host: str, port: int) -> str:
    from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

    proxies: dict[str, str] = getproxies_environment()
    if scheme not in proxies or is_local(host) or proxy_bypass_environment(f"{host}:{port}", proxies):
        return ""
    return proxies[scheme] if "://" in proxies[scheme] else f"http://{proxies[scheme]}"
