"""The guest's end of framework/guest_python.py: calls functions for the host, one after the other, over a socket.

    host -> guest   {"function": "module.name", "arguments": {...}}
    guest -> host   {"value": ..., "seconds": ...} or {"error": traceback}

A line of JSON each. Run as `python -ISE guest_agent.py PORT FOLDER...`: the folders are where modules are found.
"""

from __future__ import annotations

import sys

HOST = 2                                # VMADDR_CID_HOST, include/uapi/linux/vm_sockets.h


def answer(request: dict) -> dict:
    """Call what is asked for."""
    from time import monotonic

    module, _, name = request["function"].rpartition(".")
    began = monotonic()
    try:
        __import__(module)
        value = getattr(sys.modules[module], name)(**request["arguments"])
        return {"value": value, "seconds": monotonic() - began}
    except BaseException:
        import traceback

        return {"error": traceback.format_exc()}


def serve(port: int) -> None:
    """Answer until the host hangs up."""
    # socket and json import much, which takes long
    from _socket import AF_VSOCK, SOCK_CLOEXEC, SOCK_STREAM, socket

    from hv.plainjson import dumps, loads

    stream = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC)
    stream.connect((HOST, port))
    waiting = b""
    while data := stream.recv(1 << 16):
        waiting += data
        while b"\n" in waiting:
            line, _, waiting = waiting.partition(b"\n")
            stream.sendall(dumps(answer(loads(line.decode()))).encode() + b"\n")


if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    serve(int(sys.argv[1]))
