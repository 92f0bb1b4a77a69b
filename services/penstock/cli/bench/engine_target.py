"""The engine in this process, with no service around it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Literal

from penstock.cli.bench.options import DTypeName
from penstock.cli.bench.scenarios import Request
from penstock.cli.bench.target import Description
from penstock.cli.bench.timeline import Timeline
from penstock.cli.interrupts import at_once
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import Finish, Frame, SequenceRequest

__all__ = ["EngineOptions", "EngineTarget"]

_GREEDY = SamplingParameters(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine that is measured is made.

    Attributes:
        backend: What runs the model; `penstock backends` lists them. auto takes the best that is here.
        dtype: Precision of the weights; auto takes what the backend prefers.
        threads: Threads of computation; every core where absent.
        kv_cache_gib: KV cache in GiB; from the memory that is free where absent.
        kv_cache_dtype: Type of the KV cache; int8 halves it or better, auto is the backend's own choice.
        max_batch_tokens: Tokens of one engine step at most; what measured step times ask for where absent.
        max_batch_size: Sequences of one engine step at most.
        prefix_cache: Whether requests share the KV of prefixes that are equal.
    """

    backend: str = "auto"
    dtype: DTypeName = "auto"
    threads: int | None = None
    kv_cache_gib: float | None = None
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    max_batch_tokens: int | None = None
    max_batch_size: int = 64
    prefix_cache: bool = True


class EngineTarget:
    """Loads the model when it is made, and keeps the engine's thread running until it is closed.

    Raises:
        StartError: there is no such model, or the backend does not run it.
    """

    def __init__(self, model: str, options: EngineOptions) -> None:
        with at_once():
            loaded = load(ExecutorConfig(model=model, **asdict(options)))
        self._engine = loaded.engine
        self._engine.start()
        self._ids = itertools.count()
        self.description = Description(
            "penstock", version("penstock"), loaded.model.dtype, loaded.backend, loaded.spec.decoder.vocabulary_size
        )

    def run(self, requests: Sequence[Request], finished: Callable[[], None]) -> list[Timeline]:
        batch = _Batch(len(requests), finished)
        began = time.perf_counter()
        for request, timeline in zip(requests, batch.timelines, strict=True):
            if request.at:
                time.sleep(max(0.0, began + request.at - time.perf_counter()))
            sequence_id = next(self._ids)
            batch.by_id[sequence_id] = timeline
            timeline.sent = time.perf_counter()
            self._engine.submit(
                SequenceRequest(sequence_id=sequence_id, prompt=request.prompt, max_tokens=request.new_tokens, sampling=_GREEDY),
                batch.take,
            )
        batch.done.wait()
        return batch.timelines

    def close(self) -> None:
        self._engine.close()


class _Batch:
    """Requests that run at the same time; `take` is the engine's sink."""

    def __init__(self, count: int, finished: Callable[[], None]) -> None:
        self.timelines = [Timeline() for _ in range(count)]
        self.by_id: dict[int, Timeline] = {}
        self.done = threading.Event()
        self._left = count
        self._finished = finished

    def take(self, frame: Frame) -> None:
        now = time.perf_counter()
        for sequence_id, token in zip(frame.sequence_ids, frame.token_ids, strict=True):
            self.by_id[sequence_id].bear(now, (token,))
        for end in frame.finished:
            timeline = self.by_id[end.sequence_id]
            timeline.ended = now
            if end.reason is not Finish.LENGTH:
                timeline.error = end.message or f"it ended with {end.reason.value}"
            self._left -= 1
            self._finished()
        if not self._left:
            self.done.set()
