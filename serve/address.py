"""Where a server listens: a port that is free, found out before anything heavy starts, and the URL for clients."""

from __future__ import annotations

import errno
import socket

from qtoolkit.errors import RequestError

LAST = 65535
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # listening everywhere: what a client here dials


def choose_port(host: str, port: int) -> int:
    """Return ``port`` if it is free on ``host``, or any free one for 0.

    Raises:
        RequestError: the port is taken or not allowed, or this machine has no such address.
    """
    if not 0 <= port <= LAST:  # the resolver would take a larger one modulo 65536
        raise RequestError(f"{port} is not a port.", f"Ports go from 1 to {LAST}; 0 picks a free one.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise RequestError(*_explain(host, port, error)) from None


def _explain(host: str, port: int, error: OSError) -> tuple[str, str]:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} on {host} is in use.", "Give another --port, or --port 0 for a free one."
    if error.errno == errno.EACCES:
        return f"Port {port} needs rights that this user lacks.", "Give a port above 1023, or --port 0 for a free one."
    return f"{host!r} is not an address of this machine.", "Use 127.0.0.1 for this machine only, 0.0.0.0 for all."


def url(host: str, port: int) -> str:
    """Return the root URL under which a client on this machine reaches the server."""
    name = WILDCARDS.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"
