"""From a configuration to an engine with a loaded model: for the service, and for benchmarks in process."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.backends.checkpoint import CheckpointError, read_model
from penstock.backends.contract import Capabilities, DeviceConfig, DType, GenerativeModel, ModelSpec
from penstock.backends.kv_memory import free_memory
from penstock.backends.memory_need import check_memory
from penstock.backends.registry import NoBackend, Selection, select
from penstock.backends.reports import what_was_raised
from penstock.backends.speed import kept_speeds
from penstock.backends.validation import fault_of_model
from penstock.common.cache import found_cache
from penstock.common.checks import check_peer
from penstock.common.service import StartError
from penstock.common.sources import default_name, resolve
from penstock.common.step_times import StepTimes
from penstock.executor.config import ExecutorConfig
from penstock.executor.engine import Engine, EngineConfig, EngineDead
from penstock.executor.passing_thread import on_a_passing_thread
from penstock.executor.sequence import Finish, Frame, SequenceRequest
from penstock.executor.tuning import ModelIdentity, tune

__all__ = ["Loaded", "Prepared", "check", "create", "load", "prepare"]

_WARM_UP_PROMPT = 128
_WARM_UP_TOKENS = 4
# Where the operator gives none, what steps hold before their times are known, and at most after that.
_MOST_TOKENS = 2048
_LARGEST_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model whose headers have been read, and the backend that is to load it. Nothing is held."""

    config: ExecutorConfig
    spec: ModelSpec
    selection: Selection
    device: DeviceConfig


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory and the engine that runs it, not yet started. Closing the engine gives the memory back."""

    folder: Path
    name: str
    backend: str
    backend_version: str
    spec: ModelSpec
    capabilities: Capabilities
    model: GenerativeModel
    engine: Engine
    times: StepTimes | None = None


def load(config: ExecutorConfig) -> Loaded:
    """Load a model and make its engine. Takes as long as the weights take.

    Raises:
        StartError: the settings, the checkpoint or the backend do not allow it.
    """
    return create(prepare(config))


def prepare(config: ExecutorConfig) -> Prepared:
    """Fetch the checkpoint and read its headers, choose a backend, and see that the model fits.

    Raises:
        StartError: the settings, the checkpoint, every backend or the memory does not allow it.
    """
    check(config)
    folder = resolve(config.model)
    name = config.served_name or default_name(config.model)
    dtype, kv_dtype = _asked(config.dtype), _asked(config.kv_cache_dtype)
    try:
        cache = found_cache(config.cache_folder)
        spec = read_model(folder, name, cache=cache)
        speeds = kept_speeds(cache, spec.fingerprint, config.threads)
        selection = select(spec, config.backend, dtype, kv_dtype, speeds=speeds, seconds=config.probe_seconds)
    except (CheckpointError, NoBackend) as error:
        raise StartError(str(error)) from error
    device = _device_config(config, spec, selection)
    if selection.device == "cpu":
        check_memory(
            selection.registration.name, spec.decoder, selection.capabilities, replace(device, dtype=selection.dtype), free_memory()
        )
    return Prepared(config, spec, selection, device)


def create(prepared: Prepared, *, calibrate_anew: bool = False) -> Loaded:
    """Have the chosen backend load the model, make its engine, and run a first sequence, on a thread that ends with it.

    Args:
        prepared: by `prepare`.
        calibrate_anew: whether steps are measured even where their times are kept.

    Raises:
        StartError: the backend can not.
    """
    return on_a_passing_thread(lambda: _create_here(prepared, calibrate_anew=calibrate_anew))


def _create_here(prepared: Prepared, *, calibrate_anew: bool) -> Loaded:
    spec, selection = prepared.spec, prepared.selection
    model = _create(selection, spec, prepared.device)
    try:
        engine_config = _engine_config(prepared.config, spec, selection.capabilities, prepared.device)
        engine = Engine(model, engine_config)
        fastest = _warm_up(engine, engine_config)
        identity = ModelIdentity(spec.fingerprint, selection.registration.name, selection.version)
        times = tune(engine, engine_config, prepared.config, identity, fastest, anew=calibrate_anew)
    except EngineDead as error:
        model.close()
        raise StartError(str(error)) from error
    except BaseException:
        model.close()
        raise
    backend, capabilities = selection.registration.name, selection.capabilities
    return Loaded(spec.folder, spec.name, backend, selection.version, spec, capabilities, model, engine, times)


def _create(selection: Selection, spec: ModelSpec, device: DeviceConfig) -> GenerativeModel:
    """The model, held to what its backend said of it."""
    backend = selection.registration.name
    try:
        model = selection.registration.create(spec, device)
        fault = fault_of_model(model, selection.capabilities)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"{backend} can not load {spec.name}: {what_was_raised(error)}") from error
    if fault:
        model.close()
        raise StartError(f"{backend} made a model that is not what it said: {fault}")
    return model


def _asked(dtype: str) -> DType | None:
    return None if dtype == "auto" else DType(dtype)


def _device_config(config: ExecutorConfig, spec: ModelSpec, selection: Selection) -> DeviceConfig:
    """What is asked of the backend, within its limits."""
    capabilities = selection.capabilities
    longest = (spec.decoder.context_length, config.max_context, capabilities.max_context)
    return DeviceConfig(
        dtype=_asked(config.dtype),
        device=selection.device,
        threads=config.threads,
        kv_cache_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * (1 << 30)),
        kv_cache_share=config.kv_cache_share,
        kv_cache_dtype=_asked(config.kv_cache_dtype),
        max_batch_tokens=_most_tokens(config),
        max_batch_size=min(config.max_batch_size, capabilities.max_batch_size or config.max_batch_size),
        max_context=min(limit for limit in longest if limit is not None),
        weight_cache=found_cache(config.cache_folder) if config.weight_cache else None,
    )


def check(config: ExecutorConfig) -> None:
    """See that settings are possible.

    Raises:
        StartError: one is not; names it.
    """
    least = {
        "threads": (config.threads, 1),
        "max_batch_size": (config.max_batch_size, 1),
        "max_batch_tokens": (config.max_batch_tokens, config.max_batch_size + 1),
        "prefill_chunk": (config.prefill_chunk, 1),
        "max_context": (config.max_context, 2),
        "probe_seconds": (config.probe_seconds, 0.1),
        "load_seconds": (config.load_seconds, 0.1),
        "calibration_seconds": (config.calibration_seconds, 0),
        "itl_target_ms": (config.itl_target_ms, 1),
        "stall_seconds": (config.stall_seconds, 0.1),
        "stall_seconds_per_prompt_token": (config.stall_seconds_per_prompt_token, 0),
        "stall_exit_seconds": (config.stall_exit_seconds, 1),
        "grace_seconds": (config.grace_seconds, 0),
    }
    for name, (value, at_least) in least.items():
        if value is not None and not at_least <= value < math.inf:  # nan is neither
            more = ", one more than max_batch_size, since every running sequence takes one" if name == "max_batch_tokens" else ""
            raise StartError(f"{name}: must be a number of at least {at_least}{more}, not {value}")
    if config.scheduler is not None:
        check_peer("scheduler", config.scheduler)
    if config.kv_cache_gib is not None and not 0 < config.kv_cache_gib < float("inf"):
        raise StartError(f"kv_cache_gib: must be more than 0, not {config.kv_cache_gib}")
    if not 0 < config.kv_cache_share < 1:
        raise StartError(f"kv_cache_share: must be between 0 and 1, not {config.kv_cache_share}")


def _engine_config(config: ExecutorConfig, spec: ModelSpec, capabilities: Capabilities, device: DeviceConfig) -> EngineConfig:
    stall = config.stall_seconds_per_prompt_token
    return EngineConfig(
        vocabulary_size=spec.decoder.vocabulary_size,
        context_length=device.max_context or spec.decoder.context_length,
        max_batch_tokens=device.max_batch_tokens,
        max_batch_size=device.max_batch_size,
        prefill_chunk=min(_LARGEST_CHUNK, device.max_batch_tokens) if config.prefill_chunk is None else config.prefill_chunk,
        prefix_cache=config.prefix_cache and capabilities.prefix_cache,
        chunked_prefill=capabilities.chunked_prefill,
        prompt_logits=capabilities.prompt_logits,
        export_kv=capabilities.export_kv,
        import_kv=capabilities.import_kv,
        stall_seconds=config.stall_seconds,
        **({} if stall is None else {"stall_seconds_per_prompt_token": stall}),
    )


def _most_tokens(config: ExecutorConfig) -> int:
    """What the model has to be able to compute in one step."""
    return max(_MOST_TOKENS, 2 * config.max_batch_size) if config.max_batch_tokens is None else config.max_batch_tokens


def _warm_up(engine: Engine, config: EngineConfig) -> float:
    """Run one sequence, so that the first request finds kernels compiled; then forget it.

    Returns:
        Seconds of its fastest decoding step; infinite where it had room for none.
    """
    frames: list[Frame] = []
    decoding: list[float] = []
    engine.meter.on_step = lambda facts: decoding.append(facts.seconds if facts.decodes else math.inf)
    most = engine.context_length if config.chunked_prefill else min(engine.context_length, config.max_batch_tokens)
    new = max(1, min(_WARM_UP_TOKENS, most - 1))
    prompt = [0] * max(1, min(_WARM_UP_PROMPT, most - new))
    engine.submit(SequenceRequest(sequence_id=0, prompt=prompt, max_tokens=new, salt=os.urandom(16)), frames.append)
    while not engine.idle:
        engine.step()
    last = frames[-1].finished[0]
    if last.reason is not Finish.LENGTH:
        raise StartError(f"the model does not run: {last.message}")
    engine.reset()
    return min(decoding)
