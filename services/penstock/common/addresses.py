"""Addresses of servers, HOST:PORT."""

from __future__ import annotations

import socket

__all__ = ["host_and_port", "reachable"]

_MOST = 65_535
_WILDCARDS = frozenset({"0.0.0.0", "[::]"})


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT; an IPv6 host keeps its brackets.

    Raises:
        ValueError: it is none; says so.
    """
    host, colon, port = address.rpartition(":")
    bare = not host.startswith("[") and ":" in host
    if not host or not colon or bare or not port.isdecimal() or int(port) > _MOST:
        raise ValueError(f"{address!r} is not HOST:PORT, with a port from 0 to {_MOST}")
    return host, int(port)


def reachable(bound: str) -> str:
    """The address under which others reach a server that is bound to HOST:PORT: this host's name where HOST is a wildcard."""
    host, port = host_and_port(bound)
    return f"{socket.gethostname()}:{port}" if host in _WILDCARDS else bound
