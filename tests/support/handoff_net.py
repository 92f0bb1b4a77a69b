"""Both sides of handoffs in one process and in no time: engines that note what is done to them, and a network that harms messages.

Time is the loop's, and goes on only when nothing is left to do at the moment.
"""

import asyncio
import selectors
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from penstock.backends.contract import KvSpec
from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.handoffs import Handoffs, Settings
from penstock.executor.handoff.line import Agreed
from penstock.executor.handoff.ports import SequenceEnded
from penstock.executor.handoff.ticket import Receive, Send, Transport
from penstock.executor.handoff.transports.port import InlinePayload, Parcel, WrongChecksum, checksum
from penstock.executor.handoff.words import Push

PREFILL, DECODE = "prefill", "decode"
KV = KvSpec(4, 64, 4 * 2 * 8, "test", "f32", (1, 1, 2))
GEOMETRY = Geometry(KV, 100)
LATENCY = 0.01


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as there is nothing to do before."""

    def __init__(self):
        self._now = 1000.0
        super().__init__(_Jumping(self))

    def time(self):
        return self._now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop):
        super().__init__()
        self._loop = loop

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready:
            if timeout is None:  # a thread works, or nothing is left to do at all
                return super().select(1.0)
            self._loop._now += timeout
        return ready


def run(work):
    """Run a coroutine in no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


class Handle:
    """A sequence, on either side."""

    def __init__(self, handoff, tokens):
        self.request = SimpleNamespace(handoff=handoff)
        self.tokens = tokens
        self.ends = []  # what the handoff, or the sequence itself, made of it
        self.imported = Counter()


class Engine:
    """A `KvEngine`. KV of token i is the number i everywhere."""

    def __init__(self, lag=0.001):
        self.lag = lag
        self.copies = 0  # that were asked for and not made yet
        self.exported = Counter()  # tokens that were copied out
        self.fails = {}  # "export" or "import" to an exception

    def _later(self, handle, make, done):
        self.copies += 1

        def copy():
            self.copies -= 1
            done(SequenceEnded("it has ended") if handle.ends else make())

        asyncio.get_running_loop().call_later(self.lag, copy)

    def export_kv(self, handle, tokens, *, native, done, wanted):
        assert not native

        def copy():
            if not wanted():
                return SequenceEnded("it is not wanted any more")
            self.exported.update(tokens)
            return self.fails.get("export", data)

        data = np.empty(KV.canonical_shape(len(tokens)), np.float32)
        data[:] = np.arange(tokens.start, tokens.stop)[:, None, None]
        self._later(handle, copy, done)

    def import_kv(self, handle, tokens, data, *, native, done):
        assert not native
        assert data.shape == KV.canonical_shape(len(tokens))

        def take():
            if "import" in self.fails:
                return self.fails["import"]
            assert (data == np.arange(tokens.start, tokens.stop)[:, None, None]).all()
            handle.imported.update(tokens)
            return None

        self._later(handle, take, done)

    def begin_decode(self, handle, first_token, arrival):
        assert handle.imported == Counter(range(arrival_start(handle), handle.tokens))
        handle.ends.append(("decodes", first_token, arrival))

    def handed_off(self, handle):
        handle.ends.append(("handed off",))

    def leave(self, handle):
        handle.ends.append(("left",))

    def fail(self, handle, failure, message):
        handle.ends.append(("failed", failure, message))


def arrival_start(handle):
    return handle.cached


@dataclass
class Sent:
    """Payload that a corrupting network leaves unlike what was put."""

    word: object
    harmed: bool = False


class Outgoing:
    transport = Transport.GRPC

    def __init__(self):
        self.out = 0

    async def put(self, data):
        self.out += 1
        return Parcel(InlinePayload(bytes(data)), checksum(data))

    def taken(self, payload):
        self.out -= 1

    def close(self):
        pass


class Stream:
    """One stream: what the decode side knows of it, and the way of every message. `faults` are used up one by one."""

    executor_id, native, transport = PREFILL, False, Transport.GRPC

    def __init__(self, net, line):
        self.net, self.line = net, line
        self.incoming = self
        self.outgoing = Outgoing()
        self.broken = asyncio.Event()
        self._last = {"ask": 0.0, "answer": 0.0}

    async def open(self, payload, expected):
        await asyncio.sleep(3 * LATENCY)  # so that streams are cut meanwhile, too
        if checksum(payload.data) != expected:
            raise WrongChecksum("harmed on its way")
        return memoryview(payload.data).toreadonly()

    def send(self, answer):
        self._carry("answer", answer, self.line.hear)

    def say(self, word):
        self._carry("ask", word, lambda word: self.net.decode.receiving.hear(self, word))

    def _carry(self, way, word, arrive):
        loop, fault = asyncio.get_running_loop(), self.net.next_fault()
        self.net.words.append(word)
        self.net.times.append(loop.time())
        delay, copies = LATENCY, 1
        match fault:
            case "drop":
                copies = 0
            case "double":
                copies = 2
            case "corrupt" if isinstance(word, Push):
                data = bytearray(word.parcel.payload.data)
                data[0] ^= 1
                word = replace(word, parcel=replace(word.parcel, payload=InlinePayload(bytes(data))))
            case "cut":
                self.broken.set()
            case ("late", seconds):
                delay = seconds
        # A stream keeps its order.
        for _ in range(copies):
            self._last[way] = max(self._last[way] + 1e-6, loop.time() + delay)
            loop.call_at(self._last[way], lambda: None if self.broken.is_set() else arrive(word))


class Net:
    """A prefill and a decode executor, and what lies between them.

    Args:
        faults: what happens to each message, in their order: None, "drop", "double", "corrupt", "cut" or ("late", seconds).
    """

    def __init__(self, faults=(), *, lease=3.0, push_bytes=64, window_bytes=256, lag=0.001):
        self.faults = list(faults)[::-1]
        self.last_fault = asyncio.get_running_loop().time()
        self.words = []
        self.times = []
        self.streams = []
        self.reachable = asyncio.Event()
        self.reachable.set()
        settings = Settings(lease, push_bytes, window_bytes, (Transport.GRPC,))
        self.engines = SimpleNamespace(prefill=Engine(lag), decode=Engine(lag))
        self.prefill = Handoffs(PREFILL, self.engines.prefill, GEOMETRY, settings, self._dial)
        self.decode = Handoffs(DECODE, self.engines.decode, GEOMETRY, settings, self._dial)
        self._settings = settings
        self._links = {}

    def next_fault(self):
        if not self.faults:
            return None
        fault = self.faults.pop()
        if fault is not None:
            self.last_fault = asyncio.get_running_loop().time() + (fault[1] if isinstance(fault, tuple) else 0)
        return fault

    def _dial(self, line):
        if line not in self._links or self._links[line].done():
            self._links[line] = asyncio.get_running_loop().create_task(self._keep(line))

    async def _keep(self, line):
        while line.busy:
            await asyncio.sleep(0.05)
            await self.reachable.wait()
            stream = Stream(self, line)
            self.streams.append(stream)
            self.decode.receiving.stream_up(stream)
            line.opened(Agreed(stream.outgoing, False, self._settings.push_bytes, self._settings.window_bytes))
            works = [asyncio.create_task(w) for w in (self._write(stream, line), stream.broken.wait(), line.stuck.wait())]
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
            stream.broken.set()
            for work in works:
                work.cancel()
            line.lost(HandoffFailure.LEASE_EXPIRED, "the stream was cut")
            self.decode.receiving.stream_lost(stream)

    async def _write(self, stream, line):
        idle = 0
        while line.busy or idle < 40:
            line.wanted.clear()
            while (word := line.next_message()) is not None:
                stream.say(word)
            try:
                await asyncio.wait_for(line.wanted.wait(), 0.1)
                idle = 0
            except TimeoutError:
                idle += 1

    def reserve(self, tokens, cached=0):
        """The decode side's half of a sequence, which has its blocks: its handle, and the ticket."""
        handle = Handle(Receive(PREFILL), tokens)
        handle.cached = cached
        return handle, self.decode.reserved(handle, cached, tokens)

    def begin(self, ticket):
        """The prefill side's half."""
        handle = Handle(Send(ticket), ticket.tokens)
        self.prefill.begun(handle)
        return handle

    async def compute(self, handle, steps, token, pause=0.02):
        """Steps of prefill, and the first token."""
        for step in range(1, steps + 1):
            await asyncio.sleep(pause)
            if handle.ends:
                return
            self.prefill.computed(handle, handle.tokens * step // steps)
        self.prefill.drawn(handle, token)

    def end(self, side, handle):
        """The engine ends a sequence by itself, unless the handoff has before."""
        if not handle.ends:
            handle.ends.append(("ended",))
            side.ended(handle)

    async def settle(self, *handles, until):
        """Wait until all have ended; fails behind a time of the loop."""
        loop = asyncio.get_running_loop()
        while not all(handle.ends for handle in handles):
            assert loop.time() < until, "not settled in time"
            await asyncio.sleep(0.01)
