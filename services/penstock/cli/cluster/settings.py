"""What `penstock up` is told."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from penstock.cli.cluster.pools import Role, pools
from penstock.common.config import ENVIRONMENT_PREFIX
from penstock.common.logs import LogFormat, LogLevel

__all__ = ["UpConfig"]

DTypeName = Literal["auto", "f32", "bf16", "int8", "int4"]
KvDTypeName = Literal["auto", "int8"]


@dataclass(frozen=True, kw_only=True)
class UpConfig:
    """Settings of a local cluster. Others of a single service stand in its section of the file, or in its environment variables.

    Attributes:
        backend: What runs the model; `penstock backends` lists them. auto takes the best that is here.
        dtype: Precision of the weights; auto takes what the backend prefers.
        workers: Executors that prefill and decode; each holds the model once. One where neither prefill nor decode is given.
        prefill: Executors for prefill.
        decode: Executors for decoding behind a prefill that ran elsewhere.
        placement: Whether a request's prefill runs on an executor of its own; auto decides by what each way is expected to cost.
        prefill_backend: Backend of the executors for prefill, where it is not that of all.
        prefill_dtype: Precision of their weights, likewise.
        prefill_kv_cache_dtype: Type of their KV cache, likewise.
        decode_backend: Backend of the executors for decoding, likewise.
        decode_dtype: Precision of their weights, likewise.
        decode_kv_cache_dtype: Type of their KV cache, likewise.
        http: HOST:PORT of the OpenAI HTTP door; port 0 takes a free one.
        grpc: HOST:PORT of the gRPC door; port 0 takes a free one.
        kv_cache_gib: KV cache of each executor, in GiB; from the memory that is free where absent.
        kv_cache_dtype: Type of the KV cache; int8 halves it or better, auto is the backend's own choice.
        max_batch_tokens: Tokens of one engine step at most.
        max_batch_size: Sequences of one engine step at most.
        prefix_cache: Whether requests share the KV of prefixes that are equal.
        threads: Threads of all executors that are started with the cluster, together; every core where absent.
        served_name: Name by which clients ask for the model; where absent MODEL, or the last part of a folder's path.
        max_restarts: Restarts of one service in a row; at the death behind the last of them the cluster gives up.
        healthy_seconds: Serving after which a service's death is the first in a row again.
        log_level: Least level of the log lines that are written.
        log_format: Console or JSON lines; auto is console on a terminal.
        event_log: File to which the gateway appends everything that happens to a request, a line of JSON each; none where absent.
        otlp_endpoint: URL of an OpenTelemetry collector that speaks OTLP over gRPC.
        grace_seconds: Time that running requests get when the cluster ends.
    """

    if TYPE_CHECKING:
        given: frozenset[str] = field(init=False)

    backend: str = "auto"
    dtype: DTypeName = "auto"
    workers: int | None = None
    prefill: int = 0
    decode: int = 0
    placement: Literal["auto", "together", "apart"] = "auto"
    prefill_backend: str | None = None
    prefill_dtype: DTypeName | None = None
    prefill_kv_cache_dtype: KvDTypeName | None = None
    decode_backend: str | None = None
    decode_dtype: DTypeName | None = None
    decode_kv_cache_dtype: KvDTypeName | None = None
    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:8001"
    kv_cache_gib: float | None = None
    kv_cache_dtype: KvDTypeName = "auto"
    max_batch_tokens: int | None = None
    max_batch_size: int | None = None
    prefix_cache: bool = True
    threads: int | None = None
    served_name: str | None = None
    max_restarts: int = 5
    healthy_seconds: float = 120.0
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    event_log: str | None = None
    otlp_endpoint: str | None = None
    grace_seconds: float = 30.0

    def __new__(cls, **given: object) -> Self:
        """Remember what was given, a default's own value included: it goes before what a service's section says."""
        self = super().__new__(cls)
        object.__setattr__(self, "given", frozenset(given))
        return self

    def own(self, keys: Iterable[str]) -> dict[str, object]:
        """Of these settings, those that were said to the cluster itself; the rest is for a service's own section and environment.

        So is what a variable for all commands says: a service reads it too, and what is said to it alone goes before.
        """
        given = {key: getattr(self, key) for key in keys if key in self.given}
        return {key: value for key, value in given.items() if os.environ.get(f"{ENVIRONMENT_PREFIX}{key.upper()}") != str(value)}

    @property
    def pools(self) -> dict[Role, int]:
        """Executors by role.

        Raises:
            ConfigError: there is none, or a number is none.
        """
        return pools(self.prefill, self.decode, self.workers)
