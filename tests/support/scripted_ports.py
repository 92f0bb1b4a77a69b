"""A request between ports that write down what is asked of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

from penstock.gateway.machine import Request
from penstock.gateway.ports import Ports
from penstock.gateway.request import Caller, Plan, PlannedSampling, Reporting

EOS = 9


class ScriptedPorts:
    """Placement, execution and decoding at once. What is held at each is counted."""

    def __init__(self):
        self.placings, self.announced = [], []
        self.placed, self.prefilling = set(), set()
        self.sequences, self.decodings, self.finished = {}, {}, set()
        self.starts = []
        self._ids = itertools.count(1)

    def place(self, request, placing):
        self.placed.add(request.number)
        self.placings.append(placing)

    def announce(self, request, lease):
        self.announced.append(lease)

    def prefilled(self, request):
        assert request.number in self.placed
        self.prefilling.discard(request.number)

    def release(self, request):
        self.placed.discard(request.number)
        self.prefilling.discard(request.number)

    def start(self, lease, choice):
        return self._start(lease.executor_id, choice, "together")

    def receive(self, lease, prefill, choice):
        assert prefill is not None
        self.prefilling.add(choice.request.number)
        return self._start(lease.executor_id, choice, "receive")

    def send(self, prefill, ticket, choice):
        assert ticket == b"ticket"
        return self._start(prefill.executor_id, choice, "send")

    def _start(self, executor_id, choice, kind):
        sequence_id = next(self._ids)
        self.sequences[sequence_id] = choice
        self.starts.append((executor_id, choice.index, tuple(choice.ids), kind))
        return sequence_id

    def abort(self, sequence_id):
        self.sequences.pop(sequence_id, None)

    def open(self, choice):
        self.decodings[choice.decoding_id] = list(choice.decodable_ids)
        self.finished.discard(choice.decoding_id)

    def token(self, decoding_id, token_id):
        if decoding_id in self.decodings:
            self.decodings[decoding_id].append(token_id)

    def describe(self, choice, token_ids):
        pass

    def finish(self, decoding_id):
        self.finished.add(decoding_id)

    def close_decoding(self, decoding_id):
        self.decodings.pop(decoding_id, None)

    close = close_decoding

    def at_rest(self):
        return not (self.placed or self.prefilling or self.sequences or self.decodings)


class Told:
    """An output that keeps what it was told."""

    def __init__(self):
        self.texts, self.ids, self.finishes = {}, {}, {}
        self.closing = self.error = None

    def text(self, index, text, token_ids, logprobs):
        assert self.closing is None
        assert self.error is None
        assert index not in self.finishes
        self.texts[index] = self.texts.get(index, "") + text
        self.ids.setdefault(index, []).extend(token_ids)

    def prompt(self, index, logprobs):
        pass

    def finish(self, index, finish):
        assert index not in self.finishes
        self.finishes[index] = finish

    def close(self, closing):
        assert self.closing is None
        assert self.error is None
        self.closing = closing

    def fail(self, error):
        assert self.closing is None
        assert self.error is None
        self.error = error


def plan(n=1, max_tokens=8, stop=()):
    neutral = dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), 0.0)
    return Plan(
        model="m",
        tokenizer_fingerprint="t",
        prompt_ids=(1, 2, 3),
        sampling=PlannedSampling(**neutral, top_k=0, logit_bias={}, seed=1),
        max_tokens=max_tokens,
        min_tokens=0,
        stop=stop,
        stop_ids=frozenset({EOS}),
        include_stop_text=False,
        reporting=Reporting(token_ids=True),
        n=n,
        priority=0,
        fields=(),
        block_hashes=b"",
        salt=b"",
    )


def build(new=Request, clock=None, arrived=None, **fields):
    """`build(n=…, max_tokens=…)`: a request that has begun, its ports and what it told; `new` makes it. A clock ticks when read."""
    ports, told, done = ScriptedPorts(), Told(), []
    caller = Caller(tenant="t", request_id="r", deadline=1e9, arrived=arrived)
    ticks = itertools.count()
    request = new(
        plan(**fields),
        caller,
        Ports(ports, ports, ports),
        told,
        known_tokens={},
        clock=clock or (lambda: float(next(ticks))),
        max_attempts=3,
        on_done=done.append,
    )
    request.begin()
    return SimpleNamespace(request=request, ports=ports, told=told, done=done, eos=EOS)
