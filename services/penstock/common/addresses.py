"""Addresses of servers, HOST:PORT."""

from __future__ import annotations

__all__ = ["host_and_port"]

_MOST = 65_535


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
