"""gRPC's sockets are read by the thread that hands messages to asyncio, not by others that would hand them to it first."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

__all__ = ["with_fewer_threads"]

_VARIABLE = "GRPC_EXPERIMENTS"
# gRPC's event engine reads sockets in threads of its own. Without it the thread that asyncio waits for reads them itself: a wake-up
# less for each message, a third of what the services take of a processor for a token. gRPC reads this when it is first imported.
_WITHOUT = "-event_engine_client,-event_engine_listener"
# Releases that know both ways. A later one may know these words no more, and would complain of them on stderr.
_BEHIND = (1, 86)


def with_fewer_threads(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment before gRPC is imported; nothing where somebody has decided already, or gRPC is too new."""
    release = tuple(int(number) for number in version("grpcio").split(".")[:2])
    return {} if _VARIABLE in environment or release >= _BEHIND else {_VARIABLE: _WITHOUT}
