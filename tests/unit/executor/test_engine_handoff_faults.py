"""Whatever happens between two engines: each sequence ends once, its text is right, and every block comes back."""

import heapq
import time

from fake_engine import Bench, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_engines import JoinedBenches

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.ticket import Receive, Send
from penstock.executor.sequence import Finish, Status

BY_HANDOFF = {Finish.HANDED_OFF, Finish.HANDOFF_FAILED}
AGAIN = 1000  # added to the id of a sequence that is computed anew where it was to be decoded
LATER = time.monotonic() + 3600


class Gateway(JoinedBenches):
    """What fails in between is computed anew by the engine that decodes, behind what was told of it."""

    def __init__(self, *benches, **options):
        super().__init__(*benches, **options)
        self.plain, self.late, self.settled = {}, set(), set()
        self.sides = {"prefill": (self.prefill,), "decode": (self.decode,), "both": (self.prefill, self.decode)}
        self.number = 0

    def on_apart(self, first, length, count):
        prompt = [(7 * first + j * j) % 97 for j in range(length)]
        self.number += 1
        self.submit(self.number, prompt, count, deadline=LATER)

    def on_plain(self, side, length, count):
        self.number += 1
        self.plain[self.number] = side, [j % 5 for j in range(length)], count
        for bench in self.sides[side]:
            bench.submit(self.number, *self.plain[self.number][1:], priority=self.number % 2)

    def on_step(self, side, times=1):
        for bench in times * self.sides[side]:
            bench.engine.step()
            bench.check()
            self.recover()

    def on_hold(self, hold):
        """KV stays where it is, until it is let go."""
        self.handoff.hold = hold
        if not hold:
            self.handoff.go_on()

    def on_abort(self, place):
        """The client goes."""
        if self.asked:
            i = list(self.asked)[place % len(self.asked)]
            self.settled.add(i)
            self.late.add(i)
            self.prefill.engine.abort([i], self.prefill.sink)
            self.decode.engine.abort([i, i + AGAIN], self._decode_sink)

    def on_expire(self, side, place):
        """A deadline passes."""
        deadlines = self.sides[side][0].engine.planner.deadlines._heap
        live = [entry for entry in deadlines if entry[2].status is not Status.DONE]
        if live:
            _, arrival, sequence = entry = live[place % len(live)]
            deadlines.remove(entry)
            heapq.heapify(deadlines)
            heapq.heappush(deadlines, (0.0, arrival, sequence))
            self.late.add(sequence.request.sequence_id % AGAIN)

    def on_fail(self, side, place, failure):
        """The handoff of one sequence fails."""
        kind = Receive if side == "decode" else Send
        live = [h for h in self.handoff.live if isinstance(h.request.handoff, kind)]
        if live:
            self.handoff.fail(self.sides[side][0].engine.handoff, live[place % len(live)], failure)

    def recover(self):
        """A half that is over ends the other; what the decoding one has lost begins anew there."""
        for i in self.asked.keys() - self.settled:
            first, second = self.prefill.finished.get(i), self.decode.finished.get(i)
            if second is not None:
                self.settled.add(i)
                self.prefill.engine.abort([i], self.prefill.sink)
                over = first is not None and first.reason in {Finish.LENGTH, Finish.DEADLINE}
                if second.reason is Finish.HANDOFF_FAILED and not over:
                    self._begin_anew(i)
            elif first is not None and i not in self.arrived and first.reason in {Finish.DEADLINE, Finish.HANDOFF_FAILED}:
                self.settled.add(i)
                self.decode.engine.abort([i], self._decode_sink)
                if first.reason is Finish.HANDOFF_FAILED:
                    self._begin_anew(i)

    def _begin_anew(self, i):
        self.decode.submit(**self.asked[i] | {"sequence_id": i + AGAIN, "replayed": self.tokens.get(i, [])})

    def run(self):
        """Until nothing is left, which takes no more steps than there are tokens and blocks to wait for."""
        for _ in range(1000):
            if self.prefill.engine.idle and self.decode.engine.idle:
                return
            self.on_step("both")
        raise AssertionError("the engines wait for each other")

    def check_blocks(self):
        for bench in self.sides["both"]:
            assert bench.engine.blocks.counts().used == 0
            assert bench.engine.blocks.available == bench.engine.blocks.count

    def check_events(self):
        """The handoff heard of each end that it did not bring about itself, and of no other."""
        assert not self.handoff.live
        for sender in self.handoff.senders.values():
            told = self.prefill.finished.get(sender.handle.request.sequence_id)
            assert (sender.handle in self.handoff.over) is not (told is not None and told.reason in BY_HANDOFF)
        for receiver in self.handoff.receivers.values():
            i = receiver.request.sequence_id
            told = self.decode.finished.get(i)
            failed = told is not None and told.reason in BY_HANDOFF
            # Of one that ended on both sides at once either may have been first.
            left = receiver in self.handoff.left - self.handoff.over
            assert (receiver in self.handoff.over) is not (failed or left or i in self.arrived)

    def check_answers(self):
        for i, (side, prompt, count) in self.plain.items():
            assert self.sides[side][0].tokens[i] == expected(prompt, count)
        for i in self.asked.keys() - self.late:
            whole = self.tokens.get(i, []) + self.decode.tokens.get(i + AGAIN, [])
            assert whole == expected(self.asked[i]["prompt"], self.asked[i]["max_tokens"])
            ends = [b.finished[k].reason for b in self.sides["both"] for k in (i, i + AGAIN) if k in b.finished]
            assert ends.count(Finish.LENGTH) == 1


places = st.integers(0, 20)
sides = st.sampled_from(["prefill", "decode"])
apart = st.tuples(st.just("apart"), st.integers(0, 2), st.integers(1, 70), st.integers(1, 60))
steps = st.tuples(st.just("step"), st.sampled_from(["prefill", "decode", "both", "both"]), st.integers(1, 9))
events = st.lists(
    st.one_of(
        *(apart, apart, apart, steps, steps, steps),
        st.tuples(st.just("plain"), sides, st.integers(1, 70), st.integers(1, 60)),
        st.tuples(st.just("hold"), st.booleans()),
        st.tuples(st.just("abort"), places),
        st.tuples(st.just("expire"), sides, places),
        st.tuples(st.just("fail"), sides, places, st.sampled_from(HandoffFailure)),
    ),
    min_size=12,
    max_size=60,
)


@settings(deadline=None, max_examples=50)
@given(work=events, blocks=st.tuples(st.integers(9, 16), st.integers(9, 16)), batch=st.integers(1, 6), native=st.booleans())
def test_every_order_of_events_ends_each_sequence_once_and_gives_all_blocks_back(work, blocks, batch, native):
    limits = {"max_batch_size": batch, "max_batch_tokens": 40, "prefill_chunk": 16}
    gateway = Gateway(Bench(blocks[0], **limits), Bench(blocks[1], **limits), native=native)
    for event, *facts in work:
        getattr(gateway, f"on_{event}")(*facts)
    gateway.handoff.go_on()
    gateway.run()
    gateway.check_blocks()
    gateway.check_events()
    gateway.check_answers()
