"""The models that live executors serve, as the scheduler last told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.common.errors import InvalidRequest, PenstockError, Unavailable, UnknownModel

__all__ = ["Catalog", "Executor", "GenerationDefaults", "Model"]

# When to ask again for what may be served soon.
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """A checkpoint's own sampling defaults; None where it has none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """One live executor."""

    executor_id: str
    address: str
    model: str
    model_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    architecture: str = ""
    backend: str = ""
    device: str = ""
    dtype: str = ""
    backend_version: str = ""
    features: Sequence[str] = ()
    kv_layout: str = ""
    kv_dtype: str = ""
    context_length: int
    vocabulary_size: int
    kv_block_size: int
    kv_blocks: int = 0
    fields: frozenset[str] = frozenset()
    eos_token_ids: Sequence[int] = ()
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model. Where its executors differ, limits are the largest: the scheduler knows which one can hold a request."""

    name: str
    executors: Sequence[Executor]
    created: int

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may hold together."""
        return max(e.context_length for e in self.executors)

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return max(e.vocabulary_size for e in self.executors)

    @property
    def fields(self) -> frozenset[str]:
        """Public fields that at least one executor supports."""
        return frozenset[str]().union(*(e.fields for e in self.executors))

    @property
    def first(self) -> Executor:
        """One executor, for what all of a model's executors agree on."""
        return self.executors[0]


class Catalog:
    """All served models. A model stays known for a while when its last executor is gone, so that a restart refuses nobody.

    Args:
        memory_seconds: how long.
        clock: tells monotonic seconds.
    """

    def __init__(self, memory_seconds: float = 300.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory_seconds
        self._clock = clock
        self._models: dict[str, Model] = {}
        self._gone: dict[str, float] = {}  # since when, in the order of going
        self._executors: dict[str, Executor] = {}
        self._more = True

    def more(self) -> None:
        """The scheduler is gone: models may be served of which nothing is heard."""
        self._more = True

    def update(self, executors: Iterable[Executor], *, more: bool = False) -> None:
        """Take over what the scheduler tells lives now; `more`: others may, that have not registered yet since its start."""
        self._more = more
        by_model: dict[str, list[Executor]] = {}
        for executor in executors:
            by_model.setdefault(executor.model, []).append(executor)
            self._executors[executor.executor_id] = executor
        for name, group in by_model.items():
            known = self._models.get(name)
            created = known.created if known else int(time.time())
            self._models[name] = Model(name=name, executors=tuple(group), created=created)
        self._gone = {name: since for name, since in self._gone.items() if name not in by_model}
        for name in self._models.keys() - by_model.keys() - self._gone.keys():
            self._gone[name] = self._clock()
        self._forget()
        named = {e.executor_id for m in self._models.values() for e in m.executors}
        # Placements tell the backends of lost executors too; a bound keeps a crash loop from growing this.
        for executor_id in [i for i in self._executors if i not in named][: max(0, len(self._executors) - len(named) - 64)]:
            del self._executors[executor_id]

    def models(self) -> Mapping[str, Model]:
        """Those with a live executor."""
        return {name: model for name, model in self._models.items() if name not in self._gone}

    def executor(self, executor_id: str) -> Executor | None:
        """A live or recently lost executor."""
        return self._executors.get(executor_id)

    def model(self, name: str, field: str = "model") -> Model:
        """The model a client means; no name means the one model, where only one is served. An error calls the name `field`.

        Raises:
            Unavailable: nothing is served, or there may be one of this name.
            InvalidRequest: no name, and several models.
            UnknownModel: there is none of this name.
        """
        self._forget()
        if not self._models and not name:
            raise Unavailable("no model is served: no executor is registered", _RETRY_SECONDS)
        if not name:
            served = self.models() or self._models
            if len(served) > 1:
                raise InvalidRequest.field(field, f"name one of {', '.join(sorted(served))}")
            return next(iter(served.values()))
        found = self._models.get(name)
        if found is None:
            raise self._absent(name)
        return found

    def live(self, name: str) -> Model:
        """The model of this name, with its live executors.

        Raises:
            Unavailable: it has none now, or there may be one of this name.
            UnknownModel: there is none of this name.
        """
        self._forget()
        found = self.models().get(name)
        if found is None:
            raise self._absent(name)
        return found

    def _absent(self, name: str) -> PenstockError:
        if self._more or name in self._models:
            return Unavailable(f"no executor of model {name[:200]!r} is registered now", _RETRY_SECONDS)
        served = ", ".join(sorted(self.models()))
        return UnknownModel(f"model {name[:200]!r} is not served here" + (f"; there is {served}" if served else ""))

    def _forget(self) -> None:
        """Let go of the models that are gone for longer than they are remembered."""
        end = self._clock() - self._memory
        for name in [name for name, since in self._gone.items() if since < end]:
            del self._gone[name], self._models[name]
