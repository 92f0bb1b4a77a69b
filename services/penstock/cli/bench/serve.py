"""`penstock bench serve`: a running suite, from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.bench.options import WHOLE, DTypeName, Work
from penstock.cli.bench.session import measure
from penstock.cli.bench.target import UNKNOWN, Target
from penstock.common.config import ConfigError
from penstock.common.service import StartError

__all__ = ["serve"]

_SCHEMES = frozenset({"", "grpc", "grpcs", "http", "https"})


def serve(
    *,
    target: str = "grpc://127.0.0.1:8001",
    model: str | None = None,
    dtype: DTypeName = "auto",
    backend: str = "auto",
    vocabulary: int = 15_000,
    prefix_cache: bool = True,
    timeout_seconds: float = 600.0,
    api_key: str | None = None,
    work: Annotated[Work, Parameter(name="*")] = WHOLE,
) -> int:
    """Measure a running suite through one of its doors.

    Prompts are random token ids; answers are greedy and have an exact length. The status is 1 where a request of a scenario failed,
    or every request under --rate; why they failed is told on stderr and in --json.

    Args:
        target: HOST:PORT or grpc://HOST:PORT of the gRPC door, or http://HOST:PORT; grpcs:// and https:// where TLS stands before.
        model: Name of the model; needed where several are served.
        dtype: The precision that the suite must run in; another is refused. auto takes any.
        backend: The backend that the suite must run on; another is refused. auto takes any.
        vocabulary: Prompts' ids stay below this, where the server does not tell the model's own.
        prefix_cache: Whether requests may share prefixes; otherwise each gets a salt of its own, so that nothing is ever found.
        timeout_seconds: Deadline of each request.
        api_key: Key that the suite knows the caller by, where it wants one.
        work: See its fields.
    """
    connect = _door(target, model, vocabulary, prefix_cache=prefix_cache, timeout=timeout_seconds, api_key=api_key)

    def suite() -> Target:
        connected = connect()
        try:
            _check(target, "--dtype", dtype, connected.description.dtype)
            _check(target, "--backend", backend, connected.description.backend)
        except StartError:
            connected.close()
            raise
        return connected

    return measure(work, suite)


def _door(
    target: str, model: str | None, vocabulary: int, *, prefix_cache: bool, timeout: float, api_key: str | None
) -> Callable[[], Target]:
    """What connects to a door, once it is called."""
    scheme, _, address = target.rpartition("://")
    if scheme not in _SCHEMES or not address.rpartition(":")[2].isdigit():
        raise ConfigError(
            f"--target: must be HOST:PORT, or grpc://, grpcs://, http:// or https:// and HOST:PORT, and is {target!r}"
        )
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):  # which is not told: it may be a secret
        raise ConfigError("--api-key: must be printable ASCII, in one line: metadata and headers hold nothing else")
    tls = scheme in {"grpcs", "https"}
    if scheme not in {"http", "https"}:
        from penstock.cli.bench.grpc_target import GrpcTarget

        return lambda: GrpcTarget(address, model=model, prefix_cache=prefix_cache, timeout=timeout, tls=tls, api_key=api_key)
    from penstock.cli.bench.http_stream import Door
    from penstock.cli.bench.http_target import HttpTarget

    door = Door(address, tls, api_key)
    return lambda: HttpTarget(door, model=model, vocabulary=vocabulary, prefix_cache=prefix_cache, timeout=timeout)


def _check(target: str, option: str, asked: str, running: str) -> None:
    if asked in {"auto", running}:
        return
    if running == UNKNOWN:
        raise StartError(f"{option}: {target} does not tell what it runs, so that {asked} can not be asked of it; leave it auto")
    raise StartError(f"{option}: {target} runs {running}, and {asked} was asked for; start it with that")
