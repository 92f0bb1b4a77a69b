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
there KV of sequences that are handed over is copied in and out (`EngineHandoff`); `executor/handoff/ports.py` tells how.
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
from collections.abc import Callable, Iterable
from dataclasses import replace

from penstock.backends.contract import GenerativeModel
from penstock.backends.reports import what_was_raised
from penstock.common.step_times import StepTimes
from penstock.executor.acceptance import fault_of, refusal_of
from penstock.executor.batch import PromptRows, build
from penstock.executor.blocks import BlockManager
from penstock.executor.commands import Commands
from penstock.executor.engine_config import EngineConfig
from penstock.executor.engine_handoff import EngineHandoff
from penstock.executor.frames import Frames
from penstock.executor.live_sequences import LiveSequences
from penstock.executor.meter import Meter
from penstock.executor.model_runner import EngineDead, ModelRunner, StepFailed
from penstock.executor.sampling import NotFinite, Sampled, Sampler
from penstock.executor.sequence import Finish, Finished, Frame, Sequence, SequenceRequest, Sink, Status
from penstock.executor.step_logits import StepLogits
from penstock.executor.step_planner import BatchLimits, PlannerCounts, Step, StepPlanner

__all__ = ["Engine", "EngineConfig", "EngineDead"]

_JOIN_SECONDS = 10.0
# A wait for a deadline is cut into such pieces: a thread can not wait for as long as a deadline may be away.
_LONGEST_WAIT = 3600.0


def _ignore(_: str) -> None:
    pass


class Engine:
    """Runs sequences on a model. Its methods may be called from any thread, but for `step`.

    Attributes:
        handoff: of sequences whose KV comes from another executor, or goes to one.
        failure: why it is dead; None while it lives.
        on_death: told of that in the engine's thread. Set only before `start`.
    """

    def __init__(self, model: GenerativeModel, config: EngineConfig) -> None:
        self.model = model
        self.block_size = model.kv.block_size
        self.context_length = min(config.context_length, model.kv.blocks * model.kv.block_size)
        self.meter = Meter()
        self.failure: str | None = None
        self.on_death: Callable[[str], None] = _ignore
        self._config = config
        self._runner = ModelRunner(model, config, self.meter)
        copier = self._runner.prefix_copier() if config.prefix_cache else None
        self.blocks = BlockManager(model.kv.blocks, caching=config.prefix_cache, copying=copier is not None)
        limits = BatchLimits(
            max_batch_tokens=config.max_batch_tokens,
            max_batch_size=config.max_batch_size,
            prefill_chunk=config.prefill_chunk,
            chunked=config.chunked_prefill,
        )
        self.planner = StepPlanner(self.blocks, self.block_size, limits, copier)
        self._sampler = Sampler(config.vocabulary_size)
        self._frames = Frames()
        self._sequences = LiveSequences(self.planner, self._frames, self.meter)
        self._commands = Commands()
        self._changed = self._commands.changed
        self.handoff = EngineHandoff(
            self._runner,
            self.planner,
            self._sequences,
            self._commands,
            self._frames,
            vocabulary_size=config.vocabulary_size,
        )
        self._stopping = False
        self._draining = False
        self._stepped = False
        self._resting = True
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
        self._commands.give(lambda: self._sequences.abort(sink, ids))

    def abort_all(self, sink: Sink) -> None:
        """End all that was submitted with this sink."""
        self._commands.give(lambda: self._sequences.abort(sink))

    def reset(self) -> None:
        """Forget cached prefixes, counts and speeds. Only before `start`."""
        self.blocks.clear()
        self.planner.counts = PlannerCounts()
        self.meter.reset()

    def limit(self, max_batch_tokens: int, prefill_chunk: int) -> None:
        """Let steps hold other numbers of tokens, as `EngineConfig` names them. Only before `start`."""
        config = self._config = replace(self._config, max_batch_tokens=max_batch_tokens, prefill_chunk=prefill_chunk)
        limits = self.planner.limits
        self.planner.limits = replace(limits, max_batch_tokens=config.max_batch_tokens, prefill_chunk=config.prefill_chunk)

    def expect(self, times: StepTimes) -> None:
        """Judge by measured times whether a step is stalled. Only before `start`."""
        self._runner.times = times

    def drain(self) -> None:
        """Refuse whatever comes from now on. What runs or waits goes on."""
        self._draining = True

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits, or is on its way in or out. While a step runs, for the thread that runs it alone."""
        return self.planner.empty and not (self._commands or self.handoff.moving or self._frames)

    def wait_until_idle(self) -> None:
        """Block the calling thread until the engine is idle, dead or closed."""
        with self._changed:
            # Within a step a sequence goes from one place to the next, and may for a moment be in none that `idle` looks at.
            self._changed.wait_for(lambda: (self._resting and self.idle) or self._stopping or self.failure is not None)

    def progress(self, now: float) -> bool:
        """Whether the engine lives and its step, if one is running, has taken no longer than it may. `now` by `time.monotonic`."""
        return self.failure is None and now <= self.meter.step_due

    def close(self) -> None:
        """Stop after the running step, drop what is left, and close the model. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
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
        return refusal_of(request, self._config, self.context_length, hands_over=self.handoff.events is not None)

    def _begin(self, sequence: Sequence) -> bool:
        """Let the sequence come between two steps, but tell of it at once: a long step may take longer than the other side waits.

        Both under one lock: who is told may give the sequence up from another thread, and that has to come behind its beginning;
        and who drains and then finds the engine idle, under the same lock, may close it.
        """
        with self._changed:
            if self._commands.over or self._draining:
                return False
            self.handoff.begun(sequence)
            return self._commands.give(lambda: self._sequences.add(sequence))

    # In the engine's thread.

    def step(self) -> None:
        """One step of all that runs. The engine's thread calls it; a test that starts none may."""
        self._runner.watch()
        try:
            self._commands.obey()
            self._expire()
            self.handoff.move_kv()
            step = self.planner.plan()
            self._stepped = bool(step.sequences)
            self.handoff.reserved(step.reserved)
            if step.sequences:
                self._compute(step)
            self._frames.publish()
        finally:
            self.meter.end()

    def _expire(self) -> None:
        for sequence in self.planner.deadlines.expired(time.monotonic()):
            self._sequences.finish(sequence, Finish.DEADLINE)

    def _compute(self, step: Step) -> None:
        batch = build(step, self.block_size)
        rows = [s.next_row() for s in batch.drawing]
        try:
            logits = self._runner.run(step, batch, rows)
            drawn = logits.sample(self._sampler, batch.drawing_rows, rows, self._runner.whole_rows)
        except StepFailed as error:
            self._fail(step, error)
            return
        self.planner.advance(step)
        self.handoff.computed(step)
        self._score(batch.prompts, logits)
        self._deliver(batch.drawing, drawn)

    def _fail(self, step: Step, error: StepFailed) -> None:
        for sequence in step.sequences:
            self._sequences.finish(sequence, Finish.FAILED, f"the backend failed: {error}")
        if error.again:
            self._frames.publish()
            raise EngineDead(f"the backend failed twice in a row, at last with {error}")

    def _score(self, prompts: list[PromptRows], logits: StepLogits) -> None:
        """Note the log-probabilities of prompts' tokens, which are told with the first one of the output."""
        for rows in prompts:
            logprobs, count = rows.sequence.prompt_logprobs, rows.sequence.request.prompt_logprobs
            if logprobs is None or count is None:
                continue
            try:
                for i in range(rows.count):
                    token = rows.sequence.ids[rows.place + i + 1]
                    logprobs.append(self._sampler.logprob(logits.row(rows.first + i), token, count))
            except NotFinite as error:
                self._spoilt(rows.sequence, error)

    def _deliver(self, sequences: list[Sequence], sampled: list[Sampled]) -> None:
        """Add the drawn tokens to their sequences and to the frames."""
        now = time.monotonic()
        self.meter.generated += len(sequences)
        for sequence, drawn in zip(sequences, sampled, strict=True):
            if sequence.status is Status.DONE:  # its prompt's log-probabilities could not be told
                continue
            if drawn.error is not None:
                self._spoilt(sequence, drawn.error)
                continue
            if not sequence.first_token_at:
                sequence.first_token_at = now
                self.meter.prompted += sequence.prompt_length
                self._frames.started(sequence)
            self._frames.token(sequence, drawn)
            finish = sequence.append(drawn.token, self.block_size)
            if finish is not None:
                self._sequences.finish(sequence, finish)
            elif sequence.sends:
                self.handoff.drawn(sequence, drawn.token)

    def _spoilt(self, sequence: Sequence, error: NotFinite) -> None:
        """End a sequence whose logits are no numbers; its KV may be none either, and would spoil whoever began with it."""
        self.planner.distrust(sequence)
        self._sequences.finish(sequence, Finish.FAILED, str(error))

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
            self._drop_all()
        except EngineDead as error:
            self._die(str(error))
        except BaseException as error:  # noqa: BLE001 - SystemExit too: nothing can be computed any more, and who waits must hear of it
            self._die(what_was_raised(error))

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False once the engine is to stop.

        Where the last step computed nothing, what is here waits for others: for a command, or its deadline.
        """
        with self._changed:
            self._resting = True  # until a step begins: whoever holds the lock finds everything in its place
            if self.idle:
                self._changed.notify_all()  # for `wait_until_idle`
            if not self._stepped or self.idle:
                left = min(self.planner.deadlines.next - time.monotonic(), _LONGEST_WAIT)
                self._changed.wait_for(lambda: self._stopping or self._commands or self.handoff.moving, max(0.0, left))
            self._resting = False
            return not self._stopping

    def _die(self, reason: str) -> None:
        """Tell everyone that nothing more comes."""
        self.failure = reason
        self._commands.end()
        self._sequences.fail_all(f"the engine has failed: {reason}")
        self.handoff.give_up_moves()
        self._frames.publish()
        with self._changed:
            self._changed.notify_all()
        self.on_death(reason)

    def _drop_all(self) -> None:
        """The engine stops: forget what is left of it. Idempotent."""
        self._commands.end()
        self._sequences.remove_all()
        self.handoff.give_up_moves()
