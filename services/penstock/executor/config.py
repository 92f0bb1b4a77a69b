"""How an executor is set up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.common.logs import LogFormat, LogLevel

__all__ = ["ExecutorConfig"]


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """The executor: runs one model on one backend.

    Attributes:
        model: Folder of the checkpoint, builtin, or a Hugging Face id (with @REVISION for a branch, tag or commit).
        served_name: Name under which requests ask for the model; its own where absent.
        role: What it is to be given to do; it can do all of it, and takes another role while it runs.
        backend: Name of the backend; auto takes the fastest that can run the model.
        dtype: How weights are held and computed; auto leaves it to the backend.
        threads: Threads of computation; every core of the process where absent.
        kv_cache_gib: Memory of the KV cache, in GiB; what is free once the weights are loaded where absent.
        kv_cache_dtype: Type of the KV cache; int8 halves it or better, auto is the backend's own choice.
        kv_cache_share: Share of the free memory that the KV cache takes where kv_cache_gib is absent.
        weight_cache: Whether weights rounded to int8 or int4, and engines of TensorRT, are kept in the cache folder, for the next
            start to find.
        max_batch_tokens: Tokens that one step computes at most; where absent, what measured step times ask for, at most 2048 or
            twice max_batch_size, whichever is more.
        max_batch_size: Sequences that run at a time at most.
        prefill_chunk: Prompt tokens that one step computes at most while others are being answered; where absent, what measured
            step times ask for, 512 at most.
        itl_target_ms: Milliseconds that the prompt tokens of such a step may take; where absent, five decoding steps of a full
            batch, or more where prefill would lose a fifth of its speed.
        calibration_seconds: Seconds that measuring step times takes at the first start; 0 leaves it out.
        calibration_cache: Whether measured step times are kept in the cache folder, for the next start to find.
        cache_folder: The cache folder; $XDG_CACHE_HOME/penstock or ~/.cache/penstock where absent.
        max_context: Tokens that one sequence holds at most; the model's own limit where absent.
        prefix_cache: Whether requests share the KV cache of equal prefixes.
        probe_seconds: Seconds that a backend has to say what it is.
        load_seconds: Seconds that the backend may take to load the model.
        stall_seconds: A step that takes so much longer than four times what was measured makes the executor NOT_SERVING.
        stall_seconds_per_prompt_token: What each prompt token in a step adds, instead of what was measured; 0.05 where this is
            absent and nothing was measured.
        stall_exit_seconds: An executor that has been stalled for so long ends, so that its supervisor starts another.
        handoff_lease_seconds: A handoff of KV from or to another executor ends when nothing is heard of the other for this long.
        handoff_push_mib: MiB of KV that goes to another executor in one piece at most, unless one block is more.
        handoff_window_mib: MiB of KV that are on their way from one executor to this one at most, unless a block or token is more.
        handoff_transports: How KV may go between this executor and others, of which the cheapest is taken that both prove to share:
            shared_memory on one host, nixl between hosts where its package is installed, and grpc.
        scheduler: HOST:PORT of the scheduler to register with; none where absent.
        listen: HOST:PORT of its gRPC service; port 0 takes a free one.
        advertise: HOST:PORT at which gateways reach it; where absent, where it listens, under this host's name if that is 0.0.0.0.
        metrics: HOST:PORT of a Prometheus endpoint; off where absent.
        otlp_endpoint: URL of an OpenTelemetry collector that speaks OTLP over gRPC.
        log_level: Least level of the log lines that are written.
        log_format: Console or JSON lines; auto is console on a terminal.
        grace_seconds: Seconds that running sequences get when the executor drains.
    """

    model: str = "builtin"
    served_name: str | None = None
    role: Literal["both", "prefill", "decode"] = "both"
    backend: str = "auto"
    dtype: Literal["auto", "f32", "bf16", "int8", "int4"] = "auto"
    threads: int | None = None
    kv_cache_gib: float | None = None
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    kv_cache_share: float = 0.5
    weight_cache: bool = True
    max_batch_tokens: int | None = None
    max_batch_size: int = 64
    prefill_chunk: int | None = None
    itl_target_ms: float | None = None
    calibration_seconds: float = 3
    calibration_cache: bool = True
    cache_folder: str | None = None
    max_context: int | None = None
    prefix_cache: bool = True
    probe_seconds: float = 20
    load_seconds: float = 900
    stall_seconds: float = 2.5
    stall_seconds_per_prompt_token: float | None = None
    stall_exit_seconds: float = 60
    handoff_lease_seconds: float = 3
    handoff_push_mib: float = 16
    handoff_window_mib: float = 48
    handoff_transports: tuple[Literal["shared_memory", "nixl", "grpc"], ...] = ("shared_memory", "grpc")
    scheduler: str | None = None
    listen: str = "127.0.0.1:8013"
    advertise: str | None = None
    metrics: str | None = None
    otlp_endpoint: str | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    grace_seconds: float = 30
