"""The engine: continuous batching over one model, in a thread of its own.

In process, without any service::

    engine = Engine(model, EngineConfig(vocabulary_size=32_000, context_length=4096))
    engine.start()
    engine.submit(SequenceRequest(sequence_id=1, prompt=[1, 2, 3], max_tokens=16), on_frame)
    ...
    engine.close()

`on_frame` is a sink: it is called once for each step that gave its sequences something, with one `Frame` of plain columns, from
the engine's thread (and from the caller's, inside `submit`, for what is refused). It must be quick and must not raise. A sequence
is told finished exactly once, unless it was aborted. Sinks stand for gateways: `abort_all(sink)` ends all that one has started.

`Engine.step` is the whole of it: plan, build the batch, compute, sample, publish. Commands reach the engine between steps, and
there KV of sequences that are handed over is copied in and out (`KvMoves`); `executor/handoff/ports.py` tells how.
What can be done beside a running step is done in other threads, since a backend releases the interpreter's lock: a sequence's
hashes are computed by who submits it, and frames become messages in the sink's event loop.

A backend that raises costs the batch's sequences; one that raises twice in a row, or has lost its model, is taken for broken, and
the engine is dead.
`progress` tells a watchdog whether the engine moves: a step may take `stall_seconds`, and beyond these four times what was measured
of such steps, or, where nothing was, `stall_seconds_per_prompt_token` for each prompt token in it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from penstock.backends.contract import GenerativeModel, ModelLost
from penstock.backends.kv_abilities import prefix_copies
from penstock.common.logs import logger
from penstock.common.step_times import StepTimes
from penstock.executor.acceptance import fault_of, refusal_of
from penstock.executor.batch import Built, PromptRows, build
from penstock.executor.blocks import BlockManager
from penstock.executor.engine_config import EngineConfig
from penstock.executor.frames import Frames
from penstock.executor.handoff.ports import Exported, Handle, HandoffEvents, Imported, SequenceEnded, always
from penstock.executor.handoff.ticket import Arrival, HandoffFailure
from penstock.executor.kv_moves import KvMoves
from penstock.executor.meter import Meter, StepFacts
from penstock.executor.sampling import NotFinite, Row, Sampled, Sampler
from penstock.executor.sequence import Finish, Finished, Frame, Sequence, SequenceRequest, Sink, Status
from penstock.executor.step_logits import StepLogits, compute
from penstock.executor.step_planner import BatchLimits, PlannerCounts, Step, StepPlanner

__all__ = ["Engine", "EngineConfig", "EngineDead"]

_JOIN_SECONDS = 10.0
# Copies of KV between two steps: while others compute, a share of what the last step took and at least so long; else longer.
_MOVE_SHARE, _LEAST_MOVE_SECONDS, _MOVE_SECONDS = 0.1, 0.005, 0.1
# Within that, how long the next copy is waited for before the next step begins.
_PATIENCE = 0.02
# A step that takes so many times what was measured hangs: other work on the machine may double it, or more.
_STALLED = 4.0
# Bytes of a prefix: a copy that is slower hangs.
_LEAST_COPIED_PER_SECOND = 1e8
# A wait for a deadline is cut into such pieces: a thread can not wait for as long as a deadline may be away.
_LONGEST_WAIT = 3600.0


class EngineDead(RuntimeError):
    """The engine can not go on; the text says why."""


def _ignore(_: str) -> None:
    pass


class Engine:
    """Runs sequences on a model, and is a `KvEngine`. Its methods may be called from any thread, but for `step`.

    Attributes:
        handoff: hears of sequences that are handed over; without it none is taken. Set only before `start`.
    """

    def __init__(
        self,
        model: GenerativeModel,
        config: EngineConfig,
        *,
        on_death: Callable[[str], None] = _ignore,
        handoff: HandoffEvents | None = None,
    ) -> None:
        self.model = model
        self.block_size = model.kv.block_size
        self.context_length = min(config.context_length, model.kv.blocks * model.kv.block_size)
        copier = self._copier(model) if config.prefix_cache else None
        self.blocks = BlockManager(model.kv.blocks, caching=config.prefix_cache, copying=copier is not None)
        self.meter = Meter()
        self.failure: str | None = None
        self._config = config
        self.on_death = on_death
        self.handoff = handoff
        limits = BatchLimits(
            max_batch_tokens=config.max_batch_tokens,
            max_batch_size=config.max_batch_size,
            prefill_chunk=config.prefill_chunk,
            chunked=config.chunked_prefill,
            caching=config.prefix_cache,
        )
        self.planner = StepPlanner(self.blocks, self.block_size, limits, copier)
        self._sampler = Sampler(config.vocabulary_size)
        self._moves = KvMoves(model)
        self._sequences: dict[Sink, dict[int, Sequence]] = {}
        self._frames = Frames()
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._over = False
        self._draining = False
        self._stepped = False
        self._step_seconds = 0.0
        self._raised_before = False
        self._times: StepTimes | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread.

    def start(self) -> None:
        """Begin to run what is submitted."""
        self._thread.start()

    def submit(self, request: SequenceRequest, sink: Sink) -> None:
        """Run a sequence and tell `sink` what comes of it, a refusal included."""
        fault, refusal = fault_of(request, self._config.vocabulary_size), self._refusal(request)
        if not (fault or refusal):
            sequence = Sequence(request, sink, self.block_size, self._config.vocabulary_size, time.monotonic())
            if self._begin(sequence):
                return
            refusal = self._refusal(request)
        sink(Frame(finished=[Finished(request.sequence_id, Finish.FAILED if fault else Finish.REFUSED, message=fault or refusal)]))

    def abort(self, sequence_ids: Iterable[int], sink: Sink) -> None:
        """End sequences within a step; nothing more is told of them. Unknown ones are ignored: they may just have ended."""
        ids = list(sequence_ids)
        self._command(lambda: self._abort(ids, sink))

    def abort_all(self, sink: Sink) -> None:
        """End all that was submitted with this sink."""
        self._command(lambda: self._abort(list(self._sequences.get(sink, ())), sink))

    def export_kv(
        self, handle: Handle, tokens: range, *, native: bool, done: Exported, wanted: Callable[[], bool] = always
    ) -> None:
        """Copy KV out of a sequence's blocks, as `KvEngine` says. What can not be done is an exception that `done` gets."""
        sequence = _sequence(handle)
        if not self._command(lambda: self._moves.ask_export(sequence, tokens, done, wanted, native=native)):
            done(SequenceEnded("the engine has ended"))

    def import_kv(self, handle: Handle, tokens: range, data: NDArray[Any], *, native: bool, done: Imported) -> None:
        """Copy KV into the blocks that were reserved for a sequence; the same."""
        sequence = _sequence(handle)

        def ask() -> None:
            sequence.arriving = True
            self._moves.ask_import(sequence, tokens, data, done, native=native)

        if not self._command(ask):
            done(SequenceEnded("the engine has ended"))

    def begin_decode(self, handle: Handle, first_token: int, arrival: Arrival) -> None:
        """Decode a sequence whose KV is here. Nothing is told to `handoff` of it any more, unless it has ended before."""
        sequence = _sequence(handle)
        self._command(lambda: self._go_on(sequence, first_token, arrival))

    def handed_off(self, handle: Handle) -> None:
        """End a sequence that is decoded elsewhere from now on."""
        sequence = _sequence(handle)
        self._command(lambda: self._end_handoff(sequence, Finish.HANDED_OFF))

    def leave(self, handle: Handle) -> None:
        """End a sequence that has ended where it was prefilled."""
        sequence = _sequence(handle)
        self._command(lambda: self._leave(sequence))

    def fail(self, handle: Handle, failure: HandoffFailure, message: str) -> None:
        """End a sequence whose KV could not be handed over."""
        sequence = _sequence(handle)
        self._command(lambda: self._end_handoff(sequence, Finish.HANDOFF_FAILED, message, failure))

    def reset(self) -> None:
        """Forget cached prefixes, counts and speeds. Only before `start`."""
        self.blocks.clear()
        self.planner.counts = PlannerCounts()
        self.meter = Meter()

    def limit(self, max_batch_tokens: int, prefill_chunk: int) -> None:
        """Let steps hold other numbers of tokens, as `EngineConfig` names them. Only before `start`."""
        config = self._config = replace(self._config, max_batch_tokens=max_batch_tokens, prefill_chunk=prefill_chunk)
        limits = self.planner.limits
        self.planner.limits = replace(limits, max_batch_tokens=config.max_batch_tokens, prefill_chunk=config.prefill_chunk)

    def expect(self, times: StepTimes) -> None:
        """Judge by measured times whether a step is stalled. Only before `start`."""
        self._times = times

    def drain(self) -> None:
        """Refuse whatever comes from now on. What runs or waits goes on."""
        self._draining = True

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits, or is on its way in or out."""
        return self.planner.empty and not (self._commands or self._moves or self._frames)

    def wait_until_idle(self) -> None:
        """Block the calling thread until the engine is idle, dead or closed."""
        with self._wake:
            self._wake.wait_for(lambda: self.idle or self._stopping or self.failure is not None)

    def progress(self, now: float) -> bool:
        """Whether the engine lives and its step, if one is running, has taken no longer than it may. `now` by `time.monotonic`."""
        return self.failure is None and now <= self.meter.step_due

    def close(self) -> None:
        """Stop after the running step, drop what is left, and close the model. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._drop_all()
            self.model.close()

    def _refusal(self, request: SequenceRequest) -> str:
        """Why a request can not run here, though it may elsewhere."""
        if self.failure is not None:
            return f"the engine has failed: {self.failure}"
        if self._draining or self._stopping:
            return "the executor is draining"
        return refusal_of(request, self._config, self.context_length, hands_over=self.handoff is not None)

    def _begin(self, sequence: Sequence) -> bool:
        """Let the sequence come between two steps, but tell of it at once: a long step may take longer than the other side waits.

        Both under one lock: who is told may give the sequence up from another thread, and that has to come behind its beginning.
        """
        with self._wake:
            if self._over:
                return False
            if sequence.sends and self.handoff is not None:
                sequence.handing = True
                self.handoff.begun(sequence)
            return self._command(lambda: self._add(sequence))

    def _command(self, command: Callable[[], None]) -> bool:
        """Have something done between two steps; False where no more steps come."""
        with self._wake:
            if not self._over:
                self._commands.append(command)
                self._wake.notify_all()
            return not self._over

    # In the engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
            self._drop_all()
        except EngineDead as error:
            self._die(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing can be computed any more, and who waits must hear of it
            self._die(f"{type(error).__name__}: {error}")

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False once the engine is to stop.

        Where the last step computed nothing, what is here waits for others: for a command, or its deadline.
        """
        with self._wake:
            if self.idle:
                self._wake.notify_all()  # for `wait_until_idle`
            if not self._stepped or self.idle:
                left = self.planner.next_deadline - time.monotonic()
                self._wake.wait_for(lambda: self._stopping or self._commands or self._moves, max(0.0, min(left, _LONGEST_WAIT)))
            return not self._stopping

    def step(self) -> None:
        """One step of all that runs. The engine's thread calls it; a test that starts none may."""
        self.meter.begin(time.monotonic() + self._config.stall_seconds)
        try:
            self._obey()
            self._expire()
            self._move_kv()
            step = self.planner.plan()
            self._stepped = bool(step.sequences)
            if step.reserved:
                self._tell_reserved(step.reserved)
            if step.sequences:
                self._run_step(step)
            self._frames.publish()
        finally:
            self.meter.end()

    def _run_step(self, step: Step) -> None:
        built = build(step, self.block_size)
        rows = [s.next_row() for s in built.drawing]
        logits = self._compute(step, built, rows)
        if logits is None:
            return
        self.planner.advance(step)
        self._tell_computed(step)
        self._tell_prompts(built.prompts, logits)
        self._deliver(built.drawing, logits.sample(self._sampler, built.drawing_rows, rows))

    def _obey(self) -> None:
        while self._commands:
            self._commands[0]()
            self._commands.popleft()  # not before it is done: `idle` is read by other threads

    def _move_kv(self) -> None:
        """Copy KV in and out.

        A sequence that is computed and has only to leave is answered at once: what is asked for when its last copy has gone would
        else wait for a whole step of others.
        """
        began, share = time.monotonic(), _MOVE_SHARE * self._step_seconds
        computing = self.planner.running or self.planner.waiting
        self._make_moves(began + (max(_LEAST_MOVE_SECONDS, share) if computing else _MOVE_SECONDS))
        while computing and self.planner.sending and self._is_asked(began + share):
            self._obey()
            self._make_moves(began + share)

    def _make_moves(self, until: float) -> None:
        try:
            self._moves.make(until, lambda: self.meter.begin(time.monotonic() + self._config.stall_seconds))
        except ModelLost as error:
            raise EngineDead(str(error)) from error

    def _is_asked(self, until: float) -> bool:
        """Wait a little for another command."""
        left = until - time.monotonic()
        with self._wake:
            return left > 0 and self._wake.wait_for(lambda: bool(self._commands), min(left, _PATIENCE))

    def _copier(self, model: GenerativeModel) -> Callable[[list[int], list[int]], int] | None:
        """How a model copies prefixes; None where sequences share them.

        Raises:
            TypeError: its cache says that they are copied, and the model can not.
        """
        copies = prefix_copies(model)
        if copies is None:
            return None

        def copy(source: list[int], target: list[int]) -> int:
            seconds = len(source) * model.kv.bytes_per_block / _LEAST_COPIED_PER_SECOND
            self.meter.begin(time.monotonic() + self._config.stall_seconds + seconds)
            try:
                return copies.copy_prefix(source, target)
            except ModelLost as error:
                raise EngineDead(str(error)) from error
            except Exception as error:  # noqa: BLE001 - the contract lets a backend raise anything; the prefix is computed instead
                logger().warning("prefix not copied", error=f"{type(error).__name__}: {error}")
                return 0

        return copy

    def _expire(self) -> None:
        for sequence in self.planner.expired(time.monotonic()):
            self._finish(sequence, Finish.DEADLINE)

    def _add(self, sequence: Sequence) -> None:
        mine = self._sequences.setdefault(sequence.sink, {})
        if sequence.request.sequence_id in mine:
            self._frames.finished(sequence, Finish.REFUSED, "its sequence_id is in use", None)
            self._tell_ended(sequence)
            return
        mine[sequence.request.sequence_id] = sequence
        self.planner.add(sequence)

    def _tell_ended(self, sequence: Sequence) -> None:
        if sequence.handing and self.handoff is not None:
            sequence.handing = False
            self.handoff.ended(sequence)

    def _abort(self, sequence_ids: list[int], sink: Sink) -> None:
        mine = self._sequences.get(sink, {})
        for sequence_id in sequence_ids:
            if sequence_id in mine:
                self._remove(mine[sequence_id])

    def _compute(self, step: Step, built: Built, rows: list[Row]) -> StepLogits | None:
        """The step's logits; None where the backend failed, and the step's sequences with it."""
        began = time.monotonic()
        decodes = step.counts.count(1)
        prompt_tokens = int(built.batch.starts[-1]) - decodes
        # Not of one whose first token came from elsewhere: it has made no step here.
        next_tokens = sum(
            count == 1 and s.first_token_at > 0 and s.first_step_at > 0
            for s, count in zip(step.sequences, step.counts, strict=True)
        )
        for sequence in step.sequences:
            if not sequence.first_step_at:
                sequence.first_step_at = began
        self.meter.begin(began + self._patience(built, prompt_tokens, decodes))
        try:
            logits = compute(self.model, built, rows)
        except ModelLost as error:
            raise EngineDead(str(error)) from error
        except Exception as error:  # noqa: BLE001 - the contract lets a backend raise anything
            self._fail(step, f"{type(error).__name__}: {error}")
            return None
        finally:
            self._step_seconds = time.monotonic() - began
            self.meter.computed(StepFacts(self._step_seconds, decodes, prompt_tokens, next_tokens))
        self._raised_before = False
        return logits

    def _patience(self, built: Built, prompt_tokens: int, decodes: int) -> float:
        """Seconds after which a step is taken for stalled."""
        config = self._config
        if self._times is None:
            return config.stall_seconds + prompt_tokens * config.stall_seconds_per_prompt_token
        return config.stall_seconds + _STALLED * self._times.most_seconds(
            prompt_tokens, decodes, int(built.batch.past_lengths.max())
        )

    def _fail(self, step: Step, reason: str) -> None:
        for sequence in step.sequences:
            self._finish(sequence, Finish.FAILED, f"the backend failed: {reason}")
        if self._raised_before:
            self._frames.publish()
            raise EngineDead(f"the backend failed twice in a row, at last with {reason}")
        self._raised_before = True

    def _tell_reserved(self, reserved: list[Sequence]) -> None:
        """Blocks wait for KV. Told at once: elsewhere prefill begins with it."""
        for sequence in reserved:
            if self.handoff is not None:
                sequence.handing = True
                ticket = self.handoff.reserved(sequence, sequence.computed, len(sequence.ids))
                self._frames.of(sequence).reserved.append((sequence.request.sequence_id, ticket))
        self._frames.publish()

    def _tell_computed(self, step: Step) -> None:
        for sequence in step.sequences:
            if sequence.sends and self.handoff is not None:
                self.handoff.computed(sequence, sequence.computed)

    def _go_on(self, sequence: Sequence, first_token: int, arrival: Arrival) -> None:
        """Let a sequence decode behind KV that has come and a token that was told elsewhere."""
        if not (sequence.handing and sequence.status is Status.RECEIVING):
            return
        if not 0 <= first_token < self._config.vocabulary_size:
            message = f"the first token is {first_token}, of a vocabulary of {self._config.vocabulary_size}"
            self._end_handoff(sequence, Finish.HANDOFF_FAILED, message, HandoffFailure.REFUSED)
            return
        sequence.handing = False
        self.planner.go_on(sequence)
        sequence.first_token_at = time.monotonic()
        self._frames.of(sequence).arrived.append((sequence.request.sequence_id, arrival))
        finish = sequence.append(first_token, self.block_size)
        if finish is not None:
            self._finish(sequence, finish)

    def _end_handoff(self, sequence: Sequence, reason: Finish, message: str = "", failure: HandoffFailure | None = None) -> None:
        if sequence.handing:
            sequence.handing = False
            self._finish(sequence, reason, message, failure)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.handing:
            sequence.handing = False
            self._remove(sequence)

    def _tell_prompts(self, prompts: list[PromptRows], logits: StepLogits) -> None:
        for rows in prompts:
            told, count = rows.sequence.prompt_logprobs, rows.sequence.request.prompt_logprobs
            if told is not None and count is not None:
                try:
                    for i in range(rows.count):
                        told.append(self._sampler.logprob(logits.row(rows.first + i), rows.sequence.ids[rows.place + i + 1], count))
                except NotFinite as error:
                    self._finish(rows.sequence, Finish.FAILED, str(error))

    def _deliver(self, sequences: list[Sequence], sampled: list[Sampled]) -> None:
        """Add the drawn tokens to their sequences and to the frames."""
        now = time.monotonic()
        self.meter.generated += len(sequences)
        for sequence, drawn in zip(sequences, sampled, strict=True):
            if sequence.status is Status.DONE:  # its prompt's log-probabilities could not be told
                continue
            if drawn.error is not None:
                self._finish(sequence, Finish.FAILED, str(drawn.error))
                continue
            if not sequence.first_token_at:
                sequence.first_token_at = now
                self.meter.prompted += sequence.prompt_length
                self._frames.started(sequence)
            self._frames.token(sequence, drawn)
            finish = sequence.append(drawn.token, self.block_size)
            if finish is not None:
                self._finish(sequence, finish)
            elif sequence.sends and self.handoff is not None:
                self.planner.set_aside(sequence)
                self.handoff.drawn(sequence, drawn.token)

    def _finish(self, sequence: Sequence, reason: Finish, message: str = "", failure: HandoffFailure | None = None) -> None:
        self._frames.finished(sequence, reason, message, failure)
        self.meter.finished[reason] += 1
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self.planner.remove(sequence)
        mine = self._sequences[sequence.sink]
        del mine[sequence.request.sequence_id]
        if not mine:
            del self._sequences[sequence.sink]
        self._tell_ended(sequence)

    def _die(self, reason: str) -> None:
        """Tell everyone that nothing more comes."""
        self.failure = reason
        self._end_commands()
        for mine in list(self._sequences.values()):
            for sequence in list(mine.values()):
                self._finish(sequence, Finish.FAILED, f"the engine has failed: {reason}")
        self._moves.give_up()
        self._frames.publish()
        with self._wake:
            self._wake.notify_all()
        self.on_death(reason)

    def _drop_all(self) -> None:
        """The engine stops: forget what is left of it. Idempotent."""
        self._end_commands()
        for mine in list(self._sequences.values()):
            for sequence in list(mine.values()):
                self._remove(sequence)
        self._moves.give_up()

    def _end_commands(self) -> None:
        """Obey for the last time."""
        with self._wake:
            self._over = True
        self._obey()


def _sequence(handle: Handle) -> Sequence:
    """The engine's own sequence, of which the handoff knows the handle alone."""
    if not isinstance(handle, Sequence):
        raise TypeError(f"{handle!r} is no sequence of an engine")
    return handle
