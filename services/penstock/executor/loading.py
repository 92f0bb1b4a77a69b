"""From a configuration to an engine with a loaded model: for the service, and for benchmarks in process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from penstock.backends.checkpoint import CheckpointError, read_model
from penstock.backends.contract import Capabilities, DeviceConfig, DType, GenerativeModel, ModelSpec
from penstock.backends.registry import NoBackend, select
from penstock.common.service import StartError
from penstock.common.sources import resolve
from penstock.executor.config import ExecutorConfig
from penstock.executor.engine import Engine, EngineConfig
from penstock.executor.sequence import Finish, Frame, SequenceRequest

__all__ = ["Loaded", "load"]

_WARM_UP_PROMPT = 128
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory and the engine that runs it, not yet started. Closing the engine gives the memory back."""

    folder: Path
    name: str
    backend: str
    spec: ModelSpec
    capabilities: Capabilities
    model: GenerativeModel
    engine: Engine


def load(config: ExecutorConfig) -> Loaded:
    """Load a model and make its engine. Takes as long as the weights take.

    Raises:
        StartError: the settings, the checkpoint or the backend do not allow it.
    """
    _check(config)
    folder = resolve(config.model)
    name = config.served_name or (config.model if not Path(config.model).is_dir() else folder.resolve().name)
    dtype = None if config.dtype == "auto" else DType(config.dtype)
    try:
        spec = read_model(folder, name)
        registration, capabilities = select(spec, config.backend, dtype)
    except (CheckpointError, NoBackend) as error:
        raise StartError(str(error)) from error
    context = min(spec.decoder.context_length, config.max_context or spec.decoder.context_length)
    device = DeviceConfig(
        dtype=dtype,
        threads=config.threads,
        kv_cache_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * (1 << 30)),
        kv_cache_share=config.kv_cache_share,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_size=config.max_batch_size,
        max_context=context,
    )
    try:
        model = registration.create(spec, device)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"{registration.name} can not load {name}: {type(error).__name__}: {error}") from error
    try:
        engine = Engine(model, _engine_config(config, spec, capabilities, context))
        _warm_up(engine)
    except BaseException:
        model.close()
        raise
    return Loaded(folder, name, registration.name, spec, capabilities, model, engine)


def _check(config: ExecutorConfig) -> None:
    least = {
        "threads": (config.threads, 1),
        "max_batch_size": (config.max_batch_size, 1),
        "max_batch_tokens": (config.max_batch_tokens, config.max_batch_size + 1),
        "prefill_chunk": (config.prefill_chunk, 1),
        "max_context": (config.max_context, 2),
    }
    for name, (value, at_least) in least.items():
        if value is not None and value < at_least:
            more = ", one more than max_batch_size, since every running sequence takes one" if name == "max_batch_tokens" else ""
            raise StartError(f"{name}: must be at least {at_least}{more}, not {value}")
    if config.kv_cache_gib is not None and not 0 < config.kv_cache_gib < float("inf"):
        raise StartError(f"kv_cache_gib: must be more than 0, not {config.kv_cache_gib}")
    if not 0 < config.kv_cache_share < 1:
        raise StartError(f"kv_cache_share: must be between 0 and 1, not {config.kv_cache_share}")


def _engine_config(config: ExecutorConfig, spec: ModelSpec, capabilities: Capabilities, context: int) -> EngineConfig:
    return EngineConfig(
        vocabulary_size=spec.decoder.vocabulary_size,
        context_length=context,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_size=config.max_batch_size,
        prefill_chunk=config.prefill_chunk,
        prefix_cache=config.prefix_cache and capabilities.prefix_cache,
        chunked_prefill=capabilities.chunked_prefill,
        prompt_logits=capabilities.prompt_logits,
        stall_seconds=config.stall_seconds,
        stall_seconds_per_prompt_token=config.stall_seconds_per_prompt_token,
    )


def _warm_up(engine: Engine) -> None:
    """Run one sequence, so that the first request finds kernels compiled and speeds measured; then forget it."""
    frames: list[Frame] = []
    length = max(1, min(_WARM_UP_PROMPT, engine.context_length - _WARM_UP_TOKENS))
    engine.submit(
        SequenceRequest(sequence_id=0, prompt=[0] * length, max_tokens=_WARM_UP_TOKENS, salt=os.urandom(16)), frames.append
    )
    while not engine.idle:
        engine.step()
    last = frames[-1].finished[0]
    if last.reason is not Finish.LENGTH:
        raise StartError(f"the model does not run: {last.message}")
    engine.forget()
