"""Goodput of the policies together, apart and auto: the real scheduler over simulated executors; prints one JSON object.

Open-loop load (Poisson) of short chats and long prompts. A request is good if its first token came within a limit, and 95 of 100
gaps between its tokens are within another. Executors make steps as the real engine does, chunked prefill beside decoding, and these
take what step-time curves say, of the order of a 0.6B model on one core and of an 8B model on one large GPU. Nothing but the
scheduler's decisions is looked at here: no network, no processes, no noise.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.common.step_times import Curve, StepTimes
from penstock.scheduler.config import Policy, SchedulerConfig
from penstock.scheduler.core import Scheduler
from penstock.scheduler.executors import Executor
from penstock.scheduler.model import Description, Grant, Load, Needs, Role

_REPORT_SECONDS = 0.25
_RESERVE_SECONDS = 0.005
_FEATURES = frozenset({"export_kv", "import_kv"})
POLICIES: tuple[Policy, ...] = ("together", "apart", "auto")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Requests of one kind: average tokens of prompt and answer, and the limits for its first token and the gaps, in seconds."""

    prompt: int
    answer: int
    first_token: float
    gap: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Executors of one make, and the load that suits them. `chunk` tokens of prompts beside decoding, `step` without."""

    times: StepTimes
    chunk: int
    step: int
    batch: int
    kv_bytes: int
    bytes_per_second: float
    chat: Kind
    long: Kind
    seconds: float


CORE = Machine(
    times=StepTimes(
        prefill=Curve((16, 64, 256, 512), (0.10, 0.26, 0.90, 1.75)),
        prefill_pair_seconds=2e-7,
        decode=Curve((1, 4, 8, 16), (0.06, 0.08, 0.11, 0.18)),
        decode_context=256,
        decode_token_seconds=5e-6,
    ),
    chunk=64,
    step=512,
    batch=16,
    kv_bytes=115_000,
    bytes_per_second=1e9,
    chat=Kind(prompt=40, answer=60, first_token=2.0, gap=0.35),
    long=Kind(prompt=1500, answer=40, first_token=15.0, gap=0.35),
    seconds=200.0,
)
GPU = Machine(
    times=StepTimes(
        prefill=Curve((64, 512, 2048, 8192), (0.010, 0.025, 0.09, 0.36)),
        prefill_pair_seconds=1e-10,
        decode=Curve((1, 8, 64, 256), (0.009, 0.010, 0.014, 0.03)),
        decode_context=512,
        decode_token_seconds=2e-8,
    ),
    chunk=512,
    step=8192,
    batch=256,
    kv_bytes=131_072,
    bytes_per_second=1e10,
    chat=Kind(prompt=300, answer=250, first_token=0.5, gap=0.03),
    long=Kind(prompt=8000, answer=150, first_token=3.0, gap=0.03),
    seconds=60.0,
)
MACHINES = {"core": CORE, "gpu": GPU}
# Chats and long prompts per second.
LOADS = {
    "core": ((0.3, 0.02), (0.6, 0.04), (0.6, 0.1), (1.0, 0.04), (1.0, 0.08), (0.2, 0.15), (1.4, 0.02)),
    "gpu": ((5.0, 0.2), (10.0, 0.5), (10.0, 1.0), (20.0, 1.0), (20.0, 2.0), (30.0, 1.0), (5.0, 2.2)),
}


@dataclass(eq=False)
class Answering:
    """One request: where it decodes, how far it is, and when its tokens came."""

    number: int
    kind: Kind
    prompt: int
    answer: int
    arrived: float
    decodes_on: Engine | None = None
    began: float = 0.0
    computed: int = 0
    token_times: list[float] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Prompt tokens to compute."""
        return self.prompt - self.computed

    @property
    def good(self) -> bool:
        """Whether it kept its limits."""
        gaps = sorted(after - before for before, after in itertools.pairwise(self.token_times))
        return self.token_times[0] - self.arrived <= self.kind.first_token and gaps[int(0.95 * len(gaps))] <= self.kind.gap


class Engine:
    """An executor's steps."""

    def __init__(self, simulation: Simulation, executor: Executor, machine: Machine) -> None:
        self.executor = executor
        self.receiving: list[Answering] = []
        self.waiting: list[Answering] = []
        self.running: list[Answering] = []
        self.sending: list[Answering] = []
        self._simulation = simulation
        self._machine = machine
        self._busy = False

    def load(self) -> Load:
        """What it reports."""
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_tokens=sum(s.left for s in (*self.waiting, *self.running)),
            receiving=len(self.receiving),
            sending=len(self.sending),
            handoff_bytes_per_second=self._machine.bytes_per_second,
        )

    def add(self, sequence: Answering) -> None:
        """Let a sequence wait for its prefill."""
        sequence.began = self._simulation.now
        self.waiting.append(sequence)
        self.begin()

    def take(self, sequence: Answering) -> None:
        """A sequence's KV is here."""
        self.receiving.remove(sequence)
        self.running.append(sequence)
        self.begin()

    def begin(self) -> None:
        """Begin a step, if none runs and there is something to do."""
        if self._busy:
            return
        times, decoding = self._machine.times, [s for s in self.running if not s.left]
        chunks = self._chunks(self._machine.chunk if decoding else self._machine.step)
        seconds = 0.0
        if decoding:
            context = sum(s.prompt + len(s.token_times) for s in decoding) / len(decoding)
            seconds += times.step_seconds(len(decoding), context)
        if chunks:
            pairs = sum(count * s.computed for s, count in chunks)
            seconds += times.chunk_seconds(sum(count for _, count in chunks)) + times.prefill_pair_seconds * pairs
        if seconds:
            self._busy = True
            self._simulation.after(seconds, lambda: self._end(decoding, chunks))

    def _chunks(self, room: int) -> list[tuple[Answering, int]]:
        chunks = []
        for sequence in [s for s in self.running if s.left]:
            chunks.append((sequence, min(room, sequence.left)))
            room -= chunks[-1][1]
        while self.waiting and room and len(self.running) + len(self.receiving) < self._machine.batch:
            sequence = self.waiting.pop(0)
            self.running.append(sequence)
            chunks.append((sequence, min(room, sequence.left)))
            room -= chunks[-1][1]
        return [(sequence, count) for sequence, count in chunks if count]

    def _end(self, decoding: Sequence[Answering], chunks: Sequence[tuple[Answering, int]]) -> None:
        for sequence in decoding:
            self._tell(sequence)
        for sequence, count in chunks:
            sequence.computed += count
            if not sequence.left:
                self._tell(sequence)
        self._busy = False
        self.begin()

    def _tell(self, sequence: Answering) -> None:
        now, machine = self._simulation.now, self._machine
        sequence.token_times.append(now)
        if len(sequence.token_times) == sequence.answer:
            self.running.remove(sequence)
            self._simulation.end(sequence)
        elif sequence.decodes_on is not self:
            self.running.remove(sequence)
            self.sending.append(sequence)
            last_chunk = min(sequence.prompt, machine.step) * machine.kv_bytes / machine.bytes_per_second
            rest = sequence.prompt * machine.kv_bytes / machine.bytes_per_second - (now - sequence.began)
            self._simulation.after(max(last_chunk, rest), lambda: self._hand_over(sequence))

    def _hand_over(self, sequence: Answering) -> None:
        self.sending.remove(sequence)
        self._simulation.prefilled(sequence)


class Simulation:
    """A scheduler, its executors and one gateway, in simulated time."""

    def __init__(self, policy: Policy, machine: Machine, roles: Sequence[Role]) -> None:
        self.now = 0.0
        self.requests: list[Answering] = []
        self.placed = self.apart = 0
        self._machine = machine
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        config = SchedulerConfig(settle_seconds=0.0, lease_seconds=1e6, placement=policy, expected_output_tokens=128)
        self._core = Scheduler(config, lambda: self.now)
        self._gateway = self._core.open_gateway()
        self._engines = {f"{role.value}-{i}": self._engine(f"{role.value}-{i}", role) for i, role in enumerate(roles)}
        self._report()

    def _engine(self, name: str, role: Role) -> Engine:
        machine = self._machine
        description = Description(
            executor_id=name,
            address="127.0.0.1:1",
            model="m",
            context_length=32_768,
            kv_block_size=16,
            kv_blocks=1 << 16,
            max_batch_size=machine.batch,
            times=machine.times,
            model_fingerprint="v1",
            features=_FEATURES,
            prefill_chunk=machine.chunk,
            kv_bytes_per_token=machine.kv_bytes,
            role=role,
        )
        return Engine(self, self._core.executors.join(description), machine)

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Have something done."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), then))

    def load(self, rate: float, kind: Kind, seed: str) -> None:
        """Requests of a kind, so many per second for the machine's time; lengths vary by half, and are the same for each policy."""
        source, when = random.Random(seed), 0.0
        while rate and (when := when + source.expovariate(rate)) < self._machine.seconds:
            prompt, answer = (max(4, int(tokens * source.uniform(0.5, 1.5))) for tokens in (kind.prompt, kind.answer))
            self.after(when, lambda k=(kind, prompt, answer): self._arrive(*k))  # type: ignore[misc]

    def run(self) -> None:
        """Until all requests have ended, or long after they should have."""
        while self._events and self._events[0][0] < 2 * self._machine.seconds:
            self.now, _, then = heapq.heappop(self._events)
            then()

    def end(self, sequence: Answering) -> None:
        """A request has its answer."""
        self._core.release(self._gateway, sequence.number)
        self._step()

    def prefilled(self, sequence: Answering) -> None:
        """A request's KV has arrived."""
        if sequence.decodes_on is not None:
            sequence.decodes_on.take(sequence)
        self._core.prefilled(self._gateway, sequence.number)
        self._step()

    def goodput(self) -> float:
        """Share of the requests that were good."""
        return sum(len(s.token_times) == s.answer and s.good for s in self.requests) / len(self.requests)

    def _report(self) -> None:
        for engine in self._engines.values():
            self._core.executors.report(engine.executor, engine.load())
        self._step()
        self.after(_REPORT_SECONDS, self._report)

    def _arrive(self, kind: Kind, prompt: int, answer: int) -> None:
        sequence = Answering(len(self.requests), kind, prompt, answer, self.now)
        self.requests.append(sequence)
        self._core.place(self._gateway, sequence.number, Needs(model="m", prompt_tokens=prompt, max_tokens=answer))
        self._step()

    def _step(self) -> None:
        for grant in self._core.step():
            if not isinstance(grant, Grant):
                raise TypeError(f"not placed: {grant}")
            sequence, engine = self.requests[grant.request_id], self._engines[grant.executor_id]
            sequence.decodes_on = engine
            self.placed += 1
            if grant.prefill is None:
                engine.add(sequence)
                continue
            self.apart += 1
            engine.receiving.append(sequence)
            prefill = self._engines[grant.prefill.executor_id]
            self.after(_RESERVE_SECONDS, lambda p=prefill, s=sequence: p.add(s))  # type: ignore[misc]


def simulate(policy: Policy, machine: Machine, roles: Sequence[Role], rates: tuple[float, float], seed: int = 0) -> Simulation:
    """One policy under one load: chats and long prompts per second."""
    simulation = Simulation(policy, machine, roles)
    for rate, kind, name in zip(rates, (machine.chat, machine.long), ("chat", "long"), strict=True):
        simulation.load(rate, kind, f"{name}-{seed}")
    simulation.run()
    return simulation


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--decode", type=int, nargs="+", default=(1, 2), help="executors that decode, behind one that prefills")
    args = parser.parse_args()
    points = [_point(name, decode, rates, args.seeds) for name in MACHINES for decode in args.decode for rates in LOADS[name]]
    least = min(point["auto_over_better"] for point in points)
    print(json.dumps({"benchmark": "splitting", "points": points, "least_auto_over_better": least, "seeds": args.seeds}))


def _point(name: str, decode: int, rates: tuple[float, float], seeds: int) -> dict[str, Any]:
    roles = [Role.PREFILL, *[Role.DECODE] * decode]
    runs = {policy: [simulate(policy, MACHINES[name], roles, rates, seed) for seed in range(seeds)] for policy in POLICIES}
    goodput = {policy: sum(run.goodput() for run in found) / seeds for policy, found in runs.items()}
    both = [simulate("together", MACHINES[name], [Role.BOTH] * len(roles), rates, seed).goodput() for seed in range(seeds)]
    better = max(goodput["together"], goodput["apart"])
    return {
        "machine": name,
        "prefill": 1,
        "decode": decode,
        "chats_per_second": rates[0],
        "long_per_second": rates[1],
        "goodput_all_both": round(sum(both) / seeds, 3),
        "goodput": {policy: round(share, 3) for policy, share in goodput.items()},
        "auto_apart": round(sum(run.apart for run in runs["auto"]) / sum(run.placed for run in runs["auto"]), 3),
        "auto_over_better": round(goodput["auto"] / better, 3) if better else 1.0,
    }


if __name__ == "__main__":
    main()
