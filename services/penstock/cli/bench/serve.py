"""`penstock bench serve`: a running suite, from outside."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from penstock.cli.bench.options import WHOLE, DTypeName, Work
from penstock.cli.bench.session import measure
from penstock.cli.bench.target import Target
from penstock.common.config import ConfigError
from penstock.common.service import StartError

__all__ = ["serve"]


def serve(
    *,
    target: str = "grpc://127.0.0.1:8001",
    model: str | None = None,
    dtype: DTypeName = "auto",
    backend: str = "auto",
    vocabulary: int = 15_000,
    prefix_cache: bool = True,
    timeout_seconds: float = 600.0,
    work: Annotated[Work, Parameter(name="*")] = WHOLE,
) -> int:
    """Measure a running suite through one of its doors.

    Prompts are random token ids; answers are greedy and have an exact length.

    Args:
        target: grpc://HOST:PORT or http://HOST:PORT.
        model: Name of the model; needed where several are served.
        dtype: The precision that the suite must run in; another is refused. auto takes any.
        backend: The backend that the suite must run on; another is refused. auto takes any.
        vocabulary: Prompts' ids stay below this. gRPC tells the model's own; HTTP does not.
        prefix_cache: Whether requests may share prefixes; otherwise each gets a salt of its own, so that nothing is ever found.
        timeout_seconds: Deadline of each request.
        work: See its fields.
    """
    scheme, _, address = target.partition("://")
    if scheme not in {"grpc", "http"} or not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"--target: must be grpc://HOST:PORT or http://HOST:PORT, and is {target!r}")

    def over_grpc() -> Target:
        from penstock.cli.bench.grpc_target import GrpcTarget

        suite = GrpcTarget(address, model=model, prefix_cache=prefix_cache, timeout=timeout_seconds)
        for asked, running in ((dtype, suite.description.dtype), (backend, suite.description.backend)):
            if asked not in {"auto", running}:
                suite.close()
                raise StartError(f"{target} runs {running}, and {asked} was asked for; start it with that")
        return suite

    def over_http() -> Target:
        from penstock.cli.bench.http_target import HttpTarget

        return HttpTarget(
            address,
            model=model,
            vocabulary=vocabulary,
            dtype=dtype,
            backend=backend,
            prefix_cache=prefix_cache,
            timeout=timeout_seconds,
        )

    measure(work, over_grpc if scheme == "grpc" else over_http)
    return 0
