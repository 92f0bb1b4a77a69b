"""Two engines, of which one prefills what the other decodes. KV goes over by function calls, and every event is noted."""

from fake_engine import GREEDY, Bench

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.ticket import Arrival, Receive, Send, Ticket, Transport
from penstock.executor.sequence import SequenceRequest

PREFILL, DECODE = "prefill", "decode"


class Handoff:
    """`HandoffEvents` of both engines: sends what is computed as soon as it is, and begins to decode once all is there.

    Attributes:
        told: (event, request's sequence id) in order.
        hold: while set, KV is not sent, nor the first token.
    """

    def __init__(self, prefill, decode, native=False):
        self.prefill, self.decode, self.native = prefill.handoff, decode.handoff, native
        self.block_size = decode.block_size
        self.tickets, self.receivers, self.senders = {}, {}, {}
        self.told, self.live, self.over, self.left = [], [], set(), set()
        self.hold = False
        self.prefill.events = self.decode.events = self

    def reserved(self, handle, cached_tokens, tokens):
        self._note("reserved", handle)
        self.live.append(handle)
        handoff_id = len(self.tickets).to_bytes(16, "big")
        ticket = Ticket(handoff_id, DECODE, PREFILL, cached_tokens, tokens, 3.0)
        self.tickets[handle.request.sequence_id] = ticket
        self.receivers[handoff_id] = handle
        return ticket

    def begun(self, handle):
        self._note("begun", handle)
        self.live.append(handle)
        ticket = handle.request.handoff.ticket
        self.senders[ticket.handoff_id] = _Sender(self, handle, self.receivers[ticket.handoff_id], ticket)

    def computed(self, handle, tokens):
        self._note("computed", handle)
        self._sender(handle).computed = tokens
        self.push(handle)

    def drawn(self, handle, token):
        self._note("drawn", handle)
        sender = self._sender(handle)
        assert sender.computed == sender.ticket.tokens
        sender.token = token
        self.push(handle)

    def ended(self, handle):
        self._note("ended", handle)
        self.over.add(handle)
        if handle in self.live:
            self.live.remove(handle)
        if isinstance(handle.request.handoff, Send):
            receiver = self._sender(handle).receiver
            if receiver in self.live:
                self.live.remove(receiver)
                self.left.add(receiver)
                self.decode.leave(receiver)
        else:
            for sender in self.senders.values():
                if sender.receiver is handle:
                    self.fail(self.prefill, sender.handle, HandoffFailure.ABORTED)

    def push(self, handle):
        if not self.hold and handle in self.live:
            self._sender(handle).push()

    def go_on(self):
        """Send what was held back."""
        self.hold = False
        for sender in self.senders.values():
            if sender.handle in self.live:
                sender.push()

    def fail(self, half, handle, failure, message="told by a test"):
        if handle in self.live:
            self.live.remove(handle)
            half.fail(handle, failure, message)

    def _sender(self, handle):
        return self.senders[handle.request.handoff.ticket.handoff_id]

    def _note(self, event, handle):
        assert handle not in self.over
        self.told.append((event, handle.request.sequence_id))


class _Sender:
    """One sequence's way from the one engine to the other."""

    def __init__(self, handoff, handle, receiver, ticket):
        self.handoff, self.handle, self.receiver, self.ticket = handoff, handle, receiver, ticket
        self.computed, self.sent, self.pushes, self.open, self.bytes = 0, ticket.cached_tokens, 0, 0, 0
        self.token = None

    def push(self):
        last = self.token is not None
        size = self.handoff.block_size
        end = self.computed if last or not self.handoff.native else self.computed // size * size
        if end > self.sent:
            tokens, self.sent = range(self.sent, end), end
            self.open += 1
            self.pushes += 1
            native = self.handoff.native
            self.handoff.prefill.export_kv(self.handle, tokens, native=native, done=lambda data: self._exported(tokens, data))
        self._begin()

    def _exported(self, tokens, data):
        if isinstance(data, Exception):
            self._failed(data)
            return
        self.bytes += data.nbytes
        self.handoff.decode.import_kv(self.receiver, tokens, data, native=self.handoff.native, done=self._imported)

    def _imported(self, error):
        if error is not None:
            self._failed(error)
            return
        self.open -= 1
        self._begin()

    def _begin(self):
        handoff = self.handoff
        if self.token is None or self.open or self.sent < self.ticket.tokens:
            return
        if self.receiver in handoff.live and self.handle in handoff.live:
            handoff.live.remove(self.receiver)
            handoff.live.remove(self.handle)
            arrival = Arrival(self.bytes, 0.0, 0.0, 0.0, Transport.GRPC, handoff.native, self.pushes)
            handoff.decode.begin_decode(self.receiver, self.token, arrival)
            handoff.prefill.handed_off(self.handle)

    def _failed(self, error):
        self.handoff.fail(self.handoff.prefill, self.handle, HandoffFailure.BACKEND, str(error))
        self.handoff.fail(self.handoff.decode, self.receiver, HandoffFailure.BACKEND, str(error))


class JoinedBenches:
    """A bench that prefills and one that decodes, driven as a gateway would: the second half follows on the first one's ticket."""

    def __init__(self, prefill=None, decode=None, *, native=False):
        self.prefill, self.decode = prefill or Bench(), decode or Bench()
        self.handoff = Handoff(self.prefill.engine, self.decode.engine, native)
        self.asked = {}
        self.arrived = {}

    def submit(self, sequence_id, prompt, max_tokens, **fields):
        fields = {"sampling": GREEDY} | fields
        self.asked[sequence_id] = dict(sequence_id=sequence_id, prompt=prompt, max_tokens=max_tokens, **fields)
        self.decode.engine.submit(SequenceRequest(**self.asked[sequence_id], handoff=Receive(PREFILL)), self._decode_sink)

    def submit_together(self, sequence_id, prompt, max_tokens, **fields):
        """A sequence that the second engine runs alone, of the same sink as those that it receives."""
        fields = {"sampling": GREEDY} | fields
        request = SequenceRequest(sequence_id=sequence_id, prompt=prompt, max_tokens=max_tokens, **fields)
        self.decode.engine.submit(request, self._decode_sink)

    def _decode_sink(self, frame):
        for sequence_id, ticket in frame.reserved:
            self.prefill.engine.submit(SequenceRequest(**self.asked[sequence_id], handoff=Send(ticket)), self.prefill.sink)
        for sequence_id, arrival in frame.arrived:
            assert sequence_id not in self.arrived
            self.arrived[sequence_id] = arrival
        self.decode.sink(frame)

    def step(self):
        """Both, once each."""
        for bench in (self.prefill, self.decode):
            bench.engine.step()
            bench.check()

    def run(self):
        while not (self.prefill.engine.idle and self.decode.engine.idle):
            self.step()
        return self.tokens

    @property
    def tokens(self):
        """What both told, in order of position."""
        ids = self.prefill.tokens.keys() | self.decode.tokens.keys()
        return {i: self.prefill.tokens.get(i, []) + self.decode.tokens.get(i, []) for i in ids}

    @property
    def logprobs(self):
        """What both told; nothing was told by both."""
        assert not self.prefill.logprobs.keys() & self.decode.logprobs.keys()
        return self.prefill.logprobs | self.decode.logprobs
