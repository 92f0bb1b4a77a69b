"""A loaded model's step times, from disk or measured now, and the steps that its engine makes by them."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import NamedTuple

from penstock.backends.contract import GenerativeModel
from penstock.common.cache import found_cache
from penstock.common.calibrations import Calibrations, Key
from penstock.common.logs import logger
from penstock.common.machine import machine, usable_cores
from penstock.common.step_times import StepTimes
from penstock.executor.calibration import Shape, measure
from penstock.executor.config import ExecutorConfig
from penstock.executor.engine import Engine, EngineConfig
from penstock.executor.token_budget import TokenBudget, fit

__all__ = ["ModelIdentity", "tune"]

# A kept measurement that is slower than this many times what the model does now was disturbed when it was made.
_DISTURBED = 1.5


class ModelIdentity(NamedTuple):
    """The checkpoint's fingerprint, and what runs it."""

    model: str
    backend: str
    backend_version: str


def tune(
    engine: Engine,
    engine_config: EngineConfig,
    config: ExecutorConfig,
    identity: ModelIdentity,
    fastest_decode: float,
    *,
    anew: bool = False,
) -> StepTimes | None:
    """Let an engine that has not started make the steps that its model is good at; tell how long these take.

    Args:
        engine: of the loaded model. Nothing may stand in its prefix cache.
        engine_config: what it was made with.
        config: the operator's settings; what these say of steps stays.
        identity: of what runs.
        fastest_decode: seconds of one decoding step of a single sequence, lately.
        anew: measure, whatever is kept.

    Returns:
        None where the operator wants no measurement, or the model raises in one.
    """
    if not config.calibration_seconds:
        return None
    store = _store(config)
    key = _key(engine.model, config, identity)
    times = None if store is None or anew else _kept(store, key, fastest_decode)
    if times is None:
        times = _measured(engine, engine_config, config.calibration_seconds)
        if times is not None and store is not None:
            store.write(key, times)
    if times is not None and config.stall_seconds_per_prompt_token is None:
        engine.expect(times)
    if times is not None and engine_config.chunked_prefill:
        _limit(engine, engine_config, config, times)
    return times


def _store(config: ExecutorConfig) -> Calibrations | None:
    folder = found_cache(config.cache_folder) if config.calibration_cache else None
    return None if folder is None else Calibrations(folder)


def _key(model: GenerativeModel, config: ExecutorConfig, identity: ModelIdentity) -> Key:
    return Key(
        model=identity.model,
        backend=identity.backend,
        backend_version=identity.backend_version,
        penstock=version("penstock"),
        dtype=model.dtype.value,
        kv=f"{model.kv.layout}/{model.kv.dtype}",
        device=model.device,
        threads=config.threads or usable_cores(),
        machine=machine(),
    )


def _kept(store: Calibrations, key: Key, fastest_decode: float) -> StepTimes | None:
    times = store.read(key)
    if times is not None and times.step_seconds(1, 1) > _DISTURBED * fastest_decode:
        logger().info("calibration made anew: the kept one was disturbed", file=str(store.path(key)))
        return None
    return times


def _measured(engine: Engine, config: EngineConfig, budget: float) -> StepTimes | None:
    shape = Shape(
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        context_length=engine.context_length,
        chunked=config.chunked_prefill,
        imports=config.import_kv,
    )
    began = time.monotonic()
    try:
        times = measure(engine.model, shape, budget)
    except Exception as error:  # noqa: BLE001 - the contract lets a backend raise anything; requests that need no such step are served
        logger().warning("calibration failed", error=f"{type(error).__name__}: {error}")
        return None
    logger().info(
        "calibrated",
        seconds=round(time.monotonic() - began, 3),
        prefill_tokens_per_second=round(times.prefill_tokens_per_second),
        decode_step_ms=round(1000 * times.decode.seconds[0], 3),
    )
    return times


def _limit(engine: Engine, given: EngineConfig, config: ExecutorConfig, times: StepTimes) -> None:
    target = None if config.itl_target_ms is None else config.itl_target_ms / 1000
    budget = fit(times, TokenBudget(given.prefill_chunk, given.max_batch_tokens), given.max_batch_size, target)
    if target is not None and times.chunk_seconds(budget.prefill_chunk) > target:
        logger().warning(
            "itl_target_ms is less than the smallest step with prompt tokens takes",
            itl_target_ms=config.itl_target_ms,
            step_ms=round(1000 * times.chunk_seconds(budget.prefill_chunk), 3),
        )
    engine.limit(
        budget.max_batch_tokens if config.max_batch_tokens is None else given.max_batch_tokens,
        budget.prefill_chunk if config.prefill_chunk is None else given.prefill_chunk,
    )
