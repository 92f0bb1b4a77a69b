"""The way in, for both doors: validate, encode, plan, and hand over to the state machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from penstock.common import faults, tracing
from penstock.common.errors import (
    Cancelled,
    ContextOverflow,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    PenstockError,
    Unavailable,
)
from penstock.gateway import access
from penstock.gateway.bounds import Bounds
from penstock.gateway.catalog import Catalog, Model
from penstock.gateway.machine import Request
from penstock.gateway.output import OutputQueue
from penstock.gateway.planning import plan
from penstock.gateway.ports import Ports
from penstock.gateway.request import Caller, Generation, Plan
from penstock.gateway.tokenization import Tokenization
from penstock.gateway.traces import Trace
from penstock.gateway.validation import RequestLimits, validate

__all__ = ["Admission", "Call"]

# Of models that are not known yet.
_LONGEST_CONTEXT = 1 << 17


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    if task is None:
        raise InternalError("a call is admitted outside of any task")
    return task


class Call:
    """One client's call: its requests and the queue that its door reads. Leaving it, in whatever way, frees all of it."""

    def __init__(self, model: Model, plans: Sequence[Plan], queue: OutputQueue) -> None:
        self.model = model
        self.plans = plans
        self.queue = queue
        self.requests: list[Request] = []
        self.cut: PenstockError | None = None
        self._task: asyncio.Task[Any] = _current_task()

    def uncancel(self) -> None:
        """The cancellation by `cut_off` has been turned into its error."""
        self._task.uncancel()

    def cancel(self, error: PenstockError) -> None:
        """End what still runs, and tell whoever still reads."""
        for request in self.requests:
            request.cancel(error)
        self.queue.fail(error)

    def break_off(self, error: PenstockError) -> None:
        """End each request with what there is of its answer; one that has told nothing fails."""
        for request in self.requests:
            request.break_off(error)

    @property
    def failure(self) -> PenstockError | None:
        """Why a request's answer was broken off, of a call that is complete."""
        return next((r.error for r in self.requests if r.error is not None), None)

    def cut_off(self, error: PenstockError) -> None:
        """The same when the door itself is stuck in a write to a client that reads nothing."""
        self.cancel(error)
        self.cut = error
        self._task.cancel()


class Admission:
    """Admits calls and keeps those that are in work.

    Args:
        ports: to the other services.
        on_done: told of each request that has ended.
        max_live: calls in work at most.
        max_attempts: see `Request`.
        new_request: makes a request; `Request` itself, or one that tells more.
        slow_reader_seconds: a call whose reader leaves output waiting for so long is ended by `sweep`.
    """

    def __init__(
        self,
        catalog: Catalog,
        tokenization: Tokenization,
        ports: Ports,
        limits: RequestLimits,
        *,
        clock: Callable[[], float],
        on_done: Callable[[Request], None],
        max_live: int,
        max_attempts: int,
        slow_reader_seconds: float,
        new_request: Callable[..., Request] = Request,
    ) -> None:
        self.catalog = catalog
        self.tokenization = tokenization
        self.limits = limits
        self.clock = clock
        self.requests: dict[int, Request] = {}
        self._ports = ports
        self._on_done = on_done
        self._max_live = max_live
        self._new_request = new_request
        self._max_attempts = max_attempts
        self._slow_reader_seconds = slow_reader_seconds
        self._calls: set[Call] = set()
        self._coming = 0
        self._draining = False
        self._tokens: dict[str, dict[int, bytes]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """Calls in work, those that are still being read or encoded included."""
        return self._coming

    def refuse_new(self) -> None:
        """Begin to drain."""
        self._draining = True

    async def idle(self) -> None:
        """Return when no call is in work."""
        await self._idle.wait()

    def break_off_all(self, error: PenstockError) -> None:
        """End every call: with what there is of an answer, or with the error."""
        for call in list(self._calls):
            call.break_off(error)

    def cancel_all(self, error: PenstockError) -> None:
        """End what still does not: calls whose clients do not read."""
        for call in list(self._calls):
            call.cut_off(error)

    def sweep(self) -> None:
        """End calls whose reader has left output waiting for too long."""
        now = self.clock()
        for call in list(self._calls):
            since = call.queue.stuck_since
            if since is not None and now - since > self._slow_reader_seconds:
                call.cut_off(Cancelled(f"the client took nothing for {self._slow_reader_seconds:g} seconds"))

    def bounds(self, model: object) -> Bounds:
        """How much a call to this model can hold of what is worth reading at all; where none is called so, to any."""
        contexts = {name: served.context_length for name, served in self.catalog.models().items()}
        longest = max(contexts.values(), default=_LONGEST_CONTEXT)
        context = contexts.get(model, longest) if isinstance(model, str) else longest
        return Bounds(prompts=self.limits.max_prompts, context=context)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a call for as long as the block lasts. A door begins it before it reads what may be large.

        Raises:
            Unavailable: the gateway drains.
            Overloaded: as many calls as are taken are in work.
        """
        if self._draining:
            raise Unavailable("this gateway is draining; connect again", retry_after=1.0)
        if self._coming >= self._max_live:
            raise Overloaded(f"as many requests are in work as this gateway takes, {self._max_live} (max_live_requests)", 1.0)
        self._coming += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._coming -= 1
            if self._coming == 0:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def admit(self, generations: Sequence[Generation], caller: Caller) -> AsyncIterator[Call]:
        """Run one counted call's generations, all of one model and with the same `n`, for as long as the block lasts.

        Raises:
            PenstockError: it can not be admitted.
        """
        with Trace(caller) as trace:
            model = self.catalog.model(generations[0].model)
            self._check(generations, model)
            plans = [await self._plan(g, model, caller) for g in generations]
            queue = OutputQueue(len(plans), self.clock)
            call = Call(model, plans, queue)
            self._calls.add(call)
            timer = asyncio.get_running_loop().call_later(max(0.0, caller.deadline - self.clock()), self._expire, call)
            try:
                for number, planned in enumerate(plans):
                    self._begin(call, number, planned, trace.caller)
                yield call
            except asyncio.CancelledError:
                if call.cut is None:
                    raise
                call.uncancel()
                raise call.cut from None
            finally:
                timer.cancel()
                self._calls.discard(call)
                trace.done(call.requests)
                access.note(model.name, call.requests)
                call.cancel(Cancelled("the client is gone"))

    def _check(self, generations: Sequence[Generation], model: Model) -> None:
        if len(generations) > self.limits.max_prompts:
            raise InvalidRequest.field("prompt", f"at most {self.limits.max_prompts} prompts; these are {len(generations)}")
        for generation in generations:
            validate(generation, model, self.limits)
        asked = sum((g.stopping.max_tokens or 0) * g.n for g in generations)
        if asked > self.limits.max_tokens:
            raise InvalidRequest.field(
                "stopping.max_tokens", f"prompts * n * max_tokens is {asked}; at most {self.limits.max_tokens} here"
            )

    async def _plan(self, generation: Generation, model: Model, caller: Caller) -> Plan:
        try:
            ids, fingerprint = await self.encode(generation, model, caller.deadline, model.context_length - 1)
            echo = await self._echo(generation, model, ids, caller.deadline)
            if self.clock() >= caller.deadline:
                raise DeadlineExceeded("the deadline passed before the request was placed")
            return plan(generation, model, ids, fingerprint, caller.tenant, self.limits, echo=echo)
        except ContextOverflow as error:
            raise error.of_context(model.context_length) from None

    async def encode(self, generation: Generation, model: Model, deadline: float, most: int) -> tuple[Sequence[int], str]:
        """A validated generation's prompt as ids, `most` at most, and the fingerprint of the tokenizer that they are of.

        Raises:
            PenstockError: the tokenizer refuses the prompt or is not there.
        """
        if generation.token_ids is not None:
            return generation.token_ids, model.first.tokenizer_fingerprint
        with tracing.span("encode"):
            return await self.tokenization.encode(model.name, generation, deadline, most)

    async def _echo(self, generation: Generation, model: Model, ids: Sequence[int], deadline: float) -> str | None:
        if not generation.reporting.echo:
            return None
        if generation.text is not None:
            return generation.text
        skip = not generation.reporting.special_tokens
        return await self.tokenization.detokenize(model.name, ids, deadline, skip_special_tokens=skip)

    def _begin(self, call: Call, number: int, planned: Plan, caller: Caller) -> None:
        request = self._new_request(
            planned,
            caller,
            self._ports,
            call.queue.output(number, planned.n),
            known_tokens=self._tokens.setdefault(call.model.first.tokenizer_fingerprint, {}),
            clock=self.clock,
            max_attempts=self._max_attempts,
            on_done=self._done,
        )
        self.requests[request.number] = request
        call.requests.append(request)
        request.begin()
        faults.reach("gateway.accepted")

    def _done(self, request: Request) -> None:
        del self.requests[request.number]
        self._on_done(request)

    def _expire(self, call: Call) -> None:
        for request in list(call.requests):
            request.deadline()
